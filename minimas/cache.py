"""The KV cache of a decoder: one small object per layer, made by the model.

The cache of an attention layer has

    mask(positions, last)     which keys the last `last` of T new tokens may attend to, (B, 1, last, S) bool; None means
                              ordinary causal attention, in which the last token sees all. The model calls it once for all layers of one kind (`masks`)
    update(k, v, positions)   stores new keys and values (B, K, T, d) and returns all S of them. The layer calls it

A mask must be asked for before the update. A DeltaCache has a mask (B, T, 1) of tokens, with_history and store.
`tensors` names the attributes that hold one row per prompt; a GrowingCache has none, as its batch never changes.

`positions` (B, T) counts the tokens of a row from 0. It is negative on padding, which is at the left of a chunk.
A key is addressed by its position, not by its column. That is all it takes to batch rows of unequal length.

Letters: B batch, T new tokens, S stored keys, K key/value heads, d head width.
"""

import copy

import torch


def causal_mask(positions, key_positions, window=None):
    """positions (B, T), key_positions (B, S) -> (B, 1, T, S) bool: keys at or before a query, in its window, no padding.

    A padding query sees every key: its output is discarded, but a softmax over no keys would be NaN, which spreads.
    """
    q, k = positions[:, None, :, None], key_positions[:, None, None, :]
    seen = (k >= 0) & (k <= q)
    if window is not None:
        seen &= k > q - window
    return seen | (q < 0)


def plain_causal(positions, last, window):
    """Whether an empty cache needs no mask for this chunk: no padding, no key outside the window, every query asked for."""
    T = positions.shape[1]
    return 1 < T == last and (window is None or T <= window) and bool((positions[:, 0] == 0).all())


class KVCache:
    """Keys and values of one attention layer, allocated for S positions and written in place: position p is in slot p."""

    tensors = ("k", "v")

    def __init__(self, B, K, S, d, like, window=None):
        self.window = window
        # The last slot takes what padding writes and is never read. Zeros, since a masked weight of 0 times NaN is NaN.
        self.k, self.v = like.new_zeros(B, K, S + 1, d), like.new_zeros(B, K, S + 1, d)
        self.filled = (
            0  # slots that may hold a token: an upper bound over the rows, kept on the host
        )

    @property
    def capacity(self):
        """Positions there is room for."""
        return self.k.shape[2] - 1

    def filled_after(self, positions):
        """`filled` once these positions (B, T) are written."""
        return min(self.filled + positions.shape[1], self.capacity)

    def sees_all(self, positions):
        """Whether each row's one token sees all slots that are filled. On CUDA nobody asks: the host would have to wait."""
        return (
            self.window is None
            and positions.shape[1] == 1
            and positions.device.type == "cpu"
            and bool((positions == self.filled_after(positions) - 1).all())
        )

    def mask(self, positions, last):
        """Keys are the slots up to the last one filled: (B, 1, last, filled)."""
        if (
            self.filled == 0
            and plain_causal(positions, last, self.window)
            or self.sees_all(positions)
        ):
            return None
        slots = torch.arange(self.filled_after(positions), device=positions.device)
        return causal_mask(positions[:, -last:], slots.expand(len(positions), -1), self.window)

    def update(self, k, v, positions):
        """Write k, v (B, K, T, d) in place -> views of all slots up to the last one filled, (B, K, filled, d)."""
        self.filled = self.filled_after(positions)
        slots = torch.where(positions < 0, self.capacity, positions)
        write_slots(self.k, slots, k)
        write_slots(self.v, slots, v)
        return self.k[:, :, : self.filled], self.v[:, :, : self.filled]

    def grow(self, n):
        """Make room for n more positions."""
        self.k, self.v = (torch.nn.functional.pad(x, (0, 0, 0, n)) for x in (self.k, self.v))
        self.k[:, :, -n - 1] = self.v[:, :, -n - 1] = (
            0  # the old padding slot is an ordinary one from now on
        )


class WindowCache:
    """The same for a sliding window: only the last `window` keys are kept, position p in slot p modulo window."""

    tensors = ("k", "v", "positions")

    def __init__(self, B, K, window, d, like):
        self.window = window
        self.k, self.v = (
            like.new_zeros(B, K, window + 1, d),
            like.new_zeros(B, K, window + 1, d),
        )  # one slot for padding
        self.positions = torch.full((B, window + 1), -1, device=like.device)

    def slots(self, positions):
        """Where to write positions (B, T) -> (B, T); the slot `window` takes what is not kept."""
        last = positions.amax(
            1, keepdim=True
        )  # of a long chunk only the end is kept: no two keys may share a slot
        kept = (positions >= 0) & (positions > last - self.window)
        return torch.where(kept, positions % self.window, self.window)

    def mask(self, positions, last):
        """Keys are the slots, for a chunk of several tokens also the new ones after them: (B, 1, last, S)."""
        if positions.shape[1] == 1:
            keys = self.positions.scatter(1, self.slots(positions), positions)
        else:
            keys = torch.cat([self.positions, positions], 1)
        return causal_mask(positions[:, -last:], keys, self.window)

    def update(self, k, v, positions):
        """Write k, v (B, K, T, d) in place -> the keys and values that `mask` is about."""
        # A single token overwrites just the key that it can no longer see. A chunk still needs what it overwrites.
        one, slots = positions.shape[1] == 1, self.slots(positions)
        before = None if one else (torch.cat([self.k, k], 2), torch.cat([self.v, v], 2))
        write_slots(self.k, slots, k)
        write_slots(self.v, slots, v)
        self.positions.scatter_(1, slots, positions.where(slots < self.window, -1))
        return (self.k, self.v) if one else before


class GrowingCache:
    """Keys and values by concatenation, which keeps the graph: for training, and as the plain truth of the tests."""

    def __init__(self, window=None):
        self.window = window
        self.chunks = []  # (k, v, positions) of each; the list is replaced, never changed, so that a copy is a snapshot

    def mask(self, positions, last):
        """Keys are all that were ever seen: (B, 1, last, S)."""
        if not self.chunks and plain_causal(positions, last, self.window):
            return None
        keys = torch.cat([*(chunk[2] for chunk in self.chunks), positions], 1)
        return causal_mask(positions[:, -last:], keys, self.window)

    def update(self, k, v, positions):
        """Append k, v (B, K, T, d) -> all keys and values, (B, K, S, d)."""
        self.chunks = [*self.chunks, (k, v, positions)]
        return torch.cat([chunk[0] for chunk in self.chunks], 2), torch.cat(
            [chunk[1] for chunk in self.chunks], 2
        )


class DeltaCache:
    """The cache of a Gated DeltaNet layer: the last inputs of its convolution and its state, but no keys."""

    tensors, window = ("conv", "state"), None

    def __init__(self, conv, state):
        self.conv = conv  # (B, channels, kernel - 1)
        self.state = state  # (B, heads, d_k, d_v) float32

    def mask(self, positions, last):
        """(B, T, 1): True where there is a token."""
        return (positions >= 0)[..., None]

    def with_history(self, x, positions):
        """New inputs x (B, channels, T) -> (B, channels, kernel - 1 + T), the stored inputs in front of each row's
        first token; and the last kernel - 1 of them, to be stored next.

        With kernel 4, memory m0 m1 m2 and a row padded by two, m0 m1 m2 | - - x2 x3 becomes m0 m0 m0 m1 m2 x2 x3.
        """
        n = self.conv.shape[2]
        columns, padding = (
            torch.arange(n + x.shape[2], device=x.device),
            (positions < 0).sum(1, keepdim=True),
        )
        source = torch.where(
            columns < padding + n, (columns - padding).clamp(min=0), columns
        )  # (B, kernel - 1 + T)
        x = torch.cat([self.conv, x], 2).gather(2, source[:, None].expand(-1, x.shape[1], -1))
        return x, x[:, :, -n:]

    def store(self, conv, state):
        """Store these: in place or, where gradients are recorded, without touching what the graph holds."""
        if torch.is_grad_enabled():
            self.conv, self.state = conv, state
        else:
            self.conv.copy_(conv)
            self.state.copy_(state)


def attention_cache(B, K, S, d, like, window=None):
    """The cache of one attention layer: growing if S is None, else for S positions, or a shorter window."""
    if S is None:
        return GrowingCache(window)
    return (
        KVCache(B, K, S, d, like, window)
        if window is None or window >= S
        else WindowCache(B, K, window, d, like)
    )


def masks(cache, positions, last):
    """The mask of each layer of a model, made once for all layers of one kind; the last layer's has `last` rows only."""
    made, rows = {}, [positions.shape[1]] * (len(cache) - 1) + [last]
    for c, n in zip(cache, rows):
        if (type(c), c.window, n) not in made:
            made[type(c), c.window, n] = c.mask(positions, n)
    return [made[type(c), c.window, n] for c, n in zip(cache, rows)]


def write_slots(memory, slots, new):
    """Write new (B, K, T, d) into memory (B, K, slots, d) at slots (B, T)."""
    if len(slots) == 1:
        memory.index_copy_(2, slots[0], new)
        return
    rows = torch.arange(len(slots), device=slots.device)[:, None]
    memory.transpose(1, 2)[rows, slots] = new.transpose(1, 2)


# Operations on the caches of all layers, when the batch changes


def first_rows(cache, B):
    """Cache objects for the first B rows, in the same memory."""
    copies = [copy.copy(c) for c in cache]
    for c in copies:
        for name in c.tensors:
            setattr(c, name, getattr(c, name)[:B])
    return copies


def keep_rows(cache, rows):
    """Keep these rows only, moved to the front in place."""
    for c in cache:
        for name in c.tensors:
            memory = getattr(c, name)
            memory[: len(rows)] = memory[rows]
            setattr(c, name, memory[: len(rows)])


def repeat_rows(cache, few, k):
    """Fill `cache` with k copies of every row of `few`, which is its front."""
    for c, source in zip(cache, few):
        for name in c.tensors:
            getattr(c, name).copy_(getattr(source, name).repeat_interleave(k, 0))
        if isinstance(c, KVCache):
            c.filled = source.filled


def grow(cache, n):
    """Make room for n more positions; windows and states need none."""
    for c in cache:
        if isinstance(c, KVCache):
            c.grow(n)
