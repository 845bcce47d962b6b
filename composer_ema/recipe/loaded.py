"""The checkpoint that a run will load, checked before anything is built."""

from __future__ import annotations

import os
import zipfile
from pathlib import Path
from typing import Any

from composer.utils import parse_uri
from composer.utils.file_helpers import BACKEND_TO_OBJECT_STORE_FACTORY
from composer.utils.misc import partial_format
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from composer_ema.checkpoints.inert_pickle import UnknownNamesError
from composer_ema.checkpoints.reading import is_of_composer
from composer_ema.checkpoints.safely import CheckpointError, check_sums, load_safely, reason
from composer_ema.checkpoints.sharded import check_folder, is_sharded
from composer_ema.recipe import parallelism
from composer_ema.recipe.arguments import Place, signature
from composer_ema.recipe.folders import folder_of_checkpoints
from composer_ema.recipe.on_rank_0 import on_rank_0
from composer_ema.recipe.schema import Plan
from composer_ema.recipe.trust import Trust
from composer_ema.run_folder import resuming
from composer_ema.run_folder.outputs import RECIPE_FILE
from composer_ema.run_folder.packed import unpacked
from composer_ema.run_folder.resuming import Found

# Of the addresses that Composer knows.
_SCHEMES = (*BACKEND_TO_OBJECT_STORE_FACTORY, 'AZURE_BLOBS', 'dbfs')


def check_loaded(checked: Plan, run_name: str) -> Found | None:
    """Refuses a missing or damaged checkpoint.

    Returns:
        On every rank, what autoresume goes on from; None where it is to go on from nothing on this machine's disks.

    Raises:
        RecipeError: At ``load_path`` or ``autoresume``, in every process.
    """
    # Rank 0 reads it through, which takes a while for a large one.
    return on_rank_0(lambda: _checked(checked, run_name))


def _checked(checked: Plan, run_name: str) -> Found | None:
    if checked.trainer.get('autoresume'):
        found = _to_resume(checked, run_name)
        if found is not None:
            return found
    place, given = checked.place / 'load_path', checked.trainer.get('load_path')
    if not given or checked.trainer.get('load_object_store') is not None:
        return None
    if '://' in given:
        scheme = given.partition('://')[0]
        if scheme not in _SCHEMES:
            raise place.error(
                f'Composer loads from {", ".join(_SCHEMES)} and from this machine, not from {scheme}://. Download it.'
            )
        return None
    path = Path(_formatted(given, run_name, place))
    if reason := _mismatch(path, checked):
        raise place.error(reason)
    if reason := damage(path, checked.trust):
        raise place.error(f'{reason} Load an earlier one.')
    _check_spelling(path, place)
    return None


def _formatted(given: str, run_name: str, place: Place) -> str:
    """The path that Composer loads: with the run's name and rank 0 in it."""
    try:
        return partial_format(given, run_name=run_name).format(rank=0, local_rank=0, node_rank=0)
    except (KeyError, ValueError, IndexError, AttributeError) as error:
        raise place.error(
            f'braces stand for {{run_name}} or {{rank}} in the path of a checkpoint, got {given!r}.'
        ) from error


def _check_spelling(path: Path, place: Place) -> None:
    """Refuses a path that Composer would take for another one, or for an address."""
    if parse_uri(str(path)) != ('', '', str(path)):
        raise place.error(
            f'Composer takes {str(path)!r} for an address on the net, because of its #, ?, ; or colon. Rename the '
            'folder or the file; a relative path with a colon may begin with ./ instead.'
        )


def _to_resume(checked: Plan, run_name: str) -> Found | None:
    place = checked.place / 'autoresume'
    if checked.trainer.get('save_folder', '') is None:
        raise place.error('goes on from what the run has saved, and save_folder: null saves nothing. Leave one out.')
    folder = folder_of_checkpoints(checked, run_name)
    if folder is None or not folder.has_any():
        return None
    now, before = checked.validation_split, _split_before(checked, run_name)
    if before is not None and before != now:
        raise (checked.place / 'data.validation_split').error(
            f'must stay {before}, with which this run began, got {now}, which holds out other samples: the run has '
            f'trained on some of them, or would. Write {before}, or start another run.'
        )
    try:
        found = resuming.find(folder, run_name, lambda path: damage(path, checked.trust))
    except resuming.CannotResumeError as error:
        raise place.error(str(error)) from error
    if found is not None:
        if reason := _mismatch(found.path, checked):
            raise place.error(reason)
        _check_spelling(found.path.absolute(), place)
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


def damage(path: Path, trust: Trust) -> str | None:
    """What is wrong with a checkpoint, as far as one can tell without unpickling it; None for a whole one.

    Args:
        path: Of the checkpoint.
        trust: What may be in it.
    """
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
            found = _damage_of_file(file, path, trust)
    except (OSError, CheckpointError) as error:
        found = str(error)
    # A damaged file fails in as many ways as there are bytes in it; all of them mean the same to the user.
    except Exception as error:
        found = f'{path} cannot be read: it is truncated or damaged ({type(error).__name__}).'
    return found.removesuffix(' Load an earlier checkpoint.') if found else None


def _led_astray(path: Path) -> str:
    return f' is a link to {os.readlink(path)}, which' if path.is_symlink() else ''


def _damage_of_file(file: Path, path: Path, trust: Trust) -> str | None:
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
    except UnknownNamesError as error:
        return None if trust.in_all else f'{path} cannot be read: {reason(file, error)} {trust.remedy(error.names)}'
    except Exception as error:
        return f'{path} cannot be read: {reason(file, error)}'
    if not is_of_composer(content):
        return f'{path} was not saved by Composer: it has no state of a run. load_average() reads averages of others.'
    return None


def _damage_of_folder(folder: Path) -> str | None:
    """What is wrong with a sharded checkpoint."""
    if not is_sharded(folder):
        return f'{folder} is no sharded checkpoint, or one that was not written to its end.'
    check_folder(folder)
    return None
