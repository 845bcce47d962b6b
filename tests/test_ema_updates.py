"""Which update comes with which weight, by a half-life, a smoothing or a function; and what is logged."""

from __future__ import annotations

import math

import pytest
import torch
import toy
from composer import Callback
from composer.loggers import InMemoryLogger
from tensors import all_tensors, assert_close, copies, equal, mixed
from torch.optim.swa_utils import get_ema_multi_avg_fn

from composer_ema import EMA, ShadowModel


@pytest.mark.parametrize(
    'function',
    [
        {'multi_avg_fn': get_ema_multi_avg_fn(0.75)},
        {'avg_fn': lambda averaged, current, _: averaged.lerp(current, 0.25)},
    ],
    ids=['multi_avg_fn', 'avg_fn'],
)
def test_a_function_makes_the_average_in_place_of_the_half_life(trainer, function):
    plain, by_function = EMA(smoothing=0.75), EMA(**function)
    trainer([plain]).fit()
    run = trainer([by_function], loggers=[memory := InMemoryLogger()])
    run.fit()
    assert equal(all_tensors(by_function.ema_model), all_tensors(plain.ema_model))
    assert by_function.smoothing is None
    assert 'ema/num_updates' in memory.data
    assert 'ema/smoothing' not in memory.data
    state = by_function.state_dict()
    assert state['config'][next(iter(function))].endswith(('ema_update', '<lambda>'))
    assert state['config']['half_life'] is None
    assert not any(callable(value) for value in state.values())


def test_an_average_taken_over_goes_on_by_the_function(model):
    ema = EMA(avg_fn=lambda averaged, current, _: (averaged + current) / 2)
    ema.ema_model = model
    other = toy.make_model(seed=1)
    ema.ema_model.update(other)
    expected = (model.module[5].weight + other.module[5].weight) / 2
    assert torch.equal(all_tensors(ema.ema_model)['module.5.weight'], expected)
    with pytest.raises(ValueError, match=r'averages by a function, the given shadow does not\. Build'):
        ema.ema_model = ShadowModel(model)


class Witness(Callback):
    """Averages by the closed form what it sees after each batch, in float64.

    Args:
        updates: the batch of each update, and the half-lives passed since the one before; None copies.
    """

    def __init__(self, updates: dict[int, float | None], at: str = 'batch_end') -> None:
        self.updates, self.average, self.counts = updates, {}, []
        self.at = at

    def batch_end(self, state, logger) -> None:
        self._see(state)

    def _see(self, state) -> None:
        batch = state.timestamp.batch.value
        if batch in self.updates:
            now = {name: t.double() if t.is_floating_point() else t for name, t in copies(state.model).items()}
            half_lives = self.updates[batch]
            smoothing = 0.0 if half_lives is None else 2.0**-half_lives
            self.average = mixed(self.average or now, now, smoothing)


@pytest.mark.parametrize(
    ('arguments', 'updates'),
    [
        ({'half_life': '2ba'}, {1: None, 2: 1 / 2, 3: 1 / 2, 4: 1 / 2, 5: 1 / 2, 6: 1 / 2}),
        ({'half_life': '2ba', 'update_interval': '2ba', 'ema_start': '2ba'}, {2: None, 4: 1, 6: 1}),
        ({'half_life': '2ba', 'update_interval': '2ba'}, {1: None, 2: 1 / 2, 4: 1, 6: 1}),
        ({'half_life': '8sp'}, {1: None, 2: 4 / 8, 3: 2 / 8, 4: 4 / 8, 5: 4 / 8, 6: 2 / 8}),
        ({'half_life': '8sp', 'update_interval': '2ba'}, {1: None, 2: 4 / 8, 4: 6 / 8, 6: 6 / 8}),
        ({'half_life': '24tok'}, {1: None, 2: 4 / 8, 3: 2 / 8, 4: 4 / 8, 5: 4 / 8, 6: 2 / 8}),
        ({'half_life': '1ep', 'update_interval': '1ep'}, {3: None, 6: 1}),
        ({'half_life': '1.5ep', 'update_interval': '1ep'}, {3: None, 6: 1 / 1.5}),
        ({'half_life': '1.5ep', 'update_interval': '1ba'}, {1: None, **dict.fromkeys(range(2, 7), 1 / 4.5)}),
        ({'half_life': '0.5ep', 'update_interval': '1ba'}, {1: None, **dict.fromkeys(range(2, 7), 1 / 1.5)}),
        ({'half_life': '2ep', 'update_interval': '0.5ep'}, {1: None, 2: 1 / 6, 3: 1 / 6, 5: 2 / 6, 6: 1 / 6}),
        ({'half_life': '2ba', 'update_interval': '1ep'}, {3: None, 6: 3 / 2}),
        ({'half_life': '2ep', 'update_interval': '2ba'}, {1: None, 2: 1 / 6, 4: 2 / 6, 6: 2 / 6}),
        ({'half_life': '2ba', 'update_interval': '8sp'}, {1: None, 2: 1 / 2, 5: 3 / 2}),
        ({'half_life': '0.5dur'}, {1: None, **dict.fromkeys(range(2, 7), 1 / 3)}),
        ({'half_life': '0.5dur', 'update_interval': '0.5dur'}, {1: None, 3: 2 / 3, 6: 1}),
        ({'half_life': '0ba'}, dict.fromkeys(range(1, 7))),
        ({'half_life': '0ba', 'update_interval': '2ba'}, {1: None, 2: None, 4: None, 6: None}),
        ({'half_life': '2ba', 'ema_start': '3ba'}, {3: None, 4: 1 / 2, 5: 1 / 2, 6: 1 / 2}),
        ({'half_life': '2ba', 'ema_start': '1ep'}, {3: None, 4: 1 / 2, 5: 1 / 2, 6: 1 / 2}),
        ({'half_life': '2ba', 'ema_start': '1.5ep'}, {5: None, 6: 1 / 2}),
        ({'half_life': '2ba', 'ema_start': '10sp'}, {3: None, 4: 1 / 2, 5: 1 / 2, 6: 1 / 2}),
        ({'half_life': '2ba', 'ema_start': '11sp'}, {4: None, 5: 1 / 2, 6: 1 / 2}),
        ({'half_life': '2ba', 'ema_start': '30tok'}, {3: None, 4: 1 / 2, 5: 1 / 2, 6: 1 / 2}),
        ({'half_life': '2ba', 'ema_start': '0.5dur'}, {3: None, 4: 1 / 2, 5: 1 / 2, 6: 1 / 2}),
        ({'half_life': '2ba', 'ema_start': '1dur'}, {6: None}),
        ({'half_life': '1ep', 'ema_start': '2ep', 'update_interval': '1ep'}, {6: None}),
        ({'smoothing': 0.5}, {1: None, **dict.fromkeys(range(2, 7), 1)}),
        ({'smoothing': 0.5, 'update_interval': '2ba'}, {1: None, 2: 1, 4: 1, 6: 1}),
        ({'smoothing': 0.5, 'update_interval': '5sp'}, {1: None, 2: 1, 3: 1, 5: 1, 6: 1}),
        ({'smoothing': 0.5, 'update_interval': '1ep'}, {3: None, 6: 1}),
        ({'smoothing': 0}, dict.fromkeys(range(1, 7))),
        ({'smoothing': 1}, {1: None, **dict.fromkeys(range(2, 7), 0)}),
    ],
    ids=lambda value: ' '.join(map(str, value.values())) if 'half_life' in value or 'smoothing' in value else '',
)  # fmt: skip
def test_the_average_is_the_closed_form_of_the_time_that_really_passed(trainer, arguments, updates):
    witness, ema = Witness(updates), EMA(**arguments)
    trainer([ema], callbacks=[witness]).fit()
    assert ema.ema_model.num_updates == len(updates)
    assert_close(all_tensors(ema.ema_model), witness.average, rtol=3e-6, atol=1e-7)


def test_iterations_are_a_unit_like_any_other(trainer):
    witness, ema = Witness({3: None, 6: 1 / 2}), EMA(half_life='2iter', update_interval='1iter')
    trainer([ema], callbacks=[witness], iteration='1ep').fit()
    assert_close(all_tensors(ema.ema_model), witness.average, rtol=3e-6, atol=1e-7)


def test_parts_of_an_iteration(trainer):
    witness, ema = Witness({1: None, **dict.fromkeys(range(2, 7), 1 / 6)}), EMA('1iter', update_interval='1ba')
    trainer([ema], callbacks=[witness], iteration='2ep').fit()
    assert_close(all_tensors(ema.ema_model), witness.average, rtol=3e-6, atol=1e-7)


def test_a_half_life_of_2ep_with_an_interval_of_10ba(trainer):
    witness, ema = Witness({1: None, 10: 9 / 24, 20: 10 / 24}), EMA(half_life='2ep', update_interval='10ba')
    trainer([ema], callbacks=[witness], train_dataloader=toy.make_data(samples=48)).fit()
    assert_close(all_tensors(ema.ema_model), witness.average, rtol=3e-6, atol=1e-7)


@pytest.mark.parametrize('batch_size', [1, 2, 3, 5, 10])
def test_a_half_life_in_samples_forgets_by_samples_under_any_batch_size(trainer, batch_size):
    ema = EMA(half_life='5sp')
    counts = [min(batch_size, 10 - start) for start in range(0, 10, batch_size)]
    elapsed = [None, *counts[1:], *counts] if len(counts) > 1 else [None, counts[0]]
    witness = Witness({batch: n if n is None else n / 5 for batch, n in enumerate(elapsed, start=1)})
    # Batches of one sample have no variance.
    data = toy.make_data(batch_size=batch_size)
    trainer([ema], callbacks=[witness], train_dataloader=data).fit()
    assert_close(all_tensors(ema.ema_model), witness.average, rtol=3e-6, atol=1e-7)


def test_a_half_life_of_zero_is_the_weights_after_every_batch(trainer):
    class Probe(Callback):
        def batch_end(self, state, logger):
            same.append(equal(all_tensors(state.model), all_tensors(ema.ema_model)))

    same, ema = [], EMA(half_life='0ba')
    trainer([ema], callbacks=[Probe()]).fit()
    assert same == [True] * 6


def test_copied_buffers_are_the_latest(trainer):
    ema = EMA(half_life='2ba', buffers='copy')
    run = trainer([ema])
    run.fit()
    live = dict(run.state.model.named_buffers())
    assert equal(dict(ema.ema_model.named_buffers()), live)


def test_options_reach_the_shadow(trainer):
    ema = EMA(half_life='2ba', include='weight|running', exclude=r'5\.', shadow_dtype='float64', shadow_device='cpu')
    trainer([ema]).fit()
    names = {'module.0.weight', 'module.1.weight', 'module.1.running_mean', 'module.1.running_var'}
    assert all_tensors(ema.ema_model).keys() == names
    assert {t.dtype for t in ema.ema_model.parameters()} == {torch.float64}


def test_smoothing_updates_and_distance_are_logged(trainer):
    logger, ema = InMemoryLogger(), EMA(half_life='2ba')
    run = trainer([ema], loggers=[logger])
    run.fit()
    smoothings = [(stamp.batch.value, value) for stamp, value in logger.data['ema/smoothing']]
    assert smoothings == [(1, 0.0), *((batch, pytest.approx(2**-0.5)) for batch in range(2, 7))]
    assert [value for _, value in logger.data['ema/num_updates']] == [1, 2, 3, 4, 5, 6]
    assert [stamp.batch.value for stamp, _ in logger.data['ema/relative_distance']] == [3, 6]

    live, average = copies(run.state.model), all_tensors(ema.ema_model)
    names = [name for name, _ in run.state.model.named_parameters()]
    distance = math.sqrt(sum((average[n] - live[n]).double().square().sum().item() for n in names))
    size = math.sqrt(sum(live[n].double().square().sum().item() for n in names))
    assert logger.data['ema/relative_distance'][-1][1] == pytest.approx(distance / size, rel=1e-5)


@pytest.mark.parametrize(
    ('log_interval', 'batches'),
    [('1ba', [1, 2, 3, 4, 5, 6]), ('4ba', [4]), ('8sp', [2, 5]), ('0.5dur', [3, 6]), ('2ep', [6])],
)
def test_the_distance_is_logged_at_its_interval(trainer, log_interval, batches):
    logger = InMemoryLogger()
    trainer([EMA(half_life='2ba', log_interval=log_interval)], loggers=[logger]).fit()
    assert [stamp.batch.value for stamp, _ in logger.data['ema/relative_distance']] == batches


def test_no_distance_is_logged_without_an_interval_or_before_the_start(trainer):
    for arguments, count in (({'log_interval': None}, 0), ({'ema_start': '5ba', 'log_interval': '1ba'}, 2)):
        logger = InMemoryLogger()
        trainer([EMA(half_life='1ba', **arguments)], loggers=[logger]).fit()
        assert len(logger.data.get('ema/relative_distance', [])) == count


def test_a_distance_of_a_run_that_diverged_is_logged_and_does_not_stop_it(trainer):
    logger, ema = InMemoryLogger(), EMA(half_life='2ba', log_interval='1ba')
    model = toy.make_model()
    with torch.no_grad():
        model.module[5].bias.fill_(math.nan)
    trainer([ema], model=model, loggers=[logger]).fit()
    assert all(math.isnan(value) for _, value in logger.data['ema/relative_distance'])
