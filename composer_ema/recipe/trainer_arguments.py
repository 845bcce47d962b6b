"""What a recipe gives to the Trainer, checked before anything is built: Composer checks it late, or not at all."""

from __future__ import annotations

import logging
import math
from collections.abc import Collection, Mapping
from typing import Any

import torch
from composer import Trainer
from composer.core import TimeUnit, ensure_time
from composer.devices import Device, DeviceCPU

from composer_ema.recipe import names, parallelism, times
from composer_ema.recipe.arguments import Place, check_arguments, said, signature

# Trainer arguments that a section of the recipe stands for.
_BUILT_FROM_SECTIONS = frozenset(
    ('model', 'train_dataloader', 'eval_dataloader', 'algorithms', 'optimizers', 'schedulers', 'callbacks', 'loggers')
)
_LARGEST_SEED = 2**31 - 1
#: What to write for none.
_NONE = {
    'eval_subset_num_batches': ' To evaluate nothing, write evaluate: [].',
    'save_num_checkpoints_to_keep': ' To save nothing, write save_folder: null.',
}


def legal_names() -> set[str]:
    """The Trainer's arguments that a recipe may give."""
    return signature(Trainer).keys() - _BUILT_FROM_SECTIONS


def read(values: Mapping[str, Any], evaluate: Collection[str], place: Place, *, has_tokens: bool) -> dict[str, Any]:
    """The arguments for the Trainer among the keys of a recipe.

    Args:
        values: The recipe.
        evaluate: The weights that the run evaluates, ``['training', 'ema']``.
        place: The file.
        has_tokens: Whether the data set counts tokens.

    Raises:
        RecipeError: A value of the wrong kind, or one with which the run would fail, hang or do nothing.
    """
    legal = legal_names()
    arguments = {key: value for key, value in values.items() if key in legal}
    if arguments.get('max_duration') is None:
        raise (place / 'max_duration').error('is missing. Say how long to train, as in max_duration: 6ep.')
    own = {key: value for key, value in arguments.items() if key != parallelism.KEY}  # which has a check of its own
    check_arguments(Trainer, own, place, given={*_BUILT_FROM_SECTIONS, parallelism.KEY})
    times.check_length(arguments['max_duration'], place / 'max_duration', has_tokens=has_tokens)
    rest = {key: value for key, value in own.items() if key != 'max_duration'}
    times.check(Trainer, rest, place, has_tokens=has_tokens)
    names.check_paths(own, place)
    _check_console(own, place)
    _check_numbers(own, place, has_tokens=has_tokens)
    if own.get('compile_config') is not None:
        _check_compile(own['compile_config'], place / 'compile_config')
    if (label := own.get('train_dataloader_label')) in [f'eval_{weights}' for weights in evaluate]:
        raise (place / 'train_dataloader_label').error(
            f'{label!r} is what an evaluation is called, whose metrics would be mixed with those of training. Write '
            'another, or leave it out.'
        )
    return arguments


def check_device(given: Mapping[str, Any], device: Device, place: Place) -> None:
    """Refuses what the device of the run cannot do.

    Raises:
        RecipeError: A precision that it does not compute in, or a search for the batch that fits a GPU, without one.
    """
    if not isinstance(device, DeviceCPU):
        return
    precision = given.get('precision')
    if precision not in (None, 'fp32'):
        raise (place / 'precision').error(f'{precision} needs a GPU, and this run has none. Write fp32.')
    if given.get('device_train_microbatch_size') == 'auto':
        raise (place / 'device_train_microbatch_size').error(
            'auto needs a GPU, and this run has none. Write a number of samples, or leave it out for the whole batch.'
        )


def _check_compile(config: Any, place: Place) -> None:
    """Lets torch check how to compile: it looks at a mode and a backend at once, and compiles only what is called."""
    check_arguments(torch.compile, config, place, given=('model',))
    try:
        torch.compile(torch.nn.Identity(), **config)
    except (RuntimeError, ValueError, TypeError, AttributeError) as error:
        raise place.error(f'torch.compile refuses {config}: {said(error)}.') from error


def _check_numbers(given: Mapping[str, Any], place: Place, *, has_tokens: bool) -> None:
    seed = given.get('seed')
    if seed is not None and not 0 <= seed <= _LARGEST_SEED:
        raise (place / 'seed').error(f'must be a whole number from 0 to {_LARGEST_SEED}, got {seed}. Write 1.')
    for key in ('train_subset_num_batches', 'eval_subset_num_batches', 'save_num_checkpoints_to_keep'):
        value = given.get(key, -1)
        if value != -1 and value < 1:
            raise (place / key).error(f'must be at least 1, or -1 for all, got {value}.{_NONE.get(key, "")}')
    timeout = given.get('dist_timeout')
    if timeout is not None and not 0 < timeout < math.inf:
        raise (place / 'dist_timeout').error(f'must be a number of seconds above 0, got {timeout}. Write 300.')
    ratio = given.get('scale_schedule_ratio', 1)
    if ratio != 1:
        raise (place / 'scale_schedule_ratio').error(
            f'{ratio} makes the run another length than max_duration says. Leave it out, and multiply max_duration and '
            'the times of the scheduler.'
        )
    microbatch = given.get('device_train_microbatch_size')
    is_whole = isinstance(microbatch, int) and microbatch >= 1
    if microbatch not in (None, 'auto') and not is_whole:
        raise (place / 'device_train_microbatch_size').error(
            f'must be a whole number of samples of at least 1, or auto on a GPU, got {microbatch!r}. Leave it out for '
            'the whole batch.'
        )
    if given.get('accumulate_train_batch_on_tokens') and not has_tokens:
        raise (place / 'accumulate_train_batch_on_tokens').error(
            'true weighs by tokens, and the data set of this recipe reports none. Leave it out.'
        )


def _check_console(given: Mapping[str, Any], place: Place) -> None:
    stream = given.get('console_stream', 'stderr')
    if stream not in ('stdout', 'stderr'):
        raise (place / 'console_stream').error(f'must be stdout or stderr, got {stream!r}. Write stderr.')
    interval = given.get('console_log_interval', '1ba')
    if ensure_time(interval, TimeUnit.EPOCH).unit not in (TimeUnit.EPOCH, TimeUnit.BATCH):
        raise (place / 'console_log_interval').error(f'must be in epochs or batches, got {interval!r}. Write 10ba.')
    level = given.get('python_log_level')
    if level is not None and not isinstance(logging.getLevelName(level.upper()), int):
        raise (place / 'python_log_level').error(
            f'must be one of debug, info, warning, error, got {level!r}. Write info.'
        )
