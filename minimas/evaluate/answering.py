"""Answers the batches of a run, one record per question, in smaller batches when memory runs out."""

import gc
from collections.abc import Collection, Iterator, Sequence

import torch
from tqdm import tqdm

from ..common import InputError, out_of_memory, warn
from ..hear import before_each
from ..prompts import Question
from ..result import Result
from ..runs.needs import check_memory
from ..runs.processes import Processes
from ..settings import CompletedSettings
from ..styles import Origin, Style
from ..system import System, load_mas_system
from .benchmarks import Example
from .records import Key, Record, make_record, record_key

Batch = tuple[CompletedSettings, range]  # a point of the grid, and the indices of the questions


def load(origin: Origin, style: Style, points: Sequence[CompletedSettings], task: str) -> System:
    """The System of a run; InputError if one question at a time would not fit into memory."""
    check_memory(origin, style, points, 1)  # more at once are asked in pieces if memory runs out
    return load_mas_system(**vars(origin), task=task)


def share_of(points: Sequence[CompletedSettings], n: int, processes: Processes) -> list[Batch]:
    """The batches of n questions that a process answers, in the order of the run."""
    size = points[0].batch_size
    batches = []
    for point in points:
        for first in range(0, n, size):
            batches.append((point, range(first, min(first + size, n))))
    return batches[processes.rank :: processes.world]


def missing_in(batch: Batch, finished: Collection[Key]) -> list[int]:
    """The indices of the questions of a batch whose keys are not in `finished`."""
    point, indices = batch
    return [i for i in indices if record_key(vars(point), i) not in finished]


def answer_in_pieces(
    system: System,
    questions: Sequence[Question],
    settings: CompletedSettings,
    size: int,
    before: Sequence[Question] | None = None,
) -> tuple[list[Result], int]:
    """(Results of a batch, size): the batch is asked in pieces of at most `size` questions.

    before  for each question the one before it, see System.answer

    When memory runs out, the size is halved and the whole batch asked again; InputError if one question is too much.
    """
    while True:
        try:
            results: list[Result] = []
            for i in range(0, len(questions), size):
                heard = before[i : i + size] if before is not None else None
                results += system.answer(questions[i : i + size], settings, before=heard)
            return results, size
        except (RuntimeError, MemoryError) as e:
            if not out_of_memory(e):
                raise
        if size == 1:
            raise InputError(
                "out of memory with one question at a time: try fewer new tokens or rollouts, or --offload"
            )
        asked_at_once = min(size, len(questions))
        size = (asked_at_once + 1) // 2
        warn(f"out of memory, going on with {size} questions at once")
        for agent in system.agents.values():
            agent.release()
        gc.collect()
        torch.cuda.empty_cache()


def answer_batches(
    system: System,
    batches: Sequence[Batch],
    examples: Sequence[Example],
    questions: Sequence[Question],
    graders: Sequence[str],
    finished: Collection[Key] = (),
    progress: bool = True,
) -> Iterator[Record]:
    """Answer batches; yields a record of each question as soon as its batch is done.

    finished  the keys of records that exist already
    progress  show a bar on stderr
    """
    if not batches:
        return
    size = batches[0][0].batch_size
    total = sum(len(indices) for _, indices in batches)
    verdicts: list[bool] = []
    with tqdm(total=total, unit="question", disable=not progress) as bar:
        for batch in batches:
            point, indices = batch
            missing = missing_in(batch, finished)
            if not missing:
                bar.update(len(indices))
                continue
            # The whole batch is asked again, because other rows would round otherwise
            asked = [questions[i] for i in indices]
            before = before_each(questions, point)
            heard = [before[i] for i in indices] if before is not None else None
            results, size = answer_in_pieces(system, asked, point, size, heard)
            for i in missing:
                first = (i - indices.start) * point.rollouts  # of the results of this question
                own = results[first : first + point.rollouts]
                record = make_record(i, examples[i], own, point, graders)
                verdicts += record["right"][graders[0]]
                bar.set_postfix_str(f"{sum(verdicts) / len(verdicts):.1%} right", refresh=False)
                yield record
            bar.update(len(indices))
