import pytest
import torch

import minimas
from minimas.generate import generate
from minimas.prompts import Question
from minimas.sample import sample, seeds, uniforms
from minimas.settings import LEAST_TEMPERATURE
from minimas.styles import STYLES


def test_uniforms_belong_to_the_text():
    """Each row depends on its own seed alone, and more numbers do not change those before them."""
    long = uniforms([7, 0, (1 << 63) - 1], 4096)
    assert long.dtype == torch.float64 and 0 <= long.min() and long.max() < 1
    assert len(long.unique()) == long.numel() and abs(long.mean() - 0.5) < 0.02
    for n in 1, 15, 16, 17, 2049:
        assert torch.equal(uniforms([(1 << 63) - 1, 7], n), long[[2, 0], :n])


def test_seeds_depend_on_text_and_key_alone():
    a, b = Question("a"), Question("b")
    assert seeds([a, b, a], 1) == [*seeds([a], 1), *seeds([b], 1), *seeds([a], 1)]
    assert len({*seeds([a, b], 1), *seeds([a, b], 2), *seeds([a], 1, 2)}) == 5


def frequencies(logits, temperature, top_k, top_p, draws=40_000):
    # An even grid instead of chance: frequencies are exact to 1 / draws.
    u = (torch.arange(draws) + 0.5) / draws
    ids = sample(logits.expand(draws, -1), u.double(), temperature, top_k, top_p)
    return torch.bincount(ids, minlength=logits.shape[-1]) / draws


def test_frequencies_are_the_probabilities():
    logits = torch.tensor([[1.0, 3.0, -2.0, 2.0, 0.5]])
    p = (logits[0] / 0.7).softmax(-1)
    assert (frequencies(logits, 0.7, 0, 1.0) - p).abs().max() < 1e-3
    best = p.topk(3).indices
    kept = torch.zeros(5).scatter(0, best, p[best])
    assert (frequencies(logits, 0.7, 3, 1.0) - kept / kept.sum()).abs().max() < 1e-3


def test_top_p_keeps_the_fewest_that_reach_it():
    logits = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log()
    for top_p, count in (0.4, 1), (0.5001, 2), (0.79, 2), (0.81, 3), (1.0, 4):
        assert (frequencies(logits, 1.0, 0, top_p) > 0).sum() == count, top_p


@pytest.mark.parametrize("temperature", [1e-31, 1e-45, 5e-324])
def test_a_temperature_near_zero_is_zero(temperature):
    """Logits that are divided by it would overflow."""
    settings = minimas.Settings(temperature=temperature).completed(STYLES["tiny"])
    assert settings.temperature == 0
    logits = torch.tensor([[30.0, -20.0, 31.0, 0.0]])
    assert sample(logits, torch.tensor([0.99]), LEAST_TEMPERATURE, 0, 0.95).tolist() == [2]


def test_greedy():
    assert sample(torch.tensor([[0.0, 2.0, 1.0]]), torch.tensor([0.99]), 0, 0, 1.0).tolist() == [1]


def test_every_token_of_a_text_has_a_number_of_its_own(monkeypatch):
    """With scores that do not depend on what is read, token n of a text is what number n of its seed draws."""
    agent = minimas.load_mas_system("tiny", device="cpu").agents["solver"]
    scores = -0.3 * torch.arange(agent.model.config.vocab_size)
    monkeypatch.setattr(agent.model, "logits", lambda h: scores.expand(len(h), -1))
    monkeypatch.setattr(agent.generation_config, "eos_ids", ())
    settings = minimas.Settings(max_new_tokens=9, temperature=1.0, top_k=0, top_p=1.0)
    texts = generate(agent, [["7 a+5"], ["3 a-1 b*2"]], [7, 1 << 62], settings)
    for seed, ids in zip((7, 1 << 62), texts, strict=True):
        u = uniforms([seed], 9)[0]
        passed = scores.double().softmax(-1).cumsum(-1) > u[:, None]
        assert ids == passed.int().argmax(-1).tolist() and len(set(ids)) > 2
