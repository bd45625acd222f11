"""The conversation on a terminal: what `python -m minimas.recurse` does without --prompt."""

import sys
from collections.abc import Callable
from contextlib import redirect_stdout, suppress

from ..common import InputError, Terminated, warn
from .failures import what_to_mend


def converse(answer: Callable[[str], object]) -> None:
    """Ask for one question after another until end of file, and call answer(question) with each.

    Ctrl-C, or an error that the user can mend, ends an answer only, and the next question is asked.
    """
    with suppress(ImportError):
        import readline  # noqa: F401  (input() edits lines with it)
    while True:
        try:
            question = typed_line()
            if question.strip():
                answer(question)
        except EOFError:
            break
        except Terminated:
            raise
        except KeyboardInterrupt:
            print(file=sys.stderr)
        except (InputError, MemoryError, RuntimeError) as e:
            message = what_to_mend(e)
            if message is None:
                raise
            warn(message)
    print(file=sys.stderr)


def typed_line() -> str:
    """The next line. The sign before it is no result: where stdout is no terminal it goes to stderr."""
    with redirect_stdout(sys.stdout if sys.stdout.isatty() else sys.stderr):
        return input("> ")
