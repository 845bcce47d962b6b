"""Opens files and sharded folders, whoever wrote them, as the plain values that they hold.

Invariant: what a file holds is never executed, and it takes no more memory than a file of its size may.
"""

from __future__ import annotations

import os
import stat
import zipfile
from collections import OrderedDict
from pathlib import Path
from types import NoneType
from typing import Any

import safetensors
from torch import Tensor

from composer_ema.checkpoints import lightning_folder, sharded, states, trainer_folder
from composer_ema.checkpoints.checksum import is_sound
from composer_ema.checkpoints.claims import check_claims
from composer_ema.checkpoints.lazy_tensor import in_memory
from composer_ema.checkpoints.safely import CheckpointError, check_sums, load_safely, reason
from composer_ema.checkpoints.torch_values import SavedShard
from composer_ema.checkpoints.weights_folder import files_of_weights
from composer_ema.wording import shown

# Composer's names for the newest checkpoint of a run, and ours for the folder of the run's checkpoints.
_LATEST, _IN_RUN = 'latest-rank0.pt', 'checkpoints'
_LINK, _LONGEST_PATH = '.symlink', 4096
# With this torch's HuggingFaceStorageWriter marks its files; those of processes that save apart are named shard-...
_SHARDING = 'DCP_SHARDING_INFO'
#: How reading a state fails that something unknown wrote to a sound file; torch raises RuntimeErrors of its tensors.
UNKNOWN_CONTENT = (ValueError, LookupError, TypeError, AttributeError, RuntimeError, ArithmeticError)
_SUFFIXES = ('.pt', '.pth', '.ckpt', '.tar', '.safetensors')


def read_checkpoint(checkpoint: str | os.PathLike[str]) -> Any:
    """Returns what a file holds, its checksums compared and nothing in it executed.

    In place of ``torch.load``, which compares no checksum: a byte that has changed on a disk or on the way is then a
    weight that has changed. Reads every file that :func:`load_average` reads: of ``torch.save``, such as
    ``{'model': model.state_dict(), 'optimizer': optimizer.state_dict()}``, of Composer, of safetensors, and folders of
    ``torch.distributed.checkpoint``.

    Files of torch before 1.6, and safetensors that this package did not write, have no checksums.

    Args:
        checkpoint: the file, or the folder of a sharded checkpoint.

    Returns:
        The dictionaries, lists, numbers and strings of the file, with tensors on the CPU. What is sharded in a file is
        whole.

    Raises:
        CheckpointError: the file is missing, damaged, or of another kind; it would run code; its tensors would take far
            more memory than it has bytes.
        TypeError: ``checkpoint`` is no path.

    Example:
        .. code:: python

            checkpoint = read_checkpoint('checkpoint.pt')
            model.load_state_dict(checkpoint['model'])
            optimizer.load_state_dict(checkpoint['optimizer'])
    """
    path = checkpoint_of(checkpoint, 'checkpoint')
    held = read_file(path)
    return _plain(held) if path.is_dir() else held


def _plain(held: Any) -> Any:
    """What a sharded folder holds, read as a whole."""
    if isinstance(held, sharded.Branch) or type(held) is dict:
        return {key: _plain(value) for key, value in held.items()}
    if type(held) is list:
        return [_plain(each) for each in held]
    return in_memory(held) if isinstance(held, Tensor) else held


def checkpoint_of(file: Any, name: str) -> Path:
    """The argument ``name`` as the path of a checkpoint: what a link of Composer's leads to, or the path itself.

    Composer's links in object stores are files that hold the name of the checkpoint, ``latest-rank0.pt.symlink``.

    Raises:
        TypeError: it is no path.
        CheckpointError: such a link leads nowhere.
    """
    path = path_of(file, name)
    if path.suffix != _LINK or not path.is_file():
        return path
    try:
        with path.open('rb') as file:
            target = path_of(file.read(_LONGEST_PATH).decode().strip(), 'the name in it')
    except (OSError, ValueError) as error:
        raise CheckpointError(f'{path} holds no name of a checkpoint. Pass the checkpoint itself.') from error
    beside = [path.parent / target, path.parent / target.name, target]
    found = next((each for each in beside if target.name and each.exists()), None)
    if found is None:
        raise CheckpointError(
            f'{path} leads to {str(target)!r}, which is not there. Download it beside the link, or pass its path.'
        )
    return found


def path_of(file: Any, name: str) -> Path:
    """The argument ``name`` as a path.

    Raises:
        TypeError: it is none.
        CheckpointError: no file can have it: it is too long, leads in a circle or through a folder that may not be
            entered.
    """
    if not isinstance(file, (str, os.PathLike)):
        raise TypeError(f'{name} must be the path of a file, a string or a pathlib.Path, got {described(file)}.')
    path = Path(file)
    try:
        path.stat()
    except (FileNotFoundError, NotADirectoryError):
        pass
    except OSError as error:
        raise CheckpointError(f'{path} cannot be opened: {error.strerror or error}. Pass another path.') from error
    except ValueError as error:
        raise CheckpointError(f'{str(path)!r} is the name of no file: {error}. Pass another path.') from error
    return path


def described(value: Any) -> str:
    """A value of the wrong type, in an error."""
    is_simple = isinstance(value, (str, bytes, int, float, NoneType))
    return shown(value) if is_simple else f'a {type(value).__name__}'


def read_file(path: Path, *, is_checked: bool = False, mmap: bool = False) -> Any:
    """What a file of torch or safetensors, or a sharded checkpoint, holds, on the CPU, read without executing anything.

    Args:
        path: of the file, or of the folder of a sharded checkpoint.
        is_checked: whether the sums of this file have been checked before. Those of a folder are checked as it is read.
        mmap: whether tensors stay on the disk until they are used. Those of safetensors and of folders always do, those
            in torch's format of before 1.6 never.

    Raises:
        CheckpointError: the file is missing, damaged, or of another kind; it would run code.
    """
    if path.is_dir():
        if sharded.is_sharded(path):
            return _open_folder(path, mmap=mmap)
        if trainer_folder.is_trainer_folder(path):
            return _of_trainer(path)
        if files := files_of_weights(path):
            return _load_folder(path, files, is_checked=is_checked)
        raise CheckpointError(f'{path} is a folder. {_in_folder(path)}')
    if not path.exists():
        leads = f': it is a link to {os.readlink(path)!r}, which is not there' if path.is_symlink() else ''
        raise CheckpointError(f'{path} does not exist{leads}.')
    if not path.is_file():
        raise CheckpointError(f'{path} is no file but {_kind_of(path)}, and is not read. Copy what it gives to a file.')
    if path.suffix == sharded.SUFFIX or path.name == sharded.METADATA:
        raise CheckpointError(f'{path} is one file of a sharded checkpoint. Pass its folder: {path.parent}.')
    try:
        if is_safetensors(path):
            return _load_safetensors(path, is_checked=is_checked)
        if not is_checked:
            check_sums(path)
        held = load_safely(path, mmap=mmap and zipfile.is_zipfile(path))
    except CheckpointError:
        raise
    # A damaged file fails in as many ways as there are bytes in it; all of them mean the same to the user.
    except Exception as error:
        raise CheckpointError(f'{path} cannot be read: {reason(path, error)}') from error
    _take_whole(held, path)
    check_claims(held, path, path.stat().st_size)
    return held


def files_of(checkpoint: Path) -> list[Path]:
    """The files of a checkpoint: itself, or those in its folder."""
    if not checkpoint.is_dir():
        return [checkpoint]
    if sharded.is_sharded(checkpoint):
        return sharded.files_of(checkpoint)
    if trainer_folder.is_trainer_folder(checkpoint):
        return trainer_folder.files_of(checkpoint)
    return files_of_weights(checkpoint)


def _of_trainer(folder: Path) -> dict[str, Any]:
    """A checkpoint of transformers' Trainer as one file would hold it: the training weights, and the average."""
    average = read_file(folder / trainer_folder.AVERAGE)
    try:
        files = trainer_folder.weights_of(folder)
    except (OSError, ValueError) as error:
        raise CheckpointError(f'{folder} cannot be read: {error} Load an earlier checkpoint.') from error
    weights: Any = OrderedDict()
    for file in files:
        held = read_file(file)
        weights.update(held['model'] if file.is_dir() else held)
    return {'model': weights, 'average': average} if weights else {'average': average}


def _open_folder(folder: Path, *, mmap: bool) -> Any:
    held, beside = sharded.open_folder(folder), folder / lightning_folder.META
    if not beside.is_file():
        return held
    try:
        return lightning_folder.combined(held, read_file(beside, mmap=mmap))
    except CheckpointError:
        raise
    except ValueError as error:
        raise CheckpointError(f'{folder} cannot be read: {error}') from error


def _kind_of(path: Path) -> str:
    kinds = {stat.S_IFIFO: 'a pipe', stat.S_IFSOCK: 'a socket', stat.S_IFCHR: 'a device', stat.S_IFBLK: 'a device'}
    return kinds.get(stat.S_IFMT(path.stat().st_mode), 'something else')


def _take_whole(held: Any, path: Path) -> None:
    """Replaces each DTensor in ``held`` by the plain tensor it is, or raises if the file holds only a part of it."""
    waiting, seen = [held], set()
    while waiting:
        container = waiting.pop()
        if not isinstance(container, dict | list) or id(container) in seen:  # a file may hold what holds itself
            continue
        seen.add(id(container))
        for key, value in list(container.items() if isinstance(container, dict) else enumerate(container)):
            if not isinstance(value, SavedShard):
                waiting.append(value)
            elif (part := value.part).shape == value.shape:
                container[key] = part
            else:
                raise CheckpointError(
                    f"{path} holds one process's part of {key}, {tuple(part.shape)} of {value.shape}, so the "
                    'other parts are not in it. Save a sharded model with torch.distributed.checkpoint.save on every '
                    'rank, or call gather_state_dict(state) on every rank and save what rank 0 gets.'
                )


def _in_folder(folder: Path) -> str:
    """What of a folder to pass, in words."""
    for inner in (folder, folder / _IN_RUN):
        if (inner / sharded.METADATA).is_symlink():
            return 'Its .metadata is a broken link. Copy the whole folder, or pass the one that it was made from.'
        if (inner / _LATEST).exists():
            return f'Pass the checkpoint in it: {inner / _LATEST}.'
    if list(folder.glob('__*.metadata')):
        return (
            'Each process wrote an index of its own to it (use_collectives=False), and these are not read. Save with '
            'torch.distributed.checkpoint.save(..., use_collectives=True), its default.'
        )
    if list(folder.glob(f'*{sharded.SUFFIX}')):
        return (
            'It holds shards without the .metadata that is written last: saving did not end, or the file was not '
            'copied. Pass an earlier checkpoint.'
        )
    files = [file for inner in (folder, folder / _IN_RUN) for file in _files_in(inner)]
    if files:
        return f'Pass one checkpoint of those in it, such as {max(files, key=_age)}.'
    for name, kind in ((sharded.METADATA, 'sharded '), (trainer_folder.AVERAGE, '')):
        if folders := [at.parent for inner in ('*', '*/*') for at in folder.glob(f'{inner}/{name}')]:
            return f'Pass one of the {kind}checkpoints in it, such as {max(folders, key=_age)}.'
    return 'It holds no checkpoint: pass a .pt file, or the folder of a sharded checkpoint.'


def _files_in(folder: Path) -> list[Path]:
    return [file for file in sorted(folder.glob('*')) if file.suffix in _SUFFIXES and file.is_file()]


def _age(file: Path) -> tuple[float, str]:
    return file.stat().st_mtime, file.name


def is_safetensors(path: Path) -> bool:
    """Whether a file is named, or begins, as safetensors do. A folder is none."""
    if path.is_dir():
        return False
    with path.open('rb') as file:
        head = file.read(9)
    # The length of a JSON header, and its beginning.
    is_like = head[8:] == b'{' and int.from_bytes(head[:8], 'little') < path.stat().st_size
    return path.suffix == '.safetensors' or is_like


def metadata_of(path: Path) -> dict[str, str]:
    """The texts that a safetensors file keeps beside its tensors."""
    with safetensors.safe_open(path, framework='pt') as file:
        return file.metadata() or {}


def _load_folder(folder: Path, files: list[Path], *, is_checked: bool) -> Any:
    """The same, of several files of one model."""
    parts = [read_file(file, is_checked=is_checked) for file in files]
    weights: Any = OrderedDict((name, tensor) for part in parts for name, tensor in part.items())
    if len(weights) < sum(map(len, parts)):
        raise CheckpointError(f'{folder} is damaged: two of its files have a tensor of one name. Load an earlier one.')
    if (metadata := states.exported_with(parts[0])) is not None:
        setattr(weights, states.EXPORTED_KEY, metadata)
    return weights


def _load_safetensors(path: Path, *, is_checked: bool) -> Any:
    """Tensors by name, with what ``export`` wrote beside them in an attribute; see ``states.exported_with``."""
    with safetensors.safe_open(path, framework='pt') as file:
        metadata = file.metadata() or {}
        if _SHARDING in metadata and path.name.startswith('shard-'):
            raise CheckpointError(
                f'{path} holds the shards of one process. Put those of all together with consolidate_safetensors_files '
                'of torch.distributed.checkpoint, or save without save_distributed.'
            )
        if not is_checked and not is_sound(path, metadata):
            raise CheckpointError(
                f'{path} cannot be read: it is damaged, its checksum is wrong. Load an earlier checkpoint, or export '
                'it anew.'
            )
        weights: Any = OrderedDict((name, file.get_tensor(name)) for name in file.keys())  # noqa: SIM118
    if metadata.get('written_by', '').startswith('composer_ema '):
        setattr(weights, states.EXPORTED_KEY, metadata)
    return weights
