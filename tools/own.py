"""The measurements of docs/own.md on real agents (`python tools/real_models.py FOLDER` fetches them).

    python tools/own.py same FOLDER/AGENT RECORDS.jsonl ...        transformers' greedy choice beside minimas's texts
    python tools/own.py words FOLDER OUT                           styles and rows of the repeating task
    python tools/own.py carried STYLE.json LINKS TEST.jsonl        what of the words passes the links
    python tools/own.py helps STYLE.json LINKS DATA.jsonl          the loss of an answer, with and without latents
    python tools/own.py solved STYLE.json LINKS DATA.jsonl         how many questions are solved with what is heard
    python tools/own.py prompt STYLE.json TRAIN.jsonl TEST.jsonl OUT   the loss with a learned prompt in their place
    python tools/own.py vocabulary STYLE.json TEST.jsonl           what passes as soft tokens that both agents know

Notation: n words of a question, m latents, B questions.
"""

import argparse
import json
import math
import random
import re
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from tqdm import tqdm

import minimas
from minimas.agent import Agent, load_agent
from minimas.evaluate.compare import system_alone, with_interval
from minimas.evaluate.report import interval
from minimas.result import Result
from minimas.settings import CompletedSettings, Settings
from minimas.system import System
from minimas.train.examples import TrainExample, load_examples
from minimas.train.held_out import losses_by_hearing
from minimas.train.loop import TrainingFolder, adamw, batch_of, fit
from minimas.train.losses import next_token_loss, reply_ending, row_losses, teacher_forced

LENGTHS = (1, 2, 4, 8, 16)  # n
WORDS = Path(__file__).with_name("words.txt")  # 256 words, one token each after a space
PER_LENGTH, TRAINING = 32, 4000
SMOL, QWEN = "SmolLM2-135M-Instruct", "Qwen2.5-Coder-0.5B-Instruct"


# One agent alone: the texts of minimas and the choices of transformers


def same(args):
    """For each file of records: how many texts are transformers' greedy texts, by reading them, and by `generate`.

    Records keep texts without their tokens. One that has another spelling in tokens is written again, alone, to have
    them.
    """
    from reference import load_model

    system = minimas.load_mas_system("single", checkpoints=args.agent, device="cpu", fast=True)
    tokenizer, eos_ids = (
        system.agents["agent"].tokenizer,
        [*system.agents["agent"].generation_config.eos_ids],
    )
    peer = load_model(args.agent, torch.float32)
    for file in args.records:
        first, *records = (
            json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()
        )
        system.task, again, margins, tokens, generated = first["task"], [], [], 0, 0
        settings = minimas.Settings(
            max_new_tokens=first["max_new_tokens"], temperature=0.0, retry=False
        )
        records = records[: args.limit]
        for i, record in enumerate(tqdm(records, file.name)):
            defined = (
                re.findall(r"def (\w+)\(", record["question"]) if first["task"] == "code" else []
            )
            fn_name = (
                defined[-1] if defined else ""
            )  # HumanEval asks for the last function that a question begins
            question = system.style.questions([record["question"]], [fn_name], first["dataset"])
            (prompt,) = system.prompts_for("agent", question, {}, first["date"])
            prompt, ids = tokenizer.encode("".join(prompt)), tokenizer.encode(record["texts"][0])
            ids += (
                tokenizer.encode(reply_ending(tokenizer))
                if record["tokens"][0] < first["max_new_tokens"]
                else []
            )
            if len(ids) != record["tokens"][0] or behind(peer, prompt, ids):
                (result,) = system.stream(question, settings.completed(system.style))
                again.append(result.text == record["texts"][0])
                ids = result.token_ids
            margins.append(behind(peer, prompt, ids))
            tokens += len(ids)
            if i < args.generate:
                text = peer.generate(
                    torch.tensor([prompt]),
                    max_new_tokens=first["max_new_tokens"],
                    do_sample=False,
                    repetition_penalty=1.0,
                    eos_token_id=eos_ids,
                )
                generated += text[0, len(prompt) :].tolist() == ids
        print(
            f"{file}: {margins.count([])} of {len(records)} texts are transformers' own; it chooses "
            f"{len(sum(margins, []))} of {tokens} tokens otherwise, by at most {max(sum(margins, [0]))} in the logit; "
            f"{len(again)} were written again, {again.count(False)} of them otherwise"
        )
        print(f"generate writes {generated} of {min(args.generate, len(records))} alike")


@torch.no_grad()
def behind(peer, prompt, ids):
    """By how much the peer prefers another token to that of a text, for each token where it does."""
    logits = peer(torch.tensor([prompt + ids]), logits_to_keep=len(ids) + 1).logits[0, :-1]
    margins = logits.amax(-1) - logits.gather(1, torch.tensor(ids)[:, None])[:, 0]
    return margins[margins > 0].tolist()


# What a link carries: the repeating task


def write_words(args):
    """Write the rows to train and to test on, and a style for each system."""
    args.out.mkdir(parents=True, exist_ok=True)
    write_rows(args.out, "", WORDS.read_text().split(), " ", LENGTHS)
    write_rows(
        args.out, "digits-", "0123456789", "", LENGTHS[1:]
    )  # one digit leaves none to test on
    for name, agents in (
        ("like", [SMOL] * 2),
        ("unlike", [QWEN, SMOL]),
        ("hops", [SMOL] * 3),
        ("digits", [QWEN, SMOL]),
    ):
        roles = ["reader", "relay", "writer"] if len(agents) == 3 else ["reader", "writer"]
        heard, what = ["question", *roles], "digits" if name == "digits" else "words"
        prompts = {
            role: f"Repeat these {what}, and write nothing else:\n{{{source}}}"
            for role, source in zip(roles, heard)
        }
        write_style(
            args, name, dict(zip(roles, agents)), {"system": f"You repeat {what}."} | prompts, 4, 24
        )
    solve = {
        "system": "You are a helpful assistant.",
        "thinker": "{question}\nThink it through step by step.",
        "writer": "{question}\nNotes: {thinker}\nSolve it step by step.",
    }
    for name, thinker in (("solve", SMOL), ("solve-unlike", QWEN)):
        write_style(args, name, {"thinker": thinker, "writer": SMOL}, solve, 8, 256)
    solve["thinker_with_feedback"] = (
        "{question}\nThink it through step by step, after this attempt: {writer}"
    )
    write_style(
        args,
        "solve-loop",
        {"thinker": SMOL, "writer": SMOL},
        solve,
        8,
        256,
        back=[["writer", "thinker"]],
    )


def write_rows(folder, prefix, symbols, between, lengths):
    """Write PREFIXtrain.jsonl and PREFIXtest.jsonl, PER_LENGTH questions of each length in it that are not trained
    on.
    """
    draw = random.Random(0)
    question = lambda n: between.join(draw.choice(symbols) for _ in range(n))
    test = {n: [] for n in lengths}
    for n, texts in test.items():
        while len(texts) < PER_LENGTH:
            texts += [text for text in [question(n)] if text not in texts]
    asked = {text for texts in test.values() for text in texts}
    training = []
    while len(training) < TRAINING:
        training += [text for text in [question(draw.choice(lengths))] if text not in asked]
    for name, texts in (("train", training), ("test", [text for n in lengths for text in test[n]])):
        lines = [json.dumps({"question": text, "answer": text}) + "\n" for text in texts]
        (folder / f"{prefix}{name}.jsonl").write_text("".join(lines), encoding="utf-8")


def write_style(args, name, agents, prompts, latent_steps, max_new_tokens, back=()):
    """Write NAME.json, a style in which each agent hears the one before it, and later rounds those that `back` says."""
    roles = [*agents]
    style = {
        "order": roles,
        "edges": [*zip(roles, roles[1:]), *back],
        "prompts": prompts,
        "agents": {role: str((args.folder / agent).absolute()) for role, agent in agents.items()},
        "rounds": 1,
        "latent_steps": latent_steps,
        "max_new_tokens": max_new_tokens,
        "temperature": 0.0,
    }
    (args.out / f"{name}.json").write_text(json.dumps(style, indent=2), encoding="utf-8")


# What the last agent hears


def loaded(args: argparse.Namespace) -> tuple[System, CompletedSettings, list[dict]]:
    """The system, its settings and the rows that a command names."""
    system = minimas.load_mas_system(
        str(args.style),
        checkpoints=args.links,
        device="cpu",
        dtype=args.dtype,
        quantize=args.quantize,
    )
    settings = Settings(rounds=args.rounds, latent_steps=args.latent_steps, retry=False)
    rows = [json.loads(line) for line in args.data.read_text(encoding="utf-8").splitlines()]
    return system, settings.completed(system.style), rows


def heard(system: System, value: str) -> str:
    """The setting `hear` by which only the last agent hears `value`; what others hear of each other stays."""
    last = system.style.order[-1]
    edges = [f"{source}>{target}" for source, target in system.style.edges if target == last]
    return "+".join(f"{edge}={value}" for edge in edges)


def losses(
    system: System,
    rows: list[dict],
    settings: CompletedSettings,
    values: Sequence[str],
    size: int = 8,
) -> dict[str, list[torch.Tensor]]:
    """{value: for each row the losses of its answer's tokens}, as the last agent hears `value`."""
    examples = load_examples(rows, system.style, system.style.order[-1:], answer_first=True)
    hears = {value: heard(system, value) for value in values}
    found = losses_by_hearing(system, examples, settings, list(hears.values()), size, progress=True)
    return {value: found[hear] for value, hear in hears.items()}


def answers(
    system: System, rows: list[dict], settings: CompletedSettings, value: str = "own"
) -> Iterator[Result]:
    """The Results of rows, as they come, while the last agent hears `value`."""
    questions = system.style.questions([row["question"] for row in rows])
    hear = heard(system, value) or "own"  # style single hears nobody
    return system.stream(questions, replace(settings, hear=hear))


def symbols(text: str) -> list[str]:
    """The words of a text; digits are words of their own."""
    return re.findall(r"\d|\S+", text)


def words_right(
    system: System, rows: list[dict], settings: CompletedSettings, value: str = "own"
) -> float:
    """The part of the words, over all rows, that stand at their place in the greedy text."""
    right = 0
    asked = 0
    for result, row in zip(answers(system, rows, settings, value), rows, strict=True):
        words = symbols(row["answer"])
        right += sum(map(str.__eq__, symbols(result.text), words))
        asked += len(words)
    return right / asked


def carried(args: argparse.Namespace) -> None:
    """For each n: words right and bits that passed; another question's latents, no latents and text as controls."""
    system, settings, rows = loaded(args)
    print_carried(system, settings, rows, args.controls)


def print_carried(
    system: System, settings: CompletedSettings, rows: list[dict], controls: bool
) -> None:
    """A row for each n."""
    settings = replace(settings, batch_size=PER_LENGTH)
    print(
        " n  m  own: words right, bits of n words, of the first k   other   none   text: words right"
    )
    for n in sorted({len(symbols(row["answer"])) for row in rows}):
        asked = [row for row in rows if len(symbols(row["answer"])) == n]
        values = ["own", "other", "none"] if controls else ["own", "other"]
        found = losses(system, asked, settings, values, PER_LENGTH)
        per_symbol = math.log2(10 if asked[0]["answer"].isdigit() else 256)
        bits = {value: passed(own, n, per_symbol) for value, own in found.items()}
        cells = []
        for value in ("own", "other"):
            cells.append(bits_text(words_right(system, asked, settings, value), bits[value]))
        if controls:
            text = words_right(system, asked, replace(settings, channel="text"))
            cells += [bits_text(None, bits["none"]), f"{100 * text:5.1f} %"]
        print(f"{n:2} {settings.latent_steps:2}  {' | '.join(cells)}", flush=True)


def passed(rows: list[torch.Tensor], n: int, per_symbol: float) -> list[float]:
    """Bits of the first 1 to n words that the last agent knows: those of a word, times k, minus its cross-entropy of k.

    rows   the losses of the tokens of answers of n words; the first word can be several tokens, each other is one
    """
    sums = torch.stack([losses.cumsum(0)[-n - 1 : -1] for losses in rows])  # (rows, n)
    nats = sums.mean(0).tolist()
    return [per_symbol * k - loss / math.log(2) for k, loss in enumerate(nats, 1)]


def bits_text(words: float | None, bits: list[float]) -> str:
    """A cell: words right, bits of all words, and the most bits of the first k words with their k."""
    best = max(bits)
    right = f"{100 * words:5.1f} % " if words is not None else ""
    return f"{right}{bits[-1]:7.2f} {best:6.2f} k={bits.index(best) + 1:2}"


# Whether latents help


def helps(args: argparse.Namespace) -> None:
    """Mean loss per token of the answers with own, other's and no latents; paired differences, 95 % intervals."""
    system, settings, rows = loaded(args)
    rows = rows[args.skip : args.skip + args.limit]
    means = {}
    for value, found in losses(system, rows, settings, ("own", "other", "none")).items():
        means[value] = [own.mean().item() for own in found]
        print(f"{value:6} {statistics.fmean(means[value]):.4f}")
    for value in ("other", "none"):
        pairs = zip(means[value], means["own"], strict=True)
        print(f"{value} - own: {with_interval([one - own for one, own in pairs], 4)}")


def solved(args: argparse.Namespace) -> None:
    """Percent of questions solved with what the last agent can hear, 95 % intervals, tokens and seconds a question.

    The answer of a text is its last number, so that no form of an answer is asked for. Otherwise it is what
    `evaluate --compare` measures.
    """
    system, settings, rows = loaded(args)
    rows = rows[args.skip : args.skip + args.limit]
    settings = replace(settings, batch_size=20)
    alone = system_alone(system)
    print("heard   solved  95 %            tokens   seconds")
    for value in ("own", "other", "none", "text", "alone"):
        asked = alone if value == "alone" else system
        here = replace(settings, rounds=1) if value == "alone" else settings
        if value == "text":
            here = replace(here, channel="text")
        hears = value if value in ("other", "none") else "own"
        results = [*tqdm(answers(asked, rows, here, hears), value, len(rows))]
        right = [
            last_number(result.text) == last_number(row["answer"])
            for result, row in zip(results, rows, strict=True)
        ]
        share = statistics.fmean(right)
        low, high = interval(share, len(rows))
        tokens = statistics.fmean(result.new_tokens + result.heard_tokens for result in results)
        seconds = statistics.fmean(result.seconds for result in results)
        print(
            f"{value:6} {100 * share:5.1f} %  {100 * low:4.1f} to {100 * high:4.1f}  {tokens:8.1f}  {seconds:8.2f}",
            flush=True,
        )


def last_number(text: str) -> float | None:
    """The last number in a text, None if there is none."""
    numbers = re.findall(r"-?\d[\d,]*(?:\.\d+)?", text)
    return float(numbers[-1].replace(",", "")) if numbers else None


# Soft tokens over the vocabulary that two agents share


class SoftTokens(torch.nn.Module):
    """Agent a's states (..., D_a) -> the mean embedding under the probabilities that a's head gives to tokens.

    head        (V, D_a), of the tokens that count
    embeddings  (V, D_b), of the same tokens
    """

    def __init__(self, head: torch.Tensor, embeddings: torch.Tensor) -> None:
        super().__init__()
        self.head = head
        self.embeddings = embeddings
        self.states = head.new_zeros(0)  # that were given last

    def forward(self, h: torch.Tensor) -> torch.Tensor:
        self.states = h
        probabilities = (h.to(self.head.dtype) @ self.head.T).float().softmax(-1)
        return probabilities.to(self.embeddings.dtype) @ self.embeddings


class AfterInner(torch.nn.Module):
    """An outer link that reads the states which the inner link before it was given, and not what that made of them.

    added   ids of tokens that end a turn, and the like. A message ends where one of them is likeliest, as a text does.
    """

    def __init__(self, inner: SoftTokens, link: SoftTokens, added: torch.Tensor) -> None:
        super().__init__()
        self.inner = inner
        self.link = link
        self.added = added

    def forward(self, z: torch.Tensor) -> list[torch.Tensor]:
        """Latents (B, m, D_a) -> B of unequal length, (m_b, D_b) each."""
        h = self.inner.states
        likeliest = (h.to(self.inner.head.dtype) @ self.inner.head.T).argmax(-1)  # (B, m)
        ended = torch.isin(likeliest, self.added).cumsum(1)
        return [own[over == 0] for own, over in zip(self.link(h), ended, strict=True)]


def shared_tokens(source: Agent, target: Agent) -> tuple[torch.Tensor, torch.Tensor]:
    """The ids in both vocabularies of the tokens that are spelled alike, without added ones such as <|im_end|>."""
    ours = ordinary_tokens(source)
    theirs = ordinary_tokens(target)
    both = [token for token in ours if token in theirs]
    return torch.tensor([ours[one] for one in both]), torch.tensor([theirs[one] for one in both])


def ordinary_tokens(agent: Agent) -> dict[str, int]:
    """{token: id} of a vocabulary without added tokens."""
    added = set(added_tokens(agent).tolist())
    return {token: i for token, i in agent.tokenizer.fast.get_vocab().items() if i not in added}


def added_tokens(agent: Agent) -> torch.Tensor:
    """The ids of added tokens, such as those that begin and end a turn."""
    return torch.tensor(list(agent.tokenizer.fast.get_added_tokens_decoder()))


def vocabulary(args: argparse.Namespace) -> None:
    """The measure of `carried` for links without training: soft tokens of the agent itself, and of both agents."""
    style = minimas.styles.style_named(args.style)
    dtype = getattr(torch, args.dtype)
    agents = {}
    for role in style.order:
        folder = style.checkpoints[role]
        agents[role] = load_agent(folder, "math", "cpu", dtype, untrained=True, role=role)
        model = agents[role].model
        agents[role].inner_link = SoftTokens(model.lm_head.weight, model.embed_tokens.weight)
    links = {}
    for source, target in style.edges:
        ours, theirs = shared_tokens(agents[source], agents[target])
        known = len(agents[source].model.lm_head.weight)
        print(f"{source} to {target}: {len(ours)} of {known} tokens are shared")
        head = agents[source].model.lm_head.weight[ours]
        embeddings = agents[target].model.embed_tokens.weight[theirs]
        soft = SoftTokens(head, embeddings)
        added = added_tokens(agents[source])
        links[source, target] = AfterInner(agents[source].inner_link, soft, added)
    system = System(style, agents, links)
    settings = Settings(rounds=1, latent_steps=args.latent_steps, retry=False)
    rows = [json.loads(line) for line in args.data.read_text(encoding="utf-8").splitlines()]
    with torch.no_grad():
        print_carried(system, settings.completed(style), rows, args.controls)


# A learned prompt


class LearnedPrompt(torch.nn.Module):
    """m embeddings (m, D) that stand in the writer's slot, the same for every question."""

    def __init__(self, embeddings: torch.Tensor) -> None:
        super().__init__()
        self.embeddings = torch.nn.Parameter(embeddings.float().clone())


def prompt(args: argparse.Namespace) -> None:
    """Train m embeddings in the slot of the writer, whom nobody else is there to tell anything; print its loss."""
    style = minimas.styles.style_named(args.style)
    source, writer = style.order
    dtype = getattr(torch, args.dtype)
    agent = load_agent(style.checkpoints[writer], "math", "cpu", dtype, untrained=True, role=writer)
    system = System(style, {writer: agent}, {})
    rows = load_examples(str(args.train), style, [writer], limit=args.rows, answer_first=True)
    test = load_examples(str(args.test), style, [writer], limit=args.limit, answer_first=True)
    learned = LearnedPrompt(embeddings_of_answers(agent, rows, args.latent_steps, args.seed))

    def states(batch: list[TrainExample]) -> tuple[torch.Tensor, torch.Tensor]:
        """The writer's states and tokens for a batch, see teacher_forced."""
        heard = [learned.embeddings] * len(batch)
        questions = [example.question for example in batch]
        prompts = system.prompts_for(writer, questions, {(source, writer): heard})
        answers = [example.text(writer, 1) for example in batch]
        h, ids = teacher_forced(agent, prompts, answers)
        return h[:, :-1], ids

    def loss_at(step: int, part: int) -> torch.Tensor:
        return next_token_loss(agent, *states(batch_of(rows, args.seed, step, args.batch_size)))

    args.out.mkdir(parents=True, exist_ok=True)
    given = {name: str(value) for name, value in vars(args).items() if name != "run"}
    settings = given | {"steps": args.steps, "minimas": minimas.__version__}
    folder = TrainingFolder(args.out, None, settings, {writer: agent}, learned, lambda: None, 50)
    fit(loss_at, [adamw(learned, args.lr)], args.steps, "prompt", folder=folder)
    losses: list[float] = []
    with torch.no_grad():
        for i in tqdm(range(0, len(test), 8), "loss"):
            losses += row_losses(agent, *states(test[i : i + 8])).tolist()
    (args.out / "losses.json").write_text(json.dumps(losses), encoding="utf-8")
    width = 1.96 * statistics.stdev(losses) / math.sqrt(len(losses))
    print(f"learned prompt {statistics.fmean(losses):.4f} +- {width:.4f}, {len(losses)} questions")


def embeddings_of_answers(
    agent: Agent, rows: list[TrainExample], m: int, seed: int
) -> torch.Tensor:
    """The embeddings (m, D) of m tokens that are drawn from the answers."""
    answers = "\n".join(text for row in rows for texts in row.texts.values() for text in texts)
    ids = random.Random(seed).sample(agent.tokenizer.encode(answers), m)
    return agent.model.embed(torch.tensor(ids)).detach()


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    one = commands.add_parser("same")
    one.add_argument("agent", type=str)
    one.add_argument("records", type=Path, nargs="+")
    one.add_argument("--limit", type=int, help="records of each file")
    one.add_argument(
        "--generate",
        type=int,
        default=8,
        help="questions of each file that `generate` answers, too",
    )
    one.set_defaults(run=same)
    one = commands.add_parser("words")
    one.add_argument("folder", type=Path)
    one.add_argument("out", type=Path)
    one.set_defaults(run=write_words)
    one = commands.add_parser("vocabulary")
    one.add_argument("style", type=Path)
    one.add_argument("data", type=Path)
    one.add_argument("--latent-steps", type=int, default=4)
    one.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    one.add_argument("--controls", action="store_true", help="no latents and the text channel, too")
    one.set_defaults(run=vocabulary)
    one = commands.add_parser("prompt")
    one.add_argument("style", type=Path)
    one.add_argument("train", type=Path)
    one.add_argument("test", type=Path)
    one.add_argument("out", type=Path)
    one.add_argument("--latent-steps", type=int, default=8, help="embeddings")
    one.add_argument("--rows", type=int, default=1000, help="rows to train on")
    one.add_argument("--steps", type=int, default=400)
    one.add_argument("--batch-size", type=int, default=8)
    one.add_argument("--lr", type=float, default=1e-3)
    one.add_argument("--seed", type=int, default=42)
    one.add_argument("--limit", type=int, default=300, help="test questions")
    one.add_argument("--dtype", default="bfloat16", choices=["float32", "bfloat16"])
    one.set_defaults(run=prompt)
    for run in (carried, helps, solved):
        one = commands.add_parser(run.__name__)
        one.add_argument("style", type=Path)
        one.add_argument("links", help="the folder that `train system` wrote")
        one.add_argument("data", type=Path)
        one.add_argument("--latent-steps", type=int)
        one.add_argument("--rounds", type=int)
        one.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
        one.add_argument("--quantize", choices=["int8", "int4"], help="the agents' weights")
        one.set_defaults(run=run)
        if run is carried:
            one.add_argument(
                "--controls", action="store_true", help="no latents and the text channel, too"
            )
        else:
            one.add_argument("--skip", type=int, default=0, help="leave out the first rows")
            one.add_argument("--limit", type=int, default=100, help="rows to measure on")
    args = parser.parse_args()
    args.run(args)


if __name__ == "__main__":
    main()
