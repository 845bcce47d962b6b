"""The algorithm's state in a checkpoint: its version, and one function that upgrades every older format.

A state is plain strings, numbers, lists, dictionaries and tensors, so that ``torch.load(weights_only=True)`` reads it::

    {'version': 1, 'repr': ..., 'config': {...}, 'started': bool,
     'averages': {'ema': {'version', 'parameters', 'buffers', 'num_updates', 'aliases', 'last_update'}},
     'training_weights': {...}}          # only in a checkpoint taken while a model held the average

The average of :class:`composer_ema.SWA` is called ``'swa'``, and its state has further keys that are named there.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from torch import Tensor

from composer_ema.model.names import listed
from composer_ema.model.sharding import canonical_name

#: The format that this release writes, and reads without upgrading.
VERSION = 1
#: The name under which the one average of :class:`composer_ema.EMA` is stored.
AVERAGE = 'ema'
#: The algorithms that keep an average, by the name under which each stores its own.
ALGORITHMS = {AVERAGE: 'EMA', 'swa': 'SWA'}

_BUILTIN_EMA, _BUILTIN_SWA = 'the saved EMA state', 'the saved SWA state'


def upgrade(
    state: Mapping[str, Any],
    *,
    model_slot: Mapping[str, Tensor],
    tracked: Collection[str] | None = None,
    buffers: Collection[str] = (),
    name: str = AVERAGE,
) -> dict[str, Any]:
    """Returns ``state`` in the current format; the given one is not changed.

    Read besides our own are the formats of Composer's built-in algorithms of the same names. Both formats of its EMA
    store the average in a checkpoint's model slot, and the training weights in the algorithm's, when they were saved at
    a checkpoint event; that is undone here, so the average is always the average and the training weights become the
    stash. Its SWA stores a whole averaged model.

    Args:
        state: an algorithm state, as ``state['algorithms']`` of a checkpoint holds it.
        model_slot: the weights that came with it in the model slot, by canonical name.
        tracked: names of the parameters to take; None takes whatever the state has.
        buffers: names of the model's buffers, which some formats do not tell from parameters.
        name: what the algorithm calls its average, a key of :data:`ALGORITHMS`.

    Raises:
        ValueError: no known format, or a newer version.
    """
    what = f'the saved {ALGORITHMS[name]} state'
    if not isinstance(state, Mapping):
        raise ValueError(f'{what} is a {type(state).__name__}, not a dictionary.')
    if 'version' in state:
        upgraded = {'config': {}, **state}
        version = state['version']
        if type(version) is not int or version != VERSION:
            raise ValueError(
                f'{what} has format version {version!r}, this release reads up to {VERSION}. '
                'Install a newer composer_ema.'
            )
    elif name == 'swa' and {'swa_model', 'swa_started'} <= state.keys():
        upgraded = _upgrade_builtin_swa(state, model_slot, tracked, buffers)
    elif name == AVERAGE and {'ema_model', 'ema_weights_active', 'ema_started'} <= state.keys():
        upgraded = _upgrade_builtin(state, model_slot, tracked, buffers)
    else:
        raise ValueError(f'{what} is of no known format: it has the keys {listed(sorted(map(str, state)))}.')
    _check(upgraded, name, what)
    return upgraded


def _check(state: Mapping[str, Any], name: str, what: str) -> None:
    """Raises a ValueError unless every part of a current state is of its type."""
    _expect(state, 'config', Mapping, what)
    _expect(state, 'started', bool, what)
    averages = _expect(state, 'averages', Mapping, what)
    if averages and averages.keys() != {name}:
        raise ValueError(f'{what} holds the averages {listed(sorted(map(str, averages)))}, not {name!r}.')
    for average in averages.values():
        if not isinstance(average, Mapping):
            raise ValueError(f'the saved average {name!r} is a {type(average).__name__}, not a dictionary.')
        _expect(average, 'num_updates', int, what)
        for key, kind in (('parameters', Tensor), ('buffers', Tensor), ('aliases', str)):
            _expect_named(average, key, kind, what)
        if 'last_update' not in average:
            raise ValueError(f"{what} lacks 'last_update'.")
    if 'training_weights' in state:
        _expect_named(state, 'training_weights', Tensor, what)


def _expect(state: Mapping[str, Any], key: str, kind: type, what: str) -> Any:
    value = state.get(key)
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise ValueError(f'{key!r} of {what} is a {type(value).__name__}, not a {kind.__name__}.')
    return value


def _expect_named(state: Mapping[str, Any], key: str, kind: type, what: str) -> Mapping[str, Any]:
    named = _expect(state, key, Mapping, what)
    for name, value in named.items():
        if not isinstance(name, str) or not isinstance(value, kind):
            raise ValueError(
                f'{key!r} of {what} maps {name!r} to a {type(value).__name__}, not a name to a {kind.__name__}.'
            )
    return named


def _upgrade_builtin(
    state: Mapping[str, Any],
    model_slot: Mapping[str, Tensor],
    tracked: Collection[str] | None,
    buffers: Collection[str],
) -> dict[str, Any]:
    is_swapped = bool(state['ema_weights_active'])
    if 'training_model' in state:  # up to Composer 0.12, which kept two whole models
        average = _expect_named(state, 'ema_model', Tensor, _BUILTIN_EMA)
        training = _expect_named(state, 'training_model', Tensor, _BUILTIN_EMA) if is_swapped else None
    else:
        ema_model = _expect(state, 'ema_model', Mapping, _BUILTIN_EMA)
        held_buffers = _expect_named(ema_model, 'named_buffers_dict', Tensor, _BUILTIN_EMA)
        held = {**_expect_named(ema_model, 'named_parameters_dict', Tensor, _BUILTIN_EMA), **held_buffers}
        buffers = {*buffers, *_user_names(held_buffers, model_slot)}
        average, training = (model_slot, held) if is_swapped else (held, None)

    average = _user_names(average, model_slot)
    training = None if training is None else _user_names(training, model_slot)
    wanted = set(average if training is None else training)
    parameters = {name for name in wanted if name not in buffers and (tracked is None or name in tracked)}
    upgraded = _first_of_ours(
        AVERAGE,
        bool(state['ema_started']),
        # The built-in does not count; one is enough for the average to be used.
        int(bool(state['ema_started'])),
        {name: average[name] for name in sorted(parameters) if name in average},
        {name: average[name] for name in sorted(wanted.intersection(buffers)) if name in average},
    )
    if training is not None:
        names = parameters | wanted.intersection(buffers)
        upgraded['training_weights'] = {name: tensor for name, tensor in training.items() if name in names}
    return upgraded


def _upgrade_builtin_swa(
    state: Mapping[str, Any],
    model_slot: Mapping[str, Tensor],
    tracked: Collection[str] | None,
    buffers: Collection[str],
) -> dict[str, Any]:
    averaged = _expect_named(state, 'swa_model', Tensor, _BUILTIN_SWA)
    count, started = averaged.get('n_averaged'), _expect(state, 'swa_started', bool, _BUILTIN_SWA)
    if count is None:
        raise ValueError(f"'swa_model' of {_BUILTIN_SWA} lacks 'n_averaged'.")
    # An AveragedModel keeps the model that it was given as `module`.
    held = {name.removeprefix('module.'): tensor for name, tensor in averaged.items() if name != 'n_averaged'}
    average = _user_names(held, model_slot)
    parameters = {n: t for n, t in average.items() if n not in buffers and (tracked is None or n in tracked)}
    return _first_of_ours('swa', started, int(count), parameters, {n: average[n] for n in buffers if n in average})


def _first_of_ours(
    name: str, started: bool, num_updates: int, parameters: dict[str, Tensor], buffers: dict[str, Tensor]
) -> dict[str, Any]:
    average = {
        'version': VERSION,
        'num_updates': num_updates,
        'parameters': parameters,
        'buffers': buffers,
        'aliases': {},
        'last_update': None,
    }
    return {'version': VERSION, 'config': {}, 'started': started, 'averages': {name: average}}


def _user_names(tensors: Mapping[str, Tensor], model_slot: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """``tensors`` under the names of ``model_slot``: the built-in keeps DDP's ``module.`` where it met the wrapper."""
    named = {canonical_name(name): tensor for name, tensor in tensors.items()}
    stripped = {name.removeprefix('module.'): tensor for name, tensor in named.items()}
    is_wrapped = all(name.startswith('module.') for name in named) and len(stripped.keys() & model_slot.keys()) > len(
        named.keys() & model_slot.keys()
    )
    return stripped if is_wrapped else named
