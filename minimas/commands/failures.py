"""How a command fails and ends: errors, signals, streams, and the exit status.

    0    all is done
    1    a fault of minimas, with its traceback
    2    the input cannot be used, a file or stdout fails, or memory runs out; the message on stderr says what to do
    129, 130, 143    SIGHUP, Ctrl-C (SIGINT) or SIGTERM
    141  whoever reads stdout has left (| head)

While main() runs, a signal raises KeyboardInterrupt or its subclass Terminated, so that files are completed. Before
and after, a signal ends the process at once: see minimas/__init__.py. So it does while main() imports something, since
what is imported may catch the exception, as parts of torch do.

A stream that is closed from the start is /dev/null. One that fails later is written no more. Neither stops the work.
"""

import atexit
import io
import os
import select
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any, TextIO

from .. import runs_a_command
from ..common import InputError, Terminated, out_of_memory, warn
from ..runs.lock import HELD

LESS_MEMORY = (
    "fewer questions at once (--batch-size), lower --rollouts or --max-new-tokens, or --offload"
)
INPUT_ERROR, BROKEN_PIPE = 2, 128 + 13  # exit statuses; 13 is SIGPIPE


def command(main: Callable[[], object], less: str = LESS_MEMORY) -> None:
    """Run a command's main(), then leave with the exit status that it deserves: SystemExit, unless that is 0.

    less   what to try when memory runs out

    A process that was started for a command ends here: to take torch apart costs half a second, in which Python has
    already put its own handlers of signals away.
    """
    handlers, hook = take_signals(), sys.unraisablehook
    sys.unraisablehook = repeat_interrupt
    open_missing_streams()
    streams = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = safe(sys.stdout), safe(sys.stderr)
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="surrogateescape")  # Style.questions says what is no UTF-8
    try:
        status = exit_status(main, less)
    except Exception:
        if not runs_a_command:
            raise
        sys.excepthook(*sys.exc_info())
        status = 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        sys.stdout, sys.stderr = streams
        sys.unraisablehook = hook
        for number, handler in handlers.items():
            signal.signal(number, handler)
    if runs_a_command:
        end_process(status)
    if status:
        raise SystemExit(status)


def exit_status(main: Callable[[], object], less: str) -> int:
    """Call main() -> the exit status. What the user can mend is told on stderr."""
    global working
    status = 0
    try:
        try:
            working = True
            main()
        finally:  # before any other signal: Python looks for them at calls and in loops only
            working = False
    except SystemExit as e:  # argparse's, after --help
        if isinstance(e.code, str):
            raise
        status = e.code or 0
    except Terminated as e:
        status = 128 + (e.args[0] if e.args else signal.SIGTERM)
    except KeyboardInterrupt:
        status = 128 + signal.SIGINT
    except (InputError, OSError, MemoryError, RuntimeError) as e:
        if e is not stdout_error():
            message = what_to_mend(e, less)
            if message is None:
                raise
            warn(message)
            status = INPUT_ERROR
    error = stdout_error()
    if status or error is None:
        return status
    if isinstance(error, BrokenPipeError):
        return BROKEN_PIPE
    reason = error.strerror or error
    warn(f"stdout cannot be written ({reason}), so that its output is lost: give it another place")
    return INPUT_ERROR


def what_to_mend(error: Exception, less: str = LESS_MEMORY) -> str | None:
    """The message of an error that the user can mend; None for any other."""
    if isinstance(error, InputError):
        return str(error)
    if out_of_memory(error):
        return f"out of memory: try {less}"
    if isinstance(error, OSError):
        file = error.filename or "a file"
        reason = error.strerror or error
        return f"{file} cannot be read or written ({reason}): check permissions and disk space"
    return None


def end_process(status: int) -> None:
    """End this process as the interpreter does, but for the time that it would take to free everything first."""
    threading._shutdown()  # type: ignore[attr-defined]  # waits for threads that have something to finish
    atexit._run_exitfuncs()
    for stream in sys.stdout, sys.stderr:
        with suppress(OSError, ValueError):
            stream.flush()
    os._exit(status)


# Signals

working = False  # whether main() runs, so that `exit_status` catches what a signal raises
completing = False  # whether a file is being completed, for which a signal waits
waiting: int | None = None  # the number of that signal


def interrupt(number: int, frame: FrameType | None) -> None:
    """The handler of SIGINT, SIGTERM and SIGHUP."""
    global waiting
    if not working:
        os._exit(128 + number)
    if is_importing(frame) and not completing:
        for lock in reversed(HELD):
            lock.release()
        os._exit(128 + number)
    if completing and waiting is None:
        waiting = number
    else:
        raise exception_of(number)


def is_importing(frame: FrameType | None) -> bool:
    """Whether a module is being imported where a signal came."""
    while frame is not None:
        if frame.f_code.co_filename == "<frozen importlib._bootstrap>":
            return True
        frame = frame.f_back
    return False


def exception_of(number: int) -> KeyboardInterrupt:
    """What a signal raises."""
    return KeyboardInterrupt() if number == signal.SIGINT else Terminated(number)


@contextmanager
def completed_first() -> Iterator[None]:
    """Let the first signal that comes meanwhile wait until a file is complete that would be lost."""
    global completing, waiting
    completing = True
    waiting = None
    try:
        yield
    finally:
        completing = False
        if waiting is not None:
            raise exception_of(waiting)


def take_signals() -> dict[int, Callable | int | None]:
    """Let `interrupt` handle the signals that end a process -> the handlers before. What nohup ignores stays so."""
    before: dict[int, Callable | int | None] = {}
    for name in ("SIGINT", "SIGTERM", "SIGHUP"):  # the last is not everywhere
        number = getattr(signal, name, None)
        if number is not None and signal.getsignal(number) not in (signal.SIG_IGN, None):
            before[number] = signal.signal(number, interrupt)
    return before


def repeat_interrupt(unraisable: "sys.UnraisableHookArgs") -> None:
    """Send a signal again if its exception was lost: raised where Python can only print it, as in a __del__."""
    error = unraisable.exc_value
    if not isinstance(error, KeyboardInterrupt):
        sys.__unraisablehook__(unraisable)
        return
    number = error.args[0] if isinstance(error, Terminated) and error.args else signal.SIGINT
    threading.Timer(0.01, os.kill, [os.getpid(), number]).start()


# Streams


class Output(io.RawIOBase):
    """The bytes of stdout or stderr. No write fails: after an error all is dropped, and `error` says why."""

    def __init__(self, raw: Any) -> None:
        self.raw = raw
        self.error: OSError | None = None

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        return self.raw.fileno()

    def isatty(self) -> bool:
        return self.raw.isatty()

    def write(self, data: bytes) -> int:  # type: ignore[override]
        left = memoryview(data)
        while left and self.error is None:
            try:
                n = self.raw.write(left)
                if n is None:  # a pipe in non-blocking mode is full: its reader is slow
                    select.select([], [self.raw], [])
            except OSError as e:
                self.error = e
            else:
                left = left[n or 0 :]
        return len(data)


def open_missing_streams() -> None:
    """Put /dev/null in the place of closed streams, so that no other file gets their numbers, 0 to 2."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            stream = open(os.devnull, mode)  # noqa: SIM115  (it gets the lowest free number)
            os.set_inheritable(stream.fileno(), True)
            setattr(sys, name, stream)


def safe(stream: TextIO) -> TextIO:
    """The same stream through `Output`; what its encoding lacks is written as a number. A stream in memory stays."""
    if not isinstance(stream, io.TextIOWrapper):
        return stream
    stream.flush()
    return io.TextIOWrapper(  # type: ignore[type-var]  # it takes any writable object
        Output(getattr(stream.buffer, "raw", stream.buffer)),
        encoding=stream.encoding,
        errors="backslashreplace",
        line_buffering=stream.line_buffering,
        write_through=stream.write_through,
    )


def stdout_error() -> OSError | None:
    """Why stdout could not be written; None if it could."""
    sys.stdout.flush()
    output = getattr(sys.stdout, "buffer", None)
    return output.error if isinstance(output, Output) else None


def check_stdout() -> None:
    """Raise the error of stdout, if it had one: for a command that can do nothing more but print."""
    error = stdout_error()
    if error is not None:
        raise error
