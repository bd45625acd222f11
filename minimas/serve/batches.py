"""Requests that wait, and the thread that answers them batch by batch.

Requests that arrive within some milliseconds, or while others are answered, share a batch if they agree in model and
settings. The thread alone uses the systems. What it writes goes to the event loop of the client's connection.
"""

import logging
import threading
import time
from collections.abc import Mapping

from ..common import InputError, out_of_memory
from ..look.trace import page
from ..prompts import Question
from ..result import NewText
from ..runs.needs import check_cache, empty_decoders
from ..turn import Turn
from .job import Job
from .protocol import MAX_TRACES, Asked, Refused, Served

LOG = logging.getLogger("uvicorn.error")


class Abandoned(Exception):
    """Nobody waits for a batch any more."""


class Batches:
    """The requests that wait, and the thread that answers them.

    batch_size  texts that are written together
    wait        seconds that a request waits for others
    limit       how many requests may wait: one more is refused
    traces      {path: page}, the latest of them
    empty       {name of a model: its decoders without weights}, which say how large caches are
    """

    def __init__(
        self, served: Mapping[str, Served], batch_size: int, wait: float, limit: int
    ) -> None:
        self.served = served
        self.batch_size = batch_size
        self.wait = wait
        self.limit = limit
        self.traces: dict[str, str] = {}
        self.empty = {name: empty_decoders(one.system) for name, one in served.items()}
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
            if len(self.waiting) >= self.limit:
                message = f"{self.limit} requests wait already: try again later"
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
                seconds = jobs[0].arrived + self.wait - time.monotonic()
                if seconds <= 0 or sum(len(job.texts) for job in jobs) >= self.batch_size:
                    self.waiting = [job for job in self.waiting if job not in jobs]
                    self.running = jobs  # under the lock: `stop` finds each job here or there
                    return jobs
                self.changed.wait(seconds)
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
                self.release()
            return refusal(e)
        return None

    def check_memory(self, asked: Asked, questions: int) -> None:
        """Refused if the caches of a batch of so many questions do not fit the memory that is available.

        It is asked when nothing else is answered, and what agents keep of the last questions is let go first.
        """
        system = self.served[asked.model].system
        empty = self.empty[asked.model]
        try:
            check_cache(system, empty, asked.settings, questions)
        except InputError:
            self.release()
            try:
                check_cache(system, empty, asked.settings, questions)
            except InputError as e:
                raise Refused(503, str(e)) from e

    def release(self) -> None:
        """Free the memory that agents keep from question to question."""
        for one in self.served.values():
            for agent in one.system.agents.values():
                agent.release()

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
        """Answer all jobs; Abandoned if nobody waits for them any more, Refused if their caches do not fit."""
        self.batches.check_memory(self.asked, len(self.questions))
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
    if isinstance(error, Refused):
        return error
    if isinstance(error, InputError):
        return Refused(400, str(error))
    if out_of_memory(error):
        return Refused(503, "out of memory: ask for fewer texts, tokens or latents")
    LOG.error("a request failed", exc_info=error)
    return Refused(500, "an error inside the server, which has logged it")
