"""The program `minimas`, also `python -m minimas`: hands its arguments on to a command."""

import sys
from importlib import import_module

COMMANDS = {  # name: (the module whose `run` it is, how it is called without the program, what it does)
    "ask": ("commands.ask", "python -m minimas.recurse", "ask a system, once or in a conversation"),
    "evaluate": ("evaluate.__main__", "python -m minimas.evaluate", "measure a system on a benchmark"),
    "serve": ("serve.__main__", "python -m minimas.serve", "answer clients over HTTP"),
    "train": ("train.__main__", "python -m minimas.train", "train the links of a system"),
}  # fmt: skip


def main() -> None:
    """Run the command that sys.argv names. Only that command's modules are imported: torch takes seconds."""
    name = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if name in COMMANDS:
        sys.argv = [f"minimas {name}", *sys.argv[2:]]  # the parser's name for the command
        import_module(f".{COMMANDS[name][0]}", __package__).run()
        return

    from .commands.failures import command

    command(lambda: answer_without_command(name))


def answer_without_command(name: str) -> None:
    """Print the help or the version; InputError for anything else."""
    from . import __version__
    from .common import InputError

    if name in ("-h", "--help"):
        print(help_text())
    elif name == "--version":
        print(f"minimas {__version__}")
    else:
        raise InputError(
            f"{name!r} is no command, expected one of {', '.join(COMMANDS)}: `minimas --help` describes them"
        )


def help_text() -> str:
    """What `minimas --help` prints."""
    lines = ["usage: minimas COMMAND [options]", ""]
    for name, (_, module, what) in COMMANDS.items():
        lines.append(f"  {name:<10}{what} ({module})")
    lines += ["", "`minimas COMMAND --help` lists the options of a command."]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
