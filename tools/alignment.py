"""Inner links that need no training, against the trained one: python tools/alignment.py tiny

    python tools/alignment.py real FOLDER --model NAME --fit FILE --held-out FILE [--trained FOLDER]

Each link is measured by the cosine of link(h_t) and the embedding of token t+1, on texts that no link was made from,
and by what follows from it. In the tiny system that is the answers at three rounds, with outer links that are remade by
the regression. In a real agent it is how often latent steps follow its own greedy text.

FILE has rows of questions and answers. --trained is the folder that `python -m minimas.train inner` wrote.

Notation: D width, V vocabulary, n tokens, m latent steps.
"""

import argparse
import random
from pathlib import Path

import torch
import torch.nn.functional as F
from tqdm import tqdm

from minimas import STYLES, Settings, System, load_mas_system
from minimas.agent import load_agent
from minimas.commands.failures import command
from minimas.generate import generate
from minimas.link import InnerLink, OuterLink
from minimas.load import load_inner_link
from minimas.tiny.task import questions
from minimas.train.examples import load_examples
from minimas.train.ridge import read_replies, set_inner_link, set_outer_link, start_gain
from minimas.train.tiny import accuracy, turns

ROWS, HELD_OUT, PROMPTS, STEPS = (
    256,
    64,
    32,
    16,
)  # rows to fit on, of the cosine, prompts and latent steps to follow
TURNS = 512  # held-out turns of each tiny agent
LAMBDA = 1e-5  # as the authors' code sets it


# Links


def alignment(W_in, W_out, strength=LAMBDA):
    """W_a (D, D) of LatentMAS (arXiv 2511.20639) in float64, which minimises |W_out W_a - W_in|^2 + strength |W_a|^2.

    W_in (V, D) are the embeddings, W_out (V, D) is the head. It acts from the right: e = h W_a.
    """
    W_in, W_out = W_in.double(), W_out.double()
    gram = W_out.T @ W_out
    return torch.linalg.solve(gram + strength * torch.eye(len(gram)), W_out.T @ W_in)


def at_norm(norm, W=None):
    """The link h -> h W, scaled to this norm; without W it is h itself."""

    def link(h):
        e = h if W is None else h @ W.to(h)
        return e * (norm / e.norm(dim=-1, keepdim=True).clamp(min=1e-6))

    return link


def links_of(agent, fitting):
    """{name: link} of an agent, without a trained one; `fitting` are the Readings that the closed form is made from.

    The last one is no link, since it needs the vocabulary: the mean embedding under the probabilities of the head.
    """
    model, mean = (
        agent.model,
        agent.model.embed(torch.cat([reading.ids for reading in fitting])).mean(0),
    )
    W_in = model.embed(torch.arange(model.config.vocab_size))
    norm = W_in.norm(dim=-1).mean()
    trained, new = agent.inner_link, InnerLink(model.config.hidden_size).requires_grad_(False)
    start_gain(new, agent)
    agent.inner_link = closed = InnerLink(model.config.hidden_size).requires_grad_(False)
    set_inner_link(agent, fitting)
    agent.inner_link = trained
    return {
        "closed form": closed,
        "LatentMAS": at_norm(norm, alignment(W_in, model.lm_head.weight)),
        "h itself": at_norm(norm),
        "random start": new,
        "mean embedding": lambda h: mean.expand_as(h),
        "expected token": lambda h: model.logits(h).softmax(-1) @ W_in,
    }


# Figures


def prompts_of(system, role, turns):
    """The prompts of TargetTurns, with what others said as text."""
    inboxes = [{(source, role): [text] for source, text in turn.inbox.items()} for turn in turns]
    return [
        system.prompts_for(role, [turn.question], inbox)[0] for turn, inbox in zip(turns, inboxes)
    ]


def cosine(agent, link, readings):
    """Mean over all tokens of the cosine of link(h_t) and the embedding of token t+1."""
    cosines = [
        F.cosine_similarity(link(reading.h), agent.model.embed(reading.ids), dim=-1)
        for reading in readings
    ]
    return torch.cat(cosines).mean().item()


def greedy_texts(agent, prompts, n):
    """The first n token ids of the agent's greedy text after each prompt."""
    return generate(agent, prompts, [0] * len(prompts), Settings(max_new_tokens=n, temperature=0.0))


def followed(agent, link, prompts, texts, m):
    """Percent of prompts at which the greedy token after k latent steps is token k+1 of the text, for k = 1 to m.

    A text that has ended before is not counted. The state after no step gives token 1 for every link. Sets inner_link.
    """
    agent.inner_link = link
    found = agent.model.logits(agent.think(prompts, m + 1)).argmax(-1).tolist()
    hits = [
        [row[k] == text[k] for row, text in zip(found, texts) if k < len(text)]
        for k in range(1, m + 1)
    ]
    return [100 * sum(row) / max(1, len(row)) for row in hits]


# Commands


def tiny(args):
    """Print a row for each kind of link: of each agent the cosine and how many latents follow, and the correct
    answers.
    """
    system, chains = (
        load_mas_system("tiny", device="cpu"),
        questions("test", args.chains // 8),
    )
    examples = load_examples("tiny", system.style, system.style.order, limit=ROWS)
    fitting, links, figures = {}, {}, {}
    for role, agent in system.agents.items():
        given = [example.turn(system.style, role, r) for example in examples for r in (1, 2, 3)]
        held_out = turns(random.Random(f"held out {role}"), role, TURNS, split="test")
        fitting[role], prompts = (
            read_replies(system, role, given),
            prompts_of(system, role, held_out),
        )
        links[role] = {"trained": agent.inner_link} | links_of(agent, fitting[role])
        readings, texts = (
            read_replies(system, role, held_out),
            greedy_texts(agent, prompts, 5),
        )  # a note is five tokens
        figures[role] = {
            name: (cosine(agent, link, readings), sum(followed(agent, link, prompts, texts, 4)) / 4)
            for name, link in links[role].items()
        }
    print(
        f"{'link':<16}" + "".join(f"{role:>9}{'follows':>9}" for role in links) + f"{'correct':>9}"
    )
    for name in tqdm(figures[role], "answers", leave=False):
        for role, agent in system.agents.items():
            agent.inner_link = links[role][name]
        remake_outer_links(system, fitting)
        percent = accuracy(system, chains, rounds=3)["percent"]
        row = "".join("{:9.3f}{:9.1f}".format(*figures[role][name]) for role in links)
        tqdm.write(f"{name:<16}{row}{percent:9.1f}")


def remake_outer_links(system, fitting):
    """Make all outer links by the regression that begins at the present inner links."""
    width = {role: agent.model.config.hidden_size for role, agent in system.agents.items()}
    for source, target in system.outer_links:
        link = OuterLink(width[source], width[target]).requires_grad_(False)
        system.outer_links[source, target] = link
        set_outer_link(system, (source, target), fitting[source])


def real(args):
    """Print a row for each kind of link: its cosine, and how far latent steps follow the agent's greedy text."""
    style, folder = STYLES["single"], args.folder / args.model
    agent = load_agent(folder, "math", "cpu", torch.float32)
    system = System(style, {"agent": agent}, {})
    fit, held_out = (
        [
            example.turn(style, "agent")
            for example in load_examples(file, style, style.order, limit=limit)
        ]
        for file, limit in ((args.fit, args.rows), (args.held_out, HELD_OUT))
    )
    D, links = agent.model.config.hidden_size, links_of(agent, read_replies(system, "agent", fit))
    if args.trained:
        links = {"trained": load_inner_link(args.trained, "math", D, "cpu", torch.float32)} | links
    readings = read_replies(system, "agent", held_out)
    prompts = prompts_of(system, "agent", held_out[:PROMPTS])
    texts, shown = greedy_texts(agent, prompts, STEPS + 1), [k for k in (1, 2, 4, 8, 16)]
    print(f"{'link':<16}{'cosine':>8}" + "".join(f"{f'k={k}':>7}" for k in shown) + f"{'mean':>7}")
    for name, link in tqdm(links.items(), "links", leave=False):
        percents = followed(agent, link, prompts, texts, STEPS)
        row = "".join(f"{percents[k - 1]:7.1f}" for k in shown) + f"{sum(percents) / STEPS:7.1f}"
        tqdm.write(f"{name:<16}{cosine(agent, link, readings):8.3f}{row}")


@torch.no_grad()
def main():
    parser = argparse.ArgumentParser(description=__doc__.split(":")[0])
    commands = parser.add_subparsers(required=True)
    own = commands.add_parser("tiny", help="all inner links of the tiny system")
    own.add_argument("--chains", type=int, default=600, help="test chains to answer (default 600)")
    own.set_defaults(run=tiny)
    own = commands.add_parser("real", help="the inner link of one real agent")
    own.add_argument("folder", type=Path, help="where tools/real_models.py put the models")
    own.add_argument("--model", required=True, help="the name of a model's folder")
    own.add_argument("--fit", required=True, help="rows that the closed form is made from")
    own.add_argument("--held-out", required=True, help="other rows")
    own.add_argument(
        "--rows", type=int, default=ROWS, help=f"of them, the first so many (default {ROWS})"
    )
    own.add_argument(
        "--trained", type=Path, help="a folder that `python -m minimas.train inner` wrote"
    )
    own.set_defaults(run=real)
    torch.manual_seed(0)  # of the random start
    args = parser.parse_args()
    args.run(args)


if __name__ == "__main__":
    command(main)
