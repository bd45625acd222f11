"""What links are trained on: questions, and what each agent should reply to them.

They come from the released data sets (RecursiveMAS/Sequential-Math, ...) by hub id, from local files with the same
columns (runs/formats.py), or from `tiny`, whose texts are generated. A cell may hold a list with one text per round;
later rounds repeat the last one.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from ..common import InputError, check_known, check_whole, local_path, read_json, warn
from ..prompts import TASKS, Question
from ..runs.formats import SUFFIXES
from ..runs.rows import (
    Row,
    check_columns,
    checked_rows,
    file_rows,
    is_file_name,
    numbered,
    parquet_rows,
    text_of,
)
from ..styles import Style, style_named
from ..tiny.task import lessons

# Section of prompts.json -> role -> the columns that its text can be in, in the order in which they are looked for.
# A role's own name is the first, but for the experts of a mixture: a released set, none of which was seen, may have a
# column `math`, `code` or `science` for something else.
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

    def text(self, role: str, r: int) -> str:
        """The reply of `role` in round r, counted from 1."""
        replies = self.texts[role]
        return replies[min(r, len(replies)) - 1]

    def turn(self, style: Style, role: str, r: int = 1) -> TargetTurn:
        """The TargetTurn of `role` in round r: sources before it in the order have spoken in round r, others before."""
        inbox = {}
        for source, target in style.edges:
            speaks_before = style.order.index(source) < style.order.index(role)
            last_round = r if speaks_before else r - 1
            if target == role and last_round:
                inbox[source] = self.text(source, last_round)
        return TargetTurn(self.question, inbox, self.text(role, r))


def load_examples(
    data: str | Path | Iterable[Mapping[str, Any]],
    style: Style | str | Path,
    roles: Sequence[str] | None = None,
    columns: Mapping[str, str] | None = None,
    task: str | None = None,
    limit: int | None = None,
    answer_first: bool = False,
    warn: Callable[[str], object] = warn,
) -> list[TrainExample]:
    """The TrainExamples of a data set for these roles of a style, in the order of its rows.

    data          a file, a folder, a hub id or `tiny`, as for --data; or the rows themselves, as dicts
    style         a Style, its name or its file
    roles         whose texts are wanted; None wants all, as a ridge regression and teacher's latents need them
    columns       {role, question, fn_name, type or task_family: the name of its column in the data}. A role that it
                  does not name has its text in the column of its own name, or in one of columns.json; in a style with
                  prompts of its own also in `answer`
    task          math, choice or code, for rows whose task_family is none of these; None takes the style's
    limit         the number of rows to read
    answer_first  take the last role's text from the column `answer` if that is there and not empty: outer links learn
                  the answer, while the inner link of that role learns from all that it writes
    warn          called with a warning if rows are left out because their question or a text is empty
    Raises InputError if the data is missing or damaged, lacks a column, or has a question that the style cannot read.
    """
    check_limit(limit)
    if not isinstance(style, Style):
        style = style_named(style)
    roles = style.order if roles is None else roles
    name = str(data) if isinstance(data, (str, Path)) else "examples"
    check_columns(columns)
    columns = dict(columns or {})
    check_known("role", roles, style.order)
    check_known("column", columns, ("question", "fn_name", "type", "task_family", *style.order))
    candidates = candidate_columns(style, roles, columns, answer_first)
    examples = []
    empty = []
    for row in islice(example_rows(data, columns), limit):
        example = example_of(row, style, candidates, task or style.task)
        if example:
            examples.append(example)
        else:
            empty.append(str(row))
    if empty:
        warn(
            f"{len(empty)} of {len(empty) + len(examples)} rows are left out because their question or a text is "
            f"empty; the first is {empty[0]}"
        )
    if not examples:
        raise InputError(
            f"{name} has no row with a question and a text for {', '.join(roles)}: "
            "give other data, or name its columns with --columns, in Python with columns={our name: COLUMN}"
        )
    return examples


def check_limit(limit: int | None) -> None:
    """InputError unless the number of rows to read is None or above 0."""
    if limit is not None:
        check_whole("--limit", limit, 1)


def candidate_columns(
    style: Style, roles: Sequence[str], columns: dict[str, str], answer_first: bool
) -> dict[str, list[str]]:
    """{role: the columns that its text can be in, in the order in which they are looked for}."""
    released = TEXT_COLUMNS.get(style.paradigm, {})
    candidates: dict[str, list[str]] = {}
    for role in roles:
        if role in columns:
            candidates[role] = [columns[role]]
        else:
            candidates[role] = released.get(role, [role, "answer"])
    last = style.order[-1]
    if answer_first and last in candidates and last not in columns:
        others = [name for name in candidates[last] if name != "answer"]
        candidates[last] = ["answer", *others]
    return candidates


def example_of(
    row: Row, style: Style, candidates: dict[str, list[str]], task: str
) -> TrainExample | None:
    """The TrainExample of a row; None if its question or a text is empty."""
    texts = {role: texts_of(row, role, among) for role, among in candidates.items()}
    fn_name = fn_name_of(row)
    family = row.text("task_family", required=False).strip().lower()
    typed = row.text("question").strip()
    if not typed or not all(texts.values()):
        return None
    question = style.question(typed, fn_name, task=family if family in TASKS else task)
    return TrainExample(question, texts)


def example_rows(
    data: str | Path | Iterable[Mapping[str, Any]], columns: dict[str, str]
) -> Iterator[Row]:
    """The Rows of a file or folder, of a data set on the hub, or of the tiny task, each read when it is asked for; or
    those of dicts.
    """
    if not isinstance(data, (str, Path)):
        expected = "a dict with question, answer and texts of roles, or a list of TrainExamples from load_examples"
        return numbered(checked_rows(data, "examples", expected), "examples", columns)
    data = str(data)
    if data == "tiny":
        return numbered(lessons(), data, columns)
    if is_file_name(data):
        return file_rows(local_path(data), columns)
    if re.fullmatch(r"[\w.-]+/[\w.-]+", data):
        return numbered(parquet_rows(data, "default", "train"), data, columns)
    raise InputError(
        f"{data} is no data to train on: expected a file ({', '.join(SUFFIXES)}) or a folder with one, "
        "a hub id such as RecursiveMAS/Sequential-Math, or tiny"
    )


def texts_of(row: Row, role: str, candidates: list[str]) -> tuple[str, ...]:
    """The texts of `role` in a row, one per round; () if they are empty. InputError if there is no column for them."""
    for name in columns_to_read(row, role, candidates):
        cell = row.at(name)
        cells = cell if isinstance(cell, list) else [cell]
        texts = tuple(text_of(one, f"{row}: column {name!r}").strip() for one in cells)
        if texts and all(texts):
            return texts
    return ()


def columns_to_read(row: Row, role: str, candidates: list[str]) -> list[str]:
    """The columns of a row that are read for the text of `role`: the first one that is not empty holds it.

    Released data have one of several columns filled. A column of the role's own name ends the list, so that none stands
    in for it where it is empty. But the experts of a mixture, whose released names come before their own, do not read
    their own where there is a released one. `answer`, which outer links read first, is not meant by that.
    """
    there = [name for name in candidates if name in row.cells]
    if not there:
        raise InputError(
            f"{row} has no column {' or '.join(candidates)} for {role}, only "
            f"{', '.join(row.cells) or 'an empty row'}: give {role} a text of its own in such a column, or "
            f"name its column with --columns {role}=COLUMN, in Python with load_examples(rows, style, "
            f"columns={{{role!r}: 'COLUMN'}})"
        )
    if role not in there:
        return there
    before = there[: there.index(role)]
    has_released = any(name != "answer" for name in before)
    return before if has_released else [*before, role]


def fn_name_of(row: Row) -> str | None:
    """The fn_name of a row's Question, which depends on the row's type:

    type           fn_name given    no fn_name
    none, blank    fn_name          "" (a program)
    function(al)   fn_name          None (a function without a name)
    any other      ""               ""
    """
    kind = row.text("type", required=False).strip().lower()
    fn_name = row.text("fn_name", required=False)
    if not kind:
        return fn_name
    if kind in ("function", "functional"):
        return fn_name or None
    return ""
