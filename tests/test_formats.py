"""Checkpoints of Composer's own EMA: average in the shadow, training weights in the model, and training goes on.

``fixtures/make_checkpoints.py`` wrote them with the EMA of Composer 0.32.1 and 0.12.1, and what is true of each.
"""

import copy
import json
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn

from composer_ema.checkpoints import formats

pytest.importorskip('composer', reason='needs Composer')

from composer import Callback
from fixtures.make_checkpoints import LAST_BATCH, SAVED_BATCH, SMOOTHING, build_model, build_trainer

from composer_ema import EMA, SWA, load_average

FIXTURES = Path(__file__).parent / 'fixtures'
TRUTHS = json.loads((FIXTURES / 'truths.json').read_text())
every_file = pytest.mark.parametrize('name', sorted(TRUTHS))


def truth(name: str, key: str) -> dict[str, torch.Tensor]:
    """What the witness of the run saw. The counter is left out: the built-in averages and truncates it."""
    return {k: torch.tensor(v) for k, v in TRUTHS[name][key].items() if 'num_batches' not in k}


def assert_close(got: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    got = {name: tensor.detach() for name, tensor in got.items() if 'num_batches' not in name}
    assert got.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(got[name], tensor, rtol=2e-6, atol=1e-7, msg=lambda text, n=name: f'{n}: {text}')


def checkpoint(name: str) -> dict:
    return torch.load(FIXTURES / f'{name}.pt', weights_only=False)['state']


def ema_state(name: str) -> dict:
    return dict(checkpoint(name)['algorithms'])['EMA']


def test_the_files_cover_both_formats_swapped_or_not_from_one_process_and_from_two():
    covered = {
        (
            'training_model' in ema_state(name),
            ema_state(name)['ema_weights_active'],
            any(
                key.startswith('module.module.')
                for key in ema_state(name)['ema_model'].get('named_parameters_dict', ema_state(name)['ema_model'])
            ),
        )
        for name in TRUTHS
    }
    assert len(covered) == 8


@every_file
def test_the_average_is_read_out_whatever_the_slots_hold(name):
    assert_close(load_average(FIXTURES / f'{name}.pt'), truth(name, 'average'))


@every_file
def test_the_average_loads_strictly_into_the_model(name):
    model = build_model()
    model.load_state_dict(load_average(FIXTURES / f'{name}.pt'), strict=True)


@every_file
def test_loaded_in_a_trainer_the_model_trains_on_from_the_training_weights(name):
    class Probe(Callback):
        def after_load(self, state, logger):
            seen['training'] = copy.deepcopy(state.model.state_dict())
            assert not ema.ema_weights_active

        def batch_end(self, state, logger):
            seen.setdefault('updates', []).append(ema.ema_model.num_updates)

    seen = {}
    ema = EMA(smoothing=SMOOTHING)
    trainer = build_trainer(
        build_model(), algorithms=[ema], load_path=str(FIXTURES / f'{name}.pt'), callbacks=[Probe()]
    )
    assert trainer.state.timestamp.batch == SAVED_BATCH
    assert ema.ema_started
    average = {**dict(ema.ema_model.named_parameters()), **dict(ema.ema_model.named_buffers())}
    assert_close(average, truth(name, 'average'))
    assert_close(seen['training'], truth(name, 'training'))
    assert_close(trainer.state.model.state_dict(), truth(name, 'training'))

    if 'ddp' in name:
        trainer.close()
        return  # two processes saw other batches
    expected = {n: t.double() for n, t in truth(name, 'average').items()}
    trainer.fit()
    assert_close(trainer.state.model.state_dict(), truth(name, 'training_at_end'))
    assert seen['updates'] == [2, 3, 4]
    assert trainer.state.timestamp.batch == LAST_BATCH
    assert expected.keys() <= dict(average).keys()
    trainer.close()


@every_file
def test_the_average_goes_on_from_where_the_builtin_left_it(name):
    class Averages(Callback):
        def batch_end(self, state, logger):
            for key, tensor in state.model.state_dict().items():
                if key in expected:
                    expected[key] = SMOOTHING * expected[key] + (1 - SMOOTHING) * tensor.double()

    expected = {n: t.double() for n, t in truth(name, 'average').items()}
    ema = EMA(smoothing=SMOOTHING)
    path = str(FIXTURES / f'{name}.pt')
    trainer = build_trainer(build_model(), algorithms=[ema], load_path=path, callbacks=[Averages()])
    trainer.fit()
    got = {**dict(ema.ema_model.named_parameters()), **dict(ema.ema_model.named_buffers())}
    assert_close({n: t.double() for n, t in got.items()}, expected)
    trainer.close()


@every_file
def test_evaluation_after_loading_uses_the_average(name):
    ema = EMA(smoothing=SMOOTHING)
    seen = {}

    class Probe(Callback):
        def eval_batch_start(self, state, logger):
            seen.update(copy.deepcopy(state.model.state_dict()))

    from fixtures.make_checkpoints import build_loader

    path = str(FIXTURES / f'{name}.pt')
    trainer = build_trainer(build_model(), algorithms=[ema], load_path=path, callbacks=[Probe()])
    trainer.eval(build_loader())
    assert_close(seen, truth(name, 'average'))
    assert_close(trainer.state.model.state_dict(), truth(name, 'training'))
    trainer.close()


@every_file
def test_a_half_life_takes_over_where_the_builtin_had_a_smoothing(name):
    ema = EMA(half_life='2ba')
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        trainer = build_trainer(build_model(), algorithms=[ema], load_path=str(FIXTURES / f'{name}.pt'))
        trainer.fit()
    assert ema.ema_model.num_updates == 1 + LAST_BATCH - SAVED_BATCH
    trainer.close()


@every_file
@pytest.mark.filterwarnings('ignore:.*without an update_interval updates:UserWarning')
@pytest.mark.parametrize('interval', [None, '1ep', '3ba'])
def test_updates_that_come_once_in_a_while_go_on_after_the_builtins_checkpoint(name, interval):
    """Which does not say when the last update was."""
    ema = EMA(half_life='1ep', update_interval=interval)
    path = str(FIXTURES / f'{name}.pt')
    trainer = build_trainer(build_model(), algorithms=[ema], load_path=path, max_duration='2ep')
    trainer.fit()
    # Three of eight batches were trained, four are an epoch.
    assert ema.ema_model.num_updates == 1 + (1 if interval == '3ba' else 2)
    trainer.close()


@every_file
def test_upgrading_changes_neither_the_state_nor_the_slot(name):
    state, slot = ema_state(name), checkpoint(name)['model']
    keys, before = copy.deepcopy(state), copy.deepcopy(slot)
    formats.upgrade(state, model_slot=slot)
    assert str(keys) == str(state)
    assert all(torch.equal(slot[key], before[key]) for key in before)


def test_a_frozen_parameter_of_the_oldest_format_is_not_tracked():
    """The oldest format holds every parameter, frozen or not."""
    name = '0.12-single-interval'
    tracked = {'module.0.weight'}
    buffers = [key for key in checkpoint(name)['model'] if 'running' in key or 'num_batches' in key]
    upgraded = formats.upgrade(ema_state(name), model_slot=checkpoint(name)['model'], tracked=tracked, buffers=buffers)
    assert upgraded['averages']['ema']['parameters'].keys() == tracked
    assert upgraded['training_weights'].keys() == tracked | set(buffers)


@every_file
def test_the_builtins_average_of_another_model_is_refused_by_name_and_nothing_is_loaded(name):
    model = build_model()
    model.module[2] = nn.Linear(2, 5)
    ema = EMA()
    trainer = build_trainer(model, algorithms=[ema])
    before = copy.deepcopy(dict(ema.ema_model.named_parameters()))
    with pytest.raises(ValueError, match=r'of another shape or kind: module\.2\.bias'):
        ema.load_state_dict(ema_state(name))
    assert not ema.ema_started
    assert all(torch.equal(tensor, before[key]) for key, tensor in ema.ema_model.named_parameters())
    trainer.close()


@pytest.mark.parametrize('build', [lambda: EMA('2ba'), lambda: SWA('1ba', update_interval='1ba')], ids=['ema', 'swa'])
@pytest.mark.parametrize('value', [torch.zeros(2), [torch.zeros(2)], {'a': {'b': {'c': 1}}}, 2**63], ids=str)
def test_settings_that_are_not_plain_are_refused_and_nothing_is_loaded(build, value):
    trained = build()
    trainer = build_trainer(build_model(), algorithms=[trained])
    trainer.fit()
    state = trained.state_dict()
    trainer.close()
    state['config'] = {**state['config'], 'update_interval': value}
    fresh = build()
    trainer = build_trainer(build_model(), algorithms=[fresh])
    kind = type(value).__name__
    with pytest.raises(ValueError, match=f"'config' of the saved .* state maps 'update_interval' to a {kind}, not a"):
        fresh.load_state_dict(state)
    trainer.fit()
    trainer.close()


def test_the_current_format_passes_through():
    state = EMA(half_life='2ba').state_dict()
    assert state['version'] == formats.VERSION
    assert formats.upgrade(state, model_slot={}) == state


@pytest.mark.parametrize(
    ('state', 'message'),
    [
        ({'version': 99}, r'format version 99, this release reads up to 3\. Install a newer'),
        ({'version': '1'}, "format version '1'"),
        ({'weights': 1, 2: 3}, 'of no known format: it has the keys 2, weights'),
        ({}, 'of no known format'),
        (None, 'is a NoneType, not a dictionary'),
        ([1], 'is a list, not a dictionary'),
    ],
)
def test_what_is_no_known_format_is_refused(state, message):
    with pytest.raises(ValueError, match=message):
        formats.upgrade(state, model_slot={})


@pytest.mark.parametrize(
    'damage',
    [
        lambda s: s.update(ema_model=None),
        lambda s: s.update(ema_model={}),
        lambda s: s['ema_model'].pop('named_buffers_dict'),
        lambda s: s['ema_model'].update(named_parameters_dict=[1]),
        lambda s: s['ema_model']['named_parameters_dict'].update({'module.0.weight': 'x'}),
    ],
    ids=['none', 'empty', 'no buffers', 'a list', 'no tensor'],
)
def test_a_damaged_state_of_the_builtin_is_a_value_error(damage):
    ema = EMA()
    trainer = build_trainer(build_model(), algorithms=[ema])
    state = ema_state('0.32-single-numpy')
    damage(state)
    with pytest.raises(ValueError):
        ema.load_state_dict(state)
    assert not ema.ema_started
    trainer.close()
