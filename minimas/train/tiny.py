"""Train the tiny system from scratch, into a folder in the released layout: agents, inner links, outer links.

    python -m minimas.tiny.build --out FOLDER [--seed 0]
    python -m minimas.tiny.build --evaluate FOLDER

It takes about ten minutes on two cores. The weights that ship with minimas are this script's output for seed 0,
unedited. `report.json` beside them says what they reach on the test split, which nothing here uses before the end.
"""

import json
import random
import time

import torch
from safetensors.torch import save_file

from ..agent import Agent
from ..common import read_json
from ..config import read_config
from ..link import InnerLink
from ..load import load_generation_config, load_model
from ..recurse import System, load_mas_system
from ..styles import STYLES, Settings
from ..tiny.task import OPERATIONS, ROLES, WORDS, exercise, note, questions, random_chain
from ..tokenizer import load_tokenizer
from .examples import TargetTurn, TrainExample
from .loop import adamw, fit
from .losses import IGNORED, InnerLoss, OuterLoss, forced_turns
from .ridge import embedding_scale, new_outer_links, read, set_outer_link, start_gain
from .save import save_inner_link, save_outer_links, write_json


def write_agent(folder, role, seed):
    """Write all files of an agent except its weights: those of the shipped agent, with token ids that depend on the seed.

    Its tokenizer has one token per word, digit, operation or piece of a note. (The chat template of the Qwen agents ends
    with a line break, so that the word assistant does not fuse with the reply.)
    """
    shipped = STYLES["tiny"].checkpoints[role]
    folder.mkdir(parents=True, exist_ok=True)
    for name in (
        "config.json",
        "generation_config.json",
        "tokenizer_config.json",
        "chat_template.jinja",
    ):
        (folder / name).write_bytes((shipped / name).read_bytes())
    tokenizer, words = read_json(shipped / "tokenizer.json"), WORDS[:]
    random.Random(f"{seed} {role}").shuffle(words)
    words = [
        *(token["content"] for token in tokenizer["added_tokens"]),
        "<unk>",
        *words,
    ]  # special tokens come first
    tokenizer["model"]["vocab"] = {word: i for i, word in enumerate(words)}
    (folder / "tokenizer.json").write_text(
        json.dumps(tokenizer, indent=2, ensure_ascii=False), encoding="utf-8"
    )


def new_agent(folder, role, seed):
    """An untrained Agent in float32, with a new inner link; its folder gets all files except its weights and its link."""
    write_agent(folder, role, seed)
    family, config, _ = read_config(folder)
    model = family(config)
    for name, parameter in model.named_parameters():
        if parameter.ndim == 2:
            torch.nn.init.normal_(parameter, std=0.05)
        elif name.endswith("bias"):
            torch.nn.init.zeros_(parameter)
    tokenizer = load_tokenizer(folder)
    return Agent(
        model,
        tokenizer,
        InnerLink(config.hidden_size),
        load_generation_config(folder, tokenizer),
        torch.device("cpu"),
    )


def turns(rng, role, count, **options):
    """`count` random exercises of `role` as TargetTurns; options are those of exercise."""
    source, opens = (
        ROLES[ROLES.index(role) - 1],
        role == ROLES[0],
    )  # only the planner has a first prompt without a slot
    exercises = [exercise(rng, role, **options) for _ in range(count)]
    return [
        TargetTurn(
            STYLES["tiny"].question(question), {source: heard} if heard or not opens else {}, reply
        )
        for question, heard, reply in exercises
    ]


def train_agent(system, role, seed, steps, batch=64):
    """Teach an agent its part as an ordinary language model, by cross-entropy of the next token on its replies.

    The operations it sees grow from 2 to all 21 over the first 40 % of the steps, or it learns the table of values too
    slowly. For the first three quarters it writes all remaining steps of a chain, then only the next one. Noise on its
    input embeddings makes it tolerate latents, which are never exactly an embedding.
    """
    agent, rng = system.agents[role], random.Random(f"{seed} agent {role}")
    shuffled = random.Random(0).sample(OPERATIONS, len(OPERATIONS))

    def with_noise(model, args):
        x, *others = args
        return x + 0.1 * embedding_scale(agent) * torch.randn_like(x), *others

    def loss_at(step, part):
        operations = shuffled[: 2 + int(19 * step / (0.4 * steps))]
        exercises = turns(rng, role, batch, operations=operations, whole=step < 0.75 * steps)
        h, ids = forced_turns(system, role, exercises)
        scores = agent.model.logits(h[:, :-1])
        return torch.nn.functional.cross_entropy(
            scores.flatten(0, 1), ids.flatten(), ignore_index=IGNORED
        )

    matrices = [p for p in agent.model.layers.parameters() if p.ndim == 2]
    others = [p for p in agent.model.parameters() if not any(p is matrix for matrix in matrices)]
    optimizers = [  # Muon at 0.02 leaves some agents at 96 to 98 %
        torch.optim.Muon(matrices, lr=0.01, weight_decay=0.01, adjust_lr_fn="original"),
        torch.optim.AdamW(others, lr=3e-3, betas=(0.9, 0.95), weight_decay=0.01),
    ]
    hook = agent.model.register_forward_pre_hook(with_noise)
    fit(loss_at, optimizers, steps, f"agent {role}", warm_up=max(1, steps // 20))
    hook.remove()


@torch.no_grad()
def mastery(system, role, count=2000):
    """The fraction of `count` validation exercises to which the agent's most likely tokens are the correct reply."""
    exercises = turns(random.Random("mastery"), role, count, split="validation")
    h, ids = forced_turns(system, role, exercises)
    correct = (system.agents[role].model.logits(h[:, :-1]).argmax(-1) == ids) | (ids == IGNORED)
    return correct.all(1).float().mean().item()


def save_agent(folder, agent):
    """Write the weights in bfloat16 under their released names, and let the agent go on with them, in float32."""
    weights = {
        name if name == "lm_head.weight" else f"model.{name}": p.detach().to(torch.bfloat16)
        for name, p in agent.model.named_parameters()
    }
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    agent.model = load_model(folder, dtype=torch.float32)


def answers_to_learn(rng, batch):
    """TrainExamples of random chains with the solver's last note, which three rounds should lead to."""
    chains = [random_chain(rng, rng.randint(1, 9)) for _ in range(batch)]
    return [
        TrainExample(
            STYLES["tiny"].question(chain.question),
            {"solver": (note("solver", chain, len(chain.steps), chain.answer),)},
        )
        for chain in chains
    ]


def accuracy(system, chains, **options):
    """Percent of correct answers, in total and by chain length, and the tokens that all agents decoded per question.

    options  those of System.run
    """
    results = system.run([chain.question for chain in chains], batch_size=len(chains), **options)
    correct = {}
    for chain, result in zip(chains, results):
        correct.setdefault(len(chain.steps), []).append(result.answer == str(chain.answer))
    percent = lambda hits: round(100 * sum(hits) / len(hits), 1)
    tokens = sum(result.new_tokens + result.heard_tokens for result in results)
    return {
        "percent": percent(sum(correct.values(), [])),
        "by_length": {length: percent(hits) for length, hits in sorted(correct.items())},
        "tokens": round(tokens / len(chains), 1),
    }


def randomise_outer_links(links):
    """Replace trained weights by random ones. The last gain stays, so that messages keep their scale: a control."""
    for link in links:
        gain = link.ln_target.weight.clone()
        for module in link.children():
            module.reset_parameters()
        link.ln_target.weight.data.copy_(gain)


def evaluate(folder, split, per_length):
    """What the system in a folder reaches on `per_length` chains of each length, loaded as any user would load it."""
    system, chains = (
        load_mas_system("tiny", checkpoints=folder, device="cpu", plain=True),
        questions(split, per_length),
    )
    at = lambda rounds, **options: {
        r: accuracy(system, chains, rounds=r, **options) for r in rounds
    }
    report = {
        "split": split,
        "questions": len(chains),
        "latent": at(range(1, 6)),
        "text": at(range(1, 6), channel="text"),
        "empty slots": at((1, 3), latent_steps=0),
    }
    randomise_outer_links(system.outer_links.values())
    return report | {"random outer links": at((1, 3))}


def build(out, seed=0, scale=1.0, batch=64, split="test", per_length=150):
    """Train and save everything, measure it, and return the report. `scale` shortens every phase, for tests."""
    torch.manual_seed(seed)
    started, steps = time.perf_counter(), lambda n: max(1, round(n * scale))
    agents, style = {role: new_agent(out / role, role, seed) for role in ROLES}, STYLES["tiny"]
    system = System(style, agents, new_outer_links(style.edges, agents))
    for role, agent in agents.items():
        train_agent(system, role, seed, steps(700), batch)
        save_agent(out / role, agent)
    for role, agent in agents.items():
        train_inner_link(system, role, seed, steps(400), batch)
        save_inner_link(out / role, style, None, agent.inner_link)
    train_outer_links(system, seed, steps(1000), steps(300), batch)
    save_outer_links(out / "links", style, None, system.outer_links)
    minutes = round((time.perf_counter() - started) / 60, 1)
    mastered = {role: round(100 * mastery(system, role), 1) for role in ROLES}
    report = {
        "seed": seed,
        "training_minutes": minutes,
        "validation exercises right": mastered,
        **evaluate(out, split, per_length),
    }
    write_json(out / "report.json", report)
    return report


def train_inner_link(system, role, seed, steps, batch):
    agent, rng = system.agents[role], random.Random(f"{seed} inner {role}")
    start_gain(agent.inner_link, agent)
    loss = InnerLoss(system, role, mse=0.1)
    fit(
        lambda step, part: loss(turns(rng, role, batch)),
        [adamw(loss, 3e-3)],
        steps,
        f"inner link of {role}",
    )
    agent.inner_link.requires_grad_(False)


def train_outer_links(system, seed, ridge_turns, steps, batch):
    for edge in system.outer_links:
        given = turns(random.Random(f"{seed} ridge {edge}"), edge[0], ridge_turns)
        set_outer_link(system, edge, read(system, edge[0], given))
    rng = random.Random(f"{seed} outer")
    loss = OuterLoss(system, Settings().completed(system.style))
    fit(
        lambda step, part: loss(answers_to_learn(rng, batch)),
        [adamw(loss, 1e-3)],
        steps,
        "outer links",
    )
