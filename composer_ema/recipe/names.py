"""Names of runs and files in a recipe: legal on a disk, under the folder they belong to, and what Composer fills in."""

from __future__ import annotations

import inspect
import os
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from string import Formatter
from typing import Any

from composer import Trainer

from composer_ema.recipe.arguments import Place, RecipeError
from composer_ema.wording import suggestion

#: What Composer fills into a path, in braces.
OF_PROCESS = ('run_name', 'rank', 'local_rank', 'world_size', 'local_world_size', 'node_rank')
#: What it also fills into the name of a checkpoint.
OF_TIME = ('epoch', 'batch', 'batch_in_epoch', 'sample', 'sample_in_epoch', 'token', 'token_in_epoch', 'total_wct')
OF_TIME += ('epoch_wct', 'batch_wct')
#: How long a part of a run name may be, in bytes; disks take 255, and names of files get endings.
MOST_BYTES = 200
_CHECKPOINT: str = inspect.signature(Trainer).parameters['save_filename'].default
# What is filled in and is no whole number.
_EXAMPLES: dict[str, Any] = {'run_name': 'name', 'total_wct': 0.0, 'epoch_wct': 0.0, 'batch_wct': 0.0}
_WIDTH = re.compile(r'0?\d{0,2}(\.\d{1,2})?[dfgs]?')
_PLACEHOLDER = re.compile(r'\{[^{}]*\}')
#: What to check of algorithms, callbacks and loggers, by name.
_FOLDERS = {
    'checkpoint_saver': {'folder': OF_PROCESS, 'filename': OF_PROCESS + OF_TIME, 'latest_filename': OF_PROCESS},
    'file_logger': {'filename': OF_PROCESS},
    'load_checkpoint': {'load_path': OF_PROCESS},
}
#: The arguments of the Trainer that are paths, and what may be filled in.
_PATHS = {
    'save_folder': OF_PROCESS,
    'save_filename': OF_PROCESS + OF_TIME,
    'save_latest_filename': OF_PROCESS,
    'load_path': OF_PROCESS,
}


def check_run_name(name: str, place: Place) -> None:
    """Checks the name of a run: the name of its folder, under the runs folder. A slash makes subfolders.

    Raises:
        RecipeError: It is empty, leads out of the runs folder, is too long, or holds what Composer would replace or a
            terminal would not show.
    """
    remedy = 'Write a name such as run_name=first.'
    if not name.isprintable():
        raise place.error(f'{name!r} holds characters that cannot be seen. {remedy}')
    if '{' in name or '}' in name:
        raise place.error(f'{name!r} holds a brace, between which Composer fills in what it knows. {remedy}')
    for part in name.split('/'):
        if part in ('', '.', '..') or part.startswith('~'):
            raise place.error(
                f'{name!r} is no name of a folder under runs_folder, where a run stays: a part of it is {part!r}. '
                f'{remedy} For another place, give runs_folder.'
            )
        if part != part.strip():
            raise place.error(f'{name!r} has spaces at its beginning or its end. {remedy}')
        if (size := len(part.encode())) > MOST_BYTES:
            raise place.error(f'{name!r} has {size} bytes, and a name at most {MOST_BYTES}. {remedy}')


def check_inside(folder: Path, runs_folder: Path, place: Place) -> None:
    """Refuses a run folder that a link on the way takes out of the runs folder.

    Args:
        folder: Where the run is to lie.
        runs_folder: What it is to lie under; may itself be a link.
        place: The key to blame.

    Raises:
        RecipeError: It lies elsewhere.
    """
    actual = folder.resolve()
    if not actual.is_relative_to(runs_folder.resolve()):
        raise place.error(
            f'{folder} leads to {actual}, out of {runs_folder}, where a run stays. Give another run_name, or '
            f'runs_folder={actual.parent}.'
        )


def check_paths(given: Mapping[str, Any], place: Place) -> None:
    """Checks the paths among the arguments of the Trainer.

    Raises:
        RecipeError: One is empty, begins with ``~``, holds a placeholder that Composer does not fill in, or leads out
            of the folder of the checkpoints.
    """
    for key, legal in _PATHS.items():
        if given.get(key) is not None:
            check_path(given[key], place / key, legal)
    for key in ('save_filename', 'save_latest_filename'):
        name = given.get(key) or ''
        if '..' in name.split('/'):  # Composer takes a slash at the beginning off
            raise (place / key).error(
                f'{name!r} leads out of save_folder, where checkpoints lie. Give another of these.'
            )
    filename = given.get('save_filename', _CHECKPOINT)
    overwrites = given.get('save_overwrite') or given.get('autoresume')
    if not overwrites and not set(_placeholders(filename)) & set(OF_TIME):
        raise (place / 'save_filename').error(
            f'{filename!r} is the same for every checkpoint, so that only the first can be written. Add {{batch}}, or '
            'write save_overwrite: true to keep the last.'
        )
    latest = given.get('save_latest_filename')
    if latest is not None and re.fullmatch(_pattern(filename), _PLACEHOLDER.sub('0', latest)):
        raise (place / 'save_latest_filename').error(
            f'{latest!r} may be the name of a checkpoint, {filename}, in whose place a link would be put. Write '
            'latest-rank{rank}.pt.'
        )


def check_folders(name: str, given: Mapping[str, Any], place: Place) -> None:
    """Checks the paths among the arguments of an algorithm, a callback or a logger.

    Raises:
        RecipeError: As for :func:`check_path`.
    """
    for key, legal in _FOLDERS.get(name, {}).items():
        if isinstance(given.get(key), str):
            check_path(given[key], place / key, legal)
    snapshots = given.get('snapshots')
    if isinstance(snapshots, Mapping) and isinstance(snapshots.get('folder'), str):
        check_path(snapshots['folder'], place / 'snapshots' / 'folder', OF_PROCESS)


def check_path(path: str, place: Place, legal: Collection[str] = ()) -> None:
    """Checks a path to a file or a folder.

    Args:
        path: What the recipe gives.
        place: Its key.
        legal: What Composer fills in between braces. Default: nothing, and no braces.

    Raises:
        RecipeError: It is empty, begins with ``~``, or holds other placeholders.
    """
    if not path.strip():
        raise place.error(f'must be a path, got {path!r}. Write . for this folder, or null for none.')
    if path.split('/')[0].startswith('~'):
        raise place.error(
            f'{path!r} begins with ~, which only a shell replaces by a folder. Write {os.path.expanduser(path)}.'
        )
    try:
        found = _placeholders(path)
        for each in found:
            if each not in legal:
                raise place.error(
                    f'{path!r} holds {{{each}}}, which nothing fills in. {suggestion(each, legal, "Legal names are")}'
                )
        path.format(**{each: _EXAMPLES.get(each, 0) for each in legal})  # {run_name:06d} has another fault
    except (ValueError, IndexError, KeyError, AttributeError) as error:
        if isinstance(error, RecipeError):
            raise
        raise place.error(f'{path!r} is no path: {error}. Write {_listed(legal)}.') from error


def _placeholders(path: str) -> list[str]:
    """The names between braces, with what stands behind them there unless it is a width, as in ``{batch:06d}``."""
    found = []
    for _, name, how, conversion in Formatter().parse(path):
        if name is not None:
            is_width = not conversion and _WIDTH.fullmatch(how or '')
            found.append(name if is_width else name + (f'!{conversion}' if conversion else '') + f':{how}')
    return found


def _pattern(filename: str) -> str:
    """A regular expression for the names of checkpoints."""
    literals = (re.escape(literal) for literal in _PLACEHOLDER.split(filename))
    return '.+'.join(literals)


def _listed(legal: Collection[str]) -> str:
    return f'no more than {", ".join(f"{{{each}}}" for each in legal)}' if legal else 'it without braces'
