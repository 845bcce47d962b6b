"""Small tensors that lie side by side are moved as one, to the same bits."""

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from composer_ema import ShadowModel, kernels
from composer_ema.kernels.layout import BUNDLE, SMALL, Scratch, flat, packed, side_by_side, split_bundles

SHAPES = st.one_of(
    st.tuples(),
    st.tuples(st.integers(1, 40)),
    st.tuples(st.integers(1, 6), st.integers(1, 5), st.integers(1, 4), st.integers(1, 3)),
    st.just((SMALL + 1,)),
    st.just((0,)),
)
DTYPES = st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.complex64])


def _counted(shapes, dtype=torch.float32):
    return [torch.arange(torch.Size(shape).numel(), dtype=dtype).view(shape) for shape in shapes]


def test_small_tensors_lie_one_behind_the_other_in_the_order_given():
    placed = side_by_side(_counted([(2, 3), (SMALL + 1,), (), (4,)]))
    assert [tensor.storage_offset() for tensor in placed] == [0, 0, 6, 7]
    assert placed[0].untyped_storage().data_ptr() == placed[2].untyped_storage().data_ptr()
    assert placed[1].untyped_storage().data_ptr() != placed[0].untyped_storage().data_ptr()
    assert placed[0].untyped_storage().nbytes() == 4 * (6 + 1 + 4)


def test_a_bundle_ends_where_threads_would_begin():
    placed = side_by_side([torch.zeros(SMALL) for _ in range(BUNDLE // SMALL + 1)])
    storages = {tensor.untyped_storage().data_ptr() for tensor in placed}
    assert len(storages) == 2
    assert len(split_bundles(zip(placed, placed, strict=True))[0]) == 1  # the last has an allocation of its own


def test_each_dtype_has_allocations_of_its_own():
    placed = side_by_side([*_counted([(2,), (2,)]), *_counted([(), (), ()], torch.int64)])
    assert {tensor.dtype: tensor.untyped_storage().nbytes() for tensor in placed} == {
        torch.float32: 16,
        torch.int64: 24,
    }


@given(st.lists(st.tuples(SHAPES, DTYPES), max_size=12), st.data())
def test_values_shapes_and_strides_stay(kinds, data):
    tensors = []
    for shape, dtype in kinds:
        order = data.draw(st.permutations(range(len(shape))))
        tensors.append(torch.randn(shape, dtype=dtype).permute(order))
    placed = side_by_side(tensors)
    for before, after in zip(tensors, placed, strict=True):
        assert after.dtype == before.dtype
        assert torch.equal(after, before)
        assert after.stride() == before.stride() or before.numel() in (0, 1)


@given(st.lists(st.tuples(SHAPES, DTYPES), max_size=12), st.sampled_from([0.0, 0.001, 0.5, 0.7, 1.0]))
def test_an_update_of_a_bundle_has_the_bits_of_one_tensor_at_a_time(kinds, weight):
    sources = [torch.randn(shape, dtype=dtype) for shape, dtype in kinds]
    apart = [torch.randn(shape, dtype=dtype) for shape, dtype in kinds]
    together = side_by_side([shadow.clone() for shadow in apart])
    kernels.prepare([together], sources)((weight,))
    for shadow, source, bundled in zip(apart, sources, together, strict=True):
        kernels.prepare([[shadow]], [source])((weight,))
        assert torch.equal(bundled, shadow)


def test_a_source_that_lies_otherwise_than_its_shadow_is_left_out_of_the_bundle():
    shadows = side_by_side(_counted([(2, 3), (3,), (2,)]))
    sources = [torch.ones(3, 2).t(), torch.ones(3), torch.ones(2)]
    bundles, singles = split_bundles(zip(shadows, sources, strict=True))
    assert [bundle.tolist() for (bundle,), _ in bundles] == [[0.0, 1.0, 2.0, 0.0, 1.0]]
    assert [tuple(shadow.shape) for shadow, _ in singles] == [(2, 3)]


def test_neighbours_in_another_order_are_no_bundle():
    first, second = side_by_side(_counted([(2,), (3,)]))
    assert split_bundles([(second, second), (first, first)])[0] == []


def test_counters_are_copied_as_one_tensor_and_follow_the_model():
    counters = [torch.tensor(value) for value in range(5)]
    shadows = side_by_side([torch.zeros((), dtype=torch.int64) for _ in counters])
    step = kernels.prepare([[]], [], copied=list(zip(shadows, counters, strict=True)))
    counters[3].fill_(-7)
    step((0.0,))
    assert [shadow.item() for shadow in shadows] == [0, 1, 2, -7, 4]


def test_items_are_packed_in_order_up_to_the_limit():
    assert list(packed([3, 1, 2, 9, 1], lambda size: size, 4)) == [[3, 1], [2], [9], [1]]


def test_a_tensor_with_gaps_has_no_flat_view():
    assert flat(torch.zeros(4, 4)[:, :2]) is None
    assert flat(torch.zeros(1).expand(3)) is None


class TestInAShadow:
    @pytest.fixture
    def model(self):
        torch.manual_seed(0)
        return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 4, 1), nn.BatchNorm2d(4))

    def test_small_shadows_share_memory_and_copies_share_theirs(self, model):
        for shadow in (ShadowModel(model), copy.deepcopy(ShadowModel(model))):
            assert len({tensor.untyped_storage().data_ptr() for tensor in shadow.parameters()}) == 1
            pairs = [(tensor, tensor) for tensor in shadow.parameters()]
            assert len(split_bundles(pairs)[0]) == 1

    def test_a_source_that_moves_to_other_memory_is_followed(self, model):
        shadow = ShadowModel(model)
        shadow.update(model, weight=1.0)
        with torch.no_grad():
            model[1].weight.data = torch.full((8,), 5.0)
            model[0].weight.data = torch.full((8, 3, 3, 3), 7.0).contiguous(memory_format=torch.channels_last)
        shadow.update(model, weight=1.0)
        averaged = dict(shadow.named_parameters())
        assert averaged['1.weight'].unique().tolist() == [5.0]
        assert averaged['0.weight'].unique().tolist() == [7.0]

    def test_a_model_of_small_vectors_alone_that_is_cast_is_followed(self):
        model = nn.Sequential(nn.LayerNorm(4), nn.LayerNorm(4))
        shadow = ShadowModel(model)
        shadow.update(model, weight=1.0)
        model.double()
        nn.init.constant_(model[1].weight, 5.0)
        shadow.update(model, weight=0.5)
        averaged = dict(shadow.named_parameters())
        assert averaged['0.weight'].tolist() == [1.0] * 4
        assert averaged['1.weight'].tolist() == [3.0] * 4

    @pytest.mark.filterwarnings('ignore:An output with one or more elements was resized')
    def test_a_small_vector_that_changes_its_size_in_place_is_an_error_not_a_shift(self):
        model = nn.Sequential(nn.LayerNorm(4), nn.LayerNorm(4))
        shadow = ShadowModel(model)
        shadow.update(model, weight=1.0)
        model[1].weight.data = torch.ones(3)
        with pytest.raises(ValueError, match=r'1\.weight \(expected \(4,\), got \(3,\)\)'):
            shadow.update(model, weight=0.5)

    def test_a_channels_last_model_is_averaged_to_the_same_values(self, model):
        plain, other = copy.deepcopy(model), copy.deepcopy(model).to(memory_format=torch.channels_last)
        shadows = [ShadowModel(plain), ShadowModel(other)]
        for module, shadow in zip((plain, other), shadows, strict=True):
            with torch.no_grad():
                for parameter in module.parameters():
                    parameter.mul_(3)
            shadow.update(module, smoothing=0.75)
        for one, two in zip(shadows[0].parameters(), shadows[1].parameters(), strict=True):
            assert torch.equal(one, two)


def test_a_scratch_that_grows_takes_along_what_was_taken_before():
    scratch, cpu = Scratch(), torch.device('cpu')
    small, large = (scratch.take(size, torch.float32, cpu) for size in (3, 10**6))
    assert scratch.take(3, torch.float64, cpu).data_ptr() != small.data_ptr() == large.data_ptr()
    assert [len(each) for each in (small, large)] == [3, 10**6]
