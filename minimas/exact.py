r"""Whether two answers in LaTeX are equal, as far as arithmetic can tell: True, False, or None where it cannot read them.

Tidied LaTeX becomes a meaning (a value with its unit, a tuple or interval, a set, a union, a matrix, a relation, words), and
meanings are compared part by part with the arithmetic of expression.py: 3.2 is not 3.9, and 0.333 not 1/3. Where one side names
its unit, its base or `x =`, and the other leaves it out, the rest decides; 52 is written for 52_8, and 42 is not.
"""

import re

from .expression import equal, values

LONGEST, MOST_ITEMS = 2000, 50  # characters of an answer, parts of a set: none of MATH comes near
REPLACED = [(re.compile(pattern), replacement) for pattern, replacement in (  # in this order
    (r"(?<=\d)(\{,\}|,\\!)\s*(?=\d{3})", ""), (r"\\displaystyle|\\(left|right)(?![a-z])|\\[Bb]igg?[lr]?\b|\\!|\\?\$", ""),
    (r"(?<!\\)\\[,;: ]|~|\\q?quad\b", " "), (r"\\[dtc](?=frac|binom)", r"\\"), (r"\\%|\bpercent\b", "%"), (r"[−–]", "-"),
    (r"\^\s*\{?\s*\\circ\s*\}?|°|\\degree\b", " degrees "), (r"\\(cdot|times)\b|[×·]", "*"), (r"\\div\b|÷", "/"),
    (r"(\\(?:sin|cos|tan|cot)[ {(]*[\d.]+) degrees", r"\1\\deg"), (r"\\[lr]?vert\b", "|"), (r"\|([^|]*)\|", r"\\abs{\1}"),
    ("π", r"\\pi "), ("∞", r"\\infty "), ("∪", r"\\cup "), (r"\\lt\b", "<"), (r"\\gt\b", ">"), (r"\\neq?(?![a-z])", "≠"),
    (r"\\(leq?|leqslant)(?![a-z])|≤", "<="), (r"\\(geq?|geqslant)(?![a-z])|≥", ">="), (r"\+\s*\\infty", r"\\infty"),
    (r"√\s*(\d+|(?=\())", r"\\sqrt{\1}"), (r"\\emptyset|\\varnothing|∅", r"\\{\\}"), (r"^\s*[a-zA-Z]\s*(\\in\b|∈)", ""),
    (r"\\(?:text|textbf|textit|textrm|mathrm|mathbf|mbox|operatorname)\s*\{([^{}]*)\}", r' "\1" '),
    (r'(?<=[\d)}\]\w])[\s,]*(?:"\s*(?:and|or)\s*"|\b(?:and|or)\b)\s*', ","), (r"(\\frac|\\sqrt|\^|_)\s*(\d)", r"\1{\2}"),
    (r"(\\frac\{\d\})\s*(\d)", r"\1{\2}"), (r"(?<![\d.^_{}])(\d+)\s*\\frac\s*\{(\d+)\}\s*\{?(\d+)\}?", r"(\1+\2/\3)"),
    (r"(?<![\d.^_])(\d+)\s+(\d+)/(\d+)", r"(\1+\2/\3)"), (r"^\s+|[\s.]+$", ""), (r"^(\d+)_\{(\d+)\}$", r'\1 "base \2"'))]
REPEATING = re.compile(r"(\d*)\.(\d*)\\overline\s*\{(\d+)\}")
THOUSANDS = re.compile(r"(?:\w\s*=)?\s*-?\d{1,3}(?:,\d{3})+(?![\d,])")
MATRIX = re.compile(r"\\begin\{([pb]matrix)\}(.*)\\end\{\1\}", re.DOTALL)
WORDS = re.compile(r"""(?=.*"|.*[a-z]{4}|(?:yes|no|odd)$)[a-z"\s.,:;'!?()-]+""", re.I)
UNIT = re.compile(r"""(.*[^\s"])\s*(?:(%)|"([^"]*)"|(?<=[\d)}])(?:\s+|(?=[ckm]m\b|kg\b))([a-z]{2,}[a-z. /]*))"""
                  r"\s*(\^\{[23]\})?", re.DOTALL | re.I)
SHORT = {"centimeter": "cm", "meter": "m", "kilometer": "km", "inche": "in", "inch": "in", "feet": "ft", "foot": "ft", "hr": "h",
         "hour": "h", "minute": "min", "second": "s", "sec": "s", "mile": "mi", "gram": "g", "kilogram": "kg"}
NAME = re.compile(r"[a-zA-Z](_\{?\w\}?)?(\([a-zA-Z]\))?")


def tidy(text):
    """The same mathematics in fewer spellings; what stood in \\text{} stands in quotation marks."""
    for pattern, replacement in REPLACED:
        text = pattern.sub(replacement, text)
    text = REPEATING.sub(lambda m: f"({m[1] or 0}.{m[2] or 0}+{m[3]}/{'9' * len(m[3])}{'0' * len(m[2])})", text)
    return THOUSANDS.sub(lambda m: m[0].replace(",", ""), text, count=1) if THOUSANDS.match(text) else text


def split(text, *separators):
    """What stands between separators, as far as they are outside of all brackets; with the separators, in turn."""
    parts, depth, start = [], 0, 0
    for match in re.finditer("|".join(map(re.escape, separators)) + r"|\\(?:begin|end)\b|[{}()\[\]]", text):
        if match[0] not in separators:
            depth += 1 if match[0] in (r"\begin", "{", "(", "[") else -1
            if not 0 <= depth <= 30:
                raise ValueError("brackets that do not match")
        elif depth == 0:
            parts += [text[start:match.start()].strip(), match[0]]
            start = match.end()
    return parts + [text[start:].strip()]


def members(text, separator=","):
    """The parts of a list, one with a plus or minus in it as two."""
    parts = filter(None, split(text, separator)[::2])
    return [part.replace(r"\pm", sign) for part in parts for sign in ("+-" if r"\pm" in part else "+")]


def meaning(text):
    """("words", ...), ("value", ..., unit), ("ordered", kind, items), ("set", items), ("union", items), ("relation", ...)."""
    if text.startswith(r"\{") and text.endswith(r"\}"):
        return "set", [meaning(part) for part in members(text[2:-2])]
    for separator, kind in (",", "set"), (r"\cup", "union"):
        if len(parts := members(text, separator)) > 1:
            return kind, [meaning(part) for part in parts]
    parts = split(text, "<=", ">=", "<", ">", "=", "≠")
    if len(parts) == 5 and NAME.fullmatch(parts[2]) and {parts[1], parts[3]} <= {"<", "<="}:
        return "ordered", "(["[parts[1] == "<="] + ")]"[parts[3] == "<="], [meaning(parts[0]), meaning(parts[4])]  # an interval
    if len(parts) == 3:
        return "relation", *parts
    if brackets := re.fullmatch(r"([(\[])(.*,.*)([)\]])", text, re.DOTALL):
        return "ordered", brackets[1] + brackets[3], [meaning(part) for part in split(brackets[2], ",")[::2]]
    if matrix := MATRIX.fullmatch(text):
        rows = [split(row, "&")[::2] for row in split(matrix[2], "\\\\")[::2] if row]
        return "ordered", "matrix", [("ordered", "row", [meaning(cell) for cell in row]) for row in rows]
    text = re.sub(r'^"\s*\(?([a-zA-Z])\)?\s*"$', r"\1", text)
    if WORDS.fullmatch(text):
        return "words", re.findall(r"[a-z']+", text.lower())
    if match := UNIT.fullmatch(text):
        return "value", values(match[1]), unit(match[2] or match[3] or match[4], match[5] or "")
    return "value", values(text), ""


def unit(name, exponent):
    """One spelling for a unit: square centimeters, sq cm and cm^2 are "cm^{2}"; degrees and dollars are none."""
    name = name.strip().lower()
    exponent = "^{2}" if name.startswith("sq") else "^{3}" if name.startswith("cubic") else exponent
    name = re.sub(r"^(sq(uare)?|cubic)\b|[.\s]|(?<=\w\w)s$|^(degree|dollar)s?$", "", name)
    return SHORT.get(name, name) + exponent


def alike(a, b):
    """Whether two meanings are the same."""
    if (a[0] == "relation") != (b[0] == "relation"):
        a, b = unnamed(a), unnamed(b)
    if a[0] != b[0] or a[0] == "words":
        return a == b
    if a[0] == "value":
        return same_value(*a[1:], *b[1:])
    if a[0] == "relation":
        return same_relation(a, b)
    if a[0] == "ordered":
        return a[1] == b[1] and len(a[2]) == len(b[2]) and all(map(alike, a[2], b[2]))
    if max(len(a[1]), len(b[1])) > MOST_ITEMS:
        raise ValueError("too many items")
    return all(any(alike(x, y) for y in b[1]) for x in a[1]) and all(any(alike(x, y) for x in a[1]) for y in b[1])


def same_value(v, of_v, w, of_w):
    """Equal numbers, in the same unit or one without; 50% is 50 where only one says percent, and 0.5."""
    if of_v == of_w or not of_v or not of_w:
        hundred = [[100 * x for x in side] for side in (v, w)]
        return equal(v, w) or of_v != of_w and (of_v == "%" and equal(v, hundred[1]) or of_w == "%" and equal(w, hundred[0]))
    return False


def unnamed(meant):
    """The right side of `x = ...`, for comparison with an answer that leaves `x =` out."""
    if meant[0] != "relation":
        return meant
    if meant[2] != "=" or not NAME.fullmatch(meant[1]):
        raise ValueError("a relation on one side only")
    return meaning(meant[3])


def same_relation(a, b):
    """Whether one, with all on its left side, is the other times a number; a negative one turns an inequality round."""
    sides = map(values, (a[1], a[3], b[1], b[3]))
    ratios = [(left - right) / (left_too - right_too) for left, right, left_too, right_too in zip(*sides)]
    sign = b[2] if ratios[0].real > 0 else b[2].translate(str.maketrans("<>", "><"))
    return a[2] == sign and equal(ratios, ratios[:1] * len(ratios))


def same_exactly(found, gold):
    """True or False where comparison can tell, None where it cannot read the two."""
    if max(len(found), len(gold)) > LONGEST:
        return found == gold
    found, gold = tidy(found), tidy(gold)
    if found and re.sub(r'"|(?<!\d)\s+|\s+(?!\d)', "", found) == re.sub(r'"|(?<!\d)\s+|\s+(?!\d)', "", gold):
        return True
    try:
        return alike(meaning(found), meaning(gold))
    except (ValueError, ArithmeticError, RecursionError):
        return None
