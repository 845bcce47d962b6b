"""Files that try to execute something, or to crash who reads them, at every door: nothing may run and nothing crash."""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

TESTS = Path(__file__).parents[1]
sys.path.insert(0, str(TESTS))

import hostile_trust as hostile  # noqa: E402
import torch  # noqa: E402
import toy  # noqa: E402
from composer.utils import checkpoint  # noqa: E402

from composer_ema import EMA, CheckpointError, safe_loading  # noqa: E402
from composer_ema.recipe import schema  # noqa: E402
from composer_ema.recipe.arguments import RecipeError  # noqa: E402
from composer_ema.recipe.loaded import check_loaded  # noqa: E402
from composer_ema.spans import ArgumentError  # noqa: E402

RECIPE = TESTS.parent / 'yamls' / 'mnist1d.yaml'


class Trial:
    """Counts what was tried and what failed."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.trap = folder, folder / 'trap'
        self.inputs = self.executed = self.tracebacks = self.crashes = self.wrong = 0

    def attempt(self, what: str, door: Callable[[], Any], *, may_succeed: bool = False) -> None:
        """Opens a door: it must refuse with an error of ours, and the trap must not be there afterwards."""
        self.inputs += 1
        try:
            door()
            if not may_succeed:
                self.wrong += 1
                print(f'{what}: was read')
        except (CheckpointError, RecipeError, ArgumentError):
            pass
        except Exception as error:
            self.tracebacks += 1
            print(f'{what}: {type(error).__name__}: {str(error)[:200]}')
        self.look(what)

    def look(self, what: str) -> None:
        if self.trap.exists():
            self.executed += 1
            print(f'{what}: EXECUTED')
            shutil.rmtree(self.trap) if self.trap.is_dir() else self.trap.unlink()


def files(trial: Trial, every: int) -> None:
    """Each attack at each door that reads a file; one in ``every`` at a time."""
    (trial.folder / 'files').mkdir()
    readers = hostile.readers(trial.folder / 'out.safetensors')
    number = 0
    for name, path in hostile.files(trial.folder / 'files', trial.trap):
        for door, read in readers.items():
            number += 1
            if number % every == 0:
                trial.attempt(f'{door}, {name}', lambda path=path, read=read: read(path))
    for name, path in hostile.folders(trial.folder, trial.trap):
        for door, read in readers.items():
            number += 1
            # What a chunk or a value holds is met where it is asked for.
            may_succeed = 'in a' in name and 'index' not in name
            if number % every == 0 and door != 'reconstruct':
                trial.attempt(f'{door}, {name}', lambda path=path, read=read: read(path), may_succeed=may_succeed)


def composer_loads(trial: Trial, every: int) -> None:
    """Each attack where Composer's Trainer loads it, without a check before."""
    trainer = toy.make_trainer([EMA(half_life='2ba')], max_duration='1ba')
    trainer.fit()
    saved = torch.load(trainer.save_checkpoint(str(trial.folder / 'sound.pt')), weights_only=False)

    def load(path: Path) -> None:
        with safe_loading():
            checkpoint.load_checkpoint(str(path), trainer.state, trainer.logger)

    for number, (name, path) in enumerate(hostile.files(trial.folder / 'files', trial.trap)):
        if number % every == 0:
            trial.attempt(f'Trainer, {name}', lambda path=path: load(path))
    for text in hostile.texts(trial.trap):
        content = {**saved, 'state': {**saved['state'], 'algorithms': [('BlurPool', {'repr': text})]}}
        torch.save(content, trial.folder / 'text.pt')
        # Composer warns that it cannot make the algorithm, and goes on without it.
        trial.attempt(f'eval of {text[:60]!r}', lambda: load(trial.folder / 'text.pt'), may_succeed=True)
    for name in ('../trap', str(trial.trap)):
        path = hostile.tar_that_leaves_its_folder(trial.folder / 'a.tar', name)
        # An absolute name becomes one inside of the folder.
        trial.attempt(f'tar with {name}', lambda path=path: refused_tar(load, path), may_succeed=name[0] == '/')
    trainer.close()


def refused_tar(load: Callable[[Path], None], path: Path) -> None:
    import tarfile

    try:
        load(path)
    except (tarfile.TarError, KeyError) as error:  # it left nothing outside, or the rest is no checkpoint
        raise CheckpointError(str(error)) from error


def recipes(trial: Trial, every: int) -> None:
    """Each attack as load_path and by autoresume, checked as a run checks it."""
    save_folder = trial.folder / 'runs' / 'r' / 'checkpoints'
    save_folder.mkdir(parents=True)
    own = [f'runs_folder={trial.folder / "runs"}', 'run_name=r']
    for number, (name, path) in enumerate(hostile.files(trial.folder / 'files', trial.trap)):
        if number % every:
            continue
        shutil.copy(path, save_folder / 'ep0-ba2-rank0.pt')
        (save_folder / 'latest-rank0.pt').unlink(missing_ok=True)
        (save_folder / 'latest-rank0.pt').symlink_to('ep0-ba2-rank0.pt')
        for key in (f'load_path={path}', 'autoresume=true'):
            trial.attempt(
                f'{key}, {name}', lambda key=key: check_loaded(schema.plan(schema.load(RECIPE, [*own, key])), 'r')
            )
    for text in hostile.YAML_TAGS:
        path = trial.folder / 'a.yaml'
        path.write_text(text.format(at=trial.trap))
        trial.attempt(f'recipe {text!r}', lambda path=path: schema.load(path))
        trial.attempt('override', lambda text=text: schema.load(RECIPE, [f'model={text.format(at=trial.trap)}']))


def arguments(trial: Trial, seed: int, rounds: int) -> None:
    """Random arguments to what is allowed, in a process of its own."""
    folder = trial.folder / 'fuzz'
    folder.mkdir()
    code = f'import hostile_trust as h, pathlib; print(h.fuzz({seed}, {rounds}, pathlib.Path({str(folder)!r})))'
    own = {**os.environ, 'PYTHONPATH': f'{TESTS}:{TESTS.parent}'}
    done = subprocess.run([sys.executable, '-c', code], env=own, capture_output=True, text=True, check=False)
    trial.inputs += rounds
    if done.returncode:
        trial.crashes += 1
        number = (folder / 'number').read_text()
        print(f'arguments {seed}/{number}: the process ended with {done.returncode}: {done.stderr[-300:]}')
        return
    *failures, count = done.stdout.splitlines()
    print('\n'.join(failures))
    trial.tracebacks += int(count)


def run(seed: int, rounds: int, every: int) -> tuple[int, str]:
    """Returns how many failed, and the summary."""
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter('ignore')
        trial = Trial(Path(folder))
        files(trial, every)
        composer_loads(trial, every)
        recipes(trial, every)
        arguments(trial, seed, rounds)
    failed = trial.executed + trial.tracebacks + trial.crashes + trial.wrong
    return failed, (
        f'attacks: {trial.inputs:,} inputs, {trial.wrong} wrong, {trial.tracebacks} tracebacks, {trial.executed} '
        f'executed, {trial.crashes} crashes, {time.monotonic() - started:.0f} s'
    )


def _main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--seed', type=int, default=0, help='of the random arguments')
    parser.add_argument('--rounds', type=int, default=20_000, help='random calls of what is allowed')
    parser.add_argument('--every', type=int, default=1, help='try one in this many attacks')
    given = parser.parse_args()
    failed, summary = run(given.seed, given.rounds, given.every)
    print(summary)
    return int(failed > 0)


if __name__ == '__main__':
    sys.exit(_main())
