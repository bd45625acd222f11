"""Runs an answer that is a program, in the sandbox: run_tests.py puts this file there as main.py, beside task.json.

task.json holds

    kind        what is done: a function of KINDS, below
    program     the answer; it is compiled from its own text, so it may begin with what has to come first in a file
    fn_name     the name of the function that is asked for, or ""
    test        the script of tests
    arguments   those of the function, in JSON, one a line
    mark        a random text that is printed when all has gone well, before a result
    words       all names in the script of tests

An answer may use common names without importing them: LiveCodeBench's starter code does so, and answers to MBPP+ may.
It has to define the function that is asked for, even if that is called add or median, as one of those.
"""

import json
import linecache
import os
import re
import sys
from types import CoroutineType, FunctionType, ModuleType
from typing import Any

FOLDER = os.path.dirname(os.path.abspath(__file__))
ANSWER = os.path.join(FOLDER, "answer.py")

# builtins comes late, to win over math.pow and the like. The modules are imported last, to win over names inside them,
# such as datetime.datetime and copy.copy.
COMMON = """
import os
from sys import *
from bisect import *
from collections import *
from copy import *
from datetime import *
from functools import *
from heapq import *
from io import *
from itertools import *
from json import *
from math import *
from operator import *
from random import *
from re import *
from statistics import *
from string import *
from builtins import *
from typing import *
import sys, bisect, collections, copy, datetime, functools, heapq, io, itertools, json, math
import operator, random, re, statistics, string
"""

# What stands in for an answer when tests are tested: all that a script asks of it is there, and returns an Unknown,
# which fails as soon as it is tested for truth.
NOTHING = """
class Unknown:
    __call__ = __eq__ = __ne__ = __lt__ = __le__ = __gt__ = __ge__ = __getattr__ = lambda *args, **named: Unknown()
    def __bool__(self):
        raise AssertionError
for name in {words}:
    globals().setdefault(name, lambda *args, **named: Unknown())
"""

# What cannot be run in a script of tests.
REFUSED = r"@(\w+\.)*(fixture|parametrize)\b|def setup_(module|function|class|method)\b|\b_?exit\((?![1-9])"

Names = dict[str, Any]


# The answer


def run(source: str, file: str, names: Names) -> None:
    """Run a source text with these names, as if it stood in a file."""
    source = source.removeprefix("\ufeff")  # a byte order mark
    lines = source.splitlines(keepends=True)
    linecache.cache[file] = (len(source), None, lines, file)  # so that the module inspect finds it
    exec(compile(source, file, "exec", dont_inherit=True), names)


def new_module(name: str) -> ModuleType:
    """The module that an answer becomes, with the common names in it."""
    module = ModuleType(name)
    module.__file__ = ANSWER
    sys.modules[name] = module
    exec(COMMON, vars(module))
    return module


def load_answer(program: str, fn_name: str) -> tuple[Names, bool]:
    """(the names that an answer defines, as a module `answer`, and the common ones; whether it defines fn_name)."""
    names = vars(new_module("answer"))
    common = None
    if "class Solution" in program:
        common = names.get(fn_name)  # a method may call the common function of its own name
    else:
        names.pop(fn_name, None)
    run(program, "answer.py", names)
    function = names.get(fn_name)
    return names, function is not None and function is not common


# What is done with it


def run_program(task: Names) -> None:
    """Run the answer as a program that reads stdin and prints."""
    run(task["program"], "answer.py", vars(new_module("__main__")))


def call_function(task: Names) -> None:
    """Call the function, or the method of a class Solution, and print the mark and its result in JSON."""
    fn_name = task["fn_name"]
    names, is_defined = load_answer(task["program"], fn_name)
    if "Solution" in names:
        function = getattr(names["Solution"](), fn_name)
    elif is_defined:
        function = names[fn_name]
    else:
        raise NameError(f"the answer does not define {fn_name}")
    arguments = [json.loads(line) for line in task["arguments"].split("\n") if line.strip()]
    result = json.dumps(function(*arguments))
    say(task["mark"] + result)


def run_script(task: Names) -> None:
    """Run a script of tests after the answer, then what it defined for others to call, and print the mark.

    That is check(candidate) of HumanEval, the classes of unittest, and functions test_* and classes Test* as pytest
    finds them. Raises NotImplementedError if the script asks for more than that.
    """
    names, is_defined = load_answer(task["program"], task["fn_name"])
    script = task["test"]
    calls_method = "Solution(" in script  # then it needs no function
    if not is_defined and not calls_method:
        names.pop(task["fn_name"], None)
    if re.search(REFUSED, script):
        raise NotImplementedError("fixtures, parametrize or setup of pytest, or an exit")
    cases = prepare_unittest() if "unittest" in script else ()
    names["__name__"] = "__main__"
    sys.modules["__main__"] = sys.modules["answer"]
    run(script, "test.py", names)
    for name, value in list(names.items()):
        if getattr(value, "__module__", None) != "__main__":
            continue
        if isinstance(value, FunctionType):
            if name.startswith("test"):
                call(value, script)
            elif name == "check":
                candidates = [names[task["fn_name"]]] if task["fn_name"] else []
                call(value, script, *candidates)
        elif isinstance(value, type) and issubclass(value, cases):
            run_unittest(value)
        elif isinstance(value, type) and name.startswith("Test"):
            for method in dir(value):
                if method.startswith("test"):
                    call(getattr(value(), method), script)
    say(task["mark"])


def prepare_unittest() -> type:
    """The class of unittest's cases. unittest.main does nothing: it would exit, and its tests are run later anyway."""
    import unittest

    unittest.main = do_nothing  # type: ignore[assignment, misc]
    return unittest.TestCase


def do_nothing(*args: Any, **named: Any) -> None:
    """What a script calls in the place of unittest.main."""


def run_unittest(case: type) -> None:
    import unittest

    result = unittest.TestResult()
    unittest.defaultTestLoader.loadTestsFromTestCase(case).run(result)
    assert result.wasSuccessful()


def call(function: Any, script: str, *given: Any) -> None:
    """Call a function of a script with as many of the given arguments as it has parameters.

    If there are too few, it must be a helper that the script calls itself. Otherwise NotImplementedError.
    """
    count = function.__code__.co_argcount - len(function.__defaults__ or ())
    if hasattr(function, "__self__"):
        count -= 1
    if count <= len(given):
        result = function(*given[:count])
        if isinstance(result, CoroutineType):
            import asyncio  # slow to import

            asyncio.run(result)
    elif script.count(function.__name__ + "(") == 1:
        raise NotImplementedError("nothing gives the arguments of " + function.__name__)


def check_script(task: Names) -> None:
    """Run a script of tests after answers that are wrong.

    If one of them passes, the mark is printed. If the script cannot be run at all, the mark and the reason are printed.
    """
    for program in ("", NOTHING.format(words=task["words"])):
        try:
            run_script({**task, "program": program})
        except (SyntaxError, ModuleNotFoundError, NotImplementedError) as error:
            say(f"{task['mark']}{type(error).__name__}: {error}")
            return
        except BaseException:  # the test has failed, as it should
            continue
        return


def say(text: str) -> None:
    """Print a text on a line of its own, even if the answer has replaced sys.stdout."""
    assert sys.__stdout__ is not None
    sys.__stdout__.write("\n" + text)
    sys.__stdout__.flush()


KINDS = {
    "program": run_program,
    "function": call_function,
    "script": run_script,
    "check": check_script,
}


def main() -> None:
    with open(os.path.join(FOLDER, "task.json"), encoding="utf-8") as file:
        task = json.load(file)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # stderr is no part of an answer
    # The sandbox starts Python without a buffer for stdout. Programs that are timed need one.
    encoding, errors = sys.stdout.encoding, sys.stdout.errors
    sys.stdout = open(1, "w", encoding=encoding, errors=errors, closefd=False)  # noqa: SIM115
    sys.__stdout__ = sys.stdout  # type: ignore[misc]
    sys.setrecursionlimit(50000)  # this limit and the next are those of LiveCodeBench's own runner
    sys.set_int_max_str_digits(50000)
    sys.argv = [ANSWER]
    sys.path.insert(0, os.getcwd())  # modules that it writes, as in a program's own folder
    sys.path.append(FOLDER)  # processes that it starts may import the answer
    KINDS[task["kind"]](task)


if __name__ == "__main__":
    main()
