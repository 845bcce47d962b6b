"""How much of an average was made up to each moment: profiles as vectors of cumulative shares, in float64.

Moments ``1..n`` are those at which the weights of the model were looked at; ``w_i`` are the weights at moment ``i``. An
average is ``sum_i p_i w_i``, and its cumulative shares ``F(i) = p_1 + ... + p_i`` end at ``F(n) = 1``. Every function
takes or returns one vector over the moments, the first moment first.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

Vector: TypeAlias = npt.NDArray[np.float64]
#: From the times of the moments and the length of the last part to cumulative shares.
OfLast: TypeAlias = Callable[[Vector, float], Vector]


def cumulative(weights: npt.ArrayLike) -> Vector:
    """Returns the cumulative shares of an average that was updated with these weights::

        F(i) = prod_{i < j <= n} (1 - a_j),    F(n) = 1

    Args:
        weights: ``a_1 .. a_n``, each in [0, 1]. The first is 1: an average starts as a copy.

    Raises:
        ValueError: ``weights`` are no such numbers.

    Example:
        >>> cumulative([1, 0.5, 0.5]).tolist()
        [0.25, 0.5, 1.0]
    """
    kept = 1.0 - checked(weights)
    found = np.ones_like(kept)
    found[:-1] = np.cumprod(kept[:0:-1])[::-1]
    return found


def shares(weights: npt.ArrayLike) -> Vector:
    """Returns the share of each moment in an average that was updated with these weights::

        p_i = a_i F(i) = F(i) - F(i - 1)

    Args:
        weights: as for :func:`cumulative`.

    Example:
        >>> shares([1, 0.5, 0.5]).tolist()
        [0.25, 0.25, 0.5]
    """
    return checked(weights) * cumulative(weights)


def weights_of(cumulative_shares: npt.ArrayLike) -> Vector:
    """Returns the weights of the updates that give these cumulative shares, the inverse of :func:`cumulative`::

        a_i = 1 - F(i - 1) / F(i),    and 1 as long as F(i) = 0

    Args:
        cumulative_shares: ``F(1) .. F(n)``, nowhere falling, from at least 0 to 1.

    Raises:
        ValueError: they are no such numbers.

    Example:
        >>> weights_of([0, 0, 0.5, 1]).tolist()
        [1.0, 1.0, 1.0, 0.5]
    """
    given = np.asarray(cumulative_shares, dtype=np.float64)
    steps = np.diff(given, prepend=0.0)
    # Written so that NaN fails as well.
    if given.ndim != 1 or not given.size or not (steps >= 0).all() or given[-1] != 1:
        raise ValueError(
            'cumulative shares must be one vector of numbers that nowhere fall and end at 1, got '
            f'{_outline(given)}. Divide them by their last one.'
        )
    return np.divide(steps, given, out=np.ones_like(given), where=given > 0)


def checked(weights: npt.ArrayLike) -> Vector:
    """The weights of the updates of an average as a float64 vector.

    Raises:
        ValueError: they are no vector of numbers in [0, 1] that begins with 1.
    """
    given = np.asarray(weights, dtype=np.float64)
    if given.ndim != 1 or not given.size or not ((given >= 0) & (given <= 1)).all() or given[0] != 1:
        raise ValueError(
            'the weights of the updates of an average must be one vector of numbers in [0, 1] that begins with 1, as '
            f'an average starts with a copy, got {_outline(given)}. Put a 1 for the start of the average before them.'
        )
    return given


def exponential(times: npt.ArrayLike, half_life: float) -> Vector:
    """Returns the cumulative shares of an exponential average that started as a copy of the first weights::

        G(t) = 2 ** (t / half_life),    F(i) = G(t_i) / G(t_n)

    Args:
        times: of the moments, rising.
        half_life: in the unit of ``times``, above 0.

    Example:
        >>> exponential([0, 10, 20], 10).tolist()
        [0.25, 0.5, 1.0]
    """
    since_end = _since_end(times)
    return np.exp2(since_end / half_life)


def bias_corrected(times: npt.ArrayLike, half_life: float, start: float) -> Vector:
    """Returns the cumulative shares of an exponential average that forgets where it started::

        G(t) = 2 ** (t / half_life) - 2 ** (start / half_life),    F(i) = G(t_i) / G(t_n)

    Args:
        times: of the moments, rising, not before ``start``.
        half_life: in the unit of ``times``, above 0.
        start: when the average started. Weights at that very moment have no share.

    Example:
        >>> bias_corrected([1, 2], 1, start=0).round(12).tolist()
        [0.333333333333, 1.0]
    """
    since_end = _since_end(times)
    since_start = np.asarray(times, dtype=np.float64) - start
    updated = -np.expm1(-math.log(2) * since_start / half_life)
    return np.exp2(since_end / half_life) * updated / updated[-1]


def power(times: npt.ArrayLike, gamma: float, start: float = 0.0) -> Vector:
    """Returns the cumulative shares of a power function average (Karras et al. 2024, section 3.1)::

        G(t) = (t - start) ** (gamma + 1),    F(i) = G(t_i) / G(t_n)

    Args:
        times: of the moments, rising, not before ``start``.
        gamma: the exponent, at least 0.
        start: when the average started. Default: 0.

    Example:
        >>> power([0, 1, 2], 1).tolist()
        [0.0, 0.25, 1.0]
    """
    since_start = np.asarray(times, dtype=np.float64) - start
    return (since_start / since_start[-1]) ** (gamma + 1)


def equal(count: int) -> Vector:
    """Returns the cumulative shares of an equal average::

        G = number of updates so far,    F(i) = i / n

    Args:
        count: number of moments, at least 1.

    Example:
        >>> equal(4).tolist()
        [0.25, 0.5, 0.75, 1.0]
    """
    return np.arange(1, count + 1) / count


def latest(times: npt.ArrayLike, span: float) -> Vector:
    """Returns the cumulative shares of an average of the last ``span`` that weighs all time in it alike::

        F(i) = max(0, 1 - (t_n - t_i) / span)

    With moments the same time apart, each of those in the span has the same share.

    Args:
        times: of the moments, rising.
        span: in the unit of ``times``, above 0.

    Example:
        >>> latest([0, 1, 2, 3], 2).tolist()
        [0.0, 0.0, 0.5, 1.0]
    """
    return np.maximum(0.0, 1.0 + _since_end(times) / span)


def linear(progress: Vector) -> Vector:
    """The learning rate ``eta = 1 - s`` at a share ``s`` of its decay."""
    return 1.0 - progress


def cosine(progress: Vector) -> Vector:
    """The learning rate ``eta = (1 + cos(pi s)) / 2`` at a share ``s`` of its decay."""
    return (1.0 + np.cos(math.pi * progress)) / 2.0


def one_minus_sqrt(progress: Vector) -> Vector:
    """The learning rate ``eta = 1 - sqrt(s)`` at a share ``s`` of its decay (Hägele et al. 2024)."""
    return 1.0 - np.sqrt(progress)


#: How a learning rate falls, by the names that ``schedule=`` takes.
SCHEDULES: dict[str, Callable[[Vector], Vector]] = {
    'linear': linear,
    'cosine': cosine,
    '1-sqrt': one_minus_sqrt,
}


def decayed(times: npt.ArrayLike, schedule: Callable[[Vector], Vector], span: float) -> Vector:
    """Returns the cumulative shares of the average that stands for a decay of the learning rate over the last ``span``.

    An average is ``w_1`` and the sum of all steps from one moment to the next, each times ``1 - F``. So this average is
    where a decayed learning rate would have led if it had scaled each step and changed nothing else::

        F(i) = 1 - eta((t_i - (t_n - span)) / span),    and 0 before the decay

    Args:
        times: of the moments, rising.
        schedule: the learning rate at a share of the decay, from 1 at 0 to 0 at 1: one of :data:`SCHEDULES`.
        span: how long the decay takes, in the unit of ``times``, above 0.

    Example:
        >>> decayed([0, 1, 2, 3, 4], linear, 4).tolist()
        [0.0, 0.25, 0.5, 0.75, 1.0]
    """
    # Where a learning rate hardly falls, its rounding may rise.
    return np.maximum.accumulate(1.0 - schedule(latest(times, span)))


def _since_end(times: npt.ArrayLike) -> Vector:
    given = np.asarray(times, dtype=np.float64)
    return given - given[-1]


def _outline(given: npt.NDArray[np.float64]) -> str:
    if given.ndim != 1 or given.size <= 4:
        return f'{given.tolist()!r}' if given.size <= 4 else f'an array of shape {given.shape}'
    first, last = ', '.join(f'{each:.6g}' for each in given[:2]), f'{given[-1]:.6g}'
    return f'{given.size} numbers ({first}, ..., {last})'
