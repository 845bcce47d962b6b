"""A recipe's ``parallelism_config``: checked against Composer's signature, built, and sharded block by block."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from composer.core import Precision
from composer.distributed.fsdp2_utils import generate_composer_model_policy
from composer.distributed.prepare_distributed import parallelize_composer_model
from composer.utils.parallelism import FSDP2Config, ParallelismConfig
from sharded import mesh_of_one
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from composer_ema import load_average
from composer_ema.recipe import parallelism, schema
from composer_ema.recipe.arguments import Place, RecipeError
from composer_ema.recipe.build import build
from composer_ema.recipe.loaded import check_loaded
from composer_ema.recipe.outline import Outline
from composer_ema.zoo.blocks import IsBlock, blocks
from composer_ema.zoo.dataset import Extent
from composer_ema.zoo.models import build_model

ROOT = Path(__file__).parents[1]
RECIPE = ROOT / 'yamls' / 'mnist1d.yaml'
PLACE = Place('a.yaml', parallelism.KEY)


@pytest.fixture
def _process_group():
    with mesh_of_one():
        yield


class TestTheSection:
    @pytest.mark.parametrize(
        ('section', 'key', 'said'),
        [
            (['fsdp2'], '', r"must map a kind of parallelism to its settings, as in fsdp2: \{\}, got \['fsdp2'\]"),
            ({'fdsp2': {}}, 'fdsp2', r"there is no such kind\. Did you mean 'fsdp2'\?"),
            ({'fsdp2': 3}, 'fsdp2', 'must be a mapping, got 3'),
            (
                {'fsdp2': {'reshard_after_forwrd': True}},
                'fsdp2.reshard_after_forwrd',
                r"FSDP2Config has no such argument\. Did you mean 'reshard_after_forward'\?",
            ),
            (
                {'fsdp2': {'reshard_after_forward': 'no'}},
                'fsdp2.reshard_after_forward',
                r"must be true or false or an integer, got 'no' \(a string\)",
            ),
            ({'fsdp2': {'verbose': 1}}, 'fsdp2.verbose', r'must be true or false, got 1 \(an integer\)'),
            ({'fsdp2': {'device_mesh': [2, 2]}}, 'fsdp2.device_mesh', 'must be null'),
            (
                {'fsdp2': {'state_dict_type': 'Sharded'}},
                'fsdp2.state_dict_type',
                r"must be one of sharded, full, got 'Sharded' \(a string\)\. Did you mean 'sharded'\?",
            ),
            (
                {'fsdp2': {'mixed_precision': 'half'}},
                'fsdp2.mixed_precision',
                'must be one of DEFAULT, PURE, FULL, got',
            ),
            ({'fsdp2': {}, 'tp': {'tensor_parallel_degree': 2}}, 'tp', 'without telling the optimizer.*Write fsdp2'),
            ({'fsdp2': {}, 'fsdp': {}}, 'fsdp', 'asks for two. Keep fsdp2'),
            ({'fsdp': {}}, 'fsdp', r'this is FSDP1, whose flat shards no average can follow.*Write fsdp2: instead'),
        ],
    )  # fmt: skip
    def test_is_refused_by_key_with_the_rule_and_the_remedy(self, section, key, said):
        with pytest.raises(RecipeError, match=said) as refused:
            parallelism.check(section, PLACE, has_average=True)
        assert refused.value.key == (f'{parallelism.KEY}.{key}' if key else parallelism.KEY)

    def test_is_checked_with_the_recipe(self):
        with pytest.raises(RecipeError, match=r"fsdp2\.verbos: FSDP2Config has no such argument\. Did you mean 'verb"):
            schema.plan(schema.load(RECIPE, ['parallelism_config.fsdp2.verbos=true']))

    @pytest.mark.filterwarnings('ignore:FSDP2 Config/APIs are experimental:UserWarning')
    @pytest.mark.parametrize('settings', [{}, {'reshard_after_forward': 2, 'mixed_precision': 'pure'}])
    def test_becomes_composers_configuration(self, settings):
        parallelism.check({'fsdp2': settings}, PLACE, has_average=True)
        assert parallelism.built({'fsdp2': settings}) == ParallelismConfig(fsdp2=FSDP2Config(**settings))

    @pytest.mark.parametrize('section', [None, {}, {'fsdp2': None, 'tp': None}])
    def test_that_asks_for_nothing_is_passed_on(self, section):
        parallelism.check(section, PLACE, has_average=True)
        assert parallelism.built(section) is section

    def test_of_fsdp1_is_composers_affair_where_nothing_is_averaged(self, monkeypatch):
        section = {'fsdp': {'sharding_strategy': 'FULL_SHARD'}}
        parallelism.check(section, PLACE, has_average=False)
        assert parallelism.built(section) is section
        with pytest.raises(RecipeError, match=r"Did you mean 'sharding_strategy'\?"):
            parallelism.check({'fsdp': {'sharding_strategie': 'FULL_SHARD'}}, PLACE, has_average=False)
        monkeypatch.setenv('FSDP_VERSION', '2')  # with which Composer takes the key for FSDP2
        parallelism.check(section, PLACE, has_average=True)

    def test_does_not_disturb_the_picture_of_a_recipe(self):
        plan = schema.plan(schema.load(RECIPE, ['parallelism_config.fsdp2={}']))
        outline = Outline(plan, Extent(200, 100, drop_last=False))
        assert len(list(outline.steps())) == 40


class TestBlocks:
    @pytest.mark.parametrize(
        ('name', 'first', 'count'),
        [('resnet18', 'layer1.0', 8), ('convnext_tiny', 'features.0', 22), ('squeezenet1_1', 'features.3', 8)],
    )
    def test_are_the_outermost_repeated_modules_of_a_network(self, name, first, count):
        with torch.device('meta'):
            network: Any = build_model(name).module
        found = list(blocks(network))
        names = {module: name for name, module in network.named_modules()}
        assert [names[block] for block in found][:1] == [first]
        assert len(found) == count
        inner = {module for block in found for module in block.modules()} - set(found)
        assert not inner & set(found), 'one lies in another'

    @pytest.mark.parametrize('name', ['mnist1d_cnn', 'mnist1d_mlp', 'fashion_cnn'])
    def test_a_list_of_single_layers_has_none(self, name):
        assert list(blocks(build_model(name))) == []

    def test_are_what_composer_wraps(self):
        with torch.device('meta'):
            model: Any = build_model('resnet18')
        wrapped = generate_composer_model_policy(model)._run_policy(model, ignored_modules=set(), root_kwargs={})
        assert set(wrapped) == {*blocks(model.module), model.module}

    @pytest.mark.usefixtures('_process_group')
    @pytest.mark.filterwarnings('ignore:FSDP2 Config/APIs are experimental:UserWarning')
    @pytest.mark.parametrize('name', ['mnist1d_cnn', 'resnet18'])
    def test_are_sharded_each_in_a_group_of_its_own(self, name):
        model: Any = build_model(name)
        parallelize_composer_model(model, None, FSDP2Config(device_mesh=init_device_mesh('cpu', (1,))), Precision.FP32)
        assert all(isinstance(parameter, DTensor) for parameter in model.parameters())
        groups = [module for module in model.modules() if isinstance(module, FSDPModule)]
        assert set(groups) == {*blocks(model.module), model.module}

    def test_an_answer_of_the_networks_own_is_kept(self):
        class Network(nn.Linear):
            def __init__(self, num_classes: int = 10) -> None:
                super().__init__(4, num_classes)

            def fsdp_wrap_fn(self, module: nn.Module) -> bool:
                return False

        from composer_ema.zoo.models import classifier

        network: Any = classifier(Network).module
        assert not isinstance(network.fsdp_wrap_fn, IsBlock)
        assert isinstance(network.activation_checkpointing_fn, IsBlock)

    def test_activations_of_a_model_without_any_cannot_be_recomputed(self):
        section = {'fsdp2': {'activation_checkpointing': True}}
        with pytest.raises(RecipeError, match=r'names no block.*activation_checkpointing_fn') as refused:
            parallelism.check_model(section, build_model('mnist1d_cnn'), PLACE)
        assert refused.value.key == 'parallelism_config.fsdp2.activation_checkpointing'
        with torch.device('meta'):
            parallelism.check_model(section, build_model('resnet18'), PLACE)
        parallelism.check_model({'fsdp2': {}}, build_model('mnist1d_cnn'), PLACE)
        with pytest.raises(RecipeError, match='names no block'):
            build(schema.load(RECIPE, ['parallelism_config.fsdp2.activation_checkpointing=true', 'save_folder=null']))


class TestTheCheckpointToLoad:
    SHARDED, FULL = ['parallelism_config.fsdp2={}'], ['parallelism_config.fsdp2.state_dict_type=full']

    @pytest.fixture
    def folder(self, tmp_path) -> Path:
        """A sharded checkpoint of something, after four batches."""
        state = {'model': {'weight': torch.ones(3)}, 'timestamp': {'Timestamp': {'batch': 4}}}
        dcp.save({'state': state}, checkpoint_id=tmp_path / 'ep1-ba4')
        return tmp_path / 'ep1-ba4'

    def check(self, path: Path, *overrides: str) -> None:
        check_loaded(schema.plan(schema.load(RECIPE, [f'load_path={path}', *overrides])), 'r')

    def test_may_be_a_folder_where_the_run_saves_folders(self, folder):
        self.check(folder, *self.SHARDED)

    @pytest.mark.parametrize('overrides', [[], FULL])
    def test_is_no_folder_where_the_run_saves_files(self, folder, overrides):
        with pytest.raises(RecipeError, match=r'is a sharded checkpoint, and .*Write .*state_dict_type: sharded'):
            self.check(folder, *overrides)

    def test_is_no_file_where_the_run_saves_folders(self, tmp_path):
        torch.save({'state': {}}, tmp_path / 'a.pt')
        with pytest.raises(RecipeError, match=r'is a single file, and this run loads sharded.*state_dict_type: full'):
            self.check(tmp_path / 'a.pt', *self.SHARDED)

    def test_is_whole(self, folder):
        shards = folder / '__0_0.distcp'
        shards.write_bytes(shards.read_bytes()[:-200])
        with pytest.raises(RecipeError, match=r'__0_0\.distcp.*Load an earlier one'):
            self.check(folder, *self.SHARDED)
        (folder / '.metadata').unlink()
        with pytest.raises(RecipeError, match='was not written to its end'):
            self.check(folder, *self.SHARDED)

    def test_is_looked_at_by_autoresume_too(self, folder, tmp_path):
        checkpoints = tmp_path / 'runs' / 'r' / 'checkpoints'
        checkpoints.mkdir(parents=True)
        (checkpoints / 'latest-rank0.pt').symlink_to(folder)
        overrides = ['autoresume=true', f'runs_folder={tmp_path}/runs']
        with pytest.raises(RecipeError, match=r'autoresume: .*is a sharded checkpoint') as refused:
            check_loaded(schema.plan(schema.load(RECIPE, overrides)), 'r')
        assert refused.value.key == 'autoresume'
        check_loaded(schema.plan(schema.load(RECIPE, [*overrides, *self.SHARDED])), 'r')


@pytest.mark.slow
def test_two_processes_train_the_sharded_recipe_of_the_package_and_one_goes_on(tmp_path):
    def start(*words: str) -> str:
        recipe = ['train', str(ROOT / 'yamls/mnist1d_fsdp2.yaml'), 'device=cpu', f'runs_folder={tmp_path}']
        overrides = ['run_name=r', 'save_interval=1ep', 'autoresume=true', 'progress_bar=false']
        overrides.append(f'max_duration={2 if words else 3}ep')
        command = [*words, 'composer_ema.cli', *recipe, *overrides]
        environment = {**os.environ, 'PYTHONPATH': str(ROOT), 'OMP_NUM_THREADS': '1'}
        done = subprocess.run(
            [sys.executable, '-m', *command], capture_output=True, text=True, timeout=200, env=environment, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    start('composer.cli.launcher', '-n', '2', '-m')
    folder = tmp_path / 'r'
    checkpoint = folder / 'checkpoints' / 'ep2-ba80'
    assert {path.name for path in checkpoint.iterdir()} == {'.metadata', '__0_0.distcp', '__1_0.distcp'}
    average = load_average(checkpoint)
    assert average.keys() == build_model('mnist1d_cnn').state_dict().keys()
    assert all(value.isfinite().all() for value in average.values())

    assert 'going on from' in start()
    lines = [json.loads(line) for line in (folder / 'metrics.jsonl').read_text().splitlines()]
    assert [line['batch'] for line in lines if 'loss/train/total' in line] == list(range(1, 121))
    accuracies = [
        line['metrics/eval_ema/MulticlassAccuracy'] for line in lines if 'metrics/eval_ema/CrossEntropy' in line
    ]
    assert len(accuracies) == 3
    assert accuracies[0] < accuracies[1] < accuracies[2]
