"""What a file must hold, said once as a dataclass: the fields' names and types, checked after parsing.

    @dataclass
    class Tensor:
        name: str
        shape: list[int]
        file: str | None = None

    check(Tensor, {"name": "norm.weight", "shape": [8]})

Types: bool, int, float (which takes whole numbers too), str, Any, Literal, list[X], tuple[X, ...], dict[str, X],
`X | Y` and other dataclasses. Fields that the dataclass does not know are left out: a later version may have written
them.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import types
from typing import Any, ClassVar, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from landmark_cli.errors import shown

T = TypeVar("T")

NAMES = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "text",
    list: "a list",
    tuple: "a list",
    dict: "an object",
    types.NoneType: "null",
}
# Nothing that a file counts is larger; a larger one would only overflow somewhere else.
LARGEST_INT = 2**63 - 1


def check(schema: type[T], content: Any, where: str = "") -> T:
    """Parsed JSON or YAML as an object of the dataclass `schema`, its fields' types checked, dataclasses in it made.

    where: the place in the file, for the message. Raises ValueError naming the field that is missing or of another
    type, and what was found there.
    """
    if not isinstance(content, dict):
        raise _unexpected(where, "an object", content)
    prefix = f"{where}." if where else ""
    values = {}
    for field in dataclasses.fields(schema):
        if field.name in content:
            values[field.name] = _convert(_hints(schema)[field.name], content[field.name], prefix + field.name)
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            raise ValueError(f"it lacks {prefix}{field.name}")
    return schema(**values)


def check_attributes(thing: object, owner: type) -> None:
    """Check the attributes of an object that the class `owner` (its own or one above it) declares with their types.

    Raises ValueError naming the first that is of another type.
    """
    for name, kind in inspect.get_annotations(owner, eval_str=True).items():
        if get_origin(kind) is not ClassVar:
            _convert(kind, getattr(thing, name), name)


@functools.cache
def _hints(schema: type) -> dict[str, Any]:
    return get_type_hints(schema)


def _convert(kind: Any, value: Any, where: str) -> Any:
    origin, inner = get_origin(kind), get_args(kind)
    if kind is Any:
        return value
    if origin in (Union, types.UnionType):
        # The first of the types that fits; where none does, the first one's message, for null is the usual other.
        failures = []
        for one in inner:
            try:
                return _convert(one, value, where)
            except ValueError as error:
                failures.append(error)
        raise failures[0]
    if origin is Literal:
        if not any(type(value) is type(choice) and value == choice for choice in inner):
            raise _unexpected(where, " or ".join(map(repr, inner)), value)
        return value
    if dataclasses.is_dataclass(kind):
        return check(kind, value, where)
    if origin in (list, tuple):
        if not isinstance(value, (list, tuple)):
            raise _unexpected(where, NAMES[list], value)
        return origin(_convert(inner[0], item, f"{where}[{index}]") for index, item in enumerate(value))
    if origin is dict:
        if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
            raise _unexpected(where, NAMES[dict], value)
        return {key: _convert(inner[1], item, f"{where}.{key}") for key, item in value.items()}
    if kind is float and type(value) is int and abs(value) <= LARGEST_INT:
        return float(value)
    if type(value) is not kind or (kind is int and abs(value) > LARGEST_INT):
        raise _unexpected(where, NAMES[kind], value)
    return value


def _unexpected(where: str, wanted: str, found: Any) -> ValueError:
    return ValueError(f"{where or 'it'} should be {wanted}, found {shown(found)}")
