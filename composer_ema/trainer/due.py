"""When an update, a log line or the start of an average is due."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass

from composer.core import Event

from composer_ema.trainer.clock import Look, TimeArgument


class Start(TimeArgument):
    """The time at which something begins."""

    def has_come(self, look: Look) -> bool:
        """Whether the time has come.

        Raises:
            ValueError: the run does not count the unit.
        """
        if self.span.value == 0:
            return True
        start = self.resolve(look.state)
        look.check_counts(start.unit, self)
        return look.time(start.unit) >= start.value - 1e-9


@dataclass(frozen=True)
class Interval(TimeArgument):
    """The time between two occurrences of something."""

    @functools.cached_property
    def event(self) -> Event:
        """The event at which to look: the end of an epoch or iteration for whole ones, else the end of a batch."""
        if self.span.value == int(self.span.value):
            return {'ep': Event.EPOCH_END, 'iter': Event.ITERATION_END}.get(self.span.unit, Event.BATCH_END)
        return Event.BATCH_END

    def has_passed(self, look: Look, since: Mapping[str, float] | None = None) -> bool:
        """Whether a multiple of the interval lies after ``since`` and not after now.

        Args:
            look: at the clock, at :attr:`event`.
            since: the clock at the last occurrence. Default: the last time that :attr:`event` came.

        Raises:
            ValueError: the run does not count the unit.
        """
        span = self.resolve(look.state)
        look.check_counts(span.unit, self)
        now = look.time(span.unit)
        if since is not None:
            earlier = since[span.unit]
        elif self.event is Event.BATCH_END:
            earlier = look.before[span.unit]
        else:
            earlier = now - 1  # the epoch or iteration that has just ended
        return has_crossed(earlier, now, span.value)

    def before(self, look: Look) -> dict[str, float]:
        """The clock one interval ago, in all units, if time has passed evenly so far; at least zero."""
        span = self.resolve(look.state)
        now = look.now
        share = max(0.0, 1 - span.value / now[span.unit]) if now[span.unit] > 0 else 0.0
        return {unit: time * share for unit, time in now.items()}


def has_crossed(earlier: float, now: float, interval: float) -> bool:
    """Whether a multiple of ``interval`` lies in (earlier, now], up to the rounding error of fractions.

    Example:
        >>> has_crossed(9, 10, 10), has_crossed(10, 11, 10), has_crossed(2.9, 3.1, 0.5)
        (True, False, True)
    """
    if now <= earlier or now - earlier >= interval:
        return now > earlier
    return math.floor(now / interval + 1e-9) > math.floor(earlier / interval + 1e-9)
