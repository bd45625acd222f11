"""What agents think, as far as it can be seen: the logit lens, and a page of a whole run.

from minimas.look import logit_lens
rows = logit_lens(system, result)  # of a run with keep_states=True
"""

from typing import TYPE_CHECKING

__all__ = ["logit_lens"]

if (
    TYPE_CHECKING
):  # what editors and type checkers see; at run time it is the module, which may be called
    from .logit_lens import logit_lens
