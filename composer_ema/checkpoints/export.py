"""Writes the average of a checkpoint as safetensors."""

from __future__ import annotations

import os
from pathlib import Path

import safetensors.torch
from torch import Tensor

from composer_ema.checkpoints.reading import CheckpointError, read_average
from composer_ema.files import beside
from composer_ema.version import __version__


def export(
    checkpoint: str | os.PathLike[str], out: str | os.PathLike[str], *, average: str | None = None
) -> dict[str, str]:
    """Writes the averaged weights of ``checkpoint`` to ``out`` as safetensors, beside and renamed into place.

    Args:
        checkpoint: as for :func:`load_average`.
        out: file to write; its folder is made if it is missing.
        average: as for :func:`load_average`.

    Returns:
        The metadata written with the tensors: the run, the horizon, the number of updates, how far training had come.

    Raises:
        CheckpointError: as for :func:`load_average`, or safetensors cannot hold a tensor. ``out`` is not touched.
    """
    weights, facts = read_average(Path(checkpoint), label=average)
    # Tied weights share memory, which safetensors refuses: each name gets its own copy.
    tensors = {name: tensor.contiguous().clone() for name, tensor in weights.items() if isinstance(tensor, Tensor)}
    metadata = {
        'format': 'pt',
        'weights': facts.pop('weights'),
        'written_by': f'composer_ema {__version__}',
        'checkpoint': Path(checkpoint).name,
        **{name: str(fact) for name, fact in facts.items() if fact is not None},
    }
    if left_out := sorted(weights.keys() - tensors.keys()):
        metadata['left_out'] = ', '.join(left_out)  # the extra state of modules, which safetensors cannot hold
    try:
        with beside(Path(out)) as written:
            safetensors.torch.save_file(tensors, written, metadata=metadata)
    except (ValueError, KeyError, safetensors.SafetensorError) as error:
        raise CheckpointError(f'{checkpoint} cannot be written as safetensors: {error}') from error
    except OSError as error:
        raise CheckpointError(f'{out} cannot be written: {error.strerror or error}.') from error
    return metadata
