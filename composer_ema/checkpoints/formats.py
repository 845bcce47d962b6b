"""The state of an averaging algorithm in a checkpoint: its format, and the upgrade of every older or foreign one.

A state is plain strings, numbers, lists, dictionaries and tensors, so that ``torch.load(weights_only=True)`` reads it::

    {'version': 3, 'repr': ..., 'config': {...}, 'started': bool,
     'averages': {label: {'parameters', 'buffers', 'aliases', 'num_updates', 'seed',
                          'last_update', 'started_at', 'first_update', 'start_share', 'profile'}},
     'training_weights': {...}}          # only in a state taken while a model held an average

A checkpoint of the Trainer never has ``training_weights``: it holds them as the model. Older ones have them if the
model was saved with an average in it.

``last_update``, ``started_at`` and ``first_update`` are clocks, time by unit, or None where they are not known.
``start_share`` is how much of the average is still its start, or None. ``profile`` holds the profile's ``description``
and what it remembers. A compensated average also has ``compensations``, the Kahan terms by name; any average loads with
them or without. An algorithm may add further keys of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from numbers import Real
from typing import Any

from torch import Tensor

from composer_ema.checkpoints import sharded_format
from composer_ema.kernels.rules import is_inexact
from composer_ema.model.names import listed
from composer_ema.model.wrappers import canonical_name
from composer_ema.profiles import FUNCTION, check_start_share

#: The format that this release writes, and reads without upgrading.
VERSION = 3
VERSION_KEY, STASH = 'version', 'training_weights'
#: Where a state lists the labels of averages that are kept for another purpose than to be used, if it has any.
HIDDEN = 'hidden'

State = Mapping[str, Any]
# From here on no count is real, torch holds no such integer, and Python may refuse to print it.
_NO_COUNT = 2**63
# How long a list or a mapping may be among settings, by how deep others may lie in it.
_LONGEST = {1: 100, 2: 10_000}


@dataclass(frozen=True)
class ModelSlot:
    """What came with a state in a checkpoint's place for the model, and what is known of that model.

    Args:
        tensors: the weights, by canonical name.
        tracked: names of the parameters to take from formats that hold more. Default: all that the state has.
        buffers: names of the model's buffers, which some formats do not tell from parameters.
    """

    tensors: Mapping[str, Tensor]
    tracked: Collection[str] | None = None
    buffers: Collection[str] = ()

    def takes(self, name: str) -> bool:
        """Whether ``name`` is a parameter to take."""
        return name not in self.buffers and (self.tracked is None or name in self.tracked)


@dataclass(frozen=True)
class Format:
    """One row of :data:`FORMATS`.

    Args:
        written_as: the format in words.
        matches: whether a state is of this format, as far as its keys tell.
        label: what the average is called in the upgraded state. None: the state has labels of its own.
        upgrade: ``upgrade(state, slot, label, what)`` returns the state in the current format and does not change the
            given one; ``what`` is the state in the words of an error.
        counts_updates: whether the number of updates is known.
        tells_slot: whether the state says when the model slot holds the average.
        copies_whole_buffers: whether buffers of whole numbers are copies. Composer averages and cuts them.
    """

    written_as: str
    matches: Callable[[State], bool]
    label: str | None
    upgrade: Callable[[State, ModelSlot, str | None, str], dict[str, Any]]
    counts_updates: bool = True
    tells_slot: bool = True
    copies_whole_buffers: bool = True


def recognise(state: Any) -> Format | None:
    """The format of an algorithm's state; None if it is not the state of an averaging algorithm."""
    return next((row for row in FORMATS if row.matches(state)), None) if isinstance(state, Mapping) else None


def find(algorithms: Mapping[str, Any]) -> dict[str, Format]:
    """The averaging algorithms among the states of a checkpoint, found by what their states look like."""
    found = {name: recognise(state) for name, state in algorithms.items()}
    return {name: row for name, row in found.items() if row is not None}


def upgrade(
    state: State,
    *,
    model_slot: Mapping[str, Tensor],
    tracked: Collection[str] | None = None,
    buffers: Collection[str] = (),
    what: str = 'the saved state',
) -> dict[str, Any]:
    """Returns ``state`` in the current format; the given one is not changed.

    Read are our own versions and the formats of Composer's built-in EMA and SWA. Composer's EMA stores the average in a
    checkpoint's model slot, and the training weights in the algorithm's state, if it saves at a checkpoint event. That
    is undone here: the average is always the average, and the training weights become the stash. Composer's SWA stores
    a whole averaged model.

    Args:
        state: an algorithm state, as ``state['algorithms']`` of a checkpoint holds it.
        model_slot: the weights that came with it in the model slot, by canonical name.
        tracked: names of the parameters to take. Default: all that the state has.
        buffers: names of the model's buffers, which some formats do not tell from parameters.
        what: the state, in the words of an error.

    Raises:
        ValueError: no known format, a newer version, or a part of the wrong type.
    """
    if not isinstance(state, Mapping):
        raise ValueError(f'{what} is a {type(state).__name__}, not a dictionary.')
    if sharded_format.is_split(state):
        raise ValueError(
            f'{what} is that of a sharded checkpoint, whose tensors lie beside it. Pass the folder to the Trainer as '
            'load_path, or read it by load_average(folder).'
        )
    row = recognise(state)
    if row is None:
        if VERSION_KEY in state:
            _refuse_version(state, what)
        raise ValueError(f'{what} is of no known format: it has the keys {listed(sorted(map(str, state)))}.')
    upgraded = row.upgrade(state, ModelSlot(model_slot, tracked, buffers), row.label, what)
    _check(upgraded, what)
    return upgraded


def kind(config: State, profile: str) -> str:
    """How an average was made, in words.

    Args:
        config: the algorithm's arguments.
        profile: the ``description`` of its profile.
    """
    function = config.get('avg_fn') or config.get('multi_avg_fn')
    if function is not None:
        return f'average by {function}'
    kinds = {'equal': 'equal average', **dict.fromkeys(('power', 'gamma'), 'power function average')}
    return kinds.get(profile.partition('=')[0], 'exponential moving average')


def config_of(config: State, label: str) -> dict[str, Any]:
    """The algorithm's arguments as they are for one average: of those given by label, its own value or none."""
    own = {
        name: value.get(label) if name in _BY_LABEL and isinstance(value, Mapping) else value
        for name, value in config.items()
    }
    if any(isinstance(config.get(name), Mapping) for name in _BY_LABEL) and not any(map(own.get, _EXPONENTIAL)):
        own |= dict.fromkeys(_OF_EXPONENTIAL & own.keys())  # one value for all exponential averages, which this is not
    return own


def config_in(state: State, label: str) -> dict[str, Any]:
    """The same for an average in a current state; one that is kept for snapshots has a profile of its own."""
    if label not in state.get(HIDDEN, ()):
        return config_of(state['config'], label)
    name, _, value = state['averages'][label]['profile']['description'].partition('=')
    others = {argument: value for argument, value in state['config'].items() if argument not in _BY_LABEL}
    return {**others, name: value, 'kept_for': 'snapshots'}


# Arguments that may map labels to values; those that make an exponential average, and those that are for such a one.
_EXPONENTIAL, _OF_EXPONENTIAL = ('half_life', 'smoothing'), {'warmup', 'bias_correction'}
_BY_LABEL = (*_EXPONENTIAL, 'power', 'gamma', 'average', *_OF_EXPONENTIAL)


def check_plain(settings: State, what: str) -> None:
    """Raises a ValueError unless ``settings`` maps names to numbers, strings, None, or lists and mappings of these.

    They are compared, printed and written as JSON, which a tensor among them would break.
    """
    for name, value in settings.items():
        if not isinstance(name, str) or not _is_plain(value):
            raise ValueError(
                f'{what} maps {name!r} to a {type(value).__name__}, not a name to a number, a string, None, or a list '
                'or mapping of these.'
            )


def check_count(value: Any, key: str, what: str) -> None:
    """Raises a ValueError unless ``value`` is a whole number of at least 0 that a 64-bit integer holds."""
    if type(value) is not int or not 0 <= value < _NO_COUNT:
        raise ValueError(f'{key!r} of {what} is {shown(value)}, not a count.')


def _is_plain(value: Any, depth: int = 2) -> bool:
    if isinstance(value, int):
        return abs(value) < _NO_COUNT
    if value is None or isinstance(value, (str, Real)):
        return True
    if depth == 0 or not isinstance(value, (Mapping, list, tuple)) or len(value) > _LONGEST[depth]:
        return False  # a list may hold itself, many times
    if isinstance(value, Mapping):
        return all(_is_plain(key, 0) and _is_plain(each, depth - 1) for key, each in value.items())
    return all(_is_plain(each, depth - 1) for each in value)


def shown(value: Any) -> str:
    """A value that a file has in the wrong place, in an error: a number or None as it is, else of which type it is."""
    if isinstance(value, str):
        return repr(value[:100])
    is_short = value is None or (isinstance(value, Real) and _is_plain(value))
    return repr(value) if is_short else f'a {type(value).__name__}'


def _check_clock(average: State, key: str, what: str) -> None:
    """Raises a ValueError unless an average has time by unit, or None, under ``key``."""
    if key not in average:
        raise ValueError(f'{what} lacks {key!r}.')
    clock = average[key]
    if clock is None:
        return
    is_clock = isinstance(clock, Mapping) and all(
        isinstance(unit, str) and isinstance(time, Real) and _is_plain(time, 0) for unit, time in clock.items()
    )
    if not is_clock:
        raise ValueError(f'{key!r} of {what} is {shown(clock)}, not numbers by unit.')


def _refuse_version(state: State, what: str) -> None:
    version = state[VERSION_KEY]
    if not (_has_version(state, version) and 1 <= version <= VERSION):
        raise ValueError(
            f'{what} has format version {shown(version)}, this release reads up to {VERSION}. Install a newer '
            'composer_ema.'
        )


def _check(state: State, what: str) -> None:
    """Raises a ValueError unless every part of a current state is of its type."""
    check_plain(_expect(state, 'config', Mapping, what), f"'config' of {what}")
    _expect(state, 'started', bool, what)
    for label, average in _expect(state, 'averages', Mapping, what).items():
        if not isinstance(label, str):
            raise ValueError(f"'averages' of {what} has a {type(label).__name__} in place of a label.")
        if not isinstance(average, Mapping):
            raise ValueError(f'the saved average {label!r} is a {type(average).__name__}, not a dictionary.')
        check_count(average.get('num_updates'), 'num_updates', what)
        for key, kind in (('parameters', Tensor), ('buffers', Tensor), ('aliases', str)):
            _expect_named(average, key, kind, what)
        if 'compensations' in average:
            _expect_named(average, 'compensations', Tensor, what)
        _expect(_expect(average, 'profile', Mapping, what), 'description', str, f"'profile' of {what}")
        for key in ('last_update', 'started_at', 'first_update'):
            _check_clock(average, key, what)
        if 'start_share' not in average:
            raise ValueError(f"{what} lacks 'start_share'.")
        check_start_share(average['start_share'], f"'start_share' of {what}")
    if STASH in state:
        _expect_named(state, STASH, Tensor, what)
    hidden = state.get(HIDDEN, [])
    if not isinstance(hidden, list) or not all(isinstance(label, str) for label in hidden):
        raise ValueError(f'{HIDDEN!r} of {what} is {shown(hidden)}, not a list of labels.')


def _expect(state: State, key: str, kind: type, what: str) -> Any:
    value = state.get(key)
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise ValueError(f'{key!r} of {what} is a {type(value).__name__}, not a {kind.__name__}.')
    return value


def _expect_named(state: State, key: str, kind: type, what: str) -> Mapping[str, Any]:
    named = _expect(state, key, Mapping, what)
    for name, value in named.items():
        if not isinstance(name, str) or not isinstance(value, kind):
            raise ValueError(
                f'{key!r} of {what} maps {name!r} to a {type(value).__name__}, not a name to a {kind.__name__}.'
            )
    return named


# The formats, newest first


def _has_version(state: State, version: Any) -> bool:
    return type(state[VERSION_KEY]) is int and state[VERSION_KEY] == version


def _is_ours(state: State) -> bool:
    return {VERSION_KEY, 'averages'} <= state.keys()


def _pass_through(state: State, slot: ModelSlot, label: str | None, what: str) -> dict[str, Any]:
    del slot, label, what
    return {'config': {}, **state}


# What versions 1 and 2, and other libraries, did not keep.
_NOT_KEPT = {'first_update': None, 'start_share': None}


def _upgrade_version_2(state: State, slot: ModelSlot, label: str | None, what: str) -> dict[str, Any]:
    del slot, label
    averages = {}
    for name, average in _expect(state, 'averages', Mapping, what).items():
        if not isinstance(average, Mapping):
            raise ValueError(f'the saved average {name!r} is a {type(average).__name__}, not a dictionary.')
        averages[name] = {**average, **_NOT_KEPT}
    return {'config': {}, **state, VERSION_KEY: VERSION, 'averages': averages}


def _upgrade_version_1(state: State, slot: ModelSlot, label: str | None, what: str) -> dict[str, Any]:
    """Version 1 versioned each average as well, and did not keep when it started or by which profile."""
    del slot, label
    config = _expect({'config': {}, **state}, 'config', Mapping, what)
    averages = {}
    for name, average in _expect(state, 'averages', Mapping, what).items():
        if not isinstance(average, Mapping):
            raise ValueError(f'the saved average {name!r} is a {type(average).__name__}, not a dictionary.')
        if not _has_version({VERSION_KEY: None, **average}, 1):
            raise ValueError(f'the saved average {name!r} has format version {shown(average.get(VERSION_KEY))}, not 1.')
        kept = {key: value for key, value in average.items() if key != VERSION_KEY}
        averages[name] = {**kept, **_NOT_KEPT, 'started_at': None, 'profile': {'description': _description(config)}}
    return {**state, VERSION_KEY: VERSION, 'config': config, 'averages': averages}


def _refuse_newer(state: State, slot: ModelSlot, label: str | None, what: str) -> dict[str, Any]:
    del slot, label
    _refuse_version(state, what)
    raise AssertionError('every version up to the current one has a row')


def _description(config: State) -> str:
    """The profile of an average of version 1, as far as its arguments tell."""
    for name in ('half_life', 'smoothing'):
        if config.get(name) is not None:
            return f'{name}={config[name]}'
    return FUNCTION if config.get('avg_fn') or config.get('multi_avg_fn') else 'equal'


def _upgrade_builtin_ema(state: State, slot: ModelSlot, label: str | None, what: str) -> dict[str, Any]:
    is_swapped, has_started = (_expect(state, key, bool, what) for key in ('ema_weights_active', 'ema_started'))
    buffers = set(slot.buffers)
    if _keeps_two_models(state):
        average = _expect_named(state, 'ema_model', Tensor, what)
        training = _expect_named(state, 'training_model', Tensor, what) if is_swapped else None
    else:
        ema_model = _expect(state, 'ema_model', Mapping, what)
        held_buffers = _expect_named(ema_model, 'named_buffers_dict', Tensor, what)
        held = {**_expect_named(ema_model, 'named_parameters_dict', Tensor, what), **held_buffers}
        buffers |= _user_names(held_buffers, slot.tensors).keys()
        average, training = (slot.tensors, held) if is_swapped else (held, None)

    average = _user_names(average, slot.tensors)
    training = None if training is None else _user_names(training, slot.tensors)
    wanted = set(average if training is None else training)
    known = ModelSlot(slot.tensors, slot.tracked, buffers)
    parameters = {name for name in wanted if known.takes(name)}
    upgraded = _as_ours(
        label,
        has_started,
        # The built-in does not count; one is enough for the average to be used.
        int(has_started),
        {name: average[name] for name in sorted(parameters) if name in average},
        {name: average[name] for name in sorted(wanted & buffers) if name in average},
        'exponential',
    )
    if training is not None:
        names = parameters | (wanted & buffers)
        upgraded[STASH] = {name: tensor for name, tensor in training.items() if name in names}
    return upgraded


def _is_builtin_ema(state: State) -> bool:
    return {'ema_model', 'ema_weights_active', 'ema_started'} <= state.keys()


def _keeps_two_models(state: State) -> bool:
    return 'training_model' in state


def _upgrade_builtin_swa(state: State, slot: ModelSlot, label: str | None, what: str) -> dict[str, Any]:
    started = _expect(state, 'swa_started', bool, what)
    if state['swa_model'] is None and not started:
        return {VERSION_KEY: VERSION, 'config': {}, 'started': False, 'averages': {}}
    averaged = _expect_named(state, 'swa_model', Tensor, what)
    count = averaged.get('n_averaged')
    if count is None:
        raise ValueError(f"'swa_model' of {what} lacks 'n_averaged'.")
    if count.numel() != 1 or count.is_meta or is_inexact(count):
        raise ValueError(f"'n_averaged' of {what} is no single number.")
    # An AveragedModel keeps the model that it was given as `module`.
    held = {name.removeprefix('module.'): tensor for name, tensor in averaged.items() if name != 'n_averaged'}
    average = _user_names(held, slot.tensors)
    parameters = {name: tensor for name, tensor in average.items() if slot.takes(name)}
    buffers = {name: average[name] for name in slot.buffers if name in average}
    return _as_ours(label, started, int(count), parameters, buffers, 'equal')


def _as_ours(
    label: str | None,
    started: bool,
    num_updates: int,
    parameters: dict[str, Tensor],
    buffers: dict[str, Tensor],
    description: str,
) -> dict[str, Any]:
    average = {
        'num_updates': num_updates,
        'parameters': parameters,
        'buffers': buffers,
        'aliases': {},
        'last_update': None,
        'started_at': None,
        **_NOT_KEPT,
        'profile': {'description': description},
    }
    return {VERSION_KEY: VERSION, 'config': {}, 'started': started, 'averages': {label: average}}


def _user_names(tensors: Mapping[str, Tensor], model_slot: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """``tensors`` under the names of ``model_slot``: the built-in keeps DDP's ``module.`` where it met the wrapper."""
    named = {canonical_name(name): tensor for name, tensor in tensors.items()}
    stripped = {name.removeprefix('module.'): tensor for name, tensor in named.items()}
    is_wrapped = all(name.startswith('module.') for name in named) and len(stripped.keys() & model_slot.keys()) > len(
        named.keys() & model_slot.keys()
    )
    return stripped if is_wrapped else named


#: Every format that is read; the first that matches counts.
FORMATS: tuple[Format, ...] = (
    Format('composer_ema, version 3', lambda s: _is_ours(s) and _has_version(s, VERSION), None, _pass_through),
    Format('composer_ema, version 2', lambda s: _is_ours(s) and _has_version(s, 2), None, _upgrade_version_2),
    Format('composer_ema, version 1', lambda s: _is_ours(s) and _has_version(s, 1), None, _upgrade_version_1),
    Format('a newer composer_ema', _is_ours, None, _refuse_newer),
    Format(
        "Composer's own, up to 0.12, which kept two models",
        lambda s: _is_builtin_ema(s) and _keeps_two_models(s),
        'ema',
        _upgrade_builtin_ema,
        counts_updates=False,
        copies_whole_buffers=False,
    ),
    Format(
        "Composer's own",
        _is_builtin_ema,
        'ema',
        _upgrade_builtin_ema,
        counts_updates=False,
        copies_whole_buffers=False,
    ),
    Format(
        "Composer's own",
        lambda s: {'swa_model', 'swa_started'} <= s.keys(),
        'swa',
        _upgrade_builtin_swa,
        tells_slot=False,  # it ends by putting its average there
        copies_whole_buffers=False,
    ),
)
