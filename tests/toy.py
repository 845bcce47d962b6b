"""A model, data and Trainer so small that a whole training run takes milliseconds; for the tests and their scripts."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from composer import Callback, DataSpec, Evaluator, Trainer
from composer.models import ComposerClassifier, ComposerModel
from composer.utils import dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, TensorDataset

from composer_ema import ShadowModel
from composer_ema.trainer.weight_average import WeightAverage

CLASSES = 3
EPOCH = 3  # batches in an epoch of the default training data
TOKENS_PER_SAMPLE = 3


def make_model(seed: int = 0, dropout: float = 0.2, dtype: torch.dtype | None = None) -> ComposerClassifier:
    """Convolution, BatchNorm, dropout and a linear layer; equal seeds give equal weights."""
    torch.manual_seed(seed)
    network = nn.Sequential(
        nn.Conv2d(1, 2, 3, stride=2), nn.BatchNorm2d(2), nn.ReLU(), nn.Flatten(), nn.Dropout(dropout), nn.Linear(8, 3)
    )
    return ComposerClassifier(network.to(dtype), num_classes=CLASSES)


def make_data(
    samples: int = 10,
    batch_size: int = 4,
    *,
    shuffle: bool = False,
    seed: int = 1,
    dtype: torch.dtype = torch.float32,
) -> DataSpec:
    """Images of 6 x 6 and labels; the last batch is smaller; every sample counts three tokens."""
    generator = torch.Generator().manual_seed(seed)
    images, labels = torch.randn(samples, 1, 6, 6, generator=generator).to(dtype), torch.arange(samples) % CLASSES
    dataset = TensorDataset(images, labels)
    # A generator of its own: otherwise every pass over the data draws one number of the training run's.
    loader = DataLoader(
        dataset, batch_size, sampler=dist.get_sampler(dataset, shuffle=shuffle), generator=torch.Generator()
    )
    return DataSpec(loader, get_num_tokens_in_batch=lambda batch: TOKENS_PER_SAMPLE * len(batch[1]))


def make_evaluator(label: str = 'eval', interval: Any = '1ep') -> Evaluator:
    """An evaluator of one batch."""
    return Evaluator(label=label, dataloader=make_data(4, seed=2), eval_interval=interval)


def make_optimizer(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.3, momentum=0.9)


def make_trainer(algorithms: Iterable[Any] = (), *, iteration: str | None = None, **arguments: Any) -> Trainer:
    """A Trainer of two epochs on the CPU, silent and seeded; ``arguments`` are Composer's and win.

    Args:
        algorithms: for the Trainer.
        iteration: length of an iteration, which Composer has no public setting for.
        arguments: further arguments of the Trainer.
    """
    model = arguments.pop('model', None) or make_model()
    callbacks = list(arguments.pop('callbacks', ()))
    if iteration is not None:
        callbacks.insert(0, IterationLength(iteration))
    defaults: dict[str, Any] = {
        'train_dataloader': make_data(),
        'optimizers': make_optimizer(model),
        'max_duration': '2ep',
        'device': 'cpu',
        'seed': 17,
        'progress_bar': False,
        'log_to_console': False,
    }
    return Trainer(model=model, algorithms=list(algorithms), callbacks=callbacks, **{**defaults, **arguments})


class OneWeight(ComposerModel):
    """A model of one weight, which no batch changes."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1, dtype=torch.float64))

    def forward(self, batch: Any) -> Tensor:
        return self.weight.sum()

    def loss(self, outputs: Tensor, batch: Any) -> Tensor:
        return 0.0 * outputs


class IterationLength(Callback):
    """Gives the run iterations."""

    def __init__(self, length: str) -> None:
        self.length = length

    def init(self, state, logger) -> None:
        state._iteration_length = self.length


def bits(tensors: nn.Module | Mapping[str, Tensor]) -> dict[str, bytes]:
    """Every tensor as its bytes, so that equal means equal to the last bit. DDP is taken off a module."""
    if isinstance(tensors, nn.Module):
        tensors = (tensors.module if isinstance(tensors, DistributedDataParallel) else tensors).state_dict()
    return {name: t.detach().cpu().reshape(-1).view(torch.uint8).numpy().tobytes() for name, t in tensors.items()}


def averaging(trainer: Trainer) -> WeightAverage:
    """The algorithm that keeps the average."""
    return next(a for a in trainer.state.algorithms if isinstance(a, WeightAverage))


def shadow_of(algorithm: WeightAverage) -> ShadowModel | None:
    """The average, whatever the algorithm calls it."""
    average: Any = getattr(algorithm, f'{algorithm.name}_model')
    return average


def snapshot(trainer: Trainer) -> dict[str, Any]:
    """All that a resumed run must reproduce: weights, the average, its counters, optimizer and clock."""
    algorithm = averaging(trainer)
    state = algorithm.state_dict()
    average = state['averages'][algorithm.name]
    momentum = {str(i): s['momentum_buffer'] for i, s in trainer.state.optimizers[0].state_dict()['state'].items() if s}
    time = trainer.state.timestamp
    return {
        'weights': bits(trainer.state.model),
        'average': bits({**average['parameters'], **average['buffers']}),
        'num_updates': average['num_updates'],
        'last_update': average['last_update'],
        'started_at': average['started_at'],
        'profile': average['profile'],
        'started': state['started'],
        'is_swapped': 'training_weights' in state,
        'momentum': bits(momentum),
        'rates': [group['lr'] for group in trainer.state.optimizers[0].param_groups],
        'annealing': state.get('annealing'),
        'time': [int(time.epoch), int(time.batch), int(time.sample), int(time.token)],
    }
