"""A run as one page for people: who read, thought and wrote what, and when.

    python -m minimas.recurse --prompt "7 +5 *3 -4 +8 *7 -1 +6" --trace trace.html

trace.html is the page's Jinja template. It has no script and fetches nothing, and every text from a question, a model or
a tokenizer is escaped where it is filled in.
"""

from pathlib import Path

import torch
from jinja2 import Environment, FileSystemLoader

from .logit_lens import logit_lens, token_text

PICTURES = {i: 0x2400 + i for i in range(32)} | {
    127: 0x2421
}  # of the control characters, which HTML forbids
IN_TEXT = {code: picture for code, picture in PICTURES.items() if chr(code) not in "\t\n"}
IN_TOKEN = PICTURES | {ord(" "): 0x2423}


def environment():
    """Jinja for the templates beside this file: all that is filled in shows its control characters, and is escaped."""
    env = Environment(
        loader=FileSystemLoader(Path(__file__).parent, encoding="utf-8"),
        autoescape=True,
        finalize=visible,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    env.filters["blanks"] = lambda token: token.translate(IN_TOKEN)
    return env


def visible(value):
    """A text with pictures for control characters other than tab and line feed; anything else as it is."""
    return value.translate(IN_TEXT) if isinstance(value, str) else value


def page(system, results):
    """The page of Results that were run with keep_states and keep_latents, as HTML."""
    writer, questions = system.agents[system.style.order[-1]], []
    for result in results:
        tokens = [token_text(writer, token) for token in result.token_ids]
        seconds, _ = list(result.stages.values())[-1]
        questions.append(
            {"result": result, "turns": turns(system, result), "tokens": tokens, "seconds": seconds}
        )
    return environment().get_template("trace.html").render(system=system, questions=questions)


def turns(system, result):
    """The turns of a question: when each began, how long it took, its prompt, and its rows of the logit lens."""
    rows, begun, turns = logit_lens(system, result.states), 0, []
    for (r, role), (end, pieces) in result.stages.items():
        turns.append(
            {
                "round": r,
                "role": role,
                "begun": begun,
                "seconds": end - begun,
                "positions": sum(map(len, system.agents[role].tokens(pieces))),
                "prompt": [
                    p if isinstance(p, str) else slot(system.style, result, r, role, p)
                    for p in pieces
                ],
                "rows": [row for row in rows if (row["round"], row["role"]) == (r, role)],
            }
        )
        begun = end
    return turns


def slot(style, result, r, role, latents):
    """A slot in the prompt of `role` in round r: how many latents (m, D) fill it, and the turn that they come from."""
    for source, target in style.edges:
        later = style.order.index(source) >= style.order.index(role)
        sent_in = r - later  # what a later agent sent is from the round before
        sent = (
            result.latents.get((sent_in, source, role)) if target == role and len(latents) else None
        )
        if sent is not None and torch.equal(sent, latents):
            return {"latents": len(latents), "round": sent_in, "role": source}
    return {"latents": len(latents)}
