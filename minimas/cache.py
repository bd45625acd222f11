"""The KV cache of a decoder: one small object per layer, made by the model.

The cache of an attention layer has two methods. A mask must be asked for before the update that stores its tokens.

    mask(positions, last)     which keys the last `last` of T new tokens may attend to, (B, 1, last, keys) bool. None is
                              plain causal attention without padding: of T tokens over their own keys, or of one token
                              that sees all keys. The model calls it (see `masks`)
    update(k, v, positions)   stores new keys and values (B, K, T, d) and returns all there are, (B, K, keys, d). The
                              layer calls it

A layer of a Gated DeltaNet keeps no keys. Its DeltaCache has a mask (B, T, 1) of tokens, `with_history` and `store`.

`positions` (B, T) counts the tokens of each row from 0. Padding is at the left of a chunk and has a negative position.

A key is addressed by its position, not by the column of the batch in which it arrived. Rows of unequal length need
nothing more than that: a query at position i sees the keys at positions 0 to i of its own row. How much padding stood
before a token, and in which chunk it came, makes no difference.

Notation: B batch, T new tokens, S positions that a cache has room for, `keys` those that a mask is about, K key/value
heads, d head width.
"""

import copy
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F


def causal_mask(
    positions: torch.Tensor, key_positions: torch.Tensor, window: int | None = None
) -> torch.Tensor:
    """Which keys each query sees: those at or before it, in its window, but no padding.

    positions (B, T), key_positions (B, keys) -> (B, 1, T, keys) bool

    A padding query sees every key: its output is discarded, but a softmax over no keys would be NaN, which spreads.
    """
    i = positions[:, None, :, None]  # (B, 1, T, 1), of the queries
    j = key_positions[:, None, None, :]  # (B, 1, 1, keys), of the keys
    seen = (j >= 0) & (j <= i)  # (B, 1, T, keys)
    if window is not None:
        seen &= j > i - window
    return seen | (i < 0)


def plain_causal(positions: torch.Tensor, last: int, window: int | None) -> bool:
    """Whether an empty cache needs no mask for a chunk at positions (B, T).

    It needs none if every query is asked for, no key is outside the window, and no row has padding.
    """
    T = positions.shape[1]
    if T <= 1 or last != T:
        return False
    if window is not None and T > window:
        return False
    return bool((positions[:, 0] == 0).all())  # asked last: on CUDA the host has to wait for this


class KVCache:
    """Keys and values of one attention layer, allocated for S positions and written in place: position p is at index p.

    tensors  names of the attributes that hold one row per prompt
    k, v     (B, K, S + 1, d). The last index takes what padding writes, and no query sees it
    filled   indices that may hold a token. This is an upper bound over the rows, which the host knows without waiting
    window   how many positions back a query sees, itself included; None is all
    """

    tensors = ("k", "v")

    def __init__(
        self, B: int, K: int, S: int, d: int, like: torch.Tensor, window: int | None = None
    ) -> None:
        """like: a tensor with the dtype and the device that the cache gets."""
        self.window = window
        # Zeros, because a masked weight of 0 times a NaN in unused memory would be NaN.
        self.k = like.new_zeros(B, K, S + 1, d)
        self.v = like.new_zeros(B, K, S + 1, d)
        self.filled = 0

    @property
    def capacity(self) -> int:
        """Positions there is room for."""
        return self.k.shape[2] - 1

    def filled_after(self, positions: torch.Tensor) -> int:
        """`filled` once these positions (B, T) are written."""
        return min(self.filled + positions.shape[1], self.capacity)

    def sees_all(self, positions: torch.Tensor) -> bool:
        """Whether each row has one new token, at positions (B, 1), and it sees all that are filled.

        On CUDA nobody asks, because the host would have to wait for the answer.
        """
        if self.window is not None or positions.shape[1] > 1 or positions.device.type != "cpu":
            return False
        newest = self.filled_after(positions) - 1
        return bool((positions == newest).all())

    def mask(self, positions: torch.Tensor, last: int) -> torch.Tensor | None:
        """Keys are those at indices below `filled`: (B, 1, last, filled)."""
        if self.filled == 0 and plain_causal(positions, last, self.window):
            return None
        if self.sees_all(positions):
            return None
        indices = torch.arange(self.filled_after(positions), device=positions.device)
        key_positions = indices.expand(len(positions), -1)  # (B, filled): position p is at index p
        return causal_mask(positions[:, -last:], key_positions, self.window)

    def update(
        self, k: torch.Tensor, v: torch.Tensor, positions: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write k, v (B, K, T, d) in place -> views of all that may hold a token, (B, K, filled, d)."""
        self.filled = self.filled_after(positions)
        if positions.numel() == 1 and positions.device.type == "cpu":  # a GPU would be waited for
            p = int(positions)
            i = self.capacity if p < 0 else p
            self.k.narrow(2, i, 1).copy_(k)
            self.v.narrow(2, i, 1).copy_(v)
        else:
            indices = torch.where(positions < 0, self.capacity, positions)  # (B, T)
            write_at(self.k, indices, k)
            write_at(self.v, indices, v)
        return self.k[:, :, : self.filled], self.v[:, :, : self.filled]

    def grow(self, n: int) -> None:
        """Make room for n more positions."""
        padding_index = self.capacity
        self.k = F.pad(self.k, (0, 0, 0, n))  # (B, K, S + n + 1, d)
        self.v = F.pad(self.v, (0, 0, 0, n))
        # Where padding was written, a token may be written from now on.
        self.k[:, :, padding_index] = 0
        self.v[:, :, padding_index] = 0


class WindowCache:
    """Keys and values of a sliding window: only the last `window` are kept, and position p is at index p modulo window.

    tensors    names of the attributes that hold one row per prompt
    k, v       (B, K, window + 1, d). The last index takes what is not kept, and no query sees it
    positions  (B, window + 1), the position at each index, -1 where there is none
    """

    tensors = ("k", "v", "positions")

    def __init__(self, B: int, K: int, window: int, d: int, like: torch.Tensor) -> None:
        """like: a tensor with the dtype and the device that the cache gets."""
        self.window = window
        self.k = like.new_zeros(B, K, window + 1, d)
        self.v = like.new_zeros(B, K, window + 1, d)
        self.positions = torch.full((B, window + 1), -1, device=like.device)

    def indices(self, positions: torch.Tensor) -> torch.Tensor:
        """Where to write positions (B, T) -> (B, T); the index `window` takes what is not kept."""
        # Of a chunk longer than the window only the end is kept: no two keys may share an index.
        newest = positions.amax(1, keepdim=True)  # (B, 1)
        kept = (positions >= 0) & (positions > newest - self.window)
        return torch.where(kept, positions % self.window, self.window)

    def mask(self, positions: torch.Tensor, last: int) -> torch.Tensor:
        """Keys are those in memory, for a chunk of several tokens also the new ones after them: (B, 1, last, keys)."""
        if positions.shape[1] == 1:
            key_positions = self.positions.scatter(1, self.indices(positions), positions)
        else:
            key_positions = torch.cat([self.positions, positions], 1)
        return causal_mask(positions[:, -last:], key_positions, self.window)

    def update(
        self, k: torch.Tensor, v: torch.Tensor, positions: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write k, v (B, K, T, d) in place -> the keys and values that `mask` is about."""
        if positions.shape[1] == 1:  # the token overwrites just the key that it can no longer see
            self.write(k, v, positions)
            return self.k, self.v
        # The first tokens of a chunk still see what its last ones overwrite.
        keys = torch.cat([self.k, k], 2)  # (B, K, window + 1 + T, d)
        values = torch.cat([self.v, v], 2)
        self.write(k, v, positions)
        return keys, values

    def write(self, k: torch.Tensor, v: torch.Tensor, positions: torch.Tensor) -> None:
        """Write k, v (B, K, T, d) and their positions (B, T) at their indices."""
        indices = self.indices(positions)
        write_at(self.k, indices, k)
        write_at(self.v, indices, v)
        self.positions.scatter_(1, indices, positions.where(indices < self.window, -1))


class Chunk(NamedTuple):
    """What one update of a GrowingCache brought: k and v (B, K, T, d), positions (B, T)."""

    k: torch.Tensor
    v: torch.Tensor
    positions: torch.Tensor


class GrowingCache:
    """Keys and values by concatenation, which keeps the graph: for training, and as the plain truth of the tests.

    tensors  none: the batch of this cache never changes
    chunks   what each update brought. The list is replaced, never changed, so a copy of the cache is a snapshot
    """

    tensors = ()

    def __init__(self, window: int | None = None) -> None:
        self.window = window
        self.chunks: list[Chunk] = []

    def mask(self, positions: torch.Tensor, last: int) -> torch.Tensor | None:
        """Keys are all that were ever seen: (B, 1, last, keys)."""
        if not self.chunks and plain_causal(positions, last, self.window):
            return None
        earlier = [chunk.positions for chunk in self.chunks]
        key_positions = torch.cat([*earlier, positions], 1)  # (B, keys)
        return causal_mask(positions[:, -last:], key_positions, self.window)

    def update(
        self, k: torch.Tensor, v: torch.Tensor, positions: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append k, v (B, K, T, d) -> all keys and values, (B, K, keys, d)."""
        self.chunks = [*self.chunks, Chunk(k, v, positions)]
        keys = torch.cat([chunk.k for chunk in self.chunks], 2)
        values = torch.cat([chunk.v for chunk in self.chunks], 2)
        return keys, values


class DeltaCache:
    """The cache of a Gated DeltaNet layer: the last inputs of its convolution and its state, but no keys.

    tensors  names of the attributes that hold one row per prompt
    conv     (B, channels, kernel - 1), the last inputs of the convolution, the newest at the end
    state    (B, heads, d_k, d_v) float32, the S of delta.py
    """

    tensors = ("conv", "state")
    window = None

    def __init__(self, conv: torch.Tensor, state: torch.Tensor) -> None:
        self.conv = conv
        self.state = state

    def mask(self, positions: torch.Tensor, last: int) -> torch.Tensor:
        """(B, T, 1): True where there is a token. All T are needed, because the state depends on each."""
        return (positions >= 0)[..., None]

    def with_history(
        self, x: torch.Tensor, positions: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The new inputs of the convolution with the stored ones before them, and what to store next.

        New inputs x (B, channels, T) at positions (B, T) -> (B, channels, kernel - 1 + T), and the last kernel - 1 of
        these. The stored inputs have to stand directly before a row's first token, so they move over its padding. With
        kernel 4, stored m0 m1 m2 and two columns of padding, m0 m1 m2 - - x2 x3 becomes m0 m0 m0 m1 m2 x2 x3.
        """
        stored = self.conv.shape[2]  # kernel - 1
        columns = torch.arange(stored + x.shape[2], device=x.device)
        padding = (positions < 0).sum(1, keepdim=True)  # (B, 1)
        moved = (columns - padding).clamp(min=0)  # (B, kernel - 1 + T)
        source = torch.where(columns < padding + stored, moved, columns)
        both = torch.cat([self.conv, x], 2)  # (B, channels, kernel - 1 + T)
        history = both.gather(2, source[:, None].expand(-1, x.shape[1], -1))
        return history, history[:, :, x.shape[2] :]

    def store(self, conv: torch.Tensor, state: torch.Tensor) -> None:
        """Store these: in place or, where gradients are recorded, without touching what the graph holds."""
        if torch.is_grad_enabled():
            self.conv = conv
            self.state = state
        else:
            self.conv.copy_(conv)
            self.state.copy_(state)


AttentionCache = KVCache | WindowCache | GrowingCache
LayerCache = AttentionCache | DeltaCache


def attention_cache(
    B: int, K: int, S: int | None, d: int, like: torch.Tensor, window: int | None = None
) -> AttentionCache:
    """The cache of one attention layer: growing if S is None, else for S positions, or a shorter window."""
    if S is None:
        return GrowingCache(window)
    if window is None or window >= S:
        return KVCache(B, K, S, d, like, window)
    return WindowCache(B, K, window, d, like)


def masks(
    cache: Sequence[LayerCache], positions: torch.Tensor, last: int
) -> list[torch.Tensor | None]:
    """The mask of each layer of a model for new tokens at positions (B, T); the last layer's has `last` rows only.

    Layers of one kind share a mask, which is made once.
    """
    made: dict[tuple, torch.Tensor | None] = {}
    layer_masks = []
    for i, layer_cache in enumerate(cache):
        is_last_layer = i == len(cache) - 1
        asked = last if is_last_layer else positions.shape[1]
        kind = (type(layer_cache), layer_cache.window, asked)
        if kind not in made:
            made[kind] = layer_cache.mask(positions, asked)
        layer_masks.append(made[kind])
    return layer_masks


def write_at(memory: torch.Tensor, indices: torch.Tensor, new: torch.Tensor) -> None:
    """Write new (B, K, T, d) into memory (B, K, any, d) at indices (B, T)."""
    if len(indices) == 1:  # one operation instead of several
        memory.index_copy_(2, indices[0], new)
        return
    rows = torch.arange(len(indices), device=indices.device)[:, None]  # (B, 1)
    memory.transpose(1, 2)[rows, indices] = new.transpose(1, 2)  # (B, T, K, d)


# Operations on the caches of all layers, when the batch changes


def first_rows(cache: Sequence[LayerCache], B: int) -> list[LayerCache]:
    """Cache objects for the first B rows, in the same memory."""
    copies = [copy.copy(layer_cache) for layer_cache in cache]
    for layer_cache in copies:
        for name in layer_cache.tensors:
            memory = getattr(layer_cache, name)
            setattr(layer_cache, name, memory[:B])
    return copies


def keep_rows(cache: Sequence[LayerCache], rows: torch.Tensor) -> None:
    """Keep these rows (n,) only, moved to the front in place."""
    n = len(rows)
    for layer_cache in cache:
        for name in layer_cache.tensors:
            memory = getattr(layer_cache, name)
            memory[:n] = memory[rows]
            setattr(layer_cache, name, memory[:n])


def repeat_rows(cache: Sequence[LayerCache], few: Sequence[LayerCache], copies: int) -> None:
    """Fill `cache` with this many copies of every row of `few`, which is its front."""
    for layer_cache, source in zip(cache, few, strict=True):
        for name in layer_cache.tensors:
            repeated = getattr(source, name).repeat_interleave(copies, 0)
            getattr(layer_cache, name).copy_(repeated)
        if isinstance(layer_cache, KVCache) and isinstance(source, KVCache):
            layer_cache.filled = source.filled


def grow(cache: Sequence[LayerCache], n: int) -> None:
    """Make room for n more positions; windows and states need none."""
    for layer_cache in cache:
        if isinstance(layer_cache, KVCache):
            layer_cache.grow(n)
