"""Times in a recipe: refused with the key where Composer would misread them, or raise in the middle of a run."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any, get_args

from composer.core import Time, TimeUnit, ensure_time

from composer_ema.recipe.arguments import Place, signature
from composer_ema.spans import ArgumentError, Span

#: What can end a run of a recipe; tokens only where the data set counts them. Composer's clock also counts iterations.
COUNTED = (TimeUnit.EPOCH, TimeUnit.BATCH, TimeUnit.SAMPLE, TimeUnit.TOKEN)
#: The longest run, in its unit: more than any takes, and small enough for every number that is derived from it.
LONGEST = 10**15
_EXAMPLES = '2ep, 100ba or 0.5dur'
#: Arguments of Composer for which zero means never, and which may be in seconds.
_NEVER = frozenset(('eval_interval', 'save_interval'))
#: Those for which it means at once.
_AT_ONCE = frozenset(('t_warmup', 'milestones', 'patience', 'drop_warmup'))


def check(owner: Callable[..., Any], arguments: Mapping[str, Any], place: Place, *, has_tokens: bool) -> None:
    """Checks every time among arguments: those whose annotation names Composer's ``Time``.

    Composer reads those of its own classes, and we say what it would not. Others read theirs themselves; of those only
    the unit is checked.

    Args:
        owner: The class that takes them.
        arguments: What the recipe gives, of the right kinds.
        place: The key of the arguments.
        has_tokens: Whether the data set counts tokens.

    Raises:
        RecipeError: No time, a negative one, parts of an epoch, a batch or a sample, zero where it is no interval, or a
            unit that no run of a recipe counts.
    """
    parameters = signature(owner)
    is_composers = owner.__module__.partition('.')[0] == 'composer'
    for key, value in arguments.items():
        if key not in parameters or not _names_time(parameters[key].annotation):
            continue
        for at, each in _leaves(value, place / key):
            if not is_composers:
                _check_unit(each, at, has_tokens=has_tokens)
            elif not isinstance(each, float):
                check_of_composer(each, at, name=key, has_tokens=has_tokens)


def check_of_composer(value: int | str, place: Place, *, name: str, has_tokens: bool) -> None:
    """Checks a time that Composer reads.

    Args:
        value: A time string, or a number in a unit of Composer's choice.
        place: Its key.
        name: The argument.
        has_tokens: Whether the data set counts tokens.

    Raises:
        RecipeError: As for :func:`check`.
    """
    time = _parsed(value, place)
    _check_counted(value, time.unit.value, place, has_tokens=has_tokens)
    if time.unit is TimeUnit.SECOND and name not in _NEVER:
        raise place.error(f'{value!r} counts seconds, which differ from run to run. Write {_EXAMPLES}.')
    if time.value < 0:
        raise place.error(f'must be at least 0, got {value!r}. Write a number and a unit, as in {_EXAMPLES}.')
    is_never = name in _NEVER and time.unit is not TimeUnit.DURATION  # by which Composer divides
    if time.value == 0 and not is_never and name not in _AT_ONCE:
        never = ' For never, write 0ep.' if name in _NEVER else ''
        raise place.error(f'must be above 0, got {value!r}. Write a number and a unit, as in {_EXAMPLES}.{never}')


def check_length(value: int | str, place: Place, *, has_tokens: bool) -> None:
    """Checks ``max_duration``: a length that a run reaches.

    Args:
        value: A time string, or a number of epochs.
        place: Its key.
        has_tokens: Whether the data set counts tokens.

    Raises:
        RecipeError: No time, below 1, or in a unit that no run of a recipe counts.
    """
    time = _parsed(value, place, examples='2ep or 100ba', fraction='20ba')
    if time.unit is TimeUnit.TOKEN:
        _check_counted(value, time.unit.value, place, has_tokens=has_tokens)
    if time.unit is TimeUnit.SECOND:
        raise place.error(f'{value!r} counts seconds, and Composer ends no run by them. Write 2ep or 100ba.')
    if time.unit not in COUNTED:
        raise place.error(f'{value!r} never ends a run: it has no {time.unit.name.lower()}s. Write 2ep or 100ba.')
    if not 1 <= time.value <= LONGEST:
        raise place.error(
            f'must be at least 1 and at most {LONGEST:,}, got {value!r}. Write a number and a unit, as in 2ep or 100ba.'
        )


def _parsed(
    value: int | str,
    place: Place,
    *,
    examples: str = _EXAMPLES,
    fraction: str = '20ba, or a share of the run, as in 0.5dur',
) -> Time[Any]:
    """A time as Composer reads it; a RecipeError where it is none."""
    try:
        time = ensure_time(value, TimeUnit.EPOCH)
    except TypeError as error:  # Composer's, for parts of a unit
        raise place.error(
            f'{value!r} is no whole number, and Composer counts whole epochs, batches and samples. '
            f'Write part of an epoch in batches, as in {fraction}.'
        ) from error
    except (ValueError, OverflowError) as error:
        raise place.error(f'{value!r} is no time. Write a number and a unit, as in {examples}.') from error
    if not math.isfinite(time.value):
        raise place.error(f'{value!r} is no time. Write a number and a unit, as in {examples}.')
    return time


def _check_unit(value: int | float | str, place: Place, *, has_tokens: bool) -> None:
    try:
        unit = Span.parse(value, name='time').unit if isinstance(value, str) else ''
    except ArgumentError:  # for whoever reads it to say
        return
    _check_counted(value, unit, place, has_tokens=has_tokens)


def _check_counted(value: int | float | str, unit: str, place: Place, *, has_tokens: bool) -> None:
    """Refuses times in what the run does not count, since such a time would never pass."""
    if unit == 'tok' and not has_tokens:
        raise place.error(
            f'{value!r} counts tokens, and the data set of this recipe reports none. Write samples, batches or epochs, '
            'as in 1000sp. A data set of your own reports them if it is registered with tokens=.'
        )
    if unit == 'iter':
        raise place.error(f'{value!r} counts iterations, and a run of a recipe has no iterations. Write 2ep or 100ba.')


def _names_time(annotation: Any) -> bool:
    return annotation is Time or any(_names_time(each) for each in get_args(annotation))


def _leaves(value: Any, place: Place) -> Iterator[tuple[Place, int | float | str]]:
    """The numbers and strings in a value, each with its key; a boolean is no time."""
    inner: Collection[tuple[Any, Any]] = ()
    if isinstance(value, dict):
        inner = value.items()
    elif isinstance(value, list):
        inner = list(enumerate(value))
    elif isinstance(value, int | float | str) and not isinstance(value, bool):
        yield place, value
    for key, each in inner:
        yield from _leaves(each, place / key)
