"""RecursiveLinks: the small trained maps through which frozen agents think and talk (RecursiveMAS, arXiv 2604.25917).

    inner link  R_in(h)  = LN_post(h + W2 gelu(W1 LN_pre(h)))              D -> D, one per agent: a hidden state becomes
                                                                           the agent's own next input embedding
    outer link  R_out(h) = LN_target(W2 gelu(W1 LN_source(h)) + W3 h)      D -> D', one per edge: it becomes an input
                                                                           embedding of the agent at the other end

All maps W are affine, and GELU is the exact (erf) one. Keys and adapter types are those of the release. A link computes
in the dtype of its file, or in its agent's if that is wider; its input is cast to that dtype, and the agent that
receives the result casts it to the dtype of its own embeddings.

Letters: D width of the agent that thinks, D' or D_target width of the agent that hears it.

The readable forms come first. `fused` makes the fast form of a link, the same function with fewer operations.
"""

import torch
import torch.nn.functional as F
from torch import nn

from .common import upcast
from .fast.linear import PackedLinear, few_rows, kernels_for


class InnerLink(nn.Module):
    """(..., D) hidden states after the final norm -> (..., D) input embeddings of the same agent."""

    adapter_type = "ln_res_adapter"

    def __init__(self, D):
        super().__init__()
        self.pre_ln, self.post_ln = nn.LayerNorm(D), nn.LayerNorm(D)
        self.proj1, self.proj2 = nn.Linear(D, D), nn.Linear(D, D)

    def forward(self, h):
        h = h.to(self.proj1.weight.dtype)
        return self.post_ln(h + self.proj2(F.gelu(self.proj1(self.pre_ln(h)))))


class OuterLink(nn.Module):
    """(..., D) outputs of the sender's inner link -> (..., D_target) input embeddings of the receiver."""

    adapter_type = "outer_ln_res_adapter"

    def __init__(self, D, D_target):
        super().__init__()
        self.ln_source, self.ln_target = nn.LayerNorm(D), nn.LayerNorm(D_target)
        self.proj1, self.proj2 = nn.Linear(D, 2 * D_target), nn.Linear(2 * D_target, D_target)
        self.residual_proj = nn.Linear(D, D_target)

    def forward(self, h):
        h = h.to(self.proj1.weight.dtype)
        return self.ln_target(
            self.proj2(F.gelu(self.proj1(self.ln_source(h)))) + self.residual_proj(h)
        )


class FusedInnerLink(nn.Module):
    """An InnerLink with the gain and shift of its first norm folded into proj1."""

    def __init__(self, link):
        super().__init__()
        self.D, self.eps = link.proj1.in_features, link.pre_ln.eps
        self.dtype, self.post_ln = link.proj1.weight.dtype, link.post_ln
        weight, bias = folded(link.pre_ln, link.proj1)
        self.kernels = kernels_for(weight)
        self.proj1, self.proj2 = (
            PackedLinear([weight], [bias]),
            PackedLinear([link.proj2.weight], [link.proj2.bias]),
        )

    def forward(self, h):
        h = h.to(self.dtype)
        if few_rows(h, self.kernels):
            rows, linear = h.reshape(-1, self.D), self.kernels.linear
            y = linear(
                rows, self.proj1.weight, self.proj1.bias, norm="layer", eps=self.eps, act="gelu"
            )
            y = linear(y, self.proj2.weight, self.proj2.bias, residual=rows)
            return self.kernels.norm(
                y, self.post_ln.weight, self.post_ln.eps, self.post_ln.bias
            ).view_as(h)
        return self.post_ln(
            h + self.proj2(F.gelu(self.proj1(F.layer_norm(h, (self.D,), eps=self.eps))))
        )


class FusedOuterLink(nn.Module):
    """An OuterLink that reads h once: [W; W3] h in one product.

    With W and b from `folded` the first norm comes after the product instead of before it: W h / std(h) + b
    """

    def __init__(self, link):
        super().__init__()
        self.dtype, self.eps, self.ln_target = (
            link.proj1.weight.dtype,
            link.ln_source.eps,
            link.ln_target,
        )
        (weight, self.bias), residual = folded(link.ln_source, link.proj1), link.residual_proj
        self.kernels, self.sizes = kernels_for(weight), (len(weight), len(residual.weight))
        self.merged = PackedLinear(
            [weight, residual.weight], [torch.zeros_like(self.bias), residual.bias]
        )
        self.merged_bias = torch.cat(
            [self.bias, residual.bias]
        )  # for the kernel, whose norm is inside
        self.proj2 = PackedLinear([link.proj2.weight], [link.proj2.bias])

    def forward(self, h):
        h = h.to(self.dtype)
        if few_rows(h, self.kernels):
            rows, linear, n = h.reshape(-1, h.shape[-1]), self.kernels.linear, self.sizes[0]
            y = linear(
                rows,
                self.merged.weight,
                self.merged_bias,
                norm="layer",
                eps=self.eps,
                act="gelu",
                normed=n,
            )
            y = linear(y[:, :n], self.proj2.weight, self.proj2.bias, residual=y[:, n:])
            y = self.kernels.norm(y, self.ln_target.weight, self.ln_target.eps, self.ln_target.bias)
            return y.view(*h.shape[:-1], -1)
        y, residual = self.merged(h).split(self.sizes, -1)
        h = upcast(h)
        std = ((h - h.mean(-1, keepdim=True)).square().mean(-1, keepdim=True) + self.eps).sqrt()
        return self.ln_target(self.proj2(F.gelu(y / std + self.bias).to(self.dtype)) + residual)


def folded(norm, linear):
    """weight, bias of the linear that does with (x - c) / std(x), for any number c, what `linear` does with norm(x).

    W (g (x - mean) / std + s) + b = V (x - mean) / std + W s + b with V = W g. The rows of V are shifted so that they add
    up to 0: that changes nothing for x - mean, which adds up to 0 itself, and makes V (x - c) the same for every c.
    """
    W, dtype = upcast(linear.weight), linear.weight.dtype
    V = W * upcast(norm.weight)
    return (V - V.mean(1, keepdim=True)).to(dtype), (
        W @ upcast(norm.bias) + upcast(linear.bias)
    ).to(dtype)


def fused(link):
    """The fast form of an InnerLink or OuterLink, from its weights as they are now, on the device where they are."""
    return FusedInnerLink(link) if isinstance(link, InnerLink) else FusedOuterLink(link)


def apply_link(link: nn.Module, latents: torch.Tensor | list) -> torch.Tensor | list:
    """A link applied to latents (B, m, D), or to all of B of unequal length, (m_b, D) each, at once."""
    if torch.is_tensor(latents):
        return link(latents)
    lengths = [len(own) for own in latents]
    return list(link(torch.cat(latents)).split(lengths))
