"""A model that FSDP2 or tensor parallelism shares over a mesh of one: on a CPU over gloo, on a CUDA device over NCCL.

One process holds all shards, so results are compared with those of a model that is whole. The tests on CUDA are marked
``gpu``; they need plain torch and one device, and run the code that the others run on a CPU.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from composer_ema import EMAOptimizer, ShadowModel
from composer_ema.model.sharding import whole

STEPS, SMOOTHING = 4, 0.5


@pytest.fixture(
    scope='module',
    params=[
        'cpu',
        pytest.param(
            'cuda',
            marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a CUDA device')],
        ),
    ],
)
def device(request, tmp_path_factory) -> Iterator[torch.device]:
    """The device, with a process group of one process for it."""
    backend = 'gloo' if request.param == 'cpu' else 'cpu:gloo,cuda:nccl'
    store = tmp_path_factory.mktemp('store') / 'store'
    dist.init_process_group(backend, init_method=f'file://{store}', rank=0, world_size=1)
    yield torch.device(request.param)
    dist.destroy_process_group()


def network(device: torch.device) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)).to(device)


def by_fsdp2(model: nn.Sequential, device: torch.device) -> None:
    mesh = init_device_mesh(device.type, (1,))
    fully_shard(model[0], mesh=mesh)
    fully_shard(model, mesh=mesh)


def by_fsdp2_in_bfloat16(model: nn.Sequential, device: torch.device) -> None:
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    fully_shard(model, mesh=init_device_mesh(device.type, (1,)), mp_policy=policy)


def by_fsdp2_offloaded(model: nn.Sequential, device: torch.device) -> None:
    mesh = init_device_mesh(device.type, (1,))
    fully_shard(model, mesh=mesh, offload_policy=CPUOffloadPolicy(pin_memory=device.type == 'cuda'))


def by_tensor_parallelism(model: nn.Sequential, device: torch.device) -> None:
    mesh = init_device_mesh(device.type, (1,))
    parallelize_module(model, mesh, {'0': ColwiseParallel(), '2': RowwiseParallel()})


def by_both(model: nn.Sequential, device: torch.device) -> None:
    mesh = init_device_mesh(device.type, (1, 1), mesh_dim_names=('shards', 'tensor'))
    parallelize_module(model, mesh['tensor'], {'0': ColwiseParallel(), '2': RowwiseParallel()})
    fully_shard(model, mesh=mesh['shards'])


Shard = Callable[[nn.Sequential, torch.device], None]
WAYS: dict[str, Shard] = {
    'FSDP2': by_fsdp2,
    'FSDP2 in bfloat16': by_fsdp2_in_bfloat16,
    'FSDP2 offloaded': by_fsdp2_offloaded,
    'tensor parallelism': by_tensor_parallelism,
    'both': by_both,
}


@pytest.fixture(params=WAYS)
def make(request, device) -> Callable[[], nn.Sequential]:
    """Builds the same sharded model each time."""
    if device.type == 'cpu' and request.param != 'tensor parallelism' and torch.__version__ < '2.7':
        pytest.skip('FSDP2 of torch 2.6 cannot run a forward on a CPU')

    def make() -> nn.Sequential:
        built = network(device)
        WAYS[request.param](built, device)
        return built

    return make


def gathered(holder: nn.Module | ShadowModel) -> dict[str, Tensor]:
    return {name: whole(tensor).detach().cpu().clone() for name, tensor in holder.named_parameters()}


def inputs(device: torch.device, seed: int = 0) -> Tensor:
    return torch.randn(5, 6, generator=torch.Generator().manual_seed(seed)).to(device)


def train(model: nn.Module, device: torch.device, after_step: Callable[[], object] = lambda: None) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for seed in range(STEPS):
        optimizer.zero_grad()
        model(inputs(device, seed)).square().mean().backward()
        optimizer.step()
        after_step()


def test_the_average_follows_the_formula_and_training_is_as_without_it(make, device):
    model = make()
    shadow = ShadowModel(model)
    expected = {name: value.double() for name, value in gathered(model).items()}

    def update() -> None:
        shadow.update(model, smoothing=SMOOTHING)
        shadow.wait()
        for name, value in gathered(model).items():
            expected[name].lerp_(value.double(), 1 - SMOOTHING)
        for name, value in gathered(shadow).items():
            torch.testing.assert_close(value.double(), expected[name], rtol=3e-7, atol=1e-9)

    train(model, device, update)
    without = make()
    train(without, device)
    assert all(torch.equal(value, gathered(model)[name]) for name, value in gathered(without).items())
    assert all(isinstance(tensor, DTensor) for _, tensor in shadow.named_parameters()) == all(
        isinstance(parameter, DTensor) for parameter in model.parameters()
    )


def test_the_model_computes_with_the_average_while_it_is_lent_and_gets_every_bit_back(make, device):
    model = make()
    shadow = ShadowModel(model)
    train(model, device, lambda: shadow.update(model, smoothing=SMOOTHING))
    before, average = gathered(model), gathered(shadow)
    unsharded = network(device)
    unsharded.load_state_dict(average)
    with torch.no_grad():
        model(inputs(device))  # leaves the root of FSDP2 unsharded
    with shadow.swapped(model):
        assert all(torch.equal(value, average[name]) for name, value in gathered(model).items())
        with torch.no_grad():
            got = model(inputs(device))
        with pytest.raises(RuntimeError):
            model(torch.ones(2, 7, device=device))
    tolerance = 1e-6 if got.dtype == torch.float32 else 0.02
    torch.testing.assert_close(got.float(), unsharded(inputs(device)), rtol=tolerance, atol=tolerance)
    assert all(torch.equal(value, before[name]) for name, value in gathered(model).items())


def test_an_optimizer_with_an_average_comes_back_from_a_distributed_checkpoint(make, device, tmp_path):
    def build() -> tuple[nn.Module, EMAOptimizer]:
        model = make()
        return model, EMAOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), decay=SMOOTHING, model=model)

    def step(model: nn.Module, optimizer: EMAOptimizer, seed: int) -> None:
        optimizer.zero_grad()
        model(inputs(device, seed)).square().mean().backward()
        optimizer.step()

    model, optimizer = build()
    for seed in range(2):
        step(model, optimizer, seed)
    dcp.save(_state_of(model, optimizer), checkpoint_id=tmp_path)
    again, resumed = build()
    state = _state_of(again, resumed)
    dcp.load(state, checkpoint_id=tmp_path)
    set_state_dict(again, resumed, model_state_dict=state['model'], optim_state_dict=state['optimizer'])
    for seed in range(2, 4):
        step(model, optimizer, seed)
        step(again, resumed, seed)
    for one, other in ((model, again), (optimizer.shadow, resumed.shadow)):
        values = gathered(other)
        assert all(torch.equal(value, values[name]) for name, value in gathered(one).items())


def _state_of(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    of_model, of_optimizer = get_state_dict(model, optimizer)
    return {'model': of_model, 'optimizer': of_optimizer}


def test_an_update_and_a_swap_never_make_the_host_wait(make, device):
    model = make()
    shadow = ShadowModel(model)

    def update() -> None:
        shadow.update(model, smoothing=SMOOTHING)

    train(model, device, update)
    if device.type == 'cuda':
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode('error')
    try:
        for _ in range(20):
            update()
        shadow.swap_in(model)
        shadow.swap_out(model)
    finally:
        if device.type == 'cuda':
            torch.cuda.set_sync_debug_mode('default')
