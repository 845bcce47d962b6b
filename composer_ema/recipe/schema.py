"""What a recipe may say: reading the file, merging overrides, and checking every key, name and kind against signatures.

Nothing here touches data, builds a model or starts a process: a recipe that passes has only legal keys, names that
exist and values of the right kind. Whatever is wrong becomes one :class:`RecipeError` with the path of the key.
"""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from composer import Trainer
from composer.core import Time, TimeUnit, ensure_time
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from composer_ema.recipe import groups, registry, schedules
from composer_ema.recipe.arguments import (
    Named,
    Place,
    check_arguments,
    checked_value,
    find,
    named,
    said,
    signature,
    unknown,
)
from composer_ema.recipe.registry import Registry, nearest
from composer_ema.zoo.data import DATASETS, Extent, extent
from composer_ema.zoo.models import MODELS, build_model

#: The algorithms that keep an average, and what they call it.
AVERAGES = ('ema', 'swa')
WEIGHTS = ('training', *AVERAGES)
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
    param_groups: list[groups.Group]
    schedulers: list[schedules.Scheduled]
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

    def extent(self) -> Extent:
        """The size of the data set and of its batches, without touching it.

        Raises:
            RecipeError: What the data set would say about its arguments.
        """
        try:
            return extent(self.data.name, self.data.arguments)
        except ValueError as error:
            raise self.data.blame(error).error(str(error)) from error


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
        raise (place / key if key else place).error(said(error)) from error
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
    trainer_names = signature(Trainer).keys() - _BUILT_FROM_SECTIONS
    for key in values:
        if key not in trainer_names and key not in SECTIONS:
            raise unknown(place / key, 'a recipe has no such key', [*SECTIONS, *trainer_names])
    model, data = _model(values.get('model'), place / 'model'), _data(values.get('data'), place / 'data')
    algorithms = _section(values, 'algorithms', registry.algorithms(), place)
    evaluate = _evaluate(values, algorithms, place)
    trainer = _trainer_arguments(values, trainer_names, place)
    optimizer, param_groups = _optimizer(values.get('optimizer'), place / 'optimizer', trainer)
    schedulers = schedules.read(values.get('scheduler'), place / 'scheduler', trainer, evaluate)
    if optimizer is None and any(each.is_torchs for each in schedulers):
        raise schedulers[0].place.error(
            f'{schedulers[0].name} needs an optimizer. Add one, as in optimizer: {{name: adamw}}.'
        )
    callbacks = _section(values, 'callbacks', registry.callbacks(), place)
    _refuse_tokens(trainer, place)
    for each in (*algorithms, *callbacks, *schedulers):
        _refuse_tokens(each.arguments, each.place)
    return Plan(
        recipe=recipe,
        model=model,
        data=data,
        optimizer=optimizer,
        param_groups=param_groups,
        schedulers=schedulers,
        algorithms=algorithms,
        callbacks=callbacks,
        loggers=_section(values, 'loggers', registry.loggers(), place),
        evaluate=evaluate,
        report=_called(Report, values.get('report'), place / 'report'),
        runs_folder=checked_value(str, values.get('runs_folder', 'runs'), place / 'runs_folder'),
        trainer=trainer,
    )


def _read(place: Place) -> DictConfig:
    try:
        config = OmegaConf.load(place.source)
    except FileNotFoundError:
        folder = Path(place.source).parent
        others = sorted(path.name for path in folder.glob('*.yaml')) if folder.is_dir() else []
        near = nearest(Path(place.source).name, others)
        raise place.error('there is no such file.' + (f' The nearest is {folder / near}.' if near else '')) from None
    except IsADirectoryError:
        raise place.error('is a folder. Give one of its recipes, a file that ends in .yaml.') from None
    except (OSError, UnicodeDecodeError, RecursionError) as error:
        raise place.error(f'cannot be read as a recipe: {said(error)}.') from error
    except YAMLError as error:
        raise place.error(f'is not legal YAML: {said(error)}.') from error
    except OmegaConfBaseException as error:
        raise (place / (error.full_key or '')).error(said(error)) from error
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
            raise (place / key).error(f'the override {override!r} is not legal YAML: {said(error)}.') from error
        except (OmegaConfBaseException, TypeError, ValueError) as error:
            raise (place / key).error(f'the override {override!r} does not fit the recipe: {said(error)}.') from error
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
    name, arguments = named(section, place, 'fashion_mnist')
    if name not in DATASETS:
        raise unknown(place / 'name', f'there is no data set {name!r}', DATASETS)
    return Named(place, name, DATASETS[name], check_arguments(DATASETS[name], arguments, place))


def _model(section: Any, place: Place) -> Named:
    name, arguments = named(section, place, 'fashion_cnn')
    if name not in MODELS:
        raise unknown(place / 'name', f'there is no model {name!r}', MODELS)
    checked = check_arguments(MODELS[name], arguments, place)
    return Named(place, name, functools.partial(build_model, name), checked)


def _optimizer(section: Any, place: Place, trainer: Mapping[str, Any]) -> tuple[Named | None, list[groups.Group]]:
    if section is None:
        return None, []
    name, arguments = named(section, place, 'adamw')
    known = registry.optimizers()
    found = find(name, place / 'name', known)
    entries = arguments.pop('param_groups', None)
    checked = check_arguments(found, arguments, place, given=('params',))
    optimizer = Named(place, known.canonical(name) or name, found, checked)
    groups.check_can_train(optimizer, trainer)
    return optimizer, groups.read(entries, place / 'param_groups', optimizer)


def _section(values: Mapping[str, Any], key: str, known: Registry, place: Place) -> list[Named]:
    section, place = values.get(key), place / key
    if section is None:
        return []
    if not isinstance(section, dict):
        raise place.error(f'must map names to arguments, as in {next(iter(known.classes))}: {{}}, got {section!r}.')
    entries: dict[str, Named] = {}
    for name, arguments in section.items():
        found = find(name, place / name, known)
        canonical = known.canonical(name) or name
        if canonical in entries:
            raise (place / name).error(f'names the same {known.kind} as {entries[canonical].place.key}. Keep one.')
        entries[canonical] = Named(place / name, canonical, found, check_arguments(found, arguments, place / name))
    return list(entries.values())


def _called(owner: type, arguments: Any, place: Place) -> Any:
    return Named(place, owner.__name__, owner, check_arguments(owner, arguments, place)).build()


def _evaluate(values: Mapping[str, Any], algorithms: Sequence[Named], place: Place) -> list[str]:
    """Which weights to evaluate, in order; by default all that the recipe has."""
    averaging = [each for each in algorithms if each.name in AVERAGES]
    if len(averaging) > 1:
        raise averaging[1].place.error(
            f'is a second average beside {averaging[0].name}, and a run keeps one. Keep either; two runs compare them.'
        )
    place, averages = place / 'evaluate', [each.name for each in averaging]
    for algorithm in algorithms:
        if algorithm.name in AVERAGES and algorithm.arguments.get('evaluate_with') is not None:
            raise (algorithm.place / 'evaluate_with').error(
                f'a recipe says which weights to evaluate with evaluate: [training, {algorithm.name}]. '
                'Write that instead.'
            )
    chosen = values.get('evaluate')
    if chosen is None:
        return ['training', *averages]
    chosen = [chosen] if isinstance(chosen, str) else chosen
    if not isinstance(chosen, list):
        raise place.error(f'must be a list of {" and ".join(WEIGHTS[:2])}, as in [training, ema], got {chosen!r}.')
    for index, each in enumerate(chosen):
        if each not in WEIGHTS:
            raise unknown(place / index, f'there are no weights called {each!r}', WEIGHTS)
        if each in chosen[:index]:
            raise (place / index).error(f'{each} is listed twice. Keep one.')
    for average in AVERAGES:
        if average in chosen and average not in averages:
            raise place.error(
                f'asks for the average and the recipe has none. Add {average}: {{}} under algorithms, '
                f'or drop {average}.'
            )
    return chosen


def _trainer_arguments(values: Mapping[str, Any], names: Collection[str], place: Place) -> dict[str, Any]:
    arguments = {key: value for key, value in values.items() if key in names}
    if arguments.get('max_duration') is None:
        raise (place / 'max_duration').error('is missing. Say how long to train, as in max_duration: 6ep.')
    parameters = signature(Trainer)
    for key, value in arguments.items():
        checked_value(parameters[key].annotation, value, place / key)
        if Time in get_args(parameters[key].annotation) and value is not None:
            _check_time(value, place / key, least=1 if key == 'max_duration' else 0)
    seed = arguments.get('seed')
    if seed is not None and not 0 <= seed < 2**31:
        raise (place / 'seed').error(f'must be a whole number from 0 to {2**31 - 1}, got {seed}.')
    return arguments


def _refuse_tokens(arguments: Mapping[str, Any], place: Place) -> None:
    """No data set of a recipe counts tokens: an interval of them would never pass, and a run of them never end."""
    for key, value in arguments.items():
        if isinstance(value, str) and re.fullmatch(r'[\d.eE+-]+tok', value):
            raise (place / key).error(
                f'{value!r} counts tokens, and the data sets of a recipe report none. Write samples, batches or '
                'epochs, as in 1000sp.'
            )


def _check_time(value: int | str, place: Place, *, least: int) -> None:
    try:
        time = ensure_time(value, TimeUnit.EPOCH)
    except ValueError as error:
        raise place.error(f'{value!r} is no time. Write a number and a unit, as in 2ep, 100ba or 0.5dur.') from error
    if time.value < least:
        raise place.error(f'must be at least {least}, got {value!r}. Write a number and a unit, as in 2ep or 100ba.')
