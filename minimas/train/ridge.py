"""Links in closed form: a ridge regression from an agent's states to the embeddings of what it says next.

    inner link   from h_t to the agent's own embedding of token t+1
    outer link   from R_in(h_t) to the target's embedding of the same text

`read` runs the agent over the texts once, for all regressions that begin at it. Other new links start at random, with a
gain at the scale of the embeddings.

Letters: n tokens, D width of the source, E width of the target.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from tqdm import tqdm

from ..agent import check_finite
from ..link import InnerLink, OuterLink
from ..tokenizer import DATE
from .losses import IGNORED, MAX_POSITIONS, forced_turns

AT_ONCE = 8  # texts that are read together
SMALL, LARGE = 2.0**-14, 2.0**16  # of set_inner_link


@torch.no_grad()
def embedding_scale(agent):
    """Standard deviation of the agent's token embeddings."""
    return (
        agent.model.embed(torch.arange(agent.model.config.vocab_size, device=agent.device))
        .std()
        .item()
    )


def start_gain(link, agent):
    """Set the last gain of a new link to the scale of the token embeddings of `agent`, which reads its output."""
    torch.nn.init.constant_(
        (link.post_ln if isinstance(link, InnerLink) else link.ln_target).weight,
        embedding_scale(agent),
    )


def new_outer_links(edges, agents):
    """{edge: OuterLink} in float32 for edges between agents {role: Agent}: random, each on the device of its source."""
    links = {}
    for source, target in edges:
        D, D_target = (agents[role].model.config.hidden_size for role in (source, target))
        links[source, target] = OuterLink(D, D_target).to(agents[source].device)
        start_gain(links[source, target], agents[target])
    return links


# Reading


class Reading(NamedTuple):
    """A reply as its agent reads it: its tokens (n,), the one that ends it included, and the state h (n, D) before each."""

    reply: str
    ids: torch.Tensor
    h: torch.Tensor


@torch.no_grad()
def read(system, role, turns, longest=MAX_POSITIONS, date=DATE):
    """TargetTurns of `role` -> a Reading of each, in the order of their lengths; InputError if a state is not finite."""
    readings, turns = [], sorted(turns, key=lambda turn: len(turn.reply))
    for i in tqdm(range(0, len(turns), AT_ONCE), f"{role} reads", unit="batch", leave=False):
        batch = turns[i : i + AT_ONCE]
        states, replies = forced_turns(system, role, batch, longest, date)
        for turn, h, ids in zip(batch, states, replies):
            kept = ids != IGNORED
            readings.append(Reading(turn.reply, ids[kept], h[:-1][kept]))
            check_finite(
                readings[-1].h.isfinite().all(), f"the states of {role}", system.agents[role].model
            )
    return readings


# Regression


@torch.no_grad()
def set_inner_link(agent, readings, strength=0.01):
    """Set an agent's inner link to the ridge regression from u = LN(h_t) to the embedding y of token t+1.

    The link has no linear branch, so the map W (u - mean u) that `regression` finds is put into proj1 and proj2:

        proj1 = SMALL (u - mean u)       gelu(z) = z / 2 up to z^2 / sqrt(2 pi), so that the relative error of a hidden
                                         unit is at most 0.8 SMALL |u - mean u|: 5e-5 for a component of 1
        proj2 = 2 LARGE / SMALL W        beside LARGE W (u - mean u) the residual h is small, and post_ln, which does not
                                         see the scale LARGE, scales by s and shifts by b

    SMALL and LARGE are powers of two: bfloat16 rounds W, mean u, s and b as it rounds all weights, and nothing else.
    """
    link, D = agent.inner_link, agent.model.config.hidden_size
    W, mean_u, s, b = regression(
        ((F.layer_norm(reading.h, (D,)), agent.model.embed(reading.ids)) for reading in readings),
        strength,
    )
    ones, zeros = torch.ones(D), torch.zeros(D)
    link.load_state_dict(
        {
            "pre_ln.weight": ones,
            "pre_ln.bias": zeros,
            "proj1.weight": SMALL * torch.eye(D),
            "proj1.bias": -SMALL * mean_u,
            "proj2.weight": 2 * LARGE / SMALL * W,
            "proj2.bias": zeros,
            "post_ln.weight": s,
            "post_ln.bias": b,
        }
    )


@torch.no_grad()
def set_outer_link(system, edge, readings, strength=0.01):
    """Start an outer link at the ridge regression from x = R_in(h_t) to y, what its source says next in the target's words.

    Each token of the source that overlaps tokens of the target's tokenizer gives a pair. residual_proj is the map that
    `regression` finds; ln_target scales by s and shifts by b; the other branch of the link starts at zero.
    """
    (source, target), link = (system.agents[role] for role in edge), system.outer_links[edge]

    def pairs():
        for reading in readings:
            places, y = overlapping_tokens(source, target, reading.reply)
            places = [i for i in places if i < len(reading.h)]  # the reply may have been cut
            yield source.inner_link(reading.h[places]), y[: len(places)].to(reading.h.device)

    W, mean_x, s, b = regression(pairs(), strength)
    start = {
        "residual_proj.weight": W,
        "residual_proj.bias": -W @ mean_x,
        "ln_target.weight": s,
        "ln_target.bias": b,
    }
    link.load_state_dict(start, strict=False)
    for parameter in link.proj2.parameters():
        parameter.zero_()


def regression(pairs, strength):
    """Batches of x (n, D), y (n, E) -> W (E, D), mean x (D,), and the standard deviation s and mean b of y (E,).

    With C the covariance of x, W minimises

        mean over pairs of |(y - b) / s - W (x - mean x)|^2  +  strength tr(C) / D |W|^2

    Uses running sums in float64: the pairs of 256 replies of 500 tokens would themselves take 2 GB at width 2048.
    """
    n = sum_x = sum_y = sum_xx = sum_xy = sum_yy = 0
    for x, y in pairs:
        x, y, n = x.double(), y.double(), n + len(x)
        sum_x, sum_y = sum_x + x.sum(0), sum_y + y.sum(0)
        sum_xx, sum_xy, sum_yy = sum_xx + x.T @ x, sum_xy + x.T @ y, sum_yy + y.square().sum(0)
    mean_x, b = sum_x / n, sum_y / n
    C, C_xy = (
        sum_xx / n - mean_x.outer(mean_x),
        sum_xy / n - mean_x.outer(b),
    )  # covariances (D, D), (D, E)
    s = (sum_yy / n - b.square()).clamp(
        min=0
    ).sqrt() + 1e-12  # rounding can make the variance negative
    penalty = (
        strength * C.diagonal().mean() + 1e-12
    )  # never zero, not even if all pairs are the same
    return (
        torch.linalg.solve(C + penalty * torch.eye(len(C), device=C.device), C_xy / s).T,
        mean_x,
        s,
        b,
    )


def overlapping_tokens(source, target, reply):
    """Align the tokens of `reply` in two tokenizers by their characters.

    Returns the places of the n source tokens that overlap any target tokens, and for each the mean embedding of those,
    (n, E).
    """
    ours, theirs = (
        agent.tokenizer.fast.encode(reply, add_special_tokens=False) for agent in (source, target)
    )
    embeddings = target.model.embed(
        torch.tensor(theirs.ids, dtype=torch.long, device=target.device)
    )
    a, b = (
        torch.tensor(ids.offsets, device=target.device).reshape(-1, 2) for ids in (ours, theirs)
    )  # starts, ends
    overlap = (
        (a[:, :1] < b[:, 1]) & (b[:, 0] < a[:, 1:]) & (a[:, :1] < a[:, 1:])
    )  # (tokens of ours, of theirs)
    paired = overlap.any(1)
    weights = overlap[paired].to(embeddings)
    return paired.nonzero()[:, 0].tolist(), weights @ embeddings / weights.sum(1, keepdim=True)
