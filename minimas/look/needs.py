"""What a run needs before anything is loaded: its files, and memory for weights, links and KV caches (`--needs`).

It is computed from each agent's config.json and from the names and sizes of files; nothing else is downloaded. A decoder
without weights, on torch's meta device, has the sizes of all its tensors, and makes caches with the sizes of real ones.
Activations, scores over the vocabulary, and what PyTorch and CUDA take for themselves are not counted.
"""

import re
from dataclasses import dataclass
from pathlib import Path

import torch

from ..common import InputError, aligned, checkpoints
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

PROMPT = 512  # tokens that a prompt is taken to have, with what it hears from others


@dataclass
class Need:
    """What an agent needs, in bytes.

    device   where it computes
    model    its decoder in the dtype of the run, without weights
    weights  of the decoder; with --offload they are on the device for a turn only
    cache    the largest that it makes, for one question
    links    its inner link and the outer links that leave it, if their files are no wider than its dtype
    """

    device: torch.device
    model: torch.nn.Module
    weights: int
    cache: int
    links: int = 0


def needs_of(args, style, points, prompt=PROMPT, dtype=None):
    """{role: Need} of a command's run. InputError if a config.json cannot be fetched or read.

    points   the completed Settings of the run; of several the largest cache counts
    prompt   tokens of a prompt
    dtype    its name, in place of the command's
    """
    sources, needs = style.sources(checkpoints(args.checkpoint)), {}
    for role, device in devices_by_role(style.order, args.device).items():
        model, stored = decoder_without_weights(
            checkpoint_folder(sources[role], "config.json", role=role)
        )
        model.to(usable_dtype(dtype or args.dtype, device) or stored)
        tied = (
            model.lm_head.weight.nbytes * model.config.tie_word_embeddings
        )  # the head is the embedding: counted once
        cache = max(
            (
                rows
                * nbytes(getattr(c, name) for c in model.make_cache(1, S) for name in c.tensors)
                for point in points
                for rows, S in caches(style, role, point, prompt)
            ),
            default=0,
        )
        needs[role] = Need(device, model, nbytes(model.parameters()) - tied, cache)
    widths = {role: need.model.config.hidden_size for role, need in needs.items()}
    with torch.device("meta"):
        links = [
            *((role, InnerLink(D)) for role, D in widths.items()),
            *(
                (source, OuterLink(widths[source], widths[target]))
                for source, target in style.edges
            ),
        ]
    for role, link in links:
        needs[role].links += nbytes(link.to(needs[role].model.norm.weight.dtype).parameters())
    return needs


def caches(style, role, point, prompt):
    """[(rows, positions)] of the caches that an agent makes for one question: to send something, and to write the answer."""
    writes, steps = (
        role == style.order[-1],
        point.max_new_tokens if point.channel == "text" else point.latent_steps,
    )
    sends = steps > 0 and (point.rounds > 1 or not writes)
    return [(1, prompt + steps)] * sends + [
        (point.rollouts, prompt + point.max_new_tokens)
    ] * writes


def nbytes(tensors):
    """The bytes of several tensors."""
    return sum(tensor.nbytes for tensor in tensors)


def on_devices(needs, B, offload, least=False):
    """{device: bytes} that needs come to for B questions at once.

    least  count only what every such run needs: no links, and of the caches that agents may keep from turn to turn one
    """
    totals = {torch.device("cpu"): sum(need.weights for need in needs.values())} if offload else {}
    for device in {need.device: None for need in needs.values()}:
        own = [need for need in needs.values() if need.device == device]
        work = (
            max(need.weights + B * need.cache for need in own)
            if offload
            # what the largest turn needs, or all
            else sum(need.weights for need in own)
            + B * (max if least else sum)(need.cache for need in own)
        )
        totals[device] = (
            totals.get(device, 0) + work + (0 if least else sum(need.links for need in own))
        )
    return totals


def memory_of(device):
    """All the memory of a device in bytes, free or not, for a CPU with its swap; infinite if it is not known."""
    if device.type == "cuda" and torch.cuda.is_available():
        return torch.cuda.get_device_properties(device).total_memory
    file = Path("/proc/meminfo")
    text = file.read_text() if device.type == "cpu" and file.exists() else ""
    return 1024 * sum(
        map(int, re.findall(r"^(?:MemTotal|SwapTotal): +(\d+) kB", text, re.MULTILINE))
    ) or float("inf")


def check_memory(args, style, points, B):
    """InputError if B questions at once need more than all the memory of a device, even if their prompts were empty."""

    def least(B=B, offload=args.offload, dtype=None):
        return on_devices(needs_of(args, style, points, 0, dtype), B, offload, least=True)

    for device, needed in least().items():
        if needed > (memory := memory_of(device)):
            weights = least(0)[device]
            less = {
                "--offload": least(offload=True),
                "--batch-size 1": least(1),
                "--dtype bfloat16": least(dtype="bfloat16"),
            }
            helps = [
                f"{option} ({size(other[device])})"
                for option, other in less.items()
                if other[device] < needed
            ]
            raise InputError(
                f"{device} has {size(memory)} of memory, and this run needs at least {size(needed)} there, "
                f"{size(weights)} of weights and {size(needed - weights)} of caches for {B} at once: try "
                f"{', '.join([*helps, 'fewer --max-new-tokens'])} or another --device; --needs prints a table"
            )


# The tables


def needs_text(args, style, points, task):
    """The tables of --needs: what each agent needs, and what that comes to on each device."""
    needs, B, sources = (
        needs_of(args, style, points),
        points[0].batch_size,
        style.sources(checkpoints(args.checkpoint)),
    )
    agents = {
        (role, str(need.device), str(need.model.norm.weight.dtype).removeprefix("torch.")): [
            *files_of(sources[role], *agent_patterns(task)),
            need.weights,
            need.links,
            need.cache,
            B * need.cache,
        ]
        for role, need in needs.items()
    }
    if "links" in sources:
        own = f"*({links_task(task)}).pt" if style.links_by_task else "*.pt"
        agents["links", "", ""] = [
            *files_of(sources["links"], "outerlink_config.json", own),
            0,
            0,
            0,
            0,
        ]
    agents["whole", "", ""] = map(sum, zip(*agents.values()))
    titles = "", "device", "dtype", "files", "download", "weights", "links", "cache of 1", f"of {B}"
    ways = {
        f"{n}{', --offload' * offload}": on_devices(needs, n, offload)
        for offload in (False, True)
        for n in dict.fromkeys((B, 1))
    }
    totals = [
        [str(device), *(size(way.get(device, 0)) for way in ways.values()), size(memory_of(device))]
        for device in [*ways.values()][-1]
    ]
    return (
        f"prompts of {PROMPT} tokens\n{aligned([titles, *([*names, *map(size, row)] for names, row in agents.items())])}"
        f"\n\n{aligned([['at once', *ways, 'there is'], *totals])}"
    )


def files_of(source, *patterns):
    """(bytes of the files of a folder or repository that match, bytes of those that have to be downloaded)."""
    folder = Path(source).expanduser()
    if folder.is_dir():
        return sum(file.stat().st_size for pattern in patterns for file in folder.glob(pattern)), 0
    found = [
        (file.file_size or 0, file.will_download)
        for file in download(str(source), patterns, dry_run=True)
    ]
    return sum(n for n, _ in found), sum(n for n, missing in found if missing)


def size(n):
    """Bytes as text; `?` for infinity."""
    return "?" if n == float("inf") else f"{n / 1e9:.2f} GB" if n >= 1e9 else f"{n / 1e6:.2f} MB"
