"""Questions with their answers: the benchmarks of the paper by name, and any local .json, .jsonl or .csv file.

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
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path

from ..common import InputError, check_known, warn
from ..prompts import TASKS
from ..tiny.task import questions as chains
from .cases import digest_of, livecodebench_tests, tests_of
from .rows import FILE_READERS, Row, downloaded, file_rows, parquet_rows, text_of
from .run_tests import why_void

BENCHMARKS = json.loads(Path(__file__).with_name("benchmarks.json").read_text(encoding="utf-8"))
COLUMNS = ("question", "answer", "options", "id", "tests", "fn_name")  # of a local file

# The beginning of a program up to its last import from __future__, which nothing else may precede: blanks, comments,
# texts such as a docstring, and such imports.
FUTURE = re.compile(
    r"""\A(?:(?:\s|;|\\\n|\#.*|\"{3}[\s\S]*?\"{3}|'{3}[\s\S]*?'{3}|"[^"\n]*"|'[^'\n]*')*+"""
    r"""from\s+__future__\s+import\s+(?:\([^)]*\)|(?:[\w\t ,]|\\\n)+)[\t ;]*)++"""
)


@dataclass(frozen=True)
class Example:
    """A question and what its answer is judged by."""

    id: str  # unique in the data set
    question: str
    gold: str  # the answer; for choice its letter; for code a correct program, "" if the data set has none
    task: str  # math, choice or code; search questions are asked as math ones
    tests: list | partial | None = (
        None  # for code, as run_tests.passes takes them, or a function that reads them
    )
    fn_name: str | None = ""  # for code, as in prompts.Question
    head: str = ""  # for code, the beginning of the program, if that is the question: an answer repeats it or goes on

    def program(self, answer: str) -> str:
        """The whole program that an answer to a code question is. Without the head it is the body of the function."""
        answer = answer.removeprefix("\ufeff")
        beginning = ""
        if self.head and (found := FUTURE.match(answer)):
            beginning = found[0] + "\n"
            answer = answer[found.end() :]
        if self.head and not re.search(
            rf"^\s*(async\s+)?def\s+{self.fn_name}\b|^{self.fn_name}\s*=", answer, re.MULTILINE
        ):
            answer = textwrap.indent(textwrap.dedent(answer), "    ")
        return beginning + self.head + answer


def load_dataset(name, file=None, columns=None, task=None, limit=None, seed=42, tell=warn):
    """The Examples of a benchmark (a name in BENCHMARKS) or of a local file, in their order.

    file     a local copy of the benchmark, instead of the hub; medqa has no other source
    columns  {one of COLUMNS: its name in the file}; a row's options are a list; options, id and fn_name are optional
    task     of a local file: math (None, too), choice or code; a benchmark has its own
    limit    read the first `limit` rows only
    seed     of the order of GPQA's options
    tell     is called with a sentence if rows are left out, or if the benchmark is not of the paper's size
    Raises InputError if a name is not known, a column or a file is missing or damaged, or the hub cannot be reached.
    """
    benchmark = benchmark_named(name, task)
    if limit is not None and limit < 1:
        raise InputError(f"limit is {limit}, expected a number from 1 up")
    if file and name not in BENCHMARKS:
        raise InputError(f"data set {name} is a file already, beside file {file}: give one of them")
    check_known("column", columns or (), COLUMNS)
    rows = islice(rows_of(name, benchmark, file, columns or {}), limit)
    readers = {
        "math": read_plain,
        "choice": read_choice,
        "code": read_code,
        "gpqa": partial(read_gpqa, seed=seed),
        "gsm8k": read_gsm8k,
        "mbppplus": read_mbppplus,
        "livecodebench": read_livecodebench,
    }
    examples, left_out = examples_of(
        rows, benchmark["task"], readers.get(name) or readers[benchmark["task"]]
    )
    if left_out:
        tell(
            f"{len(left_out)} of {len(examples) + len(left_out)} rows left out, without a question or an answer to "
            f"judge by; the first is {left_out[0]}"
        )
    if not examples:
        raise InputError(
            f"{file or name} holds no question with an answer: give another file, or other columns"
        )
    if limit is None and len(examples) != benchmark.get("questions", len(examples)):
        tell(
            f"{name} has {len(examples)} questions here, {benchmark['questions']} in the benchmark: results do not compare"
        )
    return examples


def benchmark_named(name, task):
    """The entry of a benchmark in benchmarks.json; for a local file only its task. InputError if it is neither."""
    if name in BENCHMARKS:
        if task is not None:
            raise InputError(
                f"task {task} is given, but {name} has its own, {BENCHMARKS[name]['task']}: leave it out"
            )
        return BENCHMARKS[name]
    task = task or "math"
    if task not in TASKS or Path(name).suffix not in FILE_READERS:
        raise InputError(
            f"data set {name!r} for task {task!r} is not known: expected one of {', '.join(BENCHMARKS)}, "
            f"or a file {', '.join(FILE_READERS)}; and one of the tasks {', '.join(TASKS)}"
        )
    return {"task": task}


def examples_of(rows, task, read):
    """(the Examples of rows, the places of rows that were left out: without a question, or anything to judge by)."""
    examples, left_out, ids = [], [], {""}
    for n, row in enumerate(rows, 1):
        fields, own_id = read(row), row.text("id", required=False)
        if not fields["question"] or not fields["tests" if task == "code" else "gold"]:
            left_out.append(str(row))
            continue
        examples.append(Example(f"row {n}" if own_id in ids else own_id, task=task, **fields))
        ids |= {own_id, f"row {n}"}
    return examples, left_out


def settings_for(name, style, protocol="paper", task=None):
    """The settings of a benchmark for a style: {"grader": ..., "rollouts": ..., other fields of styles.Settings}.

    rounds, latent_steps and channel are lists of the values to measure.
    protocol  paper, or released, which adds the released runner's latent_steps and batch_size for sequential styles;
              it has math500, gpqa, medqa and mbppplus only (its seed is 42, the default here)
    task      of a local file (None: math), for which there is only the grader of its task
    A grader is math, choice, text or code, or `released`, the released rule for math500.
    Raises InputError if the name or the protocol is not known.
    """
    benchmark = benchmark_named(name, task)
    if (
        protocol not in ("paper", "released")
        or protocol == "released"
        and "released" not in benchmark
    ):
        having = ", ".join(other for other in BENCHMARKS if "released" in BENCHMARKS[other])
        raise InputError(
            f"{name} has no {protocol} settings: expected paper; released for {having}"
        )
    settings = {"grader": benchmark["task"], "rollouts": 1}
    for source in "paper", protocol:
        for styles in "every style", style:
            settings |= benchmark.get(source, {}).get(styles, {})
    return settings


def rows_of(name, benchmark, file, columns):
    """The Rows of a local file, of files on the hub, or of its Parquet export, each read only when it is asked for."""
    columns, repository = benchmark.get("columns", {}) | columns, benchmark.get("repository", name)
    if file or name not in BENCHMARKS:
        return file_rows(Path(file or name).expanduser(), columns)
    if "files" in benchmark:
        return (
            row
            for name in benchmark["files"]
            for row in file_rows(
                downloaded(repository, name, benchmark.get("revision")) / name, columns
            )
        )
    if name == "medqa":
        raise InputError(
            "medqa is not on the hub: give it as a local file, such as dataset/medqa.json of the release"
        )
    rows = (
        tiny_rows()
        if name == "tiny"
        else parquet_rows(repository, benchmark["config"], benchmark["split"])
    )
    return (Row(cells, repository, n, columns) for n, cells in enumerate(rows, 1))


def tiny_rows():
    """Every other chain of those that the README's table of accuracy was measured on, the eight lengths in turn."""
    test = chains("test", 150)  # 150 of each length, the shortest first
    return (
        {"question": chain.question, "answer": chain.answer}
        for i in range(0, 150, 2)
        for chain in test[i::150]
    )


# From a row to the fields of an Example: question, gold, and for code tests and fn_name


def read_plain(row):
    return {"question": row.text("question"), "gold": row.text("answer").strip()}


def read_choice(row):
    """A question with options: from a column of lists, with or without their letters, or in the question already."""
    fields, options = read_plain(row), row.value("options", required=False) or []
    if not isinstance(options, list) or len(options) not in (0, 2, 3, 4):
        raise InputError(f"{row}: options are {str(options)[:60]!r}, expected a list of 2 to 4")
    options = [text_of(option, f"{row}: an option").strip() for option in options]
    if all(is_labelled(option, letter) for letter, option in zip("ABCD", options)):
        options = [option[2:].strip() for option in options]
    question, gold = fields["question"].strip(), fields["gold"] if all(options) else ""
    return {"question": with_options(question, options), "gold": letter_of(gold, options, row)}


def is_labelled(line, letter):
    """Whether a line begins with this letter as a label. One such line proves nothing: C. difficile is not option C."""
    return re.match(rf"\s*{letter}[.):-]\s", line, re.IGNORECASE)


def with_options(question, options):
    """The question, then its options unless it lists them itself, then the paper's request for a letter."""
    lines, letters = question.splitlines(), "ABCD"[: len(options)]
    if question and not all(any(is_labelled(line, letter) for line in lines) for letter in letters):
        question = "\n".join(
            [question, *(f"{letter}. {option}" for letter, option in zip(letters, options))]
        )
    asked = not question or "choose the correct option" in question.lower()
    return question if asked else question + "\n\nChoose the correct option (A/B/C/D)."


def letter_of(answer, options, row):
    """The letter of an answer that is a letter, the text of an option, or both; InputError if it is not just one."""
    letters, bare, words = (
        "ABCD"[: len(options) or 4],
        re.sub("[().:]", "", answer).upper(),
        answer.split(),
    )
    meant = {
        letter
        for letter, option in zip(letters, options or letters)
        if bare == letter or words in (option.split(), [letter + ".", *option.split()])
    }
    if answer and len(meant) != 1:
        raise InputError(
            f"{row}: the answer {answer[:60]!r} is not the letter or the text of just one of {options}"
        )
    return "".join(meant) if answer else ""


def read_gpqa(row, seed):
    """The order of the options depends on the seed and the question only; for a seed it is the released runner's."""
    question = row.text("Question").strip()
    names = ["Correct Answer", "Incorrect Answer 1", "Incorrect Answer 2", "Incorrect Answer 3"]
    random.Random(int(hashlib.md5(f"{seed}::{question}".encode()).hexdigest()[:16], 16)).shuffle(
        names
    )
    options, gold = (
        [row.text(name).strip() for name in names],
        "ABCD"[names.index("Correct Answer")],
    )
    return {"question": with_options(question, options), "gold": gold if all(options) else ""}


def read_gsm8k(row):
    """The answer is the number after the solution."""
    return {
        "question": row.text("question"),
        "gold": row.text("answer").rpartition("####")[2].strip(),
    }


def read_code(row):
    """A code question of a local file, or of HumanEval, whose question is the head of the function that is asked for."""
    question, gold, tests = (
        row.text("question"),
        row.text("answer", required=False),
        row.value("tests"),
    )
    for name in "test_setup_code", "test_imports":  # MBPP's: they precede its tests
        if isinstance(tests, list) and tests and (first := row.value(name, required=False)):
            tests = [*([first] if isinstance(first, str) else first), *tests]
    tests, fn_name = tests_of(tests, row.text("fn_name", required=False), row)
    head = question.rstrip() + "\n" if is_head(question, fn_name) else ""
    return {
        "question": question,
        "gold": gold and head + gold,
        "tests": tests,
        "fn_name": fn_name,
        "head": head,
    }


def is_head(question, fn_name):
    """Whether a question is a Python program that defines this function."""
    try:
        with warnings.catch_warnings(action="ignore"):  # of a \\d in its text
            body = ast.parse(question).body if fn_name else []
    except (SyntaxError, ValueError, MemoryError, RecursionError):
        return False
    return any(isinstance(node, ast.FunctionDef) and node.name == fn_name for node in body)


def read_mbppplus(row):
    """The function asked for is the last one of the correct program that the tests call."""
    question, code, tests = (
        row.text("prompt").strip(),
        row.text("code"),
        row.value("test_list") or [],
    )
    if not isinstance(tests, list) or not all(isinstance(test, str) for test in tests):
        raise InputError(f"{row}: test_list is {str(tests)[:60]!r}, expected a list of asserts")
    defined = re.findall(r"^def\s+(\w+)", code, re.MULTILINE)
    called = [name for name in defined if re.search(rf"\b{name}\s*\(", "\n".join(tests))]
    if question:
        question = "\n".join(
            [question + "\n\nYour solution should satisfy assertions like:", *tests[:3]]
        )
    script = row.text("test")
    return {
        "question": question,
        "gold": code,
        "tests": script and [script],
        "fn_name": called[-1] if called else None,
    }


def read_livecodebench(row):
    """The tests stay in the file until they are needed, because those of all questions are gigabytes."""
    if row.offset is None:
        raise InputError(
            f"{row}: livecodebench is read from .jsonl files only, because its tests are looked up there"
        )
    question, starter = row.text("question_content").strip(), row.text("starter_code")
    metadata, public = row.value("metadata", required=False), row.value("public_test_cases")
    if metadata != "" and not isinstance(metadata, dict):
        raise InputError(f"{row}: metadata are {str(metadata)[:60]!r}, expected an object")
    name = text_of((metadata or {}).get("func_name"), f"{row}: func_name")
    tests = partial(livecodebench_tests, row.file, row.offset, digest=digest_of(row.cells))
    if not any(
        isinstance(test, dict) and (name or str(test.get("output")).strip()) for test in public
    ):
        tests = None if why_void(tests(), name) else tests  # only here are they read at once
    if question and starter:
        question = f"{question}\n\nStarter code:\n{starter}"
    return {
        "question": question,
        "gold": "",
        "tests": tests,
        "fn_name": name or (None if starter else ""),
    }
