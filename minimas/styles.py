"""The styles: who speaks in which order, who hears whom through which link, and where their checkpoints are.

A style is one row of STYLES; `recurse` runs any of them with the same loop. Repository names and link keys are those of
the release (huggingface.co/RecursiveMAS); `tiny` ships with this package.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from . import InputError, check_known
from .load import usable_device
from .tiny.task import with_labels


@dataclass(frozen=True)
class Style:
    """A row of the table.

    order           roles in the order in which they speak in a round; the last one writes the answer
    edges           {(source, target): the link's key in outerlink_config.json}: who hears whom
    checkpoints     {role, or "links": folder or hub id}
    prompts         name of its section in prompts.json
    rewrite         turns a question as typed into what the agents read
    latent_steps, max_new_tokens, temperature   defaults of a run's settings
    calls_tools     the last agent may write tool calls into its answer
    links_by_task   there is one set of links for code and one for everything else
    """
    order: tuple[str, ...]
    edges: dict[tuple[str, str], str]
    checkpoints: dict[str, str | Path]
    prompts: str
    rewrite: Callable[[str], str] = str
    latent_steps: int = 32
    max_new_tokens: int = 2000
    temperature: float = 0.6
    calls_tools: bool = False
    links_by_task: bool = False

    def sources(self, given=None, needed=None):
        """{role, or "links": folder or hub id}, with `given` in place of the style's own.

        given   {role, or "links": folder or hub id}, or one folder that holds a folder for each, named as the role or as
                the released repository
        needed  which of them that one folder must hold; all by default
        Raises InputError on an unknown role and on a folder that is missing.
        """
        if given is None or isinstance(given, dict):
            check_known("checkpoint of", given or {}, self.checkpoints)
            return self.checkpoints | (given or {})
        folder, found, needed = Path(given).expanduser(), {}, needed or [*self.checkpoints]
        for name in needed:
            places = [folder / name, folder / Path(self.checkpoints[name]).name]
            found[name] = next((place for place in places if place.is_dir()), None)
            if found[name] is None:
                raise InputError(f"{folder} holds no folder {places[0].name} or {places[1].name}: expected one each for "
                                 f"{', '.join(needed)}; or name a single one as ROLE=PATH")
        return found

    def devices(self, given=None):
        """{role: torch.device}, from one device or its name, {role: device}, "planner=cuda:0,critic=cuda:1", or None.
        """
        if isinstance(given, str) and "=" in given:
            pairs = [pair.partition("=")[::2] for pair in given.split(",")]
            if not all(device for _, device in pairs) or len(dict(pairs)) < len(pairs):
                raise InputError(f"device is {given}, expected ROLE=DEVICE,ROLE=DEVICE with each role once")
            given = dict(pairs)
        if not isinstance(given, dict):
            return dict.fromkeys(self.order, usable_device(given))
        if set(given) != set(self.order):
            raise InputError(f"device names {', '.join(given)}, expected each of {', '.join(self.order)}")
        return {role: usable_device(name) for role, name in given.items()}


def released(links, **agents):
    """The checkpoints of a released style, from the names of its repositories."""
    return {role: f"RecursiveMAS/{name}" for role, name in (agents | {"links": links}).items()}


TINY = Path(__file__).parent / "tiny"
SEQUENTIAL = {("planner", "critic"): "outer_12", ("critic", "solver"): "outer_23", ("solver", "planner"): "outer_31"}
STYLES = {
    "tiny": Style(
        order=("planner", "critic", "solver"), edges=SEQUENTIAL, prompts="tiny", rewrite=with_labels,
        latent_steps=5, max_new_tokens=8, temperature=0.0,
        checkpoints={name: TINY / name for name in ("planner", "critic", "solver", "links")}),
    "sequential_light": Style(
        order=("planner", "critic", "solver"), edges=SEQUENTIAL, prompts="sequential", links_by_task=True,
        checkpoints=released("Sequential-Light-Outerlinks", planner="Sequential-Light-Planner-Qwen3-1.7B",
                             critic="Sequential-Light-Critic-Llama3.2-1B",
                             solver="Sequential-Light-Solver-Qwen2.5-Math-1.5B")),
    "sequential_scaled": Style(
        order=("planner", "critic", "solver"), edges=SEQUENTIAL, prompts="sequential", links_by_task=True,
        checkpoints=released("Sequential-Scaled-Outerlinks", planner="Sequential-Scaled-Planner-Gemma3-4B",
                             critic="Sequential-Scaled-Critic-Llama3.2-3B",
                             solver="Sequential-Scaled-Solver-Qwen3.5-4B")),
    "mixture": Style(
        order=("math", "code", "science", "summarizer"), prompts="mixture",
        edges={("math", "summarizer"): "outer_1s", ("code", "summarizer"): "outer_2s",
               ("science", "summarizer"): "outer_3s", ("summarizer", "math"): "outer_s1",
               ("summarizer", "code"): "outer_s2", ("summarizer", "science"): "outer_s3"},
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


def style_named(name):
    """The Style of that name; InputError if there is none."""
    check_known("style", [name], STYLES)
    return STYLES[name]
