"""A sharded checkpoint of Lightning is read as one: the shards, and what lies beside them in ``meta.pt``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dist_cp
from torch import Tensor

from composer_ema import CheckpointError, load_average, read_checkpoint
from composer_ema.checkpoints import formats, sharded_format
from composer_ema.checkpoints.inspection import TRAINING_WEIGHTS, describe

WEIGHT, AVERAGE = torch.arange(6.0).reshape(2, 3), torch.full((2, 3), 0.5)
pytestmark = pytest.mark.filterwarnings('ignore:TypedStorage is deprecated', 'ignore:torch.distributed is disabled')


def average_of(weight: Tensor) -> dict[str, Any]:
    return {
        'parameters': {'net.weight': weight}, 'buffers': {}, 'aliases': {}, 'num_updates': 3, 'seed': 0,
        'last_update': None, 'started_at': None, 'first_update': None, 'start_share': None,
        'profile': {'description': 'smoothing 0.9'},
    }  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """As Lightning saves it; the callback lists its shards as if they were an optimizer's."""
    state = {formats.VERSION_KEY: formats.VERSION, 'repr': 'WeightAverage()', 'config': {}, 'started': True}
    plain, tensors = sharded_format.split({**state, 'averages': {'ema': average_of(AVERAGE)}})
    shards = {
        'state_dict': {'net.weight': WEIGHT},
        'optimizer_0': {'state': {'net.weight': {'exp_avg': torch.ones(2, 3)}}},
        'optimizer_1': {sharded_format.AVERAGES: {'WeightAverage': tensors}},
    }
    dist_cp.save(shards, checkpoint_id=tmp_path)
    others = {'EarlyStopping': {'wait_count': 1}}
    meta = {'pytorch-lightning_version': '2.6.6', 'epoch': 1, 'callbacks': {'WeightAverage': plain, **others}}
    torch.save(meta, tmp_path / 'meta.pt')
    return tmp_path


def test_the_average_of_the_folder_is_read_as_that_of_a_file(folder):
    assert torch.equal(load_average(folder)['net.weight'], AVERAGE)
    held = read_checkpoint(folder)
    assert torch.equal(held['callbacks']['WeightAverage']['averages']['ema']['parameters']['net.weight'], AVERAGE)
    assert torch.equal(held['state_dict']['net.weight'], WEIGHT)
    assert set(held) == {'pytorch-lightning_version', 'epoch', 'callbacks', 'state_dict', 'optimizer_0'}
    assert held['callbacks']['EarlyStopping'] == {'wait_count': 1}


def test_inspect_says_that_the_model_slot_holds_the_training_weights(folder):
    found = describe(folder)
    assert (found.model_slot, found.averages[0].num_updates) == (TRAINING_WEIGHTS, 3)


def test_an_average_whose_shards_are_gone_is_refused_by_name(folder):
    beside = torch.load(folder / 'meta.pt')
    beside['callbacks']['WeightAverage']['shards']['ema']['parameters'].append('net.bias')
    torch.save(beside, folder / 'meta.pt')
    with pytest.raises(CheckpointError, match=r"lacks 1 tensors of 'ema' that the state of the callback.*net\.bias"):
        load_average(folder)


def test_a_file_of_that_name_that_lightning_did_not_write_is_none_of_it(folder):
    torch.save({'epoch': 9}, folder / 'meta.pt')
    assert set(read_checkpoint(folder)) == {'state_dict', 'optimizer_0', 'optimizer_1'}
