"""What agents think, as far as it can be seen: the logit lens, and a page of a whole run.

from minimas.look import logit_lens
rows = logit_lens(system, result)  # of a run with keep_states=True
"""

from .logit_lens import logit_lens

__all__ = ["logit_lens"]
