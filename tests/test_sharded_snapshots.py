"""Snapshots of models that ranks share: the files are those of one process, and no rank holds the whole model."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import plain
import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from sharded import Ranks, mesh_of_one, ranks, tensors_of, whole
from sharded_models import CASES, Run
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from composer_ema import Snapshots, reconstruct
from composer_ema.model.sharding import laid_out_as
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
    with mesh_of_one():
        yield


def mlp() -> nn.Module:
    torch.manual_seed(0)
    return CASES['BatchNorm'].whole()


def shared(count: int = 1, case: str = 'BatchNorm') -> nn.Module:
    torch.manual_seed(0)
    return CASES[case].share(CASES[case].whole(), count)


def weight_of(model: nn.Module) -> Tensor:
    return whole(model.get_parameter('up.weight'))


class TestOneRank:
    def test_writes_what_an_unsharded_run_does(self, alone, tmp_path):
        models = {tmp_path / 'sharded': shared(), tmp_path / 'whole': mlp()}
        for folder, model in models.items():
            snapshots = snapshots_of(model, folder)
            for step in range(STEPS):
                move(model, step)
                if step == 7:  # leaves the root gathered
                    with torch.no_grad():
                        model.eval()(torch.zeros(1, 6))
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
        assert torch.equal(read_run(tmp_path).completed({})['up.weight'], expected)

    def test_a_reconstruction_goes_back_into_the_sharded_model(self, alone, tmp_path):
        model = shared()
        snapshots = Snapshots(model, tmp_path, every=1)
        for step in range(STEPS):
            move(model, step)
            snapshots.update()
        snapshots.finish()
        average = reconstruct(tmp_path, power=0.1)
        average.load_into(model)
        assert torch.equal(weight_of(model), average.state_dict['up.weight'])
        shadow = average.shadow(model)
        shadow.update(model, smoothing=0.5)
        assert torch.equal(whole(dict(shadow.named_parameters())['up.weight']), average.state_dict['up.weight'])

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
        assert torch.equal(whole(averages[0]['up.weight']), whole(averages[1]['up.weight']))

    def test_tensors_are_gathered_one_at_a_time_also_when_the_disk_is_full(self, alone, tmp_path, monkeypatch):
        model = shared()
        snapshots = snapshots_of(model, tmp_path)
        move(model, 0)
        snapshots.update()
        gathered: list[tuple[int, ...]] = []

        alive: list[weakref.ref[Tensor]] = []

        def counted(tensor: Tensor) -> Tensor:
            assert not [each for each in alive if each() is not None]
            found = whole(tensor)
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
        assert len(of_failed) > 10
        assert gathered == of_failed * 2  # that of step 5, which is due again, and that of step 8
        assert [len(each.weights) for each in read_run(tmp_path).kept] == [1, 5, 5, 8, 8]

    def test_of_a_replica_under_ddp_rank_0_writes(self, alone, tmp_path, monkeypatch):
        model = DistributedDataParallel(mlp())
        for rank in (1, 0):
            monkeypatch.setattr(dist, 'get_rank', lambda *_, rank=rank: rank)
            snapshots = snapshots_of(model, tmp_path)
            for step in range(5):
                move(model, step)
                snapshots.update()
            assert bool(files_in(tmp_path)) is (rank == 0)


def write_both(case: str, count: int, folder: Path) -> None:
    """Trains a shared model with snapshots, and on rank 0 keeps those of a whole model that is given its weights."""
    run = Run(CASES[case], count)
    own = tensors_of(run.twin)
    for name, parameter in tensors_of(run.model).items():
        own[name].requires_grad_(parameter.requires_grad)
    of_shared = snapshots_of(run.model, folder / 'shared')
    of_whole = snapshots_of(run.twin, folder / 'whole') if dist.get_rank() == 0 else None
    for step in range(STEPS):
        run.step(step)
        if step in (3, 6):  # leaves the root gathered
            run.evaluate()
        of_shared.update(num_samples=10)
        run.fill_twin()
        if of_whole is not None:
            of_whole.update(num_samples=10)
    of_shared.finish()
    if of_whole is not None:
        of_whole.finish()


@pytest.mark.slow
@pytest.mark.parametrize(
    ('case', 'count'), [(name, count) for count in (2, 4) for name in CASES if count in CASES[name].ranks]
)
def test_ranks_write_what_one_process_does(tmp_path, case, count):
    ranks(count)(write_both, case, count, tmp_path)
    names = same_files(tmp_path / 'shared', tmp_path / 'whole')
    assert names == [
        *(f'averages-{moment:08d}.safetensors' for moment in MOMENTS),
        'weights-00000001.safetensors',
        'weights-00000012.safetensors',
    ]
    one, other = (reconstruct(tmp_path / name, half_life='0.3dur', anyway=True) for name in ('shared', 'whole'))
    assert one.predicted_error == other.predicted_error
    assert plain.same_bits(dict(one.state_dict), dict(other.state_dict))


def go_on(folder: Path, first: int, saves_at: int, last: int) -> None:
    """Trains from the checkpoint of step ``first``, if it is not the start, to ``last``, and leaves one on the way."""
    model = shared(dist.get_world_size(), 'uneven')
    snapshots = snapshots_of(model, folder / 'parts')

    def state() -> dict[str, Any]:
        return {'model': model.state_dict(), 'snapshots': snapshots.state_dict()}

    if first:
        loaded = state()
        dcp.load(loaded, checkpoint_id=folder / f'checkpoint{first}')
        model.load_state_dict(loaded['model'])
        snapshots.load_state_dict(loaded['snapshots'])
    for step in range(first, last):
        move(model, step)
        snapshots.update(num_samples=8)
        if step + 1 == saves_at:
            dcp.save(state(), checkpoint_id=folder / f'checkpoint{saves_at}')
    if last == STEPS:
        snapshots.finish()


def keep_whole(folder: Path) -> None:
    """The same run by one process, uninterrupted."""
    torch.manual_seed(0)
    model = CASES['uneven'].whole()
    snapshots = snapshots_of(model, folder)
    for step in range(STEPS):
        move(model, step)
        snapshots.update(num_samples=8)
    snapshots.finish()


@pytest.mark.slow
def test_a_run_resumed_on_other_numbers_of_ranks_leaves_what_an_uninterrupted_one_of_one_process_does(alone, tmp_path):
    keep_whole(tmp_path / 'parts_whole')
    ranks(2)(go_on, tmp_path, 0, 5, 9)  # the file of step 8 lies after the checkpoint
    ranks(4)(go_on, tmp_path, 5, 9, 10)
    go_on(tmp_path, 9, STEPS, STEPS)
    same_files(tmp_path / 'parts', tmp_path / 'parts_whole')


def die_in_the_middle(victim: int, folder: Path) -> None:
    """Loses a rank without a word while the file of step 8 is written."""
    count = 0

    def last_words(tensor: Tensor) -> Tensor:
        nonlocal count
        count += 1
        if count == 5 and dist.get_rank() == victim:
            os.kill(os.getpid(), signal.SIGKILL)
        return whole(tensor)

    go_on(folder, 0, 6, 7)
    tensor_files.whole = last_words
    with contextlib.suppress(RuntimeError):
        go_on(folder, 6, 0, 8)
    os._exit(1)


@pytest.mark.slow
@pytest.mark.parametrize('victim', [0, 1])
def test_a_rank_that_is_killed_leaves_a_readable_folder_from_which_others_go_on(tmp_path, victim):
    with pytest.raises(AssertionError, match='died'):
        Ranks(2)(die_in_the_middle, victim, tmp_path)
    history = read_run(tmp_path / 'parts')
    assert [len(each.weights) for each in history.kept] == [1, 4, 4]
    assert not history.left_out
    unfinished = [path.name for path in (tmp_path / 'parts').iterdir() if path.name.startswith('.')]
    assert len(unfinished) == (1 if victim == 0 else 0)
    ranks(4)(go_on, tmp_path, 6, 0, STEPS)
    keep_whole(tmp_path / 'parts_whole')
    same_files(tmp_path / 'parts', tmp_path / 'parts_whole')
    assert not [path.name for path in (tmp_path / 'parts').iterdir() if path.name.startswith('.')]


def fail_to_write(folder: Path) -> str:
    """Runs out of disk on rank 0 at step 4, and goes on."""
    model = shared(2)
    snapshots = snapshots_of(model, folder)
    for step in range(3):
        move(model, step)
        snapshots.update()
    written = snapshot_folder.write
    snapshot_folder.write = _no_space
    try:
        snapshots.update()
    except (OSError, RuntimeError) as error:
        message = f'{type(error).__name__}: {error}'
    else:
        message = 'no error'
    finally:
        snapshot_folder.write = written
    snapshots.update()
    return message


def _no_space(*arguments: Any) -> None:
    raise OSError('No space left on device')


@pytest.mark.slow
def test_what_rank_0_cannot_write_stops_all_ranks_in_step(tmp_path):
    messages = ranks(2)(fail_to_write, tmp_path)
    assert messages == ['OSError: No space left on device', 'RuntimeError: on rank 0: No space left on device']
    assert [len(each.weights) for each in read_run(tmp_path).kept] == [1, 5, 5]


def keep_another(folder: Path, name: str) -> str:
    """One step of a run that finds the files of another one."""
    snapshots = Snapshots(shared(2), folder, every=1, run_name=name)
    try:
        snapshots.update()
    except ValueError as error:
        return f'{type(error).__name__}: {error}'
    return snapshots.state_dict()['writer']


@pytest.mark.slow
def test_all_ranks_have_one_identity_and_stop_at_a_folder_of_another_run(tmp_path):
    one, other = ranks(2)(keep_another, tmp_path, 'one')
    assert one == other
    for message in ranks(2)(keep_another, tmp_path, 'two'):
        assert message.startswith(f'ArgumentError: {tmp_path} holds 1 snapshot of another run: one (')


def keep_two_models(folder: Path) -> str:
    """Every rank shares a model with itself alone, as the stages of a pipeline do."""
    mesh = init_device_mesh('cpu', (2, 1), mesh_dim_names=('stage', 'share'))['share']
    model = nn.Linear(3, 2 + dist.get_rank())
    fully_shard(model, mesh=mesh)
    try:
        Snapshots(model, folder, every=1).update()
    except RuntimeError as error:
        return str(error)
    return 'no error'


@pytest.mark.slow
def test_ranks_that_hold_different_models_are_refused_before_anything_is_written(tmp_path):
    for message in ranks(2)(keep_two_models, tmp_path):
        assert message.startswith('the ranks 1 hold other tensors than rank 0')
    assert not list(tmp_path.iterdir())


def replicate(folder: Path) -> None:
    """Both ranks of DDP keep snapshots, and then rank 0 alone."""
    model = DistributedDataParallel(mlp())
    for name in ('of all', 'of one'):
        if name == 'of all' or dist.get_rank() == 0:
            snapshots = snapshots_of(model, folder / name)
            for step in range(STEPS):
                move(model, step)
                snapshots.update()
            snapshots.finish()


@pytest.mark.slow
def test_of_replicas_under_ddp_rank_0_writes_whether_or_not_the_others_call(tmp_path):
    ranks(2)(replicate, tmp_path)
    for name in ('of all', 'of one'):
        assert len(files_in(tmp_path / name)) == 6
        assert not read_run(tmp_path / name).left_out


LAYERS, WIDTH = 20, 1024
_M_MMAP_THRESHOLD = -3


def peaks(folder: Path) -> list[float]:
    """The memory that each of eleven updates adds to this rank at its peak, in models. Every third writes a file."""
    ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, 2**16)  # every larger piece of memory goes back when it is freed
    model = nn.Sequential(*(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(LAYERS)))
    mesh = init_device_mesh('cpu', (dist.get_world_size(),))
    for layer in model:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    snapshots = Snapshots(model, folder, every=3)
    found = []
    for _ in range(11):
        before = _memory('VmRSS')
        Path('/proc/self/clear_refs').write_text('5')  # the peak starts anew
        snapshots.update()
        found.append((_memory('VmHWM') - before) / (LAYERS * WIDTH * WIDTH * 4))
    return found


def _memory(of: str) -> int:
    (line,) = (line for line in Path('/proc/self/status').read_text().splitlines() if line.startswith(of))
    return int(line.split()[1]) * 1024


@pytest.mark.slow
def test_on_four_ranks_a_file_adds_the_memory_of_a_few_tensors(tmp_path):
    of_files = [[round(each[update], 3) for update in (2, 5, 8)] for each in ranks(4)(peaks, tmp_path)]
    print('peak memory added by a file, by rank, in models:', of_files)
    # A tensor, its buffer in the gather, and what the allocators keep: .1 alone, up to .3 on a busy machine. A whole
    # model would be .75 and more.
    assert 0 < max(map(max, of_files)) < 0.5
