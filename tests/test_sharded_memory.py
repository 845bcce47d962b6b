"""What an average of a sharded model adds to each process: a share of the model, at its start and in a save, too."""

from __future__ import annotations

import ctypes
import gc
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from sharded import local, ranks
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from composer_ema import ShadowModel

WIDTH, LAYERS, RANKS = 2880, 6, 4
MODEL = 4 * LAYERS * WIDTH * (WIDTH + 1)  # bytes: 50 million floats

pytestmark = pytest.mark.slow


def resident() -> int:
    """Bytes of memory that this process has now."""
    return _status('VmRSS')


def give_back() -> None:
    """Gives the system what the allocator keeps of freed memory, which hides what is allocated after."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)


def forget_peak() -> None:
    """Makes :func:`peak` count from now on; see proc(5)."""
    Path('/proc/self/clear_refs').write_text('5')


def peak() -> int:
    """The most bytes that this process has had since."""
    return _status('VmHWM')


def _status(key: str) -> int:
    lines = Path('/proc/self/status').read_text().splitlines()
    (line,) = [line for line in lines if line.startswith(f'{key}:')]
    return 1024 * int(line.split()[1])


def measure(count: int, folder: str) -> dict[str, float]:
    """What each act of an average adds to this process, in models: what stays, and the peak above what was there."""
    with torch.device('meta'):
        model = nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(LAYERS)))
    mesh = init_device_mesh('cpu', (count,))
    for layer in model:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh).to_empty(device='cpu')
    for parameter in model.parameters():
        nn.init.normal_(local(parameter), std=0.01)
    with torch.no_grad():
        model(torch.ones(1, WIDTH))
    seen = {'parameters': sum(local(parameter).nbytes for parameter in model.parameters()) / MODEL}

    def note(act: str) -> None:
        nonlocal start
        seen[f'{act}: peak'] = (peak() - start) / MODEL
        give_back()
        seen[f'{act}: stays'] = (resident() - start) / MODEL
        start = resident()
        forget_peak()

    give_back()
    start = resident()
    forget_peak()
    shadow = ShadowModel(model)
    note('start')
    for _ in range(3):
        shadow.update(model, smoothing=0.9)
    note('update')
    with shadow.swapped(model):
        pass
    note('swap')
    dcp.save({'average': shadow.state_dict()}, checkpoint_id=folder)
    note('save')
    seen['shadow'] = sum(local(tensor).nbytes for tensor in shadow.parameters()) / MODEL
    return seen


def test_an_average_adds_a_share_of_the_model_to_each_process(tmp_path):
    if not Path('/proc/self/clear_refs').exists():
        pytest.skip('the peak of a process is read from Linux')
    for rank in ranks(RANKS)(measure, RANKS, str(tmp_path)):
        assert rank['parameters'] == pytest.approx(1 / RANKS, rel=0.01)
        assert rank['shadow'] == rank['parameters']
        assert sum(rank[f'{act}: stays'] for act in ('start', 'update', 'swap', 'save')) <= 0.3
        assert rank['start: stays'] >= 0.2  # else the measurement sees nothing
        assert rank['start: peak'] <= 0.75
        assert rank['update: peak'] <= 0.05  # nothing is allocated
        assert rank['swap: peak'] <= 0.3  # the stash
        assert rank['save: peak'] <= 0.75
    sizes = [file.stat().st_size for file in tmp_path.glob('*.distcp')]
    assert len(sizes) == RANKS
    assert all(size == pytest.approx(MODEL / RANKS, rel=0.05) for size in sizes)
