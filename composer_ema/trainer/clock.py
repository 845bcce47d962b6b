"""How far a Composer run has come, in plain numbers of every unit a half-life can have."""

from __future__ import annotations

import math
from typing import Any

from composer.core import State, Time, Timestamp
from composer.utils import dist

from composer_ema.spans import UNITS, ArgumentError, Span

#: Units that a clock carries; a share of the run is turned into the run's own unit first.
CLOCK_UNITS = ('iter', 'ep', 'ba', 'sp', 'tok')
Clock = dict[str, float]


def read_clock(state: State, timestamp: Timestamp | None = None) -> Clock:
    """The time trained so far. Epochs and iterations count fractions where their length is known.

    Args:
        state: gives the lengths of an epoch and of an iteration.
        timestamp: the moment to read. Default: now.

    Returns:
        Whole numbers of batches, samples and tokens; epochs and iterations as fractions, or as the whole ones only
        where the dataloader or the run does not tell their length.
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


def knows_fractions(unit: str, state: State) -> bool:
    """Whether a clock can count parts of ``unit`` in this run."""
    if unit == 'ep':
        return state.dataloader_len is not None
    if unit == 'iter':
        length = state._iteration_length
        return length is not None and (length.unit.value == 'tok' or state.dataloader_len is not None)
    return True


def resolve_share(span: Span, state: State, name: str) -> Span:
    """Turns a share of the run into the unit of ``max_duration``; returns any other span as it is.

    Raises:
        ValueError: the run has no end yet.
    """
    if span.unit != 'dur':
        return span
    if state.max_duration is None:
        message = f"{name}='{span}' is a share of the run, but the run has no max_duration. Set it."
        raise ArgumentError(message, name)
    return Span(span.value * state.max_duration.value, state.max_duration.unit.value)


def run_length(unit: str, state: State) -> float | None:
    """Length of the whole run in ``unit``, or None where it cannot be told before training."""
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


def has_crossed(earlier: float, now: float, interval: float) -> bool:
    """Whether a multiple of ``interval`` lies in (earlier, now]. Forgives the last digits of fractions.

    Example:
        >>> has_crossed(9, 10, 10), has_crossed(10, 11, 10), has_crossed(2.9, 3.1, 0.5)
        (True, False, True)
    """
    if now <= earlier or now - earlier >= interval:
        return now > earlier
    return math.floor(now / interval + 1e-9) > math.floor(earlier / interval + 1e-9)


def words(unit: str) -> str:
    """The unit in words, for messages."""
    return UNITS[unit]
