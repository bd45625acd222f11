"""NaN and infinite states or scores end a run with one message, and what was computed before is kept."""

import shlex
import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import minimas
from minimas.commands import ask, failures
from minimas.common import InputError
from minimas.evaluate import __main__ as evaluate
from minimas.prompts import Question
from minimas.train import ridge
from minimas.train.examples import TargetTurn

OPTIONS = {"rounds": 2, "latent_steps": 3, "max_new_tokens": 4, "retry": False}


@pytest.fixture(params=[True, False], ids=["fast", "plain"])
def system(folders, request):
    return minimas.load_mas_system(
        "sequential_light",
        checkpoints=folders("sequential_light"),
        device="cpu",
        fast=request.param,
    )


def spoil(weight, value=float("nan")):
    with torch.no_grad():
        weight.view(-1)[0] = value


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_states_that_are_not_finite(system, value):
    spoil(system.agents["critic"].model.norm.weight, value)
    with pytest.raises(
        InputError, match="the states of critic in round 1 are not finite: float32 overflows, or"
    ):
        system.run(["1 + 1"], **OPTIONS)


@pytest.mark.parametrize("hear", ["own", "noise", "shuffled"])
def test_a_damaged_link_is_found_by_the_agent_that_hears_it(system, hear):
    """Also if what is heard was made of it: no edit is blamed, as there is none."""
    link = system.outer_links["planner", "critic"]
    spoil(next(p for name, p in link.named_parameters() if name.endswith("bias")))
    with pytest.raises(InputError, match="the states of critic in round 1"):
        system.run(["1 + 1"], hear=hear, **OPTIONS)


@pytest.mark.parametrize(
    "options", [{"temperature": 0.0}, {"temperature": 0.6}, {"channel": "text"}], ids=str
)
def test_scores_that_are_not_finite(system, options):
    spoil(system.agents["solver"].model.norm.weight)
    with pytest.raises(InputError, match="the scores that .* gives to tokens are not finite"):
        system.run(["1 + 1", "2 + 2"], **OPTIONS | {"rounds": 1} | options)


def test_one_row_of_a_batch_is_enough(system):
    """Latents that overflow for one question only, in the last agent, where no states are checked."""

    def overflow(turn, questions):
        for latents in turn.sent.values():
            latents[1] = float("inf")

    with pytest.raises(InputError, match="not finite"):
        system.run(["1 + 1", "2 + 2"], edit=overflow, **OPTIONS | {"rounds": 1})


def test_no_link_starts_from_states_that_are_not_finite(system):
    spoil(system.agents["planner"].model.norm.weight)
    with pytest.raises(InputError, match="the states of planner are not finite"):
        ridge.read_replies(system, "planner", [TargetTurn(Question("1?"), {}, "1 and 2")])


@pytest.mark.parametrize(
    "role, found, command",
    [
        (
            "planner",
            "the states of planner in round 1",
            "evaluate --dataset tiny --limit 3 --out r.jsonl",
        ),
        ("solver", "the scores that", "recurse --prompt '7 +5'"),
    ],
)
def test_commands_end_with_one_message(tmp_path, role, found, command, monkeypatch, capsys):
    folder = tmp_path / role
    shutil.copytree(Path(minimas.__file__).parent / "tiny" / role, folder)
    weights = load_file(folder / "model.safetensors")
    spoil(weights["model.norm.weight"])
    save_file(weights, folder / "model.safetensors")
    words = shlex.split(f"{command} --rounds 1 --checkpoint {role}={folder}")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", words)
    with pytest.raises(SystemExit) as end:
        failures.command({"evaluate": evaluate.main, "recurse": ask.main}[words[0]])
    out, err = capsys.readouterr()
    assert end.value.code == 2 and out == ""
    assert f"minimas: {found}" in err and "Traceback" not in err
    if role == "planner":
        assert len((tmp_path / "r.jsonl").read_text().splitlines()) == 1, (
            "the settings stay, for a run with what was mended"
        )
