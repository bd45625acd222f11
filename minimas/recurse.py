"""The recursion: agents think in latents, pass them on, and loop; the last one of the last round writes the answer.

    python -m minimas.recurse --prompt "7 +5 *3 -4 +8 *7 -1 +6"

Read `recurse` first: it is all of RecursiveMAS (arXiv 2604.25917), one loop over an entry of styles.json,

    H_a = think(prompt_a)                 agent a's hidden states, after m latent steps (agent.py)
    Z_ab = R_out_ab(R_in_a(H_a))          what agent b hears from it, in b's own embedding space (link.py)

`System.run` puts batches and the second try for an answer around it. commands/ask.py is the command.

Letters: B questions in a batch, T prompt tokens, D an agent's width, m latent steps.
"""

import time
from dataclasses import dataclass, field, replace
from threading import RLock

import torch
from tqdm import tqdm

from .agent import check_finite, load_agent
from .answers import extract
from .common import InputError, check_known, no_op
from .generate import generate
from .link import fused
from .load import devices_by_role, load_outer_links, usable_dtype
from .prompts import TASKS, Slot, answer_retry, prompt, wrap
from .sample import seeds
from .sandbox.tools import ToolCalls
from .styles import STYLES, Settings, style_named
from .tokenizer import DATE

__all__ = [
    "STYLES",
    "Result",
    "Settings",
    "System",
    "Turn",
    "load_mas_system",
    "recurse",
]  # what pydoc shows


# The recursion


@dataclass
class Turn:
    """One agent's turn in one round, for B questions.

    prompts   what it reads: for each question a list of pieces, text or latents (m, D)
    sent      {(source, target): latents (B, m, D of the target), or B texts}; empty in the last turn, or if nobody hears it
    decoded   for each question, the number of tokens that the agent decoded to send; 0 for latents and in the last turn
    states    H (B, m, D), the hidden states that it thinks; None on the text channel and in the last turn
    """

    round: int
    role: str
    prompts: list
    sent: dict
    decoded: list[int]
    states: torch.Tensor | list | None = None


def recurse(system, questions, settings, tick=no_op, think=None):
    """Let the agents of a System take turns over B Questions; yields each Turn, the last one unanswered.

    What a caller puts into a Turn's `sent` before it asks for the next is what others hear.

    settings  completed Settings
    tick()    is called for every position that is generated
    think     think(round, role, prompts) takes the place of Agent.think in training: it returns hidden states (B, m, D),
              or B of unequal length, (m_b, D) each
    """
    style, inbox = system.style, {}
    system.drop_prefixes()
    for r in range(1, settings.rounds + 1):
        for role in style.order:
            agent, prompts = (
                system.agents[role],
                system.prompts(role, questions, inbox, settings.date),
            )
            if (r, role) == (settings.rounds, style.order[-1]):
                system.drop_prefixes()
                yield Turn(r, role, prompts, sent={}, decoded=[0] * len(questions))
                return
            with agent.at_work():
                if settings.channel == "latent":
                    H = (
                        think(r, role, prompts)
                        if think
                        else agent.think(prompts, settings.latent_steps, tick)
                    )  # (B, m, D)
                    if not think:
                        check_finite(
                            H.isfinite().all(), f"the states of {role} in round {r}", agent.model
                        )
                    turn = Turn(
                        r, role, prompts, send_latents(system, role, H), [0] * len(questions), H
                    )
                else:
                    ids = generate(
                        agent, prompts, seeds(questions, settings.seed, r, role), settings, tick
                    )
                    turn = Turn(
                        r, role, prompts, send_texts(system, role, ids), [len(row) for row in ids]
                    )
            yield turn
            inbox |= turn.sent


def send_latents(system, role, H):
    """{edge: R_out(R_in(H))} for each edge that leaves `role`: H (B, m, D) -> latents (B, m, D of the target).

    R_in maps states into the agent's own embedding space, where its outer links begin. In `think` it was applied to each
    state on its way to the next; H holds the states before it.
    """
    Z = through(system.agents[role].inner_link, H)
    return {edge: through(link, Z) for edge, link in system.outer_links.items() if edge[0] == role}


def send_texts(system, role, ids):
    """{edge: B texts} for each edge that leaves `role`."""
    texts = [system.agents[role].tokenizer.decode(row) for row in ids]
    return {edge: texts for edge in system.style.edges if edge[0] == role}


def through(link, latents):
    """A link applied to latents (B, m, D), or to all of B of unequal length at once."""
    return (
        link(latents)
        if torch.is_tensor(latents)
        else link(torch.cat(latents)).split([len(own) for own in latents])
    )


# A system


@dataclass
class Result:
    """What a system made of one question.

    question      as typed
    text          what the last agent wrote, its second try included
    answer        the answer in that text, None if it holds none in the form that the task asks for
    token_ids     of the text, with what tools replied to it
    new_tokens    how many of them the agent generated
    seconds       the text's share of its batch's wall time
    heard_tokens  how many tokens agents decoded for one another to read, the last one's in earlier rounds too; 0 for latents
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
            edit                edit(turn, questions) is called after each Turn of a batch of Questions, and may change what
                                it sent: to mute an edge (send [:, :0] of it: if it is deleted from `sent`, last round's
                                is heard again), to add noise, or for activation patching: to send what was thought elsewhere
        Random numbers depend on a question's text and the seed only: asked twice, a question is answered alike twice.
        Raises InputError if a question or a setting cannot be used, before anything is computed.
        """
        return list(self.stream(questions, **options))

    def stream(
        self,
        questions,
        *,
        keep_latents=False,
        keep_states=False,
        fn_names=None,
        dataset=None,
        progress=False,
        edit=no_op,
        **options,
    ):
        """The same as an iterator: the results of a batch come as soon as it is done."""
        settings = Settings(**options).completed(self.style)
        questions = self.style.questions(questions, fn_names, dataset)
        return self.answer_all(questions, settings, keep_latents, keep_states, progress, edit)

    @torch.no_grad()
    def answer_all(
        self, questions, settings, keep_latents=False, keep_states=False, progress=False, edit=no_op
    ):
        """Iterate over the Results of Questions under completed Settings, batch by batch."""
        batches = [
            questions[i : i + settings.batch_size]
            for i in range(0, len(questions), settings.batch_size)
        ]
        per_turn = (
            settings.latent_steps if settings.channel == "latent" else settings.max_new_tokens
        )
        per_batch = (
            settings.rounds * len(self.style.order) - 1
        ) * per_turn + settings.max_new_tokens
        with tqdm(
            total=len(batches) * per_batch, unit="token", leave=False, disable=not progress
        ) as bar:
            for i, batch in enumerate(batches):
                with self.lock:
                    results = self.answer(
                        batch, settings, keep_latents, keep_states, bar.update, edit
                    )
                yield from results
                bar.update((i + 1) * per_batch - bar.n)  # texts that ended early

    def prompts(self, role, questions, inbox, date=DATE):
        """Prompts of `role` for B questions, each slot filled with what inbox[source, role] holds for the question."""
        order, tokenizer, prompts = self.style.order, self.agents[role].tokenizer, []
        fed_back = any(
            target == role and order.index(source) >= order.index(role) for source, target in inbox
        )
        for b, question in enumerate(questions):
            pieces = wrap(
                tokenizer,
                *prompt(self.style.prompts, role, question, question.task or self.task, fed_back),
                date,
            )
            if unheard := [
                p.role for p in pieces if isinstance(p, Slot) and (p.role, role) not in inbox
            ]:
                raise InputError(
                    f"the prompt of {role} has a slot for {unheard[0]}, who has sent it nothing: "
                    "the style needs an edge between them"
                )
            prompts.append([inbox[p.role, role][b] if isinstance(p, Slot) else p for p in pieces])
        return prompts

    def drop_prefixes(self):
        """Let agents go of the prompts that they keep from round to round."""
        for agent in self.agents.values():
            agent.drop_prefix()

    def answer(
        self, questions, settings, keep_latents=False, keep_states=False, tick=no_op, edit=no_op
    ):
        """One batch of Questions -> its Results, settings.rollouts for each question. Settings must be completed."""
        self.check_links(settings)
        started, k = time.perf_counter(), settings.rollouts
        kept = [{"heard_tokens": 0, "latents": {}, "states": {}, "stages": {}} for _ in questions]
        for turn in recurse(self, questions, settings, tick):
            edit(turn, questions)
            key, device = (turn.round, turn.role), self.agents[turn.role].device
            if key == (settings.rounds, self.style.order[-1]):
                texts, ids, new_tokens = self.write(
                    turn.role, questions, turn.prompts, settings, tick
                )
            if keep_states and device.type == "cuda":
                torch.cuda.synchronize(device)  # the work is done then, not only launched
            for b, own in enumerate(kept):
                own["heard_tokens"] += turn.decoded[b]
                if keep_latents:
                    own["latents"] |= {
                        (turn.round, *edge): own_copy(sent[b]) for edge, sent in turn.sent.items()
                    }
                if keep_states:
                    own["stages"][key] = (
                        time.perf_counter() - started,
                        [own_copy(piece) for piece in turn.prompts[b]],
                    )
                    own["states"] |= {} if turn.states is None else {key: own_copy(turn.states[b])}
        seconds = (time.perf_counter() - started) / len(texts)
        asked = [question.typed for question in questions for _ in range(k)]
        return [
            Result(
                asked[i],
                text,
                extract(text, self.task),
                ids[i],
                new_tokens[i],
                seconds,
                **kept[i // k],
            )
            for i, text in enumerate(texts)
        ]

    def check_links(self, settings):
        """InputError if latents are to be sent through links that are not there."""
        if settings.channel == "text" or settings.rounds == len(self.style.order) == 1:
            return
        missing = [
            f"inner link of {role}"
            for role, agent in self.agents.items()
            if agent.inner_link is None
        ]
        missing += [
            f"outer link from {' to '.join(edge)}"
            for edge in self.style.edges
            if edge not in self.outer_links
        ]
        if missing:
            raise InputError(
                f"there is no {missing[0]}, which latents need: make it with `python -m minimas.train "
                f"{missing[0][:5]}` (docs/training.md), or take --channel text"
            )

    def write(self, role, questions, prompts, settings, tick=no_op):
        """The last turn: B prompts -> texts, their token ids, and how many were generated; k rollouts a question."""
        agent, text_seeds = (
            self.agents[role],
            seeds(questions, settings.seed, rollouts=settings.rollouts),
        )
        calls = (
            ToolCalls(agent.tokenizer, settings.tools, len(text_seeds))
            if self.style.calls_tools
            else None
        )
        with agent.at_work():
            ids = generate(agent, prompts, text_seeds, settings, tick, calls and calls.reply)
            new_tokens = [
                len(row) - (calls.inserted[b] if calls else 0) for b, row in enumerate(ids)
            ]
            texts = [agent.tokenizer.decode(row) for row in ids]
            if settings.retry:
                self.retry(agent, texts, ids, new_tokens, text_seeds, settings)
        return texts, ids, new_tokens

    def retry(self, agent, texts, ids, new_tokens, text_seeds, settings):
        """Where a text holds no answer, ask for one at its end and let the agent go on a little; in place.

        It reads the text alone, not its prompt again.
        """
        request = answer_retry(self.style.prompts, self.task)
        lost = [b for b, text in enumerate(texts) if extract(text, self.task) is None]
        if not request or not lost:
            return
        settings = replace(settings, max_new_tokens=256 if self.task == "code" else 16)
        asked = [f"{texts[b]}\n{request}" for b in lost]
        others = [
            ~text_seeds[b] & (1 << 63) - 1 for b in lost
        ]  # complements: random numbers that the text did not use
        prompts = [[torch.tensor(agent.tokenizer.encode(text, special=True))] for text in asked]
        more = generate(agent, prompts, others, settings)
        for b, text, new in zip(lost, asked, more):
            texts[b] = (text + agent.tokenizer.decode(new, strip=False)).strip()
            ids[b], new_tokens[b] = ids[b] + new, new_tokens[b] + len(new)


def own_copy(message):
    """One question's part of what a batch sent or read, not a view that holds the whole batch in memory."""
    return message.clone() if torch.is_tensor(message) else message


def load_mas_system(
    style="tiny",
    *,
    checkpoints=None,
    device=None,
    dtype=None,
    task=None,
    offload=False,
    plain=False,
    trust_remote_code=None,
):
    """Load the agents and links of a style as a System.

    style        a name in STYLES, or a .json file of that form (docs/extending.md)
    checkpoints  {role, or "links": folder or hub id}, in place of the style's own; or one folder that holds a folder for
                 each, named as the role or as the released repository
    device       where agents run: a torch device or its name, {role: device} or "planner=cuda:0,critic=cuda:1"; None takes
                 cuda if there is one
    dtype        of the agents: a torch dtype or its name; None takes float32 on a CPU, elsewhere what config.json names.
                 Links compute in the dtype of their files, or in their agent's if that is wider.
    task         math, choice or code: which links are loaded and how agents are asked; None takes the style's
    offload      keep weights in main memory, and on the device only those of the agent at work
    plain        leave out the fast path (minimas/fast): slower, the same results, and what training needs
    trust_remote_code  accepted from callers of the released code, and ignored: no Python from a checkpoint is executed

    Raises InputError on an unknown style, role, task, device or dtype, and on a checkpoint that is not whole.
    """
    style = style_named(style)
    task = task or style.task
    check_known("task", [task], TASKS)
    sources, devices = style.sources(checkpoints), devices_by_role(style.order, device)
    agents = {
        role: load_agent(
            sources[role],
            task,
            devices[role],
            usable_dtype(dtype, devices[role]),
            offload,
            plain,
            role=role,
        )
        for role in style.order
    }
    links = (
        load_outer_links(sources["links"], task, style.edges, agents) if "links" in sources else {}
    )
    return System(
        style, agents, links if plain else {edge: fused(link) for edge, link in links.items()}, task
    )


if __name__ == "__main__":
    from .commands.ask import run

    run()
