"""A turn: what one agent read, thought and sent in one round. Whoever is shown it may change it before others hear it.

    turn.states = ...           what the agent thought, before the outer links read it
    turn.sent[edge] = ...       what one agent hears, after the outer link
    turn.mute(edge)             silence: the one who hears it finds its slot empty
    turn.stop([0, 2])           these questions are answered at the end of this round

A change takes effect or is refused: it is never ignored.

Letters: B questions of the turn, m latents, D an agent's width.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch

from .agent import Prompt
from .common import InputError

Edge = tuple[str, str]  # source, target
Message = (
    torch.Tensor | list[torch.Tensor] | list[str]
)  # latents (B, m, D of the target), B of unequal length, or B texts
Latents = torch.Tensor | list[torch.Tensor]  # (B, m, D), or B of unequal length, (m_b, D) each


class Turn:
    """One agent's turn in one round.

    round    from 1
    role     whose turn it is
    rows     the numbers of its B questions in the batch: all of them, unless some were stopped in an earlier round
    prompts  what it reads: for each question a list of pieces, text or latents (m, D)
    states   H (B, m, D), the hidden states that it thinks; None on the text channel and where it answers
    decoded  for each question, the number of tokens that the agent decoded to send; 0 for latents
    answers  whether the agent writes the answer after these prompts; it sends nothing then
    stopped  indices into `rows`: the questions that are answered at the end of this round
    """

    def __init__(
        self,
        round: int,
        role: str,
        rows: list[int],
        prompts: list[Prompt],
        states: Latents | None = None,
        send: Callable[[Latents], dict[Edge, Message]] | None = None,
        sent: dict[Edge, Message] | None = None,
        decoded: list[int] | None = None,
        answers: bool = False,
    ) -> None:
        """send: makes what is sent out of states, when it is first asked for; or `sent` is there from the start."""
        self.round = round
        self.role = role
        self.rows = rows
        self.prompts = prompts
        self.states = states
        self.decoded = decoded or [0] * len(rows)
        self.answers = answers
        self.stopped: set[int] = set()
        self._send = send
        self._sent = sent
        self._states_sent = snapshot(states)  # as they were when `sent` was made
        self._prompts_read = snapshot(prompts)

    def __repr__(self) -> str:
        kind = "answers" if self.answers else "thinks" if self.states is not None else "writes"
        return f"Turn(round {self.round}, {self.role} {kind}, {len(self.rows)} questions)"

    @property
    def sent(self) -> dict[Edge, Message]:
        """What others hear, by edge."""
        if self._sent is None:
            self._sent = {}
            if self._send is not None and self.states is not None:
                self._sent = self._send(self.states)
            self._states_sent = snapshot(self.states)
        return self._sent

    @sent.setter
    def sent(self, messages: dict[Edge, Message]) -> None:
        self._sent = messages
        self._states_sent = snapshot(self.states)

    def mute(self, *edges: Edge) -> None:
        """Send nothing along these edges; InputError if this turn sends nothing there anyway."""
        for edge in edges:
            if edge not in self.sent:
                there = ", ".join(">".join(other) for other in self.sent) or "none"
                raise InputError(
                    f"{self.role} has no edge {edge!r} to mute, expected one of: {there}"
                )
            del self.sent[edge]

    def stop(self, questions: Iterable[int] | None = None) -> None:
        """Answer these questions (indices into `rows`; None: all) at the end of this round, as if it were the last."""
        self.stopped |= set(range(len(self.rows)) if questions is None else questions)
        if wrong := [i for i in self.stopped if i not in range(len(self.rows))]:
            raise InputError(
                f"there is no question {wrong[0]!r} to stop: this turn has {len(self.rows)}"
            )

    def check(self, edges: Iterable[Edge]) -> None:
        """InputError if a change cannot take effect. edges: along which the agent may send."""
        where = f"round {self.round}, {self.role}"
        if not self.answers and snapshot(self.prompts) != self._prompts_read:
            raise InputError(
                f"{where}: turn.prompts were changed, but they have been read: change what the agent sends "
                "(turn.states or turn.sent), or the prompts of the turn that answers"
            )
        if snapshot(self.states) != self._states_sent and (
            self._send is None or self._sent is not None
        ):
            reason = (
                "it has none to send" if self._send is None else "turn.sent was made of them before"
            )
            raise InputError(f"{where}: turn.states were changed, but {reason}: change turn.sent")
        if unknown := [edge for edge in self.sent if edge not in edges]:
            raise InputError(
                f"{where}: turn.sent has {unknown[0]!r}, where nobody hears it: expected one of "
                f"{', '.join(map(repr, edges)) or 'no edge'}"
            )
        for edge, message in self.sent.items():
            if len(message) != len(self.rows):
                raise InputError(
                    f"{where}: turn.sent[{edge!r}] holds {len(message)} messages, "
                    f"expected one for each of {len(self.rows)} questions"
                )


def snapshot(value: Any) -> Any:
    """What tells whether a value was replaced or changed in place: tensors by identity and number of changes."""
    if torch.is_tensor(value):
        return id(value), value._version
    if isinstance(value, (list, tuple)):
        return [snapshot(one) for one in value]
    return value


def select(message: Message, rows: list[int]) -> Message:
    """The messages of these rows."""
    if isinstance(message, torch.Tensor):
        return message[rows]
    return [message[i] for i in rows]  # type: ignore[return-value]  # texts of texts, latents of latents
