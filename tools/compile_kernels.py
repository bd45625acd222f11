"""Compile the Triton kernels for Hopper (sm_90) without a GPU, in the forms that a step of the released agents takes.

    python tools/compile_kernels.py

The kernels are called as in a run, but with tensors that are nowhere, and compiled where they would be launched. Prints
one JSON object: for each form the bytes of shared memory of a program, how many instructions copy 16 bytes a thread to
it while the program goes on, and whether it waits for the kernels before it ahead of its first access to memory.
"""

import json
import re

import checkpoints
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from minimas.cache import DeltaCache, attention_cache
from minimas.fast import kernels

NAMES = {
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.int64: "*i64",
    torch.int32: "*i32",
    torch.int8: "*i8",
}
seen = {}


def compile_only(kernel, grid, *arguments, num_warps=4, num_stages=3, **named):
    """What a launch compiles: None, 1 and the options are constants; pointers and multiples of 16 are known as such."""
    values, signature, constants, multiples = (
        dict(zip(kernel.arg_names, arguments)) | named | {"early": True},
        {},
        {},
        {},
    )
    for i, parameter in enumerate(kernel.params):
        value, tensor = values[parameter.name], isinstance(values[parameter.name], torch.Tensor)
        if parameter.is_constexpr or value is None or type(value) is int and value == 1:
            constants[parameter.name] = value
            signature[parameter.name] = "constexpr"
            continue
        signature[parameter.name] = (
            NAMES[value.dtype] if tensor else "fp32" if isinstance(value, float) else "i32"
        )
        if tensor or isinstance(value, int) and value % 16 == 0:
            multiples[i,] = [["tt.divisibility", 16]]
    form = f"{kernel.fn.__name__} {constants} {signature} {sorted(multiples)}"
    if form not in seen:
        options = {"num_warps": num_warps, "num_stages": num_stages}
        compiled = triton.compile(
            ASTSource(kernel, signature, constants, multiples), GPUTarget("cuda", 90, 32), options
        )
        ptx = compiled.asm["ptx"]
        waits = (
            re.search(r"griddepcontrol\.wait|\b(ld|st|atom|red)\b\S*\.global|cp\.async", ptx)[0]
            == "griddepcontrol.wait"
        )
        seen[form] = compiled.metadata.shared, ptx.count("cp.async.cg.shared.global"), waits


def new(*shape, dtype=torch.float32):
    return torch.empty(*shape, dtype=dtype, device="meta")


def attention_block(config, B, dtype, window=None, norms=False, gated=False):
    """The kernels of a block with the widths of a released agent, and of an outer link."""
    D, F = config["hidden_size"], config["intermediate_size"]
    H, K = config["num_attention_heads"], config["num_key_value_heads"]
    d = config.get("head_dim") or D // H
    sizes, x, rms = (
        [H * d * (1 + gated), K * d, K * d],
        new(B, D, dtype=dtype),
        {"norm": "rms", "gain": new(D), "eps": 1e-6},
    )
    qkv = kernels.linear(x, new(sum(sizes), D, dtype=dtype), new(sum(sizes), dtype=dtype), **rms)
    q, k, v = (
        part.unflatten(-1, (-1, n))
        for part, n in zip(qkv.split(sizes, -1), (d * (1 + gated), d, d))
    )
    cache, positions = (
        attention_cache(B, K, 1024, d, new(1, dtype=dtype), window),
        new(B, 1, dtype=torch.int64),
    )
    rope, done = [new(B, 1, 1, d // (1 + 3 * gated))] * 2, new(B * K, dtype=torch.int32)
    gains = [new(d) if norms else None] * 2
    y = kernels.attend(q, k, v, rope, positions, cache, done, d**-0.5, *gains, 1e-6, gated)
    x = kernels.linear(y, new(D, H * d, dtype=dtype), residual=x)
    y = kernels.linear(x, new(2 * F, D, dtype=dtype), act="gelu_tanh" if window else "silu", **rms)
    x = kernels.norm(
        kernels.linear(y, new(D, F, dtype=dtype), residual=x), new(D), 1e-6, residual=x
    )
    weight, bias = new(3 * D, D, dtype=dtype), new(3 * D, dtype=dtype)
    y = kernels.linear(x, weight, bias, norm="layer", eps=1e-5, act="gelu", normed=2 * D)
    y = kernels.linear(
        y[:, : 2 * D], new(D, 2 * D, dtype=dtype), new(D, dtype=dtype), residual=y[:, 2 * D :]
    )
    kernels.norm(y, new(D, dtype=dtype), 1e-5, new(D, dtype=dtype))


def delta_block(config, B, dtype):
    """The first half of a block with a Gated DeltaNet."""
    D, d = config["hidden_size"], config["linear_key_head_dim"]
    heads, H = config["linear_num_key_heads"], config["linear_num_value_heads"]
    sizes, of_heads = [(2 * heads + H) * d, H * d, H, H], new(H, dtype=dtype)
    inputs = kernels.linear(
        new(B, D, dtype=dtype), new(sum(sizes), D, dtype=dtype), norm="rms", gain=new(D), eps=1e-6
    )
    inputs = inputs.split(sizes, -1)
    cache = DeltaCache(new(B, sizes[0], 3, dtype=dtype), new(B, H, d, d))
    kernels.delta(
        *inputs, cache, new(sizes[0], 1, 4, dtype=dtype), of_heads, of_heads, new(d), 1e-6
    )


if __name__ == "__main__":
    kernels.launch = compile_only
    widths = {name: config for name, (_, config) in checkpoints.REAL_WIDTHS.items()}
    for B, dtype in (1, torch.bfloat16), (32, torch.bfloat16), (1, torch.float32):
        attention_block(widths["Qwen3-1.7B"], B, dtype, norms=True)
    attention_block(widths["Qwen2.5-Math-1.5B"], 1, torch.bfloat16)
    attention_block(widths["Gemma3-4B"], 1, torch.bfloat16, window=512, norms=True)
    attention_block(widths["Qwen3.5-4B"], 1, torch.bfloat16, norms=True, gated=True)
    delta_block(widths["Qwen3.5-4B"], 2, torch.bfloat16)
    x, weight = new(1, 2048, dtype=torch.bfloat16), new(12288, 2048, dtype=torch.int8)
    rms = {"norm": "rms", "gain": new(2048), "eps": 1e-6, "scale": new(12288)}
    kernels.linear(x, weight, act="silu", **rms)
    print(json.dumps(seen))
