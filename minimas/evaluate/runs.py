"""What a run that may be killed and continued needs: the same settings, the same files, and the processes that share it.

Evaluation and training both use it.
"""

import hashlib
import json
import os
from pathlib import Path

import torch

from .. import __version__
from ..common import InputError, no_op

GRADING = ("graders", "graders_hash", "answers_hash")  # what verdicts depend on, and texts do not
LOADED = (
    ".pt",
    ".safetensors",
    ".json",
    ".jinja",
)  # endings of the files that agents and links are loaded from


def depends_on(style, sources, rows, settings, out=None):
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
    } | settings
    return json.loads(json.dumps(dependencies))  # as it will be read from a file: tuples are lists


def digest(value):
    """A short hash of a value, by its repr."""
    return hashlib.sha256(repr(value).encode()).hexdigest()[:16]


def fingerprint(sources, out=None):
    """A hash of hub ids, and of the files that would be loaded from the sources that are local folders; "" if there are none.

    It takes their names, sizes, beginnings and ends, where a .pt file has checksums of all that it holds; it leaves out
    those in the folder `out`. A folder within another one is not looked into: it may hold what a command writes.
    """
    seen = " ".join(
        str(source) for source in sources if not Path(source).expanduser().is_dir()
    ).encode()
    for folder in (Path(source).expanduser().resolve() for source in sources):
        for file in sorted([*folder.glob("*"), *folder.glob("additional_chat_templates/*")]):
            if (
                file.suffix in LOADED
                and file.is_file()
                and not (out and file.is_relative_to(out.resolve()))
            ):
                seen += (
                    f"{file.relative_to(folder)} {file.stat().st_size} ".encode()
                    + beginning_and_end(file)
                )
    return hashlib.sha256(seen).hexdigest()[:16] if seen else ""


def beginning_and_end(file, n=1 << 16):
    """The first and the last n bytes of a file."""
    with open(file, "rb") as data:
        first = data.read(n)
        data.seek(max(0, file.stat().st_size - n))
        return first + data.read()


def unchanged(file, before, now, option, regrade=False):
    """Raise InputError if the run in `file` had other dependencies (before) than the one that is to continue it (now).

    regrade: its texts are graded again, so that its grading and the version of minimas may differ.
    """
    if before.get("minimas") != now["minimas"] and not regrade:
        raise InputError(
            f"{file} was written by minimas {before.get('minimas')}, and this is {now['minimas']}: continue it "
            f"with that version, or give another name with {option}"
        )
    compared = {**before, **now}.keys() - ({*GRADING, "minimas"} if regrade else {})
    if changed := [name for name in sorted(compared) if before.get(name) != now.get(name)]:
        what = "; ".join(
            f"{name}: {before.get(name)} there, {now.get(name)} now" for name in changed
        )
        todo = (
            "grade its texts again with --regrade"
            if {*changed} <= {*GRADING}
            else "give the same settings to continue it"
        )
        raise InputError(
            f"{file} holds another run ({what}): {todo}, or another name with {option}"
        )


def join_others(args, backend=None, timeout=None):
    """Join the processes that torchrun started; returns (rank, number of processes, a function that waits for all).

    Each process takes the GPU of its local number. Raises InputError if there are too few, or --device names another.
    """
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if world == 1:
        return rank, world, no_op
    if args.device not in (None, "cpu", "cuda"):
        raise InputError(
            f"--device is {args.device}, but {world} processes take a GPU each: leave it out"
        )
    if args.device != "cpu" and torch.cuda.is_available():
        local, gpus = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
        if local >= gpus:
            raise InputError(
                f"there are more processes than the {gpus} GPUs of this machine: start one for each GPU"
            )
        args.device = f"cuda:{local}"
        torch.cuda.set_device(args.device)
    elif args.device == "cpu":
        backend = "gloo"  # on a machine with a GPU torch would join the processes through NCCL, too
    torch.distributed.init_process_group(backend, timeout=timeout)
    return rank, world, torch.distributed.barrier
