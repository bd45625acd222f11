"""A run as one page for people: who read, thought and wrote what, and when.

    python -m minimas.recurse --prompt "7 +5 *3 -4 +8 *7 -1 +6" --trace trace.html

trace.html is the page's Jinja template. It has no script and fetches nothing. Every text from a question, a model or a
tokenizer is escaped where it is filled in (jinja.py).
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..common import InputError
from ..jinja import environment
from ..styles import Style
from .logit_lens import logit_lens, token_text

if TYPE_CHECKING:
    from ..result import Result
    from ..system import System


def page(system: System, results: list[Result]) -> str:
    """The page of Results that were run with keep_states and keep_latents, as HTML; InputError without states."""
    for result in results:
        if not result.timings:
            raise InputError(
                f"the states of {result.question!r:.80} were not kept, and the page shows them: "
                "ask with keep_states=True and keep_latents=True"
            )
    writer = system.agents[system.style.order[-1]]
    questions = []
    for result in results:
        question = {
            "result": result,
            "turns": turns(system, result),
            "tokens": [token_text(writer, token) for token in result.token_ids],
            "seconds": list(result.timings.values())[-1],
        }
        questions.append(question)
    template = environment(Path(__file__).parent).get_template("trace.html")
    return template.render(system=system, questions=questions)


def turns(system: System, result: Result) -> list[dict[str, Any]]:
    """The turns of a question: when each began, how long it took, its prompt, and its rows of the logit lens."""
    rows = logit_lens(system, result)
    shown = []
    begun = 0.0
    for (r, role), end in result.timings.items():
        pieces = result.prompts[r, role]
        prompt = []
        for piece in pieces:
            if not isinstance(piece, str):
                piece = slot(system.style, result, r, role, piece)
            prompt.append(piece)
        turn = {
            "round": r,
            "role": role,
            "begun": begun,
            "seconds": end - begun,
            "positions": sum(len(piece) for piece in system.agents[role].tokens(pieces)),
            "prompt": prompt,
            "rows": [row for row in rows if (row["round"], row["role"]) == (r, role)],
        }
        shown.append(turn)
        begun = end
    return shown


def slot(
    style: Style, result: Result, r: int, role: str, latents: torch.Tensor
) -> dict[str, int | str]:
    """A slot in the prompt of `role` in round r: how many latents (m, D) fill it, the turn that they come from, and the
    value of `hear` if they are not what was sent there.
    """
    found: dict[str, int | str] = {"latents": len(latents)}
    # Turns that are not heard. Which of them an empty slot is for cannot be seen.
    silent: list[dict[str, int | str]] = []
    for source, target in style.edges:
        if target != role:
            continue
        sent_in = r - 1 if style.is_feedback(source, target) else r
        edge = (sent_in, source, target)
        replaced = result.replaced.get(edge)
        if replaced == "none":
            silent.append({"round": sent_in, "role": source})
        sent = result.latents.get(edge)
        if len(latents) and sent is not None and torch.equal(sent, latents):
            found |= {"round": sent_in, "role": source}
            if replaced:
                found["heard"] = replaced
            return found
    if silent and not len(latents):
        found["heard"] = "none"
        if len(silent) == 1:
            found |= silent[0]
    return found
