"""The Kahan terms of an average's tensors: what rounding the tensors has left out so far."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from composer_ema.kernels.rules import dtype_of_compensation
from composer_ema.model.sharding import local, wrapped
from composer_ema.shadow.parts import assembled


class Compensations:
    """Terms by the very tensors that they complete, so a tensor that is replaced loses its term.

    The average of a compensated tensor is the sum of both. The term is below half a unit in the tensor's last place, so
    that the tensor alone is the average as its dtype holds it.
    """

    def __init__(self) -> None:
        # Shadow and term, both laid out alike, by the identity of the shadow's part in this process.
        self._pairs: dict[int, tuple[Tensor, Tensor]] = {}

    def among(self, shadows: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The terms that these shadows have, by name, aliased."""
        pairs = self._pairs
        return {name: pairs[_key(shadow)][1] for name, shadow in shadows.items() if _key(shadow) in pairs}

    def of(self, parts: Iterable[Tensor]) -> list[Tensor]:
        """The terms of shadows, which all have one, given and returned as their parts in this process."""
        return [local(self._pairs[id(part)][1]) for part in parts]

    def side_by_side(self, shadows: Sequence[Tensor]) -> None:
        """Gives each shadow a term, zero where it had none. All other terms are forgotten.

        New terms lie in memory as their shadows do, small ones side by side.
        """
        if [*map(_key, shadows)] == [*self._pairs] and all(itertools.starmap(_fits, self._pairs.values())):
            return
        with torch.inference_mode(False):
            terms = assembled([_zero_for(local(shadow)) for shadow in shadows], shadows)
        for shadow, term in zip(shadows, terms, strict=True):
            if _key(shadow) in self._pairs:
                local(term).copy_(local(self._pairs[_key(shadow)][1]))
        self._pairs = {_key(shadow): (shadow, term) for shadow, term in zip(shadows, terms, strict=True)}

    def put(self, shadow: Tensor, value: Tensor, term: Tensor | None) -> None:
        """Completes ``shadow``, which holds ``value`` in its own dtype, to the sum of ``value`` and ``term``.

        Args:
            shadow: rounded anew, if its dtype is another.
            value: a tensor of a compensated average, or a plain one, laid out as the shadow.
            term: its Kahan term. None for zero.
        """
        part, value = local(shadow), local(value)
        term = None if term is None else local(term)
        if value.dtype == part.dtype:
            remainder = term
        else:
            wide = torch.complex128 if part.is_complex() else torch.float64
            total = value.to(part.device, wide)
            if term is not None:
                total = total + term.to(part.device, wide)
            part.copy_(total)
            remainder = total - part.to(wide)
            remainder = torch.where(remainder.isfinite(), remainder, 0)  # what is not finite has none
        self._pairs.pop(_key(shadow), None)
        if remainder is not None:
            self._pairs[_key(shadow)] = (shadow, wrapped(_zero_for(part).copy_(remainder), shadow))

    def take(self, shadow: Tensor) -> Tensor | None:
        """Forgets the term of a shadow, and returns it."""
        return self._pairs.pop(_key(shadow), (shadow, None))[1]

    def __getstate__(self) -> list[tuple[Tensor, Tensor]]:
        return list(self._pairs.values())

    def __setstate__(self, pairs: list[tuple[Tensor, Tensor]]) -> None:
        self._pairs = {_key(shadow): (shadow, term) for shadow, term in pairs}  # copies have identities of their own


def _key(shadow: Tensor) -> int:
    return id(local(shadow))


def _zero_for(part: Tensor) -> Tensor:
    return torch.zeros_like(part, dtype=dtype_of_compensation(part.dtype))


def _fits(shadow: Tensor, term: Tensor) -> bool:
    return (local(term).stride(), term.device) == (local(shadow).stride(), shadow.device)
