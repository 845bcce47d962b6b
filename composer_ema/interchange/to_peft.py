"""Writes the average of an adapter alone, as PEFT does, whose ``PeftModel.from_pretrained`` loads it."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from composer_ema.checkpoints.safely import CheckpointError
from composer_ema.checkpoints.weights_folder import PEFT
from composer_ema.interchange import settings_beside
from composer_ema.interchange.model_folder import write_folder
from composer_ema.interchange.settings_beside import ADAPTER_CONFIG, Settings
from composer_ema.interchange.wanted import Wanted
from composer_ema.model.names import listed

FORMAT = 'peft'
#: What PEFT calls a kind of adapter, and how the names of its parameters begin.
PREFIXES = {
    'LORA': 'lora_', 'IA3': 'ia3_', 'LOHA': 'hada_', 'LOKR': 'lokr_', 'OFT': 'oft_',
    'BOFT': 'boft_', 'HRA': 'hra_', 'LN_TUNING': 'ln_tuning_',
}  # fmt: skip
# PEFT's own module, in which the names of every PeftModel stand.
_MODEL = 'base_model.'
_DORA = '.lora_magnitude_vector'


def write(wanted: Wanted, out: Path, config: Path | None) -> dict[str, str]:
    """Writes the folder and returns what was written with the tensors.

    Raises:
        CheckpointError: there is no config of an adapter, or of a kind that is not written; the average holds no
            adapter, or several; the folder cannot be written.
    """
    settings = _settings(wanted, config)
    kind = settings.config.get('peft_type')
    if not isinstance(kind, str) or kind not in PREFIXES:
        raise CheckpointError(
            f"{settings.where} is of an adapter of the kind {kind!r}; written are {', '.join(PREFIXES)}. Call PEFT's "
            'save_pretrained with the average in the model: with shadow.swapped(model).'
        )
    weights, facts = wanted.read()
    bias = settings.config.get('bias', 'none')
    adapter = adapter_in(weights, PREFIXES[kind], bias if isinstance(bias, str) else 'none', str(wanted.path))
    metadata = wanted.metadata(facts)
    # As PEFT saves it, so that what is loaded is not trained unless that is asked for.
    content = {**settings.config, 'inference_mode': True}
    files = {ADAPTER_CONFIG: settings_beside.as_json(content)}
    write_folder(adapter, metadata, str(wanted.path), out, stem=PEFT, files=files)
    return metadata


def _settings(wanted: Wanted, config: Path | None) -> Settings:
    if config is None and (wanted.path / ADAPTER_CONFIG).is_file():  # a folder that PEFT or transformers saved
        config = wanted.path
    if config is not None:
        return settings_beside.given(config, ADAPTER_CONFIG)
    found = settings_beside.adapter_in_checkpoint(wanted.held, wanted.path)
    if found is None:
        raise CheckpointError(
            f'{wanted.path} holds no config of an adapter: only HuggingFaceModel(peft_config=...) of Composer keeps '
            'one in its checkpoints. Pass config=, an adapter_config.json or a folder with one (--config FOLDER): '
            'model.peft_config["default"].save_pretrained(FOLDER) writes it.'
        )
    return found


def adapter_in(weights: Mapping[str, Any], prefix: str, bias: str, what: str) -> dict[str, Tensor]:
    """The tensors of the adapter among ``weights``, under the names that PEFT writes.

    Args:
        weights: of the whole model, or of the adapter alone.
        prefix: how the names of the adapter's own parameters begin, as in :data:`PREFIXES`.
        bias: which biases of the model belong to it: ``'none'``, ``'all'``, or those of its layers, ``'lora_only'``.
        what: the weights, in the words of an error.

    Raises:
        CheckpointError: there is no adapter, or several.
    """
    own = {name[name.index(_MODEL) :]: tensor for name, tensor in weights.items() if _is_of_peft(name, tensor)}
    layers = re.compile(rf'(?P<layer>.*?)\.{prefix}\w+\.(?P<adapter>[^.]+)(?:\.\w+)?')
    found = {name: match for name in own if (match := layers.fullmatch(name))}
    adapters = sorted({match['adapter'] for match in found.values()})
    if len(adapters) != 1:
        raise CheckpointError(
            f'{what} holds {f"the adapters {listed(adapters)}" if adapters else "no adapter of this kind"}: its names '
            f'are {listed(list(weights), 4)}. Average a PeftModel with one adapter.'
        )
    [adapter] = adapters
    layers_of_adapter = {match['layer'] for match in found.values()}
    written = {}
    for name, tensor in own.items():
        if f'.{adapter}.' in f'{name}.':
            written[_without(adapter, name)] = tensor
        elif _is_bias_of(name, bias, layers_of_adapter):
            written[name] = tensor
    return written


def _is_of_peft(name: str, tensor: Any) -> bool:
    return isinstance(tensor, Tensor) and (name.startswith(_MODEL) or f'.{_MODEL}' in name)


def _is_bias_of(name: str, bias: str, layers: Collection[str]) -> bool:
    if bias == 'all':
        return name.endswith('.bias') and '.original_module.' not in name
    return bias != 'none' and name.endswith('.base_layer.bias') and name.removesuffix('.base_layer.bias') in layers


def _without(adapter: str, name: str) -> str:
    """The name without the adapter's, which may be another one in the model that loads it."""
    whole = name.replace(f'.modules_to_save.{adapter}.', '.')
    if whole != name:
        return whole
    head, _, last = name.rpartition(f'.{adapter}')
    # A vector of DoRA became a module of PEFT's, but not in its files.
    return head if head.endswith(_DORA) else f'{head}{last}'
