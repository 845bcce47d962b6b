"""Averages by a function of the user's: torch's own AveragedModel is what they are held against."""

import copy
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.optim.swa_utils import (
    AveragedModel,
    get_ema_avg_fn,
    get_ema_multi_avg_fn,
    get_swa_avg_fn,
    get_swa_multi_avg_fn,
)

from composer_ema import ShadowModel
from composer_ema.averages import Equal
from composer_ema.shadow import plan

pytestmark = pytest.mark.filterwarnings(
    'error',
    'ignore:Implicitly cleaning up:ResourceWarning',  # a folder of a Composer Trainer that another test has left
)


class Net(nn.Module):
    """A BatchNorm between two layers, and parameters of two dtypes."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3, 4)
        self.norm = nn.BatchNorm1d(4)
        self.last = nn.Linear(4, 2, dtype=torch.float64)


class One(nn.Module):
    """One parameter; for sums done by hand."""

    def __init__(self, value: float = 0.0, **options) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([value], **options))


def move(model: nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in [*model.parameters(), *model.buffers()]:
            tensor.add_(torch.ones_like(tensor) if tensor.dtype is torch.int64 else draw(tensor, generator))


def draw(tensor: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    return torch.randn(tensor.shape, generator=generator).to(tensor.dtype)


def held(shadow: ShadowModel) -> dict[str, torch.Tensor]:
    return {**dict(shadow.named_parameters()), **dict(shadow.named_buffers())}


def fill(model: nn.Module, value: float) -> None:
    nn.init.constant_(model.weight, value)


FUNCTIONS = {
    'ema': {'avg_fn': get_ema_avg_fn(0.9)},
    'ema, many': {'multi_avg_fn': get_ema_multi_avg_fn(0.9)},
    'equal': {'avg_fn': get_swa_avg_fn()},
    'equal, many': {'multi_avg_fn': get_swa_multi_avg_fn()},
    'lambda': {'avg_fn': lambda averaged, current, count: averaged + (current - averaged) / (2 * count.item())},
    'lambda, many': {'multi_avg_fn': lambda averaged, current, count: [a.data.mul_(0.5) for a in averaged]},
}


def floating_only(functions):
    """torch puts a BatchNorm's count of batches through the function, too; here whole numbers are copied."""
    if 'avg_fn' in functions:
        return functions
    function = functions['multi_avg_fn']
    return {'multi_avg_fn': lambda a, c, n: function(a, c, n) if a[0].is_floating_point() else None}


def test_torch_cannot_average_buffers_of_whole_numbers_equally():
    model = Net()
    averaged = AveragedModel(model, multi_avg_fn=get_swa_multi_avg_fn(), use_buffers=True)
    averaged.update_parameters(model)
    with pytest.raises((RuntimeError, NotImplementedError)):
        averaged.update_parameters(model)


@pytest.mark.parametrize('buffers', ['average', 'copy'])
@pytest.mark.parametrize('functions', FUNCTIONS.values(), ids=FUNCTIONS)
def test_every_bit_is_that_of_torchs_averaged_model(functions, buffers):
    torch.manual_seed(0)
    model = Net()
    shadow = ShadowModel(model, buffers=buffers, overlap=True, **functions)
    averaged = AveragedModel(model, use_buffers=buffers == 'average', **floating_only(functions))
    for seed in range(5):
        move(model, seed)
        shadow.update(model)
        averaged.update_parameters(model)
        expected = averaged.module.state_dict()
        for name, tensor in held(shadow).items():
            counts = name == 'norm.num_batches_tracked'
            assert torch.equal(tensor, model.norm.num_batches_tracked if counts else expected[name]), name
    assert shadow.num_updates == averaged.n_averaged == 5


def test_three_updates_by_hand():
    model, counts = One(), []

    def halfway(averaged, current, num_averaged):
        counts.append(num_averaged)
        return (averaged + current) / 2

    shadow = ShadowModel(model, avg_fn=halfway)
    values = []
    for weight in (4.0, 8.0, 0.0):
        fill(model, weight)
        shadow.update(model)
        values.append(held(shadow)['weight'].item())
    assert values == [4.0, 6.0, 3.0]
    assert [(count.item(), count.dtype, count.device.type) for count in counts] == [
        (1, torch.int64, 'cpu'),
        (2, torch.int64, 'cpu'),
    ]


@settings(max_examples=25)
@given(values=st.lists(st.floats(-1e3, 1e3, width=32), min_size=1, max_size=12))
def test_an_equal_average_of_n_values_is_their_mean(values):
    model = One(dtype=torch.float64)
    shadows = [ShadowModel(model, **FUNCTIONS[name]) for name in ('equal', 'equal, many')]
    plain = ShadowModel(model)
    for count, value in enumerate(values):
        fill(model, value)
        for shadow in shadows:
            shadow.update(model)
        plain.update(model, weight=Equal().weight_at(count))
    mean = sum(values) / len(values)
    assert held(plain)['weight'].item() == pytest.approx(mean, rel=1e-12, abs=1e-10)
    for shadow in shadows:  # torch divides in float32 where the count is a tensor: 24 bits of the weight
        assert held(shadow)['weight'].item() == pytest.approx(mean, rel=1e-6, abs=1e-3)


def test_our_equal_weight_is_torchs_function_to_the_bit():
    """In float32 both end in one lerp of the same weight."""
    torch.manual_seed(0)
    model = nn.Linear(5, 3)
    ours, torchs = ShadowModel(model), ShadowModel(model, multi_avg_fn=get_swa_multi_avg_fn())
    for seed in range(40):
        move(model, seed)
        ours.update(model, weight=Equal().weight_at(ours.num_updates))
        torchs.update(model)
        assert all(torch.equal(tensor, held(torchs)[name]) for name, tensor in held(ours).items())


def test_sixteen_bit_weights_come_cast_to_the_average():
    model, seen = One(dtype=torch.bfloat16), []

    def look(averaged, current, num_averaged):
        seen.append((averaged[0].dtype, current[0].dtype, current[0].requires_grad))
        torch._foreach_lerp_(averaged, current, 0.5)

    shadow = ShadowModel(model, multi_avg_fn=look)
    shadow.update(model)
    fill(model, 1.0)
    shadow.update(model)
    assert seen == [(torch.float32, torch.float32, False)]
    assert held(shadow)['weight'].item() == 0.5


def test_one_call_takes_all_tensors_of_a_dtype():
    calls = []

    def note(averaged, current, num_averaged):
        calls.append({tensor.dtype for tensor in (*averaged, *current)})
        torch._foreach_lerp_(averaged, current, 0.5)

    model = Net()
    shadow = ShadowModel(model, multi_avg_fn=note, buffers='copy')
    shadow.update(model)
    assert calls == []
    move(model, 1)
    shadow.update(model)
    assert sorted(map(str, calls)) == ['{torch.float32}', '{torch.float64}']


def test_a_parameter_that_is_unfrozen_joins():
    model = Net()
    model.first.requires_grad_(False)
    shadow = ShadowModel(model, avg_fn=get_swa_avg_fn())
    shadow.update(model)
    move(model, 1)
    model.first.requires_grad_(True)
    shadow.update(model)
    assert torch.equal(held(shadow)['first.weight'], model.first.weight)
    assert not torch.equal(held(shadow)['last.weight'], model.last.weight)


@pytest.mark.parametrize('functions', FUNCTIONS.values(), ids=FUNCTIONS)
def test_saved_in_the_middle_and_loaded_the_run_goes_on_to_the_bit(functions):
    torch.manual_seed(0)
    model = Net()
    whole, first, second = (ShadowModel(model, **functions) for _ in range(3))
    for seed in range(6):
        move(model, seed)
        whole.update(model)
        (first if seed < 3 else second).update(model)
        if seed == 2:
            second.load_state_dict(first.state_dict())
            assert 'avg_fn' not in str(first.state_dict().keys())
    assert second.num_updates == 6
    assert all(torch.equal(tensor, held(second)[name]) for name, tensor in held(whole).items())


def test_a_deep_copy_keeps_a_lambda_and_goes_on():
    model = One()
    shadow = ShadowModel(model, avg_fn=lambda averaged, current, _: (averaged + current) / 2)
    shadow.update(model)
    twin = copy.deepcopy(shadow)
    fill(model, 2.0)
    twin.update(model)
    assert (held(twin)['weight'].item(), held(shadow)['weight'].item()) == (1.0, 0.0)


def test_pickle_says_in_its_own_words_that_a_lambda_is_none_of_its():
    with pytest.raises((pickle.PicklingError, AttributeError), match='lambda'):
        pickle.dumps(ShadowModel(One(), avg_fn=lambda averaged, current, _: averaged))


def updated(shadow: ShadowModel, model: nn.Module) -> dict[str, torch.Tensor]:
    """One update, so that the next one calls the function; then the average as it is."""
    shadow.update(model)
    move(model, 9)
    return {name: tensor.clone() for name, tensor in held(shadow).items()}


def unsound(averaged, current, count):
    return averaged if averaged.shape != (4,) else averaged.sum()


def raises(averaged, current, count):
    if averaged.dtype is torch.float64:
        raise ZeroDivisionError('by zero')
    return current


def rebinds(averaged, current, count):
    for index, (old, new) in enumerate(zip(averaged, current, strict=True)):
        averaged[index] = 0.9 * old + 0.1 * new


def rebinds_storage(averaged, current, count):
    for old, new in zip(averaged, current, strict=True):
        old.data = 0.9 * old + 0.1 * new


def returns_new_ones(averaged, current, count):
    return [0.9 * old + 0.1 * new for old, new in zip(averaged, current, strict=True)]


@pytest.mark.parametrize(
    ('functions', 'error', 'message'),
    [
        ({'avg_fn': unsound}, ValueError, r'of the average, \(4,\) float32 on cpu, but unsound returned \(\) float32'),
        (
            {'avg_fn': lambda a, c, n: a.double()},
            ValueError,
            r'returned .* float64 on cpu\. If only the dtype differs, return value\.to',
        ),
        ({'avg_fn': lambda a, c, n: None}, TypeError, r'must return the new average as a tensor, .* a NoneType'),
        ({'avg_fn': get_swa_multi_avg_fn()}, RuntimeError, r'avg_fn .*swa_update failed on an average that is'),
        (
            {'avg_fn': raises},
            RuntimeError,
            r'avg_fn raises failed on .* float64 on cpu: by zero\. We call it as torch does',
        ),
        (
            {'multi_avg_fn': rebinds},
            ValueError,
            r'first list, but rebinds replaced the tensors instead\. Write in place',
        ),
        ({'multi_avg_fn': rebinds_storage}, ValueError, r'rebinds_storage replaced the tensors instead'),
        ({'multi_avg_fn': returns_new_ones}, ValueError, r'returns_new_ones wrote nothing and returned a list\. Write'),
        ({'multi_avg_fn': lambda a, c, n: None}, ValueError, r'wrote nothing\. Write in place'),
        ({'multi_avg_fn': lambda a, c, n: a.pop()}, ValueError, r'replaced the tensors instead and returned a Tensor'),
    ],
)
def test_a_function_that_breaks_the_rule_is_told_it_and_the_average_stays(functions, error, message):
    torch.manual_seed(0)
    model = Net()
    shadow = ShadowModel(model, **functions)
    before = updated(shadow, model)
    for _ in range(2):  # nor does the second try find anything changed
        with pytest.raises(error, match=message):
            shadow.update(model)
        assert shadow.num_updates == 1
        assert all(torch.equal(tensor, before[name]) for name, tensor in held(shadow).items())


def test_a_function_that_fails_on_a_buffer_leaves_the_parameters_too():
    def fails(averaged, current, count):
        if averaged.shape == (7,):
            raise ZeroDivisionError('seven')
        return current

    model = One(1.0)
    model.register_buffer('statistic', torch.zeros(7))
    shadow = ShadowModel(model, avg_fn=fails, buffers='average')
    before = updated(shadow, model)
    with pytest.raises(RuntimeError, match='seven'):
        shadow.update(model)
    assert all(torch.equal(tensor, before[name]) for name, tensor in held(shadow).items())
    assert not torch.equal(before['weight'], model.weight)


@pytest.mark.parametrize(
    'functions',
    [
        {'avg_fn': lambda averaged, current, count: current.mul_(0.5).add_(averaged, alpha=0.5)},
        {'multi_avg_fn': lambda averaged, current, count: torch._foreach_mul_(current, 0.5)},
    ],
)
def test_a_function_that_writes_into_the_training_weights_is_found_out(functions):
    model = One(1.0)
    shadow = ShadowModel(model, **functions)
    updated(shadow, model)
    with pytest.raises(RuntimeError, match=r'wrote into the current weights, which it may only read'):
        shadow.update(model)


def test_an_update_by_a_function_takes_no_share():
    model = One()
    shadow = ShadowModel(model, avg_fn=get_swa_avg_fn())
    for share in ({'smoothing': 0.9}, {'weight': 0.1}):
        with pytest.raises(
            TypeError, match=r'follows a function of yours, so there is no share to give.*update\(model\)'
        ):
            shadow.update(model, **share)
    assert shadow.num_updates == 0


def test_no_update_while_swapped():
    model = One()
    shadow = ShadowModel(model, avg_fn=get_swa_avg_fn())
    with shadow.swapped(model), pytest.raises(RuntimeError, match='the model holds the average'):
        shadow.update(model)


@pytest.mark.parametrize(
    ('options', 'error', 'message'),
    [
        ({'avg_fn': 0.9}, TypeError, r'avg_fn must be a function of averaged, current and num_averaged, got 0\.9'),
        ({'avg_fn': raises, 'multi_avg_fn': rebinds}, ValueError, r'either avg_fn or multi_avg_fn, got both'),
        ({'avg_fn': raises, 'skip_nonfinite': True}, ValueError, r'skip_nonfinite=True has no effect on an average by'),
        (
            {'avg_fn': raises, 'rounding': 'stochastic', 'dtype': 'bfloat16'},
            ValueError,
            r"rounding='stochastic' has no",
        ),
        ({'multi_avg_fn': rebinds, 'backend': 'foreach'}, ValueError, r"backend='foreach' has no effect"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(options, error, message):
    with pytest.raises(error, match=message):
        ShadowModel(One(), **options)


def test_a_small_weight_of_a_function_warns_of_nothing():
    model = One(dtype=torch.bfloat16)
    shadow = ShadowModel(model, dtype='bfloat16', multi_avg_fn=get_ema_multi_avg_fn(0.9999))
    for _ in range(3):
        shadow.update(model)


def test_a_function_that_fails_on_a_buffer_leaves_counters_as_they_were():
    def fails_on_buffers(averaged, current, num_averaged):
        if averaged.shape == (5,):
            raise FloatingPointError('no')
        return current

    net = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2), nn.BatchNorm1d(5, affine=False))
    shadow = ShadowModel(net, avg_fn=fails_on_buffers)
    shadow.update(net)
    net[1].num_batches_tracked.add_(4)
    with pytest.raises(RuntimeError, match='failed on an average'):
        shadow.update(net)
    assert dict(shadow.named_buffers())['1.num_batches_tracked'] == 0


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a CUDA device')
def test_on_the_side_stream_a_function_does_what_it_does_in_line(monkeypatch):
    monkeypatch.setattr(plan, 'WORTH_FORKING', 0)
    torch.manual_seed(0)
    model = Net().cuda()
    for functions in FUNCTIONS.values():
        beside, inline = (ShadowModel(model, overlap=overlap, **functions) for overlap in (True, False))
        for _ in range(4):
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.add_(torch.randn_like(parameter))
            for shadow in (beside, inline):
                shadow.update(model)
                shadow.wait()
        assert beside.num_updates == 4
        assert all(torch.equal(tensor, held(inline)[name]) for name, tensor in held(beside).items())
