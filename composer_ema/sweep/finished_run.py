"""Opens a finished run for a sweep: what it kept, its recipe, its data, and the file of what was evaluated before."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from composer_ema import profiles
from composer_ema.averages import CopiesFirst, Moment
from composer_ema.checkpoints.reading import CheckpointError
from composer_ema.posthoc import shares
from composer_ema.posthoc.open_run import OpenRun
from composer_ema.posthoc.shares import Vector
from composer_ema.posthoc.target import RunClock, Target, choose, start_of
from composer_ema.run_folder.lock import InUseError, Lock
from composer_ema.run_folder.outputs import RECIPE_FILE, SWEEP_FILE
from composer_ema.spans import ArgumentError, Span
from composer_ema.sweep.measuring import measure_of, recipe_of
from composer_ema.sweep.search import Asked, Sweep, check_metric, forgetting, own_values, sweep
from composer_ema.sweep.trials import Family, Trial, TrialsFile
from composer_ema.trainer.refresh import Refresh

_WEIGHTS = 'weights'


def sweep_run(
    folder: Path,
    asked: Asked,
    overrides: Sequence[str] = (),
    *,
    report: Callable[[int, int, Trial], None] = lambda done, total, trial: None,
) -> Sweep:
    """Evaluates averages of a run, and keeps the results in ``sweep.jsonl`` in its folder.

    Args:
        folder: The run folder, with its recipe and with snapshots or checkpoints.
        asked: What to try and how.
        overrides: Of where the data lie, how they are read, and the device.
        report: As for :func:`composer_ema.sweep.search.sweep`.

    Raises:
        RecipeError: The run held out no samples, or cannot be built here.
        CheckpointError: It kept nothing that averages can be made of, or has not ended, or another process works in it.
        ArgumentError: What is asked for is out of range for this run.
    """
    if not (folder / RECIPE_FILE).is_file():
        raise CheckpointError(
            f'{folder} has no {RECIPE_FILE}, so it is no folder of a run that composer-ema train has made. Pass one.'
        )
    try:
        lock = Lock(folder)
    except InUseError as error:
        raise CheckpointError(f'{error} Sweep it when that has ended.') from error
    except OSError as error:
        raise CheckpointError(
            f'{folder} cannot be written to, and a sweep keeps its results there: {error.strerror or error}. Sweep a '
            'copy of it.'
        ) from error
    with lock:
        return _sweep_locked(folder, asked, overrides, report)


def _sweep_locked(
    folder: Path, asked: Asked, overrides: Sequence[str], report: Callable[[int, int, Trial], None]
) -> Sweep:
    recipe = recipe_of(folder, overrides, on_test=asked.on_test)
    changes = forgetting(recipe.values) if asked.family == 'half_life' else {}
    kept = Opened(folder, changes)
    refresh = None if asked.refresh_batchnorm is False else Refresh(asked.refresh_batchnorm)
    values, own = asked.shares(kept.clock), own_values(recipe.values, asked.family, kept.clock)
    with measure_of(recipe, num_batches=asked.num_batches, refresh=refresh) as measure:
        if refresh is not None and not measure.has_batchnorm:
            raise ArgumentError(
                f'refresh_batchnorm={asked.refresh_batchnorm} has no effect: the model has no BatchNorm layer with '
                'statistics. Leave it out.',
                'refresh_batchnorm',
            )
        metric = check_metric(asked.metric, measure.metrics)
        samples = measure.samples
        conditions = {
            'files': fingerprint(kept.files),
            'data': recipe.values['data'],
            'samples': samples,
            'changes': changes,
            'refresh_batchnorm': asked.refresh_batchnorm,
            'metrics': measure.metrics,
        }
        trials, training, choice = sweep(
            kept, measure, TrialsFile(folder / SWEEP_FILE, conditions), family=asked.family, values=values,
            points=asked.points, own=own, metric=metric, report=report,
        )  # fmt: skip
        return Sweep(
            run_name=str(recipe.values.get('run_name') or folder.resolve().name),
            family=asked.family,
            trials=trials,
            training=training,
            lower_is_better=measure.metrics,
            metric=metric,
            choice=choice,
            clock=kept.clock,
            samples=samples,
            on_test=asked.on_test,
            recipe=recipe.values,
            own=own,
            changes=changes,
            is_refreshed=refresh is not None,
            imported=measure.imported,
        )


@dataclass(frozen=True)
class Simulated(Target):
    """What EMA would have kept with this half-life, and with what else makes its average forget where it started.

    Args:
        half_life: of the average.
        changes: ``{'warmup': 0.1}`` or ``{'bias_correction': True}``, as EMA takes them.

    Example:
        >>> target = Simulated(Span(2, 'ba'), {'bias_correction': True})
        >>> target.weights(RunClock({'ba': np.array([1.0, 2.0])})).round(4).tolist()
        [1.0, 0.5858]
    """

    half_life: Span
    changes: Mapping[str, Any]

    def weights(self, clock: RunClock) -> Vector:
        """The weights of the updates, each as EMA would choose it at that moment."""
        times, half_life = clock.within(self.half_life, 'half_life')
        profile = CopiesFirst(profiles.choose(unit='updates', half_life=half_life, **self.changes))
        steps = np.diff(times, prepend=start_of(times))
        found = np.empty(len(times))
        since_start = 0.0
        for update, elapsed in enumerate(steps.tolist()):
            since_start += elapsed
            moment = Moment(elapsed, since_start, update)
            found[update] = profile.weight(moment)
            profile.record(moment)
        return found

    def cumulative(self, clock: RunClock) -> Vector:
        """Its cumulative shares."""
        return shares.cumulative(self.weights(clock))

    def __str__(self) -> str:
        return ','.join([f'half_life={self.half_life}', *(f'{name}={value}' for name, value in self.changes.items())])


class Opened:
    """What a run has kept, opened once; see :class:`composer_ema.sweep.search.Kept`.

    Args:
        folder: of the run.
        changes: as for :class:`Simulated`. Default: none.

    Raises:
        CheckpointError: It kept nothing that averages can be made of, or not the weights that it ended with.
    """

    def __init__(self, folder: Path, changes: Mapping[str, Any] | None = None) -> None:
        self._changes = changes or {}
        self._run = OpenRun(folder)
        history = self._run.history
        weights = [each for each in history.kept if each.label == _WEIGHTS]
        has_last = bool(weights) and len(weights[-1].weights) == history.num_moments
        if not (history.is_finished or has_last):
            raise CheckpointError(
                f'{history.folder} has no weights of the end of the run, so it has not ended. Train the rest with '
                'autoresume=true, then sweep it.'
            )

    @property
    def clock(self) -> dict[str, float]:
        """Unit to the time at the end of the run, which may lie after its last update."""
        last, planned = self._run.clock, self._run.history.max_duration
        whole = None if planned is None else Span.parse(planned, name='max_duration')
        factor = whole.value / last[whole.unit] if whole is not None and last.get(whole.unit, 0) > 0 else 1.0
        return {unit: round(time * factor, 9) for unit, time in last.items()}

    @property
    def files(self) -> list[Path]:
        """The files that averages and the last weights are read from."""
        # Where checkpoints lie in the run folder itself, what a sweep writes lies beside them.
        endings = {path.suffix for path in self._run.files}
        return [path for path in self._run.history.folder.iterdir() if path.is_file() and path.suffix in endings]

    def training(self) -> dict[str, Tensor]:
        """The weights that the optimizer left."""
        # Those of a last batch that made no update are no average of updates, but the newest that there is.
        return self._run.history.completed({})

    def average(self, family: Family, value: float) -> tuple[Mapping[str, Tensor], float]:
        """An average at the end of the run, and its predicted error."""
        if family == 'power':
            target = choose(power=value)
        else:
            half_life = Span(value, 'dur')
            target = Simulated(half_life, self._changes) if self._changes else choose(half_life=half_life)
        combination = self._run.combine(target)
        return self._run.state_dict(combination), combination.predicted_error


def fingerprint(files: Sequence[Path]) -> str:
    """Tells files from others of the same names by their sizes and times."""
    facts = [(path.name, (status := path.stat()).st_size, status.st_mtime_ns) for path in sorted(files)]
    return hashlib.sha256(repr(facts).encode()).hexdigest()[:16]
