"""States of sharded averages in torch's distributed checkpoints, loaded by other numbers of ranks, bit for bit."""

from __future__ import annotations

from typing import Any

import pytest
import torch.distributed.checkpoint as dcp
from plain import assert_same
from sharded import gathered, ranks
from sharded_models import CASES, Case, Facts, Mlp, Run, facts_of

from composer_ema import ShadowModel, ShadowModels

BATCHES = 3


def _whole(width: int) -> Case:
    """A model that no rank shares, for a process alone."""

    def are_whole(facts: Facts) -> bool:
        return all(fact.placements is None for fact in facts[0].values())

    return Case(lambda: Mlp(width), lambda model, ranks: model, are_whole, ranks=(1,))


ALL = {**CASES, 'whole, 7': _whole(7), 'whole, 8': _whole(8)}

#: How the model is shared when its average is saved, and when that is loaded.
JOURNEYS = [
    *(
        (name, first, name, second)
        for name in ('uneven', 'empty', 'tied')
        for first, second in ((2, 1), (2, 2), (2, 4))
    ),
    *((name, 4, name, second) for name in ('uneven', 'empty', 'frozen') for second in (1, 2, 4)),
    ('uneven', 2, 'whole, 7', 1),
    ('uneven', 4, 'whole, 7', 1),
    ('uneven', 4, 'hybrid', 4),
    ('hybrid', 4, 'uneven', 2),
    ('hybrid', 4, 'whole, 7', 1),
    ('even', 2, 'columns and rows', 4),
    ('even', 2, 'columns and rows in FSDP2', 4),
    ('columns and rows', 2, 'columns and rows', 4),
    ('columns and rows in FSDP2', 4, 'even', 2),
    ('columns and rows in FSDP2', 4, 'columns and rows', 2),
    ('columns and rows in FSDP2', 4, 'whole, 8', 1),
]
SETTINGS = {
    'one': {},
    'compensated bfloat16': {'compensated': True, 'dtype': 'bfloat16'},
    'several': {},
}

pytestmark = pytest.mark.slow


def trained(name: str, count: int, kind: str) -> tuple[Run, ShadowModel | ShadowModels]:
    run = Run(ALL[name], count)
    shadow = _new(run, kind)
    for index in range(BATCHES):
        run.step(index)
        weights = {'fast': 0.5, 'slow': 0.1} if isinstance(shadow, ShadowModels) else 0.3
        shadow.update(run.model, weight=weights)
    return run, shadow


def save(name: str, count: int, kind: str, folder: str) -> dict[str, Any]:
    """Saves an average; returns it gathered."""
    _, shadow = trained(name, count, kind)
    dcp.save({'average': shadow.state_dict()}, checkpoint_id=folder)
    return gathered(shadow.state_dict())


def load(name: str, count: int, kind: str, folder: str) -> dict[str, Any]:
    """What a new average holds, gathered, before and after it has loaded what :func:`save` has saved."""
    run = Run(ALL[name], count)
    shadow = _new(run, kind)
    before = gathered(shadow.state_dict())
    state = shadow.state_dict()
    dcp.load(states := {'average': state}, checkpoint_id=folder)
    shadow.load_state_dict(states['average'])
    after = gathered(shadow.state_dict())
    run.step(0)
    weights = {'fast': 0.5, 'slow': 0.1} if isinstance(shadow, ShadowModels) else 0.3
    shadow.update(run.model, weight=weights)  # it goes on
    return {'facts': facts_of(run.model), 'before': before, 'after': after}


@pytest.mark.parametrize('kind', SETTINGS)
@pytest.mark.parametrize(('first', 'saved_by', 'second', 'loaded_by'), JOURNEYS)
def test_an_average_arrives_bit_for_bit(first, saved_by, second, loaded_by, kind, tmp_path):
    saved = ranks(saved_by)(save, first, saved_by, kind, str(tmp_path))
    assert len(list(tmp_path.glob('*.distcp'))) == saved_by  # every rank has written its own
    loaded = ranks(loaded_by)(load, second, loaded_by, kind, str(tmp_path))
    if loaded_by in ALL[second].ranks:
        assert ALL[second].claim([rank['facts'] for rank in loaded])
    for rank in loaded:
        assert_same(rank['after'], saved[0])
        with pytest.raises(AssertionError):
            assert_same(rank['before'], saved[0])


def _new(run: Run, kind: str) -> ShadowModel | ShadowModels:
    if kind == 'several':
        return ShadowModels(run.model, ['fast', 'slow'])
    return ShadowModel(run.model, **SETTINGS[kind])
