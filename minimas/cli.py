"""What the commands share: options, the files they write, and how they fail.

A command writes its results to stdout and everything else to stderr.
"""

import argparse
import os
import sys
from contextlib import redirect_stdout, suppress
from io import TextIOWrapper
from pathlib import Path
from tempfile import NamedTemporaryFile

from . import __version__
from .common import InputError, warn
from .styles import STYLES
from .tokenizer import DATE

# Options


def names(text):
    """The value of an option that lists names, a,b,c, as a tuple."""
    return tuple(name for name in text.split(",") if name)


def pairs(option, parts, expected="NAME=COLUMN"):
    """The parts NAME=COLUMN of an option as a dict; InputError if one of them is not a pair, or a name comes twice."""
    if wrong := [part for part in parts if not all(part.partition("="))]:
        raise InputError(f"{option} has {wrong[0]!r}, expected {expected}")
    given = [part.partition("=")[0] for part in parts]
    if twice := [name for name in given if given.count(name) > 1]:
        raise InputError(f"{option} gives {twice[0]} twice: give it once")
    return dict(part.partition("=")[::2] for part in parts)


def refuse(message):
    """Stands in for ArgumentParser.error, which would print a usage message and exit."""
    raise InputError(message)


def make_parser(module, description):
    """A parser with the options that every command has; it raises InputError if it cannot parse the arguments."""
    parser = argparse.ArgumentParser(prog=f"python -m minimas.{module}", description=description)
    parser.error = refuse
    add = parser.add_argument
    add(
        "--style",
        default="tiny",
        help=f"the system: {', '.join(STYLES)}, or a .json file (default tiny)",
    )
    add(
        "--checkpoint",
        action="append",
        default=[],
        metavar="ROLE=PATH",
        help="take this role, or links, from this folder "
        "or hub id; repeat for more; or one PATH with a folder for each; for style single the PATH or hub id of the agent",
    )
    add(
        "--device",
        help="cpu, cuda, or one for each role: planner=cuda:0,critic=cuda:1,... (default: cuda if there is one)",
    )
    add(
        "--dtype",
        help="of the agents: float32, bfloat16 or float16 (default: float32 on cpu, else the checkpoint's)",
    )
    add("--seed", type=int, default=42, help="seed of all random numbers (default 42)")
    add(
        "--date",
        default=DATE,
        help=f"the date that chat templates tell their agents (default {DATE})",
    )
    add("--version", action="version", version=f"minimas {__version__}")
    return parser


def add_answering(parser):
    """Add the options of commands whose agents answer questions; returns the parser."""
    add = parser.add_argument
    add("--plain", action="store_true", help="do without the fast path: slower, the same answers")
    add(
        "--offload",
        action="store_true",
        help="keep only the weights of the working agent on the device",
    )
    add(
        "--needs",
        action="store_true",
        help="print how large the files are and what memory is needed, and load nothing",
    )
    add("--max-new-tokens", type=int, help="the most tokens of an answer (default: the style's)")
    add(
        "--temperature",
        type=float,
        help="0 always takes the likeliest token (default: the style's)",
    )
    add(
        "--top-p",
        type=float,
        default=0.95,
        help="sample from the likeliest tokens that reach this sum (default 0.95)",
    )
    add(
        "--top-k",
        type=int,
        help="and from no more tokens than this, 0 for all (default: generation_config.json's)",
    )
    add(
        "--tools",
        type=names,
        default=(),
        help="what style deliberation may call: python, search or python,search",
    )
    add(
        "--no-retry",
        dest="retry",
        action="store_false",
        help="do not ask again when a text holds no answer",
    )
    return parser


def checkpoints(args):
    """--checkpoint as load_mas_system takes it: one folder or hub id, or {role: path}; InputError if it is neither."""
    if (
        len(args.checkpoint) == 1
        and (only := args.checkpoint[0])
        and (Path(only).expanduser().is_dir() or "=" not in only)
    ):
        return only
    return pairs("--checkpoint", args.checkpoint, "ROLE=PATH, or one folder of all roles")


def read_questions(prompts):
    """The questions of --prompt, those from stdin included; InputError if there are none."""
    questions = [
        question for text in prompts for question in (stdin_lines() if text == "-" else [text])
    ]
    if not questions:
        raise InputError(
            "there is no question: give one with --prompt, or one a line on stdin with --prompt -"
        )
    return questions


def stdin_lines():
    """The lines of stdin that are not blank."""
    text = (sys.stdin.read() if sys.stdin else "").removeprefix("\ufeff").replace("\r\n", "\n")
    return [line for line in text.split("\n") if line.strip()]


# Files


def writable_file(option, name, make_folder=False):
    """The Path of a file that a command is going to write; InputError if it cannot be written. It is not changed."""
    file = Path(name)
    try:
        if make_folder:
            file.parent.mkdir(parents=True, exist_ok=True)
        if file.exists():
            if not file.is_file():
                raise OSError("it is not an ordinary file")
            file.open("a").close()
        NamedTemporaryFile(
            dir=file.parent, prefix=f"{file.name}."
        ).close()  # may files be made here, with such a name?
    except OSError as e:
        raise InputError(
            f"{option} {str(name)!r} cannot be written ({e.strerror or e}): "
            "give a file in an existing folder that you may write to"
        ) from e
    return file


def out_of_memory(error):
    """Whether an exception says that memory ran out: that of a GPU, of one of its libraries, or of the CPU."""
    words = "out of memory", "ALLOC_FAILED", "can't allocate memory"
    return isinstance(error, MemoryError) or any(word in str(error) for word in words)


LESS_MEMORY = (
    "fewer questions at once (--batch-size), lower --rollouts or --max-new-tokens, or --offload"
)


def exit_status(f, less=LESS_MEMORY):
    """Call f() -> the exit status that it deserves: None, 130 on Ctrl-C, 2 if a sentence on stderr says what is to be mended.

    less: what to try when memory runs out
    """
    try:
        f()
        sys.stdout.flush()
    except KeyboardInterrupt:
        return 130
    except (InputError, RuntimeError, MemoryError) as e:
        if not (isinstance(e, InputError) or out_of_memory(e)):
            raise
        warn(e if isinstance(e, InputError) else f"out of memory: try {less}")
        return 2


def command(main, less=LESS_MEMORY):
    """Run a command's main(), and leave with the exit status of `exit_status` if there is one.

    A file that fails is a sentence and status 2, too. A reader of the output who has seen enough (| head) makes it 141, as
    the shell has it.
    """
    # A question may hold what is not UTF-8: Style.questions says so. An answer may hold what the terminal's encoding lacks.
    for stream, errors in (
        (sys.stdin, "surrogateescape"),
        (sys.stdout, "backslashreplace"),
        (sys.stderr, "backslashreplace"),
    ):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors=errors)
    try:
        if status := exit_status(main, less):
            raise SystemExit(status)
    except OSError as e:
        with suppress(
            OSError
        ):  # what is left of the output is dropped; it would fail again at exit
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if isinstance(e, BrokenPipeError):
            raise SystemExit(141) from None
        warn(
            f"{e.filename or 'a file'} cannot be read or written ({e.strerror or e}): check permissions and disk space"
        )
        raise SystemExit(2) from None


def converse(answer):
    """Ask for one question after another on the terminal until end of file, and call answer(question) with each.

    Ctrl-C or a sentence about what is to be mended ends an answer only, and the next question is asked.
    """
    with suppress(ImportError):
        import readline  # noqa: F401  (input() edits lines with it)

    def turn():
        with redirect_stdout(
            sys.stdout if sys.stdout.isatty() else sys.stderr
        ):  # the sign is no result
            typed = input("> ")
        if typed.strip():
            answer(typed)

    with suppress(EOFError):
        while True:
            if exit_status(turn) == 130:
                print(file=sys.stderr)
    print(file=sys.stderr)
