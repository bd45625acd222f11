"""Puts a frozen decoder on the fast path, in place. What may be merged or replaced is said here, by exact class.

A subclass may compute something else, so it is not in a table unless it is named there itself.
"""

import ctypes
import sys
from collections.abc import Callable, Iterator
from typing import Any

from torch import nn

from .. import gemma, llama, qwen
from ..common import InputError, warn_once
from ..quantize import Int4Linear, Int8Linear, QuantizedLinear
from . import onednn
from .blocks import CpuBlock, FastBlock, KernelBlock
from .hooks import Unmoved, fix_tensors, has_hook, no_hook, places_of, refuse_hooks
from .linear import (
    KernelInt8,
    Kernels,
    MergedLinear,
    PackedLinear,
    can_merge,
    drop_weight,
    kernels_for,
)
from .norms import CpuNorm, KernelNorm
from .quantized import FastProduct, fast_product, has_operator

# A method that does nothing but apply some linears to one input: their names
Linears = dict[str, tuple[str, ...]]
QKV: Linears = {"qkv": ("q_proj", "k_proj", "v_proj")}
GATE_UP: Linears = {"gate_up": ("gate_proj", "up_proj")}
DELTA_INPUTS: Linears = {"inputs": ("in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a")}
# Of each class, the method that may be merged
MERGED: dict[type[nn.Module], Linears] = {
    llama.Attention: QKV,
    gemma.Attention: QKV,
    qwen.Qwen3Attention: QKV,
    qwen.GatedAttention: QKV,
    llama.MLP: GATE_UP,
    gemma.MLP: GATE_UP,
    qwen.GatedDeltaNet: DELTA_INPUTS,
}
NORMS: set[type[nn.Module]] = {llama.RMSNorm, gemma.OffsetRMSNorm}
BLOCKS: set[type[nn.Module]] = {llama.Block, gemma.Block, qwen.Block35}
# What a block may consist of to take its steps in our kernels, or in fewer operations on a CPU
KNOWN = {*BLOCKS, *MERGED, *NORMS, nn.Linear, Int8Linear, nn.Conv1d}
# Those of Qwen3.5 have more parts than CpuBlock computes.
KNOWN_ON_CPU = {
    llama.Block,
    llama.Attention,
    llama.MLP,
    gemma.Block,
    gemma.Attention,
    gemma.MLP,
    qwen.Qwen3Attention,
    *NORMS,
    nn.Linear,
    Int8Linear,
    Int4Linear,
}


# What stands in for methods of modules in the fast form
FORMS = (MergedLinear, PackedLinear, FastProduct, KernelInt8, CpuNorm, KernelNorm, FastBlock)


def prepare(model: llama.Llama) -> llama.Llama:
    """Put a frozen decoder on the fast path, in place, one weight at a time; returns it.

    InputError if it is there already, and if a module that is going to be merged has a hook.
    """
    if any(is_fast(module) for module in model.modules()):
        raise InputError(
            "this decoder is in its fast form already: give one that was loaded with fast=False"
        )
    kernels = kernels_for(model.norm.weight)
    check_hooks(model, kernels)
    merged = merge_linears(model, kernels)
    pack_linears(model, merged, kernels)
    free_unused_memory()
    replace_norms(model, kernels)
    replace_blocks(model, kernels)
    for module in model.modules():
        replace(module, "_apply", Unmoved(module))
    return model


def is_fast(module: nn.Module) -> bool:
    """Whether a method of a module was replaced by one of the FORMS."""
    return any(isinstance(value, FORMS) for value in vars(module).values())


def check_hooks(model: llama.Llama, kernels: Kernels | None) -> None:
    """InputError if a module has a hook that the fast form would never call, before anything is changed."""
    silent = [linear for _, _, _, linears in mergeable(model, kernels) for linear in linears]
    for block in model.layers:
        if kernels is not None and part_types(block) <= KNOWN:
            silent += [part for part in block.modules() if part is not block]
    if any(has_hook(module) for module in silent):
        no_hook()


def mergeable(
    model: llama.Llama, kernels: Kernels | None
) -> Iterator[tuple[nn.Module, str, tuple[str, ...], list[Any]]]:
    """(a module, its method, the names of its linears, these) for each method that can be one product."""
    for module in model.modules():
        for method, names in MERGED.get(type(module), {}).items():
            linears = [getattr(module, name) for name in names]
            if can_merge(linears, kernels):
                yield module, method, names, linears


def merge_linears(model: llama.Llama, kernels: Kernels | None) -> set[nn.Module]:
    """Merge linears of one input, and return them."""
    merged: set[nn.Module] = set()
    for module, method, names, linears in mergeable(model, kernels):
        for linear in linears:
            refuse_hooks(linear)
        replace(module, method, MergedLinear(linears, places_of(module, names), kernels))
        merged.update(linears)
    return merged


def pack_linears(model: llama.Llama, merged: set[nn.Module], kernels: Kernels | None) -> None:
    """Give each linear that was not merged the fastest product that there is for it."""
    embedding = getattr(model.embed_tokens, "weight", None)  # a HeadEmbedding has none
    tied = model.lm_head.weight is embedding
    for module in model.modules():
        if module in merged:
            continue
        if isinstance(module, QuantizedLinear):
            prepare_quantized(module, kernels)
        elif type(module) is nn.Linear and onednn.can_multiply(module.weight):
            keep = tied and module is model.lm_head  # the embedding needs this weight as it is
            replace(module, "forward", PackedLinear([module.weight], [module.bias], keep))
            if not keep:
                drop_weight(module)
            fix_tensors(module)


def replace_norms(model: llama.Llama, kernels: Kernels | None) -> None:
    """Compute RMSNorms in fewer operations."""
    for module in model.modules():
        if not isinstance(module, llama.RMSNorm) or type(module) not in NORMS:
            continue
        if kernels is not None:
            replace(module, "forward", KernelNorm(module, kernels))
        elif module.weight.device.type == "cpu":
            replace(module, "forward", CpuNorm(module))


def replace_blocks(model: llama.Llama, kernels: Kernels | None) -> None:
    """Let blocks take their steps in fewer operations, or in our kernels, where all their parts are known."""
    for block in model.layers:
        if kernels is None:
            if part_types(block) <= KNOWN_ON_CPU and has_products(block):
                replace(block, "forward", CpuBlock(block))
        elif part_types(block) <= KNOWN:
            replace(block, "forward", KernelBlock(block, kernels))
            for part in block.modules():
                if part is not block:
                    refuse_hooks(part)


def part_types(block: nn.Module) -> set[type[nn.Module]]:
    """The classes of a block and of all its parts."""
    return {type(module) for module in block.modules()}


def has_products(block: Any) -> bool:
    """Whether each product of a block with attention is one of ours for a CPU."""
    attention = block.self_attn
    merged = all(isinstance(one, MergedLinear) for one in (attention.qkv, block.mlp.gate_up))
    alone = (attention.o_proj.forward, block.mlp.down_proj.forward)
    return merged and all(isinstance(one, PackedLinear | FastProduct) for one in alone)


def prepare_quantized(linear: QuantizedLinear, kernels: Kernels | None) -> None:
    """Let a quantised linear that was not merged take our kernel or torch's operator, if there is one for it."""
    if kernels is not None and isinstance(linear, Int8Linear):
        replace(linear, "forward", KernelInt8([linear], kernels))
    elif has_operator(linear):
        product = fast_product([linear])
        replace(linear, "forward", product)
        replace(linear, "weights_of", product.weights_of)
        fix_tensors(linear)
    elif linear.weight.device.type == "cpu":
        warn_once(
            f"this torch has no operator for {linear.kind} weights on this CPU: they are made float again at each "
            "step, which is slower than without --quantize"
        )


def free_unused_memory() -> None:
    """Return to the system what glibc keeps of freed memory: moving weights of some megabytes leaves holes."""
    if sys.platform != "linux":
        return
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # musl has none
    if trim is not None:
        trim(0)


def replace(module: nn.Module, method: str, function: Callable) -> None:
    """Let this one module, not its class, call `function` as its method of this name."""
    setattr(module, method, function)
