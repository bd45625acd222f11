"""The steps of a training, and the folder that keeps it.

AdamW under a cosine schedule, on batches whose order depends on the seed alone. The state in the folder holds all that a
step depends on, so that a training that was killed resumes to the same weights.
"""

import json
import math
import signal
import time
from contextlib import contextmanager, nullcontext
from statistics import fmean

import torch
from tqdm import tqdm

from ..common import InputError, warn, write_atomic
from ..evaluate.runs import unchanged
from ..runs.plot import save_charts
from .save import suffix, write_state

# The order of the rows


def permutation(n, seed, epoch):
    """The order of n rows in one pass over them. It depends on nothing else, so that a resumed training repeats it."""
    return torch.randperm(
        n, generator=torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    ).tolist()


def batch_of(rows, seed, number, size):
    """Batch `number` (from 0) of `size` rows, of an endless series of permutations of the rows."""
    places = [divmod(place, len(rows)) for place in range(number * size, (number + 1) * size)]
    orders = {
        epoch: permutation(len(rows), seed, epoch) for epoch in {epoch for epoch, _ in places}
    }
    return [rows[orders[epoch][i]] for epoch, i in places]


# The folder


def files_of(folder, task):
    """The state and the metrics of a training in a folder; task is None, math or code, as in save_outer_links.

    The metrics are there from the start: with them, but without a state, a training was killed before it kept one.
    """
    return folder / f"training{suffix(task)}.pt", folder / f"metrics{suffix(task)}.jsonl"


class Run:
    """The folder of a training: training.pt, from which it resumes; metrics.jsonl, one line per step; and the links.

    settings     all that the weights depend on: a training resumes only under the same settings
    agents       {role: Agent}: the positions that they read are counted from now on
    objective    the module whose parameters are trained
    save_links   writes the links to the folder
    In a group of processes only rank 0 writes.
    """

    def __init__(self, folder, task, settings, agents, objective, save_links, save_every, rank=0):
        self.state_file, self.metrics_file = files_of(folder, task)
        self.settings, self.objective, self.save_links = settings, objective, save_links
        self.steps, self.save_every, self.rank = settings["steps"], save_every, rank
        self.positions, self.started = 0, time.perf_counter()

        def count(_, args):
            self.positions += args[1].numel()

        for agent in agents.values():
            agent.model.register_forward_pre_hook(count)

    def saved_state(self):
        """The last state that was saved; InputError if it is damaged, or that of a training under other settings."""
        try:
            state = torch.load(self.state_file, map_location="cpu", weights_only=True)
            settings, _ = state["settings"], state["steppers"]
        except Exception as e:  # a damaged file can raise anything
            raise InputError(
                f"{self.state_file} is damaged or not the state of a training ({type(e).__name__}): "
                "delete it to begin this training anew with --resume, or give another --out"
            ) from e
        unchanged(self.state_file, settings, self.settings, "--out")
        return state

    def resume(self, steppers):
        """Put links, optimizers, schedules and metrics back to the last state -> its step; 0 if none was saved."""
        self.steppers, step = steppers, 0
        if self.state_file.exists():
            state = self.saved_state()
            step = state["step"]
            self.objective.load_state_dict(state["links"])
            for stepper, saved in zip(steppers, state["steppers"]):
                stepper.load_state_dict(saved)
            torch.set_rng_state(state["random"])
        if (
            self.rank == 0
        ):  # metrics of steps after the state are dropped: these steps are taken again
            before = (
                self.metrics_file.read_text().splitlines(keepends=True)
                if self.metrics_file.exists()
                else []
            )
            write_atomic(self.metrics_file, lambda file: file.write_text("".join(before[:step])))
        return step

    def record_step(self, step, loss, lr, norm):
        """Write the metrics of a step, and the state every save_every steps; returns what the progress bar shows."""
        now = time.perf_counter()
        seconds, self.started = now - self.started, now
        pace, self.positions = self.positions / seconds, 0
        if self.rank == 0:
            line = {
                "step": step,
                "loss": loss,
                "lr": lr,
                "gradient_norm": norm,
                "tokens_per_second": round(pace),
                "seconds": round(seconds, 3),
            }
            with open(self.metrics_file, "a") as out:
                out.write(json.dumps(line) + "\n")
        if step % self.save_every == 0 or step == self.steps:
            self.save(step)
        return {"tokens/s": f"{pace:.0f}"}

    def save(self, step):
        """Write the links and the state after `step` steps."""
        if self.rank > 0:
            return
        state = {
            "settings": self.settings,
            "step": step,
            "links": self.objective.state_dict(),
            "random": torch.get_rng_state(),
            "steppers": [stepper.state_dict() for stepper in self.steppers],
        }
        self.save_links()  # before the state: if killed in between, --resume takes the steps and writes the links again
        write_atomic(self.state_file, lambda file: write_state(state, file))

    def report(self, losses, plot):
        """Print the outcome and plot the loss; `losses` are those of steps taken now, none if all were taken before."""
        if self.steps == 0:
            self.save(0)
        what, style, role = (self.settings[name] for name in ("what", "style", "role"))
        curve = [json.loads(line)["loss"] for line in self.metrics_file.read_text().splitlines()]
        if plot and curve:
            size = -(
                -len(curve) // 400
            )  # each point is the mean of consecutive steps, so that there are at most 400
            means = [(i + size / 2, fmean(curve[i : i + size])) for i in range(0, len(curve), size)]
            save_charts(
                plot, [(f"loss, {what} of {style}", "steps", {self.settings["data"]: means})]
            )
        loss = f", loss {losses[-1]:.4f}" if losses else ""
        print(
            f"{what} of {style}: {self.steps} steps{loss}; --checkpoint {role or 'links'}={self.metrics_file.parent}"
        )


# Steps


def adamw(module, lr):
    """The optimizer of the released recipe."""
    return torch.optim.AdamW(module.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=0.0)


def fit(loss_at, optimizers, steps, name, warm_up=10, clip=1.0, parts=1, run=None):
    """Take `steps` steps down the mean over parts of loss_at(step, part); returns the losses.

    warm_up  steps in which the learning rate rises, before it follows a cosine down to 0
    name  label of the progress bar
    run   a Run: it loads an earlier state, records each step and saves states. Without one nothing is saved.
    Raises InputError if a loss or a gradient is not finite, before it reaches the weights; `run` saves the last state.
    """
    rate = lambda step: min(
        (step + 1) / warm_up, 0.5 * (1 + math.cos(math.pi * step / max(1, steps)))
    )
    schedules = [torch.optim.lr_scheduler.LambdaLR(optimizer, rate) for optimizer in optimizers]
    steppers = [*optimizers, *schedules]
    first, losses = run.resume(steppers) if run else 0, []
    quiet, alone = (
        run is not None and run.rank > 0,
        run is not None and not torch.distributed.is_initialized(),
    )
    with (
        tqdm(range(first, steps), name, steps, initial=first, unit="step", disable=quiet) as bar,
        delayed_interrupt() if alone else nullcontext() as interrupt,
    ):
        for step in bar:
            loss, norm = set_gradients(loss_at, step, parts, optimizers, clip)
            if not math.isfinite(loss + norm):
                if run:
                    run.save(step)
                raise InputError(
                    f"at step {step + 1} the loss is {loss}, its gradient norm {norm}. The links before it are "
                    "kept: start from them with a lower --lr and another --out, at step 1 with --dtype float32"
                )
            lr = schedules[0].get_last_lr()[0]
            for stepper in steppers:
                stepper.step()
            losses.append(loss)
            bar.set_postfix(
                loss=f"{loss:.4f}", **(run.record_step(step + 1, loss, lr, norm) if run else {})
            )
            if interrupt:  # the last step, too: the next training of a system must not begin
                run.save(step + 1)
                raise KeyboardInterrupt
    return losses


def set_gradients(loss_at, step, parts, optimizers, clip):
    """Put the gradients of a step in place, clipped to the norm `clip`; returns its loss and their norm before.

    Both are averaged over the parts and over all processes. A parameter without a gradient has none in any process.
    """
    for optimizer in optimizers:
        optimizer.zero_grad()
    total = 0
    for part in range(parts):
        loss = loss_at(step, part) / parts
        if not loss.requires_grad:
            raise InputError(
                "nothing that a link sends reaches the last agent: give more --rounds, or an edge to it"
            )
        loss.backward()
        total = total + loss.detach()
    parameters = [
        p for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]
    ]
    if torch.distributed.is_initialized():
        for value in total, *(p.grad for p in parameters if p.grad is not None):
            torch.distributed.all_reduce(value)
            value /= torch.distributed.get_world_size()
    return total.item(), torch.nn.utils.clip_grad_norm_(parameters, clip).item()


@contextmanager
def delayed_interrupt():
    """A list that gets an item at Ctrl-C, so that a step can be ended and saved; the second Ctrl-C ends all at once."""
    before, interrupt = signal.getsignal(signal.SIGINT), []

    def note(*_):
        signal.signal(signal.SIGINT, before)
        interrupt.append(True)
        warn("ending after this step, --resume will go on; Ctrl-C again ends at once")

    if before is not signal.SIG_IGN:  # as in the background of a shell
        signal.signal(signal.SIGINT, note)
    try:
        yield interrupt
    finally:
        signal.signal(signal.SIGINT, before)
