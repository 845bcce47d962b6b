"""Models with losses and metrics of their own: what a run shows of them, and which of their metrics decides."""

from __future__ import annotations

import random
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from composer.models import ComposerClassifier, ComposerModel
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics import MeanAbsoluteError, MeanSquaredError, Metric, MetricCollection

from composer_ema.pictures import report
from composer_ema.pictures.curves import Point, read_run
from composer_ema.pictures.runs import draw_runs
from composer_ema.recipe import first_batch, run, schema
from composer_ema.recipe.arguments import Place, RecipeError
from composer_ema.recipe.build import build
from composer_ema.recipe.metrics import Goal, Report, deciding, directions, is_lower_better, titles
from composer_ema.sweep.measuring import measure_of
from composer_ema.zoo.dataset import Data

CLASSIFIER = ['CrossEntropy', 'MulticlassAccuracy']
LANGUAGE = ['LanguageCrossEntropy', 'LanguagePerplexity']


class TestNames:
    @pytest.mark.parametrize(
        'name', ['CrossEntropy', 'LanguagePerplexity', 'MeanAbsoluteError', 'val/NLL', 'mse', 'KLDivergence']
    )
    def test_losses_errors_and_distances_are_better_when_lower(self, name):
        assert is_lower_better(name)

    @pytest.mark.parametrize('name', ['MulticlassAccuracy', 'BinaryF1Score', 'R2Score', 'mAP', 'Immse'])
    def test_of_all_others_higher_values_are_better(self, name):
        assert not is_lower_better(name)

    def test_what_a_metric_says_of_itself_comes_before_its_name(self):
        found = directions({'Error': SimpleNamespace(higher_is_better=True), 'Loss': MeanSquaredError()})
        assert found == {'Error': False, 'Loss': True}

    def test_the_first_loss_decides_or_else_the_first_metric(self):
        assert [deciding(names) for names in (CLASSIFIER, LANGUAGE, ['Recall', 'F1'], [])] == [
            'CrossEntropy', 'LanguageCrossEntropy', 'Recall', None,
        ]  # fmt: skip

    def test_a_reader_is_told_loss_and_accuracy_only_where_there_is_one_such(self):
        assert list(titles(CLASSIFIER).values()) == ['loss', 'accuracy']
        assert list(titles(['TopAccuracy', 'Accuracy']).values()) == ['TopAccuracy', 'Accuracy']


class TestGoal:
    @pytest.mark.parametrize(
        ('given', 'names', 'goal'),
        [
            ({}, CLASSIFIER, Goal('MulticlassAccuracy', 0.9, False)),
            ({}, LANGUAGE, None),
            ({'target': 3.0}, LANGUAGE, Goal('LanguageCrossEntropy', 3.0, True)),
            ({'metric': 'LanguagePerplexity', 'target': 20.0}, LANGUAGE, Goal('LanguagePerplexity', 20.0, True)),
            ({'metric': 'x', 'target': 1.0, 'lower_is_better': True}, ['x'], Goal('x', 1.0, True)),
            ({'metric': 'x', 'target': 1.0}, CLASSIFIER, None),
        ],
    )
    def test_is_about_the_metric_that_counts(self, given, names, goal):
        assert Report(**given).goal(names) == goal

    def test_is_reached_from_its_side_with_the_rounding_of_float32(self):
        below, above = Goal('a', 20.0, lower_is_better=True), Goal('Accuracy', 0.9, lower_is_better=False)
        assert [below.is_reached({'a': value}) for value in (20.1, torch.tensor(20.00001).item(), 1.0)] == [
            False,
            True,
            True,
        ]
        assert [above.is_reached({'Accuracy': value}) for value in (0.89, torch.tensor(0.9).item(), 1.0)] == [
            False,
            True,
            True,
        ]
        assert not above.is_reached({})
        assert (str(below), str(above)) == ('a 20', '90 %')

    def test_a_direction_without_a_metric_is_refused(self):
        with pytest.raises(ValueError, match='lower_is_better=True is about metric'):
            Report(lower_is_better=True)


def line(**_: Any) -> ComposerModel:
    """A regression: its own loss and metrics."""
    metrics = MetricCollection([MeanAbsoluteError(), MeanSquaredError()])
    return ComposerClassifier(
        nn.Linear(3, 2), loss_fn=nn.functional.mse_loss, train_metrics=metrics, val_metrics=metrics
    )


def listed(**_: Any) -> ComposerModel:
    metrics: Any = [MeanSquaredError()]  # in no collection
    return ComposerClassifier(
        nn.Linear(3, 2), loss_fn=nn.functional.mse_loss, train_metrics=MeanSquaredError(), val_metrics=metrics
    )


def points(*, batch_size: int = 8) -> Data:
    inputs = torch.randn(24, 3, generator=torch.Generator().manual_seed(1))
    data = TensorDataset(inputs, inputs[:, :2] - inputs[:, 1:])
    return Data(DataLoader(data, batch_size, shuffle=True), DataLoader(data, 12))


class Autoencoder(ComposerModel):
    """Batches that are mappings, a loss of its own, a metric with an unknown direction."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 3)

    def forward(self, batch: Any) -> torch.Tensor:
        return self.layer(batch['signal'])

    def loss(self, outputs: Any, batch: Any, *_: Any, **__: Any) -> torch.Tensor:
        return (outputs - batch['signal']).square().mean()

    def get_metrics(self, is_train: bool) -> dict[str, Metric]:
        return {} if is_train else {'Reconstruction': MeanSquaredError()}

    def update_metric(self, batch: Any, outputs: Any, metric: Metric) -> None:
        metric.update(outputs, batch['signal'])


def signals(*, batch_size: int = 8) -> Data:
    data = [{'signal': each} for each in torch.randn(16, 3, generator=torch.Generator().manual_seed(1))]
    return Data(DataLoader(data, batch_size), DataLoader(data, 16))  # pyright: ignore[reportArgumentType]: a list has items


@pytest.fixture
def recipe(tmp_path, register) -> Callable[..., schema.Recipe]:
    for name, function in (('line', line), ('listed', listed), ('autoencoder', lambda **_: Autoencoder())):
        register('models', name, function)
    for name, function in (('points', points), ('signals', signals)):
        register('datasets', name, function)
    values = {
        'max_duration': '2ep', 'device': 'cpu', 'progress_bar': False, 'runs_folder': str(tmp_path / 'runs'),
        'model': {'name': 'line'}, 'data': {'name': 'points'}, 'optimizer': {'name': 'sgd', 'lr': 0.1},
        'algorithms': {'ema': {'half_life': '1ba'}},
    }  # fmt: skip
    return lambda **changed: schema.Recipe('own.yaml', 'own', {**values, **changed})


def trained(recipe: schema.Recipe) -> tuple[report.Result, run.Outcome]:
    outcome = run.train(recipe, lambda shown: None)
    return report.result(outcome), outcome


def test_a_regression_shows_its_own_metrics_and_no_accuracy(recipe):
    result, outcome = trained(recipe(report={'metric': 'MeanSquaredError', 'target': 0.001}))
    assert list(result.points['ema'][-1].metrics) == ['MeanAbsoluteError', 'MeanSquaredError']
    headings = [str(column.header) for column in report.epochs_table(result).columns]
    assert headings == [
        'epoch', 'MeanSquaredError\ntraining weights', 'MeanSquaredError\naverage',
        'MeanAbsoluteError\ntraining weights', 'MeanAbsoluteError\naverage',
    ]  # fmt: skip
    assert report.summary(result).splitlines()[0] == (
        'first epoch at MeanSquaredError 0.001, training weights: not reached'
    )
    assert report.seeds_markdown([result]).startswith(
        '| seed | weights | first epoch at MeanSquaredError 0.001 | final MeanSquaredError | final MeanAbsoluteError |'
    )
    drawn = [axes.get_ylabel() for axes in draw_runs([read_run(outcome.folder)]).axes]
    assert drawn[:4] == ['training loss', 'MeanSquaredError', 'MeanAbsoluteError', 'learning rate']
    assert read_run(outcome.folder).report == Report('MeanSquaredError', 0.001, lower_is_better=True)


def test_without_a_target_nothing_is_said_of_first_epochs(recipe):
    result = report.Result('r', 1, Report(), {'ema': [Point(1, {'MeanSquaredError': 0.5})]})
    assert report.summary(result) == ''
    assert report.seeds_markdown([result]).startswith('| seed | weights | final MeanSquaredError |')


def test_an_autoencoder_of_mappings_trains_and_its_sweep_chooses_by_its_metric(recipe):
    own = recipe(model={'name': 'autoencoder'}, data={'name': 'signals'})
    result, _ = trained(own)
    assert [list(point.metrics) for point in result.points['training']] == [['Reconstruction']] * 2
    with measure_of(own) as measure:
        assert measure.metrics == {'Reconstruction': True}, 'as MeanSquaredError says of itself'


def test_a_sweep_chooses_by_the_metric_of_the_report(recipe):
    for metric in ('MeanSquaredError', 'MeanAbsoluteError'):
        with measure_of(recipe(report={'metric': metric, 'lower_is_better': False})) as measure:
            assert (next(iter(measure.metrics)), measure.metrics[metric]) == (metric, False)


WRONG = [
    ({'report': {'metric': 'MeanSquareError'}}, 'report.metric', r"no evaluation metric 'MeanSquareError'\. Did"),
    ({'model': {'name': 'listed'}}, 'model', r"its metrics cannot be read: 'list' object .* a MetricCollection\("),
    ({'data': {'name': 'signals'}}, 'model', r'cannot take a batch of signal: float32 \(2, 3\), which data gives: '),
    (
        {'model': {'name': 'mnist1d_mlp', 'input_length': 3, 'num_classes': 2}},
        'model',
        r'mnist1d_mlp returns a network, .* data gives float32 \(2, 3\), float32 \(2, 2\)\. Let it return',
    ),
]  # fmt: skip


@pytest.mark.parametrize(
    ('changed', 'key', 'message'), WRONG, ids=[key + str(n) for n, (_, key, _) in enumerate(WRONG)]
)
def test_what_does_not_fit_is_refused_before_training(recipe, tmp_path, changed, key, message):
    with pytest.raises(RecipeError, match=message) as error:
        build(recipe(**changed), scratch=tmp_path)
    assert error.value.key == key


class Drawing(Autoencoder):
    """Draws from every generator there is, in any mode."""

    def forward(self, batch: Any) -> torch.Tensor:
        return super().forward(batch) + torch.rand(1) + random.random() + np.random.random()


def test_the_first_batch_leaves_the_model_and_the_random_numbers_as_they_were():
    model, plan = Drawing(), SimpleNamespace(model=None, data=None)
    plan.model = plan.data = SimpleNamespace(place=Place('f'), name='drawing')

    def state() -> tuple[Any, ...]:
        return torch.get_rng_state().tolist(), random.getstate(), str(np.random.get_state()), model.training

    before = state()
    first_batch.check(model, signals(), plan)  # pyright: ignore[reportArgumentType]: all that it reads
    assert state() == before
