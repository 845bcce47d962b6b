"""A Lightning run as averages see it: its clock, its length and what it counts."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor
from torch.utils import _pytree as pytree

from composer_ema import plain
from composer_ema.run.clock import START_OF_TRAINING, Clock, check_clock
from composer_ema.spans import Span

if TYPE_CHECKING:
    from lightning.pytorch import Trainer

_SAMPLES, _NOW, _BEFORE = 'samples', 'now', 'before'


class LightningRun:
    """A Lightning run.

    A batch is one step of ``trainer.global_step``, which counts the steps of all optimizers. So gradients that are
    accumulated over four batches make one batch here, and the two steps of a GAN make two. The clock stands still
    between steps.
    """

    remedies: ClassVar[Mapping[str, str]] = {
        'tok': 'Lightning counts none. Pass samples or batches.',
        'sp': 'the tensors of a batch have different lengths, or it holds none. Pass batches or epochs.',
        'ep': 'the dataloader has no length. Pass batches, or set limit_train_batches.',
        'iter': 'this run has none. Pass epochs or batches.',
        'dur': 'neither max_epochs nor max_steps ends it. Set one of them.',
    }

    def __init__(self) -> None:
        self._trainer: Trainer | None = None
        self._now: Clock | None = None
        self._before: Clock | None = None
        self._samples, self._replicas = 0, 1
        #: Batches that Lightning had started when the one in training was about to be, and had processed by the last.
        self._started, self._processed = 0, 0
        #: Epochs that had ended by the last.
        self._epochs = 0
        #: Samples of the batch in training, in all processes; None where its tensors do not tell.
        self._of_batch: int | None = 0

    @property
    def is_set_up(self) -> bool:
        """Whether it is that of a Trainer."""
        return self._trainer is not None

    @property
    def trainer(self) -> Trainer:
        """The Trainer that runs."""
        assert self._trainer is not None, 'setup comes first'
        return self._trainer

    # The loops of the Trainer, as far as they have come

    def set_up(self, trainer: Trainer) -> None:
        """A Trainer begins something: to train, to validate, to test or to predict."""
        self._trainer = trainer

    def begin(self) -> None:
        """Training starts, or goes on."""
        self._started, self._processed = self._batches.total.started, self._batches.total.processed
        self._replicas = (self.trainer.distributed_sampler_kwargs or {}).get('num_replicas', 1)
        if self._now is None or self._now['ba'] != self.trainer.global_step:  # no state of this moment was loaded
            epochs = self.trainer.fit_loop.epoch_progress.current
            self._samples = 0
            self._now = self._before = self._read(is_in_epoch=epochs.ready > epochs.completed)
        # A checkpoint from the validation after an epoch has that epoch on our clock, but not yet on Lightning's.
        self._epochs = max(self.trainer.current_epoch, math.floor(self._now['ep']))

    def begin_batch(self, batch: Any) -> None:
        """A batch is about to be trained on."""
        self._started = self._batches.total.started
        sizes = {leaf.shape[0] for leaf in pytree.tree_leaves(batch) if isinstance(leaf, Tensor) and leaf.ndim}
        self._of_batch = sizes.pop() * self._replicas if len(sizes) == 1 else None

    def has_ended_batch(self) -> bool:
        """Whether a batch has ended since this was last asked."""
        if self._trainer is None or not self._trainer.training:
            return False
        total = self._batches.total
        if total.processed == self._processed or total.started == self._started:  # the second where a hook left it out
            return False
        self._processed = total.processed
        self._samples += self._of_batch or 0
        return True

    def has_stepped(self) -> bool:
        """Whether an optimizer has stepped since this was last asked; if so, the clock moves on."""
        if self.trainer.global_step == self.clock()['ba']:
            return False
        self._before, self._now = self._now, self._read()
        return True

    def has_ended_epoch(self) -> bool:
        """Whether an epoch has ended since this was last asked, perhaps before its dataloader; call it at its end."""
        epochs = self.trainer.current_epoch + 1
        if epochs == self._epochs:
            return False
        self._epochs = epochs
        self._now = {**self.clock(), 'ep': epochs}
        return True

    @property
    def _batches(self) -> Any:
        return self.trainer.fit_loop.epoch_loop.batch_progress

    def _read(self, *, is_in_epoch: bool = True) -> Clock:
        trainer = self.trainer
        # Lightning keeps the count of an epoch's batches until the next one begins. An endless dataloader has no parts.
        part = self._batches.current.processed / trainer.num_training_batches if is_in_epoch else 0.0
        return {
            'iter': 0, 'ep': trainer.current_epoch + part, 'ba': trainer.global_step, 'sp': self._samples, 'tok': 0,
        }  # fmt: skip

    # What averages ask

    def clock(self) -> Clock:
        """The time trained when an optimizer stepped last."""
        return dict(START_OF_TRAINING) if self._now is None else self._now

    def clock_before(self) -> Mapping[str, float]:
        """The clock one step earlier."""
        return START_OF_TRAINING if self._before is None else self._before

    def time(self, unit: str) -> float:
        """The time trained so far in one unit."""
        return self.clock()[unit]

    @property
    def max_duration(self) -> Span | None:
        """What ends the run, ``max_steps`` or ``max_epochs``; of both, the one that is known to come first."""
        steps, epochs = self.trainer.max_steps, self.trainer.max_epochs
        if epochs is None or epochs < 0:
            return Span(steps, 'ba') if steps >= 0 else None
        per_epoch = self._steps_per_epoch
        comes_first = steps >= 0 and (per_epoch is None or steps <= epochs * per_epoch)
        return Span(steps, 'ba') if comes_first else Span(epochs, 'ep')

    def length(self, unit: str) -> float | None:
        """The length of the whole run in one unit; None if it is not known before training."""
        end = self.max_duration
        if end is None or end.unit == unit:
            return None if end is None else end.value
        per_epoch = {'ep': 1, 'ba': self._steps_per_epoch, 'sp': self._samples_per_epoch}
        in_unit, in_end = per_epoch.get(unit), per_epoch.get(end.unit)
        return None if in_unit is None or in_end is None else end.value / in_end * in_unit

    def counts(self, unit: str) -> bool:
        """Whether the run counts a unit; of samples, whether the last batch told how many it has."""
        return unit in ('ba', 'ep') or (unit == 'sp' and self._of_batch is not None)

    def counts_fractions(self, unit: str) -> bool:
        """Whether the clock counts fractions of a unit."""
        return unit != 'ep' or math.isfinite(self.trainer.num_training_batches)

    @property
    def _steps_per_epoch(self) -> int | None:
        """None where the dataloader has no length, or the module steps its optimizers itself."""
        length = self.trainer.num_training_batches
        if not math.isfinite(length) or not self.trainer.lightning_module.automatic_optimization:
            return None
        return math.ceil(length / self.trainer.accumulate_grad_batches)

    @property
    def _samples_per_epoch(self) -> int | None:
        loader, length = self.trainer.train_dataloader, self.trainer.num_training_batches
        size, dataset = getattr(loader, 'batch_size', None), getattr(loader, 'dataset', None)
        if not math.isfinite(length) or not isinstance(size, int) or dataset is None or not hasattr(dataset, '__len__'):
            return None
        return min(len(dataset), int(length) * size * self._replicas)

    # State

    def state_dict(self) -> dict[str, Any]:
        """The clock, in plain numbers."""
        return {_SAMPLES: self._samples, _NOW: self._now, _BEFORE: self._before}

    def checked(self, state: Any, what: str) -> dict[str, Any]:
        """What :meth:`state_dict` returned.

        Args:
            state: the clock that was loaded.
            what: the state that it is of, in the words of an error.

        Raises:
            TypeError, ValueError: it is something else.
        """
        state = plain.mapping(f'the clock of {what}', state)
        return {
            _SAMPLES: plain.whole(f'{_SAMPLES} of {what}', state.get(_SAMPLES, 0)),
            **{key: check_clock(state.get(key), f'{key!r} of {what}') for key in (_NOW, _BEFORE)},
        }

    def load(self, state: Mapping[str, Any]) -> None:
        """Takes over what :meth:`checked` returned."""
        self._samples, self._now, self._before = state[_SAMPLES], state[_NOW], state[_BEFORE]

    def __getstate__(self) -> dict[str, Any]:
        """For pickle and deepcopy: a copy belongs to no Trainer."""
        return {**self.__dict__, '_trainer': None}
