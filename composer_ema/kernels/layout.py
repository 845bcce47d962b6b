"""How a tensor's elements lie in memory."""

from __future__ import annotations

from torch import Tensor


def flat(tensor: Tensor) -> Tensor | None:
    """The elements in the order in which memory holds them, as a view; None where there are gaps or overlaps."""
    outermost_first = sorted(range(tensor.dim()), key=tensor.stride, reverse=True)
    in_memory_order = tensor.permute(outermost_first)
    return in_memory_order.view(-1) if in_memory_order.is_contiguous() else None
