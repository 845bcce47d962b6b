"""The Triton kernel against the float64 reference: in Triton's interpreter here, compiled where there is a CUDA device.

Both draw the same random bits, so averages rounded at random must agree to the bit too, but where float32 and float64
arithmetic end on different sides of a rounding.
"""

import itertools
import math
import os
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import nn

from composer_ema import ShadowModel, kernels
from composer_ema.kernels import fused, reference
from composer_ema.kernels.rules import FIRST_PIECE_OF_BUFFERS, PIECE, Rules
from composer_ema.shadow import plan
from composer_ema.shadow.stream import SideStream

pytest.importorskip('triton')
# The interpreter computes with numpy, which warns of the infinities that the tests put in.
pytestmark = pytest.mark.filterwarnings('ignore:invalid value encountered:RuntimeWarning')

DEVICE = torch.device('cuda' if torch.cuda.is_available() else 'cpu')
SOURCE_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SHADOW_DTYPES = (torch.float32, torch.bfloat16)
#: Relative slack: float32 arithmetic is right to a few of its last places; bfloat16 has 8 digits, and may end one off.
SLACK = {torch.float32: 4e-7, torch.bfloat16: 2**-7}
WEIGHTS = (0.25, 0.75, 1.0, 1e-6)


def tensors(*shapes, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator).to(DEVICE, dtype) for shape in shapes]


def lerp_(shadows, sources, weight, **options):
    """One update of one average."""
    kernels.prepare([shadows], sources, **options)((weight,))


def march(shadow_sets, sources, weights, *, steps=2, **rules):
    """Averages with the kernel and with the reference, side by side. Returns both, and both counts of skipped ones."""
    twins = [[shadow.clone() for shadow in shadows] for shadows in shadow_sets]
    counts = [torch.zeros((), dtype=torch.int64, device=DEVICE) for _ in range(2)]
    runs = [
        kernels.prepare(sets, sources, backend=backend, rules=Rules(skipped=count, **rules))
        for sets, backend, count in zip((shadow_sets, twins), ('fused', 'reference'), counts, strict=True)
    ]
    for _ in range(steps):
        for run in runs:
            run(weights)
    return shadow_sets, twins, [int(count) for count in counts]


def assert_agree(ours, theirs):
    for shadow, expected in zip(itertools.chain(*ours), itertools.chain(*theirs), strict=True):
        slack = SLACK[shadow.dtype]
        torch.testing.assert_close(shadow, expected, rtol=slack, atol=slack, equal_nan=True)
        if shadow.dtype is torch.bfloat16 and shadow.numel() > 1000:
            assert (shadow == expected).float().mean() > 0.999


@pytest.mark.parametrize('guard', [False, True])
@pytest.mark.parametrize('shadow_dtype', SHADOW_DTYPES, ids=str)
def test_what_is_mended_takes_the_source_where_it_or_the_average_is_not_finite(shadow_dtype, guard):
    inf = math.inf
    values = [(1.0, 3.0), (inf, 3.0), (math.nan, 3.0), (1.0, inf), (inf, -inf), (-inf, -inf)]
    given = [torch.tensor([old for old, _ in values], dtype=shadow_dtype, device=DEVICE) for _ in range(2)]
    sources = [torch.tensor([new for _, new in values], dtype=dtype, device=DEVICE) for dtype in SOURCE_DTYPES[:2]]
    sources[1] = sources[1].float()
    copy, counter = torch.zeros(2, dtype=torch.int64, device=DEVICE), torch.tensor([7, 9], device=DEVICE)
    averages = []
    for backend in ('fused', 'reference'):
        shadows = [shadow.clone() for shadow in given]
        rules = Rules(skip_nonfinite=guard)
        step = kernels.prepare([shadows], sources, mended=[1], copied=[(copy, counter)], backend=backend, rules=rules)
        step((0.0,))
        torch.testing.assert_close(shadows, given, rtol=0, atol=0, equal_nan=True)
        step((0.5,))
        averages.append(shadows)
    assert_agree([averages[0][1:]], [averages[1][1:]])
    assert averages[0][1][:3].tolist() == [2, 3, 3]
    assert averages[0][1][3:].tolist() == ([1, inf, -inf] if guard else [inf, -inf, -inf])
    assert averages[0][0][0] == 2
    assert not averages[0][0][1].isfinite()
    assert copy.tolist() == [7, 9]


@pytest.mark.parametrize(
    'rules', [{}, {'skip_nonfinite': True}, {'stochastic': True}, {'skip_nonfinite': True, 'stochastic': True}], ids=str
)
@pytest.mark.parametrize('count', [1, 2, 4])
@pytest.mark.parametrize('shadow_dtypes', [(torch.float32,), (torch.bfloat16,), SHADOW_DTYPES], ids=str)
def test_the_kernel_agrees_with_the_reference(shadow_dtypes, count, rules):
    sources = [
        tensors((size,), dtype=dtype)[0] for size, dtype in zip((PIECE + 5, 3, PIECE), SOURCE_DTYPES, strict=True)
    ]
    sources += [tensors((3, 8, 5, 5))[0].to(memory_format=torch.channels_last), *tensors(())]
    if rules.get('skip_nonfinite'):
        sources[0][2], sources[1][0], sources[2][-1] = math.nan, math.inf, -math.inf
    dtypes = itertools.cycle(shadow_dtypes)
    shadow_sets = [[torch.ones_like(s, dtype=next(dtypes)) for s in sources] for _ in range(count)]
    ours, theirs, skipped = march(shadow_sets, sources, WEIGHTS[:count], seed=2**40 + 7, first_step=3, **rules)
    assert_agree(ours, theirs)
    assert skipped == ([6, 6] if rules.get('skip_nonfinite') else [0, 0])


@pytest.mark.parametrize('size', [1, 15, 16, PIECE - 1, PIECE, PIECE + 1, 3 * PIECE + 17])
@pytest.mark.parametrize('dtype', SOURCE_DTYPES)
def test_every_size_is_covered_once(size, dtype):
    (source,) = tensors((size,), dtype=dtype)
    around = torch.full((size + 2,), 7.0, device=DEVICE)
    shadow = around[1:-1]  # not aligned, and any write beside it shows
    ours, theirs, _ = march([[shadow]], [source], (0.5,), steps=1)
    assert_agree(ours, theirs)
    assert around[0] == around[-1] == 7


def test_by_hand():
    shadow, source = torch.zeros(2, device=DEVICE), torch.tensor([1.0, -4.0], device=DEVICE)
    lerp_([shadow], [source], 0.25, backend='fused')
    assert shadow.tolist() == [0.25, -1.0]


def test_a_weight_of_one_copies_over_what_is_not_finite_and_zero_keeps():
    shadow, (source,) = torch.tensor([math.inf, math.nan, 1.0], device=DEVICE), tensors((3,))
    kept = shadow.clone()
    lerp_([shadow], [source], 0.0, backend='fused')
    assert shadow[2] == kept[2]
    lerp_([shadow], [source], 1.0, backend='fused')
    assert torch.equal(shadow, source)


def test_a_source_that_is_not_finite_leaves_every_average_alone_and_is_counted_once():
    source = torch.tensor([math.nan, 1.0, math.inf], device=DEVICE)
    shadow_sets = [[torch.zeros(3, device=DEVICE)] for _ in range(3)]
    count = torch.zeros((), dtype=torch.int64, device=DEVICE)
    step = kernels.prepare(shadow_sets, [source], backend='fused', rules=Rules(skip_nonfinite=True, skipped=count))
    step((0.5, 1.0, 0.25))
    assert [shadows[0].tolist() for shadows in shadow_sets] == [[0, 0.5, 0], [0, 1, 0], [0, 0.25, 0]]
    assert count == 2


def test_rounding_at_random_is_right_on_average_and_keeps_what_bfloat16_holds():
    between = 1 + 2**-7 / 4  # a quarter of the way from 1 to the next bfloat16
    source = torch.full((64 * PIECE,), between, device=DEVICE)
    shadow = torch.zeros_like(source, dtype=torch.bfloat16)
    kernels.prepare([[shadow]], [source], backend='fused', rules=Rules(stochastic=True, seed=1))((1.0,))
    assert set(shadow.float().unique().tolist()) == {1.0, 1 + 2**-7}
    share = (shadow > 1).float().mean().item()
    assert abs(share - 0.25) < 5 * math.sqrt(0.25 * 0.75 / source.numel())
    exact = torch.tensor([1.0, -2.5, 0.0, 2.0**-100, 3.3895313892515355e38], device=DEVICE)
    held = torch.zeros_like(exact, dtype=torch.bfloat16)
    kernels.prepare([[held]], [exact], backend='fused', rules=Rules(stochastic=True))((1.0,))
    assert torch.equal(held.float(), exact)


def test_random_bits_follow_seed_step_and_average_and_nothing_else():
    def bits(**rules):
        (source,), sets = tensors((500,)), [[torch.zeros(500, dtype=torch.bfloat16, device=DEVICE)] for _ in range(2)]
        kernels.prepare(sets, [source], backend='fused', rules=Rules(stochastic=True, **rules))((0.3, 0.3))
        return [shadows[0].view(torch.int16).tolist() for shadows in sets]

    assert bits(seed=1) == bits(seed=1)
    assert bits(seed=1) != bits(seed=2)
    assert bits(seed=1) != bits(seed=1, first_step=1)
    assert bits(seed=1)[0] != bits(seed=1)[1]


def test_philox_is_the_published_one():
    """The known answer of Philox4x32 with seven rounds for counter and key of zeros (Random123's kat_vectors)."""
    zero = torch.zeros(1, dtype=torch.int64)
    words = reference.philox(0, zero, zero, 0, 0).flatten().tolist()
    assert words == [0x5F6FB709, 0x0D893F64, 0x4F121F81, 0x4F730A48]


def test_small_updates_survive_in_bfloat16_only_at_random():
    """After one half-life of updates of weight 0.005, half the way is covered; to the nearest, none of it."""
    source = torch.full((PIECE,), 2.0, device=DEVICE)
    half_life = 138
    weight = -math.expm1(-math.log(2) / half_life)
    ends = {}
    for stochastic in (False, True):
        shadow = torch.ones(PIECE, dtype=torch.bfloat16, device=DEVICE)
        rules = Rules(stochastic=stochastic, seed=5)
        backend = 'fused' if DEVICE.type == 'cuda' else 'reference'
        step = kernels.prepare([[shadow]], [source], backend=backend, rules=rules)
        for _ in range(half_life):
            step((weight,))
        ends[stochastic] = shadow.float().mean().item()
    assert abs(ends[True] - 1.5) < 0.01
    assert abs(ends[False] - 1.5) > 0.05


@pytest.mark.parametrize(
    ('shadow', 'source', 'reason'),
    [
        (torch.zeros(2, dtype=torch.float64), torch.zeros(2), 'averages of torch.float64 are not fused'),
        (torch.zeros(2), torch.zeros(2, dtype=torch.float64), 'weights of torch.float64 are not fused'),
        (torch.zeros(2, 2), torch.zeros(2, 2).t(), 'do not lie densely in the same order'),
        (torch.zeros(4)[::2], torch.zeros(4)[::2], 'do not lie densely in the same order'),
    ],
)
def test_a_pair_that_cannot_be_fused_is_refused_in_words_and_goes_elsewhere(shadow, source, reason):
    shadow, source = shadow.to(DEVICE), source.to(DEVICE)
    if not shadow.is_contiguous():
        shadow = torch.zeros(4, device=DEVICE)[::2]
        source = torch.zeros(4, device=DEVICE)[::2]
    with pytest.raises(ValueError, match=reason):
        kernels.prepare([[shadow]], [source], backend='fused')
    lerp_([shadow], [source + 1], 0.5)
    assert (shadow == 0.5).all()


def test_foreach_refuses_to_round_at_random_and_the_description_says_so():
    shadow, source = torch.zeros(2, dtype=torch.bfloat16), torch.ones(2)
    said = kernels.describe([[shadow]], [source], rules=Rules(stochastic=True))
    assert said == (
        '1 tensor by reference (no fused: Triton runs on CUDA devices, not on cpu, '
        'no foreach: foreach kernels round to the nearest)'
    )


def test_a_shadow_skips_counts_and_goes_on(caplog):
    model = nn.Linear(3, 2).to(DEVICE)
    shadow = ShadowModel(model, skip_nonfinite=True)
    shadow.update(model, smoothing=0.5)
    before = [tensor.clone() for tensor in shadow.parameters()]
    with torch.no_grad():
        model.bias.fill_(math.nan)
        model.weight.add_(1)
    shadow.update(model, smoothing=0.5)
    after = list(shadow.parameters())
    torch.testing.assert_close(after[0], before[0] + 0.5)
    assert torch.equal(after[1], before[1])
    if DEVICE.type == 'cuda':
        torch.cuda.synchronize()
        shadow.poll_skipped()
        torch.cuda.synchronize()
    assert shadow.poll_skipped() == 2


def test_a_bfloat16_shadow_resumes_to_the_bit():
    def start():
        torch.manual_seed(0)
        model = nn.Linear(40, 40).to(DEVICE)
        return model, ShadowModel(model, dtype='bfloat16', rounding='stochastic', seed=3)

    def go_on(model, shadow, steps):
        for step in steps:
            with torch.no_grad():
                model.weight.add_(0.01 * step)
            shadow.update(model, smoothing=0.9)

    (model, whole), (other, first) = start(), start()
    go_on(model, whole, range(6))
    go_on(other, first, range(3))
    resumed = ShadowModel(other, dtype='bfloat16', rounding='stochastic')
    resumed.load_state_dict(first.state_dict())
    go_on(other, resumed, range(3, 6))
    for name, tensor in resumed.named_parameters():
        assert torch.equal(tensor, dict(whole.named_parameters())[name]), name


def test_steps_of_other_first_pieces_draw_other_bits_and_the_reference_draws_the_same():
    (source,) = tensors((PIECE + 5,))

    def rounded(first_piece):
        shadow = torch.zeros_like(source, dtype=torch.bfloat16)
        ours, theirs, _ = march([[shadow]], [source], (0.3,), stochastic=True, first_piece=first_piece)
        assert_agree(ours, theirs)
        return shadow

    assert (rounded(0) != rounded(FIRST_PIECE_OF_BUFFERS)).float().mean() > 0.2


@pytest.mark.parametrize('backend', ['fused', 'reference'])
def test_a_buffer_draws_other_random_bits_than_a_parameter_of_its_shape(backend):
    model = nn.Linear(64, 1, bias=False).to(DEVICE)
    model.register_buffer('twin', torch.empty_like(model.weight))
    alone = nn.Linear(64, 1, bias=False).to(DEVICE)
    shadows = []
    for each in (model, alone):
        for tensor in each.state_dict().values():
            nn.init.ones_(tensor)
        shadows.append(ShadowModel(each, dtype='bfloat16', rounding='stochastic', buffers='average', backend=backend))
        for tensor in each.state_dict().values():
            nn.init.constant_(tensor, 1.001)
    for _ in range(8):
        for shadow, each in zip(shadows, (model, alone), strict=True):
            shadow.update(each, smoothing=0.5)
    parameter, buffer = dict(shadows[0].named_parameters())['weight'], dict(shadows[0].named_buffers())['twin']
    assert (parameter != buffer).sum() > 0
    assert torch.equal(parameter, dict(shadows[1].named_parameters())['weight'])  # whether or not there is a buffer


def batch_norm_net():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 4, 1), nn.BatchNorm2d(4))
    net.register_buffer('mask', torch.tensor([True, False, True]))
    return net.to(DEVICE)


class TestCopies:
    @pytest.mark.parametrize('dtype', [torch.int64, torch.int32, torch.int16, torch.uint8, torch.bool, torch.float64])
    @pytest.mark.parametrize('size', [1, 3, PIECE, 2 * PIECE + 1])
    def test_every_dtype_and_size_is_copied_to_its_end_and_no_further(self, dtype, size):
        source = torch.arange(size, device=DEVICE).remainder(101).to(dtype)
        around = torch.zeros(size + 2, dtype=dtype, device=DEVICE)
        kernels.prepare([[]], [], copied=[(around[1:-1], source)], backend='fused')((0.5,))
        assert torch.equal(around[1:-1], source)
        assert around[0] == around[-1] == 0

    @pytest.mark.parametrize('weight', [0.0, 0.5, 1.0])
    @pytest.mark.parametrize('count', [1, 3])
    def test_they_ride_with_averages_whatever_the_weight(self, count, weight):
        sources, counter = tensors((PIECE + 1,), (5,)), torch.tensor(2**40 + 3, device=DEVICE)
        copy = torch.zeros_like(counter)
        averages = [[torch.zeros_like(source) for source in sources] for _ in range(count)]
        step = kernels.prepare(averages, sources, copied=[(copy, counter)], backend='fused')
        step([weight] * count)
        counter.add_(1)
        step([weight] * count)
        assert copy == 2**40 + 4
        for shadow, source in zip(itertools.chain(*averages), sources * count, strict=True):
            torch.testing.assert_close(shadow, source * (1 - (1 - weight) ** 2))

    def test_they_leave_random_bits_as_they_are(self):
        def rounded(copied):
            (source,) = tensors((2 * PIECE,))
            shadow = torch.zeros_like(source, dtype=torch.bfloat16)
            rules = Rules(stochastic=True, seed=1)
            step = kernels.prepare([[shadow]], [source], copied=copied, backend='fused', rules=rules)
            step((0.3,))
            step((0.3,))
            return shadow

        counter = torch.ones(9, dtype=torch.int64, device=DEVICE)
        assert torch.equal(rounded([]), rounded([(torch.zeros_like(counter), counter)]))

    def test_one_that_the_kernel_cannot_take_is_copied_all_the_same(self):
        wide, gaps = torch.tensor([1.5, 2.5], device=DEVICE), torch.arange(6, device=DEVICE)[::2]
        narrow, dense = torch.zeros(2, dtype=torch.float16, device=DEVICE), torch.zeros(3, device=DEVICE).long()
        kernels.prepare([[]], [], copied=[(narrow, wide), (dense, gaps)], backend='fused')((0.0,))
        assert (narrow.tolist(), dense.tolist()) == ([1.5, 2.5], [0, 2, 4])

    def test_parameters_buffers_and_counters_are_one_launch(self, launches):
        net = batch_norm_net()
        shadow = ShadowModel(net, backend='fused')
        shadow.update(net, smoothing=0.5)
        launches.clear()
        with torch.no_grad():
            for tensor in itertools.chain(net.parameters(), net.buffers()):
                tensor.copy_(~tensor) if tensor.dtype is torch.bool else tensor.add_(2)
        shadow.update(net, smoothing=0.5)
        assert len(launches) == 1
        for name, average in itertools.chain(shadow.named_parameters(), shadow.named_buffers()):
            live = net.state_dict()[name]
            assert torch.equal(average, live - 1 if live.is_floating_point() else live), name

    def test_where_parameters_run_beside_training_buffers_and_counters_are_one_more_launch_in_line(
        self, launches, monkeypatch
    ):
        net, forked = batch_norm_net(), []

        @contextmanager
        def fork(stream):
            before = len(launches)
            yield
            forked.append(len(launches) - before)

        monkeypatch.setattr(SideStream, 'is_beside', True)
        monkeypatch.setattr(plan, 'WORTH_FORKING', 0)
        monkeypatch.setattr(SideStream, 'fork', fork)
        shadow = ShadowModel(net, backend='fused')
        shadow.update(net, smoothing=0.5)
        assert (forked, len(launches)) == ([0, 1], 2)  # prepared and launched on the side stream
        for name, buffer in shadow.named_buffers():
            assert torch.equal(buffer, net.get_buffer(name)), name
        net[1].num_batches_tracked.add_(3)
        shadow.update(net, smoothing=0.5)
        assert dict(shadow.named_buffers())['1.num_batches_tracked'] == net[1].num_batches_tracked

    def test_a_counter_that_moves_to_other_memory_is_still_followed(self):
        net = batch_norm_net()
        shadow = ShadowModel(net, backend='fused')
        shadow.update(net, smoothing=0.5)
        net[1].num_batches_tracked.data = torch.tensor(7, device=DEVICE)
        shadow.update(net, smoothing=0.5)
        assert dict(shadow.named_buffers())['1.num_batches_tracked'] == 7

    def test_random_bits_do_not_depend_on_what_runs_beside(self, monkeypatch):
        def rounded():
            net = batch_norm_net()
            shadow = ShadowModel(net, backend='fused', dtype='bfloat16', rounding='stochastic', seed=3)
            for smoothing in (0.0, 0.7, 0.7):
                shadow.update(net, smoothing=smoothing)
                with torch.no_grad():
                    for tensor in itertools.chain(net.parameters(), net.buffers()):
                        tensor.copy_(~tensor) if tensor.dtype is torch.bool else tensor.mul_(3)
            return [*shadow.parameters(), *shadow.buffers()]

        in_line = rounded()
        monkeypatch.setattr(SideStream, 'is_beside', True)
        monkeypatch.setattr(plan, 'WORTH_FORKING', 0)
        assert all(map(torch.equal, in_line, rounded()))

    @pytest.mark.parametrize('lazy', [torch.Tensor.conj, lambda tensor: torch.imag(tensor.conj())], ids=['conj', 'neg'])
    def test_what_memory_holds_otherwise_than_it_reads_is_copied_as_it_reads(self, lazy):
        source = lazy(torch.tensor([1 + 2j, 3 - 4j], device=DEVICE))
        assert source.is_conj() or source.is_neg()
        copy = torch.zeros_like(source.clone())
        kernels.prepare([[]], [], copied=[(copy, source)], backend='fused')((0.0,))
        assert torch.equal(copy, source)

    def test_one_of_another_shape_is_refused_before_anything_is_written(self):
        copy, source = torch.zeros(2, device=DEVICE), torch.ones(6, device=DEVICE)
        with pytest.raises(ValueError, match=r'copy 0 has shape \(2,\), its source \(6,\)'):
            kernels.prepare([[]], [], copied=[(copy, source)], backend='fused')
        assert not copy.any()

    def test_bytes_that_no_word_begins_with_are_copied_one_by_one(self):
        memory = torch.zeros(16, dtype=torch.bool, device=DEVICE)
        whole, shifted = memory[:8], memory[1:9]
        codes = fused._rows_of_copies([(whole, whole), (shifted, whole), (whole, shifted)], 5)[:, 2]
        assert codes.tolist() == [fused._WORDS, fused._BYTES, fused._BYTES]

    def test_another_backend_that_was_asked_for_copies_without_the_kernel(self, launches, monkeypatch):
        monkeypatch.setattr(fused, 'refusal_of_device', lambda device, is_asked: None)
        counter = torch.tensor(5, device=DEVICE)
        for backend in ('foreach', 'reference'):
            copy = torch.zeros_like(counter)
            kernels.prepare([[]], [], copied=[(copy, counter)], backend=backend)((0.5,))
            assert copy == 5
        assert launches == []

    def test_empty_ones_launch_nothing(self, launches):
        empty = [(torch.zeros(0, device=DEVICE), torch.zeros(0, device=DEVICE))]
        kernels.prepare([[]], [], copied=empty, backend='fused')((0.5,))
        assert launches == []

    @pytest.fixture
    def launches(self, monkeypatch):
        """Grows by one entry a launch."""
        launched, call = [], fused._Launch.__call__
        monkeypatch.setattr(fused._Launch, '__call__', lambda *given: [launched.append(given), call(*given)])
        return launched


@pytest.mark.parametrize('kind', [list, tuple])
def test_weights_that_stay_are_filled_in_once(kind):
    (shadow, source) = tensors((3,), (3,))
    step = kernels.prepare([[shadow]], [source], backend='fused')
    step(kind([0.5]))
    before = step.weights._version
    step(kind([0.5]))
    assert step.weights._version == before
    step(kind([0.25]))
    assert step.weights._version > before


@pytest.mark.gpu
@pytest.mark.parametrize(('overlap', 'kernels_expected'), [(False, 1), (True, 2)])
def test_a_profiler_sees_one_kernel_an_update_and_one_more_for_buffers_beside_training(
    overlap, kernels_expected, monkeypatch
):
    monkeypatch.setattr(plan, 'WORTH_FORKING', 0)
    net = batch_norm_net()
    shadow = ShadowModel(net, overlap=overlap)
    for _ in range(2):
        shadow.update(net, smoothing=0.5)
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1]))
    from benchmarks.common import count_launches

    assert count_launches(lambda: shadow.update(net, smoothing=0.5)) == kernels_expected


@pytest.mark.gpu
def test_a_captured_graph_replays_with_the_weights_that_stand_in_device_memory():
    (shadow, source) = tensors((1000,), (1000,))
    step = kernels.prepare([[shadow]], [source], backend='fused')
    step((0.5,))  # compiles
    shadow.zero_()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step((0.5,))
    step.weights.fill_(0.25)
    graph.replay()
    torch.testing.assert_close(shadow, source * 0.25)


@pytest.mark.gpu
def test_a_tensor_of_more_than_2_to_the_31_elements_is_covered_to_its_end():
    count = 2**31 + 5000
    if torch.cuda.get_device_properties(0).total_memory < 4 * count * 3:
        pytest.skip('needs 26 GB of device memory')
    source, shadow = torch.ones(count, device='cuda'), torch.zeros(count, device='cuda')
    lerp_([shadow], [source], 0.5, backend='fused')
    assert shadow[0] == shadow[2**31] == shadow[-1] == 0.5
    assert int((shadow == 0.5).sum()) == count


@pytest.mark.parametrize('architecture', [80, 90])
@pytest.mark.slow
def test_the_kernel_compiles_for_devices_that_are_not_here(architecture, tmp_path):
    """Every variant, and with vector loads where pieces are whole and aligned. The interpreter cannot tell."""
    script = Path(__file__).parent / 'scripts' / 'compile_fused.py'
    environment = {**os.environ, 'TRITON_INTERPRET': '0', 'TRITON_CACHE_DIR': str(tmp_path)}
    done = subprocess.run([sys.executable, script, str(architecture)], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert f'134 variants compiled for sm_{architecture}' in done.stdout
