"""Writes files whole or not at all, removes what killed processes left of them, and says why one cannot be written."""

from __future__ import annotations

import errno
import os
import re
import shutil
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows has no such locks; what a killed process leaves then stays
    fcntl = None

#: The ending of a file that is not whole yet: ``.metrics.jsonl.x3k2a_9q.unfinished``.
UNFINISHED = '.unfinished'
_UNFINISHED_NAME = re.compile(rf'\.(?P<name>.+)\.[a-z0-9_]{{8}}{re.escape(UNFINISHED)}[.\w]*')
#: A name of up to 255 bytes is legal, and the random part and the ending need some.
_LONGEST_PREFIX = 200
#: Errors that tell of the disk, whatever was being done, and what each says of a file.
_OF_THE_DISK = {
    errno.ENOSPC: 'there is no room left on its disk',
    errno.EDQUOT: 'your quota on its disk is used up',
    errno.EFBIG: 'it would be larger than a file may be here, by ulimit -f or by its disk',
    errno.EROFS: 'its disk is mounted read-only',
    errno.EIO: 'its disk reports an error of input or output',
    errno.ESTALE: 'its disk, on another machine, has lost it',
}
#: What safetensors, which is written in Rust, says of an error of the operating system.
_IN_RUST = re.compile(r'\(os error (\d+)\)')


@contextmanager
def beside(path: Path, *, ending: str = '') -> Iterator[Path]:
    """Lends an empty file beside ``path`` to write to, and renames it into place; after an error it is removed.

    The folder of ``path`` is made where it is missing. What an earlier process, killed while it wrote ``path``, left
    beside it is removed.

    Args:
        path: Where the whole file goes. What is there stays as it is until then.
        ending: The end of the lent file's name, for writers that choose the format by it. Default: none.

    Raises:
        OSError: ``path`` cannot be written. Its ``filename`` is ``path``, also where the error came out of torch or
            safetensors, which raise others.
    """
    with _errors_of(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with suppress(FileNotFoundError):
            # What os.replace would say, before the work is done rather than after it.
            if stat.S_ISDIR(path.lstat().st_mode):
                raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
            mode = path.stat().st_mode
            if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):  # os.replace would put a file in place of /dev/null
                raise OSError(errno.EINVAL, 'it is a device or a pipe, not a file', str(path))
        remove_unfinished(path.parent, path.name)
        handle, written = _new_file(path, ending)
        try:
            yield written
            written.chmod(0o666 & ~_umask())  # mkstemp makes files private; a result is as readable as any other
            written.replace(path)
        finally:
            os.close(handle)
            written.unlink(missing_ok=True)


@contextmanager
def folder_beside(path: Path) -> Iterator[Path]:
    """Lends an empty folder beside ``path`` to fill, and renames it into place; after an error it is removed.

    What an earlier process, killed while it filled one, left beside ``path`` is removed.

    Args:
        path: Where the whole folder goes. An empty folder may be there.

    Raises:
        OSError: ``path`` cannot be written, or something is there already. Its ``filename`` is ``path``.
    """
    with _errors_of(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        is_empty = path.is_dir() and not path.is_symlink() and not any(path.iterdir())
        if not is_empty and (path.is_symlink() or path.exists()):
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(path))
        remove_unfinished(path.parent, path.name)
        handle, written = _new_folder(path)
        try:
            yield written
            for each in [written, *written.rglob('*')]:  # mkdtemp and safetensors make theirs private
                each.chmod((0o777 if each.is_dir() else 0o666) & ~_umask())
            written.rename(path)
        finally:
            if handle is not None:
                os.close(handle)
            shutil.rmtree(written, ignore_errors=True)


def write_beside(path: Path, content: str | bytes) -> None:
    """Puts ``content`` at ``path`` whole or not at all."""
    with beside(path) as written:
        written.write_bytes(content.encode() if isinstance(content, str) else content)


def append(path: Path, content: str) -> None:
    """Adds ``content`` to the end of a file, all of it or nothing. The file and its folder are made where missing.

    Raises:
        OSError: ``path``, its ``filename``, cannot be written. It is as long as before.
    """
    with _errors_of(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open('ab', buffering=0) as file:
            end, left = file.tell(), memoryview(content.encode())
            try:
                while left:  # a disk that fills up takes a part before it fails
                    left = left[file.write(left) :]
            except BaseException:
                with suppress(OSError):
                    file.truncate(end)
                raise


def size_of(path: Path) -> int:
    """The bytes of a file; 0 if there is none."""
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


def remove_unfinished(folder: Path, name: str | None = None) -> None:
    """Removes what :func:`beside` and :func:`folder_beside` lent in a folder to processes that have died since.

    A process that writes holds a lock on the file it was lent, which ends with the process however it dies. Files of
    living processes stay, and so does everything on a disk without locks.

    Args:
        folder: To look in, not below. It may be missing.
        name: What the whole file would have been called. Default: anything.
    """
    if fcntl is None:
        return
    try:
        found = [path for path in folder.iterdir() if path.name.startswith('.')]
    except OSError:
        return
    for path in found:
        match = _UNFINISHED_NAME.fullmatch(path.name)
        if match is None or (name is not None and match['name'] != _prefix(name)):
            continue
        with suppress(OSError):  # another process holds it, or has just removed it
            is_folder = path.is_dir() and not path.is_symlink()
            handle = os.open(path, (os.O_RDONLY if is_folder else os.O_RDWR) | os.O_NOFOLLOW | os.O_NONBLOCK)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(path) if is_folder else path.unlink()
            finally:
                os.close(handle)


def error_of_the_system(error: BaseException) -> OSError | None:
    """The error of the operating system that ``error`` is, or that torch or safetensors raised it for; else None."""
    if isinstance(error, OSError):
        return error
    if match := _IN_RUST.search(str(error)):
        return OSError(int(match[1]), os.strerror(int(match[1])))
    # torch closes its archive after a failed write, fails again, and raises the second error in the context of the
    # first. In torch's sharded checkpoints each rank's error stands in a table.
    behind = [error.__cause__, error.__context__, *(each for each, _ in getattr(error, 'failures', {}).values())]
    found = [own for each in behind if each is not None and (own := error_of_the_system(each)) is not None]
    return next((own for own in found if is_of_the_disk(own)), None)


def is_of_the_disk(error: OSError) -> bool:
    """Whether an error tells that a disk is full, read-only or broken, so that no program could have avoided it."""
    return error.errno in _OF_THE_DISK


def in_words(error: OSError, what: str = 'read or written') -> str:
    """What cannot be read or written and why, as a sentence.

    Args:
        error: The error.
        what: What was tried, where that is known. An error of the disk says it itself.

    Example:
        >>> in_words(FileNotFoundError(errno.ENOENT, 'No such file or directory', 'runs/a/x.pt'))
        'runs/a/x.pt cannot be read or written: no such file or directory.'
    """
    path = os.fsdecode(error.filename) if isinstance(error.filename, str | bytes) else ''
    reason = _OF_THE_DISK.get(error.errno or 0)
    if reason is None:
        said = error.strerror or str(error)
        return f'{path or "a file"} cannot be {what}: {said[:1].lower()}{said[1:]}.'
    room = _room(Path(path)) if error.errno == errno.ENOSPC else ''
    return f'{path or "a file"} cannot be written: {reason}{room}.'


def readable(num_bytes: float) -> str:
    """A size for people, in decimal units.

    Example:
        >>> readable(0), readable(1_500), readable(2.34e9)
        ('0 B', '1.5 kB', '2.3 GB')
    """
    for unit in ('B', 'kB', 'MB', 'GB'):
        if num_bytes < 1000:
            return f'{num_bytes:.3g} {unit}' if unit == 'B' else f'{num_bytes:.1f} {unit}'
        num_bytes /= 1000
    return f'{num_bytes:.1f} TB'


@contextmanager
def _errors_of(path: Path) -> Iterator[None]:
    """Lets errors of the operating system name ``path`` where they name no file, or the one that stands for it."""
    try:
        yield
    except Exception as error:
        found = error_of_the_system(error)
        if found is None:
            raise
        named = found.filename
        is_lent = isinstance(named, str) and any(map(_UNFINISHED_NAME.fullmatch, Path(named).parts))
        if found.errno is not None and (named is None or is_lent):  # else its text would be lost
            found.filename = str(path)
        if found is error:
            raise
        raise found from error


def _new_file(path: Path, ending: str) -> tuple[int, Path]:
    """An empty file beside ``path``, and a handle that holds the lock on it."""
    while True:
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f'.{_prefix(path.name)}.', suffix=UNFINISHED + ending)
        if fcntl is not None:
            with suppress(OSError):  # a disk without locks
                fcntl.flock(handle, fcntl.LOCK_EX)
        if os.fstat(handle).st_nlink:
            return handle, Path(name)
        os.close(handle)  # another process took it for a dead one's, before it was locked


def _new_folder(path: Path) -> tuple[int | None, Path]:
    """An empty folder beside ``path``, and a handle that holds the lock on it; None where there are no locks."""
    while True:
        made = Path(tempfile.mkdtemp(dir=path.parent, prefix=f'.{_prefix(path.name)}.', suffix=UNFINISHED))
        if fcntl is None:
            return None, made
        with suppress(FileNotFoundError):  # another process took it for a dead one's, before it was locked
            handle = os.open(made, os.O_RDONLY)
            with suppress(OSError):  # a disk without locks
                fcntl.flock(handle, fcntl.LOCK_EX)
            if made.exists():
                return handle, made
            os.close(handle)


def _prefix(name: str) -> str:
    return name if len(os.fsencode(name)) <= _LONGEST_PREFIX else name[: _LONGEST_PREFIX // 4]


def _room(path: Path) -> str:
    """How much of a disk is free."""
    for folder in path.absolute().parents:
        with suppress(OSError):
            disk = shutil.disk_usage(folder)
            return f': {readable(disk.free)} of {readable(disk.total)} are free'
    return ''


def _umask() -> int:
    umask = os.umask(0)
    os.umask(umask)
    return umask
