"""What holds for Composer's own EMA, by its own tests, holds for ours, which agrees with it over a run."""

from __future__ import annotations

import copy
import inspect
import math

import numpy as np
import pytest
import torch
import toy
from composer.algorithms import EMA as BuiltinEMA
from composer.algorithms.ema.ema import EMAParameters
from composer.core import Event, Time, Timestamp
from composer.loggers import Logger
from composer.models import ComposerClassifier
from tensors import all_tensors, assert_close, copies, equal, mixed, state_by_hand
from torch import nn

from composer_ema import EMA, ShadowModel, compute_ema


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


@either_model
@pytest.mark.parametrize('smoothing', [0, 0.5, 0.99, 1])
def test_one_functional_update_is_the_formula(make_model, smoothing):
    model, ema_model = make_model(), make_model()
    expected = mixed(copies(ema_model), copies(model), smoothing)
    compute_ema(model=model, ema_model=ema_model, smoothing=smoothing)
    assert_close(all_tensors(ema_model), expected)


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


def test_the_arguments_of_the_builtin_stand_in_its_order_with_its_defaults():
    builtin, ours = inspect.signature(BuiltinEMA).parameters, inspect.signature(EMA).parameters
    assert list(ours)[: len(builtin)] == list(builtin)
    assert all(ours[name].default == parameter.default for name, parameter in builtin.items())
    assert all(ours[name].kind is inspect.Parameter.KEYWORD_ONLY for name in list(ours)[len(builtin) :])
    assert EMA.__qualname__ == BuiltinEMA.__qualname__


@pytest.mark.parametrize(
    ('arguments', 'theirs'),
    [
        ({'half_life': '3ba'}, {}),
        ({'half_life': '3ba', 'update_interval': '2ba', 'ema_start': '2ba'}, {}),
        ({'half_life': '1ep', 'update_interval': '1ep'}, {}),
        ({'half_life': '2ep', 'ema_start': '1ep', 'update_interval': '1ep'}, {}),
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
