"""Follows a recipe: trains it, once or for several seeds, and leaves tables, metrics and pictures in the run folder."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from composer.core import Callback
from composer.utils import dist
from omegaconf import OmegaConf
from rich.table import Table

from composer_ema.files import write_beside
from composer_ema.pictures import curves, plots, report
from composer_ema.pictures.report import Result
from composer_ema.recipe.build import Run, blame, build
from composer_ema.recipe.outputs import RECIPE_FILE
from composer_ema.recipe.schema import Recipe


def train(recipe: Recipe, show: Callable[[Any], None], *, callbacks: Sequence[Callback] = ()) -> Result:
    """Trains a recipe and shows its table; with autoresume, only what is left of it.

    Args:
        recipe: What ``schema.load`` returned.
        show: Takes what is to be printed, a string or a rich renderable.
        callbacks: Further ones, which follow the recipe's own.

    Returns:
        Result: What came out, over the whole run, also over the part before it was resumed.

    Raises:
        RecipeError: The recipe cannot be followed.
    """
    run = build(recipe, callbacks=callbacks)
    try:
        for remark in run.remarks:
            show(remark)
        _tell_what_is_resumed(run, show)
        if dist.get_global_rank() == 0:
            write_beside(run.folder / RECIPE_FILE, as_yaml(run.recipe))
        _fit(run, show)
    finally:
        run.trainer.close()
    outcome = _outcome(run)
    if dist.get_global_rank() == 0:
        _draw(run, show)
    if outcome.points:
        show(report.epochs_table(outcome))
    show(f'{report.summary(outcome)}\nrun folder: {run.folder}'.lstrip())
    return outcome


def train_seeds(recipe: Recipe, seeds: Sequence[int], show: Callable[[Any], None]) -> list[Result]:
    """Trains a recipe once per seed, shows the table over seeds, also as Markdown, and writes it to the runs folder.

    Args:
        recipe: Its ``seed`` is replaced; the seed is added to its run name.
        seeds: At least one.
        show: Takes what is to be printed.

    Returns:
        list[Result]: One per seed.
    """
    name = recipe.run_name or recipe.name
    outcomes = [train(_for_seed(recipe, seed), show) for seed in seeds]
    markdown = report.seeds_markdown(outcomes)
    path = Path(recipe.values.get('runs_folder') or 'runs') / f'{name}-seeds.md'
    if dist.get_global_rank() == 0:
        write_beside(path, markdown)
    show(report.seeds_table(outcomes, title=f'{name}, {len(seeds)} seeds'))
    show(markdown)
    show(f'the same table as Markdown: {path}')
    return outcomes


def rehearse(recipe: Recipe, show: Callable[[Any], None]) -> None:
    """Builds everything, the Trainer included, trains nothing, and shows the resolved recipe and what was built."""
    with tempfile.TemporaryDirectory() as scratch:
        run = build(recipe, scratch=Path(scratch))
        try:
            show(as_yaml(run.recipe))
            show(_inventory(run))
            for remark in run.remarks:
                show(remark)
        finally:
            run.trainer.close()


def as_yaml(recipe: Recipe) -> str:
    """The resolved recipe in YAML, every interpolation replaced by its value."""
    return OmegaConf.to_yaml(OmegaConf.create(recipe.values))


def _tell_what_is_resumed(run: Run, show: Callable[[Any], None]) -> None:
    if not run.plan.trainer.get('autoresume'):
        return
    state = run.trainer.state
    if state.load_path is None:
        show(f'autoresume: {run.folder} holds no checkpoint; training starts from the beginning')
    else:
        show(f'autoresume: going on from {state.load_path}, batch {int(state.timestamp.batch)}')


def _fit(run: Run, show: Callable[[Any], None]) -> None:
    state = run.trainer.state
    assert state.max_duration is not None, 'the schema asks for max_duration'
    if state.timestamp >= state.max_duration:
        show(f'{state.run_name} has already trained for {state.max_duration}: nothing is left to train')
        return
    start = state.timestamp.batch
    try:
        run.trainer.fit()
    except FileExistsError as error:
        raise (run.plan.place / 'save_folder').error(
            f'{error} Continue the run with autoresume=true, or replace it with save_overwrite=true.'
        ) from error
    except ValueError as error:
        if state.timestamp.batch > start:
            raise
        # Refused before the first batch: a setting that cannot work in this run, such as a half-life of 2ep in 10ba.
        raise blame(run.plan, error).error(str(error)) from error


def _draw(run: Run, show: Callable[[Any], None]) -> None:
    """The picture of ``composer-ema plot`` for this run, in its folder."""
    try:
        plots.write(plots.draw_runs([curves.read_run(run.folder)]), run.folder / curves.CURVES)
    except curves.PlotError as error:  # the run itself is done and saved
        show(f'no picture of the run: {error}')


def _outcome(run: Run) -> Result:
    return report.result(
        run.recorder,
        run_name=run.trainer.state.run_name,
        seed=run.recipe.values['seed'],
        target_accuracy=run.plan.report.target_accuracy,
    )


def _for_seed(recipe: Recipe, seed: int) -> Recipe:
    if recipe.run_name is not None:
        return recipe.replace(seed=seed, run_name=f'{recipe.run_name}-seed{seed}')
    return dataclasses.replace(recipe.replace(seed=seed), name=f'{recipe.name}-seed{seed}')


def _inventory(run: Run) -> Table:
    """What was built, a line each."""
    plan, state = run.plan, run.trainer.state
    size = sum(parameter.numel() for parameter in state.model.parameters())
    optimizers = [type(each).__name__ for each in state.optimizers]
    table = Table(title='built, not trained', title_justify='left', show_header=False)
    table.add_row('model', f'{plan.model.name}, {size:,} parameters')
    table.add_row('data', f'{plan.data.name}, {int(state.dataloader_len or 0)} batches per epoch')
    table.add_row('optimizer', ', '.join(optimizers))
    names = [each.name for each in plan.schedulers]
    table.add_row('scheduler', ', '.join(names) or 'none: a constant learning rate')
    for kind, entries in (('algorithms', plan.algorithms), ('callbacks', plan.callbacks), ('loggers', plan.loggers)):
        table.add_row(kind, ', '.join(each.name for each in entries) or 'none')
    table.add_row('evaluates', ', '.join(evaluator.label for evaluator in state.evaluators) or 'nothing')
    table.add_row('trains for', f'{state.max_duration} on {type(state.device).__name__}, {state.precision.value}')
    table.add_row('run folder', str(run.folder))
    return table
