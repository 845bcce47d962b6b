"""Writes the metrics of a run to a file, one line per batch or evaluation; a resumed run continues it without gaps."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from composer.core import Callback, State
from composer.loggers import Logger, LoggerDestination
from composer.utils import dist

from composer_ema.files import write_beside
from composer_ema.recipe.outputs import BETA1, MOMENTUM

_NUM_LINES, _EVALUATIONS = 'num_lines', 'evaluations'
_STEP_SECONDS, _UPDATE_SECONDS, _NUM_BATCHES = 'step_seconds', 'update_seconds', 'num_batches'


class Collector(LoggerDestination):
    """A logger that keeps the newest value of each metric until they are taken.

    Attributes:
        metrics: Name to number or tensor.
    """

    def __init__(self) -> None:
        self.metrics: dict[str, Any] = {}

    def log_metrics(self, metrics: dict[str, Any], step: int | None = None) -> None:
        # Each line has the times already.
        self.metrics.update({name: value for name, value in metrics.items() if not name.startswith('time/')})

    def take(self) -> dict[str, float]:
        """Returns the numbers kept, by name, and forgets all values."""
        taken, self.metrics = self.metrics, {}
        return {name: number for name, value in taken.items() if (number := _number(value)) is not None}


class Recorder(Callback):
    """Writes every logged metric to a file of JSON lines on rank 0, and measures the cost of averaging.

    Each batch gives one line, and each end of an epoch another: ``{"epoch": 1.0, "batch": 468, "sample": 59904,
    "lr/group0": 0.01, "momentum/group0": 0.9, "loss/train/total": ..., "metrics/eval_ema/MulticlassAccuracy": ...}``.
    Learning rate and momentum are those of the batch's step; the first of ``betas`` is written as ``beta1/group0``
    instead. Parameter groups after the first are written only where they differ from it.

    Lines are appended, so a killed process loses at most the line that it was writing. The state holds the number of
    lines written up to the checkpoint. On resume the file is cut to that number, and the run writes the rest again. A
    run that resumes into another folder starts its file with the evaluations so far.

    Pass the recorder to the Trainer as its first callback, and ``collector`` as a logger. Composer runs loggers after
    all callbacks, and so after a checkpoint is written; therefore a callback writes the lines, and the logger only
    collects metrics. As the first callback, which runs after the algorithms, the recorder measures between BATCH_START
    and BATCH_END the step and the update of the average, and no other callback.

    Args:
        path: The file to write; None writes nothing. Default: None.

    Attributes:
        collector: The logger that collects metrics.
        evaluations: The lines that hold metrics of an evaluator, oldest first.
        step_seconds: Time from BATCH_START to BATCH_END, summed over ``num_batches`` batches.
        update_seconds: Time that the averaging algorithms spent in those batches and at ends of epochs, by their own
            ``update_seconds``.
        num_batches: Number of batches measured.
    """

    def __init__(self, path: Path | None = None) -> None:
        self.path = path
        self.collector = Collector()
        self.num_lines = 0
        self.evaluations: list[dict[str, Any]] = []
        self.step_seconds = 0.0
        self.update_seconds = 0.0
        self.num_batches = 0
        self._batch_started: float | None = None
        self._updates_seen = 0.0
        self._has_fit = False
        self._step: dict[str, float] = {}

    @property
    def update_share(self) -> float | None:
        """Share of step time spent on averaging, in [0, 1]; None if nothing was averaged."""
        return self.update_seconds / self.step_seconds if self.update_seconds > 0 and self.step_seconds > 0 else None

    def state_dict(self) -> dict[str, Any]:
        return {
            _NUM_LINES: self.num_lines,
            # One string: a sharded checkpoint would have a key for each entry of a list, and a run that is resumed,
            # which has none of them yet, would look for the list itself and fail.
            _EVALUATIONS: json.dumps(self.evaluations),
            _STEP_SECONDS: self.step_seconds,
            _UPDATE_SECONDS: self.update_seconds,
            _NUM_BATCHES: self.num_batches,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.num_lines = state[_NUM_LINES]
        evaluations = state[_EVALUATIONS]  # a list in checkpoints of earlier versions
        self.evaluations = json.loads(evaluations) if isinstance(evaluations, str) else [*map(dict, evaluations)]
        self.step_seconds = state[_STEP_SECONDS]
        self.update_seconds = state[_UPDATE_SECONDS]
        self.num_batches = state[_NUM_BATCHES]

    def fit_start(self, state: State, logger: Logger) -> None:
        self.collector.take()
        self._updates_seen = _seconds_in_updates(state)
        if self.path is not None and dist.get_global_rank() == 0:
            self._cut_file(self.path)

    def batch_start(self, state: State, logger: Logger) -> None:
        self._batch_started = perf_counter()

    def after_train_batch(self, state: State, logger: Logger) -> None:
        # This is the last event before the step. By BATCH_END the schedulers have moved on.
        self._step = step_settings(state.optimizers)

    def batch_end(self, state: State, logger: Logger) -> None:
        if self._batch_started is not None:
            self.step_seconds += perf_counter() - self._batch_started
            self._count_updates(state)
            self.num_batches += 1
            self._batch_started = None

    def batch_checkpoint(self, state: State, logger: Logger) -> None:
        self._write_line(state, self._step)

    def epoch_checkpoint(self, state: State, logger: Logger) -> None:
        self._count_updates(state)
        self._write_line(state)

    def fit_end(self, state: State, logger: Logger) -> None:
        self._has_fit = True

    def eval_after_all(self, state: State, logger: Logger) -> None:
        # Evaluators may still run after FIT_END, when no checkpoint event follows.
        if self._has_fit:
            self._write_line(state)

    def _count_updates(self, state: State) -> None:
        seen, self._updates_seen = self._updates_seen, _seconds_in_updates(state)
        self.update_seconds += self._updates_seen - seen

    def _cut_file(self, path: Path) -> None:
        lines = path.read_text().splitlines()[: self.num_lines] if path.exists() else []
        if len(lines) < self.num_lines:
            lines = [json.dumps(line) for line in self.evaluations]
        self.num_lines = len(lines)
        write_beside(path, ''.join(f'{line}\n' for line in lines))

    def _write_line(self, state: State, step: Mapping[str, float] | None = None) -> None:
        metrics = {**(step or {}), **self.collector.take()}
        if not metrics:
            return
        time = state.timestamp
        line: dict[str, Any] = {
            'epoch': epochs_done(state),
            'batch': int(time.batch),
            'sample': int(time.sample),
            **metrics,
        }
        if _is_evaluation(line, (evaluator.label for evaluator in state.evaluators)):
            self.evaluations.append(line)
        self.num_lines += 1
        if self.path is not None and dist.get_global_rank() == 0:
            with self.path.open('a') as file:
                file.write(json.dumps(line) + '\n')


def step_settings(optimizers: Iterable[torch.optim.Optimizer]) -> dict[str, float]:
    """The learning rate and momentum of each parameter group, by their keys in a line.

    Group 0 has all its values, each further group only those that differ from group 0. The groups of a second optimizer
    are numbered after those of the first.

    Example:
        >>> weight, bias = torch.nn.Linear(1, 1).parameters()
        >>> adam = torch.optim.Adam([{'params': [weight]}, {'params': [bias], 'lr': 0.5}], lr=0.25)
        >>> step_settings([adam])
        {'lr/group0': 0.25, 'beta1/group0': 0.9, 'lr/group1': 0.5}
    """
    settings: dict[str, float] = {}
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    for index, group in enumerate(groups):
        for name, value in (('lr', group.get('lr')), momentum_of(group)):
            number = _number(value)
            if number is not None and (index == 0 or number != settings.get(f'{name}/group0')):
                settings[f'{name}/group{index}'] = number
    return settings


def momentum_of(group: Mapping[str, Any]) -> tuple[str, Any]:
    """The name and value of a parameter group's momentum: ``momentum`` or the first of ``betas``; None for neither."""
    if 'momentum' in group:
        return MOMENTUM, group['momentum']
    return BETA1, (group.get('betas') or [None])[0]


def _seconds_in_updates(state: State) -> float:
    return sum(getattr(algorithm, 'update_seconds', 0.0) for algorithm in state.algorithms)


def epochs_done(state: State) -> float:
    """Epochs done, with the running one as the share of its batches that are done."""
    running = int(state.timestamp.batch_in_epoch)
    length = int(state.dataloader_len) if state.dataloader_len is not None else None
    return int(state.timestamp.epoch) + (running / length if length else 0.0)


def _is_evaluation(line: dict[str, Any], labels: Iterable[str]) -> bool:
    return any(name.startswith(f'metrics/{label}/') for label in labels for name in line)


def _number(value: Any) -> float | None:
    if isinstance(value, torch.Tensor):
        return value.item() if value.numel() == 1 else None
    return value if isinstance(value, int | float) and not isinstance(value, bool) else None
