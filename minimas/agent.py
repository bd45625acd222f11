"""An agent: a frozen decoder that reads prompts of text and latents, thinks in latents, and writes text.

Letters: B prompts, T their tokens, D the agent's width, m latent steps.
"""

from contextlib import contextmanager
from itertools import groupby

import torch
import torch.nn.functional as F

from .cache import grow
from .load import load_generation, load_inner_link, load_model, load_tokenizer
from .sample import sample, uniform


def silent(*_):
    """Hears everything and says nothing: the default of callbacks."""


def no_reply(b, ids):
    """The default of Agent.decode: nothing is put behind any token."""
    return []


def left_pad(rows):
    """B embeddings (T_b, D) -> x (B, T, D), zeros on the left, and positions (B, T), negative there."""
    T = max(len(row) for row in rows)
    x = torch.stack([F.pad(row, (0, 0, T - len(row), 0)) for row in rows])
    padding = torch.tensor([[T - len(row)] for row in rows], device=x.device)
    return x, torch.arange(T, device=x.device) - padding


class Agent:
    """A frozen decoder with its tokenizer, its inner link, and how it generates (load.Generation)."""

    def __init__(self, model, tokenizer, inner_link, generation, offload=False):
        self.model, self.tokenizer, self.inner_link, self.generation = model, tokenizer, inner_link, generation
        self.offload = offload

    @property
    def device(self):
        return self.inner_link.proj1.weight.device

    def embed(self, prompts, special=False):
        """B prompts, lists of pieces -> embeddings (B, T, D) and positions (B, T), left-padded.

        A piece is a text, token ids (n,), or latents (m, D), which enter as they are, without the scale or norm a family may
        give its token embeddings. A chat template writes its special tokens itself; `special` adds a plain text's.
        """
        w, rows = self.model.embed_tokens.weight, []
        for pieces in prompts:
            row = []
            for is_text, group in groupby(pieces, key=lambda piece: isinstance(piece, str)):
                if is_text:  # texts that touch are one text to the tokenizer
                    group = [torch.tensor(self.tokenizer.encode("".join(group), special), dtype=torch.long)]
                row += [piece.to(w) if piece.is_floating_point() else self.model.embed(piece.to(w.device)) for piece in group]
            rows.append(torch.cat(row))
        return left_pad(rows)

    def think(self, x, positions, m, tick=silent):
        """m latent steps after the prompts -> hidden states H (B, m, D); each goes back in through the inner link.

        Where gradients are recorded (training) the cache grows by concatenation, else it is allocated once.
        """
        B, T, _ = x.shape
        cache = self.model.make_cache(B, None if torch.is_grad_enabled() else T + m)
        H = []
        for _ in range(m):
            h = self.model(x, positions, cache)[:, -1:]  # (B, 1, D)
            H.append(h)
            x, positions = self.inner_link(h).to(h.dtype), positions[:, -1:] + 1
            tick()
        return torch.cat(H, 1) if H else x[:, :0]

    def decode(self, x, positions, seeds, settings, tick=silent, reply=no_reply):
        """B lists of the token ids that follow the prompts, the one that ended a text included.

        seeds: one integer a prompt; settings: a recurse.Settings (max_new_tokens, temperature, top_p, top_k).
        reply(b, ids) gives the ids that are put behind row b's last token, such as a tool's result; mostly none. A row waits
        for nobody: the others go on by one token while it reads its reply.
        """
        cache = self.model.make_cache(len(x), x.shape[1] + settings.max_new_tokens)
        top_k = self.generation.top_k if settings.top_k is None else settings.top_k
        seeds, ended = torch.tensor(seeds, device=x.device), [False] * len(x)
        ids, next_position = [[] for _ in seeds], positions[:, -1:] + 1
        for n in range(settings.max_new_tokens):
            scores = self.model.logits(self.model(x, positions, cache)[:, -1])  # (B, vocabulary)
            tokens = sample(scores, uniform(seeds, n), settings.temperature, top_k, settings.top_p).tolist()
            tick()
            new = []
            for b, token in enumerate(tokens):
                new.append([] if ended[b] else [token, *reply(b, ids[b] + [token])])
                ids[b] += new[b]
                ended[b] |= token in self.generation.eos_ids
            if all(ended):
                break
            x, positions = left_pad([self.model.embed(torch.tensor(row, dtype=torch.long, device=x.device)) for row in new])
            if x.shape[1] > 1:
                grow(cache, x.shape[1] - 1)
            lengths = torch.tensor([[len(row)] for row in new], device=x.device)
            positions, next_position = torch.where(positions < 0, -1, positions + next_position), next_position + lengths
        return ids

    def write(self, prompts, seeds, settings, tick=silent):
        """Texts that follow B prompts."""
        return [self.tokenizer.decode(row) for row in self.decode(*self.embed(prompts), seeds, settings, tick)]

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


def load_agent(source, task, device, dtype, offload=False):
    """Agent of a folder or repository in the released layout; `offload` keeps its weights in main memory while it rests."""
    model, tokenizer = load_model(source, device, dtype, "cpu" if offload else None), load_tokenizer(source)
    inner_link = load_inner_link(source, task, model.config.hidden_size, device)
    return Agent(model, tokenizer, inner_link, load_generation(source, tokenizer), offload)
