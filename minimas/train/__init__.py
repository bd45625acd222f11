"""Training from Python (docs/training.md); `python -m minimas.train` is the command.

A training is one call:

    from minimas.train import TrainSettings, train_outer
    links = train_outer(system, examples, TrainSettings(steps=200))
"""

from importlib import import_module
from typing import TYPE_CHECKING

__all__ = ["TrainSettings", "load_examples", "train_inner", "train_outer", "train_system"]
_PLACES = {
    "TrainSettings": "settings",
    "load_examples": "examples",
    "train_inner": "links",
    "train_outer": "links",
    "train_system": "system",
}

if TYPE_CHECKING:  # what editors and type checkers see
    from .examples import load_examples
    from .links import train_inner, train_outer
    from .settings import TrainSettings
    from .system import train_system


def __getattr__(name: str) -> object:
    # On first use: torch takes seconds
    if name not in _PLACES:
        raise AttributeError(f"module 'minimas.train' has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_PLACES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
