r"""The answer in a text: the last \boxed{...} for task math, the letter in it for choice, for code the last program."""

import ast
import re
import string
import textwrap
import unicodedata
import warnings
from dataclasses import dataclass, field
from typing import NamedTuple


def extract(text: str, task: str, options: int = 4) -> str | None:
    """The answer in a text for task math, choice or code; None if there is none in the expected form.

    options  how many options a question of task choice has
    """
    if task == "choice":
        return letter(text, options)
    return {"math": boxed, "code": code_block}[task](text)


# Boxes

# \{ and \} belong to a set; \\ is a line break, so that \\{ ends in a real brace
BRACE = re.compile(r"(?P<box>\\\\?boxed\s*\{)|\\.|(?P<open>\{)|(?P<close>\})", re.DOTALL)


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


# Letters of options

# Commands that say how their argument looks. \mathbb is none of them: \mathbb{C} are the complex numbers.
FONT_OF_ARGUMENT = re.compile(
    r"""\\(?:
        (?P<text>text(?!color|circled)[a-z]* | [mhf]box | emph | underline)  # what it holds is text
        | math(?!bb)[a-z]* | boldsymbol | bm | pmb | operatorname\*? | (?:text)?circled | ensuremath
        | (?:text)?color\s*\{[^{}]*\}
    )\s*(?:(?P<brace>\{) | (?=[A-Za-z]\b))""",
    re.VERBOSE,
)
# Commands that change the font up to the end of their group, and marks that say nothing
NO_MEANING = re.compile(
    r"""\\(?:
        bf|rm|it|sf|tt|sl|sc|em|bfseries|rmfamily|sffamily|ttfamily|itshape|upshape|scshape|normalfont
        |displaystyle|textstyle|tiny|scriptsize|footnotesize|small|normalsize|large|Large|LARGE|huge|Huge|checkmark
        |left|right|[Bb]igg?[lr]?
    )(?![a-zA-Z])
    | \*\* | __ | [{}"`“”✓✔]""",
    re.VERBOSE,
)
BLANK = re.compile(r"\\[ ,;:\\()\[\]]|\\(?:q?quad|thinspace)(?![a-z])|(?<!\\)\$|~")
# Text in a command of its own is no word with the letter before it: C \text{warfarin}, but not C\text{arbon}
TEXT_AFTER = re.compile(
    r"(?<![A-Za-z\\])([A-Z])\}*(?:\s+\\TEXT\{|\\TEXT\{(?=[\s(]))"  # C \text{warfarin}
    r"|([)\]])[\s}]*\\TEXT\{"  # (C)\text{warfarin}
)
# As in: the correct answer is option
WORDS_BEFORE = re.compile(
    r"""\s*[(\[]?\s*
        (?:(?:the|my|our|so|thus|hence|correct|right|best|final|choose|select)\b[\s,]*)*
        (?:(?:options?|choices?|answer)\b[\s:\#]*)+
        (?:is\b[\s:]*)?
        (?:(?:the\s+)?(?:option|choice)\b[\s:\#]*)?""",
    re.VERBOSE | re.IGNORECASE,
)
OPTION = re.compile(r"\s*([(\[]?)\s*([A-Za-z])(?![A-Za-z0-9])")
ONLY_MARKS = re.compile(r"[\s.!:;,)\]]*")
# How text begins: with a word that is no name of a function, or with a number and its unit
PROSE = re.compile(
    r"""\s*(?:
        (?!(?:sin|cos|tan|cot|sec|csc|arc[a-z]+|log|exp|det|min|max|lim|gcd|lcm|mod|dim|ker|inf|sup)\b)
        [A-Za-z]{3,}
        | (?:an?|no|it|in|is|of|to|up|at|by|on|we|if|do)\s+[A-Za-z]{2,}
        | no\b
        | [-+]?\d[\d.,]*\s*(?:%|°|[A-Za-z]{2,}\b)
    )""",
    re.VERBOSE | re.IGNORECASE,
)
NUMBER = re.compile(r"\s*[-+]?\d[\d.,/]*\s*%?\s*")
# Text after a symbol: its unit, or when it holds
UNIT_OR_CONDITION = re.compile(
    r"\s*(?:(?:[cmk]?m|k?g|s|[kM]?[NJWVKTF]|[kM]?Hz|mol)(?:[\s/^\d·-]+(?:m|s|kg|K|mol|C))*[\s^\d-]*$"
    r"|(?:if|when|where|for|such that)\b)"
)
# As in: B is correct
CONFIRMED = re.compile(
    r"!?\s+(?:is\s+(?:the\s+)?(?:correct|right|answer|best|true)\b|only\W*$)|!\s+[A-Z][a-z]"
)
# What goes on from A: as in A: B: C = 1: 2: 3
RATIO = re.compile(r"\s*[A-Z]\s*(?::|=[^:]*:)")
# Signs that make an expression of a letter in round brackets before them
OPERATOR = re.compile(
    r"""[=+*/^_<>&|≤≥≠≈×·÷∪∩∈→⇒±] | [-−](?![\d.])
    | \\(?:cup|cap|to|times|cdot|in|ni|subset|supset|subseteq|supseteq|leq?|geq?|lt|gt|neq?|approx|equiv
        |sim|simeq|cong|pm|mp|div|implies|iff|[Rr]ightarrow|[Ll]eftrightarrow|longrightarrow|xrightarrow|mapsto
        |rightleftharpoons|mid|setminus|oplus|otimes|wedge|vee|land|lor|perp|parallel|circ|ast|star|propto
        )(?![a-z])
    | mod\b""",
    re.VERBOSE,
)


def letter(text: str, options: int = 4) -> str | None:
    r"""The option in the last box, as in B, (b), B., B!, \text{B}, B: text, B - text or B \text{text}; else None.

    A letter that begins an expression is no option: C(5,2), A - 2B, [A]_0 or B^2.
    options  how many there are, named by the letters from A on
    """
    plain = without_fonts(boxed(text) or "")
    before = WORDS_BEFORE.match(plain)
    found = OPTION.match(plain, before.end() if before else 0)
    if found is None:
        return None
    bracket, option = found.groups()
    known = string.ascii_uppercase[:options]
    after = plain[found.end() :]
    if option.upper() not in known or names_another_option(after, option, known):
        return None
    if bracket:
        is_option = is_option_in_brackets(bracket, after)
    else:
        is_option = is_option_before(after, is_capital=option.isupper())
    return option.upper() if is_option else None


def without_fonts(text: str) -> str:
    r"""A box without fonts and braces, with blanks for LaTeX's; a colon takes the place of a \text{ after a letter."""
    text = re.sub("[ℂ𝔸-𝔻]", r"\\mathbb{C}", text)  # the next line would make letters of them
    text = unicodedata.normalize("NFKC", text)  # Ⓑ and 𝐁 are B
    text = BLANK.sub(" ", text)
    text = re.sub(r"([_^])\s*\\text", r"\1\\script", text)  # no text, but an index
    text = FONT_OF_ARGUMENT.sub(
        lambda font: r"\TEXT{" if font["text"] and font["brace"] else "{", text
    )
    text = re.sub(r"^[\s{]*\\TEXT\{", "{", text)
    text = TEXT_AFTER.sub(lambda text_after: f"{text_after[1] or text_after[2]}: ", text)
    text = NO_MEANING.sub("", text.replace(r"\TEXT{", "{")).rstrip("\\ \n\t").lstrip()
    quoted = re.fullmatch(r"(['*_‘])(.*)(['*_’])", text, re.DOTALL)
    return quoted[2] if quoted else text


def names_another_option(after: str, option: str, known: str) -> bool:
    """Whether a second option follows as an answer: A, B or (A) and (B), but not (B) A cat."""
    others = known.replace(option.upper(), "")
    if not others:
        return False
    second = re.match(
        rf"\W*(?:(?:and|or)\W+[{others}{others.lower()}]\b|[{others}]\W*(?:$|[,/&]|and\b|or\b))",
        after,
    )
    return second is not None


def is_option_in_brackets(bracket: str, after: str) -> bool:
    """Whether a letter after a bracket is an option: (B), [B], (B) text, (B. text), but not (B + 1) or [B]_0."""
    closing = re.match(r"\s*[.:]?\s*([)\]])", after)
    if closing is None:
        return re.match(r"[.:]\s|\s+[-–—]", after) is not None and is_option_before(after, True)
    rest = after[closing.end() :]
    if bracket + closing[1] not in ("()", "[]"):
        return False
    if ONLY_MARKS.fullmatch(rest):
        return True
    text = re.sub(r"^\s*(?:[.:;,]|[-–—](?=\s))", "", rest).strip()
    is_apart = re.match(r"\s*[.:;,]|\s(?!\s*[-–—]\s)", rest) is not None
    if bracket == "(" and is_apart:
        return OPERATOR.match(text) is None
    return PROSE.match(text) is not None


def is_option_before(after: str, is_capital: bool) -> bool:
    """Whether a letter without brackets is an option, from what follows it."""
    if ONLY_MARKS.fullmatch(after) and (is_capital or "!" not in after):
        return True
    if after.startswith((".", ")", ":")):
        text = after[1:]
        is_colon = after.startswith(":")
        if is_colon and (UNIT_OR_CONDITION.match(text) or RATIO.match(text)):
            return False
        return text[:1].isspace() or PROSE.match(text) is not None
    if not is_capital:
        return False
    if after.startswith((",", ";")):
        text = after[1:]
        return "=" in text or bool(PROSE.match(text) or NUMBER.fullmatch(text))
    if dash := re.match(r"\s+[-−–—]+\s+|\s*—\s*", after):
        return PROSE.match(after, dash.end()) is not None
    if bracketed := re.fullmatch(r"(\s*)\(([^()]*(?:\([^()]*\)[^()]*)*)\)?(.*)", after, re.DOTALL):
        blank, text, rest = bracketed.groups()
        is_word = re.match(r"[A-Za-z]{4,}", text) if not blank else PROSE.match(text)
        return is_word is not None and OPERATOR.match(rest.strip()) is None
    return CONFIRMED.match(after) is not None


# Programs

PYTHON = ("python", "py", "python3")
QUOTE = -1  # a container that is no list item
LINE_END = re.compile(r"\r\n|\r|\n")
# A fence at the beginning of a line. What follows backticks has none, or they would be code within a line.
FENCE = re.compile(r"(?P<marks>`{3,}(?=[^`]*$)|~{3,})(?P<info>.*)")
# Models also begin a block at the end of a line, as in: so ```python
LATE_FENCE = re.compile(r"```(?P<info>[ \t]*(?:python3?|py)[ \t]*)$", re.IGNORECASE)
LIST_MARKER = re.compile(r"(?:[-+*]|(?P<number>\d{1,9})[.)])(?=[ \t]|$)")
RULE = re.compile(r"(?:(?:\*[ \t]*){3,}|(?:-[ \t]*){3,}|(?:_[ \t]*){3,})$")
UNDERLINE = re.compile(r"(?:=+|-+)[ \t]*$")  # makes a heading of the text before it
HEADING = re.compile(r"#{1,6}(?:[ \t]|$)")
# A block of whoever does not keep to CommonMark: its fences may stand at the end of a line, or at any depth
LOOSE_BLOCK = re.compile(
    r"""(?P<at_start>^[ \t]*)? ```[ \t]*+ (?P<name>[\w+-]*+)
    (?(at_start) [^`\n]* | [ \t]*) \n  # words may follow the name where the fence begins its line
    (?P<code>.*?)
    (?: ^[ \t]*``` | ```[ \t]*$ | \Z )""",
    re.DOTALL | re.MULTILINE | re.VERBOSE,
)


class Block(NamedTuple):
    """A fenced block: the first word of its info string in lower case, and what it holds."""

    name: str
    code: str


class Line(NamedTuple):
    """What is left of a line, and the column where that begins: a tab reaches to the next multiple of four."""

    text: str
    column: int = 0

    def is_blank(self) -> bool:
        return not self.text.strip(" \t")

    def indent(self) -> int:
        """How many columns of blanks it begins with."""
        column = self.column
        for character in self.text:
            if character not in " \t":
                break
            column += 4 - column % 4 if character == "\t" else 1
        return column - self.column

    def after(self, characters: int) -> "Line":
        """The line without its first characters, which are no tabs."""
        return Line(self.text[characters:], self.column + characters)

    def dedented(self, columns: int) -> "Line":
        """The line without up to so many columns of blanks; a tab that is cut leaves blanks."""
        text, column = self
        end = column + columns
        while column < end and text.startswith((" ", "\t")):
            width = 4 - column % 4 if text[0] == "\t" else 1
            left_of_tab = max(column + width - end, 0)
            text = " " * left_of_tab + text[1:]
            column += width - left_of_tab
        return Line(text, column)


@dataclass
class OpenFence:
    """A fence that is not closed yet."""

    marks: str
    info: str
    indent: int  # so many columns of blanks are no part of its lines
    lines: list[str] = field(default_factory=list)

    def is_closed_by(self, line: Line) -> bool:
        closing = line.text.strip(" \t")
        is_fence = set(closing) == {self.marks[0]} and len(closing) >= len(self.marks)
        return is_fence and line.indent() <= 3

    def block(self) -> Block:
        name = re.match(r"[\s{.]*([\w+-]*)", self.info)
        return Block(name[1].lower() if name else "", "\n".join(self.lines))


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


def fenced_blocks(text: str) -> list[Block]:
    """The fenced blocks of a text, as CommonMark 0.31 reads them in quotes and lists, in order.

    There are two differences, for the sake of what models write: HTML hides no fence, and ```python may end a line.
    """
    blocks: list[Block] = []
    containers: list[int] = []  # QUOTE, or the columns by which a list's item is indented
    fence: OpenFence | None = None
    in_paragraph = False
    begins_blank = False  # an item has begun in the last line, and has nothing yet
    for text_of_line in LINE_END.split(text):
        line, depth = enter(Line(text_of_line), containers)
        stays = depth == len(containers)
        if fence and stays:
            if fence.is_closed_by(line):
                blocks.append(fence.block())
                fence = None
            else:
                fence.lines.append(line.dedented(fence.indent).text)
            continue
        if fence:  # its container has ended
            blocks.append(fence.block())
            fence = None
        if begins_blank and line.is_blank() and stays:  # it stays empty
            containers.pop()
            depth -= 1
        line, opened = open_containers(line, in_paragraph, stays)
        is_text = in_paragraph and not opened  # then blanks do not make code of a line
        fence = None if line.indent() > 3 else opened_fence(line)
        ends = ends_paragraph(line, follows_text=is_text and stays)
        goes_on = is_text and not (line.is_blank() or fence or ends)
        if not goes_on:  # else it is the paragraph's, whatever its containers
            containers[depth:] = opened
        begins_blank = opened[-1:] not in ([], [QUOTE]) and line.is_blank()
        is_code = line.indent() > 3 and not is_text
        in_paragraph = not (line.is_blank() or fence or is_code or ends)
    if fence:
        blocks.append(fence.block())
    return blocks


def enter(line: Line, containers: list[int]) -> tuple[Line, int]:
    """What a line holds within the containers that go on in it, and how many these are."""
    for depth, container in enumerate(containers):
        if container == QUOTE:
            if line.indent() > 3 or not line.text.lstrip(" \t").startswith(">"):
                return line, depth
            line = line.dedented(3).after(1).dedented(1)
        elif line.is_blank() or line.indent() >= container:
            line = line.dedented(container)
        else:
            return line, depth
    return line, len(containers)


def open_containers(line: Line, in_paragraph: bool, stays: bool) -> tuple[Line, list[int]]:
    """What a line holds within the quotes and list items that begin in it, and these containers.

    in_paragraph, stays   whether it follows a line of text, and is in the same containers
    """
    opened: list[int] = []
    while line.indent() <= 3:
        indent = line.indent()
        content = line.dedented(3)
        if content.text.startswith(">"):
            opened.append(QUOTE)
            line = content.after(1).dedented(1)
            continue
        marker = LIST_MARKER.match(content.text)
        if marker is None or RULE.match(content.text):
            break
        item = content.after(marker.end())
        follows_text = in_paragraph and stays and not opened
        if follows_text and (item.is_blank() or marker["number"] not in (None, "1")):
            break
        is_blank_or_code = item.is_blank() or item.indent() > 4
        blanks = 1 if is_blank_or_code else item.indent()
        opened.append(indent + marker.end() + blanks)
        line = item.dedented(blanks)
    return line, opened


def opened_fence(line: Line) -> OpenFence | None:
    """The fence that a line opens."""
    opening = FENCE.match(line.text.lstrip(" \t"))
    if opening:
        return OpenFence(opening["marks"], opening["info"], line.indent())
    late = LATE_FENCE.search(line.text)
    if late and "`" not in line.text[: late.start()]:
        return OpenFence("```", late["info"], 0)
    return None


def ends_paragraph(line: Line, follows_text: bool) -> bool:
    """Whether a line is a heading or a rule, or makes a heading of the text before it."""
    content = line.text.lstrip(" \t")
    is_underline = follows_text and UNDERLINE.match(content)
    ends = is_underline or RULE.match(content) or HEADING.match(content)
    return line.indent() <= 3 and bool(ends)
