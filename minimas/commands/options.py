"""The options that the commands share, and the parser that they begin with."""

import argparse
import os
import re
import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, NoReturn, Protocol, get_args, get_origin

from .. import __version__
from ..common import QUANTIZED, InputError, local_path
from ..runs.outputs import named_output
from ..settings import NOT_FOR_ARGPARSE, Settings
from ..styles import STYLES, Origin


class Adder(Protocol):
    """A parser, or a group of its options."""

    def add_argument(self, *names: str, **given: Any) -> Any: ...


# The groups of options in a --help
SYSTEM = "which system"
ANSWERING = "how it answers"
MEASURED = "what is measured"
FILES = "files"


class Parser(argparse.ArgumentParser):
    """A parser that raises InputError if it cannot parse the arguments; argparse prints a usage message and exits."""

    def group(self, title: str) -> Adder:
        """The group of options with this title."""
        for group in self._action_groups:
            if group.title == title:
                return group
        return self.add_argument_group(title)

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        self.given: Sequence[str] = sys.argv[1:] if args is None else list(args)
        return super().parse_known_args(args, namespace)

    def error(self, message: str) -> NoReturn:
        lacking = re.match(r"argument (?:-\w/)?(--[\w-]+): expected one argument", message)
        raise InputError(self.no_value(lacking[1]) if lacking else message)

    def no_value(self, option: str) -> str:
        """The message for an option that has no value; often the value begins with a dash."""
        after = []
        for word, following in zip(self.given, self.given[1:], strict=False):
            named = word.startswith("--") and option.startswith(word)  # it may be abbreviated
            if named and following.startswith("-") and following != "-":
                after.append(following)
        if not after:
            return f"{option} has no value: give one, {option}=VALUE"
        after.sort(key=reads_as_value)  # those first that argparse surely takes for options
        return (
            f"{option} has no value, since {after[0]!r} begins with a dash and is read as an option: "
            f"if it is the value, write {option}={shlex.quote(after[0])}"
        )


def reads_as_value(word: str) -> bool:
    """Whether argparse mostly takes a word that begins with a dash for a value: a number, or several words."""
    return " " in word or re.fullmatch(r"-(\d+|\d*\.\d+)", word) is not None


def make_parser(module: str, description: str, settings_in: str | None = None) -> Parser:
    """A parser with the options that every command has.

    settings_in   the group of those that are settings; None is that of --help
    """
    parser = Parser(prog=name_of_command(module), description=description)
    parser.add_argument("--version", action="version", version=f"minimas {__version__}")
    add_system(parser.group(SYSTEM))
    group = parser.group(settings_in) if settings_in else parser
    add_settings(group, Settings, ("seed", "date"))
    return parser


def name_of_command(module: str) -> str:
    """How the command of a module was called."""
    by_script = sys.argv[0].startswith("minimas ")  # as minimas/__main__.py puts it
    return sys.argv[0] if by_script else f"python -m minimas.{module}"


def add_system(group: Adder) -> None:
    """Add the options that say which system it is, and where its agents run."""
    add = group.add_argument
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
        help="take this role, or links, from this folder or hub id; repeat for more; or one PATH with a folder for "
        "each; for style single the PATH or hub id of the agent",
    )
    add(
        "--device",
        help="cpu, cuda, or one for each role: planner=cuda:0,critic=cuda:1,... (default: cuda if there is one)",
    )
    add(
        "--dtype",
        help="of the agents: float32, bfloat16 or float16 (default: float32 on cpu, else the checkpoint's)",
    )
    add(
        "--quantize",
        choices=QUANTIZED,
        help="keep the weights of the agents' linears in 8 or 4 bits: less memory, and on a CPU less time",
    )


def add_answering(parser: Parser) -> Parser:
    """Add the options of commands whose agents answer questions; returns the parser."""
    add = parser.group(SYSTEM).add_argument
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
    add_settings(
        parser.group(ANSWERING),
        Settings,
        ("max_new_tokens", "temperature", "top_p", "top_k", "tools", "retry"),
    )
    return parser


def origin_of(args: argparse.Namespace) -> Origin:
    """What the options of `add_answering` load a system from."""
    return Origin(
        args.style,
        checkpoints(args.checkpoint),
        args.device,
        args.dtype,
        args.offload,
        fast=not args.plain,
        quantize=args.quantize,
    )


def add_settings(
    parser: Adder, settings: type, names_of_fields: Sequence[str], **changes: dict[str, Any]
) -> None:
    """Add an option for each of these fields of a dataclass of settings, with the field's default and help.

    changes   {field: what argparse takes for it instead}
    """
    known = {one.name: one for one in fields(settings)}
    for name in names_of_fields:
        one = known[name]
        option = "--" + name.replace("_", "-")
        said = {key: value for key, value in one.metadata.items() if key not in NOT_FOR_ARGPARSE}
        given: dict[str, Any] = {"default": one.default, **said}
        if one.default is True:
            option = "--no-" + name.replace("_", "-")
            given |= {
                "action": "store_false",
                "dest": name,
                "help": f"do not {one.metadata['help']}",
            }
        elif one.default is False:
            given["action"] = "store_true"
        else:
            given["type"] = value_type(one.type)
            if one.default not in (None, (), ""):
                given["help"] += " (default %(default)s)"
        given |= changes.get(name, {})
        parser.add_argument(option, **given)


def value_type(hint: Any) -> Callable[[str], Any]:
    """What turns an option's text into a value of a type: int, float, str, Path, `X | None` or a tuple of texts."""
    if get_origin(hint) is tuple:
        return names
    for one in get_args(hint) or (hint,):
        if one is not type(None):
            return one
    raise TypeError(f"{hint!r} is no type of an option")


def numbers(text: str) -> tuple[int, ...]:
    """The value of an option that lists whole numbers, 1,2,3, as a tuple."""
    try:
        return tuple(map(int, text.split(",")))
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a list of whole numbers such as 1,2,3"
        ) from None


def names(text: str) -> tuple[str, ...]:
    """The value of an option that lists names, a,b,c."""
    return tuple(name for name in text.split(",") if name)


def output(*suffixes: str) -> Callable[[str], Path]:
    """What turns the text of an option that names an output into its path, as an argparse type.

    It refuses an empty text, and what named_output refuses.
    """

    def path(text: str) -> Path:
        if not text:
            raise argparse.ArgumentTypeError("the path is empty: give one, or leave the option out")
        try:
            return named_output(text, *suffixes)
        except InputError as e:  # argparse would say no more than that the value is invalid
            raise argparse.ArgumentTypeError(str(e)) from e

    return path


def pairs(option: str, parts: list[str], expected: str = "NAME=COLUMN") -> dict[str, str]:
    """The parts NAME=VALUE of an option as a dict; InputError if one of them is not a pair, or a name comes twice."""
    values: dict[str, str] = {}
    for part in parts:
        name, _, value = part.partition("=")
        if not name or not value:
            raise InputError(f"{option} has {part!r}, expected {expected}")
        if name in values:
            raise InputError(f"{option} gives {name} twice: give it once")
        values[name] = value
    return values


def checkpoints(given: list[str]) -> str | dict[str, str | Path]:
    """The values of --checkpoint as load_mas_system takes them: one folder or hub id, or {role: folder or hub id}."""
    if len(given) == 1 and given[0]:
        is_folder = local_path(given[0]).is_dir()
        if is_folder or "=" not in given[0]:
            return given[0]
    return {**pairs("--checkpoint", given, "ROLE=PATH, or one folder of all roles")}


def read_questions(prompts: list[str]) -> list[str]:
    """The questions of --prompt, those from stdin included; InputError if there are none."""
    questions = []
    for text in prompts:
        if text == "-":
            questions += stdin_lines()
        else:
            questions.append(as_utf8(text))
    if not questions:
        raise InputError(
            "there is no question: give one with --prompt, or one a line on stdin with --prompt -"
        )
    return questions


def stdin_lines() -> list[str]:
    """The lines of stdin that are not blank. Only a line feed ends a line, or that of Windows."""
    if sys.stdin is None:
        return []
    text = sys.stdin.read().replace("\r\n", "\n")
    lines = [as_utf8(line) for line in text.split("\n")]
    lines[0] = lines[0].removeprefix("\ufeff")
    return [line for line in lines if line.strip()]


def as_utf8(text: str) -> str:
    """A text of the user whose bytes are UTF-8, read as that where the locale is another, such as C.

    Python hides bytes that the locale cannot read in lone surrogates. Bytes that are no UTF-8 stay so hidden.
    """
    if not any("\udc80" <= letter <= "\udcff" for letter in text):
        return text
    try:
        return os.fsencode(text).decode()
    except UnicodeError:
        return text
