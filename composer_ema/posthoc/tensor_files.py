"""Safetensors files written and read one tensor at a time, so that no file is ever in memory as a whole."""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import safetensors
import torch
from torch import Tensor

from composer_ema.checkpoints.checksum import CHECKSUM, ZEROS, in_header, is_sound
from composer_ema.checkpoints.safely import CheckpointError
from composer_ema.files import beside
from composer_ema.model.names import listed
from composer_ema.model.sharding import whole

_CODES = {
    torch.float64: 'F64', torch.float32: 'F32', torch.float16: 'F16', torch.bfloat16: 'BF16',
    torch.int64: 'I64', torch.int32: 'I32', torch.int16: 'I16', torch.int8: 'I8', torch.uint8: 'U8',
    torch.bool: 'BOOL', torch.float8_e4m3fn: 'F8_E4M3', torch.float8_e5m2: 'F8_E5M2',
}  # fmt: skip
_DTYPES = {code: dtype for dtype, code in _CODES.items()}
_METADATA = '__metadata__'


@dataclass(frozen=True)
class Entry:
    """A tensor to be written.

    Args:
        dtype: of the values in the file.
        shape: likewise.
        values: returns the whole tensor, on any device, when its turn comes. A collective call if it is sharded.
    """

    dtype: torch.dtype
    shape: tuple[int, ...]
    values: Callable[[], Tensor]

    @classmethod
    def of(cls, tensor: Tensor) -> Entry:
        """A tensor that is there already, or a sharded one, which is gathered when its turn comes."""
        return cls(tensor.dtype, tuple(tensor.shape), lambda: whole(tensor))

    @property
    def num_bytes(self) -> int:
        """Its size in the file."""
        return math.prod(self.shape) * self.dtype.itemsize


def check_writable(tensors: Mapping[str, Tensor], what: str) -> None:
    """Raises unless a safetensors file can hold every tensor.

    Raises:
        ValueError: a tensor is sparse, on the meta device, or of a dtype that the format lacks.
    """
    wrong = [
        f'{name} ({str(tensor.dtype).removeprefix("torch.")}, {str(tensor.layout).removeprefix("torch.")})'
        for name, tensor in tensors.items()
        if tensor.dtype not in _CODES or tensor.layout is not torch.strided or tensor.is_meta
    ]
    if wrong:
        raise ValueError(
            f'{what} cannot be written as safetensors, which hold dense tensors of common dtypes: {listed(wrong)}. '
            'Leave them out of the average with exclude.'
        )


def write(path: Path, entries: Mapping[str, Entry], metadata: Mapping[str, str]) -> None:
    """Writes a safetensors file beside ``path`` and renames it into place. Holds one tensor at a time.

    Args:
        path: of the file; its folder is made where it is missing.
        entries: name to tensor.
        metadata: further texts for the file's header.

    Raises:
        OSError: the file cannot be written. What was at ``path`` is untouched.
    """
    ordered = in_order(entries)
    header: dict[str, Any] = {_METADATA: {CHECKSUM: ZEROS, **metadata}}
    offset = 0
    for name, entry in ordered:
        end = offset + entry.num_bytes
        header[name] = {'dtype': _CODES[entry.dtype], 'shape': list(entry.shape), 'data_offsets': [offset, end]}
        offset = end
    encoded = json.dumps(header, separators=(',', ':')).encode()
    encoded += b' ' * (-len(encoded) % 8)
    with beside(path) as written, written.open('wb') as file:
        start = len(encoded).to_bytes(8, 'little') + encoded
        checksum = zlib.crc32(start)
        file.write(start)
        for _, entry in ordered:
            checksum = _append(file, entry, checksum)
        file.seek(start.index(in_header(ZEROS)))
        file.write(in_header(f'{checksum:08x}'))


def _append(file: BinaryIO, entry: Entry, checksum: int) -> int:
    """Writes the values of a tensor, lets go of them, and returns the checksum of the file so far."""
    values = entry.values().detach().to('cpu', entry.dtype).contiguous().reshape(-1)
    data = values.view(torch.uint8).numpy().data
    file.write(data)
    return zlib.crc32(data, checksum)


def in_order(entries: Mapping[str, Entry]) -> list[tuple[str, Entry]]:
    """The entries as they follow each other in a file, which is the order in which :func:`write` asks for values."""
    # Wide values first: every tensor then lies at a multiple of its own width, which readers in place rely on.
    return sorted(entries.items(), key=lambda pair: (-pair[1].dtype.itemsize, pair[0]))


class TensorFile:
    """A safetensors file, of which tensors are read when they are asked for.

    Args:
        path: of the file.

    Raises:
        CheckpointError: the file is missing, damaged or of another kind.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._file: Any = safetensors.safe_open(path, framework='pt')
            self.metadata: dict[str, str] = self._file.metadata() or {}
        except FileNotFoundError as error:
            raise CheckpointError(f'{path} does not exist.') from error
        except (OSError, safetensors.SafetensorError) as error:
            raise CheckpointError(f'{path} cannot be read: it is truncated or damaged ({error}).') from error

    def check(self) -> None:
        """Reads the whole file once and compares its checksum, where it has one.

        Raises:
            CheckpointError: it has changed since it was written.
        """
        if not is_sound(self.path, self.metadata):
            raise CheckpointError(
                f'{self.path} is damaged: it is not what was written, by its checksum. Move it out of the folder, or '
                'put a sound copy in its place.'
            )

    def names(self) -> list[str]:
        """The names of all tensors."""
        return list(self._file.keys())

    def outline(self, name: str) -> tuple[torch.dtype, tuple[int, ...]]:
        """The dtype and the shape of a tensor, without its values."""
        found = self._file.get_slice(name)
        return _DTYPES[found.get_dtype()], tuple(found.get_shape())

    def tensor(self, name: str) -> Tensor:
        """The values of a tensor, on the CPU."""
        return self._file.get_tensor(name)
