"""From the schedulers that a recipe names to built ones that fit the run: filled in, checked and built in one pass."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

from composer.core import Callback, Time, Timestamp, TimeUnit, ensure_time
from torch.optim import Optimizer

from composer_ema.recipe.arguments import Place
from composer_ema.recipe.scheduled import METRIC, Length, Scheduled
from composer_ema.recipe.stepping import Product, Schedules, SchedulesCallback
from composer_ema.wording import suggestion


@dataclass(frozen=True)
class Fitted:
    """The schedulers of a run, built, and what the Trainer needs to step each of them at its time.

    Args:
        scheduled: What the recipe says of each, with every argument that the length of the run gives.
        schedulers: For ``Trainer(schedulers=...)``.
        every_batch: For ``Trainer(step_schedulers_every_batch=...)``; None where there is no scheduler.
        callbacks: For ``Trainer(callbacks=...)``.
        parts: Each scheduler of torch with what the recipe says of it.
    """

    scheduled: list[Scheduled]
    schedulers: list[Any]
    every_batch: bool | None
    callbacks: list[Callback]
    parts: list[tuple[Scheduled, Any]]

    def settings(self) -> list[tuple[Place, Any]]:
        """Key in the recipe and present value of each argument that a scheduler of torch keeps under its own name."""
        return [setting for scheduled, built in self.parts for setting in _settings(scheduled, built)]

    def check_unchanged(self, before: Sequence[tuple[Place, Any]]) -> None:
        """Refuses a checkpoint whose schedule differs from the recipe's: torch keeps the arguments that it loads.

        Args:
            before: The result of :meth:`settings` before the checkpoint was loaded.

        Raises:
            RecipeError: An argument has changed.
        """
        for (place, asked), (_, loaded) in zip(before, self.settings(), strict=True):
            if asked != loaded:
                raise place.error(
                    f'is {asked} in this run and {loaded} in the checkpoint, and a schedule keeps what it began with. '
                    'Write the value of the checkpoint, or begin the schedule anew: give load_path and '
                    'load_ignore_keys: [state/schedulers] in place of autoresume.'
                )


def fit(
    scheduled: Sequence[Scheduled],
    length: Length | None,
    *,
    trainer: Mapping[str, Any],
    model: Any,
    optimizer: Optimizer | None,
) -> Fitted:
    """Fills in what the length of the run and the metrics of the model give, checks it and builds the schedulers.

    Args:
        scheduled: What :func:`composer_ema.recipe.schedules.read` returned.
        length: None when ``max_duration`` does not give the number of batches.
        trainer: Arguments of the Trainer.
        model: A ComposerModel; its evaluation metrics are what ReduceLROnPlateau can watch.
        optimizer: The schedulers of torch change it, from the moment that they are built. Composer's need none.

    Raises:
        RecipeError: The length is needed and not known, a schedule does not fit it, a scheduler refuses an argument,
            the model has no such metric, or ``mode`` takes its better values for worse ones.
    """
    metrics = model.get_metrics(is_train=False)
    return _build([_fill(_check_metric(each, metrics), length, trainer) for each in scheduled], optimizer)


def _fill(scheduled: Scheduled, length: Length | None, trainer: Mapping[str, Any]) -> Scheduled:
    if length is None:
        if scheduled.needs_length:
            raise scheduled.place.error(
                f'{scheduled.name} is to be as long as the run, and max_duration={trainer["max_duration"]} does not '
                'tell how many batches that is. Give max_duration in ep or ba, or give the length of the schedule.'
            )
        return scheduled
    if not scheduled.is_torchs:
        _check_times(scheduled, trainer['max_duration'], length)
        return scheduled
    if scheduled.interval == 'evaluation':
        return scheduled
    steps = length.steps(scheduled.interval)
    filled = scheduled.fill(steps, length.batches_per_epoch if scheduled.interval == 'batch' else 1)
    filled.check(steps)
    return filled


def _check_times(scheduled: Scheduled, max_duration: int | str, length: Length) -> None:
    """Asks one of Composer's schedulers for its first factor: it checks its times only then."""
    state = SimpleNamespace(
        timestamp=Timestamp(),
        max_duration=ensure_time(max_duration, TimeUnit.EPOCH),
        dataloader_len=Time(length.batches_per_epoch, TimeUnit.BATCH),
    )
    scheduled.named.attempt(lambda arguments: scheduled.factory(**arguments)(state))


def _check_metric(scheduled: Scheduled, metrics: Mapping[str, Any]) -> Scheduled:
    if scheduled.metric is None:
        return scheduled
    label, _, name = scheduled.metric.partition('/')
    if name not in metrics:
        remedy = suggestion(scheduled.metric, [f'{label}/{each}' for each in metrics])
        raise (scheduled.place / METRIC).error(f'the model has no metric {name!r}. {remedy}')
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


def _build(scheduled: list[Scheduled], optimizer: Optimizer | None) -> Fitted:
    if not scheduled:
        return Fitted([], [], None, [], [])
    intervals = {each.interval for each in scheduled}
    if not scheduled[0].is_torchs:
        product = Product([each.named.build() for each in scheduled])
        return Fitted(scheduled, [product], intervals == {'batch'}, [], [])
    assert optimizer is not None, 'the schema asks for one'
    built = [each.build(optimizer) for each in scheduled]
    parts = list(zip(scheduled, built, strict=True))
    # A checkpoint keeps one state per class name.
    if intervals in ({'batch'}, {'epoch'}) and len({type(each).__qualname__ for each in built}) == len(built):
        return Fitted(scheduled, built, intervals == {'batch'}, [], parts)
    together = Schedules(optimizer, built, [each.interval for each in scheduled])
    callback = SchedulesCallback(together, [each.metric for each in scheduled])
    return Fitted(scheduled, [together], True, [callback], parts)


def _settings(scheduled: Scheduled, built: Any) -> Iterator[tuple[Place, Any]]:
    for name in scheduled.named.arguments:
        if name in vars(built):
            yield scheduled.place / name, copy.copy(vars(built)[name])
    if scheduled.inner:
        for inner, each in zip(scheduled.inner, built._schedulers, strict=True):
            yield from _settings(inner, each)
