"""Snapshots of models that ranks share: the files are those of one process, and no rank holds the whole model."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import plain
import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from plain import Net
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from composer_ema import Snapshots, reconstruct
from composer_ema.model.sharding import laid_out_as, whole
from composer_ema.posthoc import snapshot_folder, tensor_files
from composer_ema.posthoc.history import read_run
from composer_ema.posthoc.snapshot_files import files_in

STEPS = 12


def snapshots_of(model: nn.Module, folder: Path) -> Snapshots:
    return Snapshots(model, folder, every=4, num_steps=STEPS, halvings=1, run_name='run')


MOMENTS = [4, 8, 10, 12]


def same_files(one: Path, other: Path) -> list[str]:
    """The files of two folders; their tensors are the same to the bit, and all else that reconstruction reads."""
    first, second = read_run(one), read_run(other)
    assert not [*first.left_out, *second.left_out]
    assert (first.is_finished, first.max_duration) == (second.is_finished, second.max_duration)
    assert (first.aliases, first.statistics, first.copied) == (second.aliases, second.statistics, second.copied)
    assert first.clocks['ba'].tolist() == second.clocks['ba'].tolist()
    assert first.clocks['sp'].tolist() == second.clocks['sp'].tolist()
    for each, its in zip(first.kept, second.kept, strict=True):
        assert (each.label, each.path.name, each.weights.tolist()) == (its.label, its.path.name, its.weights.tolist())
        named = {name: each.tensor(name) for name in each.names()}
        assert plain.same_bits(named, {name: its.tensor(name) for name in its.names()})
    return [path.name for path in files_in(one)]


def move(model: nn.Module, step: int) -> None:
    """A step that is the same to the bit however many ranks share the model."""
    generator = torch.Generator().manual_seed(step)
    with torch.no_grad():
        for _, parameter in sorted(model.named_parameters()):
            change = 0.1 * torch.randn(parameter.shape, generator=generator)
            parameter.add_(laid_out_as(change, parameter))


@pytest.fixture
def alone() -> Iterator[None]:
    """A process group of this process alone."""
    dist.init_process_group('gloo', store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def shared() -> nn.Module:
    """A small model, each layer sharded by itself."""
    model, mesh = Net(), init_device_mesh('cpu', (1,))
    for layer in (model.first, model.last, model):
        fully_shard(layer, mesh=mesh)
    return model


def weight_of(model: nn.Module) -> Tensor:
    return whole(model.get_parameter('first.weight'))


class TestOneRank:
    def test_writes_what_an_unsharded_run_does(self, alone, tmp_path):
        models = {tmp_path / 'sharded': shared(), tmp_path / 'whole': Net()}
        for folder, model in models.items():
            snapshots = snapshots_of(model, folder)
            for step in range(STEPS):
                move(model, step)
                if step == 7:  # leaves the root gathered
                    with torch.no_grad():
                        model.eval()(torch.zeros(1, 3))
                snapshots.update(num_samples=8)
            snapshots.finish()
        assert len(same_files(*models)) == 6

    def test_the_weights_are_those_of_training_while_an_average_stands_in_the_model(self, alone, tmp_path):
        model = shared()
        snapshots = snapshots_of(model, tmp_path)
        for step in range(3):
            move(model, step)
            snapshots.update()
        expected = weight_of(model)
        with snapshots.shadows['power=0.1'].swapped(model):
            assert not torch.equal(weight_of(model), expected)
            snapshots.finish()
        assert torch.equal(read_run(tmp_path).completed({})['first.weight'], expected)

    def test_a_reconstruction_goes_back_into_the_sharded_model(self, alone, tmp_path):
        model = shared()
        snapshots = Snapshots(model, tmp_path, every=1)
        for step in range(STEPS):
            move(model, step)
            snapshots.update()
        snapshots.finish()
        average = reconstruct(tmp_path, power=0.1)
        average.load_into(model)
        assert torch.equal(weight_of(model), average.state_dict['first.weight'])
        shadow = average.shadow(model)
        shadow.update(model, smoothing=0.5)
        assert torch.equal(whole(dict(shadow.named_parameters())['first.weight']), average.state_dict['first.weight'])

    def test_a_checkpoint_of_torch_holds_and_restores_them(self, alone, tmp_path):
        model = shared()
        snapshots = snapshots_of(model, tmp_path / 'snapshots')
        for step in range(5):
            move(model, step)
            snapshots.update(num_samples=8)
        dcp.save({'snapshots': snapshots.state_dict()}, checkpoint_id=tmp_path / 'checkpoint')
        resumed = snapshots_of(shared(), tmp_path / 'snapshots')
        state = {'snapshots': resumed.state_dict()}
        dcp.load(state, checkpoint_id=tmp_path / 'checkpoint')
        resumed.load_state_dict(state['snapshots'])
        one, other = snapshots.state_dict(), resumed.state_dict()
        assert one['writer'] == other['writer']
        assert (one['num_steps'], one['num_samples']) == (other['num_steps'], other['num_samples']) == (5, 40)
        averages = [each.shadows['power=0.1'].state_dict()['parameters'] for each in (snapshots, resumed)]
        assert torch.equal(whole(averages[0]['first.weight']), whole(averages[1]['first.weight']))

    def test_tensors_are_gathered_one_at_a_time_also_when_the_disk_is_full(self, alone, tmp_path, monkeypatch):
        model = shared()
        snapshots = snapshots_of(model, tmp_path)
        move(model, 0)
        snapshots.update()
        gathered: list[tuple[int, ...]] = []

        alive: list[weakref.ref[Tensor]] = []

        def counted(tensor: Tensor) -> Tensor:
            assert not [each for each in alive if each() is not None]
            found = whole(tensor).clone()
            gathered.append(tuple(found.shape))
            alive[:] = [weakref.ref(found)]
            return found

        def full(*arguments: Any) -> None:
            _, entries, _ = arguments
            for _, entry in tensor_files.in_order(entries)[:3]:
                entry.values()
            raise OSError('No space left on device')

        monkeypatch.setattr(tensor_files, 'whole', counted)
        for step in (1, 2):
            move(model, step)
            snapshots.update()
        move(model, 3)
        monkeypatch.setattr(snapshot_folder, 'write', full)
        with pytest.raises(OSError, match='No space left'):
            snapshots.update()
        of_failed = gathered[:]
        gathered.clear()
        monkeypatch.setattr(snapshot_folder, 'write', tensor_files.write)
        for step in range(4, 8):
            move(model, step)
            snapshots.update()
        assert len(of_failed) == 9  # four of each average, and the counter
        assert gathered == of_failed * 2  # that of step 5, which is due again, and that of step 8
        assert [len(each.weights) for each in read_run(tmp_path).kept] == [1, 5, 5, 8, 8]

    def test_of_a_replica_under_ddp_rank_0_writes(self, alone, tmp_path, monkeypatch):
        model = DistributedDataParallel(Net())
        for rank in (1, 0):
            monkeypatch.setattr(dist, 'get_rank', lambda *_, rank=rank: rank)
            snapshots = snapshots_of(model, tmp_path)
            for step in range(5):
                move(model, step)
                snapshots.update()
            assert bool(files_in(tmp_path)) is (rank == 0)
