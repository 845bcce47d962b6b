"""Reads a recipe file, applies overrides, and checks every key, name and kind of value against signatures.

Nothing here touches data, builds a model or starts a process; files of the user's are imported where the recipe names
them. A recipe that passes has only legal keys, names that
exist and values of the right kind; anything else raises one :class:`RecipeError` with the path of the key.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from composer_ema.recipe import (
    code_paths,
    groups,
    interpolation,
    names,
    parallelism,
    registry,
    schedules,
    times,
    trainer_arguments,
    trust,
)
from composer_ema.recipe.arguments import Place, RecipeError, check_arguments, check_value, signature
from composer_ema.recipe.metrics import Report
from composer_ema.recipe.named import Named, find, named
from composer_ema.recipe.overrides import override
from composer_ema.recipe.reading import check_is_finite, check_is_plain, read
from composer_ema.recipe.registry import Registry
from composer_ema.recipe.scheduled import Length, Scheduled
from composer_ema.recipe.trust import Trust
from composer_ema.trainer.weight_average import WeightAverage
from composer_ema.wording import suggestion
from composer_ema.zoo.dataset import Extent, counts_tokens, evaluation_set, extent
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
    code_paths.KEY,
    *trust.KEYS,
)
#: What Composer takes a run name from where it is given none; the first wins.
RUN_NAME_VARIABLES = ('COMPOSER_RUN_NAME', 'RUN_NAME')
# What other trainers call the keys, and keys that stand in a section.
_OF_OTHERS = {
    **dict.fromkeys(('epochs', 'max_epochs', 'num_epochs', 'train_epochs', 'max_steps', 'num_steps'), 'max_duration'),
    **dict.fromkeys(('lr', 'learning_rate'), 'optimizer.lr'),
    'weight_decay': 'optimizer.weight_decay',
    'batch_size': 'data.batch_size',
}


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
        given = (os.environ.get(name) for name in RUN_NAME_VARIABLES)
        return next((each for each in (self.values.get('run_name'), *given) if each), None)

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
    code_paths: list[str]
    imported: list[str]

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
        return self.data_argument('validation_split')

    def data_argument(self, name: str) -> Any:
        """The value of an argument of the data set, given or by default; None where it takes no such argument."""
        parameter = signature(self.data.factory).get(name)
        return None if parameter is None else self.data.arguments.get(name, parameter.default)

    @property
    def evaluation_set(self) -> str:
        """What the run evaluates on where it holds nothing out of the training set, in words."""
        return self.data.attempt(lambda arguments: evaluation_set(self.data.factory, arguments))

    def length(self, batches_per_epoch: int | None, size: Extent | None = None) -> Length | None:
        """The length of the run; None where ``max_duration`` does not give the number of batches.

        Args:
            batches_per_epoch: Of the whole training set; None for a stream, whose epoch never ends.
            size: Of its batches, for a run in samples or tokens. Default: None, not known.
        """
        subset = self.trainer.get('train_subset_num_batches', -1)
        known = [each for each in (batches_per_epoch, subset) if each is not None and each >= 0]
        return Length.of(self.trainer['max_duration'], min(known, default=None), size)

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
    read_values = read(place)
    before = copy.copy(read_values.get(code_paths.KEY))
    values, remarks = override(read_values, overrides, place)
    raw = copy.copy(values.get(code_paths.KEY))
    values = interpolation.resolved(values, place)
    check_is_plain(values, place)
    values = code_paths.anchored(values, before, raw, Path(place.source).parent)
    return Recipe(place.source, Path(place.source).stem, values, tuple(remarks))


def plan(recipe: Recipe) -> Plan:
    """Checks every key, name and kind of value of a recipe against the signatures of what it names.

    The files under ``code_paths`` are imported first.

    Args:
        recipe: The result of :func:`load`.

    Raises:
        RecipeError: The first error, with the path of the key and the legal names.
    """
    place, values = Place(recipe.source), recipe.values
    trainer_names = trainer_arguments.legal_names()
    for key in values:
        if key not in trainer_names and key not in SECTIONS:
            remedy = suggestion(key, [*SECTIONS, *sorted(trainer_names)], 'Its keys are', spellings=_OF_OTHERS)
            raise (place / key).error(f'a recipe has no such key. {remedy}')
    code, imported = code_paths.import_all(values.get(code_paths.KEY), place / code_paths.KEY)
    model, data = _model(values.get('model'), place / 'model'), _data(values.get('data'), place / 'data')
    algorithms = _section(values, 'algorithms', registry.algorithms(), place, is_cheap=True)
    evaluate = _evaluate(values, algorithms, place)
    has_tokens = counts_tokens(data.factory)
    trainer = trainer_arguments.read(values, evaluate, place, has_tokens=has_tokens)
    runs_folder = check_value(str, values.get('runs_folder', 'runs'), place / 'runs_folder')
    names.check_path(runs_folder, place / 'runs_folder')
    _check_run_name(recipe, runs_folder)
    sharding = trainer.get(parallelism.KEY)
    parallelism.check(sharding, place / parallelism.KEY, has_average=bool(averages_among(algorithms)))
    optimizer, param_groups = _optimizer(values.get('optimizer'), place / 'optimizer', trainer)
    schedulers = schedules.read(values.get('scheduler'), place / 'scheduler', trainer, evaluate)
    if optimizer is None and any(each.is_torchs for each in schedulers):
        raise schedulers[0].place.error(
            f'{schedulers[0].name} needs an optimizer. Add one, as in optimizer: {{name: adamw}}.'
        )
    callbacks = _section(values, 'callbacks', registry.callbacks(), place, is_cheap=True)
    loggers = _section(values, 'loggers', registry.loggers(), place, is_cheap=False)
    for each in (*(each.named for each in schedulers if not each.is_torchs), *algorithms, *callbacks, *loggers):
        times.check(each.factory, each.arguments, each.place, has_tokens=has_tokens)
    for each in (*algorithms, *callbacks, *loggers):
        names.check_folders(each.name, each.arguments, each.place)
    for key in ('optimizer', 'scheduler'):
        check_is_finite(values.get(key), place / key)
    return Plan(
        recipe=recipe,
        model=model,
        data=data,
        optimizer=optimizer,
        param_groups=param_groups,
        schedulers=schedulers,
        algorithms=algorithms,
        callbacks=callbacks,
        loggers=loggers,
        evaluate=evaluate,
        report=_called(Report, values.get('report'), place / 'report'),
        runs_folder=runs_folder,
        trust=trust.read(values, place),
        trainer=trainer,
        code_paths=code,
        imported=imported,
    )


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
    is_cheap = not any(checked.get(key) for key in ('weights', 'pretrained'))
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
        for argument in ('evaluate_with', 'evaluate'):
            if algorithm.arguments.get(argument) is not None:
                raise (algorithm.place / argument).error(
                    f'a recipe says at its top which weights to evaluate: evaluate: [training, {label}]. Write that '
                    'instead.'
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


def _check_run_name(recipe: Recipe, runs_folder: str) -> None:
    """Checks the name of the run, which the recipe, the environment or the name of its file gives."""
    place = Place(recipe.source)
    if recipe.values.get('run_name'):
        place /= 'run_name'
    elif recipe.run_name is not None:
        place = Place(next(name for name in RUN_NAME_VARIABLES if os.environ.get(name)))
    name = recipe.run_name or recipe.name
    names.check_run_name(name, place)
    names.check_inside(Path(runs_folder) / name, Path(runs_folder), place)
