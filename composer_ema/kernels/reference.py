"""The formula in float64, written like the equation: what every fast backend is tested against."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def average(shadow: Tensor, source: Tensor, weight: float) -> Tensor:
    """``shadow + weight * (source - shadow)`` in float64 (complex128 for complex tensors), not rounded back.

    A weight of 1 is the source itself, also where the shadow is not finite.
    """
    wide = torch.complex128 if shadow.is_complex() else torch.float64
    old, new = shadow.to(wide), source.detach().to(device=shadow.device, dtype=wide)
    return new if weight == 1 else old + weight * (new - old)


def prepare(shadows: Sequence[Tensor], sources: Sequence[Tensor]) -> Callable[[float], None]:
    """Returns a step that averages in float64 and rounds once, into the shadow's dtype."""
    pairs = list(zip(shadows, sources, strict=True))

    @torch.no_grad()
    def step(weight: float) -> None:
        for shadow, source in pairs:
            shadow.copy_(average(shadow, source, weight))

    return step
