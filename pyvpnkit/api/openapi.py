"""The OpenAPI 3.1 document of a set of operations."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from http import HTTPStatus
from typing import Any, Final

from pyvpnkit.api.routing import JSON, Operation
from pyvpnkit.api.schema import Schema, record, text

PROBLEM: Final[Schema] = record(
    {
        "message": text(description="What went wrong, and what to change."),
        "holder": {"$ref": "#/components/schemas/Forward"},
    },
    optional=("holder",),
    description="An error.",
)

_ALWAYS: Final[Mapping[int, str]] = {400: "The request is not what this operation takes."}
_WITH_BODY: Final[Mapping[int, str]] = {
    408: "The body did not come in time.",
    413: "The body is too large.",
    415: "The body is not `application/json`.",
}
_ON_TCP: Final[Mapping[int, str]] = {
    401: "On TCP: the token is missing or wrong.",
    403: "Not permitted by the settings; on TCP also: the `Host`, or a request of a web page.",
}


def document(operations: Iterable[Operation], *, schemas: Mapping[str, Schema], version: str) -> dict[str, Any]:
    """The document as plain values."""
    paths: dict[str, dict[str, Any]] = {}
    for operation in operations:
        paths.setdefault(operation.path, {})[operation.method.lower()] = _operation(operation)
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "pyvpnkit control API",
            "version": version,
            "description": "HTTP on the daemon's `control.sock`, and on TCP where the settings say so. Errors are "
            '`{"message": ...}` that say what to change.',
        },
        "servers": [{"url": "http://localhost", "description": "through the daemon's Unix socket"}],
        "paths": paths,
        "components": {
            "schemas": {**schemas, "Problem": PROBLEM},
            "securitySchemes": {
                "token": {"type": "http", "scheme": "bearer", "description": "On TCP, where one is set."}
            },
        },
        "security": [{}, {"token": []}],
    }


def _operation(operation: Operation) -> dict[str, Any]:
    replies: dict[str, Any] = {}
    for status, reply in operation.replies.items():
        content = {} if reply.schema is None else {"content": {reply.content_type: {"schema": reply.schema}}}
        replies[str(status)] = {"description": reply.description, **content}
    refusals = {**_ALWAYS, **_ON_TCP, **(_WITH_BODY if operation.body is not None else {})}
    for status, words in sorted(refusals.items()):
        replies.setdefault(str(status), problem(words))
    found: dict[str, Any] = {"operationId": operation.id, "summary": operation.summary, "responses": replies}
    parameters = [_parameter(name, "path", wanted) for name, wanted in operation.parameters.items()]
    parameters += [_parameter(name, "query", wanted) for name, wanted in operation.query.items()]
    parameters += [_parameter(name, "header", wanted) for name, wanted in operation.headers.items()]
    if parameters:
        found["parameters"] = parameters
    if operation.body is not None:
        found["requestBody"] = {"required": True, "content": {JSON: {"schema": operation.body}}}
    return found


def _parameter(name: str, place: str, wanted: Schema) -> dict[str, Any]:
    plain = {key: value for key, value in wanted.items() if key not in ("description", "x-required")}
    required = place == "path" or bool(wanted.get("x-required"))
    return {
        "name": name,
        "in": place,
        "required": required,
        "description": wanted.get("description", ""),
        "schema": plain,
    }


def problem(words: str) -> dict[str, Any]:
    """A reply that is an error."""
    return {"description": words, "content": {JSON: {"schema": {"$ref": "#/components/schemas/Problem"}}}}


def reason(status: int) -> str:
    """`Not Found` of 404."""
    return HTTPStatus(status).phrase
