"""Compensated averages: what a Kahan term beside each average keeps, in every backend and every door."""

import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from composer_ema import EMA, SWA, EMAOptimizer, ShadowModel, ShadowModels, kernels
from composer_ema.kernels import blocked
from composer_ema.kernels.layout import side_by_side
from composer_ema.kernels.rules import PIECE, Rules, dtype_of_compensation
from composer_ema.settings import Settings
from tests import plain

BACKENDS = ['fused', 'blocked', 'reference']
COMPENSATED = Rules(compensated=True)
EPS = torch.finfo(torch.float32).eps
# The interpreter of the fused kernel computes with numpy, which warns of the infinities that the tests put in.
pytestmark = pytest.mark.filterwarnings('ignore:invalid value encountered:RuntimeWarning')


@pytest.fixture(autouse=True)
def _small_pieces(monkeypatch):
    """So that a tensor of a hundred elements already goes through in several pieces."""
    monkeypatch.setattr(blocked, '_PIECE_CPU', 32)


@pytest.fixture(params=BACKENDS)
def backend(request):
    if request.param == 'fused':
        pytest.importorskip('triton')
    return request.param


def term_of(shadow):
    return torch.zeros_like(shadow, dtype=dtype_of_compensation(shadow.dtype))


def prepared(shadows, sources, *, rules=COMPENSATED, **options):
    """A step for one average, and its Kahan terms."""
    terms = [term_of(shadow) for shadow in shadows]
    return kernels.prepare([shadows], sources, rules=rules, compensations=[terms], **options), terms


def total(shadow, term):
    return shadow.double() + term.double()


class TestKernels:
    def test_four_updates_of_a_quarter_of_the_last_place_by_hand(self, backend):
        """None is lost: the average moves by one unit in its last place, as soon as that is nearer."""
        shadow, quarter = torch.ones(1), EPS / 4
        source = torch.full((1,), 1 + 2**20 * quarter)
        step, (term,) = prepared([shadow], [source], backend=backend)
        for shown in (0, 0, 1, 1):  # units in the last place; a tie goes to the even number
            step((2.0**-20,))
            assert shadow.item() == 1 + shown * EPS
        assert total(shadow, term).item() == pytest.approx(1 + 4 * quarter, abs=quarter / 1e5)

    @pytest.mark.parametrize(
        'dtypes', [(torch.float32,) * 2, (torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16)]
    )
    def test_an_update_equals_the_formula(self, backend, dtypes):
        torch.manual_seed(0)
        shadows = [1 + torch.rand(n).to(dtypes[0]) for n in (1, 100)]
        shadows.append(1 + torch.rand(2, 3, 4, 5).to(dtypes[0]).to(memory_format=torch.channels_last))
        sources = [1 + torch.rand_like(shadow, dtype=dtypes[1]) for shadow in shadows]
        step, terms = prepared(shadows, sources, backend=backend)
        for weight in (1e-3, 0.3, 0.7):
            before = map(total, shadows, terms)
            wanted = [old + weight * (source.double() - old) for old, source in zip(before, sources, strict=True)]
            step((weight,))
            for shadow, term, each in zip(shadows, terms, wanted, strict=True):
                torch.testing.assert_close(total(shadow, term), each, rtol=1e-7, atol=1e-7)
                half_a_unit = torch.finfo(shadow.dtype).eps / 2 * shadow.abs().double()
                assert (term.abs() <= half_a_unit * 1.001).all()  # so the shadow alone is the average, rounded

    def test_zero_keeps_both_and_one_copies_and_resets(self, backend):
        source = torch.tensor([1.0, 2.0, 3.0])
        shadow, kept = torch.tensor([math.inf, math.nan, 5.0]), torch.tensor([1e-8, 2e-8, 3e-8])
        terms = kept.clone()
        step = kernels.prepare([[shadow]], [source], rules=COMPENSATED, compensations=[[terms]], backend=backend)
        step((0.0,))
        assert (shadow[2], terms.tolist()) == (5, kept.tolist())
        assert not shadow[:2].isfinite().any()
        step((1.0,))
        assert (shadow.tolist(), terms.tolist()) == ([1, 2, 3], [0, 0, 0])

    def test_what_is_not_finite_comes_in_and_is_mended_only_where_asked(self, backend):
        plain_one, mended = torch.ones(3), torch.ones(3)
        source = torch.tensor([math.nan, math.inf, 2.0])
        step, terms = prepared([plain_one, mended], [source, source], mended=[1], backend=backend)
        step((0.5,))
        assert not plain_one[:2].isfinite().any()
        assert mended.isnan().tolist() == [True, False, False]
        source.fill_(3.0)
        step((0.5,))
        assert not plain_one[:2].isfinite().any()
        assert mended.tolist() == [3, 3, 2.25]
        step((0.5,))
        assert mended.tolist() == [3, 3, 2.625]
        assert terms[1].isfinite().all()

    def test_a_source_that_is_skipped_leaves_every_bit_of_both(self, backend):
        count = torch.zeros((), dtype=torch.int64)
        averages, terms = [[torch.ones(2)] for _ in range(2)], [[torch.full((2,), EPS / 4)] for _ in range(2)]
        rules = Rules(compensated=True, skip_nonfinite=True, skipped=count)
        source = torch.tensor([math.nan, 1 + EPS])
        step = kernels.prepare(averages, [source], rules=rules, compensations=terms, backend=backend)
        step((0.5, 0.25))
        assert [each[0][0].item() for each in (*averages, *terms)] == [1, 1, EPS / 4, EPS / 4]
        assert all(each[0].isfinite().all() for each in (*averages, *terms))
        assert count == 1
        source.fill_(2.0)
        step((0.5, 1.0))
        assert [each[0][0].item() for each in averages] == [1.5, 2]
        assert count == 1

    @pytest.mark.parametrize('shadow_dtype', [torch.float32, torch.bfloat16])
    def test_the_fused_kernel_agrees_with_the_blocked_one(self, shadow_dtype):
        pytest.importorskip('triton')
        torch.manual_seed(1)
        sources = [torch.randn(PIECE + 3), torch.randn(5).bfloat16()]
        runs = []
        for name in ('fused', 'blocked'):
            averages = [[torch.ones_like(s, dtype=shadow_dtype) for s in sources] for _ in range(2)]
            terms = [[term_of(shadow) for shadow in each] for each in averages]
            step = kernels.prepare(averages, sources, rules=COMPENSATED, compensations=terms, backend=name)
            for _ in range(3):
                step((0.01, 0.6))
            runs.append([sum_ for pair in zip(averages, terms, strict=True) for sum_ in map(total, *pair)])
        for ours, theirs in zip(*runs, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-7, atol=1e-7)

    @given(
        values=st.lists(st.floats(-1e3, 1e3, width=32), min_size=1, max_size=30),
        smoothing=st.sampled_from([0.5, 0.99, 0.9999, 0.999999]),
        dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    )
    @settings(max_examples=40)
    def test_any_walk_is_followed_as_float64_follows_it(self, values, smoothing, dtype):
        shadow, source, exact = torch.ones(1, dtype=dtype), torch.zeros(1), 1.0
        step, (term,) = prepared([shadow], [source])
        weight = 1 - smoothing
        for value in values:
            source.fill_(value)
            step((weight,))
            exact += weight * (value - exact)
        largest = max(1.0, *map(abs, values))
        assert total(shadow, term).item() == pytest.approx(exact, abs=1e-6 * largest * weight + 1e-7 * abs(exact))

    def test_a_step_of_the_blocked_backend_allocates_nothing(self):
        dtypes = (torch.float32, torch.float32, torch.bfloat16)
        shadows, sources = [torch.zeros(70, dtype=dtype) for dtype in dtypes], [torch.ones(70) for _ in dtypes]
        sources[1] = sources[1].bfloat16()
        step, _ = prepared(shadows, sources, backend='blocked', mended=[1])
        step((0.5,))
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
            step((0.5,))
        assert [e.name for e in profile.events() or () if e.cpu_memory_usage > 0] == []

    def test_small_tensors_that_lie_side_by_side_have_the_bits_of_others(self):
        torch.manual_seed(2)
        sources = [torch.randn(n) for n in (3, 40, 1, 70)]
        apart = [torch.ones(s.shape) for s in sources]
        together = side_by_side([torch.ones(s.shape) for s in sources])
        terms = side_by_side([torch.zeros(s.shape) for s in sources])
        step, terms_apart = prepared(apart, sources)
        other = kernels.prepare([together], sources, rules=COMPENSATED, compensations=[terms])
        for weight in (0.3, 1e-4, 1e-4):
            step((weight,))
            other((weight,))
        assert all(torch.equal(a, b) for a, b in zip([*apart, *terms_apart], [*together, *terms], strict=True))

    def test_terms_that_do_not_fit_are_refused(self):
        shadow, source = torch.ones(2), torch.ones(2)
        for rules, terms, message in (
            (Rules(), [[torch.zeros(2)]], 'got some with compensated=False. Pass both or neither'),
            (COMPENSATED, None, 'got none with compensated=True'),
            (COMPENSATED, [[]], 'as many compensations as shadows'),
            (COMPENSATED, [[torch.zeros(3)]], r'of shape \(3,\).* needs one of torch.float32 .* of shape \(2,\)'),
            (COMPENSATED, [[torch.zeros(2).half()]], 'is torch.float16 .* needs one of torch.float32'),
        ):
            with pytest.raises(ValueError, match=message):
                kernels.prepare([[shadow]], [source], rules=rules, compensations=terms)


class TestPrecision:
    """Against float64, and beside an average without a Kahan term, which loses what this one keeps."""

    @pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
    @pytest.mark.parametrize('course', ['noise', 'walk', 'jump'])
    def test_a_long_half_life_is_kept(self, course, dtype):
        self._march(course, dtype, updates=4000, half_life=1e5)

    @pytest.mark.slow
    @pytest.mark.parametrize('course', ['noise', 'walk', 'jump'])
    def test_a_half_life_of_1e5_after_1e6_updates_is_within_1e_6(self, course):
        self._march(course, torch.float32, updates=1_000_000, half_life=1e5)

    def _march(self, course, dtype, *, updates, half_life):
        generator = torch.Generator().manual_seed(0)
        shadow, source = torch.ones(8, dtype=dtype), torch.ones(8)
        exact, wide = torch.ones(8, dtype=torch.float64), torch.ones(8, dtype=torch.float64)
        step, (term,) = prepared([shadow], [source])
        bare = torch.ones(8, dtype=dtype)
        step_bare = kernels.prepare([[bare]], [source])
        weight = -math.expm1(-math.log(2) / half_life)
        noise = torch.empty(8, dtype=torch.float64)
        for update in range(updates):
            noise.normal_(generator=generator)
            if course == 'walk':
                wide.add_(noise, alpha=1e-3)
            elif course == 'noise':
                torch.add(torch.ones_like(wide), noise, alpha=1e-2, out=wide)
            elif update == updates // 4:
                wide.mul_(1.01)
            source.copy_(wide)
            step((weight,))
            step_bare((weight,))
            exact.lerp_(source.double(), weight)
        error = (total(shadow, term) - exact).norm() / exact.norm()
        assert error < 1e-6
        unit = torch.finfo(dtype).eps
        assert ((shadow.double() - exact).abs() <= unit * exact.abs()).all()  # what is lent and saved
        assert (bare.double() - exact).norm() > 10 * (total(shadow, term) - exact).norm()


def of(shadow):
    return shadow.state_dict()['compensations']


def step(model, shadow, index, weight=1e-6):
    with torch.no_grad():
        for tensor in (*model.parameters(), *(b for b in model.buffers() if b.is_floating_point())):
            tensor.mul_(1 + 0.01 * index)
    shadow.update(model, weight=weight)


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 40))


class TestShadow:
    def test_parameters_and_averaged_buffers_have_terms_and_others_do_not(self):
        model = net()
        shadow = ShadowModel(model, compensated=True)
        step(model, shadow, 1)
        expected = {name for name, _ in model.named_parameters()} | {'1.running_mean', '1.running_var'}
        assert of(shadow).keys() == expected
        assert any(term.abs().max() > 0 for term in of(shadow).values())

    def test_a_new_average_has_terms_in_its_state_to_load_into(self):
        model = net()
        shadow, other = (ShadowModel(model, compensated=True) for _ in range(2))
        step(model, shadow, 1)
        state = other.state_dict()  # as a distributed checkpoint, which writes what it finds there
        for name, term in of(shadow).items():
            state['compensations'][name].copy_(term)
        assert state['compensations'].keys() == of(shadow).keys()
        other.load_state_dict(state)
        plain.assert_same(of(other), of(shadow))

    def test_a_plain_average_has_no_terms_in_its_state(self):
        assert 'compensations' not in ShadowModel(net()).state_dict()

    def test_a_resumed_average_goes_on_to_the_bit(self):
        (model, whole), (other, first) = ((m := net(), ShadowModel(m, compensated=True)) for _ in range(2))
        for index in range(6):
            step(model, whole, index)
        for index in range(3):
            step(other, first, index)
        resumed = ShadowModel(other, compensated=True)
        resumed.load_state_dict(plain.saved(first.state_dict()))
        for index in range(3, 6):
            step(other, resumed, index)
        plain.assert_same(resumed.state_dict(), whole.state_dict())

    def test_a_copy_goes_on_to_the_bit(self):
        model = net()
        shadow = ShadowModel(model, compensated=True)
        step(model, shadow, 1)
        twin = copy.deepcopy(shadow)
        step(model, shadow, 2)
        twin.update(model, weight=1e-6)
        plain.assert_same(twin.state_dict(), shadow.state_dict())

    def test_several_averages_have_the_bits_of_separate_ones(self):
        model, weights = net(), {'short': 0.1, 'long': 1e-6}
        several = ShadowModels(model, list(weights), compensated=True)
        separate = {label: ShadowModel(model, compensated=True) for label in weights}
        for index in range(3):
            with torch.no_grad():
                next(model.parameters()).mul_(1 + 0.01 * index)
            several.update(model, weight=weights)
            for label, shadow in separate.items():
                shadow.update(model, weight=weights[label])
        for label, shadow in separate.items():
            assert of(shadow)['0.weight'].abs().max() > 0
            plain.assert_same(several[label].state_dict(), shadow.state_dict())

    def test_states_with_and_without_terms_load_into_each_other(self):
        model = net()
        shadow, other = ShadowModel(model, compensated=True), ShadowModel(model)
        step(model, shadow, 1)
        other.load_state_dict(shadow.state_dict())
        assert 'compensations' not in other.state_dict()
        other.update(model, weight=0.5)
        shadow.load_state_dict(other.state_dict())
        step(model, shadow, 1, weight=0.0)
        assert all(term.abs().max() == 0 for term in of(shadow).values())

    @pytest.mark.parametrize(
        ('broken', 'message'),
        [
            ({'unknown': torch.zeros(1)}, 'saved Kahan terms does not fit the model. 1 unexpected: unknown'),
            ({'0.weight': torch.zeros(2)}, '1 of another shape or kind: 0.weight'),
            ({'0.weight': 7}, '0.weight'),
            (7, "'compensations' is a int, not a mapping"),
        ],
        ids=str,
    )
    def test_terms_that_do_not_fit_are_refused_before_anything_is_assigned(self, broken, message):
        model = net()
        shadow = ShadowModel(model, compensated=True)
        step(model, shadow, 1)
        before = copy.deepcopy(shadow.state_dict())
        with pytest.raises(ValueError, match=message):
            shadow.load_state_dict({**ShadowModel(net()).state_dict(), 'compensations': broken})
        plain.assert_same(shadow.state_dict(), before)

    def test_another_dtype_keeps_the_sum(self):
        model = net()
        shadow = ShadowModel(model, compensated=True, dtype='bfloat16')
        step(model, shadow, 1, weight=0.01)
        step(model, shadow, 3, weight=0.01)
        sums = {name: total(tensor, of(shadow)[name]) for name, tensor in shadow.named_parameters()}
        shadow.to(dtype='float32')
        step(model, shadow, 0, weight=0.0)
        for name, tensor in shadow.named_parameters():
            torch.testing.assert_close(total(tensor, of(shadow)[name]), sums[name], rtol=1e-9, atol=1e-12)
        narrow = ShadowModel(model, compensated=True, dtype='bfloat16')
        narrow.load_state_dict(shadow.state_dict())
        for name, tensor in narrow.named_parameters():
            torch.testing.assert_close(total(tensor, of(narrow)[name]), sums[name], rtol=1e-7, atol=1e-10)

    def test_a_tensor_that_is_replaced_starts_without_a_term(self):
        model = net()
        shadow = ShadowModel(model, compensated=True)
        step(model, shadow, 1)
        old = of(shadow)['0.weight'].clone()
        shadow.leave_out(['0.weight'])
        shadow.resolve(model, joining=True)
        assert old.abs().max() > 0
        assert of(shadow)['0.weight'].abs().max() == 0
        assert of(shadow)['0.bias'].abs().max() > 0

    def test_a_term_follows_a_new_name(self):
        model = plain.One(1.0)
        shadow = ShadowModel(model, compensated=True)
        plain.set_(model.weight, 1.01)
        shadow.update(model, weight=1e-6)
        before = of(shadow)['weight'].clone()
        model.renamed = model.weight
        del model.weight
        shadow.resolve(model, renamed={'weight': 'renamed'})
        assert torch.equal(of(shadow)['renamed'], before)
        assert before != 0

    @pytest.mark.filterwarnings('error')
    def test_it_never_warns_of_its_weight(self):
        for dtype in ('float32', 'bfloat16'):
            step(model := net(), ShadowModel(model, compensated=True, dtype=dtype), 1, weight=1e-9)


class TestDoors:
    def test_an_optimizer_goes_on_from_its_state_to_the_bit(self):
        def start():
            model = plain.Net()
            return model, EMAOptimizer(plain.sgd(model), decay=0.999999, model=model, compensated=True)

        (model, whole), (other, first) = start(), start()
        plain.train(model, whole, range(4))
        plain.train(other, first, range(2))
        state = plain.saved(first.state_dict())
        resumed = EMAOptimizer(plain.sgd(other), decay=0.999999, model=other, compensated=True)
        resumed.load_state_dict(state)
        plain.train(other, resumed, range(2, 4))
        plain.assert_same(of(resumed.shadow), of(whole.shadow))
        plain.assert_same(plain.averaged(resumed), plain.averaged(whole))
        assert any(term.abs().max() > 0 for term in of(whole.shadow).values())

    def test_a_trainer_goes_on_from_its_checkpoint_to_the_bit(self, trainer, tmp_path):
        def run(duration, **options):
            ema = EMA(smoothing=0.99999, compensated=True)
            made = trainer([ema], max_duration=duration, **options)
            made.fit()
            return ema

        whole = run('4ba')
        run('2ba', save_folder=str(tmp_path), save_interval='2ba')
        resumed = run('4ba', load_path=str(tmp_path / 'latest-rank0.pt'))
        assert whole.ema_model is not None
        assert resumed.ema_model is not None
        assert any(term.abs().max() > 0 for term in of(whole.ema_model).values())
        plain.assert_same(resumed.ema_model.state_dict(), whole.ema_model.state_dict())

    def test_every_door_takes_it(self):
        assert 'compensated=True' in repr(EMA('10ba', compensated=True))
        assert 'compensated=True' in repr(SWA(compensated=True))

    @pytest.mark.parametrize(
        ('arguments', 'error', 'message'),
        [
            ({'compensated': 'yes'}, TypeError, "compensated must be True or False, got 'yes'"),
            ({'rounding': 'stochastic', 'dtype': 'bfloat16'}, ValueError, 'Pass one of the two'),
            ({'backend': 'foreach'}, ValueError, "backend='foreach' keeps no Kahan term.* Pass backend='blocked'"),
            ({'avg_fn': lambda a, b, n: a}, ValueError, 'compensated=True has no effect on an average by a function'),
            ({'compensated': False, 'backend': 'blocked'}, ValueError, 'Pass compensated=True as well'),
        ],
        ids=lambda part: ', '.join(part) if isinstance(part, dict) else None,
    )
    def test_what_cannot_take_effect_with_it_is_refused(self, arguments, error, message):
        with pytest.raises(error, match=message):
            Settings.of({'compensated': True, **arguments})
