"""What agents hear in place of what was sent: each value is the edit of a turn that it is said to be, in any batch."""

import csv
import json
import sys

import checkpoints
import pytest
import torch

import minimas
from minimas.commands import ask as ask_module
from minimas.common import InputError
from minimas.evaluate import evaluate, load_dataset
from minimas.hear import before_each, noise, shuffled
from minimas.look.trace import page
from minimas.prompts import Question
from minimas.settings import Settings
from minimas.styles import STYLES

ASKED = ["7 +5 *3 -4 +8 *7 -1 +6", "3 +1 *3", "9 *7 -2 +4 +4", "1 -3 *9 +5 -1 +2 *3", "5 +2"]
BEFORE = [ASKED[-1], *ASKED[:-1]]
KEEP = {"keep_latents": True, "keep_states": True, "rounds": 2}
LATENT = ("other", "none", "noise", "shuffled")


@pytest.fixture(scope="module")
def system():
    return minimas.load_mas_system("tiny", device="cpu")


@pytest.fixture(scope="module")
def own(system):
    return system.run(ASKED, **KEEP)


@pytest.mark.parametrize("hear", LATENT)
def test_nothing_depends_on_the_batch(system, hear):
    at_once = system.run(ASKED, hear=hear, **KEEP)
    for size in (1, 3):
        for one, same in zip(system.run(ASKED, hear=hear, batch_size=size, **KEEP), at_once):
            assert one.text == same.text and one.latents.keys() == same.latents.keys()
            for key, latents in one.latents.items():
                assert torch.allclose(latents, same.latents[key], atol=1e-4)


@pytest.mark.parametrize("channel", ["latent", "text"])
def test_other_is_what_was_sent_for_the_question_before(system, channel):
    """And that question heard its own messages, not those of the one before it."""
    options = {"rounds": 2, "keep_latents": True, "channel": channel}
    donors = system.run(BEFORE, **options)
    for result, donor in zip(system.run(ASKED, hear="other", **options), donors):
        assert result.latents.keys() == donor.latents.keys()
        for key, message in result.latents.items():
            if channel == "text":
                assert message == donor.latents[key]
            else:
                assert torch.allclose(message, donor.latents[key], atol=1e-4)
        assert set(result.replaced.values()) == {"other"} and len(result.replaced) == 5


def test_a_question_of_the_same_text_is_not_another_one(system):
    """It is passed over, also from the first question to the last ones."""
    settings = Settings(hear="other").completed(system.style)
    texts = ["c", "a", "a", "a", "b", "c", "c"]
    before = before_each([Question(text) for text in texts], settings)
    assert [question.text for question in before] == ["b", "c", "c", "c", "a", "b", "b"]
    with pytest.raises(InputError, match="only one question, not counting repeats"):
        system.run(ASKED[:1] * 3, hear="other")


def test_other_along_one_edge(system, own):
    """All else is as if a caller had put the messages there."""
    donors = system.run(BEFORE, **KEEP)
    edge = ("planner", "critic")

    def patch(turn, questions):
        if edge in turn.sent:
            turn.sent[edge] = torch.stack([donor.latents[turn.round, *edge] for donor in donors])

    by_hand = system.run(ASKED, edit=patch, **KEEP)
    found = system.run(ASKED, hear="planner>critic=other", **KEEP)
    for result, expected in zip(found, by_hand):
        assert result.text == expected.text
        for key, latents in expected.latents.items():
            assert torch.allclose(result.latents[key], latents, atol=1e-4)
        assert result.replaced == {(1, *edge): "other", (2, *edge): "other"}
    assert [result.text for result in found] != [result.text for result in own]


@pytest.mark.parametrize("channel", ["latent", "text"])
def test_none_is_a_muted_edge(system, channel):
    mute = lambda turn, questions: turn.mute(*turn.sent)
    expected = system.run(ASKED, rounds=2, channel=channel, edit=mute)
    found = system.run(ASKED, rounds=2, channel=channel, hear="none")
    assert [result.text for result in found] == [result.text for result in expected]
    one = system.run(ASKED, hear="critic>solver=none+planner>critic=own", channel=channel, **KEEP)[
        0
    ]
    assert set(one.replaced) == {(1, "critic", "solver"), (2, "critic", "solver")}
    assert ("critic", "solver") not in {edge[1:] for edge in one.latents}


def test_noise_keeps_mean_and_norm_of_each_latent(system, own):
    for m in (1, 5):
        latents = torch.randn(m, 96, generator=torch.Generator().manual_seed(1)) * 3 + 1
        found = noise(latents, torch.Generator().manual_seed(2))
        assert torch.allclose(found.mean(1), latents.mean(1), atol=1e-5)
        assert torch.allclose(found.norm(dim=1), latents.norm(dim=1), rtol=1e-5)
        assert torch.nn.functional.cosine_similarity(found, latents).abs().max() < 0.6
        assert noise(latents.bfloat16(), torch.Generator()).dtype == torch.bfloat16
    result = system.run(ASKED[:1], hear="noise", seed=1, **KEEP)[0]
    again, another = (system.run(ASKED[:1], hear="noise", seed=s, **KEEP)[0] for s in (1, 2))
    key = (1, "planner", "critic")
    assert torch.equal(result.latents[key], again.latents[key])
    assert not torch.allclose(result.latents[key], another.latents[key], atol=0.1)
    norms = result.latents[key].norm(dim=1), own[0].latents[key].norm(dim=1)
    assert torch.allclose(*norms, rtol=1e-4)


def test_shuffled_is_another_order_of_the_same(system, own):
    for seed in range(20):
        latents = torch.arange(2.0)[:, None]
        assert shuffled(latents, torch.Generator().manual_seed(seed))[:, 0].tolist() == [1, 0]
    found = system.run(ASKED, hear="shuffled", **KEEP)
    key = (1, "planner", "critic")
    for result, before in zip(found, own):
        distances = torch.cdist(result.latents[key], before.latents[key])
        order = distances.argmin(1).tolist()
        assert sorted(order) == list(range(5)) and order != sorted(order)
        assert torch.allclose(result.latents[key], before.latents[key][order], atol=1e-4)


def test_a_question_that_is_stopped_leaves_the_others_their_neighbours(system):
    def stop(turn, questions):
        if (turn.round, turn.role) == (1, "planner"):
            turn.stop([0, 2])

    found = system.run(ASKED, rounds=2, hear="other", edit=stop)
    for rounds, rows in ((1, (0, 2)), (2, (1, 3, 4))):
        expected = system.run(ASKED, rounds=rounds, hear="other")
        assert [found[i].text for i in rows] == [expected[i].text for i in rows]
        assert [found[i].replaced for i in rows] == [expected[i].replaced for i in rows]


def test_messages_of_unequal_width(folders):
    """Agents of the mixture style differ in width; the last one hears three others."""
    system = minimas.load_mas_system("mixture", checkpoints=folders("mixture"), device="cpu")
    options = {"rounds": 2, "latent_steps": 3, "max_new_tokens": 4, "retry": False}
    for hear in (*LATENT, "summarizer>code=noise"):
        for result in system.run(checkpoints.QUESTIONS, hear=hear, **options):
            edges = 1 if ">" in hear else 9
            assert len(result.replaced) == edges


def test_an_edit_sees_what_is_heard_and_is_never_ignored(system):
    def edit(turn, questions):
        turn.states = turn.states * 2

    with pytest.raises(
        InputError, match="`hear` has put something else into planner>critic before"
    ):
        system.run(ASKED, rounds=2, hear="noise", edit=edit)


def test_states_may_be_changed_where_nothing_is_replaced(system):
    options = {"rounds": 2, "hear": "planner>critic=noise", "keep_latents": True}
    edge = ("critic", "solver")

    def edit(turn, questions):
        if turn.role == "critic":
            turn.states = 2 * turn.states
            sent.append(turn.sent[edge].clone())

    sent = []
    changed = system.run(ASKED, edit=edit, **options)
    unchanged = system.run(ASKED, **options)
    for i, result in enumerate(changed):
        for r in (1, 2):
            assert torch.equal(result.latents[r, *edge], sent[r - 1][i])
        assert not torch.allclose(result.latents[1, *edge], unchanged[i].latents[1, *edge])
        assert result.replaced == unchanged[i].replaced


def test_one_spelling_of_each_setting():
    spelled = lambda hear: Settings(hear=hear).completed(STYLES["tiny"]).hear
    edges = ["planner>critic", "critic>solver", "solver>planner"]
    assert spelled("+".join(f"{edge}=other" for edge in edges)) == "other"
    assert spelled("planner>critic=own") == "own" == spelled("own")
    assert spelled("solver>planner=none+planner > critic=noise") == (
        "planner>critic=noise+solver>planner=none"
    )


@pytest.mark.parametrize(
    "options, message",
    [
        ({"hear": "nothing"}, "hear 'nothing' is not known, expected one of own, other, none"),
        ({"hear": "planner>critic=nothing"}, "hear 'nothing' is not known"),
        ({"hear": "planner>solver=none"}, "edge of hear 'planner>solver'.*planner>critic"),
        ({"hear": "planner>critic=none+planner>critic=own"}, "planner>critic twice"),
        ({"hear": "noise", "channel": "text"}, "noise, which latents can be and texts cannot"),
        ({"hear": "shuffled", "channel": "text"}, "shuffled, which latents can be and texts"),
        ({"hear": "shuffled", "latent_steps": 1}, "shuffled, and latent_steps is 1"),
    ],
    ids=str,
)
def test_what_cannot_be_heard_is_refused(system, options, message):
    with pytest.raises(InputError, match=message):
        system.run(ASKED, **options)


def test_other_needs_another_question(system):
    with pytest.raises(InputError, match="there is only one question"):
        system.run(ASKED[:1], hear="other")
    with pytest.raises(InputError, match="give the question before each one"):
        settings = Settings(hear="planner>critic=other").completed(system.style)
        system.answer(system.style.questions(ASKED), settings)


def test_a_style_in_which_nobody_hears_anybody():
    with pytest.raises(InputError, match="hear is none, and nobody hears anybody"):
        Settings(hear="none").completed(STYLES["single"])


# The commands


def ask(monkeypatch, capsys, *args):
    from minimas.commands.failures import command

    monkeypatch.setattr(sys, "argv", ["recurse", "--device", "cpu", *args])
    command(ask_module.main)
    return capsys.readouterr().out


def test_ask(system, monkeypatch, capsys):
    prompts = [part for text in ASKED for part in ("--prompt", text)]
    printed = ask(monkeypatch, capsys, "--json", "--hear", "other", *prompts)
    expected = [result.text for result in system.run(ASKED, hear="other")]
    assert [json.loads(line)["text"] for line in printed.splitlines()] == expected
    with pytest.raises(SystemExit) as end:
        ask(monkeypatch, capsys, "--hear", "other", *prompts[:2])
    assert end.value.code == 2 and "only one question" in capsys.readouterr().err


def test_prompts_of_one_text_are_refused_before_a_system_is_loaded(monkeypatch, capsys):
    monkeypatch.setattr(ask_module, "load_mas_system", lambda *_, **__: pytest.fail("it loads"))
    with pytest.raises(SystemExit) as end:
        ask(monkeypatch, capsys, "--hear", "other", "--prompt", ASKED[0], "--prompt", ASKED[0])
    message = "only one question, not counting repeats: ask at least two that differ"
    assert end.value.code == 2 and message in capsys.readouterr().err


def test_trace_marks_what_was_replaced(system):
    shown = page(system, system.run(ASKED[:2], hear="other", **KEEP))
    mark = "slot: 5 latents (other) in place of those from"
    assert shown.count(mark) == 2 * 5
    shown = page(system, system.run(ASKED[:1], hear="critic>solver=none", **KEEP))
    assert shown.count("slot: 0 latents (none) in place of those from") == 2
    assert shown.count("slot: 5 latents from") == 3
    assert "in place of" not in page(system, system.run(ASKED[:1], **KEEP))


# Evaluation


@pytest.fixture(scope="module")
def examples():
    return load_dataset("tiny", limit=9)


def grid(system, examples, **more):
    options = {
        "rounds": 2,
        "channel": "latent",
        "batch_size": 4,
        "progress": False,
        "graders": "plain",
    }
    return evaluate(system, examples, **(options | more))


def test_a_row_for_each_value(system, examples, tmp_path):
    values = ["own", "other", "none", "noise", "shuffled", "planner>critic=other"]
    table = grid(system, examples, hear=values)
    assert [row["hear"] for row in table.rows] == values
    asked = [example.question for example in examples]
    for n, hear in enumerate(values):
        records = table.records[9 * n : 9 * (n + 1)]
        assert {record["hear"] for record in records} == {hear}
        expected = system.run(asked, rounds=2, hear=hear)  # in one batch
        assert [record["texts"] for record in records] == [[one.text] for one in expected]
    table.to_csv(tmp_path / "t.csv")
    with open(tmp_path / "t.csv", newline="") as file:
        assert [row["hear"] for row in csv.DictReader(file)] == values
    table.plot(tmp_path / "t.svg")
    drawn = (tmp_path / "t.svg").read_text()
    assert "latent, 5 steps, hears noise" in drawn
    assert "latent, 5 steps, hears planner&gt;critic=other" in drawn


def test_an_evaluation_is_resumed_with_other_values(system, examples, tmp_path):
    """Also in the middle of a batch: the questions before it are those of the data set."""
    out = tmp_path / "r.jsonl"
    whole = grid(system, examples, hear=["own", "other"], out=tmp_path / "whole.jsonl")
    grid(system, examples, hear="own", out=out)
    grid(system, examples, hear="other", out=out)
    kept = [line for line in out.read_text().splitlines() if '"index": 6' not in line]
    out.write_text("".join(f"{line}\n" for line in kept))
    table = grid(system, examples, hear=["own", "other"], out=out)
    without_seconds = lambda records: [record | {"seconds": 0} for record in records]
    assert without_seconds(table.records) == without_seconds(whole.records)
    assert len(out.read_text().splitlines()) == 1 + 2 * 9


def test_records_without_the_column_are_those_of_own_messages(system, examples, tmp_path):
    """As versions before it wrote them."""
    out = tmp_path / "r.jsonl"
    table = grid(system, examples, out=out)
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    for line in lines[1:]:
        del line["hear"]
    out.write_text("".join(json.dumps(line) + "\n" for line in lines))
    again = grid(system, examples, out=out)
    assert again.records == table.records
    assert grid(system, examples, out=out, regrade=True).records == table.records


def test_other_needs_another_question_in_evaluation(system, examples):
    with pytest.raises(InputError, match="only one question"):
        grid(system, examples[:1], hear=["own", "other"])
    with pytest.raises(InputError, match="--hear lists nothing"):
        grid(system, examples, hear=())
