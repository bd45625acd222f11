"""Files of records: lines of JSON, first the header, which says what the run depends on, then one line per question and
point of the grid.

A file is appended to while its run goes on; `gather` puts it in order and merges what other processes wrote.
"""

import glob
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from ..answers import extract
from ..common import InputError, write_atomic
from ..prompts import Question, count_options
from ..runs.dependencies import check_unchanged, depends_on, digest
from ..settings import Settings
from ..styles import Origin, Source, Style
from .benchmarks import Example
from .grade import graders_hash, is_correct

if TYPE_CHECKING:
    from ..result import Result  # which imports torch

Record = dict[str, Any]
Key = tuple  # what distinguishes a record from all others of its run

POINT = ("channel", "rounds", "latent_steps", "hear")  # the settings that name a point of the grid
ANSWERED = {"index", "question", "gold", "right", "tokens", "heard_tokens", "seconds"}
RECORD = {*POINT, *ANSWERED} - {"hear"}  # what is read of a record; older ones have no `hear`


def make_header(
    origin: Origin,
    style: Style,
    dataset: str,
    settings: Settings,
    graders: Sequence[str],
    examples: Sequence[Example],
    questions: Sequence[Question],
) -> Record:
    """The first line of a file: all that must not change if another run is to continue this one.

    dataset   its name
    settings  the Settings of any point of the grid
    """
    options = {
        "style": str(origin.style),
        "dataset": dataset,
        "checkpoint": as_typed(origin.checkpoints),
        "dtype": dtype_used(origin, style),
        "quantize": origin.quantize,
    }
    grading = {
        "task": examples[0].task,
        "questions": len(examples),
        "graders": graders,
        "graders_hash": graders_hash(graders),
        "answers_hash": answers_hash(examples),
    }
    common = {name: value for name, value in asdict(settings).items() if name not in POINT}
    sources = style.sources(origin.checkpoints)
    return depends_on(style, sources.values(), questions, options | grading | common)


def dtype_used(origin: Origin, style: Style) -> str | dict[str, str]:
    """The dtype of all agents, or {role: dtype}, as far as it is known before they are loaded.

    "config.json" stands for the one that this file of an agent names.
    """
    from ..devices import devices_by_role, usable_dtype  # here, because it brings torch along

    by_role = {}
    for role, device in devices_by_role(style.order, origin.device).items():
        dtype = usable_dtype(origin.dtype, device)
        by_role[role] = "config.json" if dtype is None else str(dtype).removeprefix("torch.")
    names = set(by_role.values())
    return names.pop() if len(names) == 1 else by_role


def as_typed(checkpoints: Source | Mapping[str, Source] | None) -> list[str]:
    """The checkpoints of a system as values of --checkpoint."""
    if isinstance(checkpoints, Mapping):
        return [f"{role}={source}" for role, source in checkpoints.items()]
    return [] if checkpoints is None else [str(checkpoints)]


def answers_hash(examples: Iterable[Example]) -> str:
    """A hash of what the answers to Examples are judged by."""
    judged = []
    for example in examples:
        tests: object = example.tests
        if isinstance(tests, partial):  # they are read from a file when they are needed
            tests = tests.keywords
        elif callable(tests):
            tests = tests()
        judged.append((example.gold, tests))
    return digest(judged)


def make_record(
    index: int,
    example: Example,
    results: "Sequence[Result]",
    point: Settings,
    graders: Sequence[str],
) -> Record:
    """The record of one question at one point of the grid, from its Results, one for each rollout."""
    record = {
        "index": index,
        "id": example.id,
        **{name: getattr(point, name) for name in POINT},
        "question": example.question,
        "texts": [result.text for result in results],
    }
    return graded(record, example, graders) | {
        "tokens": [result.new_tokens for result in results],
        "heard_tokens": results[0].heard_tokens,
        "seconds": round(sum(result.seconds for result in results), 3),
    }


def graded(record: Record, example: Example, graders: Sequence[str]) -> Record:
    """A record with the answers in its texts, and the verdict of each grader on each of them."""
    texts = record["texts"]
    options = count_options(example.question)
    answers = [extract(text, example.task, options) for text in texts]
    right = {}
    for grader in graders:
        right[grader] = [
            is_correct(example, text, answer, grader)
            for text, answer in zip(texts, answers, strict=True)
        ]
    return record | {"gold": example.gold, "answers": answers, "right": right}


def record_key(place: Mapping[str, Any], index: int) -> Key:
    """What distinguishes a record from all others of its run; place: the record, or vars() of its point of the grid."""
    return (*(place[name] for name in POINT), index)


def line_of(record: Record) -> str:
    """A record as a line of the file."""
    return json.dumps(record, ensure_ascii=False) + "\n"


def read_lines(file: Path, beginning: bytes = b'{"minimas"') -> list[Record]:
    """The lines of a file of records, as dicts, without a last one that was cut off when its writer was killed.

    beginning   how its first line begins: a header, in a part a record
    Raises InputError if the file holds something else.
    """
    lines = file.read_bytes().split(b"\n") if file.exists() else [b""]
    try:
        if not lines[0].startswith(beginning[: len(lines[0])]):
            raise ValueError(f"it does not begin with {beginning.decode()}")
        return [dict(json.loads(line)) for line in lines[:-1]]
    except (ValueError, TypeError) as e:
        raise InputError(
            f"{file} is not a file of records ({e}): give another name with --out"
        ) from e


def gather(
    file: Path,
    header: Record,
    regrade: Callable[[Record], Record] | None = None,
    progress: bool = True,
) -> dict[Key, Record]:
    """Merge a run's records and the parts of other processes into one file, in order; returns {key: record}.

    header     its first line
    regrade    a function that grades a record again. Then the file may have been graded otherwise.
    progress   show a bar while records are graded again
    Raises InputError if the file holds another run.
    """
    parts = parts_beside(file)
    if not file.exists():  # it was deleted, so its parts are void
        delete(parts)
        parts = []
    before, lines = contents(file, parts, header, regrade=regrade is not None)
    lines = [line | {"hear": line.get("hear", "own")} for line in lines]
    if regrade:
        wrote = {name: before[name] for name in ("minimas", "dtype") if name in before}
        header = header | wrote  # of the texts
        bar = tqdm(lines, "grading", unit="record", disable=not progress)
        lines = [regrade(line) for line in bar]
    records = by_key(lines)
    whole = [header, *(records[key] for key in sorted(records))]
    text = "".join(line_of(line) for line in whole)
    write_atomic(file, lambda path: path.write_text(text, encoding="utf-8"))
    delete(parts)
    return records


def contents(
    file: Path, parts: Iterable[Path], header: Record, regrade: bool
) -> tuple[Record, list[Record]]:
    """(the first line, the records) of a run's file and its parts; of one that is not there its header alone.

    regrade   its texts are to be graded again
    Raises InputError if the file holds another run than that of `header`, or lines that are no records.
    """
    before, *lines = read_lines(file) or [header]
    for part in parts:
        lines += read_lines(part, b'{"index"')
    # To be graded again, texts may be of any dtype. Older files do not say it, if it was not chosen.
    any_dtype = regrade or before.get("dtype") is None
    compared = before | {"dtype": header["dtype"]} if any_dtype else before
    if lines:  # else that run found out that it could not begin
        check_unchanged(file, compared, header, "--out", regrade=regrade)
    read = RECORD | {"texts"} if regrade else RECORD
    if foreign := [line for line in lines if not read <= line.keys()]:
        missing = ", ".join(sorted(read - foreign[0].keys()))
        raise InputError(
            f"{file} holds a line that is not a record, {str(foreign[0])[:60]}, which lacks {missing}: give another "
            "name with --out"
        )
    return before, lines


def parts_beside(file: Path) -> list[Path]:
    """The files in which other processes wrote records of a run, NAME.part1 and so on, in order."""
    found = sorted(file.parent.glob(f"{glob.escape(file.name)}.part*"))
    return [part for part in found if re.fullmatch(r"\.part\d+", part.name[len(file.name) :])]


def by_key(records: Iterable[Record]) -> dict[Key, Record]:
    """{key: record}."""
    return {record_key(record, record["index"]): record for record in records}


def delete(files: Iterable[Path]) -> None:
    """Remove files."""
    for file in files:
        file.unlink()
