"""What a recipe trusts in the checkpoint that it loads: plain values, further classes by name, or all of it."""

from __future__ import annotations

import contextlib
import importlib
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from composer_ema.model.names import listed
from composer_ema.recipe.arguments import Place, check_value
from composer_ema.trainer.safe_loading import safe_loading

EVERYTHING, TYPES = KEYS = ('trust_checkpoint', 'safe_types')


@dataclass(frozen=True)
class Trust:
    """What the checkpoint of a run may hold.

    Args:
        in_all: Whether Composer may unpickle it, and so run what it says. Default: only what is inert is read.
        types: Classes that it may hold besides tensors and plain values.
    """

    in_all: bool = False
    types: tuple[type, ...] = ()

    @contextlib.contextmanager
    def loading(self, path: str | None) -> Iterator[None]:
        """A Trainer that is built in this context loads its checkpoint so.

        Args:
            path: Of the checkpoint, for a warning; None where there is none to load.
        """
        if self.in_all:
            if path is not None:
                warnings.warn(f'{EVERYTHING}: {path} is unpickled, and can run code on this machine.', stacklevel=2)
            yield
            return
        with self.reading(), safe_loading():
            yield

    def reading(self) -> Any:
        """What reads files safely lets the trusted classes through in this context."""
        return torch.serialization.safe_globals(list(self.types))

    @staticmethod
    def remedy(names: Sequence[str]) -> str:
        """How to load a file that names these, in a sentence."""
        return (
            f'If they are yours, write {TYPES}: [{listed(names)}]; if you trust whoever wrote the file to run code on '
            f'this machine, write {EVERYTHING}: true.'
        )


def read(values: Mapping[str, Any], place: Place) -> Trust:
    """The trust of a recipe. Imports the modules of the classes that it names.

    Raises:
        RecipeError: It names what is no class, or cannot be imported.
    """
    in_all = check_value(bool, values.get(EVERYTHING, False), place / EVERYTHING)
    names = check_value(list[str], values.get(TYPES, []), place / TYPES)
    if in_all and names:
        raise (place / TYPES).error(f'has no effect beside {EVERYTHING}: true, which lets everything through. Drop it.')
    return Trust(in_all, tuple(_imported(name, place / TYPES / index) for index, name in enumerate(names)))


def _imported(name: str, place: Place) -> type:
    module, _, attribute = name.rpartition('.')
    if not module:
        raise place.error(f'{name!r} names no module. Write where the class is, as in my_module.MyType.')
    try:
        found = getattr(importlib.import_module(module), attribute, None)
    except Exception as error:  # importing runs whatever the module does
        raise place.error(f'{module} cannot be imported: {type(error).__name__}: {error}') from error
    if not isinstance(found, type):
        raise place.error(f'there is no class {attribute!r} in {module}.')
    if found.__module__ != module:  # a checkpoint names the module that defines it
        raise place.error(f'{name} is defined in {found.__module__}. Write {found.__module__}.{found.__qualname__}.')
    return found
