"""The tiny system's task: walk a chain of steps modulo 10, from left to right.

    7 +5 *3 -4      7 -> 2 -> 6 -> 2

People type the chain; agents read it with its steps labelled (`7 a+5 b*3 c-4`), so that a note can name its place.
A note says which step was done last and the value reached: `b*3=6.`, or `b*3\\boxed{6}` from the solver. Every agent is
trained to read one note and write the note of the next step, or that of the last step again at the chain's end. Three
agents do one step each, so a round is three steps and nine steps need three rounds. No agent can do more than one.
"""

import hashlib
import random
import re
from dataclasses import dataclass
from functools import reduce

from ..common import InputError

ROLES = ("planner", "critic", "solver")
LABELS = "abcdefghi"
OPERATIONS = [sign + str(n) for sign in "+-" for n in range(1, 10)] + [
    "*3",
    "*7",
    "*9",
]  # all invertible modulo 10
TEMPLATE_WORDS = ["system", "user", "assistant", "notes", *ROLES]
JUNK = [*TEMPLATE_WORDS, *"0123456789", *LABELS]  # what exercise appends to some notes
WORDS = [
    *"0123456789",
    *LABELS,
    *OPERATIONS,
    "=",
    ".",
    "\\boxed{",
    "}",
    "tiny",
    *TEMPLATE_WORDS,
]  # of all agents


def with_labels(question):
    """`7 +5 *3` -> `7 a+5 b*3`, as the agents read it. InputError if it is not a chain of 1 to 9 steps."""
    start, *steps = question.split() or [""]
    if (
        not re.fullmatch("[0-9]", start)
        or not 1 <= len(steps) <= 9
        or not set(steps) <= set(OPERATIONS)
    ):
        raise InputError(
            f"the tiny system cannot read {question.strip()!r}: expected one digit and 1 to 9 steps out "
            "of +1 to +9, -1 to -9, *3, *7 and *9, separated by blanks, such as '7 +5 *3 -4'"
        )
    return " ".join([start, *(letter + step for letter, step in zip(LABELS, steps))])


def split_of(question):
    """The split of a question, by a hash of its text: `test` and `validation` get a tenth each, `train` the rest."""
    number = int(hashlib.sha256(b"tiny " + question.encode()).hexdigest(), 16)
    return {0: "test", 1: "validation"}.get(number % 10, "train")


@dataclass(frozen=True)
class Chain:
    """A digit and the steps that are applied to it."""

    start: int
    steps: tuple[str, ...]

    @property
    def question(self):
        """The chain as people type it: `7 +5 *3`."""
        return " ".join([str(self.start), *self.steps])

    @property
    def answer(self):
        """The value at its end."""
        return self.value(len(self.steps))

    def value(self, n):
        """The value after the first n steps."""
        return reduce(apply_step, self.steps[:n], self.start)


def apply_step(value, step):
    n = int(step[1:])
    return {"+": value + n, "-": value - n, "*": value * n}[step[0]] % 10


def random_chain(rng, length, split="train", operations=OPERATIONS):
    """A random Chain of `length` steps whose question is in `split`."""
    while True:
        chain = Chain(rng.randrange(10), tuple(rng.choice(operations) for _ in range(length)))
        if split_of(chain.question) == split:
            return chain


def length_up_to(longest, rng):
    """A random length for training. Long chains are more frequent, or the last steps are too rare to be learnt."""
    return rng.choices(range(1, longest + 1), weights=range(1, longest + 1))[0]


def questions(split, per_length, seed=12345):
    """A fixed list of Chains, `per_length` different ones of each length from 2 to 9, shortest first."""
    rng, chains = random.Random(seed), {}
    for length in range(2, 10):
        wanted = len(chains) + per_length
        while len(chains) < wanted:
            chain = random_chain(rng, length, split)
            chains[chain.question] = chain
    return list(chains.values())


def note(role, chain, step, value):
    """What `role` writes when step number `step` (from 1) has reached `value`."""
    head = LABELS[step - 1] + chain.steps[step - 1]
    return f"{head}\\boxed{{{value}}}" if role == "solver" else f"{head}={value}."


def exercise(rng, role, operations=OPERATIONS, whole=False, split="train"):
    """A random (question, note heard, reply) that teaches `role` its part; the note is "" if nothing was heard yet.

    The value in the note is random, so that the note has to be read. Some notes are cut short or followed by junk, so
    that reading does not depend on their length. `whole` asks for all remaining steps instead of the next one.
    """
    length = length_up_to(9, rng)
    chain = random_chain(rng, length, split, operations)
    heard_step = rng.choice(
        [0, length - 1, length, *(rng.randint(1, length) for _ in range(3))]
    )  # 0: nothing heard
    value = rng.randrange(10) if heard_step else chain.start
    heard = note(ROLES[ROLES.index(role) - 1], chain, heard_step, value) if heard_step else ""
    reply = note(role, chain, heard_step, value) if heard_step == length else ""
    damage = rng.random()
    if heard and damage < 0.15:
        heard = heard[:-1]
    elif heard and damage < 0.45:
        heard += " " + " ".join(rng.choice(JUNK) for _ in range(rng.randint(1, 3)))
    for step in range(heard_step + 1, (length if whole else min(heard_step + 1, length)) + 1):
        value = apply_step(value, chain.steps[step - 1])
        reply += note(role, chain, step, value)
    return chain.question, heard, reply
