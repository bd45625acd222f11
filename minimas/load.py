"""From a folder or hub repository (a "source") in the released layout to a working decoder, tokenizer and links. Every
exception of a checkpoint is here.

An agent's folder: config.json, generation_config.json, model.safetensors (or shards and model.safetensors.index.json),
tokenizer.json, tokenizer_config.json, chat_template.jinja, and its inner link, adapter.pt or adapter(TASK).pt.
The links' folder: outerlink_config.json and the .pt files that it names.

What is wrong with a file is found here, once, and told in a sentence; the rest of the package trusts what it is given.
"""

import json
import re
from dataclasses import MISSING, dataclass, fields

import jinja2
import torch
from safetensors import SafetensorError, safe_open
from tokenizers import Tokenizer as FastTokenizer
from tokenizers.processors import TemplateProcessing

from . import InputError
from . import gemma, llama, mistral, qwen
from .hub import find
from .link import InnerLink, OuterLink, load_link
from .tokenizer import Tokenizer

LLAMA_LIKE = {"hidden_act": "silu", "attention_bias": False, "mlp_bias": False}
GEMMA_LIKE = {"hidden_activation": "gelu_pytorch_tanh", "attention_bias": False, "attn_logit_softcapping": None,
              "final_logit_softcapping": None}
FAMILIES = {  # model_type in config.json -> decoder, its Config, and what config.json must not say otherwise
    "llama": (llama.Llama, llama.Config, LLAMA_LIKE),
    "mistral": (llama.Llama, mistral.Config, LLAMA_LIKE),
    "qwen2": (qwen.Qwen2, qwen.Config, LLAMA_LIKE),
    "qwen3": (qwen.Qwen3, qwen.Config, LLAMA_LIKE),
    "qwen3_5_text": (qwen.Qwen35, qwen.Config35, LLAMA_LIKE),
    "gemma3_text": (gemma.Gemma3, gemma.Config, GEMMA_LIKE),
}
TEXT_PART = {"gemma3": "gemma3_text", "qwen3_5": "qwen3_5_text"}  # models of text and images: the decoder is in text_config
ROPE_TYPES = {  # and what each needs besides rope_theta
    "default": (), "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")}
DTYPES = {name: getattr(torch, name) for name in ("float32", "bfloat16", "float16", "float64")}


@dataclass
class Generation:
    """What generation_config.json says of decoding: the token ids that end a text, and top_k (50 where it names none)."""
    eos_ids: tuple[int, ...] = ()
    top_k: int = 50


def read_text(file):
    try:
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError as e:
        raise InputError(f"{file} is damaged, it is not UTF-8 text ({e.reason} at byte {e.start}): fetch it again") from e


def read_json(file):
    """A JSON file that holds an object."""
    try:
        value = json.loads(read_text(file))
    except json.JSONDecodeError as e:
        raise InputError(f"{file} is damaged, it is not JSON ({e}): fetch it again") from e
    if not isinstance(value, dict):
        raise InputError(f"{file} holds a {type(value).__name__}, expected a JSON object")
    return value


def links_task(task):
    """Links were trained for math and for code; questions of choice use those for math."""
    return "code" if task == "code" else "math"


def entry(file, value, *path):
    """value[path[0]][path[1]]... of a manifest; InputError names what it lacks."""
    for key in path:
        if not isinstance(value, dict) or key not in value:
            raise InputError(f"{file} has no {'.'.join(path)}: expected the manifest of the released layout; fetch it again")
        value = value[key]
    return value


def read_config(source):
    """config.json -> (decoder class, its Config, dtype of the weights), in transformers 5.3's spelling or the older one."""
    file = find(source, "config.json")
    raw = read_json(file)
    if raw.get("model_type") in TEXT_PART:
        dtypes = {name: raw[name] for name in ("dtype", "torch_dtype") if name in raw}
        raw = dtypes | (raw.get("text_config") or {}) | {"model_type": TEXT_PART[raw["model_type"]]}
    if raw.get("model_type") not in FAMILIES:
        raise InputError(f"{file}: model_type {raw.get('model_type')!r} is not supported; "
                         f"minimas has {', '.join([*FAMILIES, *TEXT_PART])}")
    family, Config, fixed = FAMILIES[raw["model_type"]]
    raw["rope_parameters"] = rope = rope_parameters(raw)
    for part in rope.values() if "full_attention" in rope else [rope]:
        if part["rope_type"] not in ROPE_TYPES:
            raise InputError(f"{file}: rope type {part['rope_type']!r} is not supported, only {', '.join(ROPE_TYPES)}")
        if lacking := {"rope_theta", *ROPE_TYPES[part["rope_type"]]} - set(part):
            raise InputError(f"{file}: rope of type {part['rope_type']} lacks {', '.join(sorted(lacking))}; fetch the file again")
    for name, value in fixed.items():
        if raw.get(name, value) != value:
            raise InputError(f"{file}: {name} {raw[name]!r} is not supported, expected {value!r}")
    missing = [f.name for f in fields(Config) if f.name not in raw and f.default is MISSING]
    if missing:
        raise InputError(f"{file} lacks {', '.join(missing)}: expected the config of a {raw['model_type']} decoder")
    dtype = raw.get("dtype") or raw.get("torch_dtype") or "float32"
    if dtype not in DTYPES:
        raise InputError(f"{file}: dtype {dtype!r} is not supported, expected one of {', '.join(DTYPES)}")
    return family, Config(**{f.name: raw[f.name] for f in fields(Config) if f.name in raw}), DTYPES[dtype]


def rope_parameters(raw):
    """The rope values of a config as transformers 5 spells them: rope_type, rope_theta, ...; Gemma's per layer type."""
    if raw.get("rope_parameters"):
        rope = raw["rope_parameters"]
        if "full_attention" in rope:
            return {kind: {"rope_type": "default", **part} for kind, part in rope.items()}
        return {"rope_type": "default", **rope}
    scaling = dict(raw.get("rope_scaling") or {})
    kind = scaling.pop("rope_type", scaling.pop("type", "default"))
    full = {"rope_theta": raw.get("rope_theta", 1e6 if raw["model_type"] == "gemma3_text" else 1e4), "rope_type": kind, **scaling}
    if "partial_rotary_factor" in raw:
        full["partial_rotary_factor"] = raw["partial_rotary_factor"]
    if raw["model_type"] != "gemma3_text":
        return full
    return {"full_attention": full, "sliding_attention": {"rope_type": "default", "rope_theta": raw.get("rope_local_base_freq", 1e4)}}


def weight_files(source):
    """model.safetensors, or the shards that the index names."""
    if whole := find(source, "model.safetensors", required=False):
        return [whole]
    if index := find(source, "model.safetensors.index.json", required=False):
        return [find(source, name) for name in sorted(set(entry(index, read_json(index), "weight_map").values()))]
    return [find(source, "model.safetensors")]


def parameter_name(key):
    """A tensor's name in a checkpoint -> its name in our decoder, or None for what a text decoder has no use for."""
    if re.match(r"(model\.)?(vision_tower|multi_modal_projector|visual|mtp)\.", key) or key.endswith("rotary_emb.inv_freq"):
        return None
    for prefix in ("language_model.model.", "model.language_model.", "language_model.", "model."):
        if key.startswith(prefix):
            return key[len(prefix):]
    return key


def load_weights(model, source, device, dtype):
    """Stream the weights of a folder into `model` (built on the meta device), one tensor at a time.

    Raises InputError on a damaged file, and on a tensor that is missing, unknown, or not of the shape config.json asks for.
    """
    expected = dict(model.named_parameters(remove_duplicate=False))
    tied = {"lm_head.weight"} if model.config.tie_word_embeddings else set()  # may be stored all the same: then skipped
    missing = set(expected) - tied
    for file in weight_files(source):
        try:
            with safe_open(file, framework="pt", backend="pread") as tensors:
                for key in tensors.keys():
                    name = parameter_name(key)
                    if name is None or name in tied:
                        continue
                    tensor = tensors.get_tensor(key)
                    if tensor.dtype not in DTYPES.values():
                        raise InputError(f"{file}: {key} is stored as {tensor.dtype}, expected {', '.join(DTYPES)}: "
                                         "quantised weights are not supported")
                    if name not in expected or tensor.shape != expected[name].shape:
                        wanted = f"shape {tuple(expected[name].shape)}" if name in expected else "no such tensor"
                        raise InputError(f"{file}: {key} has shape {tuple(tensor.shape)}, config.json makes it {wanted}: "
                                         "weights and config.json are not of one model")
                    module, _, leaf = name.rpartition(".")
                    parameter = torch.nn.Parameter(tensor.to(device, dtype), requires_grad=False)
                    setattr(model.get_submodule(module), leaf, parameter)
                    missing.discard(name)
        except SafetensorError as e:
            raise InputError(f"{file} is damaged or cut short ({e}): fetch it again") from e
    if missing:
        raise InputError(f"{source}: the weights lack {sorted(missing)[0]} and {len(missing) - 1} more tensors of {len(expected)}")
    if tied:
        model.lm_head.weight = model.embed_tokens.weight


def load_model(source, device="cpu", dtype=None, rest=None):
    """Decoder of a folder, frozen, in `dtype` (None: the one config.json names), on `device`; its weights on `rest` if given."""
    family, config, stored = read_config(source)
    with torch.device("meta"):
        model = family(config)
    load_weights(model, source, rest or device, dtype or stored)
    for name, buffer in model.named_buffers():
        setattr(model, name, buffer.to(device))
    return model.eval()


def load_tokenizer(source):
    """Tokenizer and chat template of a folder."""
    file = find(source, "tokenizer.json")
    try:
        fast = FastTokenizer.from_file(str(file))
    except Exception as e:  # tokenizers raises bare Exception
        raise InputError(f"{file} is damaged ({e}): fetch it again") from e
    fast.no_truncation()  # a length limit of somebody's training may have been saved with it
    fast.no_padding()
    config = read_json(find(source, "tokenizer_config.json"))
    special = {k: v["content"] if isinstance(v, dict) else v for k, v in config.items() if k.endswith("_token") and isinstance(v, (str, dict))}
    if "add_bos_token" in config or "add_eos_token" in config:  # goes over what tokenizer.json puts around a plain text
        bos, eos = ([special[name]] if config.get(f"add_{name}") and name in special else [] for name in ("bos_token", "eos_token"))
        ids = [(token, fast.token_to_id(token)) for token in bos + eos]
        fast.post_processor = TemplateProcessing(single=[*bos, "$A", *eos], special_tokens=ids)
    in_config = config.get("chat_template")  # where some base models have it
    template = find(source, "chat_template.jinja", required=not isinstance(in_config, str))
    try:
        return Tokenizer(fast, special, read_text(template) if template else in_config)
    except jinja2.TemplateSyntaxError as e:
        raise InputError(f"{template} is damaged, it is not a Jinja template ({e}): fetch it again") from e


def load_generation(source, tokenizer):
    """Stop ids and top_k of a folder; the tokenizer's own end token always stops."""
    raw = read_json(find(source, "generation_config.json"))
    eos = raw.get("eos_token_id") or []
    eos = {*(eos if isinstance(eos, list) else [eos]), tokenizer.eos_id} - {None}
    return Generation(tuple(sorted(eos)), raw.get("top_k", 50))


def load_inner_link(source, task, D, device="cpu", dtype=None):
    """The inner link of a folder for the agent's width D and dtype: the one for the task if there are several."""
    if manifest := find(source, "innerlink_config.json", required=False):
        file = find(source, entry(manifest, read_json(manifest), "tasks", links_task(task), "adapter.pt"))
    else:
        file = find(source, f"adapter({links_task(task)}).pt", required=False) or find(source, "adapter.pt")
    return load_link(InnerLink(D), file, device, dtype)


def load_outer_links(source, task, edges, models, devices):
    """{(source, target): OuterLink} for `edges`, {(source, target): released key}, between decoders {role: model}.

    A link lies on the device of its source; `devices` is {role: device}.
    """
    widths = {role: model.config.hidden_size for role, model in models.items()}
    file = find(source, "outerlink_config.json")
    config = read_json(file)
    adapters = entry(file, config, "tasks", links_task(task), "adapters") if "tasks" in config else entry(file, config, "adapters")
    named, links = {adapter.get("legacy_key"): adapter for adapter in adapters}, {}
    for (src, dst), key in edges.items():
        if key not in named:
            raise InputError(f"{file} lists no link {key} ({src} to {dst}); it has {', '.join(map(str, named)) or 'none'}")
        dims = entry(file, named[key], "in_dim"), entry(file, named[key], "out_dim")
        if dims != (widths[src], widths[dst]):
            raise InputError(f"{file}: link {key} maps width {dims[0]} to {dims[1]}, but {src} has width {widths[src]} "
                             f"and {dst} {widths[dst]}: these links were trained for other agents")
        links[src, dst] = load_link(OuterLink(*dims), find(source, entry(file, named[key], "filename")), devices[src],
                                    models[src].norm.weight.dtype)
    return links
