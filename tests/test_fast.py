"""The fast path is the plain path:
packed and merged linears, replayed steps, rows that leave the batch, fused links.
"""

import copy
import pickle
from contextlib import nullcontext

import checkpoints
import pytest
import torch
import torch.nn.functional as F
from checkpoints import IDS
from fake_cuda import FakeCUDA
from shared import ASKED, CUDA, LINKS, OPTIONS, SCRIPTS, assert_same, load, scripted, states

import minimas
from minimas import InputError, gemma, llama
from minimas.agent import load_agent
from minimas.fast import graphs as graphs_module
from minimas.fast import onednn
from minimas.fast.blocks import CpuBlock
from minimas.fast.graphs import Graphs, parts
from minimas.fast.linear import MergedLinear, PackedLinear
from minimas.fast.norms import CpuNorm
from minimas.fast.prepare import prepare
from minimas.generate import REPLY_ROOM
from minimas.link import InnerLink, OuterLink, fused
from minimas.load import load_model
from minimas.styles import STYLES


@pytest.mark.parametrize("name", checkpoints.VARIANTS)
@torch.no_grad()
def test_every_decoder(name, tmp_path):
    """Prompt, chunk and single tokens, unequal rows:
    within 1e-4 of the plain decoder, whose weights are gone from the fast one.
    """
    model_type, config = checkpoints.VARIANTS[name]
    folder = checkpoints.make_agent(tmp_path, model_type, **config)
    plain, quick = load_model(folder), prepare(load_model(folder))
    assert any(isinstance(module.forward, PackedLinear) for module in quick.modules()), (
        "nothing was packed"
    )
    kept = {name for name, p in quick.named_parameters() if p is not None and p.ndim == 2}
    assert (
        kept <= {"embed_tokens.weight", "lm_head.weight"}
        and ("lm_head.weight" in kept) <= plain.config.tie_word_embeddings
    )
    caches = [model.make_cache(2, 80) for model in (plain, quick)]
    for start, n in (0, 40), (40, 1), (41, 1), (42, 20):
        positions = torch.stack(
            [torch.arange(start, start + n), torch.arange(start, start + n) - 7]
        )
        x = plain.embed(IDS[:, start : start + n]).expand(2, -1, -1)
        a, b = (model(x, positions, cache) for model, cache in zip((plain, quick), caches))
        real = positions >= 0
        assert (a - b)[real].abs().max() < 1e-4
        assert (plain.logits(a) - quick.logits(b))[real].abs().max() < 1e-4


@pytest.mark.parametrize("name", checkpoints.VARIANTS)
@torch.no_grad()
def test_steps_on_a_cpu(name, tmp_path, monkeypatch):
    """One token per row goes through CpuBlock, and equals the plain path of the same block; a hook takes that path."""
    model_type, config = checkpoints.VARIANTS[name]
    model = prepare(load_model(checkpoints.make_agent(tmp_path, model_type, **config)))
    taken = []
    step = CpuBlock.step

    def spied(block, *args):
        taken.append(block)
        return step(block, *args)

    monkeypatch.setattr(CpuBlock, "step", spied)
    blocks = [layer.forward for layer in model.layers]
    expected = 0 if model_type in checkpoints.PLAIN_STEPS["cpu"] else len(blocks)
    assert sum(isinstance(block, CpuBlock) for block in blocks) == expected

    def run(B):
        cache = model.make_cache(B, 60)
        late = torch.arange(B)[:, None] * 7
        states = []
        for start, n in (0, 40), (40, 1), (41, 1), (42, 3), (45, 1):
            positions = torch.arange(start, start + n) - late
            x = model.embed(IDS[:, start : start + n]).expand(B, -1, -1)
            states.append(model(x, positions, cache)[positions >= 0])
        return torch.cat(states)

    for B in 1, 3:
        taken.clear()
        fast = run(B)
        assert len(taken) == 3 * expected
        fired = []
        hooks = [
            layer.mlp.register_forward_hook(lambda *_: fired.append(1)) for layer in model.layers
        ]
        plain = run(B)
        assert len(taken) == 3 * expected and len(fired) == 5 * len(blocks)
        assert (fast - plain).abs().max() < 1e-5 * plain.abs().max()
        for hook in hooks:
            hook.remove()


@torch.no_grad()
def test_hooks_on_every_module(tmp_path):
    """torch calls those that are registered for all modules. In the fast form they see what is not merged."""
    model = prepare(load_model(checkpoints.make_agent(tmp_path, "llama")))
    fired = []
    hook = torch.nn.modules.module.register_module_forward_hook(
        lambda module, *_: fired.append(type(module))
    )
    try:
        model(model.embed(IDS[:, :1]), torch.zeros(1, 1, dtype=torch.long), model.make_cache(1, 1))
    finally:
        hook.remove()
    assert fired.count(llama.Attention) == fired.count(llama.MLP) == len(model.layers)


@pytest.mark.parametrize("name", ["self_attn.o_proj", "self_attn.q_proj", "input_layernorm", "mlp"])
@pytest.mark.parametrize("n", [1, 2])
@torch.no_grad()
def test_a_module_that_is_replaced(name, n, tmp_path):
    """The fast form would go on with the old one in some steps."""
    model = prepare(load_model(checkpoints.make_agent(tmp_path, "llama")))
    positions = torch.arange(n)[None]
    x = model.embed(IDS[:, :n])
    model(x, positions, model.make_cache(1, n))
    old = model.layers[1].get_submodule(name)
    model.layers[1].set_submodule(name, torch.nn.Identity())
    with pytest.raises(InputError, match="the module .* was replaced.*fast=False"):
        model(x, positions, model.make_cache(1, n))
    model.layers[1].set_submodule(name, old)
    again = copy.deepcopy(model)
    again(x, positions, again.make_cache(1, n))


@torch.no_grad()
def test_a_merged_module_that_is_replaced_in_a_plain_block(tmp_path):
    """Those of Qwen3.5 have no form of their own on a CPU, and yet their linears are merged."""
    model = prepare(load_model(checkpoints.make_agent(tmp_path, "qwen3_5_text")))
    model.layers[0].mlp.gate_proj = torch.nn.Identity()
    with pytest.raises(InputError, match="the module gate_proj was replaced.*fast=False"):
        model(model.embed(IDS[:, :2]), torch.arange(2)[None], model.make_cache(1, 2))


def test_an_offloaded_agent_is_not_fast():
    source = STYLES["tiny"].checkpoints["planner"]
    with pytest.raises(InputError, match="leave out offload or fast"):
        load_agent(source, "math", "cpu", torch.float32, offload=True, fast=True)


def test_hooks_that_would_never_fire(tmp_path):
    """They are refused before anything is changed."""
    model = load_model(checkpoints.make_agent(tmp_path, "llama"))
    hook = model.layers[-1].self_attn.k_proj.register_forward_hook(lambda *_: None)
    with pytest.raises(InputError, match="a hook would not fire: load the system with fast=False"):
        prepare(model)
    hook.remove()
    model.layers[0].self_attn.q_proj.register_forward_hook(lambda *_: None).remove()
    prepare(model)
    with pytest.raises(InputError, match="a hook would not fire"):
        model.layers[0].self_attn.q_proj.register_forward_hook(lambda *_: None)


def test_a_decoder_that_is_fast_already(tmp_path):
    model = prepare(load_model(checkpoints.make_agent(tmp_path, "llama")))
    with pytest.raises(InputError, match="in its fast form already.*fast=False"):
        prepare(model)


# Weights that are changed


UNPACKED = (pytest.param(True, id="packed"), pytest.param(False, id="unpacked"))  # as on CUDA


def two_decoders(tmp_path, monkeypatch, packed, model_type="qwen2", **options):
    """(the plain form, the fast form) of a decoder; where nothing is packed merged weights are views, as on CUDA."""
    if not packed:
        monkeypatch.setattr(onednn, "can_multiply", lambda weight: False)
    folder = checkpoints.make_agent(tmp_path, model_type)
    plain, quick = (load_model(folder, **options) for _ in range(2))
    return plain, prepare(quick)


def end_states(model):
    """Of a prompt and two steps after it."""
    cache = model.make_cache(1, 60)
    positions = torch.arange(42)[None]
    x = model.embed(IDS[:, :42])
    spans = ((0, 40), (40, 41), (41, 42))
    return torch.cat([model(x[:, a:b], positions[:, a:b], cache, last=1) for a, b in spans])


def assert_close(x, truth):
    assert (x - truth).abs().max() < 1e-4 * truth.abs().max()


COPIES = {
    "itself": lambda model: model,
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
}


@pytest.mark.parametrize("packed", UNPACKED)
@pytest.mark.parametrize("quantize", (None, "int8"))
@pytest.mark.parametrize("made", COPIES)
@torch.no_grad()
def test_biases_that_are_changed_in_place(tmp_path, monkeypatch, packed, quantize, made):
    """Those of merged linears and of others, in a copy too; the original is not changed then."""
    plain, quick = two_decoders(tmp_path, monkeypatch, packed, quantize=quantize)
    before = end_states(plain)
    changed = COPIES[made](quick)
    for model in (plain, changed):
        for name in ("q_proj", "k_proj", "v_proj"):
            bias = model.layers[1].self_attn.get_submodule(name).bias
            bias += torch.linspace(-1, 1, len(bias))
    truth = end_states(plain)
    assert (truth - before).abs().max() > 0.01
    assert_close(end_states(changed), truth)
    if made != "itself":
        assert_close(end_states(quick), before)


@pytest.mark.parametrize("packed", UNPACKED)
@pytest.mark.parametrize("quantize", (None, "int8"))
@torch.no_grad()
def test_a_bias_of_a_linear_alone(tmp_path, monkeypatch, packed, quantize):
    """It is the product's own, in a copy too."""
    if not packed:
        monkeypatch.setattr(onednn, "can_multiply", lambda weight: False)
    folder = checkpoints.make_agent(tmp_path, "llama")
    model = load_model(folder, quantize=quantize)
    linear = model.layers[0].mlp.down_proj
    linear.bias = torch.nn.Parameter(torch.zeros(48), requires_grad=False)
    for form in (prepare(model), copy.deepcopy(model)):
        linear = form.layers[0].mlp.down_proj
        before = linear(torch.zeros(1, linear.in_features))
        linear.bias += 3
        assert torch.equal(linear(torch.zeros(1, linear.in_features)), before + 3)


@pytest.mark.parametrize("made", COPIES)
@torch.no_grad()
def test_merged_weights_that_are_changed_in_place(tmp_path, monkeypatch, made):
    """Where they are not packed. A copy holds them once as well, and the original is not changed with it."""
    plain, quick = two_decoders(tmp_path, monkeypatch, packed=False)
    before = end_states(plain)
    changed = COPIES[made](quick)
    for model in (plain, changed):
        model.layers[0].self_attn.q_proj.weight *= 3
        model.layers[1].mlp.up_proj.weight *= -1
    truth = end_states(plain)
    assert (truth - before).abs().max() > 0.01
    assert_close(end_states(changed), truth)
    if made != "itself":
        assert_close(end_states(quick), before)
    for layer in changed.layers:
        for merged in (layer.self_attn.qkv, layer.mlp.gate_up):
            whole = merged.packed.weight.untyped_storage().data_ptr()
            held = {linear.weight.untyped_storage().data_ptr() for linear in merged.linears}
            assert held == {whole}


@pytest.mark.parametrize("packed", UNPACKED)
@pytest.mark.parametrize("quantize", (None, "int8"))
def test_weights_that_are_replaced(tmp_path, monkeypatch, packed, quantize):
    """The product would go on with the old ones; so it would without a tensor, or with a bias where it has none."""
    _, quick = two_decoders(tmp_path, monkeypatch, packed, quantize=quantize)
    products = ["self_attn.q_proj", "mlp.up_proj"]
    if packed or quantize:
        products += ["self_attn.o_proj", "mlp.down_proj"]  # else torch computes with what they have
    for copied in COPIES.values():
        layer = copied(quick).layers[0]
        for name in products:
            linear = layer.get_submodule(name)
            for leaf in ("weight", "bias"):
                setattr(linear, leaf, getattr(linear, leaf))  # the same one
                with pytest.raises(InputError, match=f"the {leaf} .* cannot be replaced"):
                    setattr(linear, leaf, torch.nn.Parameter(torch.zeros(3), requires_grad=False))
                if getattr(linear, leaf) is not None:
                    with pytest.raises(InputError, match=f"the {leaf} .* cannot be replaced"):
                        delattr(linear, leaf)


@pytest.mark.parametrize("packed", UNPACKED)
@pytest.mark.parametrize("quantize", (None, "int8", "int4"))
@torch.no_grad()
def test_a_decoder_that_is_moved(tmp_path, monkeypatch, packed, quantize):
    """Its products would go on with the weights of before. To where it is, it may be moved."""
    _, quick = two_decoders(tmp_path, monkeypatch, packed, quantize=quantize)
    truth = end_states(quick)
    for copied in COPIES.values():
        model = copied(quick)
        for module in model, model.layers, model.layers[0], model.layers[0].input_layernorm:
            for change in (module.half, module.double, lambda: module.to("meta")):
                with pytest.raises(InputError, match="keeps its device and its dtype"):
                    change()
            assert module.to("cpu", torch.float32) is module
        assert torch.equal(end_states(model), truth)


@torch.no_grad()
def test_a_state_dict_is_taken_as_a_whole_or_not_at_all(tmp_path, monkeypatch):
    """A decoder whose weights are packed refuses it; one whose weights are merged only takes all of it."""
    other = load_model(checkpoints.make_agent(tmp_path / "other", "qwen2", seed=1))
    for packed in (True, False):
        with monkeypatch.context() as patch:
            plain, quick = two_decoders(tmp_path / str(packed), patch, packed)
        weights = other.state_dict()
        assert (end_states(plain) - end_states(other)).abs().max() > 0.01
        if packed:
            with pytest.raises(InputError, match="load_state_dict would leave them.*fast=False"):
                quick.load_state_dict(weights)
            continue
        quick.load_state_dict(weights)
        assert_close(end_states(quick), end_states(other))
        with pytest.raises(RuntimeError, match="cannot be replaced.*fast=False"):
            quick.load_state_dict(plain.state_dict(), assign=True)


class ClippedAttention(llama.Attention):
    """A family may do more than Llama in a method that is nothing but linears there."""

    def qkv(self, x):
        return [y.clamp(-0.1, 0.1) for y in super().qkv(x)]


@torch.no_grad()
def test_a_subclass_is_not_merged(tmp_path):
    plain, quick = (load_model(checkpoints.make_agent(tmp_path, "llama")) for _ in range(2))
    for model in plain, quick:
        for block in model.layers:
            block.self_attn.__class__ = ClippedAttention
    prepare(quick)
    positions = torch.arange(IDS.shape[1])[None]
    a, b = (model(model.embed(IDS), positions, model.make_cache(1)) for model in (plain, quick))
    assert (a - b).abs().max() < 1e-4


@pytest.mark.parametrize("name", checkpoints.VARIANTS)
@torch.no_grad()
def test_the_last_states_only(name, tmp_path):
    """Asked for the last states alone, a decoder computes fewer and gives the same;
    its cache goes on as if it had given all.
    """
    model_type, config = checkpoints.VARIANTS[name]
    model = load_model(checkpoints.make_agent(tmp_path, model_type, **config), dtype=torch.float64)
    for padding in 0, 5:
        caches = [model.make_cache(2, 40) for _ in range(2)]
        for start, n in (0, 30), (30, 3), (33, 1):
            positions = torch.stack(
                [torch.arange(start, start + n), torch.arange(start, start + n) - padding]
            )
            x = model.embed(IDS[:, start : start + n]).expand(2, -1, -1)
            whole, end = model(x, positions, caches[0]), model(x, positions, caches[1], last=1)
            assert end.shape == (2, 1, 48) and (whole[:, -1:] - end).abs().max() < 1e-12


ONE_GREEDY = pytest.mark.parametrize(
    "style, temperature",
    [(style, 0.0 if style == "distillation" else 1.5) for style in checkpoints.SYSTEMS],
)


@pytest.mark.parametrize(
    "dtype, bound", ((torch.float64, 1e-14), (torch.float32, 1e-6), (torch.bfloat16, 2**-7))
)
@pytest.mark.parametrize("kind", (llama.RMSNorm, gemma.OffsetRMSNorm))
@torch.no_grad()
def test_norms_on_a_cpu(kind, dtype, bound):
    """As the plain one, of large and small numbers and zeros too, and with a weight that was changed since."""
    norm = kind(64, 1e-5).to(dtype)
    norm.weight += states(64, dtype=dtype)
    fast = CpuNorm(norm)
    x = states(3, 4, 64, dtype=dtype)
    x[0] *= 1e12
    x[1, 0] = 0
    x[2] *= 1e-4  # eps counts
    for _ in range(2):
        y, plain = fast(x), norm(x)
        assert y.dtype == dtype and ((y - plain).abs() <= bound * plain.abs()).all()
        norm.weight += 1


@ONE_GREEDY
def test_every_style(folders, style, temperature):
    options = OPTIONS | {"temperature": temperature, "top_p": 1.0, "top_k": 0}
    assert_same(
        load(folders, style).run(ASKED[1:4], **options),
        load(folders, style, fast=False).run(ASKED[1:4], **options),
    )


def replayed(system):
    """The system with its steps driven as CUDA graphs are, and a look at what is written every third token."""
    for agent in system.agents.values():
        agent.steps = Graphs(agent.model)
        agent.steps.sync_every = 3
    return system


@pytest.mark.parametrize(
    "style, temperature",
    [
        ("sequential_light", 1.5),
        pytest.param("sequential_scaled", 1.5, marks=pytest.mark.slow),
        pytest.param("mixture", 0.0, marks=pytest.mark.slow),
        pytest.param("distillation", 0.0, marks=pytest.mark.slow),  # no other decoders
        pytest.param("deliberation", 1.5, marks=pytest.mark.slow),
    ],
)
def test_on_a_fake_cuda_device(folders, captures, gpu, style, temperature):
    """Steps as graphs over static caches and buffers, across batches and questions: the same latents and texts,
    no tensor on the wrong device, and in a step nothing passes between host and device.
    """
    plain = load(folders, style, fast=False)
    with gpu:
        quick = load(folders, style, device="cuda:0", dtype="float32")
        assert {agent.device.type for agent in quick.agents.values()} == {"cuda"}
    assert not torch.backends.cuda.cudnn_sdp_enabled()
    options = OPTIONS | {"temperature": temperature, "top_p": 1.0, "top_k": 0}
    for agent in quick.agents.values():
        agent.steps.sync_every = 3
    gpu.passed.clear()
    for asked, batch_size in (ASKED[:4], 3), (ASKED[::-1][:2], 2):
        with gpu:
            results = quick.run(asked, batch_size=batch_size, **options)
        assert_same(results, plain.run(asked, batch_size=batch_size, **options))
    assert captures and not any(in_step for _, _, in_step in gpu.passed)
    assert {where for what, where, _ in gpu.passed if what == "read"} <= {
        "append_tokens",
        "check_finite",
        "plain_causal",
    }


def test_one_latent_has_no_step_after_it(folders, gpu):
    """Its graph is never asked for, not even to be captured: the step that a capture begins with would be a second."""
    options = OPTIONS | {"latent_steps": 1, "max_new_tokens": 1, "temperature": 0.0}
    plain = load(folders, "sequential_light", fast=False).run(ASKED[:1], **options)
    with gpu:
        quick = load(folders, "sequential_light", device="cuda:0", dtype="float32")
        assert_same(quick.run(ASKED[:1], **options), plain)


def test_agents_on_two_devices(folders, gpu):
    """What an agent sends is moved to where the other one is."""
    options = OPTIONS | {"temperature": 1.5, "retry": True}
    with gpu:
        spread = load(
            folders,
            "sequential_light",
            device="planner=cuda:0,critic=cpu,solver=cuda:0",
            dtype="float32",
        )
        results = spread.run(ASKED, **options)
    assert_same(results, load(folders, "sequential_light", fast=False).run(ASKED, **options))


def test_a_fake_cuda_device_is_strict():
    with FakeCUDA() as gpu:
        x = torch.ones(3, 2, device="cuda:0")
        with pytest.raises(RuntimeError, match="of the host and of the device"):
            x + torch.ones(2)
        with pytest.raises(RuntimeError, match="of the host and of the device"):
            F.linear(torch.ones(4, 2), x)
        with pytest.raises(RuntimeError, match="of the host and of the device"):
            torch.ones(4)[x[:, 0].long()]
        assert x.device == (2 * x[:, :1]).device == x.new_zeros(2).device != x.cpu().device
        gpu.passed.clear()
        bool(x.sum() > 5), x[x > 0], x.tolist(), x.to("cpu"), torch.ones(3, 2).copy_(x)
        (
            torch.ones(2).to(x),
            torch.tensor([1], device=x.device),
            x.copy_(torch.ones(3, 2)),
            x[torch.tensor([0])],
        )
    assert [what for what, _, _ in gpu.passed] == [*["read"] * 5, *["written"] * 4]


def test_graphs_and_caches_are_used_again(folders, captures):
    system = replayed(load(folders, "sequential_light"))
    for _ in range(2):  # in the first run the longer prompts of round 2 make the caches grow
        system.run(ASKED, temperature=0.0, **OPTIONS)
    addresses = lambda: [
        c.k.data_ptr() for agent in system.agents.values() for c in agent.steps.base
    ]
    before, made = addresses(), len(captures)
    system.run(ASKED[::-1], temperature=0.0, **OPTIONS)
    assert addresses() == before and len(captures) == made


def test_other_layers_take_other_graphs(folders, captures):
    system = replayed(load(folders, "sequential_light"))
    system.run(ASKED, temperature=0.0, **OPTIONS)
    agent = system.agents["planner"]
    layers = list(agent.model.layers)
    old = agent.steps.base
    del agent.model.layers[1]
    system.run(ASKED, temperature=0.0, **OPTIONS)
    assert agent.steps.base is not old and len(agent.steps.base) == len(layers) - 1


def test_hooks_fire_in_steps_that_were_captured(folders, captures):
    """A hook that is set after the capture is called at each step; without it, steps are replayed again."""
    system = replayed(load(folders, "sequential_light"))
    planner = system.agents["planner"]
    options = {**OPTIONS, "rounds": 1, "latent_steps": 4, "temperature": 0.0}
    (before,) = system.run([ASKED[0]], **options)
    captured = len(captures)
    assert captured
    calls = []

    def note(module, *_):
        calls.append(module)

    for module in (planner.model, planner.inner_link):
        with module.register_forward_hook(note):
            system.run([ASKED[0]], **options)
    model_calls = [module for module in calls if module is planner.model]
    link_calls = [module for module in calls if module is planner.inner_link]
    assert len(model_calls) == 4  # the prompt and three steps
    assert len(link_calls) == 5  # after each of these, and before the outer link
    (after,) = system.run([ASKED[0]], **options)
    assert after.token_ids == before.token_ids
    assert len(captures) == captured


def test_another_inner_link_is_captured_anew(folders, captures):
    """Steps that were captured with one link are not replayed with another one."""
    system = replayed(load(folders, "sequential_light"))
    plain = load(folders, "sequential_light", fast=False)
    options = {**OPTIONS, "rounds": 1, "latent_steps": 4, "temperature": 0.0}
    system.run([ASKED[0]], **options)
    for changed in (system, plain):
        torch.manual_seed(0)
        agent = changed.agents["planner"]
        agent.inner_link = InnerLink(agent.model.config.hidden_size)
    assert_same(system.run([ASKED[0]], **options), plain.run([ASKED[0]], **options))


@pytest.mark.parametrize("change", ("in place", "replaced", "another model"))
def test_weights_that_are_changed_after_the_capture(folders, captures, change):
    """A graph reads weights in the memory that they had: it is captured anew if they are elsewhere now."""
    system, plain = (load(folders, "sequential_light", fast=False) for _ in range(2))
    replayed(system)
    options = {**OPTIONS, "rounds": 1, "latent_steps": 4, "temperature": 0.0}
    (before,) = system.run([ASKED[0]], **options)
    captured = len(captures)
    system.run([ASKED[0]], **options)
    assert len(captures) == captured
    for changed in (system, plain):
        agent = changed.agents["planner"]
        if change == "another model":
            agent.model = copy.deepcopy(agent.model)
        weight = agent.model.layers[0].mlp.down_proj.weight
        if change == "in place":
            weight *= 3
        else:
            weight = torch.nn.Parameter(-2 * weight, requires_grad=False)
            agent.model.layers[0].mlp.down_proj.weight = weight
    (after,) = system.run([ASKED[0]], **options)
    assert_same([after], plain.run([ASKED[0]], **options))
    assert len(captures) == captured + (change != "in place")
    assert any(
        (after.latents[key] - before.latents[key]).abs().max() > 1e-3 for key in before.latents
    )


def test_a_part_of_a_link_that_is_replaced_after_the_capture(folders, captures):
    system, plain = (load(folders, "sequential_light", fast=False) for _ in range(2))
    replayed(system)
    options = {**OPTIONS, "rounds": 1, "latent_steps": 4, "temperature": 0.0}
    system.run([ASKED[0]], **options)
    captured = len(captures)
    for changed in (system, plain):
        link = changed.agents["planner"].inner_link
        link.post_ln.weight = torch.nn.Parameter(-link.post_ln.weight, requires_grad=False)
    assert_same(system.run([ASKED[0]], **options), plain.run([ASKED[0]], **options))
    assert len(captures) == captured + 1


def test_a_part_of_a_link_that_an_edit_replaces(folders, captures):
    """What an agent read is kept from round to round, but no step that was captured with the part of before."""
    system, plain = (load(folders, "sequential_light", fast=False) for _ in range(2))
    replayed(system)
    options = {**OPTIONS, "rounds": 3, "latent_steps": 4, "temperature": 0.0}

    def replacing_in(agent):
        def edit(turn, questions):
            if turn.round == 2 and turn.role == "planner":
                weight = agent.inner_link.post_ln.weight
                agent.inner_link.post_ln.weight = torch.nn.Parameter(-weight, requires_grad=False)

        return edit

    found = []
    for one in (system, plain):
        found.append(one.run([ASKED[0]], edit=replacing_in(one.agents["planner"]), **options))
    assert_same(*found)
    planner = system.agents["planner"]
    assert planner.steps.captured[planner.inner_link] == parts(planner.inner_link)


def test_steps_with_links_of_before_are_let_go(folders, captures):
    system = replayed(load(folders, "sequential_light"))
    planner = system.agents["planner"]
    for _ in range(3):
        planner.inner_link = InnerLink(planner.model.config.hidden_size)
        system.run([ASKED[0]], **{**OPTIONS, "rounds": 1, "latent_steps": 4})
    assert set(planner.steps.captured) == {planner.model, planner.inner_link}
    links = [
        part for key in planner.steps.recorded for part in key if part in (planner.inner_link,)
    ]
    latent = [key for key in planner.steps.recorded if key[0] == "latent"]
    assert len(latent) == len(links) == 1


def test_a_cache_that_may_be_full_takes_further_steps(folders, captures):
    """`filled` is an upper bound over rows of unequal length: it may reach the capacity before any row does."""
    model = load(folders, "sequential_light").agents["planner"].model
    graphs = Graphs(model)
    cache = graphs.make_cache(1, 10)

    def step(x, positions):
        h = model(x, positions, cache, last=1)
        return (h, positions + 1), h

    for c in cache:
        c.filled = c.capacity
    _, outputs = graphs.take(
        step,
        (model.embed(torch.tensor([[5]])), torch.zeros(1, 1, dtype=torch.long)),
        4,
        cache,
        lambda: None,
        ("x",),
    )
    assert len(outputs) == 4 and {c.filled for c in cache} == {cache[0].capacity}


@pytest.mark.parametrize("graphs", (pytest.param(False, marks=pytest.mark.slow), True))
def test_rows_that_ended_leave_the_batch(folders, captures, monkeypatch, graphs):
    """One long text does not hold seven finished ones; what is written does not change by it."""
    system = load(folders, "sequential_scaled")
    solver, sizes = system.agents["solver"], []
    asked = [f"Question {i}?" for i in range(8)]
    options = OPTIONS | {
        "rounds": 1,
        "max_new_tokens": 24,
        "temperature": 1.5,
        "top_p": 1.0,
        "top_k": 0,
        "batch_size": 8,
    }
    solver.generation_config.eos_ids = tuple(range(0, 250, 9))  # one token of nine ends a text
    alone = system.run(asked, **options | {"batch_size": 1})
    if graphs:
        replayed(system)
    forward = solver.model.forward
    monkeypatch.setattr(
        solver.model,
        "forward",
        lambda x, *rest, **more: sizes.append(len(x)) or forward(x, *rest, **more),
    )
    together = system.run(asked, **options)
    assert [r.token_ids for r in together] == [r.token_ids for r in alone] and len(
        {len(r.token_ids) for r in alone}
    ) > 3
    assert sizes == sorted(sizes, reverse=True) and sizes[-1] < sizes[0] == 8
    assert not graphs or set(sizes) <= {8, 4, 2, 1}


@pytest.mark.slow
def test_replies_of_tools_on_a_fake_cuda_device(folders, gpu, monkeypatch):
    """A reply makes the cache grow: the graphs of the old one are not used again, or states would not be the same.
    It grows by more than it has to, so that the next reply finds room.
    """
    scripts = [
        SCRIPTS[0].replace("that", "<python> print(1) </python>"),
        SCRIPTS[1].replace("here", "here" + 11 * " x" + "x"),
    ]  # as long as the other
    monkeypatch.setattr(graphs_module, "SPARE", 1)
    texts, seen, adopted = [], [], []
    monkeypatch.setattr(
        Graphs,
        "adopt",
        lambda graphs, cache, B, S, adopt=Graphs.adopt: (
            adopted.append(S),
            adopt(graphs, cache, B, S),
        ),
    )
    for device, place in ("cpu", nullcontext()), ("cuda:0", gpu):
        with place:
            system = load(folders, "deliberation", dtype="float64", device=device)
            model = system.agents["toolcaller"].model
            asked = lambda n, *questions: [
                r.text
                for r in system.run(
                    questions,
                    tools=("python",),
                    rounds=1,
                    latent_steps=2,
                    max_new_tokens=n,
                    temperature=0.0,
                )
            ]
            with monkeypatch.context() as patch:
                scripted(system.agents["toolcaller"], scripts, patch)
                seen.append([])
                patch.setattr(
                    model,
                    "logits",
                    lambda h, logits=model.logits: seen[-1].append(h[0].cpu()) or logits(h),
                )
                texts.append(asked(100, "1 + 1", "a longer question"))
            sizes = adopted[1:]  # the first is the reflector's
            texts[-1] += asked(
                20, "1 + 1", "2 + 2", "3 + 3"
            )  # a larger batch, after one with rows that left
    assert (
        texts[0] == texts[1]
        and "<result> 42 </result>" in texts[0][0]
        and "<result> 1 </result>" in texts[0][0]
    )
    assert all((a - b).abs().max() < 1e-9 for a, b in zip(*seen, strict=True))
    assert len(sizes) == 2 and sizes[1] == sizes[0] + REPLY_ROOM


def reading_anew(system, monkeypatch):
    """The system, made to read every prompt as if there had been none before."""
    for agent in system.agents.values():

        def read_anew(prompts, room, agent=agent, read=agent.read_after_prefix):
            agent.drop_prefix()
            return read(prompts, room)

        monkeypatch.setattr(agent, "read_after_prefix", read_anew)
    return system


def assert_exactly_the_same(ours, theirs):
    for a, b in zip(ours, theirs, strict=True):
        assert a.token_ids == b.token_ids and all(
            (a.latents[key] - b.latents[key]).abs().max() < 1e-12 for key in b.latents
        )


def test_windows_and_states_are_read_anew(folders, monkeypatch):
    """Of a cache that does not hold every position, nothing is left for the next round."""
    options = OPTIONS | {"rounds": 3, "latent_steps": 2, "max_new_tokens": 2, "temperature": 0.0}
    one, other = (load(folders, "sequential_scaled", dtype="float64") for _ in range(2))
    assert_exactly_the_same(
        one.run(ASKED[:2], **options), reading_anew(other, monkeypatch).run(ASKED[:2], **options)
    )


@pytest.mark.parametrize("graphs", (pytest.param(False, marks=pytest.mark.slow), True))
def test_what_was_read_in_the_last_round_is_not_read_again(folders, captures, monkeypatch, graphs):
    """Round 3 reads of a prompt what differs from round 2;
    nothing is carried from question to question, and nothing changes.
    """
    options, asked = OPTIONS | {"rounds": 3, "temperature": 0.0, "max_new_tokens": 4}, ASKED[:3]
    plain, quick = (
        load(folders, "sequential_light", dtype="float64", **more) for more in ({"fast": False}, {})
    )
    reading_anew(plain, monkeypatch)
    if graphs:
        replayed(quick)
    read = {role: [] for role in quick.agents}
    for role, agent in quick.agents.items():

        def count(x, positions, cache, last, role=role, forward=agent.model.forward):
            read[role] += [int((positions >= 0).sum())] if x.shape[1] > 1 else []
            return forward(x, positions, cache, last)

        monkeypatch.setattr(agent.model, "forward", count)
    assert_exactly_the_same(
        quick.run(asked, batch_size=5, **options), plain.run(asked, batch_size=5, **options)
    )
    (_, p2, p3), (c1, c2, c3) = read["planner"], read["critic"]
    assert p3 < 0.6 * p2 and c2 == c3 < 0.6 * c1, read
    lengths = {role: list(counts) for role, counts in read.items()}
    quick.run(asked, batch_size=5, **options)
    assert {role: counts[len(lengths[role]) :] for role, counts in read.items()} == lengths, (
        "a new run begins anew"
    )


def test_merged_weights_are_held_once(monkeypatch, tmp_path):
    """Where weights are merged but not packed (CUDA), the parts are views of the whole."""
    monkeypatch.setattr(onednn, "can_multiply", lambda weight: False)
    attention = load_model(checkpoints.make_agent(tmp_path, "qwen2")).layers[0].self_attn
    x = torch.randn(2, 3, 48)
    apart = attention.qkv(x)
    merged = MergedLinear([attention.q_proj, attention.k_proj, attention.v_proj])
    start, end = (
        merged.packed.weight.data_ptr(),
        merged.packed.weight.data_ptr() + merged.packed.weight.numel() * 4,
    )
    assert all(
        start <= p.weight.data_ptr() < end
        for p in (attention.q_proj, attention.k_proj, attention.v_proj)
    )
    assert all(
        (a - b).abs().max() < 1e-5
        for whole in (merged(x), attention.qkv(x))
        for a, b in zip(whole, apart)
    )


@pytest.mark.parametrize("duplicate", (copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))))
@torch.no_grad()
def test_a_decoder_on_the_fast_path_can_be_copied(tmp_path, duplicate):
    """Packed weights, too, which torch itself can neither copy nor pickle; what is copied stands alone."""
    model = prepare(load_model(checkpoints.make_agent(tmp_path, "llama")))
    other = duplicate(model)
    positions = torch.arange(IDS.shape[1])[None]
    x = model.embed(IDS)
    truth = model(x, positions, model.make_cache(1))
    assert torch.equal(other(x, positions, other.make_cache(1)), truth)
    assert other.layers[0].self_attn.qkv is not model.layers[0].self_attn.qkv
    merged = other.layers[0].self_attn.qkv
    merged.packed.bias = torch.ones(sum(merged.sizes))
    assert not torch.equal(other(x, positions, other.make_cache(1)), truth)
    assert torch.equal(model(x, positions, model.make_cache(1)), truth)


def test_no_silent_loss_of_gradients(folders):
    agent = load(folders, "sequential_light").agents["planner"]
    x = torch.zeros(1, 3, 48, requires_grad=True)
    with pytest.raises(minimas.InputError, match="fast=False"):
        agent.model(x, torch.arange(3)[None], agent.model.make_cache(1))


# Links


@LINKS
@pytest.mark.parametrize("rows", (1, 2, 7, 64, 130))
@torch.no_grad()
def test_fused_link(link, rows):
    link.requires_grad_(False)
    quick = fused(link)
    for h in states(rows, 64), states(rows, 3, 64), states(0, 64):
        assert quick(h).shape == link(h).shape and torch.allclose(
            quick(h), link(h), atol=1e-5 * link(h).abs().max().item() if h.numel() else 0
        )


@LINKS
@torch.no_grad()
def test_fused_link_in_bfloat16(link):
    """As close to the link in float64 as the plain form is."""
    h = states(200, 64, dtype=torch.bfloat16)
    narrow = load_copy(link, torch.bfloat16)
    truth = load_copy(narrow, torch.float64)(h.double())
    plain, quick = (form(h).double() - truth for form in (narrow, fused(narrow)))
    assert (
        fused(narrow)(h).dtype == torch.bfloat16
        and 0 < quick.abs().mean() < 1.1 * plain.abs().mean()
    )


@LINKS
def test_gradients_of_the_fused_link(link):
    """With respect to the states, and, through the folding, to every weight of the link."""
    link = load_copy(link, torch.float64).requires_grad_(True)
    h = states(9, 64, dtype=torch.float64).requires_grad_(True)
    inputs = [h, *link.parameters()]
    plain = torch.autograd.grad(link(h).square().sum(), inputs)
    quick = torch.autograd.grad(fused(link)(h).square().sum(), inputs)
    assert all(torch.allclose(a, b, atol=1e-9) for a, b in zip(quick, plain, strict=True))


def load_copy(link, dtype):
    copy = InnerLink(64) if isinstance(link, InnerLink) else OuterLink(64, 40)
    copy.load_state_dict(link.state_dict())
    return copy.to(dtype).requires_grad_(False)


# On a GPU


@CUDA
@pytest.mark.parametrize("style", checkpoints.SYSTEMS)
def test_cuda_graphs(folders, style):
    """Graphs on the device, greedy: the tokens and latents of the plain path on the CPU.
    Batches that shrink and grow, a turn without a step, and 40 rows of text, more than a kernel multiplies.
    """
    options = OPTIONS | {"temperature": 0.0}
    plain, quick = (
        load(folders, style, fast=False),
        load(folders, style, device="cuda", dtype="float32"),
    )
    for asked, more in (
        (ASKED, {}),
        (ASKED[:2], {}),
        (ASKED, {"latent_steps": 1}),
        (ASKED, {"rollouts": 8}),
    ):
        assert_same(quick.run(asked, **options | more), plain.run(asked, **options | more))
    assert all(agent.steps.recorded for agent in quick.agents.values())
