"""Schedulers that a Trainer of Composer 0.32 steps exactly as a loop in plain PyTorch would.

The Trainer steps all its schedulers, without arguments, either after each batch or after each epoch. Where that serves,
it is handed them as they are; where their times differ, or one waits for a metric, :class:`Schedules` stands for all.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

from composer.core import Callback, State
from composer.loggers import Logger
from composer.optim import ComposerScheduler
from torch.optim import Optimizer, swa_utils
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

Interval = Literal['batch', 'epoch', 'evaluation']

_NAMES, _STATES = 'names', 'states'


class Product(ComposerScheduler):
    """Several of Composer's schedulers as one that multiplies them.

    Composer 0.32 says that a list of them multiplies, but each sets the rate anew, so that the last one alone counts.

    Args:
        schedulers: At least one.
    """

    def __init__(self, schedulers: Sequence[Callable[[State, float], float]]) -> None:
        self.schedulers = list(schedulers)

    def __call__(self, state: State, ssr: float = 1.0) -> float:
        return math.prod(scheduler(state, ssr) for scheduler in self.schedulers)


class Schedules(LRScheduler):
    """Schedulers of torch that are stepped at different times, as the one scheduler that a Trainer holds.

    The Trainer calls :meth:`step` after each batch; :class:`SchedulesCallback` tells of the rest. Within one time
    they are stepped in the order of the list.

    Args:
        optimizer: The one that all of them change.
        schedulers: Built, in the order of the recipe.
        intervals: For each, after what it is stepped.
    """

    def __init__(self, optimizer: Optimizer, schedulers: Sequence[LRScheduler], intervals: Sequence[Interval]) -> None:
        # LRScheduler.__init__ would step at once, and its inner schedulers have done so.
        self.optimizer = optimizer
        self.schedulers = list(schedulers)
        self.intervals = list(intervals)

    def step(self, epoch: int | None = None) -> None:
        """Steps the schedulers of batches."""
        self._step('batch')

    def end_epoch(self) -> None:
        """Steps the schedulers of epochs."""
        self._step('epoch')

    def end_evaluation(self, values: Mapping[int, float]) -> None:
        """Steps the schedulers that wait for a metric, by their position in the list."""
        for index, value in values.items():
            scheduler = self.schedulers[index]
            assert isinstance(scheduler, ReduceLROnPlateau)
            scheduler.step(value)

    def get_last_lr(self) -> list[float]:
        return [group['lr'] for group in self.optimizer.param_groups]

    def state_dict(self) -> dict[str, Any]:
        return {_NAMES: self._names(), _STATES: [each.state_dict() for each in self.schedulers]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if state_dict[_NAMES] != self._names():
            raise ValueError(
                f'the checkpoint has the schedulers {", ".join(state_dict[_NAMES])}, and the run has '
                f'{", ".join(self._names())}. Resume with the same ones, or load the weights alone.'
            )
        for scheduler, state in zip(self.schedulers, state_dict[_STATES], strict=True):
            scheduler.load_state_dict(state)

    def _names(self) -> list[str]:
        return [type(each).__name__ for each in self.schedulers]

    def _step(self, interval: Interval) -> None:
        for scheduler, its_interval in zip(self.schedulers, self.intervals, strict=True):
            if its_interval == interval:
                scheduler.step()


class SchedulesCallback(Callback):
    """Steps the schedulers of a :class:`Schedules` that do not follow batches.

    Those of epochs at EPOCH_END, which comes before the evaluation and the checkpoint of the epoch, and never where
    the run ends within an epoch; those that watch a metric after each evaluation of the training run that gave it,
    before the checkpoint. ``Trainer.eval()`` steps nothing.

    Args:
        schedules: What the Trainer holds.
        metrics: For each scheduler, the metric that it watches as ``label/name``, or None.
    """

    def __init__(self, schedules: Schedules, metrics: Sequence[str | None]) -> None:
        self.schedules = schedules
        self._watched = {i: tuple(metric.split('/', 1)) for i, metric in enumerate(metrics) if metric is not None}
        self._values: dict[int, float] = {}

    def epoch_end(self, state: State, logger: Logger) -> None:
        self.schedules.end_epoch()

    def eval_before_all(self, state: State, logger: Logger) -> None:
        self._values = {}

    def eval_end(self, state: State, logger: Logger) -> None:
        for index, (label, name) in self._watched.items():
            if state.dataloader_label == label:
                # Computed and cached a moment ago, over all processes.
                self._values[index] = float(state.eval_metrics[label][name].compute())

    def eval_after_all(self, state: State, logger: Logger) -> None:
        self.schedules.end_evaluation(self._values)
        self._values = {}


class SWALR(swa_utils.SWALR):
    """torch's, whose state holds no function, so that ``torch.load(..., weights_only=True)`` reads it."""

    def state_dict(self) -> dict[str, Any]:
        return {key: value for key, value in super().state_dict().items() if key != 'anneal_func'}
