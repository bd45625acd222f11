"""The fast path: the same decoders and links in fewer and larger steps. Results are the same up to rounding.

    on a CPU    matrix products of one input become one, [q; k; v] = [W_q; W_k; W_v] x, and their weights are laid out for
                oneDNN once, at load; a weight that is used elsewhere, too (tied embeddings), keeps its layout
    on CUDA     matrix products of one input become one, and a step of one token per row (latent or text) is captured as a
                CUDA graph and replayed: the host launches one thing per token instead of hundreds

A decoder that went through `prepare` computes no gradients on a CPU: training loads its system with plain=True.
"""

import torch
import torch.nn.functional as F
from torch import nn

from . import InputError
from .cache import KVCache, first_rows

CHUNK = 256  # cache slots: a graph reads the filled part of the cache, rounded up to a multiple of this
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

    A module's `joint` is {method: names of the linears that it applies to one input}.
    """
    tied = model.lm_head.weight is model.embed_tokens.weight
    for module in model.modules():
        for method, names in getattr(module, "joint", {}).items():
            linears = [getattr(module, name) for name in names]
            if linears[0].weight.is_cuda or can_pack(linears[0].weight):
                setattr(module, method, Joint(linears))
    for module in model.modules():
        if isinstance(module, nn.Linear) and module.weight is not None and can_pack(module.weight):
            keep = tied and module is model.lm_head
            module.forward = Product([module.weight], [module.bias], keep)
            module.weight = module.weight if keep else None
    return model


class Graphs:
    """An agent's steps (see agent.py) as CUDA graphs, over one cache that stays in place from question to question.

    A graph reads and writes the memory that it was captured with. So there is one for each kind of step, number of
    rows, and reach: the number of cache slots that it reads, which is the filled part rounded up. A step is captured
    with `filled` at reach - 1, since its update adds one; masks, not `filled`, decide what is seen.
    """

    def __init__(self, model):
        self.model, self.stream = model, None
        self.release()

    def release(self):
        """Let go of the cache and the graphs."""
        self.base, self.capacity, self.graphs = None, (0, 0), {}

    def adopt(self, cache, B, S):
        """Use this cache of B rows and S positions from now on, and discard all graphs of another one."""
        self.base, self.capacity, self.graphs = cache, (B, S), {}
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
        """run_steps by replay. The first step of each kind, number of rows and reach runs as it is, then is captured."""
        outputs, kv = [], [c for c in cache if isinstance(c, KVCache)]
        while len(outputs) < times:
            filled, capacity = (kv[0].filled, kv[0].capacity) if kv else (0, 0)
            reach = min(-(-(filled + 1) // CHUNK) * CHUNK, capacity)
            key = (*kind, len(state[0]), reach)
            if key in self.graphs:
                n = times - len(outputs) if reach == capacity else min(times - len(outputs), reach - filled)
                state, more = replay_steps(*self.graphs[key], state, n, tick)
            else:
                n = 1
                set_filled(kv, reach - 1)  # the shapes of the capture, so that first-use initialisation happens now
                state, output = step(*state)
                tick()
                self.graphs[key], more = self.record(step, state, output, kv, reach), [output]
            outputs += more
            set_filled(kv, min(filled + n, capacity))
        return state, outputs

    def record(self, step, state, output, kv, reach):
        """A captured step: (state buffers, output buffer, replay()), which takes one step in these buffers."""
        buffers, out = [value.clone() for value in state], output.clone()

        def in_place():
            set_filled(kv, reach - 1)
            new, output = step(*buffers)
            for buffer, value in zip([*buffers, out], [*new, output]):
                buffer.copy_(value)

        if out.is_cuda and self.stream is None:
            self.stream = torch.cuda.Stream(out.device)
        return buffers, out, capture(in_place, self.pool, self.stream)


def set_filled(kv, n):
    """Let all these KVCaches count n slots as filled."""
    for c in kv:
        c.filled = n


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
