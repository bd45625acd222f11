"""The memory that a run needs for weights, links and KV caches, before anything is loaded; what cannot fit is refused.

It is computed from each agent's config.json: a decoder without weights, on torch's meta device, has the sizes of all
its tensors, and makes caches with the sizes of real ones. Activations, scores over the vocabulary, and what PyTorch and
CUDA take for themselves are not counted. commands/needs.py prints it (`--needs`).

Notation: B questions at once, S positions of a cache, D inputs and N outputs of a linear.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from ..common import InputError, local_path
from ..compat.hub import download
from ..compat.released import FILE as RECORDED
from ..compat.released import recorded_config
from ..config import Decoder, parse_config
from ..devices import devices_by_role, usable_dtype, usable_kind
from ..fast.quantized import padded_outputs, table_bytes
from ..link import InnerLink, OuterLink
from ..load import checkpoint_folder, decoder_without_weights, is_folder, on_meta
from ..quantize import GROUP, quantizable
from ..settings import CompletedSettings
from ..styles import Origin, Style

if TYPE_CHECKING:
    from ..system import System

PROMPT = 512  # tokens that a prompt is taken to have, with what it hears from others
ROW_SCALE = 4  # bytes of the scale that a row of weights shares in int8
GROUP_SCALE = 4  # bytes of the scale and the offset that GROUP weights of a row share in int4


@dataclass
class Need:
    """What an agent needs, in bytes.

    device   where it computes
    dtype    in what, by name
    weights  of the decoder; with --offload they are on the device for a turn only
    cache    the largest that it makes, for one question
    links    its inner link and the outer links that leave it, if their files are no wider than its dtype
    quantize int8 or int4 if that is how its linears are kept
    recorded whether its shapes are those that are recorded for a released checkpoint
    """

    device: torch.device
    dtype: str
    weights: int
    cache: int
    links: int
    quantize: str | None = None
    recorded: bool = False


def needs_of(
    origin: Origin,
    style: Style,
    points: Sequence[CompletedSettings],
    prompt: int = PROMPT,
    reachable: bool = True,
) -> dict[str, Need]:
    """{role: Need} of a run. InputError if a config.json cannot be fetched or read.

    points     the completed Settings of the run; of several the largest cache counts
    prompt     tokens of a prompt
    reachable  whether the hub answers; if not, released agents have the shapes that are recorded for them
    """
    quantize = usable_kind(origin.quantize)
    sources = style.sources(origin.checkpoints)
    devices = devices_by_role(style.order, origin.device)
    models = {}
    recorded = {}
    for role, device in devices.items():
        model, stored, recorded[role] = empty_decoder(sources[role], role, reachable)
        models[role] = model.to(usable_dtype(origin.dtype, device) or stored)
    widths = {role: model.config.hidden_size for role, model in models.items()}

    needs = {}
    for role, model in models.items():
        dtype = model.norm.weight.dtype
        in_tables = origin.fast and not origin.offload and devices[role].type == "cpu"
        needs[role] = Need(
            device=devices[role],
            dtype=str(dtype).removeprefix("torch."),
            weights=decoder_bytes(model, quantize, in_tables),
            cache=max(cache_bytes(model, style, role, point, prompt) for point in points),
            links=links_bytes(style, role, widths, dtype),
            quantize=quantize,
            recorded=recorded[role],
        )
    return needs


def empty_decoder(
    source: str | Path, role: str, reachable: bool
) -> tuple[Decoder, torch.dtype, bool]:
    """(the decoder of an agent without its weights, the dtype of its file, whether its shapes are recorded ones)."""
    if reachable or is_folder(local_path(source), role):
        folder = checkpoint_folder(source, "config.json", role=role)
        return *decoder_without_weights(folder), False
    config = recorded_config(str(source))
    try:
        folder = download(str(source), ["config.json"], local_files_only=True)
    except InputError:
        if config is None:
            raise
        family, parsed, dtype = parse_config(RECORDED, config)
        return on_meta(family, parsed), dtype, True
    return *decoder_without_weights(folder), False


def decoder_bytes(model: Decoder, quantize: str | None, in_tables: bool = False) -> int:
    """Of the weights of a decoder. Embeddings that are tied to the head are read out of it."""
    total = sum(weight_bytes(module, quantize, in_tables) for module in model.modules())
    if model.config.tie_word_embeddings:
        total -= model.embed_tokens.weight.nbytes
    return total


def weight_bytes(module: nn.Module, quantize: str | None, in_tables: bool = False) -> int:
    """Of the weights of one module, not of those in it. Only this function knows how quantised weights lie.

    Linears are quantised, all else keeps its dtype, the bias of a linear included.
    in_tables   int8 weights have the layout of the fast path on a CPU; that it merges some linears is not counted
    """
    whole = nbytes(module.parameters(recurse=False))
    if not quantizable(module, quantize):
        return whole
    N, D = module.weight.shape
    bias = whole - module.weight.nbytes
    if quantize == "int8" and in_tables:
        return bias + table_bytes(N, D) + padded_outputs(N) * ROW_SCALE
    if quantize == "int8":
        return bias + N * D + N * ROW_SCALE
    return bias + N * D // 2 + N * D // GROUP * GROUP_SCALE


def cache_bytes(
    model: Decoder, style: Style, role: str, point: CompletedSettings, prompt: int
) -> int:
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


def layers_bytes(model: Decoder, S: int) -> int:
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
    return main_memory("MemTotal|SwapTotal") if device.type == "cpu" else float("inf")


def available_on(device: torch.device) -> float:
    """The memory of a device that this process may still take, in bytes; infinite if it is not known.

    For a CPU without its swap, where an answer would not be waited for.
    """
    if device.type == "cuda" and torch.cuda.is_available():
        free, _ = torch.cuda.mem_get_info(device)
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return free + unused
    return main_memory("MemAvailable") if device.type == "cpu" else float("inf")


def main_memory(names: str) -> float:
    """The sum of these lines of /proc/meminfo (a regular expression) in bytes; infinite where there are none."""
    file = Path("/proc/meminfo")
    if not file.exists():
        return float("inf")
    lines = re.findall(rf"^(?:{names}): +(\d+) kB", file.read_text(), re.MULTILINE)
    kilobytes = sum(int(line) for line in lines)
    return 1024 * kilobytes or float("inf")


def check_memory(origin: Origin, style: Style, points: Sequence[CompletedSettings], B: int) -> None:
    """InputError if B questions at once need more than all the memory of a device, even if their prompts were empty."""
    rollouts = max(point.rollouts for point in points)
    check_needs(needs_of(origin, style, points, prompt=0), origin, B, rollouts)


def check_needs(needs: dict[str, Need], origin: Origin, B: int, rollouts: int = 1) -> None:
    """The same for what needs_of gave, of one system or of several that are loaded at the same time."""
    for device, needed in on_devices(needs, B, origin.offload, least=True).items():
        memory = memory_of(device)
        if needed <= memory:
            continue
        ways = ways_to_fit(origin, needs, device, B)
        if rollouts > 1:
            ways.append("fewer --rollouts")
        raise InputError(
            f"{device} has {size(memory)} of memory, and this run needs at least {size(needed)} there for {B} at once: "
            f"try {', '.join(ways)} or another --device; --needs prints a table"
        )


def empty_decoders(system: "System") -> dict[str, Decoder]:
    """{role: a decoder like its agent's without weights}: the caches that it makes have sizes, and take no memory."""
    empty = {}
    for role, agent in system.agents.items():
        dtype = agent.model.norm.weight.dtype
        empty[role] = on_meta(type(agent.model), agent.model.config).to(dtype)
    return empty


def check_cache(
    system: "System", empty: dict[str, Decoder], point: CompletedSettings, B: int
) -> None:
    """InputError if a cache for B questions needs more memory than is available, even if their prompts were empty.

    What an agent keeps is available, too: it is let go, or used again.
    empty   what empty_decoders gives for the system
    """
    for role, agent in system.agents.items():
        needed = B * cache_bytes(empty[role], system.style, role, point, prompt=0)
        available = available_on(agent.device) + agent.kept_bytes()
        if needed > available:
            texts = B * point.rollouts
            raise InputError(
                f"the KV cache of {role} needs {size(needed)} for {texts} {'text' if texts == 1 else 'texts'} of up to "
                f"{point.max_new_tokens} tokens, and {agent.device} has {size(available)} available: "
                "ask for fewer texts (n) or tokens (max_tokens), or again later"
            )


def ways_to_fit(origin: Origin, needs: dict[str, Need], device: torch.device, B: int) -> list[str]:
    """Options with which a run may need less on a device."""
    ways = []
    if device.type != "cpu" and not origin.offload:
        ways.append("--offload")
    if B > 1:
        ways.append("--batch-size 1")
    if any(need.dtype == "float32" for need in needs.values()):
        ways.append("--dtype bfloat16")
    if origin.quantize is None:
        ways.append("--quantize int8")
    if origin.quantize != "int4":
        ways.append("--quantize int4")
    return [*ways, "fewer --max-new-tokens"]


def size(n: float) -> str:
    """Bytes as text; `?` for infinity, which stands for what is not known."""
    if n == float("inf"):
        return "?"
    if n >= 1e9:
        return f"{n / 1e9:.2f} GB"
    return f"{n / 1e6:.2f} MB"
