"""Writing text: the batched decoding loop of an agent, with its sampling, the replies of tools, and a cache that grows.

Each step takes one token per row. Between steps, rows whose text has ended leave the batch, and the reply of a tool is
put after the token that asked for it.

Notation: B prompts, T their tokens, D the agent's width, n random numbers of a text, k texts for each prompt,
V vocabulary.
"""

from collections.abc import Callable, Collection, Iterator, Sequence
from typing import NamedTuple

import torch

from .agent import Agent, Prompt, Reading, check_finite, left_pad
from .cache import KVCache, keep_rows
from .common import no_op
from .sample import sample, uniforms
from .settings import CompletedSettings
from .steps import round_up

UNIFORMS = 2048  # a text's random numbers are made before it, a multiple of this many: few sizes, few graphs
REPLY_ROOM = 512  # positions: a cache that is too short for a reply grows by a multiple of this, for others to come

# The number of a text and its ids -> ids to insert after its last token
Reply = Callable[[int, list[int]], list[int]]


def generate(
    agent: Agent,
    prompts: Sequence[Prompt],
    seeds: Sequence[int],
    settings: CompletedSettings,
    callback: Callable = no_op,
    reply: Reply | None = None,
) -> list[list[int]]:
    """Write after B prompts -> a list of token ids for each text.

    A text ends with one of the generation config's eos_ids, which is part of it, or after settings.max_new_tokens.
    InputError if a score is not finite.
    seeds     an integer for each text: k of them for each prompt, which is read once for all k
    settings  of which max_new_tokens, temperature, top_p and top_k are used
    reply     gives what follows a text's last token, such as a tool's result; mostly nothing. While one row reads its
              reply, the others go on by a token each.
    """
    batch = Batch(agent, prompts, seeds, settings)
    for _ in batch.write(callback, reply):
        pass
    return batch.ids


class Inputs(NamedTuple):
    """The loop state: what the next step reads, by row."""

    x: torch.Tensor  # (rows, T, D): the last token, and a reply after it
    positions: torch.Tensor  # (rows, T)
    random_numbers: torch.Tensor  # (rows, n), uniform in [0, 1)
    token_index: torch.Tensor  # (rows, 1): which of the random numbers the next token takes


class Batch:
    """Texts while they are written.

    ids       the token ids of each text so far
    going_on  the numbers of the texts that have not ended
    rows      for each row of the tensors the number of its text; None: an ended row that fills the batch up
    cache     what was read and written, by row
    S         positions that the cache must have
    inputs    of the next step
    tokens    (rows, times) that the last steps sampled, not yet part of the texts
    left      tokens that may still follow
    """

    def __init__(
        self,
        agent: Agent,
        prompts: Sequence[Prompt],
        seeds: Sequence[int],
        settings: CompletedSettings,
    ) -> None:
        self.agent = agent
        self.model = agent.model
        self.temperature = settings.temperature
        self.top_k = agent.generation_config.top_k if settings.top_k is None else settings.top_k
        self.top_p = settings.top_p
        self.ids: list[list[int]] = [[] for _ in seeds]
        self.going_on = frozenset(range(len(seeds)))
        self.rows: list[int | None] = list(range(len(seeds)))
        copies, rest = divmod(len(seeds), len(prompts))
        assert rest == 0, "k seeds for each prompt"
        reading = agent.read(prompts, settings.max_new_tokens, copies)
        self.cache = reading.cache
        self.S = reading.S
        is_greedy = self.temperature == 0  # it looks at no random number
        n = 1 if is_greedy else round_up(settings.max_new_tokens, UNIFORMS)
        self.inputs, self.tokens = self.first_tokens(reading, uniforms(seeds, n))
        self.left = settings.max_new_tokens - 1

    def write(
        self, callback: Callable = no_op, reply: Reply | None = None
    ) -> Iterator[frozenset[int]]:
        """Write all texts to their ends; yields between steps the numbers of the texts that go on.

        There the caller may let some of them `end`. callback, reply: see `generate`.
        """
        callback()
        while True:
            self.append_tokens()
            if self.left == 0:
                self.end(self.going_on)
            yield self.going_on
            if not self.going_on:
                return
            self.drop_ended()
            if reply:
                self.insert_replies(reply)
            times = 1 if reply else min(self.agent.steps.sync_every, self.left)
            self.take_steps(times, callback)
            self.left -= times

    def end(self, numbers: Collection[int]) -> None:
        """Let the texts of these numbers end where they are."""
        self.going_on = self.going_on.difference(numbers)

    # Steps

    def first_tokens(
        self, reading: Reading, random_numbers: torch.Tensor
    ) -> tuple[Inputs, torch.Tensor]:
        """The next step's Inputs, and the tokens (rows, 1) that are sampled after the prompts.

        random_numbers (rows, n)
        """
        positions = reading.next_positions
        random_numbers = random_numbers.to(self.agent.device)
        token_index = torch.zeros_like(positions)
        inputs, tokens = self.sample_next(reading.states, positions, random_numbers, token_index)
        return inputs, tokens[:, None]

    def sample_next(
        self,
        h: torch.Tensor,
        positions: torch.Tensor,
        random_numbers: torch.Tensor,
        token_index: torch.Tensor,
    ) -> tuple[Inputs, torch.Tensor]:
        """States (rows, 1, D) -> the next step's Inputs, and the tokens (rows,) that are sampled after them.

        positions (rows, 1) are those of the sampled tokens.
        """
        u = random_numbers.gather(1, token_index)[:, 0] if self.temperature > 0 else None  # (rows,)
        logits = self.model.logits(h[:, 0])  # (rows, V)
        tokens = sample(logits, u, self.temperature, self.top_k, self.top_p)  # (rows,)
        ids = tokens[:, None].clamp(min=0)  # -1: not finite, which `append_tokens` will find
        x = self.model.embed(ids)  # (rows, 1, D)
        return Inputs(x, positions, random_numbers, token_index + 1), tokens

    def take_steps(self, times: int, callback: Callable) -> None:
        """Sample `times` more tokens for each row."""
        cache = self.cache  # a graph is captured over these very objects

        def step(
            x: torch.Tensor,
            positions: torch.Tensor,
            random_numbers: torch.Tensor,
            token_index: torch.Tensor,
        ) -> tuple[Inputs, torch.Tensor]:
            h = self.model(x, positions, cache, last=1)
            return self.sample_next(h, positions[:, -1:] + 1, random_numbers, token_index)

        n = self.inputs.random_numbers.shape[1]
        kind = ("text", self.temperature, self.top_k, self.top_p, n)
        state, tokens = self.agent.steps.take(step, self.inputs, times, cache, callback, kind)
        self.inputs = Inputs(*state)
        self.tokens = torch.stack(tokens, 1)

    # Between steps

    def append_tokens(self) -> None:
        """Append the tokens to the texts, each up to one that ends it."""
        what = f"the scores that {type(self.model).__name__} gives to tokens"
        written = self.tokens.tolist()  # here the host waits for the device; in steps it does not
        ended = []
        for i, b in enumerate(self.rows):
            if b is None:
                continue
            check_finite(-1 not in written[i], what, self.model)
            end = self.end_of(written[i])
            self.ids[b] += written[i][:end]
            if end is not None:
                ended.append(b)
        self.end(ended)

    def end_of(self, ids: list[int]) -> int | None:
        """How many of these ids belong to the text, if one of them ends it."""
        for n, token in enumerate(ids, 1):
            if token in self.agent.generation_config.eos_ids:
                return n
        return None

    def drop_ended(self) -> None:
        """Let the rows of ended texts leave the batch; some may stay, numbered None, to fill it up."""
        unfinished = [i for i, b in enumerate(self.rows) if b in self.going_on]
        ended = [i for i, b in enumerate(self.rows) if b not in self.going_on]
        kept = self.agent.steps.rows_to_keep(len(unfinished), len(self.rows))
        fillers = ended[: kept - len(unfinished)]
        stay = sorted(unfinished + fillers)
        if len(stay) < len(self.rows):
            index = torch.tensor(stay, device=self.inputs.x.device)
            keep_rows(self.cache, index)
            self.inputs = Inputs(*[value[index] for value in self.inputs])
        for i in ended:
            self.rows[i] = None
        self.rows = [self.rows[i] for i in stay]

    def insert_replies(self, reply: Reply) -> None:
        """Put replies after the last tokens, in the texts and in the next inputs."""
        replies = []
        for b in self.rows:
            replies.append([] if b is None else reply(b, self.ids[b]))
        if not any(replies):
            return
        self.S += max(map(len, replies))
        self.make_room()
        x, positions, *others = self.inputs
        rows = []
        for b, last_token, ids in zip(self.rows, x, replies, strict=True):
            if b is not None:
                self.ids[b] += ids
            embedded = self.agent.embed_ids(torch.tensor(ids, dtype=torch.long))
            rows.append(torch.cat([last_token, embedded]))
        self.inputs = Inputs(*left_pad(rows, positions), *others)

    def make_room(self) -> None:
        """Let the cache grow if it has fewer than S positions."""
        capacities = [c.capacity for c in self.cache if isinstance(c, KVCache)]
        missing = self.S - min(capacities, default=self.S)
        if missing > 0:
            self.agent.steps.grow_cache(self.cache, round_up(missing, REPLY_ROOM))
