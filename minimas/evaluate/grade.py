"""Whether an answer is correct: mathematics by equality, texts once normalised, code by running its tests.

There are three graders for mathematics:

    plain        latex.py, which needs nothing else
    math-verify  latex.py, and for what it cannot read the library math-verify (pip install 'minimas[math]')
    released     the rule of the released code for MATH-500, kept for comparison; it accepts 3.2 for 3.9

All other kinds of questions have one grader each: choice, text and code.
"""

import multiprocessing
import os
import re
import signal
import string
import threading
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from decimal import Decimal
from importlib import metadata, util
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess
from typing import TYPE_CHECKING

from ..common import InputError, check_known
from .latex import same_latex
from .run_tests import passes

if TYPE_CHECKING:
    from .benchmarks import Example

GRADERS = ("math-verify", "plain", "released")

# Raise this by one whenever a verdict may change: by an edit of answers.py, letter.py or fences.py, of the files
# beside this one, or of the sandbox. tests/verdicts.tsv holds verdicts, and a test fails if they change while this
# number does not.
GRADERS_VERSION = 2


def default_grader() -> str:
    """math-verify if it is installed, else plain."""
    return "math-verify" if util.find_spec("math_verify") else "plain"


def graders_for(kind: str, chosen: tuple[str, ...] | None, may_run: bool) -> tuple[str, ...]:
    """The graders (a tuple of names) of questions of a kind: math, choice, text, code, or released (math, as released).

    chosen   the names given by --grader, or None
    may_run  whether the programs that agents write may be run
    Raises InputError if a grader is not for this kind, or if programs would have to be run and may not.
    """
    if kind in ("math", "released"):
        by_default = default_grader() if kind == "math" else kind
        graders = chosen or (by_default,)
        check_known("grader", graders, GRADERS)
        return graders
    if chosen:
        raise InputError(
            f"--grader is for mathematics, and these questions are graded by {kind}: leave it out"
        )
    if kind == "code" and not may_run:
        raise InputError(
            "answers are programs, and grading runs them: add --allow-code-execution to allow that here"
        )
    return (kind,)


def graders_hash(graders: Sequence[str]) -> str:
    """The versions of all that judges by these graders, for records that must not mix verdicts of different ones."""
    versions = f"graders {GRADERS_VERSION}"
    if "math-verify" in graders and util.find_spec("math_verify"):
        versions += f", math-verify {metadata.version('math-verify')}"
    return versions


def is_correct(example: "Example", text: str, answer: str | None, grader: str) -> bool:
    """Whether a text with this answer (None: without one) solves an Example, according to a grader."""
    if grader in GRADERS:
        judged = released_answer(text) if grader == "released" else answer
        return same_math(judged, example.gold, grader)
    if grader == "code":
        if answer is None:
            return False
        tests = example.tests() if callable(example.tests) else example.tests
        assert tests is not None, "load_dataset leaves out code questions without tests"
        return passes(example.program(answer), tests, example.fn_name)
    if grader == "text":
        return same_text(answer, example.gold)
    return answer == example.gold


def same_math(predicted: str | None, target: str, grader: str) -> bool:
    """Whether an answer in LaTeX (the content of a box, or None) equals the target, according to one of GRADERS.

    Raises InputError if the grader is math-verify and cannot be imported.
    """
    if predicted is None or not predicted.strip():
        return False
    if grader == "released":
        return same_as_released(predicted, target)
    verdict = same_latex(predicted, target)
    if verdict is None and grader == "math-verify":
        return math_verify.ask(predicted, target)
    return bool(verdict)


# math-verify runs in a child process because it may hang: its own time limit is an alarm signal, which works in the
# main thread only, and cannot interrupt a long step in C, such as an integer power or a match of a regular expression.


def serve_math_verify(connection: Connection) -> None:
    """What the child does: for each (predicted, target) that it receives, send whether math-verify calls them equal."""
    import resource  # not on Windows

    # Ctrl-C is for the parent, which ends the child when it exits
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # it logs what it cannot parse
    resource.setrlimit(resource.RLIMIT_AS, (4 << 30, 4 << 30))
    from math_verify import parse, verify

    while True:
        pair = connection.recv()
        try:
            predicted, target = [
                parse(rf"\boxed{{{text}}}", extraction_mode="first_match", parsing_timeout=3)
                for text in pair
            ]
            verdict = bool(verify(target, predicted, timeout_seconds=3))
        except BaseException:  # its timeout is no Exception
            verdict = False
        connection.send(verdict)


class MathVerify:
    """The child process: started when it is first asked, and replaced when it hung or died. Threads take turns."""

    def __init__(self, serve: Callable[[Connection], None] = serve_math_verify) -> None:
        self.serve = serve  # what the child does
        self.child: SpawnProcess | None = None
        self.connection: Connection | None = None  # to the child
        self.lock = threading.Lock()  # held while the child is asked

    def ask(self, predicted: str, target: str, seconds: float = 15) -> bool:
        """The verdict of math-verify; False if it dies or takes more than `seconds`."""
        with self.lock:
            if self.child is None or not self.child.is_alive():
                self.start()
            return self.verdict(predicted, target, seconds)

    def start(self) -> None:
        """Start the child; InputError if it cannot do its work."""
        context = multiprocessing.get_context("spawn")  # a fork would copy locks that others hold
        self.connection, its_end = context.Pipe()
        self.child = context.Process(target=self.serve, args=(its_end,), daemon=True)
        self.child.start()
        its_end.close()  # so that the connection ends when the child does
        if not self.verdict("1", "1", None):
            raise InputError(
                "the grader math-verify cannot be started: pip install 'minimas[math]', or use grader plain"
            )

    def verdict(self, predicted: str, target: str, seconds: float | None) -> bool:
        """The child's verdict; if there is none within `seconds` (None: no limit), the child is killed: False."""
        assert self.child and self.connection, "start() comes first"
        verdict = None
        try:
            with suppress(EOFError, OSError):  # it died
                self.connection.send((predicted, target))
                if self.connection.poll(seconds):
                    verdict = self.connection.recv()
        finally:  # after Ctrl-C, too: a late verdict must not answer the next question
            if verdict is None:
                self.child.kill()
                self.child.join()
        return bool(verdict)


math_verify = MathVerify()


# The released rule for MATH-500


def released_answer(text: str) -> str:
    r"""The answer that it sees: the last \boxed{} with no braces inside, else up to its line's last brace, else all."""
    for box in (r"\\boxed\{([^{}]+)\}", r"\\boxed\{(.*)\}"):
        found = re.findall(box, text)
        if found:
            return found[-1].strip()
    return text.strip()


def same_as_released(predicted: str, target: str) -> bool:
    """Whether one of the four spellings is the same for both, and not empty."""
    spellings = zip(released_spellings(predicted), released_spellings(target), strict=True)
    return any(one and one == two for one, two in spellings)


def released_spellings(text: str) -> Iterator[str]:
    """The integer part of the first number, the text without LaTeX's decoration, the text, the digits up to a point."""
    words = re.sub(r"\\text\{([^{}]*)\}", r"\1", text.strip())
    quotients = re.sub(r"\\frac\{\s*(-?\d+)\s*\}\{\s*(-?\d+)\s*\}", released_quotient, words)
    first = re.search(r"-?\d+", quotients.replace(",", ""))
    yield str(Decimal(first[0])) if first else ""
    yield re.sub(r"\\left|\\right|\\[,;!:]|[${}\"'\s]", "", words)
    yield re.sub(r"\s", "", text)
    digits = re.sub(r"\D", "", text.split(".")[0])
    without_zeros = digits.lstrip("0")
    is_zero = digits != "" and without_zeros == ""
    yield "0" if is_zero else without_zeros


def released_quotient(fraction: re.Match[str]) -> str:
    """A fraction of integers as a decimal, if there is one and it is short enough for a float."""
    if len(fraction[0]) >= 300 or int(fraction[2]) == 0:
        return fraction[0]
    return str(int(fraction[1]) / int(fraction[2]))


# Answers to search questions


def plain_text(text: str) -> str:
    """A text in lower case, without the LaTeX of a box, punctuation, articles and extra blanks."""
    # \text{Paris} -> {Paris}
    text = re.sub(r"\\(?:text|math)[a-z]*\s*(?=\{)|\\[ ,;:!]|~", " ", text)
    text = "".join(c for c in text.lower() if not is_punctuation(c))
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def is_punctuation(character: str) -> bool:
    """Whether a character is one of ASCII's or any other punctuation: curly quotation marks, long dashes."""
    return character in string.punctuation or unicodedata.category(character).startswith("P")


def same_text(predicted: str | None, target: str) -> bool:
    """Exact match as in SQuAD and HotpotQA, of the plain texts; but not only punctuation of ASCII is left out."""
    return predicted is not None and plain_text(predicted) == plain_text(target)
