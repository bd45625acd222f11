"""What replaces the forward of an RMSNorm on the fast path: CpuNorm on a CPU, KernelNorm where our kernels are.

Notation: D width.
"""

import math

import torch

from .. import gemma, llama
from ..common import upcast
from .linear import Kernels


class CpuNorm:
    """The forward of an RMSNorm in five of torch's operations: x (..., D) -> (..., D). F.rms_norm takes more on a CPU.

    sqrt(mean(x^2) + eps) is hypot(||x||, sqrt(D eps)) / sqrt(D).

    norm   the RMSNorm
    root   (), sqrt(D)
    least  (), sqrt(D eps)
    """

    def __init__(self, norm: llama.RMSNorm) -> None:
        D = len(norm.weight)
        like = upcast(norm.weight.detach())
        self.norm = norm
        self.root = like.new_tensor(math.sqrt(D))
        self.least = like.new_tensor(math.sqrt(D * norm.eps))

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        wide = upcast(x)
        length = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)  # (..., 1)
        y = wide * (self.root / torch.hypot(length, self.least)) * gain_of(self.norm)
        return y.to(x.dtype)


def gain_of(norm: llama.RMSNorm) -> torch.Tensor:
    """What a normed vector is multiplied by, (D,) in float32 or wider."""
    weight = upcast(norm.weight)
    return 1 + weight if type(norm) is gemma.OffsetRMSNorm else weight


class KernelNorm:
    """The forward of an RMSNorm in one kernel, with a residual added if there is one; with gradients on the plain path.

    x and the residual are (..., D), and so is the result.

    norm  the RMSNorm, whose own forward serves where gradients are asked for
    gain  (D,) float32, what the normed vector is multiplied by
    """

    def __init__(self, norm: llama.RMSNorm, kernels: Kernels) -> None:
        self.gain = gain_of(norm).detach()
        self.eps = norm.eps
        self.norm = norm
        self.kernels = kernels

    def __call__(self, x: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
        if not torch.is_grad_enabled():
            return self.kernels.norm(x, self.gain, self.eps, residual=residual)
        y = type(self.norm).forward(self.norm, x)
        return y if residual is None else residual + y
