"""The measurements of docs/own.md on real agents (`python tools/real_models.py FOLDER` fetches them).

    python tools/own.py same FOLDER/AGENT RECORDS.jsonl ...        transformers' greedy choice beside minimas's texts
    python tools/own.py words FOLDER OUT                           styles and rows of the repeating task
    python tools/own.py carried STYLE.json LINKS TEST.jsonl        what of the words passes the links
    python tools/own.py helps STYLE.json LINKS DATA.jsonl          the loss of an answer, with and without latents
    python tools/own.py solved STYLE.json LINKS DATA.jsonl         how many questions are solved, with and without
    latents

Notation: n words of a question, m latents, B questions.
"""

import argparse
import json
import math
import random
import re
import statistics
from dataclasses import replace
from pathlib import Path

import torch
from tqdm import tqdm

import minimas
from minimas.evaluate.report import interval
from minimas.recurse import recurse
from minimas.train.losses import IGNORED, TokenLoss, reply_ending, teacher_forced

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
    from transformers import AutoModelForCausalLM

    system = minimas.load_mas_system("single", checkpoints=args.agent, device="cpu", fast=True)
    tokenizer, eos_ids = (
        system.agents["agent"].tokenizer,
        [*system.agents["agent"].generation_config.eos_ids],
    )
    peer = AutoModelForCausalLM.from_pretrained(args.agent, dtype=torch.float32).eval()
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


# The last agent's loss under what it hears


def own(turn, questions):
    """Every question has its own latents."""


def other(turn, questions):
    """Every question has the latents of the one before."""
    turn.sent = {edge: latents.roll(1, 0) for edge, latents in turn.sent.items()}


def empty(turn, questions):
    """No latents."""
    turn.sent = {edge: latents[:, :0] for edge, latents in turn.sent.items()}


@torch.no_grad()
def losses(system, rows, settings, edit=own, think=None):
    """The last agent's cross-entropies in nats of B answers (B, N), zero where a row has no token, and where it has
    one.

    The last column is the token that ends an answer.
    edit     what the last agent hears of the others, as in System.run; what they hear of each other stays
    think    as in recurse
    """
    last, questions = (
        system.style.order[-1],
        system.style.questions([row["question"] for row in rows]),
    )
    for turn in recurse(system, questions, settings, think=think):
        if turn.round == settings.rounds and turn.role in sources(system):
            edit(turn, questions)
    agent = system.agents[last]
    h, ids = teacher_forced(agent, turn.prompts, [row["answer"] for row in rows])
    kept = ids != IGNORED
    return torch.zeros(kept.shape).masked_scatter(
        kept, TokenLoss.apply(h[:, :-1][kept], ids[kept], agent.model.lm_head)
    ), kept


def sources(system):
    """The roles that the last agent hears."""
    return [source for source, target in system.style.edges if target == system.style.order[-1]]


def loaded(args):
    """The system, its settings and the rows that a command names."""
    system = minimas.load_mas_system(
        str(args.style), checkpoints=args.links, device="cpu", dtype=args.dtype
    )
    settings = minimas.Settings(
        rounds=args.rounds, latent_steps=args.latent_steps, retry=False
    ).completed(system.style)
    rows = [json.loads(line) for line in args.data.read_text(encoding="utf-8").splitlines()]
    return system, settings, rows


def answers(system, rows, settings, edit=own):
    """The Results of rows, as they come; `edit` as in losses."""
    hearing = sources(system)
    edit_last = lambda turn, questions: edit(turn, questions) if turn.role in hearing else None
    questions = system.style.questions([row["question"] for row in rows])
    return system.stream(questions, settings, edit=edit_last)


def symbols(text):
    """The words of a text; digits are words of their own."""
    return re.findall(r"\d|\S+", text)


def words_right(system, rows, settings, edit=own):
    """The part of the words, over all rows, that stand at their place in the greedy text."""
    results, asked = answers(system, rows, settings, edit), [symbols(row["answer"]) for row in rows]
    right = [
        sum(map(str.__eq__, symbols(result.text), words)) for result, words in zip(results, asked)
    ]
    return sum(right) / sum(map(len, asked))


def carried(args):
    """For each n: words right and bits that passed; the latents of another question, no latents and text as
    controls.
    """
    system, settings, rows = loaded(args)
    settings = replace(settings, batch_size=PER_LENGTH)
    print(
        " n  m  own: words right, bits of n words, of the first k   other   none   text: words right"
    )
    for n in sorted({len(symbols(row["answer"])) for row in rows}):
        asked = [row for row in rows if len(symbols(row["answer"])) == n]
        cells = [
            bits_text(
                words_right(system, asked, settings, edit), passed(system, asked, n, settings, edit)
            )
            for edit in (own, other)
        ]
        if args.controls:
            text = words_right(system, asked, replace(settings, channel="text"))
            cells += [
                bits_text(None, passed(system, asked, n, settings, empty)),
                f"{100 * text:5.1f} %",
            ]
        print(f"{n:2} {settings.latent_steps:2}  {' | '.join(cells)}", flush=True)


def passed(system, rows, n, settings, edit):
    """Bits of the first 1 to n words that the last agent knows: those of a word, times k, minus its cross-entropy of
    k.
    """
    loss, _ = losses(system, rows, settings, edit)
    nats = loss.cumsum(1).mean(0)[
        -n - 1 : -1
    ]  # the first word can be several tokens, each other is one
    bits = math.log2(10 if rows[0]["answer"].isdigit() else 256)
    return [bits * k - loss / math.log(2) for k, loss in enumerate(nats.tolist(), 1)]


def bits_text(words, bits):
    """A cell: words right, bits of all words, and the most bits of the first k words with their k."""
    best = max(bits)
    right = f"{100 * words:5.1f} % " if words is not None else ""
    return f"{right}{bits[-1]:7.2f} {best:6.2f} k={bits.index(best) + 1:2}"


# Whether latents help


def helps(args):
    """Mean loss per token of the answers with own, other's and no latents, and paired differences with 95 %
    intervals.
    """
    system, settings, rows = loaded(args)
    rows, found, thought = rows[args.skip : args.skip + args.limit], {}, {}

    def think(r, role, prompts):
        """The first agent has heard nobody in round 1: it need not think again for the next edit."""
        if (r, role) != (1, system.style.order[0]):
            return system.agents[role].think(prompts, settings.latent_steps)
        key = repr(prompts)
        if key not in thought:
            thought[key] = system.agents[role].think(prompts, settings.latent_steps)
        return thought[key]

    for edit in (own, other, empty):
        parts = [
            losses(system, rows[i : i + 8], settings, edit, think)
            for i in tqdm(range(0, len(rows), 8), edit.__name__)
        ]
        found[edit.__name__] = torch.cat([loss.sum(1) / kept.sum(1) for loss, kept in parts])
        print(f"{edit.__name__:6} {found[edit.__name__].mean():.4f}", flush=True)
    for name in ("other", "empty"):
        difference = (found[name] - found["own"]).tolist()
        width = 1.96 * statistics.stdev(difference) / math.sqrt(len(difference))
        print(f"{name} - own: {statistics.fmean(difference):+.4f} +- {width:.4f}")


def solved(args):
    """Percent of questions solved with what the last agent can hear, with 95 % intervals, tokens and seconds a
    question.

    The answer of a text is its last number.
    """
    system, settings, rows = loaded(args)
    rows, settings = rows[args.skip : args.skip + args.limit], replace(settings, batch_size=20)
    writer = str(system.style.checkpoints[system.style.order[-1]])
    alone = minimas.load_mas_system("single", checkpoints=writer, device="cpu", dtype=args.dtype)
    print("heard   solved  95 %            tokens   seconds")
    for name, asked, edit, channel in (
        ("own", system, own, "latent"),
        ("other", system, other, "latent"),
        ("none", system, empty, "latent"),
        ("text", system, own, "text"),
        ("alone", alone, own, "latent"),
    ):
        rounds = 1 if asked is alone else settings.rounds
        results = answers(asked, rows, replace(settings, channel=channel, rounds=rounds), edit)
        results = [*tqdm(results, name, len(rows))]
        share = statistics.fmean(
            last_number(r.text) == last_number(row["answer"]) for r, row in zip(results, rows)
        )
        low, high = interval(share, len(rows))
        tokens, seconds = (
            statistics.fmean(values)
            for values in zip(*((r.new_tokens + r.heard_tokens, r.seconds) for r in results))
        )
        share, low, high = 100 * share, 100 * low, 100 * high
        print(
            f"{name:6} {share:5.1f} %  {low:4.1f} to {high:4.1f}  {tokens:8.1f}  {seconds:8.2f}",
            flush=True,
        )


def last_number(text):
    """The last number in a text, None if there is none."""
    numbers = re.findall(r"-?\d[\d,]*(?:\.\d+)?", text)
    return float(numbers[-1].replace(",", "")) if numbers else None


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
    for run in (carried, helps, solved):
        one = commands.add_parser(run.__name__)
        one.add_argument("style", type=Path)
        one.add_argument("links", help="the folder that `train system` wrote")
        one.add_argument("data", type=Path)
        one.add_argument("--latent-steps", type=int)
        one.add_argument("--rounds", type=int)
        one.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
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
