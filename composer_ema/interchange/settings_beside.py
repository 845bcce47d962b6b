"""What stands beside weights in a folder: the model's config and its tokenizer, out of a checkpoint or given.

Invariant: what a checkpoint holds is written as a file and never executed.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from composer_ema.checkpoints.reading import mapping_in
from composer_ema.checkpoints.safely import CheckpointError
from composer_ema.model.names import listed
from composer_ema.wording import shown

CONFIG, ADAPTER_CONFIG = 'config.json', 'adapter_config.json'
# What a tokenizer, a processor or code of a model's own is kept in.
_ENDINGS = ('.json', '.txt', '.jinja', '.py', '.model')
# What else in a model's folder ends so.
_OF_TRAINING = ('trainer_state.json', 'all_results.json', 'train_results.json', 'eval_results.json')


@dataclass(frozen=True)
class Settings:
    """The config of a model, and the files that belong to it.

    Attributes:
        config: of the model, or of the adapter.
        where: where it was found, in the words of an error.
        class_name: of the model, by the checkpoint; empty where only the config may tell.
        files: further files by name.
    """

    config: dict[str, Any]
    where: str
    class_name: str = ''
    files: dict[str, bytes] = field(default_factory=dict)


def given(path: Path, name: str = CONFIG) -> Settings:
    """The config in a file, or in a folder as a library writes it, with the files beside it there.

    Args:
        path: of the file or the folder.
        name: of the file in a folder.

    Raises:
        CheckpointError: there is none, or it is no JSON.
    """
    file = path / name if path.is_dir() else path
    if not file.is_file():
        raise CheckpointError(f'config={str(path)!r}: there is no file {file}. Pass a {name}, or a folder with one.')
    try:
        config = json.loads(file.read_bytes())
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f'{file} is no JSON: {error}. Pass a {name}, or a folder with one.') from error
    if not isinstance(config, dict):
        raise CheckpointError(f'{file} holds a {type(config).__name__}, not settings by name. Pass a {name}.')
    return Settings(config, str(file), files=_beside(path, name) if path.is_dir() else {})


def _beside(folder: Path, config: str) -> dict[str, bytes]:
    names = [file for file in sorted(folder.iterdir()) if file.suffix in _ENDINGS and file.is_file()]
    left_out = {config, CONFIG, ADAPTER_CONFIG, *_OF_TRAINING}
    return {
        file.name: file.read_bytes()
        for file in names
        if file.name not in left_out and not file.name.endswith('.index.json')
    }


def in_checkpoint(held: Any, path: Path) -> Settings | None:
    """What Composer's HuggingFaceModel put into a checkpoint; None where it did not.

    Args:
        held: what ``read_file`` returned for ``path``.
        path: the checkpoint.

    Raises:
        CheckpointError: it is not as HuggingFaceModel writes it.
    """
    state = _kept(held)
    if state is None:
        return None
    try:
        config = mapping_in(mapping_in(state, 'model'), 'config')
        files = dict(_file(name, each) for name, each in mapping_in(state, 'tokenizer', optional=True).items())
        content = _plain(mapping_in(config, 'content'))
    except (ValueError, LookupError, TypeError, RecursionError) as error:
        raise CheckpointError(f'{path} holds a config that cannot be read: {error} Pass config=.') from error
    name = config.get('class')
    return Settings(content, f'the config in {path}', name if isinstance(name, str) else '', files)


def adapter_in_checkpoint(held: Any, path: Path) -> Settings | None:
    """Likewise, the settings of the adapter of HuggingFaceModel(peft_config=...)."""
    state = _kept(held)
    if state is None:
        return None
    try:
        config = mapping_in(mapping_in(state, 'model'), 'peft_config', optional=True)
        content = _plain(mapping_in(config, 'content', optional=True))
    except (ValueError, TypeError, RecursionError) as error:
        raise CheckpointError(f'{path} holds an adapter that cannot be read: {error} Pass config=.') from error
    return Settings(content, f'the config of the adapter in {path}') if content else None


def as_json(content: Any) -> bytes:
    """As Hugging Face's libraries write their settings."""
    return (json.dumps(content, indent=2, sort_keys=True, ensure_ascii=False) + '\n').encode()


def _kept(held: Any) -> Mapping[str, Any] | None:
    for key in ('state', 'integrations', 'huggingface'):
        held = held.get(key) if isinstance(held, Mapping) else None
    return held if isinstance(held, Mapping) else None


def _file(name: Any, saved: Any) -> tuple[str, bytes]:
    """One file of a tokenizer, whose content Composer keeps by its ending."""
    ending, content = saved['file_extension'], saved['content']
    if not isinstance(name, str):
        raise TypeError(f'{shown(name)} is no name of a file of a tokenizer.')
    if ending not in _ENDINGS:
        raise ValueError(f'{name!r} of its tokenizer ends in {shown(ending)}, not in {listed(_ENDINGS)}.')
    name = name if name.endswith(ending) else f'{name}{ending}'
    if name != Path(name).name or '\\' in name or name.startswith('.') or name == CONFIG:
        raise ValueError(f'{name!r} is no name of a file of a tokenizer.')
    if ending == '.json':  # in its own order, which is that of a vocabulary
        return name, json.dumps(_plain(content), indent=2, ensure_ascii=False).encode()
    content = '\n'.join(content) if ending == '.txt' else content
    if not isinstance(content, bytes if ending == '.model' else str):
        raise TypeError(f'{name!r} of its tokenizer is a {type(content).__name__}.')
    return name, content if isinstance(content, bytes) else content.encode()


def _plain(content: Any) -> Any:
    """Dictionaries and lists of plain values, which a sharded checkpoint reads piece by piece."""
    if isinstance(content, Mapping):
        return {str(key): _plain(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [_plain(value) for value in content]
    if content is None or isinstance(content, str | int | float):
        return content
    raise TypeError(f'there is a {type(content).__name__} in its settings.')
