"""Averages of other libraries: read from files that they wrote themselves, and handed over to the bit and back."""

import contextlib
import copy
import importlib.util
import json
import re
import warnings
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_avg_fn, get_ema_multi_avg_fn

from composer_ema import CheckpointError, EMAOptimizer, ShadowModel, export, load_average
from composer_ema.averages import Equal
from composer_ema.checkpoints import states
from composer_ema.checkpoints.inspection import ALIAS, describe
from composer_ema.optimizer_state import EMA_STATE_VERSION
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


# Files of EMAOptimizer and ShadowModel, and plain weights


class Net(nn.Module):
    """Two layers of one shape around a BatchNorm, and a frozen layer."""

    def __init__(self):
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Linear(3, 3)
        self.frozen = nn.Linear(3, 2).requires_grad_(False)

    def forward(self, x):
        return self.frozen(self.last(self.norm(self.first(x))))


def net(seed=0):
    torch.manual_seed(seed)
    return moved(Net())


def optimized(model, *, named=True, parameters=None, steps=3, **options):
    inner = torch.optim.SGD(list(model.parameters()) if parameters is None else parameters, lr=0.1)
    optimizer = EMAOptimizer(inner, decay=0.5, model=model if named else None, **options)
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.randn(4, 3)).square().sum().backward()
        optimizer.step()
    return optimizer


def with_average(model, shadow):
    """What a model that holds the average has in its state dict."""
    with shadow.swapped(model):
        return copy.deepcopy(model.state_dict())


#: What scripts and trainers put into a file, of a model and its EMAOptimizer.
OWN_FILES = {
    'beside the model': lambda model, optimizer: {'model': model.state_dict(), 'optimizer': optimizer.state_dict()},
    'under any keys': lambda model, optimizer: {'epoch': 3, 'weights': model.state_dict(), 'o': optimizer.state_dict()},
    "of Lightning": lambda model, optimizer: {
        'state_dict': model.state_dict(), 'optimizer_states': [optimizer.state_dict()], 'loops': {'fit': {'a': {}}},
        'pytorch-lightning_version': '2.6.6',
    },
    'nested': lambda model, optimizer: {
        'app': {'model': model.state_dict(), 'optim': {'state': {}, 'param_groups': []},
                'ema': optimizer.ema_state_dict()}
    },
    'in a state': lambda model, optimizer: {'state': {'model': model.state_dict(), 'opt': optimizer.state_dict()}},
    'of DDP': lambda model, optimizer: {
        'model': Wrapped(model).state_dict(), 'optimizer': optimizer.state_dict(),
    },
    'the optimizer alone': lambda _, optimizer: optimizer.state_dict(),
    'the average alone': lambda _, optimizer: optimizer.ema_state_dict(),
    'the shadow alone': lambda _, optimizer: optimizer.shadow.state_dict(),
}  # fmt: skip


@pytest.mark.parametrize('kind', OWN_FILES)
def test_a_file_of_ema_optimizer_gives_its_average(kind, tmp_path):
    model = net()
    optimizer = optimized(model)
    expected = with_average(model, optimizer.shadow)
    torch.save(OWN_FILES[kind](model, optimizer), tmp_path / 'a.pt')
    other = net(seed=1)
    is_whole = 'alone' not in kind
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        loaded, for_other = load_average(tmp_path / 'a.pt'), load_average(tmp_path / 'a.pt', other)
    frozen = {name for name in expected if name.startswith('frozen')}
    assert_same_bits(loaded, {n: t for n, t in expected.items() if is_whole or n not in frozen})
    left = {} if is_whole else {name: other.state_dict()[name] for name in frozen}
    assert list(for_other) == list(other.state_dict())
    assert_same_bits(for_other, {**expected, **left})
    assert for_other['first.weight'].ne(model.first.weight).any()
    metadata = export(tmp_path / 'a.pt', tmp_path / 'a.safetensors')
    assert (metadata['weights'], metadata['num_updates']) == ('exponential moving average', '3') or 'shadow' in kind
    assert_same_bits(safetensors.torch.load_file(tmp_path / 'a.safetensors'), loaded)


def test_a_state_of_version_1_is_read_and_a_newer_one_is_not(tmp_path):
    model = net()
    state = optimized(model).ema_state_dict()
    old = {name: value for name, value in state.items() if name not in ('started_at', 'profile')}
    old |= {'version': 1, 'log_kept': -1.0}
    for name, held in (('old', old), ('new', {**state, 'version': 99}), ('odd', {**state, 'version': '2'})):
        torch.save({'model': model.state_dict(), 'optimizer': {'ema': held}}, tmp_path / f'{name}.pt')
    assert_same_bits(load_average(tmp_path / 'old.pt'), with_average(model, optimized_shadow(model, state)))
    for name, version in (('new', '99'), ('odd', "'2'")):
        with pytest.raises(CheckpointError, match=f'format version {version}, this release reads up to 3. Install'):
            load_average(tmp_path / f'{name}.pt')


def optimized_shadow(model, state):
    shadow = ShadowModel(model)
    shadow.load_state_dict(state['average'])
    return shadow


def test_the_versions_that_are_read_are_those_that_are_written():
    assert states.OPTIMIZER_VERSION == EMA_STATE_VERSION


def test_a_distributed_checkpoint_and_the_file_it_is_turned_into_are_read(tmp_path):
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

    model = net()
    optimizer = optimized(model)
    state = {'model': model.state_dict(), 'optim': get_optimizer_state_dict(model, optimizer)}
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')  # that there is one process
        dcp.save({'app': {**state, 'ema': optimizer.ema_state_dict()}}, checkpoint_id=tmp_path / 'folder')
        dcp_to_torch_save(tmp_path / 'folder', tmp_path / 'a.pt')
    for path in (tmp_path / 'a.pt', tmp_path / 'folder'):
        assert_same_bits(load_average(path), with_average(model, optimizer.shadow))


@pytest.mark.parametrize('through', ['first.pt', 'first.safetensors', 'first'])
@pytest.mark.parametrize('back', ['second.pt', 'second.safetensors'])
def test_what_export_wrote_is_read_and_exported_again_with_its_facts(through, back, tmp_path):
    model = net()
    optimizer = optimized(model)
    torch.save({'model': model.state_dict(), 'optimizer': optimizer.state_dict()}, tmp_path / 'a.pt')
    first = export(tmp_path / 'a.pt', tmp_path / through)
    second = export(tmp_path / through, tmp_path / back)
    assert first == second
    expected = with_average(model, optimizer.shadow)
    for path in (tmp_path / through, tmp_path / back):
        assert_same_bits(load_average(path), expected)
        assert_same_bits(load_average(path, net(seed=1)), expected)
    if back.endswith('.pt'):
        assert_same_bits(torch.load(tmp_path / back, weights_only=True), expected)


def test_weights_that_we_did_not_export_are_no_average(tmp_path):
    weights = dict(nn.Linear(2, 2).state_dict())
    safetensors.torch.save_file(weights, tmp_path / 'a.safetensors', metadata={'format': 'pt'})
    with pytest.raises(CheckpointError, match='no average of a known kind'):
        load_average(tmp_path / 'a.safetensors')
    content = (tmp_path / 'a.safetensors').read_bytes()
    (tmp_path / 'cut.safetensors').write_bytes(content[:-3])
    with pytest.raises(CheckpointError, match=r'cut\.safetensors cannot be read: it is truncated, damaged'):
        load_average(tmp_path / 'cut.safetensors')


def test_plain_weights_are_an_average_where_a_key_says_so(tmp_path):
    model = net()
    ema = {name: tensor + 1 for name, tensor in model.named_parameters()}
    torch.save({'model': model.state_dict(), 'ema': ema, 'run': {'state.1': {'ema': dict(ema)}}}, tmp_path / 'a.pt')
    for key in ('ema', 'run.state.1.ema'):
        loaded = load_average(tmp_path / 'a.pt', key=key)
        assert_same_bits(loaded, {**model.state_dict(), **ema})
        assert_same_bits(load_average(tmp_path / 'a.pt', net(seed=1), key=key), loaded)
    assert export(tmp_path / 'a.pt', tmp_path / 'a.safetensors', key='ema')['key'] == 'ema'
    assert_same_bits(safetensors.torch.load_file(tmp_path / 'a.safetensors'), loaded)
    with pytest.raises(CheckpointError, match=r"Weights lie under ema, model, run.state.1.ema.*key='ema' \(--key ema"):
        load_average(tmp_path / 'a.pt')
    with pytest.raises(CheckpointError, match=r"under the key 'emas'. The outer keys are model, ema, run"):
        load_average(tmp_path / 'a.pt', key='emas')
    with pytest.raises(CheckpointError, match=r"what lies under 'run' is no average.*under run\.state\.1\.ema"):
        load_average(tmp_path / 'a.pt', key='run')
    with pytest.raises(CheckpointError, match=r'6 unexpected: .*norm\.bias'):
        load_average(tmp_path / 'a.pt', nn.Linear(3, 3), key='ema')


def test_of_several_averages_a_key_chooses_and_without_one_all_are_listed(tmp_path):
    one, two = net(), net(seed=1)
    states = [optimized(model).state_dict() for model in (one, two)]
    torch.save({'optimizer_states': states}, tmp_path / 'a.pt')
    listed = 'averages under the keys optimizer_states.0.ema, optimizer_states.1.ema. Pass one of them, as in key='
    for call in (load_average, lambda path: export(path, tmp_path / 'a.safetensors')):
        with pytest.raises(CheckpointError, match=listed):
            call(tmp_path / 'a.pt')
    for key in ('optimizer_states.1', 'optimizer_states.1.ema'):
        loaded = load_average(tmp_path / 'a.pt', key=key)
        assert_same_bits(loaded, {n: t for n, t in with_average(two, optimized_shadow(two, states[1]['ema'])).items()
                                  if 'frozen' not in n})  # fmt: skip
    with pytest.raises(CheckpointError, match="no average called 'ema': those in the file have no labels"):
        load_average(tmp_path / 'a.pt', average='ema')


def test_without_names_position_decides_and_a_warning_says_so(tmp_path):
    model = net()
    optimizer = optimized(model, named=False, parameters=[p for p in model.parameters() if p.requires_grad])
    average = dict(zip(('first.weight', 'first.bias', 'norm.weight', 'norm.bias', 'last.weight', 'last.bias'),
                       optimizer.shadow.parameters(), strict=True))  # fmt: skip
    torch.save(optimizer.state_dict(), tmp_path / 'alone.pt')
    torch.save({'model': model.state_dict(), 'optimizer': optimizer.state_dict()}, tmp_path / 'both.pt')
    for name, rest in (('alone', other := net(seed=1)), ('both', model)):
        with pytest.warns(UserWarning, match='tensors') as caught:
            loaded = load_average(tmp_path / f'{name}.pt', other)
        assert_same_bits(loaded, {**rest.state_dict(), **average})
        assert re.search(r'no names: its 6 tensors were matched .* by position', str(caught[0].message))
        assert ['norm.running_mean' in str(warning.message) for warning in caught[1:]] == [True] * (name == 'alone')
        assert {warning.filename for warning in caught} == {__file__}
        with pytest.raises(CheckpointError, match=r'keeps the order of the parameters and no names.*model=model'):
            load_average(tmp_path / f'{name}.pt')
    torch.save({'model': nn.Linear(9, 9).state_dict(), 'o': optimizer.state_dict()}, tmp_path / 'of-another.pt')
    with pytest.warns(UserWarning, match='by position'):
        assert_same_bits(load_average(tmp_path / 'of-another.pt', model), {**model.state_dict(), **average})
    with pytest.raises(CheckpointError, match='holds 6 tensors without names, but the model has 2'):
        load_average(tmp_path / 'alone.pt', nn.Linear(3, 3))
    with pytest.raises(CheckpointError, match='of another shape'):
        load_average(tmp_path / 'alone.pt', nn.Sequential(*(nn.Linear(3, 4) for _ in range(3))))


class LanguageModel(nn.Module):
    """A language model whose output layer is its embedding, as a state dict has it under two names."""

    def __init__(self, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.emb, self.head = nn.Embedding(5, 4), nn.Linear(4, 5, bias=False)
        self.head.weight = self.emb.weight

    def forward(self, x):
        return self.head(self.emb(x))


def of_composers_ema(model, parameters):
    state = {
        'ema_model': {'named_parameters_dict': parameters, 'named_buffers_dict': {}},
        'ema_weights_active': False,
        'ema_started': True,
    }
    return {'state': {'model': model.state_dict(), 'algorithms': [('EMA', state)]}}


#: A file of a tied model, from its average by the names of its parameters, of which there is one; and the key in it.
TIED = {
    'a plain dictionary': (lambda model, average: {'model': model.state_dict(), 'ema': average}, 'ema'),
    'a plain list': (lambda model, average: {'model': model.state_dict(), 'ema': list(average.values())}, 'ema'),
    'of diffusers': (
        lambda model, average: {'model': model.state_dict(), 'shadow_params': [*average.values()],
                                'optimization_step': 1},
        None,
    ),
    'of torch-ema': (lambda model, average: {'model': model.state_dict(), 'ema': {
        'shadow_params': [*average.values()], 'num_updates': 1}}, None),
    "of Composer's EMA": (of_composers_ema, None),
    'of an older ShadowModel': (lambda model, average: {'model': model.state_dict(), 'ema': {
        'version': 1, 'num_updates': 1, 'parameters': average, 'buffers': {}}}, None),
}  # fmt: skip


@pytest.mark.parametrize('kind', TIED)
def test_the_average_stands_under_every_name_of_a_tied_weight(kind, tmp_path):
    make, key = TIED[kind]
    model, average = LanguageModel(), torch.randn(5, 4)
    torch.save(make(model, {'emb.weight': average}), tmp_path / 'a.pt')
    loaded = load_average(tmp_path / 'a.pt', LanguageModel(seed=1), key=key)
    assert_same_bits(loaded, {'emb.weight': average, 'head.weight': average})
    if kind in ('a plain list', 'of diffusers', 'of torch-ema'):
        return
    assert_same_bits(load_average(tmp_path / 'a.pt', key=key), loaded)
    export(tmp_path / 'a.pt', tmp_path / 'out.safetensors', key=key)
    assert_same_bits(safetensors.torch.load_file(tmp_path / 'out.safetensors'), loaded)
    [described] = describe(tmp_path / 'a.pt', key=key).averages
    tied = {tensor.name: tensor for tensor in described.tensors}['head.weight']
    assert (tied.role, tied.average_bytes) == (ALIAS, 0)
    assert tied.relative_distance > 0


@pytest.mark.parametrize('by', ['position', 'names', 'model'])
def test_ema_optimizer_stands_under_every_name_of_a_tied_weight(by, tmp_path):
    model = LanguageModel()
    inner = torch.optim.SGD(model.named_parameters() if by == 'names' else model.parameters(), lr=1.0)
    optimizer = EMAOptimizer(inner, decay=0.9, model=model if by == 'model' else None)
    for _ in range(3):
        model(torch.arange(5)).square().mean().backward()
        optimizer.step()
    torch.save({'model': model.state_dict(), 'optimizer': optimizer.state_dict()}, tmp_path / 'a.pt')
    average = next(optimizer.shadow.parameters())
    expected = {'emb.weight': average, 'head.weight': average}
    with pytest.warns(UserWarning, match='by position') if by == 'position' else contextlib.nullcontext():
        assert_same_bits(load_average(tmp_path / 'a.pt', model), expected)
    if by != 'position':
        assert_same_bits(load_average(tmp_path / 'a.pt'), expected)


def test_a_model_without_values_in_the_file_is_refused(tmp_path):
    model = net()
    optimizer = optimized(model, named=False, parameters=[p for p in model.parameters() if p.requires_grad])
    weights = {**model.state_dict(), 'norm.running_mean': torch.empty(3, device='meta')}
    torch.save({'model': weights, 'optimizer': optimizer.state_dict()}, tmp_path / 'a.pt')
    with pytest.warns(UserWarning, match='by position'), pytest.raises(CheckpointError, match='running_mean in the f'):
        load_average(tmp_path / 'a.pt', model)
    torch.save(optimized(model).ema_state_dict(), tmp_path / 'b.pt')
    with pytest.raises(CheckpointError, match=r'frozen.weight is not in the file, and the model .* has it on the meta'):
        load_average(tmp_path / 'b.pt', net().to('meta'))


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        ({'model': 'x'}, r"model must be the torch.nn.Module .*, got 'x'\. Pass the module itself"),
        ({'model': {'weight': torch.zeros(2)}}, 'got a dict. Pass the module itself, not its .* state dict'),
        ({'key': 3}, 'key must be a string, got 3. Pass the keys in the file, joined with dots'),
        ({'average': ['ema']}, "average must be a string, got a list. .* as in average='ema'"),
        ({'checkpoint': b'a.pt'}, "checkpoint must be the path of a file, a string or a pathlib.Path, got b'a.pt'"),
        ({'checkpoint': {'a': 1}}, 'checkpoint must be the path of a file, .* got a dict'),
        ({'checkpoint': None}, 'checkpoint must be the path of a file, .* got None'),
    ],
)
def test_an_argument_of_the_wrong_type_is_named(arguments, message, tmp_path):
    torch.save(ShadowModel(net()).state_dict(), tmp_path / 'a.pt')
    given = {'checkpoint': tmp_path / 'a.pt', **arguments}
    with pytest.raises(TypeError, match=message):
        load_average(**given)
    if 'model' in arguments:
        return
    with pytest.raises(TypeError, match=message):
        export(**given, out=tmp_path / 'out.pt')
    if 'average' not in arguments:
        with pytest.raises(TypeError, match=message):
            describe(**given)


def test_a_wrong_out_or_prefix_is_named(tmp_path):
    torch.save(ShadowModel(net()).state_dict(), tmp_path / 'a.pt')
    with pytest.raises(TypeError, match=r'out must be the path of a file, .* got 3'):
        export(tmp_path / 'a.pt', 3)
    with pytest.raises(TypeError, match=r"strip_prefix must be a string, got True. .* or 'auto'"):
        export(tmp_path / 'a.pt', tmp_path / 'out.pt', strip_prefix=True)


def test_a_lazy_model_is_named_and_not_the_file(tmp_path):
    torch.save({'model': nn.Linear(2, 2).state_dict(), 'ema': {'weight': torch.zeros(2)}}, tmp_path / 'a.pt')
    with pytest.raises(ValueError, match=r'^weight, bias in model are lazy .* Run one forward pass first') as caught:
        load_average(tmp_path / 'a.pt', nn.LazyLinear(2), key='ema')
    assert not isinstance(caught.value, CheckpointError)


@pytest.mark.parametrize('same', ['path', 'symlink', 'target', 'hard link'])
def test_an_export_does_not_overwrite_its_checkpoint(same, tmp_path):
    shadow = ShadowModel(net())
    shadow.update(net(1), smoothing=0.5)
    path, link = tmp_path / 'ba3.pt', tmp_path / 'latest-rank0.pt'
    torch.save(shadow.state_dict(), path)
    if same == 'hard link':
        link.hardlink_to(path)
    elif same != 'path':
        link.symlink_to(path.name)
    before = path.read_bytes()
    given, out = {'path': (path, path), 'target': (link, path)}.get(same, (path, link))
    with pytest.raises(CheckpointError, match=f'^{out} is the checkpoint itself.*Write to another file'):
        export(given, out)
    assert path.read_bytes() == before
    assert sorted(tmp_path.iterdir()) == sorted({path, *([] if same == 'path' else [link])})
    export(path, tmp_path / 'out.pt')
    export(path, tmp_path / 'out.pt')  # an export is overwritten


def test_frozen_parameters_count_as_places_in_a_group(tmp_path):
    model = net()
    model.first.bias.requires_grad_(False)
    optimizer = optimized(model, named=False)
    torch.save(optimizer.state_dict(), tmp_path / 'a.pt')
    assert '0.1' not in optimizer.state_dict()['ema']['average']['parameters']
    with pytest.warns(UserWarning, match='by position'):
        loaded = load_average(tmp_path / 'a.pt', model)
    with optimizer.swap_ema_weights():
        assert_same_bits(loaded, dict(model.state_dict()))
    model.last.weight.requires_grad_(False)
    groups = [{'params': model.first.parameters()}, {'params': model.last.parameters()}]
    torch.save(optimized(model, named=False, parameters=groups).state_dict(), tmp_path / 'a.pt')
    with pytest.raises(CheckpointError, match=r'its places 0\.0, 1\.1 do not tell'):
        load_average(tmp_path / 'a.pt', model)


def test_what_the_average_leaves_out_comes_from_the_model_with_a_warning(tmp_path):
    model = net()
    torch.save(optimized(model, exclude='last').ema_state_dict(), tmp_path / 'a.pt')
    other = net(seed=1)
    with pytest.warns(UserWarning, match='2 tensors are not in the average of EMAOptimizer.*last.weight, last.bias'):
        loaded = load_average(tmp_path / 'a.pt', other)
    assert torch.equal(loaded['last.weight'], other.last.weight)


def test_before_the_first_update_there_is_no_average_yet(tmp_path):
    torch.save(optimized(net(), steps=0).state_dict(), tmp_path / 'a.pt')
    with pytest.raises(CheckpointError, match='no average yet: EMAOptimizer counts no update'):
        load_average(tmp_path / 'a.pt')


GOOD = {'version': 1, 'num_updates': 1, 'parameters': {'weight': torch.zeros(2, 2)}, 'buffers': {}, 'aliases': {}}
ROUND: dict = {'epoch': 1}
ROUND['again'] = ROUND
ROUND.update({f'again {i}': ROUND for i in range(30)})


@pytest.mark.parametrize(
    ('state', 'message'),
    [
        ({**GOOD, 'version': 2}, 'state of ShadowModel has format version 2, this release reads up to 1'),
        ({**GOOD, 'version': True}, 'format version True'),
        ({**GOOD, 'num_updates': -1}, "'num_updates' of the state of ShadowModel is -1, not a count"),
        ({**GOOD, 'parameters': [1]}, "'parameters' of the state of ShadowModel is a list"),
        ({**GOOD, 'parameters': {'weight': 1}}, "weight in 'parameters' of the state of ShadowModel are no tensors"),
        ({**GOOD, 'buffers': {1: torch.zeros(1)}}, "'buffers' of the state of ShadowModel is a dict, not a dict"),
        ({**GOOD, 'aliases': {'a': 1}}, "'aliases' of the state of ShadowModel maps a to what is no name"),
        ({**GOOD, 'training_weights': 3}, "'training_weights' of the state of ShadowModel is a int"),
        ({**GOOD, 'parameters': {'weight': torch.zeros(2, 2, device='meta')}}, 'weight in the file are on the meta'),
        ({**GOOD, 'parameters': {'weight': torch.zeros(3, 2)}}, r'weight \(expected \(2, 2\), got \(3, 2\)\)'),
        ({**GOOD, 'parameters': {'other': torch.zeros(2, 2)}}, '1 unexpected: other'),
        ({'version': 2, 'num_steps': 'a', 'settings': {}, 'average': GOOD}, "'num_steps' .*EMAOptimizer is a str"),
        ({'version': 2, 'num_steps': 1, 'settings': 3, 'average': GOOD}, "'settings' .*EMAOptimizer is a int"),
        *(
            ({'version': 2, 'num_steps': 1, 'settings': {name: value}, 'average': GOOD}, message)
            for name in ('decay', 'average')
            for value, message in (
                (torch.zeros(2), f"'settings' of the state of EMAOptimizer maps '{name}' to a Tensor, not a name to a"),
                ([[[1]]], 'to a list, not a name to a number'),
                (2**63, 'to a int, not a name to a number'),
            )
        ),
        ({'version': 2, 'num_steps': 2**63, 'settings': {}, 'average': GOOD}, "'num_steps' .* is a int, not a count"),
        ({**GOOD, 'num_updates': torch.ones(2)}, "'num_updates' of the state of ShadowModel is a Tensor, not a count"),
        ({'shadow_params': [], 'num_updates': torch.ones((), device='meta')}, "'num_updates' is .*, not a count"),
        ({'shadow_params': [torch.zeros(2)], 'num_updates': 1, 'decay': 10**400}, '1 tensors without names'),
        ({'version': 2, 'num_steps': 1, 'settings': {}, 'average': None}, "'average' .*EMAOptimizer is a NoneType"),
        ({'version': 2, 'averages': {'ema': 3}}, "'config'|average 'ema' is a int|'started'"),
        (ROUND, 'no average of a known kind under the keys epoch, again'),
    ],
)
def test_a_broken_state_of_ours_is_refused_in_words(state, message, tmp_path):
    torch.save({'deep': [{'er': state}]} if state is not ROUND else state, tmp_path / 'a.pt')
    model = nn.Linear(2, 2)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(CheckpointError, match=message):
        load_average(tmp_path / 'a.pt', model)
    assert_same_bits(dict(model.state_dict()), dict(before))


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
