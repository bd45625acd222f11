"""The settings of a run: what can be chosen, what each choice means, and its default.

Four defaults are the style's own. `completed` fills them in and checks all values.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

from .common import (
    InputError,
    check_known,
    check_number,
    check_type,
    check_whole,
    is_number,
    warn_once,
)
from .prompts import Question
from .sandbox.tools import TOOLS
from .style_file import LEAST
from .styles import Style
from .tokenizer import DATE

OF_THE_STYLE = ("rounds", "latent_steps", "max_new_tokens", "temperature")
CHANNELS = ("latent", "text")
HEARD = ("own", "other", "none", "noise", "shuffled")  # hear.py says what each is
# What `evaluate --compare` and held-out rows measure. Own against other shows what passes of a question, other against
# none what helps with any question.
COMPARED_HEARD = ("own", "other", "none")
# Less counts as 0: logits that are divided by it would overflow in float32
LEAST_TEMPERATURE = 1e-30
NOT_FOR_ARGPARSE = ("least", "above", "trainings")  # what a field says besides


def setting(
    default: Any,
    help: str,
    *,
    least: float | None = None,
    above: float | None = None,
    trainings: tuple[str, ...] | None = None,
    **more: Any,
) -> Any:
    """A field of a dataclass of settings: its default, and what the --help of a command says of it.

    The option of a field that is True by default is --no-NAME, and its help begins with "do not".

    least       the least number that it may be
    above       what a number must be more than; a field has one of the two at most
    trainings   those that have a use for it (train/settings.py), if not all have
    more        what argparse takes besides: `metavar`, `choices`
    """
    metadata = {"help": help, "least": least, "above": above, "trainings": trainings, **more}
    return field(default=default, metadata=metadata)


def setting_of(settings: type, name: str) -> Any:
    """A field with the default and the help that another dataclass of settings has for it."""
    known = {one.name: one for one in fields(settings)}
    return field(default=known[name].default, metadata=known[name].metadata)


@dataclass(frozen=True)
class Settings:
    """How a run goes. None stands for the style's own value.

    rounds          of recursion, 1 or more
    latent_steps    latents that an agent thinks in a turn (m), 0 or more
    max_new_tokens  limit on the tokens of a text
    temperature     0 always takes the likeliest token
    top_p           sample from the likeliest tokens that together reach this probability
    top_k           and from at most this many of them: 0 is no limit, None what the agent's generation_config.json says
    seed            of all random numbers, together with the question's text
    rollouts        texts for each question, sampled from one prefill
    batch_size      questions that are answered together
    retry           ask once more if a text holds no answer
    channel         latent, or text: agents then decode and pass text, for comparison
    hear            what agents hear in place of what was sent to them: one of HEARD, or "planner>critic=other" for some
                    edges, joined by + (hear.py)
    tools           python, search, or both: what an agent of a style that calls tools may call
    date            the date that Llama's chat template tells its agent
    """

    rounds: int | None = setting(None, "rounds of recursion (default: the style's, mostly 3)")
    latent_steps: int | None = setting(
        None, "latents that an agent thinks per turn (default: the style's)"
    )
    max_new_tokens: int | None = setting(
        None, "the most tokens of an answer (default: the style's)"
    )
    temperature: float | None = setting(
        None, "0 always takes the likeliest token (default: the style's)"
    )
    top_p: float = setting(0.95, "sample from the likeliest tokens that reach this sum")
    top_k: int | None = setting(
        None, "and from no more tokens than this, 0 for all (default: generation_config.json's)"
    )
    seed: int = setting(42, "seed of all random numbers")
    rollouts: int = setting(1, "texts per question, from the same latents")
    batch_size: int = setting(8, "questions at once")
    retry: bool = setting(True, "ask again when a text holds no answer")
    channel: str = setting("latent", "what agents send: latent, or text for comparison")
    hear: str = setting(
        "own",
        "what agents hear in place of messages: own, other (of the question before), none, noise or shuffled; along "
        "some edges only: 'planner>critic=other+critic>solver=none'",
    )
    tools: tuple[str, ...] = setting(
        (), "what style deliberation may call: python, search or python,search"
    )
    date: str = setting(DATE, "the date that chat templates tell their agents")

    def completed(self, style: Style) -> "CompletedSettings":
        """The same with the values of a Style filled in; InputError names a setting that is out of range."""
        values = {one.name: as_python(getattr(self, one.name)) for one in fields(Settings)}
        for name in OF_THE_STYLE:
            if values[name] is None:
                values[name] = getattr(style, name)
        settings = CompletedSettings(**values)
        check_settings(settings, style)
        settings = replace(
            settings,
            temperature=float(settings.temperature),  # torch takes no whole number beyond 64 bits
            top_p=float(settings.top_p),
            hear=spelled(heard_along(settings.hear, style), style),
        )
        if settings.temperature < LEAST_TEMPERATURE:
            settings = replace(settings, temperature=0.0)
        return one_text_where_all_are_equal(settings)


class CompletedSettings(Settings):
    """Settings that leave nothing to the style: what a run works with."""

    rounds: int
    latent_steps: int
    max_new_tokens: int
    temperature: float


def one_text_where_all_are_equal(settings: CompletedSettings) -> CompletedSettings:
    """The same settings without further rollouts, with a warning, if all rollouts would be the likeliest text."""
    if settings.rollouts == 1 or (settings.temperature > 0 and settings.top_k != 1):
        return settings
    cause = "at temperature 0" if settings.temperature == 0 else "with top_k 1"
    warn_once(
        f"{settings.rollouts} rollouts {cause} are the same text, so each question gets one: "
        "sample from more than the likeliest token to get several"
    )
    return replace(settings, rollouts=1)


# What is heard


def heard_along(hear: str, style: Style) -> dict[tuple[str, str], str]:
    """{edge: what is heard along it}, in the order of the style's edges and without those that hear their own.

    InputError if `hear` is neither one of HEARD nor a list of parts SOURCE>TARGET=ONE joined by +.
    """
    if "=" not in str(hear):
        check_known("hear", [hear], (*HEARD, "SOURCE>TARGET=ONE of these"))
        named = dict.fromkeys(style.edges, hear)
    else:
        named = {}
        for part in hear.split("+"):
            edge, value = edge_heard(part, style)
            if edge in named:
                raise InputError(f"hear gives {'>'.join(edge)} twice: give it once")
            named[edge] = value
    return {edge: named[edge] for edge in style.edges if named.get(edge, "own") != "own"}


def edge_heard(part: str, style: Style) -> tuple[tuple[str, str], str]:
    """The edge and the value of SOURCE>TARGET=VALUE."""
    name, _, value = part.partition("=")
    edges = {">".join(edge): edge for edge in style.edges}
    check_known("edge of hear", [name.replace(" ", "")], edges)
    check_known("hear", [value.strip()], HEARD)
    return edges[name.replace(" ", "")], value.strip()


def spelled(heard: dict[tuple[str, str], str], style: Style) -> str:
    """The one spelling of what is heard along each edge, so that the same setting is always the same text."""
    if not heard:
        return "own"
    values = set(heard.values())
    if len(heard) == len(style.edges) and len(values) == 1:
        return values.pop()
    return "+".join(f"{source}>{target}={value}" for (source, target), value in heard.items())


def hears_others(settings: Settings) -> bool:
    """Whether anybody hears what was sent for another question."""
    return settings.hear == "other" or "=other" in settings.hear


# Checks


def as_python(value: Any) -> Any:
    """A number or a bool of numpy as one of Python, which a file of JSON takes; all else as it is."""
    if hasattr(value, "item") and getattr(value, "ndim", None) == 0:
        return value.item()
    return value


def check_settings(settings: CompletedSettings, style: Style) -> None:
    """InputError names the first setting that is out of range, or that the style has no use for."""
    for name, least in LEAST.items():
        check_whole(name, getattr(settings, name), least)
    if settings.top_k is not None:
        check_whole("top_k", settings.top_k, 0)
    check_whole("batch_size", settings.batch_size, 1)
    check_whole("rollouts", settings.rollouts, 1)
    check_whole("seed", settings.seed, None)
    check_type("retry", settings.retry, bool, "True or False")
    check_type("date", settings.date, str, "a text")
    check_number("temperature", settings.temperature, 0)
    check_top_p(settings.top_p)
    check_known("channel", [settings.channel], CHANNELS)
    check_hear(settings, style)
    check_tools(settings.tools, style)


def check_top_p(value: object) -> None:
    """InputError unless it is a probability above 0."""
    if not is_number(value) or value <= 0 or not value <= 1:
        raise InputError(f"top_p is {value!r}, expected more than 0 and at most 1")


def check_tools(tools: tuple[str, ...], style: Style) -> None:
    """InputError unless all tools are known and the style's last agent calls tools."""
    check_known("tool", tools, TOOLS)
    if tools and not style.calls_tools:
        raise InputError(
            "tools are given, but this style's agents call none: leave them out, or use style deliberation"
        )


def check_hear(settings: CompletedSettings, style: Style) -> None:
    """InputError if agents cannot hear what they are to hear."""
    values = set(heard_along(settings.hear, style).values())
    if settings.hear != "own" and not style.edges:
        raise InputError(
            f"hear is {settings.hear}, and nobody hears anybody in this style: leave it out"
        )
    changed = sorted(values & {"noise", "shuffled"})
    if settings.channel == "text" and changed:
        raise InputError(
            f"hear is {changed[0]}, which latents can be and texts cannot: expected own, other or none with channel "
            "text"
        )
    if "shuffled" in values and settings.latent_steps < 2:
        raise InputError(
            f"hear is shuffled, and latent_steps is {settings.latent_steps}: that is no other order, give 2 or more"
        )


def check_neighbours(questions: Sequence[Question], settings: Settings) -> None:
    """InputError if each question is to hear another one, and all have the same text."""
    different = {question.text for question in questions}
    if len(different) == 1 and hears_others(settings):
        raise InputError(
            "hear is other, and there is only one question, not counting repeats: ask at least two that differ, so "
            "that each hears another one"
        )
