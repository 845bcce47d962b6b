"""Which average is wanted: from the words of a user and the clock of a run to the weights of updates."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from composer_ema.averages import Power
from composer_ema.posthoc import shares
from composer_ema.posthoc.shares import Vector
from composer_ema.spans import UNITS, ArgumentError, Span
from composer_ema.wording import figure, shown, suggestion

# Epochs and shares of a run come in fractions.
_SAME_TIME = 1e-9


@dataclass(frozen=True, eq=False)
class RunClock:
    """The time at every moment of a run.

    Args:
        times: unit, one of :data:`composer_ema.spans.UNITS`, to the time of each moment in it, float64[moments],
            rising. Batches, ``'ba'``, are always there.
        duration: of the whole run, for shares of it. Default: up to the last moment.
    """

    times: Mapping[str, Vector]
    duration: Span | None = None

    def __len__(self) -> int:
        return len(self.times['ba'])

    def within(self, span: Span, name: str) -> tuple[Vector, float]:
        """The times in the unit in which ``span`` is measured, and its length in that unit.

        Args:
            span: of the run.
            name: of the argument, for the error.

        Raises:
            ArgumentError: the run's clock has no such unit.
        """
        whole = self.duration if self.duration is not None and self.duration.unit in self.times else None
        if span.unit == 'dur':
            unit = whole.unit if whole is not None else 'ba'
            length = whole.value if whole is not None else float(self.times['ba'][-1])
            return self.times[unit], span.value * length
        if span.unit not in self.times or not self.times[span.unit][-1] > 0:
            units = ', '.join(unit for unit, times in self.times.items() if times[-1] > 0)
            raise ArgumentError(
                f'{name}={span} is in {UNITS[span.unit]}, which the run did not count. It counted {units}. Shares of '
                'the run are in dur.',
                name,
            )
        return self.times[span.unit], float(span.value)

    def until(self, at: Span | None) -> RunClock:
        """The clock up to the last moment that is not after ``at``.

        Raises:
            ArgumentError: ``at`` lies before the first moment or after the last one.
        """
        if at is None:
            return self
        times, value = self.within(at, 'at')
        count = int(np.searchsorted(times, value * (1 + _SAME_TIME) + _SAME_TIME, side='right'))
        if count == 0 or value > times[-1] * (1 + _SAME_TIME):
            unit = next(unit for unit, each in self.times.items() if each is times)
            raise ArgumentError(
                f'at={at} must lie between the first moment and the last one that the run kept, '
                f'{figure(times[0])}{unit} and {figure(times[-1])}{unit}.',
                'at',
            )
        # What is a share of the run stays a share of all of it.
        duration = self.duration if self.duration is not None else Span(float(self.times['ba'][-1]), 'ba')
        return RunClock({unit: each[:count] for unit, each in self.times.items()}, duration)


def start_of(times: Vector) -> float:
    """When the averages of a run started: one interval before their first update, and not before the run did.

    Example:
        >>> start_of(np.array([1.0, 3.0, 6.0])), start_of(np.array([150.0, 157.0, 164.0]))
        (0.0, 143.0)
    """
    interval = times[1] - times[0] if len(times) > 1 else times[0]
    return max(0.0, float(times[0] - interval))


class Target(ABC):
    """An average that is wanted at the last moment of a clock."""

    @abstractmethod
    def cumulative(self, clock: RunClock) -> Vector:
        """Its cumulative shares at every moment; see :mod:`composer_ema.posthoc.shares`."""

    @abstractmethod
    def __str__(self) -> str:
        """As its argument is spelled: ``'half_life=0.1dur'``."""

    def weights(self, clock: RunClock) -> Vector:
        """The weights of the updates that would have given it."""
        return shares.weights_of(self.cumulative(clock))


@dataclass(frozen=True)
class ByHalfLife(Target):
    """An exponential average with this half-life, which started as a copy of the weights at the first moment."""

    half_life: Span

    def cumulative(self, clock: RunClock) -> Vector:
        return shares.exponential(*clock.within(self.half_life, 'half_life'))

    def __str__(self) -> str:
        return f'half_life={self.half_life}'


@dataclass(frozen=True)
class ByPower(Target):
    """A power function average since the averages of the run started; see :func:`start_of`."""

    profile: Power

    def cumulative(self, clock: RunClock) -> Vector:
        times = clock.times['ba']
        return shares.power(times, self.profile.gamma, start_of(times))

    def __str__(self) -> str:
        return str(self.profile)


@dataclass(frozen=True)
class Latest(Target):
    """An average of the last ``span`` in which all weights have the same share."""

    span: Span

    def cumulative(self, clock: RunClock) -> Vector:
        return _of_last(clock, self.span, 'equal', shares.latest)

    def __str__(self) -> str:
        return f'equal={self.span}'


@dataclass(frozen=True)
class Decayed(Target):
    """Where a decay of the learning rate over the last ``span`` would have led, had it only scaled each step."""

    schedule: str
    span: Span

    def cumulative(self, clock: RunClock) -> Vector:
        eta = shares.SCHEDULES[self.schedule]
        return _of_last(clock, self.span, 'schedule', lambda times, span: shares.decayed(times, eta, span))

    def __str__(self) -> str:
        return f'schedule={self.schedule}:{self.span}'


def choose(
    *,
    half_life: str | Span | None = None,
    power: float | None = None,
    gamma: float | None = None,
    equal: str | Span | None = None,
    schedule: str | None = None,
) -> Target:
    """Returns the average that exactly one of the arguments asks for.

    Args:
        half_life: time string above 0, such as ``'0.1dur'`` or ``'500ba'``: an exponential average.
        power: ``sigma_rel`` of a power function average; see :class:`composer_ema.averages.Power`.
        gamma: its exponent.
        equal: time string above 0: an equal average of the last so much.
        schedule: ``'linear'``, ``'cosine'`` or ``'1-sqrt'``: what a learning rate that falls so over the whole run
            would have given; over the last part of it with a time string behind a colon, ``'1-sqrt:0.2dur'``.

    Raises:
        TypeError: an argument has the wrong type.
        ArgumentError: an argument is out of range, or not exactly one is given.

    Example:
        >>> str(choose(schedule='linear:0.2dur')), str(choose(half_life='500ba'))
        ('schedule=linear:0.2dur', 'half_life=500ba')
    """
    given = {'half_life': half_life, 'power': power, 'gamma': gamma, 'equal': equal, 'schedule': schedule}
    asked = {name: value for name, value in given.items() if value is not None}
    if len(asked) != 1:
        listing = ' and '.join(f'{name}={shown(value)}' for name, value in asked.items()) or 'none'
        raise ArgumentError(
            f'say which average you want with exactly one of {", ".join(given)}, got {listing}. Pass for example '
            "half_life='0.1dur'."
        )
    if half_life is not None:
        return ByHalfLife(Span.parse(half_life, name='half_life', positive=True))
    if equal is not None:
        return Latest(Span.parse(equal, name='equal', positive=True))
    if schedule is not None:
        return _schedule(schedule)
    try:
        return ByPower(Power(power) if power is not None else Power(gamma=gamma))  # pyright: ignore[reportArgumentType]
    except ValueError as error:
        raise ArgumentError(str(error), 'power' if power is not None else 'gamma') from None


def _schedule(text: str) -> Decayed:
    if not isinstance(text, str):
        raise TypeError(f"schedule must be a string such as 'cosine', got {shown(text)} of type {type(text).__name__}.")
    name, has_span, span = text.partition(':')
    if name not in shares.SCHEDULES:
        advice = suggestion(name, shares.SCHEDULES, 'It may be')
        raise ArgumentError(f'schedule={shown(text)} is no known decay of the learning rate. {advice}', 'schedule')
    return Decayed(name, Span.parse(span if has_span else '1dur', name='schedule', positive=True))


def _of_last(clock: RunClock, span: Span, name: str, closed_form: shares.OfLast) -> Vector:
    """The shares of an average of the last ``span``, all of it or what the run has of it."""
    times, length = clock.within(span, name)
    passed = float(times[-1])
    if length > passed * (1 + _SAME_TIME) and span.unit != 'dur':
        raise ArgumentError(
            f'{name}={span} is longer than the run up to that moment, {figure(passed)}{span.unit}. Pass at most that, '
            'or a share of the run.',
            name,
        )
    return closed_form(times, min(length, passed) if math.isfinite(length) else passed)
