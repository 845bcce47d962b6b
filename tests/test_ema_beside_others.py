"""EMA beside other algorithms, nested evaluations, odd buffers, and a clock that is set back."""

from __future__ import annotations

import warnings
from collections import OrderedDict, namedtuple

import pytest
import torch
import toy
from composer import Callback
from composer.algorithms import SWA, BlurPool, GhostBatchNorm, SqueezeExcite
from composer.core import Algorithm, Event
from torch import nn

from composer_ema import EMA, ShadowModel
from composer_ema.shadow import offload, plan


def test_after_the_clock_is_set_back_updates_go_on(trainer):
    ema = EMA('2ba')
    run = trainer([ema])
    run.fit()
    before = ema.ema_model.num_updates
    run.fit(duration='2ep', reset_time=True)
    assert ema.ema_model.num_updates == 2 * before


@pytest.mark.parametrize('surgery', [BlurPool, SqueezeExcite, GhostBatchNorm], ids=lambda s: s.__name__)
def test_algorithms_that_replace_layers_may_stand_before_or_after(trainer, tmp_path, surgery):
    averages = []
    for place in (0, 1):
        ema, folder = EMA('2ba'), tmp_path / str(place)
        algorithms = [_operate(surgery)]
        algorithms.insert(place, ema)
        run = trainer(algorithms, save_folder=str(folder), save_interval='2ba', save_filename='ba{batch}.pt')
        run.fit()
        averages.append({name: tensor.clone() for name, tensor in ema.ema_model.named_parameters()})
        resumed = EMA('2ba')
        algorithms = [_operate(surgery)]
        algorithms.insert(place, resumed)
        trainer(algorithms, load_path=str(folder / 'ba2.pt')).fit()
        assert all(torch.equal(t, averages[-1][name]) for name, t in resumed.ema_model.named_parameters())
    assert averages[0].keys() == averages[1].keys()
    assert all(torch.equal(averages[0][name], averages[1][name]) for name in averages[0])


def _operate(surgery):
    return surgery(ghost_batch_size=2) if surgery is GhostBatchNorm else surgery(min_channels=1)


def test_the_states_of_other_algorithms_are_saved_as_they_are(trainer):
    pair = namedtuple('pair', 'first second')
    held = {'pair': pair(1, torch.ones(2)), 'ordered': OrderedDict(a=1)}

    class Other(Algorithm):
        def match(self, event, state):
            return False

        def apply(self, event, state, logger):
            raise AssertionError

        def state_dict(self):
            return held

    saved = dict(trainer([EMA('2ba'), Other()]).state.state_dict()['algorithms'])
    assert saved['EMA']['averages'].keys() == {'ema'}
    assert next(state for name, state in saved.items() if name.endswith('Other')) is held


def test_beside_composers_swa_the_update_stays_in_line(trainer):
    alone, beside = EMA('2ba'), EMA('2ba')
    trainer([alone])
    trainer([beside, SWA()])
    assert alone.ema_model._follower.overlap
    assert not beside.ema_model._follower.overlap


@pytest.mark.parametrize('moment', [Event.EVAL_START, Event.EVAL_BATCH_END])
def test_an_evaluation_inside_an_evaluation_leaves_the_outer_one_the_average(trainer, moment):
    class Inner(Callback):
        is_inside = False

        def run_event(self, event, state, logger):
            if event is Event.EVAL_BEFORE_FORWARD and not self.is_inside:
                held.append(ema.ema_weights_active)
            if event is moment and not self.is_inside:
                self.is_inside = True
                run.eval(eval_dataloader=toy.make_evaluator('inner'))
                self.is_inside = False

    ema, held = EMA('2ba'), []
    run = trainer([ema], callbacks=[Inner()], eval_dataloader=toy.make_evaluator('outer', '1ba'))
    run.fit()
    assert held
    assert all(held)
    assert not ema.ema_weights_active


def test_evaluating_between_forward_and_backward_leaves_the_graph_valid(trainer):
    class Evaluates(Callback):
        def after_loss(self, state, logger):
            kept = state.batch, state.outputs
            run.eval(eval_dataloader=toy.make_evaluator('between'))
            state.batch, state.outputs = kept  # which Composer does not give back

    ema = EMA('2ba')
    run = trainer([ema], callbacks=[Evaluates()])
    run.fit()
    assert ema.ema_model.num_updates > 1


def test_a_counter_that_evaluation_counts_up_goes_on_as_without_an_average(trainer):
    class Counts(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer('calls', torch.zeros((), dtype=torch.int64))

        def forward(self, inputs):
            self.calls += 1
            return inputs

    ends = []
    for algorithms in ([], [EMA('2ba')]):
        model = toy.make_model()
        model.module.append(Counts())
        trainer(algorithms, model=model, eval_dataloader=toy.make_evaluator('eval', '1ba')).fit()
        ends.append(int(model.module[-1].calls))
    assert ends[0] == ends[1]


def test_a_buffer_whose_elements_share_memory_is_left_alone(trainer):
    model = toy.make_model()
    model.module[0].register_buffer('shared', torch.ones(1).expand(4), persistent=False)
    ema = EMA('2ba')
    trainer([ema], model=model, eval_dataloader=toy.make_evaluator('eval', '1ba')).fit()
    assert not any('shared' in name for name, _ in ema.ema_model.named_buffers())


def test_an_average_too_coarse_for_its_updates_is_warned_of_once(trainer):
    message = r"kept in bfloat16, which rounds updates of weight 0.0001 away .* 100 % off.*rounding='stochastic'"
    with pytest.warns(UserWarning, match=message):
        trainer([EMA(smoothing=0.9999, shadow_dtype='bfloat16')]).fit()
    with warnings.catch_warnings():
        warnings.simplefilter('error', UserWarning)
        shadow = ShadowModel(toy.make_model(), dtype='bfloat16')
        shadow.update(toy.make_model(), smoothing=0.5)


@pytest.mark.parametrize(('argument', 'value'), [('log_interval', '9ep'), ('ema_start', '9ep')])
def test_what_comes_after_the_end_of_the_run_is_warned_of(trainer, argument, value):
    arguments = {'half_life': '2ba', argument: value}
    with pytest.warns(UserWarning, match=f"{argument}='{value}' is longer than the run"):
        trainer([EMA(**arguments)]).fit()


def test_an_update_beside_training_has_read_the_weights_before_the_optimizer_writes(trainer, monkeypatch):
    monkeypatch.setattr(offload, 'can_take', lambda shadow, source: True)
    ema, seen = EMA('2ba', log_interval=None), []

    class Looks(Callback):
        def batch_end(self, state, logger):
            seen.append(ema.ema_model.is_pending)

        def after_train_batch(self, state, logger):
            seen.append(ema.ema_model.is_pending)

    trainer(algorithms=[ema], callbacks=[Looks()], max_duration='3ba').fit()
    assert seen == [False, True] * 3


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a CUDA device')
@pytest.mark.parametrize('worth_forking', [plan.WORTH_FORKING, 0], ids=['in line', 'beside'])
@pytest.mark.parametrize('precision', ['fp32', 'amp_fp16'])
def test_on_a_gpu_a_hundred_batches_never_make_the_algorithm_synchronise(
    trainer, precision, worth_forking, monkeypatch
):
    """The Trainer itself may: it logs losses. Of float16, the first steps overflow, and the average skips them too."""

    monkeypatch.setattr(plan, 'WORTH_FORKING', worth_forking)

    class Strict(EMA):
        def apply(self, event, state, logger):
            if event not in (Event.AFTER_TRAIN_BATCH, Event.BATCH_END) or int(state.timestamp.batch) < 3:
                return super().apply(event, state, logger)
            torch.cuda.set_sync_debug_mode('error')
            try:
                return super().apply(event, state, logger)
            finally:
                torch.cuda.set_sync_debug_mode('default')

    class Overflows(Callback):
        count, scale = 0, None

        def batch_end(self, state, logger):
            now = None if state.scaler is None else state.scaler.get_scale()
            self.count += self.scale is not None and now < self.scale
            self.scale = now

        def fit_start(self, state, logger):
            self.batch_end(state, logger)

    algorithm, overflows = Strict('10ba', log_interval=None), Overflows()
    trainer(
        algorithms=[algorithm], callbacks=[overflows], device='gpu', precision=precision, max_duration='103ba'
    ).fit()
    assert algorithm.ema_model.num_updates == 103 - overflows.count
    assert (overflows.count > 0) == (precision == 'amp_fp16')
