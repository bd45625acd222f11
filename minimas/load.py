"""From a checkpoint in the released layout to weights, generation settings and links.

A checkpoint is a local folder, or a repository on the Hugging Face hub whose files `checkpoint_folder` downloads.

An agent's folder: config.json, generation_config.json, model.safetensors (or shards and model.safetensors.index.json),
tokenizer.json, tokenizer_config.json, chat_template.jinja, and its inner link, adapter.pt or adapter(TASK).pt.
The links' folder: outerlink_config.json and the .pt files that it names.

Every file is checked here: the rest of the package trusts what it is given. No code from a checkpoint is executed,
except chat templates, which run in a sandbox.
"""

import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from .common import (
    InputError,
    entry,
    local_path,
    read_json,
    required,
    warn_once,
)
from .compat.folder import (
    INDEX,
    LINKS,
    WHOLE,
    check_no_pointer,
    other_format,
    required_of_links,
    required_of_model,
)
from .compat.hub import download, names_in_repository
from .config import DTYPES, Decoder, read_config
from .link import InnerLink, OuterLink
from .quantize import GROUP, HeadEmbedding, QuantizedLinear, class_of, quantizable

AGENT_FILES = (  # and the weights
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "added_tokens.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "additional_chat_templates/default.jinja",
    INDEX,
)
WEIGHTS = (WHOLE, "model-*.safetensors")
HEAD = "lm_head.weight"
EMBEDDINGS = "embed_tokens.weight"


# Folders


def checkpoint_folder(source: str | Path, *patterns: str, role: str = "checkpoint") -> Path:
    """The local folder of a checkpoint. Of a hub repository only the files that match the patterns are downloaded.

    source  a folder, or a hub id such as Qwen/Qwen3-1.7B
    role    whose it is, for the InputError if it is neither, or cannot be read
    """
    folder = local_path(source)
    if is_folder(folder, role):
        return folder
    if folder.is_file():
        found = other_format([folder.name])
        why = f"; {found.removeprefix('it holds ')}" if found else ""
        raise InputError(
            f"{role}: {source} is a file, a checkpoint is the folder that holds it{why}"
        )
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", str(source)):
        raise InputError(
            f"{role}: {source} is not a folder, nor a hub id like Qwen/Qwen3-1.7B: give that of a checkpoint"
        )
    try:
        folder = download(str(source), patterns)
        check_repository(str(source), folder, patterns)
    except InputError as e:
        raise InputError(
            f"{role}: there is no folder {source}, and as a hub id it cannot be loaded either: {e}"
        ) from e
    return folder


def is_folder(path: Path, role: str) -> bool:
    """Whether there is a folder of that path; InputError if the system does not say so, or does not let us enter it."""
    try:
        there = path.is_dir()
    except OSError as e:  # a name that is too long, or a folder on the way that cannot be entered
        raise InputError(
            f"{role}: {path} cannot be looked up ({e.strerror}): give the path of a checkpoint that you may read"
        ) from e
    if there and not os.access(path, os.R_OK | os.X_OK):
        raise InputError(
            f"{role}: you may not read the folder {path}: change its permissions, or give another one"
        )
    return there


def check_repository(repository: str, folder: Path, patterns: Iterable[str]) -> None:
    """InputError if a repository lacks its config.json or its weights, but has another format that can be named."""
    lacks = []
    if "config.json" in patterns and not (folder / "config.json").is_file():
        lacks.append("config.json")
    if WHOLE in patterns and not (folder / WHOLE).is_file() and not (folder / INDEX).is_file():
        lacks.append(WHOLE)
    if not lacks:
        return
    found = other_format(names_in_repository(repository))
    if found is not None:
        raise InputError(f"{repository} has no {lacks[0]}, but {found}")


def agent_patterns(task: str) -> tuple[str, ...]:
    """The files of an agent, with its inner link for a task if it has one under a released name."""
    links = (
        "innerlink_config.json",
        "adapter_config.json",
        f"adapter({links_task(task)}).pt",
        "adapter.pt",
    )
    return *AGENT_FILES, *WEIGHTS, *links


# Weights


def shard_of(folder: Path) -> dict[str, str]:
    """{tensor: the shard that holds it}, as the index says; {} if one file holds all.

    A whole model.safetensors beside an index is taken without it, as by transformers.
    """
    index = folder / INDEX
    if (folder / WHOLE).is_file() or not index.is_file():
        return {}
    shards = entry(index, read_json(index), "weight_map", type_=dict)
    return {key: entry(index, shards, key, type_=str) for key in shards}


def weight_files(folder: Path) -> dict[str, Path]:
    """{name: path} of model.safetensors, or of the shards that the index names."""
    shards = sorted(set(shard_of(folder).values()))
    if shards:
        return {name: required(folder, name) for name in shards}
    return {WHOLE: required_of_model(folder, WHOLE)}


def parameter_name(key: str) -> str | None:
    """A tensor's name in a checkpoint -> its name in our decoder, or None if a text decoder has no use for it."""
    if re.match(r"(model\.)?(vision_tower|multi_modal_projector|visual|mtp)\.", key):
        return None
    if key.endswith("rotary_emb.inv_freq"):
        return None
    return re.sub(r"^(language_model\.model|model\.language_model|language_model|model)\.", "", key)


def load_weights(
    model: Decoder,
    folder: Path,
    device: torch.device | str,
    dtype: torch.dtype,
    quantize: str | None = None,
) -> None:
    """Stream the weights of a folder into `model`, which was built on the meta device, one tensor at a time.

    quantize   int8 or int4: a linear becomes quantised as soon as its weight arrives, but a head that may be tied only
               at the end. Until then it and the embeddings stay as they are stored
    Raises InputError on a damaged file, and on a tensor that is missing, unknown, in two places, or not of the shape
    that config.json makes it.
    """
    expected = dict(model.named_parameters(remove_duplicate=False))
    shards = shard_of(folder)
    loaded: dict[str, str] = {}  # a parameter -> the file that it came from
    waiting = {HEAD, EMBEDDINGS} if quantize and model.config.tie_word_embeddings else set()
    for shard, file in weight_files(folder).items():
        for name, tensor in tensors_of(shard, file, shards, expected):
            before = weights_at(model, name) if name in loaded else None
            if name in waiting:
                set_weight(model, name, tensor, "cpu", tensor.dtype, None)
            else:
                set_weight(model, name, tensor, device, dtype, quantize)
            if before is not None and not same(before, weights_at(model, name)):
                raise stored_twice(folder, name, [loaded[name], shard])
            loaded[name] = shard
    absent = set(expected) - set(loaded)
    if model.config.tie_word_embeddings:
        absent = tie_head(model, absent)
    if absent:
        raise InputError(absent_message(folder, absent, len(expected), shards))
    if quantize:
        if waiting:
            quantize_head(model, device, dtype, quantize)
        warn_of_float_linears(model, folder, quantize)


def tensors_of(
    shard: str, file: Path, shards: Mapping[str, str], expected: Mapping[str, Tensor]
) -> Iterator[tuple[str, Tensor]]:
    """(a parameter's name, its tensor) for each tensor of a file that the decoder has a use for, one at a time.

    shards     {tensor: the shard that holds it}, as `shard_of` returns it; a copy in another shard is stale
    expected   {parameter: a tensor of its shape}
    Raises InputError on a damaged file, and on a tensor that is unknown or of another shape.
    """
    check_no_pointer(file)
    try:
        with safe_open(file, framework="pt", backend="pread") as tensors:
            for key in tensors.keys():  # noqa: SIM118, it is no dict
                name = parameter_name(key)
                is_stale = shards.get(key, shard) != shard
                if name is not None and not is_stale:
                    tensor = tensors.get_tensor(key)
                    yield name, checked_tensor(file, key, tensor, expected.get(name))
    except SafetensorError as e:
        raise InputError(f"{file} is damaged or cut short ({e}): fetch it again") from e


def set_weight(
    model: Decoder,
    name: str,
    tensor: Tensor,
    device: torch.device | str,
    dtype: torch.dtype,
    quantize: str | None,
) -> None:
    """Put a tensor in the place of the one of that name, such as layers.0.mlp.up_proj.weight.

    quantize   the kind of quantised weights that it becomes, if it can
    """
    owner, _, leaf = name.rpartition(".")
    module = model.get_submodule(owner)
    # A weight that is stored twice arrives a second time, when its linear is quantised already.
    can_be = isinstance(module, QuantizedLinear) or quantizable(module, quantize)
    if quantize and leaf == "weight" and can_be:
        quantized = class_of(quantize).from_float(tensor, module.bias, device)
        model.set_submodule(owner, quantized)
    else:
        setattr(module, leaf, nn.Parameter(tensor.to(device, dtype), requires_grad=False))


def weights_at(model: Decoder, name: str) -> list[Tensor]:
    """The parameter of that name, or what a quantised one is made of."""
    owner, _, leaf = name.rpartition(".")
    module = model.get_submodule(owner)
    if leaf == "weight" and isinstance(module, QuantizedLinear):
        return list(module.buffers())
    return [getattr(module, leaf)]


def same(some: list[Tensor], others: list[Tensor]) -> bool:
    """Whether two lists of tensors hold the same numbers, be it in different dtypes."""
    for one, other in zip(some, others, strict=True):
        if one.dtype != other.dtype:
            wide = torch.promote_types(one.dtype, other.dtype)
            one = one.to(wide)
            other = other.to(wide)
        if not torch.equal(one, other):
            return False
    return True


def stored_twice(folder: Path, name: str, files: list[str]) -> InputError:
    """What to raise if a weight was loaded before with other numbers."""
    return InputError(
        f"{folder}: {name} is stored twice, in {' and '.join(sorted(set(files)))}, with different numbers, "
        "and no index says which one is meant: fetch the folder again"
    )


def quantize_head(
    model: Decoder, device: torch.device | str, dtype: torch.dtype, kind: str
) -> None:
    """Quantise a head that may be tied, if it can be. If it is tied, the embeddings are read out of it from then on.

    Such a head is as it is stored until all weights have arrived: `tie_head` compares it with the embeddings, or gives
    them its weight. It is quantised from that, as any other linear is. What is left of both as floats becomes `dtype`.
    """
    tied = model.lm_head.weight is model.embed_tokens.weight
    set_weight(model, HEAD, model.lm_head.weight, device, dtype, kind)
    head = model.get_submodule("lm_head")
    if not tied:
        set_weight(model, EMBEDDINGS, model.embed_tokens.weight, device, dtype, None)
    elif isinstance(head, QuantizedLinear):
        model.embed_tokens = HeadEmbedding(head, dtype)
    else:
        model.embed_tokens.weight = model.lm_head.weight


def warn_of_float_linears(model: Decoder, folder: Path, kind: str) -> None:
    """Warn of linears that could not be quantised."""
    left = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            left[name] = module.in_features
    if left:
        first = next(iter(left))
        warn_once(
            f"{folder}: {len(left)} linears stay as they are, since {kind} takes inputs in groups of {GROUP}: "
            f"the first is {first} with {left[first]} inputs"
        )


def tie_head(model: Decoder, absent: set[str]) -> set[str]:
    """Make head and embeddings one parameter -> the parameters that are still absent.

    As in transformers 5.3, either may be stored for both. If both are stored, and differ, they are not tied.
    """
    if HEAD in absent and EMBEDDINGS in absent:
        return absent - {HEAD}  # they lack one tensor
    if HEAD in absent:
        model.lm_head.weight = model.embed_tokens.weight
    elif EMBEDDINGS in absent:
        model.embed_tokens.weight = model.lm_head.weight
    elif same([model.lm_head.weight], [model.embed_tokens.weight]):
        model.lm_head.weight = model.embed_tokens.weight
    return absent - {HEAD, EMBEDDINGS}


def absent_message(folder: Path, absent: set[str], expected: int, shards: Mapping[str, str]) -> str:
    """What to say of parameters that no file has."""
    first = min(absent)
    message = (
        f"{folder}: the weights lack {len(absent)} of {expected} tensors, the first is {first}"
    )
    for key, shard in shards.items():
        if parameter_name(key) == first:
            return (
                f"{message}; {INDEX} says that {shard} holds it as {key}, but it does not: "
                "fetch the index and its shards again, all of one revision"
            )
    if shards:
        return f"{message}; {INDEX} does not name it either: fetch the folder again"
    return message


def checked_tensor(file: Path, key: str, tensor: Tensor, expected: Tensor | None) -> Tensor:
    """The tensor, if it has the shape of the parameter `expected` (None: no such parameter) and a usable dtype."""
    if tensor.dtype not in DTYPES.values():
        raise InputError(
            f"{file}: {key} is stored as {tensor.dtype}, expected {', '.join(DTYPES)}, not quantised weights"
        )
    if expected is not None and tensor.shape == expected.shape:
        return tensor
    wanted = "no such tensor" if expected is None else f"shape {tuple(expected.shape)}"
    raise InputError(
        f"{file}: {key} has shape {tuple(tensor.shape)}, config.json makes it {wanted}: "
        "weights and config.json are not of one model"
    )


class SkipInit(TorchFunctionMode):
    """Under it modules do not initialise their weights. On the meta device that takes time, and writes nothing.

    normal_ even imports torch's compiler there, which takes 1 s.
    """

    skipped = (nn.init.normal_, nn.init.uniform_, nn.init.kaiming_uniform_)

    def __torch_function__(
        self,
        function: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if function in self.skipped:
            return kwargs["tensor"]
        return function(*args, **kwargs)


def decoder_without_weights(folder: Path) -> tuple[Decoder, torch.dtype]:
    """(the decoder that config.json describes, on the meta device; the dtype that it names)."""
    decoder, config, stored = read_config(folder)
    return on_meta(decoder, config), stored


def on_meta(decoder: Callable[[Any], Decoder], config: Any) -> Decoder:
    """A decoder of this class and Config on the meta device: it has shapes, and takes no memory."""
    with torch.device("meta"), SkipInit():
        return decoder(config)


def load_model(
    folder: Path,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    weights_device: torch.device | str | None = None,
    quantize: str | None = None,
) -> Decoder:
    """The frozen decoder in a folder, in `dtype` (None: the one that config.json names) on `device`.

    weights_device: where the weights of an offloaded agent are put instead. quantize: int8 or int4 (quantize.py).
    Raises InputError on a bad config or file.
    On CUDA it also turns off cuDNN's attention, torch's first choice on Hopper, for the whole process: it makes a plan
    for each new number of tokens, which is reported to take tenths of a second.
    """
    if torch.device(device).type == "cuda":
        torch.backends.cuda.enable_cudnn_sdp(False)
    model, stored = decoder_without_weights(folder)
    load_weights(model, folder, weights_device or device, dtype or stored, quantize)
    for name, buffer in model.named_buffers(recurse=False):
        setattr(model, name, buffer.to(device))
    return model.eval()


# Generation settings


@dataclass
class GenerationConfig:
    """What generation_config.json says of decoding: the ids of tokens that end a text, and top_k (0: no limit)."""

    eos_ids: tuple[int, ...] = ()
    top_k: int = 50


def load_generation_config(folder: Path, tokenizer: Any) -> GenerationConfig:
    """The GenerationConfig of a folder, from config.json where generation_config.json is missing, as in base models.

    The tokenizer's own end token always ends a text, and top_k is 50 if none is named, as in transformers.
    """
    file = folder / "generation_config.json"
    if not file.is_file():
        file = required_of_model(folder, "config.json")
    whole = read_json(file)
    text_config = entry(file, {"text_config": {}} | whole, "text_config", type_=dict)
    raw = text_config | whole
    eos = raw.get("eos_token_id")
    listed = eos if isinstance(eos, list) else [eos]
    ends = [number for number in [*listed, tokenizer.eos_id] if number is not None]
    top_k = raw.get("top_k")
    if top_k is None:
        top_k = 50
    for number in [*ends, top_k]:
        if type(number) is not int or number < 0:
            raise InputError(
                f"{file}: eos_token_id or top_k has {number!r}, expected a whole number from 0: fetch it again"
            )
    return GenerationConfig(tuple(sorted(set(ends))), top_k)


# Links


def links_task(task: str) -> str:
    """Which links a task uses: they were trained for math and for code, and choice takes those for math."""
    return "code" if task == "code" else "math"


def load_link(
    link: Any,
    file: Path,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
) -> Any:
    """Fill `link` from a released .pt file -> the link, frozen, on `device`, in the wider of its dtype and `dtype`.

    Raises InputError if the file is not a plain state dict of one floating dtype, or keys or shapes are not the link's.
    """
    check_no_pointer(file)
    try:
        state = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as e:  # whatever a damaged pickle leads to
        raise InputError(
            f"{file} is not a readable state dict ({type(e).__name__}): fetch the file again"
        ) from e
    if isinstance(state, dict):
        wrong = [key for key, tensor in state.items() if not is_plain(key, tensor)]
    else:
        wrong = [type(state)]
    if wrong:
        raise InputError(
            f"{file} is not a plain state dict (wrong: {wrong[0]!r}): expected dense floating tensors without "
            f"NaN or infinity under {', '.join(link.state_dict())}; fetch it again"
        )
    dtypes = {tensor.dtype for tensor in state.values()}
    if len(dtypes) > 1:
        raise InputError(f"{file} mixes dtypes {sorted(map(str, dtypes))}: save all tensors in one")
    try:
        link.load_state_dict(state, assign=True)
    except RuntimeError as e:  # names what is missing, unknown or of another shape
        raise InputError(
            f"{file} is no {link.adapter_type} of this agent, but another's: {' '.join(str(e).split())}"
        ) from e
    (stored,) = dtypes
    return link.to(device, torch.promote_types(stored, dtype or stored)).requires_grad_(False)


def is_plain(key: Any, tensor: Any) -> bool:
    """Whether the key is a string, and the tensor is dense, with finite numbers of a usable dtype."""
    return (
        isinstance(key, str)
        and torch.is_tensor(tensor)
        and tensor.dtype in DTYPES.values()
        and not tensor.is_meta
        and tensor.layout is torch.strided
        and not tensor.is_nested
        and bool(tensor.isfinite().all())
    )


def load_inner_link(
    folder: Path,
    task: str,
    D: int,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
) -> InnerLink | None:
    """The inner link of an agent of width D and of this dtype: the one for the task if there are several.

    None in the folder of a base model, which has none.
    """
    trained_for = links_task(task)
    manifest = folder / "innerlink_config.json"
    name = f"adapter({trained_for}).pt"
    if manifest.is_file():
        name = entry(manifest, read_json(manifest), "tasks", trained_for, "adapter.pt", type_=str)
    elif not any(folder.glob("adapter*")):
        return None
    elif not (folder / name).is_file():
        name = "adapter.pt"
    return load_link(InnerLink(D), required(folder, name), device, dtype)


def missing_link_message(
    manifest: Path, speaker: str, hearer: str, key: str, listed: Mapping[str, Mapping[str, Any]]
) -> str:
    """What to say if a manifest has no link of this key: its links, and how an edge of a style names one of them."""
    message = f"{manifest} lists no link {key} ({speaker} to {hearer}); it has {', '.join(listed) or 'none'}"
    for other, adapter in listed.items():
        if (adapter.get("source_role"), adapter.get("target_role")) == (speaker, hearer):
            edge = json.dumps([speaker, hearer, other])
            return f"{message}: if {other} is meant, write the edge as {edge} in the style's edges"
    return message


def load_outer_links(
    source: str | Path,
    task: str,
    edges: Mapping[tuple[str, str], str],
    agents: Mapping[str, Any],
) -> dict[tuple[str, str], OuterLink]:
    """{(source, target): OuterLink} for `edges`, {(source, target): released key}, between agents {role: Agent}.

    A link is put on the device of its source. Raises InputError if the manifest lacks a link, or a link does not fit
    its agents.
    """
    folder = checkpoint_folder(source, LINKS, role="links")
    manifest = required_of_links(folder)
    config = read_json(manifest)
    in_task = ["tasks", links_task(task)] if "tasks" in config else []
    adapters = entry(manifest, config, *in_task, "adapters", type_=list)
    listed = {entry(manifest, adapter, "legacy_key", type_=str): adapter for adapter in adapters}
    files = {}
    for (speaker, hearer), key in edges.items():
        if key not in listed:
            raise InputError(missing_link_message(manifest, speaker, hearer, key, listed))
        files[speaker, hearer] = entry(manifest, listed[key], "filename", type_=str)
    folder = checkpoint_folder(source, *files.values())
    widths = {role: agent.model.config.hidden_size for role, agent in agents.items()}
    links = {}
    for (speaker, hearer), name in files.items():
        links[speaker, hearer] = load_link(
            OuterLink(widths[speaker], widths[hearer]),
            required(folder, name),
            agents[speaker].device,
            agents[speaker].model.norm.weight.dtype,
        )
    return links
