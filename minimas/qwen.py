"""Qwen2 and Qwen2.5, Qwen3, and Qwen3.5 (text), equal to transformers' Qwen2, Qwen3 and Qwen3_5 ForCausalLM.

What differs from Llama:
    Qwen2, 2.5   the q, k and v projections carry a bias; layers that config.json marks so attend to a sliding window
    Qwen3        q and k go through an RMSNorm of their own, per head, before the rotation; windows as in Qwen2
    Qwen3.5      norms scale by 1 + w, as Gemma's do (but not the one inside the Gated DeltaNet);
                 three layers of four replace attention by a Gated DeltaNet, whose state does not grow with the text;
                 in the others the attention's output is gated, and only a quarter of each head is rotated

Notation as in llama.py: B batch, T tokens, D width, H query heads, K key/value heads, d head width, S positions that a
cache has room for, `keys` those that the attention of a layer sees. In the Gated DeltaNet as in delta.py: H heads of v,
d_k and d_v the widths of a key and a value head.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from . import llama
from .cache import AttentionCache, DeltaCache, LayerCache, attention_cache
from .common import upcast
from .delta import chunked, recurrent
from .gemma import OffsetRMSNorm
from .llama import (
    MLP,
    Attention,
    Llama,
    RMSNorm,
    Rope,
    apply_rope,
    attend,
    rope_frequencies,
    split_heads,
)


@dataclass(kw_only=True)
class Config(llama.Config):
    """The fields of Qwen2 and Qwen3 besides Llama's, with the defaults of transformers."""

    # Per layer full_attention or sliding_attention; by default the first max_window_layers are full.
    layer_types: Sequence[str] = ()
    sliding_window: int | None = 4096
    # sliding_window alone says nothing: DeepSeek's distillations name one and use none.
    use_sliding_window: bool = False
    max_window_layers: int = 28
    num_key_value_heads: int | None = 32

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.use_sliding_window:
            self.sliding_window = None
        if not self.layer_types:
            n = self.num_hidden_layers
            full = min(self.max_window_layers, n) if self.use_sliding_window else n
            self.layer_types = ["full_attention"] * full + ["sliding_attention"] * (n - full)

    @property
    def windows(self) -> Sequence[int | None]:
        window = {"sliding_attention": self.sliding_window, "full_attention": None}
        return [window[kind] for kind in self.layer_types]


@dataclass(kw_only=True)
class Config3(Config):
    """Qwen3's fields: head_dim has a default of its own."""

    head_dim: int | None = 128


def qwen2_attention(c: llama.Config) -> Attention:
    """Llama's attention, but q, k and v have a bias; o has none."""
    attention = Attention(c)
    for proj in attention.q_proj, attention.k_proj, attention.v_proj:
        proj.bias = nn.Parameter(torch.zeros(proj.out_features))
    return attention


class Qwen3Attention(Attention):
    """Llama's attention with a norm on each head of q and k."""

    def __init__(self, c: llama.Config) -> None:
        super().__init__(c)
        self.q_norm = RMSNorm(self.d, c.rms_norm_eps)
        self.k_norm = RMSNorm(self.d, c.rms_norm_eps)

    def heads(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        q, k, v = super().heads(x)
        return self.q_norm(q), self.k_norm(k), v


class Qwen2(Llama):
    """The decoder of Qwen2 and Qwen2.5: Llama with a bias on q, k and v, and windows in the layers that have one."""

    config: Config

    def __init__(self, config: Config) -> None:
        super().__init__(config, attention=qwen2_attention)


class Qwen3(Llama):
    """The decoder of Qwen3: Llama with a norm on each head of q and k, and windows as in Qwen2."""

    config: Config3

    def __init__(self, config: Config3) -> None:
        super().__init__(config, attention=Qwen3Attention)


# Qwen3.5: the parts that are new.


@dataclass(kw_only=True)
class Config35(llama.Config):
    """The fields of Qwen3.5 besides Llama's, with the defaults of transformers."""

    num_key_value_heads: int = 4
    head_dim: int = 256

    # Per layer linear_attention or full_attention; by default every full_attention_interval-th is full.
    layer_types: Sequence[str] = ()
    full_attention_interval: int = 4
    linear_conv_kernel_dim: int = 4
    linear_key_head_dim: int = 128  # d_k
    linear_value_head_dim: int = 128  # d_v
    linear_num_key_heads: int = 16  # heads of q and k
    linear_num_value_heads: int = 32  # H

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.layer_types:
            n = self.num_hidden_layers
            interval = self.full_attention_interval
            self.layer_types = ["linear_attention"] * n
            for i in range(interval - 1, n, interval):
                self.layer_types[i] = "full_attention"

    @property
    def linear_sizes(self) -> list[int]:
        """Channels of q, k and v in a Gated DeltaNet."""
        keys = self.linear_num_key_heads * self.linear_key_head_dim
        values = self.linear_num_value_heads * self.linear_value_head_dim
        return [keys, keys, values]


class GatedAttention(Attention):
    """q_proj also makes a gate for the output; a part of q and k is rotated, the rest carries no position.

    So `heads` of Attention is not for it.
    """

    def __init__(self, c: Config35) -> None:
        super().__init__(c)
        H, _, d = c.attention_sizes
        self.q_proj = nn.Linear(c.hidden_size, H * 2 * d, bias=False)  # each head, then its gate
        self.q_norm = OffsetRMSNorm(d, c.rms_norm_eps)
        self.k_norm = OffsetRMSNorm(d, c.rms_norm_eps)

    def forward(
        self,
        x: torch.Tensor,
        positions: torch.Tensor,
        rope: Rope,
        mask: torch.Tensor | None,
        cache: AttentionCache,
    ) -> torch.Tensor:
        q_gate, k, v = self.qkv(x)
        q, gate = split_heads(q_gate, 2 * self.d).chunk(2, -1)  # (B, H, T, d) each
        k = split_heads(k, self.d)  # (B, K, T, d)
        v = split_heads(v, self.d)
        q = apply_partial_rope(self.q_norm(q), rope)
        k = apply_partial_rope(self.k_norm(k), rope)
        k, v = cache.update(k, v, positions)  # (B, K, keys, d)
        y = attend(q, k, v, mask, self.scale)  # (B, T', H d)
        gate = gate.transpose(1, 2).flatten(2)  # (B, T, H d)
        gate = gate[:, -y.shape[1] :]  # (B, T', H d)
        return self.o_proj(y * gate.sigmoid())


def apply_partial_rope(x: torch.Tensor, rope: Rope) -> torch.Tensor:
    """Rotate the first dimensions of each head of x (B, heads, T, d), as many as there are angles for."""
    cos, _ = rope
    n = cos.shape[-1]
    return torch.cat([apply_rope(x[..., :n], rope), x[..., n:]], -1)


class GatedDeltaNet(nn.Module):
    """q, k and v through a short causal convolution, the gated delta rule over them, a gated norm on its output.

        q, k, v = silu(conv(W_qkv x))
        g = -exp(A_log) softplus(W_a x + dt_bias)        log of the decay
        beta = sigmoid(W_b x)                            strength of writing
        o = rule(q / (|q| sqrt(d_k)), k / |k|, v, g, beta)
        y = W_out (norm(o) * silu(W_z x))

    Where there are fewer heads of q and k than of v, each is used by several of v that stand next to each other.
    """

    def __init__(self, c: Config35) -> None:
        super().__init__()
        D = c.hidden_size
        self.key_heads = c.linear_num_key_heads
        self.value_heads = c.linear_num_value_heads
        self.d_k = c.linear_key_head_dim
        self.d_v = c.linear_value_head_dim
        self.sizes = c.linear_sizes
        keys, _, values = self.sizes
        channels = 2 * keys + values
        kernel = c.linear_conv_kernel_dim
        self.in_proj_qkv = nn.Linear(D, channels, bias=False)
        self.in_proj_z = nn.Linear(D, values, bias=False)
        self.in_proj_b = nn.Linear(D, self.value_heads, bias=False)
        self.in_proj_a = nn.Linear(D, self.value_heads, bias=False)
        self.conv1d = nn.Conv1d(channels, channels, kernel, groups=channels, bias=False)
        self.A_log = nn.Parameter(torch.zeros(self.value_heads))
        self.dt_bias = nn.Parameter(torch.ones(self.value_heads))
        self.norm = RMSNorm(self.d_v, c.rms_norm_eps)
        self.out_proj = nn.Linear(values, D, bias=False)

    def inputs(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """W_qkv x (B, T, channels), W_z x (B, T, H d_v), W_b x and W_a x (B, T, H)."""
        return self.in_proj_qkv(x), self.in_proj_z(x), self.in_proj_b(x), self.in_proj_a(x)

    def forward(
        self,
        x: torch.Tensor,
        positions: torch.Tensor,
        rope: Rope,
        mask: torch.Tensor,
        cache: DeltaCache,
    ) -> torch.Tensor:
        """x (B, T, D), mask (B, T, 1) of tokens -> (B, T, D)."""
        qkv, z, b, a = self.inputs(x * mask)
        history, conv = cache.with_history(qkv.mT, positions)  # (B, channels, kernel - 1 + T)
        y = F.silu(self.conv1d(history)).mT  # (B, T, channels)
        q, k, v = y.split(self.sizes, -1)
        q = self.unit_heads(q)  # (B, H, T, d_k)
        k = self.unit_heads(k)
        v = upcast(v.unflatten(-1, (self.value_heads, self.d_v))).transpose(1, 2)  # (B, H, T, d_v)

        # Padding forgets nothing (g = 0) and writes nothing (beta = 0).
        dt = F.softplus(upcast(a) + upcast(self.dt_bias))  # (B, T, H)
        g = -upcast(self.A_log).exp() * dt * mask
        beta = upcast(b).sigmoid() * mask

        rule = recurrent if x.shape[1] == 1 else chunked
        o, state = rule(q * self.d_k**-0.5, k, v, g.mT, beta.mT, cache.state)  # (B, H, T, d_v)
        cache.store(conv, state)
        z = upcast(z.unflatten(-1, (self.value_heads, self.d_v)))  # (B, T, H, d_v)
        o = self.norm(o.transpose(1, 2).to(x.dtype)) * F.silu(z)
        return self.out_proj(o.to(x.dtype).flatten(2))

    def unit_heads(self, x: torch.Tensor) -> torch.Tensor:
        """q or k (B, T, key heads d_k) -> vectors of length 1 for each head of v, (B, H, T, d_k)."""
        x = upcast(x.unflatten(-1, (self.key_heads, self.d_k)))  # (B, T, key heads, d_k)
        x = l2_normalize(x).repeat_interleave(self.value_heads // self.key_heads, 2)
        return x.transpose(1, 2)


def l2_normalize(x: torch.Tensor) -> torch.Tensor:
    """Vectors of length 1 along the last dimension; as in transformers, eps is inside the root."""
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + 1e-6)


class Block35(nn.Module):
    """Llama's block with Gemma's norms, and either kind of layer under the name that the checkpoint gives it."""

    def __init__(self, c: Config35, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.input_layernorm = OffsetRMSNorm(c.hidden_size, c.rms_norm_eps)
        if kind == "linear_attention":
            self.linear_attn = GatedDeltaNet(c)
        else:
            self.self_attn = GatedAttention(c)
        self.post_attention_layernorm = OffsetRMSNorm(c.hidden_size, c.rms_norm_eps)
        self.mlp = MLP(c)

    def forward(
        self,
        x: torch.Tensor,
        positions: torch.Tensor,
        rope: Rope,
        mask: torch.Tensor | None,
        cache: LayerCache,
    ) -> torch.Tensor:
        """x (B, T, D) -> (B, T', D)."""
        mixer = self.linear_attn if self.kind == "linear_attention" else self.self_attn
        y = mixer(self.input_layernorm(x), positions, rope, mask, cache)
        x = x[:, -y.shape[1] :]  # (B, T', D)
        x = x + y
        return x + self.mlp(self.post_attention_layernorm(x))


class Qwen35(Llama):
    """The decoder, with Llama's methods and shapes; only its parts and its cache differ."""

    config: Config35

    def __init__(self, config: Config35) -> None:
        nn.Module.__init__(self)  # not Llama's: most of its parts are others here
        self.config = c = config
        _, _, d = c.attention_sizes
        self.embed_tokens = nn.Embedding(c.vocab_size, c.hidden_size)
        self.layers = nn.ModuleList(Block35(c, kind) for kind in c.layer_types)
        self.norm = OffsetRMSNorm(c.hidden_size, c.rms_norm_eps)
        self.lm_head = nn.Linear(c.hidden_size, c.vocab_size, bias=False)
        rotated = int(d * c.rope_parameters.get("partial_rotary_factor", 0.25))
        frequency = rope_frequencies(c.rope_parameters, rotated)
        self.register_buffer("frequency", frequency, persistent=False)

    def make_cache(self, B: int, S: int | None = None) -> list[LayerCache]:
        kinds = self.of_each_layer(self.config.layer_types)
        return [self.layer_cache(kind, B, S) for kind in kinds]

    def layer_cache(self, kind: str, B: int, S: int | None) -> LayerCache:
        """The cache of a layer of this kind."""
        c = self.config
        like = self.norm.weight
        if kind == "full_attention":
            _, K, d = c.attention_sizes
            return attention_cache(B, K, S, d, like)
        H = c.linear_num_value_heads
        d_k = c.linear_key_head_dim
        d_v = c.linear_value_head_dim
        conv = like.new_zeros(B, sum(c.linear_sizes), c.linear_conv_kernel_dim - 1)
        state = upcast(like.new_zeros(B, H, d_k, d_v))
        return DeltaCache(conv, state)
