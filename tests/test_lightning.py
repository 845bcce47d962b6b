"""WeightAverage in Lightning's Trainer: the contract, against the real library."""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from plain import same_bits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

pl = pytest.importorskip('lightning.pytorch')
from lightning.pytorch.callbacks import (  # noqa: E402
    EarlyStopping,
    EMAWeightAveraging,
    ModelCheckpoint,
    OnExceptionCheckpoint,
)
from lightning.pytorch.loggers.logger import Logger  # noqa: E402
from lightning.pytorch.plugins.precision import MixedPrecision  # noqa: E402

from composer_ema import load_average  # noqa: E402
from composer_ema.lightning import WeightAverage  # noqa: E402
from composer_ema.lightning import callback as callback_module  # noqa: E402
from composer_ema.shadow.shadow_model import ShadowModel  # noqa: E402
from composer_ema.spans import ArgumentError  # noqa: E402

pytestmark = [
    pytest.mark.filterwarnings('ignore::lightning.pytorch.utilities.warnings.PossibleUserWarning'),
    pytest.mark.filterwarnings('ignore:.*does not have many workers'),
    pytest.mark.filterwarnings('ignore:.*is longer than the run'),
    pytest.mark.filterwarnings('ignore:.*the average.*still'),
    pytest.mark.filterwarnings('ignore:`isinstance.treespec, LeafSpec.` is deprecated'),
]

BATCHES, EPOCHS = 6, 2
STEPS = BATCHES * EPOCHS
# The last batch of an epoch is smaller.
SAMPLES = 4 * (BATCHES - 1) + 2
HALF_LIFE = '3ba'


class Module(pl.LightningModule):
    """Records the weights after each batch, and those that each evaluation sees."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))
        self.trained: list[dict[str, Tensor]] = []
        self.seen: list[tuple[str, dict[str, Tensor]]] = []

    def loss(self, batch: Any) -> Tensor:
        return (self.net(batch[0]).squeeze(1) - batch[1]).square().mean()

    def training_step(self, batch: Any, _: int) -> Tensor:
        return self.loss(batch)

    def on_train_batch_end(self, *_: Any) -> None:
        self.trained.append(copies(self))

    def validation_step(self, batch: Any, index: int, dataloader_idx: int = 0) -> None:
        self._look('validate', index, dataloader_idx)
        self.log('loss', self.loss(batch), batch_size=len(batch[1]))

    def test_step(self, batch: Any, index: int, dataloader_idx: int = 0) -> None:
        self._look('test', index, dataloader_idx)

    def predict_step(self, batch: Any, index: int, dataloader_idx: int = 0) -> None:
        self._look('predict', index, dataloader_idx)

    def _look(self, stage: str, index: int, loader: int) -> None:
        if index == 0:
            self.seen.append((f'{stage} {loader}', copies(self)))

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters(), 0.05)


class Resumable(DataLoader):
    """A loader that goes on where a checkpoint was taken, as Lightning asks for."""

    begin = done = 0

    def __iter__(self) -> Iterator[Any]:
        begin, self.begin = self.begin, 0
        for index, batch in enumerate(super().__iter__()):
            if index >= begin:
                self.done = (index + 1) % len(self)
                yield batch

    def state_dict(self) -> dict[str, int]:
        return {'done': self.done}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.begin = state['done']


def loader() -> Resumable:
    generator = torch.Generator().manual_seed(1)
    data = torch.randn(SAMPLES, 3, generator=generator), torch.randn(SAMPLES, generator=generator)
    return Resumable(TensorDataset(*data), batch_size=4)


def copies(module: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in module.state_dict().items()}


def average_of(callback: WeightAverage, label: str | None = None) -> dict[str, Tensor]:
    shadow = callback.shadow(label)
    assert shadow is not None
    return {name: tensor.clone() for name, tensor in shadow.lent_tensors().items()}


def trainer_of(callbacks: Any = (), **arguments: Any) -> Any:
    quiet = {'logger': False, 'enable_progress_bar': False, 'enable_model_summary': False, 'accelerator': 'cpu'}
    arguments = {'max_epochs': EPOCHS, 'enable_checkpointing': False, **quiet, **arguments}
    return pl.Trainer(callbacks=list(callbacks), **arguments)


def fit(*callbacks: Any, module: Any = None, ckpt_path: Any = None, **arguments: Any) -> Any:
    module = module or Module()
    trainer_of(callbacks, **arguments).fit(module, loader(), loader(), ckpt_path=ckpt_path)
    return module


def every_step(folder: Path) -> Any:
    return ModelCheckpoint(folder, filename='{step}', save_top_k=-1, every_n_train_steps=1)


@dataclass
class Saving(pl.Callback):
    """Saves a checkpoint in a hook of every batch."""

    path: Path
    hook: str
    weights_only: bool = False
    shown: list[dict[str, Tensor]] = field(default_factory=list)

    def __post_init__(self) -> None:
        setattr(self, self.hook, self._save)

    def _save(self, trainer: Any, module: Any, *_: Any) -> None:
        if trainer.global_step:
            self.shown.append(copies(module))
            trainer.save_checkpoint(self.path / f'{trainer.global_step}.ckpt', weights_only=self.weights_only)


@dataclass
class Run:
    """A run with an average, checkpoints after every step, and the same without."""

    folder: Path
    alone: Any
    beside: Any
    callback: WeightAverage
    averages: list[dict[str, Tensor]]

    def checkpoint(self, step: int) -> Path:
        return self.folder / f'step={step}.ckpt'


class Averages(pl.Callback):
    """The average after each batch."""

    def __init__(self, of: WeightAverage) -> None:
        self.of, self.found = of, []

    def on_train_batch_end(self, *_: Any) -> None:
        self.found.append(average_of(self.of))


@pytest.fixture(scope='module')
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp('lightning')
    callback = WeightAverage(HALF_LIFE)
    watching = Averages(callback)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        module = fit(callback, watching, every_step(folder), enable_checkpointing=True, val_check_interval=3)
        return Run(folder, fit(), module, callback, watching.found)


def closed_form(trained: list[dict[str, Tensor]], name: str, half_lives: Callable[[int], float]) -> Tensor:
    """The average of one tensor in float64; ``half_lives(i)`` pass between the steps i - 1 and i."""
    average = trained[0][name].double()
    for index, weights in enumerate(trained[1:], 1):
        average += (1 - 2 ** -half_lives(index)) * (weights[name].double() - average)
    return average


class TestTraining:
    def test_the_average_is_that_of_the_formula(self, run):
        for name in ('net.0.weight', 'net.1.running_var'):
            expected = closed_form(run.beside.trained, name, lambda _: 1 / 3)
            torch.testing.assert_close(run.averages[-1][name].double(), expected, rtol=1e-6, atol=1e-7)

    def test_it_is_bit_identical_with_and_without(self, run):
        assert len(run.alone.trained) == STEPS
        assert all(map(same_bits, run.alone.trained, run.beside.trained))
        assert same_bits(copies(run.beside), run.beside.trained[-1])

    @pytest.mark.parametrize(
        'settings',
        [
            {'half_life': '0.5ep', 'update_interval': '2ba', 'evaluate_with': {'validate': 'training'}},
            {'half_life': {'short': '6sp', 'long': '0.1dur'}, 'update_interval': '1ep', 'compensated': True},
            {'power': 0.1, 'ema_start': '0.5dur', 'buffers': 'copy', 'shadow_dtype': 'bfloat16'},
        ],
        ids=['epochs', 'several', 'power'],
    )
    def test_so_it_is_for_other_settings(self, run, settings):
        module = fit(WeightAverage(**settings), val_check_interval=2)
        assert all(map(same_bits, run.alone.trained, module.trained))

    def test_a_batch_is_a_step_of_the_optimizer(self):
        module = fit(callback := WeightAverage(HALF_LIFE), accumulate_grad_batches=4)
        stepped = [module.trained[batch - 1] for batch in (4, 6, 10, 12)]  # Lightning steps at the end of an epoch
        assert callback.shadow().num_updates == len(stepped)
        expected = closed_form(stepped, 'net.0.weight', lambda _: 1 / 3)
        torch.testing.assert_close(average_of(callback)['net.0.weight'].double(), expected, rtol=1e-6, atol=1e-7)

    @pytest.mark.parametrize(('half_life', 'of_full_batch'), [('8sp', 4 / 8), ('0.5ep', 1 / 3)])
    def test_samples_and_epochs_pass_as_they_are_trained(self, half_life, of_full_batch):
        module = fit(callback := WeightAverage(half_life))
        in_samples = half_life.endswith('sp')

        def half_lives(index: int) -> float:
            return of_full_batch / 2 if in_samples and index % BATCHES == BATCHES - 1 else of_full_batch

        expected = closed_form(module.trained, 'net.0.weight', half_lives)
        torch.testing.assert_close(average_of(callback)['net.0.weight'].double(), expected, rtol=1e-6, atol=1e-7)

    def test_the_update_at_the_end_of_an_epoch_comes_before_its_validation(self):
        module = fit(WeightAverage('0ba', update_interval='1ep'))
        assert same_bits(module.seen[1][1], module.trained[BATCHES - 1])
        assert same_bits(module.seen[2][1], module.trained[-1])

    def test_an_epoch_that_the_module_cuts_short_has_an_end(self):
        class Short(Module):
            def on_train_batch_start(self, _: Any, index: int) -> int | None:
                return -1 if index == 2 else None

        fit(callback := WeightAverage('1ep', update_interval='1ep'), module=Short())
        assert callback.shadow().num_updates == EPOCHS

    @pytest.mark.parametrize('hook', ['on_train_end', 'on_train_epoch_end'])
    def test_a_batch_that_the_module_leaves_out_has_no_samples(self, tmp_path, hook):
        class Short(Module):
            def on_train_batch_start(self, _: Any, index: int) -> int | None:
                return -1 if index == 2 else None

        fit(callback := WeightAverage('8sp'), Saving(tmp_path, hook), module=Short())
        [state] = callback.state_dict()['averages'].values()
        assert state['last_update']['sp'] == 4 * 2 * EPOCHS

    def test_max_steps_within_an_epoch_is_the_end_of_none(self):
        fit(callback := WeightAverage('1ep', update_interval='1ep'), max_epochs=-1, max_steps=BATCHES + 2)
        assert callback.shadow().num_updates == 1

    def test_two_optimizers_are_two_batches_and_one_update(self):
        class Gan(Module):
            automatic_optimization = False

            def training_step(self, batch: Any, _: int) -> None:
                for optimizer in self.optimizers():
                    optimizer.zero_grad()
                    self.manual_backward(self.loss(batch))
                    optimizer.step()

            def configure_optimizers(self) -> Any:
                return [torch.optim.SGD(part.parameters(), 0.1) for part in (self.net[0], self.net[2])]

        module = fit(callback := WeightAverage('4ba'), module=Gan())
        assert callback.shadow().num_updates == STEPS
        expected = closed_form(module.trained, 'net.0.weight', lambda _: 2 / 4)
        torch.testing.assert_close(average_of(callback)['net.0.weight'].double(), expected, rtol=1e-6, atol=1e-7)

    def test_a_step_that_the_gradient_scaler_leaves_out_makes_no_update_and_is_no_time(self):
        class Overflowing(Module):
            def on_after_backward(self) -> None:
                if self.global_step in (3, 4):
                    self.net[0].weight.grad.fill_(torch.inf)

        scaled = MixedPrecision('16-mixed', 'cpu', torch.amp.GradScaler('cpu', init_scale=1.0))
        module = fit(callback := WeightAverage(HALF_LIFE), module=Overflowing(), plugins=scaled)
        kept = [weights for index, weights in enumerate(module.trained) if index not in (3, 4)]
        assert callback.shadow().num_updates == STEPS - 2
        expected = closed_form(kept, 'net.0.weight', lambda _: 1 / 3)
        torch.testing.assert_close(average_of(callback)['net.0.weight'].double(), expected, rtol=1e-5, atol=1e-6)


class Rows(Logger):
    """What is logged, by step."""

    name = version = None

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[tuple[int | None, dict[str, float]]] = []

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        if any('num_updates' in name for name in metrics):
            self.rows.append((step, metrics))

    def log_hyperparams(self, *_: Any, **__: Any) -> None: ...


def distance(average: dict[str, Tensor], weights: dict[str, Tensor]) -> float:
    names = ('net.0.weight', 'net.0.bias', 'net.1.weight', 'net.1.bias', 'net.2.weight', 'net.2.bias')
    average, weights = (torch.cat([each[name].flatten() for name in names]) for each in (average, weights))
    return float((average - weights).norm() / weights.norm())


class TestLogs:
    def test_each_epoch_shows_once_how_far_the_average_is(self):
        callback, rows = WeightAverage(HALF_LIFE), Rows()
        watching = Averages(callback)
        module = fit(callback, watching, logger=rows)
        assert [step for step, _ in rows.rows] == [BATCHES - 1, STEPS - 1]
        for step, row in rows.rows:
            assert row == {
                'ema/smoothing': pytest.approx(2 ** (-1 / 3)),
                'ema/num_updates': step + 1,
                'epoch': step // BATCHES,
                'ema/relative_distance': pytest.approx(distance(watching.found[step], module.trained[step]), rel=1e-4),
            }

    @pytest.mark.parametrize(
        ('interval', 'steps'), [('4ba', [3, 7, 11]), ('0.25dur', [2, 5, 8, 11]), ('2ep', [11]), (None, [])]
    )
    def test_so_it_is_at_the_interval_and_at_no_other_time(self, interval, steps, monkeypatch):
        rows, measured = Rows(), []
        real = ShadowModel.relative_distance
        monkeypatch.setattr(ShadowModel, 'relative_distance', lambda *of: measured.append(of) or real(*of))
        fit(WeightAverage(HALF_LIFE, log_interval=interval), logger=rows)
        assert [step for step, _ in rows.rows] == steps
        assert len(measured) == len(steps)

    def test_an_interval_without_a_logger_measures_nothing_and_says_so(self, monkeypatch):
        monkeypatch.setattr(ShadowModel, 'relative_distance', None)
        told = "log_interval='2ba' logs nothing: the Trainer has no logger. Pass it one, as in Trainer"
        with pytest.warns(UserWarning, match=told):
            fit(WeightAverage(HALF_LIFE, log_interval='2ba'))
        for interval in ('1ep', None):  # the first is what nobody asked for
            with warnings.catch_warnings():
                warnings.filterwarnings('error', '.*logs nothing')
                fit(WeightAverage(HALF_LIFE, log_interval=interval))

    def test_names_are_those_of_the_callback_and_of_the_label(self):
        rows = Rows()
        averages = WeightAverage(half_life={'short': '2ba'}, average={'all': 'equal'}, skip_nonfinite=True, name='a')
        fit(averages, logger=rows)
        of_label = {f'a/{label}/{what}' for label in ('short', 'all') for what in ('num_updates', 'relative_distance')}
        assert rows.rows[-1][1].keys() == {*of_label, 'a/short/smoothing', 'a/ema/skipped_elements', 'epoch'}

    def test_the_smoothing_is_that_of_an_update_since_the_state_was_loaded(self, run):
        callback = copy.deepcopy(run.callback)
        assert callback._keeper.progress().keys() == {'ema/smoothing', 'ema/num_updates'}
        callback.load_state_dict(callback.state_dict())
        assert callback._keeper.progress() == {'ema/num_updates': STEPS}

    @pytest.mark.filterwarnings('ignore:Be aware that when using `ckpt_path`')
    def test_an_epoch_is_not_shown_again_when_a_checkpoint_of_its_validation_is_resumed(self, tmp_path):
        in_validation = ModelCheckpoint(tmp_path, save_top_k=-1, filename='{step}', save_on_train_epoch_end=False)
        fit(WeightAverage(HALF_LIFE), in_validation, enable_checkpointing=True)
        for step, shown in ((BATCHES, [STEPS]), (STEPS, [])):
            rows = Rows()
            fit(WeightAverage(HALF_LIFE), logger=rows, ckpt_path=tmp_path / f'step={step}.ckpt')
            assert [row['ema/num_updates'] for _, row in rows.rows] == shown

    def test_an_epoch_that_the_module_cuts_short_is_shown_once(self):
        rows, module = Rows(), Module()
        module.on_train_batch_start = lambda batch, index: -1 if index == 4 else None
        fit(WeightAverage(HALF_LIFE), module=module, logger=rows)
        assert [row['ema/num_updates'] for _, row in rows.rows] == [4, 8]


class TestEvaluation:
    def test_validation_sees_the_average_of_the_moment(self, run):
        stages, seen = zip(*run.beside.seen, strict=True)
        assert set(stages) == {'validate 0'}
        assert same_bits(seen[0], copies(Module()))  # the sanity check, before the first step
        assert all(map(same_bits, seen[1:], [run.averages[step - 1] for step in (3, 6, 9, 12)]))

    def test_test_and_predict_see_it_and_training_goes_on_after_them(self):
        module, trainer = Module(), trainer_of([callback := WeightAverage(HALF_LIFE)], max_epochs=1)
        trainer.fit(module, loader())
        average, weights = average_of(callback), copies(module)
        trainer.test(module, loader(), verbose=False)
        trainer.predict(module, loader())
        assert [stage for stage, _ in module.seen] == ['test 0', 'predict 0']
        assert all(same_bits(seen, average) for _, seen in module.seen)
        assert same_bits(copies(module), weights)
        trainer.fit_loop.max_epochs = 2
        trainer.fit(module, loader())
        assert callback.shadow().num_updates == STEPS

    def test_each_evaluation_sees_what_it_asks_for(self):
        wanted = {'validate': 'long', 'test': 'training', 'dataloader_idx_1': 'training', 'predict': 'short'}
        callback = WeightAverage({'short': '1ba', 'long': '9ba'}, evaluate_with=wanted)
        module, trainer = Module(), trainer_of([callback], max_epochs=1, num_sanity_val_steps=0)
        trainer.fit(module, loader(), [loader(), loader()])
        trainer.test(module, [loader(), loader()], verbose=False)
        trainer.predict(module, loader())
        long, short, training = average_of(callback, 'long'), average_of(callback, 'short'), copies(module)
        expected = {
            'validate 0': long, 'validate 1': training, 'test 0': training, 'test 1': training, 'predict 0': short,
        }  # fmt: skip
        assert [stage for stage, _ in module.seen] == list(expected)
        assert all(same_bits(seen, expected[stage]) for stage, seen in module.seen)

    @pytest.mark.parametrize('error', [RuntimeError, KeyboardInterrupt])
    def test_an_exception_in_it_leaves_the_training_weights_and_saves_them(self, tmp_path, error):
        class Failing(Module):
            def validation_step(self, batch: Any, index: int, dataloader_idx: int = 0) -> None:
                if self.trained:
                    raise error

        module, callback = Failing(), WeightAverage(HALF_LIFE)
        with pytest.raises(SystemExit if error is KeyboardInterrupt else error):
            fit(OnExceptionCheckpoint(tmp_path), callback, module=module, enable_checkpointing=True)
        assert same_bits(copies(module), module.trained[-1])
        saved = torch.load(tmp_path / 'on_exception.ckpt')
        assert same_bits(saved['state_dict'], module.trained[-1])

    def test_a_metric_of_the_average_stops_and_chooses(self, tmp_path):
        best = ModelCheckpoint(tmp_path, monitor='loss', filename='best')
        stop = EarlyStopping('loss', patience=0)
        module = fit(WeightAverage(HALF_LIFE), best, stop, enable_checkpointing=True, max_epochs=20)
        with torch.no_grad():
            module.eval().load_state_dict(load_average(best.best_model_path, module))
            losses = [(module.loss(batch), len(batch[1])) for batch in loader()]
        expected = sum(loss * size for loss, size in losses) / SAMPLES
        torch.testing.assert_close(best.best_model_score, expected)

    def test_without_an_average_it_says_so(self):
        with pytest.warns(UserWarning, match='validate uses the weights as they are: there is no average yet'):
            trainer_of([WeightAverage()]).validate(Module(), loader(), verbose=False)

    def test_another_module_is_not_lent_the_average(self):
        module, other, trainer = Module(), Module(), trainer_of([WeightAverage()], max_epochs=1)
        trainer.fit(module, loader())
        with pytest.warns(UserWarning, match='test uses the weights as they are: the average is of another module'):
            trainer.test(other, loader(), verbose=False)
        assert same_bits(other.seen[0][1], copies(other))


class TestCheckpoints:
    def test_state_dict_has_the_training_weights_and_the_callback_the_average(self, run):
        for step in (1, 3, BATCHES, STEPS):
            saved = torch.load(run.checkpoint(step), weights_only=True)
            assert same_bits(saved['state_dict'], run.beside.trained[step - 1])
            assert same_bits(load_average(run.checkpoint(step)), run.averages[step - 1])
            assert saved['callbacks']['WeightAverage']['repr'] == "WeightAverage(half_life='3ba')"
        loaded = Module.load_from_checkpoint(run.checkpoint(STEPS))
        assert same_bits(copies(loaded), run.beside.trained[-1])

    @pytest.mark.parametrize('step', [1, 4, BATCHES, BATCHES + 1])
    def test_a_run_goes_on_to_the_same_bits(self, run, step):
        module = fit(callback := WeightAverage(HALF_LIFE), ckpt_path=run.checkpoint(step))
        assert len(module.trained) == STEPS - step
        assert same_bits(copies(module), run.beside.trained[-1])
        assert same_bits(average_of(callback), run.averages[-1])
        state, uninterrupted = callback.state_dict(), run.callback.state_dict()
        for each in (state, uninterrupted):
            for part in ('parameters', 'buffers'):
                del each['averages']['ema'][part]
        assert state == uninterrupted

    @pytest.mark.parametrize('hook', ['on_train_batch_start', 'on_before_optimizer_step'])
    def test_a_run_that_an_exception_ended_within_a_batch_goes_on_with_its_average(self, tmp_path, hook):
        class Failing(Module):
            pass

        def fail(module: Module, *_: Any) -> None:
            if len(module.trained) == 3:
                raise RuntimeError('of a batch')

        setattr(Failing, hook, fail)
        failed, callbacks = Failing(), (WeightAverage(HALF_LIFE), OnExceptionCheckpoint(tmp_path))
        with pytest.raises(RuntimeError, match='of a batch'):
            fit(*callbacks, module=failed, enable_checkpointing=True)
        module = fit(callback := WeightAverage(HALF_LIFE), ckpt_path=tmp_path / 'on_exception.ckpt')
        expected = closed_form([*failed.trained, *module.trained], 'net.0.weight', lambda _: 1 / 3)
        torch.testing.assert_close(average_of(callback)['net.0.weight'].double(), expected)

    def test_a_run_without_the_callback_goes_on_as_if_there_had_been_none(self, run):
        module = fit(ckpt_path=run.checkpoint(4))
        assert same_bits(copies(module), run.alone.trained[-1])

    @pytest.mark.parametrize('weights_only', [False, True])
    def test_one_that_is_saved_during_validation_is_like_any_other(self, run, tmp_path, weights_only):
        saving = Saving(tmp_path, 'on_validation_batch_end', weights_only)
        fit(WeightAverage(HALF_LIFE), saving)
        assert same_bits(saving.shown[0], run.averages[BATCHES - 1])
        saved = torch.load(tmp_path / f'{BATCHES}.ckpt')
        assert same_bits(saved['state_dict'], run.beside.trained[BATCHES - 1])
        assert 'training_weights' not in str(saved.get('callbacks'))

    def test_a_callback_that_saves_before_the_update_saves_the_updated_average(self, run, tmp_path):
        fit(Saving(tmp_path, 'on_train_batch_end'), WeightAverage(HALF_LIFE))
        assert same_bits(load_average(tmp_path / '4.ckpt'), run.averages[3])

    def test_a_fresh_trainer_evaluates_the_average_of_a_checkpoint(self, run):
        module, trainer = Module(), trainer_of([callback := WeightAverage(HALF_LIFE)])
        trainer.validate(module, loader(), ckpt_path=run.checkpoint(5), verbose=False)
        assert same_bits(module.seen[0][1], run.averages[4])
        assert same_bits(copies(module), run.beside.trained[4])
        trainer.fit(module, loader(), ckpt_path=run.checkpoint(5))
        assert same_bits(average_of(callback), run.averages[-1])

    def test_a_state_that_does_not_fit_is_refused_by_name(self, run, tmp_path):
        saved = torch.load(run.checkpoint(4))
        saved['callbacks']['WeightAverage']['averages']['ema']['parameters']['net.0.weight'] = torch.zeros(9)
        torch.save(saved, tmp_path / 'wrong.ckpt')
        with pytest.raises(ValueError, match=r'net\.0\.weight'):
            fit(WeightAverage(HALF_LIFE), ckpt_path=tmp_path / 'wrong.ckpt')

    def test_another_half_life_goes_on_with_a_warning(self, run):
        with pytest.warns(UserWarning, match="averaged with half_life='3ba', this run continues with half_life='5ba'"):
            fit(callback := WeightAverage('5ba'), ckpt_path=run.checkpoint(STEPS - 1))
        assert callback.shadow().num_updates == STEPS

    def test_several_callbacks_have_names(self, tmp_path):
        first = WeightAverage('1ba', include='net.0')
        second = WeightAverage('9ba', name='head', include='net.2', evaluate_with={'validate': 'ema'})
        module, trainer = Module(), trainer_of([first, second], max_epochs=1, num_sanity_val_steps=0)
        trainer.fit(module, loader(), loader())
        trainer.save_checkpoint(tmp_path / 'two.ckpt')
        assert set(torch.load(tmp_path / 'two.ckpt')['callbacks']) == {'WeightAverage', 'WeightAverage.head'}
        [(_, seen)] = module.seen
        assert torch.equal(seen['net.2.weight'], average_of(second)['net.2.weight'])
        assert torch.equal(seen['net.0.weight'], module.trained[-1]['net.0.weight'])
        with pytest.raises(RuntimeError, match='more than one stateful callback'):
            trainer_of([WeightAverage(), WeightAverage()])


class TestArguments:
    @pytest.mark.parametrize(
        ('arguments', 'match'),
        [
            ({'half_life': '9tok'}, "half_life='9tok' counts tokens, but Lightning counts none. Pass samples or"),
            ({'half_life': '1iter'}, 'but this run has none. Pass epochs or batches'),
        ],
    )
    def test_a_unit_that_lightning_does_not_count_is_refused_before_training(self, arguments, match):
        module = Module()
        with pytest.raises(ArgumentError, match=match):
            fit(WeightAverage(**arguments), module=module)
        assert not module.trained

    def test_samples_are_refused_where_a_batch_does_not_tell(self):
        class Uneven(Module):
            def on_after_batch_transfer(self, batch: Any, _: int) -> Any:
                return *batch, torch.zeros(1)

        with pytest.raises(ArgumentError, match="half_life='9sp' counts samples, but the tensors of a batch have diff"):
            fit(WeightAverage('9sp'), module=Uneven())

    def test_a_share_of_an_endless_run_is_refused(self):
        with pytest.raises(ArgumentError, match='share of the run, but neither max_epochs nor max_steps ends it'):
            fit(WeightAverage('0.1dur'), max_epochs=-1)

    def test_an_evaluation_that_there_is_not_is_named(self):
        with pytest.raises(
            ArgumentError, match=r"the evaluation 'valid', which Lightning does not have\. Did you mean"
        ):
            WeightAverage(evaluate_with={'valid': 'training'})

    def test_lightnings_own_average_is_refused_beside_it(self):
        with pytest.raises(ValueError, match='WeightAverage and EMAWeightAveraging in one Trainer'):
            fit(WeightAverage(), EMAWeightAveraging())

    def test_the_error_for_a_typo_names_the_argument(self):
        with pytest.raises(TypeError, match=r"no argument 'half_live'\. Did you mean 'half_life'"):
            WeightAverage(half_live='1ba')

    def test_without_lightning_the_import_names_the_command(self, monkeypatch):
        def fail(name: str) -> None:
            raise ModuleNotFoundError(name=name.partition('.')[0])

        monkeypatch.setattr(callback_module.importlib, 'import_module', fail)
        with pytest.raises(ModuleNotFoundError, match='pip install lightning'):
            callback_module._base()

    def test_it_can_be_copied_before_and_after_training(self, run):
        for callback in (WeightAverage(HALF_LIFE), run.callback):
            assert repr(pickle.loads(pickle.dumps(callback))) == repr(callback) == "WeightAverage(half_life='3ba')"
        assert same_bits(average_of(copy.deepcopy(run.callback)), run.averages[-1])

    def test_the_other_name_of_the_package_takes_it_too(self):
        other = pytest.importorskip('pytorch_lightning')
        methods = {name: value for name, value in vars(Module).items() if callable(value) and name != '__init__'}
        module = type('Other', (other.LightningModule,), methods)()
        module.net, module.trained, module.seen = Module().net, [], []
        callback = WeightAverage(HALF_LIFE)
        trainer = other.Trainer(
            callbacks=[callback], max_epochs=1, logger=False, enable_checkpointing=False, enable_progress_bar=False,
            enable_model_summary=False, accelerator='cpu',
        )  # fmt: skip
        trainer.fit(module, loader(), loader())
        assert callback.shadow().num_updates == BATCHES
        assert same_bits(module.seen[-1][1], average_of(callback))


class TestLightningsOwn:
    """What the card says of Lightning's own callback. Where one of these fails, the card has to change."""

    def test_its_checkpoints_and_the_module_after_training_hold_the_average(self, tmp_path):
        module, trainer = Module(), trainer_of([own := EMAWeightAveraging(decay=0.9)], max_epochs=1)
        trainer.fit(module, loader())
        trainer.save_checkpoint(tmp_path / 'own.ckpt')
        saved, average = torch.load(tmp_path / 'own.ckpt'), copies(own._average_model.module)
        assert same_bits(copies(module), average)
        assert same_bits(saved['state_dict'], average)
        counts = module.trained[-1]['net.1.num_batches_tracked'], average['net.1.num_batches_tracked']
        assert counts == (BATCHES, 1)
        trainer.fit_loop.max_epochs = EPOCHS
        trainer.fit(module, loader())
        assert own._average_model.n_averaged == BATCHES  # of twice as many

    def test_weights_and_average_change_places_where_a_validation_raises_or_saves(self, tmp_path):
        class Failing(Module):
            def validation_step(self, batch: Any, index: int, dataloader_idx: int = 0) -> None:
                if self.trained:
                    self.trainer.save_checkpoint(tmp_path / 'within.ckpt')
                    raise RuntimeError

        module = Failing()
        with pytest.raises(RuntimeError):
            fit(
                EMAWeightAveraging(decay=0.9), OnExceptionCheckpoint(tmp_path), module=module, enable_checkpointing=True
            )
        assert not same_bits(copies(module), module.trained[-1])
        for name in ('within', 'on_exception'):
            saved = torch.load(tmp_path / f'{name}.ckpt')
            assert same_bits(saved['state_dict'], module.trained[-1])
            assert not same_bits(saved['current_model_state'], module.trained[-1])

    @pytest.mark.parametrize('is_ours', [True, False])
    def test_each_validation_rounds_its_average_of_a_bfloat16_model(self, is_ours):
        averages = []
        for settings in ({'val_check_interval': 1}, {'limit_val_batches': 0}):
            callback: Any = WeightAverage(smoothing=0.9) if is_ours else EMAWeightAveraging(decay=0.9)
            fit(callback, precision='bf16-true', **settings)
            averages.append(average_of(callback) if is_ours else copies(callback._average_model.module))
        assert averages[0]['net.0.weight'].dtype is torch.float32
        assert torch.equal(averages[0]['net.0.weight'], averages[1]['net.0.weight']) is is_ours
