"""Makes a Trainer of Composer 0.32 step schedulers exactly as a loop in plain PyTorch would.

The Trainer steps all its schedulers, without arguments, either after each batch or after each epoch. Schedulers for
which that is right go to it unchanged. If intervals differ, or one scheduler needs a metric, the Trainer gets a single
:class:`Schedules` that holds them all.
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
    """The product of several of Composer's schedulers.

    Composer 0.32 documents that a list of schedulers multiplies. In fact each sets the rate anew: the last one wins.

    Args:
        schedulers: At least one.
    """

    def __init__(self, schedulers: Sequence[Callable[[State, float], float]]) -> None:
        self.schedulers = list(schedulers)

    def __call__(self, state: State, ssr: float = 1.0) -> float:
        return math.prod(scheduler(state, ssr) for scheduler in self.schedulers)


class Schedules(LRScheduler):
    """torch's schedulers with different intervals, as one scheduler for the Trainer.

    The Trainer calls :meth:`step` after each batch, and :class:`SchedulesCallback` the other methods. Schedulers with
    the same interval are stepped in the order of the list.

    Args:
        optimizer: The optimizer whose options they change.
        schedulers: Built, in the order of the recipe.
        intervals: The interval of each.
    """

    def __init__(self, optimizer: Optimizer, schedulers: Sequence[LRScheduler], intervals: Sequence[Interval]) -> None:
        # LRScheduler.__init__ would take a first step, which the inner schedulers have taken already.
        self.optimizer = optimizer
        self.schedulers = list(schedulers)
        self.intervals = list(intervals)

    def step(self, epoch: int | None = None) -> None:
        """Steps the schedulers with the interval ``batch``."""
        self._step('batch')

    def end_epoch(self) -> None:
        """Steps the schedulers with the interval ``epoch``."""
        self._step('epoch')

    def end_evaluation(self, values: Mapping[int, float]) -> None:
        """Steps schedulers that watch a metric: position in the list to the value of the metric."""
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
    """Steps the schedulers of a :class:`Schedules` that are not stepped per batch.

    Epoch schedulers are stepped at EPOCH_END, before the evaluation and the checkpoint of the epoch, and not at the end
    of a run that ends within an epoch. Schedulers that watch a metric are stepped after each evaluation during training
    that computed it, before the checkpoint. ``Trainer.eval()`` steps nothing.

    Args:
        schedules: The scheduler of the Trainer.
        metrics: For each scheduler, the metric that it watches, as ``label/name``, or None.
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
                # The Trainer has just computed this over all processes, and the metric has cached it.
                self._values[index] = float(state.eval_metrics[label][name].compute())

    def eval_after_all(self, state: State, logger: Logger) -> None:
        self.schedules.end_evaluation(self._values)
        self._values = {}


class SWALR(swa_utils.SWALR):
    """torch's SWALR without the function in its state, so that ``torch.load(..., weights_only=True)`` reads it."""

    def state_dict(self) -> dict[str, Any]:
        return {key: value for key, value in super().state_dict().items() if key != 'anneal_func'}
