"""What the released styles need on one GPU, quantised or not: the table of docs/evaluating.md.

    python tools/needs_table.py

It is computed as `--needs` computes it, in bfloat16 and with the default settings, from the shapes that are recorded in
minimas/compat/released.json. No network is asked, and no file of a checkpoint is read.
"""

import json
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from minimas.commands.failures import command
from minimas.compat.released import recorded_config
from minimas.runs.needs import Need, needs_of, on_devices, size
from minimas.settings import Settings
from minimas.styles import STYLES, Origin

RELEASED = ("sequential_light", "sequential_scaled", "mixture", "distillation", "deliberation")
MODES = {"bfloat16": None, "int8": "int8", "int4": "int4"}
MEMORIES = (8, 12, 16, 24)  # GB
ROOM = 1e9  # bytes left for activations, and for what PyTorch and CUDA take for themselves
TITLES = (
    "style",
    "weights in",
    "weights",
    "links",
    "cache of 1",
    "8 at once",
    "1 at once",
    "fits",
    "1, `--offload`",
    "fits",
)
GPU = torch.device("cuda")  # it need not be there


def write_configs(folder: Path, style: str) -> Path:
    """A folder for each agent of a released style, with the recorded config.json and nothing else; returns `folder`."""
    for role, source in STYLES[style].checkpoints.items():
        own = folder / role
        own.mkdir()
        config = recorded_config(str(source))
        if config is not None:  # the links have none
            (own / "config.json").write_text(json.dumps(config))
    return folder


def needs_on_gpu(style: str, quantize: str | None) -> dict[str, Need]:
    """{role: Need} of a released style whose agents all run on one GPU in bfloat16."""
    settings = Settings().completed(STYLES[style])
    with TemporaryDirectory() as folder:
        checkpoints = write_configs(Path(folder), style)
        origin = Origin(style, checkpoints, "cpu", "bfloat16", quantize=quantize)
        needs = needs_of(origin, STYLES[style], [settings])
    return {role: replace(need, device=GPU) for role, need in needs.items()}


def smallest(needed: float) -> str:
    """The smallest memory that this many bytes fit into with some room."""
    for memory in MEMORIES:
        if needed + ROOM <= memory * 1e9:
            return f"{memory} GB"
    return "none"


def row(style: str, mode: str) -> list[str]:
    """A row of the table: a style in one of MODES."""
    needs = needs_on_gpu(style, MODES[mode])
    weights = sum(need.weights for need in needs.values())
    links = sum(need.links for need in needs.values())
    caches = sum(need.cache for need in needs.values())
    several = on_devices(needs, 8, offload=False)[GPU]
    one = on_devices(needs, 1, offload=False)[GPU]
    offloaded = on_devices(needs, 1, offload=True)[GPU]
    sizes = [size(n) for n in (weights, links, caches, several, one)]
    return [f"`{style}`", mode, *sizes, smallest(one), size(offloaded), smallest(offloaded)]


def table() -> str:
    """The table in Markdown."""
    rows = [list(TITLES), ["---"] * len(TITLES)]
    for style in RELEASED:
        rows += [row(style, mode) for mode in MODES]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in rows)


def main() -> None:
    print(table())


if __name__ == "__main__":
    command(main)
