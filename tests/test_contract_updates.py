"""An update synchronises, allocates and walks nothing, and follows one formula: contract, items 8 and 9."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from composer import Callback, Event
from composer.models import ComposerModel
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader, TensorDataset
from toy import bits, make_model

from composer_ema import EMA

TRAVERSALS = (
    'named_modules', 'modules', 'named_children', 'children', 'named_parameters', 'parameters', 'named_buffers',
    'buffers', 'state_dict', '_named_members',
)  # fmt: skip


class Operations(TorchDispatchMode):
    """Notes every operator that torch runs."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(str(function))
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize('buffers', ['average', 'copy'])
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
def test_an_update_walks_no_module_and_allocates_nothing(trainer, monkeypatch, dtype, buffers):
    ema = EMA('2ba', buffers=buffers, log_interval=None)
    run = trainer([ema], model=make_model(dtype=dtype))
    state, logger = run.state, run.logger
    for _ in range(2):  # the first copies and prepares, the second is the first to average
        advance(state)
        ema.apply(Event.BATCH_END, state, logger)
    shadow = ema.ema_model
    pointers = [t.data_ptr() for t in (*shadow.parameters(), *shadow.buffers())]
    for name in TRAVERSALS:
        monkeypatch.setattr(nn.Module, name, refuse(name))
    with torch.no_grad():
        state.model.module[5].weight += 1

    advance(state)
    before = bits(dict(shadow.named_parameters()))
    with Operations() as operations:
        assert ema.match(Event.BATCH_END, state)
        ema.apply(Event.BATCH_END, state, logger)
    assert shadow.num_updates == 3
    assert bits(dict(shadow.named_parameters())) != before
    assert [t.data_ptr() for t in (*shadow.parameters(), *shadow.buffers())] == pointers
    # The cat gathers small tensors in memory that the plan holds.
    written_in_place = {
        'aten._foreach_lerp_.Scalar', 'aten._foreach_copy_.default', 'aten.lerp_.Scalar', 'aten.cat.out'
    }  # fmt: skip
    # On a CPU the sum of averaged buffers tells whether they are finite.
    finite = {'aten.sum.IntList_out', 'aten._local_scalar_dense.default'} if buffers == 'average' else set()
    assert operations.names
    assert set(operations.names) <= written_in_place | finite, operations.names


def advance(state) -> None:
    state.previous_timestamp = state.timestamp
    state.timestamp = state.timestamp.to_next_batch(samples=4, tokens=12)


def refuse(name: str) -> Any:
    def walk(self, *args, **kwargs):
        raise AssertionError(f'{name} walks the model')

    return walk


def replace_parameter(layer: nn.Linear) -> None:
    layer.weight = nn.Parameter(torch.full_like(layer.weight, 7.0))


def replace_storage(layer: nn.Linear) -> None:
    layer.weight.data = torch.full_like(layer.weight, 7.0)


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
@pytest.mark.parametrize('replace', [replace_parameter, replace_storage])
def test_an_update_notices_a_replaced_tensor(trainer, replace, dtype):
    """What the cached plan must not miss: the price of walking nothing is checked here."""
    ema = EMA('1ba')
    run = trainer([ema], model=make_model(dtype=dtype))
    for _ in range(2):
        advance(run.state)
        ema.apply(Event.BATCH_END, run.state, run.logger)
    before = dict(ema.ema_model.named_parameters())['module.5.weight'].clone()
    replace(run.state.model.module[5])
    advance(run.state)
    ema.apply(Event.BATCH_END, run.state, run.logger)
    after = dict(ema.ema_model.named_parameters())['module.5.weight']
    torch.testing.assert_close(after, (before + 7) / 2)


class Zoo(ComposerModel):
    """Parameters and buffers of every dtype; the loss pulls each parameter towards one."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(5)
        for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.complex64):
            name = f'in_{dtype}'.replace('.', '_')
            self.register_parameter(name, nn.Parameter(torch.randn(3, 4, generator=generator).to(dtype)))
        self.scalar = nn.Parameter(torch.tensor(0.3))
        self.empty = nn.Parameter(torch.zeros(0, 4))
        self.frozen = nn.Parameter(torch.ones(2), requires_grad=False)
        self.transposed = nn.Parameter(torch.randn(4, 3, generator=generator).t())
        self.register_buffer('float_buffer', torch.zeros(2))
        self.register_buffer('half_buffer', torch.zeros(2, dtype=torch.float16))
        self.register_buffer('count', torch.zeros((), dtype=torch.int64))
        self.register_buffer('flags', torch.zeros(3, dtype=torch.bool))

    def forward(self, batch):
        with torch.no_grad():
            self.count += 1
            self.float_buffer += 0.5
            self.half_buffer.copy_(self.float_buffer * self.count)
            self.flags[int(self.count) % 3] ^= True
        return sum((p.to(torch.complex128) - 1).abs().square().sum() for p in self.parameters()).float()

    def loss(self, outputs, batch):
        return outputs


class Follow(Callback):
    """Works the formula out in float64 from what training left behind, without the package."""

    def __init__(self, half_life: float) -> None:
        self.half_life = half_life
        self.average: dict[str, Tensor] = {}

    def batch_end(self, state, logger) -> None:
        weight = 1.0 if not self.average else 1.0 - 2.0 ** (-1.0 / self.half_life)
        for name, source in state.model.state_dict().items():
            if source.is_floating_point() or source.is_complex():
                wide = source.to(torch.complex128 if source.is_complex() else torch.float64)
                old = self.average.get(name, torch.zeros_like(wide))
                self.average[name] = old + weight * (wide - old)
            else:
                self.average[name] = source.clone()


# Rounding of one update is at most half a unit in the last place of the shadow's dtype; 20 updates, each of which
# halves what the earlier ones left within three batches, add up to a few units.
TOLERANCES = {torch.float32: 1e-6, torch.float64: 2e-15, torch.complex64: 1e-6}


@pytest.mark.parametrize('buffers', ['average', 'copy'])
def test_a_run_follows_the_float64_formula_in_every_dtype(trainer, buffers):
    ema, follow, model = EMA('3ba', buffers=buffers), Follow(3.0), Zoo()
    run = trainer(
        [ema],
        model=model,
        callbacks=[follow],
        train_dataloader=DataLoader(TensorDataset(torch.zeros(40, 1)), batch_size=2),
        max_duration='20ba',
        optimizers=torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.5),
    )
    run.fit()
    shadows = {**dict(ema.ema_model.named_parameters()), **dict(ema.ema_model.named_buffers())}
    sources = dict(model.state_dict())
    assert shadows.keys() == sources.keys() - {'frozen'}
    for name, shadow in shadows.items():
        source = sources[name]
        is_16_bit = source.dtype in (torch.bfloat16, torch.float16)
        assert shadow.dtype == (torch.float32 if is_16_bit else source.dtype), name
        is_copied = not (source.is_floating_point() or source.is_complex()) or (buffers == 'copy' and 'buffer' in name)
        if is_copied:
            assert torch.equal(shadow, source.to(shadow.dtype)), name
        else:
            expected, tolerance = follow.average[name], TOLERANCES[shadow.dtype]
            torch.testing.assert_close(shadow.to(expected.dtype), expected, rtol=tolerance, atol=tolerance)
            assert not shadow.numel() or not torch.equal(shadow, source.to(shadow.dtype)), f'{name} was not averaged'


class StepOnce(Callback):
    """Moves every weight from 0 to 1 after the first update, then leaves them there."""

    def batch_end(self, state, logger) -> None:
        with torch.no_grad():
            for parameter in state.model.parameters():
                parameter.fill_(1.0)


def test_after_one_half_life_a_bfloat16_model_s_average_has_covered_half_of_a_step(trainer):
    model = make_model(dtype=torch.bfloat16)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    images = torch.zeros(2, 1, 6, 6, dtype=torch.bfloat16)
    ema = EMA('400ba', log_interval=None)
    run = trainer(
        [ema],
        model=model,
        callbacks=[StepOnce()],
        train_dataloader=DataLoader([(image, 0) for image in images] * 401, batch_size=2),
        max_duration='401ba',
        optimizers=torch.optim.SGD(model.parameters(), lr=0.0),
    )
    run.fit()
    for name, average in ema.ema_model.named_parameters():
        assert average.dtype is torch.float32
        covered = average.double()
        assert (covered - 0.5).abs().max() < 0.005, f'{name} has covered {covered.mean():.3f}'  # 1 % of one half
