"""Schedules of a recipe: read, checked, filled in from the length of the run, and built for the Trainer."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from composer.core import Callback, Time, Timestamp, TimeUnit, ensure_time
from torch.optim import Optimizer, swa_utils
from torch.optim.lr_scheduler import (
    ChainedScheduler,
    ConstantLR,
    CosineAnnealingLR,
    CyclicLR,
    LambdaLR,
    LinearLR,
    LRScheduler,
    MultiplicativeLR,
    OneCycleLR,
    PolynomialLR,
    ReduceLROnPlateau,
    SequentialLR,
)

from composer_ema.recipe import registry
from composer_ema.recipe.arguments import Named, Place, check_arguments, find, named, said, unknown
from composer_ema.recipe.stepping import SWALR, Interval, Product, Schedules, SchedulesCallback

_INNER, _INTERVAL, _METRIC = 'schedulers', 'interval', 'metric'
_EVERY_BATCH = 'step_schedulers_every_batch'
#: The argument that says for how many steps a schedule changes the rate.
_SPAN: dict[type, str] = {
    OneCycleLR: 'total_steps',
    CosineAnnealingLR: 'T_max',
    PolynomialLR: 'total_iters',
    LinearLR: 'total_iters',
    ConstantLR: 'total_iters',
}
#: Arguments by which torch divides.
_COUNTS = ('total_steps', 'epochs', 'steps_per_epoch', 'T_max', 'step_size', 'step_size_up', 'step_size_down')
#: Documented by torch as schedules of batches.
_OF_BATCHES = (OneCycleLR, CyclicLR)
#: Ours in place of torch's.
_OURS: dict[type, type] = {swa_utils.SWALR: SWALR}
#: A run of so many batches stands for one whose length is not known yet.
_SOME_EPOCH = 10**6


@dataclass(frozen=True)
class Length:
    """How long a run is.

    Args:
        batches: In all, at least 1.
        batches_per_epoch: At least 1.

    Example:
        >>> Length.of('2ep', 5), Length.of('12ba', 5).steps('epoch')
        (Length(batches=10, batches_per_epoch=5), 3)
    """

    batches: int
    batches_per_epoch: int

    @classmethod
    def of(cls, max_duration: int | str | Time, batches_per_epoch: int) -> Length | None:
        """The length of a run in epochs or batches; None for other units, which do not tell the number of batches."""
        duration = ensure_time(max_duration, TimeUnit.EPOCH)
        if duration.unit == TimeUnit.EPOCH:
            return cls(math.ceil(duration.value * batches_per_epoch), batches_per_epoch)
        return cls(int(duration.value), batches_per_epoch) if duration.unit == TimeUnit.BATCH else None

    def steps(self, interval: Interval) -> int:
        """How many different rates a schedule of that interval gives the run; a last part of an epoch counts."""
        return self.batches if interval == 'batch' else math.ceil(self.batches / self.batches_per_epoch)


@dataclass(frozen=True)
class Scheduled:
    """A scheduler that the recipe names, not built yet.

    Args:
        named: Class and arguments.
        interval: After what it is stepped; an inner one's is that of the scheduler around it.
        inner: The schedulers that a SequentialLR or a ChainedScheduler is made of.
        metric: Label of an evaluator and name of a metric, ``eval_ema/CrossEntropy``, for ReduceLROnPlateau alone.
        filled: Names of the arguments that the length of the run gave.
    """

    named: Named
    interval: Interval
    inner: tuple[Scheduled, ...] = ()
    metric: str | None = None
    filled: tuple[str, ...] = ()

    @property
    def place(self) -> Place:
        return self.named.place

    @property
    def arguments(self) -> dict[str, Any]:
        return self.named.arguments

    @property
    def name(self) -> str:
        return self.factory.__name__

    @property
    def factory(self) -> type:
        assert isinstance(self.named.factory, type)
        return self.named.factory

    @property
    def is_torchs(self) -> bool:
        """Whether it is a scheduler of torch, which needs the optimizer; else one of Composer's."""
        return issubclass(self.factory, LRScheduler)

    def needs_length(self) -> bool:
        """Whether an argument is left for the length of the run to fill in."""
        return self._open_span() is not None or any(each.needs_length() for each in self.inner)

    def fill(self, steps: int, steps_per_epoch: int) -> Scheduled:
        """The same with every argument that the length of the run gives.

        Args:
            steps: How many rates it gives the run.
            steps_per_epoch: How many of them an epoch has.

        Raises:
            RecipeError: A milestone leaves nothing for a schedule that is to fill the rest of the run.
        """
        span, given, arguments = self._open_span(), self.named.arguments, {}
        if span == 'total_steps' and 'epochs' in given:
            arguments = {'steps_per_epoch': steps_per_epoch}
        elif span == 'total_steps' and 'steps_per_epoch' in given:
            arguments = {'epochs': math.ceil(steps / given['steps_per_epoch'])}
        elif span is not None:
            arguments = {span: steps}
        inner = tuple(
            each.fill(share, steps_per_epoch) for each, share in zip(self.inner, self._shares(steps), strict=True)
        )
        filled = dataclasses.replace(self.named, arguments={**given, **arguments})
        return dataclasses.replace(self, named=filled, inner=inner, filled=tuple(arguments))

    def build(self, optimizer: Optimizer) -> Any:
        """The scheduler itself, inner ones first, as a program would make them."""
        if not self.is_torchs:
            return self.named.build()
        if self.inner:
            return self.named.build(optimizer=optimizer, schedulers=[each.build(optimizer) for each in self.inner])
        return self.named.build(optimizer)

    def check(self, steps: int) -> None:
        """Refuses what would stop the run in its midst: a one-cycle schedule that ends before the run does."""
        for each, share in zip(self.inner, self._shares(steps), strict=True):
            each.check(share)
        if self.factory is OneCycleLR:
            given = self.named.arguments
            total = given.get('total_steps') or given['epochs'] * given['steps_per_epoch']
            if total < steps:
                raise self.place.error(
                    f'OneCycleLR ends after {total} steps and the run has {steps}, counted by {self.interval}. '
                    'Leave out total_steps, epochs and steps_per_epoch: the length of the run gives them.'
                )

    def beyond(self, length: Length) -> list[str]:
        """In words, what of the schedule lies behind the end of the run; empty for one that fits."""
        if not self.is_torchs:
            return self._warmup_beyond(length)
        return [] if self.interval == 'evaluation' else self._beyond(length.steps(self.interval))

    def as_values(self) -> dict[str, Any]:
        """What a recipe would say to get exactly this."""
        return {**self._as_inner_values(), **self._when()}

    def in_words(self) -> str:
        """Class, arguments and interval, and which arguments the length of the run gave."""
        when = f'after each evaluation, by {self.metric}' if self.metric else f'per {self.interval}'
        return f'{self} {when}'

    def __str__(self) -> str:
        arguments = [
            f'{key}={value}' + (' (from the length of the run)' if key in self.filled else '')
            for key, value in self.named.arguments.items()
        ]
        return f'{self.name}({", ".join([*arguments, *map(str, self.inner)])})'

    def _as_inner_values(self) -> dict[str, Any]:
        inner = {_INNER: [each._as_inner_values() for each in self.inner]} if self.inner else {}
        return {'name': self.named.name, **self.named.arguments, **inner}

    def _when(self) -> dict[str, Any]:
        return {_METRIC: self.metric} if self.interval == 'evaluation' else {_INTERVAL: self.interval}

    def _beyond(self, steps: int) -> list[str]:
        given = self.named.arguments
        late = [
            f'{key}={given[key]}'
            for key in ('milestones', 'step_size', 'T_0', 'anneal_epochs', _SPAN.get(self.factory))
            if key is not None and given.get(key) is not None and _last(key, given[key]) > steps
        ]
        other = 'epoch' if self.interval == 'batch' else 'batch'
        own = (
            f'{self.name}: {", ".join(late)} goes beyond the {steps:,} steps that it has in this run, counted by '
            f'{self.interval}. Should it count by {other}, write interval: {other}.'
        )
        inner = [
            part for each, share in zip(self.inner, self._shares(steps), strict=True) for part in each._beyond(share)
        ]
        return [*([own] if late else []), *inner]

    def _warmup_beyond(self, length: Length) -> list[str]:
        warmup = self.named.arguments.get('t_warmup')
        time = None if warmup is None else ensure_time(warmup, TimeUnit.EPOCH)
        if time is None or time.unit not in (TimeUnit.EPOCH, TimeUnit.BATCH):
            return []
        batches = time.value * (length.batches_per_epoch if time.unit == TimeUnit.EPOCH else 1)
        beyond = f'{self.name}: t_warmup={warmup} goes beyond the {length.batches:,} batches of the run.'
        return [beyond] if batches > length.batches else []

    def _open_span(self) -> str | None:
        """The argument that says how long the schedule is, where it is left out."""
        span, given = _SPAN.get(self.factory), self.named.arguments
        if span is None or given.get(span) is not None or {'epochs', 'steps_per_epoch'} <= given.keys():
            return None
        return span

    def _shares(self, steps: int) -> list[int]:
        """For each inner scheduler the number of steps for which it sets the rate."""
        if not issubclass(self.factory, SequentialLR):
            return [steps] * len(self.inner)
        bounds = [0, *self.named.arguments['milestones'], steps]
        shares = [end - start for start, end in itertools.pairwise(bounds)]
        for each, share in zip(self.inner, shares, strict=True):
            if share <= 0 and each.needs_length():
                raise (self.place / 'milestones').error(
                    f'{bounds[1:-1]} leaves no step for {each.name} in a run of {steps}, counted by {self.interval}. '
                    'Give milestones that rise and lie before the end, or give its length.'
                )
        return shares


def read(section: Any, place: Place, trainer: Mapping[str, Any], evaluate: Sequence[str]) -> list[Scheduled]:
    """Checks ``scheduler``: one mapping with a name, or a list of them.

    Args:
        section: What the recipe says; None counts as none.
        place: Where.
        trainer: Arguments of the Trainer, already checked.
        evaluate: Which weights are evaluated: ``['training', 'ema']``.

    Raises:
        RecipeError: An unknown name or argument, a function where YAML has none, or times that contradict each other.
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


def fill(scheduled: Sequence[Scheduled], length: Length | None, trainer: Mapping[str, Any]) -> list[Scheduled]:
    """The schedulers of a recipe with all that the length of the run gives, checked against that length.

    Args:
        scheduled: What :func:`read` returned.
        length: None when ``max_duration`` tells no number of batches.
        trainer: Arguments of the Trainer, for messages and Composer's schedulers.

    Raises:
        RecipeError: The length is needed and not known, or a schedule does not fit it.
    """
    filled = []
    for each in scheduled:
        if length is None:
            if each.needs_length():
                raise each.place.error(
                    f'{each.name} is to be as long as the run, and max_duration={trainer["max_duration"]} does not '
                    'tell how many batches that is. Give max_duration in ep or ba, or give the length of the schedule.'
                )
            filled.append(each)
            continue
        if each.is_torchs and each.interval != 'evaluation':
            steps = length.steps(each.interval)
            each = each.fill(steps, length.batches_per_epoch if each.interval == 'batch' else 1)
            each.check(steps)
        elif not each.is_torchs:
            _check_times(each, trainer['max_duration'], length)
        filled.append(each)
    return filled


def rehearse(scheduled: Sequence[Scheduled], optimizer: Optimizer) -> None:
    """Builds the schedulers once on a stand-in, so that what they refuse is told before data is touched."""
    for each in scheduled:
        if each.is_torchs:
            if each.interval != 'evaluation':
                each = each.fill(_SOME_EPOCH * _SOME_EPOCH, _SOME_EPOCH)
            each.build(_stand_in(optimizer))
        else:
            each.build(optimizer)


def check_metrics(scheduled: Sequence[Scheduled], model: Any) -> list[Scheduled]:
    """Checks the metric that each ReduceLROnPlateau watches, and fills in its ``mode`` from what the metric says.

    Args:
        scheduled: What :func:`read` returned.
        model: A ComposerModel; its evaluation metrics are the legal names.

    Raises:
        RecipeError: The model has no such metric, or ``mode`` says that its better values are its worse ones.
    """
    return [_check_metric(each, model.get_metrics(is_train=False)) for each in scheduled]


@dataclass(frozen=True)
class ForTrainer:
    """What the Trainer gets so that every scheduler is stepped at its time.

    Args:
        schedulers: For ``Trainer(schedulers=...)``.
        every_batch: For ``Trainer(step_schedulers_every_batch=...)``; None where there is no scheduler.
        callbacks: For ``Trainer(callbacks=...)``.
        parts: Each scheduler of torch with what the recipe says of it.
    """

    schedulers: list[Any]
    every_batch: bool | None
    callbacks: list[Callback]
    parts: list[tuple[Scheduled, Any]]

    def settings(self) -> list[tuple[Place, Any]]:
        """Every argument that a scheduler of torch keeps under its own name: its place in the recipe, its value now."""
        return [setting for scheduled, built in self.parts for setting in _settings(scheduled, built)]

    def check_unchanged(self, before: Sequence[tuple[Place, Any]]) -> None:
        """Refuses a checkpoint whose schedule is another than the recipe's: loading has replaced the arguments.

        Args:
            before: What :meth:`settings` returned before the checkpoint was loaded.

        Raises:
            RecipeError: An argument has changed.
        """
        for (place, asked), (_, loaded) in zip(before, self.settings(), strict=True):
            if asked != loaded:
                raise place.error(
                    f'is {asked} in this run and {loaded} in the checkpoint, which a schedule keeps once it has begun. '
                    'Write the value of the checkpoint, or begin the schedule anew: give load_path and '
                    'load_ignore_keys: [state/schedulers] in place of autoresume.'
                )


def for_trainer(scheduled: Sequence[Scheduled], optimizer: Optimizer | None) -> ForTrainer:
    """Builds the schedulers of a recipe.

    Args:
        scheduled: What :func:`fill` returned.
        optimizer: What they change; Composer's schedulers need none.
    """
    if not scheduled:
        return ForTrainer([], None, [], [])
    intervals = {each.interval for each in scheduled}
    if not scheduled[0].is_torchs:
        product = Product([each.named.build() for each in scheduled])
        return ForTrainer([product], intervals == {'batch'}, [], [])
    assert optimizer is not None, 'the schema asks for one'
    built = [each.build(optimizer) for each in scheduled]
    parts = list(zip(scheduled, built, strict=True))
    # A checkpoint keeps one state per class name.
    if intervals in ({'batch'}, {'epoch'}) and len({type(each).__qualname__ for each in built}) == len(built):
        return ForTrainer(built, intervals == {'batch'}, [], parts)
    together = Schedules(optimizer, built, [each.interval for each in scheduled])
    callback = SchedulesCallback(together, [each.metric for each in scheduled])
    return ForTrainer([together], True, [callback], parts)


def _read_one(section: Any, place: Place, trainer: Mapping[str, Any], evaluate: Sequence[str]) -> Scheduled:
    read_in = _read_tree(section, place)
    given = {key: section.get(key) for key in (_INTERVAL, _METRIC)}
    every_batch = trainer.get(_EVERY_BATCH)
    if issubclass(read_in.factory, ReduceLROnPlateau):
        return _read_plateau(read_in, given, trainer, evaluate)
    if given[_METRIC] is not None:
        raise (place / _METRIC).error(f'{read_in.name} watches no metric; ReduceLROnPlateau does. Leave it out.')
    interval = given[_INTERVAL]
    if interval is not None and interval not in ('batch', 'epoch'):
        raise (place / _INTERVAL).error(f'must be batch or epoch, got {interval!r}.')
    if every_batch is not None:
        by_trainer = 'batch' if every_batch else 'epoch'
        if interval not in (None, by_trainer):
            raise (place / _INTERVAL).error(
                f'says {interval}, and {_EVERY_BATCH}={str(every_batch).lower()} says {by_trainer}. Keep interval.'
            )
        interval = by_trainer
    return _with_interval(read_in, interval or _default_interval(read_in))


def _read_tree(section: Any, place: Place, *, is_inner: bool = False) -> Scheduled:
    name, arguments = named(section, place, 'linear_lr')
    known = registry.schedulers()
    factory = find(name, place / 'name', known)
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
    for key in (_INTERVAL, _METRIC):
        if arguments.pop(key, None) is not None and is_inner:
            raise (place / key).error('belongs to the scheduler around this one. Write it there.')
    inner: tuple[Scheduled, ...] = ()
    if issubclass(factory, SequentialLR | ChainedScheduler):
        inner = _read_inner(arguments.pop(_INNER, None), place / _INNER)
    # The span may be left out, and the Trainer restores the position of a resumed run.
    supplied = {'optimizer', 'last_epoch', *([_INNER] if inner else [])}
    span = _SPAN.get(factory)
    if span is not None and arguments.get(span) is None:
        arguments.pop(span, None)
    probe = arguments if span is None else {span: 1, **arguments}
    check_arguments(factory, probe, place, given=supplied)
    if inner and issubclass(factory, SequentialLR):
        _check_milestones(arguments['milestones'], len(inner), place / 'milestones')
    if issubclass(factory, LRScheduler):
        _check_counts(arguments, place)
    else:
        _check_time_strings(arguments, place)
    found = Named(place, known.canonical(name) or name, factory, arguments)
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
        raise place.error(f'must be one fewer than the {num_inner} schedulers, got {len(milestones)}: {milestones}.')


def _check_counts(arguments: Mapping[str, Any], place: Place) -> None:
    for key in _COUNTS:
        if arguments.get(key) is not None and arguments[key] < 1:
            raise (place / key).error(f'must be at least 1, got {arguments[key]}.')


def _check_time_strings(arguments: Mapping[str, Any], place: Place) -> None:
    for key, value in arguments.items():
        for each in value if isinstance(value, list) else [value]:
            if isinstance(each, str) and not _is_time(each):
                raise (place / key).error(
                    f'{each!r} is no time. Write a number and a unit, as in 2ep, 100ba or 0.5dur.'
                )


def _is_time(text: str) -> bool:
    try:
        return Time.from_timestring(text).unit != TimeUnit.SECOND
    except ValueError:
        return False


def _read_plateau(
    read_in: Scheduled, given: Mapping[str, Any], trainer: Mapping[str, Any], evaluate: Sequence[str]
) -> Scheduled:
    place = read_in.place
    for key, value in ((_INTERVAL, given[_INTERVAL]), (_EVERY_BATCH, trainer.get(_EVERY_BATCH))):
        if value is not None:
            where = place / key if key == _INTERVAL else Place(place.source, key)
            raise where.error(
                'ReduceLROnPlateau is stepped after each evaluation that gives its metric, which eval_interval times. '
                'Leave it out.'
            )
    labels = [f'eval_{weights}' for weights in evaluate]
    example = f'metric: {(labels or ["eval_training"])[0]}/CrossEntropy'
    metric = given[_METRIC]
    if metric is None:
        raise place.error(f'ReduceLROnPlateau needs the metric that it watches. Write {example}.')
    if not isinstance(metric, str) or '/' not in metric:
        raise (place / _METRIC).error(f'must be an evaluator and a metric, as in {example}, got {metric!r}.')
    metric = metric.removeprefix('metrics/')
    label = metric.partition('/')[0]
    if not labels or ensure_time(trainer.get('eval_interval', 1), TimeUnit.EPOCH).value == 0:
        raise (place / _METRIC).error('is never measured: the run evaluates nothing. Set evaluate and eval_interval.')
    if label not in labels:
        raise unknown(place / _METRIC, f'the run has no evaluator {label!r}', labels)
    return dataclasses.replace(read_in, interval='evaluation', metric=metric)


def _check_metric(scheduled: Scheduled, metrics: Mapping[str, Any]) -> Scheduled:
    if scheduled.metric is None:
        return scheduled
    label, _, name = scheduled.metric.partition('/')
    if name not in metrics:
        legal = [f'{label}/{each}' for each in metrics]
        raise unknown(scheduled.place / _METRIC, f'the model has no metric {name!r}', legal)
    better = {True: 'max', False: 'min'}.get(getattr(metrics[name], 'higher_is_better', None))  # pyright: ignore[reportArgumentType]: None when the metric does not say
    mode = scheduled.named.arguments.get('mode')
    if better is None or mode == better:
        return scheduled
    if mode is not None:
        raise (scheduled.place / 'mode').error(
            f'{mode} takes the worse values of {name} for the better ones. Write {better}, or leave it out.'
        )
    filled = dataclasses.replace(scheduled.named, arguments={**scheduled.named.arguments, 'mode': better})
    return dataclasses.replace(scheduled, named=filled)


def _with_interval(scheduled: Scheduled, interval: Interval) -> Scheduled:
    inner = tuple(_with_interval(each, interval) for each in scheduled.inner)
    return dataclasses.replace(scheduled, interval=interval, inner=inner)


def _default_interval(scheduled: Scheduled) -> Interval:
    """Composer's: its own schedulers follow batches, torch's epochs; but those that torch says follow batches do."""
    follows_batches = not scheduled.is_torchs or issubclass(scheduled.factory, _OF_BATCHES)
    return 'batch' if follows_batches or any(_default_interval(i) == 'batch' for i in scheduled.inner) else 'epoch'


def _check_times(scheduled: Scheduled, max_duration: int | str, length: Length) -> None:
    """Asks one of Composer's schedulers for its first factor, as it checks its times only then."""
    state = SimpleNamespace(
        timestamp=Timestamp(),
        max_duration=ensure_time(max_duration, TimeUnit.EPOCH),
        dataloader_len=Time(length.batches_per_epoch, TimeUnit.BATCH),
    )
    try:
        scheduled.named.build()(state)
    except (ValueError, ZeroDivisionError) as error:
        raise scheduled.named.blame(error).error(said(error)) from error


def _last(key: str, value: Any) -> int:
    """The last step that an argument speaks of; a change after so many steps is seen by the next one."""
    return max(value, default=0) + 1 if key == 'milestones' else value + 1 if key == 'step_size' else value


def _settings(scheduled: Scheduled, built: Any) -> Iterator[tuple[Place, Any]]:
    for name in scheduled.named.arguments:
        if name in vars(built):
            yield scheduled.place / name, copy.copy(vars(built)[name])
    if scheduled.inner:
        for inner, each in zip(scheduled.inner, built._schedulers, strict=True):
            yield from _settings(inner, each)


def _stand_in(optimizer: Optimizer) -> Optimizer:
    """An optimizer with the same groups and options over one number each."""
    groups = [{**group, 'params': [torch.zeros(1, dtype=group['params'][0].dtype)]} for group in optimizer.param_groups]
    return type(optimizer)(groups, lr=optimizer.defaults['lr'])  # pyright: ignore[reportCallIssue]: they all have one
