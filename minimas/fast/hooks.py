"""Hooks, and replaced or moved modules and weights, in a form that does not call every module.

What it cannot do is an error message.
"""

from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import torch
import torch.nn.modules.module as torch_modules
from torch import nn

from ..common import InputError

# The methods of a module that set hooks
METHODS = (
    "register_forward_hook",
    "register_forward_pre_hook",
    "register_full_backward_hook",
    "register_full_backward_pre_hook",
)
Place = tuple[dict[str, nn.Module | None], str, nn.Module]  # see places_of


def has_hook(module: nn.Module) -> bool:
    """Whether a module has a forward hook of its own."""
    return bool(module._forward_hooks or module._forward_pre_hooks)


def has_hook_inside(module: nn.Module) -> bool:
    """Whether torch calls a hook in the forward of a module, or of one within it."""
    return has_global_hook() or any(has_hook(part) for part in module.modules())


def has_global_hook() -> bool:
    """Whether torch calls a hook before or after the forward of every module."""
    return bool(torch_modules._global_forward_hooks or torch_modules._global_forward_pre_hooks)


def refuse_hooks(module: nn.Module) -> None:
    """Refuse hooks on a module that the fast form does not call: none would ever fire."""
    for method in METHODS:
        setattr(module, method, no_hook)


def no_hook(*args: object, **options: object) -> NoReturn:
    """Stands in for the METHODS."""
    raise InputError(
        "in the fast form this module is merged with others and never called, so that a hook would not fire: "
        "load the system with fast=False"
    )


def places_of(module: nn.Module, names: Sequence[str] | None = None) -> list[Place]:
    """Of modules within a module: the dict of the one that holds it, its name there, and itself.

    names   of some children; None takes all modules within
    """
    if names is not None:
        return [(module._modules, name, module.get_submodule(name)) for name in names]
    places: list[Place] = []
    for holder in module.modules():
        for name, part in holder.named_children():
            places.append((holder._modules, name, part))
    return places


def check_places(places: Sequence[Place]) -> None:
    """InputError if one of these modules is not at its place any more."""
    for holder, name, part in places:
        if holder.get(name) is not part:
            raise InputError(
                f"the module {name} was replaced, whose weights the fast form has in another layout: "
                "load the system with fast=False"
            )


class FixedTensors(dict[str, Any]):
    """The parameters or buffers of a module, for whose product the fast form has them in another layout.

    InputError if a tensor is replaced or taken out, and if one is put where there is none because its numbers are
    packed: the product would go on as before. A tensor that is there may be changed in place.
    """

    def __setitem__(self, name: str, tensor: torch.Tensor | None) -> None:
        # What is not there yet may be set: a copy of the module begins without tensors.
        if name in self and self[name] is not tensor:
            no_other(name)
        super().__setitem__(name, tensor)

    def __delitem__(self, name: str) -> None:
        no_other(name)

    def share(self, name: str, tensor: torch.Tensor) -> None:
        """Put a tensor there all the same, because the product reads it."""
        super().__setitem__(name, tensor)


def no_other(name: str) -> NoReturn:
    """Raise what is said of a tensor that cannot be replaced."""
    raise InputError(
        f"the {name} of this module cannot be replaced, since the fast form has it in another layout: "
        "load the system with fast=False"
    )


def fix_tensors(module: nn.Module) -> None:
    """Refuse other weights in a module whose product the fast form computes from them in another layout."""
    module._parameters = FixedTensors(module._parameters)
    module._buffers = FixedTensors(module._buffers)


class Unmoved:
    """Stands in for the `_apply` of a module, by which torch moves it: `to`, `half` or `cuda`.

    InputError if a tensor of the module, or of one within it, is not what it was then: products and steps would go on
    with the tensors of before.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def __call__(
        self, change: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True
    ) -> nn.Module:
        for tensor in [*self.module.parameters(), *self.module.buffers()]:
            if change(tensor) is not tensor:
                raise InputError(
                    "a decoder in the fast form keeps its device and its dtype: "
                    "load the system with the device and the dtype that you want, or with fast=False"
                )
        return self.module
