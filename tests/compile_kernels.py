"""Compile the Triton kernels for Hopper (sm_90) without a GPU, in the forms that a step of the released agents takes.

    python tests/compile_kernels.py

The kernels are called as in a run, but with tensors that are nowhere, and compiled where they would be launched. Prints one
JSON object: for each form the bytes of shared memory of a program.
"""

import json

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

import checkpoints
from minimas import kernels
from minimas.cache import DeltaCache, KVCache, WindowCache

NAMES = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.int64: "*i64", torch.int32: "*i32"}
forms = {}


def compile_only(kernel, grid, *arguments, num_warps=4, num_stages=3, **constants):
    """What a launch compiles: None, 1 and the options are constants; pointers and multiples of 16 are known as such."""
    signature, multiples = {}, {}
    for i, (name, value) in enumerate(zip(kernel.arg_names, arguments)):
        if value is None or type(value) is int and value == 1:
            constants[name] = value
            continue
        tensor = isinstance(value, torch.Tensor)
        signature[name] = NAMES[value.dtype] if tensor else "fp32" if isinstance(value, float) else "i32"
        if tensor or isinstance(value, int) and value % 16 == 0:
            multiples[i,] = [["tt.divisibility", 16]]
    form = json.dumps([kernel.fn.__name__, signature, {name: str(value) for name, value in constants.items()}, sorted(multiples)])
    if form not in forms:
        source = ASTSource(kernel, {name: signature.get(name, "constexpr") for name in kernel.arg_names}, constants, multiples)
        forms[form] = triton.compile(source, GPUTarget("cuda", 90, 32), {"num_warps": num_warps, "num_stages": num_stages}).metadata.shared


def steps(config, B, dtype, window, norms):
    """The kernels of a block: config has the widths of a released agent."""
    D, H, K, F = (config[name] for name in ("hidden_size", "num_attention_heads", "num_key_value_heads", "intermediate_size"))
    d = config.get("head_dim") or D // H
    new = lambda *shape, dtype=dtype: torch.empty(*shape, dtype=dtype, device="meta")
    wide = lambda n: new(n, dtype=torch.float32)
    x = new(B, D)
    q, k, v = kernels.linear(x, new((H + 2 * K) * d, D), new((H + 2 * K) * d), gain=wide(D), eps=1e-6).split([H * d, K * d, K * d], -1)
    cache = (WindowCache(B, K, 512, d, new(1)) if window else KVCache(B, K, 512, d, new(1)))
    rope = [new(B, 1, 1, d, dtype=torch.float32)] * 2
    y = kernels.attend(q.unflatten(-1, (H, d)), k.unflatten(-1, (K, d)), v.unflatten(-1, (K, d)), rope, new(B, 1, dtype=torch.int64),
                       cache, new(B * K, dtype=torch.int32), d ** -0.5, *([wide(d)] * 2 if norms else ()))
    x = kernels.linear(y, new(D, H * d), residual=x)
    y = kernels.linear(x, new(2 * F, D), gain=wide(D), eps=1e-6, act="gelu_tanh" if window else "silu")
    kernels.rms_norm(kernels.linear(y, new(D, F), residual=x), wide(D), 1e-6, residual=x)
    y = kernels.linear(x, new(3 * D, D), new(3 * D), row_sums=wide(2 * D), normed=2 * D, eps=1e-5, act="gelu")  # an outer link
    kernels.linear(y[:, :2 * D], new(D, 2 * D), new(D), residual=y[:, 2 * D:])


def delta_steps(config, B, dtype):
    """The kernel of a Gated DeltaNet with the released widths."""
    D, heads, H, d = (config[name] for name in ("hidden_size", "linear_num_key_heads", "linear_num_value_heads", "linear_key_head_dim"))
    new = lambda *shape, dtype=dtype: torch.empty(*shape, dtype=dtype, device="meta")
    sizes = [(2 * heads + H) * d, H * d, H, H]
    inputs = kernels.linear(new(B, D), new(sum(sizes), D), gain=new(D, dtype=torch.float32), eps=1e-6).split(sizes, -1)
    cache = DeltaCache(new(B, sizes[0], 3), new(B, H, d, d, dtype=torch.float32))
    kernels.delta(*inputs, cache, new(sizes[0], 1, 4), new(H), new(H), new(d, dtype=torch.float32), 1e-6)


if __name__ == "__main__":
    kernels.launch = compile_only
    for agent in "Qwen3-1.7B", "Llama3.2-1B", "Qwen2.5-Math-1.5B", "Gemma3-4B":
        for B in (1, 32) if agent == "Qwen3-1.7B" else (1,):
            steps(checkpoints.REAL_WIDTHS[agent][1], B, torch.bfloat16, agent == "Gemma3-4B", agent == "Qwen3-1.7B")
    steps(checkpoints.REAL_WIDTHS["Qwen3-1.7B"][1], 1, torch.float32, False, True)
    delta_steps(checkpoints.REAL_WIDTHS["Qwen3.5-4B"][1], 2, torch.bfloat16)
    named = [json.loads(form) for form in forms]
    print(json.dumps({f"{i} {name} {constants}": shared for i, ((name, _, constants, _), shared) in enumerate(zip(named, forms.values()))}))
