"""The folders that a recipe asks for: that of its run, taken or only looked at, and that of its checkpoints."""

from __future__ import annotations

import inspect
import re
from pathlib import Path, PurePosixPath
from typing import Any

from composer import Trainer
from composer.utils import FSDPConfig, format_name_with_dist

from composer_ema.recipe import parallelism
from composer_ema.recipe.arguments import RecipeError
from composer_ema.recipe.on_rank_0 import on_rank_0
from composer_ema.recipe.schema import Plan
from composer_ema.run_folder.folder import RunFolder
from composer_ema.run_folder.lock import InUseError, Lock
from composer_ema.run_folder.outputs import CHECKPOINT_FOLDER
from composer_ema.run_folder.save_folder import SaveFolder

# Others may remove an empty folder, or take a name, between our look and our step.
_TRIES = 100
_DEFAULTS = {name: each.default for name, each in inspect.signature(Trainer).parameters.items()}


def take(checked: Plan) -> RunFolder:
    """Takes the folder that a recipe names, or the next free one of a recipe without a run name.

    Without a name it is that of the recipe's file with the first free number: ``fashion_mnist``, then
    ``fashion_mnist-2``, ``fashion_mnist-3``, ... as such folders exist. Autoresume takes the last one that holds a
    checkpoint, or the last one if none does.

    Returns:
        RunFolder: On every rank the one that rank 0 has taken.

    Raises:
        RecipeError: On every rank: another process works in the folder, it holds a run that the recipe neither
            continues nor replaces, or it cannot be made.
    """
    held: list[RunFolder] = []

    def take_on_rank_0() -> str:
        held.append(_next_free(checked) if _counts(checked) else _named(checked, _own_name(checked)))
        try:
            _check_not_taken(checked, held[0])
        except BaseException:
            held[0].release()
            raise
        return held[0].name

    name = on_rank_0(take_on_rank_0)
    if held:
        return held[0]
    path = Path(checked.runs_folder) / name
    return RunFolder(name, path, made=_missing(path))  # Composer makes folders on every machine


def look(checked: Plan) -> RunFolder:
    """The folder that :func:`take` would take, for a run that writes nothing: no lock, and no file."""
    name = on_rank_0(lambda: _numbered(checked, _next_number(checked)) if _counts(checked) else _own_name(checked))
    return RunFolder(name, Path(checked.runs_folder) / name)


def folder_of_checkpoints(checked: Plan, run_name: str) -> SaveFolder | None:
    """Where Composer puts the checkpoints of a run; None for one that saves nothing, or saves in an object store.

    Raises:
        RecipeError: ``save_filename`` is no format string.
    """
    given = checked.trainer
    in_run_folder = str(Path(checked.runs_folder) / run_name / CHECKPOINT_FOLDER)
    folder = given.get('save_folder', in_run_folder)
    if not folder or '://' in folder:
        return None
    latest = given.get('save_latest_filename', _DEFAULTS['save_latest_filename'])
    filename = str(given.get('save_filename', _DEFAULTS['save_filename']))
    path = Path(format_name_with_dist(folder, run_name))
    sharded = str(PurePosixPath(filename).parent / _prefix_of_folders(given.get(parallelism.KEY)))
    try:
        return SaveFolder.named(
            path,
            [filename, sharded],
            run_name,
            latest=path / format_name_with_dist(latest, run_name).lstrip('/') if latest else None,
            is_own='save_folder' not in given or '{run_name}' in folder,
        )
    except ValueError as error:
        raise (checked.place / 'save_filename').error(
            f"is no format string: {error}, got {filename!r}. Write one as in 'ep{{epoch}}-ba{{batch}}.pt'."
        ) from error


def _prefix_of_folders(section: Any) -> str:
    """What Composer calls the folder of a sharded checkpoint."""
    own = section.get('fsdp') if isinstance(section, dict) else None
    return (own or {}).get('sharded_ckpt_prefix_dir') or FSDPConfig.sharded_ckpt_prefix_dir


# On rank 0


def _counts(checked: Plan) -> bool:
    """Whether the run takes a new number: it has no name, and goes on with none."""
    return checked.recipe.run_name is None and not checked.trainer.get('autoresume')


def _own_name(checked: Plan) -> str:
    if checked.recipe.run_name is not None:
        return checked.recipe.run_name
    names = [_numbered(checked, number) for number in sorted({1, *_numbers(checked)}, reverse=True)]
    return next((name for name in names if _holds_checkpoint(checked, name)), names[0])


def _holds_checkpoint(checked: Plan, run_name: str) -> bool:
    folder = folder_of_checkpoints(checked, run_name)
    return folder is not None and folder.has_any()


def _named(checked: Plan, name: str) -> RunFolder:
    path = Path(checked.runs_folder) / name
    for _ in range(_TRIES):
        made = _missing(path)
        try:
            path.mkdir(parents=True, exist_ok=True)
            return RunFolder(name, path, Lock(path), made)
        except FileNotFoundError:  # a start that was refused has removed it
            continue
        except InUseError as error:
            raise (checked.place / 'run_name').error(f'{error} Wait for its end, or give another run_name.') from error
        except OSError as error:
            raise _unusable(checked, path, error) from error
    raise _unusable(checked, path, OSError('it is removed again and again'))


def _next_free(checked: Plan) -> RunFolder:
    runs = Path(checked.runs_folder)
    for _ in range(_TRIES):
        name = _numbered(checked, _next_number(checked))
        path = runs / name
        made = _missing(path)
        try:
            runs.mkdir(parents=True, exist_ok=True)
            path.mkdir()  # of two processes only one makes it
            return RunFolder(name, path, Lock(path), made)
        except (FileNotFoundError, InUseError):  # removed by a start that was refused; taken under its name
            continue
        except FileExistsError as error:
            if not runs.is_dir():
                raise _unusable(checked, path, error) from error
        except OSError as error:
            raise _unusable(checked, path, error) from error
    raise _unusable(checked, runs, OSError('others take each free name first'))


def _check_not_taken(checked: Plan, folder: RunFolder) -> None:
    continues = any(checked.trainer.get(key) for key in ('autoresume', 'load_path', 'save_overwrite'))
    if folder.is_taken and not continues:
        raise (checked.place / 'run_name').error(
            f'{folder.path} already holds a run. Continue it with autoresume=true, replace it with '
            'save_overwrite=true, or give another run_name.'
        )


def _unusable(checked: Plan, path: Path, error: OSError) -> RecipeError:
    in_the_way = next((each for each in (path, *path.parents) if each.is_file()), None)
    place = checked.place / 'runs_folder'
    if in_the_way is not None:
        return place.error(f'{in_the_way} is a file, and the run is to lie in {path}. Give another.')
    return place.error(f'{path} cannot be written to: {error.strerror or error}. Give another.')


def _numbered(checked: Plan, number: int) -> str:
    return checked.recipe.name if number == 1 else f'{checked.recipe.name}-{number}'


def _next_number(checked: Plan) -> int:
    return max(_numbers(checked), default=0) + 1


def _numbers(checked: Plan) -> list[int]:
    folder = Path(checked.runs_folder)
    taken = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    found = (re.fullmatch(rf'{re.escape(checked.recipe.name)}(?:-(\d+))?', name) for name in taken)
    return [int(match[1] or 1) for match in found if match]


def _missing(path: Path) -> tuple[Path, ...]:
    """The folders of a run at ``path`` that do not exist yet, innermost first."""
    return tuple(each for each in (path / CHECKPOINT_FOLDER, path, *path.parents) if not each.exists())
