"""The first run of a released style on its real files: whether they are what minimas expects, and compute the same.

    python tools/released.py sequential_light --out sequential_light.json

It downloads the repositories of the style as a run does, and compares with what minimas/compat/released.json says of
them: names and sizes of files, hashes where they are known, manifests, config.json, the shapes of all tensors, where
texts end, and the chat template. It compares each agent's prefill logits with transformers' and each link with plain
torch modules. Then the system answers three questions by both channels. One page says what was found and what was
expected; hand in the JSON with it. A part that fails does not end the others.

Exit status 0: all is as expected. 1: something differs or is missing. 2: the arguments cannot be used.

Agents are loaded one at a time, but for the questions. `pip install -e '.[oracle]'` brings transformers.
"""

import argparse
import inspect
import platform
import time
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import constants
from released_checks import (
    DIFFERS,
    NOTED,
    OK,
    ROOT,
    Expected,
    Numbers,
    Report,
    bytes_to_download,
    chat,
    check_config,
    check_disk,
    check_fast,
    check_hashes,
    check_link,
    check_manifests,
    check_names,
    check_outer_manifest,
    check_quantised,
    check_text,
    check_transformers,
    check_weights,
    fetched,
    free,
    link_files,
    load_plain,
    plain_inner,
    plain_outer,
)

import minimas
from minimas.commands.failures import command
from minimas.commands.options import Parser, checkpoints
from minimas.common import InputError, check_known, warn
from minimas.compat.hub import is_reachable
from minimas.compat.released import FILE
from minimas.devices import usable_device, usable_dtype
from minimas.link import InnerLink, OuterLink
from minimas.result import Result
from minimas.runs.needs import check_memory, check_needs, needs_of
from minimas.runs.outputs import writable_file
from minimas.settings import CHANNELS, CompletedSettings, Settings
from minimas.styles import STYLES, Origin, Source, Style
from minimas.system import load_mas_system

LINKS, SYSTEM = "links", "system"  # where findings are that are no agent's
MODES = ("int8", "int4")
TEXT = ROOT / "README.md"  # what agents read when their logits are compared
QUESTIONS = {  # and their answers
    "A farmer has 17 crates with 23 apples in each. How many apples does she have?": "391",
    "What is the sum of all whole numbers from 1 to 40?": "820",
    "A train leaves at 9:40 and arrives at 12:15. How many minutes does it travel?": "155",
}
PREPARED = [name for name in STYLES if name not in ("tiny", "single")]
QUANTIZES = "quantize" in inspect.signature(load_mas_system).parameters


# The parts


def check_agent(
    report: Report,
    role: str,
    source: Source,
    repository: str,
    expected: Expected,
    args: argparse.Namespace,
) -> Numbers | None:
    """Everything about one agent, which is loaded once by minimas and once by transformers -> its logits, if it can."""
    entry = expected.repository(repository)
    names = expected.files(repository)
    with report.part(role, "list of files"):
        check_names(report, role, source, names, entry)
    folder = None
    with report.part(role, "download"):
        folder = fetched(source, role, names)
    if folder is None:
        return None
    model = expected.decoder(entry)
    with report.part(role, "hashes"):
        check_hashes(report, role, repository, folder, entry)
    with report.part(role, "manifests"):
        check_manifests(report, role, folder, entry)
    with report.part(role, "config.json"):
        check_config(report, role, folder, expected, entry)
    with report.part(role, "weights"):
        check_weights(report, role, folder, model)
    for name in entry["more_files"]:
        if name.endswith(".pt") and (folder / name).is_file():
            D = model.config.hidden_size
            check_link(report, role, folder / name, InnerLink, (D,), plain_inner)
    numbers = None
    with report.part(role, "loading it"):
        dtype = usable_dtype(args.dtype, args.device)
        agent = load_plain(report, role, folder, dtype, args.device)
        with report.part(role, "texts"):
            check_text(report, role, folder, agent, entry)
        text = TEXT.read_text(encoding="utf-8")
        prompt = chat(agent, text)
        numbers = check_fast(report, role, agent, text, args.tokens)
        del agent  # one model at a time
        free()
        check_transformers(report, role, folder, prompt, numbers, args.device)
    return numbers


def check_links(
    report: Report, source: Source, repository: str, expected: Expected, style: Style
) -> None:
    """Everything about the repository of outer links."""
    entry = expected.repository(repository)
    names = expected.files(repository)
    with report.part(LINKS, "list of files"):
        check_names(report, LINKS, source, names, entry)
    folder = None
    with report.part(LINKS, "download"):
        folder = fetched(source, LINKS, names)
    if folder is None:
        return
    with report.part(LINKS, "hashes"):
        check_hashes(report, LINKS, repository, folder, entry)
    with report.part(LINKS, "manifest"):
        check_outer_manifest(report, folder, entry, style.edges)
    for _, key, name in link_files(entry):
        if (folder / name).is_file():
            _, D, D_target = entry["links"][key]
            check_link(report, LINKS, folder / name, OuterLink, (D, D_target), plain_outer)


def check_system(
    report: Report,
    sources: dict[str, Source],
    style: Style,
    numbers: dict[str, Numbers],
    args: argparse.Namespace,
) -> None:
    """The whole system: three questions by both channels; if it is quantised, also how far its logits are off."""
    settings = settings_of(style, args)
    options = options_of(args)
    system = None
    with report.part(SYSTEM, "loading it"):
        check_memory(Origin(args.style, sources, args.device, **options), style, settings, 1)
        system = load_mas_system(args.style, checkpoints=sources, device=args.device, **options)
        report.add(OK, SYSTEM, "loading it", " ".join(repr(system).split()))
    if system is None:
        return
    if args.quantize:
        for role, of_role in numbers.items():
            with report.part(role, args.quantize):
                check_quantised(report, role, system.agents[role], of_role, args.quantize)
    for one in settings:
        for question, answer in QUESTIONS.items():
            with report.part(one.channel, question):
                (result,) = system.run([question], one)
                tell_result(report, one.channel, result, answer)


def settings_of(style: Style, args: argparse.Namespace) -> list[CompletedSettings]:
    """The settings of both channels."""
    chosen = {"max_new_tokens": args.max_new_tokens, "temperature": 0.0, "batch_size": 1}
    return [Settings(channel=channel, **chosen).completed(style) for channel in CHANNELS]


def options_of(args: argparse.Namespace) -> dict[str, Any]:
    """How the system is loaded."""
    options: dict[str, Any] = {"dtype": args.dtype, "offload": args.offload, "fast": True}
    if args.quantize:
        options["quantize"] = args.quantize
    return options


def tell_result(report: Report, channel: str, result: Result, answer: str) -> None:
    """A finding about one text. A wrong answer is noted: three questions say nothing of a model."""
    status = NOTED
    if not result.new_tokens or not result.text:
        status = DIFFERS
    elif result.answer == answer:
        status = OK
    found = f"{result.answer!r} in {result.new_tokens} tokens and {result.seconds:.1f} s"
    report.add(status, channel, result.question, f"{found}: {result.text}", answer)
    told = {"channel": channel, "question": result.question, "text": result.text}
    told |= {"answer": result.answer, "expected": answer, "new_tokens": result.new_tokens}
    told |= {"heard_tokens": result.heard_tokens, "retried": result.retried}
    report.texts.append({**told, "seconds": result.seconds})


# The command


def arguments() -> argparse.Namespace:
    """The options of sys.argv; InputError if they cannot be used."""
    about = "Check the released checkpoints of a style, and run it once."
    parser = Parser(prog="python tools/released.py", description=about)
    add = parser.add_argument
    add("style", metavar="STYLE", help=f"of {', '.join(PREPARED)}")
    add("--out", metavar="FILE.json", help="the findings, to hand in (default: STYLE.json)")
    add("--quantize", choices=MODES, help="quantise the weights of the system that is asked")
    add(
        "--checkpoint",
        action="append",
        default=[],
        metavar="ROLE=PATH",
        help="a folder in place of the repository, or one that holds all; repeat for more",
    )
    add(
        "--expect",
        metavar="FILE.json",
        default=FILE,
        help="what is expected, in the form of minimas/compat/released.json, which is the default",
    )
    add("--device", help="where agents run (default: cuda if there is one)")
    add("--dtype", help="of the agents (default: float32 on cpu, else the checkpoint's)")
    add("--offload", action="store_true", help="keep only the working agent on the device")
    add("--tokens", type=int, default=1200, help="of the prompt of the logits (default 1200)")
    add("--max-new-tokens", type=int, default=256, help="of each text (default 256)")
    args = parser.parse_args()
    check_known("style", [args.style], PREPARED)
    if args.quantize and not QUANTIZES:
        raise InputError("--quantize is given, but load_mas_system knows no such argument: update")
    if args.tokens < 1 or args.max_new_tokens < 1:
        raise InputError("--tokens and --max-new-tokens are whole numbers from 1 up")
    args.device = usable_device(args.device)
    usable_dtype(args.dtype, args.device)
    args.out = writable_file("--out", args.out or f"{args.style}.json")
    if not Path(args.expect).is_file():
        raise InputError(f"--expect {args.expect} is not there: give a file like {FILE.name}")
    return args


def head(args: argparse.Namespace) -> dict[str, Any]:
    """What is said of the run at the top of the JSON."""
    device = str(args.device)
    if args.device.type == "cuda":
        device += f", {torch.cuda.get_device_name(args.device)}"
    options = {"dtype": args.dtype, "quantize": args.quantize, "offload": args.offload}
    options |= {"tokens": args.tokens, "max_new_tokens": args.max_new_tokens}
    return {
        "style": args.style,
        "day": time.strftime("%Y-%m-%d"),
        "versions": {
            name: version_of(name)
            for name in ("torch", "transformers", "tokenizers", "safetensors", "huggingface_hub")
        }
        | {"minimas": minimas.__version__, "python": platform.python_version()},
        "device": device,
        "cpu": f"{platform.machine()}, {torch.backends.cpu.get_cpu_capability()}",
        "options": options,
    }


def version_of(package: str) -> str | None:
    """The version of a package; None if it is not installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def check_reachable(sources: dict[str, Source]) -> None:
    """InputError if the hub is needed and does not answer, unless the user says that all is in the cache."""
    on_hub = [str(source) for source in sources.values() if not Path(source).expanduser().is_dir()]
    if on_hub and not constants.HF_HUB_OFFLINE and not is_reachable():
        raise InputError(
            f"the hub does not answer, and {on_hub[0]} is there: check the network, give folders with --checkpoint, "
            "or set HF_HUB_OFFLINE=1 if all files are in the cache"
        )


def check_room(
    sources: dict[str, Source],
    style: Style,
    names: dict[str, str],
    expected: Expected,
    args: argparse.Namespace,
) -> None:
    """InputError if the system would not fit into memory, or its files not on the disk: this is asked before they come.

    Of an agent only config.json is fetched. If one cannot be had, the checks say so, and memory is asked again later.
    """
    origin = Origin(args.style, sources, args.device, **options_of(args))
    try:
        needs = needs_of(origin, style, settings_of(style, args), prompt=0)
    except InputError:
        needs = {}
    check_needs(needs, origin, 1)
    files = {name: expected.files(names[name]) for name in names}
    check_disk(sum(bytes_to_download(sources[name], files[name]) for name in names))


def main() -> None:
    args = arguments()
    style = STYLES[args.style]
    expected = Expected(Path(args.expect))
    sources = style.sources(checkpoints(args.checkpoint) or None)
    check_reachable(sources)
    # Each is known by the name of its released repository, wherever it lies.
    names = {name: Path(str(source)).name for name, source in style.checkpoints.items()}
    for name in names.values():
        expected.repository(name)
    check_room(sources, style, names, expected, args)
    report = Report(args.out, head(args))
    numbers: dict[str, Numbers] = {}
    for role in style.order:
        warn(f"{role}: {names[role]}")
        found = check_agent(report, role, sources[role], names[role], expected, args)
        if found is not None:
            numbers[role] = found
    warn(f"links: {names['links']}")
    check_links(report, sources["links"], names["links"], expected, style)
    warn("the system")
    check_system(report, sources, style, numbers, args)
    report.write()
    print(report.page())
    print(f"\n{args.out} has all of it, with the hashes of the files and the texts in full")
    if report.failed:
        raise SystemExit(1)


if __name__ == "__main__":
    command(main)
