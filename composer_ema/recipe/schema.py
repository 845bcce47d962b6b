"""Reads a recipe file, applies overrides, and checks every key, name and kind of value against signatures.

Nothing here touches data, builds a model or starts a process. A recipe that passes has only legal keys, names that
exist and values of the right kind; anything else raises one :class:`RecipeError` with the path of the key.
"""

from __future__ import annotations

import dataclasses
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

from composer_ema.recipe import groups, parallelism, registry, schedules, trust
from composer_ema.recipe.arguments import Place, RecipeError, check_arguments, check_value, said, signature
from composer_ema.recipe.command import is_override
from composer_ema.recipe.named import Named, find, named
from composer_ema.recipe.overrides import override
from composer_ema.recipe.registry import Registry
from composer_ema.recipe.scheduled import Length, Scheduled
from composer_ema.recipe.trust import Trust
from composer_ema.spans import ArgumentError
from composer_ema.trainer.weight_average import WeightAverage
from composer_ema.wording import suggestion
from composer_ema.zoo.dataset import Extent, extent
from composer_ema.zoo.models import classifier

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
    *trust.KEYS,
)
# Trainer arguments that a section of the recipe stands for.
_BUILT_FROM_SECTIONS = frozenset(
    ('model', 'train_dataloader', 'eval_dataloader', 'algorithms', 'optimizers', 'schedulers', 'callbacks', 'loggers')
)

# What other trainers call the keys, and keys that stand in a section.
_OF_OTHERS = {
    **dict.fromkeys(('epochs', 'max_epochs', 'num_epochs', 'train_epochs', 'max_steps', 'num_steps'), 'max_duration'),
    **dict.fromkeys(('lr', 'learning_rate'), 'optimizer.lr'),
    'weight_decay': 'optimizer.weight_decay',
    'batch_size': 'data.batch_size',
}


@dataclass(frozen=True)
class Report:
    """Options of the table and the picture at the end of a run.

    Args:
        target_accuracy: The report gives the first epoch that reaches this accuracy, in [0, 1]. Default: 0.9.
    """

    target_accuracy: float = 0.9

    def __post_init__(self) -> None:
        if not 0 <= self.target_accuracy <= 1:
            message = f'target_accuracy must lie in [0, 1], got {self.target_accuracy}.'
            raise ArgumentError(f'{message} For 90 % write target_accuracy: 0.9.', 'target_accuracy')


@dataclass(frozen=True)
class Recipe:
    """A recipe with overrides merged and interpolations resolved, not checked yet.

    Args:
        source: The file, as the user named it.
        name: The default name of its runs: the file's name without folder and ending.
        values: The content, plain values.
        remarks: Sentences about what overrides dropped. Default: none.
    """

    source: str
    name: str
    values: dict[str, Any]
    remarks: tuple[str, ...] = ()

    @property
    def run_name(self) -> str | None:
        """The run name from the recipe or from Composer's environment variables; None if neither gives one."""
        asked = self.values.get('run_name') or os.environ.get('COMPOSER_RUN_NAME') or os.environ.get('RUN_NAME')
        return asked or None

    def replace(self, **values: Any) -> Recipe:
        """A copy with top-level keys replaced."""
        return dataclasses.replace(self, values={**self.values, **values})


@dataclass(frozen=True)
class Plan:
    """A checked recipe: every key, name and kind of value is legal and the classes are found; nothing is built."""

    recipe: Recipe
    model: Named
    data: Named
    optimizer: Named | None
    param_groups: list[groups.Group]
    schedulers: list[Scheduled]
    algorithms: list[Named]
    callbacks: list[Named]
    loggers: list[Named]
    evaluate: list[str]
    report: Report
    runs_folder: str
    trust: Trust
    trainer: dict[str, Any]

    @property
    def place(self) -> Place:
        return Place(self.recipe.source)

    @property
    def averages(self) -> dict[str, Named]:
        """The algorithms that keep an average, by its label."""
        return averages_among(self.algorithms)

    @property
    def validation_split(self) -> float | None:
        """The share of the training set held out to evaluate on; None where the data set cannot hold any out."""
        parameter = signature(self.data.factory).get('validation_split')
        return None if parameter is None else self.data.arguments.get('validation_split', parameter.default)

    def length(self, batches_per_epoch: int) -> Length | None:
        """The length of the run; None where ``max_duration`` is neither in epochs nor in batches."""
        subset = self.trainer.get('train_subset_num_batches', -1)
        batches = batches_per_epoch if subset < 0 else min(subset, batches_per_epoch)
        return Length.of(self.trainer['max_duration'], batches)

    def extent(self) -> Extent | None:
        """The length of an epoch, without touching the data; None where the data set does not tell it.

        Raises:
            RecipeError: An argument of the data set is out of range.
        """
        return self.data.attempt(lambda arguments: extent(self.data.factory, arguments))


def averages_among(algorithms: Sequence[Named]) -> dict[str, Named]:
    """The algorithms that keep averages, by the label of each average: ``'ema'``, ``'swa'``, or as the recipe says.

    Raises:
        RecipeError: Two algorithms call an average the same.
    """
    found: dict[str, Named] = {}
    for each in algorithms:
        if _is_average(each.factory):
            for label in each.factory.labels_of(each.arguments):  # pyright: ignore[reportFunctionMemberAccess]
                if label in found:
                    raise each.place.error(
                        f'calls an average {label!r}, as {found[label].name} does. Give it another label, as in '
                        'half_life: {short: 100ba}.'
                    )
                found[label] = each
    return found


def load(path: str | os.PathLike[str], overrides: Sequence[str] = ()) -> Recipe:
    """Reads a recipe, applies overrides from left to right and resolves every ``${...}``.

    Args:
        path: The YAML file. Tags that construct Python objects are refused.
        overrides: ``key=value`` as in ``algorithms.ema.half_life=100ba``, or ``~key``, which drops a key or a section.
            In ``model``, ``data``, ``optimizer`` and ``scheduler``, another ``name`` drops the arguments of the one
            before.

    Returns:
        Recipe: Plain values; :func:`plan` checks its keys.

    Raises:
        RecipeError: No such file, no YAML, a key given twice, a malformed override, a dangling interpolation.
    """
    place = Place(os.fspath(path))
    values: Any = OmegaConf.to_container(_read(place))
    values, remarks = override(values, overrides, place)
    try:
        config = OmegaConf.create(values)
        values = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
    except (OmegaConfBaseException, ValueError) as error:
        key = getattr(error, 'full_key', None) or ''
        raise (place / key if key else place).error(said(error)) from error
    assert isinstance(values, dict)
    _check_is_plain(values, place)
    return Recipe(place.source, Path(place.source).stem, values, tuple(remarks))


def plan(recipe: Recipe) -> Plan:
    """Checks every key, name and kind of value of a recipe against the signatures of what it names.

    Args:
        recipe: The result of :func:`load`.

    Raises:
        RecipeError: The first error, with the path of the key and the legal names.
    """
    place, values = Place(recipe.source), recipe.values
    trainer_names = signature(Trainer).keys() - _BUILT_FROM_SECTIONS
    for key in values:
        if key not in trainer_names and key not in SECTIONS:
            remedy = suggestion(key, [*SECTIONS, *sorted(trainer_names)], 'Its keys are', spellings=_OF_OTHERS)
            raise (place / key).error(f'a recipe has no such key. {remedy}')
    model, data = _model(values.get('model'), place / 'model'), _data(values.get('data'), place / 'data')
    algorithms = _section(values, 'algorithms', registry.algorithms(), place, is_cheap=True)
    evaluate = _evaluate(values, algorithms, place)
    trainer = _trainer_arguments(values, trainer_names, place)
    sharding = trainer.get(parallelism.KEY)
    parallelism.check(sharding, place / parallelism.KEY, has_average=bool(averages_among(algorithms)))
    optimizer, param_groups = _optimizer(values.get('optimizer'), place / 'optimizer', trainer)
    schedulers = schedules.read(values.get('scheduler'), place / 'scheduler', trainer, evaluate)
    if optimizer is None and any(each.is_torchs for each in schedulers):
        raise schedulers[0].place.error(
            f'{schedulers[0].name} needs an optimizer. Add one, as in optimizer: {{name: adamw}}.'
        )
    callbacks = _section(values, 'callbacks', registry.callbacks(), place, is_cheap=True)
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
        loggers=_section(values, 'loggers', registry.loggers(), place, is_cheap=False),
        evaluate=evaluate,
        report=_called(Report, values.get('report'), place / 'report'),
        runs_folder=check_value(str, values.get('runs_folder', 'runs'), place / 'runs_folder'),
        trust=trust.read(values, place),
        trainer=trainer,
    )


def _read(place: Place) -> DictConfig:
    try:
        config = OmegaConf.load(place.source)
    except FileNotFoundError:
        if is_override(place.source):
            raise place.error(f'is an override without a recipe before it. Write RECIPE.yaml {place.source}.') from None
        folder = Path(place.source).parent
        others = {path.stem: str(path) for path in sorted(folder.glob('*.yaml'))}
        remedy = suggestion(Path(place.source).stem, others.values(), f'Recipes in {folder}:', spellings=others)
        raise place.error(f'there is no such file. {remedy}') from None
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
    known = registry.datasets()
    builder = find(name, place / 'name', known)
    return Named(place, known.canonical(name) or name, builder, check_arguments(builder, arguments, place))


def _model(section: Any, place: Place) -> Named:
    name, arguments = named(section, place, 'fashion_cnn')
    known = registry.models()
    builder = find(name, place / 'name', known)
    checked = check_arguments(builder, arguments, place)
    # Building it again costs seconds, and only where it has failed; pretrained weights would be fetched again.
    is_cheap = checked.get('weights') is None
    return Named(place, known.canonical(name) or name, functools.partial(classifier, builder), checked, is_cheap)


def _optimizer(section: Any, place: Place, trainer: Mapping[str, Any]) -> tuple[Named | None, list[groups.Group]]:
    if section is None:
        return None, []
    name, arguments = named(section, place, 'adamw')
    known = registry.optimizers()
    found = find(name, place / 'name', known)
    entries = arguments.pop('param_groups', None)
    checked = check_arguments(found, arguments, place, given=('params',))
    optimizer = Named(place, known.canonical(name) or name, found, checked)
    groups.check_options(optimizer)
    groups.check_can_train(optimizer, trainer)
    return optimizer, groups.read(entries, place / 'param_groups', optimizer)


def _section(values: Mapping[str, Any], key: str, known: Registry, place: Place, *, is_cheap: bool) -> list[Named]:
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
        checked = check_arguments(found, arguments, place / name)
        entries[canonical] = Named(place / name, canonical, found, checked, is_cheap)
    return list(entries.values())


def _called(owner: type, arguments: Any, place: Place) -> Any:
    return Named(place, owner.__name__, owner, check_arguments(owner, arguments, place)).build()


def _is_average(factory: Any) -> bool:
    return isinstance(factory, type) and issubclass(factory, WeightAverage)


def _evaluate(values: Mapping[str, Any], algorithms: Sequence[Named], place: Place) -> list[str]:
    """Which weights to evaluate, in order; by default the training weights and all averages of the recipe."""
    averages = averages_among(algorithms)
    for label, algorithm in averages.items():
        if algorithm.arguments.get('evaluate_with') is not None:
            raise (algorithm.place / 'evaluate_with').error(
                f'a recipe says which weights to evaluate with evaluate: [training, {label}]. Write that instead.'
            )
    chosen, place = values.get('evaluate'), place / 'evaluate'
    legal = ['training', *averages]
    if chosen is None:
        return legal
    chosen = [chosen] if isinstance(chosen, str) else chosen
    if not isinstance(chosen, list):
        raise place.error(f'must be a list of {" and ".join(legal)}, as in [training, ema], got {chosen!r}.')
    for index, each in enumerate(chosen):
        if each not in legal:
            raise _no_such_weights(each, legal, place, index)
        if each in chosen[:index]:
            raise (place / index).error(f'{each} is listed twice. Keep one.')
    return chosen


def _no_such_weights(label: Any, legal: Collection[str], place: Place, index: int) -> RecipeError:
    """The error for a label that no algorithm of the recipe has, though another algorithm may."""
    known = registry.algorithms()
    name = known.canonical(label) if isinstance(label, str) else None
    found = find(name, place / index, known) if name is not None else None
    if found is not None and _is_average(found) and found.name not in legal:
        return place.error(
            f'asks for the average and the recipe has none. Add {name}: {{}} under algorithms, or drop {label}.'
        )
    return (place / index).error(f'there are no weights called {label!r}. {suggestion(label, legal)}')


def _trainer_arguments(values: Mapping[str, Any], names: Collection[str], place: Place) -> dict[str, Any]:
    arguments = {key: value for key, value in values.items() if key in names}
    if arguments.get('max_duration') is None:
        raise (place / 'max_duration').error('is missing. Say how long to train, as in max_duration: 6ep.')
    own = {key: value for key, value in arguments.items() if key != parallelism.KEY}  # which has a check of its own
    check_arguments(Trainer, own, place, given={*_BUILT_FROM_SECTIONS, parallelism.KEY})
    parameters = signature(Trainer)
    for key, value in arguments.items():
        if Time in get_args(parameters[key].annotation) and value is not None:
            _check_time(value, place / key, least=1 if key == 'max_duration' else 0)
            if key == 'max_duration':
                _check_has_end(value, place / key)
    seed = arguments.get('seed')
    if seed is not None and not 0 <= seed < 2**31:
        raise (place / 'seed').error(f'must be a whole number from 0 to {2**31 - 1}, got {seed}.')
    return arguments


def _refuse_tokens(arguments: Mapping[str, Any], place: Place) -> None:
    """Refuses times in tokens: no data set of a recipe counts tokens, so such a time would never pass."""
    for key, value in arguments.items():
        if isinstance(value, dict):
            _refuse_tokens(value, place / key)
        if isinstance(value, str) and re.fullmatch(r'[\d.eE+-]+tok', value):
            raise (place / key).error(
                f'{value!r} counts tokens, and the data sets of a recipe report none. Write samples, batches or '
                'epochs, as in 1000sp.'
            )


def _check_has_end(max_duration: int | str, place: Place) -> None:
    """Refuses a length that a run never reaches."""
    unit = ensure_time(max_duration, TimeUnit.EPOCH).unit
    if unit in (TimeUnit.ITERATION, TimeUnit.DURATION):
        raise place.error(f'{max_duration!r} never ends a run: it has no {unit.name.lower()}s. Write 2ep or 100ba.')


def _check_time(value: int | str, place: Place, *, least: int) -> None:
    try:
        time = ensure_time(value, TimeUnit.EPOCH)
    except ValueError as error:
        raise place.error(f'{value!r} is no time. Write a number and a unit, as in 2ep, 100ba or 0.5dur.') from error
    if time.value < least:
        raise place.error(f'must be at least {least}, got {value!r}. Write a number and a unit, as in 2ep or 100ba.')
