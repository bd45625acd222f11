"""What links are trained on: questions, and by agent what it shall say to them.

The released data sets (RecursiveMAS/Sequential-Math, ...) by their hub id, local .json, .jsonl and .csv files with the same
columns, or `tiny`: chains whose every step is said. A cell may hold a list, one text for each round; the last is repeated.
"""

import random
import re
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from . import InputError
from .data import FILE_READERS, Row, complain, file_rows
from .prompts import TASKS, Question
from .tiny.task import ROLES, draw, length_up_to, note
from .viewer import viewer_rows

COLUMNS = {  # by style's prompts and role; the first that a row has and that is not empty
    "sequential": {"planner": ("plan",), "critic": ("refined_plan",), "solver": ("answer",)},
    "tiny": {"planner": ("plan",), "critic": ("refined_plan",), "solver": ("answer",)},
    "mixture": {"math": ("hie_math_expert", "math_expert", "expert_math"),
                "code": ("hie_code_expert", "code_expert", "expert_code"),
                "science": ("hie_science_expert", "science_expert", "expert_science"),
                "summarizer": ("hie_summarizer", "summary", "answer")},
    "distillation": {"expert": ("distill_expert", "refined_plan", "expert_plan"),
                     "learner": ("distill_learner", "answer", "learner_answer")},
    "deliberation": {"reflector": ("deliberation_reflector", "answer"), "toolcaller": ("deliberation_toolcaller", "answer")},
}


@dataclass(frozen=True)
class Turn:
    """One turn of one agent in words: what it was asked, what each source had sent it, and what it replies."""
    question: Question
    inbox: dict[str, str]
    reply: str


@dataclass(frozen=True)
class Lesson:
    """A question, and by role what an agent shall say to it: a text for each round, the last one for all that follow."""
    question: Question
    texts: dict[str, tuple[str, ...]]

    def text(self, role, r):
        return self.texts[role][min(r, len(self.texts[role])) - 1]

    def turn(self, style, role, r=1):
        """What `role` says in round r, and what it has heard by then."""
        sources = [source for source, target in style.edges if target == role]
        said_in = {source: r if style.order.index(source) < style.order.index(role) else r - 1 for source in sources}
        return Turn(self.question, {source: self.text(source, n) for source, n in said_in.items() if n}, self.text(role, r))


def load_lessons(data, style, roles, columns=None, task="math", limit=None, answer_first=False, tell=complain):
    """The Lessons of a data set for these roles of a style, in its order.

    columns  {question, fn_name, type, task_family, or a role: what the file calls it}
    task     math, choice or code, where a row has no task_family
    limit    read no more than so many rows
    answer_first  the last role's text is the row's answer, if it has one, before what it was given to learn from
    tell     is called with a sentence on rows that are left out, for their question or a text is empty
    Raises InputError on data that is not there or damaged, a column that is missing, a question that the style cannot read.
    """
    named, columns, lessons, empty = COLUMNS[style.prompts], columns or {}, [], []
    nameable = ("question", "fn_name", "type", "task_family", *style.order)
    if unknown := set(columns) - set(nameable):
        raise InputError(f"a column is given for {min(unknown)!r}, expected one of {', '.join(nameable)}")
    candidates = {role: (columns[role],) if role in columns else named[role] for role in roles}
    if answer_first and style.order[-1] not in columns:
        candidates[style.order[-1]] = tuple(dict.fromkeys(("answer", *candidates[style.order[-1]])))
    rows = rows_of(data, columns)
    for row in islice(rows, limit):
        texts = {role: texts_of(row, role, names) for role, names in candidates.items()}
        question = question_of(row, task)
        if question.text and all(texts.values()):
            style.read(question.text)  # only to refuse now what could not be read later
            lessons.append(Lesson(question, texts))
        else:
            empty.append(str(row))
    if empty:
        tell(f"{len(empty)} of {len(empty) + len(lessons)} rows left out, with an empty question or text; the first is {empty[0]}")
    if not lessons:
        raise InputError(f"{data} holds no row with a question and a text for {', '.join(roles)}")
    return lessons


def rows_of(data, columns):
    """The Rows of a file, a data set of the hub, or of the tiny task; each is read when it is asked for."""
    if data == "tiny":
        return (Row(cells, data, n, columns) for n, cells in enumerate(tiny_rows(), 1))
    if Path(data).suffix in FILE_READERS:
        return file_rows(Path(data).expanduser(), columns)
    if re.fullmatch(r"[\w.-]+/[\w.-]+", data):
        return (Row(cells, data, n, columns) for n, cells in enumerate(viewer_rows(data, "default", "train"), 1))
    raise InputError(f"{data} is no data to train on: expected a file {', '.join(FILE_READERS)}, a hub id like "
                     "RecursiveMAS/Sequential-Math, or tiny")


def tiny_rows(count=8192, rounds=3):
    """Chains with every agent's note in every round, as far as three steps a round go."""
    rng = random.Random("lessons")
    for _ in range(count):
        chain = draw(rng, length_up_to(3 * rounds, rng))
        said = {role: [] for role in ROLES}
        for step in range(1, 3 * rounds + 1):
            role, done = ROLES[(step - 1) % 3], min(step, len(chain.steps))
            said[role].append(note(role, chain, done, chain.value(done)))
        yield {"question": chain.question, "plan": said["planner"], "refined_plan": said["critic"], "answer": said["solver"]}


def texts_of(row, role, names):
    """What `role` says in a row, () where that is empty."""
    there = [name for name in names if name in row.cells]
    if not there:
        raise InputError(f"{row} has no column {' or '.join(names)} for {role}, only {', '.join(row.cells) or 'an empty row'}: "
                         f"say which it is with --columns {role}=COLUMN")
    for name in there:
        cells = row.cells[name] if isinstance(row.cells[name], list) else [row.cells[name]]
        if wrong := [cell for cell in cells if isinstance(cell, (list, dict))]:
            raise InputError(f"{row}: column {name!r} holds a {type(wrong[0]).__name__}, expected a text, "
                             "or a list with one for each round")
        texts = tuple("" if cell is None else str(cell).strip() for cell in cells)
        if texts and all(texts):
            return texts
    return ()


def question_of(row, task):
    """A row's Question; `type` says whether code is to be a function, task_family overrides the task."""
    kind, fn_name = row.get("type", None), row.get("fn_name", None) or None
    if kind is None:
        fn_name = fn_name or ""
    elif str(kind).strip().lower() not in ("function", "functional"):
        fn_name = ""
    family = str(row.get("task_family", None) or "").strip().lower()
    return Question(row.text("question").strip(), fn_name, task=family if family in TASKS else task)
