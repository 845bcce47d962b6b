"""Callbacks that read or export the model see training weights, and on export the average where that is asked for."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import toy
from composer import Callback
from composer.callbacks import ExportForInferenceCallback, OptimizerMonitor, RuntimeEstimator
from composer.loggers import InMemoryLogger
from composer.optim import DecoupledAdamW
from torch import Tensor

from composer_ema import EMA, SWA
from composer_ema.recipe import schema
from composer_ema.recipe.build import build


def exported(path: Path) -> dict[str, Tensor]:
    """The tensors of an exported model, without the buffers that torch.jit makes of constants."""
    return dict(torch.jit.load(path).state_dict())


def exporter(tmp_path: Path) -> ExportForInferenceCallback:
    return ExportForInferenceCallback('torchscript', str(tmp_path / 'model.pt'))


def average(algorithm: EMA | SWA) -> dict[str, Tensor]:
    saved = algorithm.state_dict()['averages'][algorithm.name]
    return {**saved['parameters'], **saved['buffers']}


class TestExportForInference:
    def test_writes_the_average_where_it_is_asked_for(self, trainer, tmp_path):
        ema = EMA('2ba', export_weights='ema')
        run = trainer([ema], callbacks=[exporter(tmp_path)])
        run.fit()
        assert toy.bits(exported(tmp_path / 'model.pt')) == toy.bits(average(ema))
        assert toy.bits(run.state.model) != toy.bits(average(ema))

    def test_writes_an_equal_average_with_refreshed_statistics_too(self, trainer, tmp_path):
        swa = SWA('0.5dur', export_weights='swa')
        run = trainer([swa], callbacks=[exporter(tmp_path)])
        run.fit()
        found, expected = exported(tmp_path / 'model.pt'), average(swa)
        # Whole numbers are never lent: the count of BatchNorm's batches, which inference does not read.
        assert found.pop('module.1.num_batches_tracked') == 6
        assert expected.pop('module.1.num_batches_tracked') == 3
        assert toy.bits(found) == toy.bits(expected)

    def test_writes_the_training_weights_by_default(self, trainer, tmp_path):
        run = trainer([EMA('2ba')], callbacks=[exporter(tmp_path)])
        run.fit()
        assert toy.bits(exported(tmp_path / 'model.pt')) == toy.bits(run.state.model)

    def test_leaves_training_as_it_is_without_it_also_when_training_goes_on(self, trainer, tmp_path):
        plain = trainer([])
        plain.fit()
        plain.fit(duration='1ep')
        run = trainer([EMA('2ba', export_weights='ema')], callbacks=[exporter(tmp_path)])
        run.fit()
        first = exported(tmp_path / 'model.pt')
        run.fit(duration='1ep')
        assert toy.bits(run.state.model) == toy.bits(plain.state.model)
        assert toy.bits(exported(tmp_path / 'model.pt')) == toy.bits(average(run.state.algorithms[0]))
        assert toy.bits(exported(tmp_path / 'model.pt')) != toy.bits(first)

    def test_that_fails_leaves_the_training_weights_in_the_model(self, trainer, tmp_path):
        def refuse(model: Any) -> None:
            raise OSError('disk full')

        failing = ExportForInferenceCallback('torchscript', str(tmp_path / 'model.pt'), transforms=[refuse])
        run = trainer([EMA('2ba', export_weights='ema')], callbacks=[failing])
        seen = Watch()
        run.state.callbacks.insert(0, seen)
        with pytest.raises(OSError, match='disk full'):
            run.fit()
        assert toy.bits(run.state.model) == seen.last

    def test_that_is_called_while_the_average_is_lent_leaves_it_lent(self, trainer, tmp_path):
        ema, callback = EMA('2ba', export_weights='ema'), exporter(tmp_path)
        run = trainer([ema], callbacks=[callback])
        run.fit()
        ema.get_ema_model(run.state.model)
        callback.export_model(run.state, run.logger)
        assert ema.ema_weights_active
        ema.get_training_model(run.state.model)

    def test_of_a_model_that_was_never_averaged_is_of_the_training_weights(self, trainer, tmp_path):
        run = trainer([EMA('2ba', ema_start='9ep', export_weights='ema')], callbacks=[exporter(tmp_path)])
        with pytest.warns(UserWarning, match='training ended before the first update'):
            run.fit()
        assert toy.bits(exported(tmp_path / 'model.pt')) == toy.bits(run.state.model)

    def test_without_an_exporter_is_warned_of(self, trainer):
        run = trainer([EMA('2ba', export_weights='ema')])
        with pytest.warns(UserWarning, match=r"export_weights='ema' has no effect.*Add ExportForInferenceCallback"):
            run.fit()

    def test_of_other_weights_is_refused(self):
        with pytest.raises(ValueError, match=r"export_weights must be 'ema' or 'training', got 'swa'"):
            EMA(export_weights='swa')  # pyright: ignore[reportArgumentType]: what is tested

    def test_algorithm_that_lends_can_be_copied(self, trainer, tmp_path):
        run = trainer([EMA('2ba', export_weights='ema')], callbacks=[exporter(tmp_path)])
        run.fit()
        twin = pickle.loads(pickle.dumps(copy.deepcopy(run.state.algorithms[0])))
        assert repr(twin) == "EMA(half_life='2ba', export_weights='ema')"

    def test_from_a_recipe(self, tmp_path):
        model = tmp_path / 'model.pt'
        values: dict[str, Any] = {
            'max_duration': '3ba',
            'progress_bar': False,
            'device': 'cpu',
            'runs_folder': str(tmp_path),
            'model': {'name': 'fashion_cnn', 'num_classes': 3},
            'data': {'name': 'fake', 'image_size': [1, 17, 17], 'num_classes': 3, 'size': 24, 'batch_size': 8},
            'optimizer': {'name': 'sgd', 'lr': 0.1},
            'algorithms': {'ema': {'half_life': '2ba', 'export_weights': 'ema'}},
            'callbacks': {'export_for_inference': {'save_format': 'torchscript', 'save_path': str(model)}},
        }
        built = build(schema.Recipe('a.yaml', 'a', values))
        built.trainer.fit()
        built.trainer.close()
        assert toy.bits(exported(model)) == toy.bits(average(built.trainer.state.algorithms[0]))  # pyright: ignore


class Watch(Callback):
    """Keeps the weights that every batch ended with."""

    last: dict[str, bytes]

    def batch_end(self, state, logger) -> None:
        self.last = toy.bits(state.model)


def test_optimizer_monitor_logs_the_same_numbers_with_and_without_the_average(trainer):
    def logged(algorithms: list[Any]) -> dict[str, list[float]]:
        memory = InMemoryLogger()
        model, evaluators = toy.make_model(), [toy.make_evaluator(interval='1ba')]
        run = trainer(
            algorithms,
            callbacks=[OptimizerMonitor(batch_log_interval=1)],
            loggers=[memory],
            eval_dataloader=evaluators,
            optimizers=DecoupledAdamW(model.parameters(), lr=0.01),
            model=model,
        )
        run.fit()
        return {
            name: [float(value) for _, value in values]
            for name, values in memory.data.items()
            if 'l2_norm' in name
        }  # fmt: skip

    plain = logged([])
    assert {'l2_norm/param/module.0.weight', 'l2_norm/grad/global'} <= plain.keys()
    assert len(set(plain['l2_norm/param/module.0.weight'])) > 1
    assert logged([EMA('1ba')]) == plain


def test_runtime_estimator_works_beside_the_average(trainer):
    memory = InMemoryLogger()
    evaluators = [toy.make_evaluator()]
    run = trainer([EMA('1ba')], callbacks=[RuntimeEstimator()], loggers=[memory], eval_dataloader=evaluators)
    run.fit()
    assert any('remaining_estimate' in name for name in memory.data)


def test_hugging_face_model_trains_unchanged_and_is_saved_with_the_average(trainer, tmp_path):
    transformers = pytest.importorskip(
        'transformers', reason='needs transformers below 4.54, as mosaicml 0.32 wants: pip install mosaicml[nlp]'
    )
    from composer.models import HuggingFaceModel

    def make() -> HuggingFaceModel:
        torch.manual_seed(0)
        config = transformers.BertConfig(
            vocab_size=20, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8, num_labels=3
        )
        network = transformers.BertForSequenceClassification(config)
        return HuggingFaceModel(network, tokenizer=None, use_logits=True)

    def data() -> torch.utils.data.DataLoader:
        generator = torch.Generator().manual_seed(1)
        rows = [
            {'input_ids': ids, 'attention_mask': torch.ones_like(ids), 'labels': torch.tensor(i % 3)}
            for i, ids in enumerate(torch.randint(20, (8, 5), generator=generator))
        ]
        return torch.utils.data.DataLoader(rows, batch_size=4, generator=torch.Generator())  # pyright: ignore

    def fitted(algorithms: list[Any]) -> Any:
        model = make()
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        run = trainer(algorithms, model=model, optimizers=optimizer, train_dataloader=data(), eval_dataloader=data())
        run.fit()
        return run

    plain, averaged = fitted([]), fitted([ema := EMA('2ba')])
    assert toy.bits(averaged.state.model) == toy.bits(plain.state.model)
    saved = make()
    ema.get_ema_model(saved).model.save_pretrained(tmp_path)
    loaded = transformers.BertForSequenceClassification.from_pretrained(tmp_path)
    of_average = {name.removeprefix('model.'): tensor for name, tensor in average(ema).items()}
    assert toy.bits(dict(loaded.named_parameters())).items() <= toy.bits(of_average).items()
