"""Which tensors a model has, under which names, which of them a user selects, and when that has changed."""

import gc
import re
import weakref

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from composer_ema.model.inventory import Inventory
from composer_ema.model.names import check_same, listed
from composer_ema.model.selection import Selection
from composer_ema.model.watch import Watch
from composer_ema.settings import Settings


class Tied(nn.Module):
    """An embedding whose weight is the head's too, and one block used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(5, 3)
        self.block = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
        self.again = self.block
        self.head = nn.Linear(3, 5, bias=False)
        self.head.weight = self.embedding.weight


class TestInventory:
    def test_names_are_those_of_named_parameters_and_named_buffers(self):
        model = Tied()
        inventory = Inventory.of(model)
        assert inventory.parameters == dict(model.named_parameters())
        assert inventory.buffers == dict(model.named_buffers())
        assert all(inventory.tensors()[name] is tensor for name, tensor in model.named_parameters())

    def test_tied_parameters_and_tied_modules_stand_once_under_their_first_name(self):
        inventory = Inventory.of(Tied())
        assert 'head.weight' not in inventory.parameters
        assert 'again.0.weight' not in inventory.parameters
        assert inventory.aliases['head.weight'] == 'embedding.weight'
        assert inventory.aliases['again.0.weight'] == 'block.0.weight'
        assert inventory.aliases['again.1.running_mean'] == 'block.1.running_mean'

    def test_names_and_aliases_together_are_the_state_dict(self):
        model = Tied()
        inventory = Inventory.of(model)
        assert inventory.tensors().keys() | inventory.aliases.keys() == model.state_dict().keys()

    def test_a_buffer_that_is_not_saved_is_told_apart(self):
        model = nn.Module()
        model.register_buffer('kept', torch.zeros(1))
        model.register_buffer('dropped', torch.zeros(1), persistent=False)
        model.register_buffer('absent', None)
        inventory = Inventory.of(model)
        assert inventory.buffers.keys() == {'kept', 'dropped'}
        assert inventory.persistent == {'kept'}

    def test_a_missing_parameter_is_no_name(self):
        assert Inventory.of(nn.Linear(2, 2, bias=False)).parameters.keys() == {'weight'}

    def test_a_lazy_parameter_is_refused_with_the_remedy(self):
        with pytest.raises(ValueError, match=r'0\.weight is a lazy parameter without a shape\. Run one forward'):
            Inventory.of(nn.Sequential(nn.LazyLinear(2)))

    def test_an_empty_module_has_nothing(self):
        assert Inventory.of(nn.Module()).tensors() == {}


class TestWatch:
    @staticmethod
    def _watched(model=None):
        model = model or nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
        gone = []
        return model, Watch(model, Inventory.of(model), on_gone=lambda: gone.append(True)), gone

    def test_an_unchanged_model_is_current_whatever_its_values(self):
        model, watch, _ = self._watched()
        with torch.no_grad():
            model[0].weight.add_(1)
        model(torch.randn(4, 2)).sum().backward()
        model.eval()
        assert watch.is_current(model)

    def test_another_model_is_not_current(self):
        _model, watch, _ = self._watched()
        assert not watch.is_current(nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)))

    @pytest.mark.parametrize(
        'change',
        [
            lambda m: setattr(m[0], 'weight', nn.Parameter(m[0].weight.detach())),
            lambda m: setattr(m[0].weight, 'data', m[0].weight.detach().clone()),
            lambda m: setattr(m[1], 'running_mean', m[1].running_mean.clone()),
            lambda m: m.__setitem__(0, nn.Linear(2, 2)),
            lambda m: setattr(m[0], 'bias', None),
            lambda m: setattr(m[1], 'running_var', None),
            lambda m: m.__delitem__(1),
            lambda m: m.to(torch.float64),
            lambda m: setattr(m[0], 'bias', m[1].bias),
        ],
        ids=[
            'a new parameter', 'a new storage', 'a new buffer', 'a new module',
            'a parameter gone', 'a buffer gone', 'a module gone', 'cast', 'tied',
        ],
    )  # fmt: skip
    def test_every_change_is_noticed(self, change):
        model, watch, _ = self._watched()
        change(model)
        assert not watch.is_current(model)

    def test_unfreezing_is_noticed_and_freezing_needs_no_notice(self):
        model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
        model[1].bias.requires_grad_(False)
        _, watch, _ = self._watched(model)
        model[0].requires_grad_(False)
        assert watch.is_current(model)
        model[1].bias.requires_grad_(True)
        assert not watch.is_current(model)

    @pytest.mark.parametrize(
        'add',
        [
            lambda m: m[0].register_parameter('scale', nn.Parameter(torch.ones(1))),
            lambda m: m[0].register_buffer('count', torch.zeros(1)),
            lambda m: m.append(nn.Linear(2, 2)),
        ],
        ids=['parameter', 'buffer', 'module'],
    )
    def test_every_addition_is_noticed(self, add):
        model, watch, _ = self._watched()
        add(model)
        assert not watch.is_current(model)

    def test_a_buffer_that_was_none_is_noticed_when_it_comes(self):
        model = nn.Module()
        model.register_buffer('cache', None)
        _, watch, _ = self._watched(model)
        model.cache = torch.zeros(1)
        assert not watch.is_current(model)

    def test_the_model_is_not_kept_alive_and_its_end_is_told(self):
        model, watch, gone = self._watched()
        reference = weakref.ref(model)
        del model
        gc.collect()
        assert reference() is None
        assert gone == [True]
        assert not watch.is_current(nn.Module())


def selected_by(include=None, exclude=None) -> Selection:
    settings = Settings(include=include, exclude=exclude)
    return Selection(settings.included, settings.excluded)


class TestSelection:
    def test_without_patterns_everything_is_selected(self):
        assert 'anything' in selected_by()

    @pytest.mark.parametrize(
        ('include', 'exclude', 'selected'),
        [
            (r'weight$', None, {'a.weight', 'b.weight'}),
            ([r'^a\.', r'^b\.bias'], None, {'a.weight', 'a.bias', 'b.bias'}),
            (None, 'bias', {'a.weight', 'b.weight'}),
            (r'^a\.', ['bias'], {'a.weight'}),
            ((), (), {'a.weight', 'a.bias', 'b.weight', 'b.bias'}),
        ],
    )
    def test_patterns_are_searched_for_and_exclude_has_the_last_word(self, include, exclude, selected):
        names = ['a.weight', 'a.bias', 'b.weight', 'b.bias']
        selection = selected_by(include, exclude)
        selection.check(names)
        assert {name for name in names if name in selection} == selected

    @pytest.mark.parametrize('argument', ['include', 'exclude'])
    def test_a_pattern_that_matches_nothing_is_an_error_that_shows_the_names(self, argument):
        selection = selected_by(**{argument: ['weight', 'wieght']})
        with pytest.raises(ValueError, match=rf"{argument} pattern 'wieght' matches none of the 2 names .*a\.weight"):
            selection.check(['a.weight', 'a.bias'])

    def test_nothing_left_is_an_error(self):
        with pytest.raises(ValueError, match=r'leave no name to average\. Widen include or narrow'):
            selected_by('weight', 'a').check(['a.weight', 'b.bias'])

    @pytest.mark.parametrize('argument', ['include', 'exclude'])
    def test_a_broken_pattern_is_named(self, argument):
        with pytest.raises(ValueError, match=rf"{argument} pattern '\(' is not a regular expression"):
            selected_by(**{argument: '('})

    @pytest.mark.parametrize('argument', ['include', 'exclude'])
    def test_a_pattern_must_be_a_string(self, argument):
        with pytest.raises(TypeError, match=rf'{argument} must hold strings, got 3 of type int'):
            selected_by(**{argument: [3]})


class TestCheckSame:
    @staticmethod
    def _tensors(**sizes: int) -> dict[str, torch.Tensor]:
        return {name: torch.zeros(size) for name, size in sizes.items()}

    def test_equal_names_and_shapes_pass(self):
        check_same('it', self._tensors(a=1, b=2), self._tensors(b=2, a=1), remedy='Go.')

    def test_all_differences_are_listed_at_once(self):
        with pytest.raises(ValueError) as error:
            check_same('the state', self._tensors(a=1, b=2, c=3), self._tensors(b=5, c=3, d=1, e=1), remedy='Stop.')
        assert str(error.value) == (
            'the state does not fit the model. 1 missing: a; 2 unexpected: d, e; '
            '1 of another shape or kind: b (expected (2,), got (5,)). Stop.'
        )

    def test_what_is_no_tensor_is_named_by_its_type(self):
        with pytest.raises(ValueError, match=r'a \(expected \(1,\), got a list\)'):
            check_same('it', self._tensors(a=1), {'a': [0.0]}, remedy='')

    def test_optional_names_may_lack_but_not_differ(self):
        check_same('it', self._tensors(a=1, b=2), self._tensors(a=1), optional=['b'], remedy='')
        with pytest.raises(ValueError, match='b '):
            check_same('it', self._tensors(a=1, b=2), self._tensors(a=1, b=3), optional=['b'], remedy='')

    @given(
        expected=st.dictionaries(st.sampled_from('bcdef'), st.integers(0, 2)),
        got=st.dictionaries(st.sampled_from('bcdef'), st.integers(0, 2)),
    )
    def test_it_passes_exactly_when_names_and_shapes_are_equal(self, expected, got):
        expected, got = self._tensors(**expected), self._tensors(**got)
        different = {n for n in expected | got if n not in got or n not in expected or len(expected[n]) != len(got[n])}
        if not different:
            check_same('it', expected, got, remedy='')
            return
        with pytest.raises(ValueError) as error:
            check_same('it', expected, got, remedy='')
        listed_names = set(re.findall(r'\b[b-f]\b', str(error.value)))
        assert listed_names == different


def test_long_lists_are_cut():
    assert listed([str(i) for i in range(20)], limit=3) == '0, 1, 2 and 17 more'
    assert listed(['a', 'b']) == 'a, b'
    assert listed([]) == ''
