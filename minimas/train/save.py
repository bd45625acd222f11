"""Writes the released layout, which load.py reads. Each file is written whole or not at all."""

import filecmp
import json
import shutil
from collections.abc import Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ..common import InputError, write_atomic
from ..link import InnerLink, OuterLink
from ..load import AGENT_FILES, agent_patterns, checkpoint_folder, weight_files
from ..styles import Style
from .folders import ADAPTER_CONFIG, INNER_MANIFEST, OUTER_MANIFEST, suffix, tasks_of


def write_json(file: Path, value: Any) -> None:
    text = json.dumps(value, indent=1) + "\n"
    write_atomic(file, lambda path: path.write_text(text, encoding="utf-8"))


def add_task(file: Path, paradigm: str, task: str, links: dict[str, Any]) -> None:
    """Set a task's entry in a manifest of links and keep the entries of other tasks."""
    tasks = tasks_of(file) | {task: links}
    write_json(file, {"format_version": 1, "paradigm": paradigm, "tasks": tasks})


def copy_agent(source: str | Path, task: str, folder: Path) -> None:
    """Put an agent's files (all but its links) into `folder`, so that only an inner link is missing there.

    Weights become hard links if the file system allows it. Files that are there already are kept. InputError if one is
    not equal to the agent's own; it is read whole then, unless it is that very file.
    """
    here = checkpoint_folder(source, *agent_patterns(task))
    weights = weight_files(here)
    others = {name: here / name for name in AGENT_FILES if (here / name).is_file()}
    for name, file in (others | weights).items():
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if target.exists():
            if not (target.samefile(file) or filecmp.cmp(target, file, shallow=False)):
                raise InputError(
                    f"{target} belongs to another agent than {source}: give another folder"
                )
            continue
        if name in weights:
            with suppress(OSError):  # another file system, or one without hard links
                target.hardlink_to(file.resolve())
        if not target.exists():
            write_atomic(target, partial(shutil.copyfile, file))


def write_state(state: Mapping[str, Any], path: Path) -> None:
    """torch.save, with an OSError as other files have it if the disk is full."""
    try:
        torch.save(state, path)
    except RuntimeError as e:  # torch's own file writer knows no other
        raise OSError(f"{path} cannot be written whole") from e


def save_link(link: torch.nn.Module, file: Path, dtype: torch.dtype = torch.bfloat16) -> None:
    """Write a link's state dict in the released format, in `dtype`."""
    state = {name: tensor.detach().to("cpu", dtype) for name, tensor in link.state_dict().items()}
    write_atomic(file, partial(write_state, state))


def save_inner_link(folder: Path, style: Style, task: str | None, link: InnerLink) -> None:
    """Write an inner link into its agent's folder; task is math or code if the style has links for each, else None."""
    write_json(folder / ADAPTER_CONFIG, {"adapter_type": link.adapter_type})
    file = f"adapter{suffix(task)}.pt"
    save_link(link, folder / file)
    if task:
        names = (ADAPTER_CONFIG, *AGENT_FILES, "model.safetensors")
        shared = {name: name for name in names if (folder / name).exists()}
        add_task(folder / INNER_MANIFEST, style.paradigm, task, {"adapter.pt": file, **shared})


def save_outer_links(
    folder: Path, style: Style, task: str | None, links: Mapping[tuple[str, str], OuterLink]
) -> None:
    """Write the outer links, {(source, target): OuterLink}, and their manifest; task is as in save_inner_link."""
    folder.mkdir(parents=True, exist_ok=True)
    adapters = []
    for (source, target), link in links.items():
        key = style.edges[source, target]
        name = f"{source.capitalize()}-{target.capitalize()}-Outerlink{suffix(task)}.pt"
        save_link(link, folder / name)
        adapter = {
            "legacy_key": key,
            "legacy_filename": f"{key}.pt",
            "filename": name,
            "source_role": source,
            "target_role": target,
            "adapter_type": link.adapter_type,
            "in_dim": link.residual_proj.in_features,
            "out_dim": link.residual_proj.out_features,
        }
        adapters.append(adapter)
    manifest = folder / OUTER_MANIFEST
    if task:
        add_task(manifest, style.paradigm, task, {"task": task, "adapters": adapters})
    else:
        whole = {"format_version": 1, "paradigm": style.paradigm, "adapters": adapters}
        write_json(manifest, whole)
