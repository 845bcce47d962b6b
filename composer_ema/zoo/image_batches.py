"""Images of files as batches of inputs: decoded, kept in memory where there is room, augmented and normalised."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch.utils.data import get_worker_info

from composer_ema.spans import ArgumentError
from composer_ema.zoo.augmentation import Augmentation, own_draws
from composer_ema.zoo.dataset import Batch
from composer_ema.zoo.image_files import Images
from composer_ema.zoo.image_reading import UnreadableError, centre_square, check_all, shrunk
from composer_ema.zoo.loading import Batches
from composer_ema.zoo.transforms import Normalise

#: How many training images are measured, at most.
MEASURED = 1000


class ImageBatches(Batches):
    """Images as batches of inputs.

    Args:
        images: The files and their classes.
        classes: Names of the classes, in the order of the targets.
        load: From a path to the pixels, uint8 `(c, height, width)`.
        normalise: From pixels to inputs.
        side: Of the inputs in pixels.
        augment: What training does to the pixels. Default: None, nothing.
    """

    def __init__(
        self,
        images: Images,
        classes: Sequence[str],
        load: Decoded,
        normalise: Normalise,
        side: int,
        augment: Augmentation | None = None,
    ) -> None:
        self.images = images
        self.classes = classes
        self.load = load
        self.normalise = normalise
        self.side = side
        self.augment = augment

    def __len__(self) -> int:
        return len(self.images)

    def __getitems__(self, indices: Sequence[int]) -> Batch:
        if self.augment is None:
            pixels = [self._loaded(index) for index in indices]
        else:
            with own_draws():
                pixels = [self._augmented(index) for index in indices]
        inputs = self.normalise(torch.stack(pixels).numpy())
        return torch.from_numpy(inputs), torch.tensor([self.images.targets[index] for index in indices])

    def inputs(self, paths: Sequence[str | os.PathLike[str]]) -> torch.Tensor:
        """Images of any files, as an evaluation gives them to the model.

        Args:
            paths: Of the files, which are read anew.

        Returns:
            float32 `(len(paths), c, side, side)`: the middle squares, scaled and normalised.

        Raises:
            ArgumentError: A file cannot be read.
        """
        squares = [centre_square(self.load.anew(os.fspath(path)), self.side) for path in paths]
        return torch.from_numpy(self.normalise(torch.stack(squares).numpy()))

    def _augmented(self, index: int) -> torch.Tensor:
        assert self.augment is not None
        image = self._loaded(index)
        try:
            return centre_square(self.augment(image, index, self.epoch), self.side)
        except Exception as error:  # torchvision's
            raise _unchanged(image, self.images.paths[index], error) from error

    def _loaded(self, index: int) -> torch.Tensor:
        try:
            return self.load(self.images.paths[index])
        except UnreadableError as error:
            raise ArgumentError(
                f'an image cannot be read: {error}. Replace the file, or move it out of the folder and start again; '
                'check: true finds all such files before training.',
                'root',
            ) from error


class Room:
    """How many more bytes of images may be kept."""

    def __init__(self, left: int) -> None:
        self.left = self.size = left

    @property
    def used(self) -> int:
        return self.size - self.left


class Decoded:
    """Images by path, decoded once where there is room to keep them.

    A worker process keeps none: it ends with the epoch. It gets what was kept where it starts as a fork.

    Args:
        load: Decodes an image.
        room: Shared by all that keep images.
    """

    def __init__(self, load: Callable[[str], torch.Tensor], room: Room) -> None:
        self._load = load
        self._room = room
        self._kept: dict[str, torch.Tensor] = {}

    def __call__(self, path: str) -> torch.Tensor:
        image = self._kept.get(path)
        if image is None:
            image = self.anew(path)
            if image.nbytes <= self._room.left and get_worker_info() is None:
                self._kept[path] = image
                self._room.left -= image.nbytes
        return image

    def anew(self, path: str) -> torch.Tensor:
        """The image as the file has it now; it is not kept."""
        return self._load(path)

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), '_kept': {}}


def measured(images: Images, load: Callable[[str], torch.Tensor], root: str) -> Normalise:
    """The mean and the standard deviation of each channel, rounded to 4 decimals, over at most :data:`MEASURED` images.

    They are spread evenly over the list. The sums are whole numbers, so neither threads nor order change a bit.

    Raises:
        ArgumentError: An image cannot be read, or all pixels of a channel are equal.
    """
    count = min(MEASURED, len(images))
    total = squares = torch.zeros((), dtype=torch.int64)
    number = 0

    def add(path: str) -> None:
        nonlocal total, squares, number
        pixels = load(path).flatten(1).long()
        total, squares, number = total + pixels.sum(1), squares + pixels.square().sum(1), number + pixels.shape[1]

    check_all(add, [images.paths[index * len(images) // count] for index in range(count)], root)
    mean = total.double() / number
    std = (squares.double() / number - mean**2).clamp(min=0).sqrt()
    means, stds = (tuple(round(each / 255, 4) for each in values.tolist()) for values in (mean, std))
    if not all(stds):
        raise ArgumentError(
            f"normalize='data' divides by the standard deviations of the channels, which must be above 0, got {stds}. "
            "Pass normalize='none', or a mean and a standard deviation.",
            'normalize',
        )
    return Normalise(means, stds)


def try_out(augment: Augmentation, sizes: Iterable[Sequence[int]], channels: int, load_size: int | None) -> None:
    """Augments images of zeros, so that arguments that no image fits, or only a larger one, are errors at once.

    Args:
        augment: What to try.
        sizes: Height and width of each image.
        channels: Of each image.
        load_size: As for the data set.

    Raises:
        ArgumentError: A transform raises, or makes something else than an image with as many channels.
    """
    for height, width in sizes:
        image = torch.zeros(channels, height, width, dtype=torch.uint8)
        image = image if load_size is None else shrunk(image, load_size)
        with own_draws():
            try:
                made: Any = augment(image, 0, 0)
            except Exception as error:  # torchvision's
                raise _unchanged(image, 'the smallest image', error) from error
        if not isinstance(made, torch.Tensor) or made.dtype != torch.uint8 or made.shape[:-2] != image.shape[:1]:
            what = f'{made.dtype} {tuple(made.shape)}' if isinstance(made, torch.Tensor) else type(made).__name__
            raise ArgumentError(
                f'augment must make an image of an image, uint8 with {channels} channels, got {what}. Take other '
                'transforms, or change channels.',
                'augment',
            )


def _unchanged(image: torch.Tensor, what: str, error: Exception) -> ArgumentError:
    channels, height, width = image.shape
    return ArgumentError(
        f'augment cannot change {what}, got {channels} x {height} x {width}: {str(error).rstrip(".")}. Change its '
        'arguments, or put resize before what fails.',
        'augment',
    )
