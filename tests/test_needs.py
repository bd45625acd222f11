"""What --needs prints is what loading and running take; a run that cannot fit is refused before it loads."""

import inspect
import json
import re
import socket
import sys
import time
from dataclasses import replace
from pathlib import Path

import checkpoints
import needs_table
import pytest
import standin
import torch
from huggingface_hub import constants, snapshot_download

import minimas
from minimas.commands import ask
from minimas.commands import needs as printed
from minimas.compat import hub as hub_client
from minimas.compat.hub import download
from minimas.devices import usable_device
from minimas.evaluate import __main__ as evaluate
from minimas.evaluate import answering
from minimas.fast.linear import MergedLinear, PackedLinear
from minimas.link import OuterLink
from minimas.load import load_model
from minimas.quantize import named_weights
from minimas.runs import needs
from minimas.styles import STYLES

DOCS = Path(__file__).parent.parent / "docs"


def planned(monkeypatch, *options):
    """(origin, style, [settings]) of a command with these options."""
    monkeypatch.setattr(sys, "argv", ["recurse", *map(str, options)])
    args = ask.arguments()
    style = ask.style_named(args.style)
    return ask.origin_of(args), style, [ask.checked_settings(args, style)]


def from_folders(folders, style):
    return [
        "--style",
        style,
        *(
            part
            for role, folder in folders(style).items()
            for part in ("--checkpoint", f"{role}={folder}")
        ),
    ]


def nbytes(tensors):
    """The bytes of tensors, each memory once; what is packed for oneDNN has no storage that could be asked for."""
    held = {}
    for tensor in tensors:
        if tensor.layout is torch.strided:
            storage = tensor.untyped_storage()
            held[storage.data_ptr()] = storage.nbytes()
        else:
            held[id(tensor)] = tensor.numel() * tensor.element_size()
    return sum(held.values())


def in_memory(model):
    """The weights of a decoder on the fast path or not: parameters, and what merged and packed linears hold."""
    held = list(model.parameters())
    for module in model.modules():
        for value in vars(module).values():
            packed = value.packed if isinstance(value, MergedLinear) else value
            if isinstance(packed, PackedLinear):
                held += [t for t in (packed.weight, packed.bias) if t is not None]
    return nbytes(held)


@pytest.mark.parametrize("style", checkpoints.SYSTEMS)
@pytest.mark.parametrize("options", [("--plain",), (), ("--dtype", "bfloat16", "--plain")], ids=str)
def test_weights_and_links_are_those_of_the_loaded_system(folders, monkeypatch, style, options):
    origin, entry, points = planned(monkeypatch, *from_folders(folders, style), *options)
    system = minimas.load_mas_system(
        style,
        checkpoints=folders(style),
        device="cpu",
        dtype=origin.dtype,
        fast=origin.fast,
        offload=origin.offload,
    )
    for role, need in needs.needs_of(origin, entry, points).items():
        agent = system.agents[role]
        assert need.weights == in_memory(agent.model), role
        if not origin.fast and origin.dtype is None:  # the miniatures' links are stored as float32
            links = [
                agent.inner_link,
                *(link for edge, link in system.outer_links.items() if edge[0] == role),
            ]
            assert need.links == nbytes(p for link in links for p in link.parameters()), role


@pytest.mark.parametrize("style", checkpoints.SYSTEMS)
@pytest.mark.parametrize("options", [("--rollouts", "3"), ("--channel", "text")], ids=str)
def test_caches_are_those_of_a_run(folders, monkeypatch, style, options):
    origin, entry, points = planned(
        monkeypatch,
        *from_folders(folders, style),
        *options,
        "--max-new-tokens",
        9,
        "--latent-steps",
        4,
        "--batch-size",
        2,
        "--no-retry",
        "--rounds",
        2,
    )
    system = minimas.load_mas_system(style, checkpoints=folders(style), device="cpu")
    made = {role: [] for role in entry.order}
    for role, agent in system.agents.items():

        def spy(B, S, role=role, agent=agent, make_cache=agent.make_cache):
            cache = make_cache(B, S)
            made[role].append(
                (sum(getattr(c, name).nbytes for c in cache for name in c.tensors), S)
            )
            return cache

        monkeypatch.setattr(agent, "make_cache", spy)
    questions = entry.questions(["How many primes are there below 30?"] * 2)
    list(system.stream(questions, points[0]))
    for role in entry.order:
        largest, S = max(made[role])
        room = 9 if points[0].channel == "text" or role == entry.order[-1] else 4
        assert 2 * needs.needs_of(origin, entry, points, prompt=S - room)[role].cache == largest, (
            role
        )


@pytest.mark.parametrize("style", checkpoints.SYSTEMS)
def test_decoders_without_weights_have_caches_of_the_same_size(folders, style):
    system = minimas.load_mas_system(style, checkpoints=folders(style), device="cpu", fast=True)
    for role, empty in needs.empty_decoders(system).items():
        assert all(weight.is_meta for weight in empty.parameters())
        for S in (1, 70):
            real = needs.layers_bytes(system.agents[role].model, S)
            assert needs.layers_bytes(empty, S) == real > 0, role


def test_an_agent_that_hears_itself_has_an_outer_link_for_it(monkeypatch):
    origin, entry, points = planned(monkeypatch)
    own = replace(entry, edges=entry.edges | {("critic", "critic"): "outer_22"})
    before = needs.needs_of(origin, entry, points)["critic"]
    folder = Path(entry.checkpoints["critic"])
    D = json.loads((folder / "config.json").read_text())["hidden_size"]
    with_itself = needs.needs_of(origin, own, points)["critic"].links
    assert with_itself - before.links == nbytes(OuterLink(D, D).parameters())


def test_agents_that_send_nothing_make_no_cache(folders, monkeypatch):
    origin, entry, points = planned(
        monkeypatch, *from_folders(folders, "sequential_light"), "--latent-steps", 0
    )
    caches = [need.cache for need in needs.needs_of(origin, entry, points).values()]
    assert caches[:2] == [0, 0] and caches[2] > 0


# On the hub


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    root = tmp_path_factory.mktemp("hub")
    for style in ("sequential_light", "mixture"):
        checkpoints.make_released(root, style)
    with standin.serve(root) as server:
        yield server


@pytest.mark.slow
@pytest.mark.parametrize("style, task", [("sequential_light", "code"), ("mixture", "math")])
def test_only_config_json_is_fetched(hub, tmp_path, monkeypatch, capsys, style, task):
    standin.connect(monkeypatch, hub, tmp_path)
    hub.asked.clear()
    monkeypatch.setattr(
        sys, "argv", ["recurse", "--style", style, "--needs", "--task", task, "--device", "cpu"]
    )
    ask.main()
    first = capsys.readouterr().out
    assert {name.partition("/")[2] for name in hub.asked} == {"config.json"}
    sources = STYLES[style].checkpoints
    patterns = {role: printed.agent_patterns(task) for role in STYLES[style].order}
    patterns["links"] = [
        "outerlink_config.json",
        "*(code).pt" if style == "sequential_light" else "*.pt",
    ]
    listed = {role: printed.files_of(source, *patterns[role]) for role, source in sources.items()}
    minimas.load_mas_system(style, task=task, device="cpu")
    sizes = {name: (hub.root / "RecursiveMAS" / name).stat().st_size for name in hub.asked}
    for role, source in sources.items():
        own = {
            name: size for name, size in sizes.items() if name.startswith(Path(source).name + "/")
        }
        config = own.get(f"{Path(source).name}/config.json", 0)
        assert listed[role] == (sum(own.values()), sum(own.values()) - config), role
        assert printed.files_of(source, *patterns[role]) == (listed[role][0], 0), "all is here"
    whole = re.search(r"^whole +(\S+ .B) +(\S+ .B)", first, re.MULTILINE)
    assert list(whole.groups()) == [
        needs.size(sum(pair[i] for pair in listed.values())) for i in (0, 1)
    ]
    monkeypatch.setattr(sys, "argv", [*sys.argv, "--checkpoint", str(hub.root / "RecursiveMAS")])
    ask.main()
    assert needs.size(sum(pair[0] for pair in listed.values())) in capsys.readouterr().out, (
        "local folders"
    )


# What does not fit


@pytest.fixture
def memory(monkeypatch):
    """Sets the memory of the CPU; loading would be an error."""

    def set_to(n):
        monkeypatch.setattr(needs, "memory_of", lambda device: n)
        for module in ask, answering:
            monkeypatch.setattr(
                module, "load_mas_system", lambda *args, **options: pytest.fail("it loads")
            )

    return set_to


def test_a_run_that_cannot_fit_is_refused_before_it_loads(memory, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    origin, style, points = planned(monkeypatch, "--prompt", "1 +2", "--prompt", "3 +4")
    least = needs.on_devices(needs.needs_of(origin, style, points, prompt=0), 2, False, least=True)[
        torch.device("cpu")
    ]
    memory(least)
    needs.check_memory(origin, style, points, 2)  # just fits
    memory(least - 1)
    with pytest.raises(minimas.InputError) as told:
        ask.main()
    assert str(told.value).startswith(
        f"cpu has {needs.size(least - 1)} of memory, and this run needs at least "
        f"{needs.size(least)} there"
    )
    assert str(told.value).endswith(
        " there for 2 at once: try --batch-size 1, --dtype bfloat16, --quantize int8, --quantize int4, "
        "fewer --max-new-tokens or another --device; --needs prints a table"
    ), "on a CPU --offload is no help"
    monkeypatch.setattr(sys, "argv", ["evaluate", "--dataset", "tiny", "--limit", "1"])
    memory(10**6)
    with pytest.raises(minimas.InputError, match="for 1 at once"):
        evaluate.main()


@pytest.mark.parametrize(
    "options",
    [
        (),
        ("--offload",),
        ("--channel", "text"),
        ("--latent-steps", "0"),
        ("--rounds", "1", "--plain"),
    ],
    ids=str,
)
def test_no_run_needs_less_than_what_is_refused(folders, monkeypatch, options):
    """The bound that refuses is below what loading and one run hold in fact."""
    origin, entry, points = planned(
        monkeypatch,
        *from_folders(folders, "sequential_scaled"),
        "--rounds",
        2,
        "--latent-steps",
        2,
        *options,
        "--max-new-tokens",
        6,
    )
    system = minimas.load_mas_system(
        "sequential_scaled",
        checkpoints=folders("sequential_scaled"),
        device="cpu",
        fast=origin.fast,
        offload=origin.offload,
    )
    held = [0]
    for agent in system.agents.values():

        def spy(B, S, make_cache=agent.make_cache):
            cache = make_cache(B, S)
            held.append(sum(getattr(c, name).nbytes for c in cache for name in c.tensors))
            return cache

        monkeypatch.setattr(agent, "make_cache", spy)
    list(system.stream(entry.questions(["1 + 1"]), points[0]))
    weights = [in_memory(agent.model) for agent in system.agents.values()]
    most = sum(weights) + max(held) + (max(weights) if origin.offload else 0)
    least = needs.on_devices(
        needs.needs_of(origin, entry, points, prompt=0), 1, origin.offload, least=True
    )
    assert 0.5 * most < least[torch.device("cpu")] <= most


def test_memory_is_not_guessed(monkeypatch):
    unknown = float("inf")
    assert torch.cuda.is_available() or needs.memory_of(torch.device("cuda")) == unknown
    assert needs.memory_of(torch.device("mps")) == unknown
    if Path("/proc/meminfo").exists():
        assert 1e8 < needs.memory_of(torch.device("cpu")) < 1e14
        assert 1e6 < needs.available_on(torch.device("cpu")) < needs.memory_of(torch.device("cpu"))
    assert needs.available_on(torch.device("mps")) == unknown
    monkeypatch.setattr(needs, "Path", lambda name: Path("/nowhere"))
    assert needs.memory_of(torch.device("cpu")) == unknown
    assert needs.available_on(torch.device("cpu")) == unknown
    origin, style, points = planned(monkeypatch, "--prompt", "1 +2", "--rollouts", 10**9)
    needs.check_memory(origin, style, points, 1)  # unknown: it may run


def test_a_device_has_one_name(folders, monkeypatch):
    """What two agents need on one device is added up, however it is called."""
    given = "planner=cpu,critic=cpu:0,solver=cpu"
    origin, entry, points = planned(
        monkeypatch, *from_folders(folders, "sequential_light"), "--device", given
    )
    found = needs.needs_of(origin, entry, points)
    assert set(needs.on_devices(found, 1, False)) == {torch.device("cpu")}
    probes = {"cuda": "cuda:1", "cuda:1": "cuda:1", "mps": "mps:0"}  # cuda: the current one

    def zeros(*shape, device):
        probe = torch.Tensor([0]).as_subclass(Probe)
        probe.place = torch.device(probes[str(device)])
        return probe

    monkeypatch.setattr(torch, "zeros", zeros)
    for name, expected in probes.items():
        assert usable_device(name) == torch.device(expected)


class Probe(torch.Tensor):
    """A tensor that says it is at some place."""

    device = property(lambda self: self.place)


# On a GPU, and the released styles


@pytest.fixture
def on_gpus(monkeypatch):
    """Devices as named, whether they are here or not, for what is computed without them."""
    monkeypatch.setattr(
        needs,
        "devices_by_role",
        lambda roles, given: dict(
            zip(
                roles,
                map(
                    torch.device,
                    given.split(",") if "," in (given or "") else [given or "cuda"] * len(roles),
                ),
            )
        ),
    )


def test_offload(folders, monkeypatch, on_gpus):
    """With --offload a device holds one agent's weights and cache at a time, and its links; main memory holds all
    weights.
    """
    origin, entry, points = planned(
        monkeypatch, *from_folders(folders, "sequential_light"), "--device", "cuda:0,cuda:1,cuda:1"
    )
    planner, critic, solver = found = [*needs.needs_of(origin, entry, points).values()]
    named = dict(zip(entry.order, found))
    cpu, first, second = map(torch.device, ("cpu", "cuda:0", "cuda:1"))
    assert needs.on_devices(named, 8, True) == {
        cpu: planner.weights + critic.weights + solver.weights,
        first: planner.weights + 8 * planner.cache + planner.links,
        second: max(n.weights + 8 * n.cache for n in (critic, solver))
        + critic.links
        + solver.links,
    }
    assert needs.on_devices(named, 8, False)[second] == sum(
        n.weights + 8 * n.cache + n.links for n in (critic, solver)
    )
    least = critic.weights + solver.weights + 8 * max(critic.cache, solver.cache)
    assert needs.on_devices(named, 8, False, least=True)[second] == least
    text = printed.needs_text(origin, entry, points, "math").split("\n")
    assert [line.split()[0] for line in text[-4:]] == ["at", "cpu", "cuda:0", "cuda:1"]
    assert text[-1].endswith("?") and text[-3].split()[1:3] == ["0.00", "MB"]
    monkeypatch.setattr(
        needs, "memory_of", lambda device: 1000 if device == second else float("inf")
    )
    with pytest.raises(minimas.InputError, match=r"^cuda:1 has .* try --offload, --batch-size 1"):
        needs.check_memory(origin, entry, points, 8)


PARAMETERS = {  # of the decoders, counted by hand from the fields of their configs
    "Qwen3-1.7B": 1720574976,
    "Llama3.2-1B": 1235814400,
    "Llama3.2-3B": 3212749824,
    "Qwen2.5-Coder-3B": 3085938688,
    "Qwen2.5-Math-1.5B": 1543714304,
    "BioMistral-7B": 7241732096,
    "DeepSeek-R1-Distill-Qwen-1.5B": 1777088000,
    "Gemma3-4B": 3880263168,
    "Qwen3.5-2B": 1881825088,
    "Qwen3.5-4B": 4205751296,
    "Qwen3.5-9B": 8953803264,
}


@pytest.mark.parametrize("style", needs_table.RELEASED)
def test_the_recorded_shapes_are_the_counted_ones(style):
    found = needs_table.needs_on_gpu(style, None)
    for role, source in STYLES[style].checkpoints.items():
        name = next((name for name in PARAMETERS if str(source).endswith(f"-{name}")), None)
        if name:
            assert found[role].weights == 2 * PARAMETERS[name], role


@pytest.mark.parametrize("style", needs_table.RELEASED)
def test_the_table_of_the_released_styles(style):
    page = (DOCS / "evaluating.md").read_text(encoding="utf-8")
    rows = [needs_table.row(style, mode) for mode in needs_table.MODES]
    for cells in rows:
        assert f"| {' | '.join(cells)} |" in page
    assert f"| {' | '.join(needs_table.TITLES)} |" in page
    (shown,) = re.findall(
        rf"^\| `{style}` \|.*\| ([\d.]+)/([\d.]+)/([\d.]+) \|$",
        (DOCS.parent / "README.md").read_text("utf-8"),
        re.MULTILINE,
    )
    one_at_once = [float(cells[6].removesuffix(" GB")) for cells in rows]
    assert list(shown) == [f"{gigabytes:.1f}" for gigabytes in one_at_once]


def test_what_fits():
    assert needs_table.smallest(7e9) == "8 GB" and needs_table.smallest(7e9 + 1) == "12 GB"
    assert needs_table.smallest(23.1e9) == "none"


# Without the hub


def released_text(monkeypatch, style, *options):
    """What --needs prints for a style on a CPU in bfloat16."""
    origin, entry, points = planned(
        monkeypatch, "--style", style, "--device", "cpu", "--dtype", "bfloat16", *options
    )
    return printed.needs_text(origin, entry, points, entry.task)


@pytest.mark.parametrize("style", needs_table.RELEASED)
@pytest.mark.parametrize(
    "name, value", [("HF_HUB_OFFLINE", True), ("ENDPOINT", "http://127.0.0.1:1")]
)
def test_released_styles_need_no_network(style, name, value, tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, name, value)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(hub_client, "snapshot_download", only_from_the_cache)
    first, *_, whole, _, _, on_cpu = released_text(monkeypatch, style).split("\n")
    roles = ", ".join(STYLES[style].order)
    assert first == (
        f"the hub does not answer: the shapes of {roles} are those recorded for the released "
        "checkpoints on 2026-11-20, not all of them for certain (compat/released.json)"
    )
    weights = needs_table.row(style, "bfloat16")[2]
    assert whole.split()[:5] == ["whole", "?", "?", *weights.split()]


def only_from_the_cache(*args, **options):
    """The client's own function, which would wait for an answer for ever."""
    assert options["local_files_only"], "nothing is asked of a hub that does not answer"
    return snapshot_download(*args, **options)


def test_a_hub_that_says_nothing_is_not_waited_for(monkeypatch):
    """Not even one that takes the connection."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{silent.getsockname()[1]}")
        before = time.monotonic()
        assert not hub_client.is_reachable(0.2)
        assert time.monotonic() - before < 2


def test_what_the_cache_has_counts_more_than_what_is_recorded(hub, tmp_path, monkeypatch):
    standin.connect(monkeypatch, hub, tmp_path)
    assert hub_client.is_reachable(), "it answers, be it with an error"
    download(STYLES["sequential_light"].checkpoints["critic"], ["config.json"])
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    first, _, _, planner, critic, *_ = released_text(monkeypatch, "sequential_light").split("\n")
    assert first.startswith("the hub does not answer: the shapes of planner, solver are those")
    assert planner.split()[5:7] == ["3.44", "GB"] and critic.split()[6] == "MB"


def test_a_folder_counts_more_than_what_is_recorded(folders, monkeypatch, tmp_path):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    folder = folders("sequential_light")["planner"]
    text = released_text(monkeypatch, "sequential_light", "--checkpoint", f"planner={folder}")
    first, _, _, planner, *_ = text.split("\n")
    assert first.startswith("the hub does not answer: the shapes of critic, solver are those")
    assert planner.split()[4] == "MB", "the sizes of its files are known"


def test_shapes_that_nobody_recorded_are_an_error(monkeypatch, tmp_path):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(minimas.InputError, match="someone/else cannot be fetched from the hub"):
        released_text(monkeypatch, "sequential_light", "--checkpoint", "critic=someone/else")


def test_a_run_is_not_refused_by_recorded_shapes(monkeypatch, tmp_path):
    """It could not load: what is wrong with the hub is said."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(needs, "memory_of", lambda device: 1)
    origin, entry, points = planned(monkeypatch, "--style", "mixture", "--device", "cpu")
    with pytest.raises(minimas.InputError, match="HF_HUB_OFFLINE is set"):
        needs.check_memory(origin, entry, points, 1)


# Quantised


@pytest.mark.parametrize(
    "D, quantize, expected",
    [
        (64, None, 4 * (10 * 64 + 10)),
        (64, "int8", 10 * 64 + 4 * 10 + 4 * 10),  # a scale a row, and the bias in float32
        (64, "int4", 10 * 64 // 2 + 2 * 2 * (10 * 64 // 32) + 4 * 10),
        (40, "int4", 4 * (10 * 40 + 10)),  # groups of 32 do not divide it
    ],
)
def test_bytes_of_a_quantised_linear(D, quantize, expected):
    assert needs.weight_bytes(torch.nn.Linear(D, 10), quantize) == expected
    assert needs.weight_bytes(torch.nn.LayerNorm(D), quantize) == 4 * 2 * D
    assert needs.weight_bytes(torch.nn.Embedding(10, D), quantize) == 4 * 10 * D


@pytest.mark.parametrize("tied", (True, False))
def test_tied_embeddings_count_once(tied, tmp_path):
    """With the head, in whatever form that is."""
    folder = checkpoints.make_agent(tmp_path, "llama", tie_word_embeddings=tied, hidden_size=64)
    model, _ = needs.decoder_without_weights(folder)
    for mode in (None, "int8", "int4"):
        of_all = sum(needs.weight_bytes(module, mode) for module in model.modules())
        of_embedding = needs.weight_bytes(model.embed_tokens, mode)
        counted = needs.decoder_bytes(model, mode)
        assert counted == (of_all - of_embedding if tied else of_all)
        loaded = sum(
            weight.nbytes for _, weight in named_weights(load_model(folder, quantize=mode))
        )
        assert counted == loaded


def test_the_table_says_what_is_quantised(monkeypatch):
    origin, entry, points = planned(monkeypatch, "--device", "cpu")
    before = needs.needs_of(origin, entry, points)
    quantised = replace(origin, quantize="int8")
    lines = printed.needs_text(quantised, entry, points, "math").split("\n")
    assert [line.split()[1:4] for line in lines[2:5]] == [["cpu", "float32,", "int8"]] * 3
    assert needs.needs_of(quantised, entry, points)["solver"].weights < before["solver"].weights


QUANTIZES = "quantize" in inspect.signature(minimas.load_mas_system).parameters


@pytest.mark.skipif(not QUANTIZES, reason="load_mas_system does not quantise yet")
@pytest.mark.parametrize("style", ("sequential_light", "sequential_scaled"))
@pytest.mark.parametrize("quantize", ("int8", "int4"))
def test_quantised_weights_are_those_of_the_loaded_system(folders, monkeypatch, style, quantize):
    origin, entry, points = planned(
        monkeypatch, *from_folders(folders, style), "--plain", "--dtype", "bfloat16"
    )
    origin = replace(origin, quantize=quantize)
    system = minimas.load_mas_system(
        style, checkpoints=folders(style), device="cpu", dtype="bfloat16", quantize=quantize
    )
    for role, need in needs.needs_of(origin, entry, points).items():
        held = [*system.agents[role].model.parameters()]
        for module in system.agents[role].model.modules():
            if not isinstance(module, type(system.agents[role].model)):  # it has its own tables
                held += module.buffers(recurse=False)
        assert need.weights == nbytes(held), role
