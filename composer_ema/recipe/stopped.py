"""What stops a run from outside, a signal, its disk or the death of a process, and where the run goes on."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import threading
from collections.abc import Iterator
from pathlib import Path

from composer import Trainer
from composer.utils import dist, format_name_with_dist

from composer_ema.files import error_of_the_system, in_words, is_of_the_disk
from composer_ema.recipe.build import Run
from composer_ema.recipe.command import Standing
from composer_ema.recipe.folders import folder_of_checkpoints
from composer_ema.run_folder.lock import InUseError
from composer_ema.run_folder.lost import savers

#: The exit codes with which Composer ends a process that gets a signal, and what people call the signal.
SIGNALS = {128 + signal.SIGINT: 'Ctrl-C', 128 + signal.SIGTERM: 'SIGTERM'}
# What torch's gloo and NCCL say of a process that is gone. Their errors have no type of their own.
_GONE = re.compile(r'connection (was )?(reset|closed|refused)|remote process exited|broken pipe', re.IGNORECASE)


class Interrupted(SystemExit):
    """A signal has ended a run.

    Args:
        code: The exit code of the process.
        standing: How far the run has come.
    """

    def __init__(self, code: int, standing: Standing) -> None:
        super().__init__(code)
        self.exit_code, self.standing = code, standing

    def in_words(self, command: str) -> str:
        """What has happened and how to go on, where ``command`` does that."""
        by = SIGNALS[self.exit_code]
        return f'stopped by {by} after batch {self.standing.batch}. {self.standing.how_to_go_on(command)}'


class OutOfDisk(Exception):
    """A file of a run cannot be written, so that the run has ended.

    Args:
        error: The error of the operating system.
        standing: How far the run has come.
    """

    exit_code = 1

    def __init__(self, error: OSError, standing: Standing) -> None:
        super().__init__(in_words(error))
        self.error, self.standing = error, standing

    def in_words(self, command: str) -> str:
        """What has happened and how to go on, where ``command`` does that."""
        rest = self.standing.how_to_go_on(command, 'make room' if is_of_the_disk(self.error) else 'mend that')
        return f'{self} The run has stopped after batch {self.standing.batch}. {rest}'


class ProcessLost(Exception):
    """Another process of a run has ended, so that this one cannot go on.

    Args:
        standing: How far the run has come.
    """

    exit_code = 1

    def __init__(self, standing: Standing) -> None:
        super().__init__('another process of the run has ended')
        self.standing = standing

    def in_words(self, command: str) -> str:
        """What has happened and how to go on, where ``command`` does that."""
        return f'{self}, so it stopped after batch {self.standing.batch}. {self.standing.how_to_go_on(command)}'


class FolderTaken(Exception):
    """Another process has taken the folder of a run, from which somebody had removed the lock.

    Args:
        error: Who has taken it.
        standing: How far the run has come.
    """

    exit_code = 1

    def __init__(self, error: InUseError, standing: Standing) -> None:
        super().__init__(str(error))
        self.standing = standing

    def in_words(self, command: str) -> str:
        """What has happened. Nothing goes on with the run: its place is taken."""
        return (
            f'{self} Somebody has removed or renamed the folder or its lock file while this run trained, so it stopped '
            f'after batch {self.standing.batch}.'
        )


#: What :func:`stops_told` raises. Each has an exit code and says in words how to go on.
STOPS = (Interrupted, OutOfDisk, ProcessLost, FolderTaken)


@contextlib.contextmanager
def closed_at_end(trainer: Trainer) -> Iterator[None]:
    """Closes a Trainer at the end, without waiting for its other processes if there is an error.

    ``Trainer.close`` ends in a barrier (Composer 0.32.1). After an error the other processes may be dead, and the
    barrier fails, or may be waiting for this one elsewhere, and both wait for as long as ``dist_timeout`` says.
    """
    try:
        yield
    except BaseException:
        with undisturbed():
            trainer.engine.close()
        raise
    trainer.close()


@contextlib.contextmanager
def undisturbed() -> Iterator[None]:
    """Ignores SIGTERM, which a launcher sends to the processes that are left when the first one has ended."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextlib.contextmanager
def stops_told(run: Run) -> Iterator[None]:
    """Raises what stops a run from outside as an exception of this module, and everything else as it is."""
    state = run.trainer.state
    batch = int(state.timestamp.batch)
    loaded = None if run.resumed is None else run.resumed.path
    try:
        yield
    except BaseException as error:
        if (code := _code_of_a_signal(error)) is not None:
            raise Interrupted(code, _standing(run, loaded, batch)) from error
        if isinstance(error, InUseError):
            raise FolderTaken(error, _standing(run, loaded, batch)) from error
        if _is_of_a_lost_process(error):
            raise ProcessLost(_standing(run, loaded, batch)) from error
        found = error_of_the_system(error)
        if found is None or not (is_of_the_disk(found) or _is_inside(run, found.filename)):
            raise
        raise OutOfDisk(found, _standing(run, loaded, batch)) from error


def _code_of_a_signal(error: BaseException | None) -> int | None:
    """The exit code, if a signal has caused the error: torch fails once more when a signal ends it while it writes."""
    while error is not None:
        if isinstance(error, SystemExit):
            return int(error.code) if error.code in SIGNALS else None
        error = error.__context__
    return None


def _is_of_a_lost_process(error: BaseException) -> bool:
    """Whether an error tells that another process of the run is gone."""
    return dist.get_world_size() > 1 and isinstance(error, RuntimeError) and _GONE.search(str(error)) is not None


def _is_inside(run: Run, path: object) -> bool:
    folders = [
        run.folder,
        *(Path(format_name_with_dist(each.folder, run.trainer.state.run_name)) for each in savers(run.trainer.state)),
    ]
    return isinstance(path, str) and any(Path(path).absolute().is_relative_to(each.absolute()) for each in folders)


def _standing(run: Run, loaded: Path | None, batch: int) -> Standing:
    """How far a run has come, from what its saver knows or, before that saved anything, what it was loaded from."""
    state = run.trainer.state
    newest, flag = loaded, 'autoresume=true'
    for saver in savers(state):
        saved = [path for path in saver.saved_checkpoints if os.path.exists(path)]
        if saved:
            newest, batch = Path(saved[-1]), int(saver.all_saved_checkpoints_to_timestamp[saved[-1]].batch)
            if state.fsdp_sharded_state_dict_enabled:
                newest = newest.parent
    if newest is None:
        folder = folder_of_checkpoints(run.plan, state.run_name)
        if folder is None or folder.has_any():  # no checkpoint to go on from, or those of an earlier run
            flag = 'save_overwrite=true'
    newest = newest if newest is None else newest.absolute()
    shown = newest.relative_to(Path.cwd()) if newest is not None and newest.is_relative_to(Path.cwd()) else newest
    return Standing(state.run_name, run.recipe.values['seed'], int(state.timestamp.batch), shown, batch, flag)
