"""What each agent reads: prompts.json, filled in for a question, with slots left open for what other agents send.

The strings are interface data: the released links were trained with exactly these. A prompt is a list of pieces, text
or Slot, and stays one until it is embedded. So nothing in a question or in a user's system message can pass for a slot.
"""

import re
from dataclasses import dataclass, field
from pathlib import Path
from string import ascii_uppercase
from typing import Any

from .common import InputError, read_json
from .tokenizer import Tokenizer

PROMPTS = read_json(Path(__file__).with_name("prompts.json"))
TASKS = ("math", "choice", "code")

# What a template may name besides roles
FIELDS = ("question", "fn_name", "context", "final", "interface")
FIELD = re.compile(r"\{([a-z_]{2,})\}")  # \boxed{1} and \boxed{A} in the strings are not fields
OPTION = re.compile(r"^\s*[A-D]\s*[.):-]\s", re.MULTILINE | re.IGNORECASE)


@dataclass(frozen=True)
class Question:
    """A question as agents read it; Style.question makes one from what the user typed.

    fn_name   task code: the name of the function that is asked for; None if it has no name, "" for a whole program
    dataset   the data set that it comes from: prompts.json has a prompt of its own for one (`solver_gpqa`)
    task      math, choice or code, if it is not the system's: for training; an answer is read by the system's task
    typed     the question as the user typed it
    system    a system message of the user, which follows that of the agent who answers
    index     its place in the list that was asked; None if it was not asked in one
    """

    text: str
    fn_name: str | None = ""
    dataset: str | None = None
    task: str | None = None
    typed: str = ""
    system: str = ""
    index: int | None = field(default=None, compare=False, repr=False)

    @property
    def asked(self) -> str:
        """The question without what was said before it, which may have options of its own."""
        return self.typed or self.text


@dataclass(frozen=True)
class Slot:
    """The place in a prompt for what `role` sent."""

    role: str


PromptPiece = str | Slot  # in agent.py a Piece has latents where a Slot was


def fill(template: str, templates: dict[str, str], texts: dict[str, str]) -> list[PromptPiece]:
    """A template -> pieces. `{name}` becomes texts[name], or templates[name] filled in turn, or else Slot(name).

    What is filled in from `texts` is not read again, so that a question may hold braces.
    """
    pieces: list[PromptPiece] = []
    for i, part in enumerate(FIELD.split(template)):
        is_name = i % 2 == 1  # texts and names alternate, and a text comes first
        if not is_name:
            pieces.append(part)
        elif part in texts:
            pieces.append(texts[part])
        elif part in templates:
            pieces += fill(templates[part], templates, texts)
        else:
            pieces.append(Slot(part))
    return [piece for piece in pieces if piece != ""]


def strings_of(section: str | dict[str, str], task: str) -> dict[str, Any]:
    """The strings of a section of prompts.json, or of one of that form."""
    if isinstance(section, dict):
        return section
    if section == "sequential":
        return PROMPTS["sequential"]["code" if task == "code" else "text"]
    return PROMPTS[section]


def context_form(section: str | dict[str, str], text: str, task: str) -> str:
    """The template of the question with what the task adds to it."""
    says_so_itself = "choose the correct option" in text.lower()
    if task == "choice" and section != "sequential" and says_so_itself:
        return PROMPTS["context"]["math"]  # as in the release, which then adds nothing
    return PROMPTS["context"][task]


def answer_form(section: str | dict[str, str], text: str, task: str) -> str:
    """The sentence that asks for the form of the answer."""
    if task == "code":
        return PROMPTS["final"]["code"]
    lists_options = OPTION.search(text) is not None
    if section == "sequential":  # looks at the question only, never at the task
        return PROMPTS["sequential"]["text"]["final"]["letter" if lists_options else "number"]
    is_choice = lists_options or task == "choice"
    return PROMPTS["final"]["letter" if is_choice else "number"]


def code_form(fn_name: str | None) -> str:
    """The sentence that says what code to write."""
    if fn_name is None:
        return PROMPTS["interface"]["unnamed_function"]
    if fn_name == "":
        return PROMPTS["interface"]["program"]
    return PROMPTS["interface"]["function"]


def count_options(question: str) -> int:
    """How many options a question lists, each on a line that begins with its letter, A. or (A); 4 if they are fewer."""
    count = 0
    for line in question.splitlines():
        text = re.sub(r"^\s*\((?=\w\))", "", line)
        if count < len(ascii_uppercase) and is_labelled(text, ascii_uppercase[count]):
            count += 1
    return max(4, count)


def is_labelled(line: str, letter: str) -> bool:
    """Whether a line begins with this letter as a label. One such line proves nothing: C. difficile is not option C."""
    return re.match(rf"\s*{letter}[.):-]\s", line, re.IGNORECASE) is not None


def prompt(
    section: str | dict[str, str], role: str, question: Question, task: str, has_feedback: bool
) -> tuple[str, list[PromptPiece]]:
    """System text, and the pieces of the user message, for `role` in a section of prompts.json, or in one of that form.

    has_feedback: this role has heard somebody who speaks after it, or itself. If there is a `ROLE_with_feedback`, that
    template is taken, which has a slot for it; else one for the question's data set, else the role's own.
    """
    strings = strings_of(section, task)
    text = question.text
    if task == "choice" and section != "sequential":
        text = text.rstrip()

    names = [role]
    if question.dataset is not None:
        names.insert(0, f"{role}_{question.dataset}")
    if has_feedback:
        names.insert(0, f"{role}_with_feedback")
    template = next(strings[name] for name in names if name in strings)

    templates = {
        "context": context_form(section, text, task),
        "final": answer_form(section, question.asked, task),
        "interface": code_form(question.fn_name),
    }
    texts = {"question": text, "fn_name": question.fn_name or ""}
    usual_system = "system_deliberation" if section == "deliberation" else "system"
    system_template = strings.get("system", PROMPTS[usual_system])
    system = joined(fill(system_template, templates, texts))
    return system, fill(template, templates, texts)


def joined(pieces: list[PromptPiece]) -> str:
    """The pieces of a system text as one text. InputError if a slot is among them: a system text hears nobody."""
    texts = []
    for piece in pieces:
        if isinstance(piece, Slot):
            raise InputError(
                f"the system text has a slot for {piece.role}, but it hears nobody: "
                "move the slot into the prompt of a role"
            )
        texts.append(piece)
    return "".join(texts)


def answer_retry(section: str | dict[str, str], task: str) -> str | None:
    """What is appended to a text without an answer, so that the agent goes on with one; None if none was trained."""
    own = PROMPTS[section] if isinstance(section, str) else {}
    retries = own.get("answer_retry", PROMPTS["answer_retry"])
    return retries.get(task)


# The chat template


def wrap(
    tokenizer: Tokenizer, system: str, pieces: list[PromptPiece], date: str
) -> list[PromptPiece]:
    """Put system text and pieces through the chat template; the result is again pieces, slots in place.

    Raises InputError if the template leaves out the user message, or drops or repeats a slot.
    """
    if not tokenizer.roles:
        raise InputError(
            "the chat template refuses or leaves out the user message: minimas needs one that shows a message's text"
        )
    slots = [piece for piece in pieces if isinstance(piece, Slot)]
    mark = unused_mark([system, with_slots_as("\n", pieces)])
    user = with_slots_as(mark, pieces)
    texts = tokenizer.chat(system, user, date).split(mark)
    if len(texts) != len(slots) + 1:
        raise InputError(
            f"the chat template shows the user message's {len(slots)} slot(s) {len(texts) - 1} times: "
            "minimas needs a template that shows each once"
        )
    wrapped: list[PromptPiece] = [texts[0]]
    for slot, text in zip(slots, texts[1:], strict=True):
        wrapped += [slot, text]
    return [piece for piece in wrapped if piece != ""]


def with_slots_as(mark: str, pieces: list[PromptPiece]) -> str:
    """The pieces as one text, with a mark for each slot."""
    return "".join(mark if isinstance(piece, Slot) else piece for piece in pieces)


def unused_mark(texts: list[str]) -> str:
    """A mark for slots that is in none of the texts; its brackets keep it from overlapping itself or its neighbours."""
    n = 0
    while any(f"[slot {n}]" in text for text in texts):
        n += 1
    return f"[slot {n}]"
