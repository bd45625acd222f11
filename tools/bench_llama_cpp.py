"""How long llama.cpp takes for prefills and tokens of a Qwen2 in GGUF made from the float weights in a folder.

    python tools/bench_llama_cpp.py FOLDER --format Q8_0 --threads 2

Needs llama-cpp-python and gguf, but neither torch nor minimas: bench_quantized.py runs it in a Python that has them.
Prints one JSON object: {what: [milliseconds]}, and "weights", the bytes of the GGUF file.
"""

import argparse
import ctypes
import json
import struct
import tempfile
import time
from pathlib import Path

import gguf
import llama_cpp as llama
import numpy as np

LAYER = {  # Hugging Face's name of a tensor -> GGUF's
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
OTHERS = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}


def gguf_name(name: str) -> str:
    """model.layers.3.mlp.up_proj.weight -> blk.3.ffn_up.weight."""
    stem, _, leaf = name.rpartition(".")
    if stem in OTHERS:
        return f"{OTHERS[stem]}.{leaf}"
    _, _, layer, part = stem.split(".", 3)
    return f"blk.{layer}.{LAYER[part]}.{leaf}"


def read_safetensors(file: Path):
    """(name, float32 array) of each tensor."""
    with open(file, "rb") as data:
        (size,) = struct.unpack("<Q", data.read(8))
        header = json.loads(data.read(size))
    whole = np.memmap(file, np.uint8, "r", offset=8 + size)
    header.pop("__metadata__", None)
    for name, one in header.items():
        start, end = one["data_offsets"]
        raw = whole[start:end]
        if one["dtype"] == "BF16":
            raw = raw.view(np.uint16).astype(np.uint32) << 16
        yield name, raw.view(np.float32).reshape(one["shape"])


def write_gguf(folder: Path, file: Path, kind: str) -> None:
    """Quantise a Qwen2 by gguf's own rounding; norms and biases stay float32."""
    config = json.loads((folder / "config.json").read_text())
    assert config["model_type"] == "qwen2", "only Qwen2's tensors are known here"
    writer = gguf.GGUFWriter(file, "qwen2")
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(4096)
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    rope = config.get("rope_parameters") or config
    writer.add_rope_freq_base(rope["rope_theta"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("no_vocab")
    format_ = gguf.GGMLQuantizationType[kind]
    for name, array in read_safetensors(folder / "model.safetensors"):
        if array.ndim == 2:
            packed = gguf.quants.quantize(np.ascontiguousarray(array), format_)
            writer.add_tensor(gguf_name(name), packed, raw_dtype=format_)
        else:
            writer.add_tensor(gguf_name(name), np.array(array))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


class Runner:
    """A model of llama.cpp on the CPU, with a cache of 1,024 positions."""

    def __init__(self, file: Path, threads: int) -> None:
        llama.llama_backend_init()
        params = llama.llama_model_default_params()
        params.n_gpu_layers = 0
        self.model = llama.llama_model_load_from_file(str(file).encode(), params)
        if not self.model:
            raise SystemExit(f"llama.cpp cannot load {file}")
        params = llama.llama_context_default_params()
        params.n_ctx = 1024
        params.n_batch = params.n_ubatch = 512
        params.n_threads = params.n_threads_batch = threads
        self.context = llama.llama_init_from_model(self.model, params)
        self.batch = llama.llama_batch_init(512, 0, 1)

    def forget(self) -> None:
        memory = llama.llama_get_memory(self.context)
        llama.llama_memory_clear(memory, True)

    def decode(self, start: int, n: int) -> None:
        """Read n tokens from position `start`, with the scores of the last."""
        batch = self.batch
        batch.n_tokens = n
        for i in range(n):
            batch.token[i] = 100 + (7 * i) % 1000
            batch.pos[i] = start + i
            batch.n_seq_id[i] = 1
            batch.seq_id[i][0] = 0
            batch.logits[i] = i == n - 1
        assert llama.llama_decode(self.context, batch) == 0
        llama.llama_get_logits_ith(self.context, -1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--format", default="Q8_0", choices=("Q8_0", "Q4_0"))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument(
        "--gguf", type=Path, help="keep the GGUF file here, and use it if it is there"
    )
    args = parser.parse_args()
    quiet = llama.llama_log_callback(lambda *_: None)
    llama.llama_log_set(quiet, ctypes.c_void_p(0))
    with tempfile.TemporaryDirectory() as place:
        file = args.gguf or Path(place) / "model.gguf"
        if not file.exists():
            write_gguf(args.folder, file, args.format)
        runner = Runner(file, args.threads)
        times: dict[str, list[float]] = {}
        for _ in range(args.repeats):
            for n in (120, 512):
                runner.forget()
                measure(times, f"prefill {n}", lambda n=n: runner.decode(0, n))
            for i in range(8):
                measure(times, "text token", lambda i=i: runner.decode(512 + i, 1))
        print(json.dumps(times | {"weights": file.stat().st_size}))


def measure(times: dict[str, list[float]], name: str, work) -> None:
    """Add the milliseconds of work() to the list of that name."""
    started = time.perf_counter()
    work()
    times.setdefault(name, []).append(1e3 * (time.perf_counter() - started))


if __name__ == "__main__":
    main()
