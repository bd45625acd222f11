"""A run as one page for people: who read, thought and wrote what, and when.

    python -m minimas.recurse --prompt "7 +5 *3 -4 +8 *7 -1 +6" --trace trace.html

The page is made of the parts in trace.html. It has no script and fetches nothing; text from a question, a model or a
tokenizer is escaped before it is filled in.
"""

import re
from html import escape
from itertools import groupby
from pathlib import Path
from string import Template

import torch

from .peek import peek


def read_parts():
    """{name: Template} of the parts in trace.html, each of which follows a comment that names it."""
    _, *names_and_parts = re.split(r"<!-- (\w+) -->\n", Path(__file__).with_suffix(".html").read_text(encoding="utf-8"))
    return {name: Template(part) for name, part in zip(names_and_parts[::2], names_and_parts[1::2])}


PARTS = read_parts()
PICTURES = {i: 0x2400 + i for i in range(32)} | {127: 0x2421}  # of the control characters, which HTML forbids
IN_TEXT = {code: picture for code, picture in PICTURES.items() if chr(code) not in "\t\n"}
IN_TOKEN = PICTURES | {ord(" "): 0x2423}

# Sizes in the graph, in pixels
BOX, HEIGHT = 110, 44  # width and height of an agent
GAP = 70  # between two agents
RISE = 40  # of an arc, for each agent that it goes on or back
SPACING = BOX + GAP


def fill(part, **values):
    """A part of trace.html with its placeholders filled in."""
    return PARTS[part].substitute(values)


def text_html(text):
    """A text as HTML, in which only control characters other than tab and line feed look different."""
    return escape(text.translate(IN_TEXT))


def token_html(token):
    """A token as HTML, in which spaces, tabs and line feeds can be seen."""
    return f"<code>{escape(token.translate(IN_TOKEN))}</code>"


def graph(system):
    """The agents in their order as SVG: links to later agents are arcs above them, others arcs below."""
    order, edges = system.style.order, system.style.edges
    distance = {(source, target): order.index(target) - order.index(source) for source, target in edges}
    top = RISE * max(0, *distance.values()) + 20
    bottom = RISE * max(0, *(-n for n in distance.values())) + 20
    middle = {role: i * SPACING + BOX // 2 + 1 for i, role in enumerate(order)}  # of a box
    parts = []
    for role, x in middle.items():
        width = system.agents[role].model.config.hidden_size
        parts += [f'<rect x="{x - BOX // 2}" y="{top}" width="{BOX}" height="{HEIGHT}" rx="6"/>',
                  f'<text x="{x}" y="{top + 18}">{text_html(role)}</text>',
                  f'<text x="{x}" y="{top + 35}">{width} wide</text>']
    for edge, n in sorted(distance.items(), key=lambda item: -abs(item[1])):  # wide arcs first, below names of others
        parts += arc(middle[edge[0]], middle[edge[1]], n, top, edges[edge])
    links = ", ".join(f"{source} to {target} by {key}" for (source, target), key in edges.items())
    return fill("graph", width=len(order) * SPACING - GAP + 2, height=top + HEIGHT + bottom, parts="\n".join(parts),
                said=text_html(f"{', '.join(order)}, in this order; links: {links}"))


def arc(source, target, n, top, name):
    """The SVG elements of an arc between boxes with these middles, n agents on (above them) or back (below)."""
    if n > 0:
        y, aside, below = top, max(8, 50 - 14 * n), -5
    else:
        y, aside, below = top + HEIGHT, min(-8, -50 - 14 * n), 15
    start, end = source + aside, target - aside
    bend = y - RISE * n * 4 / 3  # control points of a cubic Bézier curve, which rises to 3/4 of their height
    return [f'<path d="M{start},{y}C{start},{bend:.1f} {end},{bend:.1f} {end},{y}" marker-end="url(#arrow)"/>',
            f'<text x="{(start + end) / 2}" y="{y - RISE * n + below}">{text_html(name)}</text>']


def slot(style, result, n, r, role, latents):
    """A slot in the prompt of `role` in round r, as HTML: how many latents (m, D) fill it, and a link to their origin.

    n: the number of the question on the page.
    """
    for source, target in style.edges:
        later = style.order.index(source) >= style.order.index(role)
        sent_in = r - later  # what a later agent sent is from the round before
        sent = result.latents.get((sent_in, source, role)) if target == role and len(latents) else None
        if sent is not None and torch.equal(sent, latents):
            origin = f'<a href="#q{n}-{sent_in}-{text_html(source)}">{text_html(source)}, round {sent_in}</a>'
            return f"<mark>slot: {len(latents)} latents from {origin}</mark>"
    return f"<mark>slot: {len(latents)} latents</mark>"


def cosine_cell(cosine):
    """A table cell with a cosine: its number, with its size as a colour."""
    if cosine is None:
        return "<td>none</td>"
    return f'<td class="{"heat" if cosine >= 0 else "cold"}" style="--c:{abs(cosine) * 100:.0f}">{cosine:.2f}</td>'


def latents_table(title, rows):
    """What an agent thought in one stage, as HTML: a column for each row of peek."""
    lines = {"step": [f'<th scope="col">{row["step"]}</th>' for row in rows]}
    for i, rank in enumerate(("closest token", "second", "third")):
        lines[rank] = [f"<td>{token_html(text)} {p:.0%}</td>" for text, p in (row["tokens"][i] for row in rows)]
    lines["entropy, bits"] = [f'<td>{row["entropy"]:.2f}</td>' for row in rows]
    lines["cosine, step before"] = [cosine_cell(row["step_cosine"]) for row in rows]
    lines["cosine, round before"] = [cosine_cell(row["round_cosine"]) for row in rows]
    html = (f'<tr><th scope="row">{name}</th>{"".join(cells)}</tr>' for name, cells in lines.items())
    return fill("strip", title=title, lines="\n".join(html))


def section(system, n, result):
    """All about the n-th question: the time of each stage, the stages, and the text."""
    by_stage = groupby(peek(system, result.states), lambda row: (row["round"], row["role"]))
    rows = {key: list(own) for key, own in by_stage}
    times, stages, begun = "", "", 0
    whole, _ = list(result.stages.values())[-1]  # seconds
    for (r, role), (end, _) in result.stages.items():
        time, stage = stage_html(system, n, result, r, role, rows.get((r, role), []), begun, end, whole)
        times, stages, begun = times + time, stages + stage, end
    return fill("section", n=n, question=text_html(result.question), times=times, stages=stages, whole=f"{whole:.3f}",
                text=text_html(result.text), answer=text_html(result.answer or "none was found"))


def stage_html(system, n, result, r, role, rows, begun, end, whole):
    """(line of the timeline, details) of one stage: from `begun` to `end` of `whole` seconds, with its rows of peek."""
    agent, (_, pieces) = system.agents[role], result.stages[r, role]
    same = {"title": text_html(f"round {r}, {role}"), "place": text_html(f"q{n}-{r}-{role}"),
            "seconds": f"{end - begun:.3f}"}
    if (r, role) == list(result.stages)[-1]:
        written, made = result.new_tokens, f"{result.new_tokens} tokens written"
        tokens = [token_html(agent.tokenizer.fast.decode([i], skip_special_tokens=False)) for i in result.token_ids]
        seen = fill("tokens", tokens="".join(tokens))
    else:
        written, made = 0, f"{len(rows)} latents"
        tokens = [token_html(row["tokens"][0][0]) for row in rows]
        seen = latents_table(same["title"], rows) if rows else ""
    prompt = [text_html(piece) if isinstance(piece, str) else slot(system.style, result, n, r, role, piece)
              for piece in pieces]
    time = fill("time", **same, read=sum(map(len, agent.tokens(pieces))), thought=len(rows), written=written,
                before=f"{begun / whole:.1%}", share=f"{(end - begun) / whole:.1%}")
    return time, fill("stage", **same, made=made, prompt="".join(prompt), seen=seen, glance="".join(tokens[:8]))


def page(system, results):
    """The page of Results that were run with keep_states and keep_latents, as HTML."""
    sections = (section(system, n, result) for n, result in enumerate(results, 1))
    return fill("page", title=f"What {text_html(', '.join(system.style.order))} thought", graph=graph(system),
                sections="".join(sections))
