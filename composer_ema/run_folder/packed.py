"""Checkpoints that Composer packed into a tar file or compressed: unpacked elsewhere, to be looked at and loaded."""

from __future__ import annotations

import contextlib
import shutil
import subprocess
import tarfile
import tempfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from composer.utils import dist
from composer.utils.compression import CompressorNotFound, get_compressor, is_compressed_pt
from composer.utils.file_helpers import is_tar

from composer_ema.checkpoints.safely import CheckpointError

_IN_TAR = 'composer_states.pt'


def is_packed(path: Path) -> bool:
    """Whether Composer unpacks a file of this name before it reads it."""
    return is_tar(path) or is_compressed_pt(str(path))


@contextlib.contextmanager
def unpacked(path: Path) -> Iterator[Path]:
    """Lends the file that Composer would load: ``path`` itself, or what is packed in it, in a temporary folder.

    Raises:
        CheckpointError: It is damaged, or of another kind than its name says, or would be unpacked beside its folder.
    """
    if not is_packed(path):
        yield path
        return
    with tempfile.TemporaryDirectory() as folder:
        inside = Path(folder) / _IN_TAR
        (_untar if is_tar(path) else _decompress)(path, inside)
        yield inside


@contextlib.contextmanager
def decompressed(path: str) -> Iterator[str]:
    """Lends a checkpoint for Composer to load: a compressed one decompressed, in a temporary folder of each machine.

    Composer would decompress it beside itself, over whatever has the name without the ending, and in every process.
    """
    if '://' in path or is_tar(path) or not is_compressed_pt(path):
        yield path
        return
    is_first = dist.get_local_rank() == 0
    with tempfile.TemporaryDirectory() if is_first else contextlib.nullcontext() as own:
        folder = dist.all_gather_object(own)[dist.get_global_rank() - dist.get_local_rank()]
        inside = Path(str(folder), _IN_TAR)
        if is_first:
            _decompress(Path(path), inside)
        dist.barrier()
        yield str(inside)


def _untar(path: Path, inside: Path) -> None:
    try:
        with tarfile.open(path) as archive:
            members = archive.getmembers()
            for each in members:
                where = PurePosixPath(each.name)
                if where.is_absolute() or '..' in where.parts or not (each.isfile() or each.isdir()):
                    raise CheckpointError(
                        f'{path} holds {each.name!r}, which Composer would unpack to another place. It was not saved '
                        'by Composer.'
                    )
            found = next((each for each in members if PurePosixPath(each.name) == PurePosixPath(_IN_TAR)), None)
            held = None if found is None else archive.extractfile(found)
            if held is None:
                raise CheckpointError(f'{path} is a tar file without {_IN_TAR}, and so no checkpoint of Composer.')
            with inside.open('wb') as file:
                shutil.copyfileobj(held, file)
    except CheckpointError:
        raise
    # A damaged archive fails in as many ways as there are bytes in it; all of them mean the same to the user.
    except Exception as error:
        raise CheckpointError(f'{path} is no tar file, or a damaged one: {error}.') from error


def _decompress(path: Path, inside: Path) -> None:
    try:
        compressor = get_compressor(str(path))
        compressor.check_exists()
    except CompressorNotFound as error:
        raise CheckpointError(
            f'{path} has the name of a compressed checkpoint, and there is nothing to decompress it with: {error} '
            'Decompress it, or rename it.'
        ) from error
    # Not by its name: zstd ignores links, and the latest checkpoint is one.
    with path.open('rb') as source, inside.open('wb') as file:
        done = subprocess.run([compressor.cmd, '-dc'], stdin=source, stdout=file, stderr=subprocess.PIPE, check=False)
    if done.returncode != 0:
        said = ' '.join(done.stderr.decode(errors='replace').split()) or f'{compressor.cmd} failed'
        raise CheckpointError(f'{path} cannot be decompressed: {said}.')
