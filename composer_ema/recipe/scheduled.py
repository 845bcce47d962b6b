"""One scheduler of a recipe before it is built: its arguments, and what the length of the run does to them."""

from __future__ import annotations

import dataclasses
import itertools
import math
from dataclasses import dataclass
from typing import Any

from composer.core import Time, TimeUnit, ensure_time
from torch.optim import Optimizer
from torch.optim.lr_scheduler import (
    ConstantLR,
    CosineAnnealingLR,
    LinearLR,
    LRScheduler,
    OneCycleLR,
    PolynomialLR,
    SequentialLR,
)

from composer_ema.recipe.arguments import Place
from composer_ema.recipe.named import Named
from composer_ema.recipe.stepping import Interval
from composer_ema.wording import counted
from composer_ema.zoo.dataset import Extent

#: Keys of a scheduler in a recipe that are no arguments of its class.
INNER, INTERVAL, METRIC = 'schedulers', 'interval', 'metric'
#: The argument that gives the number of steps over which a schedule changes the rate.
SPAN: dict[type, str] = {
    OneCycleLR: 'total_steps',
    CosineAnnealingLR: 'T_max',
    PolynomialLR: 'total_iters',
    LinearLR: 'total_iters',
    ConstantLR: 'total_iters',
}


@dataclass(frozen=True)
class Length:
    """The length of a run.

    Args:
        batches: Batches of the whole run, at least 1.
        batches_per_epoch: At least 1.

    Example:
        >>> Length.of('2ep', 5), Length.of('12ba', 5).steps('epoch')
        (Length(batches=10, batches_per_epoch=5), 3)
    """

    batches: int
    batches_per_epoch: int

    @classmethod
    def of(
        cls, max_duration: int | str | Time, batches_per_epoch: int | None, size: Extent | None = None
    ) -> Length | None:
        """The length of a run; None where its unit says nothing about batches.

        Args:
            max_duration: Of the run.
            batches_per_epoch: At least 1; None for a stream, which is one epoch that the run ends within.
            size: Of the batches, for a run in samples or tokens. Default: None, not known.
        """
        duration = ensure_time(max_duration, TimeUnit.EPOCH)
        if duration.unit == TimeUnit.BATCH:
            return cls(int(duration.value), batches_per_epoch or int(duration.value))
        if batches_per_epoch is None:
            return None
        if duration.unit == TimeUnit.EPOCH:
            return cls(math.ceil(duration.value * batches_per_epoch), batches_per_epoch)
        if size is None:
            return None
        samples = math.ceil(duration.value / (size.tokens if duration.unit == TimeUnit.TOKEN else 1))
        return cls(size.batches_until(samples, batches_per_epoch), batches_per_epoch)

    def steps(self, interval: Interval) -> int:
        """The number of steps that a schedule of that interval takes; an epoch that the run ends within counts."""
        return self.batches if interval == 'batch' else math.ceil(self.batches / self.batches_per_epoch)


@dataclass(frozen=True)
class Scheduled:
    """A scheduler that the recipe names and that is not built yet.

    Args:
        named: Class and arguments.
        interval: When it is stepped. An inner scheduler has the interval of the one around it.
        inner: The schedulers that a SequentialLR or a ChainedScheduler is made of.
        metric: For ReduceLROnPlateau, the evaluator and the metric that it watches: ``eval_ema/CrossEntropy``.
        filled: The arguments that come from the length of the run.
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
        """Whether it is one of torch's schedulers, which need the optimizer, and not one of Composer's."""
        return issubclass(self.factory, LRScheduler)

    @property
    def needs_length(self) -> bool:
        """Whether an argument has to come from the length of the run."""
        return self._open_span() is not None or any(each.needs_length for each in self.inner)

    def fill(self, steps: int, steps_per_epoch: int) -> Scheduled:
        """A copy with every argument that comes from the length of the run.

        Args:
            steps: Steps of the scheduler in the run.
            steps_per_epoch: Steps of the scheduler in an epoch.

        Raises:
            RecipeError: A milestone leaves no step for a schedule whose length should be the rest of the run.
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
        """Builds the scheduler; inner ones first."""
        if not self.is_torchs:
            return self.named.build()
        if self.inner:
            return self.named.build(optimizer=optimizer, schedulers=[each.build(optimizer) for each in self.inner])
        return self.named.build(optimizer)

    def check(self, steps: int) -> None:
        """Raises a RecipeError for a one-cycle schedule shorter than the run, in whose middle torch would raise."""
        for each, share in zip(self.inner, self._shares(steps), strict=True):
            each.check(share)
        if self.factory is OneCycleLR:
            given = self.named.arguments
            total = given.get('total_steps') or given['epochs'] * given['steps_per_epoch']
            if total < steps:
                raise self.place.error(
                    f'OneCycleLR ends after {counted(total, "step")} and the run has {steps}, counted by '
                    f'{self.interval}. Leave out total_steps, epochs and steps_per_epoch: '
                    'the length of the run gives them.'
                )

    def beyond(self, length: Length) -> list[str]:
        """Sentences about the parts of the schedule that the run ends too early to reach."""
        if not self.is_torchs:
            return self._warmup_beyond(length)
        return [] if self.interval == 'evaluation' else self._beyond(length.steps(self.interval))

    def as_values(self) -> dict[str, Any]:
        """The mapping that gives exactly this scheduler in a recipe."""
        return {**self._as_inner_values(), **self._when()}

    def in_words(self) -> str:
        """One line: class, arguments, interval, and which arguments come from the length of the run."""
        when = f'after each evaluation, by {self.metric}' if self.metric else f'per {self.interval}'
        return f'{self} {when}'

    def __str__(self) -> str:
        arguments = [
            f'{key}={value}' + (' (from the length of the run)' if key in self.filled else '')
            for key, value in self.named.arguments.items()
        ]
        return f'{self.name}({", ".join([*arguments, *map(str, self.inner)])})'

    def _as_inner_values(self) -> dict[str, Any]:
        inner = {INNER: [each._as_inner_values() for each in self.inner]} if self.inner else {}
        return {'name': self.named.name, **self.named.arguments, **inner}

    def _when(self) -> dict[str, Any]:
        return {METRIC: self.metric} if self.interval == 'evaluation' else {INTERVAL: self.interval}

    def _beyond(self, steps: int) -> list[str]:
        given = self.named.arguments
        late = [
            f'{key}={given[key]}'
            for key in ('milestones', 'step_size', 'T_0', 'anneal_epochs', SPAN.get(self.factory))
            if key is not None and given.get(key) is not None and _last(key, given[key]) > steps
        ]
        other = 'epoch' if self.interval == 'batch' else 'batch'
        own = (
            f'{self.name}: {", ".join(late)} goes beyond the {counted(steps, "step")} that it has in this run, counted '
            f'by {self.interval}. Should it count by {other}, write interval: {other}.'
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
        beyond = f'{self.name}: t_warmup={warmup} goes beyond the {counted(length.batches, "batch")} of the run.'
        return [beyond] if batches > length.batches else []

    def _open_span(self) -> str | None:
        """The argument that gives the length of the schedule, if the recipe leaves it out."""
        span, given = SPAN.get(self.factory), self.named.arguments
        if span is None or given.get(span) is not None or {'epochs', 'steps_per_epoch'} <= given.keys():
            return None
        return span

    def _shares(self, steps: int) -> list[int]:
        """For each inner scheduler, the number of steps for which it sets the rate."""
        if not issubclass(self.factory, SequentialLR):
            return [steps] * len(self.inner)
        bounds = [0, *self.named.arguments['milestones'], steps]
        shares = [end - start for start, end in itertools.pairwise(bounds)]
        for each, share in zip(self.inner, shares, strict=True):
            if share <= 0 and each.needs_length:
                raise (self.place / 'milestones').error(
                    f'{bounds[1:-1]} leaves no step for {each.name} in a run of {steps}, counted by {self.interval}. '
                    'Give milestones that rise and lie before the end, or give its length.'
                )
        return shares


def _last(key: str, value: Any) -> int:
    """The last step that an argument affects; a change after n steps affects step n + 1."""
    return max(value, default=0) + 1 if key == 'milestones' else value + 1 if key == 'step_size' else value
