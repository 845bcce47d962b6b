"""Averages of sharded models in Composer runs over gloo: training, evaluation, and checkpoints of every kind."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from sharded import difference, mesh_of_one, ranks
from sharded_runs import BATCH, BATCHES, SAMPLES, equal, make_model, memory, path_of, run
from torch import Tensor
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.state_dict_loader import _EmptyStateDictLoadPlanner, _load_state_dict
from toy import make_data

pytestmark = pytest.mark.slow

Seen = list[dict[str, Any]]
#: A checkpoint in the middle of the first epoch.
MIDDLE = 2
KINDS = ('sharded', 'full')


def start(count: int, *arguments: Any, **keywords: Any) -> Seen:
    """Runs :func:`sharded_runs.run` on so many ranks at once, and returns what each has seen."""
    if count > 1:
        return ranks(count)(functools.partial(run, *arguments, **keywords))
    with pytest.MonkeyPatch.context() as patch, mesh_of_one():
        patch.setattr(os, 'environ', dict(os.environ))
        return [run(*arguments, **keywords)]


@pytest.fixture(scope='module')
def finished(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., tuple[Path, Seen]]:
    """Uninterrupted runs by number of ranks, averages and kind of sharding, with their checkpoints; each run once."""

    @functools.cache
    def finish(count: int, averages: str, sharding: str | None) -> tuple[Path, Seen]:
        folder = tmp_path_factory.mktemp('runs')
        return folder, start(
            count, averages, sharding, note=True, inside=str(folder / 'inside'), save_folder=str(folder),
            save_interval='1ba',
        )  # fmt: skip

    return finish


def in_file(path: str) -> dict[str, Any]:
    """What a checkpoint has of the model, in one process."""
    if not os.path.isdir(path):
        return torch.load(path, weights_only=False)['state']['model']
    read: dict[str, Any] = {}
    _load_state_dict(read, storage_reader=FileSystemReader(path), planner=_EmptyStateDictLoadPlanner(), no_dist=True)
    return read['state']['model']


# Training and evaluation

WHOLE = [(count, 'several', sharding) for count in (2, 4) for sharding in KINDS] + [(2, 'both', 'monolith')]


@pytest.mark.parametrize(('count', 'averages', 'sharding'), WHOLE)
def test_training_has_the_same_bits_without_averages_evaluations_and_checkpoints(finished, count, averages, sharding):
    bare = start(count, 'none', sharding, eval_interval=0)
    for with_average, without in zip(finished(count, averages, sharding)[1], bare, strict=True):
        assert len(without['batches']) == BATCHES
        assert with_average['batches'] == without['batches']


@pytest.mark.parametrize('count', [2, 4])
def test_averages_follow_the_formula_and_lie_where_the_parameters_lie(finished, count):
    first, *others = finished(count, 'several', 'sharded')[1]
    assert len(first['layout']) == 4
    assert all(first['layout'].values())
    expected = {name: weight.double() for name, weight in first['noted'][1]['weights'].items()}
    keeps = 2**-0.5
    for batch in range(2, BATCHES + 1):
        noted = first['noted'][batch]
        for name, weight in noted['weights'].items():
            expected[name] = expected[name] * keeps + weight.double() * (1 - keeps)
            assert difference(noted['averages']['short'][name], expected[name]) <= 3e-7
    for other in others:
        assert equal(other['averages']['short'], first['averages']['short'])


@pytest.mark.parametrize('count', [2, 4])
def test_evaluation_sees_the_average(finished, count):
    model = make_model()
    for rank, seen in enumerate(finished(count, 'several', 'sharded')[1]):
        batches = [batch for index, batch in enumerate(evaluation_data(count)) if index % count == rank]
        assert seen['evaluated'].keys() == {2, 4, 6}
        for moment, outputs in seen['evaluated'].items():
            model.load_state_dict(seen['noted'][moment]['averages']['short'])
            other = make_model()
            other.load_state_dict(seen['noted'][moment]['weights'])
            assert len(outputs) == len(batches) > 0
            for images, output in zip(batches, outputs, strict=True):
                with torch.no_grad():
                    assert difference(output, model.module(images)) <= 1e-6
                    assert difference(output, other.module(images)) > 1e-3


def evaluation_data(count: int) -> list[Tensor]:
    """The images of each batch of each rank, batch by batch."""
    loader: Any = make_data(SAMPLES, SAMPLES, seed=2).dataloader
    images = loader.dataset.tensors[0]
    size = BATCH // count
    of_rank = [images[rank::count] for rank in range(count)]
    return [part[start : start + size] for start in range(0, SAMPLES // count, size) for part in of_rank]


def test_batchnorm_is_refreshed_as_under_ddp():
    sharded, replicated = (start(2, 'swa', sharding, model={'batchnorm': True}) for sharding in ('sharded', None))
    for rank, other in zip(sharded, replicated, strict=True):
        assert rank['warnings'] == []
        assert 'module.2.running_var' in rank['averages']['swa']
        for name, tensor in rank['averages']['swa'].items():
            assert difference(tensor, other['averages']['swa'][name]) <= 1e-6


# Checkpoints


@pytest.mark.parametrize(('count', 'averages', 'sharding'), [*WHOLE, (2, 'both', 'sharded')])
def test_checkpoints_hold_the_training_weights_whatever_stands_in_the_model(finished, count, averages, sharding):
    folder, seen = finished(count, averages, sharding)
    for batch in (2, 4, 6):
        weights = seen[0]['noted'][batch]['weights']
        assert equal(in_file(path_of(folder, batch, sharding)), weights)
        assert equal(in_file(path_of(folder / 'inside', batch, sharding)), weights)


@pytest.mark.parametrize('loading', [1, 2, 4])
@pytest.mark.parametrize('saving', [2, 4])
@pytest.mark.parametrize('sharding', KINDS)
def test_a_run_goes_on_with_any_number_of_ranks(finished, sharding, saving, loading):
    folder, seen = finished(saving, 'several', sharding)
    [whole, *_] = seen
    went_on = start(loading, 'several', sharding, load_path=path_of(folder, MIDDLE, sharding))
    for rank in went_on:
        assert rank['warnings'] == []
        assert_loaded(rank, whole['noted'][MIDDLE])
        assert_ends_alike(rank, whole, is_exact=saving == loading)


@pytest.mark.parametrize('saving', [2, 4])
def test_a_full_checkpoint_goes_on_unsharded(finished, saving):
    folder, [whole, *_] = finished(saving, 'several', 'full')
    [alone] = start(1, 'several', None, load_path=path_of(folder, MIDDLE, 'full'))
    assert_loaded(alone, whole['noted'][MIDDLE])
    assert_ends_alike(alone, whole, is_exact=False)


@pytest.mark.parametrize(('before', 'after'), [('full', None), (None, 'full'), (None, 'monolith')])
def test_a_full_checkpoint_goes_on_under_ddp_and_one_of_ddp_sharded(finished, before, after):
    folder, [whole, *_] = finished(2, 'several', before)
    for rank in start(2, 'several', after, load_path=path_of(folder, MIDDLE, before)):
        assert rank['warnings'] == []
        assert_loaded(rank, whole['noted'][MIDDLE])
        assert_ends_alike(rank, whole, is_exact=None not in (before, after))


def test_a_checkpoint_of_one_unsharded_process_goes_on_sharded(finished):
    folder, [whole] = finished(1, 'several', None)
    for rank in start(2, 'several', 'full', load_path=path_of(folder, MIDDLE, None)):
        assert_loaded(rank, whole['noted'][MIDDLE])
        assert_ends_alike(rank, whole, is_exact=False)


@pytest.mark.parametrize(
    ('averages', 'sharding', 'batch'),
    [
        ('both', 'sharded', 4),
        ('both', 'monolith', 1),
        ('compensated', 'sharded', 5),
        ('compensated', 'full', 3),
        ('function', 'sharded', 1),
        ('late', 'sharded', 1),
        ('several', 'by hand', 2),
    ],
)
def test_a_run_goes_on_to_the_same_bits(finished, averages, sharding, batch):
    folder, seen = finished(2, averages, sharding)
    went_on = start(2, averages, sharding, load_path=path_of(folder, batch, sharding))
    for rank, whole in zip(went_on, seen, strict=True):
        assert_loaded(rank, whole['noted'][batch])
        assert_ends_alike(rank, whole, is_exact=True)
        assert rank['batches'] == whole['batches'][batch:]


@pytest.mark.parametrize(('averages', 'sharding'), [('both', 'sharded'), ('several', 'full'), ('both', 'monolith')])
def test_a_checkpoint_saved_within_an_evaluation_goes_on_to_the_same_bits(finished, averages, sharding):
    folder, seen = finished(2, averages, sharding)
    went_on = start(2, averages, sharding, load_path=path_of(folder / 'inside', MIDDLE, sharding))
    for rank, whole in zip(went_on, seen, strict=True):
        assert_loaded(rank, whole['noted'][MIDDLE])
        assert_ends_alike(rank, whole, is_exact=True)


@pytest.mark.parametrize('sharding', KINDS)
def test_autoresume_goes_on_to_the_same_bits(finished, tmp_path, sharding):
    _, seen = finished(2, 'several', sharding)
    common: dict[str, Any] = {'save_folder': str(tmp_path), 'save_interval': '1ba', 'run_name': 'again'}
    stopped = start(2, 'several', sharding, stop=3, autoresume=True, **common)
    assert [rank['time'] for rank in stopped] == [3, 3]
    for rank, whole in zip(start(2, 'several', sharding, autoresume=True, **common), seen, strict=True):
        assert rank['warnings'] == []
        assert_loaded(rank, whole['noted'][3])
        assert_ends_alike(rank, whole, is_exact=True)


@pytest.mark.parametrize('by', ['address', 'store'])
def test_a_folder_in_an_object_store_goes_on_to_the_same_bits(finished, by):
    folder, seen = finished(2, 'several', 'sharded')
    name = Path(path_of(folder, MIDDLE, 'sharded')).name
    where = (
        {'load_path': f'folder://bucket{folder}/{name}'}
        if by == 'address'
        else {'load_path': name, 'store': str(folder)}
    )
    for rank, whole in zip(start(2, 'several', 'sharded', **where), seen, strict=True):
        assert rank['warnings'] == []
        assert_loaded(rank, whole['noted'][MIDDLE])
        assert_ends_alike(rank, whole, is_exact=True)


def test_a_sharded_run_uploads_all_that_a_load_needs(finished, tmp_path):
    _, seen = finished(2, 'several', 'sharded')
    uploaded, kept = tmp_path / 'uploaded', tmp_path / 'kept'
    start(2, 'several', 'sharded', uploads=str(uploaded), save_folder=str(kept), save_interval='1ba')
    [name] = {path.parent.name for path in uploaded.rglob(f'ep*-ba{MIDDLE}/.metadata')}
    [parent] = {path.parent.parent for path in uploaded.rglob(f'ep*-ba{MIDDLE}/.metadata')}
    for rank, whole in zip(start(2, 'several', 'sharded', load_path=name, store=str(parent)), seen, strict=True):
        assert_loaded(rank, whole['noted'][MIDDLE])
        assert_ends_alike(rank, whole, is_exact=True)


def assert_loaded(rank: dict[str, Any], saved: dict[str, Any]) -> None:
    """What was loaded is what was saved, to the bit."""
    loaded = rank['loaded']
    assert equal(loaded['weights'], saved['weights'])
    for label, counters in saved['counters'].items():
        assert loaded['counters'][label] == counters or not counters['num_updates']
    assert loaded['averages'].keys() == saved['averages'].keys()
    for label, average in saved['averages'].items():
        assert equal(loaded['averages'][label], average)


def assert_ends_alike(rank: dict[str, Any], whole: dict[str, Any], *, is_exact: bool) -> None:
    """A run that went on has ended as the uninterrupted one, to the bit or to rounding errors."""
    assert rank['time'] == whole['time'] == BATCHES
    assert rank['counters'] == whole['counters']
    pairs = [(rank['weights'], whole['weights'])]
    pairs += [(rank['averages'][label], average) for label, average in whole['averages'].items()]
    for one, other in pairs:
        if is_exact:
            assert equal(one, other)
        else:
            assert one.keys() == other.keys()
            assert max(difference(tensor, other[name]) for name, tensor in one.items()) <= 1e-6


# What is not in a checkpoint, or is not wanted


@pytest.mark.parametrize('sharding', KINDS)
def test_a_checkpoint_without_an_average_starts_anew_with_one_warning(finished, sharding):
    folder, seen = finished(2, 'none', sharding)
    for rank, whole in zip(start(2, 'ema', sharding, load_path=path_of(folder, MIDDLE, sharding)), seen, strict=True):
        assert rank['warnings'] == ['EMA is not in the state_dict. Its state will not be restored.']
        assert rank['counters']['ema']['num_updates'] == BATCHES - MIDDLE
        assert rank['batches'] == whole['batches'][MIDDLE:]


@pytest.mark.parametrize(('averages', 'sharding'), [('both', 'sharded'), ('several', 'full'), ('both', 'monolith')])
def test_a_checkpoint_with_averages_loads_where_none_are_kept(finished, averages, sharding):
    folder, seen = finished(2, averages, sharding)
    for rank, whole in zip(start(2, 'none', sharding, load_path=path_of(folder, MIDDLE, sharding)), seen, strict=True):
        assert rank['warnings'] == []
        assert rank['batches'] == whole['batches'][MIDDLE:]


def test_several_averages_continue_from_one_and_one_from_several(finished):
    folder, [whole, *_] = finished(2, 'compensated', 'sharded')
    for rank in start(2, 'several', load_path=path_of(folder, MIDDLE, 'sharded'), fit=False):
        [said] = rank['warnings']
        assert "'short' (half_life=2ba) continues from 'ema'" in said
        saved = whole['noted'][MIDDLE]['averages']['ema']
        for label in ('short', 'long', 'power'):
            for name, average in rank['loaded']['averages'][label].items():
                assert torch.equal(average, saved[name].float())
    folder, [whole, *_] = finished(2, 'several', 'sharded')
    for rank in start(2, 'ema', load_path=path_of(folder, MIDDLE, 'sharded'), fit=False):
        [said] = rank['warnings']
        assert "'ema' (half_life=2ba) continues from 'short'" in said
        assert equal(rank['loaded']['averages']['ema'], whole['noted'][MIDDLE]['averages']['short'])


@pytest.mark.parametrize(
    'asked', [{'load_ignore_keys': ['state/algorithms']}, {'load_weights_only': True}], ids=['ignored', 'weights only']
)
def test_what_the_user_does_not_load_starts_anew(finished, asked):
    folder, [whole, *_] = finished(2, 'several', 'sharded')
    for rank in start(2, 'several', load_path=path_of(folder, MIDDLE, 'sharded'), fit=False, **asked):
        assert rank['warnings'] == []
        assert equal(rank['loaded']['weights'], whole['noted'][MIDDLE]['weights'])
        assert {each['num_updates'] for each in rank['loaded']['counters'].values()} == {0}


def test_a_model_of_other_shapes_is_refused_by_name(finished):
    folder, _ = finished(2, 'several', 'sharded')
    with pytest.raises(AssertionError, match=r'(?s)ValueError.*module\.3\.weight.*\(3, 5\)'):
        start(
            2, 'several', load_path=path_of(folder, MIDDLE, 'sharded'), model={'wide': 7},
            load_ignore_keys=['state/model', 'state/optimizers'],
        )  # fmt: skip


# What FSDP2Config can ask for


@pytest.mark.parametrize(
    ('count', 'asked'),
    [
        (2, {'reshard_after_forward': False}),
        (4, {'reshard_after_forward': 2}),
        (2, {'mixed_precision': {'param_dtype': 'bf16', 'reduce_dtype': 'fp32'}}),  # as in amp_bf16, which needs a GPU
        (2, {'mixed_precision': 'FULL'}),
        (2, {'activation_checkpointing': True}),
    ],
    ids=['not resharded', 'resharded in part', 'mixed precision', 'full precision', 'activation checkpointing'],
)
def test_whatever_a_configuration_asks_for_training_is_the_same_and_goes_on(tmp_path, count, asked):
    # torch 2.7 has no BatchNorm on a CPU whose weights are bfloat16 and whose statistics are not.
    has_batchnorm = 'param_dtype' not in asked.get('mixed_precision', ())
    more: dict[str, Any] = {'fsdp': asked, 'model': {'batchnorm': has_batchnorm}}
    seen = start(count, 'both', save_folder=str(tmp_path), save_interval='1ba', **more)
    bare = start(count, 'none', eval_interval=0, **more)
    went_on = start(count, 'both', load_path=path_of(tmp_path, MIDDLE, 'sharded'), **more)
    for whole, without, rank in zip(seen, bare, went_on, strict=True):
        assert whole['batches'] == without['batches']
        assert all(whole['layout'].values())
        # BatchNorm statistics are each rank's own, and a checkpoint keeps those of rank 0.
        assert list(map(parameters_in, rank['batches'])) == list(map(parameters_in, whole['batches'][MIDDLE:]))
        for label, average in whole['averages'].items():
            assert equal(rank['averages'][label], average)


def parameters_in(weights: dict[str, bytes]) -> dict[str, bytes]:
    return {name: value for name, value in weights.items() if 'running' not in name}


# Memory


def test_a_rank_needs_memory_for_its_share_alone(tmp_path):
    for rank in ranks(4)(memory, 'sharded', str(tmp_path)):
        print({name: round(share, 3) for name, share in rank.items()})  # pytest -s shows these shares of the model
        assert rank['average'] <= 0.3
        assert rank['start'] < 0.75
        assert rank['save'] < 0.75
        assert rank['load'] < 0.75
        assert 0.5 < rank['in the file'] < 0.9  # weights, momentum and average: a quarter of each


def test_rank_0_alone_keeps_what_is_gathered_for_a_full_checkpoint(tmp_path):
    first, *others = ranks(4)(memory, 'full', str(tmp_path))
    print({name: round(share, 3) for name, share in first.items()})
    assert first['in the file'] > 2.9  # weights, momentum and average
    for rank in others:
        print({name: round(share, 3) for name, share in rank.items()})
        assert rank['save'] < 0.75
        assert rank['in the file'] == 0
