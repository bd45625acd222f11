"""Rows become lessons: the released columns of every style, every source of rows, and rows that are left out."""

import json

import pytest

import minimas
import standin
from minimas.lessons import load_lessons
from minimas.prompts import Question
from minimas.recurse import STYLES

RELEASED_ROWS = {  # a row in the columns of the authors' data cards and loaders
    "sequential_light": {"question": "1+1?", "plan": "P", "refined_plan": "R", "answer": "A", "answer_field": "x"},
    "mixture": {"question": "1+1?", "answer": "A", "hie_summarizer": "S", "hie_math_expert": "M",
                "hie_code_expert": "C", "hie_science_expert": "N", "type": "complete", "task_family": "choice",
                "domain": "d", "fn_name": None},
    "distillation": {"question": "1+1?", "distill_expert": "E", "distill_learner": "L", "plan": "P"},
    "deliberation": {"question": "1+1?", "deliberation_reflector": "R", "deliberation_toolcaller": "T", "answer": "A"},
}
SAID = {"sequential_light": "PRA", "mixture": "MCNS", "distillation": "EL", "deliberation": "RT"}


def write(file, rows):
    file.write_text(json.dumps(rows) if file.suffix == ".json" else "".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


@pytest.mark.parametrize("style", RELEASED_ROWS)
def test_released_columns(tmp_path, style):
    data, order = write(tmp_path / "rows.json", {"data": [RELEASED_ROWS[style]]}), STYLES[style].order
    lesson, = load_lessons(data, STYLES[style], order)
    assert lesson.texts == {role: (text,) for role, text in zip(order, SAID[style])}
    answered, = load_lessons(data, STYLES[style], order[-1:], answer_first=True)
    assert answered.texts == {order[-1]: ("A" if "answer" in RELEASED_ROWS[style] else "L",)}
    assert lesson.question == Question("1+1?", "", task="choice" if style == "mixture" else "math")


@pytest.mark.parametrize("row, fn_name, task", [
    ({}, "", "code"), ({"fn_name": "f"}, "f", "code"), ({"type": "functional", "fn_name": "f"}, "f", "code"),
    ({"type": "function"}, None, "code"), ({"type": "complete", "fn_name": "f"}, "", "code"),
    ({"task_family": "Math"}, "", "math"), ({"task_family": "other"}, "", "code")])
def test_what_a_row_asks_for(tmp_path, row, fn_name, task):
    data = write(tmp_path / "rows.jsonl", [RELEASED_ROWS["distillation"] | row])
    lesson, = load_lessons(data, STYLES["distillation"], ["learner"], task="code")
    assert lesson.question == Question("1+1?", fn_name, task=task)


def test_the_task_of_a_question_overrides_the_system_s():
    system = minimas.load_mas_system("tiny", device="cpu", plain=True)
    system.style = STYLES["mixture"]
    system.agents["math"] = system.agents["planner"]
    code, = system.prompts("math", [Question("Reverse a list.", "f", task="code")], {})
    assert "Implement and return the function `f` only." in code[0]


def test_empty_rows_are_counted(tmp_path):
    good, told = RELEASED_ROWS["sequential_light"], []
    rows = [good, good | {"plan": " "}, good | {"question": ""}, good | {"answer": None}, good | {"question": " 2? "}]
    style = STYLES["sequential_light"]
    lessons = load_lessons(write(tmp_path / "a.jsonl", rows), style, style.order, tell=told.append)
    assert [lesson.question.text for lesson in lessons] == ["1+1?", "2?"]
    assert told == ["3 of 5 rows are left out because their question or a text is empty; "
                    f"the first is {tmp_path / 'a.jsonl'} line 2"]
    assert len(load_lessons(write(tmp_path / "b.jsonl", rows), style, ["critic"], tell=told.append)) == 4
    with pytest.raises(minimas.InputError, match="has no row with a question and a text for planner"):
        load_lessons(write(tmp_path / "c.jsonl", rows[1:2]), style, ["planner"], tell=told.append)


def test_columns_can_be_named(tmp_path):
    data = write(tmp_path / "a.jsonl", [{"problem": "1+1?", "answer": "A", "says": ["one", "two"]}])
    columns = {"question": "problem", "expert": "says"}
    lesson, = load_lessons(data, STYLES["distillation"], ["expert", "learner"], columns, limit=1)
    assert lesson.question.text == "1+1?" and lesson.texts == {"expert": ("one", "two"), "learner": ("A",)}
    assert [lesson.text("expert", r) for r in (1, 2, 3)] == ["one", "two", "two"]


@pytest.mark.parametrize("row, options, complaint", [
    ({"question": "?", "x": 1}, {}, "no column distill_expert or refined_plan or "
     "expert_plan for expert, only question, x: name its column with --columns expert=COLUMN"),
    ({"q": "?", "refined_plan": "p"}, {}, "no column 'question', only q, refined_plan"),
    ({"question": "?", "refined_plan": {"a": 1}}, {}, "column 'refined_plan' holds a dict, expected a text or a list "
     "with one text per round"),
    ({"question": "?", "refined_plan": [{"role": "x"}]}, {}, "column 'refined_plan' holds a dict, expected a text"),
    ({"question": "?", "refined_plan": "p"}, {"columns": {"planner": "p"}},
     "column 'planner' is not known, expected one of question, fn_name"),
])
def test_bad_rows(tmp_path, row, options, complaint):
    with pytest.raises(minimas.InputError, match=complaint):
        load_lessons(write(tmp_path / "a.jsonl", [row]), STYLES["distillation"], ["expert"], **options)


def test_no_data():
    for name in "nothing.json", "sequential math", "mine.txt":
        with pytest.raises(minimas.InputError, match=name):
            load_lessons(name, STYLES["distillation"], ["expert"])


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A stand-in for the hub with 150 rows of one data set; the viewer's pages are stored under tmp_path / "home"."""
    with standin.serve(tmp_path) as server:
        standin.connect(monkeypatch, server, tmp_path)
        monkeypatch.setattr("minimas.viewer.SERVER", server.url)
        monkeypatch.setattr("huggingface_hub.constants.HF_HOME", str(tmp_path / "home"))
        rows = [RELEASED_ROWS["sequential_light"] | {"question": str(n)} for n in range(150)]
        server.sets["RecursiveMAS/Sequential-Math", "default", "train"] = rows
        yield server


def test_a_data_set_of_the_hub(hub):
    lessons = load_lessons("RecursiveMAS/Sequential-Math", STYLES["sequential_light"], ["planner"])
    assert [lesson.question.text for lesson in lessons] == [str(n) for n in range(150)]
    with pytest.raises(minimas.InputError, match="RecursiveMAS/Nothing"):
        load_lessons("RecursiveMAS/Nothing", STYLES["sequential_light"], ["planner"])


def test_a_limit_of_one_page_fetches_one_page(hub, tmp_path):
    lessons = load_lessons("RecursiveMAS/Sequential-Math", STYLES["sequential_light"], ["planner"], limit=100)
    assert len(lessons) == 100 and len(list((tmp_path / "home").rglob("*.json"))) == 1
