"""From scores to a token: greedy, or by temperature, top-k and top-p, with random numbers that belong to the question.

The number for token n of a question is a hash of (seed, question, n). So chance does not depend on the neighbours in a
batch, on the order of the questions or on the device, and no generator state is carried along.

Letters: B texts, V vocabulary.
"""

import hashlib


def seeds(questions, *key, rollouts=1):
    """B Questions -> B * rollouts integers of 63 bits: hashes of the key, the rollout's number, the question's text.

    key: the run's seed; on the text channel also the round and the role, so that every text has a seed of its own.
    """
    texts = []
    for question in questions:
        for k in range(rollouts):
            rollout = [f"rollout {k}"] if k else []  # the first one is the text of a run without rollouts
            texts.append("\0".join([*map(str, key), *rollout, question.text]))
    return [int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") >> 1 for text in texts]


def uniform(seeds, n):
    """Seeds and token numbers n, of shapes that broadcast -> float64 in [0, 1): output n of SplitMix64 (Steele et al. 2014).
    """
    def shift(z, bits):  # a logical shift: that of int64 would carry its sign in
        return (z >> bits) & ((1 << (64 - bits)) - 1)

    z = seeds + (n + 1) * -0x61C8864680B583EB  # 0x9E3779B97F4A7C15 as int64; products wrap
    z = (z ^ shift(z, 30)) * -0x40A7B892E31B1A47  # 0xBF58476D1CE4E5B9
    z = (z ^ shift(z, 27)) * -0x6B2FB644ECCEEE15  # 0x94D049BB133111EB
    return shift(z ^ shift(z, 31), 11).double() / (1 << 53)


def sample(logits, u, temperature, top_k, top_p):
    """logits (B, V) and uniform numbers u (B,) -> ids (B,).

    Temperature 0 takes the best token. Else, in this order: keep the top_k best tokens (0: all), divide by the
    temperature, keep the fewest of them whose probabilities add up to top_p, and take the one at which the running sum
    passes u.
    """
    if temperature == 0:
        return logits.argmax(-1)
    V = logits.shape[-1]
    best, ids = logits.topk(min(top_k or V, V), sorted=True)  # (B, k), best first; nothing else is done to all V
    p = (best.float() / temperature).softmax(-1)
    p = p * (p.cumsum(-1) - p < top_p)  # a token is needed if the sum before it falls short of top_p
    reached = p.double().cumsum(-1)
    index = (reached <= u[:, None] * reached[:, -1:]).sum(-1, keepdim=True)
    return ids.gather(1, index.clamp(max=ids.shape[1] - 1)).squeeze(1)
