"""What a folder holds that is no checkpoint in the released layout, and what to do with it.

People point at a folder of another format, at one that is half fetched, or at the folder above. The names of the files
tell which: no file is opened, but for the pointers of Git LFS.
"""

import re
from collections.abc import Iterable
from pathlib import Path

from ..common import InputError, read_json, required

WHOLE = "model.safetensors"
LINKS = "outerlink_config.json"
INDEX = "model.safetensors.index.json"
POINTER = b"version https://git-lfs"  # how a pointer of Git LFS begins

CONVERT = (
    "minimas reads safetensors only: load it with transformers and write it with save_pretrained, "
    "or fetch a repository of this model that has model.safetensors"
)
CONVERT_OLD = (  # for what transformers 5 no longer reads
    "minimas reads safetensors only: fetch a repository of this model that has model.safetensors, "
    "or convert it to safetensors, for TensorFlow and Flax with transformers 4"
)
CONVERT_OWN = (
    "minimas reads the layout of transformers: fetch the repository of this model that has config.json and "
    "model.safetensors, or convert it with the script that transformers has for it"
)
# (name of a file, what it is, what to do), the most telling first; files of folders within only where a slash is named
FORMATS = (
    (
        r"(.*/)?adapter_model\.(safetensors|bin)",
        "a LoRA adapter of PEFT, not a whole model",
        "merge it into its base model with PEFT's merge_and_unload, and give the folder that save_pretrained writes",
    ),
    (
        r"model_index\.json",
        "a pipeline of diffusers",
        "give the folder of a language model",
    ),
    (
        r"(model|pytorch_model)-\d+-of-\d+\.safetensors",
        "shards of weights without their index",
        f"fetch {INDEX} too",
    ),
    (
        r"(.*/)?consolidated[^/]*|params\.json|tekken\.json",
        "the layout of the model's own makers (Meta, Mistral)",
        CONVERT_OWN,
    ),
    (r"(pytorch_)?model[^/]*\.bin(\.index\.json)?", "weights in PyTorch's pickle format", CONVERT),
    (
        r"(.*/)?[^/]*\.(gguf|ggml)|ggml[^/]*\.bin",
        "weights in llama.cpp's format",
        CONVERT,
    ),
    (
        r"[^/]*\.safetensors\.index\.json",
        "an index of shards under another name",
        f"name it {INDEX}",
    ),
    (
        r"(?!adapter)[^/]*\.safetensors",
        "safetensors under another name",
        f"name it {WHOLE} if it holds the whole model",
    ),
    (
        r"(.*/)?(zero_pp_rank_[^/]*|[^/]*_states\.pt|[^/]*\.distcp|pytorch_model_fsdp[^/]*)",
        "a checkpoint of a training in parts (DeepSpeed, FSDP)",
        "join it with the tool of that training, write it with save_pretrained, and give that folder",
    ),
    (r"(tf_model[^/]*|[^/]*\.h5|saved_model\.pb)", "weights in TensorFlow's format", CONVERT_OLD),
    (r"(flax_model[^/]*|[^/]*\.msgpack)", "weights in Flax's format", CONVERT_OLD),
    (r"(.*/)?[^/]*\.onnx(_data)?", "a model in ONNX's format", CONVERT_OLD),
    (r"[^/]*\.npz", "weights in NumPy's format, as older MLX wrote them", CONVERT_OLD),
    (
        r"openvino[^/]*|[^/]*\.(tflite|mlmodel|mlpackage|engine|ot|pte)",
        "a model that was compiled for another program",
        CONVERT_OLD,
    ),
    (r"[^/]*\.(ckpt|nemo)(\.[^/]*)?", "a checkpoint of a training framework", CONVERT_OWN),
    (
        r"(?!adapter|.*outerlink|optimizer|scheduler|training_args|rng_state)[^/]*\.(pth|pt|bin)",
        "a file of PyTorch",
        CONVERT,
    ),
    (
        r"[^/]*\.(incomplete|part|partial|crdownload|aria2|download)",
        "a download that was not finished",
        "fetch it again",
    ),
)


def other_format(names: Iterable[str]) -> str | None:
    """What the names of a folder's files say of its format and what to do, as the end of an error message; or None."""
    names = sorted(names)
    for pattern, what, instead in FORMATS:
        found = [name for name in names if re.fullmatch(pattern, name, re.IGNORECASE)]
        if found:
            more = f" and {len(found) - 1} more" if len(found) > 1 else ""
            return f"it holds {found[0]}{more}: {what}; {instead}"
    return None


def required_of_model(folder: Path, name: str) -> Path:
    """The path of a file that a model's folder must have; InputError says what is there in its place."""
    has_weights = (folder / WHOLE).is_file() or (folder / INDEX).is_file()
    if (folder / name).is_file() or has_weights:
        return required(folder, name)
    if (folder / LINKS).is_file():  # beside it a training leaves files of PyTorch
        raise InputError(
            f"{folder} has no {name}, but it holds {LINKS}: outer links, and no agent; give it as "
            "--checkpoint links=PATH"
        )
    found = other_format(names_within(folder))
    if found is None:
        found = folders_within(folder)
    elif "adapter_model" in found:
        found += base_of_adapter(folder)
    if found is None:
        return required(folder, name)
    raise InputError(f"{folder} has no {name}, but {found}")


def required_of_links(folder: Path) -> Path:
    """The path of the manifest of outer links; InputError says what is in the folder in its place."""
    if not (folder / LINKS).is_file():
        for within in sorted(folder.glob(f"*/{LINKS}")):
            raise InputError(
                f"{folder} has no {LINKS}, but a folder within it has: give {within.parent}"
            )
        if (folder / "config.json").is_file():
            raise InputError(
                f"{folder} has no {LINKS}, but it holds config.json: an agent, and no outer links; give it as "
                "--checkpoint ROLE=PATH"
            )
    return required(folder, LINKS)


def names_within(folder: Path) -> list[str]:
    """The files of a folder and of the folders in it, by their names from there."""
    files = [*folder.glob("*"), *folder.glob("*/*")]
    return [file.relative_to(folder).as_posix() for file in files if file.is_file()]


def folders_within(folder: Path) -> str | None:
    """Which folders of a folder hold a checkpoint, as the end of an error message; None if there is none."""
    configs = sorted([*folder.glob("*/config.json"), *folder.glob("snapshots/*/config.json")])
    if not configs or (folder / "config.json").exists():
        return None
    found = [str(config.parent) for config in configs]
    others = f" (or one of {len(found) - 1} more)" if len(found) > 1 else ""
    return f"a folder within it has config.json: give {found[-1]}{others}"


def base_of_adapter(folder: Path) -> str:
    """Which base model a LoRA adapter names, as the end of an error message; empty if it names none."""
    file = folder / "adapter_config.json"
    base = read_json(file).get("base_model_name_or_path") if file.is_file() else None
    return f" (it names the base model {base})" if base else ""


def check_no_pointer(file: Path) -> None:
    """InputError if a file is a pointer of Git LFS: a text of three lines in the place of a large file."""
    with file.open("rb") as content:
        begins = content.read(len(POINTER))
    if begins == POINTER:
        raise InputError(
            f"{file} is a pointer of Git LFS, not the file itself: run `git lfs pull` in its folder, or fetch it again"
        )
