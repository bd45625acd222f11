"""The command that trains and measures the tiny system, as train/tiny.py says.

It trains into a new folder, or only measures one:

    python -m minimas.tiny.build --out FOLDER
    python -m minimas.tiny.build --evaluate FOLDER
"""

import json
from pathlib import Path

import torch

from ..commands.failures import command
from ..commands.options import Parser, output
from ..runs.lock import Lock, held
from ..train.tiny import build, evaluate
from .task import ROLES


def main() -> None:
    parser = Parser(
        "python -m minimas.tiny.build", description="Train the tiny system from scratch."
    )
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--out", type=output(), help="the folder to write")
    what.add_argument(
        "--evaluate", type=Path, metavar="FOLDER", help="only measure the system in this folder"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--split",
        choices=("test", "validation"),
        default="test",
        help="the split that the report is measured on (default test)",
    )
    args = parser.parse_args()
    torch.manual_seed(args.seed)  # for the random links of the control
    if args.out:
        folders = [args.out, *(args.out / name for name in (*ROLES, "links"))]
        with held([Lock("--out", folder, folder=True) for folder in folders]):
            report = build(args.out, args.seed, split=args.split)
    else:
        report = evaluate(args.evaluate, args.split, 150)
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    command(main)
