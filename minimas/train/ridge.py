"""Links in closed form: a ridge regression from an agent's states to the embeddings of what it says next.

    inner link   from h_t to the agent's own embedding of token t+1
    outer link   from R_in(h_t) to the target's embedding of the same text

`read_replies` runs the agent over the texts once, for all regressions that begin at it. Other new links start at
random, with a gain at the scale of the embeddings.

Notation: n tokens, D width of the source, E width of the target.
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from tqdm import tqdm

from ..agent import Agent, check_finite
from ..link import InnerLink, OuterLink
from ..system import System
from ..tokenizer import DATE
from ..turn import Edge
from .examples import TargetTurn
from .losses import IGNORED, MAX_POSITIONS, forced_turns

AT_ONCE = 8  # texts that are read together
SMALL, LARGE = 2.0**-14, 2.0**16  # of set_inner_link


@torch.no_grad()
def embedding_scale(agent: Agent) -> float:
    """Standard deviation of the agent's token embeddings."""
    ids = torch.arange(agent.model.config.vocab_size, device=agent.device)
    return agent.model.embed(ids).std().item()


def start_gain(link: InnerLink | OuterLink, agent: Agent) -> None:
    """Set the last gain of a new link to the scale of the token embeddings of `agent`, which reads its output."""
    last_norm = link.post_ln if isinstance(link, InnerLink) else link.ln_target
    torch.nn.init.constant_(last_norm.weight, embedding_scale(agent))


def new_outer_links(edges: Iterable[Edge], agents: dict[str, Agent]) -> dict[Edge, OuterLink]:
    """{edge: OuterLink} in float32 for edges between agents {role: Agent}: random, each on the device of its source."""
    links = {}
    for source, target in edges:
        D = agents[source].model.config.hidden_size
        D_target = agents[target].model.config.hidden_size
        link = OuterLink(D, D_target).to(agents[source].device)
        start_gain(link, agents[target])
        links[source, target] = link
    return links


# Reading


class ReadReply(NamedTuple):
    """A reply as its agent reads it: its tokens (n,), with the one that ends it, and the state h (n, D) before each."""

    text: str
    ids: torch.Tensor
    h: torch.Tensor


@torch.no_grad()
def read_replies(
    system: System,
    role: str,
    turns: Sequence[TargetTurn],
    longest: int = MAX_POSITIONS,
    date: str = DATE,
    progress: bool = True,
) -> list[ReadReply]:
    """TargetTurns of `role` -> a ReadReply of each, the shortest first; InputError if a state is not finite."""
    agent = system.agents[role]
    turns = sorted(turns, key=lambda turn: len(turn.reply))
    replies = []
    starts = range(0, len(turns), AT_ONCE)
    for i in tqdm(starts, f"{role} reads", unit="batch", leave=False, disable=not progress):
        batch = turns[i : i + AT_ONCE]
        states, tokens = forced_turns(system, role, batch, longest, date)
        for turn, h, ids in zip(batch, states, tokens, strict=True):
            kept = ids != IGNORED
            reply = ReadReply(turn.reply, ids[kept], h[:-1][kept])
            check_finite(reply.h.isfinite().all(), f"the states of {role}", agent.model)
            replies.append(reply)
    return replies


# Regression


@torch.no_grad()
def set_inner_link(agent: Agent, replies: Iterable[ReadReply], strength: float = 0.01) -> None:
    """Set an agent's inner link to the ridge regression from u = LN(h_t) to the embedding y of token t+1.

    The link has no linear branch, so the map W (u - mean u) that `regression` finds is put into proj1 and proj2:

        proj1 = SMALL (u - mean u)       gelu(z) = z / 2 up to z^2 / sqrt(2 pi), so that the relative error of a hidden
                                         unit is at most 0.8 SMALL |u - mean u|: 5e-5 for a component of 1
        proj2 = 2 LARGE / SMALL W        beside LARGE W (u - mean u) the residual h is small, and post_ln, which does
                                         not see the scale LARGE, scales by s and shifts by b

    SMALL and LARGE are powers of two: bfloat16 rounds W, mean u, s and b as it rounds all weights, and nothing else.
    """
    D = agent.model.config.hidden_size
    pairs = ((F.layer_norm(reply.h, (D,)), agent.model.embed(reply.ids)) for reply in replies)
    W, mean_u, s, b = regression(pairs, strength)
    ones = torch.ones(D)
    zeros = torch.zeros(D)
    start = {
        "pre_ln.weight": ones,
        "pre_ln.bias": zeros,
        "proj1.weight": SMALL * torch.eye(D),
        "proj1.bias": -SMALL * mean_u,
        "proj2.weight": 2 * LARGE / SMALL * W,
        "proj2.bias": zeros,
        "post_ln.weight": s,
        "post_ln.bias": b,
    }
    assert agent.inner_link is not None, "training gives an agent that has none a new one"
    agent.inner_link.load_state_dict(start)


@torch.no_grad()
def set_outer_link(
    system: System, edge: Edge, replies: Iterable[ReadReply], strength: float = 0.01
) -> None:
    """Start an outer link at the ridge regression from x = R_in(h_t) to y.

    y is what its source says next, in the target's words: each token of the source that overlaps tokens of the target's
    tokenizer gives a pair. residual_proj is the map that `regression` finds; ln_target scales by s and shifts by b; the
    other branch of the link starts at zero.
    """
    source, target = (system.agents[role] for role in edge)
    link = system.outer_links[edge]
    assert isinstance(link, OuterLink), "training takes links in their readable form"
    pairs = (outer_pair(source, target, reply) for reply in replies)
    W, mean_x, s, b = regression(pairs, strength)
    start = {
        "residual_proj.weight": W,
        "residual_proj.bias": -W @ mean_x,
        "ln_target.weight": s,
        "ln_target.bias": b,
    }
    link.load_state_dict(start, strict=False)
    for parameter in link.proj2.parameters():
        parameter.zero_()


def outer_pair(source: Agent, target: Agent, reply: ReadReply) -> tuple[torch.Tensor, torch.Tensor]:
    """x (n, D) and y (n, E) of set_outer_link, for the n tokens of a reply that give a pair."""
    assert source.inner_link is not None, "training gives an agent that has none a new one"
    places, y = overlapping_tokens(source, target, reply.text)
    places = [i for i in places if i < len(reply.h)]  # it may have been cut
    x = source.inner_link(reply.h[places])
    return x, y[: len(places)].to(x.device)


def regression(
    pairs: Iterable[tuple[torch.Tensor, torch.Tensor]], strength: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Batches of x (n, D), y (n, E) -> W (E, D), mean x (D,), and the standard deviation s and mean b of y (E,).

    With C the covariance of x, W minimises

        mean over pairs of |(y - b) / s - W (x - mean x)|^2  +  strength tr(C) / D |W|^2

    Uses running sums in float64: the pairs of 256 replies of 500 tokens would themselves take 2 GB at width 2048.
    """
    n = 0
    sum_x = sum_y = sum_xx = sum_xy = sum_yy = torch.zeros(())
    for x, y in pairs:
        x = x.double()
        y = y.double()
        n += len(x)
        sum_x = sum_x + x.sum(0)
        sum_y = sum_y + y.sum(0)
        sum_xx = sum_xx + x.T @ x
        sum_xy = sum_xy + x.T @ y
        sum_yy = sum_yy + y.square().sum(0)
    mean_x = sum_x / n
    b = sum_y / n
    C = sum_xx / n - mean_x.outer(mean_x)  # (D, D)
    C_xy = sum_xy / n - mean_x.outer(b)  # (D, E)
    variance = (sum_yy / n - b.square()).clamp(min=0)  # rounding can make it negative
    s = variance.sqrt() + 1e-12
    # Never zero, not even if all pairs are the same
    penalty = strength * C.diagonal().mean() + 1e-12
    ridge = penalty * torch.eye(len(C), device=C.device)
    W = torch.linalg.solve(C + ridge, C_xy / s).T
    return W, mean_x, s, b


def overlapping_tokens(source: Agent, target: Agent, reply: str) -> tuple[list[int], torch.Tensor]:
    """Align the tokens of `reply` in two tokenizers by their characters.

    Returns the places of the n source tokens that overlap any target tokens, and for each the mean embedding of those,
    (n, E).
    """
    ours = source.tokenizer.fast.encode(reply, add_special_tokens=False)
    theirs = target.tokenizer.fast.encode(reply, add_special_tokens=False)
    ids = torch.tensor(theirs.ids, dtype=torch.long, device=target.device)
    embeddings = target.model.embed(ids)

    # Characters from start to end
    our_start, our_end = offsets(ours.offsets, target.device)  # (tokens of ours,)
    their_start, their_end = offsets(theirs.offsets, target.device)  # (tokens of theirs,)
    starts_before = our_start[:, None] < their_end
    ends_after = their_start < our_end[:, None]
    is_empty = our_start == our_end
    overlap = starts_before & ends_after & ~is_empty[:, None]  # (tokens of ours, of theirs)

    paired = overlap.any(1)
    weights = overlap[paired].to(embeddings)
    means = weights @ embeddings / weights.sum(1, keepdim=True)
    return paired.nonzero()[:, 0].tolist(), means


def offsets(
    pairs: Sequence[tuple[int, int]], device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Where tokens start and where they end in their text."""
    starts = torch.tensor([start for start, _ in pairs], device=device)
    ends = torch.tensor([end for _, end in pairs], device=device)
    return starts, ends
