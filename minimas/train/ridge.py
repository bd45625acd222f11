"""How new links start: with a gain at the scale of the embeddings, and outer links at a ridge regression.

Letters: n tokens that both tokenizers have, D width of the source, E width of the target.
"""

from bisect import bisect_left, bisect_right

import torch
from torch import nn

from ..agent import check_finite
from ..link import InnerLink
from ..tokenizer import DATE
from .losses import MAX_POSITIONS, forced_turns


@torch.no_grad()
def embedding_scale(agent):
    """Standard deviation of the agent's token embeddings."""
    return agent.model.embed(torch.arange(agent.model.config.vocab_size, device=agent.device)).std().item()


def start_gain(link, agent):
    """Set the last gain of a new link to the scale of the token embeddings of `agent`, which reads its output."""
    nn.init.constant_((link.post_ln if isinstance(link, InnerLink) else link.ln_target).weight, embedding_scale(agent))


@torch.no_grad()
def ridge_start(system, edge, turns, strength=0.01, longest=MAX_POSITIONS, date=DATE):
    """Start an outer link at a ridge regression that expresses what its source says next in the target's embeddings.

    Each token t+1 of the source's TargetTurns that has a counterpart in the target's tokenizer gives a pair: x = R_in(h_t)
    and y, the target's embedding of the same text. With s and b the standard deviation and mean of y, and C the
    covariance of x, residual_proj is the W that minimises

        mean over pairs of |(y - b) / s - W (x - mean x)|^2  +  strength tr(C) / D |W|^2

    ln_target scales by s and shifts by b; the other branch of the link starts at zero.
    """
    link = system.outer_links[edge]
    mean_x, b, C, C_xy, variance_y = moments(token_pairs(system, edge, turn, longest, date) for turn in turns)
    check_finite(mean_x.isfinite().all(), f"the states of {edge[0]}", system.agents[edge[0]].model)
    s = variance_y.sqrt() + 1e-12
    penalty = strength * C.diagonal().mean() + 1e-12  # never zero, not even if all pairs are the same
    W = torch.linalg.solve(C + penalty * torch.eye(len(C), device=C.device), C_xy / s).T
    for parameter, value in ((link.residual_proj.weight, W), (link.residual_proj.bias, -W @ mean_x),
                             (link.ln_target.weight, s), (link.ln_target.bias, b)):
        parameter.copy_(value)
    nn.init.zeros_(link.proj2.weight)
    nn.init.zeros_(link.proj2.bias)


def token_pairs(system, edge, turn, longest, date):
    """x (n, D) and y (n, E) as in ridge_start, for the n tokens of a TargetTurn that have a counterpart."""
    source, target = (system.agents[role] for role in edge)
    h, _ = forced_turns(system, edge[0], [turn], longest, date)
    tokens, y = overlapping_tokens(source, target, turn.reply)
    tokens = [i for i in tokens if i < h.shape[1] - 1]  # forced_turns may have cut the reply
    return source.inner_link(h[0, tokens]), y[:len(tokens)].to(h.device)


def overlapping_tokens(source, target, reply):
    """Align the tokens of `reply` in two tokenizers by their characters.

    Returns the places of the n source tokens that overlap any target tokens, and for each the mean embedding of those,
    (n, E).
    """
    ours, theirs = (agent.tokenizer.fast.encode(reply, add_special_tokens=False) for agent in (source, target))
    embeddings = target.model.embed(torch.tensor(theirs.ids, dtype=torch.long, device=target.device))
    starts, ends = [start for start, _ in theirs.offsets], [end for _, end in theirs.offsets]  # in the order of the text
    places, means = [], []
    for i, (start, end) in enumerate(ours.offsets):
        first, last = bisect_right(ends, start), bisect_left(starts, end)
        if first < last and start < end:
            places.append(i)
            means.append(embeddings[first:last].mean(0))
    return places, torch.stack(means) if means else embeddings[:0]


def moments(pairs):
    """Batches of x (n, D), y (n, E) -> means of x, y; covariances of x (D, D) and of x with y (D, E); variances of y.

    Uses running sums in float64: the pairs of 256 replies of 500 tokens would themselves take 2 GB at width 2048.
    """
    n = sum_x = sum_y = sum_xx = sum_xy = sum_yy = 0
    for x, y in pairs:
        x, y, n = x.double(), y.double(), n + len(x)
        sum_x, sum_y = sum_x + x.sum(0), sum_y + y.sum(0)
        sum_xx, sum_xy, sum_yy = sum_xx + x.T @ x, sum_xy + x.T @ y, sum_yy + y.square().sum(0)
    mean_x, mean_y = sum_x / n, sum_y / n
    variance_y = (sum_yy / n - mean_y.square()).clamp(min=0)  # rounding can make it negative
    return mean_x, mean_y, sum_xx / n - mean_x.outer(mean_x), sum_xy / n - mean_x.outer(mean_y), variance_y
