"""Where agents compute, in which dtype, and in how many bits: from what a caller names to what torch takes."""

from collections.abc import Iterable, Mapping

import torch

from .common import QUANTIZED, InputError, check_known
from .config import DTYPES

Devices = torch.device | str | Mapping[str, torch.device | str] | None


def usable_device(name: torch.device | str | None) -> torch.device:
    """The torch.device of that name (None: cuda if there is one, else cpu); InputError if nothing can be put there.

    Each device has one name: cuda becomes cuda:0 if that is the current one, and cpu:0 becomes cpu.
    """
    default = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(default if name is None else name)
        probe = torch.zeros(1, device=device)
        probe.item()  # a number that is really there: `meta` has none
    except (RuntimeError, AssertionError, TypeError, ImportError) as e:
        reason = str(e).splitlines()[0].partition(". ")[0]  # torch goes on for pages
        others = "cpu or cuda" if torch.cuda.is_available() else "cpu"
        raise InputError(f"device {str(name)!r} cannot be used ({reason}): try {others}") from e
    return probe.device


def devices_by_role(roles: Iterable[str], given: Devices = None) -> dict[str, torch.device]:
    """{role: torch.device}, from one device or its name, {role: device}, "planner=cuda:0,critic=cuda:1", or None."""
    roles = list(roles)
    if isinstance(given, str) and "=" in given:
        given = device_of_each(given)
    if not isinstance(given, Mapping):
        return dict.fromkeys(roles, usable_device(given))
    if set(given) != set(roles):
        raise InputError(f"device names {', '.join(given)}, expected each of {', '.join(roles)}")
    return {role: usable_device(name) for role, name in given.items()}


def device_of_each(given: str) -> dict[str, str]:
    """ "planner=cuda:0,critic=cuda:1" -> {role: its device}; InputError if it is not written so."""
    devices: dict[str, str] = {}
    for pair in given.split(","):
        role, _, device = pair.partition("=")
        if not device or role in devices:
            raise InputError(
                f"device is {given}, expected ROLE=DEVICE,ROLE=DEVICE with each role once"
            )
        devices[role] = device
    return devices


def usable_kind(name: str | None) -> str | None:
    """The kind of quantised weights of that name, None for none."""
    if name is not None:
        check_known("quantize", [name], QUANTIZED)
    return name


def usable_dtype(name: torch.dtype | str | None, device: torch.device) -> torch.dtype | None:
    """The torch dtype of that name; None stands for float32 on a CPU, and for config.json's elsewhere."""
    if name is None:
        return torch.float32 if device.type == "cpu" else None
    short = str(name).removeprefix("torch.")
    check_known("dtype", [short], DTYPES)
    return DTYPES[short]
