"""Nothing is silent: settings that cannot take effect, contract, item 7."""

from __future__ import annotations

import warnings

import pytest
import torch
from composer.algorithms import EMA as BuiltinEMA
from contract import (
    BATCHES,
    each_average,
)
from torch.utils.data import DataLoader, IterableDataset
from toy import bits, make_data, make_evaluator, make_model

from composer_ema import EMA


def test_a_pattern_that_matches_no_name_is_an_error_when_the_trainer_is_built(trainer):
    with pytest.raises(ValueError, match=r"include pattern 'no_such_layer' matches none"):
        trainer([EMA('2ba', include='no_such_layer')])
    with pytest.raises(ValueError, match=r"exclude pattern 'no_such_layer' matches none"):
        trainer([EMA('2ba', exclude=['bias', 'no_such_layer'])])
    with pytest.raises(ValueError, match='leave no name'):
        trainer([EMA('2ba', include='bias', exclude='bias')])


def test_a_model_without_trainable_parameters_is_warned_about(trainer):
    model = make_model()
    model.requires_grad_(False)
    with pytest.warns(UserWarning, match='no trainable parameter'):
        trainer([EMA('2ba')], model=model)


@pytest.mark.parametrize(
    ('arguments', 'duration', 'message'),
    [
        ({'half_life': '7ba'}, '2ep', r"half_life='7ba' in a run of 6 batches: the average will still hold 61 %"),
        ({'half_life': '3ep'}, '2ep', r"half_life='3ep' in a run of 2 epochs: the average will still hold 79 %"),
        ({'half_life': '21sp'}, '2ep', r"half_life='21sp' in a run of 20 samples: the average will still hold 58 %"),
        ({'half_life': '7ba'}, '20sp', r"half_life='7ba' in a run of 6 batches: the average will still hold 61 %"),
        ({'half_life': '31tok'}, '30tok', r"The average still holds 67 % of the initial weights"),
        ({'half_life': '2iter'}, '2ep', r"half_life='2iter' in a run of 1 iteration: .* a single update"),
        ({'half_life': '1.5dur'}, '2ep', r"half_life='1.5dur' in a run of 2 epochs: the average will still hold 68 %"),
        ({'half_life': '2ba', 'update_interval': '7ba'}, '2ep', r"update_interval='7ba' is longer than the run"),
        ({'half_life': '2ba', 'ema_start': '2.5ep'}, '2ep', r"ema_start='2.5ep' is longer than the run of 2 epochs"),
        ({'smoothing': 0.9, 'update_interval': '3ep'}, '2ep', r"update_interval='3ep' is longer than the run"),
    ],
)  # fmt: skip
def test_a_time_longer_than_the_run_is_warned_about_with_the_value_and_a_remedy(trainer, arguments, duration, message):
    run = trainer([EMA(**arguments)], max_duration=duration, iteration='2ep')
    with pytest.warns(UserWarning, match=message + '.* (a shorter|Update it more often)'):
        run.fit()


@pytest.mark.parametrize('half_life', ['1ep', '0.8ep'])
def test_a_half_life_in_epochs_in_a_run_shorter_than_one_is_warned_about(trainer, half_life):
    run = trainer([EMA(half_life)], max_duration='2ba')
    with pytest.warns(UserWarning, match=r"update_interval='1ep' is longer than the run of 0\.6.*Pass a shorter"):
        run.fit()


def test_updates_once_an_epoch_in_a_run_shorter_than_one_are_warned_about(trainer):
    run = trainer([EMA('1ba', update_interval='1ep')], max_duration='2ba')
    with pytest.warns(UserWarning, match=r"update_interval='1ep' is longer than the run of 0\.6"):
        run.fit()


class Endless(IterableDataset):
    """Data that does not tell its length."""

    def __iter__(self):
        return iter(make_data(40).dataloader.dataset)


def test_a_run_that_ends_without_any_update_is_warned_about(trainer):
    """Nobody can know beforehand that two batches are less than an epoch here."""
    run = trainer([EMA('1ep')], train_dataloader=DataLoader(Endless(), batch_size=4), max_duration='2ba')
    with pytest.raises((UserWarning, ValueError), match='1ep'):
        run.fit()


def test_a_half_life_that_leaves_less_than_a_hundredth_of_the_start_is_not_warned_about(trainer):
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        warnings.filterwarnings('ignore', module=r'(?!composer_ema)')
        trainer([EMA('1ba')], max_duration='8ba').fit()  # seven half-lives: 2 ** -7
        trainer([EMA('0.12dur')]).fit()


def test_two_instances_in_one_trainer_are_an_error(trainer):
    with pytest.raises(ValueError, match='2 algorithms called EMA in one Trainer'):
        trainer([EMA('2ba'), EMA('4ba')])


def test_ours_beside_the_built_in_is_an_error(trainer):
    with pytest.raises(ValueError, match='2 algorithms called EMA in one Trainer'):
        trainer([EMA('2ba'), BuiltinEMA('4ba')])
    with pytest.raises(ValueError, match='2 algorithms called EMA in one Trainer'):
        trainer([BuiltinEMA('4ba'), EMA('2ba')])


def test_an_unknown_evaluator_label_is_warned_about_with_the_nearest_one(trainer):
    run = trainer([EMA('2ba', evaluate_with={'evla': 'training'})], eval_dataloader=make_evaluator('eval'))
    with pytest.warns(UserWarning, match=r"'evla'.*Did you mean 'eval'\?"):
        run.fit()


@pytest.mark.parametrize('argument', ['half_life', 'update_interval', 'ema_start'])
def test_tokens_without_a_dataloader_that_counts_them_are_an_error_or_a_warning(trainer, argument):
    silent = make_data().dataloader  # without the DataSpec that counts
    run = trainer([EMA(**{'half_life': '2ba', argument: '4tok'})], train_dataloader=silent)
    with pytest.raises((ValueError, UserWarning), match=rf"{argument}='4tok'.*tokens"):
        run.fit()


def test_iterations_in_a_run_without_any_are_an_error(trainer):
    for argument in ('half_life', 'update_interval'):
        run = trainer([EMA(**{argument: '1iter'})])
        with pytest.raises(ValueError, match=f"{argument}='1iter' counts iterations"):
            run.fit()


def test_resuming_with_another_half_life_is_warned_about(trainer, tmp_path):
    run = trainer([EMA('2ba')])
    run.fit(duration='1ep')
    run.save_checkpoint(str(tmp_path / 'c.pt'))
    with pytest.warns(UserWarning, match=r"half_life='2ba', this run continues with half_life='3ba'"):
        trainer([EMA('3ba')], load_path=str(tmp_path / 'c.pt')).fit()


@each_average
def test_dropping_the_algorithm_on_resume_continues_the_same_training(trainer, tmp_path, average):
    run = trainer([average()], eval_dataloader=make_evaluator(interval='1ba'), save_folder=str(tmp_path),
                  save_interval='1ba', save_filename='ba{batch}.pt')  # fmt: skip
    run.fit()
    for batch in range(1, BATCHES):
        without = trainer(eval_dataloader=make_evaluator(interval='1ba'), load_path=str(tmp_path / f'ba{batch}.pt'))
        without.fit()
        assert bits(without.state.model) == bits(run.state.model)


def test_adding_the_algorithm_on_resume_averages_from_there(trainer, tmp_path):
    plain = trainer(save_folder=str(tmp_path), save_interval='1ba', save_filename='ba{batch}.pt')
    plain.fit()
    ema = EMA('2ba')
    added = trainer([ema], load_path=str(tmp_path / 'ba4.pt'))
    assert not ema.ema_started
    added.fit()
    assert bits(added.state.model) == bits(plain.state.model)
    assert ema.ema_model.num_updates == 2
    # The first update, after batch 5, copied; the second, one batch later, moved by 1 - 2 ** (-1 / 2) of the way.
    fifth, sixth = (torch.load(tmp_path / f'ba{n}.pt', weights_only=False)['state']['model'] for n in (5, 6))
    for name, average in ema.ema_model.named_parameters():
        expected = fifth[name].double() + (1 - 0.5**0.5) * (sixth[name].double() - fifth[name].double())
        torch.testing.assert_close(average.double(), expected, rtol=1e-6, atol=1e-7)
