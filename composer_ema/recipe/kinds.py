"""What an annotation lets YAML say: a type that pydantic checks, and its JSON Schema, which errors put in words."""

from __future__ import annotations

import collections.abc
import enum
import inspect
import json
import types
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, Union, get_args, get_origin

from pydantic import ConfigDict, TypeAdapter, ValidationError
from pydantic.errors import PydanticUndefinedAnnotation, PydanticUserError
from pydantic.json_schema import GenerateJsonSchema, JsonSchemaWarningKind

#: In JSON mode a list may stand for a tuple, and strict means that a string is never taken for a number.
CONFIG = ConfigDict(strict=True, arbitrary_types_allowed=True, extra='forbid')
_MAPPINGS = (dict, collections.abc.Mapping)
_NOTHING: dict[str, Any] = {'not': {}}  # JSON Schema for a kind that no value has


@dataclass(frozen=True)
class Kind:
    """What an annotation lets YAML say.

    Args:
        annotation: What pydantic checks.
        schema: The same as JSON Schema, without the alternatives that no YAML value has, such as functions.
    """

    annotation: Any
    schema: Mapping[str, Any]

    @classmethod
    def of(cls, annotation: Any) -> Kind:
        """The kind of an annotation, with names resolved; any value where pydantic or YAML cannot tell."""
        annotation = _without_loose_ends(annotation)
        try:
            described = list_adapter(annotation).json_schema(schema_generator=_YamlSchema)
        except (PydanticUserError, PydanticUndefinedAnnotation):
            return cls(Any, {})  # pydantic cannot describe the class: its constructor must judge the values
        schema = _pruned(described['items'], described.get('$defs', {}))
        # Where no YAML value fits, as for an optimizer, the constructor must judge the values, too.
        return cls(Any, {}) if schema is None else cls(annotation, schema)

    def takes(self, value: Any) -> bool:
        """Whether a YAML value is of this kind."""
        try:
            list_adapter(self.annotation).validate_json(json.dumps([value]))
        except ValidationError:
            return False
        return True

    @property
    def of_values(self) -> Kind | None:
        """The kind of what a mapping holds, where this kind is a mapping, or may be; None where any value will do."""
        origin, inner = get_origin(self.annotation), get_args(self.annotation)
        if origin in (Union, types.UnionType):
            mappings = [each for each in inner if get_origin(each) in _MAPPINGS]
            return Kind.of(mappings[0]).of_values if len(mappings) == 1 else None
        return Kind.of(inner[1]) if origin in _MAPPINGS and len(inner) == 2 else None

    @property
    def choices(self) -> list[Any]:
        """The legal values, where they are listed."""
        return _choices(self.schema)

    def __str__(self) -> str:
        """The kind in words: ``'a string or null'``."""
        return _in_words(self.schema)


def list_adapter(annotation: Any) -> TypeAdapter[Any]:
    """Checks lists of the annotated kind; pydantic takes a configuration for them, but not for a bare dataclass."""
    return TypeAdapter(_list_of(annotation), config=CONFIG)


def kind_of(value: Any) -> str:
    """The kind of a YAML value in words."""
    kinds = {
        str: 'a string',
        int: 'an integer',
        float: 'a number',
        bool: 'a boolean',
        dict: 'a mapping',
        list: 'a list',
    }
    return kinds.get(type(value), 'null')


def _list_of(annotation: Any) -> Any:
    return types.GenericAlias(list, (annotation,))


class _YamlSchema(GenerateJsonSchema):
    """Describes classes and functions as kinds without any value: arguments are checked, never converted to objects."""

    ignored_warning_kinds: set[JsonSchemaWarningKind] = {'skipped-choice', 'non-serializable-default'}  # noqa: RUF012

    def handle_invalid_for_json_schema(self, schema: Any, error_info: str) -> dict[str, Any]:
        return _NOTHING

    def dataclass_schema(self, schema: Any) -> dict[str, Any]:
        return _NOTHING

    def model_schema(self, schema: Any) -> dict[str, Any]:
        return _NOTHING


def _without_loose_ends(annotation: Any) -> Any:
    """The annotation, made stricter in three places.

    An enumeration becomes its values, since Composer's raise errors of their own; ``str | Precision`` means a string
    that names a precision; and pydantic would check the entries of an ``Iterable`` only when they are used.
    """
    origin, inner = get_origin(annotation), get_args(annotation)
    if annotation is inspect.Parameter.empty:
        return Any
    if _is_enum(annotation):
        return Literal[tuple(each.value for each in annotation)]
    if origin in (Union, types.UnionType):
        has_enum = any(map(_is_enum, inner))
        kept = [_without_loose_ends(each) for each in inner if not (has_enum and each is str)]
        return Union[tuple(kept)]  # noqa: UP007 - built from a list
    if collections.abc.Iterable in (origin, annotation):
        return _list_of(_without_loose_ends(inner[0]) if inner else Any)
    if origin in (list, tuple, dict, collections.abc.Sequence, collections.abc.Mapping):
        return types.GenericAlias(origin, tuple(map(_without_loose_ends, inner)))
    return annotation


def _is_enum(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, enum.Enum)


def _pruned(schema: Mapping[str, Any], definitions: Mapping[str, Any]) -> dict[str, Any] | None:
    """The JSON Schema without alternatives that no value has, references resolved; None where nothing is left."""
    if schema == _NOTHING:
        return None
    if '$ref' in schema:
        name = schema['$ref'].rpartition('/')[2]
        others = {key: value for key, value in definitions.items() if key != name}  # a kind may contain itself
        return _pruned(definitions.get(name, {}), others)
    if 'anyOf' in schema:
        options = [option for each in schema['anyOf'] if (option := _pruned(each, definitions)) is not None]
        return {'anyOf': options} if options else None
    pruned = dict(schema)
    for key in ('items', 'additionalProperties'):
        if isinstance(schema.get(key), Mapping):
            pruned[key] = _pruned(schema[key], definitions)
    if 'prefixItems' in schema:
        pruned['prefixItems'] = [_pruned(each, definitions) for each in schema['prefixItems']]
    parts = [pruned.get('items', ()), pruned.get('additionalProperties', ()), *pruned.get('prefixItems', ())]
    return None if None in parts else pruned


def _choices(schema: Mapping[str, Any]) -> list[Any]:
    if 'anyOf' in schema:
        return [choice for each in schema['anyOf'] for choice in _choices(each)]
    return [schema['const']] if 'const' in schema else list(schema.get('enum', ()))


def _in_words(schema: Mapping[str, Any]) -> str:
    if 'anyOf' in schema:
        return ' or '.join(dict.fromkeys(_in_words(each) for each in schema['anyOf']))
    if 'enum' in schema or 'const' in schema:
        return 'one of ' + ', '.join(str(each) for each in _choices(schema))
    if 'prefixItems' in schema:
        first, *_ = parts = schema['prefixItems']
        return f'a list of {len(parts)} values, the first {_in_words(first)}'
    if schema.get('items'):
        return f'a list, each entry {_in_words(schema["items"])}'
    return _WORDS.get(schema.get('type', ''), 'of another kind')


_WORDS = {
    'string': 'a string',
    'integer': 'an integer',
    'number': 'a number',
    'boolean': 'true or false',
    'null': 'null',
    'array': 'a list',
    'object': 'a mapping',
}
