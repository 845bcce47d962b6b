"""Where the values of a sharded checkpoint lie: its ``.metadata``, read without executing it and checked as a whole.

torch.distributed.checkpoint writes a folder: ``__0_0.distcp``, ``__1_0.distcp``, ... hold one blob of ``torch.save``
after the other, and ``.metadata`` is a pickle that says which chunk of which tensor each blob is.
"""

from __future__ import annotations

import math
import stat
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, TypeGuard

import torch

from composer_ema.checkpoints import inert_pickle
from composer_ema.checkpoints.inert_pickle import Global, InertPickleError, Record
from composer_ema.checkpoints.torch_values import is_count
from composer_ema.model.names import listed

METADATA = '.metadata'
# Some 1.5 million chunks. What is built from a pickle takes up to 70 times its size in memory.
_MAX_METADATA_BYTES = 2**28
_MAX_COUNT = 2**63
# As many as torch has.
_MAX_DIMENSIONS = 64
# Dictionaries and lists, one in the other. torch's writer itself ends below 1,000.
_MAX_DEPTH = 100


class ShardError(ValueError):
    """A sharded checkpoint is damaged, incomplete, or written in a way that is not read. The message says where."""


@dataclass(frozen=True)
class Place:
    """Where a blob lies: in a file of the folder, from ``offset`` on."""

    file: str
    offset: int
    length: int


@dataclass(frozen=True)
class Chunk:
    """A box of a tensor: where it begins, its shape, and where its values lie."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    place: Place


@dataclass(frozen=True)
class ShardedTensor:
    """A tensor in a sharded checkpoint, of which every element is in one of the chunks."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    chunks: tuple[Chunk, ...]


@dataclass(frozen=True)
class ShardedValue:
    """Anything else, pickled."""

    name: str
    place: Place


Item = ShardedTensor | ShardedValue


@dataclass(frozen=True)
class Index:
    """What a sharded checkpoint holds.

    Attributes:
        items: by name, as the writer joined it of the keys.
        paths: the keys that lead to each item in the dictionaries that were saved; a number is a place in a list.
    """

    items: Mapping[str, Item]
    paths: Mapping[str, tuple[str | int, ...]]


def read_index(folder: Path) -> Index:
    """Reads and checks the index of a sharded checkpoint: that all that it speaks of is there, once and in bounds.

    Raises:
        ShardError: it is damaged or incomplete, names what is not known, or was written in a way that is not read.
        OSError: a file cannot be read.
    """
    return _read(folder / METADATA, folder)


def index_of(path: Path) -> Index:
    """Reads and checks the index of a sharded checkpoint whose files may be elsewhere still.

    Args:
        path: of the ``.metadata``.

    Raises:
        ShardError: as :func:`read_index`, except for what the other files hold.
        OSError: it cannot be read.
    """
    return _read(path, None)


def _read(path: Path, folder: Path | None) -> Index:
    size = path.stat().st_size
    if size > _MAX_METADATA_BYTES:
        raise ShardError(f'its {METADATA} takes {size:,} bytes, and {_MAX_METADATA_BYTES:,} are read at most.')
    try:
        metadata = _fields(inert_pickle.loads(path.read_bytes(), _known), 'Metadata')
    except InertPickleError as error:
        raise ShardError(f'its {METADATA} cannot be read: {error}') from error
    places = _places(metadata.get('storage_data'))
    if folder is not None:
        _check_files(folder, places.values())
    described = metadata.get('state_dict_metadata')
    if not isinstance(described, dict):
        _refuse('lists no items')
    items = {name: _item(name, record, places) for name, record in described.items()}
    return Index(items, _paths(items, metadata.get('planner_data')))


_DCP = 'torch.distributed.checkpoint.metadata'
_RECORDS = {
    (_DCP, name)
    for name in (
        'Metadata', 'TensorStorageMetadata', 'BytesStorageMetadata', 'ChunkStorageMetadata', 'TensorProperties',
        'MetadataIndex', 'StorageMeta', '_MEM_FORMAT_ENCODING',
    )
} | {('torch.distributed.checkpoint.filesystem', '_StorageInfo'), ('torch.serialization', '_get_layout')}  # fmt: skip
# The folder that the checkpoint was saved to.
_RECORDS |= {
    (module, name)
    for module in ('pathlib', 'pathlib._local')
    for name in ('PosixPath', 'PurePosixPath', 'WindowsPath', 'PureWindowsPath')
}


def _known(module: str, name: str) -> Global | None:
    if (module, name) in _RECORDS:
        return Global(module, name)
    if (module, name) == ('torch', 'Size'):
        return Global(module, name, _size)
    if (module, name) == ('collections', 'OrderedDict'):
        return Global(module, name, _empty)
    if module == 'torch' and isinstance(vars(torch).get(name), (torch.dtype, torch.layout, torch.memory_format)):
        return Global(module, name)
    return None


def _empty() -> dict[Any, Any]:
    return {}


def _size(dimensions: Any = ()) -> tuple[int, ...]:
    if not _is_short(dimensions) or not all(map(is_count, dimensions)):
        raise InertPickleError(f'a size in it is no tuple of at most {_MAX_DIMENSIONS} whole numbers.')
    return dimensions


def _is_short(value: Any) -> TypeGuard[tuple[Any, ...]]:
    return type(value) is tuple and len(value) <= _MAX_DIMENSIONS


def _fields(record: Any, kind: str) -> Mapping[str, Any]:
    """The attributes of an object of the class ``kind``."""
    if not isinstance(record, Record) or record.kind.name != kind:
        _refuse(f'holds something else where a {kind} belongs')
    state = {} if record.state is None else record.state
    if not isinstance(state, dict):
        _refuse(f'holds a {kind} without attributes')
    return state


def _refuse(what: str) -> NoReturn:
    raise ShardError(f'its {METADATA} {what}: it is damaged.')


def _places(storage: Any) -> dict[tuple[str, tuple[int, ...] | None], Place]:
    """Where each blob lies, by the item's name and, for a tensor, by where the chunk begins."""
    if not isinstance(storage, dict):
        raise ShardError(f'its {METADATA} says no files: it was not written to a file system by torch.')
    places = {}
    for key, info in storage.items():
        index, stored = _fields(key, 'MetadataIndex'), _fields(info, '_StorageInfo')
        name, offset = index.get('fqn'), index.get('offset')
        if not isinstance(name, str) or not (offset is None or _is_shape(offset)):
            _refuse('holds the place of an item without a name or an offset')
        if (name, offset) in places:
            _refuse(f'says two places of {name}')
        if transforms := stored.get('transform_descriptors'):
            is_named = isinstance(transforms, list) and all(isinstance(each, str) for each in transforms)
            by = listed(transforms) if is_named else 'by what is not named'
            raise ShardError(
                f'{name} was transformed when it was written ({by}), such as by a compression, which is not read. Save '
                'without extensions.'
            )
        file, at, length = (stored.get(key) for key in ('relative_path', 'offset', 'length'))
        if not isinstance(file, str) or not is_count(at) or not is_count(length):
            _refuse(f'does not say where {name} lies')
        if file in ('', '.', '..') or any(each in file for each in '/\\\0'):
            raise ShardError(f'{name} would lie in {file!r}, which is no file of the folder. Nothing was read of it.')
        places[name, offset] = Place(file, at, length)
    return places


def _check_files(folder: Path, places: Iterable[Place]) -> None:
    """Raises unless every place is inside of a file of the folder, and no two places share a byte."""
    by_file: dict[str, list[Place]] = {}
    for place in places:
        by_file.setdefault(place.file, []).append(place)
    missing = [file for file in by_file if not (folder / file).exists()]
    if missing:
        raise ShardError(
            f'{listed(sorted(missing))} of its {len(by_file)} files are missing. Copy the whole folder, with the files '
            'of all ranks.'
        )
    for file, own in by_file.items():
        status = (folder / file).stat()
        if not stat.S_ISREG(status.st_mode):
            raise ShardError(f'{file} is no file.')
        end = 0
        for place in sorted(own, key=lambda place: (place.offset, place.length)):
            if place.offset < end:
                _refuse(f'says that two items share bytes of {file}')
            end = place.offset + place.length
        if end > status.st_size:
            raise ShardError(f'{file} is truncated: it has {status.st_size:,} bytes, and {end:,} were written.')


def _item(name: Any, record: Any, places: Mapping[tuple[str, tuple[int, ...] | None], Place]) -> Item:
    if not isinstance(name, str):
        _refuse('has an item without a name')
    if isinstance(record, Record) and record.kind.name == 'BytesStorageMetadata':
        place = places.get((name, None))
        if place is None:
            _refuse(f'does not say where {name} lies')
        return ShardedValue(name, place)
    fields = _fields(record, 'TensorStorageMetadata')
    dtype, shape, boxes = _dtype(name, fields.get('properties')), fields.get('size'), fields.get('chunks')
    if not _is_shape(shape) or not isinstance(boxes, list):
        _refuse(f'does not say the shape of {name}')
    chunks = []
    for box in boxes:
        own = _fields(box, 'ChunkStorageMetadata')
        offsets, sizes = own.get('offsets'), own.get('sizes')
        if not _is_shape(offsets) or not _is_shape(sizes) or not len(offsets) == len(sizes) == len(shape):
            _refuse(f'has a chunk of {name} without a shape')
        if math.prod(sizes) == 0:  # a rank may have none of it
            continue
        if any(offset + size > whole for offset, size, whole in zip(offsets, sizes, shape, strict=True)):
            _refuse(f'has a chunk of {name} that reaches out of it')
        place = places.get((name, offsets))
        if place is None:
            _refuse(f'does not say where the chunk of {name} at {offsets} lies')
        if place.length < math.prod(sizes) * dtype.itemsize:
            raise ShardError(
                f'the chunk of {name} at {offsets} takes {math.prod(sizes) * dtype.itemsize:,} bytes, and {place.file} '
                f'holds {place.length:,} of it. It is damaged, or was not written by torch.save, which alone is read.'
            )
        chunks.append(Chunk(offsets, sizes, place))
    _check_cover(name, shape, chunks)
    return ShardedTensor(name, dtype, shape, tuple(chunks))


def _is_shape(value: Any) -> TypeGuard[tuple[int, ...]]:
    return _is_short(value) and all(map(is_count, value)) and math.prod(value) < _MAX_COUNT


def _dtype(name: str, properties: Any) -> torch.dtype:
    """The first of the properties, whose second one is the layout."""
    state: Any = properties.state if isinstance(properties, Record) else None
    if not isinstance(state, tuple) or len(state) < 2 or not isinstance(state[0], Global):
        _refuse(f'does not say the dtype of {name}')
    dtype, layout = vars(torch).get(state[0].name), state[1]
    if not isinstance(dtype, torch.dtype):
        _refuse(f'does not say the dtype of {name}')
    layout = layout.arguments[:1] if isinstance(layout, Record) else (f'torch.{getattr(layout, "name", "")}',)
    if layout != ('torch.strided',):
        raise ShardError(f'{name} is no dense tensor, which alone is read.')
    return dtype


def _check_cover(name: str, shape: Sequence[int], chunks: Sequence[Chunk]) -> None:
    """Raises unless every element of a tensor is in one chunk, and in one only."""
    if pair := _overlapping(chunks):
        _refuse(f'has two chunks of {name} that overlap, at {pair[0].offsets} and {pair[1].offsets}')
    held, whole = sum(math.prod(chunk.sizes) for chunk in chunks), math.prod(shape)
    if held != whole:
        raise ShardError(
            f'{name} is incomplete: its chunks hold {held:,} of {whole:,} elements. Perhaps not every rank saved its '
            'shards.'
        )


def _overlapping(chunks: Sequence[Chunk]) -> tuple[Chunk, Chunk] | None:
    """Two chunks that share an element. Sweeps along the dimension that most of them are cut along.

    A chunk is compared with all that begin before it ends, at once: a file may have thousands of them.
    """
    if len(chunks) < 2:
        return None
    if not chunks[0].sizes:  # of a single number
        return chunks[0], chunks[1]
    starts = torch.tensor([chunk.offsets for chunk in chunks], device='cpu')
    ends = starts + torch.tensor([chunk.sizes for chunk in chunks], device='cpu')
    along = max(range(starts.shape[1]), key=lambda dimension: len(starts[:, dimension].unique()))
    order = starts[:, along].argsort(stable=True)
    starts, ends = starts[order], ends[order]
    past = torch.searchsorted(starts[:, along].contiguous(), ends[:, along].contiguous())
    for place, until in enumerate(past.tolist()):
        if until == place + 1:
            continue
        others = slice(place + 1, until)
        is_shared = ((starts[others] < ends[place]) & (starts[place] < ends[others])).all(dim=1)
        if is_shared.any():
            other = place + 1 + int(is_shared.int().argmax())
            return chunks[int(order[place])], chunks[int(order[other])]
    return None


def _paths(items: Mapping[str, Item], planned: Any) -> dict[str, tuple[str | int, ...]]:
    """The keys that lead to each item. A writer that did not flatten dictionaries wrote none."""
    if not planned:
        return {name: (name,) for name in items}
    if not isinstance(planned, dict):
        _refuse('does not say how items were nested')
    paths = {}
    for name in items:
        path = planned.get(name)
        if not isinstance(path, tuple) or not path or not all(isinstance(key, str) or is_count(key) for key in path):
            _refuse(f'does not say the keys of {name}')
        if len(path) > _MAX_DEPTH:
            raise ShardError(f'{name} lies in {len(path):,} dictionaries and lists, and {_MAX_DEPTH} are read at most.')
        paths[name] = path
    return paths
