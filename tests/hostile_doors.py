"""Every door that takes a file, called with damaged and absurd ones; see scripts/trial_files.py."""

from __future__ import annotations

import dataclasses
import io
import json
import resource
import time
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import torch
from hostile_files import averaged_model, damaged, mutated, of_composer, same, sound_files
from rich.console import Console

from composer_ema import CheckpointError, Snapshots, export, load_average, merge, read_checkpoint, reconstruct
from composer_ema.checkpoints.inspection import describe
from composer_ema.pictures import checkpoints
from composer_ema.pictures.curves import read_run
from composer_ema.pictures.errors import PlotError
from composer_ema.pictures.runs import draw_runs
from composer_ema.pictures.tables import Whole
from composer_ema.pictures.writing import write

# Seconds of the CPU, and of the clock where something waits; kilobytes beyond what the process had used before.
SLOW, STUCK, LARGE = 10.0, 60.0, 1.5e6
METRICS = {
    'epoch': 1.0, 'batch': 1, 'sample': 8, 'loss/train/total': 1.0, 'lr/group0': 0.1, 'momentum/group0': 0.9,
    'metrics/eval_ema/Accuracy': 0.5, 'metrics/eval_ema/CrossEntropy': 1.5, 'ema/relative_distance': 0.1,
}  # fmt: skip
VALUES = ('1' * 400, '-' + '1' * 5000, '1e400', 'NaN', '-1e308', '"text"', '[{}]', 'null', '-1', 'true', '5e-324')


def shown(path: Path) -> None:
    """What ``inspect`` and ``inspect --json`` do, without a terminal."""
    found = describe(path)
    json.dumps(dataclasses.asdict(found))
    console = Console(width=100, file=io.StringIO(), force_terminal=True, color_system=None)
    for table in checkpoints.of_checkpoint(found, all_tensors=True):
        console.print(Whole(table), highlight=False, crop=False)
    assert isinstance(console.file, io.StringIO)
    text = console.file.getvalue()
    if not all(each.isprintable() or each == '\n' for each in text):
        raise AssertionError('what does not print reached the terminal')


def run_of_snapshots(folder: Path) -> Path:
    """The snapshots of a run of twelve steps."""
    torch.manual_seed(0)
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    snapshots = Snapshots(model, folder / 'run', every='2ba', num_steps=12)
    for _ in range(12):
        model(torch.randn(4, 3)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        snapshots.update()
    snapshots.finish()
    return folder / 'run'


class Trial:
    """Counts what the doors do with one input after another."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.fell: Counter[str] = Counter()
        self.inputs = 0
        self.used_before = _most_used()

    def door(self, what: str, read: Callable[[], Any], truth: Any = None) -> None:
        """Calls a door; what it returns must be the truth, if that is known."""
        started, worked = time.monotonic(), time.process_time()
        try:
            found = read()
            if truth is not None and not same(found, truth):
                self._report('wrong', what, 'read as something else')
        except (CheckpointError, PlotError) as error:
            if not str(error).isprintable():
                self._report('wrong', what, 'an error that does not print')
        except Exception:
            self._report('tracebacks', what, traceback.format_exc(limit=-3))
        waited, worked = time.monotonic() - started, time.process_time() - worked
        if worked > SLOW or waited > STUCK:
            self._report('slow', what, f'{waited:.1f} s, {worked:.1f} of the CPU')

    def _report(self, kind: str, what: str, why: str) -> None:
        self.fell[kind] += 1
        print(f'{kind}: {what}\n{why}', flush=True)

    def summary(self, seconds: float) -> str:
        largest = _most_used() - self.used_before
        self.fell['large'] += largest > LARGE
        parts = [f'{self.fell[kind]} {kind}' for kind in ('wrong', 'tracebacks', 'slow', 'large')]
        left = [path.name for path in self.folder.rglob('.*') if path.name.startswith('.out')]
        self.fell['left'] += len(left)
        return (
            f'files: {self.inputs:,} inputs, {", ".join(parts)}, {len(left)} temporary files, 0 crashes, '
            f'{largest / 1e3:,.0f} MB more, {seconds:.0f} s'
        )


def _most_used() -> int:
    """The most memory that this process has used so far, in kilobytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def run(rounds: int, seed: int, folder: Path) -> tuple[str, bool]:
    """Runs the trial; returns the summary, and whether nothing fell."""
    started, trial = time.monotonic(), Trial(folder)
    (folder / 'sound').mkdir()
    sound = sound_files(folder / 'sound')
    truths = {name: (path.read_bytes(), read_checkpoint(path), load_truth(path)) for name, path in sound.items()}
    model, optimizer = averaged_model()
    script = {'model': dict(model.state_dict()), 'optimizer': optimizer.state_dict()}
    states = {'composer': of_composer(model, optimizer), 'script': script, 'shadow': optimizer.shadow.state_dict()}
    snapshots = run_of_snapshots(folder)
    files = {path.name: path.read_bytes() for path in snapshots.glob('*.safetensors')}
    average = dict(reconstruct(snapshots, half_life='3ba', anyway=True).state_dict)
    for number in range(rounds):
        random, trial.inputs = Random(f'{seed}/{number}'), trial.inputs + 1
        kind = random.choices(('damaged', 'absurd', 'snapshots', 'metrics'), (10, 7, 2, 1))[0]
        what = f'round {number} of seed {seed}: {kind}'
        if kind == 'damaged':
            name = random.choice(list(sound))
            content, whole, averaged = truths[name]
            path = folder / sound[name].name
            path.write_bytes(damaged(content, random))
            doors(trial, f'{what} {name}', path, random, model, whole, averaged)
        elif kind == 'absurd':
            name = random.choice(list(states))
            held, where = mutated(states[name], random)
            path = folder / 'absurd.pt'
            try:
                torch.save(held, path)
            except Exception:  # torch cannot write it, so it is in no file
                continue
            doors(trial, f'{what} {name}, {where}', path, random, model)
        elif kind == 'snapshots':
            name = random.choice(list(files))
            (snapshots / name).write_bytes(damaged(files[name], random))
            trial.door(f'{what} {name}', lambda: made_of(snapshots), average)
            (snapshots / name).write_bytes(files[name])
        else:
            trial.door(what, lambda random=random: drawn(folder, random))
    summary = trial.summary(time.monotonic() - started)
    return summary, not any(trial.fell.values())


def load_truth(path: Path) -> dict[str, torch.Tensor]:
    """The average in a sound file."""
    return dict(load_average(path))


def made_of(folder: Path) -> Any:
    """What is made of a run where a file may be left out: the average itself, or one that says what it lacks."""
    found = reconstruct(folder, half_life='3ba', anyway=True)
    if found.left_out or found.predicted_error > 1e-3:
        raise CheckpointError('said so')
    return dict(found.state_dict)


def doors(
    trial: Trial, what: str, path: Path, random: Random, model: torch.nn.Module, whole: Any = None, average: Any = None
) -> None:
    """Reads a file through some of the doors that take one."""
    out = path.with_name(random.choice(('out.pt', 'out.safetensors')))

    def exported() -> Any:
        out.unlink(missing_ok=True)
        export(path, out)
        return None if average is None else dict(sorted(load_average(out).items()))

    choices: dict[str, tuple[Callable[[], Any], Any]] = {
        'read_checkpoint': (lambda: read_checkpoint(path), whole),
        'load_average': (lambda: dict(load_average(path)), average),
        'load_average with a model': (lambda: load_average(path, model), None),
        'inspect': (lambda: shown(path), None),
        'export': (exported, None if average is None else dict(sorted(average.items()))),
        'merge': (lambda: merge([path, twin(path)], out, equal=True, overwrite=True), None),
    }
    for name in random.sample(list(choices), 3):
        read, truth = choices[name]
        trial.door(f'{what}, {name}', read, truth)


def twin(path: Path) -> Path:
    """A copy of a file, which fits it."""
    copy = path.with_name(f'twin{path.suffix}')
    copy.write_bytes(path.read_bytes())
    return copy


def drawn(folder: Path, random: Random) -> None:
    """Draws a metrics file with absurd values, or one that is damaged."""
    lines = [json.dumps({**METRICS, 'epoch': batch / 10, 'batch': batch}) for batch in range(1, random.choice((3, 20)))]
    for place in range(len(lines)):
        if random.random() < 0.3:
            key = random.choice([*METRICS, 'lr/group7', 'lr/groupx', 'metrics/eval_/Accuracy', '/relative_distance'])
            lines[place] = f'{lines[place][:-1]}, {json.dumps(key)}: {random.choice(VALUES)}}}'
    content = '\n'.join(lines).encode()
    (folder / 'metrics.jsonl').write_bytes(damaged(content, random) if random.random() < 0.3 else content)
    write(draw_runs([read_run(folder)]), folder / random.choice(('out.png', 'out.svg')))
