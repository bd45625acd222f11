"""Miniature checkpoints in the released layout, on which mistakes show.

Weights have scale 1/sqrt(fan_in) and norms scatter around 1, so that every part of a block moves the result; head width
differs from width / heads; query heads share key/value heads; rope scaling is active within a prompt's length. The same
bits everywhere: numpy's RandomState is frozen for good.
"""

import json
import os
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from minimas.link import InnerLink, OuterLink
from minimas.load import decoder_without_weights
from minimas.styles import STYLES
from minimas.train.save import save_link

CHATML = """{%- for message in messages %}
{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{% endif %}"""
CHATML_THINK = (
    CHATML
    + """{%- if enable_thinking is defined and not enable_thinking %}\
{{- '<think>\\n\\n</think>\\n\\n' }}{% endif %}"""
)
LLAMA = """{{- bos_token }}\
{%- if date_string is not defined %}{% set date_string = strftime_now('%d %b %Y') %}{% endif %}
{%- for message in messages %}
{{- '<|start_header_id|>' + message.role + '<|end_header_id|>\\n\\n' }}
{%- if message.role == 'system' %}{{- 'Today Date: ' + date_string + '\\n\\n' }}{% endif %}
{{- message.content | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"""

GEMMA = """{{ bos_token }}{%- if messages[0].role == 'system' %}\
{% set first = messages[0].content + '\\n\\n' %}{% set messages = messages[1:] %}
{%- else %}{% set first = '' %}{% endif %}
{%- for message in messages %}
{%- if (message.role == 'user') != (loop.index0 % 2 == 0) %}\
{{ raise_exception('Conversation roles must alternate') }}{% endif %}
{{- '<start_of_turn>' + message.role + '\\n' + \
(first if loop.first else '') + message.content | trim + '<end_of_turn>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}"""
MISTRAL = """{{ bos_token }}{% for message in messages %}
{%- if (message.role == 'user') != (loop.index0 % 2 == 0) %}\
{{ raise_exception('Conversation roles must alternate user and assistant') }}{% endif %}
{{- '[INST] ' + message.content + ' [/INST]' if message.role == 'user' else message.content + eos_token + ' ' }}\
{% endfor %}"""

# Per model_type: config.json besides the sizes, special tokens (the first begins a text, the second ends one),
# template.
DEFAULT_ROPE = {"rope_type": "default", "rope_theta": 1e4}
QWEN_TOKENS = ["<|endoftext|>", "<|im_end|>", "<|im_start|>"]
LLAMA_TOKENS = ["<|begin_of_text|>", "<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>"]
FAMILIES = {
    "llama": (
        {
            "tie_word_embeddings": True,
            "rms_norm_eps": 1e-5,
            "attention_bias": False,
            "mlp_bias": False,
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 1e4,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 32,
            },
        },
        LLAMA_TOKENS,
        LLAMA,
    ),
    "mistral": (
        {
            "tie_word_embeddings": False,
            "rms_norm_eps": 1e-5,
            "sliding_window": 12,
            "rope_parameters": DEFAULT_ROPE,
        },
        ["<s>", "</s>"],
        MISTRAL,
    ),
    "qwen2": (
        {
            "tie_word_embeddings": False,
            "rms_norm_eps": 1e-6,
            "use_sliding_window": False,
            "sliding_window": 4,
            "max_window_layers": 0,
            "rope_parameters": DEFAULT_ROPE,
        },
        QWEN_TOKENS,
        CHATML,
    ),
    "qwen3": (
        {
            "tie_word_embeddings": True,
            "rms_norm_eps": 1e-6,
            "use_sliding_window": False,
            "sliding_window": None,
            "attention_bias": False,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
        },
        QWEN_TOKENS,
        CHATML_THINK,
    ),
    "qwen3_5_text": (
        {
            "tie_word_embeddings": True,
            "rms_norm_eps": 1e-6,
            "attention_bias": False,
            "num_hidden_layers": 4,
            "full_attention_interval": 4,
            "layer_types": ["linear_attention"] * 3 + ["full_attention"],
            "attn_output_gate": True,
            "mamba_ssm_dtype": "float32",
            "linear_conv_kernel_dim": 4,
            "linear_key_head_dim": 8,
            "linear_value_head_dim": 12,
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 4,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 1e4,
                "partial_rotary_factor": 0.25,
                "mrope_section": [1, 1, 0],
                "mrope_interleaved": True,
            },
        },
        QWEN_TOKENS,
        CHATML_THINK,
    ),
    "gemma3": (
        {
            "tie_word_embeddings": True,
            "rms_norm_eps": 1e-6,
            "num_hidden_layers": 6,
            "query_pre_attn_scalar": 24,
            "sliding_window": 12,
            "layer_types": ["sliding_attention"] * 5 + ["full_attention"],
            "hidden_activation": "gelu_pytorch_tanh",
            "attention_bias": False,
            "rope_parameters": {
                "sliding_attention": DEFAULT_ROPE,
                "full_attention": {"rope_type": "linear", "rope_theta": 1e5, "factor": 8.0},
            },
        },
        ["<bos>", "<end_of_turn>", "<start_of_turn>", "<eos>"],
        GEMMA,
    ),
}
# as transformers 5.3 saves these classes
PREFIX = {"gemma3": "language_model.model.", "qwen3_5_text": "model.language_model."}
SIZES = {
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 4096,
}


def byte_tokenizer(specials):
    """Any text, a token a byte; special tokens come first."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(
        models.BPE(vocab={c: i for i, c in enumerate(specials + alphabet)}, merges=[])
    )
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(specials)
    return tokenizer


def random_weights(shapes, seed, offset_norms=False):
    """Deterministic float32 tensors for {name: shape}:
    matrices of scale 1/sqrt(fan_in), norms around 1, biases around 0.

    offset_norms: the family's norms scale by 1 + w, so that w is around 0.
    """
    random = np.random.RandomState(seed)
    weights = {}
    for name in sorted(shapes):
        x = random.standard_normal(tuple(shapes[name])).astype(np.float32)
        if len(x.shape) > 1:
            x /= np.sqrt(np.prod(x.shape[1:]))
        elif name.endswith("A_log"):
            x -= 2  # a decay slow enough that the state carries over many tokens
        else:
            x = x * 0.1 + (
                0
                if name.endswith("bias")
                or offset_norms
                and not name.endswith("linear_attn.norm.weight")
                else 1
            )
        weights[name] = torch.from_numpy(x)
    return weights


def randomize(link, seed, output_scale):
    """Random weights for a link; its last LayerNorm's gain is of the scale of the embeddings it stands in for."""
    link.load_state_dict(random_weights({k: v.shape for k, v in link.state_dict().items()}, seed))
    last = link.post_ln if isinstance(link, InnerLink) else link.ln_target
    last.weight.data *= output_scale
    return link


def make_agent(folder, model_type, seed=0, dtype=torch.float32, adapters=("adapter.pt",), **sizes):
    """An agent's folder; `sizes` go over SIZES and the family's config. Returns the folder."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    own, specials, template = FAMILIES[model_type]
    tokenizer = byte_tokenizer(specials)
    config = {
        "model_type": model_type,
        "dtype": "float32",
        "hidden_act": "silu",
        "vocab_size": tokenizer.get_vocab_size(),
        **SIZES,
        **own,
        **sizes,
    }
    D = config["hidden_size"]
    if model_type == "gemma3":
        del config["hidden_act"]
        config = {
            "model_type": "gemma3",
            "dtype": "float32",
            "text_config": config | {"model_type": "gemma3_text"},
            "mm_tokens_per_image": 4,
            "vision_config": {
                "hidden_size": 16,
                "num_attention_heads": 2,
                "num_hidden_layers": 1,
                "intermediate_size": 16,
                "image_size": 28,
                "patch_size": 14,
            },
        }
    write = lambda name, value: (folder / name).write_text(
        value if isinstance(value, str) else json.dumps(value, indent=1)
    )
    write("config.json", config)
    end = tokenizer.token_to_id(specials[1])
    write(
        "generation_config.json",
        {"eos_token_id": [end, tokenizer.token_to_id(specials[0])], "top_k": 20},
    )
    write(
        "tokenizer_config.json",
        {
            "bos_token": specials[0],
            "eos_token": specials[1],
            "pad_token": specials[0],
            "tokenizer_class": "PreTrainedTokenizerFast",
        },
    )
    write("chat_template.jinja", template)
    write("adapter_config.json", {"adapter_type": InnerLink.adapter_type})
    tokenizer.save(str(folder / "tokenizer.json"))
    model, _ = decoder_without_weights(folder)
    named = dict(model.named_parameters())
    if model.config.tie_word_embeddings:
        del named["lm_head.weight"]
    weights = random_weights(
        {name: p.shape for name, p in named.items()}, seed, model_type in ("gemma3", "qwen3_5_text")
    )
    prefix = PREFIX.get(model_type, "model.")
    save_file(
        {
            name if name == "lm_head.weight" else prefix + name: t.to(dtype)
            for name, t in weights.items()
        },
        folder / "model.safetensors",
        metadata={"format": "pt"},
    )
    for i, name in enumerate(adapters):
        save_link(randomize(InnerLink(D), seed + 1 + i, D**-0.5), folder / name, dtype)
    return folder


def make_links(folder, edges, widths, seed=0, dtype=torch.float32):
    """A links folder for edges {(source, target): key} between agents of those widths. Returns the folder."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    adapters = []
    for i, ((source, target), key) in enumerate(edges.items()):
        link = randomize(
            OuterLink(widths[source], widths[target]), seed + i, widths[target] ** -0.5
        )
        name = f"{source.capitalize()}-{target.capitalize()}-Outerlink.pt"
        save_link(link, folder / name, dtype)
        adapters.append(
            {
                "legacy_key": key,
                "filename": name,
                "source_role": source,
                "target_role": target,
                "adapter_type": OuterLink.adapter_type,
                "in_dim": widths[source],
                "out_dim": widths[target],
            }
        )
    (folder / "outerlink_config.json").write_text(
        json.dumps({"format_version": 1, "adapters": adapters})
    )
    return folder


# Decoders whose blocks take their steps on the plain path: a part of them is not in prepare.KNOWN_ON_CPU, or KNOWN
PLAIN_STEPS = {"cpu": {"qwen3_5_text"}, "cuda": set()}

# What the families are tested on: name -> (model_type, what its config says beside the family's own).
VARIANTS = {
    "llama": ("llama", {}),
    "llama untied": ("llama", {"tie_word_embeddings": False}),
    "llama without scaling": (
        "llama",
        {"rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}},
    ),
    "qwen2": ("qwen2", {}),
    "qwen2 tied": ("qwen2", {"tie_word_embeddings": True}),
    "qwen2 windows": (
        "qwen2",
        {
            "use_sliding_window": True,
            "sliding_window": 12,
            "max_window_layers": 1,
            "layer_types": ["full_attention", "sliding_attention", "sliding_attention"],
        },
    ),
    "mistral": ("mistral", {}),
    "mistral without window": ("mistral", {"sliding_window": None}),
    "gemma3": ("gemma3", {}),
    "qwen3.5": ("qwen3_5_text", {}),
    "qwen3.5 untied": ("qwen3_5_text", {"tie_word_embeddings": False}),
    "qwen3": ("qwen3", {}),
    "qwen3 untied": ("qwen3", {"tie_word_embeddings": False}),
}

# The widths of the released agents, at the depth that shows every kind of layer once: name -> (model_type, config).
TWO_KINDS = {
    "layers": 2,
    "layer_types": ["linear_attention", "full_attention"],
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
    "linear_num_key_heads": 16,
    "rope_parameters": {
        "rope_type": "default",
        "rope_theta": 1e7,
        "partial_rotary_factor": 0.25,
        "mrope_section": [11, 11, 10],
        "mrope_interleaved": True,
    },
}


@contextmanager
def without_adapter(folder):
    """The folder as transformers may see it: where PEFT is installed it takes adapter_config.json for PEFT's."""
    with TemporaryDirectory() as name:
        for file in Path(folder).iterdir():
            if not file.name.startswith("adapter"):
                os.symlink(file.resolve(), Path(name) / file.name)
        yield Path(name)


def widths(D, inter, heads, kv, d, layers=1, **more):
    return {
        "hidden_size": D,
        "intermediate_size": inter,
        "num_attention_heads": heads,
        "num_key_value_heads": kv,
        "head_dim": d,
        "num_hidden_layers": layers,
        **more,
    }


REAL_WIDTHS = {
    "Qwen3-1.7B": ("qwen3", widths(2048, 6144, 16, 8, 128)),
    "Llama3.2-1B": ("llama", widths(2048, 8192, 32, 8, 64)),
    "Llama3.2-3B": ("llama", widths(3072, 8192, 24, 8, 128)),
    "Qwen2.5-Math-1.5B": ("qwen2", widths(1536, 8960, 12, 2, 128)),
    "Qwen2.5-Coder-3B": ("qwen2", widths(2048, 11008, 16, 2, 128)),
    "BioMistral-7B": ("mistral", widths(4096, 14336, 32, 8, 128)),
    "Gemma3-4B": (
        "gemma3",
        widths(
            2560,
            10240,
            8,
            4,
            256,
            2,
            layer_types=["sliding_attention", "full_attention"],
            query_pre_attn_scalar=256,
        ),
    ),
    "Qwen3.5-2B": (
        "qwen3_5_text",
        widths(2048, 6144, 8, 2, 256, **TWO_KINDS, linear_num_value_heads=16),
    ),
    "Qwen3.5-4B": (
        "qwen3_5_text",
        widths(2560, 9216, 16, 4, 256, **TWO_KINDS, linear_num_value_heads=32),
    ),
    "Qwen3.5-9B": (
        "qwen3_5_text",
        widths(4096, 12288, 16, 4, 256, **TWO_KINDS, linear_num_value_heads=32),
    ),
}

# The five styles in miniature, each agent of its released family, widths unequal:
# style -> {role: (model_type, config)}. Newer versions of transformers refuse a Llama whose width is no multiple of its
# heads, even if it names its head width.
SYSTEMS = {
    "sequential_light": {
        "planner": ("qwen3", {"hidden_size": 48}),
        "critic": ("llama", {"hidden_size": 40, "num_attention_heads": 4}),
        "solver": ("qwen2", {"hidden_size": 56}),
    },
    "sequential_scaled": {
        "planner": ("gemma3", {"hidden_size": 48}),
        "critic": ("llama", {"hidden_size": 40, "num_attention_heads": 4}),
        "solver": ("qwen3_5_text", {"hidden_size": 56}),
    },
    "mixture": {
        "math": ("qwen2", {"hidden_size": 32}),
        "code": ("qwen2", {"hidden_size": 40, "tie_word_embeddings": True}),
        # a window of 12, as elsewhere, would hide what the summarizer sends from what it sends back
        "science": ("mistral", {"hidden_size": 48, "sliding_window": 300}),
        "summarizer": ("qwen3_5_text", {"hidden_size": 40}),
    },
    "distillation": {
        "expert": ("qwen3_5_text", {"hidden_size": 56, "tie_word_embeddings": False}),
        "learner": ("qwen3_5_text", {"hidden_size": 40}),
    },
    "deliberation": {
        "reflector": ("qwen3_5_text", {"hidden_size": 40}),
        "toolcaller": ("qwen3_5_text", {"hidden_size": 40}),
    },
}


def make_system(folder, style="sequential_light"):
    """Folders of a whole system: {role, or "links": folder}."""
    agents = SYSTEMS[style]
    folders = {
        role: make_agent(Path(folder) / role, kind, seed=10 * i, **sizes)
        for i, (role, (kind, sizes)) in enumerate(agents.items())
    }
    widths = {role: sizes["hidden_size"] for role, (_, sizes) in agents.items()}
    return folders | {
        "links": make_links(Path(folder) / "links", STYLES[style].edges, widths, seed=100)
    }


# The nineteen released repositories, as the paper's authors published them:
# style -> {role: repository}, and the files of links.
RELEASED = {
    "sequential_light": (
        {
            "planner": "Sequential-Light-Planner-Qwen3-1.7B",
            "critic": "Sequential-Light-Critic-Llama3.2-1B",
            "solver": "Sequential-Light-Solver-Qwen2.5-Math-1.5B",
            "links": "Sequential-Light-Outerlinks",
        },
        {"outer_12": "Planner-Critic", "outer_23": "Critic-Solver", "outer_31": "Solver-Planner"},
    ),
    "sequential_scaled": (
        {
            "planner": "Sequential-Scaled-Planner-Gemma3-4B",
            "critic": "Sequential-Scaled-Critic-Llama3.2-3B",
            "solver": "Sequential-Scaled-Solver-Qwen3.5-4B",
            "links": "Sequential-Scaled-Outerlinks",
        },
        {"outer_12": "Planner-Critic", "outer_23": "Critic-Solver", "outer_31": "Solver-Planner"},
    ),
    "mixture": (
        {
            "math": "Mixture-Math-DeepSeek-R1-Distill-Qwen-1.5B",
            "code": "Mixture-Code-Qwen2.5-Coder-3B",
            "science": "Mixture-Science-BioMistral-7B",
            "summarizer": "Mixture-Summarizer-Qwen3.5-2B",
            "links": "Mixture-Outerlinks",
        },
        {
            "outer_1s": "Math-Summarizer",
            "outer_2s": "Code-Summarizer",
            "outer_3s": "Science-Summarizer",
            "outer_s1": "Summarizer-Math",
            "outer_s2": "Summarizer-Code",
            "outer_s3": "Summarizer-Science",
        },
    ),
    "distillation": (
        {
            "expert": "Distillation-Expert-Qwen3.5-9B",
            "learner": "Distillation-Learner-Qwen3.5-4B",
            "links": "Distillation-Outerlinks",
        },
        {"outer_el": "Expert-Learner", "outer_le": "Learner-Expert"},
    ),
    "deliberation": (
        {
            "reflector": "Deliberation-Reflector-Qwen3.5-4B",
            "toolcaller": "Deliberation-Toolcaller-Qwen3.5-4B",
            "links": "Deliberation-Outerlinks",
        },
        {"outer_rt": "Reflector-Toolcaller", "outer_tr": "Toolcaller-Reflector"},
    ),
}


def make_released(folder, style):
    """The repositories of a style in miniature below folder/RecursiveMAS,
    with the files, manifests and oddities of the real ones.
    """
    repositories, links = RELEASED[style]
    by_task = style not in ("mixture", "deliberation")
    tasks, widths = ("math", "code") if by_task else (None,), {}
    suffix = lambda task: f"({task})" if task else ""
    for i, (role, (kind, sizes)) in enumerate(SYSTEMS[style].items()):
        place = folder / "RecursiveMAS" / repositories[role]
        make_agent(
            place,
            kind,
            seed=10 * i,
            dtype=torch.bfloat16,
            adapters=[f"adapter{suffix(task)}.pt" for task in tasks],
            **sizes,
        )
        widths[role] = sizes["hidden_size"]
        if by_task:
            manifest = {
                "format_version": 1,
                "tasks": {
                    task: {"adapter.pt": f"adapter({task}).pt", "config.json": "config.json"}
                    for task in tasks
                },
            }
            (place / "innerlink_config.json").write_text(json.dumps(manifest))
        weights, config = (
            load_file(place / "model.safetensors"),
            json.loads((place / "config.json").read_text()),
        )
        if kind == "gemma3":
            weights |= {
                "vision_tower.vision_model.x": torch.ones(3),
                "multi_modal_projector.x": torch.ones(3),
            }
        if kind == "qwen3":  # tied, and the head is stored all the same
            weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
        if kind == "llama":  # written by an older transformers
            rope = config.pop("rope_parameters")
            config |= {
                "rope_theta": rope.pop("rope_theta"),
                "rope_scaling": rope,
                "torch_dtype": config.pop("dtype"),
            }
        save_file(weights, place / "model.safetensors", metadata={"format": "pt"})
        (place / "config.json").write_text(json.dumps(config))
    place, adapters = folder / "RecursiveMAS" / repositories["links"], {}
    place.mkdir(parents=True)
    for task in tasks:
        for i, (key, name) in enumerate(links.items()):
            source, target = name.lower().split("-")
            link, file = (
                OuterLink(widths[source], widths[target]),
                f"{name}-Outerlink{suffix(task)}.pt",
            )
            save_link(
                randomize(link, i + 50 * (task == "code"), widths[target] ** -0.5), place / file
            )
            adapters.setdefault(task, []).append(
                {
                    "legacy_key": key,
                    "legacy_filename": f"{key}.pt",
                    "filename": file,
                    "source_role": source,
                    "target_role": target,
                    "adapter_type": "outer_ln_res_adapter",
                    "in_dim": widths[source],
                    "out_dim": widths[target],
                }
            )
    whole = (
        {"tasks": {task: {"task": task, "adapters": adapters[task]} for task in tasks}}
        if by_task
        else {"adapters": adapters[None], "meta": {}}
    )
    (place / "outerlink_config.json").write_text(
        json.dumps({"format_version": 1, "paradigm": style, **whole})
    )


# What the goldens were made of.
GOLDENS = Path(__file__).parent.parent / "tests" / "goldens"
IDS = torch.from_numpy(
    np.random.RandomState(0).randint(8, 250, (1, 70))
)  # longer than llama3's original context here
QUESTIONS = [
    "What is 3 + 4?",
    "Take the first 12 odd numbers. {critic} Which is larger, their sum or [slot 0] 11 * 13?\nAn answer",
    "Which one?\nA) 1\nB) 2",
]
ROUNDS = (1, 3)
RECURSION = {"latent_steps": 4, "max_new_tokens": 8}
