"""The list of a run's updates: short, and exact to the last bit."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from composer_ema.averages import Moment, Power
from composer_ema.posthoc.updates import Updates
from composer_ema.profiles import of_description

LABELS = {'power=0.05': 'power=0.05', 'power=0.1': 'power=0.1'}


def run(updates: Updates, batches, *, elapsed: float = 1.0, started: float = 0.0) -> dict[str, list[float]]:
    """Updates after these batches, as a run would make them; returns the weights used."""
    used: dict[str, list[float]] = {label: [] for label in updates.profiles}
    for batch in batches:
        made = {}
        for label, text in updates.profiles.items():
            moment = Moment(elapsed, max(batch - started, elapsed), len(updates))
            weight = of_description(text).weight(moment) if len(updates) else 1.0
            made[label] = (weight, moment)
            used[label].append(weight)
        updates.append({'ba': batch, 'sp': 4 * batch, 'ep': batch / 7}, made)
    return used


def test_a_thousand_even_updates_are_a_few_numbers():
    updates = Updates(LABELS)
    run(updates, range(1, 1001))
    assert updates.as_plain()['clock']['sp'] == [[1000, 4, 4]]
    assert len(json.dumps(updates.as_plain())) < 800


def test_weights_are_those_that_were_used_to_the_bit():
    updates = Updates(LABELS)
    used = run(updates, range(10, 2010, 10), elapsed=10)
    for label, weights in used.items():
        assert updates.weights(label).tolist() == weights


def test_after_a_resume_with_other_settings_weights_are_those_of_both_parts():
    updates = Updates(LABELS)
    first = run(updates, range(1, 50))
    resumed = Updates.of_plain(json.loads(json.dumps(updates.as_plain())), 'a file')
    resumed.set_profiles({'power=0.05': 'power=0.2'})
    second = run(resumed, range(53, 90, 3), elapsed=3, started=-2)
    assert resumed.weights('power=0.05').tolist() == first['power=0.05'] + second['power=0.05']


def test_an_average_that_joins_has_copied_at_every_update_before():
    updates = Updates({'power=0.1': 'power=0.1'})
    run(updates, range(1, 4))
    updates.set_profiles(LABELS)
    updates.append({'ba': 4}, {label: (1.0 if label == 'power=0.05' else 0.25, None) for label in LABELS})
    updates.append({'ba': 5}, dict.fromkeys(LABELS, (0.5, None)))
    assert updates.weights('power=0.05').tolist() == [1, 1, 1, 1, 0.5]
    assert list(updates.weights('power=0.1'))[3:] == [0.25, 0.5]


def test_a_first_update_that_copies_is_not_taken_for_the_profiles():
    updates = Updates({'a': 'power=0.1'})
    moment = Moment(elapsed=1, since_start=100, num_updates=0)
    updates.append({'ba': 100}, {'a': (1.0, moment)})
    assert Power(0.1).weight(moment) < 1
    assert updates.weights('a').tolist() == [1.0]


@given(
    gaps=st.lists(st.integers(1, 3), min_size=1, max_size=40),
    skipped=st.sets(st.integers(0, 39)),
    weights=st.lists(st.floats(0, 1), min_size=40, max_size=40),
)
@settings(max_examples=30, deadline=None)
def test_whatever_happens_clock_and_weights_come_back(gaps, skipped, weights):
    updates, batch, used, times = Updates({'a': 'power=0.1'}), 0, [], []
    for number, gap in enumerate(gaps):
        batch += gap
        moment = None if number in skipped else Moment(gap, batch, number)
        weight = weights[number] if moment is None else Power(0.1).weight(moment)
        updates.append({'ba': batch, 'tok': batch * number}, {'a': (weight, moment)})
        used.append(weight)
        times.append(batch)
    back = Updates.of_plain(json.loads(json.dumps(updates.as_plain())), 'a file')
    assert back.weights('a').tolist() == used
    assert back.clock('ba').tolist() == times
    assert back.clock('tok').tolist() == [time * number for number, time in enumerate(times)]
    assert back.as_plain() == updates.as_plain()


def test_fractions_of_epochs_come_back_to_a_billionth():
    updates = Updates({})
    times = [epoch + batch / 7 for epoch in range(40) for batch in range(1, 8)]
    for time in times:
        updates.append({'ep': time}, {})
    np.testing.assert_allclose(updates.clock('ep'), times, rtol=0, atol=1e-9)
    assert len(updates.as_plain()['clock']['ep']) == 1


def test_a_list_is_the_beginning_of_itself_continued_and_of_no_other():
    short, longer, other = Updates(LABELS), Updates(LABELS), Updates(LABELS)
    run(short, range(1, 11))
    run(longer, range(1, 21))
    run(other, [*range(1, 10), *range(11, 21)])
    assert Updates(LABELS).is_beginning_of(short)
    assert short.is_beginning_of(short)
    assert short.is_beginning_of(longer)
    assert not longer.is_beginning_of(short)
    assert not short.is_beginning_of(other)


@pytest.mark.parametrize(
    'damage',
    [
        lambda plain: plain.pop('count'),
        lambda plain: plain.update(count=-1),
        lambda plain: plain.update(count=7),
        lambda plain: plain['clock'].pop('ba'),
        lambda plain: plain['clock'].update(ba=[[5, 'one', 1]]),
        lambda plain: plain['weights'].update({'power=0.1': [{'count': 5, 'weight': None}]}),
        lambda plain: plain['weights']['power=0.1'][-1].update(profile='sine'),
        lambda plain: plain.update(profiles=[1]),
    ],
)
def test_a_damaged_list_is_refused_in_words(damage):
    updates = Updates(LABELS)
    run(updates, range(1, 6))
    plain = updates.as_plain()
    damage(plain)
    with pytest.raises(ValueError, match='the list of updates in a file is damaged'):
        Updates.of_plain(plain, 'a file')
