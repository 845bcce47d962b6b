"""Sharded checkpoints that Composer's Trainer wrote: every command reads them in one process without a group."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from composer import Trainer
from composer.algorithms import EMA as ComposerEMA
from composer.utils.parallelism import FSDP2Config, ParallelismConfig
from torch import Tensor
from torch.distributed.tensor import DTensor
from toy import bits

from composer_ema import EMA, SWA, CheckpointError, export, load_average, merge, reconstruct
from composer_ema.checkpoints.inspection import TRAINING_WEIGHTS, describe
from composer_ema.checkpoints.lazy import open_weights


def whole(tensors: dict[str, Any]) -> dict[str, Tensor]:
    return {name: each.full_tensor() if isinstance(each, DTensor) else each.clone() for name, each in tensors.items()}


def test_every_command_reads_a_sharded_run(trainer: Callable[..., Trainer], tmp_path: Path, alone: Callable[[], None]):
    ema, swa = EMA({'short': '2ba', 'long': '4ba'}), SWA('1ba', update_interval='1ba', refresh_batchnorm=False)
    run = trainer(
        [ema, swa],
        parallelism_config=ParallelismConfig(fsdp2=FSDP2Config(state_dict_type='sharded')),
        save_folder=str(tmp_path / 'checkpoints'),
        save_interval='1ba',
        max_duration='4ba',
    )
    run.fit()
    weights = whole(dict(run.state.model.state_dict()))
    averages = {
        label: whole({**average['parameters'], **average['buffers']})
        for algorithm in (ema, swa)
        for label, average in algorithm.state_dict()['averages'].items()
    }
    run.close()
    alone()  # none is needed to read

    latest = tmp_path / 'checkpoints' / 'latest-rank0.pt'
    folder = latest.resolve()
    for label in ('short', 'long', 'swa'):
        assert bits(load_average(latest, average=label)) == bits({**weights, **averages[label]})
        export(folder, tmp_path / f'{label}.safetensors', average=label)
        assert bits(load_average(tmp_path / f'{label}.safetensors')) == bits({**weights, **averages[label]})
    with pytest.raises(CheckpointError, match='holds 3 averages'):
        load_average(folder)

    found = describe(folder)
    assert found.model_slot == TRAINING_WEIGHTS
    assert found.trained['batch'] == 4
    assert {(each.algorithm, each.label, each.num_updates) for each in found.averages} == {
        ('EMA', 'short', 4), ('EMA', 'long', 4), ('SWA', 'swa', 4)
    }  # fmt: skip
    opened = open_weights(folder)
    assert bits({name: opened.tensor(name) for name in opened.names}) == bits(weights)

    folders = sorted(each for each in (tmp_path / 'checkpoints').iterdir() if not each.is_symlink())
    merged = merge(folders, tmp_path / 'merged.pt', half_life='2ba', average='short')
    assert [part.trained['ba'] for part in merged.parts] == [1, 2, 3, 4]
    again = reconstruct(tmp_path, half_life='4ba')
    assert again.predicted_error < 1e-6
    assert all(torch.allclose(again.state_dict[name], each, atol=1e-6) for name, each in averages['long'].items())


def test_the_shards_that_the_built_in_average_saves_are_not_taken_for_the_whole(
    trainer: Callable[..., Trainer], tmp_path: Path, alone: Callable[[], None]
):
    run = trainer(
        [ComposerEMA(half_life='2ba')],
        parallelism_config=ParallelismConfig(fsdp2=FSDP2Config(state_dict_type='sharded')),
        save_folder=str(tmp_path),
        max_duration='2ba',
    )
    run.fit()
    run.close()
    alone()
    for read in (load_average, describe, open_weights):
        with pytest.raises(CheckpointError, match=r'holds the shards of one process \(.*DTensor'):
            read(tmp_path / 'latest-rank0.pt')
