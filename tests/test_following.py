"""What a shadow follows: modules and tensors of every kind, and what changes about them in the middle of a run."""

import copy
import functools

import pytest
import torch
from plain import One, same_bits, saved, set_
from torch import nn

from composer_ema import EMAOptimizer, ShadowModel, compute_ema

pytestmark = pytest.mark.filterwarnings(
    'error', 'ignore:Sparse CSR', 'ignore::DeprecationWarning:torch', r'ignore:`torch.jit:FutureWarning'
)


def kept(shadow: ShadowModel) -> dict[str, torch.Tensor]:
    """Copies of all averages, by name."""
    return {name: tensor.clone() for name, tensor in (*shadow.named_parameters(), *shadow.named_buffers())}


@pytest.mark.parametrize('to_sparse', [torch.Tensor.to_sparse, torch.Tensor.to_sparse_csr], ids=['coo', 'csr'])
def test_a_sparse_buffer_stays_as_the_model_has_it(to_sparse):
    model = One(0.0)
    model.register_buffer('adjacency', to_sparse(torch.eye(2)))
    shadow = ShadowModel(model)
    for value in (4, 8):
        set_(model.weight, value)
        shadow.update(model, smoothing=0.5)
    with shadow.swapped(model):
        assert model.weight.item() == 5
        assert model.adjacency.to_dense().tolist() == [[1, 0], [0, 1]]
    shadow.copy_to(model)
    ShadowModel(model).load_state_dict(saved(shadow.state_dict()))


def test_a_sparse_parameter_is_refused_by_name():
    model = One()
    model.adjacency = nn.Parameter(torch.eye(2).to_sparse())
    with pytest.raises(ValueError, match=r'adjacency is a parameter stored as torch\.sparse_coo'):
        ShadowModel(model)
    assert [name for name, _ in ShadowModel(model, exclude='adjacency').named_parameters()] == ['weight']


@pytest.mark.parametrize(
    ('before', 'after'),
    [
        (torch.tensor(0), torch.tensor(0.5)),
        (torch.tensor(0.5), torch.tensor(True)),
        (torch.tensor(0), torch.tensor(True)),
        (torch.tensor(0.5), torch.tensor(0.5j)),
        (torch.zeros(0), torch.ones(3)),
    ],
    ids=str,
)
def test_a_buffer_of_another_kind_joins_at_its_value(before, after):
    model = One()
    model.register_buffer('scale', before)
    shadow = ShadowModel(model)
    shadow.update(model, smoothing=0.9)
    model.scale = after
    shadow.update(model, smoothing=0.9)
    with shadow.swapped(model):
        assert model.scale.dtype == after.dtype
        assert torch.equal(model.scale, after)


def test_a_buffer_that_is_resized_in_place_is_not_overwritten():
    model = One()
    model.register_buffer('scale', torch.ones(1))
    shadow = ShadowModel(model)
    shadow.update(model, smoothing=0.9)
    model.scale.resize_(3).fill_(5)
    with shadow.swapped(model):
        assert model.scale.tolist() == [5, 5, 5]
    shadow.update(model, smoothing=0.9)
    assert dict(shadow.named_buffers())['scale'].tolist() == [5, 5, 5]


@pytest.mark.parametrize('replace', [lambda bias: torch.zeros(5), lambda bias: bias[:2]], ids=['grown', 'a view'])
def test_a_parameter_of_another_size_is_refused_by_name(replace):
    model = nn.Sequential(nn.LayerNorm(3), nn.Linear(3, 60))
    shadow = ShadowModel(model)
    shadow.update(model, smoothing=0.9)
    before = kept(shadow)
    set_(model[1].weight, 8)
    for parameter in (model[0].bias, model[1].bias):
        data = parameter.data
        parameter.data = replace(parameter.data)
        with pytest.raises(ValueError, match=r'bias \(expected'):
            shadow.update(model, smoothing=0.9)
        parameter.data = data
    assert same_bits(before, kept(shadow))


@pytest.mark.parametrize('at_construction', [None, torch.zeros(0), torch.zeros((), dtype=torch.int64)], ids=str)
@pytest.mark.parametrize('is_swapped', [False, True])
def test_a_saved_buffer_is_held_against_the_model_not_against_construction(at_construction, is_swapped):
    def make(buffer):
        model = One()
        if buffer is not None:
            model.register_buffer('seen', buffer)
        return model, ShadowModel(model)

    saver, shadow = make(torch.ones(3))
    set_(saver.seen, 2)
    shadow.update(saver, smoothing=0.5)
    if is_swapped:
        shadow.swap_in(saver)
    state = saved(shadow.state_dict())
    model, loader = make(at_construction)
    model.register_buffer('seen', torch.zeros(3))
    loader.load_state_dict(state)
    assert dict(loader.named_buffers())['seen'].tolist() == [2, 2, 2]
    if is_swapped:
        loader.swap_out(model)
        assert model.seen.tolist() == [2, 2, 2]
    loader.update(model, smoothing=0.5)
    assert dict(loader.named_buffers())['seen'].tolist() == model.seen.tolist()


def test_a_state_without_a_buffer_that_came_later_loads():
    model = One()
    shadow = ShadowModel(model)
    state = saved(shadow.state_dict())
    model.register_buffer('seen', torch.ones(3))
    shadow.update(model, smoothing=0.5)
    shadow.load_state_dict(state)
    assert dict(shadow.named_buffers())['seen'].tolist() == [1, 1, 1]


def test_a_loaded_buffer_that_the_model_lacks_is_dropped_in_words():
    other = One()
    other.register_buffer('seen', torch.ones(3))
    model = One()
    shadow = ShadowModel(model)
    shadow.load_state_dict(saved(ShadowModel(other).state_dict()))
    with pytest.warns(UserWarning, match='buffers that the model does not have: seen'):
        shadow.update(model, smoothing=0.5)
    shadow.update(model, smoothing=0.5)
    assert not list(shadow.named_buffers())
    shadow.copy_to(model)


@pytest.mark.parametrize(
    'make', [torch.jit.script, lambda m: torch.jit.trace(m, torch.zeros(1, 2))], ids=['script', 'trace']
)
def test_a_scripted_module_is_averaged_like_any_other(make):
    model = make(nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)).eval())
    shadow = ShadowModel(model)
    start = kept(shadow)
    for value in (4, 8):
        for parameter in model.parameters():
            set_(parameter, value)
        shadow.update(model, smoothing=0.5)
    expected = (start['0.weight'] / 2 + 2) / 2 + 4
    torch.testing.assert_close(kept(shadow)['0.weight'], expected)
    output = model(torch.ones(3, 2))
    with shadow.swapped(model):
        torch.testing.assert_close(dict(model.named_parameters())['0.weight'].detach(), expected)
        assert not torch.equal(model(torch.ones(3, 2)), output)
    assert torch.equal(model(torch.ones(3, 2)), output)
    other = copy.deepcopy(model)
    ShadowModel(other).load_state_dict(saved(shadow.state_dict()))


def test_a_parameter_replaced_in_a_scripted_module_is_noticed():
    model = torch.jit.script(nn.Linear(1, 1, bias=False))
    shadow = ShadowModel(model)
    shadow.update(model, smoothing=0)
    start = kept(shadow)['weight']
    model.weight = nn.Parameter(torch.full((1, 1), 8.0))
    shadow.update(model, smoothing=0.5)
    torch.testing.assert_close(kept(shadow)['weight'], start / 2 + 4)


def test_a_wholly_frozen_model_is_lent_and_restored_after_a_warning():
    model = nn.Linear(2, 2).requires_grad_(False)
    with pytest.warns(UserWarning, match='no trainable parameter to average yet'):
        shadow = ShadowModel(model)
    before = {name: p.clone() for name, p in model.named_parameters()}
    shadow.update(model, smoothing=0.5)
    with shadow.swapped(model):
        assert same_bits(before, dict(model.named_parameters()))
    shadow.copy_to(model)
    shadow.load_state_dict(shadow.state_dict())
    assert same_bits(before, dict(model.named_parameters()))


def test_a_model_that_had_no_values_at_construction_is_refused_with_the_remedy():
    model = nn.Linear(2, 2, device='meta')
    shadow = ShadowModel(model)
    other = nn.Linear(2, 2)
    for _ in range(2):
        with pytest.raises(ValueError, match='weight of the model is on the meta device, so it has no values'):
            ShadowModel(other).update(model, smoothing=0.5)
    model.to_empty(device='cpu')
    for use in (lambda: shadow.update(model, smoothing=0.5), lambda: shadow.swap_in(model)):
        with pytest.raises(ValueError, match='weight was on the meta device when the average was built'):
            use()
    shadow.load_state_dict(ShadowModel(other).state_dict())
    set_(model.weight, 8)
    shadow.update(model, smoothing=0.75)
    torch.testing.assert_close(kept(shadow)['weight'], other.weight.detach() * 0.75 + 2)


def test_the_parameters_of_a_model_are_no_model():
    with pytest.raises(TypeError, match=r'got generator\. Pass the module itself, as in ShadowModel\(model\)'):
        ShadowModel(nn.Linear(2, 2).parameters())


class Adapted(nn.Module):
    """A frozen layer and a low-rank adapter, which can be merged into it."""

    def __init__(self) -> None:
        super().__init__()
        self.base = nn.Linear(4, 4).requires_grad_(False)
        self.lora_A, self.lora_B = nn.Linear(4, 1, bias=False), nn.Linear(1, 4, bias=False)

    def merge(self) -> None:
        with torch.no_grad():
            self.base.weight.add_(self.lora_B.weight @ self.lora_A.weight)
        del self.lora_A, self.lora_B
        self.base.requires_grad_(True)


class TestNamesThatChange:
    def test_what_has_left_is_refused_until_one_says_so(self):
        model = Adapted()
        shadow = ShadowModel(model)
        shadow.update(model, smoothing=0.5)
        model.merge()
        before = kept(shadow)
        with pytest.raises(
            ValueError, match=r'2 missing: lora_A.weight, lora_B.weight.*shadow\.resolve\(.*leaving=True'
        ):
            shadow.update(model, smoothing=0.5)
        assert same_bits(before, kept(shadow))
        with pytest.warns(UserWarning, match='none of the 2 averaged parameters is left'):
            shadow.resolve(model, joining=True, leaving=True)
        assert sorted(kept(shadow)) == ['base.bias', 'base.weight']
        assert torch.equal(kept(shadow)['base.weight'], model.base.weight)
        set_(model.base.weight, 8)
        shadow.update(model, smoothing=0.0)
        with shadow.swapped(model):
            assert (model.base.weight == 8).all()

    def test_an_average_goes_on_under_a_new_name(self):
        model = nn.Sequential(nn.Linear(2, 1))
        shadow = ShadowModel(model)
        set_(model[0].weight, 8)
        shadow.update(model, smoothing=0.5)
        average = kept(shadow)['0.weight']
        nn.utils.parametrize.register_parametrization(model[0], 'weight', nn.Identity())
        original = '0.parametrizations.weight.original'
        with pytest.raises(ValueError, match=r'1 missing: 0\.weight'):
            shadow.update(model, smoothing=0.5)
        shadow.resolve(model, renamed={'0.weight': original})
        assert torch.equal(kept(shadow)[original], average)
        shadow.update(model, smoothing=0.5)
        assert torch.equal(kept(shadow)[original], average / 2 + 4)
        nn.utils.parametrize.remove_parametrizations(model[0], 'weight')
        shadow.resolve(model, renamed={original: '0.weight'})
        shadow.update(model, smoothing=0.5)

    def test_two_averages_may_change_places(self):
        model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
        shadow = ShadowModel(model)
        before = kept(shadow)
        shadow.resolve(model, renamed={'0.weight': '1.weight', '1.weight': '0.weight'})
        assert torch.equal(kept(shadow)['0.weight'], before['1.weight'])
        assert torch.equal(kept(shadow)['1.weight'], before['0.weight'])

    @pytest.mark.parametrize(
        ('renamed', 'message'),
        [
            ({'nowhere': '0.bias'}, 'there is no average of nowhere'),
            ({'0.bias': 'nowhere'}, 'cannot become nowhere: the model does not have it'),
            ({'0.bias': '1.weight'}, r'0\.bias of shape \(2,\) cannot become 1\.weight: .*in shape \(2, 2\)'),
            ({'0.bias': '1.bias'}, 'which has an average of its own'),
            ({'0.bias': '1.bias', '1.bias': '1.bias'}, 'gives two averages one name'),
        ],
        ids=str,
    )
    def test_what_does_not_fit_changes_nothing(self, renamed, message):
        model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
        shadow = ShadowModel(model)
        before = kept(shadow)
        with pytest.raises(ValueError, match=message):
            shadow.resolve(model, renamed=renamed)
        assert same_bits(before, kept(shadow))
        shadow.update(model, smoothing=0.5)

    def test_a_failure_after_a_renaming_leaves_the_old_names(self):
        model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
        shadow = ShadowModel(model)
        shadow.update(model, smoothing=0.5)
        before = kept(shadow)
        model[1] = nn.Linear(3, 3)
        with pytest.raises(ValueError, match=r'1\.weight'):
            shadow.resolve(model, renamed={'0.bias': '0.bias'})
        assert same_bits(before, kept(shadow))

    def test_names_do_not_change_while_an_average_stands_in_the_model(self):
        model = Adapted()
        shadow = ShadowModel(model)
        with shadow.swapped(model), pytest.raises(RuntimeError, match='holds an average'):
            shadow.resolve(model, leaving=True)

    def test_the_shadow_of_an_optimizer_follows_alike(self):
        model = Adapted()
        optimizer = EMAOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), model=model)
        optimizer.step()
        model.merge()
        optimizer.param_groups[0]['params'] = list(model.parameters())
        with pytest.warns(UserWarning, match='none of the 2'):
            optimizer.shadow.resolve(model, joining=True, leaving=True)
        optimizer.step()
        assert sorted(name for name, _ in optimizer.shadow.named_parameters()) == ['base.bias', 'base.weight']

    def test_a_parameter_of_another_shape_leaves_and_joins(self):
        model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
        shadow = ShadowModel(model)
        model[0] = nn.Linear(3, 2)
        shadow.resolve(model, joining=True, leaving=True)
        assert torch.equal(kept(shadow)['0.weight'], model[0].weight)

    def test_that_no_average_is_left_is_said(self):
        model = nn.Linear(2, 2)
        shadow = ShadowModel(model)
        with pytest.warns(UserWarning, match=r'none of the 2 averaged parameters is left: the model has 0\.bias'):
            shadow.resolve(nn.Sequential(nn.Linear(2, 2)), joining=True, leaving=True)

    def test_renamed_is_a_mapping(self):
        model = nn.Linear(2, 2)
        with pytest.raises(TypeError, match=r"renamed must map old names to new ones, got \['weight'\]"):
            ShadowModel(model).resolve(model, renamed=['weight'])


@pytest.mark.parametrize(
    'change',
    [
        lambda m: m.mask.t_(),
        lambda m: setattr(m.weight, 'data', m.weight.data.t()),
        lambda m: m.mask.resize_(4),
        lambda m: setattr(m.mask, 'data', m.mask.data.view(4, 1)),
    ],
    ids=['a transposed buffer', 'a transposed parameter', 'a flat buffer', 'a column'],
)
@pytest.mark.parametrize('options', [{}, {'avg_fn': lambda a, c, n: a + (c - a) / 4}, {'backend': 'reference'}])
def test_a_tensor_that_changes_its_order_in_place_is_noticed(change, options):
    model = nn.Linear(2, 2, bias=False)
    model.register_buffer('mask', torch.arange(4.0).view(2, 2))
    model.weight.data = torch.arange(4.0).view(2, 2)
    shadow = ShadowModel(model, **options)
    update = shadow.update if 'avg_fn' in options else functools.partial(shadow.update, smoothing=0.75)
    update(model)
    change(model)
    before = kept(shadow)
    update(model)
    assert torch.equal(kept(shadow)['mask'], model.mask)
    expected = before['weight'] + (model.weight.detach() - before['weight']) / 4
    torch.testing.assert_close(kept(shadow)['weight'], expected)


@pytest.mark.parametrize(
    'use',
    [
        lambda s, m: s.update(m.parameters(), smoothing=0.9),
        lambda s, m: s.copy_to(m.parameters()),
        lambda s, m: s.swap_in(m.parameters()),
        lambda s, m: s.swapped(m.parameters()).__enter__(),
        lambda s, m: s.resolve(m.parameters()),
        lambda s, m: s.averaged_state_dict(m.parameters()),
        lambda s, m: s.to_averaged_model(m.parameters()),
        lambda s, m: compute_ema(m.parameters(), m),
        lambda s, m: EMAOptimizer(torch.optim.SGD(m.parameters(), lr=1), model=m.parameters()),
    ],
)
def test_parameters_in_place_of_the_model_are_refused_in_every_door(use):
    model = nn.Linear(2, 2)
    with pytest.raises(TypeError, match=r'model must be a torch\.nn\.Module, got generator\. Pass the module itself'):
        use(ShadowModel(model), model)


def test_an_average_on_the_meta_device_is_refused():
    model = nn.Linear(2, 2)
    shadow = ShadowModel(model)
    for make in (
        lambda: ShadowModel(model, device='meta'),
        lambda: EMAOptimizer(torch.optim.SGD(model.parameters(), lr=1), device='meta'),
        lambda: shadow.to('meta'),
    ):
        with pytest.raises(ValueError, match="the shadow's device must hold values, got 'meta'"):
            make()
    shadow.update(model, smoothing=0.5)


def test_a_state_of_another_kind_is_told_what_to_pass():
    model = nn.Linear(2, 2)
    optimizer = EMAOptimizer(torch.optim.SGD(model.parameters(), lr=1))
    with pytest.raises(ValueError, match=r'Pass what state_dict\(\) of a ShadowModel returned'):
        ShadowModel(model).load_state_dict(model.state_dict())
    with pytest.raises(ValueError, match=r'Pass what ema_state_dict\(\) returned'):
        optimizer.load_ema_state_dict(optimizer.state_dict())
