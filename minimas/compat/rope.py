"""The rotary parameters of config.json in the spellings of its many versions, as transformers 5.3 reads them.

They stand in rope_parameters (transformers 5), in rope_scaling (before), or at the top level (rope_theta,
partial_rotary_factor, original_max_position_embeddings). A config may name one of them in several places. Then:

    all                    rope_scaling replaces rope_parameters; in Gemma 3 it is laid over those of full attention
    rope_theta             the value inside is taken before the one at the top level
    partial_rotary_factor  likewise for rope_type default, but for a scaled type the top level is taken first
    original_max_position_embeddings
                           the top level is taken first; in Gemma 3 it is not read at all

Facts from transformers/modeling_rope_utils.py. A rope_parameters dict is completed there twice, when the config is read
and again when a scaled type computes its frequencies. That is why the order differs.
"""

from pathlib import Path
from typing import Any

from ..common import InputError, entry, warn_once

ATTENTION_TYPES = frozenset({"sliding_attention", "full_attention"})
# Families that rotate only a part of a head, and how much of it by default
PARTIAL = {"qwen3_5_text": 0.25}
POSITIONS = {  # max_position_embeddings where config.json does not say
    "llama": 2048,
    "mistral": 131072,
    "qwen2": 32768,
    "qwen3": 32768,
    "qwen3_5_text": 32768,
    "gemma3_text": 131072,
}

Raw = dict[str, Any]  # an object of config.json


def rope_parameters(file: Path, raw: Raw) -> Raw:
    """The rope parameters of a config, as transformers 5 spells and completes them; Gemma's for each layer type."""
    if raw["model_type"] == "gemma3_text":
        return of_each_layer_type(file, raw)
    return of_all_layers(file, raw)


def of_all_layers(file: Path, raw: Raw) -> Raw:
    """The rope parameters of a family whose layers all rotate alike."""
    newer = section(file, raw, "rope_parameters")
    older = section(file, raw, "rope_scaling")
    given = older or newer
    if given.keys() & ATTENTION_TYPES:
        raise InputError(
            f"{file}: rope_parameters are those of several layer types, expected those of all layers"
        )
    rope = completed(raw, given)
    if older and newer and rope != completed(raw, newer):
        warn_once(
            f"{file}: rope_parameters and rope_scaling differ; rope_scaling is used, as by transformers 5.3"
        )
    return rope


def completed(raw: Raw, given: Raw) -> Raw:
    """Rope parameters of all layers with what the top level of the config says, and the defaults."""
    rope = {"rope_theta": raw.get("rope_theta", 1e4)} | with_type(given)
    if rope["rope_type"] == "llama3":
        if "original_max_position_embeddings" in raw:
            rope["original_max_position_embeddings"] = raw["original_max_position_embeddings"]
        else:
            rope.setdefault("original_max_position_embeddings", max_positions(raw))
    partial = partial_rotary_factor(raw, rope)
    rope.pop("partial_rotary_factor", None)
    if partial is not None:
        rope["partial_rotary_factor"] = partial
    return rope


def partial_rotary_factor(raw: Raw, rope: Raw) -> Any:
    """The part of a head that is rotated, from the two places that can name it; None if neither does."""
    inside = rope.get("partial_rotary_factor")
    top = raw.get("partial_rotary_factor", PARTIAL.get(raw["model_type"]))
    if rope["rope_type"] == "default":
        first, second = inside, top
    else:
        first, second = top, inside
    if first is not None:
        return first
    if second is None and raw["model_type"] in PARTIAL:
        return 1.0  # the top level says null
    return second


def of_each_layer_type(file: Path, raw: Raw) -> Raw:
    """Gemma 3's: {"full_attention": its rope parameters, "sliding_attention": its own}."""
    given = section(file, raw, "rope_parameters")
    if given and not given.keys() & ATTENTION_TYPES:
        raise InputError(
            f"{file}: rope_parameters has no full_attention and no sliding_attention: "
            "expected the rope parameters of each layer type"
        )
    full = section(file, given, "full_attention") if given else {"rope_type": "default"}
    sliding = section(file, given, "sliding_attention")
    scaling = section(file, raw, "rope_scaling")
    merged = with_type(full | scaling)
    if "type" in scaling and scaling["type"] != merged["rope_type"]:
        warn_once(
            f"{file}: rope_scaling has the type {scaling['type']!r}, but under Gemma 3's name for it, rope_type, "
            f"stands {merged['rope_type']!r}, which is used, as by transformers 5.3"
        )
    elif given and scaling and merged != with_type(full):
        warn_once(
            f"{file}: rope_parameters and rope_scaling differ; rope_scaling is used where both name a value, "
            "as by transformers 5.3"
        )
    full = {"rope_theta": raw.get("rope_theta", 1e6)} | merged
    sliding = {"rope_theta": raw.get("rope_local_base_freq", 1e4)} | with_type(sliding)
    for rope in full, sliding:
        if rope["rope_type"] == "llama3":
            rope.setdefault("original_max_position_embeddings", max_positions(raw))
        if rope["rope_type"] != "default" and raw.get("partial_rotary_factor") is not None:
            rope["partial_rotary_factor"] = raw["partial_rotary_factor"]
    return {"full_attention": full, "sliding_attention": sliding}


def max_positions(raw: Raw) -> Any:
    """max_position_embeddings of a config, or the default of its family."""
    return raw.get("max_position_embeddings", POSITIONS[raw["model_type"]])


def section(file: Path, raw: Raw, name: str) -> Raw:
    """A copy of the object under a name; {} if it is absent or null."""
    if not raw.get(name):
        return {}
    return dict(entry(file, raw, name, type_=dict))


def with_type(rope: Raw) -> Raw:
    """Rope parameters with their rope_type, which was once `type`."""
    named = {"rope_type": rope.get("type", "default")} | rope
    named.pop("type", None)
    return named
