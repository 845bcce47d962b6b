"""An optimizer that stands in for another one: shared groups and state, hooks, copies."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from plain import STRICT, Net, One, averaged, same_bits, saved, sgd, step_to, train, weights
from torch import Tensor, nn
from torch.optim import lr_scheduler
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from composer_ema import EMAOptimizer
from composer_ema.wrapper import OptimizerWrapper, ParameterGroups

pytestmark = STRICT


class Recording(OptimizerWrapper):
    """Notes when a subclass is called, and saves the notes in its state."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        super().__init__(optimizer)
        self.notes: list[str] = []

    def _before_step(self) -> None:
        self.notes.append('before step')

    def _before_write(self) -> None:
        self.notes.append('before write')

    def _after_step(self) -> None:
        self.notes.append('after step')

    def _saved(self) -> dict:
        return {**super()._saved(), 'notes': list(self.notes)}

    def _load(self, state: dict) -> None:
        self.notes = state.pop('notes')
        super()._load(state)


def recorded(kind: type[torch.optim.Optimizer] = torch.optim.SGD, lr: float = 0.1) -> tuple[One, Recording]:
    model = One(1.0)
    model.weight.grad = torch.ones(1)
    return model, Recording(kind(model.parameters(), lr=lr))


class TestSubclasses:
    """What an OptimizerWrapper tells its subclass, whatever that does with it."""

    @pytest.mark.parametrize('kind', [torch.optim.SGD, torch.optim.Adam])
    def test_a_bare_wrapper_trains_as_the_optimizer_alone(self, kind):
        bare, model = Net(), Net()
        train(bare, kind(bare.parameters(), lr=0.1), range(4))
        optimizer = OptimizerWrapper(OptimizerWrapper(kind(model.parameters(), lr=0.1)))
        train(model, optimizer, range(2))
        optimizer.load_state_dict(saved(optimizer.state_dict()))
        train(model, optimizer, range(2, 4))
        assert same_bits(weights(model), weights(bare))
        assert isinstance(optimizer, torch.optim.Optimizer)

    def test_they_are_called_before_the_step_before_it_writes_and_after_it(self):
        model, optimizer = recorded()
        optimizer.optimizer.register_step_post_hook(lambda *_: optimizer.notes.append('step'))
        optimizer.register_step_post_hook(lambda *_: optimizer.notes.append('post-hook'))
        optimizer.step()
        assert optimizer.notes == ['before step', 'before write', 'step', 'post-hook', 'after step']
        assert model.weight.item() == pytest.approx(0.9)

    def test_they_are_called_before_each_pre_hook_which_may_write(self):
        _, optimizer = recorded()
        for _ in range(2):
            optimizer.register_step_pre_hook(lambda *_: optimizer.notes.append('pre-hook'))
        optimizer.step()
        assert optimizer.notes == ['before step', *['before write', 'pre-hook'] * 2, 'before write', 'after step']

    def test_with_a_closure_they_are_called_when_it_has_returned(self):
        _, optimizer = recorded()
        loss = optimizer.step(lambda: optimizer.notes.append('closure') or 3.0)
        assert loss == 3.0
        assert optimizer.notes == ['before step', 'closure', 'before write', 'after step']

    def test_an_unknown_optimizer_may_write_before_its_closure(self):
        class Unknown(torch.optim.SGD):
            pass

        _, optimizer = recorded(Unknown)
        optimizer.step(lambda: optimizer.notes.append('closure'))
        assert optimizer.notes[:3] == ['before step', 'before write', 'closure']

    def test_a_step_that_builds_empty_state_is_none(self):
        model, optimizer = recorded(torch.optim.Adam, lr=0.0)
        model.weight.grad = torch.zeros(1)
        optimizer.step()
        assert optimizer.notes == ['before write']
        optimizer.step()  # there is state by now
        assert optimizer.notes == ['before write', 'before step', 'before write', 'after step']

    @pytest.mark.parametrize('found', [0.0, 1.0])
    def test_a_step_that_a_grad_scaler_skips_has_no_after(self, found):
        model = One(1.0)
        model.weight.grad = torch.ones(1)
        optimizer = Recording(torch.optim.SGD(model.parameters(), lr=0.1, fused=True))
        assert optimizer._step_supports_amp_scaling
        optimizer.found_inf, optimizer.grad_scale = torch.tensor(found), None
        assert optimizer.optimizer.found_inf is optimizer.found_inf
        optimizer.step()
        assert ('after step' in optimizer.notes) == (found == 0)
        del optimizer.found_inf, optimizer.grad_scale
        assert not hasattr(optimizer.optimizer, 'found_inf')

    def test_what_a_subclass_saves_goes_through_the_hooks(self):
        _, optimizer = recorded()
        optimizer.step()
        optimizer.register_state_dict_post_hook(lambda _, state: {**state, 'notes': [*state['notes'], 'hook']})
        state = saved(optimizer.state_dict())
        _, second = recorded()
        second.load_state_dict(state)
        assert second.notes == ['before step', 'before write', 'after step', 'hook']
        assert 'notes' in state  # the given state is not changed

    def test_what_is_no_optimizer_is_refused(self):
        with pytest.raises(TypeError, match=r'must be a torch\.optim\.Optimizer, got generator\. Pass for example'):
            OptimizerWrapper(Net().parameters())

    def test_its_description_names_both(self):
        assert repr(OptimizerWrapper(sgd(Net()))).startswith('OptimizerWrapper of SGD (')

    @pytest.mark.parametrize('duplicate', [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))])
    def test_a_copy_has_no_hooks_and_an_optimizer_of_its_own(self, duplicate):
        optimizer = OptimizerWrapper(sgd(Net()))
        optimizer.register_step_pre_hook(print)
        lr_scheduler.StepLR(optimizer, 2)  # replaces the instance's step
        twin = duplicate(optimizer)
        assert not twin._optimizer_step_pre_hooks
        assert 'step' not in vars(twin)
        assert twin.param_groups is twin.optimizer.param_groups is not optimizer.param_groups


class TestParameterGroups:
    def names(self, groups: ParameterGroups) -> dict[str, Tensor]:
        return dict(groups.named_parameters())

    def test_parameters_are_named_by_group_and_position(self):
        first, second, third = (torch.ones(1, requires_grad=True) for _ in range(3))
        groups = ParameterGroups(torch.optim.SGD([{'params': [first, second]}, {'params': [third]}], lr=0.1))
        found = self.names(groups)
        assert list(found) == ['0.0', '0.1', '1.0']
        assert all(map(lambda a, b: a is b, found.values(), (first, second, third)))

    def test_refresh_sees_new_groups_and_parameters_in_anothers_place(self):
        first, second, third = (torch.ones(1, requires_grad=True) for _ in range(3))
        optimizer = torch.optim.SGD([first], lr=0.1)
        groups = ParameterGroups(optimizer)
        optimizer.add_param_group({'params': [second]})
        optimizer.param_groups[0]['params'][0] = third
        assert self.names(groups)['0.0'] is first
        groups.refresh()
        assert list(self.names(groups)) == ['0.0', '1.0']
        assert self.names(groups)['0.0'] is third

    def test_refresh_forgets_a_group_that_is_gone(self):
        first, second = (torch.ones(1, requires_grad=True) for _ in range(2))
        optimizer = torch.optim.SGD([{'params': [first]}, {'params': [second]}], lr=0.1)
        groups = ParameterGroups(optimizer)
        optimizer.param_groups.pop()
        groups.refresh()
        assert list(self.names(groups)) == ['0.0']

    def test_refresh_keeps_the_children_when_nothing_has_changed(self):
        groups = ParameterGroups(sgd(Net()))
        child = groups.get_submodule('0')
        groups.refresh()
        assert groups.get_submodule('0') is child


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
