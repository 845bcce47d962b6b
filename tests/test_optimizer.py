"""EMAOptimizer: which average it keeps, and which arguments it refuses. Needs no Composer."""

from __future__ import annotations

import copy
import inspect
import math
import re
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from plain import STRICT, Net, One, averaged, same_bits, same_values, saved, sgd, step_to, train, weights
from torch import Tensor
from torch.optim import swa_utils

from composer_ema import EMAOptimizer, ShadowModel

pytestmark = STRICT


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
            sgd(model), 'cpu', model=model, include='weight', exclude='last', dtype='float64', backend='foreach'
        )
        shadow = dict(optimizer.shadow.named_parameters())
        assert {name: t.dtype for name, t in shadow.items()} == {'first.weight': torch.float64}
        assert optimizer.shadow._storage.settings.device == torch.device('cpu')

    def test_bfloat16_weights_are_averaged_in_float32(self):
        model = Net().bfloat16()
        assert {t.dtype for t in averaged(EMAOptimizer(sgd(model))).values()} == {torch.float32}


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

    def test_a_function_is_no_profile_whatever_it_is_called(self):
        def exponential(averaged, current, num_averaged):
            return averaged + num_averaged

        exponential.__qualname__ = 'exponential'
        model = One(8.0)
        optimizer = EMAOptimizer(torch.optim.SGD(model.parameters(), lr=1.0), every_n_steps=2, avg_fn=exponential)
        found = []
        for value in (4, 2, 9, 9):
            step_to(optimizer, model, value)
            found.append(averaged(optimizer)['0.0'].item())
        assert found == [4, 2, 2, 3]

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
            if step >= start and (step - start) % interval == 0:
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
            (
                {'average': 'mean'},
                ValueError,
                r"average must be 'exponential' or 'equal', got 'mean'\. For any other pass avg_fn",
            ),
            ({'average': 'equal', 'decay': 0.9}, ValueError, r'decay=0\.9 has no effect on an equal average\. Leave'),
            ({'average': 'equal', 'half_life': 10}, ValueError, r'half_life=10 has no effect on an equal average'),
            ({'average': 'equal', 'bias_correction': True}, ValueError, r'bias_correction=True has no effect'),
            ({'avg_fn': torch.lerp, 'decay': 0.9}, ValueError, r'decay=0\.9 has no effect on an average by a function'),
            ({'avg_fn': torch.lerp, 'average': 'equal'}, ValueError, r"either average='equal' or a function, got both"),
            ({'avg_fn': torch.lerp, 'multi_avg_fn': torch.lerp}, ValueError, r'either avg_fn or multi_avg_fn'),
            ({'avg_fn': torch.lerp, 'skip_nonfinite': True}, ValueError, r'skip_nonfinite=True has no effect'),
            ({'avg_fn': 0.9}, TypeError, r'avg_fn must be a function'),
            ({'start': -1}, ValueError, r'start must be a whole number of at least 0, got -1'),
            ({'start': 1.5}, TypeError, r'start must be a whole number of at least 0, got 1\.5'),
        ],
    )
    def test_what_contradicts_is_refused(self, options, error, message):
        with pytest.raises(error, match=message):
            EMAOptimizer(sgd(Net()), **options)


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
            ({'half_life': True}, TypeError, 'number of steps'),
            ({'every_n_steps': 0}, ValueError, 'at least 1'),
            ({'every_n_steps': 1.0}, TypeError, 'whole number'),
            ({'decay': 1, 'bias_correction': True}, ValueError, r'never moves, got decay=1\. Pass a value below 1'),
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


def test_the_card_names_every_argument():
    card = (Path(__file__).parents[1] / 'method_cards' / 'ema_optimizer.md').read_text()
    arguments = set(inspect.signature(EMAOptimizer.__init__).parameters) - {'self'}
    assert arguments <= set(re.findall(r'`(\w+)`', card))


def test_it_uses_the_shadow_that_users_have():
    assert isinstance(EMAOptimizer(sgd(Net())).shadow, ShadowModel)
