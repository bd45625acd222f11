"""Styles of one's own: a file in the form of styles.json runs like the built-in ones, and a wrong one is refused by key."""

import json
import shutil
import subprocess
import sys

import pytest

import minimas
from minimas.common import InputError
from minimas.recurse import System
from minimas.styles import STYLES, style_named

ROLES = ("planner", "critic", "solver")
OWN = {"order": list(ROLES), "edges": [["planner", "critic"], ["critic", "solver"], ["solver", "planner"]],
       "agents": {role: f"agents/{role}" for role in ROLES},
       "prompts": {"system": "tiny", "planner": "planner {question} notes",
                   "planner_with_feedback": "planner {question} notes {solver}",
                   "critic": "critic {question} notes {planner}", "solver": "solver {question} notes {critic}"},
       "latent_steps": 5, "max_new_tokens": 8, "temperature": 0}
CHAIN = "a: 7 +5 b: *3 -4"  # labelled as the tiny style does it, so that both read the same


@pytest.fixture
def folder(tmp_path):
    """Agents in a folder beside the style's file; its links have the released keys, and so have its edges."""
    for role, source in STYLES["tiny"].checkpoints.items():
        shutil.copytree(source, tmp_path / ("links" if role == "links" else f"agents/{role}"))
    return tmp_path


def write(folder, **changes):
    file = folder / "own.json"
    file.write_text(json.dumps({key: value for key, value in (OWN | changes).items() if value is not None}))
    return file


def released_keys(edges):
    return [[*edge, STYLES["tiny"].edges[tuple(edge)]] for edge in edges]


def test_a_file_is_a_style(folder):
    """The tiny style written as a file of one's own gives the tiny system's latents and texts."""
    file = write(folder, edges=released_keys(OWN["edges"]), links="links")
    questions = [STYLES["tiny"].question(text).text for text in ("7 +5 *3 -4 +8", "3 *3 +2")]
    own = minimas.load_mas_system(file, device="cpu").run(questions, keep_latents=True)
    tiny = minimas.load_mas_system("tiny", device="cpu").run(["7 +5 *3 -4 +8", "3 *3 +2"], keep_latents=True)
    for ours, theirs in zip(own, tiny):
        assert ours.text == theirs.text and ours.latents.keys() == theirs.latents.keys()
        assert all(torch_equal(ours.latents[key], theirs.latents[key]) for key in theirs.latents)


def torch_equal(a, b):
    return a.shape == b.shape and bool((a == b).all())


def test_the_commands_take_a_file(folder, tmp_path):
    file = write(folder, edges=released_keys(OWN["edges"]), links="links")
    questions = tmp_path / "q.jsonl"
    questions.write_text(json.dumps({"question": STYLES["tiny"].question("7 +5 *3").text, "answer": "6"}) + "\n")
    for module, *args in (["recurse", "--prompt", STYLES["tiny"].question("7 +5 *3").text],
                          ["evaluate", "--dataset", str(questions), "--out", str(tmp_path / "r.jsonl")]):
        done = subprocess.run([sys.executable, "-m", f"minimas.{module}", "--style", str(file), *args],
                              capture_output=True, text=True, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "r.jsonl").read_text().splitlines()[0])["style"] == str(file)


def test_without_links_text_passes_and_latents_name_the_command(folder):
    for role in ROLES:
        (folder / "agents" / role / "adapter.pt").unlink()
        for file in (folder / "agents" / role).glob("adapter*"):
            file.unlink()
    system = minimas.load_mas_system(write(folder), device="cpu")
    assert system.run(["7 +5"], channel="text", rounds=2)[0].text is not None
    with pytest.raises(InputError, match="no inner link of planner, .*minimas.train inner.*--channel text"):
        system.run(["7 +5"])
    system.agents |= minimas.load_mas_system("tiny", device="cpu").agents
    with pytest.raises(InputError, match="no outer link from planner to critic, .*minimas.train outer"):
        system.run(["7 +5"])


@pytest.mark.parametrize("changes, complaint", [
    ({"order": None}, "order is 'missing'"), ({"order": []}, "order is \\[\\]"), ({"order": ["a"]}, "order is"),
    ({"order": ["planner", "planner"]}, "order is"), ({"edges": {}}, "edges is {}"),
    ({"edges": [["planner", "writer"]]}, "edges has \\['planner', 'writer'\\]"), ({"edges": ["ab"]}, "edges has ab"),
    ({"agents": {"planner": "x"}}, "agents.critic is 'missing'"), ({"agents": OWN["agents"] | {"x": "y"}}, "agents.x is 'y'"),
    ({"agents": OWN["agents"] | {"critic": 3}}, "agents.critic is 3"), ({"links": 3}, "links is 3"),
    ({"prompts": {"planner": "{question}"}}, "prompts.critic is None"), ({"prompts": 3}, "prompts is 3"),
    ({"prompts": "mine"}, "prompts 'mine' is not known"),
    ({"prompts": OWN["prompts"] | {"critic": "{writer}"}}, "prompts.critic has {writer}"),
    ({"prompts": OWN["prompts"] | {"critic": "{solver}"}}, "prompts.critic has {solver}"),
    ({"prompts": OWN["prompts"] | {"author": "x"}}, "prompts.author is 'x'"),
    ({"temprature": 1}, "key 'temprature' is not known"), ({"latent_steps": "many"}, "latent_steps is many"),
    ({"temperature": "hot"}, "temperature is hot"), ({"task": "maths"}, "task 'maths' is not known")])
def test_a_wrong_file_is_refused_by_key(folder, changes, complaint):
    with pytest.raises(InputError, match=complaint):
        file = write(folder, **changes)
        style = style_named(str(file))
        minimas.Settings().completed(style)
        minimas.load_mas_system(file, device="cpu")


def test_single(folder):
    """One agent without links, asked once: the prompt is the question and the form of the answer."""
    planner = folder / "agents" / "planner"
    for file in planner.glob("adapter*"):
        file.unlink()
    system = minimas.load_mas_system("single", checkpoints=str(planner), device="cpu")
    result, = system.run(["7 +5"], max_new_tokens=4, temperature=0.0, retry=False, keep_states=True)
    (key, (_, pieces)), = result.stages.items()
    assert key == (1, "agent") and isinstance(system, System) and "7 +5" in "".join(pieces)
    done = subprocess.run([sys.executable, "-m", "minimas.recurse", "--style", "single", "--checkpoint", str(planner),
                           "--prompt", "7 +5", "--max-new-tokens", "4", "--no-retry", "--temperature", "0"],
                          capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.splitlines()[0] == result.text.splitlines()[0], done.stderr
    with pytest.raises(InputError, match="agent has no folder or hub id"):
        minimas.load_mas_system("single")


def test_sources_that_are_needed():
    """Only what a training loads must have a folder; links that it starts from must have one, too."""
    single = STYLES["single"]
    assert single.sources({"agent": "x"}) == single.sources({"agent": "x"}, ["agent"]) == {"agent": "x"}
    with pytest.raises(InputError, match="^links has no folder or hub id: give one with --checkpoint links=PATH$"):
        single.sources({"agent": "x"}, ["agent", "links"])
    with pytest.raises(InputError, match="^agent has no folder or hub id"):
        single.sources()
