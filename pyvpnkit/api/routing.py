"""Operations: a route, what it takes and what it answers, written once for the server and for the OpenAPI document.

A handler gets a `Call` whose path parameters, query and body were checked with the operation's schemas, and returns an `Answer`
or a response it streams itself.
"""

from __future__ import annotations

import json
import re
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final, TypeAlias

from aiohttp import web

from pyvpnkit.api import schema
from pyvpnkit.api.errors import ApiError
from pyvpnkit.api.http import connection_of, json_answer
from pyvpnkit.api.schema import Invalid, Schema

JSON: Final = "application/json"
MAX_ID: Final = (1 << 53) - 1
"""Whole numbers are exact up to here in every JSON reader."""

_PARAMETER: Final = re.compile(r"\{(\w+)\}")
_WHOLE: Final = re.compile(r"-?\d{1,19}", re.ASCII)


@dataclass(frozen=True, slots=True)
class Answer:
    """A JSON answer; `audit` is what the log says of it."""

    value: Any
    status: int = 200
    audit: str = ""


@dataclass(frozen=True, slots=True)
class Call:
    """One request, checked."""

    request: web.Request
    path: Mapping[str, Any]
    query: Mapping[str, Any]
    """Those that were given."""
    body: Any


Handler: TypeAlias = Callable[[Call], Awaitable[Answer | web.StreamResponse]]


@dataclass(frozen=True, slots=True)
class Reply:
    """One status an operation may answer with."""

    description: str
    schema: Schema | None = None
    content_type: str = JSON


@dataclass(frozen=True, slots=True, kw_only=True)
class Operation:
    """`METHOD /path/{parameter}`; every name in the path has its schema in `parameters`."""

    method: str
    path: str
    summary: str
    handler: Handler
    replies: Mapping[int, Reply]
    parameters: Mapping[str, Schema] = field(default_factory=dict)
    query: Mapping[str, Schema] = field(default_factory=dict)
    headers: Mapping[str, Schema] = field(default_factory=dict)
    body: Schema | None = None

    @property
    def id(self) -> str:
        """`get_v1_flows`."""
        return f"{self.method.lower()}{re.sub(r'[^A-Za-z0-9]+', '_', self.path)}".rstrip("_")

    def route(self) -> web.RouteDef:
        """For `web.Application.add_routes`."""
        return web.route(self.method, self.path, self._serve)

    async def _serve(self, request: web.Request) -> web.StreamResponse:
        try:
            call = Call(request, self._path(request), self._query(request), await self._body(request))
        except Invalid as error:
            raise ApiError(400, str(error)) from None
        answer = await self.handler(call)
        if isinstance(answer, web.StreamResponse):
            return answer
        connection_of(request).audit = answer.audit
        return json_answer(answer.status, answer.value)

    def _path(self, request: web.Request) -> dict[str, Any]:
        found = {}
        for name in _PARAMETER.findall(self.path):
            given = request.match_info[name]
            value = _value(given, self.parameters[name])
            try:
                schema.check(value, self.parameters[name], name)
            except Invalid:
                if self.parameters[name].get("type") == "integer":
                    raise ApiError(404, f"{name} {given[:80]!r} is unknown") from None
                raise
            found[name] = value
        return found

    def _query(self, request: web.Request) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for name, given in request.query.items():
            if name not in self.query:
                known = ", ".join(self.query) or "none is known here"
                raise Invalid(f"query parameter {name[:80]!r} is not known; {known}")
            if name in found:
                raise Invalid(f"query parameter {name!r} is given more than once")
            wanted = self.query[name]
            _encodable(given, name)
            found[name] = _value(given, wanted)
            schema.check(found[name], wanted, name)
        for name, wanted in self.query.items():
            if wanted.get("x-required") and name not in found:
                raise Invalid(f"query parameter {name!r} is missing")
        return found

    async def _body(self, request: web.Request) -> Any:
        octets = await request.read()
        if self.body is None:
            if octets:
                raise Invalid(f"{self.method} {self.path} takes no body")
            return None
        value = decode(octets)
        schema.check(value, self.body)
        return value


def _value(given: str, wanted: Schema) -> Any:
    return int(given) if wanted.get("type") == "integer" and _WHOLE.fullmatch(given) else given


def decode(octets: bytes) -> Any:
    """The JSON value (RFC 8259) in a body; raises `Invalid` for anything else, however deep or odd it is."""
    try:
        value = json.loads(octets.decode(), parse_constant=_no_constant, object_pairs_hook=_no_doubles)
    except UnicodeDecodeError as error:
        raise Invalid(f"body: octet {error.start} is not UTF-8") from None
    except json.JSONDecodeError as error:
        raise Invalid(f"body: no JSON: {error}" if octets else "body: is missing; send JSON") from None
    except RecursionError:
        raise Invalid("body: JSON is nested too deeply") from None
    except ValueError as error:
        raise Invalid(f"body: {error}") from None
    _encodable(json.dumps(value, ensure_ascii=False), "body")
    return value


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is no JSON")


def _no_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a member is given twice")
    return found


def _encodable(given: str, where: str) -> None:
    """Half a surrogate pair is a string to JSON and to Python, and to nobody else."""
    try:
        given.encode()
    except UnicodeEncodeError:
        raise Invalid(f"{where}: has half of a surrogate pair") from None
    if "\0" in given or "\\u0000" in given:
        raise Invalid(f"{where}: has a zero character")
