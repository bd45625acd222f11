"""From scores to a token: greedy, or by temperature, top-k and top-p, with random numbers that belong to the question.

Each text has a random generator of its own, seeded by the run's seed and the question. So its random numbers do not
depend on the neighbours in a batch, on the order of the questions or on the device.

Letters: B texts, V vocabulary, n tokens.
"""

import hashlib

import torch


def seeds(questions, *key, rollouts=1):
    """B Questions -> B * rollouts integers of 63 bits: hashes of the key, the rollout's number, the question's text.

    key: the run's seed; on the text channel also the round and the role, so that every text has a seed of its own.
    """
    keys = [
        [
            *key,
            *([f"rollout {k}"] if k else []),
            question.text,
        ]  # rollout 0 is seeded as in a run without rollouts
        for question in questions
        for k in range(rollouts)
    ]
    hashes = (hashlib.sha256("\0".join(map(str, parts)).encode()).digest() for parts in keys)
    return [int.from_bytes(digest[:8], "little") >> 1 for digest in hashes]


def uniforms(seeds, n):
    """B seeds -> (B, n) float64 in [0, 1): token i of text b takes number [b, i]. A larger n only appends numbers."""
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    return torch.stack(
        [torch.rand(n, generator=generator, dtype=torch.float64) for generator in generators]
    )


def sample(logits, u, temperature, top_k, top_p):
    """logits (B, V) and uniform numbers u (B,) -> ids (B,), -1 where the best logit is not finite.

    Temperature 0 takes the best token. Else, in this order: keep the top_k best tokens (0: all), divide by the
    temperature, keep the fewest of them whose probabilities add up to top_p, and take the one at which the running sum
    passes u.
    """
    if temperature == 0:
        best, ids = logits.max(-1)  # NaN counts as the largest
        return ids.where(best - best == 0, -1)
    V = logits.shape[-1]
    best, ids = logits.topk(
        min(top_k or V, V), sorted=True
    )  # (B, k), best first; nothing else is done to all V
    p = (best.float() / temperature).softmax(-1)
    p = p * (
        p.cumsum(-1) - p < top_p
    )  # a token is needed if the sum before it falls short of top_p
    reached = p.double().cumsum(-1)
    index = (reached <= u[:, None] * reached[:, -1:]).sum(-1, keepdim=True)
    ids = ids.gather(1, index.clamp(max=ids.shape[1] - 1)).squeeze(1)
    return ids.where(best[:, 0] - best[:, 0] == 0, -1)
