"""What replaces the forward of an RMSNorm on the fast path: CpuNorm on a CPU, KernelNorm where our kernels are.

Notation: D width.
"""

import math

import torch

from .. import gemma, llama
from ..common import upcast
from .linear import Kernels


def gain_of(norm: llama.RMSNorm) -> torch.Tensor:
    """What a normed vector is multiplied by, (D,) in float32 or wider."""
    weight = upcast(norm.weight.detach())
    return 1 + weight if type(norm) is gemma.OffsetRMSNorm else weight


class CpuNorm:
    """The forward of an RMSNorm in four of torch's operations: x (..., D) -> (..., D). F.rms_norm takes more on a CPU.

    sqrt(mean(x^2) + eps) is hypot(||x||, sqrt(D eps)) / sqrt(D).

    gain   (..., D), what the normed vector is multiplied by, times sqrt(D)
    least  (), sqrt(D eps)
    """

    def __init__(self, gain: torch.Tensor, eps: float) -> None:
        D = gain.shape[-1]
        self.gain = gain * math.sqrt(D)
        self.least = gain.new_tensor(math.sqrt(D * eps))

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        wide = upcast(x)
        length = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)  # (..., 1)
        y = wide * (self.gain / torch.hypot(length, self.least))
        return y if y.dtype == x.dtype else y.to(x.dtype)


class KernelNorm:
    """The forward of an RMSNorm in one kernel, with a residual added if there is one; with gradients on the plain path.

    x and the residual are (..., D), and so is the result.

    norm  the RMSNorm, whose own forward serves where gradients are asked for
    gain  (D,) float32, what the normed vector is multiplied by
    """

    def __init__(self, norm: llama.RMSNorm, kernels: Kernels) -> None:
        self.gain = gain_of(norm)
        self.eps = norm.eps
        self.norm = norm
        self.kernels = kernels

    def __call__(self, x: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
        if not torch.is_grad_enabled():
            return self.kernels.norm(x, self.gain, self.eps, residual=residual)
        y = type(self.norm).forward(self.norm, x)
        return y if residual is None else residual + y
