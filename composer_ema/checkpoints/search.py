"""Finds averages in the nested dictionaries of a file, each by the path of its keys.

A path joins keys and the positions in lists with dots: ``optimizer_states.0.ema``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor

from composer_ema.checkpoints import states
from composer_ema.model.names import listed
from composer_ema.shadow import foreign

# Deeper than any trainer nests; a file may nest without end, or hold itself.
_MAX_DEPTH = 8
_OF_AN_OPTIMIZER = {'state', 'param_groups'}


def at(held: Any, key: str) -> Any:
    """What lies under ``key`` in ``held``. A key may hold dots of its own.

    Raises:
        ValueError: there is nothing.
    """
    found = list(_at(held, key))
    if not found:
        keys = [path for path, _ in _walk(held, depth=2) if path]
        raise ValueError(f'there is nothing under the key {key!r}. The outer keys are {listed(keys) or "none"}.')
    return found[0]


def averages(held: Any) -> dict[str, Mapping[str, Any]]:
    """Every average of a known kind in ``held``, by its path; ``''`` where it is ``held`` itself."""
    return {path: value for path, value in _walk(held) if _is_average(value)}


def weights(held: Any) -> dict[str, Mapping[str, Tensor]]:
    """Every dictionary of tensors by name in ``held``, outside of averages, by its path."""
    return {path: value for path, value in _walk(held) if not _is_average(value) and is_weights(value)}


def is_weights(value: Any) -> bool:
    """Whether ``value`` is a state dict: tensors by name, and what modules add of their own."""
    return (
        isinstance(value, Mapping)
        and all(isinstance(name, str) for name in value)
        and any(isinstance(each, Tensor) for each in value.values())
        and all(isinstance(each, Tensor) or foreign.is_extra_state(name) for name, each in value.items())
    )


def _is_average(value: Any) -> bool:
    return isinstance(value, Mapping) and (states.recognise(value) is not None or foreign.is_read(value))


def _at(held: Any, key: str) -> Iterator[Any]:
    for name, value in _items(held):
        if name == key:
            yield value
        elif key.startswith(f'{name}.'):
            yield from _at(value, key[len(name) + 1 :])


def _walk(held: Any, depth: int = _MAX_DEPTH) -> Iterator[tuple[str, Any]]:
    """``held`` and every container in it, each once, outer ones first; averages and state dicts are not entered."""
    seen, level = {id(held)}, [('', held)]
    for _ in range(depth):
        yield from level
        below = []
        for path, value in level:
            if _is_average(value) or is_weights(value):
                continue
            # What an optimizer remembers of each parameter is no state dict.
            passed_over = _OF_AN_OPTIMIZER if isinstance(value, Mapping) and value.keys() >= _OF_AN_OPTIMIZER else ()
            for name, each in _items(value):
                if name in passed_over:
                    continue
                if isinstance(each, (Mapping, list, tuple)) and id(each) not in seen:
                    seen.add(id(each))
                    below.append((f'{path}.{name}' if path else name, each))
        level = below


def _items(held: Any) -> list[tuple[str, Any]]:
    if isinstance(held, Mapping):
        return [(str(key), value) for key, value in held.items()]
    return [(str(i), value) for i, value in enumerate(held)] if isinstance(held, (list, tuple)) else []
