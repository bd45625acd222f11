"""The Triton kernels equal the plain path, on a GPU or in Triton's interpreter, and compile where there is no GPU."""

import copy
import json
import os
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

OLDEST = (
    None if torch.cuda.is_available() else "3.7"
)  # the interpreter of 3.6 does not know numpy 2.4
pytest.importorskip("triton", OLDEST, reason="needs Triton: pip install '.[oracle]'")

import checkpoints
from checkpoints import IDS
from fake_cuda import FakeTensor, real
from shared import ASKED, CUDA, LINKS, OPTIONS, assert_same, load, states

from minimas import link, llama
from minimas.cache import DeltaCache, attention_cache, grow
from minimas.fast import kernels, linear, onednn
from minimas.fast import prepare as prepare_module
from minimas.fast.prepare import prepare
from minimas.link import fused
from minimas.llama import attend, rope_cos_sin, rope_frequencies
from minimas.load import load_model
from minimas.quantize import Int8Linear
from minimas.qwen import apply_partial_rope

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Relative error of float32 sums, and of results rounded once. The interpreter has no product of bfloat16s.
DTYPES = {torch.float32: 2e-6, torch.float16: 5e-4} | (
    {torch.bfloat16: 4e-3} if DEVICE == "cuda" else {}
)


@pytest.fixture(scope="module", autouse=True)
def quick_interpreter():
    """Triton's interpreter replaces the functions of its language at each launch, and then again whenever a kernel
    calls a function of its own. Once for each module is enough there, and saves a third of the time.
    """
    if DEVICE == "cuda":
        yield
        return
    from triton.runtime import interpreter

    replaced_for = set()

    def call(function, *args, **options):
        module = function.fn.__module__
        if module not in replaced_for:
            replaced_for.add(module)
            interpreter._patch_lang(function.fn)
        return function.rewrite()(*args, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter.InterpretedFunction, "__call__", call)
        yield


def random(*shape, dtype=torch.float32, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def error(y, truth):
    assert y.shape == truth.shape and y.isfinite().all()
    return ((y.double() - truth).norm() / truth.norm()).item()


def normed(x, gain, eps=1e-6):
    """An RMSNorm in float64."""
    x = x.double()
    return x * (x.square().mean(-1, keepdim=True) + eps).rsqrt() * gain.double()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("B, K, N", ((1, 48, 40), (3, 300, 66), (17, 64, 24), (32, 20, 70)))
@torch.no_grad()
def test_linear(dtype, B, K, N, monkeypatch):
    """Rows, inputs and outputs that fill no block, strided rows,
    and all that may stand before and after the product.
    """
    if N == 70 and DEVICE == "cpu":  # as on a device that is so small that these outputs are many
        monkeypatch.setattr(kernels, "MULTIPROCESSORS", 2)
    wide = random(B, 2 * K, dtype=dtype) * 3 + 0.5
    x, w, b = (
        wide[:, :K],
        random(N, K, dtype=dtype, seed=1) / K**0.5,
        random(N, dtype=dtype, seed=2),
    )
    residual, gain, half = (
        random(B, 2 * N, dtype=dtype, seed=3)[:, N:],
        random(K, seed=4).abs() + 0.5,
        N // 2,
    )
    X, W = x.double(), w.double()
    assert error(kernels.linear(x, w), X @ W.T) < DTYPES[dtype]
    y = kernels.linear(x, w, b, norm="rms", gain=gain, eps=1e-6, residual=residual)
    product = normed(x, gain) @ W.T
    assert error(y, product + b.double() + residual.double()) < 2 * DTYPES[dtype]
    for act, f in ("silu", F.silu), ("gelu_tanh", lambda gate: F.gelu(gate, approximate="tanh")):
        gate, up = product.chunk(2, -1)
        assert (
            error(kernels.linear(x, w, norm="rms", gain=gain, eps=1e-6, act=act), f(gate) * up)
            < 3 * DTYPES[dtype]
        )
    w[:half] -= w[:half].double().mean(1, keepdim=True).to(dtype)
    y = kernels.linear(x, w, b, norm="layer", eps=1e-5, act="gelu", normed=half)
    of_norm = F.gelu(F.layer_norm(X, (K,), eps=1e-5) @ w[:half].double().T + b[:half].double())
    assert (
        error(y, torch.cat([of_norm, (X @ w.double().T + b.double())[:, half:]], 1))
        < 2 * DTYPES[dtype]
    )


@pytest.mark.parametrize("dtype", DTYPES)
@torch.no_grad()
def test_linear_with_int8_weights(dtype):
    """The scale of each output comes before bias, activation and residual; with a gate both halves have their own."""
    x, w = random(3, 300, dtype=dtype), random(66, 300, seed=1)
    bias, gain = random(66, dtype=dtype, seed=2), random(300, seed=4).abs() + 0.5
    residual = random(3, 66, dtype=dtype, seed=3)
    linear = Int8Linear.from_float(w * torch.linspace(0.01, 3, 66, device=DEVICE)[:, None])
    q, scale = linear.weight, linear.scale
    W = linear.dequantized(dtype=torch.float64)
    assert error(kernels.linear(x, q, scale=scale), x.double() @ W.T) < DTYPES[dtype]
    options = {"norm": "rms", "gain": gain, "eps": 1e-6, "scale": scale}
    y = kernels.linear(x, q, bias, residual=residual, **options)
    product = normed(x, gain) @ W.T
    assert error(y, product + bias.double() + residual.double()) < 2 * DTYPES[dtype]
    gate, up = product.chunk(2, -1)
    y = kernels.linear(x, q, act="silu", **options)
    assert error(y, F.silu(gate) * up) < 3 * DTYPES[dtype]


def test_linear_of_equal_inputs():
    """Their variance is 0: sums of squares may come out below it."""
    x, w = torch.full((3, 48), 337.7, device=DEVICE), random(20, 48)
    w -= w.mean(1, keepdim=True)
    assert kernels.linear(x, w, norm="layer", eps=1e-5).abs().max() < 1


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", ((1, 7), (3, 5, 16), (2, 2048), (0, 8)))
def test_norm(dtype, shape):
    """An RMSNorm, with a residual, too; and a LayerNorm, whose gain and shift are as wide as its input."""
    x, gain = random(*shape, dtype=dtype) + 0.5, random(shape[-1], seed=1)
    residual = random(1, shape[-1], dtype=dtype, seed=2).expand(*shape)
    assert kernels.norm(x, gain, 1e-6).shape == x.shape
    if x.numel():
        assert error(kernels.norm(x, gain, 1e-6), normed(x, gain)) < DTYPES[dtype]
        assert (
            error(
                kernels.norm(x, gain, 1e-6, residual=residual), normed(x, gain) + residual.double()
            )
            < DTYPES[dtype]
        )
        layer = gain.to(dtype), random(shape[-1], dtype=dtype, seed=3)
        truth = F.layer_norm(x.double(), shape[-1:], *(part.double() for part in layer), 1e-3)
        assert error(kernels.norm(x, layer[0], 1e-3, layer[1]), truth) < DTYPES[dtype]


ATTENTION = {  # H, K, d, rotated dimensions, window or None, whether q and k are normed, positions there is room for
    "groups": (4, 2, 16, 16, None, False, 90),
    "one head, odd width": (6, 1, 12, 8, None, True, 200),
    "ring": (4, 4, 16, 16, 9, True, 40),
    "long ring": (2, 1, 16, 4, 70, False, 200),
    "window in a cache that grew": (2, 2, 16, 16, 70, False, 70),
    "no splits": (4, 2, 16, 16, None, True, 20),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ATTENTION)
@torch.no_grad()
def test_attend(dtype, name):
    """Rows of unequal length, one of them empty, step after step: the output, and all that is left in the cache."""
    (H, K, d, n, window, norms, S), B = ATTENTION[name], 3
    caches = [attention_cache(B, K, S, d, random(1, dtype=dtype), window) for _ in range(2)]
    frequency = rope_frequencies({"rope_type": "default", "rope_theta": 1e4}, n).to(DEVICE)
    gains = [random(d, seed=seed).abs() + 0.5 for seed in (1, 2)] if norms else [None, None]
    if name == "window in a cache that grew":
        S += 90
        grow(caches, 90)
    lengths = torch.tensor([[0], [S // 2], [S - 8]], device=DEVICE)
    done = torch.zeros(B * K, dtype=torch.int32, device=DEVICE)
    read = torch.arange(S - 8, device=DEVICE) - (S - 8 - lengths)
    before = [random(B, K, S - 8, d, dtype=dtype, seed=seed) for seed in (3, 4)]
    for cache in caches:
        cache.update(*before, torch.where(read < 0, -1, read))
    for step in range(5):  # the ring begins again at the fifth
        positions = lengths + step
        rope, mask = rope_cos_sin(positions, frequency), caches[0].mask(positions, 1)
        q, k, v = (
            random(B, heads, 2 * d, dtype=dtype, seed=10 * step + i)[..., :d]
            for i, heads in enumerate((H, K, K))
        )
        k, v = k.contiguous(), v.contiguous()
        turned = [
            x if gain is None else normed(x, gain).to(dtype) for x, gain in zip((q, k), gains)
        ]
        new_q, new_k = (apply_partial_rope(x[:, :, None], rope) for x in turned)
        keys, values = caches[0].update(new_k, v[:, :, None], positions)
        truth = attend(new_q.double(), keys.double(), values.double(), mask, 0.3)[:, 0]
        gated = name == "long ring"
        if gated:
            q = torch.cat([q, gate := random(B, H, d, dtype=dtype, seed=5)], -1)
            truth *= gate.double().flatten(1).sigmoid()
        y = kernels.attend(q, k, v, rope, positions, caches[1], done, 0.3, *gains, 1e-6, gated)
        assert error(y, truth) < 4 * DTYPES[dtype] and not done.any()
    for tensor in caches[0].tensors:
        a, b = (
            getattr(cache, tensor)[:, ..., : S if tensor == "positions" else None]
            for cache in caches
        )
        a, b = (
            x if tensor == "positions" else x[:, :, :-1] for x in (a, b)
        )  # the last index is for padding
        assert torch.equal(a, b) if tensor == "positions" else error(b, a.double()) < DTYPES[dtype]


@CUDA
@torch.no_grad()
def test_splits_of_an_attention_run_at_once():
    """Many splits on the device, again and again: the same bits each time, and no count left behind."""
    cache = attention_cache(2, 2, 16384, 128, random(1, dtype=torch.bfloat16))
    cache.k.normal_(), cache.v.normal_()
    q, k, v = (random(2, heads, 128, dtype=torch.bfloat16, seed=heads) for heads in (8, 2, 2))
    done, positions = (
        torch.zeros(4, dtype=torch.int32, device=DEVICE),
        torch.tensor([[16000], [700]], device=DEVICE),
    )
    rope = rope_cos_sin(
        positions, rope_frequencies({"rope_type": "default", "rope_theta": 1e4}, 128).to(DEVICE)
    )
    first, *others = [
        kernels.attend(q, k, v, rope, positions, cache, done, 0.1) for _ in range(1000)
    ]
    assert all(torch.equal(first, y) for y in others) and not done.any()


@pytest.fixture
def by_kernels(monkeypatch):
    """The fast path takes the kernels, whatever the device; the names of those that ran."""
    ran = []

    def launch(kernel, *rest, launch=kernels.launch, **options):
        ran.append(kernel.fn.__name__)
        assert len({value.device for value in rest if isinstance(value, torch.Tensor)}) == 1
        launch(kernel, *map(real, rest), **options)

    monkeypatch.setattr(kernels, "launch", launch)
    if (
        DEVICE == "cpu"
    ):  # the interpreter pays for each program, so that fewer and larger ones are quicker
        monkeypatch.setattr(kernels, "MULTIPROCESSORS", 2)
    monkeypatch.setattr(onednn, "can_multiply", lambda weight: False)
    for module in prepare_module, link:
        monkeypatch.setattr(module, "kernels_for", lambda weight: kernels)
    return ran


# Two layers, of two kinds where a family has two. What differs outside of its blocks only is left out.
TWO_LAYERS = {
    "gemma3": ["sliding_attention", "full_attention"],
    "qwen2 windows": ["full_attention", "sliding_attention"],
    "qwen3.5": ["linear_attention", "full_attention"],
}
WITH_OTHER_BLOCKS = [
    name for name in checkpoints.VARIANTS if "tied" not in name and name != "llama without scaling"
]


@pytest.mark.parametrize("name", WITH_OTHER_BLOCKS)
@pytest.mark.parametrize("many", (False, True))
@torch.no_grad()
def test_steps_of_every_family(by_kernels, tmp_path, monkeypatch, name, many):
    """Single tokens after a prompt of unequal rows, and a chunk between: the states of the plain decoder.
    With more than ROWS rows all is left to torch.
    """
    monkeypatch.setattr(kernels, "ROWS", 1 if many else 32)
    model_type, config = checkpoints.VARIANTS[name]
    config = config | {"num_hidden_layers": 2}
    if name in TWO_LAYERS:
        config["layer_types"] = TWO_LAYERS[name]
    folder = checkpoints.make_agent(tmp_path, model_type, **config)
    plain, quick = load_model(folder, DEVICE), prepare(load_model(folder, DEVICE))
    caches = [model.make_cache(2, 60) for model in (plain, quick)]
    for start, n in (0, 24), (24, 1), (25, 3), (28, 1):
        positions = torch.stack(
            [torch.arange(start, start + n), torch.arange(start, start + n) - 7]
        ).to(DEVICE)
        x = plain.embed(IDS[:, start : start + n].to(DEVICE)).expand(2, -1, -1)
        by_kernels.clear()
        a, b = plain(x, positions, caches[0]), quick(x, positions, caches[1])
        assert (a - b)[positions >= 0].abs().max() < 5e-5
        steps = by_kernels.count("attend_kernel") + by_kernels.count("delta_kernel")
        takes_steps = n == 1 and not many and model_type not in checkpoints.PLAIN_STEPS["cuda"]
        assert steps == (len(quick.layers) if takes_steps else 0)
        assert by_kernels.count("linear_kernel") == 4 * steps
        for a, b in zip(*caches):
            assert getattr(a, "filled", 0) == getattr(b, "filled", 0)
            if isinstance(a, DeltaCache):
                assert (a.conv - b.conv).abs().max() < 1e-5 and (
                    a.state - b.state
                ).abs().max() < 1e-5


@pytest.mark.parametrize("kind", ("int8", "int4"))
@pytest.mark.parametrize("name", ("gemma3", "qwen2", "qwen3.5"))
@torch.no_grad()
def test_steps_with_quantised_weights(by_kernels, tmp_path, name, kind):
    """int8 weights are read by the kernels, the head's too; blocks with int4 weights take the plain path."""
    model_type, config = checkpoints.VARIANTS[name]
    config = config | {"num_hidden_layers": 2, "hidden_size": 64, "intermediate_size": 96}
    if name in TWO_LAYERS:
        config["layer_types"] = TWO_LAYERS[name]
    if name == "qwen3.5":
        config |= {"linear_value_head_dim": 16, "linear_num_value_heads": 4}
    folder = checkpoints.make_agent(tmp_path, model_type, **config)
    plain = load_model(folder, DEVICE, quantize=kind)
    quick = prepare(load_model(folder, DEVICE, quantize=kind))
    caches = [model.make_cache(2, 60) for model in (plain, quick)]
    for start, n in (0, 24), (24, 1), (25, 1):
        columns = torch.arange(start, start + n)
        positions = torch.stack([columns, columns - 7]).to(DEVICE)
        x = plain.embed(IDS[:, start : start + n].to(DEVICE)).expand(2, -1, -1)
        by_kernels.clear()
        a, b = plain(x, positions, caches[0]), quick(x, positions, caches[1])
        own = (a - b)[positions >= 0].norm() / a[positions >= 0].norm()
        assert own < (2e-5 if kind == "int8" or DEVICE == "cuda" else 0.02)
        if n == 1:
            steps = len(quick.layers) if kind == "int8" else 0
            assert by_kernels.count("linear_kernel") == 4 * steps
    by_kernels.clear()
    head = quick.logits(a) - plain.logits(a)
    assert head.norm() < 0.01 * plain.logits(a).norm()
    assert by_kernels.count("linear_kernel") == (kind == "int8")


class LoudBlock(llama.Block):
    """What a new family might do, under the names of Llama's parts."""

    def forward(self, x, *others):
        return 2 * super().forward(x, *others)


class LoudNorm(llama.RMSNorm):
    def forward(self, x):
        return 2 * super().forward(x)


@pytest.mark.parametrize("part", ("block", "norm in a block"))
@torch.no_grad()
def test_what_the_kernels_do_not_know_is_left_alone(by_kernels, tmp_path, part):
    folder, states = checkpoints.make_agent(tmp_path, "llama"), []
    for form in nn.Identity(), prepare:
        model = load_model(folder, DEVICE)
        odd = model.layers[1]
        odd.__class__, odd.input_layernorm.__class__ = (
            (LoudBlock, llama.RMSNorm) if part == "block" else (llama.Block, LoudNorm)
        )
        model, cache, positions = (
            form(model),
            model.make_cache(1, 9),
            torch.arange(2, device=DEVICE)[None],
        )
        by_kernels.clear()
        states += [
            model(model.embed(IDS[:1, :1].to(DEVICE)), positions[:, :1], cache),
            model(model.embed(IDS[:1, 1:2].to(DEVICE)), positions[:, 1:], cache),
        ]
    assert (states[0] - states[2]).abs().max() < 5e-5 and (states[1] - states[3]).abs().max() < 5e-5
    assert by_kernels.count("attend_kernel") == 2 * (len(model.layers) - 1)


@pytest.mark.parametrize("name", ("gemma3", "qwen3.5"))
@torch.no_grad()
def test_norms_that_are_changed(by_kernels, tmp_path, name):
    """Each norm computes with the weight that it has, from memory that stays, as CUDA graphs read it."""
    model_type, config = checkpoints.VARIANTS[name]
    config = config | {"num_hidden_layers": 2, "layer_types": TWO_LAYERS[name]}
    folder = checkpoints.make_agent(tmp_path, model_type, **config)
    plain, quick = load_model(folder, DEVICE), prepare(load_model(folder, DEVICE))
    positions = torch.arange(6, device=DEVICE)[None]

    def states_of(model):
        x = model.embed(IDS[:1, :6].to(DEVICE))
        cache = model.make_cache(1, 6)
        read = model(x[:, :5], positions[:, :5], cache)
        return torch.cat([read, model(x[:, 5:], positions[:, 5:], cache)], 1)

    before = states_of(quick)
    norms = [module for module in quick.modules() if isinstance(module, llama.RMSNorm)]
    places = [norm.forward.gain.data_ptr() for norm in norms]
    old = [norm.weight for norm in norms]
    old_numbers = [weight.clone() for weight in old]
    for change in ("replaced", "in place"):
        for model in (plain, quick):
            for module in model.modules():
                if isinstance(module, llama.RMSNorm) and change == "replaced":
                    module.weight = nn.Parameter(1.5 * module.weight + 0.1, requires_grad=False)
                elif isinstance(module, llama.RMSNorm):
                    module.weight *= torch.linspace(0.5, 1, len(module.weight), device=DEVICE)
        truth = states_of(plain)
        assert (before - truth).abs().max() > 0.1
        assert (states_of(quick) - truth).abs().max() < 1e-4
        assert [norm.forward.gain.data_ptr() for norm in norms] == places
    assert all(map(torch.equal, old, old_numbers)), "a weight that was replaced is left alone"


def test_gradients_take_the_plain_path(by_kernels, tmp_path):
    folder = checkpoints.make_agent(tmp_path, "qwen3")
    gradients = []
    for model in load_model(folder, DEVICE), prepare(load_model(folder, DEVICE)):
        x = random(1, 5, 48).requires_grad_()
        cache, positions = model.make_cache(1), torch.arange(6, device=DEVICE)[None]
        h = model(model(x, positions[:, :5], cache)[:, -1:], positions[:, 5:], cache)
        gradients += [torch.autograd.grad(h.square().sum(), x)[0]]
    assert (gradients[0] - gradients[1]).abs().max() < 1e-4 * gradients[
        0
    ].abs().max() and not by_kernels


def test_without_a_compiler_there_are_no_kernels(monkeypatch, tmp_path):
    """Triton would fail at the first launch."""
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr(linear, "which", lambda name: name if name == "gcc" else None)
    headers, weight = tmp_path / "Python.h", torch.ones(2, 2).as_subclass(FakeTensor)
    monkeypatch.setattr(linear.sysconfig, "get_path", lambda *_: tmp_path)
    for headers_are_there, compiler, kernels_are_there in (
        (True, None, True),
        (True, "/no/such/cc", False),
        (True, "", False),
        (False, None, False),
    ):
        headers.touch() if headers_are_there else headers.unlink()
        if compiler is not None:
            monkeypatch.setenv("CC", compiler)
        else:
            monkeypatch.delenv("CC", raising=False)
        with nullcontext() if kernels_are_there else pytest.warns(UserWarning, match="install gcc"):
            assert (linear.kernels_for(weight) is not None) == kernels_are_there


@LINKS
@torch.no_grad()
def test_links(by_kernels, link):
    """Up to ROWS rows by three kernels, more without."""
    link = copy.deepcopy(link).to(DEVICE).requires_grad_(False)
    quick = fused(link)
    for shape in (64,), (1, 64), (3, 7, 64), (kernels.ROWS + 1, 64):
        h = states(*shape).to(DEVICE)
        by_kernels.clear()
        y, truth = quick(h), link(h)
        assert y.shape == truth.shape and (y - truth).abs().max() < 1e-5 * truth.abs().max()
        assert len(by_kernels) == (3 if h.numel() <= 64 * kernels.ROWS else 0)


def test_a_run_by_replayed_kernels(folders, captures, gpu, by_kernels):
    """A whole system on a GPU, fake if there is none, the steps run as graphs are:
    prompts, latent steps and sampled text, rows that leave the batch.
    """
    options = OPTIONS | {
        "rounds": 1,
        "latent_steps": 2,
        "max_new_tokens": 2,
        "temperature": 1.5,
        "top_p": 1.0,
        "top_k": 0,
    }
    with gpu if DEVICE == "cpu" else nullcontext():
        results = load(folders, "sequential_light", device="cuda:0", dtype="float32").run(
            ASKED[:1], **options
        )
    assert_same(results, load(folders, "sequential_light", fast=False).run(ASKED[:1], **options))
    assert captures and {"attend_kernel", "linear_kernel", "norm_kernel"} <= set(by_kernels)
    assert not any(in_step for _, _, in_step in gpu.passed)


def test_they_compile_for_a_gpu():
    """For Hopper (sm_90), in all the forms that a run takes; the interpreter accepts what the compiler does not."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    tools = Path(__file__).parent.parent / "tools"
    command = [sys.executable, tools / "compile_kernels.py"]
    out = subprocess.run(
        command,
        cwd=tools.parent,
        env=environment | {"PYTHONPATH": "."},
        capture_output=True,
        text=True,
    )
    assert out.returncode == 0, out.stderr
    forms = json.loads(out.stdout)
    assert len(forms) > 20
    largest, *others = sorted({shared for shared, _, _ in forms.values()}, reverse=True)
    assert largest + others[0] <= 226 * 1024, (
        "a program and one of the next kernel should fit on 228 KiB"
    )
    reading = [
        copies for form, (_, copies, _) in forms.items() if form.startswith(("linear", "attend"))
    ]
    assert min(reading) >= 4, "what is read next should be on its way while the product goes on"
    assert all(waits for _, _, waits in forms.values()), (
        "a kernel that starts early may not see what others still write"
    )
