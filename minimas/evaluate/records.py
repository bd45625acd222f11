"""Files of records: lines of JSON, first the settings of the run, then one line per question and point of the grid.

A file is appended to while its run goes on; `gather` puts it in order and merges what other processes wrote.
"""

import glob
import json
from dataclasses import asdict

from .. import __version__
from ..common import InputError, write_atomic
from .grade import is_correct
from .runs import fingerprint, unchanged

POINT = ("channel", "rounds", "latent_steps")  # the settings that name a point of the grid
RECORD = {*POINT, "index", "question", "gold", "right", "tokens", "heard_tokens", "seconds"}  # what is read of a record


def settings_line(args, settings, graders, examples):
    """The first line of a file: all that must not change if another run is to continue this one.

    settings  the Settings of any point of the grid
    """
    named = ("style", "dataset", "file", "columns", "limit", "checkpoint", "dtype")
    line = {"minimas": __version__, **{name: getattr(args, name) for name in named}, "task": examples[0].task,
            "questions": len(examples), "graders": graders, "checkpoint_files": fingerprint(args.checkpoint)}
    line |= {name: value for name, value in asdict(settings).items() if name not in POINT}
    return json.loads(json.dumps(line))  # as it will be read from the file: tuples are lists


def make_record(index, example, results, point, graders):
    """The record of one question at one point of the grid, from its Results, one for each rollout."""
    return {"index": index, "id": example.id, **{name: getattr(point, name) for name in POINT},
            "question": example.question, "gold": example.gold,
            "answers": [r.answer for r in results], "texts": [r.text for r in results],
            "right": {grader: [is_correct(example, r, grader) for r in results] for grader in graders},
            "tokens": [r.new_tokens for r in results], "heard_tokens": results[0].heard_tokens,
            "seconds": round(sum(r.seconds for r in results), 3)}


def record_key(place, index):
    """What distinguishes a record from all others of its run; place: the record, or vars() of its point of the grid."""
    return (*(place[name] for name in POINT), index)


def line_of(record):
    """A record as a line of the file."""
    return json.dumps(record, ensure_ascii=False) + "\n"


def read_lines(file):
    """The lines of a file of records, as dicts, without a last one that was cut off when its writer was killed.

    Raises InputError if the file holds something else.
    """
    *lines, cut = file.read_bytes().split(b"\n") if file.exists() else [b""]
    try:
        if cut and not lines and not cut.startswith(b'{"minimas"'[:len(cut)]):
            raise ValueError("its first line does not hold settings")
        return [dict(json.loads(line)) for line in lines]
    except (ValueError, TypeError) as e:
        raise InputError(f"{file} is not a file of records ({e}): give another name with --out") from e


def gather(file, settings):
    """Merge a run's records and the parts of other processes into one file, in order; returns {key: record}.

    Raises InputError if the file holds a run with other settings.
    """
    parts = sorted(file.parent.glob(f"{glob.escape(file.name)}.part[0-9]*"))
    if not file.exists():  # it was deleted, so its parts are void
        for part in parts:
            part.unlink()
        parts = []
    before, *lines = read_lines(file) or [settings]
    lines += [line for part in parts for line in read_lines(part)]
    if lines:  # else that run found out that it could not begin
        unchanged(file, before, settings, "--out")
    if foreign := [line for line in lines if not RECORD <= line.keys()]:
        raise InputError(f"{file} holds a line that is not a record, {str(foreign[0])[:60]}: give another name with --out")
    records = {record_key(line, line["index"]): line for line in lines}
    text = "".join(map(line_of, [settings, *(records[key] for key in sorted(records))]))
    write_atomic(file, lambda path: path.write_text(text, encoding="utf-8"))
    for part in parts:
        part.unlink()
    return records


def finished_keys(file, examples):
    """The keys of the records in a file; InputError if the data set has another question or answer in a record's place."""
    lines, asked = read_lines(file)[1:], [(example.question, example.gold) for example in examples]
    for line in lines:
        if line["index"] not in range(len(asked)) or (line["question"], line["gold"]) != asked[line["index"]]:
            raise InputError(f"question {line['index']} in {file} or its answer is not that of the data set, which must "
                             "have changed: give another name with --out")
    return {record_key(line, line["index"]) for line in lines}
