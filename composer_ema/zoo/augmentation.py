"""Augmentation of images by the v2 transforms of torchvision that a recipe names; no draw depends on global state."""

from __future__ import annotations

import contextlib
import enum
import functools
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torchvision.transforms import v2

from composer_ema.spans import ArgumentError
from composer_ema.wording import snake_case, squash, suggestion

_OF_CONVERSION = 'Leave it out: images are converted before and after.'
#: Transforms of torchvision that do not turn one image into one image, and what does that in a recipe.
_OTHERS = {
    **dict.fromkeys(('cut_mix', 'mix_up'), 'It mixes a batch. Use the algorithm cutmix or mixup of Composer.'),
    'normalize': 'Use normalize of the data set.',
    **dict.fromkeys(
        ('convert_image_dtype', 'pil_to_tensor', 'to_dtype', 'to_image', 'to_pil_image', 'to_pure_tensor', 'to_tensor'),
        _OF_CONVERSION,
    ),
    **dict.fromkeys(('five_crop', 'ten_crop'), 'It makes several images of one.'),
    **dict.fromkeys(('lambda', 'linear_transformation'), 'Its arguments cannot be written in YAML.'),
    'compose': 'Write a list.',
    'transform': 'It is the base of all.',
    **dict.fromkeys(
        (
            'clamp_bounding_boxes',
            'clamp_key_points',
            'convert_bounding_box_format',
            'random_io_u_crop',
            'sanitize_bounding_boxes',
            'sanitize_key_points',
            'set_clamping_mode',
            'uniform_temporal_subsample',
        ),
        'It is for boxes, points or videos.',
    ),
}
_EXAMPLE = 'augment: {random_resized_crop: {size: 64}, random_horizontal_flip: {}}'


class Augmentation:
    """Applies transforms to one image; the draw for a sample is a function of seed, epoch and sample index.

    torchvision draws from torch's global generator, so calls go between ``with own_draws():``.

    Args:
        transform: From a uint8 image `(c, height, width)` to another.
        seed: Seed of all draws.
    """

    def __init__(self, transform: Callable[[torch.Tensor], torch.Tensor], seed: int) -> None:
        self.transform = transform
        self.seed = seed

    def __call__(self, image: torch.Tensor, sample: int, epoch: int) -> torch.Tensor:
        """Maps uint8 `(c, height, width)` to uint8 `(c, height, width)`, perhaps of another size."""
        # The generator of the CPU takes 32 bits of a seed.
        (seed,) = np.random.SeedSequence((self.seed, epoch, sample)).generate_state(1)
        torch.default_generator.manual_seed(int(seed))  # torch.manual_seed would seed the GPU, too
        return self.transform(image)


@contextlib.contextmanager
def own_draws() -> Iterator[None]:
    """Puts torch's global generator back at the end. Computes in one thread: several add a mean up in another order."""
    threads = torch.get_num_threads()
    with torch.random.fork_rng(devices=[]):
        try:
            if threads > 1:
                torch.set_num_threads(1)
            yield
        finally:
            if threads > 1:
                torch.set_num_threads(threads)


def read(asked: object) -> Callable[[torch.Tensor], torch.Tensor]:
    """The transforms that a recipe asks for, as one.

    Args:
        asked: Names with their arguments in order, as in ``{'random_crop': {'size': 32}, 'random_horizontal_flip':
            {}}``, or a list of such mappings and names. Names are those of ``torchvision.transforms.v2``; case, ``_``
            and ``-`` make no difference. Interpolations and policies are given by their values, as in ``'bicubic'``;
            ``transforms`` of ``random_apply``, ``random_choice`` and ``random_order`` is a list like this one.

    Raises:
        ArgumentError: Another kind of value, a name that is none, or arguments that the transform refuses.
    """
    transforms = [_built(name, arguments) for name, arguments in _entries(asked)]
    return transforms[0] if len(transforms) == 1 else v2.Compose(transforms)


@functools.cache
def offered() -> dict[str, type]:
    """The transforms that recipes can name."""
    public = {name: getattr(v2, name) for name in dir(v2) if not name.startswith('_')}
    found = {name: each for name, each in public.items() if isinstance(each, type) and issubclass(each, v2.Transform)}
    return {snake_case(name): each for name, each in found.items() if snake_case(name) not in _OTHERS}


def _entries(asked: object) -> Iterator[tuple[str, Any]]:
    entries = [asked] if isinstance(asked, Mapping) else asked
    if not isinstance(entries, Sequence) or isinstance(entries, str) or not entries:
        raise _refused(f'must hold transforms with their arguments, got {asked!r}. Write {_EXAMPLE}, or leave it out.')
    for entry in entries:
        if isinstance(entry, str):
            yield entry, {}
        elif isinstance(entry, Mapping) and entry:
            yield from entry.items()
        else:
            raise _refused(f'must list names, or names with arguments, got {entry!r}. Write {_EXAMPLE}.')


def _built(name: str, arguments: object) -> Callable[[torch.Tensor], torch.Tensor]:
    legal = {squash(each): each for each in offered()}
    canonical = legal.get(squash(str(name)))
    if canonical is None:
        aside = {squash(each): why for each, why in _OTHERS.items()}.get(squash(str(name)))
        if aside is not None:
            raise _refused(f'cannot use {name}, got {name!r}. {aside}')
        remedy = suggestion(name, offered())
        raise _refused(f'must name a transform of torchvision, got {name!r}. {remedy}')
    arguments = {} if arguments is None else arguments
    if not isinstance(arguments, Mapping):
        raise _refused(f'must give {canonical} a mapping of arguments, got {arguments!r}. Write {canonical}: {{}}.')
    parameters = inspect.signature(offered()[canonical]).parameters
    for key in arguments:
        if key not in parameters:
            remedy = suggestion(key, parameters, 'It takes')
            raise _refused(f'must give {canonical} an argument that it has, got {key!r}. {remedy}')
    missing = [key for key, each in parameters.items() if each.default is each.empty and key not in arguments]
    if missing:
        raise _refused(f'must give {canonical} its {", ".join(missing)}, got {dict(arguments)!r}.')
    converted = {key: _converted(key, value, parameters[key]) for key, value in arguments.items()}
    try:
        return offered()[canonical](**converted)
    except Exception as error:  # torchvision compares and calls whatever it gets
        raise _refused(
            f'must give {canonical} what it takes, got {dict(arguments)!r}: {str(error).rstrip(".")}.'
        ) from error


def _converted(key: str, value: Any, parameter: inspect.Parameter) -> Any:
    if key == 'transforms':
        return [_built(name, arguments) for name, arguments in _entries(value)]
    kind = type(parameter.default)
    if isinstance(value, str) and issubclass(kind, enum.Enum) and not isinstance(parameter.default, str):
        legal = {member.value: member for member in kind}
        if value not in legal:
            raise _refused(f'must give {key} one of {", ".join(legal)}, got {value!r}.')
        return legal[value]
    return value


def _refused(message: str) -> ArgumentError:
    return ArgumentError(f'augment {message}', 'augment')
