"""Whether messages help: a system with its own messages, beside four ways of doing without them, question by question.

    print(compare(system, load_dataset("gsm8k", limit=100), out="records.jsonl"))

Beside `own` latents stand those of `other` questions and `none` (hear.py), the `text` channel, and the last agent
`alone`: its model under the prompt of style `single`, which is asked once, with the same settings but tools.

The differences are paired: both ways answer the same questions. Of two ways b questions are right only by own latents,
and c only by the other.

    difference  (b - c) / n, with the 95 % interval of Agresti and Min (2005): half a question is added to b, c and the
                rest of each kind, which keeps the interval honest for few questions
    p           of McNemar's test, mid-p: how probable so uneven a split of b + c is if both ways are equally good
                (Fagerland, Lydersen and Laake 2013)
    tokens      mean difference, with a 95 % interval by the normal approximation, from the deviation of a question's
                difference; "-" stands for it below FEWEST questions, which are too few for that
    seconds     mean difference only: the record of a question holds the mean of its batch, which has no deviation
"""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ..common import InputError, check_known
from ..runs.lock import held
from ..runs.outputs import output_path
from ..settings import COMPARED_HEARD, CompletedSettings, Settings
from ..styles import STYLES, Origin, Style
from .benchmarks import Example
from .measure import (
    Measurement,
    Run,
    check_arguments,
    check_continues,
    check_there,
    chosen,
    measure,
    measurement_of,
    planned,
    several,
)
from .records import POINT, Record
from .report import Interval, Row, Table, Z, as_text, tokens_of

if TYPE_CHECKING:
    from ..system import System

FEWEST = 20  # questions for a normal approximation


class Comparison:
    """What `compare` found; `print(comparison)` shows both tables.

    table        the Table of all ways; the last agent alone is its last row, under channel `alone`
    differences  dicts {column: value}: own latents minus another way, for each number of rounds and latent steps
    """

    def __init__(self, table: Table, differences: list[Row]) -> None:
        self.table = table
        self.differences = differences

    def __str__(self) -> str:
        return f"{self.table}\n\nown latents minus\n{as_text(self.differences)}"

    def __repr__(self) -> str:
        return f"Comparison({self.table!r}, {len(self.differences)} differences)"


def compare(
    system: "System | Origin",
    dataset: str | Path | Sequence[Example],
    *,
    settings: Settings | None = None,
    out: str | Path | None = None,
    regrade: bool = False,
    progress: bool = True,
    protocol: str = "paper",
    graders: str | Sequence[str] | None = None,
    allow_code_execution: bool = False,
    limit: int | None = None,
    file: str | Path | None = None,
    columns: Mapping[str, str] | None = None,
    task: str | None = None,
    **given: Any,
) -> Comparison:
    """Ask a system all questions of a data set in five ways, and say how they differ.

    out     a file of records, as for `evaluate`; those of the last agent alone are beside it, in NAME-alone.jsonl
    given   other settings, as for `evaluate`; rounds and latent_steps may have several values

    All else is as in `evaluate`. Verdicts are those of the first grader. Raises InputError as that does, and if nothing
    is left to compare.
    """
    check_arguments(dataset, settings, out, file, columns)
    check_given(given, settings)
    run, run_alone = planned_pair(
        system,
        dataset,
        chosen(settings, **given),
        protocol=protocol,
        graders=graders,
        allow_code_execution=allow_code_execution,
        limit=limit,
        file=file,
        columns=columns,
        task=task,
    )
    measurement = measurement_of(run, out, file, regrade, progress)
    file_alone = None if out is None else alone_file(out)
    alone = measurement_of(run_alone, file_alone, file, regrade, progress)
    table, table_alone = both_measured(measurement, alone)
    differences = []
    for own in run.points:
        if own.channel == "latent" and own.hear == "own":
            differences += differences_from(own, run, table, table_alone)
    return Comparison(together(table, table_alone), differences)


def planned_pair(
    system: "System | Origin",
    dataset: str | Path | Sequence[Example],
    options: Mapping[str, Any],
    **measured: Any,
) -> tuple[Run, Run]:
    """The Runs of a system and of its last agent alone; the arguments are those of `planned`."""
    if "tools" in options:
        options = {**options, "tools": several(options["tools"])}
    ways = {"channel": ("latent", "text"), "hear": COMPARED_HEARD, "rollouts": 1}
    run = planned(system, dataset, {**options, **ways}, **measured)
    if not run.style.edges:
        raise InputError("nobody hears anybody in this style, so that there is nothing to compare")
    points = [point for point in run.points if point.channel == "latent" or point.hear == "own"]
    run = replace(run, points=points)
    return run, last_agent_alone(run)


def both_measured(measurement: Measurement, alone: Measurement) -> tuple[Table, Table]:
    """The Tables of a system and of its last agent alone. Both files are held and checked before the first question."""
    rank = measurement.processes.rank
    with held([*measurement.locks, *alone.locks], rank):
        check_there(measurement)
        check_there(alone)
        if rank == 0:
            check_continues(alone)
        return measure(measurement), measure(alone)


def check_given(given: dict[str, Any], settings: Settings | None) -> None:
    """InputError if there is no such setting, or one is chosen that the comparison chooses itself."""
    check_known("setting", given, [one.name for one in fields(Settings)])
    plain = Settings()
    for name in ("channel", "hear", "rollouts"):
        in_settings = getattr(settings or plain, name) != getattr(plain, name)
        if given.get(name) not in (None, getattr(plain, name)) or in_settings:
            raise InputError(
                f"--{name} is given, and a comparison chooses it itself (one text for each question, by all channels): "
                "leave it out"
            )


def alone_file(out: str | Path) -> Path:
    """The file of records of the last agent alone, beside that of the system."""
    path = output_path(out)
    return path.with_name(f"{path.stem}-alone{path.suffix}")


# The last agent alone


def last_agent_alone(run: Run) -> Run:
    """The Run in which the last agent of a Run's system answers as style `single`, with the first point's settings."""
    style = STYLES["single"]
    origin = run.origin
    if origin.style:  # it was not put together by hand
        origin = origin_alone(origin, run.style)
    system = None
    if run.system is not None:
        system = system_alone(run.system)
    return Run(
        origin=origin,
        style=style,
        system=system,
        data=run.data,
        points=[settings_alone(run.points[0], style)],
        graders=run.graders,
    )


def settings_alone(point: CompletedSettings, style: Style) -> CompletedSettings:
    """The settings of a point, for one agent that is asked once."""
    values = asdict(point) | {"channel": "latent", "hear": "own", "rounds": 1, "latent_steps": 0}
    return Settings(**(values | {"tools": ()})).completed(style)


def origin_alone(origin: Origin, style: Style) -> Origin:
    """What the last agent of a system is loaded from as style `single`."""
    from ..devices import devices_by_role

    last = style.order[-1]
    source = style.sources(origin.checkpoints)[last]
    device = devices_by_role(style.order, origin.device)[last]
    return replace(origin, style="single", checkpoints={"agent": source}, device=str(device))


def system_alone(system: "System") -> "System":
    """The last agent of a System as style `single`."""
    from ..system import System

    agent = system.agents[system.style.order[-1]]
    origin = origin_alone(system.origin, system.style) if system.origin else None
    return System(STYLES["single"], {"agent": agent}, {}, system.task, origin)


def together(table: Table, table_alone: Table) -> Table:
    """Both in one Table."""
    (row,) = table_alone.rows
    row = row | {"channel": "alone", "latent_steps": "-", "hear": "-"}
    return Table(
        [*table.rows, row],
        [*table.records, *table_alone.records],
        [*table.intervals, *table_alone.intervals],
    )


# Differences


def differences_from(
    own: CompletedSettings, run: Run, table: Table, table_alone: Table
) -> list[Row]:
    """The rows of differences between own latents at a point and the four other ways."""
    grader = run.graders[0]
    ways: dict[str, Sequence[Record]] = {}
    for point in run.points:
        same_steps = point.channel == "text" or point.latent_steps == own.latent_steps
        if point.rounds == own.rounds and same_steps and point != own:
            way = "text" if point.channel == "text" else point.hear
            ways[way] = records_at(point, table)
    ways["alone"] = table_alone.records
    rows = []
    for name, others in ways.items():
        place = {"way": name, "rounds": own.rounds, "latent_steps": own.latent_steps}
        rows.append(place | difference(records_at(own, table), others, grader))
    return rows


def records_at(point: CompletedSettings, table: Table) -> list[Record]:
    """The records of a Table at a point of the grid, in the order of the questions."""
    place = {name: getattr(point, name) for name in POINT}
    return [record for record in table.records if place.items() <= record.items()]


def difference(ours: Sequence[Record], others: Sequence[Record], grader: str) -> Row:
    """The columns of a row of differences, from the records of the same questions in two ways."""
    verdicts = paired(
        [record["right"][grader][0] for record in ours],
        [record["right"][grader][0] for record in others],
    )
    tokens = []
    seconds = []
    for our, other in zip(ours, others, strict=True):
        tokens.append(tokens_of(our) - tokens_of(other))
        seconds.append(our["seconds"] - other["seconds"])
    low, high = verdicts.interval
    return {
        "only own": verdicts.only_ours,
        "only it": verdicts.only_others,
        f"{grader} %": f"{100 * verdicts.difference:+.1f}",
        "95 %": f"{100 * low:+.1f} to {100 * high:+.1f}",
        "mid-p": f"{verdicts.mid_p:.3g}",
        "tokens": with_interval(tokens, 1),
        "seconds": f"{statistics.fmean(seconds):+.3f}",
    }


class Paired(NamedTuple):
    """What `paired` found.

    only_ours, only_others   how many questions are right in one way only
    difference   of the fractions of questions that are right, ours minus others
    interval     of it, 95 %
    mid_p        of McNemar's test
    """

    only_ours: int
    only_others: int
    difference: float
    interval: Interval
    mid_p: float


def paired(ours: Sequence[bool], others: Sequence[bool]) -> Paired:
    """Two ways of answering the same questions, from their verdicts, question by question in the same order.

    InputError unless there is one verdict of each way for each question.
    """
    n = len(ours)
    if n == 0 or len(others) != n:
        raise InputError(
            f"there are {n} verdicts of ours and {len(others)} of others, expected one of each for each question"
        )
    b = 0
    c = 0
    for our_right, other_right in zip(ours, others, strict=True):
        if our_right and not other_right:
            b += 1
        if other_right and not our_right:
            c += 1
    return Paired(b, c, (b - c) / n, paired_interval(b, c, n), mcnemar_mid_p(b, c))


def paired_interval(b: int, c: int, n: int) -> Interval:
    """The 95 % interval of (b - c) / n, for b and c of n questions that are right in one of two ways only."""
    total = n + 2
    d = (b - c) / total
    discordant = (b + c + 1) / total
    half = Z * math.sqrt((discordant - d * d) / total)
    return max(-1.0, d - half), min(1.0, d + half)


def mcnemar_mid_p(b: int, c: int) -> float:
    """The two-sided mid-p value of McNemar's test; 1 if no question is right in one way only."""
    n = b + c
    if n == 0:
        return 1.0
    fewer = min(b, c)
    observed = math.comb(n, fewer) / 2**n
    if b == c:  # the exact p is 1 then
        return 1 - observed / 2
    below = sum(math.comb(n, k) for k in range(fewer)) / 2**n
    return 2 * below + observed


def with_interval(differences: Sequence[float], digits: int) -> str:
    """The mean of differences with half the width of its 95 % interval, "-" below FEWEST of them."""
    mean = statistics.fmean(differences)
    if len(differences) < FEWEST:
        return f"{mean:+.{digits}f} +- -"
    half = Z * statistics.stdev(differences) / math.sqrt(len(differences))
    return f"{mean:+.{digits}f} +- {half:.{digits}f}"
