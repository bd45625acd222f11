"""minimas: recursive multi-agent systems (RecursiveMAS, arXiv 2604.25917) in plain PyTorch.

import minimas
system = minimas.load_mas_system("tiny")
print(system.run(["7 +5 *3 -4 +8"])[0].answer)
"""

import os

from .common import InputError

# Weights in huge pages: a step that reads them once is up to 1.4 times as fast. torch asks for them when it first allocates.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")

__version__ = "0.3.0"
__all__ = ["InputError", "Result", "STYLES", "Settings", "System", "load_mas_system"]


def __getattr__(name):
    # On first use: `import minimas` stays light, and `python -m minimas.recurse` finds its module not yet imported.
    if name in __all__:
        from . import system

        return getattr(system, name)
    raise AttributeError(f"module 'minimas' has no attribute {name!r}")
