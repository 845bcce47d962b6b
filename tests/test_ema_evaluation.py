"""Which weights evaluators, predictions and callers get, and at which events the algorithm acts."""

from __future__ import annotations

import pytest
import torch
import toy
from composer import Callback, Evaluator
from composer.core import Event
from tensors import all_tensors, copies, equal
from torch import nn

from composer_ema import EMA, ShadowModel


class Sees(Callback):
    """Notes at every evaluation batch and prediction which weights the model holds."""

    def __init__(self, ema: EMA) -> None:
        self.ema, self.seen = ema, []

    def _note(self, state, label) -> None:
        holds = 'ema' if self.ema.ema_weights_active else 'training'
        if self.ema.ema_started:
            average, live = all_tensors(self.ema.ema_model)['module.5.weight'], state.model.module[5].weight
            assert torch.equal(live, average) == (holds == 'ema')
        self.seen.append((label, holds))

    def eval_batch_start(self, state, logger) -> None:
        self._note(state, state.dataloader_label)

    def predict_batch_start(self, state, logger) -> None:
        self._note(state, 'predict')


@pytest.mark.parametrize(
    ('evaluate_with', 'seen'),
    [
        (None, {'a': 'ema', 'b': 'ema'}),
        ({'a': 'training'}, {'a': 'training', 'b': 'ema'}),
        ({'b': 'training'}, {'a': 'ema', 'b': 'training'}),
        ({'a': 'training', 'b': 'training'}, {'a': 'training', 'b': 'training'}),
        ({'a': 'ema', 'b': 'training'}, {'a': 'ema', 'b': 'training'}),
    ],
)
def test_each_evaluator_sees_the_weights_that_it_asks_for(trainer, evaluate_with, seen):
    ema = EMA(half_life='2ba', evaluate_with=evaluate_with)
    probe = Sees(ema)
    evaluators = [toy.make_evaluator('a'), toy.make_evaluator('b')]
    run = trainer([ema], callbacks=[probe], eval_dataloader=evaluators)
    run.fit()
    assert probe.seen == [(label, seen[label]) for _ in range(2) for label in ('a', 'b')]
    probe.seen.clear()
    run.eval()
    assert dict(probe.seen) == seen
    assert not ema.ema_weights_active


@pytest.mark.parametrize('weights', ['ema', 'training'])
def test_prediction_sees_the_weights_that_it_asks_for(trainer, weights):
    ema = EMA(half_life='2ba', evaluate_with={'predict': weights})
    probe = Sees(ema)
    run = trainer([ema], callbacks=[probe])
    run.fit()
    run.predict(toy.make_data(4))
    assert probe.seen == [('predict', weights)]
    assert not ema.ema_weights_active


def test_before_the_first_update_evaluation_uses_the_training_weights(trainer):
    ema = EMA(half_life='2ba', ema_start='4ba')
    probe = Sees(ema)
    run = trainer([ema], callbacks=[probe], eval_dataloader=toy.make_evaluator(interval='2ba'))
    run.eval()
    run.fit()
    assert [holds for _, holds in probe.seen] == ['training', 'training', 'ema', 'ema']


def test_evaluation_without_training_uses_the_training_weights(trainer):
    ema = EMA()
    probe = Sees(ema)
    run = trainer([ema], callbacks=[probe])
    run.eval(toy.make_evaluator())
    assert probe.seen == [('eval', 'training')]


def test_a_label_that_no_evaluator_has_is_warned_of_with_the_nearest(trainer):
    run = trainer([EMA('2ba', evaluate_with={'evel': 'training'})], eval_dataloader=toy.make_evaluator('eval'))
    with pytest.warns(UserWarning, match=r"names the evaluator 'evel', .*Did you mean 'eval'\?"):
        run.fit()


def test_the_average_put_into_the_model_in_training_keeps_the_training_weights(trained):
    ema, model, training, average = trained
    assert ema.get_ema_model(model) is model
    assert equal(all_tensors(model), average)
    assert equal(all_tensors(ema.get_ema_model(model)), average)
    assert ema.get_training_model(model) is model
    assert equal(all_tensors(model), training)
    assert equal(all_tensors(ema.get_training_model(model)), training)
    assert equal(all_tensors(ema.ema_model), average)


def test_another_model_is_given_either_set_and_neither_is_lost(trained):
    ema, model, training, average = trained
    other = toy.make_model(seed=8)
    assert equal(all_tensors(ema.get_ema_model(other)), average)
    assert equal(all_tensors(ema.get_training_model(other)), training)
    ema.get_ema_model(model)
    assert equal(all_tensors(ema.get_training_model(other)), training)
    assert equal(all_tensors(ema.get_ema_model(other)), average)
    assert equal(all_tensors(model), average)
    ema.get_training_model(model)
    assert equal(all_tensors(model), training)
    assert equal(all_tensors(ema.ema_model), average)


def test_training_goes_on_from_the_training_weights_whatever_was_asked_for(trainer):
    finals = []
    for asks in (False, True):
        ema = EMA(half_life='2ba')
        run = trainer([ema], model=toy.make_model(seed=2))
        run.fit(duration='1ep')
        if asks:
            ema.get_ema_model(run.state.model)
        run.fit(duration='1ep')
        finals.append((copies(run.state.model), {n: t.clone() for n, t in all_tensors(ema.ema_model).items()}))
    assert equal(finals[0][0], finals[1][0])
    assert equal(finals[0][1], finals[1][1])


def test_another_model_that_does_not_fit_is_refused_and_left_alone(trained):
    ema = trained[0]
    other = toy.make_model(seed=8)
    other.module[5] = nn.Linear(8, 9)
    before = copies(other)
    for ask in (ema.get_ema_model, ema.get_training_model):
        with pytest.raises(ValueError, match=r'module\.5\.bias'):
            ask(other)
        assert equal(all_tensors(other), before)


def test_without_a_trainer_there_is_no_average():
    for ask in (EMA().get_ema_model, EMA().get_training_model):
        with pytest.raises(RuntimeError, match='no average yet. Build a Trainer'.replace('.', r'\.')):
            ask(toy.make_model())


def test_when_the_model_in_training_is_gone_that_is_said(trainer):
    ema = EMA(half_life='2ba')
    ema.ema_model = ShadowModel(toy.make_model())
    with pytest.raises(RuntimeError, match='model in training is gone'):
        ema.get_training_model(toy.make_model())


def _shown(value):
    if isinstance(value, dict):
        return {key: _shown(inner) for key, inner in value.items()}
    return (id(value), repr(value))


def test_match_only_looks(trainer):
    """Called twice at every event of a run, for every event there is: nothing changes, and both give the same."""

    class AsksTwice(EMA):
        def match(self, event, state):
            for asked in Event:
                before = _shown(self.__dict__)
                answers = super().match(asked, state), super().match(asked, state)
                assert answers[0] is answers[1]
                assert _shown(self.__dict__) == before
            return super().match(event, state)

    plain, asking = EMA(half_life='2ba', ema_start='2ba'), AsksTwice(half_life='2ba', ema_start='2ba')
    for ema in (plain, asking):
        run = trainer([ema], model=toy.make_model(seed=6), eval_dataloader=toy.make_evaluator())
        run.fit()
        run.eval()
    assert equal(all_tensors(plain.ema_model), all_tensors(asking.ema_model))


def test_between_updates_no_event_of_a_batch_matches(trainer):
    class Counts(EMA):
        def apply(self, event, state, logger):
            applied.append((state.timestamp.batch.value, event))
            super().apply(event, state, logger)

    applied = []
    trainer([Counts(half_life='3ba', update_interval='3ba', log_interval=None)]).fit()
    during = [batch for batch, event in applied if event.is_predict is False and event is Event.BATCH_END]
    assert during == [1, 3, 6]
    everything = {event for _, event in applied}
    assert everything == {
        Event.INIT, Event.BEFORE_LOAD, Event.AFTER_LOAD, Event.FIT_START, Event.BATCH_END, Event.FIT_END,
    }  # fmt: skip


def test_evaluators_given_as_plain_loaders_have_the_label_eval(trainer):
    ema = EMA(half_life='2ba', evaluate_with={'eval': 'training'})
    probe = Sees(ema)
    run = trainer([ema], callbacks=[probe], eval_dataloader=toy.make_data(4, seed=2), eval_interval='1ep')
    run.fit()
    assert set(probe.seen) == {('eval', 'training')}
    assert isinstance(run.state.evaluators[0], Evaluator)
