"""The command: measures a system on a benchmark. The options span a grid of channels, rounds and latent steps, and at
each of its points all questions are answered.

    python -m minimas.evaluate --style tiny --dataset tiny
    python -m minimas.evaluate --style sequential_light --dataset math500
    torchrun --nproc-per-node 4 -m minimas.evaluate --style mixture --dataset mine.jsonl --columns question=problem

The record of a question (records.py) is written as soon as it is answered. At the end the table (report.py) is printed.

A run that was killed continues when it is started again. It replays the same batches, so records match up to rounding;
they differ by rounding only where memory ran out and a batch was answered in pieces. With torchrun every process answers
its share of the batches and writes a part of its own; the first process merges the parts.
"""

import gc
import itertools
from argparse import ArgumentTypeError
from dataclasses import fields
from datetime import timedelta
from pathlib import Path

import torch
from tqdm import tqdm

from ..commands.failures import command
from ..commands.options import add_answering, make_parser, names
from ..common import (
    InputError,
    aligned,
    checkpoints,
    no_op,
    out_of_memory,
    pairs,
    warn,
    writable_file,
)
from ..look.needs import check_memory, needs_text
from ..recurse import load_mas_system
from ..styles import Settings, style_named
from .benchmarks import BENCHMARKS, COLUMNS, load_dataset, settings_for
from .grade import GRADERS, graders_for
from .records import (
    POINT,
    gather,
    graded,
    line_of,
    make_record,
    read_lines,
    record_key,
    settings_line,
)
from .report import plot, summary, write_csv
from .run_tests import check_tests
from .runs import join_others

# Options


def numbers(text):
    """The value of an option that lists whole numbers, 1,2,3, as a tuple."""
    try:
        return tuple(map(int, text.split(",")))
    except ValueError:
        raise ArgumentTypeError(f"{text!r} is not a list of whole numbers such as 1,2,3") from None


def arguments():
    parser = make_parser(
        "evaluate", "Measure a recursive multi-agent system on questions with known answers."
    )
    add = add_answering(parser).add_argument
    add(
        "--dataset", required=True, help=f"{', '.join(BENCHMARKS)}, or a .json, .jsonl or .csv file"
    )
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


def plan(args, style):
    """(the completed Settings of each point of the grid, the graders); InputError if options do not make a run.

    A setting is what its option says, else what the data set's protocol says, else the default of the style.
    """
    options = {"rounds": (None,), "latent_steps": (None,), "channel": ("latent",)}
    options |= settings_for(args.dataset, args.style, args.protocol, args.task)
    options |= {
        f.name: getattr(args, f.name)
        for f in fields(Settings)
        if getattr(args, f.name, None) is not None
    }
    graders = graders_for(options.pop("grader"), args.grader, args.allow_code_execution)
    points = []
    for channel, rounds, latent_steps in itertools.product(*map(options.pop, POINT)):
        steps = (
            latent_steps if channel == "latent" else 0
        )  # a text channel has none: one point for all their numbers
        points.append(
            Settings(channel=channel, rounds=rounds, latent_steps=steps, **options).completed(style)
        )
    if not points:
        raise InputError("--channel lists nothing, expected latent, text or latent,text")
    return list(dict.fromkeys(points)), graders


# Answering


def answer_in_pieces(system, questions, settings, size):
    """(Results of a batch, size): the batch is asked in pieces of at most `size` questions.

    When memory runs out, the size is halved and the whole batch asked again; InputError if one question is too much.
    """
    while True:
        try:
            pieces = [questions[i : i + size] for i in range(0, len(questions), size)]
            return [result for piece in pieces for result in system.answer(piece, settings)], size
        except (RuntimeError, MemoryError) as e:
            if not out_of_memory(e):
                raise
        if size == 1:
            raise InputError(
                "out of memory with one question at a time: try fewer new tokens or rollouts, or --offload"
            )
        size = -(-min(size, len(questions)) // 2)
        warn(f"out of memory, going on with {size} questions at once")
        for agent in system.agents.values():
            agent.release()
        gc.collect()
        torch.cuda.empty_cache()


def answer_batches(system, batches, examples, questions, graders, finished, file, quiet=False):
    """Answer batches, and append a record of each question to `file`.

    batches   [(the Settings of a point, the indices of a batch of the questions), ...]
    finished  the keys of records that exist already
    quiet     show no bar
    """
    size, k = (batches[0][0].batch_size, batches[0][0].rollouts) if batches else (1, 1)
    total, verdicts = sum(len(batch) for _, batch in batches), []
    with (
        open(file, "a", encoding="utf-8") as out,
        tqdm(total=total, unit="question", disable=quiet) as bar,
    ):
        for point, batch in batches:
            missing = [i for i in batch if record_key(vars(point), i) not in finished]
            if missing:  # the whole batch is asked again, because other rows would round otherwise
                results, size = answer_in_pieces(system, [questions[i] for i in batch], point, size)
            for i in missing:
                first = (
                    i - batch.start
                ) * k  # each question of the batch has k results, one after another
                record = make_record(i, examples[i], results[first : first + k], point, graders)
                out.write(line_of(record))
                out.flush()
                verdicts += record["right"][graders[0]]
                bar.set_postfix_str(f"{sum(verdicts) / len(verdicts):.1%} right", refresh=False)
            bar.update(len(batch))


# The command


def record_file(args):
    """The file of records, in a folder that exists.

    InputError if it, or that of --csv or --plot, cannot be written, or two of them or the data are one file.
    """
    out = args.out or Path(f"{Path(args.style).stem}-{Path(args.dataset).stem}.jsonl")
    files = {
        "--dataset": args.dataset,
        "--file": args.file,
        "--out": out,
        "--csv": args.csv,
        "--plot": args.plot,
    }
    taken = {}
    for option, file in [(option, file) for option, file in files.items() if file]:
        if (other := taken.setdefault(Path(file).expanduser().resolve(), option)) != option:
            raise InputError(f"{option} and {other} are the same file, {file}: give another name")
        if option in ("--csv", "--plot"):
            writable_file(option, file)
    return writable_file("--out", out, make_folder=True)


def show(args, records, points, n, graders):
    """Print the table of a finished run of n questions, and write what --csv and --plot ask for.

    InputError if records are missing.
    """
    missing = [
        point for point in points for i in range(n) if record_key(vars(point), i) not in records
    ]
    if missing:
        raise InputError(
            f"{len(missing)} of {n * len(points)} questions are not answered yet: run without --regrade first"
        )
    rows = [
        summary([records[record_key(vars(point), i)] for i in range(n)], point, graders)
        for point in points
    ]
    if args.csv:
        write_csv(args.csv, rows)
    if args.plot:
        plot(args.plot, rows, graders[0])
    print(aligned([[*rows[0]], *([*map(str, row.values())] for row in rows)]))


def main():
    args = arguments()
    style = style_named(args.style)
    args.task = args.task or (None if args.dataset in BENCHMARKS else style.task)
    points, graders = plan(args, style)
    if args.needs:
        return print(needs_text(args, style, points, args.task or BENCHMARKS[args.dataset]["task"]))
    file = record_file(args)
    rank, world, wait = join_others(
        args, "gloo", timedelta(days=30)
    )  # gloo: it is only used to wait
    examples = load_dataset(
        args.dataset,
        args.file,
        pairs("--columns", args.columns),
        args.task,
        args.limit,
        args.seed,
        warn if rank == 0 else no_op,
    )
    questions = style.questions(
        [e.question for e in examples], [e.fn_name for e in examples], args.dataset
    )
    settings = settings_line(
        args,
        style,
        style.sources(checkpoints(args.checkpoint)),
        points[0],
        graders,
        examples,
        questions,
    )
    if rank == 0 and examples[0].task == "code":
        check_tests(examples)
    again = (
        (lambda record: graded(record, examples[record["index"]], graders))
        if args.regrade
        else None
    )
    records = gather(file, settings, again) if rank == 0 else {}
    if args.regrade:
        if rank == 0:
            show(args, records, points, len(examples), graders)
        return
    wait()  # until the file is whole
    finished = {record_key(line, line["index"]) for line in read_lines(file)[1:]}
    wait()  # until every process has read it, so that the first may write to it
    check_memory(args, style, points, 1)  # more at once are asked in pieces if memory runs out
    system = load_mas_system(
        args.style,
        checkpoints=checkpoints(args.checkpoint),
        device=args.device,
        dtype=args.dtype,
        task=examples[0].task,
        offload=args.offload,
        plain=args.plain,
    )
    everything, size = range(len(examples)), points[0].batch_size
    batches = [
        (point, everything[i : i + size]) for point in points for i in everything[::size]
    ]  # the run in order
    own_file = file if rank == 0 else file.with_name(f"{file.name}.part{rank}")
    with torch.no_grad():
        answer_batches(
            system,
            batches[rank::world],
            examples,
            questions,
            graders,
            finished,
            own_file,
            quiet=rank > 0,
        )
    wait()
    if rank == 0:
        show(args, gather(file, settings), points, len(examples), graders)


def run() -> None:
    """The command, from its arguments to its exit status."""
    command(main)


if __name__ == "__main__":
    run()
