"""Which checkpoint a run goes on from, whatever a kill left of its folder; and checkpoints that a run cannot load."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from hostile_checkpoints import PACKINGS, Ground, attack, listing
from torch import nn

from composer_ema.recipe import schema
from composer_ema.recipe.arguments import RecipeError
from composer_ema.recipe.build import build
from composer_ema.recipe.loaded import check_loaded
from composer_ema.recipe.matching import _in_short
from composer_ema.recipe.run import train
from composer_ema.run_folder.packed import unpacked
from composer_ema.run_folder.recorder import Recorder
from composer_ema.run_folder.resuming import Found
from composer_ema.trainer.safe_loading import reading_safely

RECIPE = Path(__file__).parent.parent / 'yamls' / 'mnist1d.yaml'
LATEST = 'latest-rank0.pt'


def content(batch: int | None, run_name: str = 'r') -> dict[str, Any]:
    """What a checkpoint holds as far as the choice is concerned."""
    state: dict[str, Any] = {'model': {'weight': torch.full((8,), float(batch or 0))}, 'run_name': run_name}
    return {'state': state if batch is None else {**state, 'timestamp': {'Timestamp': {'batch': batch}}}}


class Folder:
    """The save folder of the run ``r``, with checkpoints written one after the other at batches 2, 4, 6, ..."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.mkdir(parents=True)

    def write(self, *batches: int, name: str = 'ep0-ba{}-rank0.pt', run_name: str = 'r') -> None:
        for batch in batches:
            path = self.path / name.format(batch)
            path.parent.mkdir(exist_ok=True)
            torch.save(content(batch, run_name), path)
            self.written_at(path, batch)

    def written_at(self, path: Path, second: int) -> None:
        os.utime(path, ns=(second * 10**9, second * 10**9))

    def link(self, target: str, name: str = LATEST) -> None:
        (self.path / name).unlink(missing_ok=True)
        (self.path / name).symlink_to(target)

    def cut(self, name: str) -> None:
        path = self.path / name
        written = path.stat().st_mtime_ns
        path.write_bytes(path.read_bytes()[:-100])
        os.utime(path, ns=(written, written))

    def state(self) -> dict[str, Any]:
        paths = sorted(self.path.rglob('*'))
        return {str(path): (path.lstat().st_mtime_ns, path.lstat().st_size) for path in paths}


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    return Folder(tmp_path / 'runs' / 'r' / 'checkpoints')


@pytest.fixture
def resume(tmp_path: Path) -> Callable[..., Found | None]:
    """What autoresume goes on from."""

    def resume(*overrides: str) -> Found | None:
        common = ['autoresume=true', f'runs_folder={tmp_path}/runs']
        return check_loaded(schema.plan(schema.load(RECIPE, [*common, *overrides])), 'r')

    return resume


# What is done to a folder with checkpoints at batches 2, 4 and 6 and a link to the last: the batch to go on from,
# and a piece of what is said about it.
STATES = {
    'whole': (lambda folder: None, 6, ''),
    'missing': (lambda folder: (folder.path / LATEST).unlink(), 6, 'latest-rank0.pt is missing'),
    'dangling': (lambda folder: folder.link('ep9.pt'), 6, 'leads to ep9.pt, which is not there'),
    'a circle': (lambda folder: folder.link(LATEST), 6, 'leads in a circle'),
    'older': (lambda folder: folder.link('ep0-ba4-rank0.pt'), 6, 'leads to the older ep0-ba4-rank0.pt'),
    'damaged': (lambda folder: folder.cut('ep0-ba6-rank0.pt'), 4, 'passed over: .*ba6-rank0.pt is no checkpoint'),
    'missing, newest cut': (
        lambda folder: ((folder.path / LATEST).unlink(), folder.cut('ep0-ba6-rank0.pt')),
        4,
        'is missing; passed over: .*ep0-ba6-rank0.pt is no checkpoint, or only the beginning of one',
    ),
    'newer cut': (
        lambda folder: (folder.link('ep0-ba4-rank0.pt'), folder.cut('ep0-ba6-rank0.pt')),
        4,
        'passed over: .*ep0-ba6-rank0.pt',
    ),
    'a file': (
        lambda folder: ((folder.path / LATEST).unlink(), folder.write(4, name=LATEST)),
        6,
        'latest-rank0.pt is an older one',
    ),
    'a pipe': (
        lambda folder: ((folder.path / LATEST).unlink(), os.mkfifo(folder.path / LATEST)),
        6,
        'passed over: .*latest-rank0.pt is no file, but a pipe',
    ),
    'taken back': (
        lambda folder: (folder.link('ep0-ba2-rank0.pt'), folder.written_at(folder.path / 'ep0-ba2-rank0.pt', 9)),
        2,
        '',
    ),
    'taken back, then missing': (
        lambda folder: ((folder.path / LATEST).unlink(), folder.written_at(folder.path / 'ep0-ba2-rank0.pt', 9)),
        6,
        'ep0-ba2-rank0.pt was written later',
    ),
    'names that lie': (
        lambda folder: (
            (folder.path / LATEST).unlink(),
            (folder.path / 'ep0-ba2-rank0.pt').rename(folder.path / 'ep9-ba99-rank0.pt'),
        ),
        6,
        'is missing',
    ),
}


class TestLatest:
    @pytest.mark.parametrize('name', STATES)
    def test_in_every_state_leads_to_the_newest_whole_checkpoint(self, folder, resume, name):
        change, batch, said = STATES[name]
        folder.write(2, 4, 6)
        folder.link('ep0-ba6-rank0.pt')
        change(folder)
        before = folder.state()
        found = resume()
        assert found.path == folder.path / f'ep0-ba{batch}-rank0.pt'
        assert re.search(said, found.remark) if said else not found.remark
        assert folder.state() == before

    @pytest.mark.parametrize(
        ('template', 'names'),
        [
            ('ba{batch}.pt', ['ba2.pt', 'ba4.pt']),
            (
                '{run_name}/ep{epoch}/sa{sample:06d}-{total_wct}.pt',
                ['r/ep0/sa000002-3.5.pt', 'r/ep1/sa000004-1e-05.pt'],
            ),
            ('/model.pt', ['model.pt']),
            ('{batch}-of-{world_size}.pt', ['2-of-1.pt', '4-of-16.pt']),
        ],
    )
    def test_that_is_missing_is_made_up_for_whatever_checkpoints_are_called(self, folder, resume, template, names):
        for batch, name in enumerate(names, 1):
            (folder.path / name).parent.mkdir(parents=True, exist_ok=True)
            folder.write(2 * batch, name=name)
        folder.write(8, name='average.pt')
        assert resume(f'save_filename="{template}"').path == folder.path / names[-1]

    def test_that_the_recipe_does_not_want_is_not_needed(self, folder, resume):
        folder.write(2, 4)
        assert resume('save_latest_filename=null') == Found(folder.path / 'ep0-ba4-rank0.pt')

    def test_and_checkpoints_that_are_not_there_begin_the_run(self, folder, resume):
        assert resume() is None
        assert resume('save_folder=s3://bucket/x') is None, 'Composer alone looks there'

    @pytest.mark.parametrize(
        ('change', 'said'),
        [
            (lambda folder: folder.link('ep0-ba6-rank0.pt'), 'which is not there, and there is no other checkpoint'),
            (lambda folder: (folder.write(2), folder.cut('ep0-ba2-rank0.pt')), 'nothing whole .* only the beginning'),
            (lambda folder: torch.save(content(None), folder.path / 'ep0-ba2-rank0.pt'), 'holds weights alone'),
            (lambda folder: os.mkfifo(folder.path / 'ep0-ba2-rank0.pt'), 'is no file, but a pipe'),
            (lambda folder: (folder.path / 'ep0-ba2-rank0.pt').mkdir(), 'is no sharded checkpoint'),
        ],
    )
    def test_where_nothing_can_be_taken_nothing_is_begun(self, folder, resume, change, said):
        change(folder)
        before = folder.state()
        with pytest.raises(RecipeError, match=said) as refused:
            resume()
        assert refused.value.key == 'autoresume'
        assert folder.state() == before

    def test_of_a_run_without_checkpoints_is_refused(self, resume):
        with pytest.raises(RecipeError, match=r'autoresume: .*save_folder: null saves nothing'):
            resume('save_folder=null')

    def test_template_that_is_none(self, folder, resume):
        folder.write(2)
        with pytest.raises(RecipeError, match=r"save_filename: 'ep\{epoch\.pt' is no path: expected '\}'"):
            resume('save_filename="ep{epoch.pt"')


class TestAFolderOfSeveralRuns:
    def test_holds_this_one_among_others(self, folder, resume):
        folder.write(2, 4)
        folder.write(6, 8, run_name='other')
        folder.link('ep0-ba8-rank0.pt')
        found = resume(f'save_folder={folder.path}')
        assert found.path == folder.path / 'ep0-ba4-rank0.pt'
        assert 'leads to ep0-ba8-rank0.pt of the run other' in found.remark

    def test_and_none_of_this_one_is_refused(self, folder, resume):
        folder.write(6, 8, run_name='other')
        with pytest.raises(RecipeError, match=r'autoresume: .*2 checkpoints of other, and none of r, .*run_name=other'):
            resume(f'save_folder={folder.path}')

    def test_that_is_the_runs_own_may_have_been_renamed(self, folder, resume):
        folder.write(6, 8, run_name='before')
        assert resume().path == folder.path / 'ep0-ba8-rank0.pt'


class TestShardedFolders:
    SHARDED = 'parallelism_config.fsdp2={}'

    @pytest.fixture(autouse=True)
    def checkpoints(self, folder) -> None:
        for batch in (2, 4):
            dcp.save(content(batch), checkpoint_id=folder.path / f'ep0-ba{batch}')

    def test_the_newest_is_taken(self, folder, resume):
        assert resume(self.SHARDED).path == folder.path / 'ep0-ba4'

    @pytest.mark.parametrize('damage', ['unfinished', 'index', 'shards'])
    def test_one_that_is_not_whole_is_passed_over(self, folder, resume, damage):
        folder.link('ep0-ba4')
        path = folder.path / 'ep0-ba4' / ('__0_0.distcp' if damage == 'shards' else '.metadata')
        if damage == 'unfinished':
            path.unlink()
        else:
            data = path.read_bytes()
            value = torch.full((8,), 4.0).numpy().tobytes() if damage == 'shards' else b'Metadata'
            assert value in data
            path.write_bytes(data.replace(value, b'x' + value[1:]))
        found = resume(self.SHARDED)
        assert found.path == folder.path / 'ep0-ba2'
        assert 'passed over: ' in found.remark

    def test_of_a_run_that_saves_files_are_refused(self, resume):
        with pytest.raises(RecipeError, match=r'autoresume: .*is a sharded checkpoint, and this run loads single'):
            resume()


@pytest.fixture(scope='module')
def ground(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ground]:
    """A run with checkpoints at batches 2, 4 and 5 of one epoch."""
    ground = Ground(tmp_path_factory.mktemp('ground'))
    yield ground
    ground.close()


def quiet(renderable: Any) -> None:
    """Shows nothing."""


class Flat(nn.Module):
    """Another network for the same images."""

    def __init__(self, num_classes: int = 3) -> None:
        super().__init__()
        self.head = nn.Linear(17 * 17, num_classes)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.head(images.flatten(1))


class TestARun:
    @pytest.fixture
    def recipe(self, ground) -> Path:
        return ground.folder / 'tiny.yaml'

    def test_killed_before_its_link_was_made_goes_on_to_the_same_bits(self, ground, recipe, tmp_path):
        shutil.copytree(ground.saved, tmp_path / 'tiny' / 'checkpoints', symlinks=True)
        (tmp_path / 'tiny-2' / 'checkpoints').mkdir(parents=True)
        for name in (LATEST, 'ep1-ba5-rank0.pt'):
            (tmp_path / 'tiny' / 'checkpoints' / name).unlink()
        shown: list[Any] = []
        train(schema.load(recipe, ['autoresume=true', f'runs_folder={tmp_path}']), shown.append)
        path = tmp_path / 'tiny' / 'checkpoints' / 'ep0-ba4-rank0.pt'
        assert shown[0] == f'autoresume: going on from {path}, batch 4; latest-rank0.pt is missing'
        assert ground.load(tmp_path / 'tiny' / 'checkpoints' / LATEST) == ('loaded', ground.prints[5])

    def test_an_error_that_is_only_a_key_gets_its_type_and_a_remedy(self):
        with pytest.raises(KeyError) as found:
            Recorder().load_state_dict({})
        assert _in_short(found.value, 'Load another one.') == "KeyError: 'num_lines'. Load another one."

    @pytest.mark.parametrize(
        ('overrides', 'said'),
        [
            (['model.num_classes=4'], r'another model.* 2 of another shape: module\.layers\.12\.bias \(\(3,\) in the '),
            (
                ['model={name: flat}'],
                r'2 missing: module.head.bias, module.head.weight; 26 unexpected.*and 22 more',
            ),
            (['optimizer={name: sgd, lr: 0.1}'], r'with the optimizer AdamW, .*load_ignore_keys: \[state/optimizers'),
            (
                ['model.num_classes=4', 'load_ignore_keys=[state/model/*]'],
                r'could not be loaded: the saved average does not fit the model.*state/algorithms',
            ),
        ],
    )
    def test_refuses_a_checkpoint_of_another_one_before_it_is_loaded(self, ground, recipe, register, overrides, said):
        register('models', 'flat', Flat)
        before = listing(ground.folder)
        path = ground.saved / 'ep0-ba4-rank0.pt'
        with pytest.raises(RecipeError, match=said) as refused:
            build(schema.load(recipe, [f'load_path={path}', 'run_name=new', *overrides]))
        assert refused.value.key == 'load_path'
        assert listing(ground.folder) == before

    def test_that_resumes_is_told_so_at_autoresume(self, ground, recipe):
        with pytest.raises(
            RecipeError, match=r'autoresume: .*ep1-ba5-rank0\.pt was saved with another model'
        ) as refused:
            build(schema.load(recipe, ['autoresume=true', 'run_name=whole', 'model.num_classes=4']))
        assert 'load_ignore_keys' not in str(refused.value), 'which autoresume ignores'

    @pytest.mark.parametrize(
        'overrides',
        [
            ['optimizer={name: sgd, lr: 0.1}', 'load_ignore_keys=[state/optimizers, state/schedulers]'],
            ['optimizer={name: sgd, lr: 0.1}', 'load_weights_only=true'],
            ['algorithms=null'],
            ['algorithms={swa: {}}'],
            [
                *('model.num_classes=4', 'load_weights_only=true', 'load_strict_model_weights=false'),
                "load_ignore_keys=['state/model/module.layers.12.*']",
            ],
        ],
    )
    def test_loads_what_fits_if_it_is_told_to(self, ground, recipe, overrides):
        path = ground.saved / 'ep0-ba4-rank0.pt'
        run = build(schema.load(recipe, [f'load_path={path}', 'run_name=new', *overrides]))
        saved = torch.load(path, weights_only=False)['state']['model']
        assert run.trainer.state.model.state_dict()['module.layers.0.weight'].equal(saved['module.layers.0.weight'])
        run.trainer.close()
        shutil.rmtree(run.folder, ignore_errors=True)

    @pytest.mark.parametrize('ending', ['.tar', '.pt.gz'])
    def test_unpacks_nothing_beside_a_packed_checkpoint(self, ground, recipe, tmp_path, ending):
        path = tmp_path / f'ep1{ending}'
        path.write_bytes(PACKINGS[ending](ground.contents[4]))
        (tmp_path / 'ep1.pt').write_text('mine')
        before = listing(tmp_path)
        run = build(schema.load(recipe, [f'load_path={path}', f'runs_folder={ground.folder}/packed']))
        assert run.trainer.state.timestamp.batch == 4
        run.trainer.close()
        assert listing(tmp_path) == before


@pytest.mark.parametrize(
    ('given', 'said'),
    [
        ('https://example.org/a.pt', 'not from https://'),
        ('{folder}/{{zz}}.pt', 'braces stand for'),
        ('{folder}/a#b.pt', 'for an address on the net'),
        ('{folder}/../{{run_name}}.pt', r'r\.pt is missing'),
        ('{folder}/up.tar', 'Composer would unpack to another place'),
        ('{folder}/a.pt.zip', 'nothing to decompress it with'),
    ],
)
def test_paths_and_archives_that_composer_would_take_otherwise(ground, tmp_path, given, said):
    for name in ('a#b.pt', 'a.pt.zip'):
        (tmp_path / name).write_bytes(ground.contents[4])
    with tarfile.open(tmp_path / 'up.tar', 'w') as archive:
        archive.add(tmp_path / 'a#b.pt', '../composer_states.pt')
    outcome, message = ground.load(given.format(folder=tmp_path))
    assert outcome == 'refused'
    assert re.search(f'load_path: .*{said}', message)


def test_damaged_checkpoints_are_refused_by_name_or_load_what_was_saved(ground, tmp_path, monkeypatch):
    monkeypatch.setattr('tempfile.tempdir', str(tmp_path))
    wrong: list[str] = []
    assert attack(ground, seed=11, rounds=50, show=wrong.append) == 0, wrong


@pytest.mark.usefixtures('alone')
def test_processes_send_each_other_tensors_while_a_checkpoint_is_read():
    gathered: list[Any] = [None]
    with reading_safely():
        torch.distributed.all_gather_object(gathered, {'weight': torch.ones(3)})
    assert gathered[0]['weight'].equal(torch.ones(3))


@pytest.mark.skipif(shutil.which('zstd') is None, reason='needs the program zstd')
def test_a_link_to_a_compressed_checkpoint_is_followed(tmp_path):
    (tmp_path / 'ep1.pt').write_bytes(b'weights')
    subprocess.run(['zstd', '-q', '-o', tmp_path / 'ep1.pt.zst', tmp_path / 'ep1.pt'], check=True)
    (tmp_path / 'latest.pt.zst').symlink_to('ep1.pt.zst')
    with unpacked(tmp_path / 'latest.pt.zst') as inside:
        assert inside.read_bytes() == b'weights'
