"""An agent's steps as CUDA graphs: captured once, then replayed without the host launching their kernels one by one."""

import torch

from ..cache import KVCache, first_rows

SPARE = 64  # cache slots: capacities are rounded up to a multiple of this, so that a slightly longer prompt still fits


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
        self.pool = torch.cuda.graph_pool_handle() if torch.cuda.is_available() else None
        self.base, self.capacity, self.graphs = (
            first_rows(cache, B),
            (B, S),
            {},
        )  # all B, even when rows leave `cache`

    def make_cache(self, B, S):
        """An empty cache for B rows of S positions, in the same memory as before if that suffices."""
        if B > self.capacity[0] or S > self.capacity[1]:
            capacity = max(B, self.capacity[0]), -(-max(S, self.capacity[1]) // SPARE) * SPARE
            self.release()  # free the old cache before the new one is allocated
            self.adopt(self.model.make_cache(*capacity), *capacity)
        cache = first_rows(self.base, B)
        for c in cache:
            for name in c.tensors:
                getattr(c, name).fill_(
                    -1 if name == "positions" else 0
                )  # no NaN, either, reaches the next question
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
        buffers, out, replay = self.graphs[key]
        for buffer, value in zip(buffers, state):
            buffer.copy_(value)
        for _ in range(times - len(outputs)):
            replay()
            outputs.append(out.clone())
            tick()
        for c, n in zip(kv, filled):
            c.filled = n
        return [buffer.clone() for buffer in buffers], outputs

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


def capture(f, pool, stream):
    """Capture f(), which works in place on tensors that stay, as a CUDA graph; returns its replay."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.device(stream.device), torch.cuda.graph(graph, pool=pool, stream=stream):
        f()
    return graph.replay
