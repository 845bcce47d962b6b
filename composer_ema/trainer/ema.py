"""The Composer algorithms: which weight each update of an average gets, and what an algorithm does besides."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from composer.core import State, Time
from torch import nn
from typing_extensions import Unpack

from composer_ema.averages import HalfLife, Moment, weight_from_smoothing
from composer_ema.model.sharding import canonical_name
from composer_ema.settings import TrainerSettings, takes_settings
from composer_ema.shadow.shadow_model import ShadowModel
from composer_ema.spans import Span
from composer_ema.trainer.clock import Clock, resolve_share
from composer_ema.trainer.weight_average import WeightAverage, clock_before, read


class _Default(str):
    """A default that can be told from the same value given by the user."""


_DEFAULT_HALF_LIFE = _Default('1000ba')


@takes_settings
class EMA(WeightAverage):
    r"""Keeps an exponential moving average of the model's weights and evaluates with it.

    After each ``update_interval`` of training::

        average += (1 - smoothing) * (weights - average)        smoothing = 2 ** (-elapsed / half_life)

    where ``elapsed`` is the time since the last update, in the half-life's own unit, whatever the batch size. The first
    update, at ``ema_start``, copies the weights. Evaluation and prediction use the average, training never sees it. The
    model in a checkpoint holds the training weights, this algorithm's state the average; a checkpoint that a callback
    takes during an evaluation holds both as well, and resumes exactly.

    Args:
        half_life: time string after which a weight's share in the average has halved: ``'1000ba'``, ``'1.5ep'``,
            ``'50000sp'``, ``'1000000tok'``, ``'2iter'``, or ``'0.1dur'`` as a share of the run. ``'0ba'`` averages
            nothing: the average equals the weights. Default: ``'1000ba'``.
        smoothing: instead of ``half_life``, the share of the old average kept by every update, in [0, 1], whatever
            time has passed. Default: None.
        ema_start: time string (ba, ep, sp, tok, dur) before which nothing is averaged. Default: ``'0.0dur'``.
        update_interval: time string between two updates; its unit may differ from the half-life's. Default: one batch,
            or one epoch or iteration for a half-life in those.
        evaluate_with: ``'ema'`` or ``'training'`` by evaluator label, for example ``{'eval_training': 'training'}``.
            Labels not named, and prediction (label ``'predict'``), see the average.
        log_interval: time string between two values of ``ema/relative_distance``; None logs none. Each value makes
            the host wait for the device once. Default: ``'1ep'``.
        export_weights: ``'ema'`` or ``'training'``, what Composer's ``ExportForInferenceCallback`` writes at the end of
            training. Default: ``'training'``.
        settings: which tensors are averaged and how: ``buffers``, ``include``, ``exclude``, ``shadow_dtype``,
            ``shadow_device``, ``skip_nonfinite``, ``rounding``, ``seed``, and ``avg_fn`` or ``multi_avg_fn`` in place
            of ``half_life``; see :class:`composer_ema.settings.Settings`.

    Attributes:
        ema_model: the :class:`~composer_ema.ShadowModel`, None before the Trainer is built.
        ema_started: whether ``ema_start`` has come.
        ema_weights_active: whether the model holds the average right now.
        smoothing: share of the old average kept by an update after exactly one ``update_interval``; None where that
            differs from batch to batch.
        update_seconds: seconds of host time spent in updates and distances so far, their whole cost on a CPU.

    Raises:
        TypeError, ValueError: an argument out of range, when built; a setting that cannot work in this run, when the
            Trainer is built or training starts.

    Logs ``ema/smoothing``, unless a function decides, and ``ema/num_updates`` at every update.

    Example:
        .. code:: python

            from composer import Trainer
            from composer_ema import EMA

            trainer = Trainer(model=model, train_dataloader=loader, max_duration='6ep', algorithms=[EMA('100ba')])
            trainer.fit()
    """

    name = 'ema'
    horizon = ('half_life', 'smoothing', 'avg_fn', 'multi_avg_fn')
    rivals = (WeightAverage,)
    _elapsing = frozenset({'half_life'})

    def __init__(
        self,
        half_life: str | Time | None = _DEFAULT_HALF_LIFE,
        smoothing: float | None = None,
        ema_start: str | Time = '0.0dur',
        update_interval: str | Time | None = None,
        *,
        evaluate_with: Mapping[str, Literal['ema', 'training']] | None = None,
        log_interval: str | Time | None = '1ep',
        export_weights: Literal['ema', 'training'] = 'training',
        **settings: Unpack[TrainerSettings],
    ) -> None:
        self._fixed_weight: float | None = None
        self.half_life: Span | None = None
        is_given = half_life is not None and half_life is not _DEFAULT_HALF_LIFE
        if settings.get('avg_fn') is not None or settings.get('multi_avg_fn') is not None:
            if is_given or smoothing is not None:
                given = f'half_life={str(half_life)!r}' if is_given else f'smoothing={smoothing}'
                raise ValueError(
                    f'avg_fn and multi_avg_fn decide how much of the average is kept, so {given} has no effect. '
                    'Leave it out.'
                )
        elif smoothing is not None:
            if is_given:
                raise ValueError(
                    f'pass either half_life or smoothing, got half_life={str(half_life)!r} and smoothing={smoothing}.'
                )
            self._fixed_weight = weight_from_smoothing(smoothing)
        elif half_life is None:
            raise ValueError("either half_life or smoothing must be given, got None for both. Pass half_life='1000ba'.")
        else:
            self.half_life = Span.parse(half_life, name='half_life', units=('ba', 'ep', 'sp', 'tok', 'iter', 'dur'))
        super().__init__(
            {
                'half_life': None if self.half_life is None else str(self.half_life),
                'smoothing': None if smoothing is None else float(smoothing),
            },
            start=ema_start,
            update_interval=self._parse_update_interval(update_interval),
            evaluate_with=evaluate_with,
            log_interval=log_interval,
            export_weights=export_weights,
            settings=settings,
        )
        if update_interval is None:
            self._arguments['update_interval'] = None

    def _parse_update_interval(self, update_interval: str | Time | None) -> Span:
        if update_interval is not None:
            return Span.parse(update_interval, name='update_interval', positive=True)
        unit = self.half_life.unit if self.half_life is not None else 'ba'
        return Span(1, unit if unit in ('ba', 'ep', 'iter') else 'ba')

    # What the built-in offers

    @property
    def ema_start(self) -> Span:
        """The time before which nothing is averaged."""
        return self._start

    @property
    def ema_started(self) -> bool:
        """Whether ``ema_start`` has come."""
        return self._has_started

    @property
    def ema_model(self) -> ShadowModel | None:
        """The average. Setting it takes over a shadow, or copies whatever has named parameters and buffers."""
        return self._shadow

    @ema_model.setter
    def ema_model(self, average: Any) -> None:
        if average is not None and not isinstance(average, ShadowModel):
            average = ShadowModel.from_tensors(
                {canonical_name(name): tensor for name, tensor in average.named_parameters()},
                {canonical_name(name): tensor for name, tensor in average.named_buffers()},
                **self._settings.as_arguments(),
            )
            average.num_updates = int(average.has_function)  # a function's first update would copy
        elif average is not None and self._is_by_function and not average.has_function:
            raise ValueError(
                'this EMA averages by a function, the given shadow does not. '
                'Build the ShadowModel with the same avg_fn or multi_avg_fn.'
            )
        self._shadow, self._last_update = average, None
        self._has_started = average is not None

    @property
    def ema_weights_active(self) -> bool:
        """Whether the model holds the average right now."""
        return self._shadow is not None and self._shadow.is_swapped

    @property
    def smoothing(self) -> float | None:
        """Share of the old average kept by an update after one ``update_interval``; None where that differs."""
        if self._fixed_weight is not None:
            return 1.0 - self._fixed_weight
        if self.half_life is None:
            return None
        if self.half_life.value == 0:
            return 0.0
        if self.half_life.unit != self.update_interval.unit:
            return None
        return 2.0 ** -(self.update_interval.value / self.half_life.value)

    def get_ema_model(self, model: nn.Module) -> nn.Module:
        """Puts the average into ``model`` and returns it.

        The model in training keeps its training weights in a stash, and gets them back from
        :meth:`get_training_model` or when training goes on; any other model of the architecture is overwritten.
        """
        return self._lend_average(model)

    # Helpers

    def _times(self) -> dict[str, Span | None]:
        return {'half_life': self.half_life, **super()._times()}

    def _check_run(self, state: State) -> None:
        super()._check_run(state)
        if self.half_life is not None:
            half_life = resolve_share(self.half_life, state, 'half_life')
            self._warn_if_longer('half_life', half_life, state, 'the average will keep more than half of its start')

    def _weight(self, now: Clock, state: State) -> float:
        if self._fixed_weight is not None:
            return self._fixed_weight
        assert self.half_life is not None
        half_life = resolve_share(self.half_life, state, 'half_life')
        unit = half_life.unit
        read(unit, state, 'half_life', self.half_life)
        if self._last_update is not None:
            elapsed = now[unit] - self._last_update[unit]
        elif unit == self.update_interval.unit:
            # An average that came without its clock: the built-in's, or one that the user set.
            elapsed = self.update_interval.value
        else:
            elapsed = now[unit] - clock_before(state)[unit]
        return HalfLife(half_life.value, unit).weight(Moment(max(elapsed, 0.0), max(elapsed, 0.0), 0))

    def _metrics(self, weight: float) -> dict[str, float]:
        return {'ema/smoothing': 1.0 - weight}

    def _describe(self) -> str:
        if self.half_life is not None:
            return f'half_life={self.half_life}'
        return f'smoothing={self.smoothing}' if self._fixed_weight is not None else 'a function'

    def _shown(self) -> dict[str, Any]:
        return {name: value for name, value in self._arguments.items() if name != 'half_life' or value is not None}
