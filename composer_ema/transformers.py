"""WeightAverage for the Trainer of transformers: it averages after steps, and lends the average to evaluations.

Invariant: outside of an evaluation or prediction the model holds the training weights.
"""

from __future__ import annotations

import functools
import inspect
import logging
import math
import weakref
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import nn
from typing_extensions import Unpack

from composer_ema.checkpoints.opening import read_checkpoint
from composer_ema.checkpoints.trainer_folder import AVERAGE
from composer_ema.files import beside
from composer_ema.model.wrappers import unwrap
from composer_ema.profiles import Kind
from composer_ema.run import asked, limits
from composer_ema.run.asked import DEFAULT_HALF_LIFE, TRAINING
from composer_ema.run.clock import Clock, Look
from composer_ema.run.door import Door
from composer_ema.run.keeper import keeper_of
from composer_ema.settings import TrainerSettings, settings_of, takes_settings
from composer_ema.shadow.interrupts import Block
from composer_ema.shadow.shadow_model import ShadowModel
from composer_ema.shadow.state import gathered
from composer_ema.spans import Span
from composer_ema.wording import counted, suggestion

try:
    from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
    from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, IntervalStrategy, get_last_checkpoint
except ImportError as error:
    raise ImportError(
        'composer_ema.transformers needs transformers and accelerate. Install them with: pip install transformers '
        'accelerate'
    ) from error

log = logging.getLogger(__name__)

# Where the Trainer evaluates and predicts: evaluate() and predict() call one or the other.
_LOOPS = ('evaluation_loop', 'prediction_loop')
# In each row that the Trainer logs while its control says ``should_log``.
_LOSS = 'loss'
# The prefixes of the metrics of evaluate() and of predict().
_EVAL, _TEST = 'eval', 'test'
#: The log interval where nobody asks for one.
_LOG_INTERVAL = '0.05dur'
_TAKE_IT = "For that of a checkpoint: model.load_state_dict(load_average('checkpoint-500', model))."


@takes_settings
class WeightAverage(Door, TrainerCallback):
    """Keeps an average of the model's weights beside a ``transformers.Trainer`` and evaluates with it.

    After each ``update_interval`` of training, as :class:`composer_ema.EMA` does::

        average += (1 - smoothing) * (weights - average)        smoothing = 2 ** (-elapsed / half_life)

    A batch is a step of the optimizer, however many batches its gradients are accumulated from; a step that the
    gradient scaler skips is none. ``evaluate()`` and ``predict()`` use the average, during training and after it.
    Training never sees it, and is bit for bit what it is without the callback.

    In a checkpoint, ``model.safetensors`` holds the training weights and ``weight_average.pt`` the average;
    ``train(resume_from_checkpoint=...)`` goes on from both, to the same bits. With ``load_best_model_at_end`` the model
    holds, when training has ended, the average of the best checkpoint, since that is what scored best. In all other
    cases it holds the training weights. To save the average as a model of its own, save inside :meth:`swapped`, or run
    ``composer-ema export checkpoint-500 average.safetensors``.

    The Trainer must be a ``transformers.Trainer`` or of a subclass. A callback that is added later, by
    ``trainer.add_callback``, meets the Trainer when training starts; call :meth:`attach` before a run that resumes.

    Args:
        half_life: time string after which a weight's share in the average has halved: ``'1000ba'``, ``'1.5ep'``,
            ``'50000sp'``, ``'1000000tok'`` (with ``include_num_input_tokens_seen=True``), or ``'0.1dur'`` as a share
            of the run. Default: ``'1000ba'``.
        smoothing, power, gamma, average, warmup, bias_correction: as for :class:`composer_ema.EMA`, mappings from
            labels to values included, which keep several averages.
        ema_start: time string (ba, ep, sp, tok, dur) before which nothing is averaged. Default: ``'0.0dur'``.
        update_interval: time string between two updates. Default: ``'1ba'``.
        evaluate_with: ``'ema'``, or the label of an average, or ``'training'`` by the prefix of the metrics: ``'eval'``
            for ``evaluate()``, ``'eval_name'`` where ``eval_dataset`` maps names to data sets, ``'test'`` for
            ``predict()``. An evaluation that it does not name sees the first average. Default: None.
        log_interval: time string; after each, the next row that the Trainer logs with its ``loss`` has what is below,
            too. The host waits for the device then, as the Trainer makes it do there. None logs nothing. Default:
            ``'0.05dur'``.
        settings: which tensors are averaged and how, as for :class:`composer_ema.EMA`; see
            :class:`composer_ema.settings.Settings`.

    Raises:
        TypeError, ValueError: an argument out of range, when built; a setting that cannot work in this run, when
            training starts.

    Logs ``ema/relative_distance``, ``ema/num_updates`` and, of an exponential average, ``ema/smoothing`` of the last
    update, with the label of the average for ``ema``; and ``ema/skipped_elements`` with ``skip_nonfinite``.

    Example:
        .. code:: python

            from transformers import Trainer
            from composer_ema.transformers import WeightAverage

            average = WeightAverage(half_life='0.05dur')
            trainer = Trainer(model=model, args=args, train_dataset=..., eval_dataset=..., callbacks=[average])
            trainer.train()
            with average.swapped(trainer.model):
                trainer.save_model('averaged')
    """

    def __init__(
        self,
        half_life: str | Mapping[str, str] | None = DEFAULT_HALF_LIFE,
        smoothing: float | Mapping[str, float] | None = None,
        ema_start: str = '0.0dur',
        update_interval: str = '1ba',
        *,
        power: float | Mapping[str, float] | None = None,
        gamma: float | Mapping[str, float] | None = None,
        average: Kind | Mapping[str, Literal['equal']] = 'exponential',
        warmup: float | Mapping[str, float] | None = None,
        bias_correction: bool | Mapping[str, bool] = False,
        evaluate_with: Mapping[str, str] | None = None,
        log_interval: str | None = _LOG_INTERVAL,
        **settings: Unpack[TrainerSettings],
    ) -> None:
        self._keeper = keeper_of(
            settings,
            taken=settings_of(type(self)),
            ema_start=ema_start,
            update_interval=update_interval,
            log_interval=log_interval,
            default_log_interval=_LOG_INTERVAL,
            half_life=half_life,
            smoothing=smoothing,
            power=power,
            gamma=gamma,
            average=average,
            warmup=warmup,
            bias_correction=bias_correction,
        )
        #: Which weights evaluations see, by the prefix of their metrics, as given.
        self.evaluate_with = asked.check_evaluate_with(evaluate_with, self.labels)
        self._trainer: Callable[[], Trainer | None] = _no_trainer
        self._run: _Run | None = None
        self._resumed_from: str | bool | None = None
        self._in_model = TRAINING
        self._scale: float | None = None
        self._is_skipped = self._is_log_due = False

    def swapped(self, model: nn.Module, label: str | None = None) -> AbstractContextManager[nn.Module]:
        """Puts an average into ``model`` for the block, then restores every bit of the training weights.

        Args:
            model: ``trainer.model``.
            label: of the average. Default: the first.

        Raises:
            RuntimeError: training has not started.
            ValueError: there is no average of that label, or it does not fit ``model``.
        """
        return self._required(label).swapped(model)

    def attach(self, trainer: Trainer) -> WeightAverage:
        """Lets ``trainer`` evaluate with the average, and returns the callback.

        The Trainer's constructor does it for the callbacks that it is given. Only for one that is added later you need
        to: ``trainer.add_callback(WeightAverage('1000ba').attach(trainer))``.

        Raises:
            TypeError: ``trainer`` is of another kind.
        """
        if not isinstance(trainer, Trainer):
            raise TypeError(
                f'trainer must be a transformers.Trainer, got a {type(trainer).__name__}. Pass the Trainer.'
            )
        if self._trainer() is not trainer:
            self._trainer = weakref.ref(trainer)
            for name in _LOOPS:
                setattr(trainer, name, self._evaluating(getattr(trainer, name)))
            trainer.train = self._remembering(trainer.train)
            trainer.log = self._logging(trainer.log)
        return self

    # Events

    def on_init_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Meets the Trainer."""
        trainer = _calling_trainer()
        others = [each for each in trainer.callback_handler.callbacks if isinstance(each, WeightAverage)]
        if len(others) > 1:
            raise ValueError(
                f'the Trainer has {len(others)} WeightAverage callbacks, and one model is evaluated with one average '
                "at a time. Pass one, with labels: WeightAverage(half_life={'short': '100ba', 'long': '1000ba'})."
            )
        self.attach(trainer)

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        *,
        model: nn.Module,
        train_dataloader: Any = None,
        **_: Any,
    ) -> None:
        """Begins the averages, or goes on from those of the checkpoint."""
        trainer = self._trainer()
        if trainer is None:
            trainer = _calling_trainer()
            self.attach(trainer)
        self._run = run = _Run(args, state, train_dataloader)
        limits.check_times(self._keeper.limits(run), run)
        self._warn_of_no_rows(args, state)
        self._warn_of_unknown_prefixes(trainer.eval_dataset)
        self._is_log_due = False
        self._keeper.forget()
        self._keeper.build(unwrap(model))
        if state.global_step > 0:
            self._resume(args, state)
        self._keeper.begin(unwrap(model), run, kind=type(self).__name__)

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, *, optimizer: Any = None, **_: Any
    ) -> None:
        """Joins the last update before the optimizer writes."""
        self._keeper.averages.wait_for_reads()
        self._scale = _scale_of_fused(optimizer)

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, *, optimizer: Any = None, **_: Any
    ) -> None:
        """Notes whether the gradient scaler has left the step out."""
        scale = _scale_of_fused(optimizer)
        has_shrunk = scale is not None and self._scale is not None and scale < self._scale
        self._is_skipped = has_shrunk or bool(getattr(optimizer, 'step_was_skipped', False))

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, *, model: nn.Module, **_: Any
    ) -> None:
        """Updates the averages if that is due after a step, or after the epoch that the step ends.

        The Trainer evaluates and saves before its event for the end of an epoch.
        """
        assert self._run is not None
        self._run.tick()
        for unit in ('ba', 'ep') if self._run.is_at_end_of_epoch else ('ba',):
            look = Look(self._run)
            self._keeper.after(unit, unwrap(model), look, is_skipped=self._is_skipped)
            self._is_log_due |= self._keeper.is_log_due(unit, look)

    def on_epoch_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Orders what comes after the epoch behind the last update."""
        self._keeper.averages.wait_for_reads()  # load_best_model_at_end may write the weights before the next event

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Writes the averages into the checkpoint, from one process. A collective call where they are shared."""
        whole = gathered({**self._keeper.state_dict(), 'repr': repr(self)}, is_kept=args.should_save)
        if args.should_save:
            with beside(self._folder(state) / AVERAGE) as written, written.open('wb') as file:
                torch.save(whole, file)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, *, model: nn.Module, **_: Any
    ) -> None:
        """Waits for the last update, and takes the average of the best checkpoint where the Trainer loads that."""
        self._keeper.end()
        if args.load_best_model_at_end and state.best_model_checkpoint is not None:
            self._take_best(args, state, model)

    def _required(self, label: str | None) -> ShadowModel:
        found = self.shadow(label)
        if found is None:
            raise RuntimeError('there is no average before training has started. Call trainer.train() first.')
        return found

    def _folder(self, state: TrainerState) -> Path:
        """The checkpoint that the Trainer has just saved."""
        trainer = self._trainer()
        assert trainer is not None
        # Each trial of a hyperparameter search has a folder of its own.
        runs = str(trainer._get_output_dir(getattr(trainer, '_trial', None)))
        return Path(runs) / f'{PREFIX_CHECKPOINT_DIR}-{state.global_step}'

    def _resume(self, args: TrainingArguments, state: TrainerState) -> None:
        """Loads the averages of the checkpoint from which training goes on."""
        source: Any = self._resumed_from
        if source is None:
            raise RuntimeError(
                f'training goes on from step {state.global_step}, and where its average is saved is not known: the '
                'callback was added to a Trainer that was built before. Pass it as Trainer(callbacks=[...]), or call '
                'trainer.add_callback(average.attach(trainer)).'
            )
        folder = str(get_last_checkpoint(str(args.output_dir)) if source is True else source)
        file = Path(folder) / AVERAGE
        if file.exists():
            self._keeper.load_state_dict(read_checkpoint(file), f'the state in {file}')
        else:
            limits.warn(
                f'{folder} holds no {AVERAGE}: it was saved without WeightAverage, or saving it did not end. A new '
                f'average begins after step {state.global_step}.'
            )

    def _take_best(self, args: TrainingArguments, state: TrainerState, model: nn.Module) -> None:
        """Puts the average of the best checkpoint into the model, which the Trainer gave its training weights."""
        best, weights = str(state.best_model_checkpoint), self._weights_of_metric(str(args.metric_for_best_model))
        file = Path(best) / AVERAGE
        if weights == TRAINING:
            return
        if not file.exists():
            limits.warn(
                f'{best}, the best checkpoint, holds no {AVERAGE}: it was saved without WeightAverage. The model holds '
                'its training weights.'
            )
            return
        self._keeper.load_state_dict(read_checkpoint(file), f'the state in {file}')
        if self._keeper.has_average and self._keeper.averages[weights].has_begun:
            self._required(weights).copy_to(model)
            log.warning(
                'load_best_model_at_end: the model holds the average %r of %s, which scored best, and no longer its '
                'training weights. Those are in the checkpoint.',
                weights,
                best,
            )

    # Evaluation

    def _weights_for(self, prefix: str) -> str:
        return self.evaluate_with.get(prefix, self.labels[0])

    def _weights_of_metric(self, metric: str) -> str:
        """The weights with which a metric was measured, whose name starts with the prefix of its evaluation."""
        name = metric if metric.startswith(f'{_EVAL}_') else f'{_EVAL}_{metric}'
        prefixes = [prefix for prefix in self.evaluate_with if name.startswith(f'{prefix}_')]
        return self._weights_for(max(prefixes, key=len, default=_EVAL))

    def _evaluating(self, loop: Callable[..., Any]) -> Callable[..., Any]:
        """A loop of the Trainer that runs with the average in the model."""
        owner, signature = self._trainer, inspect.signature(loop)

        @functools.wraps(loop)
        def evaluate(*args: Any, **kwargs: Any) -> Any:
            trainer = owner()
            if trainer is None or self._trainer is not owner or not self._keeper.has_average:
                if trainer is not None and not trainer.is_in_train:
                    whose = 'there is no average yet' if self._trainer is owner else 'the average is of another Trainer'
                    limits.warn(f'{loop.__name__} uses the weights as they are: {whose}. {_TAKE_IT}')
                return loop(*args, **kwargs)
            call = signature.bind(*args, **kwargs)
            call.apply_defaults()
            with self._lending(self._weights_for(call.arguments.get('metric_key_prefix', _EVAL)), trainer):
                return loop(*args, **kwargs)

        return evaluate

    def _lending(self, weights: str, trainer: Trainer) -> AbstractContextManager[None]:
        """Lends the model what an evaluation asks for, and then what the one around it asked for, if there is one."""
        assert isinstance(trainer.model, nn.Module)  # there is an average of it
        model, before = unwrap(trainer.model), self._in_model
        return Block(lambda: self._use(weights, model), lambda: self._use(before, model))

    def _use(self, weights: str, model: nn.Module) -> None:
        self._keeper.use(weights, model)
        self._in_model = weights

    def _logging(self, write: Callable[..., Any]) -> Callable[..., Any]:
        """``Trainer.log`` with the averages beside the loss. By ``on_log`` the row is in the history already."""
        owner = self._trainer

        def is_of_trainer(logs: dict[str, float]) -> bool:
            # A subclass may log a loss of its own in one process only, but measuring shards takes every process.
            trainer = owner()
            return self._trainer is owner and trainer is not None and trainer.control.should_log and _LOSS in logs

        @functools.wraps(write)
        def with_averages(logs: dict[str, float], *args: Any, **kwargs: Any) -> Any:
            model = self._keeper.averages.live
            if self._is_log_due and model is not None and is_of_trainer(logs):
                logs.update(self._keeper.measured(model))
                self._is_log_due = False
            return write(logs, *args, **kwargs)

        return with_averages

    def _remembering(self, train: Callable[..., Any]) -> Callable[..., Any]:
        """``Trainer.train``, which tells callbacks that training goes on, but not from which checkpoint."""

        @functools.wraps(train)
        def remembering(resume_from_checkpoint: Any = None, *args: Any, **kwargs: Any) -> Any:
            self._resumed_from = resume_from_checkpoint or kwargs.get('model_path')
            return train(resume_from_checkpoint, *args, **kwargs)

        return remembering

    def _warn_of_no_rows(self, args: TrainingArguments, state: TrainerState) -> None:
        """Warns of a log interval in a run in which the Trainer logs no row with its loss."""
        if args.logging_first_step:
            return
        if args.logging_strategy == IntervalStrategy.NO:
            self._keeper.warn_unlogged("logging_strategy is 'no'", "Pass logging_strategy='steps'")
        elif args.logging_strategy == IntervalStrategy.STEPS and state.logging_steps > state.max_steps:
            why = f'logging_steps={state.logging_steps} is longer than the run of {counted(state.max_steps, "step")}'
            self._keeper.warn_unlogged(why, 'Pass fewer logging_steps')

    def _warn_of_unknown_prefixes(self, eval_dataset: Any) -> None:
        """Warns of names in ``evaluate_with`` that no evaluation during training has."""
        known = [f'{_EVAL}_{name}' for name in eval_dataset] if isinstance(eval_dataset, Mapping) else [_EVAL]
        for prefix in self.evaluate_with:
            if eval_dataset is not None and prefix not in (*known, _TEST):
                remedy = suggestion(prefix, known, 'They have')
                limits.warn(f'evaluate_with names {prefix!r}, and no evaluation during training has it. {remedy}')

    def __getstate__(self) -> dict[str, Any]:
        """For pickle and deepcopy: a copy belongs to no Trainer."""
        return {**self.__dict__, '_trainer': _no_trainer, '_run': None, '_in_model': TRAINING}

    def __repr__(self) -> str:
        made_by = {name: self._keeper.arguments[name] for name in asked.MAKERS}
        given = (f'{name}={value!r}' for name, value in made_by.items() if value not in (None, 'exponential'))
        return f'{type(self).__name__}({", ".join(given)})'


class _Run:
    """The time of one call of ``Trainer.train``; see :class:`composer_ema.run.clock.Run`. A batch is a step.

    Args:
        args: of the Trainer.
        state: of the Trainer, from ``on_train_begin`` on.
        dataloader: for training; None if it is not known.
    """

    remedies: ClassVar[Mapping[str, str]] = {
        'tok': 'the Trainer counts none. Pass TrainingArguments(include_num_input_tokens_seen=True), or give steps.',
        'ep': 'the dataloader has no length. Give steps instead, as in 1000ba.',
        'sp': 'the dataloader does not tell how many there are. Give steps instead, as in 1000ba.',
        'iter': 'this run has none. Give steps instead, as in 1000ba.',
        'dur': 'the run has no length. Pass max_steps or num_train_epochs.',
    }

    def __init__(self, args: TrainingArguments, state: TrainerState, dataloader: Any) -> None:
        self._state = state
        self._counts_tokens = getattr(args, 'include_num_input_tokens_seen', False) not in (False, None, 'no')
        accumulated = args.gradient_accumulation_steps
        batches = _length(dataloader)
        self._steps_in_epoch = None if not batches else math.ceil(batches / accumulated)
        samples, batch_size = _length(getattr(dataloader, 'dataset', None)), _batch_size(dataloader)
        self._samples_in_step = self._samples_in_epoch = None
        if batches and samples is not None and batch_size is not None:
            self._samples_in_step = batch_size * accumulated
            self._samples_in_epoch = min(samples, batches * batch_size)  # fewer where the last batch is dropped
        self._now = self._before = self._read()

    def tick(self) -> None:
        """A step has ended."""
        self._before, self._now = self._now, self._read()

    @property
    def is_at_end_of_epoch(self) -> bool:
        """Whether the last step was the last of an epoch."""
        return self._now['ep'] > 0 and self._now['ep'].is_integer()

    @property
    def max_duration(self) -> Span:
        """The length of the run, which the Trainer always knows in steps."""
        return Span(self._state.max_steps, 'ba')

    def clock(self) -> Clock:
        """The time trained so far, at the end of the last step."""
        return self._now

    def clock_before(self) -> Mapping[str, float]:
        """The clock one step earlier."""
        return self._before

    def time(self, unit: str) -> float:
        """The time trained so far in one unit."""
        return self._now[unit]

    def length(self, unit: str) -> float | None:
        """The length of the whole run in one unit; None if it is not known before training."""
        steps = self._state.max_steps
        if unit == 'ba':
            return steps
        if unit == 'ep':
            return None if self._steps_in_epoch is None else steps / self._steps_in_epoch
        return self._samples(steps) if unit == 'sp' and self.counts('sp') else None

    def counts(self, unit: str) -> bool:
        """Whether the run counts a unit; of tokens, whether it has counted any in the steps so far."""
        if unit == 'tok':
            return self._counts_tokens and (self._now['tok'] > 0 or self._now['ba'] == 0)
        known = {'ep': self._steps_in_epoch is not None, 'sp': self._samples_in_step is not None, 'iter': False}
        return known.get(unit, True)

    def counts_fractions(self, unit: str) -> bool:
        """Whether the clock counts fractions of a unit; of epochs, it does where it counts them."""
        return True

    def _read(self) -> Clock:
        state = self._state
        return {
            'iter': 0,
            'ep': float(state.epoch or 0) if self._steps_in_epoch is not None else 0.0,
            'ba': state.global_step,
            'sp': self._samples(state.global_step),
            'tok': state.num_input_tokens_seen,
        }

    def _samples(self, steps: int) -> int:
        """The samples of the first ``steps`` steps, of which the last in an epoch may have fewer; 0 if not known."""
        if self._steps_in_epoch is None or self._samples_in_step is None or self._samples_in_epoch is None:
            return 0
        epochs, rest = divmod(steps, self._steps_in_epoch)
        return epochs * self._samples_in_epoch + rest * self._samples_in_step


def _length(of: Any) -> int | None:
    try:
        return len(of)
    except TypeError:  # an iterable data set has none
        return None


def _batch_size(dataloader: Any) -> int | None:
    """The samples of a batch in all processes together."""
    try:
        size = dataloader.total_batch_size  # of accelerate
    except AttributeError:  # a batch sampler of the user's own has no size
        return None
    return size if isinstance(size, int) else None


def _scale_of_fused(optimizer: Any) -> float | None:
    """The scale of the gradients where the optimizer itself leaves steps out, as fused ones do; None elsewhere.

    accelerate sees such a step as one that was made. The scale shrinks after it. Reading it makes the host wait.
    """
    scaler, inner = getattr(optimizer, 'scaler', None), getattr(optimizer, 'optimizer', None)
    return scaler.get_scale() if scaler is not None and getattr(inner, '_step_supports_amp_scaling', False) else None


def _no_trainer() -> None:
    """The Trainer of a callback that has met none."""


def _calling_trainer() -> Trainer:
    """The Trainer that is calling a callback.

    transformers 4.53 hands it to no callback, and has no event before an evaluation, so the stack tells.
    """
    frame = inspect.currentframe()
    while frame is not None:
        if isinstance(found := frame.f_locals.get('self'), Trainer):
            return found
        frame = frame.f_back
    raise RuntimeError(
        'WeightAverage works with transformers.Trainer and its subclasses, and something else has called it. In a loop '
        'of your own use EMAOptimizer or ShadowModel.'
    )
