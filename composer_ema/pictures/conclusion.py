"""What a run shows and leaves when it is over: its tables, and the picture in its folder."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from composer.utils import dist

from composer_ema.files import in_words, is_of_the_disk, write_beside
from composer_ema.pictures import report
from composer_ema.pictures.curves import CURVES, read_run
from composer_ema.pictures.errors import PlotError
from composer_ema.pictures.report import Result
from composer_ema.pictures.runs import draw_runs
from composer_ema.pictures.writing import write
from composer_ema.run_folder.lock import InUseError, Lock
from composer_ema.wording import counted

if TYPE_CHECKING:
    from composer_ema.recipe.run import Outcome, Rehearsal
    from composer_ema.recipe.schema import Recipe


def of_run(outcome: Outcome, show: Callable[[Any], None]) -> Result:
    """Draws a run into its folder, on rank 0 only, then shows its table and where it lies.

    A run that cannot be drawn is reported in words: the run itself is done and saved. Where another process has begun
    to work in the folder since, nothing is drawn, or it would be that one's picture. A
    picture for which its disk has no room is an error, raised once the rest is shown.

    Args:
        outcome: What ``run.train`` returned.
        show: Called with what is to be printed, a string or a rich renderable.

    Returns:
        Result: The outcome, read for tables.

    Raises:
        PlotError: The picture cannot be written, as on a full disk.
    """
    unwritten: OSError | None = None
    is_kept = outcome.folder.is_dir()  # not where a checkpoint in another folder left nothing to train
    if is_kept and dist.get_global_rank() == 0:
        try:
            with Lock(outcome.folder):
                write(draw_runs([read_run(outcome.folder)]), outcome.folder / CURVES)
        except (PlotError, InUseError, OSError) as error:
            cause = error if isinstance(error, OSError) else error.__cause__
            if isinstance(cause, OSError) and is_of_the_disk(cause):
                unwritten = cause
            else:
                show(f'no picture of the run: {error}')
    result = report.result(outcome)
    if result.points:
        show(report.epochs_table(result))
    folder = f'run folder: {outcome.folder}' if is_kept else None
    lines = [report.summary(result), outcome.snapshots, outcome.lost, folder]
    show('\n'.join(filter(None, lines)))
    if unwritten is not None:
        raise PlotError(
            f'{in_words(unwritten)} The run itself is whole. Make room, then draw it with: composer-ema plot '
            f'{outcome.folder}'
        ) from unwritten
    return result


def of_seeds(recipe: Recipe, results: Sequence[Result], show: Callable[[Any], None]) -> None:
    """Shows the table over seeds, also as Markdown, which rank 0 writes to ``<runs_folder>/<name>-seeds.md``.

    Args:
        recipe: The recipe that all runs followed.
        results: One per seed, at least one.
        show: As for :func:`of_run`.
    """
    name = recipe.run_name or recipe.name
    markdown = report.seeds_markdown(results)
    path = Path(recipe.values.get('runs_folder') or 'runs') / f'{name}-seeds.md'
    show(report.seeds_table(results, title=f'{name}, {counted(len(results), "seed")}'))
    show(markdown)
    if dist.get_global_rank() == 0:
        write_beside(path, markdown)
    show(f'the same table as Markdown: {path}')


def of_rehearsal(rehearsal: Rehearsal, show: Callable[[Any], None]) -> None:
    """Shows the resolved recipe, what it builds, and what training would show first."""
    show(rehearsal.recipe)
    show(report.parts_table(rehearsal.parts))
    for remark in rehearsal.remarks:
        show(remark)
