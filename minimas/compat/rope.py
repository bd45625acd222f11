"""The rotary parameters of config.json in the spellings of its many versions, as transformers 5.3 reads them."""

from ..common import InputError, entry

ATTENTION_TYPES = {"sliding_attention", "full_attention"}


def rope_parameters(file, raw):
    """The rope parameters of a config, as transformers 5 spells and completes them; Gemma's for each layer type."""
    rope, scaling = (
        entry(file, raw, n, type_=dict) if raw.get(n) else {}
        for n in ("rope_parameters", "rope_scaling")
    )
    if raw["model_type"] == "gemma3_text":
        theta = {
            "full_attention": raw.get("rope_theta", 1e6),
            "sliding_attention": raw.get("rope_local_base_freq", 1e4),
        }
        rope = {"sliding_attention": {}} | (rope or {"full_attention": scaling})
        return {
            name: {"rope_theta": theta[name], **with_type(entry(file, rope, name, type_=dict))}
            for name in theta
        }
    if rope.keys() & ATTENTION_TYPES:
        raise InputError(
            f"{file}: rope_parameters are those of several layer types, expected those of all layers"
        )
    top = {"rope_theta": 1e4} | {
        name: raw[name] for name in ("rope_theta", "partial_rotary_factor") if name in raw
    }
    rope = top | with_type(rope or scaling)
    if rope["rope_type"] == "llama3":
        rope.setdefault("original_max_position_embeddings", raw.get("max_position_embeddings"))
    return {
        name: value
        for name, value in rope.items()
        if (name, value) != ("partial_rotary_factor", None)
    }


def with_type(rope):
    """Rope parameters with their rope_type, which was once `type`."""
    return {
        "rope_type": rope.get("type", "default"),
        **{name: rope[name] for name in rope if name != "type"},
    }
