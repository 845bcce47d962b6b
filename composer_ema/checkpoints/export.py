"""Writes the average of a checkpoint as a file of its own."""

from __future__ import annotations

import os
import warnings
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from composer_ema.checkpoints import states
from composer_ema.checkpoints.reading import CheckpointError, check_texts, path_of, read_average
from composer_ema.files import beside
from composer_ema.model.names import listed
from composer_ema.shadow.foreign import outermost
from composer_ema.version import __version__

#: Endings of the files that torch writes; any other file is written as safetensors.
TORCH_SUFFIXES = ('.pt', '.pth', '.ckpt')
#: The prefix that stands for the outermost module, whatever it is called.
AUTO = 'auto'


def export(
    checkpoint: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    average: str | None = None,
    key: str | None = None,
    strip_prefix: str | None = None,
) -> dict[str, str]:
    """Writes the averaged weights of ``checkpoint`` to ``out``, beside and renamed into place.

    Args:
        checkpoint: as for :func:`load_average`.
        out: file to write; its folder is made if it is missing. One that ends in ``.pt``, ``.pth`` or ``.ckpt`` is a
            state dict that ``torch.load(out, weights_only=True)`` returns; any other is a safetensors file.
        average: as for :func:`load_average`.
        key: as for :func:`load_average`.
        strip_prefix: module to take off the names, such as ``'module'``, so that the network of a ComposerModel loads
            the file without it. ``'auto'`` takes off the outermost module, in which all names must stand. Names outside
            of a module that is given stay, with a warning. Default: names are written as they are.

    Returns:
        The metadata written with the tensors: the run, the horizon, the number of updates, how far training had come.

    Raises:
        CheckpointError: as for :func:`load_average`; the prefix does not apply or makes two names one; safetensors
            cannot hold a tensor; ``out`` is ``checkpoint`` itself, also under another name. ``out`` is not touched.
        TypeError: an argument has the wrong type.
    """
    path, out = path_of(checkpoint, 'checkpoint'), path_of(out, 'out')
    check_texts(average=average, key=key, strip_prefix=strip_prefix)
    _refuse_overwriting(path, out)
    weights, facts = read_average(path, label=average, key=key)
    if strip_prefix is not None:
        weights = _stripped(weights, strip_prefix, checkpoint)
    metadata = {
        'format': 'pt',
        'weights': facts.pop('weights'),
        'written_by': f'composer_ema {__version__}',
        'checkpoint': path.name,
        **{name: str(fact) for name, fact in facts.items() if fact is not None},
    }
    write = _write_torch if out.suffix in TORCH_SUFFIXES else _write_safetensors
    try:
        write(weights, metadata, checkpoint, out)
    except OSError as error:
        raise CheckpointError(f'{out} cannot be written: {error.strerror or error}.') from error
    return metadata


def _refuse_overwriting(checkpoint: Path, out: Path) -> None:
    """Raises if ``out`` is the checkpoint, be it through a link such as ``latest-rank0.pt``."""
    if checkpoint.exists() and out.exists() and checkpoint.samefile(out):
        same = '' if checkpoint == out else f', which is the same file as {checkpoint}'
        raise CheckpointError(
            f'{out} is the checkpoint itself{same}: the export would replace what training resumes from. Write to '
            'another file.'
        )


def _write_safetensors(
    weights: Mapping[str, Any], metadata: dict[str, str], checkpoint: str | os.PathLike[str], out: Path
) -> None:
    tensors = {name: tensor for name, tensor in weights.items() if isinstance(tensor, Tensor)}
    sparse = [f'{name} ({_layout(tensor)})' for name, tensor in tensors.items() if tensor.layout is not torch.strided]
    if sparse:
        raise CheckpointError(
            f'{checkpoint} cannot be written as safetensors, which hold dense tensors only: {listed(sparse)}. '
            'Write a file that ends in .pt.'
        )
    if left_out := sorted(weights.keys() - tensors.keys()):
        metadata['left_out'] = ', '.join(left_out)  # the extra state of modules, which safetensors cannot hold
    try:
        # Tied weights share memory, which safetensors refuses: each name gets its own copy.
        tensors = {name: tensor.contiguous().clone() for name, tensor in tensors.items()}
        with beside(out) as written:
            safetensors.torch.save_file(tensors, written, metadata=metadata)
    except (ValueError, KeyError, RuntimeError, safetensors.SafetensorError) as error:
        raise CheckpointError(f'{checkpoint} cannot be written as safetensors: {error}') from error


def _write_torch(
    weights: Mapping[str, Any], metadata: dict[str, str], checkpoint: str | os.PathLike[str], out: Path
) -> None:
    # A view would bring the whole memory that it looks at.
    copies: Any = OrderedDict(
        (name, each.clone() if isinstance(each, Tensor) else each) for name, each in weights.items()
    )
    # As torch keeps the versions of modules: in an attribute, which load_state_dict passes over.
    setattr(copies, states.EXPORTED_KEY, dict(metadata))
    try:
        with beside(out) as written:
            torch.save(copies, written)
    except (RuntimeError, TypeError) as error:
        raise CheckpointError(f'{checkpoint} cannot be written by torch: {error}') from error


def _stripped(weights: Mapping[str, Any], prefix: str, checkpoint: str | os.PathLike[str]) -> dict[str, Any]:
    names = list(weights)
    module = outermost(names) if prefix == AUTO else f'{prefix.removesuffix(".")}.'
    if not module:
        modules = sorted({name.partition('.')[0] for name in names})
        raise CheckpointError(
            f"strip_prefix='auto' takes off the module in which all names stand, but those of {checkpoint} begin with "
            f'{listed(modules)}. Pass one of the modules, or leave strip_prefix out.'
        )
    outside = [name for name in names if not name.startswith(module)]
    if len(outside) == len(names):
        raise CheckpointError(
            f'strip_prefix={prefix!r} applies to no name in {checkpoint}, which holds {listed(names)}. '
            f"Pass the module that they begin with, or 'auto' for the outermost one."
        )
    stripped = {name.removeprefix(module): value for name, value in weights.items()}
    if len(stripped) < len(names) or '' in stripped:
        collide = [name for name in outside if module + name in weights]
        raise CheckpointError(
            f'strip_prefix={prefix!r} would make two names one in {checkpoint}: {listed(collide)} with '
            f'{listed([module + name for name in collide])}. Leave strip_prefix out.'
        )
    if outside:
        warnings.warn(
            f'{len(outside)} names do not begin with {module} and stay as they are: {listed(outside)}.', stacklevel=3
        )
    return stripped


def _layout(tensor: Tensor) -> str:
    return str(tensor.layout).removeprefix('torch.')
