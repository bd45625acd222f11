"""The recursion: agents think in latents, pass them on, and loop; the last one of the last round writes the answer.

    python -m minimas.recurse --prompt "7 +5 *3 -4 +8 *7 -1 +6"

`recurse` is all of RecursiveMAS (arXiv 2604.25917), one loop over an entry of styles.json,

    H_a = think(prompt_a)                 agent a's hidden states, after m latent steps (agent.py)
    Z_ab = R_out_ab(R_in_a(H_a))          what agent b hears from it, in b's own embedding space (link.py)

system.py puts batches, the text of the answer and the retry around it.

Notation: B questions in a batch, D an agent's width, m latent steps.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING

from .agent import Prompt
from .common import no_op
from .generate import generate
from .link import apply_link
from .prompts import Question
from .sample import seeds
from .settings import CompletedSettings
from .turn import Edge, Latents, Message, Turn, select

if TYPE_CHECKING:
    from .system import System

Think = Callable[[int, str, list[Prompt]], Latents]


def recurse(
    system: System,
    questions: Sequence[Question],
    settings: CompletedSettings,
    callback: Callable = no_op,
    think: Think | None = None,
) -> Iterator[Turn]:
    """Let the agents of a System take turns over B Questions; yields each Turn, the last one unanswered.

    A caller may change a Turn before it asks for the next one (turn.py). Questions that it stops are answered in a Turn
    of their own in that round, as if it were the last. Questions that it drops leave the batch at once.

    settings    completed Settings
    callback()  is called for every position that is generated
    think       think(round, role, prompts) -> hidden states; in training it takes the place of Agent.think
    """
    order = system.style.order
    think = think or partial(system.think, settings, callback)
    rows = list(range(len(questions)))  # the numbers of the questions that go on
    inbox: dict[Edge, Message] = {}
    system.drop_prefixes()
    for r in range(1, settings.rounds + 1):
        ending = set(rows) if r == settings.rounds else set()  # those that this round answers
        for role in order:
            asked = [questions[b] for b in rows]
            prompts = system.prompts_for(role, asked, inbox, settings.date)
            if role == order[-1]:
                # The last agent writes its answers after these prompts. It thinks for the other questions only.
                yield from final_turn(system, r, rows, prompts, ending)
                rows, prompts, inbox = without(ending, rows, prompts, inbox)
            if not rows:
                return
            if settings.channel == "latent":
                turn = latent_turn(system, think, r, role, rows, prompts)
            else:
                asked = [questions[b] for b in rows]
                turn = text_turn(system, asked, settings, callback, r, role, rows, prompts)
            yield turn
            turn.check()
            inbox |= turn.heard()
            ending |= {rows[i] for i in turn.stopped}
            dropped = {rows[i] for i in turn.dropped}
            rows, prompts, inbox = without(dropped, rows, prompts, inbox)
        # The last agent may have been stopped in the turn in which it thought.
        yield from final_turn(system, r, rows, prompts, ending)
        rows, prompts, inbox = without(ending, rows, prompts, inbox)


def without(
    leaving: set[int], rows: list[int], prompts: list[Prompt], inbox: dict[Edge, Message]
) -> tuple[list[int], list[Prompt], dict[Edge, Message]]:
    """What a batch of questions holds, without those of these numbers."""
    staying = [i for i, b in enumerate(rows) if b not in leaving]
    if len(staying) == len(rows):
        return rows, prompts, inbox
    kept = {edge: select(message, staying) for edge, message in inbox.items()}
    return [rows[i] for i in staying], [prompts[i] for i in staying], kept


def final_turn(
    system: System, r: int, rows: list[int], prompts: list[Prompt], ending: set[int]
) -> Iterator[Turn]:
    """The Turn in which the last agent answers the questions that end, if there are any.

    What was kept for further rounds is let go before it.
    """
    chosen = [i for i, b in enumerate(rows) if b in ending]
    if not chosen:
        return
    system.drop_prefixes()
    own_rows = [rows[i] for i in chosen]
    own_prompts = [prompts[i] for i in chosen]
    role = system.style.order[-1]
    width = system.agents[role].model.config.hidden_size
    yield Turn(r, role, own_rows, own_prompts, answers=True, width=width)


# The channels


def latent_turn(
    system: System, think: Think, r: int, role: str, rows: list[int], prompts: list[Prompt]
) -> Turn:
    """The turn of an agent that thinks after B prompts, and sends latents."""
    H = think(r, role, prompts)  # (B, m, D)
    send = partial(send_latents, system, role)
    silence = system.silence(role, "latent", len(rows))
    width = system.agents[role].model.config.hidden_size
    return Turn(r, role, rows, prompts, H, send, silence=silence, width=width)


def send_latents(system: System, role: str, H: Latents) -> dict[Edge, Message]:
    """{edge: R_out(R_in(H))} for each edge that leaves `role`: H (B, m, D) -> latents (B, m, D of the target).

    R_in maps states into the agent's own embedding space, where its outer links begin. In `think` it was applied to
    each state on its way to the next; H holds the states before it.
    """
    inner_link = system.agents[role].inner_link
    assert inner_link is not None, "System.check_links refuses a base model"
    Z = apply_link(inner_link, H)
    links = system.outer_links
    return {edge: apply_link(links[edge], Z) for edge in system.style.edges_from(role)}


def text_turn(
    system: System,
    questions: Sequence[Question],
    settings: CompletedSettings,
    callback: Callable,
    r: int,
    role: str,
    rows: list[int],
    prompts: list[Prompt],
) -> Turn:
    """The turn of an agent that writes after the prompts of B questions, and sends its texts."""
    agent = system.agents[role]
    own_seeds = seeds(questions, settings.seed, r, role)
    with agent.at_work():
        ids = generate(agent, prompts, own_seeds, settings, callback)
    decoded = [len(own) for own in ids]
    sent = send_texts(system, role, ids)
    silence = system.silence(role, "text", len(rows))
    return Turn(r, role, rows, prompts, sent=sent, silence=silence, decoded=decoded)


def send_texts(system: System, role: str, ids: list[list[int]]) -> dict[Edge, Message]:
    """{edge: B texts} for each edge that leaves `role`, out of the token ids that it wrote."""
    tokenizer = system.agents[role].tokenizer
    texts = [tokenizer.decode(row) for row in ids]
    return {edge: list(texts) for edge in system.style.edges_from(role)}


if __name__ == "__main__":
    from .commands.ask import run

    run()
