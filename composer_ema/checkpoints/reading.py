"""Reads the average out of a checkpoint, Composer's or another library's.

Invariant: what a file holds is never executed.
"""

from __future__ import annotations

import argparse
import datetime
import os
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.torch_version import TorchVersion

from composer_ema.checkpoints import formats
from composer_ema.model.inventory import Inventory
from composer_ema.model.names import check_same, listed
from composer_ema.model.sharding import canonical_name, unwrap
from composer_ema.shadow import foreign

# The two functions that pickled arrays and scalars name, under numpy 1's name and under numpy 2's.
_RECONSTRUCT, _SCALAR = np.zeros(0).__reduce__()[0], np.float64(0).__reduce__()[0]
# What checkpoints hold besides tensors and plain types: times, torch's version, numpy's random state, and in timm's
# the arguments of its script.
_SAFE_TYPES: list[Any] = [
    argparse.Namespace,
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


def load_average(
    checkpoint: str | os.PathLike[str], model: nn.Module | None = None, *, average: str | None = None
) -> dict[str, Tensor]:
    """Returns the averaged weights in a file, for ``model.load_state_dict``.

    Reads checkpoints of :class:`composer_ema.EMA`, of :class:`composer_ema.SWA` and of Composer's built-in algorithms
    of these names, whichever weights their model slot holds. Frozen parameters, and buffers that were not averaged,
    come from the model slot. Also reads what other libraries save, recognised by its keys; see
    :meth:`composer_ema.ShadowModel.load_foreign`.

    Args:
        checkpoint: a ``.pt`` file that Composer's Trainer saved, with one or several processes under DDP, or another
            library's file.
        model: what the weights are for. All names and shapes are checked against it. diffusers and torch-ema keep only
            the order of the parameters, so their files need it; their buffers then come from it, too. Only read.
        average: which average to take if the checkpoint holds several, such as ``'ema'``. Default: the only one.

    Returns:
        Canonical names and CPU tensors, in the order of the model. Averaged ones have the average's dtype, float32
        for a 16-bit model.

    Raises:
        CheckpointError: the file is missing, damaged, or of another kind; it would run code; it holds no average,
            several, or one that does not fit ``model`` or needs one.

    Example:
        .. code:: python

            model.load_state_dict(load_average('runs/fashion_mnist/latest-rank0.pt'))
    """
    return read_average(Path(checkpoint), model, label=average)[0]


def read_average(
    path: Path, model: nn.Module | None = None, *, label: str | None = None
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The averaged weights in a file, and what the file says of them: whose they are, how averaged, how often.

    Args:
        path: of the file.
        model: as for :func:`load_average`.
        label: as ``average`` for :func:`load_average`.

    Raises:
        CheckpointError: as for :func:`load_average`.
    """
    checkpoint = read_file(path)
    try:
        if not is_of_composer(checkpoint):
            if label is not None:
                raise CheckpointError(f'{path} is of another library, whose averages have no labels, got {label!r}.')
            return _foreign_average_in(checkpoint, path, model)
        weights, facts = _average_in(checkpoint['state'], path, label)
        if model is not None:
            _check_fits(weights, model)
        return weights, facts
    except CheckpointError:
        raise
    # The file is sound, so something other than a Trainer with an average wrote what it holds.
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f'{path} holds no average that can be read: {error}') from error


def read_file(path: Path) -> Any:
    """What a file that torch wrote holds, on the CPU, read without executing anything.

    Raises:
        CheckpointError: the file is missing, damaged, or of another kind; it would run code.
    """
    if path.is_dir():
        raise CheckpointError(f'{path} is a folder. Sharded checkpoints are not read yet: pass a single .pt file.')
    if not path.exists():
        raise CheckpointError(f'{path} does not exist.')
    try:
        check_sums(path)
        return load_safely(path)
    except CheckpointError:
        raise
    # A damaged file fails in as many ways as there are bytes in it; all of them mean the same to the user.
    except Exception as error:
        raise CheckpointError(f'{path} cannot be read: {_reason(path, error)}') from error


def load_safely(path: Path, *, mmap: bool = False) -> Any:
    """``torch.load`` that executes nothing and lets through what checkpoints hold besides tensors and plain types.

    Args:
        path: The file.
        mmap: Whether tensors stay on the disk until they are used.

    Raises:
        Exception: Whatever torch raises about a file that it cannot read, or whose types it does not know.
    """
    with torch.serialization.safe_globals(_SAFE_TYPES):
        return torch.load(path, map_location='cpu', weights_only=True, mmap=mmap)


def is_of_composer(checkpoint: Any) -> bool:
    """Whether what :func:`read_file` returned was saved by Composer's Trainer, as far as its outermost keys tell."""
    return isinstance(checkpoint, Mapping) and isinstance(checkpoint.get('state'), Mapping)


def _foreign_average_in(
    checkpoint: Any, path: Path, model: nn.Module | None
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    found = foreign.read(checkpoint)
    if found.num_updates == 0:
        raise CheckpointError(f'{path} holds no average yet: {found.source} counts no update.')
    if model is not None:
        weights = _for_model(foreign.fit(found, Inventory.of(unwrap(model))), model)
    elif isinstance(found.weights, Mapping):
        weights = dict(found.weights)
    else:
        raise CheckpointError(
            f'{path} holds an average of {found.source}, which keeps the order of the parameters and no names. '
            'Pass the model that was averaged: load_average(file, model=model).'
        )
    return weights, {
        'weights': 'average',
        'source': found.source,
        'num_updates': found.num_updates,
        'smoothing': found.smoothing,
    }


def _for_model(tensors: Mapping[str, Tensor], model: nn.Module) -> dict[str, Any]:
    """A state dict of ``model`` with ``tensors`` in it; the rest is copied from the model."""
    inventory = Inventory.of(unwrap(model))
    weights = {}
    for key, value in unwrap(model).state_dict().items():
        name = canonical_name(key)
        found = tensors.get(inventory.aliases.get(name, name))
        weights[name] = found if found is not None else value.detach().cpu().clone() if _is_tensor(value) else value
    return weights


def _check_fits(average: Mapping[str, Any], model: nn.Module) -> None:
    expected = {canonical_name(name): value for name, value in unwrap(model).state_dict().items() if _is_tensor(value)}
    check_same(
        'the average',
        expected,
        {name: value for name, value in average.items() if not foreign.is_extra_state(name)},
        remedy='Pass the model that was trained.',
    )


def _is_tensor(value: object) -> bool:
    return isinstance(value, Tensor)


@dataclass(frozen=True)
class _Saved:
    """An average in a checkpoint, and the state that it stands in."""

    algorithm: str
    label: str
    row: formats.Format
    state: Mapping[str, Any]

    @property
    def average(self) -> Mapping[str, Any]:
        return self.state['averages'][self.label]


def _average_in(state: Mapping[str, Any], path: Path, label: str | None) -> tuple[dict[str, Tensor], dict[str, Any]]:
    model = {canonical_name(name): tensor for name, tensor in _mapping(state, 'model').items()}
    saved = _choose(_saved_in(state, model, path), label, path)
    parameters, aliases = saved.average['parameters'], saved.average['aliases']
    buffers = {name: buffer for name, buffer in saved.average['buffers'].items() if name in model}
    averaged = {**parameters, **buffers}
    check_same('the average', model, averaged, optional=model, remedy='The checkpoint is damaged.')
    averaged |= {alias: averaged[name] for alias, name in aliases.items() if name in averaged}
    return {name: averaged.get(name, tensor) for name, tensor in model.items()}, _facts(state, saved)


def _saved_in(state: Mapping[str, Any], model: Mapping[str, Tensor], path: Path) -> list[_Saved]:
    """Every average of a checkpoint that has started."""
    algorithms = _algorithms(state)
    rows = formats.find(algorithms)
    if not rows:
        listing = ', '.join(f'{name} ({_outline(state)})' for name, state in sorted(algorithms.items()))
        found = f'the algorithms {listing}, whose states are of no known format' if algorithms else 'no algorithms'
        raise CheckpointError(
            f'{path} holds no average: it was saved with {found}. '
            'Train with algorithms=[EMA()] or [SWA()], and without save_weights_only.'
        )
    upgraded = {
        name: formats.upgrade(algorithms[name], model_slot=model, what=f'the saved {name} state') for name in rows
    }
    saved = [_Saved(name, label, rows[name], upgraded[name]) for name in rows for label in upgraded[name]['averages']]
    started = [each for each in saved if each.state['started']]
    if not started:
        starts = ' and '.join(f'{each.label}_start' for each in saved) or 'the start'
        raise CheckpointError(f'{path} holds no average yet: {starts} had not come when it was saved.')
    return started


def _outline(state: Any) -> str:
    """What a state looks like, in a few words."""
    return f'keys: {", ".join(map(str, state)) or "none"}' if isinstance(state, Mapping) else type(state).__name__


def _choose(saved: Sequence[_Saved], label: str | None, path: Path) -> _Saved:
    chosen = [each for each in saved if label is None or each.label == label]
    if len(chosen) == 1:
        return chosen[0]
    names = ', '.join(f'{each.label!r} of {each.algorithm}' for each in saved)
    if chosen:
        raise CheckpointError(
            f'{path} holds {len(saved)} averages: {names}. Say which to take, for example average={saved[0].label!r}.'
        )
    raise CheckpointError(f'{path} holds no average called {label!r}, but {names}.')


def _algorithms(state: Mapping[str, Any]) -> dict[str, Any]:
    """Composer writes a list of pairs, older releases a dictionary."""
    algorithms = state.get('algorithms', [])
    if not isinstance(algorithms, (list, Mapping)):
        raise TypeError(f"its 'algorithms' is a {type(algorithms).__name__}.")
    return dict(algorithms)


def _facts(state: Mapping[str, Any], saved: _Saved) -> dict[str, Any]:
    timestamp = (state.get('timestamp') or {}).get('Timestamp') or {}
    config = saved.state['config']
    return {
        'weights': _kind(config, saved.average['profile']['description']),
        'run_name': state.get('run_name'),
        'num_updates': saved.average['num_updates'] if saved.row.counts_updates else None,
        **{name: config.get(name) for name in ('half_life', 'smoothing', 'power', 'update_interval')},
        f'{saved.label}_start': config.get(f'{saved.label}_start'),
        'buffers': config.get('buffers'),
        **{f'trained_{unit}': timestamp.get(unit) for unit in ('epoch', 'batch', 'sample', 'token')},
    }


def _kind(config: Mapping[str, Any], profile: str) -> str:
    function = config.get('avg_fn') or config.get('multi_avg_fn')
    if function is not None:
        return f'average by {function}'
    kinds = {'equal': 'equal average', 'power': 'power function average'}
    return kinds.get(profile.partition('=')[0], 'exponential moving average')


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
    if path.suffix == '.safetensors':
        return 'it is a safetensors file, which holds tensors and no state. Read it with safetensors.torch.load_file.'
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
