"""The recursion: agents think in latents, pass them on, and loop; the last one of the last round writes the answer.

    python -m minimas.recurse --prompt "7 +5 *3 -4 +8 *7 -1 +6"

Read `recurse` first: it is all of RecursiveMAS (arXiv 2604.25917), one loop over a row of the table in styles.py,

    H_a = think(prompt_a)                 agent a's hidden states, after m latent steps (agent.py)
    Z_ab = R_out_ab(R_in_a(H_a))          what agent b hears from it, in b's own embedding space (link.py)

`System.run` puts batches, settings and the second try for an answer around it.

Letters: B questions in a batch, T prompt tokens, D an agent's width, m latent steps.
"""

import re
import time
from dataclasses import dataclass, field, replace
from numbers import Integral
from threading import RLock

import torch
from tqdm import tqdm

from . import InputError, check_known
from .agent import load_agent, silent
from .answers import extract
from .link import fused
from .load import load_outer_links, usable_dtype
from .prompts import TASKS, Question, Slot, answer_retry, prompt, wrap
from .sample import seeds
from .styles import STYLES, style_named
from .tokenizer import DATE
from .tools import TOOLS, ToolCalls

__all__ = ["STYLES", "Result", "Settings", "Stage", "System", "load_mas_system", "recurse"]  # what pydoc shows


@dataclass(frozen=True)
class Settings:
    """How a run goes. None stands for the style's own value.

    rounds          of recursion, 1 or more
    latent_steps    latents that an agent thinks in a turn (m), 0 or more
    max_new_tokens  limit on the tokens of a text
    temperature     0 always takes the likeliest token
    top_p           sample from the likeliest tokens that together reach this probability
    top_k           and from at most this many of them: 0 is no limit, None what the agent's generation_config.json says
    seed            with the question's text, of all random numbers
    rollouts        texts for each question, sampled from one prefill
    batch_size      questions that are answered together
    retry           ask once more if a text holds no answer
    channel         latent, or text: agents then decode and pass text, for comparison
    tools           python, search, or both: what an agent of a style that calls tools may call
    date            that Llama's chat template tells its agent
    """
    rounds: int = 3
    latent_steps: int | None = None
    max_new_tokens: int | None = None
    temperature: float | None = None
    top_p: float = 0.95
    top_k: int | None = None
    seed: int = 42
    rollouts: int = 1
    batch_size: int = 8
    retry: bool = True
    channel: str = "latent"
    tools: tuple[str, ...] = ()
    date: str = DATE

    def completed(self, style):
        """The same with the values of a Style filled in; InputError names a setting that is out of range."""
        defaults = ("latent_steps", "max_new_tokens", "temperature")
        settings = replace(self, **{name: getattr(style, name) for name in defaults if getattr(self, name) is None})
        lowest = {"rounds": 1, "latent_steps": 0, "max_new_tokens": 1, "top_k": 0, "batch_size": 1, "rollouts": 1}
        for name, least in lowest.items():
            value = getattr(settings, name)
            if (value is not None or name != "top_k") and not (isinstance(value, Integral) and value >= least):
                raise InputError(f"{name} is {value}, expected a whole number from {least} up")
        if not 0 <= settings.temperature < float("inf"):
            raise InputError(f"temperature is {settings.temperature}, expected a number from 0 up")
        if not 0 < settings.top_p <= 1:
            raise InputError(f"top_p is {settings.top_p}, expected more than 0 and at most 1")
        check_known("channel", [settings.channel], ("latent", "text"))
        check_known("tool", settings.tools, TOOLS)
        if settings.tools and not style.calls_tools:
            raise InputError("tools are given, but no agent of this style calls any: leave them out, "
                             "or use style deliberation")
        return settings


@dataclass
class Stage:
    """One agent's turn in one round, for B questions.

    prompts   what it reads: for each question a list of pieces, text or latents (m, D)
    decoded   for each question, the number of tokens that it decoded
    states    H (B, m, D), the hidden states that it thinks; None on the text channel and in the last turn
    sent      {(source, target): latents (B, m, D of the target), or B texts}; empty in the last turn, or if nobody hears it
    """
    round: int
    role: str
    prompts: list
    decoded: list[int]
    states: torch.Tensor | list | None = None
    sent: dict = field(default_factory=dict)


def recurse(system, questions, settings, tick=silent, think=None):
    """Let the agents of a System take turns over B Questions; yields each turn as a Stage, the last one unanswered.

    What a caller puts into a Stage's `sent` before it asks for the next is what others hear.

    tick()    is called for every position that is generated
    think     think(round, role, prompts) takes the place of Agent.think in training: it returns hidden states (B, m, D),
              or B of unequal length, (m_b, D) each
    """
    style, inbox, nothing = system.style, {}, [0] * len(questions)
    settings = settings.completed(style)
    system.forget()
    for r in range(1, settings.rounds + 1):
        for role in style.order:
            agent, prompts = system.agents[role], system.prompts(role, questions, inbox, settings.date)
            if (r, role) == (settings.rounds, style.order[-1]):
                system.forget()
                yield Stage(r, role, prompts, nothing)
                return
            H, decoded = None, nothing
            with agent.at_work():
                if settings.channel == "latent":
                    H = think(r, role, prompts) if think else agent.think(prompts, settings.latent_steps, tick)  # (B, m, D)
                    Z = through(agent.inner_link, H)
                    sent = {edge: through(link, Z) for edge, link in system.outer_links.items() if edge[0] == role}
                else:
                    ids = agent.decode(prompts, seeds(questions, settings.seed, r, role), settings, tick)
                    texts, decoded = [agent.tokenizer.decode(row) for row in ids], [len(row) for row in ids]
                    sent = {edge: texts for edge in style.edges if edge[0] == role}
            stage = Stage(r, role, prompts, decoded, H, sent)
            yield stage
            inbox |= stage.sent


def through(link, latents):
    """A link applied to latents (B, m, D), or to all of B of unequal length at once."""
    return link(latents) if torch.is_tensor(latents) else link(torch.cat(latents)).split([len(own) for own in latents])


@dataclass
class Result:
    """What a system made of one question.

    question      as typed
    text          what the last agent wrote, its second try included
    answer        the answer in that text, None if it holds none in the form that the task asks for
    token_ids     of the text, with what tools replied to it
    new_tokens    how many of them the agent generated
    seconds       the text's share of its batch's wall time
    heard_tokens  how many tokens the other agents decoded for the question: none, except on the text channel
    latents       {(round, source, target): latents (m, D of the target), or a text}, if kept
    states        {(round, role): (m, D)}, the hidden states that an agent thought, if kept
    stages        {(round, role): (seconds from the batch's start to the end of the turn, its prompt)}, if kept
    """
    question: str
    text: str
    answer: str | None
    token_ids: list[int]
    new_tokens: int
    seconds: float
    heard_tokens: int = 0
    latents: dict = field(default_factory=dict)
    states: dict = field(default_factory=dict)
    stages: dict = field(default_factory=dict)


class System:
    """The agents of a Style by role, and the outer links between them; load_mas_system makes one.

    outer_links   {(source, target): OuterLink}
    task          math, choice or code: how agents are asked, and what counts as an answer
    Several threads may use it; it answers one batch at a time.
    """

    def __init__(self, style, agents, outer_links, task="math"):
        self.style, self.agents, self.outer_links, self.task = style, agents, outer_links, task
        self.lock = RLock()  # agents keep what they read last: one thread at a time

    def run(self, questions, **options):
        """Answer a list of questions: one Result each, in their order (with rollouts=k: k, one after another).

        Options are the fields of Settings, and
            keep_latents=False  put what passed each edge into Result.latents
            keep_states=False   put what each agent thought into Result.states, when and on what prompt into Result.stages
            fn_names=None       task code: for each question a name, None for a function without one, "" for a program
            dataset=None        name of the data set that the questions are from: gpqa has a prompt of its own
            progress=False      show a bar on stderr
            edit                edit(stage, questions) is called after each turn, a Stage of this batch of Questions, and may
                                change what it sent: to mute an edge (send [:, :0] of it; what is not sent again is heard
                                again), to add noise, to send what was thought elsewhere
        Random numbers depend on a question's text and the seed only: asked twice, a question is answered alike twice.
        Raises InputError if a question or a setting cannot be used, before anything is computed.
        """
        return list(self.stream(questions, **options))

    @torch.no_grad()
    def stream(self, questions, *, keep_latents=False, keep_states=False, fn_names=None, dataset=None, progress=False,
               edit=silent, **options):
        """The same as an iterator: the results of a batch come as soon as it is done."""
        settings = Settings(**options).completed(self.style)
        questions = self.questions(questions, fn_names, dataset)
        batches = [questions[i:i + settings.batch_size] for i in range(0, len(questions), settings.batch_size)]
        per_turn = settings.latent_steps if settings.channel == "latent" else settings.max_new_tokens
        per_batch = (settings.rounds * len(self.style.order) - 1) * per_turn + settings.max_new_tokens
        with tqdm(total=len(batches) * per_batch, unit="token", leave=False, disable=not progress) as bar:
            for i, batch in enumerate(batches):
                with self.lock:
                    results = self.answer(batch, settings, keep_latents, keep_states, bar.update, edit)
                yield from results
                bar.update((i + 1) * per_batch - bar.n)  # texts that ended early

    def questions(self, texts, fn_names=None, dataset=None):
        """Texts as typed -> Questions; InputError names one that cannot be read."""
        if isinstance(texts, str):
            raise InputError("questions is one text: give a list of them")
        texts = list(texts)
        for text in texts:
            if not isinstance(text, str) or not text.strip():
                raise InputError(f"a question is {text!r}, empty or no text: type something to be answered")
            if re.search("[\ud800-\udfff]", text):
                raise InputError(f"the question {text!r} holds half of a surrogate pair, which is no text: correct it")
        if fn_names is not None and len(fn_names) != len(texts):
            raise InputError(f"{len(fn_names)} fn_names for {len(texts)} questions: give one for each")
        for text in texts:
            self.style.rewrite(text)  # to refuse now what could not be read later
        return [Question(*pair, dataset) for pair in zip(texts, fn_names or [""] * len(texts))]

    def prompts(self, role, questions, inbox, date=DATE):
        """Prompts of `role` for B questions, each slot filled with what inbox[source, role] holds for the question."""
        heard, tokenizer, prompts = any(target == role for _, target in inbox), self.agents[role].tokenizer, []
        for b, question in enumerate(questions):
            question = replace(question, text=self.style.rewrite(question.text))
            pieces = wrap(tokenizer, *prompt(self.style.prompts, role, question, question.task or self.task, heard), date)
            if unheard := [p.role for p in pieces if isinstance(p, Slot) and (p.role, role) not in inbox]:
                raise InputError(f"the prompt of {role} has a slot for {unheard[0]}, who has sent it nothing: "
                                 "the style needs an edge between them")
            prompts.append([inbox[p.role, role][b] if isinstance(p, Slot) else p for p in pieces])
        return prompts

    def forget(self):
        """Let agents go of the prompts that they keep from round to round."""
        for agent in self.agents.values():
            agent.forget()

    def answer(self, questions, settings, keep_latents=False, keep_states=False, tick=silent, edit=silent):
        """One batch of Questions -> its Results, settings.rollouts for each question. Settings must be completed."""
        started, k = time.perf_counter(), settings.rollouts
        kept = [{"heard_tokens": 0, "latents": {}, "states": {}, "stages": {}} for _ in questions]
        for stage in recurse(self, questions, settings, tick):
            edit(stage, questions)
            key, device = (stage.round, stage.role), self.agents[stage.role].device
            if key == (settings.rounds, self.style.order[-1]):
                texts, ids, new_tokens = self.write(stage.role, questions, stage.prompts, settings, tick)
            if keep_states and device.type == "cuda":
                torch.cuda.synchronize(device)  # the work is done then, not only launched
            for b, own in enumerate(kept):
                own["heard_tokens"] += stage.decoded[b]
                if keep_latents:
                    own["latents"] |= {(stage.round, *edge): own_copy(sent[b]) for edge, sent in stage.sent.items()}
                if keep_states:
                    own["stages"][key] = time.perf_counter() - started, [own_copy(piece) for piece in stage.prompts[b]]
                    own["states"] |= {} if stage.states is None else {key: own_copy(stage.states[b])}
        seconds = (time.perf_counter() - started) / len(texts)
        asked = [question.text for question in questions for _ in range(k)]
        return [Result(asked[i], text, extract(text, self.task), ids[i], new_tokens[i], seconds, **kept[i // k])
                for i, text in enumerate(texts)]

    def write(self, role, questions, prompts, settings, tick=silent):
        """The last turn: B prompts -> texts, their token ids, and how many were generated; k rollouts a question."""
        agent, text_seeds = self.agents[role], seeds(questions, settings.seed, rollouts=settings.rollouts)
        calls = ToolCalls(agent.tokenizer, settings.tools, len(text_seeds)) if self.style.calls_tools else None
        with agent.at_work():
            ids = agent.decode(prompts, text_seeds, settings, tick, calls and calls.reply)
            new_tokens = [len(row) - (calls.inserted[b] if calls else 0) for b, row in enumerate(ids)]
            texts = [agent.tokenizer.decode(row) for row in ids]
            if settings.retry:
                self.retry(agent, texts, ids, new_tokens, text_seeds, settings)
        return texts, ids, new_tokens

    def retry(self, agent, texts, ids, new_tokens, text_seeds, settings):
        """Where a text holds no answer, ask for one at its end and let the agent go on a little; in place."""
        request = answer_retry(self.style.prompts, self.task)
        lost = [b for b, text in enumerate(texts) if extract(text, self.task) is None]
        if not request or not lost:
            return
        settings = replace(settings, max_new_tokens=256 if self.task == "code" else 16)
        asked = [f"{texts[b]}\n{request}" for b in lost]
        others = [~text_seeds[b] & (1 << 63) - 1 for b in lost]  # complements: random numbers that the text did not use
        prompts = [[torch.tensor(agent.tokenizer.encode(text, special=True))] for text in asked]
        more = agent.decode(prompts, others, settings)
        for b, text, new in zip(lost, asked, more):
            texts[b] = (text + agent.tokenizer.decode(new, strip=False)).strip()
            ids[b], new_tokens[b] = ids[b] + new, new_tokens[b] + len(new)


def own_copy(message):
    """One question's part of what a batch sent or read, not a view that holds the whole batch in memory."""
    return message.clone() if torch.is_tensor(message) else message


def load_mas_system(style="tiny", *, checkpoints=None, device=None, dtype=None, task="math", offload=False, plain=False,
                    trust_remote_code=None):
    """Load the agents and links of a style as a System.

    style        a name in STYLES
    checkpoints  {role, or "links": folder or hub id}, in place of the style's own; or one folder that holds a folder for
                 each, named as the role or as the released repository
    device       where agents run: a torch device or its name, {role: device} or "planner=cuda:0,critic=cuda:1"; None takes
                 cuda if there is one
    dtype        of the agents: a torch dtype or its name; None takes float32 on a CPU, elsewhere what config.json names.
                 Links compute in the dtype of their files, or in their agent's if that is wider.
    task         math, choice or code: which links are loaded and how agents are asked
    offload      keep weights in main memory, and on the device only those of the agent at work
    plain        leave out the fast path (fast.py): slower, the same results, and what training needs
    trust_remote_code  accepted from callers of the released code, and ignored: nothing from a checkpoint is executed

    Raises InputError on an unknown style, role, task, device or dtype, and on a checkpoint that is not whole.
    """
    style = style_named(style)
    check_known("task", [task], TASKS)
    sources, devices = style.sources(checkpoints), style.devices(device)
    agents = {role: load_agent(sources[role], task, devices[role], usable_dtype(dtype, devices[role]), offload, plain)
              for role in style.order}
    links = load_outer_links(sources["links"], task, style.edges, agents)
    return System(style, agents, links if plain else {edge: fused(link) for edge, link in links.items()}, task)


if __name__ == "__main__":
    from .cli import command, main
    command(main)
