"""Ordinary checkpoints of a run as kept averages: the weights of their updates, and what is left out."""

import os
import shutil

import composer.algorithms
import pytest
import torch
from composer import Callback
from toy import make_trainer

from composer_ema import EMA, SWA, CheckpointError
from composer_ema.posthoc.history import read_run


class EveryBatch(Callback):
    """Keeps the training weights of every batch."""

    def __init__(self) -> None:
        self.weights: list[dict[str, torch.Tensor]] = []

    def batch_end(self, state, logger) -> None:
        self.weights.append({name: t.detach().clone() for name, t in state.model.state_dict().items()})


def train(folder, algorithm, batches: EveryBatch, **arguments) -> None:
    defaults = {'max_duration': '4ep', 'save_interval': '4ba', 'run_name': 'run', 'save_num_checkpoints_to_keep': -1}
    trainer = make_trainer([algorithm], callbacks=[batches], save_folder=str(folder), **{**defaults, **arguments})
    trainer.fit()
    trainer.close()


def assert_made_of(kept, batches: EveryBatch) -> None:
    """The recovered weights make the tensors of every kept average from the weights of every batch."""
    for name in kept.names():
        saved = kept.tensor(name)
        if saved.is_floating_point():
            made = batches.weights[0][name].double()
            for weight, current in zip(kept.weights[1:], batches.weights[1:], strict=False):
                made += weight * (current[name].double() - made)
            torch.testing.assert_close(saved.double(), made, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    'algorithm',
    [
        EMA('0.2dur', update_interval='2ba'),
        EMA('30sp', ema_start='1ep', update_interval='2ba'),
        EMA('1ep', update_interval='1ep'),
        EMA('6ba', ema_start='4ba', update_interval='3ba', bias_correction=True),
        EMA('6ba', update_interval='4ba', bias_correction=True),
        EMA(power=0.1, half_life=None),
        SWA('6ba', update_interval='1ba'),
    ],
    ids=lambda each: f'{type(each).__name__}-{each.update_interval}',
)
def test_the_weights_of_every_update_come_back_from_checkpoints(tmp_path, algorithm):
    batches = EveryBatch()
    train(tmp_path, algorithm, batches)
    history = read_run(tmp_path, max_duration='4ep')
    assert not history.left_out
    assert history.labels == ['weights', algorithm.name]
    assert history.num_moments == 12
    assert list(history.clocks['sp'])[:5] == [4, 8, 10, 14, 18]
    for kept in history.kept:
        assert_made_of(kept, batches)


def test_an_average_that_starts_at_the_end_of_an_epoch_after_its_checkpoint_is_followed(tmp_path):
    batches = EveryBatch()
    train(tmp_path, EMA('1ep', update_interval='1ep'), batches, save_interval='3ba')
    history = read_run(tmp_path)
    assert not history.left_out
    assert [len(kept.weights) for kept in history.kept if kept.label == 'ema'] == [6, 9, 12]
    for kept in history.kept:
        assert_made_of(kept, batches)


@pytest.mark.parametrize('algorithm', [EMA(power=0.1), EMA('6ba', warmup=0.2)], ids=['power', 'warmup'])
def test_an_average_that_a_resumed_run_began_is_followed(tmp_path, algorithm):
    batches = EveryBatch()
    trainer = make_trainer([], callbacks=[batches], save_folder=str(tmp_path), run_name='run', max_duration='5ba')
    trainer.fit()
    trainer.close()
    train(tmp_path, algorithm, batches, load_path=str(tmp_path / 'latest-rank0.pt'))
    history = read_run(tmp_path, max_duration='4ep')
    assert not history.left_out
    assert [len(kept.weights) for kept in history.kept if kept.label == 'ema'] == [8, 12]
    for kept in history.kept:
        assert_made_of(kept, batches)


def test_composers_own_average_is_followed_once_its_half_life_is_told(tmp_path):
    batches = EveryBatch()
    train(tmp_path, composer.algorithms.EMA('3ba'), batches)
    told = read_run(tmp_path, half_life='3ba')
    assert told.labels == ['weights', 'ema']
    for kept in told.kept:
        assert_made_of(kept, batches)
    untold = read_run(tmp_path)
    assert untold.labels == ['weights']
    (reason,) = untold.left_out
    assert 'Pass half_life' in reason
    with pytest.raises(ValueError, match='must have one unit'):
        read_run(tmp_path, half_life='3ba', update_interval='1ep')


def test_a_resumed_run_with_another_half_life_is_followed_through(tmp_path):
    batches = EveryBatch()
    train(tmp_path, EMA('5ba'), batches, max_duration='8ba')
    with pytest.warns(UserWarning, match='this run continues with'):
        train(tmp_path, EMA('2ba'), batches, load_path=str(tmp_path / 'ep2-ba8-rank0.pt'))
    history = read_run(tmp_path)
    assert not history.left_out
    for kept in history.kept:
        assert_made_of(kept, batches)


def test_an_average_whose_count_does_not_come_out_is_left_out_and_the_weights_stay(tmp_path):
    train(tmp_path, EMA('5ba'), EveryBatch())
    for path in sorted(tmp_path.glob('ep*.pt'))[1:2]:
        state = torch.load(path, weights_only=False)
        dict(state['state']['algorithms'])['EMA']['averages']['ema']['num_updates'] += 1
        torch.save(state, path)
    history = read_run(tmp_path)
    (reason,) = history.left_out
    assert 'it was updated 9 times, and by its settings 8' in reason
    assert [len(each.weights) for each in history.kept if each.label == 'ema'] == [4]
    assert [len(each.weights) for each in history.kept if each.label == 'weights'] == [4, 8, 12]


def test_checkpoints_of_another_run_and_damaged_ones_are_named_and_left_out(tmp_path):
    other = tmp_path / 'other'
    train(other, EMA('5ba'), EveryBatch(), run_name='other')
    train(tmp_path / 'own', EMA('5ba'), EveryBatch())
    shutil.copy(other / 'ep1-ba4-rank0.pt', tmp_path / 'own' / 'stale.pt')
    os.utime(tmp_path / 'own' / 'stale.pt', (0, 0))
    (tmp_path / 'own' / 'cut.pt').write_bytes((other / 'ep1-ba4-rank0.pt').read_bytes()[:5000])
    history = read_run(tmp_path / 'own')
    assert history.run_name == 'run'
    assert [len(each.weights) for each in history.kept if each.label == 'weights'] == [4, 8, 12]
    damaged, stale = sorted(history.left_out)
    assert 'cut.pt' in damaged
    assert "belongs to another run: 'other', not 'run'" in stale


def test_a_folder_without_anything_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match='holds no snapshots nor checkpoints'):
        read_run(tmp_path)
    with pytest.raises(CheckpointError, match='is no folder'):
        read_run(tmp_path / 'missing')
    with pytest.raises(ValueError, match="source must be 'snapshots' or 'checkpoints'"):
        read_run(tmp_path, source='files')  # pyright: ignore[reportArgumentType]: that is the point


def test_the_length_of_the_run_comes_from_its_recipe(tmp_path):
    train(tmp_path / 'checkpoints', EMA('0.2dur'), EveryBatch())
    (tmp_path / 'recipe.yaml').write_text('seed: 1\nmax_duration: 4ep\n')
    history = read_run(tmp_path)
    assert history.max_duration == '4ep'
    assert history.labels == ['weights', 'ema']


def test_what_is_not_averaged_is_that_of_the_newest_checkpoint(tmp_path):
    train(tmp_path, EMA('5ba'), EveryBatch())
    history = read_run(tmp_path)
    whole = history.completed({name: torch.zeros(1) for name in ('module.0.weight',)})
    newest = torch.load(tmp_path / 'latest-rank0.pt', weights_only=False)['state']['model']
    assert whole.keys() == newest.keys()
    assert whole['module.1.num_batches_tracked'].item() == 12
    assert whole['module.0.weight'].tolist() == [0]
    assert history.copied == {'module.1.num_batches_tracked'}


def test_buffers_that_the_average_copied_are_told_apart(tmp_path):
    train(tmp_path, EMA('5ba', buffers='copy'), EveryBatch())
    statistics = {'module.1.running_mean', 'module.1.running_var'}
    assert read_run(tmp_path).copied == statistics | {'module.1.num_batches_tracked'}
