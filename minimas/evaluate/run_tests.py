"""Grading of code: a program is correct if it passes all its tests, each of which runs in the sandbox."""

import json
import os
import re
import secrets
from concurrent.futures import ThreadPoolExecutor, as_completed
from decimal import Decimal, InvalidOperation
from pathlib import Path

from tqdm import tqdm

from ..common import InputError
from ..sandbox.python import run_guarded

PROGRAMS = Path(__file__).with_name("programs.txt").read_text(encoding="utf-8")
_, COMMON, MODULE, CALL, SCRIPT, NOTHING, CHECK = re.split(
    r"^\[\w+\]\n", PROGRAMS, flags=re.MULTILINE
)


def tests_at_once():
    """How many tests run at once: the CPUs that this process may use, shared with the other ranks on this machine."""
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cpus // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))


def passes(program, tests, fn_name="", seconds=10):
    """Whether a Python program passes all its tests, which run in parallel, one on each CPU, until one of them fails.

    A test is a script (a str) that runs after the program, or a case: (stdin, stdout) of the program, or with `fn_name`
    (arguments, result) of that function or method of a class Solution, in JSON, one argument a line. Any further items
    of a case are right, too. Each test has its own `seconds`. Raises InputError if there are no tests.
    """
    if not tests:
        raise InputError(
            "a code question has no tests, so that its answer cannot be graded: leave the question out"
        )
    with ThreadPoolExecutor(tests_at_once()) as pool:
        runs = [pool.submit(passes_one, program, test, fn_name, seconds) for test in tests]
        passed = all(run.result() for run in as_completed(runs))
        pool.shutdown(wait=False, cancel_futures=True)
    return passed


def passes_one(program, test, fn_name, seconds):
    """Whether a program passes one test.

    A random mark is printed after the last line of a script or the return of a function, so that a program that merely
    exits early does not pass. That does not stop cheating: a program could read the mark from its own file.
    """
    mark = secrets.token_hex(16)
    if isinstance(test, str):
        output, ending = run_guarded(script_after(program, test, fn_name, mark), seconds)
        return ending == "" and output.endswith(mark)
    given, *expected = test
    if not fn_name:
        code = f"exec({COMMON!r})\nexec(compile({program!r}, 'answer.py', 'exec'))"
        output, ending = run_guarded(code, seconds, stdin=given)
        return ending == "" and any(same_output(output, text) for text in expected)
    code = (MODULE + CALL).format(
        common=COMMON, program=program, fn_name=fn_name, arguments=given, mark=mark
    )
    output, ending = run_guarded(code, seconds)
    try:
        return ending == "" and from_json(output.rpartition(mark)[2]) in map(from_json, expected)
    except (ValueError, RecursionError):  # a result may be nested thousands deep
        return False


def script_after(program, test, fn_name, mark):
    """The code of a script of tests that runs after a program, and prints the mark if the program passes."""
    return (MODULE + SCRIPT).format(
        common=COMMON, program=program, test=test, fn_name=fn_name, mark=mark
    )


def check_tests(examples):
    """InputError if the tests of code questions prove nothing. Tests that are read later are their reader's to judge."""
    with ThreadPoolExecutor(tests_at_once()) as pool:
        runs = pool.map(
            lambda example: (
                "" if callable(example.tests) else why_void(example.tests, example.fn_name)
            ),
            examples,
        )
        reasons = list(tqdm(runs, "checking tests", len(examples), leave=False))
    if void := [f"{example.id}: {reason}" for example, reason in zip(examples, reasons) if reason]:
        raise InputError(
            f"the tests of {len(void)} of {len(examples)} questions prove nothing, or cannot be run; the first "
            f"is {void[0]}; correct these tests, or leave the questions out"
        )


def why_void(tests, fn_name):
    """Why tests prove nothing: what cannot be run, or which wrong programs pass them all; "" if one of them can fail."""
    reason = "there are none"
    for test in tests:
        if not isinstance(test, str):
            silent = not fn_name and any(same_output("", text) for text in test[1:])
            reason = "a program that prints nothing passes" if silent else ""
        else:
            mark, words = secrets.token_hex(16), {fn_name or "", *re.findall(r"[^\W\d]\w*", test)}
            runs = [
                script_after(program, test, fn_name, mark)
                for program in ("", NOTHING.format(words=words))
            ]
            _, found, reason = run_guarded(CHECK.format(runs=runs, mark=mark))[0].rpartition(mark)
            reason = found and (reason or "a program that does nothing passes")
        if not reason:
            return ""
    return reason


def from_json(text):
    """A JSON value whose integers are Decimals, because Python refuses to read an int of more than 4,300 digits."""
    return json.loads(text, parse_int=Decimal)


def same_output(printed, expected):
    """Whether two outputs have the same lines, apart from blanks around them and the spelling of numbers."""
    printed, expected = (
        [line.strip() for line in text.strip().split("\n")] for text in (printed, expected)
    )
    return len(printed) == len(expected) and all(map(same_line, printed, expected))


def same_line(printed, expected):
    """Whether two lines are the same text, or hold the same decimal numbers."""
    if "_" in printed + expected:  # Decimal would skip it
        return printed == expected
    try:
        return printed == expected or list(map(Decimal, printed.split())) == list(
            map(Decimal, expected.split())
        )
    except (
        InvalidOperation
    ):  # a word is not a number; or it is a signalling NaN, which cannot even be compared
        return False
