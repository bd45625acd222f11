"""Runs Python programs in a guarded process: isolated mode, an empty temporary folder, a bare environment, limits on
time, memory, files and processes. All that a program started ends with it.

This contains accidents. It does not stop code that means harm.
"""

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from pathlib import Path
from threading import Condition
from typing import ParamSpec, Self, TypeVar

GUARD = Path(__file__).with_name("guard.py")
LAUNCH = Path(__file__).with_name("launch.py")
LATE = 10  # seconds after a program's time is over in which its guard must have ended it

P = ParamSpec("P")
R = TypeVar("R")


class Programs:
    """Threads that run programs. Leaving its `with` block, also by Ctrl-C, ends the programs that still run.

    Ctrl-C interrupts the main thread only. So a program always runs in one of these threads, which puts everything in
    order behind it: no process and no folder is left.
    """

    def __init__(self, at_once: int) -> None:
        self.threads = ThreadPoolExecutor(at_once)
        self.running = 0  # programs, counted under the lock of:
        self.ended = Condition()  # told when one of them has ended
        # The stdin of each guard, and its other end: a guard ends its program as soon as that is closed.
        lifeline, held_end = os.pipe()
        self.lifeline = os.fdopen(lifeline, "rb", buffering=0)
        self.held_end = os.fdopen(held_end, "wb", buffering=0)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        interrupt: KeyboardInterrupt | None = None
        closed = False
        while not closed:  # however often Ctrl-C comes, finish first
            try:
                self.close()
                closed = True
            except KeyboardInterrupt as e:
                interrupt = e
        if interrupt is not None:
            raise interrupt

    def close(self) -> None:
        """End the programs that still run, and wait until nothing of them is left."""
        self.held_end.close()
        self.threads.shutdown(wait=False, cancel_futures=True)
        # Threads are not joined: Ctrl-C would make Python take a thread that is being joined for one that has ended.
        with self.ended:
            self.ended.wait_for(lambda: self.running == 0)
        self.lifeline.close()

    def submit(self, f: Callable[P, R], *args: P.args, **named: P.kwargs) -> Future[R]:
        """Let a thread call f, which may call `run`."""
        return self.threads.submit(f, *args, **named)

    def run(
        self,
        code: str,
        seconds: int = 10,
        megabytes: int = 1024,
        stdin: str = "",
        files: Mapping[str, str] | None = None,
    ) -> tuple[str, str]:
        """Run a Python program, in one of the threads; returns what run_guarded does.

        files   {name: text} of more files, which lie beside the program's own, main.py
        Raises CancelledError if the block has been left.
        """
        with self.ended:
            if self.held_end.closed:
                raise CancelledError
            self.running += 1
        try:
            # stdin is a file: programs ask for its size
            texts = {"main.py": code, "stdin": stdin, **(files or {})}
            return self.run_in_folder(texts, seconds, megabytes)
        finally:
            with self.ended:
                self.running -= 1
                self.ended.notify_all()

    def run_in_folder(
        self, texts: Mapping[str, str], seconds: int, megabytes: int
    ) -> tuple[str, str]:
        """Run main.py of these {name: text} in a temporary folder; returns what run_guarded does."""
        folder = Path(tempfile.mkdtemp())
        try:
            (folder / "work").mkdir()
            for name, text in texts.items():
                (folder / name).write_text(text, encoding="utf-8", errors="replace", newline="")
            ending = self.ending(folder, seconds, megabytes)
            output = (folder / "output").read_text(encoding="utf-8", errors="replace")
        finally:
            remove(folder)
        return output, ending

    def ending(self, folder: Path, seconds: int, megabytes: int) -> str:
        """How the program in a folder ended, "" if it ended well. What it printed is in the file output."""
        # -I -S: the guard is quicker without the user's packages
        command = [sys.executable, "-I", "-S", str(GUARD)]
        command += [str(folder), str(seconds), str(megabytes)]
        settings = {
            "HOME": str(folder / "work"),
            "TMPDIR": str(folder / "work"),
            "OPENBLAS_NUM_THREADS": "1",
            "OMP_NUM_THREADS": "1",
            "PYTHONUNBUFFERED": "1",  # of Python that the program starts: its lines, too, come in their order
        }
        with open(folder / "output", "ab") as printed:
            guard = subprocess.Popen(
                command,
                env=settings,
                stdin=self.lifeline,
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
        if ending == "ended with status 0":
            return ""
        return ending or "lost its guard"


def remove(folder: Path) -> None:
    """Remove a folder. It may hold folders that are too deep for shutil, or closed to us; Ctrl-C does not reach rm."""
    script = 'chmod -R u+rwX "$0"; rm -rf "$0"'
    command = ["sh", "-c", script, str(folder)]
    subprocess.run(command, stderr=subprocess.DEVNULL, start_new_session=True)


def run_guarded(
    code: str,
    seconds: int = 10,
    megabytes: int = 1024,
    stdin: str = "",
    files: Mapping[str, str] | None = None,
) -> tuple[str, str]:
    """Run a Python program under guard.py; returns (all that it printed, "" if it ended well, else how it ended)."""
    with Programs(1) as programs:
        return programs.submit(programs.run, code, seconds, megabytes, stdin, files).result()


def run_python(code: str) -> str:
    """The output of the program of a tool call, then how it ended unless it ended well, such as [exit_code] 1."""
    launcher = LAUNCH.read_text(encoding="utf-8")
    text, ending = run_guarded(launcher, files={"program.py": code})
    if "status" in ending:
        ending = ending.replace("ended with status", "[exit_code]")
    elif ending:
        ending = f"[{ending}]"
    return f"{text.rstrip()}\n{ending}".strip() or "[no output]"
