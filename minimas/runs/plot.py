"""Line charts as SVG, for the figures of evaluation and the curves of training; chart.svg is their Jinja template."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from ..jinja import environment

Point = tuple[float, float]
Chart = tuple[str, str, Mapping[str, Sequence[Point]]]  # title, x axis, {name of a line: points}


def ticks(low: float, high: float, most: int = 6) -> list[float]:
    """Round numbers from low to high, at most `most` of them."""
    if low == high:
        return [low]
    exponent = math.floor(math.log10((high - low) / most))
    steps = (factor * 10.0**exponent for factor in (1, 2, 5, 10, 20))
    step = next(step for step in steps if (high - low) / step <= most - 1)
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return [n * step for n in range(first, last + 1)]


def save_charts(file: Path, charts: Sequence[Chart]) -> None:
    """Write charts side by side into one SVG file.

    charts: each a title, the name of its x axis, and {name of a line: [(x, y), ...]} with y from 0 up.
    """
    template = environment(Path(__file__).parent).get_template("chart.svg")
    file.write_text(template.render(charts=charts, ticks=ticks), encoding="utf-8")
