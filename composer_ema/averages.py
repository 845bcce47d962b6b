"""Which weight each update gives the current parameters: pure numbers, no tensors.

Every average is ``shadow += weight * (source - shadow)``; a profile only chooses ``weight`` in [0, 1].
"""

from __future__ import annotations

import math
from numbers import Real

_LN2 = math.log(2.0)


def exponential_weight(elapsed: float, half_life: float) -> float:
    """The weight of the current parameters ``elapsed`` after the last update, ``1 - 2 ** (-elapsed / half_life)``.

    Computed as ``-expm1(-ln2 * elapsed / half_life)``, which keeps its digits when the half-life is long.

    Args:
        elapsed: time since the last update, in the half-life's unit, at least 0.
        half_life: time after which an old weight's share has halved, at least 0. 0 means no averaging: weight 1.

    Returns:
        A weight in [0, 1]: 0 when no time has passed, 1/2 after one half-life.

    Raises:
        ValueError: a negative or non-finite argument.

    Example:
        >>> exponential_weight(10, 10)
        0.5
        >>> exponential_weight(1, 0)
        1.0
    """
    if not (math.isfinite(elapsed) and elapsed >= 0):
        raise ValueError(f'elapsed must be finite and at least 0, got {elapsed}.')
    if not (math.isfinite(half_life) and half_life >= 0):
        raise ValueError(
            f'half_life must be finite and at least 0, got {half_life}. To freeze the average pass smoothing=1.'
        )
    if half_life == 0:
        return 1.0
    return -math.expm1(-_LN2 * elapsed / half_life)


def equal_weight(num_averaged: int) -> float:
    """The weight ``1 / (num_averaged + 1)`` that makes an average equal: every value in it weighs the same.

    Stochastic weight averaging, Izmailov et al. 2018, section 3.2.

    Args:
        num_averaged: how many values are in the average already, at least 0.

    Returns:
        A weight in (0, 1]: 1, which copies, for the first value, 1/2 for the second.

    Raises:
        TypeError: no whole number.
        ValueError: below zero.

    Example:
        >>> [equal_weight(n) for n in range(4)]
        [1.0, 0.5, 0.3333333333333333, 0.25]
    """
    if isinstance(num_averaged, bool) or not isinstance(num_averaged, int):
        raise TypeError(f'num_averaged must be a whole number of at least 0, got {num_averaged!r}.')
    if num_averaged < 0:
        raise ValueError(f'num_averaged must be at least 0, got {num_averaged}. The first update of an average has 0.')
    return 1.0 / (num_averaged + 1)


def weight_from_smoothing(smoothing: float) -> float:
    """The weight ``1 - smoothing`` of the current parameters.

    Args:
        smoothing: share of the old average kept by one update, in [0, 1]: 0 copies, 1 freezes.

    Raises:
        TypeError: not a number.
        ValueError: outside [0, 1].
    """
    check_share('smoothing', smoothing, "For a half-life of n batches pass half_life='nba'.")
    return 1.0 - smoothing


def check_share(name: str, value: float, remedy: str) -> None:
    """Raises unless ``value`` is a number in [0, 1]."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f'{name} must be a number in [0, 1], got {value!r} of type {type(value).__name__}. {remedy}')
    if not 0 <= value <= 1:
        raise ValueError(f'{name} must lie in [0, 1], got {value}. {remedy}')
