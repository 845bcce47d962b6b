"""The side stream: nothing at all on a CPU; ordered by events, and never by the host, on CUDA.

The tests marked ``gpu`` need plain torch and a CUDA device. They resolve the shadow first, so that the update that they
delay makes no plan, and put a long sleep into a stream, so that a missing fork or join shows as a wrong value and a
blocked host as a long wait.
"""

import contextlib
import copy
import gc
import time
from typing import ClassVar

import pytest
import torch
from torch import nn

from composer_ema import EMAOptimizer, ShadowModel, ShadowModels
from composer_ema.shadow import plan
from composer_ema.shadow.stream import SideStream

on_gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a CUDA device')]

CPU = torch.device('cpu')
#: Some 0.2 s at 2 GHz: a hundred times longer than the host takes to enqueue a test's kernels.
SLEEP_CYCLES = 400_000_000
SIZE = 2**22  # 16 MiB of float32: blocks of their own in the caching allocator


def test_on_a_cpu_forked_work_runs_in_line():
    stream, total = SideStream(CPU), torch.zeros(())
    with stream.fork():
        total.add_(1)
        assert total.item() == 1
    assert not stream.is_pending
    stream.join()
    stream.join()
    assert total.item() == 1


def test_on_a_cpu_nothing_is_recorded():
    stream = SideStream(CPU)
    stream.keep_alive([torch.zeros(3)])
    stream.keep_alive([])
    assert not stream.is_pending


def test_an_error_in_forked_work_is_the_callers():
    stream = SideStream(CPU)
    with pytest.raises(ZeroDivisionError), stream.fork():
        _ = 1 / 0
    assert not stream.is_pending


def test_overlap_changes_no_bit_on_a_cpu():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    shadows = [ShadowModel(model, overlap=overlap) for overlap in (False, True)]
    for _ in range(3):
        nn.init.normal_(model[0].weight)
        for shadow in shadows:
            shadow.update(model, smoothing=0.7)
            assert not shadow.is_pending
    for (name, plain), (_, beside) in zip(shadows[0].named_parameters(), shadows[1].named_parameters(), strict=True):
        assert torch.equal(plain, beside), name


# Which stream waits for what, on a CUDA that only keeps a list


class Recorded:
    """Stands for streams and events, and notes what waits for what."""

    log: ClassVar[list[tuple]]

    def __init__(self, name='side'):
        self.name = name

    def wait_stream(self, other):
        self.log.append((self.name, 'waits for', other.name))

    def wait_event(self, event):
        self.log.append((self.name, 'waits for', event.name))

    def record(self, stream):
        self.name = f'event of {stream.name}'


@pytest.fixture
def streams(monkeypatch):
    """A side stream, and how to make another one current."""
    current = [Recorded('main')]
    monkeypatch.setattr(Recorded, 'log', [], raising=False)
    monkeypatch.setattr(torch.cuda, 'Stream', lambda device: Recorded())
    monkeypatch.setattr(torch.cuda, 'Event', Recorded)
    monkeypatch.setattr(torch.cuda, 'current_stream', lambda device: current[0])
    monkeypatch.setattr(torch.cuda, 'stream', lambda stream: contextlib.nullcontext())
    main, other = current[0], Recorded('other')
    return SideStream(torch.device('cuda')), lambda is_main: current.__setitem__(0, main if is_main else other)


def test_a_join_on_another_stream_leaves_the_work_pending_for_the_one_that_forked_it(streams):
    stream, make_current = streams
    with stream.fork():
        pass
    make_current(False)
    stream.join()
    assert stream.is_pending
    make_current(True)
    stream.join()
    assert not stream.is_pending
    assert Recorded.log == [
        ('side', 'waits for', 'main'),
        ('other', 'waits for', 'event of side'),
        ('main', 'waits for', 'event of side'),
    ]


@pytest.mark.parametrize('count', [1, 2])
@pytest.mark.parametrize(
    ('settings', 'size'), [({}, 4), ({'rounding': 'stochastic', 'dtype': 'bfloat16'}, 2)], ids=['nearest', 'stochastic']
)
def test_an_update_runs_beside_training_while_its_parameters_are_worth_it(monkeypatch, settings, size, count):
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.BatchNorm1d(4), nn.Linear(4, 2, bias=False))
    model[2].requires_grad_(False)
    monkeypatch.setattr(SideStream, 'is_beside', True)
    shadows = ShadowModels(model, ['a', 'b'][:count], overlap=True, **settings)

    def forks_at(bound: int) -> int:
        monkeypatch.setattr(plan, 'WORTH_FORKING', bound)
        shadows._follower.forget_plan()
        shadows.update(model, smoothing=0.5)
        return len(shadows._follower.plan.forked_steps)

    # Of each float of the trainable parameters the weights are read, and each average is read and written.
    of_float = 4 + 2 * size * count
    moved = (16 + 4 + 4) * of_float
    assert [forks_at(bound) for bound in (moved, moved + 1)] == [1, 0]
    model[2].requires_grad_(True)
    assert [forks_at(bound) for bound in (moved + 1, moved + 8 * of_float + 1)] == [1, 0]


def test_the_next_update_waits_for_what_reads_the_average_on_another_stream(streams):
    stream, make_current = streams
    make_current(False)
    stream.was_read()
    make_current(True)
    for _ in range(2):
        stream.wait_for_readers()
    assert Recorded.log == [('main', 'waits for', 'event of other')]


def test_a_forward_of_the_module_counts_as_reading_when_it_has_ended(monkeypatch):
    seen = []
    monkeypatch.setattr(SideStream, 'was_read', lambda _: seen.append('read'))
    monkeypatch.setattr(SideStream, 'wait_for_readers', lambda _: seen.append('update'))
    monkeypatch.setattr(SideStream, 'join', lambda _: seen.append('wait'))
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    shadow = ShadowModel(model)
    module = shadow.module(model)
    module[1].register_forward_hook(lambda *_: seen.append('forward'))
    shadow.update(model, smoothing=0.5)
    seen.clear()
    module(torch.ones(2))
    shadow.update(model, smoothing=0.5)
    assert seen == ['wait', 'forward', 'read', 'update']


# On CUDA


@pytest.fixture
def device(monkeypatch):
    monkeypatch.setattr(plan, 'WORTH_FORKING', 0)  # these models are small
    device = torch.device('cuda')
    # The first launch of a kernel loads its code, which may wait for the device: do that before the clock runs.
    warm = torch.ones(SIZE, device=device)
    warm.add_(1).mul_(2).copy_(warm.clone()).fill_(3)
    torch.cuda._sleep(1)
    shadow = ShadowModel(model := _weights(1.0), overlap=True)
    shadow.update(model, smoothing=0.5)
    shadow.update(model, smoothing=0.0)
    shadow.wait()
    torch.cuda.synchronize()
    del warm, shadow, model
    gc.collect()
    torch.cuda.empty_cache()
    return device


def _weights(value: float) -> nn.Module:
    model = nn.Module()
    model.weight = nn.Parameter(torch.full((SIZE,), value, device='cuda'))
    return model


def _fill(model: nn.Module, value: float) -> None:
    with torch.no_grad():
        model.weight.fill_(value)


def _sleep_on_side_stream(shadow: ShadowModel) -> None:
    """Delays the next update until long after the host has gone on."""
    for stream in shadow._follower._streams.values():
        with stream.fork():
            torch.cuda._sleep(SLEEP_CYCLES)


def _only(shadow: ShadowModel) -> torch.Tensor:
    return dict(shadow.named_parameters())['weight']


class TestCuda:
    pytestmark = on_gpu

    def test_join_orders_the_current_stream_after_forked_work(self, device):
        stream, total = SideStream(device), torch.zeros(SIZE, device=device)
        with stream.fork():
            torch.cuda._sleep(SLEEP_CYCLES)
            total.add_(1)
        assert stream.is_pending
        early = total.clone()
        stream.join()
        assert not stream.is_pending
        late = total.clone()
        torch.cuda.synchronize()
        assert not early.any(), 'without the join the current stream reads before the side stream has written'
        assert bool((late == 1).all())

    def test_fork_orders_forked_work_after_the_current_stream(self, device):
        stream, source, total = SideStream(device), torch.ones(SIZE, device=device), torch.zeros(SIZE, device=device)
        torch.cuda._sleep(SLEEP_CYCLES)
        source.fill_(2)
        with stream.fork():
            total.copy_(source)
        stream.join()
        assert bool((total == 2).all())

    def test_neither_fork_nor_join_makes_the_host_wait(self, device):
        stream, total = SideStream(device), torch.zeros(SIZE, device=device)
        began = time.perf_counter()
        with stream.fork():
            torch.cuda._sleep(SLEEP_CYCLES)
            total.add_(1)
        stream.join()
        assert not torch.cuda.current_stream().query(), 'the sleep is over: the test shows nothing'
        assert time.perf_counter() - began < 0.05
        torch.cuda.synchronize()

    def test_without_overlap_work_stays_on_the_current_stream(self, device):
        stream, total = SideStream(device, overlap=False), torch.zeros(SIZE, device=device)
        torch.cuda._sleep(SLEEP_CYCLES)
        with stream.fork():
            total.add_(1)
        assert not stream.is_pending
        assert bool((total == 1).all())

    def test_an_error_in_forked_work_can_still_be_joined(self, device):
        stream = SideStream(device)
        with pytest.raises(ZeroDivisionError), stream.fork():
            _ = 1 / 0
        stream.join()
        assert not stream.is_pending

    def test_kept_alive_memory_is_not_handed_out_while_the_side_stream_writes_it(self, device):
        stream, freed = SideStream(device), torch.zeros(SIZE, device=device)
        stream.keep_alive([freed])
        with stream.fork():
            torch.cuda._sleep(SLEEP_CYCLES)
            freed.fill_(13)
        del freed
        fresh = torch.full((SIZE,), 7.0, device=device)
        torch.cuda.synchronize()
        assert bool((fresh == 7).all())

    def test_without_keeping_it_alive_freed_memory_is_overwritten(self, device):
        """Shows that the test above tests something."""
        stream, freed = SideStream(device), torch.zeros(SIZE, device=device)
        address = freed.data_ptr()
        with stream.fork():
            torch.cuda._sleep(SLEEP_CYCLES)
            freed.fill_(13)
        del freed
        fresh = torch.full((SIZE,), 7.0, device=device)
        torch.cuda.synchronize()
        if fresh.data_ptr() != address:
            pytest.skip('the allocator handed out other memory')
        assert bool((fresh == 13).all())

    @pytest.mark.parametrize('is_joined', [True, False])
    def test_the_average_is_exact_with_the_join_and_wrong_without(self, device, is_joined):
        model = _weights(0.0)
        shadow = ShadowModel(model, overlap=True)
        shadow.resolve(model, joining=True)
        _fill(model, 4)
        _sleep_on_side_stream(shadow)
        shadow.update(model, smoothing=0.5)
        assert shadow.is_pending
        if is_joined:
            shadow.wait()
            assert not shadow.is_pending
        _fill(model, 1000)  # the optimizer's next step
        torch.cuda.synchronize()
        assert bool((_only(shadow) == (2 if is_joined else 500)).all())

    @pytest.mark.parametrize('smoothing', [0.0, 0.5])
    @pytest.mark.parametrize(
        'read',
        [
            lambda shadow, model: _only(shadow).clone(),
            lambda shadow, model: next(shadow.parameters()).clone(),
            lambda shadow, model: shadow.state_dict()['parameters']['weight'].clone(),
            lambda shadow, model: copy.deepcopy(shadow)._storage.parameters['weight'],
            lambda shadow, model: shadow.to(dtype=torch.float64)._storage.parameters['weight'],
            lambda shadow, model: (shadow.swap_in(model), model.weight.detach().clone())[1],
            lambda shadow, model: (shadow.copy_to(model), model.weight.detach().clone())[1],
        ],
        ids=['named_parameters', 'parameters', 'state_dict', 'deepcopy', 'to', 'swap_in', 'copy_to'],
    )
    def test_every_read_waits_for_the_update(self, device, read, smoothing):
        model = _weights(0.0)
        shadow = ShadowModel(model, overlap=True)
        shadow.resolve(model, joining=True)
        _fill(model, 4)
        _sleep_on_side_stream(shadow)
        shadow.update(model, smoothing=smoothing)
        value = read(shadow, model)
        torch.cuda.synchronize()
        assert bool((value == 4 * (1 - smoothing)).all())

    def test_loading_waits_for_the_update(self, device):
        model = _weights(0.0)
        shadow = ShadowModel(model, overlap=True)
        saved = copy.deepcopy(shadow.state_dict())
        saved['parameters']['weight'].fill_(9)
        shadow.resolve(model, joining=True)
        _sleep_on_side_stream(shadow)
        shadow.update(model, smoothing=0.5)
        shadow.load_state_dict(saved)
        torch.cuda.synchronize()
        assert bool((_only(shadow) == 9).all())

    def test_updates_never_synchronise(self, device):
        model = nn.Sequential(nn.Linear(64, 64), nn.BatchNorm1d(64), nn.Linear(64, 8)).to(device)
        model[2].bfloat16()
        shadow = ShadowModel(model, overlap=True)
        shadow.update(model, smoothing=0.5)
        shadow.update(model, smoothing=0.0)
        shadow.wait()
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode('error')
        try:
            for smoothing in (0.5, 0.9, 0.0, 1.0):
                shadow.update(model, smoothing=smoothing)
                shadow.wait()
        finally:
            torch.cuda.set_sync_debug_mode('default')

    def test_a_hundred_training_steps_never_synchronise(self, device):
        model = nn.Sequential(nn.Linear(64, 64), nn.BatchNorm1d(64), nn.Linear(64, 8)).to(device)
        optimizer = EMAOptimizer(torch.optim.AdamW(model.parameters(), lr=0.01), decay=0.9, model=model)
        batch = torch.randn(16, 64, device=device)

        def step() -> None:
            optimizer.zero_grad()
            model(batch).square().mean().backward()
            optimizer.step()

        for _ in range(3):
            step()
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode('error')
        try:
            for _ in range(100):
                step()
        finally:
            torch.cuda.set_sync_debug_mode('default')
        assert optimizer.num_steps == 103

    def test_updates_never_make_the_host_wait(self, device):
        model = _weights(0.0)
        shadow = ShadowModel(model, overlap=True)
        shadow.update(model, smoothing=0.5)
        torch.cuda.synchronize()
        _sleep_on_side_stream(shadow)
        began = time.perf_counter()
        for _ in range(3):
            shadow.update(model, smoothing=0.5)
            shadow.wait()
        assert time.perf_counter() - began < 0.05
        torch.cuda.synchronize()

    def test_updates_allocate_nothing(self, device):
        model = nn.Sequential(nn.Linear(64, 64), nn.BatchNorm1d(64), nn.Linear(64, 8)).to(device)
        model[2].bfloat16()
        shadow = ShadowModel(model, overlap=True)
        shadow.update(model, smoothing=0.5)
        shadow.update(model, smoothing=0.0)
        shadow.wait()
        torch.cuda.synchronize()
        before = torch.cuda.memory_stats(device)['allocation.all.allocated']
        for smoothing in (0.5, 0.0):
            shadow.update(model, smoothing=smoothing)
            shadow.wait()
        assert torch.cuda.memory_stats(device)['allocation.all.allocated'] == before

    def test_deleting_the_shadow_in_flight_corrupts_nothing(self, device):
        model = _weights(4.0)
        shadow = ShadowModel(model, overlap=True)
        shadow.resolve(model, joining=True)
        _sleep_on_side_stream(shadow)
        shadow.update(model, smoothing=0.5)
        del shadow
        gc.collect()
        fresh = [torch.full((SIZE,), 7.0, device=device) for _ in range(2)]
        torch.cuda.synchronize()
        assert all(bool((tensor == 7).all()) for tensor in fresh)

    def test_deleting_the_model_in_flight_leaves_the_average_right(self, device):
        model = _weights(0.0)
        shadow = ShadowModel(model, overlap=True)
        shadow.resolve(model, joining=True)
        _fill(model, 4)
        _sleep_on_side_stream(shadow)
        shadow.update(model, smoothing=0.5)
        del model
        gc.collect()
        fresh = [torch.full((SIZE,), 1000.0, device=device) for _ in range(2)]
        torch.cuda.synchronize()
        assert bool((_only(shadow) == 2).all())
        assert len(fresh) == 2

    def test_a_replaced_parameter_is_averaged_in_order(self, device):
        model = _weights(0.0)
        shadow = ShadowModel(model, overlap=True)
        shadow.resolve(model, joining=True)
        _fill(model, 4)
        _sleep_on_side_stream(shadow)
        shadow.update(model, smoothing=0.5)
        model.weight = nn.Parameter(torch.full((SIZE,), 10.0, device=device))
        shadow.update(model, smoothing=0.5)
        shadow.wait()
        torch.cuda.synchronize()
        assert bool((_only(shadow) == 6).all())

    def test_buffers_are_averaged_on_the_current_stream(self, device):
        model = nn.Module()
        model.weight = nn.Parameter(torch.zeros(SIZE, device=device))
        model.register_buffer('mean', torch.full((SIZE,), 4.0, device=device))
        shadow = ShadowModel(model, overlap=True, buffers='average')
        shadow.resolve(model, joining=True)
        model.mean.fill_(8)
        _sleep_on_side_stream(shadow)
        shadow.update(model, smoothing=0.5)
        model.mean.fill_(1000)  # the next forward, before any join
        torch.cuda.synchronize()
        assert bool((shadow._storage.buffers['mean'] == 6).all())

    def test_a_shadow_on_the_cpu_follows_a_model_on_the_gpu(self, device):
        model = _weights(0.0)
        shadow = ShadowModel(model, device='cpu', overlap=True)
        _fill(model, 4)
        torch.cuda._sleep(SLEEP_CYCLES)
        shadow.update(model, smoothing=0.5)
        torch.cuda.synchronize()
        assert _only(shadow).device.type == 'cpu'
        assert bool((_only(shadow) == 2).all())
        with shadow.swapped(model):
            assert bool((model.weight == 2).all())
        assert bool((model.weight == 4).all())

    def test_overlapped_and_plain_updates_are_bitwise_equal(self, device):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(300, 300), nn.BatchNorm1d(300), nn.Linear(300, 8)).to(device)
        shadows = [ShadowModel(model, overlap=overlap) for overlap in (False, True)]
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for step in range(20):
            for shadow in shadows:
                shadow.wait()
            optimizer.zero_grad()
            model(torch.randn(16, 300, device=device)).square().mean().backward()
            optimizer.step()
            for shadow in shadows:
                shadow.update(model, smoothing=0.9 if step else 0.0)
        plain, beside = (dict(shadow.named_parameters()) for shadow in shadows)
        torch.cuda.synchronize()
        assert all(torch.equal(plain[name], beside[name]) for name in plain)
