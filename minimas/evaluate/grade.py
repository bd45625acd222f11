"""Whether an answer is correct: mathematics by equality, texts once normalised, code by running its tests.

There are three graders for mathematics:

    plain        latex.py, which needs nothing else
    math-verify  latex.py, and for what it cannot read the library math-verify (pip install 'minimas[math]')
    released     the rule of the released code for MATH-500, kept for comparison; it accepts 3.2 for 3.9

All other kinds of questions have one grader each: choice, text and code.
"""

import atexit
import json
import re
import selectors
import string
import subprocess
import sys
import threading
import unicodedata
from collections.abc import Iterator, Sequence
from contextlib import suppress
from decimal import Decimal
from importlib import metadata, util
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from ..common import InputError, check_known
from .latex import same_latex
from .run_tests import passes

if TYPE_CHECKING:
    from .benchmarks import Example

GRADERS = ("math-verify", "plain", "released")
KINDS = ("choice", "text", "code")  # of questions that are no mathematics; each has its own grader
MATH_VERIFY_CHILD = Path(__file__).with_name("math_verify_child.py")

# Raise this by one whenever a verdict may change: by an edit of answers.py, letter.py or fences.py, of the files
# beside this one, or of the sandbox. tests/verdicts.tsv holds verdicts, and a test fails if they change while this
# number does not.
GRADERS_VERSION = 3


def default_grader() -> str:
    """math-verify if it is installed, else plain."""
    return "math-verify" if util.find_spec("math_verify") else "plain"


def graders_for(kind: str, chosen: tuple[str, ...] | None, may_run: bool) -> tuple[str, ...]:
    """The graders (a tuple of names) of questions of a kind: math, choice, text, code, or released (math, as released).

    chosen   the names given by --grader, or None
    may_run  whether the programs that agents write may be run
    Raises InputError if a grader is not for this kind or is not installed, or if programs would have to be run and may
    not.
    """
    if kind in ("math", "released"):
        by_default = default_grader() if kind == "math" else kind
        graders = chosen or (by_default,)
        check_known("grader", graders, GRADERS)
        if "math-verify" in graders and util.find_spec("math_verify") is None:
            raise InputError(
                "the grader math-verify is not installed: pip install 'minimas[math]', or use grader plain"
            )
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


def start_graders(graders: Sequence[str]) -> None:
    """Start what these graders need, before there are answers to lose; InputError if it cannot be started."""
    if "math-verify" in graders:
        math_verify.start()


def is_correct(example: "Example", text: str, answer: str | None, grader: str) -> bool:
    """Whether a text with this answer (None: without one) solves an Example, according to a grader.

    grader   of mathematics one of GRADERS; for other Examples the name of their kind, which is one of KINDS
    InputError if the grader is not known, or cannot be started.
    """
    check_known("grader", [grader], (*GRADERS, *KINDS))
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

    Raises InputError if the grader is math-verify and cannot be started.
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
# The child is no process of multiprocessing: that would run the caller's script again, unless it is guarded by
# `if __name__ == "__main__"`, and a fork would copy locks that others hold.


class MathVerify:
    """The child process: started when it is first asked, and replaced when it hung or died. Threads take turns."""

    def __init__(self, program: Path = MATH_VERIFY_CHILD) -> None:
        self.program = program  # what the child runs, which says how to talk to it
        self.child: subprocess.Popen[bytes] | None = None
        self.lock = threading.Lock()  # held while the child is asked

    def start(self) -> None:
        """Start the child unless it runs already; InputError if it cannot do its work."""
        with self.lock:
            self.running()

    def ask(self, predicted: str, target: str, seconds: float = 15) -> bool:
        """The verdict of math-verify; False if it dies or takes more than `seconds`."""
        with self.lock:
            child = self.running()
            return bool(self.reply(child, [predicted, target], seconds))

    def running(self) -> subprocess.Popen[bytes]:
        """The child, which is started if it does not run; InputError as in `start`."""
        if self.child is not None and self.child.poll() is None:
            return self.child
        self.stop()
        command = [sys.executable, "-P", str(self.program), *map(str, sys.path)]
        try:
            self.child = subprocess.Popen(
                command,
                bufsize=0,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
            )
        except OSError as e:
            raise cannot_start(str(e)) from e
        child = self.child
        first = self.reply(child, None, None) or {}
        if first.get("ready"):
            return child
        self.stop()
        if "missing" in first:
            raise InputError(
                f"the grader math-verify cannot be imported ({first['missing']}): pip install 'minimas[math]', or use "
                "grader plain"
            )
        raise cannot_start(first.get("failed", f"it ended with status {child.returncode}"))

    def reply(
        self, child: subprocess.Popen[bytes], question: list[str] | None, seconds: float | None
    ) -> Any:
        """What the child says to a question, or at its start (None). If it is silent for `seconds`, it is killed: None.

        seconds   None: no limit
        """
        assert child.stdin and child.stdout, "both are pipes"
        found = None
        try:
            with suppress(OSError, ValueError):  # it died
                if question is not None:
                    child.stdin.write(json.dumps(question).encode() + b"\n")
                if readable(child.stdout, seconds):
                    found = json.loads(child.stdout.readline())
        finally:  # after Ctrl-C, too: a late verdict must not answer the next question
            if found is None:
                self.stop()
        return found

    def stop(self) -> None:
        """Kill the child, if there is one."""
        child = self.child
        if child is None:
            return
        assert child.stdin and child.stdout, "both are pipes"
        child.kill()
        child.wait()
        child.stdin.close()
        child.stdout.close()
        self.child = None


def cannot_start(why: str) -> InputError:
    """The error of a child that does not come up."""
    return InputError(
        f"the grader math-verify cannot be started ({why}): start it again, or use grader plain"
    )


def readable(stream: IO[bytes], seconds: float | None) -> bool:
    """Whether a stream has something to read within `seconds`, be it its end; None waits for ever."""
    with selectors.DefaultSelector() as selector:
        selector.register(stream, selectors.EVENT_READ)
        return bool(selector.select(seconds))


math_verify = MathVerify()
atexit.register(math_verify.stop)


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
