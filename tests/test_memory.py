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
from minimas.load import load_model
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
model = load_model(sys.argv[1], dtype=getattr(torch, sys.argv[2]))
weights = sum(p.numel() * p.element_size() for p in model.parameters())
print(weights, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)
"""


@pytest.mark.parametrize("dtype", ("bfloat16", "float32"))
def test_weights_stream_in(tmp_path_factory, dtype):
    """A bfloat16 checkpoint of 2.1 GB, read as it is and widened."""
    folder = tmp_path_factory.getbasetemp() / "large"
    if not folder.exists():
        sizes = {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32, "num_key_value_heads": 8,
                 "head_dim": 64, "vocab_size": 32000}
        checkpoints.make_agent(folder, "llama")
        config = json.loads((folder / "config.json").read_text()) | sizes
        (folder / "config.json").write_text(json.dumps(config))
        family, fields, _ = read_config(folder)
        with torch.device("meta"):
            shapes = {name: p.shape for name, p in family(fields).named_parameters() if name != "lm_head.weight"}
        save_file({"model." + name: torch.empty(shape, dtype=torch.bfloat16) for name, shape in shapes.items()}, folder / "model.safetensors")
    assert (folder / "model.safetensors").stat().st_size > 2e9
    done = subprocess.run([sys.executable, "-c", PROGRAM, str(folder), dtype], capture_output=True, text=True)
    weights, peak = map(int, done.stdout.split())
    assert peak <= 1.15 * weights, f"{peak / weights:.3f} times the weights"
