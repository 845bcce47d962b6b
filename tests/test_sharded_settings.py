"""Settings of averages on shards: each gives what it gives in one piece, to the bit where no chance is in it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.distributed as dist
from sharded import averages_of, bits_of, difference, local, ranks, tensors_of, whole
from sharded_models import CASES, Run
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from composer_ema import ShadowModel, ShadowModels

BATCHES = 6
WEIGHTS = (0.5, 0.1, 0.25, 0.4, 0.05, 0.3)
ON = [('BatchNorm', 2), ('empty', 2), ('BatchNorm', 4), ('hybrid', 4), ('columns and rows in FSDP2', 4)]

pytestmark = [pytest.mark.slow, pytest.mark.parametrize(('name', 'count'), ON)]


def equal_average(average: Tensor, current: Tensor, count: Any) -> Tensor:
    """An ``avg_fn``: the mean of all weights so far."""
    return average + (current - average) / (count + 1)


@dataclass(frozen=True)
class Setting:
    """Arguments of ShadowModel, and whether what it then keeps shows it."""

    arguments: dict[str, Any]
    shows: Callable[[dict[str, Tensor]], bool] = lambda tensors: True
    has_function: bool = False


def _are(dtype: torch.dtype) -> Callable[[dict[str, Tensor]], bool]:
    return lambda tensors: all(t.dtype is dtype for t in tensors.values() if t.is_floating_point())


SETTINGS = {
    'float64': Setting({'dtype': 'float64'}, _are(torch.float64)),
    'bfloat16': Setting({'dtype': 'bfloat16'}, _are(torch.bfloat16)),
    'compensated': Setting({'compensated': True}),
    'compensated bfloat16': Setting({'compensated': True, 'dtype': 'bfloat16'}, _are(torch.bfloat16)),
    'reference': Setting({'backend': 'reference'}),
    'include': Setting({'include': r'^mid\.'}, lambda tensors: all(name.startswith('mid.') for name in tensors)),
    'exclude': Setting({'exclude': [r'^up\.']}, lambda tensors: not any(name.startswith('up.') for name in tensors)),
    'avg_fn': Setting({'avg_fn': equal_average}, has_function=True),
    'multi_avg_fn': Setting({'multi_avg_fn': get_ema_multi_avg_fn(0.7)}, has_function=True),
    'buffers copied': Setting({'buffers': 'copy'}),
    'buffers averaged': Setting({'buffers': 'average'}),
}


def compare(name: str, count: int, setting: str) -> dict[str, Any]:
    """The differences between the average of the shards and the one of the model in one piece after every batch."""
    kept = SETTINGS[setting]
    run = Run(CASES[name], count)
    shadow, twin = ShadowModel(run.model, **kept.arguments), ShadowModel(run.twin, **kept.arguments)
    start = {name: whole(tensor) for name, tensor in averages_of(shadow).items()}
    differences = []
    for index in range(BATCHES):
        run.step(index)
        weight = {} if kept.has_function else {'weight': WEIGHTS[index]}
        shadow.update(run.model, **weight)
        run.reshard()
        run.fill_twin()
        twin.update(run.twin, **weight)
        averages, expected = averages_of(shadow), averages_of(twin)
        assert averages.keys() == expected.keys()
        differences.append(max(difference(whole(averages[name]), expected[name]) for name in averages))
    terms, expected = (each.state_dict().get('compensations') for each in (shadow, twin))
    if terms is not None:
        assert expected is not None
        assert terms.keys() == expected.keys()
        pairs = [(terms[name], expected[name]) for name in expected]
        differences.append(max(difference(whole(term), value) for term, value in pairs))
        assert any(value.count_nonzero() for _, value in pairs)
    return {
        'differences': differences,
        'shows': kept.shows(averages),
        'moved': max(difference(whole(averages[name]), start[name]) for name in averages),
        'has terms': terms is not None,
    }


@pytest.mark.parametrize('setting', SETTINGS)
def test_a_setting_gives_what_it_gives_in_one_piece(name, count, setting):
    for rank in ranks(count)(compare, name, count, setting):
        assert max(rank['differences']) == 0
        assert rank['shows']
        assert rank['moved'] > 0.01
        assert rank['has terms'] == setting.startswith('compensated')


def several(name: str, count: int) -> dict[str, Any]:
    """Two averages of one model, each beside an average alone with the same weights; they take turns in the model."""
    run = Run(CASES[name], count)
    both = ShadowModels(run.model, ['fast', 'slow'])
    alone = {label: ShadowModel(run.model) for label in both}
    for index in range(BATCHES):
        run.step(index)
        weights = {'fast': WEIGHTS[index], 'slow': WEIGHTS[index] / 4}
        both.update(run.model, weight=weights)
        for label, shadow in alone.items():
            shadow.update(run.model, weight=weights[label])
    run.reshard()
    before = bits_of(tensors_of(run.model))
    differences = [
        difference(whole(average), whole(averages_of(alone[label])[name]))
        for label in both
        for name, average in averages_of(both[label]).items()
    ]
    shown = []
    both['fast'].swap_in(run.model)
    shown.append(_is_shown(both['fast'], run.model))
    both['slow'].swap_in(run.model)
    shown.append(_is_shown(both['slow'], run.model))
    run.evaluate()
    both['fast'].swap_out(run.model)
    shown.append(_is_shown(both['slow'], run.model))
    both['slow'].swap_out(run.model)
    state = copy.deepcopy(both.state_dict())
    other = ShadowModels(run.model, ['fast', 'slow'])
    other.load_state_dict(state)
    return {
        'differences': differences,
        'apart': max(
            difference(whole(average), whole(averages_of(both['slow'])[name]))
            for name, average in averages_of(both['fast']).items()
        ),
        'shown': shown,
        'returned': bits_of(tensors_of(run.model)) == before,
        'loaded': all(bits_of(averages_of(other[label])) == bits_of(averages_of(both[label])) for label in both),
    }


def test_several_averages_share_one_model(name, count):
    for rank in ranks(count)(several, name, count):
        assert max(rank['differences']) == 0
        assert rank['apart'] > 0.01
        assert rank['shown'] == [True] * 3
        assert rank['returned']
        assert rank['loaded']


def skip(name: str, count: int) -> dict[str, Any]:
    """One element of the last rank that has any is NaN at an update."""
    run = Run(CASES[name], count)
    shadow = ShadowModel(run.model, skip_nonfinite=True)
    run.step(0)
    run.reshard()
    target = tensors_of(run.model)['mid.0.weight']
    is_poisoned = local(target).numel() > 0
    if is_poisoned:
        local(target).view(-1)[-1] = float('nan')
    before = {name: local(average).clone() for name, average in averages_of(shadow).items()}
    shadow.update(run.model, weight=0.5)
    after = {name: local(average) for name, average in averages_of(shadow).items()}
    kept = {name: int((after[name] == before[name]).sum()) for name in after}
    return {
        'is finite': all(bool(tensor.isfinite().all()) for tensor in after.values()),
        'skipped': shadow.poll_skipped(),
        'is poisoned': is_poisoned,
        'last is kept': not is_poisoned or bool((after['mid.0.weight'] == before['mid.0.weight']).view(-1)[-1]),
        'kept': kept['mid.0.weight'],
    }


def test_elements_that_are_not_finite_are_skipped_in_the_rank_that_has_them(name, count):
    seen = ranks(count)(skip, name, count)
    assert any(rank['is poisoned'] for rank in seen)
    for rank in seen:
        assert rank['is finite']
        assert rank['last is kept']
        assert rank['skipped'] == rank['is poisoned']
        assert rank['kept'] == rank['is poisoned']


def round_at_random(name: str, count: int) -> dict[str, Any]:
    """A bfloat16 average rounded at random, twice with one seed and once with another, beside the formula."""
    run = Run(CASES[name], count)
    arguments = {'dtype': 'bfloat16', 'rounding': 'stochastic'}
    shadows = [ShadowModel(run.model, seed=seed, **arguments) for seed in (1, 1, 2)]
    expected = {name: whole(average).double() for name, average in shadows[0].named_parameters()}
    for index in range(BATCHES):
        run.step(index)
        for shadow in shadows:
            shadow.update(run.model, weight=WEIGHTS[index])
        run.reshard()
        live = tensors_of(run.model)
        expected = {n: old + WEIGHTS[index] * (whole(live[n]).double() - old) for n, old in expected.items()}
    first, again, other = ({n: t for n, t in shadow.named_parameters()} for shadow in shadows)
    return {
        'difference': max(difference(whole(first[name]), expected[name]) for name in expected),
        'again': bits_of(first) == bits_of(again),
        'other': bits_of(first) == bits_of(other),
        'replicas': _replicas_agree(first),
    }


def test_stochastic_rounding_stays_near_the_formula_and_is_repeatable(name, count):
    for rank in ranks(count)(round_at_random, name, count):
        assert rank['difference'] <= 4 * 2**-8
        assert rank['again']
        assert not rank['other']
        assert rank['replicas']


def _replicas_agree(tensors: dict[str, Tensor]) -> bool:
    """Whether the ranks that hold the same part of a tensor hold the same bits of it."""
    for tensor in tensors.values():
        for axis, placement in enumerate(getattr(tensor, 'placements', ())):
            if placement.is_replicate():
                group = tensor.device_mesh.get_group(axis)
                parts = [torch.empty_like(local(tensor)) for _ in range(dist.get_world_size(group))]
                dist.all_gather(parts, local(tensor).contiguous(), group=group)
                if not all(torch.equal(part, parts[0]) for part in parts):
                    return False
    return True


def _is_shown(shadow: ShadowModel, model: nn.Module) -> bool:
    live = tensors_of(model)
    return all(torch.equal(local(live[name]), local(average)) for name, average in averages_of(shadow).items())
