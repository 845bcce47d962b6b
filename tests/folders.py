"""Sharded checkpoints of several ranks, written by torch in one process, and by nobody who means well."""

from __future__ import annotations

import math
import pickle
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, Metadata, MetadataIndex

#: Where a chunk begins, and its shape.
Box = tuple[tuple[int, ...], tuple[int, ...]]


def save(state: Mapping[str, Any], folder: Path, **options: Any) -> Path:
    """Saves with torch.distributed.checkpoint as the only process."""
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')  # that there is one process
        dcp.save(dict(state), checkpoint_id=folder, **options)
    return folder


def rows(ranks: int) -> Callable[[Tensor], list[Box]]:
    """Cuts as FSDP does: along the first dimension, the last ranks perhaps with less or nothing."""

    def cut(tensor: Tensor) -> list[Box]:
        whole = tuple(tensor.shape)
        if not whole:
            return [((), ())]
        size = math.ceil(whole[0] / ranks)
        starts = [min(rank * size, whole[0]) for rank in range(ranks)]
        zeros = (0,) * (len(whole) - 1)
        return [((start, *zeros), (min(size, whole[0] - start), *whole[1:])) for start in starts]

    return cut


def save_sharded(state: Mapping[str, Any], folder: Path, cut: Callable[[Tensor], list[Box]] | int = 2) -> Path:
    """Saves what several ranks would: every tensor in the boxes of ``cut``, the box of each rank in its file.

    A box without elements is written by none, as in torch. All else is rank 0's.
    """
    cut = rows(cut) if isinstance(cut, int) else cut
    save(state, folder)
    whole = metadata_of(folder)
    flat: dict[str, Any] = {}
    for name, entry in whole.state_dict_metadata.items():
        if hasattr(entry, 'size'):
            flat[name] = torch.empty(entry.size, dtype=entry.properties.dtype)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        dcp.load(flat, checkpoint_id=folder, planner=dcp.DefaultLoadPlanner(flatten_state_dict=False))
    boxes = {name: cut(tensor) for name, tensor in flat.items()}
    for entry_name in flat:
        entry = whole.state_dict_metadata[entry_name]
        entry.chunks = [ChunkStorageMetadata(torch.Size(at), torch.Size(size)) for at, size in boxes[entry_name]]
        whole.storage_data = {index: info for index, info in whole.storage_data.items() if index.fqn != entry_name}
    for rank in range(max(map(len, boxes.values()))):
        parts = {
            name: part_of(tensor, boxes[name][rank]).clone()
            for name, tensor in flat.items()
            if rank < len(boxes[name]) and math.prod(boxes[name][rank][1])
        }
        own = folder / f'rank{rank}'
        save(parts, own)
        (own / '__0_0.distcp').rename(folder / f'__{rank + 1}_0.distcp')
        for index, info in metadata_of(own).storage_data.items():
            info.relative_path = f'__{rank + 1}_0.distcp'
            whole.storage_data[MetadataIndex(index.fqn, boxes[index.fqn][rank][0])] = info
        (own / '.metadata').unlink()
        own.rmdir()
    write_metadata(folder, whole)
    return folder


def part_of(tensor: Tensor, box: Box) -> Tensor:
    for dimension, (start, size) in enumerate(zip(*box, strict=True)):
        tensor = tensor.narrow(dimension, start, size)
    return tensor


def metadata_of(folder: Path) -> Metadata:
    return pickle.loads((folder / '.metadata').read_bytes())


def write_metadata(folder: Path, metadata: Metadata) -> None:
    (folder / '.metadata').write_bytes(pickle.dumps(metadata))


def place_of(metadata: Metadata, name: str, offset: Sequence[int] | None = None) -> Any:
    """Where a blob lies: the object that says so, to be changed."""
    for index, info in metadata.storage_data.items():
        if index.fqn == name and (offset is None or tuple(index.offset) == tuple(offset)):
            return info
    raise KeyError(name)
