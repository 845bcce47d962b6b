"""The state of EMAOptimizer: its format, the upgrade of older ones, and whether a state fits."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from composer_ema.model.names import listed
from composer_ema.profiles import FUNCTION, check_start_share
from composer_ema.shadow import state as states
from composer_ema.wrapper import ParameterGroups

#: Version of what :meth:`EMAOptimizer.ema_state_dict` returns. Versions 1 and 2 are still read.
EMA_STATE_VERSION = 3

VERSION, NUM_STEPS, LAST_UPDATE, SETTINGS, AVERAGES = 'version', 'num_steps', 'last_update', 'settings', 'averages'
#: Of each average. The state of a single one without a label has these keys beside those above.
STARTED_AT, START_SHARE, DESCRIPTION, PROFILE, AVERAGE = (
    'started_at', 'start_share', 'description', 'profile', 'average'
)  # fmt: skip
#: The label of a single average that was given none.
SINGLE = 'ema'
_OF_ONE = (STARTED_AT, START_SHARE, DESCRIPTION, PROFILE, AVERAGE)
_POSITION = re.compile(r'\d+\.\d+', re.ASCII)
# Settings that a state of version 1 may lack, and the values that were in force then.
_DEFAULT_SETTINGS = {'average': 'exponential', 'start': 0}


def upgraded(state: Mapping[str, Any]) -> dict[str, Any]:
    """Returns ``state`` in the current version, with every average by its label under ``'averages'``.

    Version 1 had one number for all profiles, version 2 neither description nor share of the start.

    Raises:
        ValueError: another version, or an entry of another kind.
    """
    version = state.get(VERSION) if isinstance(state, Mapping) else None
    if type(version) is not int or not 1 <= version <= EMA_STATE_VERSION:
        raise ValueError(
            f'the state has format version {version!r}, this release reads 1 to {EMA_STATE_VERSION}. '
            'Nothing was loaded.'
            + (' Pass what ema_state_dict() returned; this is something else.' if version is None else '')
        )
    if version == 1:
        state = _of_version_2(state)
    if version < EMA_STATE_VERSION:
        settings = _expect(state, SETTINGS, Mapping)
        state = {**state, START_SHARE: None, DESCRIPTION: _described(settings)}
    if AVERAGES in state:
        return {**state}
    averages = {SINGLE: {key: state[key] for key in _OF_ONE if key in state}}
    return {**{key: value for key, value in state.items() if key not in _OF_ONE}, AVERAGES: averages}


def _of_version_2(state: Mapping[str, Any]) -> dict[str, Any]:
    log_kept, settings = state.get('log_kept'), _expect(state, SETTINGS, Mapping)
    if not isinstance(log_kept, float) or not log_kept <= 0:
        raise ValueError(f"the state's 'log_kept' is {log_kept!r}, not a number of at most 0. Nothing was loaded.")
    return {
        **{name: value for name, value in state.items() if name != 'log_kept'},
        STARTED_AT: 0,  # the age of an average does not matter to the profiles of version 1
        SETTINGS: {**_DEFAULT_SETTINGS, **settings},
        PROFILE: {'log_kept': log_kept} if settings.get('bias_correction') else {},
    }


def _described(settings: Mapping[str, Any]) -> str:
    """The description of the profile that the settings of version 1 or 2 made."""
    if settings.get('average') != 'exponential':
        return 'equal' if settings.get('average') == 'equal' else FUNCTION
    made = next((f'{name}={settings[name]}' for name in ('half_life', 'power', 'decay') if settings.get(name)), '')
    return f'{made},bias_correction' if settings.get('bias_correction') else made


def check_state(state: Mapping[str, Any]) -> None:
    """Raises a ValueError unless every entry of ``state`` has the right kind and range; the averages check themselves.

    Args:
        state: in the current version, as :func:`upgraded` returns it.
    """
    for key, kind in ((NUM_STEPS, int), (LAST_UPDATE, int), (SETTINGS, Mapping), (AVERAGES, Mapping)):
        _expect(state, key, kind)
    if not 0 <= state[LAST_UPDATE] <= state[NUM_STEPS]:
        raise ValueError(
            f'the state has its last update at step {state[LAST_UPDATE]} of {state[NUM_STEPS]}; the update must lie '
            'in [0, steps]. Nothing was loaded.'
        )
    if not state[AVERAGES]:
        raise ValueError("the state's 'averages' are empty. Nothing was loaded.")
    for label, average in state[AVERAGES].items():
        if not isinstance(label, str) or not isinstance(average, Mapping):
            raise ValueError(
                f"the state's average {label!r} is a {type(average).__name__}, not a Mapping. Nothing was loaded."
            )
        for key, kind in ((STARTED_AT, int), (DESCRIPTION, str), (PROFILE, Mapping), (AVERAGE, Mapping)):
            _expect(average, key, kind)
        if START_SHARE not in average:
            raise ValueError(f"the state's average {label!r} lacks {START_SHARE!r}. Nothing was loaded.")
        try:
            check_start_share(average[START_SHARE], "the state's 'start_share'")
        except ValueError as error:
            raise ValueError(f'{error} Nothing was loaded.') from error
        if not 0 <= average[STARTED_AT] <= state[LAST_UPDATE]:
            raise ValueError(
                f'the state has its start at step {average[STARTED_AT]} and its last update at step '
                f'{state[LAST_UPDATE]}; the start must lie in [0, last update]. Nothing was loaded.'
            )


def _expect(state: Mapping[str, Any], key: str, kind: type) -> Any:
    if not isinstance(value := state.get(key), kind) or isinstance(value, bool):
        raise ValueError(f"the state's {key!r} is a {type(value).__name__}, not a {kind.__name__}. Nothing was loaded.")
    return value


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
