"""When an update, a log line or the start of an average is due."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from composer_ema.run.clock import Clock, Look, TimeArgument
from composer_ema.spans import Span, has_crossed


class Start(TimeArgument):
    """The time at which something begins."""

    @classmethod
    def of(cls, name: str, time: Any) -> Start:
        """Reads the argument ``name``, a time string of any unit but iterations.

        Raises:
            TypeError, ArgumentError: ``time`` is none.
        """
        return cls(name, Span.parse(time, name=name, units=('ba', 'ep', 'sp', 'tok', 'dur')))

    def has_come(self, look: Look) -> bool:
        """Whether the time has come.

        Raises:
            ValueError: the run does not count the unit.
        """
        if self.span.value == 0:
            return True
        start = self.resolve(look.run)
        look.check_counts(start.unit, self)
        return look.time(start.unit) >= start.value - 1e-9


@dataclass(frozen=True)
class Interval(TimeArgument):
    """The time between two occurrences of something."""

    @classmethod
    def of(cls, name: str, time: Any) -> Interval:
        """Reads the argument ``name``, a time string above zero.

        Raises:
            TypeError, ArgumentError: ``time`` is none.
        """
        return cls(name, Span.parse(time, name=name, positive=True))

    @functools.cached_property
    def ends(self) -> str:
        """At whose ends to look: ``'ep'`` or ``'iter'`` for whole epochs or iterations, else ``'ba'``, of batches."""
        is_whole = self.span.value == int(self.span.value)
        return self.span.unit if is_whole and self.span.unit in ('ep', 'iter') else 'ba'

    def has_passed(
        self, look: Look, since: Mapping[str, float] | None = None, counted_from: Mapping[str, float] | None = None
    ) -> bool:
        """Whether a multiple of the interval, counted from a moment, lies after ``since`` and not after now.

        Args:
            look: at the clock, at one of those :attr:`ends`.
            since: the clock at the last occurrence. Default: the last of those :attr:`ends`.
            counted_from: the clock at that moment. Default: the start of training.

        Raises:
            ValueError: the run does not count the unit.
        """
        span = self.resolve(look.run)
        look.check_counts(span.unit, self)
        now = look.time(span.unit)
        if since is not None:
            earlier = since[span.unit]
        elif self.ends == 'ba':
            earlier = look.before[span.unit]
        else:
            earlier = now - 1  # the epoch or iteration that has just ended
        begin = 0.0 if counted_from is None else counted_from[span.unit]
        return has_crossed(earlier - begin, now - begin, span.value)

    def before(self, look: Look) -> dict[str, float]:
        """The clock one interval ago, at least zero: exact for one batch, else as if time passed evenly."""
        span = self.resolve(look.run)
        if (span.value, span.unit) == (1, 'ba'):
            return dict(look.before)
        now = look.now
        share = max(0.0, 1 - span.value / now[span.unit]) if now[span.unit] > 0 else 0.0
        return {unit: time * share for unit, time in now.items()}


def first_update(start: Start, interval: Interval, look: Look, started_at: Mapping[str, float] | None) -> Clock | None:
    """The clock at the first update of an average that has begun, where its state does not tell; None if unknown.

    Exact in the unit of the interval if the start has the same unit or ``started_at`` is one interval earlier, and no
    step was skipped since. In other units, as if time had passed evenly.

    Args:
        start: of the average, not zero.
        interval: of its updates.
        look: at the clock, now.
        started_at: the clock from which its age counts.
    """
    span, begin = interval.resolve(look.run), start.resolve(look.run)
    now = look.now
    if not now[span.unit] > 0:
        return None
    if begin.unit == span.unit:
        first = begin.value
    elif started_at is not None:
        first = started_at[span.unit] + span.value
    else:
        return None
    return {unit: time * (first / now[span.unit]) for unit, time in now.items()}
