"""A decoder block's step of one token per row on CUDA, in our kernels. All else goes the ordinary way.

Letters: B rows, D width, H query heads, K key/value heads, d head width.
"""

import torch

from .. import gemma, llama
from ..cache import GrowingCache, KVCache
from ..common import upcast
from .linear import few_rows

ACTIVATIONS = {llama.MLP: "silu", gemma.MLP: "gelu_tanh"}  # of the gate


class Norm:
    """The forward of an RMSNorm in one kernel, with a residual added if there is one; with gradients the ordinary way.

    gain  (D,) float32, what the normed vector is multiplied by
    """

    def __init__(self, norm, kernels):
        weight = upcast(norm.weight.detach())
        self.gain = 1 + weight if type(norm) is gemma.OffsetRMSNorm else weight
        self.ordinary, self.eps, self.kernels = norm.forward, norm.eps, kernels

    def __call__(self, x, residual=None):
        if torch.is_grad_enabled():
            return self.ordinary(x) if residual is None else residual + self.ordinary(x)
        return self.kernels.norm(x, self.gain, self.eps, residual=residual)


class DecodeBlock:
    """The forward of a block for one token per row, in five kernels (Gemma: seven).

    With more than ROWS rows, reading weights is not all that a product costs: the block then goes the ordinary way.
    """

    def __init__(self, block, kernels):
        self.block, self.ordinary, self.kernels = block, block.forward, kernels
        self.act = ACTIVATIONS[type(block.mlp)]
        first, second = block.input_layernorm, block.post_attention_layernorm
        self.before, self.after = [first, second], [None, None]
        if hasattr(block, "pre_feedforward_layernorm"):  # Gemma norms the output of a sublayer too
            self.before, self.after = (
                [first, block.pre_feedforward_layernorm],
                [second, block.post_feedforward_layernorm],
            )
        if hasattr(
            block, "self_attn"
        ):  # counts the splits of an attention that are done, per row and key/value head
            K, device = (
                block.self_attn.k_proj.out_features // block.self_attn.d,
                block.input_layernorm.weight.device,
            )
            self.done = torch.zeros(kernels.ROWS * K, dtype=torch.int32, device=device)

    def __call__(self, x, positions, rope, mask, cache):
        if x.shape[1] > 1 or isinstance(cache, GrowingCache) or not few_rows(x, self.kernels):
            return self.ordinary(x, positions, rope, mask, cache)
        block, x = self.block, x[:, 0]  # (B, D)
        if hasattr(block, "self_attn"):
            y, proj = (
                self.attend(block.self_attn, x, positions, rope, cache),
                block.self_attn.o_proj,
            )
        else:
            y, proj = self.delta(block.linear_attn, x, cache), block.linear_attn.out_proj
        x = self.add(x, y, proj, self.after[0])
        y = self.product(x, block.mlp.gate_up, self.before[1], act=self.act)
        return self.add(x, y, block.mlp.down_proj, self.after[1])[:, None]

    def product(self, x, merged, norm, act=""):
        """norm(x) times the weights of a MergedLinear; with an activation, act of its first half, times its other half."""
        norm, packed = norm.forward, merged.packed
        return self.kernels.linear(
            x, packed.weight, packed.bias, norm="rms", gain=norm.gain, eps=norm.eps, act=act
        )

    def add(self, x, y, proj, norm):
        """x + W y, or x + norm(W y)."""
        if norm is None:
            return self.kernels.linear(y, proj.weight, proj.bias, residual=x)
        return norm.forward(self.kernels.linear(y, proj.weight, proj.bias), residual=x)

    def attend(self, a, x, positions, rope, cache):
        """An attention module up to its last projection: x (B, D) -> (B, H d)."""
        qkv = self.product(x, a.qkv, self.before[0]).split(a.qkv.sizes, -1)
        gated = a.qkv.sizes[0] > a.o_proj.in_features  # Qwen3.5: each head of q with its gate
        q, k, v = (
            part.unflatten(-1, (-1, n)) for part, n in zip(qkv, (a.d * (1 + gated), a.d, a.d))
        )
        norms = (
            (a.q_norm.forward.gain, a.k_norm.forward.gain, a.q_norm.eps)
            if hasattr(a, "q_norm")
            else (None, None, 0.0)
        )
        if isinstance(cache, KVCache):
            cache.filled = cache.filled_after(positions)
        return self.kernels.attend(
            q, k, v, rope, positions, cache, self.done, a.scale, *norms, gated
        )

    def delta(self, a, x, cache):
        """A Gated DeltaNet up to its last projection: x (B, D) -> (B, heads d_v)."""
        inputs, norm = (
            self.product(x, a.inputs, self.before[0]).split(a.inputs.sizes, -1),
            a.norm.forward,
        )
        return self.kernels.delta(
            *inputs, cache, a.conv1d.weight, a.A_log, a.dt_bias, norm.gain, norm.eps
        )
