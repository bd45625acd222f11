"""tools/released.py on miniatures of the nineteen released repositories behind the stand-in hub: it finds nothing where
nothing is wrong, and names what is.
"""

import contextlib
import json
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import checkpoints
import pytest
import released
import released_checks as checks
import standin
import torch
from huggingface_hub import constants
from safetensors.torch import load_file, save_file

from minimas.commands.failures import command
from minimas.compat.released import FILE, recorded_config
from minimas.config import parse_config
from minimas.fast import blocks
from minimas.link import InnerLink, OuterLink
from minimas.load import on_meta
from minimas.runs import needs
from minimas.styles import STYLES
from minimas.system import load_mas_system

RECORDED = json.loads(FILE.read_text(encoding="utf-8"))
CHATML = "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nU<|im_end|>\n<|im_start|>assistant\n"
LLAMA = (
    "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nToday Date: 26 Jul 2024\n\nS<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\nU<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"
)
GEMMA = "<bos><start_of_turn>user\nS\n\nU<end_of_turn>\n<start_of_turn>model\n"
PROMPTS = {  # what the miniatures' templates make of S and U
    "llama": LLAMA,
    "mistral": "<s>[INST] S\n\nU [/INST]",
    "qwen2": CHATML,
    "qwen3": CHATML + "<think>\n\n</think>\n\n",
    "qwen3_5_text": CHATML + "<think>\n\n</think>\n\n",
    "gemma3": GEMMA,
}


# What is recorded


def test_what_is_recorded_is_of_the_released_repositories():
    expected = checks.Expected(FILE)
    names = set()
    for style, (repositories, links) in checkpoints.RELEASED.items():
        names |= set(repositories.values())
        entry = expected.repository(repositories["links"])
        by_task = STYLES[style].links_by_task
        assert entry["tasks"] == (["math", "code"] if by_task else [])
        files = {key: f"{name}-Outerlink" for key, name in links.items()}
        assert {key: name for key, (name, _, _) in entry["links"].items()} == files
        widths = {}
        for role in STYLES[style].order:
            agent = expected.repository(repositories[role])
            widths[role] = agent["model"]["config"]["hidden_size"]
            assert ("adapter.pt" in agent["more_files"]) != by_task
            assert repositories[role].endswith(
                RECORDED["repositories"][repositories[role]]["model"]
            )
        for (source, target), key in STYLES[style].edges.items():
            assert entry["links"][key][1:] == [widths[source], widths[target]]
    assert names == set(RECORDED["repositories"]) and len(names) == 19


def test_recorded_widths_are_those_of_the_goldens():
    """Both were copied from the same pages: the tests' widths, and those of released.json."""
    for name, (_, widths) in checkpoints.REAL_WIDTHS.items():
        config = RECORDED["models"][name]["config"]
        for field in "hidden_size", "intermediate_size", "num_attention_heads", "head_dim":
            assert config[field] == widths[field], (name, field)
        if "linear_num_value_heads" in widths:
            assert config["linear_num_value_heads"] == widths["linear_num_value_heads"]


def test_recorded_bytes_are_those_of_links():
    """A file of a link is its weights in two bytes each, and a pickle that is always as long."""
    found = 0
    for name, entry in RECORDED["repositories"].items():
        for file, n in entry.get("bytes", {}).items():
            with torch.device("meta"):
                if "links" in entry:
                    (sizes,) = (e[1:] for e in entry["links"].values() if file == e[0] + ".pt")
                    link, more = OuterLink(*sizes), 4309
                elif file.endswith(".pt"):
                    config = RECORDED["models"][entry["model"]]["config"]
                    link, more = InnerLink(config["hidden_size"]), 3213
                else:
                    continue
            found += 1
            assert n == 2 * sum(p.numel() for p in link.parameters()) + more, (name, file)
    assert found == 11


def test_recorded_configs_are_by_hub_id():
    assert recorded_config("RecursiveMAS/Mixture-Science-BioMistral-7B")["sliding_window"] == 4096
    assert recorded_config("RecursiveMAS/Mixture-Outerlinks") is None
    assert recorded_config("someone/Mixture-Science-BioMistral-7B") is None
    assert recorded_config("/a/folder") is None
    for agent in RECORDED["models"].values():
        family, config, _ = parse_config(FILE, agent["config"])
        decoder = on_meta(family, config)
        assert len(decoder.layers) == agent["config"]["num_hidden_layers"]
        assert set(agent.get("unsure", {})) <= {*agent, *agent["config"]}


# Miniatures


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """style -> the folder of its repositories, with nothing wrong in them."""
    made = {}

    def folder(style):
        if style not in made:
            made[style] = tmp_path_factory.mktemp(style)
            checkpoints.make_released(made[style], style)
        return made[style]

    return folder


@pytest.fixture(scope="module")
def expectations(whole, tmp_path_factory):
    """style -> a file in the form of released.json that expects the miniatures: their sizes, and all hashes."""
    made = {}

    def file(style):
        if style not in made:
            made[style] = tmp_path_factory.mktemp("expected") / f"{style}.json"
            made[style].write_text(json.dumps(expected_miniatures(whole(style), style)))
        return made[style]

    return file


def expected_miniatures(root, style):
    """What is expected of a style's repositories in miniature, in the form of released.json."""
    models = {}
    repositories = {}
    agents = checkpoints.SYSTEMS[style]
    widths = {role: sizes["hidden_size"] for role, (_, sizes) in agents.items()}
    edges = {key: edge for edge, key in STYLES[style].edges.items()}
    for role, name in checkpoints.RELEASED[style][0].items():
        folder = root / "RecursiveMAS" / name
        files = sorted(folder.iterdir())
        entry = dict(RECORDED["repositories"][name])
        entry["bytes"] = {file.name: file.stat().st_size for file in files}
        entry["sha256"] = {file.name: checks.sha256(file) for file in files}
        repositories[name] = entry
        if role == "links":
            links = {}
            for key, (file, _, _) in entry["links"].items():
                source, target = edges[key]
                links[key] = [file, widths[source], widths[target]]
            entry["links"] = links
        else:
            entry["model"] = name
            models[name] = expected_model(folder, agents[role][0])
    return {
        "agent_files": RECORDED["agent_files"],
        "models": models,
        "repositories": repositories,
    }


def expected_model(folder, kind):
    """What is expected of a miniature of this family."""
    config = json.loads((folder / "config.json").read_text())
    specials = checkpoints.FAMILIES[kind][1]
    return {
        "config": config.get("text_config", config),
        "eos_token_id": [0, 1],
        "top_k": 20,
        "eos_token": specials[1],
        "prompt": PROMPTS[kind],
    }


@pytest.fixture
def damaged(whole, tmp_path, monkeypatch):
    """style -> the folder of a copy of its repositories on a hub, for a test to damage; the client asks that hub."""
    with contextlib.ExitStack() as stack:

        def copy(style):
            root = tmp_path / "hub"
            for name in checkpoints.RELEASED[style][0].values():
                shutil.copytree(whole(style) / "RecursiveMAS" / name, root / "RecursiveMAS" / name)
            hub = stack.enter_context(standin.serve(root))
            standin.connect(monkeypatch, hub, tmp_path / "cache")
            return root / "RecursiveMAS"

        yield copy


@pytest.fixture
def report(tmp_path):
    return checks.Report(tmp_path / "report.json", {"style": "a style"})


def found(report, status):
    """The lines of the page with this status."""
    return [str(finding) for finding in report.findings if finding.status == status]


def faults(report):
    return found(report, checks.DIFFERS) + found(report, checks.MISSING)


PLANNER = checkpoints.RELEASED["sequential_light"][0]["planner"]
LINKS = checkpoints.RELEASED["sequential_light"][0]["links"]


def looked_at(damaged, expectations, report, change, check):
    """Damage a copy of the planner's repository by change(folder), then check(folder, expected, its entry)."""
    folder = damaged("sequential_light") / PLANNER
    change(folder)
    expected = checks.Expected(expectations("sequential_light"))
    check(folder, expected, expected.repository(PLANNER))
    return report


def nothing(folder):
    """No damage."""


def edit(folder, name, change):
    """Change the object in a JSON file."""
    value = json.loads((folder / name).read_text())
    change(value)
    (folder / name).write_text(json.dumps(value))


def reshape(folder):
    """Cut a row off a tensor."""
    file = folder / "model.safetensors"
    weights = load_file(file)
    name = "model.layers.1.self_attn.q_proj.weight"
    weights[name] = weights[name][:-1].clone()
    save_file(weights, file)


def drop_tensors(folder):
    """One tensor away, one too many."""
    file = folder / "model.safetensors"
    weights = load_file(file)
    weights["model.layers.9.extra"] = weights.pop("model.norm.weight")
    save_file(weights, file)


@pytest.mark.parametrize(
    "change, lines",
    [
        (nothing, []),
        (
            lambda folder: (folder / "tokenizer.json").unlink(),
            ["missing planner     tokenizer.json: not there; expected a file of this name"],
        ),
        (
            lambda folder: (folder / "adapter(code).pt").rename(folder / "adapter_code.pt"),
            [
                "missing planner     adapter(code).pt: not there, but adapter_code.pt; "
                "expected a file of this name"
            ],
        ),
        (
            lambda folder: (folder / "chat_template.jinja").write_text("{{ messages }}"),
            ["differs planner     bytes of chat_template.jinja: 14; expected 301"],
        ),
    ],
)
@pytest.mark.parametrize("place", ("hub", "folder", "cache"))
def test_names(damaged, expectations, report, change, lines, place, monkeypatch):
    def check(folder, expected, entry):
        names = expected.files(PLANNER)
        source = folder if place == "folder" else f"RecursiveMAS/{PLANNER}"
        if place == "cache":
            checks.fetched(source, "planner", [*names, "adapter_code.pt"])
            monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
        checks.check_names(report, "planner", source, names, entry)

    looked_at(damaged, expectations, report, change, check)
    assert faults(report) == lines
    assert bool(found(report, checks.NOTED)) == any("adapter_code" in line for line in lines)


@pytest.mark.parametrize(
    "change, lines",
    [
        (nothing, []),
        (
            reshape,
            [
                "differs planner     tensor layers.1.self_attn.q_proj.weight: shape (95, 48); expected (96, 48)",
                "differs planner     tensors: 0 absent, 0 unknown, 1 of another shape; "
                "expected 36 as config.json makes them",
            ],
        ),
        (
            drop_tensors,
            [
                "differs planner     tensor layers.9.extra: shape (48,); expected no such tensor",
                "differs planner     tensors: 1 absent, 1 unknown, 0 of another shape; "
                "expected 36 as config.json makes them",
                "missing planner     tensor norm.weight: not there; expected shape (48,)",
            ],
        ),
    ],
)
def test_shapes(damaged, expectations, report, change, lines):
    def check(folder, expected, entry):
        checks.check_weights(report, "planner", folder, expected.decoder(entry))

    looked_at(damaged, expectations, report, change, check)
    assert faults(report) == lines
    noted = found(report, checks.NOTED)
    assert "noted   planner     lm_head.weight beside its tied embedding: True" in noted


@pytest.mark.parametrize(
    "file, change, line",
    [
        (
            "config.json",
            lambda value: value.update(intermediate_size=81),
            "differs planner     config.json: intermediate_size: 81; expected 80",
        ),
        (
            "config.json",
            lambda value: value["rope_parameters"].update(rope_theta=5),
            "differs planner     config.json: rope_parameters: ",
        ),
        (
            "adapter_config.json",
            lambda value: value.update(adapter_type="lora"),
            "differs planner     adapter_type: lora; expected ln_res_adapter",
        ),
        (
            "innerlink_config.json",
            lambda value: value["tasks"].pop("code"),
            "differs planner     innerlink_config.json: {'math': 'adapter(math).pt'}; expected {'math'",
        ),
    ],
)
def test_configs(damaged, expectations, report, file, change, line):
    def check(folder, expected, entry):
        checks.check_manifests(report, "planner", folder, entry)
        checks.check_config(report, "planner", folder, expected, entry)

    looked_at(damaged, expectations, report, lambda folder: edit(folder, file, change), check)
    (one,) = faults(report)
    assert one.startswith(line)


def test_texts_and_hashes(damaged, expectations, report):
    def check(folder, expected, entry):
        agent = checks.load_plain(report, "planner", folder, None, torch.device("cpu"))
        checks.check_text(report, "planner", folder, agent, entry)
        before = faults(report)
        (folder / "chat_template.jinja").write_text(
            "{{ messages[1].content + messages[0].content }}"
        )
        edit(folder, "generation_config.json", lambda value: value.update(eos_token_id=7, top_k=5))
        edit(folder, "tokenizer_config.json", lambda value: value.update(eos_token="<|im_start|>"))
        agent = checks.load_plain(report, "planner", folder, None, torch.device("cpu"))
        checks.check_text(report, "planner", folder, agent, entry)
        checks.check_hashes(report, "planner", PLANNER, folder, entry)
        assert not before

    looked_at(damaged, expectations, report, nothing, check)
    whats = [line.split(": ")[0].split(None, 2)[2] for line in faults(report)]
    assert whats == [
        "eos_token_id",
        "top_k",
        "eos_token",
        "chat template",
        "sha256 of chat_template.jinja",
        "sha256 of generation_config.json",
        "sha256 of tokenizer_config.json",
    ]
    written = json.loads(report.file.read_text()) if report.file.exists() else {"files": {}}
    assert not written["files"] and report.files[PLANNER]["config.json"]["bytes"] > 0


def test_links(damaged, expectations, report):
    folder = damaged("sequential_light") / LINKS
    expected = checks.Expected(expectations("sequential_light"))
    entry = expected.repository(LINKS)
    edges = STYLES["sequential_light"].edges
    file = folder / "Planner-Critic-Outerlink(math).pt"
    checks.check_outer_manifest(report, folder, entry, edges)
    checks.check_link(report, "links", file, OuterLink, (48, 40), checks.plain_outer)
    assert not faults(report) and len(report.findings) == 2 + 1

    checks.check_link(report, "links", file, OuterLink, (48, 56), checks.plain_outer)
    assert "ln_target.weight: (40,); expected (56,)" in faults(report)[0]
    edit(folder, "outerlink_config.json", lambda v: v["tasks"]["code"]["adapters"].pop())
    edit(folder, "outerlink_config.json", wrong_width)
    report.findings.clear()
    checks.check_outer_manifest(report, folder, entry, edges)
    assert faults(report) == [
        "differs links       outerlink_config.json, math: in_dim of outer_12: 49; expected 48",
        "differs links       outerlink_config.json, code: keys: ['outer_12', 'outer_23']; "
        "expected ['outer_12', 'outer_23', 'outer_31']",
    ]


def wrong_width(manifest):
    manifest["tasks"]["math"]["adapters"][0]["in_dim"] = 49


@pytest.mark.parametrize(
    "kind, sizes, plain",
    [(InnerLink, (48,), checks.plain_inner), (OuterLink, (48, 40), checks.plain_outer)],
)
def test_a_link_that_computes_something_else(kind, sizes, plain, tmp_path, report):
    """If the file's link were computed in another way than ours, it would be found."""
    file = tmp_path / "link.pt"
    link = checkpoints.randomize(kind(*sizes), 1, 0.2)
    torch.save(link.state_dict(), file)
    checks.check_link(report, "links", file, kind, sizes, plain)
    assert not faults(report) and len(report.findings) == 1
    off_by_little = lambda state: lambda h: plain(state)(h) + 1e-3
    checks.check_link(report, "links", file, kind, sizes, off_by_little)
    assert "against torch modules" in faults(report)[0]
    torch.save([1, 2], file)
    checks.check_link(report, "links", file, kind, sizes, plain)
    assert "AttributeError" in faults(report)[1], "a part that fails is a finding"


def test_logits_of_others(damaged, expectations, report, monkeypatch):
    """Logits that are off, and token ids that differ, are found; so is a fast path that computes something else."""

    def check(folder, expected, entry):
        agent = checks.load_plain(report, "planner", folder, None, torch.device("cpu"))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(checks, "make_fast", lambda agent: agent.model.norm.weight.data.mul_(1.1))
            numbers = checks.check_fast(report, "planner", agent, "some text", 50)
        args = report, "planner", folder, "prompt", numbers, torch.device("cpu")
        monkeypatch.setattr(checks, "their_ids", lambda *args: numbers.of_chat)
        monkeypatch.setattr(checks, "their_logits", lambda *args: numbers.logits)
        checks.check_transformers(*args)
        assert len(faults(report)) == 3
        monkeypatch.setattr(checks, "their_ids", lambda *args: numbers.of_chat[1:])
        monkeypatch.setattr(checks, "their_logits", lambda *args: numbers.logits * float("nan"))
        checks.check_transformers(*args)

    looked_at(damaged, expectations, report, nothing, check)
    fast, steps, latents, ids, theirs = faults(report)
    assert "logits after 50 tokens in float32, fast path against plain" in fast
    assert "8 steps of the fast path against plain" in steps
    assert "5 latents of the fast path against plain" in latents
    assert "token ids" in ids
    assert theirs.endswith("minimas against transformers: nan; expected at most 2e-04")


@pytest.mark.parametrize("is_broken", (False, True))
def test_a_step_that_computes_something_else(damaged, expectations, report, monkeypatch, is_broken):
    """A prefill does not take it: it shows in tokens that are read one at a time, and in latents."""
    if is_broken:
        monkeypatch.setattr(blocks.CpuBlock, "step", lambda block, x, *others: x * 0 + 7)

    def check(folder, expected, entry):
        device = torch.device("cpu")
        agent = checks.load_plain(report, "planner", folder, torch.float32, device)
        checks.check_fast(report, "planner", agent, "some text", 50)

    looked_at(damaged, expectations, report, nothing, check)
    whats = [line.split(": ")[0].split(None, 2)[2] for line in faults(report)]
    right = [line.split(": ")[0].split(None, 2)[2] for line in found(report, checks.OK)][1:]
    prefill = "logits after 50 tokens in float32, fast path against plain"
    steps = ["8 steps of the fast path against plain", "5 latents of the fast path against plain"]
    assert (right, whats) == (([prefill], steps) if is_broken else ([prefill, *steps], []))


def test_what_was_not_done_is_missing(report):
    with report.part("planner", "loading it"):
        raise ImportError("No module named 'transformers'")
    with report.part("planner", "reading it"):
        raise RuntimeError("out of memory")
    with report.part("planner", "something"):
        raise KeyError("x")
    assert [finding.status for finding in report.findings] == ["missing", "missing", "differs"]
    assert report.failed and report.page().startswith(
        "a style: 0 ok, 1 differs, 2 missing, 0 noted"
    )
    assert len(json.loads(report.file.read_text())["findings"]) == 3
    report.add(checks.OK, "planner", "home", f"{Path.home()}/x\n" + "y" * 500)
    assert report.findings[-1].found.startswith("~/x\\nyyy") and "..." in report.findings[-1].found


@pytest.mark.parametrize("home", (None, "/", "/a/home"))
def test_who_has_no_home(tmp_path, monkeypatch, home):
    """In some containers a user has none, or it is the root of all paths."""

    def no_home():
        raise RuntimeError("Could not determine home directory.")

    if home is None:
        monkeypatch.setattr(checks.Path, "home", no_home)
    else:
        monkeypatch.setenv("HOME", home)
    report = checks.Report(tmp_path / "report.json", {"style": "a style"})
    report.add(checks.OK, "planner", "a file", "/a/home/file")
    assert report.findings[0].found == ("~/file" if home == "/a/home" else "/a/home/file")


# The command


def run(monkeypatch, *words):
    """The command's exit status."""
    monkeypatch.setattr(sys, "argv", ["released.py", *map(str, words)])
    try:
        command(released.main)
    except SystemExit as ended:
        return ended.code
    return 0


@pytest.mark.parametrize(
    "words, message",
    [
        (["tiny"], "style 'tiny' is not known, expected one of sequential_light"),
        (["mixture", "--expect", "nowhere.json"], "--expect nowhere.json is not there"),
        (["mixture", "--tokens", "0"], "whole numbers from 1 up"),
        (["mixture", "--device", "nothing"], "device 'nothing' cannot be used"),
        (["mixture", "--out", "no/folder/x.json"], "--out 'no/folder/x.json' cannot be written"),
        (["mixture"], "the hub does not answer, and RecursiveMAS/Mixture-Math"),
        ([], "required: STYLE"),
    ],
)
def test_bad_arguments(words, message, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:1")
    assert run(monkeypatch, *words) == 2
    assert message in capsys.readouterr().err


def test_an_expectation_of_another_form(monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "expected.json"
    file.write_text('{"agent_files": [], "models": {}, "repositories": {}}')
    monkeypatch.setattr(released, "check_reachable", lambda sources: None)
    assert run(monkeypatch, "mixture", "--expect", file) == 2
    assert "has no repository Mixture-Math" in capsys.readouterr().err
    file.write_text("{}")
    assert run(monkeypatch, "mixture", "--expect", file) == 2
    assert "has no agent_files" in capsys.readouterr().err


@pytest.mark.parametrize(
    "place, message",
    [
        ("memory", "cpu has 1.00 MB of memory, and this run needs at least "),
        ("disk", " are to be downloaded, and the hub's cache "),
    ],
)
def test_what_does_not_fit_is_not_downloaded(
    whole, expectations, monkeypatch, tmp_path, capsys, place, message
):
    if place == "memory":
        monkeypatch.setattr(needs, "memory_of", lambda device: 1e6)
    else:
        usage = SimpleNamespace(free=1000)
        monkeypatch.setattr(checks.shutil, "disk_usage", lambda path: usage)
    style = "sequential_light"
    cache = tmp_path / "cache"
    out = tmp_path / "found.json"
    with standin.serve(whole(style)) as hub:
        standin.connect(monkeypatch, hub, cache)
        assert run(monkeypatch, style, *SHORT, "--expect", expectations(style), "--out", out) == 2
    told = capsys.readouterr().err
    assert message in told
    assert ("--quantize int8" if place == "memory" else "make room, or set HF_HUB_CACHE") in told
    assert not list(cache.rglob("*.safetensors"))


SHORT = ("--device", "cpu", "--tokens", "80", "--max-new-tokens", "6")


def test_quantize_is_passed_on(whole, expectations, report, monkeypatch):
    """To the system that is asked; its logits are noted beside those from before."""
    asked = {}

    def load(style, quantize=None, **options):
        asked[quantize] = options["checkpoints"]
        return load_mas_system(style, **options)

    style = "deliberation"
    sources = STYLES[style].sources(whole(style) / "RecursiveMAS")
    monkeypatch.setattr(released, "QUANTIZES", True)
    monkeypatch.setattr(released, "load_mas_system", load)
    monkeypatch.setattr(released, "QUESTIONS", {"What is 1 + 1?": "2"})
    words = [style, *SHORT, "--max-new-tokens", "1", "--quantize", "int8", "--out", report.file]
    monkeypatch.setattr(sys, "argv", ["released.py", *map(str, words)])
    args = released.arguments()
    reflector = checks.load_plain(
        report, "reflector", sources["reflector"], None, torch.device("cpu")
    )
    ids = torch.arange(40)[None]
    logits = checks.logits(reflector, ids)
    numbers = {"reflector": checks.Numbers(ids, logits, [], torch.float32)}
    released.check_system(report, sources, STYLES[style], numbers, args)
    assert asked == {"int8": sources} and not faults(report)
    noted = [line for line in found(report, checks.NOTED) if "int8" in line]
    assert len(noted) == 2 and "int8 and before: 100.0% of 40 agree" in noted[1]


def test_a_repository_that_is_closed(damaged, report):
    """What the hub says of it is told, not that it is not in the cache."""
    damaged("sequential_light")
    with report.part("planner", "list of files"):
        checks.listed("RecursiveMAS/nobody-has-this", ["config.json"])
    (line,) = faults(report)
    assert "RecursiveMAS/nobody-has-this is not on the hub, or private" in line


def test_a_mode_that_nothing_knows(monkeypatch, capsys):
    monkeypatch.setattr(released, "QUANTIZES", False)
    assert run(monkeypatch, "mixture", "--quantize", "int8") == 2
    assert "load_mas_system knows no such argument" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("style", checkpoints.RELEASED)
def test_nothing_is_wrong_with_the_miniatures(
    whole, expectations, style, monkeypatch, tmp_path, capsys
):
    pytest.importorskip("transformers", reason="needs transformers: pip install '.[oracle]'")
    out = tmp_path / "found.json"
    with standin.serve(whole(style)) as hub:
        standin.connect(monkeypatch, hub, tmp_path / "cache")
        assert run(monkeypatch, style, *SHORT, "--expect", expectations(style), "--out", out) == 0
    page = capsys.readouterr().out
    assert " 0 differs, 0 missing," in page.split("\n")[0]
    told = json.loads(out.read_text())
    assert set(told["files"]) == set(checkpoints.RELEASED[style][0].values())
    assert [one["channel"] for one in told["texts"]] == ["latent"] * 3 + ["text"] * 3
    for role in STYLES[style].order:
        lines = [one for one in told["findings"] if one["where"] == role]
        assert sum("minimas against transformers" in one["what"] for one in lines) == 1
        assert sum("against torch modules" in one["what"] for one in lines) >= 1
    assert str(tmp_path) not in out.read_text(), "no path of this machine is handed in"


@pytest.mark.slow
def test_each_fault_is_named_and_the_rest_goes_on(
    damaged, expectations, monkeypatch, tmp_path, capsys
):
    pytest.importorskip("transformers", reason="needs transformers: pip install '.[oracle]'")
    repositories, _ = checkpoints.RELEASED["sequential_light"]
    root = damaged("sequential_light")
    (root / repositories["planner"] / "tokenizer.json").unlink()
    file = root / repositories["critic"] / "adapter(code).pt"
    file.rename(file.with_name("adapter_code.pt"))
    solver = root / repositories["solver"]
    reshape(solver)
    out = tmp_path / "found.json"
    options = *SHORT, "--expect", expectations("sequential_light"), "--out", out
    assert run(monkeypatch, "sequential_light", *options) == 1
    page = capsys.readouterr().out
    for line in (
        "missing planner     tokenizer.json: not there",
        "missing planner     loading it: ",
        "missing critic      adapter(code).pt: not there, but adapter_code.pt",
        "differs solver      tensor layers.1.self_attn.q_proj.weight: shape (95, 56); expected (96, 56)",
        "missing solver      loading it: ",
        "missing system      loading it: ",
    ):
        assert line in page, line
    assert (
        "ok      critic      logits after 80 tokens in float32, minimas against transformers"
        in page
    )
    assert (
        "ok      links       Solver-Planner-Outerlink(code).pt, 10 tensors in bfloat16, against torch modules"
        in page
    )
    assert json.loads(out.read_text())["texts"] == []
