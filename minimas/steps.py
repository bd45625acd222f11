"""How an agent repeats a step. Thinking and writing are both one step, taken again and again.

A step is a function of tensors, the loop state: step(*state) -> (next state, output). The tensors of a loop state have
a row for each prompt; the first two are always the next inputs x (B, T, D) and their positions (B, T).

Steps takes them one by one. fast.graphs.Graphs replays them as CUDA graphs, which work on memory that stays in place
and for one batch size each. So whoever takes steps also says how a cache is made and grown, and how far a batch
shrinks.

Notation: B rows, T tokens, D width, S positions.
"""

from collections.abc import Callable, Sequence

import torch

from .cache import grow
from .common import no_op
from .llama import Llama

LoopState = Sequence[torch.Tensor]
Step = Callable[..., tuple[LoopState, torch.Tensor]]


class Steps:
    """Takes steps as they are."""

    def __init__(self, model: Llama) -> None:
        self.model = model
        self.sync_every = 1  # steps that are taken before the host looks at their outputs
        self.base: list | None = None  # a cache that stays in place from prompt to prompt

    def make_cache(self, B: int, S: int) -> list:
        """An empty cache for B rows of S positions, one object per layer."""
        return self.model.make_cache(B, S)

    def grow_cache(self, cache: list, more: int) -> None:
        """Make room for `more` positions in each layer that holds all of them."""
        grow(cache, more)

    def rows_to_keep(self, unfinished: int, rows: int) -> int:
        """How many of its rows a batch keeps when so many of them are unfinished."""
        return unfinished

    def release(self) -> None:
        """Free all memory that is kept from one prompt to the next."""

    def take(
        self,
        step: Step,
        state: LoopState,
        times: int,
        cache: list,
        callback: Callable = no_op,
        kind: tuple = (),
    ) -> tuple[LoopState, list[torch.Tensor]]:
        """Take a step `times` times -> the last loop state, and the outputs.

        cache       what the step reads and writes besides its tensors
        callback()  is called after each step
        kind        what else the step depends on, hashable, with each module besides the model that it calls. A graph
                    holds for one kind only
        """
        outputs = []
        for _ in range(times):
            state, output = step(*state)
            outputs.append(output)
            callback()
        return state, outputs


def round_up(n: int, unit: int) -> int:
    """The least multiple of `unit` that is not below n."""
    units = (n + unit - 1) // unit
    return units * unit
