"""A turn: what one agent read, thought and sent in one round. Whoever is shown it may change it before others hear it.

    turn.states = ...           what the agent thought, before the outer links read it
    turn.sent[edge] = ...       what one agent hears, after the outer link
    turn.mute(edge)             silence: the one who hears it finds its slot empty
    turn.stop([0, 2])           these questions are answered in this round
    turn.drop([1])              this question leaves the batch after this turn, and is not answered
    turn.prompts = ...          what the agent that answers reads

A change takes effect or is refused: it is never ignored. Nothing else of a turn can be set. (A turn that answers is the
end anyway, so that there `stop` has nothing to do.)

Notation: B questions of the turn, m latents, D an agent's width.
"""

from collections.abc import Callable, Iterable
from numbers import Integral
from typing import Any, NoReturn

import torch

from .agent import Prompt
from .common import InputError, state_of

Edge = tuple[str, str]  # source, target
# Of B questions: latents (B, m, D of the target), or B of unequal length, (m_b, D) each, or B texts.
Message = torch.Tensor | list[torch.Tensor] | list[str]
Latents = torch.Tensor | list[torch.Tensor]  # (B, m, D), or B of unequal length, (m_b, D) each
MAY_BE_SET = ("states", "sent", "prompts")  # of a Turn


class Turn:
    """One agent's turn in one round.

    round    from 1
    role     whose turn it is
    rows     the numbers of its B questions in the batch: all of them, unless some were stopped or dropped before
    prompts  what it reads: for each question a list of pieces, text or latents (m, D)
    states   H (B, m, D), the hidden states that it thinks; None on the text channel and where it answers
    decoded  for each question, the number of tokens that the agent decoded to send; 0 for latents
    answers  whether the agent writes the answer after these prompts; it sends nothing then
    stopped  indices into `rows`: the questions that are answered in this round
    dropped  indices into `rows`: the questions that leave the batch after this turn, without an answer
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
        silence: dict[Edge, Message] | None = None,
        decoded: list[int] | None = None,
        answers: bool = False,
        width: int = 0,
    ) -> None:
        """A turn that has just been taken, or the prompts of one that answers.

        send     makes what is sent out of states, when it is first asked for; or `sent` is there from the start
        silence  what is heard along each edge that leaves the role if nothing is sent there
        width    D, of the latents in prompts and of states
        """
        self._is_made = False
        self.round = round
        self.role = role
        self.rows = list(rows)
        self.prompts = prompts
        self.states = states
        self.decoded = tuple(decoded or [0] * len(rows))
        self.answers = answers
        self.stopped: set[int] = set()
        self.dropped: set[int] = set()
        self._rows_taken = tuple(rows)
        self._replaced: dict[Edge, str] = {}
        self._send = send
        self._sent = sent
        self._silence = silence or {}
        self._width = width
        self._states_sent = snapshot(states)  # as they were when `sent` was made
        self._messages_made = marks_of(sent)  # as they were made of the agent's states or texts
        self._prompts_read = snapshot(prompts)
        self._is_made = True

    def __setattr__(self, name: str, value: Any) -> None:
        """Set an attribute; InputError for one that an edit cannot change, such as a misspelt one."""
        if name not in MAY_BE_SET and not name.startswith("_") and self._is_made:
            self.refuse(
                f"turn.{name} cannot be set: set turn.{', turn.'.join(MAY_BE_SET)}, or call mute, stop or drop"
            )
        super().__setattr__(name, value)

    def __repr__(self) -> str:
        does = "writes" if self.states is None else "thinks"
        if self.answers:
            does = "answers"
        return f"Turn(round {self.round}, {self.role} {does}, {len(self.rows)} questions)"

    @property
    def sent(self) -> dict[Edge, Message]:
        """What others hear, by edge."""
        if self._sent is None:
            self._sent = {}
            if self._send is not None:
                self._sent = self._send(self.checked_states())
            self._states_sent = snapshot(self.states)
            self._messages_made = marks_of(self._sent)
        return self._sent

    @sent.setter
    def sent(self, messages: dict[Edge, Message]) -> None:
        if not isinstance(messages, dict):
            self.refuse(
                f"turn.sent was set to {shown(messages)}, expected a dict from edges to messages: "
                "to send nothing, mute the edges"
            )
        self._sent = messages
        self._states_sent = snapshot(self.states)

    @property
    def replaced(self) -> dict[Edge, str]:
        """What is heard in place of what was sent, by edge (hear.py)."""
        return dict(self._replaced)

    def replace(self, edge: Edge, message: Message | None, value: str) -> None:
        """Put a message, or nothing, in place of the one that was sent along an edge.

        It is what hear.py makes for a `value`, and no edit.
        """
        self._replaced[edge] = value
        if message is None:
            self.mute(edge)
            return
        self.sent[edge] = message
        self._messages_made[edge] = snapshot(message)

    def mute(self, *edges: Edge) -> None:
        """Send nothing along these edges, or along any edge if none is named.

        InputError if an edge is named along which nothing is sent.
        """
        for edge in edges or list(self.sent):
            if edge not in list(self.sent):  # a list may hold what cannot be a key
                there = ", ".join(map(repr, self.sent)) or "none"
                raise InputError(
                    f"{self.role} has no edge {edge!r:.80} to mute, expected one of: {there}"
                )
            del self.sent[edge]

    def stop(self, questions: Iterable[int] | None = None) -> None:
        """Answer these questions (indices into `rows`; None: all) in this round, as if it were the last."""
        self.stopped.update(self.indices(questions, "stop"))

    def drop(self, questions: Iterable[int] | None = None) -> None:
        """Let these questions (indices into `rows`; None: all) leave the batch after this turn, without an answer."""
        if self.answers:
            self.refuse("this turn answers: a question cannot be dropped any more")
        self.dropped.update(self.indices(questions, "drop"))

    def indices(self, questions: Iterable[int] | None, what: str) -> set[int]:
        """These indices into `rows`, or all; InputError if one of them is none."""
        everything = range(len(self.rows))
        if isinstance(questions, torch.Tensor):
            questions = questions.tolist()
        if questions is None:
            questions = everything
        if not isinstance(questions, Iterable):
            raise InputError(
                f"{what} takes the indices of questions in a list, and was given {questions!r:.80}"
            )
        given = list(questions)
        for i in given:
            if not isinstance(i, Integral) or isinstance(i, bool):
                raise InputError(
                    f"{what} takes the indices of questions, and {i!r} is none: expected some of 0 to "
                    f"{len(self.rows) - 1}, or None for all"
                )
            if i not in everything:
                raise InputError(
                    f"there is no question {i!r} to {what}: this turn has {len(self.rows)}"
                )
        return set(given)

    def heard(self) -> dict[Edge, Message]:
        """What is heard along each edge that leaves the role: what was sent, else silence."""
        return self._silence | self.sent

    def check(self) -> None:
        """InputError if a change of this turn cannot take effect."""
        if self.rows != list(self._rows_taken):
            self.refuse("turn.rows were changed: call stop or drop")
        if not self.stopped | self.dropped <= set(range(len(self.rows))):
            self.refuse("turn.stopped or turn.dropped were changed: call stop or drop")
        if snapshot(self.prompts) != self._prompts_read:
            if not self.answers:
                self.refuse(
                    "turn.prompts were changed, but they have been read: change what the agent sends (turn.states or "
                    "turn.sent), or the prompts of the turn that answers"
                )
            self.check_prompts()
        if snapshot(self.states) != self._states_sent:
            if self._send is None:
                self.refuse("turn.states were changed, but it has none to send: change turn.sent")
            if self.replaced:
                edges = ", ".join(">".join(edge) for edge in self.replaced)
                self.refuse(
                    f"turn.states were changed, but `hear` has put something else into {edges} before: "
                    "change turn.sent, or let hear be own along these edges"
                )
            if self._sent is not None:
                self.refuse(
                    "turn.states were changed, but turn.sent was made of them before: change the states first"
                )
        for edge, message in self.sent.items():
            if edge not in self._silence:
                known = ", ".join(map(repr, self._silence)) or "no edge"
                self.refuse(f"turn.sent has {edge!r}, where nobody hears it: expected {known}")
            self.check_message(edge, message)
            if snapshot(message) != self._messages_made.get(edge):
                self.check_numbers(f"turn.sent[{edge!r}]", message)

    def check_prompts(self) -> None:
        """InputError unless the prompts are one for each question, which the agent can read."""
        self.check_each("turn.prompts", self.prompts, "prompts")
        D = self._width
        for prompt in self.prompts:
            if not isinstance(prompt, (list, tuple)):
                self.refuse(f"turn.prompts holds {shown(prompt)}, expected lists of pieces")
            for piece in prompt:
                if not is_piece(piece, D):
                    self.refuse(
                        f"turn.prompts holds {shown(piece)}, expected texts, token ids (n,) or "
                        f"latents (m, {D}) of floats"
                    )
            self.check_numbers("turn.prompts", prompt)
            if not any(map(len, prompt)):
                self.refuse("turn.prompts holds an empty one: there is nothing to write after")

    def checked_states(self) -> Latents:
        """The states; InputError if an edit has put some there out of which nothing can be sent."""
        if self.states is None:
            self.refuse("turn.states was set to None: to send nothing, call turn.mute()")
        self.check_latents("turn.states", self.states, self._width)
        if snapshot(self.states) != self._states_sent:
            self.check_numbers("turn.states", self.states)
        return self.states

    def check_message(self, edge: Edge, message: Message) -> None:
        """InputError if what is sent along an edge is not what its target can read."""
        name = f"turn.sent[{edge!r}]"
        expected = self._silence[edge]
        if isinstance(expected, torch.Tensor):
            self.check_latents(name, message, expected.shape[-1])
            return
        self.check_each(name, message)
        for own in message:
            if not isinstance(own, str):
                self.refuse(f"{name} holds {shown(own)}, expected texts")

    def check_latents(self, name: str, message: Any, D: int) -> None:
        """InputError unless a message has latents (m, D) for each question."""
        self.check_each(name, message)
        for own in message:
            if not are_latents(own, D):
                self.refuse(f"{name} holds {shown(own)}, expected latents (m, {D}) of floats")

    def check_numbers(self, name: str, parts: Any) -> None:
        """InputError if latents that an edit has put there are not finite. Else their reader would be blamed."""
        tensors = [parts] if isinstance(parts, torch.Tensor) else parts
        for own in tensors:
            if isinstance(own, torch.Tensor) and not own.isfinite().all():
                self.refuse(
                    f"{name} holds numbers that are not finite, which an edit has put there"
                )

    def check_each(self, name: str, message: Any, parts: str = "messages") -> None:
        """InputError unless a message is a tensor or a list with one part for each question."""
        B = len(self.rows)
        if not isinstance(message, (torch.Tensor, list, tuple)):
            self.refuse(f"{name} is {shown(message)}, expected a tensor or a list")
        n = len(message) if not isinstance(message, torch.Tensor) or message.ndim else 0
        if n != B:
            self.refuse(f"{name} holds {n} {parts}, expected one for each of {B} questions")

    def refuse(self, why: str) -> NoReturn:
        """Raise InputError, and say of which turn."""
        raise InputError(f"round {self.round}, {self.role}: {why}")


def are_latents(value: Any, D: int) -> bool:
    """Whether a value is a tensor of latents (m, D)."""
    if not isinstance(value, torch.Tensor) or not value.is_floating_point():
        return False
    return value.ndim == 2 and value.shape[1] == D


def is_piece(value: Any, D: int) -> bool:
    """Whether a value is a piece of a prompt: a text, token ids (n,), or latents (m, D)."""
    if isinstance(value, str) or are_latents(value, D):
        return True
    return (
        isinstance(value, torch.Tensor)
        and value.dtype in (torch.int, torch.long)
        and value.ndim == 1
    )


def shown(value: Any) -> str:
    """A value in a message: of an array its kind, shape and dtype."""
    if hasattr(value, "shape") and hasattr(value, "dtype"):
        dtype = str(value.dtype).removeprefix("torch.")
        return f"{type(value).__name__} {tuple(value.shape)} of {dtype}"
    return f"{value!r:.60}"


class Mark:
    """An object and the state that it is in. It is kept here, so that no other can take its place in memory."""

    def __init__(self, value: object) -> None:
        self.value = value
        self.state = state_of(value) if isinstance(value, torch.Tensor) else None

    def __eq__(self, other: object) -> bool:
        """Whether it is the same object in the same state: comparing arrays themselves gives no truth value."""
        return isinstance(other, Mark) and self.value is other.value and self.state == other.state


def snapshot(value: Any) -> Any:
    """What tells whether a value was replaced or changed in place: tensors by identity and number of changes."""
    if isinstance(value, (list, tuple)):
        return [snapshot(one) for one in value]
    return value if isinstance(value, str) else Mark(value)


def marks_of(messages: dict[Edge, Message] | None) -> dict[Edge, Any]:
    """The snapshot of each message."""
    return {edge: snapshot(message) for edge, message in (messages or {}).items()}


def select(message: Message, rows: list[int]) -> Message:
    """The messages of these rows."""
    if isinstance(message, torch.Tensor):
        return message[rows]
    return [message[i] for i in rows]  # type: ignore[return-value]  # texts of texts, latents of latents
