"""Linears in the form that is fastest on their device: merged where they share an input, packed for oneDNN on a CPU.

Notation: D inputs, N outputs.
"""

import os
import sysconfig
import warnings
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from shutil import which
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ..quantize import Int8Linear, QuantizedLinear
from . import onednn
from .hooks import FixedTensors, Place, check_places, fix_tensors
from .quantized import (
    fast_product,
    has_operator,
    no_loading,
    no_state_dict,
    refuse_gradients,
    stacked,
)

# With AVX-512, oneDNN reads weights a fifth slower for one to three rows than for four.
FEWEST_ROWS = 4 if onednn.AVX512 else 1


class PackedLinear:
    """x (..., D) -> x W' + b (..., N), for W (N, D) made of several weights on top of one another.

    weight     (N, D), in oneDNN's own layout if it is packed
    bias       (N,) or None
    by_onednn  whether oneDNN multiplies, else torch does
    packed     whether the weight is in oneDNN's layout
    """

    scale: None = None  # which int8 weights have

    def __init__(
        self,
        weights: Sequence[torch.Tensor],
        biases: Sequence[torch.Tensor | None],
        keep: bool = False,
    ) -> None:
        """`keep`: the weight is used elsewhere too, so leave its layout alone."""
        self.weight = weights[0] if len(weights) == 1 else torch.cat(list(weights))
        self.bias = stacked(biases)
        self.by_onednn = onednn.can_multiply(self.weight)
        self.packed = self.by_onednn and not keep
        if self.packed:
            self.weight = onednn.pack(self.weight.detach())

    @property
    def shared(self) -> tuple[str, ...]:
        """What the linears have views of: see MergedLinear."""
        return ("bias",) if self.packed else ("weight", "bias")

    def __getstate__(self) -> dict[str, Any]:
        """For copy.deepcopy and pickle, which cannot read a packed weight: it travels in torch's layout."""
        state = dict(vars(self))
        if self.packed:
            state["weight"] = self.weight.to_dense()
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        if self.packed:
            self.weight = onednn.pack(self.weight)

    def of_rows(self, x: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
        """x (rows, D) and perhaps a residual (rows, N) -> x W' + b plus the residual, (rows, N)."""
        y = self(x)
        return y if residual is None else residual + y

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        if not self.by_onednn:
            return F.linear(x, self.weight, self.bias)
        refuse_gradients(x)
        n = x.numel() // x.shape[-1]
        if n == 0 or n >= FEWEST_ROWS:
            return onednn.multiply(x, self.weight, self.bias)
        # Copies of the last row cost nothing, since the weights are read once.
        rows = x.reshape(n, -1)
        copies = rows[-1:].expand(FEWEST_ROWS - n, -1)
        padded = torch.cat([rows, copies])  # (FEWEST_ROWS, D)
        y = onednn.multiply(padded, self.weight, self.bias)[:n]
        return y.view(*x.shape[:-1], -1)


class MergedLinear:
    """Several linears of one input as one product: x -> their outputs.

    linears  as they were
    places   of the linears
    sizes    how many outputs each of them has
    packed   all of them as one. Their own weights and biases become views of what is named in `packed.shared`, and a
             weight that is packed becomes None. So nothing is in memory twice, and what is changed in place is changed
             for the product, too
    """

    packed: Any  # PackedLinear, FastProduct or KernelInt8

    def __init__(
        self,
        linears: Sequence[Any],
        places: Sequence[Place] = (),
        kernels: "Kernels | None" = None,
    ) -> None:
        """kernels: those that multiply with int8 weights, on CUDA."""
        self.linears = list(linears)
        self.places = places
        self.sizes = [linear.out_features for linear in linears]
        self.packed = merged_product(linears, kernels)
        for linear in linears:
            fix_tensors(linear)
        self.share()

    def __setstate__(self, state: dict[str, Any]) -> None:
        """For copy.deepcopy and pickle, which copy a view as a tensor of its own."""
        vars(self).update(state)
        self.share()

    def share(self) -> None:
        """Make the linears' tensors views of those of the product."""
        for name in self.packed.shared:
            whole = getattr(self.packed, name)
            if whole is None:
                continue
            for linear, part in zip(self.linears, whole.split(self.sizes), strict=True):
                share_tensor(linear, name, part)

    def __call__(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        check_places(self.places)
        return self.packed(x).split(self.sizes, -1)


def merged_product(linears: Sequence[Any], kernels: "Kernels | None") -> Any:
    """Linears that can be merged as one product; weights that are packed for it are taken from them."""
    if isinstance(linears[0], QuantizedLinear):
        return fast_product(linears) if kernels is None else KernelInt8(linears, kernels)
    weights = [linear.weight for linear in linears]
    biases = [linear.bias for linear in linears]
    packed = PackedLinear(weights, biases)
    if packed.packed:
        for linear in linears:
            drop_weight(linear)
    return packed


def share_tensor(linear: nn.Module, name: str, part: torch.Tensor) -> None:
    """Give a linear a part of a merged tensor as its parameter or buffer of this name."""
    if name in linear._buffers:
        assert isinstance(linear._buffers, FixedTensors)
        linear._buffers.share(name, part)
    else:
        assert isinstance(linear._parameters, FixedTensors)
        linear._parameters.share(name, nn.Parameter(part, requires_grad=False))


def can_merge(linears: Sequence[nn.Module], kernels: "Kernels | None") -> bool:
    """Whether these linears of one input can be one product: they are all float, or of one quantised kind."""
    first = linears[0]
    if len({type(linear) for linear in linears}) > 1:
        return False
    if len({linear.bias is None for linear in linears}) > 1:
        return False
    if not isinstance(first, QuantizedLinear):
        return type(first) is nn.Linear  # a subclass may compute something else
    if kernels is not None:
        return isinstance(first, Int8Linear)
    return has_operator(first)


def drop_weight(linear: nn.Linear) -> None:
    """Take from a linear its weight, which is in a PackedLinear now."""
    linear.register_parameter("weight", None)
    linear.register_state_dict_pre_hook(no_state_dict)
    linear.register_load_state_dict_pre_hook(no_loading)


# On CUDA


class Kernels:
    """kernels.py as an object, so that what holds it can be copied and pickled, which a module cannot."""

    def __getattr__(self, name: str) -> Any:
        from . import kernels  # needs Triton, which torch brings along for CUDA only

        return getattr(kernels, name)


def kernels_for(weight: torch.Tensor) -> Kernels | None:
    """The Kernels if they can compute with this weight, else None."""
    if not weight.is_cuda or weight.dtype not in (torch.float32, torch.bfloat16):
        return None
    if find_spec("triton") is None:
        return None
    # Triton looks for the compiler and for the headers in the same places.
    compiler = os.environ.get("CC", "gcc" if which("gcc") else "clang")
    headers = Path(sysconfig.get_path("include", "posix_prefix"))
    if which(compiler) is None or not (headers / "Python.h").exists():
        warnings.warn(
            "Triton cannot build kernels without a C compiler and Python's headers: a step on CUDA "
            "falls back to the plain path, which is slower; install gcc and python3-dev",
            stacklevel=2,
        )
        return None
    return Kernels()


class KernelInt8:
    """x (..., D) -> x W' + b (..., N) for Int8Linears on top of one another: few rows in our kernel, others made float.

    weight, scale   (N, D) int8, (N,): those of the linears become views of them
    bias            (N,) or None
    """

    shared = ("weight", "scale", "bias")  # what the linears have views of: see MergedLinear

    def __init__(self, linears: Sequence[Int8Linear], kernels: Kernels) -> None:
        self.kernels = kernels
        self.whole = merged_int8(linears)

    @property
    def weight(self) -> torch.Tensor:
        return self.whole.weight

    @property
    def scale(self) -> torch.Tensor:
        return self.whole.scale

    @property
    def bias(self) -> torch.Tensor | None:
        return self.whole.bias

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        if not few_rows(x, self.kernels):
            return Int8Linear.forward(self.whole, x)
        rows = x.reshape(-1, x.shape[-1])
        y = self.kernels.linear(rows, self.weight, self.bias, scale=self.scale)
        return y.view(*x.shape[:-1], -1)


def merged_int8(linears: Sequence[Int8Linear]) -> Int8Linear:
    """One Int8Linear with the outputs of several; the only one is itself."""
    if len(linears) == 1:
        return linears[0]
    merged_bias = stacked([linear.bias for linear in linears])
    bias = None if merged_bias is None else nn.Parameter(merged_bias, requires_grad=False)
    outputs = sum(linear.out_features for linear in linears)
    whole = Int8Linear(linears[0].in_features, outputs, bias, device="meta")  # its buffers follow
    whole.weight = torch.cat([linear.weight for linear in linears])
    whole.scale = torch.cat([linear.scale for linear in linears])
    return whole


def few_rows(x: torch.Tensor, kernels: Kernels) -> bool:
    """Whether the kernels are for x (..., D): it has a row, at most ROWS of them, and no gradient is asked for."""
    if torch.is_grad_enabled():
        return False
    return 0 < x.numel() <= kernels.ROWS * x.shape[-1]
