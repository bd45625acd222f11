"""The table of a run, from its records: for each point of the grid accuracy with its interval, and what it cost."""

import csv
import math
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from ..common import write_atomic
from ..jinja import environment
from ..runs.outputs import aligned, named_output, writable_file
from ..runs.plot import save_charts
from ..settings import Settings
from .records import POINT, Record

Row = dict[str, Any]  # of the table: column -> value
Interval = tuple[float, float]
Z = 1.96  # standard deviations of a 95 % interval to each side

HTML = """\
<table>
<tr>{% for name in rows[0] %}<th>{{ name }}</th>{% endfor %}</tr>
{% for row in rows %}
<tr>{% for value in row.values() %}<td>{{ value }}</td>{% endfor %}</tr>
{% endfor %}
</table>
"""


class Table:
    """What an evaluation found: a row for each point of the grid. `print(table)` shows what the command prints.

    rows       dicts {column: value}; percentages and means are rounded as they are printed
    records    the record of each question at each point, a dict as in the file of records, in the order of the rows
    intervals  for each row {grader: (low, high)}: Wilson's 95 % interval of its percentage, in percent
    """

    def __init__(
        self, rows: list[Row], records: list[Record], intervals: list[dict[str, Interval]]
    ) -> None:
        self.rows = rows
        self.records = records
        self.intervals = intervals

    def __str__(self) -> str:
        return as_text(self.rows)

    def __repr__(self) -> str:
        graders = ", ".join(self.intervals[0])
        return f"Table({len(self.rows)} rows, {len(self.records)} records, graded by {graders})"

    def _repr_html_(self) -> str:
        """The table in a notebook."""
        template = environment(Path(__file__).parent).from_string(HTML)
        return template.render(rows=self.rows)

    def to_csv(self, file: str | Path) -> None:
        """Write the table to a file; InputError if it cannot be written."""
        path = writable_file("the file of the table", file)
        write_atomic(path, partial(write_csv, rows=self.rows))

    def plot(self, file: str | Path) -> None:
        """Draw accuracy, by the first grader, and tokens against rounds into an SVG file, with a line for each channel,
        number of latent steps and what is heard; InputError if it cannot be written, or has the name of another format.
        """
        path = writable_file("the file of the plot", named_output(file, ".svg"))
        grader = next(iter(self.intervals[0]))
        right = ("percent right", "rounds", lines(self.rows, f"{grader} %"))
        tokens = ("decoded tokens a question", "rounds", lines(self.rows, "tokens"))
        write_atomic(path, partial(save_charts, charts=[right, tokens]))


def as_text(rows: Sequence[Row]) -> str:
    """Rows as a text with the names of their columns above them."""
    cells = [list(rows[0])]
    for row in rows:
        cells.append([str(value) for value in row.values()])
    return aligned(cells)


def make_table(
    records: Sequence[Sequence[Record]], points: Sequence[Settings], graders: Sequence[str]
) -> Table:
    """The Table of a grid from all records of each of its points."""
    rows = []
    together: list[Record] = []
    intervals = []
    for point, own in zip(points, records, strict=True):
        rows.append(summary(own, point, graders))
        together += own
        intervals.append({grader: percent_right(own, point, grader)[1] for grader in graders})
    return Table(rows, together, intervals)


def interval(p: float, n: int, z: float = Z) -> Interval:
    """Wilson's 95 % interval of a share p seen in n independent trials.

    The trials are questions. With k rollouts p is the mean of the questions' own shares, whose variance is p(1 - p) at
    most: the interval is then at least as wide as it should be, and never takes rollouts for more questions.
    """
    middle = p + z * z / (2 * n)
    half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    scale = 1 + z * z / n
    low = (middle - half) / scale
    high = (middle + half) / scale
    return max(0.0, low), min(1.0, high)


def summary(records: Sequence[Record], point: Settings, graders: Sequence[str]) -> Row:
    """A row of the table from all records of a point: percentages, and means over the questions."""
    n = len(records)
    row: Row = {name: getattr(point, name) for name in POINT}
    if point.channel == "text":
        row["latent_steps"] = "-"
    row["questions"] = n
    for grader in graders:
        row |= accuracy(records, point, grader)
    row["tokens"] = round(sum(map(tokens_of, records)) / n, 1)
    row["seconds"] = round(sum(record["seconds"] for record in records) / n, 3)
    return row


def tokens_of(record: Record) -> int:
    """The tokens that all agents decoded for a question."""
    return sum(record["tokens"]) + record["heard_tokens"]


def accuracy(records: Sequence[Record], point: Settings, grader: str) -> Row:
    """The columns of one grader: percent right, its interval, and with rollouts pass@k."""
    percent, (low, high) = percent_right(records, point, grader)
    columns: Row = {
        f"{grader} %": round(percent, 1),
        f"{grader} 95 %": f"{low:.1f} to {high:.1f}",
    }
    k = point.rollouts
    if k > 1:
        solved = sum(any(record["right"][grader]) for record in records)
        columns[f"{grader} pass@{k} %"] = round(100 * solved / len(records), 1)
    return columns


def percent_right(
    records: Sequence[Record], point: Settings, grader: str
) -> tuple[float, Interval]:
    """(percent of the texts that are right, the interval of that percentage)."""
    verdicts = [record["right"][grader] for record in records]  # k of each question
    share = sum(sum(own) / point.rollouts for own in verdicts) / len(records)
    low, high = interval(share, len(records))
    return 100 * share, (100 * low, 100 * high)


def write_csv(file: Path, rows: Sequence[Row]) -> None:
    """Write the table to a file."""
    with open(file, "w", newline="", encoding="utf-8") as out:
        table = csv.DictWriter(out, list(rows[0]))
        table.writeheader()
        table.writerows(rows)


def lines(rows: Sequence[Row], column: str) -> dict[str, list[tuple[int, float]]]:
    """{name of a line: its points (rounds, value of the column)}."""
    found: dict[str, list[tuple[int, float]]] = {}
    for row in rows:
        name = row["channel"]
        if name == "latent":
            name += f", {row['latent_steps']} steps"
        if row["hear"] not in ("own", "-"):
            name += f", hears {row['hear']}"
        found.setdefault(name, []).append((row["rounds"], row[column]))
    return {name: sorted(points) for name, points in found.items()}
