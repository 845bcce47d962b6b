"""A lock on a folder, which the operating system frees when its owner ends, also by SIGKILL."""

from __future__ import annotations

import errno
import json
import os
import shlex
import socket
import stat
import sys
import time
import warnings
import weakref
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

#: The file in a locked folder that says who holds it.
LOCK_FILE = 'run.lock'
# What flock raises where a file system has no locks: NFS without a lock daemon, Lustre mounted without flock, FUSE.
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)
# An owner writes its name right after it has taken the lock.
_SECONDS_TO_NAME = 1.0
_LONGEST_RECORD, _LONGEST_WORD = 4096, 1000


@dataclass(frozen=True)
class Owner:
    """The process that holds a lock, in words that are safe to print.

    Args:
        host: The name of its machine.
        pid: Its number there.
        started: When it took the lock, as ISO 8601 writes it.
        command: Its command line.
    """

    host: str
    pid: int
    started: str
    command: str

    @classmethod
    def of_this_process(cls) -> Owner:
        command = shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])[:_LONGEST_WORD]
        return cls(socket.gethostname(), os.getpid(), datetime.now().astimezone().isoformat(' ', 'seconds'), command)

    @classmethod
    def read(cls, descriptor: int) -> Owner | None:
        """The owner that a lock file names; None if it names none, or is damaged."""
        try:
            record = json.loads(os.pread(descriptor, _LONGEST_RECORD, 0))
            return cls(_word(record['host']), int(record['pid']), _word(record['started']), _word(record['command']))
        except (OSError, ValueError, KeyError, TypeError, OverflowError, RecursionError):
            return None

    def __str__(self) -> str:
        return f'process {self.pid} on {self.host} since {self.started} ({self.command})'

    def is_seen_running(self) -> bool:
        """Whether another process of this machine has that number; it may be a later one."""
        return self.host == socket.gethostname() and self.pid != os.getpid() and _is_running(self.pid)


class InUseError(Exception):
    """Another process holds the lock of a folder.

    Args:
        folder: The folder.
        owner: Who holds it; None if it has not said so yet.
        doubt: Why that may be wrong, and what to do then. Default: nothing.
    """

    def __init__(self, folder: Path, owner: Owner | None, doubt: str = '') -> None:
        self.owner = owner
        super().__init__(f'{folder} is in use by {owner or "another process, which has just started"}.{doubt}')


class Lock:
    """The lock of a folder, held by this process until it is released. Forked children do not hold it.

    Args:
        folder: The folder, which must exist.

    Raises:
        InUseError: Another process holds it, or another :class:`Lock` of this one. Nothing is changed.
        OSError: The lock file cannot be made or written.
    """

    def __init__(self, folder: Path) -> None:
        self._path = folder / LOCK_FILE
        descriptor = _taken(folder, self._path)
        self._descriptor: int | None = descriptor
        try:
            _warn_of_another_machine(folder, Owner.read(descriptor))
            _sign(descriptor)
        except BaseException:
            self.release()
            raise
        _held.add(self)

    def __enter__(self) -> Lock:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def keep(self) -> None:
        """Takes the lock again if somebody has removed its file, or removed or renamed the folder.

        Raises:
            InUseError: Another process has taken the folder since. The lock is given back.
            OSError: The lock file cannot be made or written.
        """
        if self._descriptor is None or _is_at(self._path, self._descriptor):
            return
        self._close()
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._descriptor = _taken(self._path.parent, self._path)
        _sign(self._descriptor)

    def release(self) -> None:
        """Removes the lock file and gives the lock back; does nothing the second time."""
        if self._descriptor is not None:
            # In this order: whoever takes the lock of a removed file sees that, and tries again.
            if _is_at(self._path, self._descriptor):
                self._path.unlink(missing_ok=True)
            self._close()

    def _close(self) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None


_held: weakref.WeakSet[Lock] = weakref.WeakSet()


def _close_in_child() -> None:
    """A worker of a data loader outlives its killed parent for some seconds, and would hold the lock as long."""
    for lock in list(_held):
        lock._close()


if hasattr(os, 'register_at_fork'):
    os.register_at_fork(after_in_child=_close_in_child)


def _taken(folder: Path, path: Path) -> int:
    """A descriptor of the lock file that holds the lock."""
    until = time.monotonic() + _SECONDS_TO_NAME
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, 'O_NOFOLLOW', 0), 0o666)
        try:
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                raise OSError(errno.EINVAL, 'is no regular file', str(path))
            if _locked(folder, descriptor):
                if _is_at(path, descriptor):
                    found, descriptor = descriptor, -1
                    return found
            elif (owner := Owner.read(descriptor)) is not None or time.monotonic() > until:
                raise InUseError(folder, owner)
            else:
                time.sleep(0.02)
        finally:
            if descriptor >= 0:
                os.close(descriptor)


def _sign(descriptor: int) -> None:
    """Writes the name of this process into a lock file."""
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, f'{json.dumps(asdict(Owner.of_this_process()))}\n'.encode(), 0)


def _locked(folder: Path, descriptor: int) -> bool:
    """Takes the lock, unless another one has it; where there are no locks, goes by what the file says."""
    try:
        if fcntl is None:
            raise OSError(errno.ENOSYS, 'no flock')
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        owner = Owner.read(descriptor)
        if owner is not None and owner.is_seen_running():
            raise InUseError(
                folder, owner, f' Its disk has no locks: if that process is no run, remove {folder / LOCK_FILE}.'
            ) from None
        warnings.warn(
            f'the disk of {folder} has no locks ({error.strerror}), so a second run that starts there on another '
            'machine, or at the same moment, is not noticed. Give each run a run_name of its own.',
            stacklevel=2,
        )
    return True


def _warn_of_another_machine(folder: Path, left: Owner | None) -> None:
    """Says who had the lock before and did not give it back, where we cannot tell whether that process has ended."""
    if left is not None and left.host != socket.gethostname():
        warnings.warn(
            f'{folder} was in use by {left}, and was not given back. Make sure that this process has ended: a disk '
            'that machines share may keep the locks of each machine apart.',
            stacklevel=2,
        )


def _is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:  # another user's
        pass
    return True


def _is_at(path: Path, descriptor: int) -> bool:
    """Whether the file at ``path`` is still the one that was opened."""
    try:
        return os.path.samestat(path.lstat(), os.fstat(descriptor))
    except OSError:
        return False


def _word(value: object) -> str:
    """A string from a file on one line, without what a terminal would obey."""
    if not isinstance(value, str):
        raise TypeError('no string')
    return ''.join(letter if letter.isprintable() else '?' for letter in value[:_LONGEST_WORD])
