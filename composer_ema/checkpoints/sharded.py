"""Opens a folder of torch.distributed.checkpoint in one process, as the nested dictionaries that were saved.

Invariant: what the folder holds is never executed, and of tensors no more than the one that is used is in memory.
"""

from __future__ import annotations

import io
import re
import zipfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, cast

import torch
from torch import Tensor

from composer_ema.checkpoints.lazy_tensor import LazyTensor
from composer_ema.checkpoints.safely import CheckpointError, damaged_part, load_safely, reason
from composer_ema.checkpoints.shard_index import (
    METADATA,
    Chunk,
    Index,
    Item,
    Place,
    ShardedTensor,
    ShardedValue,
    ShardError,
    read_index,
)
from composer_ema.model.names import listed

#: The ending of the files with the shards.
SUFFIX = '.distcp'
# As torch pickles the name of a class that stands for one process's part of something.
_SHARDS_IN_PICKLE = re.compile(rb'ctorch\.distributed\.[\w.]*\n(\w+)\n')


def is_sharded(folder: Path) -> bool:
    """Whether a folder is a sharded checkpoint: torch writes ``.metadata`` last of all."""
    return (folder / METADATA).is_file()


def open_folder(folder: Path) -> Branch:
    """What was saved to a sharded checkpoint: nested dictionaries and lists, whose tensors are :class:`LazyTensor`.

    The index is read and checked as a whole. Other values are read when they are asked for, tensors whenever they are
    used, chunk by chunk. All checksums of what is read are compared.

    Args:
        folder: that ``torch.distributed.checkpoint.save`` wrote to, or Composer's Trainer.

    Raises:
        CheckpointError: it is damaged, incomplete, or written in a way that is not read; it would run code.
    """
    try:
        return Branch(_nested(read_index(folder)), _Reader(folder).value)
    except (ShardError, OSError) as error:
        raise CheckpointError(f'{folder} cannot be read: {error}') from error


def check_folder(folder: Path) -> None:
    """Reads a sharded checkpoint through: its index, and all bytes of its items, of which it compares the checksums.

    Raises:
        CheckpointError: it is damaged, incomplete, or written in a way that is not read.
    """
    try:
        index = read_index(folder)
        _nested(index)
    except (ShardError, OSError) as error:
        raise CheckpointError(f'{folder} cannot be read: {error}') from error
    for item in index.items.values():
        for place in [chunk.place for chunk in item.chunks] if isinstance(item, ShardedTensor) else [item.place]:
            path = folder / place.file
            with path.open('rb') as file:
                try:
                    damaged = damaged_part(cast(BinaryIO, io.BufferedReader(_Window(file, place), 2**16)))
                # A damaged blob fails in as many ways as there are bytes in it; all of them mean the same to the user.
                except Exception as error:
                    raise CheckpointError(f'{item.name} in {path} cannot be read: it is damaged.') from error
            if damaged:
                raise CheckpointError(
                    f'{item.name} in {path} cannot be read: it is damaged, the checksum of {damaged} is wrong.'
                )


def files_of(folder: Path) -> list[Path]:
    """The files of a sharded checkpoint."""
    return [folder / METADATA, *sorted(folder.glob(f'*{SUFFIX}'))]


Node = dict[Any, Any]
"""Keys to nodes and items. With numbers for keys it stands for a list."""


class Branch(Mapping[str, Any]):
    """A dictionary in a sharded checkpoint, of which a value is read when it is first asked for, and kept.

    Args:
        node: keys to further nodes, and to items.
        read: returns what an item is.
    """

    def __init__(self, node: Node, read: Callable[[Item], Any]) -> None:
        self._node, self._read = node, read
        self._found: dict[str, Any] = {}

    def __getitem__(self, key: str) -> Any:
        if key not in self._found:
            self._found[key] = self._resolved(self._node[key])
        return self._found[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._node)

    def __len__(self) -> int:
        return len(self._node)

    def __contains__(self, key: object) -> bool:
        return key in self._node

    def _resolved(self, node: Any) -> Any:
        if not isinstance(node, dict):
            return self._read(node)
        if _is_list(node):
            return [self._resolved(node[place]) for place in range(len(node))]
        return Branch(node, self._read)


def _nested(index: Index) -> Node:
    root: Node = {}
    for name, path in index.paths.items():
        node = root
        for key in path[:-1]:
            node = node.setdefault(key, {})
            if not isinstance(node, dict):
                raise ShardError(f'its {METADATA} puts {name} inside of another item: it is damaged.')
        if path[-1] in node:
            raise ShardError(f'its {METADATA} puts two items where {name} is: it is damaged.')
        node[path[-1]] = index.items[name]
    _check_keys(root)
    return root


def _check_keys(root: Node) -> None:
    """Raises unless every node is a dictionary by name or a whole list."""
    nodes = [root]
    while nodes:
        node = nodes.pop()
        if any(isinstance(key, int) for key in node) and (node is root or not _is_list(node)):
            raise ShardError(f'its {METADATA} has a list with gaps, of {listed(list(map(str, node)))}: it is damaged.')
        nodes += [each for each in node.values() if isinstance(each, dict)]


def _is_list(node: Node) -> bool:
    return bool(node) and all(isinstance(key, int) and key < len(node) for key in node)


class _Reader:
    """Reads the items of a folder."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def value(self, item: Item) -> Any:
        """An item: a tensor that is read later, or any other value."""
        if isinstance(item, ShardedTensor):
            return LazyTensor(item.shape, item.dtype, lambda: self._tensor(item))
        return self._loaded(item, item.place)[0]

    def _tensor(self, item: ShardedTensor) -> Tensor:
        """The whole of a tensor; beside it there is one chunk at a time."""
        if len(item.chunks) == 1:
            return self._chunk(item, item.chunks[0])
        whole = torch.empty(item.shape, dtype=item.dtype, device='cpu')
        for chunk in item.chunks:
            part = whole
            for dimension, (offset, size) in enumerate(zip(chunk.offsets, chunk.sizes, strict=True)):
                part = part.narrow(dimension, offset, size)
            part.copy_(self._chunk(item, chunk))
        return whole

    def _chunk(self, item: ShardedTensor, chunk: Chunk) -> Tensor:
        found, sizes = self._loaded(item, chunk.place)
        is_sound = (
            isinstance(found, Tensor)
            and (found.shape, found.dtype, found.layout) == (chunk.sizes, item.dtype, torch.strided)
            and not found.is_meta
            # A tensor of a larger storage would keep all of that in memory.
            and [found.untyped_storage().nbytes()] == sizes
        )
        if not is_sound:
            raise CheckpointError(
                f'{self._folder / chunk.place.file} is damaged: it holds something else where the chunk of {item.name} '
                f'at {chunk.offsets} belongs. Load an earlier checkpoint.'
            )
        return found.detach()

    def _loaded(self, item: Item, place: Place) -> tuple[Any, list[int]]:
        """What a blob holds, its checksums compared, and the sizes of the storages in it."""
        path = self._folder / place.file
        what = f'{item.name} in {path} cannot be read'
        try:
            with path.open('rb') as file:
                window = cast(BinaryIO, io.BufferedReader(_Window(file, place), 2**16))
                if not zipfile.is_zipfile(window):
                    raise CheckpointError(f'{what}: it is damaged, or was not written by torch.save.')
                sizes = _storages(window, what)
                if damaged := damaged_part(window):
                    raise CheckpointError(
                        f'{what}: it is damaged, the checksum of {damaged} is wrong. Load an earlier checkpoint.'
                    )
                if isinstance(item, ShardedValue):
                    _refuse_shards(window, what)
                window.seek(0)
                try:
                    return load_safely(window), sizes
                except Exception as error:
                    window.seek(0)
                    raise CheckpointError(f'{what}: {reason(window, error)}') from error
        except CheckpointError:
            raise
        # A damaged blob fails in as many ways as there are bytes in it; all of them mean the same to the user.
        except Exception as error:
            raise CheckpointError(f'{what}: it is truncated or damaged. Load an earlier checkpoint.') from error


def _storages(window: BinaryIO, what: str) -> list[int]:
    """The sizes of the storages in a blob. None takes more memory than it takes on the disk."""
    with zipfile.ZipFile(window) as archive:
        inside = archive.infolist()
    if any(info.compress_type != zipfile.ZIP_STORED for info in inside):
        raise CheckpointError(f'{what}: it is compressed, which torch.save never does. Save without extensions.')
    return [info.file_size for info in inside if info.filename.split('/')[1:-1] == ['data']]


def _refuse_shards(window: BinaryIO, what: str) -> None:
    """Raises for a value with one process's shards in it, as Composer's built-in EMA saves its average."""
    window.seek(0)
    with zipfile.ZipFile(window) as archive:
        pickled = [name for name in archive.namelist() if name.endswith('/data.pkl')]
        names = {name.decode() for each in pickled for name in _SHARDS_IN_PICKLE.findall(archive.read(each))}
    if names & {'DTensor', 'ShardedTensor'}:
        raise CheckpointError(
            f'{what}: it holds the shards of one process ({listed(sorted(names))}), pickled. Those of the other '
            "processes were not saved, so nothing whole can be made of them. Composer's built-in EMA and SWA save "
            'sharded models so; composer_ema.EMA and SWA save all shards.'
        )


class _Window(io.RawIOBase):
    """A part of an open file, as a file of its own."""

    def __init__(self, file: BinaryIO, place: Place) -> None:
        self._file, self._place, self._at = file, place, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._place.length}[whence]
        self._at = max(base + offset, 0)
        return self._at

    def tell(self) -> int:
        return self._at

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer).cast('B')[: max(self._place.length - self._at, 0)]
        self._file.seek(self._place.offset + self._at)
        count = self._file.readinto(view)  # pyright: ignore[reportAttributeAccessIssue]: a file opened as bytes has it
        self._at += count
        return count
