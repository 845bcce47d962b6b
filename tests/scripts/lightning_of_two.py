"""Runs of Lightning's Trainer in two processes, which its launcher starts from this script; rank 0 prints what it saw.

Called with the strategy, ``ddp``, ``folder`` or ``file``, and a folder for checkpoints. The last two shard the module
by FSDP2 and say how a checkpoint is saved.
"""

from __future__ import annotations

import json
import math
import os
import sys
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging
from lightning.pytorch.loggers.logger import Logger
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader, TensorDataset

from composer_ema import load_average
from composer_ema.lightning import WeightAverage
from composer_ema.model.sharding import is_shard, whole

STEPS, SAVED_AT = 12, 4


class Module(pl.LightningModule):
    """Two layers, of which the rows do not divide by two."""

    def __init__(self, *, sharded: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(5, 7), nn.ReLU(), nn.Linear(7, 3))
        self.sharded = sharded

    def configure_model(self) -> None:
        if self.sharded and not is_shard(next(self.parameters())):
            for part in (self.net[0], self.net[2], self.net):
                fully_shard(part, mesh=self.device_mesh['data_parallel'])

    def training_step(self, batch: Any, _: int) -> Tensor:
        return (self.net(batch[0]) - batch[1]).square().mean()

    def validation_step(self, batch: Any, _: int) -> None:
        self.training_step(batch, 0)

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters(), 0.01)


class SavingInValidation(pl.Callback):
    """Saves while the module holds the average, and keeps what a validation saw last."""

    def __init__(self, path: Path) -> None:
        self.path, self.seen = path, {}

    def on_validation_batch_end(self, trainer: Any, module: Any, *_: Any) -> None:
        self.seen = wholes(dict(module.named_parameters()))
        if trainer.global_step == SAVED_AT and not self.path.exists():
            trainer.save_checkpoint(self.path)


class Rows(Logger):
    """What a process logs of its averages."""

    name = version = None

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[dict[str, float]] = []

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        del step
        self.rows.append(metrics)

    def log_hyperparams(self, *_: Any, **__: Any) -> None: ...


def wholes(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: whole(tensor.detach()).clone() for name, tensor in tensors.items()}


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def average_of(callback: WeightAverage) -> dict[str, Tensor]:
    return wholes(callback.shadow().lent_tensors())


def shows(rows: Rows, average: dict[str, Tensor], weights: dict[str, Tensor]) -> bool:
    """Whether the last row says how far the average is from the weights."""
    average, weights = (torch.cat([each[name].flatten() for name in weights]) for each in (average, weights))
    distance = float((average - weights).norm() / weights.norm())
    return math.isclose(rows.rows[-1]['ema/relative_distance'], distance, rel_tol=1e-4)


def fit(kind: str, *callbacks: Any, epochs: int = 3, ckpt_path: Path | None = None, logger: Any = False) -> Any:
    strategy: Any = 'ddp'
    if kind != 'ddp':
        strategy = ModelParallelStrategy(2, 1, save_distributed_checkpoint=kind == 'folder')
    generator = torch.Generator().manual_seed(0)
    data = TensorDataset(torch.randn(48, 5, generator=generator), torch.randn(48, 3, generator=generator))
    trainer = pl.Trainer(
        accelerator='cpu', devices=2, strategy=strategy, callbacks=list(callbacks), max_epochs=epochs, logger=logger,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    module = Module(sharded=kind != 'ddp')
    trainer.fit(module, DataLoader(data, 6), DataLoader(data, 6), ckpt_path=ckpt_path)
    return trainer, module


def main(kind: str, folder: Path) -> None:
    trainer, alone = fit(kind)
    weights = wholes(dict(alone.named_parameters()))
    callback = WeightAverage('18sp', shard_over_ranks=kind == 'ddp')
    trainer, beside = fit(kind, callback, logger=(rows := Rows()))
    average, shard = average_of(callback), callback.shadow().lent_tensors()['net.0.weight']
    found = {
        'untouched': same(weights, wholes(dict(beside.named_parameters()))),
        'held by rank 0': list(shard.to_local().shape if is_shard(shard) else shard.shape),
        'updates': callback.shadow().num_updates,
        'logged': shows(rows, average, weights),
    }
    path = folder / 'saved.ckpt'
    saving = SavingInValidation(path)
    # The processes may differ in their loggers: Lightning's launcher has numbered all of them but the first.
    rows = Rows() if os.environ.get('LOCAL_RANK', '0') == '0' else False
    callback = WeightAverage('18sp', shard_over_ranks=kind == 'ddp')
    trainer, partly = fit(kind, callback, saving, epochs=1, logger=rows)
    found['seen'] = same(saving.seen, average_of(callback))
    at_that_time, saved = wholes(dict(partly.named_parameters())), average_of(callback)
    if trainer.is_global_zero:
        found['logged on rank 0'] = shows(rows, saved, at_that_time)
    trainer, resumed = fit(kind, callback := WeightAverage('18sp'), ckpt_path=path)
    found['resumed weights'] = same(weights, wholes(dict(resumed.named_parameters())))
    found['resumed average'] = same(average, average_of(callback))
    trainer, resumed = fit(kind, ckpt_path=path)
    found['without'] = same(weights, wholes(dict(resumed.named_parameters())))
    if trainer.is_global_zero:
        found['read'] = same(saved, load_average(path))
        if kind != 'folder':
            found['slot'] = same(at_that_time, torch.load(path)['state_dict'])
    if kind != 'ddp':
        try:
            fit(kind, EMAWeightAveraging())
        except AssertionError as error:
            found["Lightning's own"] = str(error)
    if trainer.is_global_zero:
        print(json.dumps(found))


if __name__ == '__main__':
    main(sys.argv[1], Path(sys.argv[2]))
