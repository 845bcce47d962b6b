"""Evaluations of classifiers, as runs record them."""

from __future__ import annotations

from composer_ema.pictures.curves import Point


def classified(epoch: float, accuracy: float | None, loss: float | None, batch: int = 0, sample: int = 0) -> Point:
    """An evaluation of a classifier; None for what was not measured."""
    metrics = {'CrossEntropy': loss, 'MulticlassAccuracy': accuracy}
    return Point(epoch, {name: value for name, value in metrics.items() if value is not None}, batch, sample)
