"""From the arguments of EMA, each one value or one for each label, to the averages that it keeps."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from composer.core import Time

from composer_ema.averages import Profile
from composer_ema.labelled import check_label, refuse_empty
from composer_ema.profiles import check_kind, choose
from composer_ema.spans import ArgumentError, Span
from composer_ema.trainer.average import Kept
from composer_ema.trainer.clock import TimeArgument
from composer_ema.trainer.evaluation import PREDICT, TRAINING
from composer_ema.wording import suggestion

_UNITS = ('ba', 'ep', 'sp', 'tok', 'iter', 'dur')
# Arguments that make an average, and those that change an exponential one.
_HALF_LIFE, _AVERAGE = 'half_life', 'average'
_MAKERS = (_HALF_LIFE, 'smoothing', 'power', 'gamma', _AVERAGE)
_CHANGES = ('warmup', 'bias_correction')
_NOT_GIVEN: Mapping[str, Any] = {_AVERAGE: 'exponential', 'bias_correction': False}


@dataclass(frozen=True)
class Asked:
    """The averages that the arguments ask for.

    Args:
        kept: by label, the profile of each and the argument that gives its unit of time.
        half_lives: by label, of those that have one.
        is_labelled: whether the arguments give labels, so that there may be several.
    """

    kept: dict[str, Kept]
    half_lives: dict[str, Span]
    is_labelled: bool


def read(name: str, arguments: Mapping[str, Any], *, has_function: bool) -> Asked:
    """Reads the arguments that choose profiles.

    Any of ``half_life``, ``smoothing``, ``power``, ``gamma`` and ``average`` may map labels to values. The averages
    then stand in the order of these arguments, and of the labels in each. ``warmup`` and ``bias_correction`` are for
    all exponential ones, or map labels of some to values.

    Args:
        name: the label of a single average that is given without one.
        arguments: these seven by name.
        has_function: whether a function makes the average, so that none of them has an effect.

    Raises:
        TypeError, ValueError: an argument out of range, two that contradict each other, or a label that cannot be one.
    """
    given = {key: value for key, value in arguments.items() if value is not None and value != _NOT_GIVEN.get(key)}
    if has_function:
        _refuse_beside_function(given)
        return Asked({name: (None, None)}, {}, False)
    if not any(isinstance(given.get(maker), Mapping) for maker in _MAKERS):
        _refuse_labels_of_none(given)
        profile, horizon = _one(arguments, None)
        return Asked({name: (profile, horizon)}, {} if horizon is None else {name: horizon.span}, False)
    return _several(given)


def labels_in(name: str, arguments: Mapping[str, Any]) -> tuple[str, ...]:
    """The labels that the arguments ask for, in the order of the averages; ``name`` where they give none.

    Whether they may be labels, and the values, are checked by :func:`read`.
    """
    by_label = [arguments[maker] for maker in _MAKERS if isinstance(arguments.get(maker), Mapping)]
    return tuple(dict.fromkeys(label for values in by_label for label in values)) or (name,)


def _several(given: Mapping[str, Any]) -> Asked:
    own: dict[str, dict[str, Any]] = {}
    for maker in _MAKERS:
        values = given.get(maker, {})
        if not isinstance(values, Mapping):
            raise ArgumentError(
                f'{maker}={_shown(values)} has no label, and other averages have. Give it one, as in '
                f'{maker}={{{"other"!r}: {_shown(values)}}}, or leave it out.',
                maker,
            )
        if maker in given:
            _refuse_empty(maker, values)
        for label, value in values.items():
            _check_label(maker, label, own)
            own[label] = {maker: _value(maker, label, value)}
    for change in _CHANGES:
        if change in given:
            _give_out(change, given[change], own)
    kept = {label: _one(arguments, label) for label, arguments in own.items()}
    half_lives = {label: horizon.span for label, (_, horizon) in kept.items() if horizon is not None}
    return Asked(kept, half_lives, True)


def _one(arguments: Mapping[str, Any], label: str | None) -> Kept:
    """The profile of one average, and the argument that gives its unit of time."""
    horizon, chosen = None, dict(arguments)
    if (half_life := chosen.pop(_HALF_LIFE, None)) is not None:
        written = _HALF_LIFE if label is None else f'{_HALF_LIFE}[{label!r}]'
        try:
            span = Span.parse(half_life, name=written, units=_UNITS)
        except ArgumentError as error:
            raise ArgumentError(str(error), _HALF_LIFE) from error
        horizon = TimeArgument(_HALF_LIFE, span, label)
        chosen[_HALF_LIFE] = span.value
    try:
        profile: Profile = choose(unit='ba' if horizon is None else horizon.span.unit, **chosen)
    except (TypeError, ValueError) as error:
        if label is None:
            raise
        raise type(error)(f'{label}: {error}') from error
    return profile, horizon


def _value(maker: str, label: str, value: Any) -> Any:
    if value is None:
        raise ArgumentError(
            f'{maker}[{label!r}] is None, which makes no average. Leave the label out, or give it a value.', maker
        )
    if maker == _AVERAGE:
        check_kind(value)
        if value != 'equal':
            raise ArgumentError(
                f'{maker}[{label!r}]={value!r} does not say which exponential average. Write the label under half_life '
                'or smoothing instead.',
                maker,
            )
    return value


def _give_out(change: str, value: Any, own: Mapping[str, dict[str, Any]]) -> None:
    """Adds ``warmup`` or ``bias_correction`` to the arguments of the averages that it is for."""
    exponential = [label for label, arguments in own.items() if arguments.keys() & {_HALF_LIFE, 'smoothing'}]
    if isinstance(value, Mapping):
        _refuse_empty(change, value)
    else:
        if not exponential:
            raise ArgumentError(f'{change}={value!r} has no effect: no average is exponential. Leave it out.', change)
        value = dict.fromkeys(exponential, value)
    for label, each in value.items():
        if label not in own:
            remedy = suggestion(label, own, 'The averages are')
            raise ArgumentError(f'{change} names the average {label!r}, which there is not. {remedy}', change)
        if each is not None:
            own[label][change] = each


def _refuse_empty(name: str, values: Mapping[str, Any]) -> None:
    try:
        refuse_empty(name, values)
    except ValueError as error:
        raise ArgumentError(str(error), name) from error


def _check_label(maker: str, label: Any, own: Mapping[str, Any]) -> None:
    try:
        check_label(maker, label, own, (TRAINING, PREDICT))
    except ValueError as error:
        raise ArgumentError(str(error), maker) from error


def _refuse_beside_function(given: Mapping[str, Any]) -> None:
    if given:
        name, value = next(iter(given.items()))
        raise ArgumentError(
            f'avg_fn and multi_avg_fn decide how much of the average is kept, so {name}={_shown(value)} has no effect. '
            'Leave it out.',
            name,
        )


def _refuse_labels_of_none(given: Mapping[str, Any]) -> None:
    for change in _CHANGES:
        if isinstance(given.get(change), Mapping):
            raise ArgumentError(
                f'{change}={given[change]!r} names averages by label, and the average of this run has none. Give it '
                "one, as in half_life={'long': '1ep'}, or pass a single value.",
                change,
            )


def _shown(value: Any) -> str:
    return repr(str(value)) if isinstance(value, Time) else repr(value)
