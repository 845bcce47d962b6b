"""The checkpoint that a run will load, checked before anything is built."""

from __future__ import annotations

import os
import zipfile
from pathlib import Path
from typing import Any

from composer.utils import dist
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from composer_ema.checkpoints.reading import is_of_composer
from composer_ema.checkpoints.safely import CheckpointError, check_sums, load_safely, reason
from composer_ema.checkpoints.sharded import check_folder, is_sharded
from composer_ema.recipe import parallelism, resuming
from composer_ema.recipe.arguments import RecipeError, signature
from composer_ema.recipe.outputs import RECIPE_FILE
from composer_ema.recipe.packed import unpacked
from composer_ema.recipe.resuming import Found
from composer_ema.recipe.save_folder import SaveFolder
from composer_ema.recipe.schema import Plan


def check_loaded(checked: Plan, run_name: str) -> Found | None:
    """Refuses a missing or damaged checkpoint.

    Returns:
        What autoresume goes on from; None where it is to go on from nothing on this machine's disks.

    Raises:
        RecipeError: At ``load_path`` or ``autoresume``, in every process.
    """
    outcome: list[Any] = [None, None]
    # Rank 0 reads it through, which takes a while for a large one; then all processes raise the same error, or go on
    # from the same checkpoint.
    if dist.get_global_rank() == 0:
        try:
            outcome[0] = _checked(checked, run_name)
        except RecipeError as error:
            outcome[1] = error
    dist.broadcast_object_list(outcome)
    if outcome[1] is not None:
        raise outcome[1]
    return outcome[0]


def _checked(checked: Plan, run_name: str) -> Found | None:
    if checked.trainer.get('autoresume'):
        found = _to_resume(checked, run_name)
        if found is not None:
            return found
    given = checked.trainer.get('load_path')
    if not given or '://' in given or '{' in given or checked.trainer.get('load_object_store') is not None:
        return None
    place, path = checked.place / 'load_path', Path(given)
    if reason := _mismatch(path, checked):
        raise place.error(reason)
    if reason := damage(path):
        raise place.error(f'{reason} Load an earlier one.')
    return None


def _to_resume(checked: Plan, run_name: str) -> Found | None:
    place = checked.place / 'autoresume'
    if checked.trainer.get('save_folder', '') is None:
        raise place.error('goes on from what the run has saved, and save_folder: null saves nothing. Leave one out.')
    folder = SaveFolder.of(checked, run_name)
    if folder is None or not folder.has_any():
        return None
    now, before = checked.validation_split, _split_before(checked, run_name)
    if before is not None and before != now:
        raise (checked.place / 'data.validation_split').error(
            f'must stay {before}, with which this run began, got {now}, which holds out other samples: the run has '
            f'trained on some of them, or would. Write {before}, or start another run.'
        )
    try:
        found = resuming.find(folder, run_name, damage)
    except resuming.CannotResumeError as error:
        raise place.error(str(error)) from error
    if found is not None and (reason := _mismatch(found.path, checked)):
        raise place.error(reason)
    return found


def _mismatch(path: Path, checked: Plan) -> str | None:
    """Why a sound checkpoint of this kind, a file or a folder, cannot be loaded by a run that shards as this one."""
    loads = parallelism.loads(checked.trainer.get(parallelism.KEY))
    if path.is_dir() and loads == 'full':
        if not is_sharded(path):
            return f'{path} is a folder. Give one file of it, as in {path / "latest-rank0.pt"}.'
        return (
            f'{path} is a sharded checkpoint, and this run loads single files. Write parallelism_config: '
            '{fsdp2: {state_dict_type: sharded}}, for a single process, too.'
        )
    if path.is_file() and path.suffix != '.symlink' and loads == 'sharded':
        return (
            f'{path} is a single file, and this run loads sharded checkpoints. Write '
            'parallelism_config.fsdp2.state_dict_type: full, with which it saves such files, too.'
        )
    return None


def _split_before(checked: Plan, run_name: str) -> float | None:
    """The share that the run to be resumed has held out so far; None where its folder does not tell."""
    if checked.validation_split is None:
        return None
    try:
        recipe: Any = OmegaConf.to_container(OmegaConf.load(Path(checked.runs_folder) / run_name / RECIPE_FILE))
        before = recipe['data'].get('validation_split', signature(checked.data.factory)['validation_split'].default)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, YAMLError, OmegaConfBaseException):
        return None
    return before


def damage(path: Path) -> str | None:
    """What is wrong with a checkpoint, as far as one can tell without unpickling it; None for a whole one."""
    found: str | None
    try:
        if not path.exists():
            return f'{path}{_led_astray(path)} is missing.'
        if path.is_dir():
            return _damage_of_folder(path)
        if not path.is_file():
            return f'{path} is no file, but a pipe, a socket or a device.'
        if path.suffix == '.symlink':  # Composer's link to a checkpoint in an object store
            return None
        with unpacked(path) as file:
            found = _damage_of_file(file, path)
    except (OSError, CheckpointError) as error:
        found = str(error)
    return found.removesuffix(' Load an earlier checkpoint.') if found else None


def _led_astray(path: Path) -> str:
    return f' is a link to {os.readlink(path)}, which' if path.is_symlink() else ''


def _damage_of_file(file: Path, path: Path) -> str | None:
    """What is wrong with ``file``, that is the checkpoint ``path`` or what was packed in it."""
    # torch.save writes a zip archive; its directory comes last, so a truncated file has none.
    if not zipfile.is_zipfile(file):
        return f'{path} is no checkpoint, or only the beginning of one.'
    try:
        check_sums(file)
        with zipfile.ZipFile(file) as archive:
            is_from_torch = any(name.endswith('data.pkl') for name in archive.namelist())
    except CheckpointError as error:
        return str(error).replace(str(file), str(path))
    if not is_from_torch:
        return f'{path} is an archive of another kind, no checkpoint.'
    try:
        content = load_safely(file, mmap=True)
    except Exception as error:
        why = reason(file, error)
        # Types of the user's own, which only Composer's loading accepts.
        return None if 'could run code' in why else f'{path} cannot be read: {why}'
    if not is_of_composer(content):
        return f'{path} was not saved by Composer: it has no state of a run. load_average() reads averages of others.'
    return None


def _damage_of_folder(folder: Path) -> str | None:
    """What is wrong with a sharded checkpoint."""
    if not is_sharded(folder):
        return f'{folder} is no sharded checkpoint, or one that was not written to its end.'
    check_folder(folder)
    return None
