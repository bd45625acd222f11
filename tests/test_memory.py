"""Loading holds the weights once: peak resident memory stays within 1.15 times their bytes."""

import json
import subprocess
import sys

import checkpoints
import pytest
import torch
from safetensors.torch import save_file

from minimas.config import read_config

PROGRAM = """
import pathlib, re, sys, torch
from minimas.fast.prepare import prepare
from minimas.load import load_model
from minimas.quantize import named_weights
def peak():
    # ru_maxrss would begin with what the process that started this one had.
    status = pathlib.Path("/proc/self/status").read_text()
    return 1024 * int(re.search(r"VmHWM:\\s+(\\d+) kB", status)[1])
before = peak()
quantize = sys.argv[4] if len(sys.argv) > 4 else None
model = load_model(pathlib.Path(sys.argv[1]), dtype=getattr(torch, sys.argv[2]), quantize=quantize)
weights = sum(weight.nbytes for _, weight in named_weights(model))
if sys.argv[3] == "fast":
    prepare(model)
assert "torch._dynamo" not in sys.modules  # torch's compiler: 1.5 s of every start
print(weights, peak() - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_weights_stream_in(tmp_path):
    """A bfloat16 checkpoint of 0.6 GB: read as it is; upcast and packed, when a product's weights are held thrice."""
    folder = checkpoints.make_agent(tmp_path, "llama")
    sizes = {
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 4,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "vocab_size": 32000,
    }
    (folder / "config.json").write_text(
        json.dumps(json.loads((folder / "config.json").read_text()) | sizes)
    )
    family, fields, _ = read_config(folder)
    with torch.device("meta"):
        shapes = {
            name: p.shape
            for name, p in family(fields).named_parameters()
            if name != "lm_head.weight"
        }
    weights = {
        "model." + name: torch.empty(shape, dtype=torch.bfloat16) for name, shape in shapes.items()
    }
    save_file(weights, folder / "model.safetensors")
    assert (folder / "model.safetensors").stat().st_size > 6e8
    gate_and_up = 2 * 4 * 2 * 8192 * 2048  # of one layer: merged, and packed, beside the parts
    load = lambda *how: subprocess.Popen(
        [sys.executable, "-c", PROGRAM, folder, *how], stdout=subprocess.PIPE
    )
    children = {how: load(*how) for how in (("bfloat16", "plain"), ("float32", "fast"))}
    for (dtype, path), child in children.items():
        weights, peak = map(int, child.communicate()[0].split())
        most = 1.15 * weights + (gate_and_up if path == "fast" else 0)
        assert peak <= most, f"{path}, {dtype}: {peak / weights:.3f} times the weights"
    largest = 2 * 32000 * 2048  # the embedding, as it is stored until all else has arrived
    besides = (
        8e7  # to quantise a block, and for torch; the quantised weights take more than twice that
    )
    for kind in ("int8", "int4"):
        for path in ("plain", "fast"):
            child = load("float32", path, kind)
            weights, peak = map(int, child.communicate()[0].split())
            most = weights + largest + besides
            assert peak <= most, f"{kind}, {path}: {(peak - weights) / largest:.3f} embeddings"
