"""An agent: a frozen decoder that reads prompts of text and latents, and thinks in latents. It writes in generate.py.

A prompt is a list of pieces: text, token ids, or latents.

    embed    a prompt as input embeddings
    prefill  its last state, and the KV cache that holds its keys and values
    think    m latent steps: h_1 = last state of the prompt, h_{i+1} = state at the next input R_in(h_i)

Thinking and writing repeat a step, a function of tensors that returns the tensors of the next step and one output. These
tensors, the carry, have a row for each prompt; the first two are always the next inputs x (B, 1, D) and their positions
(B, 1).

Letters: B prompts, T their tokens, D the agent's width, m latent steps.
"""

from contextlib import contextmanager
from itertools import groupby
from os.path import commonprefix
from typing import NamedTuple

import torch

from .cache import KVCache
from .common import InputError, no_op, warn_once
from .fast.graphs import Graphs
from .fast.prepare import prepare
from .link import InnerLink, fused
from .load import (
    agent_patterns,
    checkpoint_folder,
    load_generation_config,
    load_inner_link,
    load_model,
)
from .tokenizer import load_tokenizer


def left_pad(rows, starts=0):
    """B embeddings (T_b, D) -> x (B, T, D), zeros on the left, and positions (B, T), -1 there, else from starts (B, 1)."""
    T = max(map(len, rows))
    x = torch.stack([torch.nn.functional.pad(row, (0, 0, T - len(row), 0)) for row in rows])
    padding = torch.tensor([[T - len(row)] for row in rows], device=x.device)
    columns = torch.arange(T, device=x.device) - padding
    return x, torch.where(columns < 0, -1, columns + starts)


def run_steps(step, carry, times, tick=no_op):
    """Apply step(*carry) -> (carry, output) `times` times; returns the last carry and the list of outputs."""
    outputs = []
    for _ in range(times):
        carry, output = step(*carry)
        outputs.append(output)
        tick()
    return carry, outputs


def check_finite(finite, what, model):
    """InputError unless `finite`: what a model computes is NaN or infinite."""
    if not finite:
        dtype = str(model.norm.weight.dtype).removeprefix("torch.")
        raise InputError(
            f"{what} are not finite: {dtype} overflows, or weights or links are damaged; "
            "try --dtype float32, and fetch the files again if that does not help"
        )


class PrefixCache(NamedTuple):
    """What an agent read last: the ids of the text that each prompt begins with, the cache that holds them, and its size.

    The size is what was asked for. With graphs the cache may be larger, as earlier questions were longer, but no answer
    may depend on earlier questions, not even by rounding.
    """

    beginnings: list[list[int]]
    cache: list
    S: int


class Agent:
    """A frozen decoder with its tokenizer, its inner link, and how it generates (load.GenerationConfig).

    inner_link   None for a base model, which cannot think in latents
    device       where it computes; the model's own weights may be offloaded
    graphs       the fast.Graphs that replay its steps on CUDA, else None
    sync_every   tokens that are generated before the host looks at them
    """

    def __init__(self, model, tokenizer, inner_link, generation_config, device, offload=False):
        self.model, self.tokenizer, self.inner_link = model, tokenizer, inner_link
        self.generation_config, self.device, self.offload = (
            generation_config,
            torch.device(device),
            offload,
        )
        self.graphs, self.sync_every, self.prefix_cache = None, 1, None
        tokenizer.embedding_rows = len(
            model.embed_tokens.weight
        )  # encode refuses ids without an embedding

    # Prompts

    def embed(self, prompts):
        """B prompts, lists of pieces -> embeddings (B, T, D) and positions (B, T), left-padded.

        A piece is a text, token ids (n,), or latents (m, D), which enter as they are, without the scale or norm that a
        family may give its token embeddings. No special tokens are added to a text: a chat template writes its own.
        """
        return left_pad([self.embed_pieces(self.tokens(pieces)) for pieces in prompts])

    def tokens(self, pieces):
        """The pieces with texts as token ids; texts that touch are one text to the tokenizer.

        Warns of a prompt that is longer than what the model was made for. It is read all the same, as by transformers.
        """
        row, longest = [], self.model.config.max_position_embeddings
        for is_text, group in groupby(pieces, key=lambda piece: isinstance(piece, str)):
            row += (
                [torch.tensor(self.tokenizer.encode("".join(group)), dtype=torch.long)]
                if is_text
                else group
            )
        if longest and sum(map(len, row)) > longest:
            warn_once(
                f"a prompt is longer than the {longest} positions that this {type(self.model).__name__} was made for, so "
                "what follows may be worthless: shorten the question, or lower --latent-steps or --max-new-tokens"
            )
        return row

    def embed_pieces(self, pieces):
        """Token ids and latents -> (T, D)."""
        w, embed = self.model.embed_tokens.weight, self.model.embed
        return torch.cat(
            [
                piece.to(w) if piece.is_floating_point() else embed(piece.to(w.device))
                for piece in pieces
            ]
        )

    # Reading

    def prefill(self, prompts, room):
        """Read B prompts that begin with text -> last states (B, 1, D), positions (B, T), a cache for `room` more.

        Prefix caching: a prompt that begins like the last round's is read from where they part, since the keys and values
        of what they share are still in the cache. That needs a cache that holds all positions (no windows, no states) and
        may be kept (no offload).
        """
        prompts = [self.tokens(pieces) for pieces in prompts]
        rows, beginnings = (
            [self.embed_pieces(pieces) for pieces in prompts],
            [pieces[0].tolist() for pieces in prompts],
        )
        S, previous = max(map(len, rows)) + room, self.prefix_cache
        self.drop_prefix()  # until the cache is whole again
        if previous and len(previous.beginnings) == len(rows) and S <= previous.S:
            cache, S, pairs = previous.cache, previous.S, zip(beginnings, previous.beginnings)
            shared = [
                min(len(commonprefix(pair)), len(row) - 1) for pair, row in zip(pairs, rows)
            ]  # at least one is read
            for c in cache:
                c.filled = max(shared)
        else:
            previous = None  # frees its memory for the new cache
            cache, shared = self.make_cache(len(rows), S), [0] * len(rows)
        starts = torch.tensor(shared, device=rows[0].device)[:, None]
        x, positions = left_pad([row[n:] for n, row in zip(shared, rows)], starts)
        h = self.model(x, positions, cache, last=1)
        if not self.offload and all(isinstance(c, KVCache) for c in cache):
            self.prefix_cache = PrefixCache(beginnings, cache, S)
        return h, positions, cache

    def make_cache(self, B, S):
        """An empty cache for B rows of S positions. With graphs it reuses the memory of what was read last."""
        self.drop_prefix()
        return (self.graphs or self.model).make_cache(B, S)

    def drop_prefix(self):
        """Let go of what was read last."""
        self.prefix_cache = None

    def release(self):
        """Free all memory that is kept from question to question."""
        self.drop_prefix()
        if self.graphs:
            self.graphs.release()

    def steps(self, step, carry, times, cache, tick, *kind):
        """run_steps; on CUDA, steps of one token a row are replayed as graphs.

        kind: what a step depends on besides its tensors; a graph holds for one kind only.
        """
        if self.graphs and times and carry[0].shape[1] == 1 and not torch.is_grad_enabled():
            return self.graphs.steps(step, carry, times, cache, tick, kind)
        return run_steps(step, carry, times, tick)

    # Thinking

    def think(self, prompts, m, tick=no_op, prefill=None):
        """m latent steps after B prompts (see `embed`) -> hidden states H (B, m, D).

        A state becomes the agent's own next input through its inner link, R_in. H holds the states themselves: whoever
        sends them on applies R_in once more (recurse.send_latents).
        prefill: takes the place of Agent.prefill in training (losses.prefill_with_gradient)
        """
        if not m:
            return self.model.embed_tokens.weight.new_zeros(
                len(prompts), 0, self.model.config.hidden_size
            )
        h, positions, cache = (prefill or self.prefill)(prompts, m)

        def next_input(h, positions):
            return self.inner_link(h).to(h.dtype), positions[:, -1:] + 1

        def step(x, positions):
            h = self.model(x, positions, cache, last=1)
            return next_input(h, positions), h

        tick()
        _, others = self.steps(step, next_input(h, positions), m - 1, cache, tick, "latent")
        return torch.cat([h, *others], 1)

    # Weights

    @contextmanager
    def at_work(self):
        """Within, the weights are on the agent's device; an offloaded agent has them in main memory otherwise."""
        parameters = list(self.model.parameters()) if self.offload else []
        resting = [p.data for p in parameters]
        try:
            for p in parameters:
                p.data = p.data.to(self.device, copy=True)
            yield
        finally:
            for p, data in zip(parameters, resting):
                p.data = data


def load_agent(
    source, task, device, dtype, offload=False, plain=False, untrained=False, role="agent"
):
    """The agent of a folder or repository in the released layout.

    task       math, choice or code: which inner link is taken if there are several
    offload    keep the weights in main memory while the agent rests
    plain      leave out the fast path; it needs weights that stay where they are, so an offloaded agent has none
    untrained  give it a new inner link: the folder may be that of a base model
    role       its name in the error if there is no such folder or repository
    Raises InputError if the folder is not whole.
    """
    folder = checkpoint_folder(source, *agent_patterns(task), role=role)
    model, tokenizer = (
        load_model(folder, device, dtype, "cpu" if offload else None),
        load_tokenizer(folder),
    )
    D = model.config.hidden_size
    inner_link = (
        InnerLink(D).to(device)
        if untrained
        else load_inner_link(folder, task, D, device, model.norm.weight.dtype)
    )
    agent = Agent(
        model, tokenizer, inner_link, load_generation_config(folder, tokenizer), device, offload
    )
    if not (plain or offload):
        agent.model, agent.inner_link = prepare(model), inner_link and fused(inner_link)
        if agent.device.type == "cuda":
            agent.graphs, agent.sync_every = Graphs(model), 16
    return agent
