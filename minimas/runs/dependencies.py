"""What a run depends on: one that was killed is continued only with the same settings and the same files."""

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from .. import __version__
from ..common import InputError, local_path
from ..styles import Style

GRADING = ("graders", "graders_hash", "answers_hash")  # what verdicts depend on, and texts do not
LOADED = (".pt", ".safetensors", ".json", ".jinja")  # files that agents and links are loaded from
EDGE = 1 << 16  # bytes of a file's beginning, and of its end, that are compared


def depends_on(
    style: Style,
    sources: Iterable[str | Path],
    rows: Any,
    settings: Mapping[str, Any],
    out: Path | None = None,
) -> dict[str, Any]:
    """All that the results of a run depend on, as JSON values: it may be continued only where they are the same.

    sources   the folders or hub ids of agents and links; a hub id counts by its name
    rows      what agents read or learn
    settings  {name: value} of all else
    out       the folder that the command itself writes
    """
    dependencies = {
        "minimas": __version__,
        "style_hash": digest([style.order, style.edges, style.prompts]),
        "checkpoint_files": fingerprint(sources, out),
        "rows_hash": digest(rows),
        **settings,
    }
    return json.loads(json.dumps(dependencies))  # as it will be read from a file: tuples are lists


def digest(value: object) -> str:
    """A short hash of a value, by its repr."""
    return hashlib.sha256(repr(value).encode()).hexdigest()[:16]


def fingerprint(sources: Iterable[str | Path], out: Path | None = None) -> str:
    """A hash of hub ids, and of the files that would be loaded from sources that are folders; "" if there are none.

    It takes their names, sizes, beginnings and ends, where a .pt file has checksums of all that it holds; it leaves out
    those in the folder `out`. A folder within another one is not looked into: it may hold what a command writes.
    """
    given = list(sources)
    hub_ids = [str(source) for source in given if not local_path(source).is_dir()]
    paths = [local_path(source).resolve() for source in given]
    seen = " ".join(hub_ids).encode()
    for folder in filter(Path.is_dir, paths):
        for file in files_loaded_from(folder):
            if out and file.is_relative_to(out.resolve()):
                continue
            seen += f"{file.relative_to(folder)} {file.stat().st_size} ".encode()
            seen += beginning_and_end(file)
    return hashlib.sha256(seen).hexdigest()[:16] if seen else ""


def files_loaded_from(folder: Path) -> list[Path]:
    """The files of a folder that an agent or links would be loaded from, in order.

    The state of a training is none of them. Its bytes differ, and its numbers do not, if it was killed and resumed.
    """
    files = sorted([*folder.glob("*"), *folder.glob("additional_chat_templates/*")])
    states = set(folder.glob("training*.pt"))
    loaded = [file for file in files if file.suffix in LOADED and file.is_file()]
    return [file for file in loaded if file not in states]


def beginning_and_end(file: Path) -> bytes:
    """The first and the last bytes of a file."""
    with open(file, "rb") as data:
        first = data.read(EDGE)
        data.seek(max(0, file.stat().st_size - EDGE))
        return first + data.read()


def unchanged(
    file: Path,
    before: Mapping[str, Any],
    now: Mapping[str, Any],
    option: str,
    regrade: bool = False,
) -> None:
    """Raise InputError if the run in `file` had other dependencies (before) than the one that is to continue it (now).

    regrade: its texts are graded again, so that its grading and the version of minimas may differ.
    """
    if before.get("minimas") != now["minimas"] and not regrade:
        raise InputError(
            f"{file} was written by minimas {before.get('minimas')}, and this is {now['minimas']}: continue it "
            f"with that version, or give another name with {option}"
        )
    compared = before.keys() | now.keys()
    if regrade:
        compared -= {*GRADING, "minimas"}
    changed = [name for name in sorted(compared) if before.get(name) != now.get(name)]
    if not changed:
        return
    found = [f"{name}: {before.get(name)} there, {now.get(name)} now" for name in changed]
    todo = "give the same settings to continue it"
    if set(changed) <= set(GRADING):
        todo = "grade its texts again with --regrade"
    raise InputError(
        f"{file} holds another run ({'; '.join(found)}): {todo}, or another name with {option}"
    )
