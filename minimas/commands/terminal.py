"""The conversation on a terminal: what `python -m minimas.recurse` does without --prompt."""

import sys
from collections import defaultdict
from collections.abc import Callable, Iterable
from contextlib import redirect_stdout, suppress

from ..common import InputError, Terminated, warn
from ..result import NewText, Result
from .failures import what_to_mend
from .options import as_utf8


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
        return as_utf8(input("> "))


def print_as_written(
    pieces: Iterable[NewText], begin: Callable[[], object], ending: Callable[[Result], str]
) -> list[Result]:
    """Print the texts of one question while they are written -> their Results.

    Texts are written at the same time, but shown one after another: what is written of the others waits.
    begin()   is called before anything is printed
    ending    what follows a text
    """
    waiting: dict[int, str] = defaultdict(str)  # by rollout, as are the results
    results: dict[int, Result] = {}
    shown = 0
    for piece in pieces:
        waiting[piece.rollout] += piece.text
        if piece.result is not None:
            results[piece.rollout] = piece.result
        begin()
        while shown in results:
            print(waiting.pop(shown) + ending(results[shown]), flush=True)
            shown += 1
        print(waiting.pop(shown, ""), end="", flush=True)
    return [results[rollout] for rollout in sorted(results)]
