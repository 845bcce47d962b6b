"""Trains a recipe, once or for several seeds, or builds it only; returns what came out as plain data."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from composer.core import Callback
from composer.utils import dist

from composer_ema.files import remove_unfinished, write_beside
from composer_ema.recipe.build import Run, as_yaml, build, refused
from composer_ema.recipe.folders import folder_of_checkpoints
from composer_ema.recipe.metrics import Report
from composer_ema.recipe.on_rank_0 import on_rank_0
from composer_ema.recipe.schema import Recipe
from composer_ema.recipe.stopped import closed_at_end, stops_told
from composer_ema.run_folder.outputs import RECIPE_FILE
from composer_ema.run_folder.whole import whole_checkpoints
from composer_ema.trainer.snapshots import RunSnapshots
from composer_ema.trainer.weight_average import WeightAverage
from composer_ema.wording import counted


@dataclass(frozen=True)
class Outcome:
    """What a run recorded, including the part before it was resumed.

    Args:
        run_name: The run.
        seed: Its seed.
        folder: The run folder.
        report: What the recipe says of its metrics and its target.
        evaluations: The lines of the metrics file that hold metrics of an evaluator, oldest first.
        update_share: Share of step time spent on averaging, in [0, 1]; None if nothing was averaged.
        num_batches: Number of batches over which ``update_share`` was measured.
        snapshots: Where the run's snapshots lie and how large they are, in a sentence; None if it wrote none.
        lost: What somebody has removed of the run while it trained, in a sentence; None if all is there.
    """

    run_name: str
    seed: int
    folder: Path
    report: Report
    evaluations: list[dict[str, Any]]
    update_share: float | None
    num_batches: int
    snapshots: str | None = None
    lost: str | None = None


@dataclass(frozen=True)
class Rehearsal:
    """What a recipe builds.

    Args:
        recipe: The resolved recipe in YAML.
        parts: What was built, by its kind: ``'model'``, ``'data'``, ``'optimizer'``, ...
        remarks: What training would show first, strings and rich renderables.
    """

    recipe: str
    parts: dict[str, str]
    remarks: list[Any]


def train(recipe: Recipe, show: Callable[[Any], None], *, callbacks: Sequence[Callback] = ()) -> Outcome:
    """Trains a recipe. With autoresume, trains only what is left of it.

    Args:
        recipe: The recipe, from ``schema.load``.
        show: Called with each remark before training starts, a string or a rich renderable.
        callbacks: Callbacks to run after the recipe's own. Default: none.

    Returns:
        Outcome: What the whole run recorded.

    Raises:
        RecipeError: The recipe cannot be followed.
        OutOfDisk: A file of the run cannot be written. Its checkpoints are as they were.
        ProcessLost: Another process of the run has ended.
        FolderTaken: Another process has taken the run folder, from which somebody had removed the lock.
        Interrupted: A signal has ended the run; a ``SystemExit``, as Composer raises then.
    """
    run = build(recipe, callbacks=callbacks)
    with closed_at_end(run.trainer), stops_told(run), whole_checkpoints():
        _remove_leftovers(run)
        for remark in run.remarks:
            show(remark)
        _show_what_is_resumed(run, show)
        _fit(run, show)
        lost = _lost(run)
    return Outcome(
        run_name=run.trainer.state.run_name,
        seed=run.recipe.values['seed'],
        folder=run.folder,
        report=run.plan.report,
        evaluations=run.recorder.evaluations,
        update_share=run.recorder.update_share,
        num_batches=run.recorder.num_batches,
        snapshots=' '.join(_disk_uses(run)) or None,
        lost=lost,
    )


def train_seeds(recipe: Recipe, seeds: Sequence[int], show: Callable[[Any], None]) -> Iterator[Outcome]:
    """Trains a recipe once per seed, and yields each outcome before the next run starts.

    Args:
        recipe: The recipe. Each run replaces its ``seed`` and adds ``-seed<n>`` to its run name.
        seeds: The seeds, in order.
        show: As for :func:`train`.
    """
    for seed in seeds:
        yield train(_for_seed(recipe, seed), show)


def rehearse(recipe: Recipe) -> Rehearsal:
    """Builds everything that a recipe names, the Trainer included, trains nothing and leaves no file.

    Raises:
        RecipeError: The recipe cannot be followed.
    """
    with tempfile.TemporaryDirectory() as scratch:
        run = build(recipe, scratch=Path(scratch))
        try:
            return Rehearsal(as_yaml(run.recipe), _parts(run), run.remarks)
        finally:
            run.trainer.close()


def _show_what_is_resumed(run: Run, show: Callable[[Any], None]) -> None:
    if not run.plan.trainer.get('autoresume'):
        return
    state = run.trainer.state
    if state.load_path is None:
        show(f'autoresume: {run.folder} holds no checkpoint; training starts from the beginning')
    else:
        path, remark = (state.load_path, '') if run.resumed is None else (run.resumed.path, run.resumed.remark)
        remark = remark and f'; {remark}'
        show(f'autoresume: going on from {path}, batch {int(state.timestamp.batch)}{remark}')


def _fit(run: Run, show: Callable[[Any], None]) -> None:
    state = run.trainer.state
    assert state.max_duration is not None, 'the schema asks for max_duration'
    if state.timestamp >= state.max_duration:
        is_over = _is_over(run)
        left = 'nothing is left to train' if is_over else 'only what comes after the last batch is left'
        trained = state.timestamp.get(state.max_duration.unit)
        if is_over and not run.plan.trainer.get('autoresume'):
            left = (
                f'{left}. max_duration={state.max_duration} counts from the beginning: give a longer one to go on, or '
                'load_weights_only=true to begin anew with these weights'
            )
        show(f'{state.run_name} has already trained for {trained}: {left}')
        if not is_over:
            # fit() refuses a run without a batch to train, and has no other door to its end (Composer 0.32.1).
            run.trainer._train_loop()
        return
    start = state.timestamp.batch
    try:
        for algorithm in state.algorithms:
            if isinstance(algorithm, WeightAverage) and (remark := algorithm.disk_of_snapshots(state)):
                show(remark)
        run.trainer.fit()
    except FileExistsError as error:
        raise (run.plan.place / 'save_folder').error(
            f'{error} Continue the run with autoresume=true, or replace it with save_overwrite=true.'
        ) from error
    except ValueError as error:
        if state.timestamp.batch > start:
            raise
        # A setting that cannot work in this run is refused before the first batch: a half-life of 2ep in 10ba.
        raise refused(run.plan, error) from error


def _disk_uses(run: Run) -> Iterator[str]:
    for snapshots in _snapshots_of(run):
        if said := snapshots.disk_use():
            yield said


def _snapshots_of(run: Run) -> Iterator[RunSnapshots]:
    for algorithm in run.trainer.state.algorithms:
        if isinstance(algorithm, WeightAverage) and algorithm.snapshots is not None:
            yield algorithm.snapshots


def _remove_leftovers(run: Run) -> None:
    """Removes what killed processes have left half-written in the folders of the run, which this one holds."""
    if dist.get_global_rank() != 0:
        return
    remove_unfinished(run.folder)
    saves = folder_of_checkpoints(run.plan, run.trainer.state.run_name)
    if saves is not None:
        remove_unfinished(saves.path)
        if saves.is_own:
            # With these, processes of one machine wait for each other while Composer (0.32.1) looks for a checkpoint.
            for path in saves.path.glob('._signal_file_node*'):
                path.unlink(missing_ok=True)


def _is_over(run: Run) -> bool:
    """Whether a run that has trained to its end also has its last evaluation and its last snapshots.

    A kill may come between its last checkpoint and these.
    """
    state = run.trainer.state
    batch = int(state.timestamp.batch)
    is_evaluated = on_rank_0(lambda: not state.evaluators or run.recorder.has_evaluated(batch))
    return is_evaluated and all(on_rank_0(lambda own=own: own.is_over(state)) for own in _snapshots_of(run))


def _lost(run: Run) -> str | None:
    """What somebody has removed of the run while it trained, in a sentence. Writes its recipe again if that is gone."""
    if dist.get_global_rank() != 0:
        return None
    if run.recorder.has_begun and not (run.folder / RECIPE_FILE).exists():
        write_beside(run.folder / RECIPE_FILE, as_yaml(run.recipe))
    found = [*run.recorder.lost(run.trainer.state), *(each.lost() for each in _snapshots_of(run))]
    lost = ', '.join(filter(None, found))
    return f'lost, since somebody removed them while the run trained: {lost}' if lost else None


def _for_seed(recipe: Recipe, seed: int) -> Recipe:
    if recipe.run_name is not None:
        return recipe.replace(seed=seed, run_name=f'{recipe.run_name}-seed{seed}')
    return dataclasses.replace(recipe.replace(seed=seed), name=f'{recipe.name}-seed{seed}')


def _parts(run: Run) -> dict[str, str]:
    plan, state = run.plan, run.trainer.state
    size = sum(parameter.numel() for parameter in state.model.parameters())
    kinds = (('algorithms', plan.algorithms), ('callbacks', plan.callbacks), ('loggers', plan.loggers))
    return {
        'model': f'{plan.model.name}, {counted(size, "parameter")}',
        'data': ', '.join([plan.data.name, *_trained_on(run)]),
        'optimizer': ', '.join(type(each).__name__ for each in state.optimizers),
        'scheduler': ', '.join(each.name for each in plan.schedulers) or 'none: a constant learning rate',
        **{kind: ', '.join(each.name for each in entries) or 'none' for kind, entries in kinds},
        'evaluates': ', '.join(evaluator.label for evaluator in state.evaluators) + evaluated_on(run)
        if state.evaluators
        else 'nothing',
        'trains for': f'{state.max_duration} on {type(state.device).__name__}, {state.precision.value}',
        'run folder': str(run.folder),
    }


def _trained_on(run: Run) -> list[str]:
    batches = counted(int(run.trainer.state.dataloader_len or 0), 'batch')
    samples = _num_samples(run.trainer.state.train_dataloader)
    return [*([] if samples is None else [counted(samples, 'training sample')]), f'{batches} per epoch']


def evaluated_on(run: Run) -> str:
    """Which samples the evaluators of a run see, in words to put behind their names."""
    samples, split = _num_samples(run.trainer.state.evaluators[0].dataloader.dataloader), run.plan.validation_split
    if samples is None:
        return ''
    whose = '' if split is None else ' held out of the training set' if split else f' of {run.plan.evaluation_set}'
    return f' on {counted(samples, "sample")}{whose}' + (f' (validation_split={split})' if split else '')


def _num_samples(loader: Any) -> int | None:
    try:
        return len(loader.dataset)
    except (AttributeError, TypeError):  # a loader of another kind, or data without a length
        return None
