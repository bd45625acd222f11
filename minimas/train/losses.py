"""What RecursiveLinks learn while the agents stay frozen (RecursiveMAS, arXiv 2604.25917, section 3).

    inner link    one agent alone, on texts of its role: R_in(h_t) should point where the embedding E[token t+1] points,
                      loss = 1 - cos(R_in(h_t), E[token t+1]) + w MSE
    outer links   all together: cross-entropy of the last agent's answer, back-propagated through every round

A loss is averaged over the tokens of each row, then over the rows. The loss of a batch is then the mean of the losses
of its equal parts, whether these are computed one after another or by several processes.

Letters: B rows, N tokens of the longest reply, T tokens, D width, n tokens of all rows, V vocabulary.
"""

import copy
from contextlib import suppress
from functools import partial
from itertools import dropwhile

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from ..agent import left_pad
from ..common import upcast
from ..recurse import recurse
from ..tokenizer import DATE

IGNORED = -100  # stands where a row has no token
MAX_POSITIONS = 4096  # of a prompt and its reply, as in the released recipe
SCORES_AT_ONCE = 128  # states whose scores over the vocabulary are in memory together


# Teacher forcing


def prefill_with_gradient(agent, prompts, room=0, last=1):
    """Read B prompts as Agent.prefill does -> their last `last` states (B, last, D), positions (B, T), a cache that grows.

    The text before a prompt's first latents has no gradient and is read without a graph. A cache that is written in place
    could not be differentiated: this one grows by concatenation, and needs no `room`.
    """
    prompts = [agent.tokens(pieces) for pieces in prompts]
    x, positions = left_pad([agent.embed_pieces(pieces) for pieces in prompts])
    cache, T = agent.model.make_cache(len(x)), x.shape[1]
    rest = max(
        sum(map(len, dropwhile(lambda piece: not piece.is_floating_point(), pieces)))
        for pieces in prompts
    )
    start = T - rest if x.requires_grad and rest > last else 0
    if start:
        with torch.no_grad():
            agent.model(x[:, :start], positions[:, :start], cache, last=1)
    return agent.model(x[:, start:], positions[:, start:], cache, last=last), positions, cache


def reply_ending(tokenizer):
    """What ends an assistant's reply: the first word that the template writes after it, else the eos token."""
    text = mark = "[reply]"
    with suppress(Exception):
        text = tokenizer.render(
            [{"role": "user", "content": "?"}, {"role": "assistant", "content": mark}], DATE, False
        )
    return next(iter(text.partition(mark)[2].split()), tokenizer.named.get("eos_token", ""))


def teacher_forced(agent, prompts, replies, longest=MAX_POSITIONS):
    """B prompts (lists of pieces, see Agent.embed) and the texts that follow -> states h (B, N + 1, D), tokens (B, N).

    h[:, i] is the state that predicts reply token i; the last one follows the reply. The token that ends a reply is one
    of its N. Shorter replies stand at the right, with IGNORED on their left. A reply is cut where it and its prompt
    exceed `longest` positions, but keeps at least one token; prompts are never cut.
    """
    prompts = [agent.tokens(prompt) for prompt in prompts]
    room = [max(1, longest - sum(map(len, prompt))) for prompt in prompts]
    encode, ending = agent.tokenizer.encode, reply_ending(agent.tokenizer)
    ids = [
        torch.tensor(encode(reply + ending)[:n], device=agent.device)
        for reply, n in zip(replies, room)
    ]
    N = max(map(len, ids))
    read = [
        [*prompt, reply] for prompt, reply in zip(prompts, ids)
    ]  # no text is left in it to be tokenized again
    h, _, _ = prefill_with_gradient(agent, read, last=N + 1)
    return h, torch.stack([F.pad(reply, (N - len(reply), 0), value=IGNORED) for reply in ids])


def forced_turns(system, role, turns, longest=MAX_POSITIONS, date=DATE):
    """teacher_forced on B TargetTurns of `role`, with the messages of other agents in the prompts as text."""
    inboxes = [
        {(source, role): [text] for source, text in turn.inbox.items()} for turn in turns
    ]  # as in recurse
    prompts = [
        system.prompts(role, [turn.question], inbox, date)[0] for turn, inbox in zip(turns, inboxes)
    ]
    return teacher_forced(system.agents[role], prompts, [turn.reply for turn in turns], longest)


# Losses


def mean_of_rows(losses, ids):
    """Losses (n,) of the n tokens in ids (B, N) that are not IGNORED: the mean over rows of each row's mean."""
    kept = ids != IGNORED
    return (losses / kept.sum(1, keepdim=True).expand(kept.shape)[kept]).sum() / len(ids)


def next_token_loss(agent, h, ids):
    """Cross-entropy of tokens (B, N) under the states h (B, N + 1, D) of teacher_forced; the head is frozen."""
    kept = ids != IGNORED
    return mean_of_rows(
        TokenLoss.apply(h[:, :-1][kept], ids[kept], agent.model.lm_head.weight), ids
    )


class TokenLoss(torch.autograd.Function):
    """Cross-entropies (n,) of states (n, D) against tokens (n,) under a frozen head (V, D).

    The n V scores would be the largest tensor of a training step. Only SCORES_AT_ONCE rows of them exist at a time: the
    forward pass also computes their gradient (softmax minus one-hot, times the head), and keeps its n D numbers only.
    """

    @staticmethod
    def forward(ctx, h, ids, head):
        losses, gradients = [], []
        for part, target in zip(h.split(SCORES_AT_ONCE), ids.split(SCORES_AT_ONCE)):
            log_p = upcast(part @ head.T).log_softmax(-1)
            losses.append(-log_p.gather(1, target[:, None])[:, 0])
            if ctx.needs_input_grad[0]:
                p = log_p.exp_()
                p[torch.arange(len(part), device=p.device), target] -= 1
                gradients.append(p.to(head.dtype) @ head)
        ctx.save_for_backward(*gradients)
        return torch.cat(losses)

    @staticmethod
    def backward(ctx, gradient):
        return (
            (gradient[:, None] * torch.cat(ctx.saved_tensors)).to(ctx.saved_tensors[0].dtype),
            None,
            None,
        )


class InnerLoss(torch.nn.Module):
    """The loss of one agent's inner link on a batch of its TargetTurns; `mse` is the weight w of the squared error."""

    def __init__(self, system, role, mse=0.0, longest=MAX_POSITIONS, date=DATE):
        super().__init__()
        self.link = system.agents[role].inner_link.requires_grad_(True)
        self.system, self.role, self.mse, self.longest, self.date = system, role, mse, longest, date

    def forward(self, turns):
        """B TargetTurns -> their loss, a scalar."""
        with torch.no_grad():
            h, ids = forced_turns(self.system, self.role, turns, self.longest, self.date)
            kept = ids != IGNORED
            target = upcast(self.system.agents[self.role].model.embed(ids[kept]))  # (n, D)
        predicted = upcast(self.link(h[:, :-1][kept]))  # (n, D)
        losses = (
            1
            - F.cosine_similarity(predicted, target, dim=-1)
            + self.mse * (predicted - target).square().mean(-1)
        )
        return mean_of_rows(losses, ids)


class OuterLoss(torch.nn.Module):
    """The loss of all outer links on a batch of TrainExamples. Unless `teacher` is set, only the last agent's texts count.

    settings       completed Settings, of which rounds, latent_steps and date are used
    teacher        agents do not think: they send the states at the first latent_steps tokens of their text in the example,
                   as in the released training. What they send depends on that text, in later rounds also on the answer.
    other_rounds   weight of the last agent's loss in the other rounds, averaged over them
    """

    def __init__(self, system, settings, teacher=False, other_rounds=0.0, longest=MAX_POSITIONS):
        super().__init__()
        self.links = torch.nn.ModuleList(system.outer_links.values()).requires_grad_(True)
        self.system, self.settings, self.longest = system, settings, longest
        self.teacher, self.other_rounds = teacher, other_rounds

    def forward(self, examples):
        """B TrainExamples -> their loss, a scalar."""
        agents, last, losses = self.system.agents, self.system.style.order[-1], []

        def think(r, role, prompts):
            supervised = role == last and self.other_rounds
            if self.teacher or supervised:
                h, ids = self.forced(examples, r, role, prompts)
            if supervised:
                losses.append(next_token_loss(agents[last], h, ids))
            if self.teacher:
                lengths = (ids != IGNORED).sum(1).tolist()
                return [row[-n:][: self.settings.latent_steps] for row, n in zip(h, lengths)]
            prefill = partial(prefill_with_gradient, agents[role])
            return agents[role].think(prompts, self.settings.latent_steps, prefill=prefill)

        *_, final = recurse(
            self.system, [example.question for example in examples], self.settings, think=think
        )
        loss = next_token_loss(
            agents[last], *self.forced(examples, self.settings.rounds, last, final.prompts)
        )
        return loss + self.other_rounds * sum(losses) / len(losses) if losses else loss

    def forced(self, examples, r, role, prompts):
        """teacher_forced on the texts of `role` for round r."""
        replies = [example.text(role, r) for example in examples]
        return teacher_forced(self.system.agents[role], prompts, replies, self.longest)


# Activation checkpointing


def checkpoint_activations(system):
    """Make links and blocks keep only their inputs and recompute the rest for the gradient (arXiv 1604.06174)."""
    for link in [
        *system.outer_links.values(),
        *(agent.inner_link for agent in system.agents.values()),
    ]:
        link.forward = partial(
            checkpoint, link.forward, use_reentrant=False, preserve_rng_state=False
        )
    for agent in system.agents.values():
        for block in agent.model.layers:
            block.forward = partial(checkpointed_block, block.forward)


def checkpointed_block(forward, x, positions, rope, mask, cache):
    """A block's forward under checkpoint, which may run it twice: each time from the cache's content before it."""
    if not x.requires_grad:
        return forward(x, positions, rope, mask, cache)
    before = copy.copy(
        cache
    )  # shallow is enough: in training a cache replaces its tensors and never writes into them

    def run():
        after = copy.copy(before)
        return forward(x, positions, rope, mask, after), after

    y, after = checkpoint(run, use_reentrant=False, preserve_rng_state=False)
    vars(cache).update(vars(after))
    return y
