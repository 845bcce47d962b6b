"""The table of many recipes: what is trained once, what goes on after an interruption, and what a page then says."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml
from points import classified
from recipes import tiny
from rich.console import Console

from benchmarks import published, published_page
from benchmarks.published_page import Ending, Published, Row
from composer_ema.pictures.report import Result
from composer_ema.recipe import run, schema
from composer_ema.recipe.arguments import RecipeError
from composer_ema.recipe.metrics import Report

ROOT = Path(__file__).parents[1]

FIGURES = 'recipe,accuracy,loss\nslow,0.125,2.5\nfast,0.5,1.25\n'
PAGE = f'# Card\n\nbefore: `{published_page.BEGIN}`\n\n{published_page.BEGIN}\nold\n{published_page.END}\n\nafter\n'
MADE_ON = {'date': '2026-01-02', 'torch': '2.7.0', 'Composer': '0.32.1', 'threads': '1'}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two recipes, published figures and a page, in a folder of the test."""
    for name, rate in (('fast', 0.1), ('slow', 0.01)):
        values = tiny(optimizer={'lr': rate}, runs_folder=str(tmp_path / 'runs'))
        (tmp_path / f'{name}.yaml').write_text(yaml.safe_dump(values))
    (tmp_path / 'published.csv').write_text(FIGURES)
    (tmp_path / 'card.md').write_text(PAGE)
    return tmp_path


def recipes_of(folder: Path, *overrides: str) -> list[schema.Recipe]:
    return [schema.load(folder / f'{name}.yaml', overrides) for name in ('fast', 'slow')]


def make(folder: Path, shown: list[Any] | None = None, **arguments: Any) -> list[Row]:
    places = {'into': folder / 'card.md', 'published': folder / 'published.csv'}
    return published.make(recipes_of(folder), [1, 2], ([] if shown is None else shown).append, **places, **arguments)


@pytest.fixture
def trained_names(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the runs that were trained, in order."""
    names: list[str] = []
    train = run.train

    def counted(recipe, *arguments, **keywords):
        names.append(recipe.run_name)
        return train(recipe, *arguments, **keywords)

    monkeypatch.setattr(run, 'train', counted)
    return names


def ending(accuracy: float, average: float) -> Ending:
    return Ending({'training': accuracy, 'ema': average}, {'training': 1.0, 'ema': 0.5}, MADE_ON)


def legend_of(rows: Sequence[Row]) -> list[str]:
    [legend] = published_page.draw(rows).legends
    return [text.get_text() for text in legend.get_texts()]


class TestText:
    ROWS = (
        Row('adam', '3ep', Published(0.871, 0.368), [ending(0.86, 0.88), ending(0.88, 0.90)]),
        Row('best', '6ep', None, [ending(0.91, 0.93), ending(0.91, 0.93)]),
    )

    def test_means_and_deviations_by_hand(self):
        """Of 86 and 88 the mean is 87 and the standard deviation sqrt(2)."""
        _, _, adam, best = published_page.as_markdown(self.ROWS).splitlines()
        cells = [cell.strip() for cell in adam.strip('|').split('|')]
        assert cells == [
            *('adam', '3ep', '87.1', '87.00 ± 1.41', '89.00 ± 1.41', '+1.90'),
            *('0.368', '1.0000 ± 0.0000', '0.5000 ± 0.0000'),
        ]
        assert [cell.strip() for cell in best.strip('|').split('|')][:6] == [
            *('best', '6ep', '', '91.00 ± 0.00', '93.00 ± 0.00', ''),
        ]

    def test_one_seed_has_no_deviation(self):
        assert '| 88.00 |' in published_page.as_markdown([Row('adam', '3ep', None, [ending(0.86, 0.88)])])

    def test_weights_that_were_not_evaluated_show_a_dash(self):
        row = Row('adam', '3ep', None, [Ending({'training': 0.5}, {'training': 1.0}, MADE_ON)])
        assert '| 50.00 | – |' in published_page.as_markdown([self.ROWS[0], row])
        assert 'average' not in published_page.as_markdown([row])

    def test_a_terminal_of_80_columns_shows_the_accuracies_whole(self):
        console = Console(width=80)
        with console.capture() as captured:
            console.print(published_page.as_table([dataclasses.replace(row, name=27 * 'x') for row in self.ROWS]))
        accuracies = re.findall(r'\d\d[.]\d\d ± [\d.]+', published_page.as_markdown(self.ROWS))
        assert len(accuracies) == 4
        for cell in [*accuracies, '87.1', '+1.90']:
            assert cell.replace(' ', '') in captured.get()

    def test_without_published_figures_there_are_no_columns_of_them(self):
        alone = [dataclasses.replace(self.ROWS[0], published=None)]
        header = published_page.as_markdown(alone).splitlines()[0]
        assert 'published' not in header
        assert header.startswith('| recipe | length | training weights | average |')
        assert [str(column.header) for column in published_page.as_table(alone).columns] == [
            'recipe',
            'training\nweights',
            'average',
        ]

    def test_the_average_of_swa_stands_in_the_column_of_averages(self):
        last = classified(1.0, 0.75, 0.5)
        swa = published.ending_of(
            Result('swa', 1, Report(), {'training': [last], 'swa': [classified(1.0, 0.875, 0.25)]})
        )
        row = Row('swa', '3ep', Published(0.75, 1.0), [swa])
        assert (row.values('accuracy', 'training weights'), row.values('accuracy', 'average')) == ([0.75], [0.875])
        assert row.values('loss', 'average') == [0.25]
        assert row.gain('average') == 0.125
        header, _, *lines = published_page.as_markdown([self.ROWS[0], row]).splitlines()
        assert header.count(' average |') == 2, 'one column of accuracies and one of losses'
        assert [line.split('|')[5].strip() for line in lines] == ['89.00 ± 1.41', '87.50']

    def test_several_averages_of_a_recipe_stand_in_columns_of_their_labels(self):
        last = {
            label: [classified(1.0, accuracy, 0.5)]
            for label, accuracy in (('training', 0.5), ('b', 0.75), ('a', 0.875))
        }
        row = Row('two', '3ep', Published(0.5, 1.0), [published.ending_of(Result('two', 1, Report(), last))])
        header, _, line = published_page.as_markdown([row]).splitlines()
        assert header.startswith('| recipe | length | published | training weights | b | a | b − published | a − ')
        assert line.startswith('| two | 3ep | 50.0 | 50.00 | 75.00 | 87.50 | +25.00 | +37.50 | 1.000 | 0.5000 |')
        assert legend_of([row])[:3] == ['a', 'b', 'training weights']

    def test_the_pictures_legend_names_only_what_is_in_it(self):
        assert legend_of(self.ROWS) == ['average', 'training weights', 'mean over seeds', 'published']
        assert legend_of(self.ROWS[1:]) == ['average', 'training weights', 'mean over seeds']
        assert legend_of([Row('one', '3ep', None, [ending(0.5, 0.6)])]) == ['average', 'training weights']


class TestMake:
    def test_a_table_that_an_earlier_release_began_is_gone_on_with(self, folder, trained_names):
        """Its record of a finished run, in its own words, stands for the run."""
        for each in ('fast-seed1', 'slow-seed1'):
            values = {
                **yaml.safe_load((folder / f'{each[:4]}.yaml').read_text()),
                'runs_folder': f'{folder}/runs/table',
            }
            recipe = {**values, 'seed': 1, 'run_name': each, 'autoresume': True, 'progress_bar': False}
            made_on = {'date': '2026-11-20', 'torch': '2.7.0', 'Composer': '0.32.1', 'threads': '1'}
            average = {'accuracy': {'training': 0.5, 'ema': 0.75}, 'loss': {'training': 1.0, 'ema': 0.5}}
            path = folder / f'runs/table/{each}/table.json'
            path.parent.mkdir(parents=True)
            ended = {**average, 'made_on': made_on} if each == 'fast-seed1' else None
            path.write_text(json.dumps({'recipe': recipe, 'ending': ended}))
        rows = published.make(recipes_of(folder), [1], [].append)
        assert trained_names == ['slow-seed1']
        assert rows[0].values('accuracy', 'average') == [0.75]

    @pytest.mark.slow
    def test_the_page_keeps_what_is_around_the_markers(self, folder):
        shown: list[Any] = []
        rows = make(folder, shown, command='python -m benchmarks.published x')
        page = (folder / 'card.md').read_text()
        assert page.startswith(f'# Card\n\nbefore: `{published_page.BEGIN}`\n\n{published_page.BEGIN}\n')
        assert page.endswith(f'{published_page.END}\n\nafter\n')
        assert 'old' not in page
        assert published_page.as_markdown(rows) in page
        assert 'Made by `python -m benchmarks.published x` (date ' in page
        assert (folder / 'images/card_table.png').exists()
        assert '](images/card_table.png)' in page
        assert [each for each in shown if str(each).startswith('4 of 4: fast-seed2, ')]

    @pytest.mark.slow
    def test_published_rows_come_first_in_their_order(self, folder):
        assert [(row.name, row.published) for row in make(folder)] == [
            ('slow', Published(0.125, 2.5)),
            ('fast', Published(0.5, 1.25)),
        ]

    def test_what_is_written_is_what_the_runs_ended_with(self, folder):
        (slow, fast) = make(folder)
        for row in (slow, fast):
            for seed, each in zip((1, 2), row.endings, strict=True):
                lines = (folder / f'runs/table/{row.name}-seed{seed}/metrics.jsonl').read_text().splitlines()
                last = [line for line in map(json.loads, lines) if 'metrics/eval_ema/CrossEntropy' in line][-1]
                assert last['epoch'] == 2
                assert each.accuracy['ema'] == last['metrics/eval_ema/MulticlassAccuracy']
                assert each.loss['training'] == last['metrics/eval_training/CrossEntropy']
        assert slow.endings[0].loss != slow.endings[1].loss, 'seeds differ'

    def test_without_a_page_the_table_lies_with_the_runs(self, folder):
        rows = published.make(recipes_of(folder), [1], [].append)
        assert published_page.as_markdown(rows) in (folder / 'runs/table/table.md').read_text()
        assert (folder / 'runs/table/images/table_table.png').exists()

    @pytest.mark.slow
    def test_finished_runs_are_not_trained_again(self, folder, trained_names):
        first = make(folder)
        assert trained_names == ['slow-seed1', 'slow-seed2', 'fast-seed1', 'fast-seed2']
        assert make(folder) == first
        assert len(trained_names) == 4

    @pytest.mark.slow
    def test_a_recipe_that_changed_is_told_before_anything_is_trained(self, folder, trained_names):
        make(folder)
        trained_names.clear()
        text = (folder / 'fast.yaml').read_text()
        (folder / 'fast.yaml').write_text(text.replace('lr: 0.1', 'lr: 0.2'))
        with pytest.raises(RecipeError, match=r'fast-seed1 holds .* \(optimizer.lr: 0.1 there, 0.2 here\)\. Remove'):
            published.make(recipes_of(folder), [3, 1], [].append)
        assert trained_names == []

    @pytest.mark.parametrize(
        ('page', 'said'),
        [
            ('no markers', 'must hold'),
            (f'{published_page.BEGIN} {published_page.END}', 'on a line alone'),
            (f'{published_page.END}\n{published_page.BEGIN}', 'must hold'),
            (
                f'{published_page.BEGIN}\n{published_page.END}\n{published_page.BEGIN}\n{published_page.END}',
                'once each',
            ),
            (None, 'cannot be read'),
        ],
    )
    def test_a_page_that_cannot_take_it_is_told_first(self, folder, trained_names, page, said):
        if page is None:
            (folder / 'card.md').unlink()
        else:
            (folder / 'card.md').write_text(page)
        with pytest.raises(RecipeError, match=rf'card\.md: .*{said}'):
            make(folder)
        assert trained_names == []

    @pytest.mark.parametrize(
        ('figures', 'said'),
        [
            ('hello', r'published\.csv: holds no figures\. It needs the line recipe,accuracy,loss'),
            ('recipe,accuracy\nslow,0.5\n', r'line 2: has no loss\. Every line needs'),
            ('recipe,accuracy,loss\nslow,good,1\n', r"line 2: accuracy and loss must be numbers, got 'good', '1'"),
            ('recipe,accuracy,loss\nslow,90,1\n', r'line 2: accuracy must lie in \[0, 1\], got 90.0\. For 90 %'),
            ('recipe,accuracy,loss\nslow,0.5,1\nslow,0.5,1\n', 'line 3: names slow again'),
            ('recipe,accuracy,loss\nother,0.5,1\n', 'published figures of other and no recipe of that name'),
        ],
    )
    def test_figures_that_do_not_fit_are_told_first(self, folder, trained_names, figures, said):
        (folder / 'published.csv').write_text(figures)
        with pytest.raises(RecipeError, match=said):
            make(folder)
        assert trained_names == []

    def test_two_recipes_of_one_name_are_refused(self, folder):
        twice = [*recipes_of(folder), recipes_of(folder)[0]]
        with pytest.raises(RecipeError, match='has the name of'):
            published.make(twice, [1], [].append)

    def test_a_recipe_that_cannot_be_followed_is_told_before_the_first_run(self, folder, trained_names):
        with pytest.raises(RecipeError, match='no such argument'):
            published.make([recipes_of(folder)[0], *recipes_of(folder, 'optimizer.leraning=1')[1:]], [1], [].append)
        assert trained_names == []

    @pytest.mark.parametrize(('override', 'num_trained'), [('evaluate=[]', 0), ('eval_interval=0', 1)])
    def test_a_recipe_that_evaluates_nothing_is_refused(self, folder, trained_names, override, num_trained):
        with pytest.raises(RecipeError, match='evaluates nothing'):
            published.make(recipes_of(folder, override), [1], [].append)
        assert len(trained_names) == num_trained


@pytest.mark.slow
def test_killed_in_the_middle_it_keeps_what_is_finished_and_goes_on(folder, trained_names, monkeypatch):
    for name in ('fast', 'slow'):
        text = (folder / f'{name}.yaml').read_text()
        (folder / f'{name}.yaml').write_text(text.replace('2ep', '20ep') + 'save_interval: 7ba\n')
    command = ['fast.yaml', 'slow.yaml', '--seeds', '1', '--into', 'card.md', '--runs-folder', 'killed']
    environment = {**os.environ, 'OMP_NUM_THREADS': '1', 'PYTHONPATH': str(ROOT)}
    pipe = subprocess.PIPE
    process = subprocess.Popen(
        [sys.executable, '-m', 'benchmarks.published', *command], cwd=folder, env=environment, stdout=pipe, stderr=pipe
    )
    metrics, started = folder / 'killed/table/slow-seed1/metrics.jsonl', time.monotonic()
    while not (metrics.exists() and metrics.read_text().count('\n') > 40):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() - started < 90, 'the second run wrote no 40 lines in 90 seconds'
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    first = json.loads((folder / 'killed/table/fast-seed1/table.json').read_text())
    second = json.loads((folder / 'killed/table/slow-seed1/table.json').read_text())
    assert first['ending'] is not None
    assert second['ending'] is None, 'killed in the middle of the second run'
    assert 'old' in (folder / 'card.md').read_text()

    kept = [
        folder / 'killed/table/fast-seed1/metrics.jsonl',
        min((folder / 'killed/table/slow-seed1/checkpoints').glob('ep*'), key=lambda path: path.stat().st_mtime_ns),
    ]
    before = [path.stat().st_mtime_ns for path in kept]
    monkeypatch.chdir(folder)
    resumed = published.make(recipes_of(folder, 'runs_folder=killed'), [1], [].append, into=folder / 'card.md')
    assert trained_names == ['slow-seed1']
    assert [path.stat().st_mtime_ns for path in kept] == before, 'neither run began anew'
    whole = published.make(recipes_of(folder), [1], [].append)
    assert [row.endings[0].loss for row in resumed] == [row.endings[0].loss for row in whole]
    for name in ('fast', 'slow'):
        interrupted = (folder / f'killed/table/{name}-seed1/metrics.jsonl').read_text()
        assert interrupted == (folder / f'runs/table/{name}-seed1/metrics.jsonl').read_text()


def test_the_command_makes_it(folder, capfd, monkeypatch):
    monkeypatch.chdir(folder)
    arguments = ['.', '--seeds', '1', '--published', 'published.csv', '--into', 'card.md']
    assert published.main(arguments) == 0
    out = capfd.readouterr().out
    assert '2 of 2: fast-seed1' in out
    assert 'written: card.md' in out
    made_by = f'Made by `python -m benchmarks.published {" ".join(arguments)}` (date '
    assert made_by in (folder / 'card.md').read_text()
    assert (folder / 'runs/table/fast-seed1').is_dir()


@pytest.mark.parametrize(
    ('arguments', 'said'),
    [
        (['.'], "the folder '.' holds no recipe, no file that ends in .yaml"),
        (['a.yaml', 'max_duration=2ep'], "a table takes recipes as they are, got the override 'max_duration=2ep'."),
        (['a.yaml', '--seeds', '1,1'], 'seeds must differ'),
        (['a.yaml', '--seeds', 'x'], "seeds must be whole numbers of at least 0 with commas between, got 'x'"),
        (['missing.yaml'], 'missing.yaml: there is no such file.'),
    ],
)
def test_a_table_of_nothing_or_with_overrides_is_refused(tmp_path, capfd, monkeypatch, arguments, said):
    monkeypatch.chdir(tmp_path)
    try:
        code = published.main(arguments)
    except SystemExit as stopped:  # argparse's own errors
        code = stopped.code
    out, err = capfd.readouterr()
    assert (code, out) == (2, '')
    assert said in err
    assert 'Traceback' not in err
    assert list(tmp_path.iterdir()) == []
