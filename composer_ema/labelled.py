"""Arguments that are one value, or one for each label: the arguments of each average that they ask for."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Any

from composer_ema import plain, wording
from composer_ema.averages import Profile
from composer_ema.profiles import check_kind, choose
from composer_ema.spans import ArgumentError
from composer_ema.wording import suggestion

_LABEL = re.compile(r'[A-Za-z_][\w-]{0,63}', re.ASCII)
_AVERAGE = 'average'
#: Arguments that change an exponential average. All others make one.
CHANGES = ('warmup', 'bias_correction')
_OTHERS = ('power', 'gamma', _AVERAGE)


def by_label(given: Mapping[str, Any], *, reserved: Collection[str] = ()) -> dict[str, dict[str, Any]] | None:
    """The arguments of each average by its label, in the order of the arguments and of the labels in each.

    Args:
        given: the arguments of a door that choose profiles, without those that were not given. An argument that makes
            averages maps labels to values if one of them does; ``warmup`` and ``bias_correction`` are for all
            exponential ones, or map labels of some to values.
        reserved: what no average may be called.

    Returns:
        None where no argument that makes averages has labels.

    Raises:
        ArgumentError: an argument without labels beside others that have them, a label that cannot be one or that two
            arguments give, or an argument without effect.
        TypeError: a kind of average that is no string.

    Example:
        >>> by_label({'half_life': {'short': 10, 'long': 100}, 'power': {'wide': 0.25}, 'warmup': {'long': 0.1}})
        {'short': {'half_life': 10}, 'long': {'half_life': 100, 'warmup': 0.1}, 'wide': {'power': 0.25}}
    """
    makers = {name: value for name, value in given.items() if name not in CHANGES}
    changes = {name: value for name, value in given.items() if name in CHANGES}
    if not any(isinstance(value, Mapping) for value in makers.values()):
        for name, value in changes.items():
            if isinstance(value, Mapping):
                raise ArgumentError(
                    f'{name}={shown(value)} names averages by label, and the only average has none. Pass a single '
                    "value, or label the average, as in half_life={'long': ...}.",
                    name,
                )
        return None
    own: dict[str, dict[str, Any]] = {}
    for maker, values in makers.items():
        if not isinstance(values, Mapping):
            raise ArgumentError(
                f'{maker}={shown(values)} has no label, and other averages have. Give it one, as in '
                f"{maker}={{'other': {shown(values)}}}, or leave it out.",
                maker,
            )
        _refuse_empty(maker, values)
        for label, value in values.items():
            _check_label(maker, label, own, reserved)
            _check_value(maker, label, value)
            own[str.__str__(label)] = {maker: value}
    for change, value in changes.items():
        _give_out(change, value, own)
    return own


def chosen(label: str | None, **arguments: Any) -> Profile:
    """The profile of one average; see :func:`composer_ema.profiles.choose`. Its errors name the label, if any."""
    try:
        return choose(**arguments)
    except (TypeError, ValueError) as error:
        if label is None:
            raise
        if isinstance(error, ArgumentError):
            raise ArgumentError(f'{label}: {error}', error.argument) from error
        raise type(error)(f'{label}: {error}') from error


def is_given(value: Any, default: Any) -> bool:
    """Whether an argument is neither None nor equal to its default."""
    if value is None or value is default:
        return False
    try:
        return plain.flag('', value) is not default if isinstance(default, bool) else bool(value != default)
    except Exception:  # what is no flag, or cannot be compared, such as an array
        return True


def _give_out(change: str, value: Any, own: Mapping[str, dict[str, Any]]) -> None:
    """Adds ``warmup`` or ``bias_correction`` to the arguments of the averages that it is for."""
    if isinstance(value, Mapping):
        _refuse_empty(change, value)
    else:
        exponential = [label for label, arguments in own.items() if arguments.keys().isdisjoint(_OTHERS)]
        if not exponential:
            raise ArgumentError(
                f'{change}={shown(value)} has no effect: no average is exponential. Leave it out.', change
            )
        value = dict.fromkeys(exponential, value)
    for label, each in value.items():
        if label not in own:
            remedy = suggestion(label if isinstance(label, str) else '', own, 'The averages are')
            raise ArgumentError(f'{change} names the average {shown(label)}, which there is not. {remedy}', change)
        if each is not None:
            own[label][change] = each


def _check_value(maker: str, label: str, value: Any) -> None:
    if value is None:
        raise ArgumentError(
            f'{maker}[{label!r}] is None, which makes no average. Leave the label out, or give it a value.', maker
        )
    if maker != _AVERAGE:
        return
    if check_kind(value) != 'equal':
        raise ArgumentError(
            f'{maker}[{label!r}]={value!r} does not say which exponential average. Write the label under half_life '
            'instead.',
            maker,
        )


def _refuse_empty(name: str, values: Mapping[str, Any]) -> None:
    if not values:
        raise ArgumentError(
            f'{name}={{}} names no average, so it has no effect. Give it a label and a value, or leave it out.', name
        )


def _check_label(maker: str, label: Any, own: Mapping[str, Any], reserved: Collection[str]) -> None:
    if not isinstance(label, str) or not _LABEL.fullmatch(label):
        raise ArgumentError(
            f'{maker} must map labels to values, got the label {shown(label)}. A label starts with a letter and '
            "has at most 64 letters, digits, '_' and '-', as 'long' or 'ba_100'.",
            maker,
        )
    if label in reserved:
        raise ArgumentError(
            f'{maker} calls an average {label!r}, which has another meaning. Pass another label.', maker
        )
    if label in own:
        raise ArgumentError(
            f'{maker} and {next(iter(own[label]))} both make an average {label!r}. Give each its own label.', maker
        )


def shown(value: Any) -> str:
    """A value as it is written in Python; a time as the string that stands for it."""
    return repr(str(value)) if plain.is_time(value) else wording.shown(value)
