"""What a run gives for each question: a Result, and while its texts are being written the pieces of them.

Notation: D an agent's width, m latent steps.
"""

from __future__ import annotations

import html
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from .agent import Piece, Prompt
from .turn import Turn

if TYPE_CHECKING:
    from .system import System


@dataclass
class Result:
    """What a system made of one question. Results compare by all but tensors (latents, states, prompts) and times.

    question      as typed
    text          what the last agent wrote, its retry included
    answer        the answer in that text, None if it holds none in the form that the task asks for
    token_ids     of the text, with what tools replied to it, and without the request of a retry
    new_tokens    how many of them the agent generated
    seconds       the text's share of its batch's wall time
    heard_tokens  intermediate tokens: how many agents decoded for one another to read; 0 for latents
    rounds        how many it took: fewer than asked for if the question was stopped
    retried       whether the text held no answer at first, so that the agent was asked for one
    replaced      {(round, source, target): other, none, noise or shuffled}, where an agent did not hear what was sent
    latents       {(round, source, target): latents (m, D of the target), or a text}, as they were heard, if kept
    states        {(round, role): (m, D)}, the hidden states that an agent thought, if kept
    timings       {(round, role): seconds from the batch's start to the end of the turn}, if states are kept
    prompts       {(round, role): the prompt of the turn}, if states are kept
    system        that answered; a Result that is copied to another process leaves it behind
    """

    question: str
    text: str
    answer: str | None
    token_ids: list[int]
    new_tokens: int
    seconds: float = field(compare=False)
    heard_tokens: int = 0
    rounds: int = 0
    retried: bool = False
    replaced: dict = field(default_factory=dict)
    latents: dict = field(default_factory=dict, compare=False)
    states: dict = field(default_factory=dict, compare=False)
    timings: dict = field(default_factory=dict, compare=False)
    prompts: dict = field(default_factory=dict, compare=False)
    system: System | None = field(default=None, compare=False)

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "system": None}

    @property
    def stages(self) -> dict[tuple[int, str], tuple[float, Prompt]]:
        """{(round, role): (seconds, prompt)}: timings and prompts together, as older callers know them."""
        return {key: (seconds, self.prompts[key]) for key, seconds in self.timings.items()}

    def _repr_html_(self) -> str:
        """What a notebook shows: the page of --trace, if states and latents were kept, else the text."""
        if self.system is None or not self.timings:
            shown = html.escape(repr(self))
            return f"<pre>{shown}</pre>"
        from .look.trace import page

        whole = html.escape(page(self.system, [self]))
        return f'<iframe srcdoc="{whole}" style="width: 100%; height: 40em; border: 0"></iframe>'

    def __repr__(self) -> str:
        lines = [f"Result({self.question!r}", f"answer={self.answer!r}", f"text={self.text!r:.200}"]
        retried = ", retried" if self.retried else ""
        lines.append(
            f"{self.rounds} rounds, {self.new_tokens} tokens, {self.seconds:.2f} s{retried}"
        )
        for name in ("latents", "states"):
            if kept := getattr(self, name):
                lines.append(f"{name}: {len(kept)} kept")
        return ",\n       ".join(lines) + ")"


class NewText(NamedTuple):
    """What was just written of a text.

    question  the number of the question in its batch
    rollout   which of its texts
    text      what follows the pieces before; all pieces together are Result.text
    result    with the last piece the Result, of which `seconds` and the last turn's timing follow at the batch's end
    """

    question: int
    rollout: int
    text: str
    result: Result | None = None


class History:
    """What is kept of the turns of one question, for its Result; `keep_latents`, `keep_states`: see System.run."""

    def __init__(self, keep_latents: bool, keep_states: bool) -> None:
        self.keep_latents = keep_latents
        self.keep_states = keep_states
        self.decoded: dict[tuple[int, str], int] = {}
        self.replaced: dict[tuple[int, str, str], str] = {}
        self.latents: dict[tuple[int, str, str], Piece] = {}
        self.states: dict[tuple[int, str], torch.Tensor] = {}
        self.timings: dict[tuple[int, str], float] = {}
        self.prompts: dict[tuple[int, str], Prompt] = {}

    def add(self, turn: Turn, i: int, seconds: float) -> None:
        """Keep what is wanted of a turn for its i-th question; it ended `seconds` after the batch began."""
        key = (turn.round, turn.role)
        self.decoded[key] = turn.decoded[i]
        for edge, value in turn.replaced.items():
            self.replaced[(turn.round, *edge)] = value
        if self.keep_latents:
            for edge, message in turn.sent.items():
                self.latents[(turn.round, *edge)] = own_copy(message[i])
        if self.keep_states:
            self.timings[key] = seconds
            self.prompts[key] = [own_copy(piece) for piece in turn.prompts[i]]
            if turn.states is not None:
                self.states[key] = turn.states[i].clone()

    def forget(self, round: int, role: str) -> None:
        """Let go of an agent's turn: the question was stopped in it, so nobody heard it, and the agent answers now."""
        for by_turn in (self.decoded, self.states, self.timings, self.prompts):
            by_turn.pop((round, role), None)
        for by_edge in (self.replaced, self.latents):
            for key in list(by_edge):
                if key[:2] == (round, role):
                    del by_edge[key]


def own_copy(piece: Piece) -> Piece:
    """One question's part of what a batch sent or read, not a view that holds the whole batch in memory."""
    return piece.clone() if torch.is_tensor(piece) else piece
