"""What installed packages offer to recipes, read from their entry points; nothing is imported before it is used.

A package offers a data set, a model or a callback by one line in its metadata, as this package does in its setup.cfg::

    [options.entry_points]
    composer_ema.datasets =
        rings = rings.data:rings
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from composer_ema.wording import squash

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
    """

    def __init__(self, points: Collection[EntryPoint], families: Collection[EntryPoint] = ()) -> None:
        self._points: dict[str, list[EntryPoint]] = {}
        for point in points:
            self._points.setdefault(point.name, []).append(point)
        self._families = list(families)
        self._loaded: dict[str, Any] = {}

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
        return iter(dict.fromkeys([*self._points, *self._members]))

    def __len__(self) -> int:
        return len(list(iter(self)))

    def __contains__(self, name: object) -> bool:
        return name in self._points or self._family_of(str(name)) is not None

    @property
    def single(self) -> list[str]:
        """The names of single plug-ins, which are known without an import."""
        return list(self._points)

    @property
    def broken(self) -> list[str]:
        """Families that cannot be imported, a sentence each."""
        return [each for each in self._imported_families if isinstance(each, str)]

    def origin(self, name: str) -> str:
        """Which package offers a single plug-in, in words."""
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


@functools.cache
def plugins(kind: str) -> Plugins:
    """What all installed packages offer of one of the :data:`KINDS`; their metadata are read once per process."""
    assert kind in KINDS
    return Plugins(entry_points(group=f'composer_ema.{kind}'), entry_points(group=f'composer_ema.{kind}_families'))


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
