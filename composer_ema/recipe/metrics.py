"""What the metrics of a run say: which way is better, which one decides, and whether a target is reached.

Imports nothing heavy, so that a command that reads runs need not wait for torch.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from composer_ema.spans import ArgumentError
from composer_ema.wording import suggestion

# What metrics that do not say it measure when smaller is better.
_SMALLER_IS_BETTER = ('loss', 'entropy', 'perplexity', 'error', 'divergence', 'distance')
_SHORT = ('mse', 'rmse', 'mae', 'nll', 'fid', 'lpips', 'bpb', 'bpc')


@dataclass(frozen=True)
class Goal:
    """A value of a metric that a run is to reach.

    Args:
        metric: Its name.
        value: The value.
        lower_is_better: Whether smaller values are better ones.
    """

    metric: str
    value: float
    lower_is_better: bool

    def is_reached(self, metrics: Mapping[str, float]) -> bool:
        """Whether an evaluation is as good; False if it did not measure this metric."""
        value = metrics.get(self.metric)
        if value is None:
            return False
        # Metrics are float32, where 9 of 10 right answers are 0.8999999762: allow for its rounding.
        slack = 1e-6 * (1.0 if is_share(self.metric) else abs(self.value))
        return value <= self.value + slack if self.lower_is_better else value >= self.value - slack

    def __str__(self) -> str:
        """``'90 %'``, or ``'MeanSquaredError 0.01'``."""
        return f'{100 * self.value:g} %' if is_share(self.metric) else f'{self.metric} {self.value:g}'


@dataclass(frozen=True)
class Report:
    """Options of the tables and the picture of a run.

    Args:
        metric: The metric that counts, by its name in the run's metrics, such as ``MeanSquaredError``: it comes first,
            ``target`` is about it, and ``composer-ema sweep`` chooses by it. Default: None, the model's first loss, or
            else its first metric.
        target: The report gives the first epoch in which the metric is as good as this. Default: None, no such line
            except for ``target_accuracy``.
        target_accuracy: The same for the accuracy of a model that measures one, in [0, 1]. Default: 0.9.
        lower_is_better: Whether smaller values of ``metric`` are better ones. Default: None, what the metric says of
            itself, or else its name: losses, errors, entropies, perplexities and distances are.
    """

    metric: str | None = None
    target: float | None = None
    target_accuracy: float = 0.9
    lower_is_better: bool | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.target_accuracy <= 1:
            message = f'target_accuracy must lie in [0, 1], got {self.target_accuracy}.'
            raise ArgumentError(f'{message} For 90 % write target_accuracy: 0.9.', 'target_accuracy')
        if self.lower_is_better is not None and self.metric is None:
            raise ArgumentError(
                f'lower_is_better={self.lower_is_better} is about metric, which is not given. Name the metric.',
                'lower_is_better',
            )

    def goal(self, names: Iterable[str]) -> Goal | None:
        """What a run with these metrics is to reach; None where they hold nothing that a target is given for.

        Example:
            >>> str(Report().goal(['CrossEntropy', 'MulticlassAccuracy'])), Report().goal(['MeanSquaredError'])
            ('90 %', None)
            >>> Report(target=0.1).goal(['MeanSquaredError'])
            Goal(metric='MeanSquaredError', value=0.1, lower_is_better=True)
        """
        names = list(names)
        metric = self.metric or deciding(names)
        if self.target is not None and metric in names:
            return Goal(metric, self.target, self.is_lower_better(metric))
        accuracy = next(filter(is_share, names), None)
        return None if accuracy is None or self.target is not None else Goal(accuracy, self.target_accuracy, False)

    def is_lower_better(self, name: str) -> bool:
        """Whether smaller values of a metric are better ones."""
        if name == self.metric and self.lower_is_better is not None:
            return self.lower_is_better
        return is_lower_better(name)

    def in_order(self, names: Iterable[str]) -> list[str]:
        """The metrics in the order of tables: the one that counts where it is named, then accuracies, then the rest."""
        return sorted(names, key=lambda name: (name != self.metric, not is_share(name)))

    def for_metrics(self, lower_is_better: Mapping[str, bool]) -> Report:
        """The same options for a model with these metrics, with what they say of themselves filled in.

        Raises:
            ArgumentError: ``metric`` is none of them.
        """
        if self.metric is None:
            return self
        if self.metric not in lower_is_better:
            raise ArgumentError(
                f'the model has no evaluation metric {self.metric!r}. {suggestion(self.metric, lower_is_better)}',
                'metric',
            )
        found = lower_is_better[self.metric] if self.lower_is_better is None else self.lower_is_better
        return Report(self.metric, self.target, self.target_accuracy, found)

    def given(self) -> dict[str, Any]:
        """The options as a recipe writes them, without those that nobody has given."""
        return {key: value for key, value in vars(self).items() if value is not None}


def deciding(names: Iterable[str]) -> str | None:
    """The metric that decides where nobody names one: the first whose small values are good, or else the first."""
    names = list(names)
    return next(filter(is_lower_better, names), names[0] if names else None)


def directions(metrics: Mapping[str, Any]) -> dict[str, bool]:
    """Name of each metric to whether its smaller values are better ones: what it says of itself, or else its name.

    Args:
        metrics: Name to metric of torchmetrics.
    """
    said = {name: getattr(metric, 'higher_is_better', None) for name, metric in metrics.items()}
    return {name: is_lower_better(name) if higher is None else not higher for name, higher in said.items()}


def is_lower_better(name: str) -> bool:
    """Whether the name of a metric says that smaller values are better ones.

    Example:
        >>> [is_lower_better(name) for name in ('LanguagePerplexity', 'MeanSquaredError', 'MulticlassF1Score', 'MSE')]
        [True, True, False, True]
    """
    letters = name.lower()
    parts = re.split('[^a-z0-9]', letters)
    return any(word in letters for word in _SMALLER_IS_BETTER) or any(part in _SHORT for part in parts)


def is_share(name: str) -> bool:
    """Whether a metric is a share of right answers, which tables and pictures show in percent."""
    return 'accuracy' in name.lower()


def titles(names: Iterable[str]) -> dict[str, str]:
    """What a reader calls each metric: ``accuracy`` and ``loss`` where there is one such, else its own name.

    Example:
        >>> titles(['MulticlassAccuracy', 'CrossEntropy'])
        {'MulticlassAccuracy': 'accuracy', 'CrossEntropy': 'loss'}
        >>> titles(['LanguageCrossEntropy', 'LanguagePerplexity', 'val/Accuracy', 'test/Accuracy'])['test/Accuracy']
        'test/Accuracy'
    """
    names = list(names)
    found = {name: name for name in names}
    for word, part in (('accuracy', 'accuracy'), ('loss', 'crossentropy')):
        own = [name for name in names if part in name.lower()]
        if len(own) == 1:
            found[own[0]] = word
    return found


def scaled(name: str, value: float) -> float:
    """A value as it is shown: shares in percent."""
    return 100 * value if is_share(name) else value
