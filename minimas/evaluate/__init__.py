"""Evaluation: how often a system is right, on questions with known answers.

    from minimas.evaluate import evaluate, load_dataset
    table = evaluate(system, load_dataset("gsm8k", limit=100), rounds=[1, 2, 3], out="records.jsonl")

None of what is imported here needs torch before it is used.
"""

from .benchmarks import BENCHMARKS, Example, load_dataset
from .compare import Comparison, Paired, compare, paired
from .measure import evaluate
from .report import Table

__all__ = [
    "BENCHMARKS",
    "Comparison",
    "Example",
    "Paired",
    "Table",
    "compare",
    "evaluate",
    "load_dataset",
    "paired",
]
