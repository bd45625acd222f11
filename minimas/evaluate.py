"""Benchmarks: a record of every question as soon as it is answered, then accuracy by rounds, latent steps and channel.

    python -m minimas.evaluate --style tiny --dataset tiny
    python -m minimas.evaluate --style sequential_light --dataset math500
    torchrun --nproc-per-node 4 -m minimas.evaluate --style mixture --dataset mine.jsonl --columns question=problem

The records are lines of JSON: first the settings, then one line for each question at each point of the grid. A run that was
killed goes on where it was when it is started again: batches are the same ones, so the records are, too, to the rounding of
another number of rows where memory ran out. With torchrun every process takes its share of the batches and writes a part of
its own; the first one puts the parts together.
"""

import csv
import gc
import glob
import itertools
import json
import math
import sys
from dataclasses import asdict, fields, replace
from datetime import timedelta
from pathlib import Path

import torch
from tqdm import tqdm

from . import InputError, __version__, grade
from .agent import silent
from .cli import add_answering, checkpoints, command, join_others, make_parser, names, out_of_memory, pairs, unchanged
from .data import DATASETS, complain, load_dataset, settings_for
from .plot import save_charts
from .recurse import STYLES, Settings, load_mas_system

POINT = ("channel", "rounds", "latent_steps")  # what a point of the grid is named by


def numbers(text):
    """An option that lists whole numbers: 1,2,3."""
    return tuple(int(number) for number in text.split(","))


def arguments():
    parser = add_answering(make_parser("evaluate", "Measure a recursive multi-agent system on questions with known answers."))
    add = parser.add_argument
    add("--dataset", required=True, help=f"{', '.join(DATASETS)}, or a .json, .jsonl or .csv file")
    add("--file", help="a local copy of the data set, instead of the hub")
    add("--columns", type=names, default=(), metavar="question=COLUMN,...",
        help="what a file calls question, answer, options, id, tests or fn_name")
    add("--task", default="math", help="of a local file: math (default), choice or code")
    add("--limit", type=int, help="only the first so many questions")
    add("--protocol", default="paper", help="whose settings are the defaults: paper (default) or released")
    add("--rounds", type=numbers, help="rounds of recursion, or several: 1,2,3 (default 3)")
    add("--latent-steps", type=numbers, help="latents an agent thinks per turn, or several: 16,32,48 (default: the style's)")
    add("--channel", type=names, help="what agents send: latent (default), text, or latent,text")
    add("--rollouts", type=int, help="texts per question, out of the same latents: pass@k counts one right of k")
    add("--batch-size", type=int, help="questions at once (default 8)")
    add("--grader", type=names, help=f"of mathematics: {', '.join(grade.GRADERS)}; several give a column each")
    add("--allow-code-execution", action="store_true",
        help="run the programs that agents write against the tests, in guarded processes")
    add("--out", type=Path, help="the records (default: STYLE-DATASET.jsonl)")
    add("--csv", type=Path, help="write the table there, too")
    add("--plot", type=Path, help="draw accuracy and tokens against rounds there, as SVG")
    return parser.parse_args()


def plan(args):
    """(what is asked how, the points of the grid, graders): options over the protocol's settings over the style's."""
    if args.style not in STYLES:
        raise InputError(f"style {args.style!r} is not known, expected one of {', '.join(STYLES)}")
    chosen = settings_for(args.dataset, args.style, args.protocol, args.task)
    given = {f.name: getattr(args, f.name) for f in fields(Settings) if getattr(args, f.name, None) is not None}
    options = {"rounds": (3,), "latent_steps": (None,), "channel": ("latent",)} | chosen | given
    kind = options.pop("grader")
    graders = (args.grader or (grade.default_grader(),)) if kind == "math" else args.grader or (kind,)
    if kind in ("math", "released") and (unknown := set(graders) - set(grade.GRADERS)):
        raise InputError(f"the grader is {min(unknown)!r}, expected one of {', '.join(grade.GRADERS)}")
    if kind not in ("math", "released") and args.grader:
        raise InputError(f"--grader is for mathematics; {args.dataset} is graded by {kind}: leave it out")
    if kind == "code" and not args.allow_code_execution:
        raise InputError("answers are programs, and grading runs them: say --allow-code-execution if you want that on this machine")
    grid = [value if isinstance(value, (tuple, list)) else (value,) for value in map(options.pop, POINT)]
    settings = Settings(**options)
    points = dict.fromkeys((channel, rounds, m if channel == "latent" else 0) for channel, rounds, m in itertools.product(*grid))
    return [replace(settings, **dict(zip(POINT, point))).completed(STYLES[args.style]) for point in points], graders


# Grading

def right(example, result, grader):
    """Whether an answer is right, by a grader."""
    if grader in grade.GRADERS:
        return grade.same_math(result.answer, example.gold, grader)
    if grader == "code":
        return result.answer is not None and grade.passes(result.answer, tests_of(example), example.fn_name or "")
    return {"choice": grade.same_choice, "text": grade.same_text}[grader](result.answer, example.gold)


def tests_of(example):
    """The tests of a code question, as grade.passes takes them."""
    tests = example.tests() if callable(example.tests) else example.tests
    return [tests] if isinstance(tests, str) else [(test["input"], test["output"]) for test in tests]


def record(index, example, results, point, graders):
    """The line of one question at one point of the grid."""
    return {"index": index, "id": example.id, **{name: getattr(point, name) for name in POINT},
            "question": example.question, "gold": example.gold,
            "answers": [r.answer for r in results], "texts": [r.text for r in results],
            "right": {grader: [right(example, r, grader) for r in results] for grader in graders},
            "tokens": [r.new_tokens for r in results], "heard_tokens": results[0].heard_tokens,
            "seconds": round(sum(r.seconds for r in results), 3)}


# Answering

def answers(system, questions, settings, size):
    """Results of a batch, asked in pieces of at most `size` questions, and the size: out of memory, it is halved and all asked again."""
    while True:
        try:
            pieces = [questions[i:i + size] for i in range(0, len(questions), size)]
            return [result for piece in pieces for result in system.answer(piece, settings)], size
        except (RuntimeError, MemoryError) as e:
            if not out_of_memory(e):
                raise
        if size == 1:
            raise InputError("out of memory with one question at a time: take fewer new tokens or rollouts, --offload, "
                             "or a larger device")
        size = -(-min(size, len(questions)) // 2)
        print(f"minimas: out of memory, going on with {size} questions at once", file=sys.stderr)
        for agent in system.agents.values():
            agent.release()
        gc.collect()
        torch.cuda.empty_cache()


def answer_all(system, examples, questions, points, graders, done, file, share):
    """Answer what is not done of this process's share of the batches, and append a record of each to `file`."""
    rank, world = share
    size, hits, everything = points[0].batch_size, [], range(len(examples))
    batches = [(point, everything[start:start + size]) for point in points for start in everything[::size]][rank::world]
    total = sum(len(batch) for _, batch in batches)
    with open(file, "a", encoding="utf-8") as out, tqdm(total=total, unit="question", disable=rank > 0) as bar:
        for point, batch in batches:
            missing = [i for i in batch if key({"index": i} | asdict(point)) not in done]
            if missing:
                results, size = answers(system, [questions[i] for i in batch], point, size)
            for i in missing:
                first = (i - batch.start) * point.rollouts
                line = record(i, examples[i], results[first:first + point.rollouts], point, graders)
                out.write(json.dumps(line, ensure_ascii=False) + "\n")
                out.flush()
                hits += line["right"][graders[0]]
                bar.set_postfix_str(f"{sum(hits) / len(hits):.1%} right", refresh=False)
                bar.update()
            bar.update(len(batch) - len(missing))


# Records

def key(line):
    return (*(line[name] for name in POINT), line["index"])


def read_lines(file):
    """The lines of a file of records; a last one that was cut off when its writer was killed is left out."""
    *lines, cut = file.read_bytes().split(b"\n") if file.exists() else [b""]
    try:
        if cut and not lines and not cut.startswith(b'{"minimas"'[:len(cut)]):
            raise ValueError("it begins otherwise")
        return [dict(json.loads(line)) for line in lines]
    except (ValueError, TypeError) as e:
        raise InputError(f"{file} is not a file of records ({e}): give another name with --out") from e


def gather(file, settings):
    """Put a run's records and the parts of other processes into one file, in order; refuse those of other settings."""
    parts = sorted(file.parent.glob(f"{glob.escape(file.name)}.part[0-9]*"))
    if not file.exists():  # it was deleted, so its parts are void
        for part in parts:
            part.unlink()
        parts = []
    before, *lines = read_lines(file) or [settings]
    unchanged(file, before, settings, "--out")
    records = {key(line): line for line in [*lines, *(line for part in parts for line in read_lines(part))]}
    whole = file.with_name(file.name + ".partial")
    with open(whole, "w", encoding="utf-8") as out:
        out.writelines(json.dumps(line, ensure_ascii=False) + "\n" for line in [settings, *(records[k] for k in sorted(records))])
    whole.replace(file)
    for part in parts:
        part.unlink()
    return records


def known(file, examples):
    """Keys of the records in a file; InputError where they are of other questions."""
    lines = read_lines(file)[1:]
    if other := next((line for line in lines if line["question"] != examples[line["index"]].question), None):
        raise InputError(f"{file} has another question of number {other['index']} than the data set: it has changed since; "
                         "give another name with --out")
    return {key(line) for line in lines}


# The table

def interval(p, n, z=1.96):
    """Wilson's 95 % interval of a share p seen in n trials."""
    middle, half = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return max(0.0, (middle - half) / (1 + z * z / n)), min(1.0, (middle + half) / (1 + z * z / n))


def summary(lines, point, graders):
    """A row of the table: percentages, and means over the questions."""
    n = len(lines)
    row = {name: getattr(point, name) for name in POINT} | {"questions": n}
    row["latent_steps"] = "-" if point.channel == "text" else point.latent_steps
    for grader in graders:
        shares = [sum(line["right"][grader]) / point.rollouts for line in lines]
        accuracy = sum(shares) / n
        low, high = interval(accuracy, n)
        row |= {f"{grader} %": round(100 * accuracy, 1), f"{grader} 95 %": f"{100 * low:.1f} to {100 * high:.1f}"}
        if point.rollouts > 1:
            row[f"{grader} pass@{point.rollouts} %"] = round(100 * sum(any(line["right"][grader]) for line in lines) / n, 1)
    tokens = sum(sum(line["tokens"]) + line["heard_tokens"] for line in lines) / n
    return row | {"tokens": round(tokens, 1), "seconds": round(sum(line["seconds"] for line in lines) / n, 3)}


def show(rows):
    """The table as text, numbers to the right."""
    cells = [list(rows[0]), *([str(value) for value in row.values()] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells)]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(row, widths)) for row in cells)


def draw(file, rows, grader):
    """Accuracy and tokens against rounds, a line for each channel and number of latent steps."""
    charts = []
    for title, column in ("percent right", f"{grader} %"), ("decoded tokens a question", "tokens"):
        lines = {}
        for row in rows:
            name = "text" if row["channel"] == "text" else f"latent, {row['latent_steps']} steps"
            lines.setdefault(name, []).append((row["rounds"], row[column]))
        charts.append((title, "rounds", {name: sorted(line) for name, line in lines.items()}))
    save_charts(file, charts)


def main():
    args = arguments()
    points, graders = plan(args)
    rank, world, wait = join_others(args, "gloo", timedelta(days=30))  # only to wait for one another
    tell = complain if rank == 0 else silent
    examples = load_dataset(args.dataset, args.file, pairs(args.columns), args.task, args.limit, args.seed, tell)
    file = args.out or Path(f"{args.style}-{Path(args.dataset).stem}.jsonl")
    named = ("style", "dataset", "file", "columns", "task", "limit", "checkpoint", "dtype")
    settings = {"minimas": __version__, **{name: getattr(args, name) for name in named}, "questions": len(examples), "graders": graders}
    settings |= {name: value for name, value in asdict(points[0]).items() if name not in POINT}
    settings = json.loads(json.dumps(settings))  # as it will be read from the file
    if rank == 0:
        file.parent.mkdir(parents=True, exist_ok=True)
        gather(file, settings)
    wait()  # the file is whole now
    done = known(file, examples)
    wait()  # and everybody has read it: it may be written to
    system = load_mas_system(args.style, checkpoints=checkpoints(args), device=args.device, dtype=args.dtype,
                             task=examples[0].task, offload=args.offload, plain=args.plain)
    questions = system.questions([e.question for e in examples], [e.fn_name for e in examples], args.dataset)
    own = file if rank == 0 else file.with_name(f"{file.name}.part{rank}")
    with torch.no_grad():
        answer_all(system, examples, questions, points, graders, done, own, (rank, world))
    wait()
    if rank == 0:
        report(args, gather(file, settings), points, graders, len(examples))


def report(args, records, points, graders, n):
    rows = [summary([records[key({"index": i} | asdict(point))] for i in range(n)], point, graders) for point in points]
    print(show(rows))
    if args.csv:
        with open(args.csv, "w", newline="", encoding="utf-8") as out:
            table = csv.DictWriter(out, rows[0])
            table.writeheader()
            table.writerows(rows)
    if args.plot:
        draw(args.plot, rows, graders[0])


if __name__ == "__main__":
    command(main)
