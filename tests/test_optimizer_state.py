"""The state of EMAOptimizer: a resumed run equals an uninterrupted one, and nothing is half-loaded."""

from __future__ import annotations

import copy
import math
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from plain import (
    STRICT,
    Net,
    One,
    assert_same,
    averaged,
    loss_of,
    same_bits,
    same_values,
    saved,
    sgd,
    step_to,
    train,
    weights,
)
from torch import nn

from composer_ema import EMAOptimizer

pytestmark = STRICT

FIXTURE = Path(__file__).parent / 'fixtures' / 'version-1.pt'


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
            (lambda s: s['ema'].update(version=99), r'format version 99, this release reads 1 to 3\.'),
            (lambda s: s['ema'].update(version=True), 'format version True'),
            (lambda s: s['ema'].update(version=1), r"'log_kept' is None, not a number of at most 0"),
            (lambda s: s['ema'].update(num_steps='3'), "'num_steps' is a str"),
            (lambda s: s['ema']['profile'].update(log_kept=0.5), r"'log_kept' .* at most 0\. Nothing was loaded"),
            (lambda s: s['ema']['profile'].update(log_kept=math.nan), r"'log_kept' .* at most 0\. Nothing was loaded"),
            (lambda s: s['ema']['profile'].clear(), r'must hold log_kept, got \{\}\. Nothing was loaded'),
            (lambda s: s['ema'].pop('profile'), "'profile' is a NoneType"),
            (lambda s: s['ema'].update(last_update=9), 'last update at step 9'),
            (lambda s: s['ema'].pop('settings'), "'settings' is a NoneType"),
            (lambda s: s['ema'].pop('average'), "'average' is a NoneType"),
            (lambda s: s['ema']['average'].pop('version'), 'format version None'),
            (lambda s: s.update(ema=3), 'format version None'),
            (lambda s: s['ema']['average'].update(training_weights={}), 'saved training weights does not fit'),
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
        source = EMAOptimizer(sgd(other), decay=0.5, bias_correction=True)
        optimizer = EMAOptimizer(sgd(model), decay=0.5, bias_correction=True)
        train(other, source, range(3))
        train(model, optimizer, range(2))
        state = copy.deepcopy(source.state_dict())
        change(state)
        before = copy.deepcopy((optimizer.state_dict(), weights(model)))
        with pytest.raises((ValueError, KeyError), match=message):
            optimizer.load_state_dict(state)
        assert_same(before, (optimizer.state_dict(), weights(model)))

    def test_warnings_point_at_the_line_that_loads(self):
        model = Net()
        optimizer, other = EMAOptimizer(sgd(model), decay=0.9), EMAOptimizer(sgd(model), decay=0.5)
        with pytest.warns(UserWarning, match='the saved average used') as by_state:
            other.load_state_dict(optimizer.state_dict())
        with pytest.warns(UserWarning, match='the saved average used') as by_ema_state:
            other.load_ema_state_dict(optimizer.ema_state_dict())
        with pytest.warns(UserWarning, match='A new average starts') as bare:
            other.load_state_dict(sgd(model).state_dict())
        assert {each[0].filename for each in (by_state, by_ema_state, bare)} == {__file__}

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

    def test_the_state_of_the_average_has_these_entries_in_plain_types(self):
        model = Net()
        optimizer = EMAOptimizer(sgd(model), decay=0.75, bias_correction=True, every_n_steps=2)
        train(model, optimizer, range(5))
        state = optimizer.ema_state_dict()
        assert list(state) == [
            'version', 'num_steps', 'last_update', 'settings', 'started_at', 'start_share', 'description', 'profile',
            'average',
        ]  # fmt: skip
        assert (state['version'], state['num_steps'], state['last_update']) == (3, 5, 4)
        assert (state['start_share'], state['description']) == (0.0, 'decay=0.75,bias_correction')
        assert state['profile'] == {'log_kept': pytest.approx(4 * math.log(0.75))}
        assert state['settings']['decay'] == 0.75
        assert {type(value) for value in state['settings'].values()} <= {float, int, bool, str, type(None)}
        assert state['average'].keys() == optimizer.shadow.state_dict().keys()


class TestAnotherKindOfAverage:
    """A state that was saved with other settings is taken over with a warning, whatever its profile remembers."""

    def taken_over(self, saved_with: dict[str, Any], loaded_with: dict[str, Any]) -> tuple[One, EMAOptimizer]:
        model, other = One(8.0), One(8.0)
        optimizer = EMAOptimizer(torch.optim.SGD(model.parameters(), lr=1.0), **saved_with)
        for value in (4.0, 2.0):
            step_to(optimizer, model, value)
        successor = EMAOptimizer(torch.optim.SGD(other.parameters(), lr=1.0), **loaded_with)
        with pytest.warns(UserWarning, match='the saved average used'):
            successor.load_state_dict(saved(optimizer.state_dict()))
        assert averaged(successor)['0.0'].item() == averaged(optimizer)['0.0'].item()
        return other, successor

    @pytest.mark.parametrize('saved_with', [{'decay': 0.5}, {'average': 'equal'}])
    def test_a_correction_goes_on_as_if_there_had_been_one_from_the_start(self, saved_with):
        model, optimizer = self.taken_over(saved_with, {'decay': 0.75, 'bias_correction': True})
        before = averaged(optimizer)['0.0'].item()
        step_to(optimizer, model, 9.0)
        assert averaged(optimizer)['0.0'].item() == pytest.approx(before + 0.25 / (1 - 0.75**3) * (9 - before))

    def test_without_the_correction_its_memory_is_left_behind(self):
        model, optimizer = self.taken_over({'decay': 0.5, 'bias_correction': True}, {'decay': 0.5})
        before = averaged(optimizer)['0.0'].item()
        step_to(optimizer, model, 9.0)
        assert averaged(optimizer)['0.0'].item() == pytest.approx((before + 9) / 2)
        assert optimizer.ema_state_dict()['profile'] == {}

    def test_an_equal_average_counts_the_updates_of_the_other(self):
        model, optimizer = self.taken_over({'decay': 0.5}, {'average': 'equal'})
        before = averaged(optimizer)['0.0'].item()
        step_to(optimizer, model, 9.0)
        assert averaged(optimizer)['0.0'].item() == pytest.approx(before + (9 - before) / 3)

    def test_a_function_takes_over(self):
        model, optimizer = self.taken_over({'decay': 0.5, 'bias_correction': True}, {'avg_fn': lambda a, c, n: a + n})
        before = averaged(optimizer)['0.0'].item()
        step_to(optimizer, model, 9.0)
        assert averaged(optimizer)['0.0'].item() == before + 2

    def test_the_state_of_a_bare_optimizer_clears_the_memory_of_the_correction(self):
        model = One(8.0)
        inner = torch.optim.SGD(model.parameters(), lr=1.0)
        optimizer = EMAOptimizer(inner, decay=0.5, bias_correction=True)
        step_to(optimizer, model, 4.0)
        with pytest.warns(UserWarning, match='A new average starts'):
            optimizer.load_state_dict(inner.state_dict())
        assert optimizer.ema_state_dict()['profile'] == {'log_kept': 0.0}
        step_to(optimizer, model, 2.0)
        assert averaged(optimizer)['0.0'].item() == 2.0  # the first update copies


class TestVersion1:
    """States that the release before wrote; fixtures/make_version_1.py made the file."""

    KINDS = ('exponential', 'corrected', 'equal')

    def resumed(self, kind: str) -> tuple[Any, torch.nn.Module, EMAOptimizer, dict[str, Any]]:
        pytest.importorskip('composer', reason='the script that wrote the fixture needs Composer')
        from fixtures import make_version_1 as script

        net = script.make_net()
        optimizer = EMAOptimizer(
            torch.optim.SGD(net.parameters(), lr=0.25, momentum=0.5), model=net, **script.OPTIMIZERS[kind]
        )
        return script, net, optimizer, torch.load(FIXTURE, weights_only=True)[kind]

    @pytest.mark.parametrize('kind', KINDS)
    @pytest.mark.parametrize('beside', [False, True], ids=['state_dict', 'ema_state_dict'])
    def test_it_goes_on_to_the_end_of_the_uninterrupted_run(self, kind, beside):
        script, net, optimizer, fixture = self.resumed(kind)
        assert fixture['state']['ema']['version'] == 1
        net.load_state_dict(fixture['model'])
        state = fixture['state']
        if beside:
            optimizer.optimizer.load_state_dict({name: value for name, value in state.items() if name != 'ema'})
            optimizer.load_ema_state_dict(state['ema'])
        else:
            optimizer.load_state_dict(state)
        assert optimizer.num_steps == script.SAVED
        script.follow_optimizer(net, optimizer, range(script.SAVED, script.LAST))
        expected = fixture['expected']
        assert same_bits(weights(net), expected['weights'])
        torch.testing.assert_close(averaged(optimizer), expected['average'], rtol=1e-6, atol=0)
        assert optimizer.shadow.num_updates == expected['num_updates']

    @pytest.mark.parametrize('kind', KINDS)
    def test_saved_anew_it_is_version_3_and_loads_to_the_same_bits(self, kind):
        _, _, first, fixture = self.resumed(kind)
        first.load_state_dict(fixture['state'])
        state = saved(first.state_dict())
        assert state['ema']['version'] == 3
        assert ('log_kept' in state['ema']['profile']) == (kind == 'corrected')
        assert 'log_kept' not in state['ema']
        _, _, second, _ = self.resumed(kind)
        second.load_state_dict(state)
        assert_same(second.ema_state_dict(), first.ema_state_dict())

    @pytest.mark.parametrize(
        ('change', 'message'),
        [
            (lambda s: s.update(log_kept=0.5), r"'log_kept' is 0\.5, not a number of at most 0\. Nothing"),
            (lambda s: s.update(log_kept=math.nan), "'log_kept' is nan"),
            (lambda s: s.update(log_kept='0'), "'log_kept' is '0'"),
            (lambda s: s.pop('log_kept'), "'log_kept' is None"),
            (lambda s: s.pop('settings'), "'settings' is a NoneType"),
            (lambda s: s.update(num_steps=-1), 'last update at step'),
            (lambda s: s.pop('average'), "'average' is a NoneType"),
            (lambda s: s['average']['parameters'].pop('linear.bias'), r'1 missing: linear\.bias'),
        ],
    )
    def test_one_that_does_not_fit_leaves_everything_as_it_was(self, change, message):
        script, net, optimizer, fixture = self.resumed('corrected')
        script.follow_optimizer(net, optimizer, range(2))
        before = copy.deepcopy((optimizer.state_dict(), weights(net)))
        state = fixture['state']['ema']
        change(state)
        with pytest.raises(ValueError, match=message):
            optimizer.load_ema_state_dict(state)
        with pytest.raises(ValueError, match=message):
            optimizer.load_state_dict(fixture['state'])
        assert_same(before, (optimizer.state_dict(), weights(net)))

    def test_one_of_a_time_before_some_settings_had_their_defaults(self):
        _, _, optimizer, fixture = self.resumed('exponential')
        state = fixture['state']['ema']
        for name in ('average', 'start'):
            del state['settings'][name]
        given = copy.deepcopy(state)
        optimizer.load_ema_state_dict(state)  # a warning would be an error
        assert_same(state, given)


ALIASED = [
    {'decay': 0.5},
    {'average': 'equal'},
    {'power': 0.2},
    {'decay': 0.5, 'start': 2},
    {'decay': 0.5, 'model': True},
]


@pytest.mark.parametrize('options', ALIASED, ids=str)
@pytest.mark.parametrize('load', ['load_ema_state_dict', 'load_state_dict'])
def test_loading_its_own_state_changes_nothing(options, load):
    """As distributed checkpoints do, which load into the tensors of the state that they asked for."""
    model = Net()
    optimizer = EMAOptimizer(sgd(model), **{**options, **({'model': model} if options.get('model') else {})})
    train(model, optimizer, range(4))
    before = {name: tensor.clone() for name, tensor in averaged(optimizer).items()}
    getattr(optimizer, load)(getattr(optimizer, load.removeprefix('load_'))())
    assert same_bits(averaged(optimizer), before)
    assert optimizer.num_steps == 4


def test_a_state_of_a_run_with_other_frozen_parameters_is_refused_whole():
    def run(frozen_after: int) -> tuple[nn.Module, EMAOptimizer]:
        model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
        optimizer = EMAOptimizer(torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), decay=0.5, model=model)
        for step in range(3):
            model[0].requires_grad_(step < frozen_after)
            model(torch.ones(1, 2)).sum().backward()
            optimizer.step()
        return model, optimizer

    _, other = run(0)
    model, optimizer = run(2)
    before = copy.deepcopy(optimizer.state_dict())
    state = copy.deepcopy(other.state_dict())
    state['ema']['average']['parameters'].pop('0.weight', None)
    with pytest.raises(ValueError, match=r'missing: 0\.(bias|weight).*Nothing was loaded'):
        optimizer.load_state_dict(state)
    after = optimizer.state_dict()
    assert str(after) == str(before)
    assert not model[0].weight.requires_grad


def test_the_age_of_a_late_average_goes_on_under_other_settings():
    model, twin = Net(), Net()
    optimizer = EMAOptimizer(sgd(model), power=12**-0.5, start=4)
    train(model, optimizer, range(6))
    resumed = EMAOptimizer(sgd(twin), power=12**-0.5)
    with pytest.warns(UserWarning, match='the saved average used'):
        resumed.load_state_dict(saved(optimizer.state_dict()))
    twin.load_state_dict(model.state_dict())
    train(model, optimizer, range(6, 9))
    train(twin, resumed, range(6, 9))
    assert_same(averaged(resumed), averaged(optimizer))


@pytest.mark.parametrize(
    'options', [{'decay': np.float32(0.5)}, {'half_life': np.float64(3)}, {'power': np.float64(0.1)}]
)
def test_numbers_of_numpy_leave_a_state_that_torch_reads(options):
    optimizer = EMAOptimizer(sgd(Net()), **options)
    assert saved(optimizer.ema_state_dict())['settings'].items() >= options.items()


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    options=st.sampled_from([{**each, 'model': None} for each in ALIASED[:4]] + [{'decay': 0.5, 'model': True}]),
    steps=st.integers(0, 5),
    interval=st.integers(1, 3),
    joins=st.sampled_from(['nothing', 'before', 'between']),
    load=st.sampled_from(['load_ema_state_dict', 'load_state_dict']),
)
def test_loading_its_own_state_is_the_identity_whatever_the_settings(options, steps, interval, joins, load):
    model, twin = Net(), Net()

    def build(net: Net) -> EMAOptimizer:
        inner = torch.optim.SGD(net.first.parameters(), lr=0.1, momentum=0.9)
        optimizer = EMAOptimizer(
            inner, every_n_steps=interval, **{**options, 'model': net if options['model'] else None}
        )
        train(net, optimizer, range(steps))
        if joins == 'before':
            optimizer.add_param_group({'params': list(net.last.parameters())})
        return optimizer

    optimizer, expected = build(model), build(twin)
    state = getattr(optimizer, load.removeprefix('load_'))()
    if joins == 'between' and load == 'load_ema_state_dict':
        for each, net in ((optimizer, model), (expected, twin)):
            each.add_param_group({'params': list(net.last.parameters())})
    getattr(optimizer, load)(state)
    assert same_bits(weights(model), weights(twin))
    assert same_bits(averaged(optimizer), averaged(expected))
    train(model, optimizer, range(steps, steps + 3))
    train(twin, expected, range(steps, steps + 3))
    assert same_bits(weights(model), weights(twin))
    assert same_bits(averaged(optimizer), averaged(expected))
    assert optimizer.num_steps == expected.num_steps


class TestSavedWhileSwapped:
    """As a preemption or a ModelCheckpoint inside of the block would."""

    @staticmethod
    def build(with_model: bool, seed: int = 0, **options: Any) -> tuple[Net, EMAOptimizer]:
        model = Net(seed)
        inner = torch.optim.Adam(model.parameters(), lr=0.05)
        return model, EMAOptimizer(inner, model=model if with_model else None, decay=0.5, **options)

    @pytest.mark.parametrize('with_model', [False, True])
    @pytest.mark.parametrize('options', [{}, {'start': 3}, {'every_n_steps': 2, 'dtype': 'float64'}], ids=str)
    @pytest.mark.parametrize('stop', [0, 2, 5])
    @pytest.mark.parametrize('beside', [False, True], ids=['state_dict', 'ema_state_dict'])
    def test_the_run_goes_on_to_the_bit(self, with_model, options, stop, beside):
        model, optimizer = self.build(with_model, **options)
        train(model, optimizer, range(stop))
        with optimizer.swap_ema_weights():
            state = saved({
                'model': model.state_dict(),
                'optimizer': optimizer.state_dict(),
                'ema': optimizer.ema_state_dict(),
            })  # fmt: skip
        train(model, optimizer, range(stop, 9))
        resumed_model, resumed = self.build(with_model, seed=1, **options)
        resumed_model.load_state_dict(state['model'])
        if beside:
            resumed.optimizer.load_state_dict({n: s for n, s in state['optimizer'].items() if n != 'ema'})
            resumed.load_ema_state_dict(state['ema'])
        else:
            resumed.load_state_dict(state['optimizer'])
        assert not resumed.shadow.is_swapped
        train(resumed_model, resumed, range(stop, 9))
        assert same_bits(weights(resumed_model), weights(model))
        assert same_bits(averaged(resumed), averaged(optimizer))

    def test_the_models_part_is_the_average_and_the_training_weights_are_in_the_average(self):
        model, optimizer = self.build(with_model=True)
        train(model, optimizer, range(4))
        before = weights(model)
        with optimizer.swap_ema_weights():
            state, slot = saved(optimizer.state_dict()), weights(model)
        assert torch.equal(slot['first.weight'], state['ema']['average']['parameters']['first.weight'])
        assert torch.equal(before['first.weight'], state['ema']['average']['training_weights']['first.weight'])
        assert 'training_weights' not in optimizer.state_dict()['ema']['average']

    def test_a_model_that_is_loaded_after_the_optimizer_is_refused_at_the_step(self):
        model, optimizer = self.build(with_model=True)
        train(model, optimizer, range(4))
        with optimizer.swap_ema_weights():
            state = saved({'model': model.state_dict(), 'optimizer': optimizer.state_dict()})
        resumed_model, resumed = self.build(with_model=True, seed=1)
        resumed.load_state_dict(state['optimizer'])
        resumed_model.load_state_dict(state['model'])
        loss_of(resumed_model, 4).backward()
        held = weights(resumed_model)
        for _ in range(2):
            with pytest.raises(RuntimeError, match=r'Load the model first, then the optimizer\.'):
                resumed.step()
        assert same_bits(weights(resumed_model), held)
        resumed_model.load_state_dict(state['model'])
        resumed.load_state_dict(state['optimizer'])
        train(model, optimizer, range(4, 6))
        train(resumed_model, resumed, range(4, 6))
        assert same_bits(weights(resumed_model), weights(model))

    def test_other_weights_may_be_loaded_after_it(self):
        model, optimizer = self.build(with_model=True)
        train(model, optimizer, range(4))
        with optimizer.swap_ema_weights():
            state = saved(optimizer.state_dict())
        model.load_state_dict(Net(seed=3).state_dict())
        optimizer.load_state_dict(state)
        model.load_state_dict(Net(seed=4).state_dict())
        train(model, optimizer, range(4, 5))

    def test_training_weights_of_another_shape_leave_everything_as_it_was(self):
        model, optimizer = self.build(with_model=True)
        train(model, optimizer, range(2))
        with optimizer.swap_ema_weights():
            state = saved(optimizer.state_dict())
        state['ema']['average']['training_weights']['first.weight'] = torch.ones(9)
        before = copy.deepcopy((optimizer.state_dict(), weights(model)))
        with pytest.raises(ValueError, match=r'saved training weights does not fit.*first\.weight'):
            optimizer.load_state_dict(state)
        assert_same(before, (optimizer.state_dict(), weights(model)))


def test_the_averaged_state_dict_of_an_optimizer_has_the_models_names():
    model = Net()
    optimizer = EMAOptimizer(sgd(model), decay=0.5, model=model)
    train(model, optimizer, range(3))
    found, average = optimizer.averaged_state_dict(), averaged(optimizer)
    assert list(found) == list(model.state_dict())
    assert same_bits({name: found[name] for name in average}, average)
    with optimizer.swap_ema_weights():
        assert same_bits(optimizer.averaged_state_dict(), dict(found))
    with pytest.raises(ValueError, match='Build it as EMAOptimizer'):
        EMAOptimizer(sgd(model)).averaged_state_dict()


class Alike(nn.Module):
    """Two weights of one shape; the order in which they are registered may be turned."""

    def __init__(self, names: str = 'ab') -> None:
        super().__init__()
        for name in names:
            setattr(self, name, nn.Linear(2, 2, bias=False))

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.b(self.a(inputs))


def alike(names: str, kind: str, model: Alike | None = None) -> tuple[Alike, EMAOptimizer]:
    model = Alike(names) if model is None else model
    given = model.named_parameters() if kind == 'named' else model.parameters()
    inner = torch.optim.SGD(given, lr=0.1)
    return model, EMAOptimizer(inner, decay=0.5, model=model if kind == 'model' else None)


def run(model: Alike, optimizer: EMAOptimizer, steps: int = 3) -> None:
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.ones(1, 2)).square().sum().backward()
        optimizer.step()


class TestAnotherOrder:
    """A run that is resumed with its parameters in another order."""

    def test_the_names_of_the_groups_are_the_names_of_the_average(self):
        _, optimizer = alike('ab', 'named')
        assert list(averaged(optimizer)) == ['a.weight', 'b.weight']
        assert list(averaged(alike('ab', 'plain')[1])) == ['0.0', '0.1']

    @pytest.mark.parametrize(('saved_by', 'loaded_by'), [('named', 'named'), ('named', 'model'), ('model', 'named')])
    def test_each_weight_gets_its_own_average_again_and_goes_on(self, saved_by, loaded_by):
        model, optimizer = alike('ab', saved_by)
        run(model, optimizer)
        state = saved({'model': model.state_dict(), 'optimizer': optimizer.state_dict()})
        turned, resumed = alike('ba', loaded_by)
        turned.load_state_dict(state['model'])
        resumed.load_state_dict(state['optimizer'])
        for _ in range(2):
            found = averaged(resumed)
            assert same_bits({name: found[name] for name in ('a.weight', 'b.weight')}, averaged(optimizer))
            run(model, optimizer)
            run(turned, resumed)

    def test_a_state_under_positions_is_read_by_an_optimizer_that_has_names(self):
        model, optimizer = alike('ab', 'plain')
        run(model, optimizer)
        with optimizer.swap_ema_weights():
            state = saved(optimizer.state_dict())
        _, resumed = alike('ab', 'named', model)
        resumed.load_state_dict(state)
        assert list(averaged(resumed)) == ['a.weight', 'b.weight']
        assert same_values(averaged(resumed), averaged(optimizer))
        run(model, resumed)

    def test_a_group_that_is_added_brings_its_names(self):
        model = Alike()
        optimizer = EMAOptimizer(torch.optim.SGD(model.a.named_parameters('a'), lr=0.1), decay=0.5)
        optimizer.add_param_group({'params': list(model.b.named_parameters('b'))})
        run(model, optimizer)
        assert list(averaged(optimizer)) == ['a.weight', 'b.weight']

    def test_one_name_for_two_parameters_is_no_name(self):
        first, second = nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False)
        inner = torch.optim.SGD(
            [{'params': list(first.named_parameters())}, {'params': list(second.named_parameters())}], lr=0.1
        )
        assert list(averaged(EMAOptimizer(inner))) == ['0.0', '1.0']

    def test_without_names_it_is_said_once_that_position_decides(self):
        model, optimizer = alike('ab', 'plain')
        run(model, optimizer)
        state = saved(optimizer.state_dict())
        _, resumed = alike('ab', 'plain', model)
        with pytest.warns(UserWarning, match=r'by position, and 2 of 2 parameters share.*model=') as caught:
            resumed.load_state_dict(state)
        assert [each.filename for each in caught] == [__file__]
        resumed.load_state_dict(state)  # a second warning would be an error
        with pytest.warns(UserWarning, match='by position') as caught:
            alike('ab', 'plain', model)[1].load_ema_state_dict(state['ema'])
        assert [each.filename for each in caught] == [__file__]


class TestNamesAndModels:
    """A state goes from an optimizer that knows names, or only an order, to one that knows more, or less."""

    @staticmethod
    def build(by: str, steps: int = 3) -> tuple[nn.Module, EMAOptimizer]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.Linear(3, 2))
        inner = torch.optim.SGD(model.named_parameters() if by == 'names' else model.parameters(), lr=0.1)
        optimizer = EMAOptimizer(inner, decay=0.5, model=model if by == 'model' else None)
        for step in range(steps):
            model(torch.randn(4, 2) + step).square().sum().backward()
            optimizer.step()
        return model, optimizer

    def test_a_state_without_buffers_loads_where_there_is_a_model_and_says_so(self):
        model, optimizer = self.build('names')
        twin, resumed = self.build('model', steps=1)
        twin.load_state_dict(model.state_dict())
        named = r'has no buffers.* the average of 1\.running_mean, 1\.running_var starts at the values .* update_bn'
        for load, state in (
            ('load_state_dict', optimizer.state_dict()),
            ('load_ema_state_dict', optimizer.ema_state_dict()),
        ):
            given = saved(state)
            with pytest.warns(UserWarning, match=named) as caught:
                getattr(resumed, load)(given)
            assert [warning.filename for warning in caught] == [__file__]
            assert_same(given, saved(state))
            shadow = resumed.shadow
            assert same_bits(dict(shadow.named_parameters()), dict(optimizer.shadow.named_parameters()))
            assert same_bits(dict(shadow.named_buffers()), dict(model.named_buffers()))
        twin[1].running_mean.add_(1.0)
        assert torch.equal(dict(resumed.shadow.named_buffers())['1.running_mean'], model[1].running_mean)
        resumed.load_state_dict(saved(resumed.state_dict()))  # which has buffers now; a warning would be an error

    def test_so_does_one_that_was_taken_while_the_model_held_the_average(self):
        model, optimizer = self.build('names')
        training = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        with optimizer.swap_ema_weights():
            held, state = saved(model.state_dict()), saved(optimizer.state_dict())
        twin, resumed = self.build('model', steps=0)
        twin.load_state_dict(held)
        with pytest.warns(UserWarning, match='has no buffers'):
            resumed.load_state_dict(state)
        assert same_bits(dict(twin.state_dict()), training)

    def test_one_that_has_some_of_the_buffers_is_refused(self):
        _, optimizer = self.build('model')
        state = saved(optimizer.ema_state_dict())
        del state['average']['buffers']['1.running_mean']
        with pytest.raises(ValueError, match=r'1 missing: 1\.running_mean\. Nothing was loaded'):
            self.build('model')[1].load_ema_state_dict(state)

    @pytest.mark.parametrize('by', ['names', 'model'])
    def test_names_where_there_is_an_order_only_tell_what_to_build(self, by):
        _, optimizer = self.build(by)
        _, fresh = self.build('position')
        before = copy.deepcopy(fresh.state_dict())
        with pytest.raises(
            ValueError, match=r'0\.bias, 0\.weight, 1\.bias and 3 more.* from model\.named_parameters\('
        ):
            fresh.load_state_dict(optimizer.state_dict())
        assert_same(fresh.state_dict(), before)

    def test_an_order_where_there_are_names_tells_the_way(self):
        model, optimizer = self.build('position')
        with pytest.raises(ValueError, match=r'only group and position.*and leave model= out.*Nothing was loaded'):
            self.build('model')[1].load_ema_state_dict(optimizer.ema_state_dict())
        _, between = self.build('names')
        between.load_state_dict(optimizer.state_dict())
        twin, resumed = self.build('model')
        twin.load_state_dict(model.state_dict())
        with pytest.warns(UserWarning, match='has no buffers'):
            resumed.load_state_dict(between.state_dict())
        assert_same(
            list(dict(resumed.shadow.named_parameters()).values()),
            list(dict(optimizer.shadow.named_parameters()).values()),
        )
