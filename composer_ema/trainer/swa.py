"""SWA as a Composer algorithm: an equal average from some moment on, an annealed learning rate, fresh BatchNorm."""

from __future__ import annotations

import inspect
import logging
import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

from composer import Trainer
from composer.algorithms import EMA as ComposerEMA
from composer.algorithms import SWA as ComposerSWA
from composer.core import DataSpec, Event, State, Time, get_precision_context
from composer.loggers import Logger
from torch import nn
from typing_extensions import Unpack

from composer_ema.averages import Equal
from composer_ema.batchnorm import statistics_of, update_bn
from composer_ema.model.names import listed
from composer_ema.model.sharding import unwrap
from composer_ema.settings import TrainerSettings, takes_settings
from composer_ema.shadow.shadow_model import ShadowModel
from composer_ema.spans import ArgumentError, Span
from composer_ema.trainer.annealing import Annealing, check_state, check_strategy
from composer_ema.trainer.clock import Clock, read_clock, resolve_share, run_length
from composer_ema.trainer.weight_average import WeightAverage, check_clock, warn

log = logging.getLogger(__name__)

# Schedulers step before the end of a batch or of an epoch; what comes last before the next step decides.
_SETS_LEARNING_RATES = frozenset({Event.BATCH_START, Event.BATCH_END, Event.EPOCH_END})
# Where an update may have been the last one, and evaluators, checkpoints or nothing follow.
_MAY_END = frozenset({
    Event.BATCH_END, Event.EPOCH_END, Event.ITERATION_END, Event.FIT_END,
    Event.BATCH_CHECKPOINT, Event.EPOCH_CHECKPOINT,  # an evaluation before these may have stopped the run
})  # fmt: skip
_ANNEALING, _REFRESHED_AT = 'annealing', 'refreshed_at'


@takes_settings
class SWA(WeightAverage):
    r"""Keeps an equal average of the weights from ``swa_start`` on and evaluates with it.

    Stochastic weight averaging (Izmailov et al., 2018, `arXiv:1803.05407 <https://arxiv.org/abs/1803.05407>`_). At
    ``swa_start`` and after each further ``update_interval``::

        average += (weights - average) / (n + 1)        # n: how many weights are in the average already

    Evaluation and prediction use the average as soon as there is one; training never sees it, and without ``swa_lr`` is
    bit for bit what it is without this algorithm. The model in a checkpoint holds the training weights, this
    algorithm's state the average. When training ends, before the last evaluation and checkpoint, the statistics of
    BatchNorm layers are computed anew for the averaged weights.

    Args:
        swa_start: time string (ba, ep, sp, tok, dur) at which averaging starts. Default: ``'0.75dur'``.
        swa_end: Composer's; refused with what to write in its place, since here the average never replaces the
            training weights.
        update_interval: time string between two updates. Default: ``'1ep'``.
        schedule_swa_lr: Composer's; says nothing that ``swa_lr`` does not, and is refused where it contradicts that.
        anneal_strategy: ``'linear'`` or ``'cos'``. Default: ``'linear'``, as Composer's; torch's default is ``'cos'``.
        anneal_steps: Composer's; refused with the ``anneal_length`` to write in its place.
        swa_lr: learning rate to go to from ``swa_start`` on, at least 0, along the curve of
            ``torch.optim.swa_utils.SWALR``; a list gives one for each parameter group. The run's scheduler is overruled
            from then on. Default: None, the learning rate is left alone.
        anneal_length: time string (ba, ep, sp, tok, dur) of the way to ``swa_lr``, followed batch by batch. Default:
            ``'0.05dur'``.
        refresh_batchnorm: whether the statistics are computed anew at the end, by a pass over the training data: True
            for as many batches as an epoch has, or at most so many batches, or a time string (ba, ep) of at most one
            epoch. Batches are transformed and split into microbatches as in training, see
            :func:`composer_ema.update_bn`. Default: True.
        log_interval: see :class:`~composer_ema.EMA`.
        evaluate_with: ``'swa'`` or ``'training'`` by evaluator label.
        export_weights: ``'swa'`` or ``'training'``, what Composer's ``ExportForInferenceCallback`` writes.
        settings: which tensors are averaged and how: ``buffers``, ``include``, ``exclude``, ``shadow_dtype``,
            ``shadow_device``, ``skip_nonfinite``, ``rounding``, ``seed``, and ``avg_fn`` or ``multi_avg_fn`` in place
            of the equal average; see :class:`composer_ema.settings.Settings`.

    Attributes:
        swa_model: the :class:`~composer_ema.ShadowModel`, None before the Trainer is built.
        swa_started: whether ``swa_start`` has come.
        swa_weights_active: whether the model holds the average right now.
        update_seconds: seconds of host time spent in updates and distances so far; BatchNorm's pass is not counted.

    Raises:
        TypeError, ValueError: an argument out of range, when built; a setting that cannot work in this run, when the
            Trainer is built or training starts.

    Logs ``swa/num_updates`` at every update, and ``swa/relative_distance``.

    Example:
        .. code:: python

            from composer import Trainer
            from composer_ema import SWA

            swa = SWA('0.75dur', update_interval='1ep', swa_lr=0.05)
            trainer = Trainer(model=model, train_dataloader=loader, max_duration='12ep', algorithms=[swa])
            trainer.fit()
    """

    name = 'swa'
    horizon = ('update_interval', 'swa_lr', 'avg_fn', 'multi_avg_fn')
    rivals = (WeightAverage, ComposerEMA, ComposerSWA)

    def __init__(
        self,
        swa_start: str | Time = '0.75dur',
        swa_end: str | Time | None = None,
        update_interval: str | Time = '1ep',
        schedule_swa_lr: bool | None = None,
        anneal_strategy: str = 'linear',
        anneal_steps: int | None = None,
        swa_lr: float | Sequence[float] | None = None,
        *,
        anneal_length: str | Time = '0.05dur',
        refresh_batchnorm: bool | int | str | Time = True,
        evaluate_with: Mapping[str, Literal['swa', 'training']] | None = None,
        log_interval: str | Time | None = '1ep',
        export_weights: Literal['swa', 'training'] = 'training',
        **settings: Unpack[TrainerSettings],
    ) -> None:
        interval = Span.parse(update_interval, name='update_interval', positive=True)
        _refuse_composers(swa_end, schedule_swa_lr, anneal_steps, swa_lr, interval)
        length = Span.parse(anneal_length, name='anneal_length', units=('ba', 'ep', 'sp', 'tok', 'dur'))
        self._annealing = None if swa_lr is None else Annealing(swa_lr, anneal_strategy, length)
        self._refresh = _parse_refresh(refresh_batchnorm)
        self._refreshed_at: list[int] | None = None
        super().__init__(
            {
                'anneal_strategy': check_strategy(anneal_strategy),
                'swa_lr': list(swa_lr) if isinstance(swa_lr, (list, tuple)) else swa_lr,
                'anneal_length': str(length),
                'refresh_batchnorm': str(self._refresh) if isinstance(self._refresh, Span) else self._refresh,
            },
            start=swa_start,
            update_interval=interval,
            evaluate_with=evaluate_with,
            log_interval=log_interval,
            export_weights=export_weights,
            settings=settings,
        )

    @property
    def swa_start(self) -> Span:
        """The time at which averaging starts."""
        return self._start

    @property
    def swa_started(self) -> bool:
        """Whether ``swa_start`` has come and the first weights are in the average."""
        return self._has_started

    @property
    def swa_model(self) -> ShadowModel | None:
        """The average."""
        return self._shadow

    @property
    def swa_weights_active(self) -> bool:
        """Whether the model holds the average right now."""
        return self._shadow is not None and self._shadow.is_swapped

    def get_swa_model(self, model: nn.Module) -> nn.Module:
        """Puts the average into ``model`` and returns it.

        The model in training keeps its training weights in a stash, and gets them back from
        :meth:`get_training_model` or when training goes on; any other model of the architecture is overwritten.
        """
        return self._lend_average(model)

    # Events

    def match(self, event: Event, state: State) -> bool:
        """Whether :meth:`apply` has something to do at ``event``. Looks only; changes nothing."""
        return super().match(event, state) or self._is_annealing_due(event, state) or self._is_refresh_due(event, state)

    def apply(self, event: Event, state: State, logger: Logger) -> None:
        """Does what the event asks for; see :meth:`match`."""
        if super().match(event, state):
            super().apply(event, state, logger)
        if self._is_annealing_due(event, state):
            self._anneal(state)
        if self._is_refresh_due(event, state):
            self._refresh_batchnorm(state)

    def _create(self, state: State) -> None:
        self._refreshed_at = None
        if self._annealing is not None:
            self._annealing.load_state_dict(None)
        super()._create(state)

    def _weight(self, now: Clock, state: State) -> float:
        del now, state
        return Equal().weight_at(self._require_shadow().num_updates)

    def _describe(self) -> str:
        return f'swa_start={self.swa_start}, update_interval={self.update_interval}'

    def _times(self) -> dict[str, Span | None]:
        anneal_length = None if self._annealing is None else self._annealing.length
        return {**super()._times(), 'anneal_length': anneal_length}

    def _check_run(self, state: State) -> None:
        super()._check_run(state)
        if self._annealing is None:
            self._warn_of_annealing_to_nothing()
        else:
            self._annealing.check(state.optimizers)
            self._warn_if_not_reached(state, self._annealing.length)
        self._warn_of_a_single_update(state)
        if self._refresh is not False and (statistics := statistics_of(unwrap(state.model))):
            self._check_refresh(statistics, state)

    def _warn_of_annealing_to_nothing(self) -> None:
        for name in ('anneal_strategy', 'anneal_length'):
            if self._arguments[name] != inspect.signature(SWA).parameters[name].default:
                warn(
                    f'{name}={self._arguments[name]!r} has no effect without swa_lr: the learning rate is left alone. '
                    f'Pass swa_lr, or leave {name} out.'
                )

    def _warn_if_not_reached(self, state: State, length: Span) -> None:
        span, start = resolve_share(length, state, 'anneal_length'), resolve_share(self._start, state, 'swa_start')
        whole, until_start = run_length(span.unit, state), run_length(start.unit, state)
        if whole is None or until_start is None or not until_start:
            return
        left = whole * max(0.0, 1 - start.value / until_start)
        if span.value > left * (1 + 1e-9):
            warn(
                f"anneal_length='{length}' is longer than what is left of the run after swa_start='{self._start}': "
                'swa_lr is not reached. Pass a shorter anneal_length, or start earlier.'
            )

    def _warn_of_a_single_update(self, state: State) -> None:
        interval = resolve_share(self.update_interval, state, 'update_interval')
        start = resolve_share(self._start, state, 'swa_start')
        whole, until_start = run_length(interval.unit, state), run_length(start.unit, state)
        if whole is None or not until_start or start.value > until_start or interval.value > whole:
            return  # longer than the run, which is warned of already
        first = start.value / until_start * whole
        if self._update_event is not Event.BATCH_END:
            first = max(1, math.ceil(first - 1e-9))
        if math.floor(whole / interval.value + 1e-9) <= math.floor(first / interval.value + 1e-9) and first > 0:
            warn(
                f"swa_start='{self._start}' with update_interval='{self.update_interval}' takes a single moment of "
                'this run into the average, which is then the training weights of that moment. Start earlier, or pass '
                "a shorter update_interval, for example update_interval='100ba'."
            )

    # Learning rate

    def _is_annealing_due(self, event: Event, state: State) -> bool:
        if self._annealing is None or event not in _SETS_LEARNING_RATES:
            return False
        # It starts from what the scheduler has set for a batch, so at the start of one.
        return self._annealing.since is not None or (event is Event.BATCH_START and self._has_start_come(state))

    def _anneal(self, state: State) -> None:
        annealing = self._annealing
        assert annealing is not None
        clock = read_clock(state)
        if annealing.since is None:
            annealing.start(clock, state.optimizers)
        annealing.apply(clock, resolve_share(annealing.length, state, 'anneal_length'), state.optimizers)

    # BatchNorm

    def _check_refresh(self, statistics: Iterable[str], state: State) -> None:
        tracked = {name for name, _ in self._require_shadow().named_buffers()}
        untracked = [name for name in statistics if name not in tracked]
        if untracked:
            raise ArgumentError(
                f'refresh_batchnorm={self._arguments["refresh_batchnorm"]} needs statistics that include and exclude '
                f'leave out: {listed(untracked)}. Let them pass, or set refresh_batchnorm=False.',
                'refresh_batchnorm',
            )
        # Both raise where they cannot tell.
        self._batches_to_refresh(state)
        _training_data(state)

    def _batches_to_refresh(self, state: State) -> int:
        refresh, epoch = self._refresh, state.dataloader_len
        if isinstance(refresh, int) and not isinstance(refresh, bool):
            return refresh if epoch is None else min(refresh, epoch.value)
        if epoch is None:
            raise ArgumentError(
                f'refresh_batchnorm={self._arguments["refresh_batchnorm"]!r} is a share of an epoch, but the '
                "dataloader has no length. Pass a number of batches, such as refresh_batchnorm='100ba'.",
                'refresh_batchnorm',
            )
        share = refresh.value if isinstance(refresh, Span) else 1.0
        return max(1, math.ceil(share * epoch.value - 1e-9))

    def _is_refresh_due(self, event: Event, state: State) -> bool:
        if self._refresh is False or event not in _MAY_END or not self._has_average:
            return False
        if self._refreshed_at == self._moment(state):
            return False
        has_ended = state.max_duration is not None and state.timestamp >= state.max_duration
        return has_ended or event is Event.FIT_END

    def _moment(self, state: State) -> list[int]:
        """Tells two computed statistics apart: by the average, and by the order of the data."""
        return [self._require_shadow().num_updates, state.timestamp.batch.value]

    def _refresh_batchnorm(self, state: State) -> None:
        self._refreshed_at = self._moment(state)
        if not statistics_of(unwrap(state.model)):
            log.info('refresh_batchnorm: the model has no BatchNorm layer with statistics, so none are computed')
            return
        batches = self._batches_to_refresh(state)
        log.info('computing the BatchNorm statistics of the averaged weights over %d batches', batches)
        with get_precision_context(state.precision, state.precision_config, fp8_autocast_enabled=False):
            update_bn(
                state.model,
                _training_data(state),
                shadow=self._shadow,
                num_batches=batches,
                microbatch_size=state.device_train_microbatch_size,
                progress_bar=False,
            )

    # State

    def state_dict(self) -> dict[str, Any]:
        """As for EMA, and how far the learning rate has been annealed and BatchNorm refreshed."""
        state = super().state_dict()
        state[_ANNEALING] = None if self._annealing is None else self._annealing.state_dict()
        state[_REFRESHED_AT] = self._refreshed_at
        return state

    def load_state_dict(self, state: Mapping[str, Any], strict: bool = False) -> None:
        """Loads this class's state, or that of Composer's SWA; checks all of it first.

        Raises:
            ValueError: names, shapes, or a version that do not fit, all listed. Nothing is changed then.
        """
        annealing, refreshed_at = _check_own(state)
        super().load_state_dict(state, strict)
        if self._shadow is None:  # loaded when the Trainer is built
            return
        self._refreshed_at = refreshed_at
        if self._annealing is not None:
            self._annealing.load_state_dict(annealing)


def _refuse_composers(
    swa_end: Any, schedule_swa_lr: bool | None, anneal_steps: int | None, swa_lr: Any, interval: Span
) -> None:
    """Raises where an argument of Composer's SWA means something that this one does not do, and says what to write."""
    if swa_end is not None:
        raise ValueError(
            f"swa_end='{swa_end}' is where Composer's SWA replaces the training weights by the average; this one never "
            'does, and evaluates with the average from swa_start on. Leave swa_end out; load_average(checkpoint) and '
            'get_swa_model(model) give the averaged weights.'
        )
    if schedule_swa_lr and swa_lr is None:
        raise ValueError(
            "schedule_swa_lr=True does not say where the learning rate goes: Composer's SWA takes the one that the "
            'scheduler has at that moment. Pass a number as swa_lr, and leave schedule_swa_lr out.'
        )
    if schedule_swa_lr is False and swa_lr is not None:
        raise ValueError(
            f'swa_lr={swa_lr} anneals the learning rate and schedule_swa_lr=False does not. '
            'Leave schedule_swa_lr out to anneal, or swa_lr to leave the learning rate alone.'
        )
    if anneal_steps is not None:
        length = f'{anneal_steps * interval.value:g}{interval.unit}' if isinstance(anneal_steps, int) else '10ep'
        raise ValueError(
            f'anneal_steps={anneal_steps} counts updates; here the way to swa_lr has a length of its own. Write '
            f"anneal_length='{length}' in its place, or leave it out where there is no swa_lr."
        )


def _parse_refresh(refresh: bool | int | str | Time) -> bool | int | Span:
    """True, False, a number of batches, or a share of an epoch."""
    if isinstance(refresh, bool):
        return refresh
    if isinstance(refresh, int):
        if refresh < 1:
            raise ValueError(f'refresh_batchnorm must be at least 1 batch, got {refresh}. Pass False for none.')
        return refresh
    span = Span.parse(refresh, name='refresh_batchnorm', units=('ba', 'ep'), positive=True)
    if span.unit == 'ba':
        return int(span.value)
    if span.value > 1:
        raise ValueError(f"refresh_batchnorm takes at most one epoch, got '{span}'. Pass True for a whole one.")
    return span


def _training_data(state: State) -> DataSpec:
    """The data of the Trainer on whose behalf the event runs.

    The Trainer alone knows how a batch is transformed and split, and in Composer 0.32.1 neither State nor an event
    leads to it. Take it from there once one does.
    """
    frame = sys._getframe()
    while frame is not None:
        trainer = frame.f_locals.get('self')
        if isinstance(trainer, Trainer) and trainer.state is state and trainer._train_data_spec is not None:
            return trainer._train_data_spec
        frame = frame.f_back
    raise RuntimeError(
        'refresh_batchnorm needs the training data of a Trainer, but none runs this event. '
        'Set refresh_batchnorm=False, and call update_bn(model, data, shadow=swa.swa_model) after training.'
    )


def _check_own(state: Mapping[str, Any]) -> tuple[Mapping[str, Any] | None, list[int] | None]:
    """The parts that only this algorithm's state has; neither, for the state of Composer's SWA."""
    if not isinstance(state, Mapping):
        return None, None  # refused with the rest of it
    annealing, refreshed_at = check_state(state.get(_ANNEALING)), state.get(_REFRESHED_AT)
    if annealing is not None:
        check_clock(annealing['since'], "'annealing' of the saved SWA state")
    is_moment = isinstance(refreshed_at, list) and [type(count) for count in refreshed_at] == [int, int]
    if refreshed_at is not None and not is_moment:
        raise ValueError(
            f'{_REFRESHED_AT!r} of the saved SWA state must give numbers of updates and batches, got {refreshed_at!r}.'
        )
    return annealing, refreshed_at
