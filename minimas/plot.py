"""Line charts as SVG, written by hand: for the figures of evaluation and the curves of training."""

import math
from html import escape

WIDTH, HEIGHT, LEFT, TOP = 420, 300, 56, 34  # of a chart; what is left for the axis' numbers and for the title
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")  # told apart by colour-blind readers, too


def ticks(low, high, most=6):
    """Round numbers from low to high, at most `most` of them."""
    if low == high:
        return [low]
    exponent = math.floor(math.log10((high - low) / most))
    step = next(step for step in (factor * 10.0 ** exponent for factor in (1, 2, 5, 10, 20)) if (high - low) / step <= most - 1)
    return [i * step for i in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def chart(title, x_name, lines, left=0):
    """One chart as SVG elements, `left` pixels from the left; lines: {name: [(x, y), ...]}, drawn up from y = 0."""
    points = [point for line in lines.values() for point in line]
    low, high, top = min(x for x, _ in points), max(x for x, _ in points), max(y for _, y in points) or 1
    px = lambda x: left + LEFT + (x - low) / ((high - low) or 1) * (WIDTH - LEFT - 20)
    py = lambda y: HEIGHT - 40 - y / top * (HEIGHT - 40 - TOP)
    parts = [f'<text x="{left + LEFT}" y="18" font-weight="bold">{escape(title)}</text>',
             f'<text x="{left + WIDTH - 20}" y="{HEIGHT - 6}" text-anchor="end">{escape(x_name)}</text>']
    for y in ticks(0, top):
        parts += [f'<path d="M{left + LEFT},{py(y):.1f}H{left + WIDTH - 20}" stroke="#ccc"/>',
                  f'<text x="{left + LEFT - 6}" y="{py(y) + 4:.1f}" text-anchor="end">{y:g}</text>']
    marks = sorted({x for x, _ in points})
    parts += [f'<text x="{px(x):.1f}" y="{HEIGHT - 22}" text-anchor="middle">{x:g}</text>' for x in (marks if len(marks) < 8 else ticks(low, high))]
    for i, (name, line) in enumerate(lines.items()):
        colour, path = COLOURS[i % len(COLOURS)], "L".join(f"{px(x):.1f},{py(y):.1f}" for x, y in line)
        parts.append(f'<path d="M{path}" fill="none" stroke="{colour}" stroke-width="2"><title>{escape(name)}</title></path>')
        if len(line) < 30:
            parts += [f'<circle cx="{px(x):.1f}" cy="{py(y):.1f}" r="3" fill="{colour}"><title>{escape(name)}: {x:g}, {y:g}</title></circle>'
                      for x, y in line]
        parts.append(f'<text x="{left + LEFT + 8}" y="{TOP + 12 + 15 * i}" fill="{colour}">{escape(name)}</text>')
    return parts


def save_charts(file, charts):
    """Write charts, [(title, name of the x axis, lines), ...], side by side into one SVG file."""
    parts = [part for i, one in enumerate(charts) for part in chart(*one, left=i * WIDTH)]
    size = f'viewBox="0 0 {len(charts) * WIDTH} {HEIGHT}" width="{len(charts) * WIDTH}"'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" {size} font-family="sans-serif" font-size="12">'
    file.write_text("\n".join([head, '<rect width="100%" height="100%" fill="#fff"/>', *parts, "</svg>", ""]), encoding="utf-8")
