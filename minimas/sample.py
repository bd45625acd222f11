"""From scores to a token: greedy, or by temperature, top-k and top-p, with random numbers that belong to the question.

The number used for token n of a question is a hash of (seed, question, n). So a question's text does not depend on its
neighbours in the batch, on the order of the questions or on the device, and no generator state has to be carried along.
"""

import hashlib

import torch


def seeds(questions, *key, rollouts=1):
    """`rollouts` 63-bit integers for each of B questions, out of its text and a key: the run's seed, and what tells its texts apart."""
    keys = ("\0".join([*map(str, key), *([f"rollout {k}"] if k else []), question.text]) for question in questions for k in range(rollouts))
    return [int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") >> 1 for text in keys]


def uniform(seeds, n):
    """seeds (B,) int64 and the token's number n -> (B,) float64 in [0, 1): the n-th output of SplitMix64 (Steele et al. 2014)."""
    def shift(z, bits):  # logical shift: int64 would carry its sign in
        return (z >> bits) & ((1 << (64 - bits)) - 1)

    z = seeds + (torch.zeros_like(seeds) + n + 1) * -0x61C8864680B583EB  # 0x9E3779B97F4A7C15 as int64; products wrap
    z = (z ^ shift(z, 30)) * -0x40A7B892E31B1A47  # 0xBF58476D1CE4E5B9
    z = (z ^ shift(z, 27)) * -0x6B2FB644ECCEEE15  # 0x94D049BB133111EB
    return shift(z ^ shift(z, 31), 11).double() / (1 << 53)


def sample(logits, u, temperature, top_k, top_p):
    """logits (B, V) and uniform numbers u (B,) -> ids (B,).

    temperature 0 takes the best token. Else, in this order: divide by the temperature, keep the top_k best (0: all), keep
    the fewest of them whose probabilities reach top_p, and take the one where the running sum passes u.
    """
    if temperature == 0:
        return logits.argmax(-1)
    logits = logits.float() / temperature
    best, ids = logits.topk(min(top_k or logits.shape[-1], logits.shape[-1]), sorted=True)  # (B, k), best first
    p = best.softmax(-1)
    p = p * (p.cumsum(-1) - p < top_p)  # the sum before a token tells whether it is still needed
    reached = p.double().cumsum(-1)
    index = (reached <= u[:, None] * reached[:, -1:]).sum(-1, keepdim=True)
    return ids.gather(1, index.clamp(max=ids.shape[1] - 1)).squeeze(1)
