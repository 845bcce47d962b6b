"""Averages in the checkpoints of a sharded model: out of an algorithm's state, and back, each process its own share.

Composer saves the states of algorithms as one pickled item of rank 0, in which a shared tensor would be rank 0's part
for all ranks. So the tensors are saved beside the states, where torch.distributed.checkpoint looks: it writes every
process's part and lays it out anew for as many processes as load.

What a load asks for must be in the checkpoint, or Composer's load fails. So it asks for no average, and those that the
algorithm's state lists are loaded after it, at AFTER_LOAD.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dist_cp
from composer.core import State
from composer.utils import dist, maybe_create_object_store_from_uri, parse_uri
from composer.utils.checkpoint import DistCPObjectStoreReader, FileSystemReaderWithValidation
from composer.utils.file_helpers import extract_path_from_symlink
from composer.utils.misc import partial_format
from torch import Tensor
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from composer_ema.checkpoints import sharded_format
from composer_ema.model.sharding import local, wrapped
from composer_ema.shadow.state import SECTIONS
from composer_ema.trainer import calls
from composer_ema.trainer.safe_loading import reading_safely


def will_be_sharded(state: State) -> bool:
    """Whether Composer will shard the model of the run, and has not done so yet."""
    return state.fsdp_config is not None and not state.fsdp_enabled


def set_apart(saved: dict[str, Any], names: set[str]) -> None:
    """Moves the tensors of averages out of the algorithms' states, to where each process's part of them is saved.

    Args:
        saved: what ``State.state_dict`` returned, for a sharded checkpoint. Changed.
        names: of the algorithms that keep averages, by which their states are found.
    """
    apart: dict[str, Any] = {}
    states: list[tuple[str, Any]] = []
    for name, state in saved.get('algorithms', ()):
        plain = state
        if name in names:
            plain, tensors = sharded_format.split(state)
            apart |= {name: tensors} if tensors else {}
        states.append((name, plain))
    if apart:
        saved['algorithms'], saved[sharded_format.AVERAGES] = states, apart


class Outline(dict[str, Any]):
    """The state of an algorithm as a sharded checkpoint has it, with tensors that have no memory yet.

    They have the shapes and dtypes of those that are saved, so that all of them can be checked before one is read.

    Args:
        state: as it was loaded, with the names of its tensors.
        name: of the algorithm's class.
        reader: of the folder.
        what: the state, in the words of an error.

    Raises:
        ValueError: the folder lacks a tensor that the state lists, or the list is none.
    """

    def __init__(self, state: Mapping[str, Any], name: str, reader: dist_cp.StorageReader, what: str) -> None:
        self._name, self._reader = name, reader
        with reading_safely():
            metadata = reader.read_metadata()
        super().__init__(sharded_format.joined(state, _outlines(metadata, name), what))

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
                section: {name: _place_for(outline, like.get(name)) for name, outline in average[section].items()}
                for section in SECTIONS
                if section in average
            }
        root = {'state': {sharded_format.AVERAGES: {self._name: read}}}
        with torch.no_grad(), reading_safely():
            dist_cp.load(root, storage_reader=self._reader)
        return {label: {**average, **read[sources[label]]} for label, average in averages.items()}


def _outlines(metadata: Metadata, algorithm: str) -> dict[str, dict[str, dict[str, Tensor]]]:
    """The averages of an algorithm in a folder by label, section and name, as tensors without memory."""
    outlines: dict[str, dict[str, dict[str, Tensor]]] = {}
    for key, path in (metadata.planner_data or {}).items():
        kind = metadata.state_dict_metadata.get(key)
        is_ours = path[:3] == ('state', sharded_format.AVERAGES, algorithm) and len(path) == 6
        if is_ours and isinstance(kind, TensorStorageMetadata):
            label, section, name = path[3:]
            outline = torch.zeros((), dtype=kind.properties.dtype).expand(kind.size)
            outlines.setdefault(label, {}).setdefault(section, {})[name] = outline
    return outlines


def _place_for(outline: Tensor, like: Tensor | None) -> Tensor:
    """Memory for this process's part of a tensor of the outline's shape and dtype."""
    if like is None or like.shape != outline.shape:
        return torch.empty(outline.shape, dtype=outline.dtype)
    return wrapped(torch.empty_like(local(like), dtype=outline.dtype), like)


@contextmanager
def opened(state: State) -> Iterator[dist_cp.StorageReader]:
    """A reader of the folder that the run was loaded from, wherever that is. A collective call.

    Raises:
        ValueError: the run was not loaded from a folder.
    """
    if state.load_path is None:
        raise ValueError(
            'the loaded state is that of a sharded checkpoint, and the run does not know its folder. Pass the folder '
            'to the Trainer as load_path.'
        )
    load_path = partial_format(state.load_path, run_name=state.run_name)
    store = _object_store(state, load_path)
    _, _, path = parse_uri(load_path)
    if store is None:
        yield FileSystemReaderWithValidation(path)
        return
    with tempfile.TemporaryDirectory() as own_folder:
        if path.endswith('.symlink'):
            path = extract_path_from_symlink(path, object_store=store)
        of_node = dist.all_gather_object(own_folder)[dist.get_global_rank() - dist.get_local_rank()]
        yield DistCPObjectStoreReader(path, str(Path(of_node) / 'checkpoint'), store, state.device_mesh)
        dist.barrier()  # the folder is that of the first rank on this node


def _object_store(state: State, load_path: str) -> Any:
    """Where the Trainer that is being built has loaded from; None for the local disk."""
    for names in calls.of_trainer(state):
        if 'load_object_store' in names:
            return names['load_object_store']
    return maybe_create_object_store_from_uri(load_path)
