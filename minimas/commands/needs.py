"""What `--needs` prints: the files of a system, and the memory of a run by agent and by device. Nothing is loaded.

Of a hub repository only config.json is downloaded, and the sizes of its files are asked for. Where the hub does not
answer, the shapes of released agents are known (compat/released.json), and the sizes of files are not.

Notation: B questions at once.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..common import local_path
from ..compat.hub import download, is_reachable
from ..compat.released import recorded_on
from ..load import agent_patterns, links_task
from ..runs.needs import PROMPT, Need, memory_of, needs_of, on_devices, size
from ..runs.outputs import aligned
from ..settings import CompletedSettings
from ..styles import Origin, Source, Style

UNKNOWN = float("inf")


@dataclass(frozen=True)
class Planned:
    """A system that is to be loaded beside others: its name, and what needs_text takes."""

    name: str
    origin: Origin
    style: Style
    settings: CompletedSettings
    task: str


def needs_text(origin: Origin, style: Style, points: Sequence[CompletedSettings], task: str) -> str:
    """The tables of --needs: what each agent needs, and what that comes to on each device."""
    reachable = answers_if_asked(origin, style)
    needs = needs_of(origin, style, points, reachable=reachable)
    return tables(origin, style, needs, points[0].batch_size, task, reachable)


def needs_text_of_all(systems: Sequence[Planned]) -> str:
    """The tables of each system under its name, if there are several, and what all come to on each device."""
    if len(systems) == 1:
        (one,) = systems
        return needs_text(one.origin, one.style, [one.settings], one.task)
    B = systems[0].settings.batch_size
    parts = []
    needs_of_all = {}
    for one in systems:
        reachable = answers_if_asked(one.origin, one.style)
        needs = needs_of(one.origin, one.style, [one.settings], reachable=reachable)
        parts.append(f"{one.name}\n{tables(one.origin, one.style, needs, B, one.task, reachable)}")
        for role, need in needs.items():
            needs_of_all[f"{one.name} {role}"] = need
    names = ", ".join(one.name for one in systems)
    parts.append(f"all together: {names}\n{aligned(devices_table(needs_of_all, B))}")
    return "\n\n".join(parts)


def answers_if_asked(origin: Origin, style: Style) -> bool:
    """Whether the hub answers, if a system has sources there; True if it has none."""
    sources = style.sources(origin.checkpoints)
    asks_hub = any(not is_folder(source) for source in sources.values())
    return not asks_hub or is_reachable()


def tables(
    origin: Origin, style: Style, needs: dict[str, Need], B: int, task: str, reachable: bool
) -> str:
    """The tables of one system, B questions at once."""
    sources = style.sources(origin.checkpoints)
    lines = []
    recorded = [role for role, need in needs.items() if need.recorded]
    if recorded:
        lines.append(
            f"the hub does not answer: the shapes of {', '.join(recorded)} are those recorded for the released "
            f"checkpoints on {recorded_on()}, not all of them for certain (compat/released.json)"
        )
    lines.append(f"prompts of {PROMPT} tokens")
    lines.append(aligned(agents_table(needs, files_of_system(style, sources, task, reachable), B)))
    lines.append("")
    lines.append(aligned(devices_table(needs, B)))
    return "\n".join(lines)


def agents_table(
    needs: Mapping[str, Need], files: Mapping[str, tuple[float, float]], B: int
) -> list[list[str]]:
    """A row for each agent, one for the links if they have files, and one for the whole.

    files  of each role, and of the links: see files_of
    """
    rows = [
        ["", "device", "dtype", "files", "download", "weights", "links", "cache of 1", f"of {B}"]
    ]
    columns = []
    for name, sizes in files.items():
        device = ""
        dtype = ""
        memory = [0, 0, 0, 0]
        if name in needs:
            need = needs[name]
            device = str(need.device)
            dtype = f"{need.dtype}, {need.quantize}" if need.quantize else need.dtype
            memory = [need.weights, need.links, need.cache, B * need.cache]
        numbers = [*sizes, *memory]
        columns.append(numbers)
        rows.append([name, device, dtype, *map(size, numbers)])
    whole = [sum(column) for column in zip(*columns, strict=True)]
    rows.append(["whole", "", "", *map(size, whole)])
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


# Files


def files_of_system(
    style: Style, sources: Mapping[str, Source], task: str, reachable: bool = True
) -> dict[str, tuple[float, float]]:
    """{role, or "links": the sizes of its files}, see files_of."""
    pattern = f"*({links_task(task)}).pt" if style.links_by_task else "*.pt"
    files = {}
    for name, source in sources.items():
        patterns = agent_patterns(task)
        if name == "links":
            patterns = ("outerlink_config.json", pattern)
        files[name] = files_of(source, *patterns, reachable=reachable)
    return files


def files_of(source: Source, *patterns: str, reachable: bool = True) -> tuple[float, float]:
    """(bytes of the files of a folder or repository that match, bytes of those that have to be downloaded).

    Both are infinite if the hub cannot be asked.
    """
    if is_folder(source):
        folder = local_path(source)
        here = 0
        for pattern in patterns:
            here += sum(file.stat().st_size for file in folder.glob(pattern))
        return here, 0
    if not reachable:
        return UNKNOWN, UNKNOWN
    listed: Any = download(str(source), patterns, dry_run=True)
    missing = [file for file in listed if file.will_download]
    whole = sum(file.file_size or 0 for file in listed)
    to_download = sum(file.file_size or 0 for file in missing)
    return whole, to_download


def is_folder(source: Source) -> bool:
    """Whether a source is a folder here, and no repository."""
    return local_path(source).is_dir()
