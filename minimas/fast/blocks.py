"""A decoder block's step of one token per row on CUDA, in our kernels. All else takes the plain path.

Notation: B rows, D width, H query heads, K key/value heads, d head width.
"""

from typing import Any

import torch
from torch import nn

from .. import gemma, llama
from ..cache import DeltaCache, GrowingCache, KVCache, LayerCache, WindowCache
from ..llama import Rope
from ..quantize import Int8Linear
from .linear import Kernels, MergedLinear, few_rows
from .norms import KernelNorm

ACTIVATIONS = {llama.MLP: "silu", gemma.MLP: "gelu_tanh"}  # of the gate


class DecodeBlock:
    """The forward of a block for one token per row, in five kernels (Gemma: seven).

    With more than ROWS rows, reading weights is not all that a product costs: the block then takes the plain path.

    block              any block whose parts are all in prepare.KNOWN
    act                the activation of its MLP's gate
    attention_norm     the KernelNorm before the attention or the Gated DeltaNet
    mlp_norm           the KernelNorm before the MLP
    of_attention       Gemma only: the KernelNorm of what the attention returns
    of_mlp             Gemma only: the KernelNorm of what the MLP returns
    done               (ROWS * K,) int32, counts the splits of an attention that are done, per row and key/value head
    """

    def __init__(self, block: Any, kernels: Kernels) -> None:
        self.block = block
        self.kernels = kernels
        self.act = ACTIVATIONS[type(block.mlp)]
        self.attention_norm: KernelNorm = block.input_layernorm.forward
        self.mlp_norm: KernelNorm = block.post_attention_layernorm.forward
        self.of_attention: KernelNorm | None = None
        self.of_mlp: KernelNorm | None = None
        if hasattr(block, "pre_feedforward_layernorm"):  # Gemma norms what a sublayer returns, too
            self.mlp_norm = block.pre_feedforward_layernorm.forward
            self.of_attention = block.post_attention_layernorm.forward
            self.of_mlp = block.post_feedforward_layernorm.forward
        self.done: torch.Tensor | None = None
        if hasattr(block, "self_attn"):
            K = block.self_attn.k_proj.out_features // block.self_attn.d
            device = block.input_layernorm.weight.device
            self.done = torch.zeros(kernels.ROWS * K, dtype=torch.int32, device=device)

    def __call__(
        self,
        x: torch.Tensor,
        positions: torch.Tensor,
        rope: Rope,
        mask: torch.Tensor | None,
        cache: LayerCache,
    ) -> torch.Tensor:
        one_token = x.shape[1] == 1
        if not one_token or isinstance(cache, GrowingCache) or not few_rows(x, self.kernels):
            return type(self.block).forward(self.block, x, positions, rope, mask, cache)
        x = x[:, 0]  # (B, D)
        if isinstance(cache, DeltaCache):
            y = self.delta(self.block.linear_attn, x, cache)  # (B, heads d_v)
            proj = self.block.linear_attn.out_proj
        else:
            y = self.attend(self.block.self_attn, x, positions, rope, cache)  # (B, H d)
            proj = self.block.self_attn.o_proj
        x = self.add(x, y, proj, self.of_attention)  # (B, D)
        mlp = self.block.mlp
        y = self.product(x, mlp.gate_up, self.mlp_norm, self.act)  # (B, intermediate_size)
        x = self.add(x, y, mlp.down_proj, self.of_mlp)  # (B, D)
        return x[:, None]

    def product(
        self, x: torch.Tensor, merged: MergedLinear, norm: KernelNorm, act: str = ""
    ) -> torch.Tensor:
        """norm(x) times the weights of a MergedLinear; with `act`, act of its first half times its other half."""
        packed = merged.packed
        return self.kernels.linear(
            x,
            packed.weight,
            packed.bias,
            norm="rms",
            gain=norm.gain,
            eps=norm.eps,
            act=act,
            scale=packed.scale,
        )

    def add(
        self,
        x: torch.Tensor,
        y: torch.Tensor,
        proj: nn.Linear | Int8Linear,
        norm: KernelNorm | None,
    ) -> torch.Tensor:
        """x + W y, or x + norm(W y)."""
        scale = proj.scale if isinstance(proj, Int8Linear) else None
        if norm is None:
            return self.kernels.linear(y, proj.weight, proj.bias, residual=x, scale=scale)
        return norm(self.kernels.linear(y, proj.weight, proj.bias, scale=scale), residual=x)

    def attend(
        self,
        attention: Any,
        x: torch.Tensor,
        positions: torch.Tensor,
        rope: Rope,
        cache: KVCache | WindowCache,
    ) -> torch.Tensor:
        """An attention module up to its last projection: x (B, D) -> (B, H d)."""
        merged, d = attention.qkv, attention.d
        q, k, v = self.product(x, merged, self.attention_norm).split(merged.sizes, -1)
        gated = merged.sizes[0] > attention.o_proj.in_features  # Qwen3.5: each head of q, its gate
        width = 2 * d if gated else d
        q = q.unflatten(-1, (-1, width))  # (B, H, d) or (B, H, 2 d)
        k = k.unflatten(-1, (-1, d))  # (B, K, d)
        v = v.unflatten(-1, (-1, d))
        q_gain = k_gain = None
        eps = 0.0
        if hasattr(attention, "q_norm"):
            q_gain = attention.q_norm.forward.gain
            k_gain = attention.k_norm.forward.gain
            eps = attention.q_norm.eps
        if isinstance(cache, KVCache):
            cache.filled = cache.filled_after(positions)
        scale = attention.scale
        return self.kernels.attend(
            q, k, v, rope, positions, cache, self.done, scale, q_gain, k_gain, eps, gated
        )

    def delta(self, net: Any, x: torch.Tensor, cache: DeltaCache) -> torch.Tensor:
        """A Gated DeltaNet up to its last projection: x (B, D) -> (B, heads d_v)."""
        projected = self.product(x, net.inputs, self.attention_norm)
        qkv, z, b, a = projected.split(net.inputs.sizes, -1)
        norm = net.norm.forward
        return self.kernels.delta(
            qkv, z, b, a, cache, net.conv1d.weight, net.A_log, net.dt_bias, norm.gain, norm.eps
        )
