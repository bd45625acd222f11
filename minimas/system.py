"""A system: the agents of a style, and the links between them. It answers questions, batch by batch.

    system = load_mas_system("tiny")
    result, = system.run(["7 +5 *3 -4 +8"], rounds=3)

The recursion itself is in recurse.py, the text of the answer in writing.py, and what a run gives in result.py. Here is
what surrounds them: batches and prompts.

Notation: B questions in a batch, D an agent's width, m latent steps, k rollouts.
"""

import time
import warnings
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from .agent import Agent, Piece, Prompt, check_finite, load_agent
from .answers import extract
from .common import InputError, check_known, check_type, no_op
from .devices import devices_by_role, usable_dtype
from .exclusive import Exclusive
from .hear import Hearing, before_each, messages_of
from .link import FusedOuterLink, OuterLink, fused
from .load import load_outer_links
from .prompts import TASKS, Question, Slot, count_options, prompt, wrap
from .recurse import recurse
from .result import History, NewText, Result
from .settings import CompletedSettings, Settings
from .styles import Origin, Style, style_named
from .tokenizer import DATE
from .turn import Edge, Message, Turn
from .writing import Growth, Written, write_answers

Edit = Callable[[Turn, list[Question]], Any]  # see System.run


def always(question: int, rollout: int) -> bool:
    """Each text is wanted to its end."""
    return True


class System:
    """The agents of a Style by role, and the outer links between them; load_mas_system makes one.

    outer_links   {(source, target): OuterLink}
    task          math, choice or code: how agents are asked, and what counts as an answer
    origin        what it was loaded from, or what train_system wrote; None if that is not known
    trained       whether its links were trained since then, so that the files of its origin do not have them
    lock          held while a batch is answered or links are trained: agents keep what they read last
    Several threads may use it; it answers one batch at a time.
    """

    def __init__(
        self,
        style: Style,
        agents: dict[str, Agent],
        outer_links: dict[Edge, OuterLink | FusedOuterLink],
        task: str = "math",
        origin: Origin | None = None,
    ) -> None:
        self.style = style
        self.agents = agents
        self.outer_links = outer_links
        self.task = task
        self.origin = origin
        self.trained = False
        self.lock = Exclusive()

    def __getstate__(self) -> dict[str, Any]:
        """For copy.deepcopy and pickle: a lock stays behind, and so does what agents keep of the last question."""
        self.drop_prefixes()
        return {name: value for name, value in vars(self).items() if name != "lock"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self.lock = Exclusive()

    def __repr__(self) -> str:
        lines = [
            f"System(task {self.task}, {self.style.rounds} rounds of {' > '.join(self.style.order)}"
        ]
        for role, agent in self.agents.items():
            lines.append(f"  {role}: {agent.summary()}")
        for (source, target), outer_link in self.outer_links.items():
            lines.append(f"  {source} > {target}: {type(outer_link).__name__}")
        return "\n".join(lines) + ")"

    # Answering

    def run(
        self,
        questions: Sequence[str],
        settings: Settings | None = None,
        *,
        rounds: int | None = None,
        latent_steps: int | None = None,
        max_new_tokens: int | None = None,
        temperature: float | None = None,
        top_p: float | None = None,
        top_k: int | None = None,
        seed: int | None = None,
        rollouts: int | None = None,
        batch_size: int | None = None,
        retry: bool | None = None,
        channel: str | None = None,
        hear: str | None = None,
        tools: Sequence[str] | None = None,
        date: str | None = None,
        keep_latents: bool = False,
        keep_states: bool = False,
        fn_names: Sequence[str | None] | None = None,
        dataset: str | None = None,
        progress: bool = False,
        edit: Edit | None = None,
    ) -> list[Result]:
        """Answer a list of questions: their Results in order, one for each (with rollouts=k: k, one after another).

        settings       a Settings object; what follows up to `date` are its fields, and None leaves one as it is

        keep_latents   put what passed each edge into Result.latents
        keep_states    put what each agent thought into Result.states, when and on what prompt into timings, prompts
        fn_names       task code: for each question a name, None for a function without one, "" for a program
        dataset        name of the data set that the questions are from: gpqa has a prompt of its own
        progress       show a bar on stderr
        edit           edit(turn, questions) is called after each Turn with its Questions, and may change what others
                       hear, mute an edge, stop a question, or drop one, which then has no Result: see turn.py and
                       docs/extending.md. question.index is the question's place in the list

        Random numbers depend on a question's text and the seed only: asked twice, a question is answered alike twice.
        Raises InputError if a question or a setting cannot be used, before anything is computed.
        """
        if isinstance(tools, str):
            raise InputError(f"tools is {tools!r}, expected a list of names such as [{tools!r}]")
        if tools is not None and not isinstance(tools, Iterable):
            raise InputError(f"tools is {tools!r:.80}, expected a list of names")
        if edit is not None and not callable(edit):
            raise InputError(
                f"edit is {edit!r:.80}, expected a function of a turn and its questions"
            )
        check_type(
            "settings", settings, Settings | None, "a Settings object, as Settings(rounds=2)"
        )
        options: dict[str, Any] = dict(
            rounds=rounds,
            latent_steps=latent_steps,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_p=top_p,
            top_k=top_k,
            seed=seed,
            rollouts=rollouts,
            batch_size=batch_size,
            retry=retry,
            channel=channel,
            hear=hear,
            tools=None if tools is None else tuple(tools),
            date=date,
        )
        given = {name: value for name, value in options.items() if value is not None}
        settings = replace(settings or Settings(), **given).completed(self.style)
        asked = self.style.questions(questions, fn_names, dataset)
        named = [name for name in fn_names or () if name]
        if named and self.task != "code":
            raise InputError(
                f"fn_names has {named[0]!r:.80}, but the task is {self.task}, which asks for no function: "
                "leave it out, or load the system with task='code'"
            )
        return list(self.stream(asked, settings, keep_latents, keep_states, progress, edit))

    def stream(
        self,
        questions: Sequence[Question],
        settings: CompletedSettings,
        keep_latents: bool = False,
        keep_states: bool = False,
        progress: bool = False,
        edit: Edit | None = None,
    ) -> Generator[Result, None, None]:
        """Iterate over the Results of Questions under completed Settings, batch by batch. The options are those of run.

        InputError as in `write`, and if messages of other questions are to be heard and there is only one.
        """
        size = settings.batch_size
        starts = range(0, len(questions), size)
        before = before_each(questions, settings)
        per_batch = self.positions(settings)
        if before is not None:  # the questions before these are thought about, too
            per_batch += per_batch - settings.max_new_tokens
        total = len(starts) * per_batch
        with tqdm(total=total, unit="token", leave=False, disable=not progress) as bar:
            for n, i in enumerate(starts, 1):
                batch = questions[i : i + size]
                neighbours = before[i : i + size] if before is not None else None
                yield from self.answer(
                    batch,
                    settings,
                    keep_latents=keep_latents,
                    keep_states=keep_states,
                    callback=bar.update,
                    edit=edit,
                    before=neighbours,
                )
                bar.update(n * per_batch - bar.n)  # texts that ended early

    def positions(self, settings: CompletedSettings) -> int:
        """How many positions a batch generates at most, a retry aside."""
        is_latent = settings.channel == "latent"
        per_turn = settings.latent_steps if is_latent else settings.max_new_tokens
        turns = settings.rounds * len(self.style.order)
        return (turns - 1) * per_turn + settings.max_new_tokens

    def answer(
        self,
        questions: Sequence[Question],
        settings: CompletedSettings,
        keep_latents: bool = False,
        keep_states: bool = False,
        callback: Callable = no_op,
        edit: Edit | None = None,
        before: Sequence[Question] | None = None,
    ) -> list[Result]:
        """One batch of Questions -> its Results in order, k for each that no edit dropped. Settings must be completed.

        keep_latents, keep_states, edit   see `run`
        callback()   is called for every position that is generated
        before       for each question the one before it in its data set, whose messages it hears with hear="other"
        InputError as in `write`.
        """
        written = self.write(
            questions,
            settings,
            keep_latents=keep_latents,
            keep_states=keep_states,
            callback=callback,
            edit=edit,
            before=before,
            whole=True,
        )
        results = {}
        for piece in written:
            if piece.result is not None:
                results[piece.question, piece.rollout] = piece.result
        return [results[key] for key in sorted(results)]

    @torch.no_grad()
    def write(
        self,
        questions: Sequence[Question],
        settings: CompletedSettings,
        keep_latents: bool = False,
        keep_states: bool = False,
        callback: Callable = no_op,
        edit: Edit | None = None,
        before: Sequence[Question] | None = None,
        wanted: Callable[[int, int], bool] = always,
        whole: bool = False,
    ) -> Generator[NewText, None, None]:
        """Iterate over the texts of one batch of Questions while they are written. Settings must be completed.

        keep_latents, keep_states, edit   see `run`
        callback, before                  see `answer`
        wanted  wanted(question, rollout) is asked after each step of the writing: a text that is not wanted ends there
        whole   yield no text before it has ended, which spares decoding it after each step
        Whoever iterates holds the system: until the end, or `close`, no other thread is answered.
        Each piece may be taken by another thread. The thread that took the last one cannot use the system for anything
        else until the text has ended: that is an InputError. Other threads wait.
        InputError if a link is missing, if an edit cannot take effect, and if states or scores are not finite.
        """
        self.check_links(settings)
        if not questions:
            return
        with self.lock:
            others = messages_of(self, before, settings, callback) if before is not None else None
            hearing = Hearing(self.style, settings, others)
            started = time.perf_counter()
            histories = [History(keep_latents, keep_states) for _ in questions]
            results: list[Result] = []
            for turn in recurse(self, questions, settings, callback):
                own = [questions[b] for b in turn.rows]
                hearing.replace(turn, own)
                if edit is not None:
                    edit(turn, list(own))
                turn.check()  # before it is kept; `recurse` checks it only afterwards
                if turn.answers:
                    texts = write_answers(self, turn, own, settings, callback, wanted, whole)
                    for new in self.new_texts(turn, own, settings, histories, texts):
                        if new.result is not None:
                            results.append(new.result)
                        yield new
                if keep_states:
                    self.wait_for(turn.role)
                seconds = time.perf_counter() - started
                for i, b in enumerate(turn.rows):
                    histories[b].add(turn, i, seconds)
            share = (time.perf_counter() - started) / (len(questions) * settings.rollouts)
            for result in results:
                result.seconds = share

    def new_texts(
        self,
        turn: Turn,
        questions: Sequence[Question],
        settings: CompletedSettings,
        histories: Sequence[History],
        texts: Iterator[Growth],
    ) -> Iterator[NewText]:
        """What is written in the turn that answers, for `write`: the last piece of a text with its Result.

        questions, histories   those of the turn's rows, and those of the whole batch
        """
        for b in turn.rows:
            histories[b].forget(turn.round, turn.role)
        self.lock.shut = True  # what agents write into is in use
        try:
            for new in texts:
                i, rollout = divmod(new.number, settings.rollouts)
                b = turn.rows[i]
                result = None
                if new.written is not None:
                    result = self.result_of(new.written, questions[i], turn.round, histories[b])
                yield NewText(b, rollout, new.text, result)
                self.lock.pass_on()
        finally:
            self.lock.shut = False

    def wait_for(self, role: str) -> None:
        """Wait until the device of an agent has done its work, which is only launched otherwise."""
        device = self.agents[role].device
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    def result_of(
        self, written: Written, question: Question, rounds: int, history: History
    ) -> Result:
        """The Result of a text. It shares the dicts of its question's History, which the last turn is added to."""
        return Result(
            question.asked,
            written.text,
            self.answer_in(written.text, question),
            written.token_ids,
            written.new_tokens,
            seconds=0.0,
            heard_tokens=sum(history.decoded.values()),
            rounds=rounds,
            retried=written.retried,
            replaced=history.replaced,
            latents=history.latents,
            states=history.states,
            timings=history.timings,
            prompts=history.prompts,
            system=self,
        )

    def answer_in(self, text: str, question: Question) -> str | None:
        """The answer in a text that was written for a question; None if there is none in the expected form."""
        return extract(text, self.task, count_options(question.asked))

    # Prompts

    def prompts_for(
        self,
        role: str,
        questions: Sequence[Question],
        inbox: Mapping[Edge, Message],
        date: str = DATE,
    ) -> list[Prompt]:
        """Prompts of `role` for B questions, each slot filled with what inbox[source, role] holds for the question."""
        heard = [source for source, target in inbox if target == role]
        fed_back = any(self.style.is_feedback(source, role) for source in heard)
        tokenizer = self.agents[role].tokenizer
        prompts = []
        for b, question in enumerate(questions):
            task = question.task or self.task
            system_text, pieces = prompt(self.style.prompts, role, question, task, fed_back)
            if question.system and role == self.style.order[-1]:
                system_text = f"{system_text}\n\n{question.system}"
            wrapped = wrap(tokenizer, system_text, pieces, date)
            prompts.append([self.fill(piece, role, b, inbox) for piece in wrapped])
        return prompts

    def fill(self, piece: str | Slot, role: str, b: int, inbox: Mapping[Edge, Message]) -> Piece:
        """A piece of a prompt; a slot is replaced by what question b finds there, InputError if there is nothing."""
        if isinstance(piece, str):
            return piece
        edge = (piece.role, role)
        if edge not in inbox:
            raise InputError(
                f"the prompt of {role} has a slot for {piece.role}, who has sent it nothing: "
                "the style needs an edge between them"
            )
        return inbox[edge][b]

    def drop_prefixes(self) -> None:
        """Let agents go of the prompts that they keep from round to round."""
        for agent in self.agents.values():
            agent.drop_prefix()

    def check_links(self, settings: Settings) -> None:
        """InputError if latents are to be sent through links that are not there."""
        asked_once = settings.rounds == 1 and len(self.style.order) == 1
        if settings.channel == "text" or asked_once:
            return
        missing = []
        for role, agent in self.agents.items():
            if agent.inner_link is None:
                missing.append(("inner", f"of {role}"))
        for source, target in self.style.edges:
            if (source, target) not in self.outer_links:
                missing.append(("outer", f"from {source} to {target}"))
        if missing:
            kind, whose = missing[0]
            raise InputError(
                f"there is no {kind} link {whose}, which latents need: make it with "
                f"`python -m minimas.train {kind}` (docs/training.md), or take --channel text"
            )

    # Turns

    def think(
        self,
        settings: CompletedSettings,
        callback: Callable,
        r: int,
        role: str,
        prompts: list[Prompt],
    ) -> torch.Tensor:
        """The hidden states H (B, m, D) of `role` after B prompts; InputError if they are not finite."""
        agent = self.agents[role]
        with agent.at_work():
            H = agent.think(prompts, settings.latent_steps, callback)
        check_finite(H.isfinite().all(), f"the states of {role} in round {r}", agent.model)
        return H

    def silence(self, role: str, channel: str, B: int) -> dict[Edge, Message]:
        """What is heard along each edge from `role` if nothing is sent: no latents (B, 0, D), or empty texts."""
        heard: dict[Edge, Message] = {}
        for edge in self.style.edges_from(role):
            if channel == "text":
                heard[edge] = [""] * B
            else:
                weight = self.agents[edge[1]].model.norm.weight  # (D,) of the one who hears
                heard[edge] = weight.new_zeros(B, 0, len(weight))
        return heard


def load_mas_system(
    style: str | Path = "tiny",
    *,
    checkpoints: Mapping[str, str | Path] | str | Path | None = None,
    device: str | torch.device | Mapping[str, str] | None = None,
    dtype: str | torch.dtype | None = None,
    task: str | None = None,
    offload: bool = False,
    fast: bool = False,
    plain: bool | None = None,
    quantize: str | None = None,
    trust_remote_code: bool | None = None,
) -> System:
    """Load the agents and links of a style as a System.

    style        a name in STYLES, or a .json file of that form (docs/extending.md)
    checkpoints  {role, or "links": folder or hub id}, in place of the style's own; or one folder that holds a folder
                 for each, named as the role or as the released repository
    device       where agents run: a torch device or its name, {role: device} or "planner=cuda:0,critic=cuda:1"; None
                 takes cuda if there is one
    dtype        of the agents: a torch dtype or its name; None takes float32 on a CPU, elsewhere what config.json
                 names. Links compute in the dtype of their files, or in their agent's if that is wider.
    task         math, choice or code: which links are loaded and how agents are asked; None takes the style's
    offload      keep weights in main memory, and on the device only those of the agent at work; `fast` is not for them
    fast         the fast form (fast/): the same results in fewer and larger operations. Its modules are merged, so that
                 it takes no hooks on what is merged, and no training. By default modules are plain: every weight is
                 there under its name in the checkpoint, and every hook fires.
    plain        deprecated: plain=False is fast=True
    quantize     int8 or int4: keep the weights of the agents' linears in 8 or 4 bits (quantize.py), which takes less
                 memory and, in the fast form on a CPU, less time. None leaves them in `dtype`
    trust_remote_code  accepted from callers of the released code, and ignored: no Python from a checkpoint is executed

    Raises InputError on an unknown style, role, task, device, dtype or quantize, and on a checkpoint that is not whole.
    """
    if plain is not None:
        warnings.warn("plain= is deprecated: give fast=", DeprecationWarning, stacklevel=2)
        fast = not plain
    check_type("fast", fast, bool, "True or False")
    check_type("offload", offload, bool, "True or False")
    known_style = style_named(style)
    task = task or known_style.task
    check_known("task", [task], TASKS)
    in_fast_form = fast and not offload  # it needs weights that stay where they are
    sources = known_style.sources(checkpoints)
    devices = devices_by_role(known_style.order, device)
    agents = {}
    for role in known_style.order:
        agents[role] = load_agent(
            sources[role],
            task,
            devices[role],
            usable_dtype(dtype, devices[role]),
            offload,
            in_fast_form,
            role=role,
            quantize=quantize,
        )
    links = {}
    if "links" in sources:
        links = load_outer_links(sources["links"], task, known_style.edges, agents)
    outer_links: dict[Edge, OuterLink | FusedOuterLink] = {}
    for edge, link in links.items():
        outer_links[edge] = fused(link) if in_fast_form else link
    origin = Origin(style, checkpoints, device, dtype, offload, fast, quantize)
    return System(known_style, agents, outer_links, task, origin)
