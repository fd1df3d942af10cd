"""The part of JSON Schema (2020-12) that the control API is described in, and a check of values against it.

One definition serves twice: what `/v1/openapi.json` promises is what requests are checked with, so the two cannot differ.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Final, TypeAlias

Schema: TypeAlias = Mapping[str, Any]

_TYPES: Final[Mapping[str, tuple[type, ...]]] = {
    "object": (dict,),
    "array": (list,),
    "string": (str,),
    "integer": (int,),
    "number": (int, float),
    "boolean": (bool,),
    "null": (type(None),),
}
_ARTICLES: Final = {"object": "an object", "array": "a list", "integer": "a whole number", "null": "null"}
_SHOWN: Final = 80
"""Characters of a bad value that an error repeats."""


class Invalid(ValueError):
    """A value is not what its schema says; the text names the place, the value, and what would be accepted."""


def text(**more: Any) -> Schema:
    """A string."""
    return {"type": "string", **more}


def integer(least: int, most: int, **more: Any) -> Schema:
    """A whole number in a range."""
    return {"type": "integer", "minimum": least, "maximum": most, **more}


def count(description: str) -> Schema:
    """Something counted."""
    return {"type": "integer", "minimum": 0, "description": description}


def array(items: Schema, **more: Any) -> Schema:
    """A list."""
    return {"type": "array", "items": items, **more}


def record(properties: Mapping[str, Schema], *, optional: tuple[str, ...] = (), **more: Any) -> Schema:
    """An object with exactly these members, of which `optional` may be missing."""
    return {
        "type": "object",
        "properties": dict(properties),
        "required": [name for name in properties if name not in optional],
        "additionalProperties": False,
        **more,
    }


def check(value: Any, schema: Schema, where: str = "body") -> None:
    """Raise `Invalid` when `value` (as `json.loads` makes them) is not as `schema` says."""
    if "anyOf" in schema:
        _any_of(value, schema["anyOf"], where)
        return
    if "enum" in schema and not any(value == one and type(value) is type(one) for one in schema["enum"]):
        raise Invalid(f"{where}: {_shown(value)} is none of {', '.join(map(str, schema['enum']))}")
    kinds = schema.get("type", ())
    kinds = (kinds,) if isinstance(kinds, str) else tuple(kinds)
    if kinds and not any(_is(value, kind) for kind in kinds):
        wanted = " or ".join(_ARTICLES.get(kind, f"a {kind}") for kind in kinds)
        raise Invalid(f"{where}: {_shown(value)} is not {wanted}")
    match value:
        case bool() | None:
            pass
        case int() | float():
            _check_number(value, schema, where)
        case str():
            _check_text(value, schema, where)
        case list():
            for position, item in enumerate(value):
                check(item, schema.get("items", {}), f"{where}[{position}]")
        case dict():
            _check_object(value, schema, where)


def _is(value: Any, kind: str) -> bool:
    if isinstance(value, bool):
        return kind == "boolean"  # to Python it is a whole number too
    return isinstance(value, _TYPES[kind])


def _any_of(value: Any, schemas: list[Schema], where: str) -> None:
    complaints = []
    for one in schemas:
        try:
            check(value, one, where)
        except Invalid as error:
            complaints.append(str(error))
        else:
            return
    raise Invalid("; or ".join(complaints))


def _check_number(value: int | float, schema: Schema, where: str) -> None:
    least, most = schema.get("minimum"), schema.get("maximum")
    if (least is not None and value < least) or (most is not None and value > most):
        bounds = f"{least} to {most}" if most is not None else f"at least {least}"
        raise Invalid(f"{where}: {_shown(value)} is outside of what is accepted, {bounds}")


def _check_text(value: str, schema: Schema, where: str) -> None:
    if len(value) < schema.get("minLength", 0):
        raise Invalid(f"{where}: is empty")
    if len(value) > schema.get("maxLength", len(value)):
        raise Invalid(f"{where}: has {len(value)} characters; at most {schema['maxLength']} are accepted")
    if "pattern" in schema and not re.search(schema["pattern"], value):
        like = schema.get("examples", [schema["pattern"]])[0]
        raise Invalid(f"{where}: {_shown(value)} is not of the form of {like}")


def _check_object(value: dict[str, Any], schema: Schema, where: str) -> None:
    properties: Mapping[str, Schema] = schema.get("properties", {})
    for name in schema.get("required", ()):
        if name not in value:
            raise Invalid(f"{where}: {name!r} is missing")
    others = schema.get("additionalProperties", True)
    for name, item in value.items():
        if name in properties:
            check(item, properties[name], f"{where}.{name}")
        elif others is False:
            raise Invalid(
                f"{where}: {_shown(name)} is not known; what may be given is {', '.join(properties) or 'nothing'}"
            )
        elif isinstance(others, Mapping):
            check(item, others, f"{where}[{_shown(name)}]")


def _shown(value: Any) -> str:
    shown = repr(value) if isinstance(value, str) else str(value) if not isinstance(value, bool) else str(value).lower()
    return shown if len(shown) <= _SHOWN else f"{shown[:_SHOWN]}..."
