r"""What tidied LaTeX means: a number with its unit, a tuple, an interval, a set, a union, a matrix, a relation, words.

`meaning` reads a text from the outside in: what separates its parts outside of all brackets says which kind it is, and
each part is a text that has a meaning of its own.
"""

import re
from dataclasses import dataclass
from fractions import Fraction

from .expression import Number, equal, values_at_points
from .units import (
    CHANGING,
    KNOWN,
    SYMBOLS,
    UNIT_BEGINS,
    WORDS_OF_UNIT,
    is_plain_unit,
    unit_of,
    words_of,
)


@dataclass(frozen=True)
class Value:
    """A number or an expression by its values at the points of expression.py, with a unit."""

    numbers: list[Number]
    unit: str = ""
    half_step: Fraction | None = None  # by so much a number that a computer printed may be off
    # its text without blanks, if that may be no product: an order, a name or a hexadecimal number
    in_order: str = ""


@dataclass(frozen=True)
class Words:
    """Words, or a number that words change, as in 3 million."""

    words: list[str]


@dataclass(frozen=True)
class Many:
    """A set, a list of answers, which is as good as a set, or a union of intervals."""

    kind: str  # set, list, union
    items: list["Meaning"]


@dataclass(frozen=True)
class Ordered:
    """A tuple or an interval with its brackets; a matrix, a row of a matrix, a ratio."""

    kind: str  # (), [], (], [), matrix, row, ratio
    items: list["Meaning"]


@dataclass(frozen=True)
class Relation:
    """The two sides of an equation or an inequality, as texts."""

    left: str
    sign: str
    right: str


Meaning = Value | Words | Many | Ordered | Relation

# x, AB, |AB|, x_1, f(x), f(2), (x, y): what may stand before an answer and an equals sign
NAME = re.compile(
    r"""(?:
        (?:[a-zA-Z] | (?:\\frac|\\abs|[{}/]|[A-Z]{2,3})+ | \\(?:alpha|beta|gamma|theta|lambda|omega|phi|mu))
        (?:_\{?\w\}?)? (?:\((?:[a-zA-Z]|-?\d+)\))?
    )
    | \( \s*[a-zA-Z](?:_\{?\w\}?)? (?:\s*[,;]\s*[a-zA-Z](?:_\{?\w\}?)?)+ \s*\)""",
    re.VERBOSE,
)
# ABC, GH 1, 3A: capitals, or capitals and digits, without an operator
IN_ORDER = re.compile(r"(?=.*[A-Z])[A-Z\d](?:\s*[A-Z\d])+", re.ASCII)
# AB, 2AB: those of them that are as likely a product or a segment, whose order is of no account
OFTEN_PRODUCT = re.compile(r"[A-Z]{2}|\d+[A-Z]{2,}", re.ASCII)
COMPARED = ("<=", ">=", "<", ">", "=", "≠", "≈")
BRACKETED = re.compile(r"([(\[])(.*[,;].*)([)\]])", re.DOTALL)
MATRIX = re.compile(r"\(?\s*\\begin\{([pb]matrix)\}(.*)\\end\{\1\}\s*\)?", re.DOTALL)
WORDS = re.compile(r"""(?=.*"|.*[a-z]{4}|(?:yes|no|odd)$)[a-z"\s.,:;'!?()-]+""", re.IGNORECASE)


# A number, then its unit: a percent sign, or text in quotation marks; and the unit's power
MEASURE = re.compile(
    r"""(?P<number>.*[^\s"])\s*(?:(?P<percent>%)|"(?P<quoted>[^"]*)")\s*(?P<power>\^\{[23]\})?""",
    re.DOTALL,
)


def split(text: str, *separators: str) -> list[str]:
    """The parts of a text between the separators outside of all brackets; ValueError as in `parts_and_separators`."""
    return parts_and_separators(text, *separators)[::2]


def parts_and_separators(text: str, *separators: str) -> list[str]:
    """A text split at the separators outside of all brackets, and these separators: [part, separator, part, ...].

    Raises ValueError if brackets do not match, or are nested more than 30 deep.
    """
    found = []
    depth = start = 0
    marks = [*map(re.escape, separators), r"\\(?:begin|end)\b", r"[{}()\[\]]"]
    for match in re.finditer("|".join(marks), text):
        if match[0] not in separators:
            depth += 1 if match[0] in (r"\begin", "{", "(", "[") else -1
            if not 0 <= depth <= 30:
                raise ValueError("brackets that do not match")
        elif depth == 0:
            found += [text[start : match.start()].strip(), match[0]]
            start = match.end()
    return found + [text[start:].strip()]


def members(text: str, *separators: str) -> list[str]:
    """The parts of a list that are not empty; one with ± in it becomes two, with more than one a ValueError."""
    parts = []
    for part in filter(None, split(text, *separators)):
        if part.count("±") > 1:
            raise ValueError("signs that may be the same or not")
        if "±" in part:
            parts += [part.replace("±", "+"), part.replace("±", "-")]
        else:
            parts.append(part)
    return parts


def in_braces(text: str) -> str | None:
    """The content of one pair of braces around a whole text: {1, 2} without backslashes."""
    if not (text.startswith("{") and text.endswith("}")):
        return None
    try:
        split(text[1:-1])
    except ValueError:  # {1}, {2}
        return None
    return text[1:-1].strip()


def meaning(text: str) -> Meaning:
    """What a tidied text means; ValueError or ArithmeticError if it is unreadable."""
    if text.startswith(r"\{") and text.endswith(r"\}"):
        return Many("set", [meaning(part) for part in members(text[2:-2], ",", ";")])
    if content := in_braces(text):
        return meaning(content)
    comma = ";" if len(split(text, ";")) > 1 else ","
    for kind, separator in (("list", comma), ("union", r"\cup")):
        parts = members(text, separator)
        if len(parts) > 1:
            return Many(kind, [meaning(part) for part in parts])
    sides = parts_and_separators(text, *COMPARED)
    if len(sides) > 1:
        return compared(sides)
    if brackets := BRACKETED.fullmatch(text):
        items = split(brackets[2], ",", ";")
        return Ordered(brackets[1] + brackets[3], [meaning(item) for item in items])
    if found := MATRIX.fullmatch(text):
        return matrix(found[2])
    parts = split(text, ":")
    if len(parts) > 1:
        return Ordered("ratio", [Value(values_at_points(part)) for part in parts])
    text = re.sub(r'^"\s*\(?([a-zA-Z])\)?\s*"$', r"\1", text)  # one letter in \text{} is a variable
    if WORDS.fullmatch(text):
        return Words(re.findall(r"[a-z']+|[-()!]", text.lower()))
    return quantity(text)


def matrix(content: str) -> Ordered:
    """The meaning of what stands between the ends of a matrix."""
    rows = []
    for row in split(content, "\\\\"):
        if row:
            cells = split(row, "&")
            rows.append(Ordered("row", [meaning(cell) for cell in cells]))
    return Ordered("matrix", list(rows))


def compared(sides: list[str]) -> Meaning:
    """The meaning of sides with signs between them: an interval, a relation, or a chain that ends in its value."""
    match sides:
        case low, ("<" | "<=") as above, name, ("<" | "<=") as below, high if is_variable(name):
            brackets = ("[" if above == "<=" else "(") + ("]" if below == "<=" else ")")
            return Ordered(brackets, [meaning(low), meaning(high)])
        case high, (">" | ">=") as below, name, (">" | ">=") as above, low if is_variable(name):
            brackets = ("[" if above == ">=" else "(") + ("]" if below == ">=" else ")")
            return Ordered(brackets, [meaning(low), meaning(high)])
    if "≈" in sides:
        sides = without_approximation(sides)
    match sides:
        case (value,):
            return meaning(value)
        case left, sign, right:
            return Relation(left, sign, right)
    if set(sides[1::2]) != {"="}:
        raise ValueError("signs of several kinds")
    numbers = list(filter(None, map(constant_value, sides[::2])))
    if not all(equal(one, numbers[0]) for one in numbers):
        raise ValueError("a chain of equations that is wrong")
    return Relation(sides[0], "=", sides[-1])


def is_variable(text: str) -> bool:
    """Whether a text is a name that may have any value, unlike f(2)."""
    return NAME.fullmatch(text) is not None and not re.search(r"\(-?\d", text)


def without_approximation(sides: list[str]) -> list[str]:
    """Sides up to the first ≈, since what comes before is exact: sqrt(3)/3 ≈ 0.577; but x ≈ 11 is x = 11.

    Raises ValueError if the approximation is no decimal that the number before it has been shortened to.
    """
    exact = sides[: sides.index("≈")]
    approximation = sides[len(exact) + 1]
    value = constant_value(exact[-1])
    if value is None:
        return [*exact, "=", approximation]
    decimal = re.fullmatch(r"-?\d+\.?(\d*)", approximation)
    if decimal is None or not is_shortened(value[0], float(approximation), len(decimal[1])):
        raise ValueError("an approximation that is wrong")
    return exact


def is_shortened(value: Number, decimal: float, places: int) -> bool:
    """Whether a decimal is a number that was rounded or cut off after so many places."""
    step = 10**-places
    is_cut_off = abs(decimal) <= abs(value)
    most = step if is_cut_off else step / 2
    return abs(value - decimal) <= most


def constant_value(text: str) -> list[Number] | None:
    """The values of a text that is a number, without letters; None if it is none."""
    try:
        values = values_at_points(text)
    except (ValueError, ArithmeticError, RecursionError):
        return None
    return values if constant(values) else None


def constant(values: list[Number]) -> bool:
    """Whether values at points are all the same."""
    return equal(values, values[:1] * len(values))


# Numbers with units


def quantity(text: str) -> Value | Words:
    """The meaning of a text that is a value with or without a unit; words if they change the number."""
    if measure := MEASURE.fullmatch(text):
        number, percent, quoted, power = measure.groups(default="")
        if CHANGING.match(quoted.strip().lower()):
            return Words(text.split())
        return Value(values_at_points(number), unit_of(percent or quoted) + power)
    for begin in UNIT_BEGINS.finditer(text):
        number, name = text[: begin.start()], text[begin.end() :]
        is_words = WORDS_OF_UNIT.fullmatch(name) and not KNOWN.issuperset(words_of(name))
        if is_words and CHANGING.match(name.lower()):
            return Words(text.split())
        is_sum = re.search(r"(?<!^)[+-]", number) is not None
        if is_plain_unit(name) and not (is_sum and name in SYMBOLS):  # 5 + 3 m
            return Value(values_at_points(number), unit_of(name))
    return Value(values_at_points(text), half_step=half_step(text), in_order=in_order(text))


def in_order(text: str) -> str:
    """A text without blanks, if it is one of capitals that may stand for their order; "" of any other."""
    return re.sub(r"\s", "", text) if IN_ORDER.fullmatch(text) else ""


def half_step(text: str) -> Fraction | None:
    """Half of the last place of a decimal with 15 digits or more, as computers print numbers; None for any other."""
    printed = re.fullmatch(r"-?\d*\.(\d+)", text)
    if printed is None or len(text.strip("-0.").replace(".", "")) < 15:
        return None
    return Fraction(1, 2 * 10 ** len(printed[1]))
