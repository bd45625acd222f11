"""The fast path: the same decoders and links in fewer and larger steps. Nothing here changes what is computed.

    on a CPU    matrix products of one input become one, and their weights are laid out for oneDNN once, at load; a weight
                that is needed elsewhere (tied embeddings) stays as it is and is read by the same kernels
    on CUDA     matrix products of one input become one, and a step that reads one token per row (latent or text) is captured
                as a CUDA graph and replayed, so that the host launches one thing a token instead of hundreds

A decoder that went through `prepare` computes no gradients on a CPU: training loads its system with plain=True.
"""

import torch
import torch.nn.functional as F
from torch import nn

from . import InputError
from .cache import KVCache, front

CHUNK = 256  # cache slots by which a graph's reach grows: a step reads the used part of the cache, rounded up to this
SPARE = 64  # the cache's own size is rounded up to this, so that a slightly longer prompt finds room


class Product:
    """x (..., D) -> x W' + b (..., N), for W (N, D) of several weights on top of one another."""

    def __init__(self, weights, biases, keep=False):
        """keep: the weight is not ours alone, leave it where and as it is."""
        self.weight = weights[0] if len(weights) == 1 else torch.cat(list(weights))
        self.bias = None if biases[0] is None else torch.cat(list(biases))
        self.onednn = has_kernels(self.weight)
        if self.onednn and not keep:
            self.weight = torch.ops.mkldnn._reorder_linear_weight(self.weight.detach(), None)

    def __call__(self, x):
        if not self.onednn:
            return F.linear(x, self.weight, self.bias)
        if torch.is_grad_enabled() and x.requires_grad:
            raise InputError("the fast path computes no gradients on a CPU: load the system with plain=True to train")
        return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")


def has_kernels(weight):
    """Whether oneDNN multiplies by this weight faster than plain torch; its operators are not public, so ask for each."""
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
        for linear, view in zip(linears, views):  # nothing is held twice
            linear.weight = None if view is None else nn.Parameter(view, requires_grad=False)

    def __call__(self, x):
        return self.product(x).split(self.sizes, -1)


def prepare(model):
    """Put a frozen decoder on the fast path, in place, one weight at a time; returns it.

    A module's table `joint` says which of its methods is one product of which of its linears.
    """
    tied = model.lm_head.weight is model.embed_tokens.weight
    for module in model.modules():
        for method, names in getattr(module, "joint", {}).items():
            linears = [getattr(module, name) for name in names]
            if linears[0].weight.is_cuda or has_kernels(linears[0].weight):
                setattr(module, method, Joint(linears))
    for module in model.modules():
        if isinstance(module, nn.Linear) and module.weight is not None and has_kernels(module.weight):
            keep = tied and module is model.lm_head
            module.forward = Product([module.weight], [module.bias], keep)
            module.weight = module.weight if keep else None
    return model


class Graphs:
    """An agent's steps as CUDA graphs, over one cache that stays where it is from question to question.

    A graph reads and writes the memory it was captured with, so one holds for one kind of step, one number of rows, and one
    reach: the cache slots it reads, the used ones rounded up.
    """

    def __init__(self, model):
        self.model, self.stream = model, None
        self.release()

    def release(self):
        """Let go of the cache and the graphs."""
        self.base, self.room, self.graphs = None, (0, 0), {}

    def adopt(self, cache, B, S):
        """Stay in this cache of B rows and S positions from now on; graphs of another one are void, and so is their memory pool."""
        self.base, self.room, self.graphs = cache, (B, S), {}
        self.pool = torch.cuda.graph_pool_handle() if torch.cuda.is_available() else None

    def make_cache(self, B, S):
        """The model's cache for B rows of S positions, empty; the same memory as before where that suffices."""
        if B > self.room[0] or S > self.room[1]:
            room = max(B, self.room[0]), -(-max(S, self.room[1]) // SPARE) * SPARE
            self.release()  # free the old one before there is another
            self.adopt(self.model.make_cache(*room), *room)
        cache = front(self.base, B)
        for c in cache:
            for name in c.tensors:
                getattr(c, name).fill_(-1 if name == "positions" else 0)  # nothing, not even a NaN, is left for the next question
            if isinstance(c, KVCache):
                c.used = 0
        return cache

    def repeat(self, step, state, times, cache, tick, kind):
        """As agent.repeat, by replaying: the first step of a kind, size and reach goes as it is, then it is captured."""
        outputs, full = [], [c for c in cache if isinstance(c, KVCache)]
        while len(outputs) < times:
            used, room = (full[0].used, full[0].room) if full else (0, 0)
            reach = min(-(-(used + 1) // CHUNK) * CHUNK, room)
            key = (*kind, len(state[0]), reach)
            if key in self.graphs:
                n = times - len(outputs) if reach == room else min(times - len(outputs), reach - used)
                state, more = replayed(*self.graphs[key], state, n, tick)
            else:
                n = 1
                set_used(full, reach - 1)  # of the shapes that will be captured: what is set up on first use is set up now
                state, output = step(*state)
                tick()
                self.graphs[key], more = self.captured(step, state, output, full, reach), [output]
            outputs += more
            set_used(full, min(used + n, room))
        return state, outputs

    def captured(self, step, state, output, full, reach):
        """(state buffers, output buffer, replay): replay() takes one step from the buffers, into the buffers."""
        static, out = [value.clone() for value in state], output.clone()

        def in_place():
            set_used(full, reach - 1)
            new, output = step(*static)
            for buffer, value in zip([*static, out], [*new, output]):
                buffer.copy_(value)

        if out.is_cuda and self.stream is None:
            self.stream = torch.cuda.Stream(out.device)
        return static, out, capture(in_place, self.pool, self.stream)


def set_used(full, n):
    for c in full:
        c.used = n


def replayed(static, out, replay, state, n, tick):
    """n steps from `state`: the state after them, and their outputs."""
    for buffer, value in zip(static, state):
        buffer.copy_(value)
    outputs = []
    for _ in range(n):
        replay()
        outputs.append(out.clone())
        tick()
    return [buffer.clone() for buffer in static], outputs


def capture(f, pool, stream):
    """f(), which works in place on tensors that stay, as a CUDA graph on the stream's device -> what replays it."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.device(stream.device), torch.cuda.graph(graph, pool=pool, stream=stream):
        f()
    return graph.replay
