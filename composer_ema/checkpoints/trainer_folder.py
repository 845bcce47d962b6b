"""The checkpoint folder of transformers' Trainer, ``checkpoint-500``, in which WeightAverage keeps the average.

``model.safetensors`` and what else the Trainer saves there hold the training weights, the average is in a file beside.
"""

from __future__ import annotations

import json
from pathlib import Path

#: The file of the average.
AVERAGE = 'weight_average.pt'
# The Trainer's files of weights, whole; the indices of those that it splits; and the folder in which FSDP shards them.
_WHOLE = ('model.safetensors', 'pytorch_model.bin', 'adapter_model.safetensors', 'adapter_model.bin')
_INDICES = ('model.safetensors.index.json', 'pytorch_model.bin.index.json')
_SHARDED = 'pytorch_model_fsdp_0'


def is_trainer_folder(folder: Path) -> bool:
    """Whether ``folder`` is a checkpoint of transformers' Trainer with an average."""
    return (folder / AVERAGE).is_file()


def weights_of(folder: Path) -> list[Path]:
    """The files, or the sharded folder, of the training weights in a checkpoint; none if it has none.

    Raises:
        ValueError: the index of several files is damaged.
    """
    for name in _WHOLE:
        if (folder / name).is_file():
            return [folder / name]
    for name in _INDICES:
        if (folder / name).is_file():
            places = json.loads((folder / name).read_text()).get('weight_map')
            if not isinstance(places, dict) or not all(isinstance(place, str) for place in places.values()):
                raise ValueError(f'{folder / name} has no weight_map.')
            return [folder / Path(place).name for place in sorted(set(places.values()))]
    return [folder / _SHARDED] if (folder / _SHARDED).is_dir() else []


def files_of(folder: Path) -> list[Path]:
    """All files of a checkpoint, from which training resumes."""
    return sorted(file for file in folder.rglob('*') if file.is_file())
