r"""Whether two answers in LaTeX are equal, as far as arithmetic can tell: True, False, or None if it cannot read them.

LaTeX is first tidied, then read as a meaning: a number with its unit, a tuple or an interval, a set, a union, a matrix,
a relation, or words. Meanings are compared part by part, with the arithmetic of expression.py: 3.2 is not 3.9, and
0.333 is not 1/3. If only one side names its unit, its base or `x =`, the rest decides: 52 equals 52_8, but 42 does not.
"""

import re
from pathlib import Path

from .expression import equal, values_at_points

LONGEST, MOST_ITEMS = (
    2000,
    50,
)  # characters of an answer, items of a set; no answer of MATH comes near either
SPELLINGS = Path(__file__).with_name("spellings.txt").read_text(encoding="utf-8").splitlines()
REPLACED = [
    (re.compile(line.split("`")[1]), line.split("`")[3])
    for line in SPELLINGS
    if line.startswith("`")
]
REPEATING = re.compile(r"(\d*)\.(\d*)\\(?:overline|bar)\s*\{(\d+)\}")  # 0.1\overline{6}
THOUSANDS = re.compile(
    r"(?:\w\s*=)?\s*-?\d{1,3}([, ])\d{3}(?:\1\d{3})*(?! ?[\d,])"
)  # 12,000 or x = 12 000
SCIENTIFIC = re.compile(r"(?<![\w.])(\d+\.?\d*|\.\d+)[eE]([-+]?\d+)(?![\w.])")  # 1e-5
MATRIX = re.compile(r"\\begin\{([pb]matrix)\}(.*)\\end\{\1\}", re.DOTALL)
WORDS = re.compile(r"""(?=.*"|.*[a-z]{4}|(?:yes|no|odd)$)[a-z"\s.,:;'!?()-]+""", re.I)
# A number, then its unit: a percent sign, text in quotation marks, or plain letters; and the unit's power
UNIT = re.compile(
    r"""(.*[^\s"])\s*(?:(%)|"([^"]*)"|(?<=[\d)}])(?:\s+|(?=[ckm]m\b|kg\b))([a-z]{2,}[a-z. /]*))"""
    r"\s*(\^\{[23]\})?",
    re.DOTALL | re.I,
)
# Words after which a number is another, or no number: no unit
CHANGING = re.compile(
    r"[^a-z]*[\d!\\]|[eixyz]$|(squared|cubed|factorial|plus|minus|is|pi)\b|.*\b("
    r"hundred|thousand|(m|b|tr)illion|dozen|half|halve|third|(four|fif|six|seven|eigh|nin|ten)th|"
    r"and|or|more|less|least|most|not)(th)?s?\b",
    re.DOTALL,
)
UNITS = [line.split()[1:] for line in SPELLINGS if line.startswith("unit ")]
SHORT, KNOWN = (
    {unit[0]: unit[-1] for unit in UNITS},
    {name for unit in UNITS for name in unit},
)  # without s
NAME = re.compile(
    r"([a-zA-Z]|(?:\\frac|\\abs|[{}/]|[A-Z]{2,3})+|\\(alpha|beta|gamma|theta|lambda|omega|phi|mu))"
    r"(_\{?\w\}?)?(\(([a-zA-Z]|-?\d+)\))?"
)  # x, AB, |AB|, x_1, f(x), f(2)


def tidy(text):
    r"""The same mathematics in fewer spellings; the content of \text{} is put in quotation marks."""
    for pattern, replacement in REPLACED:
        text = pattern.sub(replacement, text)
    text = REPEATING.sub(
        lambda m: f"({m[1] or 0}.{m[2] or 0}+{m[3]}/{'9' * len(m[3])}{'0' * len(m[2])})", text
    )
    return (
        THOUSANDS.sub(lambda m: re.sub("[, ]", "", m[0]), text, count=1)
        if THOUSANDS.match(text)
        else text
    )


def split(text, *separators):
    """A text split at the separators outside of all brackets, and these separators: [part, separator, part, ...].

    Raises ValueError if brackets do not match, or are nested more than 30 deep.
    """
    parts, depth, start = [], 0, 0
    for match in re.finditer(
        "|".join(map(re.escape, separators)) + r"|\\(?:begin|end)\b|[{}()\[\]]", text
    ):
        if match[0] not in separators:
            depth += 1 if match[0] in (r"\begin", "{", "(", "[") else -1
            if not 0 <= depth <= 30:
                raise ValueError("brackets that do not match")
        elif depth == 0:
            parts += [text[start : match.start()].strip(), match[0]]
            start = match.end()
    return parts + [text[start:].strip()]


def members(text, separator=","):
    """The parts of a list that are not empty; one with ± in it becomes two, with more than one a ValueError."""
    parts = list(filter(None, split(text, separator)[::2]))
    if any(part.count("±") > 1 for part in parts):
        raise ValueError("signs that may be the same or not")
    return [part.replace("±", sign) for part in parts for sign in ("+-" if "±" in part else "+")]


def meaning(text):
    """What a tidied text means, as a tuple that begins with its kind; ValueError or ArithmeticError if unreadable:

    ("set", meanings), ("union", meanings)
    ("ordered", brackets, meanings)  a tuple, an interval; a row of a matrix, a matrix (brackets: "row", "matrix")
    ("relation", left, sign, right)  its two sides as texts
    ("words", list of words)  or a number that words change, as in 3 million
    ("value", values at the points of expression.py, unit)
    """
    if text.startswith(r"\{") and text.endswith(r"\}"):
        return "set", [meaning(part) for part in members(text[2:-2])]
    for separator, kind in (",", "set"), (r"\cup", "union"):
        if len(parts := members(text, separator)) > 1:
            return kind, [meaning(part) for part in parts]
    match split(text, "<=", ">=", "<", ">", "=", "≠"):
        case low, ("<" | "<=") as above, name, ("<" | "<=") as below, high if NAME.fullmatch(name):
            brackets = ("[" if above == "<=" else "(") + ("]" if below == "<=" else ")")
            return "ordered", brackets, [meaning(low), meaning(high)]
        case left, sign, right:
            return "relation", left, sign, right
    if brackets := re.fullmatch(r"([(\[])(.*,.*)([)\]])", text, re.DOTALL):
        return (
            "ordered",
            brackets[1] + brackets[3],
            [meaning(part) for part in split(brackets[2], ",")[::2]],
        )
    if matrix := MATRIX.fullmatch(text):
        rows = [split(row, "&")[::2] for row in split(matrix[2], "\\\\")[::2] if row]
        return (
            "ordered",
            "matrix",
            [("ordered", "row", [meaning(cell) for cell in row]) for row in rows],
        )
    text = re.sub(r'^"\s*\(?([a-zA-Z])\)?\s*"$', r"\1", text)  # one letter in \text{} is a variable
    if WORDS.fullmatch(text):
        return "words", re.findall(r"[a-z']+|[-()!]", text.lower())
    return quantity(text)


def quantity(text):
    """The meaning of a text that is a value with or without a unit; words if they change the number."""
    if measure := UNIT.fullmatch(text):
        number, percent, quoted, plain, power = measure.groups(default="")
        if CHANGING.match((quoted or plain).strip().lower()):
            return "words", text.split()
        if set(re.findall(r"[a-z]+?(?=s?\b)", plain.lower())) <= KNOWN:  # other letters are factors
            return "value", values_at_points(number), unit_of(percent or quoted or plain, power)
    return "value", values_at_points(text), ""


def unit_of(name, exponent):
    """One spelling for a unit: square centimeters, sq cm and cm^2 become "cm^{2}"."""
    name = name.strip().lower()
    exponent = "^{2}" if name.startswith("sq") else "^{3}" if name.startswith("cubic") else exponent
    name = re.sub(r"^(sq(uare)?|cubic)\b|[.\s]|(?<=\w\w)s$", "", name)
    return SHORT.get(name, name) + exponent


def alike(a, b):
    """Whether two meanings are the same; ValueError or ArithmeticError if that cannot be told."""
    if (a[0] == "relation") != (b[0] == "relation"):
        a, b = without_name(a, b), without_name(b, a)
    match a, b:
        case ("words", words), ("words", others):
            return words == others
        case ("value", values, unit), ("value", others, other_unit):
            return same_value(values, unit, others, other_unit)
        case ("relation", *_), ("relation", *_):
            return same_relation(a, b)
        case ("ordered", brackets, items), ("ordered", other_brackets, others):
            return (
                brackets == other_brackets
                and len(items) == len(others)
                and all(map(alike, items, others))
            )
        case (kind, items), (other_kind, others) if (
            kind == other_kind
        ):  # sets or unions: each item is among the others
            if max(len(items), len(others)) > MOST_ITEMS:
                raise ValueError("too many items")
            return all(any(alike(item, other) for other in others) for item in items) and all(
                any(alike(item, other) for item in items) for other in others
            )
    return False


def same_value(values, unit, others, other_unit):
    """Equal numbers, in the same unit or one without; 50% is 0.5, and also 50 if only one side says percent."""
    one, two = sorted((unit, other_unit))
    if (
        one and one != two and not (one == "degree" and two.startswith(one))
    ):  # 20 degrees are 20 degrees C
        return False
    return (
        equal(values, others)
        or unit == "%" != other_unit
        and equal(values, [100 * x for x in others])
        or other_unit == "%" != unit
        and equal(others, [100 * x for x in values])
    )


def without_name(meant, other):
    """The meaning of `...` in a relation `x = ...`, to compare it with an answer that leaves `x =` out."""
    if meant[0] != "relation":
        return meant
    _, left, sign, right = meant
    if sign == "=" and NAME.fullmatch(left):
        return meaning(right)
    if other[0] != "value" or sign == "=" and constant(values_at_points(left)):
        raise ValueError("a relation on one side only")
    return meant  # no value


def same_relation(a, b):
    """Whether a relation, all on its left side, is the other times a number; a negative one reverses inequalities.

    If that side is the same at all points, as in 0 = 0 and x = x, its ratio proves nothing: each side is compared.
    """
    (_, left, sign, right), (_, other_left, other_sign, other_right) = a, b
    v, w, other_v, other_w = map(values_at_points, (left, right, other_left, other_right))
    reversed_sign = other_sign.translate(str.maketrans("<>", "><"))
    differences, others = (
        [x - y for x, y in zip(*sides)] for sides in ((v, w), (other_v, other_w))
    )
    if constant(differences) or constant(others):
        return (
            sign == other_sign
            and equal(v, other_v)
            and equal(w, other_w)
            or sign == reversed_sign
            and equal(v, other_w)
            and equal(w, other_v)
        )
    ratios = [x / y for x, y in zip(differences, others)]
    return sign == (other_sign if ratios[0].real > 0 else reversed_sign) and constant(ratios)


def constant(values):
    """Whether values at points are all the same."""
    return equal(values, values[:1] * len(values))


def same_latex(predicted, target):
    """Whether two answers in LaTeX are equal: True, False, or None if one of them cannot be read."""
    if max(len(predicted), len(target)) > LONGEST:
        return predicted == target
    predicted, target = tidy(predicted), tidy(target)
    if predicted and without_blanks(predicted) == without_blanks(target):
        return True
    read = tuple(SCIENTIFIC.sub(r"(\1*10^{\2})", text) for text in (predicted, target))
    verdicts = [
        verdict(*texts) for texts in {read, (predicted, target)}
    ]  # 5e-5 may also be 5 times e, less 5
    return True in verdicts or (None if None in verdicts else False)


def verdict(predicted, target):
    """Whether two tidied texts mean the same; None if one of them cannot be read."""
    try:
        return alike(meaning(predicted), meaning(target))
    except (ValueError, ArithmeticError, RecursionError):
        return None


def without_blanks(text):
    """A text without quotation marks and blanks, except those between two digits."""
    return re.sub(r"(?<![\d\s])\s+|\s+(?![\d\s])", "", text.replace('"', ""))
