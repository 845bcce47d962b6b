"""torch's checkpoint functions, which keep an optimizer's state by parameter, carry the averages in it."""

from __future__ import annotations

import copy
import pickle
import warnings
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from plain import STRICT, Net, averaged, same_bits, saved, sgd, train, weights
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

from composer_ema import EMAOptimizer, optimizer_entries

TORCHS_OWN = ('torch.distributed is', 'TypedStorage is deprecated')
pytestmark = [STRICT, *(pytest.mark.filterwarnings(f'ignore:{message}:UserWarning') for message in TORCHS_OWN)]

FLAT = StateDictOptions(flatten_optimizer_state_dict=True)
OPTIONS = [
    {'decay': 0.5},
    {'half_life': 3.0, 'bias_correction': True, 'every_n_steps': 2},
    {'decay': 0.5, 'dtype': 'bfloat16', 'compensated': True},
    {'half_life': {'short': 2, 'long': 20}, 'average': {'mean': 'equal'}},
    {'average': 'equal', 'start': 2},
]
INNER = {
    'adam': lambda model: torch.optim.Adam(model.parameters(), lr=0.05),
    'stateless': lambda model: torch.optim.SGD(model.parameters(), lr=0.1),
}


def build(seed: int, inner: str, options: dict[str, Any], *, with_model: bool = True) -> tuple[Net, EMAOptimizer]:
    model = Net(seed)
    return model, EMAOptimizer(INNER[inner](model), model=model if with_model else None, **options)


def every_average(optimizer: EMAOptimizer) -> dict[str, torch.Tensor]:
    return {
        f'{label} {name}': tensor.clone()
        for label, shadow in optimizer.shadows.items()
        for name, tensor in (*shadow.named_parameters(), *shadow.named_buffers())
    }


@pytest.mark.parametrize('options', OPTIONS, ids=str)
@pytest.mark.parametrize('inner', INNER)
@pytest.mark.parametrize('how', ['dictionary', 'folder', 'flat folder'])
def test_a_run_resumed_by_torchs_functions_equals_an_uninterrupted_one(options, inner, how, tmp_path):
    flags = FLAT if how.startswith('flat') else None
    model, optimizer = build(0, inner, options)
    train(model, optimizer, range(3))
    resumed_model, resumed = build(1, inner, options)
    if how == 'dictionary':
        state = saved(copy.deepcopy(get_optimizer_state_dict(model, optimizer)))
    else:
        dcp.save({'optimizer': get_optimizer_state_dict(model, optimizer, options=flags)}, checkpoint_id=tmp_path)
        state = get_optimizer_state_dict(resumed_model, resumed, options=flags)
        dcp.load({'optimizer': state}, checkpoint_id=tmp_path)
    resumed_model.load_state_dict(model.state_dict())
    set_optimizer_state_dict(resumed_model, resumed, state, options=flags)
    assert same_bits(every_average(resumed), every_average(optimizer))
    for one, opt in ((model, optimizer), (resumed_model, resumed)):
        train(one, opt, range(3, 7))
    assert same_bits(weights(resumed_model), weights(model))
    assert same_bits(every_average(resumed), every_average(optimizer))
    assert resumed.num_steps == optimizer.num_steps == 7
    assert str(resumed.state_dict()) == str(optimizer.state_dict())


def test_a_flat_state_is_read_once_for_all_parameters_and_anew_for_the_next_load(monkeypatch):
    model, optimizer = build(0, 'adam', {'decay': 0.5})
    train(model, optimizer, range(2))
    flat, made = get_optimizer_state_dict(model, optimizer, options=FLAT), []
    entries_of = optimizer_entries.entries_of
    monkeypatch.setattr(optimizer_entries, 'entries_of', lambda *given: made.append(1) or entries_of(*given))
    for loads in (1, 2):
        set_optimizer_state_dict(model, optimizer, flat, options=FLAT)
        assert len(made) == loads
    without = {key: value for key, value in flat.items() if 'last.weight.average' not in key}
    # Newer releases of torch hand on an empty dictionary where older ones look for the entry.
    with pytest.raises((KeyError, ValueError), match=r'last\.weight'):
        set_optimizer_state_dict(model, optimizer, without, options=FLAT)
    train(model, optimizer, range(2, 3))
    pickle.dumps(optimizer)  # which keeps nothing of the load that failed


def test_each_average_stands_beside_the_moments_of_its_parameter():
    model, optimizer = build(0, 'adam', {'decay': 0.5})
    train(model, optimizer, range(2))
    state = get_optimizer_state_dict(model, optimizer)['state']
    assert state['last.weight'].keys() == {'step', 'exp_avg', 'exp_avg_sq', 'average/ema'}
    average = dict(optimizer.shadow.named_parameters())['last.weight']
    assert state['last.weight']['average/ema'] is average
    assert 'average/ema/buffers/norm%2Erunning_mean' in state['first.weight']


def test_everybody_else_sees_the_state_of_the_wrapped_optimizer_and_the_average_under_its_own_key():
    model, optimizer = build(0, 'adam', {'decay': 0.5})
    train(model, optimizer, range(1))
    assert optimizer.state is optimizer.optimizer.state
    state = optimizer.state_dict()
    assert state.keys() == {'state', 'param_groups', 'ema'}
    assert state['state'][0].keys() == {'step', 'exp_avg', 'exp_avg_sq'}


def test_names_tell_which_average_is_which_even_where_the_optimizer_has_none():
    model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False))
    optimizer = EMAOptimizer(sgd(model), decay=0.5)
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    state = get_optimizer_state_dict(model, optimizer)
    reverse = EMAOptimizer(torch.optim.SGD([*model.parameters()][::-1], lr=0.1, momentum=0.9), decay=0.5)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        set_optimizer_state_dict(model, reverse, {**state, 'param_groups': [dict(state['param_groups'][0])]})
    ours = dict(reverse.shadow.named_parameters())
    assert torch.equal(ours['0.1'], state['state']['0.weight']['average/ema'])
    assert not torch.equal(ours['0.0'], ours['0.1'])


def test_what_the_optimizer_does_not_step_is_carried_too():
    model = Net()
    optimizer = EMAOptimizer(torch.optim.SGD(model.last.parameters(), lr=0.1), decay=0.5, model=model)
    train(model, optimizer, range(2))
    with torch.no_grad():
        model.first.weight.add_(1)
    train(model, optimizer, range(2, 3))
    state = saved(copy.deepcopy(get_optimizer_state_dict(model, optimizer)))
    twin = Net(1)
    resumed = EMAOptimizer(torch.optim.SGD(twin.last.parameters(), lr=0.1), decay=0.5, model=twin)
    set_optimizer_state_dict(twin, resumed, state)
    assert same_bits(averaged(resumed), averaged(optimizer))


def test_other_settings_are_told_and_continue():
    model, optimizer = build(0, 'adam', {'decay': 0.5})
    train(model, optimizer, range(2))
    state = get_optimizer_state_dict(model, optimizer)
    other = EMAOptimizer(INNER['adam'](model), model=model, decay=0.9)
    with pytest.warns(UserWarning, match=r'used other settings, of which only a digest was saved, this one uses'):
        set_optimizer_state_dict(model, other, state)
    assert other.num_steps == 2


def test_a_state_without_its_counters_is_refused_whole():
    model, optimizer = build(0, 'adam', {'decay': 0.5})
    train(model, optimizer, range(2))
    state = copy.deepcopy(get_optimizer_state_dict(model, optimizer))
    train(model, optimizer, range(2, 3))
    before = str(optimizer.state_dict())
    for entry in [name for name in state['state']['first.weight'] if name.startswith('averages/')]:
        del state['state']['first.weight'][entry]
    with pytest.raises(ValueError, match=r'averages without their counters.*Nothing was loaded'):
        set_optimizer_state_dict(model, optimizer, state)
    assert str(optimizer.state_dict()) == before


def test_the_state_of_a_bare_optimizer_still_warns_and_starts_anew():
    model, optimizer = build(0, 'adam', {'decay': 0.5})
    train(model, optimizer, range(2))
    state = get_optimizer_state_dict(model, optimizer.optimizer)
    with pytest.warns(UserWarning, match='the loaded state has no average'):
        set_optimizer_state_dict(model, optimizer, state)
    assert optimizer.num_steps == 0


def test_what_a_bare_optimizer_has_loaded_along_is_not_taken_for_the_average():
    model, optimizer = build(0, 'adam', {'half_life': {'old': 3}})
    train(model, optimizer, range(2))
    bare = INNER['adam'](model)
    set_optimizer_state_dict(model, bare, get_optimizer_state_dict(model, optimizer))
    fresh = EMAOptimizer(bare, model=model, half_life={'new': 3})
    state = get_optimizer_state_dict(model, fresh)
    assert not [entry for own in state['state'].values() for entry in own if entry.startswith('average/old')]


def test_while_the_model_holds_the_average_these_functions_are_refused():
    model, optimizer = build(0, 'adam', {'decay': 0.5})
    train(model, optimizer, range(2))
    with (
        optimizer.swap_ema_weights(),
        pytest.raises(RuntimeError, match='needs the training weights, but the model holds the average'),
    ):
        get_optimizer_state_dict(model, optimizer)


def test_a_parameter_without_a_gradient_so_far_has_an_average_and_no_moments():
    model = nn.ModuleDict({'used': nn.Linear(2, 1), 'idle': nn.Linear(2, 1)})
    optimizer = EMAOptimizer(torch.optim.Adam(model.parameters()), decay=0.5, model=model)
    model['used'](torch.ones(1, 2)).sum().backward()
    optimizer.step()
    state = copy.deepcopy(get_optimizer_state_dict(model, optimizer))
    assert state['state']['idle.weight'].keys() == {'average/ema'}
    set_optimizer_state_dict(model, optimizer, state)
    assert model['idle'].weight not in optimizer.state
    model['idle'](torch.ones(1, 2)).sum().backward()
    optimizer.step()
    assert 'exp_avg' in optimizer.state[model['idle'].weight]


def test_only_torchs_functions_are_recognised():
    assert optimizer_entries.asker() is None
