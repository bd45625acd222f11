"""Questions with their answers: the benchmarks of the paper by name, and any local .json, .jsonl or .csv file.

    load_dataset("math500")
    load_dataset("medqa", file="medqa.json")
    load_dataset("mine.csv", columns={"question": "problem", "answer": "solution"})

How a row becomes a question follows the released loaders (RecursiveMAS/RecursiveMAS 1b76e32), so that the agents read what
they read there: options under the question, three tests under an MBPP+ prompt, starter code under a LiveCodeBench one.
"""

import base64
import csv
import hashlib
import io
import json
import pickle
import random
import re
import sys
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from . import InputError
from .hub import data_file
from .prompts import TASKS
from .tiny.task import questions as chains
from .viewer import viewer_rows


@dataclass(frozen=True)
class Example:
    """A question and what its answer is judged by.

    tests, for code: a script that raises when a wrong program stands before it, or a list of {"input", "output", "testtype":
    stdin or functional}, or a function without arguments that reads such a list when it is needed.
    """
    id: str  # no other example of the set has it
    question: str
    gold: str  # the answer; for choice its letter; for code a right program, "" where the set gives none
    task: str  # math, choice or code; search questions are asked as math ones
    tests: str | list | Callable | None = None
    fn_name: str | None = ""  # for code, as in prompts.Question


@dataclass(frozen=True)
class Place:
    """Where a row stands."""
    file: str | Path
    row: str  # "line 7"
    offset: int | None = None  # in bytes, in a jsonl file

    def __str__(self):
        return f"{self.file} {self.row}"


def load_dataset(name, file=None, columns=None, task="math", limit=None, seed=42, tell=None):
    """The Examples of a benchmark (a name in DATASETS) or of a local file, in their order.

    file     a local copy of the benchmark, instead of the hub; medqa has no other source
    columns  {"question", "answer", "options", "id", "tests" or "fn_name": column} where the file calls them otherwise; options is
             a column of lists, or several columns: "A,B,C,D"
    task     math, choice or code: of a local file; a benchmark has its own
    limit    read no more than so many
    seed     of the order of GPQA's options
    tell     is called with a sentence for rows left out, and for a set that is not of the paper's size; None: to stderr
    Raises InputError on an unknown name, a column or a file that is missing or damaged, and where the hub cannot be reached.
    """
    tell = tell or (lambda sentence: print(f"minimas: {sentence}", file=sys.stderr))
    dataset, columns = known(name, task), columns or {}
    if limit is not None and limit < 1:
        raise InputError(f"limit is {limit}, expected a number from 1 up")
    if unknown := set(columns) - set(COLUMNS):
        raise InputError(f"a column is given for {min(unknown)!r}, expected one of {', '.join(COLUMNS)}")
    if columns and dataset.read not in READ.values():
        raise InputError(f"columns are given, but {name} is read by the names that its file has on the hub: leave them out")
    names, examples, empty, ids = COLUMNS | dataset.columns | columns, [], [], set()
    for n, (place, row) in enumerate(source(name, dataset, file), 1):
        fields = dataset.read(row, names, place, seed)
        own = text(row, names["id"], place) if names["id"] in row or "id" in columns else ""
        own = own if own and own not in ids else f"row {n}"
        if fields["question"] and (fields.get("tests") if dataset.task == "code" else fields["gold"]):
            examples.append(Example(own, task=dataset.task, **fields))
            ids.add(own)
        else:
            empty.append(place)
        if len(examples) == limit:
            break
    if empty:
        tell(f"{len(empty)} of {n} rows left out, without a question or without an answer to judge by; the first is {empty[0]}")
    if not examples:
        raise InputError(f"{file or name} holds no question with an answer")
    if dataset.size and limit is None and len(examples) != dataset.size:
        tell(f"{name} has {len(examples)} questions here, {dataset.size} in the paper: results do not compare")
    return examples


def settings_for(name, style, protocol="paper", task="math"):
    """How a benchmark is run on a style: {"grader", "rollouts", "max_new_tokens", "temperature"}; what is not in it is left open.

    protocol `paper` are the paper's settings; `released` those of the released runner, which has math500, gpqa, medqa and
    mbppplus only. A local file has only the grader of its task. A grader is math, choice, text or code; `released` stands for
    the released rule for math500.
    """
    if protocol not in ("paper", "released"):
        raise InputError(f"protocol is {protocol!r}, expected paper or released")
    dataset = known(name, task)
    if protocol == "released" and dataset.released is None:
        raise InputError(f"the released runner has no {name}, only {', '.join(n for n, d in DATASETS.items() if d.released is not None)}: "
                         "use --protocol paper")
    settings = {"grader": dataset.grader, "rollouts": 1} | dataset.settings | dataset.of_style.get(style, {})
    return settings | (dataset.released if protocol == "released" else {})


def known(name, task):
    """The Dataset of that name; for a local file one that reads it for the task."""
    if name not in DATASETS and Path(name).suffix not in READERS:
        raise InputError(f"data set {name!r} is not known: expected one of {', '.join(DATASETS)}, or a file {', '.join(READERS)}")
    if task not in TASKS:
        raise InputError(f"task {task!r} is not known, expected one of {', '.join(TASKS)}")
    return DATASETS.get(name) or Dataset(task, task, READ[task])


# Where rows come from: pairs of a Place and a dict

def source(name, dataset, file):
    if file or name not in DATASETS:
        return file_rows(Path(file or name).expanduser())
    if dataset.made:
        return ((Place(name, f"row {n}"), row) for n, row in enumerate(dataset.made(), 1))
    if dataset.files:
        return (pair for part in dataset.files for pair in file_rows(data_file(dataset.repository, part, dataset.revision)))
    if dataset.repository:
        return ((Place(dataset.repository, f"row {n}"), row) for n, row in enumerate(viewer_rows(dataset.repository, *dataset.split), 1))
    raise InputError(f"{name} is not on the hub: give it as a local file, such as dataset/medqa.json of the released code")


def file_rows(file):
    """Rows of a local file, read as they are asked for; InputError names the line at which it is damaged."""
    if file.suffix not in READERS or not file.is_file():
        raise InputError(f"{file} is not there, or none of {', '.join(READERS)}: give a file of rows")
    try:
        for place, row in READERS[file.suffix](file):
            if not isinstance(row, dict):
                raise InputError(f"{place} holds {str(row)[:40]!r}, expected an object with named columns")
            yield place, row
    except json.JSONDecodeError as e:
        raise InputError(f"{file} line {e.lineno} is not JSON ({e.msg}): correct it, or fetch the file again") from e
    except UnicodeDecodeError as e:
        raise InputError(f"{file} is not text in UTF-8 ({e.reason} at byte {e.start}): save it as UTF-8") from e
    except (csv.Error, OSError) as e:
        raise InputError(f"{file} cannot be read ({e})") from e


def jsonl_rows(file):
    with open(file, "rb") as lines:
        offset = 0
        for n, line in enumerate(lines, 1):
            if line.strip():
                try:
                    yield Place(file, f"line {n}", offset), json.loads(line)
                except json.JSONDecodeError as e:
                    raise InputError(f"{file} line {n} is not JSON ({e.msg}): correct it, or fetch the file again") from e
            offset += len(line)


def json_rows(file):
    rows = json.loads(file.read_bytes())
    rows = rows.get("data") if isinstance(rows, dict) else rows
    if not isinstance(rows, list):
        raise InputError(f"{file} holds no list of rows, nor one under \"data\"")
    for n, row in enumerate(rows, 1):
        yield Place(file, f"row {n}"), row


def csv_rows(file):
    csv.field_size_limit(2 ** 30)  # explanations in GPQA's cells may pass the 128 KiB that are allowed by default
    with open(file, newline="", encoding="utf-8-sig") as lines:
        reader = csv.DictReader(lines, strict=True)
        for row in reader:
            if None in row or None in row.values():
                raise InputError(f"{file} line {reader.line_num} has more or fewer cells than the header's {len(reader.fieldnames)}")
            yield Place(file, f"line {reader.line_num}"), row


READERS = {".json": json_rows, ".jsonl": jsonl_rows, ".csv": csv_rows}


# What is made of a row: question, gold, tests, fn_name of an Example; empty where the row has none

COLUMNS = {name: name for name in ("question", "answer", "options", "id", "tests", "fn_name")}


def cell(row, column, place):
    if column not in row:
        raise InputError(f"{place} has no column {column!r}, only {', '.join(row) or 'an empty row'}: say which it is, as in question=COLUMN")
    return row[column]


def text(row, column, place):
    value = cell(row, column, place)
    if isinstance(value, (list, dict)):
        raise InputError(f"{place}: column {column!r} holds a {type(value).__name__}, expected text or a number")
    return "" if value is None or str(value).isspace() else str(value)


def read_plain(row, names, place, seed):
    return {"question": text(row, names["question"], place), "gold": text(row, names["answer"], place).strip()}


def read_choice(row, names, place, seed):
    fields, options = read_plain(row, names, place, seed), options_of(row, names["options"], place)
    return {"question": with_options(fields["question"].strip(), options), "gold": letter_of(fields["gold"], options, place)}


def options_of(row, column, place):
    """Options out of a column of lists, or out of several columns, without their letters; [] where the question must hold them."""
    if column == COLUMNS["options"] and column not in row:
        return []
    options = [text(row, part, place) for part in column.split(",")] if "," in column else cell(row, column, place)
    if not isinstance(options, list) or not 2 <= len(options) <= 4:
        raise InputError(f"{place}: column {column!r} holds {str(options)[:60]!r}, expected a list of 2 to 4 options")
    options = [str(option).strip() for option in options]
    if all(labelled(letter, option) for letter, option in zip("ABCD", options)):
        return [option[2:].strip() for option in options]
    return options


def labelled(letter, line):
    """Is a line marked as that option? One alone proves nothing: C. difficile is no option C."""
    return re.match(rf"\s*{letter}[.):-]\s", line, re.IGNORECASE)


def with_options(question, options):
    """The question, its options under it unless it lists them, and what is asked for: the agents of the paper read it so."""
    lines, letters = question.splitlines(), "ABCD"[:len(options)]
    if question and not all(any(labelled(letter, line) for line in lines) for letter in letters):
        question = "\n".join([question, *(f"{letter}. {option}" for letter, option in zip(letters, options))])
    asked = not question or "choose the correct option" in question.lower()
    return question if asked else question + "\n\nChoose the correct option (A/B/C/D)."


def letter_of(answer, options, place):
    """An answer given as a letter, as the text of an option, or as both -> its letter."""
    letters, said = "ABCD"[:len(options)] or "ABCD", re.fullmatch(r"\(?([A-D])[.):]?", answer, re.IGNORECASE)
    meant = {letter for letter, option in zip(letters, options) if answer.split() in (option.split(), f"{letter}. {option}".split())}
    meant |= {said[1].upper()} & set(letters) if said else set()
    if answer and len(meant) != 1:
        raise InputError(f"{place}: the answer {answer[:60]!r} is not a letter, or the text, of just one of the options {options}")
    return "".join(meant) if answer else ""


def read_gpqa(row, names, place, seed):
    """Options in an order that hangs on seed and question alone: the released runner's for the same seed."""
    question, answers = text(row, "Question", place).strip(), ["Correct Answer", *(f"Incorrect Answer {n}" for n in (1, 2, 3))]
    order = [0, 1, 2, 3]
    random.Random(int(hashlib.md5(f"{seed}::{question}".encode()).hexdigest()[:16], 16)).shuffle(order)
    options = [text(row, answers[i], place).strip() for i in order]
    return {"question": with_options(question, options), "gold": "ABCD"[order.index(0)] if all(options) else ""}


def read_code(row, names, place, seed):
    return {"question": text(row, names["question"], place), "gold": str(row.get(names["answer"]) or ""),
            "tests": cell(row, names["tests"], place), "fn_name": row.get(names["fn_name"], "")}


def read_mbppplus(row, names, place, seed):
    """The function asked for is the one of the right program that the tests call."""
    question, code, listed = text(row, "prompt", place).strip(), text(row, "code", place), cell(row, "test_list", place)
    if not isinstance(listed, list):
        raise InputError(f"{place}: column 'test_list' holds {str(listed)[:60]!r}, expected a list of tests")
    called = [name for name in re.findall(r"^def\s+(\w+)", code, re.MULTILINE) if re.search(rf"\b{name}\s*\(", "\n".join(listed))]
    shown = "\n".join(["\n\nYour solution should satisfy assertions like:", *listed[:3]])
    return {"question": question and question + shown, "gold": code, "tests": text(row, "test", place),
            "fn_name": called[-1] if called else None}


def read_livecodebench(row, names, place, seed):
    """Tests stay in the file until they are asked for: of all questions together they are gigabytes."""
    if place.offset is None:
        raise InputError(f"{place}: livecodebench is read from a .jsonl file only, for its tests are looked up there: give it as such")
    question, starter = text(row, "question_content", place).strip(), text(row, "starter_code", place)
    try:
        name = json.loads(row.get("metadata") or "{}").get("func_name")
    except (json.JSONDecodeError, AttributeError) as e:
        raise InputError(f"{place}: metadata is no JSON object: fetch the file again") from e
    return {"question": f"{question}\n\nStarter code:\n{starter}" if question and starter else question, "gold": "",
            "tests": partial(livecodebench_tests, place), "fn_name": name or (None if starter else "")}


def livecodebench_tests(place):
    """The public and the private tests of the row at a Place."""
    try:
        with open(place.file, "rb") as file:
            file.seek(place.offset)
            row = json.loads(file.readline())
        return json.loads(row["public_test_cases"]) + json.loads(unpacked(row["private_test_cases"]))
    except Exception as e:  # a pickle can raise anything
        raise InputError(f"{place}: the tests cannot be read ({type(e).__name__}: {e}): fetch the file again") from e


def unpacked(tests):
    """JSON that is plain, or a pickled string, compressed, in base 64. Nothing but plain values comes out of that pickle."""
    if not tests or tests.lstrip().startswith("["):
        return tests or "[]"
    return Plain(io.BytesIO(zlib.decompress(base64.b64decode(tests)))).load()


class Plain(pickle.Unpickler):
    """An unpickler that finds no class and no function, so that none can be called."""

    def find_class(self, module, name):
        raise pickle.UnpicklingError(f"it asks for {module}.{name}, expected a string")


READ = {"math": read_plain, "choice": read_choice, "code": read_code}


# The benchmarks

@dataclass(frozen=True)
class Dataset:
    """Where a benchmark's rows come from, how they are read and judged, and how the paper ran it."""
    task: str
    grader: str
    read: Callable  # (row, names of columns, Place, seed) -> fields of an Example
    repository: str | None = None  # on the hub; its files, or else what the dataset viewer calls its config and split
    files: tuple[str, ...] = ()
    revision: str | None = None
    split: tuple[str, str] | None = None
    made: Callable | None = None  # gives the rows, for a set that is kept nowhere
    columns: dict[str, str] = field(default_factory=dict)
    size: int | None = None  # questions in the paper
    settings: dict = field(default_factory=dict)  # of the paper
    of_style: dict = field(default_factory=dict)  # {style: what is different there}
    released: dict | None = None  # what the released runner does otherwise; None: it does not have this set


PAPER = {"max_new_tokens": 4000, "temperature": 0.6}
AIME = {"max_new_tokens": 16000, "temperature": 0.6, "rollouts": 10}
CODE = {"max_new_tokens": 4000, "temperature": 0.2}
def tiny_rows():
    """Every other chain of those that the README's table of accuracy is measured on, lengths in turn."""
    of_length = [chains("test", 150)[i * 150:(i + 1) * 150] for i in range(8)]
    return [{"question": chain.question, "answer": chain.answer} for same in list(zip(*of_length))[::2] for chain in same]


PROBLEM, ASKED = {"question": "problem"}, {"question": "Question", "answer": "Answer"}
DATASETS = {
    "tiny": Dataset("math", "math", read_plain, made=tiny_rows, settings={"rounds": (1, 2, 3, 4, 5), "channel": ("latent", "text"), "batch_size": 600}),
    "math500": Dataset("math", "math", read_plain, "HuggingFaceH4/MATH-500", ("test.jsonl",), "6e4ed1a2a79af7d8630a6b768ec859cb5af4d3be",
                       columns=PROBLEM | {"id": "unique_id"}, size=500, settings=PAPER | {"max_new_tokens": 2000},
                       of_style={"sequential_light": {"max_new_tokens": 1000}}, released={"grader": "released"}),
    "gpqa": Dataset("choice", "choice", read_gpqa, "Idavidrein/gpqa", ("gpqa_diamond.csv",), columns={"id": "Record ID"}, size=198,
                    settings=PAPER, released={}),
    "medqa": Dataset("choice", "choice", read_choice, columns={"question": "query", "id": "idx"}, size=300, settings=PAPER, released={}),
    "aime25": Dataset("math", "math", read_plain, "math-ai/aime25", ("test.jsonl",), "563bb8404243c5f09de6ec262f2db674fe5bce9b",
                      columns=PROBLEM, size=30, settings=AIME),
    "aime26": Dataset("math", "math", read_plain, "MathArena/aime_2026", split=("default", "train"),
                      columns=PROBLEM | {"id": "problem_idx"}, size=30, settings=AIME),
    "mbppplus": Dataset("code", "code", read_mbppplus, "evalplus/mbppplus", split=("default", "test"), columns={"id": "task_id"},
                        size=378, settings=CODE, released={}),
    "livecodebench": Dataset("code", "code", read_livecodebench, "livecodebench/code_generation_lite",
                             ("test.jsonl", *(f"test{n}.jsonl" for n in range(2, 7))), columns={"id": "question_id"}, size=1055,
                             settings=CODE),
    "bamboogle": Dataset("math", "text", read_plain, "chiayewken/bamboogle", split=("default", "test"), columns=ASKED, settings=PAPER),
    "hotpotqa": Dataset("math", "text", read_plain, "hotpotqa/hotpot_qa", split=("distractor", "validation"), settings=PAPER),
}
