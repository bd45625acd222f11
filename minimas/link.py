"""RecursiveLinks: the small trained maps through which frozen agents think and talk (RecursiveMAS, arXiv 2604.25917).

    inner link  R_in(h)  = LN_post(h + W2 gelu(W1 LN_pre(h)))              d -> d, one per agent: a hidden state becomes
                                                                           the agent's own next input embedding
    outer link  R_out(h) = LN_target(W2 gelu(W1 LN_source(h)) + W3 h)      d -> d', one per edge: it becomes an input
                                                                           embedding of the agent at the other end

All maps are affine, GELU is the exact (erf) one. Keys and files are those of the release: a state dict saved by torch,
`ln_res_adapter` (inner) and `outer_ln_res_adapter` (outer). A link computes in the dtype of its file: its input is cast
in, and who receives the result casts it to the dtype of his embeddings.
"""

import pickle

import torch
import torch.nn.functional as F
from torch import nn

from . import InputError


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


def load_link(link, file, device="cpu"):
    """Fill `link` from a released .pt file, in the file's dtype, and return it on `device`.

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
    if len({t.dtype for t in state.values()}) != 1:
        raise InputError(f"{file} mixes dtypes {sorted({str(t.dtype) for t in state.values()})}: save all tensors in one")
    link.load_state_dict(state, assign=True)
    return link.to(device).requires_grad_(False)


def save_link(link, file, dtype=torch.bfloat16):
    """Write the link's state dict in the released format (bfloat16 unless told), whole or not at all."""
    partial = file.with_name(file.name + ".partial")
    torch.save({k: t.detach().to("cpu", dtype) for k, t in link.state_dict().items()}, partial)
    partial.replace(file)
