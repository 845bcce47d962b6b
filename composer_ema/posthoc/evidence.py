"""What some elements of the kept averages tell: how the weights of the run move, and how its files were rounded."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import cached_property

import numpy as np
import numpy.typing as npt
import torch

from composer_ema.posthoc.fit import Fit, Kept, fit
from composer_ema.posthoc.moments import KeptAverage
from composer_ema.posthoc.shares import Vector
from composer_ema.posthoc.snapshot_files import WEIGHTS

# How many elements of each file are looked at, and how many of one tensor.
_ELEMENTS, _OF_ONE = 2**20, 2**14
# How many kept averages are left out in turn; one that the others give exactly tells nothing, and few tell little.
_LEFT_OUT, _EXACT, _FEWEST = 16, 1e-6, 4
# In runs of MNIST-1D no file was more than 1.6 times as far off as the median one.
_ODD = 5.0
# Values spread evenly over a rounding interval of size 1 are on average this far off, squared; and an interval is
# between half of eps and eps of its value.
_OF_INTERVAL, _OF_EPS = 1 / 12, 0.5


class Evidence:
    """Some elements of every kept average, read when they are first asked for.

    Args:
        averages: that were kept.
        kept: the weights of their updates, in the same order.
        names: of the tensors to look at.
        times: of all moments, in batches.
    """

    def __init__(
        self, averages: Sequence[KeptAverage], kept: Sequence[Kept], names: Sequence[str], times: Vector
    ) -> None:
        self._averages, self._kept, self._names, self._times = averages, kept, names, times

    def error(self, found: Fit, moment: int) -> float | None:
        """The error that these elements predict for a fit; None where too little was kept to tell.

        Args:
            found: the fit.
            moment: of its target. Where its weights were not kept, their distance from the average is taken to be what
                it is for weights that walk.
        """
        each_unit = self.error_over_residual
        if each_unit is None:
            return None
        newest = [place for place, each in enumerate(self._kept) if each.label == WEIGHTS and each.moment == moment]
        distance = each_unit * found.distance
        if newest:
            distance = float(np.linalg.norm(found.coefficients @ self.values - self.values[newest[-1]]))
        rounded = float(np.sqrt(found.coefficients**2 @ self.rounding * self.values.shape[1]))
        error = float(np.hypot(each_unit * found.residual, rounded))
        return error / distance if distance > 0 else None

    @property
    def error_over_residual(self) -> float | None:
        """How far a combination is off for each unit of its residual: the root of the mean square over those left out.

        At most sixteen kept averages are left out in turn, and each is put together from those of the others that are
        not later. None where fewer than four can be.
        """
        found = list(self._left_out.values())
        return float(np.sqrt(np.mean(np.square(found)))) if len(found) >= _FEWEST else None

    @property
    def odd_one(self) -> int | None:
        """The kept average that fits the others far worse than these fit each other; None if there is none."""
        found = self._left_out
        if len(found) < _FEWEST:
            return None
        worst = max(found, key=lambda place: found[place])
        return worst if found[worst] > _ODD * float(np.median(list(found.values()))) else None

    @cached_property
    def _left_out(self) -> dict[int, float]:
        """The error over the residual for averages that were left out.

        What rounding explains is taken off, and those of whose error it explains more than half are passed over: they
        tell how files were rounded, not how the weights move. Where too few remain, all count in full.
        """
        found, explained = {}, {}
        for place, made, others in self._fits_without():
            squared = float(np.sum((made.coefficients @ self.values[others] - self.values[place]) ** 2))
            rounded = float(made.coefficients**2 @ self.rounding[others] + self.rounding[place]) * self.values.shape[1]
            found[place] = squared**0.5 / made.residual
            if rounded < squared / 2:
                explained[place] = (squared - rounded) ** 0.5 / made.residual
        return explained if len(explained) >= _FEWEST else found

    def _fits_without(self) -> Iterator[tuple[int, Fit, list[int]]]:
        """Some kept averages, each with its fit from the others that are not later, and the places of these."""
        first = self._kept[0].moment
        last = max(each.moment for each in self._kept)
        places = [place for place, each in enumerate(self._kept) if each.moment > first + (last - first) / 5]
        for place in places[:: max(1, len(places) // _LEFT_OUT)]:
            weights = self._kept[place].weights
            others = [each for each in range(len(self._kept)) if each != place]
            others = [each for each in others if self._kept[each].moment <= len(weights)]
            if others:
                made = fit([self._kept[each] for each in others], weights, times=self._times, ridge=self.ridge)
                if made.residual > _EXACT * len(weights) ** 0.5:
                    yield place, made, others

    @cached_property
    def ridge(self) -> float:
        """A tenth of the mean squared rounding over the mean squared step; see :func:`composer_ema.posthoc.fit.fit`."""
        labels = {each.label for each in self._kept}
        ends = []
        for label in labels:
            own = [place for place, each in enumerate(self._kept) if each.label == label]
            ends.append((self._kept[own[-1]].moment - self._kept[own[0]].moment, own[0], own[-1]))
        steps, first, last = max(ends)
        moved = float(np.mean((self.values[last] - self.values[first]) ** 2)) if self.values.size else 0.0
        return 0.1 * float(self.rounding.mean()) * steps / moved if moved > 0 else 0.0

    @cached_property
    def rounding(self) -> Vector:
        """The mean squared rounding of each kept average, float64[kept]."""
        squares = np.array([float(np.mean(values**2)) if values.size else 0.0 for values in self.values])
        in_memory = _OF_INTERVAL * squares * np.array(self._eps) ** 2 * _OF_EPS
        return in_memory + self._rounding_of_files()

    def _rounding_of_files(self) -> Vector:
        """What was rounded when the files were written: differences to the last weights, each by a share of itself."""
        # All files of a run are written alike. One in the middle is read as a whole to tell how.
        middle = len(self._averages) // 2
        written = self._averages[middle].rounding()
        end = max(each.moment for each in self._kept)
        last = [place for place, each in enumerate(self._kept) if each.label == WEIGHTS and each.moment == end]
        if not written or not last:
            return np.full(len(self._kept), written)
        differences = np.mean((self.values - self.values[last[0]]) ** 2, axis=1)
        if not differences[middle] > 0:
            return np.full(len(self._kept), written)
        return written * differences / differences[middle]

    @property
    def not_finite(self) -> list[int]:
        """The places of kept averages with values that are not finite, except where all of them are infinite."""
        return np.flatnonzero(~np.isfinite(self.values).all(axis=1)).tolist()

    @property
    def values(self) -> npt.NDArray[np.float64]:
        """The elements, float64[kept, elements]."""
        return self._read[0]

    @property
    def _eps(self) -> list[float]:
        return self._read[1]

    @cached_property
    def _read(self) -> tuple[npt.NDArray[np.float64], list[float]]:
        names = self._chosen()
        rows, eps = [], []
        for average in self._averages:
            parts = [_some(average.tensor(name)) for name in names]
            dtypes = [each.dtype for each in parts] or [torch.float32]
            eps.append(max(torch.finfo(dtype).eps for dtype in dtypes))
            rows.append(np.concatenate([np.zeros(0), *(each.double().numpy() for each in parts)]))
        values = np.stack(rows)
        # What is infinite everywhere, as a mask may be, tells nothing.
        return values[:, ~np.isinf(values).all(axis=0)], eps

    def _chosen(self) -> list[str]:
        """Names, drawn the same each time, whose tensors together are not too large; the smallest one at least."""
        outlines = {name: self._averages[-1].outline(name) for name in self._names}
        sizes = {name: math.prod(shape) for name, (dtype, shape) in outlines.items() if dtype.is_floating_point}
        found, total = [], 0
        for name in np.random.default_rng(0).permutation(list(sizes)):
            if total + sizes[name] <= _ELEMENTS:
                found.append(str(name))
                total += sizes[name]
        return found or sorted(sizes, key=lambda name: sizes[name])[:1]


def _some(tensor: torch.Tensor) -> torch.Tensor:
    flat = tensor.detach().reshape(-1)
    return flat[:: max(1, -(-flat.numel() // _OF_ONE))]
