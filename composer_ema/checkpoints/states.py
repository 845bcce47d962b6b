"""The states of EMAOptimizer, ShadowModel and an algorithm as they stand in files that Composer did not write."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from composer_ema.checkpoints import entries, formats
from composer_ema.checkpoints.checksum import CHECKSUM
from composer_ema.checkpoints.lazy_tensor import LazyTensor
from composer_ema.model.names import listed
from composer_ema.profiles import check_start_share
from composer_ema.shadow import state as shadow_state
from composer_ema.shadow.foreign import is_extra_state

#: The newest state of EMAOptimizer that is read.
OPTIMIZER_VERSION = 3
EXPORTED_KEY = 'composer_ema'
_OF_OPTIMIZER = {'version', 'num_steps', 'settings'}
# What is empty of it, as buffers may be, is not in a sharded checkpoint.
_OF_SHADOW = {'version', 'num_updates', 'parameters'}
_BY_POSITION = re.compile(r'(\d+)\.(\d+)', re.ASCII)
# Of the settings of EMAOptimizer, those that say how it averages.
_TOLD = ('decay', 'half_life', 'power', 'gamma', 'warmup', 'every_n_steps', 'bias_correction', 'start')


@dataclass(frozen=True)
class Average:
    """An average in a file that Composer did not write.

    Attributes:
        source: the class or the library that kept it.
        parameters: averaged parameters by canonical name; by position, ``'0.3'``, where :attr:`has_names` is False.
        buffers: averaged or copied buffers by canonical name.
        aliases: further names of tied tensors, each with the name it stands under.
        num_updates: updates so far; None where they are not counted.
        written_as: the format in words.
        kind: how it was averaged, in words.
        label: what an algorithm calls it.
        config: how it was averaged, as far as the state tells.
        facts: what else the file says of it.
        last_update: the clock of the last update by unit.
        stash: the training weights, where the state was taken while a model held the average.
        has_names: whether parameters have names, so that no model is needed to use them.
        is_by_parameter: whether it stands beside the moments of an optimizer, parameter by parameter.
    """

    source: str
    parameters: Mapping[str, Tensor]
    buffers: Mapping[str, Tensor] = field(default_factory=dict)
    aliases: Mapping[str, str] = field(default_factory=dict)
    num_updates: int | None = None
    written_as: str = ''
    kind: str = 'average'
    label: str | None = None
    config: Mapping[str, Any] = field(default_factory=dict)
    facts: Mapping[str, Any] = field(default_factory=dict)
    last_update: dict[str, float] | None = None
    stash: Mapping[str, Tensor] | None = None
    has_names: bool = True
    is_by_parameter: bool = False

    @property
    def tensors(self) -> dict[str, Tensor]:
        """Parameters and buffers, each under all of its names."""
        tensors = {**self.parameters, **self.buffers}
        return tensors | {alias: tensors[name] for alias, name in self.aliases.items() if name in tensors}


def recognise(state: Mapping[str, Any]) -> Callable[[Mapping[str, Any]], list[Average]] | None:
    """What reads ``state``, if its keys tell a state of ours; the reader raises a ValueError for a broken one."""
    if exported_with(state) is not None:
        return _read_exported
    keys = {key for key in state if isinstance(key, str)}
    if keys >= _OF_OPTIMIZER and not keys.isdisjoint({'average', 'averages'}):
        return _read_optimizer
    if keys >= {'version', 'averages'}:
        return _read_algorithm
    if keys >= _OF_SHADOW:
        return _read_shadow
    return _read_entries if entries.are_in(state) else None


def exported_with(state: Any) -> Mapping[str, str] | None:
    """What ``export`` wrote beside the weights; None for what it did not write."""
    metadata = getattr(state, EXPORTED_KEY, None)
    return metadata if isinstance(metadata, Mapping) else None


def tied(weights: Mapping[str, Any], averaged: Collection[str]) -> dict[str, str]:
    """Names in ``weights`` that share the memory of one in ``averaged``, each with that name.

    An average has one name for a tied weight, a state dict has all of them. A file of torch keeps what shares memory.
    """
    places = {place: name for name in averaged if (place := _place(weights.get(name))) is not None}
    return {
        name: places[place]
        for name, value in weights.items()
        if name not in averaged and (place := _place(value)) is not None and place in places
    }


def _place(value: Any) -> tuple[Any, ...] | None:
    """Where the values of a tensor lie; None for what has no values in memory."""
    if (
        not isinstance(value, Tensor)
        or isinstance(value, LazyTensor)
        or value.layout is not torch.strided
        or value.is_meta
        or value.numel() == 0
    ):
        return None
    return value.data_ptr(), value.dtype, value.shape, value.stride()


def _read_optimizer(state: Mapping[str, Any]) -> list[Average]:
    what = 'the state of EMAOptimizer'
    version = _version(state, OPTIMIZER_VERSION, what)
    settings, steps = _mapping(state, 'settings', what), state['num_steps']
    formats.check_plain(settings, f"'settings' of {what}")
    if type(steps) is not int:
        raise ValueError(f"'num_steps' of {what} is a {type(steps).__name__}, not an int.")
    formats.check_count(steps, 'num_steps', what)
    if 'averages' not in state:
        return [_of_optimizer(state, state, None, version)]
    averages = _mapping(state, 'averages', what)
    return [_of_optimizer(_mapping(averages, label, what), state, label, version) for label in averages]


def _of_optimizer(own: Mapping[str, Any], state: Mapping[str, Any], label: str | None, version: int) -> Average:
    """One of the averages of an EMAOptimizer, from what the state holds of it alone and of all."""
    what = 'the state of EMAOptimizer'
    [shadow] = _read_shadow(_mapping(own, 'average', what))
    settings, last_update = state['settings'], state.get('last_update')
    config = {name: settings[name] for name in _TOLD if settings.get(name) not in (None, False)}
    if label is not None:
        config = {name: value[label] if isinstance(value, Mapping) else value for name, value in config.items()
                  if not isinstance(value, Mapping) or label in value}  # fmt: skip
    facts = {**config, 'num_steps': state['num_steps']}
    share = check_start_share(own.get('start_share'), f"'start_share' of {what}")
    positional = bool(shadow.parameters) and all(map(_BY_POSITION.fullmatch, shadow.parameters))
    description = own.get('description')
    return Average(
        'EMAOptimizer',
        shadow.parameters,
        shadow.buffers,
        shadow.aliases,
        shadow.num_updates,
        written_as=f'composer_ema, version {version}' + (', which numbers the parameters' if positional else ''),
        kind=_kind_of(settings) if label is None else formats.kind({}, str(description)),
        label=label,
        config=config,
        facts=facts if share is None else {**facts, 'start_share': share},
        last_update={'steps': last_update} if type(last_update) is int else None,
        stash=shadow.stash,
        has_names=not positional,
    )


def _read_entries(state: Mapping[str, Any]) -> list[Average]:
    """Averages beside the moments of their parameters, whose settings torch's checkpoint functions could not keep."""
    what = 'the state of EMAOptimizer'
    common, averages = entries.read(entries.found_in(state).items())
    if 'version' not in common:
        raise ValueError(f'{what} holds averages without their counters, so a part of it is missing.')
    found = _read_optimizer({**common, 'settings': {}, 'averages': averages})
    return [
        dataclasses.replace(
            each,
            kind='average',
            label=None if len(found) == 1 else each.label,
            written_as=f'{each.written_as}, by parameter',
            is_by_parameter=True,
        )
        for each in found
    ]


def _kind_of(settings: Mapping[str, Any]) -> str:
    average = settings.get('average', 'exponential')
    if average == 'equal':
        return 'equal average'
    if average != 'exponential':
        return f'average by {average}'
    is_power = settings.get('power') is not None or settings.get('gamma') is not None
    return 'power function average' if is_power else 'exponential moving average'


def _read_shadow(state: Mapping[str, Any]) -> list[Average]:
    what = 'the state of ShadowModel'
    version = _version(state, shadow_state.VERSION, what)
    count = state.get('num_updates')
    formats.check_count(count, 'num_updates', what)
    state = {'buffers': {}, 'aliases': {}, **state}
    aliases = _mapping(state, 'aliases', what)
    if wrong := [name for name, value in aliases.items() if not isinstance(value, str)]:
        raise ValueError(f"'aliases' of {what} maps {listed(sorted(wrong))} to what is no name.")
    stash = None
    if shadow_state.TRAINING_WEIGHTS in state:
        stash = _tensors(state, shadow_state.TRAINING_WEIGHTS, what)
    return [
        Average(
            'ShadowModel',
            _tensors(state, 'parameters', what),
            _tensors(state, 'buffers', what),
            aliases,
            count,
            written_as=f'composer_ema, version {version}',
            stash=stash,
        )
    ]


def _read_algorithm(state: Mapping[str, Any]) -> list[Average]:
    upgraded = formats.upgrade(state, model_slot={}, what='the state of the algorithm')
    row = formats.recognise(state)
    assert row is not None
    stash = upgraded.get(formats.STASH)
    return [
        Average(
            str(state.get('repr', '')).partition('(')[0] or 'an algorithm',
            average['parameters'],
            average['buffers'],
            average['aliases'],
            average['num_updates'],
            written_as=row.written_as,
            kind=formats.kind(upgraded['config'], average['profile']['description']),
            label=label,
            config=(own := formats.config_in(upgraded, label)),
            facts={name: value for name, value in own.items() if value is not None},
            last_update=average['last_update'],
            stash=stash,
        )
        for label, average in upgraded['averages'].items()
    ]


def _read_exported(state: Mapping[str, Any]) -> list[Average]:
    metadata = exported_with(state)
    assert metadata is not None
    facts = {str(name): str(fact) for name, fact in metadata.items()}
    count = facts.pop('num_updates', '')
    kind, _, _ = facts.pop('weights', 'average'), facts.pop('format', None), facts.pop(CHECKSUM, None)
    command = 'merge' if 'merged_by' in facts else 'reconstruct' if 'predicted_error' in facts else 'export'
    return [
        Average(
            f'composer-ema {command}',
            _tensors({'weights': state}, 'weights', 'an export'),
            num_updates=int(count) if count.isascii() and count.isdecimal() else None,
            written_as=facts.pop('written_by', 'composer_ema'),
            kind=kind,
            config=facts,
            facts=facts,
        )
    ]


def _version(state: Mapping[str, Any], newest: int, what: str) -> int:
    version = state.get('version')
    if type(version) is not int or not 1 <= version <= newest:
        raise ValueError(
            f'{what} has format version {formats.shown(version)}, this release reads up to {newest}. Install a newer '
            'composer_ema.'
        )
    return version


def _mapping(state: Mapping[str, Any], key: str, what: str) -> Mapping[str, Any]:
    value = state.get(key)
    if not isinstance(value, Mapping) or not all(isinstance(name, str) for name in value):
        raise ValueError(f'{key!r} of {what} is a {type(value).__name__}, not a dictionary by name.')
    return value


def _tensors(state: Mapping[str, Any], key: str, what: str) -> Mapping[str, Tensor]:
    named = _mapping(state, key, what)
    if wrong := [name for name, value in named.items() if not isinstance(value, Tensor) and not is_extra_state(name)]:
        raise ValueError(f'{listed(sorted(wrong))} in {key!r} of {what} are no tensors.')
    return named
