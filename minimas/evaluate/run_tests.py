"""Grading of code: a program is correct if it passes all its tests, each of which runs in the sandbox."""

import json
import os
import re
import secrets
from concurrent.futures import ThreadPoolExecutor, as_completed
from decimal import Decimal, InvalidOperation
from pathlib import Path

from ..common import InputError
from ..sandbox.python import run_guarded

PROGRAMS = Path(__file__).with_name("programs.txt").read_text(encoding="utf-8")
_, COMMON, MODULE, CALL, SCRIPT = re.split(r"^\[\w+\]\n", PROGRAMS, flags=re.MULTILINE)


def tests_at_once():
    """How many tests run at once: the CPUs that this process may use, shared with the other ranks on this machine."""
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cpus // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))


def passes(program, tests, fn_name="", seconds=10, megabytes=1024):
    """Whether a Python program passes all its tests, which run in parallel, one on each CPU, until one of them fails.

    A test is a script (a str) that runs after the program, or a pair: (stdin, stdout) of the program, or with `fn_name`
    (arguments, result) of that function or method of a class Solution, in JSON, one argument a line. The limits are
    for each test. Raises InputError if there are no tests.
    """
    if not tests:
        raise InputError("a code question has no tests, so that its answer cannot be graded: leave the question out")
    with ThreadPoolExecutor(tests_at_once()) as pool:
        runs = [pool.submit(passes_one, program, test, fn_name, seconds, megabytes) for test in tests]
        passed = all(run.result() for run in as_completed(runs))
        pool.shutdown(wait=False, cancel_futures=True)
    return passed


def passes_one(program, test, fn_name, seconds, megabytes):
    """Whether a program passes one test.

    A random mark is printed after the last line of a script or the return of a function, so that a program that merely
    exits early does not pass. That does not stop cheating: a program could read the mark from its own file.
    """
    mark = secrets.token_hex(16)
    if isinstance(test, str):
        code = (MODULE + SCRIPT).format(common=COMMON, program=program, test=test, mark=mark)
        output, ending = run_guarded(code, seconds, megabytes)
        return ending == "" and output.endswith(mark)
    given, expected = test
    if not fn_name:
        code = f"exec({COMMON!r})\nexec(compile({program!r}, 'answer.py', 'exec'))"
        output, ending = run_guarded(code, seconds, megabytes, stdin=given)
        return ending == "" and same_output(output, expected)
    code = (MODULE + CALL).format(common=COMMON, program=program, fn_name=fn_name, arguments=given, mark=mark)
    output, ending = run_guarded(code, seconds, megabytes)
    try:
        return ending == "" and from_json(output.rpartition(mark)[2]) == from_json(expected)
    except ValueError:
        return False


def from_json(text):
    """A JSON value whose integers are Decimals, because Python refuses to read an int of more than 4,300 digits."""
    return json.loads(text, parse_int=Decimal)


def same_output(printed, expected):
    """Whether two outputs have the same lines, apart from blanks around them and the spelling of numbers."""
    printed, expected = ([line.strip() for line in text.strip().split("\n")] for text in (printed, expected))
    return len(printed) == len(expected) and all(map(same_line, printed, expected))


def same_line(printed, expected):
    """Whether two lines are the same text, or hold the same decimal numbers."""
    if "_" in printed + expected:  # Decimal would skip it
        return printed == expected
    try:
        return printed == expected or list(map(Decimal, printed.split())) == list(map(Decimal, expected.split()))
    except InvalidOperation:  # a word is not a number; or it is a signalling NaN, which cannot even be compared
        return False
