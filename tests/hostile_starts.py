"""Runs that start at the same moment in the same folders: drawn by chance, started, and checked to the last line."""

from __future__ import annotations

import contextlib
import os
import random
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from recipes import tiny

from composer_ema.run_folder.lock import LOCK_FILE

RECIPE = tiny(progress_bar=False, save_interval='3ba')
SEEDS = (1, 2, 3)
STARTS = {
    'unnamed': [],
    'named': ['run_name=x'],
    'goes on': ['run_name=x', 'autoresume=true'],
    'replaces': ['run_name=x', 'save_overwrite=true'],
    'goes back': ['run_name=x', 'load_path=runs/x/checkpoints/ep0-ba3-rank0.pt'],
    'unnamed, refused at the first batch': ['algorithms.ema.half_life=2iter'],
    'replaces, refused at the first batch': [
        'run_name=x', 'save_overwrite=true', 'algorithms.ema.half_life=2iter',
    ],
    'named, refused at the first batch': ['run_name=x', 'algorithms.ema.half_life=2iter'],
}  # fmt: skip
_REFUSALS = r'is in use by|already holds a run|has gone on after|another run than|counts iterations|is missing'
_LONGEST = 300


@dataclass(frozen=True)
class Start:
    """One command of a round.

    Args:
        kind: Of :data:`STARTS`.
        seed: Of its run, which tells its lines from those of others.
        delay: Seconds after the round begins.
    """

    kind: str
    seed: int
    delay: float

    @property
    def arguments(self) -> list[str]:
        return ['tiny.yaml', *STARTS[self.kind], f'seed={self.seed}']


@dataclass(frozen=True)
class Round:
    """Commands that start at about the same time, and whether a run x is there already, stopped after an epoch."""

    starts: tuple[Start, ...]
    has_run: bool


@dataclass(frozen=True)
class Ended:
    """How a command ended: its exit code, and what it printed."""

    code: int
    said: str


#: Starts commands in a folder, and waits for their end.
Starter = Callable[[Path, Sequence[Start]], list[Ended]]


def draw(rng: random.Random) -> Round:
    seeds = rng.sample(SEEDS, rng.choice((2, 3)))
    starts = []
    for seed in seeds:
        kind = rng.choice(list(STARTS))
        # A run that goes on has the seed that it began with.
        starts.append(Start(kind, 1 if kind == 'goes on' else seed, rng.choice((0.0, 0.0, rng.uniform(0, 0.5)))))
    return Round(tuple(starts), rng.random() < 0.5)


class Trial:
    """Rounds of starts, each in a folder of its own, checked against runs that were alone.

    Args:
        folder: An empty folder to work in.
        start: Starts the commands.
    """

    def __init__(self, folder: Path, start: Starter) -> None:
        self._folder, self._start = folder, start
        self._alone = folder / 'alone'
        self._write_recipe(self._alone)
        self.lines: dict[int, str] = {}
        for seed in SEEDS:
            ended = start(self._alone, [Start('unnamed', seed, 0.0)])
            assert ended[0].code == 0, ended[0].said
            taken = self._alone / 'runs' / ('tiny' if seed == 1 else f'tiny-{seed}')
            self.lines[seed] = (taken / 'metrics.jsonl').read_text()
        assert len(set(self.lines.values())) == len(SEEDS)
        self._write_recipe(self._alone, max_duration='1ep', run_name='x')
        ended = start(self._alone, [Start('named', 1, 0.0)])
        assert ended[0].code == 0, ended[0].said

    def play(self, drawn: Round, number: int) -> list[str]:
        """Plays a round; returns what is wrong with what it left."""
        folder = self._folder / f'round{number}'
        self._write_recipe(folder)
        (folder / 'runs').mkdir()
        if drawn.has_run:
            shutil.copytree(self._alone / 'runs/x', folder / 'runs/x', symlinks=True)
        before = _files(folder / 'runs/x')
        ended = self._start(folder, drawn.starts)
        wrong = [*self._wrong_with_ends(drawn, ended), *self._wrong_with_folders(drawn, ended, folder, before)]
        shutil.rmtree(folder)
        return wrong

    def _write_recipe(self, folder: Path, **changed: Any) -> None:
        folder.mkdir(exist_ok=True)
        (folder / 'tiny.yaml').write_text(yaml.safe_dump({**RECIPE, **changed}))

    def _wrong_with_ends(self, drawn: Round, ended: list[Ended]) -> list[str]:
        wrong = []
        for start, each in zip(drawn.starts, ended, strict=True):
            is_refused = each.code == 2 and re.search(_REFUSALS, each.said)
            if (each.code != 0 and not is_refused) or 'Traceback' in each.said:
                wrong.append(f'{start.kind}: exit {each.code}: {each.said[-_LONGEST:]}')
            if (start.kind == 'unnamed') != (each.code == 0) and start.kind.startswith('unnamed'):
                wrong.append(f'{start.kind}: exit {each.code}')
            if 'refused' in start.kind and each.code == 0:
                wrong.append(f'{start.kind}: exit 0')
        return wrong

    def _wrong_with_folders(
        self, drawn: Round, ended: list[Ended], folder: Path, before: dict[str, bytes]
    ) -> list[str]:
        wrong, owners = [], {}
        for start, each in zip(drawn.starts, ended, strict=True):
            if each.code == 0:
                owners.setdefault(each.said.rpartition('run folder: runs/')[2].strip(), []).append(start)
        runs = {path.name for path in (folder / 'runs').iterdir()}
        if strays := runs - owners.keys() - ({'x'} if drawn.has_run else set()):
            wrong.append(f'folders that no run has: {sorted(strays)}')
        for name, starts in owners.items():
            if name != 'x' and len(starts) > 1:
                wrong.append(f'{len(starts)} runs in {name}')
            wrong += self._wrong_with_run(folder / 'runs' / name, starts)
        if 'x' not in owners and _files(folder / 'runs/x') != before:
            wrong.append('x was changed by commands that were all refused')
        left = [str(path) for path in folder.rglob('*') if path.name == LOCK_FILE or path.name.startswith('.')]
        return [*wrong, *(f'left: {path}' for path in left)]

    def _wrong_with_run(self, run: Path, starts: list[Start]) -> list[str]:
        if not run.is_dir():
            return [f'{run.name} is not there']
        recipe = yaml.safe_load((run / 'recipe.yaml').read_text())
        if recipe['seed'] not in [start.seed for start in starts] or recipe['run_name'] != run.name:
            return [f'{run.name} has the recipe of seed {recipe["seed"]} and run {recipe["run_name"]}']
        lines = (run / 'metrics.jsonl').read_text()
        if lines != self.lines[recipe['seed']]:
            return [f'{run.name} has {len(lines.splitlines())} lines, and not those of seed {recipe["seed"]}']
        return []


def _files(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in sorted(folder.rglob('*')) if path.is_file()}


def forked(folder: Path, starts: Sequence[Start]) -> list[Ended]:
    """Forks this process, which has imported everything, so that the starts are as close as they can be."""
    begin = time.monotonic() + 0.05 * len(starts)
    children = []
    for index, start in enumerate(starts):
        output = folder / f'output{index}'
        if (child := os.fork()) == 0:
            _run_in_child(folder, start, output, begin)
        children.append((child, output))
    ended = []
    for child, output in children:
        _, status = os.waitpid(child, 0)
        ended.append(Ended(os.waitstatus_to_exitcode(status), output.read_text()))
        output.unlink()
    return ended


def _run_in_child(folder: Path, start: Start, output: Path, begin: float) -> None:
    code = 70
    try:
        file = os.open(output, os.O_WRONLY | os.O_CREAT)
        os.dup2(file, 1)
        os.dup2(file, 2)
        os.chdir(folder)
        from composer_ema.recipe import run, schema
        from composer_ema.recipe.arguments import RecipeError

        time.sleep(max(0.0, begin + start.delay - time.monotonic()))
        with open(1, 'w', closefd=False) as out, contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
            try:
                outcome = run.train(schema.load(start.arguments[0], start.arguments[1:]), lambda remark: None)
                print(f'run folder: {outcome.folder}')
                code = 0
            except RecipeError as error:
                print(error)
                code = 2
            except BaseException:
                import traceback

                traceback.print_exc()
    finally:
        os._exit(code)


def spawned(folder: Path, starts: Sequence[Start]) -> list[Ended]:
    """Starts ``composer-ema train`` as a user does."""
    begin, running = time.monotonic(), []
    for start in sorted(starts, key=lambda each: each.delay):
        time.sleep(max(0.0, begin + start.delay - time.monotonic()))
        command = [sys.executable, '-m', 'composer_ema.cli', 'train', *start.arguments]
        process = subprocess.Popen(command, cwd=folder, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        running.append((start, process))
    ended = {}
    for start, process in running:
        said, _ = process.communicate()
        ended[id(start)] = Ended(process.returncode, said)
    return [ended[id(start)] for start in starts]
