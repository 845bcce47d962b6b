"""Writes an average as a folder that diffusers' ``EMAModel`` continues and ``from_pretrained`` loads: ``unet_ema``."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from composer_ema.checkpoints.safely import CheckpointError
from composer_ema.checkpoints.weights_folder import DIFFUSERS
from composer_ema.interchange import settings_beside
from composer_ema.interchange.libraries import built, library
from composer_ema.interchange.model_folder import write_folder
from composer_ema.interchange.settings_beside import CONFIG
from composer_ema.interchange.wanted import Wanted
from composer_ema.spans import Span

FORMAT = 'diffusers'
_SHARD_SIZE = '10GB'  # of diffusers itself
# What EMAModel.save_pretrained puts among the settings of the model.
_OF_EMA = (
    'decay', 'min_decay', 'optimization_step', 'update_after_step', 'use_ema_warmup', 'inv_gamma', 'power',
)  # fmt: skip


def write(wanted: Wanted, out: Path, config: Path | None, max_shard_size: str | None) -> dict[str, str]:
    """Writes the folder and returns what was written with the tensors.

    Raises:
        CheckpointError: no config was passed, or not of a model of diffusers; the average does not fit that model; the
            folder cannot be written.
    """
    if config is None:
        raise CheckpointError(
            f'{wanted.path} does not say which model of diffusers it is of. Pass config=, the config.json of the model '
            'or a folder with one (--config FOLDER).'
        )
    settings = settings_beside.given(config)
    of_model = {name: value for name, value in settings.config.items() if name not in _OF_EMA}
    diffusers, name = library('diffusers'), of_model.get('_class_name')
    kind: Any = getattr(diffusers, name, None) if isinstance(name, str) else None
    if not isinstance(kind, type) or not issubclass(kind, diffusers.ModelMixin):
        raise CheckpointError(
            f"{settings.where} names no model of diffusers: its '_class_name' is {name!r}. Pass the config.json of the "
            'model, not that of the pipeline.'
        )
    model = built(lambda: kind.from_config(of_model), f'{name} of {settings.where}')
    try:
        weights, facts = wanted.read(model)
    except CheckpointError as error:
        raise CheckpointError(f'{error} The model is {name} of {settings.where}.') from error
    metadata = wanted.metadata(facts)
    content = {**of_model, **_settings_of_ema(facts)}
    write_folder(
        weights,
        metadata,
        str(wanted.path),
        out,
        stem=DIFFUSERS,
        files={CONFIG: settings_beside.as_json(content)},
        max_shard_size=_SHARD_SIZE if max_shard_size is None else max_shard_size,
    )
    return metadata


def _settings_of_ema(facts: Mapping[str, Any]) -> dict[str, Any]:
    """What EMAModel goes on by: a decay that does not ramp up, where one says how the average was kept."""
    count = facts.get('num_updates')
    settings: dict[str, Any] = {
        'optimization_step': count if isinstance(count, int) else 0,
        'update_after_step': 0,
        'use_ema_warmup': False,
        'inv_gamma': 1.0,
        'power': 2 / 3,
    }
    decay = _decay(facts)
    if decay is None:
        warnings.warn(
            'no decay per batch says how this average was kept, so none is written, and EMAModel continues it with '
            'its own of 0.9999. To choose another, set ema.decay after EMAModel.from_pretrained.',
            stacklevel=4,  # the caller of export
        )
        return settings
    return {**settings, 'decay': decay, 'min_decay': decay}


def _decay(facts: Mapping[str, Any]) -> float | None:
    """Share of the old average that a batch keeps; None where that differs from batch to batch, or is not told."""
    interval, half_life = facts.get('update_interval'), facts.get('half_life')
    if interval not in (None, '1ba') or any(facts.get(name) is not None for name in ('power', 'gamma')):
        return None
    for name in ('smoothing', 'decay'):
        if isinstance(facts.get(name), float):
            return facts[name]
    if isinstance(half_life, str) and half_life.endswith('ba'):
        return 2 ** (-1 / Span.parse(half_life, name='half_life').value)
    if isinstance(half_life, int | float):  # of EMAOptimizer, in steps
        return 2 ** (-1 / half_life)
    return None
