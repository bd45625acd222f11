"""The steps of a training, and the folder that keeps it.

AdamW under a cosine schedule, on batches whose order depends on the seed alone. The state in the folder holds all that
a step depends on, so that a training that was killed resumes to the same weights.
"""

import json
import math
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from statistics import fmean
from types import FrameType
from typing import Any

import torch
from tqdm import tqdm

from ..agent import Agent
from ..common import InputError, Terminated, no_op, warn, write_atomic
from ..runs.dependencies import check_unchanged
from ..runs.plot import Chart
from ..runs.processes import rank_and_world
from ..settings import COMPARED_HEARD
from .folders import files_of
from .held_out import HeldOut
from .save import write_state
from .settings import TrainSettings

# The order of the rows


def permutation(n: int, seed: int, epoch: int) -> list[int]:
    """The order of n rows in one pass over them. It depends on nothing else, so that a resumed training repeats it."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    return torch.randperm(n, generator=generator).tolist()


def batch_of(rows: Sequence, seed: int, number: int, size: int) -> list:
    """Batch `number` (from 0) of `size` rows, of an endless series of permutations of the rows."""
    orders: dict[int, list[int]] = {}
    batch = []
    for place in range(number * size, (number + 1) * size):
        epoch, i = divmod(place, len(rows))
        if epoch not in orders:
            orders[epoch] = permutation(len(rows), seed, epoch)
        batch.append(rows[orders[epoch][i]])
    return batch


# The folder

IN_STATE = ("settings", "step", "links", "random", "steppers")  # what a training resumes from


def read_metrics(file: Path) -> dict[int, dict]:
    """{step: its line} of a file of metrics, in the order of the steps.

    A line that was cut off when its writer was killed is left out. Of several lines of a step the last one counts: the
    step was taken again.
    """
    metrics = {}
    lines = file.read_bytes().split(b"\n") if file.exists() else []
    for line in lines:
        with suppress(ValueError, KeyError, TypeError):
            values = dict(json.loads(line))
            metrics[int(values["step"])] = values
    return dict(sorted(metrics.items()))


class TrainingFolder:
    """The folder of a training: training.pt, from which it resumes; metrics.jsonl, one line per step, and one before
    the first if rows are held out; and the links.

    dependencies  all that the weights depend on: a training resumes only if it is the same
    agents        {role: Agent}: the positions that they read are counted within `counting`
    loss          the module whose parameters are trained
    save_links    writes the links to the folder
    with_state    what else goes on from the last state: optimizers, schedules and the best held-out loss
    In a group of processes only rank 0 writes.
    """

    def __init__(
        self,
        folder: Path,
        task: str | None,
        dependencies: Mapping[str, Any],
        agents: Mapping[str, Agent],
        loss: torch.nn.Module,
        save_links: Callable[[], None],
        save_every: int,
        rank: int = 0,
    ) -> None:
        self.state_file, self.metrics_file = files_of(folder, task)
        self.dependencies = dependencies
        self.agents = agents
        self.loss = loss
        self.save_links = save_links
        self.steps: int = dependencies["steps"]
        self.save_every = save_every
        self.rank = rank
        self.with_state: list[Any] = []
        self.positions = 0  # that agents have read since the last step
        self.started = time.perf_counter()  # when the last step ended

    @contextmanager
    def counting(self) -> Iterator[None]:
        """Within, the positions that agents read are counted."""
        hooks = []
        for agent in self.agents.values():
            hooks.append(agent.model.register_forward_pre_hook(self.count, with_kwargs=True))
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def count(self, model: torch.nn.Module, args: tuple[Any, ...], named: dict[str, Any]) -> None:
        """A hook before a model's forward(x, positions, ...)."""
        positions = named["positions"] if "positions" in named else args[1]
        self.positions += positions.numel()

    def saved_state(self) -> dict[str, Any]:
        """The last state that was saved; InputError if it is damaged, or that of a training under other settings."""
        try:
            state = torch.load(self.state_file, map_location="cpu", weights_only=True)
        except Exception as e:  # a damaged file can raise anything
            raise self.damaged(type(e).__name__) from e
        if not isinstance(state, dict):
            raise self.damaged(f"it holds a {type(state).__name__}")
        missing = [name for name in IN_STATE if name not in state]
        if missing:
            raise self.damaged(f"it has no {missing[0]!r}")
        check_unchanged(self.state_file, state["settings"], self.dependencies, "--out")
        return state

    def damaged(self, why: str) -> InputError:
        """The error for a file that is not the state of a training."""
        return InputError(
            f"{self.state_file} is damaged or not the state of a training ({why}): "
            "delete it to begin this training anew with --resume, or give another --out"
        )

    def resume(self, with_state: Sequence[Any]) -> int:
        """Put links, what has a state, and metrics back to the last state -> its step; 0 if none was saved."""
        self.with_state = list(with_state)
        step = 0
        if self.state_file.exists():
            state = self.saved_state()
            step = state["step"]
            self.loss.load_state_dict(state["links"])
            for one, saved in zip(with_state, state["steppers"], strict=True):
                one.load_state_dict(saved)
            torch.set_rng_state(state["random"])
        if self.rank == 0:
            self.keep_metrics(step)
        return step

    def keep_metrics(self, last: int) -> None:
        """Drop the metrics of steps after the `last` one of the state: these steps are taken again. 0 drops all."""
        kept = []
        if last > 0:
            metrics = read_metrics(self.metrics_file)
            kept = [line for step, line in metrics.items() if step <= last]
        text = "".join(json.dumps(line) + "\n" for line in kept)
        write_atomic(self.metrics_file, lambda file: file.write_text(text))

    def pace(self) -> dict[str, float]:
        """How fast the step was that has ended."""
        seconds = time.perf_counter() - self.started
        return {
            "tokens_per_second": round(self.positions / seconds),
            "seconds": round(seconds, 3),
        }

    def record_step(self, metrics: Mapping[str, float]) -> None:
        """Write the metrics of a step, and the state every save_every steps; the next step begins now."""
        self.write_metrics(metrics)
        step = int(metrics["step"])
        if step % self.save_every == 0 or step == self.steps:
            self.save(step)
        self.started = time.perf_counter()
        self.positions = 0

    def write_metrics(self, metrics: Mapping[str, float]) -> None:
        """Add a line to the file of metrics."""
        if self.rank == 0:
            with open(self.metrics_file, "a") as out:
                out.write(json.dumps(metrics) + "\n")

    def save(self, step: int) -> None:
        """Write the links and the state after `step` steps."""
        if self.rank > 0:
            return
        state = {
            "settings": self.dependencies,
            "step": step,
            "links": self.loss.state_dict(),
            "random": torch.get_rng_state(),
            "steppers": [one.state_dict() for one in self.with_state],
        }
        self.save_links()  # before the state: if killed in between, --resume takes the steps and writes the links again
        write_atomic(self.state_file, lambda file: write_state(state, file))


def charts_of(folder: Path, task: str | None, title: str, data: str) -> list[Chart]:
    """The charts of the losses of the training in a folder; none if it has no losses. `data` is its name in the key."""
    _, metrics_file = files_of(folder, task)
    metrics = read_metrics(metrics_file)
    charts: list[Chart] = []
    if curve := curve_of(metrics, "loss"):
        charts.append((f"loss, {title}", "steps", {data: means_of(curve)}))
    held_out = {value: curve_of(metrics, f"held_out_{value}") for value in COMPARED_HEARD}
    if held_out["own"]:
        charts.append((f"held-out loss, {title}", "steps", held_out))
    return charts


def curve_of(metrics: Mapping[int, Mapping[str, float]], name: str) -> list[tuple[float, float]]:
    """(step, value) of the lines of metrics that have a value of this name."""
    return [(step, line[name]) for step, line in metrics.items() if name in line]


def means_of(curve: Sequence[tuple[float, float]], most: int = 400) -> list[tuple[float, float]]:
    """At most `most` points of a curve of (step, loss): each is the mean of as many neighbours."""
    size = math.ceil(len(curve) / most)
    means = []
    for i in range(0, len(curve), size):
        steps, losses = zip(*curve[i : i + size], strict=True)
        means.append((fmean(steps), fmean(losses)))
    return means


# Steps


def adamw(module: torch.nn.Module, lr: float) -> torch.optim.Optimizer:
    """The optimizer of the released recipe."""
    return torch.optim.AdamW(module.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=0.0)


def fit(
    loss_at: Callable[[int, int], torch.Tensor],
    optimizers: Sequence[torch.optim.Optimizer],
    steps: int,
    name: str,
    warm_up: int = TrainSettings.warm_up,
    clip: float = TrainSettings.clip,
    parts: int = TrainSettings.accumulate,
    folder: TrainingFolder | None = None,
    progress: bool = True,
    callback: Callable[[dict[str, Any]], object] = no_op,
    held_out: HeldOut | None = None,
) -> list[float]:
    """Take `steps` steps down the mean over parts of loss_at(step, part); returns the losses.

    warm_up   steps in which the learning rate rises, before it follows a cosine down to 0
    name      label of the progress bar
    folder    it loads an earlier state, records each step and saves states. Without one nothing is saved.
    progress  show a bar on stderr
    callback  called after each step with its step, loss, lr and gradient_norm
    held_out  measures rows that are left out, before the first step too; what it finds is part of a step's metrics
    Raises InputError if a loss or a gradient is not finite, before it reaches the weights; `folder` saves the state.
    Ctrl-C, SIGTERM and SIGHUP end it after the step, whose state `folder` saves: KeyboardInterrupt or Terminated.
    """
    rank, _ = rank_and_world()
    schedules = scheduled(optimizers, steps, warm_up)
    steppers: list[Any] = [*optimizers, *schedules]
    with_state = [*steppers, held_out] if held_out else steppers
    first = folder.resume(with_state) if folder else 0
    if rank > 0:
        held_out = None  # rank 0 measures for all
    if held_out is not None and first == 0:
        report_start(folder, held_out, progress)
    ending = Ending(quiet=rank > 0) if folder else None
    losses: list[float] = []
    with (
        tqdm(
            range(first, steps), name, steps, initial=first, unit="step", disable=not progress
        ) as bar,
        ending or nullcontext(),
    ):
        for step in bar:
            with folder.counting() if folder else nullcontext():
                loss, norm = set_gradients(loss_at, step, parts, optimizers, clip)
            check_finite_step(step, loss, norm, folder)
            lr = float(schedules[0].get_last_lr()[0])
            for stepper in steppers:
                stepper.step()
            losses.append(loss)
            metrics = {"step": step + 1, "loss": loss, "lr": lr, "gradient_norm": norm}
            shown = report_step(metrics, folder, held_out, callback, progress)
            # Before the bar is shown: a terminal that was closed can show none
            if folder and ending:
                leave_if_asked(folder, ending, step + 1, optimizers)
            bar.set_postfix(shown)
    return losses


def report_start(folder: TrainingFolder | None, held_out: HeldOut, progress: bool) -> None:
    """Measure the rows that are held out before the first step; a folder keeps what is found."""
    found = measured(held_out, 0, progress)
    if folder:
        folder.write_metrics({"step": 0, **found})
        folder.started = time.perf_counter()


def report_step(
    metrics: dict[str, Any],
    folder: TrainingFolder | None,
    held_out: HeldOut | None,
    callback: Callable[[dict[str, Any]], object],
    progress: bool,
) -> dict[str, str]:
    """Measure what is due after a step, keep its metrics in the folder and call back; returns what the bar shows."""
    step = metrics["step"]
    shown = {"loss": f"{metrics['loss']:.4f}"}
    pace = folder.pace() if folder else {}  # without the time of what is measured
    found = {}
    if held_out is not None and held_out.is_due(step):
        found = measured(held_out, step, progress)
    if folder:
        shown["tokens/s"] = f"{pace['tokens_per_second']:.0f}"
        folder.record_step(metrics | pace | found)
    callback(metrics | found)
    return shown


def measured(held_out: HeldOut, step: int, progress: bool) -> dict[str, float]:
    """What is measured after `step` steps, under its names in metrics; with `progress` it is said on stderr."""
    means = held_out.measure()
    if progress:
        found = ", ".join(f"{mean:.4f} {value}" for value, mean in means.items())
        tqdm.write(f"step {step}: held-out loss {found}", file=sys.stderr)
    return {f"held_out_{value}": mean for value, mean in means.items()}


def check_finite_step(step: int, loss: float, norm: float, folder: TrainingFolder | None) -> None:
    """InputError if the loss or the norm of the gradient is not finite; a folder keeps what was learned before."""
    if math.isfinite(loss + norm):
        return
    found = f"at step {step + 1} the loss is {loss}, its gradient norm {norm}"
    if folder:
        folder.save(step)
        raise InputError(
            f"{found}. The links before it are kept in the folder: start from them with a lower --lr and another "
            "--out, at step 1 with --dtype float32"
        )
    raise InputError(
        f"{found}. What was learned before it is lost, since there is no folder to keep it. Train again with a lower "
        "lr. If it was step 1, load the agents in float32. With `out` the links of the last step are kept"
    )


def scheduled(
    optimizers: Sequence[torch.optim.Optimizer], steps: int, warm_up: int
) -> list[torch.optim.lr_scheduler.LambdaLR]:
    """The schedule of each optimizer's learning rate."""

    def rate(step: int) -> float:
        rise = (step + 1) / warm_up
        cosine = 0.5 * (1 + math.cos(math.pi * step / max(1, steps)))
        return min(rise, cosine)

    return [torch.optim.lr_scheduler.LambdaLR(optimizer, rate) for optimizer in optimizers]


def set_gradients(
    loss_at: Callable[[int, int], torch.Tensor],
    step: int,
    parts: int,
    optimizers: Sequence[torch.optim.Optimizer],
    clip: float,
) -> tuple[float, float]:
    """Put the gradients of a step in place, clipped to the norm `clip`; returns its loss and their norm before.

    Both are averaged over the parts and over all processes. A parameter without a gradient has none in any process.
    """
    for optimizer in optimizers:
        optimizer.zero_grad()
    total = torch.zeros(())
    for part in range(parts):
        loss = loss_at(step, part) / parts
        if not loss.requires_grad:
            raise InputError(
                "nothing that a link sends reaches the last agent: give more --rounds, or an edge to it"
            )
        loss.backward()
        total = total.to(loss.device) + loss.detach()
    parameters = parameters_of(optimizers)
    _, world = rank_and_world()
    if world > 1:
        gradients = [p.grad for p in parameters if p.grad is not None]
        for value in (total, *gradients):
            torch.distributed.all_reduce(value)
            value /= world
    norm = torch.nn.utils.clip_grad_norm_(parameters, clip)
    return total.item(), norm.item()


def parameters_of(optimizers: Sequence[torch.optim.Optimizer]) -> list[torch.Tensor]:
    """All that is trained."""
    parameters = []
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            parameters += group["params"]
    return parameters


# The end before the last step

SIGNALS = [
    getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)
]
# Seconds in which a further signal is taken for the first one: `timeout` sends SIGTERM to its command and then to the
# whole group of processes, systemd sends SIGHUP after SIGTERM, and torchrun forwards what its processes have already.
ECHO_ALONE = 0.1
ECHO_IN_GROUP = 5.0


class Ending:
    """Notes the first Ctrl-C, SIGTERM or SIGHUP, so that a step can be ended and saved; a second one ends all at once.

    quiet   do not say so
    Signals that are ignored, as in the background of a shell or under nohup, go on being ignored.
    """

    def __init__(self, quiet: bool = False) -> None:
        self.quiet = quiet
        self.number = 0  # of the signal, 0 for none
        self.noted = 0.0  # when it came
        self.before: dict[int, Any] = {}  # signal: its handler outside

    def __enter__(self) -> "Ending":
        if threading.current_thread() is threading.main_thread():  # only there handlers can be set
            for number in SIGNALS:
                handler = signal.getsignal(number)
                if handler not in (signal.SIG_IGN, None):
                    self.before[number] = handler
                    signal.signal(number, self.note)
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.restore()
        if self.number and kind is None:  # it came after the last step
            signal.raise_signal(self.number)

    def restore(self) -> None:
        """Put the handlers back that were there before."""
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def note(self, number: int, frame: FrameType | None) -> None:
        """The handler of all signals."""
        if not self.number:
            self.number = number
            self.noted = time.monotonic()
            if not self.quiet:
                # The terminal may be closed, or being written to.
                with suppress(OSError, RuntimeError):
                    warn(
                        "ending after this step, --resume will go on; a second signal or Ctrl-C ends at once"
                    )
        elif not self.is_echo(number):
            self.restore()
            signal.raise_signal(number)

    def is_echo(self, number: int) -> bool:
        """Whether a further signal means no more than the first. A second Ctrl-C always does, from a single process."""
        seconds = time.monotonic() - self.noted
        _, world = rank_and_world()
        if world > 1:
            return seconds < ECHO_IN_GROUP
        return number != signal.SIGINT and seconds < ECHO_ALONE

    def agreed(self, optimizers: Sequence[torch.optim.Optimizer]) -> int:
        """The signal that this process or another of its group has noted: all of them end after the same step."""
        _, world = rank_and_world()
        if world == 1:
            return self.number
        device = optimizers[0].param_groups[0]["params"][0].device
        number = torch.tensor(self.number, device=device)
        torch.distributed.all_reduce(number, torch.distributed.ReduceOp.MAX)
        return int(number.item())


def leave_if_asked(
    folder: TrainingFolder, ending: Ending, step: int, optimizers: Sequence[torch.optim.Optimizer]
) -> None:
    """Save the state after `step` steps and leave, if a signal was noted.

    Also after the last step: the next training of a system must not begin.
    """
    number = ending.agreed(optimizers)
    if not number:
        return
    folder.save(step)
    _, world = rank_and_world()
    if world > 1:
        torch.distributed.barrier()  # torchrun ends the others when one has left
    if number == signal.SIGINT:
        raise KeyboardInterrupt
    raise Terminated(number)
