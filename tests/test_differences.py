"""What the README says of Composer's own EMA, seen on the Composer that is installed."""

import copy

import composer.functional as cf
import numpy as np
import pytest
import torch
import toy
from composer.algorithms import EMA as BuiltinEMA
from composer.core import Event
from torch import nn

from composer_ema import compute_ema


def saved_state(folder):
    return torch.load(folder / 'latest-rank0.pt', weights_only=False)['state']


def test_an_epoch_long_half_life_with_a_checkpoint_every_batch_changes_training(trainer, tmp_path):
    plain = trainer([])
    plain.fit()
    ema = BuiltinEMA(half_life='2ep')
    averaged = trainer([ema], save_folder=str(tmp_path), save_interval='1ba', eval_interval=0)
    averaged.fit()
    assert ema.ema_weights_active  # what the model holds is the average, and the other slot should be the weights
    expected = dict(plain.state.model.named_parameters())
    assert any(not torch.equal(kept, expected[name]) for name, kept in ema.ema_model.named_parameters())


def test_the_model_in_a_checkpoint_is_the_average_unless_a_function_returns_a_numpy_boolean(trainer, tmp_path):
    def every_batch(state, event):
        return np.bool_(event is Event.BATCH_CHECKPOINT)

    for name, interval, holds_average in (('time', '1ba', True), ('numpy', every_batch, False)):
        trainer([BuiltinEMA(half_life='2ba')], save_folder=str(tmp_path / name), save_interval=interval).fit()
        assert dict(saved_state(tmp_path / name)['algorithms'])['EMA']['ema_weights_active'] is holds_average


def test_the_model_holds_the_average_after_fit_if_a_checkpoint_came_last(trainer, tmp_path):
    plain = trainer([])
    plain.fit()
    run = trainer([BuiltinEMA(half_life='2ba')], save_folder=str(tmp_path), save_interval='1ba', eval_interval=0)
    run.fit()
    assert toy.bits(run.state.model) != toy.bits(plain.state.model)


def test_in_bfloat16_one_half_life_covers_nothing_of_a_step():
    model = nn.Linear(4, 4, bias=False).bfloat16()
    nn.init.ones_(model.weight)
    ema_model = copy.deepcopy(model)
    nn.init.constant_(model.weight, 2.0)
    for _ in range(1000):
        cf.compute_ema(model, ema_model, smoothing=2 ** (-1 / 1000))
    assert (ema_model.weight == 1).all()


@pytest.mark.parametrize(
    'arguments', [{'half_life': '1000sp'}, {'half_life': '1.5ep'}, {'half_life': '2ep', 'update_interval': '10ba'}]
)
def test_half_lives_are_whole_batches_or_epochs_in_the_unit_of_the_interval(arguments):
    with pytest.raises((ValueError, TypeError)):
        BuiltinEMA(**arguments)


def test_smoothing_alone_is_an_error():
    with pytest.raises(ValueError, match='Only one of'):
        BuiltinEMA(smoothing=0.999)


def test_the_batch_counter_is_averaged():
    model, ema_model = toy.make_model(), toy.make_model()
    model.module[1].num_batches_tracked.fill_(9)
    cf.compute_ema(model, ema_model, smoothing=0.5)
    assert ema_model.module[1].num_batches_tracked == 4
    compute_ema(model, ema_model, smoothing=0.5)
    assert ema_model.module[1].num_batches_tracked == 9


def test_every_floating_buffer_is_averaged_masks_included():
    theirs, ours = (nn.Linear(2, 2) for _ in range(2))
    model = nn.Linear(2, 2)
    for module in (model, theirs, ours):
        module.register_buffer('pruned', torch.tensor([1.0, 1.0]))
        module.register_buffer('observed', torch.tensor(torch.inf))
    model.pruned[0], model.observed = 0, torch.tensor(2.0)
    cf.compute_ema(model, theirs, smoothing=0.5)
    assert theirs.pruned.tolist() == [0.5, 1]
    assert theirs.observed == torch.inf
    averaged = copy.deepcopy(ours)
    compute_ema(model, ours, smoothing=0.5)
    assert ours.pruned.tolist() == [0, 1]
    assert ours.observed == 2
    compute_ema(model, averaged, smoothing=0.5, buffers='average')
    assert averaged.pruned.tolist() == [0.5, 1]
    assert averaged.observed == 2


def test_get_ema_model_overwrites_the_training_weights(trainer):
    ema = BuiltinEMA(half_life='2ba')
    run = trainer([ema])
    run.fit()
    before = toy.bits(run.state.model)
    ema.get_ema_model(run.state.model)
    assert toy.bits(run.state.model) != before
    with pytest.raises(ValueError, match='training weights are currently'):
        ema.get_training_model(run.state.model)


def test_names_that_do_not_match_are_skipped():
    ema_model = nn.Linear(2, 2)
    before = toy.bits(ema_model)
    cf.compute_ema(nn.Sequential(nn.Linear(2, 2)), ema_model, smoothing=0.5)
    assert toy.bits(ema_model) == before


def test_match_replaces_the_average(trainer):
    ema = BuiltinEMA(half_life='2ba')
    run = trainer([ema])
    run.fit()
    before, ema.ema_started = ema.ema_model, False
    ema.match(Event.BATCH_END, run.state)
    assert ema.ema_model is not before
