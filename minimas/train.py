"""Trains the links of a style on frozen agents, into folders that --checkpoint loads.

    python -m minimas.train inner --style sequential_light --role planner --data mine.jsonl --out runs/planner
    python -m minimas.train outer --style sequential_light --data RecursiveMAS/Sequential-Math --out runs/links
    torchrun --nproc-per-node 4 -m minimas.train outer --style mixture --data mine.jsonl --out runs/links

What the links learn is in objective.py. Here are the options, the order of the rows, the folder of a training (a killed
training resumes to the same weights, since its state holds all that a step depends on), and the steps: AdamW under a
cosine schedule.
"""

import hashlib
import json
import math
import os
import signal
import time
from contextlib import contextmanager, nullcontext
from functools import lru_cache, partial
from pathlib import Path

import torch
from torch import distributed
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from . import InputError, __version__
from .agent import load_agent, silent
from .cli import (checkpoints, command, fingerprint, join_others, make_parser, names, out_of_memory, pairs, unchanged,
                  writable_file)
from .data import complain
from .lessons import load_lessons
from .link import OuterLink
from .load import links_task, load_outer_links, usable_dtype
from .objective import MAX_POSITIONS, InnerLoss, OuterLoss, compute_again, ridge_start, start_gain
from .plot import save_charts
from .prompts import TASKS
from .recurse import Settings, System
from .save import copy_agent, save_inner_link, save_outer_links, suffix, write_whole
from .styles import style_named

NOT_NEGATIVE = ("steps", "mse", "supervise_all")
POSITIVE = ("batch_size", "accumulate", "rounds", "latent_steps", "limit", "ridge_rows", "max_length", "save_every",
            "warm_up", "lr", "clip")
NO_EFFECT_ON_WEIGHTS = ("out", "resume", "plot", "save_every", "device", "keep_activations")  # may change on --resume
ONLY = {"inner": ("role", "mse"),  # options that mean something for one kind of training only
        "outer": ("rounds", "latents", "latent_steps", "supervise_all", "ridge_rows")}
MAX_SEED = 10 ** 12  # `permutation` multiplies it by a million, and torch takes 64 bits
TEACHER_LATENTS = 80  # states that a given text sends at most, as in the released recipe


# Options

def arguments():
    parser = make_parser("train", "Train the links of a recursive multi-agent system; its agents stay as they are.")
    add = parser.add_argument
    add("what", choices=("inner", "outer"), help="the inner link of one role, or all outer links of a style together")
    add("--role", help="inner: the role whose link is trained")
    add("--data", required=True, help="a .json, .jsonl or .csv file, a hub id (RecursiveMAS/Sequential-Math), or tiny")
    add("--columns", type=names, default=(), metavar="question=COLUMN,...",
        help="the data's names for question, fn_name, type, task_family, or a role's text")
    add("--limit", type=int, help="read only this many rows")
    add("--task", default="math", choices=TASKS,
        help="math (default), choice or code: the task of rows that do not name theirs, and of the links")
    add("--out", type=Path, required=True, help="the folder to write")
    add("--resume", action="store_true", help="continue the training in --out that was killed")
    add("--steps", type=int, default=20000, help="0 writes the links as they start (default 20000)")
    add("--batch-size", type=int, default=2, help="rows at once in each process (default 2)")
    add("--accumulate", type=int, default=1, help="batches per step (default 1)")
    add("--lr", type=float, default=5e-4, help="highest learning rate (default 5e-4)")
    add("--warm-up", type=int, default=10, help="steps in which it rises, before a cosine takes it to 0 (default 10)")
    add("--clip", type=float, default=1.0, help="largest norm of a step's gradient (default 1)")
    add("--mse", type=float, default=0.0, help="inner: weight of the squared error beside the cosine (default 0)")
    add("--rounds", type=int, default=3, help="outer: rounds of recursion (default 3)")
    add("--latents", choices=("rollout", "teacher"), default="rollout",
        help="outer: agents think as at inference (default), or send the states at the tokens of given texts, as in "
             "the released training")
    add("--latent-steps", type=int,
        help=f"outer: latents per turn (default: the style's; with --latents teacher at most {TEACHER_LATENTS})")
    add("--supervise-all", type=float, default=0.0, metavar="WEIGHT",
        help="outer: weight of the mean loss of the other rounds (default 0)")
    add("--init", choices=("ridge", "random", "checkpoint"),
        help="how links start: from a ridge regression on the texts of all roles (default for outer), at random "
             "(default for inner), or as the checkpoint's")
    add("--ridge-rows", type=int, default=256, help="rows for the regression (default 256)")
    add("--max-length", type=int, default=MAX_POSITIONS,
        help=f"positions of a prompt with its text; texts are cut to fit, prompts never (default {MAX_POSITIONS})")
    add("--keep-activations", action="store_true", help="do not compute blocks twice: faster, but takes more memory")
    add("--save-every", type=int, default=100, help="steps between two saved states (default 100)")
    add("--plot", type=Path, help="an SVG file for the loss curve")
    args = parser.parse_args()
    for kind, own in ONLY.items():
        for name in own if kind != args.what else ():
            if getattr(args, name) != parser.get_default(name):
                raise InputError(f"--{name.replace('_', '-')} is for {kind} links, and this trains {args.what} ones: "
                                 "leave it out")
    args.init = args.init or {"inner": "random", "outer": "ridge"}[args.what]
    return args


def checked(args):
    """The Style that args name; InputError if they do not describe a training."""
    style = style_named(args.style)
    if args.what == "inner" and args.role not in style.order:
        raise InputError(f"--role is {args.role!r}, expected the inner link's: one of {', '.join(style.order)}")
    if args.what == "inner" and args.init == "ridge":
        raise InputError("--init ridge is for outer links: it maps one agent's states to another's embeddings")
    check_numbers(args)
    if args.plot:
        writable_file("--plot", args.plot)
    check_folder(args, style)
    return style


def check_folder(args, style):
    """InputError if --out cannot be written to, or already holds links or a training that is not to be continued."""
    existing = next(place for place in (args.out, *args.out.absolute().parents) if place.exists())
    if not (existing.is_dir() and os.access(existing, os.W_OK)):
        raise InputError(f"--out {args.out} cannot be made or written to ({existing} is a file, or closed to you): "
                         "give another folder")
    if state_file(args, style).exists() or metrics_file(args, style).exists():
        if not args.resume:
            raise InputError(f"{args.out} already holds a training: continue it with --resume, or give another --out")
        return
    ending = suffix(task_of_links(args, style))
    if there := sorted(args.out.glob(f"adapter{ending}.pt" if args.what == "inner" else f"*Outerlink{ending}.pt")):
        raise InputError(f"{args.out} already holds {there[0].name}, which would be overwritten: give another --out")


def check_numbers(args):
    for name in (*NOT_NEGATIVE, *POSITIVE):
        value, positive = getattr(args, name), name in POSITIVE
        if value is not None and not ((0 < value if positive else 0 <= value) and value < math.inf):
            expected = "above 0" if positive else "from 0 up"
            raise InputError(f"--{name.replace('_', '-')} is {value}, expected a finite number {expected}")
    if abs(args.seed) > MAX_SEED:
        raise InputError(f"--seed is {args.seed}, expected a number below {MAX_SEED}")


def task_of_links(args, style):
    """The task in the names of the links' files, None for a style with one set of links."""
    return links_task(args.task) if style.links_by_task else None


def state_file(args, style):
    return args.out / f"training{suffix(task_of_links(args, style))}.pt"


def metrics_file(args, style):
    """It is there from the start: with it, but without a state, a training was killed before it kept one."""
    return args.out / f"metrics{suffix(task_of_links(args, style))}.jsonl"


# The order of the rows

@lru_cache(maxsize=2)  # a batch can end one pass over the rows and begin the next
def permutation(n, seed, epoch):
    """The order of n rows in one pass over them. It depends on nothing else, so that a resumed training repeats it."""
    return torch.randperm(n, generator=torch.Generator().manual_seed(seed * 1_000_003 + epoch)).tolist()


def batch_of(rows, seed, number, size):
    """Batch `number` (from 0) of `size` rows, of an endless series of permutations of the rows."""
    places = [divmod(place, len(rows)) for place in range(number * size, (number + 1) * size)]
    return [rows[permutation(len(rows), seed, epoch)[i]] for epoch, i in places]


# The folder

class Run:
    """The folder of a training: training.pt, from which it resumes; metrics.jsonl, one line per step; and the links.

    settings     all that the weights depend on: a training resumes only under the same
    objective    the module whose parameters are trained (not its DistributedDataParallel wrapper)
    save_links   writes the links to the folder
    In a group of processes only rank 0 writes.
    """

    def __init__(self, args, style, rank, settings, objective, save_links):
        self.state_file = state_file(args, style)
        self.metrics_file = metrics_file(args, style)
        self.steps, self.save_every, self.rank = args.steps, args.save_every, rank
        self.settings, self.objective, self.save_links = settings, objective, save_links
        self.positions, self.started = 0, 0.0

    def count_positions(self, agents):
        """Count the positions that agents read from now on."""
        def count(_, args):
            self.positions += args[1].numel()
        for agent in agents.values():
            agent.model.register_forward_pre_hook(count)

    def resume(self, optimizers, schedules):
        """Load the last state that was kept, if there is one; returns the number of steps taken before."""
        self.steppers, step = (*optimizers, *schedules), 0
        if self.state_file.exists():
            state = self.read_state()
            unchanged(self.state_file, state["settings"], self.settings, "--out")
            self.objective.load_state_dict(state["links"])
            for stepper, kept in zip(self.steppers, state["steppers"]):
                stepper.load_state_dict(kept)
            torch.set_rng_state(state["random"])
            step = state["step"]
        if self.rank == 0:  # metrics of steps after the state are dropped: these steps are taken again
            before = self.metrics_file.read_text().splitlines(keepends=True) if self.metrics_file.exists() else []
            write_whole(self.metrics_file, lambda file: file.write_text("".join(before[:step])))
        self.started = time.perf_counter()
        return step

    def read_state(self):
        try:
            state = torch.load(self.state_file, map_location="cpu", weights_only=True)
            state["settings"], state["steppers"]
        except Exception as e:  # a damaged file can raise anything
            raise InputError(f"{self.state_file} is damaged or not the state of a training ({type(e).__name__}): "
                             "give another --out") from e
        return state

    def record_step(self, step, loss, lr, norm):
        """Write the metrics of a step, and the state every save_every steps; returns what the progress bar shows."""
        now = time.perf_counter()
        seconds, self.started = now - self.started, now
        pace, self.positions = self.positions / seconds, 0
        if self.rank == 0:
            line = {"step": step, "loss": loss, "lr": lr, "gradient_norm": norm, "tokens_per_second": round(pace),
                    "seconds": round(seconds, 3)}
            with open(self.metrics_file, "a") as out:
                out.write(json.dumps(line) + "\n")
        if step % self.save_every == 0 or step == self.steps:
            self.keep(step)
        return {"tokens/s": f"{pace:.0f}"}

    def keep(self, step):
        """Write the links and the state after `step` steps."""
        if self.rank > 0:
            return
        state = {"settings": self.settings, "step": step, "links": self.objective.state_dict(),
                 "random": torch.get_rng_state(), "steppers": [stepper.state_dict() for stepper in self.steppers]}
        self.save_links()  # before the state: if killed in between, --resume takes the steps and writes the links again
        write_whole(self.state_file, lambda file: torch.save(state, file))

    def report(self, losses, plot):
        """Print the outcome and plot the loss; `losses` are those of steps taken now, none if all were taken before."""
        if self.steps == 0:
            self.keep(0)
        elif plot and self.metrics_file.read_text():
            self.plot_loss(plot)
        what, style, role = (self.settings[name] for name in ("what", "style", "role"))
        loss = f", loss {losses[-1]:.4f}" if losses else ""
        print(f"{what} of {style}: {self.steps} steps{loss}; --checkpoint {role or 'links'}={self.metrics_file.parent}")

    def plot_loss(self, file):
        """The loss curve; each point is the mean of consecutive steps, so that there are at most 400."""
        losses = [json.loads(line)["loss"] for line in self.metrics_file.read_text().splitlines()]
        size = max(1, -(-len(losses) // 400))
        groups = [(i, losses[i:i + size]) for i in range(0, len(losses), size)]
        means = [(i + size / 2, sum(group) / len(group)) for i, group in groups]
        title = f"loss, {self.settings['what']} of {self.settings['style']}"
        save_charts(file, [(title, "steps", {self.settings["data"]: means})])


# Steps

def adamw(module, lr):
    """The optimizer of the released recipe."""
    return torch.optim.AdamW(module.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=0.0)


def fit(loss_at, optimizers, steps, name, warm_up=10, clip=1.0, parts=1, unsynced=nullcontext, run=None):
    """Take `steps` steps down the mean over parts of loss_at(step, part); returns the losses.

    name      label of the progress bar
    unsynced  a context for all parts but the last, such as no_sync of DistributedDataParallel
    run       a Run: it loads an earlier state, records each step and keeps states. Without one nothing is kept.
    Raises InputError if a loss or a gradient is not finite, before it reaches the weights; `run` keeps the last state.
    """
    parameters = [p for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]]
    rate = lambda step: min((step + 1) / warm_up, 0.5 * (1 + math.cos(math.pi * step / max(1, steps))))
    schedules = [torch.optim.lr_scheduler.LambdaLR(optimizer, rate) for optimizer in optimizers]
    first, losses = run.resume(optimizers, schedules) if run else 0, []
    quiet, alone = run is not None and run.rank > 0, run is not None and not distributed.is_initialized()
    with tqdm(range(first, steps), name, steps, initial=first, unit="step", disable=quiet) as bar, \
            delayed_interrupt() if alone else nullcontext() as interrupt:
        for step in bar:
            if interrupt:
                run.keep(step)
                raise KeyboardInterrupt
            for optimizer in optimizers:
                optimizer.zero_grad()
            loss = backward(loss_at, step, parts, unsynced)
            norm = torch.nn.utils.clip_grad_norm_(parameters, clip).item()
            if not math.isfinite(loss + norm):
                if run:
                    run.keep(step)
                raise InputError(f"at step {step + 1} the loss is {loss}, its gradient norm {norm}. The links before "
                                 "it are kept: start from them with --init checkpoint, a lower --lr and another --out")
            lr = schedules[0].get_last_lr()[0]
            for stepper in (*optimizers, *schedules):
                stepper.step()
            losses.append(loss)
            bar.set_postfix(loss=f"{loss:.4f}", **(run.record_step(step + 1, loss, lr, norm) if run else {}))
    return losses


@contextmanager
def delayed_interrupt():
    """A list that gets an item at Ctrl-C, so that a step can be ended and kept; the second Ctrl-C ends all at once."""
    interrupt = []

    def note(*_):
        if interrupt:
            raise KeyboardInterrupt
        interrupt.append(True)
        complain("ending after this step, --resume will go on; Ctrl-C again ends at once")
    before = signal.getsignal(signal.SIGINT)
    if before is not signal.SIG_IGN:  # as in the background of a shell
        signal.signal(signal.SIGINT, note)
    try:
        yield interrupt
    finally:
        signal.signal(signal.SIGINT, before)


def backward(loss_at, step, parts, unsynced):
    """Add up the gradients of a step's parts; returns its loss, averaged over the parts and over all processes."""
    shares = []
    for part in range(parts):
        with unsynced() if part < parts - 1 else nullcontext():
            share = loss_at(step, part) / parts
            share.backward()
        shares.append(share.detach())
    loss = sum(shares)
    if distributed.is_initialized():
        distributed.all_reduce(loss)
        loss = loss / distributed.get_world_size()
    return loss.item()


# What is trained on what

def texts_needed(args, style):
    """The roles whose texts a training uses."""
    if args.what == "inner":
        before = style.order[:style.order.index(args.role)]
        return [*(role for role in before if (role, args.role) in style.edges), args.role]
    return style.order if args.latents == "teacher" or args.init == "ridge" else style.order[-1:]


def agents_to_train(args, style, roles, where, untrained=False):
    """{role: Agent} in the plain form, from where[role], a folder or hub id; `untrained` gives them new inner links."""
    devices = style.devices(args.device)
    return {role: load_agent(where[role], args.task, devices[role], usable_dtype(args.dtype, devices[role]), plain=True,
                             untrained=untrained) for role in roles}


def prepare_inner(args, style, lessons):
    """The system of one agent, the objective of its inner link, and the rows to train on: Turns."""
    where, new = style.sources(checkpoints(args), [args.role]), args.init == "random"
    agents = agents_to_train(args, style, [args.role], where, untrained=new)
    link = agents[args.role].inner_link.float()
    if new:
        start_gain(link, agents[args.role])
    system = System(style, agents, {}, args.task)
    turns = [lesson.turn(style, args.role) for lesson in lessons]
    return system, InnerLoss(system, args.role, args.mse, args.max_length, args.date), turns


def prepare_outer(args, style, lessons):
    """The system, the objective of its outer links, and the rows to train on: Lessons."""
    where = style.sources(checkpoints(args), [*style.order, "links"] if args.init == "checkpoint" else style.order)
    agents = agents_to_train(args, style, style.order, where)
    system = System(style, agents, first_links(args, style, agents, where), args.task)
    if args.init == "ridge" and not state_file(args, style).exists():  # a resumed training has its links in its state
        start_at_ridge(args, system, lessons[:args.ridge_rows])
    latent_steps = args.latent_steps or (TEACHER_LATENTS if args.latents == "teacher" else style.latent_steps)
    settings = Settings(rounds=args.rounds, latent_steps=latent_steps, date=args.date).completed(style)
    return system, OuterLoss(system, settings, args.latents == "teacher", args.supervise_all, args.max_length), lessons


def first_links(args, style, agents, where):
    """{edge: OuterLink} in float32: the checkpoint's, or random ones."""
    if args.init == "checkpoint":
        links = load_outer_links(where["links"], args.task, style.edges, agents)
        return {edge: link.float() for edge, link in links.items()}
    links = {}
    for source, target in style.edges:
        widths = [agents[role].model.config.hidden_size for role in (source, target)]
        links[source, target] = OuterLink(*widths).to(agents[source].device)
        start_gain(links[source, target], agents[target])
    return links


def start_at_ridge(args, system, lessons):
    """ridge_start for each edge, on its source's turns in all rounds that the lessons have texts for."""
    for edge in tqdm(system.style.edges, "ridge regression", unit="link", leave=False):
        source = edge[0]
        turns = [lesson.turn(system.style, source, r)
                 for lesson in lessons for r in range(1, len(lesson.texts[source]) + 1)]
        ridge_start(system, edge, turns, longest=args.max_length, date=args.date)


def settings_of(args, world, system, rows):
    """All that the weights depend on, as JSON values."""
    options = {name: value for name, value in vars(args).items() if name not in NO_EFFECT_ON_WEIGHTS}
    dtypes = {role: str(agent.model.norm.weight.dtype) for role, agent in system.agents.items()}
    data_hash = hashlib.sha256(repr(rows).encode()).hexdigest()
    settings = {"minimas": __version__, **options, "data_hash": data_hash, "processes": world, "dtypes": dtypes}
    settings["checkpoint_files"] = fingerprint(args.checkpoint, args.out)
    return json.loads(json.dumps(settings))


def save_links(args, style, system):
    task = task_of_links(args, style)
    if args.what == "outer":
        save_outer_links(args.out, style, task, system.outer_links)
    else:
        save_inner_link(args.out, style, task, system.agents[args.role].inner_link)


def train(args, objective, rows, run, world):
    """Take all steps on the batches of this process; returns the losses."""
    module, unsynced = objective, nullcontext
    if world > 1:
        module = DistributedDataParallel(objective, find_unused_parameters=True)
        unsynced = module.no_sync

    def loss_at(step, part):
        number = (step * args.accumulate + part) * world + run.rank
        return module(batch_of(rows, args.seed, number, args.batch_size))

    try:
        return fit(loss_at, [adamw(objective, args.lr)], args.steps, args.what, args.warm_up, args.clip,
                   args.accumulate, unsynced, run)
    except (RuntimeError, MemoryError) as e:
        if not out_of_memory(e):
            raise
        raise InputError("out of memory: take a smaller --batch-size with more --accumulate for the same steps, "
                         "a shorter --max-length, or fewer --latent-steps") from e


def main():
    args = arguments()
    style = checked(args)
    rank, world, _ = join_others(args)
    columns, tell = pairs("--columns", args.columns), complain if rank == 0 else silent
    lessons = load_lessons(args.data, style, texts_needed(args, style), columns, args.task, args.limit,
                           answer_first=args.what == "outer", tell=tell)
    torch.manual_seed(args.seed)  # new links are drawn on the CPU, so that they are the same on every device
    system, objective, rows = (prepare_inner if args.what == "inner" else prepare_outer)(args, style, lessons)
    if not args.keep_activations:
        compute_again(system)
    if rank == 0:
        args.out.mkdir(parents=True, exist_ok=True)
        if args.what == "inner":
            copy_agent(style.sources(checkpoints(args), [args.role])[args.role], args.out)
    settings = settings_of(args, world, system, rows)
    run = Run(args, style, rank, settings, objective, partial(save_links, args, style, system))
    run.count_positions(system.agents)
    losses = train(args, objective, rows, run, world)
    if rank == 0:
        run.report(losses, args.plot)
    if world > 1:
        distributed.destroy_process_group()


if __name__ == "__main__":
    command(main)
