"""Linears in the form that is fastest on their device: merged where they share an input, packed for oneDNN on a CPU.

Letters: D inputs, N outputs.
"""

import os
import sysconfig
import warnings
from importlib.util import find_spec
from pathlib import Path
from shutil import which

import torch
import torch.nn.functional as F

from ..common import InputError

# With AVX-512, oneDNN reads weights a fifth slower for one to three rows than for four.
FEWEST_ROWS = 4 if torch.backends.cpu.get_cpu_capability() == "AVX512" else 1


class PackedLinear:
    """x (..., D) -> x W' + b (..., N), for W (N, D) made of several weights on top of one another."""

    def __init__(self, weights, biases, keep=False):
        """`keep`: the weight is used elsewhere too, so leave its layout alone."""
        self.weight = weights[0] if len(weights) == 1 else torch.cat(list(weights))
        self.bias = None if biases[0] is None else torch.cat(list(biases))
        self.onednn = can_pack(self.weight)
        if self.onednn and not keep:
            self.weight = torch.ops.mkldnn._reorder_linear_weight(self.weight.detach(), None)

    def __call__(self, x):
        if not self.onednn:
            return F.linear(x, self.weight, self.bias)
        if torch.is_grad_enabled() and x.requires_grad:
            raise InputError(
                "the fast path computes no gradients on a CPU: load the system with plain=True to train"
            )
        if (
            0 < (n := x.numel() // x.shape[-1]) < FEWEST_ROWS
        ):  # copies cost nothing, since the weights are read once
            rows = x.reshape(n, -1)
            padded = torch.cat([rows, rows[-1:].expand(FEWEST_ROWS - n, -1)])
            return onednn_linear(padded, self.weight, self.bias)[:n].view(*x.shape[:-1], -1)
        return onednn_linear(x, self.weight, self.bias)


def onednn_linear(x, weight, bias):
    """x W' + b with a packed weight."""
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


class MergedLinear:
    """Several linears of one input as one product: x -> their outputs."""

    def __init__(self, linears):
        self.sizes = [linear.out_features for linear in linears]
        self.packed = PackedLinear(
            [linear.weight for linear in linears], [linear.bias for linear in linears]
        )
        views = (
            [None] * len(linears) if self.packed.onednn else self.packed.weight.split(self.sizes)
        )
        for linear, view in zip(linears, views):  # no weight is in memory twice
            linear.weight = None if view is None else torch.nn.Parameter(view, requires_grad=False)

    def __call__(self, x):
        return self.packed(x).split(self.sizes, -1)


def can_pack(weight):
    """Whether oneDNN can pack and multiply this weight. Its operators are not public in torch: look for each."""
    if (
        weight.device.type != "cpu"
        or weight.requires_grad
        or not torch.backends.mkldnn.is_available()
    ):
        return False
    if not (
        hasattr(torch.ops.mkldnn, "_linear_pointwise")
        and hasattr(torch.ops.mkldnn, "_reorder_linear_weight")
    ):
        return False
    return (
        weight.dtype == torch.float32
        or weight.dtype == torch.bfloat16
        and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    )


# On CUDA


def kernels_for(weight):
    """The module kernels.py if its kernels can compute with this weight, else None."""
    if not (
        weight.is_cuda and weight.dtype in (torch.float32, torch.bfloat16) and find_spec("triton")
    ):
        return None
    compiler = os.environ.get(
        "CC", "gcc" if which("gcc") else "clang"
    )  # Triton looks in the same places
    if (
        which(compiler) is None
        or not Path(sysconfig.get_path("include", "posix_prefix"), "Python.h").exists()
    ):
        warnings.warn(
            "Triton cannot build kernels without a C compiler and Python's headers: a step on CUDA takes the "
            "ordinary way, which is slower; install gcc and python3-dev"
        )
        return None
    from . import kernels  # needs Triton, which torch brings along for CUDA only

    return kernels


def few_rows(x, kernels):
    """Whether the kernels are for x (..., D): it has a row, at most ROWS of them, and no gradient is asked for."""
    if kernels is None or torch.is_grad_enabled():
        return False
    return 0 < x.numel() <= kernels.ROWS * x.shape[-1]
