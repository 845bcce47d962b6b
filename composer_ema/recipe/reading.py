"""Reads a recipe file into plain values: bounded in time and memory, and nothing in it is executed."""

from __future__ import annotations

import io
import math
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import GrammarParseError, OmegaConfBaseException
from yaml import MappingNode, Node, SequenceNode, YAMLError

from composer_ema.recipe.arguments import Place, RecipeError, said
from composer_ema.recipe.command import is_override
from composer_ema.wording import suggestion

#: How large a file may be, in bytes; the longest recipe of this package has 1,100.
MOST_BYTES = 256 * 1024
#: How many keys and values a recipe may hold, with every alias counted where it is used.
MOST_NODES = 10_000
#: How deep lists and mappings may lie in one another. Python's own limit is about 1,000 calls.
MOST_LEVELS = 50
#: How many letters a string may have, so that an error can show it.
MOST_LETTERS = 10_000
_LARGEST = 2**63


def read(place: Place) -> dict[str, Any]:
    """The content of a recipe file, with interpolations as strings.

    Raises:
        RecipeError: No such file or no regular one, too large, no YAML, a key given twice, or a value of another kind.
    """
    text = _text(place)
    try:
        _check_size(yaml.compose(text, Loader=yaml.SafeLoader), place)
        config = OmegaConf.load(io.StringIO(text))
    except YAMLError as error:
        raise place.error(f'is not legal YAML: {said(error)}.') from error
    except GrammarParseError as error:
        remedy = 'Write an interpolation as in ${variables.rate}, or \\${ for the characters.'
        raise _at(error, place).error(f'{said(error)}: this cannot be read. {remedy}') from error
    except OmegaConfBaseException as error:
        raise _at(error, place).error(
            f'{said(error)}. A recipe holds strings, numbers, true, false, null, lists and mappings with string keys.'
        ) from error
    except RecipeError:
        raise
    except (OSError, ValueError, RecursionError) as error:  # OSError is OmegaConf's, for a single number
        raise place.error(f'cannot be read as a recipe: {said(error)}.') from error
    if not isinstance(config, DictConfig):
        raise place.error('a recipe is a mapping of keys to values, and this file holds a list.')
    values: Any = OmegaConf.to_container(config)
    check_is_plain(values, place)
    return values


def check_is_plain(value: Any, place: Place, levels: int = 0) -> None:
    """Refuses what no recipe can hold.

    Strings, numbers, booleans, null, lists and mappings with string keys can be checked, shown in an error and written
    to a file. NaN is no value of anything, and equals nothing when a run is resumed.

    Args:
        value: Any value.
        place: Its key.
        levels: How many lists and mappings it lies in.

    Raises:
        RecipeError: At the key of what is no plain value.
    """
    if levels > MOST_LEVELS:
        raise place.error(f'lies in more than {MOST_LEVELS} lists and mappings. Write it flatter.')
    if isinstance(value, dict):
        for key, each in value.items():
            if not isinstance(key, str):
                raise (place / key).error(f'a key must be a string, got {key!r}. Write it in quotes.')
            _check_text(key, place)
            check_is_plain(each, place / key, levels + 1)
    elif isinstance(value, list):
        for index, each in enumerate(value):
            check_is_plain(each, place / index, levels + 1)
    elif isinstance(value, str):
        _check_text(value, place)
    elif isinstance(value, float):
        if math.isnan(value):
            raise place.error('is nan, which is not a number. Write a number, or null for none.')
    elif isinstance(value, int):
        if not -_LARGEST <= value < _LARGEST:
            raise place.error('is a whole number of more than 64 bits. Write a smaller one.')
    elif value is not None:
        raise place.error(f'a value must be a string, a number, true, false, null, a list or a mapping, got {value!r}.')


def check_is_finite(value: Any, place: Place) -> None:
    """Refuses infinite numbers: with one, a run fails or trains to NaN.

    Raises:
        RecipeError: At the key of the number.
    """
    for key, each in value.items() if isinstance(value, dict) else enumerate(value if isinstance(value, list) else ()):
        check_is_finite(each, place / key)
    if isinstance(value, float) and math.isinf(value):
        raise place.error(f'must be a finite number, got {value}. Write one.')


def _at(error: OmegaConfBaseException, place: Place) -> Place:
    return place / error.full_key if error.full_key else place


def _text(place: Place) -> str:
    path = Path(place.source)
    try:
        status = path.stat()
        if stat.S_ISDIR(status.st_mode):
            raise place.error('is a folder. Give one of its recipes, a file that ends in .yaml.')
        if not stat.S_ISREG(status.st_mode):  # to read a pipe may wait forever
            raise place.error('is no regular file. Write the recipe to one, and change it by key=value behind it.')
        if status.st_size > MOST_BYTES:
            raise place.error(f'has {status.st_size:,} bytes, and a recipe has at most {MOST_BYTES:,}. Give a recipe.')
        return path.read_bytes().decode('utf-8-sig')
    except FileNotFoundError:
        raise _no_such_file(place) from None
    except UnicodeDecodeError as error:
        raise place.error(f'cannot be read as a recipe: {said(error)}. Save it as UTF-8.') from error
    except RecipeError:
        raise
    except (OSError, ValueError) as error:
        raise place.error(f'cannot be read as a recipe: {said(error)}.') from error


def _no_such_file(place: Place) -> RecipeError:
    if is_override(place.source):
        return place.error(f'is an override without a recipe before it. Write RECIPE.yaml {place.source}.')
    folder = Path(place.source).parent
    others = {path.stem: str(path) for path in sorted(folder.glob('*.yaml'))}
    remedy = suggestion(Path(place.source).stem, others.values(), f'Recipes in {folder}:', spellings=others)
    return place.error(f'there is no such file. {remedy}')


def _check_size(root: Node | None, place: Place) -> None:
    """Counts the nodes of a document before an alias is followed: ten lines of aliases can stand for 10^9 values."""
    counted: dict[int, int] = {}
    pending = [] if root is None else [root]
    open_nodes: set[int] = set()
    while pending:
        node = pending[-1]
        inner = list(_inner(node))
        if id(node) in counted:
            pending.pop()
        elif id(node) in open_nodes:
            counted[id(node)] = 1 + sum(counted[id(each)] for each in inner)
            if counted[id(node)] > MOST_NODES:
                raise place.error(
                    f'holds more than {MOST_NODES:,} keys and values, with each alias counted where it is used'
                    f'{_where(node)}. A recipe holds a few dozen.'
                )
            open_nodes.discard(id(node))
            pending.pop()
        else:
            open_nodes.add(id(node))
            for each in inner:
                if id(each) in open_nodes:
                    raise place.error(f'has an alias within what the alias stands for{_where(each)}. Write it out.')
                pending.append(each)


def _inner(node: Node) -> Iterator[Node]:
    if isinstance(node, MappingNode):
        for key, value in node.value:
            yield key
            yield value
    elif isinstance(node, SequenceNode):
        yield from node.value


def _check_text(text: str, place: Place) -> None:
    shown = ascii(text[:100])
    if len(text) > MOST_LETTERS:
        raise place.error(f'has {len(text):,} letters, and a string has at most {MOST_LETTERS:,}: it begins {shown}.')
    if '\0' in text:
        raise place.error(f'holds the character NUL, which no name and no file can: {shown}. Leave it out.')
    try:
        text.encode()
    except UnicodeEncodeError:
        raise place.error(f'cannot be written as UTF-8: {shown}. Write it in letters of Unicode.') from None


def _where(node: Node) -> str:
    return f' (line {node.start_mark.line + 1})' if node.start_mark is not None else ''
