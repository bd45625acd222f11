"""An agent: a frozen decoder that reads prompts of text and latents, thinks in latents, and writes text.

Letters: B prompts, T their tokens, D the agent's width, m latent steps.
"""

from contextlib import contextmanager
from itertools import groupby, takewhile

import torch
import torch.nn.functional as F

from .cache import KVCache, front, grow, select, spread
from .fast import Graphs, prepare
from .link import InnerLink, fused
from .load import load_generation, load_inner_link, load_model, load_tokenizer
from .sample import sample, uniform


def silent(*_):
    """Hears everything and says nothing: the default of callbacks."""


def no_reply(b, ids):
    """The default of Agent.decode: nothing is put behind any token."""
    return []


def filled_up(going, B):
    """Of B rows those that go on, and some that have ended until they are a power of two: few sizes make few graphs."""
    size = min(B, 1 << max(0, len(going) - 1).bit_length())
    ended = [i for i in range(B) if i not in going]
    return sorted(going + ended[:size - len(going)])


def shared(a, b):
    """How many items two lists begin with alike."""
    return next((n for n, pair in enumerate(zip(a, b)) if pair[0] != pair[1]), min(len(a), len(b)))


def left_pad(rows):
    """B embeddings (T_b, D) -> x (B, T, D), zeros on the left, and positions (B, T), negative there."""
    T = max(len(row) for row in rows)
    x = torch.stack([F.pad(row, (0, 0, T - len(row), 0)) for row in rows])
    padding = torch.tensor([[T - len(row)] for row in rows], device=x.device)
    return x, torch.arange(T, device=x.device) - padding


def repeat(step, state, times, tick=silent):
    """Apply step(*state) -> (state, output) so many times: the state after them, and their outputs."""
    outputs = []
    for _ in range(times):
        state, output = step(*state)
        outputs.append(output)
        tick()
    return state, outputs


class Agent:
    """A frozen decoder with its tokenizer, its inner link, and how it generates (load.Generation).

    graphs: the fast.Graphs that replay its steps, on CUDA; read_every: tokens between looks at what it writes.
    """

    def __init__(self, model, tokenizer, inner_link, generation, offload=False):
        self.model, self.tokenizer, self.inner_link, self.generation = model, tokenizer, inner_link, generation
        self.offload, self.graphs, self.read_every = offload, None, 1
        self.last_read = None  # what the last think began with and where it lies: see `begin`

    @property
    def device(self):
        return self.inner_link.post_ln.weight.device  # the model's weights may rest elsewhere

    def embed(self, prompts, special=False):
        """B prompts, lists of pieces -> embeddings (B, T, D) and positions (B, T), left-padded.

        A piece is a text, token ids (n,), or latents (m, D), which enter as they are, without the scale or norm a family may
        give its token embeddings. A chat template writes its special tokens itself; `special` adds a plain text's.
        """
        return left_pad([self.embed_row(self.tokens(pieces, special)) for pieces in prompts])

    def tokens(self, pieces, special=False):
        """The pieces with texts as token ids; texts that touch are one text to the tokenizer."""
        row = []
        for is_text, group in groupby(pieces, key=lambda piece: isinstance(piece, str)):
            row += [torch.tensor(self.tokenizer.encode("".join(group), special), dtype=torch.long)] if is_text else group
        return row

    def embed_row(self, row):
        """Token ids and latents -> (T, D)."""
        w = self.model.embed_tokens.weight
        return torch.cat([piece.to(w) if piece.is_floating_point() else self.model.embed(piece.to(w.device)) for piece in row])

    def make_cache(self, B, S):
        self.forget()
        return (self.graphs or self.model).make_cache(B, S)

    def forget(self):
        """Let go of the prompts that were read last."""
        self.last_read = None

    def release(self):
        """Free all memory that is kept from question to question."""
        self.forget()
        if self.graphs:
            self.graphs.release()

    def begin(self, prompts, m):
        """What is to be read of B prompts before m more positions, (B, T, D) and positions (B, T); the cache to read it into; and
        what to keep as self.last_read once it is read: what the prompts begin with, that cache, and its room.

        A prompt that begins with the same words as in the last round, whose keys and values lie where they were, goes on
        behind them. That takes a cache that holds every position: no windows, no states.
        """
        prompts = [self.tokens(pieces) for pieces in prompts]
        rows, heads = [self.embed_row(row) for row in prompts], [row[0].tolist() for row in prompts]
        longest, known = max(map(len, rows)), [0] * len(rows)
        before, cache, room = self.last_read or ([], None, 0)
        self.forget()
        if len(before) == len(heads) and longest + m <= room:
            known = [min(shared(a, b), len(row) - 1) for a, b, row in zip(heads, before, rows)]
            for c in cache:
                c.used = max(known)
        else:
            room = longest + m
            cache = self.make_cache(len(rows), room)
        x, positions = left_pad([row[n:] for n, row in zip(known, rows)])
        positions = torch.where(positions < 0, -1, positions + torch.tensor(known, device=x.device)[:, None])
        return x, positions, cache, (heads, cache, room) if all(isinstance(c, KVCache) for c in cache) else None

    def read(self, prompts, last):
        """B prompts for training -> states of their last so many positions (B, last, D), positions (B, T), and the grown cache.

        What stands before all latents has no gradient, so that it is read without a graph.
        """
        prompts = [self.tokens(pieces) for pieces in prompts]
        x, positions = left_pad([self.embed_row(row) for row in prompts])
        cache, T = self.model.make_cache(len(x)), x.shape[1]
        texts = [sum(map(len, takewhile(lambda piece: not piece.is_floating_point(), row))) for row in prompts]
        start = min(T - sum(map(len, row)) + text for row, text in zip(prompts, texts))
        start = start if x.requires_grad and start < T - last else 0
        if start:
            with torch.no_grad():
                self.model(x[:, :start], positions[:, :start], cache, last=1)
        return self.model(x[:, start:], positions[:, start:], cache, last=last), positions, cache

    def repeat(self, step, state, times, cache, tick, *kind):
        """The steps of one kind, replayed as graphs where that is possible: one token a row on CUDA."""
        if self.graphs and state[0].shape[1] == 1 and not torch.is_grad_enabled():
            return self.graphs.repeat(step, state, times, cache, tick, kind)
        return repeat(step, state, times, tick)

    def think(self, prompts, m, tick=silent):
        """m latent steps after B prompts (see `embed`) -> hidden states H (B, m, D); each goes back in through the inner link.

        Where gradients are recorded (training) the cache grows by concatenation, else it is allocated once.
        """
        if not m:
            return self.model.embed_tokens.weight.new_zeros(len(prompts), 0, self.model.config.hidden_size)
        if torch.is_grad_enabled():
            h, positions, cache = self.read(prompts, 1)
        else:
            x, positions, cache, last_read = self.begin(prompts, m)
            h = self.model(x, positions, cache, last=1)  # (B, 1, D)
            self.last_read = last_read

        def next_input(h, positions):
            return self.inner_link(h).to(h.dtype), positions[:, -1:] + 1

        def step(x, positions):
            h = self.model(x, positions, cache, last=1)
            return next_input(h, positions), h

        tick()
        _, others = self.repeat(step, next_input(h, positions), m - 1, cache, tick, "latent")
        return torch.cat([h, *others], 1)

    def decode(self, x, positions, seeds, settings, tick=silent, reply=no_reply):
        """Lists of the token ids that follow B prompts, the one that ended a text included.

        seeds: k integers a prompt, one for each of the texts that shall follow it; the prompt is read once for all of them.
        settings: a recurse.Settings (max_new_tokens, temperature, top_p, top_k).
        reply(b, ids) gives the ids that are put behind text b's last token, such as a tool's result; mostly none. A row waits
        for nobody: the others go on by one token while it reads its reply, and leave the batch when they end.
        """
        sampling = settings.temperature, self.generation.top_k if settings.top_k is None else settings.top_k, settings.top_p
        ids, rows, k = [[] for _ in seeds], list(range(len(seeds))), len(seeds) // len(x)
        cache, left = self.make_cache(len(seeds), x.shape[1] + settings.max_new_tokens), settings.max_new_tokens - 1

        def drawn(h, positions, seeds, n):
            tokens = sample(self.model.logits(h[:, -1]), uniform(seeds, n), *sampling)  # (rows,)
            return (self.model.embed(tokens[:, None]), positions[:, -1:] + 1, seeds, n + 1), tokens

        def step(x, positions, seeds, n):
            return drawn(self.model(x, positions, cache, last=1), positions, seeds, n)

        of_prompts = front(cache, len(x)) if k > 1 else cache
        h = self.model(x, positions, of_prompts, last=1)
        if k > 1:
            spread(cache, of_prompts, k)
        seeds, n = torch.tensor(seeds, device=x.device), torch.zeros((), dtype=torch.long, device=x.device)
        state, first = drawn(h.repeat_interleave(k, 0), positions.repeat_interleave(k, 0), seeds, n)
        tokens = [first]
        tick()
        while True:
            written = torch.stack(tokens, 1).tolist()  # here, and only here, the host waits for the device
            going = [i for i, b in enumerate(rows) if b is not None and not self.ended(ids[b], written[i])]
            if not going:
                return ids
            stay = going if not self.graphs else filled_up(going, len(rows))
            rows = [rows[i] if i in going else None for i in stay]  # None: a row that only fills up a graph's batch
            if len(stay) < len(written):
                index = torch.tensor(stay, device=x.device)
                select(cache, index)
                state = *(value[index] for value in state[:3]), state[3]
            replies = [[] if b is None else reply(b, ids[b]) for b in rows]
            if any(replies):
                state = *self.read_replies(replies, ids, rows, state, cache), *state[2:]
            if not left:
                return ids
            times = 1 if state[0].shape[1] > 1 or reply is not no_reply else min(self.read_every, left)
            state, tokens = self.repeat(step, state, times, cache, tick, "text", *sampling)
            left -= times

    def ended(self, ids, written):
        """Append to `ids` what was written, up to a token that ends a text; whether there was one."""
        for token in written:
            ids.append(token)
            if token in self.generation.eos_ids:
                return True
        return False

    def read_replies(self, replies, ids, rows, state, cache):
        """Put replies behind the rows' last tokens -> the embeddings and positions that are to be read next."""
        more = max(map(len, replies))
        grow(cache, more)
        if self.graphs:
            self.graphs.adopt(cache, len(rows), self.graphs.room[1] + more)
        x, positions = left_pad([torch.cat([last, self.model.embed(torch.tensor(reply, dtype=torch.long, device=last.device))])
                                 for last, reply in zip(state[0], replies)])
        for b, reply in zip(rows, replies):
            if reply:
                ids[b] += reply
        return x, torch.where(positions < 0, -1, positions + state[1])

    @contextmanager
    def at_work(self):
        """Within, the weights are on the agent's device; an agent that is offloaded keeps them in main memory otherwise."""
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
    """Agent of a folder or repository in the released layout; `offload` keeps its weights in main memory while it rests.

    It is put on the fast path unless `plain`, or offloaded: its weights must stay where they are. `untrained` gives it a new
    inner link, so that the folder may be that of a base model.
    """
    model, tokenizer = load_model(source, device, dtype, "cpu" if offload else None), load_tokenizer(source)
    D = model.config.hidden_size
    inner_link = InnerLink(D).to(device) if untrained else load_inner_link(source, task, D, device, model.norm.weight.dtype)
    agent = Agent(model, tokenizer, inner_link, load_generation(source, tokenizer), offload)
    if not (plain or offload):
        agent.model, agent.inner_link = prepare(model), fused(inner_link)
        if agent.device.type == "cuda":
            agent.graphs, agent.read_every = Graphs(model), 16
    return agent
