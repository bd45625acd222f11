"""The styles: who speaks in which order, who hears whom through which link, and where their checkpoints are.

A style is one entry of styles.json, or a file of the same form (docs/extending.md); `recurse` runs any of them with the
same loop. Repository names and link keys are those of the release (huggingface.co/RecursiveMAS); `tiny` ships with this
package, and `single` is one agent that is asked once.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields, replace
from pathlib import Path
from typing import Any

from .common import InputError, check_known, check_text, local_path, read_json
from .prompts import Question
from .style_file import KEYS, check_entry, named_edges, read_style
from .tiny.task import with_labels

Source = str | Path  # a folder, or a hub id

# Section of prompts.json -> what turns a question as typed into what agents read. Other sections take it as it is.
REWRITES = {"tiny": with_labels}


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
    checkpoints: dict[str, Source]
    prompts: str | dict[str, str]
    rounds: int = 3
    latent_steps: int = 32
    max_new_tokens: int = 2000
    temperature: float = 0.6
    task: str = "math"
    calls_tools: bool = False
    links_by_task: bool = False

    @property
    def paradigm(self) -> str:
        """Its name in the manifests of links: the section of its prompts, or `own`."""
        return self.prompts if isinstance(self.prompts, str) else "own"

    def edges_from(self, role: str) -> list[tuple[str, str]]:
        """The edges along which a role sends."""
        return [edge for edge in self.edges if edge[0] == role]

    def is_feedback(self, source: str, target: str) -> bool:
        """Whether what `source` sends is read a round later: `target` speaks before it, or is itself."""
        return self.order.index(source) >= self.order.index(target)

    def question(
        self,
        typed: str,
        fn_name: str | None = "",
        dataset: str | None = None,
        task: str | None = None,
    ) -> Question:
        """The Question that agents read for what the user typed; InputError if this style cannot read it."""
        rewrite = REWRITES.get(self.paradigm)
        text = rewrite(typed) if rewrite else typed
        return Question(text, fn_name, dataset, task, typed)

    def questions(
        self,
        texts: Iterable[str],
        fn_names: Sequence[str | None] | None = None,
        dataset: str | None = None,
    ) -> list[Question]:
        """Texts as typed -> Questions; InputError names one that cannot be read.

        dataset   may be any name: it matters only where the prompts have one of their own for it (`solver_gpqa`)
        """
        if isinstance(texts, str):
            raise InputError("questions is one text: give a list of them")
        if isinstance(texts, Mapping) or not isinstance(texts, Iterable):
            raise InputError(f"questions is {texts!r:.80}, expected a list of texts")
        texts = list(texts)
        for text in texts:
            check_question(text)
        if dataset is not None and not isinstance(dataset, str):
            raise InputError(f"dataset is {dataset!r:.80}, expected a name, or None for none")
        if fn_names is None:
            fn_names = [""] * len(texts)
        check_fn_names(fn_names, len(texts))
        questions = []
        for index, (text, fn_name) in enumerate(zip(texts, fn_names, strict=True)):
            question = self.question(text, fn_name, dataset)
            questions.append(replace(question, index=index))
        return questions

    # Where its checkpoints are

    def sources(
        self,
        given: Source | Mapping[str, Source] | None = None,
        needed: Sequence[str] | None = None,
    ) -> dict[str, Source]:
        """{role, or "links": folder or hub id}, with `given` in place of the style's own.

        given   {role, or "links": folder or hub id}, or one folder that holds a folder for each, named as the role or
                as the released repository; for a style of one agent that agent itself
        needed  which of them are wanted; by default all, and links if the style has some or that one folder does
        Raises InputError on an unknown role and on a folder that is missing.
        """
        if given is None or isinstance(given, Mapping):
            return self.named_sources(given or {}, needed)
        if not is_source(given):
            raise InputError(
                f"the checkpoint is {given!r:.80}, expected a folder, a hub id, or "
                "{role: folder or hub id}"
            )
        if len(self.order) == 1:
            return {self.order[0]: given}
        return self.sources_within(local_path(given), needed)

    def named_sources(
        self, given: Mapping[str, Source], needed: Sequence[str] | None
    ) -> dict[str, Source]:
        """The style's own sources, some of them replaced by those in `given`."""
        check_known("checkpoint of", given, (*self.order, "links"))
        for name, source in given.items():
            if source and not is_source(source):
                raise InputError(
                    f"the checkpoint of {name} is {source!r:.80}, expected a folder or hub id"
                )
        sources = {**self.checkpoints, **given}
        names = needed or list(sources)
        for name in names:
            if not sources.get(name):
                raise InputError(
                    f"{name} has no folder or hub id: give one with --checkpoint {name}=PATH"
                )
        return {name: sources[name] for name in names}

    def sources_within(self, folder: Path, needed: Sequence[str] | None) -> dict[str, Source]:
        """The folders in one folder, each named as the role or as the released repository."""
        names = list(needed or self.checkpoints)
        if not folder.is_dir():
            raise InputError(
                f"there is no folder {folder}: expected one that holds a folder each for {', '.join(names)}; "
                "or name a single one, or a hub id, as ROLE=PATH"
            )
        if not needed and (folder / "links").is_dir() and "links" not in names:
            names.append("links")
        found: dict[str, Source] = {}
        for name in names:
            own = folder / name
            released = folder / Path(self.checkpoints.get(name) or name).name
            if own.is_dir():
                found[name] = own
            elif released.is_dir():
                found[name] = released
            else:
                either = " or ".join(dict.fromkeys([own.name, released.name]))
                raise InputError(
                    f"{folder} holds no folder {either}: expected one each for {', '.join(names)}; "
                    "or name a single one as ROLE=PATH"
                )
        return found

    def __repr__(self) -> str:
        """One screen: the prompts, which are long, by the name of their section."""
        lines = [f"order: {', '.join(self.order)}"]
        for (source, target), key in self.edges.items():
            lines.append(f"edge: {source} > {target}, link {key}")
        for name, checkpoint in self.checkpoints.items():
            lines.append(f"checkpoint of {name}: {str(checkpoint) or 'none'}")
        lines.append(f"prompts: {self.paradigm}")
        defaults = [f"{name}={getattr(self, name)!r}" for name in DEFAULTS]
        lines.append(", ".join(defaults))
        return "Style(\n  " + "\n  ".join(lines) + "\n)"


@dataclass(frozen=True)
class Origin:
    """What a System is loaded from: arguments of load_mas_system, under the same names."""

    style: str | Path = "tiny"
    checkpoints: Source | Mapping[str, Source] | None = None
    device: Any = None
    dtype: Any = None
    offload: bool = False
    fast: bool = False
    quantize: str | None = None


DEFAULTS = [field.name for field in fields(Style) if field.default is not MISSING]


def is_source(value: object) -> bool:
    """Whether a value may be a Source: a path, or a text that is not empty."""
    return isinstance(value, Path) or (isinstance(value, str) and value != "")


def check_question(text: object) -> None:
    """InputError unless it is a text that agents can read."""
    if not isinstance(text, str) or not text.strip():
        raise InputError(
            f"a question is {text!r:.80}, empty or no text: type something to be answered"
        )
    check_text(text, f"the question {text!r:.80}")


def check_fn_names(fn_names: Sequence[str | None], n: int) -> None:
    """InputError unless they are a name, None or "" for each of n questions."""
    if isinstance(fn_names, str):
        raise InputError(
            f"fn_names is {fn_names!r:.80}, expected a list with one for each question"
        )
    if len(fn_names) != n:
        raise InputError(f"{len(fn_names)} fn_names for {n} questions: give one for each")
    for name in fn_names:
        if name is not None and not isinstance(name, str):
            raise InputError(
                f"fn_names has {name!r:.80}, expected the name of a function, None for one without a name, "
                'or "" for a program'
            )


# The table, and files of its form


def style_from(entry: dict[str, Any], file: Path) -> Style:
    """The Style of an entry in the form of styles.json; folders of agents and links are relative to the file.

    InputError names the key that is wrong. A default that is null is left to the Style.
    """
    check_known(f"{file}: key", entry, [*KEYS, *DEFAULTS])
    check_entry(file, entry)
    sources = dict(entry["agents"])
    if entry.get("links"):
        sources["links"] = entry["links"]
    return Style(
        order=tuple(entry["order"]),
        edges=named_edges(file, entry["edges"]),
        checkpoints={name: beside(file, source) for name, source in sources.items()},
        prompts=entry["prompts"],
        **{name: entry[name] for name in DEFAULTS if entry.get(name) is not None},
    )


def beside(file: Path, source: str) -> Source:
    """The folder of that name beside a style's file if there is one, else the source as it is."""
    if source and (file.parent / source).is_dir():
        return file.parent / source
    return source


FILE = Path(__file__).with_name("styles.json")
STYLES = {name: style_from(entry, FILE) for name, entry in read_json(FILE).items()}


def style_named(name: str | Path) -> Style:
    """The Style of that name, or in a .json file; InputError if there is none."""
    if not isinstance(name, (str, Path)):
        raise InputError(
            f"the style is {name!r:.80}, expected one of {', '.join(STYLES)}, or the path of a .json file"
        )
    file = local_path(name)
    if file.suffix == ".json":
        if not file.is_file():
            raise InputError(
                f"there is no style file {name}: give the path of one, or one of {', '.join(STYLES)}"
            )
        return style_from(read_style(file), file)
    check_known("style", [str(name)], [*STYLES, "the path of a .json file"])
    return STYLES[str(name)]
