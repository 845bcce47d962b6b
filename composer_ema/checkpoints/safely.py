"""Reads torch files without executing anything in them, and says why one cannot be read.

Invariant: what a file holds is never executed.
"""

from __future__ import annotations

import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO

import safetensors
import torch

from composer_ema.checkpoints import torch_file
from composer_ema.checkpoints.inert_pickle import InertPickleError, UnknownNamesError
from composer_ema.model.names import listed
from composer_ema.wording import visible


class CheckpointError(ValueError):
    """A checkpoint cannot be read or holds no average. The message says which file and why.

    What does not print is escaped in it: it quotes names out of files, and is shown on terminals.
    """

    def __init__(self, message: str) -> None:
        super().__init__(visible(message))


class UnsafeCheckpointError(CheckpointError):
    """A checkpoint names types that could run code.

    Attributes:
        names: all of them.
    """

    def __init__(self, message: str, names: Sequence[str]) -> None:
        super().__init__(message)
        self.names = list(names)

    def __reduce__(self) -> Any:
        """For pickle, in which errors travel between processes."""
        return type(self), (str(self), self.names)


def load_safely(file: Path | BinaryIO, *, mmap: bool = False) -> Any:
    """What a torch file holds, on the CPU: tensors, arrays and plain types. Executes nothing in it.

    Classes that were registered with ``torch.serialization.add_safe_globals`` are trusted, too, except torch's own.

    Args:
        file: the file, or a part of one that stands open.
        mmap: whether tensors stay on the disk until they are used.

    Raises:
        UnknownNamesError: it names what could run code.
        Exception: it cannot be read; :func:`reason` says why.
    """
    return torch_file.load(file, _trusted(), in_place=mmap)


def _trusted() -> dict[str, Any]:
    pairs = (
        each if isinstance(each, tuple) else (each, f'{each.__module__}.{each.__qualname__}')
        for each in torch.serialization.get_safe_globals()
    )
    return {name: chosen for chosen, name in pairs if not name.startswith('torch.')}


def check_sums(path: Path) -> None:
    """Raises where a byte of a torch file has changed since it was written, which ``torch.load`` does not look for.

    Raises:
        CheckpointError: a checksum is wrong, or the file cannot be read through.
    """
    if not zipfile.is_zipfile(path):
        return
    try:
        damaged = damaged_part(path)
    except Exception as error:
        raise CheckpointError(f'{path} cannot be read: {reason(path, error)}') from error
    if damaged:
        raise CheckpointError(
            f'{path} cannot be read: it is damaged, the checksum of {damaged} is wrong. Load an earlier checkpoint.'
        )


def damaged_part(file: Path | BinaryIO) -> str | None:
    """The first part of a torch file whose checksum is wrong; None if there is none, or the file has no checksums.

    Raises:
        Exception: whatever ``zipfile`` raises about a file that it cannot read.
    """
    with zipfile.ZipFile(file) as archive:
        torch_file.drop_missing_sums(archive)
        return archive.testzip()


def reason(file: Path | BinaryIO, error: Exception) -> str:
    """Why a file cannot be read, in words, from the error that torch or safetensors raised about it."""
    if isinstance(error, PermissionError):
        return str(error)
    if isinstance(error, safetensors.SafetensorError):
        return f'it is truncated, damaged, or no safetensors file: {error}.'
    if isinstance(error, UnknownNamesError):
        return f'it holds the types {listed(error.names)}, which could run code when loaded.'
    if isinstance(error, InertPickleError):
        return f'{error} Load an earlier checkpoint.' if str(error).startswith('it ') else _DAMAGED
    if isinstance(error, OSError):
        return str(error)
    return _DAMAGED


_DAMAGED = 'it is truncated, damaged, or no torch file. Load an earlier checkpoint; decompress a compressed one first.'
