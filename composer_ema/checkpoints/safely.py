"""Reads torch files without executing anything in them, and says why one cannot be read.

Invariant: what a file holds is never executed.
"""

from __future__ import annotations

import argparse
import datetime
import io
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import safetensors
import torch
from torch._utils import _sparse_tensors_to_validate
from torch._weights_only_unpickler import Unpickler
from torch.torch_version import TorchVersion

from composer_ema.model.names import listed

# The two functions that pickled arrays and scalars name, under numpy 1's name and under numpy 2's.
_RECONSTRUCT, _SCALAR = np.zeros(0).__reduce__()[0], np.float64(0).__reduce__()[0]
# What checkpoints hold besides tensors and plain types: times, torch's version, numpy's random state, and in timm's
# the arguments of its script.
_SAFE_TYPES: list[Any] = [
    argparse.Namespace,
    datetime.timedelta,
    TorchVersion,
    np.ndarray,
    np.dtype,
    *(type(np.dtype(code)) for code in '?bBhHiIlLqQefd'),
    *(
        (function, f'numpy.{module}.multiarray.{name}')
        for name, function in (('_reconstruct', _RECONSTRUCT), ('scalar', _SCALAR))
        for module in ('core', '_core')
    ),
]


class CheckpointError(ValueError):
    """A checkpoint cannot be read or holds no average. The message says which file and why."""


def load_safely(file: Path | BinaryIO, *, mmap: bool = False) -> Any:
    """``torch.load`` that executes nothing and lets through what checkpoints hold besides tensors and plain types.

    Args:
        file: the file, or a part of one that stands open.
        mmap: whether tensors stay on the disk until they are used.

    Raises:
        Exception: whatever torch raises about a file that it cannot read, or whose types it does not know.
    """
    with torch.serialization.safe_globals(_SAFE_TYPES):
        return torch.load(file, map_location='cpu', weights_only=True, mmap=mmap)


def unpickled_safely(pickled: bytes, storage: Callable[[Any], Any]) -> Any:
    """What a pickle of ``torch.save`` holds, read as :func:`load_safely` reads it, and with other storages.

    Args:
        pickled: the pickle.
        storage: returns the storage that stands for one of the file, given what the pickle says of that.

    Raises:
        Exception: as for :func:`load_safely`, and what ``storage`` raises.
    """
    unpickler: Any = Unpickler(io.BytesIO(pickled), encoding='utf-8')
    unpickler.persistent_load = storage
    before = len(_sparse_tensors_to_validate)
    try:
        with torch.serialization.safe_globals(_SAFE_TYPES):
            return unpickler.load()
    finally:
        del _sparse_tensors_to_validate[before:]  # torch would look at their values when it has read the next file


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
    """The first part of a torch file whose checksum is wrong; None if there is none.

    Raises:
        Exception: whatever ``zipfile`` raises about a file that it cannot read.
    """
    with zipfile.ZipFile(file) as archive:
        return archive.testzip()


def reason(file: Path | BinaryIO, error: Exception) -> str:
    """Why a file cannot be read, in words, from the error that torch or safetensors raised about it."""
    if isinstance(error, PermissionError):
        return str(error)
    if isinstance(error, safetensors.SafetensorError):
        return f'it is truncated, damaged, or no safetensors file: {error}.'
    try:
        known = {f'{t.__module__}.{t.__qualname__}' for t in _SAFE_TYPES if not isinstance(t, tuple)}
        known |= {t[1] for t in _SAFE_TYPES if isinstance(t, tuple)}
        unsafe = sorted(set(torch.serialization.get_unsafe_globals_in_checkpoint(file)) - known)
    except Exception:
        return (
            'it is truncated, damaged, or no torch file. Load an earlier checkpoint; decompress a compressed one first.'
        )
    if unsafe:
        return f'it holds the types {listed(unsafe)}, which could run code when loaded.'
    return str(error).splitlines()[0]
