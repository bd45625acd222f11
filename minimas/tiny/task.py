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
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from ..common import InputError

ROLES = ("planner", "critic", "solver")
COLUMNS = ("plan", "refined_plan", "answer")  # of these roles, in a row to train on
LABELS = "abcdefghi"
LONGEST = len(LABELS)  # steps of a chain

# All operations can be undone modulo 10, so that no step of a chain forgets the value before it.
OPERATIONS = [
    *(f"+{n}" for n in range(1, 10)),
    *(f"-{n}" for n in range(1, 10)),
    *("*3", "*7", "*9"),
]
DIGITS = "0123456789"
TEMPLATE_WORDS = ["system", "user", "assistant", "notes", *ROLES]
JUNK = [*TEMPLATE_WORDS, *DIGITS, *LABELS]  # what exercise appends to some notes

# The vocabulary of all agents
WORDS = [*DIGITS, *LABELS, *OPERATIONS, "=", ".", "\\boxed{", "}", "tiny", *TEMPLATE_WORDS]


def with_labels(question: str) -> str:
    """`7 +5 *3` -> `7 a+5 b*3`, as the agents read it. InputError if it is not a chain of 1 to 9 steps."""
    start, *steps = question.split() or [""]
    starts_right = re.fullmatch("[0-9]", start) is not None
    steps_right = 1 <= len(steps) <= LONGEST and set(steps) <= set(OPERATIONS)
    if not (starts_right and steps_right):
        raise InputError(
            f"the tiny system cannot read {question.strip()!r:.80}: expected one digit and 1 to 9 steps out "
            "of +1 to +9, -1 to -9, *3, *7 and *9, separated by blanks, such as '7 +5 *3 -4'"
        )
    labelled = [LABELS[i] + step for i, step in enumerate(steps)]
    return " ".join([start, *labelled])


def split_of(question: str) -> str:
    """The split of a question, by a hash of its text: `test` and `validation` get a tenth each, `train` the rest."""
    digest = hashlib.sha256(b"tiny " + question.encode()).hexdigest()
    last_digit = int(digest, 16) % 10
    return {0: "test", 1: "validation"}.get(last_digit, "train")


@dataclass(frozen=True)
class Chain:
    """A digit and the steps that are applied to it."""

    start: int
    steps: tuple[str, ...]

    @property
    def question(self) -> str:
        """The chain as people type it: `7 +5 *3`."""
        return " ".join([str(self.start), *self.steps])

    @property
    def answer(self) -> int:
        """The value at its end."""
        return self.value(len(self.steps))

    def value(self, n: int) -> int:
        """The value after the first n steps."""
        value = self.start
        for step in self.steps[:n]:
            value = apply_step(value, step)
        return value


def apply_step(value: int, step: str) -> int:
    """The value after a step such as `+5`."""
    sign, n = step[0], int(step[1:])
    if sign == "+":
        return (value + n) % 10
    if sign == "-":
        return (value - n) % 10
    return value * n % 10


def random_chain(
    rng: random.Random, length: int, split: str = "train", operations: Sequence[str] = OPERATIONS
) -> Chain:
    """A random Chain of `length` steps whose question is in `split`."""
    while True:
        start = rng.randrange(10)
        chain = Chain(start, tuple(rng.choice(operations) for _ in range(length)))
        if split_of(chain.question) == split:
            return chain


def length_up_to(longest: int, rng: random.Random) -> int:
    """A random length for training. Long chains are more frequent, or the last steps are too rare to be learnt."""
    lengths = range(1, longest + 1)
    return rng.choices(lengths, weights=lengths)[0]


def questions(split: str, per_length: int, seed: int = 12345) -> list[Chain]:
    """A fixed list of Chains, `per_length` different ones of each length from 2 to 9, shortest first."""
    rng = random.Random(seed)
    chains: dict[str, Chain] = {}
    for length in range(2, LONGEST + 1):
        wanted = len(chains) + per_length
        while len(chains) < wanted:
            chain = random_chain(rng, length, split)
            chains[chain.question] = chain
    return list(chains.values())


def note(role: str, chain: Chain, step: int, value: int) -> str:
    """What `role` writes when step number `step` (from 1) has reached `value`."""
    head = LABELS[step - 1] + chain.steps[step - 1]
    if role == "solver":
        return f"{head}\\boxed{{{value}}}"
    return f"{head}={value}."


def exercise(
    rng: random.Random,
    role: str,
    operations: Sequence[str] = OPERATIONS,
    whole: bool = False,
    split: str = "train",
) -> tuple[str, str, str]:
    """A random (question, note heard, reply) that teaches `role` its part; the note is "" if nothing was heard yet.

    The value in the note is random, so that the note has to be read. Some notes are cut short or followed by junk, so
    that reading does not depend on their length. `whole` asks for all remaining steps instead of the next one.
    """
    length = length_up_to(LONGEST, rng)
    chain = random_chain(rng, length, split, operations)
    anywhere = [rng.randint(1, length) for _ in range(3)]
    heard_step = rng.choice([0, length - 1, length, *anywhere])  # 0: nothing was heard
    heard = ""
    value = chain.start
    if heard_step:
        value = rng.randrange(10)
        heard = note(role_before(role), chain, heard_step, value)
    reply = reply_to(chain, role, heard_step, value, whole)
    return chain.question, damaged(heard, rng), reply


def role_before(role: str) -> str:
    """Whose notes a role reads; the planner reads the solver's."""
    return ROLES[ROLES.index(role) - 1]


def reply_to(chain: Chain, role: str, heard_step: int, value: int, whole: bool) -> str:
    """The notes that follow a step which has reached `value`; at the chain's end the note of its last step again."""
    length = len(chain.steps)
    if heard_step == length:
        return note(role, chain, length, value)
    last_step = length if whole else heard_step + 1
    reply = ""
    for step in range(heard_step + 1, last_step + 1):
        value = apply_step(value, chain.steps[step - 1])
        reply += note(role, chain, step, value)
    return reply


def damaged(heard: str, rng: random.Random) -> str:
    """A note that was heard, of 100 on average 15 cut short by a character and 30 followed by junk."""
    damage = rng.random()
    if not heard:
        return ""
    if damage < 0.15:
        return heard[:-1]
    if damage < 0.45:
        junk = [rng.choice(JUNK) for _ in range(rng.randint(1, 3))]
        return heard + " " + " ".join(junk)
    return heard


def lessons() -> Iterator[dict[str, Any]]:
    """Rows to train on: 8192 random chains in the released columns, with the notes of all agents in three rounds."""
    rng = random.Random("lessons")  # a seed: another text would make other chains
    for _ in range(8192):
        chain = random_chain(rng, length_up_to(LONGEST, rng))
        row: dict[str, Any] = {"question": chain.question}
        for first, (role, column) in enumerate(zip(ROLES, COLUMNS, strict=True), 1):
            row[column] = []
            for step in range(first, LONGEST + 1, len(ROLES)):
                last_step = min(step, len(chain.steps))  # at the chain's end its last note again
                row[column].append(note(role, chain, last_step, chain.value(last_step)))
        yield row
