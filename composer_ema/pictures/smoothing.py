"""Smooths a noisy curve, and leaves a calm one as it is."""

from __future__ import annotations

import math

import numpy as np

from composer_ema.run_folder.outputs import Array

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
    sums = _centred_sums(np.where(is_known, values, 0.0), half)
    with np.errstate(invalid='ignore'):  # a window without any number has no mean
        return sums / _centred_sums(is_known.astype(np.float64), half)


def _centred_sums(values: Array, half: int) -> Array:
    """The sum of the values around each, without a subtraction: one large value must not erase all that follow it.

    A window of ``width`` values is the end of one block of that length and the beginning of the next. At the start,
    the window is the beginning of all values.
    """
    count, width = len(values), 2 * half + 1
    blocks = -(-(count + width) // width)
    padded = np.zeros((blocks, width))
    padded.flat[:count] = values
    to_end = np.cumsum(padded[:, ::-1], axis=1)[:, ::-1].ravel()
    from_start = np.cumsum(padded, axis=1).ravel()
    low = np.arange(count - half)
    later = to_end[low] + np.where(low % width == 0, 0.0, from_start[low + width - 1])
    return np.concatenate([np.cumsum(values[: 2 * half])[: 2 * half : 2], later])
