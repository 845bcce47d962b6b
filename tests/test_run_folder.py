"""The folder of a run: one process group works in it at a time, and a refused command leaves every file as it was."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import hostile_starts
import pytest
import yaml
from composer import Callback
from composer.utils import dist
from test_recipe import TINY, quiet

from composer_ema.files import write_beside
from composer_ema.pictures import conclusion
from composer_ema.recipe import folders, schema
from composer_ema.recipe.arguments import RecipeError
from composer_ema.recipe.metrics import Report
from composer_ema.recipe.run import Outcome, train
from composer_ema.run_folder import lock
from composer_ema.run_folder.folder import RunFolder
from composer_ema.run_folder.lock import LOCK_FILE, InUseError, Lock
from composer_ema.run_folder.recorder import Recorder

HOLD = """
import os, sys, time
from pathlib import Path
from composer_ema.run_folder.lock import Lock
held = Lock(Path(sys.argv[1]))
if os.fork() == 0:  # as a worker of a data loader, which outlives its parent
    print('held', flush=True)
time.sleep(30)
"""


def contents(folder: Path) -> dict[str, bytes | str | None]:
    """Every path below a folder, with the bytes of files and the targets of links."""

    def content(path: Path) -> bytes | str | None:
        if path.is_symlink():
            return os.readlink(path)
        return path.read_bytes() if path.is_file() else None

    return {str(path.relative_to(folder)): content(path) for path in sorted(folder.rglob('*'))}


def lines_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / 'metrics.jsonl').read_text().splitlines()]


@pytest.fixture(scope='module')
def finished(tmp_path_factory) -> Path:
    """A folder with a recipe and two finished runs of two epochs, a and b, of other seeds."""
    folder = tmp_path_factory.mktemp('finished')
    recipe = folder / 'tiny.yaml'
    recipe.write_text(yaml.safe_dump({**TINY, 'runs_folder': str(folder / 'runs'), 'save_interval': '3ba'}))
    for name, seed in (('a', 1), ('b', 2)):
        train(schema.load(recipe, [f'run_name={name}', f'seed={seed}']), quiet)
    return folder


@pytest.fixture
def runs(finished, tmp_path) -> Path:
    """A copy of them, to be changed."""
    shutil.copytree(finished / 'runs', tmp_path / 'runs', symlinks=True)
    return tmp_path / 'runs'


@pytest.fixture
def load(finished, runs) -> Callable[..., schema.Recipe]:
    return lambda *overrides: schema.load(finished / 'tiny.yaml', [f'runs_folder={runs}', *overrides])


@pytest.fixture
def held(runs) -> Iterator[Path]:
    """Run a, in which another process seems to work."""
    taken = Lock(runs / 'a')
    yield runs / 'a'
    taken.release()


class Broken(Callback):
    """Fails at an event, as data that cannot be read or a loss that cannot be computed do."""

    def __init__(self, event: str) -> None:
        self.event = event

    def run_event(self, event, state, logger) -> None:
        if event.value == self.event:
            raise OSError('the disk is gone')


class TestRefused:
    @pytest.mark.parametrize(
        ('overrides', 'said'),
        [
            ([], 'already holds a run'),
            (['load_path={a}/ep0-ba3-rank0.pt'], 'has gone on after .*autoresume=true.*save_overwrite=true'),
            (['load_path={b}/ep0-ba3-rank0.pt'], 'another run than .*save_overwrite=true'),
            (['load_path={b}/latest-rank0.pt', 'max_duration=3ep'], 'another run than'),
            (['load_path={b}/latest-rank0.pt', 'load_weights_only=true'], 'another run than'),
            (['load_path={a}/gone.pt'], 'is missing'),
            (['autoresume=true', 'model.width=9'], '.'),
            (['save_overwrite=true', 'load_path={b}/latest-rank0.pt', 'model.width=9'], '.'),
            (['autoresume=true', 'max_duration=3ep', 'algorithms.ema.update_interval=1iter'], 'iterations'),
            (['save_overwrite=true', 'algorithms.ema.half_life=2iter'], 'iterations'),
            (['save_overwrite=true', 'optimizer.lr=-1'], 'lr'),
            (['save_overwrite=true', 'callbacks.broken.event=fit_start'], 'the disk is gone'),
            (['save_overwrite=true', 'callbacks.broken.event=before_dataloader'], 'the disk is gone'),
            (['autoresume=true', 'max_duration=3ep', 'callbacks.broken.event=after_loss'], 'the disk is gone'),
        ],
    )
    def test_a_refused_command_changes_no_byte(self, runs, load, register, overrides, said):
        register('callbacks', 'broken', Broken)
        before = contents(runs)
        places = {name: f'{runs}/{name}/checkpoints' for name in 'ab'}
        recipe = load('run_name=a', *(each.format(**places) for each in overrides))
        with pytest.raises((RecipeError, OSError, RuntimeError), match=said):
            train(recipe, quiet)
        assert contents(runs) == before

    def test_a_refusal_of_composers_own_at_the_start_of_training_leaves_no_new_folder(self, runs, load):
        before = contents(runs)
        saves = f'{runs}/a/checkpoints'
        with pytest.raises(RecipeError, match=r'save_folder: .*may conflict'):
            train(load('run_name=c', f'save_folder={saves}', f'load_path={saves}/ep0-ba3-rank0.pt'), quiet)
        assert contents(runs) == before

    def test_a_run_that_has_nothing_left_to_train_keeps_its_recipe(self, runs, load):
        before = contents(runs)
        train(load('run_name=a', 'autoresume=true', 'max_duration=1ep'), quiet)
        assert contents(runs) == before

    def test_a_dry_run_leaves_no_file(self, runs, load, finished, call):
        before = contents(runs)
        for overrides in ([], ['run_name=a', 'autoresume=true'], ['run_name=c']):
            code, *_ = call('train', finished / 'tiny.yaml', f'runs_folder={runs}', *overrides, '--dry-run')
            assert code == 0
        assert contents(runs) == before


class TestBegun:
    def test_the_old_files_are_replaced_once_the_first_batch_is_trained(self, runs, load, register):
        seen = []

        class Look(Callback):
            def run_event(self, event, state, logger) -> None:
                if event.value in ('after_loss', 'batch_end') and state.timestamp.batch <= 1:
                    seed = yaml.safe_load((runs / 'a/recipe.yaml').read_text())['seed']
                    seen.append((event.value, seed, len(lines_of(runs / 'a'))))

        register('callbacks', 'look', Look)
        train(load('run_name=a', 'save_overwrite=true', 'seed=3', 'callbacks.look={}'), quiet)
        assert seen[:2] == [('after_loss', 1, 12), ('batch_end', 3, 0)]
        assert len(lines_of(runs / 'a')) == 12
        assert not (runs / 'a' / LOCK_FILE).exists()

    def test_a_run_is_wound_back_to_a_checkpoint_of_its_own_where_the_user_says_so(self, runs, load):
        before = (runs / 'a/metrics.jsonl').read_text()
        checkpoint = runs / 'a/checkpoints/ep0-ba3-rank0.pt'
        train(load('run_name=a', 'seed=1', 'save_overwrite=true', f'load_path={checkpoint}'), quiet)
        assert (runs / 'a/metrics.jsonl').read_text() == before

    def test_the_checkpoint_of_another_run_begins_the_file_anew_and_says_so(self, runs, load):
        checkpoint = runs / 'b/checkpoints/ep1-ba6-rank0.pt'
        with pytest.warns(UserWarning, match=r'does not begin with the 7 lines .*It begins anew'):
            train(load('run_name=a', 'seed=2', 'save_overwrite=true', f'load_path={checkpoint}'), quiet)
        assert lines_of(runs / 'a') == [lines_of(runs / 'b')[5], *lines_of(runs / 'b')[7:]]

    def test_the_last_checkpoint_of_a_run_goes_on_in_its_folder(self, runs, load):
        before = lines_of(runs / 'a')
        checkpoint = runs / 'a/checkpoints/latest-rank0.pt'
        train(load('run_name=a', 'seed=1', f'load_path={checkpoint}', 'max_duration=11ba'), quiet)
        assert lines_of(runs / 'a')[:12] == before
        assert lines_of(runs / 'a')[12]['batch'] == 11

    def test_what_cannot_be_replaced_stops_every_rank(self, tmp_path, monkeypatch):
        recorder = Recorder(RunFolder('a', tmp_path))
        monkeypatch.setattr(dist, 'get_global_rank', lambda: 1)
        monkeypatch.setattr(dist, 'broadcast_object_list', lambda found: found.__setitem__(0, 'disk full'))
        with pytest.raises(RuntimeError, match='on rank 0: disk full'):
            recorder._begin()


class TestOneAtATime:
    @pytest.mark.parametrize(
        'overrides', [[], ['autoresume=true'], ['save_overwrite=true'], ['load_path={a}/latest-rank0.pt']]
    )
    def test_a_second_run_is_refused_and_told_who_works_there(self, held, load, overrides):
        before = contents(held)
        places = {'a': held / 'checkpoints'}
        said = rf'run_name: .*in use by process {os.getpid()} on .* since 20'
        with pytest.raises(RecipeError, match=said) as refused:
            train(load('run_name=a', *(each.format(**places) for each in overrides)), quiet)
        assert 'Wait for its end, or give another run_name' in str(refused.value)
        assert contents(held) == before

    def test_so_is_a_sweep(self, held, call):
        before = contents(held)
        code, _, err = call('sweep', held)
        assert code == 2
        assert 'is in use by process' in err
        assert contents(held) == before

    def test_so_is_autoresume_without_a_name(self, runs, load):
        shutil.move(runs / 'a', runs / 'tiny')
        taken = Lock(runs / 'tiny')
        with pytest.raises(RecipeError, match='in use by process'):
            train(load('autoresume=true'), quiet)
        taken.release()

    def test_reading_needs_no_lock(self, held, call):
        assert call('inspect', held / 'checkpoints/latest-rank0.pt')[0] == 0

    def test_unnamed_runs_that_start_at_once_get_names_of_their_own(self, load, runs):
        plan, found = schema.plan(load()), []
        threads = [threading.Thread(target=lambda: found.append(folders.take(plan))) for _ in range(8)]
        for each in threads:
            each.start()
        for each in threads:
            each.join()
        assert {each.name for each in found} == {'tiny', *(f'tiny-{number}' for number in range(2, 9))}
        for each in found:
            each.release()
        assert {path.name for path in runs.iterdir()} == {'a', 'b'}

    def test_a_name_that_another_run_takes_in_between_is_left_to_it(self, load, runs, monkeypatch):
        plan = schema.plan(load())

        def take_first(folder: Path) -> Lock:
            monkeypatch.setattr(folders, 'Lock', Lock)
            others.append(Lock(folder))
            return Lock(folder)

        others: list[Lock] = []
        monkeypatch.setattr(folders, 'Lock', take_first)
        taken = folders.take(plan)
        assert taken.name == 'tiny-2'
        taken.release()
        others[0].release()

    @pytest.mark.parametrize('name', ['new', None])
    def test_a_folder_that_a_refused_start_removes_in_between_is_made_again(self, load, runs, monkeypatch, name):
        plan = schema.plan(load(*([] if name is None else [f'run_name={name}'])))

        def remove_first(folder: Path) -> Lock:
            monkeypatch.setattr(folders, 'Lock', Lock)
            folder.rmdir()
            return Lock(folder)

        monkeypatch.setattr(folders, 'Lock', remove_first)
        taken = folders.take(plan)
        assert taken.path.is_dir()
        taken.release()
        assert not taken.path.exists()

    @pytest.mark.parametrize('overrides', [[], ['run_name=new'], ['run_name=a/new', 'save_overwrite=true']])
    def test_a_folder_that_cannot_be_made_is_said(self, load, tmp_path, overrides):
        write_beside(tmp_path / 'file', '')
        with pytest.raises(RecipeError, match=r'runs_folder: .*file is a file, and the run is to lie in'):
            folders.take(schema.plan(load(*overrides, f'runs_folder={tmp_path}/file')))

    @pytest.mark.parametrize('make', [Path.mkdir, os.mkfifo, lambda path: path.symlink_to('recipe.yaml')])
    def test_what_lies_at_the_place_of_the_lock_is_not_touched(self, runs, load, make):
        make(runs / 'a' / LOCK_FILE)
        before = contents(runs)
        with pytest.raises(RecipeError, match=r'runs_folder: .*a cannot be written to'):
            folders.take(schema.plan(load('run_name=a', 'autoresume=true')))
        assert contents(runs) == before

    def test_an_error_on_rank_0_is_raised_on_every_rank(self, load, monkeypatch):
        error = schema.plan(load()).place.error('taken')
        monkeypatch.setattr(dist, 'get_global_rank', lambda: 1)
        monkeypatch.setattr(dist, 'broadcast_object_list', lambda found: found.__setitem__(1, error))
        with pytest.raises(RecipeError, match='taken'):
            folders.take(schema.plan(load('run_name=a')))

    @pytest.mark.slow
    def test_two_ranks_are_refused_together(self, held, finished):
        command = [
            sys.executable, '-m', 'composer.cli.launcher', '-n', '2', '-m', 'composer_ema.cli', 'train',
            finished / 'tiny.yaml', f'runs_folder={held.parent}', 'run_name=a', 'autoresume=true',
        ]  # fmt: skip
        before = contents(held)
        done = subprocess.run(command, capture_output=True, text=True, timeout=300)
        assert done.returncode != 0
        assert 'is in use by process' in done.stdout + done.stderr
        assert contents(held) == before

    def test_nothing_is_lost_or_mixed_where_runs_start_at_once(self, tmp_path):
        trial = hostile_starts.Trial(tmp_path, hostile_starts.forked)
        for number in range(2):
            drawn = hostile_starts.draw(random.Random(f'small-{number}'))
            assert trial.play(drawn, number) == [], drawn

    def test_a_picture_is_not_drawn_into_a_folder_that_another_run_has_taken(self, held):
        outcome = Outcome('a', 1, held, Report(), [], None, 0)
        before, shown = contents(held), []
        conclusion.of_run(outcome, shown.append)
        assert 'no picture of the run: ' in shown[0]
        assert 'in use by process' in shown[0]
        assert contents(held) == before


class TestLock:
    def test_it_is_free_as_soon_as_its_owner_is_killed(self, tmp_path):
        owner = subprocess.Popen([sys.executable, '-c', HOLD, tmp_path], stdout=subprocess.PIPE, text=True)
        assert owner.stdout is not None
        assert owner.stdout.readline() == 'held\n'
        record = (tmp_path / LOCK_FILE).read_bytes()
        with pytest.raises(InUseError, match=rf'in use by process {owner.pid} on .*\(-c {tmp_path}\)'):
            Lock(tmp_path)
        assert (tmp_path / LOCK_FILE).read_bytes() == record
        owner.kill()
        owner.wait()
        Lock(tmp_path).release()
        assert list(tmp_path.iterdir()) == []
        owner.stdout.close()

    def test_two_never_hold_it(self, tmp_path):
        holders, most = [], []
        until = time.monotonic() + 0.3

        def work() -> None:
            while time.monotonic() < until:
                try:
                    taken = Lock(tmp_path)
                except InUseError:
                    continue
                holders.append(1)
                most.append(len(holders))
                holders.pop()
                taken.release()

        threads = [threading.Thread(target=work) for _ in range(4)]
        for each in threads:
            each.start()
        for each in threads:
            each.join()
        assert len(most) > 10
        assert set(most) == {1}

    def test_the_lock_of_a_file_that_its_owner_removes_in_between_counts_for_nothing(self, tmp_path, monkeypatch):
        real = lock._locked

        def remove_first(folder: Path, descriptor: int) -> bool:
            (tmp_path / LOCK_FILE).unlink()
            monkeypatch.setattr(lock, '_locked', real)
            return real(folder, descriptor)

        monkeypatch.setattr(lock, '_locked', remove_first)
        taken = Lock(tmp_path)
        with pytest.raises(InUseError):
            Lock(tmp_path)
        taken.release()

    def test_a_lock_file_that_another_one_has_removed_and_made_anew_is_left_to_it(self, tmp_path):
        taken = Lock(tmp_path)
        (tmp_path / LOCK_FILE).unlink()
        other = Lock(tmp_path)
        taken.release()
        assert (tmp_path / LOCK_FILE).exists()
        other.release()

    @pytest.mark.parametrize('record', ['', '{"host": "ba', '[]', '{"host": "b", "pid": "x"}', '9' * 5000, '[' * 4000])
    def test_a_damaged_record_of_a_killed_owner_does_not_matter(self, tmp_path, record):
        (tmp_path / LOCK_FILE).write_text(record)
        Lock(tmp_path).release()

    def test_an_owner_on_another_machine_is_named_and_its_escape_sequences_are_not_obeyed(self, tmp_path):
        record = {'host': 'far\x1b[2J', 'pid': 7, 'started': '2026-01-01', 'command': 'composer-ema train a.yaml'}
        (tmp_path / LOCK_FILE).write_text(json.dumps(record))
        with pytest.warns(UserWarning, match=r'in use by process 7 on far\?\[2J since 2026-01-01 .*Make sure'):
            Lock(tmp_path).release()

    class TestWithoutLocks:
        @pytest.fixture(autouse=True)
        def without(self, monkeypatch) -> None:
            def refuse(*_: Any) -> None:
                raise OSError(37, 'No locks available')

            monkeypatch.setattr(lock.fcntl, 'flock', refuse)

        def test_one_warning_says_so(self, tmp_path):
            with pytest.warns(UserWarning, match=r'has no locks \(No locks available\)') as told:
                Lock(tmp_path).release()
            assert len(told) == 1

        def test_what_the_file_says_still_counts(self, tmp_path):
            record = {'host': lock.socket.gethostname(), 'pid': os.getppid(), 'started': 'now', 'command': 'c'}
            (tmp_path / LOCK_FILE).write_text(json.dumps(record))
            with pytest.raises(InUseError, match=rf'in use by process {os.getppid()}.*remove .*{LOCK_FILE}'):
                Lock(tmp_path)
            ended = subprocess.Popen([sys.executable, '-c', ''])
            ended.wait()
            (tmp_path / LOCK_FILE).write_text(json.dumps({**record, 'pid': ended.pid}))
            with pytest.warns(UserWarning, match='has no locks'):
                Lock(tmp_path).release()
