"""What each agent reads: prompts.json, filled in for a question, with slots left open for what other agents send.

The strings are interface data: the released links were trained with exactly these. A prompt is a list of pieces, text
or Slot, and stays one until it is embedded, so that nothing in a question can pass for a field or a slot.
"""

import re
from dataclasses import dataclass
from pathlib import Path
from string import ascii_uppercase

from .common import InputError, read_json

PROMPTS = read_json(Path(__file__).with_name("prompts.json"))
TASKS = ("math", "choice", "code")


@dataclass(frozen=True)
class Question:
    """A question as agents read it; Style.question makes one from what the user typed.

    fn_name   task code: the name of the function that is asked for; None if it has no name, "" for a whole program
    dataset   the data set that it comes from: prompts.json has a prompt of its own for one (`solver_gpqa`)
    task      math, choice or code, if it is not the system's: for training; an answer is read by the system's task
    typed     the question as the user typed it
    """

    text: str
    fn_name: str | None = ""
    dataset: str | None = None
    task: str | None = None
    typed: str = ""


@dataclass(frozen=True)
class Slot:
    """The place in a prompt for what `role` sent."""

    role: str


FIELDS = (
    "question",
    "fn_name",
    "context",
    "final",
    "interface",
)  # what a template may name besides roles
FIELD = re.compile(r"\{([a-z_]{2,})\}")  # \boxed{1} and \boxed{A} in the strings are not fields


def fill(template, templates, texts):
    """A template -> pieces. `{name}` becomes texts[name], or templates[name] filled in turn, or else Slot(name)."""
    pieces = []
    for i, part in enumerate(FIELD.split(template)):
        if i % 2 == 0:
            pieces.append(part)
        elif part in texts:
            pieces.append(texts[part])
        else:
            pieces += fill(templates[part], templates, texts) if part in templates else [Slot(part)]
    return [p for p in pieces if p != ""]


def answer_form(section, question, task):
    """The sentence that asks for the form of the answer."""
    if task == "code":
        return PROMPTS["final"]["code"]
    lists_options = re.search(r"^\s*[A-D]\s*[.):-]\s", question, re.MULTILINE | re.IGNORECASE)
    if section == "sequential":
        return PROMPTS["sequential"]["text"]["final"]["letter" if lists_options else "number"]
    return PROMPTS["final"]["letter" if lists_options or task == "choice" else "number"]


def count_options(question: str) -> int:
    """How many options a question lists, each on a line that begins with its letter; 4 if they are fewer."""
    count = 0
    for line in question.splitlines():
        if count < len(ascii_uppercase) and is_labelled(line, ascii_uppercase[count]):
            count += 1
    return max(4, count)


def is_labelled(line: str, letter: str) -> bool:
    """Whether a line begins with this letter as a label. One such line proves nothing: C. difficile is not option C."""
    return re.match(rf"\s*{letter}[.):-]\s", line, re.IGNORECASE) is not None


def prompt(section, role, question, task, has_feedback):
    """System text, and the pieces of the user message, for `role` in a section of prompts.json, or in one of that form.

    has_feedback: this role has heard somebody who speaks after it, or itself. If there is a `ROLE_with_feedback`, that
    template is taken, which has a slot for it; else one for the question's data set, else the role's own.
    """
    table = section if isinstance(section, dict) else PROMPTS[section]
    context, text = PROMPTS["context"][task], question.text
    if section == "sequential":
        table = table["code" if task == "code" else "text"]
    elif task == "choice":
        text = text.rstrip()
        if "choose the correct option" in text.lower():
            context = PROMPTS["context"][
                "math"
            ]  # as the release does when the question says so itself
    system = table.get(
        "system", PROMPTS["system_deliberation" if section == "deliberation" else "system"]
    )
    names = [
        *([f"{role}_with_feedback"] if has_feedback else []),
        f"{role}_{question.dataset}",
        role,
    ]
    template = next(table[name] for name in names if name in table)
    code = {"": "program", None: "unnamed_function"}.get(
        question.fn_name, "function"
    )  # what code to write
    templates = {
        "context": context,
        "final": answer_form(section, text, task),
        "interface": PROMPTS["interface"][code],
    }
    return system, fill(template, templates, {"question": text, "fn_name": question.fn_name or ""})


def answer_retry(section, task):
    """What is appended to a text without an answer, so that the agent goes on with one; None if that was never trained."""
    return (
        (PROMPTS[section] if isinstance(section, str) else {})
        .get("answer_retry", PROMPTS["answer_retry"])
        .get(task)
    )


def wrap(tokenizer, system, pieces, date):
    """Put system text and pieces through the chat template; the result is again pieces, slots in place.

    Raises InputError if the template leaves out the user message, or drops or repeats a slot.
    """
    if not tokenizer.roles:
        raise InputError(
            "the chat template leaves out the user message: minimas needs one that shows a message's text"
        )
    n = 0
    while any(f"[slot {n}]" in p for p in pieces if isinstance(p, str)):
        n += 1
    mark = f"[slot {n}]"  # occurs in no piece; its brackets keep it from overlapping itself or its neighbours
    slots = [p for p in pieces if isinstance(p, Slot)]
    texts = tokenizer.chat(
        system, "".join(mark if isinstance(p, Slot) else p for p in pieces), date
    ).split(mark)
    if len(texts) != len(slots) + 1:
        raise InputError(
            f"the chat template shows the user message's {len(slots)} slot(s) {len(texts) - 1} times: "
            "minimas needs a template that shows each once"
        )
    return [p for pair in zip(texts, [*slots, ""]) for p in pair if p != ""]
