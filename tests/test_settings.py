"""What an average keeps and how: arguments out of range, signatures that list them, copies."""

import copy
import importlib.util
import inspect
import pickle
import re
from dataclasses import FrozenInstanceError, dataclass
from typing import Any, Literal, get_args, get_origin

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from typing_extensions import Unpack

from composer_ema import EMAOptimizer, ShadowModel, wording
from composer_ema.settings import OptimizerSettings, Settings, ShadowSettings, settings_of, takes_settings
from composer_ema.wording import counted, near, suggestion

HAS_COMPOSER = importlib.util.find_spec('composer') is not None
#: The names of the settings in each class that takes them.
TAKERS: dict[str, dict[str, str]] = {
    'ShadowModel': {'dtype': 'dtype', 'device': 'device', 'backend': 'backend'},
    'EMAOptimizer': {'dtype': 'dtype', 'backend': 'backend', 'device': 'device'},
    'EMA': {'dtype': 'shadow_dtype', 'device': 'shadow_device'},
    'SWA': {'dtype': 'shadow_dtype', 'device': 'shadow_device'},
}
SHARED = (
    'buffers',
    'include',
    'exclude',
    'skip_nonfinite',
    'rounding',
    'compensated',
    'shard_over_ranks',
    'seed',
    'avg_fn',
    'multi_avg_fn',
)
DEFAULTS = {
    'buffers': 'statistics',
    'include': None,
    'exclude': None,
    'dtype': None,
    'device': None,
    'skip_nonfinite': False,
    'rounding': 'nearest',
    'compensated': False,
    'shard_over_ranks': False,
    'seed': 0,
    'backend': 'auto',
    'avg_fn': None,
    'multi_avg_fn': None,
}
each_taker = pytest.mark.parametrize(
    'name',
    [
        pytest.param(name, marks=pytest.mark.skipif(name in ('EMA', 'SWA') and not HAS_COMPOSER, reason='no Composer'))
        for name in TAKERS
    ],
)


def taker(name: str) -> type:
    import composer_ema

    return getattr(composer_ema, name)


def halfway(averaged, current, num_averaged):
    return (averaged + current) / 2


class TestRefusals:
    @pytest.mark.parametrize(
        ('arguments', 'error', 'message'),
        [
            ({'buffers': 'mean'}, ValueError, r"buffers must be 'statistics', 'average', 'copy', or .*, got 'mean'\."),
            ({'buffers': None}, ValueError, r"buffers must be 'statistics', 'average', 'copy', or .*, got None\."),
            ({'rounding': 'up'}, ValueError, r"rounding must be 'nearest' or 'stochastic', got 'up'\."),
            (
                {'backend': 'cpp'},
                ValueError,
                r"must be 'auto', 'fused', 'foreach', 'blocked' or 'reference', got 'cpp'\.",
            ),
            ({'skip_nonfinite': 1}, TypeError, r'skip_nonfinite must be True or False, got 1\.'),
            ({'seed': -1}, ValueError, r'seed must be a whole number of at least 0, got -1\.'),
            ({'seed': 2**63}, ValueError, r'seed must be a whole number below 2\*\*63, got 9223372036854775808'),
            ({'seed': True}, TypeError, r'seed must be a whole number .*, got True\.'),
            ({'seed': 1.0}, TypeError, r'seed must be a whole number .*, got 1\.0\.'),
            ({'dtype': 'int8'}, ValueError, r"dtype must be float64, float32, bfloat16 or float16, got 'int8'\."),
            ({'dtype': 'nn'}, ValueError, r"dtype must be float64, .* got 'nn'\."),
            ({'dtype': torch.int64}, ValueError, r'dtype must be float64, .* got torch\.int64\.'),
            ({'dtype': 32}, ValueError, r'dtype must be float64, .* got 32\.'),
            ({'device': 'nowhere'}, ValueError, r"device must be one such as 'cpu' or 'cuda:0', got 'nowhere'\."),
            ({'device': 1.5}, ValueError, r"device must be one such as 'cpu' or 'cuda:0', got 1\.5\."),
            ({'include': 3}, TypeError, r'include must be a regular expression or a list of them, got 3\.'),
            ({'exclude': ['a', 3]}, TypeError, r'exclude must hold strings, got 3 of type int\.'),
            (
                {'exclude': '('},
                ValueError,
                r"exclude pattern '\(' is not a regular expression: missing \).*To match it literally",
            ),
            (
                {'rounding': 'stochastic', 'dtype': 'float32'},
                ValueError,
                r"'stochastic' rounds a bfloat16 average, but its dtype is torch\.float32\. Set the .*'bfloat16'",
            ),
            ({'rounding': 'stochastic'}, ValueError, r'its dtype is that of the weights\. Set .* or leave rounding'),
            ({'avg_fn': 0.9}, TypeError, r'avg_fn must be a function of .*, got 0\.9\. Pass for example'),
            (
                {'multi_avg_fn': 'ema'},
                TypeError,
                r"multi_avg_fn must be a function of .*, got 'ema'\. Pass for example",
            ),
            (
                {'avg_fn': halfway, 'multi_avg_fn': halfway},
                ValueError,
                r'either avg_fn or multi_avg_fn, got both\. multi_avg_fn is the faster',
            ),
            ({'avg_fn': halfway, 'skip_nonfinite': True}, ValueError, r'skip_nonfinite=True has no effect .* Leave it'),
            ({'multi_avg_fn': halfway, 'backend': 'fused'}, ValueError, r"backend='fused' has no effect .* Leave it"),
            (
                {'avg_fn': halfway, 'rounding': 'stochastic', 'dtype': 'bfloat16'},
                ValueError,
                r"rounding='stochastic' has no effect .* Leave it out",
            ),
        ],
    )
    def test_an_argument_out_of_range_names_value_rule_and_remedy(self, arguments, error, message):
        with pytest.raises(error, match=message):
            Settings(**arguments)
        with pytest.raises(error, match=message):
            ShadowModel(nn.Linear(1, 1), **arguments)

    def test_a_change_is_checked_as_the_first_values_were(self):
        with pytest.raises(ValueError, match='rounds a bfloat16 average'):
            Settings(dtype='bfloat16', rounding='stochastic').replace(dtype=torch.float32)

    def test_nothing_can_be_assigned(self):
        with pytest.raises(FrozenInstanceError):
            Settings().seed = 1

    def test_an_unknown_setting_is_an_error(self):
        with pytest.raises(TypeError, match='sede'):
            Settings.of({'sede': 1})


class TestValues:
    def test_the_defaults(self):
        assert Settings().as_arguments() == DEFAULTS

    @pytest.mark.parametrize('dtype', ['bfloat16', 'torch.bfloat16', torch.bfloat16])
    def test_a_dtype_and_a_device_may_be_names(self, dtype):
        settings = Settings(dtype=dtype, device='cuda:1')
        assert (settings.dtype, settings.device) == (torch.bfloat16, torch.device('cuda', 1))

    def test_the_names_of_a_trainer_count_as_the_short_ones(self):
        arguments = {'shadow_dtype': 'float64', 'shadow_device': 'cpu', 'buffers': 'copy'}
        assert Settings.of(arguments) == Settings(dtype='float64', device='cpu', buffers='copy')

    def test_as_arguments_builds_the_same_again(self):
        settings = Settings(include='a', dtype='float16', device='cpu', seed=3, avg_fn=halfway)
        assert Settings(**settings.as_arguments()) == settings

    @pytest.mark.parametrize(('patterns', 'count'), [(None, 0), ('a.b', 1), (['a', 'b'], 2), (('a', 'b'), 2), ([], 0)])
    def test_patterns_are_compiled(self, patterns, count):
        settings = Settings(include=patterns, exclude=patterns)
        assert len(settings.included) == len(settings.excluded) == count
        assert all(isinstance(each, re.Pattern) for each in settings.included)

    def test_a_list_of_patterns_that_changes_later_changes_nothing(self):
        patterns = ['a']
        settings = Settings(include=patterns)
        patterns.append('b')
        assert settings.include == ('a',)
        assert settings == Settings(include=('a',))
        assert settings.as_plain(['include']) == {'include': ['a']}

    def test_a_function_has_its_name(self):
        assert (Settings().has_function, Settings().function_name) == (False, None)
        assert Settings(avg_fn=halfway).function_name == 'halfway'
        ema = torch.optim.swa_utils.get_ema_multi_avg_fn(0.9)
        assert 'ema_update' in Settings(multi_avg_fn=ema).function_name

        class Halfway:
            __call__ = staticmethod(halfway)

        assert Settings(avg_fn=Halfway()).function_name.endswith('Halfway')
        assert Settings(avg_fn=Halfway()).has_function

    @given(
        seed=st.integers(0, 2**63 - 1),
        dtype=st.sampled_from([None, 'float64', 'float16']),
        device=st.sampled_from([None, 'cpu', 'meta', 'cuda:3']),
        include=st.sampled_from([None, 'a', ['a', 'b'], ('a',)]),
        function=st.sampled_from([None, halfway, torch.lerp]),
    )
    def test_plain_values_are_strings_numbers_lists_and_none(self, seed, dtype, device, include, function):
        settings = Settings(seed=seed, dtype=dtype, device=device, include=include, avg_fn=function)
        names = ('shadow_dtype', 'device', 'seed', 'include', 'avg_fn', 'skip_nonfinite')
        plain = settings.as_plain(names)
        assert tuple(plain) == names
        assert {type(value) for value in plain.values()} <= {str, int, bool, list, type(None)}
        assert plain['shadow_dtype'] == dtype
        assert plain['device'] == device
        assert plain['include'] == (list(include) if isinstance(include, tuple) else include)

    @pytest.mark.parametrize('duplicate', [copy.copy, copy.deepcopy, lambda s: pickle.loads(pickle.dumps(s))])
    @pytest.mark.parametrize('is_used', [False, True])
    def test_a_copy_is_equal_and_still_frozen(self, duplicate, is_used):
        settings = Settings(include=['a'], dtype='bfloat16', device='cpu', rounding='stochastic', seed=7)
        if is_used:
            _ = settings.included
        twin = duplicate(settings)
        assert twin == settings
        assert twin.included == settings.included
        with pytest.raises(FrozenInstanceError):
            twin.seed = 1


class TestSignatures:
    @each_taker
    def test_every_setting_stands_in_it_with_its_default(self, name):
        parameters = inspect.signature(taker(name)).parameters
        spelled = {**{each: each for each in SHARED}, **TAKERS[name]}
        for short, long in spelled.items():
            assert parameters[long].default == DEFAULTS[short], long
        others = {each for each in ('dtype', 'device', 'shadow_dtype', 'shadow_device', 'backend', 'settings')}
        assert not (others - set(spelled.values())) & parameters.keys()
        assert settings_of(taker(name)) == [each for each in parameters if each in spelled.values()]

    @each_taker
    def test_every_annotation_is_an_object_and_no_text(self, name):
        for parameter in inspect.signature(taker(name)).parameters.values():
            assert parameter.annotation is not inspect.Parameter.empty, parameter.name
            assert not isinstance(parameter.annotation, str), parameter
            assert 'ForwardRef' not in repr(parameter.annotation), parameter
        rounding = inspect.signature(taker(name)).parameters['rounding'].annotation
        assert (get_origin(rounding), get_args(rounding)) == (Literal, ('nearest', 'stochastic'))

    @each_taker
    def test_settings_are_given_by_keyword(self, name):
        parameters = inspect.signature(taker(name)).parameters
        for each in settings_of(taker(name)):
            if (name, each) != ('EMAOptimizer', 'device'):  # the second argument, as in other libraries
                assert parameters[each].kind is inspect.Parameter.KEYWORD_ONLY, each

    @each_taker
    @pytest.mark.parametrize(
        ('unknown', 'near'),
        [('skip_non_finite', 'skip_nonfinite'), ('round', 'rounding'), ('includes', 'include'), ('avgfn', 'avg_fn')],
    )
    def test_an_unknown_argument_names_the_nearest_one(self, name, unknown, near):
        with pytest.raises(TypeError, match=rf"{name} takes no argument '{unknown}'\. Did you mean '{near}'\?"):
            taker(name)(**{unknown: None})

    @each_taker
    def test_without_a_near_one_all_are_named(self, name):
        with pytest.raises(TypeError, match=rf"{name} takes no argument 'xyzzy'\. It takes .*buffers, include"):
            taker(name)(xyzzy=None)

    def test_the_collected_name_itself_is_no_argument(self):
        with pytest.raises(TypeError, match="takes no argument 'settings'"):
            ShadowModel(nn.Linear(1, 1), settings={})


class TestSuggestions:
    """One measure of nearness for every message, in :mod:`composer_ema.wording`."""

    @pytest.mark.parametrize(
        ('name', 'expected'),
        [
            ('half_lif', ['half_life']),
            ('half_lfie', ['half_life']),
            ('haf_life', ['half_life']),
            ('halflife', ['half_life']),
            ('HALF-LIFE', ['half_life']),
            ('window', ['window_size']),
            ('emma', ['ema']),
            ('adamm', ['adam', 'adamw']),
            ('em', ['ema']),
            ('board', ['tensorboard_logger']),
            ('lr', []),
            ('imagefolder', []),
            ('learning_rate', []),
            ('x', []),
            (3, []),
        ],
    )
    def test_a_slip_is_near_and_another_word_is_not(self, name, expected):
        legal = [
            'half_life',
            'window_size',
            'ema',
            'adam',
            'adamw',
            'loggers',
            'cifar10',
            'lq',
            'e',
            'tensorboard_logger',
        ]
        assert near(name, legal, {'tensorboard': 'tensorboard_logger'}) == expected

    def test_where_many_are_near_none_is_nearer(self):
        legal = ['save_folder', 'save_filename', 'save_interval', 'save_overwrite']
        assert near('save', legal) == []
        assert near('save', legal[:3]) == legal[:3]

    def test_the_legal_names_are_all_listed_up_to_a_hundred_and_counted_beyond(self):
        names = [f'x{number:04d}' for number in range(103)]
        assert suggestion('none', names[:100]) == f'Legal names are {", ".join(names[:100])}.'
        assert suggestion('none', names, 'It takes') == f'It takes {", ".join(names[:100])} and 3 more.'
        assert suggestion('none', [], 'It takes') == 'It takes none.'

    def test_two_that_are_near_are_both_offered(self):
        assert suggestion('adamm', ['adam', 'adamw', 'sgd']) == "Did you mean 'adam' or 'adamw'?"

    @given(st.text('ab_', max_size=5), st.text('ab_', max_size=5))
    def test_the_distance_is_symmetric_and_counts_at_most_one_letter_at_a_time(self, one, other):
        slips = wording._slips(one, other)
        assert slips == wording._slips(other, one)
        assert (slips == 0) == (one == other)
        assert abs(len(one) - len(other)) <= slips <= max(len(one), len(other))
        assert wording._slips(one + 'c', other) <= slips + 1

    @pytest.mark.parametrize(
        ('number', 'noun', 'expected'),
        [(1, 'epoch', '1 epoch'), (1.0, 'epoch', '1 epoch'), (0, 'batch', '0 batches'), (1200, 'step', '1,200 steps')],
    )
    def test_a_noun_agrees_with_its_number(self, number, noun, expected):
        assert counted(number, noun) == expected


class TestSubclasses:
    def test_one_with_its_own_constructor_passes_settings_on(self):
        class Mine(ShadowModel):
            def __init__(self, model: nn.Module, note: str, **kw: Any) -> None:
                super().__init__(model, **kw)
                self.note = note

        shadow = Mine(nn.Linear(2, 1), 'a note', dtype='float64', include='weight')
        assert shadow.note == 'a note'
        assert [(name, each.dtype) for name, each in shadow.named_parameters()] == [('weight', torch.float64)]
        assert settings_of(Mine) == settings_of(ShadowModel)
        with pytest.raises(TypeError, match=r"ShadowModel takes no argument 'sede'\. Did you mean 'seed'"):
            Mine(nn.Linear(2, 1), 'a note', sede=1)

    def test_one_without_a_constructor_has_the_signature_of_its_base(self):
        class Mine(EMAOptimizer):
            pass

        assert inspect.signature(Mine) == inspect.signature(EMAOptimizer)
        assert settings_of(Mine) == settings_of(EMAOptimizer)
        model = nn.Linear(1, 1)
        assert repr(Mine(torch.optim.SGD(model.parameters(), lr=0.1), seed=3)).startswith('Mine (')

    def test_one_may_list_settings_of_its_own(self):
        @takes_settings
        class Mine(ShadowModel):
            def __init__(self, model: nn.Module, **settings: Unpack[OptimizerSettings]) -> None:
                super().__init__(model, **settings)

        assert 'device' not in inspect.signature(Mine).parameters
        with pytest.raises(TypeError, match=r"Mine takes no argument 'device'"):
            Mine(nn.Linear(1, 1), device='cpu')
        assert Mine(nn.Linear(1, 1), seed=3).state_dict()['seed'] == 3

    @pytest.mark.skipif(not HAS_COMPOSER, reason='no Composer')
    def test_an_algorithm_with_its_own_constructor_logs_its_settings(self):
        from composer_ema import EMA

        class Mine(EMA):
            def __init__(self, **kw: Any) -> None:
                super().__init__('10ba', **kw)

        assert settings_of(Mine) == settings_of(EMA)
        assert Mine(shadow_dtype='bfloat16').half_life.value == 10

    def test_a_class_that_takes_no_settings_has_none(self):
        @dataclass
        class Plain:
            lr: float = 0.1

        assert settings_of(Plain) == settings_of(object) == []

    def test_the_lists_of_settings_name_nothing_else(self):
        for listed in (ShadowSettings, OptimizerSettings):
            assert set(listed.__annotations__) | set(SHARED) <= DEFAULTS.keys()
