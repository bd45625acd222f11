"""The table of a run, from its records: for each point of the grid accuracy with its interval, and what it cost."""

import csv
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..runs.plot import save_charts
from ..settings import Settings
from .records import POINT

Record = dict[str, Any]
Row = dict[str, Any]  # of the table: column -> value


def interval(p: float, n: int, z: float = 1.96) -> tuple[float, float]:
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
    tokens = [sum(record["tokens"]) + record["heard_tokens"] for record in records]
    row["tokens"] = round(sum(tokens) / n, 1)
    row["seconds"] = round(sum(record["seconds"] for record in records) / n, 3)
    return row


def accuracy(records: Sequence[Record], point: Settings, grader: str) -> Row:
    """The columns of one grader: percent right, its interval, and with rollouts pass@k."""
    n = len(records)
    k = point.rollouts
    verdicts = [record["right"][grader] for record in records]  # k of each question
    share = sum(sum(own) / k for own in verdicts) / n
    low, high = interval(share, n)
    columns = {
        f"{grader} %": round(100 * share, 1),
        f"{grader} 95 %": f"{100 * low:.1f} to {100 * high:.1f}",
    }
    if k > 1:
        solved = sum(any(own) for own in verdicts)
        columns[f"{grader} pass@{k} %"] = round(100 * solved / n, 1)
    return columns


def write_csv(file: Path, rows: Sequence[Row]) -> None:
    """Write the table to a file."""
    with open(file, "w", newline="", encoding="utf-8") as out:
        table = csv.DictWriter(out, list(rows[0]))
        table.writeheader()
        table.writerows(rows)


def plot(file: Path, rows: Sequence[Row], grader: str) -> None:
    """Draw accuracy and tokens against rounds, with a line for each channel and number of latent steps."""
    right = ("percent right", "rounds", lines(rows, f"{grader} %"))
    tokens = ("decoded tokens a question", "rounds", lines(rows, "tokens"))
    save_charts(file, [right, tokens])


def lines(rows: Sequence[Row], column: str) -> dict[str, list[tuple[int, float]]]:
    """{name of a line: its points (rounds, value of the column)}."""
    found: dict[str, list[tuple[int, float]]] = {}
    for row in rows:
        name = "text" if row["channel"] == "text" else f"latent, {row['latent_steps']} steps"
        found.setdefault(name, []).append((row["rounds"], row[column]))
    return {name: sorted(points) for name, points in found.items()}
