"""Reads the key ``scheduler`` of a recipe: names, arguments, intervals, and what contradicts itself."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

from composer.core import TimeUnit, ensure_time
from torch.optim import swa_utils
from torch.optim.lr_scheduler import (
    ChainedScheduler,
    CyclicLR,
    LambdaLR,
    LRScheduler,
    MultiplicativeLR,
    OneCycleLR,
    ReduceLROnPlateau,
    SequentialLR,
)

from composer_ema.recipe import registry
from composer_ema.recipe.arguments import Place, check_arguments
from composer_ema.recipe.named import Named, find, named
from composer_ema.recipe.scheduled import INNER, INTERVAL, METRIC, SPAN, Scheduled
from composer_ema.recipe.stepping import SWALR, Interval
from composer_ema.wording import counted, suggestion

_EVERY_BATCH = 'step_schedulers_every_batch'
#: Arguments by which torch divides.
_COUNTS = ('total_steps', 'epochs', 'steps_per_epoch', 'T_max', 'step_size', 'step_size_up', 'step_size_down')
#: torch documents these as stepped after every batch.
_OF_BATCHES = (OneCycleLR, CyclicLR)
#: Ours in place of torch's.
_OURS: dict[type, type] = {swa_utils.SWALR: SWALR}


def read(section: Any, place: Place, trainer: Mapping[str, Any], evaluate: Sequence[str]) -> list[Scheduled]:
    """Reads and checks the key ``scheduler``: one mapping with a name, or a list of them.

    Args:
        section: The value of the key; None means no scheduler.
        place: The key.
        trainer: Arguments of the Trainer, already checked.
        evaluate: The weights that are evaluated: ``['training', 'ema']``.

    Raises:
        RecipeError: An unknown name or argument, a scheduler that needs a function, or intervals that contradict.
    """
    if section is None or section == []:
        return []
    if not isinstance(section, list):
        return [_read_one(section, place, trainer, evaluate)]
    found = [_read_one(entry, place / index, trainer, evaluate) for index, entry in enumerate(section)]
    if len({each.is_torchs for each in found}) > 1:
        raise place.error(
            "mixes schedulers of Composer, which set the rate anew, with torch's, which change the one they find. "
            'Write all of the one kind.'
        )
    if not found[0].is_torchs and len({each.interval for each in found}) > 1:
        raise place.error("steps Composer's schedulers at different intervals, and their product needs one. Give one.")
    return found


def _read_one(section: Any, place: Place, trainer: Mapping[str, Any], evaluate: Sequence[str]) -> Scheduled:
    read_in = _read_tree(section, place)
    given = {key: section.get(key) for key in (INTERVAL, METRIC)}
    every_batch = trainer.get(_EVERY_BATCH)
    if issubclass(read_in.factory, ReduceLROnPlateau):
        return _read_plateau(read_in, given, trainer, evaluate)
    if given[METRIC] is not None:
        raise (place / METRIC).error(f'{read_in.name} watches no metric; ReduceLROnPlateau does. Leave it out.')
    interval = given[INTERVAL]
    if interval is not None and interval not in ('batch', 'epoch'):
        raise (place / INTERVAL).error(f'must be batch or epoch, got {interval!r}.')
    if every_batch is not None:
        by_trainer = 'batch' if every_batch else 'epoch'
        if interval not in (None, by_trainer):
            raise (place / INTERVAL).error(
                f'says {interval}, and {_EVERY_BATCH}={str(every_batch).lower()} says {by_trainer}. Keep interval.'
            )
        interval = by_trainer
    return _with_interval(read_in, interval or _default_interval(read_in))


def _read_tree(section: Any, place: Place, *, is_inner: bool = False) -> Scheduled:
    name, arguments = named(section, place, 'linear_lr')
    known = registry.schedulers()
    factory: type = find(name, place / 'name', known)
    factory = _OURS.get(factory, factory)
    if factory in (LambdaLR, MultiplicativeLR):
        raise (place / 'name').error(
            f'{factory.__name__} needs a function, and a recipe holds none. Put linear_lr, step_lr or others together '
            'with sequential_lr, or write the function in a program that builds the Trainer.'
        )
    if is_inner and not issubclass(factory, LRScheduler):
        raise (place / 'name').error(f"{factory.__name__} is Composer's. Only torch's schedulers go into another.")
    if is_inner and issubclass(factory, ReduceLROnPlateau):
        raise (place / 'name').error('ReduceLROnPlateau cannot go into another scheduler. List it beside.')
    for key in (INTERVAL, METRIC):
        if arguments.pop(key, None) is not None and is_inner:
            raise (place / key).error('belongs to the scheduler around this one. Write it there.')
    inner: tuple[Scheduled, ...] = ()
    if issubclass(factory, SequentialLR | ChainedScheduler):
        inner = _read_inner(arguments.pop(INNER, None), place / INNER)
    # The length may be left out, and the Trainer restores last_epoch when a run resumes.
    supplied = {'optimizer', 'last_epoch', *([INNER] if inner else [])}
    span = SPAN.get(factory)
    if span is not None and arguments.get(span) is None:
        arguments.pop(span, None)
    probe = arguments if span is None else {span: 1, **arguments}
    check_arguments(factory, probe, place, given=supplied)
    if inner and issubclass(factory, SequentialLR):
        _check_milestones(arguments['milestones'], len(inner), place / 'milestones')
    if issubclass(factory, LRScheduler):
        _check_counts(arguments, place)
    found = Named(place, known.canonical(name) or name, factory, arguments, is_cheap=True)
    return Scheduled(found, 'epoch', inner)


def _read_inner(section: Any, place: Place) -> tuple[Scheduled, ...]:
    if not isinstance(section, list) or not section:
        raise place.error(
            f'must be a list of schedulers, as in [{{name: linear_lr}}, {{name: constant_lr}}], got {section!r}.'
        )
    return tuple(_read_tree(entry, place / index, is_inner=True) for index, entry in enumerate(section))


def _check_milestones(milestones: Any, num_inner: int, place: Place) -> None:
    is_whole = all(isinstance(each, int) and not isinstance(each, bool) and each > 0 for each in milestones)
    if not is_whole or any(a >= b for a, b in itertools.pairwise(milestones)):
        raise place.error(
            f'must be whole numbers that rise, at each of which the next one takes over, got {milestones}.'
        )
    if len(milestones) != num_inner - 1:
        raise place.error(
            f'must be one fewer than the {counted(num_inner, "scheduler")}, got {len(milestones)}: {milestones}.'
        )


def _check_counts(arguments: Mapping[str, Any], place: Place) -> None:
    for key in _COUNTS:
        if arguments.get(key) is not None and arguments[key] < 1:
            raise (place / key).error(f'must be at least 1, got {arguments[key]}.')


def _read_plateau(
    read_in: Scheduled, given: Mapping[str, Any], trainer: Mapping[str, Any], evaluate: Sequence[str]
) -> Scheduled:
    place = read_in.place
    for key, value in ((INTERVAL, given[INTERVAL]), (_EVERY_BATCH, trainer.get(_EVERY_BATCH))):
        if value is not None:
            where = place / key if key == INTERVAL else Place(place.source, key)
            raise where.error(
                'ReduceLROnPlateau is stepped after each evaluation that gives its metric, which eval_interval times. '
                'Leave it out.'
            )
    labels = [f'eval_{weights}' for weights in evaluate]
    example = f'metric: {(labels or ["eval_training"])[0]}/CrossEntropy'
    metric = given[METRIC]
    if metric is None:
        raise place.error(f'ReduceLROnPlateau needs the metric that it watches. Write {example}.')
    if not isinstance(metric, str) or '/' not in metric:
        raise (place / METRIC).error(f'must be an evaluator and a metric, as in {example}, got {metric!r}.')
    metric = metric.removeprefix('metrics/')
    label = metric.partition('/')[0]
    if not labels or ensure_time(trainer.get('eval_interval', 1), TimeUnit.EPOCH).value == 0:
        raise (place / METRIC).error('is never measured: the run evaluates nothing. Set evaluate and eval_interval.')
    if label not in labels:
        remedy = suggestion(label, labels, 'Its evaluators are')
        raise (place / METRIC).error(f'the run has no evaluator {label!r}. {remedy}')
    return dataclasses.replace(read_in, interval='evaluation', metric=metric)


def _with_interval(scheduled: Scheduled, interval: Interval) -> Scheduled:
    inner = tuple(_with_interval(each, interval) for each in scheduled.inner)
    return dataclasses.replace(scheduled, interval=interval, inner=inner)


def _default_interval(scheduled: Scheduled) -> Interval:
    """Composer steps its own schedulers per batch and torch's per epoch; torch documents some for batches."""
    follows_batches = not scheduled.is_torchs or issubclass(scheduled.factory, _OF_BATCHES)
    return 'batch' if follows_batches or any(_default_interval(i) == 'batch' for i in scheduled.inner) else 'epoch'
