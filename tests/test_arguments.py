"""What users pass: converted to plain values where it comes in, or refused by name before anything is changed."""

from __future__ import annotations

import copy
import enum
import functools
import importlib.util
import math
from decimal import Decimal
from fractions import Fraction
from types import MappingProxyType

import hostile_arguments as hostile
import numpy as np
import pytest
import torch
from torch import nn

from composer_ema import (
    EMAOptimizer,
    ShadowModel,
    ShadowModels,
    Snapshots,
    compute_ema,
    gather_state_dict,
    plain,
    update_bn,
)
from composer_ema.averages import BiasCorrected, HalfLife, Moment, Power, Smoothing, WarmedUp
from composer_ema.shadow import loan
from composer_ema.spans import ArgumentError, Span

HAS_COMPOSER = importlib.util.find_spec('composer') is not None
needs_composer = pytest.mark.skipif(not HAS_COMPOSER, reason='no Composer')


class Word(str, enum.Enum):
    COPY = 'copy'


class Text(str):
    pass


class Silent:
    def __repr__(self) -> str:
        raise OSError


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.1)


def algorithm(name: str, **arguments):
    import composer_ema

    return getattr(composer_ema, name)(**arguments)


class TestPlain:
    @pytest.mark.parametrize('value', [True, np.bool_(True), np.array(True), torch.tensor(True)])
    def test_a_flag_is_a_bool(self, value):
        assert plain.flag('overlap', value) is True

    @pytest.mark.parametrize(
        'value', ['False', '', 0, 1, None, 1.0, np.int64(1), np.array([True]), torch.tensor([True]), torch.ones(2), []]
    )
    def test_what_is_only_truthy_is_no_flag(self, value):
        with pytest.raises(TypeError, match=r'overlap must be True or False, got '):
            plain.flag('overlap', value)

    @pytest.mark.parametrize(
        'value', [3, np.int64(3), np.uint8(3), np.array(3), torch.tensor(3), enum.IntEnum('E', {'A': 3}).A]
    )
    def test_a_whole_number_is_an_int(self, value):
        assert type(plain.whole('seed', value)) is int
        assert plain.whole('seed', value) == 3

    @pytest.mark.parametrize('value', [True, 3.0, '3', None, np.float64(3), torch.tensor(3.0), torch.tensor([3])])
    def test_what_is_no_whole_number_is_refused(self, value):
        with pytest.raises(TypeError, match='seed must be a whole number of at least 0, got '):
            plain.whole('seed', value)

    @pytest.mark.parametrize(
        ('value', 'said'), [(0, 'of at least 1, got 0'), (2**63, r'below 2\*\*63'), (10**400, 'below')]
    )
    def test_a_whole_number_out_of_range_is_refused(self, value, said):
        with pytest.raises(ArgumentError, match=said) as error:
            plain.whole('every_n_steps', value, least=1)
        assert error.value.argument == 'every_n_steps'
        assert len(str(error.value)) < 300

    @pytest.mark.parametrize(
        'value', [0.5, np.float32(0.5), np.float64(0.5), np.longdouble(0.5), np.array(0.5), torch.tensor(0.5),
                  torch.tensor(0.5, dtype=torch.bfloat16), Fraction(1, 2), Decimal('0.5')],
    )  # fmt: skip
    def test_a_number_is_a_float(self, value):
        assert type(plain.number('decay', value)) is float
        assert plain.number('decay', value) == 0.5

    def test_a_whole_number_stays_whole(self):
        assert type(plain.number('half_life', np.int64(3))) is int
        assert type(plain.scalar(np.int64(3))) is int
        assert type(plain.scalar(torch.tensor(2))) is int

    @pytest.mark.parametrize(
        'value', ['0.5', True, None, 1j, b'1', torch.ones(1), torch.ones((), device='meta'), Silent()]
    )
    def test_what_is_no_number_is_refused(self, value):
        with pytest.raises(TypeError, match='decay must be a number, got'):
            plain.number('decay', value)

    @pytest.mark.parametrize('value', [10**400, Fraction(10**400), Decimal('sNaN')])
    def test_a_number_that_no_float_holds_is_refused(self, value):
        with pytest.raises(ArgumentError, match='decay must be a number that a float can hold'):
            plain.number('decay', value)

    @pytest.mark.parametrize('value', [Word.COPY, Text('copy'), np.str_('copy')])
    def test_a_text_is_a_string(self, value):
        assert type(plain.choice('buffers', value, ['average', 'copy'])) is str
        assert plain.choice('buffers', value, ['average', 'copy']) == plain.text('buffers', value) == 'copy'
        assert type(plain.text('buffers', value)) is str
        assert type(plain.scalar(value)) is str

    @pytest.mark.parametrize('value', ['mean', None, ['copy'], np.array(['copy', 'copy']), torch.ones(2), b'copy'])
    def test_another_choice_is_refused_whatever_its_kind(self, value):
        with pytest.raises(ArgumentError, match=r"buffers must be 'average' or 'copy', got "):
            plain.choice('buffers', value, ['average', 'copy'])

    @pytest.mark.parametrize('value', ['names', b'names', 3, None, torch.tensor(1.0), nn.Linear])
    def test_what_holds_no_names_is_refused(self, value):
        with pytest.raises(TypeError, match='labels must be a list of names, got '):
            plain.names('labels', value)


#: How to write numbers that are no Python floats, 0.5 each.
HALVES = [np.float32(0.5), np.array(0.5), torch.tensor(0.5), Fraction(1, 2), Decimal('0.5')]
#: What is accepted and must become plain, by door.
ODD = {
    'ShadowModel': [
        {'seed': np.int64(3), 'skip_nonfinite': np.bool_(True)},
        {'buffers': Word.COPY, 'include': [np.str_('0'), Text('running')]},
        {'buffers': MappingProxyType({np.str_('running'): Text('copy')})},
        {'dtype': np.str_('float64'), 'device': Text('cpu'), 'backend': np.str_('foreach')},
    ],
    'EMAOptimizer': [
        *({'decay': half} for half in HALVES),
        *({'half_life': half, 'warmup': half} for half in HALVES),
        {'half_life': {Text('a'): np.int64(3), np.str_('b'): Fraction(7, 2)}, 'bias_correction': np.bool_(True)},
        {'power': {'a': np.float32(0.1)}, 'average': {'b': np.str_('equal')}},
        {'every_n_steps': np.int32(2), 'start': torch.tensor(1), 'bias_correction': torch.tensor(True)},
        {'gamma': Decimal(2), 'buffers': Word.COPY, 'seed': np.uint8(1)},
        {'average': np.str_('equal')},
    ],
    'Snapshots': [
        {'every': np.int64(2), 'power': np.float32(0.1), 'run_name': np.str_('mine'), 'overwrite': np.bool_(True)},
        {'every': Text('2ba'), 'power': [Fraction(1, 10), Decimal('0.2')], 'num_steps': np.int64(4)},
        {'every': np.int64(2), 'num_steps': torch.tensor(4), 'halvings': torch.tensor(1)},
    ],
    'EMA': [
        *({'smoothing': half, 'bias_correction': np.bool_(True)} for half in HALVES),
        {'half_life': np.str_('10ba'), 'warmup': np.float32(0.5), 'ema_start': Text('2ba')},
        {'half_life': {np.str_('a'): Span(2, 'ba')}, 'power': {'b': np.float64(0.1)}, 'export_weights': Text('a')},
        {'half_life': {'a': '2ba'}, 'evaluate_with': {Text('eval'): Text('a')}},
        {'snapshots': {'every': Text('2ba'), 'power': [np.float32(0.1)], 'halvings': np.int64(0), 'folder': Text('x')}},
        {'average': np.str_('equal'), 'shadow_dtype': Text('float64'), 'include': (np.str_('0'),), 'seed': np.int64(1)},
    ],
    'SWA': [
        {'swa_lr': np.float32(0.5), 'anneal_strategy': np.str_('cos'), 'refresh_batchnorm': np.int64(2)},
        {'swa_lr': [Fraction(1, 2), np.float64(0.5)], 'refresh_batchnorm': np.bool_(False), 'swa_start': Text('2ba')},
    ],
}  # fmt: skip
each_odd = pytest.mark.parametrize(
    ('door', 'arguments'),
    [
        pytest.param(door, each, marks=needs_composer if door in ('EMA', 'SWA') else ())
        for door, several in ODD.items()
        for each in several
    ],
    ids=repr,
)


def built(door: str, model: nn.Module, folder, arguments):
    if door == 'ShadowModel':
        return ShadowModel(model, **arguments)
    if door == 'EMAOptimizer':
        return EMAOptimizer(sgd(model), model=model, **arguments)
    if door == 'Snapshots':
        return Snapshots(model, folder, **{'every': 1, **arguments})
    return hostile.started(algorithm(door, **arguments), model)


@each_odd
def test_what_is_accepted_is_saved_in_plain_types_and_goes_on(door, arguments, tmp_path):
    model = network()
    first = built(door, model, tmp_path, arguments)
    state = first.state_dict()
    assert hostile.not_plain(state) is None
    loaded = hostile.saved(state)
    fresh = built(door, model, tmp_path, arguments)
    fresh.load_state_dict(loaded)
    resumed = fresh.state_dict()
    assert hostile.not_plain(resumed) is None
    if door in ('EMA', 'SWA'):  # whose averages have begun by then
        assert resumed['config'] == loaded['config']
    else:
        assert hostile.bits(resumed) == hostile.bits(loaded)
    repr(first)


#: Each flag by its door.
FLAGS = [
    *(('ShadowModel', name) for name in ('overlap', 'skip_nonfinite', 'compensated', 'shard_over_ranks')),
    ('ShadowModels', 'overlap'),
    *(('EMAOptimizer', name) for name in ('bias_correction', 'skip_nonfinite', 'compensated')),
    *(('Snapshots', name) for name in ('overwrite', 'overlap')),
    *(('update_bn', name) for name in ('synchronize', 'progress_bar')),
    *(('EMA', name) for name in ('bias_correction', 'skip_nonfinite')),
    ('SWA', 'schedule_swa_lr'),
    *(('resolve', name) for name in ('joining', 'leaving')),
    ('swap_ema_weights', 'enabled'),
    ('zero_grad', 'set_to_none'),
    *(('merge', name) for name in ('equal', 'overwrite')),
    ('reconstruct', 'anyway'),
]


def call(door: str, model: nn.Module, folder, **arguments):
    import composer_ema

    match door:
        case 'compute_ema':
            return compute_ema(model, network(), **arguments)
        case 'update':
            return ShadowModel(network()).update(model, smoothing=0.5)
        case 'swap_in':
            return ShadowModel(network()).swap_in(model)
        case 'ShadowModels':
            return ShadowModels(model, ['a'], **arguments)
        case 'update_bn':
            return update_bn(model, [torch.randn(4, 2)], **arguments)
        case 'resolve':
            return ShadowModel(model).resolve(model, **arguments)
        case 'swap_ema_weights' | 'zero_grad':
            return getattr(EMAOptimizer(sgd(model), model=model), door)(**arguments)
        case 'merge':
            return composer_ema.merge(['a.pt', 'b.pt'], folder / 'out.pt', **{'equal': True, **arguments})
        case 'reconstruct':
            return composer_ema.reconstruct(folder, half_life='1ba', **arguments)
        case 'EMA' | 'SWA':
            return algorithm(door, **arguments)
    return built(door, model, folder, arguments)


@pytest.mark.parametrize(('door', 'name'), FLAGS)
@pytest.mark.parametrize('value', ['False', 0, torch.ones(2)], ids=['text', 'number', 'tensor'])
def test_a_flag_is_true_or_false_at_every_door(door, name, value, tmp_path):
    if door in ('EMA', 'SWA') and not HAS_COMPOSER:
        pytest.skip('no Composer')
    with pytest.raises(TypeError, match=f'{name} must be True or False, got'):
        call(door, network(), tmp_path, **{name: value})


class TestModels:
    @pytest.mark.parametrize(
        'given',
        [
            None,
            {},
            [],
            nn.Linear,
            len,
            lambda: network().parameters(),
            lambda: network().state_dict(),
            lambda: sgd(network()),
        ],
    )
    @pytest.mark.parametrize(
        'door', ['ShadowModel', 'ShadowModels', 'Snapshots', 'compute_ema', 'update_bn', 'update', 'swap_in']
    )
    def test_what_is_no_module_is_refused_in_words(self, door, given, tmp_path):
        given = given() if getattr(given, '__name__', '') == '<lambda>' else given
        with pytest.raises(TypeError, match=r'model must be a .*odule, got '):
            call(door, given, tmp_path)

    def test_a_class_is_called_one(self):
        with pytest.raises(TypeError, match='got the class Linear, which is to be called first'):
            ShadowModel(nn.Linear)

    @pytest.mark.parametrize('which', ['model', 'ema_model', 'both'])
    @pytest.mark.parametrize(
        'form', [lambda module: module, lambda module: module.state_dict()], ids=['module', 'state']
    )
    def test_compute_ema_refuses_what_has_no_values(self, which, form):
        model, average = network(), network()
        if which in ('model', 'both'):
            model.to('meta')
        if which in ('ema_model', 'both'):
            average.to('meta')
        with pytest.raises(
            ValueError, match=f'of {"ema_model" if which == "ema_model" else "model"} is on the meta device'
        ):
            compute_ema(model, form(average))

    def test_a_refused_constructor_leaves_the_model_as_it_was(self, tmp_path):
        model = network()
        before, hooks = hostile.weights_of(model), hostile.hooks_of(model)
        for arguments in ({'seed': -1}, {'include': 'nothing'}, {'device': 'cuda:99'}, {'buffers': {'x': 'copy'}}):
            with pytest.raises(ValueError, match=r'must|match'):
                ShadowModel(model, **arguments)
        with pytest.raises(ValueError, match='half_life'):
            EMAOptimizer(sgd(model), model=model, half_life=-1)
        with pytest.raises(ValueError, match='power'):
            Snapshots(model, tmp_path / 'none', every=1, power=[7])
        assert hostile.weights_of(model) == before
        assert hostile.hooks_of(model) == hooks
        assert not loan.is_open(model)
        assert not (tmp_path / 'none').exists()


class TestMoves:
    @pytest.mark.parametrize(
        ('where', 'said'),
        [
            ({'device': 'meta'}, "must hold values, got 'meta'"),
            ({'device': torch.device('meta')}, "must hold values, got 'meta'"),
            ({'device': 'cuda:99'}, 'must be one of this machine'),
            ({'device': 'nowhere'}, "such as 'cpu' or 'cuda:0', got 'nowhere'"),
            ({'device': torch.float16}, r'A dtype is passed as dtype=torch\.float16'),
            ({'device': network}, r'got <function network'),
            ({'dtype': int}, "dtype must be float64, .* got <class 'int'>"),
            ({'dtype': 'complex64'}, "dtype must be float64, .* got 'complex64'"),
            ({'dtype': torch.int8, 'device': 'cpu'}, r'dtype must be float64, .* got torch\.int8'),
            ({'dtype': np.array([1, 2])}, 'dtype must be float64'),
        ],
    )
    @pytest.mark.parametrize('kind', ['ShadowModel', 'ShadowModels', 'EMAOptimizer'])
    def test_a_move_that_would_lose_the_average_is_refused(self, kind, where, said):
        if where.get('device') == 'cuda:99' and torch.cuda.device_count() > 99:
            pytest.skip('this machine has it')
        model = network()
        shadow = {
            'ShadowModel': lambda: ShadowModel(model),
            'ShadowModels': lambda: ShadowModels(model, ['a']),
            'EMAOptimizer': lambda: EMAOptimizer(sgd(model), model=model).shadow,
        }[kind]()
        before = hostile.bits(shadow.state_dict())
        with pytest.raises(ValueError, match=said):
            shadow.to(**where)
        assert hostile.bits(shadow.state_dict()) == before

    def test_a_model_that_has_gone_to_meta_takes_nothing_from_its_average(self):
        model = network()
        shadow = ShadowModel(model)
        before = hostile.bits(shadow.state_dict())
        model.to('meta')
        for use in (functools.partial(shadow.update, smoothing=0.5), shadow.swap_in, shadow.copy_to):
            with pytest.raises(ValueError, match='is on the meta device'):
                use(model)
        assert hostile.bits(shadow.state_dict()) == before
        model.to_empty(device='cpu')
        shadow.copy_to(model)
        assert torch.equal(model[0].weight, dict(shadow.named_parameters())['0.weight'])

    def test_a_copy_of_one_on_loan_stands_in_no_model(self):
        model = network()
        shadow = ShadowModel(model)
        with shadow.swapped(model):
            assert not copy.deepcopy(shadow).is_swapped
            shadow.to(dtype='float64')
        assert not shadow.is_swapped


class TestProfiles:
    @pytest.mark.parametrize('half', HALVES)
    def test_their_numbers_are_plain(self, half):
        made = [HalfLife(half), Smoothing(half), Power(gamma=half), WarmedUp(HalfLife(3), half)]
        assert [str(each) for each in made] == ['half_life=0.5', 'smoothing=0.5', 'gamma=0.5', 'half_life=3,warmup=0.5']
        assert all(hostile.not_plain({n: v for n, v in vars(each).items() if n != 'profile'}) is None for each in made)

    @pytest.mark.parametrize(
        ('make', 'said'),
        [
            (lambda: HalfLife(10**400), 'half_life must be a number of updates that a float can hold'),
            (lambda: HalfLife(math.nan), 'half_life must be finite and at least 0, got nan'),
            (lambda: HalfLife(3, unit=3), 'unit must be a string, got 3'),
            (lambda: HalfLife(3, unit='\x1b[3m'), r"unit must be a word, such as 'ba', got '\\x1b\[3m'"),
            (lambda: Smoothing(np.array([0.5])), r'smoothing must be a number in \[0, 1\], got array'),
            (lambda: Smoothing(0.5, name=None), 'name must be a string, got None'),
            (lambda: Power(np.ones(2)), 'power must be a number'),
            (lambda: WarmedUp(Power(0.1), 0.1), r'profile must be a HalfLife or a Smoothing to warm up, got Power'),
            (lambda: WarmedUp(HalfLife(3), 'x'), "warmup must be a finite number above 0, got 'x'"),
            (lambda: BiasCorrected(0.5), 'profile must be an exponential average to correct, got 0.5'),
            (lambda: BiasCorrected(HalfLife(3), log_kept=math.nan), 'log_kept must be at most 0'),
            (lambda: Moment('1', 1, 0), "elapsed must be a number, got '1'"),
            (lambda: Moment(1, torch.ones(2), 0), 'since_start must be a number, got tensor'),
            (lambda: Moment(1, -1, 0), 'since_start must be finite and at least 0, got -1'),
        ],
    )
    def test_what_is_no_argument_of_theirs_is_refused(self, make, said):
        with pytest.raises((TypeError, ValueError), match=said):
            make()


@pytest.mark.parametrize(
    ('use', 'said'),
    [
        (lambda s, o: setattr(s, 'num_updates', -1), 'num_updates must be a whole number of at least 0, got -1'),
        (lambda s, o: setattr(s, 'num_updates', '3'), "num_updates must be a whole number of at least 0, got '3'"),
        (lambda s, o: s.leave_out('0.weight'), "names must be a list of names, got '0.weight'"),
        (lambda s, o: s.resolve(network(), renamed=['0']), 'renamed must map old names to new ones'),
        (lambda s, o: s.update(network(), smoothing=torch.ones(2)), r'smoothing must be a number in \[0, 1\]'),
        (lambda s, o: s.update(network(), weight=[0.5]), r'weight must be a number in \[0, 1\]'),
        (lambda s, o: s.to_averaged_model(network(), use_buffers='no'), 'use_buffers must be True or False'),
        (lambda s, o: s.to_averaged_model(network(), avg_fnn=len), "takes no argument 'avg_fnn'. Did you"),
        (lambda s, o: s.to_averaged_model(network(), device='meta'), "device must hold values, got 'meta'"),
        (lambda s, o: s.load_state_dict(None), 'state must be a mapping, got None'),
        (lambda s, o: ShadowModel.from_tensors([1], {}), r'parameters must map names to tensors, got \[1\]'),
        (lambda s, o: ShadowModel.from_tensors({'a': 1}, {}), "parameters must map names to tensors, got 1 for 'a'"),
        (lambda s, o: ShadowModel.from_tensors({'a': torch.ones(1, device='meta')}, {}), "'a' has no values yet"),
        (lambda s, o: ShadowModel.from_tensors({'a': torch.ones(1)}, {'a': torch.ones(1)}), 'both have a'),
        (lambda s, o: ShadowModels(network(), 3), 'labels must be a list of names, got 3'),
        (lambda s, o: ShadowModels(network(), torch.tensor(1)), 'labels must be a list of names'),
        (lambda s, o: ShadowModels.of_one('a', network()), 'shadow must be a ShadowModel, got Sequential'),
        (lambda s, o: ShadowModels(network(), ['a']).load_averages({'b': {}}), "no average is called 'b'"),
        (lambda s, o: ShadowModels(network(), ['a']).load_averages(3), 'averages must be a mapping, got 3'),
        (lambda s, o: o.step(closure=3), 'closure must be a function that recomputes the loss, got 3'),
        (lambda s, o: o.add_param_group([1]), "param_group must be a dictionary with 'params', got"),
        (lambda s, o: o.add_param_group({'params': 3}), "'params' of param_group must be tensors, got 3"),
        (lambda s, o: o.add_param_group({'params': [torch.ones(1, requires_grad=True) * 2]}), 'must be leaf tensors'),
        (lambda s, o: o.swap_ema_weights(average=['ema']), 'average: no average is called'),
        (lambda s, o: o.load_state_dict(3), 'state_dict must be a mapping, got 3'),
        (lambda s, o: o.load_ema_state_dict([]), r'state must be a mapping, got \[\]'),
        (lambda s, o: gather_state_dict(None), 'state must be a dictionary, got None'),
        (lambda s, o: compute_ema(network(), {1: torch.ones(1)}), 'must map names to tensors, got the name 1'),
        (lambda s, o: update_bn(network(), 3), 'dataloader must give batches, got 3'),
        (lambda s, o: update_bn(network(), [], forward=3), 'forward must be a function'),
        (lambda s, o: update_bn(network(), [], device='nowhere'), "device must be where batches go, .* got 'nowhere'"),
        (lambda s, o: update_bn(network(), [], device=1.5), r'device must be where batches go, .* got 1\.5'),
        (lambda s, o: update_bn(network(), [], num_batches=2**70), 'num_batches must be a whole number below'),
    ],
)  # fmt: skip
def test_a_method_that_refuses_says_why_and_changes_nothing(use, said):
    model = network()
    shadow, optimizer = ShadowModel(model), EMAOptimizer(sgd(model), model=model)
    before = [hostile.bits(each.state_dict()) for each in (shadow, optimizer, model)]
    with pytest.raises((TypeError, ValueError), match=said):
        use(shadow, optimizer)
    assert [hostile.bits(each.state_dict()) for each in (shadow, optimizer, model)] == before


@pytest.mark.parametrize('number', ['3', -1, 1.0, True, 2**70])
def test_samples_are_counted_before_anything_is_updated(number, tmp_path):
    snapshots = Snapshots(network(), tmp_path / 'none', every=1)
    with pytest.raises((TypeError, ValueError), match=r'num_samples must be a whole number'):
        snapshots.update(number)
    assert snapshots.num_updates == 0
    assert not (tmp_path / 'none').exists()


def test_an_update_asks_for_no_conversion(monkeypatch):
    model = network()
    shadow, optimizer = ShadowModel(model), EMAOptimizer(sgd(model), model=model)
    shadow.update(model, smoothing=0.5)
    optimizer.step()
    monkeypatch.setattr(plain, '_unboxed', lambda value: pytest.fail('an update converts'))
    shadow.update(model, smoothing=0.5)
    optimizer.step()
    optimizer.zero_grad()


@pytest.mark.parametrize('seed', [11])
def test_random_calls_work_or_are_refused_in_words(seed, tmp_path):
    failures = hostile.run(seed, 250, tmp_path)
    assert not failures, '\n'.join(f'{each.call}: {each.wrong}' for each in failures)


def test_the_drawing_reaches_every_public_name():
    import composer_ema

    names = {door.name.partition('.')[0] for door in hostile.doors()}
    wanted = {name for name in composer_ema.__all__ if name not in ('__version__', 'CheckpointError')}
    assert names >= wanted - (set() if HAS_COMPOSER else hostile.OF_COMPOSER)


def test_what_the_trial_looks_for_it_finds():
    world = hostile.World(None, None)
    foreign = hostile.Call(hostile.Door('foreign', lambda value: {}[value]), {'value': ("'x'", lambda w: 'x')})
    assert 'not ours' in hostile.trial(foreign, world)

    def writes(value: object) -> None:
        with torch.no_grad():
            world.model[0].weight.add_(1)

    writing = hostile.Call(hostile.Door('writes', writes), {'value': ('1', lambda w: 1)})
    assert 'weights of the model have changed' in hostile.trial(writing, world)
    assert hostile.not_plain({'a': [np.float32(1)]}) == 'state.a.0 is a numpy.float32'
