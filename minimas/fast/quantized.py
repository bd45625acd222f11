"""Products with quantised weights (quantize.py) in torch's own operators for a CPU, merged where they share an input.

For few rows the cost is reading the weights, and an operator reads them as they are:

    int8   the weighted sum of rows of a quantised embedding table, which torch has for recommender systems. W x is the
           sum of W's columns, each times its x. It computes in float32
    int4   torch's product with 4-bit weights. It wants bfloat16 activations (with float32 ones it is several times
           slower), so x is rounded for the product, and so is what comes out, before it is put back into x's dtype

For many rows the cost is arithmetic. The weights are then made float, block by block; x is not rounded.

Notation: D inputs, N outputs, L lanes: how many outputs lie together. Within such a group of outputs the weights are
ordered by input.
"""

import math
import threading
from collections.abc import Sequence
from functools import cache
from typing import Any, NoReturn

import torch
import torch.nn.functional as F

from ..common import InputError
from ..quantize import GROUP, Int4Linear, Int8Linear, QuantizedLinear, unpacked
from . import onednn

# An exclusive or with it adds 128, modulo 256, to each of eight bytes
EIGHT_SIGNS = int.from_bytes(b"\x80" * 8, signed=True)
TRAILER = 8  # bytes after each row of a table: a factor and a summand, float32
ADDED = 128  # what makes q from -127 to 127 a byte without sign
INDICES = 1 << 17  # of rows of a table that one call sums up
# The most lanes of int8. FBGEMM keeps a sum for each in a register, of which AVX2 has few: more than 96 are slower.
MOST_LANES = 128 if onednn.AVX512 else 96
LANES = 64  # of int4: outputs are padded to a multiple of it
# Weights that are float at a time: fewer cost more calls, more do not stay in the CPU's cache
BLOCK = 1 << 21


class FastProduct:
    """x (..., D) -> x W' + b (..., N), for one or several QuantizedLinears on top of one another.

    Their own weights are gone, so that none is in memory twice.

    bias        (N,) or None
    lanes       L
    most_rows   for which the operator is faster than to make the weights float
    """

    shared = ("bias",)  # what the linears have views of: see MergedLinear
    lanes: int
    most_rows: int

    def __init__(self, linears: Sequence[Any]) -> None:
        self.in_features = linears[0].in_features
        self.out_features = sum(linear.out_features for linear in linears)
        self.bias = stacked([linear.bias for linear in linears])

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        refuse_gradients(x)
        y = self.of_rows(x.reshape(-1, self.in_features))
        return y.view(*x.shape[:-1], self.out_features)

    def of_rows(self, x: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
        """x (rows, D) and perhaps a residual (rows, N) -> x W' + b plus the residual, (rows, N)."""
        if residual is None:
            added = self.bias
        elif self.bias is None:
            added = residual
        else:
            added = residual + self.bias
        if 0 < len(x) <= self.most_rows and x.dtype != torch.float64:
            return self.operator_product(x, added)
        y = self.float_product(x)
        return y if added is None else y + added

    def operator_product(self, x: torch.Tensor, added: torch.Tensor | None) -> torch.Tensor:
        """For few rows: x (rows, D) -> x W' (rows, N), plus what is to be added, (N,) or (rows, N)."""
        raise NotImplementedError

    def weights_of(self, outputs: slice | torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """As QuantizedLinear.weights_of."""
        if isinstance(outputs, slice):
            outputs = torch.arange(self.out_features)[outputs]
        return self.numbered_weights(outputs, dtype)

    def numbered_weights(self, outputs: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """The weights (n, D) of the outputs with these numbers (n,), as floats."""
        raise NotImplementedError

    def float_product(self, x: torch.Tensor) -> torch.Tensor:
        """For many rows: x (rows, D) -> x W' (rows, N), exact but for the rounding of x's dtype."""
        D, L = self.in_features, self.lanes
        outputs = tables_for(self.out_features, L) * L  # with spare ones
        at_once = max(1, BLOCK // (D * L)) * L  # outputs of a block
        y = x.new_empty(len(x), outputs)
        wide = torch.promote_types(x.dtype, torch.float32)
        for start in range(0, outputs, at_once):
            own = y[:, start : start + at_once]
            n = own.shape[1]
            q = WORKSPACE.take(D * n, torch.uint8).view(D, n)
            w = WORKSPACE.take(D * n, wide).view(D, n)
            self.multiply(x, start, q, w, own)
        return y[:, : self.out_features]

    def multiply(
        self, x: torch.Tensor, start: int, q: torch.Tensor, w: torch.Tensor, y: torch.Tensor
    ) -> None:
        """x W' of the outputs from `start` on, into y (rows, n); q (D, n) uint8 and w (D, n) are memory for weights."""
        raise NotImplementedError


class Workspace(threading.local):
    """Memory that a thread uses again and again. The system takes longer to give new memory than we to fill it."""

    def __init__(self) -> None:
        self.parts: dict[torch.dtype, torch.Tensor] = {}
        self.factors: dict[tuple[int, int, int], tuple[torch.Tensor, torch.Tensor]] = {}

    def take(self, size: int, dtype: torch.dtype) -> torch.Tensor:
        """(size,), with whatever was left in it."""
        if dtype not in self.parts or len(self.parts[dtype]) < size:
            # A tensor made in inference mode could not be written to outside of it.
            with torch.inference_mode(False):
                self.parts[dtype] = torch.empty(size, dtype=dtype)
        return self.parts[dtype][:size]

    def take_factors(self, n: int, B: int, D: int) -> tuple[torch.Tensor, torch.Tensor]:
        """(n, B, D) float32 for the factors of `weighted_sums`, and the same flat. n B D <= INDICES, unless n is 1."""
        shape = (n, B, D)
        if shape not in self.factors:
            with torch.inference_mode(False):
                factors = torch.empty(shape, dtype=torch.float32)
                self.factors[shape] = factors, factors.flatten()
        return self.factors[shape]


WORKSPACE = Workspace()


def product(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    """x (rows, D) -> x w (rows, n).

    With AVX-512 by oneDNN. With AVX2 alone torch's own product, MKL's, is faster for weights that are not packed.
    """
    w = w.to(x.dtype)
    return onednn.multiply(x, w.T) if onednn.AVX512 and onednn.can_multiply(w) else x @ w


class FastInt8(FastProduct):
    """Tables of D rows, one for each L outputs, one after another.

    weight         (tables D, L + TRAILER) uint8, for each input of each table a row: q + ADDED of L outputs, then 1 and
                   -ADDED, which make q of it again
    padded_scale   (N + spare,) float32; spare outputs fill the last table
    scale          (N,), its part without them
    """

    most_rows = 8 if onednn.AVX512 else 16

    def __init__(self, linears: Sequence[Int8Linear]) -> None:
        super().__init__(linears)
        D, N = self.in_features, self.out_features
        self.lanes = L = lanes_for(N)
        spare = padded_outputs(N) - N
        self.padded_scale = F.pad(torch.cat([linear.scale for linear in linears]), (0, spare))
        self.scale = self.padded_scale[:N]
        q = linears[0].weight
        if len(linears) > 1:
            q = torch.cat([linear.weight for linear in linears])
        for linear in linears:
            drop(linear, "weight", "scale")
        self.weight = torch.zeros(tables_for(N, L) * D, L + TRAILER, dtype=torch.uint8)
        for table, outputs in zip(self.weight.split(D), q.split(L), strict=True):
            table[:, : len(outputs)] = outputs.view(torch.uint8).T ^ ADDED  # adds 128, modulo 256
        trailer = torch.tensor([1, -ADDED], dtype=torch.float32)
        self.weight[:, L:] = trailer.view(torch.uint8)

    def operator_product(self, x: torch.Tensor, added: torch.Tensor | None) -> torch.Tensor:
        B, D = x.shape
        at_once = max(1, INDICES // (B * D)) * D  # rows of the tables of one call
        if len(self.weight) <= at_once:
            y = weighted_sums(self.weight, x)
        else:
            parts = [weighted_sums(tables, x) for tables in self.weight.split(at_once)]
            y = torch.cat(parts, 1)
        if y.shape[1] > self.out_features:
            y = y[:, : self.out_features]
        y = y * self.scale if added is None else torch.addcmul(added, y, self.scale)
        return y if y.dtype == x.dtype else y.to(x.dtype)

    def numbered_weights(self, outputs: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        L = self.lanes
        wide = torch.promote_types(dtype, torch.float32)
        tables = self.weight.view(-1, self.in_features, L + TRAILER)
        q = tables[outputs // L, :, outputs % L].to(wide) - ADDED  # (n, D)
        return (q * self.scale[outputs, None]).to(dtype)

    def float_product(self, x: torch.Tensor) -> torch.Tensor:
        if x.dtype == torch.float16:  # x q would overflow
            return super().float_product(x.float()).half()
        return super().float_product(x)

    def multiply(
        self, x: torch.Tensor, start: int, q: torch.Tensor, w: torch.Tensor, y: torch.Tensor
    ) -> None:
        D, L = self.in_features, self.lanes
        end = start + y.shape[1]
        n_tables = y.shape[1] // L
        tables = self.weight.view(-1, D, L + TRAILER)[start // L : end // L]
        scale = self.padded_scale[start:end]
        # Eight bytes at a time, since few numbers are quicker to move
        eight = tables.view(torch.int64)[..., : L // 8]  # (n_tables, D, L / 8)
        if onednn.AVX512:  # as one matrix, (D, n_tables L)
            eight = eight.transpose(0, 1)
        torch.bitwise_xor(eight, EIGHT_SIGNS, out=q.view(torch.int64).view(eight.shape))
        w.copy_(q.view(torch.int8))
        if onednn.AVX512:
            torch.mul(product(x, w), scale, out=y)
            return
        # Table by table: each core multiplies with its own
        sums = x @ w.to(x.dtype).view(n_tables, D, L)  # (n_tables, rows, L)
        by_table = y.view(len(x), n_tables, L)
        torch.mul(sums.transpose(0, 1), scale.view(n_tables, L), out=by_table)


def weighted_sums(tables: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Of n tables (n D, L + TRAILER), for x (B, D): the sums of their rows, each times its x, (B, n L) float32."""
    B, D = x.shape
    n = len(tables) // D
    indices, offsets = bags(n, B, D)
    factors, flat = WORKSPACE.take_factors(n, B, D)
    factors.copy_(x)
    sums = torch.ops.quantized.embedding_bag_byte_rowwise_offsets(
        tables, indices, offsets, per_sample_weights=flat
    )  # (n B, L)
    if B == 1:
        return sums.view(1, -1)
    return sums.view(n, B, -1).transpose(0, 1).reshape(B, -1)


def tables_for(N: int, L: int) -> int:
    """How many tables of L outputs hold N outputs."""
    return math.ceil(N / L)


def lanes_for(N: int) -> int:
    """The L with which the tables of N outputs take the least memory."""
    return min(range(64, MOST_LANES + 1, 8), key=lambda L: tables_for(N, L) * (L + TRAILER))


def table_bytes(N: int, D: int) -> int:
    """What the tables of N outputs take."""
    L = lanes_for(N)
    return tables_for(N, L) * D * (L + TRAILER)


def padded_outputs(N: int) -> int:
    """N with the spare outputs of its last table; each has a scale."""
    L = lanes_for(N)
    return tables_for(N, L) * L


@cache
def bags(n: int, B: int, D: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Indices and offsets of n B sums over all D rows of a table: of the first table B times, of the next one, ..."""
    rows = torch.arange(n * D, dtype=torch.int32).view(n, 1, D)
    indices = rows.expand(n, B, D).flatten()
    return indices, torch.arange(0, n * B * D, D, dtype=torch.int32)


class FastInt4(FastProduct):
    """In the packed layout of torch's operator, which depends on the CPU.

    weight   (N', D / 2) uint8, packed; N' is N rounded up to LANES
    groups   (D / GROUP, N', 2) bfloat16: scale and offset
    """

    lanes = LANES
    most_rows = 16

    def __init__(self, linears: Sequence[Int4Linear]) -> None:
        super().__init__(linears)
        spare = -self.out_features % LANES
        groups = torch.cat([torch.stack([one.scale, one.offset], -1) for one in linears])
        groups = F.pad(groups, (0, 0, 0, 0, 0, spare))
        self.groups = groups.transpose(0, 1).contiguous()
        pairs = torch.cat([linear.weight for linear in linears])
        for linear in linears:
            drop(linear, "weight", "scale", "offset")
        self.weight = pack_int4(F.pad(pairs, (0, 0, 0, spare)))

    def __getstate__(self) -> dict[str, Any]:
        """For copy.deepcopy and pickle: on another CPU the packed layout may be another one."""
        return vars(self) | {"weight": unpack_int4(self.weight)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self.weight = pack_int4(self.weight)

    def operator_product(self, x: torch.Tensor, added: torch.Tensor | None) -> torch.Tensor:
        y = torch.ops.aten._weight_int4pack_mm_for_cpu(
            x.bfloat16(), self.weight, GROUP, self.groups
        )
        if y.shape[1] > self.out_features:
            y = y[:, : self.out_features]
        y = y.to(x.dtype)
        return y if added is None else y + added

    def numbered_weights(self, outputs: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        lanes = packed_lanes()
        wide = torch.promote_types(dtype, torch.float32)
        blocks = self.weight.view(-1, self.in_features, lanes // 2)
        lane = outputs % lanes
        # (n, D), bytes with two outputs each
        halves = blocks[outputs // lanes, :, lane % (lanes // 2)]
        is_lower = lane < lanes // 2
        q = torch.where(is_lower[:, None], halves & 15, halves >> 4).to(wide) - 8
        scale, offset = self.groups[:, outputs].to(wide).permute(2, 1, 0)  # (n, D / GROUP) each
        w = q.unflatten(1, (-1, GROUP)) * scale[..., None] + offset[..., None]
        return w.flatten(1).to(dtype)

    def multiply(
        self, x: torch.Tensor, start: int, q: torch.Tensor, w: torch.Tensor, y: torch.Tensor
    ) -> None:
        end = start + y.shape[1]
        groups = self.groups[:, start:end].permute(2, 0, 1)
        scale, offset = groups.to(w.dtype, memory_format=torch.contiguous_format)  # (D / GROUP, n)
        packed_by_inputs(self.weight[start:end], packed_lanes(), q)
        w.copy_(q)  # q + 8
        by_group = w.view(-1, GROUP, w.shape[1])
        torch.addcmul((offset - 8 * scale)[:, None], by_group, scale[:, None], out=by_group)
        y.copy_(product(x, w))


# The packed layout of int4: blocks of 32 or 64 outputs (`lanes`), each with lanes / 2 bytes for each input. Byte j has
# output j of the block in its lower four bits, and output j + lanes / 2 in its upper four.

NIBBLES = 0x0F0F0F0F0F0F0F0F  # the lower four bits of each of eight bytes


def pack_int4(pairs: torch.Tensor) -> torch.Tensor:
    """(N, D / 2) in the layout of Int4Linear -> packed, (N, D / 2). N is a multiple of LANES."""
    packed = torch.empty_like(pairs)
    for some, into in zip(pairs.split(LANES), packed.split(LANES), strict=True):
        q = unpacked(some).int()  # eight times as large as what it becomes
        into.copy_(torch.ops.aten._convert_weight_to_int4pack_for_cpu(q, 1))
    return packed


def unpack_int4(packed: torch.Tensor) -> torch.Tensor:
    """The reverse of `pack_int4`."""
    pairs = torch.empty_like(packed)
    for some, into in zip(packed.split(LANES), pairs.split(LANES), strict=True):
        q = packed.new_empty(2 * packed.shape[1], LANES)
        q = packed_by_inputs(some, packed_lanes(), q).T  # (LANES, D)
        into.copy_(q[:, 0::2] | (q[:, 1::2] << 4))
    return pairs


def packed_by_inputs(packed: torch.Tensor, lanes: int, q: torch.Tensor) -> torch.Tensor:
    """Packed weights (n, D / 2) -> q + 8, from 0 to 15, written into q (D, n) uint8. n is a multiple of LANES."""
    eight = packed.view(torch.int64).view(len(packed) // lanes, -1, lanes // 16)
    eight = eight.transpose(0, 1)  # (D, n / lanes, lanes / 16)
    halves = q.view(torch.int64).view(*eight.shape[:2], 2, lanes // 16)
    torch.bitwise_and(eight, NIBBLES, out=halves[:, :, 0])
    torch.bitwise_and(eight >> 4, NIBBLES, out=halves[:, :, 1])
    return q


@cache
def packed_lanes() -> int:
    """Outputs in a packed block on this CPU; 0 if the operators are missing, or pack in another way."""
    for operator in "_convert_weight_to_int4pack_for_cpu", "_weight_int4pack_mm_for_cpu":
        if not hasattr(torch.ops.aten, operator):
            return 0
    q = torch.arange(LANES * GROUP, dtype=torch.int32).view(LANES, GROUP) * 7 % 16
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(q, 1)
    for lanes in (64, 32):
        into = torch.empty(GROUP, LANES, dtype=torch.uint8)
        if packed.dtype == torch.uint8 and torch.equal(packed_by_inputs(packed, lanes, into).T, q):
            return lanes
    return 0


# For prepare.py and linear.py


def stacked(biases: Sequence[torch.Tensor | None]) -> torch.Tensor | None:
    """The biases of linears on top of one another, (N,), or None if there are none; the bias of one linear is itself.

    All have one or none has: see linear.can_merge.
    """
    present = [bias for bias in biases if bias is not None]
    if not present:
        return None
    return present[0] if len(present) == 1 else torch.cat(present)


def refuse_gradients(x: torch.Tensor) -> None:
    """InputError if a gradient of a product with x is going to be asked for."""
    if torch.is_grad_enabled() and x.requires_grad:
        raise InputError(
            "the fast path computes no gradients on a CPU: load the system with fast=False to train"
        )


def drop(linear: QuantizedLinear, *buffers: str) -> None:
    """Let go of buffers whose numbers are in a FastProduct now."""
    for name in buffers:
        linear.register_buffer(name, None)
    linear.weights_of = no_weights  # type: ignore[assignment]
    linear.register_state_dict_pre_hook(no_state_dict)
    linear.register_load_state_dict_pre_hook(no_loading)


def no_weights(*_: object) -> NoReturn:
    """Stands in for the weights_of of a linear whose weights are merged with others."""
    raise InputError(
        "in the fast form the weights of this linear are packed with others: "
        "load the system with fast=False"
    )


def no_state_dict(*_: object) -> NoReturn:
    """Called before `state_dict` reads a module whose weights are packed: they would be missing."""
    raise InputError(
        "in the fast form weights are packed, so that state_dict would lack them: "
        "load the system with fast=False"
    )


def no_loading(*_: object) -> NoReturn:
    """Called before `load_state_dict` fills a module whose weights are packed: nothing would take them."""
    raise InputError(
        "in the fast form weights are packed, so that load_state_dict would leave them as they are: "
        "load the system with fast=False"
    )


def has_operator(linear: QuantizedLinear) -> bool:
    """Whether this torch has an operator for a QuantizedLinear where its weight is."""
    if linear.weight.device.type != "cpu":
        return False
    if linear.kind == "int4":
        return packed_lanes() > 0
    return hasattr(torch.ops.quantized, "embedding_bag_byte_rowwise_offsets") and has_fbgemm()


def has_fbgemm() -> bool:
    """Whether torch has FBGEMM, which makes the operator for int8 fast; it needs AVX2."""
    return "fbgemm" in torch.backends.quantized.supported_engines


def fast_product(linears: Sequence[Any]) -> FastProduct:
    """The FastProduct of QuantizedLinears of one kind."""
    return FastInt4(linears) if linears[0].kind == "int4" else FastInt8(linears)
