"""Every decoder equals transformers' (stored, and live when it is installed),
and equals itself whatever way it is fed.
"""

import checkpoints
import pytest
import torch
from checkpoints import GOLDENS, IDS
from safetensors.torch import load_file

from minimas.cache import WindowCache, causal_mask
from minimas.common import InputError
from minimas.config import FAMILIES
from minimas.llama import Llama, attend, attention_formula
from minimas.load import load_model

VARIANTS = pytest.mark.parametrize("name", checkpoints.VARIANTS)


@pytest.fixture
def folder(name, tmp_path):
    model_type, config = checkpoints.VARIANTS[name]
    return checkpoints.make_agent(tmp_path, model_type, **config)


@torch.no_grad()
def outputs(model, ids=IDS):
    h = model(
        model.embed(ids), torch.arange(ids.shape[1]).expand_as(ids), model.make_cache(len(ids))
    )
    return {"h": h, "logits": model.logits(h[:, -16:])}


def assert_close(ours, theirs, tolerance=1e-4):
    for key in ours:
        assert ours[key].shape == theirs[key].shape
        assert (ours[key].float() - theirs[key]).abs().max() < tolerance, key


def test_each_family_has_a_decoder_of_its_own():
    decoders = {family.decoder for family in FAMILIES.values()}
    assert len(decoders) == len(FAMILIES) and all(issubclass(one, Llama) for one in decoders)


@VARIANTS
def test_golden(name, folder):
    golden = load_file(GOLDENS / "families.safetensors")
    assert torch.equal(golden["ids"], IDS)
    assert_close(
        outputs(load_model(folder)), {key: golden[f"{name}/{key}"] for key in ("h", "logits")}
    )


@VARIANTS
def test_live(name, folder):
    pytest.importorskip("transformers")
    from make_goldens import family_outputs

    assert_close(outputs(load_model(folder)), family_outputs(name, folder))


@VARIANTS
def test_bfloat16_is_as_close_to_float32_as_the_oracle_is(name, folder):
    pytest.importorskip("transformers")
    import reference

    truth = reference.hidden_and_logits(folder, IDS)[0]
    theirs = (
        (reference.hidden_and_logits(folder, IDS, dtype=torch.bfloat16)[0].float() - truth)
        .abs()
        .mean()
    )
    ours = (outputs(load_model(folder, dtype=torch.bfloat16))["h"].float() - truth).abs().mean()
    assert 0 < ours < 1.2 * theirs, f"mean deviation {ours:.5f}, transformers' own {theirs:.5f}"


@VARIANTS
def test_a_layer_may_be_taken_out(name, folder):
    """It is as if a hook let the layer pass on what it reads. Of several kinds, the config must say which are left."""
    model = load_model(folder)
    hook = model.layers[1].register_forward_hook(lambda layer, args, output: args[0])
    passed_on = outputs(model)
    hook.remove()
    del model.layers[1]
    kinds = getattr(model.config, "layer_types", ["full_attention"])
    if len(set(kinds)) > 1:
        with pytest.raises(InputError, match="take the same ones out of config.layer_types$"):
            outputs(model)
        model.config.layer_types = [kinds[0], *kinds[2:]]
    assert_close(outputs(model), passed_on, 1e-6)


@VARIANTS
@torch.no_grad()
def test_fed_in_pieces(name, folder):
    """A preallocated cache, fed at once, in chunks, or token by token, gives what one uncached pass gives."""
    model = load_model(folder, dtype=torch.float64)
    whole = outputs(model)["h"]
    for sizes in [70], [33, 1, 36], [60] + [1] * 10:
        cache, parts, start = model.make_cache(1, 75), [], 0
        for n in sizes:
            positions = torch.arange(start, start + n)[None]
            parts.append(model(model.embed(IDS[:, start : start + n]), positions, cache))
            start += n
        assert (torch.cat(parts, 1) - whole).abs().max() < 1e-10


@VARIANTS
@torch.no_grad()
def test_rows_of_a_batch_do_not_meet(name, folder):
    """Rows of unequal length, padded on the left in every chunk, give what each gives alone, in both kinds of cache."""
    model, lengths = load_model(folder, dtype=torch.float64), (70, 41, 9)
    for S in None, 80:
        cache, states, done = model.make_cache(3, S), [[], [], []], [0, 0, 0]
        for widths in (
            (50, 30, 5),
            (1, 1, 1),
            (19, 10, 3),
        ):  # ragged: the rows advance by different amounts
            T = max(widths)
            positions = torch.stack([torch.arange(T) - (T - w) for w in widths])
            positions = torch.where(
                positions < 0, positions, positions + torch.tensor(done)[:, None]
            )
            ids = IDS[0][positions.clamp(min=0)]
            h = model(model.embed(ids), positions, cache)
            assert h.isfinite().all()
            for b, w in enumerate(widths):
                states[b].append(h[b, T - w :])
                done[b] += w
        assert tuple(done) == lengths
        for b, n in enumerate(lengths):
            assert (torch.cat(states[b]) - outputs(model, IDS[:, :n])["h"][0]).abs().max() < 1e-10


@VARIANTS
def test_gradients_reach_the_embeddings(name, folder):
    """The growing cache keeps the graph: a state read after other tokens depends on all of them."""
    model = load_model(folder)
    x, cache = model.embed(IDS[:, :12]).requires_grad_(), model.make_cache(1)
    for start in 0, 6:
        h = model(x[:, start : start + 6], torch.arange(start, start + 6)[None], cache)
    h[:, -1].sum().backward()
    assert (x.grad[0].abs().amax(-1) > 0).all()


@pytest.mark.parametrize("window", (None, 3))
@pytest.mark.parametrize("T, asked", ((1, 1), (7, 1), (7, 2), (7, 7)))
def test_attention_is_its_formula(T, asked, window):
    """Every way that `attend` takes gives softmax(q k' / sqrt(d)) v, with two query heads to a key/value head."""
    S, H, K, d = 9, 4, 2, 8
    random = torch.Generator().manual_seed(0)
    q = torch.randn(2, H, T, d, generator=random, dtype=torch.float64)
    k = torch.randn(2, K, S, d, generator=random, dtype=torch.float64)
    v = torch.randn(2, K, S, d, generator=random, dtype=torch.float64)
    positions = torch.arange(S).expand(2, -1)
    mask = causal_mask(positions[:, -T:], positions, window)  # the queries are the last T tokens
    whole = attention_formula(q, k, v, mask, d**-0.5)
    y = attend(q, k, v, mask[:, :, -asked:], d**-0.5)
    assert y.shape == (2, asked, H * d)
    assert (y - whole[:, -asked:]).abs().max() < 1e-12


@pytest.mark.parametrize("T, S", ((7, 7), (1, 7)))
def test_attention_without_a_mask_is_the_causal_formula(T, S):
    random = torch.Generator().manual_seed(1)
    q = torch.randn(2, 4, T, 8, generator=random, dtype=torch.float64)
    k, v = torch.randn(2, 2, 2, S, 8, generator=random, dtype=torch.float64)
    positions = torch.arange(S).expand(2, -1)
    mask = causal_mask(positions[:, -T:], positions)
    truth = attention_formula(q, k, v, mask, 8**-0.5)
    assert (attend(q, k, v, None, 8**-0.5) - truth).abs().max() < 1e-12


def test_no_two_keys_of_a_chunk_share_an_index():
    """On a GPU it would be chance which of them stays."""
    cache = WindowCache(2, 1, 4, 8, torch.zeros(1))
    indices = cache.indices(torch.stack([torch.arange(3, 13), torch.arange(-2, 8)]))
    assert indices.tolist() == [[4] * 6 + [1, 2, 3, 0], [4] * 6 + [0, 1, 2, 3]]


@pytest.mark.slow
@pytest.mark.parametrize("agent", checkpoints.REAL_WIDTHS)
def test_live_at_the_released_widths(agent, tmp_path):
    pytest.importorskip("transformers")
    import reference

    model_type, config = checkpoints.REAL_WIDTHS[agent]
    folder = checkpoints.make_agent(tmp_path, model_type, **config)
    h, logits = reference.hidden_and_logits(folder, IDS)
    assert_close(outputs(load_model(folder)), {"h": h, "logits": logits[:, -16:]})
