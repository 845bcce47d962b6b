"""The state of EMAOptimizer: its format, the upgrade of older ones, and whether a state fits."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from composer_ema.model.names import listed
from composer_ema.shadow import state as states
from composer_ema.wrapper import ParameterGroups

#: Version of what :meth:`EMAOptimizer.ema_state_dict` returns. Version 1 is still read.
EMA_STATE_VERSION = 2

VERSION, NUM_STEPS, LAST_UPDATE, STARTED_AT, SETTINGS, PROFILE, AVERAGE = (
    'version', 'num_steps', 'last_update', 'started_at', 'settings', 'profile', 'average'
)  # fmt: skip
_POSITION = re.compile(r'\d+\.\d+', re.ASCII)
# Settings that a state of version 1 may lack, and the values that were in force then.
_DEFAULT_SETTINGS = {'average': 'exponential', 'start': 0}


def upgraded(state: Mapping[str, Any]) -> Mapping[str, Any]:
    """Returns ``state`` in the current version, or raises a ValueError. Version 1 had one number for all profiles."""
    version = state.get(VERSION) if isinstance(state, Mapping) else None
    if type(version) is not int or version not in (1, EMA_STATE_VERSION):
        raise ValueError(
            f'the state has format version {version!r}, this release reads 1 and {EMA_STATE_VERSION}. '
            'Nothing was loaded.'
            + (' Pass what ema_state_dict() returned; this is something else.' if version is None else '')
        )
    if version == EMA_STATE_VERSION:
        return state
    log_kept, settings = state.get('log_kept'), state.get(SETTINGS)
    if not isinstance(log_kept, float) or not log_kept <= 0:
        raise ValueError(f"the state's 'log_kept' is {log_kept!r}, not a number of at most 0. Nothing was loaded.")
    if not isinstance(settings, Mapping):
        raise ValueError(f"the state's 'settings' is a {type(settings).__name__}, not a Mapping. Nothing was loaded.")
    return {
        **{name: value for name, value in state.items() if name != 'log_kept'},
        VERSION: EMA_STATE_VERSION,
        STARTED_AT: 0,  # the age of an average does not matter to the profiles of version 1
        SETTINGS: {**_DEFAULT_SETTINGS, **settings},
        PROFILE: {'log_kept': log_kept} if settings.get('bias_correction') else {},
    }


def check_state(state: Mapping[str, Any]) -> None:
    """Raises a ValueError unless every entry of ``state`` has the right kind and range; the average checks itself."""
    kinds: dict[str, Any] = dict.fromkeys((NUM_STEPS, LAST_UPDATE, STARTED_AT), int)
    kinds |= dict.fromkeys((SETTINGS, PROFILE, AVERAGE), Mapping)
    for key, kind in kinds.items():
        if not isinstance(value := state.get(key), kind) or isinstance(value, bool):
            raise ValueError(
                f"the state's {key!r} is a {type(value).__name__}, not a {kind.__name__}. Nothing was loaded."
            )
    if not 0 <= state[LAST_UPDATE] <= state[NUM_STEPS]:
        raise ValueError(
            f'the state has its last update at step {state[LAST_UPDATE]} of {state[NUM_STEPS]}; the update must lie '
            'in [0, steps]. Nothing was loaded.'
        )
    if not 0 <= state[STARTED_AT] <= state[LAST_UPDATE]:
        raise ValueError(
            f'the state has its start at step {state[STARTED_AT]} and its last update at step {state[LAST_UPDATE]}; '
            'the start must lie in [0, last update]. Nothing was loaded.'
        )


def check_naming(average: Mapping[str, Any], names: Sequence[str], module: nn.Module) -> None:
    """Raises a ValueError if names are loaded where there is only position, or positions where there are names."""
    saved = average.get('parameters')
    if not isinstance(saved, Mapping) or not saved or not names or not saved.keys().isdisjoint(names):
        return
    is_numbered = all(isinstance(name, str) and _POSITION.fullmatch(name) for name in saved)
    shown = listed(sorted(map(str, saved)), limit=3)
    if isinstance(module, ParameterGroups) and not module.has_names and not is_numbered:
        raise ValueError(
            f'the saved average has the names of its parameters, {shown}, and this optimizer knows only their order. '
            'Build EMAOptimizer with model=, or the wrapped optimizer from model.named_parameters() (torch 2.6). '
            'Nothing was loaded.'
        )
    if not isinstance(module, ParameterGroups) and is_numbered:
        raise ValueError(
            f'the saved average has no names, only group and position, {shown}: it was saved by an optimizer without '
            'model=, and this one goes by name. Build the wrapped optimizer from model.named_parameters() (torch 2.6) '
            'and leave model= out, which takes it over by position; what that saves has names. Nothing was loaded.'
        )


def renamed(average: Mapping[str, Any], positions: Mapping[str, str]) -> Mapping[str, Any]:
    """A saved average under the names of now, where it was saved under group and position."""
    saved = average.get('parameters')
    if (
        not isinstance(saved, Mapping)
        or saved.keys() <= set(positions.values())
        or not saved.keys() <= positions.keys()
    ):
        return average
    kinds = [kind for kind in ('parameters', states.TRAINING_WEIGHTS) if isinstance(average.get(kind), Mapping)]
    return {
        **average,
        **{kind: {positions.get(name, name): tensor for name, tensor in average[kind].items()} for kind in kinds},
    }
