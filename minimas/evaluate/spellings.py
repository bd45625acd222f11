"""LaTeX in fewer spellings, by the table in spellings.txt, and the ways in which its numbers may be meant."""

import re
from pathlib import Path

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
# ⁻¹², but a ² or ³ alone, which may belong to a unit, is left to the table
RAISED = re.compile(r"[⁺⁻][⁰¹²³⁴-⁹]+|[⁰¹²³⁴-⁹]{2,}|[⁰¹⁴-⁹]")
LOWERED = str.maketrans("⁺⁻⁰¹²³⁴⁵⁶⁷⁸⁹", "+-0123456789")
INVERSE = re.compile(r"\\(sin|cos|tan)\s*\^\s*\{\s*-\s*1\s*\}")  # \tan^{-1}
# A letter that may be a unit or a factor, after a blank: 5 m
SYMBOL_APART = re.compile(r"(?<=\d)\s+(?=[msghLlNJWV]$)")
SYMBOL_TIGHT = re.compile(r"(?<=\d)(?=[msghLlNJWV]$)")
# Letters after a number, or capitals before it, that may be a unit or an ordinal that is not known: 5 Wb, 5th, GBP 5
LETTERS_AROUND = re.compile(
    r"(?<=\d)\s*(?:\^\{\s*\"?)?[a-zA-Z]{2,}(?:\"?\s*\})?$|^[A-Z]{3}\s*(?=\d)"
)


def tidy(text: str) -> str:
    r"""The same mathematics in fewer spellings; the content of \text{} is put in quotation marks."""
    text = RAISED.sub(lambda number: f"^{{{number[0].translate(LOWERED)}}}", text)
    for pattern, replacement in REPLACED:
        text = pattern.sub(replacement, text)
    text = REPEATING.sub(repeating_decimal, text)
    return BLANK_GROUPS.sub(lambda number: number[0].replace(" ", ""), text)


def repeating_decimal(number: re.Match[str]) -> str:
    r"""0.1\overline{6} as a sum of a decimal and a fraction."""
    whole, decimals, period = number.groups()
    nines = "9" * len(period) + "0" * len(decimals)
    return f"({whole or 0}.{decimals or 0}+{period}/{nines})"


def ways_to_read(text: str) -> list[str]:
    """The tidied text in all ways in which its numbers may be meant, the most likely first."""
    found = [without_thousands(text, sparing=False), without_thousands(text, sparing=True)]
    if decimal := DECIMAL_COMMA.fullmatch(text):
        found.append("{}{}.{}".format(*decimal.groups()))
    if SYMBOL_APART.search(text):
        found.append(SYMBOL_APART.sub("", text))  # 5 m may also be 5 times m
    if INVERSE.search(text):
        found.append(INVERSE.sub(r"\\arc\1 ", text))
    found += [SCIENTIFIC.sub(r"(\1*10^{\2})", way) for way in found]  # 5e-5 or 5*e - 5
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
