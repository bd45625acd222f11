"""Train the tiny system from scratch, into a folder in the released layout: agents, inner links, outer links.

    python -m minimas.tiny.build --out FOLDER [--seed 0]
    python -m minimas.tiny.build --evaluate FOLDER

It takes about ten minutes on two cores. The weights that ship with minimas are this script's output for seed 0,
unedited. `report.json` beside them says what they reach on the test split, which nothing here uses before the end.
"""

import json
import random
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from ..agent import Agent
from ..common import read_json
from ..config import read_config
from ..link import InnerLink, OuterLink
from ..load import load_generation_config, load_model
from ..settings import Settings
from ..styles import STYLES
from ..system import System, load_mas_system
from ..tiny.task import (
    OPERATIONS,
    ROLES,
    WORDS,
    Chain,
    exercise,
    note,
    questions,
    random_chain,
)
from ..tokenizer import load_tokenizer
from .examples import TargetTurn, TrainExample
from .loop import adamw, fit
from .losses import IGNORED, InnerLoss, OuterLoss, forced_turns
from .ridge import embedding_scale, new_outer_links, read_replies, set_outer_link, start_gain
from .save import save_inner_link, save_outer_links, write_json

COPIED = ("config.json", "generation_config.json", "tokenizer_config.json", "chat_template.jinja")


def write_agent(folder: Path, role: str, seed: int) -> None:
    """Write all files of an agent except its weights: those of the shipped one, with token ids by the seed.

    Its tokenizer has one token per word, digit, operation or piece of a note. (The chat template of the Qwen agents
    ends with a line break, so that the word assistant does not fuse with the reply.)
    """
    shipped = Path(STYLES["tiny"].checkpoints[role])
    folder.mkdir(parents=True, exist_ok=True)
    for name in COPIED:
        (folder / name).write_bytes((shipped / name).read_bytes())
    tokenizer = read_json(shipped / "tokenizer.json")
    words = list(WORDS)
    random.Random(f"{seed} {role}").shuffle(words)
    special = [token["content"] for token in tokenizer["added_tokens"]]
    vocabulary = [*special, "<unk>", *words]
    tokenizer["model"]["vocab"] = {word: i for i, word in enumerate(vocabulary)}
    text = json.dumps(tokenizer, indent=2, ensure_ascii=False)
    (folder / "tokenizer.json").write_text(text, encoding="utf-8")


def new_agent(folder: Path, role: str, seed: int) -> Agent:
    """An untrained Agent in float32, with a new inner link; its folder gets all files but weights and link."""
    write_agent(folder, role, seed)
    family, config, _ = read_config(folder)
    model = family(config)
    for name, parameter in model.named_parameters():
        if parameter.ndim == 2:
            torch.nn.init.normal_(parameter, std=0.05)
        elif name.endswith("bias"):
            torch.nn.init.zeros_(parameter)
    tokenizer = load_tokenizer(folder)
    generation_config = load_generation_config(folder, tokenizer)
    return Agent(model, tokenizer, InnerLink(config.hidden_size), generation_config, "cpu")


def turns(rng: random.Random, role: str, count: int, **options: Any) -> list[TargetTurn]:
    """`count` random exercises of `role` as TargetTurns; options are those of exercise."""
    source = ROLES[ROLES.index(role) - 1]
    first_prompt_has_no_slot = role == ROLES[0]
    found = []
    for _ in range(count):
        question, heard, reply = exercise(rng, role, **options)
        nothing_heard = not heard and first_prompt_has_no_slot
        inbox = {} if nothing_heard else {source: heard}
        found.append(TargetTurn(STYLES["tiny"].question(question), inbox, reply))
    return found


def train_agent(system: System, role: str, seed: int, steps: int, batch: int = 64) -> None:
    """Teach an agent its part as an ordinary language model, by cross-entropy of the next token on its replies.

    The operations it sees grow from 2 to all 21 over the first 40 % of the steps, or it learns the table of values too
    slowly. For the first three quarters it writes all remaining steps of a chain, then only the next one. Noise on its
    input embeddings makes it tolerate latents, which are never exactly an embedding.
    """
    agent = system.agents[role]
    rng = random.Random(f"{seed} agent {role}")
    shuffled = random.Random(0).sample(OPERATIONS, len(OPERATIONS))

    def with_noise(model: torch.nn.Module, args: tuple) -> tuple:
        x, *others = args
        noise = 0.1 * embedding_scale(agent) * torch.randn_like(x)
        return x + noise, *others

    def loss_at(step: int, part: int) -> torch.Tensor:
        more = int(19 * step / (0.4 * steps))
        operations = shuffled[: 2 + more]
        exercises = turns(rng, role, batch, operations=operations, whole=step < 0.75 * steps)
        h, ids = forced_turns(system, role, exercises)
        scores = agent.model.logits(h[:, :-1])
        return torch.nn.functional.cross_entropy(
            scores.flatten(0, 1), ids.flatten(), ignore_index=IGNORED
        )

    matrices = [p for p in agent.model.layers.parameters() if p.ndim == 2]
    in_layers = {id(p) for p in matrices}
    others = [p for p in agent.model.parameters() if id(p) not in in_layers]
    optimizers = [  # Muon at 0.02 leaves some agents at 96 to 98 %
        torch.optim.Muon(matrices, lr=0.01, weight_decay=0.01, adjust_lr_fn="original"),
        torch.optim.AdamW(others, lr=3e-3, betas=(0.9, 0.95), weight_decay=0.01),
    ]
    hook = agent.model.register_forward_pre_hook(with_noise)
    fit(loss_at, optimizers, steps, f"agent {role}", warm_up=max(1, steps // 20))
    hook.remove()


@torch.no_grad()
def mastery(system: System, role: str, count: int = 2000) -> float:
    """The fraction of `count` validation exercises to which the agent's most likely tokens are the correct reply."""
    exercises = turns(random.Random("mastery"), role, count, split="validation")
    h, ids = forced_turns(system, role, exercises)
    predicted = system.agents[role].model.logits(h[:, :-1]).argmax(-1)
    correct = (predicted == ids) | (ids == IGNORED)
    return correct.all(1).float().mean().item()


def save_agent(folder: Path, agent: Agent) -> None:
    """Write the weights in bfloat16 under their released names, and let the agent go on with them, in float32."""
    weights = {}
    for name, parameter in agent.model.named_parameters():
        released = name if name == "lm_head.weight" else f"model.{name}"
        weights[released] = parameter.detach().to(torch.bfloat16)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    agent.model = load_model(folder, dtype=torch.float32)


def answers_to_learn(rng: random.Random, batch: int) -> list[TrainExample]:
    """TrainExamples of random chains with the solver's last note, which three rounds should lead to."""
    examples = []
    for _ in range(batch):
        chain = random_chain(rng, rng.randint(1, 9))
        last_note = note("solver", chain, len(chain.steps), chain.answer)
        question = STYLES["tiny"].question(chain.question)
        examples.append(TrainExample(question, {"solver": (last_note,)}))
    return examples


# Measuring


def percent(hits: Sequence[bool]) -> float:
    """Percent of hits that are true."""
    return round(100 * sum(hits) / len(hits), 1)


def accuracy(system: System, chains: Sequence[Chain], **options: Any) -> dict:
    """Percent of correct answers, in total and by chain length, and the tokens that all agents decoded per question.

    options  those of System.run
    """
    results = system.run([chain.question for chain in chains], batch_size=len(chains), **options)
    hits: dict[int, list[bool]] = {}
    for chain, result in zip(chains, results, strict=True):
        right = result.answer == str(chain.answer)
        hits.setdefault(len(chain.steps), []).append(right)
    tokens = sum(result.new_tokens + result.heard_tokens for result in results)
    return {
        "percent": percent(sum(hits.values(), [])),
        "by_length": {length: percent(own) for length, own in sorted(hits.items())},
        "tokens": round(tokens / len(chains), 1),
    }


def randomise_outer_links(links: Iterable[torch.nn.Module]) -> None:
    """Replace trained weights by random ones. The last gain stays, so that messages keep their scale: a control."""
    for link in links:
        assert isinstance(link, OuterLink)
        gain = link.ln_target.weight.clone()
        for module in link.children():
            module.reset_parameters()  # type: ignore[operator]  # nn.Linear and nn.LayerNorm have it, nn.Module has not
        link.ln_target.weight.data.copy_(gain)


def evaluate(folder: Path, split: str, per_length: int) -> dict:
    """What the system in a folder reaches on `per_length` chains of each length, loaded as any user would load it."""
    system = load_mas_system("tiny", checkpoints=folder, device="cpu")
    chains = questions(split, per_length)

    def at(rounds: Iterable[int], **options: Any) -> dict[int, dict]:
        return {r: accuracy(system, chains, rounds=r, **options) for r in rounds}

    report = {
        "split": split,
        "questions": len(chains),
        "latent": at(range(1, 6)),
        "text": at(range(1, 6), channel="text"),
        "empty slots": at((1, 3), latent_steps=0),
    }
    randomise_outer_links(system.outer_links.values())
    report["random outer links"] = at((1, 3))
    return report


# The build


def build(
    out: Path,
    seed: int = 0,
    scale: float = 1.0,
    batch: int = 64,
    split: str = "test",
    per_length: int = 150,
) -> dict:
    """Train and save everything, measure it, and return the report. `scale` shortens every phase, for tests."""

    def scaled(steps: int) -> int:
        return max(1, round(steps * scale))

    torch.manual_seed(seed)
    started = time.perf_counter()
    style = STYLES["tiny"]
    agents = {role: new_agent(out / role, role, seed) for role in ROLES}
    links = new_outer_links(style.edges, agents)
    system = System(style, agents, dict(links))
    for role, agent in agents.items():
        train_agent(system, role, seed, scaled(700), batch)
        save_agent(out / role, agent)
    for role in agents:
        link = train_inner_link(system, role, seed, scaled(400), batch)
        save_inner_link(out / role, style, None, link)
    train_outer_links(system, seed, scaled(1000), scaled(300), batch)
    save_outer_links(out / "links", style, None, links)
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


def train_inner_link(system: System, role: str, seed: int, steps: int, batch: int) -> InnerLink:
    """Train one agent's inner link on random exercises, and return it."""
    agent = system.agents[role]
    link = agent.inner_link
    assert isinstance(link, InnerLink), "new_agent gives it one"
    rng = random.Random(f"{seed} inner {role}")
    start_gain(link, agent)
    loss = InnerLoss(system, role, mse=0.1)

    def loss_at(step: int, part: int) -> torch.Tensor:
        return loss(turns(rng, role, batch))

    fit(loss_at, [adamw(loss, 3e-3)], steps, f"inner link of {role}")
    link.requires_grad_(False)
    return link


def train_outer_links(system: System, seed: int, ridge_turns: int, steps: int, batch: int) -> None:
    """Train all outer links, from a ridge regression on."""
    for edge in system.outer_links:
        given = turns(random.Random(f"{seed} ridge {edge}"), edge[0], ridge_turns)
        set_outer_link(system, edge, read_replies(system, edge[0], given))
    rng = random.Random(f"{seed} outer")
    loss = OuterLoss(system, Settings().completed(system.style))

    def loss_at(step: int, part: int) -> torch.Tensor:
        return loss(answers_to_learn(rng, batch))

    fit(loss_at, [adamw(loss, 1e-3)], steps, "outer links")
