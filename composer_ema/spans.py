"""Time strings such as ``'1000ba'``, read and checked without importing Composer, and the error of an argument."""

from __future__ import annotations

import math
import re
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from composer_ema.wording import shown

#: Composer's units of training time, each with the words an error message uses.
UNITS = {
    'ba': 'batches',
    'ep': 'epochs',
    'sp': 'samples',
    'tok': 'tokens',
    'iter': 'iterations',
    'dur': 'share of the run',
}
#: The same in the singular, for :func:`composer_ema.wording.counted`; a share of the run is not counted.
NOUNS = {'iter': 'iteration', 'ep': 'epoch', 'ba': 'batch', 'sp': 'sample', 'tok': 'token'}
#: The units that the clock of a run counts. A share of the run is measured in one of them.
CLOCK_UNITS = tuple(NOUNS)
#: Units that a part of may have passed; batches, samples and tokens come whole.
FRACTIONAL_UNITS = frozenset({'iter', 'ep', 'dur'})

# Whole numbers beyond are no floats.
_LARGEST = 1.7e308
_TIME_STRING = re.compile(r'\s*(?P<value>[^a-zA-Z]*(?:[eE][^a-zA-Z]+)?)(?P<unit>[a-zA-Z]*)\s*')


class ArgumentError(ValueError):
    """A value that an argument cannot have.

    Args:
        message: The value, the rule and the remedy.
        argument: The name of the argument, so that a caller can tell the user where it was given. Of a name that is
            that of one label, as ``half_life['long']``, the argument is kept.
    """

    def __init__(self, message: str, argument: str = '') -> None:
        super().__init__(message)
        self.argument = argument.partition('[')[0]


@dataclass(frozen=True)
class Span:
    """A stretch of training: so many batches, epochs, samples, tokens or iterations, or a share of the run.

    Args:
        value: how many; whole for batches, samples and tokens.
        unit: a key of :data:`UNITS`.

    Example:
        >>> Span.parse('1.5ep', name='half_life')
        Span(value=1.5, unit='ep')
        >>> str(Span(1000, 'ba'))
        '1000ba'
    """

    value: int | float
    unit: str

    def __str__(self) -> str:
        return f'{self.value}{self.unit}'

    @classmethod
    def parse(cls, time: Any, *, name: str, units: Collection[str] = tuple(UNITS), positive: bool = False) -> Span:
        """Reads a time string, a :class:`Span`, or anything with Composer's ``value`` and ``unit``.

        Args:
            time: ``'<number><unit>'``, for example ``'1000ba'``, ``'1.5ep'``, ``'3e6sp'``, ``'0.1dur'``.
            name: the argument's name, for the error message.
            units: the units that make sense for this argument.
            positive: whether zero is refused too.

        Raises:
            TypeError: ``time`` is no time at all.
            ArgumentError: it does not parse, its unit is not in ``units``, or its value is out of range.
        """
        value, unit = _split(time, name)
        got = shown(time) if isinstance(time, str) else repr(f'{value}{unit}')
        example = f'Pass for example {_given(name, _example(value, unit, units, positive=positive))}.'
        if unit not in units:
            legal = ', '.join(f'{unit} ({UNITS[unit]})' for unit in units)
            raise ArgumentError(f'{name} takes the units {legal}, got {got}. {example}', name)
        if not math.isfinite(value):
            raise ArgumentError(f'{name} must be finite, got {got}. {example}', name)
        if value < 0 or (positive and value == 0):
            raise ArgumentError(
                f'{name} must {"be above zero" if positive else "not be negative"}, got {got}. {example}', name
            )
        if unit not in FRACTIONAL_UNITS and value != int(value):
            raise ArgumentError(
                f'{name} counts whole {UNITS[unit]}, got {got}. Round it, or pass a share of epochs.', name
            )
        return cls(int(value) if value == int(value) and unit != 'dur' else float(value), unit)


def multiples(time: float, interval: float) -> int:
    """How many multiples of ``interval`` lie in (0, time], up to the rounding error of fractions.

    Example:
        >>> multiples(0.3, 0.1), multiples(19, 10)
        (3, 1)
    """
    return math.floor(time / interval + 1e-9)


def has_crossed(earlier: float, now: float, interval: float) -> bool:
    """Whether a multiple of ``interval`` lies in (earlier, now], up to the rounding error of fractions.

    Example:
        >>> has_crossed(9, 10, 10), has_crossed(10, 11, 10), has_crossed(2.9, 3.1, 0.5)
        (True, False, True)
    """
    if now <= earlier or now - earlier >= interval:
        return now > earlier
    return multiples(now, interval) > multiples(earlier, interval)


_EXAMPLES = {'ba': '1000ba', 'ep': '2ep', 'sp': '50000sp', 'tok': '1000000tok', 'iter': '2iter', 'dur': '0.1dur'}


def _example(value: float, unit: str, units: Collection[str], *, positive: bool) -> str:
    """A legal time: the number that was given without a unit, in the first of :data:`UNITS` that is legal."""
    legal = next(each for each in UNITS if each in units)
    if not unit and math.isfinite(value) and value == int(value) and (value > 0 or (value == 0 and not positive)):
        return f'{int(value)}{legal}'
    # Intervals are short.
    return '2ba' if positive and legal == 'ba' else _EXAMPLES[legal]


def _given(name: str, time: str) -> str:
    """The argument as it is written; ``name`` may be that of one label, as in ``half_life['long']``."""
    argument, _, label = name.removesuffix(']').partition('[')
    return f"{argument}={{{label}: '{time}'}}" if label else f"{name}='{time}'"


def _split(time: Any, name: str) -> tuple[float, str]:
    if isinstance(time, str):
        match = _TIME_STRING.fullmatch(time)
        value = match and _number(match['value'])
        if match is None or value is None:
            raise ArgumentError(
                f"{name} must be a number followed by a unit, such as '1000ba', got {shown(time)}.", name
            )
        return value, match['unit'].lower()
    value, unit = getattr(time, 'value', None), getattr(time, 'unit', None)
    unit = getattr(unit, 'value', unit)
    if isinstance(value, (int, float)) and not isinstance(value, bool) and isinstance(unit, str):
        return (math.inf if value > _LARGEST else value), str.__str__(unit)
    raise TypeError(
        f"{name} must be a time string such as '1000ba', got {shown(time)} of type {type(time).__name__}. "
        'A bare number has no unit: write the unit behind it.'
    )


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None
