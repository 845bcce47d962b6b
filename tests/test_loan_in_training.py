"""Averages that take turns in a Trainer's model: training goes on as if there were none, whoever lent to it."""

import pytest
import toy
from composer import Callback
from toy import bits, make_evaluator, make_model

from composer_ema import EMA, SWA, ShadowModel
from composer_ema.shadow import loan

AVERAGES = {'ema': lambda: EMA('2ba'), 'swa': lambda: SWA('1ba', update_interval='1ba', refresh_batchnorm=False)}
each_average = pytest.mark.parametrize('average', AVERAGES.values(), ids=AVERAGES)


class History(Callback):
    """Keeps the weights that every batch starts from, and those at the end."""

    def __init__(self) -> None:
        self.weights: list[dict[str, bytes]] = []

    def batch_start(self, state, logger) -> None:
        self.weights.append(bits(state.model))

    def fit_end(self, state, logger) -> None:
        self.weights.append(bits(state.model))


class SecondAverage(Callback):
    """Keeps an average of its own, and lends it at the given moments."""

    def __init__(self, enters: str = 'eval_before_all', leaves: str = 'eval_after_all') -> None:
        self.enters, self.leaves = enters, leaves
        self.shadow: ShadowModel | None = None
        self.seen: list[dict[str, bytes]] = []

    def run_event(self, event, state, logger) -> None:
        if event.value == 'fit_start':
            self.shadow = ShadowModel(state.model)
        elif event.value == 'batch_end':
            self.shadow.update(state.model, smoothing=0.5)
        if event.value == self.enters and self.shadow.num_updates:
            self.shadow.swap_in(state.model)
        elif event.value == self.leaves and self.shadow.is_swapped:
            self.shadow.swap_out(state.model)
        elif event.value == 'eval_before_forward':
            self.seen.append(bits(state.model))


@each_average
@pytest.mark.parametrize(
    ('enters', 'leaves'),
    [
        ('eval_before_all', 'eval_after_all'),
        ('eval_start', 'eval_end'),
        ('eval_start', 'eval_after_all'),
        ('eval_batch_start', 'eval_batch_end'),
        ('epoch_end', 'epoch_checkpoint'),
        ('batch_end', 'batch_checkpoint'),
    ],
)
def test_a_callback_with_a_second_average_does_not_change_training(trainer, average, enters, leaves):
    plain, beside = History(), History()
    trainer(callbacks=[plain]).fit()
    second, algorithm = SecondAverage(enters, leaves), average()
    run = trainer([algorithm], callbacks=[second, beside], eval_dataloader=make_evaluator(interval='1ba'))
    run.fit()
    assert beside.weights == plain.weights
    assert bits(run.state.model) == plain.weights[-1]
    assert not loan.borrowers(run.state.model)
    assert second.seen
    assert toy.shadow_of(algorithm).num_updates == 6


def test_an_evaluation_uses_the_average_that_entered_last(trainer):
    second = SecondAverage()
    trainer([EMA('2ba')], callbacks=[second], eval_dataloader=make_evaluator(interval='2ba')).fit()
    averages = bits(dict(second.shadow.named_parameters()))
    assert {name: second.seen[-1][name] for name in averages} == averages


class RaiseInEvaluation(Callback):
    def eval_batch_start(self, state, logger) -> None:
        raise RuntimeError('out of memory')


@each_average
def test_a_second_trainer_starts_from_the_training_weights_that_a_broken_evaluation_left_behind(trainer, average):
    history, model = History(), make_model()
    trainer(callbacks=[history]).fit()
    first = trainer(
        [average()], model=model, callbacks=[RaiseInEvaluation()], eval_dataloader=make_evaluator(interval='2ba')
    )
    with pytest.raises(RuntimeError, match='out of memory'):
        first.fit()
    assert loan.borrowers(model)
    assert bits(model) != history.weights[2]
    with pytest.warns(UserWarning, match=r'still held an average.*ShadowModel'):
        second = trainer([average()], model=model)
    assert bits(model) == history.weights[2]
    second.fit()
    assert not loan.borrowers(model)


def test_two_trainers_after_one_another_train_as_without_averages(trainer):
    plain, averaged = make_model(), make_model()
    for model, algorithms in ((plain, [[], []]), (averaged, [[EMA('2ba')], [EMA('3ba')]])):
        for of_trainer in algorithms:
            trainer(of_trainer, model=model, eval_dataloader=make_evaluator(interval='1ba')).fit()
    assert bits(plain) == bits(averaged)


@each_average
def test_training_does_not_start_from_an_average_that_somebody_left_in(trainer, average):
    class Forgets(SecondAverage):
        def __init__(self) -> None:
            super().__init__('eval_before_all', 'never')

    second = Forgets()
    run = trainer([average()], callbacks=[second], eval_dataloader=make_evaluator(interval='2ba'))
    with pytest.raises(RuntimeError, match=r'holds an average, not its training weights.*swap_out'):
        run.fit()
    assert int(run.state.timestamp.batch) == 2
    second.shadow.swap_out(run.state.model)


def test_the_training_model_is_not_handed_out_with_an_average_in_it(trainer):
    ema = EMA('2ba')
    run = trainer([ema])
    run.fit()
    training = bits(run.state.model)
    ema.get_ema_model(run.state.model)
    other = ShadowModel(make_model(1))
    other.swap_in(run.state.model)
    with pytest.raises(RuntimeError, match='holds an average'):
        ema.get_training_model(run.state.model)
    other.swap_out(run.state.model)
    assert bits(ema.get_training_model(run.state.model)) == training


def test_another_model_gets_the_training_weights_whoever_is_in(trainer):
    ema = EMA('2ba')
    run = trainer([ema])
    run.fit()
    training = bits(run.state.model)
    with ShadowModel(make_model(1)).swapped(run.state.model):
        given = make_model(2)
        assert bits(ema.get_training_model(given)) == training
    assert bits(run.state.model) == training


def test_a_checkpoint_taken_while_another_average_shows_resumes_exactly(trainer, tmp_path):
    class Saves(SecondAverage):
        def run_event(self, event, state, logger) -> None:
            super().run_event(event, state, logger)
            if event.value == 'eval_batch_end' and int(state.timestamp.batch) == 2:
                run.save_checkpoint(str(tmp_path / 'saved.pt'))

    whole = trainer([EMA('2ba')])
    whole.fit()
    run = trainer([EMA('2ba')], callbacks=[Saves()], eval_dataloader=make_evaluator(interval='1ba'))
    run.fit()
    resumed = trainer([EMA('2ba')], load_path=str(tmp_path / 'saved.pt'))
    resumed.fit()
    assert toy.snapshot(resumed) == toy.snapshot(whole)


@each_average
def test_a_checkpoint_of_an_epoch_holds_the_training_weights_that_somebody_elses_average_covers(
    trainer, tmp_path, average
):
    whole = trainer([average()])
    whole.fit()
    second = SecondAverage('eval_start', 'epoch_start')
    trainer([average()], callbacks=[second], eval_dataloader=make_evaluator(), save_folder=str(tmp_path)).fit()
    (saved,) = tmp_path.glob('*-ba3-rank0.pt')
    resumed = trainer([average()], load_path=str(saved))
    resumed.fit()
    assert toy.snapshot(resumed) == toy.snapshot(whole)


def test_an_average_behind_another_comes_to_the_front_when_it_is_asked_for(trainer):
    ema = EMA('2ba')
    run = trainer([ema])
    run.fit()
    training, other = bits(run.state.model), ShadowModel(make_model(1))
    ema.get_ema_model(run.state.model)
    average = bits(run.state.model)
    other.swap_in(run.state.model)
    assert bits(run.state.model) != average
    assert bits(ema.get_ema_model(run.state.model)) == average
    other.swap_out(run.state.model)
    assert bits(ema.get_training_model(run.state.model)) == training


def test_a_shadow_of_the_bare_network_takes_turns_with_an_average_of_the_whole_model(trainer):
    class OfTheNetwork(SecondAverage):
        def run_event(self, event, state, logger) -> None:
            if event.value == 'fit_start':
                self.shadow = ShadowModel(state.model.module)
            elif event.value == 'batch_end':
                self.shadow.update(state.model.module, smoothing=0.5)
            elif event.value == 'eval_batch_end':
                with self.shadow.swapped(state.model.module):
                    self.seen.append(bits(state.model))

    plain, beside, second = History(), History(), OfTheNetwork()
    trainer(callbacks=[plain]).fit()
    trainer([EMA('2ba')], callbacks=[second, beside], eval_dataloader=make_evaluator(interval='1ba')).fit()
    assert beside.weights == plain.weights
    assert second.seen
