"""Writes files whole or not at all."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def beside(path: Path) -> Iterator[Path]:
    """Lends an empty file beside ``path`` to write to, and renames it into place; after an error it is removed.

    The folder of ``path`` is made where it is missing.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f'.{path.name}.')
    os.close(handle)
    written = Path(name)
    try:
        yield written
        written.chmod(0o666 & ~_umask())  # mkstemp makes files private; a result is as readable as any other
        written.replace(path)
    finally:
        written.unlink(missing_ok=True)


def write_beside(path: Path, content: str | bytes) -> None:
    """Puts ``content`` at ``path`` whole or not at all."""
    with beside(path) as written:
        written.write_bytes(content.encode() if isinstance(content, str) else content)


def _umask() -> int:
    umask = os.umask(0)
    os.umask(umask)
    return umask
