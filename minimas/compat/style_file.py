"""What can be wrong in a style file (docs/extending.md has its form), as sentences for the user.

Each function yields a sentence for each value that is wrong. Only the first one counts: a check relies on those before it.
"""

import re

from ..prompts import FIELD, FIELDS, PROMPTS

TAKEN = (
    *FIELDS,
    "system",
    "links",
    "answer_retry",
)  # names that mean something else in a prompt or a folder
SECTIONS = {
    name: {*table.get("text", table)} for name, table in PROMPTS.items() if isinstance(table, dict)
}


def wrong_roles(order, edges, agents):
    """Roles are different names, each with an agent, and edges lead from one to another or to itself."""
    names = [role for role in order if re.fullmatch("[a-z_]{2,}", str(role)) and role not in TAKEN]
    if not order or [*dict.fromkeys(names)] != order:
        yield f"order is {order}, expected different names of letters a-z and _, two or more, none of {', '.join(TAKEN)}"
    for edge in edges:
        if not (
            isinstance(edge, list)
            and [*map(type, edge)] in ([str] * 2, [str] * 3)
            and {*edge[:2]} <= {*order}
        ):
            yield f"edges has {edge}, expected [source, target], two of {', '.join(order)}"
    for role in [*order, *agents]:
        if role not in order or not isinstance(agents.get(role), str):
            yield f"agents.{role} is {agents.get(role, 'missing')!r}, expected a folder or hub id each for {', '.join(order)}"


def wrong_prompts(order, edges, prompts):
    """There is a prompt for each role, with slots for what it can have heard, and for each edge a slot."""
    if isinstance(prompts, str):
        if not {*order} <= SECTIONS.get(prompts, set()):
            yield f"prompts is {prompts!r}, expected texts, or a section of prompts.json that has one for {', '.join(order)}"
        return
    fed_back = {
        target for source, target, *_ in edges if order.index(source) >= order.index(target)
    }
    more = ["system", *(f"{role}_with_feedback" for role in order if role in fed_back)]
    for name in [*order, *prompts]:
        role, text = name.removesuffix("_with_feedback"), prompts.get(name)
        if not isinstance(text, str) or name not in (*order, *more):
            yield f"prompts.{name} is {text!r}, expected texts for {', '.join(order)}, perhaps {', '.join(more)}"
        heard = [
            source
            for source, target, *_ in edges
            if target == role and (name != role or order.index(source) < order.index(role))
        ]
        if unheard := [slot for slot in FIELD.findall(text) if slot not in (*FIELDS, *heard)]:
            yield (
                f"prompts.{name} has {{{unheard[0]}}}, expected {', '.join((*FIELDS, *heard))}: correct it, add an edge "
                f"from there to {role}, or move the slot of a later role to {role}_with_feedback"
            )
    for source, target, *_ in edges:
        if not any(
            f"{{{source}}}" in prompts.get(name, "") for name in (target, f"{target}_with_feedback")
        ):
            yield f"edges has [{source}, {target}], but no prompt of {target} has {{{source}}}: add it, or leave out the edge"
