"""What each agent is told: prompts.json, filled for a question, with the slots left open for what other agents send.

The strings are interface data: the released links were trained under exactly these. A prompt is a list of pieces, text
or Slot, and stays one until it is embedded, so that nothing a question contains can pass for a field or a slot.
"""

import json
import re
from dataclasses import dataclass
from pathlib import Path

from . import InputError

PROMPTS = json.loads(Path(__file__).with_name("prompts.json").read_text(encoding="utf-8"))
TASKS = ("math", "choice", "code")


@dataclass(frozen=True)
class Question:
    """A question; for code also the name of the function asked for: None where it has no name, "" for a whole program.

    dataset: the data set it comes from, for prompts.json has a prompt of its own for one (`solver_gpqa`). task: where it is
    not that of the system.
    """
    text: str
    fn_name: str | None = ""
    dataset: str | None = None
    task: str | None = None


@dataclass(frozen=True)
class Slot:
    """The place in a prompt where what `role` sent stands."""
    role: str


def fill(template, templates, texts):
    """A template -> pieces. `{name}` becomes texts[name] as typed, templates[name] filled in turn, or else a Slot.

    Names are lower-case words that the caller knows; `\\boxed{1}` and `\\boxed{A}` in the strings are not fields.
    """
    pieces = []
    for i, part in enumerate(re.split(r"\{([a-z_]{2,})\}", template)):
        if i % 2 == 0:
            pieces.append(part)
        elif part in texts:
            pieces.append(texts[part])
        else:
            pieces += fill(templates[part], templates, texts) if part in templates else [Slot(part)]
    return [p for p in pieces if p != ""]


def interface(fn_name):
    """Which sentence tells what code to write: for a program (""), a function of that name, or one without a name (None)."""
    return PROMPTS["interface"]["program" if fn_name == "" else "function" if fn_name else "unnamed_function"]


def final(family, question, task):
    """Which sentence asks for the answer's form."""
    if task == "code":
        return PROMPTS["final"]["code"]
    lists_options = re.search(r"^[A-D][.):-][ \t]", question, re.MULTILINE | re.IGNORECASE)
    if family == "sequential":
        return PROMPTS["sequential"]["text"]["final"]["letter" if lists_options else "number"]
    return PROMPTS["final"]["letter" if lists_options or task == "choice" else "number"]


def prompt(family, role, question, task, heard):
    """System text and the user message's pieces for `role` of a family of prompts (a name in prompts.json).

    heard: something lies in the agent's inbox already, so an agent that opened the first round now has a feedback slot.
    """
    table, context, text = PROMPTS[family], PROMPTS["context"][task], question.text
    if family == "sequential":
        table = table["code" if task == "code" else "text"]
    elif task == "choice":
        text = text.rstrip()
        if "choose the correct option" in text.lower():
            context = PROMPTS["context"]["math"]
    system = table.get("system") or PROMPTS["system_deliberation" if family == "deliberation" else "system"]
    template = heard and table.get(f"{role}_with_feedback") or table.get(f"{role}_{question.dataset}") or table[role]
    templates = {"context": context, "final": final(family, text, task), "interface": interface(question.fn_name)}
    return system, fill(template, templates, {"question": text, "fn_name": question.fn_name or ""})


def answer_retry(family, task):
    """What is put after a text without an answer, so that the agent goes on with one; None where that was never taught."""
    return PROMPTS[family].get("answer_retry", PROMPTS["answer_retry"]).get(task)


def render(tokenizer, system, pieces, date):
    """Put system text and pieces through the agent's chat template; the result is again pieces, slots in their places."""
    n = 0
    while any(f"[slot {n}]" in p for p in pieces if isinstance(p, str)):
        n += 1  # a mark that no text contains: brackets keep it from overlapping itself or what stands beside it
    mark = f"[slot {n}]"
    slots = [p for p in pieces if isinstance(p, Slot)]
    texts = tokenizer.chat(system, "".join(mark if isinstance(p, Slot) else p for p in pieces), date).split(mark)
    if len(texts) != len(slots) + 1:
        raise InputError(f"the chat template shows the user message's {len(slots)} slot(s) {len(texts) - 1} times: "
                         "minimas needs a template that shows each once")
    return [p for pair in zip(texts, [*slots, ""]) for p in pair if p != ""]
