"""Loading holds the weights once: peak resident memory stays within 1.15 times their bytes."""

import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import save_file

import checkpoints
from minimas.load import read_config

PROGRAM = """
import resource, sys, torch
from minimas.fast import prepare
from minimas.load import load_model
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
model = load_model(sys.argv[1], dtype=getattr(torch, sys.argv[2]))
weights = sum(p.numel() * p.element_size() for p in model.parameters())
if sys.argv[3] == "fast":
    prepare(model)
assert "torch._dynamo" not in sys.modules  # torch's compiler: 1.5 s of every start
print(weights, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)
"""


@pytest.mark.parametrize("dtype, path", (("bfloat16", "plain"), ("float32", "fast")))
def test_weights_stream_in(tmp_path_factory, dtype, path):
    """A bfloat16 checkpoint of 0.6 GB, read as it is and widened; and packed, for which one product's weights are held thrice."""
    folder = tmp_path_factory.getbasetemp() / "large"
    if not folder.exists():
        sizes = {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 4, "num_attention_heads": 32, "num_key_value_heads": 8,
                 "head_dim": 64, "vocab_size": 32000}
        checkpoints.make_agent(folder, "llama")
        config = json.loads((folder / "config.json").read_text()) | sizes
        (folder / "config.json").write_text(json.dumps(config))
        family, fields, _ = read_config(folder)
        with torch.device("meta"):
            shapes = {name: p.shape for name, p in family(fields).named_parameters() if name != "lm_head.weight"}
        save_file({"model." + name: torch.empty(shape, dtype=torch.bfloat16) for name, shape in shapes.items()}, folder / "model.safetensors")
    assert (folder / "model.safetensors").stat().st_size > 6e8
    done = subprocess.run([sys.executable, "-c", PROGRAM, str(folder), dtype, path], capture_output=True, text=True)
    weights, peak = map(int, done.stdout.split())
    packing = 2 * 4 * 2 * 8192 * 2048 if path == "fast" else 0  # joined, and laid out anew, beside the parts: gate and up of a layer
    assert peak <= 1.15 * weights + packing, f"{peak / weights:.3f} times the weights"
