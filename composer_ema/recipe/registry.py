"""Which classes a recipe can name: ours first, then all that the installed Composer and torch offer."""

from __future__ import annotations

import difflib
import functools
import inspect
import re
from collections.abc import Iterable, Mapping
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
from torch.optim.swa_utils import SWALR

from composer_ema.trainer.ema import EMA
from composer_ema.trainer.swa import SWA
from composer_ema.zoo.callbacks import GradientMomentum

_SUFFIXES = ('callback', 'logger', 'scheduler')


def nearest(name: object, legal: Iterable[str]) -> str | None:
    """The legal name that is written most like ``name``, however far that is; None when there is no legal name.

    Example:
        >>> nearest('half_lif', ['half_life', 'smoothing'])
        'half_life'
    """
    by_squashed = {_squash(each): each for each in legal}
    found = difflib.get_close_matches(_squash(str(name)), by_squashed, n=1, cutoff=0.0)
    return by_squashed[found[0]] if found else None


@dataclass(frozen=True)
class Registry:
    """Classes of one kind, found by snake case or class name; case, ``_`` and ``-`` make no difference.

    Args:
        kind: What the classes are, for messages: ``'algorithm'``.
        classes: Canonical snake-case name to class.
        aliases: Further squashed spellings to canonical name.

    Example:
        >>> callbacks().find('SpeedMonitor') is callbacks().find('speed_monitor')
        True
    """

    kind: str
    classes: Mapping[str, type]
    aliases: Mapping[str, str]

    def canonical(self, name: str) -> str | None:
        """The canonical spelling of ``name``; None when nothing has that name."""
        return self.aliases.get(_squash(name))

    def find(self, name: str) -> type:
        """The class called ``name``; KeyError when there is none."""
        return self.classes[self.aliases[_squash(name)]]


@functools.cache
def algorithms() -> Registry:
    """Composer's algorithms, where a class of ours takes the name of Composer's."""
    return _registry('algorithm', [EMA, SWA, *_exported(composer.algorithms, Algorithm)])


@functools.cache
def callbacks() -> Registry:
    """Ours, then Composer's callbacks."""
    return _registry('callback', [GradientMomentum, *_exported(composer.callbacks, Callback)])


@functools.cache
def loggers() -> Registry:
    """Composer's logger destinations."""
    return _registry('logger', _exported(composer.loggers, LoggerDestination))


@functools.cache
def optimizers() -> Registry:
    """Every optimizer of ``torch.optim`` and ``composer.optim``."""
    base = torch.optim.Optimizer
    return _registry('optimizer', [*_exported(torch.optim, base), *_exported(composer.optim, base)])


@functools.cache
def schedulers() -> Registry:
    """Composer's time-string schedulers, then every class of ``torch.optim.lr_scheduler``, and SWALR."""
    of_torch = _exported(torch.optim.lr_scheduler, torch.optim.lr_scheduler.LRScheduler)
    return _registry('scheduler', [*_exported(composer.optim, ComposerScheduler), *of_torch, SWALR])


def _exported(module: ModuleType, base: type) -> list[type]:
    """The concrete subclasses of ``base`` in the public names of ``module``, in their order."""
    values: list[Any] = [getattr(module, name) for name in getattr(module, '__all__', dir(module))]
    found = [value for value in values if isinstance(value, type) and issubclass(value, base) and value is not base]
    return [value for value in found if not inspect.isabstract(value) and value is not LoggerDestination]


def _registry(kind: str, classes: Iterable[type]) -> Registry:
    by_name: dict[str, type] = {}
    for each in classes:
        by_name.setdefault(_canonical_name(each), each)
    # A full class name always wins over another class's short one.
    aliases = {_squash(each.__name__): name for name, each in by_name.items()}
    for name, each in by_name.items():
        for alias in _aliases(each):
            aliases.setdefault(alias, name)
    return Registry(kind, by_name, aliases)


def _canonical_name(cls: type) -> str:
    """The module's own name where it spells the class (``wandb_logger``), else the class name in snake case."""
    module = cls.__module__.rpartition('.')[2]
    if _squash(module) in _aliases(cls):
        return module
    return re.sub(r'(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])', '_', cls.__name__).lower()


def _aliases(cls: type) -> list[str]:
    """Squashed spellings: the class name, without its suffix, and llm-foundry's short ``cosine`` for annealing."""
    full = _squash(cls.__name__)
    short = next((full.removesuffix(suffix) for suffix in _SUFFIXES if full.endswith(suffix)), full)
    return [full, short, short.replace('cosineannealing', 'cosine')]


def _squash(name: str) -> str:
    return name.lower().replace('_', '').replace('-', '')
