"""Snapshots of Composer runs: training is untouched, a resumed run goes on with its files, and where they go."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from composer import Callback, Trainer
from composer.loggers import InMemoryLogger
from composer.utils.parallelism import FSDP2Config, ParallelismConfig
from contract import SCRIPTS, free_port
from test_ema_skipped_steps import Overflow, scaled
from toy import averaging, bits, make_evaluator, make_trainer, snapshot

from composer_ema import EMA, SWA
from composer_ema.posthoc.history import read_run
from composer_ema.posthoc.moments import History, KeptAverage
from composer_ema.recipe import run, schema
from composer_ema.spans import ArgumentError
from composer_ema.sweep.finished_run import sweep_run
from composer_ema.sweep.search import Asked

# Runs of a few batches, as in conftest.py.
pytestmark = pytest.mark.filterwarnings('ignore:.* still hold.* of the initial weights:UserWarning')

FIVE, TEN = 'power=0.05', 'power=0.1'
QUARTERS = {'every': '0.25dur', 'halvings': 0}


class EveryBatch(Callback):
    """Keeps the training weights of every batch."""

    def __init__(self) -> None:
        self.weights: list[dict[str, torch.Tensor]] = []

    def batch_end(self, state, logger) -> None:
        self.weights.append({name: t.detach().clone() for name, t in state.model.state_dict().items()})


class KilledAt10(Callback):
    def batch_end(self, state, logger) -> None:
        if state.timestamp.batch == 10:
            raise KeyboardInterrupt


def trained(folder: Path, algorithm: Any = None, **arguments: Any) -> tuple[Trainer, EveryBatch]:
    """A run of 12 batches with a snapshot every third."""
    batches = EveryBatch()
    defaults = {
        'max_duration': '4ep',
        'run_name': 'run',
        'save_folder': str(folder / 'checkpoints'),
        'save_interval': '6ba',
        'save_filename': 'ba{batch}.pt',
        'save_num_checkpoints_to_keep': -1,
        'callbacks': [batches],
    }
    algorithm = EMA('3ba', snapshots=QUARTERS) if algorithm is None else algorithm
    trainer = make_trainer([algorithm], **{**defaults, **arguments})
    trainer.fit()
    trainer.close()
    return trainer, batches


def values(history: History) -> dict[tuple[str, int], dict[str, bytes]]:
    return {
        (each.label, len(each.weights)): bits({name: each.tensor(name) for name in each.names()})
        for each in history.kept
    }


def moments(history: History, label: str = FIVE) -> list[int]:
    return [len(each.weights) for each in history.kept if each.label == label]


def assert_made_of(history: History, weights: list[dict[str, torch.Tensor]]) -> None:
    """The weights of the updates make every kept tensor, up to float16, from the training weights at the updates."""
    for each in history.kept:
        for name in each.names():
            if weights[0][name].is_floating_point():
                made = weights[0][name].double()
                for weight, current in zip(each.weights[1:], weights[1:], strict=False):
                    made += weight * (current[name].double() - made)
                torch.testing.assert_close(each.tensor(name).double(), made, rtol=1e-3, atol=2e-3)


@pytest.fixture(scope='module')
def whole(tmp_path_factory) -> tuple[Path, Trainer, EveryBatch]:
    """The folder of an uninterrupted run, its Trainer, and its weights."""
    folder = tmp_path_factory.mktemp('whole')
    return folder, *trained(folder, save_interval='1ba')


def copied(whole: tuple[Path, Trainer, EveryBatch], folder: Path) -> Path:
    return Path(shutil.copytree(whole[0], folder / 'run'))


class TestFiles:
    def test_lie_beside_the_checkpoints_and_are_packed(self, whole):
        folder, _, _ = whole
        names = sorted(os.listdir(folder / 'snapshots'))
        assert names == [
            *(f'averages-{batch:08d}.safetensors' for batch in (3, 6, 9, 12)),
            'weights-00000001.safetensors',
            'weights-00000012.safetensors',
        ]
        history = read_run(folder)
        assert (history.run_name, history.max_duration, history.is_finished) == ('run', '4ep', True)
        assert not history.left_out

    def test_the_weights_of_the_updates_make_the_averages(self, whole):
        folder, _, batches = whole
        assert_made_of(read_run(folder), batches.weights)

    def test_the_clock_is_that_of_the_run(self, whole):
        history = read_run(whole[0])
        assert list(history.clocks['sp'])[:4] == [4, 8, 10, 14]
        assert list(history.clocks['tok'])[-1] == 120
        torch.testing.assert_close(torch.tensor(history.clocks['ep'][:3]), torch.tensor([1, 2, 3]).double() / 3)

    def test_updates_that_come_at_the_ends_of_epochs_are_followed(self, tmp_path):
        _, batches = trained(tmp_path, EMA('1ba', update_interval='1ep', snapshots={**QUARTERS, 'every': '1ep'}))
        history = read_run(tmp_path)
        assert list(history.clocks['ba']) == [3, 6, 9, 12]
        assert moments(history) == [2, 3, 4]
        first = next(each for each in history.kept if each.label == 'weights')
        torch.testing.assert_close(
            first.tensor('module.0.weight'), batches.weights[2]['module.0.weight'], rtol=1e-3, atol=1e-3
        )

    def test_the_last_weights_between_two_updates_are_no_average(self, tmp_path):
        _, batches = trained(tmp_path, EMA('1ba', update_interval='5ba', snapshots='5ba'))
        history = read_run(tmp_path)
        assert [(each.label, len(each.weights)) for each in history.kept][-1] == (TEN, 3)
        whole = history.completed({})
        assert torch.equal(whole['module.0.weight'], batches.weights[11]['module.0.weight'])

    def test_checkpoints_hold_the_hidden_averages_as_well(self, whole):
        history = read_run(whole[0], source='checkpoints', max_duration='4ep')
        assert not history.left_out
        assert set(history.labels) == {'weights', 'ema', FIVE, TEN}


class TestTraining:
    def test_a_step_that_was_left_out_is_no_update(self, tmp_path):
        batches = EveryBatch()
        trainer = make_trainer(
            [EMA('3ba', snapshots={'every': '1ba', 'folder': str(tmp_path)})], callbacks=[Overflow(2, 4), batches]
        )
        scaled(trainer).fit()
        history = read_run(tmp_path)
        made = [weights for number, weights in enumerate(batches.weights, 1) if number not in (2, 4)]
        assert list(history.clocks['ba']) == [1, 3, 5, 6]
        assert_made_of(history, made)

    def test_and_the_other_averages_are_the_same_to_the_bit(self, whole, tmp_path):
        _, trainer, _ = whole
        without, _ = trained(tmp_path, EMA('3ba'))
        assert snapshot(trainer) == snapshot(without)

    def test_hidden_averages_are_not_shown(self, tmp_path):
        algorithm = EMA('3ba', snapshots={'every': '0.5dur', 'power': 0.1, 'halvings': 0, 'folder': str(tmp_path)})
        logged = InMemoryLogger()
        make_trainer([algorithm], eval_dataloader=make_evaluator(), loggers=[logged]).fit()
        assert algorithm.labels == ('ema',)
        assert 'ema/num_updates' in logged.data
        assert not [name for name in logged.data if 'power' in name]
        assert moments(read_run(tmp_path), TEN) == [3, 6]

    def test_beside_swa_and_labels(self, tmp_path):
        algorithm = EMA({'short': '2ba', 'long': '6ba'}, snapshots={'every': '3ba', 'folder': str(tmp_path)})
        make_trainer([algorithm, SWA('3ba', update_interval='1ba')]).fit()
        assert moments(read_run(tmp_path)) == [3, 6]


class TestResumed:
    @pytest.mark.parametrize('batch', [5, 9])
    def test_run_leaves_what_an_uninterrupted_one_does(self, whole, tmp_path, batch):
        folder = copied(whole, tmp_path)
        trained(folder, load_path=str(folder / 'checkpoints' / f'ba{batch}.pt'), save_overwrite=True)
        one, two = read_run(whole[0]), read_run(folder)
        assert (two.run_id, two.left_out) == (one.run_id, [])
        for each, other in zip(one.kept, two.kept, strict=True):
            assert (each.label, list(each.weights)) == (other.label, list(other.weights))
        later = {key: value for key, value in values(one).items() if key[1] > batch}
        assert {key: value for key, value in values(two).items() if key[1] > batch} == later

    def test_run_with_other_settings_keeps_both_parts(self, whole, tmp_path):
        folder = copied(whole, tmp_path)
        algorithm = EMA('3ba', update_interval='2ba', snapshots={**QUARTERS, 'power': [0.1, 0.2]})
        trained(folder, algorithm, load_path=str(folder / 'checkpoints' / 'ba6.pt'), save_overwrite=True)
        history = read_run(folder)
        assert list(history.clocks['ba']) == [1, 2, 3, 4, 5, 6, 8, 10, 12]
        assert moments(history, FIVE) == [3, 6]
        assert moments(history, 'power=0.2') == [8, 9]
        joined = next(each for each in history.kept if each.label == 'power=0.2')
        assert list(joined.weights)[:7] == [1] * 7

    def test_run_that_takes_an_average_up_again_keeps_what_it_had_of_it(self, whole, tmp_path):
        folder = copied(whole, tmp_path)
        ten = {**QUARTERS, 'power': [0.1]}
        load = {'save_overwrite': True, 'save_interval': '1ba'}
        six, nine = (str(folder / 'checkpoints' / f'ba{batch}.pt') for batch in (6, 9))
        trained(folder, EMA('3ba', snapshots=ten), load_path=six, **load)
        trained(folder, load_path=nine, **load)
        history = read_run(folder)
        assert history.left_out == []
        assert moments(history, FIVE) == [3, 6, 12]
        assert moments(history, TEN) == [3, 6, 9, 12]
        early = {key: value for key, value in values(read_run(whole[0])).items() if key[1] <= 6}
        assert {key: value for key, value in values(history).items() if key[1] <= 6} == early
        six, twelve = (each.weights for each in history.kept if each.label == FIVE and len(each.weights) > 3)
        assert list(six) != list(twelve[:6])

    def test_run_that_wrote_none_before_begins_now(self, tmp_path):
        trained(tmp_path, EMA('3ba'), max_duration='2ep')
        trained(tmp_path, load_path=str(tmp_path / 'checkpoints' / 'ba6.pt'))
        history = read_run(tmp_path)
        assert list(history.clocks['ba']) == [7, 8, 9, 10, 11, 12]

    def test_state_in_the_checkpoint_is_plain_and_carries_the_identity(self, whole):
        folder, _, _ = whole
        saved = torch.load(folder / 'checkpoints' / 'ba7.pt', weights_only=False)
        state = dict(saved['state']['algorithms'])['EMA']['snapshots']
        assert state['run_id'] == read_run(folder).run_id
        assert state['updates']['clock']['ba'] == [[7, 1, 1]]
        torch.save(state, folder / 'plain.pt')
        assert torch.load(folder / 'plain.pt', weights_only=True) == state

    def test_damaged_state_is_refused_and_nothing_changed(self, whole):
        _, trainer, _ = whole
        algorithm = averaging(trainer)
        state, before = algorithm.state_dict(), snapshot(trainer)
        with pytest.raises(ValueError, match='the saved state of the snapshots is damaged'):
            algorithm.load_state_dict({**state, 'snapshots': {'run_id': 'x'}})
        assert snapshot(trainer) == before


class TestPlace:
    def test_without_any_is_refused_with_the_remedy(self):
        with pytest.raises(ArgumentError, match=r"Pass save_folder, or snapshots=\{'every': '0.25dur', 'folder': "):
            make_trainer([EMA('3ba', snapshots='0.25dur')]).fit()

    def test_in_a_folder_of_checkpoints_of_another_name_is_within_it(self, tmp_path):
        trained(tmp_path, save_folder=str(tmp_path / '{run_name}'))
        assert (tmp_path / 'run' / 'snapshots').is_dir()

    def test_of_another_run_is_refused_before_the_first_batch(self, whole, tmp_path):
        folder = copied(whole, tmp_path)
        shutil.rmtree(folder / 'checkpoints')
        with pytest.raises(ArgumentError, match=r'holds 6 snapshots of another run: run \('):
            trained(folder, run_name='other')
        trained(folder, run_name='other', save_overwrite=True)
        assert read_run(folder, source='snapshots').run_name == 'other'

    @pytest.mark.parametrize('batch', [None, 6])
    def test_keeps_every_file_where_a_checkpoint_in_the_way_stops_the_run(self, tmp_path, batch):
        with pytest.raises(KeyboardInterrupt):
            trained(tmp_path, save_interval='1ba', callbacks=[KilledAt10()])
        before = {path.name: path.read_bytes() for path in (tmp_path / 'snapshots').iterdir()}
        assert len(before) == 4
        load = {} if batch is None else {'load_path': str(tmp_path / 'checkpoints' / f'ba{batch}.pt')}
        with pytest.raises(FileExistsError):
            trained(tmp_path, **load)
        assert {path.name: path.read_bytes() for path in (tmp_path / 'snapshots').iterdir()} == before

    def test_of_a_recipe_is_its_run_folder_and_its_size_is_said(self, tmp_path):
        recipe = tmp_path / 'tiny.yaml'
        recipe.write_text(
            'max_duration: 2ep\nprogress_bar: false\ndevice: cpu\n'
            'model: {name: fashion_cnn, widths: [2, 2, 2, 2], num_classes: 3}\n'
            'data: {name: fake, image_size: [1, 17, 17], num_classes: 3, size: 32, eval_size: 8, batch_size: 8}\n'
            'optimizer: {name: adamw}\nalgorithms: {ema: {half_life: 2ba, snapshots: {every: 0.25dur, halvings: 0}}}\n'
            f'runs_folder: {tmp_path}\n'
        )
        said: list[Any] = []
        outcome = run.train(schema.load(recipe, []), said.append)
        folder = outcome.folder / 'snapshots'
        assert moments(read_run(outcome.folder)) == [2, 4, 6, 8]
        assert any(str(each).startswith('snapshots: 4 files of ') for each in said)
        assert outcome.snapshots is not None
        assert outcome.snapshots.startswith('snapshots: 6 files of ')
        assert outcome.snapshots.endswith(str(folder))


class TestArguments:
    @pytest.mark.parametrize(
        ('snapshots', 'message'),
        [
            ('0.0dur', 'snapshots must be above zero'),
            ('2dur', 'must come within the run'),
            ({'evry': '1ba'}, "takes no 'evry'. Did you mean 'every'"),
            ({'power': 0.1}, 'snapshots needs every'),
            ({'every': '1ba', 'power': [0.1, 0.1]}, 'power must name each width once'),
            ({'every': '1ba', 'halvings': -1}, 'halvings must be a whole number'),
        ],
    )
    def test_out_of_range_are_refused(self, snapshots, message):
        with pytest.raises(ArgumentError, match=message):
            EMA('3ba', snapshots=snapshots)

    def test_beside_a_function_are_refused(self):
        with pytest.raises(ArgumentError, match='snapshots keep power averages'):
            EMA(snapshots='0.1dur', avg_fn=lambda averaged, current, count: averaged)

    def test_halvings_in_a_unit_in_which_the_end_is_not_known_are_refused(self, tmp_path):
        with pytest.raises(ArgumentError, match='halvings=2 needs the length of the run in ba'):
            trained(tmp_path, EMA('3ba', snapshots={'every': '3ba', 'halvings': 2}))

    def test_are_shown_as_they_were_given(self):
        assert repr(EMA('3ba', snapshots='0.1dur')) == "EMA(half_life='3ba', snapshots='0.1dur')"
        assert 'halvings' in repr(EMA('3ba', snapshots={'every': '0.1dur', 'halvings': 3}))


def test_of_a_model_that_fsdp2_shards_are_those_of_a_whole_one_and_a_resumed_run_goes_on_with_them(
    whole, alone, tmp_path
):
    sharded: dict[str, Any] = {
        'parallelism_config': ParallelismConfig(fsdp2=FSDP2Config()),
        'save_filename': 'ep{epoch}-ba{batch}-rank{rank}.pt',
        'save_interval': '5ba',
    }
    trained(tmp_path, **sharded)
    one, two = read_run(whole[0]), read_run(tmp_path)
    assert values(two) == values(one)
    trained(tmp_path, load_path=str(tmp_path / 'checkpoints' / 'ep1-ba5'), save_overwrite=True, **sharded)
    resumed = read_run(tmp_path)
    assert (resumed.run_id, resumed.left_out) == (two.run_id, [])
    for each, other in zip(resumed.kept, two.kept, strict=True):
        assert (each.label, list(each.weights)) == (other.label, list(other.weights))
    assert {key: value for key, value in values(resumed).items() if key[1] > 5} == {
        key: value for key, value in values(two).items() if key[1] > 5
    }


@pytest.mark.slow
def test_of_two_processes_rank_0_writes_them_and_both_stop_at_a_folder_of_another_run(tmp_path):
    command = [sys.executable, '-m', 'composer.cli.launcher', '-n', '2', '--master_port', str(free_port())]
    finished = subprocess.run(
        [*command, str(SCRIPTS / 'snapshots_of_two.py'), str(tmp_path)],
        capture_output=True, text=True, timeout=300, env={**os.environ, 'OMP_NUM_THREADS': '1'},
    )  # fmt: skip
    assert finished.returncode == 0, finished.stdout[-3000:] + finished.stderr[-6000:]
    one, two = read_run(tmp_path / 'whole'), read_run(tmp_path / 'resumed')
    assert moments(one) == moments(two) == [2, 4, 6]
    assert list(one.clocks['sp']) == [4, 8, 12, 16, 20, 24]
    assert values(one).keys() == values(two).keys()
    assert values(one)[FIVE, 6] == values(two)[FIVE, 6]
    for rank in (0, 1):
        assert 'snapshots of another run' in (tmp_path / f'refused{rank}.txt').read_text()


SHARDED = """
run_name: shared
max_duration: 4ep
eval_interval: 0
save_interval: 2ep
seed: 1
progress_bar: false
device: cpu
model: {name: mnist1d_mlp}
data: {name: mnist1d, num_samples: 600, batch_size: 40, validation_split: 0.2}
optimizer: {name: adamw, lr: 0.01}
algorithms:
  ema: {half_life: 6ba, snapshots: 0.1dur}
parallelism_config: {fsdp2: {}}
"""


def train_on(count: int, recipe: Path, *overrides: str) -> None:
    command = [sys.executable, '-m', 'composer.cli.launcher', '-n', str(count), '--master_port', str(free_port())]
    finished = subprocess.run(
        [*command, '-m', 'composer_ema.cli', 'train', recipe.name, *overrides],
        capture_output=True, text=True, timeout=300, cwd=recipe.parent, env={**os.environ, 'OMP_NUM_THREADS': '1'},
    )  # fmt: skip
    assert finished.returncode == 0, finished.stdout[-3000:] + finished.stderr[-6000:]


def relative_distance(one: KeptAverage, other: KeptAverage, last: KeptAverage) -> float:
    """How far apart two averages are, as a share of the distance of the first from the last weights."""

    def distance(first: KeptAverage, second: KeptAverage) -> float:
        squares = ((first.tensor(name).double() - second.tensor(name).double()).square() for name in first.names())
        return sum(float(each.sum()) for each in squares) ** 0.5

    return distance(one, other) / distance(one, last)


@pytest.mark.slow
def test_of_two_processes_that_share_a_model_go_on_with_four_and_are_swept_in_one(tmp_path):
    recipe = tmp_path / 'shared.yaml'
    recipe.write_text(SHARDED)
    folder = tmp_path / 'runs' / 'shared'
    train_on(2, recipe)
    of_two = read_run(folder)
    train_on(4, recipe, f'load_path={folder / "checkpoints" / "ep2-ba20"}', 'save_overwrite=true')
    history = read_run(folder)
    assert (history.run_id, history.left_out) == (of_two.run_id, [])
    assert moments(history) == moments(of_two) == [4, 8, 12, 16, 20, 24, 28, 32, 36, 38, 39, 40]
    # The checkpoints hold the same averages, which each rank saved a share of.
    kept = {(each.label, len(each.weights)): each for each in history.kept}
    saved = {(each.label, len(each.weights)): each for each in read_run(folder, source='checkpoints').kept}
    for key in [(label, batch) for label in (FIVE, TEN) for batch in (20, 40)]:
        assert relative_distance(saved[key], kept[key], kept['weights', 40]) < 3e-4
    swept = sweep_run(folder, Asked(values=['0.3dur'], num_batches=1))
    assert [trial.value for trial in swept.trials] == pytest.approx([0.15, 0.3])
    assert all(trial.is_reliable(0.05) for trial in swept.trials)
