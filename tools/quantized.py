"""What quantised weights change in an agent's work: the measurements of docs/own.md, "Quantised agents".

    python tools/quantized.py states FOLDER/AGENT DATA.jsonl --links FOLDER   states after k latent steps
    python tools/quantized.py loss FOLDER/AGENT DATA.jsonl                    the loss of published answers
    python tools/quantized.py embedding FOLDER/AGENT DATA.jsonl               the same with and without float embeddings
    python tools/quantized.py texts RECORDS.jsonl OTHER.jsonl                 two runs of `evaluate` compared

`python tools/own.py carried ... --quantize int8` measures what links pass between quantised agents.

Notation: B questions, m latent steps, D an agent's width.
"""

import argparse
import json
import math
import statistics
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from tqdm import tqdm

import minimas
from minimas.agent import Agent
from minimas.evaluate.compare import difference
from minimas.quantize import HeadEmbedding
from minimas.train.losses import IGNORED, next_token_loss, teacher_forced

MODES = ("float32", "bfloat16", "int8", "int4")
SHOWN_STEPS = (1, 8, 32)
AT_ONCE = 8  # questions in a batch


def load_single(agent: str, mode: str) -> minimas.System:
    """The agent alone, with its weights and activations in one of MODES."""
    if mode in ("float32", "bfloat16"):
        return minimas.load_mas_system(
            "single", checkpoints=agent, device="cpu", dtype=mode, fast=True
        )
    return minimas.load_mas_system(
        "single", checkpoints=agent, device="cpu", quantize=mode, fast=True
    )


def read_rows(file: Path, limit: int) -> list[dict]:
    """The first rows of a .jsonl file."""
    lines = file.read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines[:limit]]


def modes_of(text: str) -> list[str]:
    """What `--modes` names. float32 comes first: the others are compared with it."""
    named = text.split(",")
    if unknown := [mode for mode in named if mode not in MODES]:
        raise argparse.ArgumentTypeError(f"{unknown[0]!r}: expected some of {', '.join(MODES)}")
    return ["float32", *(mode for mode in named if mode != "float32")]


def prompts_of(system: minimas.System, rows: Sequence[dict]) -> list:
    """The prompt of the only agent for each row."""
    questions = system.style.questions([row["question"] for row in rows])
    return system.prompts_for("agent", questions, {})


def mean_with_interval(values: Sequence[float]) -> str:
    """The mean of paired differences and its 95 % interval."""
    width = 1.96 * statistics.stdev(values) / math.sqrt(len(values))
    return f"{statistics.fmean(values):+.4f} +- {width:.4f}"


# States


def states(args: argparse.Namespace) -> None:
    """Print the cosine of the states after k latent steps with those in float32, mean and least over the questions.

    Each mode thinks its own latents: it begins with the same prompt, and an error stays in what follows.
    """
    rows = read_rows(args.data, args.limit)
    exact: torch.Tensor | None = None
    print("mode      " + "".join(f"  k={k:<2} mean   least" for k in SHOWN_STEPS))
    for mode in args.modes:
        system = load_single(args.agent, mode)
        agent = system.agents["agent"]
        agent.inner_link = inner_link(args.links, agent)
        found = think_all(agent, prompts_of(system, rows))
        if exact is None:
            exact = found
        cosines = F.cosine_similarity(found, exact, dim=-1)  # (B, m)
        cells = []
        for k in SHOWN_STEPS:
            of_step = cosines[:, k - 1]
            cells.append(f"  {of_step.mean():9.4f} {of_step.min():7.4f}")
        print(f"{mode:<10}" + "".join(cells), flush=True)


def inner_link(folder: Path, agent: Agent) -> torch.nn.Module:
    """The inner link in a folder that `train inner` wrote, fused as the fast form has it."""
    from minimas.link import FusedInnerLink
    from minimas.load import load_inner_link

    D = agent.model.config.hidden_size
    return FusedInnerLink(load_inner_link(folder, "math", D, "cpu", torch.float32))


@torch.no_grad()
def think_all(agent: Agent, prompts: list) -> torch.Tensor:
    """The hidden states (B, m, D) of all latent steps, float32."""
    parts = []
    for i in tqdm(range(0, len(prompts), AT_ONCE), "thinks", leave=False):
        agent.drop_prefix()
        thought = agent.think(prompts[i : i + AT_ONCE], max(SHOWN_STEPS))
        parts.append(thought.float())
    return torch.cat(parts)


# Loss


def loss(args: argparse.Namespace) -> None:
    """Print the mean loss per token of the published answers, and what each mode adds to float32's, with intervals."""
    rows = read_rows(args.data, args.limit)
    exact: list[float] = []
    print("mode        loss   minus float32")
    for mode in args.modes:
        system = load_single(args.agent, mode)
        found = losses(system, rows)
        exact = exact or found
        added = [own - base for own, base in zip(found, exact, strict=True)]
        print(f"{mode:<10}{statistics.fmean(found):7.4f}  {mean_with_interval(added)}", flush=True)


@torch.no_grad()
def losses(system: minimas.System, rows: Sequence[dict]) -> list[float]:
    """The mean cross-entropy in nats of the tokens of each row's answer; the last token is the one that ends it."""
    agent = system.agents["agent"]
    found = []
    for row, prompt in zip(
        tqdm(rows, "losses", leave=False), prompts_of(system, rows), strict=True
    ):
        h, ids = teacher_forced(agent, [prompt], [row["answer"]])
        assert (ids != IGNORED).all()  # one row has no padding
        found.append(next_token_loss(agent, h[:, :-1], ids).item())
    return found


def embedding(args: argparse.Namespace) -> None:
    """Print what it adds to the loss that tied embeddings are read out of the quantised head, instead of kept float."""
    rows = read_rows(args.data, args.limit)
    weight = load_single(args.agent, "float32").agents["agent"].model.embed_tokens.weight
    whole = torch.nn.Embedding.from_pretrained(weight)
    print("mode        loss   minus that with float embeddings")
    for mode in ("int8", "int4"):
        system = load_single(args.agent, mode)
        agent = system.agents["agent"]
        if not isinstance(agent.model.embed_tokens, HeadEmbedding):
            raise SystemExit(
                f"the embeddings of {args.agent} are not tied to its head: expected an agent where they are"
            )
        found = losses(system, rows)
        agent.model.embed_tokens = whole
        agent.drop_prefix()
        kept = losses(system, rows)
        added = [own - base for own, base in zip(found, kept, strict=True)]
        print(f"{mode:<10}{statistics.fmean(found):7.4f}  {mean_with_interval(added)}", flush=True)


# Texts


def texts(args: argparse.Namespace) -> None:
    """Print what the second of two files of records has more than the first, as `evaluate --compare` does.

    "only own" are the questions that only the second has right, "only it" those that only the first has.
    """
    first = records_of(args.records)
    second = records_of(args.other)
    if first.keys() != second.keys():
        raise SystemExit("the files hold other questions: expected two runs of the same data set")
    ours = [second[index] for index in first]
    others = list(first.values())
    grader = args.grader or next(iter(others[0]["right"]))
    equal = [our["texts"] == other["texts"] for our, other in zip(ours, others, strict=True)]
    for name, found in difference(ours, others, grader).items():
        print(f"{name:12} {found}")
    print(f"texts alike: {equal.count(True)} of {len(equal)}")


def records_of(file: Path) -> dict[int, dict]:
    """{number of the question: record} of one point of the grid."""
    _, *lines = file.read_text(encoding="utf-8").splitlines()
    records = [json.loads(line) for line in lines]
    return {record["index"]: record for record in records}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    commands = parser.add_subparsers(required=True)
    one = commands.add_parser("states")
    one.add_argument("agent", help="the folder of a model")
    one.add_argument("data", type=Path, help="a .jsonl file of questions")
    one.add_argument(
        "--links", type=Path, required=True, help="the folder that `train inner` wrote"
    )
    one.add_argument("--limit", type=int, default=32, help="questions (default 32)")
    one.set_defaults(run=states)
    one = commands.add_parser("loss")
    one.add_argument("agent", help="the folder of a model")
    one.add_argument("data", type=Path, help="a .jsonl file of questions and answers")
    one.add_argument("--limit", type=int, default=300, help="rows (default 300)")
    one.set_defaults(run=loss)
    for command in commands.choices.values():
        command.add_argument(
            "--modes",
            type=modes_of,
            default=list(MODES),
            help=f"what is measured beside float32, separated by commas (default {','.join(MODES)})",
        )
    one = commands.add_parser("embedding")
    one.add_argument("agent", help="the folder of a model whose embeddings are tied to its head")
    one.add_argument("data", type=Path, help="a .jsonl file of questions and answers")
    one.add_argument("--limit", type=int, default=30, help="rows (default 30)")
    one.set_defaults(run=embedding)
    one = commands.add_parser("texts")
    one.add_argument("records", type=Path)
    one.add_argument("other", type=Path)
    one.add_argument("--grader", help="whose verdicts count (default: the first)")
    one.set_defaults(run=texts)
    args = parser.parse_args()
    args.run(args)


if __name__ == "__main__":
    main()
