"""minimas: recursive multi-agent systems (RecursiveMAS, arXiv 2604.25917) in plain PyTorch.

import minimas
system = minimas.load_mas_system("tiny")
print(system.run(["7 +5 *3 -4 +8"])[0].answer)
"""

import os
from importlib import import_module
from typing import TYPE_CHECKING

from .common import InputError

# Weights in huge pages: a step that reads them once is up to 1.4 times as fast. torch asks for them when it first allocates.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")

__version__ = "0.3.0"
__all__ = ["InputError", "Result", "STYLES", "Settings", "System", "Turn", "load_mas_system"]
_PLACES = {
    "Result": "system",
    "STYLES": "styles",
    "Settings": "settings",
    "System": "system",
    "Turn": "turn",
    "load_mas_system": "system",
}

if TYPE_CHECKING:  # what editors and type checkers see
    from .settings import Settings
    from .styles import STYLES
    from .system import Result, System, load_mas_system
    from .turn import Turn


def __getattr__(name: str) -> object:
    # On first use: `import minimas` stays light, and `python -m minimas.recurse` finds its module not yet imported.
    if name not in _PLACES:
        raise AttributeError(f"module 'minimas' has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_PLACES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
