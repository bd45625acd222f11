"""What RecursiveLinks learn while the agents stay frozen (RecursiveMAS, section 3).

    inner link    one agent alone, on texts of its role: R_in(h_t) shall point where the embedding E[token t+1] does,
                      loss = 1 - cos(R_in(h_t), E[token t+1]) + w MSE
    outer links   all together: cross-entropy of the last agent's answer, back through every round of `recurse`

A loss is the mean over a batch's rows of the mean over a row's tokens, so that batches add up, whether they are the parts of
a larger one or the shares of several processes.

Letters: B rows, N reply tokens of the longest, T tokens, D width, m latents, V vocabulary.
"""

import copy

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from .llama import widen
from .recurse import recurse

IGNORED = -100  # in place of a token where a row has none
LONGEST = 4096  # positions of a prompt and its reply, as in the released recipe
AT_ONCE = 512  # states whose scores over the vocabulary are in memory together


# Teacher forcing

def teacher_forced(agent, prompts, replies, longest=LONGEST):
    """Prompts and the texts that follow them -> states h (B, N + 1, D) from before the first reply token to the last one, and
    the tokens (B, N).

    What ends a reply counts as one of its N; shorter replies stand at the right, with IGNORED on their left. A reply is cut
    where it and its prompt pass `longest` positions.
    """
    prompts = [agent.tokens(prompt) for prompt in prompts]
    room = [max(1, longest - sum(map(len, prompt))) for prompt in prompts]
    ids = [torch.tensor(agent.tokenizer.encode(reply + agent.tokenizer.ending)[:n], device=agent.device) for reply, n in zip(replies, room)]
    N = max(map(len, ids))
    h, _, _ = agent.read([[*prompt, reply] for prompt, reply in zip(prompts, ids)], N + 1)
    return h, torch.stack([F.pad(reply, (N - len(reply), 0), value=IGNORED) for reply in ids])


def forced_turns(system, role, turns, longest=LONGEST):
    """teacher_forced for turns of `role`, what it had heard put into its prompt as text."""
    prompts = []
    for turn in turns:
        inbox = {(source, role): [text] for source, text in turn.inbox.items()}
        prompts += system.prompts(role, [turn.question], inbox)
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

    def __init__(self, system, role, mse=0.0, longest=LONGEST):
        super().__init__()
        self.link = system.agents[role].inner_link.requires_grad_(True)
        self.system, self.role, self.mse, self.longest = system, role, mse, longest

    def forward(self, turns):
        with torch.no_grad():
            h, ids = forced_turns(self.system, self.role, turns, longest=self.longest)
            kept = ids != IGNORED
            wanted = widen(self.system.agents[self.role].model.embed(ids[kept]))
        found = widen(self.link(h[:, :-1][kept]))
        losses = 1 - F.cosine_similarity(found, wanted, dim=-1) + self.mse * (found - wanted).square().mean(-1)
        return mean_of_rows(losses, ids)


class OuterLoss(nn.Module):
    """The loss of all outer links on a batch of lessons, of which only the last agent's texts are needed unless `teacher`.

    teacher    agents send the states at the tokens of their lesson's text, the first so many, instead of thinking for
               themselves; the release was trained so. What they send then knows the text, the later rounds' the answer.
    others     weight of the mean of the other rounds' losses
    """

    def __init__(self, system, settings, teacher=False, others=0.0, longest=LONGEST):
        super().__init__()
        self.links = nn.ModuleList(system.outer_links.values()).requires_grad_(True)
        self.system, self.settings, self.teacher, self.others, self.longest = system, settings, teacher, others, longest

    def forward(self, lessons, settings=None):
        settings, last, losses = settings or self.settings, self.system.style.order[-1], []

        def forced(r, role, prompts):
            return teacher_forced(self.system.agents[role], prompts, [lesson.text(role, r) for lesson in lessons], longest=self.longest)

        def answered(h, ids):
            losses.append(next_token_loss(self.system.agents[last], h[:, :-1], ids))

        def think(r, role, prompts):
            supervised = role == last and self.others
            if self.teacher or supervised:
                h, ids = forced(r, role, prompts)
            if supervised:
                answered(h, ids)
            if self.teacher:
                return [row[-n:][:settings.latent_steps] for row, n in zip(h, (ids != IGNORED).sum(1).tolist())]
            return self.system.agents[role].think(prompts, settings.latent_steps)

        prompts = recurse(self.system, [lesson.question for lesson in lessons], settings, think=think)
        answered(*forced(settings.rounds, last, prompts))
        *before, final = losses
        return final + self.others * sum(before) / len(before) if before else final


# Starting points, and what saves memory

def new_link(link, agent):
    """Reset a link whose results `agent` reads: its last gain starts at the scale of that agent's embeddings."""
    for module in link.children():
        module.reset_parameters()
    norm = link.post_ln if hasattr(link, "post_ln") else link.ln_target
    nn.init.constant_(norm.weight, embedding_scale(agent))


@torch.no_grad()
def ridge_start(system, edge, turns, strength=0.01):
    """Start the outer link of an edge from ridge regression: it says what its source says in the target's embeddings.

    turns of the source give pairs of x_t = R_in(h_t) and y_t, the target's embedding of the text of token t+1. With the
    spread s and mean b of y, residual_proj = argmin_W |(y - b) / s - W (x - mean x)|^2 + strength tr(X'X)/D |W|^2, the last
    norm scales by s and shifts by b, and the other branch starts at zero.
    """
    source, target, link = *(system.agents[role] for role in edge), system.outer_links[edge]
    D, rows, products = source.model.config.hidden_size, 0, 0
    for turn in turns:
        h, _ = forced_turns(system, edge[0], [turn])
        y = same_text(source, target, turn.reply)[:h.shape[1] - 1].to(h.device)
        both = torch.cat([source.inner_link(h[0, :len(y)]), y], 1).double()
        rows, products = rows + len(y), products + torch.cat([both, both[:, :1] * 0 + 1], 1).T @ both  # sums in the last row
    means = products[-1] / rows
    covariance = products[:-1] / rows - means[:, None] * means
    middle, b, s = means[:D], means[D:], covariance.diagonal()[D:].sqrt() + 1e-12
    squares = covariance[:D, :D]
    W = torch.linalg.solve(squares + strength * squares.diagonal().mean() * torch.eye(D, device=squares.device), covariance[:D, D:] / s).T
    for parameter, value in ((link.residual_proj.weight, W), (link.residual_proj.bias, -W @ middle), (link.ln_target.weight, s),
                             (link.ln_target.bias, b), (link.proj2.weight, 0 * link.proj2.weight), (link.proj2.bias, 0 * link.proj2.bias)):
        parameter.copy_(value)


def same_text(source, target, reply):
    """For each token of `reply` in the source's tokenizer the target's mean embedding (n, D) of the tokens that overlap it."""
    ours, theirs = (agent.tokenizer.fast.encode(reply, add_special_tokens=False) for agent in (source, target))
    embeddings = target.model.embed(torch.tensor(theirs.ids, device=target.device))
    overlap = [[a < d and c < b for c, d in theirs.offsets] for a, b in ours.offsets]
    weight = torch.tensor(overlap, dtype=embeddings.dtype, device=target.device)
    return weight @ embeddings / weight.sum(1, keepdim=True)


class Checkpointed(nn.Module):
    """A block that keeps nothing but its input, and computes itself again for its gradient (arXiv 1604.06174)."""

    def __init__(self, block):
        super().__init__()
        self.block = block

    def forward(self, x, positions, rope, mask, cache):
        if not x.requires_grad:
            return self.block(x, positions, rope, mask, cache)
        before = copy.copy(cache)

        def run():
            after = copy.copy(before)  # each time it begins with what the cache held then
            return self.block(x, positions, rope, mask, after), after

        y, after = checkpoint(run, use_reentrant=False, preserve_rng_state=False)
        vars(cache).update(vars(after))
        return y


def checkpoint_blocks(system):
    """Let the agents' blocks compute themselves again instead of remembering."""
    for agent in system.agents.values():
        agent.model.layers = nn.ModuleList(map(Checkpointed, agent.model.layers))
