"""What replaces the forward of an RMSNorm on the fast path: CpuNorm on a CPU, KernelNorm where our kernels are.

Notation: D width.
"""

import math

import torch

from .. import gemma, llama
from ..common import state_of, upcast
from .linear import Kernels


def gain_of(norm: llama.RMSNorm) -> torch.Tensor:
    """What a normed vector is multiplied by, (D,) in float32 or wider."""
    weight = upcast(norm.weight)
    return 1 + weight if type(norm) is gemma.OffsetRMSNorm else weight


class CpuNorm:
    """The forward of an RMSNorm in four of torch's operations (an OffsetRMSNorm: five). F.rms_norm takes more on a CPU.

    x (..., D) -> (..., D), by the weight that the norm has at that time.

    sqrt(mean(x^2) + eps) is hypot(||x||, sqrt(D eps)) / sqrt(D).

    norm   the RMSNorm
    root   sqrt(D)
    least  (), sqrt(D eps)
    zero   (), to which addcdiv adds
    """

    def __init__(self, norm: llama.RMSNorm) -> None:
        D = len(norm.weight)
        like = gain_of(norm)
        self.norm = norm
        self.root = math.sqrt(D)
        self.least = like.new_tensor(math.sqrt(D * norm.eps))
        self.zero = like.new_tensor(0)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        wide = upcast(x)
        length = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)  # (..., 1)
        length = torch.hypot(length, self.least)
        factor = torch.addcdiv(self.zero, gain_of(self.norm), length, value=self.root)  # (..., D)
        y = wide * factor
        return y if y.dtype == x.dtype else y.to(x.dtype)


class KernelNorm:
    """The forward of an RMSNorm in one kernel, with a residual added if there is one; with gradients on the plain path.

    x and the residual are (..., D), and so is the result.

    norm      the RMSNorm, whose own forward serves where gradients are asked for
    own_gain  (D,) float32, what `gain` returned last
    seen      the weight that this was made of, by `state_of`
    eps       of the norm
    kernels   those that compute it
    """

    def __init__(self, norm: llama.RMSNorm, kernels: Kernels) -> None:
        # A tensor made in inference mode could not be written to outside of it.
        with torch.inference_mode(False):
            self.own_gain = gain_of(norm).detach().clone()
        self.seen = state_of(norm.weight)
        self.eps = norm.eps
        self.norm = norm
        self.kernels = kernels

    @property
    def gain(self) -> torch.Tensor:
        """(D,) float32, what a normed vector is multiplied by.

        Always in the same memory, which CUDA graphs read. So a weight that was changed reaches them, too, when the next
        prompt is read.
        """
        now = state_of(self.norm.weight)
        if now != self.seen:
            with torch.no_grad():
                self.own_gain.copy_(gain_of(self.norm))
            self.seen = now
        return self.own_gain

    def __call__(self, x: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
        if not torch.is_grad_enabled():
            return self.kernels.norm(x, self.gain, self.eps, residual=residual)
        y = type(self.norm).forward(self.norm, x)
        return y if residual is None else residual + y
