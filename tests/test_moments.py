"""What a profile is told of each update in a Composer run: time elapsed, age of the average, updates so far."""

from __future__ import annotations

import math
from typing import Any

import pytest
import toy
from composer.loggers import InMemoryLogger

from composer_ema import EMA, SWA
from composer_ema.averages import BiasCorrected, Equal, HalfLife, Moment, Profile, Smoothing, WarmedUp


class Notes(Profile):
    """A profile that notes the moments at which it is asked and at which it is told of an update."""

    def __init__(self, unit: str) -> None:
        self.unit = unit
        self.asked: list[Moment] = []
        self.recorded: list[Moment] = []

    def weight(self, moment: Moment) -> float:
        self.asked.append(moment)
        return 0.5

    def record(self, moment: Moment) -> None:
        self.recorded.append(moment)

    def __str__(self) -> str:
        return 'notes'

    def __deepcopy__(self, memo: dict[int, Any]) -> Notes:
        return self


def with_profile(profile: Profile, **arguments: Any) -> EMA:
    """An EMA whose half-life is replaced by another profile of the same unit."""
    ema = EMA(**arguments)
    ema._averages._profiles['ema'] = (profile, ema._keeper.kept['ema'][1])
    return ema


def numbers(moments: list[Moment]) -> list[tuple[float, float, int]]:
    return [(pytest.approx(m.elapsed), pytest.approx(m.since_start), m.num_updates) for m in moments]


@pytest.mark.parametrize(
    ('arguments', 'moments'),
    [
        # The toy's batches have 4, 4 and 2 samples of 3 tokens; a run has 2 epochs.
        ({'half_life': '1ba'}, [(1, b, b - 1) for b in range(2, 7)]),
        ({'half_life': '1ba', 'update_interval': '2ba'}, [(1, 2, 1), (2, 4, 2), (2, 6, 3)]),
        ({'half_life': '1sp', 'update_interval': '1ep'}, [(10, 20, 1)]),
        ({'half_life': '1tok', 'update_interval': '1ep'}, [(30, 60, 1)]),
        ({'half_life': '1ep', 'update_interval': '1ep'}, [(1, 2, 1)]),
        ({'half_life': '1dur', 'update_interval': '1ep'}, [(1 / 2, 1, 1)]),
        ({'half_life': '1dur', 'update_interval': '1ba'}, [(1 / 6, b / 6, b - 1) for b in range(2, 7)]),
        ({'half_life': '1ba', 'ema_start': '3ba'}, [(1, 2, 1), (1, 3, 2), (1, 4, 3)]),
        ({'half_life': '1sp', 'ema_start': '1ep', 'update_interval': '2ba'}, [(8, 8 + 20 / 3, 1)]),
    ],
    ids=lambda value: ' '.join(value.values()) if isinstance(value, dict) else '',
)  # fmt: skip
def test_times_are_measured_in_the_profiles_own_unit(trainer, arguments, moments):
    notes = Notes(arguments['half_life'].lstrip('1'))
    trainer([with_profile(notes, **arguments)]).fit()
    # The first update copies, whatever the profile says.
    assert numbers(notes.asked) == moments
    assert notes.recorded[1:] == notes.asked
    assert notes.recorded[0].num_updates == 0


def test_an_equal_average_is_told_of_updates_alone(trainer):
    swa = SWA('2ba', update_interval='1ba')
    trainer([swa]).fit()
    averages = swa._averages
    assert averages._profiles == {'swa': (Equal(), None)}
    assert [average.profile.unit for _, average in averages] == ['updates']


@pytest.mark.parametrize('start', ['0ba', '2ba'])
def test_the_age_of_an_average_goes_on_in_a_resumed_run(trainer, tmp_path, start):
    def build(**more: Any) -> tuple[Any, EMA, Notes]:
        notes = Notes('ba')
        ema = with_profile(notes, half_life='1ba', ema_start=start)
        return trainer([ema], save_filename='ba{batch}.pt', **more), ema, notes

    run, ema, whole = build(save_folder=str(tmp_path), save_interval='1ba')
    run.fit()
    began = 0 if start == '0ba' else 1
    assert ema.state_dict()['averages']['ema']['started_at']['ba'] == began
    for batch in range(1 if start == '0ba' else 2, 6):
        run, ema, resumed = build(load_path=str(tmp_path / f'ba{batch}.pt'))
        run.fit()
        assert resumed.recorded == whole.recorded[-len(resumed.recorded) :]
        assert len(resumed.recorded) == 6 - batch
        assert ema.state_dict()['averages']['ema']['started_at']['ba'] == began


def test_after_the_clock_is_set_back_the_average_keeps_its_age(trainer, tmp_path):
    notes = Notes('ba')
    ema = with_profile(notes, half_life='1ba', ema_start='3ba')
    run = trainer([ema], save_folder=str(tmp_path), save_overwrite=True)
    run.fit()
    assert len(notes.recorded) == 4
    run.fit(duration='2ep', reset_time=True)
    assert numbers(notes.recorded[4:7]) == [(1, 5, 4), (1, 6, 5), (1, 7, 6)]
    assert ema.state_dict()['averages']['ema']['started_at']['ba'] == -4
    resumed = with_profile(Notes('ba'), half_life='1ba', ema_start='3ba')
    trainer([resumed], load_path=str(tmp_path / 'latest-rank0.pt'))
    assert resumed.state_dict()['averages']['ema']['started_at']['ba'] == -4


def test_a_warmed_up_half_life_follows_the_age(trainer):
    memory = InMemoryLogger()
    profile = WarmedUp(HalfLife(100, 'ba'), 0.5)
    trainer([with_profile(profile, half_life='1ba')], loggers=[memory]).fit()
    smoothings = [value for _, value in memory.data['ema/smoothing']]
    assert smoothings == [0.0, *(pytest.approx(2 ** (-1 / (0.5 * batch))) for batch in range(2, 7))]


def test_what_a_profile_remembers_is_in_the_state_and_goes_on(trainer, tmp_path):
    def build(**more: Any) -> tuple[Any, EMA]:
        ema = with_profile(BiasCorrected(Smoothing(0.75)), smoothing=0.75)
        return trainer([ema], save_filename='ba{batch}.pt', **more), ema

    whole, ema = build(save_folder=str(tmp_path), save_interval='1ba')
    whole.fit()
    expected = toy.snapshot(whole)
    assert expected['profile'] == {
        'description': 'smoothing=0.75,bias_correction',
        'log_kept': pytest.approx(6 * math.log(0.75)),
    }
    for batch in range(1, 6):
        resumed, _ = build(load_path=str(tmp_path / f'ba{batch}.pt'))
        resumed.fit()
        assert toy.snapshot(resumed) == expected
    state = ema.state_dict()
    del state['averages']['ema']['profile']['log_kept']
    with pytest.raises(ValueError, match='the state of a profile must hold log_kept'):
        ema.load_state_dict(state)
    assert toy.snapshot(whole) == expected


def test_the_run_is_not_looked_at_twice_in_one_event(trainer, monkeypatch):
    from composer.core import Event

    from composer_ema.trainer.run import ComposerRun

    reads = []
    original = ComposerRun.clock
    monkeypatch.setattr(ComposerRun, 'clock', lambda self: reads.append(self) or original(self))

    class Counts(EMA):
        def apply(self, event, state, logger):
            reads.clear()
            super().apply(event, state, logger)
            if event is Event.BATCH_END:
                counted.append(len(reads))

    counted: list[int] = []
    trainer([Counts('1ep', update_interval='0.3ep', log_interval=None)]).fit()
    assert len(counted) >= 3
    assert max(counted[1:]) == 1
