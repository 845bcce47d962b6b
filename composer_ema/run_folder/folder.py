"""The folder of a run: what it is called, that one run works in it at a time, and when its files are replaced.

Invariant: until :meth:`RunFolder.begin` nothing in the folder changes but the lock file; a run that is refused before
leaves every file as it was, and no folder of its own.
"""

from __future__ import annotations

import contextlib
from pathlib import Path

from composer_ema.files import write_beside
from composer_ema.run_folder.lock import Lock
from composer_ema.run_folder.outputs import CHECKPOINT_FOLDER, METRICS_FILE, RECIPE_FILE


class RunFolder:
    """The folder of a run, taken by this process group until :meth:`release`. Rank 0 holds its lock.

    Args:
        path: The folder; its name is the run's.
        lock: Its lock on rank 0 of a run that writes, else None.
        made: What was made for this run, innermost first; :meth:`release` removes what is still empty. Default: none.

    Attributes:
        name: The run's name.
        recipe: The recipe in YAML, which :meth:`begin` writes; set before training starts.
    """

    def __init__(self, name: str, path: Path, lock: Lock | None = None, made: tuple[Path, ...] = ()) -> None:
        self.name, self.path = name, path
        self.recipe: str | None = None
        self._lock, self._made = lock, made

    @property
    def metrics(self) -> Path:
        """The file of the run's metrics."""
        return self.path / METRICS_FILE

    @property
    def is_taken(self) -> bool:
        """Whether it holds what a run has left."""
        metrics = self.metrics
        return (metrics.exists() and metrics.stat().st_size > 0) or any((self.path / CHECKPOINT_FOLDER).glob('*'))

    def begin(self) -> None:
        """Replaces the recipe in the folder by the run's: its first batch has been trained.

        Raises:
            OSError: It cannot be written. The old one is untouched.
        """
        self._made = ()
        if self.recipe is not None:
            write_beside(self.path / RECIPE_FILE, self.recipe)

    def keep(self) -> None:
        """Takes the folder again if somebody has removed or renamed it, or has removed its lock file.

        Raises:
            InUseError: Another process has taken it since.
            OSError: It cannot be made again.
        """
        if self._lock is not None:
            self._lock.keep()

    def release(self) -> None:
        """Gives the folder back, without the empty folders of a run that never began."""
        if self._lock is not None:
            self._lock.release()
        for folder in self._made:
            with contextlib.suppress(OSError):  # it holds something
                folder.rmdir()
        self._made = ()
