"""Reads the average out of a Composer checkpoint and writes it as safetensors. Never executes what a file holds."""

from __future__ import annotations

import datetime
import os
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from torch import Tensor
from torch.torch_version import TorchVersion

from composer_ema import formats
from composer_ema.files import beside
from composer_ema.naming import check_same, listed
from composer_ema.sharding import canonical_name
from composer_ema.version import __version__

# The two functions that pickled arrays and scalars name, under numpy 1's name and under numpy 2's.
_RECONSTRUCT, _SCALAR = np.zeros(0).__reduce__()[0], np.float64(0).__reduce__()[0]
# What Composer's checkpoints hold besides tensors and plain types: times, torch's version, numpy's random state.
_SAFE_TYPES: list[Any] = [
    datetime.timedelta,
    TorchVersion,
    np.ndarray,
    np.dtype,
    *(type(np.dtype(code)) for code in '?bBhHiIlLqQefd'),
    *(
        (function, f'numpy.{module}.multiarray.{name}')
        for name, function in (('_reconstruct', _RECONSTRUCT), ('scalar', _SCALAR))
        for module in ('core', '_core')
    ),
]


class CheckpointError(ValueError):
    """A checkpoint cannot be read or holds no average. The message says which file and why."""


def load_average(checkpoint: str | os.PathLike[str]) -> dict[str, Tensor]:
    """The averaged weights of a Composer checkpoint, for ``model.load_state_dict``.

    Reads checkpoints of :class:`composer_ema.EMA` and of Composer's built-in EMA, whichever weights their model slot
    holds. Frozen parameters, and buffers that were not averaged, come from the model slot.

    Args:
        checkpoint: a ``.pt`` file that Composer's Trainer saved, with one or several processes under DDP.

    Returns:
        Canonical names and CPU tensors, in the order of the model. Averaged ones have the average's dtype, float32
        for a 16-bit model.

    Raises:
        CheckpointError: the file is missing, damaged, or of another kind; it would run code; it holds no average.

    Example:
        .. code:: python

            model.load_state_dict(load_average('runs/fashion_mnist/latest-rank0.pt'))
    """
    return _average_and_metadata(Path(checkpoint))[0]


def export(checkpoint: str | os.PathLike[str], out: str | os.PathLike[str]) -> dict[str, str]:
    """Writes the averaged weights of ``checkpoint`` to ``out`` as safetensors, beside and renamed into place.

    Args:
        checkpoint: as for :func:`load_average`.
        out: file to write; its folder is made where it is missing.

    Returns:
        The metadata written with the tensors: the run, the horizon, the number of updates, how far training had come.

    Raises:
        CheckpointError: as for :func:`load_average`, or safetensors cannot hold a tensor. ``out`` is not touched.
    """
    average, metadata = _average_and_metadata(Path(checkpoint))
    # Tied weights share memory, which safetensors refuses: each name gets its own copy.
    tensors = {name: tensor.contiguous().clone() for name, tensor in average.items() if isinstance(tensor, Tensor)}
    if left_out := sorted(average.keys() - tensors.keys()):
        metadata['left_out'] = ', '.join(left_out)  # the extra state of modules, which safetensors cannot hold
    try:
        with beside(Path(out)) as written:
            safetensors.torch.save_file(tensors, written, metadata=metadata)
    except (ValueError, KeyError, safetensors.SafetensorError) as error:
        raise CheckpointError(f'{checkpoint} cannot be written as safetensors: {error}') from error
    except OSError as error:
        raise CheckpointError(f'{out} cannot be written: {error.strerror or error}.') from error
    return metadata


def read_checkpoint(path: Path) -> dict[str, Any]:
    """What a Composer checkpoint holds, on the CPU, read without executing anything.

    Raises:
        CheckpointError: as for :func:`load_average`.
    """
    if path.is_dir():
        raise CheckpointError(f'{path} is a folder. Sharded checkpoints are not read yet: pass a single .pt file.')
    if not path.exists():
        raise CheckpointError(f'{path} does not exist.')
    try:
        check_sums(path)
        with torch.serialization.safe_globals(_SAFE_TYPES):
            checkpoint = torch.load(path, map_location='cpu', weights_only=True)
    except CheckpointError:
        raise
    # A damaged file fails in as many ways as there are bytes in it; all of them mean the same to the user.
    except Exception as error:
        raise CheckpointError(f'{path} cannot be read: {_reason(path, error)}') from error
    if not isinstance(checkpoint, Mapping) or not isinstance(checkpoint.get('state'), Mapping):
        raise CheckpointError(f"{path} is no Composer checkpoint: it has no 'state'.")
    return dict(checkpoint)


def _average_and_metadata(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    state = read_checkpoint(path)['state']
    try:
        return _average_in(state, path)
    except CheckpointError:
        raise
    # The file is sound, so what it holds was written by something else than a Trainer with an average.
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f'{path} holds no average that can be read: {error}') from error


def _average_in(state: Mapping[str, Any], path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    model = {canonical_name(name): tensor for name, tensor in _mapping(state, 'model').items()}
    algorithms = _algorithms(state)
    if 'EMA' not in algorithms:
        found = f'the algorithms {listed(sorted(algorithms))}' if algorithms else 'no algorithms'
        raise CheckpointError(
            f'{path} holds no average: it was saved with {found}. '
            'Train with algorithms=[EMA()], and without save_weights_only.'
        )
    saved = formats.upgrade(algorithms['EMA'], model_slot=model)
    if not saved['started'] or not saved['averages']:
        raise CheckpointError(f'{path} holds no average yet: ema_start had not come when it was saved.')
    average = saved['averages'][formats.AVERAGE]
    parameters, aliases = average['parameters'], average['aliases']
    buffers = {name: buffer for name, buffer in average['buffers'].items() if name in model}
    averaged = {**parameters, **buffers}
    check_same('the average', model, averaged, optional=model, remedy='The checkpoint is damaged.')
    averaged |= {alias: averaged[name] for alias, name in aliases.items() if name in averaged}
    weights = {name: averaged.get(name, tensor) for name, tensor in model.items()}
    return weights, _metadata(path, state, saved['config'], average)


def _algorithms(state: Mapping[str, Any]) -> dict[str, Any]:
    """Composer writes a list of pairs, older releases a dictionary."""
    algorithms = state.get('algorithms', [])
    if not isinstance(algorithms, (list, Mapping)):
        raise TypeError(f"its 'algorithms' is a {type(algorithms).__name__}.")
    return dict(algorithms)


def _metadata(path: Path, state: Mapping[str, Any], config: Mapping[str, Any], average: Mapping[str, Any]) -> dict:
    timestamp = (state.get('timestamp') or {}).get('Timestamp') or {}
    described = {
        'format': 'pt',
        'weights': 'exponential moving average',
        'written_by': f'composer_ema {__version__}',
        'checkpoint': path.name,
        'run_name': state.get('run_name'),
        'num_updates': average.get('num_updates') if config else None,
        **{name: config.get(name) for name in ('half_life', 'smoothing', 'update_interval', 'ema_start', 'buffers')},
        **{f'trained_{unit}': timestamp.get(unit) for unit in ('epoch', 'batch', 'sample', 'token')},
    }
    return {name: str(value) for name, value in described.items() if value is not None}


def _mapping(of: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    if not isinstance(value := of.get(key), Mapping):
        raise TypeError(f'its {key!r} is a {type(value).__name__}.')
    return value


def check_sums(path: Path) -> None:
    """Raises where a byte of a torch file has changed since it was written, which ``torch.load`` does not look for.

    Raises:
        CheckpointError: a checksum is wrong, or the file cannot be read through.
    """
    if not zipfile.is_zipfile(path):
        return
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
    except Exception as error:
        raise CheckpointError(f'{path} cannot be read: {_reason(path, error)}') from error
    if damaged:
        raise CheckpointError(
            f'{path} cannot be read: it is damaged, the checksum of {damaged} is wrong. Load an earlier checkpoint.'
        )


def _reason(path: Path, error: Exception) -> str:
    if isinstance(error, PermissionError):
        return str(error)
    try:
        known = {f'{t.__module__}.{t.__qualname__}' for t in _SAFE_TYPES if not isinstance(t, tuple)}
        known |= {t[1] for t in _SAFE_TYPES if isinstance(t, tuple)}
        unsafe = sorted(set(torch.serialization.get_unsafe_globals_in_checkpoint(path)) - known)
    except Exception:
        return (
            'it is truncated, damaged, or no torch file. Load an earlier checkpoint; decompress a compressed one first.'
        )
    if unsafe:
        return f'it holds the types {listed(unsafe)}, which could run code when loaded.'
    return str(error).splitlines()[0]
