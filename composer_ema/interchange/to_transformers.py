"""Writes an average as a folder that ``from_pretrained`` of transformers loads."""

from __future__ import annotations

import copy
import dataclasses
import re
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from composer_ema.checkpoints.safely import CheckpointError
from composer_ema.checkpoints.weights_folder import TRANSFORMERS
from composer_ema.interchange import settings_beside
from composer_ema.interchange.libraries import built, library
from composer_ema.interchange.model_folder import write_folder
from composer_ema.interchange.settings_beside import CONFIG, Settings
from composer_ema.interchange.wanted import Wanted
from composer_ema.model.inventory import Inventory
from composer_ema.model.names import listed

FORMAT = 'huggingface'
_GENERATION_CONFIG = 'generation_config.json'
_SHARD_SIZE = '5GB'  # of transformers itself
# How attention is computed. Of 'OWNER/NAME:FUNCTION' transformers downloads a kernel, and runs it as it builds a model.
_ATTENTION = ('attn_implementation', '_attn_implementation', '_attn_implementation_internal')


def write(wanted: Wanted, out: Path, config: Path | None, max_shard_size: str | None) -> dict[str, str]:
    """Writes the folder and returns what was written with the tensors.

    Weights have the names of the model of transformers, and of a tied tensor only the name that transformers keeps.

    Raises:
        CheckpointError: there is no config; the average does not fit the model of the config; the folder cannot be
            written.
    """
    settings = _without_attention(_settings(wanted, config))
    name, model = _model_of(settings)
    if model is None:
        weights, facts = wanted.read()
        weights = _without_shared(weights)
    else:
        try:
            weights, facts = wanted.read(model)
            weights = _without_tied(weights, model, settings)
        except CheckpointError as error:
            raise CheckpointError(f'{error} The model is {name} of {settings.where}.{_advice(wanted)}') from error
    metadata = wanted.metadata(facts)
    files = {**_files(model), **settings.files, CONFIG: settings_beside.as_json(_config(settings, name, weights))}
    write_folder(
        weights,
        metadata,
        str(wanted.path),
        out,
        stem=TRANSFORMERS,
        files=files,
        max_shard_size=_SHARD_SIZE if max_shard_size is None else max_shard_size,
    )
    return metadata


def _settings(wanted: Wanted, config: Path | None) -> Settings:
    found = settings_beside.in_checkpoint(wanted.held, wanted.path)
    if config is None and found is None and (wanted.path / CONFIG).is_file():  # a folder that transformers saved
        config = wanted.path
    if config is None:
        if found is None:
            raise CheckpointError(
                f'{wanted.path} holds no Hugging Face config: only those of a HuggingFaceModel of Composer '
                'and of the Trainer of transformers have one. Pass config=, a config.json or a folder with one '
                '(--config FOLDER).'
            )
        return found
    own = settings_beside.given(config)
    tokenizer = {} if found is None or any(name.startswith('tokenizer') for name in own.files) else found.files
    return Settings(own.config, own.where, found.class_name if found else '', {**tokenizer, **own.files})


def _without_attention(settings: Settings) -> Settings:
    """The settings without what says how attention is computed, which transformers leaves out of its files, too."""

    def without(content: Any) -> Any:
        if isinstance(content, Mapping):  # configs of parts stand in that of the whole
            return {name: without(value) for name, value in content.items() if name not in _ATTENTION}
        return [without(value) for value in content] if isinstance(content, list) else content

    return dataclasses.replace(settings, config=without(settings.config))


def _model_of(settings: Settings) -> tuple[str, nn.Module | None]:
    """The model's class by name, and a model without values; none if transformers has no such class."""
    transformers = library('transformers')
    named = settings.config.get('architectures')
    name = named[0] if isinstance(named, list) and named else settings.class_name.rpartition('.')[2]
    if not isinstance(name, str) or not name:
        raise CheckpointError(
            f"{settings.where} names no class. Add it, as in 'architectures': ['GPT2LMHeadModel']. {_PEFT}"
        )
    found = getattr(transformers, name, None)
    if not isinstance(found, type) or not issubclass(found, transformers.PreTrainedModel):
        if settings.class_name.startswith('peft.'):
            raise CheckpointError(f'{settings.where} is of a model with an adapter. {_PEFT}')
        warnings.warn(
            f'transformers has no class {name!r}, so whether the weights fit {settings.where} was not checked.',
            stacklevel=4,  # the caller of export
        )
        return name, None
    kind: Any = found
    config = copy.deepcopy(settings.config)  # transformers writes to what it is given
    return name, built(lambda: kind(kind.config_class.from_dict(config)), f'{name} of {settings.where}')


_PEFT = "To write an adapter alone pass format='peft'."


def _advice(wanted: Wanted) -> str:
    return f' {_PEFT}' if settings_beside.adapter_in_checkpoint(wanted.held, wanted.path) else ''


def _without_tied(weights: Mapping[str, Any], model: Any, settings: Settings) -> dict[str, Any]:
    """The weights, of each tied tensor under the one name that transformers writes."""
    dropped = {}
    for names in _groups(Inventory.of(model).aliases):
        tied = [name for name in names if any(re.search(key, name) for key in model._tied_weights_keys or ())]
        kept = next((name for name in names if name not in tied), names[0])
        dropped |= {name: kept for name in names if name != kept}
    apart = [name for name, kept in dropped.items() if not torch.equal(weights[name], weights[kept])]
    if apart:
        raise CheckpointError(
            f'{settings.where} ties {listed([f"{name} to {dropped[name]}" for name in apart])}, but the average has '
            "other values under each. Set 'tie_word_embeddings' to false in the config, if the model was trained so."
        )
    return {name: value for name, value in weights.items() if name not in dropped}


def _groups(aliases: Mapping[str, str]) -> Iterable[list[str]]:
    groups: dict[str, list[str]] = {}
    for alias, name in aliases.items():
        groups.setdefault(name, [name]).append(alias)
    return groups.values()


def _without_shared(weights: Mapping[str, Any]) -> dict[str, Any]:
    """The weights, each tensor once."""
    names: dict[int, str] = {}
    return {name: value for name, value in weights.items() if names.setdefault(id(value), name) == name}


def _config(settings: Settings, name: str, weights: Mapping[str, Any]) -> dict[str, Any]:
    floating = {value.dtype for value in weights.values() if isinstance(value, Tensor) and value.is_floating_point()}
    key = 'dtype' if 'dtype' in settings.config else 'torch_dtype'  # transformers renamed it in 4.56 and reads both
    dtype = {key: str(floating.pop()).removeprefix('torch.')} if len(floating) == 1 else {}
    return {**settings.config, 'architectures': settings.config.get('architectures') or [name], **dtype}


def _files(model: Any) -> dict[str, bytes]:
    """How a model generates, which transformers makes of its config."""
    if model is None or not model.can_generate() or model.generation_config is None:
        return {}
    return {_GENERATION_CONFIG: model.generation_config.to_json_string().encode()}
