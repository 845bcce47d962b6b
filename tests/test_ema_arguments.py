"""The constructor of EMA: what it takes, refuses, derives and shows."""

from __future__ import annotations

import inspect

import numpy as np
import pytest
import torch
from composer.core import Time

from composer_ema import EMA
from composer_ema.spans import ArgumentError


@pytest.mark.parametrize(
    ('horizon', 'said'), [({'half_life': '10ba'}, "half_life='10ba'"), ({'smoothing': 0.9}, 'smoothing=0.9')]
)
def test_a_function_and_a_horizon_contradict_each_other(horizon, said):
    with pytest.raises(ValueError, match=f'avg_fn and multi_avg_fn decide .*, so {said} has no effect. Leave it out'):
        EMA(**horizon, avg_fn=torch.lerp)


@pytest.mark.parametrize(
    ('arguments', 'said'),
    [
        ({'update_interval': '2'}, "takes the units ba (batches), .*got '2'.* update_interval='2ba'"),
        ({'update_interval': '0ba'}, "update_interval='2ba'"),
        ({'log_interval': '1'}, "log_interval='1ba'"),
        ({'half_life': '60'}, "half_life='60ba'"),
        ({'half_life': '-3ba'}, "half_life='1000ba'"),
        ({'ema_start': '0'}, "ema_start='0ba'"),
    ],
)
def test_the_advice_is_legal_in_any_run(arguments, said):
    with pytest.raises(ValueError, match=said.replace('(', r'\(').replace(')', r'\)')):
        EMA(**arguments)


EVERY_ARGUMENT = [
    {},
    {'half_life': '50ba'},
    {'half_life': '1.5ep'},
    {'half_life': '0.1dur'},
    {'half_life': '0ba'},
    {'half_life': Time(3, 'ep')},
    {'smoothing': 0.999},
    {'smoothing': 0},
    {'smoothing': 1},
    {'smoothing': np.float64(0.5)},
    {'power': 0.1},
    {'gamma': 6.94},
    {'average': 'equal'},
    {'half_life': '50ba', 'warmup': 0.1},
    {'smoothing': 0.9, 'bias_correction': True},
    {'half_life': {'short': '50ba', 'long': Time(1, 'ep')}},
    {'half_life': {'long': '1ep'}, 'power': {'p': 0.1}, 'average': {'all': 'equal'}, 'warmup': 0.1},
    {'smoothing': {'a': 0.9, 'b': 0.5}, 'gamma': {'g': 2}, 'bias_correction': {'a': True}},
    {'half_life': {'a': '1ba'}, 'power': {'b': 0.1}, 'evaluate_with': {'eval': 'b'}, 'export_weights': 'b'},
    {'ema_start': '3ba'},
    {'ema_start': Time(0.5, 'dur')},
    {'update_interval': '10ba'},
    {'update_interval': '0.5ep'},
    {'buffers': 'copy'},
    {'include': 'weight'},
    {'include': ['a', r'b\.c$']},
    {'exclude': ('a',)},
    {'shadow_dtype': 'float64'},
    {'shadow_dtype': torch.bfloat16},
    {'shadow_device': 'cpu'},
    {'shadow_device': torch.device('cpu')},
    {'skip_nonfinite': True},
    {'compensated': True},
    {'shard_over_ranks': True},
    {'shadow_dtype': 'bfloat16', 'rounding': 'stochastic', 'seed': 7},
    {'evaluate_with': {'eval': 'ema', 'eval_training': 'training'}},
    {'evaluate': ['training', 'ema']},
    {'export_weights': 'ema'},
    {'log_interval': None},
    {'log_interval': '5ba'},
    {'snapshots': '0.05dur'},
    {'snapshots': {'every': Time(10, 'ba'), 'power': 0.1, 'halvings': 0, 'folder': 'runs/{run_name}'}},
    {'half_life': '2ep', 'update_interval': '10ba', 'ema_start': '8sp', 'buffers': 'copy', 'log_interval': '2ep'},
]


def test_the_arguments_above_are_all_there_are():
    functions = {'avg_fn', 'multi_avg_fn'}  # only Python can say these
    assert set().union(*EVERY_ARGUMENT) == inspect.signature(EMA).parameters.keys() - functions


@pytest.mark.parametrize('arguments', EVERY_ARGUMENT, ids=repr)
def test_the_repr_evaluates_to_an_equal_configuration(arguments):
    ema = EMA(**arguments)
    twin = eval(repr(ema), {'EMA': EMA})
    assert repr(twin) == repr(ema)
    assert twin.state_dict() == ema.state_dict()
    assert (twin.half_life, twin.smoothing, twin.ema_start) == (ema.half_life, ema.smoothing, ema.ema_start)
    assert (twin.update_interval, twin.log_interval) == (ema.update_interval, ema.log_interval)
    assert (twin.evaluate_with, twin.evaluate) == (ema.evaluate_with, ema.evaluate)
    assert twin.export_weights == ema.export_weights
    for name, value in ema._keeper.settings.as_arguments().items():
        other = twin._keeper.settings.as_arguments()[name]
        assert list(other) == list(value) if isinstance(value, (list, tuple)) else other == value


def test_the_repr_leaves_defaults_out():
    assert repr(EMA()) == 'EMA()'
    assert repr(EMA(smoothing=0.5)) == 'EMA(smoothing=0.5)'
    assert repr(EMA('50ba', update_interval='2ba')) == "EMA(half_life='50ba', update_interval='2ba')"


@pytest.mark.parametrize(
    ('arguments', 'kind', 'message'),
    [
        ({'half_life': '50ba', 'smoothing': 0.9}, ValueError, r"either half_life or smoothing, got half_life='50ba'"),
        ({'half_life': '1000ba', 'smoothing': 0.9}, ValueError, 'either half_life or smoothing'),
        ({'half_life': None}, ValueError, r"got None for all\. Pass half_life='1000ba'"),
        ({'half_life': '-1ba'}, ValueError, r"half_life must not be negative, got '-1ba'"),
        ({'half_life': '10'}, ValueError, r"half_life takes the units .*got '10'"),
        ({'half_life': 1000}, TypeError, r'half_life must be a time string .*got 1000 of type int'),
        ({'half_life': '1.5ba'}, ValueError, r"half_life counts whole batches, got '1\.5ba'"),
        ({'half_life': 'infba'}, ValueError, 'half_life'),
        ({'smoothing': 1.3}, ValueError, r"smoothing must lie in \[0, 1\], got 1\.3\. .*half_life='nba'"),
        ({'smoothing': '0.9'}, TypeError, 'smoothing must be a number'),
        ({'smoothing': True}, TypeError, 'smoothing must be a number'),
        ({'ema_start': '1iter'}, ValueError, r"ema_start takes the units ba .*got '1iter'"),
        ({'ema_start': '-1ep'}, ValueError, 'ema_start must not be negative'),
        ({'ema_start': None}, TypeError, 'ema_start must be a time string'),
        ({'update_interval': '0ba'}, ValueError, r"update_interval must be above zero, got '0ba'"),
        ({'update_interval': '-2ba'}, ValueError, 'update_interval must be above zero'),
        ({'update_interval': 10}, TypeError, 'update_interval must be a time string'),
        ({'log_interval': '0ba'}, ValueError, 'log_interval must be above zero'),
        ({'buffers': 'none'}, ValueError, "buffers must be 'statistics', 'average', 'copy', or .*, got 'none'"),
        ({'include': '('}, ValueError, 'not a regular expression'),
        ({'exclude': [3]}, TypeError, 'exclude must hold strings'),
        ({'shadow_dtype': 'int8'}, ValueError, "must be float64, float32, bfloat16 or float16, got 'int8'"),
        ({'shadow_device': 'abacus'}, ValueError, "got 'abacus'"),
        ({'evaluate_with': {'eval': 'average'}}, ValueError, r"evaluate_with\['eval'\] must be 'ema' or 'training'"),
        ({'evaluate_with': 'ema'}, TypeError, r"must map labels to weights, such as \{'eval': 'ema'\}"),
        ({'evaluate_with': {3: 'ema'}}, (TypeError, ValueError), 'evaluate_with'),
        ({'evaluate_with': {'eval': ['ema']}}, ValueError, 'evaluate_with'),
        ({'decay': 0.9}, TypeError, 'decay'),
    ],
)  # fmt: skip
def test_arguments_out_of_range_name_value_rule_and_remedy(arguments, kind, message):
    with pytest.raises(kind, match=message):
        EMA(**arguments)


@pytest.mark.parametrize(
    ('arguments', 'said'),
    [
        ({'half_life': {'short': '9ba', 'long': '3years'}}, "half_life['long'] takes the units"),
        ({'half_life': {'long': 'soon'}}, "half_life['long'] must be a number followed by a unit"),
        ({'evaluate_with': {'eval': 'averaged'}}, "evaluate_with['eval'] must be 'ema' or 'training'"),
    ],
)
def test_the_error_of_one_label_says_so_and_carries_the_argument(arguments, said):
    with pytest.raises(ArgumentError) as error:
        EMA(**arguments)
    assert str(error.value).startswith(said)
    assert error.value.argument == next(iter(arguments)), 'where a recipe looks for the line'


def test_smoothing_alone_just_works():
    ema = EMA(smoothing=0.999)
    assert ema.smoothing == pytest.approx(0.999)
    assert ema.half_life is None
    assert str(ema.update_interval) == '1ba'
    assert EMA(half_life=None, smoothing=0.5).smoothing == 0.5


@pytest.mark.parametrize(
    ('arguments', 'interval', 'smoothing'),
    [
        ({}, '1ba', 2 ** (-1 / 1000)),
        ({'half_life': '10ba', 'update_interval': '5ba'}, '5ba', 2**-0.5),
        ({'half_life': '2ep'}, '1ep', 2**-0.5),
        ({'half_life': '2iter'}, '1iter', 2**-0.5),
        ({'half_life': '100sp'}, '1ba', None),
        ({'half_life': '2ep', 'update_interval': '10ba'}, '10ba', None),
        ({'half_life': '0.5dur'}, '1ba', None),
        ({'half_life': '0ba'}, '1ba', 0),
        ({'half_life': '0ep', 'update_interval': '3ba'}, '3ba', 0),
    ],
)
def test_interval_and_smoothing_follow_from_the_half_life(arguments, interval, smoothing):
    ema = EMA(**arguments)
    assert str(ema.update_interval) == interval
    assert ema.smoothing == smoothing
