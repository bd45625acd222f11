"""Small things that every module may use: errors, warnings, checks of numbers, text and JSON, files.

It imports nothing but the standard library, so that `import minimas` stays light.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterable
from functools import cache
from numbers import Integral, Real
from pathlib import Path, PureWindowsPath
from types import UnionType
from typing import TYPE_CHECKING, Any, TypeGuard

if TYPE_CHECKING:
    import torch

MOST = 10**9  # of anything that is counted: more would run for ever, and not fit where torch counts
# The kinds of weights that linears may have instead of floats (quantize.py)
QUANTIZED = ("int8", "int4")
JSON_TYPES = {
    bool: "true or false",
    dict: "an object",
    list: "a list",
    str: "a string",
    int: "a whole number",
}


class InputError(ValueError):
    """What the user gave cannot be used; the message says what was found, what was expected and what to do."""


class Terminated(KeyboardInterrupt):
    """SIGTERM or SIGHUP, as a scheduler or a closed terminal sends it."""


def check_known(what: str, found: Iterable[object], known: Iterable[str]) -> None:
    """InputError if one of the names that were found is not known."""
    known = list(known)  # no set: what was found may be unhashable
    for name in found:
        if name not in known:
            raise InputError(
                f"{what} {name!r:.80} is not known, expected one of {', '.join(known)}"
            )


def check_type(name: str, value: object, types: type | UnionType, expected: str) -> None:
    """InputError unless a value is of one of these types; `expected` says in words which they are."""
    if not isinstance(value, types):
        raise InputError(f"{name} is {value!r:.80}, expected {expected}")


def check_whole(name: object, value: object, least: int | None) -> None:
    """InputError unless a value is a whole number from `least` to MOST; None sets no limits."""
    expected = "a whole number" if least is None else f"a whole number from {least} up"
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise InputError(f"{name} is {value!r:.80}, expected {expected}")
    if least is None:
        return
    if int(value) < least:
        raise InputError(f"{name} is {value!r}, expected {expected}")
    if int(value) > MOST:
        raise InputError(f"{name} is {value!r}, expected at most {MOST}")


def is_number(value: object) -> TypeGuard[float]:
    """Whether a value is a number, which True and False are not here."""
    return isinstance(value, Real) and not isinstance(value, bool)


def check_number(name: object, value: object, least: float) -> None:
    """InputError unless a value is a finite number, `least` or more."""
    if not is_number(value) or value < least or not value <= sys.float_info.max:
        raise InputError(f"{name} is {value!r:.80}, expected a number from {least} up")


def no_op(*_: object) -> None:
    """Default callback: does nothing."""


def warn(message: object) -> None:
    """Print a warning to stderr, if there is one."""
    if sys.stderr is not None:  # print would take stdout instead
        print(f"minimas: {message}", file=sys.stderr)


warn_once = cache(warn)  # each message once in a process


def out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that memory ran out: that of a GPU, of one of its libraries, or of the CPU."""
    if isinstance(error, MemoryError):
        return True
    message = str(error)
    return any(
        words in message for words in ("out of memory", "ALLOC_FAILED", "can't allocate memory")
    )


def upcast(x: torch.Tensor) -> torch.Tensor:
    """A tensor in float32 if it is narrower. float64 stays, so that a whole run can be checked in it."""
    return x.float() if x.dtype.itemsize < 4 else x


def state_of(tensor: torch.Tensor) -> tuple[int, int, int | None]:
    """What tells whether a tensor was replaced or changed: itself, its place in memory, and how often it was changed.

    A change in place of `tensor.data` is not counted by torch, nor is any of a tensor that was made in inference mode.
    """
    changes = None if tensor.is_inference() else tensor._version
    return id(tensor), tensor.data_ptr(), changes


# Text and JSON


def check_text(text: str, what: object) -> None:
    """InputError if a text holds a lone surrogate, which no tokenizer and no file can take."""
    try:
        text.encode()
    except UnicodeEncodeError as e:
        raise InputError(
            f"{what} is not valid text (a lone surrogate at character {e.start}): "
            "correct it and save it as UTF-8"
        ) from e


def parse_json(
    data: str | bytes,
    place: object,
    make_object: Callable[[list[tuple[str, Any]]], dict] | None = None,
) -> Any:
    """The value of a JSON text or of its bytes; InputError names the place if it is not valid JSON in UTF-8.

    make_object   makes the dict of an object from its pairs of key and value, if a key that comes twice matters
    """
    try:
        text = data if isinstance(data, str) else data.decode("utf-8-sig")
        value = json.loads(text, object_pairs_hook=make_object)
    except (ValueError, RecursionError) as e:  # RecursionError: brackets thousands deep
        raise InputError(
            f"{place} is not readable JSON ({e}): correct it and save it as UTF-8, or fetch it again"
        ) from e
    if "\\u" in text:  # only an escape can spell a lone surrogate
        check_text(json.dumps(value, ensure_ascii=False), place)
    return value


class Repeated(dict):
    """An object in JSON in which a key stands twice.

    key            the first such key
    values_of_key  what it stands for, in order
    """

    def __init__(self, pairs: list[tuple[str, Any]]) -> None:
        super().__init__(pairs)
        self.key: str = first_repeated(key for key, _ in pairs)
        self.values_of_key = [value for key, value in pairs if key == self.key]


def parse_unique(data: str | bytes, place: object) -> Any:
    """The value of JSON; InputError if it is damaged, or if an object at any depth has a key twice."""
    value, repeated = parse_with_repeated(data, place)
    if repeated:
        raise twice(place, repeated[0])
    return value


def parse_with_repeated(data: str | bytes, place: object) -> tuple[Any, list[Repeated]]:
    """The value of JSON, and the objects in it that have a key twice, at any depth."""
    repeated: list[Repeated] = []

    def make_object(pairs: list[tuple[str, Any]]) -> dict:
        made = dict(pairs)
        if len(made) == len(pairs):
            return made
        found = Repeated(pairs)
        repeated.append(found)
        return found

    value = parse_json(data, place, make_object)
    return value, repeated


def first_repeated(names: Iterable[Any]) -> Any:
    """The first name that comes a second time, "" if none does."""
    seen = set()
    for name in names:
        if name in seen:
            return name
        seen.add(name)
    return ""


def twice(place: object, found: Repeated) -> InputError:
    """The error for an object that has a key twice."""
    values = " and ".join(f"{value!r:.40}" for value in found.values_of_key[:2])
    return InputError(
        f"{place} has the key {found.key!r} twice in one object, for {values}, expected it once: "
        "remove or rename one of the two"
    )


def read_json(file: Path) -> dict[str, Any]:
    """The object in a JSON file; InputError if the file holds anything else."""
    value = parse_json(file.read_bytes(), file)
    if not isinstance(value, dict):
        raise InputError(f"{file} holds a {type(value).__name__}, expected a JSON object")
    return value


def entry(file: object, value: Any, *path: str, type_: type) -> Any:
    """value[path[0]][path[1]]... of a JSON file, of `type_`; InputError names what is missing or of another type."""
    name = ".".join(path)
    for key in path:
        if not isinstance(value, dict) or key not in value:
            raise InputError(
                f"{file} has no {name}: expected a file of the released layout; fetch it again"
            )
        value = value[key]
    if type(value) is not type_:
        raise InputError(
            f"{file}: {name} is {value!r:.80}, expected {JSON_TYPES[type_]}; fetch the file again"
        )
    return value


# Files


def local_path(name: str | Path) -> Path:
    """The path that a user wrote, ~ being the home folder. It stays if there is no such user; Path would raise."""
    return Path(os.path.expanduser(name))


def required(folder: Path, name: str) -> Path:
    """The path of a file that a folder must have. A manifest may not name one outside of its folder."""
    path = PureWindowsPath(name)  # the stricter kind of path: both slashes, and drives
    if path.anchor or ".." in path.parts:
        raise InputError(
            f"a manifest of {folder} names a file outside, {name!r}: expected a path within; fetch it again"
        )
    file = folder / name
    if not file.is_file():
        raise InputError(
            f"{folder} has no {name}: a checkpoint in the released layout needs it; fetch the folder again"
        )
    return file


def write_atomic(file: Path, write: Callable[[Path], object]) -> None:
    """Let write(path) fill a temporary file beside `file`, then put it in the place of `file`: all of it or nothing."""
    partial = file.with_name(file.name + ".partial")
    try:
        write(partial)
        partial.replace(file)
    finally:
        partial.unlink(missing_ok=True)  # it is there if writing failed
