"""Benchmarks: a record of every question as soon as it is answered, then accuracy by rounds, latent steps and channel.

    python -m minimas.evaluate --style tiny --dataset tiny
    python -m minimas.evaluate --style sequential_light --dataset math500
    torchrun --nproc-per-node 4 -m minimas.evaluate --style mixture --dataset mine.jsonl --columns question=problem

The options span a grid, and each of its points (a channel, a number of rounds, a number of latent steps) is measured on
all questions. The file of records holds lines of JSON: first the settings, then one line per question and point.

A run that was killed continues when it is started again. Its batches are the same then, so its records are too, but for
rounding where memory ran out and a batch was asked in pieces. With torchrun every process answers its share of the
batches and writes a part of its own; the first process merges the parts.
"""

import argparse
import csv
import gc
import glob
import itertools
import json
import math
from dataclasses import asdict, fields
from datetime import timedelta
from pathlib import Path

import torch
from tqdm import tqdm

from . import InputError, __version__, check_known, grade
from .agent import silent
from .cli import (add_answering, checkpoints, command, fingerprint, join_others, make_parser, names, out_of_memory,
                  pairs, unchanged, writable_file)
from .data import DATASETS, complain, load_dataset, settings_for
from .plot import save_charts
from .recurse import Settings, load_mas_system
from .save import write_whole
from .styles import style_named

POINT = ("channel", "rounds", "latent_steps")  # the settings that name a point of the grid
RECORD = {*POINT, "index", "question", "gold", "right", "tokens", "heard_tokens", "seconds"}  # what is read of a record


# Options

def numbers(text):
    """The value of an option that lists whole numbers, 1,2,3, as a tuple."""
    try:
        return tuple(int(number) for number in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of whole numbers such as 1,2,3") from None


def arguments():
    parser = make_parser("evaluate", "Measure a recursive multi-agent system on questions with known answers.")
    add = add_answering(parser).add_argument
    add("--dataset", required=True, help=f"{', '.join(DATASETS)}, or a .json, .jsonl or .csv file")
    add("--file", help="a local copy of the data set, instead of the hub")
    add("--columns", type=names, default=(), metavar="question=COLUMN,...",
        help="how the file names question, answer, options, id, tests or fn_name")
    add("--task", help="of a local file: math (default), choice or code")
    add("--limit", type=int, help="only the first LIMIT questions")
    add("--protocol", default="paper", help="the source of default settings: paper (default) or released")
    add("--rounds", type=numbers, help="rounds of recursion, one number or several: 1,2,3 (default 3)")
    add("--latent-steps", type=numbers, help="latents an agent thinks per turn, or several: 16,32 (default: style's)")
    add("--channel", type=names, help="what agents send: latent (default), text, or latent,text")
    add("--rollouts", type=int, help="texts per question, from the same latents: pass@k asks for one right of k")
    add("--batch-size", type=int, help="questions at once (default 8)")
    add("--grader", type=names, help=f"of mathematics: {', '.join(grade.GRADERS)}; several give a column each")
    add("--allow-code-execution", action="store_true",
        help="run the programs that agents write against the tests, in guarded processes")
    add("--out", type=Path, help="the file of records (default: STYLE-DATASET.jsonl)")
    add("--csv", type=Path, help="write the table to this file, too")
    add("--plot", type=Path, help="draw accuracy and tokens against rounds into this file, as SVG")
    return parser.parse_args()


def plan(args):
    """(the Settings of each point of the grid, the graders); InputError if options do not make a run.

    A setting is what its option says, else what the data set's protocol says, else the default of the style.
    """
    style = style_named(args.style)
    options = {"rounds": (3,), "latent_steps": (None,), "channel": ("latent",)}
    options |= settings_for(args.dataset, args.style, args.protocol, args.task)
    options |= {f.name: getattr(args, f.name) for f in fields(Settings) if getattr(args, f.name, None) is not None}
    graders = graders_for(options.pop("grader"), args.grader, args.allow_code_execution)
    grid = [value if isinstance(value, (tuple, list)) else (value,) for value in map(options.pop, POINT)]
    points = []
    for channel, rounds, latent_steps in itertools.product(*grid):
        steps = latent_steps if channel == "latent" else 0  # a text channel has none: one point for all their numbers
        points.append(Settings(channel=channel, rounds=rounds, latent_steps=steps, **options).completed(style))
    if not points:
        raise InputError("--channel lists nothing, expected latent, text or latent,text")
    return list(dict.fromkeys(points)), graders


def graders_for(kind, chosen, may_run):
    """The graders (a tuple of names) of questions of a kind: math, choice, text, code, or released (math, as released).

    chosen   the names given by --grader, or None
    may_run  whether the programs that agents write may be run
    Raises InputError if a grader is not for this kind, or if programs would have to be run and may not.
    """
    if kind in ("math", "released"):
        graders = chosen or (grade.default_grader() if kind == "math" else kind,)
        check_known("grader", graders, grade.GRADERS)
        return graders
    if chosen:
        raise InputError(f"--grader is for mathematics, and these questions are graded by {kind}: leave it out")
    if kind == "code" and not may_run:
        raise InputError("answers are programs, and grading runs them: add --allow-code-execution to allow that here")
    return (kind,)


# Grading

def is_right(example, result, grader):
    """Whether the answer of a Result is right, according to a grader."""
    if grader in grade.GRADERS:
        answer = grade.released_answer(result.text) if grader == "released" else result.answer
        return grade.same_math(answer, example.gold, grader)
    if grader == "code":
        if result.answer is None:
            return False
        tests = example.tests() if callable(example.tests) else example.tests
        return grade.passes(result.answer, tests, example.fn_name or "")
    return grade.same_text(result.answer, example.gold) if grader == "text" else result.answer == example.gold


def make_record(index, example, results, point, graders):
    """The record of one question at one point of the grid, from its Results, one for each rollout."""
    return {"index": index, "id": example.id, **{name: getattr(point, name) for name in POINT},
            "question": example.question, "gold": example.gold,
            "answers": [r.answer for r in results], "texts": [r.text for r in results],
            "right": {grader: [is_right(example, r, grader) for r in results] for grader in graders},
            "tokens": [r.new_tokens for r in results], "heard_tokens": results[0].heard_tokens,
            "seconds": round(sum(r.seconds for r in results), 3)}


def record_key(place, index):
    """What tells a record from all others of its run; place: the record, or vars() of its point of the grid."""
    return (*(place[name] for name in POINT), index)


# Answering

def answer_in_pieces(system, questions, settings, size):
    """(Results of a batch, size): the batch is asked in pieces of at most `size` questions.

    When memory runs out, the size is halved and the whole batch asked again; InputError if one question is too much.
    """
    while True:
        try:
            pieces = [questions[i:i + size] for i in range(0, len(questions), size)]
            return [result for piece in pieces for result in system.answer(piece, settings)], size
        except (RuntimeError, MemoryError) as e:
            if not out_of_memory(e):
                raise
        if size == 1:
            raise InputError("out of memory with one question at a time: try fewer new tokens or rollouts, --offload, "
                             "or a larger device")
        size = -(-min(size, len(questions)) // 2)
        complain(f"out of memory, going on with {size} questions at once")
        for agent in system.agents.values():
            agent.release()
        gc.collect()
        torch.cuda.empty_cache()


def answer_all(system, examples, questions, points, graders, finished, file, rank, world):
    """Answer the questions of this process's share of the batches, and append a record of each to `file`.

    finished     the keys of records that exist already
    rank, world  the number of this process, and of all processes; each takes every world-th batch
    """
    size, k, everything = points[0].batch_size, points[0].rollouts, range(len(examples))
    batches = [(point, everything[i:i + size]) for point in points for i in everything[::size]][rank::world]
    total, verdicts = sum(len(batch) for _, batch in batches), []
    with open(file, "a", encoding="utf-8") as out, tqdm(total=total, unit="question", disable=rank > 0) as bar:
        for point, batch in batches:
            missing = [i for i in batch if record_key(vars(point), i) not in finished]
            if missing:  # the whole batch is asked again, because other rows would round otherwise
                results, size = answer_in_pieces(system, [questions[i] for i in batch], point, size)
            for i in missing:
                first = (i - batch.start) * k  # each question of the batch has k results, one after another
                record = make_record(i, examples[i], results[first:first + k], point, graders)
                out.write(json.dumps(record, ensure_ascii=False) + "\n")
                out.flush()
                verdicts += record["right"][graders[0]]
                bar.set_postfix_str(f"{sum(verdicts) / len(verdicts):.1%} right", refresh=False)
                bar.update()
            bar.update(len(batch) - len(missing))


# Records

def read_lines(file):
    """The lines of a file of records, as dicts; a last one that was cut off when its writer was killed is left out.

    Raises InputError if the file holds something else.
    """
    *lines, cut = file.read_bytes().split(b"\n") if file.exists() else [b""]
    try:
        if cut and not lines and not cut.startswith(b'{"minimas"'[:len(cut)]):
            raise ValueError("its first line is no settings")
        return [dict(json.loads(line)) for line in lines]
    except (ValueError, TypeError) as e:
        raise InputError(f"{file} is not a file of records ({e}): give another name with --out") from e


def gather(file, settings):
    """Merge a run's records and the parts of other processes into one file, in order; returns {key: record}.

    Raises InputError if the file holds a run with other settings.
    """
    parts = sorted(file.parent.glob(f"{glob.escape(file.name)}.part[0-9]*"))
    if not file.exists():  # it was deleted, so its parts are void
        for part in parts:
            part.unlink()
        parts = []
    before, *lines = read_lines(file) or [settings]
    lines += [line for part in parts for line in read_lines(part)]
    if lines:  # else that run found out that it could not begin
        unchanged(file, before, settings, "--out")
    if foreign := [line for line in lines if not RECORD <= line.keys()]:
        raise InputError(f"{file} holds a line that is no record, {str(foreign[0])[:60]}: give another name with --out")
    records = {record_key(line, line["index"]): line for line in lines}
    lines = (json.dumps(line, ensure_ascii=False) + "\n" for line in [settings, *(records[key] for key in sorted(records))])
    write_whole(file, lambda path: path.write_text("".join(lines), encoding="utf-8"))
    for part in parts:
        part.unlink()
    return records


def finished_keys(file, examples):
    """The keys of the records in a file; InputError if the data set has another question or answer in a record's place."""
    lines, asked = read_lines(file)[1:], [(example.question, example.gold) for example in examples]
    for line in lines:
        if line["index"] not in range(len(asked)) or (line["question"], line["gold"]) != asked[line["index"]]:
            raise InputError(f"question {line['index']} in {file} or its answer is not that of the data set, which must "
                             "have changed: give another name with --out")
    return {record_key(line, line["index"]) for line in lines}


# The table

def interval(p, n, z=1.96):
    """Wilson's 95 % interval of a share p seen in n independent trials.

    The trials are questions. With k rollouts p is the mean of the questions' own shares, whose variance is p(1 - p) at
    most: the interval is then at least as wide as it should be, and never takes rollouts for more questions.
    """
    middle, half = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return max(0.0, (middle - half) / (1 + z * z / n)), min(1.0, (middle + half) / (1 + z * z / n))


def summary(records, point, graders):
    """A row of the table from all records of a point: percentages, and means over the questions."""
    n = len(records)
    row = {name: getattr(point, name) for name in POINT} | {"questions": n}
    row["latent_steps"] = "-" if point.channel == "text" else point.latent_steps
    for grader in graders:
        verdicts = [record["right"][grader] for record in records]
        accuracy = sum(sum(own) / point.rollouts for own in verdicts) / n
        low, high = interval(accuracy, n)
        row |= {f"{grader} %": round(100 * accuracy, 1), f"{grader} 95 %": f"{100 * low:.1f} to {100 * high:.1f}"}
        if point.rollouts > 1:
            row[f"{grader} pass@{point.rollouts} %"] = round(100 * sum(map(any, verdicts)) / n, 1)
    tokens = sum(sum(record["tokens"]) + record["heard_tokens"] for record in records) / n
    return row | {"tokens": round(tokens, 1), "seconds": round(sum(record["seconds"] for record in records) / n, 3)}


def table_text(rows):
    """The table as text, its cells aligned to the right."""
    cells = [list(rows[0]), *([str(value) for value in row.values()] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells)]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(row, widths)) for row in cells)


def write_csv(file, rows):
    with open(file, "w", newline="", encoding="utf-8") as out:
        table = csv.DictWriter(out, rows[0])
        table.writeheader()
        table.writerows(rows)


def plot(file, rows, grader):
    """Draw accuracy and tokens against rounds, with a line for each channel and number of latent steps."""
    charts = []
    for title, column in ("percent right", f"{grader} %"), ("decoded tokens a question", "tokens"):
        lines = {}
        for row in rows:
            name = "text" if row["channel"] == "text" else f"latent, {row['latent_steps']} steps"
            lines.setdefault(name, []).append((row["rounds"], row[column]))
        charts.append((title, "rounds", {name: sorted(line) for name, line in lines.items()}))
    save_charts(file, charts)


# The command

def record_file(args):
    """The file of records, in a folder that exists.

    InputError if it, or that of --csv or --plot, cannot be written, or two of them or the data are one file.
    """
    out = args.out or Path(f"{args.style}-{Path(args.dataset).stem}.jsonl")
    files = {"--dataset": args.dataset, "--file": args.file, "--out": out, "--csv": args.csv, "--plot": args.plot}
    taken = {}
    for option, file in files.items():
        place = file and Path(file).expanduser().resolve()
        if file and place in taken:
            raise InputError(f"{option} and {taken[place]} are the same file, {file}: give another name")
        taken[place] = option
        if file and option in ("--csv", "--plot"):
            writable_file(option, file)
    return writable_file("--out", out, make_folder=True)


def settings_line(args, points, graders, examples):
    """The first line of the records: all that must not change if another run is to continue this one."""
    named = ("style", "dataset", "file", "columns", "limit", "checkpoint", "dtype")
    line = {"minimas": __version__, **{name: getattr(args, name) for name in named}}
    line |= {"task": examples[0].task, "questions": len(examples)}
    line |= {"graders": graders, "checkpoint_files": fingerprint(args.checkpoint)}
    line |= {name: value for name, value in asdict(points[0]).items() if name not in POINT}
    return json.loads(json.dumps(line))  # as it will be read from the file: tuples are lists


def report(args, rows, grader):
    if args.csv:
        write_csv(args.csv, rows)
    if args.plot:
        plot(args.plot, rows, grader)
    print(table_text(rows))


def main():
    args = arguments()
    points, graders = plan(args)
    file = record_file(args)
    rank, world, wait = join_others(args, "gloo", timedelta(days=30))  # gloo: it is only used to wait
    tell = complain if rank == 0 else silent
    columns = pairs("--columns", args.columns)
    examples = load_dataset(args.dataset, args.file, columns, args.task, args.limit, args.seed, tell)
    settings = settings_line(args, points, graders, examples)
    if rank == 0:
        gather(file, settings)
    wait()  # until the file is whole
    finished = finished_keys(file, examples)
    wait()  # until every process has read it, so that the first may write to it
    system = load_mas_system(args.style, checkpoints=checkpoints(args), device=args.device, dtype=args.dtype,
                             task=examples[0].task, offload=args.offload, plain=args.plain)
    questions = system.questions([e.question for e in examples], [e.fn_name for e in examples], args.dataset)
    own_file = file if rank == 0 else file.with_name(f"{file.name}.part{rank}")
    with torch.no_grad():
        answer_all(system, examples, questions, points, graders, finished, own_file, rank, world)
    wait()
    if rank == 0:
        records = gather(file, settings)
        by_point = ([records[record_key(vars(point), i)] for i in range(len(examples))] for point in points)
        report(args, [summary(own, point, graders) for own, point in zip(by_point, points)], graders[0])


if __name__ == "__main__":
    command(main)
