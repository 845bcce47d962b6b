"""Averages as entries of an optimizer's state by parameter: how keys are built, and the averages that entries hold.

A key joins its parts with slashes, ``average/ema/buffers/norm%2Erunning_mean``: a dot would divide a key where the
state is flattened, as ``state.norm.weight.average/ema``.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any
from urllib.parse import quote, unquote

from composer_ema.model.wrappers import canonical_name
from composer_ema.shadow import state as states
from composer_ema.shadow.state import ALIASES, BUFFERS, COMPENSATIONS, NUM_UPDATES, PARAMETERS, SECTIONS, SEED

#: First part of the keys of one average, and of what all averages share.
ONE, ALL = 'average', 'averages'
_COUNTERS = (NUM_UPDATES, SEED)
_PROFILE, _AVERAGE = 'profile', 'average'
_STATE, _GROUPS = 'state', 'param_groups'


def key_of(*parts: str) -> str:
    """The key of an entry."""
    return '/'.join(quote(part, safe='').replace('.', '%2E') for part in parts)


def is_entry(name: Any) -> bool:
    """Whether a key of what an optimizer keeps for a parameter is that of an entry."""
    return isinstance(name, str) and name.startswith((f'{ONE}/', f'{ALL}/'))


def read(found: Iterable[tuple[str, Mapping[str, Any]]]) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """What all averages share, and each by its label as the state of EMAOptimizer has it.

    Args:
        found: the name of each parameter, and the entries that stand with it.
    """
    common: dict[str, Any] = {}
    averages: dict[str, dict[str, Any]] = {}
    for parameter, entries in found:
        for entry, value in entries.items():
            root, *path = map(unquote, entry.split('/'))
            if root == ALL:
                common['/'.join(path)] = value
            elif path:
                _put(averages.setdefault(path[0], _empty()), path[1:], parameter, value)
    return common, averages


def found_in(state: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The entries in what torch's checkpoint functions return of an optimizer, by the name of their parameter.

    Args:
        state: nested, or flattened by those functions.
    """
    found: dict[str, dict[str, Any]] = {}
    for name, entry, value in _all_in(state):
        found.setdefault(canonical_name(name), {})[entry] = value()
    return found


def are_in(state: Mapping[str, Any]) -> bool:
    """Whether there are any; reads none."""
    return next(_all_in(state), None) is not None


def _all_in(state: Mapping[str, Any]) -> Iterator[tuple[str, str, Any]]:
    of_parameters = state.get(_STATE) if _GROUPS in state else None
    if isinstance(of_parameters, Mapping):
        for name, own in of_parameters.items():
            for entry in own if isinstance(own, Mapping) else ():
                if is_entry(entry):
                    yield str(name), entry, lambda own=own, entry=entry: own[entry]
        return
    for flat in state:
        root, _, rest = flat.partition('.') if isinstance(flat, str) else ('', '', '')
        name, _, entry = rest.rpartition('.')
        if root == _STATE and is_entry(entry):
            yield name, entry, lambda flat=flat: state[flat]


def _empty() -> dict[str, Any]:
    return {_PROFILE: {}, _AVERAGE: {'version': states.VERSION, PARAMETERS: {}, BUFFERS: {}, ALIASES: {}}}


def _put(saved: dict[str, Any], path: list[str], name: str, value: Any) -> None:
    """Puts the value of an entry where the state of one average has it.

    Args:
        saved: that state.
        path: the parts of the key behind the label.
        name: of the parameter with which the entry stands.
        value: of the entry.
    """
    average = saved[_AVERAGE]
    match path:
        case []:
            average[PARAMETERS][name] = value
        case [kind] if kind == COMPENSATIONS:
            average.setdefault(kind, {})[name] = value
        case [kind, alias, other] if kind == ALIASES:
            average[kind][alias] = other
        case [kind, other] if kind in SECTIONS:
            average.setdefault(kind, {})[other] = value
        case [kind, number] if kind == _PROFILE:
            saved[kind][number] = value
        case [counter] if counter in _COUNTERS:
            average[counter] = value
        case [counter]:
            is_unknown = isinstance(value, float) and math.isnan(value)
            saved[counter] = None if is_unknown else value
