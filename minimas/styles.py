"""The styles: who speaks in which order, who hears whom through which link, and where their checkpoints are; and the
settings of a run, which a style completes.

A style is one entry of styles.json, or a file of the same form (docs/extending.md); `recurse` runs any of them with the
same loop. Repository names and link keys are those of the release (huggingface.co/RecursiveMAS); `tiny` ships with this
package, and `single` is one agent that is asked once.
"""

from dataclasses import MISSING, dataclass, fields, replace
from itertools import chain
from numbers import Integral, Real
from pathlib import Path

from .common import InputError, check_known, check_text, read_json, warn_once
from .compat.style_file import wrong_prompts, wrong_roles
from .prompts import Question
from .sandbox.tools import TOOLS
from .tiny.task import with_labels
from .tokenizer import DATE


@dataclass(frozen=True)
class Style:
    """An entry of styles.json.

    order           roles in the order in which they speak in a round; the last one writes the answer
    edges           {(source, target): the link's key in outerlink_config.json}: who hears whom
    checkpoints     {role, or "links": folder or hub id}; a style without trained links may leave those out
    prompts         the section of prompts.json with this name, or one of that form itself
    rounds, latent_steps, max_new_tokens, temperature   defaults of a run's settings
    task            math, choice or code: the default of the commands
    calls_tools     the last agent may write tool calls into its answer
    links_by_task   there is one set of links for code and one for everything else
    """

    order: tuple[str, ...]
    edges: dict[tuple[str, str], str]
    checkpoints: dict[str, str | Path]
    prompts: str | dict
    rounds: int = 3
    latent_steps: int = 32
    max_new_tokens: int = 2000
    temperature: float = 0.6
    task: str = "math"
    calls_tools: bool = False
    links_by_task: bool = False

    @property
    def paradigm(self):
        """Its name in the manifests of links."""
        return self.prompts if isinstance(self.prompts, str) else "own"

    def question(self, typed, fn_name="", dataset=None, task=None):
        """The Question that agents read for what the user typed; InputError if this style cannot read it."""
        return Question(REWRITES.get(self.paradigm, str)(typed), fn_name, dataset, task, typed)

    def questions(self, texts, fn_names=None, dataset=None):
        """Texts as typed -> Questions; InputError names one that cannot be read."""
        if isinstance(texts, str):
            raise InputError("questions is one text: give a list of them")
        texts = list(texts)
        for text in texts:
            if not isinstance(text, str) or not text.strip():
                raise InputError(
                    f"a question is {text!r}, empty or no text: type something to be answered"
                )
            check_text(text, f"the question {text!r}")
        if fn_names is not None and len(fn_names) != len(texts):
            raise InputError(
                f"{len(fn_names)} fn_names for {len(texts)} questions: give one for each"
            )
        return [self.question(*pair, dataset) for pair in zip(texts, fn_names or [""] * len(texts))]

    def sources(self, given=None, needed=None):
        """{role, or "links": folder or hub id}, with `given` in place of the style's own.

        given   {role, or "links": folder or hub id}, or one folder that holds a folder for each, named as the role or as
                the released repository; for a style of one agent that agent itself
        needed  which of them are wanted; by default all, and links if the style has some or that one folder does
        Raises InputError on an unknown role and on a folder that is missing.
        """
        if given is None or isinstance(given, dict):
            check_known("checkpoint of", given or {}, (*self.order, "links"))
            sources = self.checkpoints | (given or {})
            if lacking := [name for name in needed or sources if not sources.get(name)]:
                raise InputError(
                    f"{lacking[0]} has no folder or hub id: give one with --checkpoint {lacking[0]}=PATH"
                )
            return {name: sources[name] for name in needed or sources}
        if len(self.order) == 1:
            return {self.order[0]: given}
        folder, found = Path(given).expanduser(), {}
        needed = needed or dict.fromkeys(
            [*self.checkpoints, *(["links"] if (folder / "links").is_dir() else [])]
        )
        for name in needed:
            places = [folder / name, folder / Path(self.checkpoints.get(name, name)).name]
            found[name] = next((place for place in places if place.is_dir()), None)
            if found[name] is None:
                raise InputError(
                    f"{folder} holds no folder {places[0].name} or {places[1].name}: expected one each for "
                    f"{', '.join(needed)}; or name a single one as ROLE=PATH"
                )
        return found


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
    rollouts        texts for each question, sampled from one prefill; one where nothing is left to chance
    batch_size      questions that are answered together
    retry           ask once more if a text holds no answer
    channel         latent, or text: agents then decode and pass text, for comparison
    tools           python, search, or both: what an agent of a style that calls tools may call
    date            the date that Llama's chat template tells its agent
    """

    rounds: int | None = None
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
        defaults = ("rounds", "latent_steps", "max_new_tokens", "temperature")
        settings = replace(
            self, **{name: getattr(style, name) for name in defaults if getattr(self, name) is None}
        )
        lowest = {
            "rounds": 1,
            "latent_steps": 0,
            "max_new_tokens": 1,
            "top_k": 0,
            "batch_size": 1,
            "rollouts": 1,
        }
        for name, least in lowest.items():
            value = getattr(settings, name)
            if (value is not None or name != "top_k") and not (
                isinstance(value, Integral) and value >= least
            ):
                raise InputError(f"{name} is {value!r}, expected a whole number from {least} up")
        if not (
            isinstance(settings.temperature, Real) and 0 <= settings.temperature < float("inf")
        ):
            raise InputError(
                f"temperature is {settings.temperature!r}, expected a number from 0 up"
            )
        if not 0 < settings.top_p <= 1:
            raise InputError(f"top_p is {settings.top_p}, expected more than 0 and at most 1")
        check_known("channel", [settings.channel], ("latent", "text"))
        check_known("tool", settings.tools, TOOLS)
        if settings.tools and not style.calls_tools:
            raise InputError(
                "tools are given, but this style's agents call none: leave them out, or use style deliberation"
            )
        if settings.rollouts > 1 and (settings.temperature == 0 or settings.top_k == 1):
            cause = "at temperature 0" if settings.temperature == 0 else "with top_k 1"
            warn_once(
                f"{settings.rollouts} rollouts {cause} are the same text, so each question gets one: "
                "sample from more than the likeliest token to get several"
            )
            settings = replace(settings, rollouts=1)
        return settings


# The table, and files of its form

REWRITES = {
    "tiny": with_labels
}  # section of prompts.json -> what turns a question as typed into what agents read
TYPES = {
    "order": list,
    "edges": list,
    "agents": dict,
    "prompts": (str, dict),
    "links": (str, type(None)),
}
FLAGS = dict.fromkeys(("calls_tools", "links_by_task"), (bool, type(None)))


def style_from(entry, file):
    """The Style of an entry in the form of styles.json; folders of agents and links are relative to the file.

    InputError names the key that is wrong.
    """
    check_known(
        f"{file}: key",
        entry,
        [*TYPES, *(field.name for field in fields(Style) if field.default is not MISSING)],
    )
    for key, types in (TYPES | FLAGS).items():
        if not isinstance(entry.get(key), types):
            raise InputError(
                f"{file}: {key} is {entry.get(key, 'missing')!r:.80}, see docs/extending.md for its form"
            )
    order, edges, agents, prompts, links = (entry.get(key) for key in TYPES)
    for sentence in chain(wrong_roles(order, edges, agents), wrong_prompts(order, edges, prompts)):
        raise InputError(f"{file}: {sentence}")
    sources = agents | ({"links": links} if links else {})
    checkpoints = {
        name: file.parent / source if source and (file.parent / source).is_dir() else source
        for name, source in sources.items()
    }
    keys = {
        (source, target): key[0] if key else f"outer_{source}_{target}"
        for source, target, *key in edges
    }
    if len({*keys.values()}) < len(edges):
        raise InputError(
            f"{file}: edges is {edges}, expected each link once, under a name of its own"
        )
    more = {key: value for key, value in entry.items() if key not in TYPES}
    return Style(tuple(order), keys, checkpoints, prompts, **more)


FILE = Path(__file__).with_name("styles.json")
STYLES = {name: style_from(entry, FILE) for name, entry in read_json(FILE).items()}


def style_named(name):
    """The Style of that name, or in a .json file; InputError if there is none."""
    file = Path(name).expanduser()
    if file.suffix == ".json" and file.is_file():
        return style_from(read_json(file), file)
    check_known("style", [str(name)], [*STYLES, "the path of a .json file"])
    return STYLES[name]
