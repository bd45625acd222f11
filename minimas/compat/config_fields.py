"""What can be wrong in a config.json: a field that is missing, of another type, out of range, or at odds with another.

A decoder trusts its Config, so all of it is checked before one is made. Each function raises InputError, or returns.
"""

from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

from ..common import InputError, check_known
from .rope import PARTIAL, Raw, rope_parameters

ROPE_TYPES = {  # and the parameters that each needs besides rope_theta
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}
LIMITS = {  # of a whole number; all others are from 1 to 2 ** 24
    "num_hidden_layers": (1, 1000),
    "max_window_layers": (0, 2**24),
}
SHARED_HEADS = (  # each of the second is shared by equally many of the first
    ("num_attention_heads", "num_key_value_heads"),
    ("linear_num_value_heads", "linear_num_key_heads"),
)


def check_fields(file: Path, raw: Raw, Config: type[Any], must_be: Raw) -> None:
    """InputError if a config.json lacks a field of Config, or a field is not of its type or not what it must be."""
    for name, value in must_be.items():
        if raw.get(name) not in (None, value):
            raise InputError(f"{file}: {name} {raw[name]!r} is not supported, expected {value!r}")
    missing = []
    for field in fields(Config):
        if field.name in raw:
            if field.type in (int, int | None, float, bool):
                check_value(file, field.name, raw[field.name], field.type)
            continue
        has_older_spellings = field.name == "rope_parameters"
        if field.default is MISSING and not has_older_spellings:
            missing.append(field.name)
    if missing:
        raise InputError(
            f"{file} lacks {', '.join(missing)}: expected the config of a {raw['model_type']} decoder"
        )


def check_value(file: Path, name: str, value: Any, type_: Any) -> None:
    """InputError unless a value is of its type in Config: int, `int | None`, float, or bool, which may be null."""
    if type_ is bool:
        fits = value is None or isinstance(value, bool)
        expected = "true or false"
    elif type_ is float:  # one that float32 can hold
        fits = type(value) in (int, float) and 1e-38 < value < 1e38
        expected = "a number above 0"
    else:
        least, most = LIMITS.get(name, (1, 2**24))
        may_be_null = type_ is not int
        in_range = type(value) is int and least <= value <= most
        fits = in_range or (value is None and may_be_null)
        expected = f"a whole number from {least} to {most}"
    if not fits:
        raise InputError(
            f"{file}: {name} is {value!r:.80}, expected {expected}; fetch the file again"
        )


def check_layers(file: Path, config: Any, allowed: frozenset[str]) -> None:
    """InputError unless heads share keys evenly, and each layer is of an allowed type and has the window it needs."""
    for many, few in SHARED_HEADS:
        if not hasattr(config, many):
            continue
        heads = getattr(config, many)
        shared = getattr(config, few)
        if heads % shared:
            raise InputError(
                f"{file}: {many} is {heads}, expected a multiple of {few} {shared}; fetch the file again"
            )
    if config.head_dim < 2 or config.head_dim % 2:
        raise InputError(
            f"{file}: a head is {config.head_dim} wide, expected an even width of 2 or more: fetch the file again"
        )
    n = config.num_hidden_layers
    types = getattr(config, "layer_types", ["full_attention"] * n)
    if not isinstance(types, list) or len(types) != n or not allowed.issuperset(map(str, types)):
        raise InputError(
            f"{file}: layer_types is {types!r}, expected {n} of {', '.join(sorted(allowed))}"
        )
    if "sliding_attention" in types and config.sliding_window is None:
        raise InputError(
            f"{file}: layer_types has sliding_attention, but sliding_window is null or not in use"
        )


def checked_rope(file: Path, raw: Raw) -> Raw:
    """The rope_parameters of a config; InputError if they are not those of a supported type."""
    rope = rope_parameters(file, raw)
    parts = rope.values() if raw["model_type"] == "gemma3_text" else [rope]
    for part in parts:
        check_rope(file, part, rotates_a_part=raw["model_type"] in PARTIAL)
    return rope


def check_rope(file: Path, rope: Raw, rotates_a_part: bool) -> None:
    """InputError if rope parameters are not complete, or not of a supported type.

    rotates_a_part  the family can leave a part of each head as it is; others do not read partial_rotary_factor, and
                    transformers cannot run them with a part of a scaled type
    """
    kind = rope["rope_type"]
    check_known(f"{file}: rope type", [kind], ROPE_TYPES)
    names = ["rope_theta", *ROPE_TYPES[kind]]
    partial = rope.get("partial_rotary_factor")
    if partial is not None:
        names.append("partial_rotary_factor")
    for name in names:
        check_value(file, f"{name} of rope type {kind}", rope.get(name), float)
    if partial is None:
        return
    if partial > 1:
        raise InputError(
            f"{file}: partial_rotary_factor is {partial}, expected 1 at most; fetch the file again"
        )
    if partial != 1 and kind != "default" and not rotates_a_part:
        raise InputError(
            f"{file}: partial_rotary_factor is {partial}, expected 1 for rope type {kind}: "
            "this family rotates whole heads; fetch the file again"
        )
