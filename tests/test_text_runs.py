"""A language model from a recipe, as a user trains it: on a text file, stopped and resumed, swept and exported."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from composer import Callback
from composer.models import ComposerModel, HuggingFaceModel
from hostile_files import same
from toy import OneWeight

from composer_ema.checkpoints.reading import load_average
from composer_ema.pictures.curves import read_run
from composer_ema.recipe import schema
from composer_ema.recipe.arguments import RecipeError
from composer_ema.recipe.build import build
from composer_ema.recipe.run import train
from composer_ema.zoo.tokens import Characters

pytest.importorskip('transformers')

TEXT = 'Averages of weights forget where they started, and so do readers.\n' * 12
LAST = 'ep1-ba13-rank0.pt'


class StopAfter(Callback):
    """Ends a run as a kill would, after so many batches."""

    def __init__(self, batches: int) -> None:
        self.batches = batches

    def batch_start(self, state, logger) -> None:
        if state.timestamp.batch.value == self.batches:
            raise KeyboardInterrupt


@pytest.fixture(scope='module')
def folder(tmp_path_factory) -> Path:
    """A folder with a text and a recipe; `runs/whole` trained it."""
    folder = tmp_path_factory.mktemp('text')
    (folder / 'a.txt').write_text(TEXT)
    train(recipe(folder, 'whole'), lambda _: None)
    return folder


def recipe(folder: Path, name: str, **values: Any) -> schema.Recipe:
    """Of 71 blocks in 9 batches an epoch, the last of 7; trained for 1000 tokens, which 13 batches reach."""
    path = folder / f'{name}.yaml'
    whole = {
        'max_duration': '1000tok',
        'eval_interval': '500tok',
        'save_interval': '5ba',
        'progress_bar': False,
        'autoresume': True,
        'seed': 3,
        'device': 'cpu',
        'runs_folder': str(folder / 'runs'),
        'data': {
            'name': 'text_file',
            'path': str(folder / 'a.txt'),
            'sequence_length': 10,
            'batch_size': 8,
            'validation_split': 0.1,
        },
        'model': {
            'name': 'hf_causal_lm',
            'config': {'model_type': 'gpt2', 'n_positions': 10, 'n_embd': 4, 'n_layer': 1, 'n_head': 1},
        },
        'optimizer': {'name': 'adamw', 'lr': 0.01},
        'scheduler': {'name': 'one_cycle_lr', 'max_lr': 0.01},
        'algorithms': {'ema': {'half_life': '100tok', 'update_interval': '100tok', 'warmup': 0.1}},
        'evaluate': ['training', 'ema'],
    }
    path.write_text(yaml.safe_dump({**whole, **values}))
    return schema.load(path)


def checkpoint(folder: Path, run: str) -> dict[str, Any]:
    [path] = (folder / 'runs' / run / 'checkpoints').glob(LAST)
    return torch.load(path, weights_only=False)['state']


class TestTraining:
    def test_it_ends_with_the_batch_that_reaches_its_tokens(self, folder):
        time = checkpoint(folder, 'whole')['timestamp']['Timestamp']
        assert (time['batch'], time['token']) == (13, 71 * 10 + 4 * 80)

    def test_it_resumes_to_the_bit_from_the_middle_of_an_epoch(self, folder):
        with pytest.raises(KeyboardInterrupt):
            train(recipe(folder, 'halved'), lambda _: None, callbacks=[StopAfter(8)])
        shown: list[Any] = []
        train(recipe(folder, 'halved'), shown.append)
        assert any('ep0-ba5' in str(each) for each in shown)
        whole, halved = checkpoint(folder, 'whole'), checkpoint(folder, 'halved')
        for key in ('model', 'optimizers', 'schedulers'):
            assert same(whole[key], halved[key])
        ours = [dict(each['algorithms'])['EMA']['averages']['ema'] for each in (whole, halved)]
        assert same(*ours)

    def test_both_sets_of_weights_are_measured_by_loss_and_perplexity(self, folder):
        run = read_run(folder / 'runs' / 'whole')
        assert run.metrics == ['LanguageCrossEntropy', 'LanguagePerplexity']
        for label in ('training', 'ema'):
            [*_, last] = run.evaluations[label]
            assert last.metrics['LanguagePerplexity'] == pytest.approx(math.exp(last.metrics['LanguageCrossEntropy']))

    def test_the_embedding_stays_tied_in_the_average(self, folder):
        [path] = (folder / 'runs' / 'whole' / 'checkpoints').glob(LAST)
        average = load_average(path)
        names = {'model.transformer.wte.weight', 'model.lm_head.weight'}
        assert len(names & average.keys()) >= 1
        found = [average[name] for name in names & average.keys()]
        assert all(torch.equal(found[0], each) for each in found)


class TestTokenizer:
    def test_every_checkpoint_keeps_it_and_its_number_of_tokens(self, folder, tmp_path):
        hugging_face = checkpoint(folder, 'whole')['integrations']['huggingface']
        assert hugging_face['model']['config']['content']['vocab_size'] == Characters.of(TEXT).size
        loaded = HuggingFaceModel.load_huggingface_tokenizer_from_saved_state(
            hugging_face, tokenizer_save_dir=str(tmp_path)
        )
        assert loaded is not None
        assert loaded(TEXT)['input_ids'] == Characters.of(TEXT).encode(TEXT).tolist()

    def test_one_that_is_not_that_of_the_data_is_refused(self, folder):
        model = {'name': 'hf_causal_lm', 'tokenizer': 'other', 'config': {'model_type': 'gpt2'}}
        with pytest.raises(RecipeError, match=r"'other' is not the tokenizer of the data, 'characters'\. Leave it out"):
            build(recipe(folder, 'other', model=model), scratch=folder)

    def test_a_model_of_ones_own_is_told_how_many_tokens_there_are(self, folder, register):
        told = []

        def own(*, vocab_size: int | None = None) -> ComposerModel:
            told.append(vocab_size)
            return OneWeight()

        register('models', 'own', own)
        build(recipe(folder, 'own', model={'name': 'own'}), scratch=folder).trainer.close()
        assert told == [Characters.of(TEXT).size]
