"""Which of the averages of a sweep is best, and which ones the samples cannot distinguish from it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from composer_ema.sweep.trials import Trial, is_finite

#: A reconstruction with a larger predicted error is not trusted: it is drawn hollow and never chosen.
UNRELIABLE = 0.05
#: Differences below this many standard errors count as sampling error.
_STANDARD_ERRORS = 2.0
#: With fewer parts, their spread says too little.
_FEWEST_PARTS = 8


@dataclass(frozen=True)
class Difference:
    """How much worse one trial is than another in a metric: above 0 if it is worse.

    Args:
        mean: over all samples.
        standard_error: of the mean over such samples, from the differences on the same parts of the data; None where
            there are too few parts.
    """

    mean: float
    standard_error: float | None

    @property
    def is_within_sampling_error(self) -> bool:
        """Whether other samples might as well show the opposite; False where that is not known."""
        return self.standard_error is not None and abs(self.mean) <= _STANDARD_ERRORS * self.standard_error


@dataclass(frozen=True)
class Choice:
    """The best trial of a sweep.

    Args:
        best: it has the best value of the metric among those with a predicted error of at most 5 %.
        as_good: the trials around it, itself included, that the samples do not distinguish from it, by value.
        training: how much worse the training weights are.
        edge: the side on which nothing was tried, or nothing that can be trusted; None where the best has both
            neighbours.
        doubtful: a trial that is better but has a larger predicted error; None if there is none.
    """

    best: Trial
    as_good: Sequence[Trial]
    training: Difference
    edge: Literal['short', 'long'] | None
    doubtful: Trial | None


def choose(trials: Sequence[Trial], training: Trial, metric: str, *, lower_is_better: bool) -> Choice | None:
    """Chooses the best of the averages of a sweep; None if no trial can be trusted.

    Args:
        trials: of averages, in any order.
        training: that of the training weights.
        metric: what to choose by.
        lower_is_better: whether its small values are the good ones.

    Example:
        >>> trials = [Trial(f'power={x}', x, 0.0, {'loss': (x - 0.1) ** 2}) for x in (0.05, 0.1, 0.2)]
        >>> choose(trials, Trial('training', None, None, {'loss': 1.0}), 'loss', lower_is_better=True).best.target
        'power=0.1'
    """
    known = sorted((each for each in trials if is_finite(each, metric)), key=lambda each: each.value or 0.0)
    trusted = [each for each in known if each.is_reliable(UNRELIABLE)]
    if not trusted:
        return None
    sign = 1.0 if lower_is_better else -1.0
    best = min(trusted, key=lambda each: sign * each.metrics[metric])
    doubtful = min(known, key=lambda each: sign * each.metrics[metric])
    place = trusted.index(best)
    as_good = [best]
    for side in (reversed(trusted[:place]), trusted[place + 1 :]):
        for each in side:
            if not difference(each, best, metric, sign).is_within_sampling_error:
                break
            as_good.append(each)
    return Choice(
        best=best,
        as_good=sorted(as_good, key=lambda each: each.value or 0.0),
        training=difference(training, best, metric, sign),
        edge='short' if place == 0 else 'long' if place == len(trusted) - 1 else None,
        doubtful=None if doubtful.is_reliable(UNRELIABLE) else doubtful,
    )


def difference(one: Trial, other: Trial, metric: str, sign: float = 1.0) -> Difference:
    """How much larger a metric is in one trial than in another, times ``sign``."""
    mean = sign * (one.metrics[metric] - other.metrics[metric])
    parts = [np.asarray(each.parts.get(metric, ()), dtype=np.float64) for each in (one, other)]
    if len(parts[0]) != len(parts[1]) or len(parts[0]) < _FEWEST_PARTS:
        return Difference(mean, None)
    spread = float(np.std(parts[0] - parts[1], ddof=1))
    return Difference(mean, spread / math.sqrt(len(parts[0])) if math.isfinite(spread) else None)
