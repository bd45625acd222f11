"""Questions with their answers: the benchmarks of the paper by name, and any local .json, .jsonl or .csv file.

    load_dataset("math500")
    load_dataset("medqa", file="medqa.json")
    load_dataset("mine.csv", columns={"question": "problem", "answer": "solution"})

How a row becomes a question follows the released loaders (RecursiveMAS/RecursiveMAS 1b76e32), so that the agents read what
they read there: options under the question, three tests under an MBPP+ prompt, starter code under a LiveCodeBench one.

datasets.json says where each benchmark comes from (a repository on the hub with its files, or else what the dataset viewer
calls its config and split), what its columns are called, how many questions the paper counts, and how it was run: `paper`
holds the paper's settings, `released` what the released runner does otherwise, where it has the set.
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
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path

from . import InputError
from .hub import data_file
from .prompts import TASKS
from .tiny.task import questions as chains
from .viewer import viewer_rows

DATASETS = json.loads(Path(__file__).with_name("datasets.json").read_text(encoding="utf-8"))
COLUMNS = ("question", "answer", "options", "id", "tests", "fn_name")  # of a local file


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


def complain(sentence):
    print(f"minimas: {sentence}", file=sys.stderr)


def load_dataset(name, file=None, columns=None, task="math", limit=None, seed=42, tell=complain):
    """The Examples of a benchmark (a name in DATASETS) or of a local file, in their order.

    file     a local copy of the benchmark, instead of the hub; medqa has no other source
    columns  {one of COLUMNS: what the file calls it}; options is a list in each row; it, id and fn_name may be missing
    task     math, choice or code: of a local file; a benchmark has its own
    limit    read no more than so many rows
    seed     of the order of GPQA's options
    tell     is called with a sentence for rows left out, and for a set that is not of the paper's size
    Raises InputError on an unknown name, a column or a file that is missing or damaged, and where the hub cannot be reached.
    """
    dataset, examples, empty, ids = dataset_called(name, task), [], [], {""}
    if limit is not None and limit < 1:
        raise InputError(f"limit is {limit}, expected a number from 1 up")
    if unknown := set(columns or ()) - set(COLUMNS):
        raise InputError(f"a column is given for {min(unknown)!r}, expected one of {', '.join(COLUMNS)}")
    rows, read = rows_of(name, dataset, file, columns or {}), READ.get(name) or READ[dataset["task"]]
    for n, row in enumerate(islice(rows, limit), 1):
        fields, own_id = read(row, seed), str(row.get("id", ""))
        if not fields["question"] or not fields["tests" if dataset["task"] == "code" else "gold"]:
            empty.append(str(row))
            continue
        examples.append(Example(f"row {n}" if own_id in ids else own_id, task=dataset["task"], **fields))
        ids.add(own_id)
    if empty:
        tell(f"{len(empty)} of {n} rows left out, without a question or an answer to judge by; the first is {empty[0]}")
    if not examples:
        raise InputError(f"{file or name} holds no question with an answer")
    if limit is None and len(examples) != dataset.get("questions", len(examples)):
        tell(f"{name} has {len(examples)} questions here, {dataset['questions']} in the paper: results do not compare")
    return examples


def settings_for(name, style, protocol="paper", task="math"):
    """How a benchmark is run on a style: its grader, and rollouts and fields of recurse.Settings; what is left out is open.

    protocol `paper` are the paper's settings; `released` adds the latent_steps and batch_size that the released runner
    recommends for the sequential styles (its seed is 42, the default here); it has math500, gpqa, medqa and mbppplus only.
    A local file has only the grader of its task. A grader is math, choice, text or code; `released` stands for the released
    rule for math500.
    """
    dataset = dataset_called(name, task)
    if protocol not in ("paper", "released") or protocol == "released" and "released" not in dataset:
        having = ", ".join(other for other in DATASETS if "released" in DATASETS[other])
        raise InputError(f"{name} has no {protocol} settings: expected paper; released for {having}")
    settings = {"grader": dataset["task"], "rollouts": 1}
    for source in "paper", protocol:
        for styles in "every style", style:
            settings |= dataset.get(source, {}).get(styles, {})
    return settings


def dataset_called(name, task):
    """What datasets.json says of that name; of a local file only the task is known."""
    if task not in TASKS or name not in DATASETS and Path(name).suffix not in FILE_READERS:
        raise InputError(f"data set {name!r} for task {task!r} is not known: expected one of {', '.join(DATASETS)}, "
                         f"or a file {', '.join(FILE_READERS)}; and one of the tasks {', '.join(TASKS)}")
    return DATASETS.get(name, {"task": task})


# Where rows come from

@dataclass(frozen=True)
class Row:
    """A row, and where it stands. Its cells are asked for by our names, which `columns` turns into the file's."""
    cells: dict
    file: str | Path  # or the data set
    number: int  # from 1; in a .jsonl file that of its line
    columns: dict
    offset: int | None = None  # of its line in a .jsonl file, in bytes

    def __str__(self):
        return f"{self.file} row {self.number}"

    def cell(self, name):
        column = self.columns.get(name, name)
        if column not in self.cells:
            raise InputError(f"{self} has no column {column!r}, only {', '.join(self.cells) or 'an empty row'}: "
                             f"say which it is, as in {name}=COLUMN")
        return self.cells[column]

    def get(self, name, default):
        """A cell, or the default where the file has no such column; but one that was named must be there."""
        return self.cell(name) if name in self.columns or name in self.cells else default

    def text(self, name):
        value = self.cell(name)
        if isinstance(value, (list, dict)):
            raise InputError(f"{self}: column {name!r} holds a {type(value).__name__}, expected text or a number")
        return "" if value is None or str(value).isspace() else str(value)


def rows_of(name, dataset, file, columns):
    """Rows of a local file, of files on the hub, or of its dataset viewer; each is read when it is asked for."""
    columns, repository = dataset.get("columns", {}) | columns, dataset.get("repository", name)
    if file or name not in DATASETS:
        return file_rows(Path(file or name).expanduser(), columns)
    if "files" in dataset:
        files = (data_file(repository, part, dataset.get("revision")) for part in dataset["files"])
        return (row for part in files for row in file_rows(part, columns))
    if name == "medqa":
        raise InputError("medqa is not on the hub: give it as a local file, such as dataset/medqa.json of the released code")
    rows = tiny_rows() if name == "tiny" else viewer_rows(repository, dataset["config"], dataset["split"])
    return (Row(cells, repository, n, columns) for n, cells in enumerate(rows, 1))


def tiny_rows():
    """Every other chain of those that the README's table of accuracy is measured on, lengths in turn."""
    of_length = [chains("test", 150)[i * 150:(i + 1) * 150] for i in range(8)]
    return ({"question": chain.question, "answer": chain.answer} for same in list(zip(*of_length))[::2] for chain in same)


def file_rows(file, columns):
    """Rows of a local file, read as they are asked for; InputError says where it is damaged."""
    if file.suffix not in FILE_READERS or not file.is_file():
        raise InputError(f"{file} is not there, or none of {', '.join(FILE_READERS)}: give a file of rows")
    try:
        for row in FILE_READERS[file.suffix](file, columns):
            if not isinstance(row.cells, dict):
                raise InputError(f"{row} holds {str(row.cells)[:40]!r}, expected an object with named columns")
            yield row
    except (UnicodeDecodeError, csv.Error, OSError) as e:
        raise InputError(f"{file} cannot be read ({e}): save it as UTF-8, or fetch it again") from e


def from_json(text, file, line=None):
    """The value of a JSON text: all of a file, or that line of it."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as e:
        raise InputError(f"{file} line {line or e.lineno} is not JSON ({e.msg}): correct it, or fetch it again") from e


def jsonl_rows(file, columns):
    with open(file, "rb") as lines:
        for n, line in enumerate(lines, 1):
            if line.strip():
                yield Row(from_json(line, file, n), file, n, columns, lines.tell() - len(line))


def json_rows(file, columns):
    rows = from_json(file.read_bytes(), file)
    rows = rows.get("data", rows) if isinstance(rows, dict) else rows
    return (Row(cells, file, n, columns) for n, cells in enumerate(rows if isinstance(rows, list) else [rows], 1))


def csv_rows(file, columns):
    csv.field_size_limit(2 ** 30)  # explanations in GPQA's cells may pass the 128 KiB that are allowed by default
    with open(file, newline="", encoding="utf-8-sig") as lines:
        for n, cells in enumerate(reader := csv.DictReader(lines, strict=True), 1):
            if None in cells or None in cells.values():
                raise InputError(f"{file} line {reader.line_num} has more or fewer cells than the header")
            yield Row(cells, file, n, columns)


FILE_READERS = {".json": json_rows, ".jsonl": jsonl_rows, ".csv": csv_rows}


# What is made of a row: question, gold, tests, fn_name of an Example; empty where the row has none

def read_plain(row, seed):
    return {"question": row.text("question"), "gold": row.text("answer").strip()}


def read_choice(row, seed):
    """Options come in a column of lists, with or without their letters, or stand in the question."""
    fields, options = read_plain(row, seed), row.get("options", None) or []
    if not isinstance(options, list) or len(options) not in (0, 2, 3, 4):
        raise InputError(f"{row}: options are {str(options)[:60]!r}, expected a list of 2 to 4")
    options = [str(option).strip() for option in options]
    if all(is_labelled(option, letter) for letter, option in zip("ABCD", options)):
        options = [option[2:].strip() for option in options]
    return {"question": with_options(fields["question"].strip(), options), "gold": letter_of(fields["gold"], options, row)}


def is_labelled(line, letter):
    """Is a line marked as that option? One alone proves nothing: C. difficile is no option C."""
    return re.match(rf"\s*{letter}[.):-]\s", line, re.IGNORECASE)


def with_options(question, options):
    """The question, its options under it unless it lists them, and what is asked for: the agents of the paper read it so."""
    lines, letters = question.splitlines(), "ABCD"[:len(options)]
    if question and not all(any(is_labelled(line, letter) for line in lines) for letter in letters):
        question = "\n".join([question, *(f"{letter}. {option}" for letter, option in zip(letters, options))])
    asked = not question or "choose the correct option" in question.lower()
    return question if asked else question + "\n\nChoose the correct option (A/B/C/D)."


def letter_of(answer, options, row):
    """An answer given as a letter, as the text of an option, or as both -> its letter."""
    letters, said, words = "ABCD"[:len(options) or 4], re.sub("[().:]", "", answer).upper(), answer.split()
    meant = {letter for letter, option in zip(letters, options or letters)
             if said == letter or words in (option.split(), [letter + ".", *option.split()])}
    if answer and len(meant) != 1:
        raise InputError(f"{row}: the answer {answer[:60]!r} is not the letter or the text of just one of {options}")
    return "".join(meant) if answer else ""


def read_gpqa(row, seed):
    """Options in an order that hangs on seed and question alone: the released runner's for the same seed."""
    question, answers = row.text("Question").strip(), ["Correct Answer", *(f"Incorrect Answer {n}" for n in (1, 2, 3))]
    order = [0, 1, 2, 3]
    random.Random(int(hashlib.md5(f"{seed}::{question}".encode()).hexdigest()[:16], 16)).shuffle(order)
    options = [row.text(answers[i]).strip() for i in order]
    return {"question": with_options(question, options), "gold": "ABCD"[order.index(0)] if all(options) else ""}


def read_code(row, seed):
    return {"question": row.text("question"), "gold": str(row.get("answer", "") or ""),
            "tests": row.cell("tests"), "fn_name": row.get("fn_name", "")}


def read_mbppplus(row, seed):
    """The function asked for is the one of the right program that the tests call."""
    question, code, tests = row.text("prompt").strip(), row.text("code"), row.cell("test_list")
    defined = re.findall(r"^def\s+(\w+)", code, re.MULTILINE)
    called = [None, *(name for name in defined if re.search(rf"\b{name}\s*\(", "\n".join(tests)))]
    shown = "\n".join(["\n\nYour solution should satisfy assertions like:", *tests[:3]])
    return {"question": question and question + shown, "gold": code, "tests": row.text("test"), "fn_name": called[-1]}


def read_livecodebench(row, seed):
    """Tests stay in the file until they are asked for: of all questions together they are gigabytes."""
    if row.offset is None:
        raise InputError(f"{row}: livecodebench is read from .jsonl files only, for its tests are looked up there")
    question, starter = row.text("question_content").strip(), row.text("starter_code")
    name = from_json(row.get("metadata", None) or "{}", f"{row}: metadata").get("func_name")
    return {"question": f"{question}\n\nStarter code:\n{starter}" if question and starter else question, "gold": "",
            "tests": partial(livecodebench_tests, row.file, row.offset), "fn_name": name or (None if starter else "")}


def livecodebench_tests(file, offset):
    """The public and the private tests of the row whose line begins there."""
    try:
        with open(file, "rb") as lines:
            lines.seek(offset)
            row = json.loads(lines.readline())
        private = row["private_test_cases"] or "[]"
        if not private.lstrip().startswith("["):  # not JSON, but a pickled string of it
            private = PlainUnpickler(io.BytesIO(zlib.decompress(base64.b64decode(private)))).load()
        return json.loads(row["public_test_cases"]) + json.loads(private)
    except Exception as e:  # a pickle can raise anything
        raise InputError(f"{file}: tests at byte {offset} cannot be read ({type(e).__name__}: {e}): fetch it again") from e


class PlainUnpickler(pickle.Unpickler):
    """An unpickler that finds no class and no function, so that none can be called."""

    def find_class(self, module, name):
        raise pickle.UnpicklingError(f"it asks for {module}.{name}, expected a string")


READ = {"math": read_plain, "choice": read_choice, "code": read_code,
        "gpqa": read_gpqa, "mbppplus": read_mbppplus, "livecodebench": read_livecodebench}  # by task, or by data set
