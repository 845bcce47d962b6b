"""Training with a sharded average, interrupted and resumed by another number of ranks through torch's checkpoints."""

from __future__ import annotations

from typing import Any

import pytest
import torch.distributed.checkpoint as dcp
from plain import assert_same
from sharded import averages_of, difference, gathered, ranks, tensors_of
from sharded_models import CASES, Run
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

from composer_ema import ShadowModel

BATCHES, INTERRUPTED = 8, 4
JOURNEYS = [
    *((name, 2, name, other) for name in ('uneven', 'empty') for other in (1, 2, 4)),
    *((name, 4, name, other) for name in ('uneven', 'empty', 'tied') for other in (1, 2, 4)),
    ('hybrid', 4, 'hybrid', 4),
    ('columns and rows', 2, 'columns and rows', 2),
    ('columns and rows in FSDP2', 4, 'columns and rows in FSDP2', 4),
    ('columns and rows in FSDP2', 4, 'even', 2),
]

pytestmark = pytest.mark.slow


def train(name: str, count: int, batches: range, folder: str) -> dict[str, Any]:
    """Trains on one batch for all ranks at a time; loads before, unless at the first, and saves unless at the last.

    Returns:
        What the model and the average hold then, gathered.
    """
    run = Run(CASES[name], count, is_one_batch=True)
    shadow = ShadowModel(run.model)
    if batches.start:
        state = _state(run, shadow)
        dcp.load(state, checkpoint_id=folder)
        run.model.load_state_dict(state['model'])
        set_optimizer_state_dict(run.model, run.optimizer, state['optimizer'])
        shadow.load_state_dict(state['average'])
    for index in batches:
        run.step(index)
        shadow.update(run.model, smoothing=0.8)
    run.reshard()
    if batches.stop < BATCHES:
        dcp.save(_state(run, shadow), checkpoint_id=folder)
    return {
        'weights': gathered(tensors_of(run.model)),
        'average': gathered(averages_of(shadow)),
        'updates': shadow.num_updates,
    }


@pytest.mark.parametrize(('first', 'saved_by', 'second', 'loaded_by'), JOURNEYS)
def test_interrupted_and_resumed_equals_uninterrupted(first, saved_by, second, loaded_by, tmp_path):
    whole = ranks(saved_by)(train, first, saved_by, range(BATCHES), str(tmp_path))[0]
    half = ranks(saved_by)(train, first, saved_by, range(INTERRUPTED), str(tmp_path))[0]
    resumed = ranks(loaded_by)(train, second, loaded_by, range(INTERRUPTED, BATCHES), str(tmp_path))
    for rank in resumed:
        if saved_by == loaded_by:
            assert_same(rank, whole)
        for kind in ('weights', 'average'):
            assert rank[kind].keys() == whole[kind].keys()
            assert max(difference(rank[kind][name], tensor) for name, tensor in whole[kind].items()) <= 1e-6
            assert max(difference(half[kind][name], tensor) for name, tensor in whole[kind].items()) > 1e-3
        assert rank['updates'] == whole['updates'] == BATCHES


def _state(run: Run, shadow: ShadowModel) -> dict[str, Any]:
    return {
        'model': run.model.state_dict(),
        'optimizer': get_optimizer_state_dict(run.model, run.optimizer),
        'average': shadow.state_dict(),
    }
