"""The measurements of own agents, on the tiny system: each command runs, and its figures are those of what it names."""

import json
import math
import re
import sys
from pathlib import Path

import own
import pytest
import torch

import minimas
from minimas.settings import Settings
from minimas.tiny.task import questions

TINY = Path(minimas.__file__).parent / "tiny"


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    file = tmp_path_factory.mktemp("own") / "chains.jsonl"
    chains = questions("validation", 1)[:6]
    rows = [{"question": chain.question, "answer": str(chain.answer)} for chain in chains]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def printed(monkeypatch, capsys, *args):
    monkeypatch.setattr(sys, "argv", ["own.py", *map(str, args)])
    own.main()
    return capsys.readouterr().out


@pytest.fixture(scope="module")
def system():
    return minimas.load_mas_system("tiny", device="cpu")


def test_only_the_last_agent_hears_something_else(system):
    assert own.heard(system, "other") == "critic>solver=other"


def test_helps(data, monkeypatch, capsys):
    shown = printed(monkeypatch, capsys, "helps", "tiny", TINY, data, "--limit", "6")
    values = dict(re.findall(r"^(own|other|none) +([\d.]+)$", shown, re.MULTILINE))
    difference = re.search(r"^other - own: \+([\d.]+) \+- -$", shown, re.MULTILINE)
    assert list(values) == ["own", "other", "none"]
    expected = float(values["other"]) - float(values["own"])
    assert float(difference[1]) == pytest.approx(expected, abs=2e-4)


def test_solved(data, monkeypatch, capsys):
    shown = printed(monkeypatch, capsys, "solved", "tiny", TINY, data, "--limit", "6")
    _, *rows = shown.splitlines()
    assert [row.split()[0] for row in rows] == ["own", "other", "none", "text", "alone"]
    assert float(rows[0].split()[1]) > float(rows[1].split()[1])


def test_carried(data, monkeypatch, capsys):
    shown = printed(monkeypatch, capsys, "carried", "tiny", TINY, data, "--controls")
    _, row = shown.splitlines()
    assert row.count("|") == 3 and row.split()[:2] == ["1", "5"]


def test_bits_that_passed():
    """Two tokens before the first word's end, n = 2, then the token that ends the answer."""
    bit = math.log(2)
    rows = [torch.tensor([0.5, 0.5, 1.0, 9.0]) * bit, torch.tensor([1.0, 3.0, 9.0]) * bit]
    assert own.passed(rows, 2, 8.0) == pytest.approx([8 - 1, 16 - 3])


def test_soft_tokens_are_sent_in_the_other_vocabulary(system):
    """What is sent is made of the states, not of what the inner link made of them."""
    planner, critic = system.agents["planner"], system.agents["critic"]
    ours, theirs = own.shared_tokens(planner, critic)
    assert len(ours) == len(theirs) > 30
    spelled = lambda agent, ids: [agent.tokenizer.fast.id_to_token(int(i)) for i in ids]
    assert spelled(planner, ours) == spelled(critic, theirs)
    head, embeddings = planner.model.lm_head.weight, critic.model.embed_tokens.weight[theirs]
    inner = own.SoftTokens(head, planner.model.embed_tokens.weight)
    added = own.added_tokens(planner)
    link = own.AfterInner(inner, own.SoftTokens(head[ours], embeddings), added)
    likely = 100 * head[ours[:5]] / head[ours[:5]].norm(dim=1, keepdim=True) ** 2
    sent = link(inner(likely[None]))
    assert len(sent) == 1 and sent[0].shape == (5, critic.model.config.hidden_size)
    assert torch.allclose(sent[0], embeddings[:5], atol=0.5)
    ending = 100 * head[added[-1]] / head[added[-1]].norm() ** 2
    likely[3] = ending
    assert [len(one) for one in link(inner(likely[None]))] == [3], "as a text ends there"


def test_a_learned_prompt_lowers_the_loss(data, tmp_path, monkeypatch, capsys):
    style = {
        "order": ["planner", "solver"],
        "edges": [["planner", "solver"]],
        "prompts": {
            "system": "tiny",
            "planner": "planner {question} notes",
            "solver": "solver {question} notes {planner}",
        },
        "agents": {role: str(TINY / role) for role in ("planner", "solver")},
    }
    file = tmp_path / "style.json"
    file.write_text(json.dumps(style))
    args = ["prompt", file, data, data, tmp_path / "out", "--dtype", "float32", "--lr", "0.1"]
    args += ["--batch-size", "3", "--latent-steps", "2"]
    shown = printed(monkeypatch, capsys, *args, "--steps", "12")
    lines = [
        json.loads(one) for one in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()
    ]
    assert len(lines) == 12 and lines[-1]["loss"] < lines[0]["loss"]
    losses = json.loads((tmp_path / "out" / "losses.json").read_text())
    assert len(losses) == 6
    assert shown.startswith(f"learned prompt {sum(losses) / 6:.4f} +- ")
    assert printed(monkeypatch, capsys, *args, "--steps", "12") == shown, "from the last state"


def test_losses_do_not_depend_on_the_batch(system, data):
    rows = [json.loads(line) for line in data.read_text().splitlines()]
    settings = Settings(rounds=2).completed(system.style)
    for found in zip(
        *(own.losses(system, rows, settings, ["other"], size)["other"] for size in (2, 6))
    ):
        assert torch.allclose(*found, atol=1e-4)
