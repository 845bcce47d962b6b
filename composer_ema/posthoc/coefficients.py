"""How much each of several checkpoints weighs in their merge: float64 throughout."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from composer_ema.posthoc import shares
from composer_ema.posthoc.fit import checkpoints_alone
from composer_ema.posthoc.shares import Vector

# Moments that are looked at: one a batch up to here, and then evenly so many, which changes the sixth digit.
_MOST_MOMENTS = 2**22
_FINE = 2**20


def equal(count: int) -> Vector:
    """Returns ``1 / count`` for each checkpoint.

    Example:
        >>> equal(4).tolist()
        [0.25, 0.25, 0.25, 0.25]
    """
    return np.full(count, 1.0 / count)


def halving(times: npt.ArrayLike, half_life: float, batches: npt.ArrayLike | None = None) -> Vector:
    """Returns the coefficients that come nearest to an exponential average over the time of the checkpoints.

    The average starts at the first checkpoint, forgets it as bias correction does, and is updated after each batch. A
    checkpoint stands for the weights until the next one, so the first and the last stand for half as much time as
    those between, whose coefficients double with each half-life.

    Args:
        times: of the checkpoints, rising.
        half_life: in the unit of ``times``, above 0.
        batches: at which the checkpoints were taken, rising. Default: ``times`` counts batches. Where nobody knows
            them, see :func:`finely`.

    Example:
        >>> halving([0, 2, 4], 1).round(12).tolist()
        [0.033333333333, 0.3, 0.666666666667]
    """
    return _nearest(times, batches, lambda moments: shares.bias_corrected(moments, half_life, start=moments[0]))


def finely(times: npt.ArrayLike) -> Vector:
    """Batches so many and so alike that an average over ``times`` is as if it were updated all the time.

    Example:
        >>> halving([0, 1, 2], 1, finely([0, 1, 2])).round(4).tolist()
        [0.1476, 0.4809, 0.3715]
    """
    at = np.asarray(times, dtype=np.float64)
    return (at - at[0]) / (at[-1] - at[0]) * _FINE


def decaying(
    times: npt.ArrayLike, schedule: Callable[[Vector], Vector], batches: npt.ArrayLike | None = None
) -> Vector:
    """Returns the coefficients that come nearest to a decay of the learning rate from the first checkpoint to the last.

    For steps that are alike between one checkpoint and the next, the merge is exactly what a decay by ``schedule``
    would have led to had it scaled each step of the optimizer and changed nothing else.

    Args:
        times: of the checkpoints in batches, rising.
        schedule: the learning rate at a share of the decay, one of :data:`composer_ema.posthoc.shares.SCHEDULES`.

    Example:
        >>> decaying([0, 2, 4], shares.linear).tolist()
        [0.125, 0.5, 0.375]
    """
    return _nearest(times, None, lambda moments: shares.decayed(moments, schedule, moments[-1] - moments[0]))


def _nearest(times: npt.ArrayLike, batches: npt.ArrayLike | None, shares_at: Callable[[Vector], Vector]) -> Vector:
    """The coefficients for cumulative shares at the moments from the first checkpoint to the last."""
    at = np.asarray(times, dtype=np.float64)
    counted = at if batches is None else np.asarray(batches, dtype=np.float64)
    length = counted[-1] - counted[0]
    per_batch = min(1.0, _MOST_MOMENTS / length)
    if not all((np.diff(each) > 0).all() for each in (at, counted)):
        raise ValueError(f'the times of checkpoints must rise, got {at.tolist()}. Leave one of each two out.')
    # Checkpoints that lie closer together than the moments have one each.
    order = np.arange(len(at))
    places = np.rint((counted - counted[0]) * per_batch).astype(np.int64)
    places = np.maximum.accumulate(places - order) + order
    moments = np.interp(np.arange(places[-1] + 1), places, at)
    return checkpoints_alone(list(places + 1), shares.weights_of(shares_at(moments)))
