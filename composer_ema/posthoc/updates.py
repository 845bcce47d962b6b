"""The updates of a run's averages as a short list: when each was made, and which weight it gave the parameters.

Invariant: the weights that :meth:`Updates.weights` returns are those that were recorded, to the last bit.
"""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Iterable, Mapping
from numbers import Real
from typing import Any

import numpy as np

from composer_ema.averages import Moment, Profile
from composer_ema.profiles import of_description
from composer_ema.spans import CLOCK_UNITS

Array = np.ndarray[Any, np.dtype[np.float64]]
# Epochs and iterations come in fractions, which need not be exact: they are only looked up.
_SAME_TIME = 1e-9
# More than any run makes, and as many as memory holds.
_MOST_UPDATES = 2**27


class Updates:
    """A run-length list of updates. It grows by one update at a time, and its size by a few numbers a change.

    The clock is kept by unit, as arithmetic progressions ``[count, first, step]``: whole numbers exactly, fractions to
    1e-9. The weights of an average are kept as pieces: ``{'count', 'weight'}`` of equal weights, or ``{'count',
    'profile', 'elapsed', 'since_start', 'num_updates'}`` for updates evenly apart whose weights a profile gives.

    Args:
        profiles: the description of each average's profile, by label; see
            :func:`composer_ema.profiles.of_description`.

    Example:
        >>> updates = Updates({'power=0.1': 'power=0.1'})
        >>> profile = of_description('power=0.1')
        >>> for n in range(1, 1001):
        ...     moment = Moment(elapsed=1, since_start=n, num_updates=n - 1)
        ...     updates.append({'ba': n}, {'power=0.1': (profile.weight(moment), moment)})
        >>> len(updates), updates.as_plain()['clock']['ba']
        (1000, [[1000, 1, 1]])
        >>> updates.weights('power=0.1').tolist()[999] == profile.weight(Moment(1, 1000, 999))
        True
    """

    def __init__(self, profiles: Mapping[str, str]) -> None:
        self._count = 0
        self._clock: dict[str, list[list[float]]] = {unit: [] for unit in CLOCK_UNITS}
        self._weights: dict[str, list[dict[str, Any]]] = {label: [] for label in profiles}
        self.profiles = dict(profiles)

    def __len__(self) -> int:
        return self._count

    @property
    def labels(self) -> list[str]:
        """The labels of the averages."""
        return list(self._weights)

    def append(self, clock: Mapping[str, float], made: Mapping[str, tuple[float, Moment | None]]) -> None:
        """Records one update of every average.

        Args:
            clock: the time of the update by unit; units that it lacks count as 0. A plain loop counts its steps as
                batches.
            made: for each label, the weight of the update, and the moment from which the profile computed it. None
                where the weight is no profile's, as that of a first update that copies.
        """
        self._count += 1
        for unit, pieces in self._clock.items():
            _append_time(pieces, clock.get(unit, 0))
        for label, pieces in self._weights.items():
            _append_weight(pieces, *made[label], self.profiles[label])

    def clock(self, unit: str) -> Array:
        """The time of every update in ``unit``, float64 of shape (updates,)."""
        parts = [first + step * np.arange(count, dtype=np.float64) for count, first, step in self._clock[unit]]
        return np.concatenate([np.zeros(0), *parts])

    def weights(self, label: str) -> Array:
        """The weight of every update of an average, float64 of shape (updates,), as recorded."""
        found = np.zeros(self._count)
        start = 0
        for piece in self._weights[label]:
            stop = start + piece['count']
            found[start:stop] = piece['weight'] if 'weight' in piece else _replayed(piece)
            start = stop
        return found

    def set_profiles(self, profiles: Mapping[str, str]) -> None:
        """Goes on with these averages. One that joins now copies at every update before its first, so it forgot them.

        Args:
            profiles: as for the class. Those of averages that go on may have changed.
        """
        joined = [{'count': self._count, 'weight': 1.0}] if self._count else []
        self._weights = {label: self._weights.get(label, copy.copy(joined)) for label in profiles}
        self.profiles = dict(profiles)

    def is_earlier_than(self, other: Updates) -> bool:
        """Whether ``other`` is of the same updates and maybe more, whichever averages they moved."""
        return all(_is_beginning(_as_pieces(self._clock[unit]), _as_pieces(other._clock[unit])) for unit in CLOCK_UNITS)

    def is_beginning_of(self, other: Updates) -> bool:
        """Whether ``other`` goes on where this list ends, as far as both have the same averages."""
        pairs = [(self._weights[label], other._weights[label]) for label in self._weights if label in other._weights]
        return self.is_earlier_than(other) and all(_is_beginning(one, two) for one, two in pairs)

    def as_plain(self) -> dict[str, Any]:
        """The list as plain dictionaries, lists, strings and numbers, for JSON and for checkpoints."""
        return copy.deepcopy(
            {'count': self._count, 'profiles': self.profiles, 'clock': self._clock, 'weights': self._weights}
        )

    @classmethod
    def of_plain(cls, plain: Any, what: str) -> Updates:
        """The list that :meth:`as_plain` returned.

        Args:
            plain: what was read.
            what: where it was read, for the error.

        Raises:
            ValueError: it is no such list, or its parts differ in length.
        """
        try:
            updates = cls(_texts(plain['profiles']))
            updates._count = _count(plain['count'])
            updates._clock = {unit: [_time(each) for each in plain['clock'][unit]] for unit in CLOCK_UNITS}
            updates._weights = {label: [_piece(each) for each in plain['weights'][label]] for label in updates.profiles}
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
            raise ValueError(f'the list of updates in {what} is damaged: {error!r}.') from error
        lengths = {f'the clock in {unit}': sum(c for c, _, _ in each) for unit, each in updates._clock.items()}
        lengths |= {label: sum(each['count'] for each in pieces) for label, pieces in updates._weights.items()}
        for name, length in lengths.items():
            if length != updates._count:
                raise ValueError(
                    f'the list of updates in {what} is damaged: it counts {updates._count}, and {name} {length}.'
                )
        return updates


def _append_time(pieces: list[list[float]], time: float) -> None:
    if pieces:
        piece = pieces[-1]
        count, first, step = piece
        if count == 1:
            piece[:] = 2, first, time - first
            return
        expected = first + count * step
        is_whole = isinstance(time, int) and isinstance(expected, int)
        if time == expected or (not is_whole and abs(time - expected) <= _SAME_TIME):
            piece[0] += 1
            return
    pieces.append([1, time, 0])


def _append_weight(pieces: list[dict[str, Any]], weight: float, moment: Moment | None, profile: str) -> None:
    last = pieces[-1] if pieces else {}
    # Computed anew, so that what is read back is what was used: a first update copies, whatever its profile says.
    if moment is not None and _profile(profile).weight(moment) == weight:
        if last.get('profile') == profile and _is_next(moment, last):
            last['count'] += 1
        else:
            times = {'elapsed': moment.elapsed, 'since_start': moment.since_start, 'num_updates': moment.num_updates}
            pieces.append({'count': 1, 'profile': profile, **times})
    elif last.get('weight') == weight:
        last['count'] += 1
    else:
        pieces.append({'count': 1, 'weight': weight})


@functools.lru_cache(maxsize=16)
def _profile(description: str) -> Profile:
    """A profile without memory of any update; nothing may be recorded with it."""
    return of_description(description)


def _is_next(moment: Moment, piece: Mapping[str, Any]) -> bool:
    """Whether a moment is that of the update after a piece."""
    count, elapsed = piece['count'], piece['elapsed']
    return (
        moment.elapsed == elapsed
        and moment.since_start == piece['since_start'] + count * elapsed
        and moment.num_updates == piece['num_updates'] + count
    )


def _moment(piece: Mapping[str, Any], number: int) -> Moment:
    """The moment of an update in a piece, counted from 0."""
    elapsed = piece['elapsed']
    return Moment(elapsed, piece['since_start'] + number * elapsed, piece['num_updates'] + number)


def _replayed(piece: Mapping[str, Any]) -> list[float]:
    profile = _profile(piece['profile'])
    return [profile.weight(_moment(piece, number)) for number in range(piece['count'])]


def _as_pieces(progressions: Iterable[list[float]]) -> list[dict[str, Any]]:
    return [{'count': c, 'first': first, **({'step': step} if c > 1 else {})} for c, first, step in progressions]


def _is_beginning(one: list[dict[str, Any]], two: list[dict[str, Any]]) -> bool:
    if not one:
        return True
    last = len(one) - 1
    if len(two) <= last or one[:last] != two[:last] or one[last]['count'] > two[last]['count']:
        return False
    return all(two[last].get(key) == value for key, value in one[last].items() if key != 'count')


def _texts(values: Mapping[str, Any]) -> dict[str, str]:
    if not all(isinstance(each, str) for pair in values.items() for each in pair):
        raise TypeError('a profile is no text')
    return dict(values)


def _count(value: Any) -> int:
    if type(value) is not int or not 0 <= value <= _MOST_UPDATES:
        raise TypeError(f'{value!r} is no count')
    return value


def _number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, Real) or not math.isfinite(value):
        raise TypeError(f'{value!r} is no number')
    return value  # pyright: ignore[reportReturnType]: an int stays one


def _time(piece: Any) -> list[float]:
    count, first, step = piece
    return [_count(count), _number(first), _number(step)]


def _piece(piece: Mapping[str, Any]) -> dict[str, Any]:
    count = _count(piece['count'])
    if 'weight' in piece:
        return {'count': count, 'weight': _number(piece['weight'])}
    profile = str(_profile(piece['profile']))
    times = {name: _number(piece[name]) for name in ('elapsed', 'since_start')}
    return {'count': count, 'profile': profile, **times, 'num_updates': _count(piece['num_updates'])}
