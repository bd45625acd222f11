"""Rows become training examples: the released columns of every style, every source of rows, and rows that are left
out.
"""

import json
from dataclasses import replace

import pytest
import standin

import minimas
from minimas.prompts import Question
from minimas.styles import STYLES
from minimas.train import examples
from minimas.train.examples import load_examples

RELEASED_ROWS = {  # a row in the columns of the authors' data cards and loaders
    "sequential_light": {
        "question": "1+1?",
        "plan": "P",
        "refined_plan": "R",
        "answer": "A",
        "answer_field": "x",
    },
    "mixture": {
        "question": "1+1?",
        "answer": "A",
        "hie_summarizer": "S",
        "hie_math_expert": "M",
        "hie_code_expert": "C",
        "hie_science_expert": "N",
        "type": "complete",
        "task_family": "choice",
        "domain": "d",
        "fn_name": None,
    },
    "distillation": {
        "question": "1+1?",
        "distill_expert": "E",
        "distill_learner": "L",
        "plan": "P",
    },
    "deliberation": {
        "question": "1+1?",
        "deliberation_reflector": "R",
        "deliberation_toolcaller": "T",
        "answer": "A",
    },
}
SAID = {"sequential_light": "PRA", "mixture": "MCNS", "distillation": "EL", "deliberation": "RT"}


def write(file, rows):
    file.write_text(
        json.dumps(rows)
        if file.suffix == ".json"
        else "".join(json.dumps(row) + "\n" for row in rows)
    )
    return str(file)


@pytest.mark.parametrize("style", RELEASED_ROWS)
def test_released_columns(tmp_path, style):
    data, order = (
        write(tmp_path / "rows.json", {"data": [RELEASED_ROWS[style]]}),
        STYLES[style].order,
    )
    (example,) = load_examples(data, STYLES[style], order)
    assert example.texts == {role: (text,) for role, text in zip(order, SAID[style])}
    (answered,) = load_examples(data, STYLES[style], order[-1:], answer_first=True)
    assert answered.texts == {order[-1]: ("A" if "answer" in RELEASED_ROWS[style] else "L",)}
    assert example.question == STYLES[style].question(
        "1+1?", task="choice" if style == "mixture" else "math"
    )
    assert example.question == Question(
        "1+1?", "", task="choice" if style == "mixture" else "math", typed="1+1?"
    )


@pytest.mark.parametrize(
    "row, fn_name, task",
    [
        ({}, "", "code"),
        ({"fn_name": "f"}, "f", "code"),
        ({"type": "functional", "fn_name": "f"}, "f", "code"),
        ({"type": " ", "fn_name": "f"}, "f", "code"),
        ({"type": "function"}, None, "code"),
        ({"type": "complete", "fn_name": "f"}, "", "code"),
        ({"task_family": "Math"}, "", "math"),
        ({"task_family": "other"}, "", "code"),
    ],
)
def test_what_a_row_asks_for(tmp_path, row, fn_name, task):
    data = write(tmp_path / "rows.jsonl", [RELEASED_ROWS["distillation"] | row])
    (example,) = load_examples(data, STYLES["distillation"], ["learner"], task="code")
    assert example.question == Question("1+1?", fn_name, task=task, typed="1+1?")


def test_the_task_of_a_question_overrides_the_system_s():
    system = minimas.load_mas_system("tiny", device="cpu")
    system.style = STYLES["mixture"]
    system.agents["math"] = system.agents["planner"]
    (code,) = system.prompts_for("math", [Question("Reverse a list.", "f", task="code")], {})
    assert "Implement and return the function `f` only." in code[0]


def test_empty_rows_are_counted(tmp_path):
    good, told = RELEASED_ROWS["sequential_light"], []
    rows = [
        good,
        good | {"plan": " "},
        good | {"question": ""},
        good | {"answer": None},
        good | {"question": " 2? "},
    ]
    style = STYLES["sequential_light"]
    examples = load_examples(
        write(tmp_path / "a.jsonl", rows), style, style.order, warn=told.append
    )
    assert [example.question.text for example in examples] == ["1+1?", "2?"]
    assert told == [
        "3 of 5 rows are left out because their question or a text is empty; "
        f"the first is {tmp_path / 'a.jsonl'} line 2"
    ]
    assert (
        len(load_examples(write(tmp_path / "b.jsonl", rows), style, ["critic"], warn=told.append))
        == 4
    )
    with pytest.raises(
        minimas.InputError, match="has no row with a question and a text for planner"
    ):
        load_examples(write(tmp_path / "c.jsonl", rows[1:2]), style, ["planner"], warn=told.append)


def test_an_empty_text_of_a_role_is_not_the_answer(tmp_path):
    """In a style of one's own. The answer stands in for a column that is not there."""
    style = replace(STYLES["sequential_light"], prompts={"planner": "{question}"})
    told = []
    rows = [
        {"question": "1+1?", "answer": "A"},
        {"question": "2+2?", "answer": "A", "planner": "P"},
        {"question": "3+3?", "answer": "A", "planner": " "},
        {"question": "4+4?", "answer": "A", "planner": None},
    ]
    data = write(tmp_path / "a.jsonl", rows)
    examples = load_examples(data, style, ["planner"], warn=told.append)
    assert [example.texts["planner"] for example in examples] == [("A",), ("P",)]
    assert told == [
        "2 of 4 rows are left out because their question or a text is empty; "
        f"the first is {data} line 3"
    ]


@pytest.mark.parametrize("style", [*RELEASED_ROWS, "tiny"])
def test_a_column_named_as_a_role(style):
    """In every style, also where `answer` stands beside it; of outer links the last role learns `answer`."""
    style = STYLES[style]
    question = "7 +5"  # which tiny can read, too
    row = {"question": question} | {role: f"text of {role}" for role in style.order}
    (example,) = load_examples([row], style)
    assert example.texts == {role: (f"text of {role}",) for role in style.order}
    (example,) = load_examples([row | {"answer": "A"}], style)
    assert example.texts == {role: (f"text of {role}",) for role in style.order}
    last = style.order[-1]
    (example,) = load_examples([row | {"answer": "A"}], style, [last], answer_first=True)
    assert example.texts == {last: ("A",)}


def test_an_empty_answer_leaves_the_column_of_the_role():
    """Outer links read `answer` first, and then what the last role has of its own."""
    style = replace(
        STYLES["sequential_light"],
        order=("thinker", "writer"),
        edges={("thinker", "writer"): "outer"},
        prompts={"thinker": "{question}", "writer": "{question}"},
    )
    row = {"question": "1+1?", "thinker": "T", "writer": "W", "answer": ""}
    (example,) = load_examples([row], style, answer_first=True)
    assert example.texts == {"thinker": ("T",), "writer": ("W",)}
    (example,) = load_examples([row | {"answer": "A"}], style, answer_first=True)
    assert example.texts["writer"] == ("A",)
    with pytest.raises(minimas.InputError, match="has no row with a question and a text"):
        load_examples([row | {"writer": ""}], style, answer_first=True, warn=lambda _: None)


@pytest.mark.parametrize(
    "style, role, filled",
    [("distillation", "learner", "distill_learner"), ("mixture", "summarizer", "summary")],
)
def test_the_column_of_the_role_is_the_last_that_is_read(style, role, filled):
    """Where it is empty, no released column stands in for it; also where outer links read `answer` first."""
    row = {"question": "1+1?", "answer": "", role: "own", filled: "released"}
    (example,) = load_examples([row], style, [role], answer_first=True)
    assert example.texts == {role: ("own",)}
    with pytest.raises(minimas.InputError, match="has no row with a question and a text"):
        load_examples([row | {role: ""}], style, [role], answer_first=True, warn=lambda _: None)


def test_a_released_column_or_that_of_the_role():
    """The role's own is read first and alone, but for the experts of a mixture, whose names are ordinary words."""
    told = []
    both = {"question": "1+1?", "planner": "own", "plan": "released"}
    (example,) = load_examples([both], "sequential_light", ["planner"])
    assert example.texts == {"planner": ("own",)}
    both["planner"] = " "
    with pytest.raises(minimas.InputError, match="has no row with a question and a text"):
        load_examples([both], "sequential_light", ["planner"], warn=told.append)
    both = {"question": "1+1?", "code": "own", "hie_code_expert": "released"}
    (example,) = load_examples([both], "mixture", ["code"])
    assert example.texts == {"code": ("released",)}
    both["hie_code_expert"] = None
    with pytest.raises(minimas.InputError, match="has no row with a question and a text"):
        load_examples([both], "mixture", ["code"], warn=told.append)
    assert len(told) == 2


@pytest.mark.parametrize("columns", ["planner=x", ["planner"], {"planner": 3}])
def test_names_of_columns_are_a_dict(columns):
    with pytest.raises(minimas.InputError, match="columns is .*, expected {our name: the column"):
        load_examples("tiny", "tiny", columns=columns)


def test_columns_can_be_named(tmp_path):
    data = write(tmp_path / "a.jsonl", [{"problem": "1+1?", "answer": "A", "says": ["one", "two"]}])
    columns = {"question": "problem", "expert": "says"}
    (example,) = load_examples(
        data, STYLES["distillation"], ["expert", "learner"], columns, limit=1
    )
    assert example.question.text == "1+1?" and example.texts == {
        "expert": ("one", "two"),
        "learner": ("A",),
    }
    assert [example.text("expert", r) for r in (1, 2, 3)] == ["one", "two", "two"]


@pytest.mark.parametrize(
    "row, options, complaint",
    [
        (
            {"question": "?", "x": 1},
            {},
            "no column expert or distill_expert or refined_plan or expert_plan for expert, only question, x: "
            "give expert a text of its own in such a column, or name its column with --columns expert=COLUMN, in "
            r"Python with load_examples\(rows, style, columns={'expert': 'COLUMN'}\)",
        ),
        ({"q": "?", "refined_plan": "p"}, {}, "no column 'question', only q, refined_plan"),
        (
            {"question": "?", "refined_plan": {"a": 1}},
            {},
            "column 'refined_plan' holds a dict, expected text or a number",
        ),
        (
            {"question": "?", "refined_plan": [{"role": "x"}]},
            {},
            "column 'refined_plan' holds a dict, expected text or a number",
        ),
        (
            {"question": "?", "refined_plan": "p"},
            {"columns": {"planner": "p"}},
            "column 'planner' is not known, expected one of question, fn_name",
        ),
    ],
)
def test_bad_rows(tmp_path, row, options, complaint):
    with pytest.raises(minimas.InputError, match=complaint):
        load_examples(
            write(tmp_path / "a.jsonl", [row]), STYLES["distillation"], ["expert"], **options
        )


def test_no_data():
    for name in "nothing.json", "sequential math", "mine.txt":
        with pytest.raises(minimas.InputError, match=name):
            load_examples(name, STYLES["distillation"], ["expert"])


def test_a_question_is_rewritten_and_refused_by_its_style(tmp_path):
    """Typed questions become what agents read when the data is read; what a style cannot read is refused then."""
    rows = [{"question": " 7 +5 ", "plan": "p", "refined_plan": "r", "answer": "a"}]
    (example,) = load_examples(
        write(tmp_path / "a.jsonl", rows), STYLES["tiny"], STYLES["tiny"].order
    )
    assert (example.question.text, example.question.typed) == ("7 a+5", "7 +5")
    with pytest.raises(minimas.InputError, match="the tiny system cannot read '1.1.'"):
        load_examples(
            write(tmp_path / "b.jsonl", [rows[0] | {"question": "1+1?"}]),
            STYLES["tiny"],
            ["planner"],
        )


def test_a_data_set_of_the_hub(tmp_path, monkeypatch):
    """150 rows of its Parquet export, in their order; one that is not there is refused."""
    parquet, Table = pytest.importorskip("pyarrow.parquet"), pytest.importorskip("pyarrow").Table
    file = (
        tmp_path
        / "datasets"
        / "RecursiveMAS"
        / "Sequential-Math"
        / "default"
        / "train"
        / "0000.parquet"
    )
    file.parent.mkdir(parents=True)
    rows = [RELEASED_ROWS["sequential_light"] | {"question": str(n)} for n in range(150)]
    parquet.write_table(Table.from_pylist(rows), file)
    with standin.serve(tmp_path) as server:
        standin.connect(monkeypatch, server, tmp_path / "cache")
        style = STYLES["sequential_light"]
        examples = load_examples("RecursiveMAS/Sequential-Math", style, ["planner"])
        assert [example.question.text for example in examples] == [str(n) for n in range(150)]
        with pytest.raises(minimas.InputError, match="RecursiveMAS/Nothing"):
            load_examples("RecursiveMAS/Nothing", style, ["planner"])


def test_a_limit_reads_no_more_rows(monkeypatch):
    """Of a set on the hub, too: a row is asked for when it is needed."""

    def endless(repository, config, split):
        assert (repository, config, split) == ("RecursiveMAS/Sequential-Math", "default", "train")
        for n in range(100):
            yield RELEASED_ROWS["sequential_light"] | {"question": str(n)}
        pytest.fail("more than the limit was read")

    monkeypatch.setattr(examples, "parquet_rows", endless)
    assert (
        len(
            load_examples(
                "RecursiveMAS/Sequential-Math", STYLES["sequential_light"], ["planner"], limit=100
            )
        )
        == 100
    )
