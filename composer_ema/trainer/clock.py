"""How far a Composer run has come, in plain numbers of every unit that a time string can have.

A clock is a dictionary of plain numbers, so that it can stand in a checkpoint.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from composer.core import State, Time, Timestamp
from composer.utils import dist

from composer_ema.spans import CLOCK_UNITS, ArgumentError, Span

Clock = dict[str, float]
#: The clock before the first batch.
START_OF_TRAINING: Mapping[str, float] = dict.fromkeys(CLOCK_UNITS, 0)
# The units in which Composer's timestamp counts the whole run.
_COUNTED = {'ba': 'batch', 'sp': 'sample', 'tok': 'token'}


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

    def resolve(self, state: State) -> Span:
        """The span in a unit that the clock counts; see :func:`resolve_share`."""
        return resolve_share(self.span, state, self.name)


class Look:
    """What the clock shows at one event. The clock is read at most once, however many ask.

    Args:
        state: of the run, at the event.
    """

    __slots__ = ('_before', '_now', 'state')

    def __init__(self, state: State) -> None:
        self.state = state
        self._now: Clock | None = None
        self._before: Mapping[str, float] | None = None

    @property
    def now(self) -> Clock:
        """The clock at the event."""
        if self._now is None:
            self._now = read_clock(self.state)
        return self._now

    def time(self, unit: str) -> float:
        """The time so far in one unit; cheaper than :attr:`now` for units that Composer counts itself."""
        counted = _COUNTED.get(unit)
        if self._now is not None or counted is None:
            return self.now[unit]
        return getattr(self.state.timestamp, counted).value

    @property
    def before(self) -> Mapping[str, float]:
        """The clock one batch, epoch or iteration ago."""
        if self._before is None:
            previous = self.state.previous_timestamp
            self._before = START_OF_TRAINING if previous is None else read_clock(self.state, previous)
        return self._before

    def check_counts(self, unit: str, argument: TimeArgument) -> None:
        """Raises a ValueError where ``argument`` needs ``unit`` and the dataloader does not report it."""
        if unit == 'tok' and self.time('tok') == 0 and self.time('ba') > 0:
            raise ArgumentError(
                f'{argument} counts tokens, but the dataloader reports none. '
                'Pass samples or batches, or a DataSpec with get_num_tokens_in_batch.',
                argument.name,
            )


def read_clock(state: State, timestamp: Timestamp | None = None) -> Clock:
    """The time trained so far. Epochs and iterations count fractions where their length is known.

    Args:
        state: gives the lengths of an epoch and of an iteration.
        timestamp: the moment to read. Default: now.

    Returns:
        Whole numbers of batches, samples and tokens. Epochs and iterations are fractions where their length is known,
        else whole numbers.
    """
    now = state.timestamp if timestamp is None else timestamp
    epochs = now.epoch.value
    batch_in_epoch, epoch_length = now.batch_in_epoch.value, state.dataloader_len
    epoch_fraction = batch_in_epoch / epoch_length.value if epoch_length is not None and epoch_length.value > 0 else 0
    iterations = now.iteration.value
    iteration_length: Time | None = state._iteration_length
    if iteration_length is not None and iteration_length.value > 0:
        is_epochs = iteration_length.unit.value == 'ep'
        done = now.epoch_in_iteration.value + epoch_fraction if is_epochs else now.token_in_iteration.value
        iterations += done / iteration_length.value
    return {
        'iter': iterations,
        'ep': epochs + epoch_fraction,
        'ba': now.batch.value,
        'sp': now.sample.value,
        'tok': now.token.value,
    }


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


def knows_fractions(unit: str, state: State) -> bool:
    """Whether the clock can count fractions of ``unit`` in this run."""
    if unit == 'ep':
        return state.dataloader_len is not None
    if unit == 'iter':
        length = state._iteration_length
        return length is not None and (length.unit.value == 'tok' or state.dataloader_len is not None)
    return True


def resolve_share(span: Span, state: State, name: str) -> Span:
    """Converts a share of the run to the unit of ``max_duration``; returns any other span unchanged.

    Args:
        span: the time to convert.
        state: gives ``max_duration``.
        name: of the argument, for the error message.

    Raises:
        ValueError: the run has no ``max_duration``.
    """
    if span.unit != 'dur':
        return span
    if state.max_duration is None:
        message = f"{name}='{span}' is a share of the run, but the run has no max_duration. Set it."
        raise ArgumentError(message, name)
    return Span(span.value * state.max_duration.value, state.max_duration.unit.value)


def run_length(unit: str, state: State) -> float | None:
    """Length of the whole run in ``unit``, or None if it is not known before training."""
    if state.max_duration is None:
        return None
    end, end_unit = state.max_duration.value, state.max_duration.unit.value
    if end_unit == unit:
        return end
    if unit == 'iter' and (length := state._iteration_length) is not None:
        whole = run_length(length.unit.value, state)
        return None if whole is None else whole / length.value
    epoch_length = state.dataloader_len.value if state.dataloader_len is not None else None
    samples_per_epoch = _samples_per_epoch(state)
    per_epoch = {'ep': 1, 'ba': epoch_length, 'sp': samples_per_epoch}
    if per_epoch.get(unit) is None or per_epoch.get(end_unit) is None:
        return None
    return end / per_epoch[end_unit] * per_epoch[unit]


def _samples_per_epoch(state: State) -> int | None:
    dataset: Any = getattr(state.dataloader, 'dataset', None)
    batch_size: Any = getattr(state.dataloader, 'batch_size', None)
    if not hasattr(dataset, '__len__'):
        return None
    if isinstance(batch_size, int) and state.dataloader_len is not None:  # a subset, or a last batch that is dropped
        return min(len(dataset), state.dataloader_len.value * batch_size * dist.get_world_size())
    return len(dataset)
