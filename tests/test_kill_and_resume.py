"""tools/kill_and_resume.py: it finds what differs, and finds nothing after a few kills."""

import json
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch

TOOL = Path(__file__).parent.parent / "tools" / "kill_and_resume.py"


@pytest.mark.slow  # a dozen processes load torch
def test_killed_runs_come_to_the_same():
    args = ["--kills", "4", "--seed", "1", "--size", "0.3"]
    done = subprocess.run([sys.executable, TOOL, *args], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    _, *rows = (line.rsplit(maxsplit=6) for line in done.stdout.splitlines())
    assert [row[0] for row in rows] == ["evaluate", "train system"]
    assert [int(row[2]) + int(row[3]) for row in rows] == [2, 2]


def test_what_differs_is_found(tmp_path):
    """But not the time that something took."""
    differences = runpy.run_path(str(TOOL))["differences"]
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    record = {"index": 1, "texts": ["a"], "seconds": 1.0}
    for folder, seconds in ((ours, 1.0), (theirs, 2.0)):
        (folder / "links").mkdir(parents=True)
        line = json.dumps(record | {"seconds": seconds})
        (folder / "records.jsonl").write_text(line + "\n")
        torch.save({"w": torch.zeros(2), "step": 3}, folder / "links" / "training.pt")
        (folder / "config.json").write_text("{}")
    assert differences(ours, theirs) == []
    (theirs / "records.jsonl").write_text(json.dumps(record | {"texts": ["b"]}) + "\n")
    torch.save({"w": torch.tensor([0.0, 1e-9]), "step": 3}, theirs / "links" / "training.pt")
    (theirs / "config.json").unlink()
    assert differences(ours, theirs) == [
        "config.json is in one folder only",
        "links/training.pt differs",
        "records.jsonl differs",
    ]
