"""Checks of arguments that data sets and models share; each error carries the name of its argument."""

from __future__ import annotations

import numbers

from composer_ema.spans import ArgumentError


def check_whole(name: str, value: object, least: int, remedy: str, *, argument: str | None = None) -> None:
    """Raises an ArgumentError unless ``value`` is a whole number of at least ``least``.

    Args:
        name: What the message calls the value.
        value: The value.
        least: The smallest legal one.
        remedy: What to pass instead, a sentence.
        argument: The argument to blame where ``name`` describes only a part of it. Default: ``name``.
    """
    if isinstance(value, bool) or not isinstance(value, numbers.Integral) or int(value) < least:
        message = f'{name} must be a whole number of at least {least}, got {value!r}. {remedy}'
        raise ArgumentError(message, argument or name)


def check_share(name: str, value: object, remedy: str) -> None:
    """Raises an ArgumentError unless ``value`` is a number in [0, 1)."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 1:
        raise ArgumentError(f'{name} must lie in [0, 1), got {value!r}. {remedy}', name)
