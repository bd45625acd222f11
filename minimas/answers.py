r"""The answer in a text: for math the last \boxed{...}, for choice the letter in it, for code the last program."""

import ast
import re
import textwrap
import warnings

from .fences import LINE_END, Block, fenced_blocks
from .letter import letter

PYTHON = ("python", "py", "python3")  # names of a block of Python
# \{ and \} belong to a set; \\ is a line break, so that \\{ ends in a real brace
BRACE = re.compile(r"(?P<box>\\\\?boxed\s*\{)|\\.|(?P<open>\{)|(?P<close>\})", re.DOTALL)
# A block of whoever does not keep to CommonMark: its fences may stand at the end of a line, or at any depth
LOOSE_BLOCK = re.compile(
    r"""(?P<at_start>^[ \t]*)? ```[ \t]*+ (?P<name>[\w+-]*+)
    (?(at_start) [^`\n]* | [ \t]*) \n  # words may follow the name where the fence begins its line
    (?P<code>.*?)
    (?: ^[ \t]*``` | ```[ \t]*$ | \Z )""",
    re.DOTALL | re.MULTILINE | re.VERBOSE,
)


def extract(text: str, task: str, options: int = 4) -> str | None:
    """The answer in a text for task math, choice or code; None if there is none in the expected form.

    options  how many options a question of task choice has
    """
    if task == "code":
        return code_block(text)
    box = boxed(text)
    if task == "choice" and box is not None:
        return letter(box, options)
    return box


def boxed(text: str) -> str | None:
    r"""The content of the last \boxed{...} that is closed; None if there is none, or if it is empty."""
    open_braces: list[int | None] = []  # where its box begins; None for a brace that is not a box
    start, end = 0, 0
    for brace in BRACE.finditer(text):
        if brace["box"]:
            open_braces.append(brace.end())
        elif brace["open"]:
            open_braces.append(None)
        elif brace["close"] and open_braces:
            began = open_braces.pop()
            if began is not None and began > start:
                start, end = began, brace.start()
    return text[start:end].strip() or None


def code_block(text: str) -> str | None:
    """The last Markdown block of Python that is not empty, else the last of any; an open one runs to the end.

    Fences are read as in CommonMark (see `fenced_blocks`). What does not keep to it is read loosely: if there is no
    Python by the rules, or if that is not valid and the loose reading is.
    """
    blocks = fenced_blocks(text)
    loose_blocks = [
        Block(found["name"].lower(), found["code"])
        for found in LOOSE_BLOCK.finditer(LINE_END.sub("\n", text))
    ]
    python = last_program(blocks, PYTHON)
    loose_python = last_program(loose_blocks, PYTHON)
    if python is None:
        document = last_program(blocks, ("markdown", "md"))
        within = code_block(document) if document else None
        return within or loose_python or last_program(blocks) or last_program(loose_blocks)
    if loose_python and loose_python != python and not is_valid(python) and is_valid(loose_python):
        return loose_python
    return python


def last_program(blocks: list[Block], names: tuple[str, ...] = ()) -> str | None:
    """The code of the last block that is not empty, without common indentation; of those with one of these names."""
    for name, code in reversed(blocks):
        if code.strip() and (not names or name in names):
            return textwrap.dedent(code).strip("\n")
    return None


def is_valid(program: str) -> bool:
    """Whether Python can parse a program."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of escapes that are not known, for instance
            ast.parse(program)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False
    return True
