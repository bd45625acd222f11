"""Questions with their answers: the benchmarks of the paper by name, and any local file of rows (runs/formats.py).

    load_dataset("math500")
    load_dataset("medqa", file="medqa.json")
    load_dataset("mine.csv", columns={"question": "problem", "answer": "solution"})

A row becomes a question as in the released loaders (RecursiveMAS/RecursiveMAS 1b76e32), so agents read the same text:
options follow the question, three tests follow an MBPP+ prompt, and starter code follows a LiveCodeBench one.

benchmarks.json says for each benchmark

    repository       where it is on the hub, with `files` and their `revision`, or else the `config` and `split` of the
                     hub's Parquet export
    columns          its names for our columns
    questions        how many there are, as the paper counts them if it has the benchmark
    paper, released  the settings of the paper (gsm8k and humaneval are not in it and have our own: greedy, and short),
                     and where the released runner differs, if it has the benchmark
"""

import ast
import hashlib
import json
import random
import re
import textwrap
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from ..common import InputError, check_known, check_type, check_whole, local_path, warn
from ..prompts import TASKS
from ..runs.formats import SUFFIXES
from ..runs.rows import (
    COLUMNS,
    Row,
    check_columns,
    checked_rows,
    downloaded,
    file_rows,
    is_file_name,
    numbered,
    parquet_rows,
    text_of,
)
from ..tiny.task import questions as chains
from .cases import digest_of, livecodebench_tests, tests_of
from .choices import LETTERS, Numbering, read_choice, with_options
from .run_tests import Test, why_void

BENCHMARKS = json.loads(Path(__file__).with_name("benchmarks.json").read_text(encoding="utf-8"))
ROWS = "rows"  # what messages call a data set that was given as rows

# Of an Example, from its row: question, gold, and for code tests, fn_name and head
Fields = dict[str, Any]

# The beginning of a program up to its last import from __future__, which nothing else may precede: blanks, comments,
# texts such as a docstring, and such imports.
FUTURE = re.compile(
    r"""\A(?:
        (?: \s | ; | \\\n | \#.*
          | [rRuU]?(?: \"{3}(?:[^\\]|\\[\s\S])*?\"{3} | '{3}(?:[^\\]|\\[\s\S])*?'{3}
                     | "(?:[^"\\\n]|\\[\s\S])*" | '(?:[^'\\\n]|\\[\s\S])*' )
        )*+
        from\s+__future__\s+import\s+(?: \([^)]*\) | (?:[\w\t ,]|\\\n)+ )[\t ;]*
    )++""",
    re.VERBOSE,
)


@dataclass(frozen=True)
class Example:
    """A question and what its answer is judged by."""

    id: str  # unique in the data set
    question: str
    gold: str  # the answer; for choice its letter; for code a correct program, "" if the data set has none
    task: str  # math, choice or code; search questions are asked as math ones
    # for code, as run_tests.passes takes them, or a function that reads them
    tests: list[Test] | Callable[[], list[Test]] | None = None
    fn_name: str | None = ""  # for code, as in prompts.Question
    head: str = ""  # for code, the beginning of the program, if that is the question: an answer repeats it or goes on
    dataset: str = ""  # that it is from, by the name that load_dataset was given

    def program(self, answer: str) -> str:
        """The whole program that an answer to a code question is. Without the head it is the body of the function."""
        answer = answer.removeprefix("\ufeff")
        future = FUTURE.match(answer) if self.head else None
        beginning = ""
        if future:
            beginning = future[0] + "\n"
            answer = answer[future.end() :]
        repeats = rf"^\s*(async\s+)?def\s+{self.fn_name}\b|^{self.fn_name}\s*="
        if self.head and not re.search(repeats, answer, re.MULTILINE):
            answer = textwrap.indent(textwrap.dedent(answer), "    ")
        return beginning + self.head + answer


def load_dataset(
    name: str | Path | Iterable[Mapping[str, Any]],
    file: str | Path | None = None,
    columns: Mapping[str, str] | None = None,
    task: str | None = None,
    limit: int | None = None,
    seed: int = 42,
    warn: Callable[[str], object] = warn,
) -> list[Example]:
    """The Examples of a benchmark (a name in BENCHMARKS), of a local file, or of rows that are dicts, in their order.

    file     a local copy of the benchmark, instead of the hub; medqa has no other source
    columns  {one of COLUMNS: its name in the file}; options, id and fn_name need not be there
    task     of a local file or of rows: math (None, too), choice or code; a benchmark has its own
    limit    read the first `limit` rows only
    seed     of the order of GPQA's options
    warn     is called with a warning if rows are left out, or if the benchmark is not of the paper's size
    Raises InputError if a name is not known, a column or a file is missing or damaged, or the hub cannot be reached.
    """
    check_source(file, columns)
    if limit is not None:
        check_whole("limit", limit, 1)
    check_known("column", columns or (), COLUMNS)
    columns = dict(columns or {})
    all_rows: Callable[[], Iterator[Row]]
    if isinstance(name, (str, Path)):
        name = str(name)  # records hold it
        benchmark = benchmark_named(name, task)
        if file and name not in BENCHMARKS:
            raise InputError(
                f"data set {name} is a file already, beside file {file}: give one of them"
            )
        all_rows = partial(rows_of, name, benchmark, file, columns)
    else:
        rows = rows_given(name, file)
        name = ""  # Examples that are in no data set
        check_known("task", [task or "math"], TASKS)
        benchmark = {"task": task or "math"}
        all_rows = partial(numbered, rows, ROWS, columns)
    read = reader_of(name, benchmark["task"], seed, all_rows)
    examples, left_out = examples_of(islice(all_rows(), limit), name, benchmark["task"], read)
    if left_out:
        warn(
            f"{len(left_out)} of {len(examples) + len(left_out)} rows left out, without a question or an answer to "
            f"judge by; the first is {left_out[0]}"
        )
    if not examples:
        raise InputError(
            f"{file or name or ROWS} holds no question with an answer: give another file, other rows or other columns"
        )
    expected = benchmark.get("questions", len(examples))
    if limit is None and len(examples) != expected:
        warn(
            f"{name} has {len(examples)} questions here, {expected} in the benchmark: results do not compare"
        )
    return examples


def check_source(file: str | Path | None, columns: Mapping[str, str] | None) -> None:
    """InputError if what a data set is read from is of another type than load_dataset says."""
    check_type("file", file, str | Path | None, "a file's name or path")
    check_columns(columns)


def rows_given(rows: object, file: str | Path | None) -> list[dict[str, Any]]:
    """The rows that were given in place of a name; InputError if they are none, or a file is given, too."""
    if not isinstance(rows, Iterable) or isinstance(rows, Mapping):
        raise InputError(
            f"the data set is {rows!r:.80}, expected the name of a benchmark or a file, or a list of dicts"
        )
    if file:
        raise InputError(f"rows are given beside file {file}: give one of them")
    return list(checked_rows(rows, ROWS, "a dict with question and answer"))


def benchmark_named(name: str, task: str | None) -> dict[str, Any]:
    """The entry of a benchmark in benchmarks.json; for a local file only its task. InputError if it is neither."""
    if name in BENCHMARKS:
        if task is not None:
            raise InputError(
                f"task {task} is given, but {name} has its own, {BENCHMARKS[name]['task']}: leave it out"
            )
        return BENCHMARKS[name]
    task = task or "math"
    if task not in TASKS or not is_file_name(name):
        raise InputError(
            f"data set {name!r} for task {task!r} is not known: expected one of {', '.join(BENCHMARKS)}, "
            f"or a file {', '.join(SUFFIXES)}; and one of the tasks {', '.join(TASKS)}"
        )
    return {"task": task}


def reader_of(
    name: str, task: str, seed: int, all_rows: Callable[[], Iterator[Row]]
) -> Callable[[Row], Fields]:
    """The function that makes the fields of an Example of a row."""
    own: dict[str, Callable[[Row], Fields]] = {
        "gpqa": partial(read_gpqa, seed=seed),
        "gsm8k": read_gsm8k,
        "mbppplus": read_mbppplus,
        "livecodebench": read_livecodebench,
    }
    by_task: dict[str, Callable[[Row], Fields]] = {
        "math": read_plain,
        "choice": partial(read_choice, numbering=Numbering(all_rows)),
        "code": read_code,
    }
    return own.get(name) or by_task[task]


def examples_of(
    rows: Iterable[Row], name: str, task: str, read: Callable[[Row], Fields]
) -> tuple[list[Example], list[str]]:
    """(the Examples of a data set's rows, the places of rows that were left out: without a question, or anything to
    judge by).
    """
    examples = []
    left_out = []
    ids: set[str] = set()
    for number, row in enumerate(rows, 1):
        fields = read(row)
        own_id = row.text("id", required=False)
        judged_by = fields["tests"] if task == "code" else fields["gold"]
        if not fields["question"] or not judged_by:
            left_out.append(str(row))
            continue
        new_id = unique_id(own_id, number, ids)
        ids |= {new_id, f"row {number}"}
        examples.append(Example(new_id, task=task, dataset=name, **fields))
    return examples, left_out


def unique_id(own_id: str, number: int, taken: set[str]) -> str:
    """The id of row `number`: its own, or its number if it has none or another row has it."""
    if own_id and own_id not in taken:
        return own_id
    new_id = f"row {number}"
    repeat = 1
    while new_id in taken:  # it is the id of an earlier row
        repeat += 1
        new_id = f"row {number} ({repeat})"
    return new_id


def settings_for(
    name: str, style: str, protocol: str = "paper", task: str | None = None
) -> dict[str, Any]:
    """The settings of a benchmark for a style: {"grader": ..., "rollouts": ..., other fields of settings.Settings}.

    rounds, latent_steps and channel are lists of the values to measure.
    protocol  paper, or released, which adds the released runner's latent_steps and batch_size for sequential styles;
              it has math500, gpqa, medqa and mbppplus only (its seed is 42, the default here)
    name      "" stands for questions of no data set
    task      of a local file (None: math), for which there is only the grader of its task
    A grader is math, choice, text or code, or `released`, the released rule for math500.
    Raises InputError if the name or the protocol is not known.
    """
    benchmark: dict[str, Any] = benchmark_named(name, task) if name else {"task": task or "math"}
    if protocol != "paper" and not (protocol == "released" and "released" in benchmark):
        having = ", ".join(other for other in BENCHMARKS if "released" in BENCHMARKS[other])
        raise InputError(
            f"{name or 'this data set'} has no {protocol} settings: expected paper; released for {having}"
        )
    settings = {"grader": benchmark["task"], "rollouts": 1}
    for source in "paper", protocol:
        for styles in "every style", style:
            settings |= benchmark.get(source, {}).get(styles, {})
    return settings


def rows_of(
    name: str, benchmark: dict[str, Any], file: str | Path | None, columns: dict[str, str]
) -> Iterator[Row]:
    """The Rows of local files, of files on the hub, or of its Parquet export, each read only when it is asked for."""
    columns = benchmark.get("columns", {}) | columns
    if file or name not in BENCHMARKS:
        return local_rows(local_path(file or name), benchmark.get("files", []), columns)
    if "files" in benchmark:
        return hub_rows(benchmark, columns)
    if name == "medqa":
        raise InputError(
            "medqa is not on the hub: give it as a local file, such as dataset/medqa.json of the release"
        )
    if name == "tiny":
        return numbered(tiny_rows(), name, columns)
    repository = benchmark["repository"]
    rows = parquet_rows(repository, benchmark["config"], benchmark["split"])
    return numbered(rows, repository, columns)


def local_rows(path: Path, names: list[str], columns: dict[str, str]) -> Iterator[Row]:
    """Rows of a file, of the only data file in a folder, or of a folder with all files of a benchmark."""
    files = [path / name for name in names]
    if not files or not all(file.is_file() for file in files):
        files = [path]
    for file in files:
        yield from file_rows(file, columns)


def hub_rows(benchmark: dict[str, Any], columns: dict[str, str]) -> Iterator[Row]:
    """Rows of files on the hub, each fetched when its first row is asked for."""
    for name in benchmark["files"]:
        folder = downloaded(benchmark["repository"], name, benchmark.get("revision"))
        yield from file_rows(folder / name, columns)


def tiny_rows() -> Iterator[dict[str, Any]]:
    """Every other chain of those that the README's table of accuracy was measured on, the eight lengths in turn."""
    test = chains("test", 150)  # 150 of each length, the shortest first
    for i in range(0, 150, 2):
        for chain in test[i::150]:
            yield {"question": chain.question, "answer": chain.answer}


# From a row to the fields of an Example; choices.py reads those with options


def read_plain(row: Row) -> Fields:
    """A question and its answer, as they stand in the row."""
    return {"question": row.text("question"), "gold": row.text("answer").strip()}


def read_gpqa(row: Row, seed: int) -> Fields:
    """The order of the options depends on the seed and the question only; for a seed it is the released runner's."""
    question = row.text("question").strip()
    names = ["answer", "Incorrect Answer 1", "Incorrect Answer 2", "Incorrect Answer 3"]
    digest = hashlib.md5(f"{seed}::{question}".encode()).hexdigest()
    random.Random(int(digest[:16], 16)).shuffle(names)
    options = [row.text(name).strip() for name in names]
    letter = LETTERS[names.index("answer")]
    return {"question": with_options(question, options), "gold": letter if all(options) else ""}


def read_gsm8k(row: Row) -> Fields:
    """The answer is the number after the solution."""
    solution = row.text("answer")
    return {"question": row.text("question"), "gold": solution.rpartition("####")[2].strip()}


def read_code(row: Row) -> Fields:
    """A code question of a local file, or of HumanEval, whose question is the head of the function asked for."""
    question = row.text("question")
    gold = row.text("answer", required=False)
    tests, fn_name = tests_of(tests_with_setup(row), row.text("fn_name", required=False), str(row))
    head = question.rstrip() + "\n" if is_head(question, fn_name) else ""
    return {
        "question": question,
        "gold": head + gold if gold else "",
        "tests": tests,
        "fn_name": fn_name,
        "head": head,
    }


def tests_with_setup(row: Row) -> Any:
    """The cell of tests; a list of asserts as MBPP has them, after the imports and the code that prepare them."""
    tests = row.value("tests")
    if not isinstance(tests, list) or not tests:
        return tests
    for name in "test_setup_code", "test_imports":
        first = row.value(name, required=False)
        if first:
            tests = [*([first] if isinstance(first, str) else first), *tests]
    return tests


def is_head(question: str, fn_name: str) -> bool:
    """Whether a question is a Python program that defines this function."""
    if not fn_name:
        return False
    try:
        with warnings.catch_warnings(action="ignore"):  # of a \\d in its text
            body = ast.parse(question).body
    except (SyntaxError, ValueError, MemoryError, RecursionError):
        return False
    return any(isinstance(node, ast.FunctionDef) and node.name == fn_name for node in body)


def read_mbppplus(row: Row) -> Fields:
    """The function asked for is the last one of the correct program that the tests call."""
    question = row.text("question").strip()
    code = row.text("answer")
    tests = row.value("test_list") or []
    if not isinstance(tests, list) or not all(isinstance(test, str) for test in tests):
        raise InputError(f"{row}: test_list is {str(tests)[:60]!r}, expected a list of asserts")
    defined = re.findall(r"^def\s+(\w+)", code, re.MULTILINE)
    asserts = "\n".join(tests)
    called = [name for name in defined if re.search(rf"\b{name}\s*\(", asserts)]
    if question:
        intro = question + "\n\nYour solution should satisfy assertions like:"
        question = "\n".join([intro, *tests[:3]])
    script = row.text("tests")
    return {
        "question": question,
        "gold": code,
        "tests": [script] if script else [],
        "fn_name": called[-1] if called else None,
    }


def read_livecodebench(row: Row) -> Fields:
    """The tests stay in the file until they are needed, because those of all questions are gigabytes."""
    if row.offset is None:
        raise InputError(
            f"{row}: livecodebench is read from .jsonl files only, not compressed, because its tests are looked "
            "up there: give its files as they are on the hub"
        )
    question = row.text("question").strip()
    starter = row.text("starter_code")
    metadata = row.value("metadata", required=False)
    public = row.value("public_test_cases")
    if metadata != "" and not isinstance(metadata, dict):
        raise InputError(f"{row}: metadata are {str(metadata)[:60]!r}, expected an object")
    name = text_of((metadata or {}).get("func_name"), f"{row}: func_name")
    read_tests = partial(
        livecodebench_tests, Path(row.file), row.offset, digest=digest_of(row.cells)
    )
    tests: Callable[[], list[Test]] | None = read_tests
    can_fail = any(
        isinstance(test, dict) and (name or str(test.get("output")).strip()) for test in public
    )
    if not can_fail and why_void(read_tests(), name):  # only here are they read at once
        tests = None
    if question and starter:
        question = f"{question}\n\nStarter code:\n{starter}"
    return {
        "question": question,
        "gold": "",
        "tests": tests,
        "fn_name": name or (None if starter else ""),
    }
