"""Evaluation from Python: the same records and table as the command's, and nothing of a command about it."""

import csv
import json
import os
import subprocess
import sys
import xml.etree.ElementTree as xml
from dataclasses import fields, replace

import pytest

import minimas
from minimas import InputError, Settings
from minimas.commands import ask
from minimas.evaluate import Example, Table, answering, compare, evaluate, grade, load_dataset
from minimas.evaluate import __main__ as command
from minimas.evaluate.report import interval
from minimas.runs.lock import Lock, held
from minimas.styles import Origin
from minimas.system import System
from minimas.tiny.task import questions

GRID = {"rounds": [1, 3], "channel": ["latent", "text"], "temperature": 0.7, "batch_size": 4}
TYPED = ["--rounds=1,3", "--channel=latent,text", "--temperature=0.7", "--batch-size=4"]
TYPED += ["--device=cpu"]


@pytest.fixture(scope="module")
def system():
    return minimas.load_mas_system("tiny", device="cpu")


@pytest.fixture(scope="module")
def data():
    return load_dataset("tiny", limit=8)


@pytest.fixture(scope="module")
def table(system, data):
    return evaluate(system, data, **GRID, graders="plain", progress=False)


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path, monkeypatch):
    """With arguments that no parser would take."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["notebook", "--no-such-option"])


def without_time(records):
    return [
        {name: value for name, value in record.items() if name != "seconds"} for record in records
    ]


def lines(file):
    return [json.loads(line) for line in file.read_text().splitlines()]


def by_command(monkeypatch, capsys, *args):
    """What the command prints."""
    with monkeypatch.context() as patch:
        patch.setattr(sys, "argv", ["evaluate", *map(str, args)])
        command.main()
    return capsys.readouterr().out


def no_agents(monkeypatch):
    monkeypatch.setattr(System, "answer", lambda *_, **__: pytest.fail("an agent was asked"))


def test_importing_it_needs_no_torch():
    """Nor does what is given to it before a system is loaded."""
    code = (
        "import sys\n"
        "from minimas.evaluate import evaluate, load_dataset, Table\n"
        "assert len(load_dataset('tiny', limit=2)) == 2\n"
        "assert 'torch' not in sys.modules"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


@pytest.mark.slow
def test_a_script_without_a_guard_runs_once(tmp_path):
    """What it asks math-verify does not import it again."""
    pytest.importorskip("math_verify")
    script = tmp_path / "script.py"
    script.write_text(
        "print('begins')\n"
        "import minimas\n"
        "from minimas.evaluate import Example, evaluate\n"
        "system = minimas.load_mas_system('tiny', device='cpu')\n"
        "gold = r'\\sum_{k=1}^{2} 1'\n"
        "data = [Example('1', '7 +5', gold, 'math')]\n"
        "table = evaluate(system, data, graders='math-verify', progress=False)\n"
        "print(table.records[0]['right'])\n"
    )
    done = subprocess.run([sys.executable, script], capture_output=True, text=True)
    assert done.stdout == "begins\n{'math-verify': [True]}\n", done.stderr


def test_graders_start_before_the_first_question(system, data, monkeypatch):
    """Answers in memory would be lost."""
    pytest.importorskip("math_verify")
    no_agents(monkeypatch)

    def broken(_):
        raise InputError("it cannot be started")

    monkeypatch.setattr(grade.MathVerify, "start", broken)
    with pytest.raises(InputError, match="it cannot be started"):
        evaluate(system, data, graders="math-verify", progress=False)


def test_graders_come_up_while_a_system_is_loaded(data, monkeypatch):
    """It may take as long as they do."""
    pytest.importorskip("math_verify")
    own = grade.MathVerify()
    monkeypatch.setattr(grade, "math_verify", own)
    seen = []
    load = answering.load

    def loading(*args):
        seen.append(own.child is not None and own.child.poll() is None and not own.is_ready)
        return load(*args)

    monkeypatch.setattr(answering, "load", loading)
    answer = System.answer

    def answering_by(*args, **named):
        seen.append(own.is_ready)
        return answer(*args, **named)

    monkeypatch.setattr(System, "answer", answering_by)
    options = {"rounds": 1, "channel": "text", "graders": "math-verify", "progress": False}
    evaluate(Origin("tiny", device="cpu"), data[:1], **options)
    own.stop()
    assert seen == [True, True]


@pytest.mark.parametrize("name", ["data/out.jsonl", "data/sub/out.jsonl", "data/../data/t.csv"])
def test_an_output_in_the_folder_that_is_read_is_refused(system, tmp_path, name):
    """A second run would find two files of rows there."""
    (tmp_path / "data" / "sub").mkdir(parents=True)
    (tmp_path / "data" / "rows.jsonl").write_text('{"question": "7 +5", "answer": "2"}\n')
    with pytest.raises(InputError, match="out.* lies in the folder 'data', .*outside of it"):
        evaluate(system, "data", out=name, progress=False)
    for _ in range(2):
        for out in ("data/out", "out.jsonl", "data/sub/deeper/out.jsonl"):
            evaluate(system, "data", rounds=1, channel="text", out=out, progress=False)


def test_a_folder_with_the_name_of_a_benchmark_is_not_read(system, tmp_path):
    (tmp_path / "tiny").mkdir()
    evaluate(system, "tiny", limit=1, rounds=1, out="tiny/out.jsonl", progress=False)
    assert lines(tmp_path / "tiny" / "out.jsonl")[0]["dataset"] == "tiny"


# Like the command


def test_in_memory(table, system, data, tmp_path, capsys):
    """No file is written, and nothing printed; progress goes to stderr."""
    again = evaluate(system, data, **GRID, graders="plain")
    out, err = capsys.readouterr()
    assert out == "" and "32/32" in err
    assert isinstance(again, Table) and not list(tmp_path.iterdir())
    assert without_time(again.records) == without_time(table.records)
    evaluate(system, data, rounds=1, channel="latent", progress=False)
    assert capsys.readouterr() == ("", "")


def test_the_command_continues_what_python_began(
    table, system, data, tmp_path, monkeypatch, capsys
):
    out = tmp_path / "r.jsonl"
    found = evaluate(system, data, **GRID, graders="plain", out=out, progress=False)
    assert [file.name for file in tmp_path.iterdir()] == ["r.jsonl"]
    assert lines(out)[0]["dataset"] == "tiny" and lines(out)[0]["style"] == "tiny"
    assert lines(out)[1:] == sorted(
        found.records, key=lambda line: (line["channel"], line["rounds"])
    )
    assert without_time(found.records) == without_time(table.records)
    no_agents(monkeypatch)
    typed = [*TYPED, "--dataset", "tiny", "--limit", "8", "--grader", "plain", "--out", out]
    assert by_command(monkeypatch, capsys, *typed) == f"{found}\n"


def test_python_continues_what_the_command_began(
    table, system, data, tmp_path, monkeypatch, capsys
):
    """A local file of rows with names of its own, and links from another folder."""
    mine, out = tmp_path / "mine.jsonl", tmp_path / "r.jsonl"
    rows = [{"problem": one.question, "answer": one.gold} for one in data]
    mine.write_text("".join(json.dumps(row) + "\n" for row in rows))
    links = minimas.STYLES["tiny"].checkpoints["links"]
    typed = [*TYPED, "--checkpoint", f"links={links}", "--dtype", "float32", "--out", out]
    typed += ["--dataset", "mine.jsonl", "--columns", "question=problem", "--grader", "plain"]
    printed = by_command(monkeypatch, capsys, *typed)
    whole = out.read_text().splitlines(keepends=True)
    out.write_text("".join(whole[:20]))
    own = minimas.load_mas_system(
        "tiny", device="cpu", checkpoints={"links": links}, dtype="float32", fast=True
    )
    examples = load_dataset("mine.jsonl", columns={"question": "problem"})
    assert {one.dataset for one in examples} == {"mine.jsonl"}
    found = evaluate(own, examples, **GRID, graders=["plain"], out=str(out), progress=False)
    assert out.read_text().splitlines()[0] == whole[0].rstrip()
    assert without_time(lines(out)) == without_time(map(json.loads, whole))
    no_agents(monkeypatch)
    named = evaluate(
        own,
        "mine.jsonl",
        columns={"question": "problem"},
        **GRID,
        graders=["plain"],
        out=out,
        progress=False,
    )
    assert str(named) == str(found)
    columns = [line.split()[:6] for line in printed.splitlines()]
    assert columns == [line.split()[:6] for line in str(found).splitlines()]


def test_a_file_in_the_home_folder(system, data, tmp_path, monkeypatch, capsys):
    """Where its lock is, too."""
    home = tmp_path / "home"
    monkeypatch.setenv("HOME", str(home))
    evaluate(system, data[:2], rounds=1, channel="latent", out="~/a.jsonl", progress=False)
    typed = ["--dataset=tiny", "--limit=1", "--rounds=1", "--channel=latent", "--device=cpu"]
    by_command(monkeypatch, capsys, *typed, "--out=~/b.jsonl")
    assert {file.name for file in home.iterdir()} == {"a.jsonl", "b.jsonl"}
    assert list(tmp_path.iterdir()) == [home]


def test_a_data_set_that_is_named_by_a_path(system, tmp_path):
    """Records hold its name, so it is a text there; a run that gives the name as a text continues them."""
    file = tmp_path / "rows.jsonl"
    file.write_text('{"question": "7 +5", "answer": "2"}\n')
    settings = {"rounds": 1, "out": "records.jsonl", "progress": False}
    evaluate(system, load_dataset(file), **settings)
    written = (tmp_path / "records.jsonl").read_text()
    evaluate(system, load_dataset(str(file)), **settings)
    assert (tmp_path / "records.jsonl").read_text() == written


def test_a_run_that_breaks_off_is_continued(system, data, tmp_path, monkeypatch):
    """What was answered stays, and the file is free again."""
    out, answer, asked = tmp_path / "r.jsonl", System.answer, []

    def breaks(self, questions, settings, **more):
        asked.append(len(questions))
        if len(asked) == 2:
            raise KeyboardInterrupt
        return answer(self, questions, settings, **more)

    monkeypatch.setattr(System, "answer", breaks)
    options = {"rounds": 1, "channel": "latent", "batch_size": 4, "progress": False, "out": out}
    with pytest.raises(KeyboardInterrupt):
        evaluate(system, data, **options)
    assert len(lines(out)) == 1 + 4 and [file.name for file in tmp_path.iterdir()] == ["r.jsonl"]
    evaluate(system, data, **options)
    assert asked == [4, 4, 4] and len(lines(out)) == 1 + 8
    with pytest.raises(InputError, match="top_k: None there, 3 now.*give the same settings"):
        evaluate(system, data, top_k=3, **options)


def test_a_file_that_another_run_writes_is_refused(system, data, tmp_path, monkeypatch):
    no_agents(monkeypatch)
    out = tmp_path / "r.jsonl"
    with (
        held([Lock("--out", out)]),
        pytest.raises(InputError, match=f"r.jsonl is being written by process {os.getpid()}"),
    ):
        evaluate(system, data, rounds=1, out=out)
    assert not list(tmp_path.iterdir())


def test_regrade(system, data, tmp_path, monkeypatch):
    """Corrected answers need no agent, and no system that has been loaded."""
    out = tmp_path / "r.jsonl"
    options = {"rounds": 3, "channel": "latent", "out": out, "progress": False}
    before = evaluate(system, data, **options)
    wrong = [replace(one, gold="ten") for one in data]
    with pytest.raises(InputError, match="answers_hash: .*--regrade"):
        evaluate(system, wrong, **options)
    monkeypatch.setattr(answering, "load_mas_system", lambda *_, **__: pytest.fail("it loads"))
    after = evaluate(Origin("tiny"), wrong, regrade=True, **options)
    percent = next(name for name in before.rows[0] if name.endswith("%"))
    assert (before.rows[0][percent], after.rows[0][percent]) == (100, 0)
    assert [one["texts"] for one in after.records] == [one["texts"] for one in before.records]


def test_texts_of_another_device_can_be_graded_again(system, data, tmp_path):
    """Their file keeps the dtype in which they were written."""
    out = tmp_path / "r.jsonl"
    options = {"rounds": 1, "channel": "latent", "out": out, "progress": False}
    evaluate(system, data[:2], **options)
    written = out.read_text()
    assert '"dtype": "float32"' in written
    out.write_text(written.replace('"dtype": "float32"', '"dtype": "config.json"'))
    with pytest.raises(InputError, match="dtype: config.json there, float32 now"):
        evaluate(system, data[:2], **options)
    evaluate(Origin("tiny", device="cuda"), data[:2], regrade=True, **options)
    assert '"dtype": "config.json"' in out.read_text()


@pytest.mark.slow  # three processes load torch
def test_processes_of_torchrun_share_the_questions(table, tmp_path):
    """Each gets the whole table, and they may go on to the next evaluation. Without a file they are refused."""
    script = (
        "import os\n"
        "import minimas\n"
        "from minimas.evaluate import evaluate, load_dataset\n"
        "said = open(os.environ['RANK'] + '.txt', 'w')\n"  # two processes may mix what they print
        "system = minimas.load_mas_system('tiny', device='cpu')\n"
        "data = load_dataset('tiny', limit=8)\n"
        f"grid = dict({GRID}, graders='plain', progress=False)\n"
        "for out in 'a.jsonl', 'b.jsonl':\n"
        "    print(evaluate(system, data, **grid, out=out).rows[1]['plain %'], file=said)\n"
        "try:\n"
        "    evaluate(system, data, **grid)\n"
        "except minimas.InputError as e:\n"
        "    print(e, file=said)\n"
    )
    (tmp_path / "script.py").write_text(script)
    run = ["torch.distributed.run", "--standalone", "--nproc-per-node", "2", "script.py"]
    done = subprocess.run([sys.executable, "-m", *run], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    percent = str(table.rows[1]["plain %"])
    refusal = "2 processes bring their records together in a file: name one with out"
    for rank in "01":
        assert (tmp_path / f"{rank}.txt").read_text().splitlines() == [percent, percent, refusal]
    for name in "a.jsonl", "b.jsonl":
        own = {
            (one["channel"], one["rounds"], one["index"]): one for one in lines(tmp_path / name)[1:]
        }
        for one in without_time(table.records):
            key = (one["channel"], one["rounds"], one["index"])
            assert one.items() <= own[key].items()


# Settings


def test_what_is_given_by_name_comes_before_settings_and_these_before_the_protocol(
    system, data, tmp_path
):
    """The protocol of the tiny benchmark has batches of 600, five rounds, and both channels."""
    seen = []
    for number, options in enumerate(
        (
            {"rounds": 1},
            {"settings": Settings(rounds=2, batch_size=3, temperature=0.5, tools=())},
            {"settings": Settings(rounds=2, batch_size=3), "rounds": [1, 2], "batch_size": 5},
        )
    ):
        out = tmp_path / f"{number}.jsonl"
        found = evaluate(system, data[:2], out=out, progress=False, **options)
        rounds = [row["rounds"] for row in found.rows if row["channel"] == "latent"]
        settings = lines(out)[0]
        seen.append((rounds, settings["batch_size"], settings["temperature"], len(found.rows)))
    assert seen == [([1], 600, 0.0, 2), ([2], 3, 0.5, 2), ([1, 2], 5, 0.0, 4)]


def test_questions_of_ones_own(system):
    """Examples that are in no data set: the defaults of the style hold."""
    own = [
        Example(str(i), chain.question, str(chain.answer), "math")
        for i, chain in enumerate(questions("validation", 1))
    ]
    found = evaluate(system, own, progress=False)
    assert [(row["channel"], row["rounds"]) for row in found.rows] == [("latent", 3)]
    assert found.rows[0]["questions"] == len(own) == len(found.records)


def test_rows_of_ones_own(system):
    """They are read as those of a file are."""
    rows = [{"question": chain.question, "sum": chain.answer} for chain in questions("test", 1)]
    examples = load_dataset(iter(rows), columns={"answer": "sum"}, limit=5)
    assert [(one.question, one.gold) for one in examples] == [
        (row["question"], str(row["sum"])) for row in rows[:5]
    ]
    found = evaluate(system, examples, rounds=3, progress=False)
    assert found.rows[0]["questions"] == 5
    (choice,) = load_dataset(
        [{"question": "Which?", "options": ["a", "b"], "answer": "B"}], task="choice"
    )
    assert choice.gold == "B" and choice.task == "choice"


@pytest.mark.parametrize(
    "rows, options, complaint",
    [
        ([5], {}, "rows row 1 is 5, expected a dict with question and answer"),
        (
            {"question": "7 +5"},
            {},
            "the data set is .*, expected the name of a benchmark or a file",
        ),
        (5, {}, "the data set is 5, expected the name"),
        ([{"question": "7 +5"}], {}, "rows row 1 has no column 'answer'"),
        ([{"question": "", "answer": ""}], {}, "rows holds no question with an answer"),
        ([], {"file": "rows.jsonl"}, "rows are given beside file rows.jsonl"),
        ([], {"task": "history"}, "task 'history' is not known"),
    ],
    ids=str,
)
def test_rows_that_cannot_be_read(rows, options, complaint):
    with pytest.raises(InputError, match=complaint):
        load_dataset(rows, **options)


def test_a_grader_that_is_not_known(data):
    for name in ("Plain", "foo", ["plain"]):
        with pytest.raises(InputError, match="grader .* is not known, expected one of math-verify"):
            grade.is_correct(data[0], "", "5", name)


def test_a_system_with_a_hook_has_no_file(system, data, tmp_path):
    """A file of the system as it was would be taken for its records."""
    out = tmp_path / "r.jsonl"
    for module in (
        system.agents["critic"].model.layers[1].self_attn,
        system.agents["critic"].inner_link,
        system.outer_links["solver", "planner"],
    ):
        hook = module.register_forward_hook(lambda *_: None)
        with pytest.raises(InputError, match="a module of this System has a hook"):
            evaluate(system, data, rounds=1, out=out)
        hook.remove()
    assert not out.exists()


def test_texts_are_graded_again_beside_a_hook(system, data, tmp_path):
    """No agent is asked."""
    options = {"rounds": 1, "channel": "text", "out": tmp_path / "r.jsonl", "progress": False}
    table = evaluate(system, data, **options)
    hook = system.agents["critic"].model.register_forward_hook(lambda *_: None)
    try:
        assert evaluate(system, data, regrade=True, **options).records == table.records
    finally:
        hook.remove()


@pytest.mark.parametrize(
    "options, complaint",
    [
        ({"rounds": 0}, "rounds is 0, expected a whole number from 1 up"),
        ({"rounds": "1,2"}, "rounds is '1,2', expected a whole number"),
        ({"rounds": []}, "--rounds lists nothing"),
        ({"channel": "sound"}, "channel 'sound' is not known, expected one of latent, text"),
        ({"channel": ()}, "--channel lists nothing"),
        ({"graders": "mood"}, "grader 'mood' is not known"),
        ({"tools": "python"}, "tools are given, but this style's agents call none"),
        ({"protocol": "released"}, "tiny has no released settings"),
        ({"dataset": "nothing"}, "data set 'nothing' for task 'math' is not known"),
        ({"dataset": []}, "the data set holds no Examples"),
        ({"dataset": ["7 +5"]}, "the data set holds no Examples"),
        ({"dataset": [{"question": "7 +5"}]}, "load_dataset, which takes rows as dicts"),
        (
            {"dataset": [Example("a", "7 +5", 2, "math")]},
            "Example 'a' are '7 \\+5' and 2, expected",
        ),
        ({"dataset": [Example("a", "7 +5", "2", "math")] * 2, "hear": "other"}, "hear is other"),
        ({"dataset": [Example("1", "q", "a", "history")]}, "task 'history' is not known"),
        ({"dataset": "mbppplus"}, "loaded for task math, and these .* load it with task='code'"),
        ({"limit": 3}, "limit, file, columns and task are for a data set that is named"),
        ({"dataset": "tiny", "limit": 0}, "limit is 0"),
        ({"dataset": "tiny", "limit": 10**20}, "limit is 10+, expected at most 1000000000"),
        ({"dataset": "tiny", "limit": "3"}, "limit is '3', expected a whole number from 1 up"),
        ({"dataset": ""}, "the data set has an empty name"),
        ({"regrade": True, "out": "nowhere.jsonl"}, "nowhere.jsonl is not there: --regrade grades"),
        ({"regrade": True}, "name it with out"),
        ({"out": "r.jsonl.lock"}, "names that end in .lock"),
        ({"out": "."}, "--out '.' cannot be written"),
        ({"dataset": "rows.jsonl", "out": "rows.jsonl"}, "--out and --dataset are the same file"),
        ({"system": "tiny"}, "the system is 'tiny', expected a System"),
        ({"system": Origin("x")}, "style 'x' is not known"),
    ],
    ids=str,
)
def test_bad_input(system, data, monkeypatch, tmp_path, options, complaint):
    no_agents(monkeypatch)
    given = {"system": system, "dataset": data} | options
    with pytest.raises(InputError, match=complaint):
        evaluate(given.pop("system"), given.pop("dataset"), **given)
    assert not list(tmp_path.iterdir())


WRONG_TYPES = [
    ({"settings": {"rounds": 1}}, r"settings is {'rounds': 1}, expected a Settings object"),
    ({"dataset": None}, "the data set is None, expected a list of Examples"),
    ({"dataset": 5}, "the data set is 5, expected a list of Examples"),
    ({"out": 5}, "out is 5, expected a file's name"),
    ({"system": 5}, "the system is 5, expected a System: load it"),
    ({"dataset": "gsm8k", "file": 5}, "file is 5, expected a file's name"),
    ({"dataset": "gsm8k", "columns": "question=x"}, "columns is 'question=x', expected {our name"),
]


@pytest.mark.parametrize("measured", [evaluate, compare])
@pytest.mark.parametrize("options, complaint", WRONG_TYPES, ids=str)
def test_wrong_types(system, data, monkeypatch, measured, options, complaint):
    no_agents(monkeypatch)
    given = {"system": system, "dataset": data} | options
    with pytest.raises(InputError, match=complaint):
        measured(given.pop("system"), given.pop("dataset"), **given)


def test_wrong_types_of_a_data_set():
    for columns in ("question=x", {"question": 5}, ["question"]):
        with pytest.raises(InputError, match="columns is .*, expected {our name: the column in"):
            load_dataset("gsm8k", columns=columns)
    with pytest.raises(InputError, match="file is 5, expected a file's name"):
        load_dataset("gsm8k", file=5)


def test_examples_of_two_data_sets_are_refused(system, data):
    other = replace(data[0], dataset="gsm8k")
    with pytest.raises(InputError, match=r"of tiny \(math\) and gsm8k \(math\): evaluate those of"):
        evaluate(system, [*data, other])


def test_a_system_put_together_by_hand_has_no_file(system, data, tmp_path):
    """Its records could not say what they depend on."""
    own = System(system.style, system.agents, system.outer_links)
    with pytest.raises(InputError, match="it is not known from which files"):
        evaluate(own, data, rounds=1, out=tmp_path / "r.jsonl")
    found = evaluate(own, data[:2], rounds=1, channel="latent", progress=False)
    assert len(found.records) == 2


# The table


def test_rows_and_intervals(table):
    assert [(row["channel"], row["rounds"], row["latent_steps"]) for row in table.rows] == [
        ("latent", 1, 5),
        ("latent", 3, 5),
        ("text", 1, "-"),
        ("text", 3, "-"),
    ]
    for n, row in enumerate(table.rows):
        own = table.records[8 * n : 8 * (n + 1)]
        right = sum(record["right"]["plain"][0] for record in own)
        assert {record["rounds"] for record in own} == {row["rounds"]}
        assert row["plain %"] == round(100 * right / 8, 1)
        low, high = table.intervals[n]["plain"]
        assert (low, high) == tuple(100 * end for end in interval(right / 8, 8))
        assert row["plain 95 %"] == f"{low:.1f} to {high:.1f}"


def test_how_a_table_is_shown(table):
    head, *rows = str(table).splitlines()
    assert head.split()[:4] == ["channel", "rounds", "latent_steps", "hear"]
    assert len(rows) == 4 and len({len(line) for line in [head, *rows]}) == 1
    assert repr(table) == "Table(4 rows, 32 records, graded by plain)"
    shown = xml.fromstring(table._repr_html_())
    cells = [[cell.text for cell in row] for row in shown]
    assert cells[0] == list(table.rows[0])
    assert cells[1:] == [[str(value) for value in row.values()] for row in table.rows]


def test_what_a_table_writes(table, tmp_path):
    table.to_csv("t.csv")
    table.plot(tmp_path / "t.svg")
    written = list(csv.DictReader((tmp_path / "t.csv").read_text().splitlines()))
    assert [row["plain %"] for row in written] == [str(row["plain %"]) for row in table.rows]
    drawn = xml.parse(tmp_path / "t.svg").getroot()
    assert sum(element.tag.endswith("circle") for element in drawn.iter()) == 8
    for write in table.to_csv, table.plot:
        with pytest.raises(InputError, match="'none/t' cannot be written"):
            write("none/t")
    with pytest.raises(InputError, match="x.png' ends in .png, expected .svg"):
        table.plot(tmp_path / "x.png")
    assert not (tmp_path / "x.png").exists()


# Options


@pytest.mark.parametrize("module, groups", [(ask, "shown"), (command, "measured")])
def test_help_is_grouped_and_fits_two_screens(module, groups, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setattr(sys, "argv", ["command", "--help"])
    with pytest.raises(SystemExit):
        module.arguments()
    shown = capsys.readouterr().out.splitlines()
    assert len(shown) <= 2 * 50 and max(map(len, shown)) <= 100
    titles = [line for line in shown if line.endswith(":") and not line.startswith(" ")]
    assert titles[:3] == ["options:", "which system:", "how it answers:"]
    assert f"what is {groups}:" in titles and len(set(titles)) == len(titles)
    assert shown.index("which system:") - shown.index("options:") == 4, "-h and --version"


@pytest.mark.parametrize("module, args", [(ask, []), (command, ["--dataset", "tiny"])])
def test_every_setting_has_an_option(module, args, monkeypatch):
    """Its default is that of the dataclass, but where several values may be given, or a protocol has its own."""
    monkeypatch.setattr(sys, "argv", ["command", *args])
    typed = vars(module.arguments())
    left_open = ("channel", "hear", "rollouts", "batch_size") if module is command else ()
    for one in fields(Settings):
        assert typed[one.name] == (None if one.name in left_open else one.default), one.name
