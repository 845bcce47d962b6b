"""Cumulative shares: the closed forms of the profiles against simulated averages."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from composer_ema.averages import BiasCorrected, CopiesFirst, Equal, HalfLife, Moment, Power, Profile, Smoothing
from composer_ema.posthoc import shares

#: The moments of a run's updates: every one alike, every tenth, from later on, and after a resume with others.
TIMES = {
    'every batch': np.arange(1.0, 61.0),
    'every tenth': 10.0 * np.arange(1, 61),
    'from 25 on': 25.0 + 10.0 * np.arange(60),
    'resumed with others': np.concatenate([10.0 * np.arange(1, 31), 300.0 + 7.0 * np.arange(1, 31)]),
    'uneven': np.cumsum(np.random.default_rng(0).uniform(0.1, 9.0, 60)),
}
PROFILES = {
    'exponential': (lambda: CopiesFirst(HalfLife(40.0)), lambda times, start: shares.exponential(times, 40.0)),
    'bias corrected': (
        lambda: BiasCorrected(HalfLife(40.0)),
        lambda times, start: shares.bias_corrected(times, 40.0, start),
    ),
    'power': (lambda: Power(0.1), lambda times, start: shares.power(times, Power(0.1).gamma, start)),
    'equal': (Equal, lambda times, start: shares.equal(len(times))),
}


def weights_of_run(profile: Profile, times, start: float) -> np.ndarray:
    weights, last = [], start
    for count, time in enumerate(times):
        moment = Moment(time - last, time - start, count)
        weights.append(profile.weight(moment))
        profile.record(moment)
        last = time
    return np.array(weights)


def simulated(weights) -> np.ndarray:
    """The share of each moment, found by averaging unit vectors."""
    average = np.zeros(len(weights))
    for moment, weight in enumerate(weights):
        source = np.zeros(len(weights))
        source[moment] = 1.0
        average += weight * (source - average)
    return average


@pytest.mark.parametrize('times', TIMES.values(), ids=TIMES)
@pytest.mark.parametrize('start', [0.0, 1.0], ids=['from the start', 'from 1'])
@pytest.mark.parametrize('profile', PROFILES)
def test_the_closed_form_is_what_the_profile_does(profile, start, times):
    if start >= times[0]:
        times = times[1:]
    build, closed_form = PROFILES[profile]
    found = simulated(weights_of_run(build(), times, start))
    np.testing.assert_allclose(np.cumsum(found), closed_form(times, start), rtol=0, atol=1e-12)


@pytest.mark.parametrize('before', PROFILES)
@pytest.mark.parametrize('after', [0.0, 0.01, 1.0])
def test_a_run_resumed_with_another_profile_keeps_the_shares_of_its_recorded_weights(before, after):
    weights = np.append(
        weights_of_run(PROFILES[before][0](), TIMES['every tenth'], 0.0),
        weights_of_run(Smoothing(1 - after), range(1, 21), 0.0),
    )
    np.testing.assert_allclose(shares.shares(weights), simulated(weights), rtol=0, atol=1e-12)
    np.testing.assert_allclose(shares.cumulative(weights), np.cumsum(simulated(weights)), rtol=0, atol=1e-12)


@settings(max_examples=30)
@given(st.lists(st.floats(0.0, 1.0), max_size=40))
def test_shares_of_any_weights_are_those_of_the_simulation(weights):
    weights = [1.0, *weights]
    np.testing.assert_allclose(shares.shares(weights), simulated(weights), rtol=0, atol=1e-12)


@settings(max_examples=30)
@given(st.lists(st.floats(0.0, 0.99), max_size=40), st.integers(0, 5))
def test_weights_come_back_from_their_cumulative_shares(weights, without):
    weights = [*[1.0] * without, 1.0, *weights]
    found = shares.weights_of(shares.cumulative(weights))
    np.testing.assert_allclose(shares.cumulative(found), shares.cumulative(weights), rtol=1e-12, atol=1e-15)


def test_by_hand():
    assert shares.shares([1, 0.5, 0.5]).tolist() == [0.25, 0.25, 0.5]
    assert shares.latest([0, 10, 20, 30], 20).tolist() == [0, 0, 0.5, 1]
    cosine = shares.decayed([0, 1, 2], shares.cosine, 2)
    np.testing.assert_allclose(cosine, [0, 0.5, 1], atol=1e-15)
    np.testing.assert_allclose(shares.decayed([0, 1, 4], shares.one_minus_sqrt, 4), [0, 0.5, 1])
    assert shares.decayed([0, 1, 2, 3], shares.linear, 2).tolist() == [0, 0, 0.5, 1]


def test_a_learning_rate_that_rises_by_a_rounding_error_is_one_that_stays():
    rates = np.array([1.0, 0.5, 0.5 + 1e-15, 0.0])
    assert shares.decayed(np.arange(4.0), lambda progress: rates, 3.0).tolist() == [0.0, 0.5, 0.5, 1.0]


@pytest.mark.parametrize(('sigma', 'half'), [(0.05, 0.038), (0.10, 0.084), (0.25, 0.33)])
def test_half_of_a_power_average_lies_where_its_card_says(sigma, half):
    found = shares.power(np.linspace(0, 1, 10001), Power(sigma).gamma)
    assert 1 - np.searchsorted(found, 0.5) / 10000 == pytest.approx(half, abs=0.003)


def test_long_runs_neither_overflow_nor_lose_their_digits():
    times = np.arange(1.0, 1e5)
    found = shares.exponential(times, 10.0)
    assert found[0] == 0.0
    assert shares.cumulative(np.append(1.0, np.full(99_998, -math.expm1(-math.log(2) / 10))))[-100] == pytest.approx(
        found[-100], rel=1e-12
    )


@pytest.mark.parametrize('weights', [[], [0.5, 0.5], [1, -0.1], [1, 1.5], [1, math.nan], [[1, 1]]])
def test_weights_that_no_average_has_are_refused(weights):
    with pytest.raises(ValueError, match='begins with 1'):
        shares.cumulative(weights)


@pytest.mark.parametrize('given', [[], [0.5, 0.4, 1], [0.5], [-0.5, 1], [math.nan, 1]])
def test_cumulative_shares_that_fall_or_do_not_end_at_1_are_refused(given):
    with pytest.raises(ValueError, match='nowhere fall'):
        shares.weights_of(given)
