"""The command line: what it prints, its exit codes, and that it survives being killed and started by a launcher."""

from __future__ import annotations

import ast
import configparser
import contextlib
import fcntl
import json
import math
import os
import pty
import re
import signal
import struct
import subprocess
import sys
import termios
import time
from pathlib import Path

import pytest
import torch
import yaml
from composer.loggers import ConsoleLogger, ProgressBarLogger
from points import classified
from recipes import tiny
from safetensors import safe_open
from safetensors.torch import load_file

from composer_ema import cli, load_average
from composer_ema.pictures import report
from composer_ema.recipe.metrics import Report
from composer_ema.recipe.progress import progress_of

PACKAGE = Path(cli.__file__).parent


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / 'tiny.yaml'
    path.write_text(yaml.safe_dump(tiny(seed=3, runs_folder=str(tmp_path / 'runs'))))
    return path


def spawn(*command: object, cwd: Path) -> subprocess.Popen[str]:
    environment = {**os.environ, 'OMP_NUM_THREADS': '1', 'COLUMNS': '100'}
    pipe = subprocess.PIPE
    words = [sys.executable, *map(str, command)]
    return subprocess.Popen(words, cwd=cwd, env=environment, stdout=pipe, stderr=pipe, text=True)


def lines_of(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / 'metrics.jsonl').read_text().splitlines()]


def test_train_shows_the_table_and_the_folder(call, recipe, tmp_path):
    code, out, err = call('train', recipe, 'max_duration=1ep')
    assert code == 0
    assert 'training weights' in out
    assert 'first epoch at 90 %, average: not reached' in out
    assert 'cost of the average:' in out
    assert 'measured over 10 batches' in out
    assert out.rstrip().endswith(f'run folder: {tmp_path}/runs/tiny')
    assert [line.split(': ')[0] for line in err.splitlines()] == ['epoch 1 of 1, batch 10'], 'no bars, and no warnings'
    assert ', eval_ema/CrossEntropy ' in err


class TestProgress:
    @staticmethod
    def heads(err: str) -> list[str]:
        return [line.split(': ')[0] for line in err.splitlines()]

    @pytest.mark.parametrize(
        ('overrides', 'heads'),
        [
            (['max_duration=2ep'], ['epoch 1 of 2, batch 10', 'epoch 2 of 2, batch 20']),
            (['max_duration=1ep', 'eval_interval=5ba'], ['epoch 0.5 of 1, batch 5', 'epoch 1 of 1, batch 10']),
            (['max_duration=15ba'], ['batch 10 of 15', 'batch 15 of 15']),
            (['max_duration=1ep', 'evaluate=[]'], ['epoch 1 of 1, batch 10']),
            (['max_duration=80sp', 'console_stream=stderr'], ['sample 80 of 80, batch 10']),
            (['max_duration=1ep', 'progress_bar=false'], []),
        ],
    )
    def test_off_the_terminal_it_is_a_line_per_epoch_or_evaluation(self, call, recipe, overrides, heads):
        code, _, err = call('train', recipe, *overrides)
        assert code == 0
        assert self.heads(err) == heads

    @pytest.mark.parametrize(
        ('override', 'said'),
        [
            ('progress_bar=true', 'Epoch   0:'),
            ('log_to_console=true', '[epoch=1][batch=10/10]'),
        ],
    )
    def test_what_the_recipe_asks_for_wins(self, call, recipe, override, said):
        code, _, err = call('train', recipe, 'max_duration=1ep', override)
        assert code == 0
        assert said in err
        assert 'epoch 1 of 1' not in err

    @pytest.mark.parametrize('logger', [ProgressBarLogger, ConsoleLogger])
    def test_a_logger_that_shows_it_is_left_alone(self, logger):
        assert progress_of({}, [logger(stream=sys.stderr)]) == ({}, [])

    def test_it_goes_where_the_console_stream_goes(self, call, recipe):
        code, out, err = call('train', recipe, 'max_duration=1ep', 'console_stream=stdout')
        assert (code, err) == (0, '')
        assert out.startswith('epoch 1 of 1, batch 10: loss/train/total ')

    @pytest.mark.slow
    def test_on_a_terminal_bars_show_and_a_run_resumes_with_the_other_without_a_warning(self, call, recipe, tmp_path):
        terminal, its_side = pty.openpty()
        fcntl.ioctl(its_side, termios.TIOCSWINSZ, struct.pack('4H', 24, 120, 0, 0))
        command = ['train', recipe, 'run_name=here', 'autoresume=true']
        words = [sys.executable, '-m', 'composer_ema.cli', *map(str, command), 'max_duration=1ep']
        process = subprocess.Popen(words, cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=its_side)
        os.close(its_side)
        shown = b''
        with contextlib.suppress(OSError):  # the other side is closed
            while part := os.read(terminal, 4096):
                shown += part
        os.close(terminal)
        assert process.wait(timeout=60) == 0, shown
        assert b'Epoch   0:' in shown
        assert b'epoch 1 of 1' not in shown
        code, _, err = call(*command, 'max_duration=2ep')
        assert (code, self.heads(err)) == (0, ['epoch 2 of 2, batch 20'])

    def test_nothing_is_left_of_it_by_a_rehearsal_or_a_plot(self, call, recipe, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        assert call('train', recipe, '--dry-run')[::2] == (0, '')
        assert call('plot', recipe)[::2] == (0, '')


def test_a_run_that_diverges_has_its_numbers_whole_in_the_table(capfd, monkeypatch):
    monkeypatch.setenv('COLUMNS', '40')
    points = [classified(1, 0.1, 2165743237602476032.0), classified(98 / 47, 0.1, math.inf)]
    cli.show(
        report.epochs_table(report.Result('div', 1, Report(), {'training': points, 'ema': [classified(1, 0.1, 2e-7)]}))
    )
    assert [re.split(r'\s*│\s*', line)[1:-1] for line in capfd.readouterr().out.splitlines() if line[0] == '│'] == [
        ['1', '10.00', '10.00', '2.166e+18', '2.000e-07'],
        ['2.085', '10.00', '–', 'inf', '–'],
    ]


def test_brackets_in_names_are_no_markup(capfd, monkeypatch):
    monkeypatch.setenv('COLUMNS', '100')
    result = report.Result('a[b]c', 1, Report(), {'training': [classified(1, 0.1, 2.0)]})
    cli.show(report.epochs_table(result))
    cli.show(report.seeds_table([result], 'd[red]e'))
    cli.show(report.parts_table({'run folder': '/runs/[f]/g'}))
    out = capfd.readouterr().out
    assert all(name in out for name in ('a[b]c', 'd[red]e', '/runs/[f]/g'))


def test_dry_run_shows_the_resolved_recipe_and_what_was_built_and_leaves_nothing(call, recipe, tmp_path):
    code, out, _ = call('train', recipe, 'variables.rate=0.5', 'optimizer.lr=${variables.rate}', '--dry-run')
    assert code == 0
    assert 'lr: 0.5' in out
    assert 'mnist1d_mlp' in out
    assert 'eval_training, eval_ema' in out
    assert [path.name for path in tmp_path.iterdir()] == ['tiny.yaml']


def test_seeds_end_in_markdown(call, recipe, tmp_path):
    code, out, _ = call('train', recipe, 'max_duration=1ep', 'progress_bar=false', '--seeds', '1,2')
    assert code == 0
    assert (tmp_path / 'runs/tiny-seeds.md').read_text() in out
    assert (tmp_path / 'runs/tiny-seed2/curves.png').exists()


@pytest.mark.parametrize(
    ('arguments', 'said'),
    [
        (['algorithms.ema.half_lif=3ba'], 'tiny.yaml: algorithms.ema.half_lif: EMA has no such argument. '),
        (['optimizer.lr=fast'], "tiny.yaml: optimizer.lr: must be a number, got 'fast' (a string)."),
        (['max_duration'], "the override 'max_duration' must have the form key=value"),
        (['--seeds', '1,x'], "seeds must be whole numbers of at least 0 with commas between, got '1,x': 1,2,3"),
        (['--seeds', '1,-1'], "seeds must be whole numbers of at least 0 with commas between, got '1,-1'"),
        (['--seeds', '1,2,1'], "seeds must differ, or one run counts twice, got '1,2,1'"),
        (['--sed', '1'], '--seeds'),
    ],
)
def test_usage_errors_are_one_message_and_exit_code_2(call, recipe, arguments, said):
    code, out, err = call('train', recipe, *arguments)
    assert code == 2
    assert said in ' '.join(err.replace('│', ' ').split())
    assert 'Traceback' not in out + err


def test_missing_recipe_and_broken_yaml(call, tmp_path):
    (tmp_path / 'broken.yaml').write_text('a: [1')
    faults = (('brken.yaml', 'Did you mean'), ('broken.yaml', 'is not legal YAML'), ('.', 'is a folder. Give one of'))
    for name, said in faults:
        code, _, err = call('train', tmp_path / name)
        assert code == 2
        assert said in err
        assert 'Traceback' not in err


BLOCKED = """
import sys
from importlib.abc import MetaPathFinder

class Blocker(MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition('.')[0] == {blocked!r}:
            raise ModuleNotFoundError(f'No module named {{name!r}}', name=name)

sys.meta_path.insert(0, Blocker())
sys.argv[1:] = {arguments!r}
from composer_ema.cli import main
main()
"""


@pytest.mark.parametrize('blocked', ['typer', 'rich', 'composer', 'omegaconf', 'torchvision'])
def test_without_the_extra_one_line_names_it(recipe, tmp_path, blocked):
    process = spawn('-c', BLOCKED.format(blocked=blocked, arguments=['train', str(recipe)]), cwd=tmp_path)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 2, err
    assert out == ''
    assert len(err.splitlines()) == 1
    assert blocked in err
    assert "pip install 'composer-ema[composer]'" in err


def test_every_import_is_of_a_declared_distribution():
    """The core may import what install_requires names, the rooms of the recipes also what the extras name."""
    setup = configparser.ConfigParser()
    setup.read(PACKAGE.parent / 'setup.cfg')
    core = modules_of(setup['options']['install_requires'])
    doors = modules_of(setup['options.extras_require']['doors'])
    # torchvision brings PIL, transformers its tokenizers, torch typing_extensions.
    extra = modules_of(setup['options.extras_require']['composer']) | doors | {'PIL', 'tokenizers'}
    for path in sorted(PACKAGE.rglob('*.py')):
        room = path.relative_to(PACKAGE).parts[0]
        of_recipes = room in ('cli.py', 'pictures', 'recipe', 'zoo')
        names = {name.partition('.')[0] for name in imports(path)} - sys.stdlib_module_names - {'composer_ema'}
        of_doors = room in ('lightning', 'transformers.py')
        allowed = core | (extra if of_recipes else {'composer', 'triton', 'rich'})  # each guarded where it is imported
        allowed |= {*doors, 'typing_extensions'} if of_doors else set()
        assert names <= allowed, path


def modules_of(requirements: str) -> set[str]:
    names = {re.split(r'[<>=!~ ]', line)[0] for line in requirements.split('\n') if line and not line.startswith('#')}
    return {{'mosaicml': 'composer', 'pyyaml': 'yaml'}.get(name, name).replace('-', '_') for name in names}


def imports(path: Path) -> set[str]:
    nodes = list(ast.walk(ast.parse(path.read_text())))
    plain = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    return plain | {node.module for node in nodes if isinstance(node, ast.ImportFrom) and node.module}


def test_bug_of_our_own_keeps_its_trace(recipe, monkeypatch):
    def broken(*_: object) -> None:
        raise ValueError('a bug')

    monkeypatch.setattr('composer_ema.recipe.schema.load', broken)
    with pytest.raises(ValueError, match='a bug'):
        cli.app(['train', str(recipe)])


def test_export_writes_the_average_of_a_checkpoint(call, recipe, tmp_path):
    assert call('train', recipe, 'progress_bar=false')[0] == 0
    checkpoint, exported = tmp_path / 'runs/tiny/checkpoints/latest-rank0.pt', tmp_path / 'average.safetensors'
    code, out, _ = call('export', checkpoint, exported)
    assert code == 0
    assert '3ba' in out
    expected = load_average(checkpoint)
    written = load_file(exported)
    assert written.keys() == expected.keys()
    assert all(written[name].equal(expected[name]) for name in expected)
    with safe_open(exported, 'pt') as file:
        assert file.metadata()['run_name'] == 'tiny'
    for code, out, err in (call('inspect', exported), call('export', checkpoint, exported, '--strip-prefix', 'auto')):
        assert (code, err) == (0, '')
        assert 'half_life' in out
    assert load_file(exported).keys() == {name.removeprefix('module.') for name in expected}
    code, _, err = call('export', exported, tmp_path / 'b.pt', '--strip-prefix', 'module')
    assert code == 2
    assert "strip_prefix='module' applies to no name" in err


def test_a_key_says_which_weights_of_a_file_are_the_average(call, tmp_path):
    weights = {'weight': torch.ones(2)}
    path, out = tmp_path / 'a.pt', tmp_path / 'out.pt'
    torch.save({'state': {'model': {'weight': torch.zeros(2)}, 'ema': weights}}, path)
    code, _, err = call('export', path, out)
    assert code == 2
    assert '--key state.ema' in err
    assert call('export', path, out, '--key', 'state.ema')[0] == 0
    code, shown, _ = call('inspect', path, '--key', 'state.ema')
    assert code == 0
    assert 'keeps weights by name' in shown
    assert torch.load(out, weights_only=True)['weight'].equal(weights['weight'])


def test_a_folder_is_told_the_checkpoint_in_it(call, recipe, tmp_path):
    assert call('train', recipe, 'progress_bar=false')[0] == 0
    run = tmp_path / 'runs/tiny'
    for command in (['inspect', run], ['export', run, tmp_path / 'out.pt']):
        code, _, err = call(*command)
        assert code == 2
        assert f'Pass the checkpoint in it: {run}/checkpoints/latest-rank0.pt' in err


def test_export_onto_its_own_checkpoint_is_refused(call, tmp_path):
    path, link = tmp_path / 'a.pt', tmp_path / 'latest-rank0.pt'
    torch.save({'ema': {'weight': torch.ones(2)}}, path)
    link.symlink_to(path.name)
    before = path.read_bytes()
    for given, out in ((path, path), (link, path), (path, link)):
        code, shown, err = call('export', given, out, '--key', 'ema')
        assert (code, shown) == (2, '')
        assert err.startswith(f'{out} is the checkpoint itself')
    assert path.read_bytes() == before


def test_export_of_what_is_no_checkpoint(call, tmp_path):
    (tmp_path / 'broken.pt').write_bytes(b'no checkpoint')
    for name in ('missing.pt', 'broken.pt'):
        code, _, err = call('export', tmp_path / name, tmp_path / 'out.safetensors')
        assert code == 2
        assert name in err
        assert 'Traceback' not in err
        assert not (tmp_path / 'out.safetensors').exists()


@pytest.mark.slow
def test_killed_run_continues_where_its_last_checkpoint_was(call, recipe, tmp_path):
    command = ['train', recipe, 'max_duration=40ep', 'save_interval=7ba', 'autoresume=true', 'progress_bar=false']
    process = spawn('-m', 'composer_ema.cli', *command, cwd=tmp_path)
    metrics = tmp_path / 'runs/tiny/metrics.jsonl'
    started = time.monotonic()
    while not (metrics.exists() and metrics.read_text().count('\n') > 60):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() - started < 60, 'no 60 lines in a minute'
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    killed_after = len(metrics.read_text().splitlines())
    assert call(*command)[0] == 0
    assert call(*command[:-2], 'progress_bar=false', 'run_name=whole')[0] == 0
    assert lines_of(tmp_path / 'runs/tiny') == lines_of(tmp_path / 'runs/whole')
    assert killed_after < len(lines_of(tmp_path / 'runs/whole')), 'it was killed in the middle'


@pytest.mark.slow
def test_two_processes_of_composers_launcher_write_one_run(recipe, tmp_path):
    command = ['composer.cli.launcher', '-n', '2', '-m', 'composer_ema.cli', 'train', recipe, 'max_duration=1ep']
    process = spawn('-m', *command, cwd=tmp_path)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert out.count('run folder:') == 1
    assert [path.name for path in (tmp_path / 'runs').iterdir()] == ['tiny']
    lines = lines_of(tmp_path / 'runs/tiny')
    assert [line['batch'] for line in lines if 'loss/train/total' in line] == list(range(1, 11))
    assert lines[-1]['sample'] == 80


@pytest.mark.slow
def test_launcher_reports_a_wrong_recipe_without_traces(recipe, tmp_path):
    command = ['composer.cli.launcher', '-n', '2', '-m', 'composer_ema.cli', 'train', recipe, 'optimizer.lr=fast']
    process = spawn('-m', *command, cwd=tmp_path)
    out, err = process.communicate(timeout=120)
    assert process.returncode != 0
    assert "optimizer.lr: must be a number, got 'fast'" in out + err
    assert 'Traceback' not in out + err


class TestPlot:
    @pytest.fixture
    def runs(self, tmp_path: Path) -> list[Path]:
        lines = [
            {'epoch': n / 10, 'batch': n, 'sample': 8 * n, 'loss/train/total': 1 / n, 'lr/group0': 0.1}
            for n in range(1, 21)
        ]
        folders = [tmp_path / 'runs' / name for name in ('first', 'second')]
        for folder in folders:
            folder.mkdir(parents=True)
            (folder / 'metrics.jsonl').write_text(''.join(json.dumps(line) + '\n' for line in lines))
        return folders

    def test_train_leaves_the_picture_that_plot_draws(self, call, recipe, tmp_path):
        assert call('train', recipe, 'max_duration=1ep', 'progress_bar=false')[0] == 0
        folder = tmp_path / 'runs/tiny'
        drawn = (folder / 'curves.svg').read_bytes()
        code, out, _ = call('plot', folder, '--out', tmp_path / 'again')
        assert code == 0
        assert out.splitlines() == [f'written: {tmp_path}/again.png', f'written: {tmp_path}/again.svg']
        assert (tmp_path / 'again.svg').read_bytes() == drawn

    def test_one_run_is_drawn_into_its_folder_and_several_above_them(self, call, runs):
        assert call('plot', runs[0])[0] == 0
        assert (runs[0] / 'curves.svg').exists()
        assert call('plot', *runs, '--over', 'batch')[0] == 0
        assert (runs[0].parent / 'curves.png').exists()

    def test_recipes_are_drawn_here_and_told_in_words_without_training(self, call, recipe, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        code, out, _ = call('plot', recipe, 'algorithms.ema.half_life=4ba', recipe, '--batches-per-epoch', '7')
        assert code == 0
        assert out.splitlines() == [
            'tiny algorithms.ema.half_life=4ba',
            '  ema: half_life=4ba (28.6 % of the run), effective number of steps 1/Σw² = 10.4 of 14',
            'tiny',
            '  ema: half_life=3ba (21.4 % of the run), effective number of steps 1/Σw² = 8.53 of 14',
            'written: schedule.png',
            'written: schedule.svg',
        ]
        assert {path.name for path in tmp_path.iterdir()} == {'tiny.yaml', 'schedule.png', 'schedule.svg'}

    @pytest.mark.parametrize(
        ('arguments', 'said'),
        [
            (['runs/frist'], "runs/frist is no run folder: there is no such folder. Did you mean 'runs/first'?"),
            (['runs'], 'it has no metrics.jsonl. Runs in it: runs/first, runs/second.'),
            (['.'], 'it has no metrics.jsonl. Recipes in it: tiny.yaml.'),
            (['runs/first/a.pt'], 'runs/first/a.pt is a file, neither the folder of a run nor a recipe'),
            (['runs/first', '--batches-per-epoch', '5'], '--batches-per-epoch=5 is for recipes, and runs/first is'),
            (['runs/first', '--out', 'a.jpeg'], 'a.jpeg has the ending .jpeg, a picture is written as png, svg, pdf.'),
            (['runs/first', '--over', 'steps'], "a picture is drawn over epoch, batch, sample, got 'steps'."),
            (['runs/first', 'runs/first'], 'runs/first was given twice.'),
            (['runs/first', 'tiny.yaml'], 'runs/first is a folder of a run and tiny.yaml a recipe'),
            (['lr=1'], "the override 'lr=1' has no recipe before it."),
            (['missing.yaml'], 'missing.yaml: there is no such file.'),
            (['tiny.yaml', 'optimizer.lr=fast'], "tiny.yaml: optimizer.lr: must be a number, got 'fast'"),
            (['tiny.yaml', 'max_duration=9tok'], 'tiny.yaml: max_duration'),
        ],
    )
    def test_what_cannot_be_drawn_is_one_line_and_exit_code_2(self, call, runs, recipe, monkeypatch, arguments, said):
        monkeypatch.chdir(runs[0].parents[1])
        Path('runs/first/a.pt').touch()
        code, out, err = call('plot', *arguments)
        assert (code, out) == (2, '')
        assert said in err
        assert len(err.splitlines()) == 1


class TestInspect:
    @pytest.fixture
    def checkpoint(self, call, recipe, tmp_path) -> Path:
        assert call('train', recipe, 'progress_bar=false')[0] == 0
        return tmp_path / 'runs/tiny/checkpoints/latest-rank0.pt'

    def test_tables_say_what_is_in_it(self, call, checkpoint):
        code, out, err = call('inspect', checkpoint)
        assert (code, err) == (0, '')
        rows = [' '.join(line.replace('│', ' ').split()) for line in out.splitlines()]
        assert 'trained 2 epochs, 20 batches, 160 samples' in rows
        assert 'model slot training weights' in rows
        assert 'average EMA, written by composer_ema, version 3' in rows
        assert 'horizon half_life=3ba, ema_start=0.0dur, update_interval=1ba' in rows
        assert 'updates 20' in rows
        assert any(re.fullmatch(r'distance 0\.\d+ of the norm of the training weights', row) for row in rows)
        assert any(row.startswith('averaged parameter float32') for row in rows)
        code, longer, _ = call('inspect', checkpoint, '--all')
        assert code == 0
        averaged = load_average(checkpoint)
        assert all(name in longer for name in averaged)

    def test_json_holds_all_of_it(self, call, checkpoint):
        code, out, _ = call('inspect', checkpoint, '--json')
        assert code == 0
        found = json.loads(out)
        assert found['averages'][0]['config']['half_life'] == '3ba'
        assert {tensor['name'] for tensor in found['averages'][0]['tensors']} == load_average(checkpoint).keys()

    @pytest.mark.parametrize('name', ['missing.pt', 'broken.pt', 'cut.pt', '.'])
    def test_what_is_no_checkpoint_is_one_line_and_exit_code_2(self, call, tmp_path, name):
        (tmp_path / 'broken.pt').write_bytes(b'no checkpoint')
        (tmp_path / 'cut.pt').write_bytes((Path(__file__).parent / 'fixtures/0.32-single-call.pt').read_bytes()[:-99])
        code, out, err = call('inspect', tmp_path / name)
        assert (code, out) == (2, '')
        assert len(err.splitlines()) == 1
        assert str(tmp_path / name) in err
