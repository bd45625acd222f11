"""The fast path: the same decoders and links in fewer and larger steps. Results are the same up to rounding.

    on a CPU    matrix products of one input become one, [q; k; v] = [W_q; W_k; W_v] x, and their weights are laid out for
                oneDNN once, at load; a weight that is used elsewhere, too (tied embeddings), keeps its layout
    on CUDA     matrix products of one input become one; a step of one token per row (latent or text) takes five kernels a
                block (kernels.py) instead of some thirty, and is captured as a CUDA graph and replayed: the host launches
                one thing per token instead of hundreds

A decoder that went through `prepare` computes no gradients on a CPU: training loads its system with plain=True.
"""

import os
import sysconfig
import warnings
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from shutil import which

import torch
import torch.nn.functional as F
from torch import nn

from . import InputError, gemma, llama, qwen
from .cache import GrowingCache, KVCache, first_rows
from .llama import widen

# The parts whose mathematics the kernels know. A block with another part in it goes the ordinary way, on CUDA, too.
KNOWN = {llama.Block, gemma.Block, qwen.Block35, llama.Attention, gemma.Attention, qwen.Qwen3Attention, qwen.GatedAttention,
         qwen.GatedDeltaNet, llama.MLP, gemma.MLP, llama.RMSNorm, gemma.OffsetRMSNorm, nn.Linear, nn.Conv1d}
ACTIVATIONS = {"silu": F.silu, "gelu_tanh": partial(F.gelu, approximate="tanh")}
SPARE = 64  # cache slots: capacities are rounded up to a multiple of this, so that a slightly longer prompt still fits


class Product:
    """x (..., D) -> x W' + b (..., N), for W (N, D) made of several weights on top of one another."""

    def __init__(self, weights, biases, keep=False):
        """`keep`: the weight is used elsewhere, too, so leave its layout alone."""
        self.weight = weights[0] if len(weights) == 1 else torch.cat(list(weights))
        self.bias = None if biases[0] is None else torch.cat(list(biases))
        self.onednn = can_pack(self.weight)
        if self.onednn and not keep:
            self.weight = torch.ops.mkldnn._reorder_linear_weight(self.weight.detach(), None)

    def __call__(self, x):
        if not self.onednn:
            return F.linear(x, self.weight, self.bias)
        if torch.is_grad_enabled() and x.requires_grad:
            raise InputError("the fast path computes no gradients on a CPU: load the system with plain=True to train")
        return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")


def can_pack(weight):
    """Whether oneDNN can lay out and multiply this weight. Its operators are not public in torch: look for each."""
    if weight.device.type != "cpu" or weight.requires_grad or not torch.backends.mkldnn.is_available():
        return False
    if not (hasattr(torch.ops.mkldnn, "_linear_pointwise") and hasattr(torch.ops.mkldnn, "_reorder_linear_weight")):
        return False
    return weight.dtype == torch.float32 or weight.dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported()


class Joint:
    """Several linears of one input as one product: x -> their outputs."""

    def __init__(self, linears):
        self.sizes = [linear.out_features for linear in linears]
        self.product = Product([linear.weight for linear in linears], [linear.bias for linear in linears])
        views = [None] * len(linears) if self.product.onednn else self.product.weight.split(self.sizes)
        for linear, view in zip(linears, views):  # no weight is in memory twice
            linear.weight = None if view is None else nn.Parameter(view, requires_grad=False)

    def __call__(self, x):
        return self.product(x).split(self.sizes, -1)


def prepare(model):
    """Put a frozen decoder on the fast path, in place, one weight at a time; returns it.

    A class's `joint` is {method: names of the linears that it applies to one input}. A subclass that keeps the promise
    repeats it: what it inherits does not count, as it may do more in that method.
    """
    tied = model.lm_head.weight is model.embed_tokens.weight
    for module in model.modules():
        for method, names in vars(type(module)).get("joint", {}).items():
            setattr(module, method, Joint([getattr(module, name) for name in names]))
    for module in model.modules():
        if isinstance(module, nn.Linear) and module.weight is not None and can_pack(module.weight):
            keep = tied and module is model.lm_head
            module.forward = Product([module.weight], [module.bias], keep)
            module.weight = module.weight if keep else None
    kernels = kernels_for(model.norm.weight)
    if kernels:
        for module in model.modules():
            if type(module) in KNOWN and hasattr(module, "gain"):
                module.forward = Norm(module, kernels)
        for block in model.layers:
            if {type(module) for module in block.modules()} <= KNOWN:  # a subclass may compute something else
                block.forward = Step(block, kernels)
    return model


# On CUDA

def kernels_for(weight):
    """The module kernels.py if its kernels can compute with this weight, else None."""
    if not (weight.is_cuda and weight.dtype in (torch.float32, torch.bfloat16) and find_spec("triton")):
        return None
    if not can_build():
        warnings.warn("Triton cannot build kernels without a C compiler and Python's headers: a step on CUDA takes the "
                      "ordinary way, which is slower; install gcc and python3-dev")
        return None
    from . import kernels  # needs Triton, which torch brings along for CUDA only
    return kernels


def can_build():
    """Whether there is what Triton builds the launchers of kernels with; it looks for them in the same places."""
    compiler = os.environ.get("CC", "gcc" if which("gcc") else "clang")
    return which(compiler) is not None and Path(sysconfig.get_path("include", "posix_prefix"), "Python.h").exists()


def few_rows(x, kernels, most=None):
    """Whether the kernels are for x (..., D): it has a row, at most `most` (None: ROWS), and no gradient is asked for."""
    if kernels is None or torch.is_grad_enabled():
        return False
    return 0 < x.numel() <= (most or kernels.ROWS) * x.shape[-1]


class Norm:
    """The forward of an RMSNorm in one kernel, with a residual added if there is one; with gradients the ordinary way."""

    def __init__(self, norm, kernels):
        self.ordinary, self.gain, self.eps, self.kernels = norm.forward, widen(norm.gain.detach()), norm.eps, kernels

    def __call__(self, x, residual=None):
        if torch.is_grad_enabled():
            return self.ordinary(x) if residual is None else residual + self.ordinary(x)
        return self.kernels.norm(x, self.gain, self.eps, residual=residual)


class Step:
    """The forward of a block for one token per row, in five kernels (Gemma: seven); all else goes the ordinary way.

    With more than ROWS rows, reading weights is not all that a product costs: torch does it, between our other kernels.
    """

    def __init__(self, block, kernels):
        self.block, self.ordinary, self.kernels = block, block.forward, kernels
        norms = [block.input_layernorm, block.post_attention_layernorm]
        if hasattr(block, "pre_feedforward_layernorm"):  # Gemma norms what a half gives, too
            norms += [block.pre_feedforward_layernorm, block.post_feedforward_layernorm]
            self.before, self.after = norms[::2], norms[1::2]
        else:
            self.before, self.after = norms, [None, None]
        if hasattr(block, "self_attn"):  # counts the parts of an attention that are done, for each row and key/value head
            K, device = block.self_attn.k_proj.out_features // block.self_attn.d, block.input_layernorm.weight.device
            self.done = torch.zeros(kernels.MOST_ROWS * K, dtype=torch.int32, device=device)

    def __call__(self, x, positions, rope, mask, cache):
        if x.shape[1] > 1 or isinstance(cache, GrowingCache) or not few_rows(x, self.kernels, self.kernels.MOST_ROWS):
            return self.ordinary(x, positions, rope, mask, cache)
        block, x = self.block, x[:, 0]  # (B, D)
        if hasattr(block, "self_attn"):
            y, proj = self.attend(block.self_attn, x, positions, rope, cache), block.self_attn.o_proj
        else:
            y, proj = self.delta(block.linear_attn, x, cache), block.linear_attn.out_proj
        x = self.add(x, y, proj, self.after[0])
        y = self.product(x, block.mlp.gate_up, self.before[1], act=block.mlp.act)
        return self.add(x, y, block.mlp.down_proj, self.after[1])[:, None]

    def product(self, x, joint, norm, act=""):
        """norm(x) times the weights of a Joint; with an activation, act of the first half of it, times the other half."""
        norm, product = norm.forward, joint.product
        if len(x) > self.kernels.ROWS:
            y = product(norm(x))
            return ACTIVATIONS[act](y[:, :joint.sizes[0]]) * y[:, joint.sizes[0]:] if act else y
        return self.kernels.linear(x, product.weight, product.bias, norm="rms", gain=norm.gain, eps=norm.eps, act=act)

    def add(self, x, y, proj, norm):
        """x + W y, or x + norm(W y)."""
        few = len(x) <= self.kernels.ROWS
        if few and norm is None:
            return self.kernels.linear(y, proj.weight, proj.bias, residual=x)
        y = self.kernels.linear(y, proj.weight, proj.bias) if few else proj(y)
        return x + y if norm is None else norm.forward(y, residual=x)

    def attend(self, a, x, positions, rope, cache):
        """An attention module up to its last projection: x (B, D) -> (B, H d)."""
        qkv = self.product(x, a.qkv, self.before[0]).split(a.qkv.sizes, -1)
        gated = a.qkv.sizes[0] > a.o_proj.in_features  # Qwen3.5: each head of q with its gate
        q, k, v = (part.unflatten(-1, (-1, n)) for part, n in zip(qkv, (a.d * (1 + gated), a.d, a.d)))
        norms = (a.q_norm.forward.gain, a.k_norm.forward.gain, a.q_norm.eps) if hasattr(a, "q_norm") else (None, None, 0.0)
        scale = getattr(a, "scale", a.d ** -0.5)
        if isinstance(cache, KVCache):
            cache.filled = cache.filled_after(positions)
        return self.kernels.attend(q, k, v, rope, positions, cache, self.done, scale, *norms, gated)

    def delta(self, a, x, cache):
        """A Gated DeltaNet up to its last projection: x (B, D) -> (B, heads d_v)."""
        inputs, norm = self.product(x, a.inputs, self.before[0]).split(a.inputs.sizes, -1), a.norm.forward
        return self.kernels.delta(*inputs, cache, a.conv1d.weight, a.A_log, a.dt_bias, norm.gain, norm.eps)


class Graphs:
    """An agent's steps (see agent.py) as CUDA graphs, over one cache that stays in place from question to question.

    A graph reads and writes the memory that it was captured with. So there is one for each kind of step and number of
    rows, and while graphs are at work a KVCache counts as filled: what is seen, positions decide.
    """

    def __init__(self, model):
        self.model, self.stream = model, None
        self.release()

    def release(self):
        """Let go of the cache and the graphs."""
        self.base, self.capacity, self.graphs = None, (0, 0), {}

    def adopt(self, cache, B, S):
        """Use this cache of B rows and S positions from now on, and discard all graphs of another one."""
        self.base, self.capacity, self.graphs = first_rows(cache, B), (B, S), {}  # all B, even when rows leave `cache`
        self.pool = torch.cuda.graph_pool_handle() if torch.cuda.is_available() else None

    def make_cache(self, B, S):
        """An empty cache for B rows of S positions, in the same memory as before if that suffices."""
        if B > self.capacity[0] or S > self.capacity[1]:
            capacity = max(B, self.capacity[0]), -(-max(S, self.capacity[1]) // SPARE) * SPARE
            self.release()  # free the old cache before the new one is allocated
            self.adopt(self.model.make_cache(*capacity), *capacity)
        cache = first_rows(self.base, B)
        for c in cache:
            for name in c.tensors:
                getattr(c, name).fill_(-1 if name == "positions" else 0)  # no NaN, either, reaches the next question
            if isinstance(c, KVCache):
                c.filled = 0
        return cache

    def steps(self, step, state, times, cache, tick, kind):
        """run_steps by replay, for one step or more. The first of each kind and number of rows is taken, then captured."""
        outputs, kv, key = [], [c for c in cache if isinstance(c, KVCache)], (*kind, len(state[0]))
        filled = [min(c.filled + times, c.capacity) for c in kv]
        for c in kv:
            c.filled = c.capacity
        if key not in self.graphs:
            state, output = step(*state)
            tick()
            self.graphs[key], outputs = self.record(step, state, output), [output]
        state, more = replay_steps(*self.graphs[key], state, times - len(outputs), tick)
        for c, n in zip(kv, filled):
            c.filled = n
        return state, outputs + more

    def record(self, step, state, output):
        """A captured step: (state buffers, output buffer, replay()), which takes one step in these buffers."""
        buffers, out = [value.clone() for value in state], output.clone()

        def in_place():
            new, output = step(*buffers)
            for buffer, value in zip([*buffers, out], [*new, output]):
                buffer.copy_(value)

        if out.is_cuda and self.stream is None:
            self.stream = torch.cuda.Stream(out.device)
        return buffers, out, capture(in_place, self.pool, self.stream)


def replay_steps(buffers, out, replay, state, n, tick):
    """n captured steps from `state`: the last state and the list of outputs."""
    for buffer, value in zip(buffers, state):
        buffer.copy_(value)
    outputs = []
    for _ in range(n):
        replay()
        outputs.append(out.clone())
        tick()
    return [buffer.clone() for buffer in buffers], outputs


def capture(f, pool, stream):
    """Capture f(), which works in place on tensors that stay, as a CUDA graph; returns its replay."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.device(stream.device), torch.cuda.graph(graph, pool=pool, stream=stream):
        f()
    return graph.replay
