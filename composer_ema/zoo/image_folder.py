"""The data set of a folder of images: decoded, augmented and normalised in batches, and told before training."""

from __future__ import annotations

import functools
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from composer_ema.spans import ArgumentError
from composer_ema.wording import counted
from composer_ema.zoo import augmentation, image_files
from composer_ema.zoo.augmentation import Augmentation
from composer_ema.zoo.checks import check_whole
from composer_ema.zoo.dataset import TEST_SET, Batching, Data, dataset
from composer_ema.zoo.image_batches import MEASURED, Decoded, ImageBatches, Room, measured, try_out
from composer_ema.zoo.image_files import Found, Images
from composer_ema.zoo.image_reading import MODES, centre_square, check_all, check_headers, decode, shrunk
from composer_ema.zoo.loading import loader
from composer_ema.zoo.transforms import Normalise

#: Bytes of decoded images that are kept in memory; sets of no more pixels are decoded before training.
MOST_BYTES = 2**30
#: How many classes are listed with their numbers of images.
MOST_CLASSES = 20
IMAGENET = Normalise((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


def _found(given: Mapping[str, Any]) -> Found:
    return image_files.find(
        given['root'], validation_split=given['validation_split'], evaluation_folder=given['evaluation_folder']
    )


def _evaluation_set(given: Mapping[str, Any]) -> str:
    evaluated = _found(given).evaluated
    return TEST_SET if evaluated in (None, 'test') else f'{evaluated}/'


@dataset(
    samples=lambda given: len(_found(given).train),
    classes=lambda given: len(_found(given).classes),
    evaluation=_evaluation_set,
)
def image_folder(
    *,
    root: str | None = None,
    image_size: int = 224,
    channels: int = 3,
    augment: Mapping[str, Any] | Sequence[Any] | None = None,
    normalize: str | Sequence[float | Sequence[float]] | Mapping[str, float | Sequence[float]] | None = 'data',
    load_size: int | None = None,
    evaluation_folder: str | None = None,
    check: bool | None = None,
    batch_size: int = 64,
    eval_batch_size: int = 64,
    validation_split: float = 0.0,
    drop_last: bool = False,
    num_workers: int = 0,
    seed: int = 0,
) -> Data:
    """Images of your own, in `root/train/<class>/` and `root/val/<class>/`, or in `root/<class>/`.

    Classes are numbered in the order of their names. Evaluation sees the middle square of each image, scaled to
    `image_size`. Training sees the same, or what `augment` makes of the whole image, cut and scaled likewise unless it
    has that size. Inputs are `(pixel / 255 - mean) / std`, float32 `(n, channels, image_size, image_size)`.

    With up to 1 GiB of pixels, all images are decoded before training, which finds damaged ones, and kept in memory.
    Of larger sets the headers are read. Such images are decoded when they are needed; 1 GiB of them is kept, but not
    by worker processes.

    Args:
        root: The folder, which must be given. Beside `train/` it has `val/`, `validation/`, `valid/` or `test/`, with
            the same classes.
        image_size: Side of the inputs in pixels, at least 1.
        channels: 1, 3 or 4: grey, RGB, or RGB and transparency, to which every image is converted.
        augment: Transforms of `torchvision.transforms.v2` with their arguments, applied to training images in order;
            see `augmentation.read`. The draw is a function of seed, epoch and sample alone.
        normalize: `'data'` for the mean and the standard deviation of each channel over the middle squares of up to
            1,000 training images, spread evenly over the sorted files and rounded to 4 decimals; `'imagenet'`; a mean
            and a standard deviation for pixels in [0, 1], a number or one per channel each; or `'none'` for 0 and 1.
        load_size: Images with a longer shorter side are scaled to this one, in pixels, before `augment`. More
            of them then fit into memory, and photos of many megapixels are decoded faster. Default: None, their size.
        evaluation_folder: The folder in `root` to evaluate on. Default: the first of the four that is there.
        check: True decodes all images before training, however many there are; False reads none. Default: None, as
            above.
        batch_size: Samples per training step over all processes; a multiple of their number.
        eval_batch_size: The same for evaluation.
        validation_split: Share of the training images held out for evaluation, in [0, 1), the same of each class;
            needed without `train/`. Which ones are held out depends on the files and the share alone.
        drop_last: Whether an uneven last training batch is dropped.
        num_workers: Worker processes per loader.
        seed: Seed of the order of training and of the augmentation, at least 0.

    Returns:
        The loaders, and remarks that say what was found.

    Raises:
        ValueError: An argument is out of range, the folder has another layout, or images cannot be read.
    """
    batching = Batching(batch_size, eval_batch_size, validation_split, drop_last, num_workers, seed)
    check_whole('image_size', image_size, 1, 'Pass the side of the inputs in pixels, for example 64.')
    if channels not in MODES:
        raise ArgumentError(f'channels must be 1, 3 or 4, got {channels!r}. Pass 3 for RGB, 1 for grey.', 'channels')
    if load_size is not None:
        check_whole('load_size', load_size, image_size, 'It counts pixels, and inputs have image_size of them.')
    given = _given(normalize, channels)
    transform = None if augment is None else Augmentation(augmentation.read(augment), seed)

    root, found = (
        str(root),
        image_files.find(root, validation_split=validation_split, evaluation_folder=evaluation_folder),
    )
    train, evaluation = found.train, found.evaluation
    if validation_split > 0:
        train, evaluation = found.held_out(batching.count_held_out(len(train)))
    batching.check_last_batch(len(train))

    load_square = functools.partial(_square, channels=channels, side=image_size)
    load_whole = functools.partial(_whole, channels=channels, shorter_side=load_size)
    room = Room(MOST_BYTES)
    squares = Decoded(load_square, room)
    wholes = squares if transform is None else Decoded(load_whole, room)
    sizes = [] if check is False else check_headers([*train.paths, *evaluation.paths], root)
    are_few = bool(sizes) and channels * sum(map(math.prod, sizes)) <= MOST_BYTES
    if check or are_few:
        loads = {**dict.fromkeys(train.paths, wholes), **dict.fromkeys(evaluation.paths, squares)}
        check_all(lambda path: loads[path](path), list(loads), root)
    if transform is not None:
        lowest_and_narrowest = [min(sizes), min(sizes, key=lambda each: each[::-1])] if sizes else []
        try_out(transform, lowest_and_narrowest or [tuple(wholes(train.paths[0]).shape[-2:])], channels, load_size)
    # The squares of training images that are augmented are not needed again.
    normalise = given or measured(train, squares if transform is None else load_square, root)
    train_set = ImageBatches(train, found.classes, wholes, normalise, image_size, transform)
    evaluation_set = ImageBatches(evaluation, found.classes, squares, normalise, image_size)
    return Data(
        train=loader(batching, train_set, batch_size, is_training=True),
        evaluation=loader(batching, evaluation_set, eval_batch_size, is_training=False),
        num_classes=len(found.classes),
        input_shape=(channels, image_size, image_size),
        remarks=[
            *_of_classes(found, train, evaluation),
            *_of_sizes(sizes, is_decoded=bool(check or are_few), room=room),
            _of_inputs(normalise, image_size, None if given else min(MEASURED, len(train)), len(train)),
        ],
    )


def _square(path: str, *, channels: int, side: int) -> torch.Tensor:
    return centre_square(decode(path, channels, at_least=2 * side), side)


def _whole(path: str, *, channels: int, shorter_side: int | None) -> torch.Tensor:
    if shorter_side is None:
        return decode(path, channels)
    return shrunk(decode(path, channels, at_least=2 * shorter_side), shorter_side)


def _given(normalize: object, channels: int) -> Normalise | None:
    """What is asked of the inputs; None where the images tell it."""
    if normalize == 'data':
        return None
    if normalize in (None, 'none'):
        return Normalise((0.0,) * channels, (1.0,) * channels)
    if normalize == 'imagenet':
        if channels != 3:
            raise ArgumentError(
                f"normalize='imagenet' is for 3 channels, got {channels}. Pass 'data', or a mean and a standard "
                'deviation.',
                'normalize',
            )
        return IMAGENET
    pair: Any = normalize
    if isinstance(normalize, Mapping) and set(normalize) == {'mean', 'std'}:
        pair = normalize['mean'], normalize['std']
    if isinstance(pair, Sequence) and not isinstance(pair, str) and len(pair) == 2:
        mean, std = (_per_channel(each, channels) for each in pair)
        if mean is not None and std is not None and all(each > 0 for each in std):
            return Normalise(mean, std)
    raise ArgumentError(
        f"normalize must be 'data', 'imagenet', 'none', or a mean and a standard deviation above 0, each a number or "
        f'{counted(channels, "number")}, got {normalize!r}. Write normalize: {{mean: 0.5, std: 0.25}}.',
        'normalize',
    )


def _per_channel(value: Any, channels: int) -> tuple[float, ...] | None:
    values = value if isinstance(value, Sequence) and not isinstance(value, str) else [value] * channels
    are_numbers = all(
        isinstance(each, int | float) and not isinstance(each, bool) and math.isfinite(each) for each in values
    )
    return tuple(map(float, values)) if are_numbers and len(values) == channels else None


def _of_classes(found: Found, train: Images, evaluation: Images) -> Iterator[str]:
    where = 'held out of the training images' if found.evaluated is None else f'in {found.evaluated}/'
    trained, evaluated = Counter(train.targets), Counter(evaluation.targets)
    yield (
        f'images: {counted(len(found.classes), "class")}, {counted(len(train), "training image")}, '
        f'{counted(len(evaluation), "evaluation image")} {where}'
    )
    numbers = [(trained[index], name) for index, name in enumerate(found.classes)]
    if len(numbers) <= MOST_CLASSES:
        listed = ', '.join(f'{name} {count:,} + {evaluated[index]:,}' for index, (count, name) in enumerate(numbers))
        yield f'classes, training + evaluation: {listed}'
    else:
        least, most = min(numbers), max(numbers)
        yield f'classes: from {least[0]:,} training images ({least[1]}) to {most[0]:,} ({most[1]})'
    if missing := [name for index, name in enumerate(found.classes) if not evaluated[index]]:
        yield f'without an evaluation image: {image_files.named(missing)}'
    if found.left_out:
        yield f'left out, since no image ends so: {image_files.by_number(found.left_out)}'


def _of_sizes(sizes: Sequence[tuple[int, int]], *, is_decoded: bool, room: Room) -> Iterator[str]:
    if not sizes:
        yield 'image sizes: not looked at, as check: false says'
        return
    smallest, largest = (pick(sizes, key=math.prod) for pick in (min, max))
    span = _in_words(smallest) + (f' to {_in_words(largest)}' if smallest != largest else '')
    if is_decoded:
        how = f'all decoded, {room.used / 2**20:,.1f} MiB kept in memory'
    else:
        how = 'only their headers were read; check: true decodes all before training'
    yield f'image sizes, height x width: {span}; {how}'


def _of_inputs(normalise: Normalise, side: int, measured: int | None, total: int) -> str:
    whose = ''
    if measured is not None:
        whose = f', measured on {"all" if measured == total else f"{measured:,} of the"} training images'
    mean, std = list(normalise.mean), list(normalise.std)
    return f'inputs: {len(mean)} x {side} x {side}, mean {mean} and std {std}{whose}'


def _in_words(size: Sequence[int]) -> str:
    return ' x '.join(map(str, size))
