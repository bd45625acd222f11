"""Grading of code: a program is correct if it passes all its tests, each of which runs in the sandbox."""

import json
import os
import re
import secrets
from collections.abc import Sequence
from concurrent.futures import as_completed
from decimal import Decimal, InvalidOperation
from pathlib import Path
from typing import Any, Protocol, TypeAlias

from tqdm import tqdm

from ..common import InputError
from ..runs.processes import sharing_this_machine
from ..sandbox.python import Programs

HARNESS = Path(__file__).with_name("harness.py").read_text(encoding="utf-8")

# A script; or (stdin, stdout) or (arguments, result), and more right outputs
Test: TypeAlias = str | tuple[str, ...]


class CodeQuestion(Protocol):
    """What of a benchmarks.Example is needed to check its tests."""

    @property
    def id(self) -> str: ...
    @property
    def tests(self) -> Any: ...  # Tests, or a function that reads them
    @property
    def fn_name(self) -> str | None: ...


def tests_at_once() -> int:
    """How many tests run at once: the CPUs that this process may use, shared with the other ranks on this machine."""
    cpus = os.cpu_count() or 1
    if hasattr(os, "sched_getaffinity"):
        cpus = len(os.sched_getaffinity(0))
    return max(1, cpus // sharing_this_machine())


def passes(
    program: str, tests: Sequence[Test], fn_name: str | None = "", seconds: int = 10
) -> bool:
    """Whether a Python program passes all its tests, which run in parallel, one on each CPU, until one of them fails.

    A test is a script (a str) that runs after the program, or a case: (stdin, stdout) of the program, or with `fn_name`
    (arguments, result) of that function or method of a class Solution, in JSON, one argument a line. Any further items
    of a case are right, too. Each test has its own `seconds`. Raises InputError if there are no tests.
    """
    if not tests:
        raise InputError(
            "a code question has no tests, so that its answer cannot be graded: leave the question out"
        )
    with Programs(tests_at_once()) as programs:
        runs = [
            programs.submit(passes_one, programs, program, test, fn_name or "", seconds)
            for test in tests
        ]
        return all(run.result() for run in as_completed(runs))


def passes_one(programs: Programs, program: str, test: Test, fn_name: str, seconds: int) -> bool:
    """Whether a program passes one test.

    A random mark is printed after the last line of a script or the return of a function, so that a program that merely
    exits early does not pass. That does not stop cheating: a program could read the mark from its own file.
    """
    mark = secrets.token_hex(16)
    task = {"program": program, "fn_name": fn_name, "mark": mark}
    if isinstance(test, str):
        task |= {"kind": "script", "test": test}
        output, ending = run_harness(programs, task, seconds)
        return ending == "" and output.endswith(mark)
    given, *expected = test
    if not fn_name:
        task |= {"kind": "program"}
        output, ending = run_harness(programs, task, seconds, stdin=given)
        return ending == "" and any(same_output(output, text) for text in expected)
    task |= {"kind": "function", "arguments": given}
    output, ending = run_harness(programs, task, seconds)
    if ending:
        return False
    try:
        return from_json(output.rpartition(mark)[2]) in map(from_json, expected)
    except (ValueError, RecursionError):  # a result may be nested thousands deep
        return False


def run_harness(
    programs: Programs, task: dict[str, Any], seconds: int = 10, stdin: str = ""
) -> tuple[str, str]:
    """Do a task, as harness.py describes it; returns (all that was printed, "" if it ended well, else how it ended)."""
    files = {"task.json": json.dumps(task), "answer.py": task.get("program", "")}
    return programs.run(HARNESS, seconds, stdin=stdin, files=files)


def check_tests(examples: Sequence[CodeQuestion], progress: bool = True) -> None:
    """InputError if tests of code questions prove nothing. Tests that are read later are their reader's to judge.

    progress   show a bar on stderr
    """
    with Programs(tests_at_once()) as programs:
        runs = [programs.submit(why_void_in, programs, example) for example in examples]
        bar = tqdm(runs, "checking tests", leave=False, disable=not progress)
        reasons = [run.result() for run in bar]
    void = [
        f"{example.id}: {reason}"
        for example, reason in zip(examples, reasons, strict=True)
        if reason
    ]
    if void:
        raise InputError(
            f"the tests of {len(void)} of {len(examples)} questions prove nothing, or cannot be run; the first "
            f"is {void[0]}; correct these tests, or leave the questions out"
        )


def why_void_in(programs: Programs, example: CodeQuestion) -> str:
    """Why the tests of an Example prove nothing, or "" if they do, or are not read yet."""
    if callable(example.tests):
        return ""
    return why_void(example.tests or (), example.fn_name, programs)


def why_void(tests: Sequence[Test], fn_name: str | None, programs: Programs | None = None) -> str:
    """Why tests prove nothing: what cannot be run, or which wrong programs pass them all; "" if one of them can fail.

    programs   in one of whose threads this is called; without it, scripts run in a thread of their own
    """
    reason = "there are none"
    for test in tests:
        if not isinstance(test, str):
            silent = not fn_name and any(same_output("", text) for text in test[1:])
            reason = "a program that prints nothing passes" if silent else ""
        elif programs is not None:
            reason = why_script_void(programs, test, fn_name or "")
        else:
            with Programs(1) as own:
                reason = own.submit(why_script_void, own, test, fn_name or "").result()
        if not reason:
            return ""
    return reason


def why_script_void(programs: Programs, script: str, fn_name: str) -> str:
    """Why a script of tests proves nothing, or "" if it can fail."""
    mark = secrets.token_hex(16)
    words = sorted({fn_name, *re.findall(r"[^\W\d]\w*", script)})
    task = {"kind": "check", "test": script, "fn_name": fn_name, "words": words, "mark": mark}
    output, _ = run_harness(programs, task)
    _, found, reason = output.rpartition(mark)
    if not found:
        return ""
    return reason or "a program that does nothing passes"


def from_json(text: str) -> Any:
    """A JSON value whose integers are Decimals, because Python refuses to read an int of more than 4,300 digits."""
    return json.loads(text, parse_int=Decimal)


def same_output(printed: str, expected: str) -> bool:
    """Whether two outputs have the same lines, apart from blanks around them and the spelling of numbers."""
    printed_lines = printed.strip().split("\n")
    expected_lines = expected.strip().split("\n")
    return len(printed_lines) == len(expected_lines) and all(
        map(same_line, printed_lines, expected_lines)
    )


def same_line(printed: str, expected: str) -> bool:
    """Whether two lines are the same text but for blanks around them, or hold the same decimal numbers."""
    printed = printed.strip()
    expected = expected.strip()
    if printed == expected:
        return True
    if "_" in printed + expected:  # Decimal would skip it
        return False
    try:
        return [*map(Decimal, printed.split())] == [*map(Decimal, expected.split())]
    # A word is not a number; or a signalling NaN, which cannot be compared
    except InvalidOperation:
        return False
