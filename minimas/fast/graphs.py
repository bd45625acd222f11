"""An agent's steps as CUDA graphs: captured once, then replayed without the host launching their kernels one by one."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import nn

from ..cache import KVCache, first_rows, grow
from ..common import no_op
from ..llama import Llama
from ..steps import LoopState, Step, Steps, round_up
from .hooks import has_global_hook, has_hook, has_hook_inside

SPARE = 64  # positions: capacities are rounded up to a multiple, so that a slightly longer prompt still fits


class RecordedStep(NamedTuple):
    """A captured step: it reads its loop state from `state`, leaves the next one there, and its output in `output`."""

    state: list[torch.Tensor]
    output: torch.Tensor
    replay: Callable[[], None]


class Graphs(Steps):
    """Takes steps of one token a row as CUDA graphs, over one cache that stays in place from question to question.

    A graph reads and writes the memory that it was captured with. So there is one for each kind of step and number of
    rows, and while graphs are at work a KVCache counts as filled: what is seen, positions decide.

    It also reads the weights in the memory that they had. So with another model, and if a module or the memory of a
    weight was replaced, all graphs are discarded. What is changed in place is read by the graphs, too.

    base      the cache, for `capacity` (rows, positions)
    recorded  {(*kind, rows): RecordedStep}
    captured  {the model, or another module of a step: its `parts` when its steps were captured}
    modules   the model and all modules within it
    """

    def __init__(self, model: Llama) -> None:
        super().__init__(model)
        self.sync_every = 16
        self.stream: torch.cuda.Stream | None = None  # of the captures; made with the first one
        self.pool: Any = None  # memory that all graphs of one cache share
        self.capacity = (0, 0)
        self.recorded: dict[tuple, RecordedStep] = {}
        self.captured: dict[nn.Module, list[object]] = {}
        self.modules: list[nn.Module] = []

    def __getstate__(self) -> dict[str, Any]:
        """For copy.deepcopy and pickle: graphs and their memory stay behind, a copy captures its own."""
        return {"model": self.model, "sync_every": self.sync_every}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["model"])  # type: ignore[misc]  # as it was made
        self.sync_every = state["sync_every"]

    def release(self) -> None:
        """Let go of the cache and the graphs."""
        self.base = None
        self.capacity = (0, 0)
        self.recorded = {}
        self.captured = {}

    def adopt(self, cache: list, B: int, S: int) -> None:
        """Use this cache of B rows and S positions from now on, and discard all graphs of another one."""
        self.pool = torch.cuda.graph_pool_handle() if torch.cuda.is_available() else None
        self.base = first_rows(cache, B)  # all B, even when rows leave `cache`
        self.capacity = (B, S)
        self.recorded = {}
        self.captured = {self.model: parts(self.model)}
        self.modules = list(self.model.modules())

    def make_cache(self, B: int, S: int) -> list:
        """An empty cache for B rows of S positions, in the same memory as before if that suffices."""
        most_rows, most_positions = self.capacity
        is_too_small = most_rows < B or most_positions < S
        if self.base is None or is_too_small or self.is_outdated():
            rows = max(B, most_rows)
            positions = round_up(max(S, most_positions), SPARE)
            self.release()  # free the old cache before the new one is allocated
            self.adopt(self.model.make_cache(rows, positions), rows, positions)
        assert self.base is not None
        cache = first_rows(self.base, B)
        for c in cache:
            for name in c.tensors:
                # Cleared, so that no NaN reaches the next question.
                getattr(c, name).fill_(-1 if name == "positions" else 0)
            if isinstance(c, KVCache):
                c.filled = 0
        return cache

    def is_outdated(self) -> bool:
        """Whether the cache and the graphs are those of another model, or of modules and weights that were replaced."""
        return self.captured.get(self.model) != parts(self.model)

    def grow_cache(self, cache: list, more: int) -> None:
        """Make room for `more` positions; the graphs of the old memory are discarded."""
        self.release()  # first, so that the old memory goes layer by layer
        grow(cache, more)
        grown = [c for c in cache if isinstance(c, KVCache)]
        self.adopt(cache, len(grown[0].k), grown[0].capacity)

    def rows_to_keep(self, unfinished: int, rows: int) -> int:
        """A power of two: few sizes, few graphs."""
        power = 1
        while power < unfinished:
            power *= 2
        return min(power, rows)

    def take(
        self,
        step: Step,
        state: LoopState,
        times: int,
        cache: list,
        callback: Callable = no_op,
        kind: tuple = (),
    ) -> tuple[LoopState, list[torch.Tensor]]:
        """Steps.take by replay. The first step of each kind and number of rows is taken as it is, then captured."""
        rows, tokens = state[0].shape[:2]
        if times == 0 or tokens > 1 or torch.is_grad_enabled() or self.has_hook(kind):
            return super().take(step, state, times, cache, callback, kind)
        self.forget_replaced(modules_in(kind))
        outputs = []
        layers = [c for c in cache if isinstance(c, KVCache)]
        filled_after = [min(c.filled + times, c.capacity) for c in layers]
        for c in layers:
            c.filled = c.capacity
        key = (*kind, rows)
        if key not in self.recorded:
            state, output = step(*state)
            callback()
            outputs.append(output)
            self.recorded[key] = self.record(step, state, output)
        recorded = self.recorded[key]
        copy_into(recorded.state, state)
        while len(outputs) < times:
            recorded.replay()
            outputs.append(recorded.output.clone())
            callback()
        for c, filled in zip(layers, filled_after, strict=True):
            c.filled = filled
        return [buffer.clone() for buffer in recorded.state], outputs

    def has_hook(self, kind: tuple) -> bool:
        """Whether a step of this kind calls a hook, which a replay would not."""
        if any(has_hook(module) for module in self.modules):
            return True
        return has_global_hook() or any(has_hook_inside(module) for module in modules_in(kind))

    def forget_replaced(self, modules: list[nn.Module]) -> None:
        """Discard the steps with modules besides the model, if these are others than they were captured with."""
        now = {module: parts(module) for module in modules}
        if all(self.captured.get(module) == found for module, found in now.items()):
            return
        self.recorded = {key: kept for key, kept in self.recorded.items() if not modules_in(key)}
        self.captured = {self.model: self.captured[self.model], **now}

    def record(self, step: Step, state: LoopState, output: torch.Tensor) -> RecordedStep:
        """Capture a step; a loop state and an output of it say which shapes its buffers have."""
        buffers = [value.clone() for value in state]
        output_buffer = output.clone()

        def in_place() -> None:
            next_state, output = step(*buffers)
            copy_into(buffers, next_state)
            output_buffer.copy_(output)

        if output.is_cuda and self.stream is None:
            self.stream = torch.cuda.Stream(output.device)
        return RecordedStep(buffers, output_buffer, capture(in_place, self.pool, self.stream))


def modules_in(kind: tuple) -> list[nn.Module]:
    """The modules besides the model that a kind of step calls."""
    return [part for part in kind if isinstance(part, nn.Module)]


def parts(module: nn.Module) -> list[object]:
    """What a graph of a module's step has fixed: the modules within, and where in memory their tensors are."""
    found: list[object] = []
    for part in module.modules():
        found.append(part)
        for tensor in (*part._parameters.values(), *part._buffers.values()):
            if tensor is not None:
                found.append(tensor.data_ptr())
    return found


def copy_into(buffers: LoopState, values: LoopState) -> None:
    """Copy each value into its buffer."""
    for buffer, value in zip(buffers, values, strict=True):
        buffer.copy_(value)


def capture(f: Callable[[], None], pool: Any, stream: Any) -> Callable[[], None]:
    """Capture f(), which works in place on tensors that stay, as a CUDA graph; returns its replay."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.device(stream.device), torch.cuda.graph(graph, pool=pool, stream=stream):
        f()
    return graph.replay
