"""What RecursiveLinks learn while the agents stay frozen (RecursiveMAS, arXiv 2604.25917, section 3).

    inner link    one agent alone, on texts of its role: R_in(h_t) should point where the embedding E[token t+1] points,
                      loss = 1 - cos(R_in(h_t), E[token t+1]) + w MSE
    outer links   all together: cross-entropy of the last agent's answer, back-propagated through every round

A loss is averaged over the tokens of each row, then over the rows. The loss of a batch is then the mean of the losses
of its equal parts, whether these are computed one after another or by several processes.

Letters: B rows, N tokens of the longest reply, T tokens, D width, m latents, V vocabulary.
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

IGNORED = -100  # stands where a row has no token
MAX_POSITIONS = 4096  # of a prompt and its reply, as in the released recipe
SCORES_AT_ONCE = 128  # states whose scores over the vocabulary are in memory together


# Teacher forcing

def teacher_forced(agent, prompts, replies, longest=MAX_POSITIONS):
    """B prompts (lists of pieces, see Agent.embed) and the texts that follow -> states h (B, N + 1, D), tokens (B, N).

    h[:, i] is the state that predicts reply token i; the last one follows the reply. The token that ends a reply is one
    of its N. Shorter replies stand at the right, with IGNORED on their left. A reply is cut where it and its prompt
    exceed `longest` positions, but keeps at least one token; prompts are never cut.
    """
    prompts = [agent.tokens(prompt) for prompt in prompts]
    room = [max(1, longest - sum(map(len, prompt))) for prompt in prompts]
    encode, ending = agent.tokenizer.encode, agent.tokenizer.ending
    ids = [torch.tensor(encode(reply + ending)[:n], device=agent.device) for reply, n in zip(replies, room)]
    N = max(map(len, ids))
    read = [[*prompt, reply] for prompt, reply in zip(prompts, ids)]  # no text is left in it to be tokenized again
    h, _, _ = agent.prefill_with_gradient(read, N + 1)
    return h, torch.stack([F.pad(reply, (N - len(reply), 0), value=IGNORED) for reply in ids])


def forced_turns(system, role, turns, longest=MAX_POSITIONS, date=DATE):
    """teacher_forced on B Turns of `role`, with the messages of other agents in the prompts as text."""
    prompts = []
    for turn in turns:
        inbox = {(source, role): [text] for source, text in turn.inbox.items()}  # as in recurse, for one question
        prompts += system.prompts(role, [turn.question], inbox, date)
    return teacher_forced(system.agents[role], prompts, [turn.reply for turn in turns], longest)


def embedding_scale(agent):
    """Standard deviation of the agent's token embeddings."""
    with torch.no_grad():
        return agent.model.embed(torch.arange(agent.model.config.vocab_size, device=agent.device)).std().item()


# Losses

def mean_of_rows(losses, ids):
    """Losses (n,) of the n tokens in ids (B, N) that are not IGNORED: the mean over rows of each row's mean."""
    kept = ids != IGNORED
    return (losses / kept.sum(1, keepdim=True).expand(kept.shape)[kept]).sum() / len(ids)


def next_token_loss(agent, h, ids):
    """Cross-entropy of tokens (B, N) under the states h (B, N, D) that predict them; the head is frozen."""
    kept = ids != IGNORED
    return mean_of_rows(TokenLoss.apply(h[kept], ids[kept], agent.model.lm_head.weight), ids)


class TokenLoss(torch.autograd.Function):
    """Cross-entropies (n,) of states (n, D) against tokens (n,) under a frozen head (V, D).

    The n V scores would be the largest tensor of a training step. Only SCORES_AT_ONCE rows of them exist at a time: the
    forward pass also computes their gradient (softmax minus one-hot, times the head), and keeps its n D numbers only.
    """

    @staticmethod
    def forward(ctx, h, ids, head):
        losses, gradients = [], []
        for part, wanted in zip(h.split(SCORES_AT_ONCE), ids.split(SCORES_AT_ONCE)):
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
    """The loss of one agent's inner link on a batch of its Turns; `mse` is the weight w of the squared error."""

    def __init__(self, system, role, mse=0.0, longest=MAX_POSITIONS, date=DATE):
        super().__init__()
        self.link = system.agents[role].inner_link.requires_grad_(True)
        self.system, self.role, self.mse, self.longest, self.date = system, role, mse, longest, date

    def forward(self, turns):
        """B Turns -> their loss, a scalar."""
        with torch.no_grad():
            h, ids = forced_turns(self.system, self.role, turns, self.longest, self.date)
            kept = ids != IGNORED
            wanted = widen(self.system.agents[self.role].model.embed(ids[kept]))  # (n, D)
        found = widen(self.link(h[:, :-1][kept]))  # (n, D)
        losses = 1 - F.cosine_similarity(found, wanted, dim=-1) + self.mse * (found - wanted).square().mean(-1)
        return mean_of_rows(losses, ids)


class OuterLoss(nn.Module):
    """The loss of all outer links on a batch of Lessons, which need only the last agent's text unless `teacher` is set.

    settings       recurse.Settings with latent_steps filled in; rounds, latent_steps and date are used
    teacher        agents do not think: they send the states at the first latent_steps tokens of their lesson's text, as
                   in the released training. What they send depends on that text, in later rounds also on the answer.
    other_rounds   weight of the last agent's loss in the other rounds, averaged over them
    """

    def __init__(self, system, settings, teacher=False, other_rounds=0.0, longest=MAX_POSITIONS):
        super().__init__()
        self.links = nn.ModuleList(system.outer_links.values()).requires_grad_(True)
        self.system, self.settings, self.longest = system, settings, longest
        self.teacher, self.other_rounds = teacher, other_rounds

    def forward(self, lessons):
        """B Lessons -> their loss, a scalar."""
        last, losses = self.system.style.order[-1], []

        def think(r, role, prompts):
            supervised = role == last and self.other_rounds
            if self.teacher or supervised:
                h, ids = self.forced(lessons, r, role, prompts)
            if supervised:
                losses.append(next_token_loss(self.system.agents[last], h[:, :-1], ids))
            if self.teacher:
                lengths = (ids != IGNORED).sum(1).tolist()
                return [row[-n:][:self.settings.latent_steps] for row, n in zip(h, lengths)]
            return self.system.agents[role].think(prompts, self.settings.latent_steps)

        *_, final = recurse(self.system, [lesson.question for lesson in lessons], self.settings, think=think)
        h, ids = self.forced(lessons, self.settings.rounds, last, final.prompts)
        loss = next_token_loss(self.system.agents[last], h[:, :-1], ids)
        return loss + self.other_rounds * sum(losses) / len(losses) if losses else loss

    def forced(self, lessons, r, role, prompts):
        """teacher_forced on what the lessons have `role` say in round r."""
        replies = [lesson.text(role, r) for lesson in lessons]
        return teacher_forced(self.system.agents[role], prompts, replies, self.longest)


# Starting points

def start_gain(link, agent):
    """Set the last gain of a new link to the scale of the token embeddings of `agent`, which reads its output."""
    nn.init.constant_((link.post_ln if isinstance(link, InnerLink) else link.ln_target).weight, embedding_scale(agent))


@torch.no_grad()
def ridge_start(system, edge, turns, strength=0.01, longest=MAX_POSITIONS, date=DATE):
    """Start an outer link at a ridge regression that expresses what its source says next in the target's embeddings.

    Each token t+1 of the source's `turns` that has a counterpart in the target's tokenizer gives a pair: x = R_in(h_t)
    and y, the target's embedding of the same text. With s and b the standard deviation and mean of y, and C the
    covariance of x, residual_proj is the W that minimises

        mean over pairs of |(y - b) / s - W (x - mean x)|^2  +  strength tr(C) / D |W|^2

    ln_target scales by s and shifts by b; the other branch of the link starts at zero.
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
    """x (n, D) and y (n, D of the target) as in ridge_start, for the n tokens of a turn that have a counterpart."""
    source, target = (system.agents[role] for role in edge)
    h, _ = forced_turns(system, edge[0], [turn], longest, date)
    tokens, y = overlapping_tokens(source, target, turn.reply)
    tokens = [i for i in tokens if i < h.shape[1] - 1]  # forced_turns may have cut the reply
    return source.inner_link(h[0, tokens]), y[:len(tokens)].to(h.device)


def overlapping_tokens(source, target, reply):
    """Align the tokens of `reply` in two tokenizers by their characters.

    Returns the numbers of the n source tokens that overlap any target tokens, and for each the mean embedding of those,
    (n, D of the target).
    """
    ours, theirs = (agent.tokenizer.fast.encode(reply, add_special_tokens=False) for agent in (source, target))
    embeddings = target.model.embed(torch.tensor(theirs.ids, dtype=torch.long, device=target.device))
    numbers, means, first = [], [], 0
    for i, (start, end) in enumerate(ours.offsets):  # both lists are in the order of the text
        while first < len(theirs.offsets) and theirs.offsets[first][1] <= start:
            first += 1
        last = first
        while last < len(theirs.offsets) and theirs.offsets[last][0] < end:
            last += 1
        if last > first and end > start:
            numbers.append(i)
            means.append(embeddings[first:last].mean(0))
    return numbers, torch.stack(means) if means else embeddings[:0]


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


# Less memory for more time

def compute_again(system):
    """Make links and blocks keep only their inputs and recompute the rest for the gradient (arXiv 1604.06174)."""
    links = [*system.outer_links.values(), *(agent.inner_link for agent in system.agents.values())]
    for link in links:
        link.forward = partial(checkpoint, link.forward, use_reentrant=False, preserve_rng_state=False)
    for agent in system.agents.values():
        for block in agent.model.layers:
            block.forward = partial(block_again, block.forward)


def block_again(forward, x, positions, rope, mask, cache):
    """A block's forward under checkpoint, which may run it twice: each time from the cache's content before it."""
    if not x.requires_grad:
        return forward(x, positions, rope, mask, cache)
    before = copy.copy(cache)  # shallow is enough: in training a cache replaces its tensors and never writes into them

    def run():
        after = copy.copy(before)
        return forward(x, positions, rope, mask, after), after

    y, after = checkpoint(run, use_reentrant=False, preserve_rng_state=False)
    vars(cache).update(vars(after))
    return y
