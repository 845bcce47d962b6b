"""EMA: the Composer algorithm for an exponential moving average."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from composer.core import State, Time
from torch import nn
from typing_extensions import Unpack

from composer_ema import plain
from composer_ema.averages import UPDATES, Exponential, Moment, WarmedUp
from composer_ema.model.wrappers import canonical_name
from composer_ema.profiles import Kind
from composer_ema.run import asked, limits
from composer_ema.run.asked import DEFAULT_HALF_LIFE, Asked
from composer_ema.settings import TrainerSettings, takes_settings
from composer_ema.shadow.shadow_model import ShadowModel
from composer_ema.spans import Span
from composer_ema.trainer.run import ComposerRun
from composer_ema.trainer.snapshots import AskedSnapshots, RunSnapshots
from composer_ema.trainer.weight_average import DEFAULT_LOG_INTERVAL, WeightAverage
from composer_ema.wording import shown


@takes_settings
class EMA(WeightAverage):
    r"""Keeps an exponential moving average of the model's weights and evaluates with it.

    After each ``update_interval`` of training::

        average += (1 - smoothing) * (weights - average)        smoothing = 2 ** (-elapsed / half_life)

    where ``elapsed`` is the time since the last update, in the half-life's own unit, whatever the batch size. The first
    update, at ``ema_start``, copies the weights. Evaluation and prediction use the average, training never sees it. The
    model in a checkpoint of the Trainer holds the training weights, this algorithm's state the average, also if a
    callback saves during an evaluation.

    For several averages pass ``half_life``, ``smoothing``, ``power``, ``gamma`` or ``average`` as a mapping from labels
    to values: ``EMA(half_life={'short': '100ba', 'long': '1ep'}, power={'wide': 0.1})``. All move in one update. The
    first label, in the order of these arguments, is what an evaluator sees that ``evaluate_with`` does not name.
    ``warmup`` and ``bias_correction`` are then for all exponential averages, or mappings too.

    Args:
        half_life: time string after which a weight's share in the average has halved: ``'1000ba'``, ``'1.5ep'``,
            ``'50000sp'``, ``'1000000tok'``, ``'2iter'``, or ``'0.1dur'`` as a share of the run. ``'0ba'`` averages
            nothing: the average equals the weights. Default: ``'1000ba'``.
        smoothing: instead of ``half_life``, the share of the old average that every update keeps, in [0, 1], whatever
            time has passed. Default: None.
        power: instead of ``half_life``, the width of a power function average as a share of the time trained so far,
            above 0 and at most 0.2887: 0.05, 0.10 and 0.25 put half of the average into the last 3.8, 8.4 and 33 % of
            the run. See :class:`composer_ema.averages.Power`. Default: None.
        gamma: instead of ``power``, the exponent of the power function, at least 0. Default: None.
        average: ``'equal'`` for the mean of all updates in place of an exponential average. Default: ``'exponential'``.
        warmup: upper limit of the half-life as a share of the time since the start, above 0, so that the average soon
            forgets where it started. Default: None, no limit.
        bias_correction: whether an exponential average forgets where it started by correction, as Adam does. Default:
            False.
        ema_start: time string (ba, ep, sp, tok, dur) before which nothing is averaged. Later updates are due whenever
            another ``update_interval`` has passed since the first one. Default: ``'0.0dur'``.
        update_interval: time string between two updates. Its unit may differ from the half-life's. Default: one batch,
            or one epoch or iteration for a single half-life in those, as in Composer's own, with a warning.
        evaluate_with: ``'ema'``, or the label of an average, or ``'training'`` by evaluator label. Evaluators that it
            does not name, and predictions (label ``'predict'``), see the first average. Default: None.
        evaluate: weights, ``'training'`` and labels of averages, for each of which every evaluator runs:
            ``['training', 'ema']`` runs ``eval`` as ``eval_training`` and then as ``eval_ema``, on the same data, and
            leaves training to the bit what one evaluator leaves it. Evaluators that ``evaluate_with`` names run once,
            and so does one that is passed to ``Trainer.eval``. Default: None, run each once.
        log_interval: time string between two values of ``ema/relative_distance``; None logs none. Each value makes the
            host wait for the device once. Default: ``'1ep'``.
        export_weights: ``'ema'``, or the label of an average, or ``'training'``: what Composer's
            ``ExportForInferenceCallback`` writes at the end of training. Default: ``'training'``.
        snapshots: time string between two files from which any other average can be made after the run, such as
            ``'0.05dur'``; see :func:`composer_ema.reconstruct`. Each holds two power function averages of their own,
            which this algorithm keeps beside its averages. Or a mapping: ``every``, the time; ``power``, the widths of
            these averages, by default 0.05 and 0.10; ``halvings``, how many more files halve what is left before the
            end, by default 5; ``folder``, where they go, by default ``snapshots`` in the folder of a
            recipe's run, else beside the Trainer's checkpoints. Default: None, no files.
        settings: which tensors are averaged and how: ``buffers``, ``include``, ``exclude``, ``shadow_dtype``,
            ``shadow_device``, ``skip_nonfinite``, ``rounding``, ``compensated``, ``shard_over_ranks``, ``seed``, and
            ``avg_fn`` or ``multi_avg_fn`` in place of ``half_life``; see :class:`composer_ema.settings.Settings`.

    Attributes:
        ema_model: the :class:`~composer_ema.ShadowModel`, with labels a dictionary of them; None before the Trainer is
            built.
        ema_started: whether ``ema_start`` has come.
        ema_weights_active: whether the model holds the average now.
        smoothing: share of the old average that an update keeps after exactly one ``update_interval``; None where that
            differs from batch to batch.
        update_seconds: seconds of host time spent in updates and distances so far, their whole cost on a CPU.

    Raises:
        TypeError, ValueError: an argument out of range, when built; a setting that cannot work in this run, when the
            Trainer is built or training starts.

    Logs ``ema/smoothing`` of an exponential average and ``ema/num_updates`` at every update, with the label of the
    average for ``ema``.

    Example:
        .. code:: python

            from composer import Trainer
            from composer_ema import EMA

            trainer = Trainer(model=model, train_dataloader=loader, max_duration='6ep', algorithms=[EMA('100ba')])
            trainer.fit()
    """

    name = 'ema'
    compared = (*asked.OF_PROFILES, 'avg_fn', 'multi_avg_fn')
    rivals = ()

    def __init__(
        self,
        half_life: str | Time | Mapping[str, str | Time] | None = DEFAULT_HALF_LIFE,
        smoothing: float | Mapping[str, float] | None = None,
        ema_start: str | Time = '0.0dur',
        update_interval: str | Time | None = None,
        *,
        power: float | Mapping[str, float] | None = None,
        gamma: float | Mapping[str, float] | None = None,
        average: Kind | Mapping[str, Literal['equal']] = 'exponential',
        warmup: float | Mapping[str, float] | None = None,
        bias_correction: bool | Mapping[str, bool] = False,
        evaluate_with: Mapping[str, str] | None = None,
        evaluate: Sequence[str] | None = None,
        log_interval: str | Time | None = DEFAULT_LOG_INTERVAL,
        export_weights: str = 'training',
        snapshots: str | Time | Mapping[str, Any] | None = None,
        **settings: Unpack[TrainerSettings],
    ) -> None:
        has_function = settings.get('avg_fn') is not None or settings.get('multi_avg_fn') is not None
        arguments = {
            'half_life': half_life,
            'smoothing': smoothing,
            'power': power,
            'gamma': gamma,
            'average': average,
            'warmup': warmup,
            'bias_correction': bias_correction,
        }
        self._asked = asked.read(self.name, arguments, has_function=has_function)
        files = AskedSnapshots.of(snapshots, has_function=has_function)
        super().__init__(
            self._asked.kept,
            {**self._asked.arguments, 'snapshots': None if files is None else files.as_plain()},
            start=ema_start,
            update_interval=_interval(update_interval, self._asked),
            evaluate_with=evaluate_with,
            evaluate=evaluate,
            log_interval=log_interval,
            export_weights=export_weights,
            settings=settings,
            snapshots=None if files is None else RunSnapshots(files),
        )
        if self._asked.arguments['half_life'] is None:
            self._implied.add('half_life')
        if update_interval is None:
            self._implied.add('update_interval')
        #: Whether to say at the start of training that updates are as rare as epochs or iterations.
        self._warns_of_rare_updates = update_interval is None and self.update_interval.unit != 'ba'

    @classmethod
    def labels_of(cls, arguments: Mapping[str, Any]) -> tuple[str, ...]:
        """The labels that averages will have if an EMA is built with ``arguments``."""
        return asked.labels_in(cls.name, arguments)

    def _check_run(self, state: State) -> None:
        super()._check_run(state)
        if self._warns_of_rare_updates:
            [(_, horizon)] = self._keeper.kept.values()
            assert horizon is not None  # the interval has its unit
            limits.warn_of_rare_updates(horizon, self._keeper.interval, ComposerRun(state))
            self._warns_of_rare_updates = False

    @property
    def half_life(self) -> Span | dict[str, Span] | None:
        """The half-life; None if something else makes the average. With labels, that of each average that has one."""
        return dict(self._asked.half_lives) if self._asked.is_labelled else self._asked.half_lives.get(self.name)

    @property
    def ema_start(self) -> Span:
        """The time before which nothing is averaged."""
        return self._keeper.start.span

    @property
    def ema_started(self) -> bool:
        """Whether ``ema_start`` has come."""
        return self._keeper.has_started

    @property
    def ema_model(self) -> Any:
        """The average, a :class:`~composer_ema.ShadowModel`; None before the Trainer is built.

        With labels, a dictionary of the averages by label. Setting it takes over a shadow, or copies whatever has named
        parameters and buffers; it replaces a single average that has no label of its own.
        """
        if self._asked.is_labelled:
            return {label: average.shadow for label, average in self._averages} or None
        return self._averages.shadow(self.name)

    @ema_model.setter
    def ema_model(self, average: Any) -> None:
        if self._asked.is_labelled and average is not None:
            raise ValueError(
                f'this EMA keeps averages by label, {", ".join(map(repr, self.labels))}, and ema_model replaces a '
                'single one. Load into one of them: ema.ema_model[label].load_state_dict(state).'
            )
        if average is not None and not isinstance(average, ShadowModel):
            if isinstance(average, type) or not all(
                hasattr(average, f'named_{kind}') for kind in ('parameters', 'buffers')
            ):
                raise TypeError(
                    f'ema_model must be a ShadowModel, or have named parameters and buffers, got {shown(average)}. '
                    'Pass a module, or ShadowModel.from_tensors(parameters, buffers).'
                )
            average = ShadowModel.from_tensors(
                {canonical_name(name): tensor for name, tensor in average.named_parameters()},
                {canonical_name(name): tensor for name, tensor in average.named_buffers()},
                **self._keeper.settings.as_arguments(),
            )
            average.num_updates = int(average.has_function)  # a function's first update would copy
        elif average is not None and self._keeper.settings.has_function and not average.has_function:
            raise ValueError(
                'this EMA averages by a function, the given shadow does not. '
                'Build the ShadowModel with the same avg_fn or multi_avg_fn.'
            )
        if (live := self._averages.live) is not None:
            self._averages.take_back(live)
        self._averages.take_over(self.name, average)
        self._keeper.has_started = average is not None

    @property
    def ema_weights_active(self) -> bool:
        """Whether the model holds the average now."""
        return self._averages.lent is not None

    @property
    def smoothing(self) -> float | dict[str, float | None] | None:
        """Share of the old average that an update keeps after one ``update_interval``; None where that differs.

        With labels, that of each average.
        """
        if self._asked.is_labelled:
            return {label: self._smoothing_of(label) for label in self.labels}
        return self._smoothing_of(self.name)

    def _smoothing_of(self, label: str) -> float | None:
        profile, horizon = self._keeper.kept[label]
        if not isinstance(profile, Exponential) or isinstance(profile, WarmedUp):
            return None
        if profile.unit == UPDATES:
            return 1.0 - profile.weight_at(0)
        interval = self.update_interval
        if profile.unit != interval.unit and (horizon is None or horizon.span.value != 0):
            return None
        return math.exp(profile.log_smoothing(Moment(interval.value, interval.value, 0)))

    def get_ema_model(self, model: nn.Module, average: str | None = None) -> nn.Module:
        """Puts an average into ``model`` and returns it.

        The model in training keeps its training weights in a stash, and gets them back from
        :meth:`get_training_model` or when training goes on. Any other model of the architecture is overwritten.

        Args:
            model: the model in training, or another of its architecture.
            average: the label of the average. Default: the first.

        Raises:
            RuntimeError: there is no average yet.
            ValueError: there is none of that label, or ``model`` does not fit. Nothing is written then.
        """
        label = self.labels[0] if average is None else plain.label('average', average, self.labels)
        return self._averages.put(label, model)


def _interval(update_interval: str | Time | None, wanted: Asked) -> Span:
    """The time between two updates; by default one batch, or what the half-life of a single average counts."""
    if update_interval is not None:
        return Span.parse(update_interval, name='update_interval', positive=True)
    units = [] if wanted.is_labelled else [span.unit for span in wanted.half_lives.values()]
    return Span(1, units[0] if units and units[0] in ('ep', 'iter') else 'ba')
