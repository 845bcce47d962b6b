"""After which batches an average is updated: every interval from its first update on, or from the start of training."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
import toy
from composer import Callback
from composer.core import Precision
from hypothesis import given
from hypothesis import strategies as st
from torch.amp import GradScaler

from composer_ema import EMA, SWA
from composer_ema.run.due import Interval, Start, first_update
from composer_ema.spans import Span, has_crossed
from composer_ema.trainer.run import look_at
from composer_ema.trainer.weight_average import WeightAverage

FIXTURES = Path(__file__).parent / 'fixtures'


class Overflow(Callback):
    """Makes a gradient of some batches infinite, so that a gradient scaler leaves their steps out."""

    def __init__(self, *batches: int) -> None:
        self.batches = batches

    def after_backward(self, state, logger) -> None:
        if int(state.timestamp.batch) + 1 in self.batches:
            next(state.model.parameters()).grad = torch.full((2, 1, 3, 3), torch.inf)


class Updates(Callback):
    """Notes the batches after which there was an update."""

    def __init__(self, algorithm: WeightAverage) -> None:
        self.algorithm, self.batches = algorithm, []
        self._known: int | None = None

    def _look(self, state: Any) -> None:
        shadow = toy.shadow_of(self.algorithm)
        assert shadow is not None
        count = shadow.num_updates
        if self._known is not None and count > self._known:
            self.batches.append(int(state.timestamp.batch))
        self._known = count

    def fit_start(self, state, logger) -> None:
        self._look(state)

    def batch_end(self, state, logger) -> None:
        self._look(state)

    def epoch_end(self, state, logger) -> None:
        self._look(state)


def make(algorithm: str, start: str, interval: str) -> WeightAverage:
    if algorithm == 'swa':
        return SWA(start, update_interval=interval, refresh_batchnorm=False, log_interval=None)
    return EMA('1ba', ema_start=start, update_interval=interval, log_interval=None)


# The toy's batches have 4, 4 and 2 samples of 3 tokens, so an epoch has 3 batches and 10 samples.
SCHEDULES = [
    ('0ba', '3ba', [1, 3, 6, 9, 12]),
    ('5ba', '3ba', [5, 8, 11]),
    ('3ba', '3ba', [3, 6, 9, 12]),
    ('4ba', '5ba', [4, 9]),
    ('0.25dur', '2ba', [3, 5, 7, 9, 11]),
    ('0.25dur', '0.5dur', [3, 9]),
    ('1ep', '2ba', [3, 5, 7, 9, 11]),
    ('12sp', '10sp', [4, 7, 10]),  # 14 samples after batch 4, 24 after 7, 34 after 10
    ('14sp', '8sp', [4, 7, 9, 11]),  # 22, 30 and 38 samples are reached in batches 7, 9 and 11
    ('5ba', '1ep', [6, 9, 12]),
    ('4ba', '0.5ep', [4, 6, 7, 9, 10, 12]),
    ('1ep', '2ep', [3, 9]),
    ('0ep', '2ep', [3, 6, 12]),
]


@pytest.mark.parametrize('algorithm', ['ema', 'swa'])
@pytest.mark.parametrize(('start', 'interval', 'batches'), SCHEDULES)
def test_updates_come_every_interval_from_the_first_on(trainer, algorithm, start, interval, batches):
    average = make(algorithm, start, interval)
    updates = Updates(average)
    trainer([average], callbacks=[updates], max_duration='4ep').fit()
    assert updates.batches == batches


@pytest.mark.parametrize(('start', 'interval', 'batches'), [SCHEDULES[4], SCHEDULES[8]])
def test_a_resumed_run_keeps_to_them(trainer, tmp_path, start, interval, batches):
    run = trainer(
        [make('swa', start, interval)], max_duration='4ep', save_folder=str(tmp_path), save_interval='1ba',
        save_filename='ba{batch}.pt',
    )  # fmt: skip
    run.fit()
    end = toy.snapshot(run)
    for batch in (batches[0], batches[1] + 1):
        average = make('swa', start, interval)
        updates = Updates(average)
        run = trainer([average], callbacks=[updates], max_duration='4ep', load_path=str(tmp_path / f'ba{batch}.pt'))
        run.fit()
        assert updates.batches == [each for each in batches if each > batch]
        assert toy.snapshot(run) == end


def test_a_checkpoint_of_version_2_goes_on_from_its_start(trainer):
    # That release updated at batches 2, 3 and 6, and this checkpoint is of batch 4.
    ema = EMA('4ba', ema_start='2ba', update_interval='3ba')
    updates = Updates(ema)
    path = str(FIXTURES / 'version-2-ema.pt')
    trainer([ema], callbacks=[updates], max_duration='12ba', load_path=path).fit()
    assert updates.batches == [5, 8, 11]


def test_skipped_steps_put_an_update_off_and_move_no_other(trainer):
    swa = make('swa', '2ba', '3ba')
    updates = Updates(swa)
    run = trainer([swa], callbacks=[updates, Overflow(4, 5)], max_duration='12ba')
    run.state.precision, run.state.scaler = Precision.AMP_FP16, GradScaler('cpu')
    run.fit()
    assert updates.batches == [2, 6, 8, 11]


def test_after_the_clock_is_set_back_they_count_on(trainer, tmp_path):
    swa = make('swa', '2ba', '3ba')
    updates = Updates(swa)
    run = trainer([swa], callbacks=[updates], max_duration='6ba', save_folder=str(tmp_path), save_overwrite=True)
    run.fit()
    run.fit(duration='6ba', reset_time=True)
    # Batches 2 and 5 of the first fit, one batch before its end; 2 and 5 of the second are the 8th and the 11th.
    assert updates.batches == [2, 5, 3, 6]
    resumed = make('swa', '2ba', '3ba')
    trainer([resumed], max_duration='6ba', load_path=str(tmp_path / 'latest-rank0.pt'))
    assert resumed.state_dict()['averages']['swa']['first_update']['ba'] == -3


@pytest.mark.parametrize(
    ('start', 'interval', 'started_at', 'first'),
    [
        ('5ba', '3ba', None, 5),
        ('0.25dur', '2ba', 1, 3),  # one interval before the first update
        ('10sp', '2ba', None, None),  # an average that came without a clock
    ],
)
def test_where_the_state_does_not_tell_the_first_update_follows_from_start_and_age(
    trainer, start, interval, started_at, first
):
    run = trainer(max_duration='4ep')
    run.fit()
    begin, each = (Span.parse(text, name='time') for text in (start, interval))
    clock = None if started_at is None else {'iter': 0, 'ep': 0, 'ba': started_at, 'sp': 0, 'tok': 0}
    found = first_update(Start('start', begin), Interval('each', each), look_at(run.state), clock)
    assert (None if found is None else found['ba']) == (None if first is None else pytest.approx(first))


@given(st.integers(1, 40), st.integers(1, 12), st.integers(1, 3))
def test_every_multiple_after_the_first_is_met_by_the_first_look_after_it(first, interval, step):
    clock = range(first, first + 100, step)
    due = [now for before, now in itertools.pairwise(clock) if has_crossed(before - first, now - first, interval)]
    multiples = range(first + interval, clock[-1] + 1, interval)
    assert due == sorted({next(now for now in clock if now >= each) for each in multiples})
