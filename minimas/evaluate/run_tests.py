"""Grading of code: a program is correct if it passes all its tests, each of which runs in the sandbox."""

import json
import os
import secrets
from concurrent.futures import ThreadPoolExecutor, as_completed
from decimal import Decimal, InvalidOperation

from ..common import InputError
from ..sandbox.python import run_guarded

# LiveCodeBench's starter code uses common names without importing them, and answers to MBPP+ may do so, too. builtins
# comes late in this list, to win over math.pow and the like; the modules are imported last, to win over names inside
# them, such as datetime.datetime and copy.copy. The two limits are those of LiveCodeBench's own runner.
MODULES = """sys bisect collections copy datetime functools heapq io itertools json math operator random re statistics
             string""".split()
COMMON = "import os\nos.dup2(os.open(os.devnull, os.O_WRONLY), 2)\n"  # stderr is no part of a program's answer
COMMON += "".join(f"from {name} import *\n" for name in [*MODULES, "builtins", "typing"])
COMMON += f"import {', '.join(MODULES)}\nsys.setrecursionlimit(50000)\nsys.set_int_max_str_digits(50000)\n"
MODULE = """
import json, sys, types
sys.modules["answer"] = types.ModuleType("answer")
names = vars(sys.modules["answer"])
exec({common!r}, names)
exec(compile({program!r}, "answer.py", "exec"), names)
"""
CALL_TEMPLATE = MODULE + """
result = getattr(names["Solution"](), {fn_name!r}) if "Solution" in names else names[{fn_name!r}]
result = json.dumps(result(*[json.loads(line) for line in {arguments!r}.split("\\n")]))
sys.__stdout__.write("\\n{mark}" + result)
"""
SCRIPT_TEMPLATE = MODULE + """
exec(compile({test!r}, "test.py", "exec"), names)
sys.__stdout__.write("\\n{mark}")
"""


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
        code = SCRIPT_TEMPLATE.format(common=COMMON, program=program, test=test, mark=mark)
        output, ending = run_guarded(code, seconds, megabytes)
        return ending == "" and output.endswith(mark)
    given, expected = test
    if not fn_name:
        code = f"exec({COMMON!r})\nexec(compile({program!r}, 'answer.py', 'exec'))"
        output, ending = run_guarded(code, seconds, megabytes, stdin=given)
        return ending == "" and same_output(output, expected)
    code = CALL_TEMPLATE.format(common=COMMON, program=program, fn_name=fn_name, arguments=given, mark=mark)
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
