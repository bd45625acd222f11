"""The fenced blocks of a text in Markdown, as CommonMark 0.31 reads them in quotes and lists.

A fence is three or more backticks or tildes. Its block ends at a fence like it, or with the quote or the list item that
it began in. So lines are read with a stack of open containers: see "Phase 1: block structure" in CommonMark's appendix.
"""

import re
from dataclasses import dataclass, field
from typing import NamedTuple

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


class Block(NamedTuple):
    """A fenced block: the first word of its info string in lower case, and what it holds."""

    name: str
    code: str


class Line(NamedTuple):
    """What is left of a line, and the column where that begins: a tab reaches to the next multiple of four."""

    text: str
    column: int = 0

    def is_blank(self) -> bool:
        """Whether it has only blanks and tabs."""
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
        """Whether a line is a fence of the same character, at least as long, and not indented as code."""
        closing = line.text.strip(" \t")
        is_fence = set(closing) == {self.marks[0]} and len(closing) >= len(self.marks)
        return is_fence and line.indent() <= 3

    def block(self) -> Block:
        name = re.match(r"[\s{.]*([\w+-]*)", self.info)
        return Block(name[1].lower() if name else "", "\n".join(self.lines))


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
        if not goes_on:  # a line of a paragraph may leave out the marks of its containers
            containers[depth:] = opened
        begins_item = bool(opened) and opened[-1] != QUOTE
        begins_blank = begins_item and line.is_blank()
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
