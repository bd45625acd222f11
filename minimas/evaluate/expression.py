r"""The value of tidied LaTeX at three fixed points: the arithmetic behind latex.py.

Expressions are evaluated as they are read, by precedence climbing. Two of them are called equal if they agree at all
three points. In practice that is equality: the letters stand for random fractions, and a false identity of polynomials
or their quotients fails at all but few points. Rational arithmetic is exact, so 0.333 is not 1/3. With a root, pi, i or
a function, numbers become complex floats, which have to agree to 4e-13. Letters are positive at the first point and
negative at another, so sqrt(x^2) is |x|. Limit: an identity of positive letters, as ln(xy) = ln x + ln y, holds at the
first point only. e and i are the constants, and \log is to base 10.

ValueError, ArithmeticError or RecursionError: a text cannot be read, is too large, or has no value.
"""

import cmath
import math
import re
from collections.abc import Callable, Sequence
from fractions import Fraction
from random import Random
from typing import Any

# Real or complex. Fractions mix with floats as numbers do, which their type hints do not say.
Number = Any

# One token is also a function of a number, as f(2): it is no product
TOKEN = re.compile(
    r"""\s*(
        \\[a-zA-Z]+
        | \d+\.?\d* | \.\d+
        | [fghFGHP]\((?:[^()a-zA-Z]|\\[a-z]+)+\)
        | [a-zA-Z](?:_\{\w+\})?
        | [-+*/^(){}\[\]!_]
    )""",
    re.ASCII | re.VERBOSE,
)
# 5 6 and words are no products
APART = re.compile(r"\d\s+[\d.]|(?<![\\{a-zA-Z])(?!degrees\b)[a-zA-Z]{4}")
LONGEST = 400  # characters of a text
MOST_BITS = 5000  # of the numerator or denominator of a power
SMALL = range(200)  # the numbers that may have a factorial
# The sign of every second letter of the alphabet, and of the others
POINTS = ((1, 1), (-1, -1), (1, -1))
# More letters
NAMES = {
    rf"\{name}"
    for name in ("infty", "theta", "alpha", "beta", "gamma", "lambda", "omega", "phi", "mu")
}
CONSTANTS: dict[str, Number] = {
    r"\pi": cmath.pi,
    "e": cmath.e,
    "i": 1j,
    r"\deg": cmath.pi / 180,
}
FUNCTIONS: dict[str, Callable[[Number], Number]] = {
    r"\sin": lambda x: settled(cmath.sin(x), x),
    r"\cos": lambda x: settled(cmath.cos(x), x),
    r"\tan": lambda x: settled(cmath.tan(x), x),
    r"\cot": lambda x: settled(1 / cmath.tan(x), x),
    r"\sec": lambda x: 1 / cmath.cos(x),
    r"\csc": lambda x: 1 / cmath.sin(x),
    r"\arcsin": cmath.asin,
    r"\arccos": cmath.acos,
    r"\arctan": cmath.atan,
    r"\sinh": cmath.sinh,
    r"\cosh": cmath.cosh,
    r"\tanh": cmath.tanh,
    r"\ln": cmath.log,
    r"\log": cmath.log10,
    r"\abs": abs,
}
CLOSING = {"(": ")", "{": "}", "[": "]"}


def settled(value: Number, x: Number) -> Number:
    """A value computed from x; 0 if it is no more than x's rounding error, as in sin(pi) or sqrt(2)^2 - 2."""
    if not isinstance(value, Fraction) and abs(value) < 1e-14 * abs(x):
        return Fraction(0)
    return value


def small_integer(x: Number) -> int:
    """A number as an int; ValueError if it is none, or too large for a factorial."""
    if x not in SMALL:
        raise ValueError(f"{x} has no factorial that is small")
    return int(x.real)


def power(x: Number, e: Number) -> Number:
    """x to the power e, exact if possible; odd roots of negative numbers are real, other roots the principal ones."""
    if isinstance(x, Fraction) and isinstance(e, Fraction) and e.denominator == 1:
        bits = max(x.numerator.bit_length(), x.denominator.bit_length())
        if bits * abs(e) > MOST_BITS:
            raise ValueError("too large")
        return x ** int(e)
    is_odd_root = isinstance(e, Fraction) and e.denominator % 2 == 1
    if is_odd_root and x.imag == 0 and x.real < 0:
        return power(-x, e) * (-1) ** e.numerator
    return complex(x) ** complex(e)


# How strongly an operator binds; the tokens that end an expression bind least
STRENGTH = {"+": 1, "-": 1, "*": 2, "/": 2, "^": 4, "!": 4, "": 0, ")": 0, "}": 0, "]": 0}
PRODUCT = STRENGTH["*"]
SIGNED = 3  # what a sign or a function without brackets applies to: a product's factor


def combined(sign: str, x: Number, y: Number) -> Number:
    """What an operator makes of two numbers."""
    if sign == "+":
        return settled(x + y, x)
    if sign == "-":
        return settled(x - y, x)
    if sign == "*":
        return x * y
    if sign == "/":
        return x / y
    return power(x, y)


def climb(tokens: list[str], point: int, least: int = 1) -> Number:
    """The value of the next expression whose operators bind with strength `least` or more.

    `tokens` are in reverse, and what is read is taken off the end. `point` is an index into POINTS.
    """
    value = atom(tokens, point)
    while STRENGTH.get(tokens[-1], PRODUCT) >= least:
        sign = tokens.pop() if tokens[-1] in STRENGTH else "*"  # 2x is 2 * x
        if sign == "!":
            value = Fraction(math.factorial(small_integer(value)))
        else:
            value = combined(sign, value, climb(tokens, point, STRENGTH[sign] + 1))
    return value


def atom(tokens: list[str], point: int) -> Number:
    """The value of the next number, letter or bracket, or of a sign or function with what it applies to."""
    token = tokens.pop()
    if token in CLOSING:
        value = climb(tokens, point)
        if tokens.pop() == CLOSING[token]:
            return value
    if token == "+":
        return climb(tokens, point, SIGNED)
    if token == "-":
        return climb(tokens, point, SIGNED) * -1
    if token[:1] == "." or token[:1].isdigit():
        return Fraction(token)
    if token in CONSTANTS:
        return CONSTANTS[token]
    if token == r"\sqrt":
        degree = atom(tokens, point) if tokens[-1] == "[" else Fraction(2)
        return power(atom(tokens, point), 1 / degree)
    if token == r"\frac":
        numerator = atom(tokens, point)
        return numerator / atom(tokens, point)
    if token == r"\binom":
        n = small_integer(atom(tokens, point))
        return Fraction(math.comb(n, small_integer(atom(tokens, point))))
    if token in FUNCTIONS:
        return applied(token, tokens, point)
    if token[:1].isalpha() or token in NAMES:
        sign = POINTS[point][ord(token[-1]) % 2]
        return Fraction(sign * Random(f"{token} {point}").randint(300, 3000), 997)
    raise ValueError(f"{token} is not arithmetic")


def applied(name: str, tokens: list[str], point: int) -> Number:
    r"""A function of the bracket that follows, or else of a product up to the next function, as in \sin 2x\cos x."""
    base = exponent = None
    if tokens[-1] == "_":  # \log_2
        tokens.pop()
        base = atom(tokens, point)
    if tokens[-1] == "^":  # \sin^2 x
        tokens.pop()
        exponent = atom(tokens, point)
        if exponent not in (2, 3, 4):
            raise ValueError("a power of a function may be its inverse")
    bracketed = tokens[-1] in CLOSING
    argument = atom(tokens, point) if bracketed else climb(tokens, point, SIGNED)
    while not bracketed and tokens[-1] not in STRENGTH and tokens[-1] not in FUNCTIONS:
        argument *= climb(tokens, point, SIGNED)
    value = FUNCTIONS[name](argument)
    if base is not None:
        value /= FUNCTIONS[name](base)
    return value if exponent is None else power(value, exponent)


def values_at_points(text: str) -> list[Number]:
    """The values of an expression at the three points: Fractions, or complex floats."""
    if len(text) > LONGEST or TOKEN.sub("", text).strip() or APART.search(text):
        raise ValueError("not arithmetic, or too long")
    values = []
    for point in range(len(POINTS)):
        tokens = ["", *reversed(TOKEN.findall(text))]  # "" is the end
        value = climb(tokens, point)
        if tokens != [""]:
            raise ValueError("some tokens are left over")
        if not isinstance(value, Fraction) and not cmath.isfinite(value):
            raise ValueError("the value is too large")
        values.append(value)
    return values


def equal(v: Sequence[Number], w: Sequence[Number]) -> bool:
    """Whether two lists of values are the same: exactly if they are Fractions, else to 4e-13."""
    return all(map(same_number, v, w))


def same_number(x: Number, y: Number) -> bool:
    """Whether two numbers are the same: exactly if both are Fractions, else to 4e-13."""
    if x == y:
        return True
    both_exact = isinstance(x, Fraction) and isinstance(y, Fraction)
    return not both_exact and cmath.isclose(x, y, rel_tol=4e-13)
