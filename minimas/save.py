"""The released layout, written: what load.py reads again, file by file, each whole or not at all."""

import json
import os
import shutil

from . import InputError
from .hub import find
from .link import save_link
from .load import weight_files

SHARED = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja")  # and the weights


def write_whole(file, write):
    """Let write(path) fill a file beside `file`, which then takes its place."""
    partial = file.with_name(file.name + ".partial")
    write(partial)
    partial.replace(file)


def write_json(file, value):
    write_whole(file, lambda path: path.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8"))


def by_task(file, task, entry, **head):
    """Put a task's entry into a manifest of links, beside those of other tasks that are there."""
    before = json.loads(file.read_text(encoding="utf-8")).get("tasks", {}) if file.exists() else {}
    write_json(file, {"format_version": 1, **head, "tasks": before | {task: entry}})


def copy_agent(source, folder):
    """Put an agent's files into `folder`, where an inner link makes it whole; weights as hard links where that is possible.

    InputError where the folder holds another agent's.
    """
    folder.mkdir(parents=True, exist_ok=True)
    weights = weight_files(source)
    index = [find(source, "model.safetensors.index.json")] if weights[0].name != "model.safetensors" else []
    files = [find(source, name, required=False) for name in SHARED] + index + weights
    for file in filter(None, files):
        if (folder / file.name).exists():
            if (folder / file.name).stat().st_size != file.stat().st_size:
                raise InputError(f"{folder / file.name} is of another agent than {source}: give another folder")
            continue
        (link_or_copy if file in weights else copy)(file, folder / file.name)


def copy(file, target):
    write_whole(target, lambda path: shutil.copyfile(file, path))


def link_or_copy(file, target):
    try:
        os.link(file.resolve(), target)
    except OSError:  # another file system, or one without hard links
        copy(file, target)


def save_inner_link(folder, style, task, link):
    """Write an inner link into its agent's folder; task: math or code for a style with links for each, else None."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "adapter_config.json", {"adapter_type": link.adapter_type})
    save_link(link, folder / f"adapter{suffix(task)}.pt")
    if task:
        shared = {name: name for name in ("adapter_config.json", *SHARED, "model.safetensors") if (folder / name).exists()}
        by_task(folder / "innerlink_config.json", task, {"adapter.pt": f"adapter{suffix(task)}.pt", **shared}, paradigm=style.prompts)


def save_outer_links(folder, style, task, links):
    """Write the outer links of a style, {(source, target): OuterLink}, and their manifest; task as for inner links."""
    folder.mkdir(parents=True, exist_ok=True)
    adapters = []
    for (source, target), link in links.items():
        key, name = style.edges[source, target], f"{source.capitalize()}-{target.capitalize()}-Outerlink{suffix(task)}.pt"
        save_link(link, folder / name)
        adapters.append({"legacy_key": key, "legacy_filename": f"{key}.pt", "filename": name, "source_role": source, "target_role": target,
                         "adapter_type": link.adapter_type, "in_dim": link.residual_proj.in_features,
                         "out_dim": link.residual_proj.out_features})
    if task:
        by_task(folder / "outerlink_config.json", task, {"task": task, "adapters": adapters}, paradigm=style.prompts)
    else:
        write_json(folder / "outerlink_config.json", {"format_version": 1, "paradigm": style.prompts, "adapters": adapters})


def suffix(task):
    """What the names of a task's files end with."""
    return f"({task})" if task else ""
