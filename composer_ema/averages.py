"""Which weight each update gives the current parameters: profiles, in pure numbers, without tensors.

Every average is ``average += weight * (parameters - average)``. A profile chooses the weight, a number in [0, 1]: 0
keeps the average, 1 replaces it. Whoever updates the average measures the time and tells the profile.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from numbers import Real
from typing import Any

_LN2 = math.log(2.0)

#: The unit of a profile that counts updates and does not care how much time passes between them.
UPDATES = 'updates'


@dataclass(frozen=True)
class Moment:
    """The time of an update, in the unit of the profile that is asked.

    Args:
        elapsed: time since the last update, at least 0.
        since_start: time since the start of the average, at least ``elapsed``.
        num_updates: updates made so far: 0 for the first.
    """

    elapsed: float
    since_start: float
    num_updates: int

    @classmethod
    def of_update(cls, num_updates: int) -> Moment:
        """The moment of the update after ``num_updates`` others, when each takes one unit of time.

        Raises:
            TypeError: no whole number.
            ValueError: below zero.
        """
        if isinstance(num_updates, bool) or not isinstance(num_updates, int):
            raise TypeError(f'num_updates must be a whole number of at least 0, got {num_updates!r}.')
        if num_updates < 0:
            raise ValueError(f'num_updates must be at least 0, got {num_updates}. The first update has 0.')
        return cls(1.0, num_updates + 1.0, num_updates)


class Profile(ABC):
    """Chooses the weight of each update, and so how much each step weighs in the average at the end.

    Attributes:
        unit: what the times of a :class:`Moment` are measured in: ``'ba'``, ``'steps'``, ..., or :data:`UPDATES`.

    Example:
        >>> profile = Equal()
        >>> [profile.weight_at(n) for n in range(3)]
        [1.0, 0.5, 0.3333333333333333]
    """

    unit: str

    @abstractmethod
    def weight(self, moment: Moment) -> float:
        """The weight of the current parameters in the update at ``moment``, in [0, 1]. Changes nothing."""

    @abstractmethod
    def __str__(self) -> str:
        """The profile in one word, as the arguments of an average spell it: ``'half_life=100ba'``."""

    def weight_at(self, num_updates: int) -> float:
        """The weight of the update after ``num_updates`` others, when each takes one unit of time."""
        return self.weight(Moment.of_update(num_updates))

    def record(self, moment: Moment) -> None:
        """Remembers that the update at ``moment`` was made. Most profiles have nothing to remember."""
        del moment

    def state_dict(self) -> dict[str, float]:
        """What the profile remembers, as plain numbers."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Loads what :meth:`state_dict` returned.

        Raises:
            ValueError: not such a state. Nothing was loaded.
        """
        check_numbers(state, ())


class Exponential(Profile):
    """A profile ``weight = 1 - smoothing`` that works with the logarithm of the smoothing, which keeps its digits."""

    @abstractmethod
    def log_smoothing(self, moment: Moment) -> float:
        """The logarithm of the share of the old average that the update keeps: 0 keeps all, minus infinity nothing."""

    def weight(self, moment: Moment) -> float:
        return -math.expm1(self.log_smoothing(moment))


@dataclass(frozen=True)
class HalfLife(Exponential):
    """An exponential average: after each half-life the share of the old weights has halved::

        weight = 1 - 2 ** (-elapsed / half_life)

    Args:
        half_life: time in ``unit``, finite and at least 0. 0 averages nothing: every weight is 1.
        unit: of the half-life.

    Raises:
        ValueError: out of range.

    Example:
        >>> HalfLife(10, 'ba').weight(Moment(elapsed=10, since_start=50, num_updates=5))
        0.5
    """

    half_life: float
    unit: str = UPDATES

    def __post_init__(self) -> None:
        if not (math.isfinite(self.half_life) and self.half_life >= 0):
            raise ValueError(
                f'half_life must be finite and at least 0, got {self.half_life}. '
                'To freeze the average pass smoothing=1.'
            )

    def log_smoothing(self, moment: Moment) -> float:
        return _log_smoothing(moment.elapsed, self.half_life)

    def __str__(self) -> str:
        return f'half_life={self.half_life}{_suffix(self.unit)}'


@dataclass(frozen=True)
class Smoothing(Exponential):
    """An exponential average that keeps the same share of the old average in each unit of time::

        weight = 1 - smoothing ** elapsed

    Args:
        smoothing: share of the old average that is kept, in [0, 1]: 0 copies, 1 freezes.
        unit: what ``smoothing`` is kept per. Default: per update, however far apart.
        name: what the argument is called where it is not called ``smoothing``, for messages.

    Raises:
        TypeError, ValueError: no number, or outside [0, 1].

    Example:
        >>> Smoothing(0.75).weight_at(3)
        0.25
    """

    smoothing: float
    unit: str = UPDATES
    name: str = 'smoothing'

    def __post_init__(self) -> None:
        remedy = 'n steps pass half_life=n.' if self.unit == 'steps' else "n batches pass half_life='nba'."
        check_share(self.name, self.smoothing, f'For a half-life of {remedy}')

    def log_smoothing(self, moment: Moment) -> float:
        if moment.elapsed == 0:
            return 0.0
        return moment.elapsed * math.log(self.smoothing) if self.smoothing > 0 else -math.inf

    def weight(self, moment: Moment) -> float:
        # A single step has an exact answer, which the detour through logarithms might miss by its last digit.
        return 1.0 - self.smoothing if moment.elapsed == 1 else super().weight(moment)

    def __str__(self) -> str:
        return f'{self.name}={self.smoothing!r}'


@dataclass(frozen=True)
class Equal(Profile):
    """An equal average: all weights in it have the same share::

        weight = 1 / (num_updates + 1)

    Stochastic weight averaging, Izmailov et al. 2018, section 3.2. The first update copies.
    """

    unit: str = UPDATES

    def weight(self, moment: Moment) -> float:
        return 1.0 / (moment.num_updates + 1)

    def __str__(self) -> str:
        return 'equal'


@dataclass(frozen=True)
class WarmedUp(Exponential):
    """A half-life that grows with the average, so that the start is soon forgotten::

        weight = 1 - 2 ** (-elapsed / min(half_life, ratio * since_start))

    The ramp-up of EDM2 (Karras et al. 2024, appendix B). The first update copies where it comes at the start.

    Args:
        profile: the half-life that is reached in the end.
        ratio: the half-life as a share of the time since the start, above 0 and finite.

    Raises:
        ValueError: ``ratio`` is out of range.

    Example:
        >>> WarmedUp(HalfLife(100, 'ba'), 0.5).weight(Moment(elapsed=1, since_start=2, num_updates=1))
        0.5
    """

    profile: HalfLife
    ratio: float

    def __post_init__(self) -> None:
        if isinstance(self.ratio, bool) or not isinstance(self.ratio, Real) or not 0 < self.ratio < math.inf:
            raise ValueError(
                f'warmup must be a number above 0, got {self.ratio!r}. It is the longest half-life as a share of the '
                'time since the start: pass for example warmup=0.1.'
            )

    @property
    def unit(self) -> str:  # pyright: ignore[reportIncompatibleVariableOverride]
        """That of the half-life."""
        return self.profile.unit

    def log_smoothing(self, moment: Moment) -> float:
        return _log_smoothing(moment.elapsed, min(self.profile.half_life, self.ratio * moment.since_start))

    def __str__(self) -> str:
        return f'{self.profile},warmup={self.ratio}'


@dataclass
class BiasCorrected(Profile):
    """An exponential average that forgets where it started::

        weight = (1 - smoothing) / (1 - product of all smoothings so far)

    The correction of Adam (Kingma and Ba 2015, section 3), written as a weight. The first update copies.

    Args:
        profile: the average without the correction.
        log_kept: logarithm of the product of all smoothings so far.

    Raises:
        ValueError: an average that never moves, which has nothing to correct.
    """

    profile: Exponential
    log_kept: float = field(default=0.0)

    def __post_init__(self) -> None:
        if isinstance(self.profile, Smoothing) and self.profile.smoothing == 1:
            raise ValueError(
                f'bias_correction needs a {self.profile.name} below 1, got 1: an average that never moves has nothing '
                'to correct.'
            )

    @property
    def unit(self) -> str:  # pyright: ignore[reportIncompatibleVariableOverride]
        """That of the average without the correction."""
        return self.profile.unit

    def weight(self, moment: Moment) -> float:
        log_smoothing = self.profile.log_smoothing(moment)
        share_of_all = -math.expm1(self.log_kept + log_smoothing)
        # Nothing is in the average yet where no time has passed.
        return min(1.0, -math.expm1(log_smoothing) / share_of_all) if share_of_all > 0 else 1.0

    def record(self, moment: Moment) -> None:
        self.log_kept += self.profile.log_smoothing(moment)

    def state_dict(self) -> dict[str, float]:
        return {'log_kept': self.log_kept}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        check_numbers(state, ('log_kept',))
        if not state['log_kept'] <= 0:
            raise ValueError(f"'log_kept' of the saved profile is {state['log_kept']}; it must be at most 0.")
        self.log_kept = state['log_kept']

    def __str__(self) -> str:
        return f'{self.profile},bias_correction'


def weight_from_smoothing(smoothing: float) -> float:
    """The weight ``1 - smoothing`` of a single update.

    Args:
        smoothing: share of the old average that the update keeps, in [0, 1]: 0 copies, 1 freezes.

    Raises:
        TypeError, ValueError: not a number, or outside [0, 1].
    """
    check_share('smoothing', smoothing, "For a half-life of n batches pass half_life='nba'.")
    return 1.0 - smoothing


def check_share(name: str, value: float, remedy: str) -> None:
    """Raises unless ``value`` is a number in [0, 1]."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f'{name} must be a number in [0, 1], got {value!r} of type {type(value).__name__}. {remedy}')
    if not 0 <= value <= 1:
        raise ValueError(f'{name} must lie in [0, 1], got {value}. {remedy}')


def check_numbers(state: Mapping[str, Any], names: tuple[str, ...]) -> None:
    """Raises a ValueError unless ``state`` maps just ``names`` to numbers."""
    if not isinstance(state, Mapping) or set(state) != set(names):
        raise ValueError(f'the state of a profile must hold {", ".join(names) or "nothing"}, got {state!r}.')
    for name in names:
        if isinstance(state[name], bool) or not isinstance(state[name], int | float):
            raise ValueError(f'{name!r} of the saved profile is a {type(state[name]).__name__}, not a number.')


def _log_smoothing(elapsed: float, half_life: float) -> float:
    return -_LN2 * elapsed / half_life if half_life > 0 else -math.inf


def _suffix(unit: str) -> str:
    """The unit as it stands behind a number: as Composer writes it, or nothing for updates and steps."""
    return '' if unit in (UPDATES, 'steps') else unit
