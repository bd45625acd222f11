"""What RecursiveLinks learn while the agents stay frozen (RecursiveMAS, arXiv 2604.25917, section 3).

    inner link    one agent alone, on texts of its role: R_in(h_t) should point where the embedding E[token t+1] points,
                      loss = 1 - cos(R_in(h_t), E[token t+1]) + w MSE
    outer links   all together: cross-entropy of the last agent's answer, back-propagated through every round

A loss is averaged over the tokens of each row, then over the rows. The loss of a batch is then the mean of the losses
of its equal parts, whether these are computed one after another or by several processes.

Notation: B rows, N tokens of the longest reply, T tokens, D width, n tokens of all rows, V vocabulary.
"""

import copy
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from ..agent import Agent, Prompt
from ..common import InputError, upcast, warn_once
from ..recurse import recurse
from ..settings import CompletedSettings
from ..system import System
from ..tokenizer import DATE, Tokenizer
from ..turn import Turn
from .examples import TargetTurn, TrainExample
from .settings import TrainSettings

IGNORED = -100  # stands where a row has no token
MAX_POSITIONS = TrainSettings.max_length  # of a prompt and its reply
SCORES_AT_ONCE = 128  # states whose scores over the vocabulary are in memory together

# What outer links may learn instead, see docs/extending.md: objective(turns, states, tokens, examples) -> a scalar
#   turns     all Turns of the recursion, with their states and what they sent; the last one is that of the answer
#   states    (B, N, D), the last agent's: states[b, i] predicts tokens[b, i]
#   tokens    (B, N), those of its texts, with IGNORED on the left of shorter ones
#   examples  the B TrainExamples
Objective = Callable[[list[Turn], torch.Tensor, torch.Tensor, Sequence[TrainExample]], torch.Tensor]


# Teacher forcing


def reply_ending(tokenizer: Tokenizer) -> str:
    """What ends an assistant's reply: the first word that the template writes after it, else the eos token."""
    reply = "[reply]"
    text = ""
    with suppress(Exception):  # some templates refuse such a conversation
        user = {"role": "user", "content": "?"}
        assistant = {"role": "assistant", "content": reply}
        text = tokenizer.render([user, assistant], DATE, False)
    _, _, after = text.partition(reply)
    words = after.split()
    return words[0] if words else tokenizer.named.get("eos_token", "")


def teacher_forced(
    agent: Agent,
    prompts: Sequence[Prompt],
    replies: Sequence[str],
    longest: int = MAX_POSITIONS,
) -> tuple[torch.Tensor, torch.Tensor]:
    """B prompts (lists of pieces, see Agent.embed) and the texts that follow -> states h (B, N + 1, D), tokens (B, N).

    h[:, i] is the state that predicts reply token i; the last one follows the reply. The token that ends a reply is one
    of its N. Shorter replies stand at the right, with IGNORED on their left. A reply is cut where it and its prompt
    exceed `longest` positions, but keeps at least one token, with a warning if no position is left for it; prompts are
    never cut.
    """
    ending = reply_ending(agent.tokenizer)
    rows: list[Prompt] = []  # prompt and reply, with no text left to be tokenized again
    ids = []
    for prompt, reply in zip(prompts, replies, strict=True):
        pieces = agent.tokens(prompt)
        room = longest - sum(len(piece) for piece in pieces)
        if room < 1:
            warn_once(
                f"--max-length is {longest}, and a prompt leaves no position of it for its text, of which only the "
                "first token is learned: give more"
            )
        tokens = agent.tokenizer.encode(reply + ending)[: max(1, room)]
        ids.append(torch.tensor(tokens, device=agent.device))
        rows.append([*pieces, ids[-1]])
    N = max(len(own) for own in ids)
    h = agent.read_with_gradient(rows, last=N + 1).states
    padded = [F.pad(own, (N - len(own), 0), value=IGNORED) for own in ids]
    return h, torch.stack(padded)


def forced_turns(
    system: System,
    role: str,
    turns: Sequence[TargetTurn],
    longest: int = MAX_POSITIONS,
    date: str = DATE,
) -> tuple[torch.Tensor, torch.Tensor]:
    """teacher_forced on B TargetTurns of `role`, with the messages of other agents in the prompts as text."""
    prompts = []
    for turn in turns:
        inbox = {(source, role): [text] for source, text in turn.inbox.items()}  # as in recurse
        prompts += system.prompts_for(role, [turn.question], inbox, date)
    replies = [turn.reply for turn in turns]
    return teacher_forced(system.agents[role], prompts, replies, longest)


# Losses


def mean_of_rows(losses: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Losses (n,) of the n tokens in ids (B, N) that are not IGNORED: the mean over rows of each row's mean."""
    kept = ids != IGNORED
    lengths = kept.sum(1, keepdim=True)  # (B, 1)
    of_its_row = lengths.expand(kept.shape)[kept]  # (n,), for each token
    return (losses / of_its_row).sum() / len(ids)


def token_losses(agent: Agent, states: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Cross-entropies (n,) of the n tokens in (B, N) that are not IGNORED, under the states (B, N, D) before them."""
    kept = tokens != IGNORED
    return TokenLoss.apply(states[kept], tokens[kept], agent.model.lm_head)


def next_token_loss(agent: Agent, states: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Cross-entropy of tokens (B, N) under the states (B, N, D) that predict them; the head is frozen."""
    return mean_of_rows(token_losses(agent, states, tokens), tokens)


@torch.no_grad()
def row_losses(agent: Agent, states: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """The mean loss per token (B,) of each row, for states (B, N, D) that predict tokens (B, N)."""
    losses = token_losses(agent, states, tokens)  # (n,)
    kept = tokens != IGNORED
    whole = losses.new_zeros(kept.shape).masked_scatter(kept, losses)  # (B, N)
    return whole.sum(1) / kept.sum(1)


class TokenLoss(torch.autograd.Function):
    """Cross-entropies (n,) of states (n, D) against tokens (n,) under a frozen head, a module D -> V.

    The n V scores would be the largest tensor of a training step. Only SCORES_AT_ONCE rows of them exist at a time: the
    forward pass also computes their gradient (softmax minus one-hot, times the head), and keeps its n D numbers only.
    """

    @staticmethod
    def forward(
        ctx: Any, h: torch.Tensor, ids: torch.Tensor, head: torch.nn.Module
    ) -> torch.Tensor:
        wanted = ctx.needs_input_grad[0]
        losses = []
        gradients = []
        for part, target in zip(h.split(SCORES_AT_ONCE), ids.split(SCORES_AT_ONCE), strict=True):
            part = part.detach().requires_grad_(wanted)
            with torch.set_grad_enabled(wanted):
                scores = head(part)  # (at most SCORES_AT_ONCE, V)
            log_p = upcast(scores.detach()).log_softmax(-1)
            losses.append(-log_p.gather(1, target[:, None])[:, 0])
            if wanted:
                p = log_p.exp_()  # in place: log_p is not needed any more
                p[torch.arange(len(part), device=p.device), target] -= 1
                gradients += torch.autograd.grad(scores, part, p.to(scores.dtype))
        ctx.save_for_backward(*gradients)
        return torch.cat(losses)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        gradients = torch.cat(ctx.saved_tensors)  # (n, D)
        return (gradient[:, None] * gradients).to(gradients.dtype), None, None


class InnerLoss(torch.nn.Module):
    """The loss of one agent's inner link on a batch of its TargetTurns; `mse` is the weight w of the squared error."""

    def __init__(
        self,
        system: System,
        role: str,
        mse: float = TrainSettings.mse,
        longest: int = MAX_POSITIONS,
        date: str = DATE,
    ) -> None:
        super().__init__()
        link = system.agents[role].inner_link
        assert link is not None, "training gives an agent that has none a new one"
        self.link = link.requires_grad_(True)
        self.system = system
        self.role = role
        self.mse = mse
        self.longest = longest
        self.date = date

    def forward(self, turns: Sequence[TargetTurn]) -> torch.Tensor:
        """B TargetTurns -> their loss, a scalar."""
        with torch.no_grad():
            h, ids = forced_turns(self.system, self.role, turns, self.longest, self.date)
            kept = ids != IGNORED
            target = upcast(self.system.agents[self.role].model.embed(ids[kept]))  # (n, D)
        predicted = upcast(self.link(h[:, :-1][kept]))  # (n, D)
        losses = 1 - F.cosine_similarity(predicted, target, dim=-1)
        losses = losses + self.mse * (predicted - target).square().mean(-1)
        return mean_of_rows(losses, ids)


class OuterLoss(torch.nn.Module):
    """The loss of all outer links on a batch of TrainExamples.

    Only the last agent's texts count, unless `teacher` is set.

    settings       completed Settings, of which rounds, latent_steps and date are used
    teacher        agents do not think: they send the states at the first latent_steps tokens of their text in the
                   example, as in the released training. What they send depends on that text, in later rounds also on
                   the answer.
    other_rounds   weight of the last agent's loss in the other rounds, averaged over them
    objective      what is learned instead of the cross-entropy
    """

    def __init__(
        self,
        system: System,
        settings: CompletedSettings,
        teacher: bool = False,
        other_rounds: float = TrainSettings.supervise_all,
        longest: int = MAX_POSITIONS,
        objective: Objective | None = None,
    ) -> None:
        super().__init__()
        self.links = torch.nn.ModuleList(system.outer_links.values()).requires_grad_(True)
        self.system = system
        self.settings = settings
        self.teacher = teacher
        self.other_rounds = other_rounds
        self.longest = longest
        self.objective = objective

    def forward(self, examples: Sequence[TrainExample]) -> torch.Tensor:
        """B TrainExamples -> their loss, a scalar."""
        last = self.system.style.order[-1]
        other_losses = []

        def think(r: int, role: str, prompts: list[Prompt]) -> torch.Tensor | list[torch.Tensor]:
            supervised = role == last and self.other_rounds != 0
            if self.teacher or supervised:
                h, ids = self.forced(examples, r, role, prompts)
            if supervised:
                other_losses.append(next_token_loss(self.system.agents[role], h[:, :-1], ids))
            if self.teacher:
                return self.first_states(h, ids)
            m = self.settings.latent_steps
            return self.system.agents[role].think(prompts, m, gradient=True)

        questions = [example.question for example in examples]
        turns = list(recurse(self.system, questions, self.settings, think=think))
        h, ids = self.forced(examples, self.settings.rounds, last, turns[-1].prompts)
        states = h[:, :-1]
        if self.objective is not None:
            loss = self.objective(turns, states, ids, examples)
            check_loss(loss)
            return loss
        loss = next_token_loss(self.system.agents[last], states, ids)
        if other_losses:
            loss = loss + self.other_rounds * sum(other_losses) / len(other_losses)
        return loss

    def forced(
        self, examples: Sequence[TrainExample], r: int, role: str, prompts: list[Prompt]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """teacher_forced on the texts of `role` for round r."""
        replies = [example.text(role, r) for example in examples]
        return teacher_forced(self.system.agents[role], prompts, replies, self.longest)

    def first_states(self, h: torch.Tensor, ids: torch.Tensor) -> list[torch.Tensor]:
        """States h (B, N + 1, D) of teacher_forced -> for each row those at its first tokens, (n, D) each.

        n is latent_steps, or the number of tokens of a text that is shorter. They are the states after these tokens:
        h[:, i + 1] follows token i.
        """
        states = []
        for row, own_ids in zip(h, ids, strict=True):
            n = int((own_ids != IGNORED).sum())
            states.append(row[-n:][: self.settings.latent_steps])
        return states


def check_loss(loss: object) -> None:
    """InputError unless an objective came to a scalar that depends on a link."""
    if not torch.is_tensor(loss) or loss.numel() != 1:
        shape = tuple(loss.shape) if torch.is_tensor(loss) else type(loss).__name__
        raise InputError(
            f"the objective returned {shape}, expected a tensor with one number: take the mean of what it computes"
        )
    if not loss.requires_grad:
        raise InputError(
            "the objective depends on no link: compute it from the states, or from turn.states and turn.sent of a "
            "turn, and not under torch.no_grad"
        )


# Activation checkpointing


def checkpoint_activations(system: System) -> Callable[[], None]:
    """Make links and blocks keep only their inputs and recompute the rest for the gradient (arXiv 1604.06174).

    Returns the function that makes them as they were.
    """
    blocks: list[torch.nn.Module] = []
    links: list[torch.nn.Module] = list(system.outer_links.values())
    for agent in system.agents.values():
        if agent.inner_link is not None:
            links.append(agent.inner_link)
        blocks += agent.model.layers
    before = [(module, module.forward) for module in (*blocks, *links)]
    for block in blocks:
        block.forward = partial(checkpointed_block, block.forward)  # type: ignore[method-assign]
    for link in links:
        link.forward = partial(  # type: ignore[method-assign]
            checkpoint, link.forward, use_reentrant=False, preserve_rng_state=False
        )

    def undo() -> None:
        for module, forward in before:
            if getattr(forward, "__func__", None) is type(module).forward:
                del module.forward  # that of its class again
            else:
                module.forward = forward  # type: ignore[method-assign]

    return undo


def checkpointed_block(
    forward: Callable[..., torch.Tensor],
    x: torch.Tensor,
    positions: torch.Tensor,
    rope: Any,
    mask: torch.Tensor | None,
    cache: Any,
) -> torch.Tensor:
    """A block's forward under checkpoint, which may run it twice: each time from the cache's content before it."""
    if not x.requires_grad:
        return forward(x, positions, rope, mask, cache)
    # A shallow copy is enough: in training a cache replaces its tensors and never writes into them.
    before = copy.copy(cache)

    def run() -> tuple[torch.Tensor, Any]:
        after = copy.copy(before)
        return forward(x, positions, rope, mask, after), after

    y, after = checkpoint(run, use_reentrant=False, preserve_rng_state=False)
    vars(cache).update(vars(after))
    return y
