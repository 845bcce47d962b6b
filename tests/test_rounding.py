"""What an average says of updates that its dtype rounds away."""

import logging
import math

import pytest
import torch
from torch import nn

from composer_ema import EMAOptimizer, ShadowModel, ShadowModels
from composer_ema.averages import Equal
from composer_ema.shadow import rounding
from tests import plain

LOGGER = 'composer_ema.shadow.rounding'


def logged(caplog):
    return [record.getMessage() for record in caplog.records if record.name == LOGGER]


def test_an_average_stands_still_within_the_largest_error_and_moves_beyond_it():
    weight, error = 1e-4, rounding.largest_error(torch.float32, 1e-4)
    assert error == pytest.approx(2**-24 / 1e-4)
    for distance, moves in ((0.9 * error, False), (4.1 * error, True)):  # a unit in the last place may be half of eps
        shadow = torch.ones(())
        shadow.lerp_(torch.tensor(1 + distance), weight)
        assert (shadow != 1) == moves


@pytest.mark.parametrize(
    ('dtype', 'least'),
    [(torch.float32, 2**-24 / 1e-3), (torch.float64, 2**-53 / 1e-3), (torch.bfloat16, 2**-8 / 0.02), (None, 0)],
)
def test_the_least_weight_of_a_dtype(dtype, least):
    assert rounding.least_weight(dtype) == pytest.approx(least)


@pytest.mark.parametrize(
    ('dtype', 'weight', 'message'),
    [
        ('float32', 2e-5, r'in float32, which rounds updates of weight 2e-05 away in part: it may be 0\.3 % off\.'),
        (
            'bfloat16',
            0.03,
            r"0\.03 away .* 13 % off\. .* wider dtype, round bfloat16 with rounding='stochastic'",
        ),
        (
            'float16',
            0.01,
            r'0\.01 away in part: it may be 4\.9 % off\. Pass compensated=True, keep it in a wider dtype, or',
        ),
    ],
)
def test_an_average_that_rounds_its_updates_away_warns_once_with_the_figure(dtype, weight, message):
    model = nn.Linear(2, 1)
    shadow = ShadowModel(model, dtype=dtype)
    shadow.update(model, weight=0.5)
    with pytest.warns(UserWarning, match=message) as warned:
        shadow.update(model, weight=weight)
    assert [each.filename for each in warned] == [__file__]  # where the user called, not where we warn
    shadow.update(model, weight=weight / 2)
    shadow.to(device='cpu')  # which makes the next update prepare anew
    shadow.update(model, weight=weight / 4)


def test_between_a_tenth_of_a_per_mille_and_a_per_mille_the_log_says_so_once(caplog):
    caplog.set_level(logging.INFO, LOGGER)
    model = plain.One()
    optimizer = EMAOptimizer(plain.sgd(model))  # its default smoothing is 0.9999
    for value in (1.0, 2.0, 3.0):
        plain.step_to(optimizer, model, value)
    (message,) = logged(caplog)
    assert 'updates of weight 0.0001 away in part: it may be 0.06 % off' in message


def test_an_equal_average_warns_when_its_weight_has_fallen(caplog):
    caplog.set_level(logging.INFO, LOGGER)
    model = nn.Linear(2, 1)
    shadow = ShadowModel(model)
    for num_updates in (0, 100, math.ceil(1e-4 * 2**24)):
        shadow.update(model, weight=Equal().weight_at(num_updates))
    assert len(logged(caplog)) == 1
    with pytest.warns(UserWarning, match=r'0\.1 % off'):
        shadow.update(model, weight=Equal().weight_at(math.ceil(1e-3 * 2**24)))


@pytest.mark.parametrize(
    ('settings', 'weight'),
    [({'dtype': 'float64'}, 1e-9), ({'dtype': 'bfloat16', 'rounding': 'stochastic'}, 1e-4), ({}, 0.0), ({}, 1e-3)],
    ids=str,
)
def test_an_average_that_keeps_its_updates_says_nothing(settings, weight, caplog):
    caplog.set_level(logging.INFO, LOGGER)
    model = nn.Linear(2, 1)
    ShadowModel(model, **settings).update(model, weight=weight)
    assert logged(caplog) == []


def test_among_several_averages_the_warning_names_the_one_it_is_of():
    model = nn.Linear(2, 2)
    shadows = ShadowModels(model, ['short', 'long'])
    with pytest.warns(UserWarning, match="the average 'long' is kept in float32, which rounds updates of weight 2e-05"):
        shadows.update(model, weight={'short': 0.1, 'long': 2e-5})
