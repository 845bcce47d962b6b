"""What installed packages and a user's own code offer to recipes; no package is imported before it is used.

A package offers a data set, a model or a callback by one line in its metadata, as this package does in its setup.cfg::

    [options.entry_points]
    composer_ema.datasets =
        rings = rings.data:rings

A file that a recipe names under ``code_paths`` registers what it offers; see :mod:`composer_ema.zoo.registering`.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points
from typing import Any, TypeVar

from composer_ema.wording import squash

T = TypeVar('T')

#: What can be offered. The group of entry points is ``composer_ema.<kind>``, that of families one with ``_families``.
KINDS = ('datasets', 'models', 'callbacks', 'algorithms', 'loggers', 'optimizers', 'schedulers')


class PluginError(ValueError):
    """An entry point that cannot be used: which one, of which package, and why."""


@dataclass(frozen=True)
class Family:
    """Many plug-ins under one entry point, of the group ``composer_ema.<kind>_families``.

    Args:
        names: Returns the names of all. Of a family with a prefix it is not asked: to list them may take seconds.
        find: From a name to the class or function. With a prefix it raises a :class:`PluginError` for a wrong name.
        prefix: What all names begin with, and those of no other plug-in. Default: nothing.
    """

    names: Callable[[], Collection[str]]
    find: Callable[[str], Any]
    prefix: str = ''


class Plugins(Mapping[str, Any]):
    """The plug-ins of one kind by name. A look-up imports only what it finds, so a broken one disturbs no other.

    Families are imported only for a name that no single plug-in has, and to list all names.

    Args:
        points: Entry points of single plug-ins.
        families: Entry points of families.
        own: What a user's code has registered.
    """

    def __init__(
        self,
        points: Collection[EntryPoint],
        families: Collection[EntryPoint] = (),
        own: Mapping[str, Registered] | None = None,
    ) -> None:
        self._points: dict[str, list[EntryPoint]] = {}
        for point in points:
            self._points.setdefault(point.name, []).append(point)
        self._families = list(families)
        self._own = dict(own or {})
        self._loaded: dict[str, Any] = {name: each.value for name, each in self._own.items()}

    def __getitem__(self, name: str) -> Any:
        """The class or function of that name.

        Raises:
            KeyError: There is none.
            PluginError: Its package cannot be imported, or two packages offer this name.
        """
        if name not in self._loaded:
            self._loaded[name] = self._load(name)
        return self._loaded[name]

    def __iter__(self) -> Iterator[str]:
        return iter(dict.fromkeys([*self._own, *self._points, *self._members]))

    def __len__(self) -> int:
        return len(list(iter(self)))

    def __contains__(self, name: object) -> bool:
        return name in self._own or name in self._points or self._family_of(str(name)) is not None

    @property
    def single(self) -> list[str]:
        """The names of single plug-ins, which are known without an import."""
        return [*self._own, *self._points]

    @property
    def broken(self) -> list[str]:
        """Families that cannot be imported, a sentence each."""
        return [each for each in self._imported_families if isinstance(each, str)]

    def origin(self, name: str) -> str:
        """Which package or which line of the user's offers a single plug-in, in words."""
        if name in self._own:
            return str(self._own[name])
        return _origin(self._points[name][0]) if name in self._points else name

    def _load(self, name: str) -> Any:
        points = self._points.get(name)
        if points is None:
            family = self._family_of(name)
            if family is None:
                raise KeyError(name)
            return family.find(name)
        points = [each for other in self._points if squash(other) == squash(name) for each in self._points[other]]
        if len(points) > 1:
            both = ' and '.join(map(_origin, points))
            raise PluginError(f'{both} have the same name. Uninstall one of the packages.')
        return _import(points[0])

    def _family_of(self, name: str) -> Family | None:
        prefixed = (each for each in self._sound_families if each.prefix and name.startswith(each.prefix))
        return next(prefixed, None) or self._members.get(name)

    @functools.cached_property
    def _members(self) -> dict[str, Family]:
        return {name: family for family in self._sound_families if not family.prefix for name in family.names()}

    @property
    def _sound_families(self) -> list[Family]:
        return [each for each in self._imported_families if isinstance(each, Family)]

    @functools.cached_property
    def _imported_families(self) -> list[Family | str]:
        """Each family, or what is wrong with it."""
        found: list[Family | str] = []
        for point in self._families:
            try:
                family = _import(point)
                found.append(family if isinstance(family, Family) else f'{_origin(point)} is no Family of plug-ins.')
            except PluginError as error:
                found.append(str(error))
        return found


@dataclass(frozen=True)
class Registered:
    """One thing that a user's own code has registered.

    Args:
        kind: One of :data:`KINDS`.
        name: Its name in a recipe.
        value: The class or function.
        where: The line that registers it.
    """

    kind: str
    name: str
    value: Any
    where: str

    def __str__(self) -> str:
        return f'{self.name}, which {self.where} registers,'


class _Own:
    """What the user's own code has registered: outside of any file, and by each file of ``code_paths``."""

    def __init__(self) -> None:
        self.everywhere: list[Registered] = []
        self.by_file: dict[str, list[Registered]] = {}
        self.shown: tuple[str, ...] = ()
        self.importing: str | None = None
        self.changes = 0

    def visible(self) -> list[Registered]:
        files = [*self.shown, *([] if self.importing is None else [self.importing])]
        return [*self.everywhere, *(each for file in dict.fromkeys(files) for each in self.by_file.get(file, []))]


_own = _Own()


def register(found: Registered) -> None:
    """Lets recipes name one more thing.

    Raises:
        ValueError: Something of that kind has the name already.
    """
    taken = [each for each in _own.visible() if each.kind == found.kind and squash(each.name) == squash(found.name)]
    if taken and not _is_same(taken[0], found):
        raise ValueError(
            f'{found.where} registers {found.name!r}, and so does {taken[0].where}. Give one another name.'
        )
    at = next((point for point in _entry_points(found.kind) if squash(point.name) == squash(found.name)), None)
    if at is not None:
        raise ValueError(
            f'{found.where} registers {found.name!r}, and {_origin(at)} has that name. Give it another one.'
        )
    own = _own.everywhere if _own.importing is None else _own.by_file[_own.importing]
    own[:] = [each for each in own if each not in taken]
    own.append(found)
    _own.changes += 1


@contextlib.contextmanager
def registering(file: str) -> Iterator[None]:
    """What is registered in this context is that file's: recipes see it where they name the file."""
    before, _own.importing = _own.importing, file
    _own.by_file[file] = []
    try:
        yield
    except BaseException:
        del _own.by_file[file]
        raise
    finally:
        _own.importing = before
        _own.changes += 1


def registered_by(file: str) -> list[Registered] | None:
    """What a file has registered; None for one that has not been imported."""
    return _own.by_file.get(file)


def shown() -> tuple[str, ...]:
    """The files whose names recipes see."""
    return _own.shown


def show_only(files: Sequence[str]) -> None:
    """Hides what other files than these have registered: two recipes may name different files with the same names."""
    if tuple(files) != _own.shown:
        _own.shown = tuple(files)
        _own.changes += 1


def until_registered(make: Callable[[], T]) -> Callable[[], T]:
    """Keeps what ``make`` returns, as functools.cache, until something else is registered or shown."""
    kept = functools.lru_cache(maxsize=1)(lambda changes: make())
    return functools.wraps(make)(lambda: kept(_own.changes))


def plugins(kind: str) -> Plugins:
    """What all installed packages, and the user's own code, offer of one of the :data:`KINDS`."""
    assert kind in KINDS
    return _plugins(kind, _own.changes)


@functools.lru_cache(maxsize=len(KINDS))
def _plugins(kind: str, changes: int) -> Plugins:
    own = {each.name: each for each in _own.visible() if each.kind == kind}
    return Plugins(_entry_points(kind), _entry_points(f'{kind}_families'), own)


@functools.cache
def _entry_points(kind: str) -> list[EntryPoint]:
    """Those of a group; the metadata of the installed packages are read once per process."""
    return list(entry_points(group=f'composer_ema.{kind}'))


def _is_same(before: Registered, now: Registered) -> bool:
    """Whether a cell of a notebook was run once more."""
    names = [
        (getattr(each.value, '__module__', None), getattr(each.value, '__qualname__', None)) for each in (before, now)
    ]
    return names[0] == names[1] and before.name == now.name and '<' not in str(names[0][1]) and _own.importing is None


def _import(point: EntryPoint) -> Any:
    try:
        return point.load()
    except Exception as error:  # a package of others may raise anything
        raise PluginError(
            f'{_origin(point)} cannot be imported: {type(error).__name__}: {error}. Repair or uninstall the package.'
        ) from error


def _origin(point: EntryPoint) -> str:
    package = f'{point.dist.name} {point.dist.version}' if point.dist is not None else 'an unknown package'
    return f'{point.name} = {point.value}, which {package} registers under {point.group},'
