"""What RecursiveLinks learn while the agents stay frozen (RecursiveMAS, section 3).

    inner link    one agent alone, on texts of its role: R_in(h_t) shall point where the embedding E[token t+1] does,
                      loss = 1 - cos(R_in(h_t), E[token t+1]) + w MSE
    outer links   all together: cross-entropy of the last agent's answer, back through every round of `recurse`

A loss is the mean over a batch's rows of the mean over a row's tokens, so that batches add up, whether they are the parts of
a larger one or the shares of several processes.

Letters: B rows, N reply tokens of the longest, T tokens, D width, m latents, V vocabulary.
"""

import copy
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from .link import InnerLink
from .llama import widen
from .recurse import recurse
from .tokenizer import DATE

IGNORED = -100  # in place of a token where a row has none
LONGEST = 4096  # positions of a prompt and its reply, as in the released recipe
AT_ONCE = 128  # states whose scores over the vocabulary are in memory together


# Teacher forcing

def teacher_forced(agent, prompts, replies, longest=LONGEST):
    """Prompts and the texts that follow them -> states h (B, N + 1, D) from before the first reply token to the last one, and
    the tokens (B, N).

    What ends a reply counts as one of its N; shorter replies stand at the right, with IGNORED on their left. A reply is cut
    where it and its prompt pass `longest` positions, down to one token.
    """
    prompts = [agent.tokens(prompt) for prompt in prompts]
    room = [max(1, longest - sum(map(len, prompt))) for prompt in prompts]
    encode, ending = agent.tokenizer.encode, agent.tokenizer.ending
    ids = [torch.tensor(encode(reply + ending)[:n], device=agent.device) for reply, n in zip(replies, room)]
    N = max(map(len, ids))
    h, _, _ = agent.prefill_with_gradient([[*prompt, reply] for prompt, reply in zip(prompts, ids)], N + 1)
    return h, torch.stack([F.pad(reply, (N - len(reply), 0), value=IGNORED) for reply in ids])


def forced_turns(system, role, turns, longest=LONGEST, date=DATE):
    """teacher_forced for turns of `role`, what it had heard put into its prompt as text."""
    prompts = []
    for turn in turns:
        heard = {(source, role): [text] for source, text in turn.inbox.items()}  # as recurse keeps it: a text for each question
        prompts += system.prompts(role, [turn.question], heard, date)
    return teacher_forced(system.agents[role], prompts, [turn.reply for turn in turns], longest)


def embedding_scale(agent):
    """Standard deviation of the agent's token embeddings."""
    with torch.no_grad():
        return agent.model.embed(torch.arange(agent.model.config.vocab_size, device=agent.device)).std().item()


# Losses

def mean_of_rows(losses, ids):
    """Losses (n,) of the tokens in ids (B, N) that are not IGNORED: the mean over rows of the means over tokens."""
    kept = ids != IGNORED
    return (losses / kept.sum(1, keepdim=True).expand(kept.shape)[kept]).sum() / len(ids)


def next_token_loss(agent, h, ids):
    """Cross-entropy of the tokens (B, N) under the states h (B, N, D) before them, for a frozen head."""
    kept = ids != IGNORED
    return mean_of_rows(TokenLoss.apply(h[kept], ids[kept], agent.model.lm_head.weight), ids)


class TokenLoss(torch.autograd.Function):
    """Cross-entropies (n,) of states (n, D) against tokens (n,) under a frozen head (V, D).

    Scores are n V numbers, more than all else of a step. Here a few rows of them live at a time: the gradient, softmax minus
    one-hot times the head, is taken at once, and n D numbers are kept.
    """

    @staticmethod
    def forward(ctx, h, ids, head):
        losses, gradients = [], []
        for part, wanted in zip(h.split(AT_ONCE), ids.split(AT_ONCE)):
            log_p = widen(part @ head.T).log_softmax(-1)
            losses.append(-log_p.gather(1, wanted[:, None])[:, 0])
            if ctx.needs_input_grad[0]:
                p = log_p.exp_()
                p[torch.arange(len(part), device=p.device), wanted] -= 1
                gradients.append(p.to(head.dtype) @ head)
        ctx.save_for_backward(*gradients)
        return torch.cat(losses)

    @staticmethod
    def backward(ctx, gradient):
        return (gradient[:, None] * torch.cat(ctx.saved_tensors)).to(ctx.saved_tensors[0].dtype), None, None


class InnerLoss(nn.Module):
    """The loss of one agent's inner link on a batch of turns; mse is the weight w."""

    def __init__(self, system, role, mse=0.0, longest=LONGEST, date=DATE):
        super().__init__()
        self.link = system.agents[role].inner_link.requires_grad_(True)
        self.system, self.role, self.mse, self.longest, self.date = system, role, mse, longest, date

    def forward(self, turns):
        with torch.no_grad():
            h, ids = forced_turns(self.system, self.role, turns, self.longest, self.date)
            kept = ids != IGNORED
            wanted = widen(self.system.agents[self.role].model.embed(ids[kept]))
        found = widen(self.link(h[:, :-1][kept]))
        losses = 1 - F.cosine_similarity(found, wanted, dim=-1) + self.mse * (found - wanted).square().mean(-1)
        return mean_of_rows(losses, ids)


class OuterLoss(nn.Module):
    """The loss of all outer links on a batch of lessons, of which only the last agent's texts are needed unless `teacher`.

    teacher        agents send the states at the tokens of their lesson's text, the first so many, instead of thinking for
                   themselves; the release was trained so. What they send then knows the text, the later rounds' the answer.
    other_rounds   weight of the mean of the other rounds' losses
    """

    def __init__(self, system, settings, teacher=False, other_rounds=0.0, longest=LONGEST):
        super().__init__()
        self.links = nn.ModuleList(system.outer_links.values()).requires_grad_(True)
        self.system, self.settings, self.teacher, self.other_rounds, self.longest = system, settings, teacher, other_rounds, longest

    def forward(self, lessons):
        last, losses = self.system.style.order[-1], []

        def think(r, role, prompts):
            supervised = role == last and self.other_rounds
            if self.teacher or supervised:
                h, ids = self.forced(lessons, r, role, prompts)
            if supervised:
                losses.append(next_token_loss(self.system.agents[last], h[:, :-1], ids))
            if self.teacher:
                return [row[-n:][:self.settings.latent_steps] for row, n in zip(h, (ids != IGNORED).sum(1).tolist())]
            return self.system.agents[role].think(prompts, self.settings.latent_steps)

        prompts = recurse(self.system, [lesson.question for lesson in lessons], self.settings, think=think)
        h, ids = self.forced(lessons, self.settings.rounds, last, prompts)
        loss = next_token_loss(self.system.agents[last], h[:, :-1], ids)
        return loss + self.other_rounds * sum(losses) / len(losses) if losses else loss

    def forced(self, lessons, r, role, prompts):
        return teacher_forced(self.system.agents[role], prompts, [lesson.text(role, r) for lesson in lessons], self.longest)


# Starting points

def start_gain(link, agent):
    """Let the last gain of a new link, whose results `agent` reads, start at the scale of that agent's embeddings."""
    nn.init.constant_((link.post_ln if isinstance(link, InnerLink) else link.ln_target).weight, embedding_scale(agent))


@torch.no_grad()
def ridge_start(system, edge, turns, strength=0.01, longest=LONGEST, date=DATE):
    """Start an outer link at a ridge regression: it then says in the target's embeddings what its source says next.

    Each token t+1 of the source's `turns` that has a counterpart in the target's tokenizer gives a pair: x = R_in(h_t) and
    y, the target's embedding of the same text. With s and b the standard deviation and mean of y, residual_proj is the W
    that minimises the mean over pairs of |(y - b) / s - W (x - mean x)|^2, plus strength tr(C) / D |W|^2, where C is the
    covariance of x. ln_target scales by s and shifts by b; the other branch of the link starts at zero.
    """
    link = system.outer_links[edge]
    pairs = (token_pairs(system, edge, turn, longest, date) for turn in turns)
    mean_x, b, C, C_xy, variance_y = moments(pairs)
    s = variance_y.sqrt() + 1e-12
    penalty = strength * C.diagonal().mean() + 1e-12  # never zero, not even if all pairs are the same
    W = torch.linalg.solve(C + penalty * torch.eye(len(C), device=C.device), C_xy / s).T
    for parameter, value in ((link.residual_proj.weight, W), (link.residual_proj.bias, -W @ mean_x),
                             (link.ln_target.weight, s), (link.ln_target.bias, b)):
        parameter.copy_(value)
    nn.init.zeros_(link.proj2.weight)
    nn.init.zeros_(link.proj2.bias)


def token_pairs(system, edge, turn, longest, date):
    """x (n, D) = R_in(h_t) and y (n, D of the target), for the n tokens of a turn that are kept and have a counterpart."""
    source, target = (system.agents[role] for role in edge)
    h, _ = forced_turns(system, edge[0], [turn], longest, date)
    numbers, y = same_text(source, target, turn.reply)
    numbers = [i for i in numbers if i < h.shape[1] - 1]  # forced_turns may have cut the reply
    return source.inner_link(h[0, numbers]), y[:len(numbers)].to(h.device)


def moments(pairs):
    """Batches of x (n, D) and y (n, E) -> means (D,), (E,), covariances of x (D, D), of x and y (D, E), variances of y (E,).

    From running sums in float64: the pairs of 256 replies of 500 tokens would themselves take 2 GB at width 2048.
    """
    n = sum_x = sum_y = sum_xx = sum_xy = sum_yy = 0
    for x, y in pairs:
        x, y, n = x.double(), y.double(), n + len(x)
        sum_x, sum_y = sum_x + x.sum(0), sum_y + y.sum(0)
        sum_xx, sum_xy, sum_yy = sum_xx + x.T @ x, sum_xy + x.T @ y, sum_yy + y.square().sum(0)
    mean_x, mean_y = sum_x / n, sum_y / n
    variance_y = (sum_yy / n - mean_y.square()).clamp(min=0)  # rounding can leave less than nothing
    return mean_x, mean_y, sum_xx / n - mean_x.outer(mean_x), sum_xy / n - mean_x.outer(mean_y), variance_y


def same_text(source, target, reply):
    """Which tokens of `reply` in the source's tokenizer have a counterpart in the target's, and for each of them (n) the mean
    embedding (n, D) of the tokens there that overlap it."""
    ours, theirs = (agent.tokenizer.fast.encode(reply, add_special_tokens=False) for agent in (source, target))
    embeddings = target.model.embed(torch.tensor(theirs.ids, dtype=torch.long, device=target.device))
    numbers, means, first = [], [], 0
    for i, (a, b) in enumerate(ours.offsets):  # both lists are in the order of the text
        while first < len(theirs.offsets) and theirs.offsets[first][1] <= a:
            first += 1
        last = first
        while last < len(theirs.offsets) and theirs.offsets[last][0] < b:
            last += 1
        if last > first and b > a:
            numbers.append(i)
            means.append(embeddings[first:last].mean(0))
    return numbers, torch.stack(means) if means else embeddings[:0]


# What saves memory

def compute_again(system):
    """Let blocks and links keep nothing but their input, and compute themselves again for their gradient (arXiv 1604.06174)."""
    links = [*system.outer_links.values(), *(agent.inner_link for agent in system.agents.values())]
    for link in links:
        link.forward = partial(checkpoint, link.forward, use_reentrant=False, preserve_rng_state=False)
    for agent in system.agents.values():
        for block in agent.model.layers:
            block.forward = partial(block_again, block.forward)


def block_again(forward, x, positions, rope, mask, cache):
    if not x.requires_grad:
        return forward(x, positions, rope, mask, cache)
    before = copy.copy(cache)  # enough, since in training a cache takes new attributes and never writes into the old ones

    def run():
        after = copy.copy(before)  # each time it begins with what the cache held then
        return forward(x, positions, rope, mask, after), after

    y, after = checkpoint(run, use_reentrant=False, preserve_rng_state=False)
    vars(cache).update(vars(after))
    return y
