r"""The value of tidied LaTeX at three fixed points: the arithmetic behind latex.py.

Expressions are evaluated as they are read, by precedence climbing. Two of them are called equal if they agree at all
three points. In practice that is equality: the letters stand for random fractions, and a false identity of polynomials
or their quotients fails at all but few points. Rational arithmetic is exact, so 0.333 is not 1/3. With a root, pi, i or
a function, numbers become complex floats, which have to agree to 4e-13. Letters are positive at one point and negative
at another, so sqrt(x^2) is |x|. e and i are the constants, and \log is to base 10.

ValueError, ArithmeticError or RecursionError: a text cannot be read, is too large, or has no value.
"""

import cmath
import math
import re
from fractions import Fraction
from random import Random

# One token is also a function of a number, as f(2): it is no product
TOKEN = re.compile(
    r"\s*(\\[a-zA-Z]+|\d+\.?\d*|\.\d+|[fghFGHP]\((?:[^()a-zA-Z]|\\[a-z]+)+\)|[a-zA-Z](?:_\{\w+\})?"
    r"|[-+*/^(){}\[\]!_])",
    re.ASCII,
)
APART = re.compile(
    r"\d\s+[\d.]|(?<![\\{a-zA-Z])(?!degrees\b)[a-zA-Z]{4}"
)  # 5 6 and words are no products
LONGEST = 400  # characters of a text
MOST_BITS = 5000  # of the numerator or denominator of a power
SMALL = range(
    200
)  # the numbers that may have a factorial; SMALL.index(x) is x as an int, or a ValueError
POINTS = (
    (1, 1),
    (-1, -1),
    (1, -1),
)  # the sign of every second letter of the alphabet, and of the others
NAMES = {
    r"\infty",
    r"\theta",
    r"\alpha",
    r"\beta",
    r"\gamma",
    r"\lambda",
    r"\omega",
    r"\phi",
    r"\mu",
}  # more letters
CONSTANTS = {r"\pi": cmath.pi, "e": cmath.e, "i": 1j, r"\deg": cmath.pi / 180}
FUNCTIONS = {
    r"\sin": lambda x: settled(cmath.sin(x), x),
    r"\cos": lambda x: settled(cmath.cos(x), x),
    r"\tan": lambda x: settled(cmath.tan(x), x),
    r"\cot": lambda x: settled(1 / cmath.tan(x), x),
    r"\arctan": cmath.atan,
    r"\ln": cmath.log,
    r"\log": cmath.log10,
    r"\abs": abs,
}
CLOSING = {"(": ")", "{": "}", "[": "]"}


def settled(value, x):
    """A value computed from x; 0 if it is no more than x's rounding error, as in sin(pi) or sqrt(2)^2 - 2."""
    return Fraction(0) if not isinstance(value, Fraction) and abs(value) < 1e-14 * abs(x) else value


def power(x, e):
    """x to the power e, exact if possible; odd roots of negative numbers are real, other roots the principal ones."""
    if isinstance(x, Fraction) and isinstance(e, Fraction) and e.denominator == 1:
        if max(x.numerator.bit_length(), x.denominator.bit_length()) * abs(e) > MOST_BITS:
            raise ValueError("too large")
        return x ** int(e)
    if isinstance(e, Fraction) and e.denominator % 2 and x.imag == 0 and x.real < 0:
        return power(-x, e) * (-1) ** e.numerator
    return complex(x) ** complex(e)


OPERATORS = {  # token: (how strongly it binds, what it does); the tokens that end an expression bind least
    "+": (1, lambda x, y: settled(x + y, x)),
    "-": (1, lambda x, y: settled(x - y, x)),
    "*": (2, lambda x, y: x * y),
    "/": (2, lambda x, y: x / y),
    "^": (4, power),
    "!": (4, lambda x: Fraction(math.factorial(SMALL.index(x)))),
    **dict.fromkeys(["", *")}]"], (0, None)),
}


def climb(tokens, point, least=1):
    """The value of the next expression whose operators bind with strength `least` or more.

    `tokens` are in reverse, and what is read is taken off the end. `point` is an index into POINTS.
    """
    value = atom(tokens, point)
    while (rule := OPERATORS.get(tokens[-1], OPERATORS["*"]))[0] >= least:
        sign = tokens.pop() if tokens[-1] in OPERATORS else "*"  # 2x is 2 * x
        operand = [] if sign == "!" else [climb(tokens, point, rule[0] + 1)]
        value = rule[1](value, *operand)
    return value


def atom(tokens, point):
    """The value of the next number, letter or bracket, or of a sign or function with what it applies to."""
    token = tokens.pop()
    if token in CLOSING:
        value = climb(tokens, point)
        if tokens.pop() == CLOSING[token]:
            return value
    if token in ("+", "-"):
        return climb(tokens, point, 3) * (-1 if token == "-" else 1)
    if token[:1] in (".", *"0123456789"):
        return Fraction(token)
    if token in CONSTANTS:
        return CONSTANTS[token]
    if token == r"\sqrt":
        degree = atom(tokens, point) if tokens[-1] == "[" else Fraction(2)
        return power(atom(tokens, point), 1 / degree)
    if token == r"\frac":
        return atom(tokens, point) / atom(tokens, point)
    if token == r"\binom":
        return Fraction(
            math.comb(SMALL.index(atom(tokens, point)), SMALL.index(atom(tokens, point)))
        )
    if token in FUNCTIONS:
        return applied(token, tokens, point)
    if token[:1].isalpha() or token in NAMES:
        return Fraction(
            POINTS[point][ord(token[-1]) % 2] * Random(f"{token} {point}").randint(300, 3000), 997
        )
    raise ValueError(f"{token} is not arithmetic")


def applied(name, tokens, point):
    r"""A function of the bracket that follows, or else of a product up to the next function, as in \sin 2x\cos x."""
    base = tokens.pop() and atom(tokens, point) if tokens[-1] == "_" else None  # \log_2
    bracketed = tokens[-1] in CLOSING
    argument = atom(tokens, point) if bracketed else climb(tokens, point, 3)
    while not bracketed and tokens[-1] not in OPERATORS and tokens[-1] not in FUNCTIONS:
        argument *= climb(tokens, point, 3)
    return (
        FUNCTIONS[name](argument)
        if base is None
        else FUNCTIONS[name](argument) / FUNCTIONS[name](base)
    )


def values_at_points(text):
    """The values of an expression at the three points: Fractions, or complex floats."""
    if len(text) > LONGEST or TOKEN.sub("", text).strip() or APART.search(text):
        raise ValueError("not arithmetic, or too long")
    values = []
    for point in range(len(POINTS)):
        tokens = ["", *reversed(TOKEN.findall(text))]  # "" is the end
        value = climb(tokens, point)
        if tokens != [""] or not (isinstance(value, Fraction) or cmath.isfinite(value)):
            raise ValueError("some tokens are left over, or the value is too large")
        values.append(value)
    return values


def equal(v, w):
    """Whether two lists of values are the same: exactly if they are Fractions, else to 4e-13."""
    return all(
        x == y
        or not (isinstance(x, Fraction) and isinstance(y, Fraction))
        and cmath.isclose(x, y, rel_tol=4e-13)
        for x, y in zip(v, w)
    )
