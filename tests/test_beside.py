"""The average as a module: it gives what the model gives with the average in it, live, and writes into neither."""

import copy
import pickle

import pytest
import torch
from plain import STRICT, Net
from torch import nn

from composer_ema import EMAOptimizer, ShadowModel, ShadowModels

pytestmark = [
    STRICT,
    pytest.mark.filterwarnings('ignore:.*(weight_norm|torch.jit.script).* is deprecated:FutureWarning'),
]
INPUTS = torch.linspace(-1, 1, 24).reshape(8, 3)


class Everything(nn.Module):
    """Tied, frozen, recurrent, parametrized and hooked layers, and buffers of every kind that a forward writes."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.tied = nn.Linear(3, 3), nn.Linear(3, 3)
        self.tied.weight = self.first.weight
        self.norm = nn.BatchNorm1d(3)
        self.recurrent = nn.LSTM(3, 3, batch_first=True)
        self.frozen = nn.Linear(3, 3).requires_grad_(False)
        self.parametrized = nn.utils.parametrizations.weight_norm(nn.Linear(3, 3))
        self.hooked = nn.utils.weight_norm(nn.Linear(3, 2))
        self.dropout = nn.Dropout(0.5)
        self.register_buffer('calls', torch.zeros((), dtype=torch.long))
        self.register_buffer('total', torch.zeros(3), persistent=False)
        self.register_buffer('row', self.first.weight.detach()[1])  # a view of a parameter
        self.register_buffer('scale', torch.ones(1).expand(2))  # cannot be written
        self.cache = None

    def forward(self, inputs):
        self.calls += 1
        inner = self.norm(self.tied(self.first(inputs))) * self.row
        self.total = self.total + inner.detach().sum(0)
        inner, _ = self.recurrent(inner[:, None])
        inner = self.parametrized(self.frozen(inner[:, 0])) + self.total
        return self.hooked(self.dropout(inner)) * self.calls * self.scale


def trained(model, shadow, optimizer=None):
    """One step and one update."""
    model.train()
    optimizer = optimizer or torch.optim.SGD(model.parameters(), lr=0.1)
    model(torch.randn(8, 3)).square().sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    shadow.update(model, smoothing=0.7)


def swapped_output(shadow, model, inputs=INPUTS):
    """What the model gives with the average in it. It is as it was afterwards, its counters too."""
    was_training, integers = (
        model.training,
        {n: b.clone() for n, b in model.named_buffers() if not b.is_floating_point()},
    )
    kept = dict(model.named_buffers())
    model.eval()
    with torch.no_grad(), shadow.swapped(model):
        output = model(inputs)
    model.train(was_training)
    for name, value in integers.items():
        kept[name].copy_(value)
    return output


def all_tensors(model, shadow):
    return [t.clone() for t in (*model.state_dict().values(), *(t for _, t in shadow._storage.items()))]


def is_same(before, after):
    return all(map(torch.equal, before, after))


@pytest.mark.parametrize('make', [Net, Everything])
def test_the_forward_is_that_of_the_model_with_the_average_in_it_after_every_update(make):
    model = make()
    shadow = ShadowModel(model)
    module = shadow.module(model)
    assert type(module) is type(model)
    assert not any(each.training for each in module.modules())
    for _ in range(4):
        trained(model, shadow)
        expected = swapped_output(shadow, model)
        for _ in range(2):  # whatever the first forward has written
            before = all_tensors(model, shadow)
            assert torch.equal(module(INPUTS), expected)
            assert is_same(before, all_tensors(model, shadow))
        assert torch.equal(shadow.module(model)(INPUTS), expected)


def test_parameters_lie_in_the_memory_of_the_average_and_tied_ones_are_tied():
    model = Everything()
    shadow = ShadowModel(model)
    module = shadow.module(model)
    averages, live = dict(shadow.named_parameters()), dict(model.named_parameters())
    for name, parameter in module.named_parameters():
        home = averages.get(name, live[name])
        assert (name in averages) != name.startswith('frozen.')
        assert parameter.data_ptr() == home.data_ptr(), name
        assert parameter.untyped_storage().data_ptr() == home.untyped_storage().data_ptr()
        assert not parameter.requires_grad
    assert module.tied.weight is module.first.weight
    assert {b.data_ptr() for b in module.buffers() if b.stride() != (0,)}.isdisjoint(
        b.data_ptr() for b in (*model.buffers(), *shadow.buffers())
    )


def test_after_train_it_normalises_by_the_batch_and_its_statistics_go_nowhere():
    model = Net()
    shadow = ShadowModel(model)
    trained(model, shadow)
    module = shadow.module(model).train()
    before, in_evaluation = all_tensors(model, shadow), swapped_output(shadow, model)
    assert not torch.equal(module(INPUTS), in_evaluation)
    assert is_same(before, all_tensors(model, shadow))
    assert torch.equal(module.eval()(INPUTS), in_evaluation)


def test_gradients_flow_to_the_input_alone():
    model = Net()
    shadow = ShadowModel(model)
    module = shadow.module(model)
    inputs = INPUTS.clone().requires_grad_()
    module(inputs).sum().backward()
    assert inputs.grad.abs().sum() > 0
    assert all(each.grad is None for each in (*module.parameters(), *model.parameters(), *shadow.parameters()))


def test_a_graph_outlives_the_next_forward_and_not_the_next_update():
    model = Net()
    shadow = ShadowModel(model)
    module = shadow.module(model)
    inputs = INPUTS.clone().requires_grad_()
    first = module(inputs).sum()
    model(INPUTS)  # in training: moves the statistics and their counter
    module(inputs)
    first.backward()
    second = module(inputs).sum()
    shadow.update(model, smoothing=0.5)
    with pytest.raises(RuntimeError, match='modified by an inplace operation'):
        second.backward()


def test_a_part_called_alone_is_up_to_date():
    model = Net()
    shadow = ShadowModel(model)
    module = shadow.module(model)
    trained(model, shadow)
    inner = torch.randn(8, 4)
    with shadow.swapped(model):
        expected = model.eval().norm(inner)
    assert torch.equal(module.norm(inner), expected)


class Stopped(BaseException):
    pass


def test_after_an_interrupt_in_a_forward_the_next_one_is_right():
    model = Net()
    shadow = ShadowModel(model)
    module = shadow.module(model)

    def stop(*_):
        raise Stopped

    def stopped():
        stopping = module.norm.register_forward_hook(stop)
        with pytest.raises(Stopped):
            module.train()(INPUTS)  # which has written statistics
        stopping.remove()
        module.eval()

    stopped()
    assert torch.equal(module(INPUTS), swapped_output(shadow, model))
    stopped()
    trained(model, shadow)
    inner = torch.randn(8, 4)
    with shadow.swapped(model):
        expected = model.eval().norm(inner)
    assert torch.equal(module.norm(inner), expected)


# What it follows


def test_it_follows_a_parameter_that_is_unfrozen_and_frozen_ones_that_are_replaced():
    model = Everything()
    shadow = ShadowModel(model)
    module = shadow.module(model)
    model.frozen.weight = nn.Parameter(torch.randn(3, 3), requires_grad=False)
    model.frozen.bias.data = torch.randn(3)
    assert torch.equal(module(INPUTS), swapped_output(shadow, model))
    model.frozen.requires_grad_(True)
    for _ in range(2):
        trained(model, shadow)
        assert torch.equal(module(INPUTS), swapped_output(shadow, model))
    assert module.frozen.weight.data_ptr() == dict(shadow.named_parameters())['frozen.weight'].data_ptr()


def test_it_follows_buffers_that_come_go_and_change():
    model = Everything()
    shadow = ShadowModel(model)
    module = shadow.module(model)
    trained(model, shadow)
    model.register_buffer('scale', torch.tensor([2.0, 3.0]))
    model.register_buffer('new', torch.ones(2))
    assert torch.equal(module(INPUTS), swapped_output(shadow, model))
    assert torch.equal(module.new, model.new)
    trained(model, shadow)
    assert torch.equal(module(INPUTS), swapped_output(shadow, model))
    del model.new
    module(INPUTS)
    assert not hasattr(module, 'new')


@pytest.mark.parametrize(
    'shadows', [lambda model: ShadowModel(model), lambda model: ShadowModels(model, ['a', 'b'])['b']]
)
def test_it_follows_a_state_that_is_loaded(shadows):
    model, other = Net(), Net(seed=1)
    shadow = shadows(model)
    module = shadow.module(model)
    shadow.load_state_dict(ShadowModel(other).state_dict())
    assert torch.equal(module(INPUTS), other.eval()(INPUTS))


def test_it_follows_a_move_of_model_and_average():
    model = Net()
    shadow = ShadowModel(model)
    module = shadow.module(model)
    trained(model, shadow)
    model.double()
    shadow.to(dtype=torch.float64)
    assert torch.equal(module(INPUTS.double()), swapped_output(shadow, model, INPUTS.double()))
    assert module.first.weight.data_ptr() == dict(shadow.named_parameters())['first.weight'].data_ptr()


def test_an_average_that_moves_away_from_the_model_is_refused_at_the_next_forward():
    model = Net()
    shadow = ShadowModel(model)
    module = shadow.module(model)
    shadow.to(dtype=torch.float64)
    with pytest.raises(ValueError, match=r'first.weight is torch.float64 on cpu.*as torch.float32.*copy=True'):
        module(INPUTS)


def test_other_modules_in_the_model_are_an_error_at_the_next_forward():
    model = Net()
    shadow = ShadowModel(model)
    module = shadow.module(model)
    nn.utils.parametrizations.weight_norm(model.last)
    shadow.resolve(model, joining=True, leaving=True)
    for _ in range(2):
        with pytest.raises(RuntimeError, match=r'the model has changed .*: last, .*Call shadow.module\(model\) again'):
            module(INPUTS)
    assert torch.equal(shadow.module(model)(INPUTS), swapped_output(shadow, model))


def test_a_parameter_under_another_name_is_an_error_at_the_next_forward():
    model = nn.Sequential(nn.Linear(3, 3))
    shadow = ShadowModel(model)
    module = shadow.module(model)
    model[0].matrix = model[0].weight
    del model[0].weight
    shadow.resolve(model, renamed={'0.weight': '0.matrix'})
    with pytest.raises(RuntimeError, match=r'the model has changed .*: 0.matrix, 0.weight\. Call'):
        module(INPUTS)


def test_a_module_that_was_moved_is_an_error_at_the_next_forward():
    model = Net()
    shadow = ShadowModel(model)
    module = shadow.module(model).double()
    with pytest.raises(RuntimeError, match=r'first.weight of the module no longer lies in .* shadow.to'):
        module(INPUTS.double())


def test_it_outlives_the_model():
    model = Net()
    shadow = ShadowModel(model)
    module = shadow.module(model)
    trained(model, shadow)
    expected, state = swapped_output(shadow, model), ShadowModel(Net(seed=1)).state_dict()
    del model
    assert torch.equal(module(INPUTS), expected)
    shadow.load_state_dict(state)
    assert torch.equal(module(INPUTS), Net(seed=1).eval()(INPUTS))


def test_what_is_not_averaged_is_that_of_training_while_another_average_stands_in_the_model():
    model = Net()
    half, whole = ShadowModel(model, exclude='last'), ShadowModel(model)
    module = half.module(model)
    trained(model, half)
    expected = swapped_output(half, model)
    with whole.swapped(model):
        assert torch.equal(module(INPUTS), expected)
    assert torch.equal(module(INPUTS), expected)


# Copies


@pytest.mark.parametrize('overlap', [False, True])
def test_copies_of_a_wider_average_follow_every_update(overlap):
    model, inputs = Net().bfloat16(), INPUTS.bfloat16()
    shadow = ShadowModel(model, overlap=overlap)
    with pytest.raises(ValueError, match=r'first.weight is torch.float32 on cpu.*as torch.bfloat16'):
        shadow.module(model)
    module = shadow.module(model, copy=True)
    for seed in range(3):
        with torch.no_grad():
            for parameter in model.parameters():
                nn.init.normal_(parameter, std=1 + seed)
        model.train()(inputs)
        shadow.update(model, smoothing=0.6)
        assert torch.equal(module(inputs), swapped_output(shadow, model, inputs))
    shadow.load_state_dict(ShadowModel(Net(seed=5).bfloat16()).state_dict())
    assert torch.equal(module(inputs), swapped_output(shadow, model, inputs))


def test_copies_are_made_only_where_something_has_changed():
    model = Net().bfloat16()
    shadow = ShadowModel(model)
    module = shadow.module(model, copy=True)
    versions = [parameter._version for parameter in module.parameters()]
    module(INPUTS.bfloat16())
    assert [parameter._version for parameter in module.parameters()] == versions


# States and copies


def test_its_state_is_the_average_and_cannot_be_loaded():
    model = Net()
    shadow = ShadowModel(model)
    module = shadow.module(model)
    trained(model, shadow)
    state, expected = module.state_dict(), shadow.averaged_state_dict(model)
    assert list(state) == list(expected)
    assert is_same(state.values(), expected.values())
    assert state['first.weight'].data_ptr() == dict(shadow.named_parameters())['first.weight'].data_ptr()
    assert list(module.state_dict(prefix='ema.')) == [f'ema.{name}' for name in expected]
    with pytest.raises(RuntimeError, match=r'Nothing was loaded. Load the average: shadow.load_state_dict'):
        module.load_state_dict(expected)


@pytest.mark.parametrize('copied', [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))])
def test_a_copy_is_an_ordinary_module_with_the_average_of_the_moment(copied):
    model = Net()
    shadow = ShadowModel(model)
    module = shadow.module(model)
    trained(model, shadow)
    expected = swapped_output(shadow, model)
    other = copied(module)
    trained(model, shadow)
    assert torch.equal(other(INPUTS), expected)
    assert not torch.equal(module(INPUTS), expected)
    other.load_state_dict(model.state_dict())
    assert torch.equal(other.double()(INPUTS.double()), model.eval().double()(INPUTS.double()))


def test_in_the_model_it_is_no_part_of_it():
    model = Net()
    model.teacher = None
    shadow = ShadowModel(model)
    names, keys = [name for name, _ in shadow._storage.items()], list(model.state_dict())
    saved = copy.deepcopy(model.state_dict())
    model.teacher = shadow.module(model)
    assert list(model.state_dict()) == keys
    assert not any('teacher' in path for path in model.state_dict()._metadata)
    assert [name for name, _ in ShadowModel(model)._storage.items()] == names
    trained(model, shadow)
    expected = swapped_output(shadow, model)
    model.load_state_dict(saved)
    assert torch.equal(model.teacher.eval()(INPUTS), expected)  # model.train() has reached it
    wrapper = nn.ModuleDict({'net': model})
    assert list(wrapper.state_dict(prefix='x.')) == [f'x.net.{key}' for key in keys]
    assert shadow.module(model).teacher is None
    assert [name for name, _ in shadow._storage.items()] == names


# Doors


@pytest.mark.parametrize('wrap', [nn.DataParallel, lambda model: torch.compile(model, backend='eager')])
def test_wrappers_are_looked_through(wrap):
    model = Net()
    shadow = ShadowModel(model)
    assert type(shadow.module(wrap(model))) is Net


def test_each_of_several_averages_has_its_own():
    model = Net()
    shadows = ShadowModels(model, ['short', 'long'])
    modules = {label: shadow.module(model) for label, shadow in shadows.items()}
    nn.init.normal_(model.first.weight)
    shadows.update(model, smoothing={'short': 0.1, 'long': 0.9})
    for label, module in modules.items():
        assert torch.equal(module(INPUTS), swapped_output(shadows[label], model))
    assert not torch.equal(modules['short'](INPUTS), modules['long'](INPUTS))


def test_the_average_of_an_optimizer_as_a_module():
    model = Net()
    optimizer = EMAOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), decay=0.5, model=model)
    module = optimizer.shadow.module(model)
    for _ in range(2):
        model(INPUTS).square().sum().backward()
        optimizer.step()
        assert torch.equal(module(INPUTS), swapped_output(optimizer.shadow, model))


# Refusals


def test_scripted_models_are_refused():
    model = nn.Sequential(torch.jit.script(nn.Linear(3, 3)))
    with pytest.raises(NotImplementedError, match=r'^0 is scripted.*shadow.swapped\(model\)'):
        ShadowModel(model).module(model)


def test_an_average_that_ranks_share_is_refused():
    model = Net()
    with pytest.warns(UserWarning, match='has no effect'):
        shadow = ShadowModel(model, shard_over_ranks=True)
    with pytest.raises(NotImplementedError, match=r'shard_over_ranks=True: .*copy_to'):
        shadow.module(model)


def test_a_model_that_cannot_be_copied_is_refused():
    model = Net()
    model.generator = (each for each in ())
    with pytest.raises(ValueError, match=r"cannot be copied: cannot pickle 'generator' object\. Pass"):
        ShadowModel(model).module(model)


class Stubborn(Net):
    def __deepcopy__(self, memo):
        return Net()


def test_a_model_that_copies_its_own_parameters_is_refused():
    model = Stubborn()
    with pytest.raises(ValueError, match='a __deepcopy__ of this one makes parameters of its own'):
        ShadowModel(model).module(model)


def test_another_model_and_the_module_itself_are_refused():
    model = Net()
    shadow = ShadowModel(model)
    with pytest.raises(ValueError, match=r'does not fit the model\. 2 missing'):
        shadow.module(nn.Linear(3, 3))
    with pytest.raises(ValueError, match='computes with an average itself'):
        shadow.module(shadow.module(model))
