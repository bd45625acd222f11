"""RecursiveLinks: the small trained maps through which frozen agents think and talk (RecursiveMAS, arXiv 2604.25917).

    inner link  R_in(h)  = LN_post(h + W2 gelu(W1 LN_pre(h)))              D -> D, one per agent: a hidden state becomes
                                                                           the agent's own next input embedding
    outer link  R_out(h) = LN_target(W2 gelu(W1 LN_source(h)) + W3 h)      D -> D', one per edge: it becomes an input
                                                                           embedding of the agent at the other end

All maps W are affine, and GELU is the exact (erf) one. Keys and adapter types are those of the release. A link computes
in the dtype of its file, or in its agent's if that is wider; its input is cast to that dtype, and the agent that
receives the result casts it to the dtype of its own embeddings.

Notation: D width of the agent that thinks, D' or D_target width of the agent that hears it.

The readable forms come first. `fused` makes the fast form of a link, the same function with fewer operations.
"""

from typing import overload

import torch
import torch.nn.functional as F
from torch import nn

from .common import upcast
from .fast.linear import Kernels, PackedLinear, few_rows, kernels_for, no_state_dict


class InnerLink(nn.Module):
    """(..., D) hidden states after the final norm -> (..., D) input embeddings of the same agent."""

    adapter_type = "ln_res_adapter"

    def __init__(self, D: int) -> None:
        super().__init__()
        self.pre_ln = nn.LayerNorm(D)
        self.post_ln = nn.LayerNorm(D)
        self.proj1 = nn.Linear(D, D)
        self.proj2 = nn.Linear(D, D)

    def forward(self, h: torch.Tensor) -> torch.Tensor:
        h = h.to(self.proj1.weight.dtype)
        y = F.gelu(self.proj1(self.pre_ln(h)))  # (..., D)
        return self.post_ln(h + self.proj2(y))


class OuterLink(nn.Module):
    """(..., D) outputs of the sender's inner link -> (..., D_target) input embeddings of the receiver."""

    adapter_type = "outer_ln_res_adapter"

    def __init__(self, D: int, D_target: int) -> None:
        super().__init__()
        self.ln_source = nn.LayerNorm(D)
        self.ln_target = nn.LayerNorm(D_target)
        self.proj1 = nn.Linear(D, 2 * D_target)
        self.proj2 = nn.Linear(2 * D_target, D_target)
        self.residual_proj = nn.Linear(D, D_target)

    def forward(self, h: torch.Tensor) -> torch.Tensor:
        h = h.to(self.proj1.weight.dtype)
        y = F.gelu(self.proj1(self.ln_source(h)))  # (..., 2 D_target)
        return self.ln_target(self.proj2(y) + self.residual_proj(h))


class FusedInnerLink(nn.Module):
    """An InnerLink with the gain and shift of its first norm folded into proj1."""

    def __init__(self, link: InnerLink) -> None:
        super().__init__()
        weight, bias = folded(link.pre_ln, link.proj1)
        self.D = link.proj1.in_features
        self.dtype = weight.dtype
        self.eps = link.pre_ln.eps
        self.kernels = kernels_for(weight)
        self.proj1 = PackedLinear([weight], [bias])
        self.proj2 = PackedLinear([link.proj2.weight], [link.proj2.bias])
        self.post_ln = link.post_ln
        self.register_state_dict_pre_hook(no_state_dict)

    def forward(self, h: torch.Tensor) -> torch.Tensor:
        h = h.to(self.dtype)
        if self.kernels is not None and few_rows(h, self.kernels):
            return self.in_kernels(h, self.kernels)
        y = F.layer_norm(h, (self.D,), eps=self.eps)
        y = F.gelu(self.proj1(y))  # (..., D)
        return self.post_ln(h + self.proj2(y))

    def in_kernels(self, h: torch.Tensor, kernels: Kernels) -> torch.Tensor:
        """The same in three kernels of fast/kernels.py."""
        rows = h.reshape(-1, self.D)
        first, second, norm = self.proj1, self.proj2, self.post_ln
        y = kernels.linear(rows, first.weight, first.bias, norm="layer", eps=self.eps, act="gelu")
        y = kernels.linear(y, second.weight, second.bias, residual=rows)
        y = kernels.norm(y, norm.weight, norm.eps, norm.bias)
        return y.view_as(h)


class FusedOuterLink(nn.Module):
    """An OuterLink that reads h once: [W; W3] h in one product.

    With W and b from `folded` the first norm comes after the product instead of before it: W h / std(h) + b

    sizes        outputs of W and of W3
    merged       [W; W3], with the bias of W3 alone
    bias         b
    merged_bias  b and the bias of W3: the kernel has the norm inside
    """

    def __init__(self, link: OuterLink) -> None:
        super().__init__()
        weight, bias = folded(link.ln_source, link.proj1)
        residual = link.residual_proj
        self.dtype = weight.dtype
        self.eps = link.ln_source.eps
        self.kernels = kernels_for(weight)
        self.sizes = (len(weight), len(residual.weight))
        no_bias = torch.zeros_like(bias)  # b comes after the division
        self.merged = PackedLinear([weight, residual.weight], [no_bias, residual.bias])
        self.bias = bias
        self.merged_bias = torch.cat([bias, residual.bias])
        self.proj2 = PackedLinear([link.proj2.weight], [link.proj2.bias])
        self.ln_target = link.ln_target
        self.register_state_dict_pre_hook(no_state_dict)

    def forward(self, h: torch.Tensor) -> torch.Tensor:
        h = h.to(self.dtype)
        if self.kernels is not None and few_rows(h, self.kernels):
            return self.in_kernels(h, self.kernels)
        y, residual = self.merged(h).split(self.sizes, -1)  # (..., 2 D_target), (..., D_target)
        h = upcast(h)
        centred = h - h.mean(-1, keepdim=True)  # (..., D)
        variance = centred.square().mean(-1, keepdim=True)  # (..., 1)
        std = (variance + self.eps).sqrt()
        y = F.gelu(y / std + self.bias)
        return self.ln_target(self.proj2(y.to(self.dtype)) + residual)

    def in_kernels(self, h: torch.Tensor, kernels: Kernels) -> torch.Tensor:
        """The same in three kernels of fast/kernels.py."""
        rows = h.reshape(-1, h.shape[-1])
        n, _ = self.sizes  # only these outputs have the norm and the activation
        weight, bias = self.merged.weight, self.merged_bias
        # (rows, 2 D_target + D_target)
        y = kernels.linear(rows, weight, bias, norm="layer", eps=self.eps, act="gelu", normed=n)
        y, residual = y[:, :n], y[:, n:]
        y = kernels.linear(y, self.proj2.weight, self.proj2.bias, residual=residual)
        y = kernels.norm(y, self.ln_target.weight, self.ln_target.eps, self.ln_target.bias)
        return y.view(*h.shape[:-1], -1)


def folded(norm: nn.LayerNorm, linear: nn.Linear) -> tuple[torch.Tensor, torch.Tensor]:
    """weight, bias of the linear that does with (x - c) / std(x), for any number c, what `linear` does with norm(x).

    W (g (x - mean) / std + s) + b = V (x - mean) / std + W s + b with V = W g. The rows of V are shifted so that they
    add up to 0: that changes nothing for x - mean, which adds up to 0 itself, and makes V (x - c) the same for every c.
    """
    dtype = linear.weight.dtype
    W = upcast(linear.weight)  # (N, D)
    V = W * upcast(norm.weight)
    V = V - V.mean(1, keepdim=True)
    bias = W @ upcast(norm.bias) + upcast(linear.bias)  # (N,)
    return V.to(dtype), bias.to(dtype)


@overload
def fused(link: InnerLink) -> FusedInnerLink: ...
@overload
def fused(link: OuterLink) -> FusedOuterLink: ...
def fused(link: InnerLink | OuterLink) -> FusedInnerLink | FusedOuterLink:
    """The fast form of an InnerLink or OuterLink, from its weights as they are now, on the device where they are."""
    if isinstance(link, InnerLink):
        return FusedInnerLink(link)
    return FusedOuterLink(link)


def apply_link(link: nn.Module, latents: torch.Tensor | list) -> torch.Tensor | list:
    """A link applied to latents (B, m, D), or to all of B of unequal length, (m_b, D) each, at once."""
    if torch.is_tensor(latents):
        return link(latents)
    lengths = [len(own) for own in latents]
    return list(link(torch.cat(latents)).split(lengths))
