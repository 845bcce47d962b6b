"""Checks the arguments that a recipe gives to a class or function against its signature, with pydantic.

Each error becomes one :class:`RecipeError` that names the key, the value, the rule and the legal names.
"""

from __future__ import annotations

import functools
import inspect
import json
import math
import typing
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

from composer.core import Callback, Time
from composer.loggers import LoggerDestination
from pydantic import BaseModel, ConfigDict, Field, ValidationError, create_model

from composer_ema.recipe.kinds import CONFIG, Kind, kind_of
from composer_ema.wording import near, suggestion


class RecipeError(ValueError):
    """An error in a recipe: where it is, the value, the rule and the remedy.

    Args:
        source: The file, as the user named it.
        key: Dotted path of the key in the file; empty for the file as a whole.
        message: What is wrong and what to write instead.
    """

    def __init__(self, source: str, key: str, message: str) -> None:
        self.source, self.key, self.message = source, key, message
        super().__init__(f'{source}: {key}: {message}' if key else f'{source}: {message}')

    def __reduce__(self) -> tuple[type[RecipeError], tuple[str, str, str]]:
        return RecipeError, (self.source, self.key, self.message)


@dataclass(frozen=True)
class Place:
    """A key of a recipe file. ``place / 'lr'`` is the key ``lr`` below it; :meth:`error` reports an error there."""

    source: str
    key: str = ''

    def __truediv__(self, key: object) -> Place:
        return Place(self.source, f'{self.key}.{key}' if self.key else str(key))

    def error(self, message: str) -> RecipeError:
        return RecipeError(self.source, self.key, message)


def check_arguments(
    owner: Callable[..., Any], arguments: Any, place: Place, *, given: Collection[str] = ()
) -> dict[str, Any]:
    """Checks a mapping of arguments against the signature and the annotations of ``owner``.

    Args:
        owner: A class or function.
        arguments: What the recipe says; null counts as no arguments.
        place: The key of the mapping.
        given: Parameters that the caller supplies; the recipe may not.

    Returns:
        dict: A copy of the arguments, not converted: YAML's lists stay lists.

    Raises:
        RecipeError: Not a mapping, an unknown key, a value of the wrong kind, or a missing argument.
    """
    arguments = {} if arguments is None else arguments
    if not isinstance(arguments, dict):
        raise place.error(f'the arguments of {place.key.rpartition(".")[2]} must be a mapping, got {arguments!r}.')
    try:
        _model(owner, frozenset(given)).model_validate_json(json.dumps(arguments))
    except ValidationError as error:
        raise _first_error(error, owner, arguments, place, given) from None
    return dict(arguments)


def check_value(annotation: Any, value: Any, place: Place) -> Any:
    """Returns ``value`` unchanged, or raises a :class:`RecipeError` where it is not of the annotated kind."""
    kind = Kind.of(annotation)
    if not kind.takes(value):
        raise _wrong_kind(kind, value, place)
    return value


@functools.cache
def signature(owner: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    """Parameters by name, with resolved annotations; none for a class whose base swallows every argument."""
    if isinstance(owner, type) and owner.__init__ in (Callback.__init__, LoggerDestination.__init__):
        return {}
    hints = _hints(owner.__init__ if isinstance(owner, type) else owner)
    parameters = inspect.signature(owner).parameters.values()
    return {
        each.name: each.replace(annotation=_annotation(each, hints))
        for each in parameters
        if each.kind is not each.VAR_POSITIONAL
    }


def said(error: BaseException) -> str:
    """An error's message on one line, without the lines that OmegaConf adds about its internals."""
    lines = [line.strip() for line in str(error).splitlines()]
    kept = [line for line in lines if line and not line.startswith(('full_key:', 'object_type=', 'reference_type='))]
    return ' '.join(kept) or type(error).__name__


@functools.cache
def _model(owner: Callable[..., Any], given: frozenset[str]) -> type[BaseModel]:
    """A pydantic model whose fields are the parameters that a recipe may give."""
    parameters = {name: each for name, each in signature(owner).items() if name not in given}
    takes_any_name = any(each.kind is each.VAR_KEYWORD for each in parameters.values())
    # A name such as `copy` or `_x` is no legal name of a field, but every name is a legal alias.
    fields: dict[str, Any] = {
        f'argument_{index}': (_kinds(owner)[name].annotation, Field(_default(each), alias=name))
        for index, (name, each) in enumerate(parameters.items())
        if each.kind is not each.VAR_KEYWORD
    }
    config = ConfigDict(**{**CONFIG, 'extra': 'allow' if takes_any_name else 'forbid'})
    return create_model('Arguments', __config__=config, **fields)


def _default(parameter: inspect.Parameter) -> Any:
    return ... if parameter.default is parameter.empty else None


def _first_error(
    error: ValidationError, owner: Callable[..., Any], arguments: dict[str, Any], place: Place, given: Collection[str]
) -> RecipeError:
    """The first error in the order of the recipe; missing arguments come last."""
    errors = error.errors(include_url=False, include_context=False)
    by_key = {each['loc'][0]: each for each in reversed(errors) if each['loc']}
    keywords = {
        name: each for name, each in signature(owner).items() if name not in given and each.kind is not each.VAR_KEYWORD
    }
    for key, value in arguments.items():
        if key in by_key and key not in keywords:
            return (place / key).error(f'{_name(owner)} has no such argument. {suggestion(key, keywords, "It takes")}')
        if key in by_key:
            return _wrong_kind(_kinds(owner)[key], value, place / key)
    missing = [str(key) for key in keywords if key in by_key]
    if not missing:
        return place.error(f'{errors[0]["msg"]}.')
    return place.error(f'{_name(owner)} needs {", ".join(missing)}. Write {missing[0]}: ... under {place.key}.')


@functools.cache
def _kinds(owner: Callable[..., Any]) -> dict[str, Kind]:
    return {name: Kind.of(each.annotation) for name, each in signature(owner).items()}


def _wrong_kind(kind: Kind, value: Any, place: Place) -> RecipeError:
    if isinstance(value, dict) and (of_values := kind.of_values) is not None:
        for key, each in value.items():
            if not of_values.takes(each):
                got = f'{each!r} ({kind_of(each)}) for {key!r}'
                return place.error(f'must be {of_values} for each key, got {got}.{_suggested(of_values, each)}')
    if Time in typing.get_args(kind.annotation) and isinstance(value, int | float) and not isinstance(value, bool):
        unit = 'dur' if 0 < value < 1 else 'ba' if float(value).is_integer() else 'ep'
        words = str(kind).replace('a string', 'a time string')
        return place.error(
            f'must be {words}, got {value!r} ({kind_of(value)}). A bare number has no unit: write the unit behind it, '
            f'as in {value:g}{unit}.'
        )
    quoted = ''
    if isinstance(value, int | float) and kind.takes('x'):  # YAML reads 1, 1e3, yes and on as something else
        quoted = f' For a name or a text, write it in quotes: "{value}".'
    return place.error(f'must be {kind}, got {value!r} ({kind_of(value)}).{_suggested(kind, value)}{quoted}')


def _suggested(kind: Kind, value: Any) -> str:
    choices = [each for each in kind.choices if isinstance(each, str)]
    # The kind lists its choices.
    return f' {suggestion(value, choices)}' if isinstance(value, str) and near(value, choices) else ''


def _annotation(parameter: inspect.Parameter, hints: Mapping[str, Any]) -> Any:
    """The annotation with names resolved, or what the default tells where there is none."""
    if parameter.annotation is parameter.empty:
        return _kind_of_default(parameter.default)
    # A signature that was set by hand has resolved annotations, whatever those of the function are.
    return hints.get(parameter.name, Any) if isinstance(parameter.annotation, str) else parameter.annotation


def _hints(function: Callable[..., Any]) -> dict[str, Any]:
    try:
        return typing.get_type_hints(function)
    except (NameError, TypeError):
        # A name that is imported for type checkers only: the constructor itself must judge the values.
        return {name: Any for name in getattr(function, '__annotations__', {})}


def _kind_of_default(default: Any) -> Any:
    """The kind of an argument without annotation, as far as its default tells."""
    if isinstance(default, bool):
        return bool
    return float if isinstance(default, int | float) and math.isfinite(default) else Any


def _name(owner: Callable[..., Any]) -> str:
    return getattr(owner, '__name__', type(owner).__name__)
