"""The checkpoint that a run will load, checked before anything is built."""

from __future__ import annotations

import inspect
import zipfile
from pathlib import Path
from typing import Any

from composer import Trainer
from composer.utils import dist, format_name_with_dist
from composer.utils.compression import is_compressed_pt
from composer.utils.file_helpers import is_tar
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from composer_ema.checkpoints.reading import is_of_composer
from composer_ema.checkpoints.safely import CheckpointError, check_sums, load_safely
from composer_ema.checkpoints.sharded import is_sharded, open_folder
from composer_ema.recipe import parallelism
from composer_ema.recipe.arguments import signature
from composer_ema.recipe.outputs import CHECKPOINT_FOLDER, RECIPE_FILE
from composer_ema.recipe.schema import Plan

_DEFAULT_LATEST = inspect.signature(Trainer).parameters['save_latest_filename'].default


def latest_checkpoint(checked: Plan, run_name: str) -> Path | None:
    """The file that autoresume loads for a run of this name; None where there is none on this machine's disks."""
    in_run_folder = str(Path(checked.runs_folder) / run_name / CHECKPOINT_FOLDER)
    folder = checked.trainer.get('save_folder', in_run_folder)
    latest = checked.trainer.get('save_latest_filename', _DEFAULT_LATEST)
    if not folder or not latest or '://' in folder:
        return None
    path = Path(format_name_with_dist(folder, run_name), format_name_with_dist(latest, run_name))
    return path if path.exists() else None


def check_loaded(checked: Plan, run_name: str) -> None:
    """Refuses a missing or damaged checkpoint.

    Raises:
        RecipeError: At ``load_path`` or ``autoresume``, in every process.
    """
    complaint: list[Any] = [None]
    # Rank 0 reads it through, which takes a while for a large one; then all processes raise the same error.
    if dist.get_global_rank() == 0:
        complaint[0] = _complaint(checked, run_name)
    dist.broadcast_object_list(complaint)
    if complaint[0] is not None:
        key, message = complaint[0]
        raise (checked.place / key).error(message)


def _complaint(checked: Plan, run_name: str) -> tuple[str, str] | None:
    """The key to blame and why; None for a sound checkpoint, for none, and for one that only Composer can judge."""
    latest = latest_checkpoint(checked, run_name) if checked.trainer.get('autoresume') else None
    given = checked.trainer.get('load_path')
    if latest is not None:
        now, before = checked.validation_split, _split_before(checked, run_name)
        if before is not None and before != now:
            return 'data.validation_split', (
                f'must stay {before}, with which this run began, got {now}, which holds out other samples: the run has '
                f'trained on some of them, or would. Write {before}, or start another run.'
            )
        if reason := _mismatch(latest, checked):
            return 'autoresume', reason
        reason = _damage(latest)
        remedy = 'To do so, give load_path=... and leave autoresume out.'
        return ('autoresume', f'{reason} {remedy}') if reason else None
    if not given or '://' in given or '{' in given or checked.trainer.get('load_object_store') is not None:
        return None
    reason = _mismatch(Path(given), checked) or _damage(Path(given))
    return ('load_path', reason) if reason else None


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


def _damage(path: Path) -> str | None:
    """What is wrong with a checkpoint, as far as one can tell without unpickling it."""
    if not path.exists():
        return f'there is no file {path}.'
    if path.is_dir():
        return _damage_of_folder(path)
    # Archives and links to remote files.
    if is_tar(path) or is_compressed_pt(str(path)) or path.suffix == '.symlink':
        return None
    # torch.save writes a zip archive; its directory comes last, so a truncated file has none.
    if not zipfile.is_zipfile(path):
        return f'{path} is no checkpoint, or only the beginning of one. Load an earlier one.'
    try:
        check_sums(path)
    except CheckpointError as error:
        return str(error)
    with zipfile.ZipFile(path) as archive:
        is_from_torch = any(name.endswith('data.pkl') for name in archive.namelist())
    if not is_from_torch:
        return f'{path} is an archive of another kind, no checkpoint.'
    try:
        content = load_safely(path, mmap=True)
    except Exception:  # it holds types of the user's own, which only Composer's loading accepts
        return None
    if not is_of_composer(content):
        return f'{path} was not saved by Composer: it has no state of a run. load_average() reads averages of others.'
    return None


def _damage_of_folder(folder: Path) -> str | None:
    """What is wrong with the index of a sharded checkpoint; its tensors are not read."""
    if not is_sharded(folder):
        return f'{folder} is no sharded checkpoint, or one that was not written to its end. Load an earlier one.'
    try:
        open_folder(folder)
    except CheckpointError as error:
        return f'{error} Load an earlier one.'
    return None
