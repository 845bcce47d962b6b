"""``evaluate`` runs each evaluator once for each of the weights, and gives what evaluators made by hand give."""

import random
from typing import Any

import numpy
import pytest
import torch
from composer import Callback, Evaluator
from torch.utils.data import DataLoader
from toy import make_data, make_evaluator, make_model, make_trainer

from composer_ema import EMA, SWA

pytestmark = pytest.mark.filterwarnings('ignore:.* still holds .* of the initial weights:UserWarning')


class Draws(Callback):
    """Draws random numbers in every evaluation, as a callback or a model may."""

    def eval_batch_start(self, state, logger):
        random.random(), numpy.random.rand(), torch.rand(1)


class Passes(Callback):
    def __init__(self):
        self.seen = []

    def eval_end(self, state, logger):
        self.seen.append((int(state.timestamp.batch), state.dataloader_label))


def drawing_evaluator(label='eval', **arguments) -> Evaluator:
    """An evaluator whose loader draws from the generator of the process at each pass."""
    data = make_data(4, seed=2).dataloader.dataset
    return Evaluator(label=label, dataloader=DataLoader(data, 2), **arguments)


def results(trainer) -> dict[str, Any]:
    return {
        label: {n: m.compute().item() for n, m in metrics.items()}
        for label, metrics in trainer.state.eval_metrics.items()
    }


def fitted(evaluators, *algorithms, **arguments):
    passes = Passes()
    trainer = make_trainer(
        algorithms=list(algorithms),
        eval_dataloader=evaluators,
        callbacks=[passes, Draws()],
        **{'max_duration': '2ep', **arguments},
    )
    trainer.fit()
    return trainer, passes.seen


def weights_of(trainer):
    return {name: tensor.clone() for name, tensor in trainer.state.model.state_dict().items()}


def assert_same(one, other):
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.fixture(scope='module')
def by_hand():
    """Two evaluators, each built by hand, and one beside them with an interval of its own."""
    evaluators = [
        *(drawing_evaluator(f'eval_{each}', eval_interval='2ba') for each in ('training', 'ema')),
        *(
            drawing_evaluator(f'other_{each}', subset_num_batches=1, eval_interval='1ep')
            for each in ('training', 'ema')
        ),
    ]
    return fitted(evaluators, EMA('2ba', evaluate_with={'eval_training': 'training', 'other_training': 'training'}))


@pytest.fixture(scope='module')
def alike():
    evaluators = [
        drawing_evaluator('eval', eval_interval='2ba'),
        drawing_evaluator('other', subset_num_batches=1, eval_interval='1ep'),
    ]
    return fitted(evaluators, EMA('2ba', evaluate=['training', 'ema']))


def test_labels_intervals_and_their_order_are_those_of_evaluators_made_by_hand(by_hand, alike):
    assert alike[1] == by_hand[1]
    assert len(alike[1]) == 10  # after batches 2, 4 and 6, and after two epochs
    assert [each.label for each in alike[0].state.evaluators] == [each.label for each in by_hand[0].state.evaluators]
    assert [each.subset_num_batches for each in alike[0].state.evaluators] == [-1, -1, 1, 1]


def test_each_metric_is_what_an_evaluator_of_those_weights_measures(alike):
    trainer, _ = alike
    found = results(trainer)
    ema = trainer.state.algorithms[0]
    for weights in ('training', 'ema'):
        model = make_model()
        model.load_state_dict(trainer.state.model.state_dict())
        if weights == 'ema':
            ema.ema_model.copy_to(model)
        hand, _ = fitted([drawing_evaluator()], max_duration='1ep')
        hand.state.model.load_state_dict(model.state_dict())
        hand.eval()
        assert found[f'eval_{weights}'] == results(hand)['eval']
    assert found['eval_training'] != found['eval_ema']


def test_training_draws_what_it_draws_with_one_evaluator(alike):
    evaluators = [
        drawing_evaluator('eval', eval_interval='2ba'),
        drawing_evaluator('other', subset_num_batches=1, eval_interval='1ep'),
    ]
    one, _ = fitted(evaluators)
    assert_same(weights_of(alike[0]), weights_of(one))


def test_a_resumed_run_is_the_uninterrupted_one_its_metrics_too(tmp_path, alike):
    def evaluators():
        return [
            drawing_evaluator('eval', eval_interval='2ba'),
            drawing_evaluator('other', subset_num_batches=1, eval_interval='1ep'),
        ]

    arguments = {'save_folder': str(tmp_path), 'save_interval': '1ba', 'save_filename': 'ba{batch}.pt'}
    fitted(evaluators(), EMA('2ba', evaluate=['training', 'ema']), **arguments)
    trainer = make_trainer(
        algorithms=[EMA('2ba', evaluate=['training', 'ema'])],
        eval_dataloader=evaluators(),
        callbacks=[Passes(), Draws()],
        load_path=str(tmp_path / 'ba4.pt'),
    )
    trainer.fit()
    assert_same(weights_of(trainer), weights_of(alike[0]))
    assert results(trainer) == results(alike[0])


def test_after_an_evaluator_that_raised_no_random_numbers_come_back():
    class Failing(Callback):
        is_on = True

        def eval_batch_end(self, state, logger):
            if self.is_on and state.dataloader_label == 'eval_ema':
                raise RuntimeError('of an evaluation')

    failing = Failing()
    trainer = make_trainer(
        algorithms=[EMA('2ba', evaluate=['training', 'ema'])], eval_dataloader=drawing_evaluator(),
        callbacks=[failing], eval_interval='2ba',
    )  # fmt: skip
    with pytest.raises(RuntimeError, match='of an evaluation'):
        trainer.fit()
    failing.is_on, drawn = False, []
    for _ in range(2):
        torch.manual_seed(5)
        trainer.eval()
        drawn.append(torch.rand(1))
    assert drawn[0] == drawn[1]


def test_evaluators_given_to_fit_and_to_eval():
    passes = Passes()
    trainer = make_trainer(algorithms=[EMA('2ba', evaluate=['ema', 'training'])], callbacks=[passes])
    trainer.fit(eval_dataloader=make_data(4, seed=2), duration='1ep')
    assert passes.seen == [(3, 'eval_ema'), (3, 'eval_training')]
    trainer.fit(duration='1ep')
    assert passes.seen[2:] == [(6, 'eval_ema'), (6, 'eval_training')]
    before = results(trainer)
    trainer.eval()
    assert passes.seen[4:] == [(6, 'eval_ema'), (6, 'eval_training')]
    assert results(trainer) == before
    trainer.eval(eval_dataloader=[make_evaluator('once')])
    assert passes.seen[6:] == [(6, 'once')]
    assert results(trainer)['once'] == before['eval_ema']


def test_averages_of_several_labels_and_algorithms_and_an_evaluator_that_is_named():
    algorithms = [
        EMA({'short': '1ba', 'long': '9ba'}, evaluate=['training', 'long'], evaluate_with={'own': 'short'}),
        SWA('1ba', update_interval='1ba', evaluate=['swa', 'training']),
    ]
    _, seen = fitted([make_evaluator('own'), make_evaluator()], *algorithms, max_duration='1ep')
    assert [label for _, label in seen] == ['own', 'eval_training', 'eval_long', 'eval_swa']


def test_the_same_algorithm_and_evaluators_in_a_second_trainer():
    ema, evaluator = EMA('2ba', evaluate=['training', 'ema']), make_evaluator()
    first, second = (fitted([evaluator], ema, max_duration='1ep') for _ in range(2))
    assert first[1] == second[1] == [(3, 'eval_training'), (3, 'eval_ema')]
    assert evaluator.label == 'eval'
    _, seen = fitted([make_evaluator('eval_ema')], ema, max_duration='1ep')
    assert [label for _, label in seen] == ['eval_ema_training', 'eval_ema_ema']


def test_an_interval_of_the_user_s_is_asked_once_for_all_weights():
    asked = []

    def every_other_time(state, event):
        asked.append(event)
        return len(asked) % 2 == 0

    evaluator = Evaluator(label='eval', dataloader=make_data(4, seed=2), eval_interval=every_other_time)
    _, seen = fitted([evaluator], EMA('2ba', evaluate=['training', 'ema']), max_duration='1ep')
    assert len(asked) == 5  # after each of three batches, the epoch and training
    assert seen == [(2, 'eval_training'), (2, 'eval_ema'), (3, 'eval_training'), (3, 'eval_ema')]


def test_a_label_that_is_taken_is_refused():
    with pytest.raises(ValueError, match=r"evaluate runs the evaluator 'eval' as 'eval_ema' for the weights 'ema'"):
        make_trainer([EMA('2ba', evaluate=['ema'])], eval_dataloader=[make_evaluator(), make_evaluator('eval_ema')])


@pytest.mark.parametrize(
    ('evaluate', 'message'),
    [
        ('training', r"^evaluate must be a list of weights, got 'training'\. Pass for example \['training', 'ema'\]"),
        ([], r'^evaluate must list weights, each once, got \[\]'),
        (['ema', 'ema'], r"^evaluate must list weights, each once, got \['ema', 'ema'\]"),
        (['long'], r"^each of evaluate must be 'ema' or 'training', got 'long'"),
    ],
)
def test_what_lists_no_weights_is_refused(evaluate, message):
    with pytest.raises((TypeError, ValueError), match=message):
        EMA('2ba', evaluate=evaluate)


def test_without_an_evaluator_it_is_said_to_have_no_effect():
    trainer = make_trainer([EMA('2ba', evaluate=['training', 'ema'])], max_duration='1ba')
    with pytest.warns(
        UserWarning, match=r"evaluate=\['training', 'ema'\] has no effect: this Trainer has no evaluator"
    ):
        trainer.fit()


def test_the_average_of_a_run_as_a_module(alike):
    trainer, _ = alike
    model, average = trainer.state.model, trainer.state.algorithms[0].ema_model
    module = average.module(model)
    batch = next(iter(make_data(4, seed=2).dataloader))
    with average.swapped(model):
        expected = model.eval()(batch)
    assert type(module) is type(model)
    assert torch.equal(module(batch), expected)
