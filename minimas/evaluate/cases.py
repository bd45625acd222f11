"""The tests of a code question: from what a row holds, in the forms in circulation, to what run_tests.passes takes.

a text           a script: of asserts (MBPP+), with check(candidate) (HumanEval), with the tests of unittest or pytest
texts            asserts, which make one script (MBPP)
objects          {"input": ..., "output": ...}: of a program, or in JSON of a function (LiveCodeBench)
an object        {"inputs": [...], "outputs": [...], "fn_name": ...}, the last for a function only (APPS)
"""

import base64
import hashlib
import json
import pickletools
import zlib
from pathlib import Path
from typing import Any

from ..common import InputError, parse_unique
from .run_tests import Test


def tests_of(cell: Any, fn_name: str, place: str) -> tuple[list[Test], str]:
    """(tests as run_tests.passes takes them, fn_name) of the value of a cell; InputError if it has no known form."""
    try:
        if isinstance(cell, dict):
            fn_name = fn_name or cell.get("fn_name") or ""
            tests = cases_of_apps(cell, fn_name)
        elif isinstance(cell, str):
            tests = one_script(cell)
        elif all(isinstance(test, str) for test in cell):
            tests = one_script("\n".join(cell))
        else:
            tests = cases_of_livecodebench(cell, fn_name)
        if fn_name and not fn_name.isidentifier():
            raise ValueError("that is no name of a function")
    except (TypeError, KeyError, ValueError, AttributeError, RecursionError) as e:
        raise InputError(
            f"{place}: tests are {str(cell)[:60]!r} for fn_name {fn_name!r}, which do not fit ({e!r}): expected "
            "a script, a list of asserts, or inputs and outputs as LiveCodeBench or APPS have them"
        ) from e
    return tests, fn_name


def one_script(script: str) -> list[Test]:
    """The tests that a script is: none if it is blank."""
    return [script] if script.strip() else []


def cases_of_apps(cell: dict[str, Any], fn_name: str) -> list[Test]:
    """The cases in an object of inputs and outputs. A result of a function may stand in a list of its own, alone."""
    tests: list[Test] = []
    for given, output in zip(cell["inputs"], cell["outputs"], strict=True):
        right = [output]
        is_function = fn_name and isinstance(given, list)
        if is_function and isinstance(output, list) and len(output) == 1:
            right += output
        tests.append(case_of(given, right, fn_name))
    return tests


def cases_of_livecodebench(cell: list[dict[str, Any]], fn_name: str) -> list[Test]:
    """The cases in a list of objects, each with an input and its output."""
    kind = "functional" if fn_name else "stdin"
    if any(test.get("testtype", kind) != kind for test in cell):
        raise ValueError(f"some are not {kind}")
    return [case_of(test["input"], [test["output"]], fn_name) for test in cell]


def case_of(given: Any, right: list[Any], fn_name: str) -> tuple[str, ...]:
    """A case as run_tests.passes takes it, of an input and its right outputs.

    ValueError or TypeError if it cannot be run.
    """
    if fn_name and isinstance(given, list):  # the arguments themselves
        arguments = "\n".join(json.dumps(argument) for argument in given)
        return arguments, *(json.dumps(output) for output in right)
    texts = [as_lines(text) for text in (given, *right)]
    for line in "\n".join(texts).split("\n"):  # TypeError if one of them is no text
        if fn_name and line.strip():
            parse_unique(line, "an argument or an output")
    return tuple(texts)


def as_lines(text: Any) -> Any:
    """A list of lines as one text; anything else as it is."""
    return "\n".join(text) if isinstance(text, list) else text


def digest_of(row: dict[str, Any]) -> str:
    """A hash of the tests in a row of LiveCodeBench."""
    tests = f"{row.get('public_test_cases')}{row.get('private_test_cases')}"
    return hashlib.sha256(tests.encode()).hexdigest()[:16]


def livecodebench_tests(file: Path, offset: int, digest: str) -> list[Test]:
    """The public and private tests in the line that begins at a byte of the file; their digest must be this one."""
    try:
        with open(file, "rb") as lines:
            lines.seek(offset)
            row = json.loads(lines.readline())
        if digest_of(row) != digest:
            raise ValueError("they are not those that were there at first")
        public = parse_unique(row["public_test_cases"] or "[]", "public_test_cases")
        private = parse_unique(private_json(row), "private_test_cases")
        return [case_of(test["input"], [test["output"]], "") for test in public + private]
    except Exception as e:  # a damaged pickle can raise anything
        raise InputError(
            f"{file}: tests at byte {offset} cannot be read ({e!r}): fetch the file again"
        ) from e


def private_json(row: dict[str, Any]) -> str:
    """The private tests of a row of LiveCodeBench in JSON. They are JSON, or a text of JSON, pickled and compressed."""
    private = row["private_test_cases"] or "[]"
    if private.lstrip().startswith("["):
        return private
    pickled = zlib.decompress(base64.b64decode(private))
    operations = pickletools.genops(pickled)  # only looked at: it calls nothing
    (text,) = [value for _, value, _ in operations if isinstance(value, str)]
    return text
