"""RecursiveLinks: the small trained maps through which frozen agents think and talk (RecursiveMAS, arXiv 2604.25917).

    inner link  R_in(h)  = LN_post(h + W2 gelu(W1 LN_pre(h)))              d -> d, one per agent: a hidden state becomes
                                                                           the agent's own next input embedding
    outer link  R_out(h) = LN_target(W2 gelu(W1 LN_source(h)) + W3 h)      d -> d', one per edge: it becomes an input
                                                                           embedding of the agent at the other end

All maps are affine, GELU is the exact (erf) one. Keys and files are those of the release: a state dict saved by torch,
`ln_res_adapter` (inner) and `outer_ln_res_adapter` (outer). A link computes in the dtype of its file: its input is cast
in, and who receives the result casts it to the dtype of his embeddings. (An agent that computes in a wider one has its
links widened.)

`fused` gives the fast form of a link, the same function in fewer steps.
"""

import pickle

import torch
import torch.nn.functional as F
from torch import nn

from . import InputError
from .fast import Product
from .llama import widen


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
        return self.ln_target(self.proj2(F.gelu(self.proj1(self.ln_source(h)))) + self.residual_proj(h))


class FusedInnerLink(nn.Module):
    """An InnerLink whose first norm has its gain and shift in proj1."""

    def __init__(self, link):
        super().__init__()
        self.D, self.dtype, self.post_ln = link.proj1.in_features, link.proj1.weight.dtype, link.post_ln
        self.proj1, self.proj2 = Product(*folded(link.pre_ln, link.proj1)), Product([link.proj2.weight], [link.proj2.bias])

    def forward(self, h):
        h = h.to(self.dtype)
        return self.post_ln(h + self.proj2(F.gelu(self.proj1(F.layer_norm(h, (self.D,))))))


class FusedOuterLink(nn.Module):
    """An OuterLink that reads h once: [W1 g; W3] h in one product.

    The first norm is applied to what the product gave instead of to h: W1 LN(h) = (W1 g h - mean(h) (W1 g) 1) / spread(h) + W1 s.
    """

    def __init__(self, link):
        super().__init__()
        self.dtype, self.eps, self.ln_target = link.proj1.weight.dtype, link.ln_source.eps, link.ln_target
        residual = link.residual_proj
        (weight,), (self.bias,) = folded(link.ln_source, link.proj1)
        self.row_sums, self.sizes = widen(weight).sum(1), (len(weight), len(residual.weight))
        self.joint = Product([weight, residual.weight], [torch.zeros_like(self.bias), residual.bias])
        self.proj2 = Product([link.proj2.weight], [link.proj2.bias])

    def forward(self, h):
        h = h.to(self.dtype)
        y, residual = self.joint(h).split(self.sizes, -1)
        mean = widen(h).mean(-1, keepdim=True)
        spread = ((h - mean).square().mean(-1, keepdim=True) + self.eps).sqrt()
        y = (y - mean * self.row_sums) / spread + self.bias
        return self.ln_target(self.proj2(F.gelu(y).to(self.dtype)) + residual)


def folded(norm, linear):
    """[weight], [bias] of what does after a bare LayerNorm what `linear` does after `norm`.

    W (g n + s) + b = (W g) n + (W s + b)
    """
    weight, dtype = widen(linear.weight), linear.weight.dtype
    return [(weight * widen(norm.weight)).to(dtype)], [(weight @ widen(norm.bias) + widen(linear.bias)).to(dtype)]


def fused(link):
    """The fast form of a link: its weights as they are now, laid out for the device they are on."""
    return FusedInnerLink(link) if isinstance(link, InnerLink) else FusedOuterLink(link)


def load_link(link, file, device="cpu", dtype=None):
    """Fill `link` from a released .pt file, in the file's dtype or `dtype` where that is wider, and return it on `device`.

    Raises InputError when the file is not a plain state dict of floating tensors, or its keys or shapes are not the link's.
    """
    try:
        state = torch.load(file, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError, OSError) as e:
        raise InputError(f"{file} is not a readable state dict ({type(e).__name__}): fetch the file again; minimas "
                         "reads links with weights_only=True and runs no code from them") from e
    if not isinstance(state, dict) or not all(torch.is_tensor(t) and t.is_floating_point() for t in state.values()):
        raise InputError(f"{file} is not a plain state dict: expected floating tensors under {', '.join(link.state_dict())}")
    found, expected = ({k: tuple(t.shape) for k, t in s.items()} for s in (state, link.state_dict()))
    for key in sorted({*found, *expected}):
        if found.get(key) != expected.get(key):
            raise InputError(f"{file}: {key} has shape {found.get(key, 'none (missing)')}, expected "
                             f"{expected.get(key, 'no such key')} for a {link.adapter_type} of this agent; "
                             "is it another agent's link?")
    stored = {t.dtype for t in state.values()}
    if len(stored) != 1:
        raise InputError(f"{file} mixes dtypes {sorted({str(t.dtype) for t in state.values()})}: save all tensors in one")
    link.load_state_dict(state, assign=True)
    stored = stored.pop()
    return link.to(device, torch.promote_types(stored, dtype or stored)).requires_grad_(False)


def save_link(link, file, dtype=torch.bfloat16):
    """Write the link's state dict in the released format (bfloat16 unless told), whole or not at all."""
    partial = file.with_name(file.name + ".partial")
    torch.save({k: t.detach().to("cpu", dtype) for k, t in link.state_dict().items()}, partial)
    partial.replace(file)
