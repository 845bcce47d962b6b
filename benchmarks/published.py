"""Trains many recipes with several seeds and writes how each ended, beside published figures.

A run that has finished is kept, one that was interrupted goes on: the file ``table.json`` in a run's folder holds the
recipe of the run, and how it ended once it has.

python -m benchmarks.published yamls/fashion_mnist --published yamls/fashion_mnist/published.csv \\
    --into method_cards/fashion_mnist.md
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import io
import json
import os
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import composer
import torch
from composer.core import Callback, State
from composer.loggers import Logger
from composer.utils import dist
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TaskProgressColumn, TextColumn, TimeElapsedColumn

from benchmarks import published_page
from benchmarks.published_page import Ending, Published, Row
from composer_ema import cli
from composer_ema.files import write_beside
from composer_ema.pictures import conclusion
from composer_ema.pictures.curves import Point
from composer_ema.pictures.report import Result
from composer_ema.recipe import run, schema
from composer_ema.recipe.arguments import Place, RecipeError
from composer_ema.recipe.schema import Recipe

TABLE_FILE = 'table.json'
_COLUMNS = ('recipe', 'accuracy', 'loss')


def main(arguments: Sequence[str] | None = None) -> int:
    """Makes the table. Returns the exit code: 2 if an argument, a recipe, the figures or the page cannot be used."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument('recipes', type=_recipes_in, nargs='+', help='YAML recipes, or folders of them')
    options.add_argument('--seeds', type=_seeds, default='1,2,3', help='train each recipe once per seed; default 1,2,3')
    options.add_argument('--published', type=Path, help='a CSV file of published figures: recipe,accuracy,loss')
    options.add_argument('--into', type=Path, help='the Markdown page that has markers for the table')
    options.add_argument('--runs-folder', default='runs', help='where the runs go; default runs')
    parsed = options.parse_args(given)
    command = shlex.join(['python', '-m', 'benchmarks.published', *given])
    cli.set_up_warnings()
    try:
        paths = [path for paths in parsed.recipes for path in paths]
        recipes = [schema.load(path, [f'runs_folder={parsed.runs_folder}']) for path in paths]
        make(recipes, parsed.seeds, cli.show, published=parsed.published, into=parsed.into, command=command)
    except RecipeError as error:
        cli.show_error(str(error))
        return cli.USAGE_ERROR
    return 0


def make(
    recipes: Sequence[Recipe],
    seeds: Sequence[int],
    show: Callable[[Any], None],
    *,
    published: Path | None = None,
    into: Path | None = None,
    command: str = '',
) -> list[Row]:
    """Trains each recipe once per seed, shows the table, and writes it and its picture into a page.

    Runs lie in ``<runs_folder>/table/<recipe>-seed<n>``. A run that has finished is not trained again, and one that was
    interrupted goes on from its last checkpoint.

    Args:
        recipes: The recipes; their names must differ.
        seeds: At least one.
        show: Called with what is to be printed, a string or a rich renderable.
        published: A CSV file with the columns ``recipe``, ``accuracy`` (a share) and ``loss``. Its rows come first, in
            its order. Default: None, no published figures.
        into: A Markdown file with markers. The table goes between them, the picture into ``images`` beside the file.
            Default: None; both go into ``<runs_folder>/table``.
        command: The command that the page names. Default: none.

    Returns:
        list[Row]: One per recipe.

    Raises:
        RecipeError: A recipe, the CSV file or the page cannot be used, or a run's folder holds a run of another recipe;
            raised before anything is trained. Or a run ended without an evaluation.
    """
    figures = _read_published(published) if published is not None else {}
    recipes = _in_order(recipes, figures)
    if into is not None:
        published_page.split(into)
    for recipe in recipes:
        if not schema.plan(recipe).evaluate:
            raise _nothing_evaluated(recipe)
    runs = [(recipe, _for_table(recipe, seed)) for recipe in recipes for seed in seeds]
    for _, each in runs:
        _recorded(each)

    endings: dict[str, list[Ending]] = {recipe.name: [] for recipe in recipes}
    with _Overall(len(runs), show) as overall:
        for recipe, each in runs:
            with overall.run(str(each.run_name)) as advance:
                endings[recipe.name].append(_ending(each, advance))

    rows = [
        Row(each.name, str(each.values['max_duration']), figures.get(each.name), endings[each.name]) for each in recipes
    ]
    show(published_page.as_table(rows))
    if dist.get_global_rank() == 0:
        page = into or _folder(recipes[0]) / 'table.md'
        for path in published_page.write(rows, page, is_page=into is not None, command=command):
            show(f'written: {path}')
    return rows


def ending_of(result: Result) -> Ending:
    """The last evaluation of a run."""
    finals = {label: result.final(label) for label in result.points}
    return Ending(
        _ending_in('MulticlassAccuracy', finals),
        _ending_in('CrossEntropy', finals),
        {
            'date': time.strftime('%Y-%m-%d'),
            'torch': torch.__version__,
            'Composer': composer.__version__,
            'threads': str(torch.get_num_threads()),
        },
    )


def _ending_in(metric: str, finals: Mapping[str, Point]) -> dict[str, float]:
    return {label: final.metrics[metric] for label, final in finals.items() if metric in final.metrics}


def _seeds(text: str) -> list[int]:
    try:
        return cli.parse_seeds(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _recipes_in(text: str) -> list[Path]:
    """The recipes that one argument names."""
    given = Path(text)
    if '=' in given.name and not given.exists():
        raise argparse.ArgumentTypeError(
            f'a table takes recipes as they are, got the override {text!r}. Write it into the recipe.'
        )
    if not given.is_dir():
        return [given]
    found = sorted(given.glob('*.yaml'))
    if not found:
        raise argparse.ArgumentTypeError(f'the folder {text!r} holds no recipe, no file that ends in .yaml')
    return found


def _read_published(path: Path) -> dict[str, Published]:
    place = Place(os.fspath(path))
    try:
        lines = list(csv.DictReader(io.StringIO(path.read_text())))
    except (OSError, UnicodeDecodeError) as error:
        raise place.error(f'cannot be read: {error}.') from error
    if not lines:
        raise place.error(f'holds no figures. It needs the line {",".join(_COLUMNS)} and one below it for each recipe.')
    figures: dict[str, Published] = {}
    for number, line in enumerate(lines, start=2):
        there = place / f'line {number}'
        if missing := [column for column in _COLUMNS if not line.get(column)]:
            raise there.error(f'has no {missing[0]}. Every line needs the columns {", ".join(_COLUMNS)}.')
        if line['recipe'] in figures:
            raise there.error(f'names {line["recipe"]} again. Keep one line for each recipe.')
        try:
            figure = Published(float(line['accuracy']), float(line['loss']))
        except ValueError:
            raise there.error(
                f'accuracy and loss must be numbers, got {line["accuracy"]!r}, {line["loss"]!r}.'
            ) from None
        if not 0 <= figure.accuracy <= 1:
            raise there.error(f'accuracy must lie in [0, 1], got {figure.accuracy}. For 90 % write 0.9.')
        figures[line['recipe']] = figure
    return figures


def _in_order(recipes: Sequence[Recipe], figures: Mapping[str, Published]) -> list[Recipe]:
    """Recipes with published figures in the order of those, then the others in their own."""
    by_name: dict[str, Recipe] = {}
    for each in recipes:
        if each.name in by_name:
            place = Place(each.source)
            raise place.error(f'has the name of {by_name[each.name].source}. Rename one file: names tell runs apart.')
        by_name[each.name] = each
    if unknown := [name for name in figures if name not in by_name]:
        raise Place(recipes[0].source).error(
            f'there are published figures of {", ".join(unknown)} and no recipe of that name. Pass its YAML file too.'
        )
    return [*(by_name[name] for name in figures), *(each for name, each in by_name.items() if name not in figures)]


def _folder(recipe: Recipe) -> Path:
    return Path(recipe.values.get('runs_folder') or 'runs') / 'table'


def _for_table(recipe: Recipe, seed: int) -> Recipe:
    """The recipe of one run, which resumes where it was interrupted and shows no progress bar of its own."""
    return recipe.replace(
        seed=seed,
        run_name=f'{recipe.name}-seed{seed}',
        runs_folder=str(_folder(recipe)),
        autoresume=True,
        progress_bar=False,
    )


def _recorded(recipe: Recipe) -> Ending | None:
    """How the run ended; None if it has not. Raises RecipeError if its folder holds a run of another recipe."""
    path = _folder_of(recipe) / TABLE_FILE
    if not path.exists():
        return None
    record = json.loads(path.read_text())
    if changed := _changes(record['recipe'], _comparable(recipe)):
        raise Place(recipe.source).error(
            f'{path.parent} holds a run of another recipe ({"; ".join(changed)}). '
            'Remove that folder to train anew, or give another runs folder.'
        )
    return Ending(**record['ending']) if record['ending'] else None


def _ending(recipe: Recipe, advance: Callable[[float], None]) -> Ending:
    """How the run ended; trains what is left of it."""
    path = _folder_of(recipe) / TABLE_FILE
    recorded = _recorded(recipe)
    if recorded is not None:
        return recorded
    _record(path, recipe, None)
    outcome = run.train(recipe, _show_nothing, callbacks=[_Advance(advance)])
    ending = ending_of(conclusion.of_run(outcome, _show_nothing))
    if not ending.accuracy:
        raise _nothing_evaluated(recipe)
    _record(path, recipe, ending)
    return ending


def _nothing_evaluated(recipe: Recipe) -> RecipeError:
    return Place(recipe.source).error(
        'evaluates nothing, so there is nothing to put in a table. Set evaluate and eval_interval.'
    )


def _record(path: Path, recipe: Recipe, ending: Ending | None) -> None:
    if dist.get_global_rank() == 0:
        record = {'recipe': _comparable(recipe), 'ending': dataclasses.asdict(ending) if ending else None}
        write_beside(path, json.dumps(record, indent=1) + '\n')


def _folder_of(recipe: Recipe) -> Path:
    return Path(recipe.values['runs_folder']) / str(recipe.run_name)


def _comparable(recipe: Recipe) -> dict[str, Any]:
    """The values of a recipe as they come back from JSON."""
    return json.loads(json.dumps(recipe.values))


def _changes(before: Any, now: Any, key: str = '') -> list[str]:
    if isinstance(before, dict) and isinstance(now, dict):
        keys = dict.fromkeys([*before, *now])
        return [
            line
            for each in keys
            for line in _changes(before.get(each), now.get(each), f'{key}.{each}' if key else each)
        ]
    return [] if before == now else [f'{key}: {before!r} there, {now!r} here']


class _Advance(Callback):
    """Reports after every batch the share of the run that is done."""

    def __init__(self, advance: Callable[[float], None]) -> None:
        self.advance = advance

    def batch_end(self, state: State, logger: Logger) -> None:
        elapsed = state.get_elapsed_duration()
        if elapsed is not None:
            self.advance(elapsed.value)


class _Overall:
    """A progress bar over all runs, and a line for each run that has ended."""

    def __init__(self, num_runs: int, show: Callable[[Any], None]) -> None:
        self.num_runs, self.show, self.num_done = num_runs, show, 0
        self.progress = Progress(
            TextColumn('{task.description}'),
            BarColumn(),
            TaskProgressColumn(),
            TimeElapsedColumn(),
            console=Console(stderr=True),
            disable=dist.get_global_rank() != 0,
            transient=True,
        )
        self.task = TaskID(0)

    def __enter__(self) -> _Overall:
        self.progress.start()
        self.task = self.progress.add_task('', total=self.num_runs)
        return self

    def __exit__(self, *_: object) -> None:
        self.progress.stop()

    @contextmanager
    def run(self, name: str) -> Iterator[Callable[[float], None]]:
        """Yields a function that takes the share of the run that is done."""
        self.progress.update(self.task, description=f'{name} ({self.num_done + 1} of {self.num_runs})')
        started = time.monotonic()
        yield lambda share: self.progress.update(self.task, completed=self.num_done + share)
        self.num_done += 1
        self.progress.update(self.task, completed=self.num_done)
        self.show(f'{self.num_done} of {self.num_runs}: {name}, {time.monotonic() - started:.0f} s')


def _show_nothing(_: Any) -> None:
    """Drops the tables of single runs, which would bury the one that was asked for."""


if __name__ == '__main__':
    sys.exit(main())
