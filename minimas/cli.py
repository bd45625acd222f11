"""The command line of minimas.recurse: options in, answers to stdout, everything else to stderr."""

import argparse
import json
import os
import sys
from dataclasses import fields
from pathlib import Path

import torch
from tqdm import tqdm

from . import InputError, __version__
from .agent import silent
from .peek import peek, table
from .recurse import STYLES, Settings, load_mas_system
from .tokenizer import DATE
from .trace import page, save_page, usable_file


def refuse(message):
    raise InputError(message)


def make_parser(module, description):
    """A parser with the options that every command has; what it cannot parse is an InputError."""
    parser = argparse.ArgumentParser(prog=f"python -m minimas.{module}", description=description)
    parser.error = refuse
    add = parser.add_argument
    add("--style", default="tiny", help=f"the system: {', '.join(STYLES)} (default tiny)")
    add("--checkpoint", action="append", default=[], metavar="ROLE=PATH",
        help="take this role, or links, from this folder or hub id; repeat for more, or give one PATH that holds a folder for each")
    add("--device", help="cpu, cuda, or a device for each: planner=cuda:0,critic=cuda:1,... (default: cuda where there is one)")
    add("--dtype", help="of the agents: float32, bfloat16, float16 (default: float32 on cpu, else the checkpoint's)")
    add("--seed", type=int, default=42, help="of everything random (default 42)")
    add("--date", default=DATE, help=f"the date that Llama's template tells its agent (default {DATE})")
    add("--version", action="version", version=f"minimas {__version__}")
    return parser


def add_answering(parser):
    """The options of commands whose agents answer questions."""
    add = parser.add_argument
    add("--plain", action="store_true", help="leave out the fast path: slower, the same answers")
    add("--offload", action="store_true", help="keep weights in main memory, on the device only the working agent's")
    add("--max-new-tokens", type=int, help="limit on the answer's tokens (default: the style's)")
    add("--temperature", type=float, help="0 always takes the likeliest token (default: the style's)")
    add("--top-p", type=float, default=0.95, help="sample out of the likeliest tokens that reach this probability (default 0.95)")
    add("--top-k", type=int, help="and out of this many, 0 for all (default: generation_config.json's)")
    add("--tools", type=names, default=(), help="what an agent of style deliberation may call: python, search or both (default: none)")
    add("--no-retry", dest="retry", action="store_false", help="do not ask again where a text holds no answer")
    return parser


def pairs(parts):
    """An option of the form a=b,c=d, read by `names`, as a dict."""
    if wrong := [part for part in parts if not all(part.partition("="))]:
        raise InputError(f"--columns has {wrong[0]!r}, expected NAME=COLUMN")
    return dict(part.partition("=")[::2] for part in parts)


def names(text):
    """An option that lists names: a,b,c."""
    return tuple(name for name in text.split(",") if name)


def arguments():
    parser = add_answering(make_parser("recurse", "Ask a recursive multi-agent system."))
    add = parser.add_argument
    add("--prompt", action="append", required=True, metavar="TEXT",
        help="a question; repeat for more, - reads one a line from stdin")
    add("--task", default="math", help="what is asked for: math (default), choice or code")
    add("--fn-name", help="task code: the function that is asked for (default: a whole program)")
    add("--rounds", type=int, default=3, help="rounds of recursion (default 3)")
    add("--latent-steps", type=int, help="latents an agent thinks per turn (default: the style's)")
    add("--batch-size", type=int, default=8, help="questions at once (default 8)")
    add("--rollouts", type=int, default=1, help="texts per question, out of the same latents (default 1)")
    add("--channel", default="latent", help="what agents send: latent (default), or text for comparison")
    add("--json", action="store_true", help="print one JSON object a question")
    add("--peek", action="store_true", help="show what agents think: the tokens that each of their latents is closest to")
    add("--trace", metavar="FILE.html", help="write a page that shows each stage: its prompt, latents, time and text")
    return parser.parse_args()


def checkpoints(args):
    """What --checkpoint gave, as load_mas_system takes it."""
    pairs = [pair.partition("=") for pair in args.checkpoint]
    if len(pairs) == 1 and Path(args.checkpoint[0]).expanduser().is_dir():
        return args.checkpoint[0]
    if not all(path for _, _, path in pairs):
        raise InputError(f"--checkpoint {' '.join(args.checkpoint)}: expected ROLE=PATH, or once a folder that holds all")
    return {role: path for role, _, path in pairs}


def unchanged(file, before, now, option):
    """InputError where a run that is to go on in `file` had other settings."""
    changed = [f"{name}: {before.get(name)} there, {now.get(name)} now" for name in sorted({**before, **now})
               if before.get(name) != now.get(name)]
    if changed:
        raise InputError(f"{file} holds another run ({'; '.join(changed)}): take the same settings to go on, "
                         f"or another name with {option}")


def join_others(args, backend=None, timeout=None):
    """(rank, number of processes, what waits for all of them), as torchrun started us; each takes the GPU of its number."""
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if world == 1:
        return rank, world, silent
    if args.device not in (None, "cpu", "cuda"):
        raise InputError(f"--device is {args.device}, but each of the {world} processes takes the GPU of its number: leave it out")
    if args.device != "cpu" and torch.cuda.is_available():
        if int(os.environ["LOCAL_RANK"]) >= torch.cuda.device_count():
            raise InputError(f"there are more processes than the {torch.cuda.device_count()} GPUs of this machine: start one for each")
        args.device = f"cuda:{os.environ['LOCAL_RANK']}"
        torch.cuda.set_device(args.device)
    torch.distributed.init_process_group(backend, timeout=timeout)
    return rank, world, torch.distributed.barrier


def read_questions(prompts):
    questions = []
    for text in prompts:
        try:
            questions += [line for line in sys.stdin.read().splitlines() if line.strip()] if text == "-" else [text]
        except UnicodeDecodeError as e:
            raise InputError(f"stdin is not text in UTF-8 ({e.reason} at byte {e.start}): give one question a line") from e
    return questions


def show(result, settings, as_json, seen=None):
    """What is printed of a result; seen: the rows of peek, if they are wanted."""
    if as_json:
        own = {name: getattr(result, name) for name in ("question", "text", "answer", "new_tokens", "seconds")}
        own |= {"rounds": settings.rounds, "latent_steps": settings.latent_steps}
        return json.dumps(own if seen is None else own | {"peek": seen}, ensure_ascii=False)
    text = result.text if result.answer is None or "\n" in result.answer else f"{result.text}\nanswer: {result.answer}"
    return f"{table(seen)}\n\n{text}" if seen else text


def out_of_memory(error):
    words = "out of memory", "ALLOC_FAILED", "can't allocate memory"  # of CUDA, its libraries, the CPU
    return isinstance(error, MemoryError) or any(word in str(error) for word in words)


def told(error):
    """Say what was wrong with the input on stderr; returns the exit status for it."""
    print(f"minimas: {error}", file=sys.stderr)
    return 2


def command(main):
    """Run a command's main(): bad input is a sentence and exit status 2, Ctrl-C is status 130, and neither a traceback."""
    try:
        main()
    except InputError as e:
        raise SystemExit(told(e)) from None
    except KeyboardInterrupt:
        raise SystemExit(130) from None


def main():
    args = arguments()
    questions = read_questions(args.prompt)
    if not questions:
        raise InputError("there is no question on stdin: give one a line")
    if (args.peek or args.trace) and args.channel == "text":
        name = "--peek" if args.peek else "--trace"
        raise InputError(f"{name} shows latents, and with --channel text there are none: leave one of them out")
    file = None if args.trace is None else usable_file(args.trace)
    system = load_mas_system(args.style, checkpoints=checkpoints(args), device=args.device, dtype=args.dtype, task=args.task,
                             offload=args.offload, plain=args.plain)
    options = {f.name: getattr(args, f.name) for f in fields(Settings)}
    settings = Settings(**options).completed(system.style)
    fn_names = None if args.fn_name is None else [args.fn_name] * len(questions)
    keep, results = {"keep_states": args.peek or file is not None, "keep_latents": file is not None}, []
    for result in system.stream(questions, fn_names=fn_names, progress=True, **keep, **options):
        tqdm.write(show(result, settings, args.json, peek(system, result.states) if args.peek else None))
        if result.answer is None:
            tqdm.write(f"minimas: no answer in the form that task {args.task} asks for", file=sys.stderr)
        results += [result] if file else []
    if file:
        save_page(file, page(system, results))
