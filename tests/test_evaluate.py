"""A benchmark run, broken off and resumed in every way:
the same records as an unbroken one, and a table that adds up.
"""

import csv
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import xml.etree.ElementTree as xml
from contextlib import redirect_stdout
from functools import partial

import pytest
import torch

import minimas
from minimas import common
from minimas.evaluate import __main__ as evaluate
from minimas.evaluate import answering, measure
from minimas.evaluate.benchmarks import Example
from minimas.evaluate.grade import graders_for, is_correct
from minimas.evaluate.records import answers_hash
from minimas.evaluate.report import interval
from minimas.runs.plot import save_charts, ticks
from minimas.runs.processes import Processes
from minimas.styles import STYLES
from minimas.system import System
from minimas.tiny.task import questions


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A local file of 24 chains."""
    file = tmp_path_factory.mktemp("data") / "chains.jsonl"
    file.write_text(
        "".join(
            json.dumps({"problem": c.question, "answer": str(c.answer)}) + "\n"
            for c in questions("validation", 3)
        )
    )
    return file


def options(data, out, *more):
    return [
        "--dataset",
        str(data),
        "--columns",
        "question=problem",
        "--device",
        "cpu",
        "--out",
        str(out),
        "--batch-size",
        "8",
        "--rounds",
        "1,2",
        "--channel",
        "latent,text",
        "--temperature",
        "0.7",
        *more,
    ]


def run(monkeypatch, capsys, *args):
    monkeypatch.setattr(sys, "argv", ["evaluate", *map(str, args)])
    evaluate.command(evaluate.main)
    return capsys.readouterr()


def refused(monkeypatch, capsys, *args):
    with pytest.raises(SystemExit) as end:
        run(monkeypatch, capsys, *args)
    assert end.value.code == 2
    return capsys.readouterr().err


def records(file):
    """Lines of a file of records, without the time they took."""
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    return [{name: value for name, value in line.items() if name != "seconds"} for line in lines]


def whole_records(file):
    return [line for line in file.read_bytes().split(b"\n")[:-1] if json.loads(line)]


def whole_run(data, out, *more):
    """(the file of records, what was printed)"""
    printed = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(printed):
        patch.setattr(sys, "argv", ["evaluate", *options(data, out, *more)])
        evaluate.main()
    return out, printed.getvalue()


@pytest.fixture(scope="module")
def unbroken(data, tmp_path_factory):
    return whole_run(data, tmp_path_factory.mktemp("unbroken") / "records.jsonl")


@pytest.fixture(scope="module")
def short(data, tmp_path_factory):
    """An unbroken file of records for one batch at each point."""
    return whole_run(data, tmp_path_factory.mktemp("short") / "records.jsonl", "--limit", "4")[0]


def test_table_and_records(unbroken, data):
    out, printed = unbroken
    head, *rows = (line.split() for line in printed.splitlines())
    assert [row[:4] for row in rows] == [
        ["latent", "1", "5", "own"],
        ["latent", "2", "5", "own"],
        ["text", "1", "-", "own"],
        ["text", "2", "-", "own"],
    ]
    settings, *lines = records(out)
    assert (
        settings["temperature"] == 0.7
        and settings["task"] == "math"
        and settings["questions"] == 24
        and len(lines) == 96
    )
    system = minimas.load_mas_system("tiny", device="cpu")
    asked = [line["question"] for line in lines[:24]]
    for point, part in zip(
        ((1, "latent"), (2, "latent"), (1, "text"), (2, "text")),
        (lines[i : i + 24] for i in range(0, 96, 24)),
    ):
        results = system.run(
            asked, rounds=point[0], channel=point[1], temperature=0.7, batch_size=8
        )
        assert [line["texts"] for line in part] == [[r.text] for r in results]
        assert [line["tokens"][0] + line["heard_tokens"] for line in part] == [
            r.new_tokens + r.heard_tokens for r in results
        ]
        judged = [r.answer == line["gold"] for r, line in zip(results, part)]
        assert [line["right"] for line in part] == [
            {next(iter(line["right"])): [verdict]} for line, verdict in zip(part, judged)
        ]
        shown = next(row for row in rows if (int(row[1]), row[0]) == point)
        assert float(shown[5]) == round(100 * sum(judged) / 24, 1)
    assert all(line["heard_tokens"] == 0 for line in lines[:48]) and all(
        line["heard_tokens"] > 0 for line in lines[72:]
    )


@pytest.mark.slow
@pytest.mark.parametrize("kills", [(60,), (1, 60)], ids=str)
def test_killed_and_resumed(unbroken, data, tmp_path, monkeypatch, capsys, kills):
    """Killed late, and resumed; or killed early, resumed, killed late, and resumed again."""
    out = tmp_path / "records.jsonl"
    for after in kills:
        child = subprocess.Popen(
            [sys.executable, "-m", "minimas.evaluate", *options(data, out)],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        while child.poll() is None and (not out.exists() or out.read_bytes().count(b"\n") <= after):
            time.sleep(0.01)
        child.send_signal(signal.SIGKILL)
        child.wait()
        assert after < out.read_bytes().count(b"\n")
    run(monkeypatch, capsys, *options(data, out))
    assert records(out) == records(unbroken[0])
    assert [file.name for file in tmp_path.iterdir()] == ["records.jsonl"]


def test_a_line_that_was_cut_is_written_again(short, data, tmp_path, monkeypatch, capsys):
    out, whole = tmp_path / "records.jsonl", short.read_bytes()
    for cut in 7, len(whole) // 2:
        out.write_bytes(whole[:cut])
        run(monkeypatch, capsys, *options(data, out, "--limit", "4"))
        assert records(out) == records(short)


def test_what_lies_about_is_not_taken_for_records(short, data, tmp_path, monkeypatch, capsys):
    """A rewriting that was killed, parts of a run whose file is gone, a file that is something else,
    a data set that changed.
    """
    out, limit = tmp_path / "records.jsonl", ("--limit", "4")
    (tmp_path / "records.jsonl.partial").write_text('{"minimas"')
    (tmp_path / "records.jsonl.part1").write_text(
        short.read_text().split("\n", 1)[1].replace('"gold": "', '"gold": "x')
    )
    ours_by_half = ("records.jsonl.part1.bak", "records.jsonl.part1x", "records.jsonl.part2.part1")
    for name in ours_by_half:
        (tmp_path / name).write_text("a user's")
    run(monkeypatch, capsys, *options(data, out, *limit))
    assert records(out) == records(short)
    assert all((tmp_path / name).read_text() == "a user's" for name in ours_by_half)
    assert not (tmp_path / "records.jsonl.part1").exists()
    others = {
        "mine.json": "[1, 2]",
        "row.jsonl": '{"index": 1, "problem": "a row of data"}\n',
        "style.json": '{"order": []}\n',
    }
    for name, text in others.items():
        (tmp_path / name).write_text(text)
    other = tmp_path / "other.jsonl"
    other.write_text(data.read_text().replace("+1", "+2"))
    out.write_text(short.read_text().replace(json.dumps(str(data)), json.dumps(str(other))))
    for name, text in others.items():
        for more in (), ("--regrade",):
            assert "not a file of records" in refused(
                monkeypatch, capsys, *options(data, tmp_path / name, *limit, *more)
            )
            assert (tmp_path / name).read_text() == text
    assert "rows_hash: " in refused(monkeypatch, capsys, *options(other, out, *limit))


def test_a_finished_run_loads_and_computes_nothing(unbroken, data, monkeypatch, capsys):
    monkeypatch.setattr(System, "answer", lambda *_, **__: pytest.fail("computed"))
    monkeypatch.setattr(answering, "load_mas_system", lambda *_, **__: pytest.fail("loaded"))
    assert run(monkeypatch, capsys, *options(data, unbroken[0])).out == unbroken[1]


@pytest.mark.parametrize(
    "change, complaint",
    [
        (("--seed", "7"), "seed: 42 there, 7 now"),
        (("--limit", "3"), "questions: 24 there, 3 now"),
        (("--top-k", "3"), "top_k: None there, 3 now"),
        (("--regrade", "--seed", "7"), "seed: 42 there, 7 now"),
    ],
)
def test_other_settings_are_refused(unbroken, data, monkeypatch, capsys, change, complaint):
    with pytest.raises(SystemExit) as end:
        run(monkeypatch, capsys, *options(data, unbroken[0], *change))
    err = capsys.readouterr().err
    assert end.value.code == 2 and complaint in err and err.count("\n") == 1


def test_threads_in_place_of_processes_share_the_batches(short, data, tmp_path, monkeypatch):
    """Each takes its share and writes a file of its own; the first merges them when all are done."""
    out, barrier = tmp_path / "records.jsonl", threading.Barrier(3, timeout=60)
    rank = lambda: Processes(int(threading.current_thread().name), 3)
    for module in evaluate, measure:
        monkeypatch.setattr(module, "launched", rank)
    monkeypatch.setattr(measure, "join", lambda *_: ("cpu", barrier.wait))
    monkeypatch.setattr(measure, "leave", lambda _: None)
    monkeypatch.setattr(sys, "argv", ["evaluate", *options(data, out, "--limit", "4")])
    shares, whole = {}, answering.answer_batches

    def watched(system, batches, *args):
        part = threading.current_thread().name
        shares[part] = [(point.rounds, point.channel) for point, _ in batches]
        return whole(system, batches, *args)

    monkeypatch.setattr(answering, "answer_batches", watched)
    threads = [threading.Thread(target=evaluate.main, name=str(n), daemon=True) for n in range(3)]
    [thread.start() for thread in threads]
    [thread.join(60) for thread in threads]
    assert records(out) == records(short) and [file.name for file in tmp_path.iterdir()] == [
        "records.jsonl"
    ]
    assert shares == {
        "0": [(1, "latent"), (2, "text")],
        "1": [(2, "latent")],
        "2": [(1, "text")],
    }


@pytest.mark.slow  # seven processes load torch
def test_several_processes(unbroken, data, tmp_path):
    """One of three is killed, and then two go on: all their shares of the batches are the records of one process."""
    out, part = tmp_path / "records.jsonl", tmp_path / "records.jsonl.part2"
    torchrun = lambda world: [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        str(world),
        "-m",
        "minimas.evaluate",
        *options(data, out),
    ]
    child = subprocess.Popen(torchrun(3), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while child.poll() is None and (not part.exists() or not part.stat().st_size):
        time.sleep(0.02)
    workers = subprocess.run(
        ["pgrep", "-P", str(child.pid)], capture_output=True, text=True
    ).stdout.split()
    os.kill(int(workers[-1]), signal.SIGKILL)
    assert (
        child.wait() != 0
        and len(workers) >= 3
        and len(whole_records(out)) < 97
        and whole_records(part)
    )
    done = subprocess.run(torchrun(2), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert records(out) == records(unbroken[0]) and [file.name for file in tmp_path.iterdir()] == [
        "records.jsonl"
    ]
    assert [row.split()[:5] for row in done.stdout.splitlines()] == [
        row.split()[:5] for row in unbroken[1].splitlines()
    ]


def test_out_of_memory_halves_the_batch(unbroken, data, tmp_path, monkeypatch, capsys):
    answer, sizes = System.answer, []

    def small(self, questions, settings, **more):
        sizes.append(len(questions))
        if len(questions) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return answer(self, questions, settings, **more)

    monkeypatch.setattr(System, "answer", small)
    args = options(data, tmp_path / "r.jsonl", "--limit", "4", "--channel", "latent")
    told = run(monkeypatch, capsys, *args).err
    assert records(tmp_path / "r.jsonl")[1:] == [
        line for line in records(unbroken[0])[1:49] if line["index"] < 4
    ]
    assert (
        sizes[:4] == [4, 2, 1, 1] and set(sizes[2:]) == {1} and "going on with 2 questions" in told
    )
    monkeypatch.setattr(
        System,
        "answer",
        lambda *_, **more: (_ for _ in ()).throw(
            RuntimeError("DefaultCPUAllocator: can't allocate memory")
        ),
    )
    with pytest.raises(SystemExit) as end:
        run(monkeypatch, capsys, *options(data, tmp_path / "other.jsonl"))
    assert end.value.code == 2 and "one question at a time" in capsys.readouterr().err


def test_rollouts(data, tmp_path, monkeypatch, capsys):
    """k texts from one prefill: the first is that of a run without rollouts;
    pass@k counts a question with one right of them.
    """
    system, asked = (
        minimas.load_mas_system("tiny", device="cpu"),
        [c.question for c in questions("validation", 1)],
    )
    read = []
    forward = system.agents["solver"].model.forward
    monkeypatch.setattr(
        system.agents["solver"].model,
        "forward",
        lambda x, *rest, **more: read.append(x.shape[:2]) or forward(x, *rest, **more),
    )
    settings = {"temperature": 3.0, "top_p": 1.0, "top_k": 0, "rounds": 1, "seed": 1}
    many, one = system.run(asked, rollouts=4, **settings), system.run(asked, **settings)
    assert [r.token_ids for r in many[::4]] == [r.token_ids for r in one] and [
        r.question for r in many
    ] == [q for q in asked for _ in range(4)]
    assert len({tuple(r.token_ids) for r in many}) > len(asked) and read[0][0] == 8
    assert read[1] == (sum(len(r.token_ids) > 1 for r in many), 1), "all that did not end at once"
    out = tmp_path / "r.jsonl"
    shown = run(
        monkeypatch,
        capsys,
        "--dataset",
        data,
        "--columns",
        "question=problem",
        "--rounds",
        "3",
        "--rollouts",
        "3",
        "--temperature",
        "2.5",
        "--out",
        out,
    ).out.splitlines()
    lines = records(out)[1:]
    verdicts = [next(iter(line["right"].values())) for line in lines]
    assert all(len(v) == 3 for v in verdicts) and any(any(v) and not all(v) for v in verdicts)
    assert (
        "pass@3" in shown[0]
        and str(round(100 * sum(map(any, verdicts)) / 24, 1)) in shown[1].split()
    )
    assert str(round(100 * sum(map(sum, verdicts)) / 72, 1)) in shown[1].split()


def test_rollouts_at_temperature_0_are_one(data, tmp_path, monkeypatch, capsys):
    """A warning, one text per question in records, table and System.run; and it resumes as a run without rollouts."""
    out = tmp_path / "r.jsonl"
    args = ["--dataset", data, "--columns", "question=problem", "--limit", "4", "--rounds", "1,2"]
    args += ["--channel", "latent", "--temperature", "0", "--out", out]
    common.warn_once.cache_clear()
    done = run(monkeypatch, capsys, *args, "--rollouts", "3")
    assert done.err.count("minimas: 3 rollouts at temperature 0 are the same text") == 1
    assert "pass@" not in done.out
    settings, *lines = records(out)
    assert settings["rollouts"] == 1 and len(lines) == 8
    for line in lines:
        counts = {len(line[name]) for name in ("texts", "answers", "tokens")}
        assert counts == {1} and {len(verdicts) for verdicts in line["right"].values()} == {1}
    assert run(monkeypatch, capsys, *args).out == done.out
    system = minimas.load_mas_system("tiny", device="cpu")
    assert len(system.run(["7 +5", "7 *3"], rollouts=3, temperature=0)) == 2
    assert len(system.run(["7 +5", "7 *3"], rollouts=3, temperature=0.5)) == 6
    assert len(system.run(["7 +5", "7 *3"], rollouts=3, temperature=0.5, top_k=1)) == 2
    told = capsys.readouterr().err
    assert told.count("same text") == 1 and "minimas: 3 rollouts with top_k 1 are the same" in told


def test_records_that_are_gone_at_the_end(data, tmp_path, monkeypatch, capsys):
    """The error message says so, and not to leave out an option that was not given."""
    out = tmp_path / "r.jsonl"
    whole = answering.answer_batches

    def lost(*args):
        yield from whole(*args)
        lines = out.read_text().splitlines(keepends=True)
        out.write_text("".join(lines[:-2]))

    monkeypatch.setattr(answering, "answer_batches", lost)
    args = options(data, out, "--limit", "4")
    err = refused(monkeypatch, capsys, *args)
    assert (
        f"2 of 16 questions are not answered yet, though this run answered all: something else has changed {out}"
        in err
    )
    assert "Start the same command again" in err and "--regrade" not in err
    assert "run without --regrade first" in refused(monkeypatch, capsys, *args, "--regrade")


def test_what_a_link_leads_to_is_written(short, data, tmp_path, monkeypatch, capsys):
    """The link stays, so that another run is refused by either name."""
    (tmp_path / "r.jsonl").symlink_to(tmp_path / "real.jsonl")
    run(monkeypatch, capsys, *options(data, tmp_path / "r.jsonl", "--limit", "4"))
    assert (tmp_path / "r.jsonl").is_symlink()
    assert records(tmp_path / "real.jsonl") == records(short)


def test_csv_and_plot(unbroken, data, tmp_path, monkeypatch, capsys):
    run(
        monkeypatch,
        capsys,
        *options(data, unbroken[0], "--csv", tmp_path / "t.csv", "--plot", tmp_path / "t.svg"),
    )
    rows = list(csv.DictReader((tmp_path / "t.csv").read_text().splitlines()))
    assert [(row["channel"], row["rounds"]) for row in rows] == [
        ("latent", "1"),
        ("latent", "2"),
        ("text", "1"),
        ("text", "2"),
    ]
    drawn = xml.parse(tmp_path / "t.svg").getroot()
    texts = {element.text for element in drawn.iter("{http://www.w3.org/2000/svg}text")}
    assert {
        "percent right",
        "decoded tokens a question",
        "latent, 5 steps",
        "text",
        "rounds",
    } <= texts
    assert sum(element.tag.endswith("circle") for element in drawn.iter()) == 8


def test_two_graders_side_by_side(data, tmp_path, monkeypatch, capsys):
    shown = run(
        monkeypatch,
        capsys,
        *options(data, tmp_path / "r.jsonl", "--grader", "plain,released", "--limit", "4"),
    ).out
    assert "plain %" in shown and "released %" in shown
    assert all(
        set(line["right"]) == {"plain", "released"} for line in records(tmp_path / "r.jsonl")[1:]
    )


@pytest.mark.parametrize(
    "args, complaint",
    [
        (["--dataset", "nothing"], "data set 'nothing'"),
        (["--dataset", "tiny", "--style", "x"], "style 'x'"),
        (["--dataset", "tiny", "--rounds", "1,x"], "--rounds"),
        (["--dataset", "tiny", "--rounds", "0"], "rounds is 0"),
        (["--dataset", "tiny", "--grader", "mood"], "mood"),
        (["--dataset", "tiny", "--limit", "0"], "limit is 0"),
        (["--dataset", "tiny", "--out", ""], "the path is empty"),
        (["--dataset", "tiny", "--plot", "p.png"], "'p.png' ends in .png, expected .svg"),
        (["--dataset", "tiny", "--channel", ","], "--channel lists nothing"),
        (["--dataset", "tiny", "--channel", "sound"], "channel 'sound' is not known"),
        (["--dataset", "mbppplus"], "--allow-code-execution"),
        (["--dataset", "bamboogle", "--grader", "plain"], "--grader is for mathematics"),
    ],
)
def test_bad_input(args, complaint, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as end:
        run(monkeypatch, capsys, *args)
    out, err = capsys.readouterr()
    assert end.value.code == 2 and out == "" and err.count("\n") == 1 and complaint in err


@pytest.mark.parametrize(
    "option, path, complaint",
    [
        ("--csv", "none/t.csv", "No such file or directory"),
        ("--plot", "none/t.svg", "No such file or directory"),
        ("--plot", ".", "not an ordinary file"),
        ("--out", ".", "not an ordinary file"),
        ("--out", "file/r.jsonl", "File exists"),
        ("--csv", "file/t.csv", "Not a directory"),
    ],
)
def test_files_that_cannot_be_written_are_refused_first(
    option, path, complaint, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    monkeypatch.setattr(
        measure, "load_dataset", lambda *_, **__: pytest.fail("something was computed")
    )
    with pytest.raises(SystemExit) as end:
        run(monkeypatch, capsys, "--dataset", "tiny", option, path)
    out, err = capsys.readouterr()
    assert (
        end.value.code == 2
        and out == ""
        and err.count("\n") == 1
        and err.startswith(f"minimas: {option} ")
        and complaint in err
    )
    assert [file.name for file in tmp_path.iterdir()] == ["file"]


def test_files_that_are_one_are_refused(data, tmp_path, monkeypatch, capsys):
    for args in (
        ["--csv", tmp_path / "r.jsonl"],
        ["--out", tmp_path / "r.svg", "--plot", tmp_path / "." / "r.svg"],
        ["--csv", data],
    ):
        with pytest.raises(SystemExit) as end:
            run(monkeypatch, capsys, *options(data, tmp_path / "r.jsonl", *args))
        assert end.value.code == 2 and "are the same file" in capsys.readouterr().err
    assert not list(tmp_path.iterdir()) and data.read_text().count("\n") == 24


def test_other_links_are_another_run(data, tmp_path, monkeypatch, capsys):
    """The files behind --checkpoint, under a path with an equals sign, too: it begins after the first =.
    That a file is newer, or that the records are beside the links, makes no other run of it.
    """
    links = shutil.copytree(STYLES["tiny"].checkpoints["links"], tmp_path / "lr=1e-3" / "links")
    args = options(data, links / "r.jsonl", "--limit", "4", "--checkpoint", f"links={links}")
    run(monkeypatch, capsys, *args)
    link = links / "Planner-Critic-Outerlink.pt"
    link.touch()
    run(monkeypatch, capsys, *args)
    torch.save({name: value + 1 for name, value in torch.load(link).items()}, link)
    assert "checkpoint_files: " in refused(monkeypatch, capsys, *args)


def test_records_of_another_version_are_refused(short, data, tmp_path, monkeypatch, capsys):
    out = tmp_path / "r.jsonl"
    out.write_text(short.read_text().replace(json.dumps(minimas.__version__), '"0.0.9"', 1))
    with pytest.raises(SystemExit) as end:
        run(monkeypatch, capsys, *options(data, out, "--limit", "4"))
    err = capsys.readouterr().err
    assert (
        end.value.code == 2
        and "was written by minimas 0.0.9, and this is " + minimas.__version__ in err
    )


def test_questions_are_read_before_the_system_is_loaded(tmp_path, monkeypatch, capsys):
    data, out = tmp_path / "data.jsonl", tmp_path / "r.jsonl"
    data.write_text('{"problem": "7 +5", "answer": "2"}\n{"problem": "Why?", "answer": "2"}\n')
    monkeypatch.setattr(
        answering, "load_mas_system", lambda *_, **__: pytest.fail("the system was loaded")
    )
    with pytest.raises(SystemExit) as end:
        run(monkeypatch, capsys, *options(data, out))
    assert (
        end.value.code == 2 and "cannot read 'Why?'" in capsys.readouterr().err and not out.exists()
    )


def test_a_run_that_could_not_begin_is_none(data, tmp_path, monkeypatch, capsys):
    out = tmp_path / "r.jsonl"
    args = options(data, out, "--limit", "2")
    with pytest.raises(SystemExit):
        run(monkeypatch, capsys, *args, "--checkpoint", "links=/nowhere")
    assert len(records(out)) == 1, "its settings"
    run(monkeypatch, capsys, *args)
    assert len(records(out)) == 1 + 2 * 4
    out.write_text(out.read_text() + '{"foo": 1}\n')
    with pytest.raises(SystemExit):
        run(monkeypatch, capsys, *args)
    assert "holds a line that is not a record, {'foo': 1}" in capsys.readouterr().err


def test_graders_by_kind():
    assert graders_for("released", None, False) == ("released",) and graders_for(
        "code", None, True
    ) == ("code",)
    assert graders_for("math", ("plain", "released"), False) == ("plain", "released")


def test_what_is_correct_by_the_kind_of_question():
    judge = lambda grader, answer, **fields: is_correct(
        Example("1", "q", task="math", **{"gold": "", **fields}), "t", answer, grader
    )
    assert (
        judge("choice", "B", gold="B")
        and not judge("choice", None, gold="B")
        and not judge("choice", "A", gold="B")
    )
    assert judge("text", "The Eiffel Tower.", gold="eiffel tower") and not judge(
        "plain", "3.2", gold="3.9"
    )
    for text, right in (
        (r"\boxed{3.2}", True),
        ("it is 3.2", True),
        (r"\boxed{3} \boxed{\frac{1}{2}}", True),
        (r"\boxed{4}", False),
    ):
        assert is_correct(Example("1", "q", "3.9", "math"), text, None, "released") is right, (
            "the release looks in the whole text"
        )
    program = "def add(a, b):\n    return a + b"
    assert judge("code", program, tests=["assert add(1, 2) == 3"], fn_name="add") is True
    assert (
        judge("code", program, tests=["assert add(1, 2) == 4"]) is False
        and judge("code", None, tests=[""]) is False
    )
    assert judge("code", program, tests=lambda: [("1\n2", "3")], fn_name="add") is True
    assert judge("code", "print(int(input()) + 1)", tests=[("1\n", "2\n")]) is True


def test_interval():
    """Wilson's interval, by the numbers of its textbook example and at the ends."""
    low, high = interval(0.5, 100)
    assert (round(low, 4), round(high, 4)) == (0.4038, 0.5962)
    assert (
        interval(0.0, 10)[0] == 0
        and interval(1.0, 10)[1] == 1
        and round(interval(1.0, 10)[0], 3) == 0.722
    )


def test_charts(tmp_path):
    assert (
        ticks(1, 5) == [1, 2, 3, 4, 5]
        and ticks(0, 0.93) == pytest.approx([0, 0.2, 0.4, 0.6, 0.8])
        and ticks(3, 3) == [3]
    )
    save_charts(
        tmp_path / "c.svg", [("a < b & c", "x", {"<i>": [(1, 0), (2, 5)], "one": [(1, 1)]})]
    )
    assert xml.parse(tmp_path / "c.svg").getroot().tag.endswith("svg")


def test_regrade(short, data, tmp_path, monkeypatch, capsys):
    """A corrected answer is refused, then graded again without an agent; what is missing is answered afterwards."""
    out, mine = tmp_path / "r.jsonl", tmp_path / data.name
    mine.write_text(data.read_text())
    asked = options(mine, out, "--limit", "4")
    run(monkeypatch, capsys, *asked)
    first = records(out)
    rows = [json.loads(line) for line in mine.read_text().splitlines()]
    rows[0]["answer"] = first[1]["answers"][0] + "9"  # nobody says that
    mine.write_text("".join(json.dumps(row) + "\n" for row in rows))
    before = out.read_bytes()
    assert (
        "answers_hash: " in (told := refused(monkeypatch, capsys, *asked)) and "--regrade" in told
    )
    assert out.read_bytes() == before
    with monkeypatch.context() as patch:
        patch.setattr(
            answering, "load_mas_system", lambda *_, **__: pytest.fail("an agent was loaded")
        )
        table = run(monkeypatch, capsys, *asked, "--regrade").out
    again = records(out)
    assert [line["texts"] for line in again[1:]] == [line["texts"] for line in first[1:]]
    changed = [new["index"] for old, new in zip(first[1:], again[1:]) if old != new]
    assert set(changed) == {0} and all(
        line["right"] == {"math-verify": [False]} or line["right"] == {"plain": [False]}
        for line in again[1:]
        if line["index"] == 0
    )
    assert run(monkeypatch, capsys, *asked).out == table, "it is a finished run of the new answers"
    out.write_text("".join(out.read_text().splitlines(keepends=True)[:4]))
    assert "not answered yet" in refused(monkeypatch, capsys, *asked, "--regrade")
    run(monkeypatch, capsys, *asked)
    assert records(out) == again


@pytest.mark.parametrize("old, new", [("plain", "released"), ("released", "plain")])
def test_regrade_with_another_grader(data, tmp_path, monkeypatch, capsys, old, new):
    graded = []
    for grader in old, new:
        out = tmp_path / f"{grader}.jsonl"
        run(monkeypatch, capsys, *options(data, out, "--limit", "4", "--grader", grader))
        graded.append(records(out))
    args = options(data, tmp_path / f"{old}.jsonl", "--limit", "4", "--grader", new)
    assert "graders: " in refused(monkeypatch, capsys, *args)
    run(monkeypatch, capsys, *args, "--regrade")
    assert records(tmp_path / f"{old}.jsonl") == graded[1]


def test_other_graders_are_noticed(short, data, tmp_path, monkeypatch, capsys):
    """Even if only their code has changed; and a file of an older version may be graded again."""
    out = tmp_path / short.name
    head, rest = short.read_text().split("\n", 1)
    out.write_text(
        json.dumps(json.loads(head) | {"graders_hash": "0", "minimas": "0.1"}) + "\n" + rest
    )
    args = options(data, out, "--limit", "4")
    assert "was written by minimas 0.1" in refused(monkeypatch, capsys, *args)
    run(monkeypatch, capsys, *args, "--regrade")
    assert records(out)[1:] == records(short)[1:] and records(out)[0]["minimas"] == "0.1"
    out.write_text(json.dumps(json.loads(head) | {"graders_hash": "0"}) + "\n" + rest)
    assert "graders_hash: 0 there" in refused(monkeypatch, capsys, *args)


def test_a_record_without_texts_cannot_be_graded_again(short, data, tmp_path, monkeypatch, capsys):
    out = tmp_path / short.name
    head, first, rest = short.read_text().split("\n", 2)
    record = json.loads(first)
    del record["texts"]
    out.write_text("\n".join([head, json.dumps(record), rest]))
    args = options(data, out, "--limit", "4")
    told = refused(monkeypatch, capsys, *args, "--regrade")
    assert "is not a record" in told and "lacks texts" in told


def test_another_dtype_is_another_run(short, data, tmp_path, monkeypatch, capsys):
    """Even if neither was chosen, as on a CPU and on a GPU. Older files did not say what was used then."""
    out = tmp_path / short.name
    head, rest = short.read_text().split("\n", 1)
    assert json.loads(head)["dtype"] == "float32"
    args = options(data, out, "--limit", "4")
    out.write_text(json.dumps(json.loads(head) | {"dtype": "config.json"}) + "\n" + rest)
    assert "dtype: config.json there, float32 now" in refused(monkeypatch, capsys, *args)
    out.write_text(json.dumps(json.loads(head) | {"dtype": None}) + "\n" + rest)
    run(monkeypatch, capsys, *args, "--dtype", "float32")
    assert records(out) == records(short)


def test_corrected_tests_are_noticed(tmp_path):
    """The tests of a code question belong to what verdicts depend on, read lazily or not."""
    hashes = {
        answers_hash([Example("1", "q", "", "code", tests)])
        for tests in (
            ["assert f(1) == 1"],
            ["assert f(1) == 2"],
            partial(print, digest="1"),
            partial(print, digest="2"),
        )
    }
    assert len(hashes) == 4
    assert answers_hash([Example("1", "q", "", "code", partial(print, digest="1"))]) in hashes
