"""From a checkpoint in the released layout to weights, generation settings and links.

A checkpoint is a local folder, or a repository on the Hugging Face hub whose files `checkpoint_folder` downloads.

An agent's folder: config.json, generation_config.json, model.safetensors (or shards and model.safetensors.index.json),
tokenizer.json, tokenizer_config.json, chat_template.jinja, and its inner link, adapter.pt or adapter(TASK).pt.
The links' folder: outerlink_config.json and the .pt files that it names.

Every file is checked here: the rest of the package trusts what it is given. No code from a checkpoint is executed, except
chat templates, which run in a sandbox.
"""

import re
from dataclasses import dataclass
from pathlib import Path

import torch
from huggingface_hub import constants, snapshot_download
from huggingface_hub.errors import GatedRepoError, LocalEntryNotFoundError, RepositoryNotFoundError
from safetensors import SafetensorError, safe_open
from torch.overrides import TorchFunctionMode

from .common import InputError, check_known, entry, read_json, required
from .config import DTYPES, read_config
from .link import InnerLink, OuterLink

AGENT_FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "added_tokens.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "additional_chat_templates/default.jinja",
    "model.safetensors.index.json",
)  # and the weights
WEIGHTS = ("model.safetensors", "model-*.safetensors")


# Folders


def checkpoint_folder(source, *patterns, role="checkpoint"):
    """The local folder of a checkpoint. Of a hub repository only the files that match the patterns are downloaded.

    source  a folder, or a hub id such as Qwen/Qwen3-1.7B
    role    whose it is, for the InputError if it is neither
    """
    folder = Path(source).expanduser()
    if folder.is_dir():
        return folder
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", str(source)):
        raise InputError(
            f"{role}: {source} is not a folder, nor a hub id like Qwen/Qwen3-1.7B: give that of a checkpoint"
        )
    try:
        return download(str(source), patterns)
    except InputError as e:
        raise InputError(
            f"{role}: there is no folder {source}, and as a hub id it cannot be loaded either: {e}"
        ) from e


def agent_patterns(task):
    """The files of an agent, with its inner link for a task if it has one under a released name."""
    links = (
        "innerlink_config.json",
        "adapter_config.json",
        f"adapter({links_task(task)}).pt",
        "adapter.pt",
    )
    return *AGENT_FILES, *WEIGHTS, *links


def download(repository, patterns, repo_type="model", **options):
    """The folder in huggingface_hub's cache with the files of a repository that match the patterns.

    options: revision; with dry_run=True nothing is downloaded, and files are listed (filename, file_size, will_download)
    """
    try:
        found = snapshot_download(
            repository, repo_type=repo_type, allow_patterns=list(patterns), **options
        )
        return found if isinstance(found, list) else Path(found)
    except GatedRepoError as e:
        raise InputError(
            f"{repository} is gated: accept its terms on its page, then use `hf auth login` or HF_TOKEN"
        ) from e
    except RepositoryNotFoundError as e:
        raise InputError(
            f"{repository} is not on the hub, or private and closed to you: check its name and HF_TOKEN"
        ) from e
    except (
        Exception
    ) as e:  # whatever else the network stack raises becomes a sentence, not a traceback
        why = (str(e) or type(e).__name__).splitlines()[0]
        if isinstance(
            e, (LocalEntryNotFoundError, AttributeError)
        ):  # a long text; threads of a client that was closed
            why = (
                "HF_HUB_OFFLINE is set and it is not in the cache"
                if constants.HF_HUB_OFFLINE
                else "no connection"
            )
        instead = {
            "model": "a folder with --checkpoint; --style tiny runs offline",
            "dataset": "a local file of the same columns; --dataset tiny runs offline",
        }
        raise InputError(
            f"{repository} cannot be fetched from the hub ({why}): check the network, or give "
            f"{instead[repo_type]}"
        ) from e


# Weights


def weight_files(folder):
    """{name: path} of model.safetensors, or of the shards that the index names."""
    index = folder / "model.safetensors.index.json"
    names = ["model.safetensors"]
    if not (folder / names[0]).is_file() and index.is_file():
        shards = entry(index, read_json(index), "weight_map", type_=dict)
        names = sorted({entry(index, shards, key, type_=str) for key in shards})
    return {name: required(folder, name) for name in names}


def parameter_name(key):
    """A tensor's name in a checkpoint -> its name in our decoder, or None if a text decoder has no use for it."""
    if re.match(
        r"(model\.)?(vision_tower|multi_modal_projector|visual|mtp)\.", key
    ) or key.endswith("rotary_emb.inv_freq"):
        return None
    return re.sub(r"^(language_model\.model|model\.language_model|language_model|model)\.", "", key)


def load_weights(model, folder, device, dtype):
    """Stream the weights of a folder into `model`, which was built on the meta device, one tensor at a time.

    Raises InputError on a damaged file, and on a tensor that is missing, unknown, or not of config.json's shape.
    """
    expected, tied = (
        dict(model.named_parameters(remove_duplicate=False)),
        model.config.tie_word_embeddings,
    )
    absent = set(expected) - ({"lm_head.weight"} if tied else set())
    for file in weight_files(folder).values():
        try:
            with safe_open(file, framework="pt", backend="pread") as tensors:
                for key in filter(parameter_name, tensors.keys()):
                    name = parameter_name(key)
                    tensor = checked_tensor(file, key, tensors.get_tensor(key), expected.get(name))
                    module, _, leaf = name.rpartition(".")
                    parameter = torch.nn.Parameter(tensor.to(device, dtype), requires_grad=False)
                    setattr(model.get_submodule(module), leaf, parameter)
                    absent.discard(name)
        except SafetensorError as e:
            raise InputError(f"{file} is damaged or cut short ({e}): fetch it again") from e
    if absent:
        raise InputError(
            f"{folder}: the weights lack {len(absent)} of {len(expected)} tensors, the first is {min(absent)}"
        )
    head, embeddings = model.lm_head.weight, model.embed_tokens.weight
    if tied and (
        head.is_meta or torch.equal(head, embeddings)
    ):  # stored all the same: as in transformers, the file wins
        model.lm_head.weight = embeddings


def checked_tensor(file, key, tensor, expected):
    """The tensor, if it has the shape of the parameter `expected` (None: no such parameter) and a usable dtype."""
    if tensor.dtype not in DTYPES.values():
        raise InputError(
            f"{file}: {key} is stored as {tensor.dtype}, expected {', '.join(DTYPES)}, not quantised weights"
        )
    if expected is None or tensor.shape != expected.shape:
        expected = "no such tensor" if expected is None else f"shape {tuple(expected.shape)}"
        raise InputError(
            f"{file}: {key} has shape {tuple(tensor.shape)}, config.json makes it {expected}: "
            "weights and config.json are not of one model"
        )
    return tensor


class SkipInit(TorchFunctionMode):
    """Under it nn.init.normal_ does nothing: on the meta device it would make torch import its compiler, which takes 1 s."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        return (
            kwargs["tensor"]
            if function is torch.nn.init.normal_
            else function(*args, **kwargs or {})
        )


def decoder_without_weights(folder):
    """(the decoder that config.json describes, on the meta device; the dtype that it names)."""
    family, config, stored = read_config(folder)
    with torch.device("meta"), SkipInit():
        return family(config), stored


def load_model(folder, device="cpu", dtype=None, weights_device=None):
    """The frozen decoder in a folder, in `dtype` (None: the one that config.json names) on `device`.

    weights_device: where the weights of an offloaded agent are put instead. Raises InputError on a bad config or file.
    On CUDA it also turns off cuDNN's attention, torch's first choice on Hopper, for the whole process: it makes a plan for
    each new number of tokens, which is reported to take tenths of a second.
    """
    if torch.device(device).type == "cuda":
        torch.backends.cuda.enable_cudnn_sdp(False)
    model, stored = decoder_without_weights(folder)
    load_weights(model, folder, weights_device or device, dtype or stored)
    for name, buffer in model.named_buffers():
        setattr(model, name, buffer.to(device))
    return model.eval()


# Generation settings


@dataclass
class GenerationConfig:
    """What generation_config.json says of decoding: the ids of tokens that end a text, and top_k (0: no limit)."""

    eos_ids: tuple[int, ...] = ()
    top_k: int = 50


def load_generation_config(folder, tokenizer):
    """The GenerationConfig of a folder, from config.json where generation_config.json is missing, as in some base models.

    The tokenizer's own end token always ends a text, and top_k is 50 if none is named, as in transformers.
    """
    file = folder / "generation_config.json"
    file = file if file.is_file() else required(folder, "config.json")
    raw = read_json(file)
    raw = entry(file, {"text_config": {}} | raw, "text_config", type_=dict) | raw
    eos, top_k = raw.get("eos_token_id"), 50 if raw.get("top_k") is None else raw["top_k"]
    eos = [
        number
        for number in [*(eos if isinstance(eos, list) else [eos]), tokenizer.eos_id]
        if number is not None
    ]
    if wrong := [number for number in [*eos, top_k] if type(number) is not int or number < 0]:
        raise InputError(
            f"{file}: eos_token_id or top_k has {wrong[0]!r}, expected a whole number from 0: fetch it again"
        )
    return GenerationConfig(tuple(sorted(set(eos))), top_k)


# Links


def links_task(task):
    """Which links a task uses: they were trained for math and for code, and choice takes those for math."""
    return "code" if task == "code" else "math"


def load_link(link, file, device="cpu", dtype=None):
    """Fill `link` from a released .pt file -> the link, frozen, on `device`, in the wider of its dtype and `dtype`.

    Raises InputError if the file is not a plain state dict of one floating dtype, or keys or shapes are not the link's.
    """
    try:
        state = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as e:  # whatever a damaged pickle leads to
        raise InputError(
            f"{file} is not a readable state dict ({type(e).__name__}): fetch the file again"
        ) from e
    wrong = (
        [key for key, t in state.items() if not is_plain(key, t)]
        if isinstance(state, dict)
        else [type(state)]
    )
    if wrong:
        raise InputError(
            f"{file} is not a plain state dict (wrong: {wrong[0]!r}): expected dense floating tensors without "
            f"NaN or infinity under {', '.join(link.state_dict())}; fetch it again"
        )
    dtypes = {t.dtype for t in state.values()}
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


def is_plain(key, tensor):
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


def load_inner_link(folder, task, D, device="cpu", dtype=None):
    """The inner link of an agent of width D and of this dtype: the one for the task if there are several.

    None in the folder of a base model, which has none.
    """
    task, manifest = links_task(task), folder / "innerlink_config.json"
    name = f"adapter({task}).pt" if (folder / f"adapter({task}).pt").is_file() else "adapter.pt"
    if manifest.is_file():
        name = entry(manifest, read_json(manifest), "tasks", task, "adapter.pt", type_=str)
    elif not any(folder.glob("adapter*")):
        return None
    return load_link(InnerLink(D), required(folder, name), device, dtype)


def load_outer_links(source, task, edges, agents):
    """{(source, target): OuterLink} for `edges`, {(source, target): released key}, between agents {role: Agent}.

    A link is put on the device of its source. Raises InputError if the manifest lacks a link, or a link does not fit its
    agents.
    """
    manifest = required(
        checkpoint_folder(source, "outerlink_config.json", role="links"), "outerlink_config.json"
    )
    config = read_json(manifest)
    in_task = ["tasks", links_task(task)] if "tasks" in config else []
    adapters = entry(manifest, config, *in_task, "adapters", type_=list)
    listed = {entry(manifest, adapter, "legacy_key", type_=str): adapter for adapter in adapters}
    for (src, dst), key in edges.items():
        if key not in listed:
            raise InputError(
                f"{manifest} lists no link {key} ({src} to {dst}); it has {', '.join(listed) or 'none'}"
            )
    files = {
        edge: entry(manifest, listed[key], "filename", type_=str) for edge, key in edges.items()
    }
    folder = checkpoint_folder(source, *files.values())
    widths = {role: agent.model.config.hidden_size for role, agent in agents.items()}
    return {
        (src, dst): load_link(
            OuterLink(widths[src], widths[dst]),
            required(folder, name),
            agents[src].device,
            agents[src].model.norm.weight.dtype,
        )
        for (src, dst), name in files.items()
    }


# Devices and dtypes


def usable_device(name):
    """The torch.device of that name (None: cuda if there is one, else cpu); InputError if nothing can be put there."""
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.zeros(1, device=device).item()  # a number that is really there: `meta` has none
    except (RuntimeError, AssertionError, TypeError, ImportError) as e:
        raise InputError(
            f"device {str(name)!r} cannot be used ({str(e).splitlines()[0]}): try cpu or cuda"
        ) from e
    return device


def devices_by_role(roles, given=None):
    """{role: torch.device}, from one device or its name, {role: device}, "planner=cuda:0,critic=cuda:1", or None."""
    if isinstance(given, str) and "=" in given:
        pairs = [pair.partition("=")[::2] for pair in given.split(",")]
        if not all(device for _, device in pairs) or len(dict(pairs)) < len(pairs):
            raise InputError(
                f"device is {given}, expected ROLE=DEVICE,ROLE=DEVICE with each role once"
            )
        given = dict(pairs)
    if not isinstance(given, dict):
        return dict.fromkeys(roles, usable_device(given))
    if set(given) != set(roles):
        raise InputError(f"device names {', '.join(given)}, expected each of {', '.join(roles)}")
    return {role: usable_device(name) for role, name in given.items()}


def usable_dtype(name, device):
    """The torch dtype of that name; None stands for float32 on a CPU, and for config.json's elsewhere."""
    if name is None:
        return torch.float32 if device.type == "cpu" else None
    name = str(name).removeprefix("torch.")
    check_known("dtype", [name], DTYPES)
    return DTYPES[name]
