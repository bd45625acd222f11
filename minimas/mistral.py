"""Mistral, equal to transformers' MistralForCausalLM.

What differs from Llama: every layer attends to a sliding window (config.json's sliding_window; null means none), so its
cache never holds more than that. The head is not tied to the embeddings, rope is not scaled.

Letters as in llama.py.
"""

from dataclasses import dataclass

from torch import nn

from . import llama
from .cache import attention_cache
from .llama import Attention, Block, RMSNorm, rope_frequencies, rotation


@dataclass(kw_only=True)
class Config(llama.Config):
    sliding_window: int | None = None


class Mistral(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = c = config
        self.embed_tokens = nn.Embedding(c.vocab_size, c.hidden_size)
        self.layers = nn.ModuleList(Block(c, Attention(c)) for _ in range(c.num_hidden_layers))
        self.norm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.lm_head = nn.Linear(c.hidden_size, c.vocab_size, bias=False)
        self.register_buffer("frequency", rope_frequencies(c.rope_parameters, c.head_dim), persistent=False)

    def make_cache(self, B, S=None):
        c = self.config
        return [attention_cache(B, c.num_key_value_heads, S, c.head_dim, self.norm.weight, c.sliding_window) for _ in self.layers]

    def embed(self, ids):
        return self.embed_tokens(ids)

    def forward(self, x, positions, cache):
        rope, mask = rotation(positions, self.frequency), cache[0].mask(positions)
        for layer, layer_cache in zip(self.layers, cache):
            x = layer(x, positions, rope, mask, layer_cache)
        return self.norm(x)

    def logits(self, h):
        return self.lm_head(h)
