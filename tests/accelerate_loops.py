"""A loop with accelerate, as its documentation writes it, over a tiny model; for the tests and what their ranks run."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator, FullyShardedDataParallelPlugin
from accelerate.state import AcceleratorState, DistributedType, GradientState, PartialState
from accelerate.utils import DataLoaderConfiguration
from sharded import averages_of, bits_of, difference, whole
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from composer_ema import EMAOptimizer

SAMPLES, BATCH = 20, 4  # five batches to an epoch
HALF_LIFE = 2


class Loop:
    """A model, an optimizer that averages, data and a scheduler, prepared by an accelerator.

    Args:
        averaged: whether the optimizer is an EMAOptimizer.
        norm: the third layer. Running statistics are each rank's own, and accelerate saves those of rank 0.
        scaler: scales gradients, which accelerate does on CUDA alone.
        prepared: what is done with the accelerator before anything is prepared.
        options: of the accelerator.
    """

    def __init__(
        self,
        *,
        averaged: bool = True,
        norm: Callable[[int], nn.Module] = nn.BatchNorm1d,
        scaler: torch.amp.GradScaler | None = None,
        prepared: Callable[[Accelerator], None] = lambda _: None,
        **options: Any,
    ) -> None:
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
        # The order of the samples is then part of the accelerator's state, with several processes, too.
        seedable = DataLoaderConfiguration(use_seedable_sampler=True)
        self.accelerator = Accelerator(cpu=True, dataloader_config=seedable, **options)
        self.accelerator.scaler = scaler
        prepared(self.accelerator)
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.2), norm(8), nn.Linear(8, 1))
        optimizer: Any = torch.optim.AdamW(model.parameters(), lr=0.01)
        if averaged:
            optimizer = EMAOptimizer(optimizer, half_life=HALF_LIFE, model=model)
        inputs = torch.randn(SAMPLES, 4, generator=torch.Generator().manual_seed(1))
        loader = DataLoader(TensorDataset(inputs), batch_size=BATCH, shuffle=True)
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 3)
        self.model, self.optimizer, self.loader, self.scheduler = self.accelerator.prepare(
            model, optimizer, loader, scheduler
        )
        #: The weights at the start, and after each step.
        self.history = [self.weights()]

    @property
    def ema(self) -> EMAOptimizer:
        return self.optimizer.optimizer

    def epoch(self, *, start: int = 0, end: int | None = None, damaged: int | None = None) -> list[int]:
        """Trains on the batches from ``start`` on, and says after each how many updates the average has had.

        Args:
            start: number of the first batch.
            end: number of the first batch that is left out. Default: none.
            damaged: number of a batch whose gradients are infinite. Default: none.
        """
        counts = []
        for index, (inputs,) in enumerate(self.accelerator.skip_first_batches(self.loader, start), start):
            if index == end:
                break
            with self.accelerator.accumulate(self.model):
                loss = self.model(inputs).square().mean() * (float('inf') if index == damaged else 1)
                self.accelerator.backward(loss)
                if self.accelerator.sync_gradients and self.accelerator.scaler is None:
                    self.accelerator.clip_grad_norm_(self.model.parameters(), 1.0)
                self.optimizer.step()
                self.scheduler.step()
                self.optimizer.zero_grad()
            if isinstance(self.optimizer.optimizer, EMAOptimizer):
                counts.append(self.ema.shadow.num_updates)
            if self.accelerator.sync_gradients:
                self.history.append(self.weights())
        return counts

    def weights(self) -> dict[str, Tensor]:
        return {name: whole(tensor) for name, tensor in self.accelerator.unwrap_model(self.model).state_dict().items()}

    def expected(self) -> dict[str, Tensor]:
        """The average by its formula, of parameters."""
        first, *later = self.history
        average = {name: first[name].double() for name, _ in self.ema.shadow.named_parameters()}
        for weights in later:
            for name, tensor in average.items():
                tensor += (1 - 2 ** (-1 / HALF_LIFE)) * (weights[name] - tensor)
        return average

    def average(self) -> dict[str, Tensor]:
        return {name: whole(tensor) for name, tensor in averages_of(self.ema.shadow).items()}


def as_accelerate_starts_a_rank() -> None:
    """Sets what accelerate's launcher sets."""
    rank, count = str(dist.get_rank()), str(dist.get_world_size())
    os.environ.update(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=count, LOCAL_WORLD_SIZE=count)
    os.environ.update(ACCELERATE_USE_CPU='true', MASTER_ADDR='127.0.0.1')


def shard(accelerator: Accelerator) -> None:
    """Lets accelerate shard the model over processes on the CPU.

    It does so on devices only: ``AcceleratorState`` leaves a ``fsdp_plugin`` out for processes of ``MULTI_CPU``.
    """
    plugin = FullyShardedDataParallelPlugin(fsdp_version=2, auto_wrap_policy='no_wrap', cpu_ram_efficient_loading=False)
    PartialState._shared_state['distributed_type'] = DistributedType.FSDP
    accelerator.state.distributed_type, accelerator.state.fsdp_plugin = DistributedType.FSDP, plugin


def run_in_ranks(folder: str, *, sharded: bool) -> dict[str, Any]:
    """Trains two epochs, saved after the first, and again from what was saved."""
    as_accelerate_starts_a_rank()
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')  # of torch, that it overwrites files of the other rank
        prepared = shard if sharded else lambda _: None
        loop = Loop(norm=nn.LayerNorm, prepared=prepared)
        loop.epoch()
        loop.accelerator.save_state(folder)
        loop.epoch()
        ends, expected = (loop.weights(), loop.average()), loop.expected()
        bare = Loop(averaged=False, norm=nn.LayerNorm, prepared=prepared)
        bare.epoch()
        bare.epoch()
        resumed = Loop(norm=nn.LayerNorm, prepared=prepared)
        resumed.accelerator.load_state(folder)
        at_load = resumed.ema.num_steps
        resumed.epoch()
        again = resumed.weights(), resumed.average()
        with resumed.ema.swap_ema_weights():
            lent = resumed.weights()
    return {
        'wrapper': type(loop.model).__name__,
        'steps': [at_load, loop.ema.num_steps],
        'resumed': [bits_of(one) == bits_of(other) for one, other in zip(ends, again, strict=True)],
        'untouched': bits_of(bare.weights()) == bits_of(ends[0]),
        'lent': bits_of({name: lent[name] for name in again[1]}) == bits_of(again[1]),
        'given back': bits_of(resumed.weights()) == bits_of(again[0]),
        'differences': [difference(ends[1][name], tensor) for name, tensor in expected.items()],
    }
