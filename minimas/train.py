"""Training the links of a style on frozen agents, into folders that --checkpoint loads.

    python -m minimas.train inner --style sequential_light --role planner --data RecursiveMAS/Sequential-Math --out runs/planner
    python -m minimas.train outer --style sequential_light --data RecursiveMAS/Sequential-Math --out runs/links
    torchrun --nproc-per-node 4 -m minimas.train outer --style mixture --data mine.jsonl --out runs/links

What the links learn is in objective.py. Here are the steps: AdamW, a cosine schedule, the order of the data, and a folder from
which a training that was killed goes on to the same weights (--resume), for everything a step depends on is in its state.
"""

import hashlib
import json
import math
import time
from contextlib import nullcontext
from pathlib import Path

import torch
from torch import distributed
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from . import InputError, __version__
from .agent import load_agent, silent
from .cli import checkpoints, command, join_others, make_parser, names, out_of_memory, pairs, unchanged
from .data import complain
from .lessons import load_lessons
from .link import OuterLink
from .load import links_task, load_outer_links
from .objective import MAX_POSITIONS, InnerLoss, OuterLoss, compute_again, ridge_start, start_gain
from .plot import save_charts
from .prompts import TASKS
from .recurse import STYLES, Settings, System, devices_of, sources, usable_dtype
from .save import copy_agent, save_inner_link, save_outer_links, suffix, write_whole


NOT_NEGATIVE = ("steps", "mse", "supervise_all")
POSITIVE = ("batch_size", "accumulate", "rounds", "latent_steps", "limit", "ridge_rows", "max_length", "save_every", "warm_up",
            "lr", "clip")
LARGEST_SEED = 10 ** 12  # a pass over the data adds its number to a million times the seed, and torch takes 64 bits


def arguments():
    parser = make_parser("train", "Train the links of a recursive multi-agent system; its agents stay as they are.")
    add = parser.add_argument
    add("what", choices=("inner", "outer"), help="the inner link of one role, or all outer links of a style together")
    add("--role", help="inner: whose link")
    add("--data", required=True, help="a .json, .jsonl or .csv file, a hub id like RecursiveMAS/Sequential-Math, or tiny")
    add("--columns", type=names, default=(), metavar="question=COLUMN,...",
        help="what the data calls question, fn_name, type, or a role's text")
    add("--limit", type=int, help="only the first so many rows")
    add("--task", default="math", help="math (default), choice or code, where the data does not say; and which links these are")
    add("--out", type=Path, required=True, help="the folder to write")
    add("--resume", action="store_true", help="go on where a training into this folder was killed")
    add("--steps", type=int, default=20000, help="0 writes links as they start (default 20000)")
    add("--batch-size", type=int, default=2, help="rows at once in each process (default 2)")
    add("--accumulate", type=int, default=1, help="batches to a step (default 1)")
    add("--lr", type=float, default=5e-4, help="highest learning rate (default 5e-4)")
    add("--warm-up", type=int, default=10, help="steps in which it rises, under a cosine that falls to 0 (default 10)")
    add("--clip", type=float, default=1.0, help="largest norm of a step's gradient (default 1)")
    add("--mse", type=float, default=0.0, help="inner: weight of the squared error beside the cosine (default 0)")
    add("--rounds", type=int, default=3, help="outer: of recursion (default 3)")
    add("--latents", choices=("rollout", "teacher"), default="rollout",
        help="outer: agents think as they will (default), or send states at the tokens of given texts, as the release was trained")
    add("--latent-steps", type=int,
        help="latents a turn (default: the style's; with --latents teacher 80, or as many as its text gives)")
    add("--supervise-all", type=float, default=0.0, metavar="WEIGHT", help="outer: weight of the other rounds' mean loss (default 0)")
    add("--init", choices=("ridge", "random", "checkpoint"),
        help="where links start: new ones at a ridge regression over all roles' texts (default for outer) or at random (for inner), "
             "or those of the checkpoint")
    add("--ridge-rows", type=int, default=256, help="rows for the regression (default 256)")
    add("--max-length", type=int, default=MAX_POSITIONS,
        help=f"positions of a prompt with its text; longer texts are cut, prompts never (default {MAX_POSITIONS})")
    add("--keep-activations", action="store_true", help="remember what blocks compute: faster, for more memory")
    add("--save-every", type=int, default=100, help="steps between two states to go on from (default 100)")
    add("--plot", type=Path, help="draw the loss there, as SVG")
    return parser.parse_args()


def checked(args):
    """The style that is meant; InputError on options that do not make a training."""
    if args.style not in STYLES:
        raise InputError(f"style {args.style!r} is not known, expected one of {', '.join(STYLES)}")
    style = STYLES[args.style]
    if args.what == "inner" and args.role not in style.order:
        raise InputError(f"--role is {args.role!r}: an inner link is of one of {', '.join(style.order)}")
    if args.what == "outer" and args.role:
        raise InputError("--role is for inner links: the outer ones of a style are trained together")
    args.init = args.init or {"inner": "random", "outer": "ridge"}[args.what]
    if args.what == "inner" and args.init == "ridge":
        raise InputError("--init ridge is for outer links: it goes from one agent to another")
    if args.task not in TASKS:
        raise InputError(f"task {args.task!r} is not known, expected one of {', '.join(TASKS)}")
    if abs(args.seed) > LARGEST_SEED:
        raise InputError(f"--seed is {args.seed}, expected a number below {LARGEST_SEED}")
    if args.plot and not args.plot.absolute().parent.is_dir():
        raise InputError(f"--plot {args.plot}: its folder is not there")
    if args.out.exists() and not args.out.is_dir():
        raise InputError(f"--out {args.out} is a file, expected a folder")
    for name in (*NOT_NEGATIVE, *POSITIVE):
        value, positive = getattr(args, name), name in POSITIVE
        if value is not None and not (math.isfinite(value) and (value > 0 if positive else value >= 0)):
            raise InputError(f"--{name.replace('_', '-')} is {value}, expected a finite number {'above 0' if positive else 'from 0 up'}")
    if state_file(args, style).exists() and not args.resume:
        raise InputError(f"{args.out} holds a training already: go on with it by --resume, or give another --out")
    return style


def task_of_links(args, style):
    """The task that the links' files are named by, None for a style that has one set."""
    return links_task(args.task) if style.links_by_task else None


def state_file(args, style):
    return args.out / f"training{suffix(task_of_links(args, style))}.pt"


class Order:
    """Which rows make which batch: one permutation after another, each by the seed and its number, so that a step's place in
    them is all there is to know."""

    def __init__(self, rows, seed):
        self.rows, self.seed, self.epoch, self.permutation = rows, seed, None, None

    def __getitem__(self, place):
        epoch, i = divmod(place, len(self.rows))
        if epoch != self.epoch:
            self.epoch, generator = epoch, torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
            self.permutation = torch.randperm(len(self.rows), generator=generator).tolist()
        return self.rows[self.permutation[i]]

    def batch(self, number, size):
        return [self[place] for place in range(number * size, (number + 1) * size)]


# Steps

TEACHER_LATENTS = 80  # the most that a text sends in the released recipe
NOT_LEARNT_FROM = ("out", "resume", "plot", "save_every", "device", "keep_activations")  # options that do not change what is learnt


def adamw(module, lr):
    return torch.optim.AdamW(module.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=0.0)


def fit(loss_at, optimizers, steps, name, warm_up=10, clip=1.0, parts=1, unsynced=nullcontext, run=None):
    """Take `steps` steps down the mean of the losses loss_at(step, part) of their parts; returns the losses.

    unsynced  the context of all parts but the last: that in which DistributedDataParallel does not speak to other processes
    run       a Run that resumes, keeps and tells
    Raises InputError when a loss or a gradient is not finite, before it reaches the weights, and keeps what was learnt till then.
    """
    parameters = [p for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]]
    rate = lambda step: min((step + 1) / warm_up, 0.5 * (1 + math.cos(math.pi * step / max(1, steps))))
    schedules = [torch.optim.lr_scheduler.LambdaLR(optimizer, rate) for optimizer in optimizers]
    first, losses = run.resume(optimizers, schedules) if run else 0, []
    with tqdm(range(first, steps), name, steps, initial=first, unit="step", disable=run is not None and run.rank > 0) as bar:
        for step in bar:
            for optimizer in optimizers:
                optimizer.zero_grad()
            shares = []
            for part in range(parts):
                with unsynced() if part < parts - 1 else nullcontext():
                    share = loss_at(step, part) / parts
                    share.backward()
                shares.append(share.detach())
            losses.append(over_all(sum(shares)))
            norm = torch.nn.utils.clip_grad_norm_(parameters, clip).item()
            if not math.isfinite(losses[-1] + norm):
                if run:
                    run.keep(step)
                raise InputError(f"the loss is {losses[-1]} and its gradient {norm} long at step {step + 1}: what was learnt before is "
                                 "kept; go on from those links by --init checkpoint with a lower --lr, into another --out")
            lr = schedules[0].get_last_lr()[0]
            for own in (*optimizers, *schedules):
                own.step()
            bar.set_postfix(loss=f"{losses[-1]:.4f}", **(run.after(step + 1, losses[-1], lr, norm) if run else {}))
    return losses


def over_all(loss):
    """The mean of a loss over the processes."""
    if distributed.is_initialized():
        distributed.all_reduce(loss)
        loss = loss / distributed.get_world_size()
    return loss.item()


class Run:
    """The folder of a training: training.pt, from which it goes on; metrics.jsonl, a line a step; and the links, by save_links()."""

    def __init__(self, args, style, rank, settings, trained, save_links):
        self.state_file = state_file(args, style)
        self.metrics_file = args.out / f"metrics{suffix(task_of_links(args, style))}.jsonl"
        self.steps, self.every, self.rank, self.trained, self.save_links = args.steps, args.save_every, rank, trained, save_links
        own = {name: value for name, value in vars(args).items() if name not in NOT_LEARNT_FROM}
        self.settings = json.loads(json.dumps({"minimas": __version__, **own, **settings}))
        self.positions, self.started = 0, 0.0

    def count(self, agents):
        """Count the positions that agents read from now on."""
        def seen(_, args):
            self.positions += args[1].numel()
        for agent in agents.values():
            agent.model.register_forward_pre_hook(seen)

    def resume(self, optimizers, schedules):
        """Take up the last state that was kept, if there is one; returns the step it stands at."""
        self.optimizers, self.schedules, step = optimizers, schedules, 0
        if self.state_file.exists():
            try:
                state = torch.load(self.state_file, map_location="cpu", weights_only=True)
                state["settings"], state["steppers"]
            except Exception as e:  # a damaged file can raise anything
                raise InputError(f"{self.state_file} is damaged, or not of a training ({type(e).__name__}): give another --out") from e
            unchanged(self.state_file, state["settings"], self.settings, "--out")
            self.trained.load_state_dict(state["links"])
            for own, kept in zip((*optimizers, *schedules), state["steppers"]):
                own.load_state_dict(kept)
            torch.set_rng_state(state["random"])
            step = state["step"]
        if self.rank == 0:
            before = self.metrics_file.read_text().splitlines(keepends=True) if self.metrics_file.exists() else []
            write_whole(self.metrics_file, lambda file: file.write_text("".join(before[:step])))
        self.started = time.perf_counter()
        return step

    def after(self, step, loss, lr, norm):
        """Keep what a step leaves; returns what its progress bar shows."""
        seconds, self.started = time.perf_counter() - self.started, time.perf_counter()
        pace, self.positions = self.positions / seconds, 0
        if self.rank == 0:
            line = {"step": step, "loss": loss, "lr": lr, "gradient_norm": norm, "tokens_per_second": round(pace),
                    "seconds": round(seconds, 3)}
            with open(self.metrics_file, "a") as out:
                out.write(json.dumps(line) + "\n")
        if step % self.every == 0 or step == self.steps:
            self.keep(step)
        return {"tokens/s": f"{pace:.0f}"}

    def keep(self, step):
        """Write the links, and the state after so many steps."""
        if self.rank > 0:
            return
        state = {"settings": self.settings, "step": step, "links": self.trained.state_dict(), "random": torch.get_rng_state(),
                 "steppers": [own.state_dict() for own in (*self.optimizers, *self.schedules)]}
        self.save_links()  # before the state: a kill between them repeats these steps, and writes the links again
        write_whole(self.state_file, lambda file: torch.save(state, file))

    def draw(self, file):
        """The curve of the loss, of long trainings in means of steps that follow one another."""
        losses = [json.loads(line)["loss"] for line in self.metrics_file.read_text().splitlines()]
        size = max(1, -(-len(losses) // 400))
        means = [(i + size / 2, sum(losses[i:i + size]) / len(losses[i:i + size])) for i in range(0, len(losses), size)]
        title = f"loss, {self.settings['what']} of {self.settings['style']}"
        save_charts(file, [(title, "steps", {self.settings["data"]: means})])

    def report(self, losses, plot):
        """Say what came out; a training that was done already took no steps now."""
        if self.steps == 0:
            self.keep(0)
        elif plot and self.metrics_file.read_text():
            self.draw(plot)
        loss, role = f", loss {losses[-1]:.4f}" if losses else "", self.settings["role"] or "links"
        print(f"{self.settings['what']} of {self.settings['style']}: {self.steps} steps{loss}; --checkpoint {role}={self.metrics_file.parent}")


# The command

def texts_needed(args, style):
    """Roles whose texts a training learns from."""
    if args.what == "inner":
        before = style.order[:style.order.index(args.role)]
        return [*(role for role in before if (role, args.role) in style.edges), args.role]
    return style.order if args.latents == "teacher" or args.init == "ridge" else style.order[-1:]


def agents_to_train(args, style, roles, where, untrained=False):
    """The agents of these roles, in the plain form, from {role: folder or hub id}."""
    devices = devices_of(style, args.device)
    return {role: load_agent(where[role], args.task, devices[role], usable_dtype(args.dtype, devices[role]), plain=True, untrained=untrained)
            for role in roles}


def prepare_inner(args, style, lessons):
    """The system of one agent, what its link is to minimise, and the rows for it."""
    where, new = sources(style, checkpoints(args), [args.role]), args.init == "random"
    agents = agents_to_train(args, style, [args.role], where, untrained=new)
    link = agents[args.role].inner_link.float()
    if new:
        start_gain(link, agents[args.role])
    system = System(style, agents, {}, args.task)
    return system, InnerLoss(system, args.role, args.mse, args.max_length, args.date), [lesson.turn(style, args.role) for lesson in lessons]


def prepare_outer(args, style, lessons):
    """The system, what its outer links are to minimise together, and the rows for it."""
    known = args.init == "checkpoint"
    where = sources(style, checkpoints(args), [*style.order, "links"] if known else style.order)
    agents = agents_to_train(args, style, style.order, where)
    models = {role: agent.model for role, agent in agents.items()}
    width = {role: model.config.hidden_size for role, model in models.items()}
    if known:
        links = load_outer_links(where["links"], args.task, style.edges, models, {role: agent.device for role, agent in agents.items()})
    else:
        links = {(source, target): OuterLink(width[source], width[target]).to(agents[source].device) for source, target in style.edges}
    for (_, target), link in links.items():
        link.float()
        if not known:
            start_gain(link, agents[target])
    system = System(style, agents, links, args.task)
    if args.init == "ridge" and not state_file(args, style).exists():  # a training that goes on has left its start behind
        for edge in tqdm(style.edges, "ridge regression", unit="link", leave=False):
            source = edge[0]
            turns = [lesson.turn(style, source, r) for lesson in lessons[:args.ridge_rows] for r in range(1, len(lesson.texts[source]) + 1)]
            ridge_start(system, edge, turns, longest=args.max_length, date=args.date)
    latent_steps = args.latent_steps or (TEACHER_LATENTS if args.latents == "teacher" else style.latent_steps)
    settings = Settings(rounds=args.rounds, latent_steps=latent_steps, date=args.date).completed(style)
    return system, OuterLoss(system, settings, args.latents == "teacher", args.supervise_all, args.max_length), lessons


def main():
    args = arguments()
    style = checked(args)
    task = task_of_links(args, style)
    rank, world, _ = join_others(args)
    lessons = load_lessons(args.data, style, texts_needed(args, style), pairs(args.columns), args.task, args.limit,
                           answer_first=args.what == "outer", tell=complain if rank == 0 else silent)
    torch.manual_seed(args.seed)  # new links are drawn on the CPU, so that they are the same for every device
    system, objective, rows = (prepare_inner if args.what == "inner" else prepare_outer)(args, style, lessons)
    if not args.keep_activations:
        compute_again(system)
    if rank == 0:
        args.out.mkdir(parents=True, exist_ok=True)
        if args.what == "inner":
            copy_agent(sources(style, checkpoints(args), [args.role])[args.role], args.out)

    def save_links():
        if args.what == "outer":
            save_outer_links(args.out, style, task, system.outer_links)
        else:
            save_inner_link(args.out, style, task, system.agents[args.role].inner_link)

    trained, unsynced = objective, nullcontext
    if world > 1:
        trained = DistributedDataParallel(objective, find_unused_parameters=True)
        unsynced = trained.no_sync
    computed_in = {role: str(agent.model.norm.weight.dtype) for role, agent in system.agents.items()}
    settings = {"data_hash": hashlib.sha256(repr(rows).encode()).hexdigest(), "processes": world, "dtypes": computed_in}
    run, order = Run(args, style, rank, settings, objective, save_links), Order(rows, args.seed)
    run.count(system.agents)

    def loss_at(step, part):
        return trained(order.batch((step * args.accumulate + part) * world + rank, args.batch_size))

    try:
        losses = fit(loss_at, [adamw(objective, args.lr)], args.steps, args.what, args.warm_up, args.clip, args.accumulate,
                     unsynced, run)
    except (RuntimeError, MemoryError) as e:
        if not out_of_memory(e):
            raise
        raise InputError("out of memory: take a smaller --batch-size with more --accumulate for the same steps, a shorter --max-length, "
                         "or fewer --latent-steps") from e
    if rank == 0:
        run.report(losses, args.plot)
    if world > 1:
        distributed.destroy_process_group()


if __name__ == "__main__":
    command(main)
