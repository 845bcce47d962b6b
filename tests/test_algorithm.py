"""The Composer algorithm: which update at which event with which weight, and the drop-in for Composer's own EMA."""

import copy
import gc
import inspect
import itertools
import math
import pickle
import warnings
import weakref

import numpy as np
import pytest
import torch
import toy
from composer import Callback, Evaluator
from composer.algorithms import EMA as BuiltinEMA
from composer.algorithms import SWA, BlurPool, GhostBatchNorm, SqueezeExcite
from composer.algorithms.ema.ema import EMAParameters
from composer.core import Event, State, Time, Timestamp
from composer.devices import DeviceCPU
from composer.loggers import InMemoryLogger, Logger
from composer.models import ComposerClassifier
from torch import nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from composer_ema import EMA, ShadowModel, compute_ema
from composer_ema.shadow import offload

# Models


class Encoder(nn.Module):
    """Two layers of a transformer over tokens, read out by a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(10, 8)
        layer = nn.TransformerEncoderLayer(8, nhead=2, dim_feedforward=16, batch_first=True)
        self.layers = nn.TransformerEncoder(layer, num_layers=2, enable_nested_tensor=False)
        self.head = nn.Linear(8, 2)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.head(self.layers(self.embedding(tokens)).mean(1))


def convolutional_classifier() -> ComposerClassifier:
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.LazyLinear(5))
    network(torch.zeros(2, 3, 6, 6))
    return ComposerClassifier(network, num_classes=5)


def transformer_classifier() -> ComposerClassifier:
    return ComposerClassifier(Encoder(), num_classes=2)


either_model = pytest.mark.parametrize('make_model', [convolutional_classifier, transformer_classifier])


def all_tensors(model) -> dict[str, torch.Tensor]:
    return {name: t.detach() for name, t in itertools.chain(model.named_parameters(), model.named_buffers())}


def copies(model) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in all_tensors(model).items()}


def equal(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def mixed(average, model, smoothing: float) -> dict[str, torch.Tensor]:
    """The formula; counters are copied."""
    return {
        name: smoothing * tensor + (1 - smoothing) * model[name] if tensor.is_floating_point() else model[name]
        for name, tensor in average.items()
    }


def assert_close(got, expected, **tolerances) -> None:
    assert got.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(
            got[name], tensor.to(got[name].dtype), **tolerances, msg=lambda text, n=name: f'{n}: {text}'
        )


# What holds for Composer's EMA, by its own tests, holds here


@either_model
@pytest.mark.parametrize('smoothing', [0, 0.5, 0.99, 1])
def test_one_functional_update_is_the_formula(make_model, smoothing):
    model, ema_model = make_model(), make_model()
    expected = mixed(copies(ema_model), copies(model), smoothing)
    compute_ema(model=model, ema_model=ema_model, smoothing=smoothing)
    assert_close(all_tensors(ema_model), expected)


def state_by_hand(model) -> State:
    return State(
        model=model,
        rank_zero_seed=0,
        run_name='by-hand',
        device=DeviceCPU(),
        device_train_microbatch_size=1,
        max_duration='100ep',
    )


@either_model
@pytest.mark.parametrize(
    ('arguments', 'event', 'smoothing'),
    [
        ({'half_life': '10ba', 'update_interval': '1ba'}, Event.BATCH_END, math.exp(-math.log(2) / 10)),
        ({'half_life': '10ba', 'update_interval': '5ba'}, Event.BATCH_END, math.exp(-math.log(2) / 2)),
        ({'half_life': '1ep', 'update_interval': '1ep'}, Event.EPOCH_END, 0.5),
        ({'half_life': None, 'smoothing': 0.999, 'update_interval': '1ba'}, Event.BATCH_END, 0.999),
    ],
    ids=['10ba', '10ba every 5ba', '1ep', 'smoothing'],
)
@pytest.mark.parametrize('take_average', [EMAParameters, ShadowModel, copy.deepcopy])
def test_driven_event_by_event_with_another_model_in_the_state(make_model, arguments, event, smoothing, take_average):
    algorithm = EMA(**arguments)
    state = state_by_hand(make_model())
    logger = Logger(state)
    np.testing.assert_allclose(algorithm.smoothing, smoothing)

    algorithm.ema_model = take_average(state.model)
    before = copies(state.model)
    state.model = make_model()  # a training step, as it were
    training = copies(state.model)
    interval = Time.from_timestring(arguments['update_interval'])
    state.timestamp = Timestamp(**{'batch' if interval.unit.value == 'ba' else 'epoch': interval.value})

    algorithm.apply(event, state, logger)
    expected = mixed(before, training, smoothing)
    assert_close(all_tensors(algorithm.ema_model), expected)
    assert equal(all_tensors(state.model), training)

    algorithm.apply(Event.EVAL_START, state, logger)
    assert algorithm.ema_weights_active
    assert equal(all_tensors(state.model), all_tensors(algorithm.ema_model))

    algorithm.apply(Event.EVAL_END, state, logger)
    assert not algorithm.ema_weights_active
    assert equal(all_tensors(state.model), training)


# A function of the user's


@pytest.mark.parametrize(
    'function',
    [
        {'multi_avg_fn': get_ema_multi_avg_fn(0.75)},
        {'avg_fn': lambda averaged, current, _: averaged.lerp(current, 0.25)},
    ],
    ids=['multi_avg_fn', 'avg_fn'],
)
def test_a_function_makes_the_average_in_place_of_the_half_life(trainer, function):
    plain, by_function = EMA(smoothing=0.75), EMA(**function)
    trainer([plain]).fit()
    run = trainer([by_function], loggers=[memory := InMemoryLogger()])
    run.fit()
    assert equal(all_tensors(by_function.ema_model), all_tensors(plain.ema_model))
    assert by_function.smoothing is None
    assert 'ema/num_updates' in memory.data
    assert 'ema/smoothing' not in memory.data
    state = by_function.state_dict()
    assert state['config'][next(iter(function))].endswith(('ema_update', '<lambda>'))
    assert state['config']['half_life'] is None
    assert not any(callable(value) for value in state.values())


def test_an_average_taken_over_goes_on_by_the_function(model):
    ema = EMA(avg_fn=lambda averaged, current, _: (averaged + current) / 2)
    ema.ema_model = model
    other = toy.make_model(seed=1)
    ema.ema_model.update(other)
    expected = (model.module[5].weight + other.module[5].weight) / 2
    assert torch.equal(all_tensors(ema.ema_model)['module.5.weight'], expected)
    with pytest.raises(ValueError, match=r'averages by a function, the given shadow does not\. Build'):
        ema.ema_model = ShadowModel(model)


@pytest.mark.parametrize(
    ('horizon', 'said'), [({'half_life': '10ba'}, "half_life='10ba'"), ({'smoothing': 0.9}, 'smoothing=0.9')]
)
def test_a_function_and_a_horizon_contradict_each_other(horizon, said):
    with pytest.raises(ValueError, match=f'avg_fn and multi_avg_fn decide .*, so {said} has no effect. Leave it out'):
        EMA(**horizon, avg_fn=torch.lerp)


# The constructor


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
    {'shadow_dtype': 'bfloat16', 'rounding': 'stochastic', 'seed': 7},
    {'evaluate_with': {'eval': 'ema', 'eval_training': 'training'}},
    {'export_weights': 'ema'},
    {'log_interval': None},
    {'log_interval': '5ba'},
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
    assert (twin.evaluate_with, twin.export_weights) == (ema.evaluate_with, ema.export_weights)
    for name, value in ema._settings.as_arguments().items():
        other = twin._settings.as_arguments()[name]
        assert list(other) == list(value) if isinstance(value, (list, tuple)) else other == value


def test_the_repr_leaves_defaults_out():
    assert repr(EMA()) == 'EMA()'
    assert repr(EMA(smoothing=0.5)) == 'EMA(smoothing=0.5)'
    assert repr(EMA('50ba', update_interval='2ba')) == "EMA(half_life='50ba', update_interval='2ba')"


def test_the_arguments_of_the_builtin_stand_in_its_order_with_its_defaults():
    builtin, ours = inspect.signature(BuiltinEMA).parameters, inspect.signature(EMA).parameters
    assert list(ours)[: len(builtin)] == list(builtin)
    assert all(ours[name].default == parameter.default for name, parameter in builtin.items())
    assert all(ours[name].kind is inspect.Parameter.KEYWORD_ONLY for name in list(ours)[len(builtin) :])
    assert EMA.__qualname__ == BuiltinEMA.__qualname__


@pytest.mark.parametrize(
    ('arguments', 'kind', 'message'),
    [
        ({'half_life': '50ba', 'smoothing': 0.9}, ValueError, r"either half_life or smoothing, got half_life='50ba'"),
        ({'half_life': '1000ba', 'smoothing': 0.9}, ValueError, 'either half_life or smoothing'),
        ({'half_life': None}, ValueError, r"got None for both\. Pass half_life='1000ba'"),
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
        ({'buffers': 'none'}, ValueError, "buffers must be 'average' or 'copy', got 'none'"),
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


# Which update, with which weight. The toy's batches have 4, 4 and 2 samples of 3 tokens; a run has 2 epochs.


class Witness(Callback):
    """Averages by the closed form what it sees after each batch, in float64.

    Args:
        updates: the batch of each update, and the half-lives passed since the one before; None copies.
    """

    def __init__(self, updates: dict[int, float | None], at: str = 'batch_end') -> None:
        self.updates, self.average, self.counts = updates, {}, []
        self.at = at

    def batch_end(self, state, logger) -> None:
        self._see(state)

    def _see(self, state) -> None:
        batch = state.timestamp.batch.value
        if batch in self.updates:
            now = {name: t.double() if t.is_floating_point() else t for name, t in copies(state.model).items()}
            half_lives = self.updates[batch]
            smoothing = 0.0 if half_lives is None else 2.0**-half_lives
            self.average = mixed(self.average or now, now, smoothing)


@pytest.mark.parametrize(
    ('arguments', 'updates'),
    [
        ({'half_life': '2ba'}, {1: None, 2: 1 / 2, 3: 1 / 2, 4: 1 / 2, 5: 1 / 2, 6: 1 / 2}),
        ({'half_life': '2ba', 'update_interval': '2ba', 'ema_start': '2ba'}, {2: None, 4: 1, 6: 1}),
        ({'half_life': '2ba', 'update_interval': '2ba'}, {1: None, 2: 1 / 2, 4: 1, 6: 1}),
        ({'half_life': '8sp'}, {1: None, 2: 4 / 8, 3: 2 / 8, 4: 4 / 8, 5: 4 / 8, 6: 2 / 8}),
        ({'half_life': '8sp', 'update_interval': '2ba'}, {1: None, 2: 4 / 8, 4: 6 / 8, 6: 6 / 8}),
        ({'half_life': '24tok'}, {1: None, 2: 4 / 8, 3: 2 / 8, 4: 4 / 8, 5: 4 / 8, 6: 2 / 8}),
        ({'half_life': '1ep'}, {3: None, 6: 1}),
        ({'half_life': '1.5ep'}, {3: None, 6: 1 / 1.5}),
        ({'half_life': '1.5ep', 'update_interval': '1ba'}, {1: None, **dict.fromkeys(range(2, 7), 1 / 4.5)}),
        ({'half_life': '0.5ep', 'update_interval': '1ba'}, {1: None, **dict.fromkeys(range(2, 7), 1 / 1.5)}),
        ({'half_life': '2ep', 'update_interval': '0.5ep'}, {1: None, 2: 1 / 6, 3: 1 / 6, 5: 2 / 6, 6: 1 / 6}),
        ({'half_life': '2ba', 'update_interval': '1ep'}, {3: None, 6: 3 / 2}),
        ({'half_life': '2ep', 'update_interval': '2ba'}, {1: None, 2: 1 / 6, 4: 2 / 6, 6: 2 / 6}),
        ({'half_life': '2ba', 'update_interval': '8sp'}, {1: None, 2: 1 / 2, 5: 3 / 2}),
        ({'half_life': '0.5dur'}, {1: None, **dict.fromkeys(range(2, 7), 1 / 3)}),
        ({'half_life': '0.5dur', 'update_interval': '0.5dur'}, {1: None, 3: 2 / 3, 6: 1}),
        ({'half_life': '0ba'}, dict.fromkeys(range(1, 7))),
        ({'half_life': '0ba', 'update_interval': '2ba'}, {1: None, 2: None, 4: None, 6: None}),
        ({'half_life': '2ba', 'ema_start': '3ba'}, {3: None, 4: 1 / 2, 5: 1 / 2, 6: 1 / 2}),
        ({'half_life': '2ba', 'ema_start': '1ep'}, {3: None, 4: 1 / 2, 5: 1 / 2, 6: 1 / 2}),
        ({'half_life': '2ba', 'ema_start': '1.5ep'}, {5: None, 6: 1 / 2}),
        ({'half_life': '2ba', 'ema_start': '10sp'}, {3: None, 4: 1 / 2, 5: 1 / 2, 6: 1 / 2}),
        ({'half_life': '2ba', 'ema_start': '11sp'}, {4: None, 5: 1 / 2, 6: 1 / 2}),
        ({'half_life': '2ba', 'ema_start': '30tok'}, {3: None, 4: 1 / 2, 5: 1 / 2, 6: 1 / 2}),
        ({'half_life': '2ba', 'ema_start': '0.5dur'}, {3: None, 4: 1 / 2, 5: 1 / 2, 6: 1 / 2}),
        ({'half_life': '2ba', 'ema_start': '1dur'}, {6: None}),
        ({'half_life': '1ep', 'ema_start': '2ep'}, {6: None}),
        ({'smoothing': 0.5}, {1: None, **dict.fromkeys(range(2, 7), 1)}),
        ({'smoothing': 0.5, 'update_interval': '2ba'}, {1: None, 2: 1, 4: 1, 6: 1}),
        ({'smoothing': 0.5, 'update_interval': '5sp'}, {1: None, 2: 1, 3: 1, 5: 1, 6: 1}),
        ({'smoothing': 0.5, 'update_interval': '1ep'}, {3: None, 6: 1}),
        ({'smoothing': 0}, dict.fromkeys(range(1, 7))),
        ({'smoothing': 1}, {1: None, **dict.fromkeys(range(2, 7), 0)}),
    ],
    ids=lambda value: ' '.join(map(str, value.values())) if 'half_life' in value or 'smoothing' in value else '',
)  # fmt: skip
def test_the_average_is_the_closed_form_of_the_time_that_really_passed(trainer, arguments, updates):
    witness, ema = Witness(updates), EMA(**arguments)
    trainer([ema], callbacks=[witness]).fit()
    assert ema.ema_model.num_updates == len(updates)
    assert_close(all_tensors(ema.ema_model), witness.average, rtol=3e-6, atol=1e-7)


def test_iterations_are_a_unit_like_any_other(trainer):
    witness, ema = Witness({3: None, 6: 1 / 2}), EMA(half_life='2iter')
    trainer([ema], callbacks=[witness], iteration='1ep').fit()
    assert_close(all_tensors(ema.ema_model), witness.average, rtol=3e-6, atol=1e-7)


def test_parts_of_an_iteration(trainer):
    witness, ema = Witness({1: None, **dict.fromkeys(range(2, 7), 1 / 6)}), EMA('1iter', update_interval='1ba')
    trainer([ema], callbacks=[witness], iteration='2ep').fit()
    assert_close(all_tensors(ema.ema_model), witness.average, rtol=3e-6, atol=1e-7)


def test_a_half_life_of_2ep_with_an_interval_of_10ba(trainer):
    witness, ema = Witness({1: None, 10: 9 / 24, 20: 10 / 24}), EMA(half_life='2ep', update_interval='10ba')
    trainer([ema], callbacks=[witness], train_dataloader=toy.make_data(samples=48)).fit()
    assert_close(all_tensors(ema.ema_model), witness.average, rtol=3e-6, atol=1e-7)


@pytest.mark.parametrize('batch_size', [1, 2, 3, 5, 10])
def test_a_half_life_in_samples_forgets_by_samples_under_any_batch_size(trainer, batch_size):
    ema = EMA(half_life='5sp')
    counts = [min(batch_size, 10 - start) for start in range(0, 10, batch_size)]
    elapsed = [None, *counts[1:], *counts] if len(counts) > 1 else [None, counts[0]]
    witness = Witness({batch: n if n is None else n / 5 for batch, n in enumerate(elapsed, start=1)})
    # Batches of one sample have no variance.
    data = toy.make_data(batch_size=batch_size)
    trainer([ema], callbacks=[witness], train_dataloader=data).fit()
    assert_close(all_tensors(ema.ema_model), witness.average, rtol=3e-6, atol=1e-7)


def test_a_half_life_of_zero_is_the_weights_after_every_batch(trainer):
    class Probe(Callback):
        def batch_end(self, state, logger):
            same.append(equal(all_tensors(state.model), all_tensors(ema.ema_model)))

    same, ema = [], EMA(half_life='0ba')
    trainer([ema], callbacks=[Probe()]).fit()
    assert same == [True] * 6


def test_copied_buffers_are_the_latest(trainer):
    ema = EMA(half_life='2ba', buffers='copy')
    run = trainer([ema])
    run.fit()
    live = dict(run.state.model.named_buffers())
    assert equal(dict(ema.ema_model.named_buffers()), live)


def test_options_reach_the_shadow(trainer):
    ema = EMA(half_life='2ba', include='weight|running', exclude=r'5\.', shadow_dtype='float64', shadow_device='cpu')
    trainer([ema]).fit()
    names = {'module.0.weight', 'module.1.weight', 'module.1.running_mean', 'module.1.running_var'}
    assert all_tensors(ema.ema_model).keys() == names
    assert {t.dtype for t in ema.ema_model.parameters()} == {torch.float64}


@pytest.mark.parametrize(
    ('arguments', 'theirs'),
    [
        ({'half_life': '3ba'}, {}),
        ({'half_life': '3ba', 'update_interval': '2ba', 'ema_start': '2ba'}, {}),
        ({'half_life': '1ep'}, {}),
        ({'half_life': '2ep', 'ema_start': '1ep'}, {}),
        ({'half_life': None, 'smoothing': 0.9, 'update_interval': '1ba'}, {}),
        ({'half_life': None, 'smoothing': 0.9, 'update_interval': '3ba'}, {}),
        ({'smoothing': 0.9}, {'half_life': None, 'update_interval': '1ba'}),
        ({'half_life': '3ba', 'ema_start': '0.5dur'}, {}),
    ],
    ids=lambda value: ' '.join(map(str, value.values())),
)
def test_the_average_agrees_with_the_builtins_over_a_run(trainer, arguments, theirs):
    ours, builtin = EMA(**arguments), BuiltinEMA(**{**arguments, **theirs})
    for ema in (ours, builtin):
        # A run counted in batches: in one counted in epochs the built-in's share of it moves by whole epochs.
        trainer([ema], max_duration='12ba', model=toy.make_model(seed=4)).fit()
    expected = {**builtin.ema_model.named_parameters_dict, **builtin.ema_model.named_buffers_dict}
    got = all_tensors(ours.ema_model)
    floating = [name for name, tensor in got.items() if tensor.is_floating_point()]  # the built-in truncates counters
    assert len(floating) == 8
    for name in floating:
        torch.testing.assert_close(got[name], expected[name], rtol=1e-6, atol=1e-6)


# Which weights an evaluator sees


class Sees(Callback):
    """Notes at every evaluation batch and prediction which weights the model holds."""

    def __init__(self, ema: EMA) -> None:
        self.ema, self.seen = ema, []

    def _note(self, state, label) -> None:
        holds = 'ema' if self.ema.ema_weights_active else 'training'
        if self.ema.ema_started:
            average, live = all_tensors(self.ema.ema_model)['module.5.weight'], state.model.module[5].weight
            assert torch.equal(live, average) == (holds == 'ema')
        self.seen.append((label, holds))

    def eval_batch_start(self, state, logger) -> None:
        self._note(state, state.dataloader_label)

    def predict_batch_start(self, state, logger) -> None:
        self._note(state, 'predict')


@pytest.mark.parametrize(
    ('evaluate_with', 'seen'),
    [
        (None, {'a': 'ema', 'b': 'ema'}),
        ({'a': 'training'}, {'a': 'training', 'b': 'ema'}),
        ({'b': 'training'}, {'a': 'ema', 'b': 'training'}),
        ({'a': 'training', 'b': 'training'}, {'a': 'training', 'b': 'training'}),
        ({'a': 'ema', 'b': 'training'}, {'a': 'ema', 'b': 'training'}),
    ],
)
def test_each_evaluator_sees_the_weights_that_it_asks_for(trainer, evaluate_with, seen):
    ema = EMA(half_life='2ba', evaluate_with=evaluate_with)
    probe = Sees(ema)
    evaluators = [toy.make_evaluator('a'), toy.make_evaluator('b')]
    run = trainer([ema], callbacks=[probe], eval_dataloader=evaluators)
    run.fit()
    assert probe.seen == [(label, seen[label]) for _ in range(2) for label in ('a', 'b')]
    probe.seen.clear()
    run.eval()
    assert dict(probe.seen) == seen
    assert not ema.ema_weights_active


@pytest.mark.parametrize('weights', ['ema', 'training'])
def test_prediction_sees_the_weights_that_it_asks_for(trainer, weights):
    ema = EMA(half_life='2ba', evaluate_with={'predict': weights})
    probe = Sees(ema)
    run = trainer([ema], callbacks=[probe])
    run.fit()
    run.predict(toy.make_data(4))
    assert probe.seen == [('predict', weights)]
    assert not ema.ema_weights_active


def test_before_the_first_update_evaluation_uses_the_training_weights(trainer):
    ema = EMA(half_life='2ba', ema_start='4ba')
    probe = Sees(ema)
    run = trainer([ema], callbacks=[probe], eval_dataloader=toy.make_evaluator(interval='2ba'))
    run.eval()
    run.fit()
    assert [holds for _, holds in probe.seen] == ['training', 'training', 'ema', 'ema']


def test_evaluation_without_training_uses_the_training_weights(trainer):
    ema = EMA()
    probe = Sees(ema)
    run = trainer([ema], callbacks=[probe])
    run.eval(toy.make_evaluator())
    assert probe.seen == [('eval', 'training')]


def test_a_label_that_no_evaluator_has_is_warned_of_with_the_nearest(trainer):
    run = trainer([EMA('2ba', evaluate_with={'evel': 'training'})], eval_dataloader=toy.make_evaluator('eval'))
    with pytest.warns(UserWarning, match=r"names the evaluator 'evel', .*Did you mean 'eval'\?"):
        run.fit()


# Getting either set of weights


@pytest.fixture
def trained(trainer):
    ema = EMA(half_life='2ba')
    run = trainer([ema])
    run.fit()
    model = run.state.model
    return ema, model, copies(model), {n: t.clone() for n, t in all_tensors(ema.ema_model).items()}


def test_the_average_put_into_the_model_in_training_keeps_the_training_weights(trained):
    ema, model, training, average = trained
    assert ema.get_ema_model(model) is model
    assert equal(all_tensors(model), average)
    assert equal(all_tensors(ema.get_ema_model(model)), average)
    assert ema.get_training_model(model) is model
    assert equal(all_tensors(model), training)
    assert equal(all_tensors(ema.get_training_model(model)), training)
    assert equal(all_tensors(ema.ema_model), average)


def test_another_model_is_given_either_set_and_neither_is_lost(trained):
    ema, model, training, average = trained
    other = toy.make_model(seed=8)
    assert equal(all_tensors(ema.get_ema_model(other)), average)
    assert equal(all_tensors(ema.get_training_model(other)), training)
    ema.get_ema_model(model)
    assert equal(all_tensors(ema.get_training_model(other)), training)
    assert equal(all_tensors(ema.get_ema_model(other)), average)
    assert equal(all_tensors(model), average)
    ema.get_training_model(model)
    assert equal(all_tensors(model), training)
    assert equal(all_tensors(ema.ema_model), average)


def test_training_goes_on_from_the_training_weights_whatever_was_asked_for(trainer):
    finals = []
    for asks in (False, True):
        ema = EMA(half_life='2ba')
        run = trainer([ema], model=toy.make_model(seed=2))
        run.fit(duration='1ep')
        if asks:
            ema.get_ema_model(run.state.model)
        run.fit(duration='1ep')
        finals.append((copies(run.state.model), {n: t.clone() for n, t in all_tensors(ema.ema_model).items()}))
    assert equal(finals[0][0], finals[1][0])
    assert equal(finals[0][1], finals[1][1])


def test_another_model_that_does_not_fit_is_refused_and_left_alone(trained):
    ema = trained[0]
    other = toy.make_model(seed=8)
    other.module[5] = nn.Linear(8, 9)
    before = copies(other)
    for ask in (ema.get_ema_model, ema.get_training_model):
        with pytest.raises(ValueError, match=r'module\.5\.bias'):
            ask(other)
        assert equal(all_tensors(other), before)


def test_without_a_trainer_there_is_no_average():
    for ask in (EMA().get_ema_model, EMA().get_training_model):
        with pytest.raises(RuntimeError, match='no average yet. Build a Trainer'.replace('.', r'\.')):
            ask(toy.make_model())


def test_when_the_model_in_training_is_gone_that_is_said(trainer):
    ema = EMA(half_life='2ba')
    ema.ema_model = ShadowModel(toy.make_model())
    with pytest.raises(RuntimeError, match='model in training is gone'):
        ema.get_training_model(toy.make_model())


def test_attributes_of_the_builtin(trained):
    ema, model, _, _ = trained
    assert ema.ema_started
    assert ema.ema_weights_active is False
    ema.get_ema_model(model)
    assert ema.ema_weights_active is True
    assert ema.smoothing == 2**-0.5
    assert isinstance(ema.ema_model, ShadowModel)
    ema.get_training_model(model)
    fresh = EMA()
    assert (fresh.ema_model, fresh.ema_started, fresh.ema_weights_active) == (None, False, False)


def test_the_average_can_be_set_and_taken_away():
    ema, model = EMA(half_life='2ba'), toy.make_model()
    ema.ema_model = EMAParameters(model)
    assert ema.ema_started
    assert equal(all_tensors(ema.ema_model), all_tensors(model))
    assert ema.ema_model._storage.parameters['module.5.weight'].data_ptr() != model.module[5].weight.data_ptr()
    ema.ema_model = None
    assert not ema.ema_started


# Logging


def test_smoothing_updates_and_distance_are_logged(trainer):
    logger, ema = InMemoryLogger(), EMA(half_life='2ba')
    run = trainer([ema], loggers=[logger])
    run.fit()
    smoothings = [(stamp.batch.value, value) for stamp, value in logger.data['ema/smoothing']]
    assert smoothings == [(1, 0.0), *((batch, pytest.approx(2**-0.5)) for batch in range(2, 7))]
    assert [value for _, value in logger.data['ema/num_updates']] == [1, 2, 3, 4, 5, 6]
    assert [stamp.batch.value for stamp, _ in logger.data['ema/relative_distance']] == [3, 6]

    live, average = copies(run.state.model), all_tensors(ema.ema_model)
    names = [name for name, _ in run.state.model.named_parameters()]
    distance = math.sqrt(sum((average[n] - live[n]).double().square().sum().item() for n in names))
    size = math.sqrt(sum(live[n].double().square().sum().item() for n in names))
    assert logger.data['ema/relative_distance'][-1][1] == pytest.approx(distance / size, rel=1e-5)


@pytest.mark.parametrize(
    ('log_interval', 'batches'),
    [('1ba', [1, 2, 3, 4, 5, 6]), ('4ba', [4]), ('8sp', [2, 5]), ('0.5dur', [3, 6]), ('2ep', [6])],
)
def test_the_distance_is_logged_at_its_interval(trainer, log_interval, batches):
    logger = InMemoryLogger()
    trainer([EMA(half_life='2ba', log_interval=log_interval)], loggers=[logger]).fit()
    assert [stamp.batch.value for stamp, _ in logger.data['ema/relative_distance']] == batches


def test_no_distance_is_logged_without_an_interval_or_before_the_start(trainer):
    for arguments, count in (({'log_interval': None}, 0), ({'ema_start': '5ba', 'log_interval': '1ba'}, 2)):
        logger = InMemoryLogger()
        trainer([EMA(half_life='1ba', **arguments)], loggers=[logger]).fit()
        assert len(logger.data.get('ema/relative_distance', [])) == count


def test_a_distance_of_a_run_that_diverged_is_logged_and_does_not_stop_it(trainer):
    logger, ema = InMemoryLogger(), EMA(half_life='2ba', log_interval='1ba')
    model = toy.make_model()
    with torch.no_grad():
        model.module[5].bias.fill_(math.nan)
    trainer([ema], model=model, loggers=[logger]).fit()
    assert all(math.isnan(value) for _, value in logger.data['ema/relative_distance'])


# Matching


def _shown(value):
    if isinstance(value, dict):
        return {key: _shown(inner) for key, inner in value.items()}
    return (id(value), repr(value))


def test_match_only_looks(trainer):
    """Called twice at every event of a run, for every event there is: nothing changes, and both give the same."""

    class AsksTwice(EMA):
        def match(self, event, state):
            for asked in Event:
                before = _shown(self.__dict__)
                answers = super().match(asked, state), super().match(asked, state)
                assert answers[0] is answers[1]
                assert _shown(self.__dict__) == before
            return super().match(event, state)

    plain, asking = EMA(half_life='2ba', ema_start='2ba'), AsksTwice(half_life='2ba', ema_start='2ba')
    for ema in (plain, asking):
        run = trainer([ema], model=toy.make_model(seed=6), eval_dataloader=toy.make_evaluator())
        run.fit()
        run.eval()
    assert equal(all_tensors(plain.ema_model), all_tensors(asking.ema_model))


def test_between_updates_no_event_of_a_batch_matches(trainer):
    class Counts(EMA):
        def apply(self, event, state, logger):
            applied.append((state.timestamp.batch.value, event))
            super().apply(event, state, logger)

    applied = []
    trainer([Counts(half_life='3ba', update_interval='3ba', log_interval=None)]).fit()
    during = [batch for batch, event in applied if event.is_predict is False and event is Event.BATCH_END]
    assert during == [1, 3, 6]
    everything = {event for _, event in applied}
    assert everything == {
        Event.INIT, Event.BEFORE_LOAD, Event.AFTER_LOAD, Event.FIT_START, Event.BATCH_END, Event.FIT_END,
    }  # fmt: skip


# Settings that cannot take effect


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        ({'half_life': '1000ba'}, r"half_life='1000ba' is longer than the run of 6 batches.*half_life='0\.1dur'"),
        ({}, 'is longer than the run of 6 batches'),
        ({'half_life': '9ep'}, 'longer than the run of 2 epochs'),
        ({'half_life': '900sp'}, 'longer than the run of 20 samples'),
        ({'half_life': '2ba', 'ema_start': '7ba'}, r"ema_start='7ba' is longer than .*no average will be kept"),
        ({'half_life': '2ba', 'update_interval': '7ba'}, r'update_interval=.* no update will be made'),
    ],
)
def test_what_is_longer_than_the_run_is_warned_of(trainer, arguments, message):
    run = trainer([EMA(**arguments)])
    with pytest.warns(UserWarning, match=message):
        run.fit()


def test_iterations_in_a_run_without_any_are_refused_before_the_first_batch(trainer):
    run = trainer([EMA(half_life='2iter')])
    with pytest.raises(ValueError, match=r"half_life='2iter' counts iterations, but this run has none\. Pass epochs"):
        run.fit()
    assert run.state.timestamp.batch == 0


def test_tokens_that_are_not_counted_are_refused_with_the_remedy(trainer):
    data = toy.make_data()
    run = trainer([EMA(half_life='9tok')], train_dataloader=data.dataloader)
    with pytest.raises(ValueError, match=r"half_life='9tok' counts tokens.*reports none.*get_num_tokens_in_batch"):
        run.fit()


def test_two_of_them_in_one_trainer_are_refused(trainer):
    with pytest.raises(ValueError, match=r'2 algorithms called EMA in one Trainer.*keep the state of only one'):
        trainer([EMA('2ba'), EMA('3ba')])
    with pytest.raises(ValueError, match='2 algorithms called EMA'):
        trainer([EMA('2ba'), BuiltinEMA('3ba')])


def test_a_pattern_that_matches_nothing_is_refused_when_the_trainer_is_built(trainer):
    with pytest.raises(ValueError, match=r"exclude pattern 'nrom' matches none"):
        trainer([EMA('2ba', exclude='nrom')])


def test_a_model_that_is_all_frozen_is_warned_of(trainer):
    model = toy.make_model()
    model.requires_grad_(False)
    with pytest.warns(UserWarning, match='no trainable parameter to average yet'):
        trainer([EMA('2ba')], model=model)


# State and copies


def test_a_state_of_another_model_is_refused_by_name_and_changes_nothing(trainer, trained):
    state = trained[0].state_dict()
    other = toy.make_model()
    other.module[5] = nn.Linear(8, 4)
    ema = EMA(half_life='2ba')
    trainer([ema], model=other)
    before = {n: t.clone() for n, t in all_tensors(ema.ema_model).items()}
    with pytest.raises(ValueError, match=r'module\.5\.bias \(expected \(4,\), got \(3,\)\)'):
        ema.load_state_dict(state)
    assert equal(all_tensors(ema.ema_model), before)
    assert not ema.ema_started


@pytest.mark.parametrize(
    'damage',
    [
        lambda s: s.pop('started'),
        lambda s: s.update(started='yes'),
        lambda s: s.update(averages=None),
        lambda s: s.update(averages={'other': {}}),
        lambda s: s['averages'].update(ema=[]),
        lambda s: s['averages']['ema'].update(last_update=3),
        lambda s: s['averages']['ema'].update(last_update={'ba': 3}),
        lambda s: s['averages']['ema'].update(last_update=dict.fromkeys(('iter', 'ep', 'ba', 'sp', 'tok'), 'x')),
        lambda s: s['averages']['ema'].pop('parameters'),
        lambda s: s.update(version=3),
        lambda s: s.update(training_weights={}),
        lambda s: s.update(config=3),
    ],
)  # fmt: skip
def test_a_damaged_state_is_a_value_error_and_changes_nothing(trainer, trained, damage):
    state = copy.deepcopy(trained[0].state_dict())
    damage(state)
    ema = EMA(half_life='2ba')
    trainer([ema])
    before = {n: t.clone() for n, t in all_tensors(ema.ema_model).items()}
    with pytest.raises(ValueError):
        ema.load_state_dict(state)
    assert equal(all_tensors(ema.ema_model), before)
    assert not ema.ema_started
    assert not ema.ema_weights_active


def test_a_state_without_an_average_loads_and_starts_nothing(trainer):
    ema = EMA(half_life='2ba')
    trainer([ema])
    ema.load_state_dict(EMA(half_life='2ba').state_dict())
    assert not ema.ema_started


def test_a_state_loaded_before_the_trainer_is_built_waits_for_it(trainer, trained):
    average = trained[3]
    ema = EMA(half_life='2ba')
    ema.load_state_dict(copy.deepcopy(trained[0].state_dict()))
    trainer([ema])
    assert equal(all_tensors(ema.ema_model), average)


def test_going_on_with_another_horizon_is_warned_of(trainer, trained, tmp_path):
    """When training goes on; reading the average out of a checkpoint with a plain EMA() is nothing to warn of."""
    first = trainer([EMA(half_life='2ba')])
    first.fit(duration='1ep')
    path = first.save_checkpoint(str(tmp_path / 'first.pt'))
    run = trainer([EMA(half_life='3ba')], load_path=path)
    run.eval(toy.make_evaluator())
    with pytest.warns(UserWarning, match=r"half_life='2ba', this run continues with half_life='3ba'"):
        run.fit()


@pytest.mark.parametrize('duplicate', [copy.deepcopy, lambda ema: pickle.loads(pickle.dumps(ema))])
def test_a_copy_has_the_average_and_none_of_the_ties(trained, duplicate):
    ema, _, _, average = trained
    twin = duplicate(ema)
    assert repr(twin) == repr(ema)
    assert equal(all_tensors(twin.ema_model), average)
    assert equal(all_tensors(twin.get_ema_model(toy.make_model(seed=5))), average)


def test_the_algorithm_does_not_keep_the_model_alive():
    ema, model = EMA(half_life='2ba'), toy.make_model()
    state = state_by_hand(model)
    for event in (Event.INIT, Event.BATCH_END):
        ema.apply(event, state, Logger(state))
    reference = weakref.ref(model)
    del state, model
    gc.collect()
    assert reference() is None
    assert len(list(ema.ema_model.parameters())) == 6


def test_one_instance_can_serve_a_second_trainer(trainer):
    ema, fresh = EMA(half_life='2ba'), EMA(half_life='2ba')
    trainer([ema], model=toy.make_model(seed=1)).fit()
    trainer([ema], model=toy.make_model(seed=2)).fit()
    trainer([fresh], model=toy.make_model(seed=2)).fit()
    assert equal(all_tensors(ema.ema_model), all_tensors(fresh.ema_model))


def test_evaluators_given_as_plain_loaders_have_the_label_eval(trainer):
    ema = EMA(half_life='2ba', evaluate_with={'eval': 'training'})
    probe = Sees(ema)
    run = trainer([ema], callbacks=[probe], eval_dataloader=toy.make_data(4, seed=2), eval_interval='1ep')
    run.fit()
    assert set(probe.seen) == {('eval', 'training')}
    assert isinstance(run.state.evaluators[0], Evaluator)


# What a stranger found


def test_after_the_clock_is_set_back_updates_go_on(trainer):
    ema = EMA('2ba')
    run = trainer([ema])
    run.fit()
    before = ema.ema_model.num_updates
    run.fit(duration='2ep', reset_time=True)
    assert ema.ema_model.num_updates == 2 * before


@pytest.mark.parametrize('surgery', [BlurPool, SqueezeExcite, GhostBatchNorm], ids=lambda s: s.__name__)
def test_algorithms_that_replace_layers_may_stand_before_or_after(trainer, tmp_path, surgery):
    averages = []
    for place in (0, 1):
        ema, folder = EMA('2ba'), tmp_path / str(place)
        algorithms = [_operate(surgery)]
        algorithms.insert(place, ema)
        run = trainer(algorithms, save_folder=str(folder), save_interval='2ba', save_filename='ba{batch}.pt')
        run.fit()
        averages.append({name: tensor.clone() for name, tensor in ema.ema_model.named_parameters()})
        resumed = EMA('2ba')
        algorithms = [_operate(surgery)]
        algorithms.insert(place, resumed)
        trainer(algorithms, load_path=str(folder / 'ba2.pt')).fit()
        assert all(torch.equal(t, averages[-1][name]) for name, t in resumed.ema_model.named_parameters())
    assert averages[0].keys() == averages[1].keys()
    assert all(torch.equal(averages[0][name], averages[1][name]) for name in averages[0])


def _operate(surgery):
    return surgery(ghost_batch_size=2) if surgery is GhostBatchNorm else surgery(min_channels=1)


def test_beside_composers_swa_the_update_stays_in_line(trainer):
    alone, beside = EMA('2ba'), EMA('2ba')
    trainer([alone])
    trainer([beside, SWA()])
    assert alone.ema_model._follower._overlap
    assert not beside.ema_model._follower._overlap


@pytest.mark.parametrize('moment', [Event.EVAL_START, Event.EVAL_BATCH_END])
def test_an_evaluation_inside_an_evaluation_leaves_the_outer_one_the_average(trainer, moment):
    class Inner(Callback):
        is_inside = False

        def run_event(self, event, state, logger):
            if event is Event.EVAL_BEFORE_FORWARD and not self.is_inside:
                held.append(ema.ema_weights_active)
            if event is moment and not self.is_inside:
                self.is_inside = True
                run.eval(eval_dataloader=toy.make_evaluator('inner'))
                self.is_inside = False

    ema, held = EMA('2ba'), []
    run = trainer([ema], callbacks=[Inner()], eval_dataloader=toy.make_evaluator('outer', '1ba'))
    run.fit()
    assert held
    assert all(held)
    assert not ema.ema_weights_active


def test_evaluating_between_forward_and_backward_leaves_the_graph_valid(trainer):
    class Evaluates(Callback):
        def after_loss(self, state, logger):
            kept = state.batch, state.outputs
            run.eval(eval_dataloader=toy.make_evaluator('between'))
            state.batch, state.outputs = kept  # which Composer does not give back

    ema = EMA('2ba')
    run = trainer([ema], callbacks=[Evaluates()])
    run.fit()
    assert ema.ema_model.num_updates > 1


def test_a_counter_that_evaluation_counts_up_goes_on_as_without_an_average(trainer):
    class Counts(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer('calls', torch.zeros((), dtype=torch.int64))

        def forward(self, inputs):
            self.calls += 1
            return inputs

    ends = []
    for algorithms in ([], [EMA('2ba')]):
        model = toy.make_model()
        model.module.append(Counts())
        trainer(algorithms, model=model, eval_dataloader=toy.make_evaluator('eval', '1ba')).fit()
        ends.append(int(model.module[-1].calls))
    assert ends[0] == ends[1]


def test_a_buffer_whose_elements_share_memory_is_left_alone(trainer):
    model = toy.make_model()
    model.module[0].register_buffer('shared', torch.ones(1).expand(4), persistent=False)
    ema = EMA('2ba')
    trainer([ema], model=model, eval_dataloader=toy.make_evaluator('eval', '1ba')).fit()
    assert not any('shared' in name for name, _ in ema.ema_model.named_buffers())


def test_an_average_too_coarse_for_its_updates_is_warned_of_once(trainer):
    with pytest.warns(UserWarning, match=r"mostly rounded away in an average kept in bfloat16.*rounding='stochastic'"):
        trainer([EMA(smoothing=0.9999, shadow_dtype='bfloat16')]).fit()
    with warnings.catch_warnings():
        warnings.simplefilter('error', UserWarning)
        shadow = ShadowModel(toy.make_model(), dtype='bfloat16')
        shadow.update(toy.make_model(), smoothing=0.5)


@pytest.mark.parametrize(('argument', 'value'), [('log_interval', '9ep'), ('ema_start', '9ep'), ('half_life', '99sp')])
def test_what_comes_after_the_end_of_the_run_is_warned_of(trainer, argument, value):
    arguments = {'half_life': '2ba', argument: value}
    with pytest.warns(UserWarning, match=f"{argument}='{value}' is longer than the run"):
        trainer([EMA(**arguments)]).fit()


def test_an_update_beside_training_has_read_the_weights_before_the_optimizer_writes(trainer, monkeypatch):
    monkeypatch.setattr(offload, 'can_take', lambda shadow, source: True)
    ema, seen = EMA('2ba', log_interval=None), []

    class Looks(Callback):
        def batch_end(self, state, logger):
            seen.append(ema.ema_model.is_pending)

        def after_train_batch(self, state, logger):
            seen.append(ema.ema_model.is_pending)

    trainer(algorithms=[ema], callbacks=[Looks()], max_duration='3ba').fit()
    assert seen == [False, True] * 3


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a CUDA device')
def test_on_a_gpu_a_hundred_batches_never_make_the_algorithm_synchronise(trainer):
    """The Trainer itself may: it logs losses."""

    class Strict(EMA):
        def apply(self, event, state, logger):
            if event not in (Event.AFTER_TRAIN_BATCH, Event.BATCH_END) or int(state.timestamp.batch) < 3:
                return super().apply(event, state, logger)
            torch.cuda.set_sync_debug_mode('error')
            try:
                return super().apply(event, state, logger)
            finally:
                torch.cuda.set_sync_debug_mode('default')

    algorithm = Strict('10ba', log_interval=None)
    trainer(algorithms=[algorithm], device='gpu', max_duration='103ba').fit()
    assert algorithm.ema_model.num_updates == 103
