"""The script for a GPU: a part that raises or hangs costs no other, and the checks see a mistake."""

import json
import os
import subprocess
import sys
import time
from types import SimpleNamespace

import checkpoints
import gpu_checks
import on_gpu
import pytest
import torch

from minimas import generate as generate_module

PRELUDE = f"import os, sys, time, subprocess; sys.path.insert(0, {str(on_gpu.HERE)!r}); from on_gpu import note; "


def stage(seconds, **programs):
    return seconds, {name: ["-c", PRELUDE + program] for name, program in programs.items()}


@pytest.mark.slow
def test_a_part_that_fails_or_hangs_costs_no_other(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(
        sys, "argv", ["on_gpu.py", str(tmp_path / "out"), "--small", "--device", "cpu"]
    )
    hangs = "note(a=1); subprocess.Popen(['sleep', '60']); print('@ {\"torn', flush=True); time.sleep(60)"
    started = time.monotonic()
    assert (
        on_gpu.main(
            [
                stage(
                    1.5,
                    raises="note(a=1, summary='x'); note(a=2); raise ValueError('an error')",
                    hangs=hangs,
                ),
                stage(
                    20, works="note(a=3, summary='all is well')", left="note(skipped='needs CUDA')"
                ),
            ]
        )
        == 1
    )
    assert time.monotonic() - started < 40
    parts = json.loads((tmp_path / "out" / "on_gpu.json").read_text())["parts"]
    assert {name: (part["status"], part.get("a")) for name, part in parts.items()} == {
        "raises": ("FAILED", 2),
        "hangs": ("ended", 1),
        "works": ("ok", 3),
        "left": ("skipped", None),
    }
    assert "ValueError: an error" in parts["raises"]["log"]
    lines = capsys.readouterr().out.splitlines()
    assert (
        len(lines) == 4
        and any("all is well" in line for line in lines)
        and any("needs CUDA" in line for line in lines)
    )


@pytest.mark.slow
def test_what_a_killed_run_keeps(tmp_path):
    """The file holds what the part that still runs has reported."""
    kept = []
    on_gpu.run_stage(
        *stage(0, slow="note(a=1); time.sleep(60)")[1:],
        [],
        tmp_path,
        time.monotonic() + 3,
        lambda name, known: kept.append((known["status"], known.get("a"))),
    )
    assert ("running", 1) in kept and kept[-1] == ("ended", 1)


@pytest.mark.slow
def test_what_ends_the_script_ends_its_parts(tmp_path):
    stages, report = (
        [stage(30, hangs="note(pid=os.getpid()); time.sleep(60)")],
        tmp_path / "on_gpu.json",
    )
    program = f"import sys; sys.path.insert(0, {str(on_gpu.HERE)!r}); import on_gpu; on_gpu.main({stages!r})"
    with subprocess.Popen([sys.executable, "-c", program, tmp_path, "--device", "cpu"]) as script:
        while not (
            report.is_file()
            and "pid" in (part := json.loads(report.read_text())["parts"].get("hangs", {}))
        ):
            assert script.poll() is None
            time.sleep(0.1)
        script.terminate()
        assert script.wait(20) == 128 + 15
    with pytest.raises(ProcessLookupError):
        os.kill(part["pid"], 0)


def test_the_limits_fit_the_time_of_a_device():
    assert sum(seconds for seconds, _ in on_gpu.STAGES) == 540


@pytest.mark.parametrize("part", ("post_ln", "rope"))
def test_the_checks_see_a_mistake(tmp_path, monkeypatch, part):
    """A link that is too loud shows in latent steps only, a rotation that is a thousandth too fast in prefills, too."""
    monkeypatch.setattr(gpu_checks, "ASKED", gpu_checks.ASKED[:1])
    monkeypatch.setattr(gpu_checks, "TEXTS", {"text": gpu_checks.TEXTS["text"]})
    folder = gpu_checks.make_agent(tmp_path, "llama", {"num_hidden_layers": 1})

    def spoil(agent):
        if part == "post_ln":
            agent.inner_link.post_ln.weight.mul_(1.05)
            agent.inner_link.post_ln.bias.mul_(1.05)
        else:
            agent.model.frequency.mul_(1.001)

    with torch.no_grad():
        assert gpu_checks.compare(folder, "cpu")["wrong"] == []
        wrong = gpu_checks.compare(folder, "cpu", spoil=spoil)["wrong"]
    assert any("float32" in what for what in wrong) and all(
        "prefill" not in what for what in wrong
    ) == (part == "post_ln")


def test_angles_of_the_truth_may_differ_by_their_rounding(tmp_path, monkeypatch):
    """In float64, too, rotations are float32, which a GPU rounds otherwise in the last bit."""
    folder, loaded = gpu_checks.make_agent(tmp_path, "llama", {"num_hidden_layers": 1}), []

    def load(*args, load_agent=gpu_checks.load_agent, **options):
        agent = load_agent(*args, **options)
        agent.model.frequency *= 1 + len(loaded) * off
        loaded.append(agent)
        return agent

    monkeypatch.setattr(gpu_checks, "load_agent", load)
    for off, right in (2**-23, True), (1e-3, False):  # noqa: B007  (`load` reads it)
        loaded.clear()
        wrong = []
        with torch.no_grad():
            gpu_checks.true_agent(folder, "cpu", True, {}, wrong)
        assert right == (not wrong)


def test_links_are_checked_as_they_run(monkeypatch):
    """With gradients kernels are not used."""
    seen = []
    monkeypatch.setattr(
        gpu_checks, "fused", lambda link: lambda h: seen.append(torch.is_grad_enabled()) or link(h)
    )
    assert gpu_checks.links(SimpleNamespace(device="cpu", small=True)) == [] and set(seen) == {
        False
    }


def test_a_machine_that_memcheck_does_not_support(monkeypatch, tmp_path, capsys):
    (tmp_path / "memcheck.log").write_text("========= Error: Device not supported\n")
    monkeypatch.setattr(gpu_checks, "find_spec", lambda name: True)
    monkeypatch.setattr(gpu_checks.shutil, "which", lambda name, path=None: name)
    monkeypatch.setattr(
        gpu_checks.subprocess, "run", lambda *_, **__: SimpleNamespace(returncode=1)
    )
    assert not gpu_checks.memcheck(SimpleNamespace(device="cuda", work=tmp_path))
    assert "skipped" in capsys.readouterr().out


@pytest.fixture
def gpu_speed():
    pytest.importorskip("transformers", reason="needs transformers: pip install '.[oracle]'")
    import gpu_speed

    return gpu_speed


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A folder that all parts share."""
    return tmp_path_factory.mktemp("work")


@pytest.fixture
def dry_run(gpu_speed, work, monkeypatch, capsys):
    """(part, argument) -> what it reports of a dry run."""
    monkeypatch.setattr(gpu_speed.bench, "read_bandwidth", lambda: 1e10)  # reads 1 GB
    monkeypatch.setattr(gpu_speed.bench, "copy_bandwidth", lambda device: 1e10)

    def run(part, argument=None):
        options = SimpleNamespace(device="cpu", small=True, work=work, argument=argument)
        with torch.no_grad():
            part(options)
        log = work / "log"
        log.write_text(capsys.readouterr().out)
        return on_gpu.results(log)

    return run


def know_prompts(gpu_speed, monkeypatch, T):
    """Let figures of steps and memory be taken after prompts of T tokens."""
    prompt = [torch.arange(8, 8 + T)]
    prompts = [(role, [prompt]) for role in ("planner", "critic", "solver")]
    monkeypatch.setattr(gpu_speed.bench, "prompts_of_a_run", lambda *_: prompts)


@pytest.mark.slow
def test_a_race(gpu_speed, dry_run, monkeypatch):
    """What shapes require is that of the lengths of the prompts: at first it was that of their width."""
    T, m, n = 100, 4, 6
    know_prompts(gpu_speed, monkeypatch, T)
    found = dry_run(gpu_speed.race, "1")
    small = gpu_speed.bench.SMALL
    keys_and_values = 2 * small["num_key_value_heads"] * small["head_dim"]
    per_position = 4 * small["num_hidden_layers"] * keys_and_values
    of_mlp = 3 * small["intermediate_size"] + 2 * small["hidden_size"]
    assert found["memory"]["caches"] == per_position * (2 * (T + m) + T + n)
    assert found["memory"]["widest"] == 4 * T * of_mlp
    assert len(found["steps"]) == 6
    assert found["tokens_equal"] == 1 and found["latents_apart"] < 1e-3
    assert found["seconds_of_released"] > 0 and found["seconds_of_cached"] > 0


@pytest.mark.slow
def test_transformers_that_fails_costs_no_figure_of_minimas(
    gpu_speed, dry_run, monkeypatch, capsys
):
    def fail(*_, **__):
        raise OSError("transformers does not load it")

    know_prompts(gpu_speed, monkeypatch, 20)
    monkeypatch.setattr(gpu_speed.reference, "load_model", fail)
    with pytest.raises(OSError, match="does not load it"):
        dry_run(gpu_speed.race, "1")
    told = capsys.readouterr().out
    for figure in "seconds_of_a_run", "text token, solver", "caches":
        assert f'"{figure}"' in told


def test_the_bytes_of_a_step(gpu_speed, tmp_path):
    """They are those of transformers' model, which holds each weight once."""
    folder = checkpoints.make_agent(tmp_path, "llama")
    agent = gpu_speed.load_agent(folder, "math", torch.device("cpu"), None, fast=True)
    theirs = gpu_speed.reference.load_model(folder, torch.float32)
    c = agent.model.config
    cache = 4 * 2 * c.num_hidden_layers * c.num_key_value_heads * c.head_dim * 3 * 50
    for is_text, last in (True, theirs.lm_head.weight.nbytes), (False, 8 * c.hidden_size**2):
        layers = sum(p.nbytes for p in theirs.model.layers.parameters())
        assert gpu_speed.bench.step_bytes(agent, 3, 50, is_text) == layers + last + cache


@pytest.mark.slow
def test_the_ways_of_a_step(gpu_speed, dry_run):
    (found,) = dry_run(gpu_speed.ways)["ways"].values()
    assert min(found["milliseconds"], found["torch"], found["compile"]) > 0


@pytest.mark.slow
def test_the_speed_of_links(gpu_speed, dry_run):
    table = dry_run(gpu_speed.links)["links"]
    assert [row["rows"] for row in table] == [1, 64, 1, 64]
    assert {row["link"] for row in table} == {"inner 64", "outer 64 > 40"}


@pytest.mark.slow
def test_a_training_step(gpu_speed, dry_run):
    found = dry_run(gpu_speed.train)["train"]
    assert found["gradients_apart"]["batched"] < 1e-3
    assert found["against"]["batched"]["time_ratio"] > 0


@pytest.mark.slow
def test_the_worth_of_kernels(gpu_speed, work):
    """A process of its own: Triton must be told of its interpreter before it is imported."""
    begun = on_gpu.start(
        "kernels", [gpu_speed.__file__, "kernels"], ["--small", "--device", "cpu"], work, 1
    )
    try:
        code = begun.wait(300)
    finally:
        on_gpu.end(begun)
    log = work / "kernels.log"
    found = on_gpu.results(log)
    assert code == 0, log.read_text()
    assert "skipped" in found or {"linear in", "norm", "attend", "delta"} <= set(found["kernels"])


def test_peft_does_not_take_our_adapter_for_its_own(tmp_path, monkeypatch):
    """Where PEFT is installed, transformers asks adapter_config.json for its model, and ours names none."""
    auto_factory = pytest.importorskip(
        "transformers.models.auto.auto_factory",
        reason="needs transformers: pip install '.[oracle]'",
    )
    import reference

    monkeypatch.setattr(auto_factory, "is_peft_available", lambda: True)
    folder = checkpoints.make_agent(tmp_path, "llama")
    with pytest.raises(KeyError):
        reference.AutoModelForCausalLM.from_pretrained(folder)
    model = reference.load_model(folder, torch.float32)
    assert not model.training and model.dtype == torch.float32


def test_the_start_is_timed_as_an_agent_runs(gpu_speed, tmp_path, monkeypatch, capsys):
    """With gradients neither kernels nor graphs are used. What was timed before the end is told at once."""
    seen = []
    monkeypatch.setattr(
        generate_module,
        "generate",
        lambda *_: seen.append((torch.is_grad_enabled(), capsys.readouterr().out)),
    )
    monkeypatch.setattr(sys, "argv", ["-c", str(checkpoints.make_agent(tmp_path, "llama")), "cpu"])
    with torch.enable_grad():  # puts back what START changes
        exec(gpu_speed.START, {})
    assert (
        [enabled for enabled, _ in seen] == [False] * 3
        and '"load"' in seen[0][1]
        and '"first token"' in seen[1][1]
    )


def test_the_memory_of_a_long_prompt_has_its_cache(gpu_speed, tmp_path, monkeypatch):
    """Nothing is held when it begins to be measured."""
    folder, agents, held = checkpoints.make_agent(tmp_path, "llama", vocab_size=1000), [], []
    folders = dict.fromkeys(("planner", "critic", "solver"), folder)
    monkeypatch.setattr(gpu_speed, "agent_folders", lambda _: (folders, None))
    monkeypatch.setattr(
        gpu_speed,
        "load_agent",
        lambda *args, load=gpu_speed.load_agent, **options: (
            agents.append(load(*args, **options)) or agents[-1]
        ),
    )
    monkeypatch.setattr(
        gpu_speed.bench_train,
        "peak",
        lambda work, device: held.append(agents[-1].prefix_cache) or (work(), 1.0, 1),
    )
    with torch.no_grad():
        gpu_speed.long(SimpleNamespace(device="cpu", small=True))
    assert held == [None] * 3
