"""config.json of a checkpoint -> which decoder it describes, and the fields of that decoder's Config.

Older spellings are translated to those of transformers 5.3, and every field is checked: a decoder trusts its Config.
"""

from dataclasses import MISSING, fields

import torch

from . import gemma, llama, mistral, qwen
from .common import InputError, check_known, entry, read_json, required
from .compat.rope import ATTENTION_TYPES, rope_parameters

LLAMA_LIKE = {"hidden_act": "silu", "attention_bias": False, "mlp_bias": False}
GEMMA_LIKE = {
    "hidden_activation": "gelu_pytorch_tanh",
    "attention_bias": False,
    "attn_logit_softcapping": None,
    "final_logit_softcapping": None,
    "use_bidirectional_attention": False,
}
FAMILIES = {  # model_type in config.json -> decoder, its Config, and fields that must have this value if they are given
    "llama": (llama.Llama, llama.Config, LLAMA_LIKE),
    "mistral": (llama.Llama, mistral.Config, LLAMA_LIKE),
    "qwen2": (
        qwen.Qwen2,
        qwen.Config,
        {"hidden_act": "silu"},
    ),  # its biases are fixed, whatever attention_bias says
    "qwen3": (qwen.Qwen3, qwen.Config3, LLAMA_LIKE),
    "qwen3_5_text": (qwen.Qwen35, qwen.Config35, LLAMA_LIKE),
    "gemma3_text": (gemma.Gemma3, gemma.Config, GEMMA_LIKE),
}
LAYER_TYPES = {
    "qwen3_5_text": {"linear_attention", "full_attention"}
}  # of a family; all others have ATTENTION_TYPES
TEXT_PART = {
    "gemma3": "gemma3_text",
    "qwen3_5": "qwen3_5_text",
}  # models of text and images: the decoder is in text_config
ROPE_TYPES = {  # and the parameters that each needs besides rope_theta
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}
LIMITS = {
    "num_hidden_layers": (1, 1000),
    "max_window_layers": (0, 2**24),
}  # of a whole number; others: 1 to 2 ** 24
DTYPES = {name: getattr(torch, name) for name in ("float32", "bfloat16", "float16", "float64")}


def read_config(folder):
    """config.json, in the spelling of transformers 5.3 or older -> (decoder class, its Config, dtype of the weights).

    Raises InputError on a model that is not supported, and on fields that are missing or say what no decoder here does.
    """
    file = required(folder, "config.json")
    raw = read_json(file)
    check_known(f"{file}: model_type", [raw.get("model_type")], [*FAMILIES, *TEXT_PART])
    if raw["model_type"] in TEXT_PART:
        of_whole = {
            name: raw[name]
            for name in ("dtype", "torch_dtype", "tie_word_embeddings")
            if name in raw
        }
        raw = (
            of_whole
            | entry(file, raw, "text_config", type_=dict)
            | {"model_type": TEXT_PART[raw["model_type"]]}
        )
    family, Config, must_be = FAMILIES[raw["model_type"]]
    check_fields(file, raw, Config, must_be)
    raw["rope_parameters"] = checked_rope(file, raw)
    config = Config(**{f.name: raw[f.name] for f in fields(Config) if f.name in raw})
    check_layers(file, config, LAYER_TYPES.get(raw["model_type"], ATTENTION_TYPES))
    dtype = raw.get("dtype") or raw.get("torch_dtype") or "float32"
    check_known(f"{file}: dtype", [str(dtype)], DTYPES)
    return family, config, DTYPES[dtype]


def check_fields(file, raw, Config, must_be):
    """InputError if a config.json lacks a field of Config, or a field is not of its type or not what it must be."""
    for name, value in must_be.items():
        if raw.get(name) not in (None, value):
            raise InputError(f"{file}: {name} {raw[name]!r} is not supported, expected {value!r}")
    has = raw.keys() | {"rope_parameters"}  # or an older spelling of it
    if missing := [f.name for f in fields(Config) if f.name not in has and f.default is MISSING]:
        raise InputError(
            f"{file} lacks {', '.join(missing)}: expected the config of a {raw['model_type']} decoder"
        )
    for f in fields(Config):
        if f.name in raw and f.type in (int, int | None, float, bool):
            check_value(file, f.name, raw[f.name], f.type)


def check_value(file, name, value, type_):
    """InputError unless a value is of its type in Config: int, `int | None`, float, or bool, which may be null."""
    if type_ is bool:
        fits, expected = value is None or isinstance(value, bool), "true or false"
    elif type_ is float:  # one that float32 can hold
        fits, expected = type(value) in (int, float) and 1e-38 < value < 1e38, "a number above 0"
    else:
        least, most = LIMITS.get(name, (1, 2**24))
        fits = value is None and type_ is not int or type(value) is int and least <= value <= most
        expected = f"a whole number from {least} to {most}"
    if not fits:
        raise InputError(
            f"{file}: {name} is {value!r:.80}, expected {expected}; fetch the file again"
        )


def check_layers(file, config, allowed):
    """InputError unless heads share keys evenly, and each layer is of an allowed type and has the window that it needs."""
    for many, few in (
        ("num_attention_heads", "num_key_value_heads"),
        ("linear_num_value_heads", "linear_num_key_heads"),
    ):
        if hasattr(config, many) and (n := getattr(config, many)) % (share := getattr(config, few)):
            raise InputError(
                f"{file}: {many} is {n}, expected a multiple of {few} {share}; fetch the file again"
            )
    n, types = (
        config.num_hidden_layers,
        getattr(config, "layer_types", ["full_attention"] * config.num_hidden_layers),
    )
    if not isinstance(types, list) or len(types) != n or not allowed.issuperset(map(str, types)):
        raise InputError(
            f"{file}: layer_types is {types!r}, expected {n} of {', '.join(sorted(allowed))}"
        )
    if "sliding_attention" in types and config.sliding_window is None:
        raise InputError(
            f"{file}: layer_types has sliding_attention, but sliding_window is null or not in use"
        )


def checked_rope(file, raw):
    """The rope_parameters of a config; InputError if they are not those of a supported type, or given twice."""
    rope = rope_parameters(file, raw)
    if raw.get("rope_scaling") and rope != rope_parameters(
        file, raw | {"rope_parameters": None}
    ):  # transformers' choice
        raise InputError(
            f"{file}: rope_parameters and rope_scaling differ: keep the one that the model was trained with"
        )
    for part in rope.values() if raw["model_type"] == "gemma3_text" else [rope]:
        check_known(f"{file}: rope type", [part["rope_type"]], ROPE_TYPES)
        for name in (
            "rope_theta",
            *ROPE_TYPES[part["rope_type"]],
            *part.keys() & {"partial_rotary_factor"},
        ):
            check_value(file, f"{name} of rope type {part['rope_type']}", part.get(name), float)
        if (partial := part.get("partial_rotary_factor", 1)) > 1:
            raise InputError(
                f"{file}: partial_rotary_factor is {partial}, expected 1 at most; fetch the file again"
            )
    return rope
