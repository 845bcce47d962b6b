"""How far a run has come, in plain numbers of every unit that a time string can have.

A clock is a dictionary of plain numbers, so that it can stand in a checkpoint.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

from composer_ema.spans import CLOCK_UNITS, UNITS, ArgumentError, Span

Clock = dict[str, float]
#: The clock before the first batch.
START_OF_TRAINING: Mapping[str, float] = dict.fromkeys(CLOCK_UNITS, 0)


class Run(Protocol):
    """What averages ask of a run. Each trainer has its own.

    Attributes:
        remedies: by unit, why the run does not count it, and what to do, for errors: every unit that :meth:`counts` may
            deny; ``'ep'`` also where the length of an epoch is not known, ``'dur'`` where that of the run is not.
    """

    remedies: ClassVar[Mapping[str, str]]

    @property
    def max_duration(self) -> Span | None:
        """The length of the run; None if it has none."""
        ...

    def clock(self) -> Clock:
        """The time trained so far, in all of :data:`~composer_ema.spans.CLOCK_UNITS`.

        Whole numbers of batches, samples and tokens. Epochs and iterations are fractions where their length is known,
        else whole numbers. A batch is one step of the optimizer.
        """
        ...

    def clock_before(self) -> Mapping[str, float]:
        """The clock one batch, epoch or iteration ago."""
        ...

    def time(self, unit: str) -> float | None:
        """The time trained so far in one unit, where that is cheaper than a :meth:`clock`; else None."""
        ...

    def length(self, unit: str) -> float | None:
        """The length of the whole run in one unit; None if it is not known before training."""
        ...

    def counts(self, unit: str) -> bool:
        """Whether the run counts a unit at all; of tokens, whether it has counted any in the batches so far."""
        ...

    def counts_fractions(self, unit: str) -> bool:
        """Whether the clock counts fractions of a unit, because its length is known."""
        ...


@dataclass(frozen=True)
class TimeArgument:
    """A time that the user passed, with the name of the argument, so that errors can quote both.

    Args:
        name: of the argument.
        span: its value.
        label: of the average that it is for, where the argument is a mapping. Default: None.

    Example:
        >>> str(TimeArgument('half_life', Span(9, 'tok')))
        "half_life='9tok'"
        >>> str(TimeArgument('half_life', Span(9, 'tok'), label='long'))
        "half_life['long']='9tok'"
    """

    name: str
    span: Span
    label: str | None = None

    @property
    def written(self) -> str:
        """The argument as a user reads it, without its value."""
        return self.name if self.label is None else f'{self.name}[{self.label!r}]'

    def __str__(self) -> str:
        return f"{self.written}='{self.span}'"

    def resolve(self, run: Run) -> Span:
        """The span in a unit that the clock counts; see :func:`resolve_share`."""
        return resolve_share(self.span, run, self.name)


class Look:
    """What the clock shows at one event. The clock is read at most once, however many ask.

    Args:
        run: at the event.
    """

    __slots__ = ('_before', '_now', 'run')

    def __init__(self, run: Run) -> None:
        self.run = run
        self._now: Clock | None = None
        self._before: Mapping[str, float] | None = None

    @property
    def now(self) -> Clock:
        """The clock at the event."""
        if self._now is None:
            self._now = self.run.clock()
        return self._now

    def time(self, unit: str) -> float:
        """The time so far in one unit."""
        counted = self.run.time(unit) if self._now is None else None
        return self.now[unit] if counted is None else counted

    @property
    def before(self) -> Mapping[str, float]:
        """The clock one batch, epoch or iteration ago."""
        if self._before is None:
            self._before = self.run.clock_before()
        return self._before

    def check_counts(self, unit: str, argument: TimeArgument) -> None:
        """Raises a ValueError where ``argument`` needs ``unit`` and the dataloader does not report it."""
        if unit in ('sp', 'tok') and not self.run.counts(unit):  # only a batch may tell
            raise ArgumentError(f'{argument} counts {UNITS[unit]}, but {self.run.remedies[unit]}', argument.name)


def check_clock(clock: Any, what: str, *, least: float = 0.0) -> Clock | None:
    """Returns a clock that was read from a checkpoint, or None if there is none.

    Args:
        clock: what the checkpoint holds.
        what: what the clock is, for the message.
        least: the smallest legal time.

    Raises:
        ValueError: ``clock`` is neither. The message starts with ``what``.
    """
    if clock is None:
        return None
    is_clock = isinstance(clock, Mapping) and all(_is_time(clock.get(unit), least) for unit in CLOCK_UNITS)
    if not is_clock:
        raise ValueError(f'{what} must give {", ".join(CLOCK_UNITS)}, got {clock!r}.')
    return dict(clock)


def _is_time(value: Any, least: float) -> bool:
    return (
        isinstance(value, (int, float))
        and not isinstance(value, bool)
        and least <= value < math.inf
        and value > -math.inf
    )


def resolve_share(span: Span, run: Run, name: str) -> Span:
    """Converts a share of the run to the unit of its length; returns any other span unchanged.

    Args:
        span: the time to convert.
        run: gives its length.
        name: of the argument, for the error message.

    Raises:
        ValueError: the run has no length.
    """
    if span.unit != 'dur':
        return span
    whole = run.max_duration
    if whole is None:
        raise ArgumentError(f"{name}='{span}' is a share of the run, but {run.remedies['dur']}", name)
    return Span(span.value * whole.value, whole.unit)
