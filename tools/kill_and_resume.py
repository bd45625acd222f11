"""Kills an evaluation and a training of the tiny system at random moments, and starts them again until they are done.

    python tools/kill_and_resume.py --kills 50 --seed 0

Half of the kills are SIGKILL, half SIGTERM. After each one the same command is started again, and is killed again or
runs to its end. Then its records, or its links and all else in its folder, must be those of a run that nobody killed,
bit for bit on a CPU, but for the seconds that it took. Exit status 1 says that something differs.
"""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

TIMES = {"seconds", "tokens_per_second"}  # keys of records and metrics that two runs do not share
LONGEST = (
    60.0  # seconds that a process may take to end after SIGTERM, and a tenth of those of a run
)
KINDS = (signal.SIGKILL, signal.SIGTERM)
CALM = 1 / 3  # of the kills after which a run may come to its end


@dataclass
class Case:
    """A command that is killed.

    command   its module and options, but for --out
    output    what --out names, within a folder of its own
    seconds   that it takes if nobody kills it
    """

    name: str
    command: list[str]
    output: str
    seconds: float = 0.0
    kills: dict[int, int] = field(default_factory=lambda: dict.fromkeys(KINDS, 0))
    statuses: set[int] = field(default_factory=set)  # exit statuses after SIGTERM
    runs: int = 0  # that came to their end
    differences: list[str] = field(default_factory=list)

    def start(self, folder: Path) -> subprocess.Popen:
        """Start the command in a folder."""
        return subprocess.Popen(
            [sys.executable, "-m", *self.command, "--out", str(folder / self.output)],
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )

    def finish(self, folder: Path) -> bool:
        """Run the command to its end -> whether it came there."""
        process = self.start(folder)
        _, err = process.communicate(timeout=10 * LONGEST)
        self.runs += 1
        if process.returncode:
            self.differences.append(f"exit status {process.returncode}: {err[-300:]}")
        return process.returncode == 0

    def kill_once(self, folder: Path, moment: float, kind: signal.Signals) -> bool:
        """Start the command and kill it after some seconds -> whether it was still running."""
        process = self.start(folder)
        try:
            _, err = process.communicate(timeout=moment)
        except subprocess.TimeoutExpired:
            process.send_signal(kind)
            self.kills[kind] += 1
            _, err = process.communicate(timeout=LONGEST)
            if kind == signal.SIGTERM:
                self.statuses.add(process.returncode)
                if "Traceback" in err:
                    self.differences.append(f"a traceback after SIGTERM: {err[-300:]}")
            return True
        if process.returncode:
            self.differences.append(f"exit status {process.returncode}: {err[-300:]}")
        return False


def cases(size: float) -> list[Case]:
    """An evaluation and a training; `size` makes them longer."""
    questions, steps = str(round(40 * size)), str(round(4 * size))
    common = ["--style", "tiny", "--device", "cpu"]
    evaluation = ["minimas.evaluate", *common, "--dataset", "tiny", "--limit", questions]
    evaluation += ["--rounds", "1,2,3", "--channel", "latent,text", "--temperature", "0.7"]
    evaluation += ["--batch-size", "4"]
    training = ["minimas.train", "system", *common, "--data", "tiny", "--limit", "24"]
    training += ["--inner-steps", steps, "--steps", steps, "--rounds", "2", "--latent-steps", "2"]
    training += ["--save-every", "3", "--resume"]
    return [
        Case("evaluate", evaluation, "records.jsonl"),
        Case("train system", training, "system"),
    ]


# Comparison


def differences(ours: Path, theirs: Path) -> list[str]:
    """What differs between two folders, one line for each file."""
    names = {str(file.relative_to(ours)) for file in ours.rglob("*") if file.is_file()}
    other_names = {str(file.relative_to(theirs)) for file in theirs.rglob("*") if file.is_file()}
    found = [f"{name} is in one folder only" for name in sorted(names ^ other_names)]
    for name in sorted(names & other_names):
        if not same(content(ours / name), content(theirs / name)):
            found.append(f"{name} differs")
    return found


def content(file: Path) -> Any:
    """What a file holds, without the time that something took."""
    if file.suffix == ".jsonl":
        lines = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
        return [{key: line[key] for key in line if key not in TIMES} for line in lines]
    if file.suffix == ".pt":
        return torch.load(file, weights_only=True)
    return file.read_bytes()


def same(a: Any, b: Any) -> bool:
    """Whether two values are equal, tensors bit for bit."""
    if torch.is_tensor(a):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


# The runs


def kill_and_resume(
    case: Case, kills: int, rng: random.Random, folder: Path, tell: Callable[[str], object]
) -> None:
    """Kill a command `kills` times, in as many runs as that takes, and compare each run with one that nobody killed."""
    whole = folder / "whole"
    whole.mkdir()
    started = time.monotonic()
    if not case.finish(whole):
        return
    case.seconds = time.monotonic() - started
    while sum(case.kills.values()) < kills and not case.differences:
        own = folder / f"run{case.runs}"
        own.mkdir()
        killed = True
        while killed and sum(case.kills.values()) < kills:
            killed = case.kill_once(own, rng.uniform(0, case.seconds), rng.choice(KINDS))
            if rng.random() < CALM:
                break
        if killed:
            case.finish(own)
        else:
            case.runs += 1
        case.differences += [f"{own.name}: {found}" for found in differences(own, whole)]
        tell(f"{case.name}: {sum(case.kills.values())} kills, {case.runs - 1} runs compared")


def table(done: Sequence[Case]) -> str:
    """What was done, a line for each command."""
    lines = ["command       seconds  SIGKILL  SIGTERM  statuses of SIGTERM  runs  differences"]
    for case in done:
        statuses = ",".join(map(str, sorted(case.statuses))) or "-"
        lines.append(
            f"{case.name:12}  {case.seconds:7.1f}  {case.kills[signal.SIGKILL]:7}  "
            f"{case.kills[signal.SIGTERM]:7}  {statuses:>19}  {case.runs - 1:4}  {len(case.differences):11}"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--kills", type=int, default=50, help="of all commands (default 50)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--size", type=float, default=1.0, help="length of runs (default 1)")
    args = parser.parse_args()
    rng = random.Random(args.seed)
    done = cases(args.size)
    with tempfile.TemporaryDirectory() as folder:
        for i, case in enumerate(done):
            share = args.kills // len(done) + (i < args.kills % len(done))
            place = Path(folder) / str(i)
            place.mkdir()
            kill_and_resume(case, share, rng, place, lambda line: print(line, file=sys.stderr))
    print(table(done))
    found = [difference for case in done for difference in case.differences]
    print("\n".join(found), end="\n" if found else "")
    raise SystemExit(1 if found else 0)


if __name__ == "__main__":
    main()
