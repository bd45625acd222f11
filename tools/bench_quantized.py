"""minimas with float32, int8 and int4 weights beside transformers with its cache, and beside llama.cpp: one real model.

    python tools/bench_quantized.py FOLDER --batch 1
    python tools/bench_quantized.py FOLDER --batch 1 --llama PYTHON   # a Python that has llama-cpp-python and gguf

FOLDER is that of a Qwen2 (tools/real_models.py fetches one). All of minimas and of transformers sit in one process and
take turns. A turn is one prefill, or six steps in a row after one that is not measured, since in use a step follows
another of the same model. llama.cpp runs before and after them, in a process of its own (bench_llama_cpp.py), at one
row. It knows no latent step. A latent step is here that of the decoder, without a link. The last line is one JSON
object. For whole runs see `bench.py --weights real --quantize int8`.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import reference
import torch
import transformers

import minimas

FORMS = {"float32": None, "int8": "int8", "int4": "int4"}  # name -> quantize
# name -> turns
TURNS = {"prefill 120": 3, "prefill 512": 3, "latent step": 4, "text token": 4}
STEPS = 6  # of a turn
BEFORE_STEPS = 200  # positions that are filled when a step is taken


class Ours:
    """A decoder of minimas on the fast path."""

    def __init__(self, folder: Path, quantize: str | None, batch: int) -> None:
        options = {"checkpoints": folder, "device": "cpu", "quantize": quantize, "fast": True}
        system = minimas.load_mas_system("single", **options)
        self.model = system.agents["agent"].model
        self.cache = self.model.make_cache(batch, 600)

    def read(self, x: torch.Tensor) -> None:
        for layer in self.cache:
            layer.filled = 0
        self.model(x, torch.arange(x.shape[1]).expand(len(x), -1), self.cache, last=1)

    def step(self, x: torch.Tensor, i: int, scores: bool) -> None:
        h = self.model(x, torch.full((len(x), 1), BEFORE_STEPS + i), self.cache, last=1)
        if scores:
            self.model.logits(h[:, -1])


class Peer:
    """The same of transformers."""

    def __init__(self, folder: Path, dtype: torch.dtype) -> None:
        self.model = reference.load_model(folder, dtype)
        self.dtype = dtype

    def read(self, x: torch.Tensor) -> None:
        out = self.model.model(inputs_embeds=x.to(self.dtype), use_cache=True)
        self.past = out.past_key_values

    def step(self, x: torch.Tensor, i: int, scores: bool) -> None:
        out = self.model.model(inputs_embeds=x.to(self.dtype), past_key_values=self.past)
        if scores:
            self.model.lm_head(out.last_hidden_state[:, -1])


def resident() -> int:
    """Bytes of this process that are in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def measured(runner: Ours | Peer, what: str, batch: int, D: int, i: int) -> float:
    """Milliseconds of one prefill or step."""
    tokens = int(what.split()[1]) if what.startswith("prefill") else 1
    x = 0.02 * torch.randn(batch, tokens, D)
    started = time.perf_counter()
    if tokens > 1:
        runner.read(x)
    else:
        runner.step(x, i, what == "text token")
    return 1e3 * (time.perf_counter() - started)


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("folder", type=Path)
    add("--batch", type=int, default=1)
    add("--without-transformers", action="store_true")
    add("--llama", help="a Python that has llama-cpp-python and gguf")
    args = parser.parse_args()
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    D = json.loads((args.folder / "config.json").read_text())["hidden_size"]
    runners: dict[str, Ours | Peer] = {}
    memory = {}
    for name, kind in FORMS.items():
        before = resident()
        runners[f"minimas {name}"] = Ours(args.folder, kind, args.batch)
        memory[name] = resident() - before
    if not args.without_transformers:
        for dtype in (torch.float32, torch.bfloat16):
            name = str(dtype).removeprefix("torch.")
            runners[f"transformers {name}"] = Peer(args.folder, dtype)
    result: dict[str, dict[str, list[float]]] = {name: {} for name in runners}
    with tempfile.TemporaryDirectory() as place:
        measure_llama(args, Path(place), result, memory)
        measure_in_turns(runners, args.batch, D, result)
        measure_llama(args, Path(place), result, memory)
    print(f"median ms (least), {args.batch} rows, {torch.get_num_threads()} threads", end=", ")
    print(torch.backends.cpu.get_cpu_capability())
    for name, times in result.items():
        cells = [""] * len(TURNS)
        for i, what in enumerate(TURNS):
            if what in times:
                cells[i] = f"{statistics.median(times[what]):.1f} ({min(times[what]):.1f})"
        print(f"{name:24s}" + "".join(f"{cell:>20s}" for cell in cells), flush=True)
    print(" " * 24 + "".join(f"{what:>20s}" for what in TURNS))
    for name, size in memory.items():
        print(f"{name:24s}{size / 1e6:8.0f} MB, {size / memory['float32']:.2f} of float32")
    print(json.dumps({"batch": args.batch, "milliseconds": result, "bytes": memory}))


def measure_in_turns(
    runners: dict[str, Ours | Peer], batch: int, D: int, result: dict[str, dict[str, list[float]]]
) -> None:
    """Add the milliseconds of each runner to `result`."""
    for what, turns in TURNS.items():
        for runner in runners.values():
            runner.read(0.02 * torch.randn(batch, BEFORE_STEPS, D))
        steps = 1 if what.startswith("prefill") else STEPS
        for turn in range(turns + 1):
            for name, runner in runners.items():
                if steps > 1:
                    measured(runner, what, batch, D, 0)
                for i in range(steps):
                    spent = measured(runner, what, batch, D, turn * steps + i)
                    if turn > 0:  # the first turn warms up
                        result[name].setdefault(what, []).append(spent)


def measure_llama(
    args: argparse.Namespace,
    place: Path,
    result: dict[str, dict[str, list[float]]],
    memory: dict[str, int],
) -> None:
    """Add the milliseconds of llama.cpp to `result`, and the size of its files, which stay in `place`, to `memory`."""
    if not args.llama or args.batch > 1:
        return
    for kind in ("Q8_0", "Q4_0"):
        script = Path(__file__).with_name("bench_llama_cpp.py")
        command = [args.llama, str(script), str(args.folder), "--format", kind]
        command += ["--threads", str(torch.get_num_threads()), "--gguf", str(place / kind)]
        out = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True).stdout
        times = json.loads(out.splitlines()[-1])
        memory[f"{kind} (file)"] = times.pop("weights")
        own = result.setdefault(f"llama.cpp {kind}", {})
        for what, milliseconds in times.items():
            own.setdefault(what, []).extend(milliseconds)


if __name__ == "__main__":
    sys.exit(main())
