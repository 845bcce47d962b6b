"""Which buffers are averaged, which are copied, and which stay as the model has them."""

import functools

import pytest
import torch
from plain import One, set_
from torch import nn

from composer_ema import ShadowModel, compute_ema

pytestmark = pytest.mark.filterwarnings('error', r'ignore:`torch.jit:FutureWarning', 'ignore::DeprecationWarning:torch')


@pytest.fixture
def net() -> nn.Module:
    """A normalisation layer and a buffer of every kind."""
    net = nn.Module()
    net.norm = nn.BatchNorm1d(4)
    net.register_buffer('mask', torch.tensor([True, False]))
    net.register_buffer('cache', torch.zeros(2), persistent=False)
    return net


@pytest.mark.parametrize(
    ('before', 'after'),
    [
        (torch.full((2, 2), -torch.inf).triu(1), torch.full((2, 2), -torch.inf).triu(1)),
        (torch.tensor(torch.inf), torch.tensor(1.0)),
        (torch.ones(2), torch.tensor([0.0, 1.0])),
    ],
    ids=['causal mask', 'observer', 'pruning mask'],
)
def test_what_is_no_statistic_is_copied(before, after):
    model = One()
    model.register_buffer('buffer', before.clone())
    shadow = ShadowModel(model)
    model.buffer = after
    shadow.update(model, smoothing=0.9)
    assert torch.equal(dict(shadow.named_buffers())['buffer'], after)


@pytest.mark.parametrize(
    'layer',
    [
        nn.BatchNorm1d(2),
        nn.BatchNorm3d(2),
        nn.SyncBatchNorm(2),
        nn.InstanceNorm2d(2, track_running_stats=True),
        type('Renorm', (nn.BatchNorm2d,), {})(2),
    ],
    ids=lambda layer: type(layer).__name__,
)
def test_statistics_are_known_by_the_type_of_their_layer(layer):
    layer.register_buffer('limit', torch.zeros(2))
    model = nn.Sequential(layer)
    shadow = ShadowModel(model)
    for name in ('running_mean', 'running_var', 'limit'):
        set_(getattr(layer, name), 8)
    shadow.update(model, smoothing=0.75)
    kept = {name: buffer.reshape(-1)[0].item() for name, buffer in shadow.named_buffers()}
    assert kept['0.running_mean'] == 2  # from 0
    assert kept['0.running_var'] == 2.75  # from 1
    assert kept['0.limit'] == 8


def test_spectral_norm_keeps_its_unit_vectors():
    torch.manual_seed(0)
    model = nn.utils.parametrizations.spectral_norm(nn.Linear(5, 5))
    shadow = ShadowModel(model)
    for _ in range(20):
        nn.init.normal_(model.parametrizations.weight.original)
        model(torch.randn(2, 5))
        shadow.update(model, smoothing=0.9)
    for name in ('_u', '_v'):
        assert dict(shadow.named_buffers())[f'parametrizations.weight.0.{name}'].norm().item() == pytest.approx(1)


@pytest.mark.parametrize(
    ('buffers', 'expected'),
    [
        ('statistics', {'scale': 8, 'bias': 8, 'norm.running_mean': 2}),
        ('average', {'scale': 2, 'bias': 2, 'norm.running_mean': 2}),
        ('copy', {'scale': 8, 'bias': 8, 'norm.running_mean': 8}),
        ({'sca': 'average'}, {'scale': 2, 'bias': 8, 'norm.running_mean': 2}),
        ({'mean$': 'copy', '^b|norm': 'average'}, {'scale': 8, 'bias': 2, 'norm.running_mean': 8}),
    ],
    ids=str,
)
def test_buffers_decides_by_one_mode_or_by_pattern(buffers, expected):
    model = nn.Module()
    model.norm = nn.BatchNorm1d(1)
    model.register_buffer('scale', torch.zeros(1))
    model.register_buffer('bias', torch.zeros(1))
    shadow = ShadowModel(model, buffers=buffers)
    for name in expected:
        set_(model.get_buffer(name), 8)
    shadow.update(model, smoothing=0.75)
    kept = dict(shadow.named_buffers())
    assert {name: kept[name].item() for name in expected} == expected
    other = nn.Module()
    other.norm = nn.BatchNorm1d(1)
    for name in ('scale', 'bias'):
        other.register_buffer(name, torch.zeros(1))
    compute_ema(model, other, smoothing=0.75, buffers=buffers)
    assert {name: other.get_buffer(name).item() for name in expected} == expected


@pytest.mark.parametrize(
    ('buffers', 'message'),
    [
        ({}, 'a mapping without patterns'),
        ({'mask': 'mean'}, "'average' or 'copy', got 'mean' for 'mask'"),
        ({'nowhere': 'copy'}, "pattern 'nowhere' matches nothing: the model has the buffers mask, cache, norm"),
        ({'mask': 'average'}, "pattern 'mask' averages nothing: mask holds whole numbers"),
        ({'(': 'copy'}, 'buffers'),
        (
            {'.*': 'copy', 'running_mean': 'average'},
            r"'running_mean' decides nothing: .* '\.\*' before it is found in norm\.running_mean\. Put it first",
        ),
        ({'mean': 'copy', 'var': 'copy', 'norm.running': 'copy'}, "'norm.running' decides nothing: .* 'mean', 'var'"),
        ({'cache|norm': 'average', '.*': 'average'}, r"'\.\*' averages nothing: mask holds whole numbers"),
    ],
    ids=str,
)
def test_patterns_that_cannot_take_effect_are_refused(net, buffers, message):
    with pytest.raises(ValueError, match=message):
        ShadowModel(net, buffers=buffers)


@pytest.mark.parametrize('function', [None, lambda averaged, current, count: (averaged + current) / 2])
def test_a_statistic_recovers_from_what_is_not_finite(function):
    model = nn.BatchNorm1d(2)
    shadow = ShadowModel(model, avg_fn=function)
    update = shadow.update if function else functools.partial(shadow.update, smoothing=0.5)
    update(model)  # a function's first update copies
    for value, expected in ((torch.inf, torch.inf), (4.0, 4.0), (8.0, 6.0)):
        model.running_mean[1] = value
        update(model)
        assert dict(shadow.named_buffers())['running_mean'].tolist() == [0, expected]


def test_what_is_averaged_is_listed_once(net, caplog):
    net.register_buffer('adjacency', torch.eye(2).to_sparse())
    shadow = ShadowModel(net)
    with caplog.at_level('INFO', logger='composer_ema'):
        for _ in range(3):
            net.cache = torch.zeros(3)
            shadow.update(net, smoothing=0.5)
    listed = [record.getMessage() for record in caplog.records if record.getMessage().startswith('buffers:')]
    assert listed == [
        'buffers: averaging norm.running_mean, norm.running_var; copying 3 others; leaving adjacency to the model, '
        'which cannot be kept'
    ]


def test_statistics_of_a_scripted_layer_are_known_by_its_name():
    model = torch.jit.script(nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)))
    shadow = ShadowModel(model)
    set_(dict(model.named_buffers())['1.running_mean'], 8)
    shadow.update(model, smoothing=0.75)
    assert dict(shadow.named_buffers())['1.running_mean'].tolist() == [2, 2]


def test_a_buffer_that_is_a_view_of_a_parameter_shows_what_that_shows():
    model, other = One(0.0), One(0.0)
    for module in (model, other):
        module.register_buffer('view', module.weight.data.view(1, 1))
    shadow = ShadowModel(model)
    set_(model.weight, 8)
    shadow.update(model, smoothing=0.75)
    with shadow.swapped(model):
        assert model.weight.item() == model.view.item() == 2
    assert model.weight.item() == model.view.item() == 8
    assert not dict(shadow.named_buffers())
    model.view = torch.full((1, 1), 8.0)
    shadow.update(model, smoothing=1.0)
    assert list(dict(shadow.named_buffers())) == ['view']
    model.view = model.weight.data.view(1, 1)
    shadow.update(model, smoothing=1.0)
    assert not dict(shadow.named_buffers())
    compute_ema(model, other, smoothing=0.75)
    assert other.weight.item() == other.view.item() == 2


def test_a_lazy_buffer_is_named():
    with pytest.raises(ValueError, match=r'1\.running_mean is a lazy buffer without a shape\. Run one forward pass'):
        ShadowModel(nn.Sequential(nn.Linear(2, 2), nn.LazyBatchNorm1d(affine=False)))


def test_a_copied_buffer_that_has_changed_keeps_its_value_where_the_average_is_copied():
    model = One(0.0)
    model.register_buffer('scale', torch.zeros(2))
    shadow = ShadowModel(model)
    set_(model.weight, 8)
    shadow.update(model, smoothing=0.75)
    model.scale = torch.ones(3)
    assert shadow.to_averaged_model(model).module.scale.tolist() == [1, 1, 1]
    assert shadow.averaged_state_dict(model)['scale'].tolist() == [1, 1, 1]
    model.scale = torch.tensor([True, False])
    assert shadow.averaged_state_dict(model)['scale'].tolist() == [True, False]
    shadow.copy_to(model)
    assert model.weight.item() == 2
    assert model.scale.tolist() == [True, False]


def test_a_state_without_an_averaged_buffer_that_the_run_dropped_loads():
    model = One(0.0)
    model.register_buffer('seen', torch.zeros(2))
    shadow = ShadowModel(model, buffers='average')
    del model.seen
    shadow.update(model, smoothing=0.5)
    state = shadow.state_dict()
    model.register_buffer('seen', torch.ones(2))
    ShadowModel(model, buffers='average').load_state_dict(state)


@pytest.mark.parametrize('wrap', [nn.DataParallel, torch.compile, torch.optim.swa_utils.AveragedModel])
def test_the_state_dict_of_a_wrapped_model_is_an_average_of_it(wrap):
    model = wrap(nn.Sequential(nn.Linear(1, 1, bias=False), nn.BatchNorm1d(1)))
    inner = next(iter(model.parameters()))
    set_(inner, 0)
    average = {name: value.clone() for name, value in model.state_dict().items() if name != 'n_averaged'}
    set_(inner, 8)
    compute_ema(model, average, smoothing=0.75)
    assert next(value for name, value in average.items() if name.endswith('0.weight')).item() == 2
