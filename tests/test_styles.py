"""Styles of one's own: a file in the form of styles.json runs like the built-in ones, and a wrong one is refused by
key.
"""

import json
import shutil
import sys
from dataclasses import replace

import numpy as np
import pytest
from huggingface_hub import constants

import minimas
from minimas.commands import ask
from minimas.commands.failures import command
from minimas.common import InputError
from minimas.evaluate import __main__ as evaluate
from minimas.prompts import Question, prompt
from minimas.runs.dependencies import fingerprint
from minimas.styles import STYLES, style_named
from minimas.system import System
from minimas.train import __main__ as train
from minimas.train.ridge import new_outer_links

ROLES = ("planner", "critic", "solver")
OWN = {
    "order": list(ROLES),
    "edges": [["planner", "critic"], ["critic", "solver"], ["solver", "planner"]],
    "agents": {role: f"agents/{role}" for role in ROLES},
    "prompts": {
        "system": "tiny",
        "planner": "planner {question} notes",
        "planner_with_feedback": "planner {question} notes {solver}",
        "critic": "critic {question} notes {planner}",
        "solver": "solver {question} notes {critic}",
    },
    "latent_steps": 5,
    "max_new_tokens": 8,
    "temperature": 0,
}
CHAIN = "a: 7 +5 b: *3 -4"  # labelled as the tiny style does it, so that both read the same


@pytest.fixture
def folder(tmp_path):
    """Agents in a folder beside the style's file; its links have the released keys, and so have its edges."""
    for role, source in STYLES["tiny"].checkpoints.items():
        shutil.copytree(source, tmp_path / ("links" if role == "links" else f"agents/{role}"))
    return tmp_path


def write(folder, **changes):
    file = folder / "own.json"
    file.write_text(
        json.dumps({key: value for key, value in (OWN | changes).items() if value is not None})
    )
    return file


def released_keys(edges):
    return [[*edge, STYLES["tiny"].edges[tuple(edge)]] for edge in edges]


def test_a_file_is_a_style(folder):
    """The tiny style written as a file of one's own gives the tiny system's latents and texts."""
    file = write(folder, edges=released_keys(OWN["edges"]), links="links")
    questions = [STYLES["tiny"].question(text).text for text in ("7 +5 *3 -4 +8", "3 *3 +2")]
    own = minimas.load_mas_system(file, device="cpu").run(questions, keep_latents=True)
    tiny = minimas.load_mas_system("tiny", device="cpu").run(
        ["7 +5 *3 -4 +8", "3 *3 +2"], keep_latents=True
    )
    for ours, theirs in zip(own, tiny):
        assert ours.text == theirs.text and ours.latents.keys() == theirs.latents.keys()
        assert all(torch_equal(ours.latents[key], theirs.latents[key]) for key in theirs.latents)


def test_an_edge_without_the_name_of_its_link(folder):
    """The message has the edge as it is to be written, and with it the style loads."""
    file = write(folder, links="links")
    with pytest.raises(InputError) as error:
        minimas.load_mas_system(file, device="cpu")
    message = str(error.value)
    assert "lists no link outer_planner_critic (planner to critic); it has outer_12, ou" in message
    assert message.endswith(
        'write the edge as ["planner", "critic", "outer_12"] in the style\'s edges'
    )
    others = [edge for edge in OWN["edges"] if edge != ["planner", "critic"]]
    edges = [["planner", "critic", "outer_12"], *released_keys(others)]
    assert minimas.load_mas_system(write(folder, edges=edges, links="links"), device="cpu")
    with pytest.raises(InputError, match=r"no link x \(critic to planner\); it has .*outer_31$"):
        edges = [*released_keys(OWN["edges"]), ["critic", "planner", "x"]]
        prompts = OWN["prompts"] | {"planner_with_feedback": "{question} {solver} {critic}"}
        file = write(folder, edges=edges, prompts=prompts, links="links")
        minimas.load_mas_system(file, device="cpu")


def torch_equal(a, b):
    return a.shape == b.shape and bool((a == b).all())


def test_the_commands_take_a_file(folder, tmp_path, monkeypatch, capsys):
    file = write(folder, edges=released_keys(OWN["edges"]), links="links")
    questions = tmp_path / "q.jsonl"
    questions.write_text(
        json.dumps({"question": STYLES["tiny"].question("7 +5 *3").text, "answer": "6"}) + "\n"
    )
    monkeypatch.chdir(tmp_path)
    for main, *args in (
        [ask.main, "--prompt", STYLES["tiny"].question("7 +5 *3").text],
        [evaluate.main, "--dataset", str(questions), "--out", str(tmp_path / "r.jsonl")],
    ):
        monkeypatch.setattr(sys, "argv", ["command", "--style", str(file), *args])
        command(main)
        assert capsys.readouterr().out
    assert json.loads((tmp_path / "r.jsonl").read_text().splitlines()[0])["style"] == str(file)


@pytest.mark.parametrize(
    "module, args",
    [
        (ask, ["--prompt", "7 +5"]),
        (train, ["inner", "--role", "critic", "--data", "tiny", "--limit", "4", "--out", "runs"]),
    ],
)
def test_an_agent_that_is_neither_a_folder_nor_on_the_hub(module, args, folder, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    file = write(folder, agents=OWN["agents"] | {"critic": "models/x"})
    monkeypatch.setattr(sys, "argv", ["", *args, "--style", str(file), "--device", "cpu"])
    with pytest.raises(
        InputError,
        match="critic: there is no folder models/x, and as a hub id it cannot be loaded either: ",
    ):
        module.main()


def test_without_links_text_passes_and_latents_name_the_command(folder):
    for role in ROLES:
        (folder / "agents" / role / "adapter.pt").unlink()
        for file in (folder / "agents" / role).glob("adapter*"):
            file.unlink()
    system = minimas.load_mas_system(write(folder), device="cpu")
    assert system.run(["7 +5"], channel="text", rounds=2)[0].text is not None
    with pytest.raises(
        InputError, match="no inner link of planner, .*minimas.train inner.*--channel text"
    ):
        system.run(["7 +5"])
    system.agents |= minimas.load_mas_system("tiny", device="cpu").agents
    with pytest.raises(
        InputError, match="no outer link from planner to critic, .*minimas.train outer"
    ):
        system.run(["7 +5"])


@pytest.mark.parametrize(
    "changes, complaint",
    [
        ({"order": None}, "order is missing, expected a list: docs/extending.md has"),
        ({"order": []}, "order is \\[\\]"),
        ({"order": ["a"]}, "order is"),
        ({"order": ["planner", "planner"]}, "order is"),
        ({"edges": {}}, "edges is {}"),
        ({"edges": [["planner", "writer"]]}, "edges has \\['planner', 'writer'\\].* of the link"),
        ({"edges": ["ab"]}, "edges has ab"),
        ({"agents": {"planner": "x"}}, "agents.critic is missing"),
        ({"agents": OWN["agents"] | {"x": "y"}}, "agents.x is 'y'"),
        ({"agents": OWN["agents"] | {"critic": 3}}, "agents.critic is 3"),
        ({"links": 3}, "links is 3, expected a string or null"),
        ({"prompts": {"planner": "{question}"}}, "prompts.critic is missing"),
        ({"prompts": OWN["prompts"] | {"critic": None}}, "prompts.critic is None"),
        ({"prompts": 3}, "prompts is 3"),
        ({"prompts": "mine"}, "prompts is 'mine'"),
        ({"prompts": "mixture"}, "prompts is 'mixture'.* planner, critic, solver"),
        ({"prompts": "final"}, "prompts is 'final'"),
        ({"prompts": "system"}, "prompts is 'system'"),
        ({"order": ["planner", "critic", "links"]}, "order is .* none of .*links"),
        ({"order": ["planner", "critic", "question"]}, "order is .* none of question, "),
        ({"order": ["planner", "critic", "answer_retry"]}, "order is .* none of .*answer_retry"),
        ({"edges": [[["planner"], "critic"]]}, "edges has \\[\\['planner'\\], 'critic'\\]"),
        ({"edges": [["planner", "critic", 1]]}, "edges has \\['planner', 'critic', 1\\]"),
        (
            {"edges": OWN["edges"] + [["planner", "critic"]]},
            "each link once, under a name of its own",
        ),
        (
            {"edges": [[*edge, "same"] for edge in OWN["edges"]]},
            "each link once, under a name of its own",
        ),
        (
            {"edges": OWN["edges"] + [["planner", "solver"]]},
            "planner, solver\\], but no prompt of solver has {planner}",
        ),
        (
            {"prompts": OWN["prompts"] | {"critic_with_feedback": "{planner}"}},
            "prompts has critic_with_feedback, which nobody would read, since no edge leads to critic from a role "
            "that speaks after it, or from itself: add such an edge, or leave out critic_with_feedback$",
        ),
        (
            {"prompts": OWN["prompts"] | {"planner": "{solver}"}},
            "prompts.planner has {solver}.* planner_with_feedback",
        ),
        ({"links_by_task": "false"}, "links_by_task is 'false'"),
        ({"calls_tools": "no"}, "calls_tools is 'no'"),
        ({"prompts": OWN["prompts"] | {"critic": "{writer}"}}, "prompts.critic has {writer}"),
        ({"prompts": OWN["prompts"] | {"critic": "{solver}"}}, "prompts.critic has {solver}"),
        ({"prompts": OWN["prompts"] | {"author": "x"}}, "prompts.author is 'x'"),
        (
            {"prompts": OWN["prompts"] | {"system": "{question} {critic}"}},
            "prompts.system has {critic}.* a system text hears nobody",
        ),
        ({"temprature": 1}, "key 'temprature' is not known"),
        ({"latent_steps": "many"}, "latent_steps is 'many', expected a whole number from 0 up"),
        ({"latent_steps": True}, "latent_steps is True"),
        ({"rounds": "many"}, "rounds is 'many', expected a whole number from 1 up"),
        ({"rounds": 0}, "rounds is 0"),
        ({"max_new_tokens": 1.5}, "max_new_tokens is 1.5"),
        ({"temperature": "hot"}, "temperature is 'hot', expected a number from 0 up"),
        ({"temperature": [1]}, "temperature is \\[1\\]"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"task": "maths"}, "task 'maths' is not known, expected one of math, choice, code"),
        ({"task": ["math"]}, "task \\['math'\\] is not known"),
    ],
)
def test_a_wrong_file_is_refused_by_key(folder, changes, complaint):
    file = write(folder, **changes)
    with pytest.raises(InputError, match=complaint) as told:
        style_named(str(file))
    assert str(file) in str(told.value)


@pytest.mark.parametrize("within", ["", "agents"])
def test_a_key_that_stands_twice(folder, within):
    file = write(folder)
    key = "planner" if within else "order"
    text = file.read_text()
    begin = text.index("{", text.index(f'"{within}"') if within else 0) + 1
    file.write_text(f'{text[:begin]}"{key}": "x", {text[begin:]}')
    with pytest.raises(InputError, match=f"own.json has the key '{key}' twice in one object"):
        style_named(file)


def test_a_style_file_that_is_no_object(folder):
    file = folder / "own.json"
    file.write_text("[]")
    with pytest.raises(InputError, match="own.json holds a list, expected a JSON object"):
        style_named(file)


def test_braces_that_are_no_slot_stay_as_they_are(folder):
    text = 'critic {planner} \\\\boxed{x} {"answer": 6} { answer }'
    style = style_named(write(folder, prompts=OWN["prompts"] | {"critic": text}))
    _, pieces = prompt(style.prompts, "critic", Question("7"), "math", False)
    assert pieces[-1] == text.partition("{planner}")[2]


@pytest.mark.parametrize(
    "style, checkpoints, complaint",
    [
        (None, None, "the style is None, expected one of tiny, .*, or the path of a .json file$"),
        (3, None, "the style is 3, "),
        ("tiny", ["a"], "the checkpoint is \\['a'\\], expected a folder, a hub id, or {role: "),
        ("tiny", "", "the checkpoint is '', "),
        ("single", "", "the checkpoint is '', "),
        ("tiny", {"critic": 3}, "the checkpoint of critic is 3, expected a folder or hub id"),
        ("tiny", "nope/x", "there is no folder nope/x: expected one that holds .* planner, critic"),
    ],
)
def test_arguments_that_are_wrong(style, checkpoints, complaint):
    with pytest.raises(InputError, match=complaint):
        minimas.load_mas_system(style, checkpoints=checkpoints)


def test_a_key_that_may_be_left_out_may_be_null(folder):
    keys = ("links", "rounds", "latent_steps", "max_new_tokens", "temperature", "task")
    flags = ("calls_tools", "links_by_task")
    entry = {key: value for key, value in OWN.items() if key not in keys}
    file = folder / "own.json"
    file.write_text(json.dumps(entry))
    without = style_named(file)
    file.write_text(json.dumps(entry | dict.fromkeys(keys + flags)))
    assert style_named(file) == without
    assert (without.rounds, without.task, without.calls_tools) == (3, "math", False)


def test_single(folder, monkeypatch, capsys):
    """One agent without links, asked once: the prompt is the question and the form of the answer."""
    planner = folder / "agents" / "planner"
    for file in planner.glob("adapter*"):
        file.unlink()
    system = minimas.load_mas_system("single", checkpoints=str(planner), device="cpu")
    (result,) = system.run(
        ["7 +5"], max_new_tokens=4, temperature=0.0, retry=False, keep_states=True
    )
    ((key, (_, pieces)),) = result.stages.items()
    assert key == (1, "agent") and isinstance(system, System) and "7 +5" in "".join(pieces)
    monkeypatch.setattr(
        sys,
        "argv",
        [
            "recurse",
            "--style",
            "single",
            "--checkpoint",
            str(planner),
            "--prompt",
            "7 +5",
            "--max-new-tokens",
            "4",
            "--no-retry",
            "--temperature",
            "0",
        ],
    )
    command(ask.main)
    assert capsys.readouterr().out.splitlines()[0] == result.text.splitlines()[0]
    with pytest.raises(InputError, match="agent has no folder or hub id"):
        minimas.load_mas_system("single")


def test_sources_that_are_needed():
    """Only what a training loads must have a folder; links that it starts from must have one, too."""
    single = STYLES["single"]
    assert (
        single.sources({"agent": "x"})
        == single.sources({"agent": "x"}, ["agent"])
        == {"agent": "x"}
    )
    with pytest.raises(
        InputError, match="^links has no folder or hub id: give one with --checkpoint links=PATH$"
    ):
        single.sources({"agent": "x"}, ["agent", "links"])
    with pytest.raises(InputError, match="^agent has no folder or hub id"):
        single.sources()


def test_a_folder_for_a_role_without_a_checkpoint(tmp_path):
    """The folder itself is not taken for one of a role."""
    style = replace(STYLES["tiny"], checkpoints=dict.fromkeys(STYLES["tiny"].order, ""))
    with pytest.raises(InputError, match="holds no folder planner"):
        style.sources(tmp_path)


def pieces(system, key, **options):
    """What a role reads in a round: texts, and LATENTS where it hears somebody."""
    (result,) = system.run(["7 +5"], keep_states=True, retry=False, max_new_tokens=2, **options)
    return ["LATENTS" if not isinstance(piece, str) else piece for piece in result.stages[key][1]]


@pytest.mark.parametrize("late", ["solver", "critic"])
def test_feedback_is_what_a_later_role_or_oneself_sent(folder, late):
    """ROLE_with_feedback is read from the second round on, also by a role that hears an earlier one in the first."""
    file = write(
        folder,
        edges=OWN["edges"] + [[late, "critic"]],
        prompts=OWN["prompts"]
        | {"critic_with_feedback": f"critic {{question}} notes {{planner}} {{{late}}}"},
    )
    own = minimas.load_mas_system(file, device="cpu")
    system = System(own.style, own.agents, new_outer_links(own.style.edges, own.agents))
    assert pieces(system, (1, "critic"), rounds=2).count("LATENTS") == 1
    assert pieces(system, (2, "critic"), rounds=2).count("LATENTS") == 2


def test_a_file_that_is_not_there(tmp_path, monkeypatch):
    with pytest.raises(
        InputError,
        match="^there is no style file none.json: give the path of one, or one of tiny, ",
    ):
        style_named("none.json")
    monkeypatch.setenv("HOME", str(tmp_path))
    write(tmp_path)
    assert style_named("~/own.json").checkpoints == {role: f"agents/{role}" for role in ROLES}


def test_an_empty_system_text_is_none_at_all(folder):
    texts = {}
    for system_text in ("", None):
        prompts = {
            key: value
            for key, value in (OWN["prompts"] | {"system": system_text}).items()
            if value is not None
        }
        style = style_named(write(folder, prompts=prompts))
        texts[system_text] = prompt(style.prompts, "planner", Question("7"), "math", False)
    assert texts[""][0] == "" and texts[None][0] == "You are a helpful assistant."


def test_another_hub_id_is_another_run(tmp_path):
    """A style's file may name another model when a run is continued; what lies beside a model's files is not part of
    it.
    """
    hashes = {fingerprint([source]) for source in ("Qwen/Qwen3-1.7B", "Qwen/Qwen3-4B")}
    assert len(hashes) == 2 and "" not in hashes
    (tmp_path / "config.json").write_text("{}")
    before = fingerprint([tmp_path])
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "adapter.pt").write_text("x")
    assert fingerprint([tmp_path]) == before != fingerprint([str(tmp_path / "runs")])


# What a style and settings say of themselves


@pytest.mark.parametrize("name", STYLES)
def test_repr_fits_one_screen(name):
    """Roles, edges, checkpoints and defaults; prompts by the name of their section."""
    style = STYLES[name]
    lines = repr(style).split("\n")
    assert len(lines) <= 24
    for role in style.order:
        assert role in lines[1]
    for key in [*style.edges.values(), *map(str, style.checkpoints.values())]:
        assert any(key in line for line in lines), key
    assert f"prompts: {style.paradigm}" in repr(style)
    assert f"latent_steps={style.latent_steps}" in lines[-2]


def test_feedback_is_what_is_read_a_round_later():
    tiny = STYLES["tiny"]
    assert tiny.is_feedback("solver", "planner") and tiny.is_feedback("critic", "critic")
    assert not tiny.is_feedback("planner", "solver")


def test_completed_settings_have_all_of_the_styles_values():
    settings = minimas.Settings(rounds=2, latent_steps=0).completed(STYLES["tiny"])
    assert (settings.rounds, settings.latent_steps) == (2, 0)
    assert (settings.max_new_tokens, settings.temperature) == (8, 0.0)
    assert settings.completed(STYLES["tiny"]) == settings


def test_numbers_of_numpy_become_those_of_python():
    given = minimas.Settings(rounds=np.int64(2), temperature=np.float32(0.5), seed=np.int32(-1))
    settings = given.completed(STYLES["tiny"])
    values = settings.rounds, settings.temperature, settings.seed
    assert values == (2, 0.5, -1) and [type(value) for value in values] == [int, float, int]
    for truth in True, False:
        given = minimas.Settings(retry=np.bool_(truth))
        assert given.completed(STYLES["tiny"]).retry is truth
    with pytest.raises(InputError, match="retry is array"):
        minimas.Settings(retry=np.array([True])).completed(STYLES["tiny"])


@pytest.mark.parametrize(
    "options, complaint",
    [
        ({"rounds": 0}, "rounds is 0, expected a whole number from 1 up"),
        ({"latent_steps": -1}, "latent_steps is -1, expected a whole number from 0 up"),
        ({"max_new_tokens": 1.5}, "max_new_tokens is 1.5, expected a whole number from 1 up"),
        ({"top_k": -1}, "top_k is -1, expected a whole number from 0 up"),
        ({"latent_steps": True}, "latent_steps is True, expected a whole number from 0 up"),
        ({"batch_size": None}, "batch_size is None, expected a whole number from 1 up"),
        ({"rollouts": 0}, "rollouts is 0, expected a whole number from 1 up"),
        ({"rounds": True}, "rounds is True, expected a whole number from 1 up"),
        ({"latent_steps": 10**20}, r"latent_steps is 10+, expected at most 1000000000"),
        ({"seed": "abc"}, "seed is 'abc', expected a whole number"),
        ({"seed": 1.5}, "seed is 1.5, expected a whole number"),
        ({"retry": "no"}, "retry is 'no', expected True or False"),
        ({"date": 5}, "date is 5, expected a text"),
        ({"temperature": float("nan")}, "temperature is nan, expected a number from 0 up"),
        ({"temperature": True}, "temperature is True, expected a number from 0 up"),
        ({"top_p": True}, "top_p is True, expected more than 0 and at most 1"),
        ({"top_p": 0}, "top_p is 0, expected more than 0 and at most 1"),
        ({"top_p": "high"}, "top_p is 'high', expected more than 0 and at most 1"),
        ({"channel": "radio"}, "channel 'radio' is not known"),
        ({"tools": ("shell",)}, "tool 'shell' is not known"),
        ({"tools": ("python",)}, "tools are given, but this style's agents call none"),
    ],
)
def test_settings_out_of_range(options, complaint):
    with pytest.raises(InputError, match=complaint):
        minimas.Settings(**options).completed(STYLES["tiny"])
