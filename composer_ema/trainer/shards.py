"""Averages in the checkpoints of a sharded model: out of an algorithm's state, and back, each process its own share.

Composer saves the states of algorithms as one pickled item of rank 0, in which a shared tensor would be rank 0's part
for all ranks. So the tensors are saved beside the states, where torch.distributed.checkpoint looks: it writes every
process's part and lays it out anew for as many processes as load.

What a load asks for must be in the checkpoint, or Composer's load fails. So it asks for no average, and those that the
algorithm's state lists are loaded after it, at AFTER_LOAD.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch.distributed.checkpoint as dist_cp
from composer.core import State
from composer.utils import dist, maybe_create_object_store_from_uri, parse_uri
from composer.utils.checkpoint import DistCPObjectStoreReader, FileSystemReaderWithValidation
from composer.utils.file_helpers import extract_path_from_symlink
from composer.utils.misc import partial_format

from composer_ema.checkpoints import sharded_format
from composer_ema.trainer import calls
from composer_ema.trainer.safe_loading import reading_safely


def will_be_sharded(state: State) -> bool:
    """Whether Composer will shard the model of the run, and has not done so yet."""
    return state.fsdp_config is not None and not state.fsdp_enabled


def place(name: str) -> tuple[str, ...]:
    """The keys under which a checkpoint of Composer has the tensors of an algorithm, called ``name``."""
    return 'state', sharded_format.AVERAGES, name


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


@contextmanager
def opened(state: State) -> Iterator[dist_cp.StorageReader]:
    """A reader of the folder that the run was loaded from, wherever that is. A collective call.

    Whatever torch reads as a checkpoint while it is open is read without executing anything in it.

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
        with reading_safely():
            yield FileSystemReaderWithValidation(path)
        return
    with tempfile.TemporaryDirectory() as own_folder:
        if path.endswith('.symlink'):
            path = extract_path_from_symlink(path, object_store=store)
        of_node = dist.all_gather_object(own_folder)[dist.get_global_rank() - dist.get_local_rank()]
        with reading_safely():
            yield DistCPObjectStoreReader(path, str(Path(of_node) / 'checkpoint'), store, state.device_mesh)
        dist.barrier()  # the folder is that of the first rank on this node


def _object_store(state: State, load_path: str) -> Any:
    """Where the Trainer that is being built has loaded from; None for the local disk."""
    for names in calls.of_trainer(state):
        if 'load_object_store' in names:
            return names['load_object_store']
    return maybe_create_object_store_from_uri(load_path)
