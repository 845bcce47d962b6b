"""The commands of ``composer-ema``; each reads its arguments, calls one function of the library and prints."""

from __future__ import annotations

import contextlib
import functools
import os
import shlex
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

USAGE_ERROR = 2
_REMEDY = "Install what the commands need with: pip install 'composer-ema[composer]'"

try:
    import typer
    from rich.console import Console
    from rich.markup import escape
except ModuleNotFoundError as error:
    # The console script imports this module before it can call main.
    sys.stderr.write(f'{error}. {_REMEDY}\n')
    raise SystemExit(USAGE_ERROR) from None

# What the extra brings besides; that another module is missing is a bug.
_OF_THE_EXTRA = ('composer', 'torchvision', 'omegaconf', 'yaml', 'pydantic', 'matplotlib')

app = typer.Typer(
    help='Train with an average of the weights, and get the average out.',
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


@app.command()
def train(
    recipe: Annotated[
        Path, typer.Argument(help='A YAML recipe, such as yamls/fashion_mnist.yaml.', show_default=False)
    ],
    overrides: Annotated[
        list[str] | None, typer.Argument(help='key=value, as in algorithms.ema.half_life=100ba', show_default=False)
    ] = None,
    dry_run: Annotated[bool, typer.Option('--dry-run', help='Build everything, train nothing.')] = False,
    seeds: Annotated[str | None, typer.Option(help='Train once per seed, as in 1,2,3, and show one table.')] = None,
) -> None:
    """Train a recipe and show what the average did."""
    numbers = _numbers(seeds)
    with _usage_errors():
        # Composer and torch take seconds to import, which --help should not cost.
        from composer_ema.recipe import run, schema

        loaded = schema.load(recipe, overrides or [])
        if dry_run:
            run.rehearse(loaded, _show)
        elif numbers:
            run.train_seeds(loaded, numbers, _show)
        else:
            run.train(loaded, _show)


@app.command()
def table(
    recipes: Annotated[
        list[Path], typer.Argument(help='YAML recipes, or folders of them: yamls/fashion_mnist', show_default=False)
    ],
    seeds: Annotated[str, typer.Option(help='Train each recipe once per seed.')] = '1,2,3',
    published: Annotated[
        Path | None, typer.Option(help='A CSV file of published figures: recipe,accuracy,loss.')
    ] = None,
    into: Annotated[Path | None, typer.Option(help='The Markdown page that has markers for the table.')] = None,
    runs_folder: Annotated[str, typer.Option(help='Where the runs go.')] = 'runs',
) -> None:
    """Train many recipes with several seeds and write down how each ended; goes on where it was stopped."""
    numbers = _numbers(seeds)
    with _usage_errors():
        from composer_ema.recipe import comparison, schema

        paths = [path for given in recipes for path in _recipes_in(given)]
        loaded = [schema.load(path, [f'runs_folder={runs_folder}']) for path in paths]
        command = shlex.join(['composer-ema', *sys.argv[1:]])
        comparison.make(loaded, numbers, _show, published=published, into=into, command=command)


@app.command()
def export(
    checkpoint: Annotated[
        Path, typer.Argument(help='A checkpoint, of Composer or another library.', show_default=False)
    ],
    out: Annotated[Path, typer.Argument(help='The safetensors file to write.', show_default=False)],
    average: Annotated[
        str | None, typer.Option(help='Which average to write, if the checkpoint holds several.', show_default=False)
    ] = None,
) -> None:
    """Write the average of a checkpoint to a safetensors file."""
    with _usage_errors():
        from rich.table import Table

        from composer_ema.checkpoints.export import export

        table = Table(title=str(out), title_justify='left', show_header=False)
        for key, value in export(checkpoint, out, average=average).items():
            table.add_row(escape(str(key)), escape(str(value)))
        _show(table)


@app.command()
def plot(
    things: Annotated[
        list[str],
        typer.Argument(
            metavar='RUN_FOLDER... | RECIPE.yaml [key=value]...',
            help='Folders of runs, or recipes with overrides of the recipes before them; drawn over one another.',
            show_default=False,
        ),
    ],
    out: Annotated[
        Path | None,
        typer.Option(
            help='The picture: NAME writes NAME.png and NAME.svg; NAME.png, .svg or .pdf only that. '
            'By default curves in the folder of the run, or in the one above several; schedule here for recipes.',
            show_default=False,
        ),
    ] = None,
    over: Annotated[
        str | None, typer.Option(help='epoch, batch or sample: what to draw over.', show_default=False)
    ] = None,
    batches_per_epoch: Annotated[
        int | None, typer.Option(help="Of a recipe; by default the data set's.", show_default=False)
    ] = None,
) -> None:
    """Draw what runs did, or what recipes will do before they run.

    Runs: loss, accuracy, learning rate, momentum, and how far the average is from the weights.
    Recipes: learning rate, momentum, and how much each step weighs in the average at the end.
    """
    with _usage_errors():
        from composer_ema.pictures import curves, plots

        axis, asked = curves.check_axis(over), curves.sort_arguments(things)
        plots.check_out(out := out or asked.default_out)
        if asked.folders:
            if batches_per_epoch is not None:
                raise curves.PlotError(
                    f'--batches-per-epoch={batches_per_epoch} is for recipes, and {asked.folders[0]} is the folder of '
                    'a run, which knows its own. Leave it out.'
                )
            figure = plots.draw_runs(curves.read_runs(asked.folders), axis=axis)
        else:
            figure = _draw_recipes(asked.recipes, axis, batches_per_epoch)
        _show('\n'.join(f'written: {path}' for path in plots.write(figure, out)))


def _draw_recipes(recipes: list[tuple[Path, list[str]]], axis: Any, batches_per_epoch: int | None) -> Any:
    from rich.progress import track

    from composer_ema.pictures import plots

    # Composer and torch's optimizers take seconds to import, which runs that are only drawn should not cost.
    from composer_ema.recipe import schema
    from composer_ema.recipe.preview import distinct_names, preview

    loaded = [schema.load(path, overrides) for path, overrides in recipes]
    names = distinct_names(loaded, [overrides for _, overrides in recipes])
    previews = []
    for recipe, name in zip(loaded, names, strict=True):
        bar = functools.partial(track, description=name, console=_error_console(), transient=True)
        previews.append(preview(recipe, name=name, batches_per_epoch=batches_per_epoch, track=bar))
        _show('\n  '.join([name, *map(plots.describe, previews[-1].profiles), *previews[-1].remarks]))
    return plots.draw_previews(previews, axis=axis)


@app.command()
def inspect(
    checkpoint: Annotated[
        Path, typer.Argument(help='A checkpoint, of Composer or another library.', show_default=False)
    ],
    all_tensors: Annotated[bool, typer.Option('--all', help='List every tensor.')] = False,
    as_json: Annotated[bool, typer.Option('--json', help='Print all of it as JSON.')] = False,
) -> None:
    """Show what a checkpoint holds: whose weights, which averages, of what. Executes nothing in the file."""
    with _usage_errors():
        import dataclasses
        import json

        from composer_ema.checkpoints.inspection import describe

        found = describe(checkpoint)
        if as_json:
            _show(json.dumps(dataclasses.asdict(found), indent=2))
            return
        from composer_ema.pictures import checkpoints

        for table in checkpoints.of_checkpoint(found, all_tensors=all_tensors):
            _show(table)


def main() -> None:
    """The entry point of ``composer-ema`` and of ``python -m composer_ema.cli``."""
    warnings.showwarning = _show_warning
    # Composer's word on every last batch that is smaller than the others; nothing is wrong then.
    warnings.filterwarnings('ignore', message='Cannot split tensor of length')
    # torch's SequentialLR steps its parts in the way that it warns of itself, up to 2.7 at least.
    warnings.filterwarnings('ignore', message='The epoch parameter in `scheduler.step')
    # Composer's word on smoothed labels whose float32 sum is 1 less a rounding error.
    warnings.filterwarnings('ignore', message='Some targets have less than 1 total probability')
    app()


def _show(renderable: Any) -> None:
    """Prints on rank 0; text is printed as it is, however wide, so that it can be copied."""
    if os.environ.get('RANK', '0') == '0':
        Console().print(renderable, markup=False, highlight=False, soft_wrap=isinstance(renderable, str))


def _show_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    """One line for the reader of the terminal, who has no use for the line of code that warned."""
    if os.environ.get('RANK', '0') == '0':
        _error_console().print(f'warning: {message}', style='yellow', markup=False, highlight=False, soft_wrap=True)


def _numbers(seeds: str | None) -> list[int]:
    if seeds is None:
        return []
    given = [seed.strip() for seed in seeds.split(',')]
    if not all(seed.isdecimal() for seed in given):
        raise typer.BadParameter(f'seeds must be whole numbers of at least 0 with commas between, got {seeds!r}: 1,2,3')
    numbers = [int(seed) for seed in given]
    if len(set(numbers)) < len(numbers):
        raise typer.BadParameter(f'seeds must differ, or one run counts twice, got {seeds!r}')
    return numbers


def _recipes_in(given: Path) -> list[Path]:
    """The recipes that an argument of ``table`` stands for."""
    if '=' in given.name and not given.exists():
        raise typer.BadParameter(f'a table takes recipes as they are, got the override {str(given)!r}. Write it there.')
    if not given.is_dir():
        return [given]
    found = sorted(given.glob('*.yaml'))
    if not found:
        raise typer.BadParameter(f'the folder {str(given)!r} holds no recipe, no file that ends in .yaml')
    return found


@contextlib.contextmanager
def _usage_errors() -> Iterator[None]:
    """Ends the program with one line and exit code 2 when the user's input is wrong; our own bugs keep their trace."""
    try:
        yield
    except ModuleNotFoundError as error:
        if (error.name or '').partition('.')[0] not in _OF_THE_EXTRA:
            raise
        _fail(f'{error}. {_REMEDY}')
    except ValueError as error:
        if type(error).__name__ not in ('RecipeError', 'CheckpointError', 'PlotError'):
            raise
        _fail(str(error))


def _fail(message: str) -> None:
    _error_console().print(message, style='red', markup=False, highlight=False, soft_wrap=True)
    raise typer.Exit(USAGE_ERROR)


def _error_console() -> Console:
    return Console(stderr=True)


if __name__ == '__main__':
    main()
