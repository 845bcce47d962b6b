"""The weights of an update against closed forms that need no more than Python's own arithmetic."""

import math
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from composer_ema.averages import check_share, equal_weight, exponential_weight, weight_from_smoothing

lengths = st.floats(min_value=1e-6, max_value=1e12)


@pytest.mark.parametrize(
    ('elapsed', 'half_life', 'weight'),
    [
        (10, 10, Fraction(1, 2)),
        (20, 10, Fraction(3, 4)),
        (3, 1, Fraction(7, 8)),
        (0.5, 0.25, Fraction(3, 4)),
        (40, 1, 1 - Fraction(1, 2**40)),
    ],
)
def test_whole_numbers_of_half_lives_give_powers_of_one_half(elapsed, half_life, weight):
    assert exponential_weight(elapsed, half_life) == pytest.approx(float(weight), rel=2**-52, abs=0)


def test_half_of_a_half_life_keeps_one_over_the_square_root_of_two():
    assert exponential_weight(1, 2) == pytest.approx(1 - math.sqrt(0.5), rel=4e-16, abs=0)


@pytest.mark.parametrize('exponent', [0, 3, 6, 9, 12, 15, 18, 100, 300])
def test_a_long_half_life_keeps_its_digits(exponent):
    """1 - 2 ** -x is x ln2 - (x ln2) ** 2 / 2 + ...; the naive difference has no digit left at x = 1e-16."""
    half_life = 10.0**exponent
    x = math.log(2) / half_life
    series = x - x**2 / 2 + x**3 / 6 if exponent else 0.5
    error = x**4 / 24 / series if exponent else 0
    assert exponential_weight(1, half_life) == pytest.approx(series, rel=4e-16 + error, abs=0)


@pytest.mark.parametrize('elapsed', [0, 1, 1e-30, 1e300])
def test_a_half_life_of_zero_averages_nothing(elapsed):
    assert exponential_weight(elapsed, 0) == 1.0


def test_no_time_passed_gives_no_weight():
    assert exponential_weight(0, 10) == 0.0


def test_a_very_long_time_copies():
    assert exponential_weight(1e300, 1e-6) == 1.0


@given(elapsed=lengths, half_life=lengths)
def test_the_weight_is_a_share(elapsed, half_life):
    assert 0 < exponential_weight(elapsed, half_life) <= 1


@given(first=lengths, second=lengths, half_life=lengths)
def test_two_stretches_of_time_keep_what_one_of_their_length_keeps(first, second, half_life):
    kept = (1 - exponential_weight(first, half_life)) * (1 - exponential_weight(second, half_life))
    assert kept == pytest.approx(1 - exponential_weight(first + second, half_life), abs=1e-15)


@given(elapsed=lengths, half_life=lengths, factor=st.sampled_from([2.0**-20, 0.5, 2.0, 2.0**20]))
def test_only_the_ratio_to_the_half_life_counts(elapsed, half_life, factor):
    assert exponential_weight(elapsed * factor, half_life * factor) == exponential_weight(elapsed, half_life)


@given(elapsed=lengths, longer=st.floats(1, 1e6), half_life=lengths)
def test_more_time_never_gives_less_weight(elapsed, longer, half_life):
    assert exponential_weight(elapsed * longer, half_life) >= exponential_weight(elapsed, half_life)


@given(values=st.lists(st.fractions(-1000, 1000, max_denominator=1000), min_size=1, max_size=50))
def test_updates_of_equal_weight_make_the_mean(values):
    average = Fraction(7)  # whatever it starts from, the first update copies
    for count, value in enumerate(values):
        average += Fraction(1, count + 1) * (value - average)
        assert equal_weight(count) == float(Fraction(1, count + 1))
    assert average == sum(values) / len(values)


@pytest.mark.parametrize(
    ('count', 'error', 'message'),
    [
        (-1, ValueError, r'num_averaged must be at least 0, got -1\. The first'),
        (True, TypeError, r'whole number of at least 0, got True'),
        (1.0, TypeError, r'whole number of at least 0, got 1\.0'),
    ],
)
def test_a_count_that_is_none_is_refused(count, error, message):
    with pytest.raises(error, match=message):
        equal_weight(count)


@pytest.mark.parametrize('smoothing', [0, 0.0, 0.25, 0.999, 1, 1.0])
def test_weight_and_smoothing_make_one(smoothing):
    weight = weight_from_smoothing(smoothing)
    assert isinstance(weight, float)
    assert weight == 1 - smoothing


@pytest.mark.parametrize('value', [-1, -1e-300, math.nan, math.inf])
@pytest.mark.parametrize('name', ['elapsed', 'half_life'])
def test_times_out_of_range_are_refused_by_name_and_value(name, value):
    arguments = {'elapsed': 1.0, 'half_life': 1.0, name: value}
    with pytest.raises(ValueError, match=rf'{name} must be finite and at least 0, got {value}') as error:
        exponential_weight(**arguments)
    if name == 'half_life':
        assert 'smoothing=1' in str(error.value)


@pytest.mark.parametrize('smoothing', [1.3, -0.1, math.nan, math.inf, -math.inf])
def test_a_smoothing_out_of_range_names_value_rule_and_remedy(smoothing):
    with pytest.raises(ValueError, match=rf'smoothing must lie in \[0, 1\], got {smoothing}\. .*half_life='):
        weight_from_smoothing(smoothing)


@pytest.mark.parametrize('smoothing', ['0.9', None, True, [0.9]])
def test_a_smoothing_that_is_no_number_names_its_type_and_the_remedy(smoothing):
    with pytest.raises(TypeError, match=rf'of type {type(smoothing).__name__}\. .*half_life='):
        weight_from_smoothing(smoothing)


def test_a_share_ends_its_message_with_the_remedy_of_the_caller():
    with pytest.raises(ValueError, match=r'weight must lie in \[0, 1\], got 2\. Divide it\.'):
        check_share('weight', 2, 'Divide it.')
