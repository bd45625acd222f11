"""Llama 3: the reference decoder. The other family files say only what they change of this one.

Equals transformers' LlamaForCausalLM on the released checkpoints (model_type `llama`): RMSNorm before each sublayer of a
block, rotary positions (with Llama 3.1's frequency scaling), grouped-query attention, SwiGLU.

The model takes embeddings and returns hidden states after the final norm; the vocabulary is a separate call. A latent
agent needs exactly this split: it is fed with embeddings that correspond to no token, and never asks for a token.

Letters: B batch, T tokens, D width, H query heads, K key/value heads, d head width, S keys in the cache.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from .cache import attention_cache, masks
from .common import upcast


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
    rope_parameters: dict
    head_dim: int | None = None  # d: D / H where config.json does not say
    tie_word_embeddings: bool = False
    max_position_embeddings: int | None = (
        None  # positions that the model was made for; more of them are possible
    )

    def __post_init__(self):
        self.head_dim = self.head_dim or self.hidden_size // self.num_attention_heads
        self.num_key_value_heads = self.num_key_value_heads or self.num_attention_heads

    @property
    def windows(self):
        """Per layer how many positions back it sees, itself included; None is all."""
        return [None] * self.num_hidden_layers


class RMSNorm(nn.Module):
    """(..., D) -> w x / rms(x), (..., D)."""

    def __init__(self, D, eps):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(D)), eps

    def forward(self, x):
        return F.rms_norm(
            x, self.weight.shape, self.weight, self.eps
        )  # inside, the mean of squares is float32


def rope_frequencies(rope_parameters, d):
    """Angles per position in radians, (d/2,) float32, for d rotated dimensions of a head.

    rope_type is `default`, `linear`, or `llama3`, the scaling that Llama 3.1 was trained with.
    """
    p = rope_parameters
    # On the CPU even while the model is built on the meta device: the buffer must hold numbers.
    frequency = 1.0 / p["rope_theta"] ** (torch.arange(0, d, 2, device="cpu").float() / d)
    if p["rope_type"] == "linear":
        frequency = frequency / p["factor"]
    if p["rope_type"] == "llama3":
        # Waves that turn fewer than low_freq_factor times within the original context are stretched by `factor`, those
        # that turn more than high_freq_factor times stay as they are, and those between are mixed.
        turns = p["original_max_position_embeddings"] * frequency / (2 * math.pi)
        low, high = p["low_freq_factor"], p["high_freq_factor"]
        keep = ((turns - low) / (high - low)).clamp(0, 1)
        frequency = keep * frequency + (1 - keep) * frequency / p["factor"]
    return frequency


def rope_cos_sin(positions, frequency):
    """cos and sin (B, 1, T, d) float32 of the angles at positions (B, T), sin with the sign that `apply_rope` needs."""
    angle = positions[:, None, :, None] * frequency  # (B, 1, T, d/2)
    cos, sin = angle.cos(), angle.sin()
    return torch.cat([cos, cos], -1), torch.cat([-sin, sin], -1)


def apply_rope(x, rope):
    """Rotate each pair (a, b) = (x_i, x_{i+d/2}) of x (B, heads, T, d) by its angle, to (a cos - b sin, b cos + a sin).

    In float32, back in x's dtype.
    """
    cos, sin = rope
    a, b = upcast(x).chunk(2, -1)
    return torch.addcmul(x * cos, torch.cat([b, a], -1), sin).to(x.dtype)


def attend(q, k, v, mask, scale):
    """Softmax attention of q (B, H, T, d) over k and v (B, K, S, d), each shared by H / K query heads -> (B, T', H d).

    mask (B, 1, T', S) comes from cache.masks and has a row for each of the last T' queries; the others are not
    computed. None is ordinary causal attention without padding: of S = T tokens, or of one token that sees all S.
    """
    if mask is None and q.shape[2] > 1:
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=True)
        return y.transpose(1, 2).flatten(2)
    q, group = q if mask is None else q[:, :, -mask.shape[2] :], q.shape[1] // k.shape[1]
    if (
        q.shape[2] == 1
    ):  # the H / K heads of a group become queries of one head: no copies of k and v
        y = F.scaled_dot_product_attention(
            q.reshape(len(q), -1, group, q.shape[3]), k, v, attn_mask=mask, scale=scale
        )
        return y.flatten(1)[:, None]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    return (
        F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
        .transpose(1, 2)
        .flatten(2)
    )


class Attention(nn.Module):
    """Grouped-query attention with rotary positions: x (B, T, D) -> (B, T', D), for the T' queries that the mask has."""

    def __init__(self, c):
        super().__init__()
        self.d, self.scale = c.head_dim, c.head_dim**-0.5
        self.q_proj = nn.Linear(c.hidden_size, c.num_attention_heads * self.d, bias=False)
        self.k_proj = nn.Linear(c.hidden_size, c.num_key_value_heads * self.d, bias=False)
        self.v_proj = nn.Linear(c.hidden_size, c.num_key_value_heads * self.d, bias=False)
        self.o_proj = nn.Linear(c.num_attention_heads * self.d, c.hidden_size, bias=False)

    def qkv(self, x):
        return self.q_proj(x), self.k_proj(x), self.v_proj(x)

    def heads(self, x):
        """q (B, H, T, d), k and v (B, K, T, d), not yet rotated."""
        return (y.unflatten(-1, (-1, self.d)).transpose(1, 2) for y in self.qkv(x))

    def forward(self, x, positions, rope, mask, cache):
        q, k, v = self.heads(x)
        q, k = apply_rope(q, rope), apply_rope(k, rope)
        k, v = cache.update(k, v, positions)  # (B, K, S, d)
        return self.o_proj(attend(q, k, v, mask, self.scale))


class MLP(nn.Module):
    """SwiGLU: x (..., D) -> W_down (silu(W_gate x) * W_up x), (..., D)."""

    def __init__(self, c):
        super().__init__()
        self.gate_proj = nn.Linear(c.hidden_size, c.intermediate_size, bias=False)
        self.up_proj = nn.Linear(c.hidden_size, c.intermediate_size, bias=False)
        self.down_proj = nn.Linear(c.intermediate_size, c.hidden_size, bias=False)

    def gate_up(self, x):
        return self.gate_proj(x), self.up_proj(x)

    def forward(self, x):
        gate, up = self.gate_up(x)
        return self.down_proj(F.silu(gate) * up)


class Block(nn.Module):
    """Norm, attention, norm, MLP, each sublayer added to the residual stream; other families bring their own attention."""

    def __init__(self, c, attention):
        super().__init__()
        self.input_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.self_attn = attention
        self.post_attention_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.mlp = MLP(c)

    def forward(self, x, positions, rope, mask, cache):
        y = self.self_attn(self.input_layernorm(x), positions, rope, mask, cache)
        x = x[:, -y.shape[1] :] + y  # the last layer computes only the tokens that are asked for
        return x + self.mlp(self.post_attention_layernorm(x))


class Llama(nn.Module):
    """The decoder: embeddings in, hidden states after the final norm out. `attention(config)` makes the attention of a block.

    It makes its own cache (cache.py): masks say which keys each query may see, `update` stores new keys and returns all.
    """

    def __init__(self, config, attention=Attention):
        super().__init__()
        self.config = c = config
        self.embed_tokens = nn.Embedding(c.vocab_size, c.hidden_size)
        self.layers = nn.ModuleList(Block(c, attention(c)) for _ in range(c.num_hidden_layers))
        self.norm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.lm_head = nn.Linear(c.hidden_size, c.vocab_size, bias=False)
        self.register_buffer(
            "frequency", rope_frequencies(c.rope_parameters, c.head_dim), persistent=False
        )

    def make_cache(self, B, S=None):
        """One cache per layer for B rows: S positions allocated at once, or growing and differentiable if S is None."""
        c = self.config
        return [
            attention_cache(B, c.num_key_value_heads, S, c.head_dim, self.norm.weight, window)
            for window in c.windows
        ]

    def embed(self, ids):
        """Token ids (...) -> embeddings (..., D)."""
        return self.embed_tokens(ids)

    def forward(self, x, positions, cache, last=None):
        """Embeddings x (B, T, D) at positions (B, T), negative on padding -> normed hidden states (B, T, D).

        `last` asks for the states of the last `last` tokens only, (B, last, D): the last layer then computes no others.
        """
        rope, last = rope_cos_sin(positions, self.frequency), last or x.shape[1]
        for layer, mask, layer_cache in zip(self.layers, masks(cache, positions, last), cache):
            x = layer(x, positions, rope, mask, layer_cache)
        return self.norm(x[:, -last:])

    def logits(self, h):
        """Hidden states (..., D) -> scores (..., vocabulary)."""
        return self.lm_head(h)
