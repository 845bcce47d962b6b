"""Wanted averages: from words and a run's clock to cumulative shares."""

import numpy as np
import pytest

from composer_ema.posthoc import shares, target
from composer_ema.posthoc.target import RunClock
from composer_ema.spans import ArgumentError, Span


@pytest.fixture
def clock() -> RunClock:
    """A hundred batches of 8 samples, 25 of them an epoch, looked at after every fifth."""
    batches = np.arange(5.0, 101.0, 5.0)
    return RunClock({'ba': batches, 'sp': 8 * batches, 'ep': batches / 25, 'tok': 0 * batches})


def cumulative(clock: RunClock, **arguments) -> np.ndarray:
    return target.choose(**arguments).cumulative(clock)


def test_a_half_life_halves_in_its_unit(clock):
    for half_life in ('10ba', '80sp', '0.4ep', '0.1dur', Span(10, 'ba')):
        found = cumulative(clock, half_life=half_life)
        np.testing.assert_allclose(found[[-1, -3, -5]], [1, 0.5, 0.25], rtol=1e-12)


def test_a_share_of_the_run_is_a_share_of_what_it_was_to_last(clock):
    longer = RunClock(clock.times, Span(200, 'ba'))
    np.testing.assert_array_equal(cumulative(longer, half_life='0.1dur'), cumulative(clock, half_life='20ba'))
    in_epochs = RunClock(clock.times, Span(4, 'ep'))
    np.testing.assert_allclose(cumulative(in_epochs, half_life='0.1dur'), cumulative(clock, half_life='10ba'))


def test_a_power_average_is_that_of_its_exponent(clock):
    np.testing.assert_allclose(cumulative(clock, gamma=0), clock.times['ba'] / 100)
    np.testing.assert_allclose(cumulative(clock, power=12**-0.5), clock.times['ba'] / 100)
    np.testing.assert_allclose(cumulative(clock, gamma=1)[9], 0.25)


def test_a_power_average_counts_from_the_start_of_the_averages(clock):
    late = RunClock({unit: times[9:] for unit, times in clock.times.items()})
    np.testing.assert_allclose(cumulative(late, gamma=1), ((late.times['ba'] - 45) / 55) ** 2)


def test_an_equal_average_of_the_last_so_much(clock):
    for equal in ('20ba', '0.2dur', '0.8ep'):
        found = shares.shares(target.choose(equal=equal).weights(clock))
        np.testing.assert_allclose(found[-5:], [0, 0.25, 0.25, 0.25, 0.25], atol=1e-12)
    np.testing.assert_allclose(shares.shares(target.choose(equal='1dur').weights(clock)), 0.05)


def test_a_schedule_stands_for_the_learning_rate_that_it_scales_the_steps_by(clock):
    rate = 1 - cumulative(clock, schedule='cosine')
    np.testing.assert_allclose(rate, (1 + np.cos(np.pi * clock.times['ba'] / 100)) / 2, atol=1e-15)
    last = 1 - cumulative(clock, schedule='linear:0.2dur')
    np.testing.assert_allclose(last[-6:], [1, 1, 0.75, 0.5, 0.25, 0], atol=1e-12)
    np.testing.assert_allclose(1 - cumulative(clock, schedule='1-sqrt:20ba')[-4:], 1 - np.sqrt([0.25, 0.5, 0.75, 1]))


def test_an_earlier_moment_ends_the_average_there(clock):
    earlier = clock.until(Span(2, 'ep'))
    assert earlier.times['ba'][-1] == 50
    assert cumulative(earlier, half_life='10ba')[-1] == 1
    # A tenth of the run is a tenth of the whole run, and a share of time trained one of the time trained by then.
    np.testing.assert_array_equal(cumulative(earlier, half_life='0.1dur'), cumulative(earlier, half_life='10ba'))
    assert cumulative(earlier, gamma=1)[4] == 0.25
    np.testing.assert_allclose(1 - cumulative(earlier, schedule='linear'), 1 - earlier.times['ba'] / 50)


def test_between_moments_the_last_one_before_counts(clock):
    assert clock.until(Span(52, 'ba')).times['ba'][-1] == 50
    assert clock.until(Span(100, 'ba')).times['ba'][-1] == 100
    assert clock.until(Span(1.0, 'dur')).times['ba'][-1] == 100


@pytest.mark.parametrize('at', [Span(4, 'ba'), Span(101, 'ba'), Span(1.01, 'dur')])
def test_moments_outside_of_the_run_are_refused(clock, at):
    with pytest.raises(ArgumentError, match='must lie between the first moment and the last one'):
        clock.until(at)


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        ({}, 'exactly one of half_life, power, gamma, equal, schedule, got none'),
        ({'power': 0.1, 'equal': '1ep'}, "got power=0.1 and equal='1ep'"),
        ({'half_life': '0ba'}, 'half_life must be above zero'),
        ({'schedule': 'cosin'}, "Did you mean 'cosine'?"),
        ({'schedule': 'linear:0dur'}, 'schedule must be above zero'),
        ({'power': 0.9}, 'power must lie in'),
        ({'gamma': -1}, 'gamma must lie in'),
    ],
)
def test_what_no_average_can_be_is_refused(arguments, message):
    with pytest.raises(ArgumentError, match=message.replace('?', r'\?')):
        target.choose(**arguments)


def test_units_that_the_run_did_not_count_are_refused(clock):
    with pytest.raises(ArgumentError, match='half_life=100tok is in tokens, which the run did not count'):
        cumulative(clock, half_life='100tok')


def test_a_span_longer_than_the_run_is_refused(clock):
    with pytest.raises(ArgumentError, match='equal=5ep is longer than the run up to that moment, 4ep'):
        cumulative(clock, equal='5ep')


@pytest.mark.parametrize(
    'arguments',
    [{'half_life': '0.1dur'}, {'power': 0.1}, {'gamma': 2.5}, {'equal': '2ep'}, {'schedule': '1-sqrt:0.2dur'}],
    ids=str,
)
def test_targets_describe_themselves_as_their_arguments_are_spelled(arguments):
    ((name, value),) = arguments.items()
    assert str(target.choose(**arguments)) == f'{name}={value}'


@pytest.mark.parametrize('schedule', shares.SCHEDULES)
def test_schedules_over_many_moments_nowhere_rise(schedule):
    times = np.linspace(0, 1, 200_001)[1:]
    weights = shares.weights_of(shares.decayed(times, shares.SCHEDULES[schedule], 1.0))
    assert weights.min() >= 0
