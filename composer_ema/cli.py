"""The commands of ``composer-ema``: each reads its arguments, calls the library and prints."""

from __future__ import annotations

import contextlib
import functools
import os
import signal
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

USAGE_ERROR = 2
#: A full or broken disk, which another command line would not have helped.
DISK_ERROR = 1
_REMEDY = "Install what the commands need with: pip install 'composer-ema[composer]'"

try:
    import typer
    from rich.console import Console
    from rich.table import Table
    from typer.core import TyperGroup

    from composer_ema.files import in_words, is_of_the_disk
    from composer_ema.pictures.tables import Whole, facts
    from composer_ema.wording import visible
except ModuleNotFoundError as error:
    # The console script imports this module before it calls main, so main cannot catch this.
    sys.stderr.write(f'{error}. {_REMEDY}\n')
    raise SystemExit(USAGE_ERROR) from None

# The other modules that the extra installs. If any other module is missing, that is a bug.
_OF_THE_EXTRA = ('composer', 'torchvision', 'omegaconf', 'yaml', 'pydantic', 'matplotlib')

# By name, since what defines them takes seconds to import.
_OF_THE_USER = ('RecipeError', 'CheckpointError', 'ReconstructionError', 'PlotError', 'ArgumentError')
_CHECKPOINT_HELP = 'A checkpoint, of Composer or another library: a file, or the folder of a sharded one.'
_KEY_HELP = 'Where in the file the average is, as in ema or state.ema. Default: everywhere.'

# Which click it is, one that is installed or one that typer brings, depends on the release of typer.
_UsageError: Any = typer.BadParameter.__base__


class _Commands(TyperGroup):
    """The commands, whose complaints about arguments quote them escaped: a shell puts names of files there."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        with _quoted_visibly():
            return super().parse_args(ctx, args)

    def invoke(self, ctx: Any) -> Any:
        with _quoted_visibly():
            return super().invoke(ctx)


@contextlib.contextmanager
def _quoted_visibly() -> Iterator[None]:
    try:
        yield
    except _UsageError as error:
        said = error.format_message()
        if visible(said, keep='\n') == said:
            raise
        raise _UsageError(visible(said, keep='\n'), error.ctx) from None


app = typer.Typer(
    cls=_Commands,
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
        list[str] | None,
        typer.Argument(
            metavar='key=value | ~key',
            help='From left to right: key=value sets a key, as in algorithms.ema.half_life=100ba; ~key drops one, or a '
            'section. Another name of a model, data set, optimizer or scheduler drops the arguments of the one before.',
            show_default=False,
        ),
    ] = None,
    dry_run: Annotated[bool, typer.Option('--dry-run', help='Build everything, train nothing.')] = False,
    seeds: Annotated[str | None, typer.Option(help='Train once per seed, as in 1,2,3, and show one table.')] = None,
) -> None:
    """Train a recipe and show what the average did."""
    numbers = _checked_seeds(seeds)
    with _usage_errors('Training had not begun.'):
        # Composer and torch take seconds to import, and --help needs neither.
        from composer_ema.pictures import conclusion
        from composer_ema.recipe import command, run, schema, stopped

        def conclude(outcome: run.Outcome) -> conclusion.Result:
            with _usage_errors(f'The run is done and saved. Draw it with: composer-ema plot {outcome.folder}'):
                return conclusion.of_run(outcome, show)

        loaded = schema.load(recipe, overrides or [])
        try:
            if dry_run:
                conclusion.of_rehearsal(run.rehearse(loaded), show)
            elif numbers:
                results = [conclude(outcome) for outcome in run.train_seeds(loaded, numbers, show)]
                conclusion.of_seeds(loaded, results, show)
            else:
                conclude(run.train(loaded, show))
        except stopped.STOPS as stop:
            how = command.that_goes_on(recipe, overrides or [], stop.standing, numbers)
            fail = _fail if isinstance(stop, stopped.OutOfDisk) else _fail_in_process_0  # each has its own disk
            if os.environ.get('WORLD_SIZE', '1') != '1':
                # The launcher sends it once the first process has ended, and this one ends by itself.
                signal.signal(signal.SIGTERM, signal.SIG_IGN)
            fail(stop.in_words(how), stop.exit_code)


@app.command()
def export(
    checkpoint: Annotated[Path, typer.Argument(help=_CHECKPOINT_HELP, show_default=False)],
    out: Annotated[
        Path,
        typer.Argument(
            help='What to write: a file of safetensors, or of torch as NAME.pt; else see --format.',
            show_default=False,
        ),
    ],
    format: Annotated[
        str | None,
        typer.Option(
            metavar='FORMAT',
            help='safetensors, torch, or as a library reads it: huggingface, diffusers and peft, which are folders, '
            'and timm. Default: by the ending of OUT.',
            show_default=False,
        ),
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option(
            help='float32, bfloat16 or float16, rounded to nearest. Default: that of the average.',
            show_default=False,
        ),
    ] = None,
    config: Annotated[
        str | None,
        typer.Option(
            metavar='FILE|FOLDER',
            help='What the weights are of: a config.json, an adapter_config.json, or a folder with it and a tokenizer; '
            'for timm the name of the architecture. Default: what the checkpoint says.',
            show_default=False,
        ),
    ] = None,
    max_shard_size: Annotated[
        str | None,
        typer.Option(
            metavar='SIZE',
            help='Size above which huggingface and diffusers have several files. Default: 5GB, 10GB.',
            show_default=False,
        ),
    ] = None,
    average: Annotated[
        str | None, typer.Option(help='Which average to write, if the checkpoint holds several.', show_default=False)
    ] = None,
    key: Annotated[str | None, typer.Option(help=_KEY_HELP, show_default=False)] = None,
    strip_prefix: Annotated[
        str | None,
        typer.Option(
            metavar='PREFIX',
            help='Module to take off the names, as in module; auto: the outermost one, whatever it is called.',
            show_default=False,
        ),
    ] = None,
) -> None:
    """Write the average of a checkpoint to a file of its own, or as another library reads it."""
    with _usage_errors():
        from composer_ema.interchange.export import export

        written = export(
            checkpoint,
            out,
            average=average,
            key=key,
            strip_prefix=strip_prefix,
            format=format,
            dtype=dtype,
            config=config,
            max_shard_size=max_shard_size,
        )
        show(facts(str(out), written))


@app.command()
def merge(
    files: Annotated[
        list[Path],
        typer.Argument(
            metavar='CHECKPOINT CHECKPOINT... OUT',
            help='Two or more checkpoints, files or sharded folders, and last the file to write: safetensors, or of '
            'torch as NAME.pt.',
            show_default=False,
        ),
    ],
    equal: Annotated[bool, typer.Option('--equal', help='Each checkpoint counts the same.')] = False,
    half_life: Annotated[
        str | None,
        typer.Option(help='As an exponential average: 500ba, 2ep, 50000sp, 1000000tok, 0.1dur.', show_default=False),
    ] = None,
    schedule: Annotated[
        str | None,
        typer.Option(
            metavar='linear|cosine|1-sqrt',
            help='What decaying the learning rate so, from the first checkpoint to the last, would have led to.',
            show_default=False,
        ),
    ] = None,
    weights: Annotated[
        str | None, typer.Option(help='One number for each checkpoint, as in 0.2,0.8.', show_default=False)
    ] = None,
    times: Annotated[
        str | None,
        typer.Option(
            help='Training time of each checkpoint, as in 1000,2000, for files that do not tell it.', show_default=False
        ),
    ] = None,
    average: Annotated[
        str | None,
        typer.Option(help='Which averages to merge. Default: the training weights.', show_default=False),
    ] = None,
    key: Annotated[
        str | None, typer.Option(help='Where in each file the weights are, as in model.', show_default=False)
    ] = None,
    overwrite: Annotated[bool, typer.Option('--overwrite', help='Replace OUT if it exists.')] = False,
) -> None:
    """Write the weighted sum of the weights in several checkpoints to a file."""
    with _usage_errors():
        from composer_ema.posthoc.merge import merge

        *checkpoints, out = files
        merged = merge(
            checkpoints,
            out,
            equal=equal,
            half_life=half_life,
            schedule=schedule,
            weights=_numbers('--weights', weights),
            times=_numbers('--times', times),
            average=average,
            key=key,
            overwrite=overwrite,
        )
        from composer_ema.pictures import merges

        show(merges.of_merge(merged))
        for remark in merges.remarks(merged):
            show(remark)


def _numbers(option: str, text: str | None) -> list[float] | None:
    try:
        return None if text is None else [float(each) for each in text.split(',')]
    except ValueError:
        raise typer.BadParameter(f'{option} takes numbers with commas between, as in 0.2,0.8, got {text!r}.') from None


@app.command()
def reconstruct(
    run: Annotated[
        Path,
        typer.Argument(help='The folder of a run with snapshots, or with several checkpoints.', show_default=False),
    ],
    out: Annotated[
        Path, typer.Argument(help='The file to write: safetensors, or of torch as NAME.pt.', show_default=False)
    ],
    half_life: Annotated[
        str | None, typer.Option(help='As EMA keeps it: 0.1dur, 500ba, 2ep, 50000sp.', show_default=False)
    ] = None,
    power: Annotated[float | None, typer.Option(help='As EMA keeps it: 0.1.', show_default=False)] = None,
    gamma: Annotated[
        float | None, typer.Option(help='The exponent that a power stands for.', show_default=False)
    ] = None,
    equal: Annotated[str | None, typer.Option(help='Equal over the last: 0.25dur.', show_default=False)] = None,
    schedule: Annotated[
        str | None,
        typer.Option(
            metavar='linear|cosine|1-sqrt[:SPAN]',
            help='What decaying the learning rate so, over the run or its last SPAN, would have given.',
            show_default=False,
        ),
    ] = None,
    at: Annotated[str | None, typer.Option(help='An earlier moment: 0.8dur, 4000ba.', show_default=False)] = None,
    anyway: Annotated[bool, typer.Option('--anyway', help='Write it however large the predicted error.')] = False,
    kept_half_life: Annotated[
        str | None,
        typer.Option(
            help="Half-life of Composer's built-in EMA, which its checkpoints do not say.", show_default=False
        ),
    ] = None,
    kept_interval: Annotated[
        str | None,
        typer.Option(help='Likewise its update_interval. Default: one unit of the half-life.', show_default=False),
    ] = None,
) -> None:
    """Write an average that a run did not keep, made of those that it kept."""
    with _usage_errors():
        from composer_ema.pictures import reconstructions
        from composer_ema.posthoc.open_run import OpenRun
        from composer_ema.posthoc.reconstruct import reconstruct

        opened = OpenRun(run, half_life=kept_half_life, update_interval=kept_interval)
        found = reconstruct(
            opened, half_life=half_life, power=power, gamma=gamma, equal=equal, schedule=schedule, at=at, anyway=anyway
        )
        found.save(out)
        show(reconstructions.of_reconstruction(found, str(out)))
        for remark in reconstructions.remarks(found):
            show(remark)


@app.command()
def plot(
    things: Annotated[
        list[str],
        typer.Argument(
            metavar='RUN_FOLDER... | RECIPE.yaml [key=value | ~key]...',
            help='Run folders, or recipes, each followed by its own overrides; drawn over one another.',
            show_default=False,
        ),
    ],
    out: Annotated[
        Path | None,
        typer.Option(
            help='The picture: NAME writes NAME.png and NAME.svg; NAME.png, .svg or .pdf only that. '
            'Default: curves in the run folder, or in the folder above several; for recipes, schedule here.',
            show_default=False,
        ),
    ] = None,
    over: Annotated[
        str | None, typer.Option(help='epoch, batch or sample: what to draw over.', show_default=False)
    ] = None,
    batches_per_epoch: Annotated[
        int | None, typer.Option(help="Length of an epoch of a recipe. Default: the data set's.", show_default=False)
    ] = None,
) -> None:
    """Draw what runs did, or what recipes will do before they run.

    Runs: loss, metrics, learning rate, momentum, and how far the average is from the weights.
    Recipes: learning rate, momentum, and how much each step weighs in the average at the end.
    """
    with _usage_errors():
        from composer_ema.pictures.asked import check_axis, sort_arguments
        from composer_ema.pictures.curves import read_runs
        from composer_ema.pictures.errors import PlotError
        from composer_ema.pictures.runs import draw_runs
        from composer_ema.pictures.writing import check_out, write

        axis, asked = check_axis(over), sort_arguments(things)
        check_out(out := out or asked.default_out)
        if asked.folders:
            if batches_per_epoch is not None:
                raise PlotError(
                    f'--batches-per-epoch={batches_per_epoch} is for recipes, and {asked.folders[0]} is the folder of '
                    'a run, which knows its own. Leave it out.'
                )
            figure = draw_runs(read_runs(asked.folders), axis=axis)
        else:
            figure = _draw_recipes(asked.recipes, axis, batches_per_epoch)
        show('\n'.join(f'written: {path}' for path in write(figure, out)))


def _draw_recipes(recipes: list[tuple[Path, list[str]]], axis: Any, batches_per_epoch: int | None) -> Any:
    from rich.markup import escape
    from rich.progress import track

    from composer_ema.pictures.previews import describe, draw_previews

    # Composer and torch take seconds to import, and pictures of runs need neither.
    from composer_ema.recipe import schema
    from composer_ema.recipe.preview import distinct_names, preview

    loaded = [schema.load(path, overrides) for path, overrides in recipes]
    names = distinct_names(loaded, [overrides for _, overrides in recipes])
    previews = []
    for recipe, name in zip(loaded, names, strict=True):
        console = _error_console()
        bar = functools.partial(track, description=escape(visible(name)), console=console, transient=True)
        # Off the terminal, rich leaves an empty line.
        bar = bar if console.is_terminal else iter
        previews.append(preview(recipe, name=name, batches_per_epoch=batches_per_epoch, track=bar))
        show('\n  '.join([name, *recipe.remarks, *map(describe, previews[-1].profiles), *previews[-1].remarks]))
    return draw_previews(previews, axis=axis)


@app.command()
def sweep(
    run: Annotated[
        Path, typer.Argument(metavar='RUN_FOLDER', help='The folder of a finished run.', show_default=False)
    ],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(
            metavar='key=value',
            help='Where the data lie now, how they are read, and the device: data.root=..., device=cpu.',
            show_default=False,
        ),
    ] = None,
    half_lives: Annotated[
        str | None,
        typer.Option(
            metavar='TIMES',
            help='Try these and no others, as in 0.05dur,330ba,1ep. Default: 13 from 1 to 50 % of the run, '
            'then some around the best.',
            show_default=False,
        ),
    ] = None,
    power: Annotated[
        bool, typer.Option('--power', help='Sweep power function averages in place of half-lives.')
    ] = False,
    powers: Annotated[
        str | None,
        typer.Option(metavar='WIDTHS', help='Try these power function averages, as in 0.05,0.1.', show_default=False),
    ] = None,
    points: Annotated[
        int | None, typer.Option(help='How many to try before those around the best. Default: 13.', show_default=False)
    ] = None,
    metric: Annotated[
        str | None,
        typer.Option(help="What to choose by. Default: the model's first loss.", show_default=False),
    ] = None,
    limit: Annotated[
        int | None, typer.Option(help='Evaluate on so many batches. Default: all.', show_default=False)
    ] = None,
    refresh_batchnorm: Annotated[
        str | None,
        typer.Option(
            metavar='true | BATCHES | TIME',
            help="Compute BatchNorm's statistics anew for each average, over an epoch of the training data, so many "
            'batches, or as in 0.5ep. A run with this half-life keeps averaged statistics, and does not.',
            show_default=False,
        ),
    ] = None,
    on_test: Annotated[
        bool, typer.Option('--on-test', help='Choose on the test set, which then no longer tests the choice.')
    ] = False,
    out: Annotated[
        Path | None,
        typer.Option(
            help='The picture, as for plot. Default: sweep in the run folder, with _power and _test behind it.',
            show_default=False,
        ),
    ] = None,
) -> None:
    """Find the best half-life of a finished run: evaluate averages of it, reconstructed from its snapshots.

    Needs a run with data.validation_split. Results are kept in the run folder: a sweep goes on where it stopped.
    """
    with _usage_errors('What has been evaluated is kept, and the same command goes on from there.'):
        from composer_ema.pictures import sweeps
        from composer_ema.pictures.writing import check_out, write
        from composer_ema.sweep.finished_run import sweep_run
        from composer_ema.sweep.search import POINTS, Asked

        family = 'power' if power or powers else 'half_life'
        check_out(out := out or run / sweeps.picture_name(family, on_test=on_test))
        if half_lives is not None and family == 'power':
            raise typer.BadParameter('--half-lives and power function averages are two sweeps. Leave out one.')
        asked = Asked(
            family=family,
            values=_split(powers if family == 'power' else half_lives),
            points=POINTS if points is None else points,
            metric=metric,
            num_batches=limit,
            refresh_batchnorm=_refresh(refresh_batchnorm),
            on_test=on_test,
        )
        with _trials_reported() as report:
            found = sweep_run(run, asked, overrides or [], report=report)
        pictures = write(sweeps.draw_sweep(found), out)
        show(sweeps.table(found))
        for sentence in sweeps.conclusion(found):
            show(sentence)
        show('\n'.join(f'written: {path}' for path in pictures))


def _split(text: str | None) -> list[str] | None:
    return None if text is None else [part.strip() for part in text.split(',') if part.strip()]


def _refresh(text: str | None) -> bool | int | str:
    if text is None:
        return False
    return True if text.lower() == 'true' else int(text) if text.isdecimal() else text


@contextlib.contextmanager
def _trials_reported() -> Iterator[Any]:
    """A bar on a terminal, elsewhere a line for each average that was evaluated."""
    from rich.markup import escape
    from rich.progress import Progress

    from composer_ema.pictures.sweeps import in_brief

    console = _error_console()
    if not console.is_terminal:
        yield lambda done, total, trial: sys.stderr.write(f'{done} of {total}, {visible(in_brief(trial))}\n')
        return
    with Progress(console=console, transient=True) as progress:
        bar = progress.add_task('training weights', total=None)
        yield lambda done, total, trial: progress.update(
            bar, completed=done, total=total, description=escape(visible(in_brief(trial)))
        )


@app.command()
def inspect(
    checkpoint: Annotated[Path, typer.Argument(help=_CHECKPOINT_HELP, show_default=False)],
    all_tensors: Annotated[bool, typer.Option('--all', help='List every tensor.')] = False,
    as_json: Annotated[bool, typer.Option('--json', help='Print all of it as JSON.')] = False,
    key: Annotated[str | None, typer.Option(help=_KEY_HELP, show_default=False)] = None,
) -> None:
    """Show what a checkpoint holds: whose weights, which averages, of what. Executes nothing in it."""
    with _usage_errors():
        import dataclasses
        import json

        from composer_ema.checkpoints.inspection import describe

        found = describe(checkpoint, key=key)
        if as_json:
            # ASCII, with every character that does not print escaped as JSON has it.
            show(json.dumps(dataclasses.asdict(found), indent=2).replace('\x7f', r'\u007f'))
            return
        from composer_ema.pictures import checkpoints

        for table in checkpoints.of_checkpoint(found, all_tensors=all_tensors):
            show(table)


def main() -> None:
    """The entry point of ``composer-ema`` and of ``python -m composer_ema.cli``."""
    # As Composer does, but also before it is imported and where it is not: what is being written is then removed.
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    set_up_warnings()
    app()


def set_up_warnings() -> None:
    """Prints each warning as one line, and drops those of Composer and torch that call for no action."""
    warnings.showwarning = _show_warning
    # Composer warns of every last batch that is smaller than the others.
    warnings.filterwarnings('ignore', message='Cannot split tensor of length')
    # torch's SequentialLR steps its parts in the way that it warns of itself, up to 2.7 at least.
    warnings.filterwarnings('ignore', message='The epoch parameter in `scheduler.step')
    # torch's distributed checkpoints warn of a call of their own, once in each run.
    warnings.filterwarnings('ignore', message='TypedStorage is deprecated')
    # Composer warns of smoothed labels whose float32 sum is 1 less a rounding error.
    warnings.filterwarnings('ignore', message='Some targets have less than 1 total probability')


def show(renderable: Any) -> None:
    """Prints on rank 0. A string is never wrapped, so that it can be copied, and a table never cut."""
    if os.environ.get('RANK', '0') != '0':
        return
    if isinstance(renderable, Table):
        Console().print(Whole(renderable), highlight=False, crop=False)
    else:
        text = visible(renderable, keep='\n') if isinstance(renderable, str) else renderable
        Console().print(text, markup=False, highlight=False, soft_wrap=True)


def show_error(message: str) -> None:
    """Prints an error in red to standard error, on one line."""
    _error_console().print(visible(message), style='red', markup=False, highlight=False, soft_wrap=True)


def parse_seeds(text: str) -> list[int]:
    """The seeds in a string such as ``'1,2,3'``.

    Raises:
        ValueError: Something in it is no whole number of at least 0, or a seed comes twice.
    """
    given = [seed.strip() for seed in text.split(',')]
    if not all(seed.isdecimal() for seed in given):
        raise ValueError(f'seeds must be whole numbers of at least 0 with commas between, got {text!r}: 1,2,3')
    seeds = [int(seed) for seed in given]
    if len(set(seeds)) < len(seeds):
        raise ValueError(f'seeds must differ, or one run counts twice, got {text!r}')
    return seeds


def _show_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    """Leaves out the line of code that warned, which says nothing to a reader of the terminal."""
    if os.environ.get('RANK', '0') == '0':
        _print_warning(visible(' '.join(str(message).splitlines())))


def _print_warning(text: str) -> None:
    _error_console().print(f'warning: {text}', style='yellow', markup=False, highlight=False, soft_wrap=True)


def _checked_seeds(text: str | None) -> list[int]:
    try:
        return [] if text is None else parse_seeds(text)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None


@contextlib.contextmanager
def _usage_errors(kept: str = 'Nothing is left half-written.') -> Iterator[None]:
    """Turns an error in the user's input or on their disk, or a signal, into one line and an exit code.

    A bug of ours keeps its traceback.

    Args:
        kept: What to say of the results after a signal. Default: that they are whole or not there.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        if (error.name or '').partition('.')[0] not in _OF_THE_EXTRA:
            raise
        _fail(f'{error}. {_REMEDY}')
    except ValueError as error:
        if type(error).__name__ not in _OF_THE_USER:
            raise
        _fail(str(error))
    except OSError as error:
        if not isinstance(error.filename, str) and not is_of_the_disk(error):
            raise
        _fail(in_words(error), DISK_ERROR if is_of_the_disk(error) else USAGE_ERROR)
    except KeyboardInterrupt:
        _fail_in_process_0(f'stopped by Ctrl-C. {kept}', 128 + signal.SIGINT)
    except SystemExit as stop:  # of the handlers that Composer and main() set
        if stop.code not in (128 + signal.SIGINT, 128 + signal.SIGTERM):
            raise
        by = 'SIGTERM' if stop.code == 128 + signal.SIGTERM else 'Ctrl-C'
        _fail_in_process_0(f'stopped by {by}. {kept}', int(stop.code))


def _fail(message: str, code: int = USAGE_ERROR) -> None:
    show_error(message)
    raise typer.Exit(code)


def _fail_in_process_0(message: str, code: int) -> None:
    """Shows the message in one process, where each has the same to say."""
    if os.environ.get('RANK', '0') == '0':
        show_error(message)
    raise typer.Exit(code)


def _error_console() -> Console:
    return Console(stderr=True)


if __name__ == '__main__':
    main()
