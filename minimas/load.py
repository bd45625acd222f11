"""From a "source", a folder or hub repository in the released layout, to a working decoder, tokenizer and links.

An agent's folder: config.json, generation_config.json, model.safetensors (or shards and model.safetensors.index.json),
tokenizer.json, tokenizer_config.json, chat_template.jinja, and its inner link, adapter.pt or adapter(TASK).pt.
The links' folder: outerlink_config.json and the .pt files that it names.

Older spellings are translated here, and every file is checked: the rest of the package trusts what it is given.
"""

import json
import re
from dataclasses import MISSING, dataclass, fields

import torch
from safetensors import SafetensorError, safe_open
from tokenizers import Tokenizer as FastTokenizer
from tokenizers.processors import TemplateProcessing
from torch.overrides import TorchFunctionMode

from . import InputError, check_known
from . import gemma, llama, mistral, qwen
from .hub import find
from .link import InnerLink, OuterLink
from .tokenizer import Tokenizer

LLAMA_LIKE = {"hidden_act": "silu", "attention_bias": False, "mlp_bias": False}
GEMMA_LIKE = {"hidden_activation": "gelu_pytorch_tanh", "attention_bias": False, "attn_logit_softcapping": None,
              "final_logit_softcapping": None, "use_bidirectional_attention": False}
FAMILIES = {  # model_type in config.json -> decoder, its Config, and what config.json must say if it says anything of it
    "llama": (llama.Llama, llama.Config, LLAMA_LIKE),
    "mistral": (llama.Llama, mistral.Config, LLAMA_LIKE),
    "qwen2": (qwen.Qwen2, qwen.Config, LLAMA_LIKE),
    "qwen3": (qwen.Qwen3, qwen.Config, LLAMA_LIKE),
    "qwen3_5_text": (qwen.Qwen35, qwen.Config35, LLAMA_LIKE),
    "gemma3_text": (gemma.Gemma3, gemma.Config, GEMMA_LIKE),
}
LAYER_KINDS = {"qwen3_5_text": {"linear_attention", "full_attention"}}  # and of all others:
ATTENTION_KINDS = {"sliding_attention", "full_attention"}
TEXT_PART = {"gemma3": "gemma3_text", "qwen3_5": "qwen3_5_text"}  # models of text and images: the decoder is in text_config
ROPE_TYPES = {  # and the parameters that each needs besides rope_theta
    "default": (), "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")}
LIMITS = {"num_hidden_layers": (1, 1000), "max_window_layers": (0, 2 ** 24)}  # of a whole number; others: 1 to 2 ** 24
KINDS = {dict: "an object", list: "a list", str: "a text", int: "a whole number"}  # of JSON
DTYPES = {name: getattr(torch, name) for name in ("float32", "bfloat16", "float16", "float64")}


@dataclass
class Generation:
    """What generation_config.json says of decoding: the ids of tokens that end a text, and top_k (0: no limit)."""
    eos_ids: tuple[int, ...] = ()
    top_k: int = 50


def read_text(file):
    """A text file; InputError if it is not UTF-8."""
    try:
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError as e:
        raise InputError(f"{file} is damaged, it is not UTF-8 text ({e.reason} at byte {e.start}): fetch it again") from e


def read_json(file):
    """The object in a JSON file; InputError if there is none."""
    text = read_text(file)
    try:
        value = json.loads(text)
        json.dumps(value, ensure_ascii=False).encode()  # half of a surrogate pair is no text
    except (ValueError, RecursionError) as e:  # or it has numbers or lists beyond Python's limits
        raise InputError(f"{file} is damaged, it is not JSON ({e}): fetch it again") from e
    if not isinstance(value, dict):
        raise InputError(f"{file} holds a {type(value).__name__}, expected a JSON object")
    return value


def links_task(task):
    """Which links a task uses: they were trained for math and for code, and choice takes those for math."""
    return "code" if task == "code" else "math"


def entry(file, value, *path, kind):
    """value[path[0]][path[1]]... of a manifest, which is of `kind`; InputError names what is missing or of another kind."""
    for key in path:
        if not isinstance(value, dict) or key not in value:
            raise InputError(f"{file} has no {'.'.join(path)}: expected a file of the released layout; fetch it again")
        value = value[key]
    if type(value) is not kind:
        raise InputError(f"{file}: {'.'.join(path)} is {value!r:.80}, expected {KINDS[kind]}; fetch the file again")
    return value


def read_config(source):
    """config.json, in the spelling of transformers 5.3 or older -> (decoder class, its Config, dtype of the weights).

    Raises InputError on a model that is not supported, and on fields that are missing or say what no decoder here does.
    """
    file = find(source, "config.json")
    raw = read_json(file)
    check_known(f"{file}: model_type", [raw.get("model_type")], [*FAMILIES, *TEXT_PART])
    if raw["model_type"] in TEXT_PART:
        dtypes = {name: raw[name] for name in ("dtype", "torch_dtype") if name in raw}
        raw = dtypes | entry(file, raw, "text_config", kind=dict) | {"model_type": TEXT_PART[raw["model_type"]]}
    family, Config, must_be = FAMILIES[raw["model_type"]]
    check_fields(file, raw, Config, must_be)
    raw["rope_parameters"] = checked_rope(file, raw)
    config = Config(**{f.name: raw[f.name] for f in fields(Config) if f.name in raw})
    check_layers(file, config, LAYER_KINDS.get(raw["model_type"], ATTENTION_KINDS))
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
        raise InputError(f"{file} lacks {', '.join(missing)}: expected the config of a {raw['model_type']} decoder")
    for f in fields(Config):
        if f.name in raw and f.type in (int, int | None, float, bool):
            check_value(file, f.name, raw[f.name], f.type)


def check_value(file, name, value, kind):
    """InputError unless a value is of its kind in Config: int, `int | None`, float, or bool, which may be null."""
    if kind is bool:
        fits, expected = value is None or isinstance(value, bool), "true or false"
    elif kind is float:  # one that float32 can hold
        fits, expected = type(value) in (int, float) and 1e-38 < value < 1e38, "a number above 0"
    else:
        least, most = LIMITS.get(name, (1, 2 ** 24))
        fits = value is None and kind is not int or type(value) is int and least <= value <= most
        expected = f"a whole number from {least} to {most}"
    if not fits:
        raise InputError(f"{file}: {name} is {value!r:.80}, expected {expected}; fetch the file again")


def checked_rope(file, raw):
    """The rope_parameters of a config; InputError if they are not those of a kind that is supported, or given twice."""
    rope = rope_parameters(file, raw)
    if raw.get("rope_scaling") and rope != rope_parameters(file, raw | {"rope_parameters": None}):  # transformers' choice
        raise InputError(f"{file}: rope_parameters and rope_scaling differ: keep the one that the model was trained with")
    for part in rope.values() if raw["model_type"] == "gemma3_text" else [rope]:
        check_known(f"{file}: rope type", [part["rope_type"]], ROPE_TYPES)
        for name in ("rope_theta", *ROPE_TYPES[part["rope_type"]], *part.keys() & {"partial_rotary_factor"}):
            check_value(file, f"{name} of rope type {part['rope_type']}", part.get(name), float)
        if (partial := part.get("partial_rotary_factor", 1)) > 1:
            raise InputError(f"{file}: partial_rotary_factor is {partial}, expected 1 at most; fetch the file again")
    return rope


def check_layers(file, config, allowed):
    """InputError unless heads share keys evenly, and each layer is of an allowed kind and has the window that it needs."""
    for many, few in ("num_attention_heads", "num_key_value_heads"), ("linear_num_value_heads", "linear_num_key_heads"):
        if hasattr(config, many) and (n := getattr(config, many)) % (share := getattr(config, few)):
            raise InputError(f"{file}: {many} is {n}, expected a multiple of {few} {share}; fetch the file again")
    kinds = getattr(config, "layer_types", None)
    if kinds is None:
        return
    if not isinstance(kinds, list) or len(kinds) != config.num_hidden_layers or not allowed.issuperset(map(str, kinds)):
        raise InputError(f"{file}: layer_types is {kinds!r}, expected {config.num_hidden_layers} of "
                         f"{', '.join(sorted(allowed))}")
    if "sliding_attention" in kinds and config.sliding_window is None:
        raise InputError(f"{file}: layer_types has sliding_attention, but sliding_window is null or not in use")


def rope_parameters(file, raw):
    """The rope parameters of a config, as transformers 5 spells them; Gemma's for each layer type."""
    gemma3 = raw["model_type"] == "gemma3_text"
    if raw.get("rope_parameters"):
        rope = entry(file, raw, "rope_parameters", kind=dict)
        if gemma3:
            return {kind: with_type(entry(file, rope, kind, kind=dict)) for kind in sorted(ATTENTION_KINDS)}
        return with_type(rope)
    scaling = entry(file, raw, "rope_scaling", kind=dict) if raw.get("rope_scaling") else {}
    full = {"rope_theta": raw.get("rope_theta", 1e6 if gemma3 else 1e4), **with_type(scaling)}
    if raw.get("partial_rotary_factor") is not None:
        full["partial_rotary_factor"] = raw["partial_rotary_factor"]
    sliding = {"rope_theta": raw.get("rope_local_base_freq", 1e4), "rope_type": "default"}
    return {"full_attention": full, "sliding_attention": sliding} if gemma3 else full


def with_type(rope):
    """Rope parameters with their rope_type, which was once `type`."""
    return {"rope_type": rope.get("type", "default"), **{name: rope[name] for name in rope if name != "type"}}


def weight_files(source):
    """{name: path} of model.safetensors, or of the shards that the index names."""
    whole = find(source, "model.safetensors", required=False)
    if not whole and (index := find(source, "model.safetensors.index.json", required=False)):
        shards = entry(index, read_json(index), "weight_map", kind=dict)
        return {name: find(source, name) for name in sorted({entry(index, shards, key, kind=str) for key in shards})}
    return {"model.safetensors": whole or find(source, "model.safetensors")}


def parameter_name(key):
    """A tensor's name in a checkpoint -> its name in our decoder, or None if a text decoder has no use for it."""
    if re.match(r"(model\.)?(vision_tower|multi_modal_projector|visual|mtp)\.", key) or key.endswith("rotary_emb.inv_freq"):
        return None
    for prefix in ("language_model.model.", "model.language_model.", "language_model.", "model."):
        if key.startswith(prefix):
            return key[len(prefix):]
    return key


def load_weights(model, source, device, dtype):
    """Stream the weights of a source into `model`, which was built on the meta device, one tensor at a time.

    Raises InputError on a damaged file, and on a tensor that is missing, unknown, or not of config.json's shape.
    """
    expected, tied = dict(model.named_parameters(remove_duplicate=False)), model.config.tie_word_embeddings
    missing = set(expected) - ({"lm_head.weight"} if tied else set())
    for file in weight_files(source).values():
        try:
            with safe_open(file, framework="pt", backend="pread") as tensors:
                for key in tensors.keys():
                    name = parameter_name(key)
                    if name is None:
                        continue
                    tensor = checked_tensor(file, key, tensors.get_tensor(key), expected.get(name))
                    module, _, leaf = name.rpartition(".")
                    parameter = torch.nn.Parameter(tensor.to(device, dtype), requires_grad=False)
                    setattr(model.get_submodule(module), leaf, parameter)
                    missing.discard(name)
        except SafetensorError as e:
            raise InputError(f"{file} is damaged or cut short ({e}): fetch it again") from e
    if missing:
        raise InputError(f"{source}: the weights lack {len(missing)} of {len(expected)} tensors, "
                         f"the first is {min(missing)}")
    head, embeddings = model.lm_head.weight, model.embed_tokens.weight
    if tied and (head.is_meta or torch.equal(head, embeddings)):  # stored all the same: as in transformers, the file wins
        model.lm_head.weight = embeddings


def checked_tensor(file, key, tensor, expected):
    """The tensor, if it has the shape of the parameter `expected` (None: no such parameter) and a usable dtype."""
    if tensor.dtype not in DTYPES.values():
        raise InputError(f"{file}: {key} is stored as {tensor.dtype}, expected {', '.join(DTYPES)}: "
                         "quantised weights are not supported")
    if expected is None or tensor.shape != expected.shape:
        wanted = "no such tensor" if expected is None else f"shape {tuple(expected.shape)}"
        raise InputError(f"{file}: {key} has shape {tuple(tensor.shape)}, config.json makes it {wanted}: "
                         "weights and config.json are not of one model")
    return tensor


class Undrawn(TorchFunctionMode):
    """Embeddings made under it get no first values: to draw them on the meta device torch imports its compiler, 1.5 s."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        return kwargs["tensor"] if function is torch.nn.init.normal_ else function(*args, **kwargs or {})


def load_model(source, device="cpu", dtype=None, weights_device=None):
    """The frozen decoder of a source, in `dtype` (None: the one that config.json names) on `device`.

    weights_device: where the weights of an offloaded agent are put instead. Raises InputError on a bad config or file.
    On CUDA it also keeps torch, for the whole process, from attention by cuDNN, its first choice on Hopper: that makes a
    plan for each new number of tokens, and is reported to take tenths of a second for it.
    """
    if torch.device(device).type == "cuda":
        torch.backends.cuda.enable_cudnn_sdp(False)
    family, config, stored = read_config(source)
    with torch.device("meta"), Undrawn():
        model = family(config)
    load_weights(model, source, weights_device or device, dtype or stored)
    for name, buffer in model.named_buffers():
        setattr(model, name, buffer.to(device))
    return model.eval()


def load_tokenizer(source):
    """The Tokenizer of a source, with its chat template; InputError if a file is missing or damaged."""
    file = find(source, "tokenizer.json")
    try:
        fast = FastTokenizer.from_file(str(file))
    except Exception as e:  # tokenizers raises bare Exception
        raise InputError(f"{file} is damaged ({e}): fetch it again") from e
    fast.no_truncation()  # the length limit of some training may have been saved with it
    fast.no_padding()
    config = read_json(named_in := find(source, "tokenizer_config.json"))
    special = {k: entry(named_in, config, k, "content", kind=str) if isinstance(v, dict) else v for k, v in config.items()
               if k.endswith("_token") and isinstance(v, (str, dict))}
    if "add_bos_token" in config or "add_eos_token" in config:  # overrides what tokenizer.json puts around a plain text
        bos, eos = ([special[name]] if config.get(f"add_{name}") and name in special else []
                    for name in ("bos_token", "eos_token"))
        ids = [(token, fast.token_to_id(token)) for token in bos + eos]
        if unknown := [token for token, number in ids if number is None]:
            raise InputError(f"{named_in} puts {unknown[0]!r} around a text, but {file} does not know it: fetch both again")
        fast.post_processor = TemplateProcessing(single=[*bos, "$A", *eos], special_tokens=ids)
    in_config = config.get("chat_template")  # some base models have it there
    template = find(source, "chat_template.jinja", required=not isinstance(in_config, str))
    text = read_text(template) if template else in_config
    try:
        return Tokenizer(fast, special, text)
    except Exception as e:  # Jinja computes constants here, and compiles: more can go wrong than the syntax
        place, why = template or f"chat_template in {named_in}", (str(e) or type(e).__name__).splitlines()[0]
        raise InputError(f"{place} is damaged, it is not a Jinja template ({why}): fetch it again") from e


def load_generation(source, tokenizer):
    """The Generation of a source, from config.json where generation_config.json is missing, as in some base models.

    The tokenizer's own end token always ends a text, and top_k is 50 if none is named, as in transformers.
    """
    file = find(source, "generation_config.json", required=False) or find(source, "config.json")
    raw = read_json(file)
    raw = entry(file, {"text_config": {}} | raw, "text_config", kind=dict) | raw
    eos, top_k = raw.get("eos_token_id"), 50 if raw.get("top_k") is None else raw["top_k"]
    eos = [number for number in [*(eos if isinstance(eos, list) else [eos]), tokenizer.eos_id] if number is not None]
    if wrong := [number for number in [*eos, top_k] if type(number) is not int or number < 0]:
        raise InputError(f"{file}: eos_token_id or top_k has {wrong[0]!r}, expected a whole number from 0: fetch it again")
    return Generation(tuple(sorted(set(eos))), top_k)


def load_link(link, file, device="cpu", dtype=None):
    """Fill `link` from a released .pt file -> the link, frozen, on `device`, in the wider of its dtype and `dtype`.

    Raises InputError if the file is not a plain state dict of one floating dtype, or keys or shapes are not the link's.
    """
    try:
        state = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as e:  # whatever a damaged pickle leads to
        raise InputError(f"{file} is not a readable state dict ({type(e).__name__}): fetch the file again; minimas "
                         "reads links with weights_only=True and runs no code from them") from e
    wrong = [key for key, t in state.items() if not is_plain(key, t)] if isinstance(state, dict) else [type(state)]
    if wrong:
        raise InputError(f"{file} is not a plain state dict (wrong: {wrong[0]!r}): expected dense floating tensors without "
                         f"NaN or infinity under {', '.join(link.state_dict())}; fetch it again")
    found, expected = ({k: tuple(t.shape) for k, t in s.items()} for s in (state, link.state_dict()))
    for key in sorted({*found, *expected}):
        if found.get(key) != expected.get(key):
            raise InputError(f"{file}: {key} has shape {found.get(key, 'none (missing)')}, expected "
                             f"{expected.get(key, 'no such key')} for a {link.adapter_type} of this agent; "
                             "is it another agent's link?")
    dtypes = {t.dtype for t in state.values()}
    if len(dtypes) != 1:
        raise InputError(f"{file} mixes dtypes {sorted(map(str, dtypes))}: save all tensors in one")
    stored, = dtypes
    link.load_state_dict(state, assign=True)
    return link.to(device, torch.promote_types(stored, dtype or stored)).requires_grad_(False)


def is_plain(key, tensor):
    """Whether it is a name, and a dense tensor of finite numbers of a usable dtype."""
    return (isinstance(key, str) and torch.is_tensor(tensor) and tensor.dtype in DTYPES.values() and not tensor.is_meta
            and tensor.layout is torch.strided and not tensor.is_nested and bool(tensor.isfinite().all()))


def load_inner_link(source, task, D, device="cpu", dtype=None):
    """The inner link of a source for an agent of width D and of this dtype: the one for the task if there are several.
    """
    if manifest := find(source, "innerlink_config.json", required=False):
        file = find(source, entry(manifest, read_json(manifest), "tasks", links_task(task), "adapter.pt", kind=str))
    else:
        file = find(source, f"adapter({links_task(task)}).pt", required=False) or find(source, "adapter.pt")
    return load_link(InnerLink(D), file, device, dtype)


def load_outer_links(source, task, edges, agents):
    """{(source, target): OuterLink} for `edges`, {(source, target): released key}, between agents {role: Agent}.

    A link is put on the device of its source. Raises InputError if the manifest lacks a link or its widths are not those
    of the agents.
    """
    widths = {role: agent.model.config.hidden_size for role, agent in agents.items()}
    file = find(source, "outerlink_config.json")
    config = read_json(file)
    adapters = entry(file, config, *(["tasks", links_task(task)] if "tasks" in config else []), "adapters", kind=list)
    named, links = {entry(file, adapter, "legacy_key", kind=str): adapter for adapter in adapters}, {}
    for (src, dst), key in edges.items():
        if key not in named:
            raise InputError(f"{file} lists no link {key} ({src} to {dst}); it has {', '.join(named) or 'none'}")
        dims = entry(file, named[key], "in_dim", kind=int), entry(file, named[key], "out_dim", kind=int)
        if dims != (widths[src], widths[dst]):
            raise InputError(f"{file}: link {key} maps width {dims[0]} to {dims[1]}, but {src} has width {widths[src]} "
                             f"and {dst} {widths[dst]}: these links were trained for other agents")
        links[src, dst] = load_link(OuterLink(*dims), find(source, entry(file, named[key], "filename", kind=str)),
                                    agents[src].device, agents[src].model.norm.weight.dtype)
    return links


def usable_device(name):
    """The torch.device of that name (None: cuda if there is one, else cpu); InputError if nothing can be put there."""
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.empty(0, device=device)
        if device.type == "meta":
            raise TypeError("it holds no data")
    except (RuntimeError, AssertionError, TypeError, ImportError) as e:
        raise InputError(f"device {str(name)!r} cannot be used ({str(e).splitlines()[0]}): try cpu or cuda") from e
    return device


def usable_dtype(name, device):
    """The torch dtype of that name; None stands for float32 on a CPU, and for config.json's elsewhere."""
    if name is None:
        return torch.float32 if device.type == "cpu" else None
    name = str(name).removeprefix("torch.")
    check_known("dtype", [name], DTYPES)
    return DTYPES[name]
