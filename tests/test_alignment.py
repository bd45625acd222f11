"""tools/alignment.py: the map of LatentMAS, and what the figures of the tiny system's links must be."""

import json
import random
from pathlib import Path

import alignment
import pytest
import torch

import minimas
from minimas.train.examples import load_examples
from minimas.train.ridge import read_replies
from minimas.train.tiny import turns


def test_the_map_turns_the_head_into_the_embeddings():
    """Exactly for a square head that can be inverted; for a tall one as least squares; shrunk by a large strength."""
    generator = torch.Generator().manual_seed(0)
    W_in, W_out = (torch.randn(12, 12, generator=generator, dtype=torch.float64) for _ in range(2))
    torch.testing.assert_close(
        W_out @ alignment.alignment(W_in, W_out, 1e-12), W_in, atol=1e-6, rtol=0
    )
    W_in, W_out = (torch.randn(40, 12, generator=generator, dtype=torch.float64) for _ in range(2))
    torch.testing.assert_close(
        alignment.alignment(W_in, W_out, 0), torch.linalg.lstsq(W_out, W_in).solution
    )
    assert torch.dist(alignment.alignment(W_out, W_out), torch.eye(12)) < 1e-5, (
        "tied weights: the identity"
    )
    assert alignment.alignment(W_in, W_out, 1e9).abs().max() < 1e-6


def test_at_norm():
    h, W = torch.randn(2, 5, 8), torch.randn(8, 8).double()
    e = alignment.at_norm(3.0, W)(h)
    torch.testing.assert_close(e.norm(dim=-1), torch.full((2, 5), 3.0))
    torch.testing.assert_close(
        e / e.norm(dim=-1, keepdim=True), torch.nn.functional.normalize(h @ W.float(), dim=-1)
    )
    torch.testing.assert_close(
        alignment.at_norm(3.0)(h), 3 * torch.nn.functional.normalize(h, dim=-1)
    )


@torch.no_grad()
def test_links_of_the_tiny_planner():
    """The trained link is followed to the end; a fitted one points better than a constant, and that better than
    chance.
    """
    system = minimas.load_mas_system("tiny", device="cpu")
    agent, trained = system.agents["planner"], system.agents["planner"].inner_link
    examples = load_examples("tiny", system.style, system.style.order, limit=64)
    links = alignment.links_of(
        agent,
        read_replies(system, "planner", [one.turn(system.style, "planner") for one in examples]),
    )
    assert agent.inner_link is trained
    held_out = turns(random.Random(0), "planner", 64, split="test")
    readings, prompts = (
        read_replies(system, "planner", held_out),
        alignment.prompts_of(system, "planner", held_out),
    )
    cosines = {
        name: alignment.cosine(agent, link, readings)
        for name, link in ({"trained": trained} | links).items()
    }
    order = ["trained", "closed form", "LatentMAS", "mean embedding"]
    assert sorted(order, key=cosines.get, reverse=True) == order and cosines["trained"] > 0.98
    assert max(abs(cosines["random start"]), abs(cosines["h itself"])) < 0.1
    texts = alignment.greedy_texts(agent, prompts, 5)
    assert [len(text) for text in texts] == [5] * 64
    assert min(alignment.followed(agent, trained, prompts, texts, 4)) > 95
    assert max(alignment.followed(agent, links["mean embedding"], prompts, texts, 4)) < 20
    assert alignment.followed(agent, trained, prompts, [text[:2] for text in texts], 2)[1] == 0, (
        "no text"
    )


@pytest.mark.slow
def test_command(monkeypatch, capsys):
    monkeypatch.setattr(alignment, "ROWS", 32)
    monkeypatch.setattr(alignment, "TURNS", 32)
    monkeypatch.setattr("sys.argv", ["alignment.py", "tiny", "--chains", "16"])
    alignment.main()
    lines = capsys.readouterr().out.rstrip("\n").split("\n")
    names = [
        "link",
        "trained",
        "closed form",
        "LatentMAS",
        "h itself",
        "random start",
        "mean embedding",
        "expected token",
    ]
    assert [line[:16].strip() for line in lines] == names
    assert float(lines[1].split()[-1]) == pytest.approx(100, abs=30)


def test_command_for_a_real_agent(monkeypatch, capsys, tmp_path):
    """A tiny agent takes its place."""
    rows = [{"question": f"{n} +5 *3", "answer": f"a+5={n}."} for n in range(10)] * 4
    for name in "fit", "held-out":
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    folder = Path(minimas.__file__).parent / "tiny"
    monkeypatch.setattr(
        "sys.argv",
        [
            "alignment.py",
            "real",
            str(folder),
            "--model",
            "planner",
            "--fit",
            str(tmp_path / "fit.jsonl"),
            "--held-out",
            str(tmp_path / "held-out.jsonl"),
            "--rows",
            "20",
            "--trained",
            str(folder / "planner"),
        ],
    )
    alignment.main()
    lines = capsys.readouterr().out.rstrip("\n").split("\n")
    assert lines[0].split() == ["link", "cosine", "k=1", "k=2", "k=4", "k=8", "k=16", "mean"]
    found = {line[:16].strip(): [float(cell) for cell in line[16:].split()] for line in lines[1:]}
    assert len(found) == 7 and all(len(row) == 7 for row in found.values())
    assert found["expected token"][1] > found["random start"][1]
