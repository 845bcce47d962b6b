"""Damaged checkpoints, drawn at random, and what a run makes of each: for a test, and for the trial of thousands."""

from __future__ import annotations

import contextlib
import dataclasses
import gzip
import hashlib
import io
import os
import random
import shutil
import stat
import tarfile
import tempfile
import traceback
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import composer.utils.checkpoint
import torch
import torch.distributed.checkpoint as dcp
import yaml
from bounded import in_time
from composer.core import Time
from torch.distributed.checkpoint.api import CheckpointException

from composer_ema.recipe import schema
from composer_ema.recipe.arguments import RecipeError
from composer_ema.recipe.build import build
from composer_ema.recipe.loaded import check_loaded
from composer_ema.recipe.matching import how_loaded, refusing_misfits
from composer_ema.recipe.run import train
from composer_ema.run_folder.packed import decompressed

TINY: dict[str, Any] = {
    'max_duration': '1ep',
    'save_interval': '2ba',
    'progress_bar': False,
    'device': 'cpu',
    'model': {'name': 'fashion_cnn', 'widths': [2, 2, 2, 2], 'num_classes': 3},
    'data': {'name': 'fake', 'image_size': [1, 17, 17], 'num_classes': 3, 'size': 40, 'eval_size': 10, 'batch_size': 8},
    'optimizer': {'name': 'adamw', 'lr': 0.01},
    'algorithms': {'ema': {'half_life': '3ba'}},
}
# Of the sharded checkpoint.
MODEL = {f'layer.{index}': torch.full((3, index + 1), float(index)) for index in range(4)}
SECONDS = 60  # after which a load has hung
Damage = Callable[[random.Random, bytes], bytes]


class Ground:
    """A run with checkpoints at batches 2, 4 and 5, and a Trainer of the same recipe that loads what it is given."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        recipe = folder / 'tiny.yaml'
        recipe.write_text(yaml.safe_dump({**TINY, 'runs_folder': str(folder / 'runs')}))
        train(schema.load(recipe, ['run_name=whole']), lambda renderable: None)
        self.saved = folder / 'runs' / 'whole' / 'checkpoints'
        run = build(schema.load(recipe, ['run_name=r']))
        self.trainer, self.plan = run.trainer, run.plan
        self.checkpoints = folder / 'runs' / 'r' / 'checkpoints'
        self.contents = {batch: next(self.saved.glob(f'*-ba{batch}-*')).read_bytes() for batch in (2, 4, 5)}
        self.sharded = folder / 'sharded'
        state = {'model': MODEL, 'timestamp': {'Timestamp': {'batch': 4}}, 'run_name': 'r'}
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')  # that there is one process
            dcp.save({'state': state}, checkpoint_id=self.sharded)
        self.prints = {batch: self._print_of(batch) for batch in self.contents}

    def close(self) -> None:
        self.trainer.close()

    def _print_of(self, batch: int) -> str:
        path = self.folder / 'pristine.pt'
        path.write_bytes(self.contents[batch])
        outcome, said = self.load(path)
        assert outcome == 'loaded', said
        return said

    def load(self, path: Path | str) -> tuple[str, str]:
        """What ``load_path`` makes of a checkpoint: ``'refused'`` and why, or ``'loaded'`` and a print of the state."""
        return self._outcome(load_path=str(path))

    def resume(self) -> tuple[str, str]:
        """What ``autoresume`` makes of what lies in ``checkpoints``."""
        return self._outcome(autoresume=True)

    def _outcome(self, **arguments: Any) -> tuple[str, str]:
        plan = dataclasses.replace(self.plan, trainer={**self.plan.trainer, **arguments})
        state = self.trainer.state
        with torch.no_grad():  # what a load leaves out shows in the print
            for parameter in state.model.parameters():
                parameter.fill_(float('nan'))
        state.timestamp = state.timestamp.copy(batch=Time.from_batch(999))
        try:
            with in_time(SECONDS):
                found = check_loaded(plan, 'r')
                path = arguments.get('load_path') or (found and str(found.path))
                if path is None:
                    return 'nothing', ''
                with refusing_misfits(how_loaded(plan, found)), decompressed(path) as path:
                    composer.utils.checkpoint.load_checkpoint(path=path, state=state, logger=self.trainer.logger)
        except RecipeError as error:
            return 'refused', str(error)
        return 'loaded', f'{int(state.timestamp.batch)} {_print(state.model, state.optimizers, state.algorithms)}'


def _print(model: Any, optimizers: Any, algorithms: Any) -> str:
    """A print of all tensors of a run."""
    held = [model.state_dict(), *(each.state_dict() for each in optimizers)]
    held += [each.state_dict() for each in algorithms]
    found = hashlib.sha256()
    waiting: list[Any] = held
    while waiting:
        each = waiting.pop()
        if isinstance(each, dict):
            waiting += [value for _, value in sorted(each.items(), key=lambda item: str(item[0]))]
        elif isinstance(each, (list, tuple)):
            waiting += each
        elif isinstance(each, torch.Tensor):
            found.update(each.detach().contiguous().numpy().tobytes())
    return found.hexdigest()[:16]


# How bytes are damaged, at a place that is drawn.


def flip(draw: random.Random, data: bytes, at: int) -> bytes:
    return data[:at] + bytes([data[at] ^ 1 << draw.randrange(8)]) + data[at + 1 :]


def insert(draw: random.Random, data: bytes, at: int) -> bytes:
    return data[:at] + draw.randbytes(draw.choice((1, 2, 4, 64))) + data[at:]


def remove(draw: random.Random, data: bytes, at: int) -> bytes:
    return data[:at] + data[at + draw.choice((1, 2, 4, 64)) :]


def overwrite(draw: random.Random, data: bytes, at: int) -> bytes:
    count = draw.choice((1, 2, 4, 8, 512))
    return data[:at] + draw.choice((draw.randbytes(count), bytes(count), b'\xff' * count)) + data[at + count :]


def cut(draw: random.Random, data: bytes, at: int) -> bytes:
    return data[:at]


def repeat(draw: random.Random, data: bytes, at: int) -> bytes:
    return data[:at] + data[max(0, at - draw.choice((1, 16, 4096))) :]


DAMAGES = (flip, flip, flip, insert, remove, overwrite, overwrite, cut, repeat)


def places(data: bytes) -> list[range]:
    """The parts of a file to damage: any byte, and of a zip archive its directory, its headers and its pickle."""
    parts = [range(len(data))]
    with contextlib.suppress(Exception), zipfile.ZipFile(io.BytesIO(data)) as archive:
        parts += [range(archive.start_dir, len(data))] * 3
        for info in archive.infolist():
            parts.append(range(info.header_offset, info.header_offset + 64 + len(info.filename)))
            if info.filename.endswith('.pkl'):
                parts += [range(info.header_offset, info.header_offset + info.file_size)] * 20
    return [range(part.start, min(part.stop, len(data))) for part in parts]


def damaged(draw: random.Random, data: bytes) -> tuple[bytes, bool]:
    """``data`` with one to three faults, and whether its sums are right all the same, as a clumsy program leaves it."""
    if draw.random() < 0.1:
        return resealed(draw, data), True
    for _ in range(draw.choice((1, 1, 1, 2, 3))):
        part = draw.choice(places(data))
        if len(part):
            data = draw.choice(DAMAGES)(draw, data, draw.choice(part))
    return data, False


def resealed(draw: random.Random, data: bytes) -> bytes:
    """``data`` with a fault in one of the files of the archive, whose checksum is right."""
    written = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as archive, zipfile.ZipFile(written, 'w') as sealed:
        names = archive.namelist()
        chosen = draw.choice([draw.choice(names), *(name for name in names if name.endswith('data.pkl'))])
        for name in names:
            inside = archive.read(name)
            if name == chosen and inside:
                inside = draw.choice((flip, insert, remove, overwrite, cut))(draw, inside, draw.randrange(len(inside)))
            sealed.writestr(name, inside)
    return written.getvalue()


def tarred(data: bytes, mode: str) -> bytes:
    written = io.BytesIO()
    with tarfile.open(fileobj=written, mode=f'w:{mode}') as archive:
        member = tarfile.TarInfo('./composer_states.pt')
        member.size = len(data)
        archive.addfile(member, io.BytesIO(data))
    return written.getvalue()


PACKINGS: dict[str, Callable[[bytes], bytes]] = {
    '.pt': bytes,
    '.tar': lambda data: tarred(data, ''),
    '.tar.gz': lambda data: tarred(data, 'gz'),
    '.pt.gz': lambda data: gzip.compress(data, mtime=0),
}


def of_another_kind(draw: random.Random, path: Path) -> str:
    """Puts something at ``path`` that is no checkpoint, and says what."""
    kind = draw.choice(('empty', 'folder', 'pipe', 'device', 'circle', 'dangling', 'text', 'zip', 'noise', 'list'))
    if kind == 'folder':
        path.mkdir()
    elif kind == 'pipe':
        os.mkfifo(path)
    elif kind in ('device', 'circle', 'dangling'):
        path.symlink_to({'device': '/dev/zero', 'circle': path, 'dangling': path.parent / 'gone'}[kind])
    elif kind == 'zip':
        with zipfile.ZipFile(path, 'w') as archive:
            archive.writestr('a', 'b')
    elif kind == 'list':
        torch.save(draw.choice(([1, 2], {'state': 3}, {'state': {}, 'param_groups': []}, None)), path)
    else:
        path.write_bytes({'empty': b'', 'text': b'state: {}\n' * 40, 'noise': draw.randbytes(5000)}[kind])
    return kind


# One input each: draws it, and returns what is wrong with what came of it; None where nothing is.


def try_file(ground: Ground, draw: random.Random) -> str | None:
    """A damaged file, packed or not, or something else in its place, through ``load_path``."""
    ending = draw.choice(('.pt', '.pt', '.pt', '.pt', '.pt', *PACKINGS))
    path = ground.folder / 'inputs' / f'ep1{ending}'
    clear(path.parent)
    batch, is_sealed = draw.choice((2, 4, 5)), False
    if draw.random() < 0.05:
        what = of_another_kind(draw, path)
        allowed = set()
    else:
        data = ground.contents[batch]
        is_inside = ending != '.pt' and draw.random() < 0.5
        changed, is_sealed = damaged(draw, data) if is_inside or ending == '.pt' else (PACKINGS[ending](data), False)
        if not is_inside and ending != '.pt':
            for _ in range(draw.choice((1, 2))):
                changed = draw.choice(DAMAGES)(draw, changed, draw.randrange(len(changed)))
        data = PACKINGS[ending](changed) if is_inside else changed
        path.write_bytes(data)
        what, allowed = 'damaged bytes', {ground.prints[batch]}
    before = listing(path.parent)
    outcome, said = ground.load(path)
    if listing(path.parent) != before:
        return f'{what}: the folder was changed: {before} to {listing(path.parent)}'
    if outcome == 'refused':
        return None if path.name in said and said.endswith('.') else f'{what}: an error without the file: {said}'
    return None if said in allowed or is_sealed else f'{what}: {outcome}, {said} in place of {allowed}'


def try_folder(ground: Ground, draw: random.Random) -> str | None:
    """A save folder as kills and accidents leave it, through ``autoresume``."""
    folder = ground.checkpoints
    clear(folder)
    whole: dict[int, int] = {}  # by batch, when it was written
    written_at: dict[Any, int] = {}  # the same of all that is there
    for written, batch in enumerate(draw.sample((2, 4, 5), draw.randrange(4)) if draw.random() < 0.3 else (2, 4, 5)):
        path = folder / f'ep0-ba{batch}-rank0.pt'
        fate = draw.random()
        if fate < 0.1:
            continue
        if fate < 0.3:
            path.write_bytes(cut(draw, ground.contents[batch], draw.randrange(len(ground.contents[batch]))))
        elif fate < 0.35:
            of_another_kind(draw, path)
        else:
            path.write_bytes(ground.contents[batch])
            whole[batch] = written
        if not path.is_symlink():
            os.utime(path, ns=(written * 10**9, written * 10**9))
        if path.exists():
            written_at[batch] = path.stat().st_mtime_ns // 10**9
    latest, pointed = folder / 'latest-rank0.pt', draw.choice((2, 4, 5, 7, None, 'circle'))
    if pointed is not None:
        latest.symlink_to(latest.name if pointed == 'circle' else f'ep0-ba{pointed}-rank0.pt')
    before = listing(folder)
    outcome, said = ground.resume()
    if listing(folder) != before:
        return f'the folder was changed: {before}'
    since = written_at.get(pointed)
    newer = [batch for batch, written in whole.items() if since is not None and batch > pointed and written >= since]
    first = newer or ([pointed] if pointed in whole else whole)
    expected = ('loaded', ground.prints[max(first)]) if whole else ('nothing' if not before else 'refused', '')
    is_right = outcome == expected[0] and (outcome != 'loaded' or said == expected[1])
    return None if is_right else f'{outcome} {said} in place of {expected}, from {before}'


def try_shards(ground: Ground, draw: random.Random) -> str | None:
    """A sharded checkpoint with damaged bytes, or without one of its files."""
    folder = ground.folder / 'inputs' / 'ep1-ba4'
    clear(folder.parent)
    shutil.copytree(ground.sharded, folder)
    path = draw.choice(sorted(folder.iterdir()))
    if draw.random() < 0.1:
        path.unlink()
        draw.choice((lambda: None, path.mkdir, lambda: os.mkfifo(path), lambda: path.symlink_to('/dev/zero')))()
    else:
        data = path.read_bytes()
        for _ in range(draw.choice((1, 1, 2))):
            data = draw.choice(DAMAGES)(draw, data, draw.randrange(len(data)))
        path.write_bytes(data)
    before = listing(folder)
    sharded = {**ground.plan.trainer, 'parallelism_config': {'fsdp2': {}}, 'load_path': str(folder)}
    try:
        with in_time(SECONDS):
            check_loaded(dataclasses.replace(ground.plan, trainer=sharded), 'r')
    except RecipeError as error:
        said = str(error)
        return None if folder.name in said and said.endswith('.') else f'an error without the folder: {said}'
    if listing(folder) != before:
        return 'the folder was changed'
    into = {'state': {'model': {name: torch.zeros_like(value) for name, value in MODEL.items()}}}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')
            dcp.load(into, checkpoint_id=folder)
    except (Exception, CheckpointException):  # which a run turns into words
        return None
    wrong = [name for name, value in into['state']['model'].items() if not value.equal(MODEL[name])]
    return f'{path.name}: wrong values of {wrong}' if wrong else None


TRIES = (try_file, try_file, try_file, try_file, try_folder, try_shards)


def clear(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)


def listing(folder: Path) -> dict[str, tuple[int, int]]:
    status = {str(path.relative_to(folder)): path.lstat() for path in folder.rglob('*')}
    return {
        name: (0, 0) if stat.S_ISDIR(each.st_mode) else (each.st_size, each.st_mtime_ns)
        for name, each in sorted(status.items())
    }


def attack(ground: Ground, seed: int, rounds: int, show: Callable[[str], None]) -> int:
    """Tries ``rounds`` inputs and returns how many of them failed; shows each of these with what draws it again."""
    temporary = Path(tempfile.gettempdir())
    failures = 0
    for number in range(rounds):
        draw = random.Random(f'{seed} {number}')
        left = set(temporary.iterdir())
        chosen = draw.choice(TRIES)
        try:
            wrong = chosen(ground, draw)
        except Exception:
            wrong = traceback.format_exc()
        if more := set(temporary.iterdir()) - left:
            wrong = f'{wrong or ""} left {sorted(map(str, more))}'
        if wrong:
            failures += 1
            show(f'{chosen.__name__}, random.Random({f"{seed} {number}"!r}): {wrong}')
    return failures
