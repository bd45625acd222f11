"""Trains the links of a style on frozen agents, into folders that --checkpoint loads.

    python -m minimas.train system --style mine.json --data mine.jsonl --out runs/mine
    python -m minimas.train inner --style sequential_light --role planner --data mine.jsonl --out runs/planner
    python -m minimas.train outer --style sequential_light --data RecursiveMAS/Sequential-Math --out runs/links
    torchrun --nproc-per-node 4 -m minimas.train outer --style mixture --data mine.jsonl --out runs/links

options.json lists the options, and here is what they put together: examples.py reads the data, losses.py says what links
learn, ridge.py how they start, loop.py takes the steps, and save.py writes the released layout.
"""

import argparse
import math
import os
from functools import partial
from pathlib import Path

import torch

from ..agent import load_agent
from ..commands.failures import command
from ..commands.options import make_parser, names
from ..common import (
    InputError,
    check_known,
    checkpoints,
    no_op,
    pairs,
    read_json,
    warn,
    writable_file,
)
from ..evaluate.runs import depends_on, digest, join_others
from ..load import devices_by_role, links_task, load_outer_links, usable_dtype
from ..prompts import TASKS
from ..settings import Settings
from ..styles import style_named
from ..system import System
from .examples import load_examples
from .loop import Run, adamw, batch_of, files_of, fit
from .losses import InnerLoss, OuterLoss, checkpoint_activations
from .ridge import new_outer_links, read, set_inner_link, set_outer_link, start_gain
from .save import copy_agent, save_inner_link, save_outer_links, suffix

# What argparse takes, and two more: the `range` of a number, and `for`, the trainings that an option means something for
OPTIONS = read_json(Path(__file__).with_name("options.json"))
TYPES = {"int": int, "float": float, "Path": Path, "names": names}
NO_EFFECT_ON_WEIGHTS = (
    "out",
    "resume",
    "plot",
    "save_every",
    "device",
    "keep_activations",
)  # may change on --resume
MAX_SEED = 10**12  # `permutation` multiplies it by a million, and torch takes 64 bits
LESS_MEMORY = (  # what to try when memory runs out
    "a smaller --batch-size with more --accumulate, a shorter --max-length, or fewer --latent-steps"
)
TEACHER_LATENTS = 80  # states that a given text sends at most, as in the released recipe


# Options


def arguments():
    """The options; InputError if one means nothing for this kind of training, or its value is out of range."""
    parser = make_parser(
        "train", "Train the links of a recursive multi-agent system; its agents stay as they are."
    )
    for option, settings in OPTIONS.items():
        known = {
            name: TYPES[value] if name == "type" else value
            for name, value in settings.items()
            if name not in ("for", "range")
        }
        parser.add_argument(option, **known)
    args = parser.parse_args()
    for option, settings in OPTIONS.items():
        name = option.lstrip("-").replace("-", "_")
        value, expected = getattr(args, name), settings.get("range")
        if value != parser.get_default(name) and args.what not in settings.get("for", [args.what]):
            raise InputError(f"{option} means nothing for `train {args.what}`: leave it out")
        if (
            expected
            and value is not None
            and not (0 <= value < math.inf and (value or expected == "from 0 up"))
        ):
            raise InputError(f"{option} is {value}, expected a finite number {expected}")
    if abs(args.seed) > MAX_SEED:
        raise InputError(f"--seed is {args.seed}, expected a number below {MAX_SEED}")
    if args.steps is None:
        args.steps = 0 if args.what == "system" else 20000
    args.init = args.init or {"inner": "random"}.get(args.what, "ridge")
    return args


def checked(args):
    """The Style that args name; InputError if they do not describe a training."""
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
    if args.plot:
        writable_file("--plot", args.plot)
    if args.what != "inner":
        args.latent_steps = args.latent_steps or (
            TEACHER_LATENTS if args.latents == "teacher" else style.latent_steps
        )
        Settings(rounds=args.rounds, latent_steps=args.latent_steps).completed(
            style
        )  # refuse what is out of range now
    for stage, _ in stages(args, style):
        check_folder(stage, task_of_links(stage, style))
    return style


def stages(args, style):
    """The trainings that a command consists of: (its args, {role, or "links": folder or hub id} of what it loads) of each.

    A system has one training for the inner link of each role, and one for the outer links between the agents made so.
    InputError if a system would be written over the agents that it is made from.
    """
    links = ["links"] if args.init == "checkpoint" else []
    sources = style.sources(
        checkpoints(args.checkpoint),
        [args.role] if args.what == "inner" else [*style.order, *links],
    )
    if args.what != "system":
        return [(args, sources)]
    out = args.out.resolve()
    for role, base in sources.items():
        folder = Path(base).expanduser().resolve()
        if folder.is_dir() and (out.is_relative_to(folder) or folder.is_relative_to(out)):
            raise InputError(
                f"--out {args.out} is, holds or lies in the folder of {role}, {base}: give a folder of its own"
            )
    stage = lambda **changes: argparse.Namespace(**vars(args) | changes)
    made = {role: args.out / role for role in style.order}
    init = "random" if args.inner_steps else "ridge"
    inner = [
        (
            stage(what="inner", role=role, out=folder, steps=args.inner_steps, init=init),
            {role: sources[role]},
        )
        for role, folder in made.items()
    ]
    return [*inner, (stage(what="outer", out=args.out / "links"), made)]


def check_folder(args, task):
    """InputError if --out cannot be written to, or already holds links or a training that is not to be continued."""
    existing = next(place for place in (args.out, *args.out.absolute().parents) if place.exists())
    if not (existing.is_dir() and os.access(existing, os.W_OK)):
        raise InputError(
            f"--out {args.out} cannot be written ({existing} is a file or closed to you): give another folder"
        )
    if any(file.exists() for file in files_of(args.out, task)):
        if not args.resume:
            raise InputError(
                f"{args.out} already holds a training: continue it with --resume, or give another --out"
            )
        return
    pattern = (
        f"adapter{suffix(task)}.pt" if args.what == "inner" else f"*Outerlink{suffix(task)}.pt"
    )
    if there := sorted(args.out.glob(pattern)):
        raise InputError(
            f"{args.out} already holds {there[0].name}, which would be overwritten: give another --out"
        )


def task_of_links(args, style):
    """The task in the names of the links' files, None for a style with one set of links."""
    return links_task(args.task) if style.links_by_task else None


# What is trained on what


def roles_with_texts(args, style):
    """The roles whose texts a training uses."""
    if (
        args.what == "inner" and args.init != "ridge"
    ):  # in which an agent reads its turns in all rounds
        before = style.order[: style.order.index(args.role)]
        return [*(role for role in before if (role, args.role) in style.edges), args.role]
    return style.order if args.latents == "teacher" or args.init == "ridge" else style.order[-1:]


def load_system(args, style, sources):
    """The System of a training, its agents in the plain form: all with outer links, or the one whose inner link is trained.

    The links to train are new, or those of the checkpoint.
    """
    devices, new_inner = (
        devices_by_role(style.order, args.device),
        args.what == "inner" and args.init != "checkpoint",
    )
    agents = {
        role: load_agent(
            sources[role],
            args.task,
            devices[role],
            usable_dtype(args.dtype, devices[role]),
            plain=True,
            untrained=new_inner,
            role=role,
        )
        for role in style.order
        if role in sources
    }
    system = System(style, agents, {}, args.task)
    if "links" in sources:
        links = load_outer_links(sources["links"], args.task, style.edges, agents)
        system.outer_links = {edge: link.float() for edge, link in links.items()}
    elif args.what == "outer":
        system.outer_links = new_outer_links(style.edges, agents)
    return system


def prepare_inner(args, system, task, examples, known, ridge):
    """The objective of the agent's inner link, what saves that link, and the rows to train on: TargetTurns."""
    agent = system.agents[args.role]
    if agent.inner_link is None:
        raise InputError(
            f"the folder of {args.role} has no inner link to start from: leave out --init checkpoint"
        )
    link = agent.inner_link.float()
    if args.init == "random":
        start_gain(link, agent)
    elif ridge:
        set_inner_link(agent, readings_of(args, system, args.role, examples, known))
    turns = [example.turn(system.style, args.role) for example in examples]
    objective = InnerLoss(system, args.role, args.mse, args.max_length, args.date)
    return objective, partial(save_inner_link, args.out, system.style, task, link), turns


def prepare_outer(args, system, task, examples, known, ridge):
    """The objective of the outer links, what saves them, and the rows to train on: TrainExamples."""
    style, teacher = system.style, args.latents == "teacher"
    settings = Settings(
        rounds=args.rounds, latent_steps=args.latent_steps, date=args.date
    ).completed(style)
    system.check_links(settings)
    if ridge:
        for edge in style.edges:
            set_outer_link(system, edge, readings_of(args, system, edge[0], examples, known))
    objective = OuterLoss(system, settings, teacher, args.supervise_all, args.max_length)
    return objective, partial(save_outer_links, args.out, style, task, system.outer_links), examples


def readings_of(args, system, role, examples, known):
    """What `role` reads in all its turns of the first examples; it is read once for all links, and kept in `known`."""
    turns = tuple(
        one.turn(system.style, role, r)
        for one in examples[: args.ridge_rows]
        for r in range(1, len(one.texts[role]) + 1)
    )
    key = role, digest(turns)
    if key not in known:
        known[key] = read(system, role, turns, args.max_length, args.date)
    return known[key]


# The training


def settings_of(args, system, sources, rows, world):
    """All that the weights depend on, as JSON values."""
    options = {
        name: value for name, value in vars(args).items() if name not in NO_EFFECT_ON_WEIGHTS
    }
    options["dtypes"] = {
        role: str(agent.model.norm.weight.dtype) for role, agent in system.agents.items()
    }
    return depends_on(
        system.style, sources.values(), rows, options | {"processes": world}, args.out
    )


def train_links(args, style, sources, rank, world, known):
    """One training: of an inner link, or of all outer links; `sources` are those of `stages`."""
    examples = load_examples(
        args.data,
        style,
        roles_with_texts(args, style),
        pairs("--columns", args.columns),
        args.task,
        args.limit,
        answer_first=args.what == "outer",
        tell=warn if rank == 0 else no_op,
    )
    torch.manual_seed(
        args.seed
    )  # new links are drawn on the CPU, so that they are the same on every device
    prepare, task = (
        prepare_inner if args.what == "inner" else prepare_outer,
        task_of_links(args, style),
    )
    system = load_system(args, style, sources)
    ridge = (
        args.init == "ridge" and not files_of(args.out, task)[0].exists()
    )  # a resumed training has its links there
    objective, save_links, rows = prepare(args, system, task, examples, known, ridge)
    if not args.keep_activations:
        checkpoint_activations(system)
    if rank == 0:
        args.out.mkdir(parents=True, exist_ok=True)
        if args.what == "inner":
            copy_agent(sources[args.role], args.task, args.out)
    settings = settings_of(args, system, sources, rows, world)
    run = Run(args.out, task, settings, system.agents, objective, save_links, args.save_every, rank)

    def loss_at(step, part):
        number = (step * args.accumulate + part) * world + rank
        return objective(batch_of(rows, args.seed, number, args.batch_size))

    losses = fit(
        loss_at,
        [adamw(objective, args.lr)],
        args.steps,
        args.what,
        args.warm_up,
        args.clip,
        args.accumulate,
        run,
    )
    if rank == 0:
        run.report(losses, args.plot)


def main():
    args = arguments()
    style = checked(args)
    rank, world, wait = join_others(args)
    known = {}
    for stage, sources in stages(args, style):
        train_links(stage, style, sources, rank, world, known)
        wait()  # until its files are there
    if rank == 0 and args.what == "system":
        print(f"system of {args.style}: --checkpoint {args.out}")
    if world > 1:
        torch.distributed.destroy_process_group()


def run() -> None:
    """The command, from its arguments to its exit status."""
    command(main, LESS_MEMORY)


if __name__ == "__main__":
    run()
