"""An agent: a frozen decoder that reads prompts of text and latents, and thinks in latents. It writes in generate.py.

A prompt is a list of pieces: text, token ids, or latents.

    embed   a prompt as input embeddings
    read    its last state, and the KV cache that holds its keys and values
    think   m latent steps: h_1 = last state of the prompt, h_{i+1} = state at the next input R_in(h_i)

Notation: B prompts, T their tokens, D the agent's width, m latent steps, k copies, S positions of a cache.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from os.path import commonprefix
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F

from .cache import KVCache, first_rows, repeat_rows
from .common import InputError, no_op, state_of, warn_once
from .devices import usable_kind
from .fast.graphs import Graphs
from .fast.hooks import has_global_hook, has_hook
from .fast.prepare import prepare
from .link import FusedInnerLink, InnerLink, fused
from .llama import Llama
from .load import (
    GenerationConfig,
    agent_patterns,
    checkpoint_folder,
    load_generation_config,
    load_inner_link,
    load_model,
)
from .quantize import named_weights
from .steps import Steps
from .tokenizer import Tokenizer, load_tokenizer

Piece = str | torch.Tensor  # text, token ids (n,), or latents (m, D)
Prompt = list[Piece]


def left_pad(
    rows: list[torch.Tensor], starts: torch.Tensor | int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    """B embeddings (T_b, D) -> x (B, T, D), left-padded with zeros, and positions (B, T), -1 on padding.

    starts   (B, 1): the position of each row's first token
    """
    T = max(map(len, rows))
    x = torch.stack([F.pad(row, (0, 0, T - len(row), 0)) for row in rows])
    padding = torch.tensor([[T - len(row)] for row in rows], device=x.device)
    columns = torch.arange(T, device=x.device) - padding
    return x, torch.where(columns < 0, -1, columns + starts)


def check_finite(finite: torch.Tensor | bool, what: str, model: Llama) -> None:
    """InputError unless `finite`: what a model computes is NaN or infinite."""
    if not finite:
        dtype = str(model.norm.weight.dtype).removeprefix("torch.")
        raise InputError(
            f"{what} are not finite: {dtype} overflows, or weights or links are damaged; "
            "try --dtype float32, and fetch the files again if that does not help"
        )


class Reading(NamedTuple):
    """What reading B prompts gives, in one row for each, or in k.

    states          (B k, 1, D), that of the last token; or (B, last, D), those of the last tokens
    next_positions  (B k, 1), that of the token which follows
    cache           one object per layer
    S               positions of the longest prompt, and of the room after it that was asked for
    """

    states: torch.Tensor
    next_positions: torch.Tensor
    cache: list
    S: int


class PrefixCache(NamedTuple):
    """What an agent read last.

    beginnings   the token ids of the text that each prompt begins with
    cache        holds them: one object per layer
    model_marks  what `marks` gave for the model that read it
    S            positions that were asked for when the cache was made. With graphs it may have more, as earlier
                 questions were longer, but no answer may depend on earlier questions, not even by rounding
    """

    beginnings: list[list[int]]
    cache: list
    model_marks: list[tuple] | None
    S: int


class Agent:
    """A frozen decoder with its tokenizer, its inner link, and how it generates.

    inner_link   None for a base model, which cannot think in latents
    device       where it computes; the model's own weights may be offloaded
    steps        takes its steps: as they are, or as CUDA graphs
    source       the folder or hub id that it was loaded from; None if it was made in memory
    quantize     int8 or int4 if its linears are quantised, else None
    """

    def __init__(
        self,
        model: Llama,
        tokenizer: Tokenizer,
        inner_link: InnerLink | FusedInnerLink | None,
        generation_config: GenerationConfig,
        device: torch.device | str,
        offload: bool = False,
        source: str | Path | None = None,
        quantize: str | None = None,
    ) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.inner_link = inner_link
        self.generation_config = generation_config
        self.device = torch.device(device)
        self.offload = offload
        self.source = source
        self.quantize = quantize
        self.steps = Steps(model)
        self.prefix_cache: PrefixCache | None = None

    def __repr__(self) -> str:
        return f"Agent({self.summary()})"

    def summary(self) -> str:
        """Its family, size, dtype, device and inner link, in one line."""
        config = self.model.config
        family = type(self.model).__name__
        shape = f"{config.num_hidden_layers} layers of width {config.hidden_size}"
        dtype = str(self.model.norm.weight.dtype).removeprefix("torch.")
        weights = f", weights in {self.quantize}" if self.quantize else ""
        link = type(self.inner_link).__name__ if self.inner_link is not None else "no inner link"
        return f"{family}, {shape}, {dtype}{weights} on {self.device}, {link}"

    # Prompts

    def embed(self, prompts: Sequence[Prompt]) -> list[torch.Tensor]:
        """B prompts -> the embeddings of each, (T_b, D)."""
        return [self.embed_pieces(self.tokens(prompt)) for prompt in prompts]

    def tokens(self, pieces: Prompt) -> list[torch.Tensor]:
        """The pieces with texts as token ids; texts that touch are one text to the tokenizer.

        No special tokens are added to a text: a chat template writes its own.
        Warns of a prompt that is longer than what the model was made for. It is read all the same, as by transformers.
        """
        row: list[torch.Tensor] = []
        text = ""
        for piece in pieces:
            if isinstance(piece, str):
                text += piece
                continue
            if text:
                row.append(self.token_ids(text))
                text = ""
            row.append(piece)
        if text:
            row.append(self.token_ids(text))
        longest = self.model.config.positions
        if longest and sum(map(len, row)) > longest:
            family = type(self.model).__name__
            warn_once(
                f"a prompt is longer than the {longest} positions that this {family} was made for, so "
                "what follows may be worthless: shorten the question, or lower --latent-steps or "
                "--max-new-tokens"
            )
        return row

    def token_ids(self, text: str) -> torch.Tensor:
        """The ids (n,) of a text."""
        return torch.tensor(self.tokenizer.encode(text), dtype=torch.long)

    def embed_ids(self, ids: torch.Tensor) -> torch.Tensor:
        """Token ids (n,) -> their embeddings (n, D); InputError if there is none for one.

        This is not asked of a whole tokenizer, since many hold ids that their models never learned.
        """
        rows = self.model.config.vocab_size
        for wrong in ids[(ids < 0) | (ids >= rows)].tolist():
            token = self.tokenizer.fast.id_to_token(wrong) if wrong >= 0 else None
            if token is None:
                raise InputError(f"token ids hold {wrong}, expected 0 to {rows - 1}")
            raise InputError(
                f"the text has token {wrong}, {token!r}, but the agent has embeddings for {rows}: "
                "fetch its tokenizer.json and weights again, or leave that token out"
            )
        return self.model.embed(ids.to(self.model.norm.weight.device))

    def embed_pieces(self, pieces: list[torch.Tensor]) -> torch.Tensor:
        """Token ids and latents -> (T, D).

        Latents enter as they are, without the scale or norm that a family may give its token embeddings.
        """
        like = self.model.norm.weight  # has the dtype and the device of the model
        embedded = []
        for piece in pieces:
            if piece.is_floating_point():
                embedded.append(piece.to(like))
            else:
                embedded.append(self.embed_ids(piece))
        return torch.cat(embedded)

    # Reading

    def read(self, prompts: Sequence[Prompt], room: int = 0, copies: int = 1) -> Reading:
        """Read B prompts for writing: S positions are those of the longest one, and the room after it.

        copies   rows for each prompt (k), which is read once for all of them
        """
        rows = self.embed(prompts)
        S = max(map(len, rows)) + room
        x, positions = left_pad(rows)
        cache = self.make_cache(len(rows) * copies, S)
        first = first_rows(cache, len(rows)) if copies > 1 else cache
        states = self.model(x, positions, first, last=1)
        next_positions = positions[:, -1:] + 1
        if copies > 1:
            repeat_rows(cache, first, copies)
            states = states.repeat_interleave(copies, 0)
            next_positions = next_positions.repeat_interleave(copies, 0)
        return Reading(states, next_positions, cache, S)

    def read_after_prefix(self, prompts: Sequence[Prompt], room: int = 0) -> Reading:
        """Read B prompts for thinking, without what each has in common with the one that was read last.

        This is prefix caching: the keys and values of what two prompts share at their beginning are the same.
        """
        pieces = [self.tokens(prompt) for prompt in prompts]
        rows = [self.embed_pieces(own) for own in pieces]
        beginnings = [first_text(own) for own in pieces]
        S = max(map(len, rows)) + room
        prefix = self.take_prefix(len(rows), S)
        known = []  # tokens of each prompt that the cache holds already
        for row, beginning, previous in zip(rows, beginnings, prefix.beginnings, strict=True):
            shared = commonprefix([beginning, previous])
            known.append(min(len(shared), len(row) - 1))  # the last token is read for its state
        for c in prefix.cache:
            if isinstance(c, KVCache):
                c.filled = max(known)
        unread = [row[n:] for row, n in zip(rows, known, strict=True)]
        starts = torch.tensor(known, device=rows[0].device)[:, None]
        x, positions = left_pad(unread, starts)
        states = self.model(x, positions, prefix.cache, last=1)
        self.keep_prefix(prefix._replace(beginnings=beginnings))
        return Reading(states, positions[:, -1:] + 1, prefix.cache, S)

    def read_with_gradient(self, prompts: Sequence[Prompt], last: int = 1) -> Reading:
        """Read B prompts in training; gives the last states (B, last, D) of each.

        A cache that is written in place could not be differentiated: this one grows by concatenation, and needs no
        room. The text before a prompt's first latents has no gradient, and is read without a graph.
        """
        pieces = [self.tokens(prompt) for prompt in prompts]
        rows = [self.embed_pieces(own) for own in pieces]
        x, positions = left_pad(rows)
        cache = self.model.make_cache(len(rows))
        T = x.shape[1]
        since_latents = max(map(length_since_latents, pieces))
        start = T - since_latents if x.requires_grad and since_latents > last else 0
        if start:
            with torch.no_grad():
                self.model(x[:, :start], positions[:, :start], cache, last=1)
        states = self.model(x[:, start:], positions[:, start:], cache, last=last)
        return Reading(states, positions[:, -1:] + 1, cache, T)

    def take_prefix(self, B: int, S: int) -> PrefixCache:
        """What was read last, if its cache serves for B prompts and S positions; else an empty cache.

        It has to be of the same model. So all is read again if a weight was changed, and as long as a module has a
        hook, which may do something else each time.
        """
        previous = self.prefix_cache
        self.drop_prefix()  # until the cache is whole again
        model_marks = marks(self.model)
        if previous is not None and model_marks is not None:
            is_same_model = model_marks == previous.model_marks
            if is_same_model and len(previous.beginnings) == B and previous.S >= S:
                return previous
        return PrefixCache([[] for _ in range(B)], self.make_cache(B, S), model_marks, S)

    def keep_prefix(self, prefix: PrefixCache) -> None:
        """Keep what was read, if its cache holds all positions (no windows, no states) and may be kept (no offload)."""
        holds_all = all(isinstance(c, KVCache) for c in prefix.cache)
        if holds_all and not self.offload and prefix.model_marks is not None:
            self.prefix_cache = prefix

    def make_cache(self, B: int, S: int) -> list:
        """An empty cache for B rows of S positions. With graphs it reuses the memory of what was read last."""
        self.drop_prefix()
        self.steps.model = self.model  # which may have been replaced
        return self.steps.make_cache(B, S)

    def drop_prefix(self) -> None:
        """Let go of what was read last."""
        self.prefix_cache = None

    def release(self) -> None:
        """Free all memory that is kept from question to question."""
        self.drop_prefix()
        self.steps.release()

    def kept_bytes(self) -> int:
        """What is kept from question to question, in bytes. A cache that needs more memory is given this, too."""
        kept = self.steps.base or (self.prefix_cache.cache if self.prefix_cache else [])
        tensors = [getattr(layer, name) for layer in kept for name in layer.tensors]
        return sum(tensor.nbytes for tensor in tensors)

    # Thinking

    def think(
        self,
        prompts: Sequence[Prompt],
        m: int,
        callback: Callable = no_op,
        gradient: bool = False,
    ) -> torch.Tensor:
        """m latent steps after B prompts -> hidden states H (B, m, D).

        A state becomes the agent's own next input through its inner link, R_in. H holds the states themselves: whoever
        sends them on applies R_in once more (recurse.send_latents).
        """
        if m == 0:
            return self.model.norm.weight.new_zeros(len(prompts), 0, self.model.config.hidden_size)
        link = self.inner_link
        assert link is not None, "System.check_links refuses a base model"
        reading = (
            self.read_with_gradient(prompts) if gradient else self.read_after_prefix(prompts, m)
        )
        h = reading.states  # (B, 1, D)
        cache = reading.cache
        callback()

        def next_input(h: torch.Tensor) -> torch.Tensor:
            return link(h).to(h.dtype)

        def step(
            x: torch.Tensor, positions: torch.Tensor
        ) -> tuple[list[torch.Tensor], torch.Tensor]:
            h = self.model(x, positions, cache, last=1)  # (B, 1, D)
            return [next_input(h), positions + 1], h

        inputs = [next_input(h), reading.next_positions]
        kind = ("latent", link)
        _, others = self.steps.take(step, inputs, m - 1, cache, callback, kind)
        return torch.cat([h, *others], 1)

    # Weights

    @contextmanager
    def at_work(self) -> Iterator[None]:
        """Within, the weights are on the agent's device; an offloaded agent has them in main memory otherwise."""
        weights = [weight for _, weight in named_weights(self.model)] if self.offload else []
        resting = [weight.data for weight in weights]
        try:
            for weight in weights:
                weight.data = weight.data.to(self.device, copy=True)
            yield
        finally:
            for weight, data in zip(weights, resting, strict=True):
                weight.data = data


def marks(model: Llama) -> list[tuple] | None:
    """What tells whether a model was changed: the state of each of its tensors.

    None if a module has a forward hook, which may do something else each time. A change in place of `weight.data` is
    not counted by torch: Agent.drop_prefix is needed after one.
    """
    if has_global_hook():
        return None
    found = []
    for module in model.modules():
        if has_hook(module):
            return None
        for tensor in (*module._parameters.values(), *module._buffers.values()):
            if tensor is not None:
                found.append(state_of(tensor))
    return found


def first_text(pieces: list[torch.Tensor]) -> list[int]:
    """The token ids that a prompt begins with."""
    return [] if pieces[0].is_floating_point() else pieces[0].tolist()


def length_since_latents(pieces: list[torch.Tensor]) -> int:
    """How many positions of a prompt its first latents and all that follows take; 0 if it has none."""
    for i, piece in enumerate(pieces):
        if piece.is_floating_point():
            return sum(map(len, pieces[i:]))
    return 0


def load_agent(
    source: str | Path,
    task: str,
    device: torch.device | str,
    dtype: torch.dtype | None,
    offload: bool = False,
    fast: bool = False,
    untrained: bool = False,
    role: str = "agent",
    quantize: str | None = None,
) -> Agent:
    """The agent of a folder or repository in the released layout.

    task       math, choice or code: which inner link is taken if there are several
    offload    keep the weights in main memory while the agent rests
    fast       put it on the fast path (fast/), which needs weights that stay where they are: not with `offload`
    untrained  give it a new inner link: the folder may be that of a base model
    role       its name in the error message if there is no such folder or repository
    quantize   keep the weights of its linears in int8 or int4 (quantize.py); None leaves them in `dtype`
    Raises InputError if the folder is not whole, on an unknown `quantize`, and on `fast` with `offload`.
    """
    if fast and offload:
        raise InputError("fast needs weights that stay where they are: leave out offload or fast")
    kind = usable_kind(quantize)
    folder = checkpoint_folder(source, *agent_patterns(task), role=role)
    model = load_model(folder, device, dtype, "cpu" if offload else None, kind)
    tokenizer = load_tokenizer(folder)
    D = model.config.hidden_size
    inner_link: InnerLink | FusedInnerLink | None
    if untrained:
        inner_link = InnerLink(D).to(device)
    else:
        inner_link = load_inner_link(folder, task, D, device, model.norm.weight.dtype)
    generation_config = load_generation_config(folder, tokenizer)
    agent = Agent(model, tokenizer, inner_link, generation_config, device, offload, source, kind)
    if fast:
        make_fast(agent)
    return agent


def make_fast(agent: Agent) -> None:
    """Put an agent on the fast path (fast/), in place."""
    prepare(agent.model)
    if isinstance(agent.inner_link, InnerLink):
        agent.inner_link = fused(agent.inner_link)
    if agent.device.type == "cuda":
        agent.steps = Graphs(agent.model)
