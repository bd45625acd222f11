"""Serve systems: what `python -m minimas.serve` and `minimas serve` do.

python -m minimas.serve --style tiny --port 8000
"""

import argparse
import gc
import os
import re
import socket
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from ipaddress import ip_address
from pathlib import Path

from ..commands.failures import command
from ..commands.needs import Planned, needs_text_of_all
from ..commands.options import (
    ANSWERING,
    Parser,
    add_answering,
    add_settings,
    make_parser,
    origin_of,
)
from ..common import InputError, check_whole, warn
from ..runs.needs import check_needs, needs_of
from ..settings import Settings, check_tools, hears_others
from ..styles import Origin, Style, style_named
from ..system import load_mas_system
from .protocol import Served

# Settings that a request may choose as well
IN_REQUESTS = ("rounds", "latent_steps", "channel", "hear")


def run() -> None:
    """The command, from its arguments to its exit status."""
    command(main)


def main() -> None:
    """Check what is asked for, and serve it; with --needs print what memory it needs."""
    args = arguments()
    check_options(args)
    origins = named_origins(args)
    styles = {name: style_named(origin.style) for name, origin in origins.items()}
    settings = named_settings(args, styles)
    systems = []
    for name, style in styles.items():
        completed = settings[name].completed(style)
        if hears_others(completed):
            raise InputError(
                "--hear is other, and a request has no question before it: give own, none, noise or shuffled"
            )
        task = args.task or style.task
        systems.append(Planned(name, origins[name], style, completed, task))
    if args.needs:
        print(needs_text_of_all(systems))
        return
    check_memory_of_all(systems)
    serve(args, origins, settings)


def check_memory_of_all(systems: Sequence[Planned]) -> None:
    """InputError if the systems, all loaded, and a batch of one of them need more than all the memory of a device."""
    needs = {}
    for one in systems:
        for role, need in needs_of(one.origin, one.style, [one.settings], prompt=0).items():
            needs[f"{one.name} {role}"] = need
    check_needs(needs, systems[0].origin, systems[0].settings.batch_size)


def serve(
    args: argparse.Namespace, origins: dict[str, Origin], settings: dict[str, Settings]
) -> None:
    """Load the systems and answer requests until a signal comes."""
    try:
        from .app import LOOPBACK, App, serve_on
        from .batches import Batches
    except ModuleNotFoundError as e:
        if e.name not in ("starlette", "uvicorn"):
            raise
        message = f"serving needs {e.name}, which is not installed: pip install 'minimas[serve]'"
        raise InputError(message) from e
    key = api_key(args)
    on_loopback = args.host.lower() in LOOPBACK
    if key is None and not on_loopback:
        warn(f"whoever can reach {args.host} may ask: give --api-key, or listen on 127.0.0.1")
    with listener(args.host, args.port) as sock:
        served = {}
        for name, origin in origins.items():
            task = args.task or style_named(origin.style).task
            served[name] = Served(load_mas_system(**vars(origin), task=task), settings[name])
        # What is here stays. The collector then looks at what requests leave only, and so looks often enough.
        gc.collect()
        gc.freeze()
        batches = Batches(served, args.batch_size, args.wait / 1000, args.queue)
        hosts = None
        if on_loopback or args.allow_host:
            hosts = [*LOOPBACK, args.host, *args.allow_host]
        app = App(batches, key, args.allow_origin, hosts)
        host, port = sock.getsockname()[:2]
        place = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        serve_on(sock, app, lambda: warn(f"serving {', '.join(served)} at http://{place}"))


def listener(host: str, port: int) -> socket.socket:
    """A socket that listens at an address; InputError if the address cannot be had.

    It listens before anything is loaded: until then another server could be bound to the same address.
    """
    sock = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        sock.bind((host, port))
        sock.listen()
    except (OSError, OverflowError, TypeError, UnicodeError) as e:
        sock.close()
        reason = getattr(e, "strerror", None) or e
        raise InputError(
            f"--host {host} --port {port} cannot be had ({reason}): give another, or --port 0 for any"
        ) from e
    return sock


# Options


def arguments(given: Sequence[str] | None = None) -> argparse.Namespace:
    """The options of the command line; InputError if they cannot be parsed."""
    about = "Serve recursive multi-agent systems over HTTP, as chat completions (docs/serving.md)."
    parser = add_answering(make_parser("serve", about, ANSWERING))
    add_settings(parser.group(ANSWERING), Settings, ("batch_size", *IN_REQUESTS))
    parser.set_defaults(rollouts=1)
    add_serving(parser)
    return parser.parse_args(given)


def add_serving(parser: Parser) -> None:
    """Add the options of the server itself."""
    add = parser.group("how it is served").add_argument
    add("--host", default="127.0.0.1", help="the address to listen at (default %(default)s)")
    add("--port", type=int, default=8000, help="0 takes a free one (default %(default)s)")
    add("--task", help="the kind of answer: math, choice or code (default: the style's)")
    add("--api-key", metavar="KEY", help="that clients must send (default: MINIMAS_API_KEY)")
    add(
        "--allow-origin",
        action="append",
        default=[],
        metavar="ORIGIN",
        help="let pages of this origin ask from a browser, * for all; repeat for more",
    )
    add(
        "--allow-host",
        action="append",
        default=[],
        metavar="NAME",
        help="a name by which clients reach the server, such as a proxy's; repeat for more",
    )
    add(
        "--wait",
        type=float,
        default=10,
        metavar="MS",
        help="milliseconds that a request waits for others to share its batch (default %(default)s)",
    )
    add(
        "--queue",
        type=int,
        default=256,
        help="requests that may wait; one more is refused (default %(default)s)",
    )


def check_options(args: argparse.Namespace) -> None:
    """InputError if an option of the server itself is out of range."""
    check_whole("--queue", args.queue, 1)
    if not 0 <= args.wait < 1000:
        raise InputError(f"--wait is {args.wait}, expected milliseconds from 0 to below 1000")
    for name in args.allow_host:
        if not is_host(name):
            raise InputError(
                f"--allow-host is {name!r}, expected a host without a scheme or a port: give the name alone"
            )


def is_host(name: str) -> bool:
    """Whether this is the name or the address of a host, and nothing else."""
    try:
        ip_address(name)
    except ValueError:
        return re.fullmatch(r"[\w.-]+", name) is not None
    return True


def api_key(args: argparse.Namespace) -> str | None:
    """The key that clients must send, None for none; InputError if it is none that a header can carry."""
    key: str | None = args.api_key
    place = "--api-key"
    if key is None:
        key = os.environ.get("MINIMAS_API_KEY")
        place = "MINIMAS_API_KEY"
    if key is None:
        return None
    if key == "":
        raise InputError(
            "the API key is empty: give --api-key or MINIMAS_API_KEY a value, or neither"
        )
    if not key.isascii() or not key.isprintable() or key != key.strip():
        raise InputError(
            f"the API key of {place} has a character that no client can send, or a blank around it: "
            "expected printable ASCII; make another one"
        )
    return key


def named_settings(args: argparse.Namespace, styles: Mapping[str, Style]) -> dict[str, Settings]:
    """{name of a model: the Settings of whoever asks for none}. Tools are for the styles that call them.

    InputError if there are tools, and none of the styles calls any.
    """
    chosen = Settings(**{one.name: getattr(args, one.name) for one in fields(Settings)})
    if not any(style.calls_tools for style in styles.values()):
        for style in styles.values():
            check_tools(chosen.tools, style)
    settings = {}
    for name, style in styles.items():
        settings[name] = chosen if style.calls_tools else replace(chosen, tools=())
    return settings


def named_origins(args: argparse.Namespace) -> dict[str, Origin]:
    """{name of a model: what it is loaded from}; --style may list several."""
    origin = origin_of(args)
    styles = str(origin.style).split(",")
    if len(styles) > 1 and origin.checkpoints:
        raise InputError(
            "--checkpoint is given for several styles: serve one, or name its checkpoints in a style file"
        )
    named: dict[str, Origin] = {}
    for style in styles:
        name = Path(style).stem
        if name in named:
            raise InputError(
                f"--style gives two models the name {name}: give it once, or rename one of the files"
            )
        named[name] = replace(origin, style=style)
    return named


if __name__ == "__main__":
    run()
