r"""Whether two answers in LaTeX are equal, as far as arithmetic can tell: True, False, or None if that is not certain.

LaTeX is tidied (spellings.py), then read as a meaning (meanings.py). Meanings are compared part by part, with the
arithmetic of expression.py: 3.2 is not 3.9, and 0.333 is not 1/3. If only one side names its unit, its base or `x =`,
the rest decides: 52 equals 52_8, but 42 does not. None stands for what cannot be read, and for the same numbers in
another kind, as (0, 1) for 0, 1.
"""

import re
from collections.abc import Iterable, Iterator
from itertools import product, starmap

from .expression import Number, equal, values_at_points
from .meanings import (
    NAME,
    OFTEN_PRODUCT,
    Many,
    Meaning,
    Ordered,
    Relation,
    Value,
    Words,
    constant,
    constant_value,
    is_variable,
    meaning,
)
from .spellings import LETTERS_AROUND, SHORT_DECIMAL_COMMA, SYMBOL_TIGHT, tidy, ways_to_read
from .units import is_plain_unit, singular

LONGEST = 2000  # characters of an answer
MOST_ITEMS = 50  # of a set; no answer of MATH comes near either

REVERSED = str.maketrans("<>", "><")

Verdict = bool | None  # None: not certain


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
    found = some(
        verdict(*texts) for texts in product(ways_to_read(predicted), ways_to_read(target))
    )
    if found is False and some(starmap(verdict, doubtful_ways(predicted, target))):
        return None
    return found


def doubtful_ways(predicted: str, target: str) -> list[tuple[str, str]]:
    """An answer and a target as they may be meant, but are less likely to be: 5m as 5 meters, 1,5 as 1.5, 5th as 5."""
    pairs = (
        (SYMBOL_TIGHT.sub(" ", predicted), target),
        (SHORT_DECIMAL_COMMA.sub(r"\1.\2", predicted), target),
        (predicted, SHORT_DECIMAL_COMMA.sub(r"\1.\2", target)),
        (without_letters(predicted), target),
        (predicted, without_letters(target)),
    )
    return [pair for pair in pairs if pair != (predicted, target)]


def without_letters(text: str) -> str:
    """A text without letters that may be a unit or an ordinal, 5th; known units stay."""
    letters = LETTERS_AROUND.search(text)
    if letters is None or is_plain_unit(letters[0].strip()):
        return text
    return LETTERS_AROUND.sub("", text)


def without_blanks(text: str) -> str:
    """A text without quotation marks and blanks, except those between two digits."""
    return re.sub(r"(?<![\d\s])\s+|\s+(?![\d\s])", "", text.replace('"', ""))


def verdict(predicted: str, target: str) -> Verdict:
    """Whether two tidied texts mean the same; None if one of them cannot be read."""
    try:
        return same_meaning(meaning(predicted), meaning(target))
    except (ValueError, ArithmeticError, RecursionError):
        return None


def same_meaning(a: Meaning, b: Meaning) -> Verdict:
    """Whether the meaning of an answer is that of a target."""
    match a, b:
        case Relation(), Relation():
            return same_relation(a, b)
        case Relation(), _:
            return states_target(a, b)
        case _, Relation():
            return is_stated_by(a, b)
        case Words(), Words():
            return list(map(singular, a.words)) == list(map(singular, b.words))
        case Value(), Value():
            return same_value(a, b)
        case Ordered(), Ordered() if (a.kind == "matrix") == (b.kind == "matrix"):
            return same_order(a, b)
        case Many("list"), Many("list"):
            return same_lists(a.items, b.items)
        case Many(), Many() if (a.kind == "union") == (b.kind == "union"):
            return same_items(a.items, b.items)
    return of_two_kinds(a, b)


def same_order(a: Ordered, b: Ordered) -> Verdict:
    """Whether two tuples, intervals, matrices or ratios are the same."""
    if "ratio" in (a.kind, b.kind) and a.kind == b.kind and len(a.items) == len(b.items):
        return True if every(map(same_meaning, a.items, b.items)) else proportional(a, b)
    if a.kind != b.kind or len(a.items) != len(b.items):
        return False
    return every(map(same_meaning, a.items, b.items))


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
    forth = every(is_among(item, others) for item in items)
    if forth is False:
        return False
    back = every(has_it(items, other) for other in others)
    return every((forth, back))


def same_lists(items: list[Meaning], others: list[Meaning]) -> Verdict:
    """Whether two lists are the same in any order; None if that holds only without regard to how often items occur."""
    found = same_items(items, others)
    if found and not (len(items) == len(others) and as_often(items, others)):
        return None
    return found


def as_often(items: list[Meaning], others: list[Meaning]) -> bool:
    """Whether each item occurs in two lists equally often."""
    return all(occurrences(item, items) == occurrences(item, others) for item in items)


def occurrences(item: Meaning, items: list[Meaning]) -> int:
    """How many items are the same as one."""
    return sum(same_meaning(item, other) is True for other in items)


def is_among(item: Meaning, others: list[Meaning]) -> Verdict:
    """Whether an item of an answer is one of the target's."""
    return some(same_meaning(item, other) for other in others)


def has_it(items: list[Meaning], other: Meaning) -> Verdict:
    """Whether an answer's items have one of the target's."""
    return some(same_meaning(item, other) for item in items)


def of_two_kinds(a: Meaning, b: Meaning) -> Verdict:
    """None if an answer holds what the target holds, in another kind: (0, 1) for 0, 1; else False.

    The first rule for the two kinds decides.
    """
    if isinstance(a, Words) or isinstance(b, Words):
        return against_words(a, b)
    if isinstance(a, Many) and isinstance(b, Many):
        return unless_false(same_items(a.items, b.items))
    kinds = {kind_of(a), kind_of(b)}
    if "union" in kinds:  # [0, 1] and [1, 2] together are [0, 2]
        return False if "value" in kinds else None
    if one_item(a, b) or one_item(b, a):  # {5}, and 5
        return None
    if "set" in kinds and "value" not in kinds:
        return False  # the order of a tuple means something, that of a set does not
    if kinds == {"ratio", "value"}:
        return None  # 7:32 may be the quotient, or a time
    return item_by_item(a, b)


def unless_false(found: Verdict) -> Verdict:
    """What is sure of things of two kinds: that they differ. None if they may be the same."""
    return False if found is False else None


def against_words(a: Meaning, b: Meaning) -> Verdict:
    """Words are no number. But the empty set is no solution, and an interval may be all real numbers."""
    return False if isinstance(a, Value) or isinstance(b, Value) else None


def one_item(one: Meaning, other: Meaning) -> bool:
    """Whether all items of a set or a list may be the other meaning, which is no such thing."""
    if not isinstance(one, Many) or isinstance(other, Many) or not one.items:
        return False
    return every(same_meaning(item, other) for item in one.items[:MOST_ITEMS]) is not False


def item_by_item(a: Meaning, b: Meaning) -> Verdict:
    """None if the items of two kinds may be the same in order, or of a target that is a list without names in any."""
    items, others = items_of(a), items_of(b)
    if len(items) != len(others):
        return False
    found = every(map(same_meaning, items, others))
    is_plain_list = kind_of(b) == "list" and len(items) <= MOST_ITEMS and not named(b)
    if found is False and is_plain_list:
        found = same_items(items, others)
    return unless_false(found)


def kind_of(meant: Meaning) -> str:
    """The kind of a set, a list, a tuple and so on; "value" for a number."""
    return meant.kind if isinstance(meant, Many | Ordered) else "value"


def items_of(meant: Meaning) -> list[Meaning]:
    """The items of a set, a tuple or a matrix; of an assignment to names, b = 6, a = 5, in the order of these."""
    if isinstance(meant, Ordered):
        if meant.kind != "matrix":
            return meant.items
        cells = []
        for row in meant.items:
            cells += items_of(row)
        return cells
    if isinstance(meant, Many):
        return [item for _, item in sorted(named(meant).items())] or meant.items
    return [meant]


def named(meant: Meaning) -> dict[str, Meaning]:
    """The items of a list of equations by their left sides, which all differ; {} of anything else."""
    items = meant.items if isinstance(meant, Many) else []
    by_name: dict[str, Meaning] = {item.left: item for item in items if isinstance(item, Relation)}
    return by_name if len(by_name) == len(items) else {}


def same_value(a: Value, b: Value) -> Verdict:
    """Equal numbers, in the same unit or one without; 50% is 0.5, and also 50 if only one side says percent.

    None if they are equal for positive letters only, which roots and logarithms are often meant for. ABC is not CBA,
    because the order may be the answer; math-verify is not asked, which would multiply the letters. None of AB and BA.
    """
    one, two = sorted((a.unit, b.unit))
    is_degree = one == "degree" and two.startswith(one)  # 20 degrees are 20 degrees C
    if one and one != two and not is_degree:
        return False
    in_other_order = "" not in (a.in_order, b.in_order) and a.in_order != b.in_order
    if in_other_order and not (is_often_product(a) and is_often_product(b)):
        return False
    if equal(a.numbers, b.numbers) or is_rounded(a, b) or is_rounded(b, a):
        return None if in_other_order else True
    if a.unit == "%" and b.unit == "":
        return equal(a.numbers, [100 * x for x in b.numbers])
    if b.unit == "%" and a.unit == "":
        return equal(b.numbers, [100 * x for x in a.numbers])
    is_equal_if_positive = equal(a.numbers[:1], b.numbers[:1])  # at the first point
    return None if is_equal_if_positive else False


def is_often_product(a: Value) -> bool:
    """Whether capitals in a row may well be a product or a segment: AB, 2AB."""
    return OFTEN_PRODUCT.fullmatch(a.in_order) is not None


def is_rounded(a: Value, b: Value) -> bool:
    """Whether a is b as a computer prints it."""
    if a.half_step is None or b.half_step is not None:
        return False
    half_step = a.half_step
    return all(abs(x - y) <= half_step for x, y in zip(a.numbers, b.numbers, strict=True))


def states_target(answer: Relation, target: Meaning) -> Verdict:
    """Whether an answer in the form `x = ...` or `m + n = ...` states the target, which is no relation."""
    left, sign, right = answer.left, answer.sign, answer.right
    if sign != "=":
        return same_as_inequality(answer, target)
    if NAME.fullmatch(left):
        return same_meaning(meaning(right), target)
    if NAME.fullmatch(right):
        return same_meaning(meaning(left), target)
    value, other_value = constant_value(left), constant_value(right)
    if value and other_value:
        return same_meaning(meaning(right), target) if equal(value, other_value) else None
    if value:  # 293 = m + n
        left, right = right, left
    is_number = not isinstance(target, Value) or constant(target.numbers)
    stated_value = meaning(right)
    is_expression = isinstance(stated_value, Value) and not constant(stated_value.numbers)
    if is_expression or not is_number:
        return None  # an equation between two expressions
    return same_meaning(stated_value, target)


def is_stated_by(answer: Meaning, target: Relation) -> Verdict:
    """Whether an answer that is no relation is the right side of the target `x = ...`."""
    left, sign, right = target.left, target.sign, target.right
    if sign != "=":
        return same_as_inequality(target, answer)
    if NAME.fullmatch(left):
        return same_meaning(answer, meaning(right))
    if NAME.fullmatch(right):
        return same_meaning(answer, meaning(left))
    if not isinstance(answer, Value):
        return None
    if re.search(r"(?<![\\a-zA-Z])[xyz](?![a-zA-Z])", left) and not constant_value(left):
        return False  # the equation of a line, or of another curve
    found = same_meaning(answer, meaning(right))
    return None if found else found


def same_as_inequality(relation: Relation, other: Meaning) -> Verdict:
    """Whether an interval is that of x > 3 or the like; None of anything else that is no number."""
    ray = ray_of(relation)
    if isinstance(other, Ordered) and other.kind != "matrix" and ray is not None:
        return same_meaning(ray, other)
    return False if isinstance(other, Value) else None


def ray_of(relation: Relation) -> Ordered | None:
    """The interval of a variable that is less or greater than a number; None of another relation."""
    left, sign, right = relation.left, relation.sign, relation.right
    if is_variable(right):  # 3 < x
        left, right = right, left
        sign = sign.translate(REVERSED)
    if sign == "≠" or not is_variable(left) or constant_value(right) is None:
        return None
    closed = sign in ("<=", ">=")
    if sign in ("<", "<="):
        return Ordered("(]" if closed else "()", [meaning(r"-\infty"), meaning(right)])
    return Ordered("[)" if closed else "()", [meaning(right), meaning(r"\infty")])


def same_relation(a: Relation, b: Relation) -> Verdict:
    """Whether a relation, all on its left side, is the other times a number; a negative one reverses inequalities.

    If that side is the same at all points, as in 0 = 0 and x = x, its ratio proves nothing: each side is compared.
    """
    is_same_name = NAME.fullmatch(a.left) and without_blanks(a.left) == without_blanks(b.left)
    if is_same_name and a.sign == b.sign:
        return same_meaning(meaning(a.right), meaning(b.right))
    left, right = values_at_points(a.left), values_at_points(a.right)
    other_left, other_right = values_at_points(b.left), values_at_points(b.right)
    reversed_sign = b.sign.translate(REVERSED)
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
