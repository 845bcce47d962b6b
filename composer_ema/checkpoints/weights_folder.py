"""Reads folders of safetensors as Hugging Face's libraries write them: one file, or several and an index."""

from __future__ import annotations

import json
from pathlib import Path

from composer_ema.checkpoints.safely import CheckpointError
from composer_ema.model.names import listed

#: How transformers, diffusers and PEFT name a file of weights, without its ending.
TRANSFORMERS, DIFFUSERS, PEFT = 'model', 'diffusion_pytorch_model', 'adapter_model'
SAFETENSORS = '.safetensors'
#: The end of the name of an index: ``model.safetensors.index.json``.
INDEX = f'{SAFETENSORS}.index.json'


def files_of_weights(folder: Path) -> list[Path]:
    """The files of weights in such a folder; none where it is no such folder.

    Raises:
        CheckpointError: its index is damaged, or a file of the index is missing.
    """
    for stem in (TRANSFORMERS, DIFFUSERS, PEFT):
        if (folder / f'{stem}{INDEX}').is_file():
            return [folder / name for name in _in_index(folder / f'{stem}{INDEX}')]
        if (folder / f'{stem}{SAFETENSORS}').is_file():
            return [folder / f'{stem}{SAFETENSORS}']
    return []


def _in_index(index: Path) -> list[str]:
    try:
        places = json.loads(index.read_bytes())['weight_map']
        names = list(dict.fromkeys(places.values()))
        if not all(name == Path(name).name for name in names):
            raise ValueError
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f'{index} is damaged: it does not say which file has which tensor.') from error
    if missing := [name for name in names if not (index.parent / name).is_file()]:
        raise CheckpointError(f'{index.parent} lacks {listed(missing)}, of which {index.name} tells. Copy all of it.')
    return names
