"""Checkpoints hold training weights, and an exception inside a pass loses nothing: contract, item 4."""

from __future__ import annotations

import copy
import io
import itertools
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from composer import Callback, Event, Trainer
from composer.core import State
from composer.loggers import Logger
from contract import (
    AVERAGES,
    Interrupted,
    Probe,
    RaiseAt,
    save_after_odd_batches,
    save_when_numpy_says_so,
    saved_bits,
)
from tensors import state_by_hand
from torch import nn
from toy import bits, make_data, make_evaluator, make_model, snapshot

from composer_ema import EMA, ShadowModel, load_average
from composer_ema import SWA as OurSWA
from composer_ema.trainer.weight_average import WeightAverage

EVERY_MOMENT = (
    Event.EVAL_BEFORE_ALL, Event.EVAL_START, Event.EVAL_BEFORE_FORWARD, Event.EVAL_BATCH_END, Event.EVAL_END,
    Event.EVAL_AFTER_ALL,
)  # fmt: skip


def uninterrupted(trainer, average: Callable[[], WeightAverage] = AVERAGES['ema'], **arguments: Any) -> dict[str, Any]:
    run = trainer([average()], eval_dataloader=make_evaluator(interval='1ba'), **arguments)
    run.fit()
    return snapshot(run)


@pytest.mark.parametrize(
    ('moment', 'batch', 'kind'),
    [
        *itertools.product(EVERY_MOMENT[:-1], [2, 3], ['ema']),
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


class SaveAt(Callback):
    """Saves inside an evaluation, as callbacks that keep the best model do, and notes what the checkpoint holds."""

    def __init__(self, moment: Event, path: Any, **arguments: Any) -> None:
        self.moment, self.path, self.arguments = moment, str(path), arguments
        self.trainer: Trainer | None = None
        self.was_average = False

    def run_event(self, event, state, logger) -> None:
        if event is self.moment and int(state.timestamp.batch) == 2:
            assert self.trainer is not None
            self.was_average = bits(state.model) != bits(state.get_model_state_dict())
            self.trainer.save_checkpoint(self.path, **self.arguments)


def run_that_saves(trainer, average: Callable[[], WeightAverage], saver: SaveAt, **arguments: Any) -> Trainer:
    arguments = {'eval_dataloader': make_evaluator(interval='1ba'), **arguments}
    saver.trainer = trainer([average()], callbacks=[saver], **arguments)
    saver.trainer.fit()
    return saver.trainer


@pytest.mark.parametrize(
    ('moment', 'kind'), [*itertools.product(EVERY_MOMENT, ['ema']), (Event.EVAL_END, 'swa'), (Event.EVAL_START, 'swa')]
)
def test_without_the_algorithm_a_checkpoint_saved_inside_an_evaluation_continues_the_training(
    trainer, tmp_path, moment, kind
):
    saver = SaveAt(moment, tmp_path / 'inside.pt')
    run = run_that_saves(trainer, AVERAGES[kind], saver)
    assert saver.was_average == (moment is not Event.EVAL_AFTER_ALL)
    without = trainer(eval_dataloader=make_evaluator(interval='1ba'), load_path=saver.path)
    assert bits(without.state.model) == expected_training_weights(trainer, 2)
    without.fit()
    assert bits(without.state.model) == bits(run.state.model)


@pytest.mark.parametrize(('saves', 'loads'), [(True, True), (False, True), (True, False)])
def test_weights_only_means_the_training_weights_inside_an_evaluation_too(trainer, tmp_path, saves, loads):
    saver = SaveAt(Event.EVAL_END, tmp_path / 'inside.pt', weights_only=saves)
    run_that_saves(trainer, AVERAGES['ema'], saver)
    assert saver.was_average
    loaded = trainer([EMA('2ba')] if loads else [], load_path=saver.path, load_weights_only=True)
    assert bits(loaded.state.model) == expected_training_weights(trainer, 2)


def test_a_checkpoint_taken_on_loan_is_the_one_taken_before_the_loan(trainer, tmp_path):
    ema = EMA('2ba')
    run = trainer([ema])
    run.fit(duration='3ba')
    before, inside = str(tmp_path / 'before.pt'), str(tmp_path / 'inside.pt')
    run.save_checkpoint(before)
    ema.get_ema_model(run.state.model)
    assert 'training_weights' in ema.state_dict()
    run.save_checkpoint(inside)
    assert saved_bits(inside) == saved_bits(before)
    for path in (before, inside):
        state = torch.load(path, weights_only=False)['state']
        assert dict(state['algorithms'])['EMA'].keys() == ema.state_dict().keys() - {'training_weights'}


def test_the_average_of_a_callback_stays_out_of_the_model_slot(trainer, tmp_path):
    shadow = ShadowModel(make_model(seed=5).module)

    class OfTheNetwork(SaveAt):
        def run_event(self, event, state, logger) -> None:
            with shadow.swapped(state.model.module):
                super().run_event(event, state, logger)

    saver = OfTheNetwork(Event.BATCH_END, tmp_path / 'inside.pt')
    run = run_that_saves(trainer, AVERAGES['ema'], saver)
    assert saver.was_average
    without = trainer(eval_dataloader=make_evaluator(interval='1ba'), load_path=saver.path)
    without.fit()
    assert bits(without.state.model) == bits(run.state.model)


@pytest.mark.parametrize('wrap', [lambda model: model, torch.compile], ids=['whole', 'compiled'])
def test_every_name_of_a_tied_weight_and_of_a_compiled_part_is_saved_with_the_training_weights(wrap):
    network = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3), nn.BatchNorm1d(3))
    network[1].weight = network[0].weight
    network[0] = wrap(network[0])
    state, ema = state_by_hand(model := wrap(network)), EMA('2ba')
    for event in (Event.INIT, Event.BATCH_END):
        ema.apply(event, state, Logger(state))
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(1)
    training = bits(state.get_model_state_dict())
    ema.get_ema_model(model)
    shown = bits(State.get_model_state_dict(state))
    assert bits(state.get_model_state_dict()) == training != shown
    assert bits(copy.deepcopy(state).get_model_state_dict()) == shown  # a copy of the model is not on loan
    assert {'0.weight', '1.weight', '2.running_var'} <= training.keys()


@pytest.mark.parametrize('broken', ['eval', 'predict'])
def test_after_a_broken_pass_every_checkpoint_holds_the_training_weights(trainer, tmp_path, broken):
    moment = Event.EVAL_BATCH_END if broken == 'eval' else Event.PREDICT_BATCH_END
    run = trainer([EMA('2ba')], callbacks=[RaiseAt(moment, 3)])
    run.fit(duration='3ba')
    with pytest.raises(Interrupted):
        run.eval(eval_dataloader=make_data(4)) if broken == 'eval' else run.predict(make_data(4))
    assert run.state.algorithms[0].ema_weights_active
    for name, arguments in (('whole.pt', {}), ('weights.pt', {'weights_only': True})):
        run.save_checkpoint(str(tmp_path / name), **arguments)
        state = torch.load(tmp_path / name, weights_only=False)['state']
        assert bits(state['model']) == expected_training_weights(trainer, 3)


@pytest.mark.parametrize('kind', AVERAGES)
def test_a_checkpoint_of_an_earlier_release_with_the_average_in_the_model_slot_resumes_exactly(trainer, tmp_path, kind):
    run = trainer([AVERAGES[kind]()])
    run.fit(duration='3ba')
    run.save_checkpoint(str(tmp_path / 'today.pt'))
    checkpoint = torch.load(tmp_path / 'today.pt', weights_only=False)
    model, algorithm = checkpoint['state']['model'], dict(checkpoint['state']['algorithms'])[kind.upper()]
    average = algorithm['averages'][kind]
    algorithm['training_weights'] = {n: t.clone() for n, t in model.items() if t.is_floating_point()}
    model |= {n: t for n, t in {**average['parameters'], **average['buffers']}.items() if t.is_floating_point()}
    torch.save(checkpoint, tmp_path / 'earlier.pt')
    assert bits(load_average(tmp_path / 'earlier.pt')) == bits({**average['parameters'], **average['buffers']})

    resumed = trainer([AVERAGES[kind]()], load_path=str(tmp_path / 'earlier.pt'))
    assert bits(resumed.state.model) == bits(run.state.model)
    resumed.fit()
    assert snapshot(resumed) == uninterrupted_without_evaluation(trainer, AVERAGES[kind])


def uninterrupted_without_evaluation(trainer, average: Callable[[], WeightAverage]) -> dict[str, Any]:
    run = trainer([average()])
    run.fit()
    return snapshot(run)


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
        lambda: EMA('0.5ep', update_interval='1ba', evaluate_with={'eval': 'ema'}, include='.'),
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
