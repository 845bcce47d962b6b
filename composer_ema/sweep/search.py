"""Evaluates averages of a finished run over half-lives, each made from what the run kept, and chooses the best."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from torch import Tensor

from composer_ema.averages import Power
from composer_ema.labelled import CHANGES
from composer_ema.run.asked import MAKERS
from composer_ema.run_folder.outputs import is_number
from composer_ema.spans import ArgumentError, Span
from composer_ema.sweep.choice import Choice, choose
from composer_ema.sweep.trials import TRAINING, Family, Measured, Trial, TrialsFile
from composer_ema.wording import squash, suggestion

#: The shortest and the longest half-life tried, as shares of the run, and the widths of power functions like them.
RANGES: dict[Family, tuple[float, float]] = {'half_life': (0.01, 0.5), 'power': (0.014, 0.28)}
#: How many averages are tried over these ranges, before more are tried around the best one.
POINTS = 13
_REFINEMENTS = 2
_DIGITS = 3


class Kept(Protocol):
    """What a run kept, opened once for all averages that are reconstructed from it."""

    def training(self) -> Mapping[str, Tensor]:
        """The weights that the optimizer left: every tensor of the model."""
        ...

    def average(self, family: Family, value: float) -> tuple[Mapping[str, Tensor], float]:
        """An average at the end of the run, and its predicted error; see :class:`composer_ema.sweep.trials.Trial`."""
        ...


class Measures(Protocol):
    """What evaluates weights: :class:`composer_ema.sweep.measuring.Measure`."""

    @property
    def metrics(self) -> dict[str, bool]:
        """Name of each metric to whether its small values are the good ones; these come first."""
        ...

    def evaluate(self, tensors: Mapping[str, Tensor], *, is_average: bool = True) -> Measured:
        """The metrics of weights."""
        ...


@dataclass(frozen=True)
class Asked:
    """What a user asks a sweep for.

    Args:
        family: What the averages differ in.
        values: Time strings of half-lives, or widths of power functions, and no others. Default: None, ``points`` of
            them and then some around the best.
        points: How many are tried before those around the best, at least 3.
        metric: The name of the metric to choose by. Default: None, the model's first loss, or else its first metric.
        num_batches: How many batches to evaluate on, at least 1. Default: None, all.
        refresh_batchnorm: Over how much of the training data to compute BatchNorm's statistics anew for each average;
            see :class:`composer_ema.SWA`. Default: False, not at all.
        on_test: Whether to choose on the test set. Default: False.

    Raises:
        ArgumentError: One is out of range.
    """

    family: Family = 'half_life'
    values: Sequence[str] | None = None
    points: int = POINTS
    metric: str | None = None
    num_batches: int | None = None
    refresh_batchnorm: bool | int | str = False
    on_test: bool = False

    def __post_init__(self) -> None:
        if self.points < 3:
            raise ArgumentError(f'points must be at least 3, got {self.points}. Leave it out for {POINTS}.', 'points')
        if self.num_batches is not None and self.num_batches < 1:
            raise ArgumentError(
                f'limit counts batches, at least 1, got {self.num_batches}. Leave it out for all.', 'limit'
            )
        if self.values is not None and not self.values:
            raise ArgumentError('no half-lives are given. Write for example 0.05dur,0.1dur,330ba.', 'half_lives')

    def shares(self, clock: Mapping[str, float]) -> list[float] | None:
        """The values as numbers, half-lives as shares of a run that ends at ``clock``.

        Raises:
            ArgumentError: One is no time string or no width, or the run does not count its unit.
        """
        if self.values is None:
            return None
        if self.family == 'power':
            return [_width(text) for text in self.values]
        return [_share(text, clock) for text in self.values]


@dataclass(frozen=True)
class Sweep:
    """What a sweep found.

    Args:
        run_name: The run.
        family: What its averages differ in.
        trials: Of the averages, by value.
        training: That of the training weights.
        lower_is_better: Name of each metric to whether its small values are the good ones.
        metric: The one that was chosen by.
        choice: The best average; None if none can be trusted.
        clock: Unit to the time at the end of the run.
        samples: The samples it was chosen on, in words.
        on_test: Whether these are the test set.
        recipe: The values of the run's recipe.
        own: Values of the averages that the run itself kept. Default: none.
        changes: What the averages have besides their half-life, from the recipe. Default: nothing.
        is_refreshed: Whether BatchNorm's statistics were computed anew for each average. Default: False.
        imported: Which files of the user's were imported for the recipe, in sentences. Default: none.
    """

    run_name: str
    family: Family
    trials: list[Trial]
    training: Trial
    lower_is_better: dict[str, bool]
    metric: str
    choice: Choice | None
    clock: Mapping[str, float]
    samples: str
    on_test: bool
    recipe: Mapping[str, Any]
    own: Sequence[float] = ()
    changes: Mapping[str, Any] = field(default_factory=dict)
    is_refreshed: bool = False
    imported: Sequence[str] = ()

    def in_own_unit(self, share: float) -> str:
        """A half-life in the unit of the recipe's own, or in ``dur``."""
        return in_unit_of(_arguments(self.recipe)[1].get('half_life'), share, self.clock)

    def overrides(self, value: float) -> str:
        """What to write behind ``composer-ema train RECIPE`` for a run that keeps the average of a trial."""
        return overrides(self.recipe, self.family, value, self.clock)


def sweep(
    kept: Kept,
    measure: Measures,
    file: TrialsFile,
    *,
    family: Family,
    values: Sequence[float] | None = None,
    points: int = POINTS,
    own: Sequence[float] = (),
    metric: str,
    report: Callable[[int, int, Trial], None] = lambda done, total, trial: None,
) -> tuple[list[Trial], Trial, Choice | None]:
    """Evaluates the training weights and one average after another, then more averages around the best.

    Args:
        kept: What the run kept.
        measure: What evaluates.
        file: What was evaluated before is taken from it, what is new is written into it at once.
        family: What the averages differ in.
        values: Half-lives as shares of the run, or widths; no others are tried. Default: ``points`` over
            :data:`RANGES`, and then some around the best.
        points: How many.
        own: Values of the averages that the run itself kept, which are tried as well. Default: none.
        metric: What to choose by.
        report: Called after each trial with how many are done, how many there will be, and the trial.

    Returns:
        tuple: The trials by value, that of the training weights, and the choice.
    """
    asked = sorted({*(values if values is not None else grid(family, points)), *map(rounded, own)})
    refinements = _REFINEMENTS if values is None else 0
    total = 1 + len(asked) + 2 * refinements
    lower_is_better = measure.metrics[metric]
    done = itertools.count(1)

    def tried(target: str, value: float | None) -> Trial:
        trial = file.find(target)
        if trial is None:
            tensors, error = (kept.training(), None) if value is None else kept.average(family, value)
            measured = measure.evaluate(tensors, is_average=value is not None)
            trial = Trial(target, value, error, measured.metrics, measured.parts)
            file.add(trial)
        report(next(done), total, trial)
        return trial

    training = tried(TRAINING, None)
    trials = {value: tried(target_of(family, value), value) for value in asked}
    for _ in range(refinements):
        choice = choose(list(trials.values()), training, metric, lower_is_better=lower_is_better)
        if choice is None:
            break
        for value in _between(choice.best.value or 0.0, trials):
            trials[value] = tried(target_of(family, value), value)
    by_value = [trials[value] for value in sorted(trials)]
    return by_value, training, choose(by_value, training, metric, lower_is_better=lower_is_better)


def grid(family: Family, points: int) -> list[float]:
    """Values over the range of a family, each the same multiple of the one before.

    Example:
        >>> grid('half_life', 5)
        [0.01, 0.0266, 0.0707, 0.188, 0.5]
    """
    return [rounded(value) for value in np.geomspace(*RANGES[family], points)]


def target_of(family: Family, value: float) -> str:
    """What a trial of this average is called.

    Example:
        >>> target_of('half_life', 0.05), target_of('power', 0.1)
        ('half_life=0.05dur', 'power=0.1')
    """
    return f'{family}={value:g}dur' if family == 'half_life' else f'{family}={value:g}'


def overrides(recipe: Mapping[str, Any], family: Family, value: float, clock: Mapping[str, float]) -> str:
    """The overrides of a recipe for a run that keeps this average, with a half-life in the unit of the recipe's own.

    Args:
        recipe: The values of the recipe.
        family: What ``value`` is.
        value: A half-life as a share of the run, or the width of a power function.
        clock: Unit to the time at the end of the run.

    Example:
        >>> overrides({'algorithms': {'ema': {'half_life': '100ba'}}}, 'half_life', 0.1, {'ba': 2508.0})
        'algorithms.ema.half_life=251ba'
        >>> overrides({'algorithms': {'ema': {'power': 0.1}}}, 'half_life', 0.1, {'ba': 2508.0})
        '~algorithms.ema.power algorithms.ema.half_life=0.1dur'
        >>> overrides({'algorithms': {'ema': {'half_life': {'short': '10ba'}}}}, 'half_life', 0.1, {'ba': 2508.0})
        'algorithms.ema.half_life.best=251ba'
    """
    name, own = _arguments(recipe)
    written = in_unit_of(own.get('half_life'), value, clock) if family == 'half_life' else f'{rounded(value):g}'
    if any(isinstance(own.get(key), Mapping) for key in MAKERS):  # one more average beside those with labels
        evaluated = recipe.get('evaluate')
        seen = f' evaluate=[{",".join([*evaluated, "best"])}]' if evaluated and 'best' not in evaluated else ''
        return f'algorithms.{name}.{family}.best={written}{seen}'
    unfit = [key for key in MAKERS if key != family] + (list(CHANGES) if family == 'power' else [])
    dropped = [f'~algorithms.{name}.{key}' for key in unfit if own.get(key)]
    return ' '.join([*dropped, f'algorithms.{name}.{family}={written}'])


def own_values(recipe: Mapping[str, Any], family: Family, clock: Mapping[str, float]) -> list[float]:
    """The values of the averages that a recipe keeps, of one family: half-lives as shares of the run, or widths.

    Example:
        >>> recipe = {'algorithms': {'ema': {'half_life': {'short': '100ba', 'long': '0.1dur'}}}}
        >>> own_values(recipe, 'half_life', {'ba': 2000.0})
        [0.05, 0.1]
    """
    given: Any = _arguments(recipe)[1].get(family)
    found: list[Any] = list(given.values()) if isinstance(given, Mapping) else [given]
    if family == 'power':
        return [float(each) for each in found if is_number(each)]
    spans = [Span.parse(each, name='half_life') for each in found if isinstance(each, str)]
    return [share for span in spans if (share := _share_of(span, clock)) is not None and share > 0]


def forgetting(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """What of a recipe's EMA makes an exponential average forget where it started; of several averages, the first's.

    Example:
        >>> forgetting({'algorithms': {'ema': {'half_life': '100ba', 'warmup': 0.1}}})
        {'warmup': 0.1}
    """
    own = _arguments(recipe)[1]
    found = {name: own.get(name) for name in CHANGES}
    plain = {
        name: next(iter(value.values()), None) if isinstance(value, Mapping) else value for name, value in found.items()
    }
    return {name: value for name, value in plain.items() if value}


def in_unit_of(example: Any, share: float, clock: Mapping[str, float]) -> str:
    """A share of the run as a time string in the unit of another one, or in ``dur``.

    Example:
        >>> in_unit_of('100ba', 0.1, {'ba': 2508.0}), in_unit_of('1ep', 0.1, {'ep': 6.0}), in_unit_of(None, 0.1, {})
        ('251ba', '0.6ep', '0.1dur')
    """
    if isinstance(example, Mapping):
        example = next(iter(example.values()), None)
    unit = Span.parse(example, name='half_life').unit if isinstance(example, str) else 'dur'
    whole = clock.get(unit, 0.0)
    if not whole > 0:
        return f'{rounded(share):g}dur'
    value = rounded(share * whole)
    return f'{value:g}{unit}' if unit in ('ep', 'iter') else f'{max(1, round(value))}{unit}'


def _arguments(recipe: Mapping[str, Any]) -> tuple[str, Mapping[str, Any]]:
    """What a recipe calls EMA, and the arguments that it gives to it."""
    algorithms = recipe.get('algorithms') or {}
    name = next((each for each in algorithms if squash(each) == 'ema'), 'ema')
    return name, algorithms.get(name) or {}


def _share(text: str, clock: Mapping[str, float]) -> float:
    span = Span.parse(text.strip(), name='half_life', positive=True)
    share = _share_of(span, clock)
    if share is None:
        units = ', '.join([*(unit for unit, time in clock.items() if time > 0), 'dur'])
        raise ArgumentError(f'half_life={span} is in a unit that the run did not count. It has {units}.', 'half_life')
    return share


def _share_of(span: Span, clock: Mapping[str, float]) -> float | None:
    """A half-life as a share of the run; None where the run did not count its unit."""
    if span.unit == 'dur':
        return float(span.value)
    return span.value / clock[span.unit] if clock.get(span.unit, 0) > 0 else None


def _width(text: str) -> float:
    try:
        return Power(float(text)).sigma_rel
    except ValueError as error:
        said = str(error) if 'power' in str(error) else f'power must be a number such as 0.1, got {text!r}.'
        raise ArgumentError(said, 'power') from None


def check_metric(name: str | None, metrics: Mapping[str, bool]) -> str:
    """The metric to choose by: the one called ``name``, or the first.

    Raises:
        ArgumentError: there is no such metric.
    """
    if name is not None and name not in metrics:
        raise ArgumentError(f'there is no metric {name!r}. {suggestion(name, metrics)}', 'metric')
    return next(iter(metrics)) if name is None else name


def rounded(value: float) -> float:
    """A number to three digits."""
    return float(f'{value:.{_DIGITS}g}')


def _between(best: float, tried: Iterable[float]) -> list[float]:
    """The values halfway from the best one to its neighbours, on a logarithmic scale."""
    ordered = sorted(tried)
    place = ordered.index(best)
    neighbours = [*ordered[max(0, place - 1) : place], *ordered[place + 1 : place + 2]]
    found = [rounded(math.sqrt(best * other)) for other in neighbours]
    return [value for value in dict.fromkeys(found) if value not in ordered]
