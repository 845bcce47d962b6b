"""One builder of profiles for every door, their descriptions read back, and the share of an average's start."""

import copy
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from composer_ema import profiles
from composer_ema.averages import (
    UPDATES,
    BiasCorrected,
    CopiesFirst,
    Equal,
    HalfLife,
    Moment,
    Power,
    Profile,
    Smoothing,
    WarmedUp,
)
from composer_ema.profiles import StartShare, choose, of_description, record_update

UNITS = ('ba', 'ep', 'sp', 'tok', 'iter', 'dur', 'steps')
half_lives = st.one_of(st.integers(0, 10**9), st.floats(0, 1e12))
smoothings = st.floats(0, 1).filter(lambda value: value < 1)
ratios = st.floats(1e-3, 1e3)


@st.composite
def arguments(draw: st.DrawFn) -> dict[str, Any]:
    """Legal arguments of :func:`choose`."""
    unit = draw(st.sampled_from(UNITS))
    maker = draw(st.sampled_from(('half_life', 'smoothing', 'power', 'gamma', 'equal')))
    chosen: dict[str, Any] = {'unit': unit}
    if maker == 'equal':
        return {**chosen, 'average': 'equal'}
    values = {'half_life': half_lives, 'smoothing': smoothings, 'power': st.floats(1e-6, 0.288)}
    chosen[maker] = draw(values.get(maker, st.floats(0, 1e8)))
    if maker == 'smoothing' and unit == 'steps':
        chosen['smoothing_name'] = 'decay'
    if maker in ('half_life', 'smoothing'):
        change = draw(st.sampled_from((None, 'warmup', 'bias_correction')))
        if change is not None:
            chosen[change] = True if change == 'bias_correction' else draw(ratios)
    return chosen


class TestChoose:
    @pytest.mark.parametrize(
        ('given', 'profile'),
        [
            ({'half_life': 100}, HalfLife(100, 'ba')),
            ({'half_life': 0.1, 'unit': 'dur'}, HalfLife(0.1, 'dur')),
            ({'smoothing': 0.9}, Smoothing(0.9)),
            ({'smoothing': 0.9, 'unit': 'steps', 'smoothing_name': 'decay'}, Smoothing(0.9, 'steps', 'decay')),
            ({'power': 0.1}, Power(0.1, 'ba')),
            ({'gamma': 6}, Power(gamma=6, unit='ba')),
            ({'average': 'equal'}, Equal()),
            ({'average': 'equal', 'unit': 'steps'}, Equal('steps')),
            ({'half_life': 100, 'warmup': 0.1}, WarmedUp(HalfLife(100, 'ba'), 0.1)),
            ({'smoothing': 0.9, 'warmup': 0.1}, WarmedUp(Smoothing(0.9), 0.1)),
            ({'half_life': 100, 'bias_correction': True}, BiasCorrected(HalfLife(100, 'ba'))),
        ],
    )
    def test_each_argument_makes_its_profile(self, given, profile):
        assert choose(**{'unit': 'ba', **given}) == profile

    @pytest.mark.parametrize(
        ('given', 'message'),
        [
            ({}, r"one of half_life, smoothing, power and gamma must be given, .*\. Pass half_life='1000ba'\."),
            ({'unit': 'steps', 'smoothing_name': 'decay'}, r'one of half_life, decay, power .* Pass half_life=1000\.'),
            (
                {'half_life': 5, 'power': 0.1},
                r"either half_life or power, got half_life='5ba' and power=0\.1\. .* half_life: null",
            ),
            ({'half_life': 5, 'smoothing': 0.5, 'unit': 'steps'}, r'got half_life=5 and smoothing=0\.5\.$'),
            ({'power': 0.1, 'gamma': 2.0}, r'pass either power or gamma, got power=0\.1 and gamma=2\.0'),
            ({'average': 'equal', 'half_life': 5}, r'half_life=5 has no effect on an equal average\. Leave it out'),
            ({'average': 'equal', 'warmup': 0.1}, r'warmup=0\.1 has no effect on an equal average'),
            ({'average': 'equal', 'bias_correction': True}, 'bias_correction=True has no effect on an equal average'),
            ({'average': 'mean', 'half_life': 5}, "average must be 'exponential' or 'equal', got 'mean'"),
            ({'power': 0.1, 'warmup': 0.1}, r'warmup has no effect on a power average, .* Leave it out'),
            ({'gamma': 1, 'bias_correction': True}, r'bias_correction has no effect on a power average'),
            ({'half_life': 5, 'warmup': 0.1, 'bias_correction': True}, 'pass either warmup or bias_correction'),
            ({'half_life': 5, 'warmup': 0.0}, r'warmup must be a finite number above 0, got 0\.0'),
            ({'smoothing': 1.0, 'warmup': 0.1}, r'warmup has nothing to warm up in an average that never moves'),
            ({'gamma': -0.5}, r'gamma must lie in \[0, 1e\+09\], where 0 is an equal average, got -0\.5\. Pass for'),
            ({'gamma': math.nan}, 'gamma must lie in'),
            ({'power': 0.3}, 'power must lie in'),
        ],
    )
    def test_arguments_that_clash_or_are_out_of_range_are_refused_in_words(self, given, message):
        with pytest.raises(ValueError, match=message):
            choose(**{'unit': 'ba', **given})

    @pytest.mark.parametrize(
        ('given', 'message'),
        [
            ({'half_life': 5, 'bias_correction': 1}, 'bias_correction must be True or False, got 1'),
            ({'gamma': '2'}, "gamma must be a number, got '2' of type str. Pass for example"),
            ({'power': True}, 'power must be a number, got True of type bool'),
        ],
    )
    def test_arguments_of_the_wrong_type_are_refused(self, given, message):
        with pytest.raises(TypeError, match=message):
            choose(unit='ba', **given)


class TestPower:
    def test_gamma_and_the_width_are_two_names_of_one_profile(self):
        by_gamma, by_width = Power(gamma=6.94), Power(Power(gamma=6.94).sigma_rel)
        assert by_width.gamma == pytest.approx(6.94, rel=1e-12)
        for num_updates in range(20):
            assert by_gamma.weight_at(num_updates) == pytest.approx(by_width.weight_at(num_updates), rel=1e-12)

    def test_by_hand(self):
        # Shares in proportion to 1, 4 - 1, 9 - 4: (t / 3) ** 2 of the average is made up to t.
        assert [Power(gamma=1).weight_at(n) for n in range(3)] == pytest.approx([1, 3 / 4, 5 / 9])

    def test_it_describes_itself_by_what_was_given(self):
        assert (str(Power(gamma=2)), str(Power(0.1))) == ('gamma=2', 'power=0.1')

    def test_both_of_them_are_refused(self):
        with pytest.raises(ValueError, match='pass either power or gamma'):
            Power(0.1, gamma=2)


class TestWarmedUp:
    def test_a_smoothing_is_limited_as_its_half_life_is(self):
        by_smoothing, by_half_life = WarmedUp(Smoothing(0.5 ** (1 / 50)), 0.2), WarmedUp(HalfLife(50), 0.2)
        for n in (0, 1, 10, 249, 250, 1000):
            assert by_smoothing.weight_at(n) == pytest.approx(by_half_life.weight_at(n), rel=1e-12)

    @given(st.floats(0, 0.999))
    def test_once_warm_the_weight_is_the_profiles_to_the_bit(self, smoothing):
        assert WarmedUp(Smoothing(smoothing), 1.0).weight_at(10**9) == Smoothing(smoothing).weight_at(10**9)


class TestDescriptions:
    @given(arguments())
    def test_every_profile_of_the_doors_is_read_back_from_its_description(self, given):
        profile = choose(**given)
        assert of_description(str(profile), unit=given['unit']) == profile

    def test_a_warmed_up_and_corrected_one_is_read_back(self):
        profile = BiasCorrected(WarmedUp(HalfLife(100, 'ba'), 0.1))
        assert str(profile) == 'half_life=100ba,warmup=0.1,bias_correction'
        assert of_description(str(profile)) == profile

    @pytest.mark.parametrize(
        'text',
        [
            '', 'function', 'half_life=', 'half_life=ba', 'half_life=x5ba', 'power=', 'power=a', 'equal,warmup=0.1',
            'power=0.1,bias_correction', 'half_life=5ba,warmup', 'half_life=5ba,warmup=a', 'half_life=5ba,more',
            'half_life=5ba,bias_correction,warmup=0.1', 'gamma', 'smoothing=0.9.9',
        ],
    )  # fmt: skip
    def test_anything_else_is_refused(self, text):
        with pytest.raises(ValueError, match='describes no profile'):
            of_description(text)

    def test_a_unit_that_is_not_described_is_the_callers(self):
        assert of_description('power=0.1', unit='ba').unit == 'ba'
        assert of_description('half_life=5', unit='steps').unit == 'steps'
        assert of_description('half_life=5ba', unit='steps').unit == 'ba'
        assert of_description('smoothing=0.9', unit='ba').unit == UPDATES


def run(profile: Profile, updates: int, *, copies_first: bool = True) -> StartShare:
    start, profile = StartShare(), copy.deepcopy(profile)
    for n in range(updates):
        moment = Moment.of_update(n)
        record_update(profile, start, moment, profile.weight(moment), has_copied=n == 0 and copies_first)
    return start


class TestStartShare:
    def test_by_hand(self):
        assert run(Smoothing(0.5), 4).value == 0.5**3
        assert run(Smoothing(0.5), 4, copies_first=False).value == 0.5**4
        assert run(CopiesFirst(Smoothing(0.5)), 4).value == 0.5**3

    @given(st.floats(0.5, 1e4), st.integers(1, 60))
    def test_a_half_life_keeps_what_its_closed_form_says(self, half_life, updates):
        assert run(HalfLife(half_life), updates).value == pytest.approx(2 ** (-(updates - 1) / half_life), rel=1e-9)

    @given(st.floats(0.05, 1), st.integers(1, 60))
    def test_a_warm_up_forgets_as_a_power_of_time(self, ratio, updates):
        kept = math.fsum(1 / n for n in range(2, updates + 1)) / ratio
        assert run(WarmedUp(HalfLife(1e12), ratio), updates).value == pytest.approx(2**-kept, rel=1e-6)

    @pytest.mark.parametrize('profile', [Equal(), Power(0.1), BiasCorrected(HalfLife(1000)), HalfLife(0), Smoothing(0)])
    def test_what_forgets_its_start_has_none(self, profile):
        for updates in (1, 2):
            assert run(profile, updates).value == run(profile, updates, copies_first=False).value == 0.0

    def test_one_update_is_all_start_and_a_frozen_average_stays_that(self):
        assert run(HalfLife(5), 1).value == 1.0
        assert run(Smoothing(1), 10).value == 1.0

    def test_a_start_that_another_profile_left_fades_with_the_weights_of_this_one(self):
        start = StartShare(0.5)
        start.record(Power(gamma=0).weight(Moment(1, 4, 3)))
        assert start.value == pytest.approx(0.5 * 3 / 4)

    @pytest.mark.parametrize('value', [-0.1, 1.1, math.nan, '0', True])
    def test_a_saved_share_out_of_range_is_refused(self, value):
        with pytest.raises(ValueError, match=r'start_share must be a share in \[0, 1\] or None, got'):
            profiles.check_start_share(value, 'start_share')

    def test_what_is_not_known_stays_unknown(self):
        start = StartShare(None)
        start.record(0.5)
        assert start.value is None


class TestWords:
    @pytest.mark.parametrize(('share', 'percent'), [(0.312, '31'), (0.0101, '1'), (0.0149, '1.5'), (0.999, '100')])
    def test_the_share_and_the_remedy_are_named(self, share, percent):
        assert profiles.start_remedy(share) == (
            f'the average still holds {percent} % of the initial weights. Pass warmup=0.1 or a shorter half_life.'
        )

    @pytest.mark.parametrize('share', [0.0, 0.01])
    def test_a_hundredth_is_no_harm(self, share):
        assert not profiles.start_remedy(share)

    def test_the_average_and_the_argument_have_the_names_of_the_door(self):
        said = profiles.start_remedy(0.5, Smoothing(0.9, 'steps', 'decay'), average="the average 'long'")
        assert said == "the average 'long' still holds 50 % of the initial weights. Pass warmup=0.1 or a smaller decay."

    @pytest.mark.parametrize(
        ('profile', 'share', 'remedy'),
        [
            (WarmedUp(HalfLife(9, 'ba'), 5), 0.5, 'Pass warmup=0.1.'),
            (WarmedUp(HalfLife(9, 'ba'), 0.1), 0.5, 'Update it more often, or start it earlier.'),
            (
                HalfLife(9, 'ba'),
                1.0,
                'It has a single update, which copies. Update it more often, or start it earlier.',
            ),
            (CopiesFirst(Smoothing(1.0)), 1.0, 'Pass a smaller smoothing.'),
        ],
        ids=str,
    )
    def test_the_remedy_is_one_that_was_not_taken_yet(self, profile, share, remedy):
        assert profiles.start_remedy(share, profile).endswith(f'initial weights. {remedy}')

    def test_before_the_end_it_is_told_as_what_will_be(self):
        said = profiles.start_remedy(0.5, ahead=True)
        assert said.startswith('the average will still hold 50 % of the initial weights at the end. Pass')
