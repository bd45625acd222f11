"""The table of a run, from its records: for each point of the grid accuracy with its interval, and what it cost."""

import csv
import math

from ..runs.plot import save_charts
from .records import POINT


def interval(p, n, z=1.96):
    """Wilson's 95 % interval of a share p seen in n independent trials.

    The trials are questions. With k rollouts p is the mean of the questions' own shares, whose variance is p(1 - p) at
    most: the interval is then at least as wide as it should be, and never takes rollouts for more questions.
    """
    middle, half = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return max(0.0, (middle - half) / (1 + z * z / n)), min(1.0, (middle + half) / (1 + z * z / n))


def summary(records, point, graders):
    """A row of the table from all records of a point: percentages, and means over the questions."""
    n = len(records)
    row = {name: getattr(point, name) for name in POINT} | {"questions": n}
    row["latent_steps"] = "-" if point.channel == "text" else point.latent_steps
    for grader in graders:
        verdicts = [record["right"][grader] for record in records]
        accuracy = sum(sum(own) / point.rollouts for own in verdicts) / n
        low, high = interval(accuracy, n)
        row |= {
            f"{grader} %": round(100 * accuracy, 1),
            f"{grader} 95 %": f"{100 * low:.1f} to {100 * high:.1f}",
        }
        if point.rollouts > 1:
            row[f"{grader} pass@{point.rollouts} %"] = round(100 * sum(map(any, verdicts)) / n, 1)
    tokens = sum(sum(record["tokens"]) + record["heard_tokens"] for record in records) / n
    return row | {
        "tokens": round(tokens, 1),
        "seconds": round(sum(record["seconds"] for record in records) / n, 3),
    }


def write_csv(file, rows):
    """Write the table to a file."""
    with open(file, "w", newline="", encoding="utf-8") as out:
        table = csv.DictWriter(out, rows[0])
        table.writeheader()
        table.writerows(rows)


def plot(file, rows, grader):
    """Draw accuracy and tokens against rounds, with a line for each channel and number of latent steps."""
    charts = []
    for title, column in ("percent right", f"{grader} %"), ("decoded tokens a question", "tokens"):
        lines = {}
        for row in rows:
            name = "text" if row["channel"] == "text" else f"latent, {row['latent_steps']} steps"
            lines.setdefault(name, []).append((row["rounds"], row[column]))
        charts.append((title, "rounds", {name: sorted(line) for name, line in lines.items()}))
    save_charts(file, charts)
