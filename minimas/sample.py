"""From scores to a token: greedy, or by temperature, top-k and top-p, with random numbers that belong to the question.

Each text has a random generator of its own, seeded by the run's seed and the question. So its random numbers do not
depend on the neighbours in a batch, on the order of the questions or on the device.

Notation: B texts, V vocabulary, k best tokens, n tokens.
"""

import hashlib
from collections.abc import Sequence

import torch

from .prompts import Question


def seeds(questions: Sequence[Question], *key: object, rollouts: int = 1) -> list[int]:
    """B Questions -> B * rollouts integers of 63 bits: hashes of the key, the rollout's number, the question's text.

    key: the run's seed; on the text channel also the round and the role, so that every text has a seed of its own.
    """
    made = []
    for question in questions:
        for i in range(rollouts):
            rollout = [f"rollout {i}"] if i > 0 else []  # number 0 is seeded as without rollouts
            made.append(hashed(*key, *rollout, question.text))
    return made


def hashed(*parts: object) -> int:
    """A number of 63 bits, so that it fits into an int64: a hash of the parts as text."""
    text = "\0".join(str(part) for part in parts)
    digest = hashlib.sha256(text.encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def uniforms(seeds: Sequence[int], n: int) -> torch.Tensor:
    """B seeds -> (B, n) float64 in [0, 1): token i of text b takes number [b, i]. A larger n only appends numbers."""
    rows = []
    for seed in seeds:
        generator = torch.Generator().manual_seed(seed)
        rows.append(torch.rand(n, generator=generator, dtype=torch.float64))
    return torch.stack(rows)


def sample(
    logits: torch.Tensor, u: torch.Tensor | None, temperature: float, top_k: int, top_p: float
) -> torch.Tensor:
    """logits (B, V) and uniform numbers u (B,), None if greedy -> ids (B,), -1 where the best logit is not finite.

    Temperature 0 takes the best token. Otherwise, in this order:
        keep the top_k best tokens (0: all)
        divide their logits by the temperature
        keep the fewest of them whose probabilities add up to top_p
        take the one at which the running sum of probabilities passes u
    """
    if temperature == 0:
        best, ids = logits.max(-1)  # (B,) each; NaN counts as the largest
        return ids.where(is_finite(best), -1)
    assert u is not None, "a temperature above 0 needs random numbers"
    V = logits.shape[-1]
    k = min(top_k or V, V)
    best, ids = logits.topk(k, sorted=True)  # (B, k) each, best first; all V are read only here
    p = (best.float() / temperature).softmax(-1)  # (B, k)
    sum_before = p.cumsum(-1) - p
    p = p.where(sum_before < top_p, 0)  # a token is needed if those before it fall short of top_p
    running_sum = p.double().cumsum(-1)
    threshold = u[:, None] * running_sum[:, -1:]  # (B, 1): what is kept no longer adds up to 1
    index = (running_sum <= threshold).sum(-1, keepdim=True)  # (B, 1): the first that passes it
    index = index.clamp(max=k - 1)  # rounding can leave the whole sum at u
    ids = ids.gather(1, index).squeeze(1)  # (B,)
    return ids.where(is_finite(best[:, 0]), -1)


def is_finite(x: torch.Tensor) -> torch.Tensor:
    """Where x is finite, (...) bool. Infinity minus itself is NaN, which equals nothing: half the work of torch's."""
    return x - x == 0
