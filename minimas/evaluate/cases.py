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

from ..common import InputError


def tests_of(cell, fn_name, place):
    """(tests as run_tests.passes takes them, fn_name) of the value of a cell; InputError if it has none of the forms."""
    kind, script = "functional" if fn_name else "stdin", cell if isinstance(cell, str) else ""
    try:
        if isinstance(cell, dict):
            fn_name = fn_name or cell.get("fn_name") or ""
            tests = [
                case_of(*case, fn_name, wrapped=True)
                for case in zip(cell["inputs"], cell["outputs"], strict=True)
            ]
        elif script or all(isinstance(test, str) for test in cell):
            script = script or "\n".join(cell)
            tests = [script] if script.strip() else []
        elif any(test.get("testtype", kind) != kind for test in cell):
            raise ValueError(f"some are not {kind}")
        else:
            tests = [case_of(test["input"], test["output"], fn_name) for test in cell]
        if fn_name and not fn_name.isidentifier():
            raise ValueError("that is no name of a function")
    except (TypeError, KeyError, ValueError, AttributeError, RecursionError) as e:
        raise InputError(
            f"{place}: tests are {str(cell)[:60]!r} for fn_name {fn_name!r}, which do not fit ({e!r}): expected "
            "a script, a list of asserts, or inputs and outputs as LiveCodeBench or APPS have them"
        ) from e
    return tests, fn_name


def case_of(given, output, fn_name, wrapped=False):
    """A case as run_tests.passes takes it. ValueError or TypeError if it cannot be run.

    wrapped   a list may also hold the result of a function, as in APPS
    """
    if fn_name and isinstance(given, list):  # the arguments themselves
        outputs = [output, *output[:1]] if wrapped and isinstance(output, list) else [output]
        return "\n".join(map(json.dumps, given)), *map(json.dumps, outputs)
    texts = ["\n".join(text) if isinstance(text, list) else text for text in (given, output)]
    for line in "\n".join(texts).split("\n"):  # TypeError if one of them is no text
        json.loads(line if fn_name and line.strip() else "0")
    return tuple(texts)


def digest_of(row):
    """A hash of the tests in a row of LiveCodeBench."""
    return hashlib.sha256(
        f"{row.get('public_test_cases')}{row.get('private_test_cases')}".encode()
    ).hexdigest()[:16]


def livecodebench_tests(file, offset, digest):
    """The public and private tests in the line that begins at a byte of the file; their digest must be this one."""
    try:
        with open(file, "rb") as lines:
            lines.seek(offset)
            row = json.loads(lines.readline())
        if digest_of(row) != digest:
            raise ValueError("they are not those that were there at first")
        private = row["private_test_cases"] or "[]"
        if not private.lstrip().startswith(
            "["
        ):  # not JSON, but a string of JSON, pickled and compressed
            pickled = pickletools.genops(
                zlib.decompress(base64.b64decode(private))
            )  # only looked at: it calls nothing
            (private,) = [value for _, value, _ in pickled if isinstance(value, str)]
        tests = json.loads(row["public_test_cases"] or "[]") + json.loads(private)
        return [case_of(test["input"], test["output"], "") for test in tests]
    except Exception as e:  # a damaged pickle can raise anything
        raise InputError(
            f"{file}: tests at byte {offset} cannot be read ({e!r}): fetch the file again"
        ) from e
