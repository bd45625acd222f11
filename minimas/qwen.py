"""Qwen2 and Qwen2.5, Qwen3, and Qwen3.5 (text), equal to transformers' Qwen2, Qwen3 and Qwen3_5 ForCausalLM.

What differs from Llama:
    Qwen2, 2.5   the q, k and v projections carry a bias; layers that config.json marks so attend to a sliding window
    Qwen3        q and k go through an RMSNorm of their own, per head, before the rotation
    Qwen3.5      norms scale by 1 + w, as Gemma's do (but not the one inside the Gated DeltaNet);
                 three layers of four replace attention by a Gated DeltaNet, whose state does not grow with the text;
                 in the others the attention's output is gated, and only a quarter of each head is rotated

Letters as in llama.py: B batch, T tokens, D width, H query heads, K key/value heads, d head width, S keys in the cache;
in the Gated DeltaNet as in delta.py: d_k and d_v the widths of a key and a value head.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from . import llama
from .cache import DeltaCache, attention_cache
from .common import upcast
from .delta import chunked, recurrent
from .gemma import OffsetRMSNorm
from .llama import MLP, Attention, Llama, RMSNorm, apply_rope, attend, rope_frequencies


@dataclass(kw_only=True)
class Config(llama.Config):
    """The fields of Qwen2 and Qwen3 besides Llama's, with the defaults of transformers."""

    layer_types: list[str] | None = None  # per layer full_attention or sliding_attention
    sliding_window: int | None = 4096
    use_sliding_window: bool = (
        False  # sliding_window alone says nothing: DeepSeek's distillations name one and use none
    )
    max_window_layers: int = 28  # transformers' default
    num_key_value_heads: int | None = 32

    def __post_init__(self):
        super().__post_init__()
        self.sliding_window = self.sliding_window if self.use_sliding_window else None
        if self.layer_types is None:
            full, n = (
                self.max_window_layers if self.use_sliding_window else self.num_hidden_layers,
                self.num_hidden_layers,
            )
            self.layer_types = [
                "full_attention" if i < full else "sliding_attention" for i in range(n)
            ]

    @property
    def windows(self):
        return [
            self.sliding_window if kind == "sliding_attention" else None
            for kind in self.layer_types
        ]


@dataclass(kw_only=True)
class Config3(Config):
    """Qwen3's fields: head_dim has a default of its own."""

    head_dim: int | None = 128


def qwen2_attention(c):
    """Llama's attention, but q, k and v have a bias; o has none."""
    attention = Attention(c)
    for proj in attention.q_proj, attention.k_proj, attention.v_proj:
        proj.bias = nn.Parameter(torch.zeros(proj.out_features))
    return attention


class Qwen3Attention(Attention):
    """Llama's attention with a norm on each head of q and k."""

    def __init__(self, c):
        super().__init__(c)
        self.q_norm, self.k_norm = RMSNorm(self.d, c.rms_norm_eps), RMSNorm(self.d, c.rms_norm_eps)

    def heads(self, x):
        q, k, v = super().heads(x)
        return self.q_norm(q), self.k_norm(k), v


def Qwen2(config):
    """The decoder of Qwen2 and Qwen2.5: a Llama with another attention."""
    return Llama(config, attention=qwen2_attention)


def Qwen3(config):
    """The decoder of Qwen3: a Llama with another attention."""
    return Llama(config, attention=Qwen3Attention)


# Qwen3.5: the parts that are new.


@dataclass(kw_only=True)
class Config35(llama.Config):
    """The fields of Qwen3.5 besides Llama's."""

    layer_types: list[str] | None = None  # per layer linear_attention or full_attention
    full_attention_interval: int = 4
    linear_conv_kernel_dim: int = 4
    linear_key_head_dim: int = 128  # d_k
    linear_value_head_dim: int = 128  # d_v
    linear_num_key_heads: int = 16
    linear_num_value_heads: int = 32

    def __post_init__(self):
        super().__post_init__()
        self.layer_types = self.layer_types or [
            "linear_attention" if (i + 1) % self.full_attention_interval else "full_attention"
            for i in range(self.num_hidden_layers)
        ]


class GatedAttention(Attention):
    """q_proj also makes a gate for the output; the first quarter of q and k is rotated, the rest carries no position."""

    def __init__(self, c):
        super().__init__(c)
        self.q_proj = nn.Linear(
            c.hidden_size, c.num_attention_heads * 2 * self.d, bias=False
        )  # each head, then its gate
        self.q_norm, self.k_norm = (
            OffsetRMSNorm(self.d, c.rms_norm_eps),
            OffsetRMSNorm(self.d, c.rms_norm_eps),
        )

    def forward(self, x, positions, rope, mask, cache):
        q, k, v = self.qkv(x)
        q, gate = q.unflatten(-1, (-1, 2 * self.d)).chunk(2, -1)  # (B, T, H, d) each
        k, v = (y.unflatten(-1, (-1, self.d)).transpose(1, 2) for y in (k, v))  # (B, K, T, d)
        q, k = (
            apply_partial_rope(self.q_norm(q).transpose(1, 2), rope),
            apply_partial_rope(self.k_norm(k), rope),
        )
        k, v = cache.update(k, v, positions)  # (B, K, S, d)
        y = attend(q, k, v, mask, self.scale)
        return self.o_proj(y * gate.flatten(2)[:, -y.shape[1] :].sigmoid())


def apply_partial_rope(x, rope):
    """Rotate the first dimensions of each head, as many as there are angles for."""
    n = rope[0].shape[-1]
    return torch.cat([apply_rope(x[..., :n], rope), x[..., n:]], -1)


class GatedDeltaNet(nn.Module):
    """q, k and v through a short causal convolution, the gated delta rule over them, a gated norm on its output.

    Where there are fewer heads of q and k than of v, each is used by several of v that stand next to each other.
    """

    def __init__(self, c):
        super().__init__()
        self.key_heads, self.value_heads = c.linear_num_key_heads, c.linear_num_value_heads
        self.d_k, self.d_v = c.linear_key_head_dim, c.linear_value_head_dim
        channels = 2 * self.key_heads * self.d_k + self.value_heads * self.d_v
        self.in_proj_qkv = nn.Linear(c.hidden_size, channels, bias=False)
        self.in_proj_z = nn.Linear(c.hidden_size, self.value_heads * self.d_v, bias=False)
        self.in_proj_b = nn.Linear(c.hidden_size, self.value_heads, bias=False)
        self.in_proj_a = nn.Linear(c.hidden_size, self.value_heads, bias=False)
        self.conv1d = nn.Conv1d(
            channels, channels, c.linear_conv_kernel_dim, groups=channels, bias=False
        )
        self.A_log, self.dt_bias = (
            nn.Parameter(torch.zeros(self.value_heads)),
            nn.Parameter(torch.ones(self.value_heads)),
        )
        self.norm = RMSNorm(self.d_v, c.rms_norm_eps)
        self.out_proj = nn.Linear(self.value_heads * self.d_v, c.hidden_size, bias=False)

    def inputs(self, x):
        return self.in_proj_qkv(x), self.in_proj_z(x), self.in_proj_b(x), self.in_proj_a(x)

    def forward(self, x, positions, rope, mask, cache):
        B, T, _ = x.shape
        qkv, z, b, a = self.inputs(x * mask)
        x, conv = cache.with_history(qkv.mT, positions)
        y = F.silu(self.conv1d(x)).mT  # (B, T, channels)
        q, k, v = y.split(
            [self.key_heads * self.d_k, self.key_heads * self.d_k, self.value_heads * self.d_v], -1
        )
        q, k = (
            l2_normalize(upcast(part.reshape(B, T, self.key_heads, self.d_k))) for part in (q, k)
        )
        group = self.value_heads // self.key_heads
        q, k = (
            part.repeat_interleave(group, 2).transpose(1, 2) for part in (q, k)
        )  # (B, value heads, T, d_k)
        v = upcast(v.reshape(B, T, self.value_heads, self.d_v)).transpose(1, 2)
        g = (
            -upcast(self.A_log).exp() * F.softplus(upcast(a) + upcast(self.dt_bias)) * mask
        )  # (B, T, value heads)
        beta = (
            upcast(b).sigmoid() * mask
        )  # padding forgets nothing (g = 0) and writes nothing (beta = 0)
        rule = recurrent if T == 1 else chunked
        o, state = rule(q * self.d_k**-0.5, k, v, g.mT, beta.mT, cache.state)
        cache.store(conv, state)
        o = self.norm(o.transpose(1, 2).to(x.dtype)) * F.silu(
            upcast(z.unflatten(-1, (self.value_heads, self.d_v)))
        )
        return self.out_proj(o.to(x.dtype).flatten(2))


def l2_normalize(x):
    """Vectors of length 1 along the last dimension; as in transformers, eps is inside the root."""
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + 1e-6)


class Block35(nn.Module):
    """Llama's block with Gemma's norms, and in `mixer` either kind of layer."""

    def __init__(self, c, kind):
        super().__init__()
        self.input_layernorm = OffsetRMSNorm(c.hidden_size, c.rms_norm_eps)
        self.mixer = (
            "linear_attn" if kind == "linear_attention" else "self_attn"
        )  # the module's name in the checkpoint
        self.add_module(
            self.mixer, GatedDeltaNet(c) if kind == "linear_attention" else GatedAttention(c)
        )
        self.post_attention_layernorm = OffsetRMSNorm(c.hidden_size, c.rms_norm_eps)
        self.mlp = MLP(c)

    def forward(self, x, positions, rope, mask, cache):
        y = getattr(self, self.mixer)(self.input_layernorm(x), positions, rope, mask, cache)
        x = x[:, -y.shape[1] :] + y
        return x + self.mlp(self.post_attention_layernorm(x))


class Qwen35(nn.Module):
    """The decoder; its methods are those of llama.Llama, with the same shapes."""

    embed, forward, logits = Llama.embed, Llama.forward, Llama.logits

    def __init__(self, config):
        super().__init__()
        self.config = c = config
        self.embed_tokens = nn.Embedding(c.vocab_size, c.hidden_size)
        self.layers = nn.ModuleList(Block35(c, kind) for kind in c.layer_types)
        self.norm = OffsetRMSNorm(c.hidden_size, c.rms_norm_eps)
        self.lm_head = nn.Linear(c.hidden_size, c.vocab_size, bias=False)
        rotated = int(c.head_dim * c.rope_parameters.get("partial_rotary_factor", 0.25))
        self.register_buffer(
            "frequency", rope_frequencies(c.rope_parameters, rotated), persistent=False
        )

    def make_cache(self, B, S=None):
        c, w = self.config, self.norm.weight
        channels = (
            2 * c.linear_num_key_heads * c.linear_key_head_dim
            + c.linear_num_value_heads * c.linear_value_head_dim
        )
        state = (B, c.linear_num_value_heads, c.linear_key_head_dim, c.linear_value_head_dim)
        return [
            attention_cache(B, c.num_key_value_heads, S, c.head_dim, w)
            if kind == "full_attention"
            else DeltaCache(
                w.new_zeros(B, channels, c.linear_conv_kernel_dim - 1), upcast(w.new_zeros(state))
            )
            for kind in c.layer_types
        ]
