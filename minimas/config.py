"""config.json of a checkpoint -> which decoder it describes, and the fields of that decoder's Config.

Older spellings are translated to those of transformers 5.3, and every field is checked (compat/config_fields.py): a
decoder trusts its Config.
"""

from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch

from . import gemma, llama, mistral, qwen
from .common import check_known, entry, read_json
from .compat.config_fields import check_fields, check_layers, checked_rope
from .compat.folder import required_of_model
from .compat.rope import ATTENTION_TYPES, Raw

Decoder = Any  # a llama.Llama, or the decoder of another family: an nn.Module with the same methods


@dataclass(frozen=True)
class Family:
    """What a model_type stands for.

    decoder      makes the decoder of a Config
    Config       the fields of config.json that it reads
    must_be      fields that must have this value if they are given: the decoder knows no other
    layer_types  what layer_types may name
    """

    decoder: Callable[[Any], Decoder]
    Config: type[llama.Config]
    must_be: dict[str, Any]
    layer_types: frozenset[str] = ATTENTION_TYPES


LLAMA_LIKE = {"hidden_act": "silu", "attention_bias": False, "mlp_bias": False}
QWEN2_LIKE = {"hidden_act": "silu"}  # its biases are fixed, whatever attention_bias says
GEMMA_LIKE = {
    "hidden_activation": "gelu_pytorch_tanh",
    "attention_bias": False,
    "attn_logit_softcapping": None,
    "final_logit_softcapping": None,
    "use_bidirectional_attention": False,
}
QWEN35_LAYERS = frozenset({"linear_attention", "full_attention"})
FAMILIES = {
    "llama": Family(llama.Llama, llama.Config, LLAMA_LIKE),
    "mistral": Family(mistral.Mistral, mistral.Config, LLAMA_LIKE),
    "qwen2": Family(qwen.Qwen2, qwen.Config, QWEN2_LIKE),
    "qwen3": Family(qwen.Qwen3, qwen.Config3, LLAMA_LIKE),
    "qwen3_5_text": Family(qwen.Qwen35, qwen.Config35, LLAMA_LIKE, QWEN35_LAYERS),
    "gemma3_text": Family(gemma.Gemma3, gemma.Config, GEMMA_LIKE),
}
TEXT_PART = {  # models of text and images: the decoder is in text_config
    "gemma3": "gemma3_text",
    "qwen3_5": "qwen3_5_text",
}
DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float64": torch.float64,
}


def read_config(folder: Path) -> tuple[Callable[[Any], Decoder], llama.Config, torch.dtype]:
    """config.json, in the spelling of transformers 5.3 or older -> (decoder class, its Config, dtype of the weights).

    Raises InputError on a model that is not supported, and on fields that are missing or say what no decoder here does.
    """
    file = required_of_model(folder, "config.json")
    return parse_config(file, read_json(file))


def parse_config(
    file: Path, raw: Raw
) -> tuple[Callable[[Any], Decoder], llama.Config, torch.dtype]:
    """The same of the fields of a config.json; `file` is named in error messages."""
    check_known(f"{file}: model_type", [raw.get("model_type")], [*FAMILIES, *TEXT_PART])
    if raw["model_type"] in TEXT_PART:
        raw = text_part(file, raw)
    family = FAMILIES[raw["model_type"]]
    check_fields(file, raw, family.Config, family.must_be)
    raw["rope_parameters"] = checked_rope(file, raw)
    read = {f.name: raw[f.name] for f in fields(family.Config) if f.name in raw}
    config = family.Config(**read)
    check_layers(file, config, family.layer_types)
    dtype = str(raw.get("dtype") or raw.get("torch_dtype") or "float32")
    check_known(f"{file}: dtype", [dtype], DTYPES)
    return family.decoder, config, DTYPES[dtype]


def text_part(file: Path, whole: Raw) -> Raw:
    """The config of the decoder in a model of text and images, with what the top level says for it.

    Whether the embeddings are tied is said in two places. transformers 5.3 makes of a gemma3 the whole model, which
    obeys the top level (true if it is silent), and of a qwen3_5 the decoder alone, which obeys text_config.
    """
    of_whole = {name: whole[name] for name in ("dtype", "torch_dtype") if name in whole}
    text = of_whole | entry(file, whole, "text_config", type_=dict)
    text["model_type"] = TEXT_PART[whole["model_type"]]
    tied = "tie_word_embeddings"
    if whole["model_type"] == "gemma3":
        text[tied] = whole.get(tied, True)
    elif tied in whole:
        text.setdefault(tied, whole[tied])
    return text
