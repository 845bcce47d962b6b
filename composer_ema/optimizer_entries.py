"""Averages as entries of an optimizer's state by parameter, beside ``exp_avg``: what torch's checkpoint functions keep.

The functions of ``torch.distributed.checkpoint.state_dict`` keep an optimizer's ``state`` and ``param_groups`` and
nothing else. In ``state`` they give each parameter its name, and they gather, split and reshard its tensors; where they
flatten it, they take tensors, whole numbers and floats. So an average stands in ``state[parameter]`` of its parameter::

    {'step': ..., 'exp_avg': ..., 'average/ema': the average of this parameter}

Buffers, parameters that are frozen or that the optimizer does not step, and the counters stand with the first parameter
that requires a gradient. Keys join their parts with slashes: a dot would divide a key where the state is flattened.
"""

from __future__ import annotations

import functools
import json
import math
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from types import FrameType
from typing import Any

from torch import Tensor

from composer_ema.checkpoints.entries import ALL, ONE, is_entry, key_of, read
from composer_ema.model.sharding import cut, is_shard
from composer_ema.optimizer_state import (
    AVERAGE,
    AVERAGES,
    DESCRIPTION,
    LAST_UPDATE,
    NUM_STEPS,
    PROFILE,
    SETTINGS,
    START_SHARE,
    STARTED_AT,
    VERSION,
    upgraded,
)
from composer_ema.shadow.state import ALIASES, BUFFERS, NUM_UPDATES, PARAMETERS, SECTIONS, SEED

_TORCH = 'torch.distributed.checkpoint.state_dict'
# What may stand between that module and ours on the stack: our own wrappers, the ``step`` of a scheduler, and the
# optimizer of accelerate around ours.
_BETWEEN = ('composer_ema', 'torch.optim', 'accelerate.optimizer')

#: What the state of an optimizer holds for each of its parameters.
Entries = Mapping[Tensor, Mapping[str, Any]]


def asker() -> FrameType | None:
    """The call of a function of ``torch.distributed.checkpoint.state_dict`` that has called this package, if one has.

    Those functions drop all but two keys of ``optimizer.state_dict()``, and read ``optimizer.state`` to learn which
    entries a flattened state had. Everybody else gets the average under a key of its own, and the wrapped optimizer's
    own ``state``.
    """
    frame = sys._getframe(1)
    while frame is not None:
        name = frame.f_globals.get('__name__', '')
        if not name.startswith(_BETWEEN):
            return frame if name == _TORCH else None
        frame = frame.f_back
    return None


class WithEntries(Mapping[Tensor, Mapping[str, Any]]):
    """The state of an optimizer, read with the entries of averages; as long, and so as empty, as without them.

    Args:
        state: of the wrapped optimizer.
        entries: returns what stands beside it. Called once, when the first parameter is looked up.
        asker: the call that reads it, which may look up every parameter by itself.
    """

    def __init__(self, state: Entries, entries: Callable[[], Entries], asker: FrameType) -> None:
        self.asker = asker
        self._state, self._make_entries = state, entries

    @functools.cached_property
    def _entries(self) -> Entries:
        return self._make_entries()

    def __getitem__(self, parameter: Tensor) -> Mapping[str, Any]:
        return _beside(self._state.get(parameter, {}), self._entries.get(parameter, {}))

    def __iter__(self) -> Iterator[Tensor]:
        return iter(self._state)

    def __len__(self) -> int:
        return len(self._state)


def entries_of(
    state: Mapping[str, Any], names: Mapping[Tensor, str], groups: Sequence[Mapping[str, Any]]
) -> dict[Tensor, dict[str, Any]]:
    """The averages of ``state`` by the parameter with which they stand; tensors are aliased.

    Args:
        state: what :meth:`EMAOptimizer.ema_state_dict` returns, of a model that holds its training weights.
        names: the canonical names of the model's parameters.
        groups: of the optimizer.
    """
    stepped = [parameter for group in groups for parameter in group['params'] if parameter.requires_grad]
    if not stepped:
        return {}
    owners = {names[parameter]: parameter for parameter in stepped if parameter in names}
    entries: dict[Tensor, dict[str, Any]] = {parameter: {} for parameter in stepped}
    first, state = entries[stepped[0]], upgraded(state)
    first |= {key_of(ALL, counter): state[counter] for counter in (VERSION, NUM_STEPS, LAST_UPDATE)}
    first[key_of(ALL, SETTINGS)] = _digest(state[SETTINGS])
    for label, saved in state[AVERAGES].items():
        average, share = saved[AVERAGE], saved[START_SHARE]
        numbers = {
            STARTED_AT: saved[STARTED_AT],
            START_SHARE: math.nan if share is None else float(share),
            DESCRIPTION: _digest(saved[DESCRIPTION]),
            NUM_UPDATES: average[NUM_UPDATES],
            SEED: average[SEED],
        }
        first |= {key_of(ONE, label, name): number for name, number in numbers.items()}
        first |= {key_of(ONE, label, PROFILE, name): float(number) for name, number in saved[PROFILE].items()}
        first |= {key_of(ONE, label, ALIASES, *pair): 1 for pair in average.get(ALIASES, {}).items()}
        for kind in SECTIONS:
            for name, tensor in average.get(kind, {}).items():
                if kind == BUFFERS or name not in owners:
                    first[key_of(ONE, label, kind, name)] = tensor
                else:
                    own = (ONE, label) if kind == PARAMETERS else (ONE, label, kind)
                    entries[owners[name]][key_of(*own)] = tensor
    return entries


def joined(saved: Mapping[str, Any], entries: Entries, groups: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What ``state_dict()`` of an optimizer returned, with the entries of averages in its ``state``.

    Args:
        saved: with ``state`` and ``param_groups``. Not changed.
        entries: by parameter.
        groups: of the optimizer, with its parameters.
    """
    state = dict(saved['state'])
    for key, parameter in _keys(saved, groups).items():
        if own := entries.get(parameter):
            state[key] = _beside(state.get(key, {}), own)
    return {**saved, 'state': state}


def split(
    state: Mapping[str, Any], groups: Sequence[Mapping[str, Any]]
) -> tuple[dict[str, Any], dict[Tensor, dict[str, Any]]]:
    """The inverse of :func:`joined`: the state of an optimizer without the entries of averages, and these.

    Args:
        state: with ``state`` and ``param_groups``. Not changed.
        groups: of the optimizer, with its parameters.
    """
    kept, found = {}, {}
    parameters = _keys(state, groups)
    for key, own in state.get('state', {}).items():
        entries = {name: value for name, value in own.items() if is_entry(name)}
        rest = _beside(own, {})
        if entries and key in parameters:
            found[parameters[key]] = entries
        if rest or not entries:  # an optimizer would take an empty state for one that it has begun
            kept[key] = rest
    return ({**state, 'state': kept} if found else dict(state)), found


def laid_out(state: Mapping[str, Any], groups: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The state of an optimizer, whose whole tensors are cut as the parameters of their shape are sharded.

    Args:
        state: with ``state`` and ``param_groups``. Not changed.
        groups: of the optimizer, with its parameters.
    """
    kept = dict(state.get('state', {}))
    for key, parameter in _keys(state, groups).items():
        if key in kept and is_shard(parameter):
            kept[key] = {
                name: cut(value, parameter)
                if isinstance(value, Tensor) and not is_shard(value) and value.shape == parameter.shape
                else value
                for name, value in kept[key].items()
            }
    return {**state, 'state': kept}


def state_of(
    found: Entries, names: Mapping[Tensor, str], settings: Mapping[str, Any], descriptions: Iterable[str]
) -> dict[str, Any]:
    """The inverse of :func:`entries_of`: a state as :meth:`EMAOptimizer.ema_state_dict` returns it.

    Entries hold a digest of each text. Where that is the digest of a text of ours, the saved text was the same;
    otherwise the settings are empty, and the description says no more than that it is another one.

    Args:
        found: entries by their parameter, as :func:`split` returns them.
        names: the canonical names of the model's parameters.
        settings: those of the optimizer that loads.
        descriptions: those of its averages.

    Raises:
        ValueError: the counters are missing.
    """
    unnamed = 'a parameter without a name'
    common, averages = read((names.get(parameter, unnamed), entries) for parameter, entries in found.items())
    if VERSION not in common:
        raise ValueError(
            'the state of the optimizer holds averages without their counters, which stand with the first parameter '
            'that requires a gradient. Nothing was loaded. Pass the whole state of an optimizer of the same parameters.'
        )
    texts: dict[Any, str] = {_digest(text): text for text in descriptions}
    for average in averages.values():
        digest = average.get(DESCRIPTION)
        average[DESCRIPTION] = texts.get(digest, f'another profile, of which only the digest {digest} was saved')
    is_alike = common.get(SETTINGS) == _digest(settings)
    return {**common, SETTINGS: dict(settings) if is_alike else {}, AVERAGES: averages}


def _keys(state: Mapping[str, Any], groups: Sequence[Mapping[str, Any]]) -> dict[Any, Tensor]:
    """Each key of an optimizer's saved state, a number or a name, with the parameter in that place of its groups."""
    saved = [key for group in state.get('param_groups', ()) for key in group['params']]
    return dict(zip(saved, (parameter for group in groups for parameter in group['params']), strict=False))


def _beside(own: Mapping[str, Any], entries: Mapping[str, Any]) -> dict[str, Any]:
    """What an optimizer keeps for a parameter, with entries in place of those that a bare one has loaded."""
    return {**{name: value for name, value in own.items() if not is_entry(name)}, **entries}


def _digest(value: Any) -> int:
    """A number that tells texts and plain settings apart."""
    return zlib.crc32(json.dumps(value, sort_keys=True, default=str).encode())
