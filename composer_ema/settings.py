"""What the arguments of an average may be; each function returns a sound value or raises an error with the remedy."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor

BufferMode = Literal['average', 'copy']
Rounding = Literal['nearest', 'stochastic']
#: ``avg_fn(averaged, current, num_averaged)`` returns the new average of one tensor.
AvgFn = Callable[[Tensor, Tensor, Any], Tensor]
#: ``multi_avg_fn(averaged, current, num_averaged)`` writes the new averages of many tensors into ``averaged``.
MultiAvgFn = Callable[[list[Tensor], list[Tensor], Any], Any]


def check_buffer_mode(buffers: str) -> BufferMode:
    """Returns ``buffers`` or raises a ValueError."""
    if buffers == 'average' or buffers == 'copy':
        return buffers
    raise ValueError(f"buffers must be 'average' or 'copy', got {buffers!r}.")


def check_rounding(rounding: str, dtype: torch.dtype | None) -> Rounding:
    """Returns ``rounding`` or raises a ValueError; at random, only bfloat16 can be rounded."""
    if rounding not in ('nearest', 'stochastic'):
        raise ValueError(f"rounding must be 'nearest' or 'stochastic', got {rounding!r}.")
    if rounding == 'stochastic' and dtype is not torch.bfloat16:
        raise ValueError(
            f"rounding='stochastic' rounds a bfloat16 average, but its dtype is {dtype or 'that of the weights'}. "
            "Set the shadow's dtype to 'bfloat16', or leave rounding out."
        )
    return 'stochastic' if rounding == 'stochastic' else 'nearest'


def check_custom(
    avg_fn: AvgFn | None,
    multi_avg_fn: MultiAvgFn | None,
    *,
    skip_nonfinite: bool = False,
    rounding: str = 'nearest',
    backend: str = 'auto',
) -> None:
    """Raises unless at most one function is given, and then nothing that only the formula knows."""
    check_functions(avg_fn, multi_avg_fn)
    if avg_fn is None and multi_avg_fn is None:
        return
    without_effect = {
        f'skip_nonfinite={skip_nonfinite}': skip_nonfinite is not False,
        f'rounding={rounding!r}': rounding != 'nearest',
        f'backend={backend!r}': backend != 'auto',
    }
    for argument, is_given in without_effect.items():
        if is_given:
            raise ValueError(
                f'{argument} has no effect on an average by a function of yours. '
                'Leave it out, or do it in the function.'
            )


def check_flag(name: str, value: bool) -> bool:
    """Returns ``value`` or raises a TypeError: it is True or False."""
    if not isinstance(value, bool):
        raise TypeError(f'{name} must be True or False, got {value!r}.')
    return value


def check_seed(seed: int) -> int:
    """Returns ``seed`` or raises: it is a whole number in [0, 2**63)."""
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**63:
        raise ValueError(f'seed must be a whole number in [0, 2**63), got {seed!r}.')
    return seed


def parse_dtype(dtype: torch.dtype | str | None) -> torch.dtype | None:
    """A floating dtype from itself or its name, or None.

    Raises:
        ValueError: no floating dtype.
    """
    parsed = getattr(torch, dtype.removeprefix('torch.'), None) if isinstance(dtype, str) else dtype
    if parsed is None and dtype is None:
        return None
    if parsed not in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(f"the shadow's dtype must be float64, float32, bfloat16 or float16, got {dtype!r}.")
    return parsed


def parse_device(device: torch.device | str | None) -> torch.device | None:
    """A device from itself or its name, or None.

    Raises:
        ValueError: torch does not know the device.
    """
    if device is None:
        return None
    try:
        return torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"the shadow's device must be one such as 'cpu' or 'cuda:0', got {device!r}.") from error


def check_functions(avg_fn: AvgFn | None, multi_avg_fn: MultiAvgFn | None) -> None:
    """Raises unless at most one of the two is given, and is callable."""
    for name, function in (('avg_fn', avg_fn), ('multi_avg_fn', multi_avg_fn)):
        if function is not None and not callable(function):
            raise TypeError(
                f'{name} must be a function of averaged, current and num_averaged, got {function!r}. '
                'Pass for example torch.optim.swa_utils.get_ema_multi_avg_fn(0.999) as multi_avg_fn.'
            )
    if avg_fn is not None and multi_avg_fn is not None:
        raise ValueError('pass either avg_fn or multi_avg_fn, got both. multi_avg_fn is the faster one.')


def name_of(function: Callable[..., Any]) -> str:
    """A function's own name, for messages and for the record of a run."""
    return getattr(function, '__qualname__', None) or type(function).__qualname__
