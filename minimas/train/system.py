"""All links of a system, in one training after another; and the systems that trainings start from.

system = train_system("mine.json", "mine.jsonl", out="runs/mine")
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ..agent import load_agent
from ..common import InputError, check_known
from ..devices import Devices, devices_by_role, usable_dtype
from ..load import load_outer_links
from ..prompts import TASKS
from ..runs.lock import held
from ..runs.outputs import output_path
from ..runs.processes import rank_and_world
from ..styles import Origin, Style, style_named
from ..system import System
from .examples import TrainExample
from .folders import check_apart, check_new_or_resumed, check_out, locks_of, parts_of
from .held_out import without
from .links import (
    Callback,
    Examples,
    Training,
    check_objective,
    chosen_callback,
    examples_of,
    gradients,
    kept_rows,
    learn_inner_link,
    learn_outer_links,
    split_held_out,
    task_of_links,
)
from .losses import Objective
from .settings import CompletedTrainSettings, TrainSettings, chosen_settings

Sources = Mapping[str, str | Path]  # {role, or "links": folder or hub id}


def train_system(
    style: str | Path | Style,
    examples: Examples,
    settings: TrainSettings | None = None,
    *,
    out: str | Path,
    resume: bool = False,
    checkpoints: dict[str, str | Path] | str | Path | None = None,
    device: Devices = None,
    dtype: str | torch.dtype | None = None,
    quantize: str | None = None,
    task: str | None = None,
    columns: Mapping[str, str] | None = None,
    limit: int | None = None,
    objective: Objective | None = None,
    progress: bool = True,
    callback: Callback | None = None,
) -> System:
    """Make all links of a style, the inner ones first, and return the System that has them.

    style        its name, its file, or a Style
    examples     the name of a data set, as for --data; rows; or TrainExamples, see train_inner
    settings     TrainSettings: without steps and inner_steps all links are ridge regressions
    out          the folder to write, with one for each agent, and `links`
    resume       go on where a training in that folder was broken off
    checkpoints, device, dtype, quantize, task   of the agents, as in load_mas_system; they may be base models
    columns, limit   of the data, as in load_examples
    objective    of the outer links, see train_outer
    callback     called after each step of each training, see train_inner

    The System is as load_mas_system(style, checkpoints=out) loads it. For a style of one agent it is as
    checkpoints={role: out/role, "links": out/links} loads it, because one folder stands for that agent itself.
    So its records can be written to a file, but not if the style is a Style object.
    Raises InputError on what cannot be used.
    """
    rank, _ = rank_and_world()
    chosen = chosen_callback(callback)
    known_style = style if isinstance(style, Style) else style_named(style)
    task = task or known_style.task
    check_known("task", [task], TASKS)
    inner_settings, outer_settings = settings_of_parts(chosen_settings(settings), known_style)
    check_objective(objective, outer_settings)
    rows = kept_rows(examples)
    out_path = output_path(out)
    check_out(out_path)
    sources = known_style.sources(checkpoints, known_style.order)
    check_apart(out_path, sources)
    parts = parts_of(out_path, known_style)
    made = {role: parts[role] for role in known_style.order}
    shared: dict[str, Any] = dict(resume=resume, progress=progress, callback=chosen, known={})
    options: dict[str, Any] = dict(device=device, dtype=dtype, quantize=quantize)

    def examples_for(
        what: str, role: str | None, own: CompletedTrainSettings
    ) -> list[TrainExample]:
        return examples_of(what, role, own, known_style, task, rows, columns, limit)

    def learn_inner(role: str, rows_held_out: list[TrainExample]) -> None:
        own = without(examples_for("inner", role, inner_settings), rows_held_out)
        if not own:
            raise InputError(
                f"--held-out leaves out every row that {role} could learn from: leave out fewer"
            )
        base = {role: sources[role]}
        system = load_to_train(known_style, base, task, new_link=True, **options)
        learn_inner_link(
            Training("inner", role, system, inner_settings, own, out=made[role], **shared)
        )

    with held(locks_of("system", out_path, known_style), rank), gradients():
        if rank == 0:
            name = task_of_links(known_style, task)
            check_new_or_resumed("system", out_path, known_style, name, resume)
        outer_rows = examples_for("outer", None, outer_settings)
        rows_to_learn, rows_held_out = split_held_out(outer_rows, outer_settings.held_out)
        for role in known_style.order:
            learn_inner(role, rows_held_out)
        system = load_to_train(known_style, made, task, **options)
        outer = Training(
            "outer",
            None,
            system,
            outer_settings,
            rows_to_learn,
            rows_held_out,
            out=parts["links"],
            **shared,
        )
        learn_outer_links(outer, objective)
        links = load_outer_links(parts["links"], task, known_style.edges, system.agents)
    system.outer_links.update(links)  # as the folder has them, rounded to bfloat16
    if not isinstance(style, Style):  # it has no name to load it by
        several = len(known_style.order) > 1  # of one agent, a folder stands for that agent
        system.origin = Origin(
            style, out_path if several else parts, device, dtype, quantize=quantize
        )
        system.trained = False  # since the links of that folder were loaded
    return system


def settings_of_parts(
    settings: TrainSettings, style: Style
) -> tuple[CompletedTrainSettings, CompletedTrainSettings]:
    """The settings of each inner link of a system, and those of its outer links."""
    whole = settings.completed("system", style)
    start = "random" if whole.inner_steps else "ridge"
    inner = settings.for_training("inner", steps=whole.inner_steps, init=start)
    outer = settings.for_training("outer", steps=whole.steps)
    return inner.completed("inner", style), outer.completed("outer", style)


def load_to_train(
    style: Style,
    sources: Sources,
    task: str,
    device: Devices = None,
    dtype: str | torch.dtype | None = None,
    new_link: bool = False,
    quantize: str | None = None,
) -> System:
    """A System of plain agents, only of those in `sources`, with outer links if these are among them.

    new_link   give agents a new inner link each: their folders may be those of base models
    """
    devices = devices_by_role(style.order, device)
    agents = {}
    for role in style.order:
        if role in sources:
            agents[role] = load_agent(
                sources[role],
                task,
                devices[role],
                usable_dtype(dtype, devices[role]),
                untrained=new_link,
                role=role,
                quantize=quantize,
            )
    system = System(style, agents, {}, task)
    if "links" in sources:
        system.outer_links |= load_outer_links(sources["links"], task, style.edges, agents)
    return system
