"""Classes and functions that a recipe names: found, built, and on an error the argument to blame."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from composer_ema.recipe.arguments import Place, said, signature
from composer_ema.recipe.registry import Registry
from composer_ema.recipe.trouble import line_of
from composer_ema.wording import suggestion
from composer_ema.zoo.plugins import PluginError

#: What constructors raise about arguments that they cannot take.
REFUSALS = (ValueError, TypeError, ImportError, FileNotFoundError, ZeroDivisionError, OverflowError, MemoryError)
#: Legal values of most arguments: a number, a whole one, a time. They take the place of one that cannot be left out.
_STAND_INS = (0.5, 1, '1ba')
_KNOWN_PACKAGES = ('torch', 'torchvision', 'composer', 'composer_ema')
#: What a call came to: None where it succeeded, else the type and the message of its error.
_Outcome = tuple[type[Exception], str] | None


@dataclass(frozen=True)
class Named:
    """A class or function that the recipe names, with checked arguments and the place it was named at.

    Args:
        place: The key in the recipe.
        name: The canonical name.
        factory: The class or function.
        arguments: What the recipe gives to it.
        is_cheap: Whether calling the factory once more does no harm: it reads no data, opens no file or connection.
    """

    place: Place
    name: str
    factory: Callable[..., Any]
    arguments: dict[str, Any]
    is_cheap: bool = False

    def build(self, *positional: Any, **further: Any) -> Any:
        """Calls the factory with the recipe's arguments and those of the caller.

        Raises:
            RecipeError: The factory refuses its arguments. The key is that of the argument to blame where the error
                carries it or, for a cheap factory, where that is the only one that the error depends on: without it
                the call succeeds, or fails in another way.
        """
        return self.attempt(lambda arguments: self.factory(*positional, **arguments, **further))

    def attempt(self, make: Callable[[dict[str, Any]], Any]) -> Any:
        """``make(arguments)``, with errors as in :meth:`build`; a cheap one may be called several times."""
        try:
            return make(self.arguments)
        except Exception as error:
            if not self._is_refusal(error):
                raise
            argument = self._carried(error)
            if argument is None and self.is_cheap and self._is_harmless():
                argument = self._culprit(make, error)
            message = said(error) + ('' if self._is_harmless() else line_of(error))
            if argument is None:
                raise self.place.error(message) from error
            if repr(self.arguments[argument]) not in message and ', got ' not in message:
                message = f'{message.rstrip(".")}, got {self.arguments[argument]!r}.'
            raise (self.place / argument).error(message) from error

    def blame(self, error: Exception) -> Place:
        """The key of the argument that the error carries in ``argument``, or else of the whole entry."""
        argument = self._carried(error)
        return self.place if argument is None else self.place / argument

    def _carried(self, error: Exception) -> str | None:
        argument = getattr(error, 'argument', None)
        return argument if argument in self.arguments else None

    def _is_refusal(self, error: Exception) -> bool:
        """Whether an error is about the arguments. Of what others wrote, each is; of ours, the rest are bugs."""
        if isinstance(error, REFUSALS) or _is_of_memory(error):
            return True
        return self._package not in ('composer_ema', '')

    @property
    def _package(self) -> str:
        factory = self.factory.args[0] if isinstance(self.factory, functools.partial) else self.factory
        return getattr(factory, '__module__', '').partition('.')[0]

    def _is_harmless(self) -> bool:
        """Whether we know that calling the factory again does no harm; a stranger's may open a file or a connection."""
        return self._package in _KNOWN_PACKAGES

    def _culprit(self, make: Callable[[dict[str, Any]], Any], error: Exception) -> str | None:
        """The one argument to blame; None where none or several may be.

        It is the one without which ``make`` succeeds. Where there is none, because another argument is wrong as well,
        it is the one without which ``make`` fails in another way, and so it does with whatever takes its place.
        """
        seen = (type(error), str(error))
        succeeding = [name for name in self.arguments if None in self._outcomes_without(name, make)]
        if succeeding:
            return succeeding[0] if len(succeeding) == 1 else None
        changing = [
            name
            for name in self.arguments
            if seen not in self._outcomes_without(name, make) + self._outcomes_with_stand_ins(name, make)
        ]
        return changing[0] if len(changing) == 1 else None

    def _outcomes_without(self, name: str, make: Callable[[dict[str, Any]], Any]) -> list[_Outcome]:
        parameter = signature(self.factory).get(name)
        if parameter is not None and parameter.default is parameter.empty:  # it cannot be left out
            return self._outcomes_with_stand_ins(name, make)
        return [_outcome(make, {key: value for key, value in self.arguments.items() if key != name})]

    def _outcomes_with_stand_ins(self, name: str, make: Callable[[dict[str, Any]], Any]) -> list[_Outcome]:
        return [_outcome(make, {**self.arguments, name: value}) for value in _STAND_INS]


def find(name: str, place: Place, known: Registry) -> Any:
    """The class or function of that name.

    Raises:
        RecipeError: There is none, with the names there are; or a package registers it and cannot be imported.
    """
    if known.canonical(name) is None:
        if not known.classes:
            raise place.error(f'no installed package registers a {known.kind}. Install this one: pip install .')
        remedy = suggestion(name, known.offered, spellings=known.spellings)
        raise place.error(' '.join([*known.broken, f'there is no {known.kind} {name!r}.', remedy]))
    try:
        return known.find(name)
    except PluginError as error:
        raise place.error(str(error)) from error


def named(section: Any, place: Place, example: str) -> tuple[str, dict[str, Any]]:
    """The name in a mapping, and the rest of the mapping."""
    if not isinstance(section, dict) or not isinstance(section.get('name'), str):
        if section is None:
            raise place.error(f'is missing. Write a mapping with a name, as in {{name: {example}}}.')
        raise place.error(f'must be a mapping with a name, as in {{name: {example}}}; got {section!r}.')
    return section['name'], {key: value for key, value in section.items() if key != 'name'}


def _is_of_memory(error: Exception) -> bool:
    """Whether there was too little memory: torch has an error of its own for that on a GPU only."""
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def _outcome(make: Callable[[dict[str, Any]], Any], arguments: dict[str, Any]) -> _Outcome:
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        try:
            make(arguments)
        except Exception as error:  # of another kind, perhaps
            return type(error), str(error)
    return None
