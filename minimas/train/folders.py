"""The folders that trainings write: the names of their files, and what is checked before anything is loaded."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..common import InputError, entry, local_path, read_json
from ..runs.lock import Lock
from ..styles import Style

# Of links for each task, in the folder of an agent and in that of outer links
INNER_MANIFEST = "innerlink_config.json"
OUTER_MANIFEST = "outerlink_config.json"
ADAPTER_CONFIG = "adapter_config.json"  # of an inner link


def suffix(task: str | None) -> str:
    """What the names of a task's files end with, before the extension."""
    return f"({task})" if task else ""


def files_of(folder: Path, task: str | None) -> tuple[Path, Path]:
    """The state and the metrics of a training in a folder; task is None, math or code, as in save_outer_links.

    The metrics are there from the start: with them, but without a state, a training was killed before it kept one.
    """
    return folder / f"training{suffix(task)}.pt", folder / f"metrics{suffix(task)}.jsonl"


def inner_link_files(folder: Path) -> list[Path]:
    """What trainings of inner links write among the files of their agent: links of all tasks, and what names them.

    The state and the metrics are those of `files_of`.
    """
    names = [ADAPTER_CONFIG, INNER_MANIFEST]
    names += [f"adapter{suffix(task)}.pt" for task in (None, "math", "code")]
    return [folder / name for name in names]


def tasks_of(manifest: Path) -> dict[str, Any]:
    """{task: its links} of a manifest, {} if it is not there; InputError if it is damaged."""
    if not manifest.exists():
        return {}
    return entry(manifest, read_json(manifest), "tasks", type_=dict)


def parts_of(out: Path, style: Style) -> dict[str, Path]:
    """{role, or "links": its folder} in the folder of a whole system."""
    return {name: out / name for name in (*style.order, "links")}


def locks_of(what: str, out: Path, style: Style, lent: bool = False) -> list[Lock]:
    """A Lock for each folder that a training writes."""
    folders = [out]
    if what == "system":
        folders += parts_of(out, style).values()
    return [Lock("--out", folder, folder=True, lent=lent) for folder in folders]


# Checks


def check_out(out: Path) -> None:
    """InputError if a folder cannot be written."""
    existing = next(place for place in (out, *out.absolute().parents) if place.exists())
    if not (existing.is_dir() and os.access(existing, os.W_OK)):
        raise InputError(
            f"--out {out} cannot be written ({existing} is a file or closed to you): give another folder"
        )


def check_apart(out: Path, sources: Mapping[str, str | Path]) -> None:
    """InputError if links or a system would be written among the files of the agents that they are made from."""
    place = out.resolve()
    for role, base in sources.items():
        folder = local_path(base).resolve()
        if folder.is_dir() and (place.is_relative_to(folder) or folder.is_relative_to(place)):
            raise InputError(
                f"--out {out} is, holds or lies in the folder of {role}, {base}: give a folder of its own"
            )


def check_new_or_resumed(
    what: str, out: Path, style: Style, task: str | None, resume: bool
) -> None:
    """InputError if what a training writes is there already, unless it is a training that is to be continued.

    task   in the names of the links' files
    """
    if what != "system":
        check_folder(out, what == "inner", task, resume)
        return
    for name, folder in parts_of(out, style).items():
        check_folder(folder, name != "links", task, resume)


def check_folder(out: Path, inner: bool, task: str | None, resume: bool) -> None:
    """InputError if a folder holds an inner link or outer links, or a training that is not to be continued."""
    if task:
        tasks_of(out / (INNER_MANIFEST if inner else OUTER_MANIFEST))  # it will be added to
    if any(file.exists() for file in files_of(out, task)):
        if not resume:
            raise InputError(
                f"{out} already holds a training: continue it with --resume, or give another --out"
            )
        return
    beginning = "adapter" if inner else "*Outerlink"
    there = sorted(out.glob(f"{beginning}{suffix(task)}.pt"))
    if there:
        raise InputError(
            f"{out} already holds {there[0].name}, which would be overwritten: give another --out"
        )
