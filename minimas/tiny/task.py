"""The tiny system's task: walk a chain of steps modulo 10, from left to right.

    7 +5 *3 -4      7 -> 2 -> 6 -> 2

People type the chain; agents read it with its steps labelled (`7 a+5 b*3 c-4`), so that a note can name its place. A
note says which step was done last and the value reached: `b*3=6.`, from the solver `b*3\\boxed{6}`. Every agent is
trained to read one note and write the note of the next step, or the same step's again at the chain's end. Three agents,
one step each: a round is three steps, so nine steps need three rounds. No agent alone can do more than one.
"""

import hashlib
import random
import re
from dataclasses import dataclass

from .. import InputError

ROLES = ("planner", "critic", "solver")
LABELS = "abcdefghi"
OPERATIONS = [sign + str(n) for sign in "+-" for n in range(1, 10)] + ["*3", "*7", "*9"]  # all invertible modulo 10


def label(question):
    """`7 +5 *3` -> `7 a+5 b*3`, as the agents read it. InputError when it is not a chain of 1 to 9 steps."""
    start, *steps = question.split() or [""]
    if not re.fullmatch("[0-9]", start) or not 1 <= len(steps) <= 9 or not set(steps) <= set(OPERATIONS):
        raise InputError(f"the tiny system cannot read {question.strip()!r}: expected one digit and 1 to 9 steps out of +1 to +9, "
                         "-1 to -9, *3, *7 and *9, parted by blanks, such as '7 +5 *3 -4'")
    return " ".join([start, *(letter + step for letter, step in zip(LABELS, steps))])


def split_of(question):
    """Which split a question belongs to, by a hash of its text: `test` and `validation` get one in ten each."""
    return {0: "test", 1: "validation"}.get(int(hashlib.sha256(b"tiny " + question.encode()).hexdigest(), 16) % 10, "train")


@dataclass(frozen=True)
class Chain:
    start: int
    steps: tuple[str, ...]

    @property
    def question(self):
        return " ".join([str(self.start), *self.steps])

    @property
    def answer(self):
        return self.value(len(self.steps))

    def value(self, done):
        """Where the chain is after so many steps."""
        value = self.start
        for step in self.steps[:done]:
            value = apply(value, step)
        return value


def apply(value, step):
    n = int(step[1:])
    return {"+": value + n, "-": value - n, "*": value * n}[step[0]] % 10


def draw(rng, length, split="train", operations=OPERATIONS):
    """A random chain of that length from that split."""
    while True:
        chain = Chain(rng.randrange(10), tuple(rng.choice(operations) for _ in range(length)))
        if split_of(chain.question) == split:
            return chain


def length_up_to(most, rng):
    """A length to train on: the longer, the more often, or the last steps are seen too seldom to be learnt."""
    return rng.choices(range(1, most + 1), weights=range(1, most + 1))[0]


def questions(split, per_length, seed=12345, lengths=range(2, 10)):
    """A fixed set of `per_length` different chains of each length."""
    rng, chains = random.Random(seed), {}
    for length in lengths:
        wanted = len(chains) + per_length
        while len(chains) < wanted:
            chain = draw(rng, length, split)
            chains[chain.question] = chain
    return list(chains.values())


def note(role, chain, step, value):
    """What `role` writes after the step of that number (from 1) reached `value`."""
    head = LABELS[step - 1] + chain.steps[step - 1]
    return f"{head}\\boxed{{{value}}}" if role == "solver" else f"{head}={value}."


JUNK = ["system", "user", "assistant", "notes", *ROLES, *"0123456789", *LABELS]
WORDS = [*"0123456789", *LABELS, *OPERATIONS, "=", ".", "\\boxed{", "}", "tiny", "system", "user", "assistant", "notes", *ROLES]


def exercise(rng, role, operations=OPERATIONS, whole=False, split="train"):
    """A random (question, note heard, reply) from which `role` learns its trade; None heard is an empty inbox.

    The value heard is random, so that the note must be read; some notes are cut short or followed by junk, so that reading
    does not hang on their length. `whole` asks for the rest of the chain instead of the next step.
    """
    length = length_up_to(9, rng)
    chain = draw(rng, length, split, operations)
    done = rng.choice([0, length - 1, length, rng.randint(1, length), rng.randint(1, length), rng.randint(1, length)])
    value = rng.randrange(10) if done else chain.start
    heard = note(ROLES[ROLES.index(role) - 1], chain, done, value) if done else None
    reply = note(role, chain, done, value) if done == length else ""
    kind = rng.random()
    if heard and kind < 0.15:
        heard = heard[:-1]
    elif heard and kind < 0.45:
        heard += " " + " ".join(rng.choice(JUNK) for _ in range(rng.randint(1, 3)))
    for step in range(done + 1, (length if whole else min(done + 1, length)) + 1):
        value = apply(value, chain.steps[step - 1])
        reply += note(role, chain, step, value)
    return chain.question, heard, reply
