"""Reads the files of ``torch.save``, today's zip archives and those of before 1.6, by :mod:`torch_values` alone.

torch's own reader takes the word of a file for the size of a storage, a tensor or an array, with ``weights_only``, too.

Invariant: a tensor lies in the bytes of the file, and the memory that a file takes is bounded by its length.
"""

from __future__ import annotations

import contextlib
import io
import mmap
import struct
import sys
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch

from composer_ema.checkpoints.inert_pickle import Data, InertPickleError, Known, load_at
from composer_ema.checkpoints.torch_values import Storage, dtype_of_storage, is_count, known, without_tensors

_PICKLE, _STORAGES, _ORDER = 'data.pkl', 'data/', 'byteorder'
_LOCAL_HEADER = 30
# Where a tensor is read in place, its values begin at a multiple of this many bytes.
_ALIGNMENT = 16
# The start of a file of before 1.6.
_MAGIC = 0x1950A86A20F9469CFC6C


def load(file: Path | BinaryIO, trusted: Mapping[str, Any], *, in_place: bool = False) -> Any:
    """What a torch file holds, its tensors on the CPU.

    Args:
        file: the file, or a part of one that stands open.
        trusted: as for :func:`torch_values.known`.
        in_place: whether tensors stay on the disk until they are used, where ``file`` is a path of a zip archive.

    Raises:
        InertPickleError: the file is damaged, no torch file, or names what is not known.
        OSError, zipfile.BadZipFile: it cannot be read.
    """
    with _opened(file) as opened:
        if zipfile.is_zipfile(opened):
            return _Archive(opened, file if in_place and isinstance(file, Path) else None).load(known(trusted))
        opened.seek(0)
        return _load_old(opened, known(trusted))


@contextlib.contextmanager
def _opened(file: Path | BinaryIO) -> Iterator[BinaryIO]:
    if not isinstance(file, Path):
        yield file
        return
    with file.open('rb') as opened:
        yield opened


class _Archive:
    """The zip archive of a torch file.

    Args:
        file: the open file.
        in_place: the path of the same file, whose tensors stay on the disk. Default: they are read.
    """

    def __init__(self, file: BinaryIO, in_place: Path | None) -> None:
        self._file = file
        self._zip = zipfile.ZipFile(file)
        drop_missing_sums(self._zip)
        self._length = file.seek(0, io.SEEK_END)
        entries = self._zip.infolist()
        self._entries = {each.filename: each for each in entries}
        if any(each.compress_type != zipfile.ZIP_STORED for each in entries):
            raise InertPickleError('it is compressed inside, which torch.save never does.')
        if len(self._entries) < len(entries):
            raise InertPickleError('it is no zip that torch.save wrote: two of its parts have one name.')
        if sum(each.file_size for each in entries) > self._length:
            raise InertPickleError('it is damaged: its parts overlap.')
        self._mapped = None
        if in_place is not None:
            self._mapped = torch.UntypedStorage.from_file(str(in_place), False, self._length)
        self._storages: dict[str, torch.UntypedStorage] = {}

    def load(self, table: Known) -> Any:
        pickles = [name for name in self._entries if name.count('/') == 1 and name.endswith(f'/{_PICKLE}')]
        if len(pickles) != 1:
            raise InertPickleError('it is no torch file: it holds no pickle, or several.')
        self._root = pickles[0].removesuffix(_PICKLE)
        if f'{self._root}constants.pkl' in self._entries:
            raise InertPickleError('it holds a program of TorchScript, which is not read.')
        self._is_swapped = self._order() != sys.byteorder
        return load_at(self._zip.read(pickles[0]), 0, table, self._storage)[0]

    def _order(self) -> str:
        entry = self._entries.get(self._root + _ORDER)
        order = 'little' if entry is None else self._zip.read(entry).decode('ascii', 'replace')
        if order not in ('little', 'big'):
            raise InertPickleError('it is damaged: its order of bytes is none.')
        return order

    def _storage(self, identifier: Any) -> Storage:
        name, kind, key, _, count = identifier
        dtype = dtype_of_storage(kind)
        if name != 'storage' or type(key) is not str or not is_count(count):
            raise InertPickleError('it is damaged: it refers to no storage.')
        if key not in self._storages:
            self._storages[key] = self._read(key, dtype)
        untyped = self._storages[key]
        if count * dtype.itemsize > untyped.nbytes():
            raise InertPickleError(
                f'it is damaged: its storage {key} claims {count * dtype.itemsize:,} bytes, and {untyped.nbytes():,} '
                'lie in the file.'
            )
        return Storage(untyped, dtype)

    def _read(self, key: str, dtype: torch.dtype) -> torch.UntypedStorage:
        entry = self._entries.get(f'{self._root}{_STORAGES}{key}')
        if entry is None:
            raise InertPickleError(f'it is damaged: the storage {key} is not in it.')
        start, size = self._start(entry), entry.file_size
        if start + size > self._length:
            raise InertPickleError('it is damaged: a storage in it reaches out of it.')
        if self._mapped is not None and not self._is_swapped and start % _ALIGNMENT == 0 and size:
            part: Any = self._mapped[start : start + size]
            return part
        untyped = torch.UntypedStorage(size)
        self._file.seek(start)
        if _fill(untyped, self._file) != entry.CRC is not None:
            raise InertPickleError(f'it is damaged, the checksum of {entry.filename} is wrong.')
        if self._is_swapped:
            untyped.byteswap(dtype)
        return untyped

    def _start(self, entry: zipfile.ZipInfo) -> int:
        """Where the bytes of an entry begin: behind a header of its own, whose names may be longer or shorter."""
        self._file.seek(entry.header_offset)
        header = self._file.read(_LOCAL_HEADER)
        if len(header) < _LOCAL_HEADER or header[:4] != b'PK\x03\x04':
            raise InertPickleError('it is damaged: an entry has no header.')
        name, padding = struct.unpack_from('<HH', header, 26)
        return entry.header_offset + _LOCAL_HEADER + name + padding


def drop_missing_sums(archive: zipfile.ZipFile) -> None:
    """Lets an archive without checksums be read: ``torch.serialization.set_crc32_options(False)`` writes zeros."""
    entries = archive.infolist()
    if not any(each.CRC for each in entries):
        for each in entries:
            each.CRC = None  # pyright: ignore[reportAttributeAccessIssue]: zipfile then compares none


def _fill(untyped: torch.UntypedStorage, file: BinaryIO) -> int:
    """Reads as many bytes as a storage has into it, and returns their checksum."""
    if not untyped.nbytes():
        return 0
    view = torch.empty(0, dtype=torch.uint8, device='cpu').set_(untyped).numpy().data  # pyright: ignore[reportArgumentType]: a storage may stand alone
    at = 0
    while at < len(view):
        read = file.readinto(view[at:])  # pyright: ignore[reportAttributeAccessIssue]: a file opened as bytes has it
        if not read:
            raise InertPickleError('it is truncated.')
        at += read
    return zlib.crc32(view)


def _load_old(file: BinaryIO, table: Known) -> Any:
    """A file of before 1.6: pickles one behind the other, and then the bytes of each storage.

    What it holds is read twice, since the pickle comes before the storages: first for their sizes alone.
    """
    data = _all_of(file)
    described: dict[str, tuple[torch.dtype, int]] = {}

    def describe(identifier: Any) -> None:
        key, dtype, count, _ = _described(identifier)
        described.setdefault(key, (dtype, count))

    storages: dict[str, torch.UntypedStorage] = {}

    def storage(identifier: Any) -> Storage:
        key, dtype, _, view = _described(identifier)
        first, size = (0, storages[key].nbytes()) if view is None else (each * dtype.itemsize for each in view)
        if first + size > storages[key].nbytes():
            raise InertPickleError('it is damaged: a view of a storage reaches out of it.')
        return Storage(storages[key][first : first + size], dtype)

    magic, at = load_at(data, 0, table)
    if magic != _MAGIC:
        raise InertPickleError('it is no torch file.')
    _, at = load_at(data, at, table)  # the protocol
    _, start = load_at(data, at, table)  # the machine that wrote it
    _, at = load_at(data, start, without_tensors(table), describe)
    keys, at = load_at(data, at, table)
    if type(keys) is not list or set(keys) != set(described) or len(keys) != len(described):
        raise InertPickleError('it is damaged: a storage is missing.')
    for key in keys:
        dtype, count = described[key]
        size = count * dtype.itemsize
        found, at = int.from_bytes(data[at : at + 8], 'little'), at + 8
        if found != count or at + size > len(data):
            raise InertPickleError('it is truncated or damaged: a storage has another length.')
        storages[key] = torch.UntypedStorage(size)
        _fill(storages[key], io.BytesIO(data[at : at + size]))
        at += size
    return load_at(data, start, table, storage)[0]


def _described(identifier: Any) -> tuple[str, torch.dtype, int, tuple[int, int] | None]:
    """The key, the dtype and the number of elements of a storage, and the part of it that is meant."""
    name, kind, key, _, count, view = identifier
    if name != 'storage' or type(key) is not str or not is_count(count):
        raise InertPickleError('it is damaged: it refers to no storage.')
    if view is not None and not (len(view) == 3 and is_count(view[1]) and is_count(view[2])):
        raise InertPickleError('it is damaged: it refers to no part of a storage.')
    return key, dtype_of_storage(kind), count, None if view is None else view[1:]


def _all_of(file: BinaryIO) -> Data:
    try:
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except (OSError, ValueError, AttributeError):  # a part of a file, or an empty one
        return file.read()
