"""Line charts as SVG, for the figures of evaluation and the curves of training."""

import math
from html import escape

WIDTH, HEIGHT = 420, 300  # pixels of a chart
LEFT, RIGHT, TOP, BOTTOM = 56, 20, 34, 40  # pixels between its edges and the lines, for numbers and names
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")  # distinct to the colour-blind, too


def ticks(low, high, most=6):
    """Round numbers from low to high, at most `most` of them."""
    if low == high:
        return [low]
    exponent = math.floor(math.log10((high - low) / most))
    steps = (factor * 10.0 ** exponent for factor in (1, 2, 5, 10, 20))
    step = next(step for step in steps if (high - low) / step <= most - 1)
    return [i * step for i in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def chart(title, x_name, lines, left=0):
    """One chart as SVG elements, `left` pixels from the left; lines: {name: [(x, y), ...]}, with y from 0 up."""
    points = [point for line in lines.values() for point in line]
    low, high, top = min(x for x, _ in points), max(x for x, _ in points), max(y for _, y in points) or 1
    start, end = left + LEFT, left + WIDTH - RIGHT
    px = lambda x: start + (x - low) / ((high - low) or 1) * (end - start)
    py = lambda y: HEIGHT - BOTTOM - y / top * (HEIGHT - BOTTOM - TOP)
    parts = [f'<text x="{start}" y="18" font-weight="bold">{escape(title)}</text>',
             f'<text x="{end}" y="{HEIGHT - 6}" text-anchor="end">{escape(x_name)}</text>']
    for y in ticks(0, top):
        parts += [f'<path d="M{start},{py(y):.1f}H{end}" stroke="#ccc"/>',
                  f'<text x="{start - 6}" y="{py(y) + 4:.1f}" text-anchor="end">{y:g}</text>']
    marks = sorted({x for x, _ in points})
    for x in marks if len(marks) < 8 else ticks(low, high):
        parts.append(f'<text x="{px(x):.1f}" y="{HEIGHT - 22}" text-anchor="middle">{x:g}</text>')
    for i, (name, line) in enumerate(lines.items()):
        colour, name = COLOURS[i % len(COLOURS)], escape(name)
        path = "L".join(f"{px(x):.1f},{py(y):.1f}" for x, y in line)
        parts.append(f'<path d="M{path}" fill="none" stroke="{colour}" stroke-width="2"><title>{name}</title></path>')
        for x, y in line if len(line) < 30 else ():
            parts.append(f'<circle cx="{px(x):.1f}" cy="{py(y):.1f}" r="3" fill="{colour}">'
                         f'<title>{name}: {x:g}, {y:g}</title></circle>')
        parts.append(f'<text x="{start + 8}" y="{TOP + 12 + 15 * i}" fill="{colour}">{name}</text>')
    return parts


def save_charts(file, charts):
    """Write charts, [(title, name of the x axis, lines as in `chart`), ...], side by side into one SVG file."""
    parts = [part for i, one in enumerate(charts) for part in chart(*one, left=i * WIDTH)]
    size = f'viewBox="0 0 {len(charts) * WIDTH} {HEIGHT}" width="{len(charts) * WIDTH}"'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" {size} font-family="sans-serif" font-size="12">'
    background = '<rect width="100%" height="100%" fill="#fff"/>'
    file.write_text("\n".join([head, background, *parts, "</svg>", ""]), encoding="utf-8")
