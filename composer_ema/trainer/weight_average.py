"""What every average of the weights does in a Composer run: events, swapping and state; no tensor arithmetic here.

Invariant: outside of evaluation and prediction the model holds the training weights.
"""

from __future__ import annotations

import functools
import inspect
import logging
import math
import time
import warnings
import weakref
from abc import abstractmethod
from collections.abc import Mapping
from difflib import get_close_matches
from typing import Any, ClassVar

import torch
from composer.algorithms.swa import SWA as ComposerSWA
from composer.callbacks import ExportForInferenceCallback
from composer.core import Algorithm, Event, State, Time
from composer.loggers import Logger
from torch import nn

from composer_ema.checkpoints import formats
from composer_ema.model.inventory import Inventory
from composer_ema.model.names import check_same
from composer_ema.model.sharding import is_sharded, unwrap
from composer_ema.settings import Settings, settings_of
from composer_ema.shadow.shadow_model import ShadowModel
from composer_ema.spans import ArgumentError, Span
from composer_ema.trainer.clock import (
    CLOCK_UNITS,
    Clock,
    has_crossed,
    knows_fractions,
    read_clock,
    resolve_share,
    run_length,
    words,
)

log = logging.getLogger(__name__)

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


class WeightAverage(Algorithm):
    """Keeps an average of the model's weights beside the model and lends it to evaluation and prediction.

    A subclass says which weight an update gets. The arguments that all of them share are described at
    :class:`composer_ema.EMA`.

    Attributes:
        name: what metrics, evaluators and the state call the average: ``'ema'``.
        update_seconds: seconds of host time spent in updates and distances so far, their whole cost on a CPU.
    """

    name: ClassVar[str]
    #: Arguments whose values are compared with those of a loaded checkpoint.
    horizon: ClassVar[tuple[str, ...]]
    #: Names of times that elapse between two updates, so that their parts need not be counted between those.
    _elapsing: ClassVar[frozenset[str]] = frozenset()
    #: Algorithms that cannot be in one Trainer with this one.
    rivals: ClassVar[tuple[type[Algorithm], ...]]

    def __init__(
        self,
        arguments: dict[str, Any],
        *,
        start: str | Time,
        update_interval: Span,
        evaluate_with: Mapping[str, str] | None,
        log_interval: str | Time | None,
        export_weights: str,
        settings: Mapping[str, Any],
    ) -> None:
        self._start = Span.parse(start, name=f'{self.name}_start', units=('ba', 'ep', 'sp', 'tok', 'dur'))
        self.update_interval = update_interval
        self.log_interval = None
        if log_interval is not None:
            self.log_interval = Span.parse(log_interval, name='log_interval', positive=True)
        self._settings = Settings.of(settings)
        self.evaluate_with = _check_evaluate_with(evaluate_with, self.name)
        if export_weights not in (self.name, 'training'):
            raise ValueError(f"export_weights must be {self.name!r} or 'training', got {export_weights!r}.")
        self.export_weights = export_weights
        self._arguments = {
            **arguments,
            f'{self.name}_start': str(self._start),
            'update_interval': str(self.update_interval),
            **self._settings.as_plain(settings_of(type(self))),
            'evaluate_with': self.evaluate_with or None,
            'export_weights': export_weights,
            'log_interval': None if self.log_interval is None else str(self.log_interval),
        }

        self.update_seconds = 0.0
        self._has_started = False
        self._shadow: ShadowModel | None = None
        self._model: weakref.ref[nn.Module] | None = None
        self._last_update: Clock | None = None
        self._open_passes = 0
        self._overlap = True
        self._state_for_init: Mapping[str, Any] | None = None
        self._loaded_config: Mapping[str, Any] = {}
        self._update_event = event_of(self.update_interval)
        self._log_event = None if self.log_interval is None else event_of(self.log_interval)

    # What differs from average to average

    @abstractmethod
    def _weight(self, now: Clock, state: State) -> float:
        """The weight of the current parameters in the next update, in [0, 1]."""

    @abstractmethod
    def _describe(self) -> str:
        """What is averaged how, for the log."""

    def _times(self) -> dict[str, Span | None]:
        """Every argument that is a time, by name."""
        return {
            'update_interval': self.update_interval,
            f'{self.name}_start': self._start,
            'log_interval': self.log_interval,
        }

    def _metrics(self, weight: float) -> dict[str, float]:
        """What an update of ``weight`` logs besides the number of updates."""
        del weight
        return {}

    # The two sets of weights

    def _lend_average(self, model: nn.Module) -> nn.Module:
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
            return self._open_passes > 0 and self._has_started and not self._shadow.is_swapped
        if event in _TRAINING_GOES_ON and self._shadow.is_swapped:
            return True
        return (event is self._update_event and self._is_update_due(state)) or (
            event is self._log_event and self._is_log_due(state)
        )

    def apply(self, event: Event, state: State, logger: Logger) -> None:
        """Does what the event asks for; see :meth:`match`."""
        if event is Event.INIT:
            self._create(state)
        elif event is Event.BEFORE_LOAD:
            self._follow_surgery(state.model)
        elif event is Event.AFTER_TRAIN_BATCH:
            self._require_shadow().wait_for_reads()  # joins the last update before the optimizer writes
        elif event in _TRAINING_GOES_ON:
            self._return_to_training(state)
            if event is Event.FIT_START:
                self._prepare_fit(state)
            elif event is Event.FIT_END and self._shadow is not None:
                self._share_buffers()  # waits, too: whoever writes the weights after training finds the update done
                if not self._has_started:
                    warn(
                        f"training ended before the first update: {self.name}_start='{self._start}', "
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
        self._refuse_rivals(state)
        _refuse_sharded(state)
        # Composer's SWA writes the weights at the event that updates the average, while a side stream may read them.
        self._overlap = not any(isinstance(algorithm, ComposerSWA) for algorithm in state.algorithms)
        self._build_shadow(state.model)
        self._has_started, self._last_update, self._open_passes, self.update_seconds = False, None, 0, 0.0
        if not any(True for _ in self._require_shadow().named_parameters()):
            warn('no trainable parameter to average yet: all selected ones are frozen. They join when unfrozen.')
        self._loaded_config = {}
        if self._state_for_init is not None:
            loaded, self._state_for_init = self._state_for_init, None
            self.load_state_dict(loaded)

    def _refuse_rivals(self, state: State) -> None:
        namesakes = [a for a in state.algorithms if type(a).__qualname__ == type(self).__qualname__]
        if len(namesakes) > 1:
            raise ValueError(
                f'{len(namesakes)} algorithms called {type(self).__qualname__} in one Trainer, {namesakes}: '
                'a checkpoint would keep the state of only one. Pass one.'
            )
        rivals = [a for a in state.algorithms if a is not self and isinstance(a, self.rivals)]
        if rivals:
            raise ValueError(
                f'{type(self).__qualname__} and {type(rivals[0]).__module__}.{type(rivals[0]).__qualname__} in one '
                'Trainer: both keep an average, and an evaluation could use only one. Pass one to the Trainer, and for '
                'a second average keep a composer_ema.ShadowModel in a callback of yours.'
            )

    def _build_shadow(self, model: nn.Module) -> None:
        self._shadow = ShadowModel(model, overlap=self._overlap, **self._settings.as_arguments())
        self._model = weakref.ref(unwrap(model))

    def _follow_surgery(self, model: nn.Module) -> None:
        """Builds the shadow anew where another algorithm has replaced layers and nothing has been averaged yet."""
        try:
            self._require_shadow().resolve(model)
        except ValueError:
            if self._has_started:
                raise
            self._build_shadow(model)

    def _prepare_fit(self, state: State) -> None:
        if self._shadow is None:
            self._create(state)
        _refuse_sharded(state)
        self._check_run(state)
        self._warn_of_other_arguments()
        self._follow_surgery(state.model)
        if self.export_weights != 'training':
            self._lend_to_exporters(state)
        self._model = weakref.ref(unwrap(state.model))
        now = read_clock(state)
        if self._last_update is not None and any(self._last_update[unit] > now[unit] for unit in CLOCK_UNITS):
            self._last_update = now  # the run's clock was set back: time passes from here
        log.info('%s with %s: %s', type(self).__name__, self._describe(), self._shadow)

    def _check_run(self, state: State) -> None:
        """Refuses settings that cannot work in this run, and warns of those that will have no effect."""
        for name, span in self._times().items():
            if span is None or span.value == 0:
                continue
            resolved = resolve_share(span, state, name)
            if resolved.unit == 'iter' and state._iteration_length is None:
                message = f"{name}='{span}' counts iterations, but this run has none. Pass epochs or batches."
                raise ArgumentError(message, name)
            is_whole = float(resolved.value).is_integer()
            if name in self._elapsing:  # elapse by what passes between two updates
                is_whole = self._update_event is not Event.BATCH_END and resolved.unit == self.update_interval.unit
            if not is_whole and not knows_fractions(resolved.unit, state):
                raise ArgumentError(
                    f"{name}='{span}' needs parts of {words(resolved.unit)}, but the dataloader has no length. "
                    'Pass batches or samples, or set train_subset_num_batches.',
                    name,
                )
        interval = resolve_share(self.update_interval, state, 'update_interval')
        start_name = f'{self.name}_start'
        start = resolve_share(self._start, state, start_name)
        self._warn_if_longer('update_interval', interval, state, 'no update will be made')
        self._warn_if_longer(start_name, start, state, 'no average will be kept')
        if self.log_interval is not None and str(self.log_interval) != '1ep':
            log_interval = resolve_share(self.log_interval, state, 'log_interval')
            self._warn_if_longer('log_interval', log_interval, state, 'no distance will be logged')
        labels = [evaluator.label for evaluator in state.evaluators]
        for label in self.evaluate_with:
            if labels and label not in labels and label != 'predict':
                near = get_close_matches(label, labels, n=1) or labels
                warn(
                    f'evaluate_with names the evaluator {label!r}, which this Trainer does not have. '
                    f'Did you mean {near[0]!r}? Its evaluators are {", ".join(labels)}.'
                )

    def _warn_if_longer(self, name: str, span: Span, state: State, effect: str) -> None:
        length = run_length(span.unit, state)
        if length is not None and span.value > length:
            warn(
                f"{name}='{self._times()[name]}' is longer than the run of {length:g} {words(span.unit)}: {effect}. "
                f"Pass a shorter {name}, for example a share of the run such as {name}='0.1dur'."
            )

    def _is_update_due(self, state: State) -> bool:
        if not self._has_started:
            return self._has_start_come(state)
        return self._has_passed(self.update_interval, self._last_update, state, 'update_interval')

    def _is_log_due(self, state: State) -> bool:
        if self.log_interval is None or not self._has_average:
            return False
        return self._has_passed(self.log_interval, None, state, 'log_interval')

    def _has_start_come(self, state: State) -> bool:
        if self._start.value == 0:
            return True
        name = f'{self.name}_start'
        start = resolve_share(self._start, state, name)
        return read(start.unit, state, name, self._start) >= start.value - 1e-9

    def _has_passed(self, interval: Span, since: Clock | None, state: State, name: str) -> bool:
        span = resolve_share(interval, state, name)
        now = read(span.unit, state, name, interval)
        if since is not None:
            earlier = since[span.unit]
        elif event_of(interval) is Event.BATCH_END:
            earlier = clock_before(state)[span.unit]
        else:
            earlier = now - 1  # the epoch or iteration that has just ended
        return has_crossed(earlier, now, span.value)

    def _update_and_log(self, event: Event, state: State, logger: Logger) -> None:
        began = time.perf_counter()
        if event is self._update_event and (not self._has_started or self._is_update_due(state)):
            self._update(state, logger)
        if event is self._log_event and self._is_log_due(state):
            distance = self._require_shadow().relative_distance(state.model).item()
            logger.log_metrics({f'{self.name}/relative_distance': distance})
        self.update_seconds += time.perf_counter() - began

    def _update(self, state: State, logger: Logger) -> None:
        if self._shadow is None:
            self._create(state)
        shadow = self._require_shadow()
        now = read_clock(state)
        if shadow.has_function:
            shadow.update(state.model)
            metrics = {}
        else:
            weight = self._weight(now, state) if self._has_started else 1.0
            shadow.update(state.model, weight=weight)
            metrics = self._metrics(weight)
        self._has_started, self._last_update = True, now
        metrics[f'{self.name}/num_updates'] = shadow.num_updates
        if self._settings.skip_nonfinite:
            metrics[f'{self.name}/skipped_elements'] = shadow.poll_skipped()
        logger.log_metrics(metrics)

    # Swapping

    @property
    def _has_average(self) -> bool:
        return self._shadow is not None and self._has_started

    def _weights_for(self, label: str | None) -> str:
        return self.evaluate_with.get(label or '', self.name)

    def _weights_for_pass(self, state: State) -> str:
        """What callbacks see before the first evaluator has chosen: the average, unless no evaluator wants it."""
        labels = [evaluator.label for evaluator in state.evaluators]
        return 'training' if labels and all(self._weights_for(label) == 'training' for label in labels) else self.name

    def _use(self, weights: str, state: State) -> None:
        shadow = self._require_shadow()
        if weights == 'training' and shadow.is_swapped:
            shadow.swap_out(state.model)
        elif weights != 'training' and self._has_average and not shadow.is_swapped:
            self._share_buffers()
            shadow.swap_in(state.model)

    def _lend_to_exporters(self, state: State) -> None:
        exporters = [callback for callback in state.callbacks if isinstance(callback, ExportForInferenceCallback)]
        if not exporters:
            warn(
                f'export_weights={self.export_weights!r} has no effect: no callback of this Trainer exports the model. '
                'Add ExportForInferenceCallback, or leave export_weights out.'
            )
        for exporter in exporters:
            # It exports at FIT_END, after the algorithms and with no event in between.
            exporter.export_model = functools.partial(self._export, exporter)

    def _export(self, exporter: ExportForInferenceCallback, state: State, logger: Logger) -> None:
        is_lent = self._has_average and not self._require_shadow().is_swapped
        if is_lent:
            self._use(self.name, state)
        try:
            type(exporter).export_model(exporter, state, logger)
        finally:
            if is_lent:
                self._use('training', state)

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

    @property
    def _is_by_function(self) -> bool:
        return self._settings.has_function

    def _require_shadow(self) -> ShadowModel:
        if self._shadow is None:
            raise RuntimeError('there is no average yet. Build a Trainer with this algorithm first.')
        return self._shadow

    # State

    def state_dict(self) -> dict[str, Any]:
        """The average, its counters and, while swapped, the training weights; see ``checkpoints.formats``."""
        state = super().state_dict()
        config = {**self._arguments, 'update_interval': str(self.update_interval)}
        state.update(version=formats.VERSION, config=config, started=self._has_started, averages={})
        if self._shadow is not None:
            average = self._shadow.state_dict()
            if 'training_weights' in average:
                state['training_weights'] = average.pop('training_weights')
            state['averages'][self.name] = {**average, 'last_update': self._last_update}
        return state

    def load_state_dict(self, state: Mapping[str, Any], strict: bool = False) -> None:
        """Loads this class's state, or one of Composer's algorithm of the same name; checks all of it first.

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
        upgraded = formats.upgrade(state, model_slot=slot, tracked=tracked, buffers=inventory.buffers, name=self.name)
        if not upgraded['averages']:
            return
        average = upgraded['averages'][self.name]
        last_update = check_clock(average['last_update'], f'last_update of the saved {self.name.upper()} state')
        stash = {key: weights for key, weights in upgraded.items() if key == 'training_weights'}
        self._shadow.load_state_dict({**average, **stash})
        self._has_started, self._last_update = upgraded['started'], last_update
        self._loaded_config = upgraded['config']

    def _warn_of_other_arguments(self) -> None:
        config, self._loaded_config = self._loaded_config, {}
        for name in self.horizon:
            if name in config and config[name] != self._arguments[name]:
                warn(
                    f'the checkpoint was averaged with {name}={config[name]!r}, this run continues with '
                    f'{name}={self._arguments[name]!r}.'
                )

    def __getstate__(self) -> dict[str, Any]:
        """For pickle and deepcopy: without the tie to the model in training."""
        return {**self.__dict__, '_model': None}

    def __repr__(self) -> str:
        parameters, shown = inspect.signature(type(self)).parameters, self._shown()
        names = [name for name in parameters if name in shown and shown[name] != parameters[name].default]
        arguments = (f'{name}={shown[name]!r}' for name in names)
        return f'{type(self).__name__}({", ".join(arguments)})'

    def _shown(self) -> dict[str, Any]:
        """The arguments that may stand in the representation."""
        return self._arguments


def event_of(interval: Span) -> Event:
    """The event at which whole epochs and iterations have passed; all else is looked at after every batch."""
    if interval.value == int(interval.value):
        return {'ep': Event.EPOCH_END, 'iter': Event.ITERATION_END}.get(interval.unit, Event.BATCH_END)
    return Event.BATCH_END


def _refuse_sharded(state: State) -> None:
    if state.fsdp_config is not None or is_sharded(state.model):
        raise NotImplementedError(
            'this release does not average sharded models (FSDP, tensor parallel). Train with DDP, or without EMA.'
        )


def warn(message: str) -> None:
    """Warns of a setting, on behalf of whoever called."""
    warnings.warn(message, stacklevel=2)


def read(unit: str, state: State, name: str, span: Span) -> float:
    """The time so far in ``unit``; raises where the run does not count it."""
    now = read_clock(state)
    if unit == 'tok' and now['tok'] == 0 and now['ba'] > 0:
        raise ArgumentError(
            f"{name}='{span}' counts tokens, but the dataloader reports none. "
            'Pass samples or batches, or a DataSpec with get_num_tokens_in_batch.',
            name,
        )
    return now[unit]


def clock_before(state: State) -> Clock:
    """The clock one batch, epoch or iteration ago: zero before the first."""
    previous = state.previous_timestamp
    return dict.fromkeys(CLOCK_UNITS, 0) if previous is None else read_clock(state, previous)


def _check_evaluate_with(evaluate_with: Mapping[str, str] | None, name: str) -> dict[str, str]:
    if evaluate_with is None:
        return {}
    if not isinstance(evaluate_with, Mapping):
        raise TypeError(
            f"evaluate_with must map labels to weights, such as {{'eval': {name!r}}}, got {evaluate_with!r}."
        )
    for label, weights in evaluate_with.items():
        if not isinstance(label, str):
            raise TypeError(
                f'evaluate_with maps labels, which are strings, got {label!r}. Pass the label of an evaluator.'
            )
        if weights not in (name, 'training'):
            raise ValueError(f"evaluate_with[{label!r}] must be {name!r} or 'training', got {weights!r}.")
    return dict(evaluate_with)


def check_clock(clock: Any, what: str) -> Clock | None:
    """Returns the clock read from a state, or None where there is none; raises a ValueError if it is neither."""
    if clock is None:
        return None
    is_clock = isinstance(clock, Mapping) and all(_is_time(clock.get(unit)) for unit in CLOCK_UNITS)
    if not is_clock:
        raise ValueError(f'{what} must give {", ".join(CLOCK_UNITS)}, got {clock!r}.')
    return dict(clock)


def _is_time(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value < math.inf
