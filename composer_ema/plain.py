"""What users pass, as Python's own plain values: flags, whole numbers, numbers, choices, texts.

NumPy's scalars, tensors without dimensions, fractions, enumerations and subclasses are converted where they come in, so
that a state never holds what ``torch.load(weights_only=True)`` refuses. What is none of the kind is refused by the name
of the argument. An update may ask only :func:`flag` of a bool and :func:`number` of a float; both cost next to nothing.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from decimal import Decimal
from numbers import Integral, Real
from typing import Any

from composer_ema.spans import ArgumentError
from composer_ema.wording import shown, suggestion


def flag(name: str, value: Any, remedy: str = '') -> bool:
    """A flag as True or False; NumPy's, and a boolean tensor without dimensions, are flags too.

    Args:
        name: the argument, for the error.
        value: what was passed.
        remedy: the last sentence of the error. Default: none.

    Raises:
        TypeError: it is another kind of value, such as ``'False'`` or 0.
    """
    if value is True or value is False:
        return value
    found = _unboxed(value)
    if not isinstance(found, bool):
        raise TypeError(_said(f'{name} must be True or False, got {shown(value)}.', remedy))
    return found


def whole(name: str, value: Any, *, least: int = 0, below: int = 2**63, remedy: str = '') -> int:
    """A whole number as an int.

    Args:
        name: the argument, for the errors.
        value: what was passed.
        least: the smallest that is legal. Default: 0.
        below: the first that is too large. Default: 2**63, beyond which nothing counts.
        remedy: the last sentence of the errors. Default: none.

    Raises:
        TypeError: it is no whole number.
        ArgumentError: it is out of range.
    """
    kind = f'a whole number of at least {least}'
    found = _unboxed(value)
    if isinstance(found, bool) or not isinstance(found, Integral):
        raise TypeError(_said(f'{name} must be {kind}, got {shown(value)}.', remedy))
    found = int(found)
    if found < least:
        raise ArgumentError(_said(f'{name} must be {kind}, got {shown(found)}.', remedy), name)
    if found >= below:
        raise ArgumentError(f'{name} must be a whole number below {_power(below)}, got {shown(found)}.', name)
    return found


def number(name: str, value: Any, *, kind: str = 'a number', remedy: str = '') -> float:
    """A real number as an int or a float; whether it is in range, finite or NaN is for the caller to say.

    Args:
        name: the argument, for the errors.
        value: what was passed.
        kind: what it must be, in the errors. Default: ``'a number'``.
        remedy: the last sentence of the errors. Default: none.

    Raises:
        TypeError: it is no number.
        ArgumentError: a float cannot hold it.
    """
    if type(value) is float:
        return value
    found = _unboxed(value)
    if isinstance(found, bool) or not isinstance(found, (Real, Decimal)):
        raise TypeError(_said(f'{name} must be {kind}, got {_typed(value)}.', remedy))
    try:
        as_float = float(found)
    except (OverflowError, ValueError) as error:  # too large, or a Decimal that signals
        message = f'{name} must be {kind} that a float can hold, got {shown(value)}.'
        raise ArgumentError(_said(message, remedy), name) from error
    return int(found) if isinstance(found, Integral) else as_float


def choice(name: str, value: Any, legal: Collection[str], remedy: str = '') -> str:
    """One of the ``legal`` words, as a string.

    Raises:
        ArgumentError: it is none of them, whatever its kind.
    """
    if not isinstance(value, str) or str.__str__(value) not in legal:
        *first, last = (repr(each) for each in legal)
        listing = f'{", ".join(first)} or {last}' if first else last
        raise ArgumentError(_said(f'{name} must be {listing}, got {shown(value)}.', remedy), name)
    return str.__str__(value)


def text(name: str, value: Any, remedy: str = '') -> str:
    """A text as a string.

    Raises:
        TypeError: it is none.
    """
    if not isinstance(value, str):
        raise TypeError(_said(f'{name} must be a string, got {_typed(value)}.', remedy))
    return str.__str__(value)


def word(name: str, value: Any) -> str:
    """A text of letters, digits and ``_``, which messages and descriptions may show as it is.

    Raises:
        TypeError: it is no string.
        ArgumentError: it has other characters, or none.
    """
    found = text(name, value)
    if not found.isidentifier():
        raise ArgumentError(f"{name} must be a word, such as 'ba', got {shown(found)}.", name)
    return found


def label(name: str, value: Any, legal: Collection[str]) -> str:
    """The label of an average among those that there are.

    Raises:
        ArgumentError: none is called so, whatever the kind of the value.
    """
    if not isinstance(value, str) or str.__str__(value) not in legal:
        near = suggestion(value if isinstance(value, str) else '', legal, 'The averages are')
        raise ArgumentError(f'{name}: no average is called {shown(value)}. {near}', name)
    return str.__str__(value)


def scalar(value: Any) -> Any:
    """A flag, number or text that has been checked already, as Python's own; anything else as it is."""
    found = _unboxed(value)
    if found is None or isinstance(found, bool):
        return found
    if isinstance(found, str):
        return str.__str__(found)
    if isinstance(found, Integral):
        return int(found)
    try:
        return float(found) if isinstance(found, (Real, Decimal)) else found
    except (OverflowError, ValueError):  # no float holds it
        return found


def mapping(name: str, value: Any, remedy: str = '') -> Mapping[Any, Any]:
    """A mapping as it is.

    Raises:
        TypeError: it is none.
    """
    if not isinstance(value, Mapping):
        raise TypeError(_said(f'{name} must be a mapping, got {_typed(value)}.', remedy))
    return value


def several(name: str, value: Any, kind: str, remedy: str = '') -> list[Any]:
    """What can be iterated as a list; a string cannot.

    Args:
        name: the argument, for the error.
        value: what was passed.
        kind: what it must be, in the error: ``'a list of names'``.
        remedy: the last sentence of the error. Default: none.

    Raises:
        TypeError: it cannot be iterated.
    """
    try:
        if isinstance(value, str | bytes | type):
            raise TypeError
        return list(value)
    except (TypeError, NotImplementedError) as error:  # torch has tensors and modules that only look iterable
        raise TypeError(_said(f'{name} must be {kind}, got {shown(value)}.', remedy)) from error


def names(argument: str, value: Any, remedy: str = '') -> list[str]:
    """Names as a list of strings.

    Raises:
        TypeError: it is none, such as a single string, or holds something else.
    """
    return [text(f'each of {argument}', each, remedy) for each in several(argument, value, 'a list of names', remedy)]


def is_time(value: Any) -> bool:
    """Whether a value is a time that has a number and a unit, Composer's or our own."""
    return hasattr(value, 'unit') and type(getattr(value, 'value', None)) in (int, float)


def _unboxed(value: Any) -> Any:
    """A scalar of NumPy, or a tensor on the host without dimensions, as what it holds; anything else as it is."""
    if getattr(value, 'shape', None) != () or isinstance(value, type):
        return value
    device = getattr(value, 'device', None)
    if getattr(device, 'type', 'cpu') != 'cpu':
        return value  # it has no value, or the host would have to wait for it
    try:
        return value.item()
    except Exception:
        return value


def _typed(value: Any) -> str:
    return f'{shown(value)} of type {type(value).__name__}'


def _said(message: str, remedy: str) -> str:
    return f'{message} {remedy}' if remedy else message


def _power(number: int) -> str:
    return f'2**{number.bit_length() - 1}' if number & (number - 1) == 0 else f'2**{number.bit_length()} - 1'
