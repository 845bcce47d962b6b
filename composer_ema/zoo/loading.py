"""Loaders, and samples in memory: seed and epoch alone determine the order and the augmentation of an epoch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from composer.utils import dist
from torch.utils.data import DataLoader, Dataset, DistributedSampler

from composer_ema.zoo.dataset import Batch, Batching, Data
from composer_ema.zoo.transforms import Array, CropAndMirror, Normalise


def loaders(
    batching: Batching,
    tensors: dict[str, torch.Tensor],
    transform: Normalise | None,
    *,
    num_classes: int,
    shift: int = 0,
    mirror: bool = False,
) -> Data:
    """The loaders of a data set in memory.

    Args:
        batching: The arguments of the data set.
        tensors: ``train_inputs``, ``train_labels``, ``test_inputs`` and ``test_labels``, not copied.
        transform: Maps a batch of inputs to the float32 inputs of the model; None if they are that already.
        num_classes: Targets lie in ``[0, num_classes)``.
        shift: Pixels by which a training image may be moved in each direction.
        mirror: Whether a training image may be mirrored.
    """
    train = tensors['train_inputs'].numpy(), tensors['train_labels'].long().numpy()
    held_out = tensors['test_inputs'].numpy(), tensors['test_labels'].long().numpy()
    if batching.validation_split > 0:
        order = held_out_order(len(train[1])).numpy()
        count = batching.count_held_out(len(order))
        held_out = train[0][order[:count]], train[1][order[:count]]
        train = train[0][order[count:]], train[1][order[count:]]
    batching.check_last_batch(len(train[1]))
    augmentation = None
    if shift or mirror:
        augmentation = CropAndMirror(len(train[1]), batching.seed, padding=shift, mirror=mirror)
    train_set = ArrayBatches(*train, transform=transform, augment=augmentation)
    evaluation_set = ArrayBatches(*held_out, transform=transform)
    return Data(
        train=loader(batching, train_set, batching.batch_size, is_training=True),
        evaluation=loader(batching, evaluation_set, batching.eval_batch_size, is_training=False),
        num_classes=num_classes,
        input_shape=tuple(evaluation_set[0][0].shape),
    )


class Batches(Dataset[Any]):
    """A data set that PyTorch's loader fetches a finished batch at a time from, by `__getitems__`.

    A batch is a tuple or a mapping of tensors.

    Attributes:
        sampler: It knows the epoch. A worker process gets it with the data set.
    """

    sampler: DistributedSampler[int] | None = None

    def __len__(self) -> int:
        raise NotImplementedError

    def __getitem__(self, index: int) -> Any:
        batch = self.__getitems__([index])
        if isinstance(batch, Mapping):
            return {name: each[0] for name, each in batch.items()}
        return tuple(each[0] for each in batch)

    def __getitems__(self, indices: Sequence[int]) -> Any:
        raise NotImplementedError

    @property
    def epoch(self) -> int:
        assert self.sampler is not None
        return self.sampler.epoch


def loader(batching: Batching, dataset: Batches, batch_size: int, *, is_training: bool) -> DataLoader[Any]:
    """The loader of one data set, whose order is drawn from seed and epoch in training and fixed otherwise.

    Args:
        batching: The arguments of the data set.
        dataset: Its `sampler` is set.
        batch_size: Samples per step over all processes.
        is_training: Whether the order is drawn, and an uneven last batch may be dropped.
    """
    drop_last = is_training and batching.drop_last
    dataset.sampler = dist.get_sampler(dataset, shuffle=is_training, drop_last=drop_last, seed=spread(batching.seed))
    return DataLoader(
        dataset,
        batch_size=batch_size // dist.get_world_size(),
        sampler=dataset.sampler,
        drop_last=drop_last,
        num_workers=batching.num_workers,
        collate_fn=as_is,
        pin_memory=torch.cuda.is_available(),
        # Each pass over a loader draws a number, by default from the global generator: one more evaluation would
        # change the dropout of the training that follows.
        generator=torch.Generator().manual_seed(batching.seed),
    )


class ArrayBatches(Batches):
    """Samples in memory, fetched a whole batch at a time: one indexing operation, not one call per sample.

    PyTorch's loader calls `__getitems__` with the indices of a batch and gets the finished batch, so the loader's
    `collate_fn` must be `as_is`. NumPy does the work: PyTorch would divide these small operations among its threads,
    which on busy cores takes many times longer than the operations themselves.

    Args:
        inputs: `(n, *shape)`, float32 without a transform.
        targets: `(n,)` int64.
        transform: From a batch of `inputs` to the float32 inputs of the model; `None` if they are that already.
        augment: From a batch of `inputs`, the sample indices and the epoch to a batch of `inputs`; `None` for nothing.
    """

    def __init__(
        self,
        inputs: Array,
        targets: Array,
        transform: Normalise | None = None,
        augment: CropAndMirror | None = None,
    ) -> None:
        assert len(inputs) == len(targets)
        self.inputs = inputs
        self.targets = targets
        self.transform = transform
        self.augment = augment

    def __len__(self) -> int:
        return len(self.targets)

    def __getitems__(self, indices: Sequence[int]) -> Batch:
        chosen = np.asarray(indices)
        inputs = self.inputs[chosen]
        if self.augment is not None:
            inputs = self.augment(inputs, chosen, self.epoch)
        if self.transform is not None:
            inputs = self.transform(inputs)
        return torch.from_numpy(inputs), torch.from_numpy(self.targets[chosen])


def as_is(batch: Any) -> Any:
    """The collate function for a data set that returns finished batches."""
    return batch


def held_out_order(samples: int) -> torch.Tensor:
    """The numbers of training samples in the order in which they are held out.

    The seed is a constant: runs with different seeds are then evaluated on the same samples.
    """
    return torch.randperm(samples, generator=torch.Generator().manual_seed(0))


def spread(seed: int) -> int:
    """The seed for a DistributedSampler, so that no epoch of one seed is one of another."""
    # DistributedSampler seeds an epoch by seed + epoch, so epoch 2 of seed 1 would be epoch 1 of seed 2. The CPU
    # generator keeps 32 bits; an odd factor maps them one to one.
    return seed * 1_000_003 % 2**32
