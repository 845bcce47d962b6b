"""SWA: the Composer algorithm for an equal average, an annealed learning rate, and fresh BatchNorm statistics."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from composer.algorithms import EMA as ComposerEMA
from composer.algorithms import SWA as ComposerSWA
from composer.core import Event, State, Time
from composer.loggers import Logger
from torch import nn
from typing_extensions import Unpack

from composer_ema import labelled, plain
from composer_ema.averages import Equal
from composer_ema.run import limits as times
from composer_ema.run.clock import TimeArgument, check_clock
from composer_ema.run.limits import Limit
from composer_ema.settings import TrainerSettings, takes_settings
from composer_ema.shadow.shadow_model import ShadowModel
from composer_ema.spans import Span
from composer_ema.trainer import annealing, limits, refresh
from composer_ema.trainer.annealing import Annealing, check_rates, check_strategy
from composer_ema.trainer.refresh import Refresh
from composer_ema.trainer.run import ComposerRun, look_at
from composer_ema.trainer.weight_average import DEFAULT_LOG_INTERVAL, WeightAverage
from composer_ema.wording import shown

# Schedulers step before the end of a batch or of an epoch. What comes last before the next step decides.
_SETS_LEARNING_RATES = frozenset({Event.BATCH_START, Event.BATCH_END, Event.EPOCH_END})
_ANNEALING = 'annealing'


@takes_settings
class SWA(WeightAverage):
    r"""Keeps an equal average of the weights from ``swa_start`` on and evaluates with it.

    Stochastic weight averaging (Izmailov et al., 2018, `arXiv:1803.05407 <https://arxiv.org/abs/1803.05407>`_). At
    ``swa_start`` and whenever another ``update_interval`` has passed since::

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
            :func:`composer_ema.update_bn`. Frozen layers keep their statistics, with a warning. If the pass fails, all
            layers do: a warning gives the cause, and the run goes on to save. Default: True.
        evaluate_with, evaluate, log_interval, export_weights: as for :class:`~composer_ema.EMA`, with ``'swa'`` for
            ``'ema'``.
        settings: which tensors are averaged and how: ``buffers``, ``include``, ``exclude``, ``shadow_dtype``,
            ``shadow_device``, ``skip_nonfinite``, ``rounding``, ``compensated``, ``shard_over_ranks``, ``seed``, and
            ``avg_fn`` or ``multi_avg_fn`` in place of the equal average; see :class:`composer_ema.settings.Settings`.

    Attributes:
        swa_model: the :class:`~composer_ema.ShadowModel`; None before the Trainer is built.
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
    compared = ('update_interval', 'swa_lr', 'avg_fn', 'multi_avg_fn')
    rivals = (ComposerEMA, ComposerSWA)

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
        evaluate: Sequence[Literal['swa', 'training']] | None = None,
        log_interval: str | Time | None = DEFAULT_LOG_INTERVAL,
        export_weights: Literal['swa', 'training'] = 'training',
        **settings: Unpack[TrainerSettings],
    ) -> None:
        interval = Span.parse(update_interval, name='update_interval', positive=True)
        if schedule_swa_lr is not None:
            schedule_swa_lr = plain.flag('schedule_swa_lr', schedule_swa_lr)
        _refuse_composers(swa_end, schedule_swa_lr, anneal_steps, swa_lr, interval)
        length = Span.parse(anneal_length, name='anneal_length', units=('ba', 'ep', 'sp', 'tok', 'dur'))
        self._anneal_length = TimeArgument('anneal_length', length)
        self._annealing = None if swa_lr is None else Annealing(swa_lr, anneal_strategy, length)
        self._refresh = Refresh(refresh_batchnorm)
        has_function = settings.get('avg_fn') is not None or settings.get('multi_avg_fn') is not None
        super().__init__(
            {self.name: (None if has_function else Equal(), None)},
            {
                'anneal_strategy': check_strategy(anneal_strategy),
                'swa_lr': None if swa_lr is None else check_rates(swa_lr),
                'anneal_length': str(length),
                'refresh_batchnorm': self._refresh.argument,
            },
            start=swa_start,
            update_interval=interval,
            evaluate_with=evaluate_with,
            evaluate=evaluate,
            log_interval=log_interval,
            export_weights=export_weights,
            settings=settings,
        )

    @property
    def swa_start(self) -> Span:
        """The time at which averaging starts."""
        return self._keeper.start.span

    @property
    def swa_started(self) -> bool:
        """Whether ``swa_start`` has come and the first weights are in the average."""
        return self._keeper.has_started

    @property
    def swa_model(self) -> ShadowModel | None:
        """The average."""
        return self._averages.shadow(self.name)

    @property
    def swa_weights_active(self) -> bool:
        """Whether the model holds the average now."""
        return self._averages.lent is not None

    def get_swa_model(self, model: nn.Module) -> nn.Module:
        """Puts the average into ``model`` and returns it.

        The model in training keeps its training weights in a stash, and gets them back from
        :meth:`get_training_model` or when training goes on. Any other model of the architecture is overwritten.
        """
        return self._averages.put(self.name, model)

    def match(self, event: Event, state: State) -> bool:
        """Whether :meth:`apply` has something to do at ``event``. Changes nothing."""
        return super().match(event, state) or self._is_annealing_due(event, state) or self._is_refresh_due(event, state)

    def apply(self, event: Event, state: State, logger: Logger) -> None:
        """Does what ``event`` asks for; see :meth:`match`."""
        if super().match(event, state):
            super().apply(event, state, logger)
        if self._is_annealing_due(event, state):
            self._anneal(state)
        if self._is_refresh_due(event, state):
            self._refresh.run(self._averages.required(self.name), state)

    def _create(self, state: State) -> None:
        self._refresh.reset()
        if self._annealing is not None:
            self._annealing.load_state_dict(None)
        super()._create(state)

    def _limits(self, state: State) -> list[Limit]:
        found = super()._limits(state)
        return found if self._annealing is None else [*found, Limit(self._anneal_length)]

    def _check_run(self, state: State) -> None:
        super()._check_run(state)
        if self._annealing is None:
            self._warn_of_annealing_to_nothing()
        else:
            self._annealing.check(state.optimizers)
            times.warn_if_not_reached(self._anneal_length, self._keeper.start, ComposerRun(state))
        times.warn_of_a_single_update(self._keeper.start, self._keeper.interval, ComposerRun(state))
        self._refresh.check(self._averages.required(self.name), state)

    def _warn_of_annealing_to_nothing(self) -> None:
        parameters = inspect.signature(SWA).parameters
        for name in ('anneal_strategy', 'anneal_length'):
            if self._arguments[name] != parameters[name].default:
                limits.warn_without_rate(name, self._arguments[name])

    def _is_annealing_due(self, event: Event, state: State) -> bool:
        if self._annealing is None or event not in _SETS_LEARNING_RATES:
            return False
        # It starts from what the scheduler has set for a batch, so at the start of one.
        return self._annealing.since is not None or (
            event is Event.BATCH_START and self._keeper.start.has_come(look_at(state))
        )

    def _anneal(self, state: State) -> None:
        assert self._annealing is not None
        run = ComposerRun(state)
        clock = run.clock()
        if self._annealing.since is None:
            self._annealing.start(clock, state.optimizers)
        self._annealing.apply(clock, self._anneal_length.resolve(run), state.optimizers)

    def _is_refresh_due(self, event: Event, state: State) -> bool:
        may_be = event in refresh.MAY_END and self._keeper.has_average
        return may_be and self._refresh.is_due(event, self._averages.required(self.name), state)

    def state_dict(self) -> dict[str, Any]:
        """As for EMA, and how far the learning rate has been annealed and BatchNorm refreshed."""
        annealed = None if self._annealing is None else self._annealing.state_dict()
        return {**super().state_dict(), _ANNEALING: annealed, **self._refresh.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any], strict: bool = False) -> None:
        """Loads a state of this class, or of Composer's SWA. All of it is checked first.

        Raises:
            ValueError: names, shapes, or a version that do not fit, all listed. Nothing is changed then.
        """
        _check_label(state, self.name)
        annealed, refreshed_at = _check_own(state)
        super().load_state_dict(state, strict)
        if not self._averages:  # loaded when the Trainer is built
            return
        self._refresh.load_state_dict(refreshed_at)
        if self._annealing is not None:
            self._annealing.load_state_dict(annealed)


def _refuse_composers(
    swa_end: Any, schedule_swa_lr: bool | None, anneal_steps: int | None, swa_lr: Any, interval: Span
) -> None:
    """Raises where an argument of Composer's SWA means something that this one does not do, and says what to write."""
    if swa_end is not None:
        raise ValueError(
            f"swa_end={labelled.shown(swa_end)} is where Composer's SWA replaces the training weights by the average; "
            'this one never does, and evaluates with the average from swa_start on. Leave swa_end out; '
            'load_average(checkpoint) and get_swa_model(model) give the averaged weights.'
        )
    if schedule_swa_lr and swa_lr is None:
        raise ValueError(
            "schedule_swa_lr=True does not say where the learning rate goes: Composer's SWA takes the one that the "
            'scheduler has at that moment. Pass a number as swa_lr, and leave schedule_swa_lr out.'
        )
    if schedule_swa_lr is False and swa_lr is not None:
        raise ValueError(
            f'swa_lr={shown(swa_lr)} anneals the learning rate and schedule_swa_lr=False does not. '
            'Leave schedule_swa_lr out to anneal, or swa_lr to leave the learning rate alone.'
        )
    if anneal_steps is not None:
        is_count = isinstance(anneal_steps, int) and 0 <= anneal_steps < 10**9
        length = f'{anneal_steps * interval.value:g}{interval.unit}' if is_count else '10ep'
        raise ValueError(
            f'anneal_steps={shown(anneal_steps)} counts updates; here the way to swa_lr has a length of its own. Write '
            f"anneal_length='{length}' in its place, or leave it out where there is no swa_lr."
        )


def _check_label(state: Mapping[str, Any], label: str) -> None:
    averages = state.get('averages') if isinstance(state, Mapping) else None
    if isinstance(averages, Mapping) and averages and set(averages) != {label} and _are_mappings(averages):
        held = ', '.join(map(str, averages))
        raise ValueError(
            f'the saved SWA state holds the averages {held}, not {label!r}. Load what an SWA of composer_ema has saved.'
        )


def _are_mappings(averages: Mapping[str, Any]) -> bool:
    return all(isinstance(average, Mapping) for average in averages.values())


def _check_own(state: Mapping[str, Any]) -> tuple[Mapping[str, Any] | None, list[int] | None]:
    """The parts that only this algorithm's state has: the annealing and the refresh; None where they are missing."""
    if not isinstance(state, Mapping):
        return None, None  # refused with the rest of it
    annealed = annealing.check_state(state.get(_ANNEALING))
    if annealed is not None:
        check_clock(annealed['since'], f'{_ANNEALING!r} of the saved SWA state')
    return annealed, refresh.check_state(state)
