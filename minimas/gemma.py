"""Gemma 3 (text), equal to transformers' Gemma3ForCausalLM.

What differs from Llama:
    norms scale by 1 + w, in float32 before the cast; there are four in a block, before and after each sublayer
    token embeddings are scaled by sqrt(D), rounded to the weights' dtype; vectors that are injected are not
    q and k are normalised per head, and scores scaled by query_pre_attn_scalar instead of d
    five layers of six attend to a sliding window and rotate by a base of their own; the sixth sees all
    the MLP's gate is a GELU (tanh form)

Notation as in llama.py: B batch, T tokens, T' of them asked for, D width, d head width.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from . import llama
from .cache import AttentionCache, LayerCache, masks
from .common import upcast
from .llama import Rope, rope_cos_sin, rope_frequencies


@dataclass(kw_only=True)
class Config(llama.Config):
    """The fields that Gemma 3 has besides Llama's."""

    query_pre_attn_scalar: float = 256
    sliding_window: int = 4096
    layer_types: Sequence[str] = ()  # per layer; by default every sixth is full_attention
    sliding_window_pattern: int = 6
    tie_word_embeddings: bool = True
    # Older config.json files leave out what was the default then.
    vocab_size: int = 262208
    num_attention_heads: int = 8
    num_key_value_heads: int = 4
    head_dim: int = 256
    rms_norm_eps: float = 1e-6

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.layer_types:
            n = self.num_hidden_layers
            interval = self.sliding_window_pattern
            self.layer_types = ["sliding_attention"] * n
            for i in range(interval - 1, n, interval):
                self.layer_types[i] = "full_attention"

    @property
    def windows(self) -> Sequence[int | None]:
        window = {"sliding_attention": self.sliding_window, "full_attention": None}
        return [window[kind] for kind in self.layer_types]


class OffsetRMSNorm(llama.RMSNorm):
    """Llama's norm, but it scales by 1 + w, and before the cast."""

    def __init__(self, D: int, eps: float) -> None:
        super().__init__(D, eps)
        self.weight = nn.Parameter(torch.zeros(D))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gain = 1 + upcast(self.weight)
        y = F.rms_norm(upcast(x), gain.shape, gain, self.eps)
        return y.to(x.dtype)


class Attention(llama.Attention):
    """Llama's, with a norm on each head of q and k; the scale of the scores is the config's."""

    def __init__(self, c: Config) -> None:
        super().__init__(c)
        self.scale = c.query_pre_attn_scalar**-0.5
        self.q_norm = OffsetRMSNorm(self.d, c.rms_norm_eps)
        self.k_norm = OffsetRMSNorm(self.d, c.rms_norm_eps)

    def heads(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        q, k, v = super().heads(x)
        return self.q_norm(q), self.k_norm(k), v


class MLP(llama.MLP):
    """Llama's with another activation: W_down (gelu(W_gate x) * W_up x)."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate, up = self.gate_up(x)
        return self.down_proj(F.gelu(gate, approximate="tanh") * up)


class Block(nn.Module):
    """Four norms: before and after attention, before and after the MLP."""

    def __init__(self, c: Config) -> None:
        super().__init__()
        self.input_layernorm = OffsetRMSNorm(c.hidden_size, c.rms_norm_eps)
        self.self_attn = Attention(c)
        self.post_attention_layernorm = OffsetRMSNorm(c.hidden_size, c.rms_norm_eps)
        self.pre_feedforward_layernorm = OffsetRMSNorm(c.hidden_size, c.rms_norm_eps)
        self.mlp = MLP(c)
        self.post_feedforward_layernorm = OffsetRMSNorm(c.hidden_size, c.rms_norm_eps)

    def forward(
        self,
        x: torch.Tensor,
        positions: torch.Tensor,
        rope: Rope,
        mask: torch.Tensor | None,
        cache: AttentionCache,
    ) -> torch.Tensor:
        """x (B, T, D) -> (B, T', D)."""
        y = self.self_attn(self.input_layernorm(x), positions, rope, mask, cache)  # (B, T', D)
        x = x[:, -y.shape[1] :]  # (B, T', D): the last layer computes only what is asked for
        x = x + self.post_attention_layernorm(y)
        y = self.mlp(self.pre_feedforward_layernorm(x))
        return x + self.post_feedforward_layernorm(y)


class Gemma3(llama.Llama):
    """The decoder, with Llama's methods and shapes: make_cache and logits are the same, embed and forward differ."""

    config: Config
    frequency_sliding_attention: torch.Tensor  # (d/2,) float32
    frequency_full_attention: torch.Tensor  # (d/2,) float32

    def __init__(self, config: Config) -> None:
        nn.Module.__init__(self)  # not Llama's: each of its parts is another one here
        self.config = c = config
        self.embed_tokens = nn.Embedding(c.vocab_size, c.hidden_size)
        self.layers = nn.ModuleList(Block(c) for _ in range(c.num_hidden_layers))
        self.norm = OffsetRMSNorm(c.hidden_size, c.rms_norm_eps)
        self.lm_head = nn.Linear(c.hidden_size, c.vocab_size, bias=False)
        for kind in ("sliding_attention", "full_attention"):
            frequency = rope_frequencies(c.rope_parameters[kind], c.head_dim)
            self.register_buffer(f"frequency_{kind}", frequency, persistent=False)

    def embed(self, ids: torch.Tensor) -> torch.Tensor:
        """Token ids (...) -> embeddings (..., D), scaled by sqrt(D)."""
        x = self.embed_tokens(ids)
        scale = torch.tensor(x.shape[-1] ** 0.5, dtype=x.dtype)  # rounded, as in transformers
        return x * scale.item()

    def forward(
        self,
        x: torch.Tensor,
        positions: torch.Tensor,
        cache: Sequence[LayerCache],
        last: int | None = None,
    ) -> torch.Tensor:
        last = last or x.shape[1]
        kinds = self.of_each_layer(self.config.layer_types)
        rope = {}
        for kind in set(kinds):
            rope[kind] = rope_cos_sin(positions, self.get_buffer(f"frequency_{kind}"))
        layer_masks = masks(cache, positions, last)
        for layer, kind, mask, layer_cache in zip(
            self.layers, kinds, layer_masks, cache, strict=True
        ):
            x = layer(x, positions, rope[kind], mask, layer_cache)
        return self.norm(x[:, -last:])
