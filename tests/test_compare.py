"""Own latents beside other ways, question by question: the ways, the differences between them, and their arithmetic."""

import json
import sys

import pytest

import minimas
from minimas.common import InputError
from minimas.evaluate import __main__ as command
from minimas.evaluate import compare, evaluate, load_dataset, paired
from minimas.evaluate.compare import mcnemar_mid_p, paired_interval, with_interval
from minimas.evaluate.records import RECORD
from minimas.runs.lock import Lock, held
from minimas.settings import Settings
from minimas.system import System

WAYS = ["other", "none", "text", "alone"]


@pytest.fixture(scope="module")
def system():
    return minimas.load_mas_system("tiny", device="cpu", fast=True)


@pytest.fixture(scope="module")
def examples():
    return load_dataset("tiny", limit=12)


@pytest.fixture(scope="module")
def found(system, examples):
    return compare(system, examples, rounds=[1, 3], graders="plain", progress=False)


def test_the_ways_are_those_of_evaluate(system, examples, found):
    rows = found.table.rows
    assert [(row["channel"], row["rounds"], row["hear"]) for row in rows] == [
        *(("latent", r, hear) for r in (1, 3) for hear in ("own", "other", "none")),
        *(("text", r, "own") for r in (1, 3)),
        ("alone", 1, "-"),
    ]
    options = {"graders": "plain", "progress": False}
    without_seconds = lambda records: [record | {"seconds": 0} for record in records]
    latent = evaluate(
        system, examples, channel="latent", rounds=3, hear=["own", "other"], **options
    )
    records = [
        one
        for one in found.table.records
        if (one["rounds"], one["hear"]) in ((3, "own"), (3, "other"))
    ]
    latents = [one for one in records if one["channel"] == "latent"]
    assert without_seconds(latents) == without_seconds(latent.records)


def test_the_last_agent_alone_is_style_single(system, examples, found):
    solver = system.agents["solver"]
    single = minimas.load_mas_system("single", checkpoints=solver.source, device="cpu", fast=True)
    asked = [example.question for example in examples]
    expected = single.run(asked, rounds=1, temperature=0.0, max_new_tokens=8)
    assert [one["texts"] for one in found.table.records[-12:]] == [[one.text] for one in expected]


def test_differences_count_the_questions(found):
    assert [(row["way"], row["rounds"]) for row in found.differences] == [
        (way, r) for r in (1, 3) for way in WAYS
    ]
    records = [found.table.records[i : i + 12] for i in range(0, len(found.table.records), 12)]
    own, other = records[3], records[4]
    row = found.differences[4]
    right = [(a["right"]["plain"][0], b["right"]["plain"][0]) for a, b in zip(own, other)]
    assert row["only own"] == right.count((True, False)) > 3
    assert row["only it"] == right.count((False, True))
    share = (row["only own"] - row["only it"]) / 12
    assert row["plain %"] == f"{100 * share:+.1f}"
    text = found.differences[6]
    tokens = [a["tokens"][0] - b["tokens"][0] - b["heard_tokens"] for a, b in zip(own, records[7])]
    assert text["way"] == "text" and text["tokens"] == f"{sum(tokens) / 12:+.1f} +- -"
    seconds = [a["seconds"] - b["seconds"] for a, b in zip(own, records[7])]
    assert text["seconds"] == f"{sum(seconds) / 12:+.3f}", "no interval: a batch has one time"
    shown = str(found)
    assert shown.startswith(str(found.table)) and "own latents minus" in shown and "mid-p" in shown


@pytest.mark.parametrize(
    "b, c, p", [(0, 0, 1.0), (1, 5, 0.125), (5, 1, 0.125), (3, 3, 1 - 20 / 64 / 2), (0, 6, 2**-6)]
)
def test_mid_p(b, c, p):
    assert mcnemar_mid_p(b, c) == p


def test_the_interval_of_a_paired_difference():
    low, high = paired_interval(12, 4, 98)
    d = (12.5 - 4.5) / 100
    half = 1.96 * (((12.5 + 4.5) / 100 - d * d) / 100) ** 0.5
    assert (low, high) == pytest.approx((d - half, d + half))
    assert paired_interval(0, 0, 10)[0] < 0 < paired_interval(0, 0, 10)[1], "as few prove nothing"
    assert paired_interval(2, 0, 2)[1] == 1.0


def test_two_ways_of_answering_the_same_questions():
    ours = [True] * 80 + [True] * 12 + [False] * 4 + [False] * 2
    others = [True] * 80 + [False] * 12 + [True] * 4 + [False] * 2
    assert paired(ours, others) == (12, 4, 8 / 98, paired_interval(12, 4, 98), mcnemar_mid_p(12, 4))
    for one, other in (([], []), ([True], [True, False])):
        with pytest.raises(InputError, match="expected one of each for each question"):
            paired(one, other)


def test_the_interval_of_a_mean_difference():
    """None of few questions, for which the normal approximation would be too narrow."""
    assert with_interval([1, 3] * 10, 1) == f"+2.0 +- {1.96 * (20 / 19) ** 0.5 / 20**0.5:.1f}"
    assert with_interval([1, 3] * 9 + [2], 1) == "+2.0 +- -"
    assert with_interval([-4], 1) == "-4.0 +- -"


@pytest.mark.parametrize(
    "given", [{"channel": "text"}, {"hear": ["own"]}, {"rollouts": 3}], ids=str
)
def test_what_a_comparison_chooses_itself_is_refused(system, examples, given):
    (name,) = given
    with pytest.raises(InputError, match=f"--{name} is given, and a comparison chooses it"):
        compare(system, examples, **given)
    if name == "rollouts":
        with pytest.raises(InputError, match=f"--{name} is given"):
            compare(system, examples, settings=Settings(rollouts=3))


def test_what_a_comparison_needs(monkeypatch, capsys):
    """A text takes a larger cache than the latents."""

    def printed(*args):
        options = ("--dataset", "tiny", "--device", "cpu", "--max-new-tokens", "2000", "--needs")
        monkeypatch.setattr(sys, "argv", ["evaluate", *options, *args])
        command.command(command.main)
        return capsys.readouterr().out.splitlines()[2]

    assert printed("--compare").startswith("planner")
    assert printed("--compare") == printed("--channel", "text") != printed("--channel", "latent")


def test_an_unknown_setting_is_refused(system, examples):
    with pytest.raises(InputError, match="setting .beams. is not known"):
        compare(system, examples, beams=3)


@pytest.mark.parametrize("name", ["r.jsonl", "r-alone.jsonl"])
def test_both_files_are_held_and_checked_before_a_question_is_asked(
    system, examples, tmp_path, monkeypatch, name
):
    monkeypatch.setattr(System, "answer", lambda *_, **__: pytest.fail("a question was asked"))
    file = tmp_path / name
    with held([Lock("--out", file)]), pytest.raises(InputError, match=f"{name} is being written"):
        compare(system, examples, out=tmp_path / "r.jsonl")
    line = dict.fromkeys(RECORD, 0)
    file.write_text(f'{{"minimas": "{minimas.__version__}"}}\n{json.dumps(line)}\n')
    with pytest.raises(InputError, match=f"{name} holds another run"):
        compare(system, examples, out=tmp_path / "r.jsonl")


def test_a_style_without_edges_has_nothing_to_compare(system, examples):
    single = minimas.load_mas_system(
        "single", checkpoints=system.agents["solver"].source, device="cpu"
    )
    with pytest.raises(InputError, match="nobody hears anybody"):
        compare(single, examples)


def test_the_command_writes_both_files_and_continues(examples, tmp_path, monkeypatch, capsys):
    def run(*args):
        options = ("--dataset", "tiny", "--limit", "12", "--device", "cpu", "--rounds", "3")
        files = ("--out", str(tmp_path / "r.jsonl"), "--csv", str(tmp_path / "t.csv"))
        monkeypatch.setattr(sys, "argv", ["evaluate", "--compare", *options, *files, *args])
        command.command(command.main)
        return capsys.readouterr().out

    printed = run("--plot", str(tmp_path / "p.svg"))
    sizes = [
        len((tmp_path / name).read_text().splitlines()) for name in ("r.jsonl", "r-alone.jsonl")
    ]
    assert sizes == [1 + 12 * 4, 1 + 12]
    first = json.loads((tmp_path / "r-alone.jsonl").read_text().splitlines()[0])
    assert first["style"] == "single" and first["temperature"] == 0.0
    assert (tmp_path / "t.csv").read_text().count("\n") == 1 + 5
    assert ">alone<" in (tmp_path / "p.svg").read_text()
    assert run() == printed, "from the records"
    with pytest.raises(SystemExit):
        run("--csv", str(tmp_path / "r-alone.jsonl"))
    assert "are the same file" in capsys.readouterr().err
