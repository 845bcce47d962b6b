"""Settings that cannot take effect, damaged states, copies of the algorithm."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref

import pytest
import torch
import toy
from composer.algorithms import EMA as BuiltinEMA
from composer.core import Event
from composer.loggers import Logger
from plain import assert_same
from tensors import all_tensors, equal, state_by_hand
from torch import nn
from torch.utils.data import DataLoader, IterableDataset

from composer_ema import EMA, SWA, EMAOptimizer, ShadowModel
from composer_ema.settings import check_device_is_here
from composer_ema.spans import ArgumentError


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        (
            {'half_life': '1000ba'},
            r"half_life='1000ba' in a run of 6 batches: the average will still hold 100 %.* shorter half_life",
        ),
        ({}, 'in a run of 6 batches: the average will still hold'),
        ({'half_life': '9ep'}, 'in a run of 2 epochs: the average will still hold'),
        ({'half_life': '900sp'}, 'in a run of 20 samples: the average will still hold'),
        ({'half_life': '2ba', 'ema_start': '7ba'}, r"ema_start='7ba' is longer than .*no average will be kept"),
        ({'half_life': '2ba', 'update_interval': '7ba'}, r'7ba.* no update will be made after the first, which copies'),
        (
            {'half_life': '2ba', 'update_interval': '9ep'},
            r'9ep.* no update will be made after the first, which',
        ),
    ],
)
def test_what_is_longer_than_the_run_is_warned_of(trainer, arguments, message):
    run = trainer([EMA(**arguments)])
    with pytest.warns(UserWarning, match=message):
        run.fit()


@pytest.mark.parametrize(
    ('arguments', 'length'),
    [
        ({'max_duration': '1ep'}, '1 epoch'),
        ({'max_duration': '2ep'}, '2 epochs'),
        ({'max_duration': '1ba'}, '0.333333 epochs'),
        ({'max_duration': '1ba', 'train_dataloader': toy.make_data(4)}, '1 epoch'),
    ],
)
def test_one_epoch_is_not_one_epochs(trainer, arguments, length):
    run = trainer([EMA('9ep', update_interval='1ba')], **arguments)
    with pytest.warns(UserWarning, match=rf'in a run of {length}: the average'):
        run.fit()


@pytest.mark.parametrize(
    ('half_life', 'message'),
    [
        (
            '1ep',
            "half_life='1ep' .* once an epoch, at most 2 times in this run of 6 batches.*'1ba' or half_life='3ba' .*",
        ),
        ('1.5ep', "half_life='1.5ep' .*half_life='5ba' .*update_interval='1ep' to keep it so"),
        ('1iter', "half_life='1iter' .* once an iteration, .*update_interval='1iter' to keep it so"),
    ],
)
def test_updates_as_rare_as_epochs_that_nobody_asked_for_are_warned_of_once(trainer, half_life, message):
    ema = EMA(half_life)
    run = trainer([ema], iteration='1ep')
    with pytest.warns(UserWarning, match=message):
        run.fit()
    run.fit(duration='1ep')  # a warning would be an error
    assert ema.ema_model.num_updates == 3
    run = trainer([EMA('1ep')], max_duration='4ba')
    with pytest.warns(UserWarning, match='at most 1 time in this run of 4 batches'):
        run.fit()


def test_without_the_length_of_an_epoch_that_is_said_without_numbers(trainer):
    class Endless(IterableDataset):
        def __iter__(self):
            return iter(toy.make_data().dataloader.dataset)

    run = trainer([EMA('1ep')], train_dataloader=DataLoader(Endless(), batch_size=4), max_duration='6ba')
    with pytest.warns(UserWarning, match=r"once an epoch\. Pass update_interval='1ba' to average every batch, or "):
        run.fit()


@pytest.mark.parametrize(
    'arguments', [{'half_life': '1ep', 'update_interval': '1ep'}, {'half_life': '0.5dur'}, {'half_life': '5sp'}]
)
def test_updates_that_were_asked_for_or_come_every_batch_are_not_warned_of(trainer, arguments):
    trainer([EMA(**arguments)]).fit()
    trainer([EMA('1ep')], train_dataloader=toy.make_data(4)).fit()  # an epoch of one batch


@pytest.mark.parametrize('device', ['cuda', 'cuda:3'])
@pytest.mark.parametrize(
    'build',
    [
        lambda device: toy.make_trainer([EMA('2ba', shadow_device=device)]),
        lambda device: toy.make_trainer([SWA('1ba', shadow_device=device)]),
        lambda device: ShadowModel(nn.Linear(2, 2), device=device),
        lambda device: ShadowModel(nn.Linear(2, 2)).to(device),
        lambda device: EMAOptimizer(toy.make_optimizer(nn.Linear(2, 2)), device=device),
    ],
    ids=['EMA', 'SWA', 'ShadowModel', 'to', 'EMAOptimizer'],
)
def test_a_device_that_the_machine_lacks_is_named_when_the_average_is_made(monkeypatch, build, device):
    found = 'no cuda devices' if device == 'cuda' else '2 cuda devices'
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: 0 if device == 'cuda' else 2)
    with pytest.raises(ValueError, match=rf"must be one of this machine, got '{device}', and torch finds {found} here"):
        build(device)


def test_an_argument_may_name_a_device_of_another_machine_and_looking_for_it_starts_nothing(monkeypatch):
    monkeypatch.setattr(torch.cuda, '_lazy_init', lambda: pytest.fail('CUDA was initialised'))
    assert repr(EMA('2ba', shadow_device='cuda')) == "EMA(half_life='2ba', shadow_device='cuda')"
    check_device_is_here(torch.device('cpu'))
    with pytest.raises(ArgumentError, match=r"got 'cuda:99'.*Pass 'cpu', or leave the device out") as error:
        check_device_is_here(torch.device('cuda:99'))
    assert error.value.argument == 'shadow_device'


def test_iterations_in_a_run_without_any_are_refused_before_the_first_batch(trainer):
    run = trainer([EMA(half_life='2iter')])
    with pytest.raises(ValueError, match=r"half_life='2iter' counts iterations, but this run has none\. Pass epochs"):
        run.fit()
    assert run.state.timestamp.batch == 0


def test_tokens_that_are_not_counted_are_refused_with_the_remedy(trainer):
    data = toy.make_data()
    run = trainer([EMA(half_life='9tok')], train_dataloader=data.dataloader)
    with pytest.raises(ValueError, match=r"half_life='9tok' counts tokens.*reports none.*get_num_tokens_in_batch"):
        run.fit()


def test_two_of_them_in_one_trainer_are_refused(trainer):
    with pytest.raises(ValueError, match=r'2 algorithms called EMA in one Trainer.*keep the state of only one'):
        trainer([EMA('2ba'), EMA('3ba')])
    with pytest.raises(ValueError, match='2 algorithms called EMA'):
        trainer([EMA('2ba'), BuiltinEMA('3ba')])


def test_a_pattern_that_matches_nothing_is_refused_when_the_trainer_is_built(trainer):
    with pytest.raises(ValueError, match=r"exclude pattern 'nrom' matches none"):
        trainer([EMA('2ba', exclude='nrom')])


def test_a_model_that_is_all_frozen_is_warned_of(trainer):
    model = toy.make_model()
    model.requires_grad_(False)
    with pytest.warns(UserWarning, match='no trainable parameter to average yet'):
        trainer([EMA('2ba')], model=model)


def test_a_state_of_another_model_is_refused_by_name_and_changes_nothing(trainer, trained):
    state = trained[0].state_dict()
    other = toy.make_model()
    other.module[5] = nn.Linear(8, 4)
    ema = EMA(half_life='2ba')
    trainer([ema], model=other)
    before = {n: t.clone() for n, t in all_tensors(ema.ema_model).items()}
    with pytest.raises(ValueError, match=r'module\.5\.bias \(expected \(4,\), got \(3,\)\)'):
        ema.load_state_dict(state)
    assert equal(all_tensors(ema.ema_model), before)
    assert not ema.ema_started


@pytest.mark.parametrize(
    'damage',
    [
        lambda s: s.pop('started'),
        lambda s: s.update(started='yes'),
        lambda s: s.update(averages=None),
        lambda s: s.update(averages={'other': {}}),
        lambda s: s['averages'].update(ema=[]),
        lambda s: s['averages']['ema'].update(last_update=3),
        lambda s: s['averages']['ema'].update(last_update={'ba': 3}),
        lambda s: s['averages']['ema'].update(last_update=dict.fromkeys(('iter', 'ep', 'ba', 'sp', 'tok'), 'x')),
        lambda s: s['averages']['ema'].pop('parameters'),
        lambda s: s.update(version=99),
        lambda s: s.update(training_weights={}),
        lambda s: s.update(config=3),
    ],
)  # fmt: skip
def test_a_damaged_state_is_a_value_error_and_changes_nothing(trainer, trained, damage):
    state = copy.deepcopy(trained[0].state_dict())
    damage(state)
    ema = EMA(half_life='2ba')
    trainer([ema])
    before = {n: t.clone() for n, t in all_tensors(ema.ema_model).items()}
    with pytest.raises(ValueError):
        ema.load_state_dict(state)
    assert equal(all_tensors(ema.ema_model), before)
    assert not ema.ema_started
    assert not ema.ema_weights_active


def test_a_state_without_an_average_loads_and_starts_nothing(trainer):
    ema = EMA(half_life='2ba')
    trainer([ema])
    ema.load_state_dict(EMA(half_life='2ba').state_dict())
    assert not ema.ema_started


def test_a_state_loaded_before_the_trainer_is_built_waits_for_it(trainer, trained):
    average = trained[3]
    ema = EMA(half_life='2ba')
    ema.load_state_dict(copy.deepcopy(trained[0].state_dict()))
    trainer([ema])
    assert equal(all_tensors(ema.ema_model), average)


def test_going_on_with_another_horizon_is_warned_of(trainer, trained, tmp_path):
    """When training goes on; reading the average out of a checkpoint with a plain EMA() is nothing to warn of."""
    first = trainer([EMA(half_life='2ba')])
    first.fit(duration='1ep')
    path = first.save_checkpoint(str(tmp_path / 'first.pt'))
    run = trainer([EMA(half_life='3ba')], load_path=path)
    run.eval(toy.make_evaluator())
    with pytest.warns(UserWarning, match=r"half_life='2ba', this run continues with half_life='3ba'"):
        run.fit()


@pytest.mark.parametrize('duplicate', [copy.deepcopy, lambda ema: pickle.loads(pickle.dumps(ema))])
def test_a_copy_has_the_average_and_none_of_the_ties(trained, duplicate):
    ema, _, _, average = trained
    twin = duplicate(ema)
    assert repr(twin) == repr(ema)
    assert equal(all_tensors(twin.ema_model), average)
    assert equal(all_tensors(twin.get_ema_model(toy.make_model(seed=5))), average)


def test_the_algorithm_does_not_keep_the_model_alive():
    ema, model = EMA(half_life='2ba'), toy.make_model()
    state = state_by_hand(model)
    for event in (Event.INIT, Event.BATCH_END):
        ema.apply(event, state, Logger(state))
    reference = weakref.ref(model)
    del state, model
    gc.collect()
    assert reference() is None
    assert len(list(ema.ema_model.parameters())) == 6


def test_one_instance_can_serve_a_second_trainer(trainer):
    ema, fresh = EMA(half_life='2ba'), EMA(half_life='2ba')
    trainer([ema], model=toy.make_model(seed=1)).fit()
    trainer([ema], model=toy.make_model(seed=2)).fit()
    trainer([fresh], model=toy.make_model(seed=2)).fit()
    assert equal(all_tensors(ema.ema_model), all_tensors(fresh.ema_model))


@pytest.mark.parametrize(
    'build',
    [
        lambda: EMA(half_life='3ba'),
        lambda: EMA(smoothing=0.5, update_interval='2ba'),
        lambda: EMA(power=0.1),
        lambda: SWA(swa_start='1ba', update_interval='1ba'),
    ],
    ids=['half-life', 'smoothing', 'power', 'SWA'],
)
def test_loading_its_own_state_after_a_run_changes_nothing(trainer, build):
    algorithm = build()
    trainer([algorithm]).fit()
    before = copy.deepcopy(algorithm.state_dict())
    algorithm.load_state_dict(algorithm.state_dict())
    assert_same(before, algorithm.state_dict())
