"""What happens to a batch of images in memory before the model sees it: normalisation, random crops and mirroring."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

Array = np.ndarray[Any, np.dtype[Any]]


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
