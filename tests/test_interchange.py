"""Averages of other libraries: read from files that they wrote themselves, and handed over to the bit and back."""

import contextlib
import copy
import importlib.util
import json
import warnings
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_avg_fn, get_ema_multi_avg_fn

from composer_ema import CheckpointError, EMAOptimizer, ShadowModel, export, load_average
from composer_ema.averages import Equal
from composer_ema.shadow import foreign

FIXTURES = Path(__file__).parent / 'fixtures'
FOREIGN = FIXTURES / 'foreign'
TRUTHS = json.loads((FOREIGN / 'truths.json').read_text())

spec = importlib.util.spec_from_file_location('make_foreign', FIXTURES / 'make_foreign.py')
make_foreign = importlib.util.module_from_spec(spec)
spec.loader.exec_module(make_foreign)

#: File, what it is said to be of, module that writes it.
WITH_NAMES = {
    'timm-saver.pth.tar': ('timm', 'timm'),
    'timm-v3.pt': ('timm', 'timm'),
    'ema-pytorch.pt': ('ema-pytorch', 'ema_pytorch'),
    'lightning.ckpt': ('Lightning', 'lightning'),
}
IN_ORDER = {'diffusers.pt': ('diffusers', 'diffusers'), 'torch-ema.pt': ('torch-ema', 'torch_ema')}
FILES = {**WITH_NAMES, **IN_ORDER}
FROZEN = '0.bias'

needs_composer = pytest.mark.skipif(importlib.util.find_spec('composer') is None, reason='needs Composer')


class OfLightning(nn.Module):
    """The names of the fixture's LightningModule."""

    def __init__(self):
        super().__init__()
        self.net = make_foreign.build_model()


def model_of(name):
    """A model as the file's, with other weights and statistics."""
    model = OfLightning() if name == 'lightning.ckpt' else make_foreign.build_model()
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.add_(3)
    return model


def expected_of(name, truth=None):
    truth = truth or TRUTHS[name]
    like = model_of(name).state_dict()
    weights = {key: torch.as_tensor(value, dtype=like[key].dtype) for key, value in truth['average'].items()}
    if name in IN_ORDER:  # which leave buffers, and torch-ema here a frozen parameter, to the model
        kept = [key for key in like if 'running' in key or 'num_batches' in key]
        kept += [FROZEN] if name == 'torch-ema.pt' else []
        weights |= {key: like[key] for key in kept}
    return weights


@contextlib.contextmanager
def expected_warning(name):
    if name == 'timm-v3.pt':
        with pytest.warns(UserWarning, match='a model in DDP look the same'):
            yield
    else:
        with warnings.catch_warnings():
            warnings.simplefilter('error')
            yield


def assert_same_bits(left, right):
    assert left.keys() == right.keys()
    for name, tensor in left.items():
        assert tensor.dtype == right[name].dtype, name
        assert torch.equal(tensor, right[name]), name


def tensors_of(shadow):
    return {name: t.clone() for name, t in (*shadow.named_parameters(), *shadow.named_buffers())}


def test_the_files_are_small_and_say_what_wrote_them():
    for name in FILES:
        assert (FOREIGN / name).stat().st_size < 10_000
        assert len(TRUTHS[name]['versions']) == 2
        assert TRUTHS[name]['average'] != TRUTHS[name]['training']


@pytest.mark.parametrize('name', FILES)
def test_a_file_gives_the_average_that_its_library_gives(name):
    model = model_of(name)
    with expected_warning(name):
        average = load_average(FOREIGN / name, model)
    assert list(average) == list(model.state_dict())
    assert_same_bits(average, expected_of(name))
    model.load_state_dict(average, strict=True)


@pytest.mark.parametrize('name', WITH_NAMES)
def test_where_there_are_names_no_model_is_needed(name):
    with expected_warning(name):
        assert_same_bits(load_average(FOREIGN / name), expected_of(name))


@pytest.mark.parametrize('name', IN_ORDER)
def test_where_there_is_only_an_order_an_error_asks_for_the_model(name, tmp_path):
    for call in (load_average, lambda path: export(path, tmp_path / 'out.safetensors')):
        with pytest.raises(CheckpointError, match=rf'{IN_ORDER[name][0]}.*load_average\(file, model=model\)'):
            call(FOREIGN / name)
    assert not (tmp_path / 'out.safetensors').exists()


@pytest.mark.parametrize('name', FILES)
def test_a_shadow_takes_it_over_and_leaves_the_model_alone(name):
    model = model_of(name)
    shadow, before = ShadowModel(model), copy.deepcopy(model.state_dict())
    with expected_warning(name):
        shadow.load_foreign(torch_load(FOREIGN / name), model)
    expected = expected_of(name)
    assert_same_bits(tensors_of(shadow), {key: expected[key] for key in expected if not key.endswith(FROZEN)})
    assert shadow.num_updates == (TRUTHS[name]['num_updates'] or 1)
    assert_same_bits(dict(model.state_dict()), before)


@pytest.mark.parametrize('name', WITH_NAMES)
def test_export_writes_it_with_its_source(name, tmp_path):
    with expected_warning(name):
        metadata = export(FOREIGN / name, tmp_path / 'out.safetensors')
    assert metadata['source'] == WITH_NAMES[name][0]
    assert metadata.get('num_updates') == (str(TRUTHS[name]['num_updates']) if TRUTHS[name]['num_updates'] else None)
    assert_same_bits(safetensors.torch.load_file(tmp_path / 'out.safetensors'), expected_of(name))


@pytest.mark.parametrize('name', FILES)
def test_the_installed_release_still_writes_it_so(name, tmp_path):
    pytest.importorskip(FILES[name][1])
    path = tmp_path / name
    written = make_foreign.WRITERS[name](path)
    truth = json.loads(json.dumps(written, default=torch.Tensor.tolist))
    with expected_warning(name):
        assert_same_bits(load_average(path, model_of(name)), expected_of(name, truth))


@needs_composer
def test_composers_swa_gives_its_averaged_model():
    from composer.models import ComposerClassifier

    model = ComposerClassifier(make_foreign.build_model(), num_classes=2)
    average = load_average(FOREIGN / 'composer-swa.pt', model)
    expected = {name: torch.as_tensor(value) for name, value in TRUTHS['composer-swa.pt']['average'].items()}
    assert_same_bits(average, {name: expected[name].to(average[name].dtype) for name in average})


def torch_load(path):
    import argparse

    with torch.serialization.safe_globals([argparse.Namespace]):
        return torch.load(path, weights_only=True)


# Torch's AveragedModel


class Tied(nn.Module):
    """A tied weight, a frozen one, buffers of every kind."""

    def __init__(self, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.first, self.second = nn.Linear(3, 3), nn.Linear(3, 3)
        self.second.weight = self.first.weight
        self.norm = nn.BatchNorm1d(3)
        self.first.bias.requires_grad_(False)
        self.register_buffer('scratch', torch.randn(2), persistent=False)

    def forward(self, x):
        return self.norm(self.second(self.first(x)))


def moved(model):
    with torch.no_grad():
        for tensor in (*model.parameters(), *(b for b in model.buffers() if b.is_floating_point())):
            tensor.add_(torch.randn_like(tensor))
    return model


def averaged_of(model, updates=3, **arguments):
    averaged = AveragedModel(model, **arguments)
    for _ in range(updates):
        averaged.update_parameters(moved(model))
    return averaged


BY_FUNCTION = [{'avg_fn': get_ema_avg_fn(0.75)}, {'multi_avg_fn': get_ema_multi_avg_fn(0.75)}]


@pytest.mark.parametrize('arguments', [{}, {'use_buffers': True}, *BY_FUNCTION])
@pytest.mark.parametrize('dtype', [torch.float32, torch.float64, torch.bfloat16])
def test_an_averaged_model_comes_back_to_the_bit(arguments, dtype):
    model = Tied().to(dtype)
    averaged = averaged_of(model, **arguments)
    shadow = ShadowModel.from_averaged_model(averaged)
    assert shadow.num_updates == 3
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        back = shadow.to_averaged_model(model)
    assert_same_bits(dict(back.state_dict()), dict(averaged.state_dict()))
    assert torch.equal(back.module.scratch, averaged.module.scratch)
    assert (back.avg_fn, back.multi_avg_fn, back.use_buffers) == (
        averaged.avg_fn, averaged.multi_avg_fn, averaged.use_buffers,
    )  # fmt: skip
    assert back.module is not model


@pytest.mark.parametrize('arguments', BY_FUNCTION)
def test_both_go_on_with_the_same_bits_by_a_function(arguments):
    model = Tied()
    averaged = averaged_of(model, **arguments)
    shadow = ShadowModel.from_averaged_model(averaged)
    for _ in range(3):
        moved(model)
        averaged.update_parameters(model)
        shadow.update(model)
    back = shadow.to_averaged_model(model)
    assert_same_bits(dict(back.state_dict()), dict(averaged.state_dict()))


def test_without_a_function_the_equal_average_goes_on():
    model = Tied()
    averaged = averaged_of(model)
    shadow = ShadowModel.from_averaged_model(averaged)
    for _ in range(3):
        moved(model)
        averaged.update_parameters(model)
        shadow.update(model, weight=Equal().weight_at(shadow.num_updates))
    back = shadow.to_averaged_model(model).state_dict()
    for name, tensor in averaged.state_dict().items():
        torch.testing.assert_close(back[name], tensor)


def test_an_averaged_model_whose_parameters_are_all_frozen_is_taken_over_whole():
    averaged = averaged_of(Tied()).requires_grad_(False)
    shadow = ShadowModel.from_averaged_model(averaged)
    assert {name for name, _ in shadow.named_parameters()} == {name for name, _ in averaged.module.named_parameters()}


def test_options_win_over_what_the_averaged_model_says():
    averaged = averaged_of(Tied(), use_buffers=True, avg_fn=get_ema_avg_fn(0.5))
    shadow = ShadowModel.from_averaged_model(
        averaged, buffers='copy', exclude='bias', dtype='float64', multi_avg_fn=get_ema_multi_avg_fn(0.5)
    )
    assert dict(shadow.named_parameters()).keys() == {'first.weight', 'norm.weight'}
    assert {tensor.dtype for tensor in shadow.parameters()} == {torch.float64}
    back = shadow.to_averaged_model(Tied().double(), use_buffers=True, multi_avg_fn=None)
    assert back.use_buffers
    assert back.avg_fn is None
    assert back.multi_avg_fn is None


def test_a_narrower_model_loses_digits_with_a_warning():
    model = Tied().bfloat16()
    shadow = ShadowModel(model)
    shadow.update(moved(copy.deepcopy(model)), smoothing=0.999)
    with pytest.warns(UserWarning, match=r'float32, the model torch\.bfloat16: digits are lost'):
        shadow.to_averaged_model(model)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        wide = shadow.to_averaged_model(copy.deepcopy(model).float())
    assert torch.equal(wide.module.first.weight, dict(shadow.named_parameters())['first.weight'])


def test_what_is_no_averaged_model_is_refused():
    with pytest.raises(TypeError, match='load_foreign takes a state dict'):
        ShadowModel.from_averaged_model(Tied())
    with pytest.raises(ValueError, match='missing'):
        ShadowModel(Tied()).to_averaged_model(nn.Linear(2, 2))


class Wrapped(nn.Module):
    """Puts ``module.`` before every name, as DDP does."""

    def __init__(self, module):
        super().__init__()
        self.module = module


@pytest.mark.parametrize('wrap', [lambda model: model, Wrapped, torch.compile], ids=['plain', 'ddp', 'compiled'])
@pytest.mark.parametrize('nested', [False, True])
def test_the_state_dict_of_an_averaged_model_is_read_through_wrappers_and_under_any_key(tmp_path, wrap, nested):
    model = Tied()
    averaged = averaged_of(wrap(model))
    state = averaged.state_dict()
    held = {'epoch': 3, 'model': model.state_dict(), 'model_ema': state} if nested else state
    torch.save(held, tmp_path / 'average.pt')
    loaded = load_average(tmp_path / 'average.pt', Tied(seed=1))
    expected = averaged.module.module if isinstance(averaged.module, Wrapped) else averaged.module
    expected = getattr(expected, '_orig_mod', expected).state_dict()
    assert_same_bits(loaded, dict(expected))
    shadow = ShadowModel(Tied(seed=1))
    shadow.load_foreign(held, Tied(seed=1))
    assert shadow.num_updates == 3
    assert torch.equal(dict(shadow.named_parameters())['first.weight'], expected['first.weight'])


def test_what_compiling_a_submodule_adds_to_names_is_taken_out(tmp_path):
    model = nn.Sequential(torch.compile(nn.Linear(2, 2)), nn.Linear(2, 2))
    averaged = averaged_of(model)
    torch.save(averaged.state_dict(), tmp_path / 'average.pt')
    names = list(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)).state_dict())
    assert list(load_average(tmp_path / 'average.pt')) == list(load_average(tmp_path / 'average.pt', model)) == names


def test_a_buffer_that_the_model_saves_and_the_file_lacks_is_refused():
    model = nn.BatchNorm1d(2)
    state = averaged_of(model).state_dict()
    del state['module.running_var']
    with pytest.raises(ValueError, match='1 missing: running_var'):
        ShadowModel(model).load_foreign(state, model)


def test_a_submodule_that_a_user_calls_module_keeps_its_name(tmp_path):
    model = Wrapped(Tied())
    averaged = averaged_of(model)
    torch.save(averaged.state_dict(), tmp_path / 'average.pt')
    assert_same_bits(load_average(tmp_path / 'average.pt', model), dict(averaged.module.state_dict()))
    assert_same_bits(load_average(tmp_path / 'average.pt'), dict(averaged.module.state_dict()))


@pytest.mark.parametrize('theirs', ['', 'module', 'net'])
@pytest.mark.parametrize('ours', ['', 'module', 'model'])
def test_names_may_stand_in_another_outermost_module(theirs, ours, tmp_path):
    def within(name, model):
        return nn.ModuleDict({name: model}) if name else model

    source = within(theirs, Tied(seed=2))
    model, expected = within(ours, Tied()), within(ours, Tied(seed=2))
    averaged = averaged_of(source, updates=1)
    expected.load_state_dict(dict(zip(expected.state_dict(), source.state_dict().values(), strict=True)))
    torch.save(averaged.state_dict(), tmp_path / 'average.pt')
    assert_same_bits(load_average(tmp_path / 'average.pt', model), dict(expected.state_dict()))
    shadow = ShadowModel(model)
    shadow.load_foreign(averaged.state_dict(), model)
    assert_same_bits(
        dict(shadow.named_parameters()),
        {n: dict(expected.named_parameters())[n].detach() for n, _ in shadow.named_parameters()},
    )


def test_the_state_of_modules_that_is_no_tensor_does_not_get_in_the_way(tmp_path):
    class WithExtra(nn.Linear):
        def get_extra_state(self):
            return {'calls': 3}

        def set_extra_state(self, state):
            assert state == {'calls': 3}

    model = nn.Sequential(WithExtra(2, 2))
    averaged = averaged_of(model)
    torch.save(averaged.state_dict(), tmp_path / 'average.pt')
    for loaded in (load_average(tmp_path / 'average.pt'), load_average(tmp_path / 'average.pt', model)):
        nn.Sequential(WithExtra(2, 2)).load_state_dict(loaded, strict=True)
    shadow = ShadowModel(model)
    shadow.load_foreign(averaged.state_dict(), model)
    assert torch.equal(next(shadow.parameters()), averaged.module[0].weight)


# What is refused, before anything is changed


def changed(state, **changes):
    return {key: value for key, value in {**state, **changes}.items() if value is not None}


ORDERED = {'decay': 0.9, 'num_updates': 2, 'shadow_params': [torch.zeros(2, 2), torch.zeros(2)]}
NAMED = {'n_averaged': torch.tensor(2), 'module.weight': torch.zeros(2, 2), 'module.bias': torch.zeros(2)}


@pytest.mark.parametrize(
    ('state', 'message'),
    [
        ([1, 2], 'a saved average is a dictionary, this is a list'),
        ({'model': {'weight': torch.zeros(2, 2)}}, 'no average of a known kind under the keys model.*ema-pytorch'),
        ({}, 'no average of a known kind'),
        ({'a': NAMED, 'b': ORDERED}, 'averages under the keys a, b. Pass one'),
        (changed(NAMED, **{'module.bias': None}), '1 missing: bias'),
        (changed(NAMED, **{'module.other': torch.zeros(1)}), '1 unexpected: other'),
        (changed(NAMED, **{'module.bias': torch.zeros(3)}), r'bias \(expected \(2,\), got \(3,\)\)'),
        (changed(NAMED, **{'module.bias': 'no tensor'}), 'bias among the averaged weights are no tensors'),
        (changed(NAMED, n_averaged='many'), "'n_averaged' is 'many', not a count"),
        (changed(NAMED, n_averaged=torch.tensor(-1)), "'n_averaged' is -1, not a count"),
        (changed(ORDERED, shadow_params=[torch.zeros(2)]), 'holds 1 tensors without names, but the model has 2'),
        (changed(ORDERED, shadow_params=[torch.zeros(2), torch.zeros(2, 2)]), r'2 of another shape.*bias.*weight'),
        (changed(ORDERED, shadow_params={'a': 1}), "'shadow_params' is not a list of tensors"),
        (changed(ORDERED, num_updates=1.5), "'num_updates' is 1.5, not a count"),
        ({'state_dict_ema': 3}, "'state_dict_ema' is a int, not a dictionary"),
        ({'state_dict': {}, 'current_model_state': {}, 'averaging_state': {}}, "'n_averaged' is None, not a count"),
    ],
)
def test_what_does_not_fit_is_refused_by_name_and_changes_nothing(state, message, tmp_path):
    model = nn.Linear(2, 2)
    shadow = ShadowModel(model)
    before = tensors_of(shadow)
    with pytest.raises(ValueError, match=message):
        shadow.load_foreign(state, model)
    assert_same_bits(tensors_of(shadow), before)
    assert shadow.num_updates == 0
    torch.save(state, tmp_path / 'odd.pt')
    with pytest.raises(CheckpointError, match=message) as error:
        load_average(tmp_path / 'odd.pt', model)
    assert str(tmp_path / 'odd.pt') in str(error.value)


@pytest.mark.parametrize(
    'state', [changed(NAMED, n_averaged=torch.tensor(0)), changed(ORDERED, num_updates=0)], ids=['named', 'ordered']
)
def test_an_average_before_its_first_update_is_none_to_export_but_one_to_go_on_from(state, tmp_path):
    model = nn.Linear(2, 2)
    torch.save(state, tmp_path / 'new.pt')
    with pytest.raises(CheckpointError, match='no average yet'):
        load_average(tmp_path / 'new.pt', model)
    shadow = ShadowModel(model)
    shadow.load_foreign(state, model)
    assert shadow.num_updates == 0
    assert not any(tensor.any() for tensor in shadow.parameters())


def test_ema_pytorch_counts_no_update_before_it_has_begun():
    assert foreign.read(
        {'initted': torch.tensor(False), 'step': torch.tensor(7), 'ema_model.weight': torch.zeros(1)}
    ).num_updates == 0  # fmt: skip


def test_torch_ema_need_not_count():
    assert foreign.read({**ORDERED, 'num_updates': None}).num_updates is None


def test_nothing_is_loaded_while_a_model_holds_the_average():
    model = nn.Linear(2, 2)
    shadow = ShadowModel(model)
    with shadow.swapped(model), pytest.raises(RuntimeError, match='Call swap_out'):
        shadow.load_foreign(NAMED, model)


def test_only_what_the_shadow_selects_is_taken():
    model = nn.Linear(2, 2)
    shadow = ShadowModel(model, include='weight')
    shadow.load_foreign(NAMED, model)
    assert tensors_of(shadow).keys() == {'weight'}
    assert not tensors_of(shadow)['weight'].any()


# Going on in training


def test_ema_optimizer_goes_on_from_a_loaded_average():
    model = nn.Linear(2, 2)
    optimizer = EMAOptimizer(torch.optim.SGD(model.parameters(), lr=0.0), decay=0.75, model=model)
    optimizer.shadow.load_foreign(NAMED, model)
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    torch.testing.assert_close(dict(optimizer.shadow.named_parameters())['weight'], 0.25 * model.weight.detach())


@needs_composer
def test_ema_goes_on_from_a_loaded_average():
    import toy

    from composer_ema import EMA

    ema = EMA(smoothing=0.75)
    run = toy.make_trainer([ema], max_duration='1ba')
    averaged = AveragedModel(toy.make_model(seed=4))
    shadow = ShadowModel(run.state.model)
    shadow.load_foreign(averaged.state_dict(), run.state.model)
    ema.ema_model = shadow
    run.fit()
    expected = 0.75 * averaged.module.module[5].weight + 0.25 * run.state.model.module[5].weight
    torch.testing.assert_close(dict(ema.ema_model.named_parameters())['module.5.weight'], expected.detach())
    run.close()
