"""Fits of kept averages to a wanted one: against dense matrices, recurrences, closed forms and walks."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_shares import PROFILES, TIMES, weights_of_run

from composer_ema.averages import HalfLife, Power
from composer_ema.posthoc import shares
from composer_ema.posthoc.fit import Kept, checkpoints_alone, copies, fit, inner_products


def cumulative_of(kept: Kept, count: int) -> np.ndarray:
    return np.append(shares.cumulative(kept.weights), np.ones(count - kept.moment))


def dense(kept: list[Kept], gaps=1.0) -> np.ndarray:
    count = max(each.moment for each in kept)
    steps = np.array([1.0 - cumulative_of(each, count) for each in kept])
    return (gaps * steps) @ steps.T


def by_recurrence(one: Kept, other: Kept) -> float:
    """``<1 - F, 1 - F>`` of two averages from their weights, one update at a time."""
    one, other = sorted([one, other], key=lambda each: each.moment)
    both = first = second = 0.0
    for weight, its in zip(one.weights, other.weights, strict=False):
        both = (1 - weight) * (1 - its) * both + 1
        first, second = (1 - weight) * first + 1, (1 - its) * second + 1
    rest = math.prod(1.0 - other.weights[one.moment :])
    return one.moment - first - rest * second + rest * both


def of_profiles(times, start=0.0, every=7) -> list[Kept]:
    """Every profile, kept at every seventh moment, with the weights themselves."""
    runs = [weights_of_run(build(), times, start) for build, _ in PROFILES.values()]
    ends = range(every, len(times) + 1, every)
    return [Kept(run[:end]) for run in runs for end in ends] + [copies(end) for end in ends]


def walk(count: int, size: int = 50, seed: int = 0) -> np.ndarray:
    return np.cumsum(np.random.default_rng(seed).standard_normal((count, size)), axis=0)


def power(sigma: float, count: int) -> np.ndarray:
    return shares.weights_of(shares.power(np.arange(1.0, count + 1), Power(sigma).gamma))


@pytest.mark.parametrize('times', TIMES.values(), ids=TIMES)
def test_inner_products_are_those_of_dense_matrices_and_of_the_recurrences(times):
    kept = of_profiles(times, start=times[0] - 1)
    found = inner_products(kept)
    np.testing.assert_allclose(found, dense(kept), rtol=0, atol=1e-10)
    by_recurrences = [[by_recurrence(one, other) for other in kept[::5]] for one in kept[::5]]
    np.testing.assert_allclose(found[::5, ::5], by_recurrences, rtol=0, atol=1e-10)


def test_inner_products_after_a_resume_with_another_profile_or_with_steps_of_another_length():
    first = weights_of_run(Power(0.1), np.arange(1.0, 31.0), 0.0)
    resumed = np.append(first, weights_of_run(HalfLife(5.0), np.arange(1.0, 31.0), 0.0))
    kept = [Kept(first[:20]), Kept(first), Kept(resumed[:45]), Kept(resumed), copies(33)]
    np.testing.assert_allclose(inner_products(kept), dense(kept), rtol=0, atol=1e-10)
    times = np.append(np.arange(30.0), 30.0 + 10 * np.arange(30))
    gaps = np.diff(times)
    gaps = np.append(gaps / gaps.mean(), 1.0)
    np.testing.assert_allclose(inner_products(kept, times=times), dense(kept, gaps), rtol=0, atol=1e-10)


@settings(max_examples=30)
@given(st.data())
def test_inner_products_of_any_averages_are_dense_ones(data):
    count = data.draw(st.integers(2, 25))
    runs = data.draw(
        st.lists(st.lists(st.floats(0, 1), min_size=count - 1, max_size=count - 1), min_size=1, max_size=3)
    )
    ends = data.draw(st.lists(st.integers(1, count), min_size=1, max_size=4, unique=True))
    kept = [Kept(np.array([1.0, *run])[:end]) for run in runs for end in ends]
    np.testing.assert_allclose(inner_products(kept), dense(kept), rtol=0, atol=1e-10)


@pytest.mark.parametrize('target', [power(0.25, 60), shares.weights_of(shares.exponential(np.arange(60.0), 6.0))])
def test_the_fit_is_the_constrained_minimum(target):
    kept = of_profiles(TIMES['every batch'], every=20)
    found = fit(kept, target)
    wanted = shares.cumulative(target)
    columns = np.array([cumulative_of(each, 60) for each in kept]).T
    assert found.coefficients.sum() == pytest.approx(1, abs=1e-12)
    residual = columns @ found.coefficients - wanted
    assert found.residual == pytest.approx(np.linalg.norm(residual), abs=1e-10)
    move = np.linalg.norm(wanted[:-1])
    assert found.predicted_error == pytest.approx(1.2 * np.linalg.norm(residual) / move, abs=1e-10)
    # At the minimum no direction that keeps the sum goes down.
    slope = columns.T @ residual
    np.testing.assert_allclose(slope, slope[0], atol=1e-10)


def test_what_was_kept_itself_is_found_exactly():
    kept = of_profiles(TIMES['uneven'])
    found = fit(kept, kept[7].weights)
    assert found.residual == pytest.approx(0, abs=1e-12)
    weights = walk(60)
    combined = sum(
        x * (shares.shares(each.weights) @ weights[: each.moment])
        for x, each in zip(found.coefficients, kept, strict=True)
    )
    np.testing.assert_allclose(combined, shares.shares(kept[7].weights) @ weights[: kept[7].moment], atol=1e-9)


@settings(max_examples=30)
@given(st.lists(st.integers(1, 60), min_size=1, max_size=6, unique=True), st.floats(0.05, 0.28))
def test_checkpoints_alone_have_a_closed_form(moments, sigma):
    moments = sorted(moments)
    target = power(sigma, 60)
    found = fit([copies(each) for each in moments], target)
    np.testing.assert_allclose(found.coefficients, checkpoints_alone(moments, target), atol=1e-9)


def test_checkpoints_by_hand():
    # F = .25, .5, 1: the second checkpoint stands for the step after it and for the end.
    assert checkpoints_alone([1, 2], [1, 0.5, 0.5]).tolist() == [0.25, 0.75]
    assert fit([copies(1), copies(2)], [1, 0.5, 0.5]).coefficients.tolist() == pytest.approx([0.25, 0.75])


def test_what_is_later_than_the_target_is_left_out():
    kept = [copies(10), copies(20), copies(30)]
    assert fit(kept, power(0.1, 20)).coefficients[2] == 0
    with pytest.raises(ValueError, match='the first that was kept is of moment 10'):
        fit(kept, power(0.1, 9))


def test_cumulative_shares_of_a_walk_are_recovered_as_measured():
    """Sixteen snapshots of two power averages and the first weights: below half a percent of the move."""
    count, kept_at = 1600, range(100, 1601, 100)
    weights = walk(count)
    runs = [power(sigma, count) for sigma in (0.05, 0.1)]
    kept = [Kept(run[:end]) for run in runs for end in kept_at] + [copies(1)]
    averages = [shares.shares(each.weights) @ weights[: each.moment] for each in kept]
    for target in (power(0.05, count), power(0.15, count), power(0.25, count)):
        found = fit(kept, target)
        wanted = shares.shares(target) @ weights
        error = np.linalg.norm(found.coefficients @ averages - wanted) / np.linalg.norm(wanted - weights[-1])
        assert error < 0.005
        assert error == pytest.approx(found.predicted_error, rel=0.5, abs=1e-9)


def test_without_the_first_weights_a_long_exponential_is_out_of_reach():
    count = 800
    target = shares.weights_of(shares.exponential(np.arange(float(count)), 0.3 * count))
    runs = [power(sigma, count) for sigma in (0.05, 0.1)]
    kept = [Kept(run[:end]) for run in runs for end in range(50, count + 1, 50)]
    assert fit(kept, target).predicted_error > 10 * fit([*kept, copies(1)], target).predicted_error


def test_a_ridge_keeps_the_coefficients_small():
    kept = of_profiles(TIMES['every batch'], every=3)
    target = power(0.2, 60)
    sizes = [np.linalg.norm(fit(kept, target, ridge=ridge).coefficients) for ridge in (0.0, 1e-6, 1e-3, 1e9)]
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[-1] == pytest.approx(len(kept) ** -0.5)  # all alike
    assert fit(kept, target, ridge=1e-3).coefficients.sum() == pytest.approx(1)


def test_twins_share_the_coefficient():
    found = fit([copies(5), copies(5), copies(1)], Kept(np.ones(5)).weights)
    np.testing.assert_allclose(found.coefficients, [0.5, 0.5, 0.0], atol=1e-12)


def test_long_steps_count_in_proportion_to_their_time():
    # One coefficient to choose: the mean of F over the steps, weighted by how long they take.
    target = shares.weights_of([0.0, 0.6, 1.0])
    assert fit([copies(1), copies(3)], target).coefficients[0] == pytest.approx(0.3)
    assert fit([copies(1), copies(3)], target, times=[0, 1, 3]).coefficients[0] == pytest.approx(0.4)
    with pytest.raises(ValueError, match='times must be 3'):
        fit([copies(1), copies(3)], target, times=[0, 1])


def test_the_work_grows_with_the_updates_not_with_their_product_with_the_snapshots():
    count = 200_000
    run = power(0.1, count)
    kept = [Kept(run[:end]) for end in range(count // 64, count + 1, count // 64)]
    found = fit(kept, power(0.05, count))  # a dense matrix would take 100 MB and seconds
    assert found.predicted_error < 0.02


def test_digits_survive_where_sums_of_squares_would_lose_them():
    count = 6000
    runs = [power(sigma, count) for sigma in (0.05, 0.1, 0.2)]
    kept = [Kept(run[:end]) for run in runs for end in range(60, count + 1, 60)]
    assert fit(kept, kept[150].weights).residual < 1e-11
    assert fit(kept, power(0.15, count)).predicted_error < 1e-4


def test_a_ridge_below_0_is_refused():
    with pytest.raises(ValueError, match='ridge must be finite'):
        fit([copies(1)], [1.0], ridge=-1.0)
