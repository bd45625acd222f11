"""Products with quantised weights (quantize.py) in torch's own operators for a CPU, merged where they share an input.

For few rows the cost is reading the weights, and the operators read them as they are. They want bfloat16 activations
(with float32 ones they are five to ten times slower), so x is rounded for the product, and what comes out is put back
into x's dtype: norms, residual stream, caches and links keep theirs. For many rows the cost is arithmetic. The weights
are then made float, block by block, and x is not rounded.

Notation: D inputs, N outputs.
"""

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F

from ..common import InputError
from ..quantize import GROUP, FrozenProduct, Int4Linear, Int8Linear, QuantizedLinear, unpacked

MOST_ROWS = {"int8": 16, "int4": 16}  # for which the operators are faster
INT8_STEP = (
    16  # inputs that the operator for int8 takes at a time: it reads beyond the end of others
)
LANES = 64  # outputs that int4's packed layout keeps together, at most


class FastProduct:
    """x (..., D) -> x W' + b (..., N), for one or several QuantizedLinears on top of one another.

    bias   (N,) or None
    """

    def __init__(self, linears: Sequence[QuantizedLinear]) -> None:
        self.in_features = linears[0].in_features
        self.out_features = sum(linear.out_features for linear in linears)
        self.most_rows = MOST_ROWS[linears[0].kind]
        present = [linear.bias for linear in linears if linear.bias is not None]
        self.bias = torch.cat(present) if present else None

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        if torch.is_grad_enabled() and x.requires_grad:
            raise InputError(
                "the fast path computes no gradients on a CPU: load the system with fast=False to train"
            )
        rows = x.numel() // x.shape[-1]
        if 0 < rows <= self.most_rows and x.dtype != torch.float64:
            y = self.few_rows(x.reshape(rows, -1).bfloat16())  # (rows, N)
            y = y.to(x.dtype).view(*x.shape[:-1], -1)
        else:
            y = FrozenProduct.apply(x, self)
        return y if self.bias is None else y + self.bias

    def few_rows(self, x: torch.Tensor) -> torch.Tensor:
        """x (rows, D) bfloat16 -> x W' (rows, N) bfloat16."""
        raise NotImplementedError

    def dequantized(
        self, start: int = 0, end: int | None = None, dtype: torch.dtype = torch.float32
    ) -> torch.Tensor:
        """The weights (end - start, D) of the outputs from `start` to `end`, as floats."""
        raise NotImplementedError


class FastInt8(FastProduct):
    """weight (N, D) int8 and scale (N,): those of the linears become views of them."""

    def __init__(self, linears: Sequence[Int8Linear]) -> None:
        super().__init__(linears)
        self.weight = linears[0].weight
        self.scale = linears[0].scale
        if len(linears) == 1:
            return
        self.weight = torch.cat([linear.weight for linear in linears])
        self.scale = torch.cat([linear.scale for linear in linears])
        start = 0
        for linear in linears:
            end = start + linear.out_features
            linear.weight = self.weight[start:end]
            linear.scale = self.scale[start:end]
            start = end

    def few_rows(self, x: torch.Tensor) -> torch.Tensor:
        return torch.ops.aten._weight_int8pack_mm(x, self.weight, self.scale)

    def dequantized(
        self, start: int = 0, end: int | None = None, dtype: torch.dtype = torch.float32
    ) -> torch.Tensor:
        return self.weight[start:end].to(dtype) * self.scale[start:end, None].to(dtype)


class FastInt4(FastProduct):
    """The linears' own weights are gone, so that none is in memory twice.

    weight   (N', D / 2) uint8, packed; N' is N rounded up to LANES
    groups   (D / GROUP, N', 2) bfloat16: scale and offset
    """

    def __init__(self, linears: Sequence[Int4Linear]) -> None:
        super().__init__(linears)
        spare = -self.out_features % LANES
        groups = torch.cat([torch.stack([one.scale, one.offset], -1) for one in linears])
        groups = F.pad(groups, (0, 0, 0, 0, 0, spare))
        self.groups = groups.transpose(0, 1).contiguous()
        pairs = torch.cat([linear.weight for linear in linears])
        for linear in linears:
            for name in ("weight", "scale", "offset"):
                linear.register_buffer(name, None)
        self.weight = pack(F.pad(pairs, (0, 0, 0, spare)))

    def __getstate__(self) -> dict[str, Any]:
        """For copy.deepcopy and pickle: on another CPU the packed layout may be another one."""
        return vars(self) | {"weight": unpack(self.weight)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self.weight = pack(self.weight)

    def few_rows(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.ops.aten._weight_int4pack_mm_for_cpu(x, self.weight, GROUP, self.groups)
        return y[:, : self.out_features]

    def dequantized(
        self, start: int = 0, end: int | None = None, dtype: torch.dtype = torch.float32
    ) -> torch.Tensor:
        end = self.out_features if end is None else end
        packed_end = end + -end % LANES
        q = by_inputs(self.weight[start:packed_end]).to(dtype)  # (D, n)
        scale, offset = self.groups[:, None, start:packed_end].to(dtype).unbind(-1)
        # (q - 8) scale + offset
        w = torch.addcmul(offset - 8 * scale, q.unflatten(0, (-1, GROUP)), scale)
        return w.flatten(0, 1)[:, : end - start].T


# The packed layout of int4: blocks of `lanes` outputs; in each, for each input, the first half of the outputs in the
# lower four bits of lanes / 2 bytes, and the other half in the upper four.


def pack(pairs: torch.Tensor) -> torch.Tensor:
    """(N, D / 2) in the layout of Int4Linear -> packed, (N, D / 2). N is a multiple of LANES."""
    packed = torch.empty_like(pairs)
    for some, into in zip(pairs.split(LANES), packed.split(LANES), strict=True):
        q = unpacked(some).int()  # eight times as large as what it becomes
        into.copy_(torch.ops.aten._convert_weight_to_int4pack_for_cpu(q, 1))
    return packed


def unpack(packed: torch.Tensor) -> torch.Tensor:
    """The reverse of `pack`."""
    pairs = torch.empty_like(packed)
    for some, into in zip(packed.split(LANES), pairs.split(LANES), strict=True):
        q = by_inputs(some).T  # (LANES, D)
        into.copy_(q[:, 0::2] | q[:, 1::2] << 4)
    return pairs


def by_inputs(packed: torch.Tensor, lanes: int | None = None) -> torch.Tensor:
    """Packed weights (n, D / 2) -> q + 8, from 0 to 15, (D, n). n is a multiple of LANES."""
    lanes = lanes or lanes_here()
    half = packed.view(len(packed) // lanes, -1, lanes // 2)  # (n / lanes, D, lanes / 2)
    q = torch.cat([half & 15, half >> 4], -1)  # (n / lanes, D, lanes)
    return q.transpose(0, 1).flatten(1)


@cache
def lanes_here() -> int:
    """Outputs that the operator for int4 keeps together on this CPU; 0 if it is missing, or packs in another way."""
    for operator in "_convert_weight_to_int4pack_for_cpu", "_weight_int4pack_mm_for_cpu":
        if not hasattr(torch.ops.aten, operator):
            return 0
    q = torch.arange(LANES * GROUP).view(LANES, GROUP) * 7 % 16
    try:
        packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(q.int(), 1)
    except RuntimeError:
        return 0
    for lanes in (LANES, LANES // 2):
        if packed.shape == (LANES, GROUP // 2) and torch.equal(by_inputs(packed, lanes).T, q):
            return lanes
    return 0


def has_operator(linear: QuantizedLinear) -> bool:
    """Whether this torch has an operator for a QuantizedLinear where its weight is."""
    if linear.weight.device.type != "cpu":
        return False
    if linear.kind == "int4":
        return lanes_here() > 0
    return hasattr(torch.ops.aten, "_weight_int8pack_mm") and linear.in_features % INT8_STEP == 0


def fast_product(linears: Sequence[Any]) -> FastProduct:
    """The FastProduct of QuantizedLinears of one kind."""
    return FastInt4(linears) if linears[0].kind == "int4" else FastInt8(linears)
