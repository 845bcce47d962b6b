"""Which combination of kept averages comes nearest to a wanted one, and how near: float64 throughout.

An average is ``w_1 + sum_i (1 - F(i)) (w_{i+1} - w_i)``: ``1 - F`` is the learning rate that the average stands for. So
two averages of one run differ by the steps of the run, weighted by the difference of their cumulative shares, and for
weights that walk the root of the summed squares of that difference measures how far apart the averages are. Fitting
cumulative shares is several times better than fitting the shares themselves, as Karras et al. (2024, appendix C) do in
continuous time.

What to keep: evenly spaced snapshots serve all but the shortest averages. Five more near the end, each half as far from
it as the one before, lower the error of a half-life of 1 % of the run from 10 % to .5 %, and of 3 % from .26 % to .07 %
(MNIST-1D, 16 snapshots of two power averages); putting the same number evenly only reaches 6.5 % and .14 %.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from composer_ema.posthoc.shares import Vector, checked, cumulative

#: Error of a reconstruction over its relative residual: 1 for weights that walk, and .7 to 1.9 in 90 % of cases in runs
#: of MNIST-1D with Adam and with SGD.
ERROR_OVER_RESIDUAL = 1.2
# A residual up to this, in moments, is rounding.
_ROUNDING = 1e-11


@dataclass(frozen=True, eq=False)
class Kept:
    """An average that was kept, as of one moment.

    Args:
        weights: float64[n], of the updates at moments ``1 .. n``, the last of which is its own: in [0, 1], first 1. A
            moment at which this average was not updated has weight 0; a copy of the weights at moment ``n`` has
            weight 1 there. Averages of one run count the same moments.
        label: what errors call it. Default: ``''``.

    Raises:
        ValueError: ``weights`` are no such numbers.
    """

    weights: Vector
    label: str = ''

    def __post_init__(self) -> None:
        object.__setattr__(self, 'weights', checked(self.weights))

    @property
    def moment(self) -> int:
        """Its own moment ``n``, counted from 1."""
        return len(self.weights)


@dataclass(frozen=True, eq=False)
class Fit:
    """A combination of kept averages, ``sum_m x_m kept_m`` with ``sum_m x_m = 1``.

    Attributes:
        coefficients: float64, one for each kept average; 0 for those later than the target.
        residual: ``|| sum_m x_m F_m - F ||``, the root of the summed squares over the moments.
        distance: ``|| F ||`` without the last moment, which is how far the target is from the weights at its moment.
        predicted_error: expected distance from the target, relative to the distance of the target from the weights at
            its own moment. These are ``sum_i F(i) (w_{i+1} - w_i)`` away, so it is 1.2 times ``residual / distance``.
    """

    coefficients: Vector
    residual: float
    distance: float
    predicted_error: float


def fit(kept: Sequence[Kept], target: npt.ArrayLike, *, times: npt.ArrayLike | None = None, ridge: float = 0.0) -> Fit:
    """Returns the combination of kept averages that comes nearest to the target::

        min_x || sum_m x_m F_m - F ||^2 + ridge || x ||^2    subject to    sum_m x_m = 1

    Averages later than the target are left out. One matrix of as many rows as moments and as many columns as kept
    averages is never built: time and memory grow with the moments times the number of distinct profiles.

    Args:
        kept: what there is.
        target: float64[n], weights of the updates of the wanted average; see
            :func:`composer_ema.posthoc.shares.weights_of`.
        times: of the moments, rising, ``n`` or more of them. A step between moments that lie further apart is larger,
            so its square counts in proportion to the time. Default: all moments are equally far apart.
        ridge: keeps the coefficients small where kept averages were rounded: a tenth of the mean squared rounding over
            the mean squared step from one moment to the next. Default: 0.

    Raises:
        ValueError: nothing was kept up to the moment of the target; an argument is out of range.

    Example:
        >>> found = fit([Kept([1.0]), Kept([1.0, 1.0])], [1, 0.5])
        >>> found.coefficients.round(12).tolist(), round(found.residual, 12)
        ([0.5, 0.5], 0.0)
    """
    wanted = checked(target)
    if not 0 <= ridge < math.inf:
        raise ValueError(f'ridge must be finite and at least 0, got {ridge}. Leave it out for exact averages.')
    used = [each for each, average in enumerate(kept) if average.moment <= len(wanted)]
    if not used:
        first = min((each.moment for each in kept), default=None)
        found = 'nothing was kept at all' if first is None else f'the first that was kept is of moment {first}'
        raise ValueError(f'the target is an average at moment {len(wanted)}, but {found}. Ask for a later one.')
    gaps = _gaps(times, len(wanted))
    design, goal = _compressed([kept[each] for each in used], wanted, gaps)
    combined = _solve(design, goal, ridge)
    coefficients = np.zeros(len(kept))
    coefficients[used] = combined
    residual = float(np.linalg.norm(design @ combined - goal))
    distance = float(np.linalg.norm((np.sqrt(gaps) * cumulative(wanted))[:-1]))
    if residual <= _ROUNDING * math.sqrt(len(wanted)):
        return Fit(coefficients, residual, distance, predicted_error=0.0)
    error = ERROR_OVER_RESIDUAL * residual / distance if distance > 0 else math.inf
    return Fit(coefficients, residual, distance, error)


def inner_products(kept: Sequence[Kept], *, times: npt.ArrayLike | None = None) -> npt.NDArray[np.float64]:
    """Returns the matrix of ``<1 - F_l, 1 - F_m>`` over the moments, for all pairs of kept averages.

    Args:
        kept: at least one average.
        times: as for :func:`fit`.

    Example:
        >>> inner_products([Kept([1.0, 1.0]), Kept([1.0, 0.5, 0.5])]).round(12).tolist()
        [[1.0, 0.75], [0.75, 0.8125]]
    """
    last = max(each.moment for each in kept)
    design, _ = _compressed(kept, np.eye(1, last)[0], _gaps(times, last))
    return design.T @ design


def copies(moment: int, label: str = '') -> Kept:
    """The weights themselves as of ``moment``, counted from 1: an average of which every update copies.

    Example:
        >>> copies(3).weights.tolist()
        [1.0, 1.0, 1.0]
    """
    return Kept(np.ones(moment), label)


def checkpoints_alone(moments: Sequence[int], target: npt.ArrayLike) -> Vector:
    """Returns the coefficients of the best combination of plain checkpoints, in closed form::

        c_m = mean of F over moments n_m <= i < n_{m+1},  c_last = 1,    x_m = c_m - c_{m-1}

    :func:`fit` gives the same and is tested against this; merges take their coefficients from here.

    Args:
        moments: of the checkpoints, rising, counted from 1, none after the target's.
        target: weights of the updates of the wanted average.

    Example:
        >>> checkpoints_alone([1, 3], [1, 0.5, 0.5]).tolist()
        [0.375, 0.625]
    """
    wanted = cumulative(target)
    means = [wanted[first - 1 : last - 1].mean() for first, last in itertools.pairwise(moments)]
    return np.diff([*means, 1.0], prepend=0.0)


def _gaps(times: npt.ArrayLike | None, count: int) -> Vector:
    """The time from each moment to the next relative to the mean, 1 for the last, after which nothing differs."""
    if times is None or count == 1:
        return np.ones(count)
    given = np.asarray(times, dtype=np.float64)[:count]
    gaps = np.diff(given)
    if len(given) < count or not (gaps >= 0).all() or not 0 < given[-1] - given[0] < math.inf:
        raise ValueError(f'times must be {count} finite numbers that rise, got {len(given)} that do not.')
    return np.append(gaps / gaps.mean(), 1.0)


@dataclass(frozen=True, eq=False)
class _Track:
    """One profile's run: averages kept at several moments whose weights agree as far as both go."""

    weights: Vector
    members: list[int]


def _tracks(kept: Sequence[Kept]) -> list[_Track]:
    found: list[_Track] = []
    for each in sorted(range(len(kept)), key=lambda each: -kept[each].moment):
        weights = kept[each].weights
        for track in found:
            if _is_same(track.weights[: len(weights)], weights):
                track.members.append(each)
                break
        else:
            found.append(_Track(weights, [each]))
    return found


def _is_same(one: Vector, other: Vector) -> bool:
    # Averages of one profile usually are views of one vector, which may be long.
    return (one.ctypes.data == other.ctypes.data and one.strides == other.strides) or np.array_equal(one, other)


def _compressed(
    kept: Sequence[Kept], target: Vector, gaps: Vector
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Returns few rows with the inner products of the columns ``1 - F_m``, and of ``1 - F`` of the target.

    From one kept moment to the next, the cumulative shares of all averages of one profile are multiples of one vector,
    the profile's own within the stretch; those of averages kept before are 1, and the target's are multiples of its
    own vector. So each stretch has few distinct columns, and the triangular factor of these columns replaces its rows.
    An orthogonal factor keeps the digits that sums of squares would lose.
    """
    tracks = _tracks(kept)
    ends = sorted({*(each.moment for each in kept), len(target)})
    starts = [0, *ends[:-1]]
    design, goal = [], []
    # Latest stretch first: what is left of each average's stretch by its own moment grows into the past.
    left = np.ones(len(kept))
    left_of_target = 1.0
    for start, end in zip(reversed(starts), reversed(ends), strict=True):
        running = [track for track in tracks if len(track.weights) >= end]
        vectors = [_within(track.weights[start:end]) for track in running]
        of_target = _within(target[start:end])
        columns = np.stack([np.ones(end - start), *(vector for vector, _ in vectors), of_target[0]], axis=1)
        factor = np.asarray(np.linalg.qr(columns * np.sqrt(gaps[start:end, None]), mode='r'))
        rows = np.zeros((len(factor), len(kept)))
        for place, (track, (_, rest)) in enumerate(zip(running, vectors, strict=True), start=1):
            members = [each for each in track.members if kept[each].moment >= end]
            rows[:, members] = factor[:, :1] - factor[:, place : place + 1] * left[members]
            left[members] *= rest
        design.append(rows)
        goal.append(factor[:, 0] - factor[:, -1] * left_of_target)
        left_of_target *= of_target[1]
    return np.concatenate(design), np.concatenate(goal)


def _within(weights: Vector) -> tuple[Vector, float]:
    """The cumulative shares of a stretch of updates at its end, and what the stretch leaves of all before it."""
    kept = np.cumprod(1.0 - weights[::-1])[::-1]
    return np.append(kept[1:], 1.0), float(kept[0])


def _solve(design: npt.NDArray[np.float64], goal: Vector, ridge: float) -> Vector:
    """The least squares with coefficients that sum to 1, among equally good ones the smallest."""
    count = design.shape[1]
    even = np.full(count, 1.0 / count)
    if ridge > 0:
        design = np.concatenate([design, math.sqrt(ridge) * np.eye(count)])
        goal = np.append(goal, np.zeros(count))
    # A reflection that takes the vector of ones to the first axis: its other columns are all that sum to 0.
    mirror = np.full(count, 1.0 / math.sqrt(count))
    mirror[0] += 1.0
    sums_to_0 = (np.eye(count) - np.outer(mirror, mirror) / mirror[0])[:, 1:]
    found = np.linalg.lstsq(design @ sums_to_0, goal - design @ even, rcond=None)[0]
    return even + sums_to_0 @ found
