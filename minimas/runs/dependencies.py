"""What a run depends on: one that was killed is continued only with the same settings and the same files."""

import hashlib
import json
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from .. import __version__
from ..common import InputError, local_path
from ..styles import Style

GRADING = ("graders", "graders_hash", "answers_hash")  # what verdicts depend on, and texts do not
LOADED = (".pt", ".safetensors", ".json", ".jinja")  # files that agents and links are loaded from
WHOLE = 1 << 26  # bytes of the largest file that is compared whole
BLOCK = 1 << 12  # bytes of each block of a larger one that are compared
BLOCKS = 1 << 12  # blocks of what is too large to be compared whole


def depends_on(
    style: Style,
    sources: Iterable[str | Path],
    rows: Any,
    settings: Mapping[str, Any],
    written: Collection[Path] = (),
) -> dict[str, Any]:
    """All that the results of a run depend on, as JSON values: it may be continued only where they are the same.

    sources   the folders or hub ids of agents and links; a hub id counts by its name
    rows      what agents read or learn
    settings  {name: value} of all else
    written   files that the command itself writes, perhaps among those of an agent
    """
    dependencies = {
        "minimas": __version__,
        "style_hash": digest([style.order, style.edges, style.prompts]),
        "checkpoint_files": fingerprint(sources, written),
        "rows_hash": digest(rows),
        **settings,
    }
    return json.loads(json.dumps(dependencies))  # as it will be read from a file: tuples are lists


def digest(value: object) -> str:
    """A short hash of a value, by its repr."""
    return hashlib.sha256(repr(value).encode()).hexdigest()[:16]


def fingerprint(sources: Iterable[str | Path], written: Collection[Path] = ()) -> str:
    """A hash of hub ids, and of the files that would be loaded from sources that are folders; "" if there are none.

    It takes the names, sizes and bytes of files, of a large one those of `bytes_compared`. It leaves out the files
    `written`. A folder within another one is not looked into: it may hold what a command writes. A folder that is given
    several times, as that of several roles, counts each time and is read once.
    """
    left_out = {file.resolve() for file in written}
    hub_ids = []
    folders = []
    for source in sources:
        folder = local_path(source).resolve()
        if folder.is_dir():
            folders.append(folder)
        else:
            hub_ids.append(str(source))
    hashes = {folder: hash_of_files(folder, left_out) for folder in set(folders)}
    if not hub_ids and not any(hashes.values()):
        return ""
    return digest([hub_ids, [hashes[folder] for folder in folders]])


def hash_of_files(folder: Path, left_out: Collection[Path]) -> str:
    """A hash of the files that would be loaded from a folder, but for those left out; "" if there are none."""
    files = [file for file in files_loaded_from(folder) if file not in left_out]
    if not files:
        return ""
    seen = hashlib.sha256()
    for file in files:
        seen.update(f"{file.relative_to(folder)} {file.stat().st_size} ".encode())
        for data in bytes_compared(file):
            seen.update(data)
    return seen.hexdigest()


def files_loaded_from(folder: Path) -> list[Path]:
    """The files of a folder that an agent or links would be loaded from, in order.

    The state of a training is none of them. Its bytes differ, and its numbers do not, if it was killed and resumed.
    """
    files = sorted([*folder.glob("*"), *folder.glob("additional_chat_templates/*")])
    states = set(folder.glob("training*.pt"))
    loaded = [file for file in files if file.suffix in LOADED and file.is_file()]
    return [file for file in loaded if file not in states]


def bytes_compared(file: Path) -> Iterator[bytes]:
    """All bytes of a file up to 64 MiB; of a larger one 4,096 blocks of 4 KiB, as `starts_of_blocks` spreads them.

    So a change of 1.2 MB in a row is always seen in 5 GB.
    """
    size = file.stat().st_size
    with open(file, "rb") as data:
        if size <= WHOLE:
            while block := data.read(1 << 20):
                yield block
            return
        for start in starts_of_blocks(size, BLOCK):
            data.seek(start)
            yield data.read(BLOCK)


def starts_of_blocks(size: int, block: int) -> list[int]:
    """Where 4,096 blocks of the length `block` begin, spread evenly from the beginning of `size` items to their end.

    A change of size/4096 items in a row always meets one of them. A shorter one may lie between two.
    """
    return [i * (size - block) // (BLOCKS - 1) for i in range(BLOCKS)]


def check_unchanged(
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
