"""Writes an average as timm's ``CheckpointSaver`` does, beside the training weights: ``state_dict_ema``."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from composer_ema.checkpoints.lazy import training_weights
from composer_ema.checkpoints.opening import UNKNOWN_CONTENT
from composer_ema.checkpoints.safely import CheckpointError
from composer_ema.checkpoints.writing import torch_copy, write_torch
from composer_ema.interchange.libraries import built, library
from composer_ema.interchange.wanted import Wanted
from composer_ema.model.names import listed
from composer_ema.shadow.foreign import outermost, under_names_of

FORMAT = 'timm'
# From this version on, the epoch is the one that was done.
_VERSION = 2
# timm itself takes it off as it reads, and so do we where all names stand in it.
_DDP = 'module.'


def write(wanted: Wanted, out: Path, architecture: str | None) -> dict[str, str]:
    """Writes the file and returns what was written with the average.

    Args:
        wanted: the average.
        out: the file.
        architecture: as ``timm.create_model`` takes it: the names are checked against it. Default: none is written.

    Raises:
        CheckpointError: timm has no such architecture, or names do not fit it; the file cannot be written.
    """
    weights, facts = wanted.read()
    training = _training_weights(wanted)
    names = None if architecture is None else _names_of(architecture)
    averaged = _named(weights, names)
    if names is not None and averaged.keys() != names:
        missing, unexpected = names - averaged.keys(), averaged.keys() - names
        told = [f'{len(each)} {word}: {listed(sorted(each))}' for each, word in
                ((missing, 'missing'), (unexpected, 'unexpected')) if each]  # fmt: skip
        raise CheckpointError(
            f'the average in {wanted.path} does not fit {architecture!r} of timm. {"; ".join(told)}. Pass the '
            'architecture that was trained, or strip_prefix=.'
        )
    metadata = wanted.metadata(facts)
    content: dict[str, Any] = {} if architecture is None else {'arch': architecture}
    content |= {'version': _VERSION}
    if isinstance(facts.get('trained_epoch'), int):
        content['epoch'] = facts['trained_epoch'] - 1
    if training:
        content['state_dict'] = torch_copy(_named(training, averaged.keys()), {'weights': 'training weights'})
    content['state_dict_ema'] = torch_copy(averaged, metadata)
    write_torch(content, str(wanted.path), out)
    return metadata


def _training_weights(wanted: Wanted) -> dict[str, Any]:
    """Those in the checkpoint, in the same dtype; none where it holds an average alone, or several that could be."""
    try:
        found = training_weights(wanted.held)
    except UNKNOWN_CONTENT:
        return {}
    return {} if found is None else wanted.shaped(found)


def _named(weights: Mapping[str, Any], names: Any) -> dict[str, Any]:
    if names is not None:
        return dict(under_names_of(weights, names))
    module = _DDP if outermost(weights) == _DDP else ''
    return {name.removeprefix(module): value for name, value in weights.items()}


def _names_of(architecture: str) -> set[str]:
    timm = library('timm')
    return set(built(lambda: timm.create_model(architecture), f'{architecture!r} of timm').state_dict())
