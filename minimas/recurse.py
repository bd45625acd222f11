"""The recursion: agents think in latents, pass them on, and loop; only the last one, in the last round, writes text.

    python -m minimas.recurse --prompt "7 +5 *3 -4 +8 *7 -1 +6"

Read `recurse` first: it is all of RecursiveMAS (arXiv 2604.25917), one loop over a table of styles. What it calls is in
agent.py; `System.run` puts batches, settings and the second try for an answer around it.

Letters: B questions in a batch, T prompt tokens, D an agent's width, m latent steps.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from tqdm import tqdm

from . import InputError
from .agent import load_agent, no_reply, silent
from .answers import extract
from .link import fused
from .load import DTYPES, load_outer_links
from .prompts import TASKS, Question, Slot, answer_retry, prompt, render
from .sample import seeds
from .tiny.task import with_labels
from .tokenizer import DATE
from .tools import TOOLS, ToolCalls


@dataclass(frozen=True)
class Style:
    """Who speaks in which order, who hears whom through which link, and the values of settings that a run leaves open."""
    order: tuple[str, ...]
    edges: dict[tuple[str, str], str]  # (source, target) -> the link's key in outerlink_config.json
    checkpoints: dict[str, str | Path]  # role, or "links" -> folder or hub id
    prompts: str  # which part of prompts.json
    read: Callable[[str], str] = str  # the question as typed -> as the agents see it
    latent_steps: int = 32
    max_new_tokens: int = 2000
    temperature: float = 0.6
    calls_tools: bool = False  # the last agent may write tool calls into its answer
    links_by_task: bool = False  # its links come in a set for code and one for the rest


def released(links, **agents):
    """Hub ids of a released style, from the names of its repositories."""
    return {role: f"RecursiveMAS/{name}" for role, name in (agents | {"links": links}).items()}


SHIPPED = Path(__file__).parent / "tiny"
PLANNED = {("planner", "critic"): "outer_12", ("critic", "solver"): "outer_23", ("solver", "planner"): "outer_31"}
STYLES = {
    "tiny": Style(
        order=("planner", "critic", "solver"), edges=PLANNED, prompts="tiny", read=with_labels,
        latent_steps=5, max_new_tokens=8, temperature=0.0,
        checkpoints={name: SHIPPED / name for name in ("planner", "critic", "solver", "links")}),
    "sequential_light": Style(
        order=("planner", "critic", "solver"), edges=PLANNED, prompts="sequential", links_by_task=True,
        checkpoints=released("Sequential-Light-Outerlinks", planner="Sequential-Light-Planner-Qwen3-1.7B",
                             critic="Sequential-Light-Critic-Llama3.2-1B", solver="Sequential-Light-Solver-Qwen2.5-Math-1.5B")),
    "sequential_scaled": Style(
        order=("planner", "critic", "solver"), edges=PLANNED, prompts="sequential", links_by_task=True,
        checkpoints=released("Sequential-Scaled-Outerlinks", planner="Sequential-Scaled-Planner-Gemma3-4B",
                             critic="Sequential-Scaled-Critic-Llama3.2-3B", solver="Sequential-Scaled-Solver-Qwen3.5-4B")),
    "mixture": Style(
        order=("math", "code", "science", "summarizer"), prompts="mixture",
        edges={("math", "summarizer"): "outer_1s", ("code", "summarizer"): "outer_2s", ("science", "summarizer"): "outer_3s",
               ("summarizer", "math"): "outer_s1", ("summarizer", "code"): "outer_s2", ("summarizer", "science"): "outer_s3"},
        checkpoints=released("Mixture-Outerlinks", math="Mixture-Math-DeepSeek-R1-Distill-Qwen-1.5B",
                             code="Mixture-Code-Qwen2.5-Coder-3B", science="Mixture-Science-BioMistral-7B",
                             summarizer="Mixture-Summarizer-Qwen3.5-2B")),
    "distillation": Style(
        order=("expert", "learner"), prompts="distillation", links_by_task=True,
        edges={("expert", "learner"): "outer_el", ("learner", "expert"): "outer_le"},
        checkpoints=released("Distillation-Outerlinks", expert="Distillation-Expert-Qwen3.5-9B",
                             learner="Distillation-Learner-Qwen3.5-4B")),
    "deliberation": Style(
        order=("reflector", "toolcaller"), prompts="deliberation", calls_tools=True,
        edges={("reflector", "toolcaller"): "outer_rt", ("toolcaller", "reflector"): "outer_tr"},
        checkpoints=released("Deliberation-Outerlinks", reflector="Deliberation-Reflector-Qwen3.5-4B",
                             toolcaller="Deliberation-Toolcaller-Qwen3.5-4B")),
}


@dataclass(frozen=True)
class Settings:
    """How a run goes. None stands for the style's own value (for top_k: that of the agent's generation_config.json)."""
    rounds: int = 3
    latent_steps: int | None = None
    max_new_tokens: int | None = None
    temperature: float | None = None
    top_p: float = 0.95
    top_k: int | None = None
    seed: int = 42
    rollouts: int = 1  # texts per question, sampled from one prefill
    batch_size: int = 8
    retry: bool = True
    channel: str = "latent"
    tools: tuple[str, ...] = ()
    date: str = DATE

    def completed(self, style):
        """The same with the style's values filled in; InputError names a setting that is out of range."""
        own = ("latent_steps", "max_new_tokens", "temperature")
        settings = replace(self, **{name: getattr(style, name) for name in own if getattr(self, name) is None})
        for name, least in {"rounds": 1, "latent_steps": 0, "max_new_tokens": 1, "top_k": 0, "batch_size": 1, "rollouts": 1}.items():
            value = getattr(settings, name)
            if value is not None and not (isinstance(value, int) and value >= least):
                raise InputError(f"{name} is {value}, expected a whole number from {least} up")
        if not 0 <= settings.temperature < float("inf"):
            raise InputError(f"temperature is {settings.temperature}, expected a number from 0 up")
        if not 0 < settings.top_p <= 1:
            raise InputError(f"top_p is {settings.top_p}, expected more than 0 and at most 1")
        if settings.channel not in ("latent", "text"):
            raise InputError(f"channel is {settings.channel!r}, expected latent or text")
        if unknown := set(settings.tools) - set(TOOLS):
            raise InputError(f"tools has {min(unknown)!r}, expected {' or '.join(TOOLS)}")
        if settings.tools and not style.calls_tools:
            raise InputError("tools are given, but no agent of this style calls any: leave them out, or use style deliberation")
        return settings


def recurse(system, questions, settings, hear=silent, tick=silent, think=None):
    """Let the agents of a system think over B questions until it is the last one's turn to answer; returns its prompts.

    A prompt is a list of pieces, text or latents (m, D), no slot left open. hear(round, edge, messages, tokens) is told what
    passes an edge: latents (B, m, D of the target), or B texts on the text channel; and how many tokens each cost to decode.
    tick() is called for every position generated. think(round, role, prompts) takes the place of Agent.think in training:
    it gives hidden states (B, m, D), or B of unlike lengths, (m_b, D) each.
    """
    style, inbox = system.style, {}
    system.forget()
    for r in range(1, settings.rounds + 1):
        for role in style.order:
            agent, prompts = system.agents[role], system.prompts(role, questions, inbox, settings.date)
            if (r, role) == (settings.rounds, style.order[-1]):
                system.forget()
                return prompts
            with agent.at_work():
                if settings.channel == "latent":
                    H = think(r, role, prompts) if think else agent.think(prompts, settings.latent_steps, tick)  # (B, m, D)
                    Z, tokens = through(agent.inner_link, H), [0] * len(questions)
                    sent = {edge: through(link, Z) for edge, link in system.outer_links.items() if edge[0] == role}
                else:
                    ids = agent.decode(*agent.embed(prompts), seeds(questions, settings.seed, r, role), settings, tick)
                    texts, tokens = [agent.tokenizer.decode(row) for row in ids], [len(row) for row in ids]
                    sent = {edge: texts for edge in style.edges if edge[0] == role}
            for edge, messages in sent.items():
                hear(r, edge, messages, tokens)
            inbox |= sent


def through(link, latents):
    """A link applied to latents (B, m, D), or to B of unlike lengths at once."""
    return link(latents) if torch.is_tensor(latents) else link(torch.cat(latents)).split([len(own) for own in latents])


@dataclass
class Result:
    """What a system made of one question. `answer` is None where the text holds none in the form the task asks for."""
    question: str
    text: str
    answer: str | None
    token_ids: list[int]  # of the text: what the last agent generated, its second try and what tools replied to it included
    new_tokens: int  # how many of them it generated
    seconds: float  # the text's share of its batch's wall time
    heard_tokens: int  # that the other agents decoded for the question: none, but on the text channel
    latents: dict = field(default_factory=dict)  # (round, source, target) -> (m, D of target), or its text
    states: dict = field(default_factory=dict)  # (round, role) -> (m, D): what an agent collected while it thought
    stages: dict = field(default_factory=dict)  # (round, role) -> seconds from its batch's start to its end, its prompt


class System:
    """Agents by role and the outer links between them, {(source, target): OuterLink}; `task` is math, choice or code."""

    def __init__(self, style, agents, outer_links, task="math"):
        self.style, self.agents, self.outer_links, self.task = style, agents, outer_links, task

    def forget(self):
        """Let agents go of the prompts that they keep from round to round."""
        for agent in self.agents.values():
            agent.forget()

    def read(self, questions, fn_names=None, dataset=None):
        """Texts as typed -> Questions; InputError names one that cannot be read."""
        if isinstance(questions, str):
            raise InputError("questions is one text: give a list of them")
        if any(not question.strip() for question in questions):
            raise InputError("a question is empty: type something to be answered")
        if fn_names is not None and len(fn_names) != len(questions):
            raise InputError(f"{len(fn_names)} fn_names for {len(questions)} questions: give one for each")
        for text in questions:
            self.style.read(text)  # only to refuse now what could not be read later
        return [Question(*pair, dataset) for pair in zip(questions, fn_names or [""] * len(questions))]

    def prompts(self, role, questions, inbox, date=DATE):
        """Prompts of `role` for B questions, each slot filled with what inbox[source, role] holds for the question."""
        heard, tokenizer, prompts = any(target == role for _, target in inbox), self.agents[role].tokenizer, []
        for b, question in enumerate(questions):
            question = replace(question, text=self.style.read(question.text))
            pieces = render(tokenizer, *prompt(self.style.prompts, role, question, question.task or self.task, heard), date)
            prompts.append([inbox[p.role, role][b] if isinstance(p, Slot) else p for p in pieces])
        return prompts

    def run(self, questions, **options):
        """One Result per question, in their order (with rollouts=k: k, one after another). Options: the fields of Settings, and

        keep_latents=False  put what passed each edge into Result.latents
        keep_states=False   put what each agent thought into Result.states, when and after which prompt into Result.stages
        fn_names=None       task code: a name per question, None for a function without a name, "" for a whole program
        dataset=None        name of the data set the questions are from: gpqa has a prompt of its own
        progress=False      show a bar on stderr
        A question's random numbers come from its text and the seed: asked twice, it is answered alike twice.
        Raises InputError on a question or an option that cannot be used, before anything is computed.
        """
        return list(self.stream(questions, **options))

    @torch.no_grad()
    def stream(self, questions, *, keep_latents=False, keep_states=False, fn_names=None, dataset=None, progress=False, **options):
        """As run, but yields the results of a batch as soon as it is done."""
        settings = Settings(**options).completed(self.style)
        questions = self.read(questions, fn_names, dataset)
        batches = [questions[i:i + settings.batch_size] for i in range(0, len(questions), settings.batch_size)]
        per_batch = (settings.rounds * len(self.style.order) - 1) * settings.latent_steps + settings.max_new_tokens
        with tqdm(total=len(batches) * per_batch, unit="token", leave=False, disable=not progress) as bar:
            for i, batch in enumerate(batches):
                yield from self.answer(batch, settings, keep_latents, keep_states, bar.update)
                bar.update((i + 1) * per_batch - bar.n)  # texts that ended early

    def answer(self, questions, settings, keep_latents=False, keep_states=False, tick=silent):
        """One batch, from questions to Results, settings.rollouts for each."""
        started, (latents, heard, states, stages) = time.perf_counter(), ([{} for _ in questions] for _ in range(4))

        def keep(r, edge, messages, tokens):
            for b, message in enumerate(messages):
                heard[b][r, edge[0]] = tokens[b]  # once for an agent, however many hear it
                if keep_latents:
                    latents[b][r, *edge] = message.clone() if torch.is_tensor(message) else message

        def think(r, role, prompts):
            H = self.agents[role].think(prompts, settings.latent_steps, tick)
            for own, h in zip(states, H):
                own[r, role] = h
            done(r, role, prompts)
            return H

        def done(r, role, prompts):
            if self.agents[role].device.type == "cuda":
                torch.cuda.synchronize(self.agents[role].device)  # the work is done then, not only launched
            for own, pieces in zip(stages, prompts):
                own[r, role] = time.perf_counter() - started, pieces

        prompts = recurse(self, questions, settings, keep, tick, think if keep_states else None)
        agent, k = self.agents[self.style.order[-1]], settings.rollouts
        text_seeds = seeds(questions, settings.seed, rollouts=k)
        asked = [question for question in questions for _ in range(k)]
        calls = ToolCalls(agent.tokenizer, settings.tools, len(asked)) if self.style.calls_tools else None
        with agent.at_work():
            ids = agent.decode(*agent.embed(prompts), text_seeds, settings, tick, calls.reply if calls else no_reply)
            new_tokens = [len(row) - (calls.inserted[b] if calls else 0) for b, row in enumerate(ids)]
            texts = [agent.tokenizer.decode(row) for row in ids]
            if settings.retry:
                self.retry(agent, texts, ids, new_tokens, text_seeds, settings)
        if keep_states:
            done(settings.rounds, self.style.order[-1], prompts)
        seconds = (time.perf_counter() - started) / len(asked)
        return [Result(question.text, text, extract(text, self.task), row, new, seconds, sum(heard[i // k].values()), latents[i // k],
                       states[i // k], stages[i // k])
                for i, (question, text, row, new) in enumerate(zip(asked, texts, ids, new_tokens))]

    def retry(self, agent, texts, ids, new_tokens, text_seeds, settings):
        """Where a text holds no answer, ask for one at its end and let the agent go on for a few tokens; in place.

        text_seeds: the seeds of the texts; those of the second tries follow from them.
        """
        request = answer_retry(self.style.prompts, self.task)
        lost = [b for b, text in enumerate(texts) if extract(text, self.task) is None]
        if not request or not lost:
            return
        settings = replace(settings, max_new_tokens=256 if self.task == "code" else 16)
        asked = [f"{texts[b]}\n{request}" for b in lost]
        more = agent.decode(*agent.embed([[text] for text in asked], special=True), [~text_seeds[b] & (1 << 63) - 1 for b in lost], settings)
        for b, text, new in zip(lost, asked, more):
            texts[b] = (text + agent.tokenizer.decode(new, strip=False)).strip()
            ids[b], new_tokens[b] = ids[b] + new, new_tokens[b] + len(new)


def load_mas_system(style="tiny", *, checkpoints=None, device=None, dtype=None, task="math", offload=False, plain=False,
                    trust_remote_code=None):
    """Load the agents and links of a style.

    checkpoints  {role, or "links": folder or hub id}, over those of the style; or one folder that holds a folder for each,
                 named as the role or as the released repository
    device       where agents run: a torch device or its name, {role: device} or "planner=cuda:0,critic=cuda:1"; None takes
                 cuda where there is one
    dtype        of the agents: a torch dtype or its name; None takes float32 on a CPU, elsewhere what config.json names.
                 Links compute in the dtype of their files, or in that of their agent where it is wider.
    task         math, choice or code: which links are loaded and how agents are asked
    offload      keep weights in main memory, and on the device only those of the agent at work
    plain        leave out the fast path (fast.py): slower, the same results, and what training needs
    trust_remote_code  accepted for those who come from the released code, and ignored: nothing from a checkpoint is executed

    Raises InputError on an unknown style, role, task, device or dtype, and on a checkpoint that is not whole.
    """
    if style not in STYLES:
        raise InputError(f"style {style!r} is not known, expected one of {', '.join(STYLES)}")
    if task not in TASKS:
        raise InputError(f"task {task!r} is not known, expected one of {', '.join(TASKS)}")
    style = STYLES[style]
    where, devices = sources(style, checkpoints), devices_of(style, device)
    agents = {role: load_agent(where[role], task, devices[role], usable_dtype(dtype, devices[role]), offload, plain)
              for role in style.order}
    models = {role: agent.model for role, agent in agents.items()}
    links = load_outer_links(where["links"], task, style.edges, models, devices)
    return System(style, agents, links if plain else {edge: fused(link) for edge, link in links.items()}, task)


def sources(style, checkpoints, needed=None):
    """{role, or "links": folder or hub id} of a style, with what the user gave; a folder for all must hold what is `needed` (all)."""
    if checkpoints is None or isinstance(checkpoints, dict):
        if unknown := set(checkpoints or {}) - set(style.checkpoints):
            raise InputError(f"a checkpoint is given for {min(unknown)!r}, but this style has {', '.join(style.checkpoints)}")
        return style.checkpoints | (checkpoints or {})
    folder, found, needed = Path(checkpoints).expanduser(), {}, needed or [*style.checkpoints]
    for name in needed:
        places = [folder / name, folder / Path(style.checkpoints[name]).name]
        found[name] = next((place for place in places if place.is_dir()), None)
        if found[name] is None:
            raise InputError(f"{folder} holds no folder {places[0].name} or {places[1].name}: "
                             f"expected one each for {', '.join(needed)}")
    return found


def devices_of(style, device):
    """{role: torch.device}."""
    if isinstance(device, str) and "=" in device:
        device = dict(pair.partition("=")[::2] for pair in device.split(","))
    if not isinstance(device, dict):
        return dict.fromkeys(style.order, usable_device(device))
    if set(device) != set(style.order):
        raise InputError(f"device names {', '.join(device)}, expected each of {', '.join(style.order)}")
    return {role: usable_device(name) for role, name in device.items()}


def usable_device(name):
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.empty(0, device=device)
        if device.type == "meta":
            raise TypeError("it holds no data")
    except (RuntimeError, AssertionError, TypeError) as e:
        raise InputError(f"device {str(name)!r} cannot be used ({str(e).splitlines()[0]}): try cpu or cuda") from e
    return device


def usable_dtype(name, device):
    if name is None:
        return torch.float32 if device.type == "cpu" else None
    if str(name).removeprefix("torch.") not in DTYPES:
        raise InputError(f"dtype {str(name)!r} cannot be used, expected one of {', '.join(DTYPES)}")
    return DTYPES[str(name).removeprefix("torch.")]


if __name__ == "__main__":
    from .cli import command, main
    command(main)
