"""What a decoder remembers of the tokens it has read: one small object per layer, made by the model.

The cache of an attention layer gives
    mask(positions, last)    -> (B, 1, last, S) bool: which of S remembered and new keys the last so many of T new queries see,
                                or None for plain causal (asked by the model, once for all layers of one window: see `masks`)
    update(k, v, positions)  -> these S keys and values, (B, K, S, d) each (asked by the layer)
    tensors                  names of its attributes that have a row for each of the batch

`positions` (B, T) counts a row's tokens from 0; padding, which stands on the left of a chunk, is negative. That is all the
state a batch needs: rows of unequal length stand side by side because a key is addressed by its position, not its column.

Letters: B batch, T new tokens, S keys, K key/value heads, d head width.
"""

import copy

import torch
import torch.nn.functional as F


def causal_mask(positions, key_positions, window=None):
    """(B, T), (B, S) positions -> (B, 1, T, S) bool: keys at or before the query, at most window - 1 back, never padding.

    A padding query sees everything: its result is thrown away, but a softmax over nothing would be NaN, which spreads.
    """
    q, k = positions[:, None, :, None], key_positions[:, None, None, :]
    seen = (k >= 0) & (k <= q)
    if window is not None:
        seen &= k > q - window
    return seen | (q < 0)


def plain_causal(positions, last, window):
    """Whether the first chunk of a cache needs no mask: nothing is padding, out of the window, or left out."""
    T = positions.shape[1]
    return 1 < T == last and (window is None or T <= window) and bool((positions[:, 0] == 0).all())


class KVCache:
    """Preallocated keys and values of one layer, written in place: position p of a row lies in its slot p."""
    tensors = ("k", "v")

    def __init__(self, B, K, S, d, like, window=None):
        self.window = window
        # Slot S takes what padding writes and is never read. Zeros, since a masked weight of 0 times NaN is NaN.
        self.k, self.v = like.new_zeros(B, K, S + 1, d), like.new_zeros(B, K, S + 1, d)
        self.used = 0  # slots that may hold a token, an upper bound over the rows, known without asking the device

    def mask(self, positions, last):
        if self.used == 0 and plain_causal(positions, last, self.window):
            return None
        slots = torch.arange(self.reach(positions), device=positions.device)
        return causal_mask(positions[:, -last:], slots.expand(len(positions), -1), self.window)

    def grow(self, n):
        """Make room for n positions more."""
        self.k, self.v = (F.pad(x, (0, 0, 0, n)) for x in (self.k, self.v))
        self.k[:, :, -n - 1] = self.v[:, :, -n - 1] = 0  # what took the padding is a slot like any other now

    @property
    def room(self):
        """Positions there is space for."""
        return self.k.shape[2] - 1

    def reach(self, positions):
        return min(self.used + positions.shape[1], self.room)

    def update(self, k, v, positions):
        self.used = self.reach(positions)
        slots = torch.where(positions < 0, self.room, positions)
        write(self.k, slots, k)
        write(self.v, slots, v)
        return self.k[:, :, :self.used], self.v[:, :, :self.used]


class WindowCache:
    """The same for a sliding window: only the last `window` keys are kept, position p in slot p modulo window."""
    tensors = ("k", "v", "positions")

    def __init__(self, B, K, window, d, like):
        self.window = window
        self.k, self.v = like.new_zeros(B, K, window + 1, d), like.new_zeros(B, K, window + 1, d)  # one slot for padding
        self.positions = torch.full((B, window + 1), -1, device=like.device)

    def slots(self, positions):
        last = positions.amax(1, keepdim=True)  # of a long chunk only the end stays: two keys must not meet in a slot
        stays = (positions >= 0) & (positions > last - self.window)
        return torch.where(stays, positions % self.window, self.window)

    def mask(self, positions, last):
        if positions.shape[1] == 1:
            keys = self.positions.scatter(1, self.slots(positions), positions)
        else:
            keys = torch.cat([self.positions, positions], 1)
        return causal_mask(positions[:, -last:], keys, self.window)

    def update(self, k, v, positions):
        # A single token drops the one key it can no longer see. A chunk still needs what it will overwrite.
        one, slots = positions.shape[1] == 1, self.slots(positions)
        before = None if one else (torch.cat([self.k, k], 2), torch.cat([self.v, v], 2))
        write(self.k, slots, k)
        write(self.v, slots, v)
        self.positions.scatter_(1, slots, positions.where(slots < self.window, -1))
        return (self.k, self.v) if one else before


def write(memory, slots, new):
    """memory (B, K, slots, d) takes new (B, K, T, d) at slots (B, T)."""
    rows = torch.arange(len(slots), device=slots.device)[:, None]
    memory.transpose(1, 2)[rows, slots] = new.transpose(1, 2)


def front(cache, B):
    """Cache objects for the first B rows, in the same memory."""
    copies = [copy.copy(c) for c in cache]
    for c in copies:
        for name in c.tensors:
            setattr(c, name, getattr(c, name)[:B])
    return copies


def select(cache, rows):
    """Keep these rows only, moved to the front in place."""
    for c in cache:
        for name in c.tensors:
            memory = getattr(c, name)
            memory[:len(rows)] = memory[rows]
            setattr(c, name, memory[:len(rows)])


def spread(cache, few, k):
    """Fill `cache` with every row of `few`, which is its front, k times."""
    for c, source in zip(cache, few):
        for name in c.tensors:
            getattr(c, name).copy_(getattr(source, name).repeat_interleave(k, 0))
        if isinstance(c, KVCache):
            c.used = source.used


def grow(cache, n):
    """Make room for n positions more in a model's caches; those of windows and states need none."""
    for c in cache:
        if isinstance(c, KVCache):
            c.grow(n)


class GrowingCache:
    """Either of them by concatenation, which keeps the graph: for training, and as the plain truth of the tests."""

    def __init__(self, window=None):
        self.window, self.chunks = window, []  # (k, v, positions) of each; a copy of the cache shares them and goes its own way

    def mask(self, positions, last):
        if not self.chunks and plain_causal(positions, last, self.window):
            return None
        keys = torch.cat([*(chunk[2] for chunk in self.chunks), positions], 1)
        return causal_mask(positions[:, -last:], keys, self.window)

    def update(self, k, v, positions):
        self.chunks = [*self.chunks, (k, v, positions)]
        return torch.cat([chunk[0] for chunk in self.chunks], 2), torch.cat([chunk[1] for chunk in self.chunks], 2)


def attention_cache(B, K, S, d, like, window=None):
    """The cache of one attention layer: growing when S is None, else for S positions, or for the window where that is shorter."""
    if S is None:
        return GrowingCache(window)
    return KVCache(B, K, S, d, like, window) if window is None or window >= S else WindowCache(B, K, window, d, like)


def masks(cache, positions, last):
    """The mask of each layer of a model; attention layers of one window share it, and the last layer's has `last` rows.

    A Gated DeltaNet's is (B, T, 1): True where there is a token.
    """
    made = {}

    def mask(c, last):
        if isinstance(c, DeltaCache):
            return (positions >= 0)[..., None]
        if (c.window, last) not in made:
            made[c.window, last] = c.mask(positions, last)
        return made[c.window, last]

    return [mask(c, positions.shape[1]) for c in cache[:-1]] + [mask(cache[-1], last)]


class DeltaCache:
    """What a Gated DeltaNet layer remembers: the last few inputs of its convolution, and its state."""
    tensors = ("conv", "state")

    def __init__(self, conv, state):
        self.conv = conv  # (B, channels, kernel - 1)
        self.state = state  # (B, heads, d_k, d_v) float32

    def extend(self, x, positions):
        """New inputs x (B, channels, T) -> (B, channels, kernel - 1 + T) with what came before in front of each row's first
        token; and the end of it, which is to be remembered."""
        n = self.conv.shape[2]
        columns, padding = torch.arange(n + x.shape[2], device=x.device), (positions < 0).sum(1, keepdim=True)
        source = torch.where(columns < padding + n, (columns - padding).clamp(min=0), columns)  # (B, kernel - 1 + T)
        x = torch.cat([self.conv, x], 2).gather(2, source[:, None].expand(-1, x.shape[1], -1))
        return x, x[:, :, -n:]

    def store(self, conv, state):
        """Remember these: in place, or, where gradients are recorded, without touching what the graph holds."""
        if torch.is_grad_enabled():
            self.conv, self.state = conv, state
        else:
            self.conv.copy_(conv)
            self.state.copy_(state)
