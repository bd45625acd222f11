"""One training, of an inner link or of all outer links: what it learns from, and what it saves.

links = train_outer(system, examples, TrainSettings(steps=200))
"""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TypeGuard

import torch
from torch import nn

from ..agent import Agent
from ..common import InputError, no_op, warn
from ..fast.prepare import is_fast
from ..link import FusedInnerLink, FusedOuterLink, InnerLink, OuterLink
from ..load import links_task
from ..prompts import Question
from ..quantize import named_weights
from ..runs.dependencies import BLOCKS, depends_on, digest, starts_of_blocks
from ..runs.lock import held
from ..runs.outputs import output_path
from ..runs.processes import rank_and_world, wait_for_all
from ..styles import Style
from ..system import System
from ..turn import Edge
from .examples import TrainExample, check_limit, load_examples
from .folders import (
    check_apart,
    check_new_or_resumed,
    check_out,
    files_of,
    inner_link_files,
    locks_of,
)
from .held_out import HeldOut, without
from .loop import TrainingFolder, adamw, batch_of, fit
from .losses import InnerLoss, Objective, OuterLoss, checkpoint_activations
from .ridge import (
    ReadReply,
    new_outer_links,
    read_replies,
    set_inner_link,
    set_outer_link,
    start_gain,
)
from .save import copy_agent, save_inner_link, save_outer_links
from .settings import (
    CompletedTrainSettings,
    TrainSettings,
    check_role,
    chosen_settings,
    roles_with_texts,
)

# Settings that may change on --resume
NO_EFFECT_ON_WEIGHTS = ("save_every", "keep_activations")

COMPARED = 1 << 20  # numbers of the largest weight that is compared whole on resume
COMPARED_BLOCK = COMPARED // BLOCKS  # numbers of each block of a larger one that are compared

# The folder, in that of outer links, of those with the lowest own loss of rows held out
BEST = "best"

Examples = str | Path | Iterable[TrainExample] | Iterable[Mapping[str, Any]]
Callback = Callable[[dict[str, Any]], object]
Known = dict[tuple[str, str], list[ReadReply]]  # what agents have read already, by role and texts


@dataclass
class Training:
    """One training.

    what           inner or outer
    role           whose inner link is trained; None for outer links
    examples       what is learned from
    rows_held_out  what is only measured
    out            the folder to write; None writes nothing
    resume         continue the training in that folder
    progress       show bars on stderr, in the first process of several
    known          what agents have read in earlier trainings
    """

    what: str
    role: str | None
    system: System
    settings: CompletedTrainSettings
    examples: list[TrainExample]
    rows_held_out: list[TrainExample] = field(default_factory=list)
    out: Path | None = None
    resume: bool = False
    progress: bool = True
    callback: Callback = no_op
    known: Known = field(default_factory=dict)

    def __post_init__(self) -> None:
        rank, _ = rank_and_world()
        self.progress = self.progress and rank == 0

    @property
    def task(self) -> str | None:
        """The task in the names of the links' files."""
        return task_of_links(self.system.style, self.system.task)

    def is_begun(self) -> bool:
        """Whether the folder holds a state of this training, from which it goes on."""
        if self.out is None:
            return False
        state_file, _ = files_of(self.out, self.task)
        return state_file.exists()


# From Python


def train_inner(
    system: System,
    role: str,
    examples: Examples,
    settings: TrainSettings | None = None,
    *,
    out: str | Path | None = None,
    resume: bool = False,
    progress: bool = True,
    callback: Callback | None = None,
) -> InnerLink:
    """Train the inner link of one agent of a System, and return it.

    examples  TrainExamples, as load_examples makes them; rows, which are dicts with a question and a text for each role
              under its name; or the name of a data set, as for --data. In a style with prompts of its own, `answer`
              stands in for a text that has no column (docs/training.md, "Data")
    settings  TrainSettings; None takes the defaults
    out       a folder to write: the agent's files, the link, and the state that a training resumes from; the same as
              the command writes. None writes nothing.
    resume    go on with the training in that folder
    progress  show a progress bar on stderr
    callback  called after each step with {"what", "role", "step", "loss", "lr", "gradient_norm"}; where rows are held
              out and measured, also with "held_out_own", "held_out_other" and "held_out_none". What is measured before
              the first step is in the folder and on stderr only

    The agent has the new link from the start of the training: if that is broken off, it keeps what was learned so far.
    With init="checkpoint" it is the link that it had, and else a new one. It learns in float32; its file is rounded to
    bfloat16. The agents stay as they are, and so does torch's random generator on the CPU. In a group of processes
    (torch.distributed) each adds batches of its own to every step.
    Raises InputError on what cannot be used, and if a loss is not finite. After any error the system has the links and
    weights of before.
    """
    check_system(system)
    check_role(role, system.style)
    training = new_training(
        "inner", role, system, examples, settings, out, resume, progress, callback
    )
    with output_held(training), system.lock, gradients():
        return learn_inner_link(training)


def train_outer(
    system: System,
    examples: Examples,
    settings: TrainSettings | None = None,
    *,
    out: str | Path | None = None,
    resume: bool = False,
    objective: Objective | None = None,
    progress: bool = True,
    callback: Callback | None = None,
) -> dict[Edge, OuterLink]:
    """Train all outer links of a System together, and return them by edge: {(source, target): OuterLink}.

    objective  objective(turns, states, tokens, examples) -> a tensor with one number, which is learned in place of the
               cross-entropy of the last agent's texts: see losses.py and docs/extending.md

    All else is as in train_inner: the system has the new links from the start of the training.
    """
    check_system(system)
    check_objective(objective, chosen_settings(settings))
    training = new_training(
        "outer", None, system, examples, settings, out, resume, progress, callback
    )
    check_best(training)
    rows_to_learn, rows_held_out = split_held_out(training.examples, training.settings.held_out)
    training.examples = rows_to_learn
    training.rows_held_out = rows_held_out
    with output_held(training), system.lock, gradients():
        return learn_outer_links(training, objective)


def new_training(
    what: str,
    role: str | None,
    system: System,
    examples: Examples,
    settings: TrainSettings | None,
    out: str | Path | None,
    resume: bool,
    progress: bool,
    callback: Callback | None,
) -> Training:
    """A Training of what a caller gave; InputError if it cannot be used."""
    chosen = chosen_callback(callback)
    completed = chosen_settings(settings).completed(what, system.style)
    check_trainable(system)
    if out is None and resume:
        raise InputError("resume is given, but no folder to resume from: give out, too")
    out_path = None if out is None else output_path(out)
    if out_path is not None:
        check_out(out_path)
        if what == "outer":
            check_apart(out_path, sources_of(system))
    known_examples = examples_of(what, role, completed, system.style, system.task, examples)
    return Training(
        what,
        role,
        system,
        completed,
        known_examples,
        out=out_path,
        resume=resume,
        progress=progress,
        callback=chosen,
    )


def sources_of(system: System) -> dict[str, str | Path]:
    """{role: where its agent was loaded from}, of those that were."""
    return {role: agent.source for role, agent in system.agents.items() if agent.source is not None}


@contextmanager
def output_held(training: Training) -> Iterator[None]:
    """Within, this process holds the folder of a training alone, if it has one."""
    if training.out is None:
        yield
        return
    style = training.system.style
    rank, _ = rank_and_world()
    with held(locks_of(training.what, training.out, style), rank):
        if rank == 0:  # others might see what it has begun to write
            check_new_or_resumed(training.what, training.out, style, training.task, training.resume)
        yield


# What is checked


def check_system(system: System) -> None:
    """InputError unless it is a System."""
    if not isinstance(system, System):
        raise InputError(
            f"system is {system!r:.80}, expected a System: load one with minimas.load_mas_system(style)"
        )


def check_trainable(system: System) -> None:
    """InputError if a system has no weights that can be trained on."""
    modules: list[nn.Module] = list(system.outer_links.values())
    for role, agent in system.agents.items():
        if agent.offload:
            raise InputError(
                f"the weights of {role} are offloaded, and training needs them on the device: load the system "
                "without offload"
            )
        modules += agent.model.modules()
        if agent.inner_link is not None:
            modules.append(agent.inner_link)
    fused = (FusedInnerLink, FusedOuterLink)
    if any(isinstance(module, fused) or is_fast(module) for module in modules):
        raise InputError(
            "the system is in its fast form, which cannot be trained: load it with fast=False"
        )


def task_of_links(style: Style, task: str) -> str | None:
    """The task in the names of the links' files, None for a style with one set of links."""
    return links_task(task) if style.links_by_task else None


def examples_of(
    what: str,
    role: str | None,
    settings: CompletedTrainSettings,
    style: Style,
    task: str,
    given: Examples,
    columns: Mapping[str, str] | None = None,
    limit: int | None = None,
) -> list[TrainExample]:
    """TrainExamples as they are, or read from data; InputError if one lacks what this training needs.

    columns, limit   as in load_examples; TrainExamples have no columns
    """
    roles = roles_with_texts(what, role, settings, style)
    check_limit(limit)
    rows = kept_rows(given)
    if are_examples(rows):
        examples = rows[:limit]
        for number, example in enumerate(examples, 1):
            check_example(example, number, roles)
        return examples
    rank, _ = rank_and_world()
    return load_examples(
        rows,
        style,
        roles,
        columns,
        task,
        limit,
        answer_first=what == "outer",
        warn=warn if rank == 0 else no_op,
    )


def kept_rows(given: Examples) -> str | Path | list[Any]:
    """What a caller gave, to be read more than once; InputError if it is neither rows nor the name of a data set."""
    if isinstance(given, (str, Path)):
        return given
    if not isinstance(given, Iterable):
        raise InputError(
            f"examples is {given!r:.80}, expected a list of rows or TrainExamples, or the name of a data set"
        )
    return list(given)


def are_examples(rows: str | Path | list[Any]) -> TypeGuard[list[TrainExample]]:
    """Whether rows, or the name of a data set, are TrainExamples already."""
    if isinstance(rows, (str, Path)) or not rows:
        return False
    return all(isinstance(row, TrainExample) for row in rows)


def chosen_callback(callback: Callback | None) -> Callback:
    """The callback that a caller gave, or one that does nothing for None; InputError if it is no function."""
    if callback is None:
        return no_op
    if not callable(callback):
        raise InputError(
            f"callback is {callback!r:.80}, expected a function of one dict: leave it out if nothing is to be called"
        )
    return callback


def check_example(example: TrainExample, number: int, roles: Sequence[str]) -> None:
    """InputError unless a TrainExample, the number-th, has a Question, and a tuple of texts for each of the roles."""
    if not isinstance(example.question, Question):
        raise InputError(
            f"example {number} has the question {example.question!r:.40}, expected a Question: give "
            "style.question(text), or rows as dicts"
        )
    if not isinstance(example.texts, Mapping):
        raise InputError(
            f"example {number} has the texts {example.texts!r:.40}, expected {{role: (text,)}}: give a dict"
        )
    for role in roles:
        texts = example.texts.get(role)
        if isinstance(texts, str):
            raise InputError(
                f"example {number} has the text {texts!r:.40} for {role}, expected a tuple of texts, one for each "
                "round: give (text,)"
            )
        if not texts:
            raise InputError(
                f"example {number} has no text for {role}, and this training needs those of {', '.join(roles)}: "
                "give them (load_examples reads those of all roles)"
            )


def check_objective(objective: Objective | None, settings: TrainSettings) -> None:
    """InputError if an objective is no function, or would take the place of what a setting asks for."""
    if objective is not None and not callable(objective):
        raise InputError(
            f"objective is {objective!r:.80}, expected a function of turns, states, tokens and examples"
        )
    if objective is not None and settings.supervise_all:
        raise InputError(
            "supervise_all is the weight of a cross-entropy that an objective takes the place of: leave one of them out"
        )


def check_best(training: Training) -> None:
    """InputError if the best links are to be kept, and there is no folder."""
    if training.settings.best and training.out is None:
        raise InputError("best keeps links in a folder: give out, too")


def split_held_out(
    examples: list[TrainExample], n: int
) -> tuple[list[TrainExample], list[TrainExample]]:
    """(rows to learn from, the last n rows, which are only measured).

    Rows that ask what one of the last n asks are neither; a warning says how many. InputError if none is left to learn
    from, or if the last n ask one question only.
    """
    if n == 0:
        return examples, []
    cut = len(examples) - n
    if cut <= 0:
        raise InputError(
            f"--held-out is {n}, and there are {len(examples)} rows: leave some to learn from"
        )
    rows_held_out = examples[cut:]
    rows_to_learn = without(examples[:cut], rows_held_out)
    if not rows_to_learn:
        raise InputError(
            f"--held-out is {n}, and the {cut} other rows ask the questions of these, so that none is left to learn "
            "from: give rows with other questions"
        )
    if len({example.question.text for example in rows_held_out}) == 1:
        raise InputError(
            f"--held-out is {n}, and the last {n} rows ask the same question, while each hears another one: leave out "
            "more, or give the rows in another order"
        )
    rank, _ = rank_and_world()
    dropped = cut - len(rows_to_learn)
    if dropped and rank == 0:
        warn(
            f"{dropped} of {cut} rows are not learned from because their question is among the {n} held out"
        )
    return rows_to_learn, rows_held_out


# The links


def learn_inner_link(training: Training) -> InnerLink:
    """Train the inner link that a Training names."""
    system = training.system
    settings = training.settings
    out = training.out
    role = training.role
    assert role is not None, "train_inner and train_system name it"
    agent = system.agents[role]
    if out is not None and agent.source is None:
        raise InputError(
            f"the agent of {role} was made in memory, so that its files are not known: leave out `out`, and save the "
            "link with minimas.train.save.save_inner_link"
        )
    with seeded(settings.seed), links_kept_on_error(system):
        if settings.init == "checkpoint":
            link = own_inner_link(agent, role)
        else:
            link = InnerLink(agent.model.config.hidden_size).to(agent.device)
        agent.inner_link = link
        if settings.init == "random":
            start_gain(link, agent)
        if settings.init == "ridge" and not training.is_begun():
            set_inner_link(agent, replies_of(training, role))
        turns = [example.turn(system.style, role) for example in training.examples]
        loss = InnerLoss(system, role, settings.mse, settings.max_length, settings.date)
        folder = None
        if out is not None and agent.source is not None:
            rank, _ = rank_and_world()
            if rank == 0:
                out.mkdir(parents=True, exist_ok=True)
                copy_agent(agent.source, system.task, out)
            save = partial(save_inner_link, out, system.style, training.task, link)
            folder = folder_of(training, loss, save, dependencies(training, {role: agent}, turns))
        learn(training, loss, turns, folder)
    return link


def own_inner_link(agent: Agent, role: str) -> InnerLink:
    """The inner link that an agent has, in float32."""
    link = agent.inner_link
    if link is None:
        raise InputError(
            f"the folder of {role} has no inner link to start from: leave out --init checkpoint"
        )
    assert isinstance(link, InnerLink), "check_trainable refuses others"
    return link.float()


def learn_outer_links(
    training: Training, objective: Objective | None = None
) -> dict[Edge, OuterLink]:
    """Train the outer links of a Training's system."""
    system = training.system
    style = system.style
    settings = training.settings
    out = training.out
    rows_to_learn = training.examples
    rows_held_out = training.rows_held_out
    with seeded(settings.seed), links_kept_on_error(system):
        links = start_outer_links(training)
        loss = OuterLoss(
            system,
            settings.of_the_recursion(style),
            teacher=settings.latents == "teacher",
            other_rounds=settings.supervise_all,
            longest=settings.max_length,
            objective=objective,
        )
        folder = None
        keep_best: Callable[[], None] = no_op
        if out is not None:
            out.mkdir(parents=True, exist_ok=True)
            save = partial(save_outer_links, out, style, training.task, links)
            used = rows_to_learn if objective else with_texts_used(training, rows_to_learn)
            depends = dependencies(training, system.agents, used, name_of(objective))
            if rows_held_out:
                depends["held_out_hash"] = digest(with_texts_used(training, rows_held_out))
            folder = folder_of(training, loss, save, depends)
            if settings.best:
                keep_best = partial(save_outer_links, out / BEST, style, training.task, links)
        held_out = None
        if rows_held_out:
            held_out = HeldOut(
                system,
                rows_held_out,
                settings.of_inference(style),
                settings.steps,
                settings.save_every,
                settings.batch_size,
                settings.max_length,
                keep_best,
            )
        learn(training, loss, rows_to_learn, folder, held_out)
    return links


def with_texts_used(training: Training, given: Sequence[TrainExample]) -> list[TrainExample]:
    """Examples without the texts that a training does not use: it may be resumed without them."""
    roles = roles_with_texts("outer", None, training.settings, training.system.style)
    examples = []
    for one in given:
        texts = {role: one.texts[role] for role in roles}
        examples.append(TrainExample(one.question, texts))
    return examples


def start_outer_links(training: Training) -> dict[Edge, OuterLink]:
    """Give a system the outer links that are to be trained, and return them; InputError if it lacks an inner link."""
    system = training.system
    style = system.style
    settings = training.settings
    links = outer_links_of(training)
    completed = System(style, system.agents, dict(links), system.task)
    completed.check_links(settings.of_the_recursion(style))
    system.outer_links.update(links)
    if settings.init == "ridge" and not training.is_begun():
        for edge in style.edges:
            set_outer_link(system, edge, replies_of(training, edge[0]))
    training.known.clear()  # what was read takes memory, and no step needs it
    return links


def outer_links_of(training: Training) -> dict[Edge, OuterLink]:
    """The outer links to train: the system's own in float32, or new ones."""
    system = training.system
    if training.settings.init == "checkpoint":
        own = {}
        for edge in system.style.edges:
            link = system.outer_links.get(edge)
            if link is None:
                raise InputError(
                    f"there is no outer link from {edge[0]} to {edge[1]} to start from: leave out --init checkpoint"
                )
            assert isinstance(link, OuterLink), "check_trainable refuses others"
            own[edge] = link.float()
        return own
    # New links take the random numbers after those of an inner link for each agent, as they did when the agents were
    # loaded under the same seed: the weights of a training at a seed stay what they were.
    for agent in system.agents.values():
        InnerLink(agent.model.config.hidden_size)
    return new_outer_links(system.style.edges, system.agents)


def replies_of(training: Training, role: str) -> list[ReadReply]:
    """What `role` reads in all its turns of the first examples; it is read once for all links, and kept in `known`."""
    settings = training.settings
    turns = []
    for one in training.examples[: settings.ridge_rows]:
        for r in range(1, len(one.texts[role]) + 1):
            turns.append(one.turn(training.system.style, role, r))
    key = role, digest(tuple(turns))
    if key not in training.known:
        training.known[key] = read_replies(
            training.system,
            role,
            turns,
            settings.max_length,
            settings.date,
            training.progress,
        )
    return training.known[key]


# Learning


def folder_of(
    training: Training,
    loss: InnerLoss | OuterLoss,
    save_links: Callable[[], None],
    depends: dict[str, Any],
) -> TrainingFolder:
    """The folder that keeps a training."""
    assert training.out is not None
    rank, _ = rank_and_world()
    return TrainingFolder(
        training.out,
        training.task,
        depends,
        training.system.agents,
        loss,
        save_links,
        training.settings.save_every,
        rank,
    )


def learn(
    training: Training,
    loss: InnerLoss | OuterLoss,
    rows: Sequence,
    folder: TrainingFolder | None = None,
    held_out: HeldOut | None = None,
) -> None:
    """Take the steps of a training on rows, and leave the system as it was but for its links."""
    settings = training.settings
    training.system.trained = True
    rank, world = rank_and_world()

    def loss_at(step: int, part: int) -> torch.Tensor:
        number = (step * settings.accumulate + part) * world + rank
        return loss(batch_of(rows, settings.seed, number, settings.batch_size))

    def callback(metrics: dict[str, Any]) -> None:
        training.callback({"what": training.what, "role": training.role, **metrics})

    with ExitStack() as undo:
        undo.callback(loss.requires_grad_, False)
        if not settings.keep_activations:
            undo.callback(checkpoint_activations(training.system))
        fit(
            loss_at,
            [adamw(loss, settings.lr)],
            settings.steps,
            name=training.what,
            warm_up=settings.warm_up,
            clip=settings.clip,
            parts=settings.accumulate,
            folder=folder,
            progress=training.progress,
            callback=callback,
            held_out=held_out,
        )
        if folder and settings.steps == 0:
            folder.save(0)
    if world > 1:
        wait_for_all()  # until the files of rank 0 are there


@contextmanager
def links_kept_on_error(system: System) -> Iterator[None]:
    """After an error the system has the links and weights again that it had before.

    After Ctrl-C it keeps those that learned.
    """
    inner_links = {role: agent.inner_link for role, agent in system.agents.items()}
    outer_links = dict(system.outer_links)
    trained = system.trained
    weights = []
    for link in (*inner_links.values(), *outer_links.values()):
        for weight in link.parameters() if link is not None else ():
            weights.append((weight, weight.detach().clone(), weight.requires_grad))
    try:
        yield
    except Exception:
        for role, link in inner_links.items():
            system.agents[role].inner_link = link
        system.outer_links.clear()
        system.outer_links.update(outer_links)
        system.trained = trained
        for weight, before, requires_grad in weights:
            weight.data = before  # in its dtype, which training changes
            weight.grad = None
            weight.requires_grad_(requires_grad)
        raise


@contextmanager
def gradients() -> Iterator[None]:
    """Within, gradients are computed, also where the caller has turned them off."""
    with torch.inference_mode(False), torch.enable_grad():
        yield


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Within, torch's random numbers begin at a seed. The CPU's generator, which links take, is put back after it."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


# What weights depend on


def dependencies(
    training: Training, agents: Mapping[str, Agent], rows: Sequence, objective: str | None = None
) -> dict[str, Any]:
    """All that the weights depend on, as JSON values; agents are those that the training uses."""
    system = training.system
    _, world = rank_and_world()
    settings: dict[str, Any] = {
        "what": training.what,
        "role": training.role,
        "task": system.task,
        "objective": objective,
        "processes": world,
    }
    for name, value in vars(training.settings).items():
        if name not in NO_EFFECT_ON_WEIGHTS:
            settings[name] = value
    settings["dtypes"] = {
        role: str(agent.model.norm.weight.dtype) for role, agent in agents.items()
    }
    settings["quantize"] = {role: agent.quantize for role, agent in agents.items()}
    modules: list[nn.Module | None] = []
    sources = []
    for agent in agents.values():
        if agent.source is None:
            modules.append(agent.model)
        else:
            sources.append(agent.source)
        if training.what == "outer":
            modules.append(agent.inner_link)  # it may have been trained since it was loaded
    settings["weights_hash"] = hash_of_weights(modules)
    written = []
    if training.what == "inner" and training.out is not None:  # that folder may be the agent's own
        written = inner_link_files(training.out)
    return depends_on(system.style, sources, rows, settings, written)


def hash_of_weights(modules: Sequence[nn.Module | None]) -> str:
    """A hash of the weights of modules: their names, shapes and numbers, of a large one those of `numbers_compared`."""
    seen = hashlib.sha256()
    for module in modules:
        for name, tensor in named_weights(module) if module is not None else ():
            numbers = numbers_compared(tensor.detach().flatten()).cpu().contiguous()
            seen.update(f"{name} {tuple(tensor.shape)} ".encode())
            seen.update(numbers.view(torch.uint8).numpy().tobytes())
    return seen.hexdigest()[:16]


def numbers_compared(flat: torch.Tensor) -> torch.Tensor:
    """All numbers of a weight (N,) up to 2^20; of a larger one 4,096 blocks of 256, as `starts_of_blocks` spreads them.

    Blocks, because single numbers at a regular distance can all lie in a few columns: of a weight of 4096 x 4096 in
    every sixteenth one.
    """
    if len(flat) <= COMPARED:
        return flat
    starts = torch.tensor(starts_of_blocks(len(flat), COMPARED_BLOCK), device=flat.device)
    places = starts[:, None] + torch.arange(COMPARED_BLOCK, device=flat.device)  # (4096, 256)
    return flat[places.flatten()]


def name_of(objective: Objective | None) -> str | None:
    """What a resumed training knows of an objective: its name, not what it computes."""
    if objective is None:
        return None
    return getattr(objective, "__qualname__", type(objective).__qualname__)
