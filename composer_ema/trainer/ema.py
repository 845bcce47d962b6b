"""EMA: the Composer algorithm for an exponential moving average."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal

from composer.core import State, Time
from torch import nn
from typing_extensions import Unpack

from composer_ema.averages import UPDATES, Exponential, HalfLife, Moment, Power, Profile, Smoothing
from composer_ema.model.sharding import canonical_name
from composer_ema.settings import TrainerSettings, takes_settings
from composer_ema.shadow.shadow_model import ShadowModel
from composer_ema.spans import Span
from composer_ema.trainer import limits
from composer_ema.trainer.clock import TimeArgument
from composer_ema.trainer.weight_average import WeightAverage


class _Default(str):
    """A default that is not the same object as an equal value from the user."""


_DEFAULT_HALF_LIFE = _Default('1000ba')


@takes_settings
class EMA(WeightAverage):
    r"""Keeps an exponential moving average of the model's weights and evaluates with it.

    After each ``update_interval`` of training::

        average += (1 - smoothing) * (weights - average)        smoothing = 2 ** (-elapsed / half_life)

    where ``elapsed`` is the time since the last update, in the half-life's own unit, whatever the batch size. The first
    update, at ``ema_start``, copies the weights. Evaluation and prediction use the average, training never sees it. The
    model in a checkpoint of the Trainer holds the training weights, this algorithm's state the average, also if a
    callback saves during an evaluation.

    Args:
        half_life: time string after which a weight's share in the average has halved: ``'1000ba'``, ``'1.5ep'``,
            ``'50000sp'``, ``'1000000tok'``, ``'2iter'``, or ``'0.1dur'`` as a share of the run. ``'0ba'`` averages
            nothing: the average equals the weights. Default: ``'1000ba'``.
        smoothing: instead of ``half_life``, the share of the old average that every update keeps, in [0, 1], whatever
            time has passed. Default: None.
        power: instead of ``half_life``, the width of a power function average as a share of the time trained so far,
            above 0 and at most 0.2887: 0.05, 0.10 and 0.25 put half of the average into the last 3.8, 8.4 and 33 % of
            the run. See :class:`composer_ema.averages.Power`. Default: None.
        ema_start: time string (ba, ep, sp, tok, dur) before which nothing is averaged. Later updates are due whenever
            another ``update_interval`` has passed since the first one. Default: ``'0.0dur'``.
        update_interval: time string between two updates. Its unit may differ from the half-life's. Default: one batch,
            or one epoch or iteration for a half-life in those, as in Composer's own, with a warning.
        evaluate_with: ``'ema'`` or ``'training'`` by evaluator label. Evaluators that it does not name, and predictions
            (label ``'predict'``), see the average. Default: None.
        log_interval: time string between two values of ``ema/relative_distance``; None logs none. Each value makes the
            host wait for the device once. Default: ``'1ep'``.
        export_weights: ``'ema'`` or ``'training'``: what Composer's ``ExportForInferenceCallback`` writes at the end of
            training. Default: ``'training'``.
        settings: which tensors are averaged and how: ``buffers``, ``include``, ``exclude``, ``shadow_dtype``,
            ``shadow_device``, ``skip_nonfinite``, ``rounding``, ``compensated``, ``seed``, and ``avg_fn`` or
            ``multi_avg_fn`` in place of ``half_life``; see :class:`composer_ema.settings.Settings`.

    Attributes:
        ema_model: the :class:`~composer_ema.ShadowModel`; None before the Trainer is built.
        ema_started: whether ``ema_start`` has come.
        ema_weights_active: whether the model holds the average now.
        smoothing: share of the old average that an update keeps after exactly one ``update_interval``; None where that
            differs from batch to batch.
        update_seconds: seconds of host time spent in updates and distances so far, their whole cost on a CPU.

    Raises:
        TypeError, ValueError: an argument out of range, when built; a setting that cannot work in this run, when the
            Trainer is built or training starts.

    Logs ``ema/smoothing``, unless a function makes the average, and ``ema/num_updates`` at every update.

    Example:
        .. code:: python

            from composer import Trainer
            from composer_ema import EMA

            trainer = Trainer(model=model, train_dataloader=loader, max_duration='6ep', algorithms=[EMA('100ba')])
            trainer.fit()
    """

    name = 'ema'
    compared = ('half_life', 'smoothing', 'power', 'avg_fn', 'multi_avg_fn')
    rivals = (WeightAverage,)

    def __init__(
        self,
        half_life: str | Time | None = _DEFAULT_HALF_LIFE,
        smoothing: float | None = None,
        ema_start: str | Time = '0.0dur',
        update_interval: str | Time | None = None,
        *,
        power: float | None = None,
        evaluate_with: Mapping[str, Literal['ema', 'training']] | None = None,
        log_interval: str | Time | None = '1ep',
        export_weights: Literal['ema', 'training'] = 'training',
        **settings: Unpack[TrainerSettings],
    ) -> None:
        has_function = settings.get('avg_fn') is not None or settings.get('multi_avg_fn') is not None
        #: The half-life; None if a smoothing, a power or a function takes its place.
        self.half_life = _half_life(half_life, smoothing=smoothing, power=power, has_function=has_function)
        profile: Profile | None = None
        if self.half_life is not None:
            profile = HalfLife(self.half_life.value, self.half_life.unit)
        elif smoothing is not None:
            profile = Smoothing(smoothing)
        elif power is not None:
            profile = Power(power, 'ba')
        super().__init__(
            profile,
            {
                'half_life': None if self.half_life is None else str(self.half_life),
                'smoothing': None if smoothing is None else float(smoothing),
                'power': None if power is None else float(power),
            },
            horizon=None if self.half_life is None else TimeArgument('half_life', self.half_life),
            start=ema_start,
            update_interval=_interval(update_interval, self.half_life),
            evaluate_with=evaluate_with,
            log_interval=log_interval,
            export_weights=export_weights,
            settings=settings,
        )
        self._profile = profile
        if self.half_life is None:
            self._implied.add('half_life')
        if update_interval is None:
            self._implied.add('update_interval')
        #: Whether to say at the start of training that updates are as rare as epochs or iterations.
        self._warns_of_rare_updates = update_interval is None and self.update_interval.unit != 'ba'

    def _check_run(self, state: State) -> None:
        super()._check_run(state)
        if self._warns_of_rare_updates:
            assert self._horizon is not None  # the interval has its unit
            limits.warn_of_rare_updates(self._horizon, self._interval, state)
            self._warns_of_rare_updates = False

    @property
    def ema_start(self) -> Span:
        """The time before which nothing is averaged."""
        return self._start.span

    @property
    def ema_started(self) -> bool:
        """Whether ``ema_start`` has come."""
        return self._has_started

    @property
    def ema_model(self) -> ShadowModel | None:
        """The average. Setting it takes over a shadow, or copies whatever has named parameters and buffers."""
        return self._averages.shadow(self.name)

    @ema_model.setter
    def ema_model(self, average: Any) -> None:
        if average is not None and not isinstance(average, ShadowModel):
            average = ShadowModel.from_tensors(
                {canonical_name(name): tensor for name, tensor in average.named_parameters()},
                {canonical_name(name): tensor for name, tensor in average.named_buffers()},
                **self._settings.as_arguments(),
            )
            average.num_updates = int(average.has_function)  # a function's first update would copy
        elif average is not None and self._settings.has_function and not average.has_function:
            raise ValueError(
                'this EMA averages by a function, the given shadow does not. '
                'Build the ShadowModel with the same avg_fn or multi_avg_fn.'
            )
        if (live := self._averages.live) is not None:
            self._averages.take_back(live)
        self._averages.take_over(self.name, average)
        self._has_started = average is not None

    @property
    def ema_weights_active(self) -> bool:
        """Whether the model holds the average now."""
        return self._averages.lent is not None

    @property
    def smoothing(self) -> float | None:
        """Share of the old average that an update keeps after one ``update_interval``; None where that differs."""
        if not isinstance(self._profile, Exponential):
            return None
        if self._profile.unit == UPDATES:
            return 1.0 - self._profile.weight_at(0)
        interval = self.update_interval
        if self._profile.unit != interval.unit and self.half_life != Span(0, self._profile.unit):
            return None
        return math.exp(self._profile.log_smoothing(Moment(interval.value, interval.value, 0)))

    def get_ema_model(self, model: nn.Module) -> nn.Module:
        """Puts the average into ``model`` and returns it.

        The model in training keeps its training weights in a stash, and gets them back from
        :meth:`get_training_model` or when training goes on. Any other model of the architecture is overwritten.
        """
        return self._averages.put(self.name, model)


def _half_life(half_life: str | Time | None, *, has_function: bool, **others: float | None) -> Span | None:
    """The half-life, or None if another argument or a function takes its place.

    Raises:
        ValueError: none or several of them are given.
    """
    is_given = half_life is not None and half_life is not _DEFAULT_HALF_LIFE
    given = {'half_life': repr(str(half_life))} if is_given else {}
    given |= {name: str(value) for name, value in others.items() if value is not None}
    written = [f'{name}={value}' for name, value in given.items()]
    if has_function and given:
        raise ValueError(
            f'avg_fn and multi_avg_fn decide how much of the average is kept, so {written[0]} has no effect. '
            'Leave it out.'
        )
    if len(given) > 1:
        raise ValueError(
            f'pass either {" or ".join(given)}, got {" and ".join(written)}. To replace the half-life of a recipe, '
            'write half_life: null there.'
        )
    if has_function or (given and not is_given):
        return None
    if half_life is None:
        raise ValueError(
            f"one of half_life, {' and '.join(others)} must be given, got None for all. Pass half_life='1000ba'."
        )
    return Span.parse(half_life, name='half_life', units=('ba', 'ep', 'sp', 'tok', 'iter', 'dur'))


def _interval(update_interval: str | Time | None, half_life: Span | None) -> Span:
    """The time between two updates; by default one batch, epoch or iteration, as the half-life counts."""
    if update_interval is not None:
        return Span.parse(update_interval, name='update_interval', positive=True)
    unit = half_life.unit if half_life is not None else 'ba'
    return Span(1, unit if unit in ('ba', 'ep', 'iter') else 'ba')
