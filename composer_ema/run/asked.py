"""From the arguments that every door takes, each one value or one for each label, to the averages to keep."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from composer_ema import plain
from composer_ema.labelled import CHANGES, by_label, chosen, is_given, shown
from composer_ema.run.average import Kept
from composer_ema.run.clock import TimeArgument
from composer_ema.spans import ArgumentError, Span

#: What an evaluation asks for that wants the training weights.
TRAINING = 'training'
#: The label of predictions.
PREDICT = 'predict'

_UNITS = ('ba', 'ep', 'sp', 'tok', 'iter', 'dur')
_HALF_LIFE, _AVERAGE = 'half_life', 'average'
#: Arguments of EMA that make averages: of a single average, one of them.
MAKERS = (_HALF_LIFE, 'smoothing', 'power', 'gamma', _AVERAGE)
#: All arguments that choose profiles.
OF_PROFILES = (*MAKERS, *CHANGES)
_NOT_GIVEN: Mapping[str, Any] = {_AVERAGE: 'exponential', 'bias_correction': False}


class _Default(str):
    """A default that is not the same object as an equal value from the user."""


#: The half-life where nothing else makes the average.
DEFAULT_HALF_LIFE = _Default('1000ba')


@dataclass(frozen=True)
class Asked:
    """The averages that the arguments ask for.

    Args:
        kept: by label, the profile of each and the argument that gives its unit of time.
        half_lives: by label, of those that have one.
        is_labelled: whether the arguments give labels, so that there may be several.
        arguments: as given, in plain types.
    """

    kept: dict[str, Kept]
    half_lives: dict[str, Span]
    is_labelled: bool
    arguments: dict[str, Any]


def read(name: str, arguments: Mapping[str, Any], *, has_function: bool) -> Asked:
    """Reads the arguments that choose profiles.

    Any of ``half_life``, ``smoothing``, ``power``, ``gamma`` and ``average`` may map labels to values. The averages
    then stand in the order of these arguments, and of the labels in each. ``warmup`` and ``bias_correction`` are for
    all exponential ones, or map labels of some to values.

    Args:
        name: the label of a single average that is given without one.
        arguments: these seven by name. :data:`DEFAULT_HALF_LIFE` gives way to anything else.
        has_function: whether a function makes the average, so that none of them has an effect.

    Raises:
        TypeError, ValueError: an argument out of range, two that contradict each other, or a label that cannot be one.
    """
    arguments = dict(arguments)
    if arguments.get(_HALF_LIFE) is DEFAULT_HALF_LIFE:
        others = (arguments.get(maker) for maker in MAKERS if maker not in (_HALF_LIFE, _AVERAGE))
        is_replaced = has_function or any(value is not None for value in others)
        if is_replaced or is_given(arguments.get(_AVERAGE), _NOT_GIVEN[_AVERAGE]):
            arguments[_HALF_LIFE] = None
    given = {key: value for key, value in arguments.items() if is_given(value, _NOT_GIVEN.get(key))}
    if has_function:
        _refuse_beside_function(given)
        return Asked({name: (None, None)}, {}, False, _as_plain(arguments, {}))
    labelled = by_label(given, reserved=(TRAINING, PREDICT))
    by_name = {name: arguments} if labelled is None else labelled
    kept = {label: _one(own, None if labelled is None else label) for label, own in by_name.items()}
    half_lives = {label: horizon.span for label, (_, horizon) in kept.items() if horizon is not None}
    written: Any = {label: str(span) for label, span in half_lives.items()}
    if labelled is None:
        written = next(iter(written.values()), None)
    return Asked(kept, half_lives, labelled is not None, _as_plain(arguments, {_HALF_LIFE: written or None}))


def labels_in(name: str, arguments: Mapping[str, Any]) -> tuple[str, ...]:
    """The labels that the arguments ask for, in the order of the averages; ``name`` where they give none.

    Whether they may be labels, and the values, are checked by :func:`read`.

    Raises:
        TypeError: ``arguments`` maps no names.
    """
    arguments = plain.mapping('arguments', arguments, 'Pass those of EMA by name.')
    labelled = [arguments[maker] for maker in MAKERS if isinstance(arguments.get(maker), Mapping)]
    return tuple(dict.fromkeys(label for values in labelled for label in values)) or (name,)


def check_evaluate_with(evaluate_with: Mapping[str, str] | None, labels: Sequence[str]) -> dict[str, str]:
    """Returns a copy of the argument ``evaluate_with``: one of ``labels`` or ``'training'`` by evaluation.

    Raises:
        TypeError, ValueError: it maps something else.
    """
    if evaluate_with is None:
        return {}
    if not isinstance(evaluate_with, Mapping):
        raise TypeError(
            f"evaluate_with must map labels to weights, such as {{'eval': {labels[0]!r}}}, got {shown(evaluate_with)}."
        )
    checked = {}
    for label, weights in evaluate_with.items():
        if not isinstance(label, str):
            raise TypeError(
                f'evaluate_with maps labels, which are strings, got {shown(label)}. Pass the label of an evaluator.'
            )
        checked[str.__str__(label)] = check_weights(f'evaluate_with[{shown(label)}]', weights, labels)
    return checked


def check_weights(name: str, weights: Any, labels: Sequence[str]) -> str:
    """Returns ``weights``, the argument ``name``, or raises: it is one of ``labels`` or ``'training'``."""
    return plain.choice(name, weights, [*labels, TRAINING])


def _one(arguments: Mapping[str, Any], label: str | None) -> Kept:
    """The profile of one average, and the argument that gives its unit of time."""
    horizon, own = None, dict(arguments)
    if (half_life := own.pop(_HALF_LIFE, None)) is not None:
        written = _HALF_LIFE if label is None else f'{_HALF_LIFE}[{label!r}]'
        span = Span.parse(half_life, name=written, units=_UNITS)
        horizon = TimeArgument(_HALF_LIFE, span, label)
        own[_HALF_LIFE] = span.value
    return chosen(label, unit='ba' if horizon is None else horizon.span.unit, **own), horizon


def _refuse_beside_function(given: Mapping[str, Any]) -> None:
    if given:
        name, value = next(iter(given.items()))
        raise ArgumentError(
            f'avg_fn and multi_avg_fn decide how much of the average is kept, so {name}={shown(value)} has no effect. '
            'Leave it out.',
            name,
        )


def _as_plain(arguments: Mapping[str, Any], known: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments as a state keeps them: strings, numbers, None, or dictionaries of them by label."""
    return {name: known[name] if name in known else _plain(value) for name, value in arguments.items()}


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str.__str__(label): _plain(each) for label, each in value.items()}
    return str(value) if plain.is_time(value) else plain.scalar(value)
