"""The contract of the package, item by item, on real Composer runs; its slower halves run in subprocesses.

Covered pairs of the grid for item 1: every value of each axis in ``AXES`` meets every value of every other axis in at
least one run; ``test_the_grid_holds_every_pair_of_settings`` counts them.
"""

from __future__ import annotations

import copy
import functools
import io
import itertools
import math
import os
import re
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import toy
from composer import Callback, Event, Time, Trainer
from composer.algorithms import EMA as BuiltinEMA
from composer.algorithms import SAM, SWA, GradientClipping, LayerFreezing, SelectiveBackprop
from composer.core import TimeUnit
from composer.models import ComposerModel
from composer.optim import CosineAnnealingScheduler
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader, IterableDataset, TensorDataset
from toy import bits, make_data, make_evaluator, make_model, make_trainer, shadow_of, snapshot

from composer_ema import EMA, CheckpointError, export, load_average
from composer_ema import SWA as OurSWA
from composer_ema.trainer.weight_average import WeightAverage

SCRIPTS = Path(__file__).parent / 'scripts'

#: An average of each kind, so soon in so short a run that it differs from the weights.
AVERAGES: dict[str, Callable[..., WeightAverage]] = {
    'ema': lambda **arguments: EMA('2ba', **arguments),
    'swa': lambda **arguments: OurSWA('1ba', update_interval='1ba', **arguments),
}
each_average = pytest.mark.parametrize('average', AVERAGES.values(), ids=AVERAGES)


# 1. Training is untouched


def every_second_batch(state, event) -> bool:
    return event is Event.BATCH_END and int(state.timestamp.batch) % 2 == 0


def save_after_odd_batches(state, event) -> bool:
    return event is Event.BATCH_CHECKPOINT and int(state.timestamp.batch) % 2 == 1


def save_when_numpy_says_so(state, event) -> np.bool_:
    return np.bool_(int(state.timestamp.batch) in (2, 3))


AXES: dict[str, tuple[Any, ...]] = {
    'horizon': ('2ba', '1.5ep', '7sp', '30tok', '1iter', '0.25dur', '0ba', 0.75),
    'update_interval': (None, '1ba', '2ba', '1ep', '0.5ep', '5sp', '20tok', '0.3dur'),
    'evaluation': ('1ba', '2ba', '1ep', every_second_batch),
    'saving': (None, '1ba', '1ep', '1iter', save_after_odd_batches, save_when_numpy_says_so),
    'prediction': (None, Event.BATCH_END, Event.EPOCH_END),
    'others': (None, 'sam', 'swa', 'selective_backprop', 'layer_freezing', 'gradient_clipping'),
    'setting': ('plain', 'schedule', 'microbatches', 'autocast', 'two fits', 'unfreezing'),
}


class Case(NamedTuple):
    horizon: Any
    update_interval: Any
    evaluation: Any
    saving: Any
    prediction: Any
    others: Any
    setting: str


def pairs_in(case: Case) -> set[tuple[int, Any, int, Any]]:
    """Every pair of settings that ``case`` tries together."""
    return {(i, case[i], j, case[j]) for i, j in itertools.combinations(range(len(case)), 2)}


def covering_cases() -> list[Case]:
    """Few cases that hold every pair of settings: each takes an uncovered pair, then what covers most of the rest."""
    values = list(AXES.values())
    uncovered = {
        (i, a, j, b): None
        for i, j in itertools.combinations(range(len(values)), 2)
        for a in values[i]
        for b in values[j]
    }
    cases = []
    while uncovered:
        i, a, j, b = next(iter(uncovered))
        chosen = {i: a, j: b}
        for axis in range(len(values)):
            if axis in chosen:
                continue
            gain = {
                value: sum(
                    ((axis, value, k, v) if axis < k else (k, v, axis, value)) in uncovered for k, v in chosen.items()
                )
                for value in values[axis]
            }
            chosen[axis] = max(gain, key=gain.__getitem__)
        case = Case(*(chosen[axis] for axis in range(len(values))))
        for pair in pairs_in(case):
            uncovered.pop(pair, None)
        cases.append(case)
    return cases


CASES = covering_cases()


def test_the_grid_holds_every_pair_of_settings():
    tried = set().union(*map(pairs_in, CASES))
    wanted = {
        (i, a, j, b)
        for (i, first), (j, second) in itertools.combinations(enumerate(AXES.values()), 2)
        for a in first
        for b in second
    }
    assert tried == wanted
    assert len(CASES) < 100


class Recorder(Callback):
    """Keeps the bits of the model wherever training may be observed, and checks what evaluation runs on."""

    MOMENTS = frozenset({
        Event.FIT_START, Event.BATCH_START, Event.BATCH_END, Event.BATCH_CHECKPOINT, Event.EPOCH_END,
        Event.EPOCH_CHECKPOINT, Event.ITERATION_END, Event.ITERATION_CHECKPOINT, Event.FIT_END,
    })  # fmt: skip

    def __init__(self, algorithm: WeightAverage | None = None) -> None:
        self.algorithm = algorithm
        self.history: list[tuple[str, dict[str, bytes]]] = []
        self.forwards_with_average = 0

    def run_event(self, event, state, logger) -> None:
        if event in self.MOMENTS:
            self.history.append((event.value, bits(state.model)))
        if event not in (Event.EVAL_BEFORE_FORWARD, Event.PREDICT_BEFORE_FORWARD) or self.algorithm is None:
            return
        if self.algorithm.state_dict()['started']:
            shadow = shadow_of(self.algorithm)
            held, average = bits(state.model), {**dict(shadow.named_parameters()), **dict(shadow.named_buffers())}
            averaged = {name: tensor for name, tensor in average.items() if tensor.is_floating_point()}
            assert all(held[name] == value for name, value in bits(averaged).items())
            self.forwards_with_average += 1


class PredictDuringFit(Callback):
    def __init__(self, moment: Event) -> None:
        self.moment = moment
        self.trainer: Trainer | None = None

    def run_event(self, event, state, logger) -> None:
        if event is self.moment and self.trainer is not None:
            self.trainer.predict(make_data(4, seed=3))


class Unfreeze(Callback):
    """Freezes the convolution until the end of the second batch."""

    def init(self, state, logger) -> None:
        state.model.get_parameter('module.0.weight').requires_grad_(False)

    def batch_end(self, state, logger) -> None:
        if int(state.timestamp.batch) == 2:
            state.model.get_parameter('module.0.weight').requires_grad_(True)


def other_algorithms(name: str | None) -> list[Any]:
    return {
        None: lambda: [],
        'sam': lambda: [SAM(rho=0.1, interval=2)],
        'swa': lambda: [SWA(swa_start='0.3dur', swa_end='0.9dur', update_interval='1ba')],
        'selective_backprop': lambda: [SelectiveBackprop(start=0.0, end=1.0, keep=0.5, interrupt=2)],
        'layer_freezing': lambda: [LayerFreezing(freeze_start=0.2, freeze_level=0.7)],
        'gradient_clipping': lambda: [GradientClipping(clipping_type='norm', clipping_threshold=0.05)],
    }[name]()


def run_case(case: Case, folder: Path, algorithm: WeightAverage | None) -> tuple[Recorder, Trainer, torch.Tensor]:
    recorder = Recorder(algorithm)
    callbacks: list[Callback] = [recorder]
    predicting = None
    if case.prediction is not None:
        predicting = PredictDuringFit(case.prediction)
        callbacks.append(predicting)
    arguments: dict[str, Any] = {'eval_dataloader': make_evaluator(interval=case.evaluation)}
    if case.saving is not None:
        arguments |= {'save_folder': str(folder), 'save_interval': case.saving, 'save_overwrite': True}
    if case.setting == 'schedule':
        arguments |= {'schedulers': CosineAnnealingScheduler(), 'step_schedulers_every_batch': True}
    if case.setting == 'microbatches':
        arguments |= {'device_train_microbatch_size': 2}
    model = arguments['model'] = make_model()
    if case.others == 'layer_freezing':  # Composer cannot save the momentum of a frozen parameter
        arguments['optimizers'] = torch.optim.SGD(model.parameters(), lr=0.3)
    if case.setting == 'autocast':  # Composer has no mixed precision on the CPU; torch has
        model.forward = torch.autocast('cpu', dtype=torch.bfloat16)(model.forward)
    if case.setting == 'unfreezing':
        callbacks.append(Unfreeze())
    trainer = make_trainer(
        [*other_algorithms(case.others), *([] if algorithm is None else [algorithm])],
        iteration='1ep' if '1iter' in (case.horizon, case.saving) else None,
        callbacks=callbacks,
        **arguments,
    )
    if predicting is not None:
        predicting.trainer = trainer
    trainer.fit()
    if case.setting == 'two fits':
        trainer.fit(duration='2ba')
    return recorder, trainer, torch.get_rng_state()


@functools.cache
def reference_run(case: Case, folder: Path) -> tuple[list, dict[str, bytes], dict, bytes]:
    recorder, trainer, rng = run_case(case, folder, None)
    return recorder.history, bits(trainer.state.model), momenta(trainer), rng.numpy().tobytes()


def momenta(trainer: Trainer) -> dict[str, bytes]:
    state = trainer.state.optimizers[0].state
    tensors = {
        f'{name}.{key}': value
        for name, parameter in trainer.state.model.named_parameters()
        for key, value in state.get(parameter, {}).items()
        if isinstance(value, Tensor)
    }
    assert tensors or not trainer.state.optimizers[0].defaults['momentum']
    return bits(tensors)


def label(value: Any) -> str:
    return getattr(value, '__name__', None) or getattr(value, 'value', None) or str(value)


@pytest.mark.parametrize('case', CASES, ids=lambda case: '-'.join(map(label, case)))
def test_training_is_bit_identical_with_and_without_the_average(case: Case, tmp_path_factory):
    folder = tmp_path_factory.getbasetemp() / 'grid'
    horizon = {'smoothing': case.horizon} if isinstance(case.horizon, float) else {'half_life': case.horizon}
    ema = EMA(**horizon, update_interval=case.update_interval)
    recorder, trainer, rng = run_case(case, folder, ema)
    without_horizon = case._replace(horizon='1iter' if case.horizon == '1iter' else None, update_interval=None)
    history, last, momentum, reference_rng = reference_run(without_horizon, folder)

    assert [moment for moment, _ in recorder.history] == [moment for moment, _ in history]
    for (moment, with_ema), (_, without) in zip(recorder.history, history, strict=True):
        assert with_ema == without, f'weights differ at {moment}'
    assert bits(trainer.state.model) == last
    assert momenta(trainer) == momentum
    assert rng.numpy().tobytes() == reference_rng
    # The comparison would be empty if the average had not been kept, or not been evaluated with.
    assert ema.ema_model.num_updates >= 2
    assert recorder.forwards_with_average >= 1


@pytest.mark.parametrize(
    'case', [case for case in CASES[::6] if case.others != 'swa'], ids=lambda c: '-'.join(map(label, c))
)
def test_training_is_bit_identical_with_and_without_an_equal_average(case: Case, tmp_path_factory):
    folder = tmp_path_factory.getbasetemp() / 'grid'
    interval = case.update_interval if case.update_interval in ('1ba', '1ep', '5sp', '0.5ep') else '2ba'
    swa = OurSWA('1ba', update_interval=interval)
    recorder, trainer, rng = run_case(case, folder, swa)
    without_horizon = case._replace(horizon='1iter' if case.horizon == '1iter' else None, update_interval=None)
    history, last, momentum, reference_rng = reference_run(without_horizon, folder)
    assert recorder.history == history
    assert bits(trainer.state.model) == last
    assert momenta(trainer) == momentum
    assert rng.numpy().tobytes() == reference_rng
    assert swa.swa_model.num_updates >= 2
    assert recorder.forwards_with_average >= 1


# 2. Which weights every event sees

AVERAGE_IS_IN = frozenset({
    Event.EVAL_BEFORE_ALL, Event.EVAL_STANDALONE_START, Event.EVAL_START, Event.EVAL_BATCH_START,
    Event.EVAL_BEFORE_FORWARD, Event.EVAL_AFTER_FORWARD, Event.EVAL_BATCH_END, Event.EVAL_END, Event.PREDICT_START,
    Event.PREDICT_BATCH_START, Event.PREDICT_BEFORE_FORWARD, Event.PREDICT_AFTER_FORWARD, Event.PREDICT_BATCH_END,
})  # fmt: skip
WITHIN_A_STEP = frozenset({
    Event.BEFORE_TRAIN_BATCH, Event.BEFORE_FORWARD, Event.AFTER_FORWARD, Event.BEFORE_LOSS, Event.AFTER_LOSS,
    Event.BEFORE_BACKWARD, Event.AFTER_BACKWARD, Event.AFTER_TRAIN_BATCH,
})  # fmt: skip


class Probe(Callback):
    """Notes at every event whether the model holds the training weights or the average, told apart by their bits."""

    def __init__(self, algorithm: WeightAverage) -> None:
        self.algorithm = algorithm
        self.seen: list[tuple[Event, str | None, str]] = []
        self.training: dict[str, bytes] = {}
        self.outputs_differ = 0

    def run_event(self, event, state, logger) -> None:
        if event is Event.INIT:
            state.optimizers[0].register_step_post_hook(lambda *_: self._note_training_weights(state))
            self._note_training_weights(state)
        held = bits(state.model)
        if event in WITHIN_A_STEP:  # the forward pass is writing BatchNorm's buffers
            held = {name: value for name, value in held.items() if name in dict(state.model.named_parameters())}
        is_training = all(self.training[name] == value for name, value in held.items())
        average = self._average()
        # Counters stay the model's own; those of an average whose statistics are refreshed count other batches.
        is_average = all(average.get(name) == value for name, value in held.items() if 'num_batches' not in name)
        kind = {(True, False): 'training', (False, True): 'average', (True, True): 'both'}.get(
            (is_training, is_average), 'neither'
        )
        self.seen.append((event, state.dataloader_label, kind))
        if event in (Event.EVAL_AFTER_FORWARD, Event.PREDICT_AFTER_FORWARD):
            self._compare_outputs(state, average)

    def kinds(self, event: Event, label: str | None = None) -> set[str]:
        return {kind for e, where, kind in self.seen if e is event and label in (None, where)}

    def _note_training_weights(self, state) -> None:
        self.training = bits(state.model)

    def _average(self) -> dict[str, bytes]:
        shadow = shadow_of(self.algorithm)
        return {} if shadow is None else bits({**dict(shadow.named_parameters()), **dict(shadow.named_buffers())})

    def _compare_outputs(self, state, average: dict[str, bytes]) -> None:
        """Runs the training weights by hand: the outputs must be others than those of the average."""
        other = make_model(seed=1).eval()
        for name, tensor in other.state_dict().items():
            tensor.copy_(torch.frombuffer(bytearray(self.training[name]), dtype=tensor.dtype).view(tensor.shape))
        self.outputs_differ += not torch.equal(other(state.batch), state.outputs)


@each_average
def test_every_event_sees_the_weights_of_the_table(trainer, average):
    algorithm = average()
    probe = Probe(algorithm)
    evaluators = [
        make_evaluator('often', '1ba'),
        make_evaluator('after_the_end', '4ba'),
        make_evaluator('epochs', '1ep'),
    ]
    run = trainer([algorithm], callbacks=[probe], eval_dataloader=evaluators, iteration='1ep')
    run.fit()
    assert bits(run.state.model) == probe.training
    run.eval()
    run.predict(make_data(4))
    assert bits(run.state.model) == probe.training

    # Where the first update copied the weights the two are equal; a later occurrence tells them apart.
    events = {event for event, _, _ in probe.seen}
    assert events == set(Event), f'never fired: {set(Event) - events}'
    for event, where, kind in probe.seen:
        assert kind in ('both', 'average' if event in AVERAGE_IS_IN else 'training'), (event, where)
    for event in set(Event) - {Event.INIT, Event.BEFORE_LOAD, Event.AFTER_LOAD, Event.FIT_START}:
        if event in (Event.ITERATION_START, Event.EPOCH_START) or event not in WITHIN_A_STEP:
            assert probe.kinds(event) - {'both'}, f'{event} told nothing apart'
    assert probe.outputs_differ > 5


@each_average
def test_each_evaluator_sees_the_weights_asked_for_by_its_label(trainer, average):
    algorithm = average(evaluate_with={'raw': 'training', 'predict': 'training'})
    probe = Probe(algorithm)
    evaluators = [make_evaluator('raw', '1ba'), make_evaluator('averaged', '1ba'), make_evaluator('raw2', '2ba')]
    run = trainer([algorithm], callbacks=[probe], eval_dataloader=evaluators)
    run.fit()
    run.eval()
    run.predict(make_data(4))

    within = [
        Event.EVAL_START,
        Event.EVAL_BEFORE_FORWARD,
        Event.EVAL_AFTER_FORWARD,
        Event.EVAL_BATCH_END,
        Event.EVAL_END,
    ]
    for event in within:
        assert probe.kinds(event, 'raw') <= {'training', 'both'}
        assert 'training' in probe.kinds(event, 'raw')
        for averaged in ('averaged', 'raw2'):
            assert probe.kinds(event, averaged) <= {'average', 'both'}
            assert 'average' in probe.kinds(event, averaged)
    assert probe.kinds(Event.PREDICT_BEFORE_FORWARD) == {'training'}
    assert bits(run.state.model) == probe.training


@pytest.mark.filterwarnings('ignore:training ended before the first update:UserWarning')
def test_before_the_average_starts_evaluation_and_prediction_see_the_training_weights(trainer):
    ema = EMA('2ba', ema_start='4ba')
    probe, predicting, stop = Probe(ema), PredictDuringFit(Event.BATCH_START), StopAfter(3)
    run = trainer([ema], callbacks=[probe, predicting, stop], eval_dataloader=make_evaluator(interval='1ba'))
    predicting.trainer = run
    run.eval()
    run.fit()
    assert int(run.state.timestamp.batch) == 3
    assert not ema.ema_started
    for event in (Event.EVAL_BEFORE_FORWARD, Event.PREDICT_BEFORE_FORWARD):
        assert 'training' in probe.kinds(event) <= {'training', 'both'}  # before any step the two are equal
    assert probe.outputs_differ == 0

    run.fit(duration='3ba')
    assert ema.ema_started
    assert probe.kinds(Event.EVAL_BEFORE_FORWARD) == {'training', 'average', 'both'}


@pytest.mark.parametrize('moment', [Event.EVAL_START, Event.EVAL_BATCH_START, Event.EVAL_BATCH_END, Event.EVAL_END])
def test_a_prediction_inside_an_evaluation_leaves_it_the_average(trainer, moment):
    ema = EMA('2ba')
    predicting, probe = PredictDuringFit(moment), Probe(ema)
    evaluators = [make_evaluator('first', '1ba'), make_evaluator('second', '1ba')]
    run = trainer([ema], callbacks=[probe, predicting], eval_dataloader=evaluators)
    predicting.trainer = run
    run.fit()
    for event, where, kind in probe.seen:
        if event in AVERAGE_IS_IN:
            assert kind in ('both', 'average'), (event, where)
    assert bits(run.state.model) == probe.training


def test_a_standalone_evaluation_of_given_data_uses_the_average(trainer):
    ema = EMA('2ba')
    probe = Probe(ema)
    run = trainer([ema], callbacks=[probe])
    run.fit()
    run.eval(eval_dataloader=make_data(4))
    assert probe.kinds(Event.EVAL_BEFORE_FORWARD) == {'average'}
    assert bits(run.state.model) == probe.training


# 3. The shadow is always the average


@each_average
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
def test_an_evaluation_leaves_every_bit_of_weights_and_average(trainer, dtype, average):
    algorithm = average()
    run = trainer([algorithm], model=make_model(dtype=dtype), train_dataloader=make_data(dtype=dtype))
    run.fit()
    before = snapshot(run)
    run.eval(eval_dataloader=make_data(4, dtype=dtype))
    run.predict(make_data(4, dtype=dtype))
    assert snapshot(run) == before
    with shadow_of(algorithm).swapped(run.state.model):
        assert bits(run.state.model) != before['weights']
    assert snapshot(run) == before


@pytest.mark.parametrize('interval', ['1ba', '2ba', '1ep'])
def test_evaluating_more_often_does_not_change_the_average(trainer, interval):
    averages = []
    for evaluators in (None, make_evaluator(interval=interval)):
        ema = EMA('3ba', update_interval='3ba')
        trainer([ema], callbacks=[Unfreeze()], eval_dataloader=evaluators).fit()
        averages.append(bits({**dict(ema.ema_model.named_parameters()), **dict(ema.ema_model.named_buffers())}))
    assert averages[0].keys() >= {'module.0.weight'}
    assert averages[0] == averages[1]


# 4. Checkpoints hold training weights; an exception inside a pass loses nothing


class StopAfter(Callback):
    """Ends the run after a batch, as a user's own callback might."""

    def __init__(self, batch: int | None) -> None:
        self.batch = batch

    def batch_end(self, state, logger) -> None:
        if int(state.timestamp.batch) == self.batch:
            state.stop_training()


class Interrupted(Exception):
    pass


class RaiseAt(Callback):
    def __init__(self, event: Event, batch: int) -> None:
        self.event, self.batch = event, batch

    def run_event(self, event, state, logger) -> None:
        if event is self.event and int(state.timestamp.batch) == self.batch:
            self.batch = -1  # once
            raise Interrupted


def uninterrupted(trainer, average: Callable[[], WeightAverage] = AVERAGES['ema'], **arguments: Any) -> dict[str, Any]:
    run = trainer([average()], eval_dataloader=make_evaluator(interval='1ba'), **arguments)
    run.fit()
    return snapshot(run)


@pytest.mark.parametrize(
    ('moment', 'batch', 'kind'),
    [
        *itertools.product(
            [Event.EVAL_BEFORE_ALL, Event.EVAL_START, Event.EVAL_BEFORE_FORWARD, Event.EVAL_BATCH_END, Event.EVAL_END],
            [2, 3],
            ['ema'],
        ),
        (Event.EVAL_START, 2, 'swa'),
        (Event.EVAL_BATCH_END, 3, 'swa'),
    ],
)
def test_a_checkpoint_after_an_exception_inside_evaluation_resumes_exactly(trainer, tmp_path, moment, batch, kind):
    average = AVERAGES[kind]
    path = str(tmp_path / 'after_exception.pt')
    broken = trainer([average()], eval_dataloader=make_evaluator(interval='1ba'), callbacks=[RaiseAt(moment, batch)])
    with pytest.raises(Interrupted):
        broken.fit()
    broken.save_checkpoint(path)

    training = expected_training_weights(trainer, batch)
    resumed = trainer([average()], eval_dataloader=make_evaluator(interval='1ba'), load_path=path)
    assert bits(resumed.state.model) == training
    resumed.fit()
    assert snapshot(resumed) == uninterrupted(trainer, average)


def expected_training_weights(trainer, batch: int) -> dict[str, bytes]:
    plain = trainer(eval_dataloader=make_evaluator(interval='1ba'), max_duration=f'{batch}ba')
    plain.fit()
    return bits(plain.state.model)


def test_a_checkpoint_taken_while_swapped_is_read_rightly_by_load_average(trainer, tmp_path):
    run = trainer(
        [EMA('2ba')], callbacks=[RaiseAt(Event.EVAL_BATCH_END, 3)], eval_dataloader=make_evaluator('e', '1ba')
    )
    with pytest.raises(Interrupted):
        run.fit()
    run.save_checkpoint(str(tmp_path / 'swapped.pt'))
    ema = run.state.algorithms[0]
    assert ema.ema_weights_active
    average = {**dict(ema.ema_model.named_parameters()), **dict(ema.ema_model.named_buffers())}
    assert bits(load_average(tmp_path / 'swapped.pt')) == bits(average)


@pytest.mark.parametrize('moment', [Event.PREDICT_START, Event.PREDICT_BATCH_END])
def test_fit_goes_on_with_the_training_weights_after_an_exception_inside_prediction(trainer, moment):
    raising = RaiseAt(moment, 3)
    run = trainer([EMA('2ba')], callbacks=[raising], eval_dataloader=make_evaluator(interval='1ba'))
    run.fit(duration='1ep')
    with pytest.raises(Interrupted):
        run.predict(make_data(4))
    assert run.state.algorithms[0].ema_weights_active
    # Composer's own reference is lost with the exception: the Trainer would go on with the data of the prediction.
    run.fit(train_dataloader=make_data(), duration='1ep')

    reference = trainer([EMA('2ba')], eval_dataloader=make_evaluator(interval='1ba'))
    reference.fit(duration='1ep')
    reference.fit(train_dataloader=make_data(), duration='1ep')
    assert snapshot(run) == snapshot(reference)


def test_fit_goes_on_with_the_training_weights_after_an_exception_inside_evaluation(trainer):
    run = trainer([EMA('2ba')], callbacks=[RaiseAt(Event.EVAL_BATCH_END, 3)])
    run.fit(duration='1ep')
    with pytest.raises(Interrupted):
        run.eval(eval_dataloader=make_data(4))
    assert run.state.algorithms[0].ema_weights_active
    run.fit(train_dataloader=make_data(), duration='1ep')

    reference = trainer([EMA('2ba')])
    reference.fit(duration='1ep')
    reference.fit(train_dataloader=make_data(), duration='1ep')
    assert snapshot(run) == snapshot(reference)


@pytest.mark.parametrize('broken_pass', ['eval during fit', 'eval', 'predict'])
@pytest.mark.parametrize('next_pass', ['eval', 'predict'])
def test_a_whole_pass_after_a_broken_one_ends_with_the_training_weights(trainer, broken_pass, next_pass):
    moment = Event.PREDICT_BATCH_END if broken_pass == 'predict' else Event.EVAL_BATCH_END
    probe = Probe(ema := EMA('2ba'))
    evaluator = make_evaluator() if broken_pass == 'eval during fit' else None
    run = trainer([ema], callbacks=[probe, RaiseAt(moment, 3)], eval_dataloader=evaluator)
    passes = {
        'eval during fit': run.fit,
        'eval': lambda: run.eval(eval_dataloader=make_evaluator()),
        'predict': lambda: run.predict(make_data(4)),
    }
    if evaluator is None:
        run.fit(duration='3ba')
    with pytest.raises(Interrupted):
        passes[broken_pass]()
    assert ema.ema_weights_active
    passes[next_pass]()
    assert bits(run.state.model) == probe.training


@pytest.mark.parametrize(
    ('interval', 'kind'),
    [('1ba', 'ema'), ('1ep', 'ema'), (save_after_odd_batches, 'ema'), (save_when_numpy_says_so, 'ema'), ('1ba', 'swa')],
)
def test_the_model_slot_of_every_checkpoint_holds_the_training_weights(trainer, tmp_path, interval, kind):
    run = trainer(
        [AVERAGES[kind]()],
        eval_dataloader=make_evaluator(interval='1ba'),
        save_folder=str(tmp_path),
        save_interval=interval,
    )
    run.fit()
    paths = sorted(tmp_path.glob('ep*.pt'))
    assert paths
    for path in paths:
        batch = int(re.search(r'ba(\d+)', path.name)[1])
        state = torch.load(path, weights_only=False)['state']
        assert bits(state['model']) == expected_training_weights(trainer, batch), path.name
        assert 'training_weights' not in dict(state['algorithms'])[kind.upper()]


@pytest.mark.parametrize(
    'algorithm',
    [
        lambda: EMA('0.5ep', evaluate_with={'eval': 'ema'}, include='.'),
        lambda: OurSWA('1ep', swa_lr=[0.1], evaluate_with={'eval': 'swa'}, include='.', anneal_length='1ep'),
    ],
    ids=['ema', 'swa'],
)
def test_the_state_in_a_checkpoint_holds_plain_types_only(trainer, tmp_path, algorithm):
    run = trainer([algorithm()], callbacks=[RaiseAt(Event.EVAL_START, 6)])
    run.fit()
    with pytest.raises(Interrupted):
        run.eval(eval_dataloader=make_data(4))
    state = run.state.algorithms[0].state_dict()
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    loaded = torch.load(buffer, weights_only=True)
    assert loaded.keys() == state.keys()
    assert 'training_weights' in loaded


# 5. Resume is bit-exact

BATCHES = 2 * toy.EPOCH

RESUMED_SETTINGS = {
    'batches': {'half_life': '2ba'},
    'epochs': {'half_life': '1ep'},
    'parts of epochs': {'half_life': '1.5ep', 'update_interval': '0.5ep'},
    'samples': {'half_life': '9sp', 'update_interval': '5sp'},
    'tokens, every second batch': {'half_life': '20tok', 'update_interval': '2ba'},
    'share of the run, late start': {'half_life': '0.3dur', 'ema_start': '0.4dur'},
    'smoothing, copied buffers': {'smoothing': 0.6, 'buffers': 'copy'},
    'iterations': {'half_life': '1iter'},
    '16-bit shadow': {'half_life': '3ba', 'shadow_dtype': 'bfloat16'},
    'equal': {'swa_start': '1ba', 'update_interval': '1ba'},
    'equal, annealed': {'swa_start': '1ep', 'update_interval': '2ba', 'swa_lr': 0.05, 'anneal_length': '2ba'},
}


@pytest.mark.parametrize('arguments', RESUMED_SETTINGS.values(), ids=RESUMED_SETTINGS)
def test_resuming_after_any_batch_equals_the_uninterrupted_run(trainer, tmp_path, arguments):
    def build(**more: Any) -> Trainer:
        return trainer(
            [(OurSWA if 'swa_start' in arguments else EMA)(**arguments)],
            iteration='1ep' if arguments.get('half_life') == '1iter' else None,
            train_dataloader=make_data(shuffle=True),
            eval_dataloader=make_evaluator(interval='2ba'),
            save_filename='ep{epoch}-ba{batch}.pt',
            save_latest_filename=None,
            **more,
        )

    whole = build(save_folder=str(tmp_path), save_interval='1ba')
    whole.fit()
    expected = snapshot(whole)
    assert expected['num_updates'] >= 2
    other_intervals = itertools.cycle(['2ba', '1ep', save_after_odd_batches])
    compared = 0
    for batch in range(1, BATCHES):
        folder, (path,) = tmp_path / f'resumed_{batch}', tmp_path.glob(f'ep*-ba{batch}.pt')
        resumed = build(load_path=str(path), save_folder=str(folder), save_interval=next(other_intervals))
        resumed.fit()
        assert snapshot(resumed) == expected, f'resumed after batch {batch}'
        # What the resumed run saves is what the whole one saved at that moment.
        for path in folder.glob('*.pt'):
            if (tmp_path / path.name).exists():
                assert saved_bits(path) == saved_bits(tmp_path / path.name), f'{path.name}, resumed after batch {batch}'
                compared += 1
    assert compared >= 4


def saved_bits(path: Path) -> dict[str, Any]:
    state = torch.load(path, weights_only=False)['state']
    algorithms = dict(state['algorithms'])
    algorithm = algorithms.get('EMA') or algorithms['SWA']
    (average,) = algorithm['averages'].values()
    return {
        'model': bits(state['model']),
        'average': bits({**average['parameters'], **average['buffers']}),
        'counters': (average['num_updates'], average['last_update'], algorithm['started']),
    }


def test_resuming_from_the_end_of_an_epoch_equals_the_uninterrupted_run(trainer, tmp_path):
    def build(**more: Any) -> Trainer:
        return trainer([EMA('1ep')], eval_dataloader=make_evaluator(), save_filename='ep{epoch}.pt', **more)

    whole = build(save_folder=str(tmp_path), save_interval='1ep')
    whole.fit()
    resumed = build(load_path=str(tmp_path / 'ep1.pt'))
    resumed.fit()
    assert snapshot(resumed) == snapshot(whole)


def test_resuming_before_and_after_a_parameter_is_unfrozen_equals_the_uninterrupted_run(trainer, tmp_path):
    def build(**more: Any) -> Trainer:
        model = make_model()
        # Composer cannot load the momentum of a parameter that had none when it was saved.
        optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
        return trainer(
            [EMA('2ba')],
            model=model,
            optimizers=optimizer,
            callbacks=[Unfreeze()],
            save_filename='ba{batch}.pt',
            **more,
        )

    whole = build(save_folder=str(tmp_path), save_interval='1ba')
    whole.fit()
    assert 'module.0.weight' in dict(whole.state.algorithms[0].ema_model.named_parameters())
    for batch in range(1, BATCHES):
        resumed = build(load_path=str(tmp_path / f'ba{batch}.pt'))
        if batch >= 2:
            resumed.state.model.get_parameter('module.0.weight').requires_grad_(True)
        resumed.fit()
        assert snapshot(resumed) == snapshot(whole), f'resumed after batch {batch}'


@pytest.mark.parametrize(
    'algorithm',
    [lambda: EMA('1.5ep', update_interval='2ba'), lambda: OurSWA('2ba', update_interval='2ba')],
    ids=['ema', 'swa'],
)
@pytest.mark.filterwarnings('ignore:training ended before the first update:UserWarning')
def test_a_chain_of_resumes_equals_the_uninterrupted_run(trainer, tmp_path, algorithm):
    path = None
    for end in range(1, BATCHES + 1):
        run = trainer([algorithm()], load_path=path, callbacks=[StopAfter(end)])
        run.fit()
        path = str(tmp_path / f'{end}.pt')
        run.save_checkpoint(path)
    whole = trainer([algorithm()])
    whole.fit()
    assert snapshot(run) == snapshot(whole)


def test_loading_a_checkpoint_and_evaluating_uses_its_average_without_training(trainer, tmp_path):
    run = trainer([EMA('2ba')])
    run.fit()
    run.save_checkpoint(str(tmp_path / 'end.pt'))
    run.eval(eval_dataloader=make_data(4))

    ema = EMA('2ba')
    probe = Probe(ema)
    loaded = trainer([ema], callbacks=[probe], load_path=str(tmp_path / 'end.pt'))
    loaded.eval(eval_dataloader=make_data(4))
    loaded.predict(make_data(4))
    assert bits(dict(ema.ema_model.named_parameters())) == bits(
        dict(run.state.algorithms[0].ema_model.named_parameters())
    )
    assert probe.outputs_differ == 2
    assert {m: v.item() for m, v in loaded.state.eval_metric_values.items()} == {
        m: v.item() for m, v in run.state.eval_metric_values.items()
    }
    assert bits(loaded.state.model) == bits(run.state.model)


# 5, two processes


@pytest.fixture(scope='module')
def two_processes(tmp_path_factory) -> list[dict[str, Any]]:
    """What each of two gloo processes saw, given a one-process run's checkpoints; see scripts/two_processes.py."""
    folder = tmp_path_factory.mktemp('two_processes')
    run = make_trainer(
        [EMA('1.5ep', update_interval='2ba')],
        save_folder=str(folder / 'one'),
        save_interval='1ba',
        save_filename='ba{batch}.pt',
    )
    run.fit()
    command = [sys.executable, '-m', 'composer.cli.launcher', '-n', '2', '--master_port', str(free_port())]
    finished = subprocess.run(
        [*command, str(SCRIPTS / 'two_processes.py'), str(folder)],
        capture_output=True, text=True, timeout=300, env={**os.environ, 'OMP_NUM_THREADS': '1'},
    )  # fmt: skip
    assert finished.returncode == 0, finished.stdout[-3000:] + finished.stderr[-6000:]
    return [{'folder': folder, **torch.load(folder / f'rank{rank}.pt', weights_only=False)} for rank in (0, 1)]


def free_port() -> int:
    import socket

    with socket.socket() as probe:
        probe.bind(('127.0.0.1', 0))
        return probe.getsockname()[1]


def test_two_processes_end_with_the_same_bits_on_both_ranks(two_processes):
    first, second = (rank['whole'] for rank in two_processes)
    assert first['num_updates'] >= 2
    assert first['average'] != first['weights']
    # Under DDP each rank's BatchNorm statistics are its own until the next forward pass; the average's are shared.
    assert first['average'] == second['average']
    assert parameters_of(first['weights']) == parameters_of(second['weights'])
    assert {k: first[k] for k in ('num_updates', 'last_update', 'started', 'momentum', 'time')} == {
        k: second[k] for k in ('num_updates', 'last_update', 'started', 'momentum', 'time')
    }


def parameters_of(weights: dict[str, bytes]) -> dict[str, bytes]:
    return {name: value for name, value in weights.items() if 'running' not in name}


def test_two_processes_train_alike_with_and_without_the_average(two_processes):
    for rank in two_processes:
        assert len(rank['history']) == BATCHES
        assert rank['history'] == rank['history_without']


def test_two_processes_evaluate_with_the_same_bits_on_both_ranks(two_processes):
    first, second = (rank['evaluated'] for rank in two_processes)
    assert len(first) >= 3
    assert first == second
    assert first[-1] == two_processes[0]['whole']['average']


@pytest.mark.parametrize('batch', range(1, BATCHES))
def test_two_processes_resumed_after_any_batch_equal_the_uninterrupted_run(two_processes, batch):
    for rank in two_processes:
        assert rank['resumed'][batch] == rank['whole']


@pytest.mark.parametrize('batch', [2, toy.EPOCH, 5])
def test_a_checkpoint_of_one_process_loads_exactly_on_two(two_processes, batch):
    saved = saved_bits(two_processes[0]['folder'] / 'one' / f'ba{batch}.pt')
    ends = []
    for rank in two_processes:
        loaded, end, evaluated = rank['from_one'][batch]
        assert loaded['weights'] == saved['model']
        assert loaded['average'] == saved['average']
        assert (loaded['num_updates'], loaded['last_update'], loaded['started']) == saved['counters']
        assert evaluated
        ends.append((end['average'], parameters_of(end['weights']), end['num_updates'], end['last_update'], evaluated))
    assert ends[0] == ends[1]


@pytest.mark.parametrize('batch', [2, toy.EPOCH, 5])
def test_a_checkpoint_of_two_processes_loads_exactly_on_one(trainer, two_processes, batch):
    path = two_processes[0]['folder'] / 'two' / f'ba{batch}.pt'
    saved = saved_bits(path)
    run = trainer([EMA('1.5ep', update_interval='2ba')], load_path=str(path))
    loaded = snapshot(run)
    assert loaded['weights'] == saved['model']
    assert loaded['average'] == saved['average']
    assert (loaded['num_updates'], loaded['last_update'], loaded['started']) == saved['counters']
    run.fit()
    assert snapshot(run)['time'][1] == BATCHES


def test_two_processes_refresh_and_average_equally_with_the_same_bits_on_both_ranks(two_processes):
    first, second = (rank['equal'] for rank in two_processes)
    assert first['average'] == second['average']
    assert first['num_updates'] == second['num_updates'] >= 3
    for rank in two_processes:
        assert rank['history_equal'] == rank['history_without']
        assert rank['equal_resumed'] == rank['equal']
        assert rank['statistics_differ_before']


# 5, killed


@pytest.mark.parametrize('moment', ['eval_batch_end', 'after_backward'])
def test_a_killed_run_that_resumes_by_itself_equals_the_uninterrupted_run(tmp_path, moment, request):
    folder, marker = tmp_path / 'run', tmp_path / 'reached'
    process = subprocess.Popen(
        [sys.executable, str(SCRIPTS / 'stall.py'), str(folder), str(marker), moment, '4'],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env={**os.environ, 'OMP_NUM_THREADS': '1'},
    )  # fmt: skip
    try:
        wait_for(marker, process)
        os.kill(process.pid, signal.SIGKILL)
    finally:
        process.kill()
        process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert (folder / 'latest-rank0.pt').exists()

    sys.path.insert(0, str(SCRIPTS))
    request.addfinalizer(lambda: sys.path.remove(str(SCRIPTS)))
    import stall

    resumed = stall.build(folder)
    assert 1 <= int(resumed.state.timestamp.batch) < BATCHES
    resumed.fit()
    whole = stall.build(tmp_path / 'whole')
    whole.fit()
    assert snapshot(resumed) == snapshot(whole)


def wait_for(marker: Path, process: subprocess.Popen, seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not marker.exists():
        assert process.poll() is None, process.stdout.read()
        assert time.monotonic() < deadline, 'the run never got there'
        time.sleep(0.05)


# 6. Nothing is half-loaded

TIME_UNITS = ('ba', 'ep', 'sp', 'tok', 'iter', 'dur')
LEGAL_UNITS = {
    'half_life': TIME_UNITS,
    'ema_start': ('ba', 'ep', 'sp', 'tok', 'dur'),
    'update_interval': TIME_UNITS,
    'log_interval': TIME_UNITS,
}

numbers = st.one_of(
    st.integers(-3, 10**6).map(str),
    st.floats().map(repr),
    st.floats(0, 10).map(lambda f: f'{f:.3f}'),
    st.sampled_from(
        ['', '-', '.', '1_000', '٣', '½', 'nan', 'inf', '-inf', '1e400', '1e-320', '0x10', '+5', ' 7', '1,5']
    ),
)
units = st.one_of(
    st.sampled_from([*TIME_UNITS, 'BA', 'Ep', 's', 'sec', 'seconds', '', 'b', 'batch', 'ba ', ' ba', 'baa', 'ep\n']),
    st.text(max_size=3),
)
times = st.one_of(
    st.tuples(numbers, units).map(''.join),
    st.tuples(st.floats(0, 20).map(lambda f: f'{f:g}'), st.sampled_from(TIME_UNITS)).map(''.join),
    st.text(max_size=8),
    st.sampled_from([0, 1, 2.5, True, b'1ba', ['1ba'], {'1ba'}, object(), math.nan, Time(3, TimeUnit.BATCH)]),
    st.builds(Time, st.integers(-2, 5), st.sampled_from([TimeUnit.BATCH, TimeUnit.EPOCH, TimeUnit.SECOND])),
    st.builds(Time, st.floats(0, 1), st.just(TimeUnit.DURATION)),
)


def understood(text: Any) -> tuple[float, str] | None:
    """A time string read by other means: the longest known unit at its end, and Python's number before it."""
    if isinstance(text, Time):
        return text.value, text.unit.value
    stripped = text.strip().lower()
    for unit in sorted(TIME_UNITS, key=len, reverse=True):
        if stripped.endswith(unit):
            try:
                return float(stripped.removesuffix(unit)), unit
            except ValueError:
                return None
    return None


def error_of(call: Callable[[], object]) -> ValueError | TypeError | None:
    """The error of the user's making that ``call`` raises; any other kind passes through and fails the test."""
    try:
        call()
    except (ValueError, TypeError) as error:
        return error
    return None


@pytest.mark.parametrize('argument', LEGAL_UNITS)
@given(time=times)
@settings(max_examples=150)
def test_a_time_gives_the_right_span_or_an_error_that_names_its_argument(argument, time):
    error = error_of(lambda: EMA(**{argument: time}))
    assert (error is None) == is_legal(argument, time)
    if error is not None:
        assert argument in str(error)
        return
    ema = EMA(**{argument: time})
    span = getattr(ema, argument)
    assert (span.value, span.unit) == understood(time)
    assert repr(eval(repr(ema), {'EMA': EMA})) == repr(ema)


def is_legal(argument: str, time: Any) -> bool:
    read = understood(time) if isinstance(time, (str, Time)) else None
    if read is None:
        return False
    value, unit = read
    is_whole = math.isfinite(value) and value == math.floor(value)
    may_be_zero = argument in ('half_life', 'ema_start')
    return (
        unit in LEGAL_UNITS[argument]
        and math.isfinite(value)
        and (is_whole or unit in ('ep', 'iter', 'dur'))
        and (value > 0 or (value == 0 and may_be_zero))
    )


@pytest.mark.parametrize('argument', LEGAL_UNITS)
@given(
    value=st.one_of(st.floats(0, allow_infinity=False, allow_nan=False), st.integers(0, 20), st.floats(0, 3)),
    unit=st.sampled_from(TIME_UNITS),
)
@example(value=5e-324, unit='ep')
@example(value=1.7e308, unit='dur')
@settings(max_examples=25, suppress_health_check=list(HealthCheck))
@pytest.mark.filterwarnings('ignore:.*is longer than the run:UserWarning')
@pytest.mark.filterwarnings('ignore:.*is mostly rounded away:UserWarning')
@pytest.mark.filterwarnings('ignore:training ended before the first update:UserWarning')
def test_a_run_with_any_legal_time_trains_or_says_which_argument_cannot_work(argument, value, unit):
    if error_of(lambda: EMA(**{argument: f'{value!r}{unit}'})) is not None:
        return
    ema = EMA(**{argument: f'{value!r}{unit}'})
    error = error_of(make_trainer([ema], max_duration='4ba').fit)
    if error is not None:
        assert argument in str(error)
        return
    state = ema.state_dict()['averages']['ema']
    for name, tensor in {**state['parameters'], **state['buffers']}.items():
        assert torch.isfinite(tensor).all(), name


@functools.cache
def trained() -> tuple[Trainer, EMA, dict[str, Any], dict[str, Any]]:
    """A Trainer after four batches; its algorithm; the state after two batches, and that of an open swap."""
    ema = EMA('2ba')
    trainer = make_trainer([ema])
    trainer.fit(duration='2ba')
    early = copy.deepcopy(ema.state_dict())
    ema.ema_model.swap_in(trainer.state.model)
    swapped = copy.deepcopy(ema.state_dict())
    ema.ema_model.swap_out(trainer.state.model)
    trainer.fit(duration='2ba')
    return trainer, ema, early, swapped


def all_of(ema: EMA) -> tuple:
    state = ema.state_dict()
    average = state['averages']['ema']
    stash = state.get('training_weights')
    return (
        bits({**average['parameters'], **average['buffers']}),
        average['num_updates'],
        average['last_update'],
        average['started_at'],
        average['profile'],
        average['aliases'],
        state['started'],
        None if stash is None else bits(stash),
    )


def paths_in(tree: Any, path: tuple = ()) -> list[tuple]:
    """The paths of everything in nested dictionaries."""
    found = []
    for key, value in tree.items() if isinstance(tree, dict) else ():
        found += [(*path, key), *paths_in(value, (*path, key))]
    return found


REMOVED = object()


def values_instead_of(value: Any) -> list[Any]:
    """What else may stand in the place of ``value``: nothing, another kind, for a tensor another shape or dtype."""
    others: list[Any] = [
        REMOVED, None, True, -1, 2, 3.5, math.nan, math.inf, 10**30, 'text', '', [], {}, [1, 2], {'a': 1}, np.ones(2),
        torch.zeros(()), torch.zeros(0), torch.zeros(3, 3), torch.ones(2), nn.Parameter(torch.ones(2)),
    ]  # fmt: skip
    if isinstance(value, Tensor):
        others += [value[None], value.new_zeros(7), value.to('meta'), value.to_sparse()]
        others += [
            value.to(dtype) for dtype in (torch.float64, torch.bfloat16, torch.int32, torch.bool, torch.complex64)
        ]
    return others


def changed(state: dict[str, Any], path: tuple, value: Any, new_name: Any = None) -> dict[str, Any]:
    """A copy of ``state`` with ``value`` at ``path``, or under another name at its place."""
    state = copy.deepcopy(state)
    parent = functools.reduce(lambda tree, key: tree[key], path[:-1], state)
    if value is REMOVED or new_name is not None:
        del parent[path[-1]]
    if value is not REMOVED:
        parent[path[-1] if new_name is None else new_name] = value
    return state


def value_at(state: dict[str, Any], path: tuple) -> Any:
    return functools.reduce(lambda tree, key: tree[key], path, state)


@pytest.fixture(scope='module')
def trained_run() -> tuple[Trainer, EMA, dict[str, Any], dict[str, Any]]:
    return trained()


QUIET = ('ignore:the checkpoint was averaged with:UserWarning', 'ignore:the saved average is:UserWarning')


@pytest.mark.filterwarnings(*QUIET)
@pytest.mark.parametrize('which', [2, 3], ids=['open', 'swapped'])
def test_a_state_with_any_one_change_loads_exactly_or_changes_nothing(trained_run, which):
    state = trained_run[which]
    for path in paths_in(state):
        value = value_at(state, path)
        changes = [(new, None) for new in values_instead_of(value)]
        changes += [(value, name) for name in ('other', f'module.{path[-1]}', '', 7)]
        for new, name in changes:
            loads_exactly_or_changes_nothing(changed(state, path, new, name))


@st.composite
def changed_states(draw: st.DrawFn) -> dict[str, Any]:
    """A real state with two or three changes anywhere in it."""
    state = draw(st.sampled_from(trained()[2:]))
    for _ in range(draw(st.integers(2, 3))):
        path = draw(st.sampled_from(paths_in(state)))
        values = values_instead_of(value_at(state, path))
        value = values[draw(st.integers(0, len(values) - 1))]
        state = changed(state, path, value, draw(st.sampled_from([None, None, 'other', 'version', 7])))
    return state


@pytest.mark.filterwarnings(*QUIET)
@pytest.mark.usefixtures('trained_run')
@given(state=changed_states())
@settings(max_examples=100, suppress_health_check=list(HealthCheck))
def test_a_state_with_several_changes_loads_exactly_or_changes_nothing(state):
    loads_exactly_or_changes_nothing(state)


def loads_exactly_or_changes_nothing(state: dict[str, Any]) -> None:
    _, ema, _, _ = trained()
    sound = copy.deepcopy(ema.state_dict())
    before = all_of(ema)
    error = error_of(lambda: ema.load_state_dict(state))
    if error is not None:
        assert type(error) is ValueError, error
        assert all_of(ema) == before, 'an error has changed the object'
        return
    try:
        check_loaded(ema, state, before)
    finally:
        ema.load_state_dict(sound)
        assert all_of(ema) == before


def check_loaded(ema: EMA, state: dict[str, Any], before: tuple) -> None:
    if not state['averages']:  # saved before the Trainer was built: there is nothing to load
        assert all_of(ema) == before
        return
    loaded, wanted = ema.state_dict(), state['averages']['ema']
    got = loaded['averages']['ema']
    assert type(got['num_updates']) is int
    assert got['num_updates'] == wanted['num_updates'] >= 0
    assert loaded['started'] is state['started']
    for moment in ('last_update', 'started_at'):
        if wanted[moment] is None:
            assert got[moment] is None
            continue
        clock = {unit: wanted[moment][unit] for unit in ('iter', 'ep', 'ba', 'sp', 'tok')}
        assert all(type(value) in (int, float) and 0 <= value < math.inf for value in clock.values())
        assert {unit: got[moment][unit] for unit in clock} == clock
    assert isinstance(wanted['profile']['description'], str)
    for group in ('parameters', 'buffers'):
        assert got[group].keys() == wanted[group].keys()
        for name, tensor in got[group].items():
            same(tensor, wanted[group][name])
    stash = state.get('training_weights')
    assert ema.ema_weights_active == (stash is not None)
    if stash is not None:
        model = trained()[0].state.model
        kept = copy.deepcopy(model.state_dict())
        ema.ema_model.swap_out(model)
        restored = copy.deepcopy(model.state_dict())
        model.load_state_dict(kept)
        assert stash.keys() <= restored.keys()
        assert restored.keys() - stash.keys() <= {'module.1.num_batches_tracked'}
        for name, tensor in stash.items():
            same(restored[name], tensor)


def same(loaded: Tensor, saved: Tensor) -> None:
    """The numbers of ``saved`` arrived, in whatever dtype it was saved."""
    assert (loaded.shape, saved.layout, saved.device.type) == (saved.shape, torch.strided, 'cpu')
    assert not saved.is_complex() or loaded.is_complex()
    assert not saved.is_floating_point() or loaded.is_floating_point() or loaded.is_complex()
    assert torch.equal(loaded, saved.to(loaded.dtype))


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        (lambda s: average_in(s)['parameters'].pop('module.5.bias'), 'missing: module.5.bias'),
        (lambda s: average_in(s)['parameters'].update(new=torch.ones(1)), 'unexpected: new'),
        (
            lambda s: average_in(s)['parameters'].update({'module.5.bias': torch.ones(7)}),
            r'5\.bias \(expected \(3,\), got \(7,\)',
        ),
        (lambda s: average_in(s)['buffers'].pop('module.1.running_var'), 'missing: module.1.running_var'),
        (lambda s: s.update(version=99), 'version 99'),
    ],
    ids=['missing parameter', 'new parameter', 'other shape', 'missing buffer', 'newer version'],
)  # fmt: skip
def test_a_checkpoint_that_does_not_fit_fails_by_name_when_the_trainer_is_built(trainer, tmp_path, change, message):
    run = trainer([EMA('2ba')])
    run.fit()
    run.save_checkpoint(str(tmp_path / 'good.pt'))
    checkpoint = torch.load(tmp_path / 'good.pt', weights_only=False)
    change(dict(checkpoint['state']['algorithms'])['EMA'])
    torch.save(checkpoint, tmp_path / 'changed.pt')

    with pytest.raises(ValueError, match=message):
        trainer([EMA('2ba')], load_path=str(tmp_path / 'changed.pt'))


def average_in(state: dict[str, Any]) -> dict[str, Any]:
    return state['averages']['ema']


# 6, damaged files


@pytest.fixture(scope='module')
def checkpoint(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp('checkpoint') / 'sound.pt'
    trainer = make_trainer([EMA('2ba')])
    trainer.fit()
    trainer.save_checkpoint(str(path))
    return path


@pytest.mark.parametrize('share', [0.0, 0.001, 0.1, 0.5, 0.9, 0.99, 0.9999])
def test_a_truncated_checkpoint_is_refused_and_nothing_written(checkpoint, tmp_path, share):
    content = checkpoint.read_bytes()
    damaged = tmp_path / 'damaged.pt'
    damaged.write_bytes(content[: int(share * len(content))])
    refuses(damaged, tmp_path)


def refuses(damaged: Path, folder: Path) -> None:
    content, out = damaged.read_bytes(), folder / 'out.safetensors'
    out.write_bytes(b'an earlier export')
    with pytest.raises(CheckpointError, match=re.escape(str(damaged))):
        load_average(damaged)
    with pytest.raises(CheckpointError, match=re.escape(str(damaged))):
        export(damaged, out)
    with pytest.raises(CheckpointError):
        export(damaged, folder / 'new' / 'out.safetensors')
    assert out.read_bytes() == b'an earlier export'
    assert damaged.read_bytes() == content
    assert {path.name for path in folder.iterdir()} <= {'out.safetensors', damaged.name, 'new'}
    assert not list(folder.glob('new/*'))


@pytest.mark.parametrize(
    'content', [b'', b'not a checkpoint', b'PK\x03\x04', b'\x80\x02}q\x00.', bytes(4096)], ids=lambda c: repr(c[:6])
)
def test_a_file_that_is_no_checkpoint_is_refused(tmp_path, content):
    path = tmp_path / 'other.pt'
    path.write_bytes(content)
    refuses(path, tmp_path)


@given(data=st.data())
@settings(max_examples=40, suppress_health_check=list(HealthCheck))
def test_a_checkpoint_with_damaged_bytes_is_refused_or_gives_the_same_average(checkpoint, tmp_path_factory, data):
    content = bytearray(checkpoint.read_bytes())
    start = data.draw(st.integers(0, len(content) - 1))
    for offset in range(start, min(start + data.draw(st.integers(1, 64)), len(content))):
        content[offset] ^= 0x5A
    path = tmp_path_factory.getbasetemp() / 'bytes_damaged.pt'
    path.write_bytes(content)
    error = error_of(lambda: load_average(path))
    if error is None:
        assert bits(load_average(path)) == bits(load_average(checkpoint))
    else:
        assert type(error) is CheckpointError, error
        assert str(path) in str(error)


def test_a_checkpoint_with_one_flipped_bit_in_a_weight_is_refused(checkpoint, tmp_path):
    content = checkpoint.read_bytes()
    weight = load_average(checkpoint)['module.5.weight'].numpy().tobytes()
    where = content.index(weight)
    path = tmp_path / 'flipped.pt'
    path.write_bytes(content[:where] + bytes([content[where] ^ 1]) + content[where + 1 :])
    refuses(path, tmp_path)


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        (lambda s: s.pop('model'), 'model'),
        (lambda s: s.update(model='text'), 'model'),
        (lambda s: s.pop('algorithms'), 'no average'),
        (lambda s: s.update(algorithms=7), 'algorithms'),
        (lambda s: s.update(algorithms=[('EMA', None)]), 'NoneType'),
        (lambda s: s.update(algorithms=[('EMA', {})]), 'no known format'),
        (lambda s: ema_of(s).update(averages=3), 'averages'),
        (lambda s: ema_of(s).update(version=99), '99'),
        (lambda s: ema_of(s).update(started=False), 'no average yet'),
        (lambda s: ema_of(s)['averages'].update(ema=3), 'ema'),
        (lambda s: average_of(s).update(parameters=[1]), 'parameters'),
        (lambda s: average_of(s).update(aliases=[1]), 'aliases'),
        (lambda s: average_of(s)['parameters'].update({'module.5.bias': 'text'}), 'module.5.bias'),
        (lambda s: average_of(s)['parameters'].update({'module.5.bias': torch.ones(9)}), 'module.5.bias'),
        (lambda s: average_of(s)['parameters'].update(other=torch.ones(9)), 'other'),
    ],
    ids=[
        'no model', 'model a string', 'no algorithms', 'algorithms a number', 'state None', 'state empty',
        'averages a number', 'newer version', 'not started', 'average a number', 'parameters a list',
        'aliases a list', 'weight a string', 'weight of other shape', 'unknown weight',
    ],
)  # fmt: skip
def test_a_checkpoint_of_the_wrong_structure_is_refused(checkpoint, tmp_path, change, message):
    content = torch.load(checkpoint, weights_only=False)
    change(content['state'])
    path = tmp_path / 'changed.pt'
    torch.save(content, path)
    with pytest.raises(CheckpointError, match=message):
        load_average(path)
    refuses(path, tmp_path)


def ema_of(state: dict[str, Any]) -> dict[str, Any]:
    return dict(state['algorithms'])['EMA']


def average_of(state: dict[str, Any]) -> dict[str, Any]:
    return ema_of(state)['averages']['ema']


# 7. Nothing is silent


def test_a_pattern_that_matches_no_name_is_an_error_when_the_trainer_is_built(trainer):
    with pytest.raises(ValueError, match=r"include pattern 'no_such_layer' matches none"):
        trainer([EMA('2ba', include='no_such_layer')])
    with pytest.raises(ValueError, match=r"exclude pattern 'no_such_layer' matches none"):
        trainer([EMA('2ba', exclude=['bias', 'no_such_layer'])])
    with pytest.raises(ValueError, match='leave no name'):
        trainer([EMA('2ba', include='bias', exclude='bias')])


def test_a_model_without_trainable_parameters_is_warned_about(trainer):
    model = make_model()
    model.requires_grad_(False)
    with pytest.warns(UserWarning, match='no trainable parameter'):
        trainer([EMA('2ba')], model=model)


@pytest.mark.parametrize(
    ('arguments', 'duration', 'message'),
    [
        ({'half_life': '7ba'}, '2ep', r"half_life='7ba' is longer than the run of 6 batches"),
        ({'half_life': '3ep'}, '2ep', r"half_life='3ep' is longer than the run of 2 epochs"),
        ({'half_life': '21sp'}, '2ep', r"half_life='21sp' is longer than the run of 20 samples"),
        ({'half_life': '7ba'}, '20sp', r"half_life='7ba' is longer than the run of 6 batches"),
        ({'half_life': '31tok'}, '30tok', r"half_life='31tok' is longer than the run of 30 tokens"),
        ({'half_life': '2iter'}, '2ep', r"half_life='2iter' is longer than the run of 1 iterations"),
        ({'half_life': '1.5dur'}, '2ep', r"half_life='1.5dur' is longer than the run"),
        ({'half_life': '2ba', 'update_interval': '7ba'}, '2ep', r"update_interval='7ba' is longer than the run"),
        ({'half_life': '2ba', 'ema_start': '2.5ep'}, '2ep', r"ema_start='2.5ep' is longer than the run of 2 epochs"),
        ({'smoothing': 0.9, 'update_interval': '3ep'}, '2ep', r"update_interval='3ep' is longer than the run"),
    ],
)  # fmt: skip
def test_a_time_longer_than_the_run_is_warned_about_with_the_value_and_a_remedy(trainer, arguments, duration, message):
    run = trainer([EMA(**arguments)], max_duration=duration, iteration='2ep')
    with pytest.warns(UserWarning, match=message + r'.*Pass a shorter'):
        run.fit()


@pytest.mark.parametrize('half_life', ['1ep', '0.8ep'])
def test_a_half_life_in_epochs_in_a_run_shorter_than_one_is_warned_about(trainer, half_life):
    run = trainer([EMA(half_life)], max_duration='2ba')
    with pytest.warns(UserWarning, match=rf"half_life='{half_life}' is longer than the run of 0\.6"):
        run.fit()


def test_updates_once_an_epoch_in_a_run_shorter_than_one_are_warned_about(trainer):
    run = trainer([EMA('1ba', update_interval='1ep')], max_duration='2ba')
    with pytest.warns(UserWarning, match=r"update_interval='1ep' is longer than the run of 0\.6"):
        run.fit()


class Endless(IterableDataset):
    """Data that does not tell its length."""

    def __iter__(self):
        return iter(make_data(40).dataloader.dataset)


def test_a_run_that_ends_without_any_update_is_warned_about(trainer):
    """Nobody can know beforehand that two batches are less than an epoch here."""
    run = trainer([EMA('1ep')], train_dataloader=DataLoader(Endless(), batch_size=4), max_duration='2ba')
    with pytest.raises((UserWarning, ValueError), match='1ep'):
        run.fit()


def test_a_half_life_as_long_as_the_run_is_not_warned_about(trainer):
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        warnings.filterwarnings('ignore', module=r'(?!composer_ema)')
        trainer([EMA('6ba')]).fit()
        trainer([EMA('1dur')]).fit()


def test_two_instances_in_one_trainer_are_an_error(trainer):
    with pytest.raises(ValueError, match='2 algorithms called EMA in one Trainer'):
        trainer([EMA('2ba'), EMA('4ba')])


def test_ours_beside_the_built_in_is_an_error(trainer):
    with pytest.raises(ValueError, match='2 algorithms called EMA in one Trainer'):
        trainer([EMA('2ba'), BuiltinEMA('4ba')])
    with pytest.raises(ValueError, match='2 algorithms called EMA in one Trainer'):
        trainer([BuiltinEMA('4ba'), EMA('2ba')])


def test_an_unknown_evaluator_label_is_warned_about_with_the_nearest_one(trainer):
    run = trainer([EMA('2ba', evaluate_with={'evla': 'training'})], eval_dataloader=make_evaluator('eval'))
    with pytest.warns(UserWarning, match=r"'evla'.*Did you mean 'eval'\?"):
        run.fit()


@pytest.mark.parametrize('argument', ['half_life', 'update_interval', 'ema_start'])
def test_tokens_without_a_dataloader_that_counts_them_are_an_error_or_a_warning(trainer, argument):
    silent = make_data().dataloader  # without the DataSpec that counts
    run = trainer([EMA(**{'half_life': '2ba', argument: '4tok'})], train_dataloader=silent)
    with pytest.raises((ValueError, UserWarning), match=rf"{argument}='4tok'.*tokens"):
        run.fit()


def test_iterations_in_a_run_without_any_are_an_error(trainer):
    for argument in ('half_life', 'update_interval'):
        run = trainer([EMA(**{argument: '1iter'})])
        with pytest.raises(ValueError, match=f"{argument}='1iter' counts iterations"):
            run.fit()


def test_resuming_with_another_half_life_is_warned_about(trainer, tmp_path):
    run = trainer([EMA('2ba')])
    run.fit(duration='1ep')
    run.save_checkpoint(str(tmp_path / 'c.pt'))
    with pytest.warns(UserWarning, match=r"half_life='2ba', this run continues with half_life='3ba'"):
        trainer([EMA('3ba')], load_path=str(tmp_path / 'c.pt')).fit()


@each_average
def test_dropping_the_algorithm_on_resume_continues_the_same_training(trainer, tmp_path, average):
    run = trainer([average()], eval_dataloader=make_evaluator(interval='1ba'), save_folder=str(tmp_path),
                  save_interval='1ba', save_filename='ba{batch}.pt')  # fmt: skip
    run.fit()
    for batch in range(1, BATCHES):
        without = trainer(eval_dataloader=make_evaluator(interval='1ba'), load_path=str(tmp_path / f'ba{batch}.pt'))
        without.fit()
        assert bits(without.state.model) == bits(run.state.model)


def test_adding_the_algorithm_on_resume_averages_from_there(trainer, tmp_path):
    plain = trainer(save_folder=str(tmp_path), save_interval='1ba', save_filename='ba{batch}.pt')
    plain.fit()
    ema = EMA('2ba')
    added = trainer([ema], load_path=str(tmp_path / 'ba4.pt'))
    assert not ema.ema_started
    added.fit()
    assert bits(added.state.model) == bits(plain.state.model)
    assert ema.ema_model.num_updates == 2
    # The first update, after batch 5, copied; the second, one batch later, moved by 1 - 2 ** (-1 / 2) of the way.
    fifth, sixth = (torch.load(tmp_path / f'ba{n}.pt', weights_only=False)['state']['model'] for n in (5, 6))
    for name, average in ema.ema_model.named_parameters():
        expected = fifth[name].double() + (1 - 0.5**0.5) * (sixth[name].double() - fifth[name].double())
        torch.testing.assert_close(average.double(), expected, rtol=1e-6, atol=1e-7)


# 8. No synchronisation, no allocation, no traversal per update

TRAVERSALS = (
    'named_modules', 'modules', 'named_children', 'children', 'named_parameters', 'parameters', 'named_buffers',
    'buffers', 'state_dict', '_named_members',
)  # fmt: skip


class Operations(TorchDispatchMode):
    """Notes every operator that torch runs."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(str(function))
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize('buffers', ['average', 'copy'])
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
def test_an_update_walks_no_module_and_allocates_nothing(trainer, monkeypatch, dtype, buffers):
    ema = EMA('2ba', buffers=buffers, log_interval=None)
    run = trainer([ema], model=make_model(dtype=dtype))
    state, logger = run.state, run.logger
    for _ in range(2):  # the first copies and prepares, the second is the first to average
        advance(state)
        ema.apply(Event.BATCH_END, state, logger)
    shadow = ema.ema_model
    pointers = [t.data_ptr() for t in (*shadow.parameters(), *shadow.buffers())]
    for name in TRAVERSALS:
        monkeypatch.setattr(nn.Module, name, refuse(name))
    with torch.no_grad():
        state.model.module[5].weight += 1

    advance(state)
    before = bits(dict(shadow.named_parameters()))
    with Operations() as operations:
        assert ema.match(Event.BATCH_END, state)
        ema.apply(Event.BATCH_END, state, logger)
    assert shadow.num_updates == 3
    assert bits(dict(shadow.named_parameters())) != before
    assert [t.data_ptr() for t in (*shadow.parameters(), *shadow.buffers())] == pointers
    # The cat gathers small tensors in memory that the plan holds.
    written_in_place = {
        'aten._foreach_lerp_.Scalar', 'aten._foreach_copy_.default', 'aten.lerp_.Scalar', 'aten.cat.out'
    }  # fmt: skip
    assert operations.names
    assert set(operations.names) <= written_in_place, operations.names


def advance(state) -> None:
    state.previous_timestamp = state.timestamp
    state.timestamp = state.timestamp.to_next_batch(samples=4, tokens=12)


def refuse(name: str) -> Any:
    def walk(self, *args, **kwargs):
        raise AssertionError(f'{name} walks the model')

    return walk


def replace_parameter(layer: nn.Linear) -> None:
    layer.weight = nn.Parameter(torch.full_like(layer.weight, 7.0))


def replace_storage(layer: nn.Linear) -> None:
    layer.weight.data = torch.full_like(layer.weight, 7.0)


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
@pytest.mark.parametrize('replace', [replace_parameter, replace_storage])
def test_an_update_notices_a_replaced_tensor(trainer, replace, dtype):
    """What the cached plan must not miss: the price of walking nothing is checked here."""
    ema = EMA('1ba')
    run = trainer([ema], model=make_model(dtype=dtype))
    for _ in range(2):
        advance(run.state)
        ema.apply(Event.BATCH_END, run.state, run.logger)
    before = dict(ema.ema_model.named_parameters())['module.5.weight'].clone()
    replace(run.state.model.module[5])
    advance(run.state)
    ema.apply(Event.BATCH_END, run.state, run.logger)
    after = dict(ema.ema_model.named_parameters())['module.5.weight']
    torch.testing.assert_close(after, (before + 7) / 2)


# 9. One formula


class Zoo(ComposerModel):
    """Parameters and buffers of every dtype; the loss pulls each parameter towards one."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(5)
        for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.complex64):
            name = f'in_{dtype}'.replace('.', '_')
            self.register_parameter(name, nn.Parameter(torch.randn(3, 4, generator=generator).to(dtype)))
        self.scalar = nn.Parameter(torch.tensor(0.3))
        self.empty = nn.Parameter(torch.zeros(0, 4))
        self.frozen = nn.Parameter(torch.ones(2), requires_grad=False)
        self.transposed = nn.Parameter(torch.randn(4, 3, generator=generator).t())
        self.register_buffer('float_buffer', torch.zeros(2))
        self.register_buffer('half_buffer', torch.zeros(2, dtype=torch.float16))
        self.register_buffer('count', torch.zeros((), dtype=torch.int64))
        self.register_buffer('flags', torch.zeros(3, dtype=torch.bool))

    def forward(self, batch):
        with torch.no_grad():
            self.count += 1
            self.float_buffer += 0.5
            self.half_buffer.copy_(self.float_buffer * self.count)
            self.flags[int(self.count) % 3] ^= True
        return sum((p.to(torch.complex128) - 1).abs().square().sum() for p in self.parameters()).float()

    def loss(self, outputs, batch):
        return outputs


class Follow(Callback):
    """Works the formula out in float64 from what training left behind, without the package."""

    def __init__(self, half_life: float) -> None:
        self.half_life = half_life
        self.average: dict[str, Tensor] = {}

    def batch_end(self, state, logger) -> None:
        weight = 1.0 if not self.average else 1.0 - 2.0 ** (-1.0 / self.half_life)
        for name, source in state.model.state_dict().items():
            if source.is_floating_point() or source.is_complex():
                wide = source.to(torch.complex128 if source.is_complex() else torch.float64)
                old = self.average.get(name, torch.zeros_like(wide))
                self.average[name] = old + weight * (wide - old)
            else:
                self.average[name] = source.clone()


# Rounding of one update is at most half a unit in the last place of the shadow's dtype; 20 updates, each of which
# halves what the earlier ones left within three batches, add up to a few units.
TOLERANCES = {torch.float32: 1e-6, torch.float64: 2e-15, torch.complex64: 1e-6}


@pytest.mark.parametrize('buffers', ['average', 'copy'])
def test_a_run_follows_the_float64_formula_in_every_dtype(trainer, buffers):
    ema, follow, model = EMA('3ba', buffers=buffers), Follow(3.0), Zoo()
    run = trainer(
        [ema],
        model=model,
        callbacks=[follow],
        train_dataloader=DataLoader(TensorDataset(torch.zeros(40, 1)), batch_size=2),
        max_duration='20ba',
        optimizers=torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.5),
    )
    run.fit()
    shadows = {**dict(ema.ema_model.named_parameters()), **dict(ema.ema_model.named_buffers())}
    sources = dict(model.state_dict())
    assert shadows.keys() == sources.keys() - {'frozen'}
    for name, shadow in shadows.items():
        source = sources[name]
        is_16_bit = source.dtype in (torch.bfloat16, torch.float16)
        assert shadow.dtype == (torch.float32 if is_16_bit else source.dtype), name
        is_copied = not (source.is_floating_point() or source.is_complex()) or (buffers == 'copy' and 'buffer' in name)
        if is_copied:
            assert torch.equal(shadow, source.to(shadow.dtype)), name
        else:
            expected, tolerance = follow.average[name], TOLERANCES[shadow.dtype]
            torch.testing.assert_close(shadow.to(expected.dtype), expected, rtol=tolerance, atol=tolerance)
            assert not shadow.numel() or not torch.equal(shadow, source.to(shadow.dtype)), f'{name} was not averaged'


class StepOnce(Callback):
    """Moves every weight from 0 to 1 after the first update, then leaves them there."""

    def batch_end(self, state, logger) -> None:
        with torch.no_grad():
            for parameter in state.model.parameters():
                parameter.fill_(1.0)


def test_after_one_half_life_a_bfloat16_model_s_average_has_covered_half_of_a_step(trainer):
    model = make_model(dtype=torch.bfloat16)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    images = torch.zeros(2, 1, 6, 6, dtype=torch.bfloat16)
    ema = EMA('400ba', log_interval=None)
    run = trainer(
        [ema],
        model=model,
        callbacks=[StepOnce()],
        train_dataloader=DataLoader([(image, 0) for image in images] * 401, batch_size=2),
        max_duration='401ba',
        optimizers=torch.optim.SGD(model.parameters(), lr=0.0),
    )
    run.fit()
    for name, average in ema.ema_model.named_parameters():
        assert average.dtype is torch.float32
        covered = average.double()
        assert (covered - 0.5).abs().max() < 0.005, f'{name} has covered {covered.mean():.3f}'  # 1 % of one half
