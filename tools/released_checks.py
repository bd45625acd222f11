"""What tools/released.py checks of a repository: names, manifests, config, shapes, hashes, prompts, logits and links.

Each check adds Findings to a Report, and none changes a file. What is expected is said in a file of the form of
minimas/compat/released.json.

Notation: T tokens, D the agent's width, D_target that of the one who hears.
"""

import gc
import hashlib
import json
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from checkpoints import without_adapter
from huggingface_hub import constants
from safetensors import safe_open
from torch import nn

from minimas.agent import Agent, load_agent, make_fast
from minimas.common import InputError, out_of_memory, read_json, required, write_atomic
from minimas.compat.folder import LINKS
from minimas.compat.hub import download
from minimas.config import TEXT_PART, parse_config, read_config
from minimas.link import InnerLink, OuterLink, fused
from minimas.load import (
    agent_patterns,
    checkpoint_folder,
    decoder_without_weights,
    load_link,
    on_meta,
    parameter_name,
    weight_files,
)
from minimas.runs.needs import memory_of, nbytes, size
from minimas.styles import Source

ROOT = Path(__file__).parent.parent
OK, DIFFERS, MISSING, NOTED = "ok", "differs", "missing", "noted"
SHOWN = 5  # of many findings of one kind; the last line says how many there are
LONGEST = 400  # characters of what is found, and of what is expected
LAST = 64  # tokens of a prompt whose logits are compared
OFF = {torch.float32: 2e-4, torch.float64: 1e-6}  # the most that logits may differ, of the largest
OFF_NARROW = 5e-2  # in bfloat16 and float16, where two correct programs round differently
STEPS = 8  # tokens after the prompt that are read one at a time
LATENTS = 5  # states of a roll-out that are compared
# The most that states of a roll-out may differ: each goes back in, and with it how it was rounded
OFF_LATENTS = {torch.float32: 1e-3, torch.float64: 1e-6}
OFF_LATENTS_NARROW = 0.5
OFF_LINK = 1e-4  # of a link in float32, of its largest output
# Files that need not be there, by the beginnings of their names
NOT_NEEDED = ("README.md", ".gitattributes", "LICENSE", "outer_adapter_config")


@dataclass
class Finding:
    """One line of the page.

    status    ok, differs, missing (something is not there, or was not done), or noted: nothing is known to compare with
    where     whose it is: a role, links, or a channel
    """

    status: str
    where: str
    what: str
    found: str
    expected: str = ""

    def __str__(self) -> str:
        line = f"{self.status:8}{self.where:12}{self.what}: {self.found}"
        if self.expected and self.expected != self.found:
            line += f"; expected {self.expected}"
        return line


@dataclass
class Report:
    """All findings of a run, and what is written beside them.

    head    the style, the versions and the machine
    files   {repository: {file: {"bytes": ..., "sha256": ...}}}
    texts   what agents wrote
    home    what is written as ~; empty if nothing is
    """

    file: Path
    head: dict[str, Any]
    findings: list[Finding] = field(default_factory=list)
    files: dict[str, dict[str, Any]] = field(default_factory=dict)
    texts: list[dict[str, Any]] = field(default_factory=list)
    home: str = field(default_factory=lambda: home_folder())

    def add(self, status: str, where: str, what: str, found: object, expected: object = "") -> None:
        """Add a finding; who ran it is nobody's business."""
        texts = [short(value) for value in (what, found, expected)]
        if self.home:
            texts = [text.replace(self.home, "~") for text in texts]
        self.findings.append(Finding(status, where, *texts))

    def compare(
        self, where: str, what: str, found: object, expected: object, unsure: str | None = None
    ) -> bool:
        """Add ok or differs -> whether it is ok. `unsure`: why what is expected is not certain."""
        same = found == expected
        doubt = f" (not certain: {unsure})" if unsure and not same else ""
        self.add(OK if same else DIFFERS, where, what, found, short(expected) + doubt)
        return same

    def compare_all(
        self,
        where: str,
        what: str,
        found: Mapping[str, Any],
        expected: Mapping[str, Any],
        unsure: Mapping[str, str],
    ) -> None:
        """Compare each name that both have: a line for each that differs, else one for all; none if there are none."""
        names = [name for name in expected if name in found]
        wrong = [name for name in names if found[name] != expected[name]]
        for name in wrong:
            self.compare(where, f"{what} {name}", found[name], expected[name], unsure.get(name))
        if names and not wrong:
            self.add(OK, where, f"{what} files", f"{len(names)} as expected")

    def compare_number(self, where: str, what: str, found: float, most: float) -> None:
        """Add ok if a number is at most `most`, else differs; NaN differs."""
        status = OK if found <= most else DIFFERS
        self.add(status, where, what, f"{found:.1e}", f"at most {most:.0e}")

    @contextmanager
    def part(self, where: str, what: str) -> Iterator[None]:
        """Whatever goes wrong within becomes a finding, and does not end the others. The JSON is written after it."""
        try:
            yield
        except Exception as e:  # a file of others may lead to anything
            if isinstance(e, (InputError, ImportError)) or out_of_memory(e):
                self.add(MISSING, where, what, e, "that it can be done")
            else:
                self.add(DIFFERS, where, what, f"{type(e).__name__}: {e}", "no exception")
        finally:
            self.write()

    def count(self, status: str) -> int:
        """How many findings have this status."""
        return sum(finding.status == status for finding in self.findings)

    @property
    def failed(self) -> bool:
        """Whether anything differs or is missing."""
        return self.count(DIFFERS) + self.count(MISSING) > 0

    def page(self) -> str:
        """All findings as text, a line each."""
        counts = ", ".join(f"{self.count(s)} {s}" for s in (OK, DIFFERS, MISSING, NOTED))
        lines = [f"{self.head['style']}: {counts}", *map(str, self.findings)]
        return "\n".join(lines)

    def write(self) -> None:
        """Write the JSON."""
        whole = {**self.head, "findings": [asdict(finding) for finding in self.findings]}
        whole |= {"files": self.files, "texts": self.texts}
        text = json.dumps(whole, ensure_ascii=False, indent=1) + "\n"
        write_atomic(self.file, lambda path: path.write_text(text, encoding="utf-8"))


def home_folder() -> str:
    """The user's home; empty if there is none, or if it is /, of which every path has some."""
    # In some containers there is no HOME, and the user has no entry in passwd.
    with suppress(RuntimeError):
        home = str(Path.home())
        if len(home) > 1:
            return home
    return ""


def short(value: object) -> str:
    """A value as text of at most LONGEST characters, on one line."""
    text = "".join(c if c.isprintable() else escaped(c) for c in str(value))
    return text if len(text) <= LONGEST else text[: LONGEST - 3] + "..."


def escaped(character: str) -> str:
    """A character that cannot be printed, such as a line feed, as Python writes it."""
    return character.encode("unicode_escape").decode()


class Expected:
    """What is expected, from a file of the form of released.json."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self.whole = read_json(file)
        for key, kind in {"agent_files": list, "models": dict, "repositories": dict}.items():
            if not isinstance(self.whole.get(key), kind):
                raise InputError(
                    f"{file} has no {key}: expected a file of the form of released.json"
                )

    def repository(self, name: str) -> dict[str, Any]:
        """The entry of a repository; of an agent with that of its model under "model"."""
        entry = self.whole["repositories"].get(name)
        if entry is None:
            raise InputError(f"{self.file} has no repository {name}: nothing is known of it")
        if "model" not in entry:
            return entry
        return entry | {"model": self.whole["models"][entry["model"]]}

    def files(self, name: str) -> list[str]:
        """The files that a repository must have."""
        entry = self.repository(name)
        if "model" in entry:
            return [*self.whole["agent_files"], *entry["more_files"]]
        return [LINKS, *(file for _, _, file in link_files(entry))]

    def decoder(self, entry: Mapping[str, Any]) -> Any:
        """The decoder of an agent's entry, without weights."""
        family, config, _ = parse_config(self.file, entry["model"]["config"])
        model = on_meta(family, config)
        return model


def link_files(entry: Mapping[str, Any]) -> list[tuple[str | None, str, str]]:
    """(task or None, key, file) of each link of a repository of links."""
    files = []
    for task in entry["tasks"] or [None]:
        ending = f"({task}).pt" if task else ".pt"
        files += [(task, key, name + ending) for key, (name, _, _) in entry["links"].items()]
    return files


# Names, sizes and hashes


def check_names(
    report: Report, where: str, source: Source, names: Sequence[str], entry: Mapping[str, Any]
) -> None:
    """Which files there are, by what the hub lists, or by a folder or the cache where it is not asked."""
    there = listed(source, names)
    unexpected = []
    for name in sorted(set(there) - set(names)):
        if not name.startswith(NOT_NEEDED):
            unexpected.append(name)
    lacking = [name for name in names if name not in there]
    unsure = entry.get("unsure", {})
    doubt = f" (not certain: {unsure['files']})" if "files" in unsure else ""
    for name in lacking:
        others = f", but {', '.join(unexpected[:SHOWN])}" if unexpected else ""
        report.add(MISSING, where, name, f"not there{others}", f"a file of this name{doubt}")
    if not lacking:
        report.add(OK, where, "names of files", f"all {len(names)} that are expected")
    if unexpected:
        report.add(NOTED, where, "further files", ", ".join(unexpected))
    report.compare_all(where, "bytes of", there, entry.get("bytes", {}), unsure)


def listed(source: Source, names: Sequence[str]) -> dict[str, int]:
    """{name: bytes} of the files of a folder or repository."""
    folder = Path(source).expanduser()
    if not folder.is_dir():
        try:
            files: Any = download(str(source), ["*"], dry_run=True)
            return {file.filename: file.file_size or 0 for file in files}
        except InputError as of_hub:  # perhaps it is not there to be asked: is all in the cache?
            try:
                folder = download(str(source), names, local_files_only=True)
            except InputError:
                raise of_hub from None
    inside = [file for file in folder.rglob("*") if file.is_file()]
    return {file.relative_to(folder).as_posix(): file.stat().st_size for file in inside}


def fetched(source: Source, where: str, names: Sequence[str]) -> Path:
    """The folder of a repository, downloaded as for a run of either task."""
    return checkpoint_folder(source, *patterns_of(names), role=where)


def patterns_of(names: Sequence[str]) -> list[str]:
    """The patterns of all files of a repository that are downloaded."""
    return list(dict.fromkeys([*names, *agent_patterns("math"), *agent_patterns("code")]))


def bytes_to_download(source: Source, names: Sequence[str]) -> int:
    """What `fetched` would download; 0 if it is not known."""
    if Path(source).expanduser().is_dir():
        return 0
    try:
        files: Any = download(str(source), patterns_of(names), dry_run=True)
    except InputError:  # the list of files says what is wrong with it
        return 0
    return sum(file.file_size or 0 for file in files if file.will_download)


def check_disk(needed: int) -> None:
    """InputError if the hub's cache has less room than so many bytes."""
    cache = Path(constants.HF_HUB_CACHE)
    place = next(folder for folder in (cache, *cache.absolute().parents) if folder.is_dir())
    free_bytes = shutil.disk_usage(place).free
    if needed > free_bytes:
        raise InputError(
            f"{size(needed)} are to be downloaded, and the hub's cache {cache} has {size(free_bytes)} free: "
            "make room, or set HF_HUB_CACHE to a folder on a larger disk"
        )


def check_hashes(
    report: Report, where: str, repository: str, folder: Path, entry: Mapping[str, Any]
) -> None:
    """The commit, and the hash of every file: what is known is compared, and all is written down."""
    if folder.parent.name == "snapshots":  # as the hub's cache names them
        commit = entry.get("commit") or "not known"
        report.add(NOTED, where, "commit", folder.name, f"{commit} or a later one")
    known = entry.get("sha256", {})
    found = {}
    for file in sorted(folder.rglob("*")):
        if not file.is_file():
            continue
        name = file.relative_to(folder).as_posix()
        found[name] = {"bytes": file.stat().st_size, "sha256": sha256(file)}
    report.files[repository] = found
    begins = {}
    for name, expected in known.items():
        if name in found:
            begins[name] = found[name]["sha256"][: len(expected)]
    report.compare_all(where, "sha256 of", begins, known, entry.get("unsure", {}))
    others = len(set(found) - set(known))
    if others:
        report.add(NOTED, where, "sha256", f"of {others} files in the JSON, not known before")


def sha256(file: Path) -> str:
    """The hash of a file."""
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


# An agent's files


def check_manifests(report: Report, where: str, folder: Path, entry: Mapping[str, Any]) -> None:
    """adapter_config.json and innerlink_config.json, which say what the inner link is and where."""
    kind = read_json(required(folder, "adapter_config.json")).get("adapter_type")
    report.compare(where, "adapter_type", kind, InnerLink.adapter_type)
    if "innerlink_config.json" not in entry["more_files"]:
        return
    tasks = read_json(required(folder, "innerlink_config.json")).get("tasks", {})
    found = {task: files.get("adapter.pt") for task, files in tasks.items()}
    expected = {task: f"adapter({task}).pt" for task in ("math", "code")}
    report.compare(where, "innerlink_config.json", found, expected)


def check_config(
    report: Report, where: str, folder: Path, expected: Expected, entry: Mapping[str, Any]
) -> None:
    """config.json, field by field where they differ."""
    recorded = entry["model"]["config"]
    unsure = entry["model"].get("unsure", {})
    kind = read_json(folder / "config.json").get("model_type")
    kinds = (recorded["model_type"], TEXT_PART.get(kind, kind))
    _, found, dtype = read_config(folder)
    _, wanted, wanted_dtype = parse_config(expected.file, recorded)
    fields = [("model_type", kinds[1], kinds[0]), ("dtype", dtype, wanted_dtype)]
    named = [name for name in recorded if name not in ("model_type", "dtype")]
    if hasattr(wanted, "layer_types") and "layer_types" not in named:
        named.append("layer_types")
    for name in named:
        fields.append((name, getattr(found, name, None), getattr(wanted, name, None)))
    wrong = [one for one in fields if one[1] != one[2]]
    for name, ours, theirs in wrong:
        report.compare(where, f"config.json: {name}", ours, theirs, unsure.get(name))
    if not wrong:
        report.add(OK, where, "config.json", f"{len(fields)} fields", "those that are recorded")


def check_weights(report: Report, where: str, folder: Path, model: Any) -> None:
    """Names and shapes of all tensors, without reading one. `model` is the expected decoder, without weights."""
    expected = {name: tuple(p.shape) for name, p in model.named_parameters(remove_duplicate=False)}
    found: dict[str, tuple[int, ...]] = {}
    dtypes: Counter[str] = Counter()
    prefixes: Counter[str] = Counter()
    skipped: Counter[str] = Counter()
    for file in weight_files(folder).values():
        with safe_open(file, framework="pt") as tensors:
            for key in tensors.keys():  # noqa: SIM118, it is no dict
                name = parameter_name(key)
                if name is None:
                    skipped[key.split(".")[0]] += 1
                    continue
                stored = tensors.get_slice(key)
                found[name] = tuple(stored.get_shape())
                dtypes[stored.get_dtype()] += 1
                prefixes[key.removesuffix(name) or "none"] += 1
    head = "lm_head.weight"
    tied = model.config.tie_word_embeddings
    optional = {head} if tied else set()
    absent = sorted(set(expected) - set(found) - optional)
    unknown = sorted(set(found) - set(expected))
    wrong = [name for name in expected if name in found and found[name] != expected[name]]
    for name in absent[:SHOWN]:
        report.add(MISSING, where, f"tensor {name}", "not there", f"shape {expected[name]}")
    for name in unknown[:SHOWN]:
        report.add(DIFFERS, where, f"tensor {name}", f"shape {found[name]}", "no such tensor")
    for name in wrong[:SHOWN]:
        report.add(DIFFERS, where, f"tensor {name}", f"shape {found[name]}", f"{expected[name]}")
    faults = len(absent) + len(unknown) + len(wrong)
    if faults:
        counts = f"{len(absent)} absent, {len(unknown)} unknown, {len(wrong)} of another shape"
        report.add(DIFFERS, where, "tensors", counts, f"{len(expected)} as config.json makes them")
    else:
        report.add(OK, where, "tensors", f"{len(found)} with the expected names and shapes")
    if tied:
        report.add(NOTED, where, f"{head} beside its tied embedding", head in found)
    report.add(NOTED, where, "prefixes of tensors", dict(prefixes))
    report.add(NOTED, where, "dtypes of tensors", dict(dtypes))
    if skipped:
        report.add(NOTED, where, "tensors that a text decoder has no use for", dict(skipped))


# Text


def check_text(
    report: Report, where: str, folder: Path, agent: Agent, entry: Mapping[str, Any]
) -> None:
    """Where texts end, what top_k is, and what the chat template makes of two messages."""
    recorded = entry["model"]
    unsure = recorded.get("unsure", {})
    raw = read_json(required(folder, "generation_config.json"))
    ends = raw.get("eos_token_id")
    ends = sorted(ends if isinstance(ends, list) else [ends])
    wanted = sorted(recorded["eos_token_id"])
    report.compare(where, "eos_token_id", ends, wanted, unsure.get("eos_token_id"))
    report.compare(where, "top_k", raw.get("top_k"), recorded["top_k"], unsure.get("top_k"))
    tokenizer = agent.tokenizer
    eos = tokenizer.named.get("eos_token")
    report.compare(where, "eos_token", eos, recorded["eos_token"], unsure.get("eos_token"))
    report.add(NOTED, where, "a text ends at", agent.generation_config.eos_ids)
    prompt = tokenizer.chat("S", "U")
    report.compare(where, "chat template", prompt, recorded["prompt"], unsure.get("prompt"))


# Numbers


class Numbers(NamedTuple):
    """What an agent computed, on the CPU.

    ids      (1, T) that it read
    logits   (LAST, vocabulary) of the last of them, in float32
    of_chat  the ids of the whole text, of which `ids` are the beginning
    dtype    of the agent
    """

    ids: torch.Tensor
    logits: torch.Tensor
    of_chat: list[int]
    dtype: torch.dtype

    @property
    def name(self) -> str:
        """What a finding calls it."""
        return f"logits after {self.ids.shape[1]} tokens in {dtype_name(self.dtype)}"

    @property
    def most(self) -> float:
        """How far others' logits may be off, of the largest."""
        return OFF.get(self.dtype, OFF_NARROW)


def load_plain(
    report: Report, role: str, folder: Path, dtype: torch.dtype | None, device: torch.device
) -> Agent:
    """The agent of a folder in the plain form. InputError if its weights do not fit into memory.

    dtype   None is that of the file, which is also taken where another would not fit
    """
    model, stored = decoder_without_weights(folder)
    memory = memory_of(device)
    chosen = dtype or stored
    if nbytes(model.to(chosen).parameters()) > memory:
        chosen = stored
    needed = nbytes(model.to(chosen).parameters())
    if needed > memory:
        raise InputError(
            f"its weights take {size(needed)} in {dtype_name(chosen)}, and {device} has {size(memory)}: "
            "take a larger machine"
        )
    agent = load_agent(folder, "math", device, chosen, role=role)
    report.add(OK, role, "loading it", f"{type(agent.model).__name__} in {dtype_name(chosen)}")
    return agent


def chat(agent: Agent, text: str) -> str:
    """What an agent reads before its logits are compared."""
    return agent.tokenizer.chat("You are a careful reader.", text)


@torch.no_grad()
def check_fast(report: Report, role: str, agent: Agent, text: str, tokens: int) -> Numbers:
    """The fast form of an agent against the plain one -> the prefill logits of the plain one.

    A prefill does not take the steps that texts and latents are made of. So tokens are read one at a time behind it,
    and some latent steps are taken, which on CUDA replay graphs.

    text    what it reads, cut to so many tokens
    agent   in the plain form; it is put on the fast path
    """
    of_chat = agent.tokenizer.encode(chat(agent, text))
    ids = torch.tensor([of_chat[:tokens]])
    of_prefill, of_steps = logits_with_steps(agent, ids)
    numbers = Numbers(ids, of_prefill, of_chat, agent.model.norm.weight.dtype)
    with report.part(role, "fast path"):
        states = latents(agent, ids)
        make_fast(agent)
        fast_prefill, fast_steps = logits_with_steps(agent, ids)
        off = distance(fast_prefill, of_prefill)
        report.compare_number(role, f"{numbers.name}, fast path against plain", off, numbers.most)
        what = f"{len(of_steps)} steps of the fast path against plain"
        report.compare_number(role, what, distance(fast_steps, of_steps), numbers.most)
        if states is not None:
            what = f"{LATENTS} latents of the fast path against plain"
            most = OFF_LATENTS.get(numbers.dtype, OFF_LATENTS_NARROW)
            report.compare_number(role, what, distance(latents(agent, ids), states), most)
    return numbers


@torch.no_grad()
def check_transformers(
    report: Report, role: str, folder: Path, prompt: str, numbers: Numbers, device: torch.device
) -> None:
    """Token ids of a prompt, and prefill logits, against those of transformers."""
    with report.part(role, "token ids"):
        same = their_ids(folder, prompt) == numbers.of_chat
        report.compare(role, f"{len(numbers.of_chat)} token ids equal transformers'", same, True)
    with report.part(role, "logits of transformers"):
        theirs = their_logits(folder, numbers.ids, numbers.dtype, device)
        off = distance(numbers.logits, theirs)
        what = f"{numbers.name}, minimas against transformers"
        report.compare_number(role, what, off, numbers.most)
        tell_agreement(report, role, "transformers", numbers.logits, theirs)
    free()


@torch.no_grad()
def check_quantised(
    report: Report, role: str, agent: Agent, numbers: Numbers, quantize: str
) -> None:
    """How far the logits of a quantised agent are from those that it had before; nothing is expected of them."""
    with agent.at_work():
        found = logits(agent, numbers.ids)
    off = distance(found, numbers.logits)
    report.add(NOTED, role, f"logits in {quantize}", f"{off:.1e} off", "close to those before")
    tell_agreement(report, role, f"{quantize} and before", found, numbers.logits)


def tell_agreement(
    report: Report, role: str, whom: str, ours: torch.Tensor, theirs: torch.Tensor
) -> None:
    """Note how often the likeliest token is the same."""
    alike = (ours.argmax(-1) == theirs.argmax(-1)).float().mean()
    report.add(NOTED, role, f"likeliest tokens, {whom}", f"{alike:.1%} of {len(ours)} agree")


def logits(agent: Agent, ids: torch.Tensor) -> torch.Tensor:
    """ids (1, T) -> logits of the last LAST tokens in float32, on the CPU."""
    return prefill(agent, ids, agent.model.make_cache(1, ids.shape[1]))


def prefill(agent: Agent, ids: torch.Tensor, cache: list) -> torch.Tensor:
    """The same, into a cache."""
    model = agent.model
    ids = ids.to(agent.device)
    T = ids.shape[1]
    positions = torch.arange(T, device=agent.device)[None]
    h = model(model.embed(ids), positions, cache, last=min(T, LAST))
    return model.logits(h[0]).float().cpu()


def logits_with_steps(agent: Agent, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """ids (1, T) -> the same, and (STEPS, vocabulary) of the first of ids again, one at a time behind them."""
    model = agent.model
    T = ids.shape[1]
    cache = model.make_cache(1, T + STEPS)
    of_prefill = prefill(agent, ids, cache)
    of_steps = []
    for i in range(STEPS):
        token = ids[:, i % T : i % T + 1].to(agent.device)
        position = torch.full((1, 1), T + i, device=agent.device)
        h = model(model.embed(token), position, cache, last=1)
        of_steps.append(model.logits(h[0]).float().cpu())
    return of_prefill, torch.cat(of_steps)


def latents(agent: Agent, ids: torch.Tensor) -> torch.Tensor | None:
    """ids (1, T) -> LATENTS states after the last LAST of them, on the CPU; None if the agent has no inner link."""
    if agent.inner_link is None:
        return None
    states = agent.think([[ids[0, -LAST:]]], LATENTS).float().cpu()
    agent.release()
    return states


def distance(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """The largest difference, of the largest number; NaN if a number is no number."""
    off = (ours.double() - theirs.double()).abs().max()
    return float(off / theirs.double().abs().max())


def dtype_name(dtype: torch.dtype) -> str:
    """A dtype as users write it."""
    return str(dtype).removeprefix("torch.")


def free() -> None:
    """Give back the memory of what was dropped."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def their_ids(folder: Path, text: str) -> list[int]:
    """What the tokenizer of transformers makes of a text."""
    from transformers import AutoTokenizer

    with without_adapter(folder) as view:
        tokenizer = AutoTokenizer.from_pretrained(view)
        return tokenizer(text, add_special_tokens=False).input_ids


def their_logits(
    folder: Path, ids: torch.Tensor, dtype: torch.dtype, device: torch.device
) -> torch.Tensor:
    """The same as `logits`, by transformers."""
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    with without_adapter(folder) as view:
        model = AutoModelForCausalLM.from_pretrained(view, dtype=dtype, attn_implementation="eager")
    model = model.eval().to(device)
    out = model(input_ids=ids.to(device), use_cache=False, logits_to_keep=LAST)
    return out.logits[0].float().cpu()


@torch.no_grad()
def check_link(
    report: Report,
    where: str,
    file: Path,
    kind: type[nn.Module],
    sizes: tuple[int, ...],
    plain: Callable[[Mapping[str, torch.Tensor]], Callable[[torch.Tensor], torch.Tensor]],
) -> None:
    """The keys and shapes of a link's file; the link and its fused form against plain torch modules in float64.

    kind   InnerLink or OuterLink, of these sizes
    plain  makes the function of the link of a state dict
    """
    with report.part(where, file.name):
        state = torch.load(file, map_location="cpu", weights_only=True)
        found = {key: tuple(tensor.shape) for key, tensor in state.items()}
        with torch.device("meta"):
            wanted = {key: tuple(t.shape) for key, t in kind(*sizes).state_dict().items()}
        wrong = [key for key in wanted if found.get(key) != wanted[key]]
        wrong += [key for key in found if key not in wanted]
        for key in wrong[:SHOWN]:
            shape = found.get(key, "not there")
            report.add(DIFFERS, where, f"{file.name}, {key}", shape, wanted.get(key, "no such key"))
        if wrong:
            return
        dtypes = sorted({dtype_name(tensor.dtype) for tensor in state.values()})
        what = f"{file.name}, {len(found)} tensors in {', '.join(dtypes)}, against torch modules"
        generator = torch.Generator().manual_seed(0)
        h = torch.randn(64, sizes[0], generator=generator, dtype=torch.float64)
        expected = plain({key: tensor.double() for key, tensor in state.items()})(h)
        loaded = load_link(kind(*sizes), file, dtype=torch.float32)
        off = max(distance(form(h.float()), expected) for form in (loaded, fused(loaded)))
        report.compare_number(where, what, off, OFF_LINK)


def plain_inner(state: Mapping[str, torch.Tensor]) -> Callable[[torch.Tensor], torch.Tensor]:
    """The inner link of a state dict as torch modules: LN(h + W2 gelu(W1 LN(h)))."""
    pre_ln, post_ln = torch_norm(state, "pre_ln"), torch_norm(state, "post_ln")
    proj1, proj2 = torch_linear(state, "proj1"), torch_linear(state, "proj2")
    return lambda h: post_ln(h + proj2(F.gelu(proj1(pre_ln(h)))))


def plain_outer(state: Mapping[str, torch.Tensor]) -> Callable[[torch.Tensor], torch.Tensor]:
    """The outer link of a state dict as torch modules: LN(W2 gelu(W1 LN(h)) + W3 h)."""
    source, target = torch_norm(state, "ln_source"), torch_norm(state, "ln_target")
    proj1, proj2 = torch_linear(state, "proj1"), torch_linear(state, "proj2")
    residual = torch_linear(state, "residual_proj")
    return lambda h: target(proj2(F.gelu(proj1(source(h)))) + residual(h))


def torch_norm(state: Mapping[str, torch.Tensor], name: str) -> nn.LayerNorm:
    """The LayerNorm of this name in a state dict."""
    weight = state[f"{name}.weight"]
    norm = nn.LayerNorm(len(weight), eps=1e-5, dtype=weight.dtype)
    norm.load_state_dict({"weight": weight, "bias": state[f"{name}.bias"]})
    return norm


def torch_linear(state: Mapping[str, torch.Tensor], name: str) -> nn.Linear:
    """The Linear of this name in a state dict."""
    weight = state[f"{name}.weight"]
    N, D = weight.shape
    linear = nn.Linear(D, N, dtype=weight.dtype)
    linear.load_state_dict({"weight": weight, "bias": state[f"{name}.bias"]})
    return linear


# The repository of links


def check_outer_manifest(
    report: Report, folder: Path, entry: Mapping[str, Any], edges: Mapping[tuple[str, str], str]
) -> None:
    """outerlink_config.json: the links of each task, with their files, roles and widths."""
    manifest = read_json(required(folder, LINKS))
    ends = {key: edge for edge, key in edges.items()}
    for task in entry["tasks"] or [None]:
        part = manifest.get("tasks", {}).get(task, {}) if task else manifest
        where = f"{LINKS}, {task}" if task else LINKS
        adapters = {one.get("legacy_key"): one for one in part.get("adapters", [])}
        found: dict[str, Any] = {"keys": sorted(adapters, key=str)}
        expected: dict[str, Any] = {"keys": sorted(entry["links"])}
        for key, (file, D, D_target) in entry["links"].items():
            source, target = ends[key]
            wanted = {
                "filename": file + (f"({task}).pt" if task else ".pt"),
                "source_role": source,
                "target_role": target,
                "adapter_type": OuterLink.adapter_type,
                "in_dim": D,
                "out_dim": D_target,
            }
            for field_name, value in wanted.items():
                name = f"{field_name} of {key}"
                expected[name] = value
                if key not in adapters:
                    continue
                found[name] = adapters[key].get(field_name)
                if field_name.endswith("_role"):  # nobody knows how the release writes them
                    found[name] = str(found[name]).lower()
        wrong = [name for name in found if found[name] != expected[name]]
        for name in wrong:
            report.compare("links", f"{where}: {name}", found[name], expected[name])
        if not wrong:
            report.add(OK, "links", where, f"{len(adapters)} links with all that is expected")
