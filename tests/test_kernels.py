"""Every backend against the equation in float64, over dtypes, layouts and sizes, and the choice between backends."""

import inspect
import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from composer_ema import kernels
from composer_ema.kernels import foreach, fused, reference
from composer_ema.kernels.backend import Backend
from composer_ema.kernels.layout import SMALL, side_by_side

DEVICES = [
    'cpu',
    pytest.param(
        'cuda',
        marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a CUDA device')],
    ),
]
BACKENDS = ['foreach', 'reference']
WEIGHTS = [0.0, 1e-3, 0.25, 0.5, 0.75, 1.0]

#: Largest error of one update, in units of the largest magnitude that took part.
TOLERANCES = {
    torch.float64: 4 * 2.0**-53,  # difference, product and sum each round once, and the reference rounds too
    torch.float32: 4 * 2.0**-24,  # likewise
    torch.complex64: 8 * 2.0**-24,  # a complex product is two real products and a sum
    # The result is held in few digits; torch computes in float32 and rounds once, old releases after each operation.
    torch.float16: 2 * 2.0**-11,
    torch.bfloat16: 2 * 2.0**-8,
}
DTYPES = [
    # shadow, source
    *((dtype, dtype) for dtype in TOLERANCES),
    (torch.float32, torch.float16),
    (torch.float32, torch.bfloat16),
    (torch.float32, torch.float64),
    (torch.float64, torch.float32),
    (torch.bfloat16, torch.float32),
]


def _strided(*shape: int, **options) -> torch.Tensor:
    return torch.randn(*(2 * size for size in shape), **options)[tuple(slice(None, None, 2) for _ in shape)]


def _of_two_layouts(*shape: int, **options) -> torch.Tensor:
    _of_two_layouts.calls += 1
    contiguous = torch.randn(*shape, **options)
    return contiguous.to(memory_format=torch.channels_last) if _of_two_layouts.calls % 2 else contiguous


_of_two_layouts.calls = 0

LAYOUTS: dict[str, Callable[..., torch.Tensor]] = {
    'contiguous': lambda **o: torch.randn(5, 7, **o),
    'scalar': lambda **o: torch.randn((), **o),
    'empty': lambda **o: torch.randn(3, 0, **o),
    'channels_last': lambda **o: torch.randn(2, 3, 4, 5, **o).to(memory_format=torch.channels_last),
    'channels_last to contiguous': lambda **o: _of_two_layouts(2, 3, 4, 5, **o),
    'transposed': lambda **o: torch.randn(5, 7, **o).t(),
    'permuted': lambda **o: torch.randn(2, 3, 4, **o).permute(2, 0, 1),
    'strided': lambda **o: _strided(3, 4, **o),
    'a column': lambda **o: torch.randn(6, 4, **o)[:, 1],
    'larger than the scratch': lambda **o: torch.randn(10, 13, **o),
}


@pytest.fixture(autouse=True)
def _small_scratch(monkeypatch):
    """So that a tensor of a hundred elements already goes through in several chunks."""
    monkeypatch.setattr(foreach, '_CHUNK_CPU', 32)
    monkeypatch.setattr(foreach, '_CHUNK_ACCELERATOR', 32)
    monkeypatch.setattr(foreach, '_GATHERED', 16)


def lerp_(shadows, sources, weight, **options):
    """One update of one average."""
    kernels.prepare([shadows], sources, **options)((weight,))


def assert_close(got, expected, dtypes, scale=1.0):
    shadow_dtype, source_dtype = dtypes
    assert got.dtype == shadow_dtype
    # A cast through the shadow's dtype rounds the source as well.
    tolerance = TOLERANCES[shadow_dtype] * (1 if shadow_dtype == source_dtype else 2)
    error = (got.to(expected.dtype) - expected).abs().max().item() if got.numel() else 0.0
    assert error <= tolerance * scale


@pytest.mark.parametrize('dtypes', DTYPES, ids=lambda pair: ' from '.join(str(d).removeprefix('torch.') for d in pair))
@pytest.mark.parametrize('layout', LAYOUTS)
@pytest.mark.parametrize('backend', BACKENDS)
@pytest.mark.parametrize('device', DEVICES)
def test_an_update_equals_the_formula(device, backend, layout, dtypes):
    torch.manual_seed(0)
    shadow = LAYOUTS[layout](dtype=dtypes[0], device=device)
    source = LAYOUTS[layout](dtype=dtypes[1], device=device)
    strides, source_before = shadow.stride(), source.clone()
    step = kernels.prepare([[shadow]], [source], backend=backend)
    scale = max((t.abs().max().item() for t in (shadow, source) if t.numel()), default=0.0)
    for weight in WEIGHTS:
        expected = reference.average(shadow, source, weight)
        step((weight,))
        assert_close(shadow, expected, dtypes, scale)
    assert shadow.stride() == strides
    assert torch.equal(source, source_before)


@pytest.mark.parametrize('backend', BACKENDS)
@pytest.mark.parametrize('device', DEVICES)
def test_lists_of_all_dtypes_and_layouts_at_once(device, backend):
    torch.manual_seed(1)
    pairs = [
        (make(dtype=dtypes[0], device=device), make(dtype=dtypes[1], device=device), dtypes)
        for dtypes in DTYPES
        for make in LAYOUTS.values()
    ]
    expected = [reference.average(shadow, source, 0.3) for shadow, source, _ in pairs]
    step = kernels.prepare([[s for s, _, _ in pairs]], [s for _, s, _ in pairs], backend=backend)
    step((0.3,))
    for (shadow, _, dtypes), wanted in zip(pairs, expected, strict=True):
        assert_close(shadow, wanted, dtypes, scale=5)


@pytest.mark.parametrize('backend', BACKENDS)
@pytest.mark.parametrize('dtype', TOLERANCES, ids=str)
def test_a_weight_of_zero_freezes_every_bit(backend, dtype):
    shadow = torch.randn(50, dtype=dtype)
    before = shadow.clone()
    lerp_([shadow], [torch.randn(50, dtype=dtype)], 0.0, backend=backend)
    assert torch.equal(shadow, before)


@pytest.mark.parametrize('dtype', TOLERANCES, ids=str)
def test_a_weight_of_one_copies_every_bit(dtype):
    shadow, source = torch.randn(50, dtype=dtype), torch.randn(50, dtype=dtype)
    lerp_([shadow], [source], 1.0)
    assert torch.equal(shadow, source)


@pytest.mark.parametrize('backend', BACKENDS)
def test_three_updates_by_hand(backend):
    shadow, source = torch.tensor([8.0, 0.0]), torch.tensor([0.0, 8.0])
    step = kernels.prepare([[shadow]], [source], backend=backend)
    step((0.5,))
    assert shadow.tolist() == [4.0, 4.0]
    step((0.25,))
    assert shadow.tolist() == [3.0, 5.0]
    source.fill_(11)
    step((0.5,))
    assert shadow.tolist() == [7.0, 8.0]


@pytest.mark.parametrize('backend', BACKENDS)
def test_half_a_step_from_a_bfloat16_source_is_exact_in_a_float32_shadow(backend):
    shadow, source = torch.zeros(40), torch.full((40,), 1.0078125, dtype=torch.bfloat16)
    lerp_([shadow], [source], 2.0**-10, backend=backend)
    assert torch.equal(shadow, torch.full((40,), 1.0078125 * 2.0**-10))


@pytest.mark.parametrize('backend', BACKENDS)
def test_parameters_that_require_a_gradient_are_sources_and_shadows(backend):
    shadow, source = torch.zeros(3, requires_grad=True), torch.ones(3, requires_grad=True)
    lerp_([shadow], [source], 0.5, backend=backend)
    assert shadow.tolist() == [0.5] * 3
    assert shadow.grad_fn is None


@pytest.mark.parametrize('weight', [0.5, 1.0])
def test_an_update_records_nothing_for_autograd(weight, monkeypatch):
    """A record would be invisible in the shadow, and keep every update in memory."""
    written = []

    def spied(call):
        return lambda shadows, *arguments: [call(shadows, *arguments), written.extend(shadows)]

    for name in ('_foreach_lerp_', '_foreach_copy_'):
        monkeypatch.setattr(torch, name, spied(getattr(torch, name)))
    shadow, source = torch.zeros(64, 64), torch.ones(64, 64, requires_grad=True)
    lerp_([shadow], [source], weight)
    assert [tensor.requires_grad for tensor in written] == [False]


@pytest.mark.parametrize('backend', BACKENDS)
def test_nothing_to_average_is_fine(backend):
    lerp_([], [], 0.5, backend=backend)


@given(data=st.data(), weight=st.floats(0, 1))
@settings(max_examples=60, deadline=None)
def test_any_list_of_tensors_moves_as_the_formula_says(data, weight):
    sizes = data.draw(st.lists(st.integers(0, 90), max_size=6))
    dtypes = data.draw(st.lists(st.sampled_from(DTYPES), min_size=len(sizes), max_size=len(sizes)))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**31)))
    draw = torch.empty
    shadows = [draw(n, dtype=d[0]).normal_(generator=generator) for n, d in zip(sizes, dtypes, strict=True)]
    sources = [draw(n, dtype=d[1]).normal_(generator=generator) for n, d in zip(sizes, dtypes, strict=True)]
    expected = [reference.average(*pair, weight) for pair in zip(shadows, sources, strict=True)]
    lerp_(shadows, sources, weight)
    for shadow, wanted, pair in zip(shadows, expected, dtypes, strict=True):
        assert_close(shadow, wanted, pair, scale=6)


def test_the_reference_rounds_once_into_the_shadow():
    shadow, source = torch.tensor([1.0], dtype=torch.bfloat16), torch.tensor([2.0], dtype=torch.bfloat16)
    assert reference.average(shadow, source, 1 / 3).tolist() == [1 + 1 / 3]
    lerp_([shadow], [source], 1 / 3, backend='reference')
    assert shadow.item() == torch.tensor(1 + 1 / 3, dtype=torch.float64).to(torch.bfloat16).item()


def test_no_chunk_of_scratch_exceeds_its_limit(monkeypatch):
    seen, carve = [], foreach.carve

    def spy(scratch, shadows):
        seen.append(sum(shadow.numel() for shadow in shadows))
        return carve(scratch, shadows)

    monkeypatch.setattr(foreach, 'carve', spy)
    sizes = [100, 1, 31, 32, 33, 5]
    shadows, sources = [torch.zeros(n) for n in sizes], [torch.ones(n, dtype=torch.float64) for n in sizes]
    lerp_(shadows, sources, 0.5)
    assert sum(seen) == sum(sizes)
    assert max(seen) <= 32
    assert all(torch.equal(shadow, torch.full_like(shadow, 0.5)) for shadow in shadows)


def test_a_step_allocates_nothing():
    shadows, sources = [torch.zeros(64, 64) for _ in range(3)], [torch.ones(64, 64).bfloat16() for _ in range(3)]
    step = kernels.prepare([[*shadows, torch.zeros(64)]], [*sources, torch.ones(64)])
    step((0.5,))
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        step((0.5,))
    assert [e.name for e in profile.events() or () if e.cpu_memory_usage > 0] == []


def test_auto_takes_the_fast_path(monkeypatch):
    monkeypatch.setattr(reference, 'prepare', None)
    shadow = torch.zeros(3)
    lerp_([shadow], [torch.ones(3)], 0.5, backend='auto')
    assert shadow.tolist() == [0.5] * 3


def test_an_unknown_backend_is_refused_with_the_known_ones():
    with pytest.raises(
        ValueError, match="backend must be one of auto, fused, foreach, blocked, reference, got 'triton'"
    ):
        kernels.prepare([[]], [], backend='triton')


def test_lists_that_do_not_pair_up_are_refused():
    with pytest.raises(ValueError, match='pair up, got 1 and 2 tensors'):
        kernels.prepare([[torch.zeros(1)]], [torch.zeros(1)] * 2)


def test_other_shapes_are_refused_although_they_would_broadcast():
    shadow = torch.zeros(2, 3)
    with pytest.raises(ValueError, match=r'shadow 0 has shape \(2, 3\), its source \(3,\)'):
        lerp_([shadow], [torch.ones(3)], 0.5)
    assert not shadow.any()


@pytest.mark.parametrize('dtype', [torch.int64, torch.bool])
def test_integers_are_refused_with_the_remedy(dtype):
    with pytest.raises(ValueError, match=rf'shadow 0 is {dtype}, but only floating and complex .* Copy it\.'):
        kernels.prepare([[torch.zeros(2, dtype=dtype)]], [torch.zeros(2)])


@pytest.mark.parametrize('dtypes', [(torch.float32, torch.complex64), (torch.complex64, torch.float32)])
def test_real_and_complex_do_not_mix(dtypes):
    with pytest.raises(ValueError, match=r'Both or neither must be complex'):
        kernels.prepare([[torch.zeros(2, dtype=dtypes[0])]], [torch.zeros(2, dtype=dtypes[1])])


def test_no_list_of_shadows_is_refused_with_the_remedy():
    with pytest.raises(ValueError, match=r'at least one list of shadows, got none\. For copies alone pass \[\[\]\]'):
        kernels.prepare([], [])


@pytest.mark.parametrize('backend', BACKENDS)
def test_several_averages_take_one_weight_each(backend):
    shadows, source = [torch.zeros(3, dtype=dtype) for dtype in (torch.float32, torch.float64)], torch.full((3,), 8.0)
    step = kernels.prepare([[shadow] for shadow in shadows], [source], backend=backend)
    step((0.5, 0.25))
    assert [shadow.tolist() for shadow in shadows] == [[4.0] * 3, [2.0] * 3]
    with pytest.raises(ValueError, match=r'zip|one for each of 2 averages, got 1'):
        step((0.5,))


def _averages_of(sources, dtypes, generator):
    """Shadows of each dtype, side by side as a model's are, some elements not finite."""
    averages = []
    for dtype in dtypes:
        shadows = [torch.empty_like(source, dtype=dtype).normal_(generator=generator) for source in sources]
        for shadow in shadows[::3]:
            shadow.view(-1)[:1] = torch.inf
        averages.append(side_by_side(shadows))
    return averages


@given(data=st.data())
@settings(max_examples=50, deadline=None)
def test_several_averages_have_the_bits_of_separate_ones(data):
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**31)))
    sizes = data.draw(st.lists(st.one_of(st.integers(0, 100), st.just(SMALL + 50)), max_size=6))
    kinds = [torch.float32, torch.bfloat16, torch.float64]
    sources = [torch.empty(n, dtype=data.draw(st.sampled_from(kinds))).normal_(generator=generator) for n in sizes]
    for source in sources[::2]:
        source[-1:] = data.draw(st.sampled_from([1.0, torch.nan, -torch.inf]))
    dtypes = data.draw(st.lists(st.sampled_from(kinds), min_size=2, max_size=4))
    weights = [data.draw(st.sampled_from([0.0, 1e-3, 0.3, 0.5, 0.9, 1.0])) for _ in dtypes]
    mended = [index for index in range(len(sizes)) if data.draw(st.booleans())]
    rules = kernels.Rules(skip_nonfinite=data.draw(st.booleans()))
    together = _averages_of(sources, dtypes, generator)
    apart = [[shadow.clone() for shadow in shadows] for shadows in together]
    kernels.prepare(together, sources, mended=mended, rules=rules)(weights)
    for average, shadows, weight in zip(together, apart, weights, strict=True):
        kernels.prepare([shadows], sources, mended=mended, rules=rules)((weight,))
        for one, other in zip(average, shadows, strict=True):
            assert torch.equal(one.nan_to_num(nan=7.0), other.nan_to_num(nan=7.0))


@pytest.fixture
def spied(monkeypatch):
    """Records the calls of torch's functions that read or move: name, elements of the first list, last argument."""
    calls = []

    def spy(name, call):
        def record(first, *arguments, **options):
            calls.append((name, sum(tensor.numel() for tensor in first), arguments[-1] if arguments else None))
            return call(first, *arguments, **options)

        return record

    for name in ('_foreach_lerp_', '_foreach_copy_', 'cat'):
        monkeypatch.setattr(torch, name, spy(name, getattr(torch, name)))
    return calls


def test_averages_take_turns_on_one_piece_of_the_sources(spied):
    shadows = [[torch.zeros(70)] for _ in range(3)]
    step = kernels.prepare(shadows, [torch.ones(70)])
    step((0.5, 0.0, 0.25))
    turns = [(32, 0.5), (32, 0.25), (32, 0.5), (32, 0.25), (6, 0.5), (6, 0.25)]
    assert spied == [('_foreach_lerp_', *turn) for turn in turns]


def test_one_average_is_not_cut(spied):
    kernels.prepare([[torch.zeros(70), torch.zeros(3, 50)]], [torch.ones(70), torch.ones(3, 50)])((0.5,))
    assert spied == [('_foreach_lerp_', 220, 0.5)]


@pytest.mark.parametrize('weights', [(0.5, 0.25, 0.5), (0.0, 0.0, 0.0)])
def test_sources_are_cast_and_gathered_once_for_all_averages(spied, weights):
    sources = [torch.ones(30, dtype=torch.bfloat16), torch.ones(2), torch.ones(3)]
    averages = [side_by_side([torch.zeros(30), torch.zeros(2), torch.zeros(3)]) for _ in range(3)]
    spied.clear()
    kernels.prepare(averages, sources)(weights)
    reads = [(name, elements) for name, elements, _ in spied if name != '_foreach_lerp_']
    assert reads == ([('_foreach_copy_', 30), ('cat', 5)] if any(weights) else [])


@pytest.mark.parametrize('skip_nonfinite', [False, True])
@pytest.mark.parametrize('count', [1, 2])
def test_a_small_vector_is_followed_whatever_reads_it(count, skip_nonfinite):
    """Alone, in a bundle, and looked at: keeps_address() says that no step holds on to its memory."""
    sources = [nn.Parameter(torch.ones(n)) for n in (4, 3, 5)]
    averages = [[torch.zeros(4), *side_by_side([torch.zeros(3), torch.zeros(5)])] for _ in range(count)]
    step = kernels.prepare(averages, sources, rules=kernels.Rules(skip_nonfinite=skip_nonfinite))
    for source in sources:
        source.data = torch.full_like(source, 5.0)
    step((1.0,) * count)
    sources[0].data = torch.full_like(sources[0], torch.nan)
    step((0.5,) * count)
    for first, *others in averages:
        assert first.isfinite().all() if skip_nonfinite else first.isnan().all()
        assert all((shadow == 5).all() for shadow in others)


class TestSkipping:
    """Sources that are NaN or infinite leave their averages alone."""

    @pytest.mark.parametrize('dtypes', DTYPES, ids=str)
    @pytest.mark.parametrize('weight', [0.0, 0.25, 0.75, 1.0])
    @pytest.mark.parametrize('mended', [False, True])
    def test_the_rest_has_the_bits_of_a_plain_update(self, dtypes, weight, mended):
        torch.manual_seed(0)
        shadows = [torch.randn(size, dtype=dtypes[0]) for size in ((), (7,), (9, 11), (SMALL + 3,))]
        sources = [torch.randn(shadow.shape, dtype=dtypes[1]) for shadow in shadows]
        bad = [torch.rand(source.shape) < 0.3 for source in sources]
        for source, places in zip(sources, bad, strict=True):
            source[places] = torch.nan
        shadows[1][1] = torch.inf  # where the average is not finite, it is left alone, too
        bad[1][1], sources[1][1] = True, -torch.inf
        plain, before = [shadow.clone() for shadow in shadows], [shadow.clone() for shadow in shadows]
        options = {'backend': 'foreach', 'mended': range(4) if mended else ()}
        skipped = torch.tensor(0)
        rules = kernels.Rules(skip_nonfinite=True, skipped=skipped)
        kernels.prepare([shadows], sources, rules=rules, **options)((weight,))
        kernels.prepare([plain], sources, **options)((weight,))
        for shadow, places, other, old in zip(shadows, bad, plain, before, strict=True):
            assert torch.equal(shadow, torch.where(places, old, other))
        assert skipped == sum(places.sum() for places in bad) > 0

    @pytest.mark.parametrize('make', [lambda n: torch.ones(n), lambda n: torch.ones(2 * n)[::2]], ids=['flat', 'gaps'])
    @pytest.mark.parametrize('bad', [0, 1, 2])
    def test_small_and_large_sources_are_looked_at_whether_or_not_they_are_gathered(self, bad, make):
        sources = [make(4), make(5), make(20)]
        shadows = [torch.zeros_like(source) for source in sources]
        sources[bad][2] = torch.nan
        lerp_(shadows, sources, 0.5, rules=kernels.Rules(skip_nonfinite=True))
        assert [(shadow == 0).nonzero().tolist() for shadow in shadows] == [[[2]] if n == bad else [] for n in range(3)]

    @pytest.mark.parametrize('dtypes', [[torch.float32] * 3, [torch.float32, torch.float64, torch.bfloat16]])
    @pytest.mark.parametrize('backend', BACKENDS)
    def test_an_element_is_counted_once_for_all_averages(self, backend, dtypes):
        skipped, source = torch.tensor(0), torch.ones(100)
        source[::10] = torch.nan
        rules = kernels.Rules(skip_nonfinite=True, skipped=skipped)
        averages = [[torch.zeros(100, dtype=dtype)] for dtype in dtypes]
        step = kernels.prepare(averages, [source], backend=backend, rules=rules)
        step((0.5, 1.0, 0.5))
        assert skipped == 10
        assert [(shadow == 0).sum().item() for (shadow,) in averages] == [10] * 3

    def test_finite_weights_that_add_up_to_infinity_are_not_skipped(self):
        big = torch.finfo(torch.float32).max
        shadow, skipped = torch.zeros(40), torch.tensor(0)
        rules = kernels.Rules(skip_nonfinite=True, skipped=skipped)
        lerp_([shadow], [torch.full((40,), big)], 1.0, rules=rules)
        assert (shadow == big).all()
        assert skipped == 0

    def test_a_weight_that_only_the_cast_makes_infinite_is_not_skipped(self):
        """As in the reference: what counts is the weight itself."""
        shadow, skipped = torch.zeros(2), torch.tensor(0)
        rules = kernels.Rules(skip_nonfinite=True, skipped=skipped)
        lerp_([shadow], [torch.tensor([1e300, 1.0], dtype=torch.float64)], 1.0, rules=rules)
        assert shadow.tolist() == [torch.inf, 1.0]
        assert skipped == 0

    def test_on_a_cpu_it_is_foreach_that_skips_and_it_allocates_nothing_where_all_is_finite(self):
        dtypes = (torch.float32, torch.float32, torch.bfloat16)
        shadows, sources = [torch.zeros(70, 70) for _ in dtypes], [torch.ones(70, 70, dtype=dtype) for dtype in dtypes]
        rules = kernels.Rules(skip_nonfinite=True, skipped=torch.tensor(0))
        assert kernels.describe([shadows], sources, rules=rules).startswith('3 tensors by foreach')
        step = kernels.prepare([shadows], sources, rules=rules)
        step((0.5,))
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
            step((0.5,))
        assert [e.name for e in profile.events() or () if e.cpu_memory_usage > 0] == []

    def test_a_device_is_not_asked_since_the_host_would_wait(self):
        shadow = torch.zeros(2, device='meta')
        assert 'host would wait' in str(foreach.refusal(shadow, shadow, kernels.Rules(skip_nonfinite=True)))
        assert foreach.refusal(shadow, shadow, kernels.Rules()) is None


@pytest.mark.parametrize('name', [name for name in vars(Backend) if not name.startswith('_')])
@pytest.mark.parametrize('backend', kernels.BACKENDS)
def test_every_backend_has_the_signatures_of_the_protocol(backend, name):
    _, *expected = inspect.signature(getattr(Backend, name)).parameters.values()
    assert list(inspect.signature(getattr(kernels.BACKENDS[backend], name)).parameters.values()) == expected


@pytest.mark.parametrize('weight', [0.0, 0.5, 1.0])
@pytest.mark.parametrize('averages', [[[]], [[torch.zeros(2)], [torch.zeros(2)]]], ids=['alone', 'beside averages'])
@pytest.mark.parametrize('backend', ['auto', *BACKENDS])
def test_copies_are_made_whatever_the_weights(backend, averages, weight):
    pairs = [
        (torch.zeros(2, dtype=torch.int64), torch.tensor([2**40 + 1, -3])),
        (torch.zeros(2, dtype=torch.bool), torch.tensor([True, False])),
        (torch.zeros(2), torch.tensor([1.5, -2.0], dtype=torch.float64)),
        (torch.zeros(2), torch.tensor([0.5, 4.0], requires_grad=True)),
        (torch.zeros(3, 2).t(), torch.arange(6.0).view(2, 3)),
        (torch.zeros(0), torch.zeros(0)),
    ]
    step = kernels.prepare(averages, [torch.ones(2)] if averages[0] else [], copied=pairs, backend=backend)
    step([weight] * len(averages))
    for copy, source in pairs:
        assert copy.tolist() == source.tolist()
        assert not copy.requires_grad


@pytest.mark.parametrize('backend', ['foreach', 'reference'])
@pytest.mark.parametrize('source_dtype', [torch.float32, torch.bfloat16])
@pytest.mark.parametrize('shape', [(), (3,), (3, 2), (4000,)])
def test_a_mended_element_that_is_not_finite_takes_the_source(backend, source_dtype, shape):
    inf = torch.inf
    shadows = [torch.full(shape, value) for value in (1.0, inf, -inf, torch.nan, 1.0, inf, inf)]
    sources = [torch.full(shape, value, dtype=source_dtype) for value in (3.0, 3.0, 3.0, 3.0, inf, inf, -inf)]
    plain, count = [torch.zeros(2), torch.full((2,), inf)], len(shadows)
    step = kernels.prepare(
        [[*shadows, *plain]], [*sources, torch.ones(2), torch.ones(2)], mended=range(count), backend=backend
    )
    step((0.0,))
    assert [shadow.reshape(-1)[0].item() for shadow in shadows[:3]] == [1, inf, -inf]  # a weight of 0 keeps all
    step((0.5,))
    assert all(shadow.unique().numel() == 1 for shadow in shadows)
    assert [shadow.reshape(-1)[0].item() for shadow in shadows] == [2, 3, 3, 3, inf, inf, -inf]
    assert plain[0].tolist() == [0.5, 0.5]
    assert not plain[1].isfinite().any()  # what is not mended shows what went wrong


def test_mending_an_element_leaves_its_neighbours_to_the_formula():
    shadow, source = torch.tensor([1.0, torch.inf, 2.0]), torch.tensor([3.0, 5.0, torch.nan])
    kernels.prepare([[shadow]], [source], mended=[0])((0.25,))
    assert shadow[:2].tolist() == [1.5, 5]
    assert shadow[2].isnan()


def test_averages_and_copies_of_a_device_are_one_step_of_the_backend_itself(monkeypatch):
    given, step = [], object()
    monkeypatch.setattr(foreach, 'prepare', lambda *arguments: given.append(arguments) or step)
    shadow, source, pair = torch.zeros(2), torch.ones(2), (torch.tensor(0), torch.tensor(1))
    assert kernels.prepare([[shadow]], [source], copied=[pair]) is step
    assert given == [([[shadow]], [source], kernels.Rules(), [pair], [False], None)]


def test_groups_of_two_backends_all_run():
    """Random rounding of bfloat16 is the reference's work, float32 beside it and the copy go by foreach."""
    shadows = [torch.zeros(2), torch.zeros(2, dtype=torch.bfloat16)]
    copy, rules = torch.tensor(0), kernels.Rules(stochastic=True)
    step = kernels.prepare([shadows], [torch.ones(2)] * 2, copied=[(copy, torch.tensor(7))], rules=rules)
    step((0.5,))
    assert [shadow.tolist() for shadow in shadows] == [[0.5] * 2] * 2
    assert copy == 7


@pytest.mark.parametrize(
    ('backend', 'shape', 'keeps'),
    [('foreach', (3,), False), ('foreach', (3, 3), True), ('reference', (3,), True), ('auto', (3,), False)],
)
def test_only_small_vectors_are_followed_to_other_memory(backend, shape, keeps):
    shadow, source = torch.zeros(shape), torch.ones(shape)
    assert kernels.keeps_address(shadow, source, backend=backend) is keeps
    assert fused.keeps_address(shadow, source)


def test_an_update_on_a_cpu_imports_no_triton():
    script = """
import sys, torch
from composer_ema import kernels
step = kernels.prepare([[torch.zeros(2)]], [torch.ones(2)], copied=[(torch.tensor(0), torch.tensor(1))])
step((0.5,))
assert 'composer_ema.kernels.fused_kernel' not in sys.modules
"""
    subprocess.run([sys.executable, '-c', script], check=True)


def test_without_triton_the_fused_backend_says_so_and_leaves_cuda_to_the_others(monkeypatch):
    monkeypatch.delitem(sys.modules, 'composer_ema.kernels.fused_kernel', raising=False)
    monkeypatch.delattr(kernels, 'fused_kernel', raising=False)
    monkeypatch.setitem(sys.modules, 'triton', None)
    assert fused.refusal_of_device(torch.device('cuda'), is_asked=False) == 'triton is not installed'


def test_triton_s_interpreter_is_used_only_when_asked(monkeypatch):
    on_cpu = 'Triton runs on CUDA devices, not on cpu'
    monkeypatch.setenv('TRITON_INTERPRET', '1')
    assert fused.refusal_of_device(torch.device('cpu'), is_asked=False) == on_cpu
    monkeypatch.setenv('TRITON_INTERPRET', '0')
    with pytest.raises(ValueError, match=f"the backend 'fused' cannot take this pair: {on_cpu}. Pass backend='auto'."):
        kernels.prepare([[torch.zeros(2)]], [torch.zeros(2)], backend='fused')


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a CUDA device')
@pytest.mark.parametrize('devices', [('cpu', 'cuda'), ('cuda', 'cpu')], ids='{0[0]} shadow, {0[1]} source'.format)
def test_a_shadow_on_another_device_than_its_source(devices):
    shadow, source = torch.zeros(100, device=devices[0]), torch.ones(100, device=devices[1])
    lerp_([shadow], [source], 0.25)
    torch.cuda.synchronize()
    assert torch.equal(shadow.cpu(), torch.full((100,), 0.25))
