"""The command: measures a system on a benchmark. The options span a grid of channels, rounds, latent steps and what
is heard, and at each of its points all questions are answered.

    python -m minimas.evaluate --style tiny --dataset tiny
    python -m minimas.evaluate --style sequential_light --dataset math500
    torchrun --nproc-per-node 4 -m minimas.evaluate --style mixture --dataset mine.jsonl --columns question=problem

It calls `evaluate` (measure.py), and prints the table. A second run with the same outputs is refused (runs/lock.py).
"""

import argparse
from dataclasses import fields
from pathlib import Path

from ..commands.failures import command
from ..commands.options import (
    ANSWERING,
    FILES,
    MEASURED,
    add_answering,
    add_settings,
    make_parser,
    names,
    numbers,
    origin_of,
    output,
    pairs,
)
from ..runs.lock import Lock, held
from ..runs.processes import launched
from ..runs.rows import COLUMNS
from ..settings import Settings
from .benchmarks import BENCHMARKS
from .compare import Comparison, alone_file, check_given, compare, planned_pair
from .grade import GRADERS
from .measure import check_outputs, chosen, evaluate, planned


def arguments() -> argparse.Namespace:
    """The options as typed."""
    about = "Measure a recursive multi-agent system on questions with known answers."
    parser = add_answering(make_parser("evaluate", about, ANSWERING))
    add_settings(
        parser.group(ANSWERING),
        Settings,
        ("rounds", "latent_steps", "channel", "hear", "rollouts", "batch_size"),
        rounds={
            "type": numbers,
            "help": "rounds of recursion, one number or several: 1,2,3 (default: the style's)",
        },
        latent_steps={
            "type": numbers,
            "help": "latents an agent thinks a turn, or several: 16,32 (default: style's)",
        },
        channel={
            "type": names,
            "default": None,
            "help": "what agents send: latent (default), text, or latent,text",
        },
        hear={
            "type": names,
            "default": None,
            "help": "what agents hear in place of messages: own (default), other (of the question before), none, "
            "noise, shuffled, or several; along some edges only: 'planner>critic=other+critic>solver=none'",
        },
        rollouts={
            "default": None,
            "help": "texts per question, from the same latents: pass@k asks for one right of k",
        },
        batch_size={"default": None, "help": "questions at once (default 8)"},
    )
    add = parser.group(MEASURED).add_argument
    add("--dataset", required=True, help=f"{', '.join(BENCHMARKS)}, or a local file of rows")
    add("--file", help="a local copy of the data set, instead of the hub")
    add(
        "--columns",
        type=names,
        default=(),
        metavar="NAME=COLUMN,...",
        help=f"the file's names for {', '.join(COLUMNS)}",
    )
    add(
        "--compare",
        action="store_true",
        help="own latents beside other, none, text and the last agent alone, with paired differences",
    )
    add("--task", help="of a local file: math, choice or code (default: the style's)")
    add("--limit", type=int, help="only the first LIMIT rows")
    add(
        "--protocol",
        default="paper",
        help="the source of default settings: paper (default) or released",
    )
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
    add = parser.group(FILES).add_argument
    add("--out", type=output(), help="the file of records (default: STYLE-DATASET.jsonl)")
    add("--regrade", action="store_true", help="grade the texts in --out again, and ask no agent")
    add(
        "--csv",
        type=output(),
        help="write the table to this file, too (of --compare the first one)",
    )
    add(
        "--plot",
        type=output(".svg"),
        help="draw accuracy and tokens against rounds into this file, as SVG",
    )
    return parser.parse_args()


def main() -> None:
    args = arguments()
    origin = origin_of(args)
    options = {one.name: getattr(args, one.name) for one in fields(Settings)}
    measured = {
        "protocol": args.protocol,
        "graders": args.grader,
        "allow_code_execution": args.allow_code_execution,
        "limit": args.limit,
        "file": args.file,
        "columns": pairs("--columns", args.columns),
        "task": args.task,
    }
    processes = launched()
    if args.compare:
        check_given(options, None)
        run, _ = planned_pair(origin, args.dataset, chosen(**options), **measured)
    else:
        run = planned(origin, args.dataset, chosen(**options), **measured)
    if args.needs:
        from ..commands.needs import needs_text

        print(needs_text(origin, run.style, run.points, run.data.task))
        return
    default = Path(f"{Path(args.style).stem}-{Path(args.dataset).stem}.jsonl")
    out = args.out or default
    tables = {"--csv": args.csv, "--plot": args.plot}
    outputs = {option: file for option, file in tables.items() if file}
    inputs = {"--dataset": args.dataset, "--file": args.file}
    written = {"--out": out, **outputs}
    if args.compare:
        written["--out, of the last agent alone,"] = alone_file(out)
    check_outputs(written, inputs)  # all of them, before one is held
    with held([Lock(option, file) for option, file in outputs.items()], processes.rank):
        answer = compare if args.compare else evaluate
        found = answer(origin, args.dataset, **options, **measured, out=out, regrade=args.regrade)
        if processes.rank > 0:
            return
        table = found.table if isinstance(found, Comparison) else found
        if args.csv:
            table.to_csv(args.csv)
        if args.plot:
            table.plot(args.plot)
        print(found)


def run() -> None:
    """The command, from its arguments to its exit status."""
    command(main)


if __name__ == "__main__":
    run()
