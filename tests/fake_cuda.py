"""A fake CUDA device, for what a CPU cannot show otherwise: on which device tensors are, and when the host waits for
it.

    with FakeCUDA() as gpu:  # within it, cuda:0 is there
        system = load_mas_system(style, device="cuda:0")

A FakeTensor is a CPU tensor that says it is on cuda:0. Functions of torch compute with it as ever, but one that is
given tensors of both devices raises an error, as on a GPU, and what passes between host and device is noted. Backward
passes are not watched: their gradients are right, but a wrong device in them, or in what they compute again, does not
show.
"""

import sys
from pathlib import Path

import torch
from torch.overrides import TorchFunctionMode

import minimas

HOST, DEVICE = torch.device("cpu"), torch.device("cuda:0")
PACKAGE = str(Path(minimas.__file__).parent)
INDEXING = torch.Tensor.__getitem__, torch.Tensor.__setitem__
MOVING = torch.Tensor.to, torch.Tensor.copy_
READING = (
    torch.equal,
    torch.nonzero,
    *(
        getattr(torch.Tensor, name)
        for name in (
            "__bool__",
            "__float__",
            "__index__",
            "__int__",
            "cpu",
            "equal",
            "item",
            "nonzero",
            "numpy",
            "tolist",
        )
    ),
)


def tensors_in(value):
    """The tensors of a value, and within tuples, lists and dicts. (torch has a slower function for it.)"""
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, dict):
        value = value.values()
    elif not isinstance(value, (tuple, list)):
        return []
    return [tensor for part in value for tensor in tensors_in(part)]


def mapped(f, value):
    """f of a value, and within tuples, lists and dicts of each part."""
    if isinstance(value, dict):
        return {key: mapped(f, part) for key, part in value.items()}
    if not isinstance(value, (tuple, list)):
        return f(value)
    parts = [mapped(f, part) for part in value]
    return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)


class FakeTensor(torch.Tensor):
    """A CPU tensor that says it is on cuda:0."""

    device = property(lambda self: DEVICE)
    is_cuda, is_cpu = property(lambda self: True), property(lambda self: False)


def real(value):
    """The CPU tensor that a FakeTensor is; anything else as it is."""
    return value.as_subclass(torch.Tensor) if isinstance(value, FakeTensor) else value


class FakeCUDA(TorchFunctionMode):
    """Where cuda:0 is there.

    passed   what passed between host and device: ("read" or "written", the function of minimas, whether in a step)
    in_step  whether what runs now would be captured: then nothing may pass
    """

    def __init__(self):
        super().__init__()
        self.passed, self.in_step = [], False

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function in (
            torch.device,
            torch._C._nn._parse_to,
        ):  # they only read a name; the second is Module.to's
            return function(*args, **kwargs)
        tensors = tensors_in((args, kwargs))
        ours = [t for t in tensors if isinstance(t, FakeTensor)]
        others = [t for t in tensors if not isinstance(t, FakeTensor)]
        if (
            function is torch._has_compatible_shallow_copy_type
        ):  # so Module.to asks whether it can keep a parameter
            return not (ours and others)
        named = destination(function, args, kwargs)
        to = named or (DEVICE if ours else HOST)
        # Torch itself moves what is copied, and an index of the host into a tensor of the device, but not the reverse.
        moves = function in MOVING or function in INDEXING and isinstance(args[0], FakeTensor)
        if ours and any(t.ndim for t in others) and not moves:
            raise RuntimeError(
                f"{function.__name__} is given tensors of the host and of the device"
            )
        if ours and (
            to == HOST or function in READING or function in INDEXING and any_bool(args[1])
        ):
            self.note("read")
        if to == DEVICE and (function is torch.tensor or others and moves):
            self.note("written")
        if named:
            args, kwargs = mapped(on_host, (args, kwargs))
        with torch._C.DisableTorchFunctionSubclass():
            result = function(*args, **kwargs)
        return mapped(lambda value: placed(value, to), result)

    def note(self, what):
        """Note what passed, with the innermost function of minimas that is at work."""
        frame = sys._getframe()
        while frame is not None and not frame.f_code.co_filename.startswith(PACKAGE):
            frame = frame.f_back
        self.passed.append((what, frame.f_code.co_name if frame else "", self.in_step))


def destination(function, args, kwargs):
    """The device that a call names, itself or as that of a tensor to which another one is to be moved; else None."""
    named = [
        torch.device(value)
        for value in (*args, kwargs.get("device"))
        if isinstance(value, torch.device) or isinstance(value, str) and value in ("cpu", "cuda:0")
    ]
    if function in MOVING:  # x.to(y) goes to the device of y, x.copy_(y) to that of x
        target = args[:1] if function is torch.Tensor.copy_ else args[1:2]
        named += [value.device for value in target if isinstance(value, torch.Tensor)]
    named = (
        [HOST]
        if function is torch.Tensor.cpu
        else [device for device in named if device.type != "meta"]
    )
    return named[0] if named else None


def any_bool(index):
    return any(t.dtype == torch.bool for t in tensors_in(index) if isinstance(t, FakeTensor))


def on_host(value):
    return HOST if isinstance(value, (torch.device, str)) and value in (DEVICE, "cuda:0") else value


def placed(value, device):
    """A result, if it is a tensor, as one of that device."""
    if (
        not isinstance(value, torch.Tensor)
        or value.is_meta
        or isinstance(value, FakeTensor) is (device == DEVICE)
    ):
        return value
    return value.as_subclass(FakeTensor) if device == DEVICE else real(value)
