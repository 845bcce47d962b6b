"""Imports the files that a recipe names under ``code_paths``, so that it can name what they register.

This is the only key of a recipe that runs code besides the classes it names, and only commands that build something
from the recipe import the files.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from composer_ema.recipe import registry
from composer_ema.recipe.arguments import Place, check_value, said
from composer_ema.recipe.trouble import line_of
from composer_ema.wording import suggestion
from composer_ema.zoo import plugins
from composer_ema.zoo.plugins import Registered

KEY = 'code_paths'
log = logging.getLogger(__name__)
# The modules of ours by path, and the time at which their files were last changed.
_imported: dict[str, tuple[ModuleType, int]] = {}
_KINDS = {'datasets': 'data set', **{kind: kind[:-1] for kind in plugins.KINDS if kind != 'datasets'}}


def anchored(values: Mapping[str, Any], before: Any, raw: Any, folder: Path) -> dict[str, Any]:
    """The values of a recipe with absolute paths: a run is resumed and swept from anywhere.

    Args:
        values: Of the recipe, with overrides and interpolations.
        before: What the file has under ``code_paths``; such paths are relative to its folder.
        raw: The same after overrides, whose paths are relative to the current folder, and before interpolations.
        folder: Of the recipe's file.
    """
    paths = values.get(KEY)
    if not isinstance(paths, list) or not all(isinstance(path, str) for path in paths):
        return dict(values)  # for import_all() to refuse
    of_file = before if isinstance(before, list) else []
    written = raw if isinstance(raw, list) and len(raw) == len(paths) else paths
    found = [
        str(Path(os.path.abspath(folder if own in of_file else '.')) / path)
        for path, own in zip(paths, written, strict=True)
    ]
    return {**values, KEY: found}


def import_all(paths: Any, place: Place) -> tuple[list[str], list[str]]:
    """Imports files and packages, each once in a process unless it has changed, and hides what others have registered.

    Args:
        paths: The value of ``code_paths``.
        place: Its key.

    Returns:
        tuple: The absolute paths, and for each a sentence that says what it registers.

    Raises:
        RecipeError: A path leads to no file and no package, a file cannot be imported, or it registers what has a name
            already.
    """
    found = [Path(os.path.abspath(path)) for path in check_value(list[str], paths or [], place)]
    names = [str(path) for path in found]
    if plugins.shown() == tuple(names) and all(map(_is_current, found)):
        return names, [_in_words(path) for path in found]
    plugins.show_only([])
    for index, path in enumerate(found):
        _import(path, place / index)
        _check_names(plugins.registered_by(str(path)) or [], place / index)
        plugins.show_only(names[: index + 1])
    return names, [_in_words(path) for path in found]


def _in_words(path: Path) -> str:
    own = plugins.registered_by(str(path)) or []
    names = ', '.join(f'{_KINDS[each.kind]} {each.name}' for each in own)
    return f'{KEY}: {path} is imported, which registers {names or "nothing"}'


def _import(path: Path, place: Place) -> None:
    file = _file_of(path, place)
    if _is_current(path):
        return
    name = _module_name(path, file, place)
    log.info('importing %s, which the recipe names under %s', path, KEY)
    spec = importlib.util.spec_from_file_location(
        name, file, submodule_search_locations=[str(path)] if path.is_dir() else None
    )
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    if (folder := str(path.parent)) not in sys.path:
        sys.path.append(folder)  # behind all others: what lies beside the file can be imported, and hides nothing
    before, sys.modules[name] = sys.modules.get(name), module  # under its name, for pickle and worker processes
    try:
        with plugins.registering(str(path)):
            spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:  # it is anybody's
        if before is None:
            del sys.modules[name]
        else:
            sys.modules[name] = before
        where = line_of(error)
        raise place.error(f'{path} cannot be imported: {type(error).__name__}: {said(error)}{where}') from error
    _imported[str(path)] = module, file.stat().st_mtime_ns


def _is_current(path: Path) -> bool:
    """Whether a path has been imported in this process and its file has not changed since."""
    _, at = _imported.get(str(path), (None, None))
    file = path / '__init__.py' if path.is_dir() else path
    return at is not None and file.is_file() and file.stat().st_mtime_ns == at


def _file_of(path: Path, place: Place) -> Path:
    file = path / '__init__.py' if path.is_dir() else path
    if path.is_dir() and not file.is_file():
        raise place.error(f'{path} is a folder without an __init__.py. Name its files, or make it a package.')
    if not file.is_file():
        beside = sorted(str(each) for each in path.parent.glob('*.py'))
        remedy = suggestion(path.name, beside, f'Files in {path.parent}:') if beside else ''
        raise place.error(
            f'there is no file {path}. A path in a recipe is relative to the folder of its file, one in an override to '
            f'the current folder. {remedy}'.rstrip()
        )
    if file.suffix != '.py':
        raise place.error(f'{path} is no Python file: its name does not end in .py. Name one, or a package.')
    return file


def _module_name(path: Path, file: Path, place: Place) -> str:
    """The name of the module: that of the file, unless an import of that name would find another one."""
    name = path.stem
    if not name.isidentifier():
        raise place.error(f'{path.name} cannot be the name of a module. Rename it, as in my_code.py.')
    if any(module is sys.modules.get(name) for module, _ in _imported.values()):
        return name  # of another recipe in this process, or of this file before it was changed
    loaded = sys.modules.get(name)
    spec = importlib.util.find_spec(name) if loaded is None else loaded.__spec__
    origin = getattr(loaded, '__file__', None) if spec is None else spec.origin
    if (loaded is not None or spec is not None) and (origin is None or Path(origin).resolve() != file.resolve()):
        raise place.error(f'{path.name} has the name of the module {name} ({origin}), which others import. Rename it.')
    return name


def _check_names(own: Sequence[Registered], place: Place) -> None:
    """Refuses names that a recipe without this file has already, those of torch's and Composer's classes included."""
    for each in own:
        known = getattr(registry, each.kind)()
        if known.canonical(each.name) is not None:
            raise place.error(
                f'{each.where} registers the {_KINDS[each.kind]} {each.name!r}, and there is one of that name. Give it '
                'another.'
            )
