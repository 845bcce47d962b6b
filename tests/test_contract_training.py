"""Training is untouched: contract, item 1, over the pair grid."""

from __future__ import annotations

import itertools

import pytest
from grid import (
    AXES,
    CASES,
    Case,
    label,
    momenta,
    pairs_in,
    reference_run,
    run_case,
)
from toy import bits

from composer_ema import EMA
from composer_ema import SWA as OurSWA


def test_the_grid_holds_every_pair_of_settings():
    tried = set().union(*map(pairs_in, CASES))
    wanted = {
        (i, a, j, b)
        for (i, first), (j, second) in itertools.combinations(enumerate(AXES.values()), 2)
        for a in first
        for b in second
    }
    assert tried == wanted
    assert len(CASES) < 100


@pytest.mark.filterwarnings('ignore:.*without an update_interval updates:UserWarning')
@pytest.mark.parametrize('case', CASES, ids=lambda case: '-'.join(map(label, case)))
def test_training_is_bit_identical_with_and_without_the_average(case: Case, tmp_path_factory):
    folder = tmp_path_factory.getbasetemp() / 'grid'
    horizon = {'smoothing': case.horizon} if isinstance(case.horizon, float) else {'half_life': case.horizon}
    ema = EMA(**horizon, update_interval=case.update_interval)
    recorder, trainer, rng = run_case(case, folder, ema)
    without_horizon = case._replace(horizon='1iter' if case.horizon == '1iter' else None, update_interval=None)
    history, last, momentum, reference_rng = reference_run(without_horizon, folder)

    assert [moment for moment, _ in recorder.history] == [moment for moment, _ in history]
    for (moment, with_ema), (_, without) in zip(recorder.history, history, strict=True):
        assert with_ema == without, f'weights differ at {moment}'
    assert bits(trainer.state.model) == last
    assert momenta(trainer) == momentum
    assert rng.numpy().tobytes() == reference_rng
    # The comparison would be empty if the average had not been kept, or not been evaluated with.
    assert ema.ema_model.num_updates >= 2
    assert recorder.forwards_with_average >= 1


@pytest.mark.parametrize(
    'case', [case for case in CASES[::6] if case.others != 'swa'], ids=lambda c: '-'.join(map(label, c))
)
def test_training_is_bit_identical_with_and_without_an_equal_average(case: Case, tmp_path_factory):
    folder = tmp_path_factory.getbasetemp() / 'grid'
    interval = case.update_interval if case.update_interval in ('1ba', '1ep', '5sp', '0.5ep') else '2ba'
    swa = OurSWA('1ba', update_interval=interval)
    recorder, trainer, rng = run_case(case, folder, swa)
    without_horizon = case._replace(horizon='1iter' if case.horizon == '1iter' else None, update_interval=None)
    history, last, momentum, reference_rng = reference_run(without_horizon, folder)
    assert recorder.history == history
    assert bits(trainer.state.model) == last
    assert momenta(trainer) == momentum
    assert rng.numpy().tobytes() == reference_rng
    assert swa.swa_model.num_updates >= 2
    assert recorder.forwards_with_average >= 1
