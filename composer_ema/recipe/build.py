"""Builds the Trainer of a recipe. Everything that needs no data comes first, so that errors come at once."""

from __future__ import annotations

import dataclasses
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from composer import Trainer
from composer.callbacks import CheckpointSaver
from composer.core import Algorithm, Callback
from composer.models import ComposerModel
from composer.utils import dist, get_device, reproducibility
from omegaconf import OmegaConf

from composer_ema.posthoc.snapshot_files import SNAPSHOT_FOLDER
from composer_ema.recipe import code_paths, first_batch, folders, groups, parallelism, trainer_arguments
from composer_ema.recipe.arguments import RecipeError, said, signature
from composer_ema.recipe.fitting import Fitted, fit
from composer_ema.recipe.from_data import with_data
from composer_ema.recipe.interpolation import escaped
from composer_ema.recipe.loaded import check_loaded
from composer_ema.recipe.matching import how_loaded, refusing_misfits
from composer_ema.recipe.metrics import Report, directions
from composer_ema.recipe.named import REFUSALS, Named
from composer_ema.recipe.on_rank_0 import on_rank_0
from composer_ema.recipe.progress import other_progress_may_resume, progress_of
from composer_ema.recipe.scheduled import Length, Scheduled
from composer_ema.recipe.schema import Plan, Recipe, plan
from composer_ema.run_folder.folder import RunFolder
from composer_ema.run_folder.outputs import CHECKPOINT_FOLDER
from composer_ema.run_folder.packed import decompressed
from composer_ema.run_folder.recorder import Recorder
from composer_ema.run_folder.resuming import Found
from composer_ema.spans import ArgumentError
from composer_ema.trainer.weight_average import WeightAverage
from composer_ema.wording import counted
from composer_ema.zoo.dataset import Extent

DEFAULT_SEED = 0


@dataclass(frozen=True)
class Run:
    """A Trainer that is ready to fit, and where its results go.

    Args:
        recipe: The recipe with seed and run name filled in.
        plan: The same, checked.
        folder: The run folder, which may not exist yet.
        trainer: The Trainer, loaded where the recipe resumes, not yet fitted.
        recorder: The callback that writes the metrics.
        remarks: Strings and rich renderables to show before training: what overrides dropped, parameter groups, the
            schedule.
        resumed: What autoresume has loaded; None where it has not, or from an object store.
    """

    recipe: Recipe
    plan: Plan
    folder: Path
    trainer: Trainer
    recorder: Recorder
    remarks: list[Any]
    resumed: Found | None


def build(recipe: Recipe, *, scratch: Path | None = None, callbacks: Sequence[Callback] = ()) -> Run:
    """Builds the Trainer of a recipe: checks, then model, optimizer and plug-ins, then data, then the Trainer.

    Args:
        recipe: The result of ``schema.load``.
        scratch: For a run that is never fitted, a folder for all files. The loggers of the recipe are then built, to
            check them, but not passed to the Trainer, with which they would open files and connections. Default:
            None, the run folder.
        callbacks: Further callbacks, after those of the recipe.

    Returns:
        Run: Ready for ``run.trainer.fit()``. It holds its run folder until ``run.trainer.close()``. The files there
        are replaced when the first batch has been trained.

    Raises:
        RecipeError: The recipe is wrong; with few exceptions this is raised before data is touched. The run folder is
            as it was.
    """
    checked = plan(recipe)
    _start_processes(checked)
    folder = folders.take(checked) if scratch is None else folders.look(checked)
    try:
        return _build_in(folder, checked, scratch, callbacks)
    except BaseException:
        folder.release()
        raise


def _build_in(taken: RunFolder, checked: Plan, scratch: Path | None, callbacks: Sequence[Callback]) -> Run:
    checked = with_data(checked)
    recipe, place, seed = checked.recipe, checked.place, _seed(checked)
    run_name, folder = taken.name, taken.path
    with checked.trust.reading():
        resumed = check_loaded(checked, run_name)

    reproducibility.seed_all(seed)
    model = checked.model.build()
    parallelism.check_model(checked.trainer.get(parallelism.KEY), model, place / parallelism.KEY)
    optimizer = groups.build_optimizer(checked.optimizer, checked.param_groups, model) if checked.optimizer else None
    # Before the data are touched, unless nothing else tells the length of an epoch.
    extent = checked.extent()
    stepped = _fit(checked, extent.batches, model, optimizer, extent) if extent is not None else None
    algorithms = [_algorithm(each, checked, scratch or folder) for each in checked.algorithms]
    callbacks = [*(_callback(each, scratch) for each in checked.callbacks), *callbacks]
    loggers = [each.build() for each in checked.loggers]

    data = checked.data.build(**_seed_of_data(checked.data, seed))
    first_batch.check(model, data, checked)
    checked = dataclasses.replace(checked, report=_report(checked, model))
    if extent is not None and extent.batches != data.batches:
        raise checked.data.place.error(
            f'{checked.data.name} is registered with {counted(extent.samples, "sample")}, '
            f'{counted(extent.batches, "batch")} an epoch, and '
            f'its loader has {data.batches}. Correct what samples= of its registration returns.'
        )
    stepped = stepped or _fit(checked, data.batches, model, optimizer)
    recorder = Recorder(taken if scratch is None else None)
    progress, lines = progress_of(checked.trainer, loggers) if scratch is None else ({'progress_bar': False}, [])
    arguments = {
        **_trainer_arguments(checked.trainer, folder, scratch, resumed),
        **progress,
        'seed': seed,
        'run_name': run_name,
        'model': model,
        'train_dataloader': data.train,
        'eval_dataloader': [data.evaluator(f'eval_{each}') for each in checked.evaluate],
        'optimizers': optimizer,
        'schedulers': stepped.schedulers,
        'algorithms': algorithms,
        'callbacks': [recorder, *stepped.callbacks, *callbacks],
        'loggers': [recorder.collector, *lines, *(loggers if scratch is None else [])],
    }
    if stepped.every_batch is not None:
        arguments['step_schedulers_every_batch'] = stepped.every_batch
    settings = stepped.settings()
    load = how_loaded(checked, resumed)
    loading = checked.trust.loading(None if load is None else load.path)
    with loading, other_progress_may_resume(), refusing_misfits(load):
        try:
            with decompressed(arguments.get('load_path') or '') as path:
                trainer = Trainer(**{**arguments, **({'load_path': path} if path else {})})
        except RecipeError:
            raise
        except REFUSALS as error:
            raise refused(checked, error) from error
    try:
        stepped.check_unchanged(settings)
        if scratch is None:
            _check_past(checked, taken, recorder)
    except BaseException:
        trainer.close()
        raise
    length = checked.length(data.batches, extent)
    filled = _schedule_values(recipe, stepped.scheduled) | _report_values(checked)
    filled |= {code_paths.KEY: checked.code_paths} if checked.code_paths else {}
    resolved = recipe.replace(seed=seed, run_name=run_name, **filled)
    taken.recipe = as_yaml(resolved)
    remarks = [
        *checked.imported,
        *recipe.remarks,
        *data.remarks,
        *_remarks(checked, stepped.scheduled, length, optimizer),
    ]
    return Run(resolved, checked, folder, trainer, recorder, remarks, resumed)


def as_yaml(recipe: Recipe) -> str:
    """The resolved recipe in YAML, with the value of every interpolation."""
    return OmegaConf.to_yaml(OmegaConf.create(escaped(recipe.values)))


def refused(checked: Plan, error: Exception) -> RecipeError:
    """An error in a run, at the key that it is about: an argument of an algorithm, an algorithm, or the whole recipe.

    Only errors that carry the name of the argument tell it; see :class:`composer_ema.spans.ArgumentError`. Others tell
    the algorithm that raised them.
    """
    argument: str = getattr(error, 'argument', '')
    owners = [each for each in checked.algorithms if argument in signature(each.factory)]
    if len(owners) != 1:
        owner = _raised_in(checked, error)
        return (checked.place if owner is None else owner.place).error(said(error))
    place, message = owners[0].blame(error), said(error)
    value = owners[0].arguments.get(argument)
    if isinstance(value, dict) and len(value) > 1:  # in their order, which an override cannot choose
        message += f' An override adds to the end of the mapping in the file; ~{place.key} before it drops that.'
    return place.error(message)


def _raised_in(checked: Plan, error: Exception) -> Named | None:
    """The algorithm of a recipe in whose method an error was raised."""
    for frame, _ in reversed(list(traceback.walk_tb(error.__traceback__))):
        kind = type(frame.f_locals.get('self'))
        for each in checked.algorithms:
            if each.factory is kind:
                return each
    return None


def _start_processes(checked: Plan) -> None:
    """Joins the process group if there are several processes: they must agree on a run name."""
    device = checked.trainer.get('device')
    try:
        found = get_device(device)
        if dist.get_world_size() > 1:
            dist.initialize_dist(found, checked.trainer.get('dist_timeout', 300.0))
    except (ValueError, ImportError, RuntimeError) as error:
        raise (checked.place / 'device').error(f'{device!r} cannot be used here: {error}') from error
    trainer_arguments.check_device(checked.trainer, found, checked.place)


def _seed(checked: Plan) -> int:
    """The recipe's seed, or a constant: a run that is started again must draw the same batches."""
    seed = checked.trainer.get('seed')
    return DEFAULT_SEED if seed is None else seed


def _check_past(checked: Plan, folder: RunFolder, recorder: Recorder) -> None:
    """Refuses to write a run that a checkpoint began into the folder of another, or to wind a run back unasked.

    Raises:
        RecipeError: At ``run_name``, on every rank.
    """
    if checked.trainer.get('autoresume') or checked.trainer.get('save_overwrite'):
        return

    def check() -> None:
        if not folder.is_taken or recorder.goes_on_in_file():
            return
        place, loaded = checked.place / 'run_name', checked.trainer.get('load_path')
        if recorder.num_lines and recorder.has_past_in_file():
            raise place.error(
                f'{folder.path} holds a run that has gone on after {loaded}. Continue it with autoresume=true, go back '
                'to this checkpoint with save_overwrite=true, or give another run_name.'
            )
        raise place.error(
            f'{folder.path} holds another run than the one that {loaded} continues. Give another run_name, or replace '
            'the run with save_overwrite=true.'
        )

    on_rank_0(check)


def _seed_of_data(data: Named, seed: int) -> dict[str, int]:
    """The recipe's seed, for a data set that takes one and is given none of its own."""
    return {'seed': seed} if 'seed' in signature(data.factory) and 'seed' not in data.arguments else {}


def _fit(
    checked: Plan,
    batches_per_epoch: int | None,
    model: Any,
    optimizer: torch.optim.Optimizer | None,
    size: Extent | None = None,
) -> Fitted:
    length = checked.length(batches_per_epoch, size)
    return fit(checked.schedulers, length, trainer=checked.trainer, model=model, optimizer=optimizer)


def _schedule_values(recipe: Recipe, scheduled: Sequence[Scheduled]) -> dict[str, Any]:
    """The key ``scheduler`` with every filled-in argument; nothing where the recipe has none."""
    values = [each.as_values() for each in scheduled]
    if not values:
        return {}
    return {'scheduler': values if isinstance(recipe.values['scheduler'], list) else values[0]}


def _report(checked: Plan, model: ComposerModel) -> Report:
    """The report of the recipe, about a metric that the model has."""
    try:
        return checked.report.for_metrics(directions(model.get_metrics(is_train=False)))
    except ArgumentError as error:
        raise (checked.place / 'report' / 'metric').error(said(error)) from error


def _report_values(checked: Plan) -> dict[str, Any]:
    """The key ``report`` with what the metric says of itself; nothing where the recipe names none."""
    return {} if checked.report.metric is None else {'report': checked.report.given()}


def _remarks(
    checked: Plan, scheduled: Sequence[Scheduled], length: Length | None, optimizer: torch.optim.Optimizer | None
) -> list[Any]:
    remarks: list[Any] = []
    for each in scheduled:
        remarks += [f'scheduler: {each.in_words()}', *(each.beyond(length) if length else ())]
    if checked.param_groups and optimizer is not None:
        remarks.insert(0, groups.table(optimizer, checked.param_groups))
    return remarks


def _callback(named: Named, scratch: Path | None) -> Callback:
    """A callback of the recipe; Composer's CheckpointSaver makes its folder at once."""
    if scratch is None or named.factory is not CheckpointSaver:
        return named.build()
    arguments = {**named.arguments, 'folder': str(scratch / named.name)}
    return dataclasses.replace(named, arguments=arguments).build()


def _algorithm(named: Named, checked: Plan, folder: Path) -> Algorithm:
    algorithm = _built(named, checked)
    if isinstance(algorithm, WeightAverage) and algorithm.snapshots is not None:
        algorithm.snapshots.default_folder = folder / SNAPSHOT_FOLDER
    return algorithm


def _built(named: Named, checked: Plan) -> Algorithm:
    if named not in checked.averages.values() or not checked.evaluate:
        return named.build()
    own = {'training', *(label for label, algorithm in checked.averages.items() if algorithm is named)}
    return named.build(evaluate_with={f'eval_{weights}': weights for weights in checked.evaluate if weights in own})


def _trainer_arguments(
    given: Mapping[str, Any], folder: Path, scratch: Path | None, resumed: Found | None
) -> dict[str, Any]:
    """The arguments of the recipe, with checkpoints in the run folder, or in ``scratch``."""
    arguments = {'save_folder': str(folder / CHECKPOINT_FOLDER), **given}
    arguments[parallelism.KEY] = parallelism.built(given.get(parallelism.KEY))
    # A process killed between writing a checkpoint and updating 'latest' leaves a checkpoint newer than 'latest'.
    arguments.setdefault('save_overwrite', bool(given.get('autoresume')))
    if scratch is not None and arguments['save_folder'] is not None:
        arguments['save_folder'] = str(scratch / CHECKPOINT_FOLDER)
    if given.get('autoresume') and (resumed is not None or not given.get('save_latest_filename', True)):
        # Composer looks for the link alone, and refuses to look where the recipe wants none.
        arguments['autoresume'] = False
    if resumed is not None:
        # What the recipe says of a load is about the checkpoint that the run began with, as in Composer's autoresume.
        arguments.update(dict.fromkeys(('load_object_store', 'load_ignore_keys', 'load_exclude_algorithms')))
        arguments.update(load_path=str(resumed.path.absolute()), load_weights_only=False)
    return arguments
