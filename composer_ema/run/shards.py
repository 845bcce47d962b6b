"""Averages in a folder of torch.distributed.checkpoint, read back by each process as its own shards.

The format is that of :mod:`composer_ema.checkpoints.sharded_format`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed.checkpoint as dist_cp
from torch import Tensor
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from composer_ema.checkpoints import sharded_format
from composer_ema.model.sharding import local, wrapped
from composer_ema.shadow.state import SECTIONS


class Outline(dict[str, Any]):
    """The state of averages as a sharded checkpoint has it, with tensors that have no memory yet.

    They have the shapes and dtypes of those that are saved, so that all of them can be checked before one is read.

    Args:
        state: as it was loaded, with the names of its tensors.
        place: the keys under which the folder has the tensors.
        reader: of the folder.
        what: the state, in the words of an error.

    Raises:
        ValueError: the folder lacks a tensor that the state lists, or the list is none.
    """

    def __init__(
        self, state: Mapping[str, Any], place: tuple[str, ...], reader: dist_cp.StorageReader, what: str
    ) -> None:
        self._place, self._reader = place, reader
        super().__init__(sharded_format.joined(state, _outlines(reader.read_metadata(), place), what))

    def read(
        self, averages: Mapping[str, Mapping[str, Any]], sources: Mapping[str, str], like: Mapping[str, Tensor]
    ) -> dict[str, dict[str, Any]]:
        """The states of averages with their values, each process its own part. A collective call.

        Args:
            averages: label to state, of outlined tensors.
            sources: each of these labels to the one in the checkpoint.
            like: tensors of the model by name, shared among processes as what is read shall be.
        """
        read: dict[str, dict[str, dict[str, Tensor]]] = {}
        for label, average in averages.items():
            read[sources[label]] = {
                section: {name: _memory_for(outline, like.get(name)) for name, outline in average[section].items()}
                for section in SECTIONS
                if section in average
            }
        root: dict[str, Any] = read
        for key in reversed(self._place):
            root = {key: root}
        with torch.no_grad():
            dist_cp.load(root, storage_reader=self._reader)
        return {label: {**average, **read[sources[label]]} for label, average in averages.items()}


def _outlines(metadata: Metadata, place: tuple[str, ...]) -> dict[str, dict[str, dict[str, Tensor]]]:
    """The averages at ``place`` in a folder by label, section and name, as tensors without memory."""
    outlines: dict[str, dict[str, dict[str, Tensor]]] = {}
    for key, path in (metadata.planner_data or {}).items():
        kind = metadata.state_dict_metadata.get(key)
        is_ours = path[: len(place)] == place and len(path) == len(place) + 3
        if is_ours and isinstance(kind, TensorStorageMetadata):
            label, section, name = path[len(place) :]
            outline = torch.zeros((), dtype=kind.properties.dtype).expand(kind.size)
            outlines.setdefault(label, {}).setdefault(section, {})[name] = outline
    return outlines


def _memory_for(outline: Tensor, like: Tensor | None) -> Tensor:
    """Memory for this process's part of a tensor of the outline's shape and dtype."""
    if like is None or like.shape != outline.shape:
        return torch.empty(outline.shape, dtype=outline.dtype)
    return wrapped(torch.empty_like(local(like), dtype=outline.dtype), like)
