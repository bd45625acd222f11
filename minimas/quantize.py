"""Weights of 8 or 4 bits (`--quantize`): a step reads every weight once, so fewer bytes are a faster step.

    int8   w = s q         q from -127 to 127; for each output one scale s = max |w| / 127
    int4   w = s q + z     q from -8 to 7; for each 32 inputs of an output one scale s = (max w - min w) / 15, and an
                           offset z that puts the 16 values between min w and max w. A group takes a smaller s, which
                           clips its extremes, where that makes the sum of squared errors smaller

Only the weights of linears are quantised, the head's too. Token embeddings that are tied to the head are read out of
it. Activations, norms, other embeddings, biases and links keep their dtype. In int4, s and z are rounded to bfloat16
before q is chosen.

Here is the plain form: it makes the weight float again, block by block, and multiplies. fast/quantized.py has the fast
one for a CPU, and fast/linear.py that for CUDA: KernelInt8, of int8 alone. Quantised weights are frozen; gradients go
through the activations, so that links can be trained.

Notation: D inputs, N outputs.
"""

from collections.abc import Iterator
from typing import Any, TypeGuard

import torch
import torch.nn.functional as F
from torch import nn

from .common import upcast

GROUP = 32  # inputs that share a scale in int4
SHRINKS = (1.0, 0.93, 0.86, 0.79)  # of the full range, tried for each group
BLOCK = 1 << 20  # weights that are float at a time


class QuantizedLinear(nn.Module):
    """x (..., D) -> x W' + b (..., N), for a frozen W in fewer bits. `from_float` makes one of a float weight."""

    kind: str
    bias: nn.Parameter | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: nn.Parameter | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        self.register_parameter("bias", bias)
        self.allocate(device)

    @classmethod
    def from_float(
        cls,
        weight: torch.Tensor,
        bias: nn.Parameter | None = None,
        device: torch.device | str | None = None,
    ) -> "QuantizedLinear":
        """Quantise a weight (N, D), and put the result on `device`; None is where the weight is."""
        N, D = weight.shape
        linear = cls(D, N, bias, device or weight.device)
        for start, end in blocks(N, D):
            linear.quantize(start, end, upcast(weight[start:end]))
        return linear

    def allocate(self, device: torch.device | str | None) -> None:
        """Register the buffers of the quantised weight."""
        raise NotImplementedError

    def quantize(self, start: int, end: int, weight: torch.Tensor) -> None:
        """Fill in the outputs from `start` to `end`, whose float weights (end - start, D) are given."""
        raise NotImplementedError

    def weights_of(self, outputs: slice | torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """The weights (n, D) of some outputs, as floats; a tensor (n,) has their numbers."""
        raise NotImplementedError

    def dequantized(
        self, start: int = 0, end: int | None = None, dtype: torch.dtype = torch.float32
    ) -> torch.Tensor:
        """The weights (end - start, D) of the outputs from `start` to `end`, as floats."""
        return self.weights_of(slice(start, end), dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = FrozenProduct.apply(x, self)
        return y if self.bias is None else y + self.bias

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, bias={self.bias is not None}"


class Int8Linear(QuantizedLinear):
    """weight (N, D) int8 and scale (N,) float32: w = scale q."""

    kind = "int8"
    weight: torch.Tensor
    scale: torch.Tensor

    def allocate(self, device: torch.device | str | None) -> None:
        N, D = self.out_features, self.in_features
        self.register_buffer("weight", torch.empty(N, D, dtype=torch.int8, device=device))
        self.register_buffer("scale", torch.empty(N, dtype=torch.float32, device=device))

    def quantize(self, start: int, end: int, weight: torch.Tensor) -> None:
        scale = weight.abs().amax(1) / 127  # (n,)
        step = torch.where(scale == 0, 1, scale)  # 0: a row of zeros
        q = (weight / step[:, None]).round().clamp(-127, 127)
        self.weight[start:end] = q.to(torch.int8)
        self.scale[start:end] = scale

    def weights_of(self, outputs: slice | torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        # All weights of a row share its scale. Were it rounded to a narrow dtype, all would be wrong in the same way.
        wide = torch.promote_types(dtype, torch.float32)
        w = self.weight[outputs].to(wide) * self.scale[outputs, None].to(wide)
        return w.to(dtype)


class Int4Linear(QuantizedLinear):
    """w = scale q + offset, with scale and offset (N, D / GROUP) bfloat16.

    weight   (N, D / 2) uint8: q + 8 of an even input, and of the one after it times 16
    """

    kind = "int4"
    weight: torch.Tensor
    scale: torch.Tensor
    offset: torch.Tensor

    def allocate(self, device: torch.device | str | None) -> None:
        N, D = self.out_features, self.in_features
        self.register_buffer("weight", torch.empty(N, D // 2, dtype=torch.uint8, device=device))
        for name in ("scale", "offset"):
            groups = torch.empty(N, D // GROUP, dtype=torch.bfloat16, device=device)
            self.register_buffer(name, groups)

    def quantize(self, start: int, end: int, weight: torch.Tensor) -> None:
        w = weight.unflatten(1, (-1, GROUP))  # (n, D / GROUP, GROUP)
        low, high = w.amin(-1, keepdim=True), w.amax(-1, keepdim=True)
        least = torch.full_like(low, torch.inf)
        best = [torch.zeros_like(w), low, low]  # q, scale, offset
        for shrink in SHRINKS:
            scale = ((high - low) * (shrink / 15)).bfloat16().float()
            offset = ((high + low + scale) / 2).bfloat16().float()  # q is centred on -1/2
            step = torch.where(scale == 0, 1, scale)  # 0: all weights of the group are equal
            q = ((w - offset) / step).round().clamp(-8, 7)
            error = (q * scale + offset - w).square().sum(-1, keepdim=True)
            better = (error < least) | error.isnan()  # NaN stays NaN
            least = torch.where(better, error, least)
            found = (q, scale, offset)
            best = [torch.where(better, new, old) for new, old in zip(found, best, strict=True)]
        q, scale, offset = best
        pairs = (q + 8).to(torch.uint8).flatten(1).unflatten(1, (-1, 2))  # (n, D / 2, 2)
        self.weight[start:end] = pairs[..., 0] | (pairs[..., 1] << 4)
        self.scale[start:end] = scale[..., 0]
        self.offset[start:end] = offset[..., 0]

    def weights_of(self, outputs: slice | torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        wide = torch.promote_types(dtype, torch.float32)
        q = unpacked(self.weight[outputs]).to(wide).unflatten(1, (-1, GROUP))
        scale = self.scale[outputs, :, None].to(wide)
        offset = self.offset[outputs, :, None].to(wide)
        w = (q - 8) * scale + offset
        return w.flatten(1).to(dtype)


def unpacked(pairs: torch.Tensor) -> torch.Tensor:
    """Two numbers from 0 to 15 in a byte, (n, D / 2) -> one, (n, D)."""
    return torch.stack([pairs & 15, pairs >> 4], -1).flatten(1)


def class_of(kind: str) -> type[QuantizedLinear]:
    """The class of a kind, which is one of common.QUANTIZED."""
    return Int8Linear if kind == "int8" else Int4Linear


# The product


def blocks(N: int, D: int) -> Iterator[tuple[int, int]]:
    """(start, end) of the outputs that are float at a time, at least one."""
    n = max(1, BLOCK // D)
    for start in range(0, N, n):
        yield start, min(start + n, N)


class FrozenProduct(torch.autograd.Function):
    """x (..., D) -> x W' (..., N). No float W is kept for the backward pass, which makes it again, block by block."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, linear: QuantizedLinear) -> torch.Tensor:
        ctx.linear = linear
        y = x.new_empty(*x.shape[:-1], linear.out_features)
        for start, end in blocks(linear.out_features, linear.in_features):
            y[..., start:end] = F.linear(x, linear.dequantized(start, end, x.dtype))
        return y

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        linear = ctx.linear
        total = upcast(gradient.new_zeros(*gradient.shape[:-1], linear.in_features))
        for start, end in blocks(linear.out_features, linear.in_features):
            total += gradient[..., start:end] @ linear.dequantized(start, end, gradient.dtype)
        return total.to(gradient.dtype), None


# In a decoder


class HeadEmbedding(nn.Module):
    """Token ids (...) -> embeddings (..., D), read out of the quantised head that they are tied to.

    heads   the head alone, in a tuple, so that it is not registered a second time
    like    (0,), whose dtype is that of the embeddings: `model.to(dtype)` changes it
    """

    like: torch.Tensor

    def __init__(self, head: QuantizedLinear, dtype: torch.dtype) -> None:
        super().__init__()
        self.heads = (head,)
        self.register_buffer("like", torch.empty(0, dtype=dtype), persistent=False)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        head = self.heads[0]
        weights = head.weights_of(ids.reshape(-1), self.like.dtype)
        return weights.view(*ids.shape, head.in_features)

    def extra_repr(self) -> str:
        return "out of lm_head"


def quantizable(module: nn.Module, kind: str | None) -> TypeGuard[nn.Linear]:
    """Whether a module is a linear whose weight can be of this kind; never if the kind is None."""
    if kind is None or not isinstance(module, nn.Linear):
        return False
    return kind == "int8" or module.in_features % GROUP == 0


def named_weights(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """(name, tensor) of all weights of a model: its parameters, and what is quantised."""
    yield from model.named_parameters()
    for name, module in model.named_modules():
        if isinstance(module, QuantizedLinear):
            yield from module.named_buffers(name, recurse=False)
