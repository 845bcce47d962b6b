"""Changes a recipe by overrides from left to right: ``key=value`` sets a key, ``~key`` drops one."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from composer_ema.recipe import interpolation, registry
from composer_ema.recipe.arguments import Place, RecipeError, said
from composer_ema.recipe.reading import MOST_LEVELS, check_is_plain
from composer_ema.recipe.scheduled import INNER
from composer_ema.wording import counted, squash, suggestion

_NAME = 'name'
_OVERRIDE = re.compile(r'(?P<drop>~?)(?P<key>[^\s.\[\]=]+(\.[^\s.\[\]=]+)*)(=(?P<value>.*))?', re.DOTALL)
#: Sections whose ``name`` says what takes the other keys.
_KNOWN = {
    'model': registry.models,
    'data': registry.datasets,
    'optimizer': registry.optimizers,
    'scheduler': registry.schedulers,
}


@dataclass(frozen=True)
class _Override:
    """``key=value`` or ``~key``, as the user wrote it and read."""

    text: str
    path: tuple[str, ...]
    is_drop: bool
    has_value: bool
    value: Any

    @property
    def key(self) -> str:
        return '.'.join(self.path)


def override(values: dict[str, Any], overrides: Sequence[str], place: Place) -> tuple[dict[str, Any], list[str]]:
    """Applies overrides to a recipe, from left to right.

    ``key=value`` sets a key. A mapping is merged into the mapping that is there; anything else replaces what is there.
    In ``model``, ``data``, ``optimizer`` and ``scheduler``, another ``name`` drops the arguments of the one before.
    ``~key`` drops a key or a whole section, and ``~key=value`` does so only if that is its value. A number names an
    entry of a list, the first one 0.

    Args:
        values: The content of the file, with interpolations as strings.
        overrides: What the user wrote.
        place: The file.

    Returns:
        The changed content, and a sentence about each override that dropped arguments.

    Raises:
        RecipeError: An override is malformed, drops what is not there, goes through what has no keys, or changes a name
            after an argument for it was set.
    """
    change = _Change(values, place)
    for text in overrides:
        change.apply(_read(text, place))
    return change.values, change.remarks


class _Change:
    """A recipe while overrides are applied to it.

    Args:
        values: Changed in place.
        place: The file.
    """

    def __init__(self, values: dict[str, Any], place: Place) -> None:
        self.values, self.place = values, place
        self.remarks: list[str] = []
        self._set_by: dict[tuple[str, ...], str] = {}

    def apply(self, given: _Override) -> None:
        if given.is_drop:
            self._drop(given)
        else:
            self._set(given)

    def _drop(self, given: _Override) -> None:
        parent = self._parent(given, create=False)
        at = self._index(parent, given.path)
        if given.has_value and parent[at] != given.value:
            raise self._at(given.path).error(
                f'is {parent[at]!r}, and the override {given.text!r} drops it only if it is {given.value!r}. '
                f'To drop it whatever it is, write ~{given.key}.'
            )
        del parent[at]
        self._forget(given.path)

    def _set(self, given: _Override) -> None:
        path, value = given.path, given.value
        parent = self._parent(given, create=True)
        at: Any = self._index(parent, path) if isinstance(parent, list) else path[-1]
        if path[-1] == _NAME and _is_named(path[:-1]):
            self._rename(parent, given)
        old = self._dereferenced(path) if isinstance(value, dict) else None
        if isinstance(old, dict) and _is_named(path) and self._differ(old.get(_NAME), value.get(_NAME), path[0]):
            self._say_dropped(given, old, {key: each for key, each in old.items() if key not in value})
            old = None
        parent[at] = _merged(old, value) if isinstance(old, dict) else value
        for below in _paths(value):
            self._set_by[path + below] = given.text

    def _rename(self, section: Any, given: _Override) -> None:
        """Drops the arguments of a section that gets another name."""
        if not self._differ(section.get(_NAME), given.value, given.path[0]):
            return
        dropped = {key: each for key, each in section.items() if key != _NAME}
        for key in dropped:
            argument = (*given.path[:-1], key)
            earlier = next((text for path, text in self._set_by.items() if path[: len(argument)] == argument), None)
            if earlier is not None:
                raise self._at(given.path).error(
                    f'the override {given.text!r} drops the arguments of {section[_NAME]}, and {earlier!r} before it '
                    f'sets one of them. Write {given.text} first, and then what {given.value} is to take.'
                )
        self._say_dropped(given, section, dropped)
        for key in dropped:
            del section[key]

    def _say_dropped(self, given: _Override, section: Mapping[str, Any], dropped: Mapping[str, Any]) -> None:
        arguments = ', '.join(f'{key}={each}' for key, each in dropped.items() if key != _NAME)
        if arguments:
            self.remarks.append(f'override {given.text}: drops the arguments of {section[_NAME]}: {arguments}')

    def _differ(self, old: Any, new: Any, section: str) -> bool:
        """Whether two names, of which either may be missing, name two things."""
        if not isinstance(old, str) or not isinstance(new, str):
            return False
        known = _KNOWN[section]()
        first, second = (self._resolved(each) for each in (old, new))
        return (known.canonical(first) or squash(first)) != (known.canonical(second) or squash(second))

    def _parent(self, given: _Override, *, create: bool) -> Any:
        """The mapping or list that holds the last part of the key; missing ones on the way are created, or an error."""
        parent: Any = self.values
        for end in range(1, len(given.path)):
            path = given.path[:end]
            if create and isinstance(parent, dict) and parent.get(path[-1]) is None:
                parent[path[-1]] = {}
            at = self._index(parent, path)
            parent[at] = self._dereferenced(path)
            if not isinstance(parent[at], dict | list):
                raise self._at(path).error(
                    f'is {parent[at]!r}, which has no keys, and the override {given.text!r} is about one of them.'
                )
            parent = parent[at]
        return parent

    def _index(self, parent: Any, path: tuple[str, ...]) -> Any:
        """The last part of the path as an index of what holds it.

        Raises:
            RecipeError: There is no such key or entry.
        """
        if isinstance(parent, list):
            if not path[-1].isdecimal() or int(path[-1]) >= len(parent):
                entries = counted(len(parent), 'entry')
                raise self._at(path).error(f'there is no such entry: the list has {entries}, and the first one is 0.')
            return int(path[-1])
        if path[-1] not in parent:
            owner = '.'.join(path[:-1]) or 'the recipe'
            remedy = suggestion(path[-1], map(str, parent), f'{owner} has')
            raise self._at(path).error(f'there is no such key. {remedy}')
        return path[-1]

    def _dereferenced(self, path: tuple[str, ...]) -> Any:
        """The value at a path; where it is an interpolation, a copy of what that stands for."""
        value: Any = self.values
        for part in path:
            value = value[int(part)] if isinstance(value, list) else value.get(part)
        return interpolation.followed(self.values, path, self.place) if interpolation.holds(value) else value

    def _resolved(self, text: str) -> str:
        """A name that may hold an interpolation, as far as it can be resolved by now."""
        try:
            return str(interpolation.followed({**self.values, _NAME: text}, (_NAME,), self.place))
        except RecipeError:
            return text

    def _forget(self, path: tuple[str, ...]) -> None:
        self._set_by = {each: text for each, text in self._set_by.items() if each[: len(path)] != path}

    def _at(self, path: tuple[str, ...]) -> Place:
        return self.place / '.'.join(path)


def _read(text: str, place: Place) -> _Override:
    found = _OVERRIDE.fullmatch(text)
    if text.startswith('+'):
        raise place.error(f'the override {text!r} needs no +: key=value also adds a key. Write {text.lstrip("+")}.')
    if found is None or not (found['drop'] or '=' in text):
        remedy = ' A run follows one recipe: train the other one after it.' if text.endswith(('.yaml', '.yml')) else ''
        raise place.error(
            f'the override {text!r} must have the form key=value, as in max_duration=2ep, or ~key, which drops a key.'
            + remedy
        )
    key, value = found['key'], found['value']
    if key.count('.') >= MOST_LEVELS:
        raise place.error(
            f'the override {text[:100]!r} names more than {MOST_LEVELS} keys in one another. Write fewer.'
        )
    try:
        # As OmegaConf reads a dot list: null, true, numbers with an exponent, lists and mappings.
        parsed = None if value is None else OmegaConf.to_container(OmegaConf.from_dotlist([f'value={value}']))
    except YAMLError as error:
        raise (place / key).error(f'the override {text!r} is not legal YAML: {said(error)}.') from error
    except (OmegaConfBaseException, TypeError, ValueError, RecursionError) as error:
        raise (place / key).error(f'the override {text!r} does not fit the recipe: {said(error)}.') from error
    assert parsed is None or isinstance(parsed, dict)
    check_is_plain((parsed or {}).get('value'), place / key)
    return _Override(text, tuple(key.split('.')), bool(found['drop']), parsed is not None, (parsed or {}).get('value'))


def _is_named(path: tuple[str, ...]) -> bool:
    """Whether a path is that of a section whose name says what takes its arguments: ``scheduler.schedulers.0``."""
    if not path or path[0] not in _KNOWN:
        return False
    return len(path) == 1 or (path[0] == 'scheduler' and all(each == INNER or each.isdecimal() for each in path[1:]))


def _merged(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(old)
    for key, value in new.items():
        before = merged.get(key)
        merged[key] = _merged(before, value) if isinstance(before, dict) and isinstance(value, dict) else value
    return merged


def _paths(value: Any) -> Iterator[tuple[str, ...]]:
    """The path of every key within a value, and the empty one, which is the value's own."""
    yield ()
    if isinstance(value, dict):
        for key, each in value.items():
            yield from ((str(key), *below) for below in _paths(each))
