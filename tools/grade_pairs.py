"""How the graders judge published pairs of answers: python tools/grade_pairs.py FOLDER

Each *.jsonl file of the folder has an object per line with "gold", "answer" and "equal", the published verdict;
other objects are passed over. For each grader this prints how many of its verdicts are right, false accepts and false
rejects. Unread are the pairs that latex.py cannot read, whatever becomes of them; the released rule reads every text.
"""

import json
import sys
from pathlib import Path

from minimas.evaluate.grade import GRADERS, same_math
from minimas.evaluate.latex import same_latex


def main(folder):
    lines = [
        line
        for file in sorted(Path(folder).glob("*.jsonl"))
        for line in file.read_text(encoding="utf-8").splitlines()
        if line.strip()
    ]
    pairs = [
        (row["answer"], row["gold"], row["equal"])
        for row in map(json.loads, lines)
        if "equal" in row
    ]
    unread = sum(same_latex(answer, gold) is None for answer, gold, _ in pairs)
    print(
        f"{'grader':12} {'right':>6} {'false accepts':>14} {'false rejects':>14} {'unread':>7}   of {len(pairs)}"
    )
    for grader in GRADERS:
        verdicts = [(same_math(answer, gold, grader), equal) for answer, gold, equal in pairs]
        counts = [
            sum(found == equal for found, equal in verdicts),
            verdicts.count((True, False)),
            verdicts.count((False, True)),
            0 if grader == "released" else unread,
        ]
        print("{:12} {:6} {:14} {:14} {:7}".format(grader, *counts))


if __name__ == "__main__":
    main(sys.argv[1])
