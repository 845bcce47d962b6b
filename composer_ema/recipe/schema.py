"""What a recipe may say: reading the file, merging overrides, and checking every key, name and kind against signatures.

Nothing here touches data, builds a model or starts a process: a recipe that passes has only legal keys, names that
exist and values of the right kind. Whatever is wrong becomes one :class:`RecipeError` with the path of the key.
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
from composer import Trainer
from composer.core import Callback, Time, TimeUnit, ensure_time
from composer.loggers import LoggerDestination
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import ConfigDict, TypeAdapter, ValidationError
from yaml import YAMLError

from composer_ema.recipe import registry
from composer_ema.recipe.data import DATASETS
from composer_ema.recipe.models import MODELS, build_model
from composer_ema.recipe.registry import Registry, nearest

WEIGHTS = ('training', 'ema')
SECTIONS = (
    'variables',
    'model',
    'data',
    'optimizer',
    'scheduler',
    'algorithms',
    'callbacks',
    'loggers',
    'evaluate',
    'report',
    'runs_folder',
)
# Trainer arguments that a section of the recipe stands for.
_BUILT_FROM_SECTIONS = frozenset(
    ('model', 'train_dataloader', 'eval_dataloader', 'algorithms', 'optimizers', 'schedulers', 'callbacks', 'loggers')
)
# OmegaConf 2.3 raises IndexError for some keys in brackets, and cannot set an entry of a list by them.
_OVERRIDE_KEY = re.compile(r'[^\s.\[\]]+(\.[^\s.\[\]]+)*')
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
class Report:
    """What the table and the picture at the end of a run show.

    Args:
        target_accuracy: The accuracy whose first epoch is reported, in [0, 1]. Default: 0.9.
    """

    target_accuracy: float = 0.9

    def __post_init__(self) -> None:
        if not 0 <= self.target_accuracy <= 1:
            raise ValueError(
                f'target_accuracy must lie in [0, 1], got {self.target_accuracy}. For 90 % write target_accuracy: 0.9.'
            )


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
        except (ValueError, TypeError, ImportError, FileNotFoundError) as error:
            raise self.blame(error).error(_said(error)) from error

    def blame(self, error: Exception) -> Place:
        """The one argument that the message speaks of, or else the whole entry."""
        spoken_of = [name for name in self.arguments if name in str(error).replace('`', ' ').replace('=', ' ').split()]
        return self.place / spoken_of[0] if len(spoken_of) == 1 else self.place


@dataclass(frozen=True)
class Recipe:
    """A recipe as written: file, overrides and interpolations merged into plain values, not checked.

    Args:
        source: The file, as the user named it.
        name: What runs of it are called unless it says so itself: the file's name without folder and ending.
        values: The resolved content.
    """

    source: str
    name: str
    values: dict[str, Any]

    @property
    def run_name(self) -> str | None:
        """The run name that was asked for, in the recipe or in Composer's environment variables; else None."""
        asked = self.values.get('run_name') or os.environ.get('COMPOSER_RUN_NAME') or os.environ.get('RUN_NAME')
        return asked or None

    def replace(self, **values: Any) -> Recipe:
        """The same recipe with top-level keys set anew."""
        return Recipe(self.source, self.name, {**self.values, **values})


@dataclass(frozen=True)
class Plan:
    """A recipe whose every key, name and kind of value is legal; the classes are found, nothing is built."""

    recipe: Recipe
    model: Named
    data: Named
    optimizer: Named | None
    scheduler: Named | None
    algorithms: list[Named]
    callbacks: list[Named]
    loggers: list[Named]
    evaluate: list[str]
    report: Report
    runs_folder: str
    trainer: dict[str, Any]

    @property
    def place(self) -> Place:
        return Place(self.recipe.source)


def load(path: str | os.PathLike[str], overrides: Sequence[str] = ()) -> Recipe:
    """Reads a recipe, merges ``key=value`` overrides and resolves every ``${...}``.

    Args:
        path: The YAML file; loaded safely, tags that construct Python objects are refused.
        overrides: OmegaConf's dot list: ``algorithms.ema.half_life=100ba``.

    Returns:
        Recipe: Plain values; its keys are not checked yet, see :func:`plan`.

    Raises:
        RecipeError: No such file, no YAML, a key given twice, a malformed override, a dangling interpolation.
    """
    place = Place(os.fspath(path))
    config = _merge(_read(place), overrides, place)
    try:
        values = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
    except (OmegaConfBaseException, ValueError) as error:
        key = getattr(error, 'full_key', None) or ''
        raise (place / key if key else place).error(_said(error)) from error
    assert isinstance(values, dict)
    _check_is_plain(values, place)
    return Recipe(place.source, Path(place.source).stem, {str(key): value for key, value in values.items()})


def plan(recipe: Recipe) -> Plan:
    """Checks every key, name and kind of value of a recipe against the signatures of what it names.

    Args:
        recipe: What :func:`load` returned.

    Raises:
        RecipeError: The first thing that is wrong, with the path of the key and the nearest legal one.
    """
    place, values = Place(recipe.source), recipe.values
    trainer_names = _signature(Trainer).keys() - _BUILT_FROM_SECTIONS
    for key in values:
        if key not in trainer_names and key not in SECTIONS:
            raise _unknown(place / key, 'a recipe has no such key', [*SECTIONS, *trainer_names])
    algorithms = _section(values, 'algorithms', registry.algorithms(), place)
    return Plan(
        recipe=recipe,
        model=_model(values.get('model'), place / 'model'),
        data=_data(values.get('data'), place / 'data'),
        optimizer=_one(values.get('optimizer'), place / 'optimizer', registry.optimizers(), 'adamw', 'params'),
        scheduler=_one(values.get('scheduler'), place / 'scheduler', registry.schedulers(), 'linear_lr', 'optimizer'),
        algorithms=algorithms,
        callbacks=_section(values, 'callbacks', registry.callbacks(), place),
        loggers=_section(values, 'loggers', registry.loggers(), place),
        evaluate=_evaluate(values, algorithms, place),
        report=_called(Report, values.get('report'), place / 'report'),
        runs_folder=_checked_value(str, values.get('runs_folder', 'runs'), place / 'runs_folder'),
        trainer=_trainer_arguments(values, trainer_names, place),
    )


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
    parameters = {name: each for name, each in _signature(owner).items() if name not in given}
    keywords = {name: each for name, each in parameters.items() if each.kind is not each.VAR_KEYWORD}
    for key, value in arguments.items():
        if key in keywords:
            _checked_value(keywords[key].annotation, value, place / key)
        elif len(keywords) == len(parameters):
            raise _unknown(place / key, f'{_name(owner)} has no such argument', keywords)
    missing = [key for key, each in keywords.items() if each.default is each.empty and key not in arguments]
    if missing:
        raise place.error(f'{_name(owner)} needs {", ".join(missing)}. Write {missing[0]}: ... under {place.key}.')
    return dict(arguments)


def _read(place: Place) -> DictConfig:
    try:
        config = OmegaConf.load(place.source)
    except FileNotFoundError:
        folder = Path(place.source).parent
        others = sorted(path.name for path in folder.glob('*.yaml')) if folder.is_dir() else []
        near = nearest(Path(place.source).name, others)
        raise place.error('there is no such file.' + (f' The nearest is {folder / near}.' if near else '')) from None
    except (OSError, UnicodeDecodeError, RecursionError) as error:
        raise place.error(f'cannot be read as a recipe: {_said(error)}.') from error
    except YAMLError as error:
        raise place.error(f'is not legal YAML: {_said(error)}.') from error
    except OmegaConfBaseException as error:
        raise (place / (error.full_key or '')).error(_said(error)) from error
    if not isinstance(config, DictConfig):
        raise place.error('a recipe is a mapping of keys to values, and this file holds a list.')
    return config


def _merge(config: DictConfig, overrides: Sequence[str], place: Place) -> DictConfig:
    for override in overrides:
        key, equals, _ = override.partition('=')
        if not equals or not _OVERRIDE_KEY.fullmatch(key):
            raise place.error(f'the override {override!r} must have the form key=value, as in max_duration=2ep.')
        try:
            merged = OmegaConf.merge(config, OmegaConf.from_dotlist([override]))
        except YAMLError as error:
            raise (place / key).error(f'the override {override!r} is not legal YAML: {_said(error)}.') from error
        except (OmegaConfBaseException, TypeError, ValueError) as error:
            raise (place / key).error(f'the override {override!r} does not fit the recipe: {_said(error)}.') from error
        assert isinstance(merged, DictConfig)
        config = merged
    return config


def _check_is_plain(value: Any, place: Place) -> None:
    if isinstance(value, dict):
        for key, each in value.items():
            if not isinstance(key, str):
                raise (place / key).error(f'a key must be a string, got {key!r}. Write it in quotes.')
            _check_is_plain(each, place / key)
    elif isinstance(value, list):
        for index, each in enumerate(value):
            _check_is_plain(each, place / index)
    elif not isinstance(value, str | int | float | bool | None):
        raise place.error(f'a value must be a string, a number, true, false, null, a list or a mapping, got {value!r}.')


def _data(section: Any, place: Place) -> Named:
    name, arguments = _named(section, place, 'fashion_mnist')
    if name not in DATASETS:
        raise _unknown(place / 'name', f'there is no data set {name!r}', DATASETS)
    return Named(place, name, DATASETS[name], check_arguments(DATASETS[name], arguments, place))


def _model(section: Any, place: Place) -> Named:
    name, arguments = _named(section, place, 'fashion_cnn')
    if name not in MODELS:
        raise _unknown(place / 'name', f'there is no model {name!r}', MODELS)
    checked = check_arguments(MODELS[name], arguments, place)
    return Named(place, name, functools.partial(build_model, name), checked)


def _one(section: Any, place: Place, known: Registry, example: str, given: str) -> Named | None:
    if section is None:
        return None
    name, arguments = _named(section, place, example)
    found = _find(name, place / 'name', known)
    return Named(place, known.canonical(name) or name, found, check_arguments(found, arguments, place, given={given}))


def _section(values: Mapping[str, Any], key: str, known: Registry, place: Place) -> list[Named]:
    section, place = values.get(key), place / key
    if section is None:
        return []
    if not isinstance(section, dict):
        raise place.error(f'must map names to arguments, as in {next(iter(known.classes))}: {{}}, got {section!r}.')
    entries: dict[str, Named] = {}
    for name, arguments in section.items():
        found = _find(name, place / name, known)
        canonical = known.canonical(name) or name
        if canonical in entries:
            raise (place / name).error(f'names the same {known.kind} as {entries[canonical].place.key}. Keep one.')
        entries[canonical] = Named(place / name, canonical, found, check_arguments(found, arguments, place / name))
    return list(entries.values())


def _find(name: str, place: Place, known: Registry) -> type:
    if known.canonical(name) is None:
        raise _unknown(place, f'there is no {known.kind} {name!r}', known.classes)
    return known.find(name)


def _named(section: Any, place: Place, example: str) -> tuple[str, dict[str, Any]]:
    if not isinstance(section, dict) or not isinstance(section.get('name'), str):
        said = 'is missing' if section is None else f'got {section!r}'
        raise place.error(f'must be a mapping with a name, as in {{name: {example}}}; {said}.')
    return section['name'], {key: value for key, value in section.items() if key != 'name'}


def _called(owner: Callable[..., Any], arguments: Any, place: Place) -> Any:
    return Named(place, _name(owner), owner, check_arguments(owner, arguments, place)).build()


def _evaluate(values: Mapping[str, Any], algorithms: Sequence[Named], place: Place) -> list[str]:
    """Which weights to evaluate, in order; by default all that the recipe has."""
    place, has_ema = place / 'evaluate', any(each.name == 'ema' for each in algorithms)
    for algorithm in algorithms:
        if algorithm.name == 'ema' and algorithm.arguments.get('evaluate_with') is not None:
            raise (algorithm.place / 'evaluate_with').error(
                'a recipe says which weights to evaluate with evaluate: [training, ema]. Write that instead.'
            )
    chosen = values.get('evaluate')
    if chosen is None:
        return list(WEIGHTS) if has_ema else ['training']
    chosen = [chosen] if isinstance(chosen, str) else chosen
    if not isinstance(chosen, list):
        raise place.error(f'must be a list of {" and ".join(WEIGHTS)}, as in [training, ema], got {chosen!r}.')
    for index, each in enumerate(chosen):
        if each not in WEIGHTS:
            raise _unknown(place / index, f'there are no weights called {each!r}', WEIGHTS)
        if each in chosen[:index]:
            raise (place / index).error(f'{each} is listed twice. Keep one.')
    if 'ema' in chosen and not has_ema:
        raise place.error('asks for the average and the recipe has none. Add ema: {} under algorithms, or drop ema.')
    return chosen


def _trainer_arguments(values: Mapping[str, Any], names: Collection[str], place: Place) -> dict[str, Any]:
    arguments = {key: value for key, value in values.items() if key in names}
    if arguments.get('max_duration') is None:
        raise (place / 'max_duration').error('is missing. Say how long to train, as in max_duration: 6ep.')
    parameters = _signature(Trainer)
    for key, value in arguments.items():
        _checked_value(parameters[key].annotation, value, place / key)
        if Time in get_args(parameters[key].annotation) and value is not None:
            _check_time(value, place / key, least=1 if key == 'max_duration' else 0)
    seed = arguments.get('seed')
    if seed is not None and not 0 <= seed < 2**31:
        raise (place / 'seed').error(f'must be a whole number from 0 to {2**31 - 1}, got {seed}.')
    return arguments


def _check_time(value: int | str, place: Place, *, least: int) -> None:
    try:
        time = ensure_time(value, TimeUnit.EPOCH)
    except ValueError as error:
        raise place.error(f'{value!r} is no time. Write a number and a unit, as in 2ep, 100ba or 0.5dur.') from error
    if time.value < least:
        raise place.error(f'must be at least {least}, got {value!r}. Write a number and a unit, as in 2ep or 100ba.')


def _checked_value(annotation: Any, value: Any, place: Place) -> Any:
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
    if origin in (list, tuple, dict) or (isinstance(origin, type) and issubclass(origin, collections.abc.Collection)):
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
def _signature(owner: Callable[..., Any]) -> dict[str, inspect.Parameter]:
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


def _unknown(place: Place, complaint: str, legal: Collection[str]) -> RecipeError:
    name = place.key.rpartition('.')[2]
    if name in ('name',) or name.isdigit():
        name = complaint.rpartition(' ')[2].strip("'")
    near = nearest(name, legal)
    return place.error(f'{complaint}. ' + (f'The nearest legal one is {near}.' if near else 'It takes none.'))


def _name(owner: Callable[..., Any]) -> str:
    return getattr(owner, '__name__', type(owner).__name__)


def _said(error: BaseException) -> str:
    """An error's message on one line, without OmegaConf's trailer of internals."""
    lines = [line.strip() for line in str(error).splitlines()]
    kept = [line for line in lines if line and not line.startswith(('full_key:', 'object_type=', 'reference_type='))]
    return ' '.join(kept) or type(error).__name__
