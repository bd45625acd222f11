"""The command line: first what all three commands share, then the command `python -m minimas.recurse`.

A command writes its results to stdout and everything else to stderr.
"""

import argparse
import hashlib
import json
import os
import sys
from contextlib import suppress
from dataclasses import fields
from io import TextIOWrapper
from pathlib import Path
from tempfile import NamedTemporaryFile

import torch
from tqdm import tqdm

from . import InputError, __version__
from .agent import silent
from .peek import peek, table
from .recurse import Settings, load_mas_system
from .save import write_whole
from .styles import STYLES, style_named
from .tokenizer import DATE
from .trace import page

LOADED = (".pt", ".safetensors", ".json", ".jinja")  # endings of the files that agents and links are loaded from


# Shared by all commands: options

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
    add("--style", default="tiny", help=f"the system: {', '.join(STYLES)} (default tiny)")
    add("--checkpoint", action="append", default=[], metavar="ROLE=PATH",
        help="take this role, or links, from this folder or hub id; repeat for more; or give one PATH, a folder that "
             "holds a folder for each")
    add("--device",
        help="cpu, cuda, or a device for each role: planner=cuda:0,critic=cuda:1,... (default: cuda if there is one)")
    add("--dtype", help="of the agents: float32, bfloat16 or float16 (default: float32 on cpu, else the checkpoint's)")
    add("--seed", type=int, default=42, help="seed of all random numbers (default 42)")
    add("--date", default=DATE, help=f"the date that Llama's template tells its agent (default {DATE})")
    add("--version", action="version", version=f"minimas {__version__}")
    return parser


def add_answering(parser):
    """Add the options of commands whose agents answer questions; returns the parser."""
    add = parser.add_argument
    add("--plain", action="store_true", help="do without the fast path: slower, the same answers")
    add("--offload", action="store_true", help="keep only the weights of the working agent on the device")
    add("--max-new-tokens", type=int, help="the most tokens of an answer (default: the style's)")
    add("--temperature", type=float, help="0 always takes the likeliest token (default: the style's)")
    add("--top-p", type=float, default=0.95,
        help="sample from the likeliest tokens that together reach this probability (default 0.95)")
    add("--top-k", type=int, help="and from no more tokens than this, 0 for all (default: generation_config.json's)")
    add("--tools", type=names, default=(),
        help="the tools that an agent of style deliberation may call: python, search or both (default: none)")
    add("--no-retry", dest="retry", action="store_false", help="do not ask again when a text holds no answer")
    return parser


def checkpoints(args):
    """--checkpoint as load_mas_system takes it: one folder, or {role: path}; InputError if it is neither."""
    if len(args.checkpoint) == 1 and args.checkpoint[0] and Path(args.checkpoint[0]).expanduser().is_dir():
        return args.checkpoint[0]
    return pairs("--checkpoint", args.checkpoint, "ROLE=PATH, or one folder of all roles")


# Shared by all commands: files, processes and errors

def fingerprint(given, out=None):
    """A hash of the files to be loaded from the local folders that --checkpoint names, "" if there are none.

    It takes their names, sizes, beginnings and ends, where a .pt file has checksums of all that it holds; it leaves out
    those in the folder `out`, which the command itself writes.
    """
    seen, found = hashlib.sha256(), False
    for folder in (Path(part.rpartition("=")[2]).expanduser().resolve() for part in given):
        for file in sorted(folder.rglob("*")):
            if file.suffix in LOADED and file.is_file() and not (out and file.is_relative_to(out.resolve())):
                found = True
                seen.update(f"{file.relative_to(folder)} {file.stat().st_size} ".encode() + beginning_and_end(file))
    return seen.hexdigest()[:16] if found else ""


def beginning_and_end(file, n=1 << 16):
    """The first and the last n bytes of a file."""
    with open(file, "rb") as data:
        first = data.read(n)
        data.seek(max(0, file.stat().st_size - n))
        return first + data.read()


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
        with NamedTemporaryFile(dir=file.parent, prefix=f"{file.name}."):  # may files be made here, with such a name?
            pass
    except OSError as e:
        raise InputError(f"{option} {str(name)!r} cannot be written ({e.strerror or e}): "
                         "give a file in an existing folder that you may write to") from e
    return file


def unchanged(file, before, now, option):
    """Raise InputError if the run in `file` had other settings (before) than the one that is to continue it (now)."""
    changed = [f"{name}: {before.get(name)} there, {now.get(name)} now" for name in sorted({**before, **now})
               if before.get(name) != now.get(name)]
    if changed:
        raise InputError(f"{file} holds another run ({'; '.join(changed)}): give the same settings to continue it, "
                         f"or another name with {option}")


def join_others(args, backend=None, timeout=None):
    """Join the processes that torchrun started; returns (rank, number of processes, a function that waits for all).

    Each process takes the GPU of its local number. Raises InputError if there are too few, or --device names another.
    """
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if world == 1:
        return rank, world, silent
    if args.device not in (None, "cpu", "cuda"):
        raise InputError(f"--device is {args.device}, but {world} processes take a GPU each: leave it out")
    if args.device != "cpu" and torch.cuda.is_available():
        local, gpus = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
        if local >= gpus:
            raise InputError(f"there are more processes than the {gpus} GPUs of this machine: start one for each GPU")
        args.device = f"cuda:{local}"
        torch.cuda.set_device(args.device)
    elif args.device == "cpu":
        backend = "gloo"  # on a machine with a GPU torch would join the processes through NCCL, too
    torch.distributed.init_process_group(backend, timeout=timeout)
    return rank, world, torch.distributed.barrier


def out_of_memory(error):
    """Whether an exception says that memory ran out: that of a GPU, of one of its libraries, or of the CPU."""
    words = "out of memory", "ALLOC_FAILED", "can't allocate memory"
    return isinstance(error, MemoryError) or any(word in str(error) for word in words)


def command(main):
    """Run a command's main(): what the user or the system has to mend ends it with a sentence and exit status 2.

    Ctrl-C ends it with status 130, and a reader of its output who has seen enough (| head) with 141, as the shell has them.
    """
    for stream in sys.stdout, sys.stderr:
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # an answer may hold what the terminal's encoding does not
    try:
        main()
        sys.stdout.flush()
    except InputError as e:
        print(f"minimas: {e}", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    except (RuntimeError, MemoryError) as e:
        if not out_of_memory(e):
            raise
        print("minimas: out of memory: ask fewer questions at once (--batch-size), take fewer --rollouts or "
              "--max-new-tokens, or --offload", file=sys.stderr)
        raise SystemExit(2) from None
    except OSError as e:
        with suppress(OSError):  # what is left of the output is dropped; it would fail again at exit
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if isinstance(e, BrokenPipeError):
            raise SystemExit(141) from None
        print(f"minimas: {e.filename or 'a file'} cannot be read or written ({e.strerror or e}): check its permissions and "
              "the space on its disk", file=sys.stderr)
        raise SystemExit(2) from None


# python -m minimas.recurse

def arguments():
    parser = add_answering(make_parser("recurse", "Ask a recursive multi-agent system."))
    add = parser.add_argument
    add("--prompt", action="append", required=True, metavar="TEXT",
        help="a question; repeat for more, - reads one a line from stdin")
    add("--task", default="math", help="the kind of answer: math (default), choice or code")
    add("--fn-name", help="with --task code: the name of the function to write (default: a whole program)")
    add("--rounds", type=int, default=3, help="rounds of recursion (default 3)")
    add("--latent-steps", type=int, help="latents that an agent thinks per turn (default: the style's)")
    add("--batch-size", type=int, default=8, help="questions at once (default 8)")
    add("--rollouts", type=int, default=1, help="texts per question, from the same latents (default 1)")
    add("--channel", default="latent", help="what agents send: latent (default), or text for comparison")
    add("--json", action="store_true", help="print one JSON object per answer")
    add("--peek", action="store_true", help="show what agents think: the tokens that are closest to each latent")
    add("--trace", metavar="FILE.html", help="write a page that shows each stage: its prompt, latents, time and text")
    return parser.parse_args()


def checked_settings(args):
    """The Settings of a run; InputError if options do not go together, or --trace cannot be written."""
    if args.fn_name is not None and args.task != "code":
        raise InputError(f"--fn-name names a function to write, but the task is {args.task}: "
                         "add --task code, or leave it out")
    if (args.peek or args.trace) and args.channel == "text":
        option = "--peek" if args.peek else "--trace"
        raise InputError(f"{option} shows latents, and with --channel text there are none: leave one of them out")
    if args.trace is not None:
        writable_file("--trace", args.trace)
    return Settings(**{f.name: getattr(args, f.name) for f in fields(Settings)}).completed(style_named(args.style))


def read_questions(prompts):
    """The questions of --prompt, those from stdin included; InputError if there are none, or one is not UTF-8."""
    questions = []
    for text in prompts:
        try:
            given = (sys.stdin.read() if sys.stdin else "").removeprefix("\ufeff").split("\n") if text == "-" else [text]
            for line in given:
                line.encode()  # what is no UTF-8 may have been read as half of a surrogate pair
        except UnicodeError as e:
            where = "stdin" if text == "-" else "--prompt"
            raise InputError(f"{where} is not UTF-8 ({e.reason} at {e.start}): save it as UTF-8, one question a line") from e
        questions += [line for line in given if line.strip() or text != "-"]
    if not questions:
        raise InputError("there is no question on stdin: give one a line")
    return questions


def result_text(result, settings, as_json, peek_rows=None):
    """What is printed for a Result: its text and answer, or a JSON object; and the rows of peek, if they are given."""
    if as_json:
        line = {name: getattr(result, name) for name in ("question", "text", "answer", "new_tokens", "seconds")}
        line |= {"rounds": settings.rounds, "latent_steps": settings.latent_steps}
        return json.dumps(line if peek_rows is None else line | {"peek": peek_rows}, ensure_ascii=False)
    in_text = result.answer is None or "\n" in result.answer  # a code block is not repeated below its text
    text = result.text if in_text else f"{result.text}\nanswer: {result.answer}"
    return f"{table(peek_rows)}\n\n{text}" if peek_rows else text


def main():
    args = arguments()
    questions, settings = read_questions(args.prompt), checked_settings(args)
    system = load_mas_system(args.style, checkpoints=checkpoints(args), device=args.device, dtype=args.dtype,
                             task=args.task, offload=args.offload, plain=args.plain)
    fn_names = None if args.fn_name is None else [args.fn_name] * len(questions)
    results = []
    try:
        for result in system.stream(questions, fn_names=fn_names, progress=True, keep_latents=args.trace is not None,
                                    keep_states=args.peek or args.trace is not None, **vars(settings)):
            if args.trace is not None:
                results.append(result)
            tqdm.write(result_text(result, settings, args.json, peek(system, result.states) if args.peek else None))
            if result.answer is None:
                tqdm.write(f"minimas: no answer in the form that task {args.task} asks for", file=sys.stderr)
    finally:
        if results:  # those that there are, if the run is broken off
            write_whole(Path(args.trace), lambda file: file.write_text(page(system, results), encoding="utf-8"))
