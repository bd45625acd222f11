"""Quantised weights: what is kept of them, that every form computes with it, and that links learn through them."""

import copy
import pickle
import sys

import checkpoints
import pytest
import torch
import torch.nn.functional as F
from checkpoints import IDS
from safetensors.torch import load_file, save_file
from shared import ASKED, OPTIONS, assert_same
from torch import nn

import minimas
from minimas.commands import ask
from minimas.common import QUANTIZED, InputError
from minimas.evaluate import evaluate
from minimas.fast import onednn, quantized
from minimas.fast import prepare as prepare_module
from minimas.fast.linear import MergedLinear
from minimas.fast.prepare import prepare
from minimas.load import decoder_without_weights, load_model
from minimas.prompts import Question
from minimas.quantize import (
    GROUP,
    FrozenProduct,
    HeadEmbedding,
    Int4Linear,
    Int8Linear,
    QuantizedLinear,
    class_of,
    named_weights,
)
from minimas.runs import needs
from minimas.settings import Settings
from minimas.styles import Origin, style_named
from minimas.train import TrainSettings, train_outer
from minimas.train.examples import TrainExample
from minimas.train.losses import OuterLoss

EACH_KIND = pytest.mark.parametrize("kind", QUANTIZED)
# Sizes that 32 divides, so that every linear can be int4
WIDE = {"hidden_size": 64, "intermediate_size": 96}
FAMILIES = {
    "llama": {},
    "mistral": {},
    "qwen2": {},
    "qwen3": {"tie_word_embeddings": False},
    "gemma3": {},
    "qwen3_5_text": {"linear_value_head_dim": 16, "linear_num_value_heads": 4},
}
EACH_FAMILY = pytest.mark.parametrize("family", FAMILIES)


def weights(N, D, seed=0):
    """With rows of unequal scale, a few large numbers, and a row of zeros."""
    generator = torch.Generator().manual_seed(seed)
    w = torch.randn(N, D, generator=generator) * torch.logspace(-3, 1, N)[:, None]
    w[:, :: max(1, D // 3)] *= 8
    w[N // 2 :][1:2] = 0
    return w


@pytest.fixture(scope="module")
def agent_folder(tmp_path_factory):
    """family -> the folder of a miniature whose linears can all be quantised."""
    made = {}

    def folder(family):
        if family not in made:
            place = tmp_path_factory.mktemp(family)
            made[family] = checkpoints.make_agent(place, family, **WIDE, **FAMILIES[family])
        return made[family]

    return folder


def dequantized(model, dtype=torch.float32):
    """A copy with float linears that have exactly the quantised weights."""
    model = copy.deepcopy(model)
    for name, module in list(model.named_modules()):
        if isinstance(module, QuantizedLinear):
            linear = nn.Linear(module.in_features, module.out_features, bias=False)
            linear.weight = nn.Parameter(module.dequantized(dtype=dtype), requires_grad=False)
            linear.bias = module.bias
            model.set_submodule(name, linear)
    return model


def states_of(model):
    """Of a prompt of two unequal rows, two single tokens, and a chunk, through one cache."""
    cache = model.make_cache(2, 80)
    states = []
    for start, n in ((0, 40), (40, 1), (41, 1), (42, 20)):
        columns = torch.arange(start, start + n)
        positions = torch.stack([columns, columns - 7])
        h = model(model.embed(IDS[:, start : start + n]).expand(2, -1, -1), positions, cache)
        states.append(h[positions >= 0])
    return torch.cat(states)


def apart(x, truth):
    """Relative error."""
    return ((x - truth).norm() / truth.norm()).item()


# What is kept


def test_int8_is_rounded_to_the_nearest_step_of_its_row():
    w = weights(24, 96)
    linear = Int8Linear.from_float(w)
    step = w.abs().amax(1, keepdim=True) / 127
    assert ((linear.dequantized() - w).abs() <= step * 0.5001).all()
    assert (linear.dequantized()[13] == 0).all(), "a row of zeros stays one"
    assert torch.equal(linear.dequantized(5, 9), linear.dequantized()[5:9])


def test_int4_is_rounded_to_the_nearest_step_of_its_group():
    w = torch.randn(24, 96, generator=torch.Generator().manual_seed(0))
    w[3] = 0.3  # equal weights: a step of 0
    w[4] = 0
    groups = w.unflatten(1, (-1, GROUP))
    step = (groups.amax(-1, keepdim=True) - groups.amin(-1, keepdim=True)) / 15
    plain = groups / step.clamp_min(1e-9)
    plain = (plain - plain.amin(-1, keepdim=True)).round() * step + groups.amin(-1, keepdim=True)
    linear = Int4Linear.from_float(w)
    error = (linear.dequantized().unflatten(1, (-1, GROUP)) - groups).square().sum(-1)
    of_plain = (plain - groups).square().sum(-1)
    assert error.mean() < 0.99 * of_plain.mean(), "a smaller step is better for some groups"
    assert (error <= 1.05 * of_plain + 1e-6)[:3].all(), "and never worse, but for bfloat16"
    assert (linear.dequantized()[3] - 0.3).abs().max() < 1e-3
    assert (linear.dequantized()[4] == 0).all()
    assert torch.equal(linear.dequantized(5, 9), linear.dequantized()[5:9])


@EACH_KIND
def test_damaged_weights_stay_damaged(kind):
    w = torch.ones(3, 32)
    w[1, 4] = torch.nan
    w[2, 4] = torch.inf
    y = class_of(kind).from_float(w)(torch.ones(32))
    assert y.isfinite().tolist() == [True, False, False]


# The product


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
@EACH_KIND
def test_weights_in_a_narrow_dtype_are_rounded_once(kind, dtype):
    """A scale that is rounded first would move all weights that share it in one direction."""
    linear = class_of(kind).from_float(weights(24, 96))
    assert torch.equal(linear.dequantized(dtype=dtype), linear.dequantized().to(dtype))
    assert linear.dequantized(dtype=torch.float64).dtype == torch.float64


@EACH_KIND
@pytest.mark.parametrize("avx512", (True, False))
@pytest.mark.parametrize("N, D", ((1, 32), (24, 96), (80, 64), (300, 160)))
@torch.no_grad()
def test_plain_and_fast_products(kind, avx512, N, D, monkeypatch):
    """In one block and in several; int8 within float32's rounding, int4 within that of bfloat16 activations.

    Each CPU computes what one with the other instruction set would, too. The layout of int4 alone is its own.
    """
    monkeypatch.setattr(onednn, "AVX512", avx512)
    monkeypatch.setattr(quantized, "MOST_LANES", 128 if avx512 else 96)
    monkeypatch.setattr(quantized.FastInt8, "most_rows", 8 if avx512 else 16)
    w = weights(N, D)
    bias = nn.Parameter(torch.randn(N), requires_grad=False)
    linear = class_of(kind).from_float(w, bias)
    W = linear.dequantized(dtype=torch.float64)
    fast = quantized.fast_product([copy.deepcopy(linear)])
    for block in (1 << 19, 40 * D):
        monkeypatch.setattr("minimas.quantize.BLOCK", block)
        monkeypatch.setattr(quantized, "BLOCK", block)
        monkeypatch.setattr(quantized, "INDICES", block)
        for rows in (0, 1, 3, fast.most_rows, fast.most_rows + 1, 90):
            x = torch.randn(rows, D, generator=torch.Generator().manual_seed(rows))
            truth = x.double() @ W.T + bias
            size = x.double().abs() @ W.abs().T + truth.abs() + 1e-9  # of what is added up
            assert ((linear(x) - truth).abs() <= 1e-6 * size).all()
            few = 0 < rows <= fast.most_rows
            bound = 2**-8 if kind == "int4" and few else 2e-6
            assert ((fast(x) - truth).abs() <= bound * size).all()
            exact = fast(x.double())
            assert ((exact - truth).abs() <= 1e-13 * size).all(), "float64 takes no operator"
    linear.bias = fast.bias = None  # it would be of x's dtype
    x = torch.randn(2, 3, D).bfloat16()
    assert fast(x).dtype == linear(x).dtype == torch.bfloat16 and fast(x).shape == (2, 3, N)
    assert apart(fast(x).double(), linear(x.double())) < 0.02
    one = torch.eye(D).bfloat16()
    assert torch.equal(fast.float_product(one), linear.dequantized(dtype=torch.bfloat16).T)
    x = 50 * torch.randn(fast.most_rows + 1, D).half()
    assert apart(fast(x).double(), linear(x.double())) < 2e-3, "no sum overflows float16"


@EACH_KIND
def test_merged_products(kind):
    linears = [class_of(kind).from_float(weights(N, 96, seed=N)) for N in (40, 8, 100)]
    x = torch.randn(3, 96)
    truth = torch.cat([linear(x) for linear in linears], 1)
    fast = quantized.fast_product(linears)
    assert all(linear.weight is None for linear in linears), "no weight is in memory twice"
    assert apart(fast(x), truth) < (1e-6 if kind == "int8" else 0.01)
    for twin in (copy.deepcopy(fast), pickle.loads(pickle.dumps(fast))):
        assert torch.equal(twin(x), fast(x))


def test_packed_layouts_of_both_instruction_sets():
    """The one of AVX-512 keeps 64 outputs together, that of AVX2 32; here both are made by hand."""
    q = torch.randint(0, 16, (128, 32), dtype=torch.uint8)
    for lanes in (64, 32):
        halves = q.view(128 // lanes, 2, lanes // 2, 32)
        packed = (halves[:, 0] | halves[:, 1] << 4).mT.reshape(128, 16)
        into = torch.empty(32, 128, dtype=torch.uint8)
        assert torch.equal(quantized.packed_by_inputs(packed, lanes, into).T, q)


@EACH_KIND
def test_gradients_flow_through_the_activations(kind, monkeypatch):
    monkeypatch.setattr("minimas.quantize.BLOCK", 64)
    linear = class_of(kind).from_float(weights(11, 32), nn.Parameter(torch.randn(11), False))
    x = torch.randn(2, 3, 32, dtype=torch.double, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: FrozenProduct.apply(x, linear), x)
    upstream = torch.randn(2, 3, 11)
    x = x.detach().float().requires_grad_()
    (ours,) = torch.autograd.grad(linear(x), x, upstream)
    (theirs,) = torch.autograd.grad(F.linear(x, linear.dequantized(), linear.bias), x, upstream)
    assert (ours - theirs).abs().max() < 1e-5 * theirs.abs().max()


# Decoders


@EACH_KIND
@EACH_FAMILY
@torch.no_grad()
def test_every_family(agent_folder, family, kind):
    """Every linear is quantised, and the decoder is the one with float weights of the same numbers; so is the fast one,
    but for bfloat16 activations in int4: a rounding of 2^-9 at each of 20 products adds up to less than 0.02.
    """
    folder = agent_folder(family)
    plain = load_model(folder, quantize=kind)
    assert not any(isinstance(module, nn.Linear) for module in plain.modules())
    assert plain.norm.weight.dtype == plain.embed(IDS).dtype == torch.float32
    truth = states_of(dequantized(plain))
    assert apart(states_of(plain), truth) < 2e-6
    fast = prepare(load_model(folder, quantize=kind))
    assert apart(states_of(fast), truth) < (5e-6 if kind == "int8" else 0.02)
    assert apart(fast.logits(truth[:3]), plain.logits(truth[:3])) < (
        1e-6 if kind == "int8" else 0.01
    )
    loss = apart(truth, states_of(load_model(folder)))
    assert 1e-4 < loss < (0.2 if kind == "int8" else 1), "what quantisation costs"


@EACH_KIND
@EACH_FAMILY
@torch.no_grad()
def test_cached_is_uncached(agent_folder, family, kind):
    model = load_model(agent_folder(family), quantize=kind)
    positions = torch.arange(IDS.shape[1])[None]
    whole = model(model.embed(IDS), positions, model.make_cache(1))
    cache = model.make_cache(1, 80)
    for t in range(IDS.shape[1]):
        h = model(model.embed(IDS[:, t : t + 1]), positions[:, t : t + 1], cache)
        assert apart(h[0, 0], whole[0, t]) < 5e-5


@EACH_KIND
@torch.no_grad()
def test_copies(agent_folder, kind, tmp_path):
    """State dict, deepcopy and pickle, of both forms."""
    plain = load_model(agent_folder("qwen2"), quantize=kind)
    truth = states_of(plain)
    other = load_model(agent_folder("qwen2"), quantize=kind)
    for _, buffer in named_weights(other):
        if buffer.dtype in (torch.int8, torch.uint8):
            buffer.zero_()
    assert not torch.equal(states_of(other), truth)
    other.load_state_dict(plain.state_dict())
    assert torch.equal(states_of(other), truth)
    fast = prepare(other)
    for model in (plain, fast):
        for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert torch.equal(states_of(twin), states_of(model))


@EACH_KIND
@torch.no_grad()
def test_weights_of_the_fast_form_as_floats(agent_folder, kind):
    """Those of a linear alone; one that is merged says where they are."""
    plain = load_model(agent_folder("llama"), quantize=kind)
    fast = copy.deepcopy(prepare(load_model(agent_folder("llama"), quantize=kind)))
    for name in ("layers.0.self_attn.o_proj", "layers.1.mlp.down_proj", "lm_head"):
        ours, theirs = fast.get_submodule(name), plain.get_submodule(name)
        assert torch.equal(ours.dequantized(), theirs.dequantized())
        assert torch.equal(ours.dequantized(5, 40), theirs.dequantized(5, 40))
        some = torch.tensor([3, 0, 17])
        dtype = torch.bfloat16
        assert torch.equal(ours.weights_of(some, dtype), theirs.weights_of(some, dtype))
    with pytest.raises(InputError, match="packed with others.*fast=False"):
        fast.layers[0].self_attn.q_proj.dequantized()


@EACH_KIND
def test_hooks(agent_folder, kind):
    """They fire where modules are called, and are refused where they are merged."""
    plain = load_model(agent_folder("llama"), quantize=kind)
    fast = prepare(load_model(agent_folder("llama"), quantize=kind))
    seen = []
    for model in (plain, fast):
        model.layers[0].mlp.down_proj.register_forward_hook(lambda *_: seen.append("down"))
        with torch.no_grad():
            states_of(model)
    assert len(seen) == 8
    with pytest.raises(InputError, match="fast=False"):
        fast.layers[0].self_attn.q_proj.register_forward_hook(lambda *_: None)


# Loading


@EACH_KIND
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
@pytest.mark.parametrize("stored", (torch.float32, torch.bfloat16))
def test_tied_embeddings_are_read_out_of_the_head(tmp_path, kind, stored, dtype):
    """In the plain and in the fast form: what the quantised head holds, and no float embedding is in memory.

    The head is quantised from what is stored, not from what that is in the dtype of activations.
    """
    folder = checkpoints.make_agent(tmp_path, "llama", dtype=stored, **WIDE)
    embedding = load_model(folder, dtype=torch.float32).embed_tokens.weight
    expected = class_of(kind).from_float(embedding.detach()).dequantized(dtype=dtype)
    plain, fast = (load_model(folder, dtype=dtype, quantize=kind) for _ in range(2))
    ids = torch.tensor([[0, 5, len(embedding) - 1], [130, 64, 63]])
    for form in (plain, prepare(fast)):
        assert torch.equal(form.embed(ids), expected[ids])
        assert not any(name.startswith("embed_tokens") for name, _ in form.named_parameters())
        assert form.embed(ids[:0]).shape == (0, 3, embedding.shape[1])
        assert torch.equal(copy.deepcopy(form).embed(ids), expected[ids])


@EACH_KIND
def test_embeddings_that_are_not_tied_stay(tmp_path, kind):
    folder = checkpoints.make_agent(tmp_path, "llama", tie_word_embeddings=False, **WIDE)
    whole = load_model(folder).embed_tokens.weight
    assert torch.equal(load_model(folder, quantize=kind).embed_tokens.weight, whole)


@EACH_KIND
@pytest.mark.parametrize("head", ("same", "same in float64", "another"))
def test_a_head_that_is_stored_though_it_is_tied(tmp_path, kind, head):
    """If it differs from the embeddings, they stay as floats, in the dtype that is asked for."""
    folder = checkpoints.make_agent(tmp_path, "llama", **WIDE)
    file = folder / "model.safetensors"
    stored = load_file(file)
    embeddings = stored["model.embed_tokens.weight"]
    made = {"same": embeddings, "same in float64": embeddings.double(), "another": 2 * embeddings}
    stored["lm_head.weight"] = made[head].clone()
    save_file(stored, file)
    model = load_model(folder, dtype=torch.bfloat16, quantize=kind)
    expected = class_of(kind).from_float(stored["lm_head.weight"])
    assert torch.equal(model.lm_head.dequantized(), expected.dequantized())
    if head == "another":
        assert torch.equal(model.embed_tokens.weight, embeddings.bfloat16())
    else:
        assert isinstance(model.embed_tokens, HeadEmbedding)


@torch.no_grad()
def test_a_tied_head_that_stays_float(tmp_path):
    """It has the dtype that is asked for, and is the embeddings as before."""
    folder = checkpoints.make_agent(tmp_path, "llama", hidden_size=48)
    model = load_model(folder, dtype=torch.bfloat16, quantize="int4")
    assert model.lm_head.weight is model.embed_tokens.weight
    assert model.lm_head.weight.dtype == torch.bfloat16


def test_widths_that_groups_do_not_divide_stay_float(tmp_path, capsys):
    folder = checkpoints.make_agent(tmp_path, "llama", hidden_size=48)
    model = prepare(load_model(folder, quantize="int4"))
    assert isinstance(model.layers[0].mlp.up_proj, nn.Linear)
    said = capsys.readouterr().err
    assert "stay as they are, since int4 takes inputs in groups of 32" in said
    assert "layers.0.self_attn.q_proj with 48 inputs" in said
    assert not any(isinstance(m, nn.Linear) for m in load_model(folder, quantize="int8").modules())


@EACH_KIND
@torch.no_grad()
def test_without_the_operator_products_are_plain(agent_folder, kind, monkeypatch, capsys):
    folder = agent_folder("qwen3")
    for module in (quantized, prepare_module, sys.modules["minimas.fast.linear"]):
        monkeypatch.setattr(module, "has_operator", lambda linear: False)
    fast = prepare(load_model(folder, quantize=kind))
    assert f"no operator for {kind} weights" in capsys.readouterr().err
    replaced = [value for module in fast.modules() for value in vars(module).values()]
    assert not any(isinstance(one, quantized.FastProduct | MergedLinear) for one in replaced)
    assert apart(states_of(fast), states_of(load_model(folder, quantize=kind))) < 1e-6


# Systems


@EACH_KIND
def test_a_system(folders, kind):
    """Both forms and an offloaded one answer alike, and say what their weights are."""
    load = lambda **options: minimas.load_mas_system(
        "sequential_light", checkpoints=folders("sequential_light"), quantize=kind, **options
    )
    plain = load()
    assert f"float32, weights in {kind} on cpu" in repr(plain)
    assert plain.origin.quantize == kind
    answers = plain.run(ASKED, **OPTIONS, temperature=0.0)
    assert_same(load(offload=True).run(ASKED, **OPTIONS, temperature=0.0), answers)
    if kind == "int8":
        assert_same(load(fast=True).run(ASKED, **OPTIONS, temperature=0.0), answers)


@pytest.mark.parametrize("bad", ("int3", "8", torch.int8))
def test_an_unknown_kind(bad):
    with pytest.raises(InputError, match="quantize .* is not known, expected one of int8, int4"):
        minimas.load_mas_system("tiny", quantize=bad)


def test_the_option(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["recurse", "--quantize", "int3"])
    with pytest.raises(InputError, match="'int3'.*int8.*int4"):
        ask.arguments()
    monkeypatch.setattr(sys, "argv", ["recurse", "--quantize", "int4"])
    assert ask.origin_of(ask.arguments()).quantize == "int4"


@EACH_KIND
def test_needs_counts_quantised_weights(folders, kind):
    style = style_named("sequential_light")
    sources = folders("sequential_light")
    points = [Settings().completed(style)]
    needed = needs.needs_of(Origin(style, sources, "cpu", quantize=kind), style, points)
    system = minimas.load_mas_system("sequential_light", checkpoints=sources, quantize=kind)
    for role, agent in system.agents.items():
        held = {id(weight): weight.nbytes for _, weight in named_weights(agent.model)}
        assert needed[role].weights == sum(held.values())
    in_tables = needs.needs_of(
        Origin(style, sources, "cpu", fast=True, quantize=kind), style, points
    )
    for role, need in in_tables.items():
        assert (need.weights > needed[role].weights) == (kind == "int8")


def bytes_held(model):
    """What a decoder holds, each memory once, its FastProducts included."""
    tensors = [weight for _, weight in named_weights(model)]
    for module in model.modules():
        for value in vars(module).values():
            product = value.packed if isinstance(value, MergedLinear) else value
            if isinstance(product, quantized.FastProduct):
                own = vars(product).values()
                tensors += [part for part in own if isinstance(part, torch.Tensor)]
    storages = [tensor.untyped_storage() for tensor in tensors]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


@pytest.mark.parametrize("family", ("llama", "qwen2", "gemma3"))
def test_needs_counts_the_tables_of_int8(agent_folder, family, monkeypatch):
    """To the byte where no linears are merged. Merged ones share a table, and so have fewer spare outputs."""
    folder = agent_folder(family)
    empty, _ = decoder_without_weights(folder)
    counted = needs.decoder_bytes(empty, "int8", in_tables=True)
    merged = bytes_held(prepare(load_model(folder, quantize="int8")))
    assert 0.85 * counted < merged <= counted
    monkeypatch.setattr(prepare_module, "MERGED", {})
    assert bytes_held(prepare(load_model(folder, quantize="int8"))) == counted


@pytest.mark.parametrize("most, tables, lanes", ((128, 76, 128), (96, 102, 96)))
def test_tables_take_an_eighth_more_at_most(most, tables, lanes, monkeypatch):
    """For 8 bytes after each row, and for outputs that are not there; with AVX-512, and with AVX2 alone."""
    monkeypatch.setattr(quantized, "MOST_LANES", most)
    for N in (896, 1152, 9728, 151936, 576, 960, 3072, 49152, 1000, 32003):
        assert quantized.table_bytes(N, 7) <= 1.125 * N * 7
    assert quantized.table_bytes(9728, 896) == tables * 896 * (lanes + 8)


def test_records_are_not_continued_with_other_weights(tmp_path):
    answer = dict(limit=2, rounds=1, out=tmp_path / "records.jsonl", progress=False)
    evaluate(Origin("tiny", device="cpu", fast=True, quantize="int8"), "tiny", **answer)
    with pytest.raises(InputError, match="quantize: int8 there, None now"):
        evaluate(Origin("tiny", device="cpu", fast=True), "tiny", **answer)


# Training


def load_plain(folders, kind=None):
    sources = folders("sequential_light")
    return minimas.load_mas_system("sequential_light", checkpoints=sources, quantize=kind)


def examples(style):
    texts = {role: (f"It is {i}.",) for i, role in enumerate(style.order)}
    return [TrainExample(Question("1 + 1?"), texts), TrainExample(Question("2 * 3?"), texts)]


@EACH_KIND
def test_links_learn_through_quantised_agents(folders, kind):
    """In float64: gradients are those of finite differences, and of float agents with the same weights."""
    gradients = []
    system = load_plain(folders, kind)
    float_system = copy.deepcopy(system)
    for agent in float_system.agents.values():
        agent.model = dequantized(agent.model, torch.float64)
    for one in (system, float_system):
        for module in [*one.outer_links.values(), *(a.inner_link for a in one.agents.values())]:
            module.double()
        for agent in one.agents.values():
            agent.model.double()
        settings = Settings(rounds=2, latent_steps=2).completed(one.style)
        loss = OuterLoss(one, settings)
        loss(examples(one.style)).backward()
        gradients.append([link.proj2.weight.grad for link in loss.links])
        if one is not system:
            continue
        weight = loss.links[0].proj2.weight
        direction = torch.randn_like(weight)
        around = []
        for sign in (1, -1):
            with torch.no_grad():
                weight += sign * 1e-5 * direction
                around.append(loss(examples(one.style)).item())
                weight -= sign * 1e-5 * direction
        expected = (weight.grad * direction).sum().item()
        assert (around[0] - around[1]) / 2e-5 == pytest.approx(expected, rel=1e-4)
    for ours, theirs in zip(*gradients, strict=True):
        assert apart(ours, theirs) < 1e-9


def test_a_training_is_not_resumed_with_other_weights(folders, tmp_path):
    system = load_plain(folders, "int8")
    settings = TrainSettings(steps=1, rounds=1, latent_steps=1, init="random")
    rows = examples(system.style)
    train_outer(system, rows, settings, out=tmp_path / "links", progress=False)
    with pytest.raises(InputError, match="quantize: .*int8.* there, .*None.* now"):
        train_outer(
            load_plain(folders), rows, settings, out=tmp_path / "links", resume=True, progress=False
        )
