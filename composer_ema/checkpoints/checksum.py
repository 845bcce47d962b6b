"""The checksum in a safetensors file of ours, whose format has none: CRC-32 of the file with zeros in its place."""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from pathlib import Path

#: The name of the checksum among the texts of a file, and what stands there while it is computed.
CHECKSUM, ZEROS = 'crc32', '00000000'
_AT_ONCE = 2**22


def is_sound(path: Path, metadata: Mapping[str, str]) -> bool:
    """Whether a file is what was written, by its checksum; True for a file without one. Reads the whole file.

    Args:
        path: of the file.
        metadata: the texts in its header.
    """
    written = metadata.get(CHECKSUM)
    return written is None or f'{_sum(path, written):08x}' == written


def seal(path: Path) -> None:
    """Writes the checksum into a file whose header has :data:`ZEROS` for it."""
    found = _sum(path, ZEROS)
    with path.open('r+b') as file:
        length = file.read(8)
        at = 8 + file.read(int.from_bytes(length, 'little')).index(in_header(ZEROS))
        file.seek(at)
        file.write(in_header(f'{found:08x}'))


def in_header(checksum: str) -> bytes:
    """How it stands in the header of a file."""
    return f'"{CHECKSUM}":"{checksum}"'.encode()


def _sum(path: Path, written: str) -> int:
    with path.open('rb') as file:
        length = file.read(8)
        header = file.read(int.from_bytes(length, 'little'))
        found = zlib.crc32(length + header.replace(in_header(written), in_header(ZEROS), 1))
        while data := file.read(_AT_ONCE):
            found = zlib.crc32(data, found)
    return found
