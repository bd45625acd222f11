"""Requests that wait, and the thread that answers them batch by batch.

Requests that arrive within some milliseconds, or while others are answered, share a batch if they agree in model and
settings. The thread alone uses the systems. What it writes goes to the event loop of the client's connection.
"""

import asyncio
import logging
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

import torch

from ..common import InputError, out_of_memory
from ..look.trace import page
from ..prompts import Question
from ..system import NewText
from ..turn import Turn
from . import protocol
from .protocol import MAX_TRACES, Asked, Refused, Served

LOG = logging.getLogger("uvicorn.error")

Item = str | dict[str, Any] | Refused | None  # see Job.queue


class Abandoned(Exception):
    """Nobody waits for a batch any more."""


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
        self.text += new
        starts = [self.text.find(stop) for stop in self.stops if stop in self.text]
        if starts:
            self.text = self.text[: min(starts)]
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
             in place of the first is sent as an error
    begun    whether events were sent
    over     whether nothing more is to be sent: the client has got all, or has gone away
    texts    {(i, rollout): a text of its i-th question}
    choices  {index: a choice that is complete}
    """

    def __init__(self, asked: Asked) -> None:
        self.asked = asked
        self.loop = asyncio.get_running_loop()
        self.queue: asyncio.Queue[Item] = asyncio.Queue()
        self.arrived = time.monotonic()
        self.begun = False
        self.over = False
        self.reset()

    def reset(self) -> None:
        """Forget what was written: it is going to be answered, or answered again."""
        self.texts: dict[tuple[int, int], Text] = {}
        for i in range(len(self.asked.questions)):
            for rollout in range(self.asked.settings.rollouts):
                self.texts[i, rollout] = Text(self.asked.stop)
        self.choices: dict[int, dict[str, Any]] = {}
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
        self.begun = True  # before anything is sent, so that an error comes as an event
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
        if self.begun:
            self.send(protocol.event(refused.body()), None)
        else:
            self.send(refused)

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
        system = result.system
        eos_ids = system.agents[system.style.order[-1]].generation_config.eos_ids
        at_an_end = text.stopped or result.token_ids[-1] in eos_ids
        reason = "stop" if at_an_end else "length"
        answer = result.answer
        if text.stopped:
            answer = system.answer_in(text.text, self.asked.questions[i])
        extra = {"rounds": result.rounds, "retried": result.retried, "answer": answer}
        if trace is not None:
            extra["trace"] = trace
        self.counts["written"] += result.new_tokens
        for index in self.indices(i, new.rollout):
            self.choices[index] = protocol.choice(self.asked, index, text.text, reason, extra)
            if self.asked.stream:
                self.send_events([protocol.end_event(self.asked, index, reason, extra)])
        if new.rollout == 0:
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


class Batches:
    """The requests that wait, and the thread that answers them.

    batch_size  texts that are written together
    seconds     that a request waits for others
    most        requests that wait: one more is refused
    traces      {path: page}, the latest of them
    """

    def __init__(
        self, served: Mapping[str, Served], batch_size: int, seconds: float, most: int
    ) -> None:
        self.served = served
        self.batch_size = batch_size
        self.seconds = seconds
        self.most = most
        self.traces: dict[str, str] = {}
        self.waiting: list[Job] = []
        self.running: list[Job] = []
        self.stopping = False
        self.changed = threading.Condition()

    def start(self) -> None:
        """Start the thread, which ends with the process."""
        threading.Thread(target=self.work, name="batches", daemon=True).start()

    def add(self, job: Job) -> None:
        """Let a job wait; Refused if too many do."""
        with self.changed:
            if self.stopping:
                raise stopped()
            self.waiting = [one for one in self.waiting if not one.over]
            if len(self.waiting) >= self.most:
                message = f"{self.most} requests wait already: try again later"
                raise Refused(429, message, code="queue_full")
            self.waiting.append(job)
            self.changed.notify()

    def stop(self) -> None:
        """Refuse all that wait, and leave the batch that is answered."""
        with self.changed:
            self.stopping = True
            for job in self.waiting + self.running:
                job.fail(stopped())
            self.waiting = []
            self.changed.notify()

    # The thread

    def work(self) -> None:
        """Answer one batch after another, until `stop`."""
        while jobs := self.next_batch():
            try:
                self.answer_or_fail(jobs)
            except Exception as e:  # the next ones are answered all the same
                for job in jobs:
                    job.fail(refusal(e))

    def next_batch(self) -> list[Job]:
        """Wait for a job, then a little for others like it, and take them; none if all is to end."""
        with self.changed:
            while not self.stopping:
                self.waiting = [job for job in self.waiting if not job.over]
                if not self.waiting:
                    self.changed.wait()
                    continue
                jobs = self.alike()
                wait = jobs[0].arrived + self.seconds - time.monotonic()
                if wait <= 0 or sum(len(job.texts) for job in jobs) >= self.batch_size:
                    self.waiting = [job for job in self.waiting if job not in jobs]
                    self.running = jobs  # under the lock: `stop` finds each job here or there
                    return jobs
                self.changed.wait(wait)
        return []

    def alike(self) -> list[Job]:
        """The oldest job, and those that fit into its batch."""
        jobs = self.waiting[:1]
        room = self.batch_size - sum(len(job.texts) for job in jobs)
        for job in self.waiting[1:]:
            if job.is_like(jobs[0]) and len(job.texts) <= room:
                jobs.append(job)
                room -= len(job.texts)
        return jobs

    def answer_or_fail(self, jobs: list[Job]) -> None:
        """Answer jobs. If that fails, answer each alone that has got nothing yet: it fails for its own faults."""
        refused = self.fault_of(jobs)
        if refused is None:
            return
        if len(jobs) == 1:
            jobs[0].fail(refused)
            return
        for job in jobs:
            if job.begun:  # the fault may be another job's
                job.fail(Refused(500, "an error in the batch of this request: ask again"))
            elif not job.over:
                self.answer_or_fail([job])

    def fault_of(self, jobs: list[Job]) -> Refused | None:
        """Answer jobs in one batch; what the clients are told if that fails. No memory of the batch is held then."""
        try:
            SharedBatch(jobs, self).answer()
        except Abandoned:
            pass
        except Exception as e:
            if out_of_memory(e):
                for agent in self.served[jobs[0].asked.model].system.agents.values():
                    agent.release()
            return refusal(e)
        return None

    def keep_trace(self, path: str, html: str) -> None:
        """Keep a page, and let the oldest go."""
        self.traces[path] = html
        while len(self.traces) > MAX_TRACES:
            del self.traces[next(iter(self.traces))]


class SharedBatch:
    """Jobs that are answered in one batch.

    owners  for each question of the batch its job, and which of the job's questions it is
    """

    def __init__(self, jobs: list[Job], batches: Batches) -> None:
        self.jobs = jobs
        self.batches = batches
        self.asked = jobs[0].asked  # what is chosen for a whole batch
        self.system = batches.served[self.asked.model].system
        self.questions: list[Question] = []
        self.owners: list[tuple[Job, int]] = []
        for job in jobs:
            job.reset()
            for i, question in enumerate(job.asked.questions):
                self.questions.append(question)
                self.owners.append((job, i))

    def answer(self) -> None:
        """Answer all jobs; Abandoned if nobody waits for them any more."""
        pieces = self.system.write(
            self.questions,
            self.asked.settings,
            keep_latents=self.asked.traced,
            keep_states=self.asked.traced,
            callback=self.at_position,
            edit=self.after_turn,
            wanted=self.wanted,
            whole=not any(job.asked.stream or job.asked.stop for job in self.jobs),
        )
        traced: list[tuple[Job, int, NewText]] = []
        for new in pieces:
            job, i = self.owners[new.question]
            job.take(i, new)
            if new.result is not None and job.asked.traced:
                traced.append((job, i, new))  # its Result is whole after the batch
            elif new.result is not None:
                job.finish(i, new)
        for job, i, new in traced:
            if job.over:
                continue
            assert new.result is not None, "these are last pieces"
            path = f"/traces/{job.asked.id}-{i}-{new.rollout}"
            self.batches.keep_trace(path, page(self.system, [new.result]))
            job.finish(i, new, path)

    def wanted(self, b: int, rollout: int) -> bool:
        """Whether a text is to go on."""
        job, i = self.owners[b]
        return not job.over and not job.texts[i, rollout].stopped

    def at_position(self, *_: object) -> None:
        """Leave the batch if nobody waits for it."""
        if self.batches.stopping or all(job.over for job in self.jobs):
            raise Abandoned

    def after_turn(self, turn: Turn, questions: list[Question]) -> None:
        """Count what a turn took, and drop the questions whose clients have left."""
        for i, b in enumerate(turn.rows):
            job, _ = self.owners[b]
            if turn.answers:
                job.count_prompt(self.system.agents[turn.role].tokens(turn.prompts[i]))
            elif turn.states is not None:
                job.counts["thought"] += len(turn.states[i])
            if job.over and not turn.answers:
                turn.drop([i])


def stopped() -> Refused:
    """What waits is told when the server ends."""
    return Refused(503, "the server is being stopped: ask again later", code="stopped")


def refusal(error: Exception) -> Refused:
    """What a client is told of an error. One of ours is logged with its traceback, which stays here."""
    if isinstance(error, InputError):
        return Refused(400, str(error))
    if out_of_memory(error):
        return Refused(503, "out of memory: ask for fewer texts, tokens or latents")
    LOG.error("a request failed", exc_info=error)
    return Refused(500, "an error inside the server, which has logged it")
