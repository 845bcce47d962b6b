"""What a compiled region calls here runs eagerly and does what it does outside. Needs no Composer."""

from __future__ import annotations

import copy

import pytest
import torch
from plain import STRICT, Net, averaged, batch, loss_of, same_bits, sgd, weights
from torch import nn
from torch.compiler import is_dynamo_compiling

from composer_ema import EMAOptimizer, ShadowModel, compute_ema, update_bn
from composer_ema.model.untraced import is_traced, untraced

pytestmark = [
    STRICT,
    pytest.mark.filterwarnings('ignore:.*script_method.*:DeprecationWarning'),  # dynamo imports what uses it
    # Dynamo (2.7) may remove a name of its own twice when what it had compiled goes.
    pytest.mark.filterwarnings(
        'ignore:Exception ignored in.*ExactWeakKeyDictionary:pytest.PytestUnraisableExceptionWarning'
    ),
]


@pytest.fixture(autouse=True)
def _without_other_graphs():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def compiled(function):
    return torch.compile(function, backend='eager')


def average(shadow: ShadowModel) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in (*shadow.named_parameters(), *shadow.named_buffers())}


def pair(**options) -> tuple[Net, ShadowModel]:
    model = Net()
    return model, ShadowModel(model, **options)


@torch.no_grad()
def change(model: nn.Module) -> None:
    for tensor in (*model.parameters(), model.norm.running_mean):
        tensor.mul_(1.5).add_(0.1)


UPDATES = {
    'update': (lambda model, shadow, share: shadow.update(model, smoothing=share), {}),
    'weight': (lambda model, shadow, share: shadow.update(model, weight=share), {}),
    'overlap': (lambda model, shadow, share: shadow.update(model, smoothing=share), {'overlap': True}),
    'compute_ema': (lambda model, shadow, share: compute_ema(model, shadow, share), {}),
    'avg_fn': (lambda model, shadow, share: shadow.update(model), {'avg_fn': lambda a, c, n: a + (c - a) / (n + 1)}),
    'multi_avg_fn': (
        lambda model, shadow, share: shadow.update(model),
        {'multi_avg_fn': torch.optim.swa_utils.get_swa_multi_avg_fn(), 'buffers': 'copy'},
    ),
}


@pytest.mark.parametrize('kind', UPDATES)
def test_an_update_has_its_value_again_and_again_whatever_share_it_is_given(kind):
    update, options = UPDATES[kind]
    (model, shadow), (twin, expected) = pair(**options), pair(**options)
    region = compiled(lambda share: update(model, shadow, share))
    for step in range(12):  # more than dynamo recompiles
        region(1 - 0.05 * step)
        update(twin, expected, 1 - 0.05 * step)
        change(model)
        change(twin)
    assert shadow.num_updates == 12
    assert same_bits(average(shadow), average(expected))


def test_in_a_loop_where_the_graph_cannot_break_nothing_is_traced_either():
    pairs = [pair() for _ in range(12)]
    twins = copy.deepcopy([model for model, _ in pairs])
    for model, _ in pairs:
        change(model)

    def region() -> int:
        count = 0
        for model, shadow in pairs:
            shadow.update(model, smoothing=0.5)
            shadow.wait()
            count += shadow.state_dict()['num_updates']
        return count

    assert [compiled(region)() for _ in range(2)] == [12, 24]
    for (model, shadow), twin in zip(pairs, twins, strict=True):
        torch.testing.assert_close(
            average(shadow)['first.weight'], 0.25 * twin.first.weight + 0.75 * model.first.weight.detach()
        )


@pytest.mark.parametrize('kind', [nn.Module, dict])
def test_compute_ema_of_a_module_and_of_a_state_dict(kind):
    model, twin = Net(), Net()
    first, second = Net(seed=1), Net(seed=1)
    given = (first, second) if kind is nn.Module else (dict(first.state_dict()), dict(second.state_dict()))
    region = compiled(lambda: compute_ema(model, given[0], 0.75))
    for _ in range(3):
        region()
        compute_ema(twin, given[1], 0.75)
        change(model)
        change(twin)
    assert same_bits(weights(first), weights(second))


@pytest.mark.parametrize('whole', [False, True], ids=['step', 'whole iteration'])
@pytest.mark.parametrize('with_model', [False, True])
def test_a_compiled_step_of_an_optimizer_averages_as_an_eager_one(with_model, whole):
    def build() -> tuple[Net, EMAOptimizer]:
        model = Net()
        inner = torch.optim.Adam(model.parameters(), lr=0.05)
        return model, EMAOptimizer(inner, decay=0.5, every_n_steps=2, model=model if with_model else None)

    (model, optimizer), (twin, expected) = build(), build()

    def iterate(inputs: torch.Tensor, labels: torch.Tensor) -> None:
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(inputs), labels).backward()
        step()

    step = optimizer.step if whole else compiled(optimizer.step)
    region = compiled(iterate) if whole else iterate
    for index in range(5):
        region(*batch(index))
        expected.zero_grad()
        loss_of(twin, index).backward()
        expected.step()
    assert (optimizer.num_steps, optimizer.shadow.num_updates) == (5, 2)
    torch.testing.assert_close(weights(model), weights(twin))
    torch.testing.assert_close(averaged(optimizer), averaged(expected))


def test_the_wrapped_optimizers_step_is_still_compiled():
    graphs = []

    def backend(graph: torch.fx.GraphModule, inputs):
        graphs.append(graph.code)
        return graph

    model = Net()
    optimizer = EMAOptimizer(torch.optim.Adam(model.parameters()), decay=0.5)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    torch.compile(optimizer.step, backend=backend)()
    assert any('sqrt' in code for code in graphs)
    assert optimizer.shadow.num_updates == 1


def test_lending_in_a_compiled_region_shows_the_average_and_restores_every_bit():
    model, shadow = pair()
    optimizer = EMAOptimizer(sgd(model), decay=0.5, model=model)
    change(model)
    shadow.update(model, smoothing=0.5)
    before, shown = weights(model), average(shadow)['first.weight']

    def by_block() -> torch.Tensor:
        with shadow.swapped(model):
            return model.first.weight.detach() * 2

    def by_calls() -> torch.Tensor:
        shadow.swap_in(model)
        doubled = model.first.weight.detach() * 2
        shadow.swap_out(model)
        return doubled

    def by_optimizer() -> torch.Tensor:
        with optimizer.swap_ema_weights():
            return model.first.weight.detach() * 2

    for lend, expected in ((by_block, shown), (by_calls, shown), (by_optimizer, before['first.weight'])):
        region = compiled(lend)
        for _ in range(3):
            assert torch.equal(region(), expected * 2)
            assert not shadow.is_swapped
            assert same_bits(weights(model), before)


def test_everything_else_of_an_average_runs_in_a_compiled_region():
    model, shadow = pair()
    optimizer = EMAOptimizer(sgd(model), decay=0.5, model=model)
    change(model)
    shadow.update(model, smoothing=0.5)
    kept, other = average(shadow), Net(seed=2)

    def region() -> list:
        shadow.resolve(model)
        shadow.copy_to(other)
        shadow.load_state_dict(shadow.state_dict())
        optimizer.load_state_dict(optimizer.state_dict())
        optimizer.load_ema_state_dict(optimizer.ema_state_dict())
        fresh = ShadowModel(model)
        update_bn(other, [torch.ones(2, 3), torch.zeros(2, 3)])
        return [shadow.relative_distance(model), fresh.num_updates]

    for _ in range(2):
        distance, count = compiled(region)()
        assert distance > 0
        assert count == 0
    assert same_bits(average(shadow), kept)
    assert torch.equal(other.first.weight, kept['first.weight'])
    assert other.norm.num_batches_tracked == 2


def test_with_fullgraph_torch_says_that_the_call_cannot_be_traced():
    model, shadow = pair()
    region = torch.compile(lambda: shadow.update(model, smoothing=0.5), backend='eager', fullgraph=True)
    with pytest.raises(torch._dynamo.exc.Unsupported):
        region()
    assert shadow.num_updates == 0
    assert not shadow.is_swapped


def test_what_an_untraced_function_calls_is_not_traced_and_dynamo_goes_on_after_it():
    graphs, seen = [], []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    @untraced
    def look() -> None:
        seen.append((is_dynamo_compiling(), is_traced(), within()))

    def within() -> bool:
        return is_dynamo_compiling()

    def region(x: torch.Tensor) -> torch.Tensor:
        x = x + 1
        look()
        return x * 2

    assert torch.compile(region, backend=backend)(torch.ones(1)).item() == 4
    assert seen == [(False, False, False)]
    assert len(graphs) == 2
    assert not is_traced()


def test_an_exception_in_a_compiled_region_is_the_callers_and_leaves_dynamo_as_it_was():
    model, shadow = pair()

    def region(x: torch.Tensor) -> torch.Tensor:
        shadow.update(model, smoothing=2.0)
        return x

    with pytest.raises(ValueError, match='smoothing'):
        compiled(region)(torch.ones(1))
    assert not is_traced()


def test_the_average_as_a_module_stays_up_to_date_when_it_is_compiled():
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Sequential(nn.Linear(4, 2)))
    shadow = ShadowModel(model)
    compiled = torch.compile(shadow.module(model), backend='eager')
    inputs = torch.randn(8, 3)
    for _ in range(3):
        model.train()(torch.randn(8, 3))
        nn.init.normal_(model[0].weight)
        shadow.update(model, smoothing=0.5)
        with shadow.swapped(model):
            expected = model.eval()(inputs)
        assert torch.equal(compiled(inputs), expected)
