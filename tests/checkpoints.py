"""Miniature checkpoints in the released layout, on which mistakes show.

Weights have scale 1/sqrt(fan_in) and norms scatter around 1, so that every part of a block moves the result; head width
differs from width / heads; query heads share key/value heads; rope scaling is active within a prompt's length. The same
bits everywhere: numpy's RandomState is frozen for good.
"""

import json
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from minimas import load
from minimas.link import InnerLink, OuterLink, save_link

CHATML = """{%- for message in messages %}
{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{% endif %}"""
CHATML_THINK = CHATML + """{%- if enable_thinking is defined and not enable_thinking %}{{- '<think>\\n\\n</think>\\n\\n' }}{% endif %}"""
LLAMA = """{{- bos_token }}{%- if date_string is not defined %}{% set date_string = strftime_now('%d %b %Y') %}{% endif %}
{%- for message in messages %}
{{- '<|start_header_id|>' + message.role + '<|end_header_id|>\\n\\n' }}
{%- if message.role == 'system' %}{{- 'Today Date: ' + date_string + '\\n\\n' }}{% endif %}
{{- message.content | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"""

# Per model_type: config.json besides the sizes, special tokens (the first begins a text, the second ends one), template.
QWEN_TOKENS = ["<|endoftext|>", "<|im_end|>", "<|im_start|>"]
LLAMA_TOKENS = ["<|begin_of_text|>", "<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>"]
FAMILIES = {
    "llama": ({"tie_word_embeddings": True, "rms_norm_eps": 1e-5, "attention_bias": False, "mlp_bias": False,
               "rope_parameters": {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0,
                                   "high_freq_factor": 4.0, "original_max_position_embeddings": 32}}, LLAMA_TOKENS, LLAMA),
    "qwen2": ({"tie_word_embeddings": False, "rms_norm_eps": 1e-6, "use_sliding_window": False, "sliding_window": 4, "max_window_layers": 0,
               "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}, QWEN_TOKENS, CHATML),
    "qwen3": ({"tie_word_embeddings": True, "rms_norm_eps": 1e-6, "use_sliding_window": False, "sliding_window": None, "attention_bias": False,
               "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}, QWEN_TOKENS, CHATML_THINK),
}
SIZES = {"hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 3, "num_attention_heads": 6, "num_key_value_heads": 2,
         "head_dim": 16, "max_position_embeddings": 4096}


def byte_tokenizer(specials):
    """Any text, a token a byte; special tokens come first."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(specials + alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(specials)
    return tokenizer


def random_weights(shapes, seed):
    """Deterministic float32 tensors for {name: shape}: matrices of scale 1/sqrt(fan_in), norms around 1, biases around 0."""
    random = np.random.RandomState(seed)
    weights = {}
    for name in sorted(shapes):
        x = random.standard_normal(tuple(shapes[name])).astype(np.float32)
        if len(x.shape) > 1:
            x /= np.sqrt(x.shape[1])
        else:
            x = x * 0.1 + (0 if name.endswith("bias") else 1)
        weights[name] = torch.from_numpy(x)
    return weights


def randomize(link, seed, output_scale):
    """Random weights for a link; its last LayerNorm's gain is of the scale of the embeddings it stands in for."""
    link.load_state_dict(random_weights({k: v.shape for k, v in link.state_dict().items()}, seed))
    last = link.post_ln if isinstance(link, InnerLink) else link.ln_target
    last.weight.data *= output_scale
    return link


def make_agent(folder, model_type, seed=0, dtype=torch.float32, **sizes):
    """An agent's folder; `sizes` go over SIZES and the family's config. Returns the folder."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    own, specials, template = FAMILIES[model_type]
    tokenizer = byte_tokenizer(specials)
    config = {"model_type": model_type, "dtype": "float32", "hidden_act": "silu", "vocab_size": tokenizer.get_vocab_size(), **SIZES, **own, **sizes}
    write = lambda name, value: (folder / name).write_text(value if isinstance(value, str) else json.dumps(value, indent=1))
    write("config.json", config)
    end = tokenizer.token_to_id(specials[1])
    write("generation_config.json", {"eos_token_id": [end, tokenizer.token_to_id(specials[0])], "top_k": 20})
    write("tokenizer_config.json", {"bos_token": specials[0], "eos_token": specials[1], "pad_token": specials[0],
                                    "tokenizer_class": "PreTrainedTokenizerFast"})
    write("chat_template.jinja", template)
    write("adapter_config.json", {"adapter_type": InnerLink.adapter_type})
    tokenizer.save(str(folder / "tokenizer.json"))
    with torch.device("meta"):
        family, fields, _ = load.read_config(folder)
        model = family(fields)
    weights = random_weights({name: p.shape for name, p in model.named_parameters()}, seed)
    head = "lm_head.weight"
    save_file({name if name == head else "model." + name: t.to(dtype) for name, t in weights.items()}, folder / "model.safetensors")
    D = config["hidden_size"]
    save_link(randomize(InnerLink(D), seed + 1, D ** -0.5), folder / "adapter.pt", dtype)
    return folder


def make_links(folder, edges, widths, seed=0, dtype=torch.float32):
    """A links folder for edges {(source, target): key} between agents of those widths. Returns the folder."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    adapters = []
    for i, ((source, target), key) in enumerate(edges.items()):
        link = randomize(OuterLink(widths[source], widths[target]), seed + i, widths[target] ** -0.5)
        name = f"{source.capitalize()}-{target.capitalize()}-Outerlink.pt"
        save_link(link, folder / name, dtype)
        adapters.append({"legacy_key": key, "filename": name, "source_role": source, "target_role": target,
                         "adapter_type": OuterLink.adapter_type, "in_dim": widths[source], "out_dim": widths[target]})
    (folder / "outerlink_config.json").write_text(json.dumps({"format_version": 1, "adapters": adapters}))
    return folder


# What the families are tested on: name -> (model_type, what its config says beside the family's own).
VARIANTS = {
    "llama": ("llama", {}),
    "llama untied": ("llama", {"tie_word_embeddings": False}),
    "llama without scaling": ("llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}}),
    "qwen2": ("qwen2", {}),
    "qwen2 tied": ("qwen2", {"tie_word_embeddings": True}),
    "qwen3": ("qwen3", {}),
    "qwen3 untied": ("qwen3", {"tie_word_embeddings": False}),
}

# A sequential system of three widths.
SEQUENTIAL = {"planner": ("qwen3", {"hidden_size": 48}), "critic": ("llama", {"hidden_size": 40}), "solver": ("qwen2", {"hidden_size": 56})}


def make_system(folder, edges, agents=SEQUENTIAL):
    """Folders of a whole system: {role, or "links": folder}."""
    folders = {role: make_agent(Path(folder) / role, kind, seed=10 * i, **sizes) for i, (role, (kind, sizes)) in enumerate(agents.items())}
    widths = {role: sizes["hidden_size"] for role, (_, sizes) in agents.items()}
    return folders | {"links": make_links(Path(folder) / "links", edges, widths, seed=100)}


# What the goldens were made of.
GOLDENS = Path(__file__).parent / "goldens"
IDS = torch.from_numpy(np.random.RandomState(0).randint(8, 250, (1, 70)))  # longer than llama3's original context here
QUESTIONS = ["What is 3 + 4?", "Take the first 12 odd numbers. {critic} Which is larger, their sum or [slot 0] 11 * 13?\nAn answer"]
RECURSION = {"rounds": (1, 3), "latent_steps": 6, "max_new_tokens": 12}
