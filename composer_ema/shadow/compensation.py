"""The Kahan terms of an average's tensors: what rounding the tensors has left out so far."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from composer_ema.kernels.layout import side_by_side
from composer_ema.kernels.rules import dtype_of_compensation


class Compensations:
    """Terms by the very tensors that they complete, so a tensor that is replaced loses its term.

    The average of a compensated tensor is the sum of both. The term is below half a unit in the tensor's last place, so
    that the tensor alone is the average as its dtype holds it.
    """

    def __init__(self) -> None:
        self._pairs: dict[int, tuple[Tensor, Tensor]] = {}  # shadow and term, by the identity of the shadow

    def among(self, shadows: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The terms that these shadows have, by name, aliased."""
        pairs = self._pairs
        return {name: pairs[id(shadow)][1] for name, shadow in shadows.items() if id(shadow) in pairs}

    def of(self, shadows: Iterable[Tensor]) -> list[Tensor]:
        """The terms of these shadows, which all have one."""
        return [self._pairs[id(shadow)][1] for shadow in shadows]

    def side_by_side(self, shadows: Sequence[Tensor]) -> None:
        """Gives each shadow a term, zero where it had none. All other terms are forgotten.

        New terms lie in memory as their shadows do, small ones side by side.
        """
        if [*map(id, shadows)] == [*self._pairs] and all(itertools.starmap(_fits, self._pairs.values())):
            return
        with torch.inference_mode(False):
            terms = side_by_side([_zero_for(shadow) for shadow in shadows])
        for shadow, term in zip(shadows, terms, strict=True):
            if id(shadow) in self._pairs:
                term.copy_(self._pairs[id(shadow)][1])
        self._pairs = {id(shadow): (shadow, term) for shadow, term in zip(shadows, terms, strict=True)}

    def put(self, shadow: Tensor, value: Tensor, term: Tensor | None) -> None:
        """Completes ``shadow``, which holds ``value`` in its own dtype, to the sum of ``value`` and ``term``.

        Args:
            shadow: rounded anew, if its dtype is another.
            value: a tensor of a compensated average, or a plain one.
            term: its Kahan term. None for zero.
        """
        if value.dtype == shadow.dtype:
            remainder = term
        else:
            wide = torch.complex128 if shadow.is_complex() else torch.float64
            total = value.to(shadow.device, wide)
            if term is not None:
                total = total + term.to(shadow.device, wide)
            shadow.copy_(total)
            remainder = total - shadow.to(wide)
            remainder = torch.where(remainder.isfinite(), remainder, 0)  # what is not finite has none
        self._pairs.pop(id(shadow), None)
        if remainder is not None:
            self._pairs[id(shadow)] = (shadow, _zero_for(shadow).copy_(remainder))

    def take(self, shadow: Tensor) -> Tensor | None:
        """Forgets the term of a shadow, and returns it."""
        return self._pairs.pop(id(shadow), (shadow, None))[1]

    def __getstate__(self) -> list[tuple[Tensor, Tensor]]:
        return list(self._pairs.values())

    def __setstate__(self, pairs: list[tuple[Tensor, Tensor]]) -> None:
        self._pairs = {id(shadow): (shadow, term) for shadow, term in pairs}  # copies have identities of their own


def _zero_for(shadow: Tensor) -> Tensor:
    return torch.zeros_like(shadow, dtype=dtype_of_compensation(shadow.dtype))


def _fits(shadow: Tensor, term: Tensor) -> bool:
    return (term.stride(), term.device) == (shadow.stride(), shadow.device)
