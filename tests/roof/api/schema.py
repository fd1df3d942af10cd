"""JSON Schema for tests, apart from the server's own checks: does a value fit, and values that fit or nearly do.

Only what the control API's document uses; any other keyword is an error, so that nothing goes unchecked.
"""

from __future__ import annotations

import re
from typing import Any

from hypothesis import strategies as st

KNOWN = {
    "type", "properties", "required", "additionalProperties", "items", "enum", "minimum", "maximum", "pattern",
    "minLength", "maxLength", "anyOf", "$ref", "description", "examples",
}  # fmt: skip
Document = dict[str, Any]


def resolve(document: Document, schema: Any) -> Any:
    while "$ref" in schema:
        found: Any = document
        for part in schema["$ref"].removeprefix("#/").split("/"):
            found = found[part]
        schema = found
    return schema


def kind_of(value: Any) -> str:
    names = {bool: "boolean", int: "integer", float: "number", str: "string", list: "array", dict: "object"}
    return names.get(type(value), "null")


def misfit(document: Document, schema: Any, value: Any, where: str = "$") -> str | None:
    """Why `value` does not fit, or `None`."""
    schema = resolve(document, schema)
    assert set(schema) <= KNOWN, f"{where}: {set(schema) - KNOWN}"
    if "anyOf" in schema:
        found = [misfit(document, one, value, where) for one in schema["anyOf"]]
        return None if None in found else f"{where}: {found}"
    kind = kind_of(value)
    kinds = schema.get("type", kind)
    kinds = [kinds] if isinstance(kinds, str) else kinds
    if kind not in kinds and not (kind == "integer" and "number" in kinds):
        return f"{where}: {value!r} is no {kinds}"
    if "enum" in schema and value not in schema["enum"]:
        return f"{where}: {value!r} is not in {schema['enum']}"
    match value:
        case bool() | None:
            return None
        case int() | float():
            fits = schema.get("minimum", value) <= value <= schema.get("maximum", value)
            return None if fits else f"{where}: {value} is out of range"
        case str():
            fits = schema.get("minLength", 0) <= len(value) <= schema.get("maxLength", len(value))
            fits = fits and ("pattern" not in schema or re.search(schema["pattern"], value) is not None)
            return None if fits else f"{where}: {value!r}"
        case list():
            parts = (misfit(document, schema["items"], one, f"{where}[{at}]") for at, one in enumerate(value))
            return next(filter(None, parts), None)
    return _misfit_object(document, schema, value, where)


def _misfit_object(document: Document, schema: Any, value: dict[str, Any], where: str) -> str | None:
    if missing := [name for name in schema.get("required", ()) if name not in value]:
        return f"{where}: {missing} are missing"
    properties, others = schema.get("properties", {}), schema.get("additionalProperties", True)
    for name, one in value.items():
        if name in properties:
            found = misfit(document, properties[name], one, f"{where}.{name}")
        elif others is False:
            found = f"{where}: {name} is not declared"
        else:
            found = None if others is True else misfit(document, others, one, f"{where}.{name}")
        if found:
            return found
    return None


TEXT = st.text(st.characters(exclude_categories=("Cs",), exclude_characters="\0"), max_size=20)
ANYTHING: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats(allow_nan=False, allow_infinity=False) | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=8,
)


def fitting(document: Document, schema: Any) -> st.SearchStrategy[Any]:
    """Values that fit."""
    schema = resolve(document, schema)
    if "anyOf" in schema:
        return st.one_of(*(fitting(document, one) for one in schema["anyOf"]))
    if "enum" in schema:
        return st.sampled_from(schema["enum"])
    kinds = schema.get("type", "string")
    kinds = [kinds] if isinstance(kinds, str) else kinds
    return st.one_of(*(_of_kind(document, schema, kind) for kind in kinds))


def _of_kind(document: Document, schema: Any, kind: str) -> st.SearchStrategy[Any]:
    match kind:
        case "null":
            return st.none()
        case "boolean":
            return st.booleans()
        case "integer":
            return st.integers(schema.get("minimum", -100), schema.get("maximum", 100))
        case "number":
            return st.floats(0, 1e9)
        case "string" if "pattern" in schema:
            return st.from_regex(schema["pattern"], fullmatch=True).map(lambda text: text.removesuffix("\n"))
        case "string":
            return TEXT.filter(lambda text: len(text) >= schema.get("minLength", 0))
        case "array":
            return st.lists(fitting(document, schema["items"]), max_size=3)
        case _:
            properties = {name: fitting(document, one) for name, one in schema.get("properties", {}).items()}
            required = set(schema.get("required", ()))
            return st.fixed_dictionaries(
                {name: one for name, one in properties.items() if name in required},
                optional={name: one for name, one in properties.items() if name not in required},
            )


@st.composite
def nearly(draw: st.DrawFn, document: Document, schema: Any) -> Any:
    """Values that fit but for one thing, or are anything at all."""
    value = draw(fitting(document, schema))
    if not isinstance(value, dict) or draw(st.integers(0, 3)) == 0:
        return draw(ANYTHING)
    match draw(st.sampled_from(["drop", "add", "change"])):
        case "drop" if value:
            del value[draw(st.sampled_from(sorted(value)))]
        case "change" if value:
            value[draw(st.sampled_from(sorted(value)))] = draw(ANYTHING)
        case _:
            value[draw(TEXT)] = draw(ANYTHING)
    return value
