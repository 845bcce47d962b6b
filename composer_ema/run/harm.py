"""No silent harm: an average that still holds much of its start when it is used at the end of a run is warned of."""

from __future__ import annotations

import math
from collections.abc import Iterable

from composer_ema.averages import HalfLife, Smoothing
from composer_ema.profiles import start_remedy
from composer_ema.run.average import Average
from composer_ema.run.clock import Look, Run, resolve_share
from composer_ema.run.due import Interval, Start
from composer_ema.run.limits import warn
from composer_ema.spans import NOUNS, Span, multiples
from composer_ema.wording import counted


class Harm:
    """Warns of each average once: before a run that will leave too much of its start, or else when it is used after.

    Args:
        label: of an average that a message need not name, as it is the only one.
    """

    def __init__(self, label: str) -> None:
        self._label = label
        self._warned: set[str] = set()
        self._is_training = False

    def foresee(self, averages: Iterable[tuple[str, Average]], start: Start, interval: Interval, run: Run) -> None:
        """Warns, when training begins, of averages that will hold too much of their start when it ends."""
        self._is_training = True
        for label, average in averages:
            share = expected_share(average, start, interval, run)
            if share is not None:
                self._warn(label, average, share, ahead=_in_a_run_of(average, run))

    def tell(self, averages: Iterable[tuple[str, Average]]) -> None:
        """Warns, when training has ended, of averages that hold too much of their start."""
        self._is_training = False
        for label, average in averages:
            self._look_at(label, average)

    def lent(self, label: str, average: Average) -> None:
        """Warns if an average is lent that holds too much of its start. During training it is too early to say so."""
        if not self._is_training:
            self._look_at(label, average)

    def _look_at(self, label: str, average: Average) -> None:
        if average.start.value is not None and average.has_begun:
            self._warn(label, average, average.start.value)

    def _warn(self, label: str, average: Average, share: float, *, ahead: str = '') -> None:
        if label in self._warned:
            return
        name = 'the average' if label == self._label else f'the average {label!r}'
        if said := start_remedy(share, average.profile, average=name, ahead=bool(ahead)):
            self._warned.add(label)
            warn(f'{ahead}{said}' if ahead else f'{said[0].upper()}{said[1:]}')


def _in_a_run_of(average: Average, run: Run) -> str:
    """The argument that is too long, and the length of the run."""
    horizon = average.horizon
    unit = 'ba' if horizon is None else horizon.resolve(run).unit
    length = run.length(unit)
    where = 'this run' if length is None else f'a run of {counted(length, NOUNS[unit])}'
    return f'{horizon or average.profile} in {where}: '


def expected_share(average: Average, start: Start, interval: Interval, run: Run) -> float | None:
    """How much of an average will be its start when training ends.

    Args:
        average: now, perhaps in the middle of a resumed run.
        start: of the average.
        interval: of its updates.
        run: that trains.

    Returns:
        The share; None where it cannot be known yet: the length of the run is not known in the units that it takes, the
        profile does not shrink the start at a constant pace, or nobody knows what the average started from.
    """
    profile, so_far = average.profile, average.start.value
    if not isinstance(profile, HalfLife | Smoothing) or so_far is None:
        return None
    span = interval.resolve(run)
    whole, batches = run.length(span.unit), run.length('ba')
    first = _position(average, start, interval, run)
    if not whole or not batches or first is None or first > whole * (1 + 1e-9):
        return None  # without an update there is no average
    pace = max(span.value, whole / batches)  # no more than one update a batch, however short the interval
    begin = 0.0 if start.span.value == 0 else first
    if average.first_update is not None:
        begin = average.first_update[span.unit]
    updates = multiples(whole - begin, pace) - multiples(first - begin, pace)
    if not average.has_begun:
        so_far = 1.0
    if updates <= 0:
        return so_far
    if isinstance(profile, Smoothing):
        return so_far * profile.smoothing**updates
    half_life = resolve_share(Span(profile.half_life, profile.unit), run, 'half_life')
    length = run.length(half_life.unit)
    if length is None:
        return None
    last = begin + multiples(whole - begin, pace) * pace
    elapsed = (last - first) / whole * length
    return so_far * 2 ** (-elapsed / half_life.value) if half_life.value > 0 else 0.0


def _position(average: Average, start: Start, interval: Interval, run: Run) -> float | None:
    """The clock at the last update, or at the first one to come, in the unit of the interval."""
    unit = interval.resolve(run).unit
    if average.has_begun:
        return (average.last_update or Look(run).now)[unit]
    whole, begin = run.length(unit), start.resolve(run)
    until, batches = run.length(begin.unit), run.length('ba')
    if not whole or not until or not batches:
        return None
    first, now = begin.value / until * whole, Look(run).now[unit]
    if interval.ends != 'ba':
        return max(math.floor(now) + 1, math.ceil(first - 1e-9))
    return max(first, now + whole / batches)
