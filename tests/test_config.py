"""What config.json says in two places: rotary parameters, and whether the embeddings are tied.

The stored values are those of transformers 5.3.0. Where it is installed they are compared with it.
"""

import json

import checkpoints
import pytest
import torch
from checkpoints import IDS
from safetensors.torch import load_file, save_file

from minimas import InputError
from minimas.compat import rope
from minimas.config import read_config
from minimas.load import decoder_without_weights, load_model


def edit_config(folder, text=None, top=None):
    """Change the decoder's part of config.json, and its top level; ... removes a field."""
    file = folder / "config.json"
    whole = json.loads(file.read_text())
    decoder = whole.get("text_config", whole)
    for part, changes in (decoder, text), (whole, top):
        for name, value in (changes or {}).items():
            if value is ...:
                part.pop(name, None)
            else:
                part[name] = value
    file.write_text(json.dumps(whole))


@pytest.fixture
def warnings(monkeypatch):
    """The warnings of compat/rope.py."""
    told = []
    monkeypatch.setattr(rope, "warn_once", told.append)
    return told


LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 1e4,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
}
LINEAR = {"rope_type": "linear", "factor": 4.0}
OLD_LINEAR = {"type": "linear", "factor": 4.0}
DEFAULT = {"rope_type": "default"}
SLIDING = {"rope_type": "default", "rope_theta": 1e4}
original = "original_max_position_embeddings"
partial = "partial_rotary_factor"

# name -> (model_type, changes to the decoder's part of config.json, its rope_parameters as the model uses them)
ROPE = {
    "the original length at the top goes first": (
        "llama",
        {"rope_parameters": {**LLAMA3, original: 32}, original: 64},
        {**LLAMA3, original: 64},
    ),
    "the original length at the top alone": (
        "llama",
        {"rope_parameters": LLAMA3, original: 24},
        {**LLAMA3, original: 24},
    ),
    "the original length at the top, over rope_scaling": (
        "qwen3",
        {"rope_parameters": ..., "rope_scaling": {**LLAMA3, original: 32}, original: 64},
        {**LLAMA3, original: 64},
    ),
    "no original length, and no length either": (
        "llama",
        {"rope_parameters": LLAMA3, "max_position_embeddings": ...},
        {**LLAMA3, original: 2048},
    ),
    "Gemma reads no original length at the top": (
        "gemma3",
        {"rope_parameters": {"full_attention": {**LLAMA3, original: 32}}, original: 64},
        {"full_attention": {**LLAMA3, original: 32}, "sliding_attention": SLIDING},
    ),
    "rope_scaling goes before rope_parameters": (
        "llama",
        {"rope_parameters": {**DEFAULT, "rope_theta": 5e5}, "rope_scaling": LINEAR},
        {**LINEAR, "rope_theta": 1e4},
    ),
    "rope_scaling of an older type goes before rope_parameters": (
        "mistral",
        {"rope_parameters": DEFAULT, "rope_scaling": OLD_LINEAR, "rope_theta": 5e5},
        {**LINEAR, "rope_theta": 5e5},
    ),
    "rope_type goes before type": (
        "llama",
        {"rope_parameters": {**LINEAR, "type": "default", "rope_theta": 1e4}},
        {**LINEAR, "rope_theta": 1e4},
    ),
    "rope_theta inside goes before the top": (
        "qwen2",
        {"rope_parameters": {**DEFAULT, "rope_theta": 7e5}, "rope_theta": 1e6},
        {**DEFAULT, "rope_theta": 7e5},
    ),
    "the part of a scaled type at the top goes first": (
        "qwen3_5_text",
        {"rope_parameters": {**LINEAR, "rope_theta": 1e4, partial: 0.25}, partial: 0.5},
        {**LINEAR, "rope_theta": 1e4, partial: 0.5},
    ),
    "the default part of a scaled type goes first": (
        "qwen3_5_text",
        {"rope_parameters": {**LINEAR, "rope_theta": 1e4, partial: 0.5}},
        {**LINEAR, "rope_theta": 1e4, partial: 0.25},
    ),
    "a part that is null at the top is the whole": (
        "qwen3_5_text",
        {"rope_parameters": SLIDING, partial: None},
        {**SLIDING, partial: 1.0},
    ),
    "Gemma's rope_scaling is laid over full attention": (
        "gemma3",
        {
            "rope_parameters": {"full_attention": {**LINEAR, "rope_theta": 1e5}},
            "rope_scaling": {"rope_type": "linear", "factor": 2.0},
        },
        {
            "full_attention": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e5},
            "sliding_attention": SLIDING,
        },
    ),
    "Gemma's rope_scaling has no type, only a rope_type": (
        "gemma3",
        {"rope_parameters": ..., "rope_scaling": OLD_LINEAR},
        {
            "full_attention": {"rope_type": "default", "factor": 4.0, "rope_theta": 1e6},
            "sliding_attention": SLIDING,
        },
    ),
    "Gemma's parameters of sliding attention alone": (
        "gemma3",
        {"rope_parameters": {"sliding_attention": {"rope_theta": 3e4}}, "rope_theta": 2e6},
        {
            "full_attention": {"rope_type": "default", "rope_theta": 2e6},
            "sliding_attention": {"rope_type": "default", "rope_theta": 3e4},
        },
    ),
    "Gemma's bases on both levels": (
        "gemma3",
        {
            "rope_parameters": {"full_attention": {**LINEAR, "rope_theta": 1e5}},
            "rope_theta": 2e6,
            "rope_local_base_freq": 3e4,
        },
        {
            "full_attention": {**LINEAR, "rope_theta": 1e5},
            "sliding_attention": {"rope_type": "default", "rope_theta": 3e4},
        },
    ),
}


@pytest.mark.parametrize("name", ROPE)
def test_rope_on_two_levels(name, tmp_path, warnings):
    model_type, changes, expected = ROPE[name]
    folder = checkpoints.make_agent(tmp_path, model_type)
    edit_config(folder, changes)
    assert read_config(folder)[1].rope_parameters == expected


@pytest.mark.parametrize("name", ROPE)
def test_rope_on_two_levels_rotates_as_in_transformers(name, tmp_path, warnings):
    transformers = pytest.importorskip("transformers")
    model_type, changes, _ = ROPE[name]
    folder = checkpoints.make_agent(tmp_path, model_type)
    edit_config(folder, changes)
    ours = dict(decoder_without_weights(folder)[0].named_buffers())
    config = transformers.AutoConfig.from_pretrained(folder).get_text_config()
    rotary = transformers.AutoModelForCausalLM.from_config(config).model.rotary_emb
    for buffer, frequency in ours.items():
        layer_type = buffer.removeprefix("frequency").removeprefix("_")
        theirs = getattr(rotary, f"{layer_type}_inv_freq" if layer_type else "inv_freq")
        torch.testing.assert_close(frequency, theirs)


def test_logits_with_the_original_length_on_both_levels(tmp_path):
    """The example of the report: the logits were off by 2.4 to 3.1."""
    pytest.importorskip("transformers")
    import reference

    folder = checkpoints.make_agent(tmp_path, "llama")
    edit_config(folder, {original: 8})
    theirs = reference.hidden_and_logits(folder, IDS)[1]
    model = load_model(folder)
    with torch.no_grad():
        h = model(model.embed(IDS), torch.arange(IDS.shape[1])[None], model.make_cache(1))
        assert (model.logits(h) - theirs).abs().max() < 1e-4


@pytest.mark.parametrize(
    "model_type, changes, complaint",
    [
        ("llama", {"rope_parameters": LLAMA3, original: None}, f"{original} .* is None"),
        ("llama", {"rope_parameters": {**LLAMA3, original: 32}, original: "8"}, "is '8'"),
        (
            "llama",
            {"rope_parameters": {**LINEAR, "rope_theta": 1e4, partial: 0.5}},
            "partial_rotary_factor is 0.5, expected 1 for rope type linear",
        ),
        (
            "gemma3",
            {"rope_parameters": {"full_attention": LINEAR}, partial: 0.5},
            "partial_rotary_factor is 0.5, expected 1 for rope type linear",
        ),
    ],
)
def test_rope_that_nobody_can_read(tmp_path, model_type, changes, complaint):
    folder = checkpoints.make_agent(tmp_path, model_type)
    edit_config(folder, changes)
    with pytest.raises(InputError, match=complaint):
        read_config(folder)


def test_rope_that_is_named_twice_is_told(tmp_path, warnings):
    folder = checkpoints.make_agent(tmp_path, "llama")
    edit_config(folder, {"rope_scaling": LINEAR})
    read_config(folder)
    assert len(warnings) == 1 and "differ; rope_scaling is used" in warnings[0]
    warnings.clear()
    edit_config(folder, {"rope_parameters": {**LINEAR, "rope_theta": 1e4}})
    read_config(folder)
    assert not warnings, "they say the same"


# Tied embeddings. What config.json says in text_config and at the top, and the parts that are stored -> what is loaded:
# "one" parameter for both, "two", or None: something is missing.
UNTIED = {"embedding": None, "head": None, "both": "two", "neither": None}
TIED = {"embedding": "one", "head": "one", "both": "two", "neither": None}
CASES = {  # (model_type, tie_word_embeddings of the decoder, and at the top); ... is absent
    ("llama", ..., ...): UNTIED,
    ("llama", None, ...): UNTIED,
    ("llama", False, ...): UNTIED,
    ("llama", True, ...): TIED,
    ("qwen3_5_text", True, ...): TIED,
    ("gemma3", ..., ...): TIED,
    ("gemma3", True, ...): TIED,
    ("gemma3", False, ...): TIED,
    ("gemma3", False, True): TIED,
    ("gemma3", ..., False): UNTIED,
    ("gemma3", True, False): UNTIED,
    ("qwen3_5", ..., ...): UNTIED,
    ("qwen3_5", True, ...): TIED,
    ("qwen3_5", True, False): TIED,
    ("qwen3_5", False, True): UNTIED,
}


def tied_agents(folder, model_type, text, top):
    """An agent of the case in the folder, without embedding and head; the name of its embedding, and both tensors."""
    made_of = "qwen3_5_text" if model_type == "qwen3_5" else model_type
    checkpoints.make_agent(folder, made_of)
    if model_type == "qwen3_5":
        text_config = json.loads((folder / "config.json").read_text())
        whole = {"model_type": "qwen3_5", "dtype": "float32", "text_config": text_config}
        (folder / "config.json").write_text(json.dumps(whole))
    edit_config(folder, {"tie_word_embeddings": text})
    if model_type != made_of or model_type == "gemma3":
        edit_config(folder, top={"tie_word_embeddings": top})
    file = folder / "model.safetensors"
    weights = load_file(file)
    name = next(key for key in weights if key.endswith("embed_tokens.weight"))
    weights.pop("lm_head.weight", None)
    embedding = weights.pop(name)
    return weights, name, embedding, embedding.flip(0).clone()


@pytest.fixture(params=CASES, ids=str)
def case(request):
    return request.param


def stored_in_turn(folder, case):
    """Store the embedding, the head, both, or neither -> what is stored, and what is expected of it."""
    weights, name, embedding, head = tied_agents(folder, *case)
    parts = {name: embedding, "lm_head.weight": head}
    kept = {"embedding": [name], "head": ["lm_head.weight"], "both": list(parts), "neither": []}
    for stored, names in kept.items():
        chosen = {key: parts[key] for key in names}
        save_file(weights | chosen, folder / "model.safetensors", metadata={"format": "pt"})
        yield stored, CASES[case][stored], embedding, head


def test_tied_embeddings(case, tmp_path):
    for stored, expected, embedding, head in stored_in_turn(tmp_path, case):
        if expected is None:
            with pytest.raises(InputError, match="the weights lack 1 of|the weights lack 2 of"):
                load_model(tmp_path)
            continue
        model = load_model(tmp_path)
        tied = model.lm_head.weight is model.embed_tokens.weight
        assert tied == (expected == "one"), stored
        assert torch.equal(model.embed_tokens.weight, head if stored == "head" else embedding)
        assert torch.equal(model.lm_head.weight, embedding if stored == "embedding" else head)


def test_tied_embeddings_as_transformers_ties_them(case, tmp_path):
    transformers = pytest.importorskip("transformers")
    for stored, expected, *_ in stored_in_turn(tmp_path, case):
        model, info = transformers.AutoModelForCausalLM.from_pretrained(
            tmp_path, output_loading_info=True
        )
        embedding = model.get_input_embeddings().weight
        head = model.get_output_embeddings().weight
        lacks = [key for key in info["missing_keys"] if "embed_tokens" in key or "lm_head" in key]
        theirs = "one" if embedding is head else "two"
        assert expected == (None if lacks else theirs), stored
