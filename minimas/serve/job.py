"""A request while it waits and is answered: what was written of its texts, and what its connection is told.

The thread of batches.py writes here. A connection reads from the queue of its job, in its own event loop.
"""

import asyncio
import time
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import torch

from ..result import NewText, Result
from . import protocol
from .protocol import Asked, Refused

Item = str | dict[str, Any] | Refused | None  # see Job.queue


class Text:
    """A text of a request, as its client is given it.

    text     what was written of it, up to the stop string
    sent     how many characters of it the client has
    stopped  whether a stop string was found
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self.stops = stops
        self.text = ""
        self.sent = 0
        self.stopped = False

    def add(self, new: str, ended: bool) -> str:
        """What the client may be sent, now that `new` was written. What may begin a stop string is kept back."""
        if self.stopped:
            return ""
        known = len(self.text)  # characters in which no stop string is
        self.text += new
        starts = [self.text.find(stop, max(0, known - len(stop) + 1)) for stop in self.stops]
        found = [start for start in starts if start >= 0]
        if found:
            self.text = self.text[: min(found)]
            self.stopped = True
        end = len(self.text)
        if not ended and not self.stopped:
            end -= max((overlap(self.text, stop) for stop in self.stops), default=0)
        piece = self.text[self.sent : end]
        self.sent = end
        return piece


def overlap(text: str, stop: str) -> int:
    """How many characters at the end of a text may be the beginning of a stop string."""
    for n in range(min(len(stop) - 1, len(text)), 0, -1):
        if text.endswith(stop[:n]):
            return n
    return 0


class Job:
    """A request while it waits and is answered.

    queue    what its connection sends: the whole response, or the events of a stream and None after them. A Refused
             is sent as an error, or after the first event as an event. Nothing follows it
    begun    whether events were sent
    over     whether nothing more is to be sent: the client has got all, or has gone away
    texts    {(i, rollout): a text of its i-th question}
    choices  {index: a choice that is complete}
    counts   {argument of protocol.usage: how many there were}
    """

    def __init__(self, asked: Asked) -> None:
        self.asked = asked
        self.loop = asyncio.get_running_loop()
        self.queue: asyncio.Queue[Item] = asyncio.Queue()
        self.arrived = time.monotonic()
        self.begun = False
        self.over = False
        self.texts: dict[tuple[int, int], Text] = {}
        self.choices: dict[int, dict[str, Any]] = {}
        self.counts: dict[str, int] = {}
        self.reset()

    def reset(self) -> None:
        """Forget what was written: it is going to be answered, or answered again."""
        for i in range(len(self.asked.questions)):
            for rollout in range(self.asked.settings.rollouts):
                self.texts[i, rollout] = Text(self.asked.stop)
        self.choices = {}
        self.counts = dict.fromkeys(("prompt", "read", "written", "thought", "intermediate"), 0)

    def is_like(self, other: "Job") -> bool:
        """Whether both may be answered in one batch: what is chosen for a whole batch is equal."""
        asked = self.asked
        chosen = (asked.model, asked.settings, asked.traced)
        return chosen == (other.asked.model, other.asked.settings, other.asked.traced)

    # What the connection is told

    def send(self, *items: Item) -> None:
        """Hand something to the connection, from any thread."""
        for item in items:
            with suppress(RuntimeError):  # the loop has ended
                self.loop.call_soon_threadsafe(self.queue.put_nowait, item)

    def send_events(self, events: Sequence[str]) -> None:
        """Hand events of a stream to the connection."""
        first = []
        if not self.begun and self.asked.is_chat:
            first = [protocol.first_event(self.asked, i) for i in range(self.asked.n)]
        self.begun = True
        self.send(*first, *events)

    def leave(self) -> None:
        """The client has gone away."""
        self.over = True
        self.send(None)

    def fail(self, refused: Refused) -> None:
        """Answer with an error, unless all is answered."""
        if self.over:
            return
        self.over = True
        self.send(refused, None)

    # What is written

    def count_prompt(self, pieces: Sequence[torch.Tensor]) -> None:
        """Count the prompt after which a text is written: token ids, and latents in slots."""
        for piece in pieces:
            kind = "read" if piece.is_floating_point() else "prompt"
            self.counts[kind] += len(piece)

    def take(self, i: int, new: NewText) -> None:
        """Take what was written for the i-th question."""
        piece = self.texts[i, new.rollout].add(new.text, ended=new.result is not None)
        if piece and self.asked.stream:
            indices = self.indices(i, new.rollout)
            self.send_events([protocol.text_event(self.asked, index, piece) for index in indices])

    def finish(self, i: int, new: NewText, trace: str | None = None) -> None:
        """A text is complete, and so may be the whole request. trace: the path of its page."""
        result = new.result
        assert result is not None and result.system is not None, "answered in this process"
        text = self.texts[i, new.rollout]
        reason = "stop" if text.stopped or ends_itself(result) else "length"
        answer = result.answer
        if text.stopped:  # the answer may stand in what was cut off
            answer = result.system.answer_in(text.text, self.asked.questions[i])
        extra = {"rounds": result.rounds, "retried": result.retried, "answer": answer}
        if trace is not None:
            extra["trace"] = trace
        for index in self.indices(i, new.rollout):
            self.choices[index] = protocol.choice(self.asked, index, text.text, reason, extra)
            if self.asked.stream:
                self.send_events([protocol.end_event(self.asked, index, reason, extra)])
        self.counts["written"] += result.new_tokens
        if new.rollout == 0:  # all rollouts of a question heard the same
            self.counts["intermediate"] += result.heard_tokens
        if len(self.choices) == len(self.asked.questions) * self.asked.n:
            self.complete()

    def complete(self) -> None:
        """All is written."""
        if self.over:
            return
        self.over = True
        usage = protocol.usage(**self.counts)
        if self.asked.stream:
            self.send(protocol.last_event(self.asked, usage), None)
        else:
            choices = [self.choices[index] for index in sorted(self.choices)]
            self.send(protocol.response(self.asked, choices, usage))

    def indices(self, i: int, rollout: int) -> list[int]:
        """The choices that a text is: several if all of a question's are the same text."""
        n = self.asked.n
        if n > self.asked.settings.rollouts:
            return list(range(i * n, i * n + n))
        return [i * n + rollout]


def ends_itself(result: Result) -> bool:
    """Whether the last agent ended its text, rather than the limit on its tokens."""
    assert result.system is not None, "answered in this process"
    system = result.system
    writer = system.agents[system.style.order[-1]]
    return result.token_ids[-1] in writer.generation_config.eos_ids
