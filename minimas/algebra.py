"""Exact arithmetic on LaTeX, as far as two answers need it to be compared: fractions, radicals, powers, polynomials, i, pi.

A value is a fraction of two sums; a sum maps products of atoms to rational coefficients; a product is a frozenset of
(atom, exponent). Atoms are names and prime numbers, with -1 among the primes: sqrt(12) is 2 * 3^(1/2) and i is (-1)^(1/2), and
as roots of different primes are independent over the rationals, two values are equal if and only if they look alike, once
multiplied by each other's denominators. Names are taken for numbers that are not negative under a root.
Everything is bounded, so no text can make it work for long.
"""

import re
from collections import Counter
from fractions import Fraction
from math import floor

TOKEN = re.compile(r"\s*(\\[a-zA-Z]+|\d+\.?\d*|\.\d+|[a-zA-Z]|[-+*/^(){}\[\]])")
NAMES = {r"\pi", r"\infty", r"\theta", r"\alpha", r"\beta", r"\lambda", r"\omega", r"\phi", r"\mu"}
MOST_BITS, MOST_PRODUCTS, DEEPEST, LONGEST = 20_000, 400, 30, 400
ONE = {frozenset(): Fraction(1)}


class Unknown(Exception):
    """The text is not arithmetic that this module knows, or is too large for it."""


def term(coefficient, exponents):
    """coefficient * product of atom^exponent, as (product, coefficient): whole powers of primes go into the coefficient."""
    kept = {}
    for atom, e in exponents.items():
        if isinstance(atom, int):
            coefficient, e = coefficient * Fraction(atom) ** floor(e), e - floor(e)
        if e:
            kept[atom] = e
    return frozenset(kept.items()), coefficient


def add(p, q, sign=1):
    out = dict(p)
    for product, c in q.items():
        out[product] = out.get(product, 0) + sign * c
    return {product: c for product, c in out.items() if c}


def times(p, q):
    if len(p) * len(q) > MOST_PRODUCTS:
        raise Unknown("too many terms")
    out = {}
    for a, x in p.items():
        for b, y in q.items():
            exponents = Counter(dict(a))
            for atom, e in b:
                exponents[atom] += e
            product, c = term(x * y, exponents)
            out[product] = out.get(product, 0) + c
            if max(abs(c.numerator), c.denominator).bit_length() > MOST_BITS:
                raise Unknown("too large")
    return {product: c for product, c in out.items() if c}


def multiply(v, w):
    return times(v[0], w[0]), times(v[1], w[1])


def divide(v, w):
    if not w[0]:
        raise Unknown("division by zero")
    return times(v[0], w[1]), times(v[1], w[0])


def plus(v, w, sign=1):
    if v[1] == w[1]:
        return add(v[0], w[0], sign), v[1]
    return add(times(v[0], w[1]), times(w[0], v[1]), sign), times(v[1], w[1])


def equal(v, w):
    return times(v[0], w[1]) == times(w[0], v[1])


def rational(v):
    """The value as a Fraction; Unknown if it is none."""
    (a, b) = (v[0] or {frozenset(): Fraction(0)}, v[1])
    if len(a) != 1 or a.keys() != b.keys():
        raise Unknown("not a rational number")
    return next(iter(a.values())) / next(iter(b.values()))


def primes(n):
    """{prime: exponent} of a whole number above 0."""
    found, p = Counter(), 2
    while p * p <= n:
        if p > 100_000:
            raise Unknown("too large to factor")
        while n % p == 0:
            found[p] += 1
            n //= p
        p += 1
    return found + Counter([n] if n > 1 else [])


def root(sum_, e):
    """A sum of one term to the power of a fraction; the real root of a negative number where the root is odd."""
    if len(sum_) != 1:
        raise Unknown("root of a sum")
    (product, c), = sum_.items()
    if any(atom == -1 or not isinstance(atom, int) and k != 1 for atom, k in product):
        raise Unknown("root of i, or of a square that may be negative: sqrt(x^2) is not x")
    exponents = Counter({atom: k * e for atom, k in product})
    for number, sign in (abs(c.numerator), 1), (c.denominator, -1):
        for p, k in primes(number).items():
            exponents[p] += sign * k * e
    if c < 0:
        exponents[-1] += e if e.denominator % 2 == 0 else e.numerator
    return dict([term(Fraction(1), exponents)])


def power(v, e):
    if abs(e) > (200 if len(v[0]) == len(v[1]) == 1 else 20) or e.denominator > 12:
        raise Unknown("exponent too large")
    if e < 0:
        return divide((ONE, ONE), power(v, -e))
    if e.denominator > 1:
        return (root(v[0], e), root(v[1], e)) if v[0] else v
    result = ONE, ONE
    for _ in range(int(e)):
        result = multiply(result, v)
    return result


class Reader:
    """Reads one value out of LaTeX that grade.py has tidied; what is left to read is its state."""

    def __init__(self, text):
        self.tokens, at = [], 0
        while match := TOKEN.match(text, at):
            self.tokens.append(match[1])
            at = match.end()
        if text[at:].strip() or not self.tokens or len(text) > LONGEST:
            raise Unknown("not arithmetic, or too long")
        self.tokens, self.depth = self.tokens[::-1], 0

    def peek(self):
        return self.tokens[-1] if self.tokens else ""

    def take(self, *expected):
        if not self.tokens or (expected and self.peek() not in expected):
            raise Unknown("unexpected end or token")
        return self.tokens.pop()

    def sum(self):
        value = self.product()
        while self.peek() in ("+", "-"):
            sign = 1 if self.take() == "+" else -1
            value = plus(value, self.product(), sign)
        return value

    def product(self):
        value = self.factor()
        while self.tokens and self.peek() not in ("+", "-", ")", "}", "]"):
            operator = self.take() if self.peek() in ("*", "/") else "*"
            value = (divide if operator == "/" else multiply)(value, self.factor())
        return value

    def factor(self):
        if self.peek() in ("+", "-"):
            return self.factor() if self.take() == "+" else multiply(({frozenset(): Fraction(-1)}, ONE), self.factor())
        value = self.atom()
        if self.peek() == "^":
            self.take()
            value = power(value, rational(self.atom()))
        return value

    def group(self):
        closing = {"(": ")", "{": "}", "[": "]"}[self.take("(", "{", "[")]
        self.depth += 1
        if self.depth > DEEPEST:
            raise Unknown("too deep")
        value = self.sum()
        self.take(closing)
        self.depth -= 1
        return value

    def atom(self):
        if self.peek() in ("(", "{", "["):
            return self.group()
        token = self.take()
        if token == r"\frac":
            return divide(self.atom(), self.atom())
        if token == r"\sqrt":
            degree = rational(self.group()) if self.peek() == "[" else Fraction(2)
            if degree < 1:
                raise Unknown("root of that degree")
            return power(self.atom(), 1 / degree)
        if token == "i":
            return root({frozenset(): Fraction(-1)}, Fraction(1, 2)), ONE
        if token.isalpha() or token in NAMES:
            return {frozenset({(token, Fraction(1))}): Fraction(1)}, ONE
        if token[0] in "0123456789.":
            number = Fraction(token)
            return ({frozenset(): number} if number else {}), ONE
        raise Unknown(token)


def read(text):
    """The value of a text; Unknown if it is not arithmetic."""
    reader = Reader(text)
    value = reader.sum()
    if reader.tokens:
        raise Unknown("something is left over")
    return value
