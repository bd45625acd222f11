"""A question with options: the options in the forms in circulation, and the one that its answer names.

Options are a list of texts, with or without letters before them; an object that names the texts A, B, ... or by
numbers; objects, or two lists, with a label and a text for each; lines of text, each with its letter; or columns that
are named A, B, ..., a, b, ..., option_a, option_b, ... or the like. The column `choices` is taken for `options`.

An answer is the letter of an option, its label, its text, or both; or a number. Whether numbers count from 0 or from 1,
or are texts of options, is what fits all rows of the data. Where more than one of them does, the row is refused.
"""

import re
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from string import ascii_uppercase as LETTERS
from typing import Any

from ..common import InputError
from ..prompts import count_options, is_labelled
from ..runs.rows import Row, text_of

LABEL_KEYS = ("label", "key", "letter", "id")  # of an object that is an option
TEXT_KEYS = ("text", "value", "option", "content")
# The names of columns that hold an option each, by its letter; opa, opb, ... are those of MedMCQA
COLUMN_NAMES: tuple[Callable[[str], str], ...] = (
    str,
    str.lower,
    "option_{}".format,
    lambda letter: f"option_{letter.lower()}",
    "option{}".format,
    "Option {}".format,
    "choice_{}".format,
    lambda letter: f"choice_{letter.lower()}",
    lambda letter: f"op{letter.lower()}",
)
NUMBER = re.compile(r"(\d{1,9})(?:\.0+)?")  # pandas writes 2.0 for 2 in a column with gaps
TEXT, FROM_0, FROM_1 = "its text", "counted from 0", "counted from 1"  # what a number may be


@dataclass(frozen=True)
class Option:
    """An option of a question. Its letter is that of its place."""

    text: str
    label: str = ""  # A or 1, as the file names it; "" if it does not
    is_number: bool = False  # in JSON: 7, and not "7"


@dataclass
class Numbering:
    """What answers that are numbers can be, such that it fits all of them in the data: a set of TEXT, FROM_0, FROM_1.

    rows   gives all rows of the data, from the first; they are read when the first answer that is a number is met
    """

    rows: Callable[[], Iterable[Row]]

    @cached_property
    def meanings(self) -> set[str]:
        """What all answers can be, found out when it is first asked."""
        possible = {TEXT, FROM_0, FROM_1}
        with suppress(InputError):  # a damaged row behind the limit is no concern of those before
            for row in self.rows():
                possible &= meanings_in(row)
        return possible


def meanings_in(row: Row) -> set[str]:
    """What the answer of a row can be if it is a number; everything if it is none, or if the row is refused."""
    with suppress(InputError):
        question = row.text("question").strip()
        options = options_of(row)
        answer = row.text("answer").strip()
        fitting = readings(answer, options or listed_options(question))
        if fitting:
            return set(fitting)
    return {TEXT, FROM_0, FROM_1}


def read_choice(row: Row, numbering: Numbering) -> dict[str, Any]:
    """The question with its options, and the letter of the right one, "" if it has none or an option is blank."""
    question = row.text("question").strip()
    options = options_of(row)
    answer = row.text("answer").strip()
    texts = [option.text for option in options]
    if not answer or not all(texts):
        gold = ""
    else:
        gold = letter_of(row, answer, options or listed_options(question), numbering)
    return {"question": with_options(question, texts), "gold": gold}


# Options


def options_of(row: Row) -> list[Option]:
    """The options of a row in their order, [] if it has none; InputError if they have none of the known forms."""
    value = row.value("options", required=False)
    if value in ("", [], {}) and "options" not in row.columns:
        value = lettered_columns(row) or row.value("choices", required=False)
    if value in ("", [], {}):
        return []
    pairs = labelled_texts(value)
    options = [
        Option(text_of(text, f"{row}: an option").strip(), label, is_number(text))
        for label, text in pairs
    ]
    if any(option.label for option in options):
        options = in_order_of_labels(options, row)
    if not 2 <= len(options) <= len(LETTERS):
        raise InputError(
            f"{row}: options are {str(value)[:60]!r}, expected a list of 2 to {len(LETTERS)} texts, "
            'or an object {"A": text, "B": text, ...}'
        )
    return without_letters(options)


def is_number(value: Any) -> bool:
    """Whether a cell is a number, and neither a text that spells one nor true or false."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def lettered_columns(row: Row) -> dict[str, Any]:
    """{"A": its text, ...} of the columns that are named by letters, as far as there are, {} without A and B."""
    for name_of in COLUMN_NAMES:
        texts = {}
        for letter in LETTERS:
            name = name_of(letter)
            if name not in row.cells or name in row.columns.values():
                break
            texts[letter] = row.at(name)
        if len(texts) > 1:
            return texts
    return {}


def labelled_texts(value: Any) -> list[tuple[str, Any]]:
    """(label, text) of each option, the label "" where there is none; [] if the value has none of the known forms."""
    if isinstance(value, str):
        lines = [line for line in value.splitlines() if line.strip()]
        stripped = [
            without_letter(line, letter) for line, letter in zip(lines, LETTERS, strict=False)
        ]
        return [("", line) for line in lines] if all(stripped) else []
    if isinstance(value, list):
        if all(isinstance(option, dict) for option in value):
            return labelled_objects(value)
        return [("", option) for option in value]
    lists = {key: texts for key, texts in value.items() if isinstance(texts, list)}
    if lists and len(lists) == len(value):
        return labelled_lists(lists)
    return [(str(label), text) for label, text in value.items()]


def labelled_objects(options: list[dict]) -> list[tuple[str, Any]]:
    """(label, text) of options that are objects, each {"A": text} or with a label and a text; [] if one is neither."""
    pairs = []
    for option in options:
        labels = [option[key] for key in LABEL_KEYS if key in option]
        texts = [option[key] for key in TEXT_KEYS if key in option]
        if len(texts) == 1 and len(labels) <= 1:
            label = str(labels[0]) if labels else ""
            pairs.append((label, texts[0]))
        elif len(option) == 1:
            pairs += [(str(label), text) for label, text in option.items()]
        else:
            return []
    return pairs


def labelled_lists(lists: dict[str, list]) -> list[tuple[str, Any]]:
    """(label, text) of options in two lists as ARC has them: {"text": [...], "label": [...]}; [] if they do not fit."""
    texts = [lists[key] for key in TEXT_KEYS if key in lists]
    labels = [lists[key] for key in LABEL_KEYS if key in lists]
    if len(texts) != 1 or len(labels) > 1:
        return []
    if not labels:
        return [("", text) for text in texts[0]]
    if len(labels[0]) != len(texts[0]):
        return []
    return [(str(label), text) for label, text in zip(labels[0], texts[0], strict=True)]


def in_order_of_labels(options: list[Option], row: Row) -> list[Option]:
    """Options sorted by their labels, without blank ones at the end, as Parquet adds them.

    InputError if the labels are not A, B, ... nor numbers from 0 or from 1.
    """
    labels = [plain_label(option.label) for option in options]
    letters = list(LETTERS[: len(options)])
    from_0 = [str(i) for i in range(len(options))]
    from_1 = [str(i + 1) for i in range(len(options))]
    known = [letters, from_0, from_1]
    expected = next((one for one in known if sorted(one) == sorted(labels)), None)
    if expected is None:
        found = ", ".join(option.label for option in options)
        raise InputError(
            f"{row}: options are named {found[:60]}, "
            "expected A, B, C, ... or numbers from 0 or from 1"
        )
    ordered = [options[labels.index(label)] for label in expected]
    while ordered and not ordered[-1].text:
        ordered.pop()
    return ordered


def plain_label(label: str) -> str:
    """A label without what stands around it: B of (b), b. or Option B."""
    bare = re.sub(r"[().:\s]", "", label).upper()
    return re.sub(r"^(OPTION|CHOICE)_?(?=.)", "", bare)


def without_letters(options: list[Option]) -> list[Option]:
    """Options without the letters that all of their texts begin with. Numbers stay in the text, and are labels, too."""
    if any(option.label for option in options):
        return options
    stripped = [
        without_letter(option.text, letter)
        for option, letter in zip(options, LETTERS, strict=False)
    ]
    if all(stripped):
        return [Option(text) for text in stripped]
    for first in (0, 1):
        numbers = [str(number) for number in range(first, first + len(options))]
        pairs = list(zip(options, numbers, strict=True))
        if all(re.match(rf"\(?{number}[.)]\s+\S", option.text) for option, number in pairs):
            return [Option(option.text, number) for option, number in pairs]
    return options


def without_letter(text: str, letter: str) -> str:
    """What follows a letter as a label: x of A. x, A: x, A- x, (a) x or A)x; "" if nothing does, or it is no label."""
    label = rf"\s*\(?{letter}(?:\)|[.:-](?=\s))\s*(.+)"
    found = re.fullmatch(label, text, re.IGNORECASE | re.DOTALL)
    return found[1].strip() if found else ""


# The answer


def listed_options(question: str) -> list[Option]:
    """Options whose texts are their letters, for a question that lists its options itself, A to D at least."""
    return [Option(letter) for letter in LETTERS[: count_options(question)]]


def letter_of(row: Row, answer: str, options: list[Option], numbering: Numbering) -> str:
    """The letter of the option that an answer names; InputError if it does not name just one."""
    fitting = readings(answer, options)
    if fitting:
        return letter_of_number(row, answer, options, fitting, numbering)
    named = set(letters_named(answer, options))
    if len(named) == 1:
        return named.pop()
    texts = [option.text for option in options]
    raise InputError(
        f"{row}: the answer {answer[:60]!r} is not the letter, the text or the number of just one of {texts}: "
        "give its letter"
    )


def letters_named(answer: str, options: list[Option]) -> list[str]:
    """The letters of the options that an answer names by a letter, a label or a text."""
    label = plain_label(answer)
    words = answer.split()
    exact = []
    alike = []
    for letter, option in zip(LETTERS, options, strict=False):
        own_words = option.text.split()
        both = without_letter(answer, letter).split()
        if label in (letter, plain_label(option.label)) or own_words in (words, both):
            exact.append(letter)
        if option.text.casefold().split() == answer.casefold().split():
            alike.append(letter)
    return exact or alike


def readings(answer: str, options: list[Option]) -> dict[str, str]:
    """{TEXT, FROM_0 or FROM_1: the letter that an answer then names} if it is a number, and no label; else {}."""
    number = NUMBER.fullmatch(answer)
    labels = [plain_label(option.label) for option in options]
    if number is None or answer in labels:
        return {}
    fitting = {}
    same = [
        letter for letter, option in zip(LETTERS, options, strict=False) if option.text == answer
    ]
    if len(same) == 1:
        fitting[TEXT] = same[0]
    for meaning, place in ((FROM_0, int(number[1])), (FROM_1, int(number[1]) - 1)):
        if 0 <= place < len(options):
            fitting[meaning] = LETTERS[place]
    return fitting


def letter_of_number(
    row: Row, answer: str, options: list[Option], fitting: dict[str, str], numbering: Numbering
) -> str:
    """The letter of the option that an answer that is a number names; InputError if that is not plain.

    If it can be the text of an option and is written like one, a number like a number, then it is the text.
    """
    possible = {
        meaning: letter for meaning, letter in fitting.items() if meaning in numbering.meanings
    }
    letters = set(possible.values())
    if len(letters) == 1:
        return letters.pop()
    if TEXT in possible:
        option = options[LETTERS.index(possible[TEXT])]
        if option.is_number == is_number(row.cell("answer")):
            return possible[TEXT]
    if possible:
        found = " or ".join(f"{letter} ({meaning})" for meaning, letter in possible.items())
        why = f"it may be {found}, and no other row says which"
    else:
        why = "other rows count options from another number, or give their texts"
    raise InputError(
        f"{row}: the answer {answer} names no option for certain: {why}; expected a letter or the text of an "
        "option: give letters"
    )


# What agents read


def is_on_a_line(lines: list[str], letter: str) -> bool:
    """Whether one of the lines begins with this letter as a label."""
    return any(is_labelled(line, letter) for line in lines)


def with_options(question: str, options: list[str]) -> str:
    """The question, then its options unless it lists them itself, then the paper's request for a letter."""
    letters = LETTERS[: len(options)]
    lines = question.splitlines()
    missing = [letter for letter in letters if not is_on_a_line(lines, letter)]
    if question and missing:
        listed = [f"{letter}. {option}" for letter, option in zip(letters, options, strict=True)]
        question = "\n".join([question, *listed])
    if not question or "choose the correct option" in question.lower():
        return question
    # Four letters at least, also for two or three options: the released prompts say A/B/C/D (prompts.json), and
    # `count_options`, by which answers are read, counts four then.
    count = max(4, len(options)) if options else count_options(question)
    offered = LETTERS[:count]
    return f"{question}\n\nChoose the correct option ({'/'.join(offered)})."
