"""What agents think, as far as it can be seen: the logit lens, and a page of a whole run."""
