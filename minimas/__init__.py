"""minimas: recursive multi-agent systems (RecursiveMAS, arXiv 2604.25917) in plain PyTorch.

The shortest program loads a system and asks it:

    import minimas
    system = minimas.load_mas_system("tiny")
    print(system.run(["7 +5 *3 -4 +8"])[0].answer)
"""

import os
import sys
from importlib import import_module
from typing import TYPE_CHECKING


def _runs_a_command() -> bool:
    """Whether Python was started for a command of minimas: `python -m minimas...`, or the script `minimas`."""
    if not sys.orig_argv or not getattr(sys, "argv", None):  # Python is embedded in another program
        return False
    # Both lists end with the same arguments, unless the program has put others into sys.argv.
    place = max(0, len(sys.orig_argv) - len(sys.argv))
    started = sys.orig_argv[place]  # the module or the script, before its arguments
    if sys.argv[0] == "-m":  # Python says so until it has found the module
        package = started.partition(".")[0]
        written_together = package.startswith("-") and package.endswith("mminimas")  # -mminimas.x
        return package == "minimas" or written_together
    return os.path.basename(started) in ("minimas", "minimas.exe")


def _leave(number: int, frame: object) -> None:
    """Handles a signal that comes while a command is still being imported, or has done its work: ends the process."""
    os._exit(128 + number)


runs_a_command = _runs_a_command() and not sys.flags.inspect  # python -i goes on after the command
if runs_a_command:  # any other program keeps its own handlers
    try:
        import signal

        for _name in ("SIGINT", "SIGTERM", "SIGHUP"):
            _signal = getattr(signal, _name, None)
            if _signal is not None and signal.getsignal(_signal) is not signal.SIG_IGN:  # nohup
                signal.signal(_signal, _leave)
    except KeyboardInterrupt:
        os._exit(130)

from .common import InputError  # noqa: E402  (after the handlers)

# Weights in huge pages: a step that reads them once is up to 1.4 times as fast. torch asks for them when it first
# allocates.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")

__version__ = "0.8.0"
__all__ = ["InputError", "Result", "STYLES", "Settings", "System", "Turn", "load_mas_system"]
_PLACES = {
    "Result": "result",
    "STYLES": "styles",
    "Settings": "settings",
    "System": "system",
    "Turn": "turn",
    "load_mas_system": "system",
}

if TYPE_CHECKING:  # what editors and type checkers see
    from .result import Result
    from .settings import Settings
    from .styles import STYLES
    from .system import System, load_mas_system
    from .turn import Turn


def __getattr__(name: str) -> object:
    # On first use: `import minimas` stays light, and `python -m minimas.recurse` finds its module not yet imported.
    if name not in _PLACES:
        raise AttributeError(f"module 'minimas' has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_PLACES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
