"""The numbers behind the pictures of runs: what a metrics file says, and how it is smoothed."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from points import classified
from recipes import tiny

from composer_ema.pictures.asked import check_axis, sort_arguments
from composer_ema.pictures.curves import evaluations, first_reaching, read_lines, read_run, read_runs
from composer_ema.pictures.errors import PlotError
from composer_ema.pictures.smoothing import smoothed
from composer_ema.pictures.weights import in_words
from composer_ema.recipe import schema
from composer_ema.recipe.build import build
from composer_ema.recipe.metrics import Goal, Report
from composer_ema.run_folder.recorder import momentum_of, step_settings

TINY = tiny(seed=3, progress_bar=False, optimizer={'momentum': 0.9}, algorithms={})


def write_lines(folder: Path, lines: list[dict[str, Any]], *, end: str = '') -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / 'metrics.jsonl').write_text(''.join(json.dumps(line) + '\n' for line in lines) + end)
    return folder


def batches(*losses: float, **more: Any) -> list[dict[str, Any]]:
    return [
        {'epoch': n / 4, 'batch': n, 'sample': 10 * n, 'loss/train/total': loss, **more}
        for n, loss in enumerate(losses, start=1)
    ]


def record(tmp_path: Path, **sections: Any) -> Path:
    """Trains a tiny recipe and returns its run folder."""
    recipe = schema.Recipe('tiny.yaml', 'tiny', {**TINY, 'runs_folder': str(tmp_path), **sections})
    run = build(recipe)
    try:
        run.trainer.fit()
    finally:
        run.trainer.close()
    return run.folder


class TestReading:
    def test_curves_by_hand(self, tmp_path):
        lines = batches(2.0, 1.0, **{'lr/group0': 0.1, 'momentum/group0': 0.9})
        lines.append({'epoch': 0.5, 'batch': 2, 'sample': 20, 'ema/relative_distance': 0.25,
                      'metrics/eval_ema/MulticlassAccuracy': 0.75, 'metrics/eval_ema/CrossEntropy': 0.5})  # fmt: skip
        run = read_run(write_lines(tmp_path / 'a', lines))
        assert run.name == 'a'
        assert run.loss.value.tolist() == [2.0, 1.0]
        assert [run.loss.over(axis).tolist() for axis in ('epoch', 'batch', 'sample')] == [
            [0.25, 0.5], [1, 2], [10, 20],
        ]  # fmt: skip
        assert {name: curve.value.tolist() for name, curve in run.rates.items()} == {'group 0': [0.1, 0.1]}
        assert {name: curve.value.tolist() for name, curve in run.momenta.items()} == {'group 0': [0.9, 0.9]}
        assert run.momentum_names == ('momentum',)
        assert run.evaluations == {'ema': [classified(0.5, 0.75, 0.5, 2, 20)]}
        assert run.distances['ema'].value.tolist() == [0.25]
        assert run.report is None
        assert run.goal is None

    def test_a_file_without_rates_still_reads(self, tmp_path):
        run = read_run(write_lines(tmp_path / 'old', batches(2.0, 1.0)))
        assert run.loss.value.tolist() == [2.0, 1.0]
        assert run.rates == {}
        assert run.momenta == {}

    def test_a_group_that_is_not_written_equals_the_first_and_equal_groups_are_one_curve(self, tmp_path):
        lines = batches(1.0, 1.0, **{'lr/group0': 0.1, 'momentum/group0': 0.9})
        lines[1] |= {'lr/group1': 0.01, 'lr/group3': 0.01}
        run = read_run(write_lines(tmp_path / 'a', lines))
        assert {name: curve.value.tolist() for name, curve in run.rates.items()} == {
            'group 0': [0.1, 0.1], 'groups 1, 3': [0.1, 0.01],
        }  # fmt: skip
        assert list(run.momenta) == ['group 0']

    def test_momenta_are_one_curve_under_the_name_that_the_optimizer_gives(self, tmp_path):
        lines = batches(1.0, 1.0, 1.0, **{'lr/group0': 0.1})
        lines[0]['momentum/group0'] = 0.9  # an earlier release, for Adam too
        lines[1]['beta1/group0'] = lines[2]['beta1/group0'] = 0.8
        run = read_run(write_lines(tmp_path / 'adam', lines))
        assert {name: curve.value.tolist() for name, curve in run.momenta.items()} == {'group 0': [0.9, 0.8, 0.8]}
        assert run.momentum_names == ('beta1',)
        lines = batches(1.0, 1.0, **{'lr/group0': 0.1, 'momentum/group0': 0.9, 'beta1/group1': 0.8})
        run = read_run(write_lines(tmp_path / 'both', lines))
        assert {name: curve.value.tolist() for name, curve in run.momenta.items()} == {
            'group 0': [0.9, 0.9], 'group 1': [0.8, 0.8],
        }  # fmt: skip
        assert run.momentum_names == ('momentum', 'beta1')

    def test_the_last_line_of_a_run_that_goes_on_may_be_half_written(self, tmp_path):
        folder = write_lines(tmp_path / 'a', batches(2.0, 1.0), end='{"epoch": 0.7, "ba')
        assert [line['batch'] for line in read_lines(folder)] == [1, 2]

    def test_losses_that_are_no_number_stay_as_they_are(self, tmp_path):
        run = read_run(write_lines(tmp_path / 'a', batches(2.0, math.nan, math.inf)))
        assert np.array_equal(run.loss.value, [2.0, math.nan, math.inf], equal_nan=True)

    def test_the_target_is_the_recipes(self, tmp_path):
        folder = write_lines(tmp_path / 'a', batches(2.0))
        (folder / 'recipe.yaml').write_text('report: {target_accuracy: 0.75}')
        assert read_run(folder).report == Report(target_accuracy=0.75)
        for wrong in ('report: [', 'report: {target_accuracy: high}', 'report: {metric: 3}', 'report: {colour: red}'):
            (folder / 'recipe.yaml').write_text(wrong)
            assert read_run(folder).report is None

    def test_runs_of_one_name_are_told_apart_by_the_folders_above(self, tmp_path):
        folders = [write_lines(tmp_path / name, batches(1.0)) for name in ('a/x', 'b/x', 'b/y')]
        assert [run.name for run in read_runs(folders)] == ['a/x', 'b/x', 'b/y']
        assert [run.name for run in read_runs(map(str, folders))] == ['a/x', 'b/x', 'b/y']
        with pytest.raises(PlotError, match=r'takes a list of run folders, got .* Put it in brackets'):
            read_runs(str(folders[0]))
        assert [run.name for run in read_runs(folders[1:])] == ['x', 'y']
        with pytest.raises(PlotError, match='was given twice'):
            read_runs([folders[0], tmp_path / 'b/../a/x'])

    def test_an_evaluator_of_composers_own_name_counts_too(self):
        line = {'epoch': 1.0, 'batch': 4, 'sample': 40, 'metrics/eval/MulticlassAccuracy': 0.5}
        assert evaluations([line, {'epoch': 1.0, 'metrics/train/MulticlassAccuracy': 1.0}]) == {
            'eval': [classified(1.0, 0.5, None, 4, 40)]
        }

    def test_training_weights_come_first(self):
        line = {f'metrics/eval_{weights}/Accuracy': 0.5 for weights in ('ema', 'training')}
        assert list(evaluations([{'epoch': 1.0, **line}])) == ['training', 'ema']

    def test_averages_come_in_the_order_of_the_run_under_any_name(self, tmp_path):
        lines = [{'epoch': 1.0, **{f'metrics/eval_{label}/Accuracy': 0.5 for label in ('slow', 'fast', 'training')}}]
        assert list(evaluations([*lines, {'epoch': 2.0, 'metrics/eval_late/Accuracy': 0.5}])) == [
            'training', 'slow', 'fast', 'late',
        ]  # fmt: skip
        lines = [{'epoch': 1.0, 'batch': 4, 'sample': 40, 'late/relative_distance': 0.5, **lines[0]}]
        assert read_run(write_lines(tmp_path / 'a', lines)).weights == ['training', 'slow', 'fast', 'late']

    def test_an_average_that_is_alone_is_called_so_and_several_by_their_labels(self):
        for label in ('ema', 'swa', 'half_life_100ba'):
            assert in_words([label, 'training']) == {'training': 'training weights', label: 'average'}
        assert in_words(['ema', 'swa']) == {'ema': 'ema', 'swa': 'swa'}
        assert in_words(['eval', 'ema']) == {'eval': 'evaluated weights', 'ema': 'average'}

    def test_a_metrics_file_stands_for_its_folder(self, tmp_path):
        folder = write_lines(tmp_path / 'a', [])
        assert sort_arguments([f'{folder}/metrics.jsonl', str(folder)]).folders == [folder, folder]

    @pytest.mark.parametrize(
        ('content', 'said'),
        [
            (None, 'has no metrics.jsonl. Runs in it: '),
            ('', 'holds no training loss, learning rate or evaluation yet'),
            ('{"epoch": 1, "batch": 2, "sample": 3}\n', 'holds no training loss'),
            ('{"epoch": 1, "batch": 2}\n{"epoch": 1, "batch": 2, "sample": 3}\n', 'line 1 is no line of metrics: it '),
            ('[]\n[]\n', 'line 1 is no line of metrics'),
        ],
    )
    def test_what_is_no_run_is_said_with_a_remedy(self, tmp_path, content, said):
        write_lines(tmp_path / 'runs/one', batches(1.0))
        if content is not None:
            (tmp_path / 'runs/metrics.jsonl').write_text(content)
        with pytest.raises(PlotError) as raised:
            read_run(tmp_path / 'runs')
        assert said in str(raised.value)
        assert str(tmp_path / 'runs') in str(raised.value)

    def test_a_missing_folder_names_the_nearest_run(self, tmp_path):
        write_lines(tmp_path / 'mnist1d', batches(1.0))
        with pytest.raises(PlotError, match=r"there is no such folder. Did you mean '.*/mnist1d'\?"):
            read_run(tmp_path / 'mnst1d')

    def test_axes_are_checked(self):
        assert [check_axis(axis) for axis in (None, 'epoch', 'batch')] == [None, 'epoch', 'batch']
        with pytest.raises(PlotError, match="over epoch, batch, sample, got 'step'"):
            check_axis('step')


class TestSmoothing:
    def test_calm_and_short_curves_stay_as_they_are(self):
        falling = np.exp(-np.arange(300) / 50)
        assert smoothed(falling)[1] == 1
        assert smoothed(falling)[0] is falling
        assert smoothed(np.array([1.0, 0.0] * 4))[1] == 1

    def test_means_by_hand(self):
        values = np.array([0.0, 3.0] * 75)  # 2 % of 150 are 3: half of it, rounded up, to each side
        means, width = smoothed(values)
        assert width == 5
        assert means[0] == 0.0, 'it has nothing to its left'
        assert means[1] == 1.0, 'of 0, 3, 0'
        assert means[2] == pytest.approx(6 / 5), 'of 0, 3, 0, 3, 0'
        assert means[-1] == pytest.approx(2.0), 'of 3, 0, 3'

    def test_a_missing_value_has_no_part_in_a_mean(self):
        values = np.array([0.0, 3.0] * 75)
        values[10] = math.nan
        assert smoothed(values)[0][10] == pytest.approx(6 / 4)
        assert smoothed(np.full(20, math.nan))[1] == 1

    def test_a_huge_value_leaves_no_trace_behind_the_means_that_hold_it(self):
        values = np.r_[1.0, 1e17, np.tile([1.0, 2.0], 300)]
        means, width = smoothed(values)
        assert width == 15
        assert means[8] == pytest.approx(1e17 / 15)
        assert means[9:] == pytest.approx(np.full(593, 1.5), abs=0.06)

    @given(hnp.arrays(np.float64, st.integers(0, 400), elements=st.floats(-10, 10)))
    def test_means_stay_within_the_values(self, values):
        means, _ = smoothed(values)
        assert len(means) == len(values)
        if len(values):
            assert values.min() - 1e-9 <= means.min() <= means.max() <= values.max() + 1e-9


def test_first_reaching_allows_for_the_rounding_of_float32():
    points = [
        classified(1, None, 1.0),
        classified(2, 0.5, 1.0),
        classified(3, torch.tensor(0.9).item(), 1.0),
        classified(4, 0.95, 1.0),
    ]
    goal = Goal('MulticlassAccuracy', 0.9, lower_is_better=False)
    assert first_reaching(points, goal) == points[2]
    assert first_reaching(points, dataclasses.replace(goal, value=0.96)) is None


class TestRecording:
    def test_each_batch_tells_the_rate_and_momentum_of_its_step(self, tmp_path):
        arguments = {'name': 'OneCycleLR', 'max_lr': 0.4, 'total_steps': 20}
        run = read_run(record(tmp_path, scheduler=arguments, step_schedulers_every_batch=True))
        weight = torch.nn.Parameter(torch.zeros(1))
        sgd = torch.optim.SGD([weight], lr=0.1, momentum=0.9)
        one_cycle = torch.optim.lr_scheduler.OneCycleLR(sgd, max_lr=0.4, total_steps=20)
        rates, momenta = [], []
        for _ in range(20):
            rates.append(sgd.param_groups[0]['lr'])
            momenta.append(sgd.param_groups[0]['momentum'])
            sgd.step()
            one_cycle.step() if len(rates) < 20 else None
        assert run.rates['group 0'].value.tolist() == rates
        assert run.momenta['group 0'].value.tolist() == momenta
        assert run.rates['group 0'].batch.tolist() == list(range(1, 21))

    def test_optimizers_without_momentum_write_none(self, tmp_path):
        assert read_run(record(tmp_path, optimizer={'name': 'adagrad', 'lr': 0.1})).momenta == {}

    def test_settings_name_a_group_only_where_it_differs(self):
        a, b, c = (torch.nn.Parameter(torch.zeros(1)) for _ in range(3))
        groups = [{'params': [a]}, {'params': [b]}, {'params': [c], 'lr': torch.tensor(0.5), 'betas': (0.8, 0.9)}]
        adam = torch.optim.Adam(groups, lr=0.1)
        assert step_settings([adam]) == {
            'lr/group0': 0.1, 'beta1/group0': 0.9, 'lr/group2': 0.5, 'beta1/group2': 0.8,
        }  # fmt: skip

    @pytest.mark.parametrize(
        ('group', 'expected'),
        [
            ({'momentum': 0.0, 'betas': (0.9, 0.99)}, ('momentum', 0.0)),
            ({'betas': (0.9, 0.99)}, ('beta1', 0.9)),
            ({'rho': 0.9}, ('beta1', None)),
        ],
    )
    def test_momentum_goes_by_the_optimizers_name(self, group, expected):
        assert momentum_of(group) == expected


class TestArguments:
    def test_an_override_belongs_to_the_recipe_before_it(self):
        def recipes(*things: str) -> list[tuple[str, list[str]]]:
            return [(str(path), overrides) for path, overrides in sort_arguments(things).recipes]

        assert recipes('a.yaml', 'b.yml', 'x=1', 'y=2') == [('a.yaml', []), ('b.yml', ['x=1', 'y=2'])]
        assert recipes('a.yaml', 'x=1', 'a.yaml', 'x=2') == [('a.yaml', ['x=1']), ('a.yaml', ['x=2'])]
        assert recipes('a.yaml', 'a.yaml', 'x=1', '~y') == [('a.yaml', []), ('a.yaml', ['x=1', '~y'])]
        assert recipes('a.yaml', 'x=1', 'b.yaml') == [('a.yaml', ['x=1']), ('b.yaml', [])]

    def test_a_picture_without_a_name_goes_where_its_runs_are(self, tmp_path):
        assert sort_arguments([f'{tmp_path}/a']).default_out == tmp_path / 'a/curves'
        assert sort_arguments([f'{tmp_path}/a', 'b']).default_out == tmp_path / 'curves'
        assert sort_arguments(['a.yaml']).default_out == Path('schedule')

    def test_runs_and_recipes_do_not_mix(self):
        with pytest.raises(PlotError, match=r'runs/a is a folder of a run and a\.yaml a recipe'):
            sort_arguments(['a.yaml', 'runs/a'])
        with pytest.raises(PlotError, match=r"the override 'x=1' has no recipe before it\. Write RECIPE\.yaml x=1"):
            sort_arguments(['x=1', 'a.yaml'])
