"""Two and four ranks under DDP keep pieces of an average, gather them to lend and to save, and resume on any number."""

import itertools
import os
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from composer import Callback, Event
from sharded import Silence, bits_of, ranks, whole
from test_sharded_snapshots import same_files
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict, set_optimizer_state_dict
from torch.nn.parallel import DistributedDataParallel
from toy import bits, make_data, make_evaluator, make_trainer

from composer_ema import EMA, SWA, EMAOptimizer, ShadowModel, ShadowModels, Snapshots, gather_state_dict, load_average
from composer_ema.model.sharding import local

pytestmark = pytest.mark.slow
COUNTS = (2, 4)


def network() -> nn.Module:
    """Dimensions that divide by two and four, that do not, and that are smaller."""
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(10, 64), nn.BatchNorm1d(64), nn.Tanh(), nn.Linear(64, 7), nn.Tanh(), nn.Linear(7, 3))


def batch(step: int) -> Tensor:
    """This rank's part of the batch of that number, which has the same samples on any number of ranks."""
    samples = torch.randn(8, 10, generator=torch.Generator().manual_seed(step))
    return samples.chunk(dist.get_world_size())[dist.get_rank()]


def forward(model: nn.Module, step: int) -> Tensor:
    return model(batch(step)).square().mean()


def built(*, is_split: bool, **arguments: Any) -> tuple[Any, EMAOptimizer]:
    model = DistributedDataParallel(network())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    settings: dict[str, Any] = {'decay': 0.9, 'model': model, 'shard_over_ranks': is_split, **arguments}
    return model, EMAOptimizer(optimizer, **settings)


def train(model: nn.Module, optimizer: EMAOptimizer, steps: range) -> None:
    for step in steps:
        optimizer.zero_grad()
        forward(model, step).backward()
        optimizer.step()


def parameters_of(shadow: ShadowModel) -> dict[str, bytes]:
    """The bits of the whole average of each parameter. A collective call."""
    return bits_of({name: whole(tensor) for name, tensor in shadow.named_parameters()})


def bytes_of(shadow: ShadowModel) -> int:
    storages = {local(t).untyped_storage().data_ptr(): local(t).untyped_storage() for t in shadow.parameters()}
    return sum(storage.nbytes() for storage in storages.values())


def lend(settings: dict[str, Any]) -> dict[str, Any]:
    """What is equal between a run with a split average and one with a whole average."""
    (model, optimizer), (other, split) = built(is_split=False, **settings), built(is_split=True, **settings)
    for each in ((model, optimizer), (other, split)):
        train(*each, range(5))
    trained, average = bits_of(dict(other.state_dict())), split.shadow
    facts: dict[str, Any] = {
        'training weights': trained == bits_of(dict(model.state_dict())),
        'average': parameters_of(average) == parameters_of(optimizer.shadow),
        'share': bytes_of(average) / bytes_of(optimizer.shadow),
    }
    with torch.no_grad():
        with optimizer.swap_ema_weights():
            shown, loss = bits_of(dict(model.named_parameters())), forward(model.module.eval(), 100)
        with split.swap_ema_weights():
            facts['lent'] = bits_of(dict(other.named_parameters())) == shown
            facts['loss'] = torch.equal(forward(other.module.eval(), 100), loss)
    facts['returned'] = bits_of(dict(other.state_dict())) == trained
    if settings.get('model', ...) is None:
        return facts
    distances = [shadow.relative_distance(model).item() for shadow in (average, optimizer.shadow)]
    facts['distance'] = abs(distances[0] / distances[1] - 1) < 1e-12
    saved = [bits_of(each.averaged_state_dict()) for each in (split, optimizer)]
    facts['state dict'] = parameters_in(saved[0]) == parameters_in(saved[1])
    copies = network(), network()
    for shadow, copy in zip((average, optimizer.shadow), copies, strict=True):
        shadow.copy_to(copy)
    facts['copy'] = bits_of(dict(copies[0].named_parameters())) == bits_of(dict(copies[1].named_parameters()))
    return facts


def parameters_in(state: dict[str, bytes]) -> dict[str, bytes]:
    """What is equal on all ranks: each has its own statistics until the next forward pass."""
    return {name: value for name, value in state.items() if 'running' not in name}


@pytest.mark.parametrize('count', COUNTS)
@pytest.mark.parametrize('settings', [{}, {'compensated': True}, {'model': None}, {'start': 2}], ids=str)
def test_a_split_average_is_the_whole_one_to_the_bit_wherever_it_is_read(count, settings):
    for facts in ranks(count)(lend, settings):
        assert facts.pop('share') <= 1.1 / count
        assert all(facts.values()), facts


def gather_what_is_odd() -> dict[str, bool]:
    """Whether a model of complex and of empty parameters shows the average, and has its weights back."""
    model = nn.Module()
    model.complex = nn.Parameter(torch.randn(3, 7, dtype=torch.complex64))
    model.turned = nn.Parameter(torch.randn(7, 3, dtype=torch.complex64).t())
    model.empty = nn.Parameter(torch.randn(3, 0))
    split, average = ShadowModel(model, shard_over_ranks=True), ShadowModel(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3j if parameter.is_complex() else 3)
    for shadow in (split, average):
        shadow.update(model, 0.25)
    before, expected = bits_of(dict(model.named_parameters())), bits_of(dict(average.named_parameters()))
    with split.swapped(model):
        shown = bits_of(dict(model.named_parameters()))
    saved = gather_state_dict(split.state_dict()).get('parameters')
    return {
        'shown': shown == expected,
        'returned': bits_of(dict(model.named_parameters())) == before,
        'saved': saved is None or bits_of(saved) == expected,
    }


@pytest.mark.parametrize('count', COUNTS)
def test_complex_and_empty_parameters_are_gathered(count):
    for facts in ranks(count)(gather_what_is_odd):
        assert all(facts.values()), facts


def update_alone() -> list[bool]:
    """Rank 0 updates three averages three times before the others do anything."""
    model = network()
    split, several = ShadowModel(model, shard_over_ranks=True), ShadowModels(model, ['a', 'b'], shard_over_ranks=True)
    expected = ShadowModel(model)
    with torch.no_grad(), Silence():
        for _ in range(3 if dist.get_rank() == 0 else 0):
            for parameter in model.parameters():
                parameter.add_(1)
            split.update(model, 0.5)
            several.update(model, 0.5)
            expected.update(model, 0.5)
    dist.barrier()
    others = dict(expected.named_parameters())
    return [
        torch.equal(local(tensor), others[name][: local(tensor).shape[0], : local(tensor).shape[1]])
        for shadow in (split, *several.values())
        for name, tensor in shadow.named_parameters()
        if tensor.dim() == 2
    ]


@pytest.mark.parametrize('count', COUNTS)
def test_rank_0_alone_may_update(count):
    first, *_ = ranks(count)(update_alone)
    assert all(first)


def save(folder: Path, is_split: bool) -> dict[str, Any]:
    """Saves in every way after three steps, and takes three more."""
    model, optimizer = built(is_split=is_split)
    train(model, optimizer, range(3))
    average = parameters_of(optimizer.shadow)
    state = gather_state_dict({'optimizer': optimizer.state_dict(), 'shadow': optimizer.shadow.state_dict()})
    full = get_optimizer_state_dict(model, optimizer, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    refused = None
    if dist.get_rank() == 0:
        torch.save({**state, 'full': full, 'model': model.module.state_dict()}, folder / 'file.pt')
        if is_split:
            with pytest.raises(RuntimeError, match='gather_state_dict') as raised:
                torch.save(optimizer.state_dict(), folder / 'piece.pt')
            refused = str(raised.value)
    saved = {'shadow': optimizer.shadow.state_dict(), 'optimizer': get_optimizer_state_dict(model, optimizer)}
    dcp.save(saved, checkpoint_id=folder / 'folder')
    train(model, optimizer, range(3, 6))
    return {
        'average': average,
        'empty': not state,
        'refused': refused,
        'end': {**parameters_of(optimizer.shadow), **bits_of({'last': model.module[0].weight})},
    }


def resume(folder: Path, is_split: bool) -> dict[str, Any]:
    """Loads what :func:`save` saved, each in its way, and takes three more steps from the file."""
    file = torch.load(folder / 'file.pt', weights_only=True)
    loaded: dict[str, Any] = {}
    model, optimizer = built(is_split=is_split)
    model.module.load_state_dict(file['model'])
    optimizer.load_state_dict(file['optimizer'])
    loaded['file'] = parameters_of(optimizer.shadow)

    shadow = ShadowModel(model, shard_over_ranks=is_split)
    shadow.load_state_dict(file['shadow'])
    loaded['shadow'] = parameters_of(shadow)

    twin, other = built(is_split=is_split)
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    set_optimizer_state_dict(twin, other, file['full'], options=options)
    loaded['full'] = parameters_of(other.shadow)

    twin, other = built(is_split=is_split)
    state = {'shadow': shadow.state_dict(), 'optimizer': get_optimizer_state_dict(twin, other)}
    for tensor in state['shadow']['parameters'].values():
        local(tensor).zero_()
    dcp.load(state, checkpoint_id=folder / 'folder')
    shadow.load_state_dict(state['shadow'])
    set_optimizer_state_dict(twin, other, state['optimizer'])
    loaded |= {'folder': parameters_of(shadow), 'folder of an optimizer': parameters_of(other.shadow)}

    train(model, optimizer, range(3, 6))
    return {
        'loaded': loaded,
        'end': {**parameters_of(optimizer.shadow), **bits_of({'last': model.module[0].weight})},
        'pieces': {str(type(tensor).__name__) for tensor in optimizer.shadow.parameters()},
    }


@pytest.mark.parametrize('count', COUNTS)
@pytest.mark.parametrize('was_split', [True, False], ids=['split', 'whole'])
def test_what_is_saved_resumes_split_or_whole_on_any_number_of_ranks(tmp_path, count, was_split):
    answers = ranks(count)(save, tmp_path, was_split)
    first = answers[0]
    assert [answer['empty'] for answer in answers] == [False] + [True] * (count - 1)
    assert (first['refused'] is not None) is was_split
    assert not (tmp_path / 'piece.pt').exists() or (tmp_path / 'piece.pt').stat().st_size < 2**16
    for other in COUNTS:
        split, whole_ones = (ranks(other)(resume, tmp_path, is_split) for is_split in (True, False))
        for found in (*split, *whole_ones):
            assert found['pieces'] == {'Piece' if found in split else 'Tensor'}
            for way, average in found['loaded'].items():
                assert average == first['average'], (other, found['pieces'], way)
            assert found['end'] == split[0]['end']
        if other == count == 2:
            # On four ranks DDP adds gradients in another order in its first step: it learns its buckets there.
            assert split[0]['end'] == first['end']
    loaded = ShadowModel(network())
    loaded.load_state_dict(torch.load(tmp_path / 'file.pt', weights_only=True)['shadow'])
    assert bits_of(dict(loaded.named_parameters())) == first['average']


def keep_snapshots(folder: Path, is_split: bool) -> float:
    """Writes snapshots of eight steps. Returns the largest share of an average that this rank has kept."""
    model = DistributedDataParallel(network())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    snapshots = Snapshots(model, folder, every=3, num_steps=8, run_name='run', shard_over_ranks=is_split)
    for step in range(8):
        optimizer.zero_grad()
        forward(model, step).backward()
        optimizer.step()
        snapshots.update()
    snapshots.finish()
    whole_bytes = sum(parameter.nbytes for parameter in model.parameters())
    return max(bytes_of(shadow) for shadow in snapshots.shadows.values()) / whole_bytes


@pytest.mark.parametrize('count', COUNTS)
def test_snapshots_of_pieces_are_those_of_whole_averages(tmp_path, count):
    shares = ranks(count)(keep_snapshots, tmp_path / 'split', True)
    ranks(count)(keep_snapshots, tmp_path / 'whole', False)
    assert max(shares) <= 1.1 / count
    assert same_files(tmp_path / 'split', tmp_path / 'whole')


class Seen(Callback):
    """Notes the weights after every batch, and those that every evaluation runs on."""

    def __init__(self) -> None:
        self.trained: list[dict[str, bytes]] = []
        self.evaluated: list[dict[str, bytes]] = []

    def run_event(self, event: Event, state: Any, logger: Any) -> None:
        del logger
        if event is Event.BATCH_END:
            self.trained.append(bits(state.model))
        elif event is Event.EVAL_BATCH_START:
            self.evaluated.append(bits(state.model))


def compose(algorithm: str, folder: Path | None, load_path: Path | None = None) -> dict[str, Any]:
    """A run of Composer's Trainer, with a checkpoint after every batch if there is a folder for them."""
    rank, count = dist.get_rank(), dist.get_world_size()
    os.environ |= {'LOCAL_RANK': str(rank), 'LOCAL_WORLD_SIZE': str(count), 'NODE_RANK': '0'}
    seen = Seen()
    algorithms: dict[str, list[Any]] = {
        'none': [],
        'whole': [EMA('2ba')],
        'snapshots': [EMA('2ba', snapshots={'every': '2ba', 'folder': f'{folder}/snapshots'})],
        'split, snapshots': [
            EMA('2ba', shard_over_ranks=True, snapshots={'every': '2ba', 'folder': f'{folder}/snapshots'})
        ],
        'split': [EMA('2ba', shard_over_ranks=True)],
        'whole, several': [EMA({'a': '2ba', 'b': '1ep'}), SWA('1ba', update_interval='1ba')],
        'split, several': [
            EMA({'a': '2ba', 'b': '1ep'}, shard_over_ranks=True),
            SWA('1ba', update_interval='1ba', shard_over_ranks=True),
        ],
    }
    arguments: dict[str, Any] = {} if load_path is None else {'load_path': str(load_path)}
    if folder is not None:
        arguments |= {'save_folder': str(folder), 'save_interval': '1ba', 'save_filename': 'ba{batch}.pt'}
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        trainer = make_trainer(
            algorithms[algorithm],
            callbacks=[seen],
            train_dataloader=make_data(24, 8 // count),
            eval_dataloader=make_evaluator(interval='2ba'),
            **arguments,
        )
        kept: list[Any] = list(trainer.state.algorithms)
        shadows = [average for each in kept for _, average in each._averages]
        loaded = [parameters_of(each.shadow) for each in shadows]
        trainer.fit()
    metrics = {name: float(value) for name, value in trainer.state.eval_metric_values.items()}
    trainer.close()
    return {
        **vars(seen),
        'metrics': metrics,
        'loaded': loaded,
        'averages': [parameters_of(each.shadow) for each in shadows],
        'training': bits(trainer.state.model),
    }


@pytest.mark.parametrize('count', COUNTS)
@pytest.mark.parametrize(('kind', 'label'), [('', 'ema'), (', several', 'a')], ids=['one', 'several'])
def test_a_trainer_keeps_pieces_and_nothing_else_changes(tmp_path, count, kind, label):
    none, whole_ones, split = (
        ranks(count)(compose, algorithm, folder)
        for algorithm, folder in (('none', None), (f'whole{kind}', None), (f'split{kind}', tmp_path))
    )
    for without, with_whole, with_split in zip(none, whole_ones, split, strict=True):
        assert with_split['trained'] == without['trained']
        for fact in ('evaluated', 'metrics', 'averages', 'training'):
            assert with_split[fact] == with_whole[fact], fact
        assert with_split['averages'] == split[0]['averages']
    # The checkpoint of rank 0 alone is complete, and resumes on any number of ranks, with the setting or without.
    assert parameters_in_average(tmp_path / 'ba6.pt', label) == split[0]['averages'][0]
    ends = []
    for other, algorithm in itertools.product(COUNTS, (f'whole{kind}', f'split{kind}')):
        resumed = ranks(other)(compose, algorithm, None, tmp_path / 'ba4.pt')
        assert all(each['loaded'][0] == parameters_in_average(tmp_path / 'ba4.pt', label) for each in resumed)
        if other == count:
            ends += [(each['averages'], parameters_of_model(each['training'])) for each in resumed]
    assert all(end == ends[0] for end in ends)
    if count == 2:
        assert ends[0] == (split[0]['averages'], parameters_of_model(split[0]['training']))


def test_snapshots_of_a_trainer_are_those_of_whole_averages(tmp_path):
    for algorithm in ('snapshots', 'split, snapshots'):
        ranks(2)(compose, algorithm, tmp_path / algorithm)
    assert same_files(*(tmp_path / algorithm / 'snapshots' for algorithm in ('snapshots', 'split, snapshots')))


def parameters_in_average(path: Path, label: str) -> dict[str, bytes]:
    average = load_average(path, average=label)
    return {name: value for name, value in bits_of(average).items() if 'running' not in name and 'num' not in name}


def parameters_of_model(model: dict[str, bytes]) -> dict[str, bytes]:
    return {name: value for name, value in model.items() if 'running' not in name}
