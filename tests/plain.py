"""Models and training loops for the tests that need no Composer: small enough to compute by hand."""

from __future__ import annotations

import inspect
import io
import os
import pickle
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.optim import lr_scheduler

from composer_ema import EMAOptimizer

#: Every warning is an error, but for those of torch's own making, and that a few steps leave much of the start.
STRICT = pytest.mark.filterwarnings(
    'error',
    'ignore:.* still holds .* of the initial weights:UserWarning',
    'ignore::DeprecationWarning:torch',  # torch.compile of newer releases calls deprecated functions
    'ignore:Implicitly cleaning up:ResourceWarning',  # a folder that another test's Composer Trainer has left
    'ignore:The epoch parameter in',  # SequentialLR of older releases passes it
)

# By name, so that those of newer releases of torch are covered as well.
OPTIMIZERS = {
    name: kind
    for name, kind in vars(torch.optim).items()
    if inspect.isclass(kind) and issubclass(kind, torch.optim.Optimizer) and kind is not torch.optim.Optimizer
}
SCHEDULERS = {
    name: kind
    for name, kind in vars(lr_scheduler).items()
    if inspect.isclass(kind) and issubclass(kind, lr_scheduler.LRScheduler) and not name.startswith('_')
}


class Net(nn.Module):
    """Two layers around a BatchNorm; no biases, since Muon takes matrices only."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.first = nn.Linear(3, 4, bias=False)
        self.norm = nn.BatchNorm1d(4, affine=False)
        self.last = nn.Linear(4, 2, bias=False)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.last(self.norm(self.first(inputs)).relu())


class One(nn.Module):
    """One parameter; for sums done by hand."""

    def __init__(self, value: float = 0.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([value]))


def set_(tensor: Tensor, value: float) -> None:
    """Fills a tensor, unseen by autograd."""
    nn.init.constant_(tensor, value) if tensor.is_floating_point() else tensor.fill_(value)


def sgd(model: nn.Module, lr: float = 0.1) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)


def batch(index: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(index)
    return torch.randn(8, 3, generator=generator), torch.randint(2, (8,), generator=generator)


def loss_of(model: nn.Module, index: int) -> Tensor:
    inputs, labels = batch(index)
    return nn.functional.cross_entropy(model(inputs), labels)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for index in steps:
        optimizer.zero_grad()
        loss_of(model, index).backward()
        optimizer.step()


def step_to(optimizer: torch.optim.Optimizer, model: One, value: float) -> None:
    """A step of SGD with lr 1 after which the weight is ``value``."""
    model.weight.grad = model.weight.detach() - value
    optimizer.step()


def averaged(optimizer: EMAOptimizer) -> dict[str, Tensor]:
    shadow = optimizer.shadow
    return {
        name: t.detach().clone()
        for tensors in (shadow.named_parameters(), shadow.named_buffers())
        for name, t in tensors
    }


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def bits(tensor: Tensor) -> bytes:
    return tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes()


def same_bits(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(
        first[name].dtype == second[name].dtype and bits(first[name]) == bits(second[name]) for name in first
    )


def same_values(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    """As :func:`same_bits`, whatever the names."""
    return list(map(bits, first.values())) == list(map(bits, second.values()))


def saved(state: dict) -> dict:
    """Through a file and ``weights_only=True``."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def assert_same(first, second) -> None:
    """Nested containers with equal tensors, to the bit."""
    assert type(first) is type(second)
    if isinstance(first, Tensor):
        assert first.dtype == second.dtype
        assert bits(first) == bits(second)
    elif isinstance(first, dict):
        assert first.keys() == second.keys()
        for key in first:
            assert_same(first[key], second[key])
    elif isinstance(first, list | tuple):
        assert len(first) == len(second)
        for one, other in zip(first, second, strict=True):
            assert_same(one, other)
    else:
        assert first == second


def composer_checkpoint(path: Path, model: nn.Module, batch: int = 7, run_name: str = 'a-run') -> Path:
    """Writes what Composer's Trainer would after ``batch`` batches of 8 samples, 5 to an epoch."""
    timestamp = {'epoch': batch // 5, 'batch': batch, 'sample': 8 * batch, 'token': 0}
    state = {'model': model.state_dict(), 'run_name': run_name, 'timestamp': {'Timestamp': timestamp}}
    torch.save({'state': state, 'rng': []}, path)
    return path


class _Code:
    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder),)


def write_code(path: Path, folder: Path) -> None:
    """Writes a pickle that makes ``folder`` when it is loaded by a reader that runs code."""
    with path.open('wb') as file:
        pickle.dump(_Code(folder), file)
