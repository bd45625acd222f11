"""The tiny system that ships with minimas: its task, its accuracy, and its build."""

import json
import random
from functools import partial
from math import sqrt
from pathlib import Path

import pytest
import torch

import minimas
from minimas.tiny import task
from minimas.train import tiny

REPORT = json.loads((Path(minimas.__file__).parent / "tiny" / "report.json").read_text())


@pytest.fixture(scope="module")
def system():
    return minimas.load_mas_system("tiny", device="cpu")


def within(percent, reported, n):
    """Whether `percent` of n is within four standard deviations of the reported one, plus one count for 0 and 100 %."""
    p = reported / 100
    return abs(percent - reported) <= 100 * (4 * sqrt(p * (1 - p) / n) + 1 / n)


CHAINS = task.questions("test", 40, seed=999)  # 320 other test questions than the report's


@pytest.fixture(scope="module")
def one_round(system):
    return tiny.accuracy(system, CHAINS, rounds=1)


@pytest.mark.parametrize(
    "rounds", (1, 3, *(pytest.param(rounds, marks=pytest.mark.slow) for rounds in (2, 5)))
)
def test_accuracy_is_the_reported_one(system, one_round, rounds):
    measured = one_round if rounds == 1 else tiny.accuracy(system, CHAINS, rounds=rounds)
    assert within(measured["percent"], REPORT["latent"][str(rounds)]["percent"], len(CHAINS)), (
        measured
    )
    assert measured["tokens"] == 6.0


def test_text_channel_and_empty_slots(system):
    chains = task.questions("test", 20, seed=998)
    said = tiny.accuracy(system, chains, rounds=3, channel="text")
    assert said["percent"] >= 95 and said["tokens"] == REPORT["text"]["3"]["tokens"] == 54.0
    assert tiny.accuracy(system, chains, rounds=3, latent_steps=0)["percent"] < 25


def test_random_outer_links_carry_nothing():
    system = minimas.load_mas_system("tiny", device="cpu")
    torch.manual_seed(0)
    tiny.randomise_outer_links(system.outer_links.values())
    assert tiny.accuracy(system, task.questions("test", 20, seed=998), rounds=3)["percent"] < 25


def test_a_round_is_three_steps(one_round):
    """With one round, chains of three steps are solved and longer ones are not."""
    by_length = one_round["by_length"]
    assert min(by_length[2], by_length[3]) >= 90 and max(by_length[n] for n in range(4, 10)) <= 35


def test_weights_are_small_and_whole():
    folder = Path(minimas.__file__).parent / "tiny"
    assert (
        sum(
            file.stat().st_size
            for file in folder.rglob("*")
            if file.suffix in (".safetensors", ".pt")
        )
        < 3_000_000
    )


def test_task():
    chain = task.Chain(7, ("+5", "*3", "-4"))
    assert (
        chain.answer == 2
        and chain.question == "7 +5 *3 -4"
        and task.with_labels(chain.question) == "7 a+5 b*3 c-4"
    )
    assert (
        task.note("critic", chain, 2, 6) == "b*3=6."
        and task.note("solver", chain, 3, 2) == "c-4\\boxed{2}"
    )
    for bad in "", "7", "77 +1", "7 +0", "7 *2", "7 +1" + " +1" * 9, "7+1", "x +1":
        with pytest.raises(minimas.InputError, match="expected one digit"):
            task.with_labels(bad)


def test_splits_do_not_meet():
    rng = random.Random(0)
    drawn = {
        split: {task.random_chain(rng, 3, split).question for _ in range(200)}
        for split in ("train", "validation", "test")
    }
    assert all(
        task.split_of(question) == split
        for split, questions in drawn.items()
        for question in questions
    )
    assert not drawn["train"] & drawn["test"] and not drawn["train"] & drawn["validation"]
    exercises = [task.exercise(rng, "critic") for _ in range(500)]
    assert {task.split_of(question) for question, _, _ in exercises} == {"train"}


def test_an_exercise_continues_the_note():
    rng = random.Random(1)
    for _ in range(300):
        question, heard, reply = task.exercise(rng, "solver")
        steps = question.split()[1:]
        place = task.LABELS.index(reply[0])
        assert reply[1:3] == steps[place] and reply.endswith("}")
        if (
            heard and heard[-1] == "." and place > task.LABELS.index(heard[0])
        ):  # an uncut note of an earlier step
            assert int(reply[-2]) == task.apply_step(int(heard[-2]), steps[place])


def test_the_template_ends_where_the_reply_begins(system):
    """The last word of a prompt does not fuse with the first of the reply into one token."""
    for role, agent in system.agents.items():
        prompt = "".join(
            piece
            for piece in system.prompts_for(
                role,
                system.style.questions(["7 +5"]),
                {(source, role): [""] for source in task.ROLES},
            )[0]
        )
        assert agent.tokenizer.encode(prompt + "a+5=2.") == agent.tokenizer.encode(
            prompt
        ) + agent.tokenizer.encode("a+5=2.")
        assert agent.tokenizer.decode(agent.tokenizer.encode("a+5\\boxed{2}")) == "a+5\\boxed{2}"
        assert agent.tokenizer.fast.token_to_id("<unk>") not in agent.tokenizer.encode(prompt)


@pytest.mark.slow
def test_build_in_small(tmp_path, monkeypatch):
    """The whole build with a few steps per phase: what it writes loads, runs, and repeats for the same seed."""
    monkeypatch.setattr(tiny, "mastery", partial(tiny.mastery, count=20))
    report = tiny.build(
        tmp_path / "a", seed=3, scale=0.002, batch=8, split="validation", per_length=1
    )
    assert report["split"] == "validation" and set(report["latent"]) == {1, 2, 3, 4, 5}
    names = (*task.ROLES, "links")
    again = minimas.load_mas_system(
        "tiny", checkpoints={name: tmp_path / "a" / name for name in names}, device="cpu"
    )
    assert again.run(["7 +5"])[0].new_tokens > 0
    monkeypatch.setattr(tiny, "evaluate", lambda *_: {})  # it need not be measured twice
    tiny.build(tmp_path / "b", seed=3, scale=0.002, batch=8, split="validation", per_length=1)
    for name in (
        "planner/model.safetensors",
        "critic/adapter.pt",
        "links/Solver-Planner-Outerlink.pt",
    ):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
