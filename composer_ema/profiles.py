"""From the arguments of every door, or a profile's own description, to the profile; and what its average started from.

Clashing arguments are refused here and nowhere else, so that EMA, EMAOptimizer and recipes say the same.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

from composer_ema import plain
from composer_ema.averages import (
    UPDATES,
    BiasCorrected,
    CopiesFirst,
    Equal,
    Exponential,
    HalfLife,
    Moment,
    Power,
    Profile,
    Smoothing,
    WarmedUp,
)
from composer_ema.wording import shown

#: What ``average=`` may be.
Kind = Literal['exponential', 'equal']
#: An average that holds more of its start than this at the end of a run is warned of.
NEGLIGIBLE_START = 0.01
#: The description of an average that a function makes.
FUNCTION = 'function'

# A profile of EMAOptimizer counts its steps; the others count updates, or read the clock.
_STEPS = 'steps'
# Where a smoothing has this name, it applies to each step.
_DECAY = 'decay'
_HALF_LIFE = re.compile(r'(?P<value>[0-9.e+-]+?)(?P<unit>[a-z]*)')


def choose(
    *,
    unit: str,
    half_life: float | None = None,
    smoothing: float | None = None,
    power: float | None = None,
    gamma: float | None = None,
    average: str = 'exponential',
    warmup: float | None = None,
    bias_correction: bool = False,
    smoothing_name: str = 'smoothing',
) -> Profile:
    """Returns the profile that the arguments of a door ask for.

    Exactly one of ``half_life``, ``smoothing``, ``power`` and ``gamma`` makes the profile, or ``average='equal'``.
    ``warmup`` and ``bias_correction`` change an exponential average, one of them at most: both make it forget where it
    started, and correcting an average that has warmed up would change none of its digits after a few updates.

    Args:
        unit: unit of the half-life and of the time that a power average measures: ``'ba'``, ``'dur'``, ``'steps'``, ...
        half_life: time in ``unit``, finite and at least 0; see :class:`~composer_ema.averages.HalfLife`.
        smoothing: share of the old average to keep, in [0, 1], for each step if ``unit`` is ``'steps'``, otherwise for
            each update; see :class:`~composer_ema.averages.Smoothing`.
        power: relative width of a power average; see :class:`~composer_ema.averages.Power`.
        gamma: the exponent of a power average, at least 0.
        average: ``'exponential'``, or ``'equal'`` for the mean of all updates. Default: ``'exponential'``.
        warmup: upper limit of the half-life as a share of the time since the start, above 0; see
            :class:`~composer_ema.averages.WarmedUp`. Default: None, no limit.
        bias_correction: whether the average forgets where it started by correction; see
            :class:`~composer_ema.averages.BiasCorrected`. Default: False.
        smoothing_name: what the door calls ``smoothing``. Default: ``'smoothing'``.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: an argument is out of range, has no effect, contradicts another, or all are missing.

    Example:
        >>> str(choose(unit='ba', half_life=100, warmup=0.1))
        'half_life=100ba,warmup=0.1'
        >>> choose(unit='steps', power=0.1, bias_correction=True)
        Traceback (most recent call last):
        ...
        ValueError: bias_correction has no effect on a power average, which forgets its start anyway. Leave it out.
    """
    makers = {'half_life': half_life, smoothing_name: smoothing, 'power': power, 'gamma': gamma}
    given = {name: value for name, value in makers.items() if value is not None}
    bias_correction = plain.flag('bias_correction', bias_correction)
    if check_kind(average) == 'equal':
        changes = {'warmup': warmup, 'bias_correction': bias_correction or None}
        refuse_without_effect({**given, **changes}, 'an equal average')
        return Equal(_unit_of_updates(unit))
    if len(given) > 1:
        raise ValueError(f'pass either {" or ".join(given)}, got {" and ".join(_written(given, unit))}.{_remedy(unit)}')
    if not given:
        *others, last = makers
        example = 'half_life=1000' if unit == _STEPS else f"half_life='1000{unit if unit != UPDATES else 'ba'}'"
        raise ValueError(f'one of {", ".join(others)} and {last} must be given, got None for all. Pass {example}.')
    [(name, value)] = given.items()
    if name in ('power', 'gamma'):
        _refuse_forgetting_twice(warmup, bias_correction)
        return Power(unit=unit, **{'sigma_rel' if name == 'power' else name: value})
    is_half_life = name == 'half_life'
    profile = HalfLife(value, unit) if is_half_life else Smoothing(value, _unit_of_updates(unit), smoothing_name)
    if warmup is not None and bias_correction:
        raise ValueError(
            f'pass either warmup or bias_correction, got warmup={shown(warmup)} and bias_correction=True. Both make '
            'the average forget where it started; warmup=0.1 also keeps it close to the weights while they move fast.'
        )
    if warmup is not None:
        return WarmedUp(profile, warmup)
    return BiasCorrected(profile) if bias_correction else profile


def check_kind(average: Any) -> str:
    """Returns ``average`` as a string, or raises a ValueError unless it is one of :data:`Kind`."""
    return plain.choice('average', average, get_args(Kind), 'For any other pass avg_fn or multi_avg_fn.')


def refuse_without_effect(arguments: Mapping[str, Any], on: str) -> None:
    """Raises a ValueError that names the first argument that is not None: it has no effect ``on`` an average."""
    for name, value in arguments.items():
        if value is not None:
            raise ValueError(f'{name}={shown(value)} has no effect on {on}. Leave it out.')


def of_description(description: str, *, unit: str = UPDATES) -> Profile:
    """Returns the profile that ``str(profile)`` describes, without memory of any update.

    Args:
        description: as states and snapshots keep it: ``'half_life=100ba,warmup=0.1'``, ``'decay=0.999'``,
            ``'power=0.1'``, ``'gamma=6.94'``, ``'equal'``.
        unit: unit of a power average, and of a half-life without one, which descriptions leave out: ``'ba'`` for those
            of :class:`composer_ema.EMA`, ``'steps'`` for those of :class:`composer_ema.EMAOptimizer`. Default:
            :data:`~composer_ema.averages.UPDATES`.

    Raises:
        ValueError: ``description`` is that of no profile.

    Example:
        >>> of_description('half_life=100ba,bias_correction')
        BiasCorrected(profile=HalfLife(half_life=100, unit='ba'), log_kept=0.0)
    """
    first, *changes = description.split(',')
    name, _, value = first.partition('=')
    profile: Profile | None = None
    if first == 'equal':
        profile = Equal(_unit_of_updates(unit))
    elif name == 'half_life' and (match := _HALF_LIFE.fullmatch(value)):
        profile = HalfLife(_number(match['value'], description), match['unit'] or unit)
    elif name in ('smoothing', _DECAY):
        profile = Smoothing(_number(value, description), _STEPS if name == _DECAY else UPDATES, name)
    elif name == 'power':
        profile = Power(_number(value, description), unit)
    elif name == 'gamma':
        profile = Power(unit=unit, gamma=_number(value, description))
    for change in changes:
        name, _, value = change.partition('=')
        if name == 'warmup' and isinstance(profile, HalfLife | Smoothing):
            profile = WarmedUp(profile, _number(value, description))
        elif change == 'bias_correction' and isinstance(profile, Exponential):
            profile = BiasCorrected(profile)
        else:
            profile = None
    if profile is None:
        raise _unreadable(description)
    return profile


@dataclass
class StartShare:
    """How much of an average is still the weights that it started from.

    After each update, ``value *= 1 - weight``: what the update left of the start. The first update of a power, equal or
    bias-corrected average leaves nothing. Where a first update copies the weights before a profile takes over, these
    are the start.

    Args:
        value: the share in [0, 1]; None where it is not known, as for an average that came from elsewhere. Default: 1,
            an average before its first update.

    Example:
        >>> start = StartShare()
        >>> for _ in range(3):
        ...     start.record(weight=0.5)
        >>> start.value
        0.125
    """

    value: float | None = 1.0

    def copied(self, profile: Profile, moment: Moment) -> None:
        """Records a first update, at ``moment``, that copied the weights whatever ``profile`` says.

        Call it before ``profile.record(moment)``.
        """
        if isinstance(profile, CopiesFirst):
            profile = profile.profile
        # A profile that copies at every update never keeps a start.
        self.value = 0.0 if profile.forgets_start or profile.weight(moment) == 1 else 1.0

    def record(self, weight: float) -> None:
        """Records an update whose weight the profile chose."""
        if self.value is not None:
            self.value *= 1.0 - weight


def record_update(
    profile: Profile | None, start: StartShare, moment: Moment | None, weight: float | None, *, has_copied: bool
) -> None:
    """Records an update of an average in its profile's memory and in the share of its start.

    Args:
        profile: of the average; None where a function makes it, and only that knows what became of the start.
        start: the share.
        moment: of the update; None where there is no profile.
        weight: of the update; likewise.
        has_copied: whether it was a first update that copied the weights whatever the profile says.
    """
    if profile is None or moment is None or weight is None:
        start.value = None
        return
    if has_copied:
        start.copied(profile, moment)
    else:
        start.record(weight)
    profile.record(moment)


def described(profile: Profile | None) -> str:
    """The profile of an average in one word, as states keep it; :data:`FUNCTION` where a function makes it."""
    return FUNCTION if profile is None else str(profile)


def check_start_share(value: Any, what: str) -> float | None:
    """Returns the ``value`` of a saved :class:`StartShare`.

    Raises:
        ValueError: it is none. The message starts with ``what``.
    """
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
        got = repr(value) if isinstance(value, float | str) else f'a {type(value).__name__}'
        raise ValueError(f'{what} must be a share in [0, 1] or None, got {got}.')
    return float(value)


def start_remedy(
    share: float, profile: Profile | None = None, *, average: str = 'the average', ahead: bool = False
) -> str:
    """What a user should know of an average that holds much of its start at the end of a run; '' if it does not.

    Much is more than a hundredth, :data:`NEGLIGIBLE_START`.

    Args:
        share: of the start in the average.
        profile: of the average; None where nobody knows. Default: None.
        average: what to call the average. Default: ``'the average'``.
        ahead: whether the end of the run is still to come. Default: False.

    Example:
        >>> start_remedy(0.312)
        'the average still holds 31 % of the initial weights. Pass warmup=0.1 or a shorter half_life.'
        >>> start_remedy(0.01)
        ''
    """
    if not share > NEGLIGIBLE_START:
        return ''
    percent = f'{100 * share:.2g}' if share < 0.995 else f'{100 * share:.0f}'
    holds, then = ('will still hold', ' at the end') if ahead else ('still holds', '')
    return f'{average} {holds} {percent} % of the initial weights{then}. {_start_forgotten_by(profile, share)}'


def _start_forgotten_by(profile: Profile | None, share: float) -> str:
    """What makes an average of this profile forget its start sooner."""
    if isinstance(profile, CopiesFirst):
        profile = profile.profile
    is_frozen = isinstance(profile, Smoothing) and profile.smoothing == 1
    if share == 1 and not is_frozen:
        return 'It has a single update, which copies. Update it more often, or start it earlier.'
    if isinstance(profile, WarmedUp):
        return 'Pass warmup=0.1.' if profile.ratio > 0.1 else 'Update it more often, or start it earlier.'
    smaller = f'smaller {profile.name}' if isinstance(profile, Smoothing) else 'shorter half_life'
    return f'Pass a {smaller}.' if is_frozen else f'Pass warmup=0.1 or a {smaller}.'


def _refuse_forgetting_twice(warmup: float | None, bias_correction: bool) -> None:
    for name, value in (('warmup', warmup), ('bias_correction', bias_correction or None)):
        if value is not None:
            raise ValueError(f'{name} has no effect on a power average, which forgets its start anyway. Leave it out.')


def _written(given: Mapping[str, Any], unit: str) -> list[str]:
    """The arguments as the user wrote them."""
    suffix = '' if unit in (UPDATES, _STEPS) else unit
    return [
        f"{name}='{value}{suffix}'" if name == 'half_life' and suffix else f'{name}={shown(value)}'
        for name, value in given.items()
    ]


def _remedy(unit: str) -> str:
    return '' if unit == _STEPS else ' To replace the half-life of a recipe, write half_life: null there.'


def _unit_of_updates(unit: str) -> str:
    return _STEPS if unit == _STEPS else UPDATES


def _number(text: str, description: str) -> float:
    try:
        return int(text) if text.isdecimal() else float(text)
    except ValueError:
        raise _unreadable(description) from None


def _unreadable(description: str) -> ValueError:
    return ValueError(
        f'{description!r} describes no profile. Pass what str(profile) returns, such as '
        "'half_life=100ba,warmup=0.1', 'power=0.1' or 'equal'."
    )
