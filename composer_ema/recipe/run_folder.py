"""The folder of a run: its name, who works in it, and when its files are replaced.

Invariant: until :meth:`RunFolder.begin` nothing in the folder changes but the lock file; a run that is refused before
leaves every file as it was, and no folder of its own.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from composer.utils import dist

from composer_ema.files import write_beside
from composer_ema.recipe.arguments import RecipeError
from composer_ema.recipe.lock import InUseError, Lock
from composer_ema.recipe.outputs import CHECKPOINT_FOLDER, METRICS_FILE, RECIPE_FILE
from composer_ema.recipe.save_folder import SaveFolder
from composer_ema.recipe.schema import Plan

Result = TypeVar('Result')

# Others may remove an empty folder, or take a name, between our look and our step.
_TRIES = 100


class RunFolder:
    """The folder of a run, taken by this process group until :meth:`release`. Rank 0 holds its lock.

    Args:
        path: The folder; its name is the run's.
        lock: Its lock on rank 0 of a run that writes, else None.
        made: What was made for this run, innermost first; :meth:`release` removes what is still empty. Default: none.

    Attributes:
        name: The run's name.
        recipe: The recipe in YAML, which :meth:`begin` writes; set before training starts.
    """

    def __init__(self, name: str, path: Path, lock: Lock | None = None, made: tuple[Path, ...] = ()) -> None:
        self.name, self.path = name, path
        self.recipe: str | None = None
        self._lock, self._made = lock, made

    @property
    def metrics(self) -> Path:
        """The file of the run's metrics."""
        return self.path / METRICS_FILE

    @property
    def is_taken(self) -> bool:
        """Whether it holds what a run has left."""
        metrics = self.metrics
        return (metrics.exists() and metrics.stat().st_size > 0) or any((self.path / CHECKPOINT_FOLDER).glob('*'))

    def begin(self) -> None:
        """Replaces the recipe in the folder by the run's: its first batch has been trained.

        Raises:
            OSError: It cannot be written. The old one is untouched.
        """
        self._made = ()
        if self.recipe is not None:
            write_beside(self.path / RECIPE_FILE, self.recipe)

    def keep(self) -> None:
        """Takes the folder again if somebody has removed or renamed it, or has removed its lock file.

        Raises:
            InUseError: Another process has taken it since.
            OSError: It cannot be made again.
        """
        if self._lock is not None:
            self._lock.keep()

    def release(self) -> None:
        """Gives the folder back, without the empty folders of a run that never began."""
        if self._lock is not None:
            self._lock.release()
        for folder in self._made:
            with contextlib.suppress(OSError):  # it holds something
                folder.rmdir()
        self._made = ()


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


def on_rank_0(do: Callable[[], Result]) -> Result:
    """Returns on every rank what ``do`` returns on rank 0, or raises on every rank the RecipeError that it raises."""
    outcome: list[Any] = [None, None]
    if dist.get_global_rank() == 0:
        try:
            outcome[0] = do()
        except RecipeError as error:
            outcome[1] = error
    dist.broadcast_object_list(outcome)
    result, error = outcome
    if error is not None:
        raise error
    return result


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
    folder = SaveFolder.of(checked, run_name)
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
