"""minimas: recursive multi-agent systems (RecursiveMAS, arXiv 2604.25917) in plain PyTorch.

    import minimas
    system = minimas.load_mas_system("tiny")
    print(system.run(["7 +5 *3 -4 +8"])[0].answer)
"""

__version__ = "0.1.0"
__all__ = ["InputError", "Result", "STYLES", "Settings", "System", "load_mas_system"]


class InputError(ValueError):
    """What the user gave cannot be used; the message says what was found, what was expected and what to do."""


def check_known(what, found, known):
    """InputError if one of the names that were found is not known."""
    if unknown := [name for name in found if name not in [*known]]:  # a list: what was found may have no hash
        raise InputError(f"{what} {unknown[0]!r} is not known, expected one of {', '.join(known)}")


def __getattr__(name):
    # On first use: `import minimas` stays light, and `python -m minimas.recurse` finds its module not yet imported.
    if name in __all__:
        from . import recurse
        return getattr(recurse, name)
    raise AttributeError(f"module 'minimas' has no attribute {name!r}")
