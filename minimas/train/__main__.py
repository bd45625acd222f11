"""Trains the links of a style on frozen agents, into folders that --checkpoint loads.

    python -m minimas.train inner --style sequential_light --role planner --data mine.jsonl --out runs/planner
    python -m minimas.train outer --style sequential_light --data RecursiveMAS/Sequential-Math --out runs/links
    torchrun --nproc-per-node 4 -m minimas.train outer --style mixture --data mine.jsonl --out runs/links

Here are the options and what they put together: examples.py reads the data, losses.py says what links learn, ridge.py
how they start, loop.py takes the steps, and save.py writes the released layout.
"""

import math
import os
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import torch
from torch import distributed
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from ..agent import load_agent
from ..cli import checkpoints, command, make_parser, names, out_of_memory, pairs, writable_file
from ..common import InputError, no_op, warn
from ..evaluate.runs import depends_on, join_others
from ..link import OuterLink
from ..load import devices_by_role, links_task, load_outer_links, usable_dtype
from ..prompts import TASKS
from ..recurse import System
from ..styles import Settings, style_named
from .examples import load_examples
from .loop import Run, adamw, batch_of, files_of, fit
from .losses import MAX_POSITIONS, InnerLoss, OuterLoss, checkpoint_activations
from .ridge import ridge_start, start_gain
from .save import copy_agent, save_inner_link, save_outer_links, suffix

NOT_NEGATIVE = ("steps", "mse", "supervise_all")
POSITIVE = ("batch_size", "accumulate", "rounds", "latent_steps", "limit", "ridge_rows", "max_length", "save_every",
            "warm_up", "lr", "clip")
NO_EFFECT_ON_WEIGHTS = ("out", "resume", "plot", "save_every", "device", "keep_activations")  # may change on --resume
ONLY = {"role": "inner", "mse": "inner", "rounds": "outer", "latents": "outer", "latent_steps": "outer",
        "supervise_all": "outer", "ridge_rows": "outer"}  # options that mean something for one kind of links
MAX_SEED = 10 ** 12  # `permutation` multiplies it by a million, and torch takes 64 bits
TEACHER_LATENTS = 80  # states that a given text sends at most, as in the released recipe


# Options

def arguments():
    parser = make_parser("train", "Train the links of a recursive multi-agent system; its agents stay as they are.")
    add = parser.add_argument
    add("what", choices=("inner", "outer"), help="the inner link of one role, or all outer links of a style together")
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
    for name, kind in ONLY.items():
        if kind != args.what and getattr(args, name) != parser.get_default(name):
            raise InputError(f"--{name.replace('_', '-')} is for {kind} links, this trains {args.what} ones: leave it out")
    args.init = args.init or {"inner": "random", "outer": "ridge"}[args.what]
    return args


def add_steps(add):
    """The options of the steps."""
    add("--steps", type=int, default=20000, help="0 writes the links as they start (default 20000)")
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
        help="how links start: at a ridge regression (default for outer), random (for inner), or as the checkpoint's")
    add("--ridge-rows", type=int, default=256, help="rows for the regression (default 256)")


def checked(args):
    """The Style that args name; InputError if they do not describe a training."""
    style = style_named(args.style)
    args.task = args.task or style.task
    if args.what == "inner" and args.role not in style.order:
        raise InputError(f"--role is {args.role!r}, expected the inner link's: one of {', '.join(style.order)}")
    if args.what == "inner" and args.init == "ridge":
        raise InputError("--init ridge is for outer links: it maps one agent's states to another's embeddings")
    check_numbers(args)
    if args.plot:
        writable_file("--plot", args.plot)
    check_folder(args, task_of_links(args, style))
    return style


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


def prepare_inner(args, style, task, examples):
    """The system of one agent, the objective of its inner link, what saves that, and the rows to train on: TargetTurns."""
    sources, new = sources_of(args, style), args.init == "random"
    agents = agents_to_train(args, style, sources, [args.role], untrained=new)
    link = agents[args.role].inner_link.float()
    if new:
        start_gain(link, agents[args.role])
    system = System(style, agents, {}, args.task)
    turns = [example.turn(style, args.role) for example in examples]
    objective = InnerLoss(system, args.role, args.mse, args.max_length, args.date)
    return system, objective, partial(save_inner_link, args.out, style, task, link), turns


def prepare_outer(args, style, task, examples):
    """The system, the objective of its outer links, what saves those, and the rows to train on: TrainExamples."""
    teacher = args.latents == "teacher"
    latent_steps = args.latent_steps or (TEACHER_LATENTS if teacher else None)
    settings = Settings(rounds=args.rounds, latent_steps=latent_steps, date=args.date).completed(style)
    sources = sources_of(args, style)
    agents = agents_to_train(args, style, sources, style.order)
    system = System(style, agents, first_links(args, style, agents, sources), args.task)
    state_file, _ = files_of(args.out, task)
    if args.init == "ridge" and not state_file.exists():  # a resumed training has its links in its state
        start_at_ridge(args, system, examples[:args.ridge_rows])
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


def start_at_ridge(args, system, examples):
    """ridge_start for each edge, on its source's turns in all rounds that the examples have texts for."""
    for edge in tqdm(system.style.edges, "ridge regression", unit="link", leave=False):
        source = edge[0]
        turns = [one.turn(system.style, source, r) for one in examples for r in range(1, len(one.texts[source]) + 1)]
        ridge_start(system, edge, turns, longest=args.max_length, date=args.date)


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


def main():
    args = arguments()
    style = checked(args)
    rank, world, _ = join_others(args)
    examples = load_examples(args.data, style, roles_with_texts(args, style), pairs("--columns", args.columns), args.task,
                             args.limit, answer_first=args.what == "outer", tell=warn if rank == 0 else no_op)
    torch.manual_seed(args.seed)  # new links are drawn on the CPU, so that they are the same on every device
    prepare, task = prepare_inner if args.what == "inner" else prepare_outer, task_of_links(args, style)
    system, objective, save_links, rows = prepare(args, style, task, examples)
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
    if world > 1:
        distributed.destroy_process_group()


if __name__ == "__main__":
    command(main)
