"""The gated delta rule: the recurrence that reads like the paper, and the chunks that are fast, are one function."""

import checkpoints
import pytest
import torch
import torch.nn.functional as F
from checkpoints import IDS

from minimas.delta import chunked, recurrent
from minimas.load import load_model


def inputs(T, B=2, H=3, d_k=5, d_v=7):
    """q, k, v, g, beta and S, with the shapes of delta.py."""
    random = torch.Generator().manual_seed(T)

    def normal(*shape):
        return torch.randn(*shape, generator=random, dtype=torch.float64)

    q = F.normalize(normal(B, H, T, d_k), dim=-1)
    k = F.normalize(normal(B, H, T, d_k), dim=-1)
    g = -normal(B, H, T).exp() * 0.3
    beta = normal(B, H, T).sigmoid()
    v = normal(B, H, T, d_v)
    S = normal(B, H, d_k, d_v)
    return q, k, v, g, beta, S


def assert_equal(a, b):
    for x, y in zip(a, b, strict=True):
        assert (x - y).abs().max() < 1e-12


@pytest.mark.parametrize("T", (1, 2, 63, 64, 65, 200))
def test_chunks_equal_the_recurrence(T):
    assert_equal(chunked(*inputs(T)), recurrent(*inputs(T)))


def test_one_step_by_hand():
    """S <- e^g S; S <- S + k (beta (v - S'k))'; o = S'q, for one head, written with loops."""
    q, k, v, g, beta, S = (x[0, 0] for x in inputs(1))
    S = [[S[i, j] * g[0].exp() for j in range(7)] for i in range(5)]
    found = [sum(S[i][j] * k[0, i] for i in range(5)) for j in range(7)]
    S = [[S[i][j] + k[0, i] * beta[0] * (v[0, j] - found[j]) for j in range(7)] for i in range(5)]
    o = torch.stack([sum(S[i][j] * q[0, i] for i in range(5)) for j in range(7)])
    out, state = recurrent(*inputs(1))
    assert_equal((out[0, 0, 0], state[0, 0]), (o, torch.stack([torch.stack(row) for row in S])))


@pytest.mark.parametrize("sizes", ([100, 100], [64, 136], [1, 199], [7, 130, 63]))
@pytest.mark.parametrize("rule", (recurrent, chunked))
def test_fed_in_pieces_from_a_state(rule, sizes):
    *parts, S = inputs(200)
    outputs, start = [], 0
    for n in sizes:
        o, S = rule(*(x[:, :, start : start + n] for x in parts), S)
        outputs.append(o)
        start += n
    assert_equal((torch.cat(outputs, 2), S), recurrent(*inputs(200)))


def test_padding_passes_the_state_over():
    q, k, v, g, beta, S = inputs(70)

    def pad(x):
        return torch.cat([torch.zeros_like(x[:, :, :30]), x], 2)

    o, state = chunked(pad(q), pad(k), pad(v), pad(g), pad(beta), S)
    assert_equal((o[:, :, 30:], state), recurrent(q, k, v, g, beta, S))


def test_strong_decay_does_not_overflow():
    q, k, v, g, beta, S = inputs(200)
    result = chunked(q, k, v, g * 1000, beta, S)
    assert all(x.isfinite().all() for x in result)
    assert_equal(result, recurrent(q, k, v, g * 1000, beta, S))


@torch.no_grad()
def test_a_convolution_of_one_token(tmp_path):
    """It has no history to store: at once, in pieces, and beside a longer row."""
    checkpoints.make_agent(tmp_path, "qwen3_5_text", linear_conv_kernel_dim=1)
    model = load_model(tmp_path)
    x = model.embed(IDS)  # (1, T, D)
    T = x.shape[1]
    positions = torch.arange(T)[None]
    whole = model(x, positions, model.make_cache(1))
    cache = model.make_cache(2, T)
    found = []
    for i, j in (0, T - 3), (T - 3, T - 2), (T - 2, T):
        padded = positions[:, i:j] - 2  # the second row is two tokens shorter
        both = torch.cat([x[:, i:j], x[:, (padded % T)[0]]])
        found.append(model(both, torch.cat([positions[:, i:j], padded]), cache))
    found = torch.cat(found, 1)
    torch.testing.assert_close(found[:1], whole, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(found[1:, 2:], whole[:, : T - 2], atol=1e-4, rtol=1e-4)
