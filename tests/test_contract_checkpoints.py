"""Checkpoints hold training weights, and an exception inside a pass loses nothing: contract, item 4."""

from __future__ import annotations

import io
import itertools
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from composer import Event
from contract import (
    AVERAGES,
    Interrupted,
    Probe,
    RaiseAt,
    save_after_odd_batches,
    save_when_numpy_says_so,
)
from toy import bits, make_data, make_evaluator, snapshot

from composer_ema import EMA, load_average
from composer_ema import SWA as OurSWA
from composer_ema.trainer.weight_average import WeightAverage


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
