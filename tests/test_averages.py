"""Profiles against closed forms that need no more than Python's own arithmetic."""

import copy
import itertools
import math
from collections.abc import Sequence
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st
from plain import saved

from composer_ema.averages import (
    BiasCorrected,
    CopiesFirst,
    Equal,
    HalfLife,
    Moment,
    Power,
    Profile,
    Smoothing,
    WarmedUp,
    check_share,
    weight_from_smoothing,
)

lengths = st.floats(min_value=1e-6, max_value=1e12)
#: Times between updates of one average.
spacings = st.lists(st.floats(min_value=0.01, max_value=100), min_size=1, max_size=30)

#: One of each kind, and one inside another.
PROFILES = {
    'half-life': lambda: HalfLife(7.5, 'ba'),
    'no half-life': lambda: HalfLife(0),
    'smoothing': lambda: Smoothing(0.9, 'steps', 'decay'),
    'equal': Equal,
    'power': lambda: Power(0.1, 'ba'),
    'warmed up': lambda: WarmedUp(HalfLife(20, 'ba'), 0.3),
    'corrected': lambda: BiasCorrected(HalfLife(7.5, 'ba')),
    'corrected smoothing': lambda: BiasCorrected(Smoothing(0.9)),
    'warmed up and corrected': lambda: BiasCorrected(WarmedUp(HalfLife(20, 'ba'), 0.3)),
    'copies first': lambda: CopiesFirst(Smoothing(0.9)),
    'copies first, corrected': lambda: CopiesFirst(BiasCorrected(HalfLife(3))),
}
each_profile = pytest.mark.parametrize('make', PROFILES.values(), ids=PROFILES)


def after(elapsed: float) -> Moment:
    """The moment of a later update, ``elapsed`` after the last one."""
    return Moment(elapsed, elapsed, 1)


def moments(spacing: Sequence[float]) -> list[Moment]:
    """Updates that lie ``spacing`` apart, the first one that long after the start."""
    return [Moment(each, math.fsum(spacing[: n + 1]), n) for n, each in enumerate(spacing)]


def weights_of(profile: Profile, run: Sequence[Moment]) -> list[float]:
    """The weights of a run of updates, each recorded."""
    weights = []
    for moment in run:
        weights.append(profile.weight(moment))
        profile.record(moment)
    return weights


def shares_of(weights: Sequence[float]) -> list[float]:
    """How much the start, and then each update, weighs in the average at the end."""
    shares = [1.0]
    for weight in weights:
        shares = [share * (1 - weight) for share in shares] + [weight]
    return shares


class TestEveryProfile:
    @each_profile
    @given(spacing=spacings)
    def test_every_weight_is_a_share(self, make, spacing):
        assert all(0 <= weight <= 1 for weight in weights_of(make(), moments(spacing)))

    @each_profile
    @given(spacing=spacings)
    def test_asking_for_a_weight_changes_nothing(self, make, spacing):
        profile, run = make(), moments(spacing)
        weights_of(profile, run[:-1])
        before = profile.state_dict()
        assert profile.weight(run[-1]) == profile.weight(run[-1])
        assert profile.state_dict() == before

    @each_profile
    @given(spacing=spacings, stop=st.integers(0, 30))
    def test_a_state_loaded_in_the_middle_of_a_run_gives_the_same_weights(self, make, spacing, stop):
        whole, first, second = make(), make(), make()
        run = moments(spacing)
        expected = weights_of(whole, run)
        weights = weights_of(first, run[:stop])
        second.load_state_dict(saved(first.state_dict()))
        assert weights + weights_of(second, run[stop:]) == expected
        assert second.state_dict() == whole.state_dict()

    @each_profile
    def test_the_state_of_another_kind_is_refused_and_changes_nothing(self, make):
        profile = make()
        weights_of(profile, moments([1.0, 2.0]))
        before = profile.state_dict()
        with pytest.raises(ValueError, match=r'the state of a profile must hold .*, got'):
            profile.load_state_dict({'something': 0.0})
        assert profile.state_dict() == before

    @each_profile
    def test_a_copy_has_a_memory_of_its_own(self, make):
        profile = make()
        weights_of(profile, moments([1.0]))
        before = profile.state_dict()
        weights_of(copy.deepcopy(profile), moments([1.0, 2.0]))
        assert profile.state_dict() == before

    @pytest.mark.parametrize(
        ('make', 'text', 'unit'),
        [
            (PROFILES['half-life'], 'half_life=7.5ba', 'ba'),
            (lambda: HalfLife(10, 'steps'), 'half_life=10', 'steps'),
            (lambda: HalfLife(10), 'half_life=10', 'updates'),
            (PROFILES['smoothing'], 'decay=0.9', 'steps'),
            (lambda: Smoothing(0.5), 'smoothing=0.5', 'updates'),
            (PROFILES['equal'], 'equal', 'updates'),
            (lambda: Equal('steps'), 'equal', 'steps'),
            (PROFILES['warmed up'], 'half_life=20ba,warmup=0.3', 'ba'),
            (PROFILES['corrected'], 'half_life=7.5ba,bias_correction', 'ba'),
            (PROFILES['copies first'], 'smoothing=0.9', 'updates'),
            (PROFILES['power'], 'power=0.1', 'ba'),
        ],
    )
    def test_it_describes_itself_in_the_words_of_its_arguments(self, make, text, unit):
        profile = make()
        assert (str(profile), profile.unit) == (text, unit)


class TestHalfLife:
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
    def test_whole_numbers_of_half_lives_give_powers_of_one_half(self, elapsed, half_life, weight):
        assert HalfLife(half_life).weight(after(elapsed)) == pytest.approx(float(weight), rel=2**-52, abs=0)

    def test_half_of_a_half_life_keeps_one_over_the_square_root_of_two(self):
        assert HalfLife(2).weight(after(1)) == pytest.approx(1 - math.sqrt(0.5), rel=4e-16, abs=0)

    @pytest.mark.parametrize('exponent', [0, 3, 6, 9, 12, 15, 18, 100, 300])
    def test_a_long_half_life_keeps_its_digits(self, exponent):
        """1 - 2 ** -x is x ln2 - (x ln2) ** 2 / 2 + ...; the naive difference has no digit left at x = 1e-16."""
        half_life = 10.0**exponent
        x = math.log(2) / half_life
        series = x - x**2 / 2 + x**3 / 6 if exponent else 0.5
        error = x**4 / 24 / series if exponent else 0
        assert HalfLife(half_life).weight(after(1)) == pytest.approx(series, rel=4e-16 + error, abs=0)

    @pytest.mark.parametrize('elapsed', [0, 1, 1e-30, 1e300])
    def test_a_half_life_of_zero_averages_nothing(self, elapsed):
        assert HalfLife(0).weight(after(elapsed)) == 1.0

    def test_no_time_passed_gives_no_weight(self):
        assert str(HalfLife(10).weight(after(0))) == '0.0'  # not -0.0

    def test_a_very_long_time_copies(self):
        assert HalfLife(1e-6).weight(after(1e300)) == 1.0

    @given(elapsed=lengths, half_life=lengths)
    def test_the_weight_is_a_share(self, elapsed, half_life):
        assert 0 < HalfLife(half_life).weight(after(elapsed)) <= 1

    @given(first=lengths, second=lengths, half_life=lengths)
    def test_two_stretches_of_time_keep_what_one_of_their_length_keeps(self, first, second, half_life):
        profile = HalfLife(half_life)
        kept = (1 - profile.weight(after(first))) * (1 - profile.weight(after(second)))
        assert kept == pytest.approx(1 - profile.weight(after(first + second)), abs=1e-15)

    @given(elapsed=lengths, half_life=lengths, factor=st.sampled_from([2.0**-20, 0.5, 2.0, 2.0**20]))
    def test_only_the_ratio_to_the_half_life_counts(self, elapsed, half_life, factor):
        assert HalfLife(half_life * factor).weight(after(elapsed * factor)) == HalfLife(half_life).weight(
            after(elapsed)
        )

    @given(elapsed=lengths, longer=st.floats(1, 1e6), half_life=lengths)
    def test_more_time_never_gives_less_weight(self, elapsed, longer, half_life):
        profile = HalfLife(half_life)
        assert profile.weight(after(elapsed * longer)) >= profile.weight(after(elapsed))

    @given(spacing=spacings, half_life=st.floats(0.01, 1000))
    def test_over_any_spacing_a_weight_keeps_two_to_the_minus_its_age_over_the_half_life(self, spacing, half_life):
        start, *shares = shares_of(weights_of(HalfLife(half_life), moments(spacing)))
        end = math.fsum(spacing)
        assert start == pytest.approx(2 ** (-end / half_life), abs=1e-13)
        for moment, share in zip(moments(spacing), shares, strict=True):
            kept = 2 ** (-(end - moment.since_start) / half_life)
            assert share == pytest.approx((1 - 2 ** (-moment.elapsed / half_life)) * kept, abs=1e-13)

    @pytest.mark.parametrize('value', [-1, -1e-300, math.nan, math.inf])
    @pytest.mark.parametrize(('unit', 'remedy'), [('ba', 'smoothing=1'), ('steps', 'decay=1')])
    def test_a_half_life_out_of_range_names_value_rule_and_remedy(self, value, unit, remedy):
        with pytest.raises(ValueError, match=rf'half_life must be finite and at least 0, got {value}\. .*{remedy}\.'):
            HalfLife(value, unit)

    @pytest.mark.parametrize('value', ['10ba', None, True, [10]])
    def test_a_half_life_that_is_no_number_names_its_type_and_the_unit(self, value):
        with pytest.raises(TypeError, match=rf'number of steps, got .* of type {type(value).__name__}\. Pass'):
            HalfLife(value, 'steps')


class TestSmoothing:
    @pytest.mark.parametrize('smoothing', [0, 0.25, 0.3, 0.9, 0.999, 0.9999, 1])
    def test_a_single_step_has_the_exact_weight(self, smoothing):
        assert Smoothing(smoothing).weight_at(5) == 1 - smoothing

    @pytest.mark.parametrize(
        ('smoothing', 'elapsed', 'weight'), [(0.5, 3, 0.875), (0.75, 2, 0.4375), (0.25, 0.5, 0.5), (0.5, 0, 0.0)]
    )
    def test_it_is_kept_once_in_each_unit_of_time(self, smoothing, elapsed, weight):
        assert Smoothing(smoothing).weight(after(elapsed)) == pytest.approx(weight, rel=4e-16)

    @pytest.mark.parametrize('elapsed', [0.5, 1, 2, 1e300])
    def test_zero_copies_and_one_freezes(self, elapsed):
        assert Smoothing(0).weight(after(elapsed)) == 1.0
        assert str(Smoothing(1).weight(after(elapsed))) == '0.0'  # not -0.0

    @given(smoothing=st.floats(0.01, 0.99999), elapsed=st.floats(0.01, 1000))
    def test_it_is_the_half_life_in_which_it_reaches_one_half(self, smoothing, elapsed):
        half_life = -math.log(2) / math.log(smoothing)
        expected = HalfLife(half_life).weight(after(elapsed))
        assert Smoothing(smoothing).weight(after(elapsed)) == pytest.approx(expected, rel=1e-10)

    @given(smoothing=st.floats(0, 1), spacing=st.lists(st.integers(1, 9), min_size=1, max_size=20))
    def test_over_any_spacing_a_weight_keeps_the_smoothing_to_the_power_of_its_age(self, smoothing, spacing):
        start, *shares = shares_of(weights_of(Smoothing(smoothing), moments(spacing)))
        end = sum(spacing)
        assert start == pytest.approx(smoothing**end, abs=1e-12)
        for moment, share in zip(moments(spacing), shares, strict=True):
            expected = (1 - smoothing**moment.elapsed) * smoothing ** (end - moment.since_start)
            assert share == pytest.approx(expected, abs=1e-12)

    @pytest.mark.parametrize('smoothing', [1.3, -0.1, math.nan, math.inf, -math.inf])
    def test_a_share_out_of_range_names_value_rule_and_remedy(self, smoothing):
        with pytest.raises(ValueError, match=rf"smoothing must lie in \[0, 1\], got {smoothing}\. .*half_life='nba'"):
            Smoothing(smoothing)
        with pytest.raises(ValueError, match=rf'decay must lie in \[0, 1\], got {smoothing}\. .*half_life=n\.'):
            Smoothing(smoothing, 'steps', 'decay')


class TestEqual:
    @given(values=st.lists(st.fractions(-1000, 1000, max_denominator=1000), min_size=1, max_size=50))
    def test_updates_of_equal_weight_make_the_mean(self, values):
        average = Fraction(7)  # whatever it starts from, the first update copies
        for count, value in enumerate(values):
            average += Fraction(1, count + 1) * (value - average)
            assert Equal().weight_at(count) == float(Fraction(1, count + 1))
        assert average == sum(values) / len(values)

    @given(spacing=spacings)
    def test_over_any_spacing_every_update_has_the_same_share_and_the_start_none(self, spacing):
        start, *shares = shares_of(weights_of(Equal(), moments(spacing)))
        assert start == 0
        assert shares == pytest.approx([1 / len(spacing)] * len(spacing), rel=1e-12)

    @pytest.mark.parametrize(
        ('count', 'error', 'message'),
        [
            (-1, ValueError, r'num_updates must be at least 0, got -1\. The first'),
            (True, TypeError, r'whole number of at least 0, got True'),
            (1.0, TypeError, r'whole number of at least 0, got 1\.0'),
            ('1', TypeError, r"whole number of at least 0, got '1'"),
        ],
    )
    def test_a_count_that_is_none_is_refused(self, count, error, message):
        with pytest.raises(error, match=message):
            Equal().weight_at(count)
        with pytest.raises(error, match=message):
            Moment(1.0, 1.0, count)


class TestPower:
    def test_by_hand(self):
        """gamma = 1: shares rise in a straight line, so updates at 1, 2 and 4 get 1/16, 3/16 and 12/16."""
        profile = Power((2 / 36) ** 0.5, 'ba')
        assert profile.gamma == pytest.approx(1, rel=1e-12)
        shares = shares_of(weights_of(profile, [Moment(1, 1, 0), Moment(1, 2, 1), Moment(2, 4, 2)]))
        assert shares == pytest.approx([0, 1 / 16, 3 / 16, 12 / 16], abs=1e-12)

    @given(spacing=spacings, sigma_rel=st.floats(0.005, 12**-0.5))
    def test_the_share_made_up_to_any_time_is_the_power_of_that_time(self, spacing, sigma_rel):
        profile, run = Power(sigma_rel, 'ba'), moments(spacing)
        cumulated = list(itertools.accumulate(shares_of(weights_of(profile, run))))
        end = run[-1].since_start
        expected = [0.0, *((moment.since_start / end) ** (profile.gamma + 1) for moment in run)]
        assert cumulated == pytest.approx(expected, abs=1e-9)

    @pytest.mark.parametrize('gamma', [0, 0.5, 1, 6.94, 16.97, 200])
    def test_the_exponent_is_the_one_of_this_width(self, gamma):
        sigma_rel = math.sqrt((gamma + 1) / ((gamma + 2) ** 2 * (gamma + 3)))
        assert Power(sigma_rel).gamma == pytest.approx(gamma, rel=1e-9, abs=1e-9)

    @pytest.mark.parametrize(('sigma_rel', 'percent'), [(0.05, 3.8), (0.10, 8.4), (0.25, 33)])
    def test_half_of_the_average_lies_in_the_last_part_of_the_run(self, sigma_rel, percent):
        half = 1 - 0.5 ** (1 / (Power(sigma_rel).gamma + 1))
        assert 100 * half == pytest.approx(percent, rel=0.02)

    def test_the_widest_is_the_equal_average(self):
        weights = [Power(12**-0.5).weight_at(n) for n in range(100)]
        assert weights == pytest.approx([Equal().weight_at(n) for n in range(100)], rel=1e-9)

    def test_the_first_update_copies_wherever_the_time_starts(self):
        assert Power(0.1).weight_at(0) == 1
        assert Power(0.1, 'ba').weight(Moment(0, 0, 0)) == 1
        assert Power(0.1, 'ba').weight(Moment(5, 5, 0)) == 1

    def test_no_time_passed_gives_no_weight(self):
        assert Power(0.1, 'ba').weight(Moment(0, 7, 3)) == 0

    @pytest.mark.parametrize('sigma_rel', [0, 1e-300, -0.1, 0.29, 1, math.nan, math.inf])
    def test_a_width_out_of_range_names_value_rule_and_remedy(self, sigma_rel):
        with pytest.raises(
            ValueError, match=rf'power must lie in \[1e-9, 0\.2887\].*got {sigma_rel}\. Pass .*power=0\.1'
        ):
            Power(sigma_rel)

    @pytest.mark.parametrize('sigma_rel', ['0.1', None, True])
    def test_a_width_that_is_no_number_is_refused(self, sigma_rel):
        with pytest.raises(TypeError, match=r'power must be a number, got .*power=0\.1'):
            Power(sigma_rel)


class TestWarmedUp:
    def test_by_hand(self):
        profile = WarmedUp(HalfLife(4, 'ba'), 0.5)
        # The half-life is half of the time since the start, and from the eighth batch on 4.
        assert [profile.weight_at(n) for n in (0, 1, 3)] == pytest.approx([1 - 2**-2, 1 - 2**-1, 1 - 2**-0.5])
        assert profile.weight_at(7) == profile.weight_at(100) == HalfLife(4).weight_at(0)

    def test_an_update_at_the_very_start_copies(self):
        assert WarmedUp(HalfLife(100), 0.1).weight(Moment(0, 0, 0)) == 1.0

    @given(elapsed=lengths, start=lengths, half_life=st.floats(0, 1e6), ratio=st.floats(1e-3, 1e3))
    def test_it_is_the_half_life_once_that_is_the_shorter(self, elapsed, start, half_life, ratio):
        moment = Moment(elapsed, elapsed + start, 3)
        weight, plain = WarmedUp(HalfLife(half_life), ratio).weight(moment), HalfLife(half_life).weight(moment)
        if ratio * moment.since_start > half_life:
            assert weight == plain
        else:
            assert weight >= plain

    @given(spacing=spacings, ratio=st.floats(0.01, 10))
    def test_a_longer_half_life_than_the_run_could_reach_changes_nothing(self, spacing, ratio):
        longest = ratio * math.fsum(spacing) * 1.01
        first = weights_of(WarmedUp(HalfLife(longest), ratio), moments(spacing))
        assert weights_of(WarmedUp(HalfLife(10 * longest), ratio), moments(spacing)) == first

    @given(spacing=st.lists(st.floats(0.01, 100), min_size=2, max_size=30))
    def test_the_start_has_a_smaller_share_than_without_it(self, spacing):
        half_life = HalfLife(math.fsum(spacing))
        warm = shares_of(weights_of(WarmedUp(half_life, 0.1), moments(spacing)))[0]
        assert warm < shares_of(weights_of(half_life, moments(spacing)))[0]

    @pytest.mark.parametrize('ratio', [0, -1, math.inf, math.nan, '0.1', None, True])
    def test_a_ratio_out_of_range_names_value_rule_and_remedy(self, ratio):
        kind = ValueError if type(ratio) in (int, float) else TypeError
        with pytest.raises(kind, match=r'warmup must be a finite number above 0, got .*pass for example warmup='):
            WarmedUp(HalfLife(10), ratio)


class TestBiasCorrected:
    def test_by_hand(self):
        weights = weights_of(BiasCorrected(Smoothing(0.75)), [Moment.of_update(n) for n in range(3)])
        assert weights == pytest.approx([1, 0.25 / (1 - 0.75**2), 0.25 / (1 - 0.75**3)], rel=1e-15)

    @pytest.mark.parametrize('elapsed', [0, 1e-6, 1, 1e12])
    def test_the_first_update_copies(self, elapsed):
        for profile in (HalfLife(10), Smoothing(0.9999), WarmedUp(HalfLife(10), 0.1), HalfLife(0), Smoothing(0)):
            assert BiasCorrected(profile).weight(Moment(elapsed, elapsed, 0)) == 1.0

    @given(spacing=spacings, half_life=st.floats(0.1, 1000))
    def test_the_shares_are_those_of_the_exponential_average_made_to_sum_to_one(self, spacing, half_life):
        profile, run = HalfLife(half_life), moments(spacing)
        start, *shares = shares_of(weights_of(BiasCorrected(profile), run))
        plain = shares_of(weights_of(profile, run))[1:]
        assert start == 0
        assert shares == pytest.approx([share / math.fsum(plain) for share in plain], abs=1e-9)
        assert math.fsum(shares) == pytest.approx(1)

    def test_in_the_end_it_is_the_average_without_the_correction(self):
        profile = BiasCorrected(HalfLife(2))
        assert weights_of(profile, moments([1.0] * 200))[-1] == HalfLife(2).weight_at(199)

    @pytest.mark.parametrize('profile', [HalfLife(0), Smoothing(0)])
    def test_what_keeps_nothing_copies_always(self, profile):
        assert weights_of(BiasCorrected(profile), moments([1.0] * 4)) == [1.0] * 4

    def test_an_average_that_never_moves_has_nothing_to_correct(self):
        for profile in (Smoothing(1), Smoothing(1.0, 'steps', 'decay')):
            with pytest.raises(ValueError, match=rf'nothing to correct .* got {profile}\. Pass a value below 1'):
                BiasCorrected(profile)

    @pytest.mark.parametrize(
        ('state', 'message'),
        [
            ({}, r'must hold log_kept, got \{\}'),
            ({'log_kept': -1.0, 'more': 0}, 'must hold log_kept'),
            ({'log_kept': '0'}, "'log_kept' of the saved profile is a str"),
            ({'log_kept': True}, "'log_kept' of the saved profile is a bool"),
            ({'log_kept': 0.5}, r"'log_kept' .* is 0\.5, .* must be at most 0"),
            ({'log_kept': math.nan}, 'must be at most 0'),
            (None, 'must hold log_kept, got None'),
        ],
    )
    def test_a_state_out_of_range_is_refused_by_name_and_value_and_changes_nothing(self, state, message):
        profile = BiasCorrected(Smoothing(0.5), log_kept=-2.0)
        with pytest.raises(ValueError, match=message):
            profile.load_state_dict(state)
        assert profile.log_kept == -2.0


class TestCopiesFirst:
    @given(spacing=spacings)
    def test_the_first_weight_is_one_and_the_rest_are_the_profiles(self, spacing):
        run = moments(spacing)
        first, *later = weights_of(CopiesFirst(HalfLife(10)), run)
        assert first == 1.0
        assert later == weights_of(HalfLife(10), run)[1:]

    @given(spacing=spacings)
    def test_the_profile_records_the_first_update_too(self, spacing):
        run = moments(spacing)
        assert weights_of(CopiesFirst(BiasCorrected(HalfLife(10))), run) == weights_of(BiasCorrected(HalfLife(10)), run)


class TestMoment:
    @pytest.mark.parametrize('value', [-1, -1e-300, math.nan, math.inf])
    @pytest.mark.parametrize('name', ['elapsed', 'since_start'])
    def test_times_out_of_range_are_refused_by_name_and_value(self, name, value):
        arguments = {'elapsed': 1.0, 'since_start': 1.0, 'num_updates': 0, name: value}
        with pytest.raises(ValueError, match=rf'{name} must be finite and at least 0, got {value}\. '):
            Moment(**arguments)

    def test_updates_one_unit_apart(self):
        assert Moment.of_update(3) == Moment(elapsed=1, since_start=4, num_updates=3)

    @given(count=st.integers(0, 10**6))
    def test_weight_at_is_the_weight_at_that_moment(self, count):
        for make in PROFILES.values():
            assert make().weight_at(count) == make().weight(Moment(1, count + 1, count))


@pytest.mark.parametrize('smoothing', [0, 0.0, 0.25, 0.999, 1, 1.0])
def test_weight_and_smoothing_make_one(smoothing):
    weight = weight_from_smoothing(smoothing)
    assert isinstance(weight, float)
    assert weight == 1 - smoothing


@pytest.mark.parametrize('smoothing', [1.3, -0.1, math.nan, math.inf, -math.inf])
def test_a_smoothing_out_of_range_names_value_rule_and_remedy(smoothing):
    with pytest.raises(ValueError, match=rf'smoothing must lie in \[0, 1\], got {smoothing}\. .*half-life of n'):
        weight_from_smoothing(smoothing)


@pytest.mark.parametrize('smoothing', ['0.9', None, True, [0.9]])
def test_a_smoothing_that_is_no_number_names_its_type_and_the_remedy(smoothing):
    with pytest.raises(TypeError, match=rf'of type {type(smoothing).__name__}\. .*half-life of n'):
        weight_from_smoothing(smoothing)
    with pytest.raises(TypeError, match=rf'of type {type(smoothing).__name__}\. .*half-life of n'):
        Smoothing(smoothing)


def test_a_share_ends_its_message_with_the_remedy_of_the_caller():
    with pytest.raises(ValueError, match=r'weight must lie in \[0, 1\], got 2\. Divide it\.'):
        check_share('weight', 2, 'Divide it.')
