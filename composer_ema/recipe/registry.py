"""The names that a recipe can use: what the user registers and packages offer, then all of Composer and torch.

This package registers its own data sets, models, callbacks and algorithms by entry points, as any other package does.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import composer.algorithms
import composer.callbacks
import composer.loggers
import composer.optim
import torch
from composer.core import Algorithm, Callback
from composer.loggers import LoggerDestination
from composer.optim import ComposerScheduler
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.optim.swa_utils import SWALR

from composer_ema.wording import snake_case, squash
from composer_ema.zoo.plugins import PluginError, Plugins, plugins, until_registered

_SUFFIXES = ('callback', 'logger', 'scheduler')


@dataclass(frozen=True)
class Registry:
    """Classes or functions of one kind by name; case, ``_`` and ``-`` make no difference.

    Args:
        kind: What they are, for messages: ``'algorithm'``.
        classes: Canonical name to class or function. Looking one up may import a package.
        aliases: Squashed spellings to canonical name.
        short: Canonical name to the one in the documentation, where that is shorter. Default: none.

    Example:
        >>> callbacks().find('SpeedMonitor') is callbacks().find('speed_monitor')
        True
    """

    kind: str
    classes: Mapping[str, Any]
    aliases: Mapping[str, str]
    short: Mapping[str, str] = dataclasses.field(default_factory=dict)

    @property
    def offered(self) -> list[str]:
        """Every name, as the documentation has it: ``'tensorboard'``, not ``'tensorboard_logger'``."""
        return [self.short.get(name, name) for name in self.classes]

    @property
    def spellings(self) -> dict[str, str]:
        """Every other spelling to the name in :attr:`offered`."""
        return {spelling: self.short.get(name, name) for spelling, name in self.aliases.items()}

    def canonical(self, name: str) -> str | None:
        """The canonical spelling of ``name``; None when nothing has that name."""
        return self.aliases.get(squash(name)) or (name if name in self.classes else None)

    @property
    def broken(self) -> list[str]:
        """What is wrong with plug-ins whose names could not be read, a sentence each."""
        return getattr(self.classes, 'broken', [])

    def find(self, name: str) -> Any:
        """The class or function called ``name``.

        Raises:
            KeyError: There is none.
            PluginError: A package offers it and cannot be used.
        """
        return self.classes[self.canonical(name) or name]


@until_registered
def datasets() -> Registry:
    """Functions that return :class:`composer_ema.zoo.dataset.Data`, or what that is made of."""
    return _registry('data set', 'datasets', callable)


@until_registered
def models() -> Registry:
    """Classes and functions that return a network or a ComposerModel."""
    return _registry('model', 'models', callable)


@until_registered
def algorithms() -> Registry:
    """Plug-ins, then Composer's algorithms; a plug-in may take the name of one of Composer's, as ``ema`` does."""
    return _registry('algorithm', 'algorithms', _subclass_of(Algorithm), _exported(composer.algorithms, Algorithm))


@until_registered
def callbacks() -> Registry:
    """Plug-ins, then Composer's callbacks."""
    return _registry('callback', 'callbacks', _subclass_of(Callback), _exported(composer.callbacks, Callback))


@until_registered
def loggers() -> Registry:
    """Plug-ins, then Composer's logger destinations."""
    offered = _exported(composer.loggers, LoggerDestination)
    return _registry('logger', 'loggers', _subclass_of(LoggerDestination), offered)


@until_registered
def optimizers() -> Registry:
    """Plug-ins, then every optimizer of ``torch.optim`` and ``composer.optim``."""
    offered = [*_exported(torch.optim, Optimizer), *_exported(composer.optim, Optimizer)]
    return _registry('optimizer', 'optimizers', _subclass_of(Optimizer), offered)


@until_registered
def schedulers() -> Registry:
    """Plug-ins, then Composer's schedulers, then every class of ``torch.optim.lr_scheduler``, and SWALR."""
    of_torch = _exported(torch.optim.lr_scheduler, LRScheduler)
    offered = [*_exported(composer.optim, ComposerScheduler), *of_torch, SWALR]
    return _registry('scheduler', 'schedulers', _subclass_of(LRScheduler, ComposerScheduler), offered)


def _registry(kind: str, group: str, is_legal: Callable[[Any], bool], classes: Iterable[type] = ()) -> Registry:
    offered = plugins(group)
    by_name: dict[str, type] = {}
    for each in classes:
        by_name.setdefault(_canonical_name(each), each)
    # A name of a plug-in wins, then a full class name over another class's short one.
    aliases = {squash(name): name for name in offered.single}
    for name, each in by_name.items():
        aliases.setdefault(squash(each.__name__), name)
    for name, each in by_name.items():
        for alias in _aliases(each):
            aliases.setdefault(alias, name)
    short = {
        name: own for name, each in by_name.items() if (own := _short(name, each)) and aliases.get(squash(own)) == name
    }
    return Registry(kind, _Offered(offered, kind, is_legal, by_name), aliases, short)


class _Offered(Mapping[str, Any]):
    """Plug-ins, checked when they are looked up, and then the classes of Composer and torch.

    Args:
        plugins: They win where two have one name.
        kind: What they should be, for messages.
        is_legal: Whether a plug-in is that.
        classes: What is there without plug-ins.
    """

    def __init__(
        self, plugins: Plugins, kind: str, is_legal: Callable[[Any], bool], classes: Mapping[str, type]
    ) -> None:
        self._plugins, self._kind, self._is_legal, self._classes = plugins, kind, is_legal, classes

    def __getitem__(self, name: str) -> Any:
        if name in self._classes and name not in self._plugins.single:
            return self._classes[name]
        found = self._plugins[name]
        if not self._is_legal(found):
            raise PluginError(f'{self._plugins.origin(name)} is no {self._kind}: it is {found!r}.')
        return found

    def __iter__(self) -> Iterator[str]:
        return iter(dict.fromkeys([*self._plugins, *self._classes]))

    def __len__(self) -> int:
        return len(list(iter(self)))

    def __contains__(self, name: object) -> bool:
        return name in self._classes or name in self._plugins

    @property
    def broken(self) -> list[str]:
        """What is wrong with families of plug-ins that cannot be imported, a sentence each."""
        return self._plugins.broken


def _subclass_of(*bases: type) -> Callable[[Any], bool]:
    return lambda found: isinstance(found, type) and issubclass(found, bases)


def _exported(module: ModuleType, base: type) -> list[type]:
    """The concrete subclasses of ``base`` in the public names of ``module``, in their order."""
    values: list[Any] = [getattr(module, name) for name in getattr(module, '__all__', dir(module))]
    found = [value for value in values if isinstance(value, type) and issubclass(value, base) and value is not base]
    return [value for value in found if not inspect.isabstract(value) and value is not LoggerDestination]


def _canonical_name(cls: type) -> str:
    """The name of the module if it is the class name in snake case (``wandb_logger``), else the class name in it."""
    module = cls.__module__.rpartition('.')[2]
    if squash(module) in _aliases(cls):
        return module
    return snake_case(cls.__name__)


def _short(name: str, cls: type) -> str:
    """The name of a class of Composer without what all of its kind end in; empty for others."""
    suffix = next((f'_{each}' for each in _SUFFIXES if name.endswith(f'_{each}')), None)
    if suffix is None or not cls.__module__.startswith('composer.'):
        return ''
    return name.removesuffix(suffix).replace('cosine_annealing_with', 'cosine_with')


def _aliases(cls: type) -> list[str]:
    """Squashed spellings: the class name, the same without its suffix, and llm-foundry's ``cosine`` for annealing."""
    full = squash(cls.__name__)
    short = next((full.removesuffix(suffix) for suffix in _SUFFIXES if full.endswith(suffix)), full)
    return [full, short, short.replace('cosineannealing', 'cosine')]
