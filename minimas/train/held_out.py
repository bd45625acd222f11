"""Whether links learn to say something of a question, or only what a prompt could say: losses on rows left out.

The loss of an answer is measured three times, as agents hear their own latents, those of another question, and none
(hear.py). `own` below `other` is what passes of the question. `other` below `none` is what helps with any question.

Latents are those of inference: agents think, also where links learn on given texts. For `other` and `none` nobody needs
to think, because nobody hears it. Nothing here takes random numbers, so a training is not changed by being watched.

Notation: B rows in a batch, n tokens of an answer or of all answers in a batch, N tokens of the longest one.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from tqdm import tqdm

from ..agent import Prompt
from ..common import no_op
from ..hear import Hearing, Messages, indices_before
from ..recurse import recurse
from ..settings import COMPARED_HEARD, CompletedSettings, heard_along, hears_others
from ..system import System
from ..turn import Turn
from .examples import TrainExample
from .losses import IGNORED, MAX_POSITIONS, teacher_forced, token_losses


@torch.no_grad()
def losses_by_hearing(
    system: System,
    examples: Sequence[TrainExample],
    settings: CompletedSettings,
    values: Sequence[str] = COMPARED_HEARD,
    batch_size: int = 8,
    longest: int = MAX_POSITIONS,
    progress: bool = False,
) -> dict[str, list[torch.Tensor]]:
    """{value of `hear`: for each example the cross-entropies (n,) of its answer's tokens in nats}.

    The last token is the one that ends the answer. As `other`, an example hears the nearest one before it that has
    another question, the last being before the first: InputError if all have the same.
    """
    batches = [slice(i, i + batch_size) for i in range(0, len(examples), batch_size)]
    needs_own = any(hears_others(replace(settings, hear=value)) for value in values)
    order = ["own"] if needs_own else []
    order += [value for value in values if value not in order]
    before = indices_before([example.question for example in examples]) if needs_own else []
    others: list[Messages] = []
    found = {}
    with tqdm(total=len(order) * len(batches), unit="batch", disable=not progress) as bar:
        for value in order:
            chosen = replace(settings, hear=value)
            sent: list[Messages] = []
            losses: list[torch.Tensor] = []
            for i, rows in enumerate(batches):
                hearing = Hearing(system.style, chosen, others[i] if others else None)
                own_losses, own_sent = batch_losses(
                    system, examples[rows], chosen, hearing, longest
                )
                losses += own_losses
                sent.append(own_sent)
                bar.update()
            if value == "own" and needs_own:
                others = of_the_rows_before(sent, batches, before)
            found[value] = losses
    system.drop_prefixes()
    return {value: found[value] for value in values}


def of_the_rows_before(
    sent: Sequence[Messages], batches: Sequence[slice], before: Sequence[int]
) -> list[Messages]:
    """The messages of all rows, batch by batch -> for each batch those that its rows hear.

    before   for each row the index of the one that it hears
    """
    by_batch: list[Messages] = [{} for _ in batches]
    for key in sent[0]:
        rows: list[Any] = []  # latents (m, D) each
        for own in sent:
            rows.extend(own[key])
        heard = [rows[i] for i in before]
        for messages, batch in zip(by_batch, batches, strict=True):
            messages[key] = heard[batch]
    return by_batch


def batch_losses(
    system: System,
    examples: Sequence[TrainExample],
    settings: CompletedSettings,
    hearing: Hearing,
    longest: int,
) -> tuple[list[torch.Tensor], Messages]:
    """(losses_by_hearing of one batch for one value, what its agents sent)."""
    last = system.style.order[-1]
    agent = system.agents[last]
    questions = [example.question for example in examples]
    think = no_thought(system) if nobody_is_heard(system, settings) else None
    turns: list[Turn] = []
    sent: Messages = {}
    for turn in recurse(system, questions, settings, think=think):
        for edge, message in turn.sent.items():
            sent[turn.round, edge] = message
        hearing.replace(turn, questions)
        turns.append(turn)
    replies = [example.text(last, settings.rounds) for example in examples]
    h, ids = teacher_forced(agent, turns[-1].prompts, replies, longest)
    losses = token_losses(agent, h[:, :-1], ids)  # (n,)
    lengths = (ids != IGNORED).sum(1)  # (B,)
    return list(losses.split(lengths.tolist())), sent


def nobody_is_heard(system: System, settings: CompletedSettings) -> bool:
    """Whether along every edge something is heard that is not made of what was sent."""
    along = heard_along(settings.hear, system.style)
    return len(along) == len(system.style.edges) and set(along.values()) <= {"other", "none"}


def no_thought(system: System) -> Callable[[int, str, list[Prompt]], torch.Tensor]:
    """What takes the place of thinking where nobody hears it: no states (B, 0, D)."""

    def think(r: int, role: str, prompts: list[Prompt]) -> torch.Tensor:
        return system.agents[role].think(prompts, 0)

    return think


class HeldOut:
    """Measures the rows that a training leaves out: before the first step, every so many, and after the last one.

    best       the lowest own loss so far; it is part of the state that a training resumes from
    keep_best  writes the links of that step, if that is wanted
    """

    def __init__(
        self,
        system: System,
        examples: Sequence[TrainExample],
        settings: CompletedSettings,
        steps: int,
        every: int,
        batch_size: int,
        longest: int,
        keep_best: Callable[[], object] = no_op,
    ) -> None:
        self.system = system
        self.examples = examples
        self.settings = settings
        self.steps = steps
        self.every = every
        self.batch_size = batch_size
        self.longest = longest
        self.keep_best = keep_best
        self.best = math.inf

    def state_dict(self) -> dict[str, Any]:
        return {"best": self.best}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.best = state["best"]

    def is_due(self, step: int) -> bool:
        """Whether the rows are measured after `step` steps."""
        return step % self.every == 0 or step == self.steps

    def measure(self) -> dict[str, float]:
        """{own, other, none: the mean over rows of each row's mean loss per token}; keeps links that are the best."""
        found = losses_by_hearing(
            self.system,
            self.examples,
            self.settings,
            batch_size=self.batch_size,
            longest=self.longest,
        )
        means = {}
        for value, rows in found.items():
            of_rows = torch.stack([losses.mean() for losses in rows])
            means[value] = of_rows.mean().item()
        if means["own"] < self.best:
            self.best = means["own"]
            self.keep_best()
        return means


def without(
    examples: Sequence[TrainExample], rows_held_out: Sequence[TrainExample]
) -> list[TrainExample]:
    """The examples whose question is not among those that are left out."""
    questions = {example.question.text for example in rows_held_out}
    return [example for example in examples if example.question.text not in questions]
