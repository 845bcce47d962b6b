"""Image files as uint8 tensors, by one rule for every kind of file; what cannot be read is named."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import TypeVar

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torchvision.transforms.v2 import functional

from composer_ema.spans import ArgumentError
from composer_ema.wording import counted
from composer_ema.zoo.image_files import LISTED

#: Pillow's mode by the number of channels.
MODES = {1: 'L', 3: 'RGB', 4: 'RGBA'}
_Read = TypeVar('_Read')


class UnreadableError(ArgumentError):
    """An image file that cannot be read, by its path and the reason."""


def check_headers(paths: Sequence[str], root: str) -> list[tuple[int, int]]:
    """Height and width of images as the files store them, from their headers alone.

    Raises:
        ArgumentError: Files have no header of an image; the message names them.
    """

    found: list[tuple[int, int]] = []
    check_all(lambda path: found.append(_opened(path, lambda image: (image.height, image.width))), paths, root)
    return found


def check_all(read: Callable[[str], object], paths: Sequence[str], root: str) -> None:
    """Calls a function that reads a file with each path.

    Raises:
        ArgumentError: It has raised an UnreadableError for some; the message names them.
    """
    errors: list[UnreadableError] = []
    for path in paths:
        try:
            read(path)
        except UnreadableError as error:
            errors.append(error)
    if errors:
        more = f'; and {len(errors) - LISTED:,} more' if len(errors) > LISTED else ''
        raise ArgumentError(
            f'{len(errors):,} of {counted(len(paths), "image")} in {root!r} cannot be read: '
            f'{"; ".join(map(str, errors[:LISTED]))}{more}. Replace these files, or move them out of the folder.',
            'root',
        )


def decode(path: str, channels: int, *, at_least: int | None = None) -> torch.Tensor:
    """The pixels of an image, uint8 `(channels, height, width)`.

    The image is turned as its EXIF orientation says. Grey values of 16 bits are divided by 257. Then Pillow converts it
    to grey, RGB or RGBA; without the fourth channel, transparency is dropped. Of several frames the first counts.

    Args:
        path: The file.
        channels: 1, 3 or 4.
        at_least: A JPEG may come at a half, a quarter or an eighth of its size where both sides keep at least as many
            pixels; the decoder then has less to do. Default: None, always at its size.

    Raises:
        UnreadableError: The file is no image, or is damaged, or holds values without a range.
    """

    def read(image: Image.Image) -> torch.Tensor:
        if at_least is not None:
            image.draft(None, (at_least, at_least))  # pyright: ignore[reportArgumentType]: None keeps the mode
        turned = ImageOps.exif_transpose(image)
        return functional.pil_to_tensor(_converted(turned, MODES[channels]))

    return _opened(path, read)


def centre_square(image: torch.Tensor, side: int) -> torch.Tensor:
    """The middle of an image, as large as its shorter side allows, scaled to ``side``; uint8 `(c, side, side)`.

    The same part as after resizing the shorter side and cropping the centre, without the work for the rest.
    """
    shorter = min(image.shape[-2:])
    return _scaled(functional.center_crop(image, [shorter, shorter]), side)


def shrunk(image: torch.Tensor, side: int) -> torch.Tensor:
    """An image whose shorter side has at most ``side`` pixels."""
    return image if min(image.shape[-2:]) <= side else _scaled(image, side)


def _scaled(image: torch.Tensor, side: int) -> torch.Tensor:
    if min(image.shape[-2:]) == side:
        return image
    return functional.resize(image, [side], antialias=True)


def _opened(path: str, read: Callable[[Image.Image], _Read]) -> _Read:
    try:
        if os.path.exists(path) and not os.path.isfile(path):
            raise ValueError('it is no regular file')  # of a pipe, open() would wait for a writer
        with open(path, 'rb') as file, Image.open(file) as image:
            return read(image)
    except UnreadableError:
        raise
    except Exception as error:  # decoders raise OSError, SyntaxError, struct.error and others
        raise UnreadableError(f'{path} ({_reason(path, error)})', 'root') from error


def _reason(path: str, error: Exception) -> str:
    if isinstance(error, UnidentifiedImageError):
        with open(path, 'rb') as file:
            return 'no image of a known format' if file.read(1) else 'the file is empty'
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return str(error) or type(error).__name__


def _converted(image: Image.Image, mode: str) -> Image.Image:
    if image.mode.startswith('I'):
        image = _of_16_bits(image)
    elif image.mode == 'F':
        raise ValueError('its values are floating-point numbers, which have no fixed range: save it with 8 or 16 bits')
    elif image.mode in ('P', 'PA') and mode != 'RGBA' and 'transparency' in image.info:
        image = image.convert('RGBA')  # or Pillow warns
    return image.convert(mode)


def _of_16_bits(image: Image.Image) -> Image.Image:
    """Grey values in [0, 65535] as 8 bits; Pillow's own conversion would cut all above 255 off."""
    values = np.asarray(image).astype(np.int64)
    if values.min() < 0 or values.max() > 65535:
        raise ValueError('its values do not lie in [0, 65535]: save it with 8 or 16 bits')
    return Image.fromarray(((values + 128) // 257).astype(np.uint8))
