"""Puts a frozen decoder on the fast path, in place. What may be merged or replaced is said here, by exact class.

A subclass may compute something else, so it is not in a table unless it is named there itself.
"""

from torch import nn

from .. import gemma, llama, qwen
from .blocks import DecodeBlock, Norm
from .linear import MergedLinear, PackedLinear, can_pack, kernels_for

QKV = {"qkv": ("q_proj", "k_proj", "v_proj")}
GATE_UP = {"gate_up": ("gate_proj", "up_proj")}
MERGED = {  # class -> {its method that does nothing but apply these linears to one input: their names}
    llama.Attention: QKV,
    gemma.Attention: QKV,
    qwen.Qwen3Attention: QKV,
    qwen.GatedAttention: QKV,
    llama.MLP: GATE_UP,
    gemma.MLP: GATE_UP,
    qwen.GatedDeltaNet: {"inputs": ("in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a")},
}
NORMS = {llama.RMSNorm, gemma.OffsetRMSNorm}
KNOWN = {
    llama.Block,
    gemma.Block,
    qwen.Block35,
    nn.Linear,
    nn.Conv1d,
    *MERGED,
    *NORMS,
}  # what our kernels can compute


def prepare(model):
    """Put a frozen decoder on the fast path, in place, one weight at a time; returns it."""
    tied = model.lm_head.weight is model.embed_tokens.weight
    for module in model.modules():
        for method, names in MERGED.get(type(module), {}).items():
            setattr(module, method, MergedLinear([getattr(module, name) for name in names]))
    for module in model.modules():
        if isinstance(module, nn.Linear) and module.weight is not None and can_pack(module.weight):
            keep = tied and module is model.lm_head
            module.forward = PackedLinear([module.weight], [module.bias], keep)
            module.weight = module.weight if keep else None
    kernels = kernels_for(model.norm.weight)
    if kernels:
        for module in model.modules():
            if type(module) in NORMS:
                module.forward = Norm(module, kernels)
        for block in model.layers:
            if {type(module) for module in block.modules()} <= KNOWN:
                block.forward = DecodeBlock(block, kernels)
    return model
