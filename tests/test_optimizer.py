"""EMAOptimizer: it does what the wrapped optimizer does, and averages after each real step. Needs no Composer."""

from __future__ import annotations

import copy
import faulthandler
import importlib.util
import inspect
import io
import math
import os
import pickle
import re
import time
import warnings
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import lr_scheduler, swa_utils
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from composer_ema import EMAOptimizer, ShadowModel

pytestmark = pytest.mark.filterwarnings(
    'error',
    'ignore::DeprecationWarning:torch',  # torch.compile of newer releases calls what torch itself deprecates
    'ignore:Implicitly cleaning up:ResourceWarning',  # a folder of a Composer Trainer that another test has left
    'ignore:The epoch parameter in',  # so does SequentialLR of older ones
)

LBFGS, SPARSE = 'LBFGS', 'SparseAdam'
#: By name, so that those of newer releases of torch are covered as well.
OPTIMIZERS = {
    name: kind
    for name, kind in vars(torch.optim).items()
    if inspect.isclass(kind) and issubclass(kind, torch.optim.Optimizer) and kind is not torch.optim.Optimizer
}
SCHEDULERS = {
    name: kind
    for name, kind in vars(lr_scheduler).items()
    if inspect.isclass(kind) and issubclass(kind, lr_scheduler.LRScheduler) and not name.startswith('_')
}


class Net(nn.Module):
    """Two layers around a BatchNorm; no biases, since Muon takes matrices only."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.first = nn.Linear(3, 4, bias=False)
        self.norm = nn.BatchNorm1d(4, affine=False)
        self.last = nn.Linear(4, 2, bias=False)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.last(self.norm(self.first(inputs)).relu())


class One(nn.Module):
    """One parameter; for sums done by hand."""

    def __init__(self, value: float = 0.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([value]))


def sgd(model: nn.Module, lr: float = 0.1) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)


def batch(index: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(index)
    return torch.randn(8, 3, generator=generator), torch.randint(2, (8,), generator=generator)


def loss_of(model: nn.Module, index: int) -> Tensor:
    inputs, labels = batch(index)
    return nn.functional.cross_entropy(model(inputs), labels)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for index in steps:
        optimizer.zero_grad()
        loss_of(model, index).backward()
        optimizer.step()


def step_to(optimizer: torch.optim.Optimizer, model: One, value: float) -> None:
    """A step of SGD with lr 1 after which the weight is ``value``."""
    model.weight.grad = model.weight.detach() - value
    optimizer.step()


def averaged(optimizer: EMAOptimizer) -> dict[str, Tensor]:
    shadow = optimizer.shadow
    return {
        name: t.detach().clone()
        for tensors in (shadow.named_parameters(), shadow.named_buffers())
        for name, t in tensors
    }


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def bits(tensor: Tensor) -> bytes:
    return tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes()


def same_bits(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(
        first[name].dtype == second[name].dtype and bits(first[name]) == bits(second[name]) for name in first
    )


def same_values(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    """As :func:`same_bits`, whatever the names."""
    return list(map(bits, first.values())) == list(map(bits, second.values()))


def saved(state: dict) -> dict:
    """Through a file and ``weights_only=True``."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


class Reference:
    """The average by its equation, in float64, beside a run."""

    def __init__(self, model: nn.Module) -> None:
        self.tensors = {name: tensor.double() for name, tensor in weights(model).items()}

    def update(self, model: nn.Module, weight: float) -> None:
        for name, tensor in weights(model).items():
            self.tensors[name] += weight * (tensor.double() - self.tensors[name])

    def check(self, got: dict[str, Tensor], names: list[str]) -> None:
        for name, tensor in zip(names, got.values(), strict=True):
            # float32: half a unit in the last place per update, and a hundred times as much for cancellation
            torch.testing.assert_close(tensor.double(), self.tensors[name], rtol=1e-5, atol=1e-6)


class TestAveraging:
    def test_three_steps_by_hand(self):
        model = One(8.0)
        optimizer = EMAOptimizer(torch.optim.SGD(model.parameters(), lr=1.0), decay=0.5)
        for value, expected in ((0, 4), (2, 3), (11, 7)):
            step_to(optimizer, model, value)
            assert averaged(optimizer)['0.0'].item() == expected
        assert (optimizer.num_steps, optimizer.shadow.num_updates) == (3, 3)

    def test_a_decay_of_zero_follows_the_weights_and_one_keeps_the_first(self):
        for options, expected in (({'decay': 0}, 2), ({'decay': 1}, 8), ({'half_life': 0}, 2)):
            model = One(8.0)
            optimizer = EMAOptimizer(torch.optim.SGD(model.parameters(), lr=1.0), **options)
            for value in (5, 2):
                step_to(optimizer, model, value)
            assert averaged(optimizer)['0.0'].item() == expected

    def test_after_a_half_life_the_start_has_half_its_share(self):
        model = One(1.0)
        optimizer = EMAOptimizer(torch.optim.SGD(model.parameters(), lr=1.0), half_life=4)
        for share in (2 ** (-1 / 4), 2 ** (-2 / 4), 2 ** (-3 / 4), 0.5):
            step_to(optimizer, model, 0)
            assert averaged(optimizer)['0.0'].item() == pytest.approx(share, rel=1e-6)

    @given(
        values=st.lists(st.floats(-8, 8, width=32), min_size=1, max_size=9),
        interval=st.integers(1, 4),
        decay=st.floats(0, 1),
        bias_correction=st.booleans(),
    )
    @settings(max_examples=60, deadline=None, derandomize=True)
    def test_every_run_follows_the_equation(self, values, interval, decay, bias_correction):
        bias_correction = bias_correction and decay < 0.999  # 1 has no bias to correct
        model = One(3.0)
        optimizer = EMAOptimizer(
            torch.optim.SGD(model.parameters(), lr=1.0), None, decay, interval, bias_correction=bias_correction
        )
        expected, product = 3.0, 1.0
        for count, value in enumerate(values, start=1):
            step_to(optimizer, model, value)
            if count % interval == 0:
                weight, product = 1 - decay**interval, product * decay**interval
                if bias_correction:
                    weight /= 1 - product
                expected += weight * (model.weight.item() - expected)
        assert averaged(optimizer)['0.0'].item() == pytest.approx(expected, rel=1e-5, abs=1e-5)

    def test_bias_correction_makes_the_first_update_a_copy_and_weighs_the_rest_without_the_start(self):
        model = One(1e6)
        optimizer = EMAOptimizer(torch.optim.SGD(model.parameters(), lr=1.0), decay=0.75, bias_correction=True)
        step_to(optimizer, model, 7.0)
        assert averaged(optimizer)['0.0'].item() == model.weight.item()
        for value in (3.0, 4.0):
            step_to(optimizer, model, value)
        corrected = (0.25 * 0.75**2 * 7 + 0.25 * 0.75 * 3 + 0.25 * 4) / (1 - 0.75**3)
        assert averaged(optimizer)['0.0'].item() == pytest.approx(corrected, rel=1e-6)

    def test_fewer_updates_weigh_the_last_weights_as_many_steps(self):
        model = One(1.0)
        optimizer = EMAOptimizer(torch.optim.SGD(model.parameters(), lr=1.0), decay=0.9, every_n_steps=3)
        for index in range(8):
            step_to(optimizer, model, 0)
            assert averaged(optimizer)['0.0'].item() == pytest.approx(0.9 ** (3 * ((index + 1) // 3)), rel=1e-6)

    def test_an_update_after_fewer_steps_has_a_smaller_weight(self):
        model, other = One(1.0), One(1.0)
        optimizer = EMAOptimizer(torch.optim.SGD(model.parameters(), lr=1.0), decay=0.9, every_n_steps=5)
        for _ in range(7):
            step_to(optimizer, model, 0)
        every_four = EMAOptimizer(torch.optim.SGD(other.parameters(), lr=1.0), decay=0.9, every_n_steps=4)
        with pytest.warns(UserWarning, match='the saved average used'):
            every_four.load_state_dict(optimizer.state_dict())
        step_to(every_four, other, 0)  # step 8, the last update was at 5
        assert averaged(every_four)['0.0'].item() == pytest.approx(0.9**8, rel=1e-6)

    def test_the_average_starts_from_weights_that_were_loaded_after_it_was_built(self):
        model = Net()
        optimizer = EMAOptimizer(sgd(model), decay=1)
        model.load_state_dict(Net(seed=5).state_dict())
        assert same_values(averaged(optimizer), dict(Net(seed=5).named_parameters()))
        model.load_state_dict(Net(seed=6).state_dict())
        train(model, optimizer, range(2))
        expected = {str(i): p.detach() for i, p in enumerate(Net(seed=6).parameters())}
        assert same_values(averaged(optimizer), expected)

    def test_with_a_model_the_average_has_names_and_buffers(self):
        model = Net()
        optimizer = EMAOptimizer(sgd(model), decay=0.5, model=model)
        assert list(averaged(optimizer)) == [
            'first.weight', 'last.weight', 'norm.running_mean', 'norm.running_var', 'norm.num_batches_tracked'
        ]  # fmt: skip
        train(model, optimizer, range(1))
        after_one = weights(model)['norm.running_mean']  # forward comes before the step from which averaging starts
        train(model, optimizer, range(1, 2))
        expected = (after_one + model.norm.running_mean) / 2
        torch.testing.assert_close(averaged(optimizer)['norm.running_mean'], expected)
        assert averaged(optimizer)['norm.num_batches_tracked'] == 2

    def test_without_a_model_the_average_has_groups_and_positions(self):
        model = Net()
        optimizer = EMAOptimizer(torch.optim.SGD([{'params': [p]} for p in model.parameters()], lr=0.1))
        assert list(averaged(optimizer)) == ['0.0', '1.0']
        assert list(averaged(EMAOptimizer(sgd(model)))) == ['0.0', '0.1']

    def test_leaf_tensors_that_are_no_parameters_are_averaged(self):
        weight = torch.ones(2, requires_grad=True)
        optimizer = EMAOptimizer(torch.optim.SGD([weight], lr=1.0), decay=0.5)
        weight.grad = torch.ones(2)
        optimizer.step()
        assert averaged(optimizer)['0.0'].tolist() == [0.5, 0.5]

    def test_the_options_of_a_shadow_are_passed_on(self):
        model = Net().bfloat16()
        optimizer = EMAOptimizer(
            sgd(model), 'meta', model=model, include='weight', exclude='last', dtype='float64', backend='foreach'
        )
        shadow = dict(optimizer._average.shadow.named_parameters())
        assert {name: (t.dtype, t.device.type) for name, t in shadow.items()} == {
            'first.weight': (torch.float64, 'meta')
        }

    def test_bfloat16_weights_are_averaged_in_float32(self):
        model = Net().bfloat16()
        assert {t.dtype for t in averaged(EMAOptimizer(sgd(model))).values()} == {torch.float32}


def sparse_net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Embedding(5, 3, sparse=True)


def run_with(name: str, wrap: bool, options: dict | None = None) -> tuple[nn.Module, torch.optim.Optimizer, Reference]:
    """Six steps of an optimizer by its name; the reference averages with decay 0.9 when there is a wrapper."""
    model = sparse_net() if name == SPARSE else Net()
    inner = OPTIMIZERS[name](model.parameters(), **{'lr': 0.05, **(options or {})})
    optimizer = EMAOptimizer(inner, decay=0.9) if wrap else inner
    reference = Reference(model)
    for index in range(6):

        def closure(index: int = index) -> Tensor:
            optimizer.zero_grad()
            loss = model(torch.tensor([index % 5, 1])).square().sum() if name == SPARSE else loss_of(model, index)
            loss.backward()
            return loss

        if name == LBFGS or index % 2:
            optimizer.step(closure)
        else:
            closure()
            optimizer.step()
        reference.update(model, 1 - 0.9)
    return model, optimizer, reference


def variants() -> list:
    found = []
    for name, kind in OPTIMIZERS.items():
        arguments = inspect.signature(kind.__init__).parameters
        found.append(pytest.param(name, {}, id=name))
        for option in ('foreach', 'fused', 'capturable', 'amsgrad', 'maximize', 'nesterov', 'differentiable'):
            if option not in arguments or option == 'differentiable':
                continue
            options = {option: True, **({'momentum': 0.9} if option == 'nesterov' and name == 'SGD' else {})}
            found.append(pytest.param(name, options, id=f'{name}-{option}'))
    return found


class TestEveryOptimizer:
    @pytest.mark.parametrize(('name', 'options'), variants())
    def test_it_steps_as_if_alone_and_its_weights_are_averaged(self, name, options):
        try:
            bare, _, _ = run_with(name, wrap=False, options=options)
        except Exception as refusal:
            pytest.skip(f'torch {torch.__version__} refuses this on a CPU: {refusal}')
        model, optimizer, reference = run_with(name, wrap=True, options=options)
        assert same_bits(weights(model), weights(bare))
        reference.check(averaged(optimizer), [key for key, _ in model.named_parameters()])
        assert not same_values(averaged(optimizer), dict(model.named_parameters()))

    @pytest.mark.parametrize('name', OPTIMIZERS)
    def test_it_resumes_bit_for_bit_in_the_middle(self, name):
        model, optimizer, _ = run_with(name, wrap=True)
        resumed_model = sparse_net() if name == SPARSE else Net(seed=3)
        resumed = EMAOptimizer(OPTIMIZERS[name](resumed_model.parameters(), lr=0.05), decay=0.9)
        resumed.load_state_dict(saved(copy.deepcopy(optimizer.state_dict())))
        resumed_model.load_state_dict(model.state_dict())
        for one, opt in ((model, optimizer), (resumed_model, resumed)):

            def closure(one=one, opt=opt) -> Tensor:
                opt.zero_grad()
                loss = one(torch.tensor([2, 1])).square().sum() if name == SPARSE else loss_of(one, 9)
                loss.backward()
                return loss

            opt.step(closure)
        assert same_bits(weights(resumed_model), weights(model))
        assert same_bits(averaged(resumed), averaged(optimizer))
        assert resumed.num_steps == optimizer.num_steps == 7

    def test_fused_is_among_the_variants_that_run_on_a_cpu(self):
        run_with('Adam', wrap=True, options={'fused': True})

    def test_per_group_options_are_the_wrapped_optimizers(self):
        def build(model: Net) -> torch.optim.Optimizer:
            groups = [{'params': model.first.parameters(), 'lr': 0.5}, {'params': model.last.parameters()}]
            return torch.optim.AdamW(groups, lr=0.01, weight_decay=0.3)

        bare, model = Net(), Net()
        train(bare, build(bare), range(4))
        optimizer = EMAOptimizer(build(model))
        optimizer.param_groups[1]['weight_decay'] = 0.3
        train(model, optimizer, range(4))
        assert same_bits(weights(model), weights(bare))
        assert [group['lr'] for group in optimizer.param_groups] == [0.5, 0.01]

    def test_gradients_are_accumulated_over_backward_passes_and_averaged_once(self):
        models = Net(), Net()
        optimizers = sgd(models[0]), EMAOptimizer(sgd(models[1]), decay=0.5)
        for model, optimizer in zip(models, optimizers, strict=True):
            for step in range(2):
                for part in range(3):
                    (loss_of(model, 10 * step + part) / 3).backward()
                optimizer.step()
                optimizer.zero_grad()
        assert same_bits(weights(models[0]), weights(models[1]))
        assert optimizers[1].num_steps == optimizers[1].shadow.num_updates == 2

    def test_zero_grad_sets_to_none_or_to_zero(self):
        model = Net()
        optimizer = EMAOptimizer(sgd(model))
        loss_of(model, 0).backward()
        optimizer.zero_grad(set_to_none=False)
        assert all(not p.grad.any() for p in model.parameters())
        optimizer.zero_grad()
        assert all(p.grad is None for p in model.parameters())

    def test_a_compiled_model_is_averaged_and_swapped_without_compiling_again(self):
        model = Net()
        passes = []

        def backend(graph, _):
            passes.append(graph)
            return graph

        compiled = torch.compile(model, backend=backend)
        optimizer = EMAOptimizer(sgd(model), decay=0.5, model=compiled)
        train(compiled, optimizer, range(3))
        count = len(passes)
        with optimizer.swap_ema_weights():
            during = compiled(batch(3)[0])
        loss_of(compiled, 3)
        assert len(passes) == count
        assert not torch.equal(during, compiled(batch(3)[0]))
        bare = Net()
        train(bare, sgd(bare), range(3))
        model.norm.load_state_dict(bare.norm.state_dict())  # evaluated in training mode above
        assert same_bits(weights(model), weights(bare))


class TestSharing:
    def test_it_is_an_optimizer_and_shares_groups_state_and_defaults(self):
        inner = sgd(Net())
        optimizer = EMAOptimizer(inner)
        assert isinstance(optimizer, torch.optim.Optimizer)
        assert optimizer.optimizer is inner
        for name in ('param_groups', 'state', 'defaults'):
            assert getattr(optimizer, name) is getattr(inner, name)
            setattr(optimizer, name, copy.copy(getattr(inner, name)))
            assert getattr(optimizer, name) is getattr(inner, name)

    def test_it_still_shares_them_after_loading(self):
        model = Net()
        optimizer = EMAOptimizer(sgd(model))
        train(model, optimizer, range(2))
        optimizer.load_state_dict(optimizer.state_dict())
        assert optimizer.param_groups is optimizer.optimizer.param_groups
        assert optimizer.state is optimizer.optimizer.state

    def test_an_unknown_attribute_is_an_error(self):
        with pytest.raises(AttributeError):
            _ = EMAOptimizer(sgd(Net())).no_such_thing

    def test_its_description_names_the_settings_and_the_wrapped_optimizer(self):
        text = repr(EMAOptimizer(sgd(Net()), half_life=20))
        assert 'half_life=20' in text
        assert 'decay=' not in text.split('SGD')[0]
        assert 'SGD' in text

    @pytest.mark.parametrize('with_model', [False, True])
    def test_a_group_added_in_the_middle_joins_at_its_value(self, with_model):
        model = Net()
        inner = torch.optim.SGD(model.first.parameters(), lr=0.1, momentum=0.9)
        optimizer = EMAOptimizer(inner, decay=0.5, every_n_steps=2, model=model if with_model else None)
        train(model, optimizer, range(3))
        optimizer.add_param_group({'params': (p for p in model.last.parameters()), 'lr': 0.3})
        assert len(inner.param_groups) == 2
        if not with_model:
            assert list(averaged(optimizer)) == ['0.0']
            train(model, optimizer, range(3, 4))
            assert torch.equal(averaged(optimizer)['1.0'], model.last.weight)
            train(model, optimizer, range(4, 6))
            assert not torch.equal(averaged(optimizer)['1.0'], model.last.weight)
        else:
            train(model, optimizer, range(3, 6))
        resumed_model = Net(seed=4)
        resumed = EMAOptimizer(
            torch.optim.SGD(resumed_model.first.parameters(), lr=0.1, momentum=0.9),
            decay=0.5,
            every_n_steps=2,
            model=resumed_model if with_model else None,
        )
        resumed.add_param_group({'params': resumed_model.last.parameters(), 'lr': 0.3})
        resumed.load_state_dict(saved(optimizer.state_dict()))
        assert same_bits(averaged(resumed), averaged(optimizer))

    def test_a_group_added_to_the_wrapped_optimizer_joins_too(self):
        model = Net()
        inner = torch.optim.SGD(model.first.parameters(), lr=0.1)
        optimizer = EMAOptimizer(inner)
        inner.add_param_group({'params': model.last.parameters()})
        train(model, optimizer, range(1))
        assert list(averaged(optimizer)) == ['0.0', '1.0']

    def test_a_parameter_that_takes_anothers_place_is_followed(self):
        model = One(1.0)
        optimizer = EMAOptimizer(torch.optim.SGD(model.parameters(), lr=1.0), decay=0.5)
        step_to(optimizer, model, 3.0)
        model.weight = nn.Parameter(torch.tensor([8.0]))
        optimizer.param_groups[0]['params'][0] = model.weight
        step_to(optimizer, model, 6.0)
        assert averaged(optimizer)['0.0'].item() == 4.0  # between 2 and 6

    def test_a_group_of_another_model_is_refused_and_not_added(self):
        model = Net()
        optimizer = EMAOptimizer(torch.optim.SGD(model.first.parameters(), lr=0.1), model=model)
        with pytest.raises(ValueError, match=r'not in the model.*1\.0'):
            optimizer.add_param_group({'params': Net().last.parameters()})
        assert len(optimizer.param_groups) == 1

    def test_named_parameters_are_taken(self):
        model = Net()
        try:
            inner = torch.optim.SGD(model.named_parameters(), lr=0.1)
        except TypeError:
            pytest.skip('this torch takes no names')
        optimizer = EMAOptimizer(inner, model=model)
        train(model, optimizer, range(1))
        assert optimizer.state_dict()['param_groups'][0]['param_names'] == ['first.weight', 'last.weight']


#: What each scheduler needs besides the optimizer.
SCHEDULER_ARGUMENTS = {
    'LambdaLR': lambda _: {'lr_lambda': lambda step: 0.9**step},
    'MultiplicativeLR': lambda _: {'lr_lambda': lambda step: 0.9},
    'StepLR': lambda _: {'step_size': 2},
    'MultiStepLR': lambda _: {'milestones': [1, 3]},
    'ExponentialLR': lambda _: {'gamma': 0.9},
    'CosineAnnealingLR': lambda _: {'T_max': 5},
    'CosineAnnealingWarmRestarts': lambda _: {'T_0': 2},
    'CyclicLR': lambda _: {'base_lr': 0.01, 'max_lr': 0.1},
    'OneCycleLR': lambda _: {'max_lr': 0.1, 'total_steps': 9},
    'ReduceLROnPlateau': lambda _: {'patience': 0},
    'SequentialLR': lambda opt: {
        'schedulers': [lr_scheduler.ConstantLR(opt), lr_scheduler.ExponentialLR(opt, 0.9)],
        'milestones': [2],
    },
}


def scheduled(name: str, wrap: bool) -> tuple[list[float], Net, torch.optim.Optimizer]:
    model = Net()
    optimizer = EMAOptimizer(sgd(model), decay=0.5) if wrap else sgd(model)
    if name == 'ChainedScheduler':
        scheduler = lr_scheduler.ChainedScheduler([lr_scheduler.ExponentialLR(optimizer, 0.9)])
    elif name == 'SWALR':
        scheduler = torch.optim.swa_utils.SWALR(optimizer, swa_lr=0.01, anneal_epochs=3)
    else:
        arguments = SCHEDULER_ARGUMENTS.get(name, lambda _: {})(optimizer)
        scheduler = SCHEDULERS[name](optimizer, **arguments)
    rates = []
    for index in range(5):
        train(model, optimizer, range(index, index + 1))
        scheduler.step(*([1.0] if name == 'ReduceLROnPlateau' else []))
        rates.append(optimizer.param_groups[0]['lr'])
    return rates, model, optimizer


class TestEveryScheduler:
    @pytest.mark.parametrize('name', [*(name for name in SCHEDULERS if name != 'LRScheduler'), 'SWALR'])
    def test_built_on_the_wrapper_it_gives_the_same_run(self, name):
        rates, bare, _ = scheduled(name, wrap=False)
        wrapped_rates, model, optimizer = scheduled(name, wrap=True)
        assert wrapped_rates == rates
        assert same_bits(weights(model), weights(bare))
        assert optimizer.num_steps == 5


def scaled_steps(fused: bool, wrap: bool, scale: float = 1024.0) -> tuple[list, Net, torch.optim.Optimizer]:
    """Five steps under a GradScaler and autocast, of which the second and the last meet an infinite gradient."""
    model = Net()
    inner = torch.optim.Adam(model.parameters(), lr=0.05, fused=fused)
    optimizer = EMAOptimizer(inner, decay=0.5, model=model) if wrap else inner
    scaler = torch.amp.GradScaler('cpu', init_scale=scale)
    seen = []
    for index in range(5):
        optimizer.zero_grad()
        with torch.autocast('cpu', dtype=torch.bfloat16):
            loss = loss_of(model, index)
        scaler.scale(loss).backward()
        if index == 3:
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        if index in (1, 4):
            model.first.weight.grad[0, 0] = math.inf
        before = averaged(optimizer) if wrap else {}
        scaler.step(optimizer)
        scaler.update()
        seen.append((scaler.get_scale(), wrap and same_bits(before, averaged(optimizer))))
    return seen, model, optimizer


class TestGradScaler:
    @pytest.mark.parametrize('fused', [False, True])
    @pytest.mark.parametrize('scale', [1024.0, 1000.0])
    def test_a_skipped_step_is_not_averaged_and_training_is_as_without(self, fused, scale):
        expected, bare, _ = scaled_steps(fused, wrap=False, scale=scale)
        seen, model, optimizer = scaled_steps(fused, wrap=True, scale=scale)
        assert [scale for scale, _ in seen] == [scale for scale, _ in expected]
        assert same_bits(weights(model), weights(bare))
        assert [kept for _, kept in seen] == [False, True, False, False, True]
        assert optimizer.num_steps == optimizer.shadow.num_updates == 3
        for name in ('grad_scale', 'found_inf'):
            assert not hasattr(optimizer, name)

    def test_a_disabled_scaler_changes_nothing(self):
        bare, model = Net(), Net()
        train(bare, sgd(bare), range(2))
        optimizer = EMAOptimizer(sgd(model))
        scaler = torch.amp.GradScaler('cpu', enabled=False)
        for index in range(2):
            optimizer.zero_grad()
            scaler.scale(loss_of(model, index)).backward()
            scaler.step(optimizer)
            scaler.update()
        assert same_bits(weights(model), weights(bare))
        assert optimizer.num_steps == 2


class TestPhantomStep:
    @pytest.mark.parametrize('kind', ['SGD', 'Adam', 'AdamW'])
    @pytest.mark.parametrize('tensor_lr', [False, True])
    def test_the_step_that_builds_empty_state_is_not_averaged(self, kind, tensor_lr):
        from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

        model = Net()
        optimizer = EMAOptimizer(
            OPTIMIZERS[kind](model.parameters(), lr=torch.tensor(0.1) if tensor_lr else 0.1), decay=0.5
        )
        before = weights(model)
        state = get_optimizer_state_dict(model, optimizer)
        assert optimizer.num_steps == optimizer._average.shadow.num_updates == 0
        assert same_bits(weights(model), before)
        with pytest.warns(UserWarning, match='load_ema_state_dict'):
            set_optimizer_state_dict(model, optimizer, state)
        train(model, optimizer, range(1))
        assert optimizer.num_steps == 1

    def test_with_such_a_checkpoint_the_average_is_saved_beside_and_resumes_exactly(self):
        from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

        model, resumed_model = Net(), Net(seed=2)
        optimizer = EMAOptimizer(torch.optim.Adam(model.parameters(), lr=0.1), decay=0.5, model=model)
        train(model, optimizer, range(3))
        state = {
            'model': model.state_dict(),
            'optimizer': get_optimizer_state_dict(model, optimizer),
            'ema': optimizer.ema_state_dict(),
        }
        state = saved(copy.deepcopy(state))
        resumed_model.load_state_dict(state['model'])
        resumed = EMAOptimizer(torch.optim.Adam(resumed_model.parameters(), lr=0.1), decay=0.5, model=resumed_model)
        with pytest.warns(UserWarning, match='load_ema_state_dict'):
            set_optimizer_state_dict(resumed_model, resumed, state['optimizer'])
        resumed.load_ema_state_dict(state['ema'])
        for one, opt in ((model, optimizer), (resumed_model, resumed)):
            train(one, opt, range(3, 5))
        assert same_bits(weights(resumed_model), weights(model))
        assert same_bits(averaged(resumed), averaged(optimizer))

    def test_a_first_step_of_a_warm_up_from_zero_is_averaged(self):
        model = Net()
        optimizer = EMAOptimizer(torch.optim.Adam(model.parameters(), lr=0.0))
        train(model, optimizer, range(1))
        assert optimizer.num_steps == 1

    @pytest.mark.parametrize('closure', [None, lambda: 0.0])
    def test_steps_at_rate_zero_without_gradients_count_once_there_is_state_or_a_closure(self, closure):
        model = Net()
        optimizer = EMAOptimizer(torch.optim.Adam(model.parameters(), lr=0.0))
        if closure is None:
            train(model, optimizer, range(1))
        before = optimizer.num_steps
        optimizer.zero_grad(set_to_none=False)
        optimizer.step(closure)
        assert optimizer.num_steps == before + 1


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
            lambda optimizer: optimizer.state_dict(),
            lambda optimizer: optimizer.ema_state_dict(),
            lambda optimizer: optimizer.load_state_dict({}),
            lambda optimizer: optimizer.load_ema_state_dict({}),
            copy.deepcopy,
            pickle.dumps,
        ],
        ids=['step', 'state_dict', 'ema_state_dict', 'load', 'load_ema', 'deepcopy', 'pickle'],
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


def norm_of(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in state.items() if name.startswith('norm.')}


class TestHooks:
    def test_hooks_run_once_around_the_step_and_before_the_update(self):
        model = One(1.0)
        inner = torch.optim.SGD(model.parameters(), lr=1.0)
        optimizer = EMAOptimizer(inner, decay=0.0)
        calls = []

        def note(name):
            return lambda opt, args, kwargs: calls.append((name, opt, len(args), model.weight.item()))

        handles = [
            optimizer.register_step_pre_hook(note('pre')),
            optimizer.register_step_post_hook(note('post')),
            inner.register_step_pre_hook(note('inner pre')),
            inner.register_step_post_hook(note('inner post')),
            register_optimizer_step_pre_hook(note('all pre')),
            register_optimizer_step_post_hook(note('all post')),
        ]
        try:
            step_to(optimizer, model, 5.0)
            assert calls == [
                ('pre', optimizer, 1, 1.0),
                ('all pre', inner, 1, 1.0),
                ('inner pre', inner, 1, 1.0),
                ('inner post', inner, 1, 5.0),
                ('all post', inner, 1, 5.0),
                ('post', optimizer, 1, 5.0),
            ]
        finally:
            for handle in handles:
                handle.remove()
        calls.clear()
        step_to(optimizer, model, 2.0)
        assert not calls

    def test_what_a_post_hook_does_to_the_weights_is_averaged(self):
        model = One(1.0)
        optimizer = EMAOptimizer(torch.optim.SGD(model.parameters(), lr=1.0), decay=0.5)
        optimizer.register_step_post_hook(lambda *_: model.weight.data.clamp_(max=3.0))
        step_to(optimizer, model, 99.0)
        assert averaged(optimizer)['0.0'].item() == 2.0

    def test_a_pre_hook_may_replace_the_closure(self):
        model = One(1.0)
        optimizer = EMAOptimizer(torch.optim.SGD(model.parameters(), lr=1.0))
        optimizer.register_step_pre_hook(lambda opt, args, kwargs: ((opt,), {'closure': lambda: 7}))
        model.weight.grad = torch.zeros(1)
        assert optimizer.step(lambda: 3) == 7

    def test_hooks_of_the_state_run_once_and_may_replace_it(self):
        model = Net()
        optimizer = EMAOptimizer(sgd(model))
        calls = []
        optimizer.register_state_dict_pre_hook(lambda opt: calls.append('save'))
        optimizer.register_state_dict_post_hook(lambda opt, state: {**state, 'note': 1})
        optimizer.register_load_state_dict_pre_hook(
            lambda opt, state: calls.append(state['note']) or {k: v for k, v in state.items() if k != 'note'}
        )
        optimizer.register_load_state_dict_post_hook(lambda opt: calls.append('loaded'))
        state = optimizer.state_dict()
        assert state['note'] == 1
        optimizer.load_state_dict(state)
        assert calls == ['save', 1, 'loaded']


class TestSaving:
    @pytest.mark.parametrize('with_model', [False, True])
    @pytest.mark.parametrize(
        'options',
        [
            {'decay': 0.9},
            {'decay': 0.9, 'every_n_steps': 3},
            {'half_life': 3.0, 'bias_correction': True, 'every_n_steps': 2},
            {'decay': 0.9, 'dtype': 'bfloat16', 'rounding': 'stochastic', 'seed': 5},
        ],
        ids=['decay', 'interval', 'half-life', 'stochastic'],
    )
    @pytest.mark.parametrize('stop', [0, 1, 4, 5])
    def test_a_resumed_run_equals_an_uninterrupted_one(self, with_model, options, stop):
        def build(seed: int) -> tuple[Net, EMAOptimizer]:
            model = Net(seed)
            inner = torch.optim.Adam(model.parameters(), lr=0.05)
            return model, EMAOptimizer(inner, model=model if with_model else None, **options)

        model, optimizer = build(0)
        train(model, optimizer, range(stop))
        state = saved({'model': model.state_dict(), 'optimizer': optimizer.state_dict()})
        train(model, optimizer, range(stop, 9))
        resumed_model, resumed = build(1)
        resumed.load_state_dict(state['optimizer'])
        resumed_model.load_state_dict(state['model'])
        train(resumed_model, resumed, range(stop, 9))
        assert same_bits(weights(resumed_model), weights(model))
        assert same_bits(averaged(resumed), averaged(optimizer))
        assert resumed.num_steps == 9
        assert resumed.shadow.num_updates == optimizer.shadow.num_updates

    def test_a_bare_optimizer_loads_the_state_and_continues_the_same_training(self):
        model, bare = Net(), Net()
        optimizer = EMAOptimizer(sgd(model))
        train(model, optimizer, range(3))
        inner = sgd(bare)
        inner.load_state_dict(saved(copy.deepcopy(optimizer.state_dict())))
        bare.load_state_dict(model.state_dict())
        train(model, optimizer, range(3, 6))
        train(bare, inner, range(3, 6))
        assert same_bits(weights(bare), weights(model))

    def test_the_state_of_a_bare_optimizer_starts_a_new_average_with_a_warning(self):
        bare, model = Net(), Net(seed=1)
        inner = sgd(bare)
        train(bare, inner, range(3))
        optimizer = EMAOptimizer(sgd(model), decay=0.5)
        train(model, optimizer, range(2))
        with pytest.warns(UserWarning, match='A new average starts'):
            optimizer.load_state_dict(saved(inner.state_dict()))
        model.load_state_dict(bare.state_dict())
        before = weights(model)['first.weight']
        train(bare, inner, range(3, 4))
        train(model, optimizer, range(3, 4))
        assert same_bits(weights(bare), weights(model))
        assert optimizer.num_steps == 1
        assert torch.equal(averaged(optimizer)['0.0'], (before + model.first.weight) / 2)

    def test_the_state_is_that_of_the_wrapped_optimizer_and_one_more_entry(self):
        model = Net()
        optimizer = EMAOptimizer(sgd(model))
        train(model, optimizer, range(2))
        state = optimizer.state_dict()
        assert list(state) == [*optimizer.optimizer.state_dict(), 'ema']
        assert state['param_groups'] == optimizer.optimizer.state_dict()['param_groups']

    def test_other_settings_are_kept_with_a_warning(self):
        model = Net()
        optimizer = EMAOptimizer(sgd(model), decay=0.9)
        train(model, optimizer, range(2))
        other = EMAOptimizer(sgd(model), decay=0.5)
        with pytest.warns(UserWarning, match=r"'decay': 0\.9.*'decay': 0\.5"):
            other.load_state_dict(optimizer.state_dict())
        with warnings.catch_warnings():
            warnings.simplefilter('error')
            EMAOptimizer(sgd(model), decay=0.9).load_state_dict(optimizer.state_dict())

    @pytest.mark.parametrize(
        ('change', 'message'),
        [
            (lambda s: s['ema'].update(version=2), 'format version 2'),
            (lambda s: s['ema'].update(num_steps='3'), "'num_steps' is a str"),
            (lambda s: s['ema'].update(log_kept=0.5), 'at most at zero'),
            (lambda s: s['ema'].update(log_kept=math.nan), 'at most at zero'),
            (lambda s: s['ema'].update(last_update=9), 'last update at step 9'),
            (lambda s: s['ema'].pop('settings'), "'settings' is a NoneType"),
            (lambda s: s['ema'].pop('average'), 'format version None'),
            (lambda s: s.update(ema=3), 'format version None'),
            (lambda s: s['ema']['average'].update(training_weights={}), 'swapped'),
            (lambda s: s['ema']['average']['parameters'].pop('0.1'), r'1 missing: 0\.1'),
            (lambda s: s['ema']['average']['parameters'].update({'0.1': torch.ones(7)}), r'another shape.*0\.1'),
            (lambda s: s['ema']['average']['parameters'].update({'2.0': torch.ones(7)}), r'unexpected: 2\.0'),
            (lambda s: s['param_groups'].append(s['param_groups'][0]), 'different number of parameter groups'),
            (lambda s: s['param_groups'][0]['params'].pop(), 'match the size'),
            (lambda s: s.pop('param_groups'), 'param_groups'),
        ],
    )
    def test_a_state_that_does_not_fit_leaves_everything_as_it_was(self, change, message):
        model, other = Net(), Net(seed=1)
        source, optimizer = EMAOptimizer(sgd(other), decay=0.5), EMAOptimizer(sgd(model), decay=0.5)
        train(other, source, range(3))
        train(model, optimizer, range(2))
        state = copy.deepcopy(source.state_dict())
        change(state)
        before = copy.deepcopy((optimizer.state_dict(), weights(model)))
        with pytest.raises((ValueError, KeyError), match=message):
            optimizer.load_state_dict(state)
        assert_same(before, (optimizer.state_dict(), weights(model)))

    def test_loading_does_not_change_or_keep_the_state_it_was_given(self):
        model = Net()
        optimizer = EMAOptimizer(sgd(model), decay=0.5)
        train(model, optimizer, range(2))
        state = saved(optimizer.state_dict())
        before = copy.deepcopy(state)
        fresh_model = Net()
        fresh = EMAOptimizer(sgd(fresh_model), decay=0.5)
        fresh.load_state_dict(state)
        train(fresh_model, fresh, range(2))
        assert_same(before['ema'], state['ema'])
        assert state.keys() == before.keys()

    def test_digits_lost_in_loading_are_said_once(self):
        model, double = Net(), Net().double()
        state = saved(EMAOptimizer(sgd(double), decay=0.5).state_dict())
        optimizer = EMAOptimizer(sgd(model), decay=0.5)
        with pytest.warns(UserWarning, match='digits are lost') as caught:
            optimizer.load_state_dict(state)
        assert len(caught) == 1

    def test_a_reference_to_the_shadow_stays_good_after_loading(self):
        model = Net()
        optimizer = EMAOptimizer(sgd(model), decay=0.5)
        shadow = optimizer.shadow
        train(model, optimizer, range(2))
        optimizer.load_state_dict(saved(optimizer.state_dict()))
        assert optimizer.shadow is shadow


def assert_same(first, second) -> None:
    """Nested containers with equal tensors, to the bit."""
    assert type(first) is type(second)
    if isinstance(first, Tensor):
        assert first.dtype == second.dtype
        assert bits(first) == bits(second)
    elif isinstance(first, dict):
        assert first.keys() == second.keys()
        for key in first:
            assert_same(first[key], second[key])
    elif isinstance(first, list | tuple):
        assert len(first) == len(second)
        for one, other in zip(first, second, strict=True):
            assert_same(one, other)
    else:
        assert first == second


class TestCopying:
    @pytest.mark.parametrize('with_model', [False, True])
    @pytest.mark.parametrize(
        'duplicate', [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))], ids=['deepcopy', 'pickle']
    )
    def test_a_copy_continues_the_same_run_on_its_own(self, with_model, duplicate):
        model = Net()
        optimizer = EMAOptimizer(sgd(model), decay=0.5, model=model if with_model else None)
        scheduler = lr_scheduler.StepLR(optimizer, 2)  # replaces the instance's step
        train(model, optimizer, range(2))
        scheduler.step()
        before = weights(model)
        twin_model, twin = duplicate((model, optimizer))
        train(twin_model, twin, range(2, 5))
        assert same_bits(weights(model), before)
        assert optimizer.num_steps == 2
        train(model, optimizer, range(2, 5))
        assert same_bits(weights(twin_model), weights(model))
        assert same_bits(averaged(twin), averaged(optimizer))
        with twin.swap_ema_weights():
            assert not same_bits(weights(twin_model), weights(model))

    def test_state_and_groups_given_to_setstate_become_the_wrapped_optimizers(self):
        model = Net()
        optimizer = EMAOptimizer(sgd(model))
        groups = [dict(group) for group in optimizer.param_groups]
        optimizer.__setstate__({'param_groups': groups})
        assert optimizer.optimizer.param_groups is groups


class TestRefusals:
    @pytest.mark.parametrize(
        ('options', 'error', 'message'),
        [
            ({'decay': 1.5}, ValueError, 'decay must lie in'),
            ({'decay': '0.5'}, TypeError, 'decay must be a number'),
            ({'decay': 0.9, 'half_life': 5}, ValueError, 'either half_life or decay'),
            ({'half_life': -1}, ValueError, 'half_life must be finite'),
            ({'half_life': math.inf}, ValueError, 'half_life must be finite'),
            ({'half_life': '10ba'}, TypeError, 'number of steps'),
            ({'every_n_steps': 0}, ValueError, 'at least 1'),
            ({'every_n_steps': 1.0}, TypeError, 'whole number'),
            ({'decay': 1, 'bias_correction': True}, ValueError, 'decay below 1'),
            ({'buffers': 'copy'}, ValueError, 'without a model'),
            ({'device': 'nowhere'}, ValueError, 'device'),
            ({'include': 'nothing'}, ValueError, 'matches none'),
            ({'model': Net()}, ValueError, r'2 of the optimizer.*0\.0, 0\.1'),
        ],
    )
    def test_a_setting_that_makes_no_sense_is_refused(self, options, error, message):
        with pytest.raises(error, match=message):
            EMAOptimizer(sgd(Net()), **options)

    def test_what_is_no_optimizer_or_one_twice_is_refused(self):
        model = Net()
        with pytest.raises(TypeError, match='got generator'):
            EMAOptimizer(model.parameters())
        with pytest.raises(TypeError, match='keep a ShadowModel beside it'):
            EMAOptimizer(EMAOptimizer(sgd(model)))


class Journal:
    """Notes in which order the average is updated and joined, and when a closure and a step write."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, optimizer: EMAOptimizer) -> None:
        self.lines: list[str] = []
        shadow, inner = optimizer.shadow, optimizer.optimizer
        update, wait, step = shadow.update, shadow.wait_for_reads, inner.step
        monkeypatch.setattr(shadow, 'update', lambda *a, **k: self.note('fork') or update(*a, **k))
        monkeypatch.setattr(shadow, 'wait_for_reads', lambda: self.note('join') or wait())
        monkeypatch.setattr(inner, 'step', lambda *a, **k: self.note('step') or step(*a, **k))

    def note(self, line: str) -> None:
        self.lines.append(line)


class TestOrder:
    """On a CPU forks and joins do nothing, so their order is read from a journal; the gpu test sees their effect."""

    def started(self, monkeypatch, inner_kind=torch.optim.SGD) -> tuple[One, EMAOptimizer, Journal]:
        model = One(1.0)
        optimizer = EMAOptimizer(inner_kind(model.parameters(), lr=0.1))
        model.weight.grad = torch.ones(1)
        optimizer.step(lambda: 0.0)
        return model, optimizer, Journal(monkeypatch, optimizer)

    def test_without_a_closure_the_last_update_is_joined_before_the_step(self, monkeypatch):
        _, optimizer, journal = self.started(monkeypatch)
        optimizer.step()
        assert journal.lines == ['join', 'step', 'fork']

    def test_with_a_closure_it_is_joined_when_the_closure_returns_first(self, monkeypatch):
        model, optimizer, journal = self.started(monkeypatch, torch.optim.LBFGS)

        def closure() -> Tensor:
            journal.note('closure')
            optimizer.zero_grad()
            loss = (model.weight - 3).square().sum() + model.weight.exp().sum()
            loss.backward()
            return loss

        optimizer.step(closure)
        assert journal.lines[:3] == ['step', 'closure', 'join']
        assert journal.lines.count('closure') > 2
        assert journal.lines[-1] == 'fork'
        assert journal.lines.count('fork') == 1

    def test_an_unknown_optimizer_may_write_before_its_closure_so_it_is_joined_first(self, monkeypatch):
        class Perturbing(torch.optim.SGD):
            pass

        _, optimizer, journal = self.started(monkeypatch, Perturbing)
        optimizer.step(lambda: 0.0)
        assert journal.lines[:2] == ['join', 'step']

    def test_hooks_that_may_write_are_joined_first(self, monkeypatch):
        _, optimizer, journal = self.started(monkeypatch)
        optimizer.register_step_pre_hook(lambda *_: journal.note('hook'))
        optimizer.step(lambda: 0.0)
        assert journal.lines[:3] == ['join', 'hook', 'step']
        journal.lines.clear()
        _, optimizer, journal = self.started(monkeypatch)
        optimizer.optimizer.register_step_pre_hook(lambda *_: journal.note('hook'))
        optimizer.step(lambda: 0.0)
        assert journal.lines[:2] == ['join', 'step']

    def test_after_the_first_update_no_module_is_walked(self, monkeypatch):
        model = Net()
        optimizer = EMAOptimizer(sgd(model), model=model)
        train(model, optimizer, range(3))
        from composer_ema.model.inventory import Inventory

        monkeypatch.setattr(Inventory, 'of', lambda *_: pytest.fail('walked the module'))
        optimizer.step()

    @pytest.mark.gpu
    @pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a CUDA device')
    @pytest.mark.parametrize('with_closure', [False, True])
    def test_on_cuda_an_update_is_late_but_reads_the_weights_of_its_step(self, with_closure):
        model = nn.Linear(2048, 2048, bias=False, device='cuda')
        with torch.no_grad():
            model.weight.fill_(0.0)
        optimizer = EMAOptimizer(torch.optim.SGD(model.parameters(), lr=1.0), decay=0.5)
        expected, value = 0.0, 0.0
        for _ in range(6):
            model.weight.grad = torch.full_like(model.weight, -1.0)
            for stream in optimizer.shadow._streams.values():
                with torch.cuda.stream(stream._stream):
                    torch.cuda._sleep(20_000_000)  # an update that is late: a missing join would read newer weights
            optimizer.step(*([lambda: 0.0] if with_closure else []))
            value += 1
            expected += (value - expected) / 2
        assert averaged(optimizer)['0.0'].cpu().unique().tolist() == [expected]


def _on_each_rank(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    faulthandler.dump_traceback_later(60, exit=True)  # a process that waits for the other for ever says where
    store, patience = f'file://{folder}/store', timedelta(seconds=30)
    dist.init_process_group('gloo', init_method=store, rank=rank, world_size=2, timeout=patience)
    model = nn.Sequential(nn.Linear(3, 2, bias=False))
    nn.init.ones_(model[0].weight)
    wrapped = DistributedDataParallel(model)
    optimizer = EMAOptimizer(sgd(wrapped), decay=0.5, model=wrapped)
    for index in range(4):
        inputs, labels = batch(index)
        half = slice(4 * rank, 4 * rank + 4)
        optimizer.zero_grad()
        nn.functional.cross_entropy(wrapped(inputs[half]), labels[half]).backward()
        optimizer.step()
    with optimizer.swap_ema_weights():
        during = weights(model)
    torch.save([averaged(optimizer), weights(model), during, optimizer.state_dict()], f'{folder}/{rank}.new')
    Path(folder, f'{rank}.new').rename(Path(folder, f'{rank}.pt'))
    while not Path(folder, f'{1 - rank}.pt').exists():
        time.sleep(0.01)
    # Torch 2.13's DDP, destroyed, joins gloo's threads while it holds the interpreter's lock, which they may wait for.
    os._exit(0)


def test_on_two_processes_every_rank_has_the_average_of_the_whole_batch(tmp_path):
    mp.start_processes(_on_each_rank, args=(str(tmp_path),), nprocs=2, start_method='spawn')
    ranks = [torch.load(tmp_path / f'{rank}.pt', weights_only=True) for rank in (0, 1)]
    for first, second in zip(*ranks, strict=True):
        assert_same(first, second)
    average, trained, during, state = ranks[0]
    assert list(average) == ['0.weight']
    assert same_bits(average, during)

    model = nn.Sequential(nn.Linear(3, 2, bias=False))
    nn.init.ones_(model[0].weight)
    alone = EMAOptimizer(sgd(model), decay=0.5, model=model)
    train(model, alone, range(4))
    # A mean of two means rounds differently from the mean of all.
    torch.testing.assert_close(trained, weights(model), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(average, averaged(alone), rtol=1e-5, atol=1e-6)
    alone.load_state_dict(state)
    assert same_bits(averaged(alone), average)


needs_composer = pytest.mark.skipif(importlib.util.find_spec('composer') is None, reason='needs Composer')


@needs_composer
def test_composers_trainer_takes_the_wrapped_optimizer_and_trains_the_same(tmp_path):
    import toy

    def run(optimizer: torch.optim.Optimizer, model: nn.Module, **arguments) -> None:
        trainer = toy.make_trainer(model=model, optimizers=optimizer, **arguments)
        trainer.fit()
        trainer.close()

    with warnings.catch_warnings():
        warnings.simplefilter('ignore')  # Composer's own
        bare, model, resumed_model = toy.make_model(), toy.make_model(), toy.make_model()
        run(toy.make_optimizer(bare), bare)
        optimizer = EMAOptimizer(toy.make_optimizer(model), decay=0.5)
        run(optimizer, model, save_folder=str(tmp_path), save_interval='1ep', save_filename='ep{epoch}.pt')
        assert toy.bits(model) == toy.bits(bare)
        assert optimizer.num_steps == optimizer.shadow.num_updates == 2 * toy.EPOCH
        with optimizer.swap_ema_weights():
            assert toy.bits(model) != toy.bits(bare)

        resumed = EMAOptimizer(toy.make_optimizer(resumed_model), decay=0.5)
        # Composer's checkpoints keep an optimizer's state and groups only, so a new average starts, and says so.
        with pytest.warns(UserWarning, match='A new average starts'):
            run(resumed, resumed_model, load_path=str(tmp_path / 'ep1.pt'))
        assert toy.bits(resumed_model) == toy.bits(bare)
        assert resumed.num_steps == toy.EPOCH


class TestOtherAverages:
    @pytest.mark.parametrize(
        ('options', 'expected'),
        [
            ({'average': 'equal'}, [4, 3, 5]),
            ({'average': 'equal', 'start': 2}, [4, 2, 5.5]),
            ({'average': 'equal', 'start': 3}, [4, 2, 9]),
            ({'average': 'equal', 'every_n_steps': 2}, [4, 2, 2]),
            ({'decay': 0.5, 'start': 2}, [4, 2, 5.5]),
            ({'decay': 0.5, 'start': 2, 'bias_correction': True}, [4, 2, 2 + 7 * 0.5 / 0.75]),
            ({'avg_fn': lambda averaged, current, n: averaged + (current - averaged) / (n + 1)}, [4, 3, 5]),
            ({'multi_avg_fn': swa_utils.get_swa_multi_avg_fn(), 'start': 2}, [4, 2, 5.5]),
            ({'multi_avg_fn': swa_utils.get_ema_multi_avg_fn(0.75)}, [4, 3.5, 4.875]),
        ],
    )
    def test_three_steps_by_hand(self, options, expected):
        model = One(8.0)
        optimizer = EMAOptimizer(torch.optim.SGD(model.parameters(), lr=1.0), **options)
        found = []
        for value in (4, 2, 9):
            step_to(optimizer, model, value)
            found.append(averaged(optimizer)['0.0'].item())
        assert found == pytest.approx(expected, rel=1e-6)

    def test_before_the_start_the_average_is_the_weights_of_now(self):
        model = One(8.0)
        optimizer = EMAOptimizer(torch.optim.SGD(model.parameters(), lr=1.0), average='equal', start=3)
        for value in (5, 6):
            step_to(optimizer, model, value)
            with optimizer.swap_ema_weights():
                assert model.weight.item() == value
            assert optimizer.shadow.num_updates == 0

    @given(
        values=st.lists(st.floats(-8, 8, width=32), min_size=1, max_size=9),
        interval=st.integers(1, 3),
        start=st.integers(0, 5),
    )
    def test_an_equal_average_is_the_mean_of_the_weights_at_its_steps(self, values, interval, start):
        model = One(1.0)
        optimizer = EMAOptimizer(
            torch.optim.SGD(model.parameters(), lr=1.0), every_n_steps=interval, average='equal', start=start
        )
        kept = []
        for step, value in enumerate(values, 1):
            step_to(optimizer, model, value)
            if step % interval == 0 and step >= start:
                kept.append(model.weight.item())
        expected = sum(kept) / len(kept) if kept else None
        assert optimizer.shadow.num_updates == len(kept)
        if kept:
            assert averaged(optimizer)['0.0'].item() == pytest.approx(expected, rel=1e-5, abs=1e-5)

    @pytest.mark.parametrize('buffers', ['average', 'copy'])
    def test_an_equal_average_is_torchs_averaged_model_to_the_bit(self, buffers):
        model = Net()
        optimizer = EMAOptimizer(sgd(model), model=model, average='equal', buffers=buffers)
        by_lerp, whole = swa_utils.get_swa_multi_avg_fn(), []

        def floating_only(mean: list[Tensor], current: list[Tensor], count: Tensor) -> None:
            if mean[0].is_floating_point():
                by_lerp(mean, current, count)
            whole.append(count)

        theirs = swa_utils.AveragedModel(model, multi_avg_fn=floating_only, use_buffers=buffers == 'average')
        for index in range(20):
            train(model, optimizer, range(index, index + 1))
            theirs.update_parameters(model)
        expected = {name: tensor for name, tensor in theirs.module.state_dict().items() if 'num_batches' not in name}
        found = {name: tensor for name, tensor in averaged(optimizer).items() if 'num_batches' not in name}
        assert found.keys() == expected.keys()
        assert same_bits(found, {name: expected[name] for name in found})
        assert whole

    @pytest.mark.parametrize(
        'options',
        [
            {'average': 'equal', 'every_n_steps': 2},
            {'average': 'equal', 'start': 4},
            {'decay': 0.9, 'start': 3},
            {'decay': 0.9, 'start': 3, 'bias_correction': True},
            {'multi_avg_fn': swa_utils.get_swa_multi_avg_fn(), 'start': 2},
            {'avg_fn': lambda averaged, current, n: averaged.lerp(current, 1 / (n.item() + 1))},
        ],
        ids=['equal', 'equal, late', 'late', 'late and corrected', 'multi_avg_fn', 'avg_fn'],
    )
    def test_a_resumed_run_equals_an_uninterrupted_one(self, options):
        def build() -> tuple[Net, EMAOptimizer]:
            model = Net()
            return model, EMAOptimizer(sgd(model), model=model, **options)

        whole, optimizer = build()
        train(whole, optimizer, range(8))
        for end in range(1, 8):
            first, first_optimizer = build()
            train(first, first_optimizer, range(end))
            state = saved({'model': first.state_dict(), 'optimizer': first_optimizer.state_dict()})
            second, second_optimizer = build()
            second.load_state_dict(state['model'])
            second_optimizer.load_state_dict(state['optimizer'])
            train(second, second_optimizer, range(end, 8))
            assert same_bits(averaged(second_optimizer), averaged(optimizer)), f'resumed after step {end}'
            assert same_bits(weights(second), weights(whole))
            assert second_optimizer.ema_state_dict()['last_update'] == optimizer.ema_state_dict()['last_update']

    def test_a_copy_keeps_the_function_and_goes_on(self):
        model = Net()
        optimizer = EMAOptimizer(sgd(model), model=model, avg_fn=lambda averaged, current, n: (averaged + current) / 2)
        train(model, optimizer, range(3))
        twin_model, twin = copy.deepcopy((model, optimizer))
        train(model, optimizer, range(3, 6))
        train(twin_model, twin, range(3, 6))
        assert same_bits(averaged(twin), averaged(optimizer))

    def test_a_group_added_in_the_middle_joins_at_its_value(self):
        model, other = One(8.0), One(1.0)
        optimizer = EMAOptimizer(torch.optim.SGD(model.parameters(), lr=1.0), avg_fn=lambda a, c, n: (a + c) / 2)
        step_to(optimizer, model, 4)
        optimizer.add_param_group({'params': other.parameters()})
        step_to(optimizer, model, 2)
        assert [t.item() for t in averaged(optimizer).values()] == [3, 1]

    def test_loading_calls_no_function(self):
        model, calls = One(8.0), []

        def halfway(average: Tensor, current: Tensor, count: Tensor) -> Tensor:
            calls.append(count.item())
            return (average + current) / 2

        optimizer = EMAOptimizer(torch.optim.SGD(model.parameters(), lr=1.0), avg_fn=halfway)
        for value in (4, 2):
            step_to(optimizer, model, value)
        optimizer.load_state_dict(saved(optimizer.state_dict()))
        assert calls == [1]
        step_to(optimizer, model, 9)
        assert calls == [1, 2]
        assert averaged(optimizer)['0.0'].item() == 6

    def test_another_average_than_the_saved_one_is_warned_of(self):
        model = Net()
        optimizer = EMAOptimizer(sgd(model), average='equal')
        train(model, optimizer, range(2))
        other = EMAOptimizer(sgd(model), multi_avg_fn=swa_utils.get_swa_multi_avg_fn())
        with pytest.warns(UserWarning, match=r"saved average used .*'average': 'equal'.*swa_update"):
            other.load_state_dict(optimizer.state_dict())

    @pytest.mark.parametrize(
        ('options', 'error', 'message'),
        [
            ({'average': 'mean'}, ValueError, r"average must be 'exponential' or 'equal', got 'mean'\. Any other"),
            ({'average': 'equal', 'decay': 0.9}, ValueError, r'decay=0\.9 has no effect on an equal average\. Leave'),
            ({'average': 'equal', 'half_life': 10}, ValueError, r'half_life=10 has no effect on an equal average'),
            ({'average': 'equal', 'bias_correction': True}, ValueError, r'bias_correction=True has no effect'),
            ({'avg_fn': torch.lerp, 'decay': 0.9}, ValueError, r'decay=0\.9 has no effect on an average by a function'),
            ({'avg_fn': torch.lerp, 'average': 'equal'}, ValueError, r"either average='equal' or a function, got both"),
            ({'avg_fn': torch.lerp, 'multi_avg_fn': torch.lerp}, ValueError, r'either avg_fn or multi_avg_fn'),
            ({'avg_fn': torch.lerp, 'skip_nonfinite': True}, ValueError, r'skip_nonfinite=True has no effect'),
            ({'avg_fn': 0.9}, TypeError, r'avg_fn must be a function'),
            ({'start': -1}, ValueError, r'start must be at least 0 steps, got -1'),
            ({'start': 1.5}, TypeError, r'start must be a whole number of steps, got 1\.5'),
        ],
    )
    def test_what_contradicts_is_refused(self, options, error, message):
        with pytest.raises(error, match=message):
            EMAOptimizer(sgd(Net()), **options)


def test_the_card_names_every_argument():
    card = (Path(__file__).parents[1] / 'method_cards' / 'ema_optimizer.md').read_text()
    arguments = set(inspect.signature(EMAOptimizer.__init__).parameters) - {'self'}
    assert arguments <= set(re.findall(r'`(\w+)`', card))


def test_it_uses_the_shadow_that_users_have():
    assert isinstance(EMAOptimizer(sgd(Net())).shadow, ShadowModel)
