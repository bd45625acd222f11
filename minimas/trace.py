"""A run as one page, for people: who read, thought and wrote what, and when.

    python -m minimas.recurse --prompt "7 +5 *3 -4 +8 *7 -1 +6" --trace trace.html

The page is made of the parts in trace.html: no script, nothing fetched, and whatever comes from a question, a model or a
tokenizer is escaped before it is put in.
"""

import re
from html import escape
from itertools import groupby
from pathlib import Path
from string import Template

import torch

from .peek import peek
from .save import write_whole

PARTS = re.split(r"<!-- (\w+) -->\n", Path(__file__).with_suffix(".html").read_text(encoding="utf-8"))
PARTS = {name: Template(part) for name, part in zip(PARTS[1::2], PARTS[2::2])}
PICTURES = {i: 0x2400 + i for i in range(32)} | {127: 0x2421}  # of control characters, which HTML forbids
BOX, HEIGHT, GAP, RISE = 110, 44, 70, 40  # pixels of the graph: an agent's width and height, between two, of an arc over one


def put(part, **values):
    """A part of trace.html with its names filled in."""
    return PARTS[part].substitute(values)


def prose(text):
    """Text as HTML, its lines as they are."""
    return escape(text.translate({code: picture for code, picture in PICTURES.items() if code not in (9, 10)}))


def shown(token):
    """A token as HTML, with spaces and line breaks that can be seen."""
    return f"<code>{escape(token.translate(PICTURES | {32: 0x2423}))}</code>"


def graph(system):
    """The agents in their order as SVG, the links with their keys: to a later agent above, back to an earlier one below."""
    order, edges = system.style.order, system.style.edges
    far = {(source, target): order.index(target) - order.index(source) for source, target in edges}
    top, bottom = (RISE * max([0, *(sign * n for n in far.values())]) + 20 for sign in (1, -1))
    middle, parts = {role: i * (BOX + GAP) + BOX // 2 + 1 for i, role in enumerate(order)}, []
    for role, x in middle.items():
        parts += [f'<rect x="{x - BOX // 2}" y="{top}" width="{BOX}" height="{HEIGHT}" rx="6"/>',
                  f'<text x="{x}" y="{top + 18}">{prose(role)}</text>',
                  f'<text x="{x}" y="{top + 35}">{system.agents[role].model.config.hidden_size} wide</text>']
    for (source, target), n in sorted(far.items(), key=lambda link: -abs(link[1])):  # names of narrow arcs over wide ones
        y, aside = (top, max(8, 50 - 14 * n)) if n > 0 else (top + HEIGHT, min(-8, -50 - 14 * n))
        start, end, peak = middle[source] + aside, middle[target] - aside, y - RISE * n
        x, bend = (start + end) / 2, y - RISE * n * 4 / 3
        parts += [f'<path d="M{start},{y}C{start},{bend:.1f} {end},{bend:.1f} {end},{y}" marker-end="url(#arrow)"/>',
                  f'<text x="{x}" y="{peak - 5 if n > 0 else peak + 15}">{prose(edges[source, target])}</text>']
    links = ", ".join(f"{source} to {target} by {key}" for (source, target), key in edges.items())
    return put("graph", width=len(order) * (BOX + GAP) - GAP + 2, height=top + HEIGHT + bottom, parts="\n".join(parts),
               said=prose(f"{', '.join(order)}, in this order; links: {links}"))


def slot(style, result, n, r, role, latents):
    """A slot in the prompt of a stage as HTML: how many latents (m, D) are in it, and a link to the stage that sent them."""
    for source, target in style.edges:
        when = r - (style.order.index(source) >= style.order.index(role))  # who comes later was heard in the round before
        sent = result.latents.get((when, source, role)) if target == role and len(latents) else None
        if sent is not None and torch.equal(sent, latents):
            origin = f'<a href="#q{n}-{when}-{prose(source)}">{prose(source)}, round {when}</a>'
            return f"<mark>slot: {len(latents)} latents from {origin}</mark>"
    return f"<mark>slot: {len(latents)} latents</mark>"


def heat(cosine):
    """A cell with a cosine: its number, and its size as colour."""
    if cosine is None:
        return "<td>none</td>"
    return f'<td class="{"heat" if cosine >= 0 else "cold"}" style="--c:{abs(cosine) * 100:.0f}">{cosine:.2f}</td>'


def strip(title, rows):
    """What an agent thought in the stage of that title (HTML): the rows of peek, each a column."""
    lines = {"step": [f'<th scope="col">{row["step"]}</th>' for row in rows]}
    for i, rank in enumerate(("closest token", "second", "third")):
        lines[rank] = [f"<td>{shown(text)} {p:.0%}</td>" for text, p in (row["tokens"][i] for row in rows)]
    lines["entropy, bits"] = [f'<td>{row["entropy"]:.2f}</td>' for row in rows]
    lines["cosine, step before"] = [heat(row["step_cosine"]) for row in rows]
    lines["cosine, round before"] = [heat(row["round_cosine"]) for row in rows]
    lines = "\n".join(f'<tr><th scope="row">{name}</th>{"".join(cells)}</tr>' for name, cells in lines.items())
    return put("strip", title=title, lines=lines)


def section(system, n, result):
    """All about the n-th question: its stages in time, each by itself, and the text."""
    rows = {key: list(own) for key, own in groupby(peek(system, result.states), lambda row: (row["round"], row["role"]))}
    last, times, stages, begun = list(result.stages)[-1], "", "", 0
    whole, _ = result.stages[last]
    for (r, role), (end, pieces) in result.stages.items():
        agent, thought, written = system.agents[role], rows.get((r, role), []), 0
        same = {"title": prose(f"round {r}, {role}"), "place": prose(f"q{n}-{r}-{role}"), "seconds": f"{end - begun:.3f}"}
        tokens, made = [shown(row["tokens"][0][0]) for row in thought], f"{len(thought)} latents"
        seen = strip(same["title"], thought) if thought else ""
        if (r, role) == last:
            tokens = [shown(agent.tokenizer.fast.decode([i], skip_special_tokens=False)) for i in result.token_ids]
            written, made = result.new_tokens, f"{result.new_tokens} tokens written"
            seen = put("tokens", tokens="".join(tokens))
        times += put("time", **same, read=sum(map(len, agent.tokens(pieces))), thought=len(thought), written=written,
                     before=f"{begun / whole:.1%}", share=f"{(end - begun) / whole:.1%}")
        prompt = [prose(piece) if isinstance(piece, str) else slot(system.style, result, n, r, role, piece)
                  for piece in pieces]
        stages += put("stage", **same, made=made, prompt="".join(prompt), seen=seen, glance="".join(tokens[:8]))
        begun = end
    return put("section", n=n, question=prose(result.question), times=times, stages=stages, text=prose(result.text),
               whole=f"{whole:.3f}", answer=prose(result.answer or "none was found"))


def page(system, results):
    """The page of Results that were run with keep_states and keep_latents, as HTML."""
    return put("page", title=f"What {prose(', '.join(system.style.order))} thought", graph=graph(system),
               sections="".join(section(system, n, result) for n, result in enumerate(results, 1)))


def save_page(file, html):
    """Write a page, whole or not at all."""
    write_whole(file, lambda path: path.write_text(html, encoding="utf-8"))
