"""The logit lens on the states of latent steps: what agents think, as far as their own heads can tell.

A state of a latent step does not stand for a token. But the head that turns an agent's states into tokens shows which
tokens it is close to and how sure that is. Cosines show how states change from step to step and from round to round.

Notation: m latent steps, D width, V vocabulary.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, TypedDict

import torch

from ..agent import Agent
from ..common import InputError, check_known, check_whole, upcast
from ..turn import are_latents, shown

if TYPE_CHECKING:
    from ..result import Result
    from ..system import System

States = dict[tuple[int, str], torch.Tensor]  # {(round, role): (m, D)}


class LensRow(TypedDict):
    """What the logit lens says of one state. No number is rounded.

    round, role, step   its place, each number from 1
    tokens              the likeliest tokens under the agent's own head, as (text, probability), at temperature 1
    entropy             of all tokens' probabilities, in bits
    norm                of the state
    step_cosine         with the previous state of its turn, None for the first
    round_cosine        with the state at its step one round before, None in the first round
    """

    round: int
    role: str
    step: int
    tokens: list[tuple[str, float]]
    entropy: float
    norm: float
    step_cosine: float | None
    round_cosine: float | None


def logit_lens(system: System, states: States | Result, top: int = 3) -> list[LensRow]:
    """A LensRow for each state of a question, with its `top` likeliest tokens.

    states   a Result that was run with keep_states=True, or its `states`: {(round, role): (m, D)}
    InputError if there are no states, or they are not those of this system's agents.
    """
    kept = states_of(states)
    for key, H in kept.items():
        check_states(system, key, H)
    check_top(system, top)

    rows = []
    for (r, role), H in kept.items():
        before = kept.get((r - 1, role))
        rows += turn_rows(system.agents[role], r, role, H, before, top)
    return rows


def states_of(given: States | Result) -> States:
    """The states of a Result, or those that were given; InputError if none were kept.

    A Result whose states were kept may have none: agents sent texts, or one agent was asked once.
    """
    states = getattr(given, "states", given)
    if not isinstance(states, dict):
        raise InputError(
            f"states is a {type(states).__name__}, expected a Result or the dict of its states: give result.states"
        )
    timings = getattr(given, "timings", {})  # a Result keeps them together with states
    if not states and not timings:
        raise InputError("there are no states: ask with keep_states=True, on the latent channel")
    return states


def check_states(system: System, key: object, H: object) -> None:
    """InputError unless `key` is (round, role), and H the states (m, D) of an agent."""
    if not isinstance(key, tuple) or len(key) != 2:
        raise InputError(
            f"states has the key {key!r:.80}, expected (round, role): give result.states, not result.latents"
        )
    role = key[1]
    check_known("role of states", [role], system.agents)
    D = system.agents[role].model.config.hidden_size
    if not are_latents(H, D):
        raise InputError(
            f"states[{key!r}] is {shown(H)}, expected (m, {D}): give result.states of this system"
        )


def check_top(system: System, top: int) -> None:
    """InputError unless each agent has so many tokens."""
    check_whole("top", top, 1)
    fewest = min(agent.model.config.vocab_size for agent in system.agents.values())
    if top > fewest:
        raise InputError(
            f"top is {top}, but an agent has only {fewest} tokens: give {fewest} or less"
        )


@torch.no_grad()
def turn_rows(
    agent: Agent, r: int, role: str, H: torch.Tensor, before: torch.Tensor | None, top: int
) -> list[LensRow]:
    """The LensRows of a turn: its states H (m, D), and `before` (m, D), those of the round before if there was one."""
    with agent.at_work():
        log_p = upcast(agent.model.logits(H)).log_softmax(-1)  # (m, V)
    p = log_p.exp()
    bits = -(p * log_p).sum(-1) / torch.log(torch.tensor(2.0))
    likeliest = p.topk(top)  # values and indices, (m, top) each
    H = upcast(H)
    by_step = [None, *cosines(H[1:], H[:-1])]
    by_round = round_cosines(H, before)

    rows: list[LensRow] = []
    for i in range(len(H)):
        texts = [token_text(agent, token) for token in likeliest.indices[i].tolist()]
        probabilities = likeliest.values[i].tolist()
        rows.append(
            {
                "round": r,
                "role": role,
                "step": i + 1,
                "tokens": list(zip(texts, probabilities, strict=True)),
                "entropy": bits[i].item(),
                "norm": H[i].norm().item(),
                "step_cosine": by_step[i],
                "round_cosine": by_round[i],
            }
        )
    return rows


def round_cosines(H: torch.Tensor, before: torch.Tensor | None) -> list[float | None]:
    """The cosine of each state of H (m, D) with that of the same step one round before, None where there is none.

    An edit may have shortened one of the two.
    """
    if before is None:
        return [None] * len(H)
    n = min(len(H), len(before))
    return [*cosines(H[:n], upcast(before[:n])), *[None] * (len(H) - n)]


def cosines(a: torch.Tensor, b: torch.Tensor) -> list[float]:
    """The cosine of each row of a (m, D) with the same row of b."""
    return torch.cosine_similarity(a, b, dim=-1).tolist()


def token_text(agent: Agent, token: int) -> str:
    """The text of a token, special tokens included."""
    return agent.tokenizer.fast.decode([token], skip_special_tokens=False)


def table(rows: list[LensRow]) -> str:
    """The rows of logit_lens as text, with a block for each turn."""
    titles = f"{'step':>6}{'norm':>9}{'bits':>7}{'cos step':>10}{'cos round':>11}  closest tokens"
    lines = []
    for row in rows:
        if row["step"] == 1:
            lines += ["", f"round {row['round']}, {row['role']}", titles]
        by_step = cosine_text(row["step_cosine"])
        by_round = cosine_text(row["round_cosine"])
        numbers = (
            f"{row['step']:>6}{row['norm']:>9.2f}{row['entropy']:>7.2f}{by_step:>10}{by_round:>11}"
        )
        tokens = "  ".join(f"{text!r} {p:.0%}" for text, p in row["tokens"])
        lines.append(f"{numbers}  {tokens}")
    return "\n".join(lines[1:])  # without the blank line above the first block


def cosine_text(cosine: float | None) -> str:
    """A cosine in the table; nothing where there is no state to compare with."""
    return "" if cosine is None else f"{cosine:.2f}"
