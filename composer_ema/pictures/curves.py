"""Reads the metrics files of runs into plain arrays; draws nothing."""

from __future__ import annotations

import codecs
import json
import math
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from composer_ema.pictures.errors import PlotError
from composer_ema.pictures.weights import in_order
from composer_ema.recipe.metrics import Goal, Report
from composer_ema.run_folder.outputs import METRICS_FILE, RECIPE_FILE, Curve, curve, curves_by_group, is_number, momenta
from composer_ema.wording import suggestion

# Longer than any line of a run, and than any recipe; such a line is none.
_LONGEST_LINE, _LONGEST_RECIPE, _LONGEST_REASON = 2**24, 2**20, 200
# More digits than a float has powers of ten, and more batches or samples than anything trains on.
_MOST_DIGITS, _NO_PLACE = 300, 2.0**63
#: The name of a run's picture in its folder, without the ending.
CURVES = 'curves'


@dataclass(frozen=True)
class Point:
    """One evaluation of one set of weights.

    Args:
        epoch: Epochs trained so far.
        metrics: Name to value, in the order of the run.
        batch: Batches trained so far. Default: 0.
        sample: Samples trained so far. Default: 0.
    """

    epoch: float
    metrics: Mapping[str, float]
    batch: int = 0
    sample: int = 0


@dataclass(frozen=True)
class RunCurves:
    """One run, ready to be drawn.

    Args:
        name: Its name in a legend.
        loss: The training loss of every batch.
        rates: The learning rate of every batch, by the parameter groups that share it, such as ``'groups 0, 2'``.
        momenta: The same for momentum; empty for an optimizer without.
        evaluations: Label of a set of weights to its evaluations, oldest first. ``'training'`` comes first.
        distances: Label of an average to its relative distance from the training weights. Default: empty.
        report: What the recipe says of its metrics and its target. Default: none.
        momentum_names: What the optimizer calls its momentum, of ``'momentum'`` and ``'beta1'``. Default: none.
    """

    name: str
    loss: Curve
    rates: dict[str, Curve]
    momenta: dict[str, Curve]
    evaluations: dict[str, list[Point]]
    distances: dict[str, Curve] = field(default_factory=dict)
    report: Report | None = None
    momentum_names: tuple[str, ...] = ()

    @property
    def weights(self) -> list[str]:
        """The labels of all sets of weights that it evaluated or measured, in the order of the run."""
        return in_order([*self.evaluations, *self.distances])

    @property
    def metrics(self) -> list[str]:
        """The names of all metrics that it evaluated, in the order of the run."""
        return metrics_of(self.evaluations)

    @property
    def goal(self) -> Goal | None:
        """What the recipe wants reached; None where it does not say."""
        return None if self.report is None else self.report.goal(self.metrics)


def read_run(folder: str | os.PathLike[str], name: str | None = None) -> RunCurves:
    """Reads the curves of a run, finished or still going on.

    Args:
        folder: The run folder, with the ``metrics.jsonl`` of :class:`composer_ema.run_folder.recorder.Recorder`. Files
            without learning rates, as older releases wrote them, are read too.
        name: The run's name. Default: the folder's name.

    Raises:
        PlotError: There is no such folder, it has no metrics, or a line cannot be read.
    """
    folder = Path(folder)
    lines = read_lines(folder)
    training = [line for line in lines if 'loss/train/total' in line or 'lr/group0' in line]
    momentum, momentum_names = momenta(training)
    run = RunCurves(
        name=name or folder.resolve().name,
        loss=curve(training, 'loss/train/total'),
        rates=curves_by_group(training, 'lr'),
        momenta=momentum,
        momentum_names=momentum_names,
        evaluations=evaluations(lines),
        distances=_distances(lines),
        report=_report(folder),
    )
    if not (len(run.loss) or run.rates or run.evaluations):
        raise PlotError(f'{folder / METRICS_FILE} holds no training loss, learning rate or evaluation yet.')
    return run


def read_runs(folders: Iterable[str | os.PathLike[str]]) -> list[RunCurves]:
    """Reads several runs. Runs whose folders share a name are named by the folders above as well.

    Args:
        folders: The run folders; see :func:`read_run`.

    Raises:
        PlotError: As for :func:`read_run`, or a run is given twice.
    """
    if isinstance(folders, str | os.PathLike):
        raise PlotError(f'read_runs takes a list of run folders, got {os.fspath(folders)!r}. Put it in brackets.')
    paths = [Path(folder) for folder in folders]
    return [read_run(path, name) for path, name in zip(paths, _distinct_names(paths), strict=True)]


def read_lines(folder: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """The lines of a run's metrics file, without a last one that is half written.

    Raises:
        PlotError: As for :func:`read_run`.
    """
    folder = Path(folder)
    path = folder / METRICS_FILE
    if folder.is_file():
        raise PlotError(f'{folder} is a file, neither the folder of a run nor a recipe, whose name ends in .yaml.')
    if not folder.is_dir():
        raise PlotError(f'{folder} is no run folder: there is no such folder. {_folders_beside(folder)}'.rstrip())
    if not path.is_file():
        raise PlotError(f'{folder} is no run folder: it has no {METRICS_FILE}. {_what_lies_below(folder)}'.rstrip())
    lines: list[dict[str, Any]] = []
    broken: PlotError | None = None
    try:
        for number, text in enumerate(_texts(path), start=1):
            if broken is not None:
                raise broken
            try:
                lines.append(_line(text))
            except (ValueError, RecursionError) as error:
                broken = PlotError(f'{path}: line {number} is no line of metrics: {_in_short(error)}.')
    except OSError as error:
        raise PlotError(f'{path} cannot be read: {error.strerror or error}.') from error
    return lines


def _texts(path: Path) -> Iterator[bytes]:
    """The lines of a file, one at a time, and of one that never ends as much as is no line of metrics any more."""
    with path.open('rb') as file:
        file.seek(len(codecs.BOM_UTF8) if file.read(3) == codecs.BOM_UTF8 else 0)
        while text := file.readline(_LONGEST_LINE):
            yield text


def _line(text: bytes) -> dict[str, Any]:
    line = json.loads(text.decode('utf-8'), parse_int=_whole)
    places = [line.get(key) for key in ('epoch', 'batch', 'sample')] if isinstance(line, dict) else []
    if not places or not all(is_number(place) and 0 <= place < _NO_PLACE for place in places):
        raise ValueError('it does not give epoch, batch and sample')
    return line


def _whole(digits: str) -> int | float:
    """A whole number; infinity for one that no float comes near."""
    return int(digits) if len(digits) < _MOST_DIGITS else float(digits)


def _in_short(error: Exception) -> str:
    if isinstance(error, RecursionError):
        return 'it is nested too deeply'
    return str(error)[:_LONGEST_REASON]


def evaluations(lines: Iterable[Mapping[str, Any]]) -> dict[str, list[Point]]:
    """The metrics of each set of weights, from those of the evaluators ``eval_<label>``.

    Args:
        lines: Lines of a metrics file.

    Returns:
        dict: Label to evaluations: the training weights first, then the others as the run evaluates them. Composer
        calls an evaluator without a label ``eval``; its label here is ``'eval'``.

    Example:
        >>> line = {'epoch': 1.0, 'metrics/eval_ema/Accuracy': 0.5, 'metrics/eval_training/Accuracy': 0.25}
        >>> list(evaluations([line]))
        ['training', 'ema']
    """
    points: dict[str, list[Point]] = {}
    for line in lines:
        found: dict[str, dict[str, float]] = {}
        for name, value in line.items():
            match = re.fullmatch(r'metrics/(eval[^/]*)/(.+)', name)
            if match and is_number(value):
                found.setdefault(match[1].removeprefix('eval_'), {})[match[2]] = value
        for own, metrics in found.items():
            point = Point(line['epoch'], metrics, line.get('batch', 0), line.get('sample', 0))
            points.setdefault(own, []).append(point)
    return {label: points[label] for label in in_order(points)}


def metrics_of(points: Mapping[str, Iterable[Point]]) -> list[str]:
    """The names of all metrics in evaluations, each once, in the order of the run."""
    return list(dict.fromkeys(name for each in points.values() for point in each for name in point.metrics))


def first_reaching(points: Iterable[Point], goal: Goal) -> Point | None:
    """The first evaluation that is as good as the goal; None if there is none."""
    return next((point for point in points if goal.is_reached(point.metrics)), None)


def _distances(lines: Sequence[Mapping[str, Any]]) -> dict[str, Curve]:
    names = dict.fromkeys(name for line in lines for name in line if name.endswith('/relative_distance'))
    return {name.removesuffix('/relative_distance'): curve(lines, name) for name in names}


def _report(folder: Path) -> Report | None:
    """What the recipe of a run says of its metrics; None where it says nothing."""
    import yaml

    path = folder / RECIPE_FILE
    if not path.is_file():
        return None
    try:
        # As plain YAML, whose aliases stay what they are: the recipe of a run has every value filled in.
        with path.open(encoding='utf-8') as file:
            given = yaml.safe_load(file.read(_LONGEST_RECIPE))['report']
        return Report(**{key: _checked(key, value) for key, value in given.items()}) if given else None
    except (OSError, ValueError, yaml.YAMLError, LookupError, TypeError, AttributeError, RecursionError):
        return None  # the curves do not need it


def _checked(option: str, value: Any) -> Any:
    """The value of an option of :class:`Report`, whose kind nothing has checked in a file of others."""
    if option == 'metric':
        is_legal = isinstance(value, str)
    elif option == 'lower_is_better':
        is_legal = isinstance(value, bool)
    else:
        is_legal = is_number(value) and math.isfinite(value)
    if value is not None and not is_legal:
        raise ValueError(f'{option} cannot be {value!r}')
    return value


def _distinct_names(folders: Sequence[Path]) -> list[str]:
    """The names of the folders, each after as many of the folders above as make all names differ."""
    parts = [folder.resolve().parts for folder in folders]
    if len(set(parts)) < len(parts):
        twice = next(folder for folder, own in zip(folders, parts, strict=True) if parts.count(own) > 1)
        raise PlotError(f'{twice} was given twice. Name each run once.')
    depth = 1
    while len({own[-depth:] for own in parts}) < len(parts):
        depth += 1
    return ['/'.join(own[-depth:]) for own in parts]


def _folders_beside(folder: Path) -> str:
    runs = [each.parent.name for each in folder.parent.glob(f'*/{METRICS_FILE}')]
    beside = {name: str(folder.parent / name) for name in sorted(runs)}
    return suggestion(folder.name, beside.values(), 'Runs there are', spellings=beside) if beside else ''


def _what_lies_below(folder: Path) -> str:
    for kind, found in (('Runs', folder.glob(f'*/{METRICS_FILE}')), ('Recipes', folder.glob('*.yaml'))):
        below = sorted(str(each.parent if each.name == METRICS_FILE else each) for each in found)
        if below:
            return f'{kind} in it: {", ".join(below[:5])}{", ..." if len(below) > 5 else ""}.'
    return ''
