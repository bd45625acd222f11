"""What agents hear in place of what was sent to them: the question whether messages say anything, as a setting.

    system.run(questions, hear="other")                    every message is another question's
    system.run(questions, hear="planner>critic=noise")     along one edge only; several are joined by +

Each value is an edit of a Turn (turn.py), made when the turn has sent and before anybody reads it:

    own       turn.sent stays as it is
    other     the message that the question before it in the data set sent: same round, same edge. The first question
              hears the last one's. A question of the same text is passed over: its message would be the own one. The
              question before was run on its own, and heard its own messages.
    none      nothing: the slot of the one who hears is empty, as after turn.mute
    noise     in place of each latent noise of the same mean and the same norm, so also of the same rms
    shuffled  the same latents in another order

Noise and order come from the run's seed, the round, the edge and the question's text. So nothing here depends on the
batch, but by rounding. Texts can be own, other or none. The turns themselves are thought or written in every case:
what they cost is counted, and the turns of the question before are not.

Notation: B questions, m latents, D an agent's width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch

from .common import InputError, no_op
from .prompts import Question
from .recurse import recurse
from .sample import hashed
from .settings import CompletedSettings, Settings, check_neighbours, heard_along, hears_others
from .styles import Style
from .turn import Edge, Message, Turn, select

if TYPE_CHECKING:
    from .system import System

Messages = dict[tuple[int, Edge], Message]  # {(round, edge): what was sent there for B questions}


class Hearing:
    """What the agents of one batch hear.

    along   {edge: what is heard there}, of the edges where that is not what was sent
    others  the messages of the questions before
    """

    def __init__(
        self, style: Style, settings: CompletedSettings, others: Messages | None = None
    ) -> None:
        """What Settings say that is heard; InputError if that is others, and they are not given.

        others   what `messages_of` gives for the question before each of B questions, if somebody hears them
        """
        if others is None and hears_others(settings):
            raise InputError("hear is other, so give the question before each one")
        self.seed = settings.seed
        self.along = heard_along(settings.hear, style)
        self.others = others or {}

    def replace(self, turn: Turn, questions: Sequence[Question]) -> None:
        """Put into a turn what is heard in place of what it sent; `questions` are those of its rows."""
        if turn.answers:
            return
        for edge, value in self.along.items():
            if edge[0] != turn.role:
                continue  # before turn.sent is read, which makes it: until then turn.states may be changed
            message: Message | None
            if value == "none":
                message = None
            elif value == "other":
                message = select(self.others[turn.round, edge], turn.rows)
            else:
                change = noise if value == "noise" else shuffled
                key = (self.seed, "hear", turn.round, *edge)
                message = changed(turn.sent[edge], questions, key, change)
            turn.replace(edge, message, value)


def before_each(questions: Sequence[Question], settings: Settings) -> list[Question] | None:
    """For each question of a data set the one before it, as in `indices_before`; None if nobody hears it."""
    check_neighbours(questions, settings)
    if not hears_others(settings):
        return None
    return [questions[i] for i in indices_before(questions)]


def indices_before(questions: Sequence[Question]) -> list[int]:
    """For each question the index of the nearest one before it that has another text; the last one is before the first.

    They must not all have the same text.
    """
    texts = [question.text for question in questions]
    assert len(set(texts)) != 1, "check_neighbours and split_held_out refuse these"
    before = []
    for i, text in enumerate(texts):
        other = i - 1  # -1 is the last one
        while texts[other] == text:
            other -= 1
        before.append(other % len(texts))
    return before


def messages_of(
    system: System,
    questions: Sequence[Question],
    settings: CompletedSettings,
    callback: Callable = no_op,
) -> Messages:
    """What B questions send in a run in which everybody hears their own messages."""
    sent = {}
    for turn in recurse(system, questions, settings, callback):
        for edge, message in turn.sent.items():
            sent[turn.round, edge] = message
    return sent


def changed(
    message: Message,
    questions: Sequence[Question],
    key: Sequence[object],
    change: Callable[[torch.Tensor, torch.Generator], torch.Tensor],
) -> Message:
    """B questions' latents, each changed with random numbers of its own."""
    latents = []
    for own, question in zip(message, questions, strict=True):
        assert isinstance(own, torch.Tensor), "check_hear refuses texts"
        generator = torch.Generator().manual_seed(hashed(*key, question.text))
        latents.append(change(own, generator))
    return torch.stack(latents) if isinstance(message, torch.Tensor) else latents


def noise(latents: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Gaussian noise (m, D) in which each latent has the mean and the norm that it had.

    Mean and deviation are taken over the D numbers of one latent. Taken for each dimension over the m latents, they
    would tell the message itself: all of it at m = 1, and its mean at any m.
    """
    drawn = torch.randn(latents.shape, generator=generator).to(latents.device)
    centred = drawn - drawn.mean(-1, keepdim=True)
    scaled = centred / centred.std(-1, correction=0, keepdim=True)
    mean = latents.float().mean(-1, keepdim=True)  # (m, 1)
    deviation = latents.float().std(-1, correction=0, keepdim=True)  # (m, 1)
    return (mean + deviation * scaled).to(latents.dtype)


def shuffled(latents: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """The same latents (m, D) in an order that is not their own; at least two of them."""
    m = len(latents)
    same = torch.arange(m)
    order = same
    while torch.equal(order, same):
        order = torch.randperm(m, generator=generator)
    return latents[order.to(latents.device)]
