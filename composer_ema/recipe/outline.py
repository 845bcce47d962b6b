"""Steps the learning rate of a recipe through the whole run, without data and without a Trainer."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator, Mapping, Sequence
from types import SimpleNamespace
from typing import Any

from composer.core import Time, Timestamp, TimeUnit, ensure_time
from composer.optim import DecoupledSGDW, compile_composer_scheduler
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from composer_ema.recipe import groups
from composer_ema.recipe.fitting import fit
from composer_ema.recipe.scheduled import Scheduled
from composer_ema.recipe.schema import Plan
from composer_ema.recipe.stepping import Schedules
from composer_ema.zoo.dataset import Extent

#: Options of parameter groups that schedules change.
MOVED = ('lr', 'momentum', 'betas')


class Outline:
    """The optimizer and the schedulers of a recipe, stepped as the Trainer would step them.

    Iterate over :meth:`steps`. Or step by hand: read ``optimizer.param_groups``, which hold what the next step of the
    optimizer would use, then call :meth:`end_batch`. Call :meth:`end_epoch` after the last batch of an epoch, and
    :meth:`end_evaluation` after an evaluation whose metrics a scheduler watches. The optimizer itself takes no step, so
    the weights of the model never change.

    Args:
        plan: The result of ``schema.plan``. Its model is built, for the names of its parameters; its data are not.
        size: The length of an epoch.

    Attributes:
        optimizer: The optimizer of the recipe, over a model of its own.
        length: The length of the run.
        scheduled: The schedulers, with every argument that comes from the length of the run.

    Raises:
        RecipeError: The errors of building the recipe, or a ``max_duration`` in a unit other than ep or ba.

    Example:
        >>> from composer_ema.recipe import schema
        >>> from composer_ema.zoo.dataset import Extent
        >>> recipe = schema.Recipe('a.yaml', 'a', {
        ...     'max_duration': '2ep', 'model': {'name': 'mnist1d_mlp'}, 'data': {'name': 'mnist1d'},
        ...     'optimizer': {'name': 'sgd', 'lr': 1.0}, 'scheduler': {'name': 'linear_lr', 'end_factor': 0.0,
        ...     'start_factor': 1.0, 'interval': 'batch'}})
        >>> [group['lr'] for (group,) in Outline(schema.plan(recipe), Extent(200, 100, drop_last=False)).steps()]
        [1.0, 0.75, 0.5, 0.25]
    """

    def __init__(self, plan: Plan, size: Extent) -> None:
        trainer = plan.trainer
        model = plan.model.build()
        self.optimizer: Optimizer = (
            groups.build_optimizer(plan.optimizer, plan.param_groups, model)
            if plan.optimizer
            else DecoupledSGDW(model.parameters(), lr=0.1)  # as Trainer(optimizers=None)
        )
        length = plan.length(size.batches, size)
        if length is None:
            raise (plan.place / 'max_duration').error(
                f'{trainer["max_duration"]!r} does not tell the number of batches. Give it in ep or ba.'
            )
        self.length = length
        self._size, self._batch_in_epoch = size, 0
        self._stepped = fit(plan.schedulers, length, trainer=trainer, model=model, optimizer=self.optimizer)
        self.scheduled: Sequence[Scheduled] = self._stepped.scheduled
        self._state = SimpleNamespace(
            optimizers=[self.optimizer],
            timestamp=Timestamp(),
            max_duration=ensure_time(trainer['max_duration'], TimeUnit.EPOCH),
            dataloader_len=Time(length.batches_per_epoch, TimeUnit.BATCH),
        )
        self._schedulers = [self._compiled(each) for each in self._stepped.schedulers]
        # Composer's clock is slow, and torch's schedulers count for themselves.
        self._reads_time = not all(isinstance(each, LRScheduler) for each in self._stepped.schedulers)

    def steps(self) -> Iterator[list[dict[str, Any]]]:
        """For each batch of the run, the learning rate and the momentum of each parameter group in its step."""
        for batch in range(self.length.batches):
            yield [{key: group[key] for key in MOVED if key in group} for group in self.optimizer.param_groups]
            self.end_batch()
            if (batch + 1) % self.length.batches_per_epoch == 0:
                self.end_epoch()

    def end_batch(self) -> None:
        """Steps the schedule as the Trainer does after a step of the optimizer."""
        if self._stepped.every_batch:
            self._step()
        # Composer steps its schedulers before it advances the clock.
        if self._reads_time:
            samples = self._size.samples_of(self._batch_in_epoch)
            self._state.timestamp = self._state.timestamp.to_next_batch(samples, samples * self._size.tokens)
        self._batch_in_epoch += 1

    def end_epoch(self) -> None:
        """Steps the schedule as the Trainer does after the last batch of an epoch, before it evaluates."""
        if self._stepped.every_batch is False:
            self._step()
        self._batch_in_epoch = 0
        if self._reads_time:
            self._state.timestamp = self._state.timestamp.to_next_epoch()
        with _unwarned():
            for each in self._together:
                each.end_epoch()

    def end_evaluation(self, metrics: Mapping[str, float]) -> None:
        """Steps each ReduceLROnPlateau whose metric, as ``eval_ema/CrossEntropy``, is among ``metrics``."""
        watched = {index: each.metric for index, each in enumerate(self.scheduled) if each.metric in metrics}
        for each in self._together:
            each.end_evaluation({index: metrics[metric] for index, metric in watched.items() if metric is not None})

    @property
    def _together(self) -> list[Schedules]:
        return [each for each in self._schedulers if isinstance(each, Schedules)]

    def _compiled(self, scheduler: Any) -> Any:
        if isinstance(scheduler, LRScheduler):
            return scheduler
        return compile_composer_scheduler(scheduler, self._state)  # pyright: ignore[reportArgumentType]: all it reads

    def _step(self) -> None:
        with _unwarned():
            for scheduler in self._schedulers:
                scheduler.step()


@contextlib.contextmanager
def _unwarned() -> Iterator[None]:
    """Suppresses torch's warning about schedulers that are stepped without a step of the optimizer."""
    with warnings.catch_warnings():
        warnings.filterwarnings('ignore', message='Detected call of `lr_scheduler.step')
        yield
