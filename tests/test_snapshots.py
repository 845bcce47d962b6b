"""Snapshots in any PyTorch loop: what they hold, what a kill and a resume leave, and whose they are."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import plain
import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from plain import Net
from torch import Tensor, nn

from composer_ema import CheckpointError, Snapshots
from composer_ema.files import readable
from composer_ema.posthoc import snapshot_files, snapshot_folder
from composer_ema.posthoc.history import read_run
from composer_ema.posthoc.moments import History
from composer_ema.posthoc.open_run import OpenRun
from composer_ema.posthoc.tensor_files import TensorFile
from composer_ema.spans import ArgumentError

pytestmark = plain.STRICT
KEY = 'composer_ema_snapshot'
FIVE, TEN = 'power=0.05', 'power=0.1'


class Run:
    """Training of a small net with snapshots every fifth step."""

    def __init__(self, folder: Path, model: nn.Module | None = None, **arguments) -> None:
        self.model = model or Net()
        self.optimizer = plain.sgd(self.model)
        defaults: dict[str, Any] = {'every': 5, 'num_steps': 20, 'halvings': 0, **arguments}
        self.snapshots = Snapshots(self.model, folder, **defaults)
        #: The training weights after every step.
        self.weights: list[dict[str, Tensor]] = []

    def steps(self, *numbers: int) -> Run:
        for number in range(*numbers):
            plain.train(self.model, self.optimizer, range(number, number + 1))
            self.snapshots.update(num_samples=8)
            self.weights.append(plain.weights(self.model))
        return self

    def state(self) -> dict:
        return plain.saved(
            {
                'model': self.model.state_dict(),
                'optimizer': self.optimizer.state_dict(),
                'snapshots': self.snapshots.state_dict(),
            }
        )

    def load(self, state: dict) -> Run:
        self.model.load_state_dict(state['model'])
        self.optimizer.load_state_dict(state['optimizer'])
        self.snapshots.load_state_dict(state['snapshots'])
        return self


def tensors(history: History) -> dict[tuple[str, int], dict[str, Tensor]]:
    return {
        (each.label, len(each.weights)): {name: each.tensor(name) for name in each.names()} for each in history.kept
    }


def distance(one: dict[str, Tensor], other: dict[str, Tensor], floating_only: bool = True) -> float:
    names = [name for name, tensor in one.items() if tensor.is_floating_point() or not floating_only]
    return sum(float((one[name].double() - other[name].double()).square().sum()) for name in names) ** 0.5


def assert_made_of(history: History, weights: list[dict[str, Tensor]], **tolerances) -> None:
    """The weights of the updates make every kept tensor from the training weights of every step."""
    for each in history.kept:
        for name in each.names():
            if weights[0][name].is_floating_point():
                made = weights[0][name].double()
                for weight, current in zip(each.weights[1:], weights[1:], strict=False):
                    made = made + weight * (current[name].double() - made)
                torch.testing.assert_close(each.tensor(name).double(), made, **tolerances)


class TestFiles:
    def test_while_the_run_goes_on_they_hold_the_averages_to_the_bit(self, tmp_path):
        run = Run(tmp_path).steps(10)
        kept = tensors(read_run(tmp_path))
        assert list(kept) == [('weights', 1), (FIVE, 5), (TEN, 5), (FIVE, 10), (TEN, 10)]
        for label, shadow in run.snapshots.shadows.items():
            state = shadow.state_dict()
            assert plain.same_bits(kept[label, 10], dict(sorted({**state['parameters'], **state['buffers']}.items())))
        assert plain.same_bits(kept['weights', 1], dict(sorted(run.weights[0].items())))

    def test_the_weights_of_the_updates_make_the_averages(self, tmp_path):
        run = Run(tmp_path).steps(20)
        assert_made_of(read_run(tmp_path), run.weights, rtol=1e-5, atol=1e-6)

    def test_statistics_of_batch_norm_are_averaged_and_counters_copied(self, tmp_path):
        Run(tmp_path).steps(10)
        history = read_run(tmp_path)
        last = history.kept[-1]
        assert history.statistics == {'norm.running_mean', 'norm.running_var'}
        assert last.tensor('norm.num_batches_tracked').item() == 10
        assert last.tensor('norm.running_mean').abs().sum() > 0

    def test_which_tensors_are_averaged_is_known_without_reading_them(self, tmp_path, monkeypatch):
        Run(tmp_path).steps(20).snapshots.finish()
        opened = OpenRun(tmp_path)
        monkeypatch.setattr(TensorFile, 'tensor', None)
        assert opened.names == ['first.weight', 'last.weight', 'norm.running_mean', 'norm.running_var']
        last = opened.kept[-1]
        assert last.outline('first.weight') == (torch.float32, (4, 3))
        assert last.outline('norm.num_batches_tracked') == (torch.int64, ())

    def test_the_clock_counts_steps_and_samples(self, tmp_path):
        Run(tmp_path).steps(10)
        history = read_run(tmp_path)
        assert list(history.clocks['ba']) == [*range(1, 11)]
        assert list(history.clocks['sp']) == [*range(8, 88, 8)]
        assert (history.max_duration, history.is_finished, history.run_name) == ('20ba', False, tmp_path.name)

    def test_frozen_and_tied_weights_are_in_the_whole_state(self, tmp_path):
        model = Net()
        model.last.weight.requires_grad_(False)
        model.tied = model.first
        run = Run(tmp_path, model).steps(7)
        history = read_run(tmp_path)
        whole = history.completed({})
        assert whole.keys() == model.state_dict().keys()
        assert torch.equal(whole['last.weight'], model.last.weight)
        assert whole['tied.weight'] is whole['first.weight']
        assert 'last.weight' not in history.kept[-1].names()
        run.snapshots.finish()
        model.load_state_dict(read_run(tmp_path).completed({}))

    def test_more_of_them_come_towards_the_end_with_halvings(self, tmp_path):
        Run(tmp_path / 'three', every='0.5dur', num_steps=32, halvings=3).steps(32)
        moments = [len(each.weights) for each in read_run(tmp_path / 'three').kept if each.label == FIVE]
        assert moments == [16, 24, 28, 30, 32]

    def test_by_default_the_last_interval_is_halved_five_times_if_the_end_is_known(self, tmp_path):
        Run(tmp_path / 'known', every=32, num_steps=64, halvings=None).steps(64)
        Run(tmp_path / 'unknown', every=32, num_steps=None, halvings=None).steps(64)
        for name, expected in (('known', [32, 48, 56, 60, 62, 63, 64]), ('unknown', [32, 64])):
            moments = [len(each.weights) for each in read_run(tmp_path / name).kept if each.label == FIVE]
            assert moments == expected

    def test_a_half_precision_model_keeps_its_averages_in_float32(self, tmp_path):
        model = Net().bfloat16()
        snapshots = Snapshots(model, tmp_path, every=1)
        for _ in range(3):
            nn.init.normal_(model.first.weight)
            snapshots.update()
        snapshots.finish()
        kept = tensors(read_run(tmp_path))
        assert kept[FIVE, 3]['first.weight'].dtype == torch.float32
        assert kept['weights', 3]['first.weight'].dtype == torch.bfloat16


class TestPacking:
    def test_takes_half_the_space_and_a_fiftieth_of_a_percent_of_precision(self, tmp_path):
        model = nn.Linear(200, 200)
        snapshots = Snapshots(model, tmp_path, every=2)
        torch.manual_seed(0)
        for _ in range(6):
            with torch.no_grad():
                model.weight += torch.randn(200, 200)
            snapshots.update()
        full, sizes = tensors(read_run(tmp_path)), {path: path.stat().st_size for path in tmp_path.iterdir()}
        snapshots.finish()
        history = read_run(tmp_path)
        assert history.is_finished
        last = {name: value for name, value in plain.weights(model).items()}
        for key, averages in full.items():
            error = distance(tensors(history)[key], averages) / distance(averages, last)
            assert error < 2.5e-4
        for path, size in sizes.items():
            assert path.stat().st_size < 0.53 * size

    def test_the_last_weights_stay_in_full(self, tmp_path):
        run = Run(tmp_path).steps(20)
        run.snapshots.finish()
        assert plain.same_bits(
            tensors(read_run(tmp_path))['weights', 20], dict(sorted(plain.weights(run.model).items()))
        )

    def test_the_last_weights_are_those_of_training_while_an_average_stands_in_the_model(self, tmp_path):
        run = Run(tmp_path).steps(20)
        with run.snapshots.shadows[TEN].swapped(run.model):
            assert not plain.same_bits(plain.weights(run.model), run.weights[-1])
            run.snapshots.finish()
        assert plain.same_bits(tensors(read_run(tmp_path))['weights', 20], dict(sorted(run.weights[-1].items())))

    def test_rounding_tells_the_error(self, tmp_path):
        run = Run(tmp_path).steps(20)
        exact = tensors(read_run(tmp_path))[FIVE, 10]
        run.snapshots.finish()
        kept = next(each for each in read_run(tmp_path).kept if (each.label, len(each.weights)) == (FIVE, 10))
        names = [name for name in kept.names() if exact[name].is_floating_point()]
        squares = torch.cat([(kept.tensor(name) - exact[name]).double().square().flatten() for name in names])
        assert 0.3 < kept.rounding() / float(squares.mean()) < 3

    @given(scale=st.floats(-40, 30), base=st.floats(-1, 1))
    @settings(max_examples=25, deadline=None)
    def test_differences_of_any_size_keep_eleven_bits(self, tmp_path_factory, scale, base):
        folder = tmp_path_factory.mktemp('files')
        torch.manual_seed(0)
        model = nn.Linear(8, 8, bias=False).double()
        snapshots = Snapshots(model, folder, every=1, power=0.1)
        moved = torch.randn(8, 8, dtype=torch.float64) * 2.0**scale
        for weights in (moved, moved, torch.zeros(8, 8, dtype=torch.float64)):
            model.weight.data.copy_(weights + base)
            snapshots.update()
        exact = tensors(read_run(folder))[TEN, 2]['weight'] - base
        snapshots.finish()
        error = tensors(read_run(folder))[TEN, 2]['weight'] - base - exact
        assert bool((error.abs() <= exact.abs() * 2.0**-11 + 1e-15).all())
        shutil.rmtree(folder)

    def test_what_is_not_finite_stays_in_full(self, tmp_path):
        model = nn.Linear(2, 2, bias=False)
        snapshots = Snapshots(model, tmp_path, every=1)
        for step, value in enumerate((1.0, float('nan'), 2.0)):
            nn.init.constant_(model.weight, value)
            snapshots.update()
            if step == 1:
                snapshots.shadows[FIVE].load_state_dict(snapshots.shadows[TEN].state_dict())
        snapshots.finish()
        assert bool(tensors(read_run(tmp_path))[TEN, 2]['weight'].isnan().all())
        assert TensorFile(tmp_path / 'averages-00000002.safetensors').outline(f'{TEN}/weight')[0] == torch.float32

    def test_averages_of_16_bits_stay_as_they_are(self, tmp_path):
        run = Run(tmp_path, dtype='bfloat16').steps(20)
        full = tensors(read_run(tmp_path))
        run.snapshots.finish()
        packed = tensors(read_run(tmp_path))
        averages = [key for key in full if key[0] != 'weights']
        assert all(plain.same_bits(full[key], packed[key]) for key in averages)


class TestKilled:
    @pytest.mark.parametrize('write', range(1, 8))
    def test_at_any_write_every_file_can_still_be_read(self, tmp_path, monkeypatch, write):
        count = 0

        def replace(self: Path, target: Path) -> Path:
            nonlocal count
            count += 1
            if count == write:
                raise KeyboardInterrupt
            return original(self, target)

        run = Run(tmp_path).steps(20)
        before = tensors(read_run(tmp_path))
        original = Path.replace
        monkeypatch.setattr(Path, 'replace', replace)
        if write <= 6:  # the last weights, and the five others in turn
            with pytest.raises(KeyboardInterrupt):
                run.snapshots.finish()
        else:
            run.snapshots.finish()
        monkeypatch.undo()
        history = read_run(tmp_path)
        assert not history.left_out
        after = tensors(history)
        assert after.keys() >= before.keys()
        for key, averages in before.items():
            assert distance(after[key], averages) < 1e-3 * (1 + distance(averages, plain.weights(run.model)))
        assert not [path for path in tmp_path.iterdir() if path.name.startswith('.')]

    def test_finishing_again_packs_what_a_kill_left_in_full(self, tmp_path, monkeypatch):
        run = Run(tmp_path).steps(20)
        monkeypatch.setattr(snapshot_folder, 'pack', lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            run.snapshots.finish()
        monkeypatch.undo()
        run.snapshots.finish()
        packings = [snapshot_files.SnapshotFile(path).header.packing for path in snapshot_files.files_in(tmp_path)]
        assert packings.count(None) == 1

    @pytest.mark.slow
    @pytest.mark.parametrize('delay', [0.0, 0.05])
    def test_by_the_system_leaves_a_readable_folder(self, tmp_path, delay):
        script = f"""
            import torch
            from torch import nn
            from composer_ema import Snapshots
            model = nn.Linear(1000, 300)
            snapshots = Snapshots(model, {str(tmp_path)!r}, every=1, num_steps=1000)
            while True:
                for _ in range(5):
                    with torch.no_grad():
                        model.weight += torch.randn_like(model.weight)
                    snapshots.update()
                print('.', flush=True)
                snapshots.finish()
        """
        environment = {**os.environ, 'PYTHONPATH': str(Path(snapshot_files.__file__).parents[2])}
        with subprocess.Popen(
            [sys.executable, '-c', textwrap.dedent(script)], stdout=subprocess.PIPE, env=environment
        ) as process:
            assert process.stdout is not None
            process.stdout.readline()
            process.stdout.readline()
            time.sleep(delay)
            process.send_signal(signal.SIGKILL)
        history = read_run(tmp_path)
        assert not history.left_out
        assert len(history.kept) > 5
        for each in history.kept:
            for name in each.names():
                assert bool(each.tensor(name).isfinite().all())


class TestResumed:
    def test_a_resumed_run_equals_an_uninterrupted_one(self, tmp_path):
        whole = Run(tmp_path / 'whole').steps(20)
        first = Run(tmp_path / 'parts').steps(12)
        state = first.state()
        first.steps(12, 14)
        second = Run(tmp_path / 'parts', Net(seed=3), run_name='another name').load(state).steps(12, 20)
        for run in (whole, second):
            run.snapshots.finish()
        one, two = read_run(tmp_path / 'whole'), read_run(tmp_path / 'parts')
        assert two.run_name == 'parts'
        for unit, times in one.clocks.items():
            assert list(times) == list(two.clocks[unit])
        for each, other in zip(one.kept, two.kept, strict=True):
            assert (each.label, list(each.weights)) == (other.label, list(other.weights))
        assert all(plain.same_bits(each, tensors(two)[key]) for key, each in tensors(one).items())

    def test_files_of_later_moments_are_removed(self, tmp_path):
        run = Run(tmp_path).steps(7)
        state = run.state()
        run.steps(7, 20)
        Run(tmp_path, Net(seed=3)).load(state).steps(7, 8)
        assert [len(each.weights) for each in read_run(tmp_path).kept] == [1, 5, 5]

    def test_files_that_were_packed_against_removed_weights_are_in_full_again(self, tmp_path):
        run = Run(tmp_path).steps(12)
        state = run.state()
        run.steps(12, 20)
        exact = tensors(read_run(tmp_path))
        run.snapshots.finish()
        packed = tensors(read_run(tmp_path))
        resumed = Run(tmp_path, Net(seed=3)).load(state).steps(12, 13)
        assert 'weights-00000020.safetensors' not in os.listdir(tmp_path)
        again = tensors(read_run(tmp_path))
        assert list(again) == [('weights', 1), (FIVE, 5), (TEN, 5), (FIVE, 10), (TEN, 10)]
        assert all(plain.same_bits(each, packed[key]) for key, each in again.items())
        resumed.steps(13, 20).snapshots.finish()
        for key, each in tensors(read_run(tmp_path)).items():
            if key in exact:
                assert distance(each, exact[key]) <= 1e-3 * distance(exact[key], resumed.weights[-1])

    def test_a_run_that_goes_on_after_its_end_keeps_its_files(self, tmp_path):
        run = Run(tmp_path).steps(12)
        run.snapshots.finish()
        assert read_run(tmp_path).is_finished
        run.steps(12, 17)
        assert not read_run(tmp_path).is_finished
        run.snapshots.finish()
        history = read_run(tmp_path)
        assert [len(each.weights) for each in history.kept if each.label == 'weights'] == [1, 12, 17]
        assert_made_of(history, run.weights, rtol=1e-3, atol=1e-4)

    def test_training_is_the_same_with_and_without(self, tmp_path):
        run = Run(tmp_path).steps(20)
        model = Net()
        plain.train(model, plain.sgd(model), range(20))
        assert plain.same_bits(plain.weights(run.model), plain.weights(model))

    def test_no_random_number_of_the_training_is_drawn(self, tmp_path):
        model = Net()
        before = torch.get_rng_state()
        Snapshots(model, tmp_path, every=5)
        assert torch.equal(torch.get_rng_state(), before)

    def test_a_state_of_something_else_is_refused_and_nothing_changed(self, tmp_path):
        run = Run(tmp_path).steps(3)
        before = run.state()
        with pytest.raises(ValueError, match='has format version None'):
            run.snapshots.load_state_dict({'num_steps': 3})
        with pytest.raises(ValueError, match=r"the state holds the averages 'power=0\.2'"):
            run.snapshots.load_state_dict(Run(tmp_path, power=0.2).snapshots.state_dict())
        held = json.loads(before['snapshots']['writer'])
        damaged = [{**held, 'last_written': clock} for clock in ({'ba': math.nan}, {'ba': -1}, {'sp': 24}, [3])]
        for broken in (*map(json.dumps, ({'run_name': 'x'}, *damaged)), '{', {'run_name': 'x'}, None):
            with pytest.raises(ValueError, match='the saved state of the snapshots is damaged'):
                run.snapshots.load_state_dict({**before['snapshots'], 'writer': broken})
        plain.assert_same(run.state(), before)


class TestIdentity:
    def test_the_folder_of_another_run_is_refused(self, tmp_path):
        Run(tmp_path, run_name='one').steps(5)
        with pytest.raises(ArgumentError, match=r'holds 2 snapshots of another run: one \('):
            Run(tmp_path, run_name='two').steps(1)
        Run(tmp_path, run_name='two', overwrite=True).steps(1)
        assert read_run_name(tmp_path) == 'two'

    def test_a_start_that_was_killed_before_its_first_averages_makes_room_for_the_next_of_its_name(self, tmp_path):
        Run(tmp_path).steps(4)
        Run(tmp_path).steps(5)
        assert [len(each.weights) for each in read_run(tmp_path).kept] == [1, 5, 5]

    def test_a_start_that_was_killed_later_is_kept(self, tmp_path):
        Run(tmp_path).steps(8)
        before = sorted(os.listdir(tmp_path))
        with pytest.raises(ArgumentError, match='Give another folder, or remove them'):
            Run(tmp_path).steps(1)
        assert sorted(os.listdir(tmp_path)) == before

    def test_what_a_kill_left_unfinished_is_cleared_at_the_next_update(self, tmp_path):
        run = Run(tmp_path).steps(7)
        unfinished = tmp_path / '.averages-00000010.safetensors.x1y2_3ab.unfinished'
        kept = tmp_path / '.notes.safetensors.x1y2'
        for path in (unfinished, kept):
            path.write_bytes(b'half')
        Run(tmp_path).load(run.state()).steps(7, 8)
        assert (unfinished.exists(), kept.exists()) == (False, True)

    def test_a_run_that_has_ended_does_not(self, tmp_path):
        Run(tmp_path).steps(8).snapshots.finish()
        with pytest.raises(ArgumentError, match='Give another folder, or remove them'):
            Run(tmp_path).steps(1)

    def test_files_of_another_run_are_named_and_left_out(self, tmp_path):
        Run(tmp_path / 'one').steps(15)
        Run(tmp_path / 'two').steps(10)
        name = 'averages-00000015.safetensors'
        shutil.copy(tmp_path / 'one' / name, tmp_path / 'two' / name)
        os.utime(tmp_path / 'two' / name, (0, 0))
        history = read_run(tmp_path / 'two')
        assert history.num_moments == 10
        (reason,) = history.left_out
        assert f'{name} belongs to another run: one (' in reason

    def test_files_of_a_course_that_was_left_are_named_and_left_out(self, tmp_path):
        run = Run(tmp_path).steps(6)
        state = run.state()
        run.steps(6, 10)
        stale = (tmp_path / 'averages-00000010.safetensors').read_bytes()
        resumed = Run(tmp_path).load(state)
        resumed.snapshots._num_samples += 1  # as if batches were larger now
        resumed.steps(6, 15)
        (tmp_path / 'averages-00000010.safetensors').write_bytes(stale)
        os.utime(tmp_path / 'averages-00000010.safetensors', (0, 0))
        history = read_run(tmp_path)
        assert [len(each.weights) for each in history.kept] == [1, 5, 5, 15, 15]
        (reason,) = history.left_out
        assert 'is of a course that the run left' in reason

    @pytest.mark.parametrize('kept', [0, 4, 100, -1])
    def test_a_truncated_file_is_named_and_the_others_are_used(self, tmp_path, kept):
        Run(tmp_path).steps(10)
        path = tmp_path / 'averages-00000005.safetensors'
        path.write_bytes(path.read_bytes()[:kept])
        history = read_run(tmp_path)
        assert [len(each.weights) for each in history.kept] == [1, 10, 10]
        (reason,) = history.left_out
        assert f'{path} cannot be read: it is truncated or damaged' in reason

    @pytest.mark.parametrize('name', ['averages-00000005', 'weights-00000010'])
    @pytest.mark.parametrize('is_in_header', [False, True])
    def test_a_flipped_bit_is_found_when_the_file_is_read(self, tmp_path, name, is_in_header):
        Run(tmp_path, run_name='walk').steps(10).snapshots.finish()
        tensors(read_run(tmp_path))
        path = tmp_path / f'{name}.safetensors'
        content = bytearray(path.read_bytes())
        content[content.index(b'walk') if is_in_header else -1] ^= 1
        path.write_bytes(content)
        damaged = [each for each in read_run(tmp_path).kept if each.path == path]
        assert damaged
        for each in damaged:
            with pytest.raises(CheckpointError, match=f'{name}.safetensors is damaged: it is not what was written'):
                each.tensor(each.names()[0])

    def test_a_header_of_a_newer_release_or_of_nothing_known_is_told(self, tmp_path):
        Run(tmp_path).steps(5)
        path = tmp_path / 'averages-00000005.safetensors'
        content = path.read_bytes()
        path.write_bytes(content.replace(rb'{\"version\":1', rb'{\"version\":9'))
        with pytest.raises(CheckpointError, match='has format version 9'):
            read_run(tmp_path)
        path.write_bytes(content.replace(rb'\"run_id\"', rb'\"run_ix\"'))
        with pytest.raises(CheckpointError, match='its header is damaged'):
            read_run(tmp_path)

    def test_differences_without_their_base_are_told(self, tmp_path):
        Run(tmp_path).steps(10).snapshots.finish()
        (tmp_path / 'weights-00000010.safetensors').unlink()
        with pytest.raises(CheckpointError, match=r'holds differences to .*weights-00000010\.safetensors, which'):
            read_run(tmp_path)


def read_run_name(folder: Path) -> str:
    (path, *_) = snapshot_files.files_in(folder)
    return snapshot_files.SnapshotFile(path).header.identity.run_name


class TestArguments:
    @pytest.mark.parametrize(
        ('arguments', 'message'),
        [
            ({'every': '0.05dur', 'num_steps': None, 'halvings': None}, 'whose length is not known'),
            ({'every': '1ep'}, 'every takes the units'),
            ({'every': '2dur'}, 'every must be at most the whole run'),
            ({'every': 0}, 'every must be above zero'),
            ({'num_steps': 0}, 'num_steps must be a whole number of at least 1'),
            ({'halvings': -1}, 'halvings must be a whole number of at least 0'),
            ({'every': '100sp', 'halvings': 1}, 'needs the length of the run in sp'),
            ({'power': [0.1, 0.1]}, 'power must name each width once'),
            ({'power': [0.5]}, 'power must lie in'),
            ({'avg_fn': lambda a, b, n: a}, 'avg_fn has no effect on snapshots'),
        ],
    )
    def test_out_of_range_are_refused(self, tmp_path, arguments, message):
        with pytest.raises(ValueError, match=message):
            Run(tmp_path / 'none', **arguments)
        assert not (tmp_path / 'none').exists()

    def test_of_the_wrong_type_are_refused(self, tmp_path):
        with pytest.raises(TypeError, match='power must be a number, or a list of them'):
            Run(tmp_path, power='0.1')
        with pytest.raises(TypeError, match="Did you mean 'halvings'"):
            Run(tmp_path, halving=2)

    def test_a_model_with_tensors_that_files_cannot_hold_is_refused(self, tmp_path):
        model = nn.Linear(2, 2)
        model.register_buffer('sparse', torch.eye(2).to_sparse())
        with pytest.raises(ValueError, match=r'cannot be written as safetensors.*sparse'):
            Snapshots(model, tmp_path, every=5)

    def test_finish_before_any_update_is_refused(self, tmp_path):
        with pytest.raises(RuntimeError, match='no update was made'):
            Run(tmp_path).snapshots.finish()

    def test_the_disk_use_is_said_beforehand_and_at_the_end(self, tmp_path, caplog):
        with caplog.at_level('INFO', logger='composer_ema.posthoc'):
            run = Run(tmp_path).steps(20)
            run.snapshots.finish()
        before, after = (record.getMessage() for record in caplog.records if 'posthoc' in record.name)
        assert before.startswith('snapshots: 4 files of 2')
        total = sum(path.stat().st_size for path in tmp_path.iterdir())
        assert after == f'snapshots: 6 files of {readable(total)} in {tmp_path}'


def all_weights(value: float) -> Callable[[dict], Any]:
    def damage(header: dict) -> None:
        for pieces in header['updates']['weights'].values():
            pieces[:] = [{'count': header['updates']['count'], 'weight': value}]

    return damage


def of_many_updates(header: dict) -> None:
    updates = header['updates']
    updates['count'] = 10**12
    updates['clock'] = {unit: [[10**12, 1, 1]] for unit in updates['clock']}
    updates['weights'] = {label: [{'count': 10**12, 'weight': 1.0}] for label in updates['weights']}


def packed_as(**fields: Any) -> Callable[[dict], Any]:
    def damage(header: dict) -> None:
        packing = header['packing']
        for name, value in fields.items():
            packing[name] = dict.fromkeys(packing[name], value) if isinstance(packing[name], dict) else value

    return damage


@pytest.mark.parametrize(
    'damage',
    [
        of_many_updates,
        all_weights(float('nan')),
        all_weights(7),
        lambda header: '{"version": 1, "x": ' + '[' * 10**5 + ']' * 10**5 + '}',
        lambda header: header['clock'].pop('ba'),
        lambda header: header['clock'].update(ba=float('nan')),
        lambda header: header.update(max_duration='soon'),
        lambda header: header.update(statistics=[['a']]),
        lambda header: header.update(aliases={'a': 1}),
        packed_as(base='averages-00000010.safetensors'),  # itself
        packed_as(base='../weights-00000020.safetensors'),
        packed_as(exponents=10**6),
        packed_as(exponents=0.5),
        packed_as(dtypes='load'),
        packed_as(same=[1]),
    ],
)
def test_a_file_whose_header_cannot_be_true_is_left_out_and_the_others_are_read(tmp_path, damage):
    Run(tmp_path).steps(20).snapshots.finish()
    path = tmp_path / 'averages-00000010.safetensors'
    metadata, held = TensorFile(path).metadata, safetensors.torch.load_file(path)
    header = json.loads(metadata[KEY])
    text = damage(header)
    safetensors.torch.save_file(held, path, {**metadata, KEY: text if isinstance(text, str) else json.dumps(header)})
    history = read_run(tmp_path)
    assert [len(each.weights) for each in history.kept if each.label == FIVE] == [5, 15, 20]
    (reason,) = history.left_out
    assert str(path) in reason
