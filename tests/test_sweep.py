"""The sweep: which averages it tries, what it chooses, says and draws, and that it agrees with the run itself."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from composer_ema import EMA, CheckpointError, Snapshots, cli
from composer_ema.pictures import sweeps
from composer_ema.posthoc.target import RunClock
from composer_ema.recipe import run, schema
from composer_ema.recipe.arguments import RecipeError
from composer_ema.run.average import Average
from composer_ema.spans import ArgumentError, Span
from composer_ema.sweep import finished_run
from composer_ema.sweep.choice import choose, difference
from composer_ema.sweep.finished_run import Opened, Simulated, sweep_run
from composer_ema.sweep.measuring import measure_of, recipe_of
from composer_ema.sweep.search import Asked, Sweep, grid, in_unit_of, overrides, sweep
from composer_ema.sweep.trials import TRAINING, Measured, Trial, TrialsFile
from composer_ema.trainer.refresh import Refresh

NOISE = np.random.default_rng(0).normal(size=50)


class FakeKept:
    """A run whose averages are their half-lives, well reconstructed from 2 to 30 % of the run."""

    clock: ClassVar = {'ba': 1000.0, 'ep': 10.0}

    def __init__(self) -> None:
        self.made: list[float] = []

    def training(self) -> dict[str, Tensor]:
        return {'half_life': torch.tensor(0.0)}

    def average(self, family: str, value: float) -> tuple[dict[str, Tensor], float]:
        self.made.append(value)
        return {'half_life': torch.tensor(value, dtype=torch.float64)}, 0.01 if 0.02 <= value <= 0.3 else 0.2


class FakeMeasure:
    """A loss with its least value at ``best``, whose parts scatter by ``noise`` times a logarithm of the half-life."""

    metrics: ClassVar = {'CrossEntropy': True, 'MulticlassAccuracy': False}

    def __init__(self, best: float = 0.07, noise: float = 0.0) -> None:
        self.best, self.noise = best, noise

    def evaluate(self, tensors: Mapping[str, Tensor], *, is_average: bool = True) -> Measured:
        half_life = float(tensors['half_life'])
        assert is_average == (half_life > 0)
        away = math.log(half_life / self.best) if half_life else 2.0
        loss = 0.25 + 0.01 * away**2
        parts = loss + self.noise * away * (NOISE - NOISE.mean())
        accuracy = 1 - loss / 2
        return Measured(
            {'CrossEntropy': loss, 'MulticlassAccuracy': accuracy},
            {'CrossEntropy': parts.tolist(), 'MulticlassAccuracy': [accuracy] * 50},
        )


def swept(path: Path, kept: Any = None, measure: Any = None, **arguments: Any) -> Sweep:
    kept, measure = kept or FakeKept(), measure or FakeMeasure()
    arguments = {'family': 'half_life', 'metric': 'CrossEntropy', **arguments}
    trials, training, choice = sweep(kept, measure, TrialsFile(path / 'sweep.jsonl', {'files': 'a'}), **arguments)
    return Sweep(
        run_name='run', family=arguments['family'], trials=trials, training=training, lower_is_better=measure.metrics,
        metric=arguments['metric'], choice=choice, clock=kept.clock, samples='400 samples held out of the training set',
        on_test=False, recipe={'algorithms': {'ema': {'half_life': '100ba'}}}, own=arguments.get('own', ()),
    )  # fmt: skip


def trial(value: float, loss: float, *, error: float = 0.0, parts: Any = ()) -> Trial:
    return Trial(f'half_life={value}dur', value, error, {'loss': loss}, {'loss': list(parts)})


WEIGHTS = Trial(TRAINING, None, None, {'loss': 1.0})


class TestWhatIsTried:
    def test_the_grid_goes_from_1_to_50_percent_in_equal_ratios(self):
        values = grid('half_life', 13)
        assert (values[0], values[-1], len(values)) == (0.01, 0.5, 13)
        assert np.diff(np.log(values)) == pytest.approx([math.log(50) / 12] * 12, rel=0.03), 'but for rounding'

    def test_around_the_best_it_is_refined(self, tmp_path):
        found = swept(tmp_path, points=5)
        values = [each.value for each in found.trials]
        assert values == [0.01, 0.0266, 0.0434, 0.0554, 0.0707, 0.0902, 0.115, 0.188, 0.5]
        assert found.choice.best.value == 0.0707

    def test_the_runs_own_half_life_is_tried_too(self, tmp_path):
        found = swept(tmp_path, points=5, own=[0.1])
        assert 0.1 in [each.value for each in found.trials]
        assert 'as trained' in sweeps.markdown(found).split('| 0.1dur |')[1].partition('\n')[0]

    def test_brackets_in_the_name_of_the_run_are_no_markup(self, tmp_path, capfd):
        cli.show(sweeps.table(dataclasses.replace(swept(tmp_path, values=[0.1]), run_name='a[b]c')))
        assert capfd.readouterr().out.startswith('a[b]c, on 400 samples')

    def test_given_values_alone_are_tried(self, tmp_path):
        assert [each.value for each in swept(tmp_path, values=[0.2, 0.05]).trials] == [0.05, 0.2]

    def test_time_strings_become_shares_of_the_run(self):
        asked = Asked(values=['0.05dur', '330ba', '1ep'])
        assert asked.shares(FakeKept.clock) == [0.05, 0.33, 0.1]
        assert Asked(family='power', values=['0.1']).shares({}) == [0.1]

    @pytest.mark.parametrize(
        ('asked', 'said'),
        [
            ({'values': ['30sp']}, r'half_life=30sp is in a unit that the run did not count\. It has ba, ep, dur'),
            ({'values': ['30']}, r'half_life takes the units'),
            ({'family': 'power', 'values': ['wide']}, r"power must be a number such as 0\.1, got 'wide'"),
            ({'family': 'power', 'values': ['0.9']}, r'power must lie in'),
            ({'points': 2}, r'points must be at least 3, got 2'),
            ({'num_batches': 0}, r'limit counts batches, at least 1, got 0'),
            ({'values': []}, r'no half-lives are given'),
        ],
    )
    def test_what_cannot_be_tried_is_refused(self, asked, said):
        with pytest.raises(ArgumentError, match=said):
            Asked(**asked).shares(FakeKept.clock)


class TestChoice:
    def test_by_hand(self):
        found = choose([trial(0.1, 0.3), trial(0.05, 0.2), trial(0.2, 0.4)], WEIGHTS, 'loss', lower_is_better=True)
        assert (found.best.value, found.edge, found.doubtful) == (0.05, 'short', None)
        assert found.training.mean == pytest.approx(0.8)
        assert found.training.standard_error is None
        assert [each.value for each in found.as_good] == [0.05]

    def test_a_higher_accuracy_is_better(self):
        found = choose([trial(0.1, 0.3), trial(0.2, 0.4)], WEIGHTS, 'loss', lower_is_better=False)
        assert (found.best.value, found.edge) == (0.2, 'long')
        assert found.training.mean == pytest.approx(-0.6), 'the training weights have 1.0: better'

    def test_what_is_predicted_badly_is_not_chosen_and_said(self):
        trials = [trial(0.01, 0.1, error=0.06), trial(0.1, 0.3), trial(0.2, 0.4), trial(0.3, 0.5)]
        found = choose(trials, WEIGHTS, 'loss', lower_is_better=True)
        assert (found.best.value, found.edge, found.doubtful) == (0.1, 'short', trials[0])
        assert choose(trials[:1], WEIGHTS, 'loss', lower_is_better=True) is None

    def test_nan_is_never_best(self):
        trials = [trial(0.1, math.nan), trial(0.2, 0.4), trial(0.3, math.inf)]
        assert choose(trials, WEIGHTS, 'loss', lower_is_better=True).best.value == 0.2

    def test_the_standard_error_is_that_of_paired_differences(self):
        one, other = np.arange(8.0), np.arange(8.0) + [1, -1] * 4
        found = difference(trial(0.1, 1.0, parts=one), trial(0.2, 0.5, parts=other), 'loss')
        assert found.mean == 0.5
        assert found.standard_error == pytest.approx(math.sqrt(8 / 7) / math.sqrt(8))
        assert found.is_within_sampling_error
        assert not difference(trial(0.1, 2.0, parts=one), trial(0.2, 0.5, parts=other), 'loss').is_within_sampling_error

    def test_few_parts_tell_nothing(self):
        found = difference(trial(0.1, 1.0, parts=range(7)), trial(0.2, 1.0, parts=range(7)), 'loss')
        assert (found.standard_error, found.is_within_sampling_error) == (None, False)

    def test_the_valley_ends_at_the_first_that_is_worse(self):
        even, uneven = np.zeros(50), NOISE - NOISE.mean()
        trials = [
            trial(0.05, 0.31, parts=even + 0.01 + uneven),
            trial(0.1, 0.5, parts=even + 0.2),
            trial(0.2, 0.3, parts=even),
            trial(0.3, 0.31, parts=even + 0.01 + uneven),
        ]
        found = choose(trials, WEIGHTS, 'loss', lower_is_better=True)
        assert [each.value for each in found.as_good] == [0.2, 0.3]

    @given(st.lists(st.floats(0, 1), min_size=1, max_size=9, unique=True))
    def test_the_best_is_the_least_and_stands_among_those_as_good(self, losses):
        trials = [trial(0.01 * (i + 1), loss) for i, loss in enumerate(losses)]
        found = choose(trials[::-1], WEIGHTS, 'loss', lower_is_better=True)
        assert found.best.metrics['loss'] == min(losses)
        assert found.best in found.as_good


class TestWhatToWrite:
    @pytest.mark.parametrize(
        ('ema', 'written'),
        [
            ({'half_life': '100ba'}, 'algorithms.ema.half_life=71ba'),
            ({'half_life': '1ep'}, 'algorithms.ema.half_life=0.707ep'),
            ({'half_life': '0.2dur'}, 'algorithms.ema.half_life=0.0707dur'),
            ({'half_life': '100tok'}, 'algorithms.ema.half_life=0.0707dur'),
            ({'half_life': {'short': '10ba', 'long': '1ep'}}, 'algorithms.ema.half_life.best=71ba'),
            ({'power': {'wide': 0.1}}, 'algorithms.ema.half_life.best=0.0707dur'),
            ({}, 'algorithms.ema.half_life=0.0707dur'),
            ({'power': 0.1}, '~algorithms.ema.power algorithms.ema.half_life=0.0707dur'),
        ],
    )
    def test_a_half_life_in_the_unit_of_the_recipe(self, ema, written):
        assert overrides({'algorithms': {'ema': ema}}, 'half_life', 0.0707, FakeKept.clock) == written

    def test_a_power(self):
        recipe = {'algorithms': {'EMA': {'half_life': '100ba', 'warmup': 0.1, 'bias_correction': False}}}
        dropped = '~algorithms.EMA.half_life ~algorithms.EMA.warmup'
        assert overrides(recipe, 'power', 0.1, {}) == f'{dropped} algorithms.EMA.power=0.1'

    def test_recipes_take_it(self, tmp_path):
        path = tmp_path / 'a.yaml'
        path.write_text(yaml.safe_dump(TINY))
        labelled = {'half_life': {'short': '3ba'}, 'power': {'wide': 0.1}, 'warmup': 0.1}
        for family, arguments, seen in (
            ('half_life', {'power': 0.1}, ['ema']),
            ('power', {'half_life': '3ba'}, ['ema']),
            ('half_life', labelled, ['short', 'wide']),
            ('power', labelled, ['short', 'wide']),
        ):
            values = {**TINY, 'algorithms': {'ema': arguments}, 'evaluate': ['training', *seen]}
            path.write_text(yaml.safe_dump(values))
            schema.plan(schema.load(path, overrides(values, family, 0.1, {}).split()))

    def test_no_half_life_is_shorter_than_a_batch(self):
        assert in_unit_of('100ba', 0.01, {'ba': 20.0}) == '1ba'


class TestTheFile:
    def test_what_was_evaluated_is_not_evaluated_again(self, tmp_path):
        first, again = FakeKept(), FakeKept()
        found = swept(tmp_path, first, points=5)
        text = (tmp_path / 'sweep.jsonl').read_text()
        assert swept(tmp_path, again, points=5) == found
        assert (len(first.made), again.made) == (9, [])
        assert (tmp_path / 'sweep.jsonl').read_text() == text

    def test_a_killed_sweep_goes_on_with_what_is_missing(self, tmp_path):
        class Killed(FakeKept):
            def average(self, family, value):
                if len(self.made) == 3:
                    raise KeyboardInterrupt
                return super().average(family, value)

        killed, again = Killed(), FakeKept()
        with pytest.raises(KeyboardInterrupt):
            swept(tmp_path, killed, points=5)
        with open(tmp_path / 'sweep.jsonl', 'a') as file:
            file.write('{"target": "half')
        found = swept(tmp_path, again, points=5)
        assert not set(killed.made) & set(again.made)
        assert len(killed.made + again.made) == len(found.trials)
        assert [json.loads(line)['target'] for line in (tmp_path / 'sweep.jsonl').read_text().splitlines()]

    def test_other_conditions_are_evaluated_anew_and_both_kept(self, tmp_path):
        path = tmp_path / 'sweep.jsonl'
        one, other = TrialsFile(path, {'files': 'a'}), TrialsFile(path, {'files': 'b'})
        one.add(trial(0.1, 0.3))
        assert other.find('half_life=0.1dur') is None
        other = TrialsFile(path, {'files': 'b'})
        other.add(trial(0.1, 0.4, parts=[1.0, 2.0]))
        assert TrialsFile(path, {'files': 'a'}).find('half_life=0.1dur') == trial(0.1, 0.3)
        assert TrialsFile(path, {'files': 'b'}).find('half_life=0.1dur') == trial(0.1, 0.4, parts=[1.0, 2.0])

    def test_nan_survives(self, tmp_path):
        TrialsFile(tmp_path / 'a', {}).add(trial(0.1, math.nan))
        assert math.isnan(TrialsFile(tmp_path / 'a', {}).find('half_life=0.1dur').metrics['loss'])


class TestWhatItSays:
    def test_the_best_and_what_to_write(self, tmp_path):
        found = swept(tmp_path, points=5)
        assert list(sweeps.conclusion(found)) == [
            'best: half_life 0.0707dur (71ba): CrossEntropy 0.2500 against 0.2900 of the training weights '
            '(MulticlassAccuracy 87.50 %); write algorithms.ema.half_life=71ba',
            'its neighbours are worse by more than sampling error, two standard errors',
        ]
        row = sweeps.markdown(found).splitlines()[6]
        assert row == '| 0.0707dur | 71ba | 0.2500 | 87.50 | 1 | best |'

    def test_a_broad_valley(self, tmp_path):
        said = list(sweeps.conclusion(swept(tmp_path, measure=FakeMeasure(noise=0.03), points=5)))
        assert said[1].startswith('a broad valley: from 0.0434dur to 0.115dur nothing is worse than the best by more')

    def test_no_gain(self, tmp_path):
        class NoGain(FakeMeasure):
            def evaluate(self, tensors, *, is_average=True):
                measured = super().evaluate(tensors, is_average=is_average)
                return measured if is_average else Measured({**measured.metrics, 'CrossEntropy': 0.2}, {})

        said = list(sweeps.conclusion(swept(tmp_path, measure=NoGain(), points=5)))
        assert said[-1] == 'no average that was tried has a better CrossEntropy than the training weights'

    @pytest.mark.parametrize(
        ('best', 'said'),
        [
            (0.004, 'the best is the shortest that was tried with a predicted error of at most 5 %, so a shorter one'),
            (0.004, '0.01dur looks better, CrossEntropy 0.2584, but has a predicted error of 20 %; more snapshots'),
            (2.0, 'the best is the longest that was tried with a predicted error of at most 5 %, so a longer one'),
        ],
    )
    def test_an_edge(self, tmp_path, best, said):
        assert any(line.startswith(said) for line in sweeps.conclusion(swept(tmp_path, measure=FakeMeasure(best))))

    def test_nothing_to_trust(self, tmp_path):
        found = swept(tmp_path, values=[0.01, 0.015])
        assert next(iter(sweeps.conclusion(found))).startswith('no average can be chosen: every one has a')
        sweeps.draw_sweep(found)
        assert 'best' not in sweeps.markdown(found)


class TestPicture:
    @pytest.mark.parametrize('metrics', [1, 2, 3, 4])
    def test_one_panel_a_metric_the_chosen_among_them(self, tmp_path, metrics):
        names = ['CrossEntropy', 'MulticlassAccuracy', 'F1', 'AUROC'][:metrics]

        class Some(FakeMeasure):
            def evaluate(self, tensors, *, is_average=True):
                loss = super().evaluate(tensors, is_average=is_average).metrics['CrossEntropy']
                return Measured({name: loss if name == 'CrossEntropy' else 1 - loss for name in names}, {})

        Some.metrics = {name: name == 'CrossEntropy' for name in names}
        figure = sweeps.draw_sweep(swept(tmp_path, measure=Some(), metric=names[-1], points=5))
        labels = [axes.get_ylabel().removesuffix(' (%)') for axes in figure.axes]
        assert labels == {4: ['CrossEntropy', 'MulticlassAccuracy', 'AUROC']}.get(metrics, names)

    def test_what_is_predicted_badly_is_hollow_and_the_best_starred(self, tmp_path):
        found = swept(tmp_path, points=5)
        axes = sweeps.draw_sweep(found).axes[0]
        level, _, solid, hollow, star, _ = axes.get_lines()
        assert list(level.get_ydata()) == [pytest.approx(0.29)] * 2
        assert list(hollow.get_xdata()) == [0.01, 0.5]
        assert hollow.get_markerfacecolor() == 'white'
        assert len(solid.get_xdata()) == len(found.trials) - 2
        assert (star.get_marker(), list(star.get_xdata())) == ('*', [0.0707])

    def test_the_legend_names_what_is_there(self, tmp_path):
        def texts(found):
            return [text.get_text() for text in sweeps.draw_sweep(found).legends[0].get_texts()]

        assert texts(swept(tmp_path, points=5)) == [
            'average, reconstructed',
            'predicted error above 5 %',
            'training weights at the end',
            'best CrossEntropy: half_life 0.0707dur (71ba)',
        ]
        assert 'predicted error above 5 %' not in texts(swept(tmp_path, values=[0.05, 0.1]))
        broad = swept(tmp_path / 'broad', measure=FakeMeasure(noise=0.03), points=5)
        assert texts(broad)[-1] == 'CrossEntropy as good, within sampling error'

    def test_a_loss_that_jumps_leaves_the_valley_and_the_training_weights_in_view(self, tmp_path):
        class Steep(FakeMeasure):
            def evaluate(self, tensors, *, is_average=True):
                measured = super().evaluate(tensors, is_average=is_average)
                loss = 80.0 if float(tensors['half_life']) > 0.15 else measured.metrics['CrossEntropy']
                return Measured({**measured.metrics, 'CrossEntropy': loss}, measured.parts)

        figure = sweeps.draw_sweep(swept(tmp_path, measure=Steep(), points=5))
        low, high = figure.axes[0].get_ylim()
        assert low < 0.25 < 0.29 < high < 0.5
        assert list(figure.axes[0].get_lines()[-1].get_xdata()) == [0.188, 0.5]
        assert 'worse, outside the picture' in [text.get_text() for text in figure.legends[0].get_texts()]


TINY: dict[str, Any] = {
    'max_duration': '2ep',
    'seed': 3,
    'device': 'cpu',
    'progress_bar': False,
    'model': {'name': 'mnist1d_cnn', 'channels': 4},
    'data': {'name': 'mnist1d', 'num_samples': 200, 'batch_size': 16, 'eval_batch_size': 20, 'validation_split': 0.25},
    'optimizer': {'name': 'adamw', 'lr': 0.01, 'param_groups': [{'match': 'bias$', 'weight_decay': 0}]},
    'scheduler': {'name': 'one_cycle_lr', 'max_lr': 0.02},
    'algorithms': {
        'ema': {'half_life': '3ba'},
        'gradient_clipping': {'clipping_type': 'norm', 'clipping_threshold': 1.0},
    },
    'callbacks': {'lr_monitor': {}},
    'evaluate': ['training', 'ema'],
}


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    """Writes the recipe of a finished run into a run folder."""

    def write(**values: Any) -> Path:
        folder = tmp_path / 'run'
        folder.mkdir(exist_ok=True)
        (folder / 'recipe.yaml').write_text(yaml.safe_dump({**TINY, 'runs_folder': str(tmp_path), **values}))
        return folder

    return write


class TestWhatItEvaluatesOn:
    def test_samples_that_were_held_out(self, write):
        with measure_of(recipe_of(write())) as measure:
            assert measure.samples == '40 samples held out of the training set (validation_split=0.25)'
            assert measure.metrics == {'CrossEntropy': True, 'MulticlassAccuracy': False}

    @pytest.mark.parametrize('data', [{}, {'validation_split': 0}, {'validation_split': 0.0}])
    def test_never_the_test_set(self, write, data):
        folder = write(data={'name': 'mnist1d', 'num_samples': 200, **data})
        said = r'recipe\.yaml: data\.validation_split: this run held out no.*data\.validation_split=0\.1.*--on-test'
        with pytest.raises(RecipeError, match=said):
            recipe_of(folder)

    @pytest.mark.parametrize('split', [0, 0.25])
    def test_the_test_set_where_told_to(self, write, split):
        folder = write(data={**TINY['data'], 'validation_split': split})
        with measure_of(recipe_of(folder, on_test=True)) as measure:
            assert measure.samples == '40 samples of the test set'

    def test_a_data_set_that_holds_nothing_out_says_what_to_add(self, write, register):
        from composer_ema.zoo.data import mnist1d
        from composer_ema.zoo.dataset import dataset

        @dataset(samples=lambda given: 160)
        def stubborn(*, batch_size: int = 16):
            return mnist1d(num_samples=200, batch_size=batch_size)

        register('datasets', 'stubborn', stubborn)
        with pytest.raises(RecipeError, match='Let the function of stubborn take validation_split'):
            recipe_of(write(data={'name': 'stubborn'}))

    @pytest.mark.parametrize('override', ['data.validation_split=0.5', 'data.data_seed=7', '~data.num_samples'])
    def test_an_override_that_may_hold_out_other_samples_is_refused(self, write, override):
        with pytest.raises(RecipeError, match='may evaluate it on samples that it has trained on'):
            recipe_of(write(), [override])

    def test_how_they_are_read_may_differ(self, write):
        with measure_of(recipe_of(write(), ['data.eval_batch_size=10']), num_batches=2) as measure:
            assert measure.samples.startswith('2 of 4 batches of 40 samples held out')


class TestMeasure:
    @pytest.fixture
    def folder(self, write: Callable[..., Path]) -> Path:
        return write()

    def test_parts_are_the_same_samples_each_time_and_average_to_the_whole(self, folder):
        with measure_of(recipe_of(folder)) as measure:
            tensors = {name: each.clone() for name, each in measure._run.trainer.state.model.state_dict().items()}
            first, again = measure.evaluate(tensors), measure.evaluate(tensors)
        assert first == again
        assert len(first.parts['CrossEntropy']) == 40, 'one sample each'
        for name, value in first.metrics.items():
            assert np.mean(first.parts[name]) == pytest.approx(value, abs=1e-6)

    def test_algorithms_that_may_change_the_model_stay_and_averages_and_files_go(self, folder):
        with measure_of(recipe_of(folder)) as measure:
            state = measure._run.trainer.state
            assert [type(each).__name__ for each in state.algorithms] == ['GradientClipping']
            assert not any(type(each).__name__ in ('CheckpointSaver', 'LRMonitor') for each in state.callbacks)

    def test_weights_of_another_model_are_refused_by_name(self, folder):
        said = r'does not fit the model.*missing.*The recipe in its folder builds'
        with measure_of(recipe_of(folder)) as measure, pytest.raises(ValueError, match=said):
            measure.evaluate({})

    def test_batchnorm_is_refreshed_for_averages_alone_where_asked(self, folder):
        with measure_of(recipe_of(folder)) as plain, measure_of(recipe_of(folder), refresh=Refresh(True)) as fresh:
            assert fresh.has_batchnorm
            tensors = {name: each.clone() for name, each in plain._run.trainer.state.model.state_dict().items()}
            kept = plain.evaluate(tensors)
            assert fresh.evaluate(tensors, is_average=False) == kept
            assert fresh.evaluate(tensors).metrics['CrossEntropy'] != kept.metrics['CrossEntropy']
            assert all(
                torch.equal(each, plain._run.trainer.state.model.state_dict()[name]) for name, each in tensors.items()
            )


@pytest.fixture(scope='module')
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run with snapshots, whose last two batches made no update."""
    folder = tmp_path_factory.mktemp('runs')
    ema = {'half_life': '6ba', 'update_interval': '3ba', 'snapshots': '0.1dur'}
    values = {**TINY, 'runs_folder': str(folder), 'run_name': 'tiny', 'max_duration': '4ep', 'algorithms': {'ema': ema}}
    (folder / 'tiny.yaml').write_text(yaml.safe_dump(values))
    run.train(schema.load(folder / 'tiny.yaml'), lambda _: None)
    return folder / 'tiny'


@pytest.fixture
def again(finished: Path, tmp_path: Path) -> Path:
    """A copy of the run folder for one test."""
    return Path(shutil.copytree(finished, tmp_path / 'tiny', symlinks=True))


@dataclass
class Watched:
    """A sweep of a finished run, and what it did."""

    found: Sweep
    folder: Path
    reports: list[tuple[int, int, str]]
    opened: list[Path]
    before: dict[Path, bytes]


@pytest.fixture(scope='module')
def watched(finished: Path, tmp_path_factory: pytest.TempPathFactory) -> Watched:
    folder = Path(shutil.copytree(finished, tmp_path_factory.mktemp('watched') / 'tiny', symlinks=True))
    before = contents(folder)
    reports, opened, original = [], [], finished_run.OpenRun
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(finished_run, 'OpenRun', lambda folder: opened.append(folder) or original(folder))
        found = sweep_run(
            folder, Asked(points=3), report=lambda done, total, trial: reports.append((done, total, trial.target))
        )
    return Watched(found, folder, reports, opened, before)


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob('*') if path.is_file() and not path.is_symlink()}


class TestOfARun:
    def test_it_gives_what_the_run_itself_saw(self, watched):
        last = [json.loads(line) for line in (watched.folder / 'metrics.jsonl').read_text().splitlines()][-1]
        found = watched.found
        own = next(each for each in found.trials if each.value == 0.188)
        assert found.own == [6 / 32]
        for name, value in found.training.metrics.items():
            assert value == pytest.approx(last[f'metrics/eval_training/{name}'], rel=1e-6)
        assert own.predicted_error < 0.05
        assert own.metrics['CrossEntropy'] == pytest.approx(last['metrics/eval_ema/CrossEntropy'], rel=2e-3)
        assert found.samples == '40 samples held out of the training set (validation_split=0.25)'
        assert found.clock['ba'] == 32

    def test_its_reports_count_up(self, watched):
        assert watched.reports[:5] == [
            (1, 9, 'training'),
            (2, 9, 'half_life=0.01dur'),
            (3, 9, 'half_life=0.0707dur'),
            (4, 9, 'half_life=0.188dur'),
            (5, 9, 'half_life=0.5dur'),
        ]

    def test_it_opens_the_files_once(self, watched):
        assert watched.opened == [watched.folder]

    def test_one_file_appears_and_the_run_stays_as_it_was(self, watched):
        after = contents(watched.folder)
        assert after.keys() - watched.before.keys() == {watched.folder / 'sweep.jsonl'}
        assert {path: after[path] for path in watched.before} == watched.before

    def test_averages_forget_their_start_as_the_recipe_says(self, again):
        recipe = yaml.safe_load((again / 'recipe.yaml').read_text())
        asked = Asked(values=['0.5dur'], num_batches=1)
        plain = sweep_run(again, asked)
        recipe['algorithms']['ema']['bias_correction'] = True
        (again / 'recipe.yaml').write_text(yaml.safe_dump(recipe))
        corrected = sweep_run(again, asked)
        assert corrected.trials[-1].metrics != plain.trials[-1].metrics
        assert 'all of these averages have bias_correction=True, as in the recipe' in sweeps.conclusion(corrected)

    @pytest.mark.parametrize('changes', [{'bias_correction': True}, {'warmup': 0.5}])
    def test_simulated_weights_are_those_of_the_algorithm(self, trainer, monkeypatch, changes):
        weights, original = [], Average.record

        def record(self, look: Any, move: Any) -> None:
            weights.append(move[0])
            original(self, look, move)

        monkeypatch.setattr(Average, 'record', record)
        trainer([EMA(half_life='2ba', **changes)]).fit()
        simulated = Simulated(Span(2, 'ba'), changes).weights(RunClock({'ba': np.arange(1.0, 7.0)}))
        assert simulated.tolist() == pytest.approx(weights, rel=1e-12)

    def test_files_that_were_replaced_are_of_another_run(self, again):
        def targets() -> list[str]:
            sweep_run(again, Asked(values=['0.1dur'], num_batches=1))
            return [json.loads(line)['target'] for line in (again / 'sweep.jsonl').read_text().splitlines()]

        first = targets()
        os.utime(max((again / 'snapshots').glob('*')))
        assert targets() == first * 2

    def test_a_folder_without_a_recipe_is_refused(self, tmp_path):
        with pytest.raises(CheckpointError, match=r'has no recipe\.yaml'):
            sweep_run(tmp_path, Asked())

    def test_a_run_that_has_not_ended_is_refused(self, tmp_path):
        model = torch.nn.Linear(1, 1)
        snapshots = Snapshots(model, tmp_path / 'snapshots', every=2, num_steps=8)
        for _ in range(5):
            snapshots.update()
        with pytest.raises(CheckpointError, match=r'has not ended\. Train the rest with autoresume=true'):
            Opened(tmp_path)
        for _ in range(3):
            snapshots.update()
        snapshots.finish()
        opened = Opened(tmp_path)
        assert opened.clock['ba'] == 8
        assert all(torch.equal(each, opened.training()[name]) for name, each in model.state_dict().items())

    def test_beside_checkpoints_in_the_run_folder_itself_what_was_evaluated_counts_again(self, tmp_path):
        kept = {'save_folder': str(tmp_path / 'tiny'), 'save_interval': '5ba', 'save_num_checkpoints_to_keep': -1}
        ema = {'half_life': '6ba', 'update_interval': '1ba'}
        values = {**TINY, 'runs_folder': str(tmp_path), 'run_name': 'tiny', 'algorithms': {'ema': ema}, **kept}
        (tmp_path / 'tiny.yaml').write_text(yaml.safe_dump(values))
        run.train(schema.load(tmp_path / 'tiny.yaml'), lambda _: None)
        asked = Asked(values=['0.2dur'], num_batches=1)
        sweep_run(tmp_path / 'tiny', asked)
        lines = (tmp_path / 'tiny/sweep.jsonl').read_text()
        (tmp_path / 'tiny/sweep.png').write_bytes(b'')
        sweep_run(tmp_path / 'tiny', asked)
        assert (tmp_path / 'tiny/sweep.jsonl').read_text() == lines

    def test_a_metric_that_is_not_there_is_refused(self, again):
        with pytest.raises(ArgumentError, match=r"no metric 'CrossEntrop'\. Did you mean 'CrossEntropy'"):
            sweep_run(again, Asked(metric='CrossEntrop'))


class TestCommand:
    @pytest.fixture
    def call(self, call: Callable[..., tuple[int, str, str]]) -> Callable[..., tuple[int, str, str]]:
        return lambda *arguments: call('sweep', *arguments)

    def test_statistics_that_the_model_does_not_have_cannot_be_refreshed(self, call, tmp_path):
        model = {'name': 'mnist1d_mlp', 'width': 4}
        ema = {'half_life': '6ba', 'update_interval': '3ba', 'snapshots': '0.1dur'}
        values = {**TINY, 'model': model, 'runs_folder': str(tmp_path), 'run_name': 'tiny', 'algorithms': {'ema': ema}}
        (tmp_path / 'tiny.yaml').write_text(yaml.safe_dump(values))
        run.train(schema.load(tmp_path / 'tiny.yaml'), lambda _: None)
        code, _, err = call(tmp_path / 'tiny', '--refresh-batchnorm', 'true')
        assert code == 2
        assert 'refresh_batchnorm=True has no effect: the model has no BatchNorm layer' in err

    def test_table_sentences_and_picture(self, call, again):
        code, out, err = call(again, '--points', 3, '--metric', 'MulticlassAccuracy', '--limit', 1)
        assert code == 0
        assert '\nbest: half_life 0.' in out
        assert '; write algorithms.ema.half_life=' in out
        assert out.rstrip().endswith(f'written: {again}/sweep.png\nwritten: {again}/sweep.svg')
        assert err.splitlines()[0].startswith('1 of 9, training: CrossEntropy ')
        assert (again / 'sweep.png').stat().st_size > 10_000

    def test_power_on_test_which_it_says_in_every_place(self, call, again):
        code, out, _ = call(again, '--on-test', '--powers', '0.1', '--limit', '1', '--out', again / 'a.svg')
        assert code == 0
        assert 'tiny, on 1 of 2 batches of 40 samples of the test set' in out
        assert 'best ON THE TEST SET: power 0.1' in out
        assert '; write ~algorithms.ema.half_life algorithms.ema.power=0.1' in out
        assert 'this choice fits the test set' in out
        asked = Asked(family='power', values=['0.1'], num_batches=1, on_test=True)
        title = sweeps.draw_sweep(sweep_run(again, asked)).get_suptitle()
        assert title.startswith('CHOSEN ON THE TEST SET: tiny')

    @pytest.mark.parametrize(
        ('arguments', 'said'),
        [
            (['--half-lives', '0.1dur', '--power'], 'two sweeps'),
            (['--half-lives', '3tok'], 'half_life=3tok is in a unit that the run did not count'),
            (['--points', '1'], 'points must be at least 3, got 1'),
            (['data.validation_split=0.1'], 'may evaluate it on samples that it has trained on'),
            (['--refresh-batchnorm', '3sp'], 'refresh_batchnorm takes the units'),
            (['--refresh-batchnorm', '0'], 'refresh_batchnorm must be at least 1 batch, got 0'),
            (['--refresh-batchnorm', '2ep'], "refresh_batchnorm takes at most one epoch, got '2ep'"),
        ],
    )
    def test_what_cannot_be_is_one_line_and_exit_code_2(self, call, finished, arguments, said):
        code, _, err = call(finished, *arguments)
        assert code == 2
        assert said in ' '.join(err.replace('│', ' ').split())
        assert not (finished / 'sweep.jsonl').exists()
