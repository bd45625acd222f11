"""Runs Python programs in a guarded process: isolated mode, an empty temporary folder, a bare environment, limits on
time, memory, files and processes. All that a program started ends with it.

This contains accidents. It does not stop code that means harm.
"""

import re
import subprocess
import sys
import tempfile
from pathlib import Path

GUARD = Path(__file__).with_name("guard.py")
LATE = 10  # seconds after a program's time is over in which its guard must have ended it
PRELUDE = "import fractions, functools, itertools, math, statistics\n"  # a program may use these without importing them
SYMPY = "import contextlib\nwith contextlib.suppress(ImportError):\n    import sympy as sp\n"  # and sp, if there is sympy


def run_guarded(code, seconds=10, megabytes=1024, stdin=""):
    """Run a Python program under guard.py; returns (all that it printed, "" if it ended well, else how it ended)."""
    folder = Path(tempfile.mkdtemp())
    work, given, output = (
        folder / "work",
        folder / "stdin",
        folder / "output",
    )  # stdin is a file: programs ask for its size
    try:
        work.mkdir()
        for file, content in (folder / "program.py", code), (given, stdin):
            file.write_text(content, encoding="utf-8", errors="replace", newline="")
        command = [sys.executable, "-I", str(GUARD), str(folder), str(seconds), str(megabytes)]
        settings = {
            "HOME": str(work),
            "TMPDIR": str(work),
            "OPENBLAS_NUM_THREADS": "1",
            "OMP_NUM_THREADS": "1",
        }
        with open(given, "rb") as source, open(output, "ab") as printed:
            guard = subprocess.Popen(
                command,
                env=settings,
                stdin=source,
                stdout=subprocess.PIPE,
                stderr=printed,
                text=True,
                start_new_session=True,
            )
        try:
            ending = guard.communicate(timeout=seconds + LATE)[0].strip()
        except subprocess.TimeoutExpired:  # without namespaces a program can stop its guard
            guard.kill()
            ending = guard.communicate()[0].strip()
        except BaseException:  # even Ctrl-C: when the guard is told to end, it ends the program too
            guard.terminate()
            raise
        ending = "" if ending == "ended with status 0" else ending or "lost its guard"
        return output.read_text(encoding="utf-8", errors="replace"), ending
    finally:  # rm, not shutil: a program may have made folders that are too deep for Python, or closed to us
        subprocess.run(
            ["sh", "-c", 'chmod -R u+rwX "$0"; rm -rf "$0"', folder], stderr=subprocess.DEVNULL
        )


def run_python(code):
    """The output of a Python program, then how it ended unless it ended well, such as [exit_code] 1."""
    text, ending = run_guarded(PRELUDE + (SYMPY if re.search(r"\bsp\b", code) else "") + code)
    if ending:
        ending = (
            ending.replace("ended with status", "[exit_code]")
            if "status" in ending
            else f"[{ending}]"
        )
    return f"{text.rstrip()}\n{ending}".strip() or "[no output]"
