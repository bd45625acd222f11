r"""Whether two answers in LaTeX are equal, as far as arithmetic can tell: True, False, or None if that is not certain.

LaTeX is first tidied, then read as a meaning: a number with its unit, a tuple or an interval, a set, a union, a matrix,
a relation, or words. Meanings are compared part by part, with the arithmetic of expression.py: 3.2 is not 3.9, and
0.333 is not 1/3. If only one side names its unit, its base or `x =`, the rest decides: 52 equals 52_8, but 42 does not.
None stands for what cannot be read, and for the same numbers in another kind, as (0, 1) for 0, 1.
"""

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from itertools import product, starmap
from pathlib import Path

from .expression import Number, equal, values_at_points

LONGEST = 2000  # characters of an answer
MOST_ITEMS = 50  # of a set; no answer of MATH comes near either

Verdict = bool | None  # None: not certain


# Spellings

SPELLINGS = Path(__file__).with_name("spellings.txt").read_text(encoding="utf-8").splitlines()
REPLACED = [
    (re.compile(line.split("`")[1]), line.split("`")[3])
    for line in SPELLINGS
    if line.startswith("`")
]
REPEATING = re.compile(r"(\d*)\.(\d*)\\(?:overline|bar)\s*\{(\d+)\}")  # 0.1\overline{6}
# 12 000 or 1 000 000, where a number may begin: no more than one blank between groups of three digits
BLANK_GROUPS = re.compile(
    r"(?:^|(?<=[,;(\[{=<>+-])|(?<=[,;(\[{=<>+-]\s))\d{1,3}(?: \d{3})+(?!\d|,\d|\s[\d\\/])"
)
# Digits with commas between them: 12,000 is a number, 1,2 a list, 12,000,30,000 may be either
COMMAS = re.compile(r"(?<![\d.])\d++(?:,\d++)++")
# A comma or the like that can only separate
SEPARATOR = re.compile(r",(?=\s)|(?<=\s),|;|,(?!\d)|(?<!\d),")
SCIENTIFIC = re.compile(r"(?<![\w.])(\d++(?:\.\d*+)?|\.\d++)[eE]([-+]?\d+)(?![\w.])")  # 1e-5
# 2,74, which is no number with a thousands separator
DECIMAL_COMMA = re.compile(r"(-?)(0(?=,)|[1-9]\d*+(?!,\d{3}$)),(\d{2,})")
SHORT_DECIMAL_COMMA = re.compile(r"^(-?\d+),(\d)$")  # 1,5


def tidy(text: str) -> str:
    r"""The same mathematics in fewer spellings; the content of \text{} is put in quotation marks."""
    for pattern, replacement in REPLACED:
        text = pattern.sub(replacement, text)
    text = REPEATING.sub(repeating_decimal, text)
    return BLANK_GROUPS.sub(lambda number: number[0].replace(" ", ""), text)


def repeating_decimal(number: re.Match[str]) -> str:
    r"""0.1\overline{6} as a sum of a decimal and a fraction."""
    whole, decimals, period = number.groups()
    nines = "9" * len(period) + "0" * len(decimals)
    return f"({whole or 0}.{decimals or 0}+{period}/{nines})"


def readings(text: str) -> list[str]:
    """The tidied text in all ways in which its numbers may be meant, the most likely first."""
    found = [without_thousands(text, sparing=False), without_thousands(text, sparing=True)]
    if decimal := DECIMAL_COMMA.fullmatch(text):
        found.append("{}{}.{}".format(*decimal.groups()))
    if SYMBOL_APART.search(text):
        found.append(SYMBOL_APART.sub("", text))  # 5 m may also be 5 times m
    found += [SCIENTIFIC.sub(r"(\1*10^{\2})", reading) for reading in found]  # 5e-5 or 5*e - 5
    return list(dict.fromkeys(found))


def without_thousands(text: str, sparing: bool) -> str:
    """A text without the commas between thousands; sparing: only without those that cannot separate a list."""

    def joined(run: re.Match[str]) -> str:
        before = text[: run.start()].rstrip(" -")
        after = text[run.end() :].lstrip()
        is_all_of_brackets = before.endswith(("(", "[", r"\{")) and after.startswith(
            (")", "]", r"\}")
        )
        is_member = SEPARATOR.search(text) is not None and not is_all_of_brackets
        is_list = sparing and not is_member
        numbers = joined_groups(run[0], only_zeros=is_list)
        if is_all_of_brackets and len(numbers) == 1:
            numbers = joined_groups(run[0], only_zeros=True)  # (1,234) is a pair
        return ",".join(numbers)

    return COMMAS.sub(joined, text)


def joined_groups(run: str, only_zeros: bool) -> list[str]:
    """The numbers in digits with commas, 12,000,30,000.

    only_zeros  join only groups that begin with 0, as no number in a list does
    """
    numbers: list[str] = []
    groups_may_follow = False
    for group in run.split(","):
        is_group = groups_may_follow and len(group) == 3
        if is_group and (group[0] == "0" or not only_zeros):
            numbers[-1] += group
        else:
            numbers.append(group)
            groups_may_follow = len(group) <= 3 and group[0] != "0"
    return numbers


# Meanings


@dataclass(frozen=True)
class Value:
    """A number or an expression by its values at the points of expression.py, with a unit."""

    numbers: list[Number]
    unit: str = ""
    half_step: Fraction | None = None  # by so much a number that a computer printed may be off


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
COMPARED = ("<=", ">=", "<", ">", "=", "≠", "≈")
BRACKETED = re.compile(r"([(\[])(.*[,;].*)([)\]])", re.DOTALL)
MATRIX = re.compile(r"\(?\s*\\begin\{([pb]matrix)\}(.*)\\end\{\1\}\s*\)?", re.DOTALL)
WORDS = re.compile(r"""(?=.*"|.*[a-z]{4}|(?:yes|no|odd)$)[a-z"\s.,:;'!?()-]+""", re.IGNORECASE)


def split(text: str, *separators: str) -> list[str]:
    """A text split at the separators outside of all brackets, and these separators: [part, separator, part, ...].

    Raises ValueError if brackets do not match, or are nested more than 30 deep.
    """
    parts = []
    depth = start = 0
    marks = [*map(re.escape, separators), r"\\(?:begin|end)\b", r"[{}()\[\]]"]
    for match in re.finditer("|".join(marks), text):
        if match[0] not in separators:
            depth += 1 if match[0] in (r"\begin", "{", "(", "[") else -1
            if not 0 <= depth <= 30:
                raise ValueError("brackets that do not match")
        elif depth == 0:
            parts += [text[start : match.start()].strip(), match[0]]
            start = match.end()
    return parts + [text[start:].strip()]


def members(text: str, *separators: str) -> list[str]:
    """The parts of a list that are not empty; one with ± in it becomes two, with more than one a ValueError."""
    parts = []
    for part in filter(None, split(text, *separators)[::2]):
        if part.count("±") > 1:
            raise ValueError("signs that may be the same or not")
        signs = "+-" if "±" in part else "+"
        parts += [part.replace("±", sign) for sign in signs]
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
    sides = split(text, *COMPARED)
    if len(sides) > 1:
        return compared(sides)
    if brackets := BRACKETED.fullmatch(text):
        items = split(brackets[2], ",", ";")[::2]
        return Ordered(brackets[1] + brackets[3], [meaning(item) for item in items])
    if found := MATRIX.fullmatch(text):
        return matrix(found[2])
    parts = split(text, ":")[::2]
    if len(parts) > 1:
        return Ordered("ratio", [Value(values_at_points(part)) for part in parts])
    text = re.sub(r'^"\s*\(?([a-zA-Z])\)?\s*"$', r"\1", text)  # one letter in \text{} is a variable
    if WORDS.fullmatch(text):
        return Words(re.findall(r"[a-z']+|[-()!]", text.lower()))
    return quantity(text)


def matrix(content: str) -> Ordered:
    """The meaning of what stands between the ends of a matrix."""
    rows = []
    for row in split(content, "\\\\")[::2]:
        if row:
            cells = split(row, "&")[::2]
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


# Numbers with units

# A number, then its unit: a percent sign, or text in quotation marks; and the unit's power
MEASURE = re.compile(
    r"""(?P<number>.*[^\s"])\s*(?:(?P<percent>%)|"(?P<quoted>[^"]*)")\s*(?P<power>\^\{[23]\})?""",
    re.DOTALL,
)
# Where the plain letters of a unit may begin: after a blank, or if none but a unit is written so: 5cm
UNIT_BEGINS = re.compile(r"(?<=[\d)}])(?:\s+|(?=(?:[ckm]m|kg|ml|mph|kmh?)\b))(?=[A-Za-z])")
WORDS_OF_UNIT = re.compile(r"[A-Za-z]{2}[A-Za-z. /]*")
PLAIN_UNIT = re.compile(r"[A-Za-z][A-Za-z.\s/*^{}\d-]*")
# A letter that may be a unit or a factor, after a blank: 5 m
SYMBOL_APART = re.compile(r"(?<=\d)\s+(?=[msghLlNJWV]$)")
SYMBOL_TIGHT = re.compile(r"(?<=\d)(?=[msghLlNJWV]$)")
# Words after which a number is another, or no number: no unit
CHANGING = re.compile(
    r"""[^a-z]*[\d!\\] | [eixyz]$ | (squared|cubed|factorial|plus|minus|is|pi)\b
    | .*\b(
        hundred|thousand|(m|b|tr)illion|dozen|half|halve|third|(four|fif|six|seven|eigh|nin|ten)th
        |and|or|more|less|least|most|not
    )(th)?s?\b""",
    re.DOTALL | re.VERBOSE,
)
UNITS = [line.split()[1:] for line in SPELLINGS if line.startswith("unit ")]
SHORT = {unit[0]: unit[-1] for unit in UNITS}  # without a plural s
KNOWN = {name for unit in UNITS for name in unit}
SYMBOLS = frozenset("msghLlNJWV")


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
    return Value(values_at_points(text), half_step=half_step(text))


def half_step(text: str) -> Fraction | None:
    """Half of the last place of a decimal with 15 digits or more, as computers print numbers; None for any other."""
    printed = re.fullmatch(r"-?\d*\.(\d+)", text)
    if printed is None or len(text.strip("-0.").replace(".", "")) < 15:
        return None
    return Fraction(1, 2 * 10 ** len(printed[1]))


def words_of(name: str) -> list[str]:
    """The words of a unit without a plural s, in lower case unless they are symbols of one or two letters."""
    words = re.findall(r"[A-Za-z]+", name)
    return [word if len(word) <= 2 else singular(word.lower()) for word in words]


def singular(word: str) -> str:
    return word[:-1] if len(word) > 2 and word.endswith("s") else word


def is_plain_unit(name: str) -> bool:
    """Whether plain letters are a unit: all of its words are known. Other letters are factors."""
    words = words_of(name)
    is_spelled = PLAIN_UNIT.fullmatch(name) and not re.search(r"[/*^-]\s*$", name)
    return bool(is_spelled) and all(
        word in SYMBOLS or word in KNOWN and (len(word) > 1 or len(words) > 1) for word in words
    )


def unit_of(name: str) -> str:
    """One spelling for a unit: square centimeters, sq cm and cm^2 become "cm^{2}", meters per second "m/s"."""
    name = re.sub(r"\s+per\s+", "/", name.strip())
    name = re.sub(r"\^\s*(\d)", r"^{\1}", name)
    name = re.sub(r"\s*\*?\s*\b([A-Za-z]+)\^\{-(\d)\}", r"/\1^{\2}", name).replace("^{1}", "")
    name = re.sub(r"\b(?:sq|square)\.?\s+([A-Za-z]+)", r"\1^{2}", name, flags=re.IGNORECASE)
    name = re.sub(r"\bcubic\s+([A-Za-z]+)", r"\1^{3}", name, flags=re.IGNORECASE)
    name = re.sub(r"[A-Za-z]+", lambda word: short_unit(word[0]), name)
    return re.sub(r"[.\s*]", "", name)


def short_unit(word: str) -> str:
    """The short form of a word of a unit."""
    word = singular(word.lower())
    return SHORT.get(word, word)


# Comparison


def every(verdicts: Iterable[Verdict]) -> Verdict:
    """Whether all are true: False if one is not, else None if one is not certain."""
    found = set()
    for verdict in verdicts:
        if verdict is False:
            return False
        found.add(verdict)
    return None if None in found else True


def some(verdicts: Iterable[Verdict]) -> Verdict:
    """Whether one is true, else None if one is not certain."""
    found = set()
    for verdict in verdicts:
        if verdict:
            return True
        found.add(verdict)
    return None if None in found else False


def same_latex(predicted: str, target: str) -> Verdict:
    """Whether an answer in LaTeX equals the target: True, False, or None if that is not certain."""
    if max(len(predicted), len(target)) > LONGEST:
        return predicted == target
    predicted, target = tidy(predicted), tidy(target)
    if predicted and without_blanks(predicted) == without_blanks(target):
        return True
    found = some(verdict(*texts) for texts in product(readings(predicted), readings(target)))
    if found is False and some(starmap(verdict, doubtful_readings(predicted, target))):
        return None
    return found


def doubtful_readings(predicted: str, target: str) -> list[tuple[str, str]]:
    """An answer and a target as they may be meant, but are less likely to be: 5m as 5 meters, 1,5 as 1.5."""
    pairs = (
        (SYMBOL_TIGHT.sub(" ", predicted), target),
        (SHORT_DECIMAL_COMMA.sub(r"\1.\2", predicted), target),
        (predicted, SHORT_DECIMAL_COMMA.sub(r"\1.\2", target)),
    )
    return [pair for pair in pairs if pair != (predicted, target)]


def without_blanks(text: str) -> str:
    """A text without quotation marks and blanks, except those between two digits."""
    return re.sub(r"(?<![\d\s])\s+|\s+(?![\d\s])", "", text.replace('"', ""))


def verdict(predicted: str, target: str) -> Verdict:
    """Whether two tidied texts mean the same; None if one of them cannot be read."""
    try:
        return alike(meaning(predicted), meaning(target))
    except (ValueError, ArithmeticError, RecursionError):
        return None


def alike(a: Meaning, b: Meaning) -> Verdict:
    """Whether the meaning of an answer is that of a target."""
    match a, b:
        case Relation(), Relation():
            return same_relation(a, b)
        case Relation(), _:
            return stated(a, b)
        case _, Relation():
            return asked(a, b)
        case Words(), Words():
            return a.words == b.words
        case Value(), Value():
            return same_value(a, b)
        case Ordered(), Ordered() if (a.kind == "matrix") == (b.kind == "matrix"):
            return same_order(a, b)
        case Many(), Many() if (a.kind == "union") == (b.kind == "union"):
            return same_items(a.items, b.items)
    return of_two_kinds(a, b)


def same_order(a: Ordered, b: Ordered) -> Verdict:
    """Whether two tuples, intervals, matrices or ratios are the same."""
    if "ratio" in (a.kind, b.kind) and a.kind == b.kind and len(a.items) == len(b.items):
        return True if every(map(alike, a.items, b.items)) else proportional(a, b)
    if a.kind != b.kind or len(a.items) != len(b.items):
        return False
    return every(map(alike, a.items, b.items))


def proportional(a: Ordered, b: Ordered) -> Verdict:
    """None if two ratios are the same when reduced, as 2:4 and 1:2, which may also be two times of the day."""
    first, other_first = a.items[0], b.items[0]
    for item, other in zip(a.items, b.items, strict=True):
        if not (isinstance(item, Value) and isinstance(other, Value)):
            return None
        assert isinstance(first, Value) and isinstance(other_first, Value)
        crosswise = [x * y for x, y in zip(item.numbers, other_first.numbers, strict=True)]
        other_crosswise = [x * y for x, y in zip(other.numbers, first.numbers, strict=True)]
        if not equal(crosswise, other_crosswise):
            return False
    return None


def same_items(items: list[Meaning], others: list[Meaning]) -> Verdict:
    """Whether each item of an answer's set is among the target's, and each of the target's among the answer's."""
    if max(len(items), len(others)) > MOST_ITEMS:
        return None
    forth = every(some(alike(item, other) for other in others) for item in items)
    if forth is False:
        return False
    return every((forth, every(some(alike(item, other) for item in items) for other in others)))


def of_two_kinds(a: Meaning, b: Meaning) -> Verdict:
    """None if an answer holds what the target holds, in another kind: (0, 1) for 0, 1; else False."""
    if isinstance(a, Words) or isinstance(b, Words):
        is_empty = [] in (items_of(a), items_of(b))  # no solution, and the empty set
        return None if is_empty else False
    if isinstance(a, Many) and isinstance(b, Many):
        return None if same_items(a.items, b.items) is not False else False
    kinds = {kind_of(a), kind_of(b)}
    if "union" in kinds:
        return False if "value" in kinds else None  # [0, 1] and [1, 2] together are [0, 2]
    for one, other in ((a, b), (b, a)):
        if isinstance(one, Many) and one.items and not isinstance(other, Many):
            each = every(alike(item, other) for item in one.items[:MOST_ITEMS])
            if each is not False:
                return None  # {5}, and 5
    if "set" in kinds and "value" not in kinds:
        return False  # the order of a tuple means something, that of a set does not
    if "ratio" in kinds and "value" in kinds:
        return None  # 7:32 may be the quotient, or a time
    items, others = items_of(a), items_of(b)
    if len(items) != len(others):
        return False
    in_order = every(map(alike, items, others))
    if in_order is False and kind_of(b) == "list" and len(items) <= MOST_ITEMS and not named(b):
        in_order = same_items(items, others)
    return None if in_order is not False else False


def kind_of(meant: Meaning) -> str:
    """The kind of a set, a list, a tuple and so on; "value" for a number."""
    return meant.kind if isinstance(meant, Many | Ordered) else "value"


def items_of(meant: Meaning) -> list[Meaning]:
    """The items of a set, a tuple or a matrix; of an assignment to names, b = 6, a = 5, in the order of these."""
    if isinstance(meant, Ordered):
        if meant.kind == "matrix":
            return [cell for row in meant.items for cell in items_of(row)]
        return meant.items
    if isinstance(meant, Many):
        return [item for _, item in sorted(named(meant).items())] or meant.items
    return [meant]


def named(meant: Meaning) -> dict[str, Meaning]:
    """The items of a list of equations by their left sides, which all differ; {} of anything else."""
    items = meant.items if isinstance(meant, Many) else []
    by_name: dict[str, Meaning] = {item.left: item for item in items if isinstance(item, Relation)}
    return by_name if len(by_name) == len(items) else {}


def same_value(a: Value, b: Value) -> bool:
    """Equal numbers, in the same unit or one without; 50% is 0.5, and also 50 if only one side says percent."""
    one, two = sorted((a.unit, b.unit))
    is_degree = one == "degree" and two.startswith(one)  # 20 degrees are 20 degrees C
    if one and one != two and not is_degree:
        return False
    if equal(a.numbers, b.numbers) or is_rounded(a, b) or is_rounded(b, a):
        return True
    if a.unit == "%" != b.unit:
        return equal(a.numbers, [100 * x for x in b.numbers])
    if b.unit == "%" != a.unit:
        return equal(b.numbers, [100 * x for x in a.numbers])
    return False


def is_rounded(a: Value, b: Value) -> bool:
    """Whether a is b as a computer prints it."""
    if a.half_step is None or b.half_step is not None:
        return False
    half_step = a.half_step
    return all(abs(x - y) <= half_step for x, y in zip(a.numbers, b.numbers, strict=True))


def stated(answer: Relation, target: Meaning) -> Verdict:
    """Whether an answer in the form `x = ...` or `m + n = ...` states the target, which is no relation."""
    left, sign, right = answer.left, answer.sign, answer.right
    if sign != "=":
        return False if isinstance(target, Value) else None
    if NAME.fullmatch(left):
        return alike(meaning(right), target)
    if NAME.fullmatch(right):
        return alike(meaning(left), target)
    value, other_value = constant_value(left), constant_value(right)
    if value and other_value:
        return alike(meaning(right), target) if equal(value, other_value) else None
    if value:  # 293 = m + n
        left, right = right, left
    is_number = not isinstance(target, Value) or constant(target.numbers)
    stated_value = meaning(right)
    if not is_number or isinstance(stated_value, Value) and not constant(stated_value.numbers):
        return None  # an equation between two expressions
    return alike(stated_value, target)


def asked(answer: Meaning, target: Relation) -> Verdict:
    """Whether an answer that is no relation is the right side of the target `x = ...`."""
    left, sign, right = target.left, target.sign, target.right
    if sign != "=":
        return False if isinstance(answer, Value) else None
    if NAME.fullmatch(left):
        return alike(answer, meaning(right))
    if NAME.fullmatch(right):
        return alike(answer, meaning(left))
    if not isinstance(answer, Value):
        return None
    if re.search(r"(?<![\\a-zA-Z])[xyz](?![a-zA-Z])", left) and not constant_value(left):
        return False  # the equation of a line, or of another curve
    found = alike(answer, meaning(right))
    return None if found else found


def same_relation(a: Relation, b: Relation) -> Verdict:
    """Whether a relation, all on its left side, is the other times a number; a negative one reverses inequalities.

    If that side is the same at all points, as in 0 = 0 and x = x, its ratio proves nothing: each side is compared.
    """
    is_same_name = NAME.fullmatch(a.left) and without_blanks(a.left) == without_blanks(b.left)
    if is_same_name and a.sign == b.sign:
        return alike(meaning(a.right), meaning(b.right))
    left, right = values_at_points(a.left), values_at_points(a.right)
    other_left, other_right = values_at_points(b.left), values_at_points(b.right)
    reversed_sign = b.sign.translate(str.maketrans("<>", "><"))
    differences = list(differences_of(left, right))
    other_differences = list(differences_of(other_left, other_right))
    if constant(differences) or constant(other_differences):
        if a.sign == b.sign and equal(left, other_left) and equal(right, other_right):
            return True
        return a.sign == reversed_sign and equal(left, other_right) and equal(right, other_left)
    ratios = [x / y for x, y in zip(differences, other_differences, strict=True)]
    expected_sign = b.sign if ratios[0].real > 0 else reversed_sign
    return a.sign == expected_sign and constant(ratios)


def differences_of(left: list[Number], right: list[Number]) -> Iterator[Number]:
    """What is left of two sides when all is on the left."""
    return (x - y for x, y in zip(left, right, strict=True))


def constant(values: list[Number]) -> bool:
    """Whether values at points are all the same."""
    return equal(values, values[:1] * len(values))
