"""Folders in the released layout, whole and broken."""

import errno
import json
import os
from pathlib import Path
from types import SimpleNamespace

import checkpoints
import pytest
import torch
from checkpoints import IDS
from safetensors.torch import load_file, save_file

from minimas import InputError, load_mas_system
from minimas.agent import load_agent
from minimas.common import write_atomic
from minimas.config import read_config
from minimas.load import (
    checkpoint_folder,
    load_generation_config,
    load_inner_link,
    load_model,
    load_outer_links,
)
from minimas.styles import STYLES
from minimas.tokenizer import load_tokenizer
from minimas.train.save import copy_agent

EDGES = STYLES["sequential_light"].edges


@pytest.fixture
def folder(tmp_path):
    return checkpoints.make_agent(tmp_path / "agent", "llama")


def edit(file, **changes):
    content = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({key: value for key, value in content.items() if value is not ...}))


@torch.no_grad()
def states(folder):
    model = load_model(folder)
    return model(model.embed(IDS), torch.arange(IDS.shape[1])[None], model.make_cache(1))


def test_older_spelling_of_config(folder):
    expected = states(folder)
    rope = json.loads((folder / "config.json").read_text())["rope_parameters"]
    theta = rope.pop("rope_theta")
    edit(
        folder / "config.json",
        rope_parameters=...,
        dtype=...,
        rope_scaling=rope,
        rope_theta=theta,
        torch_dtype="float32",
    )
    assert torch.equal(states(folder), expected)
    rope["type"] = rope.pop("rope_type")  # older still
    edit(folder / "config.json", rope_scaling=rope)
    assert torch.equal(states(folder), expected)


@pytest.mark.parametrize("prefix", ("language_model.model.", "model.language_model."))
def test_names_of_weights(folder, prefix):
    expected, file = states(folder), folder / "model.safetensors"
    weights = {prefix + name.removeprefix("model."): t for name, t in load_file(file).items()}
    save_file(
        weights | {"vision_tower.x": torch.ones(2), "model.vision_tower.x": torch.ones(3)}, file
    )
    assert torch.equal(states(folder), expected)


def test_a_tied_head_that_is_stored_all_the_same(folder):
    """One copy if it is the same; if it is not, the file is believed, as by transformers 5.3."""
    weights, file = load_file(folder / "model.safetensors"), folder / "model.safetensors"
    for head in (
        weights["model.embed_tokens.weight"].clone(),
        weights["model.embed_tokens.weight"] + 1,
    ):
        save_file(weights | {"lm_head.weight": head}, file)
        model = load_model(folder)
        assert torch.equal(model.lm_head.weight, head)
        assert (model.lm_head.weight is model.embed_tokens.weight) == torch.equal(
            head, model.embed_tokens.weight
        )


def test_shards(folder):
    expected, file = states(folder), folder / "model.safetensors"
    weights = load_file(file)
    file.unlink()
    parts = {f"{i}/model.safetensors": dict(list(weights.items())[i::2]) for i in range(2)}
    (folder / "0").mkdir(), (folder / "1").mkdir()
    for name, part in parts.items():
        save_file(part, folder / name)
    index = {"weight_map": {key: name for name, part in parts.items() for key in part}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert torch.equal(states(folder), expected)
    for _ in range(2):
        copy_agent(folder, "math", folder / "copy")
        assert torch.equal(states(folder / "copy"), expected)


@pytest.mark.parametrize("name", ("model.safetensors", "tokenizer.json"))
def test_a_copy_does_not_keep_a_file_of_another_agent(folder, name):
    """Not even one of the same size."""
    copy_agent(folder, "math", folder / "copy")
    file, content = folder / "copy" / name, bytearray((folder / name).read_bytes())
    content[len(content) // 2] ^= 1
    file.unlink()  # it may be a hard link
    file.write_bytes(content)
    with pytest.raises(InputError, match=f"{name} belongs to another agent"):
        copy_agent(folder, "math", folder / "copy")


def test_a_file_that_cannot_be_written_leaves_nothing(tmp_path):
    with pytest.raises(TypeError):
        write_atomic(tmp_path / "x", lambda path: path.write_text("half") and path.write_text(None))
    assert not list(tmp_path.iterdir())


def test_dtype(folder):
    assert load_model(folder).norm.weight.dtype == torch.float32
    edit(folder / "config.json", dtype="bfloat16")
    assert load_model(folder).norm.weight.dtype == torch.bfloat16
    assert load_model(folder, dtype=torch.float16).frequency.dtype == torch.float32


def test_generation(folder):
    tokenizer = load_tokenizer(folder)
    for top_k in ..., None:
        edit(folder / "generation_config.json", eos_token_id=7, top_k=top_k)
        generation = load_generation_config(folder, tokenizer)
        assert set(generation.eos_ids) == {7, tokenizer.eos_id} and generation.top_k == 50
    (folder / "generation_config.json").unlink()  # as of some base models
    edit(folder / "config.json", eos_token_id=[8, 9])
    assert set(load_generation_config(folder, tokenizer).eos_ids) == {8, 9, tokenizer.eos_id}


def test_inner_link_of_the_task(folder):
    D = checkpoints.SIZES["hidden_size"]
    plain = load_inner_link(folder, "math", D).proj1.weight
    for task, seed in ("math", 5), ("code", 6):
        checkpoints.save_link(
            checkpoints.randomize(checkpoints.InnerLink(D), seed, 1.0),
            folder / f"adapter({task}).pt",
            torch.float32,
        )
    math, choice, code = (
        load_inner_link(folder, task, D).proj1.weight for task in ("math", "choice", "code")
    )
    assert (
        torch.equal(math, choice) and not torch.equal(math, code) and not torch.equal(math, plain)
    )
    manifest = {
        "tasks": {
            "math": {"adapter.pt": "adapter(code).pt"},
            "code": {"adapter.pt": "adapter(math).pt"},
        }
    }
    (folder / "innerlink_config.json").write_text(json.dumps(manifest))
    assert torch.equal(load_inner_link(folder, "math", D).proj1.weight, code)


def test_a_manifest_is_obeyed_or_refused(folder):
    D = checkpoints.SIZES["hidden_size"]
    for manifest, complaint in (
        ({"tasks": {"math": {"adapter.pt": "other.pt"}}}, "has no other.pt"),
        ({"tasks": {"math": {"adapter.pt": 5}}}, "tasks.math.adapter.pt is 5, expected a string"),
        ({"tasks": {"math": {"adapter.pt": "a/../../x.pt"}}}, "names a file outside"),
        ({"tasks": {"math": {"adapter.pt": "/x.pt"}}}, "names a file outside"),
        ({"tasks": {"math": {"adapter.pt": "..\\x.pt"}}}, "names a file outside"),
        ({"tasks": []}, "has no tasks.math"),
    ):
        (folder / "innerlink_config.json").write_text(json.dumps(manifest))
        with pytest.raises(InputError, match=complaint):
            load_inner_link(folder, "math", D)


@pytest.mark.parametrize(
    "index, complaint",
    [
        ({"weight_map": ["x"]}, "weight_map is .*, expected an object"),
        ({"weight_map": {"a": 1}}, "a is 1, expected a string"),
        ({"weight_map": {"a": "../x.safetensors"}}, "names a file outside"),
    ],
)
def test_an_index_of_shards_is_obeyed_or_refused(folder, index, complaint):
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(InputError, match=complaint):
        load_model(folder)


@pytest.mark.parametrize(
    "adapters, complaint",
    [
        ({}, "adapters is {}, expected a list"),
        (["x"], "has no legacy_key"),
        ([{"legacy_key": ["x"]}], "expected a string"),
        ({"filename": None}, "filename is None, expected a string"),
    ],
)
def test_a_manifest_of_outer_links(tmp_path, adapters, complaint):
    file = (
        checkpoints.make_links(tmp_path, {("a", "b"): "outer_ab"}, {"a": 48, "b": 40})
        / "outerlink_config.json"
    )
    if adapters and isinstance(adapters, dict):
        adapters = [json.loads(file.read_text())["adapters"][0] | adapters]
    edit(file, adapters=adapters)
    agents = {
        role: SimpleNamespace(model=SimpleNamespace(config=SimpleNamespace(hidden_size=D)))
        for role, D in (("a", 48), ("b", 40))
    }
    with pytest.raises(InputError, match=complaint):
        load_outer_links(tmp_path, "math", {("a", "b"): "outer_ab"}, agents)


def test_quantised_weights_are_refused(folder):
    weights = load_file(folder / "model.safetensors")
    save_file(
        weights | {"model.norm.weight": torch.ones(48, dtype=torch.int8)},
        folder / "model.safetensors",
    )
    with pytest.raises(InputError, match="model.norm.weight is stored as torch.int8.*quantised"):
        load_model(folder)


def test_a_saved_length_limit_cuts_nothing(folder):
    tokenizer = load_tokenizer(folder).fast
    tokenizer.enable_truncation(5)
    tokenizer.enable_padding(length=300)
    tokenizer.save(str(folder / "tokenizer.json"))
    assert len(load_tokenizer(folder).encode("x" * 200)) == 200


@pytest.mark.parametrize(
    "changes, complaint",
    [
        ({"eos_token": {}}, "has no eos_token.content"),
        ({"eos_token": {"content": 5}}, "eos_token.content is 5, expected a string"),
        (
            {"eos_token": {"content": "x", "lstrip": "no"}},
            "eos_token.lstrip is 'no', expected true or false",
        ),
        ({"extra_special_tokens": "<x>"}, "extra_special_tokens is '<x>', expected a list"),
        (
            {"additional_special_tokens": [5]},
            "extra_special_tokens.content is 5, expected a string",
        ),
        ({"added_tokens_decoder": ["<x>"]}, "added_tokens_decoder is .*, expected an object"),
        (
            {"added_tokens_decoder": {"300": {"lstrip": True}}},
            "has no added_tokens_decoder.300.content",
        ),
    ],
)
def test_special_tokens_that_cannot_be(folder, changes, complaint):
    edit(folder / "tokenizer_config.json", **changes)
    with pytest.raises(InputError, match="tokenizer_config.json.*" + complaint):
        load_tokenizer(folder)


def test_a_token_without_an_embedding(folder):
    tokenizer = load_tokenizer(folder).fast
    tokenizer.add_special_tokens(["<more>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    agent = load_agent(folder, "math", "cpu", None)
    agent.embed([["plain"]])
    with pytest.raises(InputError, match="token 260, '<more>', .* has embeddings for 260"):
        agent.embed([["a<more>"]])


FILES = (
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "adapter.pt",
)


@pytest.mark.parametrize(
    "content", ['{"a":' + "[" * 200000, '{"a": ' + "1" * 5000 + "}", '{"a": "\\ud800"}']
)
def test_json_that_python_does_not_read(folder, content):
    (folder / "config.json").write_text(content)
    with pytest.raises(InputError, match="config.json is not"):
        load_model(folder)


def test_a_folder_that_cannot_be_read(folder, monkeypatch):
    """A name that is too long for the system, one behind a closed folder, and a closed folder."""
    for source in ("x" * 300, f"{folder}/{300 * 'x'}"):
        with pytest.raises(
            InputError, match="^checkpoint: .* cannot be looked up .*too long.*give"
        ):
            checkpoint_folder(source, "config.json")

    def refuse(path):
        raise PermissionError(errno.EACCES, "Permission denied")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "is_dir", refuse)  # root is never refused
        with pytest.raises(InputError, match=r"cannot be looked up \(Permission denied\): give"):
            checkpoint_folder(folder, "config.json")
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(InputError, match="you may not read the folder .*change its permissions"):
        checkpoint_folder(folder, "config.json")


@pytest.mark.parametrize("name", [name for name in FILES if name != "generation_config.json"])
def test_a_missing_file_is_named(folder, name):
    (folder / name).unlink()
    with pytest.raises(InputError, match=f"agent has no {name}"):
        load_agent(folder, "math", "cpu", None)


@pytest.mark.parametrize("name", FILES)
def test_a_damaged_file_is_named(folder, name):
    content = (folder / name).read_bytes()
    (folder / name).write_bytes(
        b"{%" + content[: len(content) // 2]
        if name.endswith("jinja")
        else content[: len(content) // 2]
    )
    with pytest.raises(InputError, match=f"{name}.*fetch"):
        load_agent(folder, "math", "cpu", None)


@pytest.mark.parametrize(
    "changes, complaint",
    [
        ({"model_type": "gpt2"}, "'gpt2' is not known, expected one of llama, mistral, qwen2"),
        ({"model_type": ...}, "None is not known"),
        ({"model_type": ["llama"]}, "is not known"),
        ({"model_type": "gemma3", "text_config": "x"}, "text_config is 'x', expected an object"),
        *[
            ({name: value}, f"{name} is .*, expected a whole number from 1")
            for name, value in (
                ("hidden_size", "x"),
                ("hidden_size", 48.0),
                ("hidden_size", True),
                ("vocab_size", 0),
                ("vocab_size", 2**24 + 1),
                ("num_attention_heads", None),
                ("num_key_value_heads", -1),
                ("head_dim", "x"),
                ("head_dim", 0),
                ("head_dim", [16]),
                ("num_hidden_layers", 0),
                ("num_hidden_layers", 1001),
            )
        ],
        *[
            ({"rms_norm_eps": value}, "rms_norm_eps is .*, expected a number above 0")
            for value in ("x", None, True, 0, -1e-6, float("nan"), float("inf"), 10**400)
        ],
        *[
            ({"tie_word_embeddings": value}, "tie_word_embeddings is .*, expected true or false")
            for value in ("false", 1, [])
        ],
        (
            {"num_key_value_heads": 4},
            "num_attention_heads is 6, expected a multiple of num_key_value_heads 4",
        ),
        ({"head_dim": 5}, "a head is 5 wide, expected an even width of 2 or more"),
        ({"rope_parameters": {"rope_type": ["default"], "rope_theta": 1e4}}, "is not known"),
        *[
            (
                {"rope_parameters": {"rope_type": "linear", "rope_theta": theta, "factor": factor}},
                complaint,
            )
            for theta, factor, complaint in (
                (0, 8, "rope_theta of rope type linear is 0, expected a number above 0"),
                (float("nan"), 8, "is nan"),
                (True, 8, "rope_theta .* is True"),
                (1e4, -1, "factor .* is -1"),
                (1e4, "8", "factor .* is '8'"),
                (1e4, None, "factor .* is None"),
            )
        ],
        (
            {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e4}}},
            "of several layer types",
        ),
        (
            {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}},
            "'yarn' is not known, expected one of default, linear, llama3",
        ),
        ({"hidden_act": "gelu"}, "'gelu'"),
        ({"attention_bias": True}, "attention_bias"),
        ({"hidden_size": ...}, "lacks hidden_size"),
        ({"hidden_size": 64}, "config.json makes it shape"),
        ({"num_hidden_layers": 4}, "the weights lack 9 of 39 tensors, the first is layers.3"),
        ({"num_hidden_layers": 2}, "no such tensor"),
        (
            {"tie_word_embeddings": False},
            "the weights lack 1 of 30 tensors, the first is lm_head.weight",
        ),
        ({"dtype": "int7"}, "int7"),
    ],
)
def test_a_config_that_does_not_fit(folder, changes, complaint):
    edit(folder / "config.json", **changes)
    with pytest.raises(InputError, match=complaint):
        load_model(folder)


@pytest.mark.parametrize(
    "model_type, changes, complaint",
    [
        (
            "qwen3_5_text",
            {"layer_types": ["linear_attention"] * 3},
            "layer_types is .*, expected 4 of",
        ),
        (
            "qwen3_5_text",
            {"layer_types": ["linear_attention"] * 3 + ["sliding_attention"]},
            "expected 4 of full_attention, linear_attention",
        ),
        (
            "gemma3",
            {"layer_types": ["sliding_attention"] * 5 + ["strange"]},
            "'strange'.*, expected 6 of",
        ),
        ("gemma3", {"layer_types": 3}, "layer_types is 3, expected 6 of"),
        (
            "gemma3",
            {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}},
            "has no full_attention",
        ),
        (
            "qwen2",
            {"layer_types": ["sliding_attention"] * 3, "sliding_window": 4},
            "sliding_window is null or not in use",
        ),
        (
            "qwen2",
            {
                "layer_types": ["sliding_attention"] * 3,
                "use_sliding_window": True,
                "sliding_window": None,
            },
            "sliding_window is null",
        ),
        ("llama", {"rope_parameters": "x"}, "rope_parameters is 'x', expected an object"),
        (
            "llama",
            {"rope_parameters": {"rope_type": "default", "rope_theta": None}},
            "rope_theta of rope type default is None",
        ),
        (
            "gemma3",
            {"rope_parameters": {"full_attention": "x", "sliding_attention": {}}},
            "is 'x', expected an object",
        ),
        (
            "gemma3",
            {"use_bidirectional_attention": True},
            "use_bidirectional_attention True is not supported",
        ),
        ("gemma3", {"sliding_window": None}, "sliding_window is None, expected a whole number"),
        (
            "qwen2",
            {"use_sliding_window": "no"},
            "use_sliding_window is 'no', expected true or false",
        ),
        (
            "qwen2",
            {"max_window_layers": -1},
            "max_window_layers is -1, expected a whole number from 0",
        ),
        (
            "qwen3_5_text",
            {"linear_num_value_heads": 3},
            "linear_num_value_heads is 3, expected a multiple of",
        ),
        *[
            (
                "qwen3_5_text",
                {"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": factor}},
                complaint,
            )
            for factor, complaint in (
                ("x", "partial_rotary_factor .*'x'"),
                (1.5, "partial_rotary_factor is 1.5, expected 1"),
            )
        ],
        ("llama", {"dtype": ["float32"]}, "dtype .*float32.* is not known"),
    ],
)
def test_layers_that_no_decoder_has(tmp_path, model_type, changes, complaint):
    folder = checkpoints.make_agent(tmp_path, model_type)
    config = json.loads((folder / "config.json").read_text())
    text = config.get("text_config", config) | changes
    (folder / "config.json").write_text(
        json.dumps(config | {"text_config": text} if "text_config" in config else text)
    )
    with pytest.raises(InputError, match=complaint):
        load_model(folder)


def test_null_is_as_good_as_absent(tmp_path):
    folder = checkpoints.make_agent(tmp_path, "gemma3")
    config = json.loads((folder / "config.json").read_text())
    names = "use_bidirectional_attention", "attention_bias", "rope_scaling", "tie_word_embeddings"
    edit(folder / "config.json", text_config=config["text_config"] | dict.fromkeys(names))
    assert read_config(folder)[1].head_dim == 16
    edit(
        folder / "config.json",
        text_config=config["text_config"] | dict.fromkeys([*names, "head_dim"]),
    )
    with pytest.raises(InputError, match="head_dim is None"):
        read_config(folder)


def test_two_spellings_that_agree(folder):
    expected, raw = states(folder), json.loads((folder / "config.json").read_text())
    rope = dict(raw["rope_parameters"])
    edit(folder / "config.json", rope_scaling=rope)
    assert torch.equal(states(folder), expected)
    rope["type"] = rope.pop("rope_type")
    edit(folder / "config.json", rope_parameters=rope)
    assert torch.equal(states(folder), expected)


def test_windows_begin_where_transformers_has_them(tmp_path):
    """A config of an older Qwen2 names neither the layers' kinds nor the first one with a window: the 29th."""
    folder = checkpoints.make_agent(tmp_path, "qwen2")
    config = {
        "layer_types": ...,
        "max_window_layers": ...,
        "use_sliding_window": True,
        "sliding_window": 4,
        "num_hidden_layers": 30,
    }
    edit(folder / "config.json", **config)
    assert read_config(folder)[1].windows == [None] * 28 + [4, 4]
    edit(folder / "config.json", use_sliding_window=False)
    assert read_config(folder)[1].windows == [None] * 30


def test_generation_config(folder):
    for changes, complaint in (
        ({"eos_token_id": "x"}, "'x'"),
        ({"eos_token_id": [1, "y"]}, "'y'"),
        ({"eos_token_id": [[1]]}, "1"),
        ({"eos_token_id": True}, "True"),
        *[({"eos_token_id": 1, "top_k": k}, str(k)) for k in (2.5, -1, True)],
    ):
        edit(folder / "generation_config.json", **changes)
        with pytest.raises(InputError, match=f"generation_config.json.*{complaint}.*whole number"):
            load_agent(folder, "math", "cpu", None)
    edit(folder / "generation_config.json", top_k=0)
    assert load_agent(folder, "math", "cpu", None).generation_config.top_k == 0, "no limit"


def test_links_of_other_agents(tmp_path):
    folders = checkpoints.make_system(tmp_path)
    widths = {"planner": 48, "critic": 40, "solver": 40}
    with pytest.raises(InputError, match="Critic-Solver.*another's.*size mismatch for ln_target"):
        load_mas_system(
            "sequential_light",
            checkpoints=folders
            | {"links": checkpoints.make_links(tmp_path / "other", EDGES, widths)},
        )
    edges = {edge: key for edge, key in EDGES.items() if key != "outer_31"}
    with pytest.raises(InputError, match="lists no link outer_31"):
        load_mas_system(
            "sequential_light",
            checkpoints=folders
            | {"links": checkpoints.make_links(tmp_path / "few", edges, widths | {"solver": 56})},
        )


@pytest.mark.parametrize(
    "options, complaint",
    [
        ({"style": "paralell"}, "style 'paralell'.*tiny"),
        ({"task": "poetry"}, "task 'poetry'"),
        ({"dtype": "int8"}, "dtype 'int8'"),
        ({"dtype": "float33"}, "float33"),
        ({"device": "tpu"}, "tpu"),
        ({"device": "hpu"}, "'hpu' cannot be used"),
        ({"device": "mps"}, r"'mps' cannot be used \(Could not run [^ ]* with .{,60}\): try cpu$"),
        ({"device": ""}, "'' cannot be used"),
        ({"device": "privateuseone"}, "'privateuseone' cannot be used"),
        ({"device": "cuda:99"}, "cuda:99"),
        ({"checkpoints": {"judge": "x"}}, "'judge'.*planner, critic, solver"),
        ({"checkpoints": {"planner": "/nowhere"}}, "/nowhere is not a folder"),
    ],
)
def test_what_cannot_be_loaded(options, complaint):
    with pytest.raises(InputError, match=complaint):
        load_mas_system(**options)


OLD_OR_ODD = [  # model_type, changes to config.json -> rope_parameters, key/value heads and eps, as in transformers 5.3
    (
        "llama",
        {"rope_parameters": {"rope_type": "default"}, "rope_theta": 5e5},
        {"rope_type": "default", "rope_theta": 5e5},
        2,
        1e-5,
    ),
    (
        "llama",
        {"rope_parameters": {"rope_type": "linear", "factor": 8.0}, "rope_theta": 5e5},
        {"rope_type": "linear", "factor": 8.0, "rope_theta": 5e5},
        2,
        1e-5,
    ),
    (
        "llama",
        {
            "rope_parameters": {
                "rope_type": "llama3",
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "rope_theta": 1e4,
            },
            "max_position_embeddings": 500,
        },
        {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "rope_theta": 1e4,
            "original_max_position_embeddings": 500,
        },
        2,
        1e-5,
    ),
    (
        "llama",
        {"rope_parameters": ..., "num_key_value_heads": ..., "rms_norm_eps": ...},
        {"rope_type": "default", "rope_theta": 1e4},
        6,
        1e-6,
    ),
    (
        "llama",
        {"rope_parameters": ..., "num_key_value_heads": None},
        {"rope_type": "default", "rope_theta": 1e4},
        6,
        1e-5,
    ),
    (
        "mistral",
        {"rope_parameters": ..., "num_key_value_heads": ..., "num_attention_heads": 16},
        {"rope_type": "default", "rope_theta": 1e4},
        8,
        1e-5,
    ),
    (
        "qwen2",
        {"attention_bias": True, "rope_parameters": {"rope_type": "default"}, "rope_theta": 7e5},
        {"rope_type": "default", "rope_theta": 7e5},
        2,
        1e-6,
    ),
    (
        "qwen3_5_text",
        {
            "rope_parameters": {"rope_type": "default"},
            "rope_theta": 3e4,
            "partial_rotary_factor": 0.5,
        },
        {"rope_type": "default", "rope_theta": 3e4, "partial_rotary_factor": 0.5},
        2,
        1e-6,
    ),
    (
        "qwen3_5_text",
        {
            "rope_parameters": {
                "rope_type": "default",
                "partial_rotary_factor": 0.125,
                "rope_theta": 1e4,
            },
            "partial_rotary_factor": 0.5,
        },
        {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.125},
        2,
        1e-6,
    ),
    (
        "gemma3",
        {
            "rope_parameters": {"full_attention": {"rope_type": "linear", "factor": 4.0}},
            "rope_theta": 2e6,
            "rope_local_base_freq": 2e4,
        },
        {
            "full_attention": {"rope_type": "linear", "factor": 4.0, "rope_theta": 2e6},
            "sliding_attention": {"rope_type": "default", "rope_theta": 2e4},
        },
        2,
        1e-6,
    ),
]


@pytest.mark.parametrize("model_type, changes, rope, kv_heads, eps", OLD_OR_ODD)
def test_fields_that_are_absent_or_on_another_level(
    tmp_path, model_type, changes, rope, kv_heads, eps
):
    folder = checkpoints.make_agent(tmp_path, model_type)
    whole = json.loads((folder / "config.json").read_text())
    text = {
        key: value
        for key, value in (whole.get("text_config", whole) | changes).items()
        if value is not ...
    }
    (folder / "config.json").write_text(
        json.dumps(whole | {"text_config": text} if "text_config" in whole else text)
    )
    config = read_config(folder)[1]
    assert (config.rope_parameters, config.num_key_value_heads, config.rms_norm_eps) == (
        rope,
        kv_heads,
        eps,
    )
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoConfig.from_pretrained(folder).get_text_config()
    assert (theirs.rope_parameters, theirs.num_key_value_heads, theirs.rms_norm_eps) == (
        rope,
        kv_heads,
        eps,
    )


def test_windows_and_heads_that_older_configs_leave_out(tmp_path):
    """The defaults of transformers: a window of 4096 in Mistral, heads of 128 in Qwen3, and others in Qwen3.5."""
    for model_type, name, default in (
        ("mistral", "sliding_window", 4096),
        ("qwen3", "head_dim", 128),
        ("qwen3_5_text", "head_dim", 256),
        ("qwen3_5_text", "num_key_value_heads", 4),
    ):
        folder = checkpoints.make_agent(tmp_path / name / model_type, model_type)
        file = folder / "config.json"
        edit(file, **{name: ..., "num_attention_heads": 8})
        assert getattr(read_config(folder)[1], name) == default
        if model_type == "qwen3_5_text":  # transformers cannot make such a model
            edit(file, **{name: None})
            with pytest.raises(InputError, match=f"{name} is None, expected a whole number"):
                read_config(folder)
    folder = tmp_path / "sliding_window" / "mistral"
    edit(folder / "config.json", sliding_window=None)
    assert read_config(folder)[1].windows == [None] * 3


def test_tied_embeddings_named_at_the_top_only(tmp_path):
    """A text and image model: the top of config.json speaks for the whole."""
    folder = checkpoints.make_agent(tmp_path, "gemma3")
    expected, raw = states(folder), json.loads((folder / "config.json").read_text())
    text = {key: value for key, value in raw["text_config"].items() if key != "tie_word_embeddings"}
    edit(folder / "config.json", text_config=text, tie_word_embeddings=True)
    assert torch.equal(states(folder), expected) and read_config(folder)[1].tie_word_embeddings
