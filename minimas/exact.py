r"""Whether two answers in LaTeX are equal, as far as exact arithmetic can tell: True, False, or None where it cannot read them.

Tidied LaTeX becomes a meaning (a number with its unit, a tuple or interval, a set, a union, a matrix, a relation, words), and
meanings are compared part by part with the arithmetic of algebra.py: 3.2 is not 3.9, and 0.333 not 1/3. Where one side names
its unit, its base or `x =`, and the other leaves it out, the rest decides; 52 is written for 52_8, and 42 is not.
"""

import re
from fractions import Fraction

from . import algebra
from .algebra import Unknown

LONGEST, MOST_ITEMS = 2000, 50  # characters of an answer, parts of a set: none of MATH comes near
REPLACED = [(re.compile(pattern), replacement) for pattern, replacement in (  # in this order
    (r"(?<=\d)(\{,\}|,\\!)\s*(?=\d{3})", ""), (r"\\displaystyle|\\(left|right)(?![a-z])|\\[Bb]igg?[lr]?\b|\\!|\\?\$", ""),
    (r"(?<!\\)\\[,;: ]|~|\\q?quad\b", " "), (r"\\[dtc]frac", r"\\frac"), (r"\\%|\bpercent\b", "%"), (r"[−–]", "-"), ("π", r"\\pi "),
    (r"\^\s*\{?\s*\\circ\s*\}?|°|\\degree\b", " degrees "), (r"\\(cdot|times)\b|[×·]", "*"), (r"\\div\b|÷", "/"), ("∞", r"\\infty "),
    (r"\\(leq?|leqslant)(?![a-z])|≤", "<="), (r"\\(geq?|geqslant)(?![a-z])|≥", ">="), (r"\\lt\b", "<"), (r"\\gt\b", ">"), ("∪", r"\\cup "),
    (r"√\s*(\d+|(?=\())", r"\\sqrt{\1}"), (r"\\emptyset|\\varnothing|∅", r"\\{\\}"), (r"\+\s*\\infty", r"\\infty"),
    (r"\\(?:text|textbf|textit|textrm|mathrm|mathbf|mbox|operatorname)\s*\{([^{}]*)\}", r' "\1" '),
    (r'(?<=[\d)}\]\w])[\s,]*(?:"\s*(?:and|or)\s*"|\b(?:and|or)\b)\s*', ","), (r"^\s*[a-zA-Z]\s*(\\in\b|∈)", ""),
    (r"\\frac\s*(\d)\s*(\d)", r"\\frac{\1}{\2}"), (r"\\frac\s*(\d)\s*\{", r"\\frac{\1}{"), (r"(\\sqrt|\^|_)\s*(\d)", r"\1{\2}"),
    (r"(?<![\d.^_{}])(\d+)\s*\\frac\s*\{(\d+)\}\s*\{?(\d+)\}?", r"(\1+\2/\3)"), (r"(?<![\d.^_])(\d+)\s+(\d+)/(\d+)", r"(\1+\2/\3)"))]
REPEATING = re.compile(r"(\d*)\.(\d*)\\overline\s*\{(\d+)\}")
THOUSANDS = re.compile(r"(?:\w\s*=)?\s*-?\d{1,3}(?:,\d{3})+(?![\d,])")
MATRIX = re.compile(r"\\begin\{([pb]matrix)\}(.*)\\end\{\1\}", re.DOTALL)
UNIT = re.compile(r"""(.*[^\s"])\s*(?:(%)|"([^"]*)"|(?<=[\d)}])(?:\s+|(?=[ckm]m\b|kg\b))([a-z]{2,}[a-z. /]*))\s*(\^\{[23]\})?""", re.DOTALL | re.I)
SHORT = {"centimeter": "cm", "meter": "m", "kilometer": "km", "inche": "in", "inch": "in", "feet": "ft", "foot": "ft", "hour": "h",
         "hr": "h", "minute": "min", "second": "s", "sec": "s", "mile": "mi", "gram": "g", "kilogram": "kg", "degree": "", "dollar": ""}
NAME = re.compile(r"[a-zA-Z](_\{?\w\}?)?(\([a-zA-Z]\))?")


def repeating(match):
    r"""0.1\overline{6} as a fraction."""
    once = Fraction(f"{match[1] or 0}.{match[2] or 0}")
    value = once + Fraction(int(match[3]), 10 ** len(match[2]) * (10 ** len(match[3]) - 1))
    return f"({value.numerator}/{value.denominator})"


def tidy(text):
    """The same mathematics in fewer spellings; what stood in \\text{} stands in quotation marks."""
    for pattern, replacement in REPLACED:
        text = pattern.sub(replacement, text)
    text = REPEATING.sub(repeating, text).strip().rstrip(".").strip()
    return THOUSANDS.sub(lambda m: m[0].replace(",", ""), text, count=1) if THOUSANDS.match(text) else text


def split(text, *separators):
    """What stands between separators, as far as they are outside of all brackets; with the separators, in turn."""
    parts, depth, start = [], 0, 0
    for match in re.finditer("|".join(map(re.escape, separators)) + r"|\\(?:begin|end)\b|[{}()\[\]]", text):
        if match[0] in separators:
            if depth == 0:
                parts += [text[start:match.start()].strip(), match[0]]
                start = match.end()
        else:
            depth += 1 if match[0] in (r"\begin", "{", "(", "[") else -1
            if depth < 0 or depth > 30:
                raise Unknown("brackets that do not match")
    return parts + [text[start:].strip()]


def meaning(text):
    """("words", ...), ("value", ..., unit), ("ordered", brackets, items), ("set", items), ("union", items) or ("relation", left, sign, right)."""
    text = text.strip()
    for separator, kind in (r"\cup", "union"), (",", "set"):
        if len(parts := split(text, separator)[::2]) > 1:
            return kind, [meaning(part) for both in parts for part in signs(both)]
    if len(parts := split(text, "<=", ">=", "<", ">", "=")) == 5 and NAME.fullmatch(parts[2]) and {parts[1], parts[3]} <= {"<", "<="}:
        return "ordered", "(["[parts[1] == "<="] + ")]"[parts[3] == "<="], [meaning(parts[0]), meaning(parts[4])]  # an interval
    if len(parts) > 1:
        relations = [("relation", *parts[i:i + 3]) for i in range(0, len(parts) - 2, 2)]
        return relations[0] if len(relations) == 1 else ("ordered", "chain", relations)
    if text.startswith(r"\{") and text.endswith(r"\}"):
        inner = text[2:-2].strip()
        return "set", [meaning(part) for both in split(inner, ",")[::2] for part in signs(both)] if inner else []
    if brackets := re.fullmatch(r"([(\[])(.*,.*)([)\]])", text, re.DOTALL):
        return "ordered", brackets[1] + brackets[3], [meaning(part) for part in split(brackets[2], ",")[::2]]
    if matrix := MATRIX.fullmatch(text):
        rows = [split(row, "&")[::2] for row in split(matrix[2], "\\\\")[::2] if row]
        return "ordered", "matrix", [("ordered", "row", [meaning(cell) for cell in row]) for row in rows]
    if r"\pm" in text:
        return "set", [meaning(part) for part in signs(text)]
    return words_or_value(text)


def signs(text):
    return [text.replace(r"\pm", sign) for sign in "+-"] if r"\pm" in text else [text]


def words_or_value(text):
    text = re.sub(r'^"\s*\(?([a-zA-Z])\)?\s*"$', r"\1", text)
    if re.fullmatch(r"[a-z\"\s.,:;'!?()-]+", text, re.I) and (re.search(r'"|[a-z]{4}', text, re.I) or text.lower() in ("yes", "no", "odd")):
        return "words", " ".join(re.findall(r"[a-z']+", text.lower()))
    if match := UNIT.fullmatch(text):
        return "value", algebra.read(match[1]), unit(match[2] or match[3] or match[4], match[5] or "")
    if based := re.fullmatch(r"(\d+)_\{(\d+)\}", text, re.ASCII):
        return "value", algebra.read(based[1]), "base " + based[2]
    return "value", algebra.read(text), ""


def unit(name, exponent):
    """One spelling for a unit: square centimeters, sq cm and cm^2 are "cm^{2}"; degrees and dollars are none."""
    name = re.sub(r"[.\s]", "", name.lower())
    for word, e in ("square", "^{2}"), ("sq", "^{2}"), ("cubic", "^{3}"):
        if name.startswith(word):
            name, exponent = name.removeprefix(word), e
    name = name[:-1] if len(name) > 2 and name.endswith("s") else name
    return SHORT.get(name, name) + exponent


def alike(a, b):
    """Whether two meanings are the same; Unknown where that is beyond this module."""
    if (a[0] == "relation") != (b[0] == "relation"):
        a, b = (unnamed(x) if x[0] == "relation" else x for x in (a, b))
    if a[0] != b[0]:
        return False
    if a[0] == "words":
        return a[1] == b[1]
    if a[0] == "value":
        return same_value(a[1:], b[1:])
    if a[0] == "relation":
        return relation(*a[1:]) == relation(*b[1:])
    if a[0] == "ordered":
        return a[1] == b[1] and len(a[2]) == len(b[2]) and all(map(alike, a[2], b[2]))
    if max(len(a[1]), len(b[1])) > MOST_ITEMS:
        raise Unknown("too many items")
    return all(any(alike(x, y) for y in b[1]) for x in a[1]) and all(any(alike(x, y) for x in a[1]) for y in b[1])


def same_value(a, b):
    """Equal numbers, in the same unit or one without; 50% is 50 where only one says percent, and 0.5."""
    (v, of_v), (w, of_w) = a, b
    if of_v and of_w and of_v != of_w:
        return False
    if algebra.equal(v, w):
        return True
    hundred = algebra.read("100")
    return of_v != of_w and (of_v == "%" and algebra.equal(v, algebra.multiply(w, hundred)) or
                             of_w == "%" and algebra.equal(w, algebra.multiply(v, hundred)))


def unnamed(relation_):
    """The right side of `x = ...`, for comparison with an answer that leaves `x =` out."""
    _, left, sign, right = relation_
    if sign != "=" or not NAME.fullmatch(left):
        raise Unknown("a relation on one side only")
    return meaning(right)


def relation(left, sign, right):
    """A relation as a sum that is 0, not below 0 or above 0, with a leading coefficient of 1 or -1; or its name and structure."""
    if sign in ("<", "<="):
        left, sign, right = right, {"<": ">", "<=": ">="}[sign], left
    over, under = algebra.plus(algebra.read(left), algebra.read(right), -1)
    scale = algebra.rational((under, algebra.ONE))
    leading = over[max(over, key=lambda product: sorted(map(str, product)))] / scale if over else Fraction(1)
    leading = leading if sign == "=" else abs(leading)
    return sign, {product: c / scale / leading for product, c in over.items()}


def same_exactly(found, gold):
    """True or False where exact comparison can tell, None where it cannot read the two."""
    if max(len(found), len(gold)) > LONGEST:
        return found == gold
    found, gold = tidy(found), tidy(gold)
    if found and re.sub(r'"|(?<!\d)\s+|\s+(?!\d)', "", found) == re.sub(r'"|(?<!\d)\s+|\s+(?!\d)', "", gold):
        return True
    try:
        return alike(meaning(found), meaning(gold))
    except Unknown:
        return None
