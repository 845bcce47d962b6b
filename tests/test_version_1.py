"""Checkpoints of the release that wrote version 1 of the state: resumed, read, exported, described, or refused by name.

``fixtures/make_version_1.py`` wrote them with that release, and where the uninterrupted runs ended.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import toy

pytest.importorskip('composer', reason='needs Composer')

from fixtures.make_checkpoints import build_model, build_trainer
from fixtures.make_version_1 import ALGORITHMS, LAST, SAVED

from composer_ema import EMA, SWA, CheckpointError, export, load_average
from composer_ema.checkpoints import formats
from composer_ema.checkpoints.inspection import AVERAGE, TRAINING_WEIGHTS, describe
from composer_ema.shadow import state as states

FIXTURES = Path(__file__).parent / 'fixtures'
each_kind = pytest.mark.parametrize('kind', ALGORITHMS)


def path_of(kind: str) -> Path:
    return FIXTURES / f'version-1-{kind}.pt'


def expected(kind: str) -> dict[str, Any]:
    return torch.load(FIXTURES / 'version-1.pt', weights_only=True)[f'checkpoint {kind}']


def state_of(kind: str) -> dict[str, Any]:
    ((_, state),) = torch.load(path_of(kind), weights_only=False)['state']['algorithms']
    return state


def average_of(state: dict[str, Any]) -> dict[str, Any]:
    (average,) = state['averages'].values()
    return average


def held(algorithm: EMA | SWA) -> dict[str, torch.Tensor]:
    shadow = toy.shadow_of(algorithm)
    return {**dict(shadow.named_parameters()), **dict(shadow.named_buffers())}


def test_the_fixtures_are_of_version_1_and_one_was_saved_while_swapped():
    for kind in ALGORITHMS:
        state = state_of(kind)
        assert (state['version'], average_of(state)['version']) == (1, 1)
        assert ('training_weights' in state) == (kind == 'swapped')


@each_kind
def test_a_resumed_run_ends_as_the_uninterrupted_one(trainer, kind):
    algorithm = ALGORITHMS[kind]()
    run = trainer([algorithm], eval_dataloader=toy.make_evaluator(interval='1ba'), load_path=str(path_of(kind)))
    assert run.state.timestamp.batch == SAVED
    run.fit()
    assert run.state.timestamp.batch == LAST
    end = expected(kind)
    torch.testing.assert_close(held(algorithm), end['average'])
    torch.testing.assert_close(dict(run.state.model.state_dict()), end['weights'])
    assert toy.shadow_of(algorithm).num_updates == end['num_updates']


@each_kind
def test_load_average_and_export_read_the_average(tmp_path, kind):
    saved, loaded = average_of(state_of(kind)), load_average(path_of(kind), toy.make_model())
    assert toy.bits(loaded) == toy.bits({**saved['parameters'], **saved['buffers']})
    metadata = export(path_of(kind), tmp_path / 'average.safetensors')
    assert metadata['weights'] == ('equal average' if kind == 'swa' else 'exponential moving average')
    assert metadata['num_updates'] == str(saved['num_updates'])
    assert metadata['update_interval'] == '1ba'
    assert ('half_life' in metadata, 'swa_start' in metadata) == (kind != 'swa', kind == 'swa')


@each_kind
def test_inspect_says_what_is_in_it(kind):
    found, saved = describe(path_of(kind)), average_of(state_of(kind))
    (average,) = found.averages
    assert average.written_as == 'composer_ema, version 1'
    assert (average.num_updates, average.last_update) == (saved['num_updates'], saved['last_update'])
    assert (found.model_slot, found.has_stash) == ((AVERAGE, True) if kind == 'swapped' else (TRAINING_WEIGHTS, False))
    assert average.relative_distance is not None
    assert average.relative_distance > 0


@pytest.mark.parametrize(
    ('damage', 'message'),
    [
        (lambda s: average_of(s)['parameters'].pop('module.5.bias'), 'missing: module.5.bias'),
        (lambda s: average_of(s)['parameters'].update(new=torch.ones(1)), 'unexpected: new'),
        (lambda s: average_of(s)['parameters'].update({'module.5.bias': torch.ones(7)}), r'5\.bias \(expected \(3,\)'),
        (lambda s: average_of(s)['parameters'].update({'module.5.bias': 'text'}), "maps 'module.5.bias' to a str"),
        (lambda s: average_of(s)['buffers'].pop('module.1.running_var'), 'missing: module.1.running_var'),
        (lambda s: average_of(s).pop('parameters'), "'parameters' .* is a NoneType"),
        (lambda s: average_of(s).pop('num_updates'), "'num_updates' .* is None"),
        (lambda s: average_of(s).pop('last_update'), "lacks 'last_update'"),
        (lambda s: average_of(s).update(last_update={'ba': 3}), 'last_update .* must give iter'),
        (lambda s: average_of(s).update(seed=-1), 'seed must be a whole number'),
        (lambda s: average_of(s).update(version=2), "average '(ema|swa)' has format version 2, not 1"),
        (lambda s: average_of(s).pop('version'), "average '(ema|swa)' has format version None, not 1"),
        (lambda s: s.update(version='1'), "format version '1', this release reads up to 3"),
        (lambda s: s.update(started='yes'), "'started' .* is a str"),
        (lambda s: s.update(config=3), "'config' .* is a int"),
        (lambda s: s.update(averages=[1]), "'averages' .* is a list"),
        (lambda s: s.update(averages={'ema': 3}), "average 'ema' is a int"),
        (lambda s: s.update(training_weights={'module.5.bias': torch.ones(3)}), 'saved training weights'),
    ],
)
@pytest.mark.parametrize('kind', ['ema', 'swa'])
def test_a_wrong_field_is_refused_by_name_and_nothing_is_changed(trainer, kind, damage, message):
    algorithm = ALGORITHMS[kind]()
    run = trainer([algorithm])
    run.fit(duration='4ba')
    before, state = toy.snapshot(run), copy.deepcopy(state_of(kind))
    damage(state)
    with pytest.raises(ValueError, match=message):
        algorithm.load_state_dict(state)
    assert toy.snapshot(run) == before


def test_upgrading_leaves_the_given_state_as_it_is():
    for kind in ALGORITHMS:
        state = state_of(kind)
        before = copy.deepcopy(state)
        upgraded = formats.upgrade(state, model_slot={})
        assert upgraded['version'] == formats.VERSION
        assert str(state) == str(before)


# One version for one format


@pytest.mark.parametrize('constant', [(formats, 'VERSION'), (states, 'VERSION')])
@pytest.mark.parametrize('name', ['0.12-single-interval', '0.12-single-numpy', '0.32-single-interval'])
def test_raising_either_version_leaves_the_builtins_formats_loadable(monkeypatch, constant, name):
    module, attribute = constant
    monkeypatch.setattr(module, attribute, getattr(module, attribute) + 1)
    ema = EMA(smoothing=0.75)
    path = FIXTURES / f'{name}.pt'
    run = build_trainer(build_model(), algorithms=[ema], load_path=str(path))
    assert ema.ema_started
    state = dict(torch.load(path, weights_only=False)['state']['algorithms'])['EMA']
    assert formats.upgrade(state, model_slot={})['version'] == formats.VERSION
    average = {n: t for n, t in load_average(path).items() if 'num_batches' not in n}
    assert toy.bits({n: t for n, t in held(ema).items() if n in average}) == toy.bits(average)
    run.close()


def test_the_state_of_an_average_has_no_version_of_its_own(trainer):
    ema = EMA('2ba')
    trainer([ema]).fit()
    assert ema.state_dict()['averages']['ema'].keys() == {
        'parameters', 'buffers', 'aliases', 'num_updates', 'seed', 'last_update', 'started_at', 'first_update',
        'start_share', 'profile',
    }  # fmt: skip


# Several averages in one checkpoint


@pytest.fixture
def two_averages(tmp_path) -> Path:
    """A checkpoint whose model slot holds training weights, with the states of an EMA and of a SWA."""
    checkpoint = torch.load(path_of('ema'), weights_only=False)
    checkpoint['state']['algorithms'].append(('SWA', state_of('swa')))
    torch.save(checkpoint, tmp_path / 'two.pt')
    return tmp_path / 'two.pt'


def test_two_averages_are_described(two_averages):
    found = describe(two_averages)
    assert [(average.algorithm, average.label) for average in found.averages] == [('EMA', 'ema'), ('SWA', 'swa')]
    assert found.model_slot == TRAINING_WEIGHTS


def test_of_two_averages_one_must_be_asked_for_by_its_label(two_averages, tmp_path):
    with pytest.raises(CheckpointError, match=r"2 averages: 'ema' of EMA, 'swa' of SWA\. .* average='ema'"):
        load_average(two_averages)
    with pytest.raises(CheckpointError, match='2 averages'):
        export(two_averages, tmp_path / 'out.safetensors')
    with pytest.raises(CheckpointError, match=r"no average called 'mean', but 'ema' of EMA, 'swa' of SWA"):
        load_average(two_averages, average='mean')
    for kind in ('ema', 'swa'):
        assert toy.bits(load_average(two_averages, average=kind)) == toy.bits(load_average(path_of(kind)))
        assert export(two_averages, tmp_path / f'{kind}.safetensors', average=kind)['num_updates'] == str(
            average_of(state_of(kind))['num_updates']
        )


def test_of_two_averages_the_only_one_that_has_started_is_taken(two_averages):
    checkpoint = torch.load(two_averages, weights_only=False)
    dict(checkpoint['state']['algorithms'])['SWA']['started'] = False
    torch.save(checkpoint, two_averages)
    assert toy.bits(load_average(two_averages)) == toy.bits(load_average(path_of('ema')))


def test_the_command_line_exports_the_average_that_is_asked_for(two_averages, tmp_path):
    from typer.testing import CliRunner

    from composer_ema.cli import app

    out = tmp_path / 'swa.safetensors'
    refused = CliRunner().invoke(app, ['export', str(two_averages), str(out)])
    assert refused.exit_code == 2
    assert not out.exists()
    assert CliRunner().invoke(app, ['export', str(two_averages), str(out), '--average', 'swa']).exit_code == 0
    assert toy.bits(safetensors.torch.load_file(out)) == toy.bits(load_average(path_of('swa')))


def test_a_label_means_nothing_for_the_file_of_another_library():
    with pytest.raises(CheckpointError, match="there is no average called 'ema': those in the file have no labels"):
        load_average(FIXTURES / 'foreign' / 'ema-pytorch.pt', average='ema')
