"""What a process pays for its part of an average, of a model that several processes share with FSDP2.

An update of a part talks to nobody. So one process at a time makes its update while the others wait at a barrier: each
has a core for itself, however few cores the machine has. On a CPU its time is that of the thread, not of the clock.
"""

from __future__ import annotations

import random
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.multiprocessing as mp
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard

from benchmarks import common, memory
from composer_ema import ShadowModel

_WEIGHT = 1 - common.SMOOTHING
LIMIT, WHOLE, SHARDED = 'limit', 'ShadowModel.update, not sharded', 'ShadowModel.update, sharded'
_COLUMNS = 1024
_SAVES = 3


@dataclass(frozen=True)
class Found:
    """What one process found in a mesh.

    Attributes:
        size: number of processes of the mesh.
        tensors: of the model.
        floats: of the model, in all processes together.
        ms: for each call, its time in each round.
        lasting: bytes that the average and its first update leave allocated.
        peak: the most that they had allocated at one time.
        saved: bytes of the process's file in a sharded checkpoint of the average.
        metadata: bytes of that checkpoint's `.metadata`.
        save_s: shortest time of a save by the clock, in seconds.
    """

    size: int
    tensors: int
    floats: int
    ms: dict[str, list[float]]
    lasting: int
    peak: int
    saved: int
    metadata: int
    save_s: float


def measure(
    sizes: Sequence[int], device: torch.device, *, tensors: int, floats: int, rounds: int, seconds: float
) -> dict[int, list[Found]]:
    """What each process found, by the size of the mesh. Starts as many processes as the largest mesh has.

    Args:
        sizes: numbers of processes that share the model.
        device: cpu, with gloo, or cuda, with NCCL and a device for each process.
        tensors: number of weights, of 1024 columns each.
        floats: of all weights; rounded.
        rounds: at most as many.
        seconds: no round is begun after these.
    """
    with tempfile.TemporaryDirectory() as folder:
        arguments = (tuple(sizes), device.type, tensors, floats, rounds, seconds, folder)
        mp.start_processes(_work, args=arguments, nprocs=max(sizes), start_method='spawn')
        every = torch.load(Path(folder, 'found.pt'), weights_only=True)
    return {size: [Found(**each) for each in every if each['size'] == size] for size in sizes}


def rows(found: Mapping[int, Sequence[Found]]) -> list[dict[str, Any]]:
    """For each mesh and call the time of the slowest process, and how many times faster that is than in the smallest.

    Memory is that of the average in the process that has most, as a share of the model.
    """
    alone, made = found[min(found)], []
    for size, processes in found.items():
        model_bytes = processes[0].floats * 4
        for call, rounds in processes[0].ms.items():
            ms = _slowest(processes, call)
            row = {
                'key': f'ranks {size} / {call}',
                'sweep': 'ranks',
                'size': size,
                'floats': processes[0].floats,
                'call': call,
                'rounds': len(rounds),
                'ms': ms,
                'ratio': ms / _slowest(processes, LIMIT),
                'faster': _slowest(alone, call) / ms,
            }
            if call == SHARDED:
                row['lasting'] = max(each.lasting for each in processes) / model_bytes
                row['peak'] = max(each.peak for each in processes) / model_bytes
            made.append(row)
    return made


def _slowest(processes: Sequence[Found], call: str) -> float:
    """The median over the rounds of the process that takes longest."""
    return max(median(each.ms[call]) for each in processes)


# The projection


@dataclass(frozen=True)
class Rates:
    """What was measured in one mesh, for each parameter, process and tensor.

    Attributes:
        update_bytes_per_s: memory that an update reads and writes in a second.
        lasting: bytes that the average keeps for each parameter of the process.
        peak: the most of them while the average was built and first updated.
        saved: bytes of a file for each parameter of the process.
        save_bytes_per_s: of one process, while all of the mesh write to one disk.
        metadata: bytes of `.metadata` for each tensor and process.
    """

    update_bytes_per_s: float
    lasting: float
    peak: float
    saved: float
    save_bytes_per_s: float
    metadata: float

    @classmethod
    def of(cls, processes: Sequence[Found]) -> Rates:
        """Those of the slowest process, and of the one that has most."""
        first = processes[0]
        own = first.floats / first.size
        saved = max(each.saved for each in processes)
        return cls(
            update_bytes_per_s=own * _UPDATE_BYTES / (_slowest(processes, SHARDED) / 1e3),
            lasting=max(each.lasting for each in processes) / own,
            peak=max(each.peak for each in processes) / own,
            saved=saved / own,
            save_bytes_per_s=saved / max(each.save_s for each in processes),
            metadata=first.metadata / (first.tensors * first.size),
        )


# The weight and the average are read, the average is written, in float32.
_UPDATE_BYTES = 12
# Of a decoder of 70 G parameters: 80 layers of 9 tensors, the embedding, the last norm and the head.
_TENSORS = 80 * 9 + 3
_LARGEST_TENSOR = 8192 * 28672
# Bytes a second, by the data sheet of an H100 (SXM) and by assumption.
_H100_MEMORY, _STORAGE = 3.35e12, 100e9


def projection(rates: Rates, *, processes: int, parameters: float) -> list[dict[str, Any]]:
    """Rows of what was measured, and then of what that comes to for more processes and a larger model.

    Args:
        rates: measured.
        processes: that share the larger model evenly.
        parameters: of the larger model, in float32, as its average is.

    Returns:
        Rows of `kind`, which is `'measured'` or `'computed'`, `what`, `value`, `unit` and `how`.
    """
    own, moved = parameters / processes, parameters / processes * _UPDATE_BYTES
    each = 'for each parameter of the process'
    return [
        {'kind': kind, 'what': what, 'value': value, 'unit': unit, 'how': how}
        for kind, what, value, unit, how in (
            ('measured', 'memory bandwidth of an update', rates.update_bytes_per_s / 1e9, 'GB/s', '12 bytes ' + each),
            ('measured', 'memory of the average', rates.lasting, 'bytes', each),
            ('measured', 'peak at its start', rates.peak, 'bytes', each),
            ('measured', 'file of a save', rates.saved, 'bytes', each),
            ('measured', 'speed of a save', rates.save_bytes_per_s / 1e6, 'MB/s', 'per process, all on one disk'),
            ('measured', '.metadata of a save', rates.metadata, 'bytes', 'for each tensor and process'),
            ('computed', 'parameters of a process', own / 1e6, 'M', f'{parameters:,.0f} / {processes:,}'),
            ('computed', 'memory of the average', own * rates.lasting / 1e6, 'MB', 'measured bytes'),
            ('computed', 'further memory while it is lent', own * 4 / 1e6, 'MB', 'the stash, 4 bytes ' + each),
            ('computed', 'memory that an update moves', moved / 1e6, 'MB', '12 bytes ' + each),
            ('computed', 'sent by an update or a swap', 0.0, 'bytes', 'neither has a collective call'),
            ('computed', 'an update', moved / rates.update_bytes_per_s * 1e3, 'ms', 'measured bandwidth'),
            ('computed', 'an update on an H100', moved / _H100_MEMORY * 1e3, 'ms', 'data sheet, 3.35 TB/s'),
            ('computed', 'received if it were gathered', parameters * 4 / 1e9, 'GB', 'by each process, each time'),
            ('computed', 'file of a process in a save', own * rates.saved / 1e6, 'MB', 'measured bytes'),
            ('computed', 'all files of a save', parameters * rates.saved / 1e9, 'GB', 'measured bytes'),
            ('computed', '.metadata of a save', _TENSORS * processes * rates.metadata / 1e6, 'MB', 'of 723 tensors'),
            ('computed', 'a save, a disk each', own * rates.saved / rates.save_bytes_per_s, 's', 'measured speed'),
            ('computed', 'a save, shared storage', parameters * rates.saved / _STORAGE, 's', 'assumed: 100 GB/s'),
            ('computed', 'gathered at a time in a full save', _LARGEST_TENSOR * 4 / 1e9, 'GB', 'the largest tensor'),
        )
    ]  # fmt: skip


# In the processes


def _work(
    rank: int,
    sizes: Sequence[int],
    device_type: str,
    tensors: int,
    floats: int,
    rounds: int,
    seconds: float,
    folder: str,
) -> None:
    torch.set_num_threads(1)
    warnings.filterwarnings('ignore', message='TypedStorage is deprecated')  # by torch's own saving
    device = torch.device(device_type, rank) if device_type == 'cuda' else torch.device(device_type)
    if device_type == 'cuda':
        torch.cuda.set_device(device)
    backend = 'nccl' if device_type == 'cuda' else 'gloo'
    dist.init_process_group(backend, init_method=f'file://{folder}/store', rank=rank, world_size=max(sizes))
    # Every process takes part in making every mesh, also those it is not in.
    meshes = {size: DeviceMesh(device_type, list(range(size))) for size in sizes}
    sides = {
        size: _Side(mesh, device, tensors, floats, Path(folder, str(size)))
        for size, mesh in meshes.items()
        if rank < size
    }
    _take_turns(rank, sizes, sides, rounds, seconds)
    mine = [asdict(side.found()) for side in sides.values()]
    every: list[Any] = [None] * max(sizes)
    dist.all_gather_object(every, mine)
    if rank == 0:
        torch.save([found for each in every for found in each], Path(folder, 'found.pt'))
    dist.barrier()
    dist.destroy_process_group()


def _take_turns(rank: int, sizes: Sequence[int], sides: Mapping[int, _Side], rounds: int, seconds: float) -> None:
    """In each round, each call of each process of each mesh once, in another order each round."""
    order = random.Random(0)
    turns = [(size, turn, call) for size in sizes for turn in range(size) for call in (LIMIT, WHOLE, SHARDED)]
    began = time.monotonic()
    with common.no_garbage_collection():
        for _ in range(rounds):
            order.shuffle(turns)
            for size, turn, call in turns:
                dist.barrier()
                if rank == turn:
                    sides[size].take(call)
            is_late: list[Any] = [time.monotonic() - began > seconds]
            dist.broadcast_object_list(is_late)
            if is_late[0]:
                break


class _Side:
    """One mesh in one of its processes: the sharded model, and as many floats whole."""

    def __init__(self, mesh: DeviceMesh, device: torch.device, tensors: int, floats: int, folder: Path) -> None:
        self._size, self._tensors, self._device = mesh.size(), tensors, device
        rows = round(floats / tensors / _COLUMNS)
        self._floats = tensors * rows * _COLUMNS
        sharded = _model(tensors, rows)
        fully_shard(sharded, mesh=mesh)
        sharded.to_empty(device=device)
        whole = _model(tensors, rows // mesh.size()).to_empty(device=device)
        for parameter in [*sharded.parameters(), *whole.parameters()]:
            nn.init.ones_(parameter)
        held: list[ShadowModel] = []
        self._lasting, self._peak = memory.allocated(lambda: held.append(_updated(sharded)), device)
        [shadow], apart = held, ShadowModel(whole)
        flat, source = (torch.ones(self._floats // mesh.size(), device=device) for _ in range(2))
        self._calls: dict[str, Callable[[], object]] = {
            LIMIT: lambda: flat.lerp_(source, _WEIGHT),
            WHOLE: lambda: apart.update(whole, weight=_WEIGHT),
            SHARDED: lambda: shadow.update(sharded, weight=_WEIGHT),
        }
        for call in self._calls.values():
            call()
        self._ms: dict[str, list[float]] = {name: [] for name in self._calls}
        folders = [folder / str(number) for number in range(_SAVES)]
        self._save_s = min(_seconds_of_a_save(shadow, mesh, each) for each in folders)
        self._saved = (folders[0] / f'__{mesh.get_rank()}_0.distcp').stat().st_size
        self._metadata = (folders[0] / '.metadata').stat().st_size

    def take(self, call: str) -> None:
        """Times a call once."""
        began = self._clock()
        self._calls[call]()
        self._ms[call].append((self._clock() - began) * 1e3)

    def found(self) -> Found:
        return Found(
            size=self._size,
            tensors=self._tensors,
            floats=self._floats,
            ms=self._ms,
            lasting=self._lasting,
            peak=self._peak,
            saved=self._saved,
            metadata=self._metadata,
            save_s=self._save_s,
        )

    def _clock(self) -> float:
        if self._device.type == 'cuda':
            torch.cuda.synchronize()
            return time.perf_counter()
        return time.thread_time()


def _seconds_of_a_save(shadow: ShadowModel, mesh: DeviceMesh, folder: Path) -> float:
    began = time.perf_counter()
    dcp.save({'average': shadow.state_dict()}, checkpoint_id=folder, process_group=mesh.get_group())
    return time.perf_counter() - began


def _model(tensors: int, rows: int) -> nn.Module:
    """Weights that take no memory yet."""
    with torch.device('meta'):
        return nn.Sequential(*(nn.Linear(_COLUMNS, rows, bias=False) for _ in range(tensors)))


def _updated(model: nn.Module) -> ShadowModel:
    shadow = ShadowModel(model)
    shadow.update(model, weight=_WEIGHT)
    return shadow
