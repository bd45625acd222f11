"""The nineteen released repositories in miniature,
served on loopback and loaded through the real huggingface_hub client.
"""

import errno
import json
import os
import re
import subprocess
import sys

import checkpoints
import pytest
import standin
from huggingface_hub import constants

import minimas
from minimas.commands import ask
from minimas.compat import hub as hub_errors
from minimas.load import checkpoint_folder, download
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
    [
        ("sequential_light", "math"),
        pytest.param("sequential_light", "code", marks=pytest.mark.slow),
        pytest.param("sequential_scaled", "math", marks=pytest.mark.slow),
        ("distillation", "math"),
        pytest.param("mixture", "math", marks=pytest.mark.slow),
        pytest.param("deliberation", "math", marks=pytest.mark.slow),
    ],
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


@pytest.mark.slow
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


def refused(repository=f"RecursiveMAS/{REPOSITORY}", patterns=("config.json",), **options):
    """The one line that is said of a repository that cannot be had."""
    with pytest.raises(minimas.InputError) as told:
        download(repository, patterns, **options)
    assert "\n" not in str(told.value)
    return str(told.value)


@pytest.mark.parametrize(
    "mood, complaint",
    [
        (
            (401, "", "Invalid credentials in Authorization header"),
            "does not accept your token.*hf auth login.*HF_TOKEN",
        ),
        ((403, "", "no permission"), "your token may not read it.*HF_TOKEN"),
        ((429, ""), "limits how often.*wait"),
        ((404, "RevisionNotFound"), "has no revision v9.*check the revision"),
        ((403, "", "Access to this resource is disabled."), "it has been disabled"),
        ((404, ""), "answers 404 to what the hub knows.*HF_ENDPOINT"),
        ((503, ""), "the hub is in trouble.*try again later"),
    ],
)
def test_what_the_hub_answers_is_told(hub, client, mood, complaint):
    client.setitem(hub.failing, REPOSITORY, mood)
    message = refused(revision="v9")
    assert re.search(complaint, message), message
    assert ("check the network" in message) == (mood[0] >= 500)


def test_a_token_that_cannot_be_sent(client):
    client.setenv("HF_TOKEN", "hf_\u20ac")
    message = refused()
    assert "the token has a character that no token has" in message and "HF_TOKEN" in message


@pytest.mark.parametrize("endpoint", ("huggingface.co", "htp://huggingface.co", "http://", "/"))
def test_an_endpoint_that_is_no_url(client, endpoint):
    client.setattr(constants, "ENDPOINT", endpoint)
    message = refused()
    assert f"HF_ENDPOINT is {endpoint!r}, which is no URL" in message
    assert "correct it to one like https://huggingface.co" in message


def test_an_endpoint_that_nobody_answers(client):
    client.setattr(constants, "ENDPOINT", "http://127.0.0.1:1")
    message = refused()
    assert "no connection to http://127.0.0.1:1): check HF_ENDPOINT and the network" in message


@pytest.mark.parametrize("name", ("a/b--c", "a/-b", "a/b.", "a/b.git"))
def test_a_name_that_no_repository_has(client, name):
    message = refused(name)
    assert "no repository can have this name" in message and "OWNER/NAME" in message


def test_a_name_with_a_typo(hub, client):
    assert "is not on the hub, or private" in refused("RecursiveMAS/Distilation-Expert")
    listed = refused("RecursiveMAS/Distilation-Expert", dry_run=True)
    assert "is not on the hub, or private" in listed, "also where only the sizes are asked for"


def test_offline(client):
    client.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE is set and it is not in the cache): unset HF_HUB_OFFLINE" in refused()
    client.delenv("HF_HUB_OFFLINE", raising=False)
    client.setenv("TRANSFORMERS_OFFLINE", "1")
    assert "unset TRANSFORMERS_OFFLINE" in refused()


def test_a_cache_that_is_a_file(client, tmp_path):
    home = tmp_path / "home"
    home.write_text("")
    client.delenv("HF_HUB_CACHE", raising=False)
    client.setattr(constants, "HF_HUB_CACHE", str(home / "hub"))
    message = refused()
    assert f"its cache is {home}/hub, but {home} is a file): set HF_HOME to a folder" in message
    assert "network" not in message
    client.setenv("HF_HUB_CACHE", str(home / "hub"))
    assert "is a file): set HF_HUB_CACHE to a folder" in refused(), "HF_HOME would change nothing"


@pytest.mark.parametrize(
    "error, complaint",
    [
        (PermissionError(errno.EACCES, "Permission denied"), "cannot be written: .*Permission"),
        (OSError(errno.EROFS, "Read-only file system"), "cannot be written: .*Read-only"),
        (OSError(errno.ENOSPC, "No space left on device"), "the disk of its cache .* is full"),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), "the disk of its cache .* is full"),
        (RuntimeError("write: No space left (os error 28)"), "the disk of its cache .* is full"),
        (RuntimeError("open: denied (os error 13)"), "cannot be written"),
    ],
)
def test_a_cache_that_cannot_be_written(client, error, complaint):
    def fails(*args, **options):
        raise error

    client.delenv("HF_HUB_CACHE", raising=False)
    client.setattr(hub_errors, "snapshot_download", fails)
    message = refused()
    assert re.search(complaint + ".*HF_HOME", message), message
    assert "network" not in message


@pytest.mark.parametrize(
    "names, complaint",
    [
        (["model-Q4_K_M.gguf"], "has no config.json, but it holds model-Q4_K_M.gguf: .*llama.cpp"),
        (["config.json", "pytorch_model.bin"], "has no model.safetensors, but .*pickle"),
        (["adapter_config.json", "adapter_model.safetensors"], "has no config.json, but .*LoRA"),
    ],
)
def test_a_repository_of_another_format(hub, client, names, complaint):
    folder = hub.root / "someone" / "else"
    folder.mkdir(parents=True)
    try:
        for name in names:
            (folder / name).write_text("{}")
        with pytest.raises(minimas.InputError, match=complaint):
            checkpoint_folder("someone/else", "config.json", "model.safetensors", role="planner")
    finally:
        for name in names:
            (folder / name).unlink()
        folder.rmdir()


def test_one_folder_must_hold_all(hub, tmp_path):
    (tmp_path / "planner").mkdir()
    with pytest.raises(
        minimas.InputError, match="holds no folder critic or Sequential-Light-Critic-Llama3.2-1B"
    ):
        minimas.load_mas_system("sequential_light", checkpoints=tmp_path)
