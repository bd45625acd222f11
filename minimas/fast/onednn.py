"""oneDNN's product on a CPU, which torch has no public name for. It can read a weight as it is, or packed for itself.

Notation: D inputs, N outputs.
"""

import torch

# Whether the CPU has AVX-512 and torch uses it. Which product is fastest depends on it.
AVX512 = torch.backends.cpu.get_cpu_capability() == "AVX512"


def can_multiply(weight: torch.Tensor) -> bool:
    """Whether oneDNN can pack this weight, and multiply with it."""
    if weight.device.type != "cpu" or weight.requires_grad:
        return False
    if not torch.backends.mkldnn.is_available():
        return False
    for operator in "_linear_pointwise", "_reorder_linear_weight":
        if not hasattr(torch.ops.mkldnn, operator):
            return False
    if weight.dtype == torch.bfloat16:
        return torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return weight.dtype == torch.float32


def pack(weight: torch.Tensor) -> torch.Tensor:
    """A weight (N, D) in the layout that oneDNN multiplies fastest; torch's other operators cannot read it."""
    return torch.ops.mkldnn._reorder_linear_weight(weight, None)


def multiply(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """x (..., D) -> x W' + b (..., N), for a weight (N, D) that is packed or not."""
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
