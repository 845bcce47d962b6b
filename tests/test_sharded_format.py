"""The words in which a sharded checkpoint of Composer holds averages."""

from __future__ import annotations

import pytest
import torch

from composer_ema.checkpoints import sharded_format as fmt

STATE = {
    'version': 3,
    'config': {},
    'started': True,
    'averages': {
        'short': {'parameters': {'0.weight': torch.ones(2)}, 'buffers': {}, 'aliases': {}, 'num_updates': 3},
        'lo.ng': {
            'parameters': {'0.weight': torch.zeros(2)},
            'buffers': {'mean': torch.ones(1)},
            'compensations': {'0.weight': torch.zeros(2)},
        },
    },
}


def saved() -> tuple[dict, dict]:
    """The two parts as DCP gives them back: without empty dictionaries."""
    plain, tensors = fmt.split(STATE)
    return plain, {label: {s: held for s, held in own.items() if held} for label, own in tensors.items()}


def test_a_state_is_split_into_plain_values_and_tensors_and_joined_again():
    plain, tensors = saved()
    assert plain['averages']['short'] == {'parameters': {}, 'buffers': {}, 'aliases': {}, 'num_updates': 3}
    assert plain[fmt.SHARDS]['short'] == {'parameters': ['0.weight'], 'buffers': []}
    assert 'tensor' not in str(plain)
    assert fmt.is_split(plain)
    assert not fmt.is_split(STATE)
    again = fmt.joined(plain, tensors, 'the state')
    assert again == STATE
    assert again['averages']['lo.ng']['parameters']['0.weight'] is STATE['averages']['lo.ng']['parameters']['0.weight']


def test_a_state_without_averages_is_plain_as_it_is():
    state = {'version': 3, 'started': False, 'averages': {}}
    assert fmt.split(state) == (state, {})


def test_a_missing_tensor_is_named():
    plain, tensors = saved()
    del tensors['lo.ng']['buffers']
    with pytest.raises(ValueError, match=r"lacks 1 tensors of 'lo.ng' that the state lists: mean"):
        fmt.joined(plain, tensors, 'the state')


@pytest.mark.parametrize(
    'shards', [None, [], {}, {'short': {}, 'lo.ng': []}, {'short': {'parameters': [1]}, 'lo.ng': {}},
               {'short': {'others': []}, 'lo.ng': {}}]
)  # fmt: skip
def test_a_broken_list_of_names_is_refused(shards: object):
    plain, tensors = saved()
    with pytest.raises(ValueError, match="'shards' of the state does not list the tensors of"):
        fmt.joined({**plain, fmt.SHARDS: shards}, tensors, 'the state')
