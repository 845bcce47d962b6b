"""How much weight each update gives the current parameters: profiles, in plain numbers and without tensors.

Every average is ``average += weight * (parameters - average)``. A profile chooses the weight, a number in [0, 1]: 0
keeps the average, 1 replaces it. The caller measures the time, passes it to :meth:`Profile.weight`, and calls
:meth:`Profile.record` once the update is done.
"""

from __future__ import annotations

import math
import sys
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from composer_ema import plain
from composer_ema.wording import shown

_LN2 = math.log(2.0)
# The relative standard deviation of equal shares, the largest of a power function with gamma >= 0.
_WIDEST = 12**-0.5
_LARGEST_GAMMA = 1e9
_LARGEST = sys.float_info.max

#: The unit of a profile that counts updates, however much time passes between them.
UPDATES = 'updates'


@dataclass(frozen=True)
class Moment:
    """The time of an update, in the unit of the profile.

    Args:
        elapsed: time since the last update, finite and at least 0.
        since_start: time since the average started, finite and at least 0; normally at least ``elapsed``.
        num_updates: number of updates before this one, at least 0.

    Raises:
        TypeError: a time is not a number, or ``num_updates`` is not a whole number.
        ValueError: an argument is out of range.
    """

    elapsed: float
    since_start: float
    num_updates: int

    def __post_init__(self) -> None:
        # Once per update: a comparison with NaN is false, one with what is no number raises.
        try:
            are_times = 0 <= self.elapsed <= _LARGEST and 0 <= self.since_start <= _LARGEST
        except Exception:
            are_times = False
        if not are_times:
            for name, since in (('elapsed', 'the last update'), ('since_start', 'the start of the average')):
                remedy = f'Measure it from {since}.'
                time = plain.number(name, getattr(self, name), remedy=remedy)
                if not 0 <= time < math.inf:
                    raise ValueError(f'{name} must be finite and at least 0, got {time}. {remedy}')
        _check_count(self.num_updates)

    @classmethod
    def of_update(cls, num_updates: int) -> Moment:
        """Returns the moment of the update that follows ``num_updates`` others, one unit of time apart.

        Raises:
            TypeError: ``num_updates`` is not a whole number.
            ValueError: ``num_updates`` is negative.
        """
        _check_count(num_updates)
        return cls(1.0, num_updates + 1.0, num_updates)


class Profile(ABC):
    """Chooses the weight of each update, and so each step's share in the final average.

    Attributes:
        unit: unit of the times in a :class:`Moment`: ``'ba'``, ``'steps'``, ..., or :data:`UPDATES`.
        forgets_start: whether the first weights count for no more than others of their age. If not, the start of an
            average may keep a share that only time takes away; see :class:`composer_ema.profiles.StartShare`.

    Example:
        >>> profile = Equal()
        >>> [profile.weight_at(n) for n in range(3)]
        [1.0, 0.5, 0.3333333333333333]
    """

    unit: str
    forgets_start: bool = True

    @abstractmethod
    def weight(self, moment: Moment) -> float:
        """Returns the weight of the current parameters in the update at ``moment``, in [0, 1]. Changes nothing."""

    @abstractmethod
    def __str__(self) -> str:
        """Describes the profile in one word, spelled as its arguments are: ``'half_life=100ba'``."""

    def weight_at(self, num_updates: int) -> float:
        """Returns the weight of the update that follows ``num_updates`` others, one unit of time apart."""
        return self.weight(Moment.of_update(num_updates))

    def record(self, moment: Moment) -> None:
        """Records that the update at ``moment`` was made. Most profiles need no memory and do nothing."""
        del moment

    def state_dict(self) -> dict[str, float]:
        """Returns the profile's memory as plain numbers; empty for most profiles."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Loads what :meth:`state_dict` returned.

        Raises:
            ValueError: ``state`` belongs to another kind of profile, or is out of range. Nothing was loaded.
        """
        check_numbers(state, ())


class Exponential(Profile):
    """A profile ``weight = 1 - smoothing``, computed from the logarithm of the smoothing to keep all digits."""

    forgets_start = False

    @abstractmethod
    def log_smoothing(self, moment: Moment) -> float:
        """Returns the log of the share of the old average that the update keeps: 0 keeps all, minus infinity none."""

    def weight(self, moment: Moment) -> float:
        return _one_minus_exp(self.log_smoothing(moment))


@dataclass(frozen=True)
class HalfLife(Exponential):
    """An exponential average: after each half-life the share of the old weights has halved::

        weight = 1 - 2 ** (-elapsed / half_life)

    Args:
        half_life: time in ``unit``, finite and at least 0. With 0 every weight is 1, so nothing is averaged.
        unit: unit of the half-life. Default: :data:`UPDATES`.

    Raises:
        TypeError: ``half_life`` is not a number.
        ValueError: ``half_life`` is negative or not finite.

    Example:
        >>> HalfLife(10, 'ba').weight(Moment(elapsed=10, since_start=50, num_updates=5))
        0.5
    """

    half_life: float
    unit: str = UPDATES

    def __post_init__(self) -> None:
        _set(self, unit=plain.word('unit', self.unit))
        kind = f'a number of {self.unit}'
        half_life = plain.number('half_life', self.half_life, kind=kind, remedy='Pass for example half_life=100.')
        if not 0 <= half_life < math.inf:
            smoothing = 'decay' if self.unit == 'steps' else 'smoothing'
            raise ValueError(
                f'half_life must be finite and at least 0, got {half_life}. To freeze the average pass {smoothing}=1.'
            )
        _set(self, half_life=half_life)

    def log_smoothing(self, moment: Moment) -> float:
        return _log_smoothing(moment.elapsed, self.half_life)

    def __str__(self) -> str:
        return f'half_life={self.half_life}{_suffix(self.unit)}'


@dataclass(frozen=True)
class Smoothing(Exponential):
    """An exponential average that keeps the same share of the old average in each unit of time::

        weight = 1 - smoothing ** elapsed

    Args:
        smoothing: share of the old average to keep, in [0, 1]: 0 copies, 1 freezes.
        unit: the unit of time that ``smoothing`` applies to. Default: :data:`UPDATES`, however far apart.
        name: the argument's name in error messages and in :meth:`__str__`. Default: ``'smoothing'``.

    Raises:
        TypeError: ``smoothing`` is not a number.
        ValueError: ``smoothing`` lies outside [0, 1].

    Example:
        >>> Smoothing(0.75).weight_at(3)
        0.25
    """

    smoothing: float
    unit: str = UPDATES
    name: str = 'smoothing'

    def __post_init__(self) -> None:
        _set(self, unit=plain.word('unit', self.unit), name=plain.word('name', self.name))
        remedy = 'n steps pass half_life=n.' if self.unit == 'steps' else "n batches pass half_life='nba'."
        _set(self, smoothing=check_share(self.name, self.smoothing, f'For a half-life of {remedy}'))

    def log_smoothing(self, moment: Moment) -> float:
        if moment.elapsed == 0:
            return 0.0
        return moment.elapsed * math.log(self.smoothing) if self.smoothing > 0 else -math.inf

    def weight(self, moment: Moment) -> float:
        # After a single unit the difference is exact; the detour through logarithms may lose the last bit.
        return 1.0 - self.smoothing if moment.elapsed == 1 else super().weight(moment)

    def __str__(self) -> str:
        return f'{self.name}={self.smoothing!r}'


@dataclass(frozen=True)
class Equal(Profile):
    """An equal average, in which every update has the same share::

        weight = 1 / (num_updates + 1)

    The average of stochastic weight averaging (Izmailov et al. 2018, section 3.2). The first update copies.

    Args:
        unit: unit of the times in a :class:`Moment`, which do not matter here. Default: :data:`UPDATES`.
    """

    unit: str = UPDATES

    def weight(self, moment: Moment) -> float:
        return 1.0 / (moment.num_updates + 1)

    def __str__(self) -> str:
        return 'equal'


@dataclass(frozen=True)
class Power(Profile):
    """An average whose memory is a share of the time trained so far, however long that is::

        weight = 1 - (1 - elapsed / since_start) ** (gamma + 1)

    The power function average of EDM2 (Karras et al. 2024, section 3.1). At any moment, weights from a time ``t`` after
    the start have a share in proportion to ``t ** gamma``. The first update copies.

    Args:
        sigma_rel: standard deviation of these shares in time, as a share of the time trained so far; above 0 and at
            most ``1 / sqrt(12)``, where all shares are equal. 0.05, 0.10 and 0.25 put half of the average into the last
            3.8, 8.4 and 33 % of training.
        unit: unit of the times in a :class:`Moment`. Default: :data:`UPDATES`.
        gamma: instead of ``sigma_rel``, the exponent itself, at least 0 and at most 1e9::

            sigma_rel = sqrt((gamma + 1) / ((gamma + 2) ** 2 * (gamma + 3)))

    Attributes:
        is_by_gamma: whether ``gamma`` was given. The other of the two is computed.

    Raises:
        TypeError: the one that is given is not a number, or neither is given.
        ValueError: it is out of range, or both are given.

    Example:
        >>> profile = Power(gamma=0)
        >>> [round(profile.weight_at(n), 12) for n in range(3)]
        [1.0, 0.5, 0.333333333333]
    """

    sigma_rel: float = None  # pyright: ignore[reportAssignmentType]: computed where it is not given
    unit: str = UPDATES
    gamma: float = field(default=None, kw_only=True)  # pyright: ignore[reportAssignmentType]: likewise
    is_by_gamma: bool = field(init=False, repr=False)

    def __post_init__(self) -> None:
        if self.sigma_rel is not None and self.gamma is not None:
            raise ValueError(
                f'pass either power or gamma, got power={shown(self.sigma_rel)} and gamma={shown(self.gamma)}. gamma '
                'is the exponent that a power stands for.'
            )
        _set(self, unit=plain.word('unit', self.unit), is_by_gamma=self.gamma is not None)
        if self.is_by_gamma:
            remedy = 'Pass for example gamma=6.94.'
            gamma = plain.number('gamma', self.gamma, remedy=remedy)
            if not 0 <= gamma <= _LARGEST_GAMMA:
                raise ValueError(
                    f'gamma must lie in [0, {_LARGEST_GAMMA:.0e}], where 0 is an equal average, got {gamma}. {remedy}'
                )
            _set(self, gamma=gamma, sigma_rel=_sigma_rel(gamma))
            return
        remedy = 'Pass for example power=0.1.'
        sigma_rel = plain.number('power', self.sigma_rel, remedy=remedy)
        if not 1e-9 <= sigma_rel <= _WIDEST:
            raise ValueError(
                f'power must lie in [1e-9, {_WIDEST:.4f}], where the largest is an equal average, got {sigma_rel}. '
                f'{remedy}'
            )
        _set(self, sigma_rel=sigma_rel, gamma=_gamma(sigma_rel))

    def weight(self, moment: Moment) -> float:
        if moment.elapsed >= moment.since_start:
            return 1.0
        return _one_minus_exp((self.gamma + 1) * math.log1p(-moment.elapsed / moment.since_start))

    def __str__(self) -> str:
        return f'gamma={self.gamma}' if self.is_by_gamma else f'power={self.sigma_rel}'


@dataclass(frozen=True)
class WarmedUp(Exponential):
    """An exponential average whose half-life grows from zero, so that it soon forgets where it started::

        weight = 1 - 2 ** (-elapsed / min(half_life, ratio * since_start))

    The ramp-up of EDM2 (Karras et al. 2024, appendix B). An update at the very start, ``since_start=0``, copies.

    Args:
        profile: the average to become. A smoothing is limited as the half-life is that it stands for.
        ratio: upper limit of the half-life as a share of the time since the start, finite and above 0.

    Raises:
        TypeError: ``ratio`` is no number, or ``profile`` no exponential average.
        ValueError: ``ratio`` is out of range, or ``profile`` never moves the average.

    Example:
        >>> WarmedUp(HalfLife(100, 'ba'), 0.5).weight(Moment(elapsed=1, since_start=2, num_updates=1))
        0.5
    """

    profile: HalfLife | Smoothing
    ratio: float

    def __post_init__(self) -> None:
        kind = 'a finite number above 0'
        remedy = 'It limits the half-life to a share of the time since the start: pass for example warmup=0.1.'
        ratio = plain.number('warmup', self.ratio, kind=kind, remedy=remedy)
        if not 0 < ratio < math.inf:
            raise ValueError(f'warmup must be {kind}, got {ratio}. {remedy}')
        _set(self, ratio=ratio)
        if not isinstance(self.profile, HalfLife | Smoothing):
            raise TypeError(f'profile must be a HalfLife or a Smoothing to warm up, got {shown(self.profile)}.')
        _refuse_frozen(self.profile, 'warmup', 'to warm up')

    @property
    def unit(self) -> str:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The unit of ``profile``."""
        return self.profile.unit

    def log_smoothing(self, moment: Moment) -> float:
        limit = _log_smoothing(moment.elapsed, self.ratio * moment.since_start)
        return min(self.profile.log_smoothing(moment), limit)

    def weight(self, moment: Moment) -> float:
        # Once it is warm, exactly the weight of the profile.
        limit = _one_minus_exp(_log_smoothing(moment.elapsed, self.ratio * moment.since_start))
        return max(self.profile.weight(moment), limit)

    def __str__(self) -> str:
        return f'{self.profile},warmup={self.ratio}'


@dataclass
class BiasCorrected(Profile):
    """An exponential average that forgets where it started::

        weight = (1 - smoothing) / (1 - product of all smoothings so far)

    The bias correction of Adam (Kingma and Ba 2015, section 3), written as a weight. The first update copies.

    Args:
        profile: the average to correct.
        log_kept: logarithm of the product of all smoothings so far, at most 0.

    Raises:
        TypeError: ``profile`` is no exponential average, or ``log_kept`` no number.
        ValueError: ``profile`` never moves the average, so there is nothing to correct, or ``log_kept`` is above 0.

    Example:
        >>> profile, moment = BiasCorrected(Smoothing(0.5)), Moment.of_update(0)
        >>> profile.weight(moment)
        1.0
        >>> profile.record(moment)
        >>> profile.weight(Moment.of_update(1))  # shares of 1/3 and 2/3
        0.6666666666666666
    """

    profile: Exponential
    log_kept: float = 0.0

    def __post_init__(self) -> None:
        if not isinstance(self.profile, Exponential):
            raise TypeError(f'profile must be an exponential average to correct, got {shown(self.profile)}.')
        self.log_kept = plain.number('log_kept', self.log_kept)
        if not self.log_kept <= 0:
            raise ValueError(f'log_kept must be at most 0, the logarithm of a share, got {self.log_kept}.')
        _refuse_frozen(self.profile, 'bias_correction', 'to correct')

    @property
    def unit(self) -> str:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The unit of the average to correct."""
        return self.profile.unit

    def weight(self, moment: Moment) -> float:
        log_smoothing = self.profile.log_smoothing(moment)
        updated_share = _one_minus_exp(self.log_kept + log_smoothing)
        # Before any time has passed nothing has been averaged, so the update copies.
        return min(1.0, _one_minus_exp(log_smoothing) / updated_share) if updated_share > 0 else 1.0

    def record(self, moment: Moment) -> None:
        self.log_kept += self.profile.log_smoothing(moment)

    def state_dict(self) -> dict[str, float]:
        return {'log_kept': self.log_kept}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        check_numbers(state, ('log_kept',))
        if not state['log_kept'] <= 0:
            raise ValueError(
                f"'log_kept' of the saved profile is {state['log_kept']}, the logarithm of a share, and must be at "
                'most 0.'
            )
        self.log_kept = float(state['log_kept'])

    def __str__(self) -> str:
        return f'{self.profile},bias_correction'


@dataclass(frozen=True)
class CopiesFirst(Profile):
    """A profile whose first update copies, so that the weights before it have no share::

        weight = 1                        # for the first update
        weight = profile.weight(moment)   # from then on

    Args:
        profile: chooses all later weights. It records the first update too.

    Example:
        >>> profile = CopiesFirst(Smoothing(0.75))
        >>> [profile.weight_at(n) for n in range(3)]
        [1.0, 0.25, 0.25]
    """

    profile: Profile

    @property
    def unit(self) -> str:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The unit of ``profile``."""
        return self.profile.unit

    @property
    def forgets_start(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        """As ``profile``: the first copy is a start, too."""
        return self.profile.forgets_start

    def weight(self, moment: Moment) -> float:
        return 1.0 if moment.num_updates == 0 else self.profile.weight(moment)

    def record(self, moment: Moment) -> None:
        self.profile.record(moment)

    def state_dict(self) -> dict[str, float]:
        return self.profile.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.profile.load_state_dict(state)

    def __str__(self) -> str:
        return str(self.profile)


def weight_from_smoothing(smoothing: float) -> float:
    """Returns the weight ``1 - smoothing`` of a single update.

    Args:
        smoothing: share of the old average to keep, in [0, 1]: 0 copies, 1 freezes.

    Raises:
        TypeError: ``smoothing`` is not a number.
        ValueError: ``smoothing`` lies outside [0, 1].
    """
    return 1.0 - check_share('smoothing', smoothing, 'For a half-life of n updates pass 2 ** (-1 / n).')


def check_share(name: str, value: float, remedy: str) -> float:
    """Returns ``value`` as an int or a float, or raises unless it is a number in [0, 1]; see :mod:`plain`."""
    if type(value) is not float:
        value = plain.number(name, value, kind='a number in [0, 1]', remedy=remedy)
    if not 0 <= value <= 1:
        raise ValueError(f'{name} must lie in [0, 1], got {shown(value)}. {remedy}')
    return value


def check_numbers(state: Mapping[str, Any], names: tuple[str, ...]) -> None:
    """Raises a ValueError unless ``state`` maps exactly ``names`` to numbers."""
    if not isinstance(state, Mapping) or set(state) != set(names):
        raise ValueError(f'the state of a profile must hold {", ".join(names) or "nothing"}, got {state!r}.')
    for name in names:
        if isinstance(state[name], bool) or not isinstance(state[name], int | float):
            raise ValueError(f'{name!r} of the saved profile is a {type(state[name]).__name__}, not a number.')


def _refuse_frozen(profile: Exponential, name: str, to_do: str) -> None:
    if profile.log_smoothing(Moment.of_update(0)) == 0:
        raise ValueError(
            f'{name} has nothing {to_do} in an average that never moves, got {profile}. Pass a value below 1, or leave '
            f'{name} out.'
        )


def _set(profile: Profile, **attributes: Any) -> None:
    """Sets attributes of a frozen profile, while it is built."""
    for name, value in attributes.items():
        object.__setattr__(profile, name, value)


def _check_count(num_updates: int) -> None:
    if isinstance(num_updates, bool) or not isinstance(num_updates, int):
        raise TypeError(f'num_updates must be a whole number of at least 0, got {shown(num_updates)}.')
    if num_updates < 0:
        raise ValueError(f'num_updates must be at least 0, got {num_updates}. The first update has 0.')


def _gamma(sigma_rel: float) -> float:
    """The exponent of a power function with this relative standard deviation, by bisection."""
    low, high = 0.0, 1.0 / sigma_rel  # sigma_rel falls with gamma, and is below 1 / (gamma + 2)
    while low < (middle := (low + high) / 2) < high:
        is_wider = _sigma_rel(middle) > sigma_rel
        low, high = (middle, high) if is_wider else (low, middle)
    return low


def _sigma_rel(gamma: float) -> float:
    return math.sqrt((gamma + 1) / (gamma + 3)) / (gamma + 2)


def _log_smoothing(elapsed: float, half_life: float) -> float:
    return -_LN2 * elapsed / half_life if half_life > 0 else -math.inf


def _one_minus_exp(logarithm: float) -> float:
    """``1 - exp(logarithm)`` without cancellation. Subtracting from 0.0 turns -0.0 into 0.0."""
    return 0.0 - math.expm1(logarithm)


def _suffix(unit: str) -> str:
    """The unit as Composer writes it behind a number; nothing for updates and steps."""
    return '' if unit in (UPDATES, 'steps') else unit
