"""What agents think, as far as their own heads can say: a look at every state they collect.

A latent stands for no token; but the head that makes tokens of an agent's states tells which ones a latent is close to, how sure
it is, and cosines tell what changes from step to step and from round to round.
"""

import torch
import torch.nn.functional as F

from .llama import widen


@torch.no_grad()
def peek(system, states, top=3):
    """One dict for each state of a question, states {(round, role): (m, D)} as in Result.states:

    round, role, step   where it stands, from 1
    tokens              the likeliest under the agent's own head, as (text, probability), at temperature 1
    entropy             of what the head says, in bits
    norm                of the state
    step_cosine         with the state before it in its turn, None for the first
    round_cosine        with the state at its step one round before, None in the first round
    """
    rows = []
    for (r, role), H in states.items():
        agent, H = system.agents[role], widen(H)
        with agent.at_work():
            log_p = widen(agent.model.logits(states[r, role])).log_softmax(-1)  # (m, V)
        before = torch.cat([H.new_zeros(1, H.shape[1]), H])[:-1]
        steps, rounds = (F.cosine_similarity(H, other, dim=-1).tolist() for other in (before, widen(states.get((r - 1, role), H))))
        entropies, best = -(log_p.exp() * log_p).sum(-1) / torch.log(torch.tensor(2.0)), log_p.exp().topk(top)
        for i in range(len(H)):
            tokens = [(agent.tokenizer.fast.decode([token], skip_special_tokens=False), round(p, 4))
                      for token, p in zip(best.indices[i].tolist(), best.values[i].tolist())]
            rows.append({"round": r, "role": role, "step": i + 1, "tokens": tokens, "entropy": round(entropies[i].item(), 3),
                         "norm": round(H[i].norm().item(), 3), "step_cosine": round(steps[i], 3) if i else None,
                         "round_cosine": round(rounds[i], 3) if (r - 1, role) in states else None})
    return rows


def table(rows):
    """The rows for people: a block for each turn."""
    lines = []
    for row in rows:
        if row["step"] == 1:
            lines += ["", f"round {row['round']}, {row['role']}",
                      f"{'step':>6}{'norm':>9}{'bits':>7}{'cos step':>10}{'cos round':>11}  closest tokens"]
        cosines = ("" if value is None else f"{value:.2f}" for value in (row["step_cosine"], row["round_cosine"]))
        step, rounds = cosines
        tokens = "  ".join(f"{text!r} {p:.0%}" for text, p in row["tokens"])
        lines.append(f"{row['step']:>6}{row['norm']:>9.2f}{row['entropy']:>7.2f}{step:>10}{rounds:>11}  {tokens}")
    return "\n".join(lines[1:])
