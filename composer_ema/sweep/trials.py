"""Sets of weights that a sweep has evaluated, and the file that keeps them; imports nothing heavy."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from composer_ema.files import write_beside
from composer_ema.run_folder.outputs import is_number

#: What distinguishes the averages of a sweep: a half-life as a share of the run, or the width of a power function.
Family = Literal['half_life', 'power']
#: The target of the weights that the optimizer left.
TRAINING = 'training'


@dataclass(frozen=True)
class Measured:
    """What an evaluation gave.

    Args:
        metrics: name to value over all samples.
        parts: name to the values over parts of the samples, the same parts in every evaluation.
    """

    metrics: dict[str, float]
    parts: dict[str, list[float]]


@dataclass(frozen=True)
class Trial:
    """One set of weights, evaluated.

    Args:
        target: ``'half_life=0.05dur'``, ``'power=0.1'`` or ``'training'``.
        value: the number in it; None for the training weights.
        predicted_error: of the reconstruction, as a share of the distance between the average and the last weights;
            None for the training weights.
        metrics: name to value over all samples.
        parts: name to the values over parts of the samples, which are the same parts for all trials of a sweep.
            Default: none.
    """

    target: str
    value: float | None
    predicted_error: float | None
    metrics: Mapping[str, float]
    parts: Mapping[str, list[float]] = field(default_factory=dict)

    def is_reliable(self, limit: float) -> bool:
        """Whether the predicted error is at most ``limit``."""
        return self.predicted_error is None or self.predicted_error <= limit


class TrialsFile:
    """The trials of sweeps of a run, one JSON object a line. What it holds need not be evaluated again.

    A line counts only for a sweep with the same conditions: the same files of the run, the same samples, the same
    treatment of BatchNorm. After each trial the file is replaced as a whole, so a killed sweep leaves whole lines.

    Args:
        path: of the file, which may not exist yet. Lines that are no trials are dropped when the next one is added.
        conditions: plain values that JSON keeps.
    """

    def __init__(self, path: Path, conditions: Mapping[str, Any]) -> None:
        self._path = path
        self._conditions = json.loads(json.dumps(conditions))
        self._lines = list(_lines(path))
        self._found = {
            trial.target: trial
            for line in self._lines
            if line['conditions'] == self._conditions and (trial := _trial(line)) is not None
        }

    def __len__(self) -> int:
        return len(self._found)

    def find(self, target: str) -> Trial | None:
        """The trial of a target under these conditions; None if there is none yet."""
        return self._found.get(target)

    def add(self, trial: Trial) -> None:
        """Writes a trial, in place of an earlier one of the same target under these conditions."""
        self._found[trial.target] = trial
        kept = [
            line
            for line in self._lines
            if not (line['conditions'] == self._conditions and line['target'] == trial.target)
        ]
        self._lines = [*kept, _line(trial, self._conditions)]
        write_beside(self._path, ''.join(f'{json.dumps(line)}\n' for line in self._lines))


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    try:
        texts = path.read_text(encoding='utf-8').splitlines()
    except (OSError, UnicodeDecodeError):
        return
    for text in texts:
        try:
            line = json.loads(text)
        except ValueError:
            continue
        if isinstance(line, dict) and isinstance(line.get('target'), str) and isinstance(line.get('conditions'), dict):
            yield line


def _line(trial: Trial, conditions: Mapping[str, Any]) -> dict[str, Any]:
    return {
        'target': trial.target,
        'value': trial.value,
        'predicted_error': trial.predicted_error,
        **{f'metrics/{name}': value for name, value in trial.metrics.items()},
        **{f'parts/{name}': list(values) for name, values in trial.parts.items()},
        'conditions': dict(conditions),
    }


def _trial(line: Mapping[str, Any]) -> Trial | None:
    metrics = {key.removeprefix('metrics/'): value for key, value in line.items() if key.startswith('metrics/')}
    parts = {key.removeprefix('parts/'): value for key, value in line.items() if key.startswith('parts/')}
    numbers = [*metrics.values(), *(each for values in parts.values() if isinstance(values, list) for each in values)]
    are_numbers = all(is_number(each) for each in numbers) and all(isinstance(each, list) for each in parts.values())
    optional = (line.get('value'), line.get('predicted_error'))
    if not metrics or not are_numbers or not all(each is None or is_number(each) for each in optional):
        return None
    value, predicted_error = optional
    return Trial(line['target'], value, predicted_error, metrics, parts)


def is_finite(trial: Trial, metric: str) -> bool:
    """Whether a trial has a finite value of a metric."""
    return math.isfinite(trial.metrics.get(metric, math.nan))
