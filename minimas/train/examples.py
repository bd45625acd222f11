"""What links are trained on: questions, and what each agent should reply to them.

They come from the released data sets (RecursiveMAS/Sequential-Math, ...) by hub id, from local .json, .jsonl and .csv
files with the same columns, or from `tiny`, whose texts are generated. A cell may hold a list with one text per round;
later rounds repeat the last one.
"""

import random
import re
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from ..common import InputError, check_known, read_json, warn
from ..evaluate.rows import FILE_READERS, Row, file_rows, parquet_rows, text_of
from ..prompts import TASKS, Question
from ..tiny.task import ROLES, length_up_to, note, random_chain

# section of prompts.json -> role -> columns, of which the first that is there and not empty is taken
TEXT_COLUMNS = read_json(Path(__file__).with_name("columns.json"))


@dataclass(frozen=True)
class TargetTurn:
    """One turn of an agent as text: the question, the message of each source so far, and the reply to learn."""

    question: Question
    inbox: dict[str, str]
    reply: str


@dataclass(frozen=True)
class TrainExample:
    """A question, and for each role its replies: one per round, the last one also for all later rounds."""

    question: Question
    texts: dict[str, tuple[str, ...]]

    def text(self, role, r):
        """The reply of `role` in round r, counted from 1."""
        return self.texts[role][min(r, len(self.texts[role])) - 1]

    def turn(self, style, role, r=1):
        """The TargetTurn of `role` in round r: sources before it in the order have spoken in round r, others in r - 1."""
        rounds = {
            source: r if style.order.index(source) < style.order.index(role) else r - 1
            for source, target in style.edges
            if target == role
        }
        inbox = {source: self.text(source, n) for source, n in rounds.items() if n}
        return TargetTurn(self.question, inbox, self.text(role, r))


def load_examples(
    data, style, roles, columns=None, task="math", limit=None, answer_first=False, tell=warn
):
    """The TrainExamples of a data set for these roles of a style, in the order of its rows.

    columns       {role, question, fn_name, type or task_family: the name of its column in the data}
    task          math, choice or code, for rows whose task_family is none of these
    limit         the number of rows to read
    answer_first  take the last role's text from the column `answer` if the row has one: outer links learn the answer,
                  while the inner link of that role learns from all that it writes
    tell          called with one sentence if rows are left out because their question or a text is empty
    Raises InputError if the data is missing or damaged, lacks a column, or has a question that the style cannot read.
    """
    columns, examples, empty = columns or {}, [], []
    check_known("column", columns, ("question", "fn_name", "type", "task_family", *style.order))
    usual = TEXT_COLUMNS.get(style.paradigm) or {role: (role, "answer") for role in style.order}
    candidates = {role: (columns[role],) if role in columns else usual[role] for role in roles}
    if answer_first and style.order[-1] not in columns:
        candidates[style.order[-1]] = tuple(dict.fromkeys(("answer", *candidates[style.order[-1]])))
    for row in islice(example_rows(data, columns), limit):
        texts = {role: texts_of(row, role, tried) for role, tried in candidates.items()}
        fn_name, family = fn_name_of(row), row.text("task_family", required=False).strip().lower()
        typed = row.text("question").strip()
        if typed and all(texts.values()):
            own_task = family if family in TASKS else task
            examples.append(TrainExample(style.question(typed, fn_name, task=own_task), texts))
        else:
            empty.append(str(row))
    if empty:
        tell(
            f"{len(empty)} of {len(empty) + len(examples)} rows are left out because their question or a text is "
            f"empty; the first is {empty[0]}"
        )
    if not examples:
        raise InputError(f"{data} has no row with a question and a text for {', '.join(roles)}")
    return examples


def example_rows(data, columns):
    """The Rows of a file, a data set on the hub, or the tiny task; each is read when it is asked for."""
    if Path(data).suffix in FILE_READERS:
        return file_rows(Path(data).expanduser(), columns)
    if data != "tiny" and not re.fullmatch(r"[\w.-]+/[\w.-]+", data):
        raise InputError(
            f"{data} is no data to train on: expected a file ({', '.join(FILE_READERS)}), a hub id such as "
            "RecursiveMAS/Sequential-Math, or tiny"
        )
    rows = tiny_rows() if data == "tiny" else parquet_rows(data, "default", "train")
    return (Row(cells, data, n, columns) for n, cells in enumerate(rows, 1))


def tiny_rows():
    """8192 random chains of at most nine steps, with every agent's note in each of three rounds, in the released columns."""
    rng = random.Random("lessons")  # a seed: another text would make other chains
    for _ in range(8192):
        chain = random_chain(rng, length_up_to(9, rng))
        plan, refined_plan, answer = (
            [
                note(role, chain, min(step, len(chain.steps)), chain.value(step))
                for step in range(first, 10, 3)
            ]
            for first, role in enumerate(ROLES, 1)
        )
        yield {
            "question": chain.question,
            "plan": plan,
            "refined_plan": refined_plan,
            "answer": answer,
        }


def texts_of(row, role, candidates):
    """The texts of `role` in a row, one per round, from the first candidate column that is not empty; () if all are."""
    there = [name for name in candidates if name in row.cells]
    if not there:
        raise InputError(
            f"{row} has no column {' or '.join(candidates)} for {role}, only "
            f"{', '.join(row.cells) or 'an empty row'}: name its column with --columns {role}=COLUMN"
        )
    for name in there:
        cells = row.cells[name] if isinstance(row.cells[name], list) else [row.cells[name]]
        texts = tuple(text_of(cell, f"{row}: column {name!r}").strip() for cell in cells)
        if texts and all(texts):
            return texts
    return ()


def fn_name_of(row):
    """The fn_name of a row's Question, which depends on the row's type:

    type           fn_name given    no fn_name
    none, blank    fn_name          "" (a program)
    function(al)   fn_name          None (a function without a name)
    any other      ""               ""
    """
    kind, fn_name = (row.text(name, required=False) for name in ("type", "fn_name"))
    if not kind:
        return fn_name
    return fn_name or None if kind.strip().lower() in ("function", "functional") else ""
