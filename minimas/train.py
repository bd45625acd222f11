"""Training RecursiveLinks: the agents stay frozen, only the small maps between their latents learn (RecursiveMAS, section 3).

    inner link   one agent alone, on texts of its role: R_in(h_t) shall point where the embedding of token t+1 does
    warm-up      one edge alone: R_out(R_in(h_t)) shall point where the next agent's embedding of the same text does
    outer links  all together: cross-entropy of the last agent's answer, back through every round of `recurse`

Works on any System, whose links are trained in place and in the dtype they have (new ones are float32; one loaded from a
bfloat16 file should be widened first). What the examples say is the caller's business.
"""

import json
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from tqdm import tqdm

from .link import save_link
from .prompts import Question
from .recurse import recurse

IGNORED = -100  # cross-entropy's mark for a position without a target


@dataclass(frozen=True)
class Turn:
    """One turn of one agent in words: what it was asked, what each source had sent it, and what it replied."""
    question: str
    inbox: dict[str, str]
    reply: str


def fit(loss_at, optimizers, steps, name, warm_up=10):
    """Minimise loss_at(step) over `steps` steps: clip at norm 1, cosine schedule after a linear warm-up."""
    parameters = [p for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]]
    rate = lambda step: min((step + 1) / warm_up, 0.5 * (1 + math.cos(math.pi * step / steps)))
    schedules = [torch.optim.lr_scheduler.LambdaLR(optimizer, rate) for optimizer in optimizers]
    losses = []
    with tqdm(range(steps), desc=name, unit="step") as bar:
        for step in bar:
            loss = loss_at(step)
            for optimizer in optimizers:
                optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            for stepper in (*optimizers, *schedules):
                stepper.step()
            losses.append(loss.item())
            bar.set_postfix(loss=f"{losses[-1]:.4f}")
    return losses


def adamw(module, lr):
    return torch.optim.AdamW(module.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=0.0)


def teacher_forced(agent, prompts, replies, noise=0.0):
    """Prompts and the texts that follow them -> states h (B, N, D) before each reply token, and these tokens (B, N).

    The token that ends a reply counts as one of its N; shorter replies have IGNORED on their left. `noise` shakes the
    embeddings by that part of their spread.
    """
    end = agent.tokenizer.special["eos_token"]
    ids = [torch.tensor(agent.tokenizer.encode(reply + end), device=agent.device) for reply in replies]
    x, positions = agent.embed([[*prompt, reply] for prompt, reply in zip(prompts, ids)])
    if noise:
        x = x + noise * embedding_scale(agent) * torch.randn_like(x)
    N = max(map(len, ids))
    h = agent.model(x, positions, agent.model.make_cache(len(x)))[:, -N - 1:-1]
    return h, torch.stack([F.pad(reply, (N - len(reply), 0), value=IGNORED) for reply in ids])


def forced_turns(system, role, turns, noise=0.0):
    """teacher_forced for turns of `role`, what it had heard put into its prompt as text."""
    prompts = []
    for turn in turns:
        inbox = {(source, role): [text] for source, text in turn.inbox.items()}
        prompts += system.prompts(role, [Question(turn.question)], inbox)
    return teacher_forced(system.agents[role], prompts, [turn.reply for turn in turns], noise)


def next_token_loss(agent, h, ids):
    """Cross-entropy of states (B, N, D) against the tokens (B, N) that follow them."""
    return F.cross_entropy(agent.model.logits(h).flatten(0, 1), ids.flatten(), ignore_index=IGNORED)


def cosine_loss(found, wanted, mse):
    """1 - cos, plus mse times the mean squared error; (n, D) each."""
    return 1 - F.cosine_similarity(found, wanted, dim=-1).mean() + mse * F.mse_loss(found, wanted)


def embedding_scale(agent):
    """Standard deviation of the agent's token embeddings."""
    with torch.no_grad():
        return agent.model.embed(torch.arange(agent.model.config.vocab_size, device=agent.device)).std().item()


def train_inner(system, role, draw, steps, lr=5e-4, mse=0.0):
    """Train the inner link of `role` on turns draw(step); its last gain starts at the embeddings' scale."""
    agent = system.agents[role]
    link = agent.inner_link.requires_grad_(True)
    torch.nn.init.constant_(link.post_ln.weight, embedding_scale(agent))

    def loss_at(step):
        with torch.no_grad():
            h, ids = forced_turns(system, role, draw(step))
            kept = ids != IGNORED
            wanted = agent.model.embed(ids[kept])
        return cosine_loss(link(h[kept]), wanted, mse)

    losses = fit(loss_at, [adamw(link, lr)], steps, f"inner link of {role}")
    link.requires_grad_(False)
    return losses


def same_text(source, target, reply):
    """For each token of `reply` in the source's tokenizer the target's mean embedding (n, D) of the tokens that overlap it."""
    ours, theirs = (agent.tokenizer.fast.encode(reply, add_special_tokens=False) for agent in (source, target))
    embeddings = target.model.embed(torch.tensor(theirs.ids, device=target.device))
    overlap = [[a < d and c < b for c, d in theirs.offsets] for a, b in ours.offsets]
    weight = torch.tensor(overlap, dtype=embeddings.dtype, device=target.device)
    return weight @ embeddings / weight.sum(1, keepdim=True)


def warm_up_outer(system, edge, draw, steps, lr, mse=0.0):
    """Train one outer link, from turns draw(step) of its source, to say each token in the target's embeddings.

    Cross-entropy through the rounds cannot find a start on its own when the links are random.
    """
    source, target = (system.agents[role] for role in edge)
    link = system.outer_links[edge].requires_grad_(True)
    torch.nn.init.constant_(link.ln_target.weight, embedding_scale(target))

    def loss_at(step):
        turns = draw(step)
        with torch.no_grad():
            h, ids = forced_turns(system, edge[0], turns)
            kept = ids != IGNORED
            kept[:, -1] = False  # the token that ends the reply has no counterpart
            wanted = torch.cat([same_text(source, target, turn.reply) for turn in turns]).to(h.device)
            thoughts = source.inner_link(h[kept])
        return cosine_loss(link(thoughts), wanted, mse)

    losses = fit(loss_at, [adamw(link, lr)], steps, f"warm-up of {edge[0]} > {edge[1]}")
    link.requires_grad_(False)
    return losses


def answer_loss(system, questions, replies, settings):
    """Cross-entropy of the last agent's replies to B questions after the whole recursion, gradients through all of it."""
    agent = system.agents[system.style.order[-1]]
    prompts = recurse(system, [Question(question) for question in questions], settings)
    return next_token_loss(agent, *teacher_forced(agent, prompts, replies))


def train_outer(system, draw, steps, lr=5e-4):
    """Train all outer links end to end. draw(step) gives questions, the last agent's replies, and Settings (rounds, latent_steps)."""
    links = torch.nn.ModuleList(system.outer_links.values()).requires_grad_(True)
    losses = fit(lambda step: answer_loss(system, *draw(step)), [adamw(links, lr)], steps, "outer links")
    links.requires_grad_(False)
    return losses


def save_inner_link(folder, link):
    """Write an inner link into its agent's folder, in the released layout."""
    write_json(folder / "adapter_config.json", {"adapter_type": link.adapter_type})
    save_link(link, folder / "adapter.pt")


def save_outer_links(folder, style, links):
    """Write the outer links of a style, {(source, target): OuterLink}, and their manifest, in the released layout."""
    folder.mkdir(parents=True, exist_ok=True)
    adapters = []
    for (source, target), link in links.items():
        name = f"{source.capitalize()}-{target.capitalize()}-Outerlink.pt"
        save_link(link, folder / name)
        adapters.append({"legacy_key": style.edges[source, target], "filename": name, "source_role": source, "target_role": target,
                         "adapter_type": link.adapter_type, "in_dim": link.residual_proj.in_features,
                         "out_dim": link.residual_proj.out_features})
    write_json(folder / "outerlink_config.json", {"format_version": 1, "adapters": adapters})


def write_json(file, value):
    file.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
