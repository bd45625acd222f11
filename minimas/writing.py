"""The text of the answer: what the last agent writes in the turn that answers, and the retry where it holds no answer.

Notation: B questions in a turn, k rollouts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

import torch

from .agent import Agent, Prompt
from .common import no_op
from .generate import Batch, Reply
from .prompts import Question, answer_retry
from .sample import seeds
from .sandbox.tools import ToolCalls
from .settings import CompletedSettings
from .tokenizer import Decoding
from .turn import Turn

if TYPE_CHECKING:
    from .system import System

ALL_BITS = (1 << 63) - 1  # all bits of a seed
RETRY_TOKENS = {"math": 16, "choice": 16, "code": 256}  # that a text may take to end with an answer


class Written(NamedTuple):
    """A text that the last agent wrote: see Result."""

    text: str
    token_ids: list[int]
    new_tokens: int
    retried: bool


class Growth(NamedTuple):
    """What a text of a turn gained.

    number   of the text
    text     what is new of it
    written  all of it, with the last piece
    """

    number: int
    text: str
    written: Written | None = None


def write_answers(
    system: System,
    turn: Turn,
    questions: Sequence[Question],
    settings: CompletedSettings,
    callback: Callable,
    wanted: Callable[[int, int], bool],
    whole: bool,
) -> Iterator[Growth]:
    """Write k texts after each prompt of a turn that answers B questions, and ask again where one holds no answer.

    callback, wanted, whole   see System.write; InputError if a score is not finite
    """
    agent = system.agents[turn.role]
    k = settings.rollouts
    text_seeds = seeds(questions, settings.seed, rollouts=k)
    calls = None
    if system.style.calls_tools:
        calls = ToolCalls(agent.tokenizer, settings.tools, len(text_seeds))

    def text_wanted(number: int) -> bool:
        i, rollout = divmod(number, k)
        return wanted(turn.rows[i], rollout)

    with agent.at_work():
        reply = calls.reply if calls else None
        batch = Batch(agent, turn.prompts, text_seeds, settings)
        decodings = [Decoding(agent.tokenizer) for _ in text_seeds]
        lost: dict[int, Written] = {}  # texts without an answer, by number
        for n, text, ended in write_pieces(batch, decodings, text_wanted, whole, callback, reply):
            if not ended:
                yield Growth(n, text)
                continue
            ids = batch.ids[n]
            inserted = calls.inserted[n] if calls else 0
            written = Written(agent.tokenizer.decode(ids), ids, len(ids) - inserted, False)
            if not settings.retry or not is_lost(system, written, questions[n // k]):
                yield Growth(n, text, written)
                continue
            yield Growth(n, text)
            if text_wanted(n):  # asked anew, now that this piece was seen
                lost[n] = written
            else:
                yield Growth(n, "", written)
        if lost:
            seeds_used = [text_seeds[n] for n in lost]
            yield from retry(system, agent, lost, seeds_used, settings, text_wanted, whole)


def is_lost(system: System, written: Written, question: Question) -> bool:
    """Whether a text holds no answer, and the agent was trained to be asked for one."""
    if answer_retry(system.style.prompts, system.task) is None:
        return False
    return system.answer_in(written.text, question) is None


def retry(
    system: System,
    agent: Agent,
    lost: dict[int, Written],
    seeds_used: list[int],
    settings: CompletedSettings,
    wanted: Callable[[int], bool],
    whole: bool,
) -> Iterator[Growth]:
    """Ask for an answer at the end of each text that holds none, and let the agent go on a little.

    It reads the text alone, not its prompt again.

    lost        {number: a text without an answer}
    seeds_used  those of these texts
    wanted      wanted(number): whether a text is to go on
    """
    request = answer_retry(system.style.prompts, system.task)
    numbers = list(lost)
    asked = [f"{written.text}\n{request}" for written in lost.values()]
    prompts: list[Prompt] = []
    decodings = []
    for text, written in zip(asked, lost.values(), strict=True):
        ids = agent.tokenizer.encode(text, special=True)
        prompts.append([torch.tensor(ids, dtype=torch.long)])
        decodings.append(Decoding(agent.tokenizer, before=text, given=written.text))
    # The complement of a seed gives random numbers that the text did not use.
    others = [seed ^ ALL_BITS for seed in seeds_used]
    settings = replace(settings, max_new_tokens=RETRY_TOKENS[system.task])
    batch = Batch(agent, prompts, others, settings)
    for i, text, ended in write_pieces(batch, decodings, lambda i: wanted(numbers[i]), whole):
        n = numbers[i]
        second = None
        if ended:
            ids = batch.ids[i]
            first = lost[n]
            second = Written(
                decodings[i].text(ids), first.token_ids + ids, first.new_tokens + len(ids), True
            )
        yield Growth(n, text, second)


def write_pieces(
    batch: Batch,
    decodings: list[Decoding],
    wanted: Callable[[int], bool],
    whole: bool,
    callback: Callable = no_op,
    reply: Reply | None = None,
) -> Iterator[tuple[int, str, bool]]:
    """Write the texts of a Batch; yields a text's number, its new text, and whether it has ended.

    decodings   one for each text: what was given of it
    wanted      wanted(number) is asked after each step: a text that is not wanted ends there
    whole       yield no text before it has ended
    """
    unfinished = batch.going_on
    for going_on in batch.write(callback, reply):
        if not whole:
            for n in sorted(going_on):
                text = decodings[n].new_text(batch.ids[n])
                if text:
                    yield n, text, False
        batch.end([n for n in going_on if not wanted(n)])
        for n in sorted(unfinished - batch.going_on):
            yield n, decodings[n].new_text(batch.ids[n], ended=True), True
        unfinished = batch.going_on
