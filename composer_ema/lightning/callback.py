"""WeightAverage: the callback that averages the weights of a Lightning run and lends the average to evaluation.

Invariant: outside of validation, test and prediction the module holds its training weights.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import re
import sys
import warnings
import weakref
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

from torch import nn
from torch.distributed.checkpoint import FileSystemReader
from typing_extensions import Unpack

from composer_ema import plain
from composer_ema.checkpoints import formats, sharded_format
from composer_ema.lightning.run import LightningRun
from composer_ema.model.names import listed
from composer_ema.model.sharding import is_shard
from composer_ema.profiles import Kind
from composer_ema.run import limits
from composer_ema.run.asked import DEFAULT_HALF_LIFE, TRAINING, check_evaluate_with
from composer_ema.run.clock import Look
from composer_ema.run.door import Door
from composer_ema.run.keeper import keeper_of
from composer_ema.run.model_slot import put_training_weights
from composer_ema.run.shards import Outline
from composer_ema.run.steps import Steps
from composer_ema.settings import TrainerSettings, settings_of, takes_settings
from composer_ema.shadow import loan
from composer_ema.shadow.state import gathered
from composer_ema.spans import ArgumentError, Span
from composer_ema.wording import suggestion

if TYPE_CHECKING:
    from lightning.pytorch import Callback, LightningModule, Trainer
else:

    def _base() -> type:
        """Lightning's Callback, of the package that the script has imported where both of them are installed."""
        names = sorted(('lightning.pytorch', 'pytorch_lightning'), key=lambda name: name not in sys.modules)
        for name in names:
            try:
                return importlib.import_module(name).Callback
            except ModuleNotFoundError as error:
                if error.name != name.partition('.')[0]:
                    raise
        raise ModuleNotFoundError('composer_ema.lightning needs Lightning. Install it: pip install lightning')

    Callback = _base()

_STAGES = ('validate', 'test', 'predict')
_LOADER = re.compile(r'dataloader_idx_\d+', re.ASCII)
_REPR, _RUN = 'repr', 'run'
#: The log interval where nobody asks for one.
_LOG_INTERVAL = '1ep'
_PASS_IT = 'Pass ckpt_path to the Trainer for the average of a checkpoint, or the module that was trained.'


@takes_settings
class WeightAverage(Door, Callback):
    """Averages the weights of a Lightning run, and validates, tests and predicts with the average.

    After each ``update_interval`` of training::

        average += (1 - smoothing) * (weights - average)        smoothing = 2 ** (-elapsed / half_life)

    where ``elapsed`` is the time since the last update, in the half-life's own unit. The first update, at
    ``ema_start``, copies the weights. Training never sees the average, and the module holds its training weights again
    when validation ends, also if it raises. Checkpoints of the Trainer hold the training weights in ``state_dict`` and
    the averages in the state of this callback, in which ``trainer.fit(model, ckpt_path=...)``,
    :func:`composer_ema.load_average` and ``composer-ema export`` find them.

    A batch (``ba``) is one step of ``trainer.global_step``: with ``accumulate_grad_batches=4`` four batches of the
    dataloader make one, and a module with two optimizers makes two each time that it steps both. An update is due at
    most once per batch of the dataloader. Samples (``sp``) are counted if all tensors of a batch have one length, over
    all processes. Tokens are not counted.

    For several averages pass ``half_life``, ``smoothing``, ``power``, ``gamma`` or ``average`` as a mapping from labels
    to values: ``WeightAverage(half_life={'short': '100ba', 'long': '1ep'})``. All move in one update.

    Args:
        half_life: time string after which a weight's share in the average has halved: ``'1000ba'``, ``'1.5ep'``,
            ``'50000sp'``, or ``'0.1dur'`` as a share of ``max_epochs`` or ``max_steps``. Default: ``'1000ba'``.
        smoothing: instead of ``half_life``, the share of the old average that every update keeps, in [0, 1], whatever
            time has passed. Default: None.
        ema_start: time string (ba, ep, sp, dur) before which nothing is averaged. Default: ``'0ba'``.
        update_interval: time string between two updates. Default: ``'1ba'``.
        power: instead of ``half_life``, the width of a power function average as a share of the time trained so far,
            above 0 and at most 0.2887; see :class:`composer_ema.averages.Power`. Default: None.
        gamma: instead of ``power``, the exponent of the power function, at least 0. Default: None.
        average: ``'equal'`` for the mean of all updates in place of an exponential average. Default: ``'exponential'``.
        warmup: upper limit of the half-life as a share of the time since the start, above 0, so that the average soon
            forgets where it started. Default: None, no limit.
        bias_correction: whether an exponential average forgets where it started by correction, as Adam does. Default:
            False.
        evaluate_with: the label of an average, ``'ema'`` if it has none, or ``'training'``, by evaluation:
            ``'validate'``, ``'test'``, ``'predict'``, or ``'dataloader_idx_1'`` for the second of several dataloaders.
            Those that it does not name see the first average. Default: None.
        log_interval: time string between two rows in the Trainer's loggers, see below; None logs none. Each makes the
            host wait for the device. Default: ``'1ep'``.
        name: tells several of these callbacks in one Trainer apart. A checkpoint has the state of
            ``name='generator'`` under ``WeightAverage.generator``. The first of them lends its average where the others
            do not name the evaluation. Default: None.
        settings: which tensors are averaged and how: ``buffers``, ``include``, ``exclude``, ``shadow_dtype``,
            ``shadow_device``, ``skip_nonfinite``, ``rounding``, ``compensated``, ``shard_over_ranks``, ``seed``, and
            ``avg_fn`` or ``multi_avg_fn`` in place of ``half_life``; see :class:`composer_ema.settings.Settings`.

    Raises:
        TypeError, ValueError: an argument out of range, when built; a setting that cannot work in this run, when
            training starts.
        ModuleNotFoundError: from the import, if Lightning is not installed.

    Logs ``ema/relative_distance``, ``ema/num_updates`` and, of an exponential average, ``ema/smoothing`` of the last
    update, with the label of the average for ``ema``; and ``ema/skipped_elements`` with ``skip_nonfinite``. Those of
    ``name='generator'`` begin with ``generator/``.

    Example:
        .. code:: python

            from lightning.pytorch import Trainer
            from composer_ema.lightning import WeightAverage

            trainer = Trainer(max_epochs=6, callbacks=[WeightAverage('100ba')])
            trainer.fit(model, train_loader, validation_loader)
    """

    def __init__(
        self,
        half_life: str | Span | Mapping[str, str | Span] | None = DEFAULT_HALF_LIFE,
        smoothing: float | Mapping[str, float] | None = None,
        ema_start: str | Span = '0ba',
        update_interval: str | Span = '1ba',
        *,
        power: float | Mapping[str, float] | None = None,
        gamma: float | Mapping[str, float] | None = None,
        average: Kind | Mapping[str, Literal['equal']] = 'exponential',
        warmup: float | Mapping[str, float] | None = None,
        bias_correction: bool | Mapping[str, bool] = False,
        evaluate_with: Mapping[str, str] | None = None,
        log_interval: str | Span | None = _LOG_INTERVAL,
        name: str | None = None,
        **settings: Unpack[TrainerSettings],
    ) -> None:
        super().__init__()
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
        self.evaluate_with = _check_evaluations(evaluate_with, self._keeper.labels)
        self.name = None if name is None else plain.word('name', name)
        self._run, self._steps = LightningRun(), Steps()
        #: The module that the averages are of.
        self._module: weakref.ref[nn.Module] | None = None
        #: Whether any process of the run has a logger.
        self._is_logged = False

    @property
    def state_key(self) -> str:
        """Where the ``callbacks`` of a checkpoint have the state of this one."""
        own = type(self).__qualname__
        return own if self.name is None else f'{own}.{self.name}'

    # Training

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Begins a run of the Trainer, of whatever stage.

        Raises:
            ValueError: Lightning's own averaging callback is in the Trainer, too.
        """
        del stage
        _refuse_rivals(_callbacks(trainer))
        self._run.set_up(trainer)
        save = functools.partial(_model_state_dict, trainer.strategy, pl_module)
        trainer.strategy.lightning_module_state_dict = save

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Builds the averages, or goes on with those of a checkpoint."""
        if left_in := loan.recall(pl_module):
            warnings.warn(
                f'the module still held an average, and is given its weights back: {listed(left_in)}.', stacklevel=2
            )
        self._run.begin()
        # Measuring is collective where tensors are sharded, and the processes may differ in their loggers.
        self._is_logged = trainer.strategy.reduce_boolean_decision(bool(trainer.loggers), all=False)
        limits.check_times(self._keeper.limits(self._run), self._run)
        if not self._is_logged:
            self._keeper.warn_unlogged('the Trainer has no logger', 'Pass it one, as in Trainer(logger=True)')
        self._follow(pl_module)
        self._keeper.begin(pl_module, self._run, kind=type(self).__name__)
        scales_gradients = getattr(trainer.precision_plugin, 'scaler', None) is not None
        self._steps.watch(trainer.optimizers if scales_gradients else ())

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Counts the samples of the batch."""
        del trainer, batch_idx
        self._run.begin_batch(batch)
        self._steps.begin()
        if not pl_module.automatic_optimization:  # an optimizer that Lightning has not wrapped tells nobody of its step
            self._keeper.averages.wait_for_reads()

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        """Orders the step after the last update has read the weights."""
        self._keeper.averages.wait_for_reads()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Updates the averages if an optimizer has stepped and an update is due."""
        self._end_batch()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Updates the averages at the end of an epoch that the module has cut short."""
        if trainer.is_last_batch:  # else max_steps has ended the run within the epoch
            self._end_epoch(pl_module)  # which does nothing the second time

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Ends the training, after which the module holds its training weights."""
        self._steps.release()
        self._keeper.end()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Gives the training weights back, before a callback saves them."""
        self._steps.release()
        self._use(TRAINING, pl_module)

    def _follow(self, module: nn.Module) -> None:
        """Makes ``module`` the one that the averages are of, and loads the state that has been waiting for it."""
        if self._of() is not module:
            self._keeper.forget()
            self._module = weakref.ref(module)
        if not self._keeper.averages and (waiting := self._keeper.build(module)) is not None:
            self._keeper.load_state_dict(waiting, self._what)

    def _of(self) -> nn.Module | None:
        return None if self._module is None else self._module()

    def _end_batch(self) -> None:
        module = self._of()
        if module is None or not self._run.has_ended_batch():
            return
        if self._run.has_stepped():
            self._update_and_log('ba', module)
        if self._run.trainer.is_last_batch:  # Lightning validates before its hooks for the end of an epoch
            self._end_epoch(module)

    def _end_epoch(self, module: nn.Module) -> None:
        if self._run.has_ended_epoch():
            self._update_and_log('ep', module)

    def _update_and_log(self, unit: str, module: nn.Module) -> None:
        look, trainer = Look(self._run), self._run.trainer
        self._keeper.after(unit, module, look, is_skipped=self._steps.skipped)
        if not self._is_logged or not self._keeper.is_log_due(unit, look):
            return
        prefix = '' if self.name is None else f'{self.name}/'
        metrics = {f'{prefix}{name}': value for name, value in self._keeper.measured(module).items()}
        metrics['epoch'] = trainer.current_epoch  # as in the rows that Lightning writes
        for logger in trainer.loggers:  # at the step of what the module logs
            logger.log_metrics(metrics, step=trainer.fit_loop.epoch_loop._batches_that_stepped)

    # Evaluation

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Lends the average that validation asks for."""
        self._lend('validate', trainer, pl_module)

    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Lends the average that this dataloader asks for."""
        self._lend('validate', trainer, pl_module, dataloader_idx)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Gives the training weights back."""
        self._use(TRAINING, pl_module)

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Lends the average that the test asks for."""
        self._lend('test', trainer, pl_module)

    def on_test_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Lends the average that this dataloader asks for."""
        self._lend('test', trainer, pl_module, dataloader_idx)

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Gives the training weights back."""
        self._use(TRAINING, pl_module)

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Lends the average that predictions ask for."""
        self._lend('predict', trainer, pl_module)

    def on_predict_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Lends the average that this dataloader asks for."""
        self._lend('predict', trainer, pl_module, dataloader_idx)

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Gives the training weights back."""
        self._use(TRAINING, pl_module)

    def _lend(self, stage: str, trainer: Trainer, model: LightningModule, loader: int = 0) -> None:
        """Lends what an evaluation asks for; of several callbacks, the one that names it lends, or else the first."""
        if self._of() is not model:
            if trainer.state.fn == stage and loader == 0:  # not in the sanity check before training
                what = 'there is no average yet' if self._module is None else 'the average is of another module'
                warnings.warn(f'{stage} uses the weights as they are: {what}. {_PASS_IT}', stacklevel=2)
            return
        key = f'dataloader_idx_{loader}'
        callbacks = [each for each in _callbacks(trainer) if isinstance(each, WeightAverage)]
        owners = [each for name in (key, stage) for each in callbacks if name in each.evaluate_with]
        if (owners or callbacks)[0] is self:
            self._use(self.evaluate_with.get(key, self.evaluate_with.get(stage, self.labels[0])), model)

    def _use(self, weights: str, model: nn.Module) -> None:
        if weights != TRAINING:
            self._follow(model)
        self._keeper.use(weights, model)

    # Checkpoints

    def state_dict(self) -> dict[str, Any]:
        """The averages and their counters, in plain types and tensors; see ``checkpoints.formats``.

        Of a sharded model the tensors are DTensors, of which each process has its part; a checkpoint has them whole, or
        each part in a folder.
        """
        self._end_batch()  # a callback that comes before this one may save at the end of a batch
        state = {_REPR: repr(self), **self._keeper.state_dict(), _RUN: self._run.state_dict()}
        state.pop(formats.STASH, None)  # the checkpoint holds the training weights as the model
        return state

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Loads what :meth:`state_dict` returned, whole or of as many processes as now. All of it is checked first.

        Raises:
            ValueError: names, shapes, or a version that do not fit, all listed. Nothing is changed then.
        """
        run = self._run.checked(state_dict.get(_RUN, {}), self._what)
        state = self._with_shards(state_dict) if sharded_format.is_split(state_dict) else state_dict
        self._keeper.load_state_dict(state, self._what)
        self._run.load(run)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Gathers the averages of a sharded model, or puts them where a folder takes each process's part."""
        states = checkpoint['callbacks']
        state = states[self.state_key]
        if any(map(is_shard, checkpoint['state_dict'].values())):
            # Lightning pickles on rank 0 what is neither the model nor listed as an optimizer.
            states[self.state_key], tensors = sharded_format.split(state)
            if tensors:
                checkpoint['optimizer_states'].append({sharded_format.AVERAGES: {self.state_key: tensors}})
        else:
            states[self.state_key] = gathered(state, is_kept=trainer.is_global_zero)

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Takes the module for the one that the averages in the checkpoint are of."""
        if self.state_key in (checkpoint.get('callbacks') or {}) and self._of() is not pl_module:
            self._keeper.forget()
            self._module = weakref.ref(pl_module)

    def _with_shards(self, state: Mapping[str, Any]) -> Outline:
        """A state whose tensors a sharded checkpoint has elsewhere, from where each process will read its own part."""
        folder = self._run.trainer.ckpt_path if self._run.is_set_up else None
        if folder is None:
            raise ValueError(
                f'{self._what} is that of a sharded checkpoint, which has the tensors elsewhere in its folder. Pass '
                'the folder to the Trainer, as in trainer.fit(model, ckpt_path=folder).'
            )
        reader = FileSystemReader(folder)
        own = (sharded_format.AVERAGES, self.state_key)
        paths = (reader.read_metadata().planner_data or {}).values()
        return Outline(state, next((path[:3] for path in paths if path[1:3] == own), own), reader, self._what)

    @property
    def _what(self) -> str:
        """A state of this callback, in the words of an error."""
        return f'the saved {self.state_key} state'

    def __repr__(self) -> str:
        parameters = inspect.signature(type(self)).parameters
        given = {**self._keeper.arguments, 'evaluate_with': self.evaluate_with or None, 'name': self.name}
        if given['half_life'] is None:
            del given['half_life']
        shown = (f'{name}={value!r}' for name, value in given.items() if value != parameters[name].default)
        return f'{type(self).__name__}({", ".join(shown)})'

    def __getstate__(self) -> dict[str, Any]:
        """For pickle and deepcopy: without the tie to the module in training."""
        return {**self.__dict__, '_module': None}


def _check_evaluations(evaluate_with: Mapping[str, str] | None, labels: Sequence[str]) -> dict[str, str]:
    checked = check_evaluate_with(evaluate_with, labels)
    for key in checked:
        if key not in _STAGES and not _LOADER.fullmatch(key):
            raise ArgumentError(
                f'evaluate_with names the evaluation {key!r}, which Lightning does not have. '
                f'{suggestion(key, (*_STAGES, "dataloader_idx_0"), "It has")}',
                'evaluate_with',
            )
    return checked


def _callbacks(trainer: Any) -> list[Any]:
    return trainer.callbacks  # which Lightning declares nowhere


def _refuse_rivals(callbacks: Sequence[Any]) -> None:
    for each in callbacks:
        if any(base.__name__ == 'WeightAveraging' for base in type(each).__mro__):
            raise ValueError(
                f'WeightAverage and {type(each).__qualname__} in one Trainer: both put an average into the model, and '
                'an evaluation could use only one. Keep one of them.'
            )


def _model_state_dict(strategy: Any, model: nn.Module) -> dict[str, Any]:
    """What a strategy saves as the model, with the training weights while the model holds an average."""
    saved = type(strategy).lightning_module_state_dict(strategy)
    is_full = not any(map(is_shard, saved.values()))
    put_training_weights(saved, model, loan.training_weights(model), is_full=is_full)
    return saved
