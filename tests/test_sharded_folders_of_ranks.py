"""Sharded checkpoints that several ranks wrote together, read by this process alone."""

from __future__ import annotations

import functools
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from plain import same_bits
from sharded import averages_of, gathered, ranks, tensors_of
from sharded_models import CASES, Run
from sharded_runs import path_of, run
from torch import Tensor
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

from composer_ema import EMAOptimizer, ShadowModel, load_average, merge
from composer_ema.checkpoints.inspection import describe
from composer_ema.checkpoints.lazy import open_weights

pytestmark = pytest.mark.slow


def save(name: str, count: int, folder: str) -> dict[str, dict[str, Tensor]]:
    """In all ranks: trains, saves the model and its average, and returns both, whole."""
    sharing = Run(CASES[name], count)
    shadow = ShadowModel(sharing.model)
    optimizer = EMAOptimizer(sharing.optimizer, model=sharing.model, decay=0.5)
    sharing.optimizer = optimizer
    for index in range(3):
        sharing.step(index)
        shadow.update(sharing.model, weight=0.25)
    sharing.reshard()
    # Each rank has statistics of its own; Composer, too, saves those of the first.
    lowest = dcp.DefaultSavePlanner(dedup_save_to_lowest_rank=True)
    state = {'model': sharing.model.state_dict(), 'ema': shadow.state_dict()}
    dcp.save(state, checkpoint_id=f'{folder}/shadow', planner=lowest)
    seen = {'weights': gathered(tensors_of(sharing.model)), 'shadow': gathered(averages_of(shadow))}
    if name != 'columns and rows in FSDP2':  # torch 2.7 cannot name its optimizer's state
        state = {'model': sharing.model.state_dict(), 'optim': get_optimizer_state_dict(sharing.model, optimizer)}
        dcp.save(state, checkpoint_id=f'{folder}/optimizer', planner=lowest)
        seen['optimizer'] = gathered(averages_of(optimizer.shadow))
    return seen


NAMES = (
    'uneven', 'empty', 'second dimension', 'tied', 'frozen', 'bfloat16', 'BatchNorm', 'hybrid', 'rows',
    'columns and rows in FSDP2',
)  # fmt: skip


@pytest.mark.parametrize(('name', 'count'), [(name, count) for name in NAMES for count in CASES[name].ranks])
def test_the_average_of_several_ranks_is_read_to_the_bit(name: str, count: int, tmp_path: Path):
    seen = ranks(count)(save, name, count, str(tmp_path))[0]
    opened = open_weights(tmp_path / 'shadow')
    read = {name: opened.tensor(name) for name in opened.names}
    assert same_bits({name: read[name] for name in seen['weights']}, seen['weights'])
    for kept in ('shadow', 'optimizer'):
        if kept in seen:
            found = load_average(tmp_path / kept)
            assert same_bits({name: found[name] for name in seen[kept]}, seen[kept])
            if name == 'tied':
                assert torch.equal(found['head.weight'], found['embedding.weight'])


@pytest.mark.parametrize('count', [2, 4])
def test_the_averages_of_a_composer_run_are_read_to_the_bit(count: int, tmp_path: Path):
    seen = ranks(count)(
        functools.partial(run, 'several', 'sharded', note=True, save_folder=str(tmp_path), save_interval='1ba')
    )[0]
    for batch, noted in seen['noted'].items():
        folder = Path(path_of(tmp_path, batch, 'sharded'))
        if not folder.exists():  # at the end of an epoch it is called otherwise
            continue
        for label, average in noted['averages'].items():
            found = load_average(folder, average=label)
            assert same_bits({name: found[name] for name in average}, average)
        assert {each.label for each in describe(folder).averages} == set(noted['averages'])
    folders = [each for each in tmp_path.iterdir() if each.is_dir() and not each.is_symlink()]
    assert len(folders) >= 4
    merged = merge(folders, tmp_path / 'merged.safetensors', half_life='2ba')
    assert len(merged.parts) == len(folders)
