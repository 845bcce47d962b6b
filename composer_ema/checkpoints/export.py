"""Writes the average of a checkpoint as a file of its own."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from typing import Any

from composer_ema.checkpoints.opening import checkpoint_of, path_of
from composer_ema.checkpoints.reading import CheckpointError, check_texts, read_average
from composer_ema.checkpoints.writing import refuse_overwriting, write_weights
from composer_ema.model.names import listed
from composer_ema.shadow.foreign import outermost
from composer_ema.version import __version__

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
            state dict that ``torch.load(out, weights_only=True)`` returns; any other is a safetensors file, with a
            checksum among its metadata that every reader of this package compares.
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
    path, out = checkpoint_of(checkpoint, 'checkpoint'), path_of(out, 'out')
    check_texts(average=average, key=key, strip_prefix=strip_prefix)
    refuse_overwriting(path, out, 'the export')
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
    write_weights(weights, metadata, str(checkpoint), out)
    return metadata


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
