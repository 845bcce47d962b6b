r"""Replaces ``${key}`` in a recipe by the value of another key, within bounds, and calls nothing.

The notation is OmegaConf's: ``${variables.rate}`` from the top of the recipe, ``${.rate}`` beside the key that holds
it, ``${..rate}`` one level up, ``${variables.${which}}`` one in another, and ``\${`` for the two characters themselves.
A value that is one interpolation takes the kind of what it stands for; within other text it becomes text. OmegaConf's
functions, ``${oc.env:X}``, are off: a recipe holds the values that it trains with, and what is in the environment may
be a secret.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from composer_ema.recipe.arguments import Place, RecipeError
from composer_ema.recipe.reading import MOST_LEVELS, MOST_NODES
from composer_ema.wording import suggestion

#: How much interpolations may add to a recipe: letters, and one for each key and value.
MOST_SIZE = 20 * MOST_NODES
#: How many interpolations may follow one another, and how many may lie in one.
_MOST_STEPS, _MOST_NESTED = 50, 8
_MARK = re.compile(r'(?P<slashes>\\*)\$\{')
_FUNCTION = re.compile(r'[\w.]+\s*:')
_KEY = re.compile(r'(?P<dots>\.*)(?P<path>[^\s.\[\]{}:$,"\'\\]+(?:\.[^\s.\[\]{}:$,"\'\\]+|\[[^\s.\[\]]+\])*)')
_MISSING = '???'


def resolved(values: dict[str, Any], place: Place) -> dict[str, Any]:
    """A copy of a recipe with every interpolation replaced.

    Args:
        values: Plain values.
        place: The file.

    Raises:
        RecipeError: An interpolation is malformed, calls a function, leads nowhere or to itself; or all of them
            together add more than :data:`MOST_SIZE`.

    Example:
        >>> resolved({'rate': 0.5, 'lr': '${rate}', 'name': 'lr-${rate}'}, Place('a.yaml'))
        {'rate': 0.5, 'lr': 0.5, 'name': 'lr-0.5'}
    """
    return _Resolver(values, place).at(()).value


def followed(values: dict[str, Any], path: Sequence[str], place: Place) -> Any:
    """The value at a path, or a copy of what it stands for; interpolations within that are left as they are.

    Raises:
        RecipeError: As for :func:`resolved`.
    """
    return _Resolver(values, place).source(tuple(path))


def holds(value: object) -> bool:
    """Whether a value is a string with an interpolation."""
    return isinstance(value, str) and '${' in value


def escaped(value: Any) -> Any:
    r"""A copy of plain values in which ``${`` means these two characters: what :func:`resolved` reads as the same.

    Example:
        >>> resolved(escaped({'a': '${b}'}), Place('a.yaml'))
        {'a': '${b}'}
    """
    if isinstance(value, dict):
        return {key: escaped(each) for key, each in value.items()}
    if isinstance(value, list):
        return [escaped(each) for each in value]
    return _MARK.sub(lambda found: f'{found["slashes"] * 2}\\${{', value) if isinstance(value, str) else value


@dataclass(frozen=True)
class _Found:
    """A value without interpolations, how much it comes to, and how many levels lie in it."""

    value: Any
    size: int
    levels: int = 0


class _Resolver:
    """Resolves each path once; what an interpolation stands for is copied, and what all copies come to is bounded.

    Args:
        values: The recipe.
        place: The file.
    """

    def __init__(self, values: dict[str, Any], place: Place) -> None:
        self._values, self._place = values, place
        self._found: dict[tuple[str, ...], _Found] = {}
        self._open: list[tuple[str, ...]] = []
        self._added = 0

    def at(self, path: tuple[str, ...]) -> _Found:
        """The value at a path, resolved."""
        if path in self._found:
            return self._found[path]
        if path in self._open:
            chain = ' -> '.join(map(_dotted, [*self._open[self._open.index(path) :], path]))
            raise self._error(f'stands for itself: {chain}. Write the value in one of them.')
        if len(self._open) > _MOST_STEPS + MOST_LEVELS:
            raise self._error(f'goes through more than {_MOST_STEPS} others. Write the value itself.')
        self._open.append(path)
        found = self._resolved(self._raw(path), path)
        if found.levels + len(path) > MOST_LEVELS:
            raise self._error(f'lies in more than {MOST_LEVELS} lists and mappings. Write it flatter.')
        self._found[path] = found
        self._open.pop()
        return found

    def source(self, path: tuple[str, ...]) -> Any:
        """The value at a path, or what it stands for; interpolations within that are left as they are."""
        for _ in range(_MOST_STEPS):
            raw = self._raw(path)
            if not holds(raw):
                return copy.deepcopy(raw)
            self._open = [path]
            key = self._single(raw)
            target = self._text(raw, path) if key is None else self._target(key, path)
            if isinstance(target, _Found):
                return copy.deepcopy(target.value)
            path = target
        raise self._error(f'goes through more than {_MOST_STEPS} others, or stands for itself. Write the value.')

    def _resolved(self, raw: Any, path: tuple[str, ...]) -> _Found:
        if isinstance(raw, dict | list):
            inner = {key: self.at((*path, key)) for key in _keys(raw)}
            values = {key: each.value for key, each in inner.items()}
            size = 1 + sum(each.size + 1 for each in inner.values())
            levels = 1 + max((each.levels for each in inner.values()), default=0)
            return _Found(values if isinstance(raw, dict) else list(values.values()), size, levels)
        if raw == _MISSING:
            raise self._error(f'is {_MISSING}: Missing mandatory value. Write it, as in key=value behind the recipe.')
        return self._text(raw, path) if isinstance(raw, str) else _Found(raw, 1)

    def _text(self, text: str, path: tuple[str, ...]) -> _Found:
        """A string with its interpolations replaced."""
        parts: list[str] = []
        position = 0
        while (mark := _MARK.search(text, position)) is not None:
            slashes = len(mark['slashes'])
            parts.append(text[position : mark.start()] + '\\' * (slashes // 2))
            position = mark.end()
            if slashes % 2:
                parts.append('${')
                continue
            end = self._end(text, position)
            found = self._reference(text[position:end], path)
            if self._single(text) is not None:
                return _Found(copy.deepcopy(found.value), found.size, found.levels)
            if isinstance(found.value, dict | list):
                raise self._error(
                    f'{text!r} puts a list or a mapping into text, {text[position - 2 : end + 1]}. Name a value in it.'
                )
            parts.append(str(found.value))
            position = end + 1
        whole = ''.join([*parts, text[position:]])
        return _Found(whole, 1 + len(whole))

    def _single(self, text: str) -> str | None:
        """The key of a text that is one interpolation and no more."""
        end = self._end(text, 2) if text.startswith('${') else -1
        return text[2:end] if end == len(text) - 1 else None

    def _end(self, text: str, start: int) -> int:
        """The index of the brace that closes an interpolation whose key starts at ``start``."""
        depth = 1
        for index in range(start, len(text)):
            depth += {'{': 1, '}': -1}.get(text[index], 0)
            if depth == 0:
                return index
        raise self._error(f'{text!r} has no brace that closes ${{. Write ${{key}}, or \\${{ for the characters.')

    def _reference(self, key: str, path: tuple[str, ...]) -> _Found:
        """What ``${key}`` at a path stands for."""
        target = self._target(key, path)
        found = target if isinstance(target, _Found) else self.at(target)
        self._added += found.size
        if self._added > MOST_SIZE:
            raise self._error(
                f'${{{key}}}: the interpolations of this recipe stand for more than {MOST_SIZE:,} letters and values. '
                'Name less: each stands for all that it names.'
            )
        return found

    def _target(self, key: str, path: tuple[str, ...]) -> tuple[str, ...] | _Found:
        """The path that ``${key}`` at a path names, or what it stands for where its path goes through another one."""
        written = f'${{{key}}}'
        if key.count('${') > _MOST_NESTED:
            raise self._error(f'{written} holds more than {_MOST_NESTED} others. Write fewer into one another.')
        if '${' in key:
            key = str(self._text(key, path).value)
        key = key.strip()
        if _FUNCTION.match(key):
            raise self._error(
                f'{written} calls a function, and a recipe holds values only: they are written into the run folder, '
                'and the environment may hold secrets. Write the value, or let the shell do so, as in data.root=$DATA.'
            )
        match = _KEY.fullmatch(key)
        if match is None:
            raise self._error(f'{written} names no key. Write ${{variables.rate}}, or \\${{ for the characters.')
        up, parts = len(match['dots']), [part.rstrip(']') for part in re.split(r'[.\[]', match['path'])]
        if up > len(path):
            raise self._error(f'{written} leads above the recipe. Leave out dots.')
        found = path[: len(path) - up] if up else ()
        for done, part in enumerate(parts):
            raw = self._raw(found)
            if holds(raw):
                through = self.at(found)
                value = through.value
                for each in parts[done:]:
                    value = _get(value, self._key(value, each, parts))
                return _Found(value, through.size, through.levels)
            found = (*found, self._key(raw, part, parts))
        return found

    def _key(self, value: Any, part: str, parts: Sequence[str]) -> str:
        """A key of a list or mapping as :func:`_keys` has it."""
        is_index = isinstance(value, list) and part.isascii() and part.isdecimal()
        key, keys = (str(int(part)) if is_index and len(part) < 9 else part), _keys(value)
        if key not in keys:
            remedy = suggestion(part, keys, 'There are')
            raise self._error(f'Interpolation key {_dotted(parts)!r} not found. {remedy}')
        return key

    def _raw(self, path: tuple[str, ...]) -> Any:
        raw: Any = self._values
        for part in path:
            raw = _get(raw, part)
        return raw

    def _error(self, message: str) -> RecipeError:
        """An error at the key that is being resolved."""
        key = _dotted(self._open[-1]) if self._open else ''
        return (self._place / key if key else self._place).error(message)


def _keys(value: Any) -> list[str]:
    """The keys of a mapping, the indices of a list as strings, and none for anything else."""
    if isinstance(value, dict):
        return list(value)
    return [str(index) for index in range(len(value))] if isinstance(value, list) else []


def _get(value: Any, key: str) -> Any:
    return value[int(key)] if isinstance(value, list) else value[key]


def _dotted(path: Sequence[str]) -> str:
    return '.'.join(path)
