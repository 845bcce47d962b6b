"""Looks at a file of ``torch.save`` before torch reads it: no tensor may claim more than lies in the file.

torch up to 2.7 takes the pickle's word for the size of a storage and reads memory that is not the file's; and a few
bytes can describe tensors of terabytes, which something then fills.
"""

from __future__ import annotations

import mmap
import struct
import zipfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from composer_ema.checkpoints.safely import CheckpointError, unpickled_safely

# A weight may stand under many names, and a mask be one row that is repeated: this many times the file, and a little.
_TIMES, _ALWAYS = 128, 2**28
_PICKLE, _STORAGES = 'data.pkl', 'data'


def check_archive(path: Path) -> None:
    """Raises unless every storage and every tensor in a zip of ``torch.save`` is one that the file can hold.

    Nothing is executed and no storage is read. Other files pass.

    Raises:
        CheckpointError: the zip is not as torch writes it, or what it holds claims far more memory than it has bytes.
        Exception: whatever torch raises about a pickle that it cannot read, or whose types it does not know.
    """
    if not zipfile.is_zipfile(path):
        return
    with path.open('rb') as file, zipfile.ZipFile(file) as archive:
        records = _records(archive, path)
        pickled = next((name for name in records if name.partition('/')[2] == _PICKLE), None)
        if pickled is None:
            return  # torch says what it is in place of its own file
        # Read where they lie: only sizes of nested tensors are.
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        folder = f'{pickled.removesuffix(_PICKLE)}{_STORAGES}/'
        own = {name.removeprefix(folder): part for name, part in records.items() if name.startswith(folder)}
        held = unpickled_safely(archive.read(pickled), _storages(own, mapped, path))
    check_claims(held, path, path.stat().st_size)


def check_claims(held: Any, path: Path, num_bytes: int) -> None:
    """Raises where the tensors in ``held``, each in full, take far more than the ``num_bytes`` that they were read of.

    Raises:
        CheckpointError: they do; the message names the largest.
    """
    claims = {name: claimed for name, tensor in tensors_in(held) if (claimed := _claimed(tensor))}
    total, most = sum(claims.values()), _TIMES * num_bytes + _ALWAYS
    if total > most:
        largest = max(claims, key=lambda name: claims[name])
        raise CheckpointError(
            f'{path} cannot be read: it has {num_bytes:,} bytes and its tensors would take {total:,}, '
            f'{claims[largest]:,} of them {largest}. Values that are repeated take their full size: at most {most:,} '
            'is read of such a file. Save tensors that were expanded as they were before.'
        )


def tensors_in(held: Any) -> Iterator[tuple[str, Tensor]]:
    """Every tensor in nested dictionaries, lists and tuples, by the last of its keys."""
    waiting: list[tuple[str, Any]] = [('', held)]
    seen = set()
    while waiting:
        name, value = waiting.pop()
        if isinstance(value, Tensor):
            yield name, value
        elif isinstance(value, Mapping | list | tuple) and id(value) not in seen:  # a file may hold what holds itself
            seen.add(id(value))
            items = value.items() if isinstance(value, Mapping) else ((name, each) for each in value)
            waiting += [(str(key) if isinstance(key, str | int) else name, each) for key, each in items]


def _claimed(tensor: Tensor) -> int:
    """The bytes that a tensor takes when it is written out in full; none for one that stands in full in its storage."""
    if tensor.layout is not torch.strided:
        return 0  # its parts are dense tensors of the file
    return tensor.numel() * tensor.dtype.itemsize


def _records(archive: zipfile.ZipFile, path: Path) -> dict[str, zipfile.ZipInfo]:
    """The parts of a zip by name."""
    parts = archive.infolist()
    records = {part.filename: part for part in parts}
    # torch and zipfile look for the list of parts in different ways. In a file that torch wrote they find the same.
    is_odd = len({name.lower() for name in records}) < len(parts) or all(part.header_offset for part in parts)
    if is_odd or sum(name.partition('/')[2] == _PICKLE for name in records) > 1:
        raise CheckpointError(f'{path} cannot be read: it is no zip that torch.save wrote. Load an earlier checkpoint.')
    if any(part.compress_type != zipfile.ZIP_STORED for part in parts):
        raise CheckpointError(
            f'{path} cannot be read: it is compressed inside, which torch.save never does. Unpack it, and pack it '
            'without compression.'
        )
    if sum(part.file_size for part in parts) > path.stat().st_size:
        raise CheckpointError(f'{path} cannot be read: its parts overlap. Load an earlier checkpoint.')
    return records


def _storages(records: Mapping[str, zipfile.ZipInfo], mapped: mmap.mmap, path: Path) -> Callable[[Any], Any]:
    """What gives the storages of a file, on the disk, and refuses one that its record cannot hold."""
    whole = torch.frombuffer(mapped, dtype=torch.uint8).untyped_storage()

    def storage(saved: Any) -> Any:
        _, kind, key, _, count = saved
        dtype = torch.uint8 if kind is torch.UntypedStorage else kind.dtype
        num_bytes, record = count * dtype.itemsize, records.get(key)
        size = 0 if record is None else record.file_size
        if not 0 <= num_bytes <= size:
            raise CheckpointError(
                f'{path} cannot be read: its storage {key} claims {num_bytes:,} bytes, and {size:,} lie in the file. '
                'Load an earlier checkpoint.'
            )
        start = 0 if record is None else _start_of(record, mapped)
        untyped = whole[start : start + num_bytes]
        return torch.storage.TypedStorage(wrap_storage=untyped, dtype=dtype, _internal=True)

    return storage


def _start_of(record: zipfile.ZipInfo, mapped: mmap.mmap) -> int:
    """Where the bytes of a part begin: behind its header, its name and its padding."""
    at = record.header_offset
    name, padding = struct.unpack_from('<HH', mapped, at + 26)
    return at + 30 + name + padding
