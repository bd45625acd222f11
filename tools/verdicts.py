"""A table of verdicts, verdicts.tsv: what is found in texts and how the graders judge it.

Its first line says by which versions it was judged. Each other line is a kind, two texts, and what comes of them:

    math    an answer, its target, then 1 or 0 by each of GRADERS
    choice  the content of a box, how many options there are, the letter that is found
    code    a text, nothing, the program that is found (both as JSON)
    text    an answer, its target, then 1 or 0

test_grade.py fails if a verdict changes. Then raise GRADERS_VERSION in minimas/evaluate/grade.py, so that records of
before are not continued, and run `python tools/verdicts.py`, which judges all lines again. New lines need a kind and
two texts only.
"""

import json
from importlib import metadata, util
from pathlib import Path

from minimas.answers import extract
from minimas.evaluate.grade import GRADERS, GRADERS_VERSION, same_math, same_text

TABLE = Path(__file__).parent.parent / "tests" / "verdicts.tsv"
HAS_MATH_VERIFY = util.find_spec("math_verify") is not None


def versions() -> list[str]:
    """The first line."""
    math_verify = metadata.version("math-verify") if HAS_MATH_VERIFY else ""
    return ["versions", str(GRADERS_VERSION), math_verify]


def read() -> list[list[str]]:
    """The lines of the table, split at tabs."""
    return [line.split("\t") for line in TABLE.read_text(encoding="utf-8").splitlines()]


def judged(kind: str, one: str, two: str) -> list[str]:
    """What comes of two texts; "" where a grader is not installed."""
    if kind == "choice":
        return [extract(rf"\boxed{{{one}}}", "choice", int(two)) or "-"]
    if kind == "code":
        return [json.dumps(extract(json.loads(one), "code"))]
    if kind == "text":
        return [str(int(same_text(one, two)))]
    verdicts = []
    for grader in GRADERS:
        is_missing = grader == "math-verify" and not HAS_MATH_VERIFY
        verdicts.append("" if is_missing else str(int(same_math(one, two, grader))))
    return verdicts


def main() -> None:
    head, *rows = read()
    if not HAS_MATH_VERIFY:
        raise SystemExit("the table has a column of math-verify: pip install 'minimas[math]'")
    new = [[*row[:3], *judged(*row[:3])] for row in rows]
    changed = [row for row, again in zip(rows, new, strict=True) if len(row) > 3 and row != again]
    if changed and head == versions():
        raise SystemExit(
            f"{len(changed)} verdicts have changed: raise GRADERS_VERSION in grade.py first"
        )
    lines = ["\t".join(row) + "\n" for row in [versions(), *new]]
    TABLE.write_text("".join(lines), encoding="utf-8")


if __name__ == "__main__":
    main()
