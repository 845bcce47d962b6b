"""Data sets by name as Composer-ready loaders; seed and epoch alone fix the order and the augmentation of an epoch."""

import contextlib
import dataclasses
import inspect
import math
import numbers
import random
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torchvision
from composer.utils import dist
from torch.utils.data import DataLoader, Dataset, DistributedSampler
from torchvision.transforms.functional import pil_to_tensor

from composer_ema.zoo import fetch

__all__ = ['DATASETS', 'Data', 'Extent', 'cifar10', 'extent', 'fake', 'fashion_mnist', 'mnist1d']

Array = np.ndarray[Any, np.dtype[Any]]
Batch = tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class Data:
    """What a data set hands to the trainer.

    Attributes:
        train: Shuffled batches `(inputs, targets)`: float32 `(n, *input_shape)` and int64 `(n,)`.
        evaluation: Batches of the same kind, in fixed order, each sample once.
        num_classes: Targets lie in `[0, num_classes)`.
        input_shape: Shape of one input.
    """

    train: DataLoader[Batch]
    evaluation: DataLoader[Batch]
    num_classes: int
    input_shape: tuple[int, ...]


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
        shift: Each training image is moved by up to so many pixels in each direction, at random; in [0, 28). The draw
            is a function of seed, epoch and sample alone.
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
    loading = _Loading(batch_size, eval_batch_size, validation_split, drop_last, num_workers, seed)
    if channels not in (1, 3):
        raise ValueError(f'channels must be 1 or 3, got {channels!r}. Pass 3 for models that expect colour images.')
    _check_whole('shift', shift, 0, 'Pass 1 for a pixel in each direction, 0 for none.')
    if shift >= 28:
        raise ValueError(f'shift must lie below 28, the side of an image, got {shift}. Pass 1 or 2.')
    if not isinstance(mirror, bool):
        raise ValueError(f'mirror must be True or False, got {mirror!r}. Pass True to mirror half of the images.')
    _check_root(root)
    normalise = Normalise(mean=(0.2860,) * channels, std=(0.3530,) * channels)
    return loading.from_tensors(fetch.load_fashion_mnist(root), normalise, num_classes=10, shift=shift, mirror=mirror)


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
        validation_split: Share of the training set held out for evaluation in place of the test set, in [0, 1).
        drop_last: Whether an uneven last training batch is dropped.
        num_workers: Worker processes per loader.
        seed: Seed of the order of training and of the augmentation, at least 0.

    Returns:
        The loaders, with 10 classes.

    Raises:
        ValueError: An argument is out of range; nothing has been read then.
        FileNotFoundError: No place has the data; the message names each.
    """
    loading = _Loading(batch_size, eval_batch_size, validation_split, drop_last, num_workers, seed)
    _check_root(root)
    normalise = Normalise(mean=(0.4914, 0.4822, 0.4465), std=(0.2470, 0.2435, 0.2616))
    shift = 4 if augment else 0
    return loading.from_tensors(fetch.load_cifar10(root), normalise, num_classes=10, shift=shift, mirror=augment)


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
        validation_split: Share of the training set held out for evaluation in place of the test set, in [0, 1).
        drop_last: Whether an uneven last training batch is dropped.
        num_workers: Worker processes per loader.
        seed: Seed of the order of training, at least 0; the data do not depend on it.

    Returns:
        The loaders, with 10 classes.

    Raises:
        ValueError: An argument is out of range; nothing has been generated then.
    """
    loading = _Loading(batch_size, eval_batch_size, validation_split, drop_last, num_workers, seed)
    _check_whole('num_samples', num_samples, 10, 'The generator makes num_samples // 10 signals of each class.')
    _check_whole('data_seed', data_seed, 0, 'Pass 42 for the set of the paper.')
    if data_seed >= 2**32:
        raise ValueError(f'data_seed must lie below 2**32, got {data_seed}. Pass 42 for the set of the paper.')

    # Imported late: the package imports matplotlib and SciPy, half a second that only this data set should cost.
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
    return loading.from_tensors(tensors, None, num_classes=10)


def fake(
    *,
    image_size: Sequence[int] = (3, 32, 32),
    num_classes: int = 10,
    size: int = 1024,
    eval_size: int = 256,
    data_seed: int = 0,
    batch_size: int = 128,
    eval_batch_size: int = 128,
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
        drop_last: Whether an uneven last training batch is dropped.
        num_workers: Worker processes per loader.
        seed: Seed of the order of training, at least 0.

    Returns:
        The loaders; inputs are float32 in [-1, 1].

    Raises:
        ValueError: An argument is out of range; nothing has been generated then.
    """
    loading = _Loading(batch_size, eval_batch_size, 0.0, drop_last, num_workers, seed)
    if isinstance(image_size, str) or not isinstance(image_size, Sequence) or len(image_size) != 3:
        raise ValueError(f'image_size must hold channels, height and width, got {image_size!r}. Pass [3, 32, 32].')
    for name, value in zip(('channels', 'height', 'width'), image_size, strict=True):
        _check_whole(f'image_size ({name})', value, 1, 'Pass [channels, height, width], for example [3, 32, 32].')
    channels, height, width = image_size
    if channels > 4:
        raise ValueError(f'image_size must start with 1 to 4 channels, got {channels}. Pass [3, 32, 32].')
    _check_whole('num_classes', num_classes, 1, 'Pass the number of classes that the model predicts.')
    _check_whole('size', size, 1, 'Pass the number of training images.')
    _check_whole('eval_size', eval_size, 1, 'Pass the number of evaluation images.')
    _check_whole('data_seed', data_seed, 0, 'Pass 0 for the default set.')

    tensors: dict[str, torch.Tensor] = {}
    # FakeData seeds sample i by offset + i, so these offsets keep all sets of images apart.
    offset = data_seed * (size + eval_size)
    for split, count, first in (('train', size, offset), ('test', eval_size, offset + size)):
        source = torchvision.datasets.FakeData(count, (channels, height, width), num_classes, random_offset=first)
        with _fake_data_contained():
            samples = [source[index] for index in range(count)]
        tensors[f'{split}_inputs'] = torch.stack([pil_to_tensor(image) for image, _ in samples])
        tensors[f'{split}_labels'] = torch.tensor([label for _, label in samples])
    return loading.from_tensors(tensors, Normalise((0.5,) * channels, (0.5,) * channels), num_classes=num_classes)


DATASETS: dict[str, Callable[..., Data]] = {
    'fashion_mnist': fashion_mnist,
    'mnist1d': mnist1d,
    'cifar10': cifar10,
    'fake': fake,
}


@dataclass(frozen=True)
class Extent:
    """How long an epoch of training is.

    Attributes:
        samples: In all, at least 1.
        batch_size: Over all processes.
        drop_last: Whether an uneven last batch is dropped.
    """

    samples: int
    batch_size: int
    drop_last: bool

    @property
    def batches(self) -> int:
        """Batches of an epoch, as `len(data.train)` of one process."""
        whole, rest = divmod(self.samples, self.batch_size)
        return whole + (rest > 0 and not self.drop_last)

    def samples_of(self, batch_in_epoch: int) -> int:
        """Samples of the batch of that number, counted from 0."""
        return min(self.batch_size, self.samples - batch_in_epoch * self.batch_size)


def extent(name: str, arguments: Mapping[str, Any]) -> Extent:
    """What training on a data set will be, without reading, making or downloading it.

    Args:
        name: A key of `DATASETS`.
        arguments: Of that function; its defaults stand for the rest.

    Raises:
        ValueError: What the function itself would say about its arguments.

    Example:
        >>> extent('fashion_mnist', {'batch_size': 512}).batches
        118
    """
    defaults = {each.name: each.default for each in inspect.signature(DATASETS[name]).parameters.values()}
    given = {'validation_split': 0.0, **defaults, **arguments}
    loading = _Loading(**{field.name: given[field.name] for field in dataclasses.fields(_Loading)})
    samples = _TRAINING_SAMPLES[name](given)
    samples -= loading.count_held_out(samples)
    loading.check_last_batch(samples)
    return Extent(samples, loading.batch_size, loading.drop_last)


_TRAINING_SAMPLES: dict[str, Callable[[Mapping[str, Any]], int]] = {
    'fashion_mnist': lambda given: 60_000,
    # The generator makes as many of each class, and keeps four fifths.
    'mnist1d': lambda given: int(given['num_samples'] // 10 * 10 * 0.8),
    'cifar10': lambda given: 50_000,
    'fake': lambda given: given['size'],
}


class ArrayBatches(Dataset[Batch]):
    """Samples in memory that are fetched a whole batch at a time: one indexing operation, not one call per sample.

    PyTorch's loader calls `__getitems__` with the indices of a batch; what it returns is the batch already, so the
    loader's `collate_fn` must be `as_is`. The work is NumPy's: PyTorch would share these small operations out among its
    threads, which on busy cores takes many times longer than the operations do.

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
        transform: 'Normalise | None' = None,
        augment: 'CropAndMirror | None' = None,
    ) -> None:
        assert len(inputs) == len(targets)
        self.inputs = inputs
        self.targets = targets
        self.transform = transform
        self.augment = augment
        self.sampler: DistributedSampler[int] | None = None  # tells the epoch; a worker gets it with the data set

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> Batch:
        inputs, targets = self.__getitems__([index])
        return inputs[0], targets[0]

    def __getitems__(self, indices: Sequence[int]) -> Batch:
        chosen = np.asarray(indices)
        inputs = self.inputs[chosen]
        if self.augment is not None:
            assert self.sampler is not None
            inputs = self.augment(inputs, chosen, self.sampler.epoch)
        if self.transform is not None:
            inputs = self.transform(inputs)
        return torch.from_numpy(inputs), torch.from_numpy(self.targets[chosen])


@dataclass(frozen=True)
class Normalise:
    """`(pixel / 255 - mean) / std`, channel by channel; one input channel is repeated if more means are given.

    Attributes:
        mean: One number per output channel, for pixels in [0, 1].
        std: The same number of numbers.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __call__(self, pixels: Array) -> Array:
        """Maps uint8 `(n, c, height, width)` to float32 `(n, len(mean), height, width)`."""
        mean = np.array(self.mean, dtype=np.float32)[:, None, None]
        std = np.array(self.std, dtype=np.float32)[:, None, None]
        normalised = np.subtract(pixels, 255 * mean, dtype=np.float32)
        normalised /= 255 * std
        return normalised


class CropAndMirror:
    """Crops each image at random from itself padded with zeros on each side, and mirrors it with probability 1/2.

    The draw for a sample is a function of seed, epoch and sample index. It does not touch the global generators, so it
    is the same in a resumed run, with other batch sizes and with other numbers of processes or workers.

    Args:
        num_samples: Samples in the data set.
        seed: Seed of all draws.
        padding: Pixels of zeros on each side, and so the farthest that a crop moves the image.
        mirror: Whether any image is mirrored.
    """

    def __init__(self, num_samples: int, seed: int, *, padding: int = 4, mirror: bool = True) -> None:
        self.num_samples = num_samples
        self.seed = seed
        self.padding = padding
        self.mirror = mirror
        self._drawn: tuple[int, Array, Array] | None = None

    def __call__(self, images: Array, samples: Array, epoch: int) -> Array:
        """Maps `(n, c, height, width)` to a new array of the same shape and dtype."""
        steps, is_mirrored = (drawn[samples] for drawn in self._draws(epoch))
        _, channels, height, width = images.shape
        padded = np.pad(images, ((0, 0), (0, 0), (self.padding,) * 2, (self.padding,) * 2))
        rows = steps[:, :1] + np.arange(height)
        columns = steps[:, 1:] + np.arange(width)
        columns = np.where(is_mirrored[:, None], columns[:, ::-1], columns)
        return padded[
            np.arange(len(images))[:, None, None, None],
            np.arange(channels)[None, :, None, None],
            rows[:, None, :, None],
            columns[:, None, None, :],
        ]

    def _draws(self, epoch: int) -> tuple[Array, Array]:
        if self._drawn is None or self._drawn[0] != epoch:
            generator = np.random.default_rng((self.seed, epoch))
            steps = generator.integers(2 * self.padding + 1, size=(self.num_samples, 2))
            is_mirrored = generator.integers(2, size=self.num_samples) if self.mirror else np.zeros(self.num_samples)
            self._drawn = epoch, steps, is_mirrored.astype(bool)
        return self._drawn[1:]


def as_is(batch: Any) -> Any:
    """The collate function of batches that are batches already."""
    return batch


@dataclass(frozen=True)
class _Loading:
    """The arguments that all data sets share, checked on construction."""

    batch_size: int
    eval_batch_size: int
    validation_split: float
    drop_last: bool
    num_workers: int
    seed: int

    def __post_init__(self) -> None:
        world_size = dist.get_world_size()
        for name in ('batch_size', 'eval_batch_size'):
            value = getattr(self, name)
            _check_whole(name, value, 1, 'It counts the samples of one step over all processes.')
            if value % world_size != 0:
                raise ValueError(
                    f'{name} must be divisible by the number of processes, got {value} for {world_size} processes. '
                    f'Pass {name}={math.ceil(value / world_size) * world_size}.'
                )
        split = self.validation_split
        if isinstance(split, bool) or not isinstance(split, int | float) or not 0 <= split < 1:
            raise ValueError(
                f'validation_split must be a share in [0, 1), got {split!r}. '
                'Pass 0.1 to hold out a tenth of the training set, 0 to evaluate on the test set.'
            )
        _check_whole('num_workers', self.num_workers, 0, 'Pass 0 to load in the training process.')
        _check_whole('seed', self.seed, 0, 'Pass any whole number from 0 on.')

    def from_tensors(
        self,
        tensors: dict[str, torch.Tensor],
        transform: 'Normalise | None',
        *,
        num_classes: int,
        shift: int = 0,
        mirror: bool = False,
    ) -> Data:
        train = tensors['train_inputs'].numpy(), tensors['train_labels'].long().numpy()
        held_out = tensors['test_inputs'].numpy(), tensors['test_labels'].long().numpy()
        if self.validation_split > 0:
            # The seed is a constant: runs with different seeds are then evaluated on the same samples.
            order = torch.randperm(len(train[1]), generator=torch.Generator().manual_seed(0)).numpy()
            count = self.count_held_out(len(order))
            held_out = train[0][order[:count]], train[1][order[:count]]
            train = train[0][order[count:]], train[1][order[count:]]
        self.check_last_batch(len(train[1]))
        augmentation = None
        if shift or mirror:
            augmentation = CropAndMirror(len(train[1]), self.seed, padding=shift, mirror=mirror)
        train_set = ArrayBatches(*train, transform=transform, augment=augmentation)
        evaluation_set = ArrayBatches(*held_out, transform=transform)
        return Data(
            train=self._loader(train_set, self.batch_size, shuffle=True, drop_last=self.drop_last),
            evaluation=self._loader(evaluation_set, self.eval_batch_size, shuffle=False, drop_last=False),
            num_classes=num_classes,
            input_shape=tuple(evaluation_set[0][0].shape),
        )

    def count_held_out(self, samples: int) -> int:
        """How many of the training samples evaluate instead."""
        return min(max(1, round(self.validation_split * samples)), samples - 1) if self.validation_split > 0 else 0

    def check_last_batch(self, samples: int) -> None:
        """Raises where the only batch of an epoch would be dropped."""
        if self.drop_last and self.batch_size > samples:
            raise ValueError(
                f'batch_size must not exceed the {samples} training samples with drop_last, '
                f'got {self.batch_size}: every batch would be dropped. Pass drop_last=False or a smaller batch_size.'
            )

    def _loader(self, dataset: ArrayBatches, batch_size: int, *, shuffle: bool, drop_last: bool) -> DataLoader[Batch]:
        dataset.sampler = dist.get_sampler(dataset, shuffle=shuffle, drop_last=drop_last, seed=_spread(self.seed))
        return DataLoader(
            dataset,
            batch_size=batch_size // dist.get_world_size(),
            sampler=dataset.sampler,
            drop_last=drop_last,
            num_workers=self.num_workers,
            collate_fn=as_is,
            pin_memory=torch.cuda.is_available(),
            # Each pass over a loader draws a number, by default from the global generator: one more evaluation would
            # change the dropout of the training that follows.
            generator=torch.Generator().manual_seed(self.seed),
        )


def _spread(seed: int) -> int:
    # DistributedSampler seeds an epoch by seed + epoch, so epoch 2 of seed 1 would be epoch 1 of seed 2. The CPU
    # generator keeps 32 bits; an odd factor maps them one to one.
    return seed * 1_000_003 % 2**32


def _check_whole(name: str, value: object, least: int, remedy: str) -> None:
    if isinstance(value, bool) or not isinstance(value, numbers.Integral) or int(value) < least:
        raise ValueError(f'{name} must be a whole number of at least {least}, got {value!r}. {remedy}')


def _check_root(root: object) -> None:
    if root is not None and (not isinstance(root, str) or not root):
        raise ValueError(f'root must be the path of a folder, got {root!r}. Leave it out to look in the other places.')


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
