"""An agent: a frozen decoder that reads prompts of text and latents, thinks in latents, and writes text.

Letters: B prompts, T their tokens, D the agent's width, m latent steps.
"""

from itertools import groupby

import torch
import torch.nn.functional as F

from .load import load_generation, load_inner_link, load_model, load_tokenizer
from .sample import sample, uniform


def silent(*_):
    """Hears everything and says nothing: the default of the callbacks below."""


def left_pad(rows):
    """B embeddings (T_b, D) -> x (B, T, D), zeros on the left, and positions (B, T), negative there."""
    T = max(len(row) for row in rows)
    x = torch.stack([F.pad(row, (0, 0, T - len(row), 0)) for row in rows])
    padding = torch.tensor([[T - len(row)] for row in rows], device=x.device)
    return x, torch.arange(T, device=x.device) - padding


class Agent:
    """A frozen decoder with its tokenizer, its inner link, and how it generates (load.Generation)."""

    def __init__(self, model, tokenizer, inner_link, generation):
        self.model, self.tokenizer, self.inner_link, self.generation = model, tokenizer, inner_link, generation

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
        """m latent steps after the prompts -> hidden states H (B, m, D); each goes back in through the inner link."""
        B, T, _ = x.shape
        cache = self.model.make_cache(B, None if torch.is_grad_enabled() else T + m)
        H = []
        for _ in range(m):
            h = self.model(x, positions, cache)[:, -1:]  # (B, 1, D)
            H.append(h)
            x, positions = self.inner_link(h).to(h.dtype), positions[:, -1:] + 1
            tick()
        return torch.cat(H, 1) if H else x[:, :0]

    def decode(self, x, positions, seeds, settings, tick=silent):
        """B lists of new token ids after the prompts, the one that ended a text included.

        seeds: one integer a prompt; settings: a recurse.Settings (max_new_tokens, temperature, top_p, top_k).
        """
        B, T, _ = x.shape
        cache = self.model.make_cache(B, T + settings.max_new_tokens)
        top_k = self.generation.top_k if settings.top_k is None else settings.top_k
        seeds, eos = (torch.tensor(v, dtype=torch.long, device=x.device) for v in (seeds, self.generation.eos_ids))
        ids, done = [], torch.zeros(B, dtype=torch.bool, device=x.device)
        for n in range(settings.max_new_tokens):
            scores = self.model.logits(self.model(x, positions, cache)[:, -1])  # (B, vocabulary)
            ids.append(sample(scores, uniform(seeds, n), settings.temperature, top_k, settings.top_p))
            done |= torch.isin(ids[-1], eos)
            tick()
            if done.all():
                break
            x, positions = self.model.embed(ids[-1][:, None]), positions[:, -1:] + 1
        return [self.up_to_end(row) for row in torch.stack(ids, 1).tolist()]

    def up_to_end(self, ids):
        return next((ids[:i + 1] for i, token in enumerate(ids) if token in self.generation.eos_ids), ids)


def load_agent(folder, task, device, dtype):
    """Agent of a folder in the released layout."""
    model, tokenizer = load_model(folder, device, dtype), load_tokenizer(folder)
    inner_link = load_inner_link(folder, task, model.config.hidden_size, device)
    return Agent(model, tokenizer, inner_link, load_generation(folder, tokenizer))
