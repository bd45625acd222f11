"""Near misses: pairs of a right answer and one that is slightly wrong. No grader that is exact may accept one.

`near_misses` makes them from an answer, for test_grade.py. `python tools/near_misses.py FOLDER` makes them from the
answers in the *.jsonl files of a folder ("gold", or "answer" as in GSM8K), and counts those that latex.py accepts.
"""

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path

from minimas.evaluate.latex import same_latex

NUMBER = re.compile(r"(?<![\d.])\d+(?:\.\d+)?")
OTHER_BRACKET = {"(": "[", "[": "(", ")": "]", "]": ")"}


def near_misses(answer: str) -> Iterator[tuple[str, str]]:
    """Yield (kind of mistake, wrong answer) for an answer in LaTeX."""
    if answer.startswith("0,"):  # a decimal comma: 0,1110 is 0,111
        return
    for number in NUMBER.finditer(answer):
        yield from wrong_numbers(answer, number)
    whole = re.fullmatch(r"-?\d[\d,.]*|-?\\frac\{\d+\}\{\d+\}", answer)
    if whole and answer.strip("-0.,"):
        yield "sign", answer[1:] if answer.startswith("-") else f"-{answer}"
        yield "factor", rf"{answer}\pi"
        yield "words", rf"{answer}\text{{ thousand}}"
        yield "list", f"{answer}, {answer}1"
        yield "equation", f"m + n = {answer} + 1"
    brackets = re.fullmatch(r"([(\[])([^()\[\],]+),([^()\[\],]+)([)\]])", answer)
    if brackets:
        first, one, two, last = brackets.groups()
        yield "bracket", f"{OTHER_BRACKET[first]}{one},{two}{last}"
        if one.strip() != two.strip():
            yield "order", f"{first}{two},{one}{last}"
        yield "element", f"{first}{one}{last}"
    items = answer.split(", ")
    if len(items) > 1 and not re.search(r"[(\[{]", answer):
        if items[-1] not in items[:-1]:
            yield "element", ", ".join(items[:-1])
        yield "element", f"{answer}, 997"


def wrong_numbers(answer: str, number: re.Match[str]) -> Iterator[tuple[str, str]]:
    """Yield answers in which one number is another."""
    before, after = answer[: number.start()], answer[number.end() :]
    last_digit = str((int(number[0][-1]) + 1) % 10)
    yield "digit", before + number[0][:-1] + last_digit + after
    yield "more digits", before + number[0] + ("7" if "." in number[0] else ".7") + after
    if len(set(number[0][-2:])) == 2 and number[0][-2:].isdigit():
        yield "swapped digits", before + number[0][:-2] + number[0][-1] + number[0][-2] + after
    if "." not in number[0] and int(number[0]):
        yield "magnitude", before + number[0] + "0" + after


def golds(folder: Path) -> list[str]:
    """The different answers in the files of a folder."""
    found = []
    for file in sorted(folder.glob("*.jsonl")):
        for line in file.read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            found.append(row.get("gold") or row.get("answer", "").split("#### ")[-1].strip())
    return [gold for gold in dict.fromkeys(found) if gold and "\n" not in gold]


def main(folder: str) -> None:
    pairs = [
        (kind, wrong, gold) for gold in golds(Path(folder)) for kind, wrong in near_misses(gold)
    ]
    accepted = [(kind, wrong, gold) for kind, wrong, gold in pairs if same_latex(wrong, gold)]
    for kind, wrong, gold in accepted:
        print(f"accepted ({kind}): {wrong} for {gold}")
    print(f"{len(accepted)} of {len(pairs)} near misses are accepted")


if __name__ == "__main__":
    main(sys.argv[1])
