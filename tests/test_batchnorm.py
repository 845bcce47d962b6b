"""BatchNorm's statistics: by hand, as torch's, on two processes, for an average, and nothing else touched."""

import collections
import copy
import faulthandler
import functools
import importlib.util
import io
import itertools
import logging
import os
import random
import sys
import threading
import time
from contextlib import nullcontext
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

from composer_ema import ShadowModel, ShadowModels, update_bn
from composer_ema.model import rollback

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
    kind = ValueError if type(size) is int else TypeError
    with pytest.raises(kind, match='microbatch_size must be a number of samples above 0'):
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
    model[5].eval()
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


# What a layer may be


class StaysInEvaluation(nn.BatchNorm1d):
    def train(self, mode=True):
        return super().train(False)


class FreezesItsNorms(nn.Sequential):
    def train(self, mode=True):
        super().train(mode)
        self[0].eval()
        return self


def in_evaluation_by_hand():
    model = nn.Sequential(nn.BatchNorm1d(1), nn.BatchNorm1d(1))
    model[0].eval()
    return model


def without_tracking():
    model = nn.Sequential(nn.BatchNorm1d(1), nn.BatchNorm1d(1))
    model[0].track_running_stats = False
    return model


class EvaluatesInItsForward(nn.Sequential):
    def forward(self, x):
        self[0].eval()
        return super().forward(x)


FROZEN = {
    'layer': lambda: nn.Sequential(StaysInEvaluation(1), nn.BatchNorm1d(1)),
    'model': lambda: FreezesItsNorms(nn.BatchNorm1d(1), nn.BatchNorm1d(1)),
    'by_hand': in_evaluation_by_hand,
    'in_forward': lambda: EvaluatesInItsForward(nn.BatchNorm1d(1), nn.BatchNorm1d(1)),
}


@pytest.mark.parametrize('build', FROZEN.values(), ids=FROZEN)
@pytest.mark.parametrize('averaging', [False, True])
def test_a_frozen_layer_keeps_its_statistics_and_the_others_see_what_it_passes_on(build, averaging):
    model = build()
    model[0].running_mean.fill_(3.0)
    model[0].running_var.fill_(4.0)
    model[0].num_batches_tracked.fill_(9)
    shadow = ShadowModel(model) if averaging else None
    with pytest.warns(UserWarning, match=r'frozen keep their statistics.*: 0\. To have theirs computed, put them in'):
        update_bn(model, [torch.tensor([[1.0], [5.0]]), torch.tensor([[5.0], [9.0]])], shadow=shadow)
    found = dict(model.named_buffers()) if shadow is None else dict(shadow.named_buffers())
    assert found['0.running_mean'].item() == 3
    assert found['0.running_var'].item() == 4
    assert found['0.num_batches_tracked'] == 9
    assert found['1.running_mean'].item() == pytest.approx((0 + 2) / 2, rel=1e-5)
    assert found['1.running_var'].item() == pytest.approx(2, rel=1e-5)
    assert found['1.num_batches_tracked'] == 2


def test_a_layer_that_has_ceased_to_track_keeps_its_statistics():
    model = without_tracking()
    model[0].running_mean.fill_(3.0)
    with pytest.warns(UserWarning, match=r'do not track statistics: 0\.'):
        update_bn(model, [X])
    assert model[0].running_mean.item() == 3
    assert model[0].num_batches_tracked == 0
    assert model[1].num_batches_tracked == 1


def test_a_model_in_which_every_layer_is_frozen_is_not_run():
    model = nn.Sequential(*(StaysInEvaluation(1) for _ in range(20)))
    before = bits(model)
    with pytest.warns(UserWarning, match=r': 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11 and 8 more\.'):
        update_bn(model, breaking([]))
    assert_same_bits(bits(model), before)
    with pytest.warns(UserWarning, match='the model itself'):
        update_bn(StaysInEvaluation(1), breaking([]))


def test_a_shadow_need_not_track_the_statistics_of_a_frozen_layer():
    model = FROZEN['layer']()
    shadow = ShadowModel(model, exclude=r'^0\.running')
    with pytest.warns(UserWarning, match='frozen'):
        update_bn(model, [X], shadow=shadow)
    assert dict(shadow.named_buffers())['1.num_batches_tracked'] == 1


def test_statistics_that_are_kept_are_not_rounded_to_the_models_dtype():
    model = nn.Sequential(StaysInEvaluation(1), nn.BatchNorm1d(1)).bfloat16()
    shadow = ShadowModel(model)
    kept = dict(shadow.named_buffers())['0.running_mean'].fill_(0.1)
    with pytest.warns(UserWarning, match='frozen'):
        update_bn(model, [X.bfloat16()], shadow=shadow)
    assert kept.item() == torch.tensor(0.1).item()


@needs_composer
def test_ghost_batches_each_count_as_a_batch():
    from composer.algorithms.ghost_batchnorm import apply_ghost_batchnorm

    model = nn.Sequential(nn.BatchNorm1d(1, momentum=0.2))
    apply_ghost_batchnorm(model, ghost_batch_size=2)
    update_bn(model, [torch.tensor([[1.0], [3.0], [5.0], [9.0]]), torch.tensor([[2.0], [4.0]])])
    layer = model[0].batchnorm
    assert layer.running_mean.item() == pytest.approx((2 + 7 + 3) / 3)
    assert layer.running_var.item() == pytest.approx((2 + 8 + 2) / 3)
    assert layer.num_batches_tracked == 3
    assert layer.momentum == 0.2


class ReplacesItsStatistics(nn.BatchNorm1d):
    """As some write BatchNorm by hand: momentum is a number, nothing is counted, tensors are replaced."""

    def forward(self, x):
        if self.training:
            self.running_mean = (1 - self.momentum) * self.running_mean + self.momentum * x.mean(0)
            self.running_var = (1 - self.momentum) * self.running_var + self.momentum * x.var(0)
        return x


@pytest.mark.parametrize('averaging', [False, True])
def test_a_layer_written_by_hand_gets_the_means_in_the_buffers_that_it_had(averaging):
    model = ReplacesItsStatistics(1)
    held = [model.running_mean, model.running_var]
    shadow = ShadowModel(model) if averaging else None
    update_bn(model, [torch.tensor([[1.0], [3.0]]), torch.tensor([[5.0], [9.0]])], shadow=shadow)
    found = dict((shadow or model).named_buffers())
    assert found['running_mean'].item() == pytest.approx(4.5)
    assert found['running_var'].item() == pytest.approx(5)
    assert model.running_mean is held[0]
    assert model.running_var is held[1]
    if averaging:
        assert model.running_mean.item() == 0


def test_a_layer_without_a_counter_and_one_that_is_called_by_its_forward_get_the_means():
    class Calls(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm1d(1)
            self.norm.num_batches_tracked = None

        def forward(self, x):
            return self.norm.forward(x)

    model = Calls()
    update_bn(model, [torch.tensor([[1.0], [3.0]]), torch.tensor([[5.0], [9.0]])])
    assert model.norm.running_mean.item() == 4.5
    assert model.norm.running_var.item() == 5


def test_statistics_that_are_not_finite_do_not_stay():
    model = nn.BatchNorm1d(1)
    model.running_mean.fill_(torch.nan)
    model.running_var.fill_(torch.inf)
    update_bn(model, [X])
    assert model.running_mean.item() == 2
    assert model.running_var.item() == 2


def test_instance_norm_that_tracks_statistics_gets_the_means_over_batches():
    model = nn.InstanceNorm1d(1, track_running_stats=True)
    update_bn(model, [torch.tensor([[[1.0, 3.0]], [[5.0, 9.0]]]), torch.tensor([[[0.0, 2.0]]])])
    assert model.running_mean.item() == pytest.approx((4.5 + 1) / 2)
    assert model.running_var.item() == pytest.approx((5 + 2) / 2)


def test_a_scripted_layer_keeps_its_statistics_and_is_named():
    model = nn.Sequential(torch.jit.script(nn.Sequential(nn.BatchNorm1d(1))), nn.BatchNorm1d(1))
    with pytest.warns(UserWarning, match=r'scripted BatchNorm layers keep .*: 0\.0\. .* that was scripted'):
        update_bn(model, [X])
    assert model[0][0].running_mean.item() == 0
    assert model[1].num_batches_tracked == 1


def test_a_lazy_parameter_is_refused():
    with pytest.raises(ValueError, match=r'0\.weight is a lazy parameter without a shape\. Run one forward pass first'):
        update_bn(nn.Sequential(nn.LazyLinear(1), nn.BatchNorm1d(1)), [X])


def test_a_lazy_layer_is_refused():
    with pytest.raises(ValueError, match=r'0 is a lazy layer without a shape\. Run one forward pass first'):
        update_bn(nn.Sequential(nn.LazyBatchNorm1d(affine=False)), [X])


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear, self.norm = nn.Linear(1, 2), nn.BatchNorm1d(2)

    def forward(self, x):
        return self.norm(self.linear(x))


def test_compiled_parts_are_computed_without_being_compiled_anew():
    compilations = []

    def backend(graph, inputs):
        compilations.append(graph)
        return graph.forward

    torch.manual_seed(0)
    plain = nn.Sequential(Block())
    compiled = nn.Sequential(torch.compile(copy.deepcopy(plain[0]), backend=backend))
    compiled(X)
    assert len(compilations) == 1
    for model in (plain, compiled):
        update_bn(model, [X, X + 1, X * 3])
    assert_same_bits(statistics(plain), {n.replace('_orig_mod.', ''): b for n, b in statistics(compiled).items()})
    compiled(X)
    assert compiled[0].norm.num_batches_tracked == 4
    assert len(compilations) == 1


# What the code of a model keeps in Python


class Slotted:
    __slots__ = ('best', 'calls', 'values')

    def __init__(self):
        self.calls, self.values = 0, []

    def add(self, value):
        self.calls += 1
        self.values.append(value)
        self.best = value


class Named(Slotted):  # has a dictionary beside the slots
    def add(self, value):
        super().add(value)
        self.name = value


class Meter:
    def __init__(self):
        self.values, self.best = [], None

    def add(self, value):
        self.values.append(value)
        self.best = value


class Remembers(nn.Module):
    """Keeps whatever a module can keep between two calls, and lets it tell on its output."""

    def __init__(self):
        super().__init__()
        self.calls, self.items, self.named = 0, [], collections.OrderedDict(a=1, b=2)
        self.recent, self.seen = collections.deque(maxlen=2), set()
        self.total, self.cache, self.array = torch.zeros(1), None, np.zeros(2)
        self.torch_generator = torch.Generator().manual_seed(1)
        self.numpy_generator, self.python_generator = np.random.default_rng(1), random.Random(1)
        self.meter, self.nested, self.raw = Meter(), {'deep': [{'count': 0}]}, bytearray(1)
        self.hidden, self.slotted = [nn.BatchNorm1d(1)], [Slotted(), Named()]
        self.scale = nn.Parameter(torch.ones(1))
        self.view = self.scale.data.view(-1)

    def forward(self, x):
        self.calls += 1
        self.items.append(self.calls)
        self.named.pop('a', None)
        self.named['a'] = self.named['c'] = self.calls
        self.recent.append(self.calls)
        self.seen.add(self.calls)
        self.total += x.mean()
        self.cache = x * self.scale
        self.array[0] += 1
        self.raw[0] += 1
        self.meter.add(self.calls)
        self.nested['deep'][0]['count'] += 1
        for each in self.slotted:
            each.add(self.calls)
        self.hidden[0](x)
        self.later = self.calls
        draws = torch.rand(1, generator=self.torch_generator), self.numpy_generator.random(), self.python_generator
        return self.cache + self.total + draws[0] + draws[1] + draws[2].random() + len(self.items) + self.array[0]


def remembered(model):
    state = {key: value for key, value in vars(model).items() if not key.startswith('_')}
    state.pop('cache', None)
    generators = [state.pop(f'{name}_generator') for name in ('torch', 'numpy', 'python')]
    hidden, meter = state.pop('hidden')[0], state.pop('meter')
    slots = [
        (each.calls, each.values, getattr(each, 'best', None), vars(each) if isinstance(each, Named) else ())
        for each in state.pop('slotted')
    ]
    states = generators[0].get_state(), generators[1].bit_generator.state, generators[2].getstate()
    return copy.deepcopy([sorted(state), state, vars(meter), slots, bits(hidden), states, list(state['named'])])


@pytest.mark.parametrize('averaging', [False, True])
@pytest.mark.parametrize('failing', [False, True])
def test_what_modules_keep_in_python_is_as_if_they_had_not_been_run(averaging, failing):
    model = nn.Sequential(Remembers(), nn.BatchNorm1d(1))
    for batch in (X, X + 1):
        model(batch)
    del model[0].slotted[0].best
    cache, items = model[0].cache, model[0].items
    before, expected = remembered(model[0]), copy.deepcopy(model[0].meter)
    twin_of_hidden = model[0].hidden[0]
    shadow = ShadowModel(model) if averaging else None
    batches = breaking([X, X]) if failing else [X, X, X]
    with pytest.raises(Broken) if failing else nullcontext():
        update_bn(model, batches, shadow=shadow)
    after = remembered(model[0])
    assert str(after) == str(before)  # tensors are shown in full
    assert vars(model[0].meter) == vars(expected)
    assert not hasattr(model[0].slotted[0], 'best')
    assert model[0].cache is cache
    assert model[0].items is items
    assert model[0].hidden[0] is twin_of_hidden
    cache.sum().backward()  # the graph that waited is valid
    assert 'forward' not in vars(model[1])


def test_a_hook_that_writes_into_a_list_of_the_module_is_seen_by_its_forward():
    model = nn.Sequential(nn.Linear(1, 1), nn.BatchNorm1d(1))
    model.features = features = []
    model[0].register_forward_hook(lambda *_: features.append(_[2]))
    update_bn(model, [X, X], forward=lambda model, x: (model(x), model.features[-1].sum()))
    assert features == []


def test_what_stands_around_a_model_is_left_alone_and_named(caplog):
    class Around:
        def __init__(self, model):
            self.model, self.lock, self.calls = model, threading.Lock(), 0

    model = nn.Sequential(nn.BatchNorm1d(1))
    model.around, model.shadow = Around(model), ShadowModel(model)

    def forward(model, x):
        model.around.calls += 1
        return model(x)

    with caplog.at_level(logging.INFO, 'composer_ema'):
        update_bn(model, [X, X], forward=forward, shadow=model.shadow)
    assert model.around.calls == 2
    assert 'around (Around)' in caplog.text
    assert dict(model.shadow.named_buffers())['0.running_mean'].item() == 2


# Parameters that the forward writes


class Writes(nn.Module):
    """Moves its parameters in its forward, as a momentum encoder, a codebook or a clamp do."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(1)
        self.trained, self.excluded = nn.Parameter(torch.ones(1)), nn.Parameter(torch.ones(1))
        self.frozen = nn.Parameter(torch.ones(1), requires_grad=False)
        self.replaced, self.hidden = nn.Parameter(torch.ones(1)), [nn.Parameter(torch.ones(1))]
        self.register_buffer('graph', torch.eye(1).to_sparse())

    def forward(self, x):
        with torch.no_grad():
            for parameter in (self.trained, self.excluded, self.frozen, self.hidden[0]):
                parameter.mul_(0.5)
            self.frozen.data.add_(self.trained)
            self.excluded.data = self.excluded * 3
            self.replaced = nn.Parameter(self.replaced * 0.5)
            self.graph.mul_(2)
        return self.norm(x * self.trained)


def parameters_of(model):
    return {**dict(model.named_parameters()), 'hidden': model.hidden[0]}


@pytest.mark.parametrize('failing', [False, True])
@pytest.mark.parametrize('lent', ['not', 'by the pass', 'before'])
def test_parameters_that_a_forward_writes_keep_every_bit_and_their_memory(lent, failing):
    model = Writes()
    shadow = ShadowModel(model, exclude='^excluded$')
    with torch.no_grad():
        for parameter in parameters_of(model).values():
            parameter.fill_(3)
    averages = bits_of(dict(shadow.named_parameters()))
    with shadow.swapped(model) if lent == 'before' else nullcontext():
        held = parameters_of(model)
        before = bits_of(held), {name: parameter.data_ptr() for name, parameter in held.items()}
        with pytest.raises(Broken) if failing else nullcontext():
            update_bn(model, breaking([X, X]) if failing else [X, X], shadow=None if lent == 'not' else shadow)
        assert all(parameter is held[name] for name, parameter in parameters_of(model).items())
        assert (bits_of(held), {name: parameter.data_ptr() for name, parameter in held.items()}) == before
        assert model.graph.to_dense().item() == 1
    assert bits_of(parameters_of(model)) == {name: [3.0] for name in held}
    assert bits_of(dict(shadow.named_parameters())) == averages


def bits_of(tensors):
    return {name: tensor.tolist() for name, tensor in tensors.items()}


def test_only_parameters_that_no_loan_returns_are_copied(monkeypatch):
    model, copied = Writes(), []
    shadow = ShadowModel(model, exclude='^excluded$')
    noted = rollback._Noted.of

    def note(tensor, *, copied_too=copied, copied):
        copied_too += [tensor] if copied and isinstance(tensor, nn.Parameter) else []
        return noted(tensor, copied=copied)

    monkeypatch.setattr(rollback._Noted, 'of', note)
    update_bn(model, [X], shadow=shadow)
    names = {id(parameter): name for name, parameter in parameters_of(model).items()}
    assert {names[id(tensor)] for tensor in copied} == {'excluded', 'frozen', 'hidden'}


def test_inference_tensors_are_put_back():
    with torch.inference_mode():
        model = Writes()
        before = bits_of(parameters_of(model))
        update_bn(model, [X, X])
        assert bits_of(parameters_of(model)) == before


def test_parameters_that_wrap_other_tensors_are_put_back():
    from torch.testing._internal.two_tensor import TwoTensor

    model = nn.Sequential(nn.BatchNorm1d(1))
    model.pair = nn.Parameter(TwoTensor(torch.ones(1), torch.ones(1)))
    update_bn(model, [X], forward=lambda model, x: (model.pair.mul_(2), model(x)))
    assert (model.pair.a.item(), model.pair.b.item()) == (1, 1)


# What draws random numbers, or goes on, in the data


class Noisy(torch.utils.data.Dataset):
    def __init__(self):
        self.draw, self.scale = torch.Generator().manual_seed(1), np.random.default_rng(1)
        self.transforms = [functools.partial(self.shift, random.Random(1))]

    def shift(self, generator, x):
        return x + generator.random()

    def __len__(self):
        return 4

    def __getitem__(self, index):
        x = torch.rand(1, generator=self.draw) * self.scale.random()
        return self.transforms[0](x)


def test_generators_of_a_data_set_and_its_transforms_are_as_before():
    data = Noisy()
    loader = DataLoader(data, 2)
    expected = torch.cat(list(DataLoader(copy.deepcopy(data), 2)))
    update_bn(nn.BatchNorm1d(1), loader)
    assert torch.equal(torch.cat(list(loader)), expected)


class Drawing(torch.utils.data.Dataset):
    def __len__(self):
        return 4

    def __getitem__(self, index):
        return torch.rand(1)


def test_persistent_workers_go_on_as_if_there_had_been_no_pass_and_may_be_in_one():
    drawn = []
    for refreshing in (False, True):
        torch.manual_seed(0)
        loader = DataLoader(Drawing(), 2, num_workers=1, persistent_workers=True)
        model, batches = nn.BatchNorm1d(1), iter(loader)
        drawn.append([next(batches)])
        if refreshing:
            update_bn(model, loader)
            assert model.num_batches_tracked == 2
        drawn[-1] += [*batches, *loader]
    assert torch.equal(torch.cat(drawn[0]), torch.cat(drawn[1]))


def test_an_embedding_that_is_renormalized_when_it_is_read_keeps_its_weights():
    model = nn.Sequential(nn.Embedding(2, 3, max_norm=1.0), nn.BatchNorm1d(3))
    with torch.no_grad():
        model[0].weight.fill_(5.0)
    update_bn(model, [torch.tensor([0, 1])])
    assert model[0].weight.eq(5).all()


def test_an_iterator_of_a_module_is_left_alone_and_named(caplog):
    model = nn.Sequential(nn.BatchNorm1d(1))
    model.count = itertools.count()
    with caplog.at_level(logging.INFO, 'composer_ema'):
        update_bn(model, [X, X], forward=lambda model, x: (next(model.count), model(x)))
    assert 'count (count)' in caplog.text


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
    with pytest.raises(ValueError if type(number) is int else TypeError, match='num_batches'):
        update_bn(network(), images(), num_batches=number)


def test_a_sharded_model_is_refused_by_the_name_of_a_parameter():
    model = network()
    next(model.parameters())._fsdp_flattened = True  # as FSDP marks it
    name = next(name for name, _ in model.named_parameters())
    with pytest.raises(NotImplementedError, match=f'{name} is a parameter of FSDP1.*fully_shard'):
        update_bn(model, images())


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


def test_of_several_averages_one_is_asked_for():
    model = network()
    with pytest.raises(TypeError, match=r"got ShadowModels\. Pass one of the averages, shadow\['short'\]\.$"):
        update_bn(model, images(), shadow=ShadowModels(model, ['short', 'long']))


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

    told['failed'] = []
    for model, batches in ((network(), shard), (WithoutDevice(2), flat)):
        before = bits(model)
        with pytest.raises(Broken if rank else RuntimeError) as caught:
            update_bn(model, breaking(batches[:1]) if rank else batches)
        told['failed'].append(str(caught.value))
        assert_same_bits(bits(model), before)

    class Frozen(WithoutDevice):
        def train(self, mode=True):
            return super().train(False)

    model = network()
    model.append(Frozen(2))
    with pytest.warns(UserWarning, match=r'frozen keep their statistics.*: 8\.'):
        update_bn(model, shard)
    told['beside_frozen'] = statistics(model[:8])
    told['frozen'] = model[8].running_mean.tolist()

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


def test_a_process_that_fails_ends_the_pass_on_every_process(both_ranks):
    for message in both_ranks[0]['failed']:
        assert '1 of 2 processes could not run their batches' in message


def test_on_two_processes_a_frozen_layer_is_kept_and_need_not_be_in_step(both_ranks):
    for told in both_ranks:
        assert told['frozen'] == [0, 0]
        assert_close(told['beside_frozen'], whole(images(5)))
