"""Callbacks of recipes: momentum carried in the gradients is the optimizer's own momentum."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import toy
from composer.algorithms import SAM, GradientClipping
from composer.core import Precision
from sharded import mesh_of_one
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.optim import SGD

from composer_ema.recipe import registry
from composer_ema.trainer.ema import EMA
from composer_ema.zoo.callbacks import GradientMomentum

LEARNING_RATE = 0.2


def weights_of_run(trainer, momentum, *, with_callback, **arguments):
    """The bits of the weights after two epochs of the toy, the momentum by the callback or by the optimizer."""
    model = toy.make_model()
    optimizer = SGD(model.parameters(), lr=LEARNING_RATE, momentum=0.0 if with_callback else momentum)
    callbacks = [GradientMomentum(momentum)] if with_callback else []
    run = trainer(model=model, optimizers=optimizer, callbacks=callbacks, **arguments)
    run.fit()
    return toy.bits(run.state.model)


def test_two_steps_by_hand():
    """Gradients 1 and 3 with momentum 1/2: the steps see 1 and 0.5 * 1 + 3 = 3.5."""
    model = torch.nn.Linear(1, 1, bias=False)
    callback, seen = GradientMomentum(momentum=0.5), []
    for batch, gradient in enumerate((1.0, 3.0)):
        model.weight.grad = torch.full((1, 1), gradient)
        callback.after_train_batch(state_of(model, batch), None)  # pyright: ignore
        seen.append(model.weight.grad.item())
    assert seen == [1.0, 3.5]


def state_of(model, batch):
    class Timestamp:
        pass

    class State:
        timestamp = Timestamp()

    State.model, State.timestamp.batch = model, batch  # pyright: ignore
    return State


@pytest.mark.parametrize('momentum', [0.0, 0.5, 0.85])
def test_training_is_that_of_sgd_with_momentum_to_the_bit(trainer, momentum):
    by_callback = weights_of_run(trainer, momentum, with_callback=True)
    assert by_callback == weights_of_run(trainer, momentum, with_callback=False)


def test_momentum_changes_training(trainer):
    assert weights_of_run(trainer, 0.85, with_callback=True) != weights_of_run(trainer, 0.0, with_callback=True)


def test_what_is_carried_is_clipped_as_it_is_for_the_optimizer(trainer):
    def clipping():
        return [GradientClipping('norm', 0.1), EMA(half_life='3ba')]

    by_callback = weights_of_run(trainer, 0.85, with_callback=True, algorithms=clipping())
    assert by_callback == weights_of_run(trainer, 0.85, with_callback=False, algorithms=clipping())
    assert by_callback != weights_of_run(trainer, 0.85, with_callback=True)


def test_a_resumed_run_carries_on_to_the_bit(trainer, tmp_path):
    def run(**arguments):
        model = toy.make_model()
        optimizer = SGD(model.parameters(), lr=LEARNING_RATE)
        callbacks = [GradientMomentum(0.85)]
        made = trainer(model=model, optimizers=optimizer, callbacks=callbacks, **arguments)
        made.fit()
        return toy.bits(made.state.model)

    whole = run()
    run(max_duration='4ba', save_folder=str(tmp_path), save_interval='4ba', save_filename='four.pt')
    assert run(load_path=str(tmp_path / 'four.pt')) == whole


def test_a_frozen_parameter_is_left_alone(trainer):
    model = toy.make_model()
    model.module[0].requires_grad_(False)
    before = toy.bits(model.module[0])
    callback = GradientMomentum(0.85)
    run = trainer(model=model, optimizers=SGD(model.parameters(), lr=LEARNING_RATE), callbacks=[callback])
    run.fit()
    assert toy.bits(model.module[0]) == before
    assert not any(name.startswith('module.0') for name in callback.state_dict()['velocity'])


def test_gradients_that_come_twice_a_batch_are_refused(trainer):
    run = trainer([SAM(interval=1)], callbacks=[GradientMomentum(0.85)])
    with pytest.raises(RuntimeError, match='saw the gradients of batch 0 twice'):
        run.fit()


def test_a_gradient_scaler_is_refused():
    class State:
        precision = Precision.AMP_FP16

    with pytest.raises(ValueError, match=r'amp_fp16 skips\. Take amp_bf16'):
        GradientMomentum().fit_start(State, None)  # pyright: ignore


def test_a_model_that_processes_share_is_refused_before_training():
    with mesh_of_one():
        model = torch.nn.Linear(2, 2)
        fully_shard(model, mesh=init_device_mesh('cpu', (1,)))
        state = SimpleNamespace(model=model, precision=Precision.FP32)
        with pytest.raises(ValueError, match=r'cannot save what it carries.*Take the momentum of the optimizer'):
            GradientMomentum().fit_start(state, None)  # pyright: ignore


@pytest.mark.parametrize('momentum', [-0.1, 1.0])
def test_momentum_out_of_range_is_refused(momentum):
    with pytest.raises(ValueError, match=rf'momentum must lie in \[0, 1\), got {momentum}. Pass 0.85'):
        GradientMomentum(momentum)


def test_a_recipe_can_name_it():
    assert registry.callbacks().find('gradient_momentum') is GradientMomentum
    assert registry.callbacks().find('GradientMomentum') is GradientMomentum
