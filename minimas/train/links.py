"""One training, of an inner link or of all outer links: what it loads, what it learns from, and what it saves."""

import argparse
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch

from ..agent import load_agent
from ..common import InputError, no_op, pairs, warn
from ..link import InnerLink, OuterLink
from ..load import devices_by_role, links_task, load_outer_links, usable_dtype
from ..runs.dependencies import depends_on, digest
from ..runs.processes import Processes
from ..settings import Settings
from ..styles import Style
from ..system import System
from .examples import TrainExample, load_examples
from .loop import Run, adamw, batch_of, files_of, fit
from .losses import InnerLoss, OuterLoss, checkpoint_activations
from .ridge import Reading, new_outer_links, read, set_inner_link, set_outer_link, start_gain
from .save import copy_agent, save_inner_link, save_outer_links, suffix

# Options that may change on --resume
NO_EFFECT_ON_WEIGHTS = ("out", "resume", "plot", "save_every", "device", "keep_activations")

Sources = Mapping[str, str | Path]  # {role, or "links": folder or hub id}
Known = dict[tuple, list[Reading]]  # what agents have read already, by role and texts
Prepared = tuple[torch.nn.Module, Callable[[], None], Sequence]  # objective, what saves, rows


# The folder


def check_folder(args: argparse.Namespace, style: Style) -> None:
    """InputError if --out already holds links, or a training that is not to be continued."""
    task = task_of_links(args, style)
    if any(file.exists() for file in files_of(args.out, task)):
        if not args.resume:
            raise InputError(
                f"{args.out} already holds a training: continue it with --resume, or give another --out"
            )
        return
    beginning = "adapter" if args.what == "inner" else "*Outerlink"
    if there := sorted(args.out.glob(f"{beginning}{suffix(task)}.pt")):
        raise InputError(
            f"{args.out} already holds {there[0].name}, which would be overwritten: give another --out"
        )


def task_of_links(args: argparse.Namespace, style: Style) -> str | None:
    """The task in the names of the links' files, None for a style with one set of links."""
    return links_task(args.task) if style.links_by_task else None


# What is trained on what


def roles_with_texts(args: argparse.Namespace, style: Style) -> Sequence[str]:
    """The roles whose texts a training uses."""
    if args.what == "inner" and args.init != "ridge":  # an agent reads its turns in all rounds
        before = style.order[: style.order.index(args.role)]
        heard = [role for role in before if (role, args.role) in style.edges]
        return [*heard, args.role]
    if args.latents == "teacher" or args.init == "ridge":
        return style.order
    return style.order[-1:]


def load_system(args: argparse.Namespace, style: Style, sources: Sources) -> System:
    """The System of a training, with plain agents: all with outer links, or the one whose inner link is trained.

    The links to train are new, or those of the checkpoint.
    """
    devices = devices_by_role(style.order, args.device)
    agents = {}
    for role in style.order:
        if role in sources:
            agents[role] = load_agent(
                sources[role],
                args.task,
                devices[role],
                usable_dtype(args.dtype, devices[role]),
                untrained=args.what == "inner" and args.init != "checkpoint",
                role=role,
            )
    system = System(style, agents, {}, args.task)
    if "links" in sources:
        links = load_outer_links(sources["links"], args.task, style.edges, agents)
        system.outer_links.update({edge: link.float() for edge, link in links.items()})
    elif args.what == "outer":
        system.outer_links.update(new_outer_links(style.edges, agents))
    return system


def prepare_inner(
    args: argparse.Namespace,
    system: System,
    task: str | None,
    examples: Sequence[TrainExample],
    known: Known,
    ridge: bool,
) -> Prepared:
    """The objective of the agent's inner link, what saves that link, and the rows to train on: TargetTurns."""
    agent = system.agents[args.role]
    if agent.inner_link is None:
        raise InputError(
            f"the folder of {args.role} has no inner link to start from: leave out --init checkpoint"
        )
    link = cast(InnerLink, agent.inner_link).float()  # of plain agents, as are all that train
    if args.init == "random":
        start_gain(link, agent)
    elif ridge:
        set_inner_link(agent, readings_of(args, system, args.role, examples, known))
    turns = [example.turn(system.style, args.role) for example in examples]
    objective = InnerLoss(system, args.role, args.mse, args.max_length, args.date)
    return objective, partial(save_inner_link, args.out, system.style, task, link), turns


def prepare_outer(
    args: argparse.Namespace,
    system: System,
    task: str | None,
    examples: Sequence[TrainExample],
    known: Known,
    ridge: bool,
) -> Prepared:
    """The objective of the outer links, what saves them, and the rows to train on: TrainExamples."""
    style = system.style
    settings = Settings(rounds=args.rounds, latent_steps=args.latent_steps, date=args.date)
    settings = settings.completed(style)
    system.check_links(settings)
    if ridge:
        for edge in style.edges:
            set_outer_link(system, edge, readings_of(args, system, edge[0], examples, known))
    teacher = args.latents == "teacher"
    objective = OuterLoss(system, settings, teacher, args.supervise_all, args.max_length)
    links = cast(dict[tuple[str, str], OuterLink], system.outer_links)
    return objective, partial(save_outer_links, args.out, style, task, links), examples


def readings_of(
    args: argparse.Namespace,
    system: System,
    role: str,
    examples: Sequence[TrainExample],
    known: Known,
) -> list[Reading]:
    """What `role` reads in all its turns of the first examples; it is read once for all links, and kept in `known`."""
    turns = []
    for one in examples[: args.ridge_rows]:
        for r in range(1, len(one.texts[role]) + 1):
            turns.append(one.turn(system.style, role, r))
    key = role, digest(tuple(turns))
    if key not in known:
        known[key] = read(system, role, turns, args.max_length, args.date)
    return known[key]


# The training


def settings_of(
    args: argparse.Namespace, system: System, sources: Sources, rows: Sequence, world: int
) -> dict[str, Any]:
    """All that the weights depend on, as JSON values."""
    settings = {
        name: value for name, value in vars(args).items() if name not in NO_EFFECT_ON_WEIGHTS
    }
    settings["dtypes"] = {
        role: str(agent.model.norm.weight.dtype) for role, agent in system.agents.items()
    }
    settings["processes"] = world
    return depends_on(system.style, sources.values(), rows, settings, args.out)


def train_links(
    args: argparse.Namespace,
    style: Style,
    sources: Sources,
    processes: Processes,
    known: Known,
) -> None:
    """One training: of an inner link, or of all outer links; `sources` are those of `stages`."""
    rank, world = processes.rank, processes.world
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
    torch.manual_seed(args.seed)  # new links are drawn on the CPU: the same on every device
    task = task_of_links(args, style)
    system = load_system(args, style, sources)
    state_file, _ = files_of(args.out, task)
    ridge = args.init == "ridge" and not state_file.exists()  # a resumed one has its links there
    prepare = prepare_inner if args.what == "inner" else prepare_outer
    objective, save_links, rows = prepare(args, system, task, examples, known, ridge)
    if not args.keep_activations:
        checkpoint_activations(system)
    if rank == 0:
        args.out.mkdir(parents=True, exist_ok=True)
        if args.what == "inner":
            copy_agent(sources[args.role], args.task, args.out)
    settings = settings_of(args, system, sources, rows, world)
    run = Run(args.out, task, settings, system.agents, objective, save_links, args.save_every, rank)

    def loss_at(step: int, part: int) -> torch.Tensor:
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
