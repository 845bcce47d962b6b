"""One functional update, into whatever form of average, under whatever names."""

import copy
import gc
import math
import warnings
import weakref

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from composer_ema import ShadowModel, compute_ema

pytestmark = pytest.mark.filterwarnings(
    'error',
    'ignore::DeprecationWarning:torch',  # torch.compile of newer releases calls what torch itself deprecates
    'ignore:Implicitly cleaning up:ResourceWarning',  # a folder of a Composer Trainer that another test has left
)


def make_net() -> nn.Module:
    return nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Linear(4, 3))


def make_tied() -> nn.Module:
    model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False))
    model[1].weight = model[0].weight
    return model


def fill(model: nn.Module, value: float) -> nn.Module:
    with torch.no_grad():
        for tensor in [*model.parameters(), *model.buffers()]:
            tensor.fill_(value)
    return model


def state(average) -> dict[str, torch.Tensor]:
    """The tensors of an average in any form."""
    if isinstance(average, nn.Module):
        return average.state_dict()
    if isinstance(average, ShadowModel):
        return {**dict(average.named_parameters()), **dict(average.named_buffers())}
    return average


FORMS = {
    'module': copy.deepcopy,
    'ShadowModel': ShadowModel,
    'state dict': lambda model: copy.deepcopy(model.state_dict()),
}
forms = pytest.mark.parametrize('form', FORMS.values(), ids=FORMS)
WRAPPERS = {
    'bare': lambda model: model,
    'compile': torch.compile,
    'averaged': lambda model: torch.optim.swa_utils.AveragedModel(model),
    'submodule': lambda model: nn.Sequential(torch.compile(model[0]), *model[1:]),
}


@forms
def test_one_update_by_hand(form):
    model = fill(make_net(), 0)
    average = form(model)
    fill(model, 8)
    compute_ema(model, average, smoothing=0.75)
    for name, tensor in state(average).items():
        assert (tensor == (2 if tensor.is_floating_point() else 8)).all(), name


@forms
@given(smoothing=st.floats(0, 1), seed=st.integers(0, 50))
@settings(deadline=None, max_examples=20)
def test_any_smoothing_gives_the_formula_in_float64(form, smoothing, seed):
    torch.manual_seed(seed)
    model, start = make_net(), make_net()
    average = form(start)
    with warnings.catch_warnings():
        warnings.filterwarnings('ignore', message='.*away in part')
        compute_ema(model, average, smoothing=smoothing)
    live, first = model.state_dict(), start.state_dict()
    for name, tensor in state(average).items():
        if tensor.is_floating_point():
            expected = smoothing * first[name].double() + (1 - smoothing) * live[name].double()
            torch.testing.assert_close(tensor.double(), expected, rtol=1e-6, atol=1e-7)


@forms
@pytest.mark.parametrize('smoothing', [0, 0.0])
def test_a_smoothing_of_zero_copies_every_bit(form, smoothing):
    model, average = make_net(), form(make_net())
    compute_ema(model, average, smoothing=smoothing)
    live = model.state_dict()
    assert all(torch.equal(tensor, live[name]) for name, tensor in state(average).items())


@forms
def test_a_smoothing_of_zero_copies_over_what_is_not_finite(form):
    model, average = make_net(), form(fill(nn.Sequential(*make_net()[::2]), math.nan))
    model = nn.Sequential(*model[::2])
    compute_ema(model, average, smoothing=0)
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in state(average).items())


@forms
@pytest.mark.parametrize('smoothing', [1, 1.0])
def test_a_smoothing_of_one_freezes_all_but_counters(form, smoothing):
    model, start = make_net(), make_net()
    average = form(start)
    model[1].num_batches_tracked += 3
    compute_ema(model, average, smoothing=smoothing)
    for name, tensor in state(average).items():
        expected = model if 'num_batches' in name else start
        assert torch.equal(tensor, expected.state_dict()[name])


@forms
def test_the_model_is_only_read(form):
    model, average = make_net(), form(make_net())
    before = copy.deepcopy(model.state_dict())
    compute_ema(model, average, smoothing=0.5)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@forms
@pytest.mark.parametrize('wrap', WRAPPERS.values(), ids=WRAPPERS)
def test_wrappers_of_the_model_are_looked_through(form, wrap):
    model, average = fill(make_net(), 8), form(fill(make_net(), 0))
    compute_ema(wrap(model), average, smoothing=0.75)
    assert all((tensor == 2).all() for tensor in state(average).values() if tensor.is_floating_point())


@pytest.mark.parametrize('wrap', WRAPPERS.values(), ids=WRAPPERS)
def test_wrappers_of_the_average_are_looked_through(wrap):
    model, average = fill(make_net(), 8), fill(make_net(), 0)
    wrapped = wrap(average)
    compute_ema(model, wrapped, smoothing=0.75)
    assert all((parameter == 2).all() for parameter in wrapped.parameters())


def test_a_state_dict_with_the_names_of_a_compiled_model_fits():
    model, average = fill(make_net(), 8), torch.compile(fill(make_net(), 0)).state_dict()
    assert all(name.startswith('_orig_mod.') for name in average)
    compute_ema(model, average, smoothing=0.75)
    assert all((tensor == 2).all() for tensor in average.values() if tensor.is_floating_point())


@forms
def test_tied_weights_move_once(form):
    model = make_tied()
    average = form(fill(make_tied(), 0))
    compute_ema(fill(model, 8), average, smoothing=0.75)
    assert all((tensor == 2).all() for tensor in state(average).values())


@pytest.mark.parametrize('separate', [lambda t: t.detach().clone(), lambda t: t], ids=['separate', 'shared'])
def test_tied_weights_in_a_state_dict_move_once_under_each_name(separate):
    model = fill(make_tied(), 0)
    average = {name: separate(tensor) for name, tensor in copy.deepcopy(model.state_dict()).items()}
    compute_ema(fill(model, 8), average, smoothing=0.75)
    assert {name: set(t.view(-1).tolist()) for name, t in average.items()} == {'0.weight': {2}, '1.weight': {2}}


def test_frozen_parameters_are_averaged_into_a_module_like_any_other():
    model, average = fill(make_net(), 8).requires_grad_(False), fill(make_net(), 0)
    compute_ema(model, average, smoothing=0.75)
    assert (average[0].weight == 2).all()


@forms
def test_names_that_differ_are_listed_and_nothing_is_changed(form):
    average = form(make_net())
    model = make_net()
    model[2] = nn.Linear(4, 5)
    model.extra = nn.Linear(1, 1)
    before = copy.deepcopy(state(average))
    with pytest.raises(ValueError, match=r'of another shape or kind: 2\.bias') as error:
        compute_ema(model, average, smoothing=0.5)
    if not isinstance(average, ShadowModel):  # there new parts of a model join
        assert '2 missing: extra.bias, extra.weight' in str(error.value)
    assert all(torch.equal(tensor, before[name]) for name, tensor in state(average).items())


def test_what_the_average_has_too_much_is_listed():
    average = make_net()
    average.extra = nn.Linear(1, 1)
    with pytest.raises(ValueError, match=r'2 unexpected: extra\.bias, extra\.weight.*Nothing was changed'):
        compute_ema(make_net(), average, smoothing=0.5)


@forms
@pytest.mark.parametrize('smoothing', [-0.1, 1.1, math.nan])
def test_a_smoothing_out_of_range_names_value_and_rule(form, smoothing):
    average = form(make_net())
    before = copy.deepcopy(state(average))
    with pytest.raises(ValueError, match=rf'smoothing must lie in \[0, 1\], got {smoothing}'):
        compute_ema(make_net(), average, smoothing=smoothing)
    assert all(torch.equal(tensor, before[name]) for name, tensor in state(average).items())


@pytest.mark.parametrize('smoothing', ['0.5', None, True])
def test_a_smoothing_that_is_no_number_is_refused(smoothing):
    with pytest.raises(TypeError, match='smoothing must be a number'):
        compute_ema(make_net(), make_net(), smoothing=smoothing)


@pytest.mark.parametrize('average', [None, [torch.zeros(1)], 'model'])
def test_another_kind_of_average_is_refused_with_the_remedy(average):
    with pytest.raises(
        TypeError, match=rf'a state dict, got {type(average).__name__}\. Pass for example copy\.deepcopy'
    ):
        compute_ema(make_net(), average)


def test_averaging_a_model_into_itself_is_refused():
    model = make_net()
    with pytest.raises(ValueError, match=r'the same module\. Pass a copy'):
        compute_ema(model, torch.compile(model))


@pytest.mark.parametrize(
    'change',
    [
        lambda m: setattr(m[0], 'weight', nn.Parameter(m[0].weight.detach().clone())),
        lambda m: setattr(m[0].weight, 'data', m[0].weight.detach().clone()),
        lambda m: m.__setitem__(2, nn.Linear(4, 3)),
        lambda m: setattr(m[1], 'running_mean', m[1].running_mean.clone()),
        lambda m: m.to(torch.float64).to(torch.float32),
    ],
    ids=['parameter', 'data', 'module', 'buffer', 'cast'],
)
@pytest.mark.parametrize('which', ['model', 'ema_model'])
def test_the_second_call_sees_what_was_replaced_since_the_first(which, change):
    pair = {'model': make_net(), 'ema_model': make_net()}
    compute_ema(**pair, smoothing=0.5)
    change(pair[which])
    fill(pair['model'], 8)
    fill(pair['ema_model'], 0)
    compute_ema(**pair, smoothing=0.75)
    assert all((t == 2).all() for t in pair['ema_model'].state_dict().values() if t.is_floating_point())


def test_one_average_of_two_models_in_turn():
    models, average = (fill(make_net(), 8), fill(make_net(), 4)), fill(make_net(), 0)
    for model in models:
        compute_ema(model, average, smoothing=0.5)
    assert (average[0].weight == 4).all()


def test_the_second_call_walks_no_module(monkeypatch):
    model, average = make_net(), make_net()
    compute_ema(model, average)
    monkeypatch.setattr(nn.Module, 'named_modules', lambda *_, **__: pytest.fail('walked a module'))
    compute_ema(model, average)


@pytest.mark.parametrize('kept', ['model', 'ema_model'])
def test_neither_module_keeps_the_other_alive(kept):
    pair = {'model': make_net(), 'ema_model': make_net()}
    compute_ema(**pair)
    gone = 'ema_model' if kept == 'model' else 'model'
    module, weight = weakref.ref(pair[gone]), weakref.ref(pair[gone][0].weight)
    del pair[gone]
    gc.collect()
    assert module() is None
    assert weight() is None


def test_averaged_modules_can_be_copied_after_an_update():
    model, average = make_net(), make_net()
    compute_ema(model, average)
    twin = copy.deepcopy(average)
    compute_ema(fill(model, 8), fill(twin, 0), smoothing=0.5)
    assert (twin[0].weight == 4).all()
    assert not (average[0].weight == 4).any()


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_a_16_bit_average_in_which_updates_vanish_is_warned_of(dtype):
    model = make_net()
    average = make_net().to(dtype)
    message = r'ema_model is kept in b?float16.* weight 0.0001 away in part: it may be \d+ % off.*ema_model\.float\(\)'
    with pytest.warns(UserWarning, match=message) as warned:
        compute_ema(model, average, smoothing=0.9999)
    assert [warning.filename for warning in warned] == [__file__]  # where the user called, not where we warn
    compute_ema(model, average, smoothing=0.5)
    compute_ema(model, average, smoothing=1)


def test_a_float32_average_of_a_bfloat16_model():
    model, average = fill(make_net(), 8).bfloat16(), fill(make_net(), 0)
    compute_ema(model, average, smoothing=0.75)
    assert average[0].weight.dtype == torch.float32
    assert (average[0].weight == 2).all()


def test_a_swapped_shadow_model_is_refused():
    model = make_net()
    shadow = ShadowModel(model)
    with shadow.swapped(model), pytest.raises(RuntimeError, match='swap_out'):
        compute_ema(model, shadow)


def test_a_module_without_tensors():
    compute_ema(nn.Module(), nn.Module(), smoothing=0.5)
