"""Composer's Trainer loads its checkpoint without executing anything in it: where Composer unpickles, we read.

Composer 0.32.1 loads with ``torch.load(weights_only=False)``, unpickles the index of a sharded checkpoint, passes texts
of a checkpoint to ``eval`` and unpacks archives wherever they say. All of these are replaced while a checkpoint is
loaded, so that what is read is what was checked, also of files that come from elsewhere. Delete this when the oldest
Composer that we support loads with ``weights_only=True`` and evaluates nothing.
"""

from __future__ import annotations

import ast
import contextlib
import functools
import io
import os
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import composer.algorithms
import composer.core.state
import torch
from composer.core import Algorithm, Event, Time, TimeUnit
from composer.utils import checkpoint
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)

from composer_ema.checkpoints.inert_pickle import UnknownNamesError
from composer_ema.checkpoints.safely import CheckpointError, UnsafeCheckpointError, load_safely, reason
from composer_ema.checkpoints.shard_index import METADATA, Index, ShardedTensor, ShardError, index_of

_LONGEST_CALL = 1000
_MISSING = object()


@contextlib.contextmanager
def safe_loading() -> Iterator[None]:
    """A Trainer that is built in this context loads its checkpoint without executing anything in it.

    Composer itself runs what a checkpoint says, so that ``load_path`` and ``autoresume`` are for files that you trust.
    In this context it reads tensors, arrays and plain values, and what its own classes save is nothing else. Classes of
    yours are let through if you register them with ``torch.serialization.add_safe_globals``.

    Not for several threads: functions of Composer and torch are replaced while the context is open.

    Raises:
        CheckpointError: from the Trainer: the checkpoint names types that could run code, or is damaged.

    Example:
        .. code:: python

            with composer_ema.safe_loading():
                trainer = Trainer(model=model, load_path='from_elsewhere.pt', ...)
    """
    load = checkpoint.load_checkpoint

    @functools.wraps(load)
    def load_checkpoint(path: str, *args: Any, **kwargs: Any) -> Any:
        with reading_safely():
            return load(path, *args, **kwargs)

    with replaced(checkpoint, 'load_checkpoint', load_checkpoint):
        yield


@contextlib.contextmanager
def reading_safely() -> Iterator[None]:
    """Whatever Composer and torch read as a checkpoint in this context is read without executing anything in it.

    Raises:
        CheckpointError: in place of the error that torch collects from all processes.
    """
    with contextlib.ExitStack() as stack:
        for owner, name, value in (
            (torch, 'load', _load),
            (torch.storage, '_load_from_bytes', _storage_of_this_run),
            (FileSystemReader, 'read_metadata', _read_metadata),
            (composer.core.state, 'eval', _algorithm),
            # Keeps what is unpacked inside of its folder; Python's default from 3.14 on.
            (tarfile.TarFile, 'extraction_filter', staticmethod(tarfile.data_filter)),
        ):
            stack.enter_context(replaced(owner, name, value))
        try:
            yield
        except CheckpointException as error:
            ours = [each for each, _ in error.failures.values() if isinstance(each, CheckpointError)]
            if not ours:
                raise
            raise ours[0] from error


_torchs_load = torch.load


@functools.wraps(torch.storage._load_from_bytes)  # pickle finds it by this name
def _storage_of_this_run(data: bytes) -> Any:
    """A storage that a process of this run sent to another one, which torch passes to ``torch.load`` as well."""
    return _torchs_load(io.BytesIO(data), weights_only=False)


@contextlib.contextmanager
def replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """An attribute of a module or class of others has another value in this context."""
    before = vars(owner).get(name, _MISSING)
    setattr(owner, name, value)
    try:
        yield
    finally:
        if before is _MISSING:
            delattr(owner, name)
        else:
            setattr(owner, name, before)


def _load(file: Any, *_: Any, **__: Any) -> Any:
    """In place of ``torch.load``; tensors come to the CPU, from where Composer takes them."""
    # torch 2.7 lends a part of a file that cannot seek from its end: it goes beyond it.
    source = Path(file) if isinstance(file, (str, os.PathLike)) else io.BytesIO(file.read())
    try:
        return load_safely(source)
    except FileNotFoundError:  # which Composer explains
        raise
    except Exception as error:
        what = str(source) if isinstance(source, Path) else 'a part of the checkpoint'
        message = f'{what} cannot be read: {reason(source, error)}'
        if isinstance(error, UnknownNamesError):
            raise UnsafeCheckpointError(message, error.names) from error
        raise CheckpointError(message) from error


def _read_metadata(reader: FileSystemReader) -> Metadata:
    """In place of the reader's, which unpickles the index."""
    path = Path(reader.path) / METADATA
    try:
        index = index_of(path)
    except ShardError as error:
        raise CheckpointError(f'{path.parent} cannot be read: {error}') from error
    metadata = _as_torch_has_it(index)
    metadata.storage_meta = StorageMeta(load_id=reader.load_id)
    return metadata


def _as_torch_has_it(index: Index) -> Metadata:
    described: dict[str, TensorStorageMetadata | BytesStorageMetadata] = {}
    stored: dict[MetadataIndex, _StorageInfo] = {}
    for name, item in index.items.items():
        if not isinstance(item, ShardedTensor):
            described[name] = BytesStorageMetadata()
            places = {MetadataIndex(name): item.place}
        else:
            chunks = [ChunkStorageMetadata(torch.Size(each.offsets), torch.Size(each.sizes)) for each in item.chunks]
            described[name] = TensorStorageMetadata(TensorProperties(dtype=item.dtype), torch.Size(item.shape), chunks)
            places = {MetadataIndex(name, torch.Size(each.offsets)): each.place for each in item.chunks}
        stored |= {key: _StorageInfo(place.file, place.offset, place.length) for key, place in places.items()}
    return Metadata(described, planner_data=dict(index.paths), storage_data=stored)


def _algorithm(source: str) -> Algorithm:
    """In place of ``eval`` of an algorithm's text: a call of Composer's with literals, events and times.

    Raises:
        ValueError: it is anything else, which Composer takes as a warning and goes on without it.
    """
    call = ast.parse(source, mode='eval').body if len(source) <= _LONGEST_CALL else None
    if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Attribute):
        raise ValueError(f'{source[:80]!r} is no call of an algorithm.')
    kind: Any = getattr(composer.algorithms, call.func.attr, None)
    is_known = isinstance(call.func.value, ast.Name) and isinstance(kind, type) and issubclass(kind, Algorithm)
    if not is_known or not all(keyword.arg for keyword in call.keywords):
        raise ValueError(f'{source[:80]!r} is no call of an algorithm of Composer.')
    return kind(
        *map(_argument, call.args),
        **{keyword.arg: _argument(keyword.value) for keyword in call.keywords if keyword.arg},
    )


def _argument(node: ast.expr) -> Any:
    match node:
        case ast.Attribute(ast.Name('Event'), name):
            return Event[name]
        case ast.Call(ast.Name('Time'), [value, ast.Attribute(ast.Name('TimeUnit'), unit)], []):
            return Time(ast.literal_eval(value), TimeUnit[unit])
    return ast.literal_eval(node)
