"""Whether an answer is right: mathematics by equality, letters and texts by normalised text, code by running its tests.

Three graders for mathematics. "plain" is exact.py, which needs nothing. "math-verify" asks the library of that name, of the
extra minimas[math], about what exact.py cannot read, and only that: what exact.py can decide, it decides. "released" is the
rule of the released code for MATH-500, kept for comparison: 3.2 counts as 3.9.
"""

import importlib.util
import json
import os
import re
import secrets
import select
import string
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor, as_completed
from decimal import Decimal, InvalidOperation

from . import InputError
from .exact import same_exactly
from .tools import guarded

GRADERS = ("math-verify", "plain", "released")


def default_grader():
    """math-verify where it is installed, else plain."""
    return "math-verify" if importlib.util.find_spec("math_verify") else "plain"


def same_math(found, gold, grader):
    """Whether `found` (the inside of a box, or None) equals `gold` by one of GRADERS."""
    if grader not in GRADERS:
        raise InputError(f"the grader is {grader!r}, expected {', '.join(GRADERS)}")
    if found is None or not found.strip():
        return False
    if grader == "released":
        return same_as_released(found, gold)
    verdict = same_exactly(found, gold)
    return ask_math_verify(found, gold) if verdict is None and grader == "math-verify" else bool(verdict)


# math-verify: in a child process, as it may not come back. Its own time limit is an alarm signal: that works in the main thread
# only, and never interrupts one long step inside an integer power or in the kernel of the regular expressions.

ASKED = r"""
import json, logging, resource, sys
logging.disable()
resource.setrlimit(resource.RLIMIT_AS, (4 << 30, 4 << 30))
from math_verify import parse, verify
print("ready", flush=True)
for line in sys.stdin:
    try:
        found, gold = (parse("\\boxed{" + text + "}", parsing_timeout=3) for text in json.loads(line))
        answer = bool(verify(gold, found, timeout_seconds=3))
    except BaseException:
        answer = False
    print(int(answer), flush=True)
"""
math_verify, one_at_a_time = None, threading.Lock()


def start_math_verify():
    command = [sys.executable, "-P", "-c", ASKED]
    child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    if child.stdout.readline() != b"ready\n":
        raise InputError("the grader math-verify cannot be imported: pip install 'minimas[math]', or take the grader plain")
    return child


def ask_math_verify(found, gold, seconds=15):
    """What math-verify says; False where it takes longer or dies of it, and the next one asked is a new process."""
    global math_verify
    with one_at_a_time:
        math_verify = math_verify or start_math_verify()
        math_verify.stdin.write(json.dumps([found, gold]).encode() + b"\n")
        math_verify.stdin.flush()
        said = math_verify.stdout.readline() if select.select([math_verify.stdout], [], [], seconds)[0] else b""
        if not said:
            math_verify.kill()
            math_verify.communicate()
            math_verify = None
        return said == b"1\n"


# The released rule for MATH-500: any of four spellings of the two agrees.

def same_as_released(found, gold):
    """The same integer part of the first number, text without LaTeX's decoration, text, or digits before the first point."""
    return any(one and one == two for one, two in zip(released_spellings(found), released_spellings(gold)))


def released_spellings(text):
    words = re.sub(r"\\text\{([^{}]*)\}", r"\1", text.strip())
    simple = re.sub(r"\\frac\{\s*(-?\d+)\s*\}\{\s*(-?\d+)\s*\}",
                    lambda m: str(int(m[1]) / int(m[2])) if int(m[2]) and len(m[0]) < 300 else m[0], words)
    first = re.search(r"-?\d+", simple.replace(",", ""))
    yield str(Decimal(first[0])) if first else ""
    yield re.sub(r"\\left|\\right|\\[,;!:]|[${}\"'\s]", "", words)
    yield re.sub(r"\s", "", text)
    digits = re.sub(r"\D", "", text.split(".")[0])
    yield digits and (digits.lstrip("0") or "0")


# Letters, and answers to search questions.

def same_choice(found, gold):
    """The same letter A to D, alone or in brackets, either case."""
    letters = [re.fullmatch(r"\s*\(?\s*([A-D])\s*[.):]?\s*", text or "", re.I) for text in (found, gold)]
    return all(letters) and letters[0][1].upper() == letters[1][1].upper()


def plain_text(text):
    text = "".join(c for c in text.lower() if c not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def same_text(found, gold):
    """Exact match as SQuAD and HotpotQA count it: lower case, without punctuation, articles and extra blanks."""
    return plain_text(found or "") == plain_text(gold)


# Code: its tests, each in a guarded child process.

# LiveCodeBench's starter code takes common names for granted. builtins comes late, to win over math.pow and such, and the
# modules last, to win over names in them: datetime.datetime, copy.copy.
MODULES = "sys bisect collections copy datetime functools heapq io itertools json math operator random re statistics string".split()
COMMON = "".join(f"from {name} import *\n" for name in [*MODULES, "builtins", "typing"])
COMMON += f"import {', '.join(MODULES)}\nsys.setrecursionlimit(50000)\n"
CALL = """
import json, sys
names = {{"__name__": "answer"}}
exec({common!r}, names)
exec(compile({program!r}, "answer.py", "exec"), names)
result = getattr(names["Solution"](), {fn_name!r}) if "Solution" in names else names[{fn_name!r}]
result = json.dumps(result(*[json.loads(line) for line in {arguments!r}.split("\\n")]))
sys.__stdout__.write("\\n{mark}" + result)
"""
SCRIPT = """
names = {{"__name__": "answer"}}
exec(compile({program!r}, "answer.py", "exec"), names)
exec(compile({test!r}, "test.py", "exec"), names)
__import__("sys").__stdout__.write("\\n{mark}")
"""


def passes(program, tests, fn_name="", seconds=10, megabytes=1024):
    """Whether a program passes all its tests; one on each core at a time, and none is begun after one has failed.

    A test is a script that runs after the program, or a pair: (stdin, stdout), or with fn_name (JSON arguments, one a line,
    JSON result) for the function of that name, alone or in a class Solution. Every test has the limits for itself.
    """
    if not tests:
        raise InputError("a question for code has no tests: there is nothing to grade by")
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        runs = [pool.submit(passes_one, program, test, fn_name, seconds, megabytes) for test in tests]
        passed = all(run.result() for run in as_completed(runs))
        pool.shutdown(wait=False, cancel_futures=True)
    return passed


def passes_one(program, test, fn_name, seconds, megabytes):
    """One test. Only a mark that the program cannot know counts as its end, so that leaving early is not passing."""
    mark = secrets.token_hex(16)
    if isinstance(test, str):
        output, ending = guarded(SCRIPT.format(program=program, test=test, mark=mark), seconds, megabytes)
        return ending == "" and output.endswith(mark)
    given, expected = test
    if not fn_name:
        code = f"exec({COMMON!r})\nexec(compile({program!r}, 'answer.py', 'exec'))"
        output, ending = guarded(code, seconds, megabytes, stdin=given)
        return ending == "" and same_output(output, expected)
    code = CALL.format(common=COMMON, program=program, fn_name=fn_name, arguments=given, mark=mark)
    output, ending = guarded(code, seconds, megabytes)
    try:
        return ending == "" and json.loads(output.rpartition(mark)[2]) == json.loads(expected)
    except ValueError:
        return False


def same_output(found, expected):
    """Line by line without outer blanks: alike, or the same numbers as decimals."""
    found, expected = ([line.strip() for line in text.strip().split("\n")] for text in (found, expected))
    same = [a == b or decimals(a) == decimals(b) is not None for a, b in zip(found, expected)]
    return len(found) == len(expected) and all(same)


def decimals(line):
    try:
        return [Decimal(word) for word in line.split()]
    except InvalidOperation:
        return None
