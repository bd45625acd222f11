"""Requests that wait, and the thread that answers them batch by batch.

Requests that arrive within some milliseconds, or while others are answered, share a batch if they agree in model and
settings. The thread alone uses the systems. What it writes goes to the event loop of the client's connection.
"""

import asyncio
import logging
import threading
import time
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any

import torch

from ..common import InputError, out_of_memory
from ..look.trace import page
from ..prompts import Question
from ..system import NewText, Result
from ..turn import Turn
from .protocol import Asked, Refused, Served, usage

KEPT_TRACES = 16  # the latest pages
LOG = logging.getLogger("uvicorn.error")


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
        found = [self.text.find(stop) for stop in self.stops]
        found = [at for at in found if at >= 0]
        if found:
            self.text = self.text[: min(found)]
            self.stopped = True
        end = len(self.text)
        if not ended and not self.stopped:
            end -= max((overlap(self.text, stop) for stop in self.stops), default=0)
        piece = self.text[self.sent : end]
        self.sent = max(self.sent, end)
        return piece


def overlap(text: str, stop: str) -> int:
    """How many characters at the end of a text may be the beginning of a stop string."""
    for n in range(min(len(stop) - 1, len(text)), 0, -1):
        if text.endswith(stop[:n]):
            return n
    return 0


class Job:
    """A request while it waits and is answered.

    events   for the connection: ("text", index, piece), ("end", index, text, reason, own), then ("usage", usage);
             or ("error", Refused), or ("left",)
    left     whether the client has gone away, or has got all
    begun    whether it has got anything
    """

    def __init__(self, asked: Asked) -> None:
        self.asked = asked
        self.loop = asyncio.get_running_loop()
        self.events: asyncio.Queue[tuple] = asyncio.Queue()
        self.arrived = time.monotonic()
        self.left = False
        self.begun = False
        self.begin()

    @property
    def size(self) -> int:
        """Texts that are written for it."""
        return len(self.asked.questions) * self.asked.settings.rollouts

    def begin(self) -> None:
        """Forget what was written: it is going to be answered, or answered again."""
        self.texts: list[list[Text]] = []  # of each question, by rollout
        for _ in self.asked.questions:
            texts = [Text(self.asked.stop) for _ in range(self.asked.settings.rollouts)]
            self.texts.append(texts)
        self.unfinished = self.size
        self.counts = dict.fromkeys(("prompt", "read", "written", "thought", "heard"), 0)

    def send(self, *event: Any) -> None:
        """Hand an event to the connection, from any thread."""
        with suppress(RuntimeError):  # the loop has ended
            self.loop.call_soon_threadsafe(self.events.put_nowait, event)

    def leave(self) -> None:
        """The client has gone away."""
        self.left = True
        self.send("left")

    def fail(self, refused: Refused) -> None:
        """Answer with an error, unless all is answered."""
        if not self.left:
            self.left = True
            self.send("error", refused)

    # What is written

    def is_like(self, other: "Job") -> bool:
        """Whether both may be answered in one batch: what is chosen for a whole batch is equal."""
        asked = self.asked
        chosen = (asked.model, asked.settings, asked.traced)
        return chosen == (other.asked.model, other.asked.settings, other.asked.traced)

    def count_prompt(self, pieces: Sequence[torch.Tensor]) -> None:
        """Count the prompt after which a text is written: token ids, and latents in slots."""
        for piece in pieces:
            kind = "read" if piece.is_floating_point() else "prompt"
            self.counts[kind] += len(piece)

    def take(self, i: int, new: NewText) -> None:
        """Take what was written for the i-th question."""
        text = self.texts[i][new.rollout]
        piece = text.add(new.text, ended=new.result is not None)
        if piece and self.asked.stream:
            self.begun = True
            for index in self.indices(i, new.rollout):
                self.send("text", index, piece)

    def finish(self, i: int, rollout: int, result: Result, trace: str | None = None) -> None:
        """A text is complete, and so may be the whole request. trace: the path of its page."""
        text = self.texts[i][rollout]
        system = result.system
        assert system is not None, "it was answered in this process"
        eos_ids = system.agents[system.style.order[-1]].generation_config.eos_ids
        at_an_end = text.stopped or result.token_ids[-1] in eos_ids
        reason = "stop" if at_an_end else "length"
        answer = result.answer
        if text.stopped:
            answer = system.answer_in(text.text, self.asked.questions[i])
        own = {"rounds": result.rounds, "retried": result.retried, "answer": answer}
        if trace is not None:
            own["trace"] = trace
        self.begun = True
        indices = self.indices(i, rollout)
        for index in indices:
            self.send("end", index, text.text, reason, own)
        self.counts["written"] += result.new_tokens * len(indices)
        if rollout == 0:
            self.counts["heard"] += result.heard_tokens
        self.unfinished -= 1
        if self.unfinished == 0 and not self.left:
            self.left = True
            self.send("usage", usage(**self.counts))

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
        self.traces: OrderedDict[str, str] = OrderedDict()
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
        while not self.stopping:
            jobs = self.next_batch()
            if jobs:
                self.answer_or_fail(jobs)
            self.running = []

    def next_batch(self) -> list[Job]:
        """Wait for a job, then a little for others like it, and take them; none if all is to end."""
        with self.changed:
            while not self.stopping:
                self.waiting = [job for job in self.waiting if not job.left]
                jobs = self.alike()
                until = jobs[0].arrived + self.seconds if jobs else float("inf")
                wait = until - time.monotonic()
                full = sum(job.size for job in jobs) >= self.batch_size
                if jobs and (full or wait <= 0):
                    self.waiting = [job for job in self.waiting if job not in jobs]
                    self.running = (
                        jobs  # under the lock, so that `stop` finds each job here or there
                    )
                    return jobs
                self.changed.wait(wait if jobs else None)
        return []

    def alike(self) -> list[Job]:
        """The oldest job, and those that fit into its batch."""
        jobs = self.waiting[:1]
        left = self.batch_size - sum(job.size for job in jobs)
        for job in self.waiting[1:]:
            if job.is_like(jobs[0]) and job.size <= left:
                jobs.append(job)
                left -= job.size
        return jobs

    def answer_or_fail(self, jobs: list[Job]) -> None:
        """Answer jobs. If that fails before one has got anything, answer each alone: it fails for its own faults."""
        try:
            self.answer(jobs)
        except Abandoned:
            pass
        except Exception as e:
            if out_of_memory(e):
                self.release(jobs[0].asked.model)
            if len(jobs) > 1 and not any(job.begun for job in jobs):
                for job in jobs:
                    self.answer_or_fail([job])
                return
            for job in jobs:
                job.fail(refusal(e))

    def release(self, model: str) -> None:
        """Free what agents keep from batch to batch."""
        for agent in self.served[model].system.agents.values():
            agent.release()

    def answer(self, jobs: list[Job]) -> None:
        """Answer jobs in one batch."""
        shared = SharedBatch(jobs, self)
        traced: list[tuple[Job, int, NewText]] = []  # their Results are whole after the batch
        for job, i, new in shared.write():
            job.take(i, new)
            if new.result is None:
                continue
            if job.asked.traced:
                traced.append((job, i, new))
            else:
                job.finish(i, new.rollout, new.result)
        for job, i, new in traced:
            assert new.result is not None, "these are last pieces"
            path = f"/traces/{job.asked.id}-{i}-{new.rollout}"
            self.keep_trace(path, page(shared.system, [new.result]))
            job.finish(i, new.rollout, new.result, trace=path)

    def keep_trace(self, path: str, html: str) -> None:
        """Keep a page, and let the oldest go."""
        self.traces[path] = html
        while len(self.traces) > KEPT_TRACES:
            self.traces.popitem(last=False)


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
            job.begin()
            for i, question in enumerate(job.asked.questions):
                self.questions.append(question)
                self.owners.append((job, i))

    def write(self) -> Iterator[tuple[Job, int, NewText]]:
        """Answer: yields what is written, with the job and the number of its question."""
        whole = not any(job.asked.stream or job.asked.stop for job in self.jobs)
        pieces = self.system.write(
            self.questions,
            self.asked.settings,
            keep_latents=self.asked.traced,
            keep_states=self.asked.traced,
            callback=self.at_position,
            edit=self.after_turn,
            wanted=self.wanted,
            whole=whole,
        )
        for new in pieces:
            yield *self.owners[new.question], new

    def wanted(self, b: int, rollout: int) -> bool:
        """Whether a text is to go on."""
        job, i = self.owners[b]
        return not job.left and not job.texts[i][rollout].stopped

    def at_position(self, *_: object) -> None:
        """Leave the batch if nobody waits for it."""
        if self.batches.stopping or all(job.left for job in self.jobs):
            raise Abandoned

    def after_turn(self, turn: Turn, _: object) -> None:
        """Count what a turn took. A question whose client has left does not go into the next round."""
        for i, b in enumerate(turn.rows):
            job, _ = self.owners[b]
            if turn.answers:
                job.count_prompt(self.system.agents[turn.role].tokens(turn.prompts[i]))
            elif turn.states is not None:
                job.counts["thought"] += len(turn.states[i])
            if job.left and not turn.answers:
                turn.stop([i])


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
