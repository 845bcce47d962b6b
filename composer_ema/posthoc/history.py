"""What a run has kept of its weights, read back: averages and weights of known moments, and the updates they are of."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
from torch import Tensor

from composer_ema.checkpoints.opening import path_of
from composer_ema.checkpoints.reading import CheckpointError
from composer_ema.posthoc.checkpoint_history import Ordinary, checkpoints_in, read_checkpoints
from composer_ema.posthoc.moments import History, KeptAverage
from composer_ema.posthoc.shares import checked
from composer_ema.posthoc.snapshot_files import COPIED, SNAPSHOT_FOLDER, WEIGHTS, SnapshotFile, files_in
from composer_ema.posthoc.updates import Array
from composer_ema.spans import CLOCK_UNITS

Source = Literal['snapshots', 'checkpoints']


def read_run(
    folder: str | os.PathLike[str],
    *,
    source: Source | None = None,
    half_life: str | None = None,
    update_interval: str | None = None,
    max_duration: str | None = None,
) -> History:
    """Opens what a run has kept. Tensors stay on the disk until they are asked for.

    Args:
        folder: of the run, or the folder in it with the snapshots or the checkpoints.
        source: ``'snapshots'`` or ``'checkpoints'``. Default: snapshots where there are any, else checkpoints.
        half_life: of Composer's built-in EMA, whose checkpoints do not say it. Default: its averages are left out.
        update_interval: likewise. Default: one unit of the half-life.
        max_duration: of the run, for a half-life in ``dur``, which checkpoints do not say. Default: as the run folder's
            recipe says.

    Raises:
        CheckpointError: there is nothing that can be read; every file that cannot is named.
        ValueError: an argument is out of range.

    Example:
        .. code:: python

            history = read_run('runs/fashion_mnist')
            for kept in history.kept:
                print(kept.label, kept.clock['ba'], len(kept.names()))
    """
    path = path_of(folder, 'folder')
    if source not in (None, 'snapshots', 'checkpoints'):
        raise ValueError(f"source must be 'snapshots' or 'checkpoints', got {source!r}.")
    if not path.is_dir():
        raise CheckpointError(f'{path} is no folder. Pass the folder of a run.')
    inner = path / SNAPSHOT_FOLDER
    snapshots = files_in(inner) or files_in(path)
    if source != 'checkpoints' and snapshots:
        return _read_snapshots(snapshots)
    checkpoints = checkpoints_in(path)
    if source != 'snapshots' and checkpoints:
        return read_checkpoints(path, checkpoints, Ordinary(half_life, update_interval, max_duration))
    wanted = source or 'snapshots nor checkpoints'
    raise CheckpointError(
        f'{path} holds no {wanted}. Pass the folder of a run that was trained with EMA(snapshots=...), or one that has '
        'checkpoints.'
    )


def _read_snapshots(paths: Sequence[Path]) -> History:
    left_out: list[str] = []
    files: list[SnapshotFile] = []
    for path in paths:
        try:
            files.append(SnapshotFile(path))
        except CheckpointError as error:
            left_out.append(str(error))
    files = _of_one_run(files, left_out)
    files, head = _of_one_course(files, left_out)
    averages = [file for file in files if not file.header.holds_weights]
    if head is None or not averages:
        problems = ' '.join(left_out) or 'Only weights are there.'
        raise CheckpointError(f'{paths[0].parent} holds no average that can be read. {problems}')
    course, header = _Course(files, head), head.header
    kept: list[KeptAverage] = []
    for file in files:
        try:
            kept += course.kept_in(file)
        # No average has such weights, or its profile none at such times.
        except (ValueError, ArithmeticError) as error:
            left_out.append(f'{file.path} cannot be read: its list of updates is damaged ({error}).')
    if not (np.diff(header.updates.clock('ba'), prepend=0) > 0).all():
        raise CheckpointError(f'{head.path} cannot be read: its list of updates is damaged (the time does not rise).')
    if not kept:
        raise CheckpointError(f'{paths[0].parent} holds no average that can be read. {" ".join(left_out)}')
    return History(
        folder=paths[0].parent,
        run_name=header.identity.run_name,
        run_id=header.identity.run_id,
        clocks={unit: header.updates.clock(unit) for unit in CLOCK_UNITS},
        kept=kept,
        max_duration=header.max_duration,
        is_finished=header.is_last,
        aliases=header.aliases,
        statistics=frozenset(header.statistics),
        newest=_newest(files),
        left_out=left_out,
        copied=frozenset(name for file in averages for name in file.names(COPIED)),
    )


def _of_one_run(files: list[SnapshotFile], left_out: list[str]) -> list[SnapshotFile]:
    """The files of the run that wrote last."""
    if not files:
        return []
    own = max(files, key=_age).header.identity
    for file in files:
        identity = file.header.identity
        if identity.run_id != own.run_id:
            left_out.append(f'{file.path} belongs to another run: {identity}, not {own}.')
    return [file for file in files if file.header.identity.run_id == own.run_id]


def _of_one_course(files: list[SnapshotFile], left_out: list[str]) -> tuple[list[SnapshotFile], SnapshotFile | None]:
    """The files whose updates are the beginning of one list, in the order of their moments; and the one with all of it.

    A run that was resumed from an earlier checkpoint may have left files of the course that it did not take.
    """
    if not files:
        return [], None
    newest = max(files, key=_age)
    head = max(
        (file for file in files if newest.header.updates.is_earlier_than(file.header.updates)),
        key=lambda file: (file.num_updates, file.header.is_last, file.header.clock['ba']),
    )
    for file in files:
        if not file.header.updates.is_earlier_than(head.header.updates):
            left_out.append(f'{file.path} is of a course that the run left when it was resumed from an earlier moment.')
    found = [file for file in files if file.header.updates.is_earlier_than(head.header.updates)]
    return sorted(found, key=lambda file: (file.num_updates, file.path.name)), head


def _age(file: SnapshotFile) -> tuple[float, str]:
    return file.path.stat().st_mtime, file.path.name


class _Course:
    """The weights of all updates of one run, by label, each computed once however many files are of it."""

    def __init__(self, files: Sequence[SnapshotFile], head: SnapshotFile) -> None:
        self._longest: dict[str, SnapshotFile] = {}
        for file in files:
            for label in file.header.updates.labels:
                self._longest[label] = file
        self._longest |= dict.fromkeys(head.header.updates.labels, head)
        self._weights: dict[str, Array] = {WEIGHTS: np.ones(head.num_updates)}

    def kept_in(self, file: SnapshotFile) -> list[KeptAverage]:
        """What a file holds. The training weights between two updates are no average of updates, and left out."""
        header = file.header
        if header.holds_weights and not header.is_update:
            return []
        return [
            KeptAverage(
                label=label,
                weights=checked(self._of(label, file)),
                path=file.path,
                clock=header.clock,
                _names=lambda label=label: file.names(label),
                _tensor=lambda name, label=label: file.checked().tensor(label, name),
                _outline=lambda name, label=label: file.checked().outline(label, name),
                _rounding=lambda label=label: file.checked().rounding(label),
            )
            for label in file.labels
        ]

    def _of(self, label: str, file: SnapshotFile) -> Array:
        """The weights up to the moment of a file, which share the memory of those of later files."""
        if label != WEIGHTS and not file.header.updates.is_beginning_of(self._longest[label].header.updates):
            # An average that was dropped and taken up again later began anew.
            return file.header.updates.weights(label)
        if label not in self._weights:
            self._weights[label] = self._longest[label].header.updates.weights(label)
        return self._weights[label][: file.num_updates]


def _newest(files: Sequence[SnapshotFile]) -> dict[str, Callable[[], Tensor]]:
    """How to read the newest value of every tensor that a model saves, whether averaged or not."""
    found: dict[str, Callable[[], Tensor]] = {}
    for file in files:  # in the order of their moments
        label = file.labels[0]
        for name in file.names(label):
            if file.header.holds_weights or name not in found or file.is_copied(name):
                found[name] = lambda file=file, label=label, name=name: file.checked().tensor(label, name)
    return found
