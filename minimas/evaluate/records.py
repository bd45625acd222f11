"""Files of records: lines of JSON, first the settings of the run, then one line per question and point of the grid.

A file is appended to while its run goes on; `gather` puts it in order and merges what other processes wrote.
"""

import glob
import json
from dataclasses import asdict

from tqdm import tqdm

from ..answers import extract
from ..common import InputError, write_atomic
from ..prompts import count_options
from .grade import graders_hash, is_correct
from .runs import depends_on, digest, unchanged

POINT = ("channel", "rounds", "latent_steps")  # the settings that name a point of the grid
RECORD = {
    *POINT,
    "index",
    "question",
    "gold",
    "right",
    "tokens",
    "heard_tokens",
    "seconds",
}  # what is read of a record


def settings_line(args, style, sources, settings, graders, examples, questions):
    """The first line of a file: all that must not change if another run is to continue this one.

    settings  the Settings of any point of the grid
    """
    more = {name: getattr(args, name) for name in ("style", "dataset", "checkpoint", "dtype")}
    more |= {
        "task": examples[0].task,
        "questions": len(examples),
        "graders": graders,
        "graders_hash": graders_hash(),
        "answers_hash": answers_hash(examples),
    }
    more |= {name: value for name, value in asdict(settings).items() if name not in POINT}
    return depends_on(style, sources.values(), questions, more)


def answers_hash(examples):
    """A hash of what the answers to Examples are judged by."""
    return digest([(e.gold, e.tests.keywords if callable(e.tests) else e.tests) for e in examples])


def make_record(index, example, results, point, graders):
    """The record of one question at one point of the grid, from its Results, one for each rollout."""
    record = {
        "index": index,
        "id": example.id,
        **{name: getattr(point, name) for name in POINT},
        "question": example.question,
        "texts": [r.text for r in results],
    }
    return graded(record, example, graders) | {
        "tokens": [r.new_tokens for r in results],
        "heard_tokens": results[0].heard_tokens,
        "seconds": round(sum(r.seconds for r in results), 3),
    }


def graded(record, example, graders):
    """A record with the answers in its texts, and the verdict of each grader on each of them."""
    options = count_options(example.question)
    answers = [extract(text, example.task, options) for text in record["texts"]]
    right = {
        grader: [is_correct(example, *pair, grader) for pair in zip(record["texts"], answers)]
        for grader in graders
    }
    return record | {"gold": example.gold, "answers": answers, "right": right}


def record_key(place, index):
    """What distinguishes a record from all others of its run; place: the record, or vars() of its point of the grid."""
    return (*(place[name] for name in POINT), index)


def line_of(record):
    """A record as a line of the file."""
    return json.dumps(record, ensure_ascii=False) + "\n"


def read_lines(file, beginning=b'{"minimas"'):
    """The lines of a file of records, as dicts, without a last one that was cut off when its writer was killed.

    beginning   how its first line begins: with settings, in a part with a record
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


def gather(file, settings, regrade=None):
    """Merge a run's records and the parts of other processes into one file, in order; returns {key: record}.

    regrade: a function that grades a record again. Then the file may have been graded otherwise.
    Raises InputError if the file holds another run.
    """
    parts = sorted(file.parent.glob(f"{glob.escape(file.name)}.part[0-9]*"))
    if not file.exists():  # it was deleted, so its parts are void
        for part in parts:
            part.unlink()
        parts = []
    before, *lines = read_lines(file) or [settings]
    lines += [line for part in parts for line in read_lines(part, b'{"index"')]
    if lines:  # else that run found out that it could not begin
        unchanged(file, before, settings, "--out", regrade=bool(regrade))
    if foreign := [line for line in lines if not RECORD <= line.keys()]:
        raise InputError(
            f"{file} holds a line that is not a record, {str(foreign[0])[:60]}: give another name with --out"
        )
    if regrade:
        settings = settings | {"minimas": before["minimas"]}  # the version that wrote the texts
        lines = [regrade(line) for line in tqdm(lines, "grading", unit="record")]
    records = {record_key(line, line["index"]): line for line in lines}
    text = "".join(map(line_of, [settings, *(records[key] for key in sorted(records))]))
    write_atomic(file, lambda path: path.write_text(text, encoding="utf-8"))
    for part in parts:
        part.unlink()
    return records
