"""Trains the links of a style on frozen agents, into folders that --checkpoint loads.

    python -m minimas.train system --style mine.json --data mine.jsonl --out runs/mine
    python -m minimas.train inner --style sequential_light --role planner --data mine.jsonl --out runs/planner
    python -m minimas.train outer --style sequential_light --data RecursiveMAS/Sequential-Math --out runs/links
    torchrun --nproc-per-node 4 -m minimas.train outer --style mixture --data mine.jsonl --out runs/links

Here are the options and what they put together: examples.py reads the data, losses.py says what links learn, ridge.py
how they start, loop.py takes the steps, and save.py writes the released layout.
"""

import argparse
import math
import os
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import torch
from torch import distributed
from torch.nn.parallel import DistributedDataParallel

from ..agent import load_agent
from ..cli import checkpoints, command, make_parser, names, out_of_memory, pairs, writable_file
from ..common import InputError, no_op, warn
from ..evaluate.runs import depends_on, digest, join_others
from ..link import OuterLink
from ..load import devices_by_role, links_task, load_outer_links, usable_dtype
from ..prompts import TASKS
from ..recurse import System
from ..styles import Settings, style_named
from .examples import load_examples
from .loop import Run, adamw, batch_of, files_of, fit
from .losses import MAX_POSITIONS, InnerLoss, OuterLoss, checkpoint_activations
from .ridge import read, set_inner_link, set_outer_link, start_gain
from .save import copy_agent, save_inner_link, save_outer_links, suffix

NOT_NEGATIVE = ("steps", "inner_steps", "mse", "supervise_all")
POSITIVE = ("batch_size", "accumulate", "rounds", "latent_steps", "limit", "ridge_rows", "max_length", "save_every",
            "warm_up", "lr", "clip")
NO_EFFECT_ON_WEIGHTS = ("out", "resume", "plot", "save_every", "device", "keep_activations")  # may change on --resume
NOT_FOR = {"role": ("outer", "system"), "mse": ("outer",), "inner_steps": ("inner", "outer"), "rounds": ("inner",),
           "latents": ("inner",), "latent_steps": ("inner",), "supervise_all": ("inner",), "init": ("system",)}
MAX_SEED = 10 ** 12  # `permutation` multiplies it by a million, and torch takes 64 bits
TEACHER_LATENTS = 80  # states that a given text sends at most, as in the released recipe


# Options

def arguments():
    parser = make_parser("train", "Train the links of a recursive multi-agent system; its agents stay as they are.")
    add = parser.add_argument
    add("what", choices=("inner", "outer", "system"),
        help="the inner link of one role, all outer links of a style together, or first the ones and then the others")
    add("--role", help="inner: the role whose link is trained")
    add("--data", required=True, help="a .json, .jsonl or .csv file, a hub id (RecursiveMAS/Sequential-Math), or tiny")
    add("--columns", type=names, default=(), metavar="question=COLUMN,...",
        help="the data's names for question, fn_name, type, task_family, or a role's text")
    add("--limit", type=int, help="read only this many rows")
    add("--task", choices=TASKS, help="of rows that do not name theirs, and of the links (default: the style's, mostly math)")
    add("--out", type=Path, required=True, help="the folder to write")
    add("--resume", action="store_true", help="continue the training in --out that was killed")
    add("--save-every", type=int, default=100, help="steps between two saved states (default 100)")
    add("--plot", type=Path, help="an SVG file for the loss curve")
    add_steps(add)
    add_losses(add)
    args = parser.parse_args()
    for name, kinds in NOT_FOR.items():
        if args.what in kinds and getattr(args, name) != parser.get_default(name):
            raise InputError(f"--{name.replace('_', '-')} means nothing for `train {args.what}`: leave it out")
    if args.steps is None:
        args.steps = 0 if args.what == "system" else 20000
    args.init = args.init or {"inner": "random"}.get(args.what, "ridge")
    return args


def add_steps(add):
    """The options of the steps."""
    add("--steps", type=int, help="0 writes the links as they start (default 20000, system: 0)")
    add("--inner-steps", type=int, default=0, help="system: steps of inner links, 0 takes the ridge regression (default 0)")
    add("--batch-size", type=int, default=2, help="rows at once in each process (default 2)")
    add("--accumulate", type=int, default=1, help="batches per step (default 1)")
    add("--lr", type=float, default=5e-4, help="highest learning rate (default 5e-4)")
    add("--warm-up", type=int, default=10, help="steps in which it rises, before a cosine takes it to 0 (default 10)")
    add("--clip", type=float, default=1.0, help="largest norm of a step's gradient (default 1)")
    add("--max-length", type=int, default=MAX_POSITIONS,
        help=f"positions of a prompt with its text; texts are cut to fit, prompts never (default {MAX_POSITIONS})")
    add("--keep-activations", action="store_true", help="no activation checkpointing: faster, but takes more memory")


def add_losses(add):
    """The options of the losses, and of how links start."""
    add("--mse", type=float, default=0.0, help="inner: weight of the squared error besides the cosine (default 0)")
    add("--rounds", type=int, default=3, help="outer: rounds of recursion (default 3)")
    add("--latents", choices=("rollout", "teacher"), default="rollout",
        help="outer: agents think as at inference (default), or send the states at the tokens of given texts, as released")
    add("--latent-steps", type=int,
        help=f"outer: latents per turn (default: the style's; with --latents teacher at most {TEACHER_LATENTS})")
    add("--supervise-all", type=float, default=0.0, metavar="WEIGHT", help="outer: weight of other rounds' loss (default 0)")
    add("--init", choices=("ridge", "random", "checkpoint"),
        help="how links start: at a ridge regression (default for outer; inner links with --steps 0 only), random (default "
        "for inner), or as the checkpoint's")
    add("--ridge-rows", type=int, default=256, help="rows for the regression (default 256)")


def checked(args):
    """The Style that args name; InputError if they do not describe a training."""
    style = style_named(args.style)
    args.task = args.task or style.task
    if args.what == "inner" and args.role not in style.order:
        raise InputError(f"--role is {args.role!r}, expected the inner link's: one of {', '.join(style.order)}")
    if args.what != "inner" and not style.edges:
        raise InputError(f"style {args.style} has no edges, so that there is no outer link to train")
    if args.what == "inner" and args.init == "ridge" and args.steps:
        raise InputError("--init ridge gives an inner link weights on a scale that steps cannot improve: add --steps 0, or "
                         "train it from --init random")
    check_numbers(args)
    if args.plot:
        writable_file("--plot", args.plot)
    for stage in stages(args, style):
        check_folder(stage, task_of_links(stage, style))
    return style


def stages(args, style):
    """The trainings that a command consists of, each as its args: for a system the inner link of each role, then the rest."""
    if args.what != "system":
        return [args]
    stage = lambda **changes: argparse.Namespace(**vars(args) | changes)
    inner = [stage(what="inner", role=role, out=args.out / role, steps=args.inner_steps,
                   init="random" if args.inner_steps else "ridge") for role in style.order]
    return [*inner, stage(what="outer", out=args.out / "links", checkpoint=[f"{one.role}={one.out}" for one in inner])]


def check_numbers(args):
    for name in (*NOT_NEGATIVE, *POSITIVE):
        value, expected = getattr(args, name), "above 0" if name in POSITIVE else "from 0 up"
        if value is not None and not (0 <= value < math.inf and (value or name in NOT_NEGATIVE)):
            raise InputError(f"--{name.replace('_', '-')} is {value}, expected a finite number {expected}")
    if abs(args.seed) > MAX_SEED:
        raise InputError(f"--seed is {args.seed}, expected a number below {MAX_SEED}")


def check_folder(args, task):
    """InputError if --out cannot be written to, or already holds links or a training that is not to be continued."""
    existing = next(place for place in (args.out, *args.out.absolute().parents) if place.exists())
    if not (existing.is_dir() and os.access(existing, os.W_OK)):
        raise InputError(f"--out {args.out} cannot be written ({existing} is a file or closed to you): give another folder")
    if any(file.exists() for file in files_of(args.out, task)):
        if not args.resume:
            raise InputError(f"{args.out} already holds a training: continue it with --resume, or give another --out")
        return
    pattern = f"adapter{suffix(task)}.pt" if args.what == "inner" else f"*Outerlink{suffix(task)}.pt"
    if there := sorted(args.out.glob(pattern)):
        raise InputError(f"{args.out} already holds {there[0].name}, which would be overwritten: give another --out")


def task_of_links(args, style):
    """The task in the names of the links' files, None for a style with one set of links."""
    return links_task(args.task) if style.links_by_task else None


# What is trained on what

def roles_with_texts(args, style):
    """The roles whose texts a training uses."""
    if args.what == "inner":
        before = style.order[:style.order.index(args.role)]
        return [*(role for role in before if (role, args.role) in style.edges), args.role]
    return style.order if args.latents == "teacher" or args.init == "ridge" else style.order[-1:]


def sources_of(args, style):
    """{role, or "links": folder or hub id} of what a training loads."""
    needed = [args.role] if args.what == "inner" else [*style.order, *(["links"] if args.init == "checkpoint" else [])]
    sources = style.sources(checkpoints(args), needed)
    return {name: sources[name] for name in needed}


def agents_to_train(args, style, sources, roles, untrained=False):
    """{role: Agent} in the plain form; `untrained` gives them new inner links."""
    devices = devices_by_role(style.order, args.device)
    return {role: load_agent(sources[role], args.task, devices[role], usable_dtype(args.dtype, devices[role]), plain=True,
                             untrained=untrained) for role in roles}


def prepare_inner(args, style, task, examples, readings):
    """The system of one agent, the objective of its inner link, what saves that, and the rows to train on: TargetTurns."""
    agents = agents_to_train(args, style, sources_of(args, style), [args.role], untrained=args.init != "checkpoint")
    system, agent = System(style, agents, {}, args.task), agents[args.role]
    if agent.inner_link is None:
        raise InputError(f"the folder of {args.role} has no inner link to start from: leave out --init checkpoint")
    link = agent.inner_link.float()
    if args.init == "random":
        start_gain(link, agent)
    elif args.init == "ridge" and starts(args, task):
        set_inner_link(agent, readings(system, args.role, examples))
    turns = [example.turn(style, args.role) for example in examples]
    objective = InnerLoss(system, args.role, args.mse, args.max_length, args.date)
    return system, objective, partial(save_inner_link, args.out, style, task, link), turns


def prepare_outer(args, style, task, examples, readings):
    """The system, the objective of its outer links, what saves those, and the rows to train on: TrainExamples."""
    teacher = args.latents == "teacher"
    latent_steps = args.latent_steps or (TEACHER_LATENTS if teacher else None)
    settings = Settings(rounds=args.rounds, latent_steps=latent_steps, date=args.date).completed(style)
    sources = sources_of(args, style)
    agents = agents_to_train(args, style, sources, style.order)
    system = System(style, agents, {}, args.task)
    system.outer_links = dict.fromkeys(style.edges)  # so that only inner links can be missing
    system.check_links(settings)
    system.outer_links = first_links(args, style, agents, sources)
    if args.init == "ridge" and starts(args, task):
        for role in style.order:
            for edge in [edge for edge in style.edges if edge[0] == role]:
                set_outer_link(system, edge, readings(system, role, examples))
    objective = OuterLoss(system, settings, teacher, args.supervise_all, args.max_length)
    return system, objective, partial(save_outer_links, args.out, style, task, system.outer_links), examples


def first_links(args, style, agents, sources):
    """{edge: OuterLink} in float32: the checkpoint's, or random ones."""
    if args.init == "checkpoint":
        links = load_outer_links(sources["links"], args.task, style.edges, agents)
        return {edge: link.float() for edge, link in links.items()}
    links = {}
    for source, target in style.edges:
        widths = [agents[role].model.config.hidden_size for role in (source, target)]
        links[source, target] = OuterLink(*widths).to(agents[source].device)
        start_gain(links[source, target], agents[target])
    return links


def starts(args, task):
    """Whether a training has no state yet: a resumed one has its links there."""
    return not files_of(args.out, task)[0].exists()


def reader(args):
    """readings(system, role, examples): what `role` reads in all its turns of the first examples, read once for all links."""
    known = {}

    def readings(system, role, examples):
        turns = tuple(one.turn(system.style, role, r) for one in examples[:args.ridge_rows]
                      for r in range(1, len(one.texts[role]) + 1))
        key = role, digest(turns)
        if key not in known:
            known[key] = read(system, role, turns, args.max_length, args.date)
        return known[key]
    return readings


# The training

def settings_of(args, style, world, system, rows):
    """All that the weights depend on, as JSON values."""
    options = {name: value for name, value in vars(args).items() if name not in NO_EFFECT_ON_WEIGHTS}
    options["dtypes"] = {role: str(agent.model.norm.weight.dtype) for role, agent in system.agents.items()}
    return depends_on(style, sources_of(args, style).values(), rows, options | {"processes": world}, args.out)


def train(args, objective, rows, run, world):
    """Take all steps on the batches of this process; returns the losses."""
    module = DistributedDataParallel(objective, find_unused_parameters=True) if world > 1 else objective

    def loss_at(step, part):
        number = (step * args.accumulate + part) * world + run.rank
        synced = world == 1 or part == args.accumulate - 1  # gradients are exchanged once a step, at its last part
        with nullcontext() if synced else module.no_sync():
            return module(batch_of(rows, args.seed, number, args.batch_size))

    try:
        return fit(loss_at, [adamw(objective, args.lr)], args.steps, args.what, args.warm_up, args.clip, args.accumulate, run)
    except (RuntimeError, MemoryError) as e:
        if not out_of_memory(e):
            raise
        raise InputError("out of memory: take a smaller --batch-size with more --accumulate for the same steps, "
                         "a shorter --max-length, or fewer --latent-steps") from e


def train_links(args, style, rank, world, readings):
    """One training: of an inner link, or of all outer links."""
    examples = load_examples(args.data, style, roles_with_texts(args, style), pairs("--columns", args.columns), args.task,
                             args.limit, answer_first=args.what == "outer", tell=warn if rank == 0 else no_op)
    torch.manual_seed(args.seed)  # new links are drawn on the CPU, so that they are the same on every device
    prepare, task = prepare_inner if args.what == "inner" else prepare_outer, task_of_links(args, style)
    system, objective, save_links, rows = prepare(args, style, task, examples, readings)
    if not args.keep_activations:
        checkpoint_activations(system)
    if rank == 0:
        args.out.mkdir(parents=True, exist_ok=True)
        if args.what == "inner":
            copy_agent(sources_of(args, style)[args.role], args.task, args.out)
    settings = settings_of(args, style, world, system, rows)
    run = Run(args.out, task, settings, objective, save_links, args.save_every, rank)
    run.count_positions(system.agents)
    losses = train(args, objective, rows, run, world)
    if rank == 0:
        run.report(losses, args.plot)


def main():
    args = arguments()
    style = checked(args)
    rank, world, wait = join_others(args)
    readings = reader(args)
    for stage in stages(args, style):
        train_links(stage, style, rank, world, readings)
        wait()  # until its files are there
    if rank == 0 and args.what == "system":
        print(f"system of {args.style}: --checkpoint {args.out}")
    if world > 1:
        distributed.destroy_process_group()


if __name__ == "__main__":
    command(main)
