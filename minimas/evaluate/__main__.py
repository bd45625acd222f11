"""The command: measures a system on a benchmark. The options span a grid of channels, rounds and latent steps, and at
each of its points all questions are answered.

    python -m minimas.evaluate --style tiny --dataset tiny
    python -m minimas.evaluate --style sequential_light --dataset math500
    torchrun --nproc-per-node 4 -m minimas.evaluate --style mixture --dataset mine.jsonl --columns question=problem

The record of a question (records.py) is written as soon as it is answered. At the end the table (report.py) is printed.

A run that was killed continues when it is started again. It replays the same batches, so records match up to
rounding. They differ by rounding only where memory ran out and a batch was answered in pieces. With torchrun every
process answers its share of the batches and writes a part of its own; the first process merges the parts. A second run
with the same outputs is refused (runs/lock.py).
"""

import argparse
import itertools
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

from ..commands.failures import command
from ..commands.options import add_answering, make_parser, names
from ..common import (
    InputError,
    aligned,
    checkpoints,
    no_op,
    pairs,
    warn,
    writable_file,
    write_atomic,
)
from ..runs.lock import Lock, held, share
from ..runs.processes import Processes, join, launched
from ..settings import CompletedSettings, Settings
from ..styles import Style, style_named
from .benchmarks import BENCHMARKS, COLUMNS, Example, load_dataset, settings_for
from .grade import GRADERS, graders_for
from .records import (
    POINT,
    Key,
    Record,
    gather,
    graded,
    read_lines,
    record_key,
    settings_line,
)
from .run_tests import check_tests

# What needs torch is imported where it is used, after the outputs are held: a run that is refused ends at once.

WAIT = timedelta(days=30)  # for the other processes of a run, whose shares may take as long
OURS = re.compile(
    r"\.(part\d+|partial|lock)$"
)  # ends of names that runs give to files beside their outputs

# Options


def numbers(text: str) -> tuple[int, ...]:
    """The value of an option that lists whole numbers, 1,2,3, as a tuple."""
    try:
        return tuple(map(int, text.split(",")))
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a list of whole numbers such as 1,2,3"
        ) from None


def arguments() -> argparse.Namespace:
    """The options as typed."""
    parser = make_parser(
        "evaluate", "Measure a recursive multi-agent system on questions with known answers."
    )
    add = add_answering(parser).add_argument
    add("--dataset", required=True, help=f"{', '.join(BENCHMARKS)}, or a local file of rows")
    add("--file", help="a local copy of the data set, instead of the hub")
    add(
        "--columns",
        type=names,
        default=(),
        metavar="NAME=COLUMN,...",
        help=f"the file's names for {', '.join(COLUMNS)}",
    )
    add("--task", help="of a local file: math, choice or code (default: the style's)")
    add("--limit", type=int, help="only the first LIMIT questions")
    add(
        "--protocol",
        default="paper",
        help="the source of default settings: paper (default) or released",
    )
    add(
        "--rounds",
        type=numbers,
        help="rounds of recursion, one number or several: 1,2,3 (default: the style's)",
    )
    add(
        "--latent-steps",
        type=numbers,
        help="latents an agent thinks a turn, or several: 16,32 (default: style's)",
    )
    add("--channel", type=names, help="what agents send: latent (default), text, or latent,text")
    add(
        "--rollouts",
        type=int,
        help="texts per question, from the same latents: pass@k asks for one right of k",
    )
    add("--batch-size", type=int, help="questions at once (default 8)")
    add(
        "--grader",
        type=names,
        help=f"of mathematics: {', '.join(GRADERS)}; several give a column each",
    )
    add(
        "--allow-code-execution",
        action="store_true",
        help="run the programs that agents write, in guarded processes",
    )
    add("--regrade", action="store_true", help="grade the texts in --out again, and ask no agent")
    add("--out", type=Path, help="the file of records (default: STYLE-DATASET.jsonl)")
    add("--csv", type=Path, help="write the table to this file, too")
    add("--plot", type=Path, help="draw accuracy and tokens against rounds into this file, as SVG")
    return parser.parse_args()


def plan(args: argparse.Namespace, style: Style) -> tuple[list[CompletedSettings], tuple[str, ...]]:
    """(the completed Settings of each point of the grid, the graders); InputError if options do not make a run.

    A setting is what its option says, else what the data set's protocol says, else the default of the style.
    """
    options: dict[str, Any] = {"rounds": (None,), "latent_steps": (None,), "channel": ("latent",)}
    options |= settings_for(args.dataset, args.style, args.protocol, args.task)
    given = {field.name: getattr(args, field.name, None) for field in fields(Settings)}
    options |= {name: value for name, value in given.items() if value is not None}
    graders = graders_for(options.pop("grader"), args.grader, args.allow_code_execution)
    grid = [options.pop(name) for name in POINT]
    points = []
    for channel, rounds, latent_steps in itertools.product(*grid):
        if channel != "latent":
            latent_steps = 0  # a text channel has none: one point for all their numbers
        point = Settings(channel=channel, rounds=rounds, latent_steps=latent_steps, **options)
        points.append(point.completed(style))
    if not points:
        raise InputError("--channel lists nothing, expected latent, text or latent,text")
    return list(dict.fromkeys(points)), tuple(dict.fromkeys(graders))


# The command


def output_files(args: argparse.Namespace) -> dict[str, Path]:
    """{option: file} of what this run writes: --out, and --csv and --plot if given. The folder of --out is made.

    InputError if one cannot be written, has a name that runs use themselves, or is one file with another or the data.
    """
    default = Path(f"{Path(args.style).stem}-{Path(args.dataset).stem}.jsonl")
    files = {"--out": args.out or default, "--csv": args.csv, "--plot": args.plot}
    outputs = {option: file for option, file in files.items() if file}
    taken: dict[Path, str] = {}
    for option, file in [("--dataset", args.dataset), ("--file", args.file), *outputs.items()]:
        if not file:
            continue
        other = taken.setdefault(Path(file).expanduser().resolve(), option)
        if other != option:
            raise InputError(f"{option} and {other} are the same file, {file}: give another name")
    for option, file in outputs.items():
        if end := OURS.search(str(file)):
            raise InputError(
                f"{option} is {file}, but names that end in {end[0]} are those of files beside the outputs of runs: "
                "give another name"
            )
        writable_file(option, file, make_folder=option == "--out")
    return outputs


def show(
    args: argparse.Namespace,
    records: Mapping[Key, Record],
    points: Sequence[CompletedSettings],
    n: int,
    graders: Sequence[str],
    outputs: Mapping[str, Path],
) -> None:
    """Print the table of a finished run of n questions, and write what --csv and --plot ask for.

    InputError if records are missing.
    """
    from .report import plot, summary, write_csv

    rows, missing = [], 0
    for point in points:
        keys = [record_key(vars(point), i) for i in range(n)]
        found = [records[key] for key in keys if key in records]
        missing += n - len(found)
        if not missing:
            rows.append(summary(found, point, graders))
    if missing:
        found_out = f"{missing} of {n * len(points)} questions are not answered yet"
        if args.regrade:
            raise InputError(f"{found_out}: run without --regrade first")
        raise InputError(
            f"{found_out}, though this run answered all: something else has changed {outputs['--out']} "
            "or deleted files beside it, or processes on several machines do not share its folder. "
            "Start the same command again to answer them"
        )
    if "--csv" in outputs:
        write_atomic(outputs["--csv"], partial(write_csv, rows=rows))
    if "--plot" in outputs:
        write_atomic(outputs["--plot"], partial(plot, rows=rows, grader=graders[0]))
    print(aligned([[*rows[0]], *([*map(str, row.values())] for row in rows)]))


def measure(
    args: argparse.Namespace,
    style: Style,
    points: Sequence[CompletedSettings],
    graders: Sequence[str],
    outputs: Mapping[str, Path],
    locks: Sequence[Lock],
    processes: Processes,
) -> None:
    """Answer all questions at all points of the grid that have no record yet, and show the table.

    outputs   {option: file}, which `locks` hold in the first process
    """
    rank = processes.rank
    args.device, wait = join(processes, args.device, "gloo", WAIT)  # gloo: it is only used to wait
    if processes.world > 1:
        share(locks, rank, wait)
    file = outputs["--out"].resolve()  # what a link leads to is written, and the link stays
    examples = load_dataset(
        args.dataset,
        args.file,
        pairs("--columns", args.columns),
        args.task,
        args.limit,
        args.seed,
        warn if rank == 0 else no_op,
    )
    asked = [example.question for example in examples]
    questions = style.questions(asked, [example.fn_name for example in examples], args.dataset)
    sources = style.sources(checkpoints(args.checkpoint))
    settings = settings_line(args, style, sources, points[0], graders, examples, questions)
    if rank == 0 and examples[0].task == "code":
        check_tests(examples)
    if args.regrade:
        if rank == 0:
            records = gather(file, settings, regrading(examples, graders))
            show(args, records, points, len(examples), graders, outputs)
        return
    if rank == 0:
        gather(file, settings)
    wait()  # until the file is whole
    finished = {record_key(line, line["index"]) for line in read_lines(file)[1:]}
    wait()  # until every process has read it, so that the first may write to it
    from ..commands.needs import check_memory
    from . import answering

    check_memory(args, style, points, 1)  # more at once are asked in pieces if memory runs out
    system = answering.load(args, examples[0].task)
    answering.answer_batches(
        system,
        answering.share_of(points, len(examples), processes),
        examples,
        questions,
        graders,
        finished,
        answering.own_file(file, rank),
        quiet=rank > 0,
    )
    wait()
    if rank == 0:
        show(args, gather(file, settings), points, len(examples), graders, outputs)


def regrading(examples: Sequence[Example], graders: Sequence[str]) -> Callable[[Record], Record]:
    """A function that grades a record again."""

    def regrade(record: Record) -> Record:
        return graded(record, examples[record["index"]], graders)

    return regrade


def main() -> None:
    args = arguments()
    style = style_named(args.style)
    args.task = args.task or (None if args.dataset in BENCHMARKS else style.task)
    processes = launched()
    points, graders = plan(args, style)
    if args.needs:
        from ..commands.needs import needs_text

        task = args.task or BENCHMARKS[args.dataset]["task"]
        print(needs_text(args, style, points, task))
        return
    outputs = output_files(args)
    locks = [Lock(option, file) for option, file in outputs.items()]
    with held(locks, processes.rank):
        measure(args, style, points, graders, outputs, locks, processes)


def run() -> None:
    """The command, from its arguments to its exit status."""
    command(main)


if __name__ == "__main__":
    run()
