"""Kills runs at random moments, lets each go on until it ends, and compares it with one that was never killed.

Training weights, averages, metrics and snapshots must be equal to the bit, and no unfinished file may be left.

    python tests/scripts/trial_kills.py [--seed 0] [--rounds 100]
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
import yaml
from recipes import tiny
from safetensors.torch import load_file

from composer_ema.recipe import run, schema

RECIPE = tiny(
    max_duration='3ep',
    seed=3,
    progress_bar=False,
    autoresume=True,
    data={'num_samples': 60},
    optimizer={'momentum': 0.9},
)
#: What is different from run to run: how often it saves, what it keeps, and whether it writes snapshots.
VARIANTS = (
    {'save_interval': '1ba'},
    {'save_interval': '4ba', 'algorithms': {'ema': {'half_life': '3ba', 'snapshots': '2ba'}}},
    {'save_interval': '2ba', 'save_num_checkpoints_to_keep': 2, 'algorithms': {'ema': {'power': 0.1}}},
    {'save_interval': '1ba', 'save_filename': 'newest-rank{rank}.pt', 'eval_interval': '5ba'},
    {'save_interval': '1ep', 'algorithms': {'ema': {'half_life': '3ba', 'snapshots': '1ba'}}},
)


@dataclass
class Found:
    """What a trial came to."""

    kills: int = 0
    rounds: int = 0
    while_writing: int = 0
    failures: list[str] = field(default_factory=list)


class Child:
    """A run in a process forked from this one, which has imported everything.

    Args:
        recipe: The file.
        log: Where its output goes.
    """

    def __init__(self, recipe: Path, log: Path) -> None:
        self.pid = os.fork()
        if self.pid:
            return
        code = 70
        try:
            output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
            os.dup2(output, 1)
            os.dup2(output, 2)
            torch.set_num_threads(1)
            run.train(schema.load(recipe, ['run_name=one']), print)
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)

    def seconds(self) -> float:
        """Time that it has spent on a core, which other processes do not stretch."""
        return time.clock_gettime((~self.pid << 3) | 2)

    def end(self) -> tuple[int, float]:
        """Waits for its end: exit code, or the signal as a negative one, and its seconds on a core."""
        _, status, usage = os.wait4(self.pid, 0)
        return os.waitstatus_to_exitcode(status), usage.ru_utime + usage.ru_stime

    def kill_after(self, seconds: float) -> bool:
        """Kills it once it has spent so long on a core; whether it had not ended by then."""
        while self.seconds() < seconds:
            if os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None:
                break
            time.sleep(0.0005)
        os.kill(self.pid, signal.SIGKILL)
        return self.end()[0] == -signal.SIGKILL


def trial(seed: int, kills: int, scratch: Path) -> Iterator[Found]:
    """Yields what has been found after each round: a run killed up to three times, and the one that ends it."""
    draw, found = random.Random(seed), Found()
    whole: dict[int, tuple[Any, float]] = {}
    while found.kills < kills:
        which = draw.randrange(len(VARIANTS))
        if which not in whole:
            folder = scratch / f'whole-{which}'
            code, seconds = Child(_recipe(folder, which), folder / 'log').end()
            assert code == 0, (folder / 'log').read_text()
            whole[which] = _left_by(folder), seconds
        expected, seconds = whole[which]
        found.rounds += 1
        folder = scratch / f'round-{found.rounds}'
        recipe, moments = _recipe(folder, which), []
        for _ in range(min(draw.randint(1, 3), kills - found.kills)):
            moments.append(round(draw.uniform(0.05, 1) * seconds, 4))
            found.kills += Child(recipe, folder / 'log').kill_after(moments[-1])
            found.while_writing += bool(_unfinished(folder))
        code, _ = Child(recipe, folder / 'log').end()
        problem = f'exit code {code}' if code else _difference(_left_by(folder), expected)
        if problem or _unfinished(folder):
            log = (folder / 'log').read_text()[-2000:]
            found.failures.append(
                f'seed {seed}, round {found.rounds}, variant {which}, killed at {moments} s: '
                f'{problem or ""} unfinished: {_unfinished(folder)}\n{log}'
            )
        yield found


def _recipe(folder: Path, which: int) -> Path:
    folder.mkdir(parents=True)
    path = folder / 'recipe.yaml'
    path.write_text(yaml.safe_dump({**RECIPE, **VARIANTS[which], 'runs_folder': str(folder)}))
    return path


def _unfinished(folder: Path) -> list[str]:
    return [str(path.relative_to(folder)) for path in folder.rglob('.*')]


def _left_by(folder: Path) -> dict[str, Any]:
    """The metrics, the weights and averages of the last checkpoint, and the snapshots of a run."""
    of_run = folder / 'one'
    state = torch.load(of_run / 'checkpoints' / 'latest-rank0.pt', weights_only=False)['state']
    algorithms = {name: own for name, own in state['algorithms']}
    ema = algorithms['EMA']['averages']
    return {
        'metrics': (of_run / 'metrics.jsonl').read_text(),
        'weights': state['model'],
        'averages': {
            f'{label}/{kind}/{name}': tensor
            for label, own in ema.items()
            for kind in ('parameters', 'buffers')
            for name, tensor in own[kind].items()
        },
        'batches': state['timestamp']['Timestamp']['batch'],
        **{path.name: load_file(path) for path in sorted((of_run / 'snapshots').glob('*.safetensors'))},
    }


def _difference(found: dict[str, Any], expected: dict[str, Any]) -> str:
    """Where two runs differ; empty if they are equal to the bit."""
    if found.keys() != expected.keys():
        return f'files {sorted(found.keys() ^ expected.keys())} are there only once.'
    for name, value in expected.items():
        own = found[name]
        if isinstance(value, dict):
            if own.keys() != value.keys():
                return f'{name} has other tensors.'
            unequal = [key for key, tensor in value.items() if not torch.equal(own[key], tensor)]
            if unequal:
                return f'{name} differ in {unequal}.'
        elif own != value:
            return f'{name} differ.'
    return ''


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--seed', type=int, default=0)
    parser.add_argument('--rounds', type=int, default=100)
    arguments = parser.parse_args()
    started, found, shown = time.monotonic(), Found(), 0
    with tempfile.TemporaryDirectory() as scratch:
        for found in trial(arguments.seed, arguments.rounds, Path(scratch)):
            for failure in found.failures[shown:]:
                print(failure, flush=True)
            shown = len(found.failures)
    print(
        f'kills: {found.kills} SIGKILLs in {found.rounds} runs, {found.while_writing} while a file was being written, '
        f'{len(found.failures)} runs with anything lost, {time.monotonic() - started:.0f} s'
    )
    return 1 if found.failures else 0


if __name__ == '__main__':
    sys.exit(main())
