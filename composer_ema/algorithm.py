"""EMA as a Composer algorithm: each event of the Trainer becomes a call on a shadow; no tensor arithmetic here."""

from __future__ import annotations

import inspect
import logging
import math
import time
import warnings
import weakref
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from typing import Any, Literal

import torch
from composer.algorithms.swa import SWA as ComposerSWA
from composer.core import Algorithm, Event, State, Time
from composer.loggers import Logger
from torch import nn

from composer_ema import formats
from composer_ema.averages import exponential_weight, weight_from_smoothing
from composer_ema.clock import (
    CLOCK_UNITS,
    Clock,
    has_crossed,
    knows_fractions,
    read_clock,
    resolve_share,
    run_length,
    words,
)
from composer_ema.naming import Inventory, Selection, check_same
from composer_ema.shadow import (
    BufferMode,
    Rounding,
    ShadowModel,
    check_buffer_mode,
    check_rounding,
    check_seed,
    parse_device,
    parse_dtype,
)
from composer_ema.sharding import canonical_name, is_sharded, unwrap
from composer_ema.spans import Span

log = logging.getLogger(__name__)

Weights = Literal['ema', 'training']


class _Default(str):
    """A default that can be told from the same value given by the user."""


_DEFAULT_HALF_LIFE = _Default('1000ba')

# A pass over evaluators opens and closes; what happens inside it must find the weights that the evaluator asks for,
# also after a prediction that a callback slipped in.
_PASS_OPENS = frozenset({Event.EVAL_BEFORE_ALL, Event.EVAL_STANDALONE_START})
_PASS_CLOSES = frozenset({Event.EVAL_AFTER_ALL, Event.EVAL_STANDALONE_END})
_EVALUATION_GOES_ON = frozenset({Event.EVAL_BATCH_START, Event.EVAL_BEFORE_FORWARD, Event.EVAL_BATCH_END})
# Training or saving goes on: the model must hold the training weights, also after an evaluation that raised.
_TRAINING_GOES_ON = frozenset({
    Event.AFTER_LOAD, Event.FIT_START, Event.ITERATION_START, Event.EPOCH_START, Event.BATCH_START, Event.BATCH_END,
    Event.EPOCH_END, Event.ITERATION_END, Event.FIT_END, Event.BATCH_CHECKPOINT, Event.EPOCH_CHECKPOINT,
    Event.ITERATION_CHECKPOINT,
})  # fmt: skip
_ALWAYS = frozenset({Event.INIT, Event.AFTER_LOAD, Event.FIT_START, Event.FIT_END, Event.EVAL_START, Event.EVAL_END})
_ALWAYS |= _PASS_OPENS | _PASS_CLOSES | {Event.PREDICT_START, Event.PREDICT_END, Event.BEFORE_LOAD}


class EMA(Algorithm):
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
        buffers: ``'average'`` averages floating buffers, such as BatchNorm's statistics; ``'copy'`` takes the latest.
            Integer and boolean buffers are always copied.
        include: regular expressions searched for in parameter and buffer names; only matches are averaged.
        exclude: regular expressions that take names out again.
        shadow_dtype: floating dtype of the average, or its name. Default: float32 for 16-bit weights, else their own.
        shadow_device: where the average is kept. Default: beside the weights.
        skip_nonfinite: a weight that is NaN or infinite leaves its average alone; logs ``ema/skipped_elements``.
        rounding: ``'nearest'`` or ``'stochastic'``, for an average kept in bfloat16.
        seed: key of the random bits of ``rounding='stochastic'``.
        evaluate_with: ``'ema'`` or ``'training'`` by evaluator label, for example ``{'eval_training': 'training'}``.
            Labels not named, and prediction (label ``'predict'``), see the average.
        log_interval: time string between two values of ``ema/relative_distance``; None logs none. Each value makes
            the host wait for the device once. Default: ``'1ep'``.

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

    Logs ``ema/smoothing`` and ``ema/num_updates`` at every update.

    Example:
        .. code:: python

            from composer import Trainer
            from composer_ema import EMA

            trainer = Trainer(model=model, train_dataloader=loader, max_duration='6ep', algorithms=[EMA('100ba')])
            trainer.fit()
    """

    def __init__(
        self,
        half_life: str | Time | None = _DEFAULT_HALF_LIFE,
        smoothing: float | None = None,
        ema_start: str | Time = '0.0dur',
        update_interval: str | Time | None = None,
        *,
        buffers: BufferMode = 'average',
        include: str | Sequence[str] | None = None,
        exclude: str | Sequence[str] | None = None,
        shadow_dtype: str | torch.dtype | None = None,
        shadow_device: str | torch.device | None = None,
        skip_nonfinite: bool = False,
        rounding: Rounding = 'nearest',
        seed: int = 0,
        evaluate_with: Mapping[str, Weights] | None = None,
        log_interval: str | Time | None = '1ep',
    ) -> None:
        self._fixed_weight: float | None = None
        self.half_life: Span | None = None
        if smoothing is not None:
            if half_life is not None and half_life is not _DEFAULT_HALF_LIFE:
                raise ValueError(
                    f'pass either half_life or smoothing, got half_life={str(half_life)!r} and smoothing={smoothing}.'
                )
            self._fixed_weight = weight_from_smoothing(smoothing)
        elif half_life is None:
            raise ValueError("either half_life or smoothing must be given, got None for both. Pass half_life='1000ba'.")
        else:
            self.half_life = Span.parse(half_life, name='half_life', units=('ba', 'ep', 'sp', 'tok', 'iter', 'dur'))
        self.ema_start = Span.parse(ema_start, name='ema_start', units=('ba', 'ep', 'sp', 'tok', 'dur'))
        self.update_interval = self._parse_update_interval(update_interval)
        self.log_interval = None
        if log_interval is not None:
            self.log_interval = Span.parse(log_interval, name='log_interval', positive=True)
        Selection(include, exclude)
        self._options: dict[str, Any] = {
            'buffers': check_buffer_mode(buffers),
            'include': include,
            'exclude': exclude,
            'dtype': parse_dtype(shadow_dtype),
            'device': parse_device(shadow_device),
            'skip_nonfinite': skip_nonfinite,
            'rounding': check_rounding(rounding, parse_dtype(shadow_dtype)),
            'seed': check_seed(seed),
        }
        self.evaluate_with = _check_evaluate_with(evaluate_with)
        self._arguments = {
            'half_life': None if self.half_life is None else str(self.half_life),
            'smoothing': None if smoothing is None else float(smoothing),
            'ema_start': str(self.ema_start),
            'update_interval': None if update_interval is None else str(self.update_interval),
            'buffers': buffers,
            'include': _plain(include),
            'exclude': _plain(exclude),
            'shadow_dtype': None if shadow_dtype is None else str(self._options['dtype']).removeprefix('torch.'),
            'shadow_device': None if shadow_device is None else str(self._options['device']),
            'skip_nonfinite': skip_nonfinite,
            'rounding': rounding,
            'seed': seed,
            'evaluate_with': self.evaluate_with or None,
            'log_interval': None if self.log_interval is None else str(self.log_interval),
        }

        self.update_seconds = 0.0
        self.ema_started = False
        self._shadow: ShadowModel | None = None
        self._model: weakref.ref[nn.Module] | None = None
        self._last_update: Clock | None = None
        self._open_passes = 0
        self._overlap = True
        self._state_for_init: Mapping[str, Any] | None = None
        self._loaded_config: Mapping[str, Any] = {}
        self._update_event = _event_of(self.update_interval)
        self._log_event = None if self.log_interval is None else _event_of(self.log_interval)

    # What the built-in offers

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
                **self._options,
            )
        self._shadow, self._last_update = average, None
        self.ema_started = average is not None

    @property
    def ema_weights_active(self) -> bool:
        return self._shadow is not None and self._shadow.is_swapped

    @property
    def smoothing(self) -> float | None:
        if self._fixed_weight is not None:
            return 1.0 - self._fixed_weight
        assert self.half_life is not None
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
        shadow = self._require_shadow()
        if not self._is_live(model):
            shadow.copy_to(model)
        elif not shadow.is_swapped:
            shadow.swap_in(model)
        return model

    def get_training_model(self, model: nn.Module) -> nn.Module:
        """Puts the training weights into ``model`` and returns it. The average stays where it is."""
        shadow = self._require_shadow()
        if self._is_live(model):
            if shadow.is_swapped:
                shadow.swap_out(model)
            return model
        live = None if self._model is None else self._model()
        if live is None:
            raise RuntimeError('the model in training is gone, and its weights with it. Load them from a checkpoint.')
        weights, tensors = shadow.training_weights(live), Inventory.of(unwrap(model)).tensors()
        tensors = {name: tensors[name] for name in weights if name in tensors}
        check_same('the given model', weights, tensors, remedy='Nothing was changed. Pass the same architecture.')
        with torch.no_grad():
            for name, weight in weights.items():
                tensors[name].copy_(weight)
        return model

    # Events

    def match(self, event: Event, state: State) -> bool:
        """Whether :meth:`apply` has something to do at ``event``. Looks only; changes nothing."""
        if event in _ALWAYS:
            return True
        if self._shadow is None:
            return event is self._update_event and self._is_update_due(state)
        if event is Event.AFTER_TRAIN_BATCH:
            return self._shadow.is_pending
        if event in _EVALUATION_GOES_ON:
            return self._open_passes > 0 and self.ema_started and not self._shadow.is_swapped
        if event in _TRAINING_GOES_ON and self._shadow.is_swapped:
            return True
        return (event is self._update_event and self._is_update_due(state)) or (
            event is self._log_event and self._is_log_due(state)
        )

    def apply(self, event: Event, state: State, logger: Logger) -> None:
        if event is Event.INIT:
            self._create(state)
        elif event is Event.BEFORE_LOAD:
            self._follow_surgery(state.model)
        elif event is Event.AFTER_TRAIN_BATCH:
            self._require_shadow().wait()  # joins the fork of the last update before the optimizer writes
        elif event in _TRAINING_GOES_ON:
            self._return_to_training(state)
            if event is Event.FIT_START:
                self._prepare_fit(state)
            elif event is Event.FIT_END and self._shadow is not None:
                self._share_buffers()  # waits, too: whoever writes the weights after training finds the update done
                if not self.ema_started:
                    _warn(
                        f"training ended before the first update: ema_start='{self.ema_start}', "
                        f"update_interval='{self.update_interval}'. Evaluation uses the training weights. "
                        'Start earlier, or update more often.'
                    )
            if event in (Event.BATCH_END, Event.EPOCH_END, Event.ITERATION_END):
                self._update_and_log(event, state, logger)
        elif event in _PASS_OPENS:
            self._open_passes += 1
            self._use(self._weights_for_pass(state), state)
        elif event is Event.PREDICT_START:
            self._use(self._weights_for('predict'), state)
        elif (
            event is Event.EVAL_START or event in _EVALUATION_GOES_ON or (event is Event.EVAL_END and self._open_passes)
        ):
            self._use(self._weights_for(state.dataloader_label), state)
        elif event in _PASS_CLOSES or event in (Event.EVAL_END, Event.PREDICT_END):
            # Whether a pass goes on around this one cannot be told from one that raised; it takes the average back.
            self._open_passes -= event in _PASS_CLOSES and self._open_passes > 0
            self._use('training', state)

    def _create(self, state: State) -> None:
        namesakes = [a for a in state.algorithms if type(a).__qualname__ == type(self).__qualname__]
        if len(namesakes) > 1:
            raise ValueError(
                f'{len(namesakes)} algorithms called {type(self).__qualname__} in one Trainer, {namesakes}: '
                'a checkpoint would keep the state of only one. Pass one.'
            )
        _refuse_sharded(state)
        # Composer's SWA writes the weights at the event that updates the average, while a side stream may read them.
        self._overlap = not any(isinstance(algorithm, ComposerSWA) for algorithm in state.algorithms)
        self._build_shadow(state.model)
        self.ema_started, self._last_update, self._open_passes, self.update_seconds = False, None, 0, 0.0
        if not any(True for _ in self._require_shadow().named_parameters()):
            _warn('no trainable parameter to average yet: all selected ones are frozen. They join when unfrozen.')
        self._loaded_config = {}
        if self._state_for_init is not None:
            loaded, self._state_for_init = self._state_for_init, None
            self.load_state_dict(loaded)

    def _build_shadow(self, model: nn.Module) -> None:
        self._shadow = ShadowModel(model, overlap=self._overlap, **self._options)
        self._model = weakref.ref(unwrap(model))

    def _follow_surgery(self, model: nn.Module) -> None:
        """Builds the shadow anew where another algorithm has replaced layers and nothing has been averaged yet."""
        try:
            self._require_shadow().resolve(model)
        except ValueError:
            if self.ema_started:
                raise
            self._build_shadow(model)

    def _prepare_fit(self, state: State) -> None:
        if self._shadow is None:
            self._create(state)
        _refuse_sharded(state)
        self._check_run(state)
        self._warn_of_other_horizon()
        self._follow_surgery(state.model)
        self._model = weakref.ref(unwrap(state.model))
        now = read_clock(state)
        if self._last_update is not None and any(self._last_update[unit] > now[unit] for unit in CLOCK_UNITS):
            self._last_update = now  # the run's clock was set back: time passes from here
        log.info('EMA with %s: %s', self._horizon(), self._shadow)

    def _check_run(self, state: State) -> None:
        """Refuses settings that cannot work in this run, and warns of those that will have no effect."""
        times = {'half_life': self.half_life, 'update_interval': self.update_interval}
        times |= {'ema_start': self.ema_start, 'log_interval': self.log_interval}
        for name, span in times.items():
            if span is None or span.value == 0:
                continue
            resolved = resolve_share(span, state, name)
            if resolved.unit == 'iter' and state._iteration_length is None:
                raise ValueError(f"{name}='{span}' counts iterations, but this run has none. Pass epochs or batches.")
            is_whole = float(resolved.value).is_integer()
            if name == 'half_life':  # elapses by what passes between two updates
                is_whole = self._update_event is not Event.BATCH_END and resolved.unit == self.update_interval.unit
            if not is_whole and not knows_fractions(resolved.unit, state):
                raise ValueError(
                    f"{name}='{span}' needs parts of {words(resolved.unit)}, but the dataloader has no length. "
                    'Pass batches or samples, or set train_subset_num_batches.'
                )
        interval = resolve_share(self.update_interval, state, 'update_interval')
        start = resolve_share(self.ema_start, state, 'ema_start')
        self._warn_if_longer('update_interval', interval, state, 'no update will be made')
        self._warn_if_longer('ema_start', start, state, 'no average will be kept')
        if self.half_life is not None:
            half_life = resolve_share(self.half_life, state, 'half_life')
            self._warn_if_longer('half_life', half_life, state, 'the average will keep more than half of its start')
        if self.log_interval is not None and str(self.log_interval) != '1ep':
            log_interval = resolve_share(self.log_interval, state, 'log_interval')
            self._warn_if_longer('log_interval', log_interval, state, 'no distance will be logged')
        labels = [evaluator.label for evaluator in state.evaluators]
        for label in self.evaluate_with:
            if labels and label not in labels and label != 'predict':
                near = get_close_matches(label, labels, n=1) or labels
                _warn(
                    f'evaluate_with names the evaluator {label!r}, which this Trainer does not have. '
                    f'Did you mean {near[0]!r}? Its evaluators are {", ".join(labels)}.'
                )

    def _warn_if_longer(self, name: str, span: Span, state: State, effect: str) -> None:
        length = run_length(span.unit, state)
        if length is not None and span.value > length:
            _warn(
                f"{name}='{getattr(self, name)}' is longer than the run of {length:g} {words(span.unit)}: {effect}. "
                f"Pass a shorter {name}, for example a share of the run such as {name}='0.1dur'."
            )

    def _is_update_due(self, state: State) -> bool:
        if not self.ema_started:
            return self._has_start_come(state)
        return self._has_passed(self.update_interval, self._last_update, state, 'update_interval')

    def _is_log_due(self, state: State) -> bool:
        if self.log_interval is None or not self._has_average:
            return False
        return self._has_passed(self.log_interval, None, state, 'log_interval')

    def _has_start_come(self, state: State) -> bool:
        if self.ema_start.value == 0:
            return True
        start = resolve_share(self.ema_start, state, 'ema_start')
        return _read(start.unit, state, 'ema_start', self.ema_start) >= start.value - 1e-9

    def _has_passed(self, interval: Span, since: Clock | None, state: State, name: str) -> bool:
        span = resolve_share(interval, state, name)
        now = _read(span.unit, state, name, interval)
        if since is not None:
            earlier = since[span.unit]
        elif _event_of(interval) is Event.BATCH_END:
            earlier = _clock_before(state)[span.unit]
        else:
            earlier = now - 1  # the epoch or iteration that has just ended
        return has_crossed(earlier, now, span.value)

    def _update_and_log(self, event: Event, state: State, logger: Logger) -> None:
        began = time.perf_counter()
        if event is self._update_event and (not self.ema_started or self._is_update_due(state)):
            self._update(state, logger)
        if event is self._log_event and self._is_log_due(state):
            distance = self._require_shadow().relative_distance(state.model).item()
            logger.log_metrics({'ema/relative_distance': distance})
        self.update_seconds += time.perf_counter() - began

    def _update(self, state: State, logger: Logger) -> None:
        if self._shadow is None:
            self._create(state)
        shadow = self._require_shadow()
        now = read_clock(state)
        weight = self._weight(now, state) if self.ema_started else 1.0
        shadow.update(state.model, weight=weight)
        self.ema_started, self._last_update = True, now
        metrics = {'ema/smoothing': 1.0 - weight, 'ema/num_updates': shadow.num_updates}
        if self._options['skip_nonfinite']:
            metrics['ema/skipped_elements'] = shadow.poll_skipped()
        logger.log_metrics(metrics)

    def _weight(self, now: Clock, state: State) -> float:
        if self._fixed_weight is not None:
            return self._fixed_weight
        assert self.half_life is not None
        half_life = resolve_share(self.half_life, state, 'half_life')
        unit = half_life.unit
        _read(unit, state, 'half_life', self.half_life)
        if self._last_update is not None:
            elapsed = now[unit] - self._last_update[unit]
        elif unit == self.update_interval.unit:
            # An average that came without its clock: the built-in's, or one that the user set.
            elapsed = self.update_interval.value
        else:
            elapsed = now[unit] - _clock_before(state)[unit]
        return exponential_weight(max(elapsed, 0.0), half_life.value)

    # Swapping

    @property
    def _has_average(self) -> bool:
        return self._shadow is not None and self.ema_started

    def _weights_for(self, label: str | None) -> Weights:
        return self.evaluate_with.get(label or '', 'ema')

    def _weights_for_pass(self, state: State) -> Weights:
        """What callbacks see before the first evaluator has chosen: the average, unless no evaluator wants it."""
        labels = [evaluator.label for evaluator in state.evaluators]
        return 'training' if labels and all(self._weights_for(label) == 'training' for label in labels) else 'ema'

    def _use(self, weights: Weights, state: State) -> None:
        shadow = self._require_shadow()
        if weights == 'training' and shadow.is_swapped:
            shadow.swap_out(state.model)
        elif weights == 'ema' and self._has_average and not shadow.is_swapped:
            self._share_buffers()
            shadow.swap_in(state.model)

    def _return_to_training(self, state: State) -> None:
        self._open_passes = 0
        if self._shadow is not None:
            self._use('training', state)

    def _share_buffers(self) -> None:
        """Under DDP, gives every rank the averaged buffers of rank 0, whose weights the checkpoint keeps."""
        shadow = self._require_shadow()
        shadow.wait()
        shadow.broadcast_buffers()

    def _is_live(self, model: nn.Module) -> bool:
        return self._model is not None and self._model() is unwrap(model)

    def _require_shadow(self) -> ShadowModel:
        if self._shadow is None:
            raise RuntimeError('there is no average yet. Build a Trainer with this algorithm first.')
        return self._shadow

    # State

    def state_dict(self) -> dict[str, Any]:
        """The average, its counters and, while swapped, the training weights; see :mod:`composer_ema.formats`."""
        state = super().state_dict()
        config = {**self._arguments, 'update_interval': str(self.update_interval)}
        state.update(version=formats.VERSION, config=config, started=self.ema_started, averages={})
        if self._shadow is not None:
            average = self._shadow.state_dict()
            if 'training_weights' in average:
                state['training_weights'] = average.pop('training_weights')
            state['averages'][formats.AVERAGE] = {**average, 'last_update': self._last_update}
        return state

    def load_state_dict(self, state: Mapping[str, Any], strict: bool = False) -> None:
        """Loads this class's state, or either format of Composer's built-in EMA; checks all of it first.

        A state saved while the model held the average leaves the model swapped; the Trainer's next event, AFTER_LOAD,
        restores its training weights.

        Raises:
            ValueError: names, shapes, or a version that do not fit, all listed. Nothing is changed then.
        """
        del strict  # Composer never passes it, and half a state is no use
        if self._shadow is None:
            self._state_for_init = state
            return
        live = None if self._model is None else self._model()
        if live is not None:
            self._follow_surgery(live)
        inventory = Inventory() if live is None else Inventory.of(live)
        slot = {name: tensor.detach() for name, tensor in inventory.tensors().items()}
        tracked = {name for name, _ in self._shadow.named_parameters()}
        upgraded = formats.upgrade(state, model_slot=slot, tracked=tracked, buffers=inventory.buffers)
        if not upgraded['averages']:
            return
        average = upgraded['averages'][formats.AVERAGE]
        last_update = _check_clock(average['last_update'])
        stash = {key: weights for key, weights in upgraded.items() if key == 'training_weights'}
        self._shadow.load_state_dict({**average, **stash})
        self.ema_started, self._last_update = upgraded['started'], last_update
        self._loaded_config = upgraded['config']

    def _warn_of_other_horizon(self) -> None:
        config, self._loaded_config = self._loaded_config, {}
        for name in ('half_life', 'smoothing'):
            if name in config and config[name] != self._arguments[name]:
                _warn(
                    f'the checkpoint was averaged with {name}={config[name]!r}, this run continues with '
                    f'{name}={self._arguments[name]!r}.'
                )

    def __getstate__(self) -> dict[str, Any]:
        """For pickle and deepcopy: without the tie to the model in training."""
        return {**self.__dict__, '_model': None}

    def __repr__(self) -> str:
        parameters = inspect.signature(EMA).parameters
        arguments = (
            f'{name}={value!r}'
            for name, value in self._arguments.items()
            if value != parameters[name].default and not (name == 'half_life' and value is None)
        )
        return f'EMA({", ".join(arguments)})'

    def _horizon(self) -> str:
        return f'half_life={self.half_life}' if self.half_life is not None else f'smoothing={self.smoothing}'

    def _parse_update_interval(self, update_interval: str | Time | None) -> Span:
        if update_interval is not None:
            return Span.parse(update_interval, name='update_interval', positive=True)
        unit = self.half_life.unit if self.half_life is not None else 'ba'
        return Span(1, unit if unit in ('ba', 'ep', 'iter') else 'ba')


def _event_of(interval: Span) -> Event:
    """The event at which whole epochs and iterations have passed; all else is looked at after every batch."""
    if interval.value == int(interval.value):
        return {'ep': Event.EPOCH_END, 'iter': Event.ITERATION_END}.get(interval.unit, Event.BATCH_END)
    return Event.BATCH_END


def _refuse_sharded(state: State) -> None:
    if state.fsdp_config is not None or is_sharded(state.model):
        raise NotImplementedError(
            'this release does not average sharded models (FSDP, tensor parallel). Train with DDP, or without EMA.'
        )


def _warn(message: str) -> None:
    warnings.warn(message, stacklevel=2)


def _read(unit: str, state: State, name: str, span: Span) -> float:
    """The time so far in ``unit``; raises where the run does not count it."""
    now = read_clock(state)
    if unit == 'tok' and now['tok'] == 0 and now['ba'] > 0:
        raise ValueError(
            f"{name}='{span}' counts tokens, but the dataloader reports none. "
            'Pass samples or batches, or a DataSpec with get_num_tokens_in_batch.'
        )
    return now[unit]


def _clock_before(state: State) -> Clock:
    """The clock one batch, epoch or iteration ago: zero before the first."""
    previous = state.previous_timestamp
    return dict.fromkeys(CLOCK_UNITS, 0) if previous is None else read_clock(state, previous)


def _check_evaluate_with(evaluate_with: Mapping[str, Weights] | None) -> dict[str, Weights]:
    if evaluate_with is None:
        return {}
    if not isinstance(evaluate_with, Mapping):
        raise TypeError(f"evaluate_with must map labels to weights, such as {{'eval': 'ema'}}, got {evaluate_with!r}.")
    for label, weights in evaluate_with.items():
        if not isinstance(label, str):
            raise TypeError(
                f'evaluate_with maps labels, which are strings, got {label!r}. Pass the label of an evaluator.'
            )
        if weights not in ('ema', 'training'):
            raise ValueError(f"evaluate_with[{label!r}] must be 'ema' or 'training', got {weights!r}.")
    return dict(evaluate_with)


def _check_clock(clock: Any) -> Clock | None:
    if clock is None:
        return None
    is_clock = isinstance(clock, Mapping) and all(_is_time(clock.get(unit)) for unit in CLOCK_UNITS)
    if not is_clock:
        raise ValueError(f'last_update of the saved EMA state must give {", ".join(CLOCK_UNITS)}, got {clock!r}.')
    return dict(clock)


def _is_time(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value < math.inf


def _plain(patterns: str | Sequence[str] | None) -> str | list[str] | None:
    return patterns if patterns is None or isinstance(patterns, str) else list(patterns)
