"""No silent harm: an average that still holds much of its start is warned of, once, with the share and the remedy."""

from __future__ import annotations

import re
import warnings
from typing import Any

import pytest
import torch
import toy
from composer import Callback

from composer_ema import EMA, SWA

pytestmark = pytest.mark.filterwarnings('error:.* of the initial weights')

REMEDY = r'Pass warmup=0\.1 or a shorter half_life\.$'


def told(run: Any, *fits: dict[str, Any]) -> list[str]:
    """The warnings about the start that the fits of a run give."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter('always')
        for fit in fits or ({},):
            run.fit(**fit)
    return [str(each.message) for each in caught if 'initial weights' in str(each.message)]


def share_of(algorithm: Any) -> float | None:
    return algorithm.state_dict()['averages'][algorithm.name]['start_share']


# The toy's run has two epochs of three batches; the first update copies, so five later ones shrink the start.
@pytest.mark.parametrize(
    ('arguments', 'share'),
    [
        ({'half_life': '2ba'}, 2 ** (-5 / 2)),
        ({'half_life': '1000ba'}, 2 ** (-5 / 1000)),
        ({'half_life': '1ep', 'update_interval': '1ba'}, 2 ** (-5 / 3)),
        ({'half_life': '8sp'}, 2 ** (-(20 - 4) / 8)),
        ({'half_life': '0.2dur'}, 2 ** (-(5 / 6) / 0.2)),
        ({'half_life': '2ba', 'ema_start': '3ba'}, 2 ** (-3 / 2)),
        ({'half_life': '2ba', 'ema_start': '0.5dur', 'update_interval': '2ba'}, 2 ** (-2 / 2)),
        ({'half_life': '2ba', 'update_interval': '4ba'}, 2 ** (-3 / 2)),
        ({'half_life': '1ep', 'update_interval': '1ep'}, 2**-1),
        ({'smoothing': 0.6}, 0.6**5),
        ({'smoothing': 0.6, 'update_interval': '2ba'}, 0.6**3),
        ({'smoothing': 0.6, 'update_interval': '0.01ep'}, 0.6**5),
    ],
    ids=lambda value: ' '.join(map(str, value.values())) if isinstance(value, dict) else '',
)  # fmt: skip
def test_the_share_at_the_end_is_foretold_when_training_begins(trainer, arguments, share):
    ema = EMA(**arguments)
    [said] = told(trainer([ema]))
    assert share_of(ema) == pytest.approx(share)
    found = re.search(r': the average will still hold ([0-9.]+) % of the initial weights at the end. Pass warm', said)
    assert found is not None
    assert float(found[1]) == pytest.approx(100 * share, rel=0.05)
    name = 'smoothing' if 'smoothing' in arguments else 'half_life'
    assert said.startswith(f'{name}=')
    assert 'in a run of ' in said


@pytest.mark.parametrize(
    'algorithm',
    [lambda: EMA('0ba'), lambda: EMA(smoothing=0.3), lambda: EMA('2sp'), lambda: EMA(power=0.1), lambda: SWA('3ba')],
)
def test_an_average_that_forgets_its_start_warns_of_nothing(trainer, algorithm):
    run = trainer([algorithm()], eval_dataloader=toy.make_evaluator())
    assert told(run) == []
    run.eval()


def test_a_hundredth_is_the_limit(trainer):
    assert told(trainer([EMA(smoothing=0.01 ** (1 / 5) * 0.999)])) == []
    assert len(told(trainer([EMA(smoothing=0.01 ** (1 / 5) * 1.001)]))) == 1


def test_it_is_told_once_however_often_the_run_goes_on_and_evaluates(trainer):
    run = trainer([EMA('1000ba')], eval_dataloader=toy.make_evaluator(interval='1ba'))
    assert len(told(run, {'duration': '1ep'}, {'duration': '1ep'})) == 1
    run.eval()


def test_what_could_not_be_foretold_is_told_at_the_end(trainer, tmp_path):
    # A run that was stopped by hand ends before its half-lives have passed.
    class Stop(Callback):
        def batch_end(self, state, logger) -> None:
            if int(state.timestamp.batch) == 2:
                state.stop_training()

    ema = EMA(smoothing=0.3)
    [said] = told(trainer([ema], callbacks=[Stop()]))
    assert said == 'The average still holds 30 % of the initial weights. Pass warmup=0.1 or a smaller smoothing.'


def test_an_evaluation_of_a_loaded_checkpoint_tells(trainer, tmp_path):
    run = trainer([EMA('1000ba')], save_folder=str(tmp_path), save_overwrite=True)
    told(run)
    run = trainer([EMA('1000ba')], load_path=str(tmp_path / 'latest-rank0.pt'), eval_dataloader=toy.make_evaluator())
    with pytest.warns(UserWarning, match=rf'^The average still holds 100 % of the initial weights\. {REMEDY}'):
        run.eval()
    run.eval()


def test_a_resumed_run_counts_on(trainer, tmp_path):
    run = trainer([EMA('1ba')], save_folder=str(tmp_path), save_interval='1ba', save_filename='ba{batch}.pt')
    assert len(told(run)) == 1
    ema = EMA('1ba')
    [said] = told(trainer([ema], load_path=str(tmp_path / 'ba4.pt')))
    assert share_of(ema) == 2**-5
    assert 'will still hold 3.1 % of the initial weights' in said
    assert told(trainer([EMA('1ba')], load_path=str(tmp_path / 'ba4.pt'), max_duration='3ep')) == []


def test_nothing_is_told_of_an_average_whose_start_nobody_knows(trainer):
    ema = EMA('1000ba')
    run = trainer([ema])
    ema.ema_model = toy.make_model(seed=1)
    assert told(run) == []
    assert share_of(ema) is None


def test_a_function_of_the_users_tells_nothing(trainer):
    ema = EMA(avg_fn=lambda average, weights, count: average)
    assert told(trainer([ema])) == []
    assert share_of(ema) is None


def test_the_words_of_a_long_half_life_name_it_and_the_run(trainer):
    [said] = told(trainer([EMA('3ep', update_interval='1ba')]))
    assert re.match(r"half_life='3ep' in a run of 2 epochs: the average will still hold 6\d % of the init", said)
    assert re.search(REMEDY, said)


@pytest.mark.parametrize('average', [{'warmup': 0.1}, {'power': 0.1}], ids=str)
def test_an_average_that_a_resumed_run_begins_counts_its_age_from_there(trainer, tmp_path, average):
    trainer(save_folder=str(tmp_path), save_interval='1ba', save_filename='ba{batch}.pt').fit()
    ema, late = EMA(**average), EMA(**average, ema_start='3ba')
    run = trainer([ema], load_path=str(tmp_path / 'ba3.pt'))
    assert told(run) == []
    told(trainer([late]))
    # The first update is that of batch 4 here, and of batch 3 there; each stands for one batch.
    state = ema.state_dict()['averages']['ema']
    assert state['started_at']['ba'] == 3
    whole = EMA(**average)
    shorter = trainer([whole], max_duration='3ba')
    told(shorter)
    assert state['start_share'] == pytest.approx(share_of(whole))


def test_an_average_that_a_resumed_run_begins_is_foretold(trainer, tmp_path):
    trainer(save_folder=str(tmp_path), save_interval='1ba', save_filename='ba{batch}.pt').fit()
    ema = EMA(smoothing=0.3)
    [said] = told(trainer([ema], load_path=str(tmp_path / 'ba3.pt')))
    assert share_of(ema) == pytest.approx(0.09)
    assert said.startswith('smoothing=0.3 in a run of 6 batches: the average will still hold 9 %')


def test_before_its_first_update_an_average_goes_on_from_where_its_age_counts(trainer, tmp_path):
    def make() -> EMA:
        return EMA('2ba', warmup=0.2, update_interval='1ep')

    whole = make()
    told(trainer([whole], save_folder=str(tmp_path), save_interval='1ba', save_filename='ba{batch}.pt'))
    state = torch.load(tmp_path / 'ba2.pt', weights_only=False)
    [(_, algorithm)] = state['state']['algorithms']
    assert algorithm['averages']['ema']['started_at']['ba'] == 0
    algorithm['averages']['ema']['started_at'] = None  # as earlier releases wrote it
    torch.save(state, tmp_path / 'old.pt')
    for name in ('ba2.pt', 'old.pt'):
        resumed = make()
        told(trainer([resumed], load_path=str(tmp_path / name)))
        assert (
            resumed.state_dict()['averages']['ema']['started_at'] == whole.state_dict()['averages']['ema']['started_at']
        )
        assert share_of(resumed) == share_of(whole)


def test_an_average_without_an_update_holds_no_start(trainer):
    assert told(trainer([EMA('9ba', ema_start='50ba')])) == []
