"""EMAOptimizer, compute_ema and update_bn on a model that several processes share."""

from __future__ import annotations

import contextlib
import copy
import io
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from plain import same_bits
from sharded import Silence, averages_of, bits_of, difference, gathered, ranks, tensors_of
from sharded_models import CASES, FEATURES, Run
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from composer_ema import EMAOptimizer, ShadowModel, compute_ema, gather_state_dict, update_bn

pytestmark = pytest.mark.slow

FOLLOWED = {
    'one': {'decay': 0.5, 'compensated': True},
    'several': {'half_life': {'short': 2, 'long': 20}, 'average': {'mean': 'equal'}},
}
BATCHES, INTERRUPTED = 5, 3


def build(name: str, count: int, followed: str) -> tuple[Run, EMAOptimizer]:
    run = Run(CASES[name], count, is_one_batch=True)
    trainable = [p for p in run.model.parameters() if p.requires_grad]
    inner = torch.optim.Adam(trainable, lr=0.02, foreach=False)
    run.optimizer = optimizer = EMAOptimizer(inner, model=run.model, **FOLLOWED[followed])
    return run, optimizer


def train(run: Run, batches: range) -> None:
    for index in batches:
        run.step(index)


def content(run: Run, optimizer: EMAOptimizer) -> dict[str, Any]:
    run.reshard()
    return {
        'weights': gathered(tensors_of(run.model)),
        'averages': {label: gathered(averages_of(shadow)) for label, shadow in optimizer.shadows.items()},
        'steps': optimizer.num_steps,
    }


def interrupt(name: str, count: int, followed: str, how: str, path: str) -> dict[str, Any]:
    """Trains, saves on the way and goes on; what model and averages hold then, and what they held when saved."""
    run, optimizer = build(name, count, followed)
    group = dist.new_group()
    train(run, range(INTERRUPTED))
    run.evaluate()  # leaves the root whole
    options = options_of(how)
    state = {
        'optimizer': gather_state_dict(optimizer.state_dict())
        if how == 'gathered'
        else get_optimizer_state_dict(run.model, optimizer, options=options),
        'model': get_model_state_dict(run.model, options=model_options(how)),
    }
    saved = content(run, optimizer)
    writing = None
    if how == 'asynchronous':
        writing = dcp.async_save(state, checkpoint_id=path, process_group=group)
    elif how in ('sharded', 'flat'):
        dcp.save(state, checkpoint_id=path)
    elif dist.get_rank() == 0:
        torch.save(state, path)
    train(run, range(INTERRUPTED, BATCHES))
    if writing is not None:
        writing.result()
    return {'saved': saved, 'end': content(run, optimizer)}


def resume(name: str, count: int, followed: str, how: str, path: str) -> dict[str, Any]:
    """Loads into another model of other weights, and goes on."""
    run, optimizer = build(name, count, followed)
    with torch.no_grad():
        for parameter in run.model.parameters():
            parameter.add_(1.0)
    options = options_of(how)
    if how in ('full', 'rank 0', 'gathered'):
        state = {'model': {}, 'optimizer': {}}
        if how != 'rank 0' or dist.get_rank() == 0:
            state = torch.load(path, weights_only=True)
    else:
        state = {
            'optimizer': get_optimizer_state_dict(run.model, optimizer, options=options),
            'model': get_model_state_dict(run.model),
        }
        dcp.load(state, checkpoint_id=path)
    run.evaluate()
    run.reshard()
    set_model_state_dict(run.model, state['model'], options=model_options(how))
    if how == 'gathered':
        optimizer.load_state_dict(state['optimizer'])
    else:
        set_optimizer_state_dict(run.model, optimizer, state['optimizer'], options=options)
    loaded = content(run, optimizer)
    train(run, range(INTERRUPTED, BATCHES))
    return {'saved': loaded, 'end': content(run, optimizer)}


def options_of(how: str) -> StateDictOptions:
    return StateDictOptions(
        flatten_optimizer_state_dict=how == 'flat',
        full_state_dict=how in ('full', 'rank 0'),
        cpu_offload=how == 'rank 0',
        broadcast_from_rank0=how == 'rank 0',
    )


def model_options(how: str) -> StateDictOptions:
    return StateDictOptions(full_state_dict=how in ('full', 'rank 0', 'gathered'), broadcast_from_rank0=how == 'rank 0')


JOURNEYS = [
    *(('uneven', 2, 'uneven', count, 'one', how) for count in (1, 2, 4) for how in ('sharded', 'full', 'rank 0')),
    *(('empty', 4, 'empty', count, 'several', how) for count in (2, 4) for how in ('flat', 'asynchronous', 'rank 0')),
    ('BatchNorm', 2, 'BatchNorm', 1, 'one', 'flat'),
    ('hybrid', 4, 'hybrid', 4, 'one', 'sharded'),
    ('uneven', 2, 'uneven', 4, 'several', 'gathered'),
    ('columns and rows', 2, 'columns and rows', 2, 'several', 'flat'),
    ('columns and rows in FSDP2', 4, 'even', 2, 'one', 'full'),
]


@pytest.mark.parametrize(('first', 'saved_by', 'second', 'loaded_by', 'followed', 'how'), JOURNEYS)
def test_torchs_checkpoints_take_the_averages_to_any_number_of_ranks(
    first, saved_by, second, loaded_by, followed, how, tmp_path
):
    path = str(tmp_path / 'checkpoint')
    before = ranks(saved_by)(interrupt, first, saved_by, followed, how, path)[0]
    for rank in ranks(loaded_by)(resume, second, loaded_by, followed, how, path):
        for label, average in before['saved']['averages'].items():
            assert same_bits(rank['saved']['averages'][label], average)
        assert rank['saved']['steps'] == INTERRUPTED
        assert rank['end']['steps'] == BATCHES
        averages = (rank['end']['averages'], before['end']['averages'])
        for label in before['end']['averages']:
            got, expected = (each[label] for each in averages)
            if (first, saved_by) == (second, loaded_by):
                assert same_bits(got, expected)
            # Adam's steps are as long for a gradient of rounding errors as for any other.
            assert max(difference(got[name], tensor) for name, tensor in expected.items()) < 1e-2


def phantom(count: int) -> dict[str, Any]:
    """One row of weights, which rank 0 holds: all other ranks see no gradient at any time."""
    model = fully_shard(nn.Linear(3, 1, bias=False), mesh=init_device_mesh('cpu', (count,)))
    optimizer = EMAOptimizer(torch.optim.Adam(model.parameters(), lr=0.1, foreach=False), model=model, decay=0.5)
    before = bits_of(tensors_of(model)), bits_of(averages_of(optimizer.shadow))
    get_optimizer_state_dict(model, optimizer)
    is_moved = before != (bits_of(tensors_of(model)), bits_of(averages_of(optimizer.shadow)))
    steps = optimizer.num_steps
    optimizer = EMAOptimizer(torch.optim.Adam(model.parameters(), lr=0.0, foreach=False), model=model, decay=0.5)
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    return {'moved': is_moved, 'steps': steps, 'after a real step': optimizer.num_steps}


def test_all_ranks_agree_on_which_step_is_a_phantom():
    for rank in ranks(2)(phantom, 2):
        assert rank == {'moved': False, 'steps': 0, 'after a real step': 1}


def follow_alone(count: int) -> dict[str, Any]:
    """Rank 0 alone updates, swaps and saves what it holds, and nobody is asked."""
    run, optimizer = build('uneven', count, 'several')
    run.step(0)
    shadow = ShadowModel(run.model)
    other = Run(CASES['uneven'], count)
    before = bits_of(tensors_of(run.model))
    with Silence():
        for _ in range(2):
            compute_ema(run.model, other.model, smoothing=0.5)
            shadow.update(run.model, smoothing=0.5)
        if dist.get_rank() == 0:
            with optimizer.swap_ema_weights():
                pass
            optimizer.state_dict()
            shadow.averaged_state_dict(run.model)
    return {'kept': bits_of(tensors_of(run.model)) == before, 'other': gathered(tensors_of(other.model))}


def test_averaging_lending_and_saving_talk_to_nobody():
    for rank in ranks(2)(follow_alone, 2):
        assert rank['kept']


def moved(name: str, count: int) -> float:
    """How far compute_ema between two shared models is from that between the two in one piece."""
    run = Run(CASES[name], count)
    run.step(0)
    run.fill_twin()
    average = Run(CASES[name], count)
    for _ in range(2):
        run.evaluate()
        compute_ema(run.model, average.model, smoothing=0.75)
        compute_ema(run.twin, average.twin, smoothing=0.75)
    average.reshard()
    got, expected = gathered(tensors_of(average.model)), tensors_of(average.twin)
    return max(difference(got[name], tensor) for name, tensor in expected.items())


@pytest.mark.parametrize('name', ['uneven', 'empty', 'tied', 'ignored', 'BatchNorm', 'columns and rows'])
def test_compute_ema_moves_shards_as_it_moves_the_whole(name):
    assert max(ranks(2)(moved, name, 2)) <= 3e-7


def statistics(count: int, batches: int) -> dict[str, Any]:
    """update_bn on a shared model and its average, each rank with batches of its own; and on one that sees them all."""
    run, optimizer = build('BatchNorm', count, 'one')
    train(run, range(2))
    run.reshard()
    before = bits_of(tensors_of(run.model))
    average = run.whole_with(gathered(averages_of(optimizer.shadow)))
    update_bn(run.model, loader(dist.get_rank(), batches), shadow=optimizer.shadow)
    kept = before == bits_of(tensors_of(run.model))
    torch.optim.swa_utils.update_bn([batch for rank in range(count) for batch in loader(rank, batches)], average)
    own, expected = averages_of(optimizer.shadow), tensors_of(average)
    apart = {name: difference(own[name], expected[name]) for name in own if 'running' in name}
    with contextlib.suppress(KeyError):
        update_bn(run.model, loader(dist.get_rank(), batches), forward=_raising)
    back = before == bits_of(tensors_of(run.model))
    refused = []
    for arguments in ({'synchronize': False}, {'num_batches': 1 + dist.get_rank()}):
        try:
            update_bn(run.model, loader(dist.get_rank(), batches), **arguments)
        except ValueError as error:
            refused.append(str(error))
    train(run, range(2, 3))
    return {'kept': kept, 'apart': apart, 'back': back, 'refused': refused}


def loader(rank: int, count: int) -> list[Tensor]:
    return [torch.randn(6, FEATURES, generator=torch.Generator().manual_seed(10 * rank + i)) for i in range(count)]


def _raising(model: nn.Module, batch: Tensor) -> None:
    model(batch)
    raise KeyError('after a forward')


def test_update_bn_sees_the_batches_of_all_ranks_and_leaves_the_shards_as_they_were():
    for rank in ranks(2)(statistics, 2, 3):
        assert rank['kept']
        assert rank['back']
        assert len(rank['apart']) == 2
        assert max(rank['apart'].values()) <= 1e-6
        first, second = rank['refused']
        assert 'synchronize=False cannot take effect' in first
        assert 'a sharded model needs one from each' in second


def doors(name: str, count: int) -> dict[str, Any]:
    """A shared average and the same in one piece, put into one another's models."""
    run = Run(CASES[name], count)
    shadow, plain = ShadowModel(run.model), ShadowModel(run.twin)
    run.step(0)
    run.fill_twin()
    for each, model in ((shadow, run.model), (plain, run.twin)):
        each.update(model, smoothing=0.5)
    expected = {name: tensor.clone() for name, tensor in plain.averaged_state_dict(run.twin).items()}
    torch.manual_seed(0)
    whole = CASES[name].whole()
    shadow.copy_to(whole)
    reshared = Run(CASES[name], count)
    plain.copy_to(reshared.model)
    reshared.reshard()
    file = io.BytesIO()
    torch.save(shadow.state_dict(), file)
    file.seek(0)
    other = ShadowModel(reshared.model)
    other.load_state_dict(torch.load(file, weights_only=True))
    twin = copy.deepcopy(shadow)
    twin.update(run.model, smoothing=0.5)
    plain.update(run.twin, smoothing=0.5)
    found = {
        'state dict': gathered(shadow.averaged_state_dict(run.model)),
        'state dict for a whole model': shadow.averaged_state_dict(whole),
        'whole model': whole.state_dict(),
        'shared model': gathered(dict(reshared.model.state_dict())),
        "torch's AveragedModel": shadow.to_averaged_model(whole).module.state_dict(),
        'loaded': gathered(other.averaged_state_dict(reshared.model)),
    }
    plainly = any(isinstance(t, DTensor) for t in found['state dict for a whole model'].values())
    apart = {kind: max(difference(state[key], expected[key]) for key in expected) for kind, state in found.items()}
    after = gathered(averages_of(twin))
    apart['copy'] = max(difference(after[key], tensor) for key, tensor in averages_of(plain).items())
    return {**apart, 'has shards': float(plainly)}


@pytest.mark.parametrize('name', ['uneven', 'empty', 'columns and rows'])
def test_averages_go_from_shared_models_into_whole_ones_and_back(name):
    for rank in ranks(2)(doors, name, 2):
        assert max(rank.values()) <= 3e-7, rank
