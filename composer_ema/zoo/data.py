"""The data sets that come with the package; each is registered under ``composer_ema.datasets`` in setup.cfg."""

from __future__ import annotations

import contextlib
import random
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
import torchvision
from composer.utils import dist
from torchvision.transforms.functional import pil_to_tensor

from composer_ema.spans import ArgumentError
from composer_ema.zoo import fetch
from composer_ema.zoo.checks import check_whole
from composer_ema.zoo.dataset import Batching, Data, dataset
from composer_ema.zoo.loading import loaders
from composer_ema.zoo.transforms import Normalise

__all__ = ['cifar10', 'fake', 'fashion_mnist', 'mnist1d']


@dataset(samples=lambda given: 60_000)
def fashion_mnist(
    *,
    root: str | None = None,
    batch_size: int = 512,
    eval_batch_size: int = 1000,
    channels: int = 1,
    shift: int = 0,
    mirror: bool = False,
    validation_split: float = 0.0,
    drop_last: bool = False,
    num_workers: int = 0,
    seed: int = 0,
) -> Data:
    """Fashion-MNIST: 60,000 training and 10,000 test images of 28 x 28 pixels in 10 balanced classes.

    Inputs are `(pixel / 255 - mean) / std` with mean 0.2860 and standard deviation 0.3530 of the training set, shape
    `(n, channels, 28, 28)`. The pixels stay in memory as uint8 (55 MB per process) and are normalised batch by batch.

    Args:
        root: The folder looked in first; see `fetch.load_fashion_mnist` for the places that follow.
        batch_size: Samples per training step over all processes; a multiple of their number.
        eval_batch_size: The same for evaluation. Composer averages the loss over batches, so a divisor of the number of
            samples gives the mean over samples.
        channels: 1, or 3 to repeat the grey value for models that expect colour.
        shift: Each training image moves by up to this many pixels in each direction, at random; in [0, 28). The draw is
            a function of seed, epoch and sample alone.
        mirror: Whether each training image is mirrored with probability 1/2, by the same kind of draw.
        validation_split: Share of the training set held out for evaluation in place of the test set, in [0, 1);
            0 evaluates on the test set. Which samples are held out does not depend on `seed`.
        drop_last: Whether an uneven last training batch is dropped.
        num_workers: Worker processes per loader; 0 loads in the training process, which is fast enough here.
        seed: Seed of the order of training and of the augmentation, at least 0.

    Returns:
        The loaders, with 10 classes.

    Raises:
        ValueError: An argument is out of range; nothing has been read then.
        FileNotFoundError: No place has the data; the message names each.
    """
    batching = Batching(batch_size, eval_batch_size, validation_split, drop_last, num_workers, seed)
    if channels not in (1, 3):
        raise ArgumentError(
            f'channels must be 1 or 3, got {channels!r}. Pass 3 for models that expect colour images.', 'channels'
        )
    check_whole('shift', shift, 0, 'Pass 1 for a pixel in each direction, 0 for none.')
    if shift >= 28:
        raise ArgumentError(f'shift must lie below 28, the side of an image, got {shift}. Pass 1 or 2.', 'shift')
    if not isinstance(mirror, bool):
        raise ArgumentError(
            f'mirror must be True or False, got {mirror!r}. Pass True to mirror half of the images.', 'mirror'
        )
    _check_root(root)
    normalise = Normalise(mean=(0.2860,) * channels, std=(0.3530,) * channels)
    return loaders(batching, fetch.load_fashion_mnist(root), normalise, num_classes=10, shift=shift, mirror=mirror)


@dataset(samples=lambda given: 50_000)
def cifar10(
    *,
    root: str | None = None,
    batch_size: int = 256,
    eval_batch_size: int = 1000,
    augment: bool = True,
    validation_split: float = 0.0,
    drop_last: bool = False,
    num_workers: int = 0,
    seed: int = 0,
) -> Data:
    """CIFAR-10: 50,000 training and 10,000 test images of 3 x 32 x 32 in 10 balanced classes, through torchvision.

    Inputs are normalised per channel by the mean and standard deviation of the training set. The pixels stay in memory
    as uint8 (184 MB per process).

    Args:
        root: The folder with `cifar-10-batches-py/` looked in first; then the cache, then torchvision's download.
        batch_size: Samples per training step over all processes; a multiple of their number.
        eval_batch_size: The same for evaluation; see `fashion_mnist`.
        augment: Whether training images are padded by 4, cropped at random and mirrored with probability 1/2. The draw
            is a function of seed, epoch and sample alone, so a resumed run repeats it with any number of processes.
        validation_split: Share of the training set held out for evaluation in place of the test set, in [0, 1); see
            `fashion_mnist`.
        drop_last: Whether an uneven last training batch is dropped.
        num_workers: Worker processes per loader.
        seed: Seed of the order of training and of the augmentation, at least 0.

    Returns:
        The loaders, with 10 classes.

    Raises:
        ValueError: An argument is out of range; nothing has been read then.
        FileNotFoundError: No place has the data; the message names each.
    """
    batching = Batching(batch_size, eval_batch_size, validation_split, drop_last, num_workers, seed)
    _check_root(root)
    normalise = Normalise(mean=(0.4914, 0.4822, 0.4465), std=(0.2470, 0.2435, 0.2616))
    shift = 4 if augment else 0
    return loaders(batching, fetch.load_cifar10(root), normalise, num_classes=10, shift=shift, mirror=augment)


# The generator makes as many signals of each class, and keeps four fifths.
@dataset(samples=lambda given: int(given['num_samples'] // 10 * 10 * 0.8))
def mnist1d(
    *,
    num_samples: int = 5000,
    data_seed: int = 42,
    batch_size: int = 100,
    eval_batch_size: int = 1000,
    validation_split: float = 0.0,
    drop_last: bool = False,
    num_workers: int = 0,
    seed: int = 0,
) -> Data:
    """MNIST-1D (Greydanus and Kobak 2024): signals of 40 numbers in 10 classes, generated, never downloaded.

    The generator package `mnist1d` centres and scales the signals; inputs are float32 `(n, 40)`. It seeds the global
    generators of `random` and NumPy, whose states are put back afterwards.

    Args:
        num_samples: Signals in all, at least 10; four fifths train and one fifth evaluates.
        data_seed: Seed of the generator, in [0, 2**32); 42 with 5000 samples is the set of the paper.
        batch_size: Samples per training step over all processes; a multiple of their number.
        eval_batch_size: The same for evaluation; see `fashion_mnist`.
        validation_split: Share of the training set held out for evaluation in place of the test set, in [0, 1); see
            `fashion_mnist`.
        drop_last: Whether an uneven last training batch is dropped.
        num_workers: Worker processes per loader.
        seed: Seed of the order of training, at least 0; the data do not depend on it.

    Returns:
        The loaders, with 10 classes.

    Raises:
        ValueError: An argument is out of range; nothing has been generated then.
    """
    batching = Batching(batch_size, eval_batch_size, validation_split, drop_last, num_workers, seed)
    check_whole('num_samples', num_samples, 10, 'The generator makes num_samples // 10 signals of each class.')
    check_whole('data_seed', data_seed, 0, 'Pass 42 for the set of the paper.')
    if data_seed >= 2**32:
        raise ArgumentError(
            f'data_seed must lie below 2**32, got {data_seed}. Pass 42 for the set of the paper.', 'data_seed'
        )

    # The package imports matplotlib and SciPy, which takes half a second: only this data set should pay for it.
    from mnist1d.data import get_dataset_args, make_dataset

    arguments: Any = get_dataset_args()
    arguments.num_samples, arguments.seed = int(num_samples), int(data_seed)
    with _global_rng_kept():
        made = make_dataset(arguments)
    tensors = {
        'train_inputs': torch.from_numpy(made['x']).float(),
        'train_labels': torch.from_numpy(made['y']),
        'test_inputs': torch.from_numpy(made['x_test']).float(),
        'test_labels': torch.from_numpy(made['y_test']),
    }
    return loaders(batching, tensors, None, num_classes=10)


@dataset(samples=lambda given: given['size'])
def fake(
    *,
    image_size: Sequence[int] = (3, 32, 32),
    num_classes: int = 10,
    size: int = 1024,
    eval_size: int = 256,
    data_seed: int = 0,
    batch_size: int = 128,
    eval_batch_size: int = 128,
    validation_split: float = 0.0,
    drop_last: bool = False,
    num_workers: int = 0,
    seed: int = 0,
) -> Data:
    """Random images with random labels (torchvision's FakeData): for trying a recipe or timing a model.

    All images are made at once and kept as uint8: `(size + eval_size) * prod(image_size)` bytes.

    Args:
        image_size: Channels (1 to 4), height and width.
        num_classes: Number of classes, at least 1.
        size: Training images, at least 1.
        eval_size: Evaluation images, at least 1; none is among the training images.
        data_seed: Seed of images and labels, at least 0.
        batch_size: Samples per training step over all processes; a multiple of their number.
        eval_batch_size: The same for evaluation.
        validation_split: Share of the training images held out for evaluation in place of the others, in [0, 1).
        drop_last: Whether an uneven last training batch is dropped.
        num_workers: Worker processes per loader.
        seed: Seed of the order of training, at least 0.

    Returns:
        The loaders; inputs are float32 in [-1, 1].

    Raises:
        ValueError: An argument is out of range; nothing has been generated then.
    """
    batching = Batching(batch_size, eval_batch_size, validation_split, drop_last, num_workers, seed)
    if isinstance(image_size, str) or not isinstance(image_size, Sequence) or len(image_size) != 3:
        raise ArgumentError(
            f'image_size must hold channels, height and width, got {image_size!r}. Pass [3, 32, 32].', 'image_size'
        )
    for name, value in zip(('channels', 'height', 'width'), image_size, strict=True):
        check_whole(
            f'image_size ({name})',
            value,
            1,
            'Pass [channels, height, width], for example [3, 32, 32].',
            argument='image_size',
        )
    channels, height, width = image_size
    if channels > 4:
        raise ArgumentError(
            f'image_size must start with 1 to 4 channels, got {channels}. Pass [3, 32, 32].', 'image_size'
        )
    check_whole('num_classes', num_classes, 1, 'Pass the number of classes that the model predicts.')
    check_whole('size', size, 1, 'Pass the number of training images.')
    check_whole('eval_size', eval_size, 1, 'Pass the number of evaluation images.')
    check_whole('data_seed', data_seed, 0, 'Pass 0 for the default set.')

    tensors: dict[str, torch.Tensor] = {}
    # FakeData seeds sample i by offset + i, so these offsets keep all sets of images apart.
    offset = data_seed * (size + eval_size)
    for split, count, first in (('train', size, offset), ('test', eval_size, offset + size)):
        source = torchvision.datasets.FakeData(count, (channels, height, width), num_classes, random_offset=first)
        with _fake_data_contained():
            samples = [source[index] for index in range(count)]
        tensors[f'{split}_inputs'] = torch.stack([pil_to_tensor(image) for image, _ in samples])
        tensors[f'{split}_labels'] = torch.tensor([label for _, label in samples])
    return loaders(batching, tensors, Normalise((0.5,) * channels, (0.5,) * channels), num_classes=num_classes)


def _check_root(root: object) -> None:
    if root is not None and (not isinstance(root, str) or not root):
        message = f'root must be the path of a folder, got {root!r}. Leave it out to look in the other places.'
        raise ArgumentError(message, 'root')


@contextlib.contextmanager
def _global_rng_kept() -> Iterator[None]:
    python_state, numpy_state = random.getstate(), np.random.get_state()
    try:
        yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)


@contextlib.contextmanager
def _fake_data_contained() -> Iterator[None]:
    # FakeData puts back the CPU's generator but calls torch.manual_seed, which seeds this process's GPU as well.
    devices = [dist.get_local_rank()] if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices=devices), warnings.catch_warnings():
        # torchvision 0.22 passes an argument that Pillow 11.3 deprecates; to be deleted once torchvision does not.
        warnings.filterwarnings('ignore', message="'mode' parameter is deprecated", category=DeprecationWarning)
        yield
