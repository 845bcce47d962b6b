"""Times that cannot work in a run: refused before the first batch, or warned of where they do no harm."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from composer_ema.run.clock import Run, TimeArgument
from composer_ema.run.due import Interval, Start
from composer_ema.spans import NOUNS, UNITS, ArgumentError, multiples
from composer_ema.wording import counted


@dataclass(frozen=True)
class Limit:
    """A time that the run must be able to count.

    Args:
        time: the argument.
        effect: what happens if the time is longer than the run, for the warning. Default: no warning.
        measured_at: for a time that is measured from update to update, the interval of the updates. Default: the clock
            is compared with the time itself.
    """

    time: TimeArgument
    effect: str | None = None
    measured_at: Interval | None = None


def warn(message: str) -> None:
    """Warns on behalf of the caller's caller."""
    warnings.warn(message, stacklevel=2)


def check_times(limits: Iterable[Limit], run: Run) -> None:
    """Refuses times that this run cannot count, then warns of times longer than the run.

    Raises:
        ValueError: a time in a unit that the run does not have, or needs fractions of a unit of unknown length.
    """
    limits = list(limits)
    for limit in limits:
        if limit.time.span.value != 0:
            _check_time(limit, run)
    for limit in limits:
        if limit.effect is not None:
            _warn_if_longer(limit.time, limit.effect, run)


def effect_of_rare_updates(interval: Interval, run: Run) -> str:
    """What happens if the interval between updates is longer than the run: only the first one is made, if any."""
    moments = run.length(interval.ends)
    if moments is not None and moments < 1:  # the first update waits for the end of an epoch or iteration
        return 'no update will be made'
    return 'no update will be made after the first, which copies the weights'


def _check_time(limit: Limit, run: Run) -> None:
    time, interval = limit.time, limit.measured_at
    resolved = time.resolve(run)
    if not run.counts(resolved.unit):
        raise ArgumentError(f'{time} counts {UNITS[resolved.unit]}, but {run.remedies[resolved.unit]}', time.name)
    if interval is None:
        is_whole = float(resolved.value).is_integer()
    else:  # what passes between two updates is whole if they come at the ends of whole epochs or iterations
        is_whole = interval.ends != 'ba' and resolved.unit == interval.span.unit
    if not is_whole and not run.counts_fractions(resolved.unit):
        raise ArgumentError(
            f'{time} needs parts of {UNITS[resolved.unit]}, but {run.remedies["ep"]}',
            time.name,
        )


def _warn_if_longer(time: TimeArgument, effect: str, run: Run) -> None:
    span = time.resolve(run)
    length = run.length(span.unit)
    if length is not None and span.value > length:
        warn(
            f'{time} is longer than the run of {counted(length, NOUNS[span.unit])}: {effect}. '
            f"Pass a shorter {time.written}, for example a share of the run such as {time.written}='0.1dur'."
        )


def warn_of_rare_updates(half_life: TimeArgument, interval: Interval, run: Run) -> None:
    """Warns that the average is updated as rarely as the unit of the half-life comes, which nobody asked for."""
    unit = interval.span.unit
    updates, batches = run.length(unit), run.length('ba')
    if updates is not None and updates < 1:
        return  # warned of already: there is no update at all
    effect, remedy = '', ''
    if updates is not None and batches is not None:
        if batches <= updates:
            return  # an epoch of one batch
        count, in_batches = math.floor(updates), math.ceil(half_life.span.value * batches / updates)
        effect = f', at most {count} {"time" if count == 1 else "times"} in this run of {batches:g} batches'
        remedy = f" or half_life='{in_batches}ba'"
    warn(
        f'{half_life} without an update_interval updates the average once an {NOUNS[unit]}{effect}. Pass '
        f"update_interval='1ba'{remedy} to average every batch, or update_interval='{interval.span}' to keep it so."
    )


def warn_of_other_arguments(names: Iterable[str], saved: Mapping[str, Any], given: Mapping[str, Any]) -> None:
    """Warns of arguments in ``names`` that differ from those that a loaded average was ``saved`` with."""
    for name in names:
        if name in saved and saved[name] != given[name]:
            warn(
                f'the checkpoint was averaged with {name}={saved[name]!r}, this run continues with '
                f'{name}={given[name]!r}.'
            )


def warn_of_no_update(start: Start, interval: Interval) -> None:
    """Warns that training has ended without an average."""
    warn(
        f'training ended before the first update: {start}, {interval}. Evaluation uses the training weights. '
        'Start earlier, or update more often.'
    )


def warn_if_not_reached(length: TimeArgument, start: Start, run: Run) -> None:
    """Warns if the learning rate cannot reach ``swa_lr`` before the run ends."""
    span, begin = length.resolve(run), start.resolve(run)
    whole, until_start = run.length(span.unit), run.length(begin.unit)
    if whole is None or until_start is None or not until_start:
        return
    left = whole * max(0.0, 1 - begin.value / until_start)
    if span.value > left * (1 + 1e-9):
        warn(
            f'{length} is longer than what is left of the run after {start}: '
            f'swa_lr is not reached. Pass a shorter {length.name}, or start earlier.'
        )


def warn_of_a_single_update(start: Start, interval: Interval, run: Run) -> None:
    """Warns if only one update fits between the start of the average and the end of the run."""
    span, begin = interval.resolve(run), start.resolve(run)
    whole, until_start = run.length(span.unit), run.length(begin.unit)
    if whole is None or not until_start or begin.value > until_start or span.value > whole:
        return  # longer than the run, which is warned of already
    first = begin.value / until_start * whole
    if interval.ends != 'ba':
        first = max(1, math.ceil(first - 1e-9))
    second = first + span.value
    if begin.value == 0:  # the interval counts from the start of training, not from the first update
        second = (multiples(first, span.value) + 1) * span.value
    if first > 0 and second > whole * (1 + 1e-9):
        warn(
            f'{start} with {interval} takes a single moment of this run into the average, which is then the training '
            'weights of that moment. Start earlier, or pass a shorter update_interval, for example '
            "update_interval='100ba'."
        )
