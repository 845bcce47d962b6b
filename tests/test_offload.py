"""An average on the host beside training: exact, never late, and in no more memory than two chunks and a scratch.

Without a CUDA device the same code runs with plain copies: threads, chunks and errors are what is tested then. The
tests marked ``gpu`` add streams and pinned memory.
"""

import copy
import gc
import pickle
import threading
import time
from collections import Counter
from concurrent.futures import Future
from itertools import chain

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from composer_ema import EMAOptimizer, ShadowModel, ShadowModels, kernels
from composer_ema.shadow import offload, plan
from composer_ema.shadow.offload import HostAverage

on_gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a CUDA device')]
#: Some 0.2 s at 2 GHz.
SLEEP_CYCLES = 400_000_000
#: Weights of averages that are updated together.
WEIGHTS = (0.5, 1.0, 0.25)

for_one_and_three = pytest.mark.parametrize('count', [1, 3])


class Gate:
    """Holds the thread before its first copy, or before its first average, until it is opened."""

    def __init__(self, average: HostAverage, method: str) -> None:
        self._opened = threading.Event()
        wrapped = getattr(average, method)

        def held(*args):
            assert self._opened.wait(10)
            return wrapped(*args)

        setattr(average, method, held)

    def open(self) -> None:
        self._opened.set()


@pytest.fixture
def as_if_on_another_device(monkeypatch):
    monkeypatch.setattr(offload, 'can_take', lambda shadow, source: True)


@pytest.fixture
def elements_read(monkeypatch):
    """How many elements of a tensor's memory ``torch._foreach_copy_`` has read."""
    read, copy_ = Counter(), torch._foreach_copy_

    def counting(targets, sources, *args, **kwargs):
        for source in sources:
            read[source.untyped_storage().data_ptr()] += source.numel()
        return copy_(targets, sources, *args, **kwargs)

    monkeypatch.setattr(torch, '_foreach_copy_', counting)
    return lambda tensor: read[tensor.untyped_storage().data_ptr()]


def _average(values, **options):
    (shadows,), sources, average = _averages(values, 1, **options)
    return shadows, sources, average


def _averages(values, count, **options):
    sets = [[torch.zeros_like(value) for value in values] for _ in range(count)]
    return sets, list(values), HostAverage(list(zip(*sets, values, strict=True)), [], [], **options)


def test_half_an_update_lies_half_way():
    shadows, _, average = _average([torch.tensor([2.0, 4.0]), torch.tensor(8.0)])
    average.update((0.5,))
    average.wait()
    assert [shadow.tolist() for shadow in shadows] == [[1.0, 2.0], 4.0]


@given(
    st.lists(
        st.tuples(st.integers(0, 90), st.sampled_from([torch.float32, torch.bfloat16, torch.float64])), max_size=8
    ),
    st.integers(1, 64),
    st.lists(st.sampled_from([0.0, 0.3, 1.0]), min_size=1, max_size=3),
)
def test_chunks_of_any_size_give_each_average_the_bits_of_an_update_in_line(kinds, chunk, weights):
    sources = [torch.randn(size, dtype=dtype) for size, dtype in kinds] + [
        torch.randn(4, 6).t(),
        torch.randn(6, 4)[:, 1],
    ]
    sets = [[torch.randn(source.shape) for source in sources] for _ in weights]
    expected = copy.deepcopy(sets)
    average = HostAverage(list(zip(*sets, sources, strict=True)), [], [], chunk=chunk)
    for _ in range(2):
        average.update(weights)
        for shadows, weight in zip(expected, weights, strict=True):
            kernels.prepare([shadows], sources)((weight,))
    average.wait()
    for shadow, wanted in zip(chain(*sets), chain(*expected), strict=True):
        assert torch.equal(shadow, wanted)


@for_one_and_three
def test_averages_that_share_the_copies_have_the_bits_of_single_ones(count):
    sources = [
        [torch.randn(40), torch.randn(3, 5, dtype=torch.bfloat16)],
        [torch.tensor([1.0, torch.nan, torch.inf])],
        [torch.tensor(3), torch.tensor([True, False])],
    ]

    def rows(count):
        return [[(*(torch.zeros_like(each) for _ in range(count)), each) for each in kind] for kind in sources]

    of_all, of_each = rows(count), [rows(1) for _ in range(count)]
    together, single = HostAverage(*of_all, chunk=16), [HostAverage(*each, chunk=16) for each in of_each]
    for _ in range(2):
        together.update(WEIGHTS[:count])
        for average, weight in zip(single, WEIGHTS, strict=False):
            average.update((weight,))
    for average in (together, *single):
        average.wait()
    for which, alone in enumerate(of_each):
        for row, (expected, _) in zip(chain(*of_all), chain(*alone), strict=True):
            torch.testing.assert_close(row[which], expected, rtol=0, atol=0, equal_nan=True)


@for_one_and_three
def test_each_source_is_copied_once_for_all_averages(count, elements_read):
    sources = torch.ones(40), torch.ones(3), torch.tensor(3)
    kinds = [[(*(torch.zeros_like(source) for _ in range(count)), source)] for source in sources]
    average = HostAverage(*kinds, chunk=16)
    average.update(WEIGHTS[:count])
    average.wait()
    assert [elements_read(source) for source in sources] == [40, 3, 1]


def test_the_weights_are_those_that_it_was_called_with():
    shadows, _, average = _average([torch.ones(3)])
    gate, weights = Gate(average, '_run'), [1.0]
    average.update(weights)
    weights[0] = 0.0
    gate.open()
    average.wait()
    assert shadows[0].tolist() == [1, 1, 1]


@for_one_and_three
def test_weights_of_16_bits_are_cast_in_one_scratch_whatever_the_number_of_chunks(count, monkeypatch):
    written, copy_ = {}, torch._foreach_copy_

    def noting(targets, *args, **kwargs):
        written.update({each.untyped_storage().data_ptr(): each.untyped_storage().nbytes() for each in targets})
        return copy_(targets, *args, **kwargs)

    monkeypatch.setattr(torch, '_foreach_copy_', noting)
    sources = [torch.ones(size, dtype=torch.bfloat16) for size in (3, 1000, 7)]
    sets = [[torch.zeros(source.shape) for source in sources] for _ in range(count)]
    average = HostAverage(list(zip(*sets, sources, strict=True)), [], [], chunk=16)
    average.update([0.5] * count)
    average.wait()
    assert sorted(written.values()) == [16 * 2, 16 * 2, 16 * 4]
    assert all(shadow.eq(0.5).all() for shadow in chain(*sets))


@for_one_and_three
def test_two_chunks_are_all_the_memory_it_takes(count, monkeypatch):
    taken = []
    new_memory = HostAverage._new_memory
    monkeypatch.setattr(HostAverage, '_new_memory', lambda *args: taken.append(new_memory(*args)) or taken[-1])
    _, _, average = _averages([torch.ones(1000), torch.ones(7)], count, chunk=16)
    assert [memory.numel() for memory in taken] == [16, 16]
    average.update(WEIGHTS[:count])
    average.wait()
    assert len(taken) == 2


def test_update_returns_before_the_thread_has_begun():
    shadows, _, average = _average([torch.ones(3)])
    gate = Gate(average, '_run')
    average.update((1.0,))
    assert average.is_reading
    assert shadows[0].tolist() == [0, 0, 0]
    gate.open()
    average.wait()
    assert not average.is_reading
    assert shadows[0].tolist() == [1, 1, 1]


@for_one_and_three
def test_sources_may_be_written_once_they_are_read_while_the_thread_still_averages(count):
    sets, sources, average = _averages([torch.ones(3)], count)
    gate = Gate(average, '_average')
    average.update(WEIGHTS[:count])
    average.wait_for_reads()
    sources[0].fill_(100)
    assert [shadow.tolist() for (shadow,) in sets] == [[0] * 3] * count
    gate.open()
    average.wait()
    assert [shadow.tolist() for (shadow,) in sets] == [[weight] * 3 for weight in WEIGHTS[:count]]


def test_without_that_wait_the_average_is_wrong():
    """Shows that the test above tests something."""
    shadows, sources, average = _average([torch.ones(3)])
    gate = Gate(average, '_run')
    average.update((1.0,))
    sources[0].fill_(100)
    gate.open()
    average.wait()
    assert shadows[0].tolist() == [100, 100, 100]


@for_one_and_three
def test_buffers_may_be_written_as_soon_as_update_returns(count):
    averaged = [*torch.zeros(count, 2), torch.ones(2)]
    counted = [*torch.zeros(count, dtype=torch.int64), torch.tensor(3)]
    average = HostAverage([], [tuple(averaged)], [tuple(counted)])
    gate = Gate(average, '_run')
    average.update(WEIGHTS[:count])
    averaged[-1].fill_(100)
    counted[-1].fill_(100)
    gate.open()
    average.wait()
    assert [shadow.tolist() for shadow in averaged[:-1]] == [[weight] * 2 for weight in WEIGHTS[:count]]
    assert [shadow.item() for shadow in counted[:-1]] == [3] * count


@for_one_and_three
def test_an_element_of_a_buffer_is_copied_where_it_was_not_finite(count):
    *shadows, source = *torch.zeros(count, 2), torch.tensor([torch.inf, 8.0])
    average = HostAverage([], [(*shadows, source)], [])
    for value in (torch.inf, 4.0):
        source[0] = value
        average.update([0.5] * count)
    average.wait()
    assert [shadow.tolist() for shadow in shadows] == [[4.0, 6.0]] * count


def test_a_second_update_waits_for_the_first():
    shadows, sources, average = _average([torch.full((5,), 4.0)], chunk=2)
    for value in (4.0, 8.0, 16.0):
        average.wait_for_reads()
        sources[0].fill_(value)
        average.update((0.5,))
    average.wait()
    assert shadows[0].tolist() == [10.5] * 5  # 2, 5, 10.5


def test_a_second_update_leaves_what_the_first_has_not_averaged_yet():
    shadow, source = torch.zeros(2), torch.ones(2)
    average = HostAverage([], [(shadow, source)], [])
    gate = Gate(average, '_run')
    average.update((1.0,))
    source.fill_(100)
    threading.Timer(0.05, gate.open).start()
    average.update((0.0,))
    average.wait()
    assert shadow.tolist() == [1, 1]


def test_a_wait_that_is_interrupted_leaves_the_next_one_to_wait(monkeypatch):
    shadows, _, average = _average([torch.ones(3)])
    gate = Gate(average, '_average')
    average.update((1.0,))

    def interrupt(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(Future, 'result', interrupt)
        with pytest.raises(KeyboardInterrupt):
            average.wait()
    threading.Timer(0.05, gate.open).start()
    average.wait()
    assert shadows[0].tolist() == [1, 1, 1]


def test_an_error_in_the_thread_is_raised_by_the_next_wait_and_only_there(monkeypatch):
    shadows, _, average = _average([torch.ones(3)])

    def fail(*_):
        raise ZeroDivisionError

    with monkeypatch.context() as patched:
        patched.setattr(average, '_average', fail)
        average.update((1.0,))
        with pytest.raises(ZeroDivisionError):
            average.wait()
    average.wait()
    average.update((1.0,))
    average.wait()
    assert shadows[0].tolist() == [1, 1, 1]


def test_an_error_before_the_sources_are_read_does_not_hang_who_waits_to_write_them(monkeypatch):
    _, _, average = _average([torch.ones(3)])

    def fail():
        raise ZeroDivisionError

    monkeypatch.setattr(average, '_on_side_stream', fail)
    average.update((1.0,))
    average.wait_for_reads()
    with pytest.raises(ZeroDivisionError):
        average.wait()


def test_the_thread_itself_never_waits(monkeypatch):
    """As it would where the garbage collector, in the thread, finds a model whose plan then ends."""
    _, _, average = _average([torch.ones(3)])
    run = average._average

    def average_then_wait(*args):
        run(*args)
        average.wait()
        average.wait_for_reads()

    monkeypatch.setattr(average, '_average', average_then_wait)
    average.update((1.0,))
    done = threading.Thread(target=average.wait, daemon=True)
    done.start()
    done.join(10)
    assert not done.is_alive()


@pytest.mark.usefixtures('as_if_on_another_device')
class TestAShadow:
    def _model(self):
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))

    def test_it_holds_what_one_in_line_holds(self):
        model = self._model()
        beside, in_line = ShadowModel(model, overlap=True), ShadowModel(model)
        for _ in range(3):
            beside.wait_for_reads()
            model(torch.randn(8, 3))
            nn.init.normal_(model[0].weight)
            for shadow in (beside, in_line):
                shadow.update(model, smoothing=0.7)
        for (name, one), (_, two) in zip(
            [*beside.named_parameters(), *beside.named_buffers()],
            [*in_line.named_parameters(), *in_line.named_buffers()],
            strict=True,
        ):
            assert torch.equal(one, two), name

    @pytest.mark.parametrize('labels', [['one'], ['one', 'two', 'three']])
    def test_several_hold_what_single_ones_in_line_hold(self, labels):
        model = self._model()
        beside, in_line = ShadowModels(model, labels, overlap=True), {label: ShadowModel(model) for label in labels}
        smoothing = dict(zip(labels, (0.7, 0.0, 0.99), strict=False))
        for _ in range(3):
            beside.wait_for_reads()
            model(torch.randn(8, 3))
            nn.init.normal_(model[0].weight)
            beside.update(model, smoothing=smoothing)
            for label, shadow in in_line.items():
                shadow.update(model, smoothing=smoothing[label])
        for label, shadow in in_line.items():
            held, expected = (each.averaged_state_dict(model) for each in (beside[label], shadow))
            torch.testing.assert_close(held, expected, rtol=0, atol=0)

    @pytest.mark.parametrize('labels', [['one'], ['one', 'two', 'three']])
    def test_each_tensor_of_the_model_is_copied_once_for_all(self, labels, elements_read):
        model = self._model()
        shadows = ShadowModels(model, labels, overlap=True)
        shadows.update(model, smoothing=0.7)
        shadows.wait()
        for name, tensor in model.state_dict().items():
            assert elements_read(tensor) == tensor.numel(), name

    @pytest.mark.parametrize('options', [{'overlap': False}, {'skip_nonfinite': True}])
    def test_in_line_too_a_counter_is_copied_once_for_all(self, options, elements_read):
        model = self._model()
        shadows = ShadowModels(model, ['one', 'two', 'three'], **{'overlap': True, **options})
        for _ in range(2):
            model(torch.randn(8, 3))
            shadows.update(model, smoothing=0.5)
        assert elements_read(model[1].num_batches_tracked) == 2
        counts = [dict(shadow.named_buffers())['1.num_batches_tracked'].item() for shadow in shadows.values()]
        assert counts == [2, 2, 2]

    def test_on_a_device_no_copy_depends_on_another(self):
        """There one launch makes them all. Tensors on ``meta`` stand for those on a device."""
        rows = [(tuple(torch.empty(3, 1, device='meta')), torch.empty(1, device='meta')) for _ in range(2)]
        together, after = plan._copies(rows)
        assert after == []
        assert len(together) == 6
        assert all(any(source is each for _, each in rows) for _, source in together)

    @pytest.mark.parametrize(
        'read',
        [
            lambda shadow, model: shadow.state_dict()['parameters']['0.weight'],
            lambda shadow, model: dict(copy.deepcopy(shadow).named_parameters())['0.weight'],
            lambda shadow, model: dict(pickle.loads(pickle.dumps(shadow)).named_parameters())['0.weight'],
            lambda shadow, model: next(shadow.parameters()),
            lambda shadow, model: shadow.swap_in(model) or model[0].weight,
            lambda shadow, model: shadow.copy_to(model) or model[0].weight,
        ],
        ids=['state_dict', 'deepcopy', 'pickle', 'parameters', 'swap_in', 'copy_to'],
    )
    def test_every_reader_waits(self, read):
        model = self._model()
        shadow = ShadowModel(model, overlap=True)
        shadow.resolve(model, joining=True)
        gate = Gate(shadow._follower.plan.host_averages[0], '_run')
        nn.init.constant_(model[0].weight, 5.0)
        shadow.update(model, smoothing=0.0)
        assert shadow.is_pending
        threading.Timer(0.05, gate.open).start()
        assert read(shadow, model).unique().tolist() == [5.0]

    def test_a_model_that_is_gone_ends_the_plan(self):
        model = self._model()
        shadow = ShadowModel(model, overlap=True)
        shadow.update(model, smoothing=0.0)
        del model
        gc.collect()
        assert shadow._follower.plan is None

    @pytest.mark.parametrize(
        'options', [{'overlap': False}, {'skip_nonfinite': True}, {'avg_fn': lambda average, new, n: new}]
    )
    def test_what_the_thread_cannot_do_runs_in_line(self, options):
        model = self._model()
        shadow = ShadowModel(model, **{'overlap': True, **options})
        shadow.resolve(model, joining=True)
        assert shadow._follower.plan.host_averages == []

    def test_the_optimizer_lets_the_sources_be_read_before_it_writes_them(self):
        model = nn.Linear(1, 1, bias=False)
        nn.init.constant_(model.weight, 4.0)
        optimizer = EMAOptimizer(torch.optim.SGD(model.parameters(), lr=1.0), decay=0.5, model=model)
        for _ in range(3):  # 4 -> 3 -> 2 -> 1
            model.weight.grad = torch.ones(1, 1)
            optimizer.step()
        assert next(optimizer.shadow.parameters()).item() == 1.875  # 3.5, 2.75, 1.875


class TestCuda:
    pytestmark = on_gpu

    @pytest.fixture
    def model(self):
        model = nn.Sequential(nn.Linear(1024, 2048), nn.BatchNorm1d(2048)).cuda()  # within two chunks
        shadow = ShadowModel(model, device='cpu', overlap=True)
        shadow.update(model, smoothing=0.0)  # loads kernels and pins memory
        shadow.wait()
        torch.cuda.synchronize()
        return model

    def change(self, model, value):
        """A step and a forward, which move weights and statistics."""
        with torch.no_grad():
            model[0].weight.fill_(value)
        model(torch.full((4, 1024), float(value), device='cuda'))
        torch.cuda.synchronize()

    @pytest.mark.parametrize('chunk', [offload.CHUNK, 1000])
    def test_the_average_is_exact_while_the_model_goes_on_changing(self, model, chunk, monkeypatch):
        monkeypatch.setattr(HostAverage.__init__, '__kwdefaults__', {'chunk': chunk})
        beside, in_line = ShadowModel(model, device='cpu', overlap=True), ShadowModel(model, device='cpu')
        for value in range(5):
            beside.wait_for_reads()
            self.change(model, value)
            in_line.update(model, smoothing=0.5)
            beside.update(model, smoothing=0.5)
        for (name, one), (_, two) in zip(
            [*beside.named_parameters(), *beside.named_buffers()],
            [*in_line.named_parameters(), *in_line.named_buffers()],
            strict=True,
        ):
            assert torch.equal(one, two), name

    def test_three_averages_of_one_copy_are_exact_while_the_model_goes_on_changing(self, model, monkeypatch):
        monkeypatch.setattr(HostAverage.__init__, '__kwdefaults__', {'chunk': 1000})
        smoothing = {'short': 0.5, 'none': 0.0, 'long': 0.9}
        beside = ShadowModels(model, smoothing, device='cpu', overlap=True)
        in_line = {label: ShadowModel(model, device='cpu') for label in smoothing}
        for value in range(5):
            beside.wait_for_reads()
            self.change(model, value)
            for label, shadow in in_line.items():
                shadow.update(model, smoothing=smoothing[label])
            beside.update(model, smoothing=smoothing)
        for label, shadow in in_line.items():
            held, expected = (each.averaged_state_dict(model) for each in (beside[label], shadow))
            torch.testing.assert_close(held, expected, rtol=0, atol=0)

    def test_within_two_chunks_neither_update_nor_the_wait_for_reads_makes_the_host_wait(self, model):
        shadow = ShadowModel(model, device='cpu', overlap=True)
        shadow.resolve(model, joining=True)
        torch.cuda._sleep(SLEEP_CYCLES)
        began = time.perf_counter()
        shadow.update(model, smoothing=0.5)
        shadow.wait_for_reads()
        elapsed = time.perf_counter() - began
        assert not torch.cuda.current_stream().query(), 'the sleep is over: the test shows nothing'
        assert elapsed < 0.1
        shadow.wait()

    def test_the_update_sees_the_model_as_the_current_stream_will_have_left_it(self, model):
        shadow = ShadowModel(model, device='cpu', overlap=True)
        shadow.resolve(model, joining=True)
        torch.cuda._sleep(SLEEP_CYCLES)
        with torch.no_grad():
            model[0].weight.fill_(7)
            model[1].running_mean.fill_(3)
        shadow.update(model, smoothing=0.0)
        model[1].running_mean.fill_(1000)
        shadow.wait_for_reads()
        with torch.no_grad():
            model[0].weight.fill_(1000)
        shadow.wait()
        assert dict(shadow.named_parameters())['0.weight'].unique().tolist() == [7.0]
        assert dict(shadow.named_buffers())['1.running_mean'].unique().tolist() == [3.0]

    def test_copies_go_to_pinned_memory(self, model):
        shadow = ShadowModel(model, device='cpu', overlap=True)
        shadow.resolve(model, joining=True)
        (average,) = shadow._follower.plan.host_averages
        assert all(view.is_pinned() for chunk in [*average._chunks, *average._buffers] for view in chunk.copies)
