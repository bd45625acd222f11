"""Whether an answer is right: mathematics by equality, texts once normalised, code by running its tests.

There are three graders for mathematics:

    plain        exact.py, which needs nothing else
    math-verify  exact.py, and for what it cannot read the library math-verify (pip install 'minimas[math]')
    released     the rule of the released code for MATH-500, kept for comparison: it takes 3.2 for 3.9
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

from . import InputError, check_known
from .exact import same_exactly
from .tools import guarded

GRADERS = ("math-verify", "plain", "released")


def default_grader():
    """math-verify if it is installed, else plain."""
    return "math-verify" if importlib.util.find_spec("math_verify") else "plain"


def same_math(found, gold, grader):
    """Whether the answer `found` (the content of a box, or None) equals `gold` in LaTeX, according to one of GRADERS.

    Raises InputError if the grader is not known, or is math-verify and cannot be imported.
    """
    check_known("grader", [grader], GRADERS)
    if found is None or not found.strip():
        return False
    if grader == "released":
        return same_as_released(found, gold)
    verdict = same_exactly(found, gold)
    return ask_math_verify(found, gold) if verdict is None and grader == "math-verify" else bool(verdict)


# math-verify runs in a child process, because it may hang: its own time limit is an alarm signal, which works in the
# main thread only, and cannot interrupt a long step in C, such as an integer power or a match of a regular expression.

MATH_VERIFY_SERVER = r"""
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
    """A child process that reads pairs of answers, one JSON list a line, and writes 1 or 0 for each."""
    command = [sys.executable, "-P", "-c", MATH_VERIFY_SERVER]
    child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    if child.stdout.readline() != b"ready\n":
        raise InputError("the grader math-verify cannot be imported: pip install 'minimas[math]', or use grader plain")
    return child


def ask_math_verify(found, gold, seconds=15):
    """The verdict of math-verify; False if it dies or takes more than `seconds`, and the next call starts it anew."""
    global math_verify
    with one_at_a_time:
        if math_verify is None or math_verify.poll() is not None:
            math_verify = start_math_verify()
        math_verify.stdin.write(json.dumps([found, gold]).encode() + b"\n")
        math_verify.stdin.flush()
        in_time = select.select([math_verify.stdout], [], [], seconds)[0]
        verdict = math_verify.stdout.readline() if in_time else b""
        if not verdict:
            math_verify.kill()
            math_verify.communicate()
            math_verify = None
        return verdict == b"1\n"


# The released rule for MATH-500

def released_answer(text):
    r"""What it takes for the answer: the last \boxed{} with no braces, else up to the last brace of its line, or all."""
    boxes = re.findall(r"\\boxed\{([^{}]+)\}", text) or re.findall(r"\\boxed\{(.*)\}", text) or [text]
    return boxes[-1].strip()


def same_as_released(found, gold):
    """Whether any of the four spellings of `found` is the same spelling of `gold`, and not empty."""
    return any(one and one == two for one, two in zip(released_spellings(found), released_spellings(gold)))


def released_spellings(text):
    """The integer part of the first number, the text without LaTeX's decoration, the text, the digits up to a point."""
    words = re.sub(r"\\text\{([^{}]*)\}", r"\1", text.strip())
    simple = re.sub(r"\\frac\{\s*(-?\d+)\s*\}\{\s*(-?\d+)\s*\}",
                    lambda m: str(int(m[1]) / int(m[2])) if int(m[2]) and len(m[0]) < 300 else m[0], words)
    first = re.search(r"-?\d+", simple.replace(",", ""))
    yield str(Decimal(first[0])) if first else ""
    yield re.sub(r"\\left|\\right|\\[,;!:]|[${}\"'\s]", "", words)
    yield re.sub(r"\s", "", text)
    digits = re.sub(r"\D", "", text.split(".")[0])
    yield digits and (digits.lstrip("0") or "0")


# Answers to search questions

def plain_text(text):
    """Lower case, without the LaTeX of a box, punctuation, articles and extra blanks."""
    text = re.sub(r"\\(?:text|math)[a-z]*\s*(?=\{)|\\[ ,;:!]|~", " ", text)  # \text{Paris} -> {Paris}
    text = "".join(c for c in text.lower() if c not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def same_text(found, gold):
    """Exact match as in SQuAD and HotpotQA: in lower case, without punctuation, articles and extra blanks."""
    return found is not None and plain_text(found) == plain_text(gold)


# Code: each test runs in a guarded child process

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


def at_once():
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
    with ThreadPoolExecutor(at_once()) as pool:
        runs = [pool.submit(passes_one, program, test, fn_name, seconds, megabytes) for test in tests]
        passed = all(run.result() for run in as_completed(runs))
        pool.shutdown(wait=False, cancel_futures=True)
    return passed


def passes_one(program, test, fn_name, seconds, megabytes):
    """Whether a program passes one test.

    A random mark is printed after the last line of a script or the return of a function, so that a program that merely
    exits early does not pass. That is no protection against cheating: a program could read the mark from its own file.
    """
    mark = secrets.token_hex(16)
    if isinstance(test, str):
        code = SCRIPT_TEMPLATE.format(common=COMMON, program=program, test=test, mark=mark)
        output, ending = guarded(code, seconds, megabytes)
        return ending == "" and output.endswith(mark)
    given, expected = test
    if not fn_name:
        code = f"exec({COMMON!r})\nexec(compile({program!r}, 'answer.py', 'exec'))"
        output, ending = guarded(code, seconds, megabytes, stdin=given)
        return ending == "" and same_output(output, expected)
    code = CALL_TEMPLATE.format(common=COMMON, program=program, fn_name=fn_name, arguments=given, mark=mark)
    output, ending = guarded(code, seconds, megabytes)
    try:
        return ending == "" and from_json(output.rpartition(mark)[2]) == from_json(expected)
    except ValueError:
        return False


def from_json(text):
    """A JSON value whose integers are Decimals, because Python refuses to read an int of more than 4,300 digits."""
    return json.loads(text, parse_int=Decimal)


def same_output(found, expected):
    """Whether two outputs have the same lines, apart from blanks around them and the spelling of numbers."""
    found, expected = ([line.strip() for line in text.strip().split("\n")] for text in (found, expected))
    return len(found) == len(expected) and all(map(same_line, found, expected))


def same_line(found, expected):
    """Whether two lines are the same text, or hold the same decimal numbers."""
    if "_" in found + expected:  # Decimal would skip it
        return found == expected
    try:
        return found == expected or list(map(Decimal, found.split())) == list(map(Decimal, expected.split()))
    except InvalidOperation:  # a word is not a number; or it is a signalling NaN, which cannot even be compared
        return False
