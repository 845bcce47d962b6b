"""Smooths a noisy curve, and leaves a calm one as it is."""

from __future__ import annotations

import math

import numpy as np

from composer_ema.recipe.outputs import Array

# A curve is smoothed over this share of its values, and only if it goes up and down by this many times its range.
SMOOTHED_SHARE, NOISY_TIMES = 0.02, 3.0


def smoothed(values: Array) -> tuple[Array, int]:
    """Replaces each value of a noisy curve by the mean of the 2 % of the curve around it.

    Near the start the mean takes as many values on either side as there are before, so that a steep start stays
    steep. Near the end it takes the values that are left.

    A curve is noisy if the sum of its steps up and down is more than three times the range of its means.

    Args:
        values: A curve, one value per batch. Values that are not finite count as missing.

    Returns:
        tuple: The curve, and the number of values in each mean, which is odd. A calm or short curve comes back as it
        is, with 1.

    Example:
        >>> calm, noisy = np.linspace(2, 1, 500), np.tile([1.0, 2.0], 250)
        >>> smoothed(calm)[1], smoothed(noisy)[1]
        (1, 11)
    """
    half = math.ceil(SMOOTHED_SHARE * len(values) / 2)
    if len(values) < 10 or not np.isfinite(values).any():
        return values, 1
    means = _centred_means(values, half)
    path = np.abs(np.diff(values[np.isfinite(values)])).sum()
    is_noisy = path > NOISY_TIMES * (np.nanmax(means) - np.nanmin(means))
    return (means, 2 * half + 1) if is_noisy else (values, 1)


def _centred_means(values: Array, half: int) -> Array:
    is_known = np.isfinite(values)
    sums = np.concatenate([[0.0], np.cumsum(np.where(is_known, values, 0.0))])
    counts = np.concatenate([[0], np.cumsum(is_known)])
    index = np.arange(len(values))
    reach = np.minimum(half, index)
    low, high = index - reach, np.minimum(index + reach + 1, len(values))
    with np.errstate(invalid='ignore'):  # a window without any number has no mean
        return (sums[high] - sums[low]) / (counts[high] - counts[low])
