"""EMAOptimizer lends the model its average, and every bit of the training weights comes back."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from plain import STRICT, Net, averaged, batch, loss_of, same_bits, sgd, train, weights
from torch import Tensor

from composer_ema import EMAOptimizer

pytestmark = STRICT


def norm_of(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in state.items() if name.startswith('norm.')}


class TestSwapping:
    def test_inside_the_model_holds_the_average_and_afterwards_every_bit_of_the_weights(self):
        model = Net()
        optimizer = EMAOptimizer(sgd(model), decay=0.5, model=model)
        train(model, optimizer, range(3))
        before, average = weights(model), averaged(optimizer)
        with optimizer.swap_ema_weights():
            assert same_bits({name: weights(model)[name] for name in average}, average)
            model.norm.running_mean.add_(1)
            model.eval()(batch(0)[0])
        assert same_bits(weights(model), before)
        assert same_bits(averaged(optimizer), average)

    def test_training_goes_on_as_if_nothing_had_been_swapped(self):
        models = Net(), Net()
        optimizers = [EMAOptimizer(sgd(model), decay=0.5) for model in models]
        for index in range(4):
            for model, optimizer in zip(models, optimizers, strict=True):
                train(model, optimizer, range(index, index + 1))
            with optimizers[1].swap_ema_weights(), torch.no_grad():
                models[1].eval()(batch(0)[0])
            models[1].train()
        assert same_bits(weights(models[0]), weights(models[1]))
        assert same_bits(averaged(optimizers[0]), averaged(optimizers[1]))

    def test_not_enabled_it_swaps_nothing_and_may_be_nested(self):
        model = Net()
        optimizer = EMAOptimizer(sgd(model), decay=0.5)
        train(model, optimizer, range(2))
        before = weights(model)
        with optimizer.swap_ema_weights(enabled=False):
            assert same_bits(weights(model), before)
            with optimizer.swap_ema_weights(), optimizer.swap_ema_weights(enabled=False):
                assert not same_bits(weights(model), before)

    def test_an_exception_inside_restores_the_weights_and_is_the_callers(self):
        model = Net()
        optimizer = EMAOptimizer(sgd(model), decay=0.5)
        train(model, optimizer, range(2))
        before = weights(model)
        with pytest.raises(ZeroDivisionError), optimizer.swap_ema_weights():
            _ = 1 / 0
        assert same_bits(weights(model), before)
        train(model, optimizer, range(2, 3))

    def test_nesting_is_refused_and_changes_nothing(self):
        model = Net()
        optimizer = EMAOptimizer(sgd(model), decay=0.5)
        train(model, optimizer, range(2))
        before, average = weights(model), averaged(optimizer)
        with optimizer.swap_ema_weights():
            with pytest.raises(RuntimeError, match='Leave the outer swap_ema_weights'), optimizer.swap_ema_weights():
                pytest.fail('was nested')
            assert not same_bits(weights(model), before)
        assert same_bits(weights(model), before)
        assert same_bits(averaged(optimizer), average)

    @pytest.mark.parametrize(
        'act',
        [
            lambda optimizer: optimizer.step(),
            lambda optimizer: optimizer.load_state_dict({}),
            lambda optimizer: optimizer.load_ema_state_dict({}),
            copy.deepcopy,
            pickle.dumps,
        ],
        ids=['step', 'load', 'load_ema', 'deepcopy', 'pickle'],
    )
    def test_what_needs_the_training_weights_is_refused_while_swapped(self, act):
        model = Net()
        optimizer = EMAOptimizer(sgd(model), decay=0.5)
        train(model, optimizer, range(2))
        before, average = weights(model), averaged(optimizer)
        loss_of(model, 3).backward()
        with optimizer.swap_ema_weights():
            during = weights(model)
            with pytest.raises(RuntimeError, match='Leave the swap_ema_weights block first'):
                act(optimizer)
            assert same_bits(weights(model), during)
        assert same_bits({**weights(model), **norm_of(before)}, before)
        assert same_bits(averaged(optimizer), average)

    def test_before_the_first_step_the_average_is_the_weights(self):
        model = Net()
        optimizer = EMAOptimizer(sgd(model))
        model.load_state_dict(Net(seed=7).state_dict())
        with optimizer.swap_ema_weights():
            assert same_bits(weights(model), weights(Net(seed=7)))
