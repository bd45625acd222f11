"""The nineteen released repositories in miniature,
served on loopback and loaded through the real huggingface_hub client.
"""

import json
import os
import subprocess
import sys

import checkpoints
import pytest
import standin
from huggingface_hub import constants

import minimas
from minimas.commands import ask
from minimas.styles import STYLES

OPTIONS = {"rounds": 2, "latent_steps": 2, "max_new_tokens": 4, "temperature": 0.0, "retry": False}
ASKED = ["What is two times three?"]


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    root = tmp_path_factory.mktemp("hub")
    for style in checkpoints.RELEASED:
        checkpoints.make_released(root, style)
    with standin.serve(root) as server:
        yield server


@pytest.fixture
def client(hub, tmp_path, monkeypatch):
    standin.connect(monkeypatch, hub, tmp_path)
    return monkeypatch


def test_names_are_the_released_ones():
    for style, (repositories, _) in checkpoints.RELEASED.items():
        assert STYLES[style].checkpoints == {
            role: f"RecursiveMAS/{name}" for role, name in repositories.items()
        }
    assert sum(len(repositories) for repositories, _ in checkpoints.RELEASED.values()) == 19


def tokens(*args, **options):
    return [
        result.token_ids
        for result in minimas.load_mas_system(*args, device="cpu", **options).run(ASKED, **OPTIONS)
    ]


@pytest.mark.parametrize(
    "style, task",
    [(style, "math") for style in checkpoints.RELEASED] + [("sequential_light", "code")],
)
def test_every_style_loads_and_runs(hub, client, style, task):
    hub.asked.clear()
    fetched = tokens(style, task=task)
    names = {name.partition("/")[2] for name in hub.asked}
    assert not any(("(math)" if task == "code" else "(code)") in name for name in names), (
        "only the files of the task"
    )
    assert len([name for name in names if "Outerlink" in name]) == len(STYLES[style].edges)
    hub.asked.clear()
    assert tokens(style, task=task, checkpoints=hub.root / "RecursiveMAS") == fetched, (
        "one local folder that holds all"
    )
    client.setattr(constants, "HF_HUB_OFFLINE", True)
    client.setattr(constants, "ENDPOINT", "http://127.0.0.1:1")
    assert tokens(style, task=task) == fetched and not hub.asked, "from the cache"


def test_the_command_line_over_the_hub(hub, client, tmp_path, capsys):
    """In a process that only the environment tells of the stand-in;
    then here, from the cache which that process filled.
    """
    args = ["--style", "deliberation", "--prompt", "1 + 1", "--max-new-tokens", "4", "--json"]
    told = {
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(tmp_path),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_OFFLINE": "0",
    }
    done = subprocess.run(
        [sys.executable, "-m", "minimas.recurse", *args],
        capture_output=True,
        text=True,
        env=os.environ | told,
    )
    for name, value in (
        ("HF_HUB_OFFLINE", True),
        ("ENDPOINT", "http://127.0.0.1:1"),
        ("HF_HUB_CACHE", tmp_path / "hub"),
    ):
        client.setattr(constants, name, value)
    client.setattr(sys, "argv", ["recurse", *args])
    ask.main()
    online, offline = json.loads(done.stdout), json.loads(capsys.readouterr().out)
    assert (
        online["text"] == offline["text"] and online["rounds"] == 3 and online["latent_steps"] == 32
    )


REPOSITORY = checkpoints.RELEASED["distillation"][0]["expert"]


@pytest.mark.parametrize(
    "mood, complaint",
    [
        ((403, "GatedRepo"), "is gated: accept its terms"),
        ((401, "RepoNotFound"), "is not on the hub, or private"),
        ((500, "Oops"), "--style tiny runs offline"),
    ],
)
def test_trouble_with_the_hub_is_told(hub, client, mood, complaint):
    client.setitem(hub.failing, REPOSITORY, mood)
    with pytest.raises(minimas.InputError, match=complaint) as told:
        minimas.load_mas_system("distillation")
    assert REPOSITORY in str(told.value) and "\n" not in str(told.value)


@pytest.mark.parametrize(
    "name, value, complaint",
    [
        (
            "HUGGINGFACE_CO_URL_TEMPLATE",
            "http://127.0.0.1:1/{repo_id}/{revision}/{filename}",
            "no connection",
        ),
        ("HF_HUB_OFFLINE", True, "HF_HUB_OFFLINE is set"),
    ],
)
def test_no_hub_at_all(client, name, value, complaint):
    client.setattr(constants, name, value)
    with pytest.raises(minimas.InputError, match=complaint + ".*--style tiny runs offline"):
        minimas.load_mas_system("distillation")


def test_one_folder_must_hold_all(hub, tmp_path):
    (tmp_path / "planner").mkdir()
    with pytest.raises(
        minimas.InputError, match="holds no folder critic or Sequential-Light-Critic-Llama3.2-1B"
    ):
        minimas.load_mas_system("sequential_light", checkpoints=tmp_path)
