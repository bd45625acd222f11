"""What agents think, as far as their own heads can tell: a look at every state that they collect.

A latent does not stand for a token. But the head that turns an agent's states into tokens shows which tokens a latent
is close to and how sure that is, and cosines show how latents change from step to step and from round to round.
"""

import torch
import torch.nn.functional as F

from .llama import widen


@torch.no_grad()
def peek(system, states, top=3):
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
        agent, H = system.agents[role], widen(H)
        with agent.at_work():
            log_p = widen(agent.model.logits(states[r, role])).log_softmax(-1)  # (m, V)
        round_before = states.get((r - 1, role))
        steps = [None] + [round(c, 3) for c in F.cosine_similarity(H[1:], H[:-1], dim=-1).tolist()]
        rounds = [None] * len(H)
        if round_before is not None:
            rounds = [round(c, 3) for c in F.cosine_similarity(H, widen(round_before), dim=-1).tolist()]
        entropies = -(log_p.exp() * log_p).sum(-1) / torch.log(torch.tensor(2.0))
        best = log_p.exp().topk(top)
        for i in range(len(H)):
            tokens = [(agent.tokenizer.fast.decode([token], skip_special_tokens=False), round(p, 4))
                      for token, p in zip(best.indices[i].tolist(), best.values[i].tolist())]
            rows.append({"round": r, "role": role, "step": i + 1, "tokens": tokens,
                         "entropy": round(entropies[i].item(), 3), "norm": round(H[i].norm().item(), 3),
                         "step_cosine": steps[i], "round_cosine": rounds[i]})
    return rows


def table(rows):
    """The rows of peek as text, with a block for each turn."""
    lines = []
    for row in rows:
        if row["step"] == 1:
            lines += ["", f"round {row['round']}, {row['role']}",
                      f"{'step':>6}{'norm':>9}{'bits':>7}{'cos step':>10}{'cos round':>11}  closest tokens"]
        by_step, by_round = ("" if c is None else f"{c:.2f}" for c in (row["step_cosine"], row["round_cosine"]))
        tokens = "  ".join(f"{text!r} {p:.0%}" for text, p in row["tokens"])
        lines.append(f"{row['step']:>6}{row['norm']:>9.2f}{row['entropy']:>7.2f}{by_step:>10}{by_round:>11}  {tokens}")
    return "\n".join(lines[1:])
