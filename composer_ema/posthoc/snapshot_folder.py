"""The folder of a run's snapshots: which files a run may write there and remove, and which process does it.

Invariant: at every moment, a kill included, each file in the folder can be read.
"""

from __future__ import annotations

import hashlib
import logging
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import torch.distributed as dist
from torch import Tensor

from composer_ema.checkpoints.reading import CheckpointError
from composer_ema.files import remove_unfinished
from composer_ema.model.names import listed
from composer_ema.posthoc.snapshot_files import (
    Header,
    Identity,
    SnapshotFile,
    entries_of,
    files_in,
    name_of,
    pack,
    referenced_bases,
    unpack,
)
from composer_ema.posthoc.tensor_files import Entry, in_order, write
from composer_ema.posthoc.updates import Updates
from composer_ema.spans import ArgumentError
from composer_ema.wording import counted

log = logging.getLogger(__name__)

#: A factory of tensors by name, called when a file is written.
Tensors = Callable[[], Mapping[str, Tensor]]
Result = TypeVar('Result')


class SnapshotFolder:
    """A folder that this process writes to.

    The order of calls is :meth:`prepare`, :meth:`clear` at the first update, then :meth:`write` and :meth:`pack`.

    Args:
        path: of the folder; made when the first file is written.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._stale: tuple[list[SnapshotFile], Mapping[str, float]] | None = None
        self._written: list[str] = []

    def prepare(
        self, identity: Identity, now: Mapping[str, float], *, overwrite: bool = False, may_restart: bool = False
    ) -> Identity:
        """Checks that the folder is fit for the run; see :meth:`composer_ema.posthoc.writer.SnapshotWriter.begin`.

        Returns:
            The identity under which the run goes on.

        Raises:
            ArgumentError: the folder holds the snapshots of another run. Nothing is changed.
        """
        own, others = [], []
        for file in self._readable():
            (own if file.header.identity.run_id == identity.run_id else others).append(file)
        if others and not overwrite:
            self._check_replaceable(others, identity, may_restart=may_restart)
        self._stale = [*own, *others], dict(now)
        return identity

    def _readable(self) -> Iterator[SnapshotFile]:
        for path in files_in(self.path):
            try:
                yield SnapshotFile(path)
            except CheckpointError as error:
                log.warning('snapshots: %s It is left alone.', error)

    def _check_replaceable(self, others: list[SnapshotFile], identity: Identity, *, may_restart: bool) -> None:
        """Raises unless others are what an earlier start of this run left that came to nothing."""
        is_ended = any(file.header.is_last for file in others)
        is_namesake = all(file.header.identity.run_name == identity.run_name for file in others)
        has_averages = any(not file.header.holds_weights for file in others)
        if is_ended or not is_namesake or (has_averages and not may_restart):
            names = listed(sorted({str(file.header.identity) for file in others}))
            raise ArgumentError(
                f'{self.path} holds {counted(len(others), "snapshot")} of another run: {names}. Give another folder, '
                'or remove them.',
                'snapshots',
            )

    def clear(self, identity: Identity, updates: Updates) -> None:
        """Removes what :meth:`prepare` found that does not belong to the run as it goes on.

        Args:
            identity: of the run.
            updates: up to the moment from which it goes on.
        """
        if self._stale is None:
            return
        (files, now), self._stale = self._stale, None
        others = [file for file in files if file.header.identity.run_id != identity.run_id]
        if others:
            log.warning('snapshots: removed %s of an earlier start from %s', counted(len(others), 'file'), self.path)
            _remove(others)
        _remove_later([file for file in files if file not in others], updates, now)
        remove_unfinished(self.path)

    def write(self, header: Header, tensors: Mapping[str, Tensors]) -> None:
        """Writes the averages, or the training weights, of one moment, in full. Holds one whole tensor at a time.

        Args:
            header: what they are.
            tensors: label to tensors by canonical name; under
                :data:`~composer_ema.posthoc.snapshot_files.COPIED` those that no average changes.

        Raises:
            OSError: the file cannot be written. The other files are untouched.
        """
        self.write_entries(header, _entries(header, tensors))

    def write_entries(self, header: Header, entries: Mapping[str, Entry]) -> None:
        """As :meth:`write`, with the tensors as entries of the file, whose values are asked for in its order."""
        write(self.path / name_of(header), entries, header.as_metadata())
        self._written.append(name_of(header))

    def is_over(self, run_id: str) -> bool:
        """Whether the last file of a run lies here, and all files are packed that are to be."""
        files = [file for file in self._readable() if file.header.identity.run_id == run_id]
        bases = {file.path.name for file in files if file.header.is_last} | referenced_bases(files)
        is_ended = any(file.header.is_last for file in files)
        return is_ended and all(file.header.packing is not None or file.path.name in bases for file in files)

    def lost(self) -> list[str]:
        """The names of the files written here that are there no longer."""
        return [name for name in self._written if not (self.path / name).exists()]

    def pack(self, last: Header) -> None:
        """Packs every file of the run that is still in full, one tensor at a time.

        Args:
            last: header of the file with the last weights, to which the others then hold differences.
        """
        base = self.path / name_of(last)
        files = [file for file in map(SnapshotFile, files_in(self.path)) if file.header.identity == last.identity]
        bases = {base.name} | referenced_bases(files)
        for file in files:
            if file.path.name not in bases:
                pack(file.path, base)


class NoFolder:
    """Stands for the folder in a process that writes nothing, because rank 0 holds the same model and writes it."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def prepare(
        self, identity: Identity, now: Mapping[str, float], *, overwrite: bool = False, may_restart: bool = False
    ) -> Identity:
        """Returns the identity."""
        del now, overwrite, may_restart
        return identity

    def clear(self, identity: Identity, updates: Updates) -> None:
        """Does nothing."""

    def write(self, header: Header, tensors: Mapping[str, Tensors]) -> None:
        """Does nothing; ``tensors`` are not asked for."""

    def pack(self, last: Header) -> None:
        """Does nothing."""

    def lost(self) -> list[str]:
        """Returns none."""
        return []


class SharedFolder:
    """The folder of a run whose ranks each hold a share of the model. Rank 0 writes; every rank makes every call.

    A file is written tensor by tensor. Each is gathered when its turn comes, so that no rank ever holds more than one
    whole tensor, and rank 0 lets go of it before the next one. What rank 0 cannot write stops all ranks.

    Args:
        path: of the folder; only rank 0 needs to see it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._own = SnapshotFolder(path) if dist.get_rank() == 0 else None

    def prepare(
        self, identity: Identity, now: Mapping[str, float], *, overwrite: bool = False, may_restart: bool = False
    ) -> Identity:
        """Checks on rank 0 that the folder is fit for the run. A collective call.

        Returns:
            The identity of the run on rank 0, which is that of all.

        Raises:
            ArgumentError: as for :meth:`SnapshotFolder.prepare`, on every rank.
        """
        return self._on_rank_0(
            lambda own: own.prepare(identity, now, overwrite=overwrite, may_restart=may_restart), identity
        )

    def clear(self, identity: Identity, updates: Updates) -> None:
        """Removes on rank 0 what does not belong to the run as it goes on. A collective call."""
        self._on_rank_0(lambda own: own.clear(identity, updates), None)

    def write(self, header: Header, tensors: Mapping[str, Tensors]) -> None:
        """Writes one file on rank 0, gathering tensor by tensor. A collective call.

        Raises:
            OSError: rank 0 cannot write it; on the other ranks a RuntimeError. They have gathered all that they had to.
            RuntimeError: the ranks hold different tensors, or are not at the same moment. Nothing is written.
        """
        turns = _Turns(_entries(header, tensors))
        self._check_agreement(header, turns)

        def write_in_turn(own: SnapshotFolder) -> None:
            try:
                own.write_entries(header, turns.entries)
            except OSError:
                turns.finish()  # the other ranks wait there
                raise

        if self._own is None:
            turns.finish()
        self._on_rank_0(write_in_turn, None)

    def pack(self, last: Header) -> None:
        """Packs the files on rank 0. No collective call: the other ranks go on, however long it takes."""
        if self._own is not None:
            self._own.pack(last)

    def lost(self) -> list[str]:
        """The names of the files written by rank 0 that are there no longer; none on the other ranks."""
        return [] if self._own is None else self._own.lost()

    def _on_rank_0(self, do: Callable[[SnapshotFolder], Result], default: Result) -> Result:
        """Returns on every rank what ``do`` returns on rank 0, or raises on every rank what stops the files there."""
        result, error = default, None
        if self._own is not None:
            try:
                result = do(self._own)
            # Only these leave the ranks in step. Any other one may come out of a collective call.
            except (OSError, ArgumentError, CheckpointError) as caught:
                error = caught
        outcome = [result, None if error is None else str(error), isinstance(error, ArgumentError)]
        dist.broadcast_object_list(outcome)
        if error is not None:
            raise error
        result, message, is_argument = outcome
        if message is not None:
            raise ArgumentError(message, 'snapshots') if is_argument else RuntimeError(f'on rank 0: {message}')
        return result

    def _check_agreement(self, header: Header, turns: _Turns) -> None:
        """Raises unless every rank writes the same file, since otherwise their collective calls would not match."""
        found: list = [None] * dist.get_world_size()
        dist.all_gather_object(found, f'{name_of(header)} {turns.outline}')
        odd = [rank for rank, each in enumerate(found) if each != found[0]]
        if odd:
            raise RuntimeError(
                f'the ranks {listed(list(map(str, odd)))} hold other tensors than rank 0, or are at another step, so '
                'that no snapshot of one model can be written. Every rank must hold a share of one model, and call '
                'update() after each of its steps.'
            )


class _Turns:
    """Entries of a file, whose values every rank asks for in the order of the file, whatever becomes of the file."""

    def __init__(self, entries: Mapping[str, Entry]) -> None:
        self._waiting = deque(in_order(entries))
        described = repr([(name, entry.dtype, entry.shape) for name, entry in self._waiting])
        #: What tells these entries from others.
        self.outline = hashlib.sha256(described.encode()).hexdigest()
        #: The same entries, whose values have to be asked for in their order.
        self.entries = {name: replace(entry, values=self._next) for name, entry in entries.items()}

    def _next(self) -> Tensor:
        _, entry = self._waiting.popleft()
        return entry.values()

    def finish(self) -> None:
        """Takes part in the turns that are left."""
        while self._waiting:
            self._next()


#: What a writer writes to.
Folder = SnapshotFolder | SharedFolder | NoFolder


def _entries(header: Header, tensors: Mapping[str, Tensors]) -> dict[str, Entry]:
    return entries_of(header, {label: named() for label, named in tensors.items()})


def _remove_later(own: list[SnapshotFile], updates: Updates, now: Mapping[str, float]) -> None:
    later = [
        file for file in own if file.header.clock['ba'] > now['ba'] or not file.header.updates.is_earlier_than(updates)
    ]
    names = {file.path.name for file in later}
    for file in own:
        packing = file.header.packing
        if file.path.name not in names and packing is not None and packing.base in names:
            unpack(file.path)
    if later:
        log.warning(
            'snapshots: removed %s of %s that lie after batch %d, from which the run goes on',
            counted(len(later), 'file'), later[0].path.parent, now['ba'],
        )  # fmt: skip
    _remove(later)


def _remove(files: list[SnapshotFile]) -> None:
    """Removes files, and those that others hold differences to last."""
    bases = referenced_bases(files)
    for file in sorted(files, key=lambda each: each.path.name in bases):
        file.path.unlink(missing_ok=True)
