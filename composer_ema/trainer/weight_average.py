"""A Composer algorithm that turns a run's events into updates of averages, and lends an average to evaluation.

Invariant: outside of evaluation and prediction the model holds the training weights.
"""

from __future__ import annotations

import inspect
import logging
import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, ClassVar

from composer.algorithms.swa import SWA as ComposerSWA
from composer.core import Algorithm, Event, Precision, State, Time
from composer.loggers import Logger
from torch import Tensor, nn

from composer_ema.checkpoints import sharded_format
from composer_ema.model.names import listed
from composer_ema.model.wrappers import unwrap
from composer_ema.run import limits as times
from composer_ema.run.asked import TRAINING, check_weights
from composer_ema.run.average import Averages, Kept
from composer_ema.run.door import Door
from composer_ema.run.due import Interval, Start
from composer_ema.run.keeper import Keeper
from composer_ema.run.limits import Limit, warn
from composer_ema.run.shards import Outline
from composer_ema.run.steps import Steps
from composer_ema.settings import Settings, settings_of
from composer_ema.shadow import loan
from composer_ema.shadow.interrupts import Block
from composer_ema.spans import Span
from composer_ema.trainer import evaluation, limits, shards
from composer_ema.trainer.evaluation import Evaluation
from composer_ema.trainer.exporting import lend_to_exporters
from composer_ema.trainer.run import ComposerRun, look_at
from composer_ema.trainer.saving import save_training_weights
from composer_ema.trainer.snapshots import RunSnapshots

log = logging.getLogger(__name__)

# A key of the state, beside those of ``formats``.
_SNAPSHOTS = 'snapshots'

#: The log interval where nobody asks for one.
DEFAULT_LOG_INTERVAL = '1ep'

#: Of what these events are the end.
_UPDATES_AT = {Event.BATCH_END: 'ba', Event.EPOCH_END: 'ep', Event.ITERATION_END: 'iter'}
# Training or saving goes on: the model must hold the training weights, also after an evaluation that raised.
_TRAINING_GOES_ON = _UPDATES_AT.keys() | {
    Event.AFTER_LOAD, Event.FIT_START, Event.ITERATION_START, Event.EPOCH_START, Event.BATCH_START, Event.FIT_END,
    Event.BATCH_CHECKPOINT, Event.EPOCH_CHECKPOINT, Event.ITERATION_CHECKPOINT,
}  # fmt: skip
_TRAINING_STARTS = frozenset({Event.FIT_START, Event.BATCH_START})
# What decides whether there is something to do at an event; at any other event there never is. Composer asks some 20
# times a batch, and hashing an Event is what that costs, so match() looks one event up once.
_ALWAYS, _IF_PENDING, _IF_TAKEN, _IF_LENT = 'always', 'if pending', 'if taken', 'if lent'
_WHEN = {
    **dict.fromkeys(_TRAINING_GOES_ON, _IF_LENT),
    **_UPDATES_AT,  # if an update or a log line is due at the end of that
    **dict.fromkeys(evaluation.GOES_ON, _IF_TAKEN),
    Event.AFTER_TRAIN_BATCH: _IF_PENDING,
    **dict.fromkeys(evaluation.CHOOSES, _ALWAYS),
    **dict.fromkeys((Event.INIT, Event.BEFORE_LOAD, Event.AFTER_LOAD, Event.FIT_START, Event.FIT_END), _ALWAYS),
}


class WeightAverage(Door, Algorithm):
    """Keeps an average of the model's weights beside the model and lends it to evaluation and prediction.

    :class:`composer_ema.EMA` and :class:`composer_ema.SWA` choose the profile; everything else is here.

    Args:
        kept: by label, for each average the profile, which chooses the weight of each update, and the argument that
            gives the profile its unit of time. Without such an argument the profile counts updates; without a profile a
            function among the ``settings`` makes the average. The first one is evaluated where nothing else is said.
        arguments: what only the subclass takes, in plain types, for the state and the representation.
        start: time string before which nothing is averaged.
        update_interval: time between two updates.
        evaluate_with, evaluate, log_interval, export_weights: as for :class:`composer_ema.EMA`, with ``name`` for
            ``'ema'``.
        settings: which tensors are averaged and how; see :class:`composer_ema.settings.Settings`.
        snapshots: what writes averages of its own during the run, which are updated and saved beside the others, but
            not evaluated, exported or logged. Default: nothing.

    Attributes:
        name: what metrics, evaluators and the state call a single average: ``'ema'``.
        compared: arguments whose values are compared with those of a loaded checkpoint.
        rivals: algorithms of other packages that cannot be in one Trainer with this one.
        update_seconds: seconds of host time spent in updates and distances so far, their whole cost on a CPU.
    """

    name: ClassVar[str]
    compared: ClassVar[tuple[str, ...]]
    rivals: ClassVar[tuple[type[Algorithm], ...]]

    def __init__(
        self,
        kept: Mapping[str, Kept],
        arguments: Mapping[str, Any],
        *,
        start: str | Time,
        update_interval: Span,
        evaluate_with: Mapping[str, str] | None,
        evaluate: Sequence[str] | None,
        log_interval: str | Time | None,
        export_weights: str,
        settings: Mapping[str, Any],
        snapshots: RunSnapshots | None = None,
    ) -> None:
        begin = Start.of(f'{self.name}_start', start)
        interval = Interval('update_interval', update_interval)
        log_at = None if log_interval is None else Interval.of('log_interval', log_interval)
        kept_settings = Settings.of(settings)
        self._evaluation = Evaluation(list(kept), evaluate_with, evaluate)
        self.export_weights = export_weights = check_weights('export_weights', export_weights, list(kept))
        #: What writes snapshots of the run; None for nothing.
        self.snapshots = snapshots
        #: All algorithms of the Trainer that keep averages, in their order.
        self._of_all: Sequence[WeightAverage] = (self,)
        self._arguments = {
            **arguments,
            begin.name: str(begin.span),
            'update_interval': str(update_interval),
            **kept_settings.as_plain(settings_of(type(self))),
            'evaluate_with': self.evaluate_with or None,
            'evaluate': self.evaluate or None,
            'export_weights': export_weights,
            'log_interval': None if log_at is None else str(log_at.span),
        }
        #: Arguments that the representation leaves out because their values follow from others.
        self._implied: set[str] = set()

        self._keeper = Keeper(
            self.name,
            kept,
            self._arguments,
            compared=self.compared,
            start=begin,
            interval=interval,
            settings=kept_settings,
            log_interval=log_at,
            default_log_interval=DEFAULT_LOG_INTERVAL,
            hidden={} if snapshots is None else snapshots.hidden,
        )
        self.update_seconds = 0.0
        self._steps = Steps()

    @property
    def update_interval(self) -> Span:
        """The time between two updates."""
        return self._keeper.interval.span

    @property
    def log_interval(self) -> Span | None:
        """The time between two logged distances; None for none."""
        interval = self._keeper.log_interval
        return None if interval is None else interval.span

    @classmethod
    def labels_of(cls, arguments: Mapping[str, Any]) -> tuple[str, ...]:
        """The labels that averages will have if an algorithm of this class is built with ``arguments``."""
        del arguments
        return (cls.name,)

    @property
    def evaluate_with(self) -> dict[str, str]:
        """Which weights evaluators see, by label, as given."""
        return self._evaluation.evaluate_with

    @property
    def evaluate(self) -> list[str]:
        """The weights for each of which every evaluator runs, as given; empty where it runs once."""
        return self._evaluation.evaluate

    # Events

    def match(self, event: Event, state: State) -> bool:
        """Whether :meth:`apply` has something to do at ``event``. Changes nothing."""
        when = _WHEN.get(event)
        if when is None:
            return False
        if when is _ALWAYS:
            return True
        if when is _IF_PENDING:
            return self._averages.is_pending or self._steps.is_watching
        if when is _IF_TAKEN:
            return self._evaluation.is_open and self._keeper.has_started and self._averages.lent is None
        if self._averages.lent is not None or self._evaluation.has_to_go_on:
            return True
        if event in _TRAINING_STARTS and loan.is_open(state.model):
            return True
        if when is _IF_LENT:
            return False
        if self._steps.skipped and event is Event.BATCH_END:
            return True
        unit, look = when, look_at(state)  # the events that are left are ends
        return self._keeper.is_due(unit, look) or self._keeper.is_log_due(unit, look)

    def apply(self, event: Event, state: State, logger: Logger) -> None:
        """Does what ``event`` asks for; see :meth:`match`."""
        if event is Event.INIT:
            self._evaluation.forget_evaluators()
            self._create(state)
        elif event is Event.BEFORE_LOAD:
            self._evaluation.split_evaluators(state)  # a checkpoint has the metrics of each
            self._averages.follow_surgery(state.model, may_rebuild=not self._keeper.has_started)
        elif event is Event.AFTER_TRAIN_BATCH:
            self._averages.wait_for_reads()  # joins the last update before the optimizer writes
            self._steps.begin()
        elif event in _TRAINING_GOES_ON:
            self._evaluation.abandon()
            self._evaluation.go_on()
            if event is Event.AFTER_LOAD and not self._averages:
                self._build(state)
            self._take_back(state.model)
            if event in _TRAINING_STARTS:
                loan.refuse(unwrap(state.model))  # nobody may train the average of a callback
            if event is Event.FIT_START:
                self._evaluation.split_evaluators(state)  # fit() may bring others
                self._prepare_fit(state)
                self._evaluation.start_training(state)
            elif event is Event.FIT_END:
                self._end_fit(state)
            elif event in _UPDATES_AT:
                self._update_and_log(event, state, logger)
        else:
            self._keeper.use(self._evaluation.weights_at(event, state), state.model)

    def _create(self, state: State) -> None:
        """Begins a run; where Composer shards the model first, the averages are built at AFTER_LOAD."""
        limits.refuse_rivals(self, self.rivals, state)
        self._stand_beside([each for each in state.algorithms if isinstance(each, WeightAverage)] or [self])
        limits.refuse_unsupported(state)
        if left_in := loan.recall(state.model):
            warn(
                f'the model still held an average, perhaps after an evaluation that raised: {listed(left_in)}. '
                'It is out again, and the model holds its training weights.'
            )
        self._keeper.forget()
        save_training_weights(state, self._of_all)
        self._steps.release()
        self.update_seconds = 0.0
        if self.snapshots is not None:
            self.snapshots.forget()
        self._evaluation.abandon()
        if not shards.will_be_sharded(state):
            self._build(state)

    def _create_now(self, state: State) -> None:
        """Begins a run that is past its load, so that the model is as it will be trained."""
        self._create(state)
        if not self._averages:
            self._build(state)

    def _build(self, state: State) -> None:
        """Builds the averages, and loads the state that has been waiting for them."""
        # Composer's SWA writes the weights at the event that updates the average, while a side stream may read them.
        overlap = not any(isinstance(algorithm, ComposerSWA) for algorithm in state.algorithms)
        loaded = self._keeper.build(state.model, overlap=overlap)
        if loaded is None:
            return
        if sharded_format.is_split(loaded):
            with shards.opened(state) as reader:
                self.load_state_dict(Outline(loaded, shards.place(type(self).__qualname__), reader, self._what))
        else:
            self.load_state_dict(loaded)

    def _stand_beside(self, of_all: Sequence[WeightAverage]) -> None:
        """Shares evaluators and the export with the other algorithms that keep averages.

        Raises:
            ValueError: labels or wishes that contradict each other.
        """
        limits.refuse_equal_labels({type(each).__qualname__: each.labels for each in of_all})
        limits.refuse_two_exports(
            {type(each).__qualname__: each.export_weights for each in of_all if each.export_weights != TRAINING}
        )
        self._evaluation.stand_beside([each._evaluation for each in of_all])
        self._of_all = tuple(of_all)

    def _prepare_fit(self, state: State) -> None:
        if not self._averages:
            self._create_now(state)
        self._check_run(state)
        if self.export_weights != TRAINING and not lend_to_exporters(state, self._lending):
            limits.warn_without_exporter(self.export_weights)
        self._keeper.begin(state.model, ComposerRun(state), kind=type(self).__name__)
        self._steps.watch(state.optimizers if state.precision is Precision.AMP_FP16 else ())
        if self.snapshots is not None:
            self.snapshots.begin(state, self._averages)

    def _check_run(self, state: State) -> None:
        """Refuses settings that cannot work in this run, and warns of those that have no effect."""
        times.check_times(self._limits(state), ComposerRun(state))
        limits.warn_of_unknown_labels(self.evaluate_with, state)
        limits.warn_without_evaluator(self.evaluate, self._evaluation.of_each_weights, state)

    def _limits(self, state: State) -> list[Limit]:
        """The times that the run must be able to count."""
        return self._keeper.limits(ComposerRun(state))

    def _end_fit(self, state: State) -> None:
        self._steps.release()
        if self._averages:
            self._keeper.end()
            if self.snapshots is not None:
                self.snapshots.end(state, self._averages)

    def _update_and_log(self, event: Event, state: State, logger: Logger) -> None:
        began, look, unit, is_skipped = time.perf_counter(), look_at(state), _UPDATES_AT[event], self._steps.skipped
        if not self._averages and self._keeper.is_due(unit, look):  # the user has taken them away
            self._create_now(state)
        is_updated = self._keeper.after(unit, state.model, look, is_skipped=is_skipped)
        if is_updated:
            logger.log_metrics(self._keeper.progress())
        if self._keeper.is_log_due(unit, look):
            logger.log_metrics(self._keeper.distances(state.model))
        self.update_seconds += time.perf_counter() - began
        if self.snapshots is not None and is_updated:
            self.snapshots.after_update(look, self._averages, state.model)

    def disk_of_snapshots(self, state: State) -> str | None:
        """How much disk the snapshots of the run will take, in a sentence, once the Trainer is built; None for none.

        Raises:
            ArgumentError: they have no place, or are due at times that the run does not count.
        """
        if self.snapshots is None or not self._averages:
            return None
        return self.snapshots.announcement(state, self._averages)

    # Loans

    def get_training_model(self, model: nn.Module) -> nn.Module:
        """Puts the training weights into ``model`` and returns it. The average stays where it is.

        Args:
            model: the model in training, or another of the same architecture, which is overwritten.

        Raises:
            RuntimeError: there is no average yet, the model in training is gone, or it holds the average of somebody
                else.
            ValueError: ``model`` lacks a tracked name or has it in another shape. Nothing is written then.
        """
        if self._averages.live is unwrap(model):
            self._take_back(model)
        return self._averages.put_training_weights(self.labels[0], model)

    def stashed_weights(self, model: nn.Module) -> dict[str, Tensor]:
        """The training weights that ``model`` has in a stash while it holds an average, whoever lent it.

        Returns:
            Canonical name to training weight, aliased; nothing while the model holds its training weights.
        """
        return self._averages.stashed_weights(model)

    @property
    def _averages(self) -> Averages:
        return self._keeper.averages

    def _take_back(self, model: nn.Module) -> None:
        """Makes ``model`` hold the training weights, whichever algorithm of this package has lent it an average."""
        for each in self._of_all:
            each._averages.take_back(model)

    def _lending(self, state: State) -> AbstractContextManager[None]:
        """Lends what an export asks for, unless the model holds an average already."""
        if not self._keeper.has_average or self._averages.lent is not None:
            return nullcontext()
        model = state.model
        return Block(lambda: self._keeper.use(self.export_weights, model), lambda: self._keeper.use(TRAINING, model))

    # State

    def state_dict(self) -> dict[str, Any]:
        """The averages, their counters and, while a model holds one, the training weights; see ``formats``.

        A checkpoint of the Trainer lacks the training weights here: it holds them as the model. Of a sharded model the
        tensors are DTensors, of which each process has its part; a checkpoint has them whole, or beside the state.
        """
        snapshots = {} if self.snapshots is None else {_SNAPSHOTS: self.snapshots.state_dict()}
        return {**super().state_dict(), **self._keeper.state_dict(), **snapshots}

    @property
    def _what(self) -> str:
        """A state of this class, in the words of an error."""
        return f'the saved {type(self).__qualname__} state'

    def load_state_dict(self, state: Mapping[str, Any], strict: bool = False) -> None:
        """Loads a state of this class, or of Composer's algorithm of the same name. All of it is checked first.

        A state that was saved while the model held the average leaves the model swapped. The Trainer's next event,
        AFTER_LOAD, restores its training weights.

        Raises:
            ValueError: names, shapes, or a version that do not fit, all listed. Nothing is changed then.
        """
        del strict  # Composer never passes it, and half a state is of no use
        snapshots = self.snapshots
        loaded = self._keeper.load_state_dict(
            state,
            self._what,
            check=None if snapshots is None else lambda upgraded: snapshots.check(upgraded.get(_SNAPSHOTS)),
        )
        if snapshots is not None and loaded is not None:
            snapshots.load_state_dict(loaded.get(_SNAPSHOTS))

    def __getstate__(self) -> dict[str, Any]:
        """For pickle and deepcopy: a copy stands beside no other algorithms."""
        return {name: value for name, value in self.__dict__.items() if name != '_of_all'}

    def __setstate__(self, state: Mapping[str, Any]) -> None:
        vars(self).update(state)
        self._of_all = (self,)

    def __repr__(self) -> str:
        shown = {name: value for name, value in self._arguments.items() if name not in self._implied}
        parameters = inspect.signature(type(self)).parameters
        names = [name for name in parameters if name in shown and shown[name] != parameters[name].default]
        arguments = (f'{name}={shown[name]!r}' for name in names)
        return f'{type(self).__name__}({", ".join(arguments)})'
