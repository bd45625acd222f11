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
from typing import TYPE_CHECKING, Any

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


def launch_graders(graders: Sequence[str]) -> None:
    """Let what these graders need come up while the caller does something else; InputError if it cannot be run."""
    if "math-verify" in graders:
        math_verify.launch()


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
        self.is_ready = False  # whether the child has said that it can do its work
        self.lock = threading.Lock()  # held while the child is asked

    def launch(self) -> None:
        """Let the child come up unless it runs already, and wait for nothing; InputError if it cannot be run."""
        with self.lock:
            self.launched()

    def start(self) -> None:
        """Start the child unless it runs already, and wait until it is ready; InputError if it cannot do its work."""
        with self.lock:
            self.ready()

    def ask(self, predicted: str, target: str, seconds: float = 15) -> bool:
        """The verdict of math-verify; False if it dies or takes more than `seconds`."""
        with self.lock:
            return self.verdict(self.ready(), [predicted, target], seconds)

    def launched(self) -> subprocess.Popen[bytes]:
        """The child, be it ready or about to be; InputError as in `launch`."""
        has_died = self.is_ready and self.child is not None and self.child.poll() is not None
        if has_died:
            self.stop()
        if self.child is not None:
            return self.child
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
        return self.child

    def ready(self) -> subprocess.Popen[bytes]:
        """The child, which has said that it is ready; InputError as in `start`."""
        child = self.launched()
        if self.is_ready:
            return child
        said: dict[str, Any] = {}
        try:
            said = first_line(child)
            self.is_ready = "ready" in said
        finally:
            if not self.is_ready:
                self.stop()
        if "missing" in said:
            raise InputError(
                f"the grader math-verify cannot be imported ({said['missing']}): pip install 'minimas[math]', or use "
                "grader plain"
            )
        if not self.is_ready:
            raise cannot_start(said.get("failed", f"it ended with status {child.returncode}"))
        return child

    def verdict(self, child: subprocess.Popen[bytes], pair: list[str], seconds: float) -> bool:
        """What a child that is ready says of [predicted, target]; False if it dies, or is killed after `seconds`."""
        assert child.stdin and child.stdout, "both are pipes"
        is_late = threading.Event()

        def end() -> None:
            is_late.set()
            child.kill()

        timer = threading.Timer(seconds, end)  # a pipe under Windows cannot be read with a limit
        timer.daemon = True
        said = b""
        try:
            timer.start()
            with suppress(OSError):  # it died
                child.stdin.write(json.dumps(pair).encode() + b"\n")
                said = child.stdout.readline()
        finally:
            timer.cancel()
            if timer.is_alive():
                timer.join()  # until it is known whether it killed the child
            is_whole = said.endswith(b"\n")
            # after Ctrl-C, too: a late verdict must not answer the next question
            if is_late.is_set() or not is_whole:
                self.stop()
        return said.strip() == b"true"

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
        self.is_ready = False


def cannot_start(why: str) -> InputError:
    """The error of a child that does not come up."""
    return InputError(
        f"the grader math-verify cannot be started ({why}): start it again, or use grader plain"
    )


def first_line(child: subprocess.Popen[bytes]) -> dict[str, Any]:
    """What a child says at its start: {"ready": true} or why it cannot do its work; {} if it dies over it."""
    assert child.stdout, "it is a pipe"
    try:
        return json.loads(child.stdout.readline())
    except (OSError, ValueError):  # no line, or part of one
        return {}


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
