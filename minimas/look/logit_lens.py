"""The logit lens on the states of latent steps: what agents think, as far as their own heads can tell.

A state of a latent step does not stand for a token. But the head that turns an agent's states into tokens shows which
tokens it is close to and how sure that is. Cosines show how states change from step to step and from round to round.

Letters: m latent steps, D width, V vocabulary.
"""

import torch

from ..common import upcast


@torch.no_grad()
def logit_lens(system, states, top=3):
    """One dict for each state of a question; states: {(round, role): (m, D)}, as in Result.states.

    round, role, step   its place, each number from 1
    tokens              the `top` likeliest tokens under the agent's own head, as (text, probability), at temperature 1
    entropy             of all tokens' probabilities, in bits
    norm                of the state
    step_cosine         with the previous state of its turn, None for the first
    round_cosine        with the state at its step one round before, None in the first round
    """
    rows = []
    for (r, role), H in states.items():
        agent, before = system.agents[role], states.get((r - 1, role))
        with agent.at_work():
            log_p = upcast(agent.model.logits(H)).log_softmax(-1)  # (m, V)
        H, entropies = upcast(H), -(log_p.exp() * log_p).sum(-1) / torch.log(torch.tensor(2.0))
        steps = [None, *cosines(H[1:], H[:-1])]
        rounds = [None] * len(H) if before is None else cosines(H, upcast(before))
        best = log_p.exp().topk(top)
        for i in range(len(H)):
            tokens = [
                (token_text(agent, t), round(p, 4))
                for t, p in zip(best.indices[i].tolist(), best.values[i].tolist())
            ]
            rows.append(
                {
                    "round": r,
                    "role": role,
                    "step": i + 1,
                    "tokens": tokens,
                    "entropy": round(entropies[i].item(), 3),
                    "norm": round(H[i].norm().item(), 3),
                    "step_cosine": steps[i],
                    "round_cosine": rounds[i],
                }
            )
    return rows


def cosines(a, b):
    """The cosine of each row of a (m, D) with the same row of b."""
    return [round(c, 3) for c in torch.cosine_similarity(a, b, dim=-1).tolist()]


def token_text(agent, token):
    """The text of a token, special tokens included."""
    return agent.tokenizer.fast.decode([token], skip_special_tokens=False)


def table(rows):
    """The rows of logit_lens as text, with a block for each turn."""
    lines = []
    for row in rows:
        if row["step"] == 1:
            lines += [
                "",
                f"round {row['round']}, {row['role']}",
                f"{'step':>6}{'norm':>9}{'bits':>7}{'cos step':>10}{'cos round':>11}  closest tokens",
            ]
        by_step, by_round = (
            "" if c is None else f"{c:.2f}" for c in (row["step_cosine"], row["round_cosine"])
        )
        tokens = "  ".join(f"{text!r} {p:.0%}" for text, p in row["tokens"])
        lines.append(
            f"{row['step']:>6}{row['norm']:>9.2f}{row['entropy']:>7.2f}{by_step:>10}{by_round:>11}  {tokens}"
        )
    return "\n".join(lines[1:])
