"""The process in which math-verify judges, because it may hang: grade.py starts this file by its path.

Nothing of minimas is imported here, nor the program that called it. Its arguments are the folders in which the parent
finds modules. The first line on stdout is {"ready": true}, or {"missing": why} if math-verify cannot be imported, or
{"failed": why}. From then on each line on stdin is a pair in JSON, [predicted, target], and the line on stdout that
follows it is true or false.
"""

import json
import os
import signal
import sys
import time
from contextlib import suppress
from typing import Any, TextIO

MEMORY = 4 << 30  # bytes
# For one pair: longer than grade.py waits. It ends a step in C whose parent was killed.
CPU_SECONDS = 20


def main() -> None:
    """Judge pairs until stdin ends, which it does when the parent ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent
    out = own_stdout()
    sys.path += [folder for folder in sys.argv[1:] if folder not in sys.path]
    try:
        limit_memory()
        if not is_same("1", "1"):
            raise ValueError("it says that 1 is not 1")
    except ImportError as e:
        send(out, {"missing": str(e)})
        return
    except Exception as e:
        send(out, {"failed": repr(e)})
        return
    send(out, {"ready": True})
    for line in sys.stdin:
        limit_time()
        predicted, target = json.loads(line)
        try:
            verdict = is_same(predicted, target)
        except BaseException:  # its timeout is no Exception
            verdict = False
        send(out, verdict)


def is_same(predicted: str, target: str) -> bool:
    """Whether math-verify calls two answers in LaTeX equal. It raises what it likes."""
    from math_verify import parse, verify

    answers = []
    for text in (predicted, target):
        boxed = rf"\boxed{{{text}}}"
        answers.append(parse(boxed, extraction_mode="first_match", parsing_timeout=3))
    return bool(verify(answers[1], answers[0], timeout_seconds=3))


def own_stdout() -> TextIO:
    """The stdout of the process, for send() only: what anything else prints or logs goes nowhere."""
    out = os.fdopen(os.dup(1), "w")
    nothing = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nothing, 1)
    os.dup2(nothing, 2)
    return out


def send(out: TextIO, value: Any) -> None:
    """Write a value as a line of JSON."""
    out.write(json.dumps(value) + "\n")
    out.flush()


def limit_memory() -> None:
    """Let an allocation beyond MEMORY fail, and write no image of the memory when the process is ended."""
    with suppress(ImportError, ValueError, OSError):  # Windows has no limits, macOS not this one
        import resource

        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))


def limit_time() -> None:
    """Let the system end this process after CPU_SECONDS more, even inside a step in C."""
    with suppress(ImportError, ValueError, OSError):
        import resource

        _, most = resource.getrlimit(resource.RLIMIT_CPU)
        seconds = int(time.process_time()) + CPU_SECONDS
        resource.setrlimit(resource.RLIMIT_CPU, (seconds, most))


if __name__ == "__main__":
    main()
