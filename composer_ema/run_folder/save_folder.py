"""Where Composer puts the checkpoints of a run, and which files there have the names of such."""

from __future__ import annotations

import os
import re
import string
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

_OF_PROCESS = ('rank', 'local_rank', 'node_rank')
_COUNTS = (
    *('world_size', 'local_world_size', 'epoch', 'batch', 'batch_in_epoch', 'sample', 'sample_in_epoch', 'token'),
    'token_in_epoch',
)
_SECONDS = ('total_wct', 'epoch_wct', 'batch_wct')
_NUMBER = r'[\d.,_e+ -]+'


@dataclass(frozen=True)
class SaveFolder:
    """The folder of a run's checkpoints, on this machine's disks.

    Args:
        path: Of the folder, which may not exist yet.
        latest: Where Composer's link to the newest checkpoint is to lie; None where the recipe wants none.
        names: The patterns of rank 0's files, and of the folders of sharded checkpoints: one for each part of a path.
        is_own: Whether no other run saves there.
    """

    path: Path
    latest: Path | None
    names: tuple[tuple[str, ...], ...]
    is_own: bool

    @classmethod
    def named(
        cls, path: Path, filenames: Iterable[str], run_name: str, *, latest: Path | None, is_own: bool
    ) -> SaveFolder:
        """The folder of a run whose checkpoints are called by format strings of Composer's.

        Args:
            path: Of the folder, which may not exist yet.
            filenames: The format strings, relative to the folder.
            run_name: What they call the run.
            latest: Where Composer's link to the newest checkpoint is to lie; None where the recipe wants none.
            is_own: Whether no other run saves there.

        Raises:
            ValueError: One of ``filenames`` is no format string.
        """
        names = tuple(_parts(each.lstrip('/'), run_name) for each in filenames)
        return cls(path=path, latest=latest, names=names, is_own=is_own)

    def checkpoints(self) -> dict[Path, int | None]:
        """What has the name of a checkpoint, of whatever kind it is, and the batches that the name tells.

        Raises:
            OSError: A folder cannot be listed.
        """
        found = {path: batch for parts in self.names for path, batch in _matching(self.path, parts)}
        if self.latest is not None:
            found.pop(self.latest, None)
        return dict(sorted(found.items()))

    def pointed_at(self) -> Path | None:
        """What the link leads to, by its own name; None where the link is missing or leads to nothing."""
        if self.latest is None or not self.latest.exists():
            return None
        if not self.latest.is_symlink():  # a file that was copied with what it links to
            return self.latest
        real = os.path.realpath(self.latest)
        return next((path for path in self.checkpoints() if os.path.realpath(path) == real), Path(real))

    def has_any(self) -> bool:
        """Whether there is anything that autoresume has to look at."""
        try:
            return (self.latest is not None and os.path.lexists(self.latest)) or bool(self.checkpoints())
        except OSError:
            return True


def _parts(template: str, run_name: str) -> tuple[str, ...]:
    """A pattern for each part of a path that was made of a format string of Composer's; rank 0 makes it."""
    pattern = ''
    for literal, field, form, _ in string.Formatter().parse(template):
        pattern += re.escape(literal)
        if field == 'run_name':
            pattern += re.escape(run_name)
        elif field in _SECONDS or (form and field in _COUNTS + _OF_PROCESS):
            pattern += _NUMBER
        elif field in _OF_PROCESS:
            pattern += '0'
        elif field == 'batch' and '(?P<batch>' not in pattern:
            pattern += r'(?P<batch>\d+)'
        elif field in _COUNTS:
            pattern += r'\d+'
        elif field is not None:  # Composer leaves what it does not know as it is
            pattern += re.escape(f'{{{field}}}')
    return tuple(part for part in pattern.split('/') if part not in ('', re.escape('.')))


def _matching(folder: Path, parts: tuple[str, ...]) -> Iterator[tuple[Path, int | None]]:
    found: list[tuple[Path, int | None]] = [(folder, None)]
    for template in map(re.compile, parts):
        found = [
            (parent / name, int(match.groupdict()['batch']) if template.groupindex else batch)
            for parent, batch in found
            for name in _listed(parent)
            if (match := template.fullmatch(name))
        ]
    return iter(found)


def _listed(folder: Path) -> list[str]:
    try:
        return ['..', *os.listdir(folder)]
    except (FileNotFoundError, NotADirectoryError):
        return []
