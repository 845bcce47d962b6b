"""BatchNorm's statistics: by hand, as torch's, on two processes, for an average, and nothing else touched."""

import copy
import faulthandler
import importlib.util
import io
import os
import random
import sys
import time
from datetime import timedelta
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import swa_utils
from torch.utils.data import DataLoader, TensorDataset

from composer_ema import ShadowModel, batchnorm, update_bn

needs_composer = pytest.mark.skipif(importlib.util.find_spec('composer') is None, reason='needs Composer')


def network(seed=0, dropout=0.0):
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3, momentum=0.2), nn.ReLU(), nn.Flatten(), nn.Dropout(dropout),
        nn.Linear(12, 5), nn.BatchNorm1d(5, momentum=None), nn.Linear(5, 2),
    )  # fmt: skip


def images(batches=4, size=6, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(size, 1, 4, 4, generator=generator) * (i + 1) for i in range(batches)]


def bits(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_same_bits(left, right):
    assert left.keys() == right.keys()
    for name, tensor in left.items():
        assert torch.equal(tensor, right[name]), name


def statistics(model):
    return {name: buffer.clone() for name, buffer in model.named_buffers()}


class Broken(Exception):
    pass


def breaking(batches):
    yield from batches
    raise Broken


# By hand


def test_the_statistics_are_the_means_over_batches_of_mean_and_unbiased_variance():
    model = nn.BatchNorm1d(2, momentum=0.1)
    update_bn(model, [torch.tensor([[1.0, 0.0], [3.0, 0.0]]), torch.tensor([[5.0, 4.0], [9.0, 4.0], [4.0, 1.0]])])
    torch.testing.assert_close(model.running_mean, torch.tensor([(2 + 6) / 2, (0 + 3) / 2]))
    torch.testing.assert_close(model.running_var, torch.tensor([(2 + 7) / 2, (0 + 3) / 2]))
    assert model.num_batches_tracked == 2
    assert model.momentum == 0.1


def test_num_batches_stops_early_and_draws_no_further_batch():
    model, drawn = nn.BatchNorm1d(1), []
    update_bn(model, (drawn.append(i) or torch.tensor([[float(i)], [i + 2.0]]) for i in range(9)), num_batches=3)
    assert model.running_mean.item() == pytest.approx(2)
    assert drawn == [0, 1, 2]


# As torch's


@pytest.mark.parametrize('form', ['tensor', 'tuple', 'list', 'loader'])
def test_it_equals_torchs_to_the_bit_where_torchs_works(form):
    inputs = images()
    batches = {
        'tensor': inputs,
        'tuple': [(x, torch.zeros(1)) for x in inputs],
        'list': [[x, 'ignored'] for x in inputs],
        'loader': DataLoader(TensorDataset(torch.cat(inputs)), 7, shuffle=True),
    }[form]
    ours, theirs = network(dropout=0.5), network(dropout=0.5)
    torch.manual_seed(3)
    update_bn(ours, batches)
    torch.manual_seed(3)
    swa_utils.update_bn(batches, theirs)
    assert_same_bits(bits(ours), bits(theirs))


def test_averaged_models_and_compiled_ones_are_looked_through():
    plain, averaged = network(), swa_utils.AveragedModel(network())
    compiled = torch.compile(network())
    for model in (plain, averaged, compiled):
        update_bn(model, images())
    assert_same_bits(bits(plain), bits(averaged.module))
    assert_same_bits(bits(plain), bits(compiled._orig_mod))


# What a batch may be


class ByName(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(1)

    def forward(self, x, scale=1.0):
        return self.norm(x * scale)


class Whole(ByName):
    def forward(self, batch):
        return self.norm(batch['x'])


X = torch.tensor([[1.0], [3.0]])


@pytest.mark.parametrize(
    ('model', 'batch', 'mean'),
    [
        (ByName(), {'x': X, 'scale': 2.0}, 4.0),
        (ByName(), ({'x': X}, 'target'), 2.0),
        (Whole(), {'x': X}, 2.0),
        (Whole(), {'x': X, 'y': X}, 2.0),
    ],
)
def test_mappings_go_in_as_keywords_where_forward_takes_them_and_whole_elsewhere(model, batch, mean):
    update_bn(model, [batch])
    assert model.norm.running_mean.item() == mean


def test_forward_says_how_else_to_run_the_model():
    model = ByName()
    update_bn(model, [(5.0, X)], forward=lambda model, batch: model(batch[1], scale=batch[0]))
    assert model.norm.running_mean.item() == 10


def test_batches_of_any_structure_go_to_the_device():
    from collections import namedtuple

    pair = namedtuple('pair', 'x y')
    seen = []
    model = ByName()
    batch = {'a': [X, (X, pair(X, 'text'))], 'b': 3}
    update_bn(model, [batch], 'meta', forward=lambda _, batch: seen.append(batch) or model(X))
    moved = seen[0]
    assert moved['b'] == 3
    assert type(moved['a'][1][1]) is pair
    assert moved['a'][1][1].y == 'text'
    assert {t.device.type for t in (moved['a'][0], moved['a'][1][0], moved['a'][1][1].x)} == {'meta'}


@needs_composer
def test_a_composer_model_takes_the_whole_batch_and_a_data_spec_its_transforms():
    from composer import ComposerModel, DataSpec

    class OfDictionaries(ComposerModel):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm1d(1)

        def forward(self, batch):
            return self.norm(batch['x'] + batch['shift'][0])

        def loss(self, outputs, batch):
            raise AssertionError('no loss is needed')

    model = OfDictionaries()
    batches = DataLoader([{'x': x, 'shift': [1.0]} for x in X.flatten().tolist()], 2, collate_fn=lambda rows: {
        'x': torch.tensor([[row['x']] for row in rows]), 'shift': rows[0]['shift']
    })  # fmt: skip
    update_bn(model, batches)
    assert model.norm.running_mean.item() == 3
    update_bn(model, DataSpec(batches, batch_transforms=lambda batch: {**batch, 'shift': [2.0]}))
    assert model.norm.running_mean.item() == 4


@needs_composer
def test_a_data_spec_is_transformed_moved_and_split_as_composers_trainer_does():
    from composer import DataSpec

    order = []

    def note(what, batch):
        order.append((what, batch.device.type, len(batch)))
        return batch

    spec = DataSpec(
        images(1, size=6),
        batch_transforms=lambda batch: note('batch', batch),
        microbatch_transforms=lambda batch: note('microbatch', batch),
    )
    model = network()
    update_bn(model, spec, 'meta', microbatch_size=4, forward=lambda model, batch: model(torch.ones(batch.shape)))
    assert order == [('batch', 'cpu', 6), ('microbatch', 'meta', 4), ('microbatch', 'meta', 2)]
    assert model[1].num_batches_tracked == 2

    parts, together = network(), network()
    update_bn(parts, DataSpec(images()), microbatch_size=2)
    update_bn(together, [part for batch in images() for part in batch.split(2)])
    assert_same_bits(statistics(parts), statistics(together))


@pytest.mark.parametrize('size', [0, -1, True, '4'])
def test_a_microbatch_of_no_samples_is_refused(size):
    with pytest.raises(ValueError, match='microbatch_size must be a number of samples above 0'):
        update_bn(network(), images(), microbatch_size=size)


def test_a_microbatch_needs_a_data_spec_that_splits():
    with pytest.raises(ValueError, match=r'microbatch_size=4 needs a Composer DataSpec.* Pass DataSpec\(dataloader\)'):
        update_bn(network(), images(), microbatch_size=4)


@needs_composer
def test_a_composer_classifier_is_run_on_pairs():
    import toy

    model = toy.make_model()
    data = toy.make_data()
    update_bn(model, data.dataloader)
    plain = toy.make_model().module
    swa_utils.update_bn(data.dataloader, plain)
    assert_same_bits(statistics(plain), statistics(model.module))


# Nothing else changes


def test_flags_momenta_weights_other_buffers_and_random_numbers_stay():
    class Counting(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer('calls', torch.zeros((), dtype=torch.int64))

        def forward(self, x):
            self.calls += 1
            self.cache = None
            return x

    model = network(dropout=0.5).append(Counting())
    model.append(nn.utils.parametrizations.spectral_norm(nn.Linear(2, 2)))
    model.train()
    model[4].eval()
    model[6].eval()
    generator = torch.Generator().manual_seed(8)
    loader = DataLoader(TensorDataset(torch.cat(images())), 6, shuffle=True, generator=generator)
    before, flags = bits(model), [module.training for module in model.modules()]
    states = torch.get_rng_state(), generator.get_state(), random.getstate(), np.random.get_state()[1].tolist()

    def drawing(model, batch):
        random.random(), np.random.rand(), torch.rand(1)
        return model(batch[0])

    update_bn(model, loader, forward=drawing)
    assert [module.training for module in model.modules()] == flags
    assert [model[1].momentum, model[6].momentum] == [0.2, None]
    changed = {name for name, tensor in bits(model).items() if not torch.equal(tensor, before[name])}
    assert changed == {f'{i}.{name}' for i in (1, 6) for name in ('running_mean', 'running_var', 'num_batches_tracked')}
    assert torch.equal(torch.get_rng_state(), states[0])
    assert torch.equal(generator.get_state(), states[1])
    assert random.getstate() == states[2]
    assert np.random.get_state()[1].tolist() == states[3]


@pytest.mark.parametrize('averaging', [False, True])
def test_after_an_exception_everything_is_as_it_was(averaging):
    model = network(dropout=0.5)
    shadow = ShadowModel(network(seed=5))
    model.train()
    model[1].eval()
    before, flags, state = bits(model), [m.training for m in model.modules()], torch.get_rng_state()
    average = {name: buffer.clone() for name, buffer in shadow.named_buffers()}
    with pytest.raises(Broken):
        update_bn(model, breaking(images()), shadow=shadow if averaging else None)
    assert_same_bits(bits(model), before)
    assert_same_bits(dict(shadow.named_buffers()), average)
    assert not shadow.is_swapped
    assert [m.training for m in model.modules()] == flags
    assert [model[1].momentum, model[6].momentum] == [0.2, None]
    assert torch.equal(torch.get_rng_state(), state)


def test_no_graph_is_built():
    outputs = []
    update_bn(network(), images(), forward=lambda model, batch: outputs.append(model(batch)))
    assert len(outputs) == 4
    assert not any(output.requires_grad for output in outputs)


@pytest.mark.parametrize('model', [nn.Linear(2, 2), nn.BatchNorm1d(2, track_running_stats=False), nn.InstanceNorm1d(2)])
def test_a_model_without_statistics_is_not_run(model):
    update_bn(model, breaking([]))


def test_a_layer_that_no_batch_reaches_keeps_its_statistics():
    model = nn.ModuleDict({'used': nn.BatchNorm1d(1), 'unused': nn.BatchNorm1d(1)})
    model['unused'].running_mean.fill_(7)
    update_bn(model, [X], forward=lambda model, batch: model['used'](batch))
    assert model['used'].running_mean.item() == 2
    assert model['unused'].running_mean.item() == 7


# What is refused


def test_an_empty_loader_is_an_error_and_changes_nothing():
    model = network()
    before, spent = bits(model), iter(images(1))
    update_bn(copy.deepcopy(model), spent)
    with pytest.raises(ValueError, match='no batch reached a BatchNorm layer'):
        update_bn(model, spent)
    assert_same_bits(bits(model), before)


def test_torchs_order_of_arguments_is_an_error_that_says_so():
    with pytest.raises(TypeError, match='other way round'):
        update_bn(images(), network())


@pytest.mark.parametrize('number', [0, -1, 1.5, True, '3'])
def test_a_number_of_batches_that_is_none_is_refused(number):
    with pytest.raises(ValueError, match='num_batches'):
        update_bn(network(), images(), num_batches=number)


def test_a_sharded_model_is_refused(monkeypatch):
    monkeypatch.setattr(batchnorm, 'is_sharded', lambda model: True)
    with pytest.raises(NotImplementedError, match='sharded'):
        update_bn(network(), images())


# For an average


def averaged(model, seed=5):
    """A shadow half way between a model and another, whose buffers differ from the model's."""
    shadow = ShadowModel(model)
    shadow.update(network(seed), smoothing=0.5)
    return shadow


def expected_of(shadow):
    holder = network()
    shadow.copy_to(holder)
    swa_utils.update_bn(images(), holder)
    return statistics(holder)


@pytest.mark.parametrize('wrap', [lambda model: model, torch.compile], ids=['plain', 'compiled'])
def test_statistics_of_an_average_land_in_its_buffers_and_the_model_keeps_every_bit(wrap):
    model = network()
    update_bn(model, images(3, seed=9))
    shadow = averaged(model)
    before = bits(model)
    parameters = {name: tensor.clone() for name, tensor in shadow.named_parameters()}
    expected = expected_of(shadow)
    update_bn(wrap(model), images(), shadow=shadow)
    assert_same_bits(dict(shadow.named_buffers()), expected)
    assert_same_bits(dict(shadow.named_parameters()), parameters)
    assert_same_bits(bits(model), before)
    assert not shadow.is_swapped
    assert shadow.num_updates == 1


def test_inside_a_swap_the_model_holds_the_new_statistics_until_the_end():
    model = network()
    shadow = averaged(model)
    before, expected = bits(model), expected_of(shadow)
    with shadow.swapped(model):
        update_bn(model, images(), shadow=shadow)
        assert shadow.is_swapped
        for name in ('1.running_mean', '1.running_var', '6.running_var'):
            assert torch.equal(model.get_buffer(name), expected[name])
    assert_same_bits(bits(model), before)
    assert_same_bits(dict(shadow.named_buffers()), expected)
    with shadow.swapped(model):
        assert torch.equal(model[1].running_mean, expected['1.running_mean'])


def test_statistics_of_an_average_in_float32_of_a_bfloat16_model_keep_their_dtype():
    model = network().bfloat16()
    shadow = ShadowModel(model)
    update_bn(model, [x.bfloat16() for x in images()], shadow=shadow)
    assert dict(shadow.named_buffers())['1.running_mean'].dtype == torch.float32
    assert dict(shadow.named_buffers())['1.running_mean'].abs().sum() > 0
    assert model[1].running_mean.abs().sum() == 0


@pytest.mark.parametrize('shadow', [network(), torch.optim.SGD(network().parameters(), lr=1.0)])
def test_what_is_no_shadow_is_refused(shadow):
    with pytest.raises(TypeError, match=r'shadow must be a ShadowModel, got .* Pass optimizer\.shadow'):
        update_bn(network(), images(), shadow=shadow)


def test_a_shadow_without_the_statistics_is_refused_by_name():
    model = network()
    shadow = ShadowModel(model, exclude=r'^1\.running')
    before = bits(model)
    with pytest.raises(ValueError, match=r'does not track 1\.running_mean, 1\.running_var'):
        update_bn(model, images(), shadow=shadow)
    assert_same_bits(bits(model), before)


def test_a_shadow_that_is_swapped_into_another_model_is_refused():
    model, other = network(), network()
    shadow = averaged(model)
    with shadow.swapped(model):
        assert shadow.is_swapped_into(model)
        assert not shadow.is_swapped_into(other)
        with pytest.raises(ValueError, match='another model'):
            update_bn(other, images(), shadow=shadow)
        assert shadow.is_swapped
    assert not shadow.is_swapped_into(model)


# The bar


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize(('shown', 'stream', 'seen'), [
    (True, Terminal, True), (False, Terminal, False), (True, io.StringIO, False),
])  # fmt: skip
def test_a_bar_is_shown_on_a_terminal_unless_turned_off(monkeypatch, shown, stream, seen):
    pytest.importorskip('rich')
    written = stream()
    monkeypatch.setattr(sys, 'stderr', written)
    monkeypatch.setenv('TERM', 'xterm')
    update_bn(network(), DataLoader(TensorDataset(torch.cat(images())), 6), progress_bar=shown)
    assert ('BatchNorm statistics' in written.getvalue()) == seen
    assert ('4/4' in written.getvalue()) == seen


# Two processes


class WithoutDevice(nn.SyncBatchNorm):
    """Averages means and variances of all processes on the CPU, which torch's own refuses to."""

    def forward(self, x):
        if not self.training:
            return super().forward(x)
        moments = torch.stack([x.mean(0), x.var(0)])
        dist.all_reduce(moments)
        moments /= 2
        self.num_batches_tracked += 1
        share = 1 / self.num_batches_tracked.item()
        self.running_mean.lerp_(moments[0], share)
        self.running_var.lerp_(moments[1], share)
        return x


def _on_each_rank(rank, folder):
    torch.set_num_threads(1)
    faulthandler.dump_traceback_later(60, exit=True)  # a process that waits for the other for ever says where
    store, patience = f'file://{folder}/store', timedelta(seconds=30)
    dist.init_process_group('gloo', init_method=store, rank=rank, world_size=2, timeout=patience)
    told = {}
    shard = images(5)[:3] if rank == 0 else images(5)[3:]

    model = network()
    update_bn(DistributedDataParallel(model), shard)
    told['uneven'] = statistics(model)

    model = network()
    shadow = ShadowModel(model)
    update_bn(model, shard, shadow=shadow)
    told['shadow'], told['model'] = dict(shadow.named_buffers()), statistics(model)

    model = network()
    update_bn(model, shard if rank else [])
    told['one_empty'] = statistics(model)

    model = network()
    model.append(nn.BatchNorm1d(1)).get_buffer('8.running_mean').fill_(7)
    update_bn(model, shard, forward=lambda model, batch: model[:8](batch))
    told['unreached'] = model[8].running_mean.item()

    model = network()
    update_bn(model, shard, synchronize=False)
    told['own'] = statistics(model)

    model = network()
    model[1].running_mean.fill_(rank)
    told['errors'] = []
    with pytest.raises(ValueError) as caught:
        update_bn(model, [])
    told['errors'].append(str(caught.value))
    told['kept'] = model[1].running_mean.tolist()

    flat = [batch.flatten(1)[:, :2] for batch in images(4)]
    model = WithoutDevice(2)
    update_bn(model, flat[rank::2])
    told['synced'] = statistics(model)
    for arguments in ({}, {'synchronize': False}):
        with pytest.raises(ValueError) as caught:
            update_bn(model, flat[: 2 + rank], **arguments)
        told['errors'].append(str(caught.value))
    update_bn(model, flat[rank : 3 + 2 * rank], num_batches=2)

    torch.save(told, f'{folder}/{rank}.new')
    Path(folder, f'{rank}.new').rename(Path(folder, f'{rank}.pt'))
    while not Path(folder, f'{1 - rank}.pt').exists():
        time.sleep(0.01)
    # DDP, destroyed, joins gloo's threads while it holds the interpreter's lock, which they may wait for.
    os._exit(0)


@pytest.fixture(scope='module')
def both_ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp('ranks')
    mp.start_processes(_on_each_rank, args=(str(folder),), nprocs=2, start_method='spawn')
    return [torch.load(folder / f'{rank}.pt', weights_only=True) for rank in (0, 1)]


def whole(batches):
    model = network()
    update_bn(model, batches)
    return statistics(model)


def assert_close(found, expected):
    # A process with another number of threads may add a matrix product up in another order.
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ('key', 'batches'), [('uneven', images(5)), ('shadow', images(5)), ('one_empty', images(5)[3:])]
)
def test_two_processes_have_the_statistics_of_one_that_saw_all_batches(both_ranks, key, batches):
    assert_same_bits(both_ranks[0][key], both_ranks[1][key])
    assert_close(both_ranks[0][key], whole(batches))
    assert both_ranks[0][key]['1.num_batches_tracked'] == len(batches)


def test_on_two_processes_an_average_leaves_the_models_statistics_alone(both_ranks):
    for told in both_ranks:
        assert_same_bits(told['model'], statistics(network()))


def test_without_synchronizing_each_process_has_its_own(both_ranks):
    assert_close(both_ranks[0]['own'], whole(images(5)[:3]))
    assert_close(both_ranks[1]['own'], whole(images(5)[3:]))


def test_a_layer_that_no_process_reaches_keeps_its_statistics(both_ranks):
    assert [told['unreached'] for told in both_ranks] == [7, 7]


def test_no_batch_on_any_process_is_an_error_on_all(both_ranks):
    for rank, told in enumerate(both_ranks):
        assert 'no batch reached' in told['errors'][0]
        assert told['kept'] == [rank] * 3


def test_batches_that_processes_share_count_once(both_ranks):
    flat = [batch.flatten(1)[:, :2] for batch in images(4)]
    for told in both_ranks:
        assert told['synced']['num_batches_tracked'] == 2
        torch.testing.assert_close(told['synced']['running_mean'], torch.stack([x.mean(0) for x in flat]).mean(0))


def test_uneven_loaders_of_a_synchronized_model_are_an_error_on_every_process(both_ranks):
    for told in both_ranks:
        assert 'after 2 batches only 1 of 2 processes' in told['errors'][1]
        assert 'synchronize=False cannot take effect' in told['errors'][2]
