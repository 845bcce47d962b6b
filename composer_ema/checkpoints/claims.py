"""How much memory the tensors of a file would take: a few bytes can describe tensors of terabytes, which something then
fills.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from composer_ema.checkpoints.safely import CheckpointError

# A weight may stand under many names, and a mask be one row that is repeated: this many times the file, and a little.
_TIMES, _ALWAYS = 128, 2**28


def check_claims(held: Any, path: Path, num_bytes: int) -> None:
    """Raises where the tensors in ``held``, each in full, take far more than the ``num_bytes`` that they were read of.

    Raises:
        CheckpointError: they do; the message names the largest.
    """
    claims = {name: claimed for name, tensor in tensors_in(held) if (claimed := _claimed(tensor))}
    total, most = sum(claims.values()), _TIMES * num_bytes + _ALWAYS
    if total > most:
        largest = max(claims, key=lambda name: claims[name])
        raise CheckpointError(
            f'{path} cannot be read: it has {num_bytes:,} bytes and its tensors would take {total:,}, '
            f'{claims[largest]:,} of them {largest}. Values that are repeated take their full size: at most {most:,} '
            'is read of such a file. Save tensors that were expanded as they were before.'
        )


def tensors_in(held: Any) -> Iterator[tuple[str, Tensor]]:
    """Every tensor in nested dictionaries, lists and tuples, by the last of its keys."""
    waiting: list[tuple[str, Any]] = [('', held)]
    seen = set()
    while waiting:
        name, value = waiting.pop()
        if isinstance(value, Tensor):
            yield name, value
        elif isinstance(value, Mapping | list | tuple) and id(value) not in seen:  # a file may hold what holds itself
            seen.add(id(value))
            items = value.items() if isinstance(value, Mapping) else ((name, each) for each in value)
            waiting += [(str(key) if isinstance(key, str | int) else name, each) for key, each in items]


def _claimed(tensor: Tensor) -> int:
    """The bytes that a tensor takes when it is written out in full; none for one that stands in full in its storage."""
    if tensor.layout is not torch.strided:
        return 0  # its parts are dense tensors of the file
    return tensor.numel() * tensor.dtype.itemsize
