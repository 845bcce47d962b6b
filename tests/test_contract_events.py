"""Which weights every event sees, and that the shadow is always the average: contract, items 2 and 3."""

from __future__ import annotations

import pytest
import torch
from composer import Event
from contract import (
    AVERAGE_IS_IN,
    WITHIN_A_STEP,
    PredictDuringFit,
    Probe,
    StopAfter,
    Unfreeze,
    each_average,
)
from toy import bits, make_data, make_evaluator, make_model, shadow_of, snapshot

from composer_ema import EMA


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
