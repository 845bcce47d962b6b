"""Checks what a recipe says against what it names: every key against a signature, every value against an annotation.

Whatever is wrong becomes one :class:`RecipeError` with the path of the key, the rule and the nearest legal name.
"""

from __future__ import annotations

import collections.abc
import enum
import functools
import inspect
import json
import math
import os
import re
import types
import typing
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

import torch
from composer.core import Callback
from composer.loggers import LoggerDestination
from pydantic import ConfigDict, TypeAdapter, ValidationError

from composer_ema.recipe.registry import Registry, nearest

#: What classes raise about arguments that they cannot take.
REFUSALS = (ValueError, TypeError, ImportError, FileNotFoundError)
_FOREIGN: Any = object()  # what no YAML value can be, such as a callable


class RecipeError(ValueError):
    """A recipe that cannot be followed: where, the value, the rule, the remedy.

    Args:
        source: The file, as the user named it.
        key: Dotted path of the key in it; empty for the file as a whole.
        message: What is wrong and what to write instead.
    """

    def __init__(self, source: str, key: str, message: str) -> None:
        self.source, self.key, self.message = source, key, message
        super().__init__(f'{source}: {key}: {message}' if key else f'{source}: {message}')


@dataclass(frozen=True)
class Place:
    """A key of a recipe file: knows its dotted path and turns a complaint about it into a :class:`RecipeError`."""

    source: str
    key: str = ''

    def __truediv__(self, key: object) -> Place:
        return Place(self.source, f'{self.key}.{key}' if self.key else str(key))

    def error(self, message: str) -> RecipeError:
        return RecipeError(self.source, self.key, message)


@dataclass(frozen=True)
class Named:
    """A class or function that the recipe names, with checked arguments and the place it was named at."""

    place: Place
    name: str
    factory: Callable[..., Any]
    arguments: dict[str, Any]

    def build(self, *positional: Any, **further: Any) -> Any:
        """Calls the factory; what it raises about its arguments becomes a :class:`RecipeError`."""
        try:
            return self.factory(*positional, **self.arguments, **further)
        except REFUSALS as error:
            message, blamed = said(error), self._spoken_of(error)
            if blamed is not None and repr(self.arguments[blamed]) not in message:
                message = f'{message.rstrip(".")}, got {self.arguments[blamed]!r}.'
            raise self.blame(error).error(message) from error

    def blame(self, error: Exception) -> Place:
        """The one argument that the message speaks of, or else the whole entry."""
        name = self._spoken_of(error)
        return self.place if name is None else self.place / name

    def _spoken_of(self, error: Exception) -> str | None:
        """The argument that the message names, or whose value it ends with, as in ``Invalid learning rate: -1``."""
        words = set(re.findall(r'\w+', str(error).lower()))
        end = str(error).rstrip('. ').rpartition(': ')[2]
        named = [name for name in self.arguments if name.lower() in words]
        ending = [name for name, value in self.arguments.items() if end in map(repr, _listed(value))]
        found = named or ending
        return found[0] if len(found) == 1 else None


def check_arguments(
    owner: Callable[..., Any], arguments: Any, place: Place, *, given: Collection[str] = ()
) -> dict[str, Any]:
    """Checks a mapping of arguments against the signature and the annotations of ``owner``.

    Args:
        owner: A class or function.
        arguments: What the recipe says; null counts as no arguments.
        place: Where it says so.
        given: Parameters that the caller supplies; the recipe may not.

    Returns:
        dict: The arguments, with lists where YAML has lists.

    Raises:
        RecipeError: Not a mapping, an unknown key, a value of the wrong kind, or a missing argument.
    """
    arguments = {} if arguments is None else arguments
    if not isinstance(arguments, dict):
        raise place.error(f'the arguments of {place.key.rpartition(".")[2]} must be a mapping, got {arguments!r}.')
    parameters = {name: each for name, each in signature(owner).items() if name not in given}
    keywords = {name: each for name, each in parameters.items() if each.kind is not each.VAR_KEYWORD}
    for key, value in arguments.items():
        if key in keywords:
            checked_value(keywords[key].annotation, value, place / key)
        elif len(keywords) == len(parameters):
            raise unknown(place / key, f'{_name(owner)} has no such argument', keywords)
    missing = [key for key, each in keywords.items() if each.default is each.empty and key not in arguments]
    if missing:
        raise place.error(f'{_name(owner)} needs {", ".join(missing)}. Write {missing[0]}: ... under {place.key}.')
    return dict(arguments)


def find(name: str, place: Place, known: Registry) -> type:
    """The class of that name; a RecipeError that has the nearest one when there is none."""
    if known.canonical(name) is None:
        raise unknown(place, f'there is no {known.kind} {name!r}', known.classes)
    return known.find(name)


def named(section: Any, place: Place, example: str) -> tuple[str, dict[str, Any]]:
    """The name in a mapping, and the rest of the mapping."""
    if not isinstance(section, dict) or not isinstance(section.get('name'), str):
        if section is None:
            raise place.error(f'is missing. Write a mapping with a name, as in {{name: {example}}}.')
        raise place.error(f'must be a mapping with a name, as in {{name: {example}}}; got {section!r}.')
    return section['name'], {key: value for key, value in section.items() if key != 'name'}


def checked_value(annotation: Any, value: Any, place: Place) -> Any:
    """``value`` itself, once it is known to be of the annotated kind."""
    form = _yaml_form(annotation)
    form = Any if form is _FOREIGN else form
    try:
        # JSON knows the kinds that YAML does: there a list may stand for a tuple, and a string never for a number.
        _adapter(form).validate_json(json.dumps(value), strict=True)
    except ValidationError:
        choices = [each for each in _options(form) if isinstance(each, str)]
        near = f' The nearest legal one is {nearest(value, choices)}.' if choices and isinstance(value, str) else ''
        kind = _in_words(form)
        raise place.error(f'must be {kind}, got {value!r} ({_kind_of(value)}).{near}') from None
    return value


@functools.cache
def _adapter(form: Any) -> TypeAdapter[Any]:
    return TypeAdapter(form, config=ConfigDict(ser_json_inf_nan='constants'))


def _yaml_form(annotation: Any) -> Any:
    """The part of an annotation that a YAML value can have; ``_FOREIGN`` when there is none, as for a callable."""
    origin, inner = get_origin(annotation), get_args(annotation)
    if annotation in (Any, inspect.Parameter.empty, str, int, float, bool, type(None), list, dict):
        return Any if annotation is inspect.Parameter.empty else annotation
    if annotation is None:
        return type(None)
    if origin is Literal:
        return annotation
    if origin is typing.Annotated:
        return _yaml_form(inner[0])
    if origin in (Union, types.UnionType):
        return _yaml_union(inner)
    is_collection = isinstance(origin, type) and issubclass(origin, collections.abc.Collection)
    if origin in (list, tuple, dict, collections.abc.Iterable) or is_collection:
        return _yaml_collection(origin, inner)
    if isinstance(annotation, type):
        return _yaml_class(annotation)
    return _FOREIGN


def _yaml_union(members: Sequence[Any]) -> Any:
    has_enum = any(isinstance(each, type) and issubclass(each, enum.Enum) for each in members)
    # `str | Precision` means a string that names a precision.
    forms = [_yaml_form(each) for each in members if not (has_enum and each is str)]
    forms = [form for form in forms if form is not _FOREIGN]
    return Union[tuple(forms)] if forms else _FOREIGN  # noqa: UP007 - built from a list


def _yaml_collection(origin: Any, inner: Sequence[Any]) -> Any:
    forms = [each if each is Ellipsis else _yaml_form(each) for each in inner]
    if any(form is _FOREIGN for form in forms):
        return _FOREIGN
    if origin is tuple:
        return tuple[tuple(forms)] if forms else list
    if issubclass(origin, collections.abc.Mapping):
        return dict[tuple(forms)] if forms else dict  # pyright: ignore[reportInvalidTypeArguments]
    return list[forms[0]] if forms else list  # pyright: ignore[reportInvalidTypeForm]


def _yaml_class(annotation: type) -> Any:
    if issubclass(annotation, enum.Enum):
        values = tuple(each.value for each in annotation)
        return Literal[values] if all(isinstance(value, str | int) for value in values) else _FOREIGN
    if annotation in (Path, os.PathLike, torch.dtype, torch.device):
        return str
    if issubclass(annotation, collections.abc.Mapping):
        return dict
    if annotation in (tuple, collections.abc.Sequence, collections.abc.Iterable):
        return list
    return _FOREIGN


def _options(form: Any) -> list[Any]:
    if get_origin(form) is Literal:
        return list(get_args(form))
    if get_origin(form) in (Union, types.UnionType):
        return [option for each in get_args(form) for option in _options(each)]
    return []


def _in_words(form: Any) -> str:
    words = {str: 'a string', int: 'an integer', float: 'a number', bool: 'true or false', type(None): 'null'}
    origin, inner = get_origin(form), get_args(form)
    if form in words:
        return words[form]
    if origin is Literal:
        return 'one of ' + ', '.join(str(each) for each in inner)
    if origin in (Union, types.UnionType):
        return ' or '.join(dict.fromkeys(_in_words(each) for each in inner))
    if origin is tuple and Ellipsis not in inner:
        return f'a list of {len(inner)} values, the first {_in_words(inner[0])}'
    if origin in (list, tuple) and inner[0] is not Any:
        return f'a list, each entry {_in_words(inner[0])}'
    return 'a mapping' if dict in (form, origin) else 'a list'


def _kind_of(value: Any) -> str:
    kinds = {
        str: 'a string',
        int: 'an integer',
        float: 'a number',
        bool: 'a boolean',
        dict: 'a mapping',
        list: 'a list',
    }
    return kinds.get(type(value), 'null')


@functools.cache
def signature(owner: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    """Parameters by name, annotations resolved; none for a class whose base swallows every argument."""
    if isinstance(owner, type) and owner.__init__ in (Callback.__init__, LoggerDestination.__init__):
        return {}
    hints = _hints(owner.__init__ if isinstance(owner, type) else owner)
    parameters = inspect.signature(owner).parameters.values()
    return {
        each.name: each.replace(annotation=_annotation(each, hints))
        for each in parameters
        if each.kind is not each.VAR_POSITIONAL
    }


def _annotation(parameter: inspect.Parameter, hints: Mapping[str, Any]) -> Any:
    """The annotation with names resolved, or what the default tells where there is none."""
    if parameter.annotation is parameter.empty:
        return _kind_of_default(parameter.default)
    # A signature that was set by hand has its annotations ready, whatever those of the function are.
    return hints.get(parameter.name, Any) if isinstance(parameter.annotation, str) else parameter.annotation


def _hints(function: Callable[..., Any]) -> dict[str, Any]:
    try:
        return typing.get_type_hints(function)
    except (NameError, TypeError):
        # A name that is imported for type checkers only: the constructor itself must judge the values.
        return {name: Any for name in getattr(function, '__annotations__', {})}


def _kind_of_default(default: Any) -> Any:
    """What an argument without annotation takes, as far as its default tells."""
    if isinstance(default, bool):
        return bool
    return float if isinstance(default, int | float) and math.isfinite(default) else Any


def unknown(place: Place, complaint: str, legal: Collection[str]) -> RecipeError:
    """The error about a name that is not legal, with the nearest one that is."""
    name = place.key.rpartition('.')[2]
    if name in ('name', 'metric') or name.isdigit():
        name = complaint.rpartition(' ')[2].strip("'")
    near = nearest(name, legal)
    return place.error(f'{complaint}. ' + (f'The nearest legal one is {near}.' if near else 'It takes none.'))


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _name(owner: Callable[..., Any]) -> str:
    return getattr(owner, '__name__', type(owner).__name__)


def said(error: BaseException) -> str:
    """An error's message on one line, without OmegaConf's trailer of internals."""
    lines = [line.strip() for line in str(error).splitlines()]
    kept = [line for line in lines if line and not line.startswith(('full_key:', 'object_type=', 'reference_type='))]
    return ' '.join(kept) or type(error).__name__
