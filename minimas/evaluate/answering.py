"""Answers the batches of a run, one record per question, in smaller batches when memory runs out."""

import argparse
import gc
from collections.abc import Collection, Sequence
from pathlib import Path

import torch
from tqdm import tqdm

from ..common import InputError, checkpoints, out_of_memory, warn
from ..prompts import Question
from ..runs.processes import Processes
from ..settings import CompletedSettings
from ..system import Result, System, load_mas_system
from .benchmarks import Example
from .records import Key, line_of, make_record, record_key

Batch = tuple[CompletedSettings, range]  # a point of the grid, and the indices of the questions


def load(args: argparse.Namespace, task: str) -> System:
    """The System of a run."""
    return load_mas_system(
        args.style,
        checkpoints=checkpoints(args.checkpoint),
        device=args.device,
        dtype=args.dtype,
        task=task,
        offload=args.offload,
        fast=not args.plain,
    )


def share_of(points: Sequence[CompletedSettings], n: int, processes: Processes) -> list[Batch]:
    """The batches of n questions that a process answers, in the order of the run."""
    everything, size = range(n), points[0].batch_size
    batches = [(point, everything[i : i + size]) for point in points for i in everything[::size]]
    return batches[processes.rank :: processes.world]


def own_file(file: Path, rank: int) -> Path:
    """Where a process writes its records: the first one into the file of the run, each other one into a part of it."""
    return file if rank == 0 else file.with_name(f"{file.name}.part{rank}")


def answer_in_pieces(
    system: System, questions: Sequence[Question], settings: CompletedSettings, size: int
) -> tuple[list[Result], int]:
    """(Results of a batch, size): the batch is asked in pieces of at most `size` questions.

    When memory runs out, the size is halved and the whole batch asked again; InputError if one question is too much.
    """
    while True:
        try:
            results: list[Result] = []
            for i in range(0, len(questions), size):
                results += system.answer(questions[i : i + size], settings)
            return results, size
        except (RuntimeError, MemoryError) as e:
            if not out_of_memory(e):
                raise
        if size == 1:
            raise InputError(
                "out of memory with one question at a time: try fewer new tokens or rollouts, or --offload"
            )
        size = -(-min(size, len(questions)) // 2)
        warn(f"out of memory, going on with {size} questions at once")
        for agent in system.agents.values():
            agent.release()
        gc.collect()
        torch.cuda.empty_cache()


@torch.no_grad()
def answer_batches(
    system: System,
    batches: Sequence[Batch],
    examples: Sequence[Example],
    questions: Sequence[Question],
    graders: Sequence[str],
    finished: Collection[Key],
    file: Path,
    quiet: bool = False,
) -> None:
    """Answer batches, and append a record of each question to `file`.

    finished  the keys of records that exist already
    quiet     show no bar
    """
    if not batches:
        return
    size = batches[0][0].batch_size
    total = sum(len(batch) for _, batch in batches)
    verdicts: list[bool] = []
    with (
        open(file, "a", encoding="utf-8") as out,
        tqdm(total=total, unit="question", disable=quiet) as bar,
    ):
        for point, batch in batches:
            missing = [i for i in batch if record_key(vars(point), i) not in finished]
            if missing:  # the whole batch is asked again, because other rows would round otherwise
                asked = [questions[i] for i in batch]
                results, size = answer_in_pieces(system, asked, point, size)
            for i in missing:
                first = (i - batch.start) * point.rollouts  # of the results of this question
                own = results[first : first + point.rollouts]
                record = make_record(i, examples[i], own, point, graders)
                out.write(line_of(record))
                out.flush()
                verdicts += record["right"][graders[0]]
                bar.set_postfix_str(f"{sum(verdicts) / len(verdicts):.1%} right", refresh=False)
            bar.update(len(batch))
