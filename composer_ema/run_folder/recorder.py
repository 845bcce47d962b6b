"""Writes the metrics of a run to a file, one line per batch or evaluation; a resumed run continues it without gaps."""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from composer.core import Callback, State
from composer.loggers import Logger, LoggerDestination
from composer.utils import dist

from composer_ema.files import append, size_of, write_beside
from composer_ema.run_folder.folder import RunFolder
from composer_ema.run_folder.lost import LostCheckpoints
from composer_ema.run_folder.outputs import BETA1, MOMENTUM
from composer_ema.wording import counted

_NUM_LINES, _EVALUATIONS, _LINES, _DIGEST, _TRAIN = 'num_lines', 'evaluations', 'lines', 'digest', 'train'
_STEP_SECONDS, _UPDATE_SECONDS, _NUM_BATCHES = 'step_seconds', 'update_seconds', 'num_batches'

_OF_TRAINING = 'metrics/train/'


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
    lines written up to the checkpoint, and a digest of them. On resume the file is cut to that number, and the run
    writes the rest again. A run that resumes where the file does not begin with these lines starts it anew, with the
    evaluations so far; so does one whose file somebody removes while it trains, and :meth:`lost` then tells what is
    gone. Until the first batch is trained, or something is to be written, the file is left as it is.

    Pass the recorder to the Trainer as its first callback, before its saver, and ``collector`` as a logger. Composer
    runs loggers after all callbacks, and so after a checkpoint is written; therefore a callback writes the lines, and
    the logger only collects metrics. As the first callback, which runs after the algorithms, the recorder measures
    between BATCH_START and BATCH_END the step and the update of the average, and no other callback.

    Args:
        folder: The run folder with the file to write; begun before the file is touched, released when the Trainer is
            closed. None writes nothing. Default: None.

    Attributes:
        path: The file.
        collector: The logger that collects metrics.
        evaluations: The lines that hold metrics of an evaluator, oldest first.
        step_seconds: Time from BATCH_START to BATCH_END, summed over ``num_batches`` batches.
        update_seconds: Time that the averaging algorithms spent in those batches and at ends of epochs, by their own
            ``update_seconds``.
        num_batches: Number of batches measured.
    """

    def __init__(self, folder: RunFolder | None = None) -> None:
        self.path = None if folder is None else folder.metrics
        self._folder = folder
        self.collector = Collector()
        self.num_lines = 0
        self._digest: str | None = ''  # None where a checkpoint of an earlier version did not say it
        self.evaluations: list[dict[str, Any]] = []
        self.step_seconds = 0.0
        self.update_seconds = 0.0
        self.num_batches = 0
        self._batch_started: float | None = None
        self._updates_seen = 0.0
        self._has_begun = self._has_fit = False
        self._step: dict[str, float] = {}
        # What Composer says of the last batch, and says once more at the end of an epoch; not where it was resumed.
        self._of_last_batch: dict[str, float] = {}
        self._has_trained = False
        self._size = self._last_batch = 0
        self._lost_checkpoints = LostCheckpoints()
        self._lost = self._lost_until = 0

    @property
    def update_share(self) -> float | None:
        """Share of step time spent on averaging, in [0, 1]; None if nothing was averaged."""
        return self.update_seconds / self.step_seconds if self.update_seconds > 0 and self.step_seconds > 0 else None

    @property
    def has_begun(self) -> bool:
        """Whether the run has written to its folder, as it does from its first batch on."""
        return self._has_begun

    def state_dict(self) -> dict[str, Any]:
        return {
            _NUM_LINES: self.num_lines,
            # One string: a sharded checkpoint would have a key for each entry of a list, and a run that is resumed,
            # which has none of them yet, would look for the list itself and fail. It would fail as well where an older
            # checkpoint lacks a key, hence the digest in here.
            _EVALUATIONS: json.dumps({_LINES: self.evaluations, _DIGEST: self._digest, _TRAIN: self._of_last_batch}),
            _STEP_SECONDS: self.step_seconds,
            _UPDATE_SECONDS: self.update_seconds,
            _NUM_BATCHES: self.num_batches,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.num_lines = state[_NUM_LINES]
        evaluations = state[_EVALUATIONS]
        found = json.loads(evaluations) if isinstance(evaluations, str) else [*map(dict, evaluations)]
        # Checkpoints of earlier versions hold the lines alone, or lack the last of these.
        found = {_DIGEST: None, _TRAIN: {}, **({_LINES: found} if isinstance(found, list) else found)}
        self.evaluations, self._digest, self._of_last_batch = found[_LINES], found[_DIGEST], found[_TRAIN]
        self.step_seconds = state[_STEP_SECONDS]
        self.update_seconds = state[_UPDATE_SECONDS]
        self.num_batches = state[_NUM_BATCHES]

    def fit_start(self, state: State, logger: Logger) -> None:
        self.collector.take()
        self._updates_seen = _seconds_in_updates(state)
        self._last_batch = int(state.timestamp.batch)

    def batch_start(self, state: State, logger: Logger) -> None:
        self._batch_started = perf_counter()

    def after_train_batch(self, state: State, logger: Logger) -> None:
        # This is the last event before the step. By BATCH_END the schedulers have moved on.
        self._step = step_settings(state.optimizers)
        self._has_trained = True
        self._begin()

    def batch_end(self, state: State, logger: Logger) -> None:
        if self._batch_started is not None:
            self.step_seconds += perf_counter() - self._batch_started
            self._count_updates(state)
            self.num_batches += 1
            self._batch_started = None

    def batch_checkpoint(self, state: State, logger: Logger) -> None:
        self._before_files_are_written(state)
        metrics = self.collector.take()
        self._of_last_batch = {name: value for name, value in metrics.items() if name.startswith(_OF_TRAINING)}
        self._write_line(state, {**self._step, **metrics})

    def epoch_checkpoint(self, state: State, logger: Logger) -> None:
        self._begin()  # a run resumed after the last batch of an epoch comes here first
        self._before_files_are_written(state)
        self._count_updates(state)
        metrics = self.collector.take()
        self._write_line(state, metrics if self._has_trained else {**metrics, **self._of_last_batch})

    def fit_end(self, state: State, logger: Logger) -> None:
        self._has_fit = True

    def eval_after_all(self, state: State, logger: Logger) -> None:
        # Evaluators may still run after FIT_END, when no checkpoint event follows.
        if not self._has_fit:
            return
        metrics = self.collector.take()
        # A run that is resumed at its end does not know that it has evaluated there (Composer 0.32.1).
        if not any(line['batch'] == int(state.timestamp.batch) for line in self.evaluations[-1:]):
            self._begin()
            self._write_line(state, metrics)

    def post_close(self) -> None:
        if self._folder is not None:
            self._folder.release()

    def has_evaluated(self, batch: int) -> bool:
        """Whether the run has been evaluated after so many batches, before the loaded checkpoint or after it."""
        lines = [*self.evaluations, *map(_parsed, self._lines_in_file()[self.num_lines :])]
        return any(line.get('batch') == batch and any(map(_is_of_evaluator, line)) for line in lines)

    def lost(self, state: State) -> Iterator[str]:
        """What somebody has removed of the lines and the checkpoints of the run since it started here, in words."""
        if self._has_begun and self.path is not None and dist.get_global_rank() == 0:
            self._make_up_for_lost_lines(self.path)
        if self.path is not None and self._lost:
            yield f'{counted(self._lost, "line")} of {self.path.name} up to batch {self._lost_until}, no evaluation'
        if checkpoints := self._lost_checkpoints.in_words(state):
            yield checkpoints

    def goes_on_in_file(self) -> bool:
        """Whether the file holds the lines that were written up to the loaded checkpoint, and no others."""
        lines = self._lines_in_file()
        return len(lines) == self.num_lines and self._are_own(lines)

    def has_past_in_file(self) -> bool:
        """Whether the file begins with the lines that were written up to the loaded checkpoint."""
        lines = self._lines_in_file()[: self.num_lines]
        return len(lines) == self.num_lines and self._are_own(lines)

    def _before_files_are_written(self, state: State) -> None:
        if self._folder is not None:
            self._folder.keep()
        self._lost_checkpoints.before_rotation(state)

    def _begin(self) -> None:
        """Once the run has really begun, replaces what is to be replaced in its folder."""
        if self._has_begun or self._folder is None:
            return
        self._has_begun = True
        problem: list[str | None] = [None]
        try:
            if dist.get_global_rank() == 0:
                self._begin_file(self._folder.metrics)
            self._folder.begin()
        except OSError as error:
            problem[0] = str(error)
            raise
        finally:
            dist.broadcast_object_list(problem)
        if problem[0] is not None:
            raise RuntimeError(f'on rank 0: {problem[0]}')

    def _begin_file(self, path: Path) -> None:
        lines = self._lines_in_file()
        if self.has_past_in_file():
            lines = lines[: self.num_lines]
        else:
            if lines:
                warnings.warn(
                    f'{path} does not begin with the {counted(self.num_lines, "line")} that led to the checkpoint, so '
                    'it holds another run, or was edited. It begins anew, with the evaluations up to the checkpoint.',
                    stacklevel=2,
                )
            lines = [json.dumps(line) for line in self.evaluations]
        self.num_lines, self._digest = len(lines), _digest_of(lines)
        write_beside(path, ''.join(f'{line}\n' for line in lines))
        self._size = size_of(path)

    def _make_up_for_lost_lines(self, path: Path) -> None:
        """If the file is shorter than what was written, keeps the lines that are left, or else the evaluations."""
        if size_of(path) >= self._size:
            return
        left = path.read_text(encoding='utf-8', errors='replace') if path.exists() else ''
        whole = left[: left.rfind('\n') + 1].splitlines()
        lines = whole or [json.dumps(line) for line in self.evaluations]
        write_beside(path, ''.join(f'{line}\n' for line in lines))
        self._lost += self.num_lines - len(lines)
        self._lost_until = self._last_batch
        self._size, self.num_lines, self._digest = size_of(path), len(lines), _digest_of(lines)

    def _lines_in_file(self) -> list[str]:
        if self.path is None or not self.path.is_file():
            return []
        return self.path.read_text(encoding='utf-8', errors='replace').splitlines()

    def _are_own(self, lines: Iterable[str]) -> bool:
        return self._digest is None or self._digest == _digest_of(lines)

    def _count_updates(self, state: State) -> None:
        seen, self._updates_seen = self._updates_seen, _seconds_in_updates(state)
        self.update_seconds += self._updates_seen - seen

    def _write_line(self, state: State, metrics: Mapping[str, float]) -> None:
        if not metrics:
            return
        time = state.timestamp
        line: dict[str, Any] = {
            'epoch': epochs_done(state),
            'batch': int(time.batch),
            'sample': int(time.sample),
            **metrics,
        }
        if self.path is not None and dist.get_global_rank() == 0:
            self._make_up_for_lost_lines(self.path)
            text = json.dumps(line)
            append(self.path, f'{text}\n')
            self._size += len(text) + 1
            self._digest = _digest_of([text], self._digest or '')
        if _is_evaluation(line, (evaluator.label for evaluator in state.evaluators)):
            self.evaluations.append(line)
        self.num_lines += 1
        self._last_batch = int(time.batch)


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


def _digest_of(lines: Iterable[str], before: str = '') -> str:
    """A digest of lines that grows line by line: each one's is of the digest before it and the line."""
    for line in lines:
        before = hashlib.sha256(f'{before}{line}'.encode()).hexdigest()
    return before


def _seconds_in_updates(state: State) -> float:
    return sum(getattr(algorithm, 'update_seconds', 0.0) for algorithm in state.algorithms)


def epochs_done(state: State) -> float:
    """Epochs done, with the running one as the share of its batches that are done."""
    running = int(state.timestamp.batch_in_epoch)
    length = int(state.dataloader_len) if state.dataloader_len is not None else None
    return int(state.timestamp.epoch) + (running / length if length else 0.0)


def _parsed(text: str) -> dict[str, Any]:
    """A line of the file; nothing of one that is none."""
    try:
        line = json.loads(text)
    except ValueError:
        return {}
    return line if isinstance(line, dict) else {}


def _is_of_evaluator(name: str) -> bool:
    return name.startswith('metrics/') and not name.startswith(_OF_TRAINING)


def _is_evaluation(line: dict[str, Any], labels: Iterable[str]) -> bool:
    return any(name.startswith(f'metrics/{label}/') for label in labels for name in line)


def _number(value: Any) -> float | None:
    if isinstance(value, torch.Tensor):
        return value.item() if value.numel() == 1 else None
    return value if isinstance(value, int | float) and not isinstance(value, bool) else None
