"""A decoder block's step of one token per row, in few operations: CpuBlock, and KernelBlock in our kernels on CUDA.

All else takes the plain path: chunks of several tokens, and gradients; on a CPU other dtypes than float32, and a block
with hooks inside; on CUDA more than ROWS rows.

Notation: B rows, T tokens of a row, T' those that are asked for, D width, H query heads, K key/value heads, d head
width, `keys` the positions that the attention of a layer sees.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from .. import gemma, llama
from ..cache import DeltaCache, GrowingCache, KVCache, LayerCache, WindowCache
from ..llama import Rope
from ..quantize import Int8Linear
from .hooks import check_places, has_global_hook, has_hook, places_of
from .linear import Kernels, MergedLinear, few_rows
from .norms import KernelNorm

# The activation of an MLP's gate, as a function and as our kernels call it
ACTIVATIONS: dict[type[nn.Module], Callable[[torch.Tensor], torch.Tensor]] = {
    llama.MLP: F.silu,
    gemma.MLP: partial(F.gelu, approximate="tanh"),
}
KERNEL_ACTIVATIONS: dict[type[nn.Module], str] = {llama.MLP: "silu", gemma.MLP: "gelu_tanh"}


class FastBlock:
    """What both forms have in common: a block, and the norms before and after its sublayers (CpuNorm or KernelNorm).

    block           the module whose forward this is
    places          of the modules within it
    attention_norm  before the attention or the Gated DeltaNet
    mlp_norm        before the MLP
    of_attention    Gemma only: of what the attention returns
    of_mlp          Gemma only: of what the MLP returns
    """

    def __init__(self, block: Any) -> None:
        self.block = block
        self.places = places_of(block)
        self.attention_norm = block.input_layernorm.forward
        self.mlp_norm = block.post_attention_layernorm.forward
        self.of_attention = None
        self.of_mlp = None
        if hasattr(block, "pre_feedforward_layernorm"):  # Gemma norms what a sublayer returns, too
            self.mlp_norm = block.pre_feedforward_layernorm.forward
            self.of_attention = block.post_attention_layernorm.forward
            self.of_mlp = block.post_feedforward_layernorm.forward

    def __call__(
        self,
        x: torch.Tensor,
        positions: torch.Tensor,
        rope: Rope,
        mask: torch.Tensor | None,
        cache: LayerCache,
    ) -> torch.Tensor:
        """The forward of the block: x (B, T, D) -> (B, T', D); InputError if a module in it is not the one it was."""
        check_places(self.places)
        if x.shape[1] > 1 or isinstance(cache, GrowingCache) or not self.takes(x):
            plain = type(self.block).forward  # the block's own attribute is this object
            return plain(self.block, x, positions, rope, mask, cache)
        return self.step(x[:, 0], positions, rope, mask, cache)[:, None]

    def takes(self, x: torch.Tensor) -> bool:
        """Whether `step` can be taken from x (B, 1, D)."""
        raise NotImplementedError

    def step(
        self,
        x: torch.Tensor,
        positions: torch.Tensor,
        rope: Rope,
        mask: torch.Tensor | None,
        cache: LayerCache,
    ) -> torch.Tensor:
        """One token per row, x (B, D) -> (B, D). cos and sin are (B, 1, 1, d), the mask (B, 1, 1, keys) or None."""
        raise NotImplementedError


class CpuBlock(FastBlock):
    """On a CPU in float32, for a block with softmax attention.

    The weights that a product reads push all else out of the CPU's caches. So whatever comes after it costs what it
    takes to fetch its code, a view as much as a sum, and the number of operations is what counts: q and k are rotated
    as one, a product adds the residual itself, and nothing is converted that need not be.

    sizes              H, K, d
    scale              of the scores
    qkv, gate_up       merged products, each a PackedLinear or a FastProduct
    o_proj, down_proj  products of one linear, likewise
    act                the activation of the MLP's gate
    has_q_norm         whether each head of q and k has a norm
    """

    def __init__(self, block: Any) -> None:
        super().__init__(block)
        attention = block.self_attn
        mlp = block.mlp
        d = attention.d
        H = attention.q_proj.out_features // d
        K = attention.k_proj.out_features // d
        self.sizes = H, K, d
        self.scale = attention.scale
        self.qkv = attention.qkv.packed
        self.o_proj = attention.o_proj.forward
        self.gate_up = mlp.gate_up.packed
        self.down_proj = mlp.down_proj.forward
        self.act = ACTIVATIONS[type(mlp)]
        self.has_q_norm = hasattr(attention, "q_norm")

    def takes(self, x: torch.Tensor) -> bool:
        if x.dtype != torch.float32 or torch.is_grad_enabled():
            return False
        if has_global_hook():
            return False
        return not any(has_hook(part) for _, _, part in self.places)

    def step(
        self,
        x: torch.Tensor,
        positions: torch.Tensor,
        rope: Rope,
        mask: torch.Tensor | None,
        cache: LayerCache,
    ) -> torch.Tensor:
        assert isinstance(cache, KVCache | WindowCache)
        y = self.attend(self.attention_norm(x), positions, rope, mask, cache)  # (B, H d)
        x = self.add(x, y, self.o_proj, self.of_attention)  # (B, D)
        gate, up = self.gate_up.of_rows(self.mlp_norm(x)).chunk(2, -1)  # (B, intermediate_size)
        return self.add(x, self.act(gate) * up, self.down_proj, self.of_mlp)

    def attend(
        self,
        x: torch.Tensor,
        positions: torch.Tensor,
        rope: Rope,
        mask: torch.Tensor | None,
        cache: KVCache | WindowCache,
    ) -> torch.Tensor:
        """The attention up to its last projection: x (B, D) -> (B, H d)."""
        B = len(x)
        H, K, d = self.sizes
        heads = self.qkv.of_rows(x).view(B, H + 2 * K, 1, d)
        q_k, v = heads.split((H + K, K), 1)  # (B, H + K, 1, d) and (B, K, 1, d)
        if self.has_q_norm:
            q, k = q_k.split((H, K), 1)
            attention = self.block.self_attn
            q_k = torch.cat([attention.q_norm.forward(q), attention.k_norm.forward(k)], 1)
        cos, sin = rope
        q_k = torch.addcmul(q_k * cos, q_k.roll(d // 2, -1), sin)  # as llama.apply_rope
        q, k = q_k.split((H, K), 1)
        keys, values = cache.update(k, v, positions)  # (B, K, keys, d)
        q = q.reshape(B, K, H // K, d)  # heads that share a key become queries of one head
        y = F.scaled_dot_product_attention(q, keys, values, attn_mask=mask, scale=self.scale)
        return y.flatten(1)  # of (B, K, H / K, d)

    def add(self, x: torch.Tensor, y: torch.Tensor, product: Any, norm: Any) -> torch.Tensor:
        """x + W y, or x + norm(W y)."""
        if norm is None:
            return product.of_rows(y, residual=x)
        return x + norm(product.of_rows(y))


class KernelBlock(FastBlock):
    """On CUDA, in five kernels (Gemma: seven), for any block whose parts are all in prepare.KNOWN.

    With more than ROWS rows, reading weights is not all that a product costs: the block then takes the plain path.

    act   the activation of its MLP's gate
    done  (ROWS * K,) int32, counts the splits of an attention that are done, per row and key/value head
    """

    def __init__(self, block: Any, kernels: Kernels) -> None:
        super().__init__(block)
        self.kernels = kernels
        self.act = KERNEL_ACTIVATIONS[type(block.mlp)]
        self.done: torch.Tensor | None = None
        if hasattr(block, "self_attn"):
            K = block.self_attn.k_proj.out_features // block.self_attn.d
            device = block.input_layernorm.weight.device
            self.done = torch.zeros(kernels.ROWS * K, dtype=torch.int32, device=device)

    def takes(self, x: torch.Tensor) -> bool:
        return few_rows(x, self.kernels) and not has_global_hook()

    def step(
        self,
        x: torch.Tensor,
        positions: torch.Tensor,
        rope: Rope,
        mask: torch.Tensor | None,
        cache: LayerCache,
    ) -> torch.Tensor:
        if isinstance(cache, DeltaCache):
            y = self.delta(self.block.linear_attn, x, cache)  # (B, heads d_v)
            proj = self.block.linear_attn.out_proj
        else:
            assert isinstance(cache, KVCache | WindowCache)
            y = self.attend(self.block.self_attn, x, positions, rope, cache)  # (B, H d)
            proj = self.block.self_attn.o_proj
        x = self.add(x, y, proj, self.of_attention)  # (B, D)
        mlp = self.block.mlp
        y = self.product(x, mlp.gate_up, self.mlp_norm, self.act)  # (B, intermediate_size)
        return self.add(x, y, mlp.down_proj, self.of_mlp)  # (B, D)

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
