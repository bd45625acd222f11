"""What a run needs before anything is loaded: its files, and memory for weights, links and KV caches (`--needs`).

It is computed from each agent's config.json and from the names and sizes of files. Nothing else is downloaded.
A decoder without weights, on torch's meta device, has the sizes of all its tensors, and makes caches with the sizes of
real ones. Activations, scores over the vocabulary, and what PyTorch and CUDA take for themselves are not counted.

Notation: B questions at once, S positions of a cache.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ..common import InputError
from ..link import InnerLink, OuterLink
from ..load import (
    agent_patterns,
    checkpoint_folder,
    decoder_without_weights,
    devices_by_role,
    download,
    links_task,
    usable_dtype,
)
from ..settings import CompletedSettings
from ..styles import Origin, Style
from .outputs import aligned

PROMPT = 512  # tokens that a prompt is taken to have, with what it hears from others


@dataclass
class Need:
    """What an agent needs, in bytes.

    device   where it computes
    dtype    in what, by name
    weights  of the decoder; with --offload they are on the device for a turn only
    cache    the largest that it makes, for one question
    links    its inner link and the outer links that leave it, if their files are no wider than its dtype
    """

    device: torch.device
    dtype: str
    weights: int
    cache: int
    links: int


def needs_of(
    origin: Origin,
    style: Style,
    points: Sequence[CompletedSettings],
    prompt: int = PROMPT,
) -> dict[str, Need]:
    """{role: Need} of a run. InputError if a config.json cannot be fetched or read.

    points   the completed Settings of the run; of several the largest cache counts
    prompt   tokens of a prompt
    """
    sources = style.sources(origin.checkpoints)
    devices = devices_by_role(style.order, origin.device)
    models = {}
    for role, device in devices.items():
        folder = checkpoint_folder(sources[role], "config.json", role=role)
        model, stored = decoder_without_weights(folder)
        models[role] = model.to(usable_dtype(origin.dtype, device) or stored)
    widths = {role: model.config.hidden_size for role, model in models.items()}

    needs = {}
    for role, model in models.items():
        needs[role] = Need(
            device=devices[role],
            dtype=str(model.norm.weight.dtype).removeprefix("torch."),
            weights=weight_bytes(model),
            cache=max(cache_bytes(model, style, role, point, prompt) for point in points),
            links=links_bytes(style, role, widths, model.norm.weight.dtype),
        )
    return needs


def weight_bytes(model: Any) -> int:
    """Of a decoder; a head that is tied to the embedding counts once."""
    total = nbytes(model.parameters())
    if model.config.tie_word_embeddings:
        total -= model.lm_head.weight.nbytes
    return total


def cache_bytes(model: Any, style: Style, role: str, point: CompletedSettings, prompt: int) -> int:
    """Of the largest cache that an agent makes for one question: to think or write for others, or to answer."""
    is_text = point.channel == "text"
    steps = point.max_new_tokens if is_text else point.latent_steps
    writes = role == style.order[-1]
    sends = steps > 0 and (point.rounds > 1 or not writes)
    sizes = [0]
    if sends:
        sizes.append(layers_bytes(model, prompt + steps))
    if writes:
        sizes.append(point.rollouts * layers_bytes(model, prompt + point.max_new_tokens))
    return max(sizes)


def layers_bytes(model: Any, S: int) -> int:
    """Of the cache of one row, all layers together."""
    total = 0
    for layer in model.make_cache(1, S):
        total += nbytes(getattr(layer, name) for name in layer.tensors)
    return total


def links_bytes(style: Style, role: str, widths: dict[str, int], dtype: torch.dtype) -> int:
    """Of the inner link of a role and the outer links that leave it."""
    D = widths[role]
    with torch.device("meta"):
        links: list[torch.nn.Module] = [InnerLink(D)]
        links += [OuterLink(D, widths[target]) for source, target in style.edges if source == role]
    return sum(nbytes(link.to(dtype).parameters()) for link in links)


def nbytes(tensors: Iterable[torch.Tensor]) -> int:
    """The bytes of several tensors."""
    return sum(tensor.nbytes for tensor in tensors)


# On the devices


def on_devices(
    needs: dict[str, Need], B: int, offload: bool, least: bool = False
) -> dict[torch.device, int]:
    """{device: bytes} that needs come to for B questions at once.

    least  count only what every such run needs: no links, and of the caches that agents may keep from turn to turn one
    """
    totals: dict[torch.device, int] = {}
    if offload:
        totals[torch.device("cpu")] = sum(need.weights for need in needs.values())
    for device in dict.fromkeys(need.device for need in needs.values()):
        here = [need for need in needs.values() if need.device == device]
        caches = [B * need.cache for need in here]
        if offload:  # one agent's at a time
            work = max(need.weights + B * need.cache for need in here)
        else:
            work = sum(need.weights for need in here) + (max(caches) if least else sum(caches))
        if not least:
            work += sum(need.links for need in here)
        totals[device] = totals.get(device, 0) + work
    return totals


def memory_of(device: torch.device) -> float:
    """All the memory of a device in bytes, free or not, for a CPU with its swap; infinite if it is not known."""
    if device.type == "cuda" and torch.cuda.is_available():
        return torch.cuda.get_device_properties(device).total_memory
    file = Path("/proc/meminfo")
    if device.type != "cpu" or not file.exists():
        return float("inf")
    lines = re.findall(r"^(?:MemTotal|SwapTotal): +(\d+) kB", file.read_text(), re.MULTILINE)
    kilobytes = sum(int(line) for line in lines)
    return 1024 * kilobytes or float("inf")


def least_bytes(
    origin: Origin, style: Style, points: Sequence[CompletedSettings], B: int
) -> dict[torch.device, int]:
    """{device: bytes} that a run needs for certain for B questions at once: as if their prompts were empty."""
    needs = needs_of(origin, style, points, prompt=0)
    return on_devices(needs, B, origin.offload, least=True)


def check_memory(origin: Origin, style: Style, points: Sequence[CompletedSettings], B: int) -> None:
    """InputError if B questions at once need more than all the memory of a device, even if their prompts were empty."""
    for device, needed in least_bytes(origin, style, points, B).items():
        memory = memory_of(device)
        if needed <= memory:
            continue
        weights = least_bytes(origin, style, points, 0)[device]
        ways = {
            "--offload": least_bytes(replace(origin, offload=True), style, points, B),
            "--batch-size 1": least_bytes(origin, style, points, 1),
            "--dtype bfloat16": least_bytes(replace(origin, dtype="bfloat16"), style, points, B),
        }
        helps = [
            f"{option} ({size(then[device])})"
            for option, then in ways.items()
            if then[device] < needed
        ]
        helps.append("fewer --max-new-tokens")
        raise InputError(
            f"{device} has {size(memory)} of memory, and this run needs at least {size(needed)} there, "
            f"{size(weights)} of weights and {size(needed - weights)} of caches for {B} at once: try "
            f"{', '.join(helps)} or another --device; --needs prints a table"
        )


# The tables


def needs_text(origin: Origin, style: Style, points: Sequence[CompletedSettings], task: str) -> str:
    """The tables of --needs: what each agent needs, and what that comes to on each device."""
    needs = needs_of(origin, style, points)
    B = points[0].batch_size
    agents = agents_table(needs, style, style.sources(origin.checkpoints), task, B)
    return f"prompts of {PROMPT} tokens\n{aligned(agents)}\n\n{aligned(devices_table(needs, B))}"


def agents_table(
    needs: dict[str, Need], style: Style, sources: dict[str, str | Path], task: str, B: int
) -> list[list[str]]:
    """A row for each agent, one for the links if there are some, and one for the whole."""
    names = []
    numbers = []
    for role, need in needs.items():
        names.append([role, str(need.device), need.dtype])
        memory = [need.weights, need.links, need.cache, B * need.cache]
        numbers.append([*files_of(sources[role], *agent_patterns(task)), *memory])
    if "links" in sources:
        pattern = f"*({links_task(task)}).pt" if style.links_by_task else "*.pt"
        names.append(["links", "", ""])
        numbers.append([*files_of(sources["links"], "outerlink_config.json", pattern), 0, 0, 0, 0])
    names.append(["whole", "", ""])
    numbers.append([sum(column) for column in zip(*numbers, strict=True)])

    rows = [
        ["", "device", "dtype", "files", "download", "weights", "links", "cache of 1", f"of {B}"]
    ]
    for own_names, own_numbers in zip(names, numbers, strict=True):
        rows.append([*own_names, *map(size, own_numbers)])
    return rows


def devices_table(needs: dict[str, Need], B: int) -> list[list[str]]:
    """A row for each device: what the run needs there, for B questions at once and for one, and what there is."""
    titles = ["at once"]
    ways = []
    for offload in (False, True):
        for n in dict.fromkeys([B, 1]):
            titles.append(f"{n}, --offload" if offload else str(n))
            ways.append(on_devices(needs, n, offload))
    rows = [[*titles, "there is"]]
    for device in ways[-1]:  # with --offload the CPU is always among them
        bytes_there = [way.get(device, 0) for way in ways]
        rows.append([str(device), *map(size, bytes_there), size(memory_of(device))])
    return rows


def files_of(source: str | Path, *patterns: str) -> tuple[int, int]:
    """(bytes of the files of a folder or repository that match, bytes of those that have to be downloaded)."""
    folder = Path(source).expanduser()
    if folder.is_dir():
        matching = [file for pattern in patterns for file in folder.glob(pattern)]
        return sum(file.stat().st_size for file in matching), 0
    listed: Any = download(str(source), patterns, dry_run=True)
    missing = [file for file in listed if file.will_download]
    return sum(file.file_size or 0 for file in listed), sum(file.file_size or 0 for file in missing)


def size(n: float) -> str:
    """Bytes as text; `?` for infinity."""
    if n == float("inf"):
        return "?"
    if n >= 1e9:
        return f"{n / 1e9:.2f} GB"
    return f"{n / 1e6:.2f} MB"
