"""What a GPU has to show, in one command of at most nine minutes on one H100 or H200: correctness first, then speed.

    PYTHONPATH=. python tools/on_gpu.py OUT                      # needs nothing but torch, Triton, transformers and
    pytest PYTHONPATH=. python tools/on_gpu.py OUT --only llama tests   # some parts
    PYTHONPATH=. python tools/on_gpu.py /tmp/dry --small --device cpu    # Triton 3.6 needs numpy below 2.4 for it

Parts are processes of gpu_checks.py and gpu_speed.py, in the order of worth; the last may use all the time that is
left. Those of a stage run at once, and no other beside them. A part that fails costs no other, and one that still runs
when the time of its stage is over is ended: what a stage leaves of its time, later ones may use. Prints a line for each
part, and rewrites OUT/on_gpu.json every second. The exit status is 1 if a part failed or was ended, but not for a
missed bar.
"""

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

HERE = Path(__file__).parent
CHECKS, SPEED = HERE / "gpu_checks.py", HERE / "gpu_speed.py"
STAGES = [  # seconds, and {part: its command}; together 540 seconds
    (
        130,
        {
            "tests": [CHECKS, "tests"],
            "links": [CHECKS, "links"],
            "memcheck": [CHECKS, "memcheck"],
            **{
                kind: [CHECKS, "family", kind]
                for kind in ("qwen3", "llama", "qwen2", "mistral", "gemma3", "qwen3_5_text")
            },
            "system": [SPEED, "system"],
        },
    ),
    (100, {"batch-1": [SPEED, "race", "1"]}),
    (100, {"batch-32": [SPEED, "race", "32"]}),
    (40, {"kernels": [SPEED, "kernels"]}),
    (25, {"link-speed": [SPEED, "links"]}),
    (30, {"long": [SPEED, "long"]}),
    (25, {"train": [SPEED, "train"]}),
    (25, {"start": [SPEED, "start"]}),
    (65, {"compile": [SPEED, "ways"]}),
]


# What a part calls


def part_options():
    """The command line of a part: its name, its argument if it takes one, and what on_gpu.py was told."""
    parser = argparse.ArgumentParser()
    parser.add_argument("part")
    parser.add_argument("argument", nargs="?")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--work", type=Path, required=True, help="a folder that all parts share")
    return parser.parse_args()


def note(**values):
    """Report results of a part, as soon as there are any: a later value of the same name takes the place of the
    first.
    """
    print("\n@", json.dumps(values), flush=True)


# Running them


def results(log):
    """All that a part has reported in its log so far."""
    found = {}
    for line in log.read_text(errors="replace").splitlines():
        with suppress(ValueError):  # the last line of a part that was ended
            found |= json.loads(line[2:]) if line.startswith("@ {") else {}
    return found


def start(name, command, options, work, threads):
    """The process of a part, in a group (no session) of its own with all that it starts; its output: work/NAME.log."""
    environment = {
        "OMP_NUM_THREADS": str(threads),
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        **os.environ,
    }
    path = os.pathsep.join(
        [str(HERE.parent), str(HERE), *filter(None, [os.environ.get("PYTHONPATH")])]
    )
    with open(work / f"{name}.log", "wb") as log:
        return subprocess.Popen(
            [sys.executable, *map(str, command), *options, "--work", str(work)],
            stdout=log,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            process_group=0,
            env=environment | {"PYTHONUNBUFFERED": "1", "PYTHONPATH": path},
        )


def end(child):
    """End a part and all that it has started."""
    with suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)
    with suppress(subprocess.TimeoutExpired):  # stuck in the driver
        child.wait(5)


def status(code, found):
    if code is None:
        return "ended"
    return "FAILED" if code else "skipped" if "skipped" in found else "ok"


def run_stage(commands, options, work, until, keep):
    """Run parts at once; keep(name, what is known of it) every second. Those that still run at the time `until` are
    ended.
    """
    started, threads = time.monotonic(), max(1, (os.cpu_count() or 1) // len(commands))
    running = {
        name: start(name, command, options, work, threads) for name, command in commands.items()
    }
    try:
        while running:
            time.sleep(0.1 if time.monotonic() < started + 2 else 1)
            for name, child in list(running.items()):
                code, late = child.poll(), time.monotonic() > until
                log, seconds = work / f"{name}.log", round(time.monotonic() - started, 1)
                known = {"status": "running", "seconds": seconds, **results(log)}
                if code is not None or late:
                    end(running.pop(name))
                    known = {**known, **results(log), "status": status(code, known)}
                    if known["status"] not in ("ok", "skipped"):
                        known["log"] = log.read_text(errors="replace")[-20000:]
                    line = (
                        known.get("summary")
                        or known.get("skipped")
                        or known.get("log", "").strip().split("\n")[-1]
                    )
                    print(f"{name:14s}{known['status']:9s}{seconds:6.1f} s  {line}", flush=True)
                keep(name, known)
    finally:  # SIGTERM and Ctrl-C leave none behind
        for child in running.values():
            end(child)


def main(stages=STAGES):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path, help="the folder for on_gpu.json")
    parser.add_argument(
        "--only",
        nargs="+",
        choices=[name for _, commands in stages for name in commands],
        metavar="PART",
    )
    parser.add_argument(
        "--small", action="store_true", help="miniature sizes, in twice the time: for a busy CPU"
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    report, begun, until = (
        {"command": sys.argv[1:], "parts": {}},
        time.monotonic(),
        time.monotonic(),
    )

    def keep(name, known):
        report["parts"][name] = known
        report["seconds"] = round(time.monotonic() - begun, 1)
        partial = args.out / "on_gpu.json.partial"
        partial.write_text(json.dumps(report, indent=1))
        partial.replace(args.out / "on_gpu.json")

    memory = Path("/dev/shm")  # the weights of a system are 9 GB
    place = (
        memory
        if memory.is_dir() and not args.small and shutil.disk_usage(memory).free > 2**35
        else None
    )
    with tempfile.TemporaryDirectory(dir=place, ignore_cleanup_errors=True) as work:
        for seconds, commands in stages:
            until += seconds * (1 + args.small)
            commands = {
                name: command
                for name, command in commands.items()
                if not args.only or name in args.only
            }
            if commands:
                options = ["--device", args.device, *["--small"] * args.small]
                run_stage(commands, options, Path(work), until, keep)
    return int(any(known["status"] not in ("ok", "skipped") for known in report["parts"].values()))


if __name__ == "__main__":
    sys.exit(main())
