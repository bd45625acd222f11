"""An agent: a frozen decoder that reads prompts of text and latents, thinks in latents, and writes text.

A prompt is a list of pieces: text, token ids, or latents. What an agent does with it:

    think    m latent steps: h_1 = last state of the prompt, h_{i+1} = state at the next input R_in(h_i)
    decode   tokens, one after another, until one of them ends the text

Both repeat a step, a function of tensors that returns the tensors of the next step and one output. These tensors, the
state, have a row for each prompt; the first two are always the next inputs x (B, 1, D) and their positions (B, 1).

Letters: B prompts, T their tokens, D the agent's width, m latent steps.
"""

from contextlib import contextmanager
from itertools import groupby, takewhile
from typing import NamedTuple

import torch
import torch.nn.functional as F

from .cache import KVCache, first_rows, grow, keep_rows, repeat_rows
from .fast import Graphs, prepare
from .link import InnerLink, fused
from .load import load_generation, load_inner_link, load_model, load_tokenizer
from .sample import sample, uniform

NUMBERS = 2048  # random numbers of a text are made before it, for a multiple of this many tokens: few sizes, few graphs
REPLY_ROOM = 512  # positions: a cache that is too short for a reply grows by a multiple of this, for others to come


def silent(*_):
    """Default callback: does nothing."""


def common_prefix(a, b):
    """Number of items that two lists begin with alike."""
    return next((n for n, pair in enumerate(zip(a, b)) if pair[0] != pair[1]), min(len(a), len(b)))


def left_pad(rows, starts=0):
    """B embeddings (T_b, D) -> x (B, T, D), zeros on the left, and positions (B, T), -1 there, else from starts (B, 1)."""
    T = max(map(len, rows))
    x = torch.stack([F.pad(row, (0, 0, T - len(row), 0)) for row in rows])
    padding = torch.tensor([[T - len(row)] for row in rows], device=x.device)
    columns = torch.arange(T, device=x.device) - padding
    return x, torch.where(columns < 0, -1, columns + starts)


def run_steps(step, state, times, tick=silent):
    """Apply step(*state) -> (state, output) `times` times; returns the last state and the list of outputs."""
    outputs = []
    for _ in range(times):
        state, output = step(*state)
        outputs.append(output)
        tick()
    return state, outputs


class LastRead(NamedTuple):
    """What an agent read last: the ids of the text that each prompt begins with, the cache that holds them, and its size.

    The size is what was asked for. With graphs the cache may be larger, as earlier questions were longer, but no answer
    may depend on earlier questions, not even by rounding.
    """
    beginnings: list[list[int]]
    cache: list
    S: int


class Agent:
    """A frozen decoder with its tokenizer, its inner link, and how it generates (load.Generation).

    graphs       the fast.Graphs that replay its steps on CUDA, else None
    sync_every   tokens that are generated before the host looks at them
    """

    def __init__(self, model, tokenizer, inner_link, generation, offload=False):
        self.model, self.tokenizer, self.inner_link, self.generation = model, tokenizer, inner_link, generation
        self.offload, self.graphs, self.sync_every = offload, None, 1
        self.last_read = None
        tokenizer.rows = len(model.embed_tokens.weight)  # it checks what it makes of texts

    @property
    def device(self):
        """Where the agent computes: that of its inner link, since the model's own weights may be offloaded."""
        return self.inner_link.post_ln.weight.device

    # Prompts

    def embed(self, prompts):
        """B prompts, lists of pieces -> embeddings (B, T, D) and positions (B, T), left-padded.

        A piece is a text, token ids (n,), or latents (m, D), which enter as they are, without the scale or norm that a
        family may give its token embeddings. No special tokens are added to a text: a chat template writes its own.
        """
        return left_pad([self.embed_pieces(self.tokens(pieces)) for pieces in prompts])

    def tokens(self, pieces):
        """The pieces with texts as token ids; texts that touch are one text to the tokenizer."""
        row = []
        for is_text, group in groupby(pieces, key=lambda piece: isinstance(piece, str)):
            row += [torch.tensor(self.tokenizer.encode("".join(group)), dtype=torch.long)] if is_text else group
        return row

    def embed_pieces(self, pieces):
        """Token ids and latents -> (T, D)."""
        w, embed = self.model.embed_tokens.weight, self.model.embed
        return torch.cat([piece.to(w) if piece.is_floating_point() else embed(piece.to(w.device)) for piece in pieces])

    # Reading

    def prefill(self, prompts, room):
        """Read B prompts that begin with text -> last states (B, 1, D), positions (B, T), a cache for `room` more.

        A prompt that begins like the last round's is read from where they part, since the keys and values of what they
        share are still in the cache, if that holds all positions (no windows, no states) and may be kept (no offload).
        """
        prompts = [self.tokens(pieces) for pieces in prompts]
        rows, beginnings = [self.embed_pieces(pieces) for pieces in prompts], [pieces[0].tolist() for pieces in prompts]
        S, last = max(map(len, rows)) + room, self.last_read
        self.forget()  # until the cache is whole again
        if last and len(last.beginnings) == len(rows) and S <= last.S:
            cache, S, pairs = last.cache, last.S, zip(beginnings, last.beginnings)
            shared = [min(common_prefix(*pair), len(row) - 1) for pair, row in zip(pairs, rows)]  # one is always read
            for c in cache:
                c.filled = max(shared)
        else:
            last = None  # frees its memory for the new cache
            cache, shared = self.make_cache(len(rows), S), [0] * len(rows)
        starts = torch.tensor(shared, device=rows[0].device)[:, None]
        x, positions = left_pad([row[n:] for n, row in zip(shared, rows)], starts)
        h = self.model(x, positions, cache, last=1)
        if not self.offload and all(isinstance(c, KVCache) for c in cache):
            self.last_read = LastRead(beginnings, cache, S)
        return h, positions, cache

    def prefill_with_gradient(self, prompts, last):
        """Read B prompts for training -> their last `last` states (B, last, D), positions (B, T), growing cache.

        The text before a prompt's first latents has no gradient and is read without a graph.
        """
        prompts = [self.tokens(pieces) for pieces in prompts]
        x, positions = left_pad([self.embed_pieces(pieces) for pieces in prompts])
        cache, T = self.model.make_cache(len(x)), x.shape[1]
        texts = [sum(map(len, takewhile(lambda piece: not piece.is_floating_point(), pieces))) for pieces in prompts]
        start = min(T - sum(map(len, pieces)) + text for pieces, text in zip(prompts, texts))
        start = start if x.requires_grad and start < T - last else 0
        if start:
            with torch.no_grad():
                self.model(x[:, :start], positions[:, :start], cache, last=1)
        return self.model(x[:, start:], positions[:, start:], cache, last=last), positions, cache

    def make_cache(self, B, S):
        """An empty cache for B rows of S positions. With graphs it reuses the memory of what was read last."""
        self.forget()
        return (self.graphs or self.model).make_cache(B, S)

    def forget(self):
        """Let go of what was read last."""
        self.last_read = None

    def release(self):
        """Free all memory that is kept from question to question."""
        self.forget()
        if self.graphs:
            self.graphs.release()

    def steps(self, step, state, times, cache, tick, *kind):
        """run_steps; on CUDA, steps of one token a row are replayed as graphs.

        kind: what a step depends on besides its tensors; a graph holds for one kind only.
        """
        if self.graphs and times and state[0].shape[1] == 1 and not torch.is_grad_enabled():
            return self.graphs.steps(step, state, times, cache, tick, kind)
        return run_steps(step, state, times, tick)

    # Thinking

    def think(self, prompts, m, tick=silent):
        """m latent steps after B prompts (see `embed`) -> hidden states H (B, m, D).

        If gradients are recorded (training), the cache grows by concatenation; else it is allocated once.
        """
        if not m:
            return self.model.embed_tokens.weight.new_zeros(len(prompts), 0, self.model.config.hidden_size)
        graph = torch.is_grad_enabled()
        h, positions, cache = self.prefill_with_gradient(prompts, 1) if graph else self.prefill(prompts, m)

        def next_input(h, positions):
            return self.inner_link(h).to(h.dtype), positions[:, -1:] + 1

        def step(x, positions):
            h = self.model(x, positions, cache, last=1)
            return next_input(h, positions), h

        tick()
        _, others = self.steps(step, next_input(h, positions), m - 1, cache, tick, "latent")
        return torch.cat([h, *others], 1)

    # Writing

    def decode(self, prompts, seeds, settings, tick=silent, reply=None):
        """Write after B prompts (see `embed`) -> a list of token ids for each text.

        A text ends with one of the generation's eos_ids, which is part of it, or after settings.max_new_tokens.
        seeds     an integer for each text: k of them for each prompt, which is read once for all k
        settings  max_new_tokens, temperature, top_p, top_k (None: the generation's), as in recurse.Settings
        reply     reply(b, ids) gives ids to insert after text b's last token, such as a tool's result; mostly none. While
                  one row reads its reply, the others go on by a token each.
        """
        top_k = self.generation.top_k if settings.top_k is None else settings.top_k
        sampling = settings.temperature, top_k, settings.top_p
        x, positions = self.embed(prompts)
        S = x.shape[1] + settings.max_new_tokens  # positions that may be needed
        cache = self.make_cache(len(seeds), S)
        ids, left = [[] for _ in seeds], settings.max_new_tokens - 1  # tokens that may still follow the first
        rows = list(range(len(seeds)))  # number of the text in each row; None: an ended row that fills the batch up
        numbers = torch.arange(-(-settings.max_new_tokens // NUMBERS) * NUMBERS, device=x.device)
        chance = uniform(torch.tensor(seeds, device=x.device)[:, None], numbers)  # (rows, tokens)

        def draw(h, positions, chance, n):
            u = chance.gather(1, n)[:, 0] if settings.temperature else None  # the best token needs no chance
            tokens = sample(self.model.logits(h[:, -1]), u, *sampling)  # (rows,)
            return (self.model.embed(tokens[:, None]), positions[:, -1:] + 1, chance, n + 1), tokens

        def step(x, positions, chance, n):
            return draw(self.model(x, positions, cache, last=1), positions, chance, n)

        h, positions = self.prefill_copies(x, positions, cache, len(seeds) // len(x))
        state, first = draw(h, positions, chance, torch.zeros_like(positions[:, :1]))
        tokens = [first]
        tick()
        while True:
            written = torch.stack(tokens, 1).tolist()  # here the host waits for the device; in the steps it never does
            unfinished = [i for i, b in enumerate(rows) if b is not None and not self.ended(ids[b], written[i])]
            if not unfinished or not left:
                return ids
            state, rows = self.drop_ended(state, rows, unfinished, cache)
            replies = [reply(b, ids[b]) if reply and b is not None else [] for b in rows]
            if any(replies):
                S += max(map(len, replies))
                self.make_room(cache, len(rows), S)
                state = *self.insert_replies(replies, ids, rows, state), *state[2:]
            times = 1 if state[0].shape[1] > 1 or reply else min(self.sync_every, left)
            state, tokens = self.steps(step, state, times, cache, tick, "text", *sampling, chance.shape[1])
            left -= times

    def prefill_copies(self, x, positions, cache, k):
        """Read B prompts once into a cache of k rows for each -> last states (B k, 1, D) and positions (B k, T)."""
        of_prompts = first_rows(cache, len(x)) if k > 1 else cache
        h = self.model(x, positions, of_prompts, last=1)
        if k > 1:
            repeat_rows(cache, of_prompts, k)
        return h.repeat_interleave(k, 0), positions.repeat_interleave(k, 0)

    def ended(self, ids, written):
        """Append to `ids` what was written, up to a token that ends the text; whether there was one."""
        for token in written:
            ids.append(token)
            if token in self.generation.eos_ids:
                return True
        return False

    def drop_ended(self, state, rows, unfinished, cache):
        """Let rows that have ended leave the batch -> the state, and the text numbers of the rows that stay.

        With graphs some ended rows stay, numbered None, to fill the batch up to a power of two: few sizes, few graphs.
        """
        size = min(len(rows), 1 << (len(unfinished) - 1).bit_length()) if self.graphs else len(unfinished)
        ended = [i for i in range(len(rows)) if i not in unfinished]
        stay = sorted(unfinished + ended[:size - len(unfinished)])
        if len(stay) < len(rows):
            index = torch.tensor(stay, device=state[0].device)
            keep_rows(cache, index)
            state = tuple(value[index] for value in state)
        return state, [rows[i] if i in unfinished else None for i in stay]

    def make_room(self, cache, B, S):
        """Let a cache of B rows grow if it has fewer than S positions; graphs of its old memory are discarded."""
        capacity = min((c.capacity for c in cache if isinstance(c, KVCache)), default=S)
        if capacity >= S:
            return
        more = -(-(S - capacity) // REPLY_ROOM) * REPLY_ROOM
        if self.graphs:
            self.graphs.release()  # first, so that the old memory goes layer by layer
        grow(cache, more)
        if self.graphs:
            self.graphs.adopt(cache, B, capacity + more)

    def insert_replies(self, replies, ids, rows, state):
        """Append replies to the texts -> the next inputs and their positions: each row's last token and its reply."""
        x, positions, *_ = state
        for b, reply in zip(rows, replies):
            if reply:
                ids[b] += reply
        replies = [self.model.embed(torch.tensor(reply, dtype=torch.long, device=x.device)) for reply in replies]
        return left_pad([torch.cat([last, reply]) for last, reply in zip(x, replies)], positions)

    # Weights

    @contextmanager
    def at_work(self):
        """Within, the weights are on the agent's device; an offloaded agent has them in main memory otherwise."""
        if not self.offload:
            yield
            return
        parameters = list(self.model.parameters())
        resting = [p.data for p in parameters]
        try:
            for p in parameters:
                p.data = p.data.to(self.device, copy=True)
            yield
        finally:
            for p, data in zip(parameters, resting):
                p.data = data


def load_agent(source, task, device, dtype, offload=False, plain=False, untrained=False):
    """The agent of a folder or repository in the released layout.

    task       math, choice or code: which inner link is taken if there are several
    offload    keep the weights in main memory while the agent rests
    plain      leave out the fast path; it needs weights that stay where they are, so an offloaded agent has none
    untrained  give it a new inner link: the folder may be that of a base model
    Raises InputError if the folder is not whole.
    """
    model, tokenizer = load_model(source, device, dtype, "cpu" if offload else None), load_tokenizer(source)
    D = model.config.hidden_size
    inner_link = InnerLink(D).to(device) if untrained else load_inner_link(source, task, D, device, model.norm.weight.dtype)
    agent = Agent(model, tokenizer, inner_link, load_generation(source, tokenizer), offload)
    if not (plain or offload):
        agent.model, agent.inner_link = prepare(model), fused(inner_link)
        if agent.device.type == "cuda":
            agent.graphs, agent.sync_every = Graphs(model), 16
    return agent
