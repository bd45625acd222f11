"""Trains the links of a style on frozen agents, into folders that --checkpoint loads.

    python -m minimas.train system --style mine.json --data mine.jsonl --out runs/mine
    python -m minimas.train inner --style sequential_light --role planner --data mine.jsonl --out runs/planner
    python -m minimas.train outer --style sequential_light --data RecursiveMAS/Sequential-Math --out runs/links
    torchrun --nproc-per-node 4 -m minimas.train outer --style mixture --data mine.jsonl --out runs/links

The options become TrainSettings, and a training is one call: of train_inner, train_outer or train_system.
"""

import argparse
from collections.abc import Callable, Sequence
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from .. import __version__
from ..commands.failures import command
from ..commands.options import (
    FILES,
    SYSTEM,
    Parser,
    add_settings,
    add_system,
    checkpoints,
    name_of_command,
    names,
    output,
    pairs,
)
from ..common import InputError, check_known, warn, write_atomic
from ..prompts import TASKS
from ..runs.lock import Lock, held
from ..runs.outputs import writable_file
from ..runs.plot import save_charts
from ..runs.processes import join, launched, leave
from ..styles import Style, style_named
from .examples import check_limit
from .folders import check_apart, check_new_or_resumed, check_out, locks_of, parts_of
from .settings import (
    TRAININGS,
    CompletedTrainSettings,
    TrainSettings,
    check_edges,
    check_role,
    trainings_of,
)

WHAT = {
    "inner": "Train the inner link of one role, on texts of that role.",
    "outer": "Train all outer links of a style together, on the answers of its last role.",
    "system": "Make all links of a style: inner ones first, then outer ones between these agents.",
}
# The groups of options in a --help, with those of other commands
TRAINED = "what is trained, and on what"
LEARNING = "how links learn"
HELP = "help"
DESCRIPTION = "Train the links of a recursive multi-agent system; its agents stay as they are."


# Options


def arguments() -> argparse.Namespace:
    """The options of sys.argv; InputError if they cannot be parsed.

    They may stand before the name of the training or after it, so that one parser knows those of all trainings.
    """
    parser = parser_of(lambda trainings: True, name_of_command("train"))
    parser.add_argument("what", choices=TRAININGS)
    return parser.parse_args()


def parser_of(
    wanted: Callable[[Sequence[str]], bool], prog: str, description: str = DESCRIPTION
) -> Parser:
    """A parser of the options that are wanted, by the trainings that they are for."""
    parser = Parser(prog=prog, description=description, add_help=False)
    add_system(parser.group(SYSTEM))
    add = parser.group(TRAINED).add_argument
    if wanted(("inner",)):
        add("--role", help="the role whose link is trained")
    add(
        "--task",
        help="math, choice or code: of rows that do not name theirs, and of the links (default: the style's, mostly "
        "math)",
    )
    add(
        "--data",
        required=True,
        help="a .json, .jsonl, .csv, .tsv or .parquet file, a hub id (RecursiveMAS/Sequential-Math), or tiny",
    )
    add(
        "--columns",
        type=names,
        default=(),
        metavar="question=COLUMN,...",
        help="the data's names for question, fn_name, type, task_family, or a role's text",
    )
    add("--limit", type=int, help="read only this many rows")

    chosen = [one.name for one in fields(TrainSettings) if wanted(trainings_of(one))]
    chosen.remove("save_every")
    add_settings(parser.group(LEARNING), TrainSettings, chosen)

    add = parser.group(FILES).add_argument
    add("--out", type=output(), required=True, help="the folder to write")
    add("--resume", action="store_true", help="continue the training in --out that was killed")
    add_settings(parser.group(FILES), TrainSettings, ["save_every"])
    add("--plot", type=output(".svg"), help="an SVG file for the loss curve")

    add = parser.group(HELP).add_argument
    add("-h", "--help", action=Help, nargs=0, help="print this")
    add("--version", action="version", version=f"minimas {__version__}")
    return parser


class Help(argparse.Action):
    """--help: the options of the training that is named before it, or those that all trainings have."""

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, *_: Any
    ) -> None:
        what = getattr(namespace, "what", None)
        print(help_text(what), end="")
        parser.exit()


def help_text(what: str | None) -> str:
    """What --help prints: of a training, or of the command."""
    prog = name_of_command("train")
    if what is not None:
        parser = parser_of(lambda trainings: what in trainings, f"{prog} {what}", WHAT[what])
        role = "--role ROLE " if what == "inner" else ""
        parser.usage = f"%(prog)s [-h] {role}--data DATA --out OUT [options]"
        return parser.format_help()
    trainings = [f"  {name:<8}{description}" for name, description in WHAT.items()]
    parser = parser_of(
        lambda trainings: set(trainings) == set(TRAININGS),
        prog,
        "\n".join([DESCRIPTION, "", *trainings]),
    )
    parser.usage = f"%(prog)s [-h] {{{','.join(TRAININGS)}}} --data DATA --out OUT [options]"
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = (
        "These are the options of all trainings. Each has more of its own:\n"
        f"see `{prog} inner --help`, and so on."
    )
    return parser.format_help()


# The training that the options describe


class Plan(NamedTuple):
    """What a command is going to do.

    completed   the settings with the defaults of this training
    sources     {role, or "links": folder or hub id} of what it loads
    """

    args: argparse.Namespace
    style: Style
    task: str
    settings: TrainSettings
    completed: CompletedTrainSettings
    sources: dict[str, str | Path]


class Part(NamedTuple):
    """An inner link, or the outer links, that a command trains; `role` is None for outer links."""

    what: str
    role: str | None
    steps: int
    folder: Path


def plan_of(args: argparse.Namespace) -> Plan:
    """What the options describe; InputError if that is no training, or outputs cannot be written."""
    settings = TrainSettings(**{one.name: getattr(args, one.name) for one in fields(TrainSettings)})
    settings.check(args.what)
    if args.role is not None and args.what != "inner":
        raise InputError(f"--role means nothing for `train {args.what}`: leave it out")
    check_limit(args.limit)
    style = style_named(args.style)
    task = args.task or style.task
    check_known("task", [task], TASKS)
    if args.what == "inner":
        check_role(args.role, style)
    else:
        check_edges(f"style {args.style}", style)
    completed = settings.completed(args.what, style)
    check_outputs(args)

    needed = [args.role] if args.what == "inner" else list(style.order)
    if args.what == "outer" and completed.init == "checkpoint":
        needed.append("links")
    given: Any = checkpoints(args.checkpoint)
    return Plan(args, style, task, settings, completed, style.sources(given, needed))


def check_outputs(args: argparse.Namespace) -> None:
    """InputError if --out or --plot cannot be written."""
    check_out(args.out)
    if args.plot:
        writable_file("--plot", args.plot)


def parts_in_order(plan: Plan) -> list[Part]:
    """What is trained, in its order."""
    args = plan.args
    completed = plan.completed
    if args.what != "system":
        return [Part(args.what, args.role, completed.steps, args.out)]
    folders = parts_of(args.out, plan.style)
    inner = [Part("inner", role, completed.inner_steps, folders[role]) for role in plan.style.order]
    return [*inner, Part("outer", None, completed.steps, folders["links"])]


# The command


def main() -> None:
    plan = plan_of(arguments())
    args = plan.args
    processes = launched()
    if args.what != "inner":
        check_apart(args.out, {role: plan.sources[role] for role in plan.style.order})
    locks = locks_of(args.what, args.out, plan.style, lent=True)  # to the function that trains
    if args.plot:
        locks.append(Lock("--plot", args.plot))
    with held(locks, processes.rank):
        from .links import task_of_links  # with torch: a run that is refused ends before

        in_names = task_of_links(plan.style, plan.task)
        check_new_or_resumed(args.what, args.out, plan.style, in_names, args.resume)
        device, _ = join(processes, args.device)
        losses = train(plan, device)
        if processes.rank == 0:
            report(plan, in_names, losses)
        leave(processes)


def train(plan: Plan, device: str | None) -> dict[str, float]:
    """Carry out a plan -> {the role of an inner link, or "links": its last loss}, if a step was taken."""
    from .links import examples_of, train_inner, train_outer
    from .system import load_to_train, train_system

    args = plan.args
    losses: dict[str, float] = {}

    def note(metrics: dict[str, Any]) -> None:
        losses[metrics["role"] or "links"] = metrics["loss"]

    outputs: dict[str, Any] = dict(out=args.out, resume=args.resume, callback=note)
    columns = pairs("--columns", args.columns)
    if args.what == "system":
        train_system(
            plan.style,
            args.data,
            plan.settings,
            checkpoints=plan.sources,
            device=device,
            dtype=args.dtype,
            quantize=args.quantize,
            task=plan.task,
            columns=columns,
            limit=args.limit,
            **outputs,
        )
        return losses
    examples = examples_of(
        args.what,
        args.role,
        plan.completed,
        plan.style,
        plan.task,
        args.data,
        columns,
        args.limit,
    )
    new_link = args.what == "inner" and plan.completed.init != "checkpoint"
    system = load_to_train(
        plan.style, plan.sources, plan.task, device, args.dtype, new_link, args.quantize
    )
    if args.what == "inner":
        train_inner(system, args.role, examples, plan.settings, **outputs)
    else:
        train_outer(system, examples, plan.settings, **outputs)
    return losses


def report(plan: Plan, in_names: str | None, losses: dict[str, float]) -> None:
    """Plot the loss, and print what was trained; in_names is the task in the names of files."""
    from .loop import charts_of

    args = plan.args
    charts = []
    for part in parts_in_order(plan):
        title = f"{part.what} of {args.style}"
        name = part.role or "links"
        if args.plot:
            charts += charts_of(part.folder, in_names, f"{title}, {name}", args.data)
        loss = f", loss {losses[name]:.4f}" if name in losses else ""
        print(f"{title}: {part.steps} steps{loss}; --checkpoint {name}={part.folder}")
    if charts:
        write_atomic(args.plot, partial(save_charts, charts=charts))
    elif args.plot:
        warn(f"--plot {args.plot} is not written: no step was taken, so that there is no loss")
    if args.what == "system":
        print(f"system of {args.style}: --checkpoint {args.out}")


LESS_MEMORY = (  # what to try when memory runs out
    "a smaller --batch-size with more --accumulate, a shorter --max-length, or fewer --latent-steps"
)


def run() -> None:
    """The command, from its arguments to its exit status."""
    command(main, LESS_MEMORY)


if __name__ == "__main__":
    run()
