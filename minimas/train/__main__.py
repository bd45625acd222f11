"""Trains the links of a style on frozen agents, into folders that --checkpoint loads.

    python -m minimas.train system --style mine.json --data mine.jsonl --out runs/mine
    python -m minimas.train inner --style sequential_light --role planner --data mine.jsonl --out runs/planner
    python -m minimas.train outer --style sequential_light --data RecursiveMAS/Sequential-Math --out runs/links
    torchrun --nproc-per-node 4 -m minimas.train outer --style mixture --data mine.jsonl --out runs/links

options.json lists the options. links.py is one training. It puts together: examples.py reads the data, losses.py says
what links learn, ridge.py how they start, loop.py takes the steps, and save.py writes the released layout.
"""

import argparse
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..commands.failures import command
from ..commands.options import make_parser, names
from ..common import InputError, check_known, checkpoints, read_json, writable_file
from ..prompts import TASKS
from ..runs.lock import Lock, held
from ..runs.processes import join, launched, leave
from ..settings import Settings
from ..styles import Style, style_named

# What argparse takes, and two more: the `range` of a number, and `for`, the trainings that an option is for
OPTIONS = read_json(Path(__file__).with_name("options.json"))
TYPES = {"int": int, "float": float, "Path": Path, "names": names}
MAX_SEED = 10**12  # `permutation` multiplies it by a million, and torch takes 64 bits
TEACHER_LATENTS = 80  # states that a given text sends at most, as in the released recipe


# Options


def arguments() -> argparse.Namespace:
    """The options; InputError if one means nothing for this kind of training, or its value is out of range."""
    parser = make_parser(
        "train", "Train the links of a recursive multi-agent system; its agents stay as they are."
    )
    for option, settings in OPTIONS.items():
        known = {
            name: value for name, value in settings.items() if name not in ("for", "range", "type")
        }
        if "type" in settings:
            known["type"] = TYPES[settings["type"]]
        parser.add_argument(option, **known)
    args = parser.parse_args()
    for option, settings in OPTIONS.items():
        name = option.lstrip("-").replace("-", "_")
        value = getattr(args, name)
        if value != parser.get_default(name) and args.what not in settings.get("for", [args.what]):
            raise InputError(f"{option} means nothing for `train {args.what}`: leave it out")
        if "range" in settings and value is not None:
            check_range(option, value, settings["range"])
    if abs(args.seed) > MAX_SEED:
        raise InputError(f"--seed is {args.seed}, expected a number below {MAX_SEED}")
    if args.steps is None:
        args.steps = 0 if args.what == "system" else 20000
    args.init = args.init or {"inner": "random"}.get(args.what, "ridge")
    return args


def check_range(option: str, value: float, expected: str) -> None:
    """InputError if a number is not finite, or not in the range that options.json expects."""
    enough = value >= 0 if expected == "from 0 up" else value > 0
    if not enough or value == math.inf:
        raise InputError(f"{option} is {value}, expected a finite number {expected}")


def checked(args: argparse.Namespace) -> Style:
    """The Style that args name; InputError if they do not describe a training, or outputs cannot be written."""
    style = style_named(args.style)
    args.task = args.task or style.task
    check_known("task", [args.task], TASKS)
    if args.what == "inner" and args.role not in style.order:
        raise InputError(
            f"--role is {args.role!r}, expected the inner link's: one of {', '.join(style.order)}"
        )
    if args.what != "inner" and not style.edges:
        raise InputError(
            f"style {args.style} has no edges, so that there is no outer link to train"
        )
    if args.what == "inner" and args.init == "ridge" and args.steps:
        raise InputError(
            "--init ridge gives an inner link weights on a scale that steps cannot improve: add --steps 0, or "
            "train it from --init random"
        )
    if args.what != "inner":
        default = TEACHER_LATENTS if args.latents == "teacher" else style.latent_steps
        args.latent_steps = args.latent_steps or default
        settings = Settings(rounds=args.rounds, latent_steps=args.latent_steps)
        settings.completed(style)  # refuse what is out of range now
    check_outputs(args)
    return style


def check_outputs(args: argparse.Namespace) -> None:
    """InputError if --out or --plot cannot be written, or --plot is the file of the data."""
    existing = next(place for place in (args.out, *args.out.absolute().parents) if place.exists())
    if not (existing.is_dir() and os.access(existing, os.W_OK)):
        raise InputError(
            f"--out {args.out} cannot be written ({existing} is a file or closed to you): give another folder"
        )
    if args.plot:
        if args.plot.expanduser().resolve() == Path(args.data).expanduser().resolve():
            raise InputError(f"--plot and --data are the same file, {args.plot}: give another name")
        writable_file("--plot", args.plot)


Stage = tuple[argparse.Namespace, Mapping[str, str | Path]]


def stages(args: argparse.Namespace, style: Style) -> list[Stage]:
    """The trainings of a command: of each its args, and {role, or "links": folder or hub id} of what it loads.

    A system has one training for the inner link of each role, and one for the outer links between the agents made so.
    InputError if a system would be written over the agents that it is made from.
    """
    needed = [args.role] if args.what == "inner" else list(style.order)
    if args.what != "inner" and args.init == "checkpoint":
        needed.append("links")
    sources = style.sources(checkpoints(args.checkpoint), needed)
    if args.what != "system":
        return [(args, sources)]
    check_apart(args.out, sources)
    made = {role: args.out / role for role in style.order}
    trainings: list[Stage] = []
    for role, folder in made.items():
        inner = changed(
            args,
            what="inner",
            role=role,
            out=folder,
            steps=args.inner_steps,
            init="random" if args.inner_steps else "ridge",
        )
        trainings.append((inner, {role: sources[role]}))
    trainings.append((changed(args, what="outer", out=args.out / "links"), made))
    return trainings


def changed(args: argparse.Namespace, **changes: Any) -> argparse.Namespace:
    """A copy of args with some values changed."""
    return argparse.Namespace(**(vars(args) | changes))


def check_apart(out: Path, sources: Mapping[str, str | Path]) -> None:
    """InputError if a system would be written over the agents that it is made from."""
    place = out.resolve()
    for role, base in sources.items():
        folder = Path(base).expanduser().resolve()
        if folder.is_dir() and (place.is_relative_to(folder) or folder.is_relative_to(place)):
            raise InputError(
                f"--out {out} is, holds or lies in the folder of {role}, {base}: give a folder of its own"
            )


# The command


def outputs(args: argparse.Namespace, trainings: list[Stage]) -> list[Lock]:
    """A Lock for each folder and file that a command writes."""
    folders = [args.out]  # of a system; each training within locks its own, as if it were alone
    folders += [stage.out for stage, _ in trainings if stage.out != args.out]
    locks = [Lock("--out", folder, folder=True) for folder in folders]
    if args.plot:
        locks.append(Lock("--plot", args.plot))
    return locks


def main() -> None:
    args = arguments()
    style = checked(args)
    processes = launched()
    trainings = stages(args, style)
    with held(outputs(args, trainings), processes.rank):
        from . import (
            links,
        )  # with torch, after the outputs are held: a run that is refused ends at once

        for stage, _ in trainings:
            links.check_folder(stage, style)
        device, wait = join(processes, args.device)
        known: links.Known = {}
        for stage, sources in trainings:
            stage.device = device
            links.train_links(stage, style, sources, processes, known)
            wait()  # until its files are there
        if processes.rank == 0 and args.what == "system":
            print(f"system of {args.style}: --checkpoint {args.out}")
        leave(processes)


LESS_MEMORY = (  # what to try when memory runs out
    "a smaller --batch-size with more --accumulate, a shorter --max-length, or fewer --latent-steps"
)


def run() -> None:
    """The command, from its arguments to its exit status."""
    command(main, LESS_MEMORY)


if __name__ == "__main__":
    run()
