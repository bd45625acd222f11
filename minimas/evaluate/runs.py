"""What a run that may be killed and continued needs: the same settings, the same files, and the processes that share it.

Evaluation and training both use it.
"""

import hashlib
import os
from pathlib import Path

import torch

from ..common import InputError, no_op

LOADED = (".pt", ".safetensors", ".json", ".jinja")  # endings of the files that agents and links are loaded from


def fingerprint(given, out=None):
    """A hash of the files to be loaded from the local folders that --checkpoint names, "" if there are none.

    It takes their names, sizes, beginnings and ends, where a .pt file has checksums of all that it holds; it leaves out
    those in the folder `out`, which the command itself writes.
    """
    seen, found = hashlib.sha256(), False
    sources = [part if Path(part).expanduser().is_dir() else part.partition("=")[2] for part in given]  # a PATH, or ROLE=PATH
    for folder in (Path(source).expanduser().resolve() for source in sources):
        for file in sorted(folder.rglob("*")):
            if file.suffix in LOADED and file.is_file() and not (out and file.is_relative_to(out.resolve())):
                found = True
                seen.update(f"{file.relative_to(folder)} {file.stat().st_size} ".encode() + beginning_and_end(file))
    return seen.hexdigest()[:16] if found else ""


def beginning_and_end(file, n=1 << 16):
    """The first and the last n bytes of a file."""
    with open(file, "rb") as data:
        first = data.read(n)
        data.seek(max(0, file.stat().st_size - n))
        return first + data.read()


def unchanged(file, before, now, option):
    """Raise InputError if the run in `file` had other settings (before) than the one that is to continue it (now)."""
    if before.get("minimas") != now["minimas"]:
        raise InputError(f"{file} was written by minimas {before.get('minimas')}, and this is {now['minimas']}: continue it "
                         f"with that version, or give another name with {option}")
    changed = [f"{name}: {before.get(name)} there, {now.get(name)} now" for name in sorted({**before, **now})
               if before.get(name) != now.get(name)]
    if changed:
        raise InputError(f"{file} holds another run ({'; '.join(changed)}): give the same settings to continue it, "
                         f"or another name with {option}")


def join_others(args, backend=None, timeout=None):
    """Join the processes that torchrun started; returns (rank, number of processes, a function that waits for all).

    Each process takes the GPU of its local number. Raises InputError if there are too few, or --device names another.
    """
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if world == 1:
        return rank, world, no_op
    if args.device not in (None, "cpu", "cuda"):
        raise InputError(f"--device is {args.device}, but {world} processes take a GPU each: leave it out")
    if args.device != "cpu" and torch.cuda.is_available():
        local, gpus = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
        if local >= gpus:
            raise InputError(f"there are more processes than the {gpus} GPUs of this machine: start one for each GPU")
        args.device = f"cuda:{local}"
        torch.cuda.set_device(args.device)
    elif args.device == "cpu":
        backend = "gloo"  # on a machine with a GPU torch would join the processes through NCCL, too
    torch.distributed.init_process_group(backend, timeout=timeout)
    return rank, world, torch.distributed.barrier
