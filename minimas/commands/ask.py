"""Ask a system: what `python -m minimas.recurse` and `minimas ask` do.

    python -m minimas.recurse --prompt "7 +5 *3 -4 +8 *7 -1 +6"

Each answer is printed as soon as its batch is done. Without --prompt, questions are asked for on the terminal, which
shows an answer while it is written.
"""

import argparse
import json
import sys
from contextlib import closing
from dataclasses import fields
from pathlib import Path
from typing import Any

from tqdm import tqdm

from ..common import InputError, write_atomic
from ..look.logit_lens import LensRow, logit_lens, table
from ..look.trace import page
from ..prompts import Question
from ..result import Result
from ..runs.lock import Lock, held
from ..runs.needs import check_memory
from ..runs.outputs import writable_file
from ..settings import CompletedSettings, Settings, check_neighbours
from ..styles import Style, style_named
from ..system import System, load_mas_system
from .failures import check_stdout, command, completed_first
from .needs import needs_text
from .options import (
    ANSWERING,
    add_answering,
    add_settings,
    make_parser,
    origin_of,
    output,
    read_questions,
)
from .terminal import converse, print_as_written


def run() -> None:
    """The command, from its arguments to its exit status."""
    command(main)


def main() -> None:
    args = arguments()
    style = style_named(args.style)
    settings = checked_settings(args, style)
    task = args.task or style.task
    origin = origin_of(args)
    if args.needs:
        print(needs_text(origin, style, [settings], task))
        return
    on_terminal = not args.prompt and sys.stdin is not None and sys.stdin.isatty()
    typed = [] if on_terminal else read_questions(args.prompt)
    fn_name = args.fn_name or ""
    questions = style.questions(typed, [fn_name] * len(typed))
    asked_at_once = questions or [Question("")]  # on a terminal they come one by one
    check_neighbours(asked_at_once, settings)
    outputs = [] if args.trace is None else [Lock("--trace", args.trace)]
    with held(outputs):
        at_once = min(len(questions) or 1, settings.batch_size)
        check_memory(origin, style, [settings], at_once)
        system = load_mas_system(**vars(origin), task=task)
        if not on_terminal:
            print_answers(system, questions, settings, args)
            return

        as_written = sys.stdout.isatty() and not args.json and not args.peek

        def answer(text: str) -> None:
            questions = style.questions([text], [fn_name])
            if as_written:
                print_while_written(system, questions, settings, args)
            else:
                print_answers(system, questions, settings, args)

        converse(answer)


# Options

ASKED = "what is asked"
SHOWN = "what is shown"


def arguments() -> argparse.Namespace:
    """The options of sys.argv; InputError if they cannot be parsed."""
    about = "Ask a recursive multi-agent system."
    parser = add_answering(make_parser("recurse", about, ANSWERING))
    add_settings(
        parser.group(ANSWERING),
        Settings,
        ("rounds", "latent_steps", "batch_size", "rollouts", "channel", "hear"),
    )
    add = parser.group(ASKED).add_argument
    add(
        "--prompt",
        action="append",
        default=[],
        metavar="TEXT",
        help="a question, repeat for more; - for lines of stdin (default, on a terminal: ask for one after another)",
    )
    add(
        "--task",
        help="the kind of answer: math, choice or code (default: the style's, mostly math)",
    )
    add(
        "--fn-name",
        help="with --task code: the name of the function to write (default: a whole program)",
    )
    add = parser.group(SHOWN).add_argument
    add("--json", action="store_true", help="print one JSON object per answer")
    add(
        "--peek",
        action="store_true",
        help="show what agents think, by the logit lens: the tokens closest to each state",
    )
    add(
        "--trace",
        type=output(".html", ".htm"),
        metavar="FILE.html",
        help="write a page that shows each turn: its prompt, latents, time and text",
    )
    return parser.parse_args()


def checked_settings(args: argparse.Namespace, style: Style) -> CompletedSettings:
    """The Settings of a run; InputError if options do not go together, or --trace cannot be written."""
    task = args.task or style.task
    if args.fn_name is not None and task != "code":
        raise InputError(
            f"--fn-name names a function, but the task is {task}: add --task code, or leave it out"
        )
    if args.fn_name and not args.fn_name.isidentifier():
        raise InputError(
            f"--fn-name is {args.fn_name!r}, expected the name of a function, such as is_prime"
        )
    if (args.peek or args.trace) and args.channel == "text":
        option = "--peek" if args.peek else "--trace"
        raise InputError(
            f"{option} shows latents, and with --channel text there are none: leave one of them out"
        )
    if args.trace is not None:
        writable_file("--trace", args.trace)
    chosen = {field.name: getattr(args, field.name) for field in fields(Settings)}
    return Settings(**chosen).completed(style)


# Printing


def print_answers(
    system: System, questions: list[Question], settings: CompletedSettings, args: argparse.Namespace
) -> None:
    """Answer Questions, print each Result, and make the page of --trace of them.

    If stdout fails, the rest is answered only where --trace wants it.
    """
    traced = args.trace is not None
    results: list[Result] = []
    answers = system.stream(
        questions, settings, keep_latents=traced, keep_states=args.peek or traced, progress=True
    )
    try:
        with closing(answers):  # and its progress bar, before anything is said about an error
            for result in answers:
                if traced:
                    results.append(result)
                print_result(system, result, settings, args)
                if not traced:
                    check_stdout()
    finally:
        if results:  # those that there are, if the run is broken off
            write_trace(system, results, args.trace)
    check_stdout()


def print_while_written(
    system: System, questions: list[Question], settings: CompletedSettings, args: argparse.Namespace
) -> None:
    """The same for one Question on a terminal, which shows its texts while they are written."""
    traced = args.trace is not None
    total = system.positions(settings)
    with tqdm(total=total, unit="token", leave=False) as bar:
        pieces = system.write(questions, settings, traced, traced, bar.update)
        with closing(pieces):
            results = print_as_written(pieces, bar.close, ending)
    for result in results:
        warn_without_answer(system, result)
    if traced:
        write_trace(system, results, args.trace)
    check_stdout()


def write_trace(system: System, results: list[Result], file: Path) -> None:
    """Write the page of --trace."""
    with completed_first():
        html = page(system, results)
        write_atomic(file, lambda path: path.write_text(html, encoding="utf-8"))


def print_result(
    system: System, result: Result, settings: CompletedSettings, args: argparse.Namespace
) -> None:
    """Print a Result at once, above the progress bar."""
    peek_rows = logit_lens(system, result) if args.peek else None
    tqdm.write(result_text(result, settings, args.json, peek_rows))
    sys.stdout.flush()
    warn_without_answer(system, result)


def warn_without_answer(system: System, result: Result) -> None:
    """Say on stderr that a text holds no answer."""
    if result.answer is None:
        tqdm.write(
            f"minimas: no answer in the form that task {system.task} asks for", file=sys.stderr
        )


def result_text(
    result: Result,
    settings: CompletedSettings,
    as_json: bool,
    peek_rows: list[LensRow] | None = None,
) -> str:
    """What is printed for a Result: its text and answer, or a JSON object; and the rows of --peek, if there are any."""
    if as_json:
        line: dict[str, Any] = {
            "question": result.question,
            "text": result.text,
            "answer": result.answer,
            "new_tokens": result.new_tokens,
            "seconds": result.seconds,
            "rounds": settings.rounds,
            "latent_steps": settings.latent_steps,
        }
        if peek_rows is not None:
            line["peek"] = peek_rows
        return json.dumps(line, ensure_ascii=False)
    text = result.text + ending(result)
    return f"{table(peek_rows)}\n\n{text}" if peek_rows else text


def ending(result: Result) -> str:
    """What is printed after the text: its answer, unless that is a program, with which the text ends."""
    if result.answer is None or "\n" in result.answer:
        return ""
    return f"\nanswer: {result.answer}"
