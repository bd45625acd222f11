"""A step of one token per row on CUDA, in Triton: few kernels, each of which reads its weights once and little else.

A decode step is memory-bound: its cost is reading each weight once. Four kernels therefore do what takes thirty
operations of torch or more in each block, so that little else is read, written or waited for:

    linear     y = act(W norm(x) + b) + residual, a product with everything that stands before and after it
    attend     norms and rotation of q and k, the write into the KV cache, and split-KV flash decoding over its filled
               part
    delta      all of a Gated DeltaNet between its projections, its memory included
    norm       y = gain x / rms(x) + residual, or a LayerNorm

Sums are float32, and results are rounded once where the plain path rounds at each operation. Block sizes are powers of
two that cover their dimension; the excess is masked.

From Hopper on, a kernel starts while the one before it still runs (programmatic dependent launch). Until that one has
ended, it may only ask for weights, which no kernel writes: all that stands before `wait`.

The rest of the package comes here through linear.Kernels alone, and only where Triton is: it comes with torch for CUDA.
With TRITON_INTERPRET=1 the same kernels run on a CPU, slowly: that is how the tests run them without a GPU.

Notation: B rows, K inputs, N outputs; in attention H query heads, K key/value heads, G = H / K, d head width.
Padded sizes: rows for B, dims for d or D, dims_k and dims_v for d_k and d_v, heads and few for G, taps for the inputs
that a convolution sees; `some` splits are read at once. rows, heads and dims are at least 16 where a tensor core
multiplies, few is not.
In a kernel, names that end in _ptr are pointers, and names that end in mask say which elements are there.
"""

from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl

from ..cache import DeltaCache, KVCache, WindowCache
from ..llama import Rope

ROWS = 32  # rows of a step that the kernels take; more are work for matrix products of torch
MULTIPROCESSORS = 132  # of an H100 or H200; sizes are chosen so that each has something to read
GATES = ("silu", "gelu_tanh")  # act(first half of W's rows) times its second half


@triton.jit
def wait(early: tl.constexpr) -> None:
    """Wait for the kernels before this one and all that they wrote, if it was started early; let the next one start."""
    if early:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()


@triton.jit
def fetch(
    w_ptr: tl.tensor,
    n: tl.tensor,
    N: tl.tensor,
    K: tl.tensor,
    gated: tl.constexpr,
    BK: tl.constexpr,
) -> None:
    """Have the chip's cache read the first eight blocks of rows n of a weight, or four of each half; do not wait."""
    halves: tl.constexpr = 2 if gated else 1
    # Numbers in the 128 bytes that are read at once
    line: tl.constexpr = 1024 // w_ptr.dtype.element_ty.primitive_bitwidth
    k = tl.arange(0, 8 * BK // halves // line) * line
    w_ptrs = w_ptr + tl.minimum(n, N - 1)[:, None] * K + tl.minimum(k, K - 1)[None, :]
    for half in tl.static_range(halves):
        at = w_ptrs + half * N * K
        tl.inline_asm_elementwise(
            "prefetch.global.L2 [$1]; mov.b32 $0, 0;", "=r,l", [at], tl.int32, is_pure=False, pack=1
        )


@triton.jit
def gelu_tanh(x: tl.tensor) -> tl.tensor:
    """x (1 + tanh u) / 2 for u = sqrt(2 / pi) (x + 0.044715 x^3). This is x sigmoid(2 u)."""
    twice_u = 1.5957691216057308 * (x + 0.044715 * x * x * x)
    return x * tl.sigmoid(twice_u)


@triton.jit
def linear_kernel(
    x_ptr: tl.tensor,
    w_ptr: tl.tensor,
    bias_ptr: tl.tensor,
    gain_ptr: tl.tensor,
    residual_ptr: tl.tensor,
    scale_ptr: tl.tensor,
    y_ptr: tl.tensor,
    B: tl.tensor,
    N: tl.tensor,
    K: tl.tensor,
    x_row: tl.tensor,
    residual_row: tl.tensor,
    normed: tl.tensor,
    eps: tl.tensor,
    norm: tl.constexpr,
    act: tl.constexpr,
    gated: tl.constexpr,
    rows: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    early: tl.constexpr,
) -> None:
    """BN outputs of all rows. Each of four warps sums over a quarter of every block of BK inputs.

    A norm needs sums over all of x. They are gathered on the way, as products too, and scale the outputs at the end.
    """
    b = tl.arange(0, rows)
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    if early:
        fetch(w_ptr, n, N, K, gated, BK)
    wait(early)
    y = tl.zeros((4, rows, BN), tl.float32)
    up = tl.zeros((4, rows, BN), tl.float32)
    squares = tl.zeros((4, rows, rows), tl.float32)  # x x', whose diagonal are sums of squares
    sums = tl.zeros((4, rows, 16), tl.float32)  # x times ones: the same sum in every column
    for start in range(0, K, BK):
        quarter = tl.arange(0, 4)[:, None, None] * (BK // 4)
        k = start + quarter + tl.arange(0, BK // 4)[None, None, :]  # (4, 1, BK / 4)
        w_ptrs = w_ptr + n[None, :, None] * K + k  # (4, BN, BK / 4)
        w_mask = (n < N)[None, :, None] & (k < K)
        x_mask = (b < B)[None, :, None] & (k < K)
        x = tl.load(x_ptr + b[None, :, None] * x_row + k, mask=x_mask, other=0)
        w = tl.load(w_ptrs, mask=w_mask, other=0).to(x.dtype)  # int8 is exact in it
        if norm != "":
            squares = tl.dot(x, tl.trans(x, 0, 2, 1), squares, input_precision="ieee")
        if norm == "layer":
            ones = tl.full((4, BK // 4, 16), 1, x.dtype)
            sums = tl.dot(x, ones, sums, input_precision="ieee")
        if norm == "rms":
            x = (x * tl.load(gain_ptr + k, mask=k < K, other=0)).to(x.dtype)
        y = tl.dot(x, tl.trans(w, 0, 2, 1), y, input_precision="ieee")
        if gated:
            w_up = tl.load(w_ptrs + N * K, mask=w_mask, other=0).to(x.dtype)
            up = tl.dot(x, tl.trans(w_up, 0, 2, 1), up, input_precision="ieee")
    y = tl.sum(y, 0)  # (rows, BN)
    up = tl.sum(up, 0)
    if scale_ptr is not None:
        y *= tl.load(scale_ptr + n, mask=n < N, other=0)
        if gated:
            up *= tl.load(scale_ptr + N + n, mask=n < N, other=0)
    if norm != "":
        diagonal = tl.where(b[:, None] == b, tl.sum(squares, 0), 0)
        variance = tl.sum(diagonal, 1)[:, None] / K  # (rows, 1)
        if norm == "layer":
            mean = tl.max(tl.sum(sums, 0), 1)[:, None] / K
            variance = tl.maximum(variance - mean * mean, 0)
        scale = tl.where(n < normed, tl.rsqrt(variance + eps), 1)
        y = y * scale
        up = up * scale
    if bias_ptr is not None:
        y += tl.load(bias_ptr + n, mask=n < N, other=0).to(tl.float32)
    if act == "gelu":
        y = tl.where(n < normed, 0.5 * y * (1 + tl.erf(y * 0.7071067811865476)), y)
    if act == "silu":
        y = y * tl.sigmoid(y) * up
    if act == "gelu_tanh":
        y = gelu_tanh(y) * up
    y_mask = (b < B)[:, None] & (n < N)
    if residual_ptr is not None:
        residual_ptrs = residual_ptr + b[:, None] * residual_row + n
        y += tl.load(residual_ptrs, mask=y_mask, other=0).to(tl.float32)
    tl.store(y_ptr + b[:, None] * N + n, y.to(y_ptr.dtype.element_ty), mask=y_mask)


def linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    norm: str = "",
    gain: torch.Tensor | None = None,
    eps: float = 0.0,
    act: str = "",
    normed: int | None = None,
    residual: torch.Tensor | None = None,
    scale: torch.Tensor | None = None,
) -> torch.Tensor:
    """x (B, K), weight (N, K), bias (N,) -> act(W norm(x) + b) + residual, (B, N), in x's dtype; B at most ROWS.

    norm      rms: an RMSNorm with gain (K,) float32 and eps. layer: a LayerNorm with eps, without gain and shift, and
              the mean is not subtracted from x: the rows of W must add up to 0, so that it cannot matter
    act       gelu (erf); or silu or gelu_tanh, W being [W_gate; W_up]: act(W_gate norm(x)) * W_up norm(x), (B, N / 2),
              without a bias
    normed    only the first `normed` outputs have the norm and the activation (default: all)
    residual  (B, N)
    scale     (N,) float32 of an int8 weight, the weights being scale times that

    The last dimension of x and residual must be contiguous, their rows need not be.
    """
    B, K = x.shape
    gated = act in GATES
    assert not (gated and bias is not None), "the kernel has no bias for the second half"
    N = len(weight) // 2 if gated else len(weight)
    y = x.new_empty(B, N)
    rows = max(16, triton.next_power_of_2(B))  # a tensor core multiplies 16 rows at least
    BN = 16 if N >= 14 * MULTIPROCESSORS else 8
    # A block is 8 KiB of a weight. Three or five of them are on their way at any time.
    BK = 8192 // (BN * x.element_size())
    BK = min(BK, max(64, triton.next_power_of_2(K)))
    programs = triton.cdiv(N, BN)
    launch(
        linear_kernel,
        (programs,),
        x,
        weight,
        bias,
        gain,
        residual,
        scale,
        y,
        B=B,
        N=N,
        K=K,
        x_row=x.stride(0),
        residual_row=0 if residual is None else residual.stride(0),
        normed=len(weight) if normed is None else normed,
        eps=eps,
        norm=norm,
        act=act,
        gated=gated,
        rows=rows,
        BN=BN,
        BK=BK,
        num_warps=4,
        num_stages=6 if programs <= MULTIPROCESSORS else 4,
    )
    return y


@triton.jit
def rotated_heads(
    x_ptr: tl.tensor,
    gain_ptr: tl.tensor,
    mask: tl.tensor,
    i: tl.tensor,
    cos_ptr: tl.tensor,
    sin_ptr: tl.tensor,
    rotated: tl.tensor,
    d: tl.tensor,
    eps: tl.tensor,
) -> tl.tensor:
    """Heads at x_ptr (heads, 1), by dimension i: normed if there is a gain, the first `rotated` dimensions rotated."""
    half = rotated // 2
    turns = i < rotated
    partner = tl.where(turns, tl.where(i < half, i + half, i - half), i)
    x = tl.load(x_ptr + i, mask=mask, other=0).to(tl.float32)  # (heads, dims)
    other = tl.load(x_ptr + partner, mask=mask, other=0).to(tl.float32)
    if gain_ptr is not None:
        scale = tl.rsqrt(tl.sum(x * x, 1) / d + eps)[:, None]
        x *= scale * tl.load(gain_ptr + i, mask=i < d, other=0)
        other *= scale * tl.load(gain_ptr + partner, mask=i < d, other=0)
    cos = tl.load(cos_ptr + i, mask=turns, other=1)
    sin = tl.load(sin_ptr + i, mask=turns, other=0)
    return x * cos + other * sin


@triton.jit
def attend_range(
    q: tl.tensor,
    y: tl.tensor,
    denominator: tl.tensor,
    running_max: tl.tensor,
    keys_ptr: tl.tensor,
    values_ptr: tl.tensor,
    start: tl.tensor,
    end: tl.tensor,
    new_index: tl.tensor,
    i: tl.tensor,
    d: tl.tensor,
    BS: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """Attention of q (heads, dims) over the keys from index `start` to `end` except `new_index`, by an online softmax.

    It goes on from y (heads, dims), the sum of values, each times exp(score - running_max), and from denominator
    (heads,), the sum of these factors.
    """
    for block in range(start, end, BS):
        s = block + tl.arange(0, BS)
        at = s[:, None] * d + i  # (BS, dims)
        mask = (s < end)[:, None] & (i < d)
        keys = tl.load(keys_ptr + at, mask=mask, other=0)
        values = tl.load(values_ptr + at, mask=mask, other=0)
        score = tl.dot(q, keys.T, input_precision="ieee")  # (heads, BS)
        score = tl.where((s < end) & (s != new_index), score, -1e30)
        new_max = tl.maximum(running_max, tl.max(score, 1))
        p = tl.exp(score - new_max[:, None])
        rescale = tl.exp(running_max - new_max)
        denominator = denominator * rescale + tl.sum(p, 1)
        running_max = new_max
        y = tl.dot(p.to(values.dtype), values, y * rescale[:, None], input_precision="ieee")
    return y, denominator, running_max


@triton.jit
def attend_kernel(
    q_ptr: tl.tensor,
    k_ptr: tl.tensor,
    v_ptr: tl.tensor,
    q_gain_ptr: tl.tensor,
    k_gain_ptr: tl.tensor,
    cos_ptr: tl.tensor,
    sin_ptr: tl.tensor,
    position_ptr: tl.tensor,
    keys_ptr: tl.tensor,
    values_ptr: tl.tensor,
    stored_positions_ptr: tl.tensor,
    outputs_ptr: tl.tensor,
    maxima_ptr: tl.tensor,
    denominators_ptr: tl.tensor,
    done_ptr: tl.tensor,
    y_ptr: tl.tensor,
    q_row: tl.tensor,
    q_head: tl.tensor,
    kv_row: tl.tensor,
    K: tl.tensor,
    G: tl.tensor,
    d: tl.tensor,
    ring: tl.tensor,
    window: tl.tensor,
    rotated: tl.tensor,
    scale: tl.tensor,
    eps: tl.tensor,
    gated: tl.constexpr,
    splits: tl.constexpr,
    heads: tl.constexpr,
    few: tl.constexpr,
    dims: tl.constexpr,
    BS: tl.constexpr,
    early: tl.constexpr,
) -> None:
    """The G query heads that share a key/value head, in one row, over one of at most `splits` parts of the keys.

    This is split-KV flash decoding.
    Position p is at index p modulo ring. The new key is not read from the cache, so that no split waits for its
    writing; it belongs to split 0. The split that is done last adds up all of them.
    """
    wait(early)
    b = tl.program_id(0)
    head = tl.program_id(1)
    split = tl.program_id(2)
    g = tl.arange(0, heads)
    i = tl.arange(0, dims)[None, :]
    bk = b * K + head
    position = tl.load(position_ptr + b)
    new_index = position % ring  # of the new key
    first = tl.maximum(position - window + 1, 0)
    last = tl.minimum(position, ring)
    span = tl.maximum(tl.cdiv(tl.cdiv(last - first, splits), BS), 1) * BS  # keys of a split
    used = tl.maximum(tl.cdiv(last - first, span), 1).to(tl.int32)  # splits that have any
    if split >= used:
        return
    cos_ptr = cos_ptr + b * rotated
    sin_ptr = sin_ptr + b * rotated
    q_ptr = q_ptr + b * q_row + head * G * q_head
    kv = b * kv_row + head * d
    q_mask = (g < G)[:, None] & (i < d)
    q_ptrs = q_ptr + g[:, None] * q_head
    q = rotated_heads(q_ptrs, q_gain_ptr, q_mask, i, cos_ptr, sin_ptr, rotated, d, eps)
    k = rotated_heads(k_ptr + kv, k_gain_ptr, i < d, i, cos_ptr, sin_ptr, rotated, d, eps)
    v = tl.load(v_ptr + kv + i, mask=i < d, other=0)  # (1, dims), as k; q is (heads, dims)
    dtype: tl.constexpr = keys_ptr.dtype.element_ty
    keys_ptr += (bk * (ring + 1)).to(tl.int64) * d
    values_ptr += (bk * (ring + 1)).to(tl.int64) * d
    q = (q * scale).to(dtype)
    k = k.to(dtype)
    if split == 0:
        tl.store(keys_ptr + new_index * d + i, k, mask=i < d)
        tl.store(values_ptr + new_index * d + i, v, mask=i < d)
        if stored_positions_ptr is not None:
            tl.store(stored_positions_ptr + b * (ring + 1) + new_index, position)
    is_first = (split == 0).to(tl.float32)  # 1 in the split of the new key, else 0
    new_score = tl.sum(q.to(tl.float32) * k.to(tl.float32), 1)  # (heads,)
    running_max = tl.where(split == 0, new_score, -1e30)
    denominator = tl.zeros((heads,), tl.float32) + is_first
    y = tl.zeros((heads, dims), tl.float32) + is_first * v.to(tl.float32)
    start = first + split * span
    end = tl.minimum(last, first + (split + 1) * span)
    y, denominator, running_max = attend_range(
        q, y, denominator, running_max, keys_ptr, values_ptr, start, end, new_index, i, d, BS
    )
    at = (bk * splits + split) * heads + g
    tl.store(maxima_ptr + at, running_max)
    tl.store(denominators_ptr + at, denominator)
    tl.store(outputs_ptr + at[:, None] * dims + i, y, mask=q_mask)
    tl.debug_barrier()  # all of this split is written before it counts as done
    done_before = tl.atomic_add(done_ptr + bk, 1, sem="acq_rel", scope="gpu")
    if done_before == used - 1:
        combine_splits(
            outputs_ptr,
            maxima_ptr,
            denominators_ptr,
            q_ptr + d,
            y_ptr,
            bk,
            used,
            G,
            d,
            q_head,
            gated,
            splits,
            heads,
            few,
            dims,
        )
        tl.store(done_ptr + bk, 0)  # for the next step


@triton.jit
def combine_splits(
    outputs_ptr: tl.tensor,
    maxima_ptr: tl.tensor,
    denominators_ptr: tl.tensor,
    gate_ptr: tl.tensor,
    y_ptr: tl.tensor,
    bk: tl.tensor,
    used: tl.tensor,
    G: tl.tensor,
    d: tl.tensor,
    q_head: tl.tensor,
    gated: tl.constexpr,
    splits: tl.constexpr,
    heads: tl.constexpr,
    few: tl.constexpr,
    dims: tl.constexpr,
) -> None:
    """Write the output of G heads: the sum of the first `used` splits, each rescaled to the maximum of all."""
    # Splits that are read at once: what registers hold
    some: tl.constexpr = min(splits, max(1, 8192 // (few * dims)))
    g = tl.arange(0, few)
    i = tl.arange(0, dims)
    all_splits = tl.arange(0, splits)[:, None]
    at_all = (bk * splits + all_splits) * heads + g  # (splits, few)
    in_use = all_splits < used
    maxima = tl.load(maxima_ptr + at_all, mask=in_use, other=-1e30, cache_modifier=".cg")
    denominators = tl.load(denominators_ptr + at_all, mask=in_use, other=0, cache_modifier=".cg")
    running_max = tl.max(maxima, 0)
    denominator = tl.sum(denominators * tl.exp(maxima - running_max), 0)
    y = tl.zeros((few, dims), tl.float32)
    q_mask = (g < G)[:, None] & (i < d)
    for start in range(0, used, some):
        split = start + tl.arange(0, some)[:, None, None]
        at = (bk * splits + split) * heads + g[None, :, None]  # (some, few, 1)
        maximum = tl.load(maxima_ptr + at, mask=split < used, other=-1e30, cache_modifier=".cg")
        rescale = tl.exp(maximum - running_max[None, :, None])
        mask = q_mask[None] & (split < used)
        outputs = tl.load(outputs_ptr + at * dims + i, mask=mask, other=0, cache_modifier=".cg")
        y += tl.sum(outputs * rescale, 0)
    y /= denominator[:, None]
    if gated:
        gate = tl.load(gate_ptr + g[:, None] * q_head + i, mask=q_mask, other=0)
        y *= tl.sigmoid(gate.to(tl.float32))
    tl.store(y_ptr + (bk * G + g)[:, None] * d + i, y.to(y_ptr.dtype.element_ty), mask=q_mask)


def attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    rope: Rope,
    positions: torch.Tensor,
    cache: KVCache | WindowCache,
    done: torch.Tensor,
    scale: float,
    q_gain: torch.Tensor | None = None,
    k_gain: torch.Tensor | None = None,
    eps: float = 0.0,
    gated: bool = False,
) -> torch.Tensor:
    """One new token per row: q (B, H, d), k and v (B, K, d), not yet normed or rotated -> (B, H d); writes the cache.

    rope       cos and sin (B, 1, 1, n) of the n dimensions of a head that are rotated
    positions  (B, 1), at least 0; below the capacity of a KVCache, where nothing checks it
    done       int32 zeros, at least B K of them, which are zeros again afterwards
    gains      (d,) float32: q and k are normed by an RMSNorm with this gain and eps
    gated      q is (B, H, 2 d), each head and then its gate: the output is multiplied by the sigmoid of the gate
    """
    B, H, _ = q.shape
    _, K, d = k.shape
    cos, sin = rope
    G = H // K
    ring = cache.k.shape[2] - 1  # positions there is room for, without the index for padding
    y = q.new_empty(B, H * d)
    heads = max(16, triton.next_power_of_2(G))
    dims = max(16, triton.next_power_of_2(d))
    BS = 32 if dims * q.element_size() < 1024 else 16
    splits = number_of_splits(B * K, ring, BS)
    parts = B * K * splits * heads
    maxima = q.new_empty(parts, dtype=torch.float32)
    denominators = q.new_empty(parts, dtype=torch.float32)
    outputs = q.new_empty(parts * dims, dtype=torch.float32)
    window = 2**30
    stored_positions = None
    if isinstance(cache, WindowCache):  # it holds no key beyond its window
        stored_positions = cache.positions
    elif cache.window:
        window = cache.window
    launch(
        attend_kernel,
        (B, K, splits),
        q,
        k,
        v,
        q_gain,
        k_gain,
        cos,
        sin,
        positions.contiguous(),
        cache.k,
        cache.v,
        stored_positions,
        outputs,
        maxima,
        denominators,
        done,
        y,
        q_row=q.stride(0),
        q_head=q.stride(1),
        kv_row=k.stride(0),
        K=K,
        G=G,
        d=d,
        ring=ring,
        window=window,
        rotated=cos.shape[-1],
        scale=scale,
        eps=eps,
        gated=gated,
        splits=splits,
        heads=heads,
        few=triton.next_power_of_2(G),
        dims=dims,
        BS=BS,
        num_warps=4,
        num_stages=3,
    )
    return y


def number_of_splits(programs: int, ring: int, BS: int) -> int:
    """Into how many parts the keys of each of B K `programs` are split: a power of two, at most 32.

    How n keys are divided must not depend on the capacity, so that no answer depends on earlier ones.
    """
    most = min(32, 4 * MULTIPROCESSORS // programs, triton.next_power_of_2(ring) // BS)
    return triton.next_power_of_2(max(1, most) + 1) // 2  # the power of two at or below it


@triton.jit
def convolve(
    x_ptr: tl.tensor,
    memory_ptr: tl.tensor,
    weight_ptr: tl.tensor,
    c: tl.tensor,
    mask: tl.tensor,
    past: tl.tensor,
    taps: tl.constexpr,
) -> tl.tensor:
    """silu of a causal convolution over `past` remembered inputs and a new one, for channels c; remembers that."""
    j = tl.arange(0, taps)[None, :]
    channel_mask = mask[:, None]
    x = tl.load(x_ptr + c, mask=mask, other=0).to(tl.float32)[:, None]
    memory_ptr += c[:, None] * past + j
    remembered = tl.load(memory_ptr, mask=channel_mask & (j < past), other=0).to(tl.float32)
    moved = tl.load(memory_ptr + 1, mask=channel_mask & (j < past - 1), other=0).to(tl.float32)
    weight_ptrs = weight_ptr + c[:, None] * (past + 1) + j
    weight = tl.load(weight_ptrs, mask=channel_mask & (j <= past), other=0).to(tl.float32)
    y = tl.sum(tl.where(j < past, remembered, x) * weight, 1)
    tl.debug_barrier()  # all threads have read before any one writes
    remembered = tl.where(j < past - 1, moved, x).to(memory_ptr.dtype.element_ty)
    tl.store(memory_ptr, remembered, mask=channel_mask & (j < past))
    return y * tl.sigmoid(y)


@triton.jit
def delta_kernel(
    qkv_ptr: tl.tensor,
    z_ptr: tl.tensor,
    b_ptr: tl.tensor,
    a_ptr: tl.tensor,
    memory_ptr: tl.tensor,
    weight_ptr: tl.tensor,
    state_ptr: tl.tensor,
    A_log_ptr: tl.tensor,
    dt_bias_ptr: tl.tensor,
    gain_ptr: tl.tensor,
    y_ptr: tl.tensor,
    row: tl.tensor,
    key_heads: tl.tensor,
    group: tl.tensor,
    d_k: tl.tensor,
    d_v: tl.tensor,
    past: tl.tensor,
    scale: tl.tensor,
    eps: tl.tensor,
    dims_k: tl.constexpr,
    dims_v: tl.constexpr,
    taps: tl.constexpr,
    early: tl.constexpr,
) -> None:
    """A head of q and k in one row, and the `group` heads of v that use it, one by one; notation as in delta.py."""
    wait(early)
    b = tl.program_id(0)
    head = tl.program_id(1)
    i = tl.arange(0, dims_k)
    j = tl.arange(0, dims_v)
    qkv_ptr = qkv_ptr + b * row
    memory_ptr = memory_ptr + b * (2 * key_heads * d_k + key_heads * group * d_v) * past
    of_q = head * d_k + i  # channels
    q = convolve(qkv_ptr, memory_ptr, weight_ptr, of_q, i < d_k, past, taps)
    of_k = (key_heads + head) * d_k + i
    k = convolve(qkv_ptr, memory_ptr, weight_ptr, of_k, i < d_k, past, taps)
    q *= tl.rsqrt(tl.sum(q * q, 0) + 1e-6) * scale
    k *= tl.rsqrt(tl.sum(k * k, 0) + 1e-6)
    for h in range(head * group, (head + 1) * group):
        bh = b * key_heads * group + h
        state_ptrs = state_ptr + (bh * d_k + i[:, None]) * d_v + j
        state_mask = (i < d_k)[:, None] & (j < d_v)
        # The longest way: it begins before the barrier of the convolution.
        S = tl.load(state_ptrs, mask=state_mask, other=0)
        z = tl.load(z_ptr + b * row + h * d_v + j, mask=j < d_v, other=0).to(tl.float32)
        dt = tl.load(a_ptr + b * row + h).to(tl.float32) + tl.load(dt_bias_ptr + h).to(tl.float32)
        dt = tl.where(dt > 20, dt, tl.log(1 + tl.exp(tl.minimum(dt, 20.0))))  # softplus
        A = tl.exp(tl.load(A_log_ptr + h).to(tl.float32))
        beta = tl.sigmoid(tl.load(b_ptr + b * row + h).to(tl.float32))
        of_v = 2 * key_heads * d_k + h * d_v + j
        v = convolve(qkv_ptr, memory_ptr, weight_ptr, of_v, j < d_v, past, taps)
        S *= tl.exp(-A * dt)
        found = tl.sum(S * k[:, None], 0)  # (dims_v,): S' k
        S += k[:, None] * (beta * (v - found))[None, :]
        o = tl.sum(S * q[:, None], 0)
        # All have read: the convolution of v has a barrier.
        tl.store(state_ptrs, S, mask=state_mask)
        gain = tl.load(gain_ptr + j, mask=j < d_v, other=0)
        o *= tl.rsqrt(tl.sum(o * o, 0) / d_v + eps) * gain * z * tl.sigmoid(z)
        tl.store(y_ptr + bh * d_v + j, o.to(y_ptr.dtype.element_ty), mask=j < d_v)


def delta(
    qkv: torch.Tensor,
    z: torch.Tensor,
    b: torch.Tensor,
    a: torch.Tensor,
    cache: DeltaCache,
    conv_weight: torch.Tensor,
    A_log: torch.Tensor,
    dt_bias: torch.Tensor,
    gain: torch.Tensor,
    eps: float,
) -> torch.Tensor:
    """One new token per row of a Gated DeltaNet: its four projections (B, ...), parts of one tensor -> (B, H d_v).

    cache      is changed in place
    gain, eps  of the norm of the output, (d_v,) float32
    """
    B, channels = qkv.shape
    _, H, d_k, d_v = cache.state.shape
    key_heads = (channels - H * d_v) // (2 * d_k)
    past = cache.conv.shape[2]  # kernel - 1
    y = qkv.new_empty(B, H * d_v)
    launch(
        delta_kernel,
        (B, key_heads),
        qkv,
        z,
        b,
        a,
        cache.conv,
        conv_weight,
        cache.state,
        A_log,
        dt_bias,
        gain,
        y,
        row=qkv.stride(0),
        key_heads=key_heads,
        group=H // key_heads,
        d_k=d_k,
        d_v=d_v,
        past=past,
        scale=d_k**-0.5,
        eps=eps,
        dims_k=triton.next_power_of_2(d_k),
        dims_v=triton.next_power_of_2(d_v),
        taps=triton.next_power_of_2(past + 1),
        num_warps=8,
    )
    return y


@triton.jit
def norm_kernel(
    x_ptr: tl.tensor,
    gain_ptr: tl.tensor,
    shift_ptr: tl.tensor,
    residual_ptr: tl.tensor,
    y_ptr: tl.tensor,
    B: tl.tensor,
    D: tl.tensor,
    eps: tl.tensor,
    rows: tl.constexpr,
    dims: tl.constexpr,
    early: tl.constexpr,
) -> None:
    """An RMSNorm of `rows` rows, or a LayerNorm if there is a shift."""
    wait(early)
    b = tl.program_id(0) * rows + tl.arange(0, rows)[:, None]
    i = tl.arange(0, dims)[None, :]
    at = b.to(tl.int64) * D + i
    mask = (b < B) & (i < D)
    x = tl.load(x_ptr + at, mask=mask, other=0).to(tl.float32)
    if shift_ptr is not None:
        mean = tl.sum(x, 1)[:, None] / D
        x = tl.where(mask, x - mean, 0)
    scale = tl.rsqrt(tl.sum(x * x, 1)[:, None] / D + eps)
    y = x * scale * tl.load(gain_ptr + i, mask=i < D, other=0).to(tl.float32)
    if shift_ptr is not None:
        y += tl.load(shift_ptr + i, mask=i < D, other=0).to(tl.float32)
    if residual_ptr is not None:
        y += tl.load(residual_ptr + at, mask=mask, other=0).to(tl.float32)
    tl.store(y_ptr + at, y.to(y_ptr.dtype.element_ty), mask=mask)


def norm(
    x: torch.Tensor,
    gain: torch.Tensor,
    eps: float,
    shift: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
) -> torch.Tensor:
    """x (..., D), gain (D,) -> gain x / rms(x) + residual, (..., D); with a shift (D,) a LayerNorm, no RMSNorm."""
    D = x.shape[-1]
    B = x.numel() // D
    y = x.new_empty(x.shape)
    if B == 0:
        return y
    if residual is not None:
        residual = residual.contiguous()
    x = x.contiguous()
    dims = triton.next_power_of_2(D)
    rows = max(1, 1024 // dims)
    grid = (triton.cdiv(B, rows),)
    launch(norm_kernel, grid, x, gain, shift, residual, y, B, D, eps, rows=rows, dims=dims)
    return y


@lru_cache
def starts_early(device: torch.device) -> bool:
    """Whether it is a Hopper or later."""
    return torch.cuda.get_device_capability(device) >= (9, 0)


def launch(
    kernel: Any, grid: tuple[int, ...], x: torch.Tensor, *arguments: Any, **options: Any
) -> None:
    """Launch on the device of x, which need not be the current one; early, if it can be."""
    early = x.is_cuda and starts_early(x.device)
    if early:
        options["launch_pdl"] = True
    place: AbstractContextManager = torch.cuda.device(x.device) if x.is_cuda else nullcontext()
    with place:
        kernel[grid](x, *arguments, early=early, **options)
