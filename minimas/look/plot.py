"""Line charts as SVG, for the figures of evaluation and the curves of training; chart.svg is their Jinja template."""

import math

from .trace import environment


def ticks(low, high, most=6):
    """Round numbers from low to high, at most `most` of them."""
    if low == high:
        return [low]
    exponent = math.floor(math.log10((high - low) / most))
    steps = (factor * 10.0**exponent for factor in (1, 2, 5, 10, 20))
    step = next(step for step in steps if (high - low) / step <= most - 1)
    return [
        i * step for i in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)
    ]


def save_charts(file, charts):
    """Write charts side by side into one SVG file.

    charts: [(title, name of the x axis, {name of a line: [(x, y), ...]}), ...], with y from 0 up.
    """
    file.write_text(
        environment().get_template("chart.svg").render(charts=charts, ticks=ticks), encoding="utf-8"
    )
