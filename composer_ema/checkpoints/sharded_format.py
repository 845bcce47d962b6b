"""How a sharded checkpoint of Composer holds averages: the algorithm's state without its tensors, and these beside it.

torch.distributed.checkpoint pickles the states of all algorithms as one item of rank 0, in which a DTensor would be
rank 0's shard alone. It saves and lays out anew whatever is reached through dictionaries. So each tensor is an item at
``state / sharded_averages / EMA / label / parameters / name``, and the state of the algorithm keeps the names::

    {'version': 3, ..., 'averages': {label: {'parameters': {}, 'buffers': {}, ...}},
     'shards': {label: {'parameters': [name, ...], 'buffers': [...]}}}
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from composer_ema.model.names import listed
from composer_ema.shadow.state import SECTIONS

#: Where the names of the tensors stand in the state of an algorithm.
SHARDS = 'shards'
#: Where the tensors stand in a checkpoint's ``state``, by the algorithm's qualified name.
AVERAGES = 'sharded_averages'

#: Label to section to name to tensor.
Tensors = dict[str, dict[str, dict[str, Tensor]]]


def split(state: Mapping[str, Any]) -> tuple[dict[str, Any], Tensors]:
    """An algorithm's state in the current format as its plain part and its tensors, which are aliased.

    A state without averages is plain as it is. The given one is not changed.
    """
    tensors = {
        label: {section: dict(average[section]) for section in SECTIONS if section in average}
        for label, average in state['averages'].items()
    }
    if not tensors:
        return dict(state), {}
    averages = {}
    for label, average in state['averages'].items():
        averages[label] = {**average, **{section: {} for section in tensors[label]}}
    names = {label: {section: list(held) for section, held in own.items()} for label, own in tensors.items()}
    return {**state, 'averages': averages, SHARDS: names}, tensors


def is_split(state: Any) -> bool:
    """Whether an algorithm's state has its tensors elsewhere."""
    return isinstance(state, Mapping) and SHARDS in state


def names_in(state: Mapping[str, Any], what: str) -> dict[str, dict[str, list[str]]]:
    """Label to section to the names of the tensors that belong to a split state.

    Args:
        state: the plain part.
        what: it, in the words of an error.

    Raises:
        ValueError: the state is broken.
    """
    shards, averages = state[SHARDS], state.get('averages')
    if not isinstance(shards, Mapping) or not isinstance(averages, Mapping) or shards.keys() != averages.keys():
        raise ValueError(f'{SHARDS!r} of {what} does not list the tensors of its averages.')
    found: dict[str, dict[str, list[str]]] = {}
    for label, sections in shards.items():
        is_listed = isinstance(sections, Mapping) and sections.keys() <= set(SECTIONS)
        is_named = is_listed and all(map(_is_list_of_names, sections.values()))
        if not is_named or not isinstance(averages[label], Mapping):
            raise ValueError(f'{SHARDS!r} of {what} does not list the tensors of {label!r} by name.')
        found[label] = {section: list(names) for section, names in sections.items()}
    return found


def joined(state: Mapping[str, Any], tensors: Mapping[str, Any], what: str) -> dict[str, Any]:
    """The state that :func:`split` took apart.

    Args:
        state: the plain part.
        tensors: the other, as the checkpoint holds it under the algorithm's name: without empty dictionaries.
        what: the state, in the words of an error.

    Raises:
        ValueError: the state is broken, or a tensor is missing or something else.
    """
    averages = {}
    for label, sections in names_in(state, what).items():
        own = {each: _chosen(tensors, (label, each), names, what) for each, names in sections.items()}
        averages[label] = {**state['averages'][label], **own}
    return {**{key: value for key, value in state.items() if key != SHARDS}, 'averages': averages}


def _chosen(tensors: Mapping[str, Any], path: tuple[str, str], names: list[str], what: str) -> dict[str, Tensor]:
    held: Any = tensors
    for key in path:
        held = held.get(key, {}) if isinstance(held, Mapping) else {}
    if missing := [name for name in names if not isinstance(held, Mapping) or not isinstance(held.get(name), Tensor)]:
        raise ValueError(
            f'the checkpoint lacks {len(missing)} tensors of {path[0]!r} that {what} lists: {listed(missing)}. It is '
            'damaged, or was saved only in part.'
        )
    return {name: held[name] for name in names}


def _is_list_of_names(names: Any) -> bool:
    return isinstance(names, (list, tuple)) and all(isinstance(name, str) for name in names)
