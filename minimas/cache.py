"""What a decoder remembers of the tokens it has read: one small object per layer, made by the model.

Every cache answers the same two calls:
    mask(positions)          -> (B, 1, T, S) bool: which of S remembered or new keys each of T new queries sees
    update(k, v, positions)  -> keys and values (B, K, S, d), the new ones included

`positions` (B, T) counts a row's tokens from 0 and is negative where the row holds padding. It is all the state a batch
needs: rows of unequal length stand side by side because a key is addressed by its position, not by its column.

Letters: B batch, T new tokens, S keys, K key/value heads, d head width.
"""

import torch


def causal_mask(positions, key_positions):
    """(B, T) and (B, S) positions -> (B, 1, T, S) bool: keys at or before the query, never padding.

    A padding query sees position 0: its result is thrown away, but a row of softmax over nothing would be NaN.
    """
    q, k = positions.clamp(min=0)[:, None, :, None], key_positions[:, None, None, :]
    return (k >= 0) & (k <= q)


class KVCache:
    """Preallocated keys and values of one attention layer, written in place: position p of a row lies in its slot p."""

    def __init__(self, B, K, S, d, device, dtype):
        # Slot S takes what padding writes and is never read. Zeros, since a masked weight of 0 times NaN is NaN.
        self.k = torch.zeros(B, K, S + 1, d, device=device, dtype=dtype)
        self.v = torch.zeros_like(self.k)
        self.used = 0  # slots that may hold a token, an upper bound over the rows, known without asking the device

    def extent(self, positions):
        return min(self.used + positions.shape[1], self.k.shape[2] - 1)

    def mask(self, positions):
        slots = torch.arange(self.extent(positions), device=positions.device)
        return causal_mask(positions, slots.expand(len(positions), -1))

    def update(self, k, v, positions):
        self.used = self.extent(positions)
        slots = torch.where(positions < 0, self.k.shape[2] - 1, positions)
        rows = torch.arange(len(slots), device=slots.device)[:, None]
        self.k.transpose(1, 2)[rows, slots] = k.transpose(1, 2)
        self.v.transpose(1, 2)[rows, slots] = v.transpose(1, 2)
        return self.k[:, :, :self.used], self.v[:, :, :self.used]


class GrowingCache:
    """The same by concatenation, which keeps the graph: for training, and as the plain truth the other is tested against."""

    def __init__(self):
        self.k = self.v = self.positions = None

    def mask(self, positions):
        seen = positions if self.positions is None else torch.cat([self.positions, positions], 1)
        return causal_mask(positions, seen)

    def update(self, k, v, positions):
        if self.positions is None:
            self.k, self.v, self.positions = k, v, positions
        else:
            self.k, self.v = torch.cat([self.k, k], 2), torch.cat([self.v, v], 2)
            self.positions = torch.cat([self.positions, positions], 1)
        return self.k, self.v
