r"""The answer in a text: the last \boxed{...} for task math, the letter in it for choice, for code the last program."""

import re
import textwrap
from string import ascii_uppercase

# Words may follow the name of a block whose fence begins its line. A fence within a line of code does not end it.
BLOCK = re.compile(
    r"(^[ \t]*)?```[ \t]*+([\w+-]*+)(?(1)[^`\n]*|[ \t]*)\n"
    r"(.*?)(?:^[ \t]*```|```[ \t]*$|\Z)",
    re.DOTALL | re.MULTILINE,
)

# Text in a command of its own is no word with the letter before it: C \text{warfarin}, but not C\text{arbon}
TEXT_AFTER = re.compile(
    r"(?<=\b[A-D])(?:(?:[\s}~]|\\[ ,;:]|\\q?quad\b)+\\text[a-z]*\s*\{|\\text[a-z]*\s*\{(?=[\s(]))"
)
# A letter and its text, unless a second letter follows it as an answer: A, B or (A) and (B)
OPTION = re.compile(
    r"\s*(?:(?:option|choice|answer)\b(?:\s*is\b)?[\s:]*)?[(\[]?\s*([A-D])"
    r"(?!\W*(?:(?:and|or)\W+[A-D]\b|(?-i:[A-D])\W*(?:$|[,/&]|and\b|or\b)))"
    r"(?:\s*(?:[.):;\]–—]|$)|(?<=(?-i:[A-D]))(?:\s*[(,]|\s+-))",
    re.IGNORECASE,
)


def boxed(text):
    r"""The content of the last \boxed{...} that is closed; None if there is none, or if it is empty."""
    starts, found = (
        [],
        None,
    )  # for each open brace: where its box begins, None for a brace that is not a box
    for brace in re.finditer(r"\\\\?boxed\s*\{|\\.|[{}]", text, re.DOTALL):
        if (
            len(brace[0]) == 2
        ):  # \{ and \} belong to a set; \\ is a line break, so that \\{ ends in a real brace
            continue
        if brace[0] != "}":
            starts.append(brace.end() if len(brace[0]) > 1 else None)
        elif starts and (start := starts.pop()) is not None:
            found = max(found or (0, 0), (start, brace.start()))
    return text[slice(*found)].strip() or None if found else None


def letter(text: str, options: int = 4) -> str | None:
    r"""The option in the last box, as in B, (b), B., \text{B}, B: text, B - text or B \text{text}; else None.

    options   how many there are, named by the letters from A on
    """
    plain = TEXT_AFTER.sub(": ", boxed(text) or "")
    plain = re.sub(r"\\(text|math)[a-z]*\s*\{|\\([ ,;:!]|q?quad\b)|[{}$*]", "", plain)
    pattern = OPTION.pattern.replace("A-D", f"A-{ascii_uppercase[options - 1]}")
    option = re.match(pattern, plain, OPTION.flags)
    return option[1].upper() if option else None


def code_block(text):
    """The last Markdown block of Python that is not empty, else the last of any; an open one runs to the end."""
    blocks = [
        (name.lower() in ("python", "py", "python3"), textwrap.dedent(code).strip("\n"))
        for _, name, code in BLOCK.findall(text.replace("\r\n", "\n"))
        if code.strip()
    ]
    return max(reversed(blocks), key=lambda block: block[0], default=(False, None))[1]


def extract(text: str, task: str, options: int = 4) -> str | None:
    """The answer in a text for task math, choice or code; None if there is none in the expected form.

    options   of a choice: how many there are
    """
    if task == "choice":
        return letter(text, options)
    return boxed(text) if task == "math" else code_block(text)
