"""Llama 3: the reference decoder. The other family files say only what they change of this one.

Equals transformers' LlamaForCausalLM on the released checkpoints (model_type `llama`): RMSNorm before each sublayer of
a block, rotary positions (with Llama 3.1's frequency scaling), grouped-query attention, SwiGLU.

The model takes embeddings and returns hidden states after the final norm; the vocabulary is a separate call. A latent
agent needs exactly this split: it is fed with embeddings that correspond to no token, and never asks for a token.

Notation: B batch, T tokens, D width, H query heads, K key/value heads, d head width, S positions that a cache has room
for, `keys` those that the attention of a layer sees. T' is the number of the last tokens that are asked for, T unless
the caller wants fewer.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from .cache import AttentionCache, LayerCache, attention_cache, masks
from .common import InputError, upcast

Rope = tuple[torch.Tensor, torch.Tensor]  # cos and sin, see `rope_cos_sin`


@dataclass(kw_only=True)
class Config:
    """The fields of config.json that the decoder reads, under their names there."""

    vocab_size: int
    hidden_size: int  # D
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int  # H
    num_key_value_heads: int | None = None  # K: H where config.json does not say
    rms_norm_eps: float = 1e-6
    rope_parameters: dict[str, Any]
    head_dim: int | None = None  # d: D / H where config.json does not say
    tie_word_embeddings: bool = False
    # Positions that the model was made for. More of them are possible.
    max_position_embeddings: int | None = None

    def __post_init__(self) -> None:
        self.head_dim = self.head_dim or self.hidden_size // self.num_attention_heads
        self.num_key_value_heads = self.num_key_value_heads or self.num_attention_heads

    @property
    def positions(self) -> int | None:
        """Positions that the model was made for. Linear scaling stretches them, and configs name those of before it."""
        p = self.rope_parameters
        factor = p["factor"] if p.get("rope_type") == "linear" else 1
        return self.max_position_embeddings and int(factor * self.max_position_embeddings)

    @property
    def attention_sizes(self) -> tuple[int, int, int]:
        """H, K and d: how many query heads and key/value heads there are, and how wide each is."""
        assert self.num_key_value_heads is not None and self.head_dim is not None  # __post_init__
        return self.num_attention_heads, self.num_key_value_heads, self.head_dim

    @property
    def windows(self) -> Sequence[int | None]:
        """Per layer how many positions back it sees, itself included; None is all."""
        return [None] * self.num_hidden_layers


class RMSNorm(nn.Module):
    """x (..., D) -> w x / rms(x), (..., D), with rms(x) = sqrt(mean(x^2) + eps)."""

    def __init__(self, D: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(D))
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        # The mean of squares is float32 inside, whatever the dtype of x.
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


def rope_frequencies(rope_parameters: dict[str, Any], d: int) -> torch.Tensor:
    """Angles per position in radians, (d/2,) float32, for d rotated dimensions of a head.

    rope_type is `default`, `linear`, or `llama3`, the scaling that Llama 3.1 was trained with.
    """
    p = rope_parameters
    # On the CPU even while the model is built on the meta device: the buffer must hold numbers.
    exponent = torch.arange(0, d, 2, device="cpu").float() / d  # (d/2,)
    frequency = 1.0 / p["rope_theta"] ** exponent
    if p["rope_type"] == "linear":
        frequency = frequency / p["factor"]
    if p["rope_type"] == "llama3":
        # Waves that turn fewer than low_freq_factor times within the original context are stretched by `factor`, those
        # that turn more than high_freq_factor times stay as they are, and those between are mixed.
        low = p["low_freq_factor"]
        high = p["high_freq_factor"]
        turns = p["original_max_position_embeddings"] * frequency / (2 * math.pi)
        keep = ((turns - low) / (high - low)).clamp(0, 1)
        frequency = keep * frequency + (1 - keep) * frequency / p["factor"]
    return frequency


def rope_cos_sin(positions: torch.Tensor, frequency: torch.Tensor) -> Rope:
    """cos and sin (B, 1, T, d) float32 of the angles at positions (B, T), sin with the sign that `apply_rope` needs."""
    angle = positions[:, None, :, None] * frequency  # (B, 1, T, d/2)
    cos, sin = angle.cos(), angle.sin()
    return torch.cat([cos, cos], -1), torch.cat([-sin, sin], -1)


def apply_rope(x: torch.Tensor, rope: Rope) -> torch.Tensor:
    """Rotate each pair (a, b) = (x_i, x_{i+d/2}) of x (B, heads, T, d) by its angle, to (a cos - b sin, b cos + a sin).

    In float32, back in x's dtype.
    """
    cos, sin = rope
    swapped = upcast(x).roll(x.shape[-1] // 2, -1)  # (B, heads, T, d): a and b have changed places
    rotated = torch.addcmul(x * cos, swapped, sin)  # x cos + swapped sin
    return rotated.to(x.dtype)


def split_heads(x: torch.Tensor, d: int) -> torch.Tensor:
    """x (B, T, heads d) -> (B, heads, T, d)."""
    return x.unflatten(-1, (-1, d)).transpose(1, 2)


def attention_formula(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor, scale: float
) -> torch.Tensor:
    """Softmax attention as a formula, softmax(q k' / sqrt(d)) v. `attend` computes the same, faster.

    q (B, H, T, d), k and v (B, K, keys, d), mask (B, 1, T, keys) -> (B, T, H d)
    scale is 1 / sqrt(d). The mask is True where a query may see a key.
    """
    group = q.shape[1] // k.shape[1]  # query heads that share a key/value head
    k = k.repeat_interleave(group, 1)  # (B, H, keys, d)
    v = v.repeat_interleave(group, 1)  # (B, H, keys, d)
    scores = q @ k.mT * scale  # (B, H, T, keys)
    scores = scores.masked_fill(~mask, -torch.inf)  # a key that is not seen weighs 0
    weights = scores.softmax(-1)  # (B, H, T, keys)
    y = weights @ v  # (B, H, T, d)
    return y.transpose(1, 2).flatten(2)  # (B, T, H d)


def attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None, scale: float
) -> torch.Tensor:
    """Softmax attention of q (B, H, T, d) over k and v (B, K, keys, d) -> (B, T', H d), in torch's fast operator.

    H / K query heads share each head of k and v.
    mask (B, 1, T', keys) comes from cache.masks and has a row for each of the last T' queries; the others are not
    computed. None is plain causal attention without padding: of T tokens over their own keys, or of one token that sees
    all keys.
    """
    if mask is None and q.shape[2] > 1:
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=True)
        return y.transpose(1, 2).flatten(2)  # (B, T, H d)
    if mask is not None:
        q = q[:, :, -mask.shape[2] :]  # (B, H, T', d)
    B, H, last, d = q.shape
    K = k.shape[1]
    if last == 1:  # the H / K heads that share a key become queries of one head: no copies of k, v
        q = q.reshape(B, K, H // K, d)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
        return y.flatten(1)[:, None]  # (B, 1, H d)
    k = k.repeat_interleave(H // K, 1)  # (B, H, keys, d)
    v = v.repeat_interleave(H // K, 1)  # (B, H, keys, d)
    y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)  # (B, H, T', d)
    return y.transpose(1, 2).flatten(2)  # (B, T', H d)


class Attention(nn.Module):
    """Grouped-query attention with rotary positions: x (B, T, D) -> (B, T', D), for the queries that the mask has."""

    def __init__(self, c: Config) -> None:
        super().__init__()
        D = c.hidden_size
        H, K, d = c.attention_sizes
        self.d = d
        self.scale = d**-0.5
        self.q_proj = nn.Linear(D, H * d, bias=False)
        self.k_proj = nn.Linear(D, K * d, bias=False)
        self.v_proj = nn.Linear(D, K * d, bias=False)
        self.o_proj = nn.Linear(H * d, D, bias=False)

    def qkv(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """q (B, T, H d), k and v (B, T, K d)."""
        return self.q_proj(x), self.k_proj(x), self.v_proj(x)

    def heads(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """q (B, H, T, d), k and v (B, K, T, d), not yet rotated."""
        q, k, v = self.qkv(x)
        return split_heads(q, self.d), split_heads(k, self.d), split_heads(v, self.d)

    def forward(
        self,
        x: torch.Tensor,
        positions: torch.Tensor,
        rope: Rope,
        mask: torch.Tensor | None,
        cache: AttentionCache,
    ) -> torch.Tensor:
        q, k, v = self.heads(x)
        q = apply_rope(q, rope)
        k = apply_rope(k, rope)
        k, v = cache.update(k, v, positions)  # (B, K, keys, d)
        y = attend(q, k, v, mask, self.scale)  # (B, T', H d)
        return self.o_proj(y)


class MLP(nn.Module):
    """SwiGLU: x (..., D) -> W_down (silu(W_gate x) * W_up x), (..., D)."""

    def __init__(self, c: Config) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(c.hidden_size, c.intermediate_size, bias=False)
        self.up_proj = nn.Linear(c.hidden_size, c.intermediate_size, bias=False)
        self.down_proj = nn.Linear(c.intermediate_size, c.hidden_size, bias=False)

    def gate_up(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """W_gate x and W_up x, (..., intermediate_size) each."""
        return self.gate_proj(x), self.up_proj(x)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate, up = self.gate_up(x)
        return self.down_proj(F.silu(gate) * up)


class Block(nn.Module):
    """Norm, attention, norm, MLP. Each sublayer is added to the residual stream.

    The attention is an argument, because Qwen2 and Qwen3 differ from Llama in it alone.
    """

    def __init__(self, c: Config, attention: nn.Module) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.self_attn = attention
        self.post_attention_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.mlp = MLP(c)

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
        x = x + y
        return x + self.mlp(self.post_attention_layernorm(x))


class Llama(nn.Module):
    """The decoder: embeddings in, hidden states after the final norm out.

    It makes its own cache (cache.py): masks say which keys a query may see, `update` stores new keys and returns all.
    """

    frequency: torch.Tensor  # (d/2,) float32

    def __init__(
        self, config: Config, attention: Callable[[Config], nn.Module] = Attention
    ) -> None:
        """attention: called with the config, it makes the attention of one block."""
        super().__init__()
        self.config = c = config
        _, _, d = c.attention_sizes
        self.embed_tokens = nn.Embedding(c.vocab_size, c.hidden_size)
        self.layers = nn.ModuleList(Block(c, attention(c)) for _ in range(c.num_hidden_layers))
        self.norm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.lm_head = nn.Linear(c.hidden_size, c.vocab_size, bias=False)
        frequency = rope_frequencies(c.rope_parameters, d)
        self.register_buffer("frequency", frequency, persistent=False)

    def make_cache(self, B: int, S: int | None = None) -> list[LayerCache]:
        """One cache per layer for B rows: S positions allocated at once, or growing and differentiable if S is None.

        Layers may be taken out for an experiment. InputError if the config does not say of which kinds the others are.
        """
        windows = self.of_each_layer(self.config.windows)
        _, K, d = self.config.attention_sizes
        like = self.norm.weight
        return [attention_cache(B, K, S, d, like, window) for window in windows]

    def of_each_layer(self, kinds: Sequence[Any]) -> Sequence[Any]:
        """The kind of each layer that is there, from the kinds of those that the config describes."""
        there = len(self.layers)
        if there == len(kinds):
            return kinds
        if len(set(kinds)) == 1:
            return [kinds[0]] * there
        raise InputError(
            f"the decoder has {there} layers, and its config describes {len(kinds)} of different kinds: "
            "take the same ones out of config.layer_types"
        )

    def embed(self, ids: torch.Tensor) -> torch.Tensor:
        """Token ids (...) -> embeddings (..., D)."""
        return self.embed_tokens(ids)

    def forward(
        self,
        x: torch.Tensor,
        positions: torch.Tensor,
        cache: Sequence[LayerCache],
        last: int | None = None,
    ) -> torch.Tensor:
        """Embeddings x (B, T, D) at positions (B, T), negative on padding -> normed hidden states (B, T, D).

        `last` asks for the states of the last `last` tokens only, (B, last, D): the last layer then computes no others.
        """
        last = last or x.shape[1]
        rope = rope_cos_sin(positions, self.frequency)
        layer_masks = masks(cache, positions, last)
        for layer, mask, layer_cache in zip(self.layers, layer_masks, cache, strict=True):
            x = layer(x, positions, rope, mask, layer_cache)
        return self.norm(x[:, -last:])

    def logits(self, h: torch.Tensor) -> torch.Tensor:
        """Hidden states (..., D) -> scores (..., vocabulary)."""
        return self.lm_head(h)
