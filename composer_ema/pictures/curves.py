"""What runs did, as curves: reads their metrics files into plain arrays. Draws nothing."""

from __future__ import annotations

import difflib
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

import numpy as np

from composer_ema.recipe.outputs import (
    METRICS_FILE,
    RECIPE_FILE,
    Array,
    Axis,
    Curve,
    curve,
    curves_by_group,
    is_number,
)

#: What a reader calls a set of weights.
LABELS = {'training': 'training weights', 'ema': 'average', 'swa': 'equal average', 'eval': 'evaluated weights'}
#: What the picture of a run is called in its folder, before its ending.
CURVES = 'curves'
# A curve is smoothed over this share of its values, and only if it goes up and down by this many times its range.
SMOOTHED_SHARE, NOISY_TIMES = 0.02, 3.0


class PlotError(ValueError):
    """Something cannot be drawn: which file or argument, why, and what to pass instead."""


@dataclass(frozen=True)
class Point:
    """One evaluation of one set of weights.

    Args:
        epoch: Epochs trained by then.
        accuracy: Share of right answers, in [0, 1].
        loss: Cross entropy in nats.
        batch: Batches trained by then. Default: 0.
        sample: Samples trained by then. Default: 0.
    """

    epoch: float
    accuracy: float | None
    loss: float | None
    batch: int = 0
    sample: int = 0


@dataclass(frozen=True)
class RunCurves:
    """One run, ready to be drawn.

    Args:
        name: What a legend calls it.
        loss: The training loss of every batch.
        rates: The learning rate of every batch, by the parameter groups that share it, such as ``'groups 0, 2'``.
        momenta: The same for momentum; empty for an optimizer without.
        evaluations: By the weights that were evaluated, ``'training'``, ``'ema'``, ..., oldest first.
        distances: The relative distance of each average from the weights, by the algorithm that logged it.
        target_accuracy: What the recipe's report counts epochs to, in [0, 1]; None without a recipe.
    """

    name: str
    loss: Curve
    rates: dict[str, Curve]
    momenta: dict[str, Curve]
    evaluations: dict[str, list[Point]]
    distances: dict[str, Curve] = field(default_factory=dict)
    target_accuracy: float | None = None


@dataclass(frozen=True)
class Asked:
    """What a picture is asked of: runs or recipes, one of the two.

    Args:
        folders: Of runs.
        recipes: Recipe files, each with its overrides.
    """

    folders: list[Path]
    recipes: list[tuple[Path, list[str]]]

    @property
    def default_out(self) -> Path:
        """Where a picture goes that was given no name: with one run, above several, or here."""
        if not self.folders:
            return Path('schedule')
        return (self.folders[0] if len(self.folders) == 1 else self.folders[0].resolve().parent) / CURVES


def sort_arguments(things: Sequence[str]) -> Asked:
    """Tells folders of runs, recipes and overrides apart.

    An override belongs to the recipes before it, as far back as the last override: ``a.yaml b.yaml lr=1`` is of both,
    ``a.yaml lr=1 a.yaml lr=2`` draws one recipe twice.

    Raises:
        PlotError: runs and recipes together, or an override without a recipe.
    """
    folders: list[Path] = []
    recipes: list[tuple[Path, list[str]]] = []
    first, is_closed = 0, False
    for thing in things:
        path = Path(thing)
        if '=' in thing and not path.exists():
            if not recipes:
                raise PlotError(f'the override {thing!r} has no recipe before it. Write RECIPE.yaml {thing}.')
            for _, overrides in recipes[first:]:
                overrides.append(thing)
            is_closed = True
        elif path.suffix.lower() in ('.yaml', '.yml'):
            first = len(recipes) if is_closed else first
            recipes.append((path, []))
            is_closed = False
        else:
            folders.append(path.parent if path.name == METRICS_FILE and path.is_file() else path)
    if folders and recipes:
        raise PlotError(
            f'{folders[0]} is a folder of a run and {recipes[0][0]} a recipe: what was and what will be make two '
            'pictures. Give the ones or the others.'
        )
    return Asked(folders, recipes)


def check_axis(axis: str | None) -> Axis | None:
    """Raises unless ``axis`` is one to draw over; None leaves the choice to the runs."""
    legal: dict[str, Axis] = {each: each for each in get_args(Axis)}
    if axis is not None and axis not in legal:
        raise PlotError(f'a picture is drawn over {", ".join(legal)}, got {axis!r}.')
    return None if axis is None else legal[axis]


def read_run(folder: Path, name: str | None = None) -> RunCurves:
    """Reads the curves of a run folder, also while the run goes on, and of files that older releases wrote.

    Args:
        folder: Holds the ``metrics.jsonl`` that :class:`composer_ema.recipe.recorder.Recorder` wrote.
        name: What to call the run. Default: the folder's name.

    Raises:
        PlotError: no such folder, no metrics in it, or a line that is no metrics.
    """
    lines = read_lines(folder)
    training = [line for line in lines if 'loss/train/total' in line or 'lr/group0' in line]
    run = RunCurves(
        name=name or folder.resolve().name,
        loss=curve(training, 'loss/train/total'),
        rates=curves_by_group(training, 'lr'),
        momenta=curves_by_group(training, 'momentum'),
        evaluations=evaluations(lines),
        distances=_distances(lines),
        target_accuracy=_target_accuracy(folder),
    )
    if not (len(run.loss) or run.rates or run.evaluations):
        raise PlotError(f'{folder / METRICS_FILE} holds no training loss, learning rate or evaluation yet.')
    return run


def read_runs(folders: Sequence[Path]) -> list[RunCurves]:
    """:func:`read_run` of each; folders of the same name are told apart by those above them."""
    return [read_run(folder, name) for folder, name in zip(folders, _distinct_names(folders), strict=True)]


def read_lines(folder: Path) -> list[dict[str, Any]]:
    """The lines of a run's metrics file. A last line that is half written is left out.

    Raises:
        PlotError: as :func:`read_run`.
    """
    path = folder / METRICS_FILE
    if folder.is_file():
        raise PlotError(f'{folder} is a file, neither the folder of a run nor a recipe, whose name ends in .yaml.')
    if not folder.is_dir():
        raise PlotError(f'{folder} is no run folder: there is no such folder. {_folders_beside(folder)}'.rstrip())
    if not path.is_file():
        raise PlotError(f'{folder} is no run folder: it has no {METRICS_FILE}. {_what_lies_below(folder)}'.rstrip())
    try:
        texts = path.read_text(encoding='utf-8').splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise PlotError(f'{path} cannot be read: {error}') from error
    lines = []
    for number, text in enumerate(texts, start=1):
        try:
            line = json.loads(text)
            if not isinstance(line, dict) or not all(is_number(line.get(key)) for key in ('epoch', 'batch', 'sample')):
                raise ValueError('it does not give epoch, batch and sample')
        except ValueError as error:
            if number == len(texts):
                break
            raise PlotError(f'{path}: line {number} is no line of metrics: {error}.') from error
        lines.append(line)
    return lines


def evaluations(lines: Iterable[Mapping[str, Any]]) -> dict[str, list[Point]]:
    """Accuracy and loss of each set of weights, from the metrics of the evaluators ``eval_training``, ``eval_ema``, ...

    An evaluator that is called ``eval``, as Composer does by itself, counts as ``'eval'``.
    """
    points: dict[str, list[Point]] = {}
    for line in lines:
        found: dict[str, dict[str, float]] = {}
        for name, value in line.items():
            label = re.fullmatch(r'metrics/(eval[^/]*)/(.+)', name)
            if label and is_number(value):
                found.setdefault(label[1].removeprefix('eval_'), {})[label[2]] = value
        for weights, metrics in found.items():
            point = Point(
                line['epoch'], _first(metrics, 'Accuracy'), _first(metrics, 'CrossEntropy'),
                line.get('batch', 0), line.get('sample', 0),
            )  # fmt: skip
            points.setdefault(weights, []).append(point)
    return {weights: points[weights] for weights in sorted(points, key=_order_of_weights)}


def first_reaching(points: Iterable[Point], target: float) -> Point | None:
    """The first evaluation at or above the target accuracy; None when there is none."""
    # Metrics are float32, where 9 of 10 right answers are 0.8999999762: allow for its rounding.
    return next((point for point in points if point.accuracy is not None and point.accuracy >= target - 1e-6), None)


def smoothed(values: Array) -> tuple[Array, int]:
    """A centred mean over 2 % of the values where they are noisy.

    Where less than half of it is left before a value, it goes as far to both sides, so that a steep start stays
    steep; at the end it goes over what is left.

    Args:
        values: A curve, one value per batch. Values that are not finite count as missing.

    Returns:
        The curve and over how many values each mean goes, which is odd; 1 where nothing was smoothed: the curve is
        short, or goes up and down by no more than three times the range that its means cover.

    Example:
        >>> calm, noisy = np.linspace(2, 1, 500), np.tile([1.0, 2.0], 250)
        >>> smoothed(calm)[1], smoothed(noisy)[1]
        (1, 11)
    """
    half = math.ceil(SMOOTHED_SHARE * len(values) / 2)
    if len(values) < 10 or not np.isfinite(values).any():
        return values, 1
    means = _centred_means(values, half)
    path = np.abs(np.diff(values[np.isfinite(values)])).sum()
    is_noisy = path > NOISY_TIMES * (np.nanmax(means) - np.nanmin(means))
    return (means, 2 * half + 1) if is_noisy else (values, 1)


def _centred_means(values: Array, half: int) -> Array:
    is_known = np.isfinite(values)
    sums = np.concatenate([[0.0], np.cumsum(np.where(is_known, values, 0.0))])
    counts = np.concatenate([[0], np.cumsum(is_known)])
    index = np.arange(len(values))
    reach = np.minimum(half, index)
    low, high = index - reach, np.minimum(index + reach + 1, len(values))
    with np.errstate(invalid='ignore'):  # a window without any number has no mean
        return (sums[high] - sums[low]) / (counts[high] - counts[low])


def _distances(lines: Sequence[Mapping[str, Any]]) -> dict[str, Curve]:
    names = dict.fromkeys(name for line in lines for name in line if name.endswith('/relative_distance'))
    return {name.removesuffix('/relative_distance'): curve(lines, name) for name in names}


def _target_accuracy(folder: Path) -> float | None:
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    try:
        target = OmegaConf.select(OmegaConf.load(folder / RECIPE_FILE), 'report.target_accuracy')
    except (OSError, ValueError, YAMLError, OmegaConfBaseException):
        return None  # the curves do not need it
    return target if is_number(target) else None


def _order_of_weights(weights: str) -> tuple[int, str]:
    return (0 if weights == 'training' else 1, weights)


def _first(metrics: Mapping[str, float], part: str) -> float | None:
    return next((value for name, value in metrics.items() if part in name), None)


def _distinct_names(folders: Sequence[Path]) -> list[str]:
    """Folder names, preceded by as many of the folders above as it takes for all to differ."""
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
    near = difflib.get_close_matches(folder.name, runs, n=1, cutoff=0.0)
    return f'The nearest run is {folder.parent / near[0]}.' if near else ''


def _what_lies_below(folder: Path) -> str:
    for kind, found in (('Runs', folder.glob(f'*/{METRICS_FILE}')), ('Recipes', folder.glob('*.yaml'))):
        below = sorted(str(each.parent if each.name == METRICS_FILE else each) for each in found)
        if below:
            return f'{kind} in it: {", ".join(below[:5])}{", ..." if len(below) > 5 else ""}.'
    return ''
