"""Which file a tensor comes from, and what is said of a folder that is no checkpoint in the released layout."""

import importlib.util
import json
import shutil

import checkpoints
import pytest
import torch
from checkpoints import IDS
from safetensors.torch import load_file, save_file

from minimas import InputError
from minimas.agent import load_agent
from minimas.common import QUANTIZED
from minimas.load import checkpoint_folder, load_model, load_outer_links
from minimas.quantize import named_weights

INDEX = "model.safetensors.index.json"
SHARDS = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


@pytest.fixture
def folder(tmp_path):
    return checkpoints.make_agent(tmp_path / "agent", "llama")


@torch.no_grad()
def states(folder):
    model = load_model(folder)
    return model(model.embed(IDS), torch.arange(IDS.shape[1])[None], model.make_cache(1))


def split(folder):
    """Put the weights of a folder into two shards -> the tensors of each, {tensor: shard}, and all tensors."""
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    parts = [dict(list(weights.items())[i::2]) for i in range(2)]
    weight_map = {key: name for name, part in zip(SHARDS, parts, strict=True) for key in part}
    write(folder, parts, weight_map)
    return parts, weight_map, weights


def write(folder, parts, weight_map):
    for name, part in zip(SHARDS, parts, strict=True):
        save_file(part, folder / name, metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": weight_map}  # transformers insists on the first
    (folder / INDEX).write_text(json.dumps(index))


def assert_as_transformers(folder, expected, agrees=True):
    """Where transformers is installed, it computes the same states of the folder, or, for once, does not."""
    if importlib.util.find_spec("transformers") is None:
        return
    import reference

    difference = (reference.hidden_and_logits(folder, IDS)[0] - expected).abs().max()
    assert (difference < 1e-4) == agrees


def stale(tensors):
    return {key: tensor + 1 for key, tensor in tensors.items()}


# Shards


@pytest.mark.parametrize("newer", (0, 1))
def test_the_index_says_which_shard_holds_a_tensor(folder, newer):
    """The other shard also has a stale copy of what this one holds."""
    expected = states(folder)
    parts, weight_map, _ = split(folder)
    parts[1 - newer] |= stale(parts[newer])
    write(folder, parts, weight_map)
    assert torch.equal(states(folder), expected)
    # transformers 5.3 takes the copy of the last shard, whatever the index says.
    assert_as_transformers(folder, expected, agrees=newer == 1)


def test_a_stale_copy_of_another_shape_is_not_read(folder):
    expected = states(folder)
    parts, weight_map, _ = split(folder)
    parts[1] |= {key: torch.ones(3, dtype=torch.int8) for key in parts[0]}
    write(folder, parts, weight_map)
    assert torch.equal(states(folder), expected)


def test_a_file_that_the_index_does_not_name_is_not_read(folder):
    expected = states(folder)
    *_, weights = split(folder)
    save_file(stale(weights), folder / "model-00003-of-00003.safetensors")
    assert torch.equal(states(folder), expected)


def test_a_tensor_that_its_shard_lacks(folder):
    """A copy in another shard is not taken for it."""
    parts, weight_map, _ = split(folder)
    key = "model.norm.weight"
    holder = SHARDS.index(weight_map[key])
    parts[1 - holder][key] = parts[holder].pop(key)
    write(folder, parts, weight_map)
    with pytest.raises(
        InputError, match=f"first is norm.weight; {INDEX} says that {SHARDS[holder]} .* it does not"
    ):
        load_model(folder)


def test_a_tied_head_that_only_the_index_names(folder):
    """Some tools list it and then leave it out, since it is the embedding."""
    expected = states(folder)
    parts, weight_map, _ = split(folder)
    write(folder, parts, weight_map | {"lm_head.weight": SHARDS[1]})
    assert torch.equal(states(folder), expected)
    assert_as_transformers(folder, expected)


def test_a_tensor_that_the_index_forgets(folder):
    """It is taken from the shard that has it, as by transformers; if two differ, nobody knows which is meant."""
    expected = states(folder)
    parts, weight_map, _ = split(folder)
    key = "model.norm.weight"
    holder = SHARDS.index(weight_map.pop(key))
    write(folder, parts, weight_map)
    assert torch.equal(states(folder), expected)
    assert_as_transformers(folder, expected)
    parts[1 - holder][key] = parts[holder][key].clone()
    write(folder, parts, weight_map)
    assert torch.equal(states(folder), expected)
    parts[1 - holder][key] += 1
    write(folder, parts, weight_map)
    with pytest.raises(InputError, match="norm.weight is stored twice, in .* with different num"):
        load_model(folder)


@pytest.mark.parametrize("kind", QUANTIZED)
def test_a_linear_that_is_stored_twice(tmp_path, kind):
    """Quantised or not, an identical copy is accepted and another one refused. A bias may be either's."""
    folder = checkpoints.make_agent(tmp_path / "agent", "qwen2", hidden_size=64)
    expected = load_model(folder, quantize=kind)
    parts, weight_map, _ = split(folder)
    key = "model.layers.0.self_attn.q_proj.weight"
    holder = SHARDS.index(weight_map.pop(key))
    parts[1 - holder][key] = parts[holder][key].clone()
    write(folder, parts, weight_map)
    model = load_model(folder, quantize=kind)
    names = dict(named_weights(model))
    assert names.keys() == dict(named_weights(expected)).keys()
    for name, weight in named_weights(expected):
        assert torch.equal(names[name], weight), name
    parts[1 - holder][key] *= 2
    write(folder, parts, weight_map)
    with pytest.raises(InputError, match="q_proj.weight is stored twice, in .* with different num"):
        load_model(folder, quantize=kind)


def test_one_parameter_under_two_names(folder):
    file = folder / "model.safetensors"
    weights = load_file(file)
    weights["model.language_model.norm.weight"] = weights["model.norm.weight"] + 1
    save_file(weights, file)
    with pytest.raises(InputError, match="norm.weight is stored twice, in model.safetensors, "):
        load_model(folder)


def test_a_stale_index_beside_a_whole_file(folder):
    """The whole file is read, as by transformers 5.3."""
    expected = states(folder)
    parts, weight_map, weights = split(folder)
    write(folder, [stale(part) for part in parts], weight_map)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    assert torch.equal(states(folder), expected)
    assert_as_transformers(folder, expected)


def test_a_shard_that_is_missing(folder):
    split(folder)
    (folder / SHARDS[1]).unlink()
    with pytest.raises(InputError, match=f"agent has no {SHARDS[1]}"):
        load_model(folder)


# Folders of another kind. names of files -> what must be said

OTHERS = {
    ("pytorch_model.bin",): "holds pytorch_model.bin: .*pickle.*save_pretrained",
    ("pytorch_model-00001-of-00002.bin", "pytorch_model.bin.index.json"): "and 1 more: .*pickle",
    ("llama-Q4_K_M.gguf",): "holds llama-Q4_K_M.gguf: .*llama.cpp.*safetensors",
    ("a-00001-of-00002.GGUF", "a-00002-of-00002.GGUF"): "and 1 more: weights in llama.cpp",
    ("consolidated.00.pth", "params.json"): "consolidated.00.pth.*own makers.*convert",
    ("consolidated.safetensors", "tekken.json"): "consolidated.safetensors.*own makers",
    ("weights.pth",): "weights.pth: a file of PyTorch.*safetensors",
    ("adapter_model.safetensors", "tokenizer.model"): "adapter_model.*LoRA.*merge",
    ("adapter_model.bin",): "adapter_model.bin: a LoRA adapter.*merge",
    ("tf_model.h5",): "tf_model.h5: .*TensorFlow.*safetensors",
    ("flax_model.msgpack",): "flax_model.msgpack: .*Flax.*safetensors",
    ("onnx/model.onnx",): "onnx/model.onnx: .*ONNX",
    ("weights.npz",): "weights.npz: .*MLX",
    ("model-00001-of-00002.safetensors",): f"without their index.*{INDEX}",
    (
        "model.fp16.safetensors",
    ): "model.fp16.safetensors: .*another name.*name it model.safetensors",
    ("global_step5/zero_pp_rank_0_mp_rank_00_optim_states.pt",): "training in parts",
    ("model.ckpt",): "model.ckpt: .*training framework",
    (
        "model.safetensors.incomplete",
    ): "incomplete: a download that was not finished.*fetch it again",
    ("model_index.json",): "diffusers.*folder of a language model",
}


@pytest.mark.parametrize("has_config", (True, False))
@pytest.mark.parametrize("names", OTHERS)
def test_another_format_is_named(folder, names, has_config):
    (folder / "model.safetensors").unlink()
    if not has_config:
        (folder / "config.json").unlink()
    for name in names:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"x")
    lacks = "model.safetensors" if has_config else "config.json"
    with pytest.raises(InputError, match=f"agent has no {lacks}, but it .*{OTHERS[names]}") as told:
        load_agent(folder, "math", "cpu", None)
    assert "fetch the folder again" not in str(told.value)


def test_the_base_model_of_a_lora_adapter_is_named(folder):
    (folder / "model.safetensors").unlink()
    (folder / "adapter_model.safetensors").write_bytes(b"x")
    manifest = {"peft_type": "LORA", "base_model_name_or_path": "Qwen/Qwen3-1.7B"}
    (folder / "adapter_config.json").write_text(json.dumps(manifest))
    with pytest.raises(InputError, match="LoRA adapter.*names the base model Qwen/Qwen3-1.7B"):
        load_model(folder)


@pytest.mark.parametrize("within", ("checkpoint-500", "snapshots/0123abc"))
def test_the_folder_above_a_checkpoint(folder, tmp_path, within):
    above = tmp_path / "above"
    shutil.copytree(folder, above / within)
    with pytest.raises(InputError, match=f"above has no config.json, but .*give .*above/{within}"):
        load_model(above)


def test_links_and_an_agent_are_not_taken_for_each_other(folder, tmp_path):
    links = tmp_path / "links"
    links.mkdir()
    (links / "outerlink_config.json").write_text("{}")
    (links / "training.pt").write_bytes(b"x")  # as a training leaves it there
    with pytest.raises(InputError, match="outer links, and no agent; give it as .*links=PATH"):
        load_model(links)
    with pytest.raises(InputError, match="an agent, and no outer links; give it as .*ROLE=PATH"):
        load_outer_links(folder, "math", {}, {})
    with pytest.raises(InputError, match=f"a folder within it has: give {links}"):
        load_outer_links(tmp_path, "math", {}, {})


def test_a_folder_of_nothing_known(folder):
    """The links of minimas and the optimizer of a training are no weights."""
    (folder / "model.safetensors").unlink()
    (folder / "optimizer.pt").write_bytes(b"x")
    with pytest.raises(InputError, match="agent has no model.safetensors: a checkpoint in the rel"):
        load_model(folder)


def test_a_file_in_the_place_of_a_folder(tmp_path):
    file = tmp_path / "llama.gguf"
    file.write_bytes(b"x")
    with pytest.raises(InputError, match="planner: .*gguf is a file, .*folder.*llama.cpp"):
        checkpoint_folder(file, role="planner")


@pytest.mark.parametrize("name", ("model.safetensors", "tokenizer.json", "adapter.pt"))
def test_a_pointer_of_git_lfs(folder, name):
    """What is there after `git clone` without Git LFS."""
    pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 123\n"
    (folder / name).write_text(pointer)
    with pytest.raises(InputError, match=f"{name} is a pointer of Git LFS.*git lfs pull"):
        load_agent(folder, "math", "cpu", None)
