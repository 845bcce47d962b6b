"""Runs and commands that a signal, a full disk or somebody's rm ends or hurts: what is kept, and what is said of it."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import yaml
from composer.utils import checkpoint, dist
from recipes import tiny

from composer_ema import files
from composer_ema.files import append, beside, error_of_the_system, in_words, remove_unfinished, write_beside
from composer_ema.pictures import conclusion
from composer_ema.recipe import folders
from composer_ema.recipe.command import Standing, that_goes_on
from composer_ema.recipe.stopped import undisturbed
from composer_ema.run_folder import recorder
from composer_ema.run_folder.lock import LOCK_FILE, InUseError, Lock
from composer_ema.run_folder.recorder import Recorder
from composer_ema.run_folder.whole import whole_checkpoints

sys.path.append(str(Path(__file__).parent / 'scripts'))
TINY = tiny(seed=3, progress_bar=False, save_interval='4ba', data={'num_samples': 60})


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / 'tiny.yaml'
    path.write_text(yaml.safe_dump({**TINY, 'runs_folder': str(tmp_path / 'runs')}))
    return path


@pytest.fixture(autouse=True)
def plain_pictures(monkeypatch) -> None:
    """Pictures of runs take longer than the runs."""
    from matplotlib.figure import Figure

    monkeypatch.setattr(conclusion, 'draw_runs', lambda _: Figure())


@pytest.fixture
def after_batch(monkeypatch) -> Callable[[int, Callable[[], Any]], None]:
    """Does something in the middle of a run, once it has trained so many batches."""

    def after_batch(batch: int, do: Callable[[], Any]) -> None:
        batch_start = Recorder.batch_start

        def then(self, state, logger):
            batch_start(self, state, logger)
            if int(state.timestamp.batch) == batch:
                do()

        monkeypatch.setattr(Recorder, 'batch_start', then)

    return after_batch


@pytest.fixture
def full_disk(monkeypatch) -> Callable[[str], None]:
    """Lets every file whose name contains a word lie on a disk without room: the kernel's /dev/full."""

    def full_disk(word: str) -> None:
        new_file = files._new_file

        def on_full_disk(path: Path, ending: str) -> tuple[int, Path]:
            if word not in path.name:
                return new_file(path, ending)
            lent = path.with_name(f'.{path.name}.abcd_012{files.UNFINISHED}{ending}')
            lent.symlink_to('/dev/full')
            return os.open(lent, os.O_WRONLY), lent

        monkeypatch.setattr(files, '_new_file', on_full_disk)

    return full_disk


def unfinished(folder: Path) -> list[str]:
    return [path.name for path in folder.rglob('.*')]


def save_by_torch(path: Path) -> None:
    with path.open('wb') as file:
        torch.save({'a': torch.zeros(100_000)}, file)


def save_by_safetensors(*_: Any, **__: Any) -> None:
    # It removes the link to /dev/full and makes a file of its own, so the error is only told as it says it.
    raise safetensors.SafetensorError('Error while serializing: I/O error: No space left on device (os error 28)')


class TestFiles:
    def test_a_dead_process_leaves_nothing_and_a_living_one_is_left_alone(self, tmp_path):
        dead = tmp_path / '.a.jsonl.x1y2_3ab.unfinished'
        others = [tmp_path / name for name in ('.a.jsonl.x1y2', '.config.settings', 'a.unfinished')]
        for path in (dead, *others):
            path.touch()
        with beside(tmp_path / 'a.jsonl') as written:
            assert not dead.exists()
            dead.touch()
            remove_unfinished(tmp_path)
            assert written.exists()
            assert not dead.exists()
        assert all(path.exists() for path in others)
        assert sorted(tmp_path.iterdir()) == sorted([tmp_path / 'a.jsonl', *others])

    def test_files_with_names_of_any_legal_length_are_written(self, tmp_path):
        write_beside(tmp_path / ('n' * 255), 'x')
        with pytest.raises(OSError, match='File name too long'):
            write_beside(tmp_path / ('n' * 256), 'x')
        assert not unfinished(tmp_path)

    @pytest.mark.parametrize(
        'write',
        [lambda path: path.write_bytes(b'x'), save_by_torch, save_by_safetensors],
        ids=['plain', 'torch', 'safetensors'],
    )
    def test_a_full_disk_leaves_the_old_file_and_is_named(self, tmp_path, full_disk, write):
        path = tmp_path / 'a.pt'
        path.write_text('old')
        full_disk('a.pt')
        with pytest.raises(OSError) as raised, beside(path) as written:
            write(written)
        assert (raised.value.errno, raised.value.filename) == (errno.ENOSPC, str(path))
        assert in_words(raised.value).startswith(f'{path} cannot be written: there is no room left on its disk: ')
        assert in_words(raised.value).endswith(' are free.')
        assert path.read_text() == 'old'
        assert not unfinished(tmp_path)

    def test_a_line_is_appended_whole_or_not_at_all(self, tmp_path, monkeypatch):
        path = tmp_path / 'made' / 'a.jsonl'
        append(path, 'one\n')
        opened = Path.open

        def fills_up(self, *arguments, **options):
            file = opened(self, *arguments, **options)

            class Half:
                tell, truncate = file.tell, file.truncate
                has_written = False

                def write(self, content):
                    if self.has_written:
                        raise OSError(errno.ENOSPC, 'full')
                    self.has_written = True
                    return file.write(content[:2])

                def __enter__(self):
                    return self

                def __exit__(self, *_):
                    file.close()

            return Half()

        monkeypatch.setattr(Path, 'open', fills_up)
        with pytest.raises(OSError, match='full') as raised:
            append(path, 'two\n')
        monkeypatch.undo()
        assert raised.value.filename == str(path)
        assert path.read_text() == 'one\n'

    def test_a_bug_is_no_error_of_the_system(self):
        bug = KeyError('a')
        bug.__context__ = FileNotFoundError(errno.ENOENT, 'none', 'x')
        assert error_of_the_system(bug) is None
        bug.__context__ = OSError(errno.ENOSPC, 'full')
        assert error_of_the_system(bug) is bug.__context__


@pytest.mark.parametrize('name', ['a.pt', 'a.pt.gz', 'a.tar.gz'])
def test_a_checkpoint_takes_the_place_of_the_last_one_once_it_is_whole(tmp_path, full_disk, name):
    path = tmp_path / name
    with whole_checkpoints():
        checkpoint._write_checkpoint_file({'a': 1}, str(path))
    before = path.read_bytes()
    assert before
    full_disk('a.')
    with whole_checkpoints(), pytest.raises((OSError, RuntimeError)):
        checkpoint._write_checkpoint_file({'a': torch.zeros(100_000)}, str(path))
    assert path.read_bytes() == before
    assert not unfinished(tmp_path)


class TestFullDisk:
    def test_the_last_checkpoint_stays_and_the_run_goes_on_from_it(
        self, call, recipe, tmp_path, full_disk, monkeypatch
    ):
        folder = tmp_path / 'runs' / 'tiny'
        monkeypatch.chdir(tmp_path)
        full_disk('ba12-')
        code, out, err = call('train', recipe, 'optimizer.lr=0.2')
        assert code == 1
        assert 'Traceback' not in out + err
        last = err.splitlines()[-1]
        assert last.startswith(f'{folder}/checkpoints/ep1-ba12-rank0.pt cannot be written: there is no room left on')
        assert last.endswith(
            'The run has stopped after batch 12. Make room, then go on from runs/tiny/checkpoints/ep1-ba8-rank0.pt '
            f'(batch 8) with: composer-ema train {recipe} optimizer.lr=0.2 run_name=tiny autoresume=true'
        )
        assert not unfinished(folder)
        assert not (folder / 'checkpoints' / 'ep1-ba12-rank0.pt').exists()
        monkeypatch.undo()
        code, out, _ = call('train', recipe, 'optimizer.lr=0.2', 'run_name=tiny', 'autoresume=true')
        assert (code, 'batch 8' in out) == (0, True)

    def test_of_recipe_and_snapshots(self, call, recipe, tmp_path, full_disk, monkeypatch):
        folder = tmp_path / 'runs' / 'tiny'
        for word, path, options in (
            ('recipe.yaml', 'recipe.yaml', ['run_name=tiny']),
            ('averages-', 'snapshots/averages-00000005.safetensors', ['run_name=tiny', 'algorithms.ema.snapshots=5ba']),
        ):
            monkeypatch.undo()
            full_disk(word)
            code, out, err = call('train', recipe, *options, 'save_overwrite=true', 'save_interval=1ep')
            assert code == 1
            assert 'Traceback' not in out + err
            assert err.splitlines()[-1].startswith(f'{folder / path} cannot be written: there is no room left on')
            assert 'No checkpoint has been saved yet. Make room, then start again with: composer-ema train ' in err
            assert not unfinished(folder)

    def test_of_metrics(self, call, recipe, tmp_path, monkeypatch):
        appended = recorder.append

        def fills_up(path: Path, text: str) -> None:
            if json.loads(text)['batch'] == 6:
                raise OSError(errno.ENOSPC, 'full', str(path))
            appended(path, text)

        monkeypatch.setattr(recorder, 'append', fills_up)
        code, out, err = call('train', recipe)
        assert code == 1
        assert 'Traceback' not in out + err
        assert err.splitlines()[-1].startswith(
            f'{tmp_path}/runs/tiny/metrics.jsonl cannot be written: there is no room'
        )
        assert '/runs/tiny/checkpoints/ep0-ba4-rank0.pt (batch 4) with: ' in err

    def test_of_the_picture_of_a_run_that_is_done(self, call, recipe, tmp_path, full_disk, monkeypatch):
        full_disk('curves')
        code, out, err = call('train', recipe, 'max_duration=1ep')
        assert code == 2
        assert 'first epoch at 90 %' in out
        assert 'Traceback' not in out + err
        assert f'composer-ema plot {tmp_path}/runs/tiny' in err
        files_left = {path.name for path in (tmp_path / 'runs' / 'tiny').iterdir()}
        assert files_left == {'checkpoints', 'metrics.jsonl', 'recipe.yaml'}
        for command in (
            ['plot', tmp_path / 'runs' / 'tiny'],
            ['export', tmp_path / 'runs' / 'tiny' / 'checkpoints' / 'latest-rank0.pt', tmp_path / 'curves.pt'],
            ['export', tmp_path / 'runs' / 'tiny' / 'checkpoints' / 'latest-rank0.pt', tmp_path / 'curves.safetensors'],
        ):
            monkeypatch.setattr(safetensors.torch, 'save_file', save_by_safetensors)
            code, out, err = call(*command)
            assert code == 2
            assert 'cannot be written: there is no room left on its disk: ' in err
            assert not unfinished(tmp_path)


class TestSignals:
    @pytest.mark.parametrize(
        ('number', 'batch', 'said'),
        [
            (signal.SIGTERM, 9, 'stopped by SIGTERM after batch 9. Go on from runs/tiny/checkpoints/ep1-ba8-rank0.pt '),
            (signal.SIGINT, 3, 'stopped by Ctrl-C after batch 3. No checkpoint has been saved yet. Start again with: '),
        ],
    )
    def test_a_run_says_how_to_go_on(self, call, recipe, tmp_path, after_batch, monkeypatch, number, batch, said):
        monkeypatch.chdir(tmp_path)
        after_batch(batch, lambda: signal.raise_signal(number))
        code, out, err = call('train', 'tiny.yaml')
        assert code == 128 + number
        assert err.splitlines()[-1].startswith(said)
        assert err.endswith('composer-ema train tiny.yaml run_name=tiny autoresume=true\n')
        assert 'Traceback' not in out + err
        assert not unfinished(tmp_path / 'runs')

    def test_of_several_processes_the_first_one_says_it(self, call, recipe, after_batch, monkeypatch):
        def told() -> None:
            monkeypatch.setenv('RANK', '1')
            signal.raise_signal(signal.SIGTERM)

        after_batch(3, told)
        code, _, err = call('train', recipe)
        assert (code, err) == (143, '')

    def test_a_signal_before_training(self, call, recipe, monkeypatch):
        monkeypatch.setattr(folders, 'take', lambda _: signal.raise_signal(signal.SIGINT))
        assert call('train', recipe)[::2] == (130, 'stopped by Ctrl-C. Training had not begun.\n')

    def test_a_signal_while_a_finished_run_is_drawn(self, call, recipe, tmp_path, monkeypatch):
        monkeypatch.setattr(conclusion, 'write', lambda *_: signal.raise_signal(signal.SIGINT))
        code, _, err = call('train', recipe)
        assert code == 130
        done = f'stopped by Ctrl-C. The run is done and saved. Draw it with: composer-ema plot {tmp_path}/runs/tiny'
        assert err.splitlines()[-1] == done

    @pytest.mark.parametrize('command', ['export', 'plot', 'reconstruct', 'sweep', 'inspect'])
    def test_every_command_ends_in_one_line(self, call, tmp_path, monkeypatch, command):
        from composer_ema.checkpoints import inspection
        from composer_ema.interchange import export
        from composer_ema.pictures import curves
        from composer_ema.posthoc import open_run
        from composer_ema.sweep import finished_run

        def interrupted(*_: Any, **__: Any) -> None:
            raise KeyboardInterrupt

        monkeypatch.setattr(export, 'export', interrupted)
        monkeypatch.setattr(inspection, 'describe', interrupted)
        monkeypatch.setattr(curves, 'read_runs', interrupted)
        monkeypatch.setattr(open_run, 'OpenRun', interrupted)
        monkeypatch.setattr(finished_run, 'sweep_run', interrupted)
        (tmp_path / 'run').mkdir()
        out = [tmp_path / 'out.pt'] if command in ('export', 'reconstruct') else []
        code, _, err = call(command, tmp_path / 'run', *out)
        assert code == 130
        assert err.startswith('stopped by Ctrl-C. ')
        assert err.count('\n') == 1

    def test_the_command_that_goes_on(self, tmp_path, monkeypatch):
        one = Standing('a b', 2, 7, None, 0, 'autoresume=true')
        assert that_goes_on(Path('r.yaml'), ['run_name=x', '~scheduler'], one) == (
            "composer-ema train r.yaml '~scheduler' 'run_name=\"a b\"' autoresume=true"
        )
        of_seed = Standing('r-seed2', 2, 7, None, 0, 'autoresume=true')
        assert that_goes_on(Path('r.yaml'), [], of_seed, [1, 2]) == (
            'composer-ema train r.yaml autoresume=true --seeds 1,2'
        )
        assert that_goes_on(Path('r.yaml'), [], Standing('2024', 2, 7, None, 0, 'autoresume=true'), [1, 2]) == (
            'composer-ema train r.yaml seed=2 \'run_name="2024"\' autoresume=true'
        )
        monkeypatch.setenv('WORLD_SIZE', '4')
        assert that_goes_on(Path('r.yaml'), [], of_seed).endswith(' (in each of 4 processes, as before)')
        monkeypatch.setenv('LOCAL_WORLD_SIZE', '4')
        rest = ' -m composer_ema.cli train r.yaml run_name=r-seed2 autoresume=true'
        assert that_goes_on(Path('r.yaml'), [], of_seed) == f'composer -n 4{rest}'
        monkeypatch.setenv('TORCHELASTIC_RUN_ID', 'none')
        assert that_goes_on(Path('r.yaml'), [], of_seed) == f'torchrun --nproc-per-node 4{rest}'


class TestSeveralProcesses:
    @pytest.fixture
    def one_of_two(self, monkeypatch) -> Iterator[Callable[[], None]]:
        """Turns this process into one of two, the other of which never comes to a barrier."""

        def one_of_two() -> None:
            monkeypatch.setenv('WORLD_SIZE', '2')
            monkeypatch.setenv('LOCAL_WORLD_SIZE', '2')
            monkeypatch.setattr(dist, 'barrier', lambda *_, **__: pytest.fail('waits for a dead process'))

        handler = signal.getsignal(signal.SIGTERM)
        yield one_of_two
        signal.signal(signal.SIGTERM, handler)

    def test_one_that_gets_a_signal_does_not_wait_for_the_others(self, call, recipe, one_of_two, after_batch):
        def stop() -> None:
            one_of_two()
            signal.raise_signal(signal.SIGTERM)

        after_batch(5, stop)
        code, _, err = call('train', recipe, 'run_name=a')
        signal.raise_signal(signal.SIGTERM)  # the launcher's, while the process ends
        assert code == 143
        assert err.startswith('stopped by SIGTERM after batch 5. Go on from ')
        assert err.endswith(f': composer -n 2 -m composer_ema.cli train {recipe} run_name=a autoresume=true\n')

    @pytest.mark.parametrize(
        'said',
        [
            '[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:525] Read error [127.0.0.1]:27780: Connection reset '
            'by peer',
            '[../third_party/gloo/gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:9127',
            'NCCL error: remote process exited or there was a network error, NCCL version 2.21.5',
        ],
    )
    def test_the_death_of_another_one_is_said_in_one_line(self, call, recipe, one_of_two, after_batch, said):
        def fail() -> None:
            one_of_two()
            raise RuntimeError(said)

        after_batch(5, fail)
        code, _, err = call('train', recipe, 'run_name=a')
        assert code == 1
        assert err.startswith('another process of the run has ended, so it stopped after batch 5. Go on from ')
        assert err.count('\n') == 1

    def test_what_a_launcher_sends_to_those_that_are_left_does_not_disturb_them(self):
        before = signal.getsignal(signal.SIGTERM)
        with undisturbed():
            signal.raise_signal(signal.SIGTERM)
        assert signal.getsignal(signal.SIGTERM) is before


class TestRemoved:
    def test_a_run_whose_lock_is_removed_takes_it_again(self, call, recipe, tmp_path, after_batch):
        folder = tmp_path / 'runs' / 'tiny'

        def move() -> None:
            folder.rename(tmp_path / 'runs' / 'moved')
            after_batch(7, refuse)

        def refuse() -> None:
            with pytest.raises(InUseError):
                Lock(folder)

        after_batch(5, move)
        assert call('train', recipe)[0] == 0
        assert not (folder / LOCK_FILE).exists()

    def test_a_run_whose_folder_another_one_has_taken_since_stops_and_leaves_it_alone(
        self, call, recipe, tmp_path, after_batch
    ):
        folder, others = tmp_path / 'runs' / 'tiny', []

        def move() -> None:
            folder.rename(tmp_path / 'runs' / 'moved')
            folder.mkdir()
            others.append(Lock(folder))

        after_batch(5, move)
        code, _, err = call('train', recipe)
        assert code == 1
        assert err.startswith(f'{folder} is in use by process {os.getpid()} on ')
        assert err.endswith(
            ' Somebody has removed or renamed the folder or its lock file while this run trained, so it stopped after '
            'batch 6.\n'
        )
        assert [path.name for path in folder.iterdir()] == [LOCK_FILE]
        others[0].release()

    def test_a_folder_that_is_removed_is_made_anew_and_what_is_lost_is_said(self, call, recipe, tmp_path, after_batch):
        folder = tmp_path / 'runs' / 'tiny'
        after_batch(10, lambda: shutil.rmtree(folder))
        code, out, _ = call(
            'train', recipe, 'algorithms.ema.snapshots=5ba', 'save_num_checkpoints_to_keep=2', 'max_duration=3ep'
        )
        assert code == 0
        lost = next(line for line in out.splitlines() if line.startswith('lost, '))
        assert lost.startswith('lost, since somebody removed them while the run trained: 10 lines of metrics.jsonl')
        assert ' up to batch 10, no evaluation, 2 checkpoints (ep0-ba4-rank0.pt, ep1-ba8-rank0.pt), ' in lost
        assert lost.endswith(', averages-00000005.safetensors, averages-00000010.safetensors)')
        lines = [json.loads(line) for line in (folder / 'metrics.jsonl').read_text().splitlines()]
        assert [line['batch'] for line in lines] == [6, *range(11, 13), 12, *range(13, 19), 18]
        assert (folder / 'recipe.yaml').exists()

    def test_a_resumed_run_has_the_lines_that_are_left(self, call, recipe, tmp_path, after_batch, monkeypatch):
        metrics = tmp_path / 'runs' / 'tiny' / 'metrics.jsonl'
        after_batch(3, metrics.unlink)
        assert call('train', recipe, 'max_duration=1ep')[0] == 0
        monkeypatch.undo()
        code, out, _ = call('train', recipe, 'run_name=tiny', 'autoresume=true')
        assert (code, 'lost' in out) == (0, False)
        lines = [json.loads(line) for line in metrics.read_text().splitlines()]
        assert [line['batch'] for line in lines] == [4, 5, 6, 6, *range(7, 13), 12]


def test_leftovers_of_a_killed_run_are_removed_by_its_next_start(call, recipe, tmp_path):
    folder = tmp_path / 'runs' / 'tiny'
    names = ['.metrics.jsonl.abcd_012.unfinished', 'checkpoints/.ep0-ba4-rank0.pt.abcd_012.unfinished']
    names += ['checkpoints/._signal_file_node0_abc']
    (folder / 'checkpoints').mkdir(parents=True)
    for name in names:
        (folder / name).touch()
    assert call('train', recipe, 'run_name=tiny', 'save_overwrite=true', 'max_duration=1ep')[0] == 0
    assert not unfinished(folder)


@pytest.mark.parametrize('kind', ['a link to nowhere', 'a file', 'a long name', 'no permission'])
def test_a_runs_folder_that_cannot_be_is_refused_in_words(call, recipe, tmp_path, kind):
    path = tmp_path / 'other'
    if kind == 'a link to nowhere':
        path.symlink_to(tmp_path / 'nowhere')
    elif kind == 'a file':
        path.touch()
    elif kind == 'a long name':
        path = tmp_path / ('n' * 256)
    else:
        path = Path('/proc/self/other')
    code, out, err = call('train', recipe, f'runs_folder={path}')
    assert code == 2
    assert str(path) in err
    assert 'Traceback' not in out + err


def test_killed_runs_go_on_to_the_same_bits() -> None:
    from trial_kills import trial

    with tempfile.TemporaryDirectory() as scratch:
        *_, found = trial(seed=7, kills=2, scratch=Path(scratch))
    assert (found.kills, found.failures) == (2, [])
