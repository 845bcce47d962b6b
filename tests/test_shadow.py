"""The averaged copy: what it tracks, how it moves, swaps, is saved and read back."""

import copy
import gc
import math
import pickle
import weakref

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from plain import saved
from torch import nn

from composer_ema import ShadowModel
from composer_ema.model.inventory import Inventory

pytestmark = pytest.mark.filterwarnings(
    'error',
    'ignore::DeprecationWarning:torch',  # torch.compile of newer releases calls what torch itself deprecates
    'ignore:Implicitly cleaning up:ResourceWarning',  # a folder of a Composer Trainer that another test has left
)


class Net(nn.Module):
    """Two layers around a BatchNorm, with a buffer of every kind."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3, 4)
        self.norm = nn.BatchNorm1d(4)
        self.last = nn.Linear(4, 2)
        self.register_buffer('mask', torch.tensor([True, False]))
        self.register_buffer('cache', torch.zeros(2), persistent=False)


class One(nn.Module):
    """One parameter; for sums done by hand."""

    def __init__(self, value: float = 0.0, **options) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([value], **options))


@pytest.fixture
def net() -> Net:
    torch.manual_seed(0)
    return Net()


def move(model: nn.Module, seed: int = 1) -> None:
    """Does to a model what a batch of training does: new parameters, new statistics."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in [*model.parameters(), *model.buffers()]:
            if tensor.is_floating_point() or tensor.is_complex():
                tensor.add_(torch.randn(tensor.shape, generator=generator).to(tensor.dtype))
            elif tensor.dtype == torch.bool:
                tensor.logical_not_()
            else:
                tensor.add_(1)


def set_(tensor: torch.Tensor, value: float) -> None:
    with torch.no_grad():
        tensor.fill_(value)


def tensors(shadow: ShadowModel) -> dict[str, torch.Tensor]:
    return {**dict(shadow.named_parameters()), **dict(shadow.named_buffers())}


def frozen_copy(source: ShadowModel | nn.Module) -> dict[str, torch.Tensor]:
    found = tensors(source) if isinstance(source, ShadowModel) else Inventory.of(source).tensors()
    return {name: tensor.detach().clone() for name, tensor in found.items()}


def same_bits(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(
        first[name].dtype == second[name].dtype
        and first[name].shape == second[name].shape
        and first[name]
        .contiguous()
        .view(-1)
        .view(torch.uint8)
        .equal(second[name].contiguous().view(-1).view(torch.uint8))
        for name in first
    )


class TestUpdating:
    def test_three_updates_by_hand(self):
        model = One(8.0)
        shadow = ShadowModel(model)
        for value, smoothing, expected in ((0, 0.5, 4), (0, 0.75, 3), (11, 0.5, 7)):
            set_(model.weight, value)
            shadow.update(model, smoothing=smoothing)
            assert next(shadow.parameters()).item() == expected
        assert shadow.num_updates == 3

    def test_a_new_shadow_holds_the_weights_in_memory_of_its_own(self, net):
        shadow = ShadowModel(net)
        assert same_bits(frozen_copy(shadow), frozen_copy(net))
        addresses = {t.data_ptr() for t in Inventory.of(net).tensors().values()}
        assert not addresses & {t.data_ptr() for t in tensors(shadow).values()}
        assert shadow.num_updates == 0

    def test_a_smoothing_of_zero_copies_every_bit(self, net):
        shadow = ShadowModel(net)
        move(net)
        shadow.update(net, smoothing=0)
        assert same_bits(frozen_copy(shadow), frozen_copy(net))

    def test_a_smoothing_of_zero_copies_over_what_is_not_finite(self):
        model = One(math.nan)
        shadow = ShadowModel(model)
        set_(model.weight, 2)
        shadow.update(model, smoothing=0)
        assert next(shadow.parameters()).item() == 2

    def test_a_smoothing_of_one_freezes_the_average_and_copies_counters(self, net):
        shadow = ShadowModel(net)
        before = frozen_copy(shadow)
        move(net)
        shadow.update(net, smoothing=1)
        after = frozen_copy(shadow)
        counters = {'norm.num_batches_tracked', 'mask', 'cache'}
        assert same_bits({n: t for n, t in before.items() if n not in counters}, {
            n: t for n, t in after.items() if n not in counters
        })  # fmt: skip
        assert after['norm.num_batches_tracked'] == 1
        assert after['mask'].tolist() == [False, True]

    def test_the_model_is_only_read(self, net):
        shadow = ShadowModel(net)
        move(net)
        before = frozen_copy(net)
        shadow.update(net, smoothing=0.5)
        assert same_bits(before, frozen_copy(net))

    def test_weight_is_one_minus_smoothing(self, net):
        first, second = ShadowModel(net), ShadowModel(net)
        move(net)
        first.update(net, smoothing=0.75)
        second.update(net, weight=0.25)
        assert same_bits(frozen_copy(first), frozen_copy(second))

    @given(smoothings=st.lists(st.floats(0, 1), min_size=1, max_size=8), seed=st.integers(0, 100))
    @settings(deadline=None, max_examples=40)
    def test_any_run_of_updates_equals_the_formula_in_float64(self, smoothings, seed):
        model = nn.Linear(3, 2).double()
        move(model, seed)
        shadow = ShadowModel(model)
        expected = frozen_copy(model)
        for step, smoothing in enumerate(smoothings):
            move(model, step)
            shadow.update(model, smoothing=smoothing)
            for name, tensor in model.named_parameters():
                expected[name] = smoothing * expected[name] + (1 - smoothing) * tensor.detach()
        for name, tensor in shadow.named_parameters():
            torch.testing.assert_close(tensor, expected[name], rtol=1e-13, atol=1e-13)

    @given(value=st.floats(-1e3, 1e3, width=32), start=st.floats(-1e3, 1e3, width=32), smoothing=st.floats(0, 1))
    @settings(deadline=None)
    def test_the_average_never_leaves_the_range_of_the_weights(self, value, start, smoothing):
        model = One(start)
        shadow = ShadowModel(model)
        set_(model.weight, value)
        for _ in range(3):
            shadow.update(model, smoothing=smoothing)
        slack = 1e-6 * max(abs(value), abs(start))
        assert min(value, start) - slack <= next(shadow.parameters()).item() <= max(value, start) + slack

    @pytest.mark.parametrize('backend', ['auto', 'foreach', 'reference'])
    def test_every_backend_gives_the_same_average(self, net, backend):
        shadow = ShadowModel(net, backend=backend)
        before = frozen_copy(shadow)
        move(net)
        shadow.update(net, smoothing=0.9)
        live = frozen_copy(net)
        for name, tensor in shadow.named_parameters():
            torch.testing.assert_close(tensor, 0.9 * before[name] + 0.1 * live[name])

    @pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64])
    def test_16_bit_weights_are_averaged_in_float32_and_others_in_their_own_dtype(self, dtype):
        model = nn.Module()
        model.weight = nn.Parameter(torch.randn(3, 2).to(dtype))
        shadow = ShadowModel(model)
        wide = torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype
        assert {t.dtype for t in shadow.parameters()} == {wide}
        widest = torch.complex128 if dtype.is_complex else torch.float64
        expected = {name: tensor.detach().to(widest, copy=True) for name, tensor in model.named_parameters()}
        for step in range(5):
            move(model, step)
            shadow.update(model, smoothing=0.9)
            for name, tensor in model.named_parameters():
                expected[name] = 0.9 * expected[name] + 0.1 * tensor.detach().to(widest)
        for name, tensor in shadow.named_parameters():
            torch.testing.assert_close(tensor.to(widest), expected[name], rtol=2e-6, atol=2e-6)

    def test_after_one_half_life_a_bfloat16_model_has_covered_half_of_a_step(self):
        model = One(1.0, dtype=torch.bfloat16)
        shadow = ShadowModel(model)
        set_(model.weight, 2)
        for _ in range(1000):
            shadow.update(model, smoothing=2 ** (-1 / 1000))
        assert next(shadow.parameters()).item() == pytest.approx(1.5, rel=1e-3)

    @pytest.mark.parametrize(
        'tensor',
        [
            torch.randn(()),
            torch.randn(0, 3),
            torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
            torch.randn(4, 6).t(),
            torch.randn(8, 6)[::2, ::3],
            torch.randn(3).to(torch.complex64),
        ],
        ids=['scalar', 'empty', 'channels_last', 'transposed', 'strided', 'complex'],
    )
    @pytest.mark.parametrize('dtype', [None, torch.bfloat16, torch.float64])
    def test_any_layout_is_averaged_and_swapped(self, tensor, dtype):
        if dtype is not None and tensor.is_complex():
            pytest.skip('complex weights have no 16 bit form')
        model = nn.Module()
        model.weight = nn.Parameter(tensor.to(dtype=dtype).detach())
        shadow = ShadowModel(model)
        start = model.weight.detach().clone()
        move(model)
        moved = model.weight.detach().clone()
        shadow.update(model, smoothing=0.5)
        average = next(shadow.parameters()).clone()
        assert average.shape == tensor.shape
        torch.testing.assert_close(average, ((start.to(average.dtype) + moved.to(average.dtype)) / 2))
        with shadow.swapped(model):
            assert torch.equal(model.weight, average.to(model.weight.dtype))
        assert torch.equal(model.weight, moved)

    def test_another_instance_of_the_architecture_can_be_followed(self, net):
        shadow = ShadowModel(net)
        other = Net()
        shadow.update(other, smoothing=0)
        assert same_bits(frozen_copy(shadow), frozen_copy(other))

    def test_wrapped_and_bare_are_the_same_model(self, net):
        shadow = ShadowModel(torch.compile(net))
        shadow.update(net, smoothing=0.5)
        shadow.update(torch.optim.swa_utils.AveragedModel(net), smoothing=0.5)
        assert shadow.num_updates == 2
        assert set(dict(shadow.named_parameters())) == set(dict(net.named_parameters()))

    def test_a_model_of_another_architecture_is_refused_with_the_names(self, net):
        shadow = ShadowModel(net)
        other = Net()
        del other.first
        other.last = nn.Linear(4, 5)
        before = frozen_copy(shadow)
        with pytest.raises(
            ValueError, match=r'2 missing: first\.bias, first\.weight; 2 of another shape or kind: last\.bias'
        ):
            shadow.update(other, smoothing=0.5)
        assert same_bits(before, frozen_copy(shadow))
        assert shadow.num_updates == 0
        shadow.update(net, smoothing=0.5)

    @pytest.mark.parametrize('smoothing', [-0.1, 1.1, math.nan])
    def test_a_smoothing_out_of_range_changes_nothing(self, net, smoothing):
        shadow = ShadowModel(net)
        move(net)
        before = frozen_copy(shadow)
        with pytest.raises(ValueError, match=rf'smoothing must lie in \[0, 1\], got {smoothing}'):
            shadow.update(net, smoothing=smoothing)
        assert same_bits(before, frozen_copy(shadow))

    @pytest.mark.parametrize('arguments', [{}, {'smoothing': 0.5, 'weight': 0.5}])
    def test_exactly_one_of_smoothing_and_weight(self, net, arguments):
        with pytest.raises(TypeError, match='either smoothing or weight'):
            ShadowModel(net).update(net, **arguments)

    @pytest.mark.parametrize('weight', ['half', True])
    def test_a_weight_that_is_no_number_is_refused(self, net, weight):
        with pytest.raises(TypeError, match='weight must be a number'):
            ShadowModel(net).update(net, weight=weight)

    def test_after_the_first_update_no_module_is_walked(self, net, monkeypatch):
        shadow = ShadowModel(net)
        shadow.update(net, smoothing=0.5)
        for name in ('named_modules', 'modules', 'named_parameters', 'parameters', 'named_buffers', 'buffers'):
            monkeypatch.setattr(nn.Module, name, lambda *_, **__: pytest.fail('walked the model'))
        shadow.update(net, smoothing=0.5)

    def test_after_the_first_update_nothing_is_allocated(self, net):
        net.last.to(torch.bfloat16)
        shadow = ShadowModel(net)
        shadow.update(net, smoothing=0.5)
        activities = [torch.profiler.ProfilerActivity.CPU]
        with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
            shadow.update(net, smoothing=0.5)
            shadow.update(net, smoothing=0.0)
        assert [e.name for e in profile.events() if e.cpu_memory_usage > 0] == []


class TestWhatIsTracked:
    def test_frozen_parameters_cost_no_memory(self, net):
        net.first.requires_grad_(False)
        shadow = ShadowModel(net)
        assert not [name for name in tensors(shadow) if name.startswith('first')]
        shadow.update(net, smoothing=0.5)
        assert not [name for name in tensors(shadow) if name.startswith('first')]

    def test_frozen_parameters_are_read_live(self, net):
        net.first.requires_grad_(False)
        shadow = ShadowModel(net)
        shadow.update(net, smoothing=0.5)
        set_(net.first.weight, 42)
        with shadow.swapped(net):
            assert bool((net.first.weight == 42).all())
            set_(net.first.weight, 43)
        assert bool((net.first.weight == 43).all())

    def test_a_parameter_unfrozen_joins_at_its_value_then(self):
        model = nn.Linear(1, 1)
        model.weight.requires_grad_(False)
        shadow = ShadowModel(model)
        for value in (1.0, 2.0, 3.0):
            set_(model.weight, value)
            set_(model.bias, value)
            shadow.update(model, smoothing=0.5)
        model.weight.requires_grad_(True)
        set_(model.weight, 8)
        shadow.update(model, smoothing=0.5)
        assert dict(shadow.named_parameters())['weight'].item() == 8
        set_(model.weight, 4)
        shadow.update(model, smoothing=0.5)
        assert dict(shadow.named_parameters())['weight'].item() == 6

    def test_a_parameter_frozen_in_the_run_stays_tracked(self):
        model = One(0.0)
        shadow = ShadowModel(model)
        set_(model.weight, 8)
        model.weight.requires_grad_(False)
        for expected in (4, 6, 7):
            shadow.update(model, smoothing=0.5)
            assert next(shadow.parameters()).item() == expected

    def test_all_frozen_then_all_unfrozen(self, net):
        net.requires_grad_(False)
        with pytest.warns(UserWarning, match='no trainable parameter to average yet'):
            shadow = ShadowModel(net)
        shadow.update(net, smoothing=0.5)
        assert not list(shadow.parameters())
        with shadow.swapped(net):
            pass
        shadow.copy_to(net)
        assert shadow.relative_distance(net).item() == 0
        net.requires_grad_(True)
        shadow.update(net, smoothing=0.5)
        assert len(list(shadow.parameters())) == 6

    def test_tied_weights_are_averaged_once(self):
        model = nn.Sequential(nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False))
        model[1].weight = model[0].weight
        set_(model[0].weight, 0)
        shadow = ShadowModel(model)
        set_(model[0].weight, 8)
        shadow.update(model, smoothing=0.5)
        assert {name: t.item() for name, t in shadow.named_parameters()} == {'0.weight': 4}
        with shadow.swapped(model):
            assert model[1].weight.item() == 4
        assert model[1].weight.item() == 8

    def test_a_module_used_twice_is_averaged_once(self):
        block = nn.BatchNorm1d(2)
        model = nn.Sequential(block, block)
        shadow = ShadowModel(model)
        set_(block.running_mean, 8)
        shadow.update(model, smoothing=0.5)
        assert dict(shadow.named_buffers())['0.running_mean'].tolist() == [4, 4]
        assert set(tensors(shadow)) == {
            f'0.{n}' for n in ('weight', 'bias', 'running_mean', 'running_var', 'num_batches_tracked')
        }

    def test_weights_tied_in_the_run_are_refused_by_name(self):
        model = nn.Sequential(nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False))
        shadow = ShadowModel(model)
        model[1].weight = model[0].weight
        with pytest.raises(ValueError, match=r'1 missing: 1\.weight'):
            shadow.update(model, smoothing=0.5)

    @pytest.mark.parametrize(
        'replace',
        [
            lambda m: setattr(m.first, 'weight', nn.Parameter(m.first.weight.detach().clone())),
            lambda m: setattr(m.first.weight, 'data', m.first.weight.detach().clone()),
            lambda m: setattr(m, 'first', nn.Linear(3, 4)),
            lambda m: setattr(m, 'norm', nn.BatchNorm1d(4)),
            lambda m: setattr(m.norm, 'running_mean', m.norm.running_mean.clone()),
            lambda m: m.to(torch.float64).to(torch.float32),
            lambda m: m.load_state_dict(copy.deepcopy(m.state_dict()), assign=True),
        ],
        ids=['parameter', 'data', 'module', 'norm', 'buffer', 'cast', 'load assign'],
    )
    def test_replaced_tensors_are_noticed(self, net, replace):
        shadow = ShadowModel(net)
        shadow.update(net, smoothing=0.5)
        replace(net)
        move(net)
        before, live = frozen_copy(shadow), frozen_copy(net)
        shadow.update(net, smoothing=0.5)
        for name, tensor in tensors(shadow).items():
            if tensor.is_floating_point() and name != 'cache':
                torch.testing.assert_close(tensor, (before[name] + live[name]) / 2)

    def test_parts_added_in_the_run_join(self, net):
        shadow = ShadowModel(net)
        shadow.update(net, smoothing=0.5)
        net.adapter = nn.Linear(2, 2)
        shadow.update(net, smoothing=0.5)
        assert 'adapter.weight' in dict(shadow.named_parameters())

    def test_include_and_exclude_choose_by_name(self, net):
        shadow = ShadowModel(net, include=[r'^first\.', 'norm'], exclude=r'bias$')
        assert set(tensors(shadow)) == {
            'first.weight', 'norm.weight', 'norm.running_mean', 'norm.running_var', 'norm.num_batches_tracked',
        }  # fmt: skip
        shadow.update(net, smoothing=0.5)
        net.requires_grad_(False).requires_grad_(True)
        shadow.update(net, smoothing=0.5)
        assert len(tensors(shadow)) == 5

    def test_what_is_not_selected_is_not_swapped(self, net):
        shadow = ShadowModel(net, exclude='last')
        move(net)
        last, first = net.last.weight.detach().clone(), net.first.weight.detach().clone()
        with shadow.swapped(net):
            assert torch.equal(net.last.weight, last)
            assert not torch.equal(net.first.weight, first)

    @pytest.mark.parametrize('argument', ['include', 'exclude'])
    def test_a_pattern_without_a_match_is_an_error(self, net, argument):
        with pytest.raises(ValueError, match=rf"{argument} pattern 'frist' matches none"):
            ShadowModel(net, **{argument: 'frist'})

    @pytest.mark.parametrize(
        ('arguments', 'message'),
        [
            ({'buffers': 'mean'}, "buffers must be 'statistics', 'average', 'copy', or .*, got 'mean'"),
            ({'dtype': 'float33'}, "must be float64, float32, bfloat16 or float16, got 'float33'"),
            ({'dtype': torch.int64}, 'must be float64, float32, bfloat16 or float16, got torch.int64'),
            ({'dtype': 'nn'}, "got 'nn'"),
            ({'device': 'abacus'}, "device must be one such as 'cpu' or 'cuda:0', got 'abacus'"),
        ],
    )
    def test_arguments_out_of_range_name_value_and_rule(self, net, arguments, message):
        with pytest.raises(ValueError, match=message):
            ShadowModel(net, **arguments)

    def test_an_unknown_backend_is_refused_when_built(self, net):
        with pytest.raises(ValueError, match=r"backend must be 'auto', .* got 'abacus'"):
            ShadowModel(net, backend='abacus')

    def test_under_inference_mode_the_shadow_is_an_ordinary_tensor(self):
        with torch.inference_mode():
            model = nn.Linear(2, 2)
            shadow = ShadowModel(model)
            shadow.update(model, smoothing=0.5)
        assert not any(tensor.is_inference() for tensor in shadow.parameters())
        shadow.update(nn.Linear(2, 2), smoothing=0.5)

    def test_a_model_trained_outside_can_be_updated_and_swapped_under_inference_mode(self, net):
        shadow = ShadowModel(net)
        before = frozen_copy(net)
        with torch.inference_mode():
            shadow.update(net, smoothing=0.5)
            with shadow.swapped(net):
                pass
        assert same_bits(before, frozen_copy(net))
        (net.last.weight.sum() * 2).backward()

    def test_shadows_take_no_part_in_autograd(self, net):
        shadow = ShadowModel(net)
        shadow.update(net, smoothing=0.5)
        assert not any(tensor.requires_grad for tensor in shadow.parameters())
        with shadow.swapped(net):
            assert all(parameter.requires_grad and parameter.is_leaf for parameter in net.parameters())


class TestBuffers:
    def test_floating_buffers_are_averaged_by_default_and_others_copied(self, net):
        shadow = ShadowModel(net)
        set_(net.norm.running_mean, 8)
        net.norm.num_batches_tracked += 7
        net.mask.logical_not_()
        shadow.update(net, smoothing=0.75)
        buffers = dict(shadow.named_buffers())
        assert buffers['norm.running_mean'].tolist() == [2] * 4
        assert buffers['norm.num_batches_tracked'].item() == 7
        assert buffers['mask'].tolist() == [False, True]

    def test_copy_takes_the_latest_of_all(self, net):
        shadow = ShadowModel(net, buffers='copy')
        set_(net.norm.running_mean, 8)
        set_(net.first.weight, 8)
        shadow.update(net, smoothing=0.75)
        assert dict(shadow.named_buffers())['norm.running_mean'].tolist() == [8] * 4
        assert not (dict(shadow.named_parameters())['first.weight'] == 8).any()

    def test_buffers_are_swapped_and_restored(self, net):
        shadow = ShadowModel(net)
        move(net)
        before = frozen_copy(net)
        with shadow.swapped(net):
            assert net.norm.running_mean.tolist() == [0] * 4
            net.norm(torch.randn(5, 4))  # moves the statistics that the average lent, and counts a batch
        assert net.norm.num_batches_tracked == before['norm.num_batches_tracked'] + 1  # as it would without a swap
        net.norm.num_batches_tracked -= 1
        assert same_bits(before, frozen_copy(net))

    def test_a_buffer_that_changes_shape_while_swapped_keeps_its_new_value(self, net):
        shadow = ShadowModel(net)
        shadow.swap_in(net)
        net.cache = torch.arange(5.0)
        shadow.swap_out(net)
        assert net.cache.tolist() == [0, 1, 2, 3, 4]
        shadow.update(net, smoothing=0.5)
        assert dict(shadow.named_buffers())['cache'].tolist() == [0, 1, 2, 3, 4]

    def test_a_buffer_that_changes_shape_between_updates_joins_at_its_value(self, net):
        shadow = ShadowModel(net)
        shadow.update(net, smoothing=0.5)
        net.cache = torch.full((7,), 3.0)
        shadow.update(net, smoothing=0.5)
        assert dict(shadow.named_buffers())['cache'].tolist() == [3] * 7
        with shadow.swapped(net):
            assert net.cache.tolist() == [3] * 7

    def test_a_buffer_that_goes_and_comes_back(self, net):
        shadow = ShadowModel(net)
        cache, net.cache = net.cache, None
        shadow.update(net, smoothing=0.5)
        with shadow.swapped(net):
            assert net.cache is None
        net.cache = cache
        shadow.update(net, smoothing=0.5)

    def test_a_buffer_of_another_dtype_takes_the_average(self, net):
        shadow = ShadowModel(net)
        net.norm.running_mean = net.norm.running_mean.to(torch.bfloat16)
        shadow.update(net, smoothing=0.5)
        with shadow.swapped(net):
            assert net.norm.running_mean.dtype == torch.bfloat16


class TestSwapping:
    @pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16, torch.float16, torch.float64])
    @pytest.mark.parametrize('shadow_dtype', [None, torch.bfloat16, torch.float64])
    def test_swap_in_then_out_restores_every_bit_of_both(self, net, dtype, shadow_dtype):
        net.to(dtype)
        shadow = ShadowModel(net, dtype=shadow_dtype)
        for step in range(3):
            move(net, step)
            shadow.update(net, smoothing=0.75)
        weights, average = frozen_copy(net), frozen_copy(shadow)
        for _ in range(2):
            shadow.swap_in(net)
            assert shadow.is_swapped
            assert same_bits(frozen_copy(net), {n: t.to(weights[n].dtype) for n, t in average.items()})
            shadow.swap_out(net)
            assert not shadow.is_swapped
            assert same_bits(frozen_copy(net), weights)
            assert same_bits(frozen_copy(shadow), average)

    def test_swapping_writes_in_place(self, net):
        shadow = ShadowModel(net)
        before = {name: (id(t), t.data_ptr()) for name, t in Inventory.of(net).tensors().items()}
        with shadow.swapped(net):
            pass
        assert {name: (id(t), t.data_ptr()) for name, t in Inventory.of(net).tensors().items()} == before

    def test_swapped_lends_the_model_and_restores_it_after_an_exception(self, net):
        shadow = ShadowModel(net)
        move(net)
        weights = frozen_copy(net)

        def evaluate_and_fail() -> None:
            with shadow.swapped(net) as lent:
                assert lent is net
                assert not same_bits(frozen_copy(net), weights)
                raise KeyError('in the middle')

        with pytest.raises(KeyError, match='in the middle'):
            evaluate_and_fail()
        assert same_bits(frozen_copy(net), weights)
        assert not shadow.is_swapped

    def test_swapped_out_by_hand_inside_is_fine(self, net):
        shadow = ShadowModel(net)
        with shadow.swapped(net):
            shadow.swap_out(net)
        assert not shadow.is_swapped

    def test_an_update_while_swapped_is_refused_with_the_remedy(self, net):
        shadow = ShadowModel(net)
        shadow.swap_in(net)
        before = frozen_copy(shadow)
        with pytest.raises(RuntimeError, match=r'Call swap_out\(model\) first'):
            shadow.update(net, smoothing=0.5)
        assert same_bits(before, frozen_copy(shadow))
        assert shadow.num_updates == 0

    def test_swapping_in_twice_is_refused_and_loses_nothing(self, net):
        shadow = ShadowModel(net)
        move(net)
        weights = frozen_copy(net)
        shadow.swap_in(net)
        with pytest.raises(RuntimeError, match=r'swapped in already\. Call swap_out'):
            shadow.swap_in(net)
        shadow.swap_out(net)
        assert same_bits(frozen_copy(net), weights)

    def test_swapping_out_first_is_refused(self, net):
        with pytest.raises(RuntimeError, match='nothing is swapped in'):
            ShadowModel(net).swap_out(net)

    def test_swapping_out_of_another_model_is_refused(self, net):
        shadow = ShadowModel(net)
        shadow.swap_in(net)
        with pytest.raises(RuntimeError, match='swapped into another model'):
            shadow.swap_out(copy.deepcopy(net))
        shadow.swap_out(net)

    def test_swapping_out_of_a_wrapped_model_is_swapping_out_of_the_model(self, net):
        shadow = ShadowModel(net)
        shadow.swap_in(net)
        shadow.swap_out(torch.compile(net))
        assert not shadow.is_swapped

    def test_a_swap_in_that_fails_half_way_restores_the_weights(self, net, monkeypatch):
        shadow = ShadowModel(net)
        move(net)
        weights = frozen_copy(net)
        copy_, calls = torch._foreach_copy_, []

        def fails_once(targets, sources):
            calls.append(len(targets))
            if len(calls) == 1:
                copy_(targets[:2], sources[:2])
                raise RuntimeError('out of memory')
            copy_(targets, sources)

        monkeypatch.setattr(torch, '_foreach_copy_', fails_once)
        with pytest.raises(RuntimeError, match='out of memory'):
            shadow.swap_in(net)
        assert not shadow.is_swapped
        assert same_bits(frozen_copy(net), weights)

    def test_training_weights_are_the_stash_while_swapped(self, net):
        shadow = ShadowModel(net)
        move(net)
        weights = frozen_copy(net)
        assert same_bits({n: t.clone() for n, t in shadow.training_weights(net).items()}, weights)
        with shadow.swapped(net):
            assert same_bits(shadow.training_weights(net), weights)

    def test_parameters_replaced_while_swapped_get_the_training_weights(self, net):
        shadow = ShadowModel(net)
        move(net)
        weights = frozen_copy(net)
        shadow.swap_in(net)
        net.first.weight = nn.Parameter(net.first.weight.detach().clone())
        shadow.swap_out(net)
        assert same_bits(frozen_copy(net), weights)

    def test_a_parameter_frozen_or_unfrozen_while_swapped_is_restored(self, net):
        shadow = ShadowModel(net)
        move(net)
        weights = frozen_copy(net)
        shadow.swap_in(net)
        net.first.requires_grad_(False)
        shadow.swap_out(net)
        assert same_bits(frozen_copy(net), weights)

    def test_a_lost_parameter_is_named_and_the_stash_is_kept(self, net):
        shadow = ShadowModel(net)
        shadow.swap_in(net)
        last = net.last
        net.last = None
        with pytest.raises(RuntimeError, match=r'lost last\.bias'):
            shadow.swap_out(net)
        net.last = last
        shadow.swap_out(net)


class TestCopyTo:
    def test_the_average_overwrites_another_model(self, net):
        shadow = ShadowModel(net)
        move(net)
        shadow.update(net, smoothing=0.5)
        other = Net()
        shadow.copy_to(other)
        assert same_bits(frozen_copy(other), frozen_copy(shadow))

    def test_frozen_and_excluded_tensors_stay(self, net):
        net.first.requires_grad_(False)
        shadow = ShadowModel(net, exclude='last')
        other = Net()
        before = frozen_copy(other)
        shadow.copy_to(other)
        assert torch.equal(other.first.weight, before['first.weight'])
        assert torch.equal(other.last.weight, before['last.weight'])

    def test_the_model_that_holds_the_average_over_a_stash_is_refused(self, net):
        shadow = ShadowModel(net)
        move(net)
        weights = frozen_copy(net)
        shadow.swap_in(net)
        with pytest.raises(RuntimeError, match='over a stash'):
            shadow.copy_to(net)
        shadow.copy_to(Net())
        shadow.swap_out(net)
        assert same_bits(frozen_copy(net), weights)

    def test_a_model_that_does_not_fit_is_left_alone(self, net):
        shadow = ShadowModel(net)
        move(net)
        other = Net()
        other.last = nn.Linear(4, 3)
        before = frozen_copy(other)
        with pytest.raises(ValueError, match=r'2 of another shape or kind: last\.bias'):
            shadow.copy_to(other)
        assert same_bits(before, frozen_copy(other))


DUPLICATES = [copy.deepcopy, lambda shadow: pickle.loads(pickle.dumps(shadow))]


class TestCopies:
    @pytest.mark.parametrize('duplicate', DUPLICATES, ids=['deepcopy', 'pickle'])
    def test_a_copy_goes_its_own_way(self, net, duplicate):
        shadow = ShadowModel(net, exclude='last')
        move(net)
        shadow.update(net, smoothing=0.5)
        twin = duplicate(shadow)
        assert same_bits(frozen_copy(shadow), frozen_copy(twin))
        assert twin.num_updates == 1
        before = frozen_copy(shadow)
        twin.update(net, smoothing=0.5)
        assert same_bits(before, frozen_copy(shadow))
        shadow.update(net, smoothing=0.5)
        assert same_bits(frozen_copy(twin), frozen_copy(shadow))

    @pytest.mark.parametrize('duplicate', DUPLICATES, ids=['deepcopy', 'pickle'])
    def test_a_copy_made_while_swapped_is_not_swapped(self, net, duplicate):
        shadow = ShadowModel(net)
        move(net)
        average = frozen_copy(shadow)
        shadow.swap_in(net)
        twin = duplicate(shadow)
        assert not twin.is_swapped
        assert same_bits(frozen_copy(twin), average)
        assert shadow.is_swapped
        shadow.swap_out(net)
        twin.update(net, smoothing=0.5)

    def test_a_model_and_its_shadow_are_copied_together(self, net):
        pair = {'model': net, 'shadow': ShadowModel(net)}
        pair['shadow'].update(net, smoothing=0.5)
        twins = copy.deepcopy(pair)
        move(twins['model'])
        twins['shadow'].update(twins['model'], smoothing=0)
        assert same_bits(frozen_copy(twins['shadow']), frozen_copy(twins['model']))
        assert not same_bits(frozen_copy(pair['shadow']), frozen_copy(twins['shadow']))

    def test_a_shadow_from_tensors_follows_a_model_with_these_names(self, net):
        given = {name: torch.zeros_like(p) for name, p in net.named_parameters()}
        shadow = ShadowModel.from_tensors(given, {'norm.running_mean': torch.zeros(4)})
        for tensor in net.parameters():
            set_(tensor, 8)
        shadow.update(net, smoothing=0.75)
        assert all((tensor == 2).all() for tensor in shadow.parameters())
        assert not any(tensor.any() for tensor in given.values())


class TestMoving:
    def test_to_casts_floating_tensors_and_stays_there(self, net):
        shadow = ShadowModel(net)
        assert shadow.to(dtype='float64') is shadow
        shadow.update(net, smoothing=0.5)
        assert {t.dtype for t in shadow.parameters()} == {torch.float64}
        assert dict(shadow.named_buffers())['norm.num_batches_tracked'].dtype == torch.int64
        assert dict(shadow.named_buffers())['mask'].dtype == torch.bool
        net.requires_grad_(False)
        with pytest.warns(UserWarning, match='no trainable parameter'):
            fresh = ShadowModel(net).to(dtype=torch.float64)
        net.requires_grad_(True)
        fresh.update(net, smoothing=0.5)
        assert {t.dtype for t in fresh.parameters()} == {torch.float64}

    def test_to_a_device_and_dtype_by_position(self, net):
        shadow = ShadowModel(net).to('cpu', torch.bfloat16)
        assert {(t.device.type, t.dtype) for t in shadow.parameters()} == {('cpu', torch.bfloat16)}

    def test_to_nothing_changes_nothing(self, net):
        shadow = ShadowModel(net)
        before = frozen_copy(shadow)
        shadow.to()
        assert same_bits(before, frozen_copy(shadow))

    @pytest.mark.parametrize('dtype', ['bfloat16', torch.bfloat16, 'torch.bfloat16'])
    def test_the_dtype_can_be_named(self, net, dtype):
        assert {t.dtype for t in ShadowModel(net, dtype=dtype).parameters()} == {torch.bfloat16}

    def test_casting_while_swapped_keeps_the_training_weights(self, net):
        shadow = ShadowModel(net)
        move(net)
        weights = frozen_copy(net)
        shadow.swap_in(net)
        shadow.to(dtype=torch.bfloat16)
        shadow.swap_out(net)
        assert same_bits(frozen_copy(net), weights)

    def test_complex_weights_keep_their_dtype(self):
        shadow = ShadowModel(One(1.0, dtype=torch.complex64), dtype=torch.float64)
        assert {t.dtype for t in shadow.parameters()} == {torch.complex64}

    @pytest.mark.gpu
    @pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a CUDA device')
    def test_the_shadow_follows_its_model_to_the_gpu_and_back(self, net):
        shadow = ShadowModel(net)
        for device in ('cuda', 'cpu'):
            net.to(device)
            move(net.cpu())
            net.to(device)
            before, live = {n: t.cpu() for n, t in frozen_copy(shadow).items()}, frozen_copy(net)
            shadow.update(net, smoothing=0.5)
            shadow.wait()
            for name, tensor in shadow.named_parameters():
                assert tensor.device.type == device
                torch.testing.assert_close(tensor.cpu(), (before[name] + live[name].cpu()) / 2)


class TestRelativeDistance:
    def test_by_hand(self):
        model = nn.Linear(1, 1)
        set_(model.weight, 0)
        set_(model.bias, 0)
        shadow = ShadowModel(model)
        set_(model.weight, 3)
        set_(model.bias, 4)
        assert shadow.relative_distance(model).item() == 1
        shadow.update(model, smoothing=0.25)
        distance = shadow.relative_distance(model)
        assert distance.item() == pytest.approx(0.25)
        assert distance.dtype == torch.float64
        assert distance.shape == ()

    def test_equal_weights_have_no_distance(self, net):
        assert ShadowModel(net).relative_distance(net).item() == 0

    def test_zero_weights_have_none_from_zero_and_infinite_from_others(self):
        model = One(0.0)
        shadow = ShadowModel(model)
        assert shadow.relative_distance(model).item() == 0
        set_(model.weight, 1)
        shadow.update(model, smoothing=0)
        set_(model.weight, 0)
        assert shadow.relative_distance(model).item() == math.inf

    def test_it_counts_in_float64(self):
        model = One(1e30)
        shadow = ShadowModel(model)
        set_(model.weight, 2e30)
        assert shadow.relative_distance(model).item() == pytest.approx(0.5, rel=1e-6)

    def test_complex_weights(self):
        model = One(0.0, dtype=torch.complex64)
        shadow = ShadowModel(model)
        set_(model.weight, 3 + 4j)
        assert shadow.relative_distance(model).item() == pytest.approx(1.0)


class TestState:
    def test_a_round_trip_through_a_file_in_the_middle_of_a_run(self, net):
        shadow, steps = ShadowModel(net, exclude='cache'), 6
        for step in range(steps // 2):
            move(net, step)
            shadow.update(net, smoothing=0.9)
        state = saved(shadow.state_dict())
        resumed_net = copy.deepcopy(net)
        resumed = ShadowModel(resumed_net, exclude='cache')
        resumed.load_state_dict(state)
        for step in range(steps // 2, steps):
            for model, follower in ((net, shadow), (resumed_net, resumed)):
                move(model, step)
                follower.update(model, smoothing=0.9)
        assert resumed.num_updates == shadow.num_updates == steps
        assert same_bits(frozen_copy(shadow), frozen_copy(resumed))

    def test_the_state_is_plain(self, net):
        shadow = ShadowModel(net)
        shadow.swap_in(net)

        def check(value):
            if type(value) is dict:
                assert all(type(key) is str for key in value)
                for inner in value.values():
                    check(inner)
            else:
                assert type(value) in (str, int, float, bool, type(None), torch.Tensor)

        check(shadow.state_dict())

    def test_buffers_that_the_model_does_not_save_are_left_out(self, net):
        shadow = ShadowModel(net)
        shadow.swap_in(net)
        state = shadow.state_dict()
        assert 'cache' not in state['buffers']
        assert 'cache' not in state['training_weights']
        shadow.swap_out(net)
        shadow.load_state_dict(state)

    def test_a_state_taken_while_swapped_leaves_the_shadow_swapped(self, net):
        shadow = ShadowModel(net)
        move(net)
        weights, average = frozen_copy(net), frozen_copy(shadow)
        shadow.swap_in(net)
        model_state, state = copy.deepcopy(net.state_dict()), saved(shadow.state_dict())
        resumed_net = Net()
        resumed = ShadowModel(resumed_net)
        resumed_net.load_state_dict(model_state)
        resumed.load_state_dict(state)
        assert resumed.is_swapped
        resumed.swap_out(resumed_net)
        del weights['cache'], average['cache']
        assert same_bits({n: t for n, t in frozen_copy(resumed_net).items() if n != 'cache'}, weights)
        assert same_bits({n: t for n, t in frozen_copy(resumed).items() if n != 'cache'}, average)

    def test_loading_a_state_while_swapped_is_refused_and_changes_nothing(self, net):
        """If a checkpoint has been loaded into the model, too, the stash is older than what the model holds now."""
        shadow = ShadowModel(net)
        move(net)
        weights, average = frozen_copy(net), frozen_copy(shadow)
        shadow.swap_in(net)
        for state in (saved(ShadowModel(Net()).state_dict()), saved(shadow.state_dict())):
            with pytest.raises(RuntimeError, match=r'Call swap_out\(model\) before a state is loaded'):
                shadow.load_state_dict(state)
        assert same_bits(frozen_copy(shadow), average)
        shadow.swap_out(net)
        assert same_bits(frozen_copy(net), weights)

    def test_loading_copies_into_the_shadows_own_tensors(self, net):
        shadow = ShadowModel(net)
        addresses = {name: t.data_ptr() for name, t in tensors(shadow).items()}
        state = saved(shadow.state_dict())
        shadow.load_state_dict(state)
        assert {name: t.data_ptr() for name, t in tensors(shadow).items()} == addresses
        set_(state['parameters']['first.weight'], 77)
        assert not (dict(shadow.named_parameters())['first.weight'] == 77).any()

    def test_loading_keeps_the_shadows_dtype_and_warns_where_digits_go(self, net):
        state = saved(ShadowModel(net, dtype='float64').state_dict())
        wide = ShadowModel(net)
        with pytest.warns(UserWarning, match=r'the saved average is torch.float64, the shadow torch.float32.*dtype'):
            wide.load_state_dict(state)
        assert {t.dtype for t in wide.parameters()} == {torch.float32}
        ShadowModel(net, dtype='float32').load_state_dict(state)  # asked for, so no warning
        ShadowModel(net, dtype='float64').load_state_dict(saved(wide.state_dict()))

    def test_what_was_trainable_in_the_saved_run_is_tracked_although_frozen_here(self, net):
        state = saved(ShadowModel(net).state_dict())
        other = Net()
        other.first.requires_grad_(False)
        shadow = ShadowModel(other)
        shadow.load_state_dict(state)
        assert torch.equal(dict(shadow.named_parameters())['first.weight'], state['parameters']['first.weight'])
        shadow.update(other, smoothing=0.5)
        with shadow.swapped(other):
            torch.testing.assert_close(other.first.weight.detach(), dict(shadow.named_parameters())['first.weight'])

    @pytest.mark.parametrize(
        ('damage', 'message'),
        [
            (lambda s: s.update(version=99), r'format version 99, this release reads 1\. Nothing was loaded'),
            (lambda s: s.pop('version'), 'format version None'),
            (lambda s: s.pop('parameters'), "'parameters' is a NoneType, not a Mapping"),
            (lambda s: s.update(buffers=[1]), "'buffers' is a list"),
            (lambda s: s.update(num_updates='3'), "'num_updates' is a str, not a int"),
            (lambda s: s['parameters'].pop('first.weight'), r'1 missing: first\.weight'),
            (lambda s: s['parameters'].update(extra=torch.zeros(1)), '1 unexpected: extra'),
            (lambda s: s['parameters'].update({'last.bias': torch.zeros(9)}), r'bias \(expected \(2,\), got \(9,\)'),
            (lambda s: s['parameters'].update({'last.bias': 3.0}), r'last\.bias \(expected \(2,\), got a float'),
            (lambda s: s['buffers'].pop('norm.running_var'), r'1 missing: norm\.running_var'),
            (lambda s: s['buffers'].update({'norm.running_var': torch.zeros(3)}), r'norm\.running_var \(expected'),
            (lambda s: s['training_weights'].pop('last.bias'), r'training weights .*1 missing: last\.bias'),
            (lambda s: s['training_weights'].update({'last.bias': torch.zeros(1)}), r'training weights .*last\.bias'),
            (lambda s: s.update(training_weights=5), 'training'),
            (lambda s: s.update(parameters=dict.fromkeys(s['parameters'])), 'a NoneType'),
        ],
    )  # fmt: skip
    def test_nothing_is_half_loaded(self, net, damage, message):
        shadow = ShadowModel(net)
        move(net)
        shadow.update(net, smoothing=0.5)
        shadow.swap_in(net)
        state = saved(shadow.state_dict())
        for tensor in (*state['parameters'].values(), *state['buffers'].values()):
            tensor.zero_()
        damage(state)
        shadow.swap_out(net)
        before = frozen_copy(shadow)
        with pytest.raises(ValueError, match=message):
            shadow.load_state_dict(state)
        assert same_bits(before, frozen_copy(shadow))
        assert shadow.num_updates == 1
        assert not shadow.is_swapped

    @pytest.mark.parametrize('state', [None, [], 'state', 3, {}])
    def test_what_is_no_state_is_refused(self, net, state):
        with pytest.raises(ValueError if state == {} else TypeError, match='Nothing was loaded'):
            ShadowModel(net).load_state_dict(state)

    @given(data=st.data())
    @settings(deadline=None, max_examples=60)
    def test_any_damage_gives_a_value_error_or_a_state_that_loads(self, data):
        torch.manual_seed(0)
        net = Net()
        shadow = ShadowModel(net)
        state = copy.deepcopy(shadow.state_dict())
        junk = st.none() | st.integers() | st.text(max_size=3) | st.lists(st.integers(), max_size=2) | st.booleans()
        junk |= st.dictionaries(st.text(max_size=3), st.integers(), max_size=2) | st.just(torch.zeros(2, 2))
        target = data.draw(st.sampled_from([state, state['parameters'], state['buffers']]))
        key = data.draw(st.sampled_from(sorted(target)))
        if data.draw(st.booleans()):
            del target[key]
        else:
            target[key] = data.draw(junk)
        before = frozen_copy(shadow)
        message = None
        try:
            shadow.load_state_dict(state)
        except ValueError as error:
            message = str(error)
        if message is not None:
            assert 'Nothing was loaded' in message
            assert same_bits(before, frozen_copy(shadow))
        shadow.update(net, smoothing=0.5)
        with shadow.swapped(net):
            pass

    def test_aliases_of_tied_weights_are_in_the_state(self):
        model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False))
        model[1].weight = model[0].weight
        assert ShadowModel(model).state_dict()['aliases'] == {'1.weight': '0.weight'}

    def test_a_shadow_from_tensors_checks_a_state_too(self):
        shadow = ShadowModel.from_tensors({'a': torch.zeros(2)}, {})
        shadow.load_state_dict(saved(ShadowModel.from_tensors({'a': torch.ones(2)}, {}).state_dict()))
        assert next(shadow.parameters()).tolist() == [1, 1]
        with pytest.raises(ValueError, match='1 missing: a; 1 unexpected: b'):
            shadow.load_state_dict(ShadowModel.from_tensors({'b': torch.ones(2)}, {}).state_dict())


class TestMemory:
    def test_a_model_is_collected_although_its_shadow_lives(self):
        model = Net()
        shadow = ShadowModel(model)
        shadow.update(model, smoothing=0.5)
        module, weight = weakref.ref(model), weakref.ref(model.first.weight)
        del model
        gc.collect()
        assert module() is None
        assert weight() is None
        assert len(list(shadow.parameters())) == 6

    def test_a_shadow_is_collected_although_its_model_lives(self, net):
        shadow = ShadowModel(net)
        shadow.update(net, smoothing=0.5)
        reference = weakref.ref(shadow)
        del shadow
        gc.collect()
        assert reference() is None

    def test_swapping_needs_one_copy_which_is_freed(self, net):
        shadow = ShadowModel(net)
        shadow.swap_in(net)
        stash = [weakref.ref(tensor) for tensor in shadow.training_weights(net).values()]
        shadow.swap_out(net)
        gc.collect()
        assert all(reference() is None for reference in stash)

    def test_the_model_that_holds_the_average_may_go(self):
        model = One(1.0)
        shadow = ShadowModel(model)
        shadow.swap_in(model)
        del model
        gc.collect()
        assert not shadow.is_swapped
        with pytest.raises(RuntimeError, match='nothing is swapped in'):
            shadow.swap_out(One(2.0))
        assert next(shadow.parameters()).item() == 1


def test_the_repr_tells_size_dtype_device_and_updates(net):
    shadow = ShadowModel(net, dtype='bfloat16')
    shadow.update(net, smoothing=0.5)
    text = repr(shadow)
    assert '6 parameters of 34 elements' in text
    assert 'bfloat16 on cpu' in text
    assert '1 update)' in text


def test_resolve_checks_a_model_before_the_first_update(net):
    shadow = ShadowModel(net)
    shadow.resolve(Net())
    other = Net()
    other.last = nn.Linear(7, 2)
    with pytest.raises(ValueError, match=r'1 of another shape or kind: last\.weight'):
        shadow.resolve(other)


class Versioned(Net):
    """Tied and frozen parameters, and an extra state."""

    def __init__(self) -> None:
        super().__init__()
        self.again = self.first
        self.last.bias.requires_grad_(False)
        self.note = {'seen': [3]}

    def get_extra_state(self) -> dict:
        return self.note

    def set_extra_state(self, state: dict) -> None:
        self.note = state


def copied(model: nn.Module, shadow: ShadowModel) -> dict:
    """What an average looks like in a copy of the model."""
    twin = copy.deepcopy(model)
    shadow.copy_to(twin)
    return twin.state_dict()


def assert_same_state(found: dict, expected: dict) -> None:
    assert list(found) == list(expected)
    assert found._metadata == expected._metadata
    for name, value in expected.items():
        if isinstance(value, torch.Tensor):
            assert (found[name].dtype, found[name].device) == (value.dtype, value.device)
            assert torch.equal(found[name], value)
        else:
            assert found[name] == value


class TestAveragedStateDict:
    @pytest.fixture
    def followed(self) -> tuple[Versioned, ShadowModel]:
        torch.manual_seed(0)
        model = Versioned()
        shadow = ShadowModel(model, exclude='last.weight')
        for seed in range(2):
            move(model, seed)
            shadow.update(model, smoothing=0.5)
        move(model, 5)
        return model, shadow

    def test_it_is_that_of_a_copy_of_the_model_with_the_average_in_it(self, followed):
        model, shadow = followed
        assert_same_state(shadow.averaged_state_dict(model), copied(model, shadow))
        assert 'cache' not in shadow.averaged_state_dict(model)

    def test_it_loads_strictly_and_what_is_not_tracked_is_that_of_training(self, followed):
        model, shadow = followed
        saved, fresh = shadow.averaged_state_dict(model), Versioned()
        fresh.load_state_dict(saved, strict=True)
        assert torch.equal(fresh.last.weight, model.last.weight)
        assert torch.equal(fresh.last.bias, model.last.bias)
        assert torch.equal(fresh.first.weight, dict(shadow.named_parameters())['first.weight'])
        assert fresh.note == {'seen': [3]}

    def test_nothing_changes_it_later(self, followed):
        model, shadow = followed
        saved = shadow.averaged_state_dict(model)
        expected = copied(model, shadow)
        assert all(not tensor.requires_grad for tensor in saved.values() if isinstance(tensor, torch.Tensor))
        move(model, 7)
        model.note['seen'].append(4)
        shadow.update(model, smoothing=0.1)
        with shadow.swapped(model):
            move(model, 8)
        assert_same_state(saved, expected)

    @pytest.mark.parametrize('which', ['own', 'another', 'both'])
    def test_on_loan_it_is_the_same(self, followed, which):
        model, shadow = followed
        other = ShadowModel(model)
        move(model, 6)
        expected = shadow.averaged_state_dict(model)
        if which != 'another':
            shadow.swap_in(model)
        if which != 'own':
            other.swap_in(model)
        assert_same_state(shadow.averaged_state_dict(model), expected)

    def test_a_narrow_model_gives_its_own_dtype(self):
        model = One(1.0, dtype=torch.bfloat16)
        shadow = ShadowModel(model)
        shadow.update(model, smoothing=0.5)
        assert shadow.averaged_state_dict(model)['weight'].dtype == torch.bfloat16

    def test_wrappers_are_taken_off_and_segments_of_inner_ones_stay_as_the_model_has_them(self):
        model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
        model[1] = torch.compile(model[1])
        shadow = ShadowModel(model)
        move(model)
        shadow.update(model, smoothing=0.0)
        move(model)
        for wrapped in (
            model,
            torch.compile(model),
            nn.DataParallel(model),
            torch.optim.swa_utils.AveragedModel(model),
        ):
            saved = shadow.averaged_state_dict(wrapped)
            assert list(saved) == ['0.weight', '0.bias', '1._orig_mod.weight', '1._orig_mod.bias']
            assert torch.equal(saved['1._orig_mod.weight'], dict(shadow.named_parameters())['1.weight'])
            model.load_state_dict(saved, strict=True)

    def test_another_model_of_the_architecture_will_do(self, net):
        shadow = ShadowModel(net)
        other = Net()
        saved = shadow.averaged_state_dict(other)
        assert torch.equal(saved['first.weight'], net.first.weight)

    def test_a_state_dict_that_hides_a_tracked_tensor_is_refused(self, net):
        shadow = ShadowModel(net)
        net.register_state_dict_post_hook(
            lambda module, state, *_: state.update({'first.weight': state['first.weight'].half()})
        )
        with pytest.raises(ValueError, match=r'leaves out first\.weight, or replaces.*inside swapped'):
            shadow.averaged_state_dict(net)

    def test_a_model_that_does_not_fit_is_refused(self, net):
        with pytest.raises(ValueError, match=r'6 missing: first\.bias'):
            ShadowModel(net).averaged_state_dict(nn.Sequential(nn.Linear(1, 1)))


class TestLoadingItsOwnState:
    """``load_state_dict(state_dict())`` is the identity, although the state refers to the average itself."""

    @given(
        updates=st.integers(0, 3),
        buffers=st.sampled_from(['average', 'copy']),
        dtype=st.sampled_from([None, 'float64', 'bfloat16']),
        joins=st.sampled_from(['nothing', 'before', 'between']),
        is_loaded_swapped=st.booleans(),
        exclude=st.sampled_from([(), ('first',)]),
    )
    @settings(max_examples=40, deadline=None, derandomize=True)
    def test_nothing_changes(self, updates, buffers, dtype, joins, is_loaded_swapped, exclude):
        torch.manual_seed(0)
        model = Net()
        model.last.requires_grad_(joins == 'nothing')
        shadow = ShadowModel(model, buffers=buffers, dtype=dtype, exclude=exclude)
        for seed in range(updates):
            move(model, seed)
            shadow.update(model, smoothing=0.5)
        if joins == 'before':
            model.last.requires_grad_(True)
            shadow.resolve(model, joining=True)
        if is_loaded_swapped:
            with shadow.swapped(model):
                state = copy.deepcopy(shadow.state_dict())
            shadow.load_state_dict(state)
        own = shadow.state_dict()
        before, live = copy.deepcopy(own), copy.deepcopy(model.state_dict())
        if joins == 'between':
            model.last.requires_grad_(True)
            shadow.resolve(model)
        shadow.load_state_dict(own)
        after = shadow.state_dict()
        assert before.keys() == after.keys()
        assert repr(before) == repr(after)
        for kind in ('parameters', 'buffers'):
            assert all(torch.equal(tensor, after[kind][name]) for name, tensor in before[kind].items())
        assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in live.items())

    def test_a_state_that_names_its_tensors_otherwise_is_loaded_as_it_was_given(self):
        model = nn.ModuleList(nn.Linear(2, 2, bias=False) for _ in range(3))
        shadow = ShadowModel(model)
        own = dict(shadow.named_parameters())
        turned = {name: own[other] for name, other in zip(own, [*list(own)[1:], next(iter(own))], strict=True)}
        expected = {name: tensor.clone() for name, tensor in turned.items()}
        shadow.load_foreign({'n_averaged': torch.tensor(2), **{f'module.{n}': t for n, t in turned.items()}}, model)
        assert all(torch.equal(tensor, expected[name]) for name, tensor in shadow.named_parameters())
