"""Trains many recipes with several seeds and writes down, beside published figures, how each ended.

What is finished is kept, what was interrupted goes on: the file ``table.json`` in a run's folder holds the recipe that
the run follows, and how it ended once it has.

python -m benchmarks.published yamls/fashion_mnist --published yamls/fashion_mnist/published.csv \\
    --into method_cards/fashion_mnist.md
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import io
import json
import math
import os
import re
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import composer
import torch
from composer.core import Callback, State
from composer.loggers import Logger
from composer.utils import dist
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TaskProgressColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from composer_ema import cli
from composer_ema.files import write_beside
from composer_ema.pictures import conclusion
from composer_ema.pictures.curves import LABELS
from composer_ema.pictures.report import Result
from composer_ema.recipe import run, schema
from composer_ema.recipe.arguments import Place, RecipeError
from composer_ema.recipe.schema import Recipe

TABLE_FILE = 'table.json'
BEGIN, END = '<!-- table: begin -->', '<!-- table: end -->'
# A recipe keeps one average, of either kind, and both stand in one column.
_WEIGHTS = {weights: LABELS[weights] for weights in ('training', 'ema')}
_AVERAGES = ('ema', 'swa')
_COLOURS = {'training': '#D55E00', 'ema': '#0072B2'}
_GAIN = 'average − published'
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


@dataclass(frozen=True)
class Published:
    """What others reported of a run.

    Args:
        accuracy: Share of right answers, in [0, 1].
        loss: Cross entropy in nats.
    """

    accuracy: float
    loss: float


@dataclass(frozen=True)
class Ending:
    """How one run ended.

    Args:
        accuracy: ``'training'`` and ``'ema'`` or ``'swa'`` to the share of right answers of the last evaluation, in
            [0, 1].
        loss: Likewise, cross entropy in nats.
        made_on: What it ran with: date, versions, number of threads.
    """

    accuracy: dict[str, float]
    loss: dict[str, float]
    made_on: dict[str, str]

    @classmethod
    def of(cls, result: Result) -> Ending:
        """The last evaluation of a run."""
        finals = {weights: result.final(weights) for weights in ('training', *_AVERAGES)}
        return cls(
            {weights: final.accuracy for weights, final in finals.items() if final.accuracy is not None},
            {weights: final.loss for weights, final in finals.items() if final.loss is not None},
            {
                'date': time.strftime('%Y-%m-%d'),
                'torch': torch.__version__,
                'Composer': composer.__version__,
                'threads': str(torch.get_num_threads()),
            },
        )


@dataclass(frozen=True)
class Row:
    """All runs of one recipe.

    Args:
        name: The recipe's name.
        duration: How long it trains, as the recipe says it.
        published: What others reported; None where nobody did.
        endings: One per seed.
    """

    name: str
    duration: str
    published: Published | None
    endings: list[Ending]

    def values(self, quantity: str, weights: str) -> list[float]:
        """``'accuracy'`` or ``'loss'`` of each seed; ``'ema'`` is whichever average the recipe keeps.

        Empty when these weights were not evaluated.
        """
        names = _AVERAGES if weights == 'ema' else (weights,)
        return [
            values[name]
            for each in self.endings
            for values in [getattr(each, quantity)]
            for name in names
            if name in values
        ]

    @property
    def gain(self) -> float | None:
        """Mean accuracy of the average less the published one; None when there is one of them only."""
        values = self.values('accuracy', 'ema')
        return statistics.fmean(values) - self.published.accuracy if values and self.published else None


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

    Runs lie in ``<runs_folder>/table/<recipe>-seed<n>``. Those that have finished are not trained again, and one that
    was interrupted goes on from its last checkpoint.

    Args:
        recipes: Each under a name of its own.
        seeds: At least one.
        show: Takes what is to be printed.
        published: A CSV file with the columns ``recipe``, ``accuracy`` (a share) and ``loss``; its rows come first, in
            its order.
        into: The Markdown file between whose markers the table goes; the picture goes into ``images`` beside it.
            Without it both go into ``<runs_folder>/table``.
        command: The command that makes the table, as the page is to name it.

    Returns:
        list[Row]: One per recipe.

    Raises:
        RecipeError: A recipe, the CSV file or the page cannot be used; told before anything is trained. Or a run's
            folder holds a run of another recipe.
    """
    figures = _read_published(published) if published is not None else {}
    recipes = _in_order(recipes, figures)
    if into is not None:
        _split(into)
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
    show(as_table(rows))
    if dist.get_global_rank() == 0:
        for path in _write(rows, into or _folder(recipes[0]) / 'table.md', is_page=into is not None, command=command):
            show(f'written: {path}')
    return rows


def as_table(rows: Sequence[Row]) -> Table:
    """The accuracies for the terminal; the page has the losses too."""
    header, *lines = _cells(rows)
    table = Table(title=_over_seeds(rows), title_justify='left', box=SIMPLE_HEAD, pad_edge=False)
    shown = [header.index(name) for name in ('recipe', 'published', *_WEIGHTS.values(), _GAIN) if name in header]
    for column in shown:
        above, space, below = header[column].rpartition(' ')
        heading = f'{above}\n{below}' if space else below
        table.add_column(heading, justify='right' if column else 'left', no_wrap=True)
    for line in lines:
        table.add_row(*(line[column].replace(' ± ', '±') for column in shown))
    return table


def as_markdown(rows: Sequence[Row]) -> str:
    """The table for a page."""
    header, *lines = _cells(rows)
    rule = [':---' if name == 'recipe' else '---:' for name in header]
    return ''.join(f'| {" | ".join(line)} |\n' for line in (header, rule, *lines))


def draw(rows: Sequence[Row]) -> bytes:
    """A PNG of every final accuracy: a line for each recipe, a mark for each seed, and what was published."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 1.2 + 0.42 * len(rows)), layout='constrained')
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for height, row in enumerate(reversed(rows)):
        axes.axhline(height, color='0.9', linewidth=0.8, zorder=0)
        for (weights, colour), shift in zip(_COLOURS.items(), (-0.14, 0.14), strict=True):
            values = [100 * value for value in row.values('accuracy', weights)]
            axes.plot(values, [height + shift] * len(values), 'o', color=colour, alpha=0.45, markersize=4, mew=0)
            if values:
                mean = statistics.fmean(values)
                axes.plot(mean, height + shift, '|', color=colour, markersize=11, markeredgewidth=2.4)
        if row.published is not None:
            axes.plot(100 * row.published.accuracy, height, 'D', color='0.15', markersize=6, markerfacecolor='none')
    for weights, colour in reversed(_COLOURS.items()):
        axes.plot([], [], 'o', color=colour, markersize=5, label=_WEIGHTS[weights])
    axes.plot([], [], '|', color='0.4', markersize=11, markeredgewidth=2.4, label='mean over seeds')
    axes.plot([], [], 'D', color='0.15', markersize=6, markerfacecolor='none', label='published')
    axes.set_yticks(range(len(rows)), [row.name for row in reversed(rows)])
    axes.set(xlabel='final accuracy (%)', ylim=(-0.6, len(rows) - 0.4))
    axes.tick_params(axis='y', length=0)
    axes.spines[['top', 'right', 'left']].set_visible(False)
    figure.legend(loc='outside upper left', ncols=4, frameon=False, fontsize=9)
    buffer = io.BytesIO()
    figure.savefig(buffer, format='png', dpi=150)
    return buffer.getvalue()


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
    """The published ones in the order of their file, then the others in theirs."""
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
    """The recipe of one run: resumed where it was interrupted, its own progress bar off."""
    return recipe.replace(
        seed=seed,
        run_name=f'{recipe.name}-seed{seed}',
        runs_folder=str(_folder(recipe)),
        autoresume=True,
        progress_bar=False,
    )


def _recorded(recipe: Recipe) -> Ending | None:
    """How the run ended, if it has; RecipeError where its folder holds a run of another recipe."""
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
    """Trains what is left of the run."""
    path = _folder_of(recipe) / TABLE_FILE
    recorded = _recorded(recipe)
    if recorded is not None:
        return recorded
    _record(path, recipe, None)
    outcome = run.train(recipe, _show_nothing, callbacks=[_Advance(advance)])
    ending = Ending.of(conclusion.of_run(outcome, _show_nothing))
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
    """The values as they come back from JSON."""
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
    """Tells after every batch which share of the run is done."""

    def __init__(self, advance: Callable[[float], None]) -> None:
        self.advance = advance

    def batch_end(self, state: State, logger: Logger) -> None:
        elapsed = state.get_elapsed_duration()
        if elapsed is not None:
            self.advance(elapsed.value)


class _Overall:
    """One bar over all runs, and a line for each run that has ended; only the lines where output is no terminal."""

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
        """Lends what is told the share of the run that is done."""
        self.progress.update(self.task, description=f'{name} ({self.num_done + 1} of {self.num_runs})')
        started = time.monotonic()
        yield lambda share: self.progress.update(self.task, completed=self.num_done + share)
        self.num_done += 1
        self.progress.update(self.task, completed=self.num_done)
        self.show(f'{self.num_done} of {self.num_runs}: {name}, {time.monotonic() - started:.0f} s')


def _show_nothing(_: Any) -> None:
    """The tables of single runs would bury the one that was asked for."""


def _cells(rows: Sequence[Row]) -> list[list[str]]:
    """Header and lines, without the columns of published figures where there are none."""
    header = ['recipe', 'length', 'published', *_WEIGHTS.values(), _GAIN]
    header += ['published loss', *(f'loss of {words}' for words in _WEIGHTS.values())]
    table = [header, *(_line(row) for row in rows)]
    is_said = [column < 2 or any(line[column] for line in table[1:]) for column in range(len(header))]
    return [[cell for cell, said in zip(line, is_said, strict=True) if said] for line in table]


def _line(row: Row) -> list[str]:
    line = [row.name, row.duration, f'{100 * row.published.accuracy:.1f}' if row.published else '']
    line += [_spread([100 * value for value in row.values('accuracy', weights)], 2) for weights in _WEIGHTS]
    line += ['' if row.gain is None else f'{100 * row.gain:+.2f}', f'{row.published.loss:.3f}' if row.published else '']
    return [*line, *(_spread(row.values('loss', weights), 4) for weights in _WEIGHTS)]


def _spread(values: Sequence[float], digits: int) -> str:
    """Mean ± standard deviation; the value alone when there is one."""
    if not values:
        return '–'
    deviation = statistics.stdev(values) if len(values) > 1 else math.nan
    mean = f'{statistics.fmean(values):.{digits}f}'
    return mean if math.isnan(deviation) else f'{mean} ± {deviation:.{digits}f}'


def _over_seeds(rows: Sequence[Row]) -> str:
    number = max(len(row.endings) for row in rows)
    words = f'mean ± standard deviation over {number} seeds' if number > 1 else 'one seed'
    return f'final accuracy in %, {words}'


def _made_on(rows: Sequence[Row]) -> str:
    """What the runs had in common and where they differed, in words."""
    kinds = {kind: sorted({each.made_on[kind] for row in rows for each in row.endings}) for kind in _kinds(rows)}
    return ', '.join(f'{kind} {" and ".join(values)}' for kind, values in kinds.items())


def _kinds(rows: Sequence[Row]) -> list[str]:
    return list(dict.fromkeys(kind for row in rows for each in row.endings for kind in each.made_on))


def _write(rows: Sequence[Row], page: Path, *, is_page: bool, command: str) -> list[Path]:
    picture = page.parent / 'images' / f'{page.stem}_table.png'
    write_beside(picture, draw(rows))
    made_by = f'Made by `{command}`' if command else 'Made'
    words = _over_seeds(rows)
    text = (
        f'{words[0].upper()}{words[1:]}; losses are cross entropies in nats. {made_by} ({_made_on(rows)}).\n\n'
        f'{as_markdown(rows)}\n'
        f'![Final accuracy of every run]({picture.relative_to(page.parent)})\n'
    )
    if is_page:
        before, after = _split(page)
        text = f'{before}{BEGIN}\n\n{text}\n{END}{after}'
    write_beside(page, text)
    return [page, picture]


def _split(page: Path) -> tuple[str, str]:
    """What stands before and after the markers."""
    place = Place(os.fspath(page))
    try:
        text = page.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise place.error(f'cannot be read: {error}.') from error
    # A page may speak of the markers, too: only those that stand alone on a line count.
    parts = re.split(f'^(?:{re.escape(BEGIN)}|{re.escape(END)})$', text, flags=re.MULTILINE)
    if len(parts) != 3 or text[len(parts[0]) :].startswith(END):
        raise place.error(f'must hold {BEGIN} and below it {END}, once each on a line alone. The table goes between.')
    before, _, after = parts
    return before, after


if __name__ == '__main__':
    sys.exit(main())
