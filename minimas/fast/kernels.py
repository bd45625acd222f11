"""A step of one token per row on CUDA, in Triton: few kernels, each of which reads its weights once and little else.

A decode step is memory-bound: its cost is reading each weight once. Four kernels therefore do what takes thirty operations
of torch or more in each block, so that little else is read, written or waited for:

    linear     y = act(W norm(x) + b) + residual, a product with everything that stands before and after it
    attend     norms and rotation of q and k, the write into the KV cache, and split-KV flash decoding over its filled part
    delta      all of a Gated DeltaNet between its projections, its memory included
    norm       y = gain x / rms(x) + residual, or a LayerNorm

Sums are float32, and results are rounded once where the plain path rounds at each operation. Block sizes are powers of two
that cover their dimension; the excess is masked.

From Hopper on, a kernel starts while the one before it still runs (programmatic dependent launch). Until that one has
ended, it may only ask for weights, which no kernel writes: all that stands before `wait`.

Only linear.py and the fused links come here, and only where Triton is (it comes with torch for CUDA). With TRITON_INTERPRET=1 the
same kernels run on a CPU, slowly: that is how the tests run them without a GPU.

Letters: B rows, K inputs, N outputs; in attention H query heads, K key/value heads, G = H / K, d head width.
"""

from contextlib import nullcontext
from functools import lru_cache

import torch
import triton
import triton.language as tl

ROWS = 32  # rows of a step that the kernels take; more are work for matrix products of torch
MULTIPROCESSORS = 132  # of an H100 or H200; sizes are chosen so that each has something to read
GATES = (
    "silu",
    "gelu_tanh",
)  # activations of the first half of W's rows, by which the second half is multiplied


@triton.jit
def wait(early: tl.constexpr):
    """Wait for the kernels before this one and all that they wrote, if it was started early; let the next one start."""
    if early:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()


@triton.jit
def fetch(w_ptr, n, N, K, gated: tl.constexpr, BK: tl.constexpr):
    """Have the chip's cache read the first eight blocks of rows n of a weight, or four of each half, and do not wait."""
    line: tl.constexpr = (
        1024 // w_ptr.dtype.element_ty.primitive_bitwidth
    )  # numbers in the 128 bytes that are read at once
    k = tl.arange(0, 8 * BK // (1 + gated) // line) * line
    w_ptrs = w_ptr + tl.minimum(n, N - 1)[:, None] * K + tl.minimum(k, K - 1)[None, :]
    for half in tl.static_range(1 + gated):
        at = w_ptrs + half * N * K
        tl.inline_asm_elementwise(
            "prefetch.global.L2 [$1]; mov.b32 $0, 0;", "=r,l", [at], tl.int32, is_pure=False, pack=1
        )


@triton.jit
def gelu_tanh(x):
    return x * tl.sigmoid(
        1.5957691216057308 * (x + 0.044715 * x * x * x)
    )  # 2 sqrt(2 / pi); tanh u = 2 sigmoid(2 u) - 1


@triton.jit
def linear_kernel(
    x_ptr,
    w_ptr,
    bias_ptr,
    gain_ptr,
    residual_ptr,
    y_ptr,
    B,
    N,
    K,
    x_row,
    residual_row,
    normed,
    eps,
    norm: tl.constexpr,
    act: tl.constexpr,
    gated: tl.constexpr,
    rows: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    early: tl.constexpr,
):
    """BN outputs of all rows. Each of four warps sums over a quarter of every block of BK inputs.

    A norm needs sums over all of x. They are gathered on the way, as products too, and scale the outputs at the end.
    """
    b, n = tl.arange(0, rows), tl.program_id(0) * BN + tl.arange(0, BN)
    if early:
        fetch(w_ptr, n, N, K, gated, BK)
    wait(early)
    y, up = tl.zeros((4, rows, BN), tl.float32), tl.zeros((4, rows, BN), tl.float32)
    squares, sums = tl.zeros((4, rows, rows), tl.float32), tl.zeros((4, rows, 16), tl.float32)
    for start in range(0, K, BK):
        k = (
            start
            + tl.arange(0, 4)[:, None, None] * (BK // 4)
            + tl.arange(0, BK // 4)[None, None, :]
        )
        w_ptrs, there = w_ptr + n[None, :, None] * K + k, (n < N)[None, :, None] & (k < K)
        x = tl.load(
            x_ptr + b[None, :, None] * x_row + k, mask=(b < B)[None, :, None] & (k < K), other=0
        )
        w = tl.load(w_ptrs, mask=there, other=0)
        if norm != "":
            squares = tl.dot(
                x, tl.trans(x, 0, 2, 1), squares, input_precision="ieee"
            )  # on the diagonal
        if norm == "layer":
            sums = tl.dot(
                x, tl.full((4, BK // 4, 16), 1, x.dtype), sums, input_precision="ieee"
            )  # in every column
        if norm == "rms":
            x = (x * tl.load(gain_ptr + k, mask=k < K, other=0)).to(x.dtype)
        y = tl.dot(x, tl.trans(w, 0, 2, 1), y, input_precision="ieee")
        if gated:
            up = tl.dot(
                x,
                tl.trans(tl.load(w_ptrs + N * K, mask=there, other=0), 0, 2, 1),
                up,
                input_precision="ieee",
            )
    y, up = tl.sum(y, 0), tl.sum(up, 0)
    if norm != "":
        variance = tl.sum(tl.where(b[:, None] == b, tl.sum(squares, 0), 0), 1)[:, None] / K
        if norm == "layer":
            mean = tl.max(tl.sum(sums, 0), 1)[:, None] / K
            variance = tl.maximum(variance - mean * mean, 0)
        scale = tl.where(n < normed, tl.rsqrt(variance + eps), 1)
        y, up = y * scale, up * scale
    if bias_ptr is not None:
        y += tl.load(bias_ptr + n, mask=n < N, other=0).to(tl.float32)
    if act == "gelu":
        y = tl.where(n < normed, 0.5 * y * (1 + tl.erf(y * 0.7071067811865476)), y)
    if act == "silu":
        y = y * tl.sigmoid(y) * up
    if act == "gelu_tanh":
        y = gelu_tanh(y) * up
    there = (b < B)[:, None] & (n < N)
    if residual_ptr is not None:
        y += tl.load(residual_ptr + b[:, None] * residual_row + n, mask=there, other=0).to(
            tl.float32
        )
    tl.store(y_ptr + b[:, None] * N + n, y.to(y_ptr.dtype.element_ty), mask=there)


def linear(
    x, weight, bias=None, *, norm="", gain=None, eps=0.0, act="", normed=None, residual=None
):
    """x (B, K), weight (N, K), bias (N,) -> act(W norm(x) + b) + residual, (B, N), in x's dtype; B at most ROWS.

    norm      rms: an RMSNorm with gain (K,) float32 and eps. layer: a LayerNorm with eps, without gain and shift, and the
              mean is not subtracted from x: the rows of W must add up to 0, so that it cannot matter
    act       gelu (erf); or silu or gelu_tanh, W being [W_gate; W_up]: act(W_gate norm(x)) * W_up norm(x), (B, N / 2)
    normed    only the first `normed` outputs have the norm and the activation (default: all)
    residual  (B, N)

    The last dimension of x and residual must be contiguous, their rows need not be.
    """
    (B, K), gated = x.shape, act in GATES
    N, normed = len(weight) // (1 + gated), len(weight) if normed is None else normed
    y, rows = (
        x.new_empty(B, N),
        max(16, triton.next_power_of_2(B)),
    )  # a tensor core multiplies 16 rows at least
    BN = 16 if N >= 14 * MULTIPROCESSORS else 8
    BK = 8192 // (
        BN * x.element_size()
    )  # a block is 8 KiB of a weight; three or five of them are on their way at any time
    BK, programs = min(BK, max(64, triton.next_power_of_2(K))), triton.cdiv(N, BN)
    residual_row = 0 if residual is None else residual.stride(0)
    launch(
        linear_kernel,
        (programs,),
        x,
        weight,
        bias,
        gain,
        residual,
        y,
        B=B,
        N=N,
        K=K,
        x_row=x.stride(0),
        residual_row=residual_row,
        normed=normed,
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
def rotated_heads(x_ptr, gain_ptr, there, i, cos_ptr, sin_ptr, rotated, d, eps):
    """Heads at x_ptr (heads, 1), by dimension i: normed if there is a gain, the first `rotated` dimensions rotated."""
    half, turns = rotated // 2, i < rotated
    partner = tl.where(turns, tl.where(i < half, i + half, i - half), i)
    x = tl.load(x_ptr + i, mask=there, other=0).to(tl.float32)
    other = tl.load(x_ptr + partner, mask=there, other=0).to(tl.float32)
    if gain_ptr is not None:
        scale = tl.rsqrt(tl.sum(x * x, 1) / d + eps)[:, None]
        x *= scale * tl.load(gain_ptr + i, mask=i < d, other=0)
        other *= scale * tl.load(gain_ptr + partner, mask=i < d, other=0)
    cos, sin = tl.load(cos_ptr + i, mask=turns, other=1), tl.load(sin_ptr + i, mask=turns, other=0)
    return x * cos + other * sin


@triton.jit
def attend_slots(
    q, y, denominator, running_max, keys_ptr, values_ptr, start, end, new, i, d, BS: tl.constexpr
):
    """Attention of q (heads, dims) over the slots from `start` to `end` except `new`, by an online softmax.

    It goes on from y (heads, dims), the sum of values, each times exp(score - running_max), and from denominator (heads,),
    the sum of these factors.
    """
    for block in range(start, end, BS):
        s = block + tl.arange(0, BS)
        at, there = s[:, None] * d + i, (s < end)[:, None] & (i < d)
        keys, values = (
            tl.load(keys_ptr + at, mask=there, other=0),
            tl.load(values_ptr + at, mask=there, other=0),
        )
        score = tl.dot(q, keys.T, input_precision="ieee")
        score = tl.where((s < end) & (s != new), score, -1e30)
        new_max = tl.maximum(running_max, tl.max(score, 1))
        p, rescale = tl.exp(score - new_max[:, None]), tl.exp(running_max - new_max)
        denominator, running_max = denominator * rescale + tl.sum(p, 1), new_max
        y = tl.dot(p.to(values.dtype), values, y * rescale[:, None], input_precision="ieee")
    return y, denominator, running_max


@triton.jit
def attend_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    q_gain_ptr,
    k_gain_ptr,
    cos_ptr,
    sin_ptr,
    position_ptr,
    keys_ptr,
    values_ptr,
    slot_positions_ptr,
    outputs_ptr,
    maxima_ptr,
    denominators_ptr,
    done_ptr,
    y_ptr,
    q_row,
    q_head,
    kv_row,
    K,
    G,
    d,
    ring,
    window,
    rotated,
    scale,
    eps,
    gated: tl.constexpr,
    splits: tl.constexpr,
    heads: tl.constexpr,
    few: tl.constexpr,
    dims: tl.constexpr,
    BS: tl.constexpr,
    early: tl.constexpr,
):
    """The G query heads that share a key/value head, in one row, over one of at most `splits` parts of the keys (split-KV).

    Position p is in slot p modulo ring. The new key is not read from the cache, so that no split waits for its writing; it
    belongs to split 0. The split that is done last adds up all of them.
    """
    wait(early)
    b, head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    g, i, bk = tl.arange(0, heads), tl.arange(0, dims)[None, :], b * K + head
    position = tl.load(position_ptr + b)
    slot, first, last = (
        position % ring,
        tl.maximum(position - window + 1, 0),
        tl.minimum(position, ring),
    )
    span = tl.maximum(tl.cdiv(tl.cdiv(last - first, splits), BS), 1) * BS  # slots of a split
    used = tl.maximum(tl.cdiv(last - first, span), 1).to(tl.int32)  # splits that have any
    if split >= used:
        return
    cos_ptr, sin_ptr = cos_ptr + b * rotated, sin_ptr + b * rotated
    q_ptr, kv, ours = (
        q_ptr + b * q_row + head * G * q_head,
        b * kv_row + head * d,
        (g < G)[:, None] & (i < d),
    )
    q = rotated_heads(
        q_ptr + g[:, None] * q_head, q_gain_ptr, ours, i, cos_ptr, sin_ptr, rotated, d, eps
    )  # (heads, dims)
    k = rotated_heads(
        k_ptr + kv, k_gain_ptr, i < d, i, cos_ptr, sin_ptr, rotated, d, eps
    )  # (1, dims)
    v = tl.load(v_ptr + kv + i, mask=i < d, other=0)
    dtype: tl.constexpr = keys_ptr.dtype.element_ty
    keys_ptr += (bk * (ring + 1)).to(tl.int64) * d
    values_ptr += (bk * (ring + 1)).to(tl.int64) * d
    q, k = (q * scale).to(dtype), k.to(dtype)
    if split == 0:
        tl.store(keys_ptr + slot * d + i, k, mask=i < d)
        tl.store(values_ptr + slot * d + i, v, mask=i < d)
        if slot_positions_ptr is not None:
            tl.store(slot_positions_ptr + b * (ring + 1) + slot, position)
    new = (split == 0).to(tl.float32)  # 1 in the split of the new key, else 0
    running_max = tl.where(
        split == 0, tl.sum(q.to(tl.float32) * k.to(tl.float32), 1), -1e30
    )  # (heads,)
    denominator, y = (
        tl.zeros((heads,), tl.float32) + new,
        tl.zeros((heads, dims), tl.float32) + new * v.to(tl.float32),
    )
    start, end = first + split * span, tl.minimum(last, first + (split + 1) * span)
    y, denominator, running_max = attend_slots(
        q, y, denominator, running_max, keys_ptr, values_ptr, start, end, slot, i, d, BS
    )
    at = (bk * splits + split) * heads + g
    tl.store(maxima_ptr + at, running_max)
    tl.store(denominators_ptr + at, denominator)
    tl.store(outputs_ptr + at[:, None] * dims + i, y, mask=ours)
    tl.debug_barrier()  # all of this split is written before it counts as done
    if tl.atomic_add(done_ptr + bk, 1, sem="acq_rel", scope="gpu") == used - 1:
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
    outputs_ptr,
    maxima_ptr,
    denominators_ptr,
    gate_ptr,
    y_ptr,
    bk,
    used,
    G,
    d,
    q_head,
    gated: tl.constexpr,
    splits: tl.constexpr,
    heads: tl.constexpr,
    few: tl.constexpr,
    dims: tl.constexpr,
):
    """Write the output of G heads: the sum of the first `used` splits, each rescaled to the maximum of all."""
    some: tl.constexpr = min(
        splits, max(1, 8192 // (few * dims))
    )  # splits that are read at once: what registers hold
    g, i = tl.arange(0, few), tl.arange(0, dims)
    all_splits = tl.arange(0, splits)[:, None]
    at_all = (bk * splits + all_splits) * heads + g  # (splits, few)
    maxima = tl.load(maxima_ptr + at_all, mask=all_splits < used, other=-1e30, cache_modifier=".cg")
    denominators = tl.load(
        denominators_ptr + at_all, mask=all_splits < used, other=0, cache_modifier=".cg"
    )
    running_max = tl.max(maxima, 0)
    denominator = tl.sum(denominators * tl.exp(maxima - running_max), 0)
    y, ours = tl.zeros((few, dims), tl.float32), (g < G)[:, None] & (i < d)
    for start in range(0, used, some):
        split = start + tl.arange(0, some)[:, None, None]
        at = (bk * splits + split) * heads + g[None, :, None]  # (some, few, 1)
        maximum = tl.load(maxima_ptr + at, mask=split < used, other=-1e30, cache_modifier=".cg")
        rescale = tl.exp(maximum - running_max[None, :, None])
        there = ours[None] & (split < used)
        y += tl.sum(
            tl.load(outputs_ptr + at * dims + i, mask=there, other=0, cache_modifier=".cg")
            * rescale,
            0,
        )
    y /= denominator[:, None]
    if gated:
        y *= tl.sigmoid(
            tl.load(gate_ptr + g[:, None] * q_head + i, mask=ours, other=0).to(tl.float32)
        )
    tl.store(y_ptr + (bk * G + g)[:, None] * d + i, y.to(y_ptr.dtype.element_ty), mask=ours)


def attend(
    q, k, v, rope, positions, cache, done, scale, q_gain=None, k_gain=None, eps=0.0, gated=False
):
    """One new token per row: q (B, H, d), k and v (B, K, d), not yet normed or rotated -> (B, H d); writes the cache.

    rope       cos and sin (B, 1, 1, n) of the n dimensions of a head that are rotated
    positions  (B, 1), at least 0; below the capacity of a KVCache, where nothing checks it
    cache      a KVCache or a WindowCache
    done       int32 zeros, at least B K of them, which are zeros again afterwards
    gains      (d,) float32: q and k are normed by an RMSNorm with this gain and eps
    gated      q is (B, H, 2 d), each head and then its gate: the output is multiplied by the sigmoid of the gate
    """
    (B, H, _), (_, K, d), (cos, sin), ring = q.shape, k.shape, rope, cache.k.shape[2] - 1
    y, G = q.new_empty(B, H * d), H // K
    heads, dims = max(16, triton.next_power_of_2(G)), max(16, triton.next_power_of_2(d))
    BS = 32 if dims * q.element_size() < 1024 else 16
    # A power of two; and how n keys are divided does not depend on the capacity, so that no answer depends on earlier ones.
    splits = max(1, min(32, 4 * MULTIPROCESSORS // (B * K), triton.next_power_of_2(ring) // BS))
    splits = triton.next_power_of_2(splits + 1) // 2
    maxima, denominators, outputs = (
        q.new_empty(B * K * splits * heads * n, dtype=torch.float32) for n in (1, 1, dims)
    )
    slot_positions = getattr(
        cache, "positions", None
    )  # of a WindowCache, which holds no key beyond its window
    window = cache.window if slot_positions is None and cache.window else 2**30
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
        slot_positions,
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


@triton.jit
def convolve(x_ptr, memory_ptr, weight_ptr, c, there, past, taps: tl.constexpr):
    """silu of a causal convolution over `past` remembered inputs and the new one, for channels c; remembers the new one."""
    j, seen = tl.arange(0, taps)[None, :], there[:, None]
    x = tl.load(x_ptr + c, mask=there, other=0).to(tl.float32)[:, None]
    memory_ptr += c[:, None] * past + j
    remembered = tl.load(memory_ptr, mask=seen & (j < past), other=0).to(tl.float32)
    moved = tl.load(memory_ptr + 1, mask=seen & (j < past - 1), other=0).to(tl.float32)
    weight = tl.load(weight_ptr + c[:, None] * (past + 1) + j, mask=seen & (j <= past), other=0).to(
        tl.float32
    )
    y = tl.sum(tl.where(j < past, remembered, x) * weight, 1)
    tl.debug_barrier()  # all threads have read before any one writes
    tl.store(
        memory_ptr,
        tl.where(j < past - 1, moved, x).to(memory_ptr.dtype.element_ty),
        mask=seen & (j < past),
    )
    return y * tl.sigmoid(y)


@triton.jit
def delta_kernel(
    qkv_ptr,
    z_ptr,
    b_ptr,
    a_ptr,
    memory_ptr,
    weight_ptr,
    state_ptr,
    A_log_ptr,
    dt_bias_ptr,
    gain_ptr,
    y_ptr,
    row,
    key_heads,
    group,
    d_k,
    d_v,
    past,
    scale,
    eps,
    keys: tl.constexpr,
    values: tl.constexpr,
    taps: tl.constexpr,
    early: tl.constexpr,
):
    """A head of q and k in one row, and the `group` heads of v that use it, one after another; letters as in delta.py."""
    wait(early)
    b, head = tl.program_id(0), tl.program_id(1)
    i, j = tl.arange(0, keys), tl.arange(0, values)
    qkv_ptr, memory_ptr = (
        qkv_ptr + b * row,
        memory_ptr + b * (2 * key_heads * d_k + key_heads * group * d_v) * past,
    )
    q = convolve(qkv_ptr, memory_ptr, weight_ptr, head * d_k + i, i < d_k, past, taps)
    k = convolve(qkv_ptr, memory_ptr, weight_ptr, (key_heads + head) * d_k + i, i < d_k, past, taps)
    q *= tl.rsqrt(tl.sum(q * q, 0) + 1e-6) * scale
    k *= tl.rsqrt(tl.sum(k * k, 0) + 1e-6)
    for h in range(head * group, (head + 1) * group):
        bh = b * key_heads * group + h
        state, whole = state_ptr + (bh * d_k + i[:, None]) * d_v + j, (i < d_k)[:, None] & (j < d_v)
        S = tl.load(
            state, mask=whole, other=0
        )  # the longest way: it begins before the barrier of the convolution
        z = tl.load(z_ptr + b * row + h * d_v + j, mask=j < d_v, other=0).to(tl.float32)
        dt = tl.load(a_ptr + b * row + h).to(tl.float32) + tl.load(dt_bias_ptr + h).to(tl.float32)
        dt = tl.where(dt > 20, dt, tl.log(1 + tl.exp(tl.minimum(dt, 20.0))))  # softplus
        A, beta = (
            tl.exp(tl.load(A_log_ptr + h).to(tl.float32)),
            tl.sigmoid(tl.load(b_ptr + b * row + h).to(tl.float32)),
        )
        v = convolve(
            qkv_ptr, memory_ptr, weight_ptr, 2 * key_heads * d_k + h * d_v + j, j < d_v, past, taps
        )
        S *= tl.exp(-A * dt)
        S += k[:, None] * (beta * (v - tl.sum(S * k[:, None], 0)))[None, :]
        o = tl.sum(S * q[:, None], 0)
        tl.store(state, S, mask=whole)  # all threads have read: the convolution of v has a barrier
        o *= (
            tl.rsqrt(tl.sum(o * o, 0) / d_v + eps)
            * tl.load(gain_ptr + j, mask=j < d_v, other=0)
            * z
            * tl.sigmoid(z)
        )
        tl.store(y_ptr + bh * d_v + j, o.to(y_ptr.dtype.element_ty), mask=j < d_v)


def delta(qkv, z, b, a, cache, conv_weight, A_log, dt_bias, gain, eps):
    """One new token per row of a Gated DeltaNet: its four projections (B, ...), parts of one tensor -> (B, heads * d_v).

    cache      the DeltaCache, which is changed in place
    gain, eps  of the norm of the output, (d_v,) float32
    """
    (B, channels), (_, H, d_k, d_v) = qkv.shape, cache.state.shape
    key_heads, past = (channels - H * d_v) // (2 * d_k), cache.conv.shape[2]
    y, sizes = qkv.new_empty(B, H * d_v), {"keys": d_k, "values": d_v, "taps": past + 1}
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
        **{name: triton.next_power_of_2(n) for name, n in sizes.items()},
        num_warps=8,
    )
    return y


@triton.jit
def norm_kernel(
    x_ptr,
    gain_ptr,
    shift_ptr,
    residual_ptr,
    y_ptr,
    B,
    D,
    eps,
    rows: tl.constexpr,
    dims: tl.constexpr,
    early: tl.constexpr,
):
    wait(early)
    b, i = tl.program_id(0) * rows + tl.arange(0, rows)[:, None], tl.arange(0, dims)[None, :]
    at, there = b.to(tl.int64) * D + i, (b < B) & (i < D)
    x = tl.load(x_ptr + at, mask=there, other=0).to(tl.float32)
    if shift_ptr is not None:
        x = tl.where(there, x - tl.sum(x, 1)[:, None] / D, 0)
    y = (
        x
        * tl.rsqrt(tl.sum(x * x, 1)[:, None] / D + eps)
        * tl.load(gain_ptr + i, mask=i < D, other=0).to(tl.float32)
    )
    if shift_ptr is not None:
        y += tl.load(shift_ptr + i, mask=i < D, other=0).to(tl.float32)
    if residual_ptr is not None:
        y += tl.load(residual_ptr + at, mask=there, other=0).to(tl.float32)
    tl.store(y_ptr + at, y.to(y_ptr.dtype.element_ty), mask=there)


def norm(x, gain, eps, shift=None, residual=None):
    """x (..., D), gain (D,) -> gain x / rms(x) + residual, (..., D); with a shift (D,) a LayerNorm instead of an RMSNorm."""
    D, dims, y = x.shape[-1], triton.next_power_of_2(x.shape[-1]), x.new_empty(x.shape)
    B, rows = x.numel() // D, max(1, 1024 // dims)
    if B:
        residual = None if residual is None else residual.contiguous()
        x, grid = x.contiguous(), (triton.cdiv(B, rows),)
        launch(norm_kernel, grid, x, gain, shift, residual, y, B, D, eps, rows=rows, dims=dims)
    return y


@lru_cache
def starts_early(device):
    """Whether it is a Hopper or later."""
    return torch.cuda.get_device_capability(device) >= (9, 0)


def launch(kernel, grid, x, *arguments, **options):
    """Launch on the device of x, which need not be the current one; early, if it can be."""
    early = x.is_cuda and starts_early(x.device)
    if early:
        options["launch_pdl"] = True
    with torch.cuda.device(x.device) if x.is_cuda else nullcontext():
        kernel[grid](x, *arguments, early=early, **options)
