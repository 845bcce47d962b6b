"""Modules that users may keep in a model and that are no part of it: those that compute with an average of it."""

from __future__ import annotations

import weakref
from collections.abc import Iterator

from torch import nn

_apart: weakref.WeakSet[nn.Module] = weakref.WeakSet()


def set_apart(module: nn.Module) -> None:
    """Makes ``module``, with all that it holds, no part of a model in which it stands."""
    _apart.add(module)


def is_apart(module: nn.Module) -> bool:
    """Whether a module, as an object, was set apart; copies of it were not."""
    return module in _apart


def named_parts(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The modules of ``model`` with their paths, under each path that they have, without those that are apart."""
    outside: str | None = None
    for path, module in model.named_modules(remove_duplicate=False):
        if outside is not None and path.startswith(outside):
            continue
        if path and is_apart(module):
            outside = f'{path}.'
        else:
            outside = None
            yield path, module
