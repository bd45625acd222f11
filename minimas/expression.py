r"""The value of tidied LaTeX at three fixed points: the arithmetic behind exact.py.

Two expressions are called equal when they agree at all three points. That is equality in practice: the letters stand for random
fractions, and an identity of polynomials or their quotients that does not hold fails at all but few points. Where arithmetic
stays rational it is exact, so 0.333 is not 1/3; where a root, pi, i or a function enters, numbers are complex floats, and agree
to 1e-12. Letters are positive at one point and negative at another, so sqrt(x^2) is |x|; e and i are the constants, and \log is
to base 10. ValueError, ArithmeticError and RecursionError say that a text cannot be read, is too large, or has no value.
"""

import cmath
import math
import re
from fractions import Fraction
from random import Random

TOKEN = re.compile(r"\s*(\\[a-zA-Z]+|\d+\.?\d*|\.\d+|[a-zA-Z](?:_\{\w+\})?|[-+*/^(){}\[\]!_])", re.ASCII)
LONGEST, MOST_BITS, SMALL = 400, 5000, range(200)  # text; numerator of a power; what may have a factorial
POINTS = (1, 1), (-1, -1), (1, -1)  # the sign there of every second letter of the alphabet, and of the others
NAMES = {r"\infty", r"\theta", r"\alpha", r"\beta", r"\gamma", r"\lambda", r"\omega", r"\phi", r"\mu"}  # letters, too
CONSTANTS = {r"\pi": cmath.pi, "e": cmath.e, "i": 1j, r"\deg": cmath.pi / 180}
FUNCTIONS = {r"\sin": cmath.sin, r"\cos": cmath.cos, r"\tan": cmath.tan, r"\cot": lambda x: 1 / cmath.tan(x),
             r"\arctan": cmath.atan, r"\ln": cmath.log, r"\log": cmath.log10, r"\abs": abs}
CLOSING = {"(": ")", "{": "}", "[": "]"}


def power(x, e):
    """Exact where it can be; the real root of a negative number where the root is odd, else the principal one."""
    if isinstance(x, Fraction) and isinstance(e, Fraction) and e.denominator == 1:
        if max(x.numerator.bit_length(), x.denominator.bit_length()) * abs(e) > MOST_BITS:
            raise ValueError("too large")
        return x ** int(e)
    if isinstance(e, Fraction) and e.denominator % 2 and x.imag == 0 and x.real < 0:
        return power(-x, e) * (-1) ** e.numerator
    return complex(x) ** complex(e)


OPERATORS = {  # how strongly they bind, what they do; what ends an expression binds least
    "+": (1, lambda x, y: x + y), "-": (1, lambda x, y: x - y), "*": (2, lambda x, y: x * y), "/": (2, lambda x, y: x / y),
    "^": (4, power), "!": (4, lambda x: Fraction(math.factorial(SMALL.index(x)))), **dict.fromkeys(["", *")}]"], (0, None))}


def climb(left, point, least=1):
    """The value of the tokens left (the next one last), up to an operator that binds less than `least`."""
    value = atom(left, point)
    while (rule := OPERATORS.get(left[-1], OPERATORS["*"]))[0] >= least:
        sign = left.pop() if left[-1] in OPERATORS else "*"  # 2x is 2 * x
        operand = [] if sign == "!" else [climb(left, point, rule[0] + 1)]
        value = rule[1](value, *operand)
    return value


def atom(left, point):
    token = left.pop()
    if token in CLOSING:
        value = climb(left, point)
        if left.pop() == CLOSING[token]:
            return value
    if token in ("+", "-"):
        return climb(left, point, 3) * (-1 if token == "-" else 1)
    if token[:1] in (".", *"0123456789"):
        return Fraction(token)
    if token in CONSTANTS:
        return CONSTANTS[token]
    if token == r"\sqrt":
        degree = atom(left, point) if left[-1] == "[" else Fraction(2)
        return power(atom(left, point), 1 / degree)
    if token == r"\frac":
        return atom(left, point) / atom(left, point)
    if token == r"\binom":
        return Fraction(math.comb(SMALL.index(atom(left, point)), SMALL.index(atom(left, point))))
    if token in FUNCTIONS:
        return applied(token, left, point)
    if token[:1].isalpha() or token in NAMES:
        return Fraction(POINTS[point][ord(token[-1]) % 2] * Random(f"{token} {point}").randint(300, 3000), 997)
    raise ValueError(f"{token} is not arithmetic")


def applied(name, left, point):
    r"""A function of what is in brackets, or of the product that follows, up to the next function: \sin 2x\cos x."""
    base = left.pop() and atom(left, point) if left[-1] == "_" else None
    bracketed = left[-1] in CLOSING
    argument = atom(left, point) if bracketed else climb(left, point, 3)
    while not bracketed and left[-1] not in OPERATORS and left[-1] not in FUNCTIONS:
        argument *= climb(left, point, 3)
    return FUNCTIONS[name](argument) if base is None else FUNCTIONS[name](argument) / FUNCTIONS[name](base)


def values(text):
    """The value at each point."""
    if len(text) > LONGEST or TOKEN.sub("", text).strip():
        raise ValueError("not arithmetic, or too long")
    found = []
    for point in range(len(POINTS)):
        left = ["", *reversed(TOKEN.findall(text))]  # the end, and what comes before it
        found.append(climb(left, point))
        if left != [""] or not (isinstance(found[-1], Fraction) or cmath.isfinite(found[-1])):
            raise ValueError("something is left over, or too large")
    return found


def equal(v, w):
    """Whether two lists of values are the same."""
    return all(x == y or not (isinstance(x, Fraction) and isinstance(y, Fraction)) and
               cmath.isclose(x, y, rel_tol=1e-12, abs_tol=1e-14) for x, y in zip(v, w))
