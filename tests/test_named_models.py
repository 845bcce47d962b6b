"""Models of transformers and timm by name, in recipes that train on them."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader

from composer_ema.pictures import report
from composer_ema.recipe import registry, run, schema
from composer_ema.recipe.arguments import RecipeError
from composer_ema.recipe.build import build
from composer_ema.sweep.measuring import measure_of
from composer_ema.zoo import timm_models
from composer_ema.zoo.dataset import Data
from composer_ema.zoo.models import build_model, is_plain_classifier
from composer_ema.zoo.plugins import PluginError

ROOT = Path(__file__).parents[1]
GPT2 = {'model_type': 'gpt2', 'n_layer': 1, 'n_embd': 8, 'n_head': 2, 'vocab_size': 20, 'n_positions': 8}
VIT = {
    'model_type': 'vit', 'image_size': 8, 'patch_size': 4, 'num_channels': 1, 'hidden_size': 8,
    'num_hidden_layers': 1, 'num_attention_heads': 2, 'intermediate_size': 8,
}  # fmt: skip


def tokens(*, batch_size: int = 4) -> Data:
    ids = torch.randint(20, (16, 8), generator=torch.Generator().manual_seed(0))
    data: Any = [{'input_ids': each, 'labels': each} for each in ids]  # collating copies them
    return Data(DataLoader(data, batch_size, generator=torch.Generator()), DataLoader(data, 8))


@pytest.fixture
def recipe(tmp_path, register) -> Callable[..., schema.Recipe]:
    register('datasets', 'tokens', tokens)
    values = {
        'max_duration': '2ba', 'device': 'cpu', 'progress_bar': False, 'runs_folder': str(tmp_path / 'runs'),
        'model': {'name': 'hf_causal_lm', 'config': GPT2}, 'data': {'name': 'tokens'},
        'optimizer': {'name': 'adamw', 'lr': 0.01}, 'algorithms': {'ema': {'half_life': '2ba'}},
    }  # fmt: skip
    return lambda **changed: schema.Recipe('own.yaml', 'own', {**values, **changed})


class TestTransformers:
    @pytest.fixture(autouse=True)
    def needed(self):
        pytest.importorskip('transformers')

    def test_a_language_model_trains_by_a_configuration_and_is_measured_by_loss_and_perplexity(self, recipe):
        outcome = run.train(recipe(), lambda shown: None)
        result = report.result(outcome)
        assert result.metrics == ['LanguageCrossEntropy', 'LanguagePerplexity']
        assert result.goal is None, 'it has no accuracy'
        with measure_of(recipe()) as measure:
            weights = measure._run.trainer.state.model.state_dict()
            measured = measure.evaluate(weights)
            assert measure.metrics == {'LanguageCrossEntropy': True, 'LanguagePerplexity': True}
        parts = torch.tensor(measured.parts['LanguageCrossEntropy'])
        assert len(parts) == 16, 'each sample is a part'
        assert measured.metrics['LanguageCrossEntropy'] == pytest.approx(parts.mean().item(), rel=1e-5)

    def test_the_first_batch_leaves_the_samples_in_memory_as_they_are(self, recipe, tmp_path, register):
        stored = {'input_ids': torch.arange(16).view(2, 8), 'labels': torch.arange(16).view(2, 8)}
        loader = DataLoader([0, 1], 2, collate_fn=lambda samples: stored)  # pyright: ignore[reportArgumentType]
        register('datasets', 'stored', lambda: Data(loader, loader))
        build(recipe(data={'name': 'stored'}, algorithms={}), scratch=tmp_path).trainer.close()
        assert stored['labels'].tolist() == torch.arange(16).view(2, 8).tolist(), 'an evaluation shifts them in place'

    def test_an_image_classifier_takes_the_pairs_of_a_recipes_data(self, recipe):
        data = {'name': 'fake', 'image_size': [1, 8, 8], 'num_classes': 3, 'size': 8, 'eval_size': 4, 'batch_size': 4}
        model = {'name': 'hf_image_classifier', 'config': VIT, 'num_classes': 3}
        outcome = run.train(recipe(data=data, model=model, algorithms={}), lambda shown: None)
        assert list(report.result(outcome).points['training'][-1].metrics) == ['CrossEntropy', 'MulticlassAccuracy']

    def test_an_image_classifier_of_too_few_classes_is_refused_before_it_trains(self, recipe, tmp_path):
        data = {'name': 'fake', 'image_size': [1, 8, 8], 'num_classes': 4, 'size': 8, 'eval_size': 4, 'batch_size': 4}
        model = {'name': 'hf_image_classifier', 'config': VIT, 'num_classes': 3}
        with pytest.raises(
            RecipeError, match=r'model\.num_classes: must be at least 4, the classes of the data, got 3'
        ):
            build(recipe(data=data, model=model, algorithms={}), scratch=tmp_path)

    @pytest.mark.parametrize(
        ('given', 'message'),
        [
            ({}, 'needs pretrained, or a config with a model_type'),
            ({'config': {'n_layer': 1}}, 'needs pretrained, or a config with a model_type'),
            ({'config': {'model_type': 'gpt3'}}, "no model_type 'gpt3'. Did you mean 'gpt2'"),
            ({'config': {'model_type': 'gpt2', 'n_layers': 1}}, "GPT2Config has no argument 'n_layers'. Did you mean"),
        ],
    )
    def test_a_configuration_that_cannot_be_is_refused(self, recipe, given, message):
        plan = schema.plan(recipe(model={'name': 'hf_causal_lm', **given}))
        with pytest.raises(RecipeError) as error:
            plan.model.build()
        assert message in str(error.value)

    def test_a_folder_of_pretrained_weights_is_read_with_changes_to_its_configuration(self, tmp_path):
        first = build_model('hf_causal_lm', config=GPT2).model
        first.save_pretrained(tmp_path)
        again = build_model('hf_causal_lm', pretrained=str(tmp_path), config={'resid_pdrop': 0.5}).model
        assert torch.equal(first.transformer.wte.weight, again.transformer.wte.weight)
        assert again.config.resid_pdrop == 0.5
        with pytest.raises(ValueError, match=r"model_type 'llama', and .* is 'gpt2'"):
            build_model('hf_causal_lm', pretrained=str(tmp_path), config={'model_type': 'llama'})

    def test_without_transformers_the_error_names_the_command(self, recipe, monkeypatch):
        monkeypatch.setitem(sys.modules, 'transformers', None)
        with pytest.raises(RecipeError, match=r"model: hf_causal_lm needs transformers: .* pip install 'transformers"):
            schema.plan(recipe()).model.build()


class TestTimm:
    @pytest.fixture(autouse=True)
    def needed(self):
        pytest.importorskip('timm')

    def test_a_model_is_built_with_what_create_model_takes(self):
        model = build_model('timm/resnet10t', num_classes=5, in_chans=1, drop_rate=0.25)
        assert is_plain_classifier(model)
        assert model.module(torch.zeros(2, 1, 32, 32)).shape == (2, 5)
        assert model.module.drop_rate == 0.25
        assert build_model('timm/resnet10t').num_classes == 1000, 'its own default'

    def test_a_slip_in_its_name_is_told(self, recipe):
        with pytest.raises(
            RecipeError, match=r"model\.name: timm has no model 'resnet10x'\. Did you mean .*timm/resnet10t"
        ):
            schema.plan(recipe(model={'name': 'timm/resnet10x'}))

    def test_without_timm_the_error_names_the_command(self, monkeypatch):
        monkeypatch.setitem(sys.modules, 'timm', None)
        with pytest.raises(PluginError, match=r'it needs timm: .* pip install timm'):
            timm_models.find('timm/resnet10t')


@pytest.mark.slow
def test_recipes_that_name_none_of_them_do_not_import_timm():
    program = """
        import sys
        from composer_ema.recipe import registry
        registry.models().find('resnet18')
        assert 'hf_causal_lm' in registry.models().offered
        assert 'timm' not in sys.modules
        """
    subprocess.run(
        [sys.executable, '-c', '\n'.join(map(str.strip, program.splitlines()))], cwd=ROOT, check=True, timeout=300
    )


def test_names_of_a_prefix_are_found_without_listing_them():
    assert 'timm/anything' in registry.models().classes
    assert not [name for name in registry.models().offered if name.startswith('timm/')]
