"""Nothing is half-loaded: any time and any changed state, contract, item 6."""

from __future__ import annotations

import copy
import functools
import math
from typing import Any

import numpy as np
import pytest
import torch
from composer import Time, Trainer
from composer.core import TimeUnit
from contract import (
    error_of,
)
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from toy import bits, make_trainer

from composer_ema import EMA

TIME_UNITS = ('ba', 'ep', 'sp', 'tok', 'iter', 'dur')


LEGAL_UNITS = {
    'half_life': TIME_UNITS,
    'ema_start': ('ba', 'ep', 'sp', 'tok', 'dur'),
    'update_interval': TIME_UNITS,
    'log_interval': TIME_UNITS,
}


numbers = st.one_of(
    st.integers(-3, 10**6).map(str),
    st.floats().map(repr),
    st.floats(0, 10).map(lambda f: f'{f:.3f}'),
    st.sampled_from(
        ['', '-', '.', '1_000', '٣', '½', 'nan', 'inf', '-inf', '1e400', '1e-320', '0x10', '+5', ' 7', '1,5']
    ),
)


units = st.one_of(
    st.sampled_from([*TIME_UNITS, 'BA', 'Ep', 's', 'sec', 'seconds', '', 'b', 'batch', 'ba ', ' ba', 'baa', 'ep\n']),
    st.text(max_size=3),
)


times = st.one_of(
    st.tuples(numbers, units).map(''.join),
    st.tuples(st.floats(0, 20).map(lambda f: f'{f:g}'), st.sampled_from(TIME_UNITS)).map(''.join),
    st.text(max_size=8),
    st.sampled_from([0, 1, 2.5, True, b'1ba', ['1ba'], {'1ba'}, object(), math.nan, Time(3, TimeUnit.BATCH)]),
    st.builds(Time, st.integers(-2, 5), st.sampled_from([TimeUnit.BATCH, TimeUnit.EPOCH, TimeUnit.SECOND])),
    st.builds(Time, st.floats(0, 1), st.just(TimeUnit.DURATION)),
)


def understood(text: Any) -> tuple[float, str] | None:
    """A time string read by other means: the longest known unit at its end, and Python's number before it."""
    if isinstance(text, Time):
        return text.value, text.unit.value
    stripped = text.strip().lower()
    for unit in sorted(TIME_UNITS, key=len, reverse=True):
        if stripped.endswith(unit):
            try:
                return float(stripped.removesuffix(unit)), unit
            except ValueError:
                return None
    return None


@pytest.mark.parametrize('argument', LEGAL_UNITS)
@given(time=times)
@settings(max_examples=150)
def test_a_time_gives_the_right_span_or_an_error_that_names_its_argument(argument, time):
    error = error_of(lambda: EMA(**{argument: time}))
    assert (error is None) == is_legal(argument, time)
    if error is not None:
        assert argument in str(error)
        return
    ema = EMA(**{argument: time})
    span = getattr(ema, argument)
    assert (span.value, span.unit) == understood(time)
    assert repr(eval(repr(ema), {'EMA': EMA})) == repr(ema)


def is_legal(argument: str, time: Any) -> bool:
    read = understood(time) if isinstance(time, (str, Time)) else None
    if read is None:
        return False
    value, unit = read
    is_whole = math.isfinite(value) and value == math.floor(value)
    may_be_zero = argument in ('half_life', 'ema_start')
    return (
        unit in LEGAL_UNITS[argument]
        and math.isfinite(value)
        and (is_whole or unit in ('ep', 'iter', 'dur'))
        and (value > 0 or (value == 0 and may_be_zero))
    )


@pytest.mark.parametrize('argument', LEGAL_UNITS)
@given(
    value=st.one_of(st.floats(0, allow_infinity=False, allow_nan=False), st.integers(0, 20), st.floats(0, 3)),
    unit=st.sampled_from(TIME_UNITS),
)
@example(value=5e-324, unit='ep')
@example(value=1.7e308, unit='dur')
@settings(max_examples=25, suppress_health_check=list(HealthCheck))
@pytest.mark.filterwarnings('ignore:.*is longer than the run:UserWarning')
@pytest.mark.filterwarnings('ignore:.*away in part:UserWarning')
@pytest.mark.filterwarnings('ignore:training ended before the first update:UserWarning')
@pytest.mark.filterwarnings('ignore:.*without an update_interval updates:UserWarning')
def test_a_run_with_any_legal_time_trains_or_says_which_argument_cannot_work(argument, value, unit):
    if error_of(lambda: EMA(**{argument: f'{value!r}{unit}'})) is not None:
        return
    ema = EMA(**{argument: f'{value!r}{unit}'})
    error = error_of(make_trainer([ema], max_duration='4ba').fit)
    if error is not None:
        assert argument in str(error)
        return
    state = ema.state_dict()['averages']['ema']
    for name, tensor in {**state['parameters'], **state['buffers']}.items():
        assert torch.isfinite(tensor).all(), name


@functools.cache
def trained() -> tuple[Trainer, EMA, dict[str, Any], dict[str, Any]]:
    """A Trainer after four batches; its algorithm; the state after two batches, and that of an open swap."""
    ema = EMA('2ba')
    trainer = make_trainer([ema])
    trainer.fit(duration='2ba')
    early = copy.deepcopy(ema.state_dict())
    ema.ema_model.swap_in(trainer.state.model)
    swapped = copy.deepcopy(ema.state_dict())
    ema.ema_model.swap_out(trainer.state.model)
    trainer.fit(duration='2ba')
    return trainer, ema, early, swapped


def all_of(ema: EMA) -> tuple:
    state = ema.state_dict()
    average = state['averages']['ema']
    stash = state.get('training_weights')
    return (
        bits({**average['parameters'], **average['buffers']}),
        average['num_updates'],
        average['last_update'],
        average['started_at'],
        average['profile'],
        average['aliases'],
        state['started'],
        None if stash is None else bits(stash),
    )


def paths_in(tree: Any, path: tuple = ()) -> list[tuple]:
    """The paths of everything in nested dictionaries."""
    found = []
    for key, value in tree.items() if isinstance(tree, dict) else ():
        found += [(*path, key), *paths_in(value, (*path, key))]
    return found


REMOVED = object()


def values_instead_of(value: Any) -> list[Any]:
    """What else may stand in the place of ``value``: nothing, another kind, for a tensor another shape or dtype."""
    others: list[Any] = [
        REMOVED, None, True, -1, 2, 3.5, math.nan, math.inf, 10**30, 'text', '', [], {}, [1, 2], {'a': 1}, np.ones(2),
        torch.zeros(()), torch.zeros(0), torch.zeros(3, 3), torch.ones(2), nn.Parameter(torch.ones(2)),
    ]  # fmt: skip
    if isinstance(value, Tensor):
        others += [value[None], value.new_zeros(7), value.to('meta'), value.to_sparse()]
        others += [
            value.to(dtype) for dtype in (torch.float64, torch.bfloat16, torch.int32, torch.bool, torch.complex64)
        ]
    return others


def changed(state: dict[str, Any], path: tuple, value: Any, new_name: Any = None) -> dict[str, Any]:
    """A copy of ``state`` with ``value`` at ``path``, or under another name at its place."""
    state = copy.deepcopy(state)
    parent = functools.reduce(lambda tree, key: tree[key], path[:-1], state)
    if value is REMOVED or new_name is not None:
        del parent[path[-1]]
    if value is not REMOVED:
        parent[path[-1] if new_name is None else new_name] = value
    return state


def value_at(state: dict[str, Any], path: tuple) -> Any:
    return functools.reduce(lambda tree, key: tree[key], path, state)


@pytest.fixture(scope='module')
def trained_run() -> tuple[Trainer, EMA, dict[str, Any], dict[str, Any]]:
    return trained()


QUIET = (
    'ignore:the checkpoint was averaged with:UserWarning',
    'ignore:the checkpoint holds the averages:UserWarning',  # of another label, from which the average continues
    'ignore:the saved average is:UserWarning',
)


@pytest.mark.filterwarnings(*QUIET)
@pytest.mark.parametrize('which', [2, 3], ids=['open', 'swapped'])
def test_a_state_with_any_one_change_loads_exactly_or_changes_nothing(trained_run, which):
    state = trained_run[which]
    for path in paths_in(state):
        value = value_at(state, path)
        changes = [(new, None) for new in values_instead_of(value)]
        changes += [(value, name) for name in ('other', f'module.{path[-1]}', '', 7)]
        for new, name in changes:
            loads_exactly_or_changes_nothing(changed(state, path, new, name))


@st.composite
def changed_states(draw: st.DrawFn) -> dict[str, Any]:
    """A real state with two or three changes anywhere in it."""
    state = draw(st.sampled_from(trained()[2:]))
    for _ in range(draw(st.integers(2, 3))):
        path = draw(st.sampled_from(paths_in(state)))
        values = values_instead_of(value_at(state, path))
        value = values[draw(st.integers(0, len(values) - 1))]
        state = changed(state, path, value, draw(st.sampled_from([None, None, 'other', 'version', 7])))
    return state


@pytest.mark.filterwarnings(*QUIET)
@pytest.mark.usefixtures('trained_run')
@given(state=changed_states())
@settings(max_examples=100, suppress_health_check=list(HealthCheck))
def test_a_state_with_several_changes_loads_exactly_or_changes_nothing(state):
    loads_exactly_or_changes_nothing(state)


def loads_exactly_or_changes_nothing(state: dict[str, Any]) -> None:
    _, ema, _, _ = trained()
    sound = copy.deepcopy(ema.state_dict())
    before = all_of(ema)
    error = error_of(lambda: ema.load_state_dict(state))
    if error is not None:
        assert type(error) is ValueError, error
        assert all_of(ema) == before, 'an error has changed the object'
        return
    try:
        check_loaded(ema, state, before, sound)
    finally:
        ema.load_state_dict(sound)
        assert all_of(ema) == before


def check_loaded(ema: EMA, state: dict[str, Any], before: tuple, sound: dict[str, Any]) -> None:
    if not state['averages']:  # saved before the Trainer was built: there is nothing to load
        assert all_of(ema) == before
        return
    loaded, [wanted] = ema.state_dict(), state['averages'].values()
    got = loaded['averages']['ema']
    assert type(got['num_updates']) is int
    assert got['num_updates'] == wanted['num_updates'] >= 0
    assert loaded['started'] is state['started']
    for moment in ('last_update', 'started_at'):
        if wanted[moment] is None:
            assert got[moment] is None
            continue
        clock = {unit: wanted[moment][unit] for unit in ('iter', 'ep', 'ba', 'sp', 'tok')}
        least = 0 if moment == 'last_update' else -math.inf  # a clock that was set back leaves a start before zero
        assert all(type(value) in (int, float) and math.isfinite(value) for value in clock.values())
        assert all(value >= least for value in clock.values())
        assert {unit: got[moment][unit] for unit in clock} == clock
    assert isinstance(wanted['profile']['description'], str)
    for group in ('parameters', 'buffers'):
        # A buffer that is copied from the model may be missing, and then keeps its value until the next update; one
        # that the model lacks is dropped then.
        ours, theirs = sound['averages']['ema'][group], wanted[group]
        kept = {'module.1.num_batches_tracked'} - theirs.keys() if group == 'buffers' else set()
        dropped = theirs.keys() - ours.keys() if group == 'buffers' else set()
        assert got[group].keys() == (theirs.keys() | kept) - dropped
        for name, tensor in got[group].items():
            same(tensor, ours[name] if name in kept else theirs[name])
    stash = state.get('training_weights')
    assert ema.ema_weights_active == (stash is not None)
    if stash is not None:
        model = trained()[0].state.model
        kept = copy.deepcopy(model.state_dict())
        ema.ema_model.swap_out(model)
        restored = copy.deepcopy(model.state_dict())
        model.load_state_dict(kept)
        assert stash.keys() <= restored.keys()
        assert restored.keys() - stash.keys() <= {'module.1.num_batches_tracked'}
        for name, tensor in stash.items():
            same(restored[name], tensor)


def same(loaded: Tensor, saved: Tensor) -> None:
    """The numbers of ``saved`` arrived, in whatever dtype it was saved."""
    assert (loaded.shape, saved.layout, saved.device.type) == (saved.shape, torch.strided, 'cpu')
    assert not saved.is_complex() or loaded.is_complex()
    assert not saved.is_floating_point() or loaded.is_floating_point() or loaded.is_complex()
    assert torch.equal(loaded, saved.to(loaded.dtype))


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        (lambda s: average_in(s)['parameters'].pop('module.5.bias'), 'missing: module.5.bias'),
        (lambda s: average_in(s)['parameters'].update(new=torch.ones(1)), 'unexpected: new'),
        (
            lambda s: average_in(s)['parameters'].update({'module.5.bias': torch.ones(7)}),
            r'5\.bias \(expected \(3,\), got \(7,\)',
        ),
        (lambda s: average_in(s)['buffers'].pop('module.1.running_var'), 'missing: module.1.running_var'),
        (lambda s: s.update(version=99), 'version 99'),
    ],
    ids=['missing parameter', 'new parameter', 'other shape', 'missing buffer', 'newer version'],
)  # fmt: skip
def test_a_checkpoint_that_does_not_fit_fails_by_name_when_the_trainer_is_built(trainer, tmp_path, change, message):
    run = trainer([EMA('2ba')])
    run.fit()
    run.save_checkpoint(str(tmp_path / 'good.pt'))
    checkpoint = torch.load(tmp_path / 'good.pt', weights_only=False)
    change(dict(checkpoint['state']['algorithms'])['EMA'])
    torch.save(checkpoint, tmp_path / 'changed.pt')

    with pytest.raises(ValueError, match=message):
        trainer([EMA('2ba')], load_path=str(tmp_path / 'changed.pt'))


def average_in(state: dict[str, Any]) -> dict[str, Any]:
    return state['averages']['ema']
