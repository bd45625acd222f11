"""The checks of a style file (docs/extending.md has its form); each raises InputError with the key that is wrong.

A check relies on those before it.
"""

import re
from pathlib import Path
from typing import Any

from .common import JSON_TYPES, InputError, check_known, check_number, check_whole, parse_unique
from .prompts import FIELD, FIELDS, PROMPTS, TASKS

KEYS: dict[str, tuple[type, ...]] = {  # and the JSON types that each may have
    "order": (list,),
    "edges": (list,),
    "agents": (dict,),
    "prompts": (str, dict),
    "links": (str, type(None)),
}
FLAGS = ("calls_tools", "links_by_task")
LEAST = {"rounds": 1, "latent_steps": 0, "max_new_tokens": 1}  # of the whole numbers

# Names that mean something else in a prompt or a folder, and so cannot be roles
TAKEN = (*FIELDS, "system", "links", "answer_retry")


def read_style(file: Path) -> dict[str, Any]:
    """The object in a style file; InputError if the file holds anything else, or a key stands twice in one object."""
    entry = parse_unique(file.read_bytes(), file)
    if not isinstance(entry, dict):
        raise InputError(
            f"{file} holds a {type(entry).__name__}, expected a JSON object, a style of the form "
            "in docs/extending.md"
        )
    return entry


def check_entry(file: Path, entry: dict[str, Any]) -> None:
    """InputError unless an entry in the form of styles.json holds together."""
    check_types(file, entry)
    check_defaults(file, entry)
    order, edges, prompts = entry["order"], entry["edges"], entry["prompts"]
    check_order(file, order)
    check_edges(file, edges, order)
    check_agents(file, entry["agents"], order)
    if isinstance(prompts, str):
        check_section(file, prompts, order)
        return
    check_prompts(file, prompts, order, edges)
    check_each_edge_is_read(file, prompts, edges)


def check_types(file: Path, entry: dict[str, Any]) -> None:
    """Each key of KEYS and FLAGS has a value of its type. One that may be left out may also be null."""
    types = KEYS | dict.fromkeys(FLAGS, (bool, type(None)))
    for key, allowed in types.items():
        if isinstance(entry.get(key), allowed):
            continue
        expected = " or ".join(JSON_TYPES.get(type_, "null") for type_ in allowed)
        raise InputError(
            f"{file}: {key} is {found(entry, key)}, expected {expected}: "
            "docs/extending.md has the form of a style"
        )


def found(values: dict[str, Any], key: str) -> str:
    """The value of a key for an error message, or the word missing."""
    return f"{values[key]!r:.80}" if key in values else "missing"


def check_defaults(file: Path, entry: dict[str, Any]) -> None:
    """Each number is in its range, and the task is known, unless it is null or left out."""
    given = {key: value for key, value in entry.items() if value is not None}
    for key, least in LEAST.items():
        if key in given:
            check_whole(f"{file}: {key}", given[key], least)
    if "temperature" in given:
        check_number(f"{file}: temperature", given["temperature"], 0)
    if "task" in given:
        check_known(f"{file}: task", [given["task"]], TASKS)


def check_order(file: Path, order: list[Any]) -> None:
    """The order lists at least one role, and each once."""
    roles = [role for role in order if is_role(role)]
    if not order or list(dict.fromkeys(roles)) != order:
        raise InputError(
            f"{file}: order is {order}, expected one or more different names, each of at least two letters a-z or _, "
            f"none of {', '.join(TAKEN)}"
        )


def is_role(name: object) -> bool:
    """Whether this can be a role's name."""
    return (
        isinstance(name, str) and re.fullmatch("[a-z_]{2,}", name) is not None and name not in TAKEN
    )


def check_edges(file: Path, edges: list[Any], order: list[str]) -> None:
    """An edge leads from one role to another or to itself, and may name its link."""
    for edge in edges:
        is_list = isinstance(edge, list) and all(isinstance(part, str) for part in edge)
        if not is_list or len(edge) not in (2, 3) or not set(edge[:2]) <= set(order):
            raise InputError(
                f"{file}: edges has {edge}, expected [source, target], two of {', '.join(order)}, "
                "perhaps with the name of the link as a third"
            )


def check_agents(file: Path, agents: dict[str, Any], order: list[str]) -> None:
    """Each role has an agent, and nobody else has."""
    for role in [*order, *agents]:
        if role not in order or not isinstance(agents.get(role), str):
            raise InputError(
                f"{file}: agents.{role} is {found(agents, role)}, "
                f"expected a folder or hub id each for {', '.join(order)}"
            )


def check_section(file: Path, name: str, order: list[str]) -> None:
    """The section of prompts.json has a prompt for each role."""
    section = PROMPTS.get(name)
    strings = section.get("text", section) if isinstance(section, dict) else {}
    if not set(order) <= set(strings):
        raise InputError(
            f"{file}: prompts is {name!r}, expected texts, or a section of prompts.json that has one "
            f"for {', '.join(order)}"
        )


def check_prompts(
    file: Path, prompts: dict[str, Any], order: list[str], edges: list[list[str]]
) -> None:
    """There is a text for each role, and no text has a slot for what its role cannot have heard when it reads it."""
    for name in [*order, *prompts]:
        check_name_of_prompt(file, name, prompts, order, edges)
        check_slots(file, name, prompts[name], order, edges)


def check_name_of_prompt(
    file: Path, name: str, prompts: dict[str, Any], order: list[str], edges: list[list[str]]
) -> None:
    """A prompt is a text that somebody reads."""
    optional = ["system"]
    for role in order:
        earlier, all_sources = sources_of(role, order, edges)
        if earlier != all_sources:  # so it hears somebody who speaks later, or itself
            optional.append(f"{role}_with_feedback")
    is_read = name in (*order, *optional)
    role = name.removesuffix("_with_feedback")
    if role in order and not is_read:
        raise InputError(
            f"{file}: prompts has {name}, which nobody would read, since no edge leads to {role} from a role "
            f"that speaks after it, or from itself: add such an edge, or leave out {name}"
        )
    if not is_read or not isinstance(prompts.get(name), str):
        raise InputError(
            f"{file}: prompts.{name} is {found(prompts, name)}, expected texts for {', '.join(order)}, "
            f"perhaps {', '.join(optional)}"
        )


def check_slots(file: Path, name: str, text: str, order: list[str], edges: list[list[str]]) -> None:
    """A prompt has slots only for what its role has heard when it reads it."""
    role = name.removesuffix("_with_feedback")
    earlier, all_sources = sources_of(role, order, edges)
    heard = earlier if name == role else all_sources
    allowed = (*FIELDS, *heard)
    wrong = [slot for slot in FIELD.findall(text) if slot not in allowed]
    if not wrong:
        return
    advice = f"add an edge from there to {role}, or move the slot of a later role to {role}_with_feedback"
    if name == "system":
        advice = "or move the slot into the prompt of a role, as a system text hears nobody"
    raise InputError(
        f"{file}: prompts.{name} has {{{wrong[0]}}}, expected {', '.join(allowed)}: correct it, {advice}"
    )


def sources_of(role: str, order: list[str], edges: list[list[str]]) -> tuple[list[str], list[str]]:
    """The roles before this one that it hears, and all that it hears. "system" is no role and hears nobody."""
    sources = [source for source, target, *_ in edges if target == role]
    earlier = [source for source in sources if order.index(source) < order.index(role)]
    return earlier, sources


def check_each_edge_is_read(file: Path, prompts: dict[str, str], edges: list[list[str]]) -> None:
    """For each edge a prompt of its target has a slot."""
    for source, target, *_ in edges:
        read = prompts.get(target, "") + prompts.get(f"{target}_with_feedback", "")
        if f"{{{source}}}" not in read:
            raise InputError(
                f"{file}: edges has [{source}, {target}], but no prompt of {target} has {{{source}}}: "
                "add it, or leave out the edge"
            )


def named_edges(file: Path, edges: list[list[str]]) -> dict[tuple[str, str], str]:
    """{(source, target): the key of its link}; a link without a name is called after its edge."""
    keys = {}
    for source, target, *name in edges:
        keys[source, target] = name[0] if name else f"outer_{source}_{target}"
    if len(set(keys.values())) < len(edges):
        raise InputError(
            f"{file}: edges is {edges}, expected each link once, under a name of its own"
        )
    return keys
