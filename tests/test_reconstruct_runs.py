"""Averages reconstructed from the files of real runs, in Python and on the command line."""

from pathlib import Path

import composer.algorithms
import pytest
import torch
from composer import Callback
from toy import make_model, make_trainer

from composer_ema import EMA, ShadowModel, load_average, reconstruct

# Runs of a few batches, as in conftest.py.
pytestmark = pytest.mark.filterwarnings('ignore:.* still hold.* of the initial weights:UserWarning')


class Other(Callback):
    """Keeps another average than the run's EMA, with the same updates."""

    def __init__(self, half_life: float) -> None:
        self.smoothing = 2 ** (-1 / half_life)
        self.shadow: ShadowModel | None = None

    def batch_end(self, state, logger) -> None:
        if self.shadow is None:
            self.shadow = ShadowModel(state.model)
        else:
            self.shadow.update(state.model, smoothing=self.smoothing)


class EveryBatch(Callback):
    """Keeps the training weights after every batch."""

    def __init__(self) -> None:
        self.seen: list[dict[str, torch.Tensor]] = []

    def batch_end(self, state, logger) -> None:
        self.seen.append({name: tensor.detach().clone() for name, tensor in state.model.named_parameters()})


@pytest.fixture(scope='module')
def run(tmp_path_factory) -> tuple[Path, Other]:
    """A run of 36 batches that kept a checkpoint every third one, and another average beside it."""
    folder, other = tmp_path_factory.mktemp('run'), Other(9.0)
    trainer = make_trainer(
        [EMA('6ba', update_interval='1ba', buffers='copy')],
        callbacks=[other],
        max_duration='36ba',
        save_folder=str(folder / 'checkpoints'),
        save_interval='3ba',
        save_num_checkpoints_to_keep=-1,
        run_name='toy',
    )
    trainer.fit()
    trainer.close()
    return folder, other


def test_the_average_that_the_run_kept_comes_back_from_its_checkpoints(run):
    folder, _ = run
    found = reconstruct(folder, half_life='6ba')
    kept = load_average(folder / 'checkpoints/latest-rank0.pt')
    for name, tensor in kept.items():
        torch.testing.assert_close(found.state_dict[name], tensor, rtol=1e-4, atol=1e-5)
    assert found.predicted_error < 0.01
    assert (found.run_name, found.clock['ba']) == ('toy', 36)


def test_another_average_is_made_from_ordinary_checkpoints(run):
    folder, other = run
    assert other.shadow is not None
    found = reconstruct(folder, half_life='9ba', anyway=True)
    model = make_model()
    found.load_into(model)
    last = torch.load(folder / 'checkpoints/latest-rank0.pt', weights_only=False)['state']['model']
    error = move = 0.0
    for name, average in other.shadow.named_parameters():
        error += float((model.state_dict()[name] - average).square().sum())
        move += float((last[name] - average).square().sum())
    assert error**0.5 < 0.1 * move**0.5
    assert error**0.5 < 5 * found.predicted_error * move**0.5


def test_the_command_writes_the_average_and_says_how_good_it_is(run, call, tmp_path):
    out = tmp_path / 'average.safetensors'
    code, shown, err = call('reconstruct', run[0], out, '--half-life', '6ba')
    assert (code, err) == (0, '')
    for words in (
        'half_life=6ba',
        'predicted error',
        'of its distance from the weights',
        'made of ema',
        'made of weights',
    ):
        assert words in shown
    assert 'update_bn' in shown
    found = reconstruct(run[0], half_life='6ba')
    loaded = load_average(out, make_model())
    assert all(torch.equal(tensor, found.state_dict[name]) for name, tensor in loaded.items())
    assert 'half_life=6ba' in call('inspect', out)[1]


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        (['--half-life', '0.02dur'], 'cannot be made well'),
        (['--half-life', '6ba', '--at', '14ba'], "pass at='"),
        (['--power', '0.9'], 'power must lie in'),
        (['--schedule', 'cosin'], "Did you mean 'cosine'?"),
        ([], 'exactly one of'),
        (['--half-life', '5'], 'half_life takes the units'),
    ],
)
def test_the_command_refuses_in_a_line_and_writes_nothing(run, call, tmp_path, arguments, message):
    out = tmp_path / 'average.safetensors'
    code, shown, err = call('reconstruct', run[0], out, *arguments)
    assert (code, shown) == (2, '')
    assert message in err
    assert 'Traceback' not in err
    assert not out.exists()


def test_the_command_makes_it_anyway(run, call, tmp_path):
    out = tmp_path / 'average.safetensors'
    assert call('reconstruct', run[0], out, '--half-life', '0.02dur', '--anyway')[0] == 0
    assert out.exists()


def test_a_folder_without_anything_to_reconstruct_from(call, tmp_path):
    code, _, err = call('reconstruct', tmp_path, tmp_path / 'out.safetensors', '--power', '0.1')
    assert code == 2
    assert 'holds no' in err


def test_training_goes_on_with_a_reconstructed_average(run):
    found = reconstruct(run[0], half_life='6ba')
    ema, weights = EMA('6ba', update_interval='1ba', ema_start='0ba'), EveryBatch()
    trainer = make_trainer([ema], callbacks=[weights], max_duration='8ba')
    ema.ema_model = found.shadow(trainer.state.model)
    trainer.fit()
    trainer.close()
    assert ema.ema_model.num_updates == 36 + 8
    for name, average in ema.ema_model.named_parameters():
        expected = found.state_dict[name].clone()
        for batch in weights.seen:
            expected += (1 - 2 ** (-1 / 6)) * (batch[name] - expected)
        torch.testing.assert_close(average, expected)


def test_checkpoints_of_composers_own_ema_serve_once_its_half_life_is_told(tmp_path, call):
    trainer = make_trainer(
        [composer.algorithms.EMA(half_life='6ba', update_interval='1ba')],
        max_duration='36ba',
        save_folder=str(tmp_path),
        save_interval='3ba',
        save_num_checkpoints_to_keep=-1,
    )
    trainer.fit()
    trainer.close()
    out = tmp_path / 'average.safetensors'
    code, _, err = call('reconstruct', tmp_path, out, '--half-life', '3ba')
    assert code == 2
    assert 'does not save its half-life' in err
    code, shown, _ = call('reconstruct', tmp_path, out, '--half-life', '6ba', '--kept-half-life', '6ba')
    assert code == 0
    assert 'made of ema' in shown
