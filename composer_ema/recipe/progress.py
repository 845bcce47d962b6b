"""How a run shows how far it is: Composer's bars on a terminal, elsewhere one line per epoch or evaluation."""

from __future__ import annotations

import contextlib
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TextIO

from composer.core import State, TimeUnit
from composer.loggers import ConsoleLogger, Logger, LoggerDestination, ProgressBarLogger
from composer.utils import dist, is_notebook

from composer_ema.run_folder.recorder import Collector, epochs_done
from composer_ema.wording import visible

_LOSS, _METRICS = 'loss/train/', 'metrics/'


class EpochLines(LoggerDestination):
    """Prints one line at the end of each epoch, and one after each evaluation at another time, on rank 0.

    A line gives how far the run is, the training loss of the last batch and, after an evaluation, its metrics::

        epoch 2 of 20, batch 80: loss/train/total 1.0286, eval_ema/CrossEntropy 1.6944, ...

    Args:
        stream: Where to print.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._collector = Collector()
        self._has_evaluated = self._has_fit = False

    def log_metrics(self, metrics: dict[str, Any], step: int | None = None) -> None:
        self._collector.log_metrics(metrics, step)

    def fit_start(self, state: State, logger: Logger) -> None:
        self._has_evaluated = self._has_fit = False

    def batch_checkpoint(self, state: State, logger: Logger) -> None:
        # The line of the epoch comes at once.
        if self._has_evaluated and state.timestamp.batch_in_epoch != state.dataloader_len:
            self._print(state)

    def epoch_checkpoint(self, state: State, logger: Logger) -> None:
        self._print(state)

    def fit_end(self, state: State, logger: Logger) -> None:
        self._has_fit = True

    def eval_after_all(self, state: State, logger: Logger) -> None:
        self._has_evaluated = True
        # Evaluators may still run after FIT_END, when no checkpoint event follows.
        if self._has_fit:
            self._print(state)

    def _print(self, state: State) -> None:
        self._has_evaluated = False
        values = [
            f'{name.removeprefix(_METRICS)} {value:.4f}'
            for name, value in self._collector.take().items()
            if name.startswith((_LOSS, _METRICS))
        ]
        if dist.get_global_rank() == 0:
            line = ': '.join(filter(None, (_how_far(state), ', '.join(values))))
            print(visible(line), file=self._stream, flush=True)


def progress_of(
    given: Mapping[str, Any], loggers: Sequence[LoggerDestination]
) -> tuple[dict[str, Any], list[LoggerDestination]]:
    """How a run shows its progress, where the recipe does not say it.

    Args:
        given: Arguments of the Trainer. ``progress_bar`` and ``log_to_console`` keep their meaning.
        loggers: Those of the recipe. One that shows progress itself is left alone.

    Returns:
        Further arguments of the Trainer, and further loggers: bars on a terminal and in a notebook, else lines.
    """
    shows_itself = any(isinstance(each, ProgressBarLogger | ConsoleLogger) for each in loggers)
    if 'progress_bar' in given or shows_itself:
        return {}, []
    stream = sys.stdout if str(given.get('console_stream', 'stderr')).lower() == 'stdout' else sys.stderr
    if stream.isatty() or is_notebook():
        return {}, []
    return {'progress_bar': False}, ([] if given.get('log_to_console') else [EpochLines(stream)])


@contextlib.contextmanager
def other_progress_may_resume() -> Iterator[None]:
    """Silences Composer's warning about a run that began on a terminal and resumes off it, or the other way round."""
    with warnings.catch_warnings():
        names = f'{EpochLines.__qualname__}|{ProgressBarLogger.__qualname__}'
        warnings.filterwarnings('ignore', message=f'({names}) is not in the state_dict')
        yield


def _how_far(state: State) -> str:
    """Time done of the whole, in the unit of ``max_duration``, and the batch: ``epoch 2 of 20, batch 80``."""
    time, end = state.timestamp, state.max_duration
    assert end is not None, 'the schema asks for it'
    done = f'{epochs_done(state):.6g}' if end.unit == TimeUnit.EPOCH else time.get(end.unit).value
    far = f'{end.unit.name.lower()} {done} of {end.value}'
    return far if end.unit == TimeUnit.BATCH else f'{far}, batch {int(time.batch)}'
