"""The logit lens: its rows are what the heads say of the states, and the tiny system's latents spell its notes."""

import json
import sys

import pytest
import torch

import minimas
from minimas import InputError
from minimas.commands.ask import main
from minimas.commands.failures import command
from minimas.look import logit_lens
from minimas.look.logit_lens import table


@pytest.fixture(scope="module")
def seen():
    system = minimas.load_mas_system("tiny", device="cpu")
    result = system.run(["7 +5 *3 -4 +8"], rounds=2, keep_states=True)[0]
    return system, result, logit_lens(system, result.states)


def test_rows(seen):
    system, result, rows = seen
    assert [(row["round"], row["role"], row["step"]) for row in rows] == [
        (r, role, step)
        for r, roles in ((1, ("planner", "critic", "solver")), (2, ("planner", "critic")))
        for role in roles
        for step in range(1, 6)
    ]
    for row in rows:
        agent, H = system.agents[row["role"]], result.states[row["round"], row["role"]]
        h = H[row["step"] - 1]
        p = agent.model.logits(h).softmax(-1)
        assert row["norm"] == pytest.approx(h.norm().item(), rel=1e-5)
        assert row["entropy"] == pytest.approx(-(p * p.log2()).sum().item(), rel=1e-3)
        likeliest = p.argsort(descending=True)[:3].tolist()
        assert [agent.tokenizer.fast.token_to_id(text) for text, _ in row["tokens"]] == likeliest
        assert [value for _, value in row["tokens"]] == pytest.approx(
            p[likeliest].tolist(), rel=1e-3
        )
        assert (row["step_cosine"] is None) == (row["step"] == 1) and (
            row["round_cosine"] is None
        ) == (row["round"] == 1)
        if row["step"] > 1:
            assert row["step_cosine"] == pytest.approx(
                torch.cosine_similarity(h, H[row["step"] - 2], dim=0).item(), abs=1e-6
            )
        if row["round"] > 1:
            before = result.states[row["round"] - 1, row["role"]][row["step"] - 1]
            assert row["round_cosine"] == pytest.approx(
                torch.cosine_similarity(h, before, dim=0).item(), abs=1e-6
            )


def test_fewer_states_than_the_round_before(seen):
    """An edit may shorten a thought in one round only."""
    system, _, _ = seen

    def edit(turn, questions):
        if turn.round == 1 and turn.states is not None:
            turn.states = turn.states[:, :2]

    (result,) = system.run(["7 +5 *3 -4 +8"], rounds=2, keep_states=True, edit=edit)
    rows = logit_lens(system, result.states)
    of_planner = [row for row in rows if row["role"] == "planner" and row["round"] == 2]
    assert [row["round_cosine"] is None for row in of_planner] == [False, False, True, True, True]
    assert result._repr_html_()


def test_latents_spell_the_notes(seen):
    """No text was ever sent, and yet every turn thinks the note that it would have written."""
    _, _, rows = seen
    said = ["".join(row["tokens"][0][0] for row in rows[i : i + 5]) for i in range(0, len(rows), 5)]
    assert said == ["a+5=2.", "b*3=6.", "c-4\\boxed{2}", "d+8=0.", "d+8=0."]


def test_states_are_kept_only_when_asked(seen):
    system, result, _ = seen
    plain = system.run(["7 +5 *3 -4 +8"], rounds=2)[0]
    assert plain.states == {} and plain.text == result.text
    two = system.run(["7 +5", "7 +5 *3 -4 +8"], rounds=2, keep_states=True)
    assert all((two[1].states[key] - H).abs().max() < 1e-4 for key, H in result.states.items())
    assert (
        logit_lens(system, system.run(["7 +5"], latent_steps=0, keep_states=True)[0].states) == []
    )


def test_of_a_result(seen):
    system, result, rows = seen
    assert logit_lens(system, result) == rows
    (aloud,) = system.run(["7 +5"], channel="text", keep_states=True)
    assert aloud.states == {} and logit_lens(system, aloud) == []


@pytest.mark.parametrize(
    "given, top, complaint",
    [
        (lambda kept, plain: plain, 3, "there are no states: ask with keep_states=True"),
        (lambda kept, plain: plain.states, 3, "there are no states: ask with keep_states=True"),
        (lambda kept, plain: [kept], 3, "states is a list, expected a Result or the dict of its"),
        (
            lambda kept, plain: kept.latents,
            3,
            r"states has the key \(1, 'planner', 'critic'\), expected \(round, role\): give result.states",
        ),
        (
            lambda kept, plain: {(1, "critic"): kept.states[1, "planner"]},
            3,
            r"states\[\(1, 'critic'\)\] is Tensor \(5, 96\) of float32, expected \(m, 128\)",
        ),
        (
            lambda kept, plain: {(1, "judge"): kept.states[1, "planner"]},
            3,
            "role of states 'judge' is not known, expected one of planner",
        ),
        (lambda kept, plain: kept, 0, "top is 0, expected a whole number from 1 up"),
        (lambda kept, plain: kept, 100000, "top is 100000, but an agent has only 56 tokens"),
    ],
)
def test_what_it_cannot_read(seen, given, top, complaint):
    system = seen[0]
    (kept,) = system.run(["7 +5"], rounds=1, keep_states=True, keep_latents=True)
    (plain,) = system.run(["7 +5"], rounds=1)
    with pytest.raises(InputError, match=complaint):
        logit_lens(system, given(kept, plain), top)


def test_table(seen):
    lines = table(seen[2]).splitlines()
    assert lines[0] == "round 1, planner" and lines[1].split() == [
        "step",
        "norm",
        "bits",
        "cos",
        "step",
        "cos",
        "round",
        "closest",
        "tokens",
    ]
    assert len(lines) == 5 * 7 + 4 and "'a'" in lines[2] and lines[2].split()[0] == "1"


def test_command_line(monkeypatch, capsys):
    def ask(*more):
        options = ["--prompt", "7 +5", "--rounds", "1", "--device", "cpu", "--peek", *more]
        monkeypatch.setattr(sys, "argv", ["recurse", *options])
        command(main)
        return capsys.readouterr().out

    shown, line = ask(), json.loads(ask("--json"))
    assert shown.startswith("round 1, planner\n") and shown.endswith("\nanswer: 2\n")
    assert (
        line["answer"] == "2"
        and [row["role"] for row in line["peek"]] == ["planner"] * 5 + ["critic"] * 5
    )
    with pytest.raises(SystemExit) as end:
        ask("--channel", "text")
    out, err = capsys.readouterr()
    assert end.value.code == 2 and "--peek shows latents" in err and not out
