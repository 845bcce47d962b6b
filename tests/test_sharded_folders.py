"""Sharded checkpoints, read in one process: every command takes them as it takes a file, and executes nothing."""

from __future__ import annotations

import contextlib
import io
import itertools
import math
import os
import pickle
import shutil
import struct
import time
import warnings
import weakref
import zipfile
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import torch.distributed.checkpoint as dcp
from folders import metadata_of, place_of, save, save_sharded, write_metadata
from hypothesis import given, settings
from hypothesis import strategies as st
from plain import STRICT, Net, same_bits, sgd, train
from sharded import mesh_of_one
from torch import Tensor, nn
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict

from composer_ema import CheckpointError, EMAOptimizer, ShadowModel, ShadowModels, export, load_average
from composer_ema.checkpoints import inert_pickle, shard_index, sharded, sharded_format
from composer_ema.checkpoints.inspection import TRAINING_WEIGHTS, describe
from composer_ema.checkpoints.lazy import open_weights
from composer_ema.checkpoints.lazy_tensor import LazyTensor, in_memory
from composer_ema.posthoc.merge import merge

pytestmark = STRICT


def trained(seed: int = 0, **options: Any) -> tuple[Net, EMAOptimizer]:
    model = Net(seed)
    arguments: Any = {'decay': 0.5, **options}
    optimizer = EMAOptimizer(sgd(model), model=model, **arguments)
    train(model, optimizer, range(3))
    return model, optimizer


def state_of_script(seed: int = 0) -> dict[str, Any]:
    model, optimizer = trained(seed)
    return {'model': model.state_dict(), 'ema': optimizer.shadow.state_dict(), 'step': 3}


def read_whole(folder: Path, *keys: str) -> Tensor:
    held: Any = sharded.open_folder(folder)
    for key in keys:
        held = held[key]
    return in_memory(held)


# What is read


def test_what_was_saved_comes_back_as_it_was_nested(tmp_path):
    state = {
        'model': {'0.weight': torch.randn(3, 2), 'count': torch.tensor(7)},
        'half': torch.randn(3).bfloat16(),
        'flags': torch.tensor([True, False]),
        'nothing': torch.ones(0, 3),
        'turned': torch.randn(3, 2).t(),
        'strided': torch.arange(10.0)[2:8:2],
        'groups': [{'lr': 0.1, 'of': torch.ones(2)}, {'lr': 0.2, 'of': torch.zeros(1)}],
        'pairs': [('EMA', {'x': torch.ones(2)})],
        'text': 'word',
    }
    held = sharded.open_folder(save(state, tmp_path / 'a'))
    assert set(held) == set(state)
    assert held['text'] == 'word'
    assert [group['lr'] for group in held['groups']] == [0.1, 0.2]
    assert held['pairs'][0][0] == 'EMA'
    found = {**held['model'], **{name: held[name] for name in ('half', 'flags', 'nothing', 'turned', 'strided')}}
    expected = {**state['model'], **{name: state[name] for name in ('half', 'flags', 'nothing', 'turned', 'strided')}}
    assert all(isinstance(each, LazyTensor) for each in found.values())
    assert {name: (each.shape, each.dtype) for name, each in found.items()} == {
        name: (each.shape, each.dtype) for name, each in expected.items()
    }
    assert same_bits({name: in_memory(each) for name, each in found.items()}, expected)
    assert torch.equal(held['groups'][1]['of'], torch.zeros(1))


def test_a_state_that_was_not_flattened_is_read(tmp_path):
    flat = {'0.weight': torch.ones(2, 3), '0.bias': torch.zeros(2)}
    opened = open_weights(save(flat, tmp_path / 'a', planner=dcp.DefaultSavePlanner(flatten_state_dict=False)))
    assert same_bits({name: opened.tensor(name) for name in opened.names}, flat)


@settings(max_examples=8)
@given(st.lists(st.integers(1, 5), min_size=1, max_size=3), st.data())
def test_a_tensor_cut_into_any_boxes_is_whole_again(tmp_path_factory, shape, data):
    cuts = [sorted({0, whole, *data.draw(st.lists(st.integers(0, whole), max_size=2))}) for whole in shape]
    sides = [list(itertools.pairwise(cut)) for cut in cuts]
    boxes = [tuple(zip(*((a, b - a) for a, b in box), strict=True)) for box in itertools.product(*sides)]
    values = torch.arange(float(math.prod(shape))).reshape(shape)
    folder = tmp_path_factory.mktemp('boxes')
    save_sharded({'w': values}, folder, lambda _: data.draw(st.permutations(boxes)))
    assert torch.equal(read_whole(folder, 'w'), values)


@pytest.mark.parametrize('ranks', [2, 4, 7])
def test_uneven_and_empty_shards_are_read(ranks, tmp_path):
    state = state_of_script()
    save_sharded(state, tmp_path / 'a', ranks)
    assert len(list((tmp_path / 'a').glob('*.distcp'))) > 2
    torch.save(state, tmp_path / 'a.pt')
    assert same_bits(load_average(tmp_path / 'a'), load_average(tmp_path / 'a.pt'))


def test_values_are_read_whatever_torch_builds_on_by_default(tmp_path):
    save_sharded(state_of_script(), tmp_path / 'a')
    expected = load_average(tmp_path / 'a')
    with torch.device('meta'):
        assert same_bits(load_average(tmp_path / 'a'), expected)


def of_shadow_models() -> dict[str, Any]:
    model = Net()
    shadows = ShadowModels(model, ['short', 'long'])
    nn.init.zeros_(model.last.weight)
    shadows.update(model, {'short': 0.5, 'long': 0.1})
    return {'net': model.state_dict(), 'short': shadows['short'].state_dict(), 'long': shadows['long'].state_dict()}


def of_several() -> dict[str, Any]:
    model, optimizer = trained(decay={'short': 0.5, 'long': 0.9})
    return {'model': model.state_dict(), 'optimizer': optimizer.state_dict()}


def without_buffers() -> dict[str, Any]:
    model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 3))
    shadow = ShadowModel(model)
    nn.init.zeros_(model[0].weight)
    shadow.update(model, 0.5)
    return {'model': model.state_dict(), 'ema': shadow.state_dict()}


def tied() -> dict[str, Any]:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model[1].weight = model[0].weight
    shadow = ShadowModel(model)
    nn.init.zeros_(model[0].weight)
    shadow.update(model, 0.5)
    return {'model': model.state_dict(), 'ema': shadow.state_dict()}


def of_averaged_model() -> dict[str, Any]:
    averaged = torch.optim.swa_utils.AveragedModel(nn.Linear(3, 2))
    averaged.update_parameters(nn.Linear(3, 2))
    return {'swa': averaged.state_dict()}


def of_optimizer() -> dict[str, Any]:
    model, optimizer = trained()
    return {'model': model.state_dict(), 'optim': optimizer.state_dict(), 'ema': optimizer.ema_state_dict()}


def by_parameter(flat: bool = False, **options: Any) -> dict[str, Any]:
    """As torch's checkpoint functions keep an optimizer."""
    model, optimizer = trained(**options)
    how = StateDictOptions(flatten_optimizer_state_dict=flat)
    return {'model': model.state_dict(), 'optim': get_optimizer_state_dict(model, optimizer, options=how)}


def tied_by_parameter() -> dict[str, Any]:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model[1].weight = model[0].weight
    optimizer = EMAOptimizer(sgd(model), model=model, decay=0.5)
    model(torch.ones(2, 3)).sum().backward()
    optimizer.step()
    return {'model': model.state_dict(), 'optim': get_optimizer_state_dict(model, optimizer)}


CASES = {
    'EMAOptimizer, by parameter': (by_parameter, {}),
    'EMAOptimizer, by parameter, flat': (lambda: by_parameter(flat=True), {}),
    'EMAOptimizer, several by parameter': (
        lambda: by_parameter(decay={'short': 0.5, 'long': 0.9}), {'average': 'long'}),
    'tied weights by parameter': (tied_by_parameter, {}),
    'ShadowModel': (state_of_script, {}),
    'EMAOptimizer': (of_optimizer, {'key': 'ema'}),
    'EMAOptimizer, of several': (of_several, {'average': 'long'}),
    'ShadowModels': (of_shadow_models, {'key': 'long'}),
    'empty parts, which torch does not save': (without_buffers, {}),
    'tied weights': (tied, {}),
    "torch's AveragedModel": (of_averaged_model, {}),
    'plain weights': (lambda: {'model': Net().state_dict(), 'ema': Net(1).state_dict()}, {'key': 'ema'}),
}  # fmt: skip


@pytest.mark.parametrize('case', CASES)
def test_an_average_in_a_folder_is_the_one_in_a_file(case, tmp_path):
    make, options = CASES[case]
    state = make()
    torch.save(state, tmp_path / 'a.pt')
    save_sharded(state, tmp_path / 'a', 3)
    expected = load_average(tmp_path / 'a.pt', **options)
    found = load_average(tmp_path / 'a', **options)
    assert same_bits(found, expected)
    assert not any(isinstance(each, LazyTensor) for each in found.values())

    for name in ('file.safetensors', 'file.pt'):
        facts = export(tmp_path / 'a', tmp_path / name, **options)
        assert {**facts, 'checkpoint': 'a.pt'} == export(tmp_path / 'a.pt', tmp_path / f'other-{name}', **options)
        assert same_bits(load_average(tmp_path / name), load_average(tmp_path / f'other-{name}'))

    of_folder, of_file = (
        describe(tmp_path / 'a', key=options.get('key')),
        describe(tmp_path / 'a.pt', key=options.get('key')),
    )
    assert of_folder.averages == of_file.averages
    assert of_folder.model_slot == of_file.model_slot
    assert of_folder.num_bytes == sum(file.stat().st_size for file in (tmp_path / 'a').iterdir())


@pytest.mark.parametrize('flat', [False, True])
def test_an_average_beside_the_moments_is_that_of_the_shadow(flat, tmp_path):
    torch.save(by_parameter(flat), tmp_path / 'a.pt')
    _, optimizer = trained()
    expected = {name: tensor.detach() for name, tensor in (
        *optimizer.shadow.named_parameters(), *optimizer.shadow.named_buffers())}  # fmt: skip
    found = load_average(tmp_path / 'a.pt')
    assert same_bits({name: found[name] for name in expected}, expected)
    average = describe(tmp_path / 'a.pt').averages[0]
    assert (average.num_updates, average.key, average.label) == (3, 'optim', None)


def test_a_folder_loads_into_a_model(tmp_path):
    state = state_of_script()
    save_sharded(state, tmp_path / 'a')
    model = Net(5)
    model.load_state_dict(load_average(tmp_path / 'a', model))
    assert torch.equal(model.first.weight, state['ema']['parameters']['first.weight'])


def composer_state(batches: int, seed: int = 0) -> dict[str, Any]:
    """What Composer saves of a run with EMA; ``sharded_format`` takes the average's tensors out of its state."""
    from composer_ema.checkpoints import formats

    model, optimizer = trained(seed)
    shadow = optimizer.shadow.state_dict()
    state = {
        'version': formats.VERSION, 'repr': 'EMA()',
        'config': {'half_life': '4ba', 'update_interval': '1ba', 'ema_start': '0ba'},
        'started': True,
        'averages': {'ema': {
            'parameters': shadow['parameters'], 'buffers': shadow['buffers'], 'aliases': {}, 'num_updates': batches,
            'seed': 0, 'last_update': {'ba': batches, 'ep': 0.0, 'sp': 0, 'tok': 0}, 'started_at': None,
            'first_update': None, 'start_share': None, 'profile': {'description': 'half_life=4ba'},
        }},
    }  # fmt: skip
    return {
        'state': {
            'model': model.state_dict(), 'algorithms': [('EMA', state)], 'run_name': 'run',
            'timestamp': {'Timestamp': {
                'epoch': 0, 'batch': batches, 'sample': 0, 'token': 0, 'batch_in_epoch': batches, 'sample_in_epoch': 0,
            }},
        },
        'rng': [{'python': (3, (1, 2), None), 'torch': torch.get_rng_state()}],
    }  # fmt: skip


def split(state: dict[str, Any]) -> dict[str, Any]:
    plain, tensors = sharded_format.split(state['state']['algorithms'][0][1])
    own = {**state['state'], 'algorithms': [('EMA', plain)], sharded_format.AVERAGES: {'EMA': tensors}}
    return {**state, 'state': own}


def save_run(folder: Path, batches: list[int]) -> None:
    for each in batches:
        save_sharded(split(composer_state(each)), folder / f'ep0-ba{each}')
    (folder / 'latest-rank0.pt').symlink_to(f'ep0-ba{batches[-1]}')


def test_the_average_of_a_composer_folder_is_read_by_every_command(tmp_path):
    save_run(tmp_path, [4, 8])
    torch.save(composer_state(8), tmp_path / 'a.file')
    expected = load_average(tmp_path / 'a.file')
    for path in (tmp_path / 'ep0-ba8', tmp_path / 'latest-rank0.pt'):
        assert same_bits(load_average(path, average='ema'), expected)
    of_folder, of_file = describe(tmp_path / 'ep0-ba8'), describe(tmp_path / 'a.file')
    assert of_folder.averages == of_file.averages
    assert of_folder.model_slot == TRAINING_WEIGHTS
    assert of_folder.trained == of_file.trained
    assert export(tmp_path / 'ep0-ba8', tmp_path / 'out.pt')['trained_batch'] == '8'
    assert same_bits(torch.load(tmp_path / 'out.pt', weights_only=True), expected)
    opened = open_weights(tmp_path / 'latest-rank0.pt')
    assert opened.trained == {'ba': 8, 'ep': 0, 'sp': 0, 'tok': 0}
    assert opened.run_name == 'run'
    assert torch.equal(opened.tensor('first.weight'), composer_state(8)['state']['model']['first.weight'])


def test_a_link_file_of_an_object_store_leads_to_the_checkpoint_beside_it(tmp_path):
    save_run(tmp_path / 'run', [4])
    link = tmp_path / 'run' / 'latest-rank0.pt.symlink'
    link.write_text('bucket/run/ep0-ba4')
    assert same_bits(load_average(link), load_average(tmp_path / 'run' / 'ep0-ba4'))
    assert describe(link).trained['batch'] == 4
    link.write_text('bucket/run/ep9-ba9')
    with pytest.raises(CheckpointError, match=r"leads to 'bucket/run/ep9-ba9', which is not there\. Download it"):
        open_weights(link)


def test_an_average_that_the_folder_lacks_is_named(tmp_path):
    state = split(composer_state(4))
    del state['state'][sharded_format.AVERAGES]['EMA']['ema']['parameters']['first.weight']
    save(state, tmp_path / 'a')
    with pytest.raises(
        CheckpointError, match=r"lacks 1 tensors of 'ema' that the saved EMA state lists: first\.weight"
    ):
        load_average(tmp_path / 'a')


@pytest.mark.parametrize('mixed', [False, True])
def test_folders_are_merged_as_files_are(mixed, tmp_path):
    for seed, number in enumerate((4, 8, 12)):
        torch.save(composer_state(number, seed), tmp_path / f'{number}.pt')
        save_sharded(split(composer_state(number, seed)), tmp_path / f'ep0-ba{number}', 1 + seed)
    paths = [tmp_path / f'ep0-ba{number}' for number in (4, 8, 12)]
    files = [tmp_path / f'{number}.pt' for number in (4, 8, 12)]
    given = [paths[0], files[1], paths[2]] if mixed else paths
    for average in (None, 'ema'):
        merged = merge(given, tmp_path / 'm.safetensors', half_life='4ba', average=average, overwrite=True)
        expected = merge(files, tmp_path / 'n.safetensors', half_life='4ba', average=average, overwrite=True)
        assert [part.coefficient for part in merged.parts] == [part.coefficient for part in expected.parts]
        assert same_bits(load_average(tmp_path / 'm.safetensors'), load_average(tmp_path / 'n.safetensors'))


def test_a_merge_and_an_export_never_replace_a_file_of_a_folder(tmp_path):
    save_run(tmp_path, [4, 8])
    taken = tmp_path / 'ep0-ba4' / '__0_0.distcp'
    with pytest.raises(CheckpointError, match='is a file of the checkpoint'):
        merge([tmp_path / 'ep0-ba4', tmp_path / 'ep0-ba8'], taken, equal=True, overwrite=True)
    with pytest.raises(CheckpointError, match='is a file of the checkpoint'):
        export(tmp_path / 'ep0-ba4', taken)
    with pytest.raises(CheckpointError, match='is a file of the checkpoint'):
        export(tmp_path / 'ep0-ba4', tmp_path / 'ep0-ba4')


def test_a_run_of_folders_is_read_for_reconstruction(tmp_path):
    from composer_ema.posthoc.history import read_run

    save_run(tmp_path / 'checkpoints', [4, 8])
    (tmp_path / 'checkpoints' / 'ep0-ba12').mkdir()
    (tmp_path / 'checkpoints' / 'ep0-ba12' / '__0_0.distcp').write_bytes(b'')
    history = read_run(tmp_path)
    assert sorted({each.path.name for each in history.kept}) == ['ep0-ba4', 'ep0-ba8']
    assert {each.label for each in history.kept} == {'weights', 'ema'}, history.left_out
    assert len(history.left_out) == 1
    assert 'ep0-ba12 is a folder. It holds shards without the .metadata' in history.left_out[0]
    kept = history.kept[-1].tensor('first.weight')
    assert not isinstance(kept, LazyTensor)


# Memory


def test_opening_reads_no_tensor_and_using_one_holds_one_chunk(tmp_path, monkeypatch):
    save_sharded(state_of_script(), tmp_path / 'a', 4)
    alive: list[Any] = []
    most = 0
    original = sharded._Reader._chunk

    def chunk(*arguments: Any) -> Tensor:
        nonlocal most
        most = max(most, sum(each() is not None for each in alive))
        found = original(*arguments)
        alive.append(weakref.ref(found))
        return found

    monkeypatch.setattr(sharded._Reader, '_chunk', chunk)
    opened = open_weights(tmp_path / 'a')
    assert {opened.describe(name)[0] for name in opened.names} == {(4, 3), (4,), (2, 4), ()}
    assert not alive
    read = opened.tensor('first.weight')
    assert len(alive) == 4
    assert most <= 1
    assert read.shape == (4, 3)
    before = len(alive)
    load_average(tmp_path / 'a')
    assert len(alive) - before <= 4 * 5  # the average and what is not averaged; not the training weights beside it


# Damaged and malicious folders


class Command:
    """What would run where it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


def blob(value: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


NAME = 'ema.parameters.first.weight'


def put(folder: Path, name: str, content: bytes) -> None:
    """Puts other bytes in place of an item, in a file of their own."""
    metadata = metadata_of(folder)
    info = place_of(metadata, name)
    (folder / '__9_0.distcp').write_bytes(content)
    info.relative_path, info.offset, info.length = '__9_0.distcp', 0, len(content)
    write_metadata(folder, metadata)


def change(**fields: Any) -> Any:
    def changed(folder: Path, _: Path) -> None:
        metadata = metadata_of(folder)
        for name, value in fields.items():
            setattr(place_of(metadata, NAME), name, value)
        write_metadata(folder, metadata)

    return changed


def of_metadata(edit: Any) -> Any:
    def changed(folder: Path, _: Path) -> None:
        metadata = metadata_of(folder)
        edit(metadata)
        write_metadata(folder, metadata)

    return changed


def chunks_of(metadata: Any) -> list[Any]:
    return metadata.state_dict_metadata[NAME].chunks


def command_in_metadata(folder: Path, trap: Path) -> None:
    metadata = metadata_of(folder)
    metadata.planner_data = Command(trap)
    write_metadata(folder, metadata)


def flipped(folder: Path, _: Path) -> None:
    info = place_of(metadata_of(folder), NAME)
    path = folder / info.relative_path
    content = bytearray(path.read_bytes())
    inside = bytes(content[info.offset : info.offset + info.length])
    with zipfile.ZipFile(io.BytesIO(inside)) as archive:
        header = archive.getinfo('archive/data/0').header_offset
    names, extra = struct.unpack('<HH', inside[header + 26 : header + 30])
    content[info.offset + header + 30 + names + extra] ^= 1
    path.write_bytes(content)


def truncated(folder: Path, _: Path) -> None:
    path = folder / '__1_0.distcp'
    path.write_bytes(path.read_bytes()[:-100])


def truncated_metadata(folder: Path, _: Path) -> None:
    path = folder / '.metadata'
    path.write_bytes(path.read_bytes()[:-100])


def claims_more_than_it_has(folder: Path, _: Path) -> None:
    """A storage that is said to be a billion times as large as its record."""
    content = blob(torch.ones(2, 3))
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        parts = {info.filename: archive.read(info) for info in archive.infolist()}
    pickled = parts['archive/data.pkl']
    assert pickled.count(b'cpuq\x04K\x06') == 1
    parts['archive/data.pkl'] = pickled.replace(b'cpuq\x04K\x06', b'cpuq\x04\x8a\x05\x00\x00\x00\x00\x01')
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, 'w') as archive:
        for name, part in parts.items():
            archive.writestr(name, part)
    put(folder, NAME, buffer.getvalue())


def compressed(folder: Path, _: Path) -> None:
    """A chunk whose storage has a thousand times as many bytes as its file."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(blob(torch.zeros(1_000_000)[:6].view(2, 3)))) as archive:
        parts = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(buffer, 'w', zipfile.ZIP_DEFLATED) as archive:
        for part, content in parts.items():
            archive.writestr(part, content)
    put(folder, NAME, buffer.getvalue())


def huge(metadata: Any) -> None:
    entry = metadata.state_dict_metadata[NAME]
    entry.size = torch.Size([2**40, 3])
    entry.chunks = [ChunkStorageMetadata(torch.Size([0, 0]), torch.Size([2**40, 3]))]


def endless(metadata: Any) -> None:
    metadata.state_dict_metadata[NAME].size = torch.Size([2**40, 2**40])


def drop_place(metadata: Any) -> None:
    metadata.storage_data = {index: info for index, info in metadata.storage_data.items() if index.fqn != NAME}


def drop_chunk(metadata: Any) -> None:
    del chunks_of(metadata)[1]


def double_chunk(metadata: Any) -> None:
    chunks_of(metadata)[1].offsets = torch.Size([1, 0])
    for index, info in list(metadata.storage_data.items()):
        if index.fqn == NAME and tuple(index.offset) == (2, 0):
            del metadata.storage_data[index]
            metadata.storage_data[type(index)(NAME, (1, 0))] = info


def says_twice(folder: Path, _: Path) -> None:
    class Other:
        """Pickled as a MetadataIndex, and equal to none."""

        def __reduce__(self) -> Any:
            return MetadataIndex, (NAME,), {'fqn': NAME, 'offset': torch.Size([0, 0]), 'index': 0}

    metadata = metadata_of(folder)
    metadata.storage_data[Other()] = place_of(metadata, NAME, (2, 0))
    write_metadata(folder, metadata)


def no_file(folder: Path, _: Path) -> None:
    (folder / '__1_0.distcp').unlink()
    (folder / '__1_0.distcp').mkdir()


def of_properties(**fields: Any) -> Any:
    def edit(metadata: Any) -> None:
        for name, value in fields.items():
            setattr(metadata.state_dict_metadata[NAME].properties, name, value)

    return of_metadata(edit)


def share_bytes(metadata: Any) -> None:
    place_of(metadata, 'ema.parameters.last.weight', (0, 0)).offset = place_of(metadata, NAME, (0, 0)).offset


def reach_out(metadata: Any) -> None:
    chunks_of(metadata)[1].sizes = torch.Size([3, 3])


DAMAGES = {
    'metadata that runs a command': (command_in_metadata, r'names posix\.mkdir, which has no place in it'),
    'truncated metadata': (truncated_metadata, r'its \.metadata cannot be read: the pickle is truncated'),
    'metadata of something else': (
        lambda folder, _: (folder / '.metadata').write_bytes(pickle.dumps([1])), 'where a Metadata belongs'),
    'a chunk that runs a command': (
        lambda folder, trap: put(folder, NAME, blob(Command(trap))), r'holds the types posix\.mkdir'),
    'a value that runs a command': (
        lambda folder, trap: put(folder, 'ema.num_updates', blob(Command(trap))),
        r'ema\.num_updates in .*__9_0\.distcp cannot be read: it holds the types posix\.mkdir'),
    'a flipped byte': (flipped, rf'{NAME} in .* is damaged, the checksum of archive/data/0 is wrong'),
    'a truncated file': (truncated, r'__1_0\.distcp is truncated'),
    'a missing file': (lambda folder, _: (folder / '__2_0.distcp').unlink(), r'__2_0\.distcp of its 3 files are'),
    'a path out of the folder': (change(relative_path='../__0_0.distcp'), r"'\.\./__0_0\.distcp', which is no file of"),
    'an absolute path': (change(relative_path='/etc/passwd'), r"'/etc/passwd', which is no file of the folder"),
    'the folder for a file': (change(relative_path='..'), r"'\.\.', which is no file of the folder"),
    'a chunk of other values': (
        lambda folder, _: put(folder, NAME, blob(torch.ones(3, 3))), 'something else where the chunk of'),
    'a chunk of another dtype': (
        lambda folder, _: put(folder, NAME, blob(torch.ones(2, 3).double())), 'something else where the chunk of'),
    'no blob of torch': (lambda folder, _: put(folder, NAME, b'x' * 3000), 'was not written by torch.save'),
    'a chunk that swells in memory': (compressed, rf'{NAME} in .*__9_0\.distcp cannot be read: it is compressed'),
    'a storage larger than its file': (
        claims_more_than_it_has, 'its storage 0 claims 17,179,869,184 bytes, and 24 lie in the file'),
    'a compression': (change(transform_descriptors=['zstd']), r'transformed when it was written \(zstd\)'),
    'a negative offset': (change(offset=-1), 'does not say where'),
    'no length, as safetensors have': (change(length=0), 'was not written by torch.save'),
    'a huge tensor': (of_metadata(huge), 'takes 13,194,139,533,312 bytes, and __1_0.distcp holds'),
    'a tensor beyond all memory': (of_metadata(endless), 'does not say the shape of'),
    'a tensor of too many dimensions': (
        of_metadata(lambda m: setattr(m.state_dict_metadata[NAME], 'size', torch.Size([1] * 65))),
        'no tuple of at most 64 whole numbers'),
    'a sparse tensor': (of_properties(layout=torch.sparse_coo), 'is no dense tensor'),
    'two places': (says_twice, 'says two places of'),
    'no file': (no_file, r'__1_0\.distcp is no file'),
    'no place': (of_metadata(drop_place), 'does not say where the chunk of'),
    'a missing chunk': (of_metadata(drop_chunk), r'is incomplete: its chunks hold 6 of 12 elements'),
    'overlapping chunks': (of_metadata(double_chunk), r'two chunks of .* that overlap, at \(0, 0\) and \(1, 0\)'),
    'shared bytes': (of_metadata(share_bytes), r'two items share bytes of __1_0\.distcp'),
    'a chunk out of its tensor': (of_metadata(reach_out), 'that reaches out of it'),
    'keys that collide': (
        of_metadata(lambda m: m.planner_data.update({NAME: ('model', 'first.weight')})), 'two items where'),
    'keys inside of a tensor': (
        of_metadata(lambda m: m.planner_data.update({NAME: ('step', 'x')})), 'inside of another item|two items where'),
    'keys without end': (
        of_metadata(lambda m: m.planner_data.update({NAME: ('ema', *[0] * 5000)})), 'lies in 5,001 dictionaries and'),
    'a list with gaps': (of_metadata(lambda m: m.planner_data.update({'step': ('l', 3)})), 'a list with gaps'),
}  # fmt: skip


@pytest.fixture(scope='module')
def sound(tmp_path_factory) -> Path:
    return save_sharded(state_of_script(), tmp_path_factory.mktemp('sound') / 'a')


@pytest.mark.parametrize('damage', DAMAGES)
def test_a_damaged_folder_is_refused_by_name_and_runs_nothing(damage, sound, tmp_path):
    folder, trap = tmp_path / 'a', tmp_path / 'trap'
    shutil.copytree(sound, folder)
    spoil, message = DAMAGES[damage]
    spoil(folder, trap)
    for read in (load_average, describe, lambda path: export(path, tmp_path / 'out.pt')):
        with pytest.raises(CheckpointError, match=message) as error:
            read(folder)
        assert str(folder) in str(error.value)
    assert not trap.exists()
    assert not (tmp_path / 'out.pt').exists()


def test_an_index_of_absurd_size_is_not_read(sound, monkeypatch):
    monkeypatch.setattr(shard_index, '_MAX_METADATA_BYTES', 1000)
    with pytest.raises(CheckpointError, match='1,000 are read at most'):
        load_average(sound)


def test_a_name_in_the_index_imports_nothing(monkeypatch):
    monkeypatch.setattr(torch, '__getattr__', lambda name: pytest.fail(f'torch.{name} was looked up'))
    assert shard_index._known('torch', 'nowhere') is None


def test_a_pickle_cannot_ask_for_more_memory_than_its_length():
    def known(module: str, name: str) -> None:
        return None

    # The standard library's machine would make a table of 68 GB.
    assert inert_pickle.loads(b'\x80\x02Nr\xff\xff\xff\xff.', known) is None
    for pickled in (
        b'\x80\x05\x96\x00\x00\x00\x00\x00\x00\x00\x40.',  # a bytearray of 2**62
        b'\x80\x04\x8d\x00\x00\x00\x00\x00\x00\x00\x40x.',  # a string of 2**62
    ):
        with pytest.raises(inert_pickle.InertPickleError, match=r'truncated or damaged|holds the operation'):
            inert_pickle.loads(pickled, known)


#: A tuple of a tuple twice, and so on: 1 KB of pickle, and 2**200 tuples for whoever walks through them.
TWICE = b')' + b'q\x00h\x00\x86' * 200
HUNDRED = b'](' + b'K\x01' * 100 + b'e'
ENDLESS = {
    'a key of tuples': (b'}' + TWICE + b'Ns', 'a key of a dictionary in it is none that data has'),
    'a key nested so deep that Python dies': (b'}N' + b'\x85' * 300_000 + b'Ns', 'a key of a dictionary'),
    'keys of one hash': (b'}\x8a\x09' + (2**61 - 1).to_bytes(9, 'little') + b'Ns', 'a key of a dictionary'),
    'a dictionary that is copied': (b'ccollections\nOrderedDict\n}\x85R', 'truncated or damaged'),
    'a size of tuples': (b'ctorch\nSize\n' + TWICE + b'\x85R', 'no tuple of at most 64 whole numbers'),
    'a list that is copied': (b'ctorch\nSize\n' + HUNDRED + b'\x85R', 'no tuple of at most 64 whole numbers'),
}


@pytest.mark.parametrize('attack', ENDLESS)
def test_a_pickle_cannot_ask_for_more_time_than_its_length(attack):
    pickled, message = ENDLESS[attack]
    with pytest.raises(inert_pickle.InertPickleError, match=message):
        inert_pickle.loads(b'\x80\x02' + pickled + b'.', shard_index._known)


@pytest.mark.parametrize(
    ('name', 'message'),
    [('offset', 'without a name or an offset'), ('transform_descriptors', 'by what is not named')],
)
def test_tuples_without_end_in_an_index_are_neither_compared_nor_shown(name, message, sound, tmp_path):
    folder = tmp_path / 'a'
    shutil.copytree(sound, folder)
    metadata = metadata_of(folder)
    index, place = next(item for item in metadata.storage_data.items() if item[0].offset is not None)
    object.__setattr__(index if name == 'offset' else place, name, 'endless')
    pickled = pickle.dumps(metadata, protocol=2)
    endless = TWICE.replace(b'q\x00h\x00', b'r\xff\xff\xff\x7fj\xff\xff\xff\x7f')
    assert pickled.count(b'X\x07\x00\x00\x00endless') == 1
    (folder / '.metadata').write_bytes(pickled.replace(b'X\x07\x00\x00\x00endless', endless))
    with pytest.raises(CheckpointError, match=message):
        load_average(folder)


def test_thousands_of_chunks_that_begin_before_the_others_end_are_compared_in_seconds():
    count, place = 10_000, shard_index.Place('__0_0.distcp', 0, 0)
    steps = [shard_index.Chunk((each, each), (count - each, 1), place) for each in range(count)]
    began = time.process_time()
    assert shard_index._overlapping(steps) is None
    last = shard_index.Chunk((count - 1, 7), (1, 1), place)
    assert shard_index._overlapping([*steps, last]) == (steps[7], last)
    assert time.process_time() - began < 30  # one by one, it takes minutes


@given(st.binary(max_size=60))
def test_no_bytes_do_more_than_be_refused(content):
    prefix = pickle.dumps({'a': [1, 2.5, ('x', None, True)], 'b': -(2**70)})
    assert inert_pickle.loads(prefix, lambda *_: None) == pickle.loads(prefix)
    for data in (content, prefix[:-1] + content):
        with contextlib.suppress(inert_pickle.InertPickleError):
            inert_pickle.loads(data, lambda *_: None)


def test_folders_that_cannot_be_read_say_what_to_pass(tmp_path, sound):
    save_run(tmp_path / 'run', [4])
    with pytest.raises(CheckpointError, match=r'Pass the checkpoint in it: .*latest-rank0\.pt'):
        load_average(tmp_path / 'run')
    (tmp_path / 'run' / 'latest-rank0.pt').unlink()
    with pytest.raises(CheckpointError, match=r'Pass one of the sharded checkpoints in it, such as .*ep0-ba4'):
        load_average(tmp_path / 'run')
    own = tmp_path / 'own'
    shutil.copytree(sound, own)
    (own / '.metadata').rename(own / '__0.metadata')
    with pytest.raises(CheckpointError, match='Each process wrote an index of its own'):
        load_average(own)


def test_the_file_of_one_rank_is_not_taken_for_the_whole(sound, tmp_path):
    for name in ('__0_0.distcp', '.metadata'):
        with pytest.raises(CheckpointError, match=rf'one file of a sharded checkpoint\. Pass its folder: {sound}'):
            load_average(sound / name)
    path = tmp_path / 'shard-00001-model-00001-of-00001.safetensors'
    safetensors.torch.save_file({'w': torch.ones(2)}, path, metadata={'DCP_SHARDING_INFO': '{}', 'format': 'pt'})
    for read in (open_weights, describe):
        with pytest.raises(CheckpointError, match='holds the shards of one process'):
            read(path)


def test_shards_that_one_process_pickled_are_refused(tmp_path):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    with mesh_of_one():
        mesh = init_device_mesh('cpu', (1,))
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')  # torch 2.6 knows no random numbers of a CPU mesh
            shard = distribute_tensor(torch.ones(4, 2), mesh, [Shard(0)])
        builtin = {'ema_model': {'named_parameters_dict': {'w': shard}, 'named_buffers_dict': {}},
                   'ema_weights_active': False, 'ema_started': True}  # fmt: skip
        state = {'model': {'w': torch.ones(4, 2)}, 'algorithms': [('EMA', builtin)]}
        save({'state': state}, tmp_path / 'a')
    for read in (load_average, describe, open_weights):
        with pytest.raises(
            CheckpointError, match=r"it holds the shards of one process \(.*DTensor.*Composer's built-in"
        ):
            read(tmp_path / 'a')
