"""Whether an answer is correct: mathematics by equality, texts once normalised, code by running its tests.

There are three graders for mathematics:

    plain        latex.py, which needs nothing else
    math-verify  latex.py, and for what it cannot read the library math-verify (pip install 'minimas[math]')
    released     the rule of the released code for MATH-500, kept for comparison; it accepts 3.2 for 3.9

All other kinds of questions have one grader each: choice, text and code.
"""

import hashlib
import multiprocessing
import os
import re
import signal
import string
import threading
from contextlib import suppress
from decimal import Decimal
from importlib import metadata, util
from pathlib import Path

from ..common import InputError, check_known
from .latex import same_latex
from .run_tests import passes

GRADERS = ("math-verify", "plain", "released")


def default_grader():
    """math-verify if it is installed, else plain."""
    return "math-verify" if util.find_spec("math_verify") else "plain"


def graders_for(kind, chosen, may_run):
    """The graders (a tuple of names) of questions of a kind: math, choice, text, code, or released (math, as released).

    chosen   the names given by --grader, or None
    may_run  whether the programs that agents write may be run
    Raises InputError if a grader is not for this kind, or if programs would have to be run and may not.
    """
    if kind in ("math", "released"):
        graders = chosen or (default_grader() if kind == "math" else kind,)
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


def graders_hash():
    """A hash of all that judges, for records that must not mix verdicts of different graders."""
    folder, judges = Path(__file__).parent, hashlib.sha256()
    names = (
        "../answers.py",
        "grade.py",
        "latex.py",
        "spellings.txt",
        "expression.py",
        "run_tests.py",
        "harness.py",
    )
    for name in (*names, "../sandbox/python.py", "../sandbox/guard.py"):
        judges.update((folder / name).read_bytes())
    if util.find_spec("math_verify"):
        judges.update(metadata.version("math-verify").encode())
    return judges.hexdigest()[:16]


def is_correct(example, text, answer, grader):
    """Whether a text with this answer (None: without one) solves an Example, according to a grader."""
    if grader in GRADERS:
        return same_math(
            released_answer(text) if grader == "released" else answer, example.gold, grader
        )
    if grader == "code":
        if answer is None:
            return False
        tests = example.tests() if callable(example.tests) else example.tests
        return passes(example.program(answer), tests, example.fn_name)
    return same_text(answer, example.gold) if grader == "text" else answer == example.gold


def same_math(predicted, target, grader):
    """Whether a predicted answer (the content of a box, or None) equals the target in LaTeX, according to one of GRADERS.

    Raises InputError if the grader is math-verify and cannot be imported.
    """
    if predicted is None or not predicted.strip():
        return False
    if grader == "released":
        return same_as_released(predicted, target)
    verdict = same_latex(predicted, target)
    return (
        math_verify.ask(predicted, target)
        if verdict is None and grader == "math-verify"
        else bool(verdict)
    )


# math-verify runs in a child process because it may hang: its own time limit is an alarm signal, which works in the main
# thread only, and cannot interrupt a long step in C, such as an integer power or a match of a regular expression.


def serve_math_verify(connection):
    """What the child does: for each (predicted, target) that it receives, send whether math-verify calls them equal."""
    import resource  # not on Windows

    signal.signal(
        signal.SIGINT, signal.SIG_IGN
    )  # Ctrl-C is for the parent, which ends the child when it exits
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # it logs what it cannot parse
    resource.setrlimit(resource.RLIMIT_AS, (4 << 30, 4 << 30))
    from math_verify import parse, verify

    while True:
        pair = connection.recv()
        try:
            predicted, target = (
                parse(rf"\boxed{{{text}}}", extraction_mode="first_match", parsing_timeout=3)
                for text in pair
            )
            verdict = bool(verify(target, predicted, timeout_seconds=3))
        except BaseException:  # its timeout is no Exception
            verdict = False
        connection.send(verdict)


class MathVerify:
    """The child process: started when it is first asked, and replaced when it hung or died. Threads take turns."""

    def __init__(self, serve=serve_math_verify):
        self.serve, self.child, self.lock = serve, None, threading.Lock()

    def ask(self, predicted, target, seconds=15):
        """The verdict of math-verify; False if it dies or takes more than `seconds`."""
        with self.lock:
            if self.child is None or not self.child.is_alive():
                self.start()
            return self.verdict(predicted, target, seconds)

    def start(self):
        context = multiprocessing.get_context(
            "spawn"
        )  # a fork would copy locks that other threads hold
        self.connection, its_end = context.Pipe()
        self.child = context.Process(target=self.serve, args=(its_end,), daemon=True)
        self.child.start()
        its_end.close()  # so that the connection ends when the child does
        if not self.verdict("1", "1", None):
            raise InputError(
                "the grader math-verify cannot be started: pip install 'minimas[math]', or use grader plain"
            )

    def verdict(self, predicted, target, seconds):
        """The child's verdict; if there is none within `seconds` (None: no limit), the child is killed: False."""
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


def released_answer(text):
    r"""The answer that it sees: the last \boxed{} with no braces inside, else up to its line's last brace, else all."""
    boxes = (
        re.findall(r"\\boxed\{([^{}]+)\}", text) or re.findall(r"\\boxed\{(.*)\}", text) or [text]
    )
    return boxes[-1].strip()


def same_as_released(predicted, target):
    """Whether one of the four spellings is the same for both, and not empty."""
    return any(
        one and one == two
        for one, two in zip(released_spellings(predicted), released_spellings(target))
    )


def released_spellings(text):
    """The integer part of the first number, the text without LaTeX's decoration, the text, the digits up to a point."""
    words = re.sub(r"\\text\{([^{}]*)\}", r"\1", text.strip())
    simple = re.sub(
        r"\\frac\{\s*(-?\d+)\s*\}\{\s*(-?\d+)\s*\}",
        lambda m: str(int(m[1]) / int(m[2])) if int(m[2]) and len(m[0]) < 300 else m[0],
        words,
    )
    first = re.search(r"-?\d+", simple.replace(",", ""))
    yield str(Decimal(first[0])) if first else ""
    yield re.sub(r"\\left|\\right|\\[,;!:]|[${}\"'\s]", "", words)
    yield re.sub(r"\s", "", text)
    digits = re.sub(r"\D", "", text.split(".")[0])
    yield digits and (digits.lstrip("0") or "0")


# Answers to search questions


def plain_text(text):
    """A text in lower case, without the LaTeX of a box, punctuation, articles and extra blanks."""
    text = re.sub(
        r"\\(?:text|math)[a-z]*\s*(?=\{)|\\[ ,;:!]|~", " ", text
    )  # \text{Paris} -> {Paris}
    text = "".join(c for c in text.lower() if c not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def same_text(predicted, target):
    """Exact match as in SQuAD and HotpotQA, of the plain texts."""
    return predicted is not None and plain_text(predicted) == plain_text(target)
