"""Train the tiny system from nothing into a folder in the released layout: three agents, their inner links, the outer links.

    python -m minimas.tiny.build --out FOLDER [--seed 0]
    python -m minimas.tiny.build --evaluate FOLDER

Some ten minutes on two cores. The weights that ship with minimas are this script's output for seed 0, unedited; `report.json`
beside them says what they reach on the test split, which nothing here looks at before the end.
"""

import argparse
import json
import random
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

from ..agent import Agent
from ..cli import command
from ..link import InnerLink, OuterLink
from ..lessons import Lesson, Turn
from ..load import load_generation, load_model, load_tokenizer, read_config
from ..objective import IGNORED, InnerLoss, OuterLoss, embedding_scale, forced_turns, ridge_start, start_gain
from ..prompts import Question
from ..recurse import STYLES, Settings, System, load_mas_system
from ..save import save_inner_link, save_outer_links
from ..train import adamw, fit
from .task import OPERATIONS, ROLES, WORDS, draw, exercise, note, questions

QWEN_TEMPLATE = """{%- for message in messages -%}
<|im_start|>{{ message.role }} {{ message.content }}<|im_end|>
{%- endfor -%}
{%- if add_generation_prompt -%}<|im_start|>assistant
{% endif -%}
"""  # the last line break keeps the word assistant from fusing with the reply; it is no token itself
LLAMA_TEMPLATE = """<|begin_of_text|>
{%- for message in messages -%}
<|start_header_id|>{{ message.role }}<|end_header_id|>{{ message.content }}<|eot_id|>
{%- endfor -%}
{%- if add_generation_prompt -%}<|start_header_id|>assistant<|end_header_id|>{% endif -%}
"""
QWEN_TOKENS = {"pad_token": "<|endoftext|>", "eos_token": "<|im_end|>", "start": "<|im_start|>"}
LLAMA_TOKENS = {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>", "pad_token": "<|pad|>",
                "start": "<|start_header_id|>", "end": "<|end_header_id|>"}
AGENTS = {  # role: model_type, width, special tokens, chat template
    "planner": ("qwen3", 96, QWEN_TOKENS, QWEN_TEMPLATE),
    "critic": ("llama", 128, LLAMA_TOKENS, LLAMA_TEMPLATE),
    "solver": ("qwen2", 112, QWEN_TOKENS, QWEN_TEMPLATE),
}


def make_tokenizer(specials, seed):
    """A token a word, a digit, an operation or a piece of a note; every agent gives them ids of its own."""
    words = WORDS[:]
    random.Random(seed).shuffle(words)
    vocabulary = {word: i for i, word in enumerate([*specials, "<unk>", *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words = Regex(r"\\boxed\{|[-+*]\d|[a-z]{2,}|\S")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Split(words, "isolated")])
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens(list(specials))
    return tokenizer


def make_agent(folder, role, seed):
    """An agent's folder without weights, and the untrained Agent in float32."""
    model_type, width, specials, template = AGENTS[role]
    tokenizer = make_tokenizer(specials.values(), f"{seed} {role}")
    end = tokenizer.token_to_id(specials["eos_token"])
    files = {
        "config.json": {
            "model_type": model_type, "dtype": "bfloat16", "vocab_size": tokenizer.get_vocab_size(), "hidden_size": width,
            "intermediate_size": 3 * width, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
            "head_dim": width // 4, "hidden_act": "silu", "rms_norm_eps": 1e-6, "max_position_embeddings": 256,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}, "tie_word_embeddings": False},
        "generation_config.json": {"eos_token_id": end},
        "tokenizer_config.json": {name: token for name, token in specials.items() if name.endswith("_token")},
    }
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content, indent=1) + "\n")
    (folder / "chat_template.jinja").write_text(template)
    tokenizer.save(str(folder / "tokenizer.json"))
    family, config, _ = read_config(folder)
    model = family(config)
    for name, parameter in model.named_parameters():
        if parameter.ndim == 2:
            torch.nn.init.normal_(parameter, std=0.05)
        elif name.endswith("bias"):
            torch.nn.init.zeros_(parameter)
    return wrap(folder, model)


def wrap(folder, model):
    tokenizer = load_tokenizer(folder)
    return Agent(model, tokenizer, InnerLink(model.config.hidden_size), load_generation(folder, tokenizer))


def turns(rng, role, count, **options):
    """`count` random exercises of `role`, as turns of the recursion."""
    source = ROLES[ROLES.index(role) - 1]
    exercises = [exercise(rng, role, **options) for _ in range(count)]
    opens = role == ROLES[0]  # only the planner has a prompt without a slot; elsewhere nothing heard is an empty slot
    return [Turn(Question(question), {} if opens and heard is None else {source: heard or ""}, reply) for question, heard, reply in exercises]


def train_agent(system, role, seed, steps, batch=64):
    """Teach an agent its trade as an ordinary language model, by next-token cross-entropy on its replies.

    The operations it meets grow from 2 to all 21 over the first 40 % of the steps, or the value table is learnt too slowly;
    for the first three quarters it writes the whole rest of the chain, then only the next step.
    """
    agent, rng = system.agents[role], random.Random(f"{seed} agent {role}")
    pool = random.Random(0).sample(OPERATIONS, len(OPERATIONS))

    def shaken(model, args):
        x, *others = args
        return x + 0.1 * embedding_scale(agent) * torch.randn_like(x), *others

    def loss_at(step, part):
        known = pool[:2 + int(19 * step / (0.4 * steps))]
        h, ids = forced_turns(system, role, turns(rng, role, batch, operations=known, whole=step < 0.75 * steps))
        return F.cross_entropy(agent.model.logits(h[:, :-1]).flatten(0, 1), ids.flatten(), ignore_index=IGNORED)

    matrices = [p for p in agent.model.layers.parameters() if p.ndim == 2]
    others = [p for p in agent.model.parameters() if not any(p is matrix for matrix in matrices)]
    optimizers = [torch.optim.Muon(matrices, lr=0.01, weight_decay=0.01, adjust_lr_fn="original"),  # at 0.02 some stay at 96 to 98 %
                  torch.optim.AdamW(others, lr=3e-3, betas=(0.9, 0.95), weight_decay=0.01)]
    hook = agent.model.register_forward_pre_hook(shaken)
    fit(loss_at, optimizers, steps, f"agent {role}", warm_up=max(1, steps // 20))
    hook.remove()


@torch.no_grad()
def mastery(system, role, count=2000):
    """Part of `count` validation exercises to which the agent's likeliest tokens are the right reply."""
    agent = system.agents[role]
    h, ids = forced_turns(system, role, turns(random.Random("mastery"), role, count, split="validation"))
    right = (agent.model.logits(h[:, :-1]).argmax(-1) == ids) | (ids == IGNORED)
    return right.all(1).float().mean().item()


def save_agent(folder, agent):
    """Weights in bfloat16 under their released names; the agent goes on with what the file holds, in float32."""
    prefix = {"lm_head.weight": ""}
    save_file({prefix.get(name, "model.") + name: p.detach().to(torch.bfloat16) for name, p in agent.model.named_parameters()},
              folder / "model.safetensors", metadata={"format": "pt"})
    agent.model = load_model(folder, dtype=torch.float32)


def answers_to_learn(rng, batch):
    """Chains of any length with the solver's last notes: what is to come of three rounds."""
    chains = [draw(rng, rng.randint(1, 9)) for _ in range(batch)]
    return [Lesson(Question(chain.question), {"solver": (note("solver", chain, len(chain.steps), chain.answer),)}) for chain in chains]


def accuracy(system, chains, **options):
    """Percent right, in all and by length of chain, and the tokens that all agents together decoded for a question."""
    results = system.run([chain.question for chain in chains], batch_size=len(chains), keep_latents=True, **options)
    right, tokens = {}, 0
    for chain, result in zip(chains, results):
        right.setdefault(len(chain.steps), []).append(result.answer == str(chain.answer))
        said = [(source, text) for (_, source, _), text in result.latents.items() if isinstance(text, str)]
        tokens += result.new_tokens + sum(len(system.agents[source].tokenizer.encode(text)) + 1 for source, text in said)
    percent = lambda hits: round(100 * sum(hits) / len(hits), 1)
    return {"percent": percent(sum(right.values(), [])), "by_length": {n: percent(hits) for n, hits in sorted(right.items())},
            "tokens": round(tokens / len(chains), 1)}


def forget(outer_links):
    """Random weights for trained links, but for the last gain, so that what they send keeps its scale: a control."""
    for link in outer_links:
        gain = link.ln_target.weight.clone()
        for module in link.children():
            module.reset_parameters()
        link.ln_target.weight.data.copy_(gain)


def evaluate(folder, split, per_length):
    """What the system saved in a folder reaches, loaded as any user would load it."""
    system, chains = load_mas_system("tiny", checkpoints=folder, device="cpu", plain=True), questions(split, per_length)
    report = {"split": split, "questions": len(chains)}
    report["latent"] = {rounds: accuracy(system, chains, rounds=rounds) for rounds in range(1, 6)}
    report["text"] = {rounds: accuracy(system, chains, rounds=rounds, channel="text") for rounds in range(1, 6)}
    report["empty slots"] = {rounds: accuracy(system, chains, rounds=rounds, latent_steps=0) for rounds in (1, 3)}
    forget(system.outer_links.values())
    report["random outer links"] = {rounds: accuracy(system, chains, rounds=rounds) for rounds in (1, 3)}
    return report


def build(out, seed=0, scale=1.0, batch=64, split="test", per_length=150):
    """Everything, from random weights to the report. `scale` shortens every phase, for a test of the machinery."""
    torch.manual_seed(seed)
    started, style, steps = time.perf_counter(), STYLES["tiny"], lambda n: max(1, round(n * scale))
    agents = {role: make_agent(out / role, role, seed) for role in ROLES}
    width = {role: agent.model.config.hidden_size for role, agent in agents.items()}
    system = System(style, agents, {edge: OuterLink(*(width[role] for role in edge)) for edge in style.edges})
    for role, agent in agents.items():
        train_agent(system, role, seed, steps(700), batch)
        save_agent(out / role, agent)
    for role, agent in agents.items():
        rng = random.Random(f"{seed} inner {role}")
        start_gain(agent.inner_link, agent)
        loss = InnerLoss(system, role, mse=0.1)
        fit(lambda step, part: loss(turns(rng, role, batch)), [adamw(loss, 3e-3)], steps(400), f"inner link of {role}")
        agent.inner_link.requires_grad_(False)
        save_inner_link(out / role, style, None, agent.inner_link)
    for edge, link in system.outer_links.items():
        start_gain(link, agents[edge[1]])
        ridge_start(system, edge, turns(random.Random(f"{seed} ridge {edge}"), edge[0], 1000))
    rng = random.Random(f"{seed} outer")
    loss = OuterLoss(system, Settings(rounds=3, latent_steps=style.latent_steps))
    fit(lambda step, part: loss(answers_to_learn(rng, batch)), [adamw(loss, 1e-3)], steps(300), "outer links")
    save_outer_links(out / "links", style, None, system.outer_links)
    trained = time.perf_counter() - started
    report = {"seed": seed, "training_minutes": round(trained / 60, 1),
              "validation exercises right": {role: round(100 * mastery(system, role), 1) for role in ROLES}, **evaluate(out, split, per_length)}
    (out / "report.json").write_text(json.dumps(report, indent=1) + "\n")
    return report


def main():
    parser = argparse.ArgumentParser(prog="python -m minimas.tiny.build", description="Train the tiny system from nothing.")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--out", type=Path, help="folder to write")
    what.add_argument("--evaluate", type=Path, metavar="FOLDER", help="train nothing, only measure what a folder holds")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--split", choices=("test", "validation"), default="test", help="what the report is measured on (default test)")
    args = parser.parse_args()
    report = build(args.out, args.seed, split=args.split) if args.out else evaluate(args.evaluate, args.split, 150)
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    command(main)
