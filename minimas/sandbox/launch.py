"""Runs the program of a tool call, in the sandbox: python.py puts this file there as main.py, beside program.py.

A program may use some modules without importing them. No line is put before its own. So `from __future__ import ...`
may be its first, and error messages name the lines that the agent wrote.
"""

import linecache
import os
import re
import sys
from contextlib import suppress
from importlib import import_module
from types import ModuleType, TracebackType

FOLDER = os.path.dirname(os.path.abspath(__file__))
FILE = "program.py"
MODULES = ("fractions", "functools", "itertools", "math", "statistics")


def show_error(
    kind: type[BaseException], error: BaseException, trace: TracebackType | None
) -> None:
    """Print an error message as if the program had been started directly: without the lines of this file."""
    while trace is not None and trace.tb_frame.f_code.co_filename == __file__:
        trace = trace.tb_next
    sys.__excepthook__(kind, error.with_traceback(trace), trace)


def main() -> None:
    """Run the program as the module __main__, from its own file."""
    path = os.path.join(FOLDER, FILE)
    with open(path, encoding="utf-8-sig") as file:  # whatever encoding its first line claims
        source = file.read()
    names = {name: import_module(name) for name in MODULES}
    if re.search(r"\bsp\b", source):
        with suppress(ImportError):
            names["sp"] = import_module("sympy")
    program = ModuleType("__main__")
    program.__file__ = path
    vars(program).update(names)
    sys.modules["__main__"] = program
    sys.argv = [path]
    sys.path.insert(0, os.getcwd())  # modules that it writes, as in a program's own folder
    sys.path.append(FOLDER)  # where Python looks for the lines that an error message shows
    lines = source.splitlines(keepends=True)
    linecache.cache[FILE] = (len(source), None, lines, FILE)  # and the module inspect
    sys.excepthook = show_error
    exec(compile(source, FILE, "exec", dont_inherit=True), vars(program))


if __name__ == "__main__":
    main()
