"""Writing text: the batched decoding loop of an agent, with its sampling, the replies of tools, and a cache that grows.

Each step takes one token per row. Between steps, rows whose text has ended leave the batch, and the reply of a tool is
put after the token that asked for it.

Letters: B prompts, T their tokens, D the agent's width, n random numbers of a text.
"""

from typing import NamedTuple

import torch

from .agent import check_finite, left_pad
from .cache import KVCache, first_rows, grow, keep_rows, repeat_rows
from .common import no_op
from .sample import sample, uniforms

UNIFORMS = 2048  # random numbers of a text are made before it, for a multiple of this many tokens: few sizes, few graphs
REPLY_ROOM = 512  # positions: a cache that is too short for a reply grows by a multiple of this, for others to come


def generate(agent, prompts, seeds, settings, tick=no_op, reply=None):
    """Write after B prompts (see Agent.embed) -> a list of token ids for each text.

    A text ends with one of the generation config's eos_ids, which is part of it, or after settings.max_new_tokens.
    InputError if a score is not finite.
    seeds     an integer for each text: k of them for each prompt, which is read once for all k
    settings  max_new_tokens, temperature, top_p, top_k (None: the generation config's), as in settings.Settings
    reply     reply(b, ids) gives ids to insert after text b's last token, such as a tool's result; mostly none. While
              one row reads its reply, the others go on by a token each.
    """
    batch = Batch(agent, prompts, seeds, settings)
    tokens, left = batch.first_tokens(), settings.max_new_tokens - 1  # tokens that may still follow
    tick()
    while True:
        unfinished = batch.append(tokens)
        if not unfinished or not left:
            return batch.ids
        batch.drop_ended(unfinished)
        if reply:
            batch.insert_replies(reply)
        times = 1 if reply else min(agent.sync_every, left)
        tokens = batch.take_steps(times, tick)
        left -= times


class Inputs(NamedTuple):
    """What the next step reads, by row."""

    x: torch.Tensor  # (rows, T, D): the last token, and a reply after it
    positions: torch.Tensor  # (rows, T)
    uniforms: torch.Tensor  # (rows, n)
    token_index: torch.Tensor  # (rows, 1): which of the uniforms the next token takes


class Batch:
    """Texts while they are written.

    ids    the token ids of each text so far
    rows   for each row of the tensors the number of its text; None: an ended row that fills the batch up
    """

    def __init__(self, agent, prompts, seeds, settings):
        self.agent, self.model = agent, agent.model
        top_k = agent.generation_config.top_k if settings.top_k is None else settings.top_k
        self.sampling = settings.temperature, top_k, settings.top_p
        self.prompts, self.copies = agent.embed(prompts), len(seeds) // len(prompts)
        self.S = self.prompts[0].shape[1] + settings.max_new_tokens  # positions that may be needed
        self.cache = agent.make_cache(len(seeds), self.S)
        self.ids, self.rows = [[] for _ in seeds], list(range(len(seeds)))
        n = (
            -(-settings.max_new_tokens // UNIFORMS) * UNIFORMS if settings.temperature else 1
        )  # greedy: none is looked at
        self.uniforms = uniforms(seeds, n).to(agent.device)

    # Steps

    def first_tokens(self):
        """Read the prompts once for all copies; the first token of each text, (rows, 1)."""
        (x, positions), k = self.prompts, self.copies
        of_prompts = first_rows(self.cache, len(x)) if k > 1 else self.cache
        h = self.model(x, positions, of_prompts, last=1)
        if k > 1:
            repeat_rows(self.cache, of_prompts, k)
        h, positions = h.repeat_interleave(k, 0), positions.repeat_interleave(k, 0)
        self.inputs, first = self.draw(
            h, positions, self.uniforms, torch.zeros_like(positions[:, :1])
        )
        return first[:, None]

    def draw(self, h, positions, uniforms, token_index):
        """States (rows, T, D) -> the next step's Inputs and the tokens (rows,) that are drawn from the last of them."""
        u = uniforms.gather(1, token_index)[:, 0] if self.sampling[0] else None
        tokens = sample(self.model.logits(h[:, -1]), u, *self.sampling)
        x = self.model.embed(
            tokens[:, None].clamp(min=0)
        )  # -1: not finite, which `append` will find
        return Inputs(x, positions[:, -1:] + 1, uniforms, token_index + 1), tokens

    def take_steps(self, times, tick):
        """Go on by `times` tokens per row, (rows, times)."""
        cache = self.cache  # a graph is captured over these very objects

        def step(x, positions, uniforms, token_index):
            return self.draw(
                self.model(x, positions, cache, last=1), positions, uniforms, token_index
            )

        kind = "text", *self.sampling, self.uniforms.shape[1]
        state, tokens = self.agent.steps(step, self.inputs, times, cache, tick, *kind)
        self.inputs = Inputs(*state)
        return torch.stack(tokens, 1)

    # Between steps

    def append(self, tokens):
        """Append new tokens (rows, n) to the texts, each up to one that ends it; the rows whose texts go on."""
        eos_ids, unfinished = self.agent.generation_config.eos_ids, []
        written = tokens.tolist()  # here the host waits for the device; in the steps it never does
        for i, b in enumerate(self.rows):
            if b is not None:
                check_finite(
                    -1 not in written[i],
                    f"the scores that {type(self.model).__name__} gives to tokens",
                    self.model,
                )
                end = next((n for n, token in enumerate(written[i], 1) if token in eos_ids), None)
                self.ids[b] += written[i][:end]
                if end is None:
                    unfinished.append(i)
        return unfinished

    def drop_ended(self, unfinished):
        """Let all rows but the unfinished leave the batch.

        With graphs some ended rows stay, numbered None, to fill the batch up to a power of two: few sizes, few graphs.
        """
        rows, graphs = self.rows, self.agent.graphs
        size = (
            min(len(rows), 1 << (len(unfinished) - 1).bit_length()) if graphs else len(unfinished)
        )
        ended = [i for i in range(len(rows)) if i not in unfinished]
        stay = sorted(unfinished + ended[: size - len(unfinished)])
        if len(stay) < len(rows):
            index = torch.tensor(stay, device=self.inputs.x.device)
            keep_rows(self.cache, index)
            self.inputs = Inputs(*(value[index] for value in self.inputs))
        self.rows = [rows[i] if i in unfinished else None for i in stay]

    def insert_replies(self, reply):
        """Put replies after the last tokens, in the texts and in the next inputs."""
        replies = [reply(b, self.ids[b]) if b is not None else [] for b in self.rows]
        if not any(replies):
            return
        self.S += max(map(len, replies))
        self.make_room()
        for b, ids in zip(self.rows, replies):
            if ids:
                self.ids[b] += ids
        x, positions, *others = self.inputs
        embedded = [
            self.model.embed(torch.tensor(ids, dtype=torch.long, device=x.device))
            for ids in replies
        ]
        self.inputs = Inputs(
            *left_pad([torch.cat(pair) for pair in zip(x, embedded)], positions), *others
        )

    def make_room(self):
        """Let the cache grow if it has fewer than S positions; graphs of its old memory are discarded."""
        capacity = min((c.capacity for c in self.cache if isinstance(c, KVCache)), default=self.S)
        if capacity >= self.S:
            return
        more, graphs = -(-(self.S - capacity) // REPLY_ROOM) * REPLY_ROOM, self.agent.graphs
        if graphs:
            graphs.release()  # first, so that the old memory goes layer by layer
        grow(self.cache, more)
        if graphs:
            graphs.adopt(self.cache, len(self.rows), capacity + more)
